"""What several test files use: the reference results, small runs of the scripts, made images."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


def reference(name):
    """A file of the reference implementations' results, or a skip where they are not beside the project."""
    path = SHARED / "compat" / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


def keys_of(name):
    lines = reference(name).read_text().splitlines()
    pairs = (line.split("\t") for line in lines if line)
    return {key: tuple(int(side) for side in shape.split("x")) if shape else () for key, shape in pairs}


def shapes(module):
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def fill(model, seed):
    """Known weights, by the rule of the reference results."""
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
    """Largest difference relative to the largest value."""
    ours = ours.detach().numpy() if torch.is_tensor(ours) else np.asarray(ours)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def run(module, *flags):
    """A script's main in this process, by its flags; SystemExit carries its message."""
    argv, sys.argv = sys.argv, [module.__name__ + ".py", *map(str, flags)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        module.main()
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)


def fails(module, *flags):
    """The one sentence with which a script stops."""
    with pytest.raises(SystemExit) as stop:
        run(module, *flags)
    message = stop.value.code
    assert isinstance(
        message, str
    ), f"it ended with {message!r}, not with a sentence"  # a string exits with 1
    assert "\n" not in message
    return message


def torchrun(processes, script, *flags):
    """A script on several gloo processes of one thread each."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        "--",
        str(ROOT / script),
        *map(str, flags),
    ]  # --: else torchrun takes --num for one of its own
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def log_of(out):
    return [json.loads(line) for line in open(Path(out) / "log.jsonl")]


def difference(a, b, part="model"):
    """The largest difference between the weights of two checkpoints."""
    a, b = (torch.load(Path(out) / "ckpt.pt", weights_only=True)[part] for out in (a, b))
    assert a.keys() == b.keys()
    return max((a[key].float() - b[key].float()).abs().max().item() for key in a)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Class folders of made images, of several shapes: 3 classes, 40 images each."""
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


TINY_VIT = ("--hidden_size", 32, "--depth", 1, "--decoder_depth", 1, "--num_heads", 2)
TINY_CONV = ("--channels", 32, 32)


def tiny(model):
    """The flags of a small one; SD-VAE's discriminator starts at the third step."""
    sizes = TINY_VIT if model in ("mae", "vmae") else TINY_CONV
    return ("--model", model, *sizes, *(("--disc_start", 3) if model == "sdvae" else ()))


@pytest.fixture(scope="session")
def tiny_vmae(tmp_path_factory):
    """A VMAE trained for 20 steps on the digits: its checkpoint."""
    import train_ae

    out = tmp_path_factory.mktemp("vmae")
    run(train_ae, "--out", out, *TINY_VIT, "--steps", 20)
    return out / "ckpt.pt"
