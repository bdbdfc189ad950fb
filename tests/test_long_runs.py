"""Long runs: exact resume, checkpoints, Ctrl-C, steps that are not finite, odd files."""

import functools
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import time
import traceback
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
    read,
    run,
    tiny,
    together,
    without_times,
)
from PIL import Image

import ae
import dit
import fid
import sample
import train_ae
import train_dit

SMALL = "--batch 16 --log_every 1"
DIT = f"{SMALL} --sample_steps 2"


def start(processes, script, *flags):
    """Start a script on the CPU, in a process group of its own."""
    command, env = launch(processes, script, *flags)
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def wait_for(out, lines, process):
    """Wait until this many steps are logged; fails if the run ends before that."""
    log, deadline = Path(out) / "log.jsonl", time.time() + 120
    while not log.exists() or log.read_text().count("\n") < lines:
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.002)


def same(a, b):
    """True if nested dicts, lists and tensors are equal, bit by bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def content(path):
    """What a checkpoint holds but for the settings, of which some may differ."""
    ckpt = read(path)
    for part in (ckpt, ckpt.get("autoencoder", ckpt)):
        part.pop("args", None)
    return ckpt


# ---- exact resume ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, processes", [("vmae", 1), ("vmae", 2), ("sdvae", 2), ("dit", 1), ("dit", 2)]
)
def test_runs_killed_at_random_steps_end_in_the_same_bits(tmp_path, model, processes, tiny_vmae):
    """The same command begins the run and goes on with it after each of 17 kills in all."""
    if model == "dit":
        command = ("train_dit.py", DIT, "--ckpt_every 3 --steps 40 --resume --ae", tiny_vmae)
    else:
        settings = "--batch 8 --ckpt_every 2 --schedule constant --warmup 0 --steps 40 --resume"
        command = ("train_ae.py", tiny(model), SMALL, settings)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    together(processes, *command, "--out", whole)
    rng, done = random.Random(processes), 0
    for _ in range(4 if model == "dit" else 3):
        process = start(processes, *command, "--out", killed)
        wait_for(killed, min(39, done + rng.randint(1, 9)), process)
        time.sleep(rng.random() * 0.02)
        # SIGKILL would end torchrun alone: its processes have sessions of their own. It hands on
        # SIGTERM, which ends them as abruptly
        os.killpg(process.pid, signal.SIGKILL if processes == 1 else signal.SIGTERM)
        process.communicate()
        done = len(log_of(killed))
        assert done < 40
    together(processes, *command, "--out", killed)
    assert same(content(whole / "ckpt.pt"), content(killed / "ckpt.pt"))
    assert without_times(whole) == without_times(killed) and len(without_times(whole)) == 40


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes_to_rounding(tmp_path):
    flags = f"{TINY_VIT} {SMALL} --schedule constant"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(train_ae, "--out", whole, flags, "--steps 6")
    together(2, "train_ae.py", "--out", cut, flags, "--steps 3")
    run(train_ae, "--out", cut, flags, "--resume --steps 6")
    assert difference(whole, cut) < 1e-5
    assert [line["step"] for line in log_of(cut)] == [1, 2, 3, 4, 5, 6]


# ---- checkpoints ----


def test_without_a_good_checkpoint_a_sentence_says_so_and_a_numbered_one_goes_on(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ckpt, numbered = cut / "ckpt.pt", cut / "ckpt-0000002.pt"
    flags = f"{TINY_VIT} {SMALL} --schedule constant --keep_every 2"
    run(train_ae, "--out", whole, flags, "--steps 6")
    run(train_ae, "--out", cut, flags, "--steps 3")
    again = ("--out", cut, flags, "--resume --steps 6")
    log, data = (cut / "log.jsonl").read_bytes(), ckpt.read_bytes()
    half = len(data) // 2
    # A byte inside a tensor: the file still opens
    flipped = data[:half] + bytes([data[half] ^ 255]) + data[half + 1 :]
    for damaged in (data[:half], b"", flipped):
        ckpt.write_bytes(damaged)
        assert f"{ckpt} cannot be read" in fails(train_ae, *again)
    ckpt.unlink()
    missing = f"{cut} has no ckpt.pt: to go on from {numbered.name}, copy it to ckpt.pt"
    assert missing in fails(train_ae, *again)
    assert (cut / "log.jsonl").read_bytes() == log
    shutil.copy(numbered, ckpt)
    run(train_ae, *again)
    assert same(content(whole / "ckpt.pt"), content(ckpt))
    assert without_times(whole) == without_times(cut)


def test_no_room_for_a_checkpoint_costs_the_new_one_alone(tmp_path):
    """A limit on the size of files stands in for a full disk."""
    ckpt, flags = tmp_path / "ckpt.pt", f"{TINY_VIT} {SMALL} --schedule constant"
    run(train_ae, "--out", tmp_path, flags, "--steps 2")
    before, limit = ckpt.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        more = "--resume --steps 4 --ckpt_every 1"
        with pytest.raises((OSError, RuntimeError)) as error:
            run(train_ae, "--out", tmp_path, flags, more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "File too large" in "".join(traceback.format_exception(error.value))
    assert ckpt.read_bytes() == before and not list(tmp_path.glob("*.tmp"))
    run(train_ae, "--out", tmp_path, flags, "--resume --steps 4")
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4]


# ---- Ctrl-C ----


@pytest.mark.parametrize(
    "processes, attempts",
    [
        (1, 1),
        pytest.param(1, 8, marks=pytest.mark.slow),
        pytest.param(2, 2, marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_is_one_line_and_no_process_is_left(tmp_path, processes, attempts):
    """The whole process group gets it, as from a terminal; loader processes go with the script."""
    settings = "--ckpt_every 2 --steps 1000000 --workers 2 --schedule constant --resume"
    flags = f"{TINY_VIT} {SMALL} {settings}"
    for attempt in range(attempts):
        process, done = start(processes, "train_ae.py", "--out", tmp_path, flags), 0
        if attempt:
            done = len(log_of(tmp_path))
        wait_for(tmp_path, done + 5, process)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 1
        # Each process says it. torchrun, which ends with a traceback, may be faster than some
        said = stderr.count("stopped; a training run goes on with --resume\n")
        assert 1 <= said <= processes
        assert processes > 1 or said == len(stderr.splitlines()), stderr
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
        step = read(tmp_path / "ckpt.pt")["step"]
    run(train_ae, "--out", tmp_path, flags, f"--steps {step + 2} --workers 0")
    assert log_of(tmp_path)[-1]["step"] == step + 2


# ---- the end of a run of several processes ----


@pytest.mark.slow
def test_processes_that_leave_each_other_do_not_hang(tmp_path):
    """With PyTorch 2.4, a barrier and destroy_process_group alone hang within ten times."""
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import faulthandler, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import torch.distributed as dist
import fid
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
file = dist.FileStore({str(tmp_path / "store")!r}, world)
for i in range(300):
    faulthandler.dump_traceback_later(60, exit=True)  # how a hang ends
    store = dist.PrefixStore(str(i), file)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    # Not waited for, so that gloo's threads are still busy with them
    for _ in range(4):
        dist.all_reduce(torch.ones(1), async_op=True)
    fid.leave_processes()
if rank == 0:
    print("left", i + 1, "times")
""")
    assert "left 300 times" in together(2, driver)


