"""What a long run can rely on: exact resume, checkpoints, signals, steps that are not finite, odd files."""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ae
import dit
import sample
import train_ae
import train_dit
from conftest import ROOT, TINY_CONV, TINY_VIT, difference, fails, log_of, run, tiny

SMALL = ("--batch", 16, "--log_every", 1)
DIT = (*SMALL, "--sample_steps", 2)


def start(processes, script, *flags):
    """A script in processes of one thread each, in a process group of its own."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--"]
    command = [sys.executable, *(launch if processes > 1 else []), str(ROOT / script), *map(str, flags)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def ends_well(process, seconds=300):
    """Its output."""
    stdout, stderr = process.communicate(timeout=seconds)
    assert process.returncode == 0, stderr
    return stdout


def wait_for(out, lines, process):
    """Until that many steps are logged, or the run is over: whether they are."""
    log, deadline = Path(out) / "log.jsonl", time.time() + 120
    while time.time() < deadline:
        if log.exists() and log.read_text().count("\n") >= lines:
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    raise TimeoutError(process.communicate())


def losses(out):
    """The log without what depends on the clock."""
    return [
        {k: v for k, v in line.items() if k not in ("images_per_s", "seconds_left")} for line in log_of(out)
    ]


def read(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Nested dicts, lists and tensors, bit by bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def of_training(path):
    """What of a checkpoint decides how the run goes on."""
    keys = (
        "model",
        "optimizer",
        "ema",
        "disc",
        "disc_optimizer",
        "step",
        "latent_mean",
        "latent_std",
        "skipped",
    )
    return {key: value for key, value in read(path).items() if key in keys}


# ---- exact resume ----


def killed_run(tmp_path, processes, script, flags, kills, seed):
    """A run that is killed at random steps and a run that is not, of 40 steps each: their folders."""
    whole = start(processes, script, "--out", tmp_path / "whole", *flags, "--steps", 40)
    ends_well(whole)
    rng, killed = random.Random(seed), 0
    while killed < kills:
        flag = ["--resume"] if list((tmp_path / "killed").glob("ckpt*.pt")) else []  # or previous.pt alone
        process = start(processes, script, "--out", tmp_path / "killed", *flags, "--steps", 40, *flag)
        done = len(log_of(tmp_path / "killed")) if flag else 0
        assert wait_for(
            tmp_path / "killed", min(39, done + rng.randint(1, 9)), process
        ), process.communicate()
        time.sleep(rng.random() * 0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        killed += 1
    last = start(processes, script, "--out", tmp_path / "killed", *flags, "--steps", 40, "--resume")
    ends_well(last)
    return tmp_path / "whole", tmp_path / "killed"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("model", ["vmae", "sdvae", "dit"])
def test_runs_killed_at_random_steps_end_in_the_same_bits(tmp_path, model, processes, tiny_vmae):
    if model == "dit":
        script, flags = "train_dit.py", (*DIT, "--ckpt_every", 3, "--ae", tiny_vmae)
    else:
        script, flags = "train_ae.py", (*SMALL, "--ckpt_every", 2, *tiny(model))
        flags = (*flags, "--schedule", "constant", "--warmup", 0)
    kills = 4 if model == "dit" else 3  # 20 in all
    whole, killed = killed_run(tmp_path, processes, script, flags, kills, seed=processes)
    assert same(of_training(whole / "ckpt.pt"), of_training(killed / "ckpt.pt"))
    assert losses(whole) == losses(killed) and len(losses(whole)) == 40


def test_a_run_goes_on_with_another_number_of_processes_to_rounding(tmp_path):
    flags = (*TINY_VIT, *SMALL, "--schedule", "constant")
    run(train_ae, "--out", tmp_path / "whole", *flags, "--steps", 6)
    run(train_ae, "--out", tmp_path / "cut", *flags, "--steps", 3)
    process = start(2, "train_ae.py", "--out", tmp_path / "cut", "--resume", "--steps", 6)
    ends_well(process)
    assert 0 <= difference(tmp_path / "whole", tmp_path / "cut") < 1e-5
    assert [line["step"] for line in losses(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]


# ---- checkpoints ----


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "missing":
        path.unlink()
    else:  # one byte in the middle, inside a tensor: the file still opens
        data[len(data) // 2] ^= 255
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "empty", "missing", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(tmp_path, capsys, how):
    flags = (*TINY_VIT, *SMALL, "--schedule", "constant", "--ckpt_every", 2)
    run(train_ae, "--out", tmp_path / "whole", *flags, "--steps", 6)
    run(train_ae, "--out", tmp_path / "cut", *flags, "--steps", 4)
    assert read(tmp_path / "cut" / "ckpt.previous.pt")["step"] == 2
    damage(tmp_path / "cut" / "ckpt.pt", how)
    assert "--resume" in fails(train_ae, "--out", tmp_path / "cut")
    run(train_ae, "--out", tmp_path / "cut", "--resume", "--steps", 6)
    warning = capsys.readouterr().err
    assert "ckpt.pt" in warning and "ckpt.previous.pt" in warning and warning.startswith("warning")
    assert difference(tmp_path / "whole", tmp_path / "cut") == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_good_one_before_it(tmp_path):
    run(train_ae, "--out", tmp_path, *TINY_VIT, *SMALL, "--ckpt_every", 2, "--steps", 4)
    damage(tmp_path / "ckpt.pt", "truncated")
    run(train_ae, "--out", tmp_path, "--resume", "--steps", 5, "--ckpt_every", 10)
    assert read(tmp_path / "ckpt.pt")["step"] == 5 and read(tmp_path / "ckpt.previous.pt")["step"] == 2


def test_a_picture_that_cannot_be_written_costs_the_picture_alone(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(ae, "save_grid", full)
    run(train_ae, "--out", tmp_path, *TINY_VIT, *SMALL, "--steps", 2)
    output = capsys.readouterr()
    assert "no picture of step 2: No space left" in output.err and "not saved" not in output.err
    assert "wrote" in output.out and read(tmp_path / "ckpt.pt")["step"] == 2


def test_two_damaged_checkpoints_are_one_sentence(tmp_path):
    run(train_ae, "--out", tmp_path, *TINY_VIT, *SMALL, "--ckpt_every", 1, "--steps", 2)
    for name in ("ckpt.pt", "ckpt.previous.pt"):
        damage(tmp_path / name, "truncated")
    assert "damaged" in fails(train_ae, "--out", tmp_path, "--resume")


def test_no_room_for_a_checkpoint_costs_the_new_one_alone(tmp_path, capsys):
    """A limit on the size of files stands in for a full disk."""
    run(train_ae, "--out", tmp_path, *TINY_VIT, *SMALL, "--steps", 2)
    before, limit = (tmp_path / "ckpt.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        message = fails(train_ae, "--out", tmp_path, "--resume", "--steps", 4, "--ckpt_every", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    warnings = capsys.readouterr().err
    assert (
        "step 3 is not saved" in warnings
        and "step 4 is not saved" in warnings
        and "File too large" in warnings
    )
    assert "make room" in message
    assert (tmp_path / "ckpt.pt").read_bytes() == before and not (tmp_path / "ckpt.pt.tmp").exists()
    run(train_ae, "--out", tmp_path, "--resume", "--steps", 4)
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4]


# ---- signals ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, number):
    """To the whole process group, as a terminal or a batch system does it: loader workers are not to die."""
    out = tmp_path / "a folder"
    flags = ("--out", out, *TINY_VIT, *SMALL, "--ckpt_every", 10**6, "--workers", 1, "--schedule", "constant")
    process = start(1, "train_ae.py", *flags, "--steps", 10**6)
    assert wait_for(out, 5, process), process.communicate()
    os.killpg(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in stderr, stderr
    step = read(out / "ckpt.pt")["step"]
    assert log_of(out)[-1]["step"] == step >= 5
    assert f"after step {step}" in stdout
    command = stdout.splitlines()[-1]
    assert command.startswith("python ") and command.endswith("--resume") and f"'{out}'" in command
    run(train_ae, "--out", out, "--resume", "--steps", step + 2)
    assert log_of(out)[-1]["step"] == step + 2


@pytest.mark.parametrize("script", ["train_ae.py", "train_dit.py"])
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(tmp_path, script, tiny_vmae):
    flags = (*TINY_VIT, *SMALL) if script == "train_ae.py" else (*DIT, "--ae", tiny_vmae)
    process = start(2, script, "--out", tmp_path, *flags, "--ckpt_every", 10**6, "--steps", 10**6)
    assert wait_for(tmp_path, 5, process), process.communicate()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    scripts = [pid for pid in children if script in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(int(scripts[-1]), signal.SIGTERM)
    stdout = ends_well(process, 60)
    assert stdout.count("stopped by a signal") == 1 and "torchrun --nproc_per_node=2" in stdout
    assert read(tmp_path / "ckpt.pt")["step"] == log_of(tmp_path)[-1]["step"]


# ---- steps that are not finite ----


def poison(monkeypatch, steps, value=float("nan")):
    """Let VMAE's loss be `value` at these steps, counted from 1."""
    forward, count = ae.VMAE.forward, [0]

    def poisoned(self, *args, **kwargs):
        loss, terms, x_hat = forward(self, *args, **kwargs)
        count[0] += not loss.is_meta  # the count of GFLOPs is no step
        return (loss * value if count[0] in steps else loss), terms, x_hat

    monkeypatch.setattr(ae.VMAE, "forward", poisoned)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, monkeypatch, value):
    flags = (*TINY_VIT, *SMALL, "--schedule", "constant", "--warmup", 0, "--ckpt_every", 1)
    poison(monkeypatch, {4}, value)
    run(train_ae, "--out", tmp_path, *flags, "--steps", 4)
    before, after = of_training(tmp_path / "ckpt.previous.pt"), of_training(tmp_path / "ckpt.pt")
    assert (before.pop("step"), after.pop("step")) == (3, 4)
    assert (before.pop("skipped"), after.pop("skipped")) == (0, 1)
    assert same(before, after)
    run(train_ae, "--out", tmp_path, "--resume", "--steps", 6)
    assert [line["skipped"] for line in log_of(tmp_path)] == [0, 0, 0, 1, 1, 1]
    assert not same(after["model"], read(tmp_path / "ckpt.pt")["model"])


