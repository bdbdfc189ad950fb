"""The scripts on CUDA: beside the CPU, in bfloat16, compiled, resumed, in processes.

Needs a GPU, and skips without one. `pytest -s tests/test_gpu.py` prints what was seen.
"""

import json
import os
import signal
import subprocess

import numpy as np
import pytest
import torch
from conftest import TINY_VIT, count_gpus, fill, launch, log_of, normal, read, run, tiny
from PIL import Image

import ae
import dit
import fid
import sample
import train_ae
import train_dit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA GPUs")

SMALL = "--batch 16 --log_every 1 --device cuda"
EXACT = "--dtype float32 --compile 0"
DIT = f"{SMALL} --sample_steps 2"


@pytest.fixture(scope="module", autouse=True)
def gpus():
    """Here the scripts see the GPUs that conftest hides from them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", count_gpus)
        yield


@pytest.fixture(autouse=True)
def float32_products():
    """Products in float32; the scripts themselves choose TF32, which is undone after each test."""
    torch.set_float32_matmul_precision("highest")
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = tf32


def apart(a, b):
    """The largest relative difference of two sequences of numbers."""
    a, b = np.array(a, float), np.array(b, float)
    assert a.shape == b.shape and np.isfinite([a, b]).all()
    return float((np.abs(a - b) / np.abs(b).clip(1e-12)).max())


def losses(out):
    return [line["loss"] for line in log_of(out)]


def start(processes, script, *flags):
    """Start a script, in a process group of its own; unlike conftest's, its processes see GPUs."""
    command, _ = launch(processes, script, *flags)
    env, pipe = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.PIPE
    return subprocess.Popen(
        command, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def ends_well(process, seconds=300):
    """Wait for a process that has to succeed, and return what it printed."""
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0 and "Traceback" not in stderr, stderr[-3000:]
    return stdout


# ---- the same numbers as the CPU ----


@pytest.fixture
def small_net():
    """A function that makes a small autoencoder with fixed weights, and its fixed random input."""

    def make(name, **more):
        vit = {"image_size": 32, "hidden_size": 32, "depth": 1, "decoder_depth": 1, "num_heads": 2}
        sizes = vit if ae.MODELS[name].vit else {"channels": (32, 32)}
        net = fill(ae.MODELS[name](**sizes, **more), 0)
        draws = net.randomness(4, 32, torch.Generator().manual_seed(0))
        return net, normal(1, 4, 3, 32, 32).clamp(-1, 1), draws

    return make


def on_both(net, function):
    """function(net, device) of the network on the CPU and on the GPU; all as NumPy arrays."""
    return [
        [value.detach().cpu().double().numpy() for value in function(net.to(device), device)]
        for device in ("cpu", "cuda")
    ]


def assert_close(pair, tolerance=1e-3):
    """Each value of the GPU is the CPU's, up to this fraction of the largest."""
    seen = [np.abs(a - b).max() / max(np.abs(a).max(), 1e-12) for a, b in zip(*pair, strict=True)]
    print(f"largest relative difference between CPU and GPU: {max(seen):.2g}")
    assert max(seen) < tolerance


@pytest.mark.parametrize("name", ae.MODELS)
def test_a_loss_and_its_gradients_are_those_of_the_cpu(name, small_net):
    net, x, draws = small_net(name)

    def step(net, device):
        net.zero_grad()
        on_device = {key: value.to(device) for key, value in draws.items()}
        loss, terms, x_hat = net(x.to(device), **on_device)
        loss.backward()
        trained = torch.cat([p.grad.flatten() for p in net.parameters() if p.requires_grad])
        return loss, *terms.values(), x_hat, trained

    assert_close(on_both(net, step))


def test_tuning_the_decoder_is_that_of_the_cpu(small_net):
    net, x, _ = small_net("vmae", mask_ratio=0.0, weights={"visible": 1.0, "kl": 0.0})

    def step(net, device):
        loss, terms, x_hat = net(x.to(device))
        return loss, *terms.values(), x_hat

    assert_close(on_both(net, step))


def test_the_adversarial_terms_are_those_of_the_cpu(small_net):
    net, x, draws = small_net("sdvae")
    torch.manual_seed(0)
    disc = ae.Discriminator()

    def step(net, device):
        on_device = {key: value.to(device) for key, value in draws.items()}
        loss, _, x_hat = net(x.to(device), **on_device)
        last_layer = net.decoder.conv_out.weight
        adv, loss_d, terms = ae.adversarial_losses(
            disc.to(device), x.to(device), x_hat, loss, last_layer
        )
        return adv, loss_d, *terms.values()

    assert_close(on_both(net, step))


def test_a_dit_s_loss_and_samples_are_those_of_the_cpu():
    net = fill(dit.DiT(4, 1, 8, 32, 2, 2, 3), 0)
    x1, noise = normal(1, 4, 8, 4, 4), normal(2, 4, 8, 4, 4)
    y, t = torch.tensor([0, 1, 2, 3]), torch.tensor([0.1, 0.4, 0.6, 0.9])
    settings = {"steps": 5, "cfg_scale": 2.0, "cfg_channels": 3}

    def step(net, device):
        a, b, c, d = (value.to(device) for value in (x1, y, noise, t))
        z = dit.sample(net, c, b.clamp(max=2), **settings)
        return dit.flow_loss(net, a, b, c, d, True), z

    assert_close(on_both(net, step))


# ---- training ----


@pytest.mark.parametrize("model", ae.MODELS)
def test_each_autoencoder_trains_in_bfloat16_and_compiled_as_in_eager_float32(tmp_path, model):
    flags = f"{tiny(model)} {SMALL} --steps 4"
    if not ae.MODELS[model].vit:
        # As the paper's, its attention is wider than flash attention's 256 channels.
        flags += " --channels 32 288"
    kinds = {
        "float32": EXACT,
        "bfloat16": "--dtype bfloat16 --compile 0",
        "compiled": "--dtype float32 --compile 1",
        "both": "--dtype bfloat16 --compile 1",
    }
    seen = {}
    for kind, settings in kinds.items():
        torch.compiler.reset()
        run(train_ae, "--out", tmp_path / kind, flags, settings)
        assert not any(line["skipped"] for line in log_of(tmp_path / kind))
        assert (tmp_path / kind / "recon.png").exists()
        seen[kind] = apart(losses(tmp_path / kind), losses(tmp_path / "float32"))
    print(model, losses(tmp_path / "float32"), seen)
    assert len(losses(tmp_path / "float32")) == 4
    assert max(seen.values()) < 0.02


def test_a_dit_trains_on_a_cache_as_on_the_fly(tmp_path, folder, tiny_vmae):
    small = "--image_size 32 --workers 0 --model DiT-demo/1 --steps 4"
    flags = ("--data", folder, "--ae", tiny_vmae, DIT, EXACT, small)
    run(train_dit, "--out", tmp_path / "fly", *flags)
    run(train_dit, "--out", tmp_path / "cached", *flags, "--cache", tmp_path / "cache")
    run(train_dit, "--out", tmp_path / "again", *flags, "--cache", tmp_path / "cache")
    fly, cached, again = (losses(tmp_path / name) for name in ("fly", "cached", "again"))
    print(fly, cached, again)
    assert apart(cached, fly) < 1e-2 and apart(again, cached) < 1e-3
    assert (tmp_path / "cached" / "samples.png").exists()


def test_a_dit_trains_in_bfloat16_and_compiled_as_in_eager_float32(tmp_path, tiny_vmae):
    flags = ("--ae", tiny_vmae, DIT, "--steps 4")
    torch.compiler.reset()
    run(train_dit, "--out", tmp_path / "exact", *flags, EXACT)
    run(train_dit, "--out", tmp_path / "fast", *flags, "--dtype bfloat16 --compile 1")
    exact, fast = losses(tmp_path / "exact"), losses(tmp_path / "fast")
    print(exact, fast)
    assert len(exact) == 4 and apart(fast, exact) < 0.02


@pytest.mark.parametrize("model", ["vmae", "sdvae", "dit"])
def test_a_resumed_run_logs_what_an_uninterrupted_one_does(tmp_path, model, tiny_vmae):
    if model == "dit":
        # Its default depends on --steps
        script, flags = train_dit, ("--ae", tiny_vmae, DIT, EXACT, "--ema 0.9")
    else:
        script, flags = train_ae, (tiny(model), SMALL, EXACT)
    constant = "--schedule constant"  # the learning rate does not depend on --steps
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(script, "--out", whole, *flags, constant, "--steps 6")
    run(script, "--out", cut, *flags, constant, "--steps 3")
    run(script, "--out", cut, *flags, constant, "--steps 6 --resume")
    print(losses(whole), losses(cut))
    assert [line["step"] for line in log_of(cut)] == [1, 2, 3, 4, 5, 6]
    assert apart(losses(cut), losses(whole)) < 1e-3


def test_a_step_that_is_not_finite_changes_nothing(tmp_path, monkeypatch):
    forward, count = ae.VMAE.forward, [0]

    def poisoned(self, *args, **kwargs):
        loss, terms, x_hat = forward(self, *args, **kwargs)
        count[0] += 1
        return (loss * float("nan") if count[0] == 4 else loss), terms, x_hat

    monkeypatch.setattr(ae.VMAE, "forward", poisoned)
    constant = "--schedule constant --warmup 0 --keep_every 1 --steps 5"
    run(train_ae, "--out", tmp_path, f"{TINY_VIT} {SMALL} {EXACT} {constant}")
    assert [line["skipped"] for line in log_of(tmp_path)] == [0, 0, 0, 1, 0]
    before, after, later = (read(tmp_path / f"ckpt-{step:07}.pt") for step in (3, 4, 5))

    def same(a, b):
        return all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])

    assert (before["step"], after["step"]) == (3, 4)
    assert same(before, after) and not same(after, later)


