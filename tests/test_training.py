"""The training scripts and sample.py: randomness, processes, resume, the cache, wrong input."""

import argparse
import functools
import json
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY_CONV,
    TINY_VIT,
    difference,
    fails,
    latents_of,
    launch,
    log_of,
    normal,
    read,
    run,
    size_of,
    tiny,
    together,
    without_times,
)
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms.functional import pil_to_tensor

import ae
import dit
import fid
import sample
import train_ae
import train_dit

SMALL = "--batch 16 --log_every 1 --ckpt_every 4"


@pytest.fixture(scope="module")
def tiny_dit(tiny_vmae, tmp_path_factory):
    """The checkpoint of a DiT trained for 8 steps on the digits."""
    out = tmp_path_factory.mktemp("dit")
    run(train_dit, *latents_of(tiny_vmae), "--out", out, SMALL, "--steps 8 --sample_steps 4")
    return out / "ckpt.pt"


def samples_of(out):
    """What sample.py --num wrote into a folder: images (N, H, W, 3), labels (N,)."""
    files = sorted((out / "samples").glob("*.png"))
    assert [file.name.split("-")[0] for file in files] == [f"{i:06}" for i in range(len(files))]
    images = np.stack([np.asarray(Image.open(file)) for file in files])
    return images, np.array([int(file.stem.split("-")[1]) for file in files])


def changed(path, source, part, key):
    """A copy of a checkpoint in which one tensor of a part is another."""
    ckpt = read(source)
    ckpt[part][key] = ckpt[part][key] + 1
    torch.save(ckpt, path)
    return path


# ---- one rule of randomness: processes and micro-batches change the speed, not the run ----


def test_vmae_ends_the_same_with_two_processes_or_other_micro_batches(tmp_path):
    one, micro, two = tmp_path / "one", tmp_path / "micro", tmp_path / "two"
    flags = f"{TINY_VIT} {SMALL} --steps 6"
    run(train_ae, "--out", one, flags)
    run(train_ae, "--out", micro, flags, "--micro_batch 4")
    together(2, "train_ae.py", "--out", two, flags, "--micro_batch 4")
    for other in (micro, two):
        assert difference(one, other) < 1e-5
        for a, b in zip(log_of(one), log_of(other)):
            assert a["step"] == b["step"] and abs(a["masked"] - b["masked"]) < 1e-5
    # They agree, and not because nothing moves
    sizes = {"hidden_size": 32, "depth": 1, "decoder_depth": 1, "num_heads": 2}
    start = ae.MODELS["vmae"](image_size=32, **sizes)
    assert (read(one / "ckpt.pt")["model"]["mask_token"] - start.mask_token).abs().max() > 1e-3


def test_dit_ends_the_same_with_two_processes_or_other_micro_batches(tmp_path, tiny_vmae):
    one, micro, two = tmp_path / "one", tmp_path / "micro", tmp_path / "two"
    # Where a gate of adaLN-Zero is still near zero, a gradient is hardly more than rounding, and
    # Adam moves its weight by the learning rate either way: the demo's would show that alone.
    few = "--steps 6 --sample_steps 2 --lr 1e-4 --ema 0.5"
    flags = (*latents_of(tiny_vmae), SMALL, few)
    run(train_dit, "--out", one, *flags)
    run(train_dit, "--out", micro, *flags, "--micro_batch 4")
    together(2, "train_dit.py", "--out", two, *flags)
    for other in (micro, two):
        assert difference(one, other) < 1e-5
        assert difference(one, other, "ema") < 1e-5
    # They agree, and not because nothing moves: this weight starts at zero
    trained = read(one / "ckpt.pt")
    for part in ("model", "ema"):
        assert trained[part]["final_layer.linear.weight"].abs().max() > 1e-4


@pytest.mark.parametrize("model", ["vae", "dae", "mae"])
def test_other_models_end_the_same_with_other_micro_batches(tmp_path, model):
    flags = f"{tiny(model)} {SMALL} --steps 4"
    run(train_ae, "--out", tmp_path / "one", flags)
    run(train_ae, "--out", tmp_path / "micro", flags, "--micro_batch 8")
    assert difference(tmp_path / "one", tmp_path / "micro") < 1e-5


@pytest.mark.slow
def test_two_processes_train_sdvae_with_one_discriminator(tmp_path):
    flags = f"--model sdvae {TINY_CONV} {SMALL} --steps 4 --disc_start 2"
    together(2, "train_ae.py", "--out", tmp_path / "two", flags)
    terms = log_of(tmp_path / "two")
    assert "adv" not in terms[0] and {"adv", "disc", "adaptive", "real", "fake"} <= terms[1].keys()
    assert all(np.isfinite(value) for line in terms for value in line.values())


def test_streams_of_random_numbers_have_different_seeds():
    """SeedSequence((7, 5)) is SeedSequence((7, 5, 0)): keys of one length tell them apart."""
    ends = ((7, 5, 0), (7, 0, 5), (5, 7, 0))
    seeds = [sample.seed_of(stream, *end) for stream in range(10) for end in ends]
    assert len(set(seeds)) == len(seeds) == 30


# ---- resume ----