def test_a_dit_step_that_is_not_finite_leaves_the_ema_alone(tmp_path, monkeypatch, tiny_vmae):
    loss, count = dit.flow_loss, [0]

    def poisoned(*args):
        count[0] += 1
        return loss(*args) * (float("nan") if count[0] == 4 else 1)

    monkeypatch.setattr(dit, "flow_loss", poisoned)
    flags = (*DIT, "--schedule", "constant", "--ckpt_every", 1)
    run(train_dit, "--ae", tiny_vmae, "--out", tmp_path, *flags, "--steps", 4)
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
    flags = ("--model", "sdvae", *TINY_CONV, *SMALL, "--disc_start", 2, "--ckpt_every", 1)
    flags = (*flags, "--schedule", "constant", "--warmup", 0)
    run(train_ae, "--out", tmp_path, *flags, "--steps", 4)
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
    flags = ("--out", tmp_path / "out", *TINY_VIT, *SMALL, "--ckpt_every", 1)
    process = start(2, driver, *flags, "--steps", 3)
    ends_well(process)
    out = tmp_path / "out"
    assert same(read(out / "ckpt.previous.pt")["model"], read(out / "ckpt.pt")["model"])
    assert [line["skipped"] for line in log_of(out)] == [0, 0, 1]


def test_twenty_in_a_row_stop_the_run_with_the_last_good_checkpoint_intact(tmp_path, monkeypatch):
    poison(monkeypatch, {3, *range(5, 100)})
    flags = (*TINY_VIT, *SMALL, "--ckpt_every", 4)
    message = fails(train_ae, "--out", tmp_path, *flags, "--steps", 60)
    assert "20 steps in a row" in message and "--grad_clip" in message and "--resume" in message
    assert log_of(tmp_path)[-1]["step"] == 24
    assert all(value.isfinite().all() for value in read(tmp_path / "ckpt.pt")["model"].values())
    monkeypatch.undo()
    run(train_ae, "--out", tmp_path, "--resume", "--steps", 22, "--lr", 1e-4, "--grad_clip", 1)
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
        args = train_ae.argparse.Namespace(device="cpu", grad_clip=clip, out=str(tmp_path), log_every=1)
        args.steps, args.batch = 1, 1
        recorder = Recorder(tensors)
        counts = train_ae.Run(args, 0, 1, None).step({"loss": torch.ones(())}, [recorder], 1.0)
        assert counts == 1 and log_of(tmp_path)[-1]["grad_norm"] == 13
        assert torch.allclose(recorder.grads, scale * torch.tensor([3.0, 4.0, 0.0, 12.0]))


