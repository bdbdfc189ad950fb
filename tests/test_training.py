"""The training scripts and sample.py: randomness, processes, resume, the cache, wrong input."""

import argparse
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import types
import unicodedata
import urllib.error
from pathlib import Path

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
    reference,
    run,
    size_of,
    tiny,
    together,
    usage_error,
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


def bytes_of(folder):
    """The content of each file of a folder by its path, to see that nothing has changed."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


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
    # They agree, and not because nothing moves: this bias starts at zero
    assert read(one / "ckpt.pt")["model"]["decoder_norm.bias"].abs().max() > 2e-5


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


def test_streams_of_random_numbers_have_different_seeds():
    """SeedSequence((7, 5)) is SeedSequence((7, 5, 0)): keys of one length tell them apart."""
    ends = ((7, 5, 0), (7, 0, 5), (5, 7, 0))
    seeds = [sample.seed_of(stream, *end) for stream in range(10) for end in ends]
    assert len(set(seeds)) == len(seeds) == 30


# ---- resume ----


def test_a_resumed_autoencoder_ends_in_the_same_bits(tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    # On a cosine that ends later a longer run begins like a shorter one
    flags = f"{TINY_VIT} {SMALL} --batch 8 --schedule cosine --decay_epochs 1"
    run(train_ae, "--out", whole, flags, "--steps 10")
    # A cluster's job script can always carry --resume
    run(train_ae, "--out", cut, flags, "--steps 4 --resume")
    assert f"{cut} has no checkpoint: the run begins" in capsys.readouterr().out
    run(train_ae, "--out", cut, flags, "--steps 10 --resume")
    assert re.search("going on from step 4 .*--steps 10", capsys.readouterr().out)
    assert difference(whole, cut) == 0 and without_times(whole) == without_times(cut)


def test_a_resumed_dit_ends_in_the_same_bits_whatever_is_in_the_log(tmp_path, tiny_vmae):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = (*latents_of(tiny_vmae), SMALL, "--sample_steps 2 --schedule constant")
    run(train_dit, "--out", whole, *flags, "--steps 10 --ema 0.25")
    run(train_dit, "--out", cut, *flags, "--steps 8")
    # As if the run had been killed after step 9, while it wrote the line of step 10; a machine that
    # lost its power leaves other things
    log = cut / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    lines[3:3] = [b"\n", bytes(8) + b"\n", b'{"step": 4, "lo\n']
    log.write_bytes(b"".join(lines) + b'{"step": 9, "loss": 123.0}\n{"step": 10, "los')
    # A longer run's own average is another: its decay is that of the run that it goes on with
    again = ("--out", cut, *flags, "--steps 10 --resume")
    assert "--ema 0.25, not 0.4" in fails(train_dit, *again, "--ema 0.4")
    run(train_dit, *again)
    for part in ("model", "ema"):
        assert difference(whole, cut, part) == 0
    assert without_times(whole) == without_times(cut)


def test_resuming_a_finished_run_ends_before_all_work(
    tmp_path, tiny_vmae, tiny_dit, monkeypatch, capsys
):
    before = [bytes_of(ckpt.parent) for ckpt in (tiny_vmae, tiny_dit)]
    monkeypatch.setattr(torch.optim, "AdamW", None)
    run(train_ae, "--out", tiny_vmae.parent, TINY_VIT, "--steps 20 --resume")
    start = ("--ae", tiny_vmae, "--out", tiny_dit.parent, "--cache", tmp_path / "cache", SMALL)
    run(train_dit, *start, "--steps 8 --sample_steps 4 --resume")
    assert capsys.readouterr().out.count("finished before: see") == 2
    assert [bytes_of(ckpt.parent) for ckpt in (tiny_vmae, tiny_dit)] == before


def test_resuming_refuses_other_settings_by_name_and_prints_those_that_may_change(tmp_path, capsys):
    flags = ("--out", tmp_path, TINY_VIT, SMALL, "--steps 4")
    run(train_ae, *flags)
    before = (tmp_path / "ckpt.pt").read_bytes()
    for name, value in {"batch": 8, "seed": 1, "model": "mae", "steps": 6}.items():
        message = fails(train_ae, *flags, f"--{name}", value, "--resume")
        assert re.search(rf"--{name} \S+, not {value}", message)
    for name, has in (("hidden_size 64", 32), ("depth 2", 1)):
        message = fails(train_ae, *flags, f"--{name} --resume")
        assert f"--{name}: {tmp_path}/ckpt.pt has {has}" in message
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    capsys.readouterr()

    free = "--micro_batch 8 --ckpt_every 3 --log_every 2 --grad_clip 1.0 --base_lr 0.001"
    run(train_ae, *flags, free, "--resume")
    line = re.search("going on from step 4 (.*)", capsys.readouterr().out)[1]
    assert sorted(re.findall(r"--\w+ \S+", line)) == sorted(re.findall(r"--\w+ \S+", free))


def test_a_file_that_is_no_checkpoint_of_this_script_s_runs_is_a_sentence_on_resume(
    tmp_path, tiny_vmae, tiny_dit
):
    vmae, model = read(tiny_vmae), read(tiny_dit)["ema"]
    weights = {"model": vmae["model"], "args": vmae["args"]}
    for module, content, words in (
        (train_ae, weights, "is no checkpoint of a run"),
        (train_ae, model, "holds a DiT, not an autoencoder"),
        (train_ae, {"a": torch.zeros(1)}, "holds no autoencoder"),
        (train_dit, model, "is no checkpoint of a run"),
        (train_dit, vmae, "is no checkpoint of a DiT's run"),
    ):
        torch.save(content, tmp_path / "ckpt.pt")
        message = fails(module, "--out", tmp_path, "--resume")
        assert words in message and str(tmp_path / "ckpt.pt") in message


def test_a_run_moved_with_its_images_resumes_there_but_not_on_others_or_more(
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

    again = ("--data", images, "--out", moved, flags, "--resume")
    (images / "cats" / "000.jpg").rename(images / "cats" / "other.jpg")
    assert "other images" in fails(train_ae, *again, "--steps 4")
    # With --epochs more images have more steps, too, which a cosine does not allow; that is no help
    (images / "cats" / "other.jpg").rename(images / "cats" / "000.jpg")
    for i in range(40):
        shutil.copy(images / "cats" / "000.jpg", images / "cats" / f"more {i}.jpg")
    assert "other images" in fails(train_ae, *again, "--epochs 0.4 --schedule cosine")


@pytest.mark.parametrize("file", ["--tune_decoder --init", "--ae", "--init"])
def test_a_run_goes_on_without_the_files_that_it_began_with(tmp_path, tiny_vmae, tiny_dit, file):
    tuned = file.startswith("--tune")
    module = train_ae if tuned else train_dit
    gone, flags = tmp_path / "gone.pt", f"{SMALL} --schedule constant"
    flags += " --base_lr 16e-3" if tuned else " --sample_steps 1"
    shutil.copy(tiny_dit if file == "--init" else tiny_vmae, gone)
    cache = () if tuned else latents_of(tiny_vmae)[2:]
    began = (*file.split(), gone, flags, *cache)
    for out, steps in (("whole", 3), ("cut", 2)):
        run(module, "--out", tmp_path / out, *began, f"--steps {steps}")
    gone.unlink()
    run(module, "--out", tmp_path / "cut", *began, "--steps 3 --resume")
    assert difference(tmp_path / "whole", tmp_path / "cut") == 0
    run(module, "--out", tmp_path / "cut", *file.split()[:-1], flags, *cache, "--steps 4 --resume")
    stored = read(tmp_path / "cut" / "ckpt.pt")
    assert stored["step"] == 4 and stored["args"][file.split()[-1][2:]] == str(gone)


def test_files_of_the_commit_before_the_start_of_a_run_was_rewritten_go_on(tmp_path):
    shutil.copy(reference("old-vmae-15.pt"), tmp_path / "ckpt.pt")
    assert not ae.load(tmp_path / "ckpt.pt").training
    # Its cosine ends with the run, whatever a recipe has now
    flags = "--steps 30 --log_every 10 --ckpt_every 15 --keep_every 15 --decay_epochs 400 --resume"
    run(train_ae, "--out", tmp_path, TINY_VIT, flags)
    new, old = read(tmp_path / "ckpt.pt"), read(reference("old-vmae-30.pt"))
    assert new["step"] == old["step"] == 30 and new["model"].keys() == old["model"].keys()
    for name, value in old["model"].items():
        # Two threads instead of one round otherwise, by 2e-6; the 15 steps move weights by 4e-3
        torch.testing.assert_close(new["model"][name], value, rtol=0, atol=5e-5)


# ---- one run in a folder, and what a failed start leaves ----


def test_a_second_run_in_a_folder_ends_in_a_sentence_until_the_first_is_dead(tmp_path, tiny_vmae):
    out = tmp_path / "out"
    shutil.copytree(tiny_vmae.parent, out, ignore=shutil.ignore_patterns("latents"))
    hold = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); "
    hold += "print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    first = subprocess.Popen([sys.executable, "-c", hold, out / ".lock"], **pipes)
    assert first.stdout.readline() == b"held\n"
    before, flags = bytes_of(out), (TINY_VIT, "--steps 20")
    message = fails(train_ae, "--out", out, *flags, "--resume")
    assert f"another run is writing into {out}" in message
    # Where the first has not written anything yet, too
    new = tmp_path / "new"
    new.mkdir()
    os.link(out / ".lock", new / ".lock")
    message = fails(train_dit, "--out", new, "--ae", tiny_vmae)
    assert f"another run is writing into {new}" in message
    assert bytes_of(out) == before and [path.name for path in new.iterdir()] == [".lock"]

    first.kill()
    first.communicate()
    run(train_ae, "--out", out, *flags, "--resume")


def test_a_failure_before_the_first_step_leaves_nothing_that_the_next_try_trips_over(
    tmp_path, folder, monkeypatch, offline
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    out = tmp_path / "a"
    flags = ("--data", folder, "--out", out, TINY_VIT, "--image_size 32 --batch 4 --steps 1")
    # LPIPS needs VGG16, whose download fails
    with pytest.raises(urllib.error.URLError, match="no network"):
        run(train_ae, *flags, "--workers 0")
    run(train_ae, *flags, "--workers 0 --lpips 0")
    assert [line["step"] for line in log_of(out)] == [1]


@pytest.mark.slow
def test_a_mistake_under_torchrun_ends_all_processes_and_the_next_try_is_not_refused(tmp_path):
    out = tmp_path / "out"
    command, env = launch(3, "train_ae.py", "--out", out, TINY_VIT, "--steps 1")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "--batch 32 does not divide over 3 processes" in done.stderr
    run(train_ae, "--out", out, TINY_VIT, "--steps 1")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["images", "checkpoint"])
def test_processes_that_see_other_images_or_another_checkpoint_end_in_a_sentence(
    tmp_path, folder, tiny_vmae, what
):
    """As on two nodes of which one has an older copy of a folder."""
    if what == "images":
        shutil.copytree(folder, tmp_path / "0")
        shutil.copytree(folder, tmp_path / "1")
        (tmp_path / "1" / "ants" / "000.jpg").rename(tmp_path / "1" / "ants" / "other.jpg")
        flags = ("--out", tmp_path / "out", TINY_VIT, "--image_size 32 --lpips 0 --data")
    else:
        shutil.copytree(tiny_vmae.parent, tmp_path / "0")
        (tmp_path / "1").mkdir()
        flags = (TINY_VIT, "--steps 20 --resume --out")
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import fid, train_ae
sys.argv.append(os.path.join({str(tmp_path)!r}, os.environ["RANK"]))
try:
    fid.run_main(train_ae.main)
except SystemExit as stop:
    assert "the processes see different images" in stop.code, stop.code
    print("SAID", stop.code, flush=True)
    os._exit(0)  # PyTorch's threads may abort a process that ends beside others
""")
    since = time.time()
    assert "SAID" in together(2, driver, *flags)
    assert time.time() - since < 30
    assert not list(tmp_path.rglob("out/log.jsonl"))