# ---- sampling and evaluation ----


@pytest.fixture(scope="module")
def tiny_dit(tiny_vmae, tmp_path_factory):
    """The checkpoint of a DiT trained on the GPU for 4 steps on the digits."""
    out = tmp_path_factory.mktemp("dit")
    run(train_dit, "--out", out, "--ae", tiny_vmae, DIT, EXACT, "--steps 4")
    return out / "ckpt.pt"


def test_sampling_draws_a_grid_and_the_arrays_that_the_cpu_draws(tmp_path, tiny_dit):
    for device in ("cpu", "cuda"):
        flags = ("--ckpt", tiny_dit, "--out", tmp_path / device, "--device", device, "--steps 4")
        run(sample, *flags)
        run(sample, *flags, "--num 20 --npz --batch 8")
    grids = [np.asarray(Image.open(tmp_path / d / "samples.png")) for d in ("cpu", "cuda")]
    files = [np.load(tmp_path / d / "samples.npz") for d in ("cpu", "cuda")]
    arrays, labels = ([file[name] for file in files] for name in ("arr_0", "arr_1"))
    assert grids[0].shape == grids[1].shape and np.array_equal(*labels)
    assert arrays[0].shape == arrays[1].shape == (20, 32, 32, 3)
    seen = np.abs(arrays[0].astype(int) - arrays[1])
    print(f"pixels of CPU and GPU differ by {seen.mean():.3g} on average, {seen.max()} at most")
    assert seen.mean() < 1  # TF32 products


