"""Throughput beside the alternatives, as one Markdown table: the machine first, then a line for each piece of work.

    python tests/bench.py                                  all rows but the demo's
    python tests/bench.py --demo --json bench.json         with the demo's three commands; the table as a file, too
    python tests/bench.py --only training Inception        rows whose names hold one of these words
    python tests/bench.py --row "latent cache"             one row, in this process, as JSON

Every row runs in a process of its own, so that none disturbs another and its peak memory is its own: on a CPU the
process's largest resident set, on a GPU PyTorch's largest allocation after the warm-up. Ours and the peer (where it
is installed) take turns, round by round: medians, and the median of the rounds' ratios, the peer's time over ours.
Training rows time train_ae.Run.step and what the scripts do around it, all but the loading. FLOP/s are the
arithmetic of forward and backward passes, a multiply and an add two; their share is of the rate of square matrix
products in the same arithmetic, measured here. Nothing is downloaded: weights are random.
"""

import argparse
import atexit
import copy
import functools
import importlib
import importlib.metadata
import json
import math
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ae
import dit
import fid
import train_ae
import train_dit

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
AUTOCAST = "bfloat16" if CUDA else "float32"  # of training and encoding
TF32 = "TF32" if CUDA else "float32"  # of what the scripts run in float32
GPU_MODE = ", bfloat16, compiled"
ROWS = {}  # name -> function that returns what measure takes, a dict or several


def row(name, *args):
    """Enter a function of `args` as the row `name`."""

    def enter(function):
        ROWS[name] = functools.partial(function, *args)
        return function

    return enter


def seconds(function, repeat=1):
    """Of one of `repeat` calls, the device's work included."""
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        function()
    if CUDA:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeat


def measure(
    name, rounds, ours, units=1, unit="seconds", peer=None, peer_name=None, flops=None, arithmetic=None,
    note="", training=False, own_clock=False, warm_up=3 if CUDA else 1, check=lambda: None,
):  # fmt: skip
    """A line of the table. ours, peer: what to call (own_clock: they return their seconds); units: of one call."""
    functions = [function for function in (ours, peer) if function]
    clock, repeats = (lambda function, _: function()) if own_clock else seconds, []
    for function in functions:
        took = [clock(function, 1) for _ in range(warm_up)][-1:]
        repeats.append(max(1, math.ceil(0.5 / took[0])) if took and not own_clock else 1)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    times = [[clock(*pair) for pair in zip(functions, repeats)] for _ in range(rounds)]
    check()
    medians = [statistics.median(column) for column in zip(*times)]
    values = [median if unit == "seconds" else units / median for median in medians]
    line = {"work": f"{name}, {note}" if note else name, "unit": unit, "ours": values[0], "rounds": rounds}
    if peer:
        line |= {"peer": values[1], "peer_name": peer_name}
        line["ratio"] = statistics.median(theirs / mine for mine, theirs in times)
    if flops:
        line |= {"flops": flops / medians[0], "arithmetic": arithmetic}
    if training:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
        line["peak_bytes"] = torch.cuda.max_memory_allocated() if CUDA else resident
    return line


def products(arithmetic):
    """FLOP/s of the best of several square matrix products, normal inputs."""
    dtype = {"TF32": torch.float32}.get(arithmetic) or getattr(torch, arithmetic)
    torch.set_float32_matmul_precision("high" if arithmetic == "TF32" else "highest")
    best = 0.0
    for n in (2048, 4096, 8192) if CUDA else (1024, 2048, 4096):
        a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
        seconds(lambda: a @ b)
        best = max(
            best, *(2 * n**3 / seconds(lambda: a @ b, 10 if CUDA else 1) for _ in range(10 if CUDA else 3))
        )
    return best


def folder():
    """A new one, removed in the end."""
    path = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def installed(module):
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def version(package):
    return f"{package} {importlib.metadata.version(package)}"