# ---- settings that follow from others, the average of the weights ----


def resolved(monkeypatch, module, *flags):
    """The settings of a run as they are before its first step."""
    found = []

    def stop(args, *_):
        found.append(args)
        raise fid.UserError("that will do")

    monkeypatch.setattr(train_ae, "check_run", stop)
    assert fails(module, *flags) == "that will do"
    return found[0]


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--image_size 64", 256),
        ("--image_size 256", 64),
        ("--image_size 512 --model mae", 16),
        ("--batch 96 --micro_batch 1000000000000", 96),
        ("--model ae", 16),
    ],
)
def test_the_micro_batch_of_a_vit_follows_from_its_pixels(
    tmp_path, folder, monkeypatch, flags, expected
):
    args = resolved(monkeypatch, train_ae, "--data", folder, "--out", tmp_path, flags)
    assert args.micro_batch == expected


def test_loader_processes_share_the_cpus_of_a_machine_and_digits_need_none(
    tmp_path, folder, monkeypatch
):
    def workers(cpus, ranks, *data):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cpus), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        return resolved(monkeypatch, train_ae, "--out", tmp_path, *data).workers

    data = ("--data", folder)
    assert [workers(*pair, *data) for pair in ((64, 8), (64, 1), (6, 4), (2, 4))] == [8, 16, 1, 0]
    assert workers(64, 8) == 0 and workers(64, 8, *data, "--workers 3") == 3


