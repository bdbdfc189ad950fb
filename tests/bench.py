"""Throughput beside the alternatives: python tests/bench.py [--json FILE] [--only WORD ...] [--rounds 5]

Ours and the peer (where it is installed) take turns in one run, round by round; a row shows the medians, the
median of the ratios, and achieved FLOP/s with its share of the rate of matrix products, measured here.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import ae
import dit
import fid
import train_ae
import train_dit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
ROWS = {}


def row(function):
    ROWS[function.__name__.replace("_", " ")] = function
    return function


def seconds(function):
    """Of one call, the device's work included."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_rate():
    """FLOP/s of the best of several square products, normal inputs."""
    best = 0.0
    for n in (2048, 4096, 8192) if DEVICE == "cuda" else (1024, 2048):
        a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in range(2))
        a @ b
        best = max(best, *(2 * n**3 / seconds(lambda: a @ b) for _ in range(5)))
    return best


def training_step(net, loss_of):
    """Forward, backward, AdamW and EMA, as the training scripts do them."""
    net = net.to(DEVICE)
    ema = copy.deepcopy(net)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-4, fused=True)
    if DEVICE == "cuda":
        net.compile()

    def step():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = loss_of(net)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1e-4)

    return step


# ---- rows: each returns (what one call does, in units), unit, ours, peer's name, peer, FLOPs of a call ----


@row
def DiT_B_training():
    batch = 32 if DEVICE == "cuda" else 2
    net = dit.DiT_models["DiT-B/1"](input_size=32, in_channels=16, num_classes=1000)
    x1, noise, t = torch.randn(batch, 16, 32, 32), torch.randn(batch, 16, 32, 32), torch.rand(batch)
    y = torch.randint(1000, (batch,))
    flops = 3 * batch * 1e9 * train_ae.gflops(net, x1[:1], t[:1], y[:1])
    x1, noise, t, y = (value.to(DEVICE) for value in (x1, noise, t, y))
    return (
        batch,
        "images/s",
        training_step(net, lambda net: dit.flow_loss(net, x1, y, noise, t)),
        None,
        None,
        flops,
    )


def autoencoder_training(name, size, batch):
    net = ae.MODELS[name](**({"image_size": size} if name == "vmae" else {}))
    x = torch.randn(batch, 3, size, size).clamp(-1, 1)
    flops = 3 * batch * 1e9 * train_ae.gflops(net, x[:1])
    x = x.to(DEVICE)
    return batch, "images/s", training_step(net, lambda net: net(x)[0]), None, None, flops


@row
def VMAE_training_at_128():
    return autoencoder_training("vmae", 128, 128 if DEVICE == "cuda" else 8)


@row
def VMAE_training_at_256():
    return autoencoder_training("vmae", 256, 64 if DEVICE == "cuda" else 2)


def codec(name, encode):
    torch.manual_seed(0)
    net, batch = ae.MODELS[name]().eval().requires_grad_(False), 16 if DEVICE == "cuda" else 1
    inputs = torch.randn(batch, 3, 256, 256) if encode else torch.randn(batch, 16, 32, 32)
    flops = batch * 1e9 * train_ae.gflops(net, inputs[:1], method="encode" if encode else "decode")
    net, inputs = net.to(DEVICE), inputs.to(DEVICE)
    ours = lambda: (net.encode(inputs).mean if encode else net.decode(inputs))
    peer_name, peer = None, None
    if name == "sdvae":
        try:
            import diffusers

            blocks = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
            theirs = diffusers.AutoencoderKL(
                3,
                3,
                *blocks,
                (128, 256, 512, 512),
                layers_per_block=2,
                latent_channels=16,
                use_quant_conv=False,
                use_post_quant_conv=False,
            )
            theirs.load_state_dict(net.state_dict())
            theirs = theirs.eval().requires_grad_(False).to(DEVICE)
            peer_name = f"diffusers {diffusers.__version__}"
            peer = lambda: theirs.encode(inputs).latent_dist.mean if encode else theirs.decode(inputs).sample
        except ImportError:
            pass
    return batch, "images/s", ours, peer_name, peer, flops


@row
def VMAE_encoding_at_256():
    return codec("vmae", True)


@row
def VMAE_decoding_at_256():
    return codec("vmae", False)


@row
def SD_VAE_encoding_at_256():
    return codec("sdvae", True)


@row
def SD_VAE_decoding_at_256():
    return codec("sdvae", False)


@row
def image_loading_at_256():
    from torchvision import transforms

    folder = Path(tempfile.mkdtemp())
    noise = np.random.RandomState(0).randint(0, 256, (24, 32, 3)).astype(np.uint8)
    for i in range(64):
        Image.fromarray(np.roll(noise, i, 1)).resize((500, 375), Image.BICUBIC).save(
            folder / f"{i}.jpg", quality=90
        )
    images = train_ae.Images(str(folder))
    files, batches = images.files, train_ae.Batches(
        images, train_ae.functools.partial(train_ae.augment, 256, 0, True)
    )
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                256, (0.75, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
    )
    theirs = lambda: torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    return (
        64,
        "images/s a core",
        lambda: batches[[(i, 0, False) for i in range(64)]],
        "torchvision",
        theirs,
        None,
    )