def counted(function):
    """FLOPs of a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


autocast = functools.partial(torch.autocast, DEVICE, torch.bfloat16, enabled=CUDA)

# ---- Training: make(device, batch) -> networks with an optimiser each, what to compile, gradients(step) -> terms ----


def training(make, batch, ema=False, other=None, note=""):
    """other: keyword arguments of gradients for the peer, "name" it."""
    flops = batch * counted(make("meta", 1)[2])
    nets, compiled, gradients = make(DEVICE, batch)
    average = copy.deepcopy(nets[0]).eval().requires_grad_(False) if ema else None
    optimizers = []
    for net in nets:
        parameters = [p for p in net.parameters() if p.requires_grad]
        groups = [{"params": [p for p in parameters if (p.ndim > 1) == matrix]} for matrix in (True, False)]
        optimizers.append(torch.optim.AdamW(groups, 1e-4, (0.9, 0.95), weight_decay=0.0, fused=True))
    never = {"log_every": 10**9, "steps": 10**9, "ckpt_every": 10**9}
    settings = {"device": DEVICE, "out": str(folder()), "batch": batch, "grad_clip": math.inf, **never}
    run = train_ae.Run(argparse.Namespace(**settings), 0, 1, None)
    for number in train_ae.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    for part in compiled if CUDA else ():
        part.compile()

    def step(**how):
        counts = run.step(gradients(run.done, **how), optimizers, 1e-4)
        if ema:
            decay = min(0.9999, (1 + run.done) / (10 + run.done))
            with torch.no_grad():
                for mean, weight in zip(average.parameters(), nets[0].parameters()):
                    mean.lerp_(weight, counts * (1 - decay))
        run.due()

    def check():
        assert run.skipped == 0, "steps were skipped, so this is not their time"

    peer = {"peer": lambda: step(**other), "peer_name": "without LPIPS"} if other else {}
    note = f"batch {batch}" + (GPU_MODE if CUDA else "")
    return {"ours": step, "units": batch, "unit": "images/s", "flops": flops, "arithmetic": AUTOCAST, "note": note,
            "training": True, "check": check, **peer}  # fmt: skip


@row("DiT-B/1 training")
def dit_training():
    def make(device, batch):
        net = dit.DiT_models["DiT-B/1"](input_size=32, in_channels=16, num_classes=1000).to(device)
        moments = torch.randn(batch, 32, 32, 32, device=device)
        y = torch.randint(1000, (batch,), device=device)

        def gradients(step=0):
            draw = None if device == "meta" else train_ae.generator(device, 0, step)
            posterior_noise, noise = (
                torch.randn(batch, 16, 32, 32, generator=draw, device=device) for _ in range(2)
            )
            t = torch.randn(batch, generator=draw, device=device).sigmoid()
            dropped = torch.rand(batch, generator=draw, device=device) < 0.1
            x1 = ae.Posterior(moments).sample(posterior_noise)
            with autocast():
                loss = dit.flow_loss(net, x1, torch.where(dropped, 1000, y), noise, t)
            loss.backward()
            return {"loss": loss.detach()}

        return [net], [net], gradients

    return training(make, 32 if CUDA else 2, ema=True)


@row("VMAE training at 128", "vmae", 128, 128 if CUDA else 8, False)
@row("VMAE training at 128 with LPIPS", "vmae", 128, 128 if CUDA else 8, True)
@row("VMAE training at 256", "vmae", 256, 32 if CUDA else 2, False)
@row("VMAE training at 256 with LPIPS", "vmae", 256, 32 if CUDA else 2, True)
@row(f"SD-VAE training at {256 if CUDA else 128} with LPIPS and discriminator",
     "sdvae", 256 if CUDA else 128, 8 if CUDA else 1, True)  # fmt: skip
def autoencoder_training(name, size, batch, with_lpips):
    import lpips

    def make(device, batch):
        net = ae.MODELS[name](**({"image_size": size} if name == "vmae" else {})).to(device)
        nets, compiled = [net], [net]
        if name == "sdvae":
            disc = ae.Discriminator().to(device)
            for module in disc.modules():
                module.track_running_stats = False
            nets, compiled = [net, disc], [net.encoder, net.decoder.mid_block, *net.decoder.up_blocks]
        x = torch.randn(batch, 3, size, size, device=device).clamp(-1, 1)
        if with_lpips:  # as ae.lpips_vgg, but for the weights
            vgg = (
                lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False).to(device)
            )
            distance = lambda x_hat, x: vgg(x_hat, x).mean()

        def gradients(step=0, perceptual=with_lpips):
            draws = {}
            if device != "meta":
                draws = net.randomness(batch, size, train_ae.generator(device, 0, step))
            with autocast():
                loss, terms, x_hat = net(x, perceptual=distance if perceptual else None, **draws)
                if name == "sdvae":  # the loop of train_ae.main
                    disc.requires_grad_(False)
                    adv = ae.generator_loss(disc(x_hat).float())
                    adaptive = ae.adaptive_weight(loss, adv, net.decoder.conv_out.weight)
                    loss = loss + 0.5 * adaptive * adv
                    disc.requires_grad_(True)
                    real, fake = disc(x).float(), disc(x_hat.detach()).float()
                    loss_d = ae.disc_loss(real, fake)
                    terms |= {"adv": adv, "adaptive": adaptive, "disc": loss_d}
                    terms |= {"real": real.mean(), "fake": fake.mean()}
            loss.backward()
            if name == "sdvae":
                loss_d.backward()
            return {name: term.detach() for name, term in {"loss": loss, **terms}.items()}

        return nets, compiled, gradients

    return training(make, batch, other={"perceptual": False} if with_lpips and name == "vmae" else None)


# ---- What does not train ----


@row("VMAE encoding at 256", "vmae", True)
@row("VMAE decoding at 256", "vmae", False)
@row("SD-VAE encoding at 256", "sdvae", True)
@row("SD-VAE decoding at 256", "sdvae", False)
def codec(name, encode):
    """Encoding as train_dit.py does it, in bfloat16 on a GPU; decoding as sample.py does, in float32."""
    net, batch = ae.MODELS[name]().eval().requires_grad_(False), 16 if CUDA else 1
    inputs = torch.randn(batch, 3, 256, 256) if encode else torch.randn(batch, 16, 32, 32)
    flops = batch * 1e9 * train_ae.gflops(net, inputs[:1], method="encode" if encode else "decode")
    net, inputs = net.to(DEVICE), inputs.to(DEVICE)
    precision = lambda: torch.autocast(DEVICE, torch.bfloat16, enabled=CUDA and encode)
    ours = lambda: net.encode(inputs).mean if encode else net.decode(inputs)
    spec = {"ours": precision()(ours), "units": batch, "unit": "images/s", "flops": flops, "note": f"batch {batch}",
            "arithmetic": AUTOCAST if encode else TF32}  # fmt: skip
    if name == "sdvae" and (diffusers := installed("diffusers")):
        blocks = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
        theirs = diffusers.AutoencoderKL(
            3, 3, *blocks, (128, 256, 512, 512), layers_per_block=2, latent_channels=16, use_quant_conv=False,
            use_post_quant_conv=False,
        )  # fmt: skip
        theirs.load_state_dict(net.state_dict())
        theirs = theirs.eval().requires_grad_(False).to(DEVICE)
        peer = lambda: theirs.encode(inputs).latent_dist.mean if encode else theirs.decode(inputs).sample
        spec |= {"peer": precision()(peer), "peer_name": version("diffusers")}
    return spec


@row("DiT-B/1 sampling, guided")
def sampling():
    net, evaluated = dit.DiT_models["DiT-B/1"](input_size=32, in_channels=16, num_classes=1000).eval(), []

    def stub(x, t, y):
        evaluated.append(len(x))
        return x

    stub.num_classes, stub.class_dropout_prob = 1000, 0.1
    batch, steps, counts = 64 if CUDA else 1, 20 if CUDA else 4, []
    y, noise = torch.zeros(batch, dtype=torch.long), torch.randn(batch, 16, 32, 32)
    for n in (steps, 250):  # evaluations an image; guided steps have two
        evaluated.clear()
        dit.sample(stub, noise[:1], y[:1], n)
        counts.append(sum(evaluated))
    flops = batch * counts[0] * 1e9 * train_ae.gflops(net, noise[:1], torch.zeros(1), y[:1])
    net, y, noise = net.to(DEVICE), y.to(DEVICE), noise.to(DEVICE)
    return {"ours": lambda: dit.sample(net, noise, y, steps), "units": batch * counts[0] / counts[1],
            "unit": "images/s of 250 steps", "flops": flops, "arithmetic": TF32, "note": f"batch {batch}"}  # fmt: skip


@row("loading of JPEGs at 256")
def image_loading():
    """Of 500 x 375, cropped, resized, flipped; one core; both sides yield the same bytes."""
    from torchvision import transforms

    torch.set_num_threads(1)
    path, random = folder(), np.random.RandomState(0)
    for i in range(64):  # noise at several scales, the coarser the stronger, as in photographs
        picture = np.zeros((375, 500, 3))
        for scale in (2, 4, 8, 16, 32, 64, 128):
            noise = random.randint(0, 256, (375 // scale + 2, 500 // scale + 2, 3)).astype(np.uint8)
            picture += (
                np.asarray(Image.fromarray(noise).resize((500, 375), Image.BICUBIC)) - 128.0
            ) * scale**0.7
        picture = (128 + 50 * picture / picture.std()).clip(0, 255).astype(np.uint8)
        Image.fromarray(picture).save(path / f"{i:02}.jpg", quality=90)
    size = sum(file.stat().st_size for file in path.iterdir()) / 64e3
    images = train_ae.Images(str(path))
    batches = train_ae.Batches(images, functools.partial(train_ae.augment, 256, 0, True))
    bicubic, to_bytes = transforms.InterpolationMode.BICUBIC, transforms.PILToTensor()
    crop, flip = (
        transforms.RandomResizedCrop(256, (0.75, 1.0), interpolation=bicubic),
        transforms.RandomHorizontalFlip(),
    )
    load = lambda file: to_bytes(flip(crop(Image.open(file).convert("RGB"))))
    ours = lambda: batches[[(i, 0, False) for i in range(64)]][0]
    same = [
        torch.manual_seed(train_ae.seed_of(0, 0, i)) and load(file) for i, file in enumerate(images.files)
    ]
    assert torch.equal(ours(), torch.stack(same)) and torch.get_num_threads() == 1  # nothing else is compared
    return {"ours": ours, "units": 64, "unit": "images/s a core", "note": f"500 x 375, {size:.0f} kB",
            "peer": lambda: torch.stack([load(file) for file in images.files]),
            "peer_name": version("torchvision")}  # fmt: skip


@row("latent cache")
def latent_cache():
    path = folder()
    np.save(path / "moments-00000.npy", np.zeros((1024, 2, 32, 32, 32), np.float16))
    np.save(path / "labels-00000.npy", np.zeros(1024, np.int64))
    cache = train_dit.Cache(str(path), argparse.Namespace(digits=False))
    order = np.random.RandomState(0).permutation(1024)
    keys = [[(int(i), 0, True) for i in order[j : j + 32]] for j in range(0, 1024, 32)]
    return {"ours": lambda: [cache[key] for key in keys], "units": 1024, "unit": "moments/s"}


@row("Inception features beside pytorch-fid", "pytorch_fid.inception", "pytorch-fid")
@row(
    "Inception features beside torch-fidelity",
    "torch_fidelity.feature_extractor_inceptionv3",
    "torch-fidelity",
)
def inception(module, package):
    """In float32 on a GPU, too, ours and theirs; each with the peer's resizing."""
    net = fid.InceptionV3(half_pixel=package == "pytorch-fid")
    state = copy.deepcopy(net.state_dict())
    net, batch = net.fuse().to(DEVICE), 64 if CUDA else 16
    x = torch.randint(0, 256, (batch, 3, 256, 256), dtype=torch.uint8, device=DEVICE)
    spec = {"ours": lambda: net(x), "units": batch, "unit": "images/s", "flops": batch * counted(lambda: net(x[:1])),
            "arithmetic": "float32", "note": f"batch {batch}"}  # fmt: skip
    if theirs := installed(module):
        if package == "pytorch-fid":
            theirs.load_state_dict_from_url = lambda *args, **kwargs: state
            model = theirs.InceptionV3([3]).eval().to(DEVICE)
            call = lambda: model(x.float() / 255)[0].flatten(1)
        else:
            file = folder() / "weights.pth"
            torch.save(state, file)
            model = theirs.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file)
            ).to(DEVICE)
            call = lambda: model(x)[0]

        @torch.no_grad()
        def peer():
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                return call()

        torch.testing.assert_close(net(x)[0], peer(), rtol=1e-3, atol=1e-3 * net(x)[0].abs().max().item())
        spec |= {"peer": peer, "peer_name": version(package)}
    return spec