def test_sampling_in_16_bits_and_compiled_draws_the_same_pictures(tmp_path, tiny_dit):
    arrays = {}
    kinds = ("--dtype float16", "--dtype bfloat16", "--compile 1", "--dtype bfloat16 --compile 1")
    for kind in ("", *kinds):
        torch.compiler.reset()
        out = tmp_path / str(len(arrays))
        few = "--steps 4 --num 20 --npz --batch 8"
        run(sample, "--ckpt", tiny_dit, "--out", out, few, kind)
        arrays[kind] = np.load(out / "samples.npz")["arr_0"].astype(int)
        seen = np.abs(arrays[kind] - arrays[""])
        print(f"{kind}: pixels differ by {seen.mean():.3g} on average, {seen.max()} at most")
        assert seen.mean() < 1


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file of random weights that keep the scale of the activations."""
    net, random = fid.InceptionV3(), np.random.RandomState(0)
    state = net.state_dict()
    for key in sorted(state):
        if key.endswith("weight") and state[key].ndim > 1:
            shape = tuple(state[key].shape)
            value = random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
            state[key].copy_(torch.from_numpy(value))
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(dict(state), path)
    return path


def test_judging_an_autoencoder_gives_the_cpu_s_numbers(
    tmp_path, tiny_vmae, folder, inception, monkeypatch, offline
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))  # no VGG16
    few = tmp_path / "few"
    few.mkdir()
    for file in sorted((folder / "cats").iterdir())[:6]:
        (few / file.name).symlink_to(file)
    flags = ("--ckpt", tiny_vmae, "--data", few, "--inception", inception, "--workers 0")
    rows = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        run(train_ae, "--eval", *flags, "--out", out, "--device", device)
        rows += json.loads((out / "eval.json").read_text())["rows"]
        assert list(out.glob("*.png"))
    print(*rows, sep="\n")
    assert rows[0].keys() == rows[1].keys()
    # TF32 products in the autoencoder, on the GPU alone
    for name, tolerance in (("PSNR", 1e-2), ("L1", 1e-2), ("rFID", 5e-2)):
        assert apart([rows[1][name]], [rows[0][name]]) < tolerance


def test_fid_py_gives_the_cpu_s_metrics(tmp_path, inception):
    random = np.random.RandomState(0)
    for name, count in (("ref", 11), ("samples", 9)):
        pixels = random.randint(0, 256, (count, 8, 8, 3)).astype(np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=pixels.repeat(4, 1).repeat(4, 2))
    results = []
    for device in ("cpu", "cuda"):
        flags = ("--inception", inception, "--device", device, "--batch 4")
        out = tmp_path / f"{device}.json"
        run(fid, tmp_path / "ref.npz", tmp_path / "samples.npz", "--json", out, *flags)
        results.append(json.loads(out.read_text()))
    print(*results, sep="\n")
    assert results[0].keys() == results[1].keys() == {*fid.METRICS, "REF images", "SAMPLES images"}
    for name in ("Inception Score", "FID", "sFID"):
        assert apart([results[1][name]], [results[0][name]]) < 1e-2


# ---- two GPUs ----


@two_gpus
@pytest.mark.parametrize("model", ["vmae", "sdvae", "dit"])
def test_two_processes_log_what_one_does(tmp_path, model, tiny_vmae):
    script, flags, same = "train_ae.py", (tiny(model), SMALL, EXACT), 6
    if model == "dit":
        script, flags = "train_dit.py", ("--ae", tiny_vmae, DIT, EXACT)
    if model == "sdvae":
        # From its third step on each process has an adaptive weight of its own
        same = 2
    one, two = tmp_path / "one", tmp_path / "two"
    ends_well(start(1, script, "--out", one, *flags, "--steps 6"))
    stdout = ends_well(start(2, script, "--out", two, *flags, "--steps 6"))
    assert "on cuda in float32; processes: 2" in stdout
    print(losses(one), losses(two))
    assert len(losses(two)) == 6 and np.isfinite(losses(two)).all()
    assert apart(losses(two)[:same], losses(one)[:same]) < 1e-3