# ---- images ----


@pytest.fixture
def odd_images(tmp_path):
    """One of each kind, readable and unreadable, in a class folder with a space and an umlaut."""
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
    Image.new("1", (20000, 10000)).save(root / "huge.png")  # beyond Pillow's limit, a few kB on disk
    Image.new("L", (1, 9000)).save(root / "strip.png")
    return root, good, sorted(set(root.iterdir()) - set(good))


def test_odd_images_are_read_or_skipped_by_name(odd_images, capsys):
    root, good, bad = odd_images
    images = train_ae.Images(str(root.parent))
    show = train_ae.functools.partial(train_ae.augment, 32, 0, False)
    dataset = train_ae.Batches(images, show, tolerate=1)
    keys = [[(i, 0, False)] for i in range(len(images))]
    args = train_ae.argparse.Namespace(device="cpu", workers=2)
    batches = list(train_ae.load_batches(dataset, keys, args))
    assert len(batches) == len(good) + len(bad) and all(x.shape == (1, 3, 32, 32) for x, _ in batches)
    warned = capsys.readouterr().err
    assert all(f"{path.name} cannot be read" in warned for path in bad)
    assert not any(f"{path.name} cannot be read" in warned for path in good)


def test_odd_kinds_show_what_they_show(odd_images):
    root, _, _ = odd_images
    images = train_ae.Images(str(root.parent))
    pixels = {Path(file).name: i for i, file in enumerate(images.files)}
    show = lambda name: np.asarray(images[pixels[name]]).astype(int)
    ramp = np.linspace(0, 255, 40 * 50).reshape(40, 50)[..., None]
    for name in ("16 bit.png", "16 bit.tif", "grey and alpha.png"):
        assert np.abs(show(name) - ramp).max() <= 1, name
    for name in ("palette.png", "alpha.png", "moves.webp", "cmyk.jpg", "日本 ümläut.jpg"):
        assert np.abs(show(name) - [200, 100, 50]).max() <= 6, name


