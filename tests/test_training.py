"""The training scripts and sample.py: randomness, processes, resume, the cache, wrong input."""

import functools
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    TINY_CONV,
    TINY_VIT,
    difference,
    fails,
    launch,
    log_of,
    normal,
    read,
    run,
    size_of,
    tiny,
    torchrun,
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
    run(train_dit, "--ae", tiny_vmae, "--out", out, SMALL, "--steps 8 --sample_steps 4")
    return out / "ckpt.pt"


# ---- one rule of randomness: processes and micro-batches change the speed, not the run ----


def test_vmae_ends_the_same_with_two_processes_or_other_micro_batches(tmp_path):
    one, micro, two = tmp_path / "one", tmp_path / "micro", tmp_path / "two"
    flags = f"{TINY_VIT} {SMALL} --steps 6"
    run(train_ae, "--out", one, flags)
    run(train_ae, "--out", micro, flags, "--micro_batch 4")
    torchrun(2, "train_ae.py", "--out", two, flags, "--micro_batch 4")
    for other in (micro, two):
        assert difference(one, other) < 1e-5
        for a, b in zip(log_of(one), log_of(other)):
            assert a["step"] == b["step"] and abs(a["masked"] - b["masked"]) < 1e-5
    # They agree, and not because nothing moves
    sizes = {"hidden_size": 32, "depth": 1, "decoder_depth": 1, "num_heads": 2}
    start = train_ae.ae.MODELS["vmae"](image_size=32, **sizes)
    assert (read(one / "ckpt.pt")["model"]["mask_token"] - start.mask_token).abs().max() > 1e-3


def test_dit_ends_the_same_with_two_processes_or_other_micro_batches(tmp_path, tiny_vmae):
    one, micro, two = tmp_path / "one", tmp_path / "micro", tmp_path / "two"
    # Where a gate of adaLN-Zero is still near zero, a gradient is hardly more than rounding, and
    # Adam moves its weight by the learning rate either way: the demo's would show that alone.
    flags = ("--ae", tiny_vmae, SMALL, "--steps 6 --sample_steps 2 --lr 1e-4")
    run(train_dit, "--out", one, *flags)
    run(train_dit, "--out", micro, *flags, "--micro_batch 4")
    torchrun(2, "train_dit.py", "--out", two, *flags)
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


def test_two_processes_train_sdvae_with_one_discriminator(tmp_path):
    flags = f"--model sdvae {TINY_CONV} {SMALL} --steps 4 --disc_start 2"
    torchrun(2, "train_ae.py", "--out", tmp_path / "two", flags)
    terms = log_of(tmp_path / "two")
    assert "adv" not in terms[0] and {"adv", "disc", "adaptive", "real", "fake"} <= terms[1].keys()
    assert all(np.isfinite(value) for line in terms for value in line.values())


# ---- resume ----


@pytest.mark.parametrize("model", ["vmae", "sdvae"])
def test_a_resumed_autoencoder_ends_in_the_same_bits(tmp_path, model):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = f"{tiny(model)} {SMALL} --schedule constant"
    run(train_ae, "--out", whole, flags, "--steps 10")
    run(train_ae, "--out", cut, flags, "--steps 4")
    run(train_ae, "--out", cut, f"--model {model} --resume --steps 10")
    for part in ("model", "disc") if model == "sdvae" else ("model",):
        assert difference(whole, cut, part) == 0
    assert without_times(whole) == without_times(cut)


def test_a_resumed_dit_ends_in_the_same_bits_whatever_was_logged_after_the_checkpoint(
    tmp_path, tiny_vmae
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ("--ae", tiny_vmae, SMALL, "--sample_steps 2 --schedule constant")
    run(train_dit, "--out", whole, *flags, "--steps 10")
    run(train_dit, "--out", cut, *flags, "--steps 4")
    # As if the run had been killed after step 5, before the checkpoint of step 8
    with open(cut / "log.jsonl", "a") as file:
        file.write(json.dumps({"step": 5, "loss": 123.0}) + "\n")
    run(train_dit, "--out", cut, "--resume --steps 10")
    for part in ("model", "ema"):
        assert difference(whole, cut, part) == 0
    assert [line["loss"] for line in log_of(whole)] == [line["loss"] for line in log_of(cut)]


def test_a_run_moved_elsewhere_resumes_there_and_broken_log_lines_are_dropped(tmp_path):
    first, moved = tmp_path / "first", tmp_path / "moved"
    run(train_ae, "--out", first, TINY_VIT, SMALL, "--steps 4")
    before = (first / "ckpt.pt").read_bytes()
    shutil.copytree(first, moved)
    with open(moved / "log.jsonl", "a") as file:
        file.write('\n{"loss": 1}\n7\n{"step": 5, "vis')
    run(train_ae, "--out", moved, "--resume --steps 6")
    assert (first / "ckpt.pt").read_bytes() == before
    assert [line["step"] for line in log_of(moved)] == [1, 2, 3, 4, 5, 6]


def test_a_run_of_any_model_resumes_by_its_folder_alone(tmp_path):
    run(train_ae, "--out", tmp_path, tiny("dae"), SMALL, "--steps 2")
    run(train_ae, "--out", tmp_path, "--resume --steps 3")
    assert "prior_std" not in read(tmp_path / "ckpt.pt")["args"]
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3]


def test_the_average_of_the_weights_has_a_constant_decay_but_in_the_demo(tmp_path, tiny_vmae):
    torch.manual_seed(0)
    for name, flags in (("demo", ""), ("constant", "--ema_warmup 0")):
        out = tmp_path / name
        run(train_dit, "--ae", tiny_vmae, "--out", out, SMALL, "--steps 1 --sample_steps 1", flags)
    shift, moved = {}, {}
    for name in ("demo", "constant"):
        ckpt = read(tmp_path / name / "ckpt.pt")
        key = "final_layer.linear.weight"  # which starts at zero
        shift[name], moved[name] = ckpt["ema"][key], ckpt["model"][key]
    torch.testing.assert_close(shift["demo"], 0.9 * moved["demo"])
    torch.testing.assert_close(shift["constant"], 1e-4 * moved["constant"])