def test_the_cosine_reaches_zero_after_decay_epochs_or_the_run_whichever_is_longer(tmp_path):
    recipe, _ = train_ae.RECIPES["vmae"]
    assert (recipe["epochs"], recipe["decay_epochs"], recipe["warmup"]) == (91, 400, 10)
    # On ImageNet: 81 of the 390 epochs after the warm-up are done, 0.8973 of the rate is left
    epoch = 1_281_167 / recipe["batch"]
    args = argparse.Namespace(schedule=recipe["schedule"], steps=round(91 * epoch))
    assert args.steps == 56927
    lr = train_ae.learning_rate(args, args.steps, 8e-4, 10 * epoch, 400 * epoch)
    assert abs(lr - 7.178e-4) < 1e-7

    # A small run of an explicit length: 100 steps are an epoch of the digits, 2 are the warm-up
    flags = "--batch 45 --base_lr 1 --warmup 0.02 --steps 6 --log_every 1"
    peak = 45 / 256
    for epochs, cosines in ((0.08, [1, 0.933013, 0.75, 0.5]), (0.04, [1, 0.853553, 0.5, 0.146447])):
        out = tmp_path / str(epochs)
        run(train_ae, "--out", out, TINY_VIT, flags, f"--decay_epochs {epochs}")
        rates = [line["lr"] for line in log_of(out)]
        assert rates == pytest.approx([0, peak / 2, *(peak * share for share in cosines)], 1e-5)
    assert train_ae.SDVAE["disc_start"] == 50_001


@pytest.mark.parametrize(
    "steps, decay", [("3", 0), ("12", 0.5), ("60000", 0.9999), ("99999", 0.9999), ("9 --ema 0", 0)]
)
def test_the_decay_of_the_average_is_the_paper_s_or_what_the_run_has_steps_for(
    tmp_path, tiny_vmae, monkeypatch, steps, decay
):
    flags = ("--ae", tiny_vmae, "--out", tmp_path, f"--steps {steps}")
    assert f"{resolved(monkeypatch, train_dit, *flags).ema:.6g}" == f"{decay:g}"


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
    short = "warning: the run ends within its warm-up"
    run(train_ae, "--out", tmp_path / "a", TINY_VIT, SMALL, "--steps 1")
    text = capsys.readouterr().out
    for words in (
        *("demo settings", "mask_ratio 0.6", "lpips 0", short),
        "4,500 images of 10 classes (0, 1, 2, 3, 4, ...) in the bundled digits",
        "1 steps of 16 images, 16 at once",
        # 16e-3 at batch 256; an epoch, 282 steps, of warm-up
        "learning rate up to 0.001 after 282 steps of warm-up",
        *("parameters", "MiB", "step 1/1", "visible", "masked", "kl", "lr", "grad_norm"),
        *("skipped 0", "images/s", "left"),
    ):
        assert words in text
    assert "--compile" not in text
    run(train_dit, *latents_of(tiny_vmae), "--out", tmp_path / "d", "--steps 1 --sample_steps 1")
    text = capsys.readouterr().out
    assert "learning rate up to 0.003 after 0 steps of warm-up" in text and short not in text
    few = f"{TINY_VIT} --image_size 32 --lpips 0 --workers 0 --batch 4 --warmup 0.01 --steps 1"
    run(train_ae, "--data", folder, "--out", tmp_path / "b", few)
    text = capsys.readouterr().out
    assert "paper settings" in text and short not in text
    assert f"120 images of 3 classes (ants, bees, cats) in {folder}" in text


def test_a_picture_that_is_not_finite_leaves_the_checkpoint_before_it(
    tmp_path, tiny_vmae, tiny_dit
):
    for module, ckpt, flags in (
        (train_ae, tiny_vmae, (TINY_VIT, "--steps 20 --schedule constant")),
        (train_dit, tiny_dit, (SMALL, "--steps 8 --sample_steps 4 --schedule constant")),
    ):
        out = tmp_path / module.__name__
        shutil.copytree(ckpt.parent, out)
        saved = read(out / "ckpt.pt")
        saved["args"]["schedule"] = "constant"
        torch.save(saved, out / "ckpt.pt")
        rate = "--base_lr 1e36" if module is train_ae else "--lr 1e36"
        before = (out / "ckpt.pt").read_bytes()
        longer = saved["step"] + 2
        message = fails(module, "--out", out, *flags, rate, f"--steps {longer} --resume")
        assert "a picture has pixels that are not finite" in message
        assert log_of(out)[-1]["step"] == longer and (out / "ckpt.pt").read_bytes() == before


def test_tensorboard_gets_what_is_in_the_log_and_the_pictures(tmp_path, tiny_vmae, monkeypatch):
    scalars, images, begun = {}, {}, []

    class Writer:
        def __init__(self, folder, purge_step):
            self.folder = folder
            begun.append(purge_step)

        def add_scalar(self, name, value, step):
            scalars[self.folder, step, name] = value

        def add_image(self, name, pixels, step, dataformats):
            assert dataformats == "HWC"
            images[self.folder, step, name] = pixels

    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    few, a, d = (SMALL, "--tensorboard --schedule constant --steps"), tmp_path / "a", tmp_path / "d"
    run(train_ae, "--out", a, TINY_VIT, *few, 2)
    run(train_ae, "--out", a, TINY_VIT, *few, 3, "--resume")
    few = ("--sample_steps 1 --keep_every 2", *few)
    run(train_dit, "--out", d, *latents_of(tiny_vmae), *few, 3)
    assert begun == [1, 3, 1]  # what was logged after the checkpoint is not shown
    assert scalars == {
        (f"{out}/tensorboard", line["step"], name): value
        for out in (a, d)
        for line in log_of(out)
        for name, value in line.items()
        if name not in ("step", "seconds_left")
    }
    names = ((a, "recon.png"), (d, "samples.png"))
    assert list(images) == [(f"{out}/tensorboard", k, name) for out, name in names for k in (2, 3)]
    for out, name in names:
        shown = images[f"{out}/tensorboard", 3, name]
        assert np.array_equal(shown, np.asarray(Image.open(out / name)))


def test_without_tensorboard_its_flag_ends_the_run_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    flags = ("--out", tmp_path, TINY_VIT, "--steps 1")
    with pytest.raises(ImportError, match="tensorboard"):
        run(train_ae, *flags, "--tensorboard")
    assert not (tmp_path / "log.jsonl").exists()
    run(train_ae, *flags)


def test_pictures_have_a_row_for_each_thing_shown(tiny_vmae, tiny_dit):
    # A digit is shown at 64 pixels. The rows: original, reconstruction, masked input, prediction
    assert size_of(tiny_vmae.parent / "recon.png")[1] // 66 == 4
    assert size_of(tiny_dit.parent / "samples.png")[1] // 66 == 10


# ---- images ----


def test_center_crop_is_adm_s_for_a_known_picture():
    ramp = np.arange(64, dtype=np.uint8)[:, None].repeat(128, 1)
    crop = np.asarray(fid.center_crop(Image.fromarray(ramp).convert("RGB"), 32))
    assert crop.shape == (32, 32, 3)
    # A picture of twice the size is halved once, by averaging
    assert np.array_equal(crop[:, 0, 0], np.round(ramp[:, 0].reshape(32, 2).mean(1) + 1e-9))
    wide = Image.new("RGB", (100, 40))
    wide.putpixel((50, 20), (255, 255, 255))
    # The crop begins at column (100 - 40) // 2
    assert np.asarray(fid.center_crop(wide, 40))[20, 20].tolist() == [255] * 3