@row("Frechet distance, 2,048 dimensions")
def frechet_distance():
    from scipy.linalg import sqrtm

    random, mu = np.random.RandomState(0), np.zeros(2048)
    a, b = (np.cov(random.standard_normal((4096, 2048)) * random.rand(2048), rowvar=False) for _ in range(2))
    return {"ours": lambda: fid.frechet_distance(mu, a, mu, b), "peer_name": "scipy's sqrtm",
            "peer": lambda: np.trace(a + b - 2 * sqrtm(a @ b).real)}  # fmt: skip


@row("precision and recall, 2,048 dimensions")
def precision_recall():
    n = 10000 if CUDA else 2048
    ref, samples = (torch.randn(n, 2048, device=DEVICE) for _ in range(2))
    return {"ours": lambda: fid.precision_recall(ref, samples), "flops": 3 * 2 * n * n * 2048, "arithmetic": "float64",
            "note": f"{n:,} beside {n:,}"}  # fmt: skip


# ---- Whole processes ----


def script(*command, **variables):
    subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | variables,
    )


@row("processes: two of one thread beside one of two")
def processes():
    """Steps a second by the log, without the start."""
    if len(os.sched_getaffinity(0)) < 2:
        return []
    model = ("--hidden_size", 192, "--depth", 6, "--decoder_depth", 6, "--num_heads", 6)
    flags = (
        "--model",
        "vmae",
        *model,
        "--batch",
        64,
        "--steps",
        100,
        "--log_every",
        20,
        "--ckpt_every",
        10**6,
    )

    def step_seconds(world):
        out = folder()
        start = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2") if world > 1 else ()
        script(*start, "train_ae.py", *flags, "--device", "cpu", "--out", out, OMP_NUM_THREADS=str(3 - world))
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return 64 / statistics.median(line["images_per_s"] for line in lines[-4:])

    return {"ours": lambda: step_seconds(2), "peer": lambda: step_seconds(1), "peer_name": "one process",
            "unit": "steps/s", "own_clock": True, "warm_up": 0, "note": "VMAE of the demo, wider, on the CPU"}  # fmt: skip