def test_resuming_a_finished_run_says_so(tiny_vmae, tiny_dit, capsys):
    before = tiny_vmae.read_bytes(), tiny_dit.read_bytes()
    run(train_ae, "--out", tiny_vmae.parent, "--resume")
    assert "is finished, at step 20" in capsys.readouterr().out
    run(train_dit, "--out", tiny_dit.parent, "--resume")
    assert "is finished, at step 8" in capsys.readouterr().out
    assert (tiny_vmae.read_bytes(), tiny_dit.read_bytes()) == before


# ---- what training shows ----


def test_the_start_prints_what_a_person_checks(tmp_path, tiny_vmae, capsys):
    run(train_ae, "--out", tmp_path / "a", TINY_VIT, SMALL, "--steps 1")
    text = capsys.readouterr().out
    for words in ("demo settings", "mask_ratio 0.6", "lpips 0", "4,500 images of 10 classes"):
        assert words in text
    for words in ("parameters", "MiB", "GFLOPs"):
        assert words in text
    for words in ("step 1/1", "visible", "masked", "kl", "lr", "images/s", "left"):
        assert words in text
    run(train_dit, "--ae", tiny_vmae, "--out", tmp_path / "d", "--steps 1 --sample_steps 1")
    text = capsys.readouterr().out
    statistics = text.split("normalised latents, first micro-batch: mean ")[1].splitlines()[0]
    mean, std = statistics.split(", std ")
    assert abs(float(mean)) < 0.1 and abs(float(std) - 1) < 0.1