@pytest.mark.parametrize("model", ["vmae", pytest.param("sdvae", marks=pytest.mark.slow)])
def test_a_resumed_autoencoder_ends_in_the_same_bits(tmp_path, model, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = f"{tiny(model)} {SMALL} --batch 8 --schedule constant"
    run(train_ae, "--out", whole, flags, "--steps 10")
    # A cluster's job script can always carry --resume
    run(train_ae, "--out", cut, flags, "--steps 4 --resume")
    assert f"{cut} has no checkpoint: the run begins" in capsys.readouterr().out
    run(train_ae, "--out", cut, flags, "--steps 10 --resume")
    assert re.search("going on from step 4 .*--steps 10", capsys.readouterr().out)
    for part in ("model", "disc") if model == "sdvae" else ("model",):
        assert difference(whole, cut, part) == 0
    assert without_times(whole) == without_times(cut)


def test_a_resumed_dit_ends_in_the_same_bits_whatever_was_logged_after_the_checkpoint(
    tmp_path, tiny_vmae
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = (*latents_of(tiny_vmae), SMALL, "--sample_steps 2 --schedule constant")
    run(train_dit, "--out", whole, *flags, "--steps 10 --ema 0.25")
    run(train_dit, "--out", cut, *flags, "--steps 8")
    # As if the run had been killed after step 9, while it wrote the line of step 10
    with open(cut / "log.jsonl", "a") as file:
        file.write(json.dumps({"step": 9, "loss": 123.0}) + '\n{"step": 10, "los')
    # A longer run's own average is another
    assert "--ema 0.25, not 0.4" in fails(train_dit, "--out", cut, *flags, "--steps 10 --resume")
    run(train_dit, "--out", cut, *flags, "--steps 10 --ema 0.25 --resume")
    for part in ("model", "ema"):
        assert difference(whole, cut, part) == 0
    assert without_times(whole) == without_times(cut)


def test_resuming_a_finished_run_ends_at_once_and_changes_nothing(tiny_vmae, tiny_dit, capsys):
    files = [ckpt.parent / name for ckpt in (tiny_vmae, tiny_dit) for name in (ckpt, "log.jsonl")]
    before = [file.read_bytes() for file in files]
    run(train_ae, "--out", tiny_vmae.parent, TINY_VIT, "--steps 20 --resume")
    start = ("--ae", tiny_vmae, "--out", tiny_dit.parent)
    run(train_dit, *start, SMALL, "--steps 8 --sample_steps 4 --resume")
    assert capsys.readouterr().out.count("finished: see") == 2
    assert [file.read_bytes() for file in files] == before


def test_resuming_refuses_other_settings_by_name_and_prints_those_that_may_change(
    tmp_path, tiny_vmae, capsys
):
    flags = ("--out", tmp_path, TINY_VIT, SMALL, "--steps 4")
    run(train_ae, *flags)
    before = (tmp_path / "ckpt.pt").read_bytes()
    others = {"hidden_size": 64, "batch": 8, "seed": 1, "model": "mae", "steps": 6}
    for name, value in (others | {"init": tiny_vmae}).items():
        message = fails(train_ae, *flags, f"--{name}", value, "--resume")
        assert re.search(rf"--{name} \S+, not {value}", message)
    assert "--resume: the run" in fails(train_dit, *flags[:2], "--ae", tiny_vmae, "--resume")
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    capsys.readouterr()

    free = "--base_lr 0.001 --ckpt_every 3 --grad_clip 1.0 --log_every 2 --micro_batch 8"
    run(train_ae, *flags, free, "--resume")
    line = re.search("going on from step 4 (.*)", capsys.readouterr().out)[1]
    assert sorted(re.findall(r"--\w+ \S+", line)) == re.findall(r"--\w+ \S+", free)


def test_a_run_moved_with_its_images_resumes_there_but_not_on_as_many_others(
    tmp_path, folder, capsys
):
    first, moved, images = tmp_path / "first", tmp_path / "moved", tmp_path / "images"
    flags = f"{TINY_VIT} {SMALL} --image_size 32 --lpips 0 --workers 0 --schedule constant"
    run(train_ae, "--data", folder, "--out", first, flags, "--steps 2")
    before = (first / "ckpt.pt").read_bytes()
    shutil.copytree(first, moved)
    shutil.copytree(folder, images)
    run(train_ae, "--data", images, "--out", moved, flags, "--steps 3 --resume")
    assert f"--data {images}" in capsys.readouterr().out
    assert (first / "ckpt.pt").read_bytes() == before
    assert [line["step"] for line in log_of(moved)] == [1, 2, 3]
    (images / "cats" / "000.jpg").rename(images / "cats" / "other.jpg")
    message = fails(train_ae, "--data", images, "--out", moved, flags, "--steps 4 --resume")
    assert "other images" in message


# ---- the average of the weights ----


@pytest.mark.parametrize(
    "steps, decay", [("3", 0), ("12", 0.5), ("60000", 0.9999), ("99999", 0.9999), ("9 --ema 0", 0)]
)
def test_the_decay_of_the_average_is_the_paper_s_or_what_the_run_has_steps_for(
    tmp_path, tiny_vmae, monkeypatch, steps, decay
):
    def begin(args, *_):
        raise ae.UserError(f"the decay is {args.ema:.6g}")

    monkeypatch.setattr(train_ae, "begin", begin)
    message = fails(train_dit, "--ae", tiny_vmae, "--out", tmp_path, f"--steps {steps}")
    assert message.endswith(f"the decay is {decay:g}")


def test_the_average_of_the_weights_has_a_constant_decay(tmp_path, tiny_vmae):
    flags = (*latents_of(tiny_vmae), SMALL, "--ckpt_every 1 --keep_every 1 --sample_steps 1")
    run(train_dit, "--out", tmp_path, *flags, "--steps 2 --ema 0.9")
    key = "final_layer.linear.weight"  # which starts at zero
    first, second = (read(tmp_path / f"ckpt-000000{step}.pt") for step in (1, 2))
    torch.testing.assert_close(first["ema"][key], 0.1 * first["model"][key])
    expected = 0.09 * first["model"][key] + 0.1 * second["model"][key]
    torch.testing.assert_close(second["ema"][key], expected)


# ---- what training shows ----


def test_the_start_prints_what_a_person_checks(tmp_path, tiny_vmae, folder, capsys):
    run(train_ae, "--out", tmp_path / "a", TINY_VIT, SMALL, "--steps 1")
    text = capsys.readouterr().out
    for words in ("demo settings", "mask_ratio 0.6", "lpips 0", "4,500 images of 10 classes"):
        assert words in text
    for words in ("parameters", "MiB", "step 1/1", "visible", "masked", "kl", "lr", "grad_norm"):
        assert words in text
    for words in ("skipped 0", "unreadable 0", "images/s", "left"):
        assert words in text
    run(train_dit, "--ae", tiny_vmae, "--out", tmp_path / "d", "--steps 1 --sample_steps 1")
    text = capsys.readouterr().out
    statistics = text.split("normalised latents at first: mean ")[1].splitlines()[0]
    mean, std = statistics.split(", std ")
    assert abs(float(mean)) < 0.1 and abs(float(std) - 1) < 0.1
    few = f"{TINY_VIT} --image_size 32 --lpips 0 --workers 0 --batch 4 --steps 1"
    run(train_ae, "--data", folder, "--out", tmp_path / "b", few)
    text = capsys.readouterr().out
    assert "paper settings" in text and "120 images of 3 classes" in text


def test_pictures_have_a_row_for_each_thing_shown(tiny_vmae, tiny_dit):
    # A digit is shown at 64 pixels. The rows: original, reconstruction, masked input, prediction
    assert size_of(tiny_vmae.parent / "recon.png")[1] // 66 == 4
    assert size_of(tiny_dit.parent / "samples.png")[1] // 66 == 10


# ---- images ----


def test_center_crop_is_adm_s_for_a_known_picture():
    ramp = np.arange(64, dtype=np.uint8)[:, None].repeat(128, 1)
    crop = np.asarray(train_ae.center_crop(Image.fromarray(ramp).convert("RGB"), 32))
    assert crop.shape == (32, 32, 3)
    # A picture of twice the size is halved once, by averaging
    assert np.array_equal(crop[:, 0, 0], np.round(ramp[:, 0].reshape(32, 2).mean(1) + 1e-9))
    wide = Image.new("RGB", (100, 40))
    wide.putpixel((50, 20), (255, 255, 255))
    # The crop begins at column (100 - 40) // 2
    assert np.asarray(train_ae.center_crop(wide, 40))[20, 20].tolist() == [255] * 3


def test_class_folders_and_flat_folders(folder):
    images = train_ae.Images(folder)
    assert images.classes == ["ants", "bees", "cats"] and len(images) == 120
    assert images.labels.tolist() == [0] * 40 + [1] * 40 + [2] * 40
    assert images[0].mode == "RGB"
    assert images.path(41) == str(folder / "bees" / "001.png")
    flat = train_ae.Images(folder / "bees")
    assert flat.classes == [""] and len(flat) == 40


def test_augmentation_depends_on_seed_epoch_and_index_alone(folder):
    image = train_ae.Images(folder)[0]

    def make(seed, epoch, index):
        return train_ae.augment(32, seed, image, index, epoch, False)

    first = make(0, 1, 2)
    torch.rand(3)
    assert torch.equal(first, make(0, 1, 2))
    assert not any(torch.equal(first, make(*key)) for key in ((1, 1, 2), (0, 2, 2), (0, 1, 3)))


@pytest.mark.parametrize("side", [(37, 50), (9, 12), (300, 400)])
def test_augmentation_is_torchvision_s_random_resized_crop_flipped_where_the_key_says_so(side):
    """On noise, where the rounding differs most: PyTorch's weights have 16 bits, Pillow's 32."""
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (*side, 3), dtype=np.uint8))
    crop = T.RandomResizedCrop(32, (0.75, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    for epoch in range(8):
        torch.manual_seed(sample.seed_of(sample.CROP, 3, epoch, 5))
        expected = pil_to_tensor(crop(image))
        ours = train_ae.augment(32, 3, image, 5, epoch, False)
        assert torch.equal(train_ae.augment(32, 3, image, 5, epoch, True), ours.flip(-1))
        assert ours.shape == (3, 32, 32) and ours.dtype == torch.uint8
        levels = (ours.int() - expected.int()).abs()
        assert levels.max() <= 2 and (levels > 1).sum() <= 1


def test_augmentation_resizes_width_then_height_whatever_pillow_s_order():
    """Pillow 13 resizes the height of a tall picture first, which clips other pixels on the way."""
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 2, (400, 300, 3), dtype=np.uint8) * 255)
    for epoch in range(8):
        torch.manual_seed(sample.seed_of(sample.CROP, 3, epoch, 5))
        box = T.RandomResizedCrop.get_params(image, (0.75, 1.0), (3 / 4, 4 / 3))
        top, left, height, width = box
        expected = image.crop((left, top, left + width, top + height))
        for size in ((256, height), (256, 256)):
            expected = expected.resize(size, Image.BICUBIC)
        ours = train_ae.augment(256, 3, image, 5, epoch, False)
        levels = (ours.int() - pil_to_tensor(expected).int()).abs()
        assert levels.max() <= 2 and (levels > 1).float().mean() < 1e-4


