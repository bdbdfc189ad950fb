"""Long runs: exact resume, checkpoints, signals, steps that are not finite, odd files."""

import argparse
import functools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import time
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
    launch,
    log_of,
    read,
    run,
    tiny,
    torchrun,
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


def ends_well(process, seconds=300):
    """Wait for a process that has to succeed, and return what it printed."""
    stdout, stderr = process.communicate(timeout=seconds)
    assert process.returncode == 0, stderr
    return stdout


def wait_for(out, lines, process):
    """Wait until this many steps are logged; False if the run ends before that."""
    log, deadline = Path(out) / "log.jsonl", time.time() + 120
    while time.time() < deadline:
        if log.exists() and log.read_text().count("\n") >= lines:
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    raise TimeoutError(process.communicate())


def same(a, b):
    """True if nested dicts, lists and tensors are equal, bit by bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def of_training(path):
    """The part of a checkpoint that decides how the run goes on."""
    keys = ("model", "optimizer", "ema", "disc", "disc_optimizer", "step", "skipped")
    keys += ("latent_mean", "latent_std")
    return {key: value for key, value in read(path).items() if key in keys}


# ---- exact resume ----


def killed_run(tmp_path, processes, script, flags, kills, seed):
    """The folders of two runs of 40 steps, one undisturbed and one killed at random steps."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ends_well(start(processes, script, "--out", whole, *flags, "--steps 40"))
    rng = random.Random(seed)
    for _ in range(kills):
        # After a kill ckpt.previous.pt may be the only checkpoint
        begun = any(killed.glob("ckpt*.pt"))
        resume = "--resume" if begun else ""
        process = start(processes, script, "--out", killed, *flags, "--steps 40", resume)
        done = len(log_of(killed)) if begun else 0
        reached = wait_for(killed, min(39, done + rng.randint(1, 9)), process)
        assert reached, process.communicate()
        time.sleep(rng.random() * 0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    ends_well(start(processes, script, "--out", killed, *flags, "--steps 40 --resume"))
    return whole, killed


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("model", ["vmae", "sdvae", "dit"])
def test_runs_killed_at_random_steps_end_in_the_same_bits(tmp_path, model, processes, tiny_vmae):
    if model == "dit":
        script, flags = "train_dit.py", (DIT, "--ckpt_every 3", "--ae", tiny_vmae)
    else:
        settings = "--ckpt_every 2 --schedule constant --warmup 0"
        script, flags = "train_ae.py", (tiny(model), SMALL, settings)
    # 20 kills in all
    kills = 4 if model == "dit" else 3
    whole, killed = killed_run(tmp_path, processes, script, flags, kills, seed=processes)
    assert same(of_training(whole / "ckpt.pt"), of_training(killed / "ckpt.pt"))
    assert without_times(whole) == without_times(killed) and len(without_times(whole)) == 40


def test_a_run_goes_on_with_another_number_of_processes_to_rounding(tmp_path):
    flags = f"{TINY_VIT} {SMALL} --schedule constant"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(train_ae, "--out", whole, flags, "--steps 6")
    run(train_ae, "--out", cut, flags, "--steps 3")
    ends_well(start(2, "train_ae.py", "--out", cut, "--resume --steps 6"))
    assert 0 <= difference(whole, cut) < 1e-5
    assert [line["step"] for line in log_of(cut)] == [1, 2, 3, 4, 5, 6]


# ---- checkpoints ----


def damage(path, how):
    """Truncate, empty or remove a file, or flip the bits of one byte in its middle."""
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "missing":
        path.unlink()
    else:
        # The byte lies inside a tensor: the file still opens
        data[len(data) // 2] ^= 255
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "empty", "missing", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(tmp_path, capsys, how):
    flags = f"{TINY_VIT} {SMALL} --schedule constant --ckpt_every 2"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(train_ae, "--out", whole, flags, "--steps 6")
    run(train_ae, "--out", cut, flags, "--steps 4")
    assert read(cut / "ckpt.previous.pt")["step"] == 2
    damage(cut / "ckpt.pt", how)
    assert "--resume" in fails(train_ae, "--out", cut)
    run(train_ae, "--out", cut, "--resume --steps 6")
    warning = capsys.readouterr().err
    assert "ckpt.pt" in warning and "ckpt.previous.pt" in warning and warning.startswith("warning")
    assert difference(whole, cut) == 0
    assert without_times(whole) == without_times(cut)


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_good_one_before_it(tmp_path):
    run(train_ae, "--out", tmp_path, TINY_VIT, SMALL, "--ckpt_every 2 --steps 4")
    damage(tmp_path / "ckpt.pt", "truncated")
    run(train_ae, "--out", tmp_path, "--resume --steps 5 --ckpt_every 10")
    assert read(tmp_path / "ckpt.pt")["step"] == 5
    assert read(tmp_path / "ckpt.previous.pt")["step"] == 2


def test_a_picture_that_cannot_be_written_costs_the_picture_alone(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(ae, "save_grid", full)
    run(train_ae, "--out", tmp_path, TINY_VIT, SMALL, "--steps 2")
    output = capsys.readouterr()
    assert "no picture of step 2: No space left" in output.err and "not saved" not in output.err
    assert "wrote" in output.out and read(tmp_path / "ckpt.pt")["step"] == 2


def test_two_damaged_checkpoints_are_one_sentence(tmp_path):
    run(train_ae, "--out", tmp_path, TINY_VIT, SMALL, "--ckpt_every 1 --steps 2")
    for name in ("ckpt.pt", "ckpt.previous.pt"):
        damage(tmp_path / name, "truncated")
    assert "damaged" in fails(train_ae, "--out", tmp_path, "--resume")


def test_no_room_for_a_checkpoint_costs_the_new_one_alone(tmp_path, capsys):
    """A limit on the size of files stands in for a full disk."""
    ckpt = tmp_path / "ckpt.pt"
    run(train_ae, "--out", tmp_path, TINY_VIT, SMALL, "--steps 2")
    before, limit = ckpt.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        message = fails(train_ae, "--out", tmp_path, "--resume --steps 4 --ckpt_every 1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    warnings = capsys.readouterr().err
    for words in ("step 3 is not saved", "step 4 is not saved", "File too large"):
        assert words in warnings
    assert "make room" in message
    assert ckpt.read_bytes() == before and not (tmp_path / "ckpt.pt.tmp").exists()
    run(train_ae, "--out", tmp_path, "--resume --steps 4")
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4]


# ---- signals ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, number):
    """The whole process group gets it, as from a terminal; loader workers must not die of it."""
    out = tmp_path / "a folder"
    endless = "--ckpt_every 1000000 --steps 1000000"
    settings = f"{TINY_VIT} {SMALL} {endless} --workers 1 --schedule constant"
    process = start(1, "train_ae.py", "--out", out, settings)
    assert wait_for(out, 5, process), process.communicate()
    os.killpg(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in stderr, stderr
    step = read(out / "ckpt.pt")["step"]
    assert log_of(out)[-1]["step"] == step >= 5
    assert f"after step {step}" in stdout
    command = stdout.splitlines()[-1]
    assert command.startswith("python ") and command.endswith("--resume") and f"'{out}'" in command
    run(train_ae, "--out", out, f"--resume --steps {step + 2}")
    assert log_of(out)[-1]["step"] == step + 2


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in Linux's /proc")
@pytest.mark.parametrize("script", ["train_ae.py", "train_dit.py"])
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(
    tmp_path, script, tiny_vmae
):
    flags = (TINY_VIT, SMALL) if script == "train_ae.py" else ("--ae", tiny_vmae, DIT)
    endless = "--ckpt_every 1000000 --steps 1000000"
    process = start(2, script, "--out", tmp_path, *flags, endless)
    assert wait_for(tmp_path, 5, process), process.communicate()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    scripts = [pid for pid in children if script in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(int(scripts[-1]), signal.SIGTERM)
    stdout = ends_well(process, 60)
    assert stdout.count("stopped by a signal") == 1 and "torchrun --nproc_per_node=2" in stdout
    assert read(tmp_path / "ckpt.pt")["step"] == log_of(tmp_path)[-1]["step"]


# ---- the end of a run of several processes ----


@pytest.mark.parametrize("module", ["ae", "fid"])
@pytest.mark.parametrize("times", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_processes_that_leave_each_other_do_not_hang(tmp_path, module, times):
    """With PyTorch 2.4, a barrier and destroy_process_group alone hang within ten times."""
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import faulthandler, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import torch.distributed as dist
import {module}
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
file = dist.FileStore({str(tmp_path / "store")!r}, world)
for i in range({times}):
    faulthandler.dump_traceback_later(60, exit=True)  # how a hang ends
    store = dist.PrefixStore(str(i), file)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    # Not waited for, so that gloo's threads are still busy with them
    for _ in range(4):
        dist.all_reduce(torch.ones(1), async_op=True)
    {module}.leave_processes()
if rank == 0:
    print("left", i + 1, "times")
""")
    assert f"left {times} times" in torchrun(2, driver)


# ---- steps that are not finite ----


def poison(monkeypatch, steps, value=float("nan")):
    """Multiply VMAE's loss by `value` at these steps, counted from 1."""
    forward, count = ae.VMAE.forward, [0]

    def poisoned(self, *args, **kwargs):
        loss, terms, x_hat = forward(self, *args, **kwargs)
        # The forward pass that counts GFLOPs, on the meta device, is not a step
        count[0] += not loss.is_meta
        return (loss * value if count[0] in steps else loss), terms, x_hat

    monkeypatch.setattr(ae.VMAE, "forward", poisoned)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, monkeypatch, value):
    flags = f"{TINY_VIT} {SMALL} --schedule constant --warmup 0 --ckpt_every 1"
    poison(monkeypatch, {4}, value)
    run(train_ae, "--out", tmp_path, flags, "--steps 4")
    before, after = of_training(tmp_path / "ckpt.previous.pt"), of_training(tmp_path / "ckpt.pt")
    assert (before.pop("step"), after.pop("step")) == (3, 4)
    assert (before.pop("skipped"), after.pop("skipped")) == (0, 1)
    assert same(before, after)
    run(train_ae, "--out", tmp_path, "--resume --steps 6")
    assert [line["skipped"] for line in log_of(tmp_path)] == [0, 0, 0, 1, 1, 1]
    assert not same(after["model"], read(tmp_path / "ckpt.pt")["model"])


def test_a_dit_step_that_is_not_finite_leaves_the_ema_alone(tmp_path, monkeypatch, tiny_vmae):
    loss, count = dit.flow_loss, [0]

    def poisoned(*args):
        count[0] += not args[1].is_meta  # the count of FLOPs is no step
        return loss(*args) * (float("nan") if count[0] == 4 else 1)

    monkeypatch.setattr(dit, "flow_loss", poisoned)
    flags = f"{DIT} --schedule constant --ckpt_every 1"
    run(train_dit, "--ae", tiny_vmae, "--out", tmp_path, flags, "--steps 4")
    before, after = of_training(tmp_path / "ckpt.previous.pt"), of_training(tmp_path / "ckpt.pt")
    assert same(before["ema"], after["ema"]) and same(before["optimizer"], after["optimizer"])
    assert same(before["model"], after["model"]) and after["skipped"] == 1


def test_sdvae_s_discriminator_is_not_touched_either(tmp_path, monkeypatch):
    reconstruct, count = ae.SDVAE.forward, [0]

    def poisoned(self, *args, **kwargs):
        loss, terms, x_hat = reconstruct(self, *args, **kwargs)
        count[0] += not loss.is_meta
        return loss, terms, x_hat * (float("nan") if count[0] == 4 else 1)

    monkeypatch.setattr(ae.SDVAE, "forward", poisoned)
    model = f"--model sdvae {TINY_CONV} --disc_start 2"
    flags = f"{model} {SMALL} --ckpt_every 1 --schedule constant --warmup 0"
    run(train_ae, "--out", tmp_path, flags, "--steps 4")
    before, after = of_training(tmp_path / "ckpt.previous.pt"), of_training(tmp_path / "ckpt.pt")
    for part in ("model", "optimizer", "disc", "disc_optimizer"):
        assert same(before[part], after[part])
    assert after["skipped"] == 1


def test_processes_skip_together(tmp_path):
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
    ends_well(start(2, driver, "--out", out, TINY_VIT, SMALL, "--ckpt_every 1 --steps 3"))
    assert same(read(out / "ckpt.previous.pt")["model"], read(out / "ckpt.pt")["model"])
    assert [line["skipped"] for line in log_of(out)] == [0, 0, 1]


def test_twenty_in_a_row_stop_the_run_with_the_last_good_checkpoint_intact(tmp_path, monkeypatch):
    poison(monkeypatch, {3, *range(5, 100)})
    flags = f"{TINY_VIT} {SMALL} --ckpt_every 4"
    message = fails(train_ae, "--out", tmp_path, flags, "--steps 60")
    assert "20 steps in a row" in message and "--grad_clip" in message and "--resume" in message
    assert log_of(tmp_path)[-1]["step"] == 24
    assert all(value.isfinite().all() for value in read(tmp_path / "ckpt.pt")["model"].values())
    monkeypatch.undo()
    run(train_ae, "--out", tmp_path, "--resume --steps 22 --lr 1e-4 --grad_clip 1")
    assert log_of(tmp_path)[-1]["lr"] <= 1e-4


def test_the_gradient_norm_is_that_of_all_gradients_and_clipping_scales_them(tmp_path):
    class Recorder:
        """An optimiser that keeps the gradients it is given."""

        def __init__(self, tensors):
            self.param_groups = [{"params": tensors[:1]}, {"params": tensors[1:]}]
            self.tensors = tensors

        def step(self):
            self.grads = torch.cat([p.grad for p in self.tensors])

        def zero_grad(self):
            pass

    for clip, scale in ((float("inf"), 1.0), (1.0, 1 / 13), (20.0, 1.0)):
        tensors = [torch.zeros(2), torch.zeros(2)]
        tensors[0].grad, tensors[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 12.0])
        args = argparse.Namespace(device="cpu", out=str(tmp_path), grad_clip=clip, given=set())
        args.dtype = args.compile = None
        args.steps = args.batch = args.micro_batch = args.log_every = 1
        recorder = Recorder(tensors)
        training = train_ae.Run(args)
        training.begin(None)
        taken = training.update([recorder], 1.0, {"loss": torch.ones(())})
        assert taken == 1 and log_of(tmp_path)[-1]["grad_norm"] == 13
        assert torch.allclose(recorder.grads, scale * torch.tensor([3.0, 4.0, 0.0, 12.0]))


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
    rgb.save(root / "日本 ümläut.jpg")
    good = sorted(root.iterdir())
    rgb.save(root / "cut.jpg")
    damage(root / "cut.jpg", "truncated")
    (root / "empty.png").write_bytes(b"")
    (root / "text.jpg").write_text("a picture of a cat")
    (root / "link.png").symlink_to("nowhere.png")
    # A few kB on disk, but more pixels than Pillow accepts
    Image.new("1", (20000, 10000)).save(root / "huge.png")
    Image.new("L", (1, 9000)).save(root / "strip.png")
    return root, good, sorted(set(root.iterdir()) - set(good))


def test_odd_images_are_read_or_skipped_by_name(odd_images, capsys):
    root, good, bad = odd_images
    images = train_ae.Images(str(root.parent))
    show = functools.partial(train_ae.crop_and_flip, 32, False)
    dataset = train_ae.Batches(images, show, tolerate=1)
    keys = [[(i, 0, False)] for i in range(len(images))]
    batches = list(train_ae.load_batches(dataset, keys, 2, "cpu"))
    assert len(batches) == len(good) + len(bad)
    assert all(x.shape == (1, 3, 32, 32) for x, _ in batches)
    warned = capsys.readouterr().err
    assert all(f"{path.name} cannot be read" in warned for path in bad)
    assert not any(f"{path.name} cannot be read" in warned for path in good)


def test_odd_kinds_show_what_they_show(odd_images):
    root, _, _ = odd_images
    images = train_ae.Images(str(root.parent))
    index = {Path(file).name: i for i, file in enumerate(images.files)}

    def show(name):
        return np.asarray(images[index[name]]).astype(int)

    ramp = np.linspace(0, 255, 40 * 50).reshape(40, 50)[..., None]
    for name in ("16 bit.png", "16 bit.tif", "grey and alpha.png"):
        assert np.abs(show(name) - ramp).max() <= 1, name
    for name in ("palette.png", "alpha.png", "moves.webp", "cmyk.jpg", "日本 ümläut.jpg"):
        assert np.abs(show(name) - [200, 100, 50]).max() <= 6, name


def test_training_on_odd_images_with_workers(odd_images, tmp_path):
    root, _, bad = odd_images
    for path in bad:
        path.unlink()
    out, dit_out = tmp_path / "out", tmp_path / "dit"
    small = "--image_size 32 --lpips 0 --workers 2 --compile 0 --batch 8 --steps 3"
    run(train_ae, "--data", root.parent, "--out", out, TINY_VIT, small)
    small = "--model DiT-demo/1 --workers 1 --batch 8 --steps 2 --sample_steps 2"
    flags = ("--ae", out / "ckpt.pt", "--cache", tmp_path / "cache", small)
    run(train_dit, "--data", root.parent, "--out", dit_out, *flags)
    assert (dit_out / "samples.png").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_loader_worker_that_dies_is_a_sentence_within_a_minute(
    tmp_path, folder, monkeypatch, number
):
    home = os.getpid()

    def deadly(*args):
        assert os.getpid() != home
        os.kill(os.getpid(), number)

    monkeypatch.setattr(train_ae, "augment", deadly)
    small = "--image_size 32 --lpips 0 --workers 2 --batch 8 --steps 3"
    began = time.time()
    message = fails(train_ae, "--data", folder, "--out", tmp_path / "out", TINY_VIT, small)
    assert "process that loads images died" in message and "--workers" in message
    assert time.time() - began < 60


# ---- hostile files ----


class Bomb:
    """Runs code when it is unpickled: it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def tiny_dit_for_files(tiny_vmae, tmp_path_factory):
    """The checkpoint of a DiT trained for 2 steps on the digits."""
    out = tmp_path_factory.mktemp("dit")
    run(train_dit, "--ae", tiny_vmae, "--out", out, DIT, "--steps 2")
    return out / "ckpt.pt"


def test_no_file_that_is_handed_over_runs_code(tmp_path, tiny_vmae, tiny_dit_for_files):
    mark, bomb, plain = tmp_path / "exploded", tmp_path / "bomb.pt", tmp_path / "plain.pt"
    torch.save({"model": Bomb(mark), "args": Bomb(mark)}, bomb)
    plain.write_bytes(pickle.dumps({"model": Bomb(mark)}, 2))
    arrays, images = tmp_path / "bomb.npz", tmp_path / "set.npz"
    np.savez(arrays, arr_0=np.array([Bomb(mark)], dtype=object))
    np.savez(images, arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    begun, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(tiny_vmae.parent, begun)
    (begun / "ckpt.previous.pt").unlink(missing_ok=True)

    for file in (bomb, plain):
        shutil.copy(file, begun / "ckpt.pt")
        fails(train_ae, "--out", begun, "--resume")
        fails(train_ae, "--out", out, "--init", file, TINY_VIT)
        fails(train_ae, "--out", out, "--eval --ckpt", file)
        fails(train_dit, "--out", out, "--ae", file)
        fails(sample, "--out", out, "--ckpt", file)
        fails(sample, "--out", out, "--ckpt", tiny_dit_for_files, "--ae", file)
        fails(sample, "--out", out, "--ckpt", tiny_dit_for_files, "--stats", file)
        fails(fid, images, images, "--inception", file)
    fails(fid, arrays, arrays)
    assert not mark.exists()


def test_no_path_found_in_a_file_is_opened(tmp_path, tiny_vmae, folder):
    out, data, cache = tmp_path / "dit", ("--data", folder), ("--cache", tmp_path / "c")
    small = f"{DIT} --model DiT-demo/1 --image_size 32 --workers 0"
    run(train_dit, "--out", out, "--ae", tiny_vmae, *data, *cache, small, "--steps 2")
    assert "name the folder again" in fails(train_dit, "--out", out, "--resume --steps 3")
    assert "--cache" in fails(train_dit, "--out", out, "--resume --steps 3", *data)
    run(train_dit, "--out", out, "--resume --steps 3", *data, *cache)
    # The names that a checkpoint remembers are not to be opened either
    ckpt = read(out / "ckpt.pt")
    ckpt["args"]["ae"] = ckpt["args"]["init"] = "/nowhere/at/all.pt"
    torch.save(ckpt, out / "ckpt.pt")
    run(train_dit, "--out", out, "--resume --steps 4", *data, *cache)


# ---- reproducible ----


def test_the_same_seed_gives_the_same_bits_in_training_sampling_and_evaluation(tmp_path, folder):
    weights, samples, pictures, tables = [], [], [], []
    for name in ("a", "b"):
        out = tmp_path / name
        vmae, dit_out, judged = out / "vmae", out / "dit", out / "eval"
        run(train_ae, "--out", vmae, TINY_VIT, SMALL, "--steps 5")
        run(train_dit, "--ae", vmae / "ckpt.pt", "--out", dit_out, DIT, "--steps 5")
        run(sample, "--ckpt", dit_out / "ckpt.pt", "--out", out, "--steps 3 --num 12")
        run(train_ae, "--eval --ckpt", vmae / "ckpt.pt", "--out", judged, "--data", folder)
        weights.append([of_training(stage / "ckpt.pt") for stage in (vmae, dit_out)])
        with np.load(out / "samples.npz") as file:
            samples.append((file["arr_0"], file["arr_1"]))
        files = (judged / "vmae.png", dit_out / "samples.png")
        pictures.append([file.read_bytes() for file in files])
        rows = json.loads((judged / "eval.json").read_text())["rows"]
        tables.append([{k: repr(v) for k, v in row.items() if k != "images/s"} for row in rows])
    assert same(*weights) and tables[0] == tables[1]
    assert pictures[0] == pictures[1]
    assert all(map(np.array_equal, *samples))