def test_gflops_are_those_of_the_paper_s_models():
    # VMAE: 40% of the tokens in the encoder, all of them in the decoder
    assert 26 < train_ae.gflops(ae.VMAE(), torch.zeros(1, 3, 256, 256)) < 27
    b = dit.DiT_models["DiT-B/1"](input_size=32, in_channels=16, num_classes=1000)
    x, t, y = torch.zeros(1, 16, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    assert abs(train_ae.gflops(b, x, t, y) - 212.7) < 0.5


def test_mfu_is_the_model_s_flops_over_the_gpu_s_peak(monkeypatch):
    for name, peak in (
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("Tesla V100-SXM2-16GB", None),
    ):
        assert train_ae.peak_of(name) == peak
    run = SimpleNamespace(device="cuda:1", world=8, training_flops=638e9)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    usage = train_ae.Run.usage_of_gpu(run, speed=2000.0)
    assert usage == {"GiB": 3, "MFU": 2000 * 638e9 / (8 * 312e12)}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-16GB")
    assert train_ae.Run.usage_of_gpu(run, speed=2000.0) == {"GiB": 3}


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
        torch.manual_seed(train_ae.seed_of(3, epoch, 5))
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
        torch.manual_seed(train_ae.seed_of(3, epoch, 5))
        box = T.RandomResizedCrop.get_params(image, (0.75, 1.0), (3 / 4, 4 / 3))
        top, left, height, width = box
        expected = image.crop((left, top, left + width, top + height))
        for size in ((256, height), (256, 256)):
            expected = expected.resize(size, Image.BICUBIC)
        ours = train_ae.augment(256, 3, image, 5, epoch, False)
        levels = (ours.int() - pil_to_tensor(expected).int()).abs()
        assert levels.max() <= 2 and (levels > 1).float().mean() < 1e-4


def test_an_epoch_has_every_image_once_whatever_the_number_of_processes():
    class args:
        seed, batch, micro_batch, steps = 0, 12, 3, 10

    def keys_of_run(rank, processes, start):
        slices = train_ae.slices_of(args.batch // processes, args.micro_batch, rank)
        steps = train_ae.training_order(args, 60, slices, start)
        return [key for keys in steps for key in keys]

    whole = keys_of_run(0, 1, 0)
    assert sorted(index for index, _, _ in whole[:60]) == list(range(60))
    assert [epoch for _, epoch, _ in whole] == [0] * 60 + [1] * 60
    assert [index for index, _, _ in whole[:60]] != [index for index, _, _ in whole[60:]]
    halves = [keys_of_run(rank, 2, 0) for rank in (0, 1)]
    merged = [halves[p % 12 // 6][p // 12 * 6 + p % 6] for p in range(120)]
    assert merged == whole
    assert keys_of_run(0, 1, 7) == whole[84:]


def test_training_in_bfloat16_learns_as_in_float32(tmp_path):
    flags = f"{TINY_VIT} {SMALL} --steps 12 --lr 1e-3 --warmup 0"
    float32, bfloat16 = tmp_path / "float32", tmp_path / "bfloat16"
    run(train_ae, "--out", float32, flags)
    run(train_ae, "--out", bfloat16, flags, "--dtype bfloat16")
    for a, b in zip(log_of(float32), log_of(bfloat16)):
        assert a["masked"] != b["masked"] and abs(a["masked"] - b["masked"]) < 0.02 * a["masked"]
    state = read(bfloat16 / "ckpt.pt")["model"]
    assert all(value.dtype == torch.float32 for value in state.values())


@pytest.mark.slow
@pytest.mark.parametrize("model", [*ae.MODELS, "tune"])
def test_compiled_training_is_eager_training(tmp_path, model, tiny_vmae):
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    flags = (f"{tiny(model)} {SMALL} --steps 6 --seed 1",)
    if model == "tune":
        flags = (f"{SMALL} --steps 6 --lr 1e-3 --tune_decoder --init", tiny_vmae)
    run(train_ae, "--out", eager, *flags)
    run(train_ae, "--out", compiled, *flags, "--compile 1")
    assert difference(eager, compiled) < 1e-4


@pytest.mark.slow
def test_compiled_training_in_two_processes_is_eager_training(tmp_path):
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    flags = f"{TINY_VIT} {SMALL} --steps 6"
    torchrun(2, "train_ae.py", "--out", eager, flags)
    torchrun(2, "train_ae.py", "--out", compiled, flags, "--compile 1")
    assert difference(eager, compiled) < 1e-4


def test_without_a_compiler_training_says_so_once_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ae.shutil, "which", lambda name: None)
    run(train_ae, "--out", tmp_path, TINY_VIT, SMALL, "--steps 1 --compile 1")
    output = capsys.readouterr()
    assert output.err.count("torch.compile needs a C++ compiler") == 1
    assert "compiled" not in output.out and "wrote" in output.out


@pytest.mark.parametrize(
    "capability, triton, bfloat16, compiled",
    [((9, 0), True, True, True), ((7, 5), True, False, True), ((8, 0), False, True, False)],
)
def test_a_gpu_s_defaults_are_what_it_can_do(
    tmp_path, monkeypatch, capability, triton, bfloat16, compiled
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(ae.importlib.util, "find_spec", lambda name: triton or None)
    monkeypatch.setattr(ae.shutil, "which", lambda name: name)
    monkeypatch.setattr(sys, "argv", ["train_ae.py", "--out", str(tmp_path / "out")])
    args, _ = train_ae.parse_args()
    training = train_ae.Run(args)
    assert training.device == "cuda:0"
    assert (training.bfloat16, training.compiled) == (bfloat16, compiled)


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
    flags = ("--ae", tiny_vmae, SMALL, "--steps 6 --sample_steps 1 --lr 1e-3")
    run(train_dit, "--out", eager, *flags)
    run(train_dit, "--out", compiled, *flags, "--compile 1")
    assert difference(eager, compiled) < 1e-5


def test_an_unreadable_image_is_skipped_by_name_and_many_stop_the_run(folder, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(folder, images)
    flags = ("--data", images, TINY_VIT, SMALL, "--image_size 32 --lpips 0 --steps 15")
    # One of the images that recon.png shows
    (images / "ants" / "000.jpg").write_bytes(b"not an image")
    run(train_ae, "--out", tmp_path / "a", *flags, "--workers 2")
    assert "000.jpg" in capsys.readouterr().err
    # A batch of 256 holds each of the 120 images about twice
    run(train_ae, "--out", tmp_path / "often", *flags, "--workers 0 --batch 256 --steps 2")
    for name in ("004.jpg", "006.jpg"):
        path = images / "bees" / name
        path.write_bytes(path.read_bytes()[:100])
    assert "more than 1%" in fails(train_ae, "--out", tmp_path / "b", *flags, "--workers 2")


# ---- the latent cache ----


def test_training_from_the_cache_is_training_on_the_fly_up_to_16_bits(tmp_path, folder):
    fly, cached, two = tmp_path / "fly", tmp_path / "cached", tmp_path / "two"
    common = ("--data", folder, SMALL, "--image_size 32 --workers 0")
    run(train_ae, "--out", tmp_path / "ae", *common, TINY_VIT, "--steps 4 --lpips 0")
    small = "--model DiT-demo/1 --steps 6 --sample_steps 1 --cfg_scale 1"
    flags = ("--ae", tmp_path / "ae" / "ckpt.pt", *common, small)
    run(train_dit, "--out", fly, *flags)
    run(train_dit, "--out", cached, *flags, "--cache", tmp_path / "cache")
    torchrun(2, "train_dit.py", "--out", two, *flags, "--cache", tmp_path / "cache2")
    for a, b, c in zip(log_of(fly), log_of(cached), log_of(two)):
        assert abs(a["loss"] - b["loss"]) < 1e-3 and abs(b["loss"] - c["loss"]) < 1e-5
    assert read(cached / "ckpt.pt")["class_names"] == ["ants", "bees", "cats"]


def test_the_cache_holds_the_moments_of_each_image_and_its_flip(
    tmp_path, tiny_vmae, folder, monkeypatch
):
    monkeypatch.setattr(train_dit.Cache, "shard", 50)  # three shards
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
            moments, labels, _ = train_dit.Cache(cache, images)[[(index, 0, flip)]]
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

    # The cache of another autoencoder or of another folder is refused
    other = tmp_path / "other.pt"
    state = read(tiny_vmae)
    state["model"]["norm.bias"] += 1
    torch.save(state, other)
    message = fails(train_dit, "--out", tmp_path / "c", *flags, "--ae", other)
    assert "its autoencoder is" in message

    # The same images elsewhere are the same images, but not once one of them has changed
    moved = tmp_path / "elsewhere" / "."
    shutil.copytree(folder, moved)
    run(train_dit, "--out", tmp_path / "d", *flags, "--data", moved)
    Image.new("RGB", (40, 40)).save(moved / "ants" / "001.png")
    message = fails(train_dit, "--out", tmp_path / "e", *flags, "--data", moved)
    assert "its images is" in message


def test_a_latent_beyond_16_bits_is_a_sentence(tmp_path, tiny_vmae):
    state = read(tiny_vmae)
    state["model"]["to_latent.weight"] *= 1e6
    torch.save(state, tmp_path / "huge.pt")
    flags = ("--ae", tmp_path / "huge.pt", "--cache", tmp_path / "cache", SMALL)
    assert "65,504" in fails(train_dit, "--out", tmp_path / "a", *flags)


def test_the_cache_keeps_a_bounded_number_of_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(train_dit.Cache, "shard", 1)
    monkeypatch.setattr(train_dit.Cache, "most_open", 3)
    cache = train_dit.Cache(tmp_path, train_ae.Images(None))
    for k in range(6):
        np.save(cache.path("moments", k), np.full((1, 2, 2, 1, 1), k, np.float16))
        np.save(cache.path("labels", k), np.full(1, k))
    for k in (0, 5, 2, 3, 0, 4):
        moments, labels, _ = cache[[(k, 0, False)]]
        assert moments.unique().item() == labels.item() == k
        assert len(cache.opened) <= 3


def test_the_cache_of_digits_has_no_flips(tmp_path, tiny_vmae):
    flags = ("--out", tmp_path / "a", "--cache", tmp_path / "cache", SMALL)
    run(train_dit, "--ae", tiny_vmae, *flags, "--steps 1 --sample_steps 1")
    cache = train_dit.Cache(tmp_path / "cache", train_ae.Images(None))
    assert torch.equal(cache[[(7, 0, True)]][0], cache[[(7, 0, False)]][0])


# ---- fine-tuning, numbered files ----

TABLE = "y_embedder.embedding_table.weight"


def test_a_dit_that_starts_from_another_has_its_weights_autoencoder_and_statistics(
    tmp_path, tiny_dit, capsys
):
    flags = (SMALL, "--steps 1 --lr 0 --sample_steps 2")
    run(train_dit, "--out", tmp_path, "--init", tiny_dit, *flags)
    assert "its classes are these" in capsys.readouterr().out
    old, new = read(tiny_dit), read(tmp_path / "ckpt.pt")
    for key, value in old["ema"].items():
        assert torch.equal(new["model"][key], value) and torch.equal(new["ema"][key], value), key
    for key, value in old["ae"]["model"].items():
        assert torch.equal(new["ae"]["model"][key], value)
    for name in ("latent_mean", "latent_std"):
        assert torch.equal(new[name], old[name])


def test_other_classes_get_new_embeddings_but_for_the_null_class(
    tmp_path, tiny_dit, folder, capsys
):
    flags = ("--data", folder, SMALL, "--workers 0 --steps 1 --lr 0 --sample_steps 2")
    run(train_dit, "--out", tmp_path, "--init", tiny_dit, *flags)
    assert "new embeddings for other classes" in capsys.readouterr().out
    old, new = read(tiny_dit)["ema"], read(tmp_path / "ckpt.pt")["model"]
    assert old[TABLE].shape[0] == 11 and new[TABLE].shape[0] == 4
    assert torch.equal(new[TABLE][-1], old[TABLE][-1])
    assert not torch.equal(new[TABLE][0], old[TABLE][0])
    assert all(torch.equal(new[key], old[key]) for key in old if key != TABLE)


def test_fine_tuning_keeps_the_classes_whatever_the_dropout_of_labels(tmp_path, tiny_dit):
    flags = (SMALL, "--steps 1 --lr 0 --sample_steps 1 --class_dropout 0")
    run(train_dit, "--out", tmp_path, "--init", tiny_dit, *flags)
    old, new = read(tiny_dit)["ema"][TABLE], read(tmp_path / "ckpt.pt")["model"][TABLE]
    assert torch.equal(new, old[:10])


def test_fine_tuning_refuses_other_sizes_and_other_latents(tmp_path, tiny_dit, folder):
    start = ("--out", tmp_path / "out", "--init", tiny_dit)
    assert "other sizes" in fails(train_dit, *start, "--qk_norm 0")
    run(train_ae, "--out", tmp_path, TINY_VIT, "--latent_dim 4 --steps 1")
    message = fails(train_dit, *start, "--ae", tmp_path / "ckpt.pt")
    assert "there they have 16 channels on a grid of 4, here 4 on 4" in message


def test_numbered_files_of_a_dit_are_enough_to_draw_from(tmp_path, tiny_vmae):
    flags = (SMALL, "--steps 4 --keep_every 2 --sample_steps 2")
    run(train_dit, "--out", tmp_path, "--ae", tiny_vmae, *flags)
    kept = sorted(tmp_path.glob("ckpt-*"))
    assert [path.name for path in kept] == ["ckpt-0000002.pt", "ckpt-0000004.pt"]
    files = [read(path) for path in (*kept, tmp_path / "ckpt.pt")]
    assert all(file.keys() & {"model", "optimizer"} == set() for file in files[:2])
    weights = [file["ema"]["final_layer.linear.weight"] for file in files]
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[0], weights[1])
    for path in (*kept, tmp_path / "ckpt.pt"):
        run(sample, "--ckpt", path, "--out", tmp_path / path.stem, "--steps 2 --columns 1")
    grids = [tmp_path / path.stem / "samples.png" for path in (*kept, tmp_path / "ckpt.pt")]
    first, second, last = [grid.read_bytes() for grid in grids]
    assert second == last != first


def test_each_access_draws_a_fresh_posterior_sample(tiny_vmae):
    posterior = ae.load(tiny_vmae).encode(normal(0, 1, 3, 32, 32))
    first, second = (
        posterior.sample(torch.randn(1, 16, 4, 4, generator=train_ae.generator("cpu", 0, step)))
        for step in (1, 2)
    )
    assert not torch.equal(first, second)


def test_latent_statistics_normalise_each_channel(tiny_vmae):
    images, autoencoder = train_ae.Images(None), ae.load(tiny_vmae).requires_grad_(False)

    class training:
        rank, world, device = 0, 1, "cpu"
        generator = functools.partial(train_ae.generator, "cpu", 0)

        class args:
            seed, workers, latent_shape = 0, 0, (16, 4, 4)

    crop = functools.partial(train_ae.crop_and_flip, 32, False)
    dataset = train_ae.Batches(images, crop)
    encode = autoencoder.encode
    mean, std = train_dit.latent_statistics(dataset, encode, len(images), training)
    x = torch.from_numpy(images.files).float()[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
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
    pair = np.asarray(Image.open(picture))
    run(sample, "--ckpt", moved, "--labels 7,3 --columns 3")
    assert np.array_equal(pair, np.asarray(Image.open(picture)))
    assert size_of(picture)[1] // 66 == 2


def test_sample_i_depends_on_seed_and_i_alone(tmp_path, tiny_dit, monkeypatch):
    monkeypatch.setattr(sample, "SAMPLES_PER_PART", 16)
    flags = ("--ckpt", tiny_dit, "--steps 4")
    run(sample, "--out", tmp_path / "a", *flags, "--num 40")
    run(sample, "--out", tmp_path / "b", *flags, "--num 24 --batch 5")
    torchrun(2, "sample.py", "--out", tmp_path / "c", *flags, "--num 40")
    run(sample, "--out", tmp_path / "d", *flags, "--num 24 --seed 1")
    files = [np.load(tmp_path / name / "samples.npz") for name in ("a", "b", "c", "d")]
    images, labels = [file["arr_0"] for file in files], [file["arr_1"] for file in files]
    assert images[0].shape == (40, 32, 32, 3) and images[0].dtype == np.uint8
    assert labels[0].shape == (40,)
    for other, n in ((1, 24), (2, 40)):
        assert np.array_equal(labels[0][:n], labels[other])
        # A batch of another size may round differently
        assert np.abs(images[0][:n].astype(int) - images[other]).max() <= 1
    assert np.abs(images[0][:24].astype(int) - images[3]).max() > 20
    assert len(set(labels[0].tolist())) > 5


def test_a_flat_folder_is_one_class_without_guidance(tmp_path, tiny_vmae, folder):
    ckpt = tmp_path / "ckpt.pt"
    small = "--model DiT-demo/1 --workers 0 --steps 2 --sample_steps 2"
    run(train_dit, "--data", folder / "ants", "--ae", tiny_vmae, "--out", tmp_path, SMALL, small)
    state = read(ckpt)
    assert len(state["ema"]["y_embedder.embedding_table.weight"]) == 1
    assert state["args"]["cfg_scale"] == 1
    run(sample, "--ckpt", ckpt)
    run(sample, "--ckpt", ckpt, "--num 3")
    run(sample, "--ckpt", ckpt, "--num 3 --png")
    # There are no labels where there are no classes
    assert np.load(tmp_path / "samples.npz").files == ["arr_0"]
    files = sorted((tmp_path / "samples").iterdir())
    assert [file.name for file in files] == ["000000.png", "000001.png", "000002.png"]
    assert "several classes" in fails(sample, "--ckpt", ckpt, "--cfg_scale 3")


def test_an_interrupted_samples_npz_goes_on(tmp_path, tiny_dit, monkeypatch):
    monkeypatch.setattr(sample, "SAMPLES_PER_PART", 8)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ("--ckpt", tiny_dit, "--steps 2 --num 30")
    run(sample, "--out", whole, *flags)
    drawn, real_draw = [], sample.Source.draw

    def draw(source, indices, *args, **kwargs):
        drawn.append(list(indices))
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return real_draw(source, indices, *args, **kwargs)

    monkeypatch.setattr(sample.Source, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        run(sample, "--out", cut, *flags)
    assert "other settings" in fails(sample, "--out", cut, *flags, "--seed 3")
    run(sample, "--out", cut, *flags)
    # The first two parts are not drawn again
    assert drawn[3:] == [list(range(16, 24)), list(range(24, 30))]
    a, b = np.load(whole / "samples.npz"), np.load(cut / "samples.npz")
    assert np.array_equal(a["arr_0"], b["arr_0"]) and np.array_equal(a["arr_1"], b["arr_1"])
    assert not (cut / "samples.parts").exists()


def test_png_files_are_the_pictures_of_the_npz(tmp_path, tiny_dit, monkeypatch):
    monkeypatch.setattr(sample, "SAMPLES_PER_PART", 8)
    flags = ("--ckpt", tiny_dit, "--steps 2 --num 20")
    run(sample, "--out", tmp_path, *flags)
    run(sample, "--out", tmp_path / "one", *flags, "--png")
    torchrun(2, "sample.py", "--out", tmp_path / "two", *flags, "--png")
    arrays = np.load(tmp_path / "samples.npz")
    for name, levels in (("one", 0), ("two", 1)):  # two processes may round differently
        folder = tmp_path / name / "samples"
        files = sorted(folder.rglob("*.*"), key=lambda file: file.name)
        assert [file.name for file in files] == [f"{i:06}.png" for i in range(20)]
        # The digits' classes are called 0 to 9
        assert [file.parent.name for file in files] == [str(label) for label in arrays["arr_1"]]
        images = np.stack([np.asarray(Image.open(file)) for file in files])
        assert np.abs(images.astype(int) - arrays["arr_0"]).max() <= levels
        # fid.py reads them in the same order
        (batch,) = fid.open_set(folder).batches([(0, 20)], 1)
        assert np.array_equal(batch, images)
        assert sorted(folder.parent.iterdir()) == [folder]
    assert "exists: remove it" in fails(sample, "--out", tmp_path / "one", *flags, "--png")
    assert "--num" in fails(sample, "--out", tmp_path, "--ckpt", tiny_dit, "--png")


def test_interrupted_png_files_go_on(tmp_path, tiny_dit, monkeypatch):
    monkeypatch.setattr(sample, "SAMPLES_PER_PART", 8)
    flags = ("--out", tmp_path, "--ckpt", tiny_dit, "--steps 2 --num 20")
    write, calls = sample.write_png_files, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sample, "write_png_files", killed)
        with pytest.raises(KeyboardInterrupt):
            run(sample, *flags, "--png")
    # Not before all files are there; what is drawn is not drawn again
    assert not (tmp_path / "samples").exists()
    monkeypatch.setattr(sample.Source, "draw", None)
    assert "other settings" in fails(sample, *flags, "--png --seed 1")
    run(sample, *flags, "--png")
    assert len(list((tmp_path / "samples").rglob("*.png"))) == 20
    assert not (tmp_path / "samples.parts").exists()


def test_png_files_stay_in_their_folder_whatever_classes_are_called(tmp_path, tiny_dit):
    ckpt = read(tiny_dit)
    names = ["..", "a/b", "/c", "", "St. Bernard", "x\0", ".", "7", "n02007558", "x\n"]
    torch.save(ckpt | {"class_names": names}, tmp_path / "ckpt.pt")
    run(
        sample,
        "--out",
        tmp_path / "out",
        "--ckpt",
        tmp_path / "ckpt.pt",
        "--steps 1 --num 60 --png",
    )
    folders = {file.name for file in (tmp_path / "out" / "samples").iterdir()}
    assert folders == {"0", "1", "2", "3", "St. Bernard", "5", "6", "7", "n02007558", "9"}
    assert sorted(tmp_path.rglob("*.png")) == sorted(tmp_path.glob("out/samples/*/*.png"))
    assert [sample.class_folder([""] * 1000, label) for label in (7, 130)] == ["007", "130"]


def test_parts_without_their_settings_are_not_taken_over(tmp_path, tiny_dit):
    flags = ("--ckpt", tiny_dit, "--steps 2 --num 4")
    run(sample, "--out", tmp_path / "a", *flags)
    parts = tmp_path / "b" / "samples.parts"
    parts.mkdir(parents=True)
    np.savez(parts / "000000.npz", images=np.zeros((4, 32, 32, 3), np.uint8), labels=np.zeros(4))
    run(sample, "--out", tmp_path / "b", *flags)
    a, b = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("a", "b"))
    assert np.array_equal(a, b)


def test_weights_of_others_are_drawn_with_ae_and_stats(tmp_path, tiny_vmae, tiny_dit):
    ckpt, theirs, stats = read(tiny_dit), tmp_path / "lightning.pt", tmp_path / "latents_stats.pt"
    torch.save({"ema": ckpt["ema"], "model": ckpt["model"], "opt": {}}, theirs)
    mean, std = (ckpt[name].view(1, -1, 1, 1) for name in ("latent_mean", "latent_std"))
    torch.save({"mean": mean, "std": std}, stats)
    assert "--ae" in fails(sample, "--ckpt", theirs)
    assert "--stats" in fails(sample, "--ckpt", theirs, "--ae", tiny_vmae)
    same = "--num 6 --steps 4 --cfg_scale 2 --cfg_channels 8"
    others = ("--ckpt", theirs, "--ae", tiny_vmae, "--stats", stats)
    run(sample, "--out", tmp_path / "theirs", *others, same)
    run(sample, "--out", tmp_path / "ours", "--ckpt", tiny_dit, same)
    a, b = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("ours", "theirs"))
    assert np.array_equal(a, b)


@pytest.fixture(scope="module")
def of_imagenet(tiny_vmae, tmp_path_factory):
    """An untrained DiT of 1,000 classes as LightningDiT saves it; the flags to draw from it."""
    out = tmp_path_factory.mktemp("imagenet")
    channels, size, _ = ae.load(tiny_vmae).latent_shape(32, 32)
    net = dit.DiT(size, 1, channels, 32, 1, 2, 1000)
    torch.save({"ema": net.state_dict()}, out / "ckpt.pt")
    torch.save({"mean": [0.0] * channels, "std": [1.0] * channels}, out / "stats.pt")
    paths = ("--ckpt", out / "ckpt.pt", "--ae", tiny_vmae, "--stats", out / "stats.pt")
    return *paths, "--steps 1 --columns 2"


def captions_of_grid(monkeypatch, *flags):
    """What sample.py writes beside the rows of its grid."""
    captions, save_grid = [], ae.save_grid

    def watched(path, rows, labels):
        captions.extend(labels)
        save_grid(path, rows, labels)

    with monkeypatch.context() as patch:
        patch.setattr(ae, "save_grid", watched)
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
    words = "--labels 975 'siberian husky,Macaw' fig"
    named = ["Lakeside (975)", "Siberian husky (250)", "Macaw (88)", "Fig (952)"]
    assert captions_of_grid(monkeypatch, *flags, words) == named

    for word, *expected in (
        ("cardigan", "several classes, Cardigan (264), Cardigan (474)"),
        ("husky", "'husky' is none of this model's classes 0 to 999", "Siberian husky (250)"),
        ("Maccaw", "'Maccaw' is none", "the nearest names are Macaw (88)"),
        ("1000", "'1000' is none"),
    ):
        message = fails(sample, *flags, "--labels", word)
        assert all(part in message for part in expected)


def test_names_are_those_of_folders_but_for_imagenet_s_wnids():
    others = [f"n{i:08}" for i in range(1000)]  # a thousand classes of ImageNet-21k, say
    wnids = ["n01440764", *others[1:]]
    assert sample.names_in_words(wnids)[88] == "Macaw"
    for folders in (others, wnids[:999], [f"class {i}" for i in range(1000)], ["rose", ""]):
        assert sample.names_in_words(folders) == folders
    flowers = ["lily", "3", "rose", "", "Rose", "tulip"]
    assert [sample.caption(flowers, label) for label in (0, 1, 3)] == ["lily (0)", "3 (1)", "3"]
    assert sample.parse_labels(["tulip", "3,LILY"], flowers) == [5, 3, 0]
    with pytest.raises(ae.UserError, match=r"rose .* rose \(2\), Rose \(4\)"):
        sample.parse_labels(["rose"], flowers)
    with pytest.raises(ae.UserError, match="'' is none of this model's classes 0 to 5$"):
        sample.parse_labels([""], flowers)


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
        images[name] = np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int)
    levels = np.abs(images["float32"] - images["bfloat16"])
    assert 0 < levels.mean() < 1


def test_a_dit_is_compiled_on_request_or_said_not_to_be(tmp_path, tiny_dit, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(dit.DiT, "compile", lambda model, **flags: compiled.append(flags))
    flags = ("--out", tmp_path, "--ckpt", tiny_dit, "--labels 1 --columns 1 --steps 1")
    run(sample, *flags)
    assert not compiled
    run(sample, *flags, "--compile 1")
    assert len(compiled) == 1
    monkeypatch.setattr(ae.shutil, "which", lambda name: None)
    run(sample, *flags, "--compile 1")
    output = capsys.readouterr()
    assert len(compiled) == 1 and output.out.count("wrote") == 3
    assert output.err.count("torch.compile needs a C++ compiler") == 1


@pytest.mark.slow
def test_compiled_sampling_is_eager_sampling(tmp_path, tiny_dit):
    flags = ("--ckpt", tiny_dit, "--steps 4 --num 6 --batch 4 --cfg_start 0.5 --cfg_scale 3")
    run(sample, "--out", tmp_path / "eager", *flags)
    run(sample, "--out", tmp_path / "compiled", *flags, "--compile 1")
    files = [np.load(tmp_path / name / "samples.npz") for name in ("eager", "compiled")]
    images = [file["arr_0"].astype(int) for file in files]
    assert np.abs(images[0] - images[1]).max() <= 1


@pytest.mark.parametrize("flag", ["--ckpt", "--ae", "--stats"])
def test_parts_of_changed_files_are_not_taken_over(tmp_path, of_imagenet, monkeypatch, flag):
    monkeypatch.setattr(sample, "SAMPLES_PER_PART", 2)
    flags, files = list(of_imagenet), {}
    for name in ("--ckpt", "--ae", "--stats"):
        place = flags.index(name) + 1
        files[name] = tmp_path / f"{name}.pt"
        shutil.copy(flags[place], files[name])
        flags[place] = files[name]
    with monkeypatch.context() as patch:
        patch.setattr(sample, "join_parts", lambda *args, **kwargs: sys.exit("killed"))
        assert fails(sample, "--out", tmp_path, *flags, "--num 3") == "killed"
    # The same name holds other weights now
    os.utime(files[flag], (1e9, 1e9))
    assert "other settings" in fails(sample, "--out", tmp_path, *flags, "--num 3")


# ---- wrong input: one sentence, exit 1 ----


def wrong_autoencoder_runs(tmp):
    """Words of the sentence, and the flags that lead to it."""
    (tmp / "empty").mkdir()
    (tmp / "mixed" / "a").mkdir(parents=True)
    for path in (tmp / "mixed" / "1.png", tmp / "mixed" / "a" / "2.png"):
        Image.new("RGB", (40, 40)).save(path)
    yield "no such folder", "--data", tmp / "nowhere"
    yield "holds no images", "--data", tmp / "empty"
    yield "both in itself and in sub-folders", "--data", tmp / "mixed"
    yield "vqgan", "--model vqgan"
    yield "many", "--steps many"
    yield "lerning_rate", "--lerning_rate 1"
    yield "multiple", "--image_size 30"
    yield "multiple", "--model ae --image_size 30"
    yield "leaves 0 of", "--mask_ratio 0.99"
    yield "does not divide", "--batch 10 --micro_batch 3"
    yield "32", "--model ae --channels 30 30"
    yield "30", "--hidden_size 30"
    yield "no checkpoint file", "--resume"
    yield "--steps", "--steps 0"
    yield "--batch", "--batch 0"
    yield "mask", "--model mae --mask_ratio 0"
    yield "gpu", "--device gpu"
    yield "--lr", "--lr -1"
    yield "--lr", "--lr nan"
    yield "--betas", "--betas 0.9"
    yield "--betas", "--betas 1 2"
    yield "--prior_std", "--prior_std 0"
    yield "--seed", "--seed -1"
    yield "discriminator", "--model sdvae --image_size 16"
    yield "--mask_ratio is not a flag of --model ae", "--model ae --mask_ratio 0.5"
    yield "--kl is not a flag of --model mae", "--kl 0 --model mae"
    yield "--disc_start is not", "--disc_start 3"
    yield "--recon is not a flag of --model vmae", "--recon l1"
    yield "--model vmae --tune_decoder", "--tune_decoder --init a.pt --mask_ratio 0.5"
    yield "--init", "--ckpt a.pt"


def test_mistakes_with_train_ae_get_one_sentence(tmp_path):
    for k, (words, *flags) in enumerate(wrong_autoencoder_runs(tmp_path)):
        assert words in fails(train_ae, "--out", tmp_path / str(k), *flags)


def test_an_out_folder_with_a_checkpoint_is_not_overwritten_nor_resumed_as_another_run(
    tiny_vmae, tiny_dit
):
    assert "--resume" in fails(train_ae, "--out", tiny_vmae.parent)
    message = fails(train_ae, "--out", tiny_vmae.parent, "--resume --hidden_size 64")
    assert "--hidden_size 32, not 64" in message
    assert "--batch" in fails(train_dit, "--out", tiny_dit.parent, "--resume --batch 1")
    assert "--ae" in fails(train_dit, "--out", tiny_dit.parent, "--resume --ae another.pt")
    assert "--init" in fails(train_ae, "--out", tiny_vmae.parent, "--resume --init another.pt")
    assert "kind autoencoder" in fails(train_dit, "--out", tiny_vmae.parent, "--resume")
    assert "kind dit" in fails(train_ae, "--out", tiny_dit.parent, "--resume")


def test_mistakes_with_train_dit_and_sample_get_one_sentence(tmp_path, tiny_vmae, tiny_dit):
    out, nothing = tmp_path / "out", tmp_path / "nothing.pt"
    assert "no checkpoint file" in fails(train_dit, "--out", out, "--ae", nothing)
    assert "holds a DiT" in fails(train_dit, "--out", out, "--ae", tiny_dit)
    start = ("--out", out, "--ae", tiny_vmae)
    assert "32 pixels" in fails(train_dit, *start, "--image_size 64")
    assert "does not divide" in fails(train_dit, *start, "--micro_batch 31")
    assert "classes" in fails(train_dit, *start, "--class_dropout 0 --cfg_scale 3")
    assert "--shift" in fails(train_dit, *start, "--shift 0")
    (tmp_path / "file").write_text("")
    assert "file" in fails(train_dit, "--out", tmp_path / "file", "--ae", tiny_vmae)

    for flag in ("--columns", "--batch", "--seed", "--shift"):
        assert flag in fails(sample, "--ckpt", tiny_dit, f"{flag} -1")
    stats = tmp_path / "stats.pt"
    torch.save({"mean": [0.0] * 3, "std": [1.0] * 3}, stats)
    message = fails(sample, "--ckpt", tiny_dit, "--stats", stats)
    assert "do not fit" in message and "--ae, --stats" in message
    assert "no checkpoint file" in fails(sample, "--ckpt", nothing)
    assert "train_dit.py --ae" in fails(sample, "--ckpt", tiny_vmae)
    assert "class numbers" in fails(sample, "--ckpt", tiny_dit, "--labels ''")
    assert "classes 0 to 9" in fails(sample, "--ckpt", tiny_dit, "--labels 3,10")
    assert "class numbers" in fails(sample, "--ckpt", tiny_dit, "--labels cat")
    assert "--num" in fails(sample, "--ckpt", tiny_dit, "--num 0")
    assert "--steps" in fails(sample, "--ckpt", tiny_dit, "--steps 0")


def test_a_cache_is_not_made_of_another_folder_nor_taken_for_a_checkpoint(
    tmp_path, tiny_vmae, folder
):
    start = ("--out", tmp_path / "out", "--ae", tiny_vmae)
    before = sorted(folder.iterdir()), tiny_vmae.read_bytes()
    assert "no latent cache" in fails(train_dit, *start, "--cache", folder)
    assert "no latent cache" in fails(train_dit, *start, "--cache", tiny_vmae)
    assert before == (sorted(folder.iterdir()), tiny_vmae.read_bytes())
    (tmp_path / "source.json").write_text("{}")
    assert "train_dit.py --cache" in fails(sample, "--ckpt", tmp_path)


def test_latents_are_of_images_of_the_size_the_autoencoder_was_trained_at(tmp_path, folder):
    ckpt, out = tmp_path / "ae" / "ckpt.pt", tmp_path / "dit"
    flags = ("--data", folder, "--workers 0 --batch 8 --steps 1")
    run(train_ae, "--out", ckpt.parent, *flags, "--model ae --image_size 48", TINY_CONV)
    small = "--model DiT-demo/1 --sample_steps 1 --cfg_scale 1"
    run(train_dit, "--out", out, "--ae", ckpt, *flags, small)
    args = read(out / "ckpt.pt")["args"]
    assert args["image_size"] == 48 and args["latent_shape"] == [16, 24, 24]


@pytest.mark.parametrize("module", [train_ae, train_dit, sample])
def test_help_is_narrow_and_has_a_default_of_every_setting(module, capsys):
    with pytest.raises(SystemExit):
        run(module, "--help")
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100 and "None" not in text
    assert " ".join(text.split()).count("demo:") >= 3


@pytest.mark.parametrize("model, passes", [("vmae", 3), ("sdvae", 4)])
def test_training_with_lpips_logs_it_and_counts_its_flops(
    tmp_path, model, passes, monkeypatch, capsys
):
    """On a VGG16 of made weights."""
    import torchvision

    with torch.device("meta"):
        names = [name for name in torchvision.models.vgg16().state_dict() if "features" in name]
        state = torchvision.models.vgg16().state_dict()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    path.parent.mkdir(parents=True)
    torch.save({name: 0.05 * torch.randn(state[name].shape) for name in names}, path)

    flops = {}
    for weight in (0, 0.5):
        out = tmp_path / str(weight)
        few = "--batch 4 --steps 3 --log_every 1 --dtype bfloat16"
        run(train_ae, "--out", out, tiny(model), few, f"--lpips {weight}")
        flops[weight] = float(capsys.readouterr().out.split(" GFLOPs")[0].split()[-1])
        lines = log_of(out)
        assert all(("lpips" in line) == (weight > 0) for line in lines)
        assert all(np.isfinite(value) for line in lines for value in line.values())
    # VGG16 has 15.3 GMAC at 224 pixels. Two passes forward and one backward, to the reconstruction;
    # SD-VAE's adaptive weight asks for the gradient once more
    vgg = 2 * 15.3 * (32 / 224) ** 2
    assert abs(flops[0.5] - flops[0] - passes * vgg) < 0.1 * vgg


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

    with pytest.raises(ae.UserError, match="file cannot be written: disk full"):
        write_on_a_full_disk()
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
    with ae.whole_file(str(path)) as file:
        file.write(b"after")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"


@pytest.mark.parametrize(
    "model, size",
    [
        ("vmae", 24),
        ("vmae", 40),
        ("vmae", 136),
        ("ae", 40),
        ("ae", 136),
        pytest.param("vmae", 512, marks=pytest.mark.slow),
    ],
)
def test_any_size_that_8_divides_goes_through_both_stages_and_sampling(
    tmp_path, folder, model, size
):
    """From small, non-square images; 24 pixels give 3 x 3 latents, 512 give 64 x 64."""
    ckpt, out = tmp_path / "ckpt.pt", tmp_path / "dit"
    data = ("--data", folder, f"--image_size {size} --workers 0 --batch 2 --steps 1")
    sizes = "--channels 32 32 32 32" if model == "ae" else TINY_VIT
    run(train_ae, "--out", tmp_path, *data, f"--model {model} {sizes} --lpips 0")
    few = "--model DiT-demo/1 --sample_steps 1 --cfg_scale 1"
    run(train_dit, "--out", out, "--ae", ckpt, *data, few)
    state = read(out / "ckpt.pt")
    assert state["args"]["latent_shape"] == [16, size // 8, size // 8]
    assert "bees" in state["class_names"]
    run(sample, "--ckpt", out / "ckpt.pt", "--labels 1 --columns 2")
    with Image.open(out / "samples.png") as picture:
        assert picture.height >= size