# ---- steps: not finite ones, gradients, what the log says ----


def poison(monkeypatch, factors):
    """Multiply VMAE's loss in some forward passes: {number of the pass, from 1: factor}."""
    forward, count = ae.VMAE.forward, [0]

    def poisoned(self, *args, **kwargs):
        loss, terms, x_hat = forward(self, *args, **kwargs)
        count[0] += 1
        return loss * factors.get(count[0], 1), terms, x_hat

    monkeypatch.setattr(ae.VMAE, "forward", poisoned)


def changed_at(out, step):
    """The parts of a numbered checkpoint that differ from those of the step before."""
    before, after = (content(out / f"ckpt-{s:07}.pt") for s in (step - 1, step))
    return {key for key in after if not same(before[key], after[key])}


def test_a_step_that_is_not_finite_changes_nothing(tmp_path, monkeypatch):
    flags = f"{TINY_VIT} {SMALL} --schedule constant --warmup 0 --keep_every 1"
    # One micro-batch of two is enough, and so is a norm that overflows
    poison(monkeypatch, {8: math.nan, 10: math.inf, 11: 1e30})
    run(train_ae, "--out", tmp_path, flags, "--steps 4 --micro_batch 8")
    assert changed_at(tmp_path, 3) == {"model", "optimizer", "step"}
    assert changed_at(tmp_path, 4) == {"step"}
    run(train_ae, "--out", tmp_path, flags, "--resume --steps 7")
    assert [line["skipped"] for line in log_of(tmp_path)] == [0, 0, 0, 1, 0, 1, 1]
    assert changed_at(tmp_path, 5) == {"model", "optimizer", "step"}
    assert changed_at(tmp_path, 6) == changed_at(tmp_path, 7) == {"step"}