@row
def latent_cache():
    folder = Path(tempfile.mkdtemp())
    np.save(folder / "moments-00000.npy", np.zeros((1024, 2, 32, 32, 32), np.float16))
    np.save(folder / "labels-00000.npy", np.zeros(1024, np.int64))

    class Photographs:
        digits = False

    cache = train_dit.Cache(str(folder), Photographs())
    order = np.random.RandomState(0).permutation(1024)
    keys = [[(int(i), 0, True) for i in order[j : j + 32]] for j in range(0, 1024, 32)]
    return 1024, "moments/s", lambda: [cache[key] for key in keys], None, None, None


@row
def Inception_features():
    torch.manual_seed(0)
    net = fid.InceptionV3()
    state = copy.deepcopy(net.state_dict())
    net = net.fuse().to(DEVICE)
    x = torch.randint(0, 256, (64 if DEVICE == "cuda" else 16, 3, 256, 256), dtype=torch.uint8, device=DEVICE)
    peer_name, peer = None, None
    try:
        import pytorch_fid.inception as theirs

        theirs.load_state_dict_from_url = lambda *args, **kwargs: state
        model = theirs.InceptionV3([3]).to(DEVICE).eval()
        peer_name, peer = "pytorch-fid", torch.no_grad()(lambda: model(x.float() / 255))
    except ImportError:
        pass
    return len(x), "images/s", lambda: net(x), peer_name, peer, None


@row
def Frechet_distance_of_2048():
    from scipy.linalg import sqrtm

    random = np.random.RandomState(0)
    a, b = (np.cov(random.standard_normal((4096, 2048)) * random.rand(2048), rowvar=False) for _ in range(2))
    mu = np.zeros(2048)
    theirs = lambda: np.trace(a + b - 2 * sqrtm(a @ b).real)
    return 1, "a second", lambda: fid.frechet_distance(mu, a, mu, b), "scipy sqrtm", theirs, None


@row
def sampling_with_guidance():
    net = dit.DiT_models["DiT-B/1"](input_size=32, in_channels=16, num_classes=1000).eval()
    batch, steps = (16, 50) if DEVICE == "cuda" else (1, 4)
    y, noise = torch.zeros(batch, dtype=torch.long, device=DEVICE), torch.randn(
        batch, 16, 32, 32, device=DEVICE
    )
    evaluations = sum(
        1 + (0.3 * i / steps / (1 - 0.7 * i / steps) >= 0.1) for i in range(steps)
    )  # guided ones: 2
    flops = batch * evaluations * 1e9 * train_ae.gflops(net, noise[:1].cpu(), torch.zeros(1), y[:1].cpu())
    net = net.to(DEVICE)
    return batch * steps, "steps/s", lambda: dit.sample(net, noise, y, steps), None, None, flops


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="write the table there, too")
    parser.add_argument("--only", nargs="+", help="rows whose names hold one of these words")
    parser.add_argument(
        "--rounds", type=int, default=5, help="of each row, after one to warm up (default: 5)"
    )
    args = parser.parse_args()
    machine = (
        torch.cuda.get_device_name()
        if DEVICE == "cuda"
        else f"{platform.processor() or platform.machine()} CPU"
    )
    rate = matrix_rate()
    print(
        f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, {str(DTYPE)[6:]} products "
        f"{rate / 1e12:.3g} TFLOP/s\n"
    )
    print("| work | ours | peer | ratio | TFLOP/s | share of products |\n|---|---|---|---|---|---|")
    table = []
    for name, make in ROWS.items():
        if args.only and not any(word.lower() in name.lower() for word in args.only):
            continue
        units, unit, ours, peer_name, peer, flops = make()
        times = {ours: [], peer: []}
        for k in range(args.rounds + 1):
            for function in filter(None, (ours, peer)):
                took = seconds(function)
                times[function] += [took] * (k > 0)  # the first round warms up
        median = statistics.median(times[ours])
        entry = {"work": name, "unit": unit, "ours": units / median, "peer_name": peer_name}
        cells = [name, f"{units / median:.3g} {unit}", "-", "-", "-", "-"]
        if peer:
            entry |= {
                "peer": units / statistics.median(times[peer]),
                "ratio": statistics.median(b / a for a, b in zip(times[ours], times[peer])),
            }
            cells[2:4] = [f"{entry['peer']:.3g} {peer_name}", f"{entry['ratio']:.2f}"]
        if flops:
            entry |= {"flops": flops / median, "share": flops / median / rate}
            cells[4:6] = [f"{flops / median / 1e12:.3g}", f"{entry['share']:.0%}"]
        table.append(entry)
        print("| " + " | ".join(cells) + " |", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine, "rate": rate, "rows": table}, indent=1))


if __name__ == "__main__":
    main()