def test_training_on_odd_images_with_workers(odd_images, tmp_path):
    root, _, bad = odd_images
    for path in bad:
        path.unlink()
    flags = ("--data", root.parent, "--image_size", 32, "--lpips", 0, "--workers", 2, "--compile", 0)
    run(train_ae, "--out", tmp_path / "out", *flags, *TINY_VIT, "--batch", 8, "--steps", 3)
    run(train_dit, "--out", tmp_path / "dit", "--data", root.parent, "--ae", tmp_path / "out" / "ckpt.pt",
        "--cache", tmp_path / "cache", "--workers", 1, "--model", "DiT-demo/1", "--batch", 8, "--steps", 2,
        "--sample_steps", 2)  # fmt: skip
    assert (tmp_path / "dit" / "samples.png").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_loader_worker_that_dies_is_a_sentence_within_a_minute(tmp_path, folder, monkeypatch, number):
    home = os.getpid()

    def deadly(*args):
        assert os.getpid() != home
        os.kill(os.getpid(), number)

    flags = ("--data", folder, "--image_size", 32, "--lpips", 0, "--workers", 2, *TINY_VIT, "--batch", 8)
    monkeypatch.setattr(train_ae, "augment", deadly)
    began = time.time()
    message = fails(train_ae, "--out", tmp_path / "out", *flags, "--steps", 3)
    assert "process that loads images died" in message and "--workers" in message
    assert time.time() - began < 60


# ---- hostile files ----