def test_a_dit_step_that_is_not_finite_leaves_the_ema_alone(tmp_path, monkeypatch, tiny_vmae):
    loss, count = dit.flow_loss, [0]

    def poisoned(*args):
        count[0] += 1
        return loss(*args) * (math.nan if count[0] == 4 else 1)

    monkeypatch.setattr(dit, "flow_loss", poisoned)
    flags = f"{DIT} --schedule constant --keep_every 1 --steps 4"
    run(train_dit, *latents_of(tiny_vmae), "--out", tmp_path, flags)
    assert changed_at(tmp_path, 3) == {"model", "ema", "optimizer", "step"}
    assert changed_at(tmp_path, 4) == {"step"}
    assert [line["skipped"] for line in log_of(tmp_path)] == [0, 0, 0, 1]


@pytest.mark.parametrize("where", ["loss", "reconstruction", "discriminator"])
def test_neither_of_sdvae_s_players_moves_whichever_is_not_finite(tmp_path, monkeypatch, where):
    forward, disc_loss, count = ae.SDVAE.forward, ae.disc_loss, [0]

    def poisoned(self, *args, **kwargs):
        loss, terms, x_hat = forward(self, *args, **kwargs)
        count[0] += 1
        nan = math.nan if count[0] == 3 else 1
        loss = loss * nan if where == "loss" else loss
        return loss, terms, x_hat * nan if where == "reconstruction" else x_hat

    def poisoned_disc(*args):
        nan = math.nan if count[0] == 3 and where == "discriminator" else 1
        return disc_loss(*args) * nan

    monkeypatch.setattr(ae.SDVAE, "forward", poisoned)
    monkeypatch.setattr(ae, "disc_loss", poisoned_disc)
    flags = f"--model sdvae {TINY_CONV} --disc_start 2 --schedule constant --warmup 0"
    few = "--batch 4 --log_every 1 --keep_every 1 --steps 3"
    run(train_ae, "--out", tmp_path, flags, few)
    players = {"model", "optimizer", "disc", "disc_optimizer"}
    assert changed_at(tmp_path, 2) == {*players, "step"} and changed_at(tmp_path, 3) == {"step"}
    assert [line["skipped"] for line in log_of(tmp_path)] == [0, 0, 1]