def test_class_folders_and_flat_folders(folder):
    images = train_ae.Images(folder)
    assert images.classes == ["ants", "bees", "cats"] and len(images) == 120
    assert images.labels.tolist() == [0] * 40 + [1] * 40 + [2] * 40
    assert images[0].mode == "RGB"
    assert images.path(41) == str(folder / "bees" / "001.png")
    flat = train_ae.Images(folder / "bees")
    assert flat.classes == [""] and len(flat) == 40


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
    nothing = dict.fromkeys(("data", "device", "dtype", "compile", "workers"))
    return argparse.Namespace(**nothing, seed=0, steps=10, **settings)


def test_an_epoch_has_every_image_once_whatever_the_number_of_processes(monkeypatch):
    images = train_ae.Images()
    images.labels = images.labels[:60]

    def keys_of_run(rank, processes, start):
        args = plan(batch=12, micro_batch=3)
        monkeypatch.setattr(train_ae, "rank_and_world", lambda: (rank, processes))
        train_ae.resolve(args, "cpu")
        slices = train_ae.cut_batch(args)
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


def test_a_micro_batch_is_the_largest_divisor_of_a_share_that_is_not_above_the_flag(
    monkeypatch,
):
    for batch, world, micro_batch, found in ((10, 1, 3, 2), (32, 2, 12, 8), (14, 2, 6, 1)):
        args = plan(batch=batch, micro_batch=micro_batch)
        monkeypatch.setattr(train_ae, "rank_and_world", lambda pair=(world - 1, world): pair)
        train_ae.resolve(args, "cpu")
        slices = train_ae.cut_batch(args)
        assert {part.stop - part.start for part in slices} == {args.micro_batch} == {found}
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
@pytest.mark.parametrize("model", ["vae", "sdvae", "vmae", "tune", "dit"])
def test_compiled_training_is_eager_training(tmp_path, model, tiny_vmae):
    module, most, flags = train_ae, 1e-4, (tiny(model), "--seed 1")
    if model == "tune":
        flags = ("--base_lr 16e-3 --tune_decoder --init", tiny_vmae)
    if model == "dit":
        # AdamW divides a gradient by its own size: where that is near zero, rounding alone moves a
        # weight by a share of the learning rate. At the demo's 3e-3 it moved 7 weights of 1.3
        # million by more than 1e-4; at 1e-3 none by more than 1e-6.
        module, most = train_dit, 1e-5
        flags = (*latents_of(tiny_vmae), "--sample_steps 1 --lr 1e-3")
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    run(module, "--out", eager, *flags, SMALL, "--steps 6")
    run(module, "--out", compiled, *flags, SMALL, "--steps 6 --compile 1")
    assert difference(eager, compiled) < most


@pytest.mark.slow
def test_compiled_training_in_two_processes_is_eager_training(tmp_path):
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    flags = f"{TINY_VIT} {SMALL} --steps 6"
    together(2, "train_ae.py", "--out", eager, flags)
    together(2, "train_ae.py", "--out", compiled, flags, "--compile 1")
    assert difference(eager, compiled) < 1e-4