@row("start")
def start():
    def first_line():
        with subprocess.Popen(
            [sys.executable, "train_ae.py", "--out", str(folder())],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert any(line.startswith("step 1/") for line in process.stdout)
            process.kill()

    return [
        {"name": "train_ae.py --help", "ours": lambda: script("train_ae.py", "--help")},
        {"name": "train_ae.py, to the demo's first log line", "ours": first_line},
    ]


@row("demo")
def demo():
    out = folder()
    commands = {
        "train_ae.py": ("--out", out / "vmae"),
        "train_dit.py": ("--ae", out / "vmae" / "ckpt.pt", "--out", out / "dit"),
        "sample.py": ("--ckpt", out / "dit" / "ckpt.pt"),
    }
    return [{"name": f"the demo's {file}, whole", "ours": functools.partial(script, file, *flags), "warm_up": 0,
             "rounds": 1} for file, flags in commands.items()]  # fmt: skip


# ---- The table ----


def run_row(name, rounds):
    """In this process -> the row's lines, or the rate of products."""
    ae.choose_device(None)  # as the scripts, TF32 for float32
    torch.manual_seed(0)
    if name.startswith("products "):
        return products(name.split()[1])
    specs = ROWS[name]()
    return [
        measure(**{"name": name, "rounds": rounds, **spec})
        for spec in (specs if isinstance(specs, list) else [specs])
    ]


def in_child(name, rounds):
    """The same from a process of its own, or the last line of what went wrong."""
    file = folder() / "row.json"
    command = [sys.executable, __file__, "--row", name, "--rounds", str(rounds), "--json", str(file)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return None
    return json.loads(file.read_text())


def machine():
    if CUDA:
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def show(x):
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="write the table there, too")
    parser.add_argument("--only", nargs="+", help="rows whose names hold one of these words")
    parser.add_argument("--rounds", type=int, default=5, help="of each row, after a warm-up (default: 5)")
    parser.add_argument("--demo", action="store_true", help="the demo's three commands, too: minutes")
    parser.add_argument("--row", choices=[*ROWS, *(f"products {x}" for x in ("bfloat16", "TF32", "float32", "float64"))],
                        metavar="NAME", help="one row, in this process")  # fmt: skip
    args = parser.parse_args()
    if args.row:
        result = json.dumps(run_row(args.row, args.rounds), indent=1)
        Path(args.json).write_text(result) if args.json else print(result)
        return
    print(f"{machine()}; {torch.get_num_threads()} threads, PyTorch {torch.__version__}\n")
    print(
        "| work | ours | peer | ratio | TFLOP/s | share of products | peak memory |\n|---|---|---|---|---|---|---|"
    )
    lines, rates, failed = [], {}, []
    for name in ROWS:
        if (
            args.only
            and not any(word.lower() in name.lower() for word in args.only)
            or name == "demo"
            and not args.demo
        ):
            continue
        made = in_child(name, args.rounds)
        failed += [name] * (made is None)
        for line in made if made is not None else [{"work": name, "failed": True}]:
            cells = [line["work"], "failed"] + ["-"] * 5
            if "ours" in line:
                cells[1] = f"{show(line['ours'])} {line['unit']}"
            if "peer" in line:
                cells[2:4] = f"{show(line['peer'])} {line['peer_name']}", f"{line['ratio']:.2f}"
                if line["peer_name"] == "without LPIPS":
                    line["lpips_share"] = 1 - line["ratio"]
                    cells[0] += f" ({line['lpips_share']:.0%} of the time)"
            if "flops" in line:
                kind = line["arithmetic"]
                rates[kind] = rates.get(kind) or in_child(f"products {kind}", 1)
                line["share"] = line["flops"] / rates[kind]
                cells[4:6] = f"{line['flops'] / 1e12:.3g}", f"{line['share']:.0%} of {kind}"
            if "peak_bytes" in line:
                cells[6] = f"{line['peak_bytes'] / 2 ** 30:.2f} GiB"
            lines.append(line)
            print("| " + " | ".join(cells) + " |", flush=True)
        if "training" in name and not CUDA:
            print(f"| {name}{GPU_MODE} | not measured: no GPU | - | - | - | - | - |")
    print("\nproducts: " + ", ".join(f"{kind} {rate / 1e12:.3g} TFLOP/s" for kind, rate in rates.items()))
    print("ratio: the peer's time over ours, above 1 ours is the faster")
    if args.json:
        table = {"machine": machine(), "torch": torch.__version__, "products": rates, "rows": lines}
        Path(args.json).write_text(json.dumps(table, indent=1))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