class Bomb:
    """What runs code when it is unpickled: it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_file_that_is_handed_over_runs_code(tmp_path, tiny_vmae, tiny_dit_for_files):
    bomb, mark = tmp_path / "bomb.pt", tmp_path / "exploded"
    torch.save({"model": Bomb(mark), "args": Bomb(mark)}, bomb)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"model": Bomb(mark)}))
    arrays = tmp_path / "bomb.npz"
    np.savez(arrays, arr_0=np.array([Bomb(mark)], dtype=object))
    np.savez(tmp_path / "set.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    shutil.copytree(tiny_vmae.parent, tmp_path / "run")
    (tmp_path / "run" / "ckpt.previous.pt").unlink(missing_ok=True)
    import fid

    for file in (bomb, tmp_path / "plain.pt"):
        shutil.copy(file, tmp_path / "run" / "ckpt.pt")
        out = ("--out", tmp_path / "out")
        fails(train_ae, "--out", tmp_path / "run", "--resume")
        fails(train_ae, *out, "--init", file, *TINY_VIT)
        fails(train_ae, *out, "--eval", "--ckpt", file)
        fails(train_dit, *out, "--ae", file)
        fails(sample, *out, "--ckpt", file)
        fails(sample, *out, "--ckpt", tiny_dit_for_files, "--ae", file)
        fails(sample, *out, "--ckpt", tiny_dit_for_files, "--stats", file)
        with pytest.raises(fid.BadInput):
            run(fid, tmp_path / "set.npz", tmp_path / "set.npz", "--inception", file)
    with pytest.raises(fid.BadInput):
        run(fid, arrays, arrays)
    assert not mark.exists()


@pytest.fixture(scope="module")
def tiny_dit_for_files(tiny_vmae, tmp_path_factory):
    out = tmp_path_factory.mktemp("dit")
    run(train_dit, "--ae", tiny_vmae, "--out", out, *DIT, "--steps", 2)
    return out / "ckpt.pt"


def test_no_path_found_in_a_file_is_opened(tmp_path, tiny_vmae, folder):
    flags = (
        "--data",
        folder,
        "--image_size",
        32,
        "--workers",
        0,
        *DIT,
        "--steps",
        2,
        "--cache",
        tmp_path / "c",
    )
    run(train_dit, "--ae", tiny_vmae, "--out", tmp_path / "dit", *flags, "--model", "DiT-demo/1")
    out = ("--out", tmp_path / "dit", "--resume", "--steps", 3)
    assert "name the folder again" in fails(train_dit, *out)
    assert "--cache" in fails(train_dit, *out, "--data", folder)
    run(train_dit, *out, "--data", folder, "--cache", tmp_path / "c")
    ckpt = read(tmp_path / "dit" / "ckpt.pt")
    ckpt["args"]["ae"] = ckpt["args"]["init"] = "/nowhere/at/all.pt"  # names of the past, not to be opened
    torch.save(ckpt, tmp_path / "dit" / "ckpt.pt")
    run(train_dit, *out[:-1], 4, "--data", folder, "--cache", tmp_path / "c")


# ---- reproducible ----


def test_the_same_seed_gives_the_same_bits_in_training_sampling_and_evaluation(tmp_path, folder):
    pictures, tables, weights = [], [], []
    for name in ("a", "b"):
        out = tmp_path / name
        run(train_ae, "--out", out / "vmae", *TINY_VIT, *SMALL, "--steps", 5)
        run(train_dit, "--ae", out / "vmae" / "ckpt.pt", "--out", out / "dit", *DIT, "--steps", 5)
        run(sample, "--ckpt", out / "dit" / "ckpt.pt", "--steps", 3, "--out", out, "--num", 12)
        run(train_ae, "--eval", "--ckpt", out / "vmae" / "ckpt.pt", "--out", out / "eval", "--data", folder)
        weights.append([of_training(out / stage / "ckpt.pt") for stage in ("vmae", "dit")])
        pictures.append([(out / "samples.npz").read_bytes(), (out / "eval" / "vmae.png").read_bytes(),
                         (out / "dit" / "samples.png").read_bytes()])  # fmt: skip
        rows = json.loads((out / "eval" / "eval.json").read_text())["rows"]
        tables.append([{k: repr(v) for k, v in row.items() if k != "images/s"} for row in rows])
    assert same(*weights) and tables[0] == tables[1]
    assert pictures[0][1:] == pictures[1][1:]
    with np.load(tmp_path / "a" / "samples.npz") as a, np.load(tmp_path / "b" / "samples.npz") as b:
        assert all(np.array_equal(a[key], b[key]) for key in ("arr_0", "arr_1"))