@pytest.mark.slow
def test_without_a_compiler_training_ends_in_its_error_after_lines_that_name_the_flag(tmp_path):
    command, env = launch(1, "train_ae.py", "--out", tmp_path / "out", TINY_VIT, SMALL)
    env |= {"CXX": "no-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command += ["--steps", "1", "--compile", "1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "no-compiler" in done.stderr
    assert "compiled (off: --compile 0)" in done.stdout


@pytest.mark.parametrize("capability, dtype", [((9, 0), "bfloat16"), ((7, 5), "float32")])
def test_a_gpu_s_defaults_are_what_it_can_do(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    for device, *expected in (("cuda:0", "cuda", dtype, 1), ("cpu", "cpu", "float32", 0)):
        args = plan(batch=4, micro_batch=4)
        train_ae.resolve(args, device)
        assert [args.device, args.dtype, args.compile] == expected


def test_the_next_image_takes_the_place_of_an_unreadable_one_and_a_hundred_end_the_run(
    folder, tmp_path, capfd
):
    images = tmp_path / "images"
    shutil.copytree(folder, images)
    files = sorted(file for file in images.rglob("*.*") if file.is_file())
    files[119].write_bytes(b"not an image")
    numbers = train_ae.Batches(train_ae.Images(images), lambda _, index, *rest: torch.tensor(index))
    for _ in range(2):
        found, labels = numbers[[(118, 0, False), (119, 0, False), (1, 0, False)]]
        assert found.tolist() == [118, 0, 1] and labels.tolist() == [2, 0, 0]
    assert capfd.readouterr().err.count("warning") == 1

    # Each step has every image once
    flags = ("--data", images, TINY_VIT, "--image_size 32 --lpips 0 --batch 120 --steps 2")
    run(train_ae, "--out", tmp_path / "a", *flags, "--log_every 1 --workers 1")
    warning = f"replaced by the next image: {files[119]} cannot be read"
    assert capfd.readouterr().err.count(warning) == 1

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
    # Rank 1's second shard of five is half written
    if "KILL" in os.environ and "labels-00003" in file.name:
        os._exit(1)
np.save = deadly
train_dit.main()
""")
    monkeypatch.setattr(train_dit, "SHARD", 25)
    small = "--model DiT-demo/1 --steps 6 --sample_steps 1 --micro_batch 8"
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
        if name == "killed-cache":  # it keeps the half of a file
            others = [file for file in others if file.suffix != ".tmp"]
        assert [file.name for file in others] == [file.name for file in files]
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(others, files))


def test_the_cache_holds_the_moments_of_each_image_and_its_flip(
    tmp_path, tiny_vmae, folder, monkeypatch
):
    monkeypatch.setattr(train_dit, "SHARD", 50)  # three shards
    cache, first, second = (
        tmp_path / name for name in ("cache", "cache/moments-00000.npy", "cache/moments-00001.npy")
    )
    small = "--model DiT-demo/1 --steps 1 --sample_steps 1 --image_size 32"
    flags = ("--data", folder, "--ae", tiny_vmae, "--cache", cache, SMALL, small, "--workers 0")
    run(train_dit, "--out", tmp_path / "a", *flags)
    images, autoencoder = train_ae.Images(folder), ae.load(tiny_vmae)
    for index in (0, 49, 50, 119):
        for flip in (False, True):
            crop = np.asarray(fid.center_crop(images[index], 32))
            crop = (crop[:, ::-1] if flip else crop).copy()
            x = torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 127.5 - 1
            expected = autoencoder.encode(x)
            moments, labels = train_dit.Cache(cache)[[(index, 0, flip)]]
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

    # The same images elsewhere are the same images, but not once one of them has another size
    # (that of a hundred is looked at, the first is one of them) or another name
    moved = tmp_path / "elsewhere" / "."
    shutil.copytree(folder, moved)
    run(train_dit, "--out", tmp_path / "e", *flags, "--data", moved)
    image = moved / "ants" / "000.jpg"
    Image.new("RGB", (40, 40)).save(image)
    flags = (*flags, "--data", moved)
    assert "its sizes is" in fails(train_dit, "--out", tmp_path / "f", *flags)
    shutil.copy(folder / "ants" / "000.jpg", image)
    image.rename(moved / "ants" / "000 b.jpg")
    assert "its names is" in fails(train_dit, "--out", tmp_path / "f", *flags)
    image.with_name("000 b.jpg").rename(image)

    # A record of other names than today's is compared in those that both have
    record = json.loads((cache / "settings.json").read_text())
    assert record.pop("sizes") and record["format"] == 2
    (cache / "settings.json").write_text(json.dumps(record | {"of long ago": 1}))
    run(train_dit, "--out", tmp_path / "f", *flags)

    # A shard that was cut off is no shard
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="mmap length is greater than file size"):
        run(train_dit, "--out", tmp_path / "g", *flags)


def test_a_cache_of_another_size_is_refused(tmp_path, folder):
    flags = ("--data", folder, "--workers 0 --batch 8 --steps 1")
    run(train_ae, "--out", tmp_path / "ae", *flags, "--model ae --image_size 24", TINY_CONV)
    small = ("--cache", tmp_path / "cache", "--model DiT-demo/1 --sample_steps 1")
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
    run(train_ae, "--out", tmp_path, TINY_VIT, SMALL, "--steps 2 --ckpt_every 1")
    assert 16 / log_of(tmp_path)[-1]["images_per_s"] < 2


def test_photographs_are_flipped_and_digits_are_not(folder):
    def flips(images):
        args = plan(batch=12, micro_batch=12)
        steps = train_ae.training_order(args, images, [slice(0, 12)], 1)
        return [flip for keys in steps for _, _, flip in keys]

    assert not any(flips(train_ae.Images()))
    assert 40 < sum(flips(train_ae.Images(folder))) < 80  # of 120


def test_no_cache_or_sample_is_put_among_other_files(tmp_path, tiny_vmae, tiny_dit, folder):
    before = sorted(folder.iterdir()), tiny_vmae.read_bytes()
    start = ("--steps 1 --sample_steps 1 --ae", tiny_vmae, "--out")
    message = fails(train_dit, *start, tmp_path / "a", "--cache", folder)
    assert "holds other files" in message
    with pytest.raises(FileExistsError, match=str(tiny_vmae)):
        run(train_dit, *start, tmp_path / "b", "--cache", tiny_vmae)
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
    assert f"{tiny_dit}, which has 10 of these 10 classes by name" in capsys.readouterr().out
    old, new = read(tiny_dit), read(tmp_path / "ckpt.pt")
    for key, value in old["ema"].items():
        assert torch.equal(new["model"][key], value) and torch.equal(new["ema"][key], value), key
    for key, value in old["autoencoder"]["model"].items():
        assert torch.equal(new["autoencoder"]["model"][key], value)
    for name in ("latent_mean", "latent_std"):
        assert torch.equal(new[name], old[name])


def test_a_class_keeps_the_embedding_of_its_name_in_either_unicode_form_and_others_get_new_ones(
    tmp_path, tiny_dit, folder, capsys
):
    # macOS writes an accent as a letter of its own (NFD), Linux does not (NFC)
    composed, apart = (unicodedata.normalize(form, "bées cäts") for form in ("NFC", "NFD"))
    bees, cats = composed.split()
    shutil.copytree(folder, tmp_path / "images")
    (tmp_path / "images" / "bees").rename(tmp_path / "images" / apart.split()[0])
    (tmp_path / "images" / "cats").rename(tmp_path / "images" / cats)
    named, ckpt = tmp_path / "named.pt", read(tiny_dit)
    torch.save(ckpt | {"class_names": [cats, "dogs", bees, *"3456789"]}, named)
    flags = ("--data", tmp_path / "images", SMALL, "--workers 0 --steps 1 --lr 0 --sample_steps 2")
    run(train_dit, "--out", tmp_path / "out", "--init", named, *flags)
    assert "which has 2 of these 3 classes by name" in capsys.readouterr().out
    state = read(tmp_path / "out" / "ckpt.pt")
    assert state["class_names"] == ["ants", bees, cats]
    old, new = ckpt["ema"], state["model"]
    assert torch.equal(new[TABLE][1:], old[TABLE][[2, 0, 10]])  # bees, cats, the null class
    assert not (new[TABLE][0] == old[TABLE]).all(1).any()  # ants
    assert all(torch.equal(new[key], old[key]) for key in old if key != TABLE)


def test_without_dropped_labels_there_is_no_guidance_and_fine_tuning_keeps_the_classes(
    tmp_path, tiny_dit
):
    flags = (SMALL, "--steps 1 --lr 0 --sample_steps 1 --class_dropout 0")
    run(train_dit, "--out", tmp_path, "--init", tiny_dit, *flags)
    ckpt = tmp_path / "ckpt.pt"
    old, new = read(tiny_dit)["ema"][TABLE], read(ckpt)
    assert torch.equal(new["model"][TABLE], old[:10])
    assert new["sampling"] == train_dit.DEMO_SAMPLING | {"steps": 1, "cfg_scale": 1.0}
    run(sample, "--ckpt", ckpt, "--columns 1")
    message = fails(sample, "--ckpt", ckpt, "--columns 1 --cfg_scale 3 --cfg_start 0")
    assert "guidance needs several classes and labels dropped" in message


def test_fine_tuning_takes_the_sizes_of_the_file_and_refuses_others(
    tmp_path, tiny_vmae, tiny_dit, capsys
):
    few, latents = (SMALL, "--steps 1 --sample_steps 1"), latents_of(tiny_vmae)
    run(train_dit, "--out", tmp_path / "a", *latents, *few, "--qk_norm 0")
    run(
        train_dit, "--out", tmp_path / "b", "--init", tmp_path / "a" / "ckpt.pt", *few, *latents[2:]
    )
    assert read(tmp_path / "b" / "ckpt.pt")["args"]["qk_norm"] == 0
    out = ("--out", tmp_path / "out")
    for flag in ("--qk_norm 0", "--model DiT-S/2", "--image_size 64"):
        assert f"{flag}: {tiny_dit} has" in fails(train_dit, *out, "--init", tiny_dit, flag)

    # LightningDiT's files name neither their sizes nor their classes
    theirs = tmp_path / "lightning.pt"
    torch.save({"ema": read(tiny_dit)["ema"]}, theirs)
    start = (*out, "--init", theirs, *few, "--lr 0")
    with pytest.raises(RuntimeError, match="Unexpected key.*q_norm"):
        run(train_dit, *start, "--ae", tiny_vmae, "--qk_norm 0")
    run(train_ae, "--out", tmp_path / "four", TINY_VIT, "--latent_dim 4 --steps 1")
    message = fails(train_dit, *start, "--ae", tmp_path / "four" / "ckpt.pt")
    assert "of 16 channels on a grid of 4, here they have 4 on 4" in message
    run(train_dit, *start, *latents)
    assert f"{theirs}, which has 10 of these 10 classes by number" in capsys.readouterr().out
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


def test_a_file_of_statistics_normalises_the_latents_unless_a_std_is_zero(tmp_path, tiny_vmae):
    stats, few = tmp_path / "stats.pt", (SMALL, "--steps 1 --sample_steps 1")
    mean, std = normal(3, 16), normal(4, 16).abs() + 0.1
    flags = (*latents_of(tiny_vmae), "--stats", stats, *few)
    for shape in ((16,), (1, 16, 1, 1)):  # LightningDiT's has the second
        torch.save({"mean": mean.view(shape), "std": std.view(shape)}, stats)
        out = tmp_path / str(len(shape))
        run(train_dit, "--out", out, *flags)
        found = read(out / "ckpt.pt")
        assert torch.equal(found["latent_mean"], mean) and torch.equal(found["latent_std"], std)
    # The loss is that of latents so normalised
    run(train_dit, "--out", tmp_path / "own", *latents_of(tiny_vmae), *few)
    assert log_of(out)[0]["loss"] != log_of(tmp_path / "own")[0]["loss"]

    ckpt = out / "ckpt.pt"
    torch.save({"mean": mean, "std": std * (torch.arange(16) != 5)}, stats)
    assert "not above 0" in fails(train_dit, "--out", tmp_path / "none", *flags)
    assert "not above 0" in fails(sample, "--ckpt", ckpt, "--stats", stats)


def test_latent_statistics_normalise_each_channel(tiny_vmae):
    images, autoencoder = train_ae.Images(None), ae.load(tiny_vmae).requires_grad_(False)
    crop = functools.partial(train_ae.crop_and_flip, 32)
    dataset = train_ae.Batches(images, crop)

    def load_moments(keys):
        for x, labels in train_ae.load_batches(dataset, keys, 0, "cpu"):
            yield train_dit.encode(autoencoder, x), labels

    args = argparse.Namespace(seed=0)
    mean, std = train_dit.latent_statistics(args, images, load_moments, autoencoder)
    x = torch.from_numpy(images.pixels).float()[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
    z = torch.cat([autoencoder.encode(part).sample() for part in x.split(500)])
    assert mean.shape == std.shape == (16, 1, 1)
    torch.testing.assert_close(mean.flatten(), z.mean((0, 2, 3)), rtol=0.02, atol=0.02)
    torch.testing.assert_close(std.flatten(), z.std((0, 2, 3)), rtol=0.02, atol=0.02)


# ---- sample.py ----


def test_a_dit_checkpoint_is_enough_to_draw_from(tmp_path, tiny_dit, capsys):
    moved, picture = tmp_path / "alone.pt", tmp_path / "samples.png"
    shutil.copy(tiny_dit, moved)
    run(sample, "--ckpt", moved, "--columns 3")
    assert str(picture) in capsys.readouterr().out
    assert size_of(picture)[1] // 66 == 10
    run(sample, "--ckpt", moved, "--labels 7 3 --columns 3")
    assert size_of(picture)[1] // 66 == 2


def test_sampling_takes_the_settings_of_the_file_old_or_new_and_flags_override_them(
    tmp_path, tiny_vmae, tiny_dit
):
    ckpt = read(tiny_dit)
    assert ckpt["sampling"] == train_dit.DEMO_SAMPLING | {"steps": 4}
    # Each is another than the demo's and the paper's
    other = dict(steps=3, cfg_scale=2.5, cfg_channels=5, cfg_start=0.2, shift=0.4)
    new, old = tmp_path / "new.pt", tmp_path / "old.pt"
    torch.save(ckpt | {"sampling": other}, new)
    # Until 2026-11 they were flags of train_dit.py
    of_args = {name: value for name, value in other.items() if name != "steps"}
    args = ckpt["args"] | of_args | {"sample_steps": other["steps"]}
    del ckpt["sampling"]
    torch.save(ckpt | {"args": args}, old)

    def draw(path, *flags):
        out = tmp_path / f"{path.stem}{len(flags)}"
        run(sample, "--ckpt", path, "--out", out, "--num 3", *flags)
        record = json.loads((out / "samples" / "settings.json").read_text())
        return {name: record[name] for name in other}, samples_of(out)[0]

    (found, images), (found_old, images_old) = draw(new), draw(old)
    assert found == found_old == other and np.array_equal(images, images_old)
    assert not np.array_equal(images, draw(tiny_dit)[1])
    given = {"steps": 2, "cfg_scale": 1.5, "cfg_channels": 4, "cfg_start": 0.3, "shift": 0.5}
    for path in (new, old):
        words = [f"--{name} {value}" for name, value in given.items()]
        assert draw(path, words[0])[0] == other | {"steps": 2}
        assert draw(path, *words)[0] == given

    # An old run goes on with its own, too
    out = tmp_path / "run"
    out.mkdir()
    ckpt |= {"args": args | {"schedule": "constant"}}
    torch.save(ckpt, out / "ckpt.pt")
    flags = (*latents_of(tiny_vmae), SMALL, "--steps 9 --sample_steps 3 --schedule constant")
    run(train_dit, "--out", out, *flags, "--resume")
    resumed = read(out / "ckpt.pt")
    assert resumed["step"] == 9 and resumed["sampling"] == other


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
    assert state["sampling"] == dit.SAMPLING | {"steps": 2, "cfg_scale": 1.0}
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
    assert "stopped" in fails(sample, "--out", cut, *flags, "--num 30")
    kept = {file: file.stat().st_mtime_ns for file in (cut / "samples").iterdir()}
    assert len(kept) == 16 + 1  # and settings.json
    assert "seed is 0 and not 3" in fails(sample, "--out", cut, *flags, "--num 30 --seed 3")
    others = ("--steps 3", "--cfg_scale 3", "--cfg_channels 3", "--cfg_start 0.3", "--shift 1")
    for other in (*others, "--labels 1", "--per_class", "--dtype float16"):
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


def test_npz_packs_exactly_the_files_in_their_order(tmp_path, tiny_dit, capsys):
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
        # fid.py reads the same (test_fid.py has its order)
        args = argparse.Namespace(half_pixel=1, workers=1, crop=None)
        _, count, batches = fid.open_set(str(out / "samples"), args)
        (batch,) = batches([(0, count)])
        assert sorted(map(bytes, batch.numpy())) == sorted(map(bytes, images))
    assert "samples.npz exists: remove it" in fails(sample, "--out", one, *flags, "--npz")
    assert "go with --num" in usage_error(capsys, sample, "--ckpt", tiny_dit, "--npz")


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


def test_imagenet_s_grid_is_figure_2_and_classes_have_names(tmp_path, tiny_vmae, monkeypatch):
    # An untrained DiT as LightningDiT saves it
    ckpt, stats = tmp_path / "ckpt.pt", tmp_path / "stats.pt"
    torch.save({"ema": dit.DiT(4, 1, 16, 32, 1, 2, 1000).state_dict()}, ckpt)
    torch.save({"mean": torch.zeros(16), "std": torch.ones(16)}, stats)
    flags = ("--ckpt", ckpt, "--ae", tiny_vmae, "--stats", stats, "--steps 1 --columns 2")
    save_grid, found = sample.save_grid, []

    def watched(path, rows, captions):
        found.append(captions)
        save_grid(path, rows, captions)

    monkeypatch.setattr(sample, "save_grid", watched)

    def captions_of_grid(*more):
        run(sample, "--out", tmp_path, *flags, *more)
        return found.pop()

    figure = captions_of_grid()
    # The supplement's captions, but for its capitals
    assert figure == [
        *("Flamingo (130)", "Macaw (88)", "Siberian husky (250)", "Passenger car (705)"),
        *("Mushroom (947)", "Lakeside (975)", "Fig (952)", "Vase (883)"),
    ]
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.height == 8 * 66 and picture.width > 2 * 66 + 100
    words = "--labels 975 'siberian husky' Macaw fig"
    named = ["Lakeside (975)", "Siberian husky (250)", "Macaw (88)", "Fig (952)"]
    assert captions_of_grid(words) == named
    # A file of ours knows the folders
    wnids = ["n01440764", *(f"n{i:08}" for i in range(1, 1000))]
    torch.save(read(ckpt) | {"class_names": wnids}, tmp_path / "ours.pt")
    ours = ("--ckpt", tmp_path / "ours.pt", "--labels n00000088 n01440764 88")
    assert captions_of_grid(*ours) == ["Macaw (88)", "Tench (0)", "Macaw (88)"]

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


def test_a_label_is_an_exact_name_else_a_name_in_other_case_else_a_folder_s_else_a_number():
    flowers = ["lily", "3", "rose", "", "Rose", "tulip"]
    words = ["tulip", "Rose", "rose", "LILY", "3", "5"]
    assert sample.parse_labels(words, flowers, flowers) == [5, 4, 2, 0, 1, 5]
    with pytest.raises(fid.UserError, match=r"ROSE names several .* rose \(2\), Rose \(4\)"):
        sample.parse_labels(["ROSE"], flowers, flowers)
    for word in ("6", "-1", "1.5", "violet"):
        with pytest.raises(fid.UserError, match="none of the model's classes, 0 to 5: lily, 3"):
            sample.parse_labels([word], flowers, flowers)
    # ImageNet's folders have names of their own
    wnids = ["n01440764", "n01443537"]
    words = ["n01443537", "tench", "1"]
    assert sample.parse_labels(words, ["Tench", "Goldfish"], wnids) == [1, 0, 1]
    # Accents are typed in two ways; Images has one for the names of classes
    names = ["ants", unicodedata.normalize("NFC", "bées")]
    for form in ("NFC", "NFD"):
        assert sample.parse_labels([unicodedata.normalize(form, "bées")], names, names) == [1]


def test_folders_named_by_other_numbers_than_their_own_are_noted(tmp_path, tiny_dit, capsys):
    names = sorted(map(str, range(1, 11)))  # 1, 10, 2, ...
    torch.save(read(tiny_dit) | {"class_names": names}, tmp_path / "ckpt.pt")
    note, few = "note: files are named by the number of a class", "--num 1 --steps 1"
    run(sample, "--ckpt", tiny_dit, "--out", tmp_path / "digits", few)
    assert note not in capsys.readouterr().out
    run(sample, "--ckpt", tmp_path / "ckpt.pt", few, "--labels 10")
    said = capsys.readouterr().out
    assert note in said and "0 is the class 1, see settings.json" in said
    assert samples_of(tmp_path)[1].tolist() == [1]
    record = json.loads((tmp_path / "samples" / "settings.json").read_text())
    assert record["class_names"] == names


def test_16_bits_round_the_products_of_the_dit_and_nothing_else(tmp_path, tiny_dit, monkeypatch):
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
    for dtype in (float32, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        flags = () if dtype == float32 else ("--dtype", name)
        seen.clear()
        run(sample, "--out", tmp_path / name, "--ckpt", tiny_dit, *flags, "--num 6")
        assert seen == {("dit", float32, dtype), ("decoder", float32, float32)}
        images[name] = samples_of(tmp_path / name)[0].astype(int)
    coarse, fine = (
        np.abs(images["float32"] - images[name]).mean() for name in ("bfloat16", "float16")
    )
    assert 0 < fine < coarse < 1


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
    # Lines are broken at spaces and at hyphens
    texts = (re.sub(r"(?<=\w-) ", "", " ".join(said.split())) for said in parts[1::2])
    return dict(zip(parts[::2], texts))


@pytest.mark.parametrize("data", ["", "--data pictures"])
@pytest.mark.parametrize("model", [*ae.MODELS, "tune"])
def test_help_has_the_defaults_of_the_recipe_and_no_flag_of_another_model(model, data, capsys):
    network = "vmae" if model == "tune" else model
    said = help_of(capsys, train_ae, "--model", network, data, "--tune_decoder" * (model == "tune"))
    recipe, demo = train_ae.RECIPES[model]
    settings = ae.settings_of(ae.MODELS[network]) | recipe
    for name, value in (settings | ({} if data else demo)).items():
        value = list(value) if isinstance(value, tuple) else value
        assert f"(default: {value})" in said[name], name
    others = set().union(*map(ae.settings_of, ae.MODELS.values()), train_ae.SDVAE)
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


def test_each_edit_that_a_new_autoencoder_lacks_is_missed_loudly(tmp_path, monkeypatch, capsys):
    """Its name in MODELS, its recipe (with the demo's part), a line for each flag; test_ae.py has a
    setting without a default."""
    flags = ("--out", tmp_path, "--model tone", TINY_CONV, SMALL, "--steps 1")
    assert "invalid choice: 'tone'" in usage_error(capsys, train_ae, *flags)
    monkeypatch.setitem(ae.MODELS, "tone", ToneAE)
    with pytest.raises(KeyError, match="tone"):
        run(train_ae, *flags)
    monkeypatch.setitem(train_ae.RECIPES, "tone", train_ae.RECIPES["ae"])
    with pytest.raises(AssertionError, match="settings without a flag: {'gamma'}"):
        run(train_ae, *flags)

    def with_its_flag(parser):
        add_run_flags(parser)
        parser.add_argument("--gamma", type=fid.number(float, 1), help="power of the tone")

    add_run_flags = train_ae.add_run_flags
    monkeypatch.setattr(train_ae, "add_run_flags", with_its_flag)
    run(train_ae, *flags, "--gamma 3")
    loaded = ae.load(tmp_path / "ckpt.pt")
    assert type(loaded) is ToneAE and loaded.gamma == loaded.args["gamma"] == 3


# ---- wrong input: argparse's error, one sentence and status 1, or Python's own error ----


def test_wrong_flags_of_train_ae_get_argparse_s_error(tiny_vmae, capsys):
    for words, flags in (
        ("argument --steps: invalid int value: 'many'", "--steps many"),
        ("not allowed with", "--steps 5 --epochs 1"),
        ("--betas: expected 2 arguments", "--betas 0.9"),
        ("--betas: 1 is not a finite number from 0", "--betas 1 2"),
        ("--compile: expected one argument", "--compile"),
        ("--init: an empty string", "--init ''"),
        ("unrecognized arguments: --mask_ratio 0.5", "--model ae --mask_ratio 0.5"),
        ("unrecognized arguments: --kl 0", "--kl 0 --model mae"),
        ("argument --freeze_encoder", f"--freeze_encoder 2 --tune_decoder --init {tiny_vmae}"),
    ):
        assert words in usage_error(capsys, train_ae, flags)
    for flag in (
        *("steps 0", "batch 0", "epochs nan", "base_lr -1", "base_lr nan", "base_lr inf"),
        *("prior_std 0", "seed -1", "decay_epochs 0"),
    ):
        assert f"argument --{flag.split()[0]}" in usage_error(capsys, train_ae, f"--{flag}")
    for flag in ("lerning_rate 1", "disc_start 3", "recon l1", "freeze_encoder 0", "ckpt a.pt"):
        assert f"unrecognized arguments: --{flag}" in usage_error(capsys, train_ae, f"--{flag}")


def test_mistakes_with_train_ae_get_one_sentence_or_python_s_error(tmp_path):
    empty, mixed = tmp_path / "empty", tmp_path / "mixed"
    empty.mkdir()
    (mixed / "a").mkdir(parents=True)
    for path in (mixed / "1.png", mixed / "a" / "2.png"):
        Image.new("RGB", (40, 40)).save(path)
    for words, *flags in (
        ("has no images", "--data", empty),
        ("both in itself and in sub-folders", "--data", mixed),
        ("multiple of the patch size 8", "--image_size 30"),
        ("multiple of 8 pixels", "--model ae --image_size 30"),
        ("leaves 0 of", "--mask_ratio 0.99"),
        ("leaves 16 of 16", "--model mae --mask_ratio 0"),
        ("30 30 are not multiples of 32", "--model ae --channels 30 30"),
        ("hidden size 30", "--hidden_size 30"),
        ("gpu", "--device gpu"),
        ("discriminator", "--model sdvae --image_size 16"),
    ):
        assert words in fails(train_ae, "--out", tmp_path / "out", *flags)
    nowhere = str(tmp_path / "nowhere")
    for flag in ("--data", "--init"):
        with pytest.raises(FileNotFoundError, match=nowhere):
            run(train_ae, "--out", tmp_path / "out", flag, nowhere)


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


def test_mistakes_with_train_dit_and_sample_get_one_sentence_or_an_error_that_says_enough(
    tmp_path, tiny_vmae, tiny_dit, capsys
):
    out, nothing, stats = tmp_path / "out", tmp_path / "nothing.pt", tmp_path / "stats.pt"
    start = ("--out", out, "--ae", tiny_vmae)
    assert "32 pixels" in fails(train_dit, *start, "--image_size 64")
    for flag in ("--ema 1", "--cosine_loss", "--qk_norm 2", "--class_dropout 2"):
        assert f"argument {flag.split()[0]}" in usage_error(capsys, train_dit, *start, flag)
    for flag in ("--cfg_scale 3", "--cfg_channels 3", "--cfg_start 0", "--shift 1"):
        assert f"unrecognized arguments: {flag}" in usage_error(capsys, train_dit, *start, flag)
    assert [path.name for path in out.iterdir()] == [".lock"]
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file"):
        run(train_dit, "--out", tmp_path / "file", "--ae", tiny_vmae)

    start = ("--ckpt", tiny_dit)
    for flag in ("columns", "batch", "num", "steps", "shift", "cfg_scale"):
        assert f"argument --{flag}" in usage_error(capsys, sample, *start, f"--{flag} 0")
    for words in ("--seed -1", "--labels ''", "--dtype float64"):
        assert f"argument {words.split()[0]}" in usage_error(capsys, sample, *start, words)
    torch.save({"mean": torch.zeros(3), "std": torch.ones(3)}, stats)
    message = fails(sample, *start, "--stats", stats)
    assert "do not fit" in message and "--ae, --stats" in message
    torch.save({"mean": [0.0] * 16, "std": [1.0] * 16}, stats)
    assert "holds no tensors mean and std" in fails(sample, *start, "--stats", stats)
    for module, *flags in (
        (train_dit, "--out", out, "--ae", nothing),
        (train_dit, "--out", out, "--init", nothing),
        (train_dit, "--out", out, "--ae", tiny_vmae, "--stats", nothing),
        (sample, "--ckpt", nothing),
        (sample, *start, "--ae", nothing),
    ):
        with pytest.raises(FileNotFoundError, match=f"no checkpoint file {nothing}"):
            run(module, *flags)


@pytest.mark.parametrize("model", ["vmae", pytest.param("sdvae", marks=pytest.mark.slow)])
def test_training_with_lpips_logs_it_and_a_finished_run_does_not_load_it(
    tmp_path, model, monkeypatch
):
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
    monkeypatch.setattr(ae, "lpips_vgg", None)
    run(train_ae, "--out", out, tiny(model), few, f"--lpips {weight} --resume")


@pytest.mark.parametrize("model, size", [("vmae", 24), ("vmae", 136), ("ae", 40)])
def test_any_size_that_8_divides_goes_through_both_stages_and_sampling(
    tmp_path, folder, model, size
):
    """From small, non-square images; 24 pixels give 3 x 3 latents."""
    ckpt, out = tmp_path / "ckpt.pt", tmp_path / "dit"
    data = ("--data", folder, f"--image_size {size} --workers 0 --batch 2 --steps 1")
    sizes = "--channels 32 32 32 32" if model == "ae" else TINY_VIT
    run(train_ae, "--out", tmp_path, *data, f"--model {model} {sizes} --lpips 0")
    few = "--model DiT-demo/1 --sample_steps 1"
    run(train_dit, "--out", out, "--ae", ckpt, *data, few)
    state = read(out / "ckpt.pt")
    net = dit.load(out / "ckpt.pt")[0]
    assert (net.in_channels, net.grid) == (16, size // 8)
    assert "bees" in state["class_names"]
    run(sample, "--ckpt", out / "ckpt.pt", "--labels 1 --columns 2")
    with Image.open(out / "samples.png") as picture:
        assert picture.height >= size
