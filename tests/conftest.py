"""Shared by the test files: reference results, small runs of the scripts, generated images."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fid

ROOT = Path(__file__).parents[1]
REFERENCE = Path(__file__).parent / "reference"  # see its README.md


def reference(name):
    """A file of tensor names or results of the reference implementations."""
    return REFERENCE / name


def keys_of(name):
    """The tensor names of a reference checkpoint, each with its shape."""
    lines = reference(name).read_text().splitlines()
    pairs = (line.split("\t") for line in lines if line)
    return {key: tuple(int(side) for side in shape.split("x") if side) for key, shape in pairs}


def shapes(module):
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def fill(model, seed):
    """Give a model the weights with which the reference results were computed."""
    random = np.random.RandomState(seed)
    state = model.state_dict()
    for key in sorted(state):
        if key.startswith("feat_rope.") or key in ("pos_embed", "decoder_pos_embed"):
            continue
        value = 0.05 * random.standard_normal(tuple(state[key].shape))
        if "norm" in key and key.endswith("weight"):
            value = 1 + value
        state[key].copy_(torch.from_numpy(np.asarray(value)))
    return model


def normal(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def close(ours, theirs, tolerance=1e-4):
    """Assert that no difference exceeds this fraction of the largest value."""
    ours = ours.detach().numpy() if torch.is_tensor(ours) else np.asarray(ours)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def words(*flags):
    """The words of a command line: strings are split as a shell does it, paths are kept whole."""
    lists = (shlex.split(flag) if isinstance(flag, str) else [str(flag)] for flag in flags)
    return [word for words in lists for word in words]


def run(module, *flags):
    """Run a script in this process: run(train_ae, "--out", tmp_path, "--batch 8 --steps 1")."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__ + ".py", *words(*flags)])
        module.main()


def fails(module, *flags):
    """Run a script that has to stop with one sentence, and return that sentence."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [module.__name__ + ".py", *words(*flags)])
        fid.run_main(module.main)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which run_main may have ended
    # SystemExit with a string prints it and exits with status 1
    message = stop.value.code
    assert isinstance(message, str), f"it ended with {message!r}, not with a sentence"
    assert "\n" not in message
    return message


def usage_error(capsys, module, *flags):
    """Run a script whose command line is wrong, and return what argparse says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(module, *flags)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("usage: "), said
    return said


def launch(processes, script, *flags):
    """The command and the environment of a script on the CPU, in processes of one thread each."""
    # Without the "--" torchrun would take --num for one of its own flags
    several = f"-m torch.distributed.run --standalone --nproc_per_node={processes} --"
    launcher = several if processes > 1 else ""
    command = words(Path(sys.executable), launcher, ROOT / script, *flags)
    return command, {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def together(processes, script, *flags):
    """Run a script in several processes that talk through gloo, and return what the first prints.

    They get torchrun's variables without torchrun, which takes seconds to start.
    """
    command, env = launch(1, script, *flags)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [
        subprocess.Popen(command, env=env | {"RANK": str(k), "LOCAL_RANK": str(k)}, **pipes)
        for k in range(processes)
    ]
    said = [process.communicate(timeout=300) for process in running]
    for process, (_, errors) in zip(running, said):
        assert process.returncode == 0, errors[-3000:]
    return said[0][0]


def log_of(out):
    """The lines of a run's log."""
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def without_times(out):
    """The lines of a run's log without what depends on the clock."""
    times = ("images_per_s", "seconds_left")
    return [{k: v for k, v in line.items() if k not in times} for line in log_of(out)]


def read(path):
    """A checkpoint, read without running code from it."""
    return torch.load(path, weights_only=True)


def difference(a, b, part="model"):
    """The largest difference between the weights in the checkpoints of two runs."""
    a, b = (read(Path(out) / "ckpt.pt")[part] for out in (a, b))
    assert a.keys() == b.keys()
    return max((a[key].float() - b[key].float()).abs().max().item() for key in a)


def size_of(picture):
    """Width and height of a picture."""
    with Image.open(picture) as image:
        return image.size


def written(data):
    """A function that writes these bytes to a path."""
    return lambda path: path.write_bytes(data)


def saved(content):
    """A function that saves this object to a path, as a checkpoint is saved."""
    return lambda path: torch.save(content, path)


count_gpus = torch.cuda.device_count


@pytest.fixture(scope="session", autouse=True)
def no_gpu():
    """Without --device the scripts run on the CPU, also where there is a GPU.

    Numbers are compared exactly; test_gpu.py is for the GPU.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        yield


@pytest.fixture
def offline(monkeypatch):
    """Downloads fail as they do without a network."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "urlopen", refuse)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder of generated images of several shapes: 3 classes, 40 images each."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.RandomState(0)
    for c, name in enumerate(("ants", "bees", "cats")):
        (root / name).mkdir()
        for i in range(40):
            height, width = random.randint(30, 60, 2)
            base = random.randint(0, 256, (4, 4, 3)).astype(np.uint8)
            base[..., c] = 255
            image = Image.fromarray(base).resize((int(width), int(height)), Image.BICUBIC)
            image.save(root / name / f"{i:03}.{'png' if i % 2 else 'jpg'}")
    return root


TINY_VIT = "--hidden_size 32 --depth 1 --decoder_depth 1 --num_heads 2"
TINY_CONV = "--channels 32 32"


def tiny(model):
    """The flags of a small model; SD-VAE's discriminator starts at the third step."""
    sizes = TINY_VIT if model in ("mae", "vmae") else TINY_CONV
    discriminator = "--disc_start 3" if model == "sdvae" else ""
    return f"--model {model} {sizes} {discriminator}"


def latents_of(vmae):
    """The flags of a DiT on this VMAE's latents of the digits, which are computed once."""
    return "--ae", vmae, "--cache", vmae.parent / "latents"


@pytest.fixture(scope="session")
def tiny_vmae(tmp_path_factory):
    """The checkpoint of a VMAE trained for 20 steps on the digits."""
    import train_ae

    out = tmp_path_factory.mktemp("vmae")
    run(train_ae, "--out", out, TINY_VIT, "--steps 20")
    return out / "ckpt.pt"


@pytest.fixture(scope="session")
def tiny_dit(tiny_vmae, tmp_path_factory):
    """The checkpoint of a DiT trained for 8 steps on the digits."""
    import train_dit

    out = tmp_path_factory.mktemp("dit")
    few = "--batch 16 --log_every 1 --ckpt_every 4 --steps 8 --sample_steps 4"
    run(train_dit, "--out", out, *latents_of(tiny_vmae), few)
    return out / "ckpt.pt"