@pytest.mark.slow
def test_processes_skip_together_and_log_the_finite_values(tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import ae, train_ae
forward, count = ae.VMAE.forward, [0]
def poisoned(self, *args, **kwargs):
    loss, terms, x_hat = forward(self, *args, **kwargs)
    count[0] += 1
    return loss * (float("inf") if count[0] == 3 and os.environ["RANK"] == "1" else 1), terms, x_hat
ae.VMAE.forward = poisoned
train_ae.main()
""")
    out = tmp_path / "out"
    flags = f"{TINY_VIT} {SMALL} --schedule constant --warmup 0 --keep_every 1 --steps 3"
    together(2, driver, "--out", out, flags)
    assert changed_at(out, 2) == {"model", "optimizer", "step"} and changed_at(out, 3) == {"step"}
    lines = log_of(out)
    assert [line["skipped"] for line in lines] == [0, 0, 1]
    assert lines[2]["loss"] is not None and lines[2]["grad_norm"] is None


def test_twenty_in_a_row_stop_the_run_with_the_last_good_checkpoint_intact(tmp_path, monkeypatch):
    poison(monkeypatch, dict.fromkeys([3, *range(5, 100)], math.nan))
    flags = f"{TINY_VIT} {SMALL} --ckpt_every 4 --schedule constant --warmup 0"
    message = fails(train_ae, "--out", tmp_path, flags, "--steps 60")
    assert "20 steps in a row" in message and "--grad_clip" in message and "--resume" in message
    assert log_of(tmp_path)[-1]["step"] == 24
    assert all(value.isfinite().all() for value in read(tmp_path / "ckpt.pt")["model"].values())
    monkeypatch.undo()
    run(train_ae, "--out", tmp_path, flags, "--resume --steps 22 --base_lr 1e-3 --grad_clip 1")
    last = log_of(tmp_path)[-1]
    assert last["step"] == 22 and last["skipped"] == 0 and last["lr"] == 1e-3 * 16 / 256


def test_the_gradient_norm_is_that_of_all_gradients_and_clipping_scales_them(
    tmp_path, tiny_vmae, monkeypatch
):
    gradients = []

    def recording(optimizer, lr, skip):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        optimizer.zero_grad()

    monkeypatch.setattr(train_ae, "update", recording)
    latents = latents_of(tiny_vmae)
    for name, *command in (
        ("vmae", train_ae, TINY_VIT, SMALL, "--micro_batch 4 --steps 1"),
        ("dit", train_dit, DIT, "--micro_batch 4 --steps 1", *latents),
    ):
        run(*command, "--out", tmp_path / name)
        whole, norm = gradients[-1], gradients[-1].norm().item()
        for clip, scale in ((norm / 4, 1 / 4), (norm * 4, 1)):
            out = tmp_path / f"{name}-{scale}"
            run(*command, "--out", out, f"--grad_clip {clip}")
            torch.testing.assert_close(gradients[-1], scale * whole, rtol=1e-4, atol=1e-7)
            # What is logged is the norm before clipping
            assert abs(log_of(out)[-1]["grad_norm"] - norm) < 1e-5 * norm


@pytest.mark.parametrize("model", ["vmae", pytest.param("sdvae", marks=pytest.mark.slow)])
def test_the_log_says_means_since_its_last_line(tmp_path, monkeypatch, model):
    """One step of VMAE is not finite; SD-VAE's adversarial terms begin at the third."""
    flags = f"{tiny(model)} --batch 4 --micro_batch 2 --warmup 0 --steps 8"
    for name, every in (("each", 1), ("means", 3)):
        with monkeypatch.context() as patch:
            # The second micro-batch of step 5
            poison(patch, {10: math.nan})
            run(train_ae, "--out", tmp_path / name, flags, f"--log_every {every}")
    each, means = log_of(tmp_path / "each"), log_of(tmp_path / "means")
    assert [line["step"] for line in means] == [1, 3, 6, 8]
    adversarial = {"adv", "disc", "adaptive", "real", "fake"}
    for line in each:
        begun = model == "sdvae" and line["step"] >= 3
        assert adversarial & line.keys() == (adversarial if begun else set())
    assert sum(line["skipped"] for line in each) == (model == "vmae")
    last = 0
    for line in means:
        steps = each[last : line["step"]]
        last = line["step"]
        assert line["lr"] == steps[-1]["lr"]
        for name in line.keys() - {"step", "lr", "images_per_s", "seconds_left"}:
            found = [step[name] for step in steps if step.get(name) is not None]
            expected = np.mean(found)
            if name == "loss" and model == "vmae" and line["step"] == 6:
                # Step 5 has one micro-batch of a finite loss, steps 4 and 6 have two
                expected = np.average(found, weights=[2, 1, 2])
            assert abs(line[name] - expected) < 1e-5 * abs(expected) + 1e-12, (line["step"], name)
        assert {name for step in steps for name in step} == line.keys()


# ---- images ----


@pytest.fixture
def odd_images(tmp_path):
    """An image of each kind, readable or not, in a class folder with a space and an umlaut."""
    root = tmp_path / "pictures" / "größe 1"
    root.mkdir(parents=True)
    ramp = np.linspace(0, 255, 40 * 50).reshape(40, 50)
    grey, rgb = Image.fromarray(ramp.astype(np.uint8)), Image.new("RGB", (50, 40), (200, 100, 50))
    Image.fromarray((ramp * 257).astype(np.uint16)).save(root / "16 bit.png")
    Image.fromarray((ramp * 257).astype(np.uint16)).save(root / "16 bit.tif")
    rgb.quantize(8).save(root / "palette.png", transparency=0)
    rgb.convert("CMYK").save(root / "cmyk.jpg")
    Image.merge("LA", (grey, grey)).save(root / "grey and alpha.png")
    rgb.convert("RGBA").save(root / "alpha.png")
    grey.convert("1").save(root / "bits.png")
    rgb.save(root / "moves.webp", save_all=True, append_images=[grey.convert("RGB")])
    rgb.resize((1, 1)).save(root / "one pixel.png")
    rgb.resize((7, 90)).save(root / "narrow.png")
    Image.new("L", (1, 9000)).save(root / "strip.png")
    rgb.save(root / "日本 ümläut.jpg")
    good = sorted(root.iterdir())
    rgb.save(root / "cut.jpg")
    (root / "cut.jpg").write_bytes((root / "cut.jpg").read_bytes()[:500])
    (root / "empty.png").write_bytes(b"")
    (root / "text.jpg").write_text("a picture of a cat")
    (root / "link.png").symlink_to("nowhere.png")
    # A few kB on disk, but more pixels than Pillow accepts
    Image.new("1", (20000, 10000)).save(root / "huge.png")
    Image.fromarray(ramp.astype(np.float32)).save(root / "32 bit.tif")
    return root, good, sorted(set(root.iterdir()) - set(good))


@pytest.mark.parametrize("workers", [0, 2])
def test_odd_images_are_read_or_skipped_by_name(odd_images, capfd, workers):
    root, good, bad = odd_images
    images = train_ae.Images(str(root.parent))
    show = functools.partial(train_ae.crop_and_flip, 32)
    paths = [Path(images.path(i)) for i in range(len(images))]
    assert sorted(paths) == sorted(good + bad)
    # Two epochs
    keys = [[(i, 0, False)] for i in range(len(images))] * 2
    batches = list(train_ae.load_batches(train_ae.Batches(images, show), keys, workers, "cpu"))
    assert len(batches) == len(keys)
    for i, (x, label) in enumerate(batches):
        assert x.shape == (1, 3, 32, 32) and label == 0
        place = i % len(paths)
        # The next image that can be read takes the place
        while paths[place] in bad:
            place = (place + 1) % len(paths)
        assert torch.equal(x, batches[place][0])
    # The first picture of several, an inverted mode, a name outside of ASCII
    colour = torch.tensor([200, 100, 50]).view(3, 1, 1) / 127.5 - 1
    for name in ("moves.webp", "cmyk.jpg", "日本 ümläut.jpg"):
        assert (batches[paths.index(root / name)][0] - colour).abs().max() <= 6 / 127.5, name
    warned = capfd.readouterr().err
    # Each process says it once
    assert all(1 <= warned.count(f"{path} ") <= max(1, workers) for path in bad)
    assert not any(f"{path} " in warned for path in good)


def test_filling_a_cache_names_the_images_that_it_replaces(odd_images, tmp_path, tiny_vmae, capfd):
    root, good, bad = odd_images
    small = "--model DiT-demo/1 --workers 1 --batch 4 --steps 1 --sample_steps 1"
    flags = ("--data", root.parent, "--ae", tiny_vmae, "--cache", tmp_path / "cache", small)
    run(train_dit, "--out", tmp_path / "dit", *flags)
    warned = capfd.readouterr().err
    assert all(warned.count(f"replaced by the next image: {path} ") == 1 for path in bad)
    assert len(np.load(tmp_path / "cache" / "labels-00000.npy")) == len(good) + len(bad)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "number, attempts",
    [
        (signal.SIGKILL, 1),
        (signal.SIGSEGV, 1),
        pytest.param(signal.SIGKILL, 8, marks=pytest.mark.slow),
    ],
)
def test_a_loader_process_that_dies_is_a_sentence_within_a_minute_wherever_the_script_is(
    tmp_path, folder, number, attempts
):
    small = "--image_size 32 --lpips 0 --workers 2 --batch 8 --log_every 1 --steps 1000000"
    for attempt in range(attempts):
        out = tmp_path / str(attempt)
        process = start(1, "train_ae.py", "--data", folder, "--out", out, TINY_VIT, small)
        wait_for(out, 5 + 7 * attempt, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 1
        *others, sentence = stderr.splitlines()
        assert sentence.lstrip("\0").startswith("a process that loads images died")
        assert "--workers" in sentence
        # Of a crash PyTorch says a line, too
        assert len(others) == (number == signal.SIGSEGV), stderr


def test_a_batch_that_cannot_be_sent_ends_the_loader_process_and_is_not_waited_for():
    class Unsendable(torch.utils.data.Dataset):
        def __getitem__(self, key):
            return torch.zeros(1), lambda: None  # which cannot be pickled

    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid"):
        next(train_ae.load_batches(Unsendable(), [[0]], 1, "cpu"))


# ---- hostile files ----


class Bomb:
    """Runs code when it is unpickled: it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_file_that_is_handed_over_runs_code(tmp_path, tiny_vmae, tiny_dit):
    mark, bomb, plain = tmp_path / "exploded", tmp_path / "bomb.pt", tmp_path / "plain.pt"
    torch.save({"model": Bomb(mark), "args": Bomb(mark)}, bomb)
    plain.write_bytes(pickle.dumps({"model": Bomb(mark)}, 2))
    tensors = shutil.copy(plain, tmp_path / "bomb.safetensors")
    arrays, images = tmp_path / "bomb.npz", tmp_path / "set.npz"
    array = np.array([Bomb(mark)], dtype=object)
    np.savez(arrays, arr_0=array)
    np.savez(images, arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    begun, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(tiny_vmae.parent, begun)

    for file in (bomb, plain, tensors):
        shutil.copy(file, begun / "ckpt.pt")
        assert "ckpt.pt" in fails(train_ae, "--out", begun, TINY_VIT, "--resume")
        for module, *flags in (
            (train_ae, "--init"),
            (train_ae, "--eval --ckpt"),
            (train_dit, "--ae"),
            (train_dit, "--init"),
            (sample, "--ckpt"),
            (sample, "--ckpt", tiny_dit, "--ae"),
            (sample, "--ckpt", tiny_dit, "--stats"),
        ):
            # The file is what the sentence is about
            assert file.name in fails(module, "--out", out, *flags, file)
        assert file.name in fails(fid, images, images, "--inception", file)
    assert arrays.name in fails(fid, arrays, arrays)
    for bad in ("moments", "labels"):
        cache = tmp_path / bad
        cache.mkdir()
        for kind in ("moments", "labels"):
            np.save(cache / f"{kind}-00000.npy", array if kind == bad else np.zeros(1))
        with pytest.raises(ValueError, match="[Oo]bject"):
            train_dit.Cache(cache)[[(0, 0, False)]]
    assert not mark.exists()


def test_no_path_found_in_a_file_is_opened(tmp_path, tiny_vmae, folder):
    out, moved = tmp_path / "dit", tmp_path / "moved"
    shutil.copytree(folder, tmp_path / "data")
    small = f"{DIT} --model DiT-demo/1 --image_size 32 --workers 0 --schedule constant --ema 0.5"

    def flags(root):
        return "--ae", tiny_vmae, "--data", root / "data", "--cache", root / "cache", small

    run(train_dit, "--out", out, *flags(tmp_path), "--steps 2")
    moved.mkdir()
    for name in ("data", "cache"):
        (tmp_path / name).rename(moved / name)
    run(train_dit, "--out", out, *flags(moved), "--resume --steps 3")
    assert not (tmp_path / "data").exists() and not (tmp_path / "cache").exists()
    # What a checkpoint remembers is for people to read
    ckpt = read(out / "ckpt.pt")
    for name in ("data", "cache", "ae", "init", "out"):
        ckpt["args"][name] = ckpt["autoencoder"]["args"][name] = "/nowhere/at/all"
    torch.save(ckpt, tmp_path / "ckpt.pt")
    run(sample, "--ckpt", tmp_path / "ckpt.pt", "--out", tmp_path, "--steps 2 --num 2")
    begun = ("--init", tmp_path / "ckpt.pt", "--out", tmp_path / "init", "--steps 1")
    run(train_dit, *begun, "--data", moved / "data", f"{DIT} --workers 0")


# ---- reproducible ----


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_in_training_sampling_and_evaluation(
    tmp_path, folder, monkeypatch
):
    weights, samples, pictures, tables = [], [], [], []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        run(train_ae, "--out vmae", TINY_VIT, SMALL, "--steps 5")
        run(train_dit, "--ae vmae/ckpt.pt --out dit", DIT, "--steps 5")
        run(sample, "--ckpt dit/ckpt.pt --out drawn --steps 3 --num 12 --npz")
        run(train_ae, "--eval --ckpt vmae/ckpt.pt --out eval --data", folder / "ants")
        weights.append([content(Path(stage, "ckpt.pt")) for stage in ("vmae", "dit")])
        with np.load("drawn/samples.npz") as file:
            samples.append((file["arr_0"], file["arr_1"]))
        files = ("eval/vmae-ckpt.pt.png", "dit/samples.png")
        pictures.append([Path(file).read_bytes() for file in files])
        rows = json.loads(Path("eval/eval.json").read_text())["rows"]
        tables.append([{k: repr(v) for k, v in row.items() if k != "images/s"} for row in rows])
    assert same(*weights) and tables[0] == tables[1]
    assert pictures[0] == pictures[1]
    assert all(map(np.array_equal, *samples))