def plan(**settings):
    """The settings that decide a process's share of the batches."""
    nothing = {"data": None, "device": None, "dtype": None, "compile": None}
    return argparse.Namespace(**nothing, seed=0, steps=10, **settings)


def test_an_epoch_has_every_image_once_whatever_the_number_of_processes():
    images = train_ae.Images()
    images.labels = images.labels[:60]

    def keys_of_run(rank, processes, start):
        args = plan(batch=12, micro_batch=3)
        slices = train_ae.resolve(args, rank, processes, "cpu")
        steps = train_ae.training_order(args, images, slices, start)
        return [key for keys in steps for key in keys]

    whole = keys_of_run(0, 1, 1)
    assert sorted(index for index, _, _ in whole[:60]) == list(range(60))
    assert [epoch for _, epoch, _ in whole] == [0] * 60 + [1] * 60
    assert [index for index, _, _ in whole[:60]] != [index for index, _, _ in whole[60:]]
    halves = [keys_of_run(rank, 2, 1) for rank in (0, 1)]
    merged = [halves[p % 12 // 6][p // 12 * 6 + p % 6] for p in range(120)]
    assert merged == whole
    assert keys_of_run(0, 1, 8) == whole[84:]


def test_a_micro_batch_is_the_largest_divisor_of_a_share_that_is_not_above_the_flag():
    for batch, world, micro_batch, resolved in ((10, 1, 3, 2), (32, 2, 12, 8), (14, 2, 6, 1)):
        args = plan(batch=batch, micro_batch=micro_batch)
        slices = train_ae.resolve(args, world - 1, world, "cpu")
        assert {part.stop - part.start for part in slices} == {args.micro_batch} == {resolved}
        rows = [row for part in slices for row in range(batch)[part]]
        assert rows == list(range(batch - batch // world, batch))  # of the last process


def test_training_in_bfloat16_learns_as_in_float32(tmp_path):
    flags = f"{TINY_VIT} {SMALL} --steps 12 --base_lr 16e-3 --warmup 0"
    float32, bfloat16 = tmp_path / "float32", tmp_path / "bfloat16"
    run(train_ae, "--out", float32, flags)
    run(train_ae, "--out", bfloat16, flags, "--dtype bfloat16")
    for a, b in zip(log_of(float32), log_of(bfloat16)):
        assert a["masked"] != b["masked"] and abs(a["masked"] - b["masked"]) < 0.02 * a["masked"]
    state = read(bfloat16 / "ckpt.pt")["model"]
    assert all(value.dtype == torch.float32 for value in state.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["vae", "sdvae", "vmae", "tune"]
)  # two networks, all compiled parts
def test_compiled_training_is_eager_training(tmp_path, model, tiny_vmae):
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    flags = (f"{tiny(model)} {SMALL} --steps 6 --seed 1",)
    if model == "tune":
        flags = (f"{SMALL} --steps 6 --base_lr 16e-3 --tune_decoder --init", tiny_vmae)
    run(train_ae, "--out", eager, *flags)
    run(train_ae, "--out", compiled, *flags, "--compile 1")
    assert difference(eager, compiled) < 1e-4


@pytest.mark.slow
def test_compiled_training_in_two_processes_is_eager_training(tmp_path):
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    flags = f"{TINY_VIT} {SMALL} --steps 6"
    together(2, "train_ae.py", "--out", eager, flags)
    together(2, "train_ae.py", "--out", compiled, flags, "--compile 1")
    assert difference(eager, compiled) < 1e-4


@pytest.mark.slow
def test_without_a_compiler_training_ends_in_one_sentence(tmp_path):
    command, env = launch(1, "train_ae.py", "--out", tmp_path / "out", TINY_VIT, SMALL)
    env |= {"CXX": "no-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command += ["--steps", "1", "--compile", "1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("train_ae.py: torch.compile failed") and "--compile 0" in last


@pytest.mark.parametrize("capability, dtype", [((9, 0), "bfloat16"), ((7, 5), "float32")])
def test_a_gpu_s_defaults_are_what_it_can_do(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for device, *expected in (("cuda:0", "cuda", dtype, 1), ("cpu", "cpu", "float32", 0)):
        args = plan(batch=4, micro_batch=4)
        train_ae.resolve(args, 0, 1, device)
        assert [args.device, args.dtype, args.compile] == expected


@pytest.mark.slow
def test_a_mistake_under_torchrun_is_said_once_and_leaves_nothing_behind(tmp_path):
    out = tmp_path / "out"
    command, env = launch(3, "train_ae.py", "--out", out, TINY_VIT)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and not out.exists()
    assert done.stderr.count("--batch 32 does not divide over 3 processes") == 1


@pytest.mark.slow
def test_compiled_dit_training_is_eager_training(tmp_path, tiny_vmae):
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    # AdamW divides a gradient by its own size: where that is near zero, rounding alone moves a
    # weight by a share of the learning rate. At the demo's 3e-3 it moved 7 weights of 1.3 million
    # by more than 1e-4; at 1e-3 none by more than 1e-6.
    flags = (*latents_of(tiny_vmae), SMALL, "--steps 6 --sample_steps 1 --lr 1e-3")
    run(train_dit, "--out", eager, *flags)
    run(train_dit, "--out", compiled, *flags, "--compile 1")
    assert difference(eager, compiled) < 1e-5


def test_the_next_image_takes_the_place_of_an_unreadable_one_and_a_hundred_end_the_run(
    folder, tmp_path, capfd
):
    images = tmp_path / "images"
    shutil.copytree(folder, images)
    files = sorted(file for file in images.rglob("*.*") if file.is_file())
    files[119].write_bytes(b"not an image")
    numbers = train_ae.Batches(train_ae.Images(images), lambda _, index, *rest: torch.tensor(index))
    for _ in range(2):
        found, labels, flags = numbers[[(118, 0, False), (119, 0, False), (1, 0, False)]]
        assert found.tolist() == [118, 0, 1] and labels.tolist() == [2, 0, 0]
        assert flags.tolist() == [0, 1, 0]
    assert capfd.readouterr().err.count("warning") == 1

    # Each step has every image once
    flags = ("--data", images, TINY_VIT, "--image_size 32 --lpips 0 --batch 120 --steps 2")
    run(train_ae, "--out", tmp_path / "a", *flags, "--log_every 1 --workers 1")
    warning = f"replaced by the next image: {files[119]} cannot be read"
    assert capfd.readouterr().err.count(warning) == 1
    assert [line["unreadable"] for line in log_of(tmp_path / "a")] == pytest.approx([1 / 120] * 2)

    for file in files[1:101]:
        file.write_bytes(b"not an image")
    assert numbers.read(2)[1] == 101  # ninety-nine are passed over
    message = fails(train_ae, "--out", tmp_path / "b", *flags, "--workers 1")
    assert f"100 images in a row cannot be read, from {files[1]} on" in message


# ---- the latent cache ----


@pytest.mark.slow
def test_training_from_the_cache_is_training_on_the_fly_up_to_16_bits_and_any_processes_fill_it(
    tmp_path, folder, tiny_vmae, monkeypatch
):
    """One process, two, or two that are killed and one that goes on: the files are the same."""
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
import train_dit
train_dit.SHARD = 25
save = np.save
def deadly(file, array):
    save(file, array)
    # Rank 1's second shard of five has its labels, but no moments yet
    if "KILL" in os.environ and "labels-00003" in file.name:
        os._exit(1)
np.save = deadly
train_dit.main()
""")
    monkeypatch.setattr(train_dit, "SHARD", 25)
    small = "--model DiT-demo/1 --steps 6 --sample_steps 1 --cfg_scale 1 --micro_batch 8"
    flags = ("--data", folder, "--ae", tiny_vmae, SMALL, "--image_size 32 --workers 0", small)
    run(train_dit, "--out", tmp_path / "fly", *flags)

    def place(name):
        return "--out", tmp_path / name, "--cache", tmp_path / f"{name}-cache"

    run(train_dit, *place("one"), *flags)
    together(2, driver, *place("two"), *flags)
    command, env = launch(2, driver, *place("killed"), *flags)
    done = subprocess.run(command, env=env | {"KILL": "1"}, capture_output=True, timeout=120)
    assert done.returncode != 0 and not (tmp_path / "killed-cache" / "moments-00003.npy").exists()
    run(train_dit, *place("killed"), *flags, "--resume")

    for a, b, c in zip(*(log_of(tmp_path / name) for name in ("fly", "one", "two"))):
        assert abs(a["loss"] - b["loss"]) < 1e-3 and abs(b["loss"] - c["loss"]) < 1e-5
    assert read(tmp_path / "one" / "ckpt.pt")["class_names"] == ["ants", "bees", "cats"]
    shards = [f"{kind}-0000{k}.npy" for kind in ("labels", "moments") for k in range(5)]
    files = sorted((tmp_path / "one-cache").iterdir())
    assert [file.name for file in files] == [*shards, "settings.json"]
    for name in ("two-cache", "killed-cache"):
        others = sorted((tmp_path / name).iterdir())
        assert [file.name for file in others] == [file.name for file in files]
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(others, files))


def test_the_cache_holds_the_moments_of_each_image_and_its_flip(
    tmp_path, tiny_vmae, folder, monkeypatch
):
    monkeypatch.setattr(train_dit, "SHARD", 50)  # three shards
    cache, first, second = (
        tmp_path / name for name in ("cache", "cache/moments-00000.npy", "cache/moments-00001.npy")
    )
    small = "--model DiT-demo/1 --steps 1 --sample_steps 1 --cfg_scale 1 --image_size 32"
    flags = ("--data", folder, "--ae", tiny_vmae, "--cache", cache, SMALL, small, "--workers 0")
    run(train_dit, "--out", tmp_path / "a", *flags)
    images, autoencoder = train_ae.Images(folder), ae.load(tiny_vmae)
    for index in (0, 49, 50, 119):
        for flip in (False, True):
            crop = np.asarray(train_ae.center_crop(images[index], 32))
            crop = (crop[:, ::-1] if flip else crop).copy()
            x = torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 127.5 - 1
            expected = autoencoder.encode(x)
            moments, labels, _ = train_dit.Cache(cache)[[(index, 0, flip)]]
            stored = ae.Posterior(moments)
            for ours, theirs in ((stored.mean, expected.mean), (stored.logvar, expected.logvar)):
                torch.testing.assert_close(ours, theirs.detach(), rtol=2e-3, atol=2e-3)
            assert labels.item() == images.labels[index]

    # After an interruption the missing shard is made again, and the others are not touched
    whole, written = second.read_bytes(), first.stat().st_mtime_ns
    second.unlink()
    run(train_dit, "--out", tmp_path / "b", *flags)
    assert second.read_bytes() == whole
    assert first.stat().st_mtime_ns == written

    # The cache of another encoder is refused, that of the same with another decoder is not
    other = changed(tmp_path / "other.pt", tiny_vmae, "model", "norm.bias")
    message = fails(train_dit, "--out", tmp_path / "c", *flags, "--ae", other)
    assert "its autoencoder is" in message
    tuned = changed(tmp_path / "tuned.pt", tiny_vmae, "model", "decoder_norm.bias")
    run(train_dit, "--out", tmp_path / "d", *flags, "--ae", tuned)

    # The same images elsewhere are the same images, but not once one of them has changed
    moved = tmp_path / "elsewhere" / "."
    shutil.copytree(folder, moved)
    run(train_dit, "--out", tmp_path / "e", *flags, "--data", moved)
    Image.new("RGB", (40, 40)).save(moved / "ants" / "001.png")
    message = fails(train_dit, "--out", tmp_path / "f", *flags, "--data", moved)
    assert "its images is" in message

    # A shard that was cut off is no shard
    second.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in fails(train_dit, "--out", tmp_path / "g", *flags)


def test_a_cache_of_another_size_is_refused(tmp_path, folder):
    flags = ("--data", folder, "--workers 0 --batch 8 --steps 1")
    run(train_ae, "--out", tmp_path / "ae", *flags, "--model ae --image_size 24", TINY_CONV)
    small = ("--cache", tmp_path / "cache", "--model DiT-demo/1 --sample_steps 1 --cfg_scale 1")
    start = ("--ae", tmp_path / "ae" / "ckpt.pt", *flags, *small)
    run(train_dit, "--out", tmp_path / "dit", *start)
    # Latents are of images of the size that the autoencoder was trained at
    assert read(tmp_path / "dit" / "ckpt.pt")["args"]["image_size"] == 24
    assert dit.load(tmp_path / "dit" / "ckpt.pt")[0].grid == 12
    message = fails(train_dit, "--out", tmp_path / "b", *start, "--image_size 32")
    assert "its image_size is 24 and not 32" in message


def test_a_latent_beyond_16_bits_is_a_sentence(tmp_path, tiny_vmae):
    state = read(tiny_vmae)
    state["model"]["to_latent.weight"] *= 1e6
    torch.save(state, tmp_path / "huge.pt")
    flags = ("--ae", tmp_path / "huge.pt", "--cache", tmp_path / "cache", SMALL)
    assert "65,504" in fails(train_dit, "--out", tmp_path / "a", *flags)


def test_the_time_of_a_checkpoint_is_not_counted_in_the_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(train_ae, "save_reconstructions", lambda *_: time.sleep(2))
    flags = (TINY_VIT, SMALL, "--steps 2 --log_every 1 --ckpt_every 1")
    run(train_ae, "--out", tmp_path / "a", *flags)
    batch = ae.read_checkpoint(tmp_path / "a" / "ckpt.pt")["args"]["batch"]
    assert batch / log_of(tmp_path / "a")[-1]["images_per_s"] < 2


def test_photographs_are_flipped_and_digits_are_not(folder):
    def flips(images):
        args = plan(batch=12, micro_batch=12)
        steps = train_ae.training_order(args, images, [slice(0, 12)], 1)
        return [flip for keys in steps for _, _, flip in keys]

    assert not any(flips(train_ae.Images()))
    assert 40 < sum(flips(train_ae.Images(folder))) < 80  # of 120


def test_no_cache_or_sample_is_put_among_other_files(tmp_path, tiny_vmae, tiny_dit, folder):
    before = sorted(folder.iterdir()), tiny_vmae.read_bytes()
    start = ("--ae", tiny_vmae, "--out")
    message = fails(train_dit, *start, tmp_path / "a", "--cache", folder)
    assert "holds other files" in message
    assert str(tiny_vmae) in fails(train_dit, *start, tmp_path / "b", "--cache", tiny_vmae)
    assert before == (sorted(folder.iterdir()), tiny_vmae.read_bytes())
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "000000-3.png").write_bytes(b"a picture of before")
    message = fails(sample, "--out", tmp_path, "--ckpt", tiny_dit, "--steps 1 --num 2")
    assert "holds other files" in message and len(list((tmp_path / "samples").iterdir())) == 1


# ---- fine-tuning, numbered files ----

TABLE = "y_embedder.embedding_table.weight"


def test_a_dit_that_starts_from_another_has_its_weights_autoencoder_and_statistics(
    tmp_path, tiny_dit, capsys
):
    flags = (SMALL, "--steps 1 --lr 0 --sample_steps 2")
    run(train_dit, "--out", tmp_path, "--init", tiny_dit, *flags)
    assert f"{tiny_dit}, which has 10 of these 10 classes" in capsys.readouterr().out
    old, new = read(tiny_dit), read(tmp_path / "ckpt.pt")
    for key, value in old["ema"].items():
        assert torch.equal(new["model"][key], value) and torch.equal(new["ema"][key], value), key
    for key, value in old["autoencoder"]["model"].items():
        assert torch.equal(new["autoencoder"]["model"][key], value)
    for name in ("latent_mean", "latent_std"):
        assert torch.equal(new[name], old[name])


def test_a_class_keeps_the_embedding_of_its_name_and_others_get_new_ones(
    tmp_path, tiny_dit, folder, capsys
):
    named, ckpt = tmp_path / "named.pt", read(tiny_dit)
    torch.save(ckpt | {"class_names": ["cats", "dogs", "bees", *"3456789"]}, named)
    flags = ("--data", folder, SMALL, "--workers 0 --steps 1 --lr 0 --sample_steps 2")
    run(train_dit, "--out", tmp_path / "out", "--init", named, *flags)
    assert "which has 2 of these 3 classes" in capsys.readouterr().out
    old, new = ckpt["ema"], read(tmp_path / "out" / "ckpt.pt")["model"]
    assert torch.equal(new[TABLE][1:], old[TABLE][[2, 0, 10]])  # bees, cats, the null class
    assert not (new[TABLE][0] == old[TABLE]).all(1).any()  # ants
    assert all(torch.equal(new[key], old[key]) for key in old if key != TABLE)


def test_fine_tuning_keeps_the_classes_whatever_the_dropout_of_labels(tmp_path, tiny_dit):
    flags = (SMALL, "--steps 1 --lr 0 --sample_steps 1 --class_dropout 0 --cfg_scale 1")
    run(train_dit, "--out", tmp_path, "--init", tiny_dit, *flags)
    old, new = read(tiny_dit)["ema"][TABLE], read(tmp_path / "ckpt.pt")["model"][TABLE]
    assert torch.equal(new, old[:10])


def test_fine_tuning_takes_the_sizes_of_the_file_and_refuses_others(tmp_path, tiny_vmae, tiny_dit):
    few, latents = (SMALL, "--steps 1 --sample_steps 1"), latents_of(tiny_vmae)
    run(train_dit, "--out", tmp_path / "a", *latents, *few, "--qk_norm 0")
    run(
        train_dit, "--out", tmp_path / "b", "--init", tmp_path / "a" / "ckpt.pt", *few, *latents[2:]
    )
    assert read(tmp_path / "b" / "ckpt.pt")["args"]["qk_norm"] == 0
    out = ("--out", tmp_path / "out")
    for flag in ("--qk_norm 0", "--model DiT-S/2", "--image_size 64"):
        assert f"{flag}: {tiny_dit} has" in fails(train_dit, *out, "--init", tiny_dit, flag)

    # LightningDiT's files do not name their sizes
    theirs = tmp_path / "lightning.pt"
    torch.save({"ema": read(tiny_dit)["ema"]}, theirs)
    start = (*out, "--init", theirs, *few, "--lr 0")
    assert "other sizes" in fails(train_dit, *start, "--ae", tiny_vmae, "--qk_norm 0")
    run(train_ae, "--out", tmp_path / "four", TINY_VIT, "--latent_dim 4 --steps 1")
    message = fails(train_dit, *start, "--ae", tmp_path / "four" / "ckpt.pt")
    assert "there they have 16 channels on a grid of 4, here 4 on 4" in message
    run(train_dit, *start, *latents)
    new = read(tmp_path / "out" / "ckpt.pt")["model"]
    assert torch.equal(new[TABLE], read(theirs)["ema"][TABLE])


def test_beside_a_dit_that_carries_its_autoencoder_only_a_later_decoder_is_taken(
    tmp_path, tiny_vmae, tiny_dit
):
    """Another encoder has other latents, which the DiT does not know."""
    other = changed(tmp_path / "other.pt", tiny_vmae, "model", "norm.bias")
    tuned = changed(tmp_path / "tuned.pt", tiny_vmae, "model", "decoder_norm.bias")
    words = "is another autoencoder than the one that"
    start = ("--out", tmp_path / "out", "--init", tiny_dit, SMALL, "--steps 1 --sample_steps 1")
    assert words in fails(train_dit, *start, "--ae", other)
    run(train_dit, *start, "--ae", tuned)
    carried = read(tmp_path / "out" / "ckpt.pt")["autoencoder"]["model"]
    assert torch.equal(carried["decoder_norm.bias"], read(tuned)["model"]["decoder_norm.bias"])

    flags = ("--ckpt", tiny_dit, "--steps 2 --num 2")
    assert words in fails(sample, "--out", tmp_path / "a", *flags, "--ae", other)
    run(sample, "--out", tmp_path / "b", *flags)
    run(sample, "--out", tmp_path / "c", *flags, "--ae", tuned)
    assert not np.array_equal(samples_of(tmp_path / "b")[0], samples_of(tmp_path / "c")[0])


def test_numbered_files_of_a_dit_are_checkpoints_like_any_other(tmp_path, tiny_vmae):
    flags = (*latents_of(tiny_vmae), SMALL, "--keep_every 2 --sample_steps 2 --steps 4")
    run(train_dit, "--out", tmp_path, *flags)
    paths = [*sorted(tmp_path.glob("ckpt-*")), tmp_path / "ckpt.pt"]
    assert [path.name for path in paths[:2]] == ["ckpt-0000002.pt", "ckpt-0000004.pt"]
    for path in paths:
        run(sample, "--ckpt", path, "--out", tmp_path / path.stem, "--steps 2 --columns 1")
    first, second, last = [(tmp_path / path.stem / "samples.png").read_bytes() for path in paths]
    assert second == last != first
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(paths[0], again / "ckpt.pt")
    run(train_dit, "--out", again, *flags, "--resume")
    assert difference(tmp_path, again) == difference(tmp_path, again, "ema") == 0


# ---- latents ----


def test_each_access_draws_a_fresh_posterior_sample(tiny_vmae):
    posterior = ae.load(tiny_vmae).encode(normal(0, 1, 3, 32, 32))
    keys = [sample.generator("cpu", sample.STEP, 0, step) for step in (1, 2)]
    first, second = (posterior.sample(torch.randn(1, 16, 4, 4, generator=key)) for key in keys)
    assert not torch.equal(first, second)


def test_the_latent_of_a_tuned_file_is_random_as_before(tmp_path, tiny_vmae):
    tune = ("--tune_decoder --init", tiny_vmae, SMALL, "--steps 2 --base_lr 16e-3")
    run(train_ae, "--out", tmp_path / "a", *tune)
    first, tuned = ae.load(tiny_vmae), ae.load(tmp_path / "a" / "ckpt.pt")
    assert tuned.args["kl"] == first.args["kl"] > 0
    assert not torch.equal(tuned.decoder_norm.bias, first.decoder_norm.bias)
    x = normal(0, 2, 3, 32, 32)
    assert torch.equal(tuned.encode(x).mode(), first.encode(x).mode())
    assert not torch.equal(tuned.encode(x).sample(), tuned.encode(x).mode())
    assert "--kl 0.0: " in fails(train_ae, "--out", tmp_path / "b", *tune, "--kl 0")


def test_latent_statistics_normalise_each_channel(tiny_vmae):
    images, autoencoder = train_ae.Images(None), ae.load(tiny_vmae).requires_grad_(False)
    crop = functools.partial(train_ae.crop_and_flip, 32)
    dataset = train_ae.Batches(images, crop)

    def load_moments(keys):
        for x, *rest in train_ae.load_batches(dataset, keys, 0, "cpu"):
            yield train_dit.encode(autoencoder, x), *rest

    args = argparse.Namespace(seed=0)
    mean, std = train_dit.latent_statistics(args, images, load_moments, autoencoder)
    x = torch.from_numpy(images.pixels).float()[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
    z = torch.cat([autoencoder.encode(part).sample() for part in x.split(500)])
    torch.testing.assert_close(mean, z.mean((0, 2, 3)), rtol=0.02, atol=0.02)
    torch.testing.assert_close(std, z.std((0, 2, 3)), rtol=0.02, atol=0.02)


# ---- sample.py ----


def test_a_dit_checkpoint_is_enough_to_draw_from(tmp_path, tiny_dit, capsys):
    moved, picture = tmp_path / "alone.pt", tmp_path / "samples.png"
    shutil.copy(tiny_dit, moved)
    run(sample, "--ckpt", moved, "--columns 3")
    assert str(picture) in capsys.readouterr().out
    assert size_of(picture)[1] // 66 == 10
    run(sample, "--ckpt", moved, "--labels 7 3 --columns 3")
    assert size_of(picture)[1] // 66 == 2


def test_sample_i_depends_on_seed_and_i_alone(tmp_path, tiny_dit):
    flags = ("--ckpt", tiny_dit, "--steps 4")
    run(sample, "--out", tmp_path / "a", *flags, "--num 40")
    run(sample, "--out", tmp_path / "b", *flags, "--num 24 --batch 5")
    together(2, "sample.py", "--out", tmp_path / "c", *flags, "--num 40")
    run(sample, "--out", tmp_path / "d", *flags, "--num 24 --seed 1")
    images, labels = zip(*(samples_of(tmp_path / name) for name in ("a", "b", "c", "d")))
    assert images[0].shape == (40, 32, 32, 3)
    for other, n in ((1, 24), (2, 40)):
        assert np.array_equal(labels[0][:n], labels[other])
        # A batch of another size may round differently
        assert np.abs(images[0][:n].astype(int) - images[other]).max() <= 1
    assert np.abs(images[0][:24].astype(int) - images[3]).max() > 20
    assert len(set(labels[0].tolist())) > 5


def test_per_class_takes_the_classes_in_turns(tmp_path, tiny_dit):
    flags = ("--ckpt", tiny_dit, "--steps 1 --num 8 --per_class --batch 3")
    run(sample, "--out", tmp_path / "all", *flags)
    assert samples_of(tmp_path / "all")[1].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    run(sample, "--out", tmp_path / "some", *flags, "--labels 7 3 5")
    assert samples_of(tmp_path / "some")[1].tolist() == [7, 3, 5, 7, 3, 5, 7, 3]


def test_a_flat_folder_is_one_class_without_guidance(tmp_path, tiny_vmae, folder):
    ckpt = tmp_path / "ckpt.pt"
    small = "--model DiT-demo/1 --workers 0 --steps 2 --sample_steps 2"
    run(train_dit, "--data", folder / "ants", "--ae", tiny_vmae, "--out", tmp_path, SMALL, small)
    state = read(ckpt)
    assert len(state["ema"]["y_embedder.embedding_table.weight"]) == 1
    assert state["args"]["cfg_scale"] == 1
    run(sample, "--ckpt", ckpt)
    run(sample, "--ckpt", ckpt, "--num 3")
    files = sorted(file.name for file in (tmp_path / "samples").glob("*.png"))
    assert files == ["000000-0.png", "000001-0.png", "000002-0.png"]
    assert "several classes" in fails(sample, "--ckpt", ckpt, "--cfg_scale 3")


def test_what_is_there_is_not_drawn_again_and_other_settings_are_refused(
    tmp_path, tiny_dit, monkeypatch
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ("--ckpt", tiny_dit, "--steps 2 --batch 8")
    run(sample, "--out", whole, *flags, "--num 30")
    drawn, generate = [], sample.generate

    def counted(*args, **settings):
        drawn.append(len(args[4]))
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return generate(*args, **settings)

    monkeypatch.setattr(sample, "generate", counted)
    assert "stopped; go on" in fails(sample, "--out", cut, *flags, "--num 30")
    kept = {file: file.stat().st_mtime_ns for file in (cut / "samples").iterdir()}
    assert len(kept) == 16 + 1  # and settings.json
    assert "seed is 0 and not 3" in fails(sample, "--out", cut, *flags, "--num 30 --seed 3")
    others = ("--steps 3", "--cfg_scale 3", "--cfg_channels 3", "--cfg_start 0.3", "--shift 1")
    for other in (*others, "--labels 1", "--per_class", "--dtype bfloat16"):
        message = fails(sample, "--out", cut, *flags, "--num 30", other)
        assert f"other settings, its {other.split()[0][2:]} is" in message
    run(sample, "--out", cut, *flags, "--num 30")
    assert drawn[3:] == [8, 6]  # the last 14
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())
    for a, b in zip(samples_of(whole), samples_of(cut)):
        assert np.array_equal(a, b)

    # One that is missing, and three more
    next((cut / "samples").glob("000005-*")).unlink()
    run(sample, "--out", cut, *flags, "--num 33")
    assert drawn[5:] == [4] and np.array_equal(samples_of(cut)[0][5], samples_of(whole)[0][5])


def test_npz_packs_exactly_the_files_in_their_order(tmp_path, tiny_dit):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ("--ckpt", tiny_dit, "--steps 2 --num 20")
    run(sample, "--out", two, *flags, "--npz")
    run(sample, "--out", one, *flags)
    # What is packed is read from the files
    Image.new("RGB", (32, 32), "white").save(next((one / "samples").glob("000004-*.png")))
    run(sample, "--out", one, *flags, "--npz")
    assert samples_of(one)[0][4].min() == 255
    for out in (one, two):
        images, labels = samples_of(out)
        with np.load(out / "samples.npz") as arrays:
            assert np.array_equal(arrays["arr_0"], images) and arrays["arr_0"].dtype == np.uint8
            assert np.array_equal(arrays["arr_1"], labels)
        # fid.py reads them in the same order
        (batch,) = fid.open_set(out / "samples").batches([(0, 20)], 1)
        assert np.array_equal(batch, images)
    assert "samples.npz exists: remove it" in fails(sample, "--out", one, *flags, "--npz")
    assert "--num" in fails(sample, "--out", tmp_path, "--ckpt", tiny_dit, "--npz")


def test_weights_of_others_are_drawn_with_ae_and_stats_and_not_mixed_with_changed_ones(
    tmp_path, tiny_vmae, tiny_dit
):
    ckpt, theirs, stats = read(tiny_dit), tmp_path / "lightning.pt", tmp_path / "latents_stats.pt"
    torch.save({"ema": ckpt["ema"], "model": ckpt["model"], "opt": {}}, theirs)
    mean, std = (ckpt[name].view(1, -1, 1, 1) for name in ("latent_mean", "latent_std"))
    torch.save({"mean": mean, "std": std}, stats)
    assert "--ae" in fails(sample, "--ckpt", theirs)
    assert "--stats" in fails(sample, "--ckpt", theirs, "--ae", tiny_vmae)
    same = "--num 6 --steps 4 --cfg_scale 2 --cfg_channels 8"
    others = ("--out", tmp_path / "theirs", "--ckpt", theirs, "--ae", tiny_vmae, "--stats", stats)
    run(sample, *others, same)
    run(sample, "--out", tmp_path / "ours", "--ckpt", tiny_dit, same)
    for a, b in zip(samples_of(tmp_path / "ours"), samples_of(tmp_path / "theirs")):
        assert np.array_equal(a, b)

    copy, bias = tmp_path / "copy.pt", "final_layer.linear.bias"
    torch.save({"mean": mean + 1, "std": std}, copy)
    assert "its statistics is" in fails(sample, *others, same, "--stats", copy)
    changed(copy, theirs, "ema", bias)
    assert "its model is" in fails(sample, *others, same, "--ckpt", copy)
    changed(copy, tiny_vmae, "model", "decoder_norm.bias")
    assert "its autoencoder is" in fails(sample, *others, same, "--ae", copy)
    shutil.copy(theirs, copy)
    run(sample, *others, same, "--ckpt", copy)


@pytest.fixture(scope="module")
def of_imagenet(tiny_vmae, tmp_path_factory):
    """An untrained DiT of 1,000 classes as LightningDiT saves it; the flags to draw from it."""
    out = tmp_path_factory.mktemp("imagenet")
    channels, size, _ = ae.load(tiny_vmae).latent_shape(32, 32)
    net = dit.DiT(size, 1, channels, 32, 1, 2, 1000)
    torch.save({"ema": net.state_dict()}, out / "ckpt.pt")
    torch.save({"mean": torch.zeros(channels), "std": torch.ones(channels)}, out / "stats.pt")
    paths = ("--ckpt", out / "ckpt.pt", "--ae", tiny_vmae, "--stats", out / "stats.pt")
    return *paths, "--steps 1 --columns 2"


def captions_of_grid(monkeypatch, *flags):
    """What sample.py writes beside the rows of its grid."""
    captions, save_grid = [], sample.save_grid

    def watched(path, rows, labels):
        captions.extend(labels)
        save_grid(path, rows, labels)

    with monkeypatch.context() as patch:
        patch.setattr(sample, "save_grid", watched)
        run(sample, *flags)
    return captions


def test_imagenet_s_grid_is_figure_2_and_classes_have_names(tmp_path, of_imagenet, monkeypatch):
    flags = ("--out", tmp_path, *of_imagenet)
    figure = captions_of_grid(monkeypatch, *flags)
    # The supplement's captions, but for its capitals
    assert figure == [
        *("Flamingo (130)", "Macaw (88)", "Siberian husky (250)", "Passenger car (705)"),
        *("Mushroom (947)", "Lakeside (975)", "Fig (952)", "Vase (883)"),
    ]
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.height == 8 * 66 and picture.width > 2 * 66 + 100
    words = "--labels 975 'siberian husky' Macaw fig"
    named = ["Lakeside (975)", "Siberian husky (250)", "Macaw (88)", "Fig (952)"]
    assert captions_of_grid(monkeypatch, *flags, words) == named

    for word, expected in (
        ("cardigan", "several classes, Cardigan (264), Cardigan (474)"),
        ("husky", "--labels husky is none of the model's classes, 0 to 999: Tench, Goldfish"),
        ("1000", "--labels 1000 is none"),
        ("88,975", "--labels 88,975 is none"),
    ):
        assert expected in fails(sample, *flags, "--labels", word)


def test_names_are_those_of_folders_but_for_imagenet_s_wnids():
    others = [f"n{i:08}" for i in range(1000)]  # a thousand classes of ImageNet-21k, say
    wnids = ["n01440764", *others[1:]]
    assert sample.names_in_words(wnids)[88] == "Macaw"
    for folders in (others, wnids[:999], [f"class {i}" for i in range(1000)], ["rose", ""]):
        assert sample.names_in_words(folders) == folders
    flowers = ["lily", "3", "rose", "", "Rose", "tulip"]
    assert [sample.caption(flowers, label) for label in (0, 1, 3)] == ["lily (0)", "3 (1)", "3"]


def test_a_label_is_an_exact_name_else_a_name_in_other_case_else_a_number():
    flowers = ["lily", "3", "rose", "", "Rose", "tulip"]
    words = ["tulip", "Rose", "rose", "LILY", "3", "5"]
    assert sample.parse_labels(words, flowers) == [5, 4, 2, 0, 1, 5]
    with pytest.raises(ae.UserError, match=r"ROSE names several .* rose \(2\), Rose \(4\)"):
        sample.parse_labels(["ROSE"], flowers)
    for word in ("6", "-1", "1.5", "violet"):
        with pytest.raises(ae.UserError, match="none of the model's classes, 0 to 5: lily, 3"):
            sample.parse_labels([word], flowers)


def test_bfloat16_rounds_the_products_of_the_dit_and_nothing_else(tmp_path, tiny_dit, monkeypatch):
    forward, decode, seen = dit.DiT.forward, ae.VMAE.decode, set()

    def watched_forward(model, x, t, y):
        v = forward(model, x, t, y)
        seen.add(("dit", x.dtype, v.dtype))
        return v

    def watched_decode(autoencoder, z):
        images = decode(autoencoder, z)
        seen.add(("decoder", z.dtype, images.dtype))
        return images

    monkeypatch.setattr(dit.DiT, "forward", watched_forward)
    monkeypatch.setattr(ae.VMAE, "decode", watched_decode)
    float32, images = torch.float32, {}
    for dtype in (float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        flags = () if dtype == float32 else ("--dtype", name)
        seen.clear()
        run(sample, "--out", tmp_path / name, "--ckpt", tiny_dit, *flags, "--num 6")
        assert seen == {("dit", float32, dtype), ("decoder", float32, float32)}
        images[name] = samples_of(tmp_path / name)[0].astype(int)
    levels = np.abs(images["float32"] - images["bfloat16"])
    assert 0 < levels.mean() < 1


def test_a_dit_is_compiled_on_request(tmp_path, tiny_dit, monkeypatch):
    compiled = []
    monkeypatch.setattr(dit.DiT, "compile", lambda model, **flags: compiled.append(flags))
    flags = ("--out", tmp_path, "--ckpt", tiny_dit, "--labels 1 --columns 1 --steps 1")
    run(sample, *flags)
    assert not compiled
    run(sample, *flags, "--compile 1")
    assert len(compiled) == 1


@pytest.mark.slow
def test_compiled_sampling_is_eager_sampling(tmp_path, tiny_dit):
    flags = ("--ckpt", tiny_dit, "--steps 4 --num 6 --batch 4 --cfg_start 0.5 --cfg_scale 3")
    run(sample, "--out", tmp_path / "eager", *flags)
    run(sample, "--out", tmp_path / "compiled", *flags, "--compile 1")
    images = [samples_of(tmp_path / name)[0].astype(int) for name in ("eager", "compiled")]
    assert np.abs(images[0] - images[1]).max() <= 1


# ---- flags, and adding an autoencoder ----


def help_of(capsys, module, *flags):
    """What --help says of each flag, by its name."""
    with pytest.raises(SystemExit):
        run(module, *flags, "--help")
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    parts = re.split(r"^  --(\w+)", text, flags=re.MULTILINE)[1:]
    return {name: " ".join(said.split()) for name, said in zip(parts[::2], parts[1::2])}


@pytest.mark.parametrize("data", ["", "--data pictures"])
@pytest.mark.parametrize("model", [*ae.MODELS, "tune"])
def test_help_has_the_defaults_of_the_recipe_and_no_flag_of_another_model(model, data, capsys):
    network = "vmae" if model == "tune" else model
    said = help_of(capsys, train_ae, "--model", network, data, "--tune_decoder" * (model == "tune"))
    settings = ae.settings_of(ae.MODELS[network]) | train_ae.RECIPES[model]
    for name, value in (settings | ({} if data else train_ae.DEMO[model])).items():
        value = list(value) if isinstance(value, tuple) else value
        assert f"(default: {value})" in said[name], name
    others = set().union(*map(ae.settings_of, ae.MODELS.values()), train_ae.RECIPES["sdvae"])
    assert not ((others | {"freeze_encoder"}) - settings.keys()) & said.keys()


@pytest.mark.parametrize("data", ["", "--data pictures"])
def test_help_of_the_dit_and_of_sampling_is_narrow_and_has_the_recipe_s_defaults(data, capsys):
    assert len(help_of(capsys, sample)) > 15
    said = help_of(capsys, train_dit, data)
    for name, value in (train_dit.RECIPE | ({} if data else train_dit.DEMO)).items():
        assert f"(default: {value})" in said[name], name


class ToneAE(ae.AE):
    """An autoencoder with one setting more than AE."""

    def __init__(self, gamma=2.0, **kwargs):
        super().__init__(**kwargs)
        self.gamma = gamma


def test_each_edit_that_a_new_autoencoder_lacks_is_missed_loudly(tmp_path, monkeypatch):
    """The class, its name in MODELS, its recipe (with the demo's part), a line for each flag."""
    flags = ("--out", tmp_path, "--model tone", TINY_CONV, SMALL, "--steps 1")
    assert "invalid choice: 'tone'" in fails(train_ae, *flags)
    monkeypatch.setitem(ae.MODELS, "tone", ToneAE)
    for recipes, recipe in (
        (train_ae.RECIPES, train_ae.RECIPES["ae"]),
        (train_ae.DEMO, train_ae.DEMO["ae"]),
    ):
        with pytest.raises(KeyError, match="tone"):
            run(train_ae, *flags)
        monkeypatch.setitem(recipes, "tone", recipe)
    with pytest.raises(AssertionError, match="settings without a flag: {'gamma'}"):
        run(train_ae, *flags)

    def with_its_flag(parser, demo):
        add_run_flags(parser, demo)
        parser.add_argument("--gamma", type=sample.number(float, 1), help="power of the tone")

    add_run_flags = train_ae.add_run_flags
    monkeypatch.setattr(train_ae, "add_run_flags", with_its_flag)
    run(train_ae, *flags, "--gamma 3")
    loaded = ae.load(tmp_path / "ckpt.pt")
    assert type(loaded) is ToneAE and loaded.gamma == loaded.args["gamma"] == 3


# ---- wrong input: one sentence, exit 1 ----


def wrong_autoencoder_runs(tmp, tiny_vmae):
    """Words of the sentence, and the flags that lead to it."""
    (tmp / "empty").mkdir()
    (tmp / "mixed" / "a").mkdir(parents=True)
    for path in (tmp / "mixed" / "1.png", tmp / "mixed" / "a" / "2.png"):
        Image.new("RGB", (40, 40)).save(path)
    yield "no folder", "--data", tmp / "nowhere"
    yield "has no images", "--data", tmp / "empty"
    yield "both in itself and in sub-folders", "--data", tmp / "mixed"
    yield "vqgan", "--model vqgan"
    yield "many", "--steps many"
    yield "not allowed with", "--steps 5 --epochs 1"
    yield "multiple of the patch size 8", "--image_size 30"
    yield "multiple of 8 pixels", "--model ae --image_size 30"
    yield "leaves 0 of", "--mask_ratio 0.99"
    yield "leaves 16 of 16", "--model mae --mask_ratio 0"
    yield "30 30 are not multiples of 32", "--model ae --channels 30 30"
    yield "hidden size 30", "--hidden_size 30"
    yield "gpu", "--device gpu"
    yield "--betas", "--betas 0.9"
    yield "--betas", "--betas 1 2"
    yield "--compile", "--compile"
    yield "an empty string", "--init ''"
    yield "discriminator", "--model sdvae --image_size 16"
    for flag in ("steps 0", "batch 0", "epochs nan", "base_lr -1", "base_lr nan", "base_lr inf"):
        yield f"argument --{flag.split()[0]}", f"--{flag}"
    for flag in ("prior_std 0", "seed -1", "freeze_encoder 2 --tune_decoder"):
        yield f"argument --{flag.split()[0]}", f"--{flag}"
    for flag in ("lerning_rate 1", "disc_start 3", "recon l1", "freeze_encoder 0", "ckpt a.pt"):
        yield f"unrecognized arguments: --{flag}", f"--{flag}"
    yield "unrecognized arguments: --mask_ratio 0.5", "--model ae --mask_ratio 0.5"
    yield "unrecognized arguments: --kl 0", "--kl 0 --model mae"
    yield "--model vmae", "--model mae --tune_decoder"
    yield "train it (train_ae.py), or name", "--tune_decoder --init a.pt"
    tune = ("--tune_decoder --init", tiny_vmae)
    yield f"--hidden_size 64: {tiny_vmae} has 32", *tune, "--hidden_size 64"
    yield "no checkpoint file", "--init", tmp / "nothing.pt"


def test_mistakes_with_train_ae_get_one_sentence(tmp_path, tiny_vmae):
    for k, (words, *flags) in enumerate(wrong_autoencoder_runs(tmp_path, tiny_vmae)):
        assert words in fails(train_ae, "--out", tmp_path / str(k), *flags)


def test_a_folder_with_files_is_no_place_for_a_new_run(tiny_vmae, tiny_dit):
    before = tiny_vmae.read_bytes(), tiny_dit.read_bytes()
    for folder in (tiny_vmae.parent, tiny_dit.parent):
        assert "has files: go on with --resume" in fails(train_ae, "--out", folder)
        assert "has files" in fails(train_dit, "--out", folder, "--ae", tiny_vmae)
    assert (tiny_vmae.read_bytes(), tiny_dit.read_bytes()) == before


def test_results_do_not_go_into_the_folder_of_the_images(tmp_path, tiny_vmae, folder):
    before, data = sorted(folder.rglob("*")), ("--data", folder)
    for inside in (folder, folder / "out", folder / "ants" / ".." / "out"):
        message = fails(train_ae, *data, "--out", inside, "--lpips 0 --image_size 32")
        assert "lies inside --data" in message
    flags = (*data, "--ae", tiny_vmae, "--out", tmp_path / "a", "--cache", folder / "cache")
    assert "lies inside --data" in fails(train_dit, *flags, "--model DiT-demo/1")
    assert sorted(folder.rglob("*")) == before


def test_mistakes_with_train_dit_and_sample_get_one_sentence(
    tmp_path, tiny_vmae, tiny_dit, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # where no autoencoder has been trained
    out, nothing = tmp_path / "out", tmp_path / "nothing.pt"
    message = fails(train_dit, "--out", out)
    assert "(train_ae.py, then train_ae.py --tune_decoder), or name" in message
    assert "no checkpoint file" in fails(train_dit, "--out", out, "--ae", nothing)
    assert "holds a DiT" in fails(train_dit, "--out", out, "--ae", tiny_dit)
    start = ("--out", out, "--ae", tiny_vmae)
    assert "32 pixels" in fails(train_dit, *start, "--image_size 64")
    assert "class_dropout above 0" in fails(train_dit, *start, "--class_dropout 0 --cfg_scale 3")
    for flag in ("--shift 0", "--cfg_scale 0.5", "--ema 1", "--cosine_loss", "--qk_norm 2"):
        assert f"argument {flag.split()[0]}" in fails(train_dit, *start, flag)
    assert not out.exists()
    (tmp_path / "file").write_text("")
    assert "file" in fails(train_dit, "--out", tmp_path / "file", "--ae", tiny_vmae)

    start = ("--ckpt", tiny_dit)
    for flag in ("columns", "batch", "num", "steps", "shift", "cfg_scale"):
        assert f"argument --{flag}" in fails(sample, *start, f"--{flag} 0")
    assert "argument --seed" in fails(sample, *start, "--seed -1")
    stats = tmp_path / "stats.pt"
    torch.save({"mean": torch.zeros(3), "std": torch.ones(3)}, stats)
    message = fails(sample, *start, "--stats", stats)
    assert "do not fit" in message and "--ae, --stats" in message
    torch.save({"mean": [0.0] * 16, "std": [1.0] * 16}, stats)
    assert "holds no tensors mean and std" in fails(sample, *start, "--stats", stats)
    assert "no checkpoint file" in fails(sample, "--ckpt", nothing)
    assert "train_dit.py --ae" in fails(sample, "--ckpt", tiny_vmae)
    assert "an empty string" in fails(sample, *start, "--labels ''")
    assert "classes, 0 to 9" in fails(sample, *start, "--labels 3 10")
    assert "classes, 0 to 9" in fails(sample, *start, "--labels cat")


@pytest.mark.parametrize("model", ["vmae", pytest.param("sdvae", marks=pytest.mark.slow)])
def test_training_with_lpips_logs_it(tmp_path, model, monkeypatch):
    """On a VGG16 of made weights."""
    import torchvision

    with torch.device("meta"):
        state = torchvision.models.vgg16().state_dict()
    names = [name for name in state if "features" in name]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    path.parent.mkdir(parents=True)
    torch.save({name: 0.05 * torch.randn(state[name].shape) for name in names}, path)

    for weight in (0, 0.5):
        out = tmp_path / str(weight)
        few = "--batch 4 --steps 3 --log_every 1 --dtype bfloat16"
        run(train_ae, "--out", out, tiny(model), few, f"--lpips {weight}")
        lines = log_of(out)
        assert all(("lpips" in line) == (weight > 0) for line in lines)
        assert all(np.isfinite(value) for line in lines for value in line.values())


def test_lpips_without_its_weights_stops_the_run(tmp_path, folder, monkeypatch, offline):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    message = fails(
        train_ae, "--data", folder, "--out", tmp_path / "a", TINY_VIT, "--image_size 32"
    )
    assert "--lpips 0" in message and "vgg16-397923af.pth" in message
    assert sys.getsizeof(message) < 1000


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def write_on_a_full_disk():
        with ae.whole_file(str(path)) as file:
            file.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="file cannot be written: disk full"):
        write_on_a_full_disk()
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
    with ae.whole_file(str(path)) as file:
        file.write(b"after")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"


@pytest.mark.parametrize(
    "model, size", [("vmae", 24), ("vmae", 40), ("vmae", 136), ("ae", 40), ("ae", 72)]
)
def test_any_size_that_8_divides_goes_through_both_stages_and_sampling(
    tmp_path, folder, model, size
):
    """From small, non-square images; 24 pixels give 3 x 3 latents."""
    ckpt, out = tmp_path / "ckpt.pt", tmp_path / "dit"
    data = ("--data", folder, f"--image_size {size} --workers 0 --batch 2 --steps 1")
    sizes = "--channels 32 32 32 32" if model == "ae" else TINY_VIT
    run(train_ae, "--out", tmp_path, *data, f"--model {model} {sizes} --lpips 0")
    few = "--model DiT-demo/1 --sample_steps 1 --cfg_scale 1"
    run(train_dit, "--out", out, "--ae", ckpt, *data, few)
    state = read(out / "ckpt.pt")
    net = dit.load(out / "ckpt.pt")[0]
    assert (net.in_channels, net.grid) == (16, size // 8)
    assert "bees" in state["class_names"]
    run(sample, "--ckpt", out / "ckpt.pt", "--labels 1 --columns 2")
    with Image.open(out / "samples.png") as picture:
        assert picture.height >= size
