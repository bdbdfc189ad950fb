"""Throughput beside the alternatives, as one Markdown table: the machine, then a line for each piece of work.

    python tests/bench.py --json bench.json        the table as a file, too
    python tests/bench.py --demo                   with the demo's three commands, which take minutes
    python tests/bench.py --only training guided   rows whose names hold one of these words
    python tests/bench.py --row "latent cache"     one row, in this process, as JSON

Each row runs in a process of its own, so that its peak memory is its own: on a CPU the process's largest
resident set, on a GPU PyTorch's largest allocation after the warm-up, the peer's included. Ours and the
peer, where it is installed, take turns round by round: medians, and the median of the rounds' ratios.
Training rows time train_ae.Run.step and what the scripts do around it, all but the loading. FLOP/s are of
forward and backward passes, a multiply and an add two; their share is of the rate of square matrix products
in the same arithmetic. Weights are random.
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
import re
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
AUTOCAST = "bfloat16" if CUDA else "float32"  # the arithmetic of training and encoding
TF32 = "TF32" if CUDA else "float32"  # of what the scripts run in float32
GPU_MODE = ", bfloat16, compiled"
ROWS = {}  # name -> function of the name, which returns what measure takes, a dict or several
autocast = functools.partial(torch.autocast, DEVICE, torch.bfloat16)


def rows(*names):
    return lambda function: ROWS.update(dict.fromkeys(names, function))


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


def measure(name, rounds, ours, per=(1, "s"), peer=None, flops=None, note="", **how):
    """A line of the table. per: units of a call, their name; peer: name, function; flops: number, arithmetic.

    how: warm_up, calls before; clock, what times a call; check, called at the end; training, or not.
    """
    functions, repeats, clock = [ours, *([peer[1]] if peer else [])], [], how.get("clock", seconds)
    for function in functions:
        took = [clock(function) for _ in range(how.get("warm_up", 3 if CUDA else 1))]
        repeats.append({"repeat": math.ceil(0.5 / took[-1])} if took and took[-1] < 0.5 else {})
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    times = [[clock(f, **repeat) for f, repeat in zip(functions, repeats)] for _ in range(rounds)]
    how.get("check", lambda: None)()
    medians = [statistics.median(column) for column in zip(*times)]
    values = medians if per[1] == "s" else [per[0] / median for median in medians]
    line = {"work": f"{name}, {note}" if note else name, "ours": values[0], "unit": per[1], "rounds": rounds}
    if peer:
        ratio = statistics.median(theirs / mine for mine, theirs in times)
        line |= {"peer": values[1], "peer_name": peer[0], "ratio": ratio}
    if flops:
        line |= {"flops": flops[0] / medians[0], "arithmetic": flops[1]}
    if "training" in how:
        unit = 1 if sys.platform == "darwin" else 1024
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        line["peak_bytes"] = torch.cuda.max_memory_allocated() if CUDA else resident
    return line


def products(arithmetic):
    """FLOP/s of the best of several square matrix products, normal inputs."""
    dtype = torch.float32 if arithmetic == "TF32" else getattr(torch, arithmetic)
    torch.set_float32_matmul_precision("high" if arithmetic == "TF32" else "highest")
    best, repeat, rounds = 0.0, *((10, 10) if CUDA else (1, 3))
    for n in (2048, 4096, 8192):
        a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
        a @ b
        best = max(best, *(2 * n**3 / seconds(lambda: a @ b, repeat) for _ in range(rounds)))
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


# ---- Training ----


def training(make, batch, ema=False, without=None, compiles=CUDA):
    """make(device, batch) -> networks, what of them to compile, gradients(step) -> terms.

    without: name and keyword arguments of other gradients, which are the peer. compiles: whether it is to be
    compiled, as the scripts do by default on a GPU, and on a CPU with --compile.
    """
    flops = batch * counted(make("meta", 1)[2])
    nets, compiled, gradients = make(DEVICE, batch)
    average = copy.deepcopy(nets[0]).eval().requires_grad_(False) if ema else None
    optimizers = []
    for net in nets:
        trained = [p for p in net.parameters() if p.requires_grad]
        groups = [{"params": [p for p in trained if (p.ndim > 1) == matrix]} for matrix in (True, False)]
        optimizers.append(torch.optim.AdamW(groups, 1e-4, (0.9, 0.95), weight_decay=0, fused=True))
    args = argparse.Namespace(device=DEVICE, out=str(folder()), batch=batch, grad_clip=math.inf)
    args.log_every = args.ckpt_every = args.steps = 10**9
    run = train_ae.Run(args, 0, 1, None)
    for number in train_ae.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    for part in compiled if compiles else ():
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

    peer = without and (without[0], lambda: step(**without[1]))
    mode = GPU_MODE if CUDA else ", compiled" * compiles
    how = {"per": (batch, "images/s"), "note": f"batch {batch}{mode}", "check": check}
    return {"ours": step, "peer": peer, "flops": (flops, AUTOCAST), "training": True, **how}


@rows("DiT-B/1 training")
def dit_training(name):
    def make(device, batch):
        net = dit.DiT_models["DiT-B/1"](input_size=32, in_channels=16, num_classes=1000).to(device)
        moments, y = torch.randn(batch, 32, 32, 32, device=device), torch.arange(batch, device=device)

        def gradients(step=0, eager=False):
            draw = None if device == "meta" else train_ae.generator(device, 0, step)
            randn = functools.partial(torch.randn, generator=draw, device=device)
            posterior_noise, noise = randn(batch, 16, 32, 32), randn(batch, 16, 32, 32)
            t, dropped = randn(batch).sigmoid(), torch.rand(batch, generator=draw, device=device) < 0.1
            x1 = ae.Posterior(moments).sample(posterior_noise)
            with autocast(enabled=CUDA):
                # Module.compile leaves forward as it was
                model = net.forward if eager else net
                loss = dit.flow_loss(model, x1, torch.where(dropped, 1000, y), noise, t)
            loss.backward()
            return {"loss": loss.detach()}

        return [net], [net], gradients

    compiles = CUDA or shutil.which("g++") is not None
    peer = ("eager", {"eager": True}) if compiles else None
    return training(make, 32 if CUDA else 2, ema=True, without=peer, compiles=compiles)


@rows(
    *("VMAE training at 128", "VMAE training at 128 with LPIPS"),
    *("VMAE training at 256", "VMAE training at 256 with LPIPS"),
    "SD-VAE training at 256 with LPIPS, discriminator",
)
def autoencoder_training(name):
    size, lpips, adversarial = int(name.split()[3]), "LPIPS" in name, "discriminator" in name

    def make(device, batch):
        net = ae.SDVAE() if adversarial else ae.VMAE(size)
        nets, compiled, distance = [net.to(device)], [net], None
        if adversarial:
            disc = ae.Discriminator().to(device)
            nets, compiled = [net, disc], [net.encoder, net.decoder.mid_block, *net.decoder.up_blocks]
        if lpips:  # as ae.lpips_vgg, but for the weights
            vgg = importlib.import_module("lpips").LPIPS(net="vgg", pnet_rand=True, verbose=False)
            vgg = vgg.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
            distance = lambda x_hat, x: vgg(x_hat, x).mean()
        x = torch.randn(batch, 3, size, size, device=device).clamp(-1, 1)

        def gradients(step=0, perceptual=distance):
            seed = (device, 0, step)
            draws = net.randomness(batch, size, train_ae.generator(*seed)) if device != "meta" else {}
            with autocast(enabled=CUDA):
                loss, terms, x_hat = net(x, perceptual=perceptual, **draws)
                if adversarial:  # as train_ae.main
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
            if adversarial:
                loss_d.backward()
            return {name: term.detach() for name, term in {"loss": loss, **terms}.items()}

        return nets, compiled, gradients

    batch = (8 if adversarial else 16384 // size) if CUDA else (1 if adversarial else 1024 // size)
    peer = ("without LPIPS", {"perceptual": None}) if lpips and not adversarial else None
    return training(make, batch, without=peer)


# ---- What does not train ----


@rows("VMAE encoding at 256", "VMAE decoding at 256", "SD-VAE encoding at 256", "SD-VAE decoding at 256")
def codec(name):
    """Encoding as train_dit.py does it, in bfloat16 on a GPU; decoding as sample.py does, in float32."""
    encode, conv, batch = "encoding" in name, "SD" in name, 16 if CUDA else 1
    net = (ae.SDVAE if conv else ae.VMAE)().eval().requires_grad_(False)
    inputs = torch.randn(batch, *((3, 256, 256) if encode else (16, 32, 32)))
    flops = batch * 1e9 * train_ae.gflops(net, inputs[:1], method="encode" if encode else "decode")
    net, inputs, peer = net.to(DEVICE), inputs.to(DEVICE), None
    precision = autocast(enabled=CUDA and encode)
    ours = precision(lambda: net.encode(inputs).mean if encode else net.decode(inputs))
    if conv and (diffusers := installed("diffusers")):
        blocks = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4, (128, 256, 512, 512), 2
        theirs = diffusers.AutoencoderKL(
            3, 3, *blocks, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False
        )
        theirs.load_state_dict(net.state_dict())
        theirs = theirs.eval().requires_grad_(False).to(DEVICE)
        call = lambda: theirs.encode(inputs).latent_dist.mean if encode else theirs.decode(inputs).sample
        peer = version("diffusers"), precision(call)
        assert (peer[1]() - ours()).abs().max() < (0.1 if CUDA and encode else 1e-3), "not the same outputs"
    flops, note = (flops, AUTOCAST if encode else TF32), f"batch {batch}"
    return dict(ours=ours, peer=peer, per=(batch, "images/s"), flops=flops, note=note)


@rows("DiT-B/1 sampling, guided")
def sampling(name):
    net = dit.DiT_models["DiT-B/1"](input_size=32, in_channels=16, num_classes=1000).eval()
    batch, steps, evaluated = *((64, 20) if CUDA else (1, 4)), []
    y, noise = torch.zeros(batch, dtype=torch.long), torch.randn(batch, 16, 32, 32)
    stub = lambda x, t, y: evaluated.append(len(x)) or x
    stub.num_classes, stub.class_dropout_prob = 1000, 0.1
    dit.sample(stub, noise[:1], y[:1], steps)
    done = sum(evaluated)  # evaluations an image: guided steps have two
    dit.sample(stub, noise[:1], y[:1], 250)
    flops = batch * done * 1e9 * train_ae.gflops(net, noise[:1], torch.zeros(1), y[:1])
    net, y, noise = net.to(DEVICE), y.to(DEVICE), noise.to(DEVICE)
    per = batch * done / (sum(evaluated) - done), "images/s of 250 steps"
    ours = lambda: dit.sample(net, noise, y, steps)
    return dict(ours=ours, per=per, flops=(flops, TF32), note=f"batch {batch}")


@rows("loading of JPEGs")
def image_loading(name):
    """Cropped, resized, flipped, on one core; both yield the same pixels to 1/255, but for single ones."""
    from torchvision import datasets
    from torchvision import transforms as T

    torch.set_num_threads(1)
    path, random = folder() / "noise", np.random.RandomState(0)
    path.mkdir()
    for i in range(64):  # noise at several scales, the coarser the stronger, as in photographs
        picture = 0
        for scale in (1, 2, 4, 8, 16, 32, 64, 128):
            noise = random.randint(0, 256, (375 // scale + 2, 500 // scale + 2, 3)).astype(np.uint8)
            noise = np.asarray(Image.fromarray(noise).resize((500, 375), Image.BICUBIC)) - 128.0
            picture = picture + noise * scale**0.4
        picture = (128 + 55 * picture / picture.std()).clip(0, 255).astype(np.uint8)
        Image.fromarray(picture).save(path / f"{i:02}.jpg", quality=90)
    size = sum(file.stat().st_size for file in path.iterdir()) / 64e3
    images = train_ae.Images(str(path))
    batches = train_ae.Batches(images, functools.partial(train_ae.augment, 256, 0, True))
    crop = T.RandomResizedCrop(256, (0.75, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    transform = T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor()])
    dataset = datasets.ImageFolder(path.parent, transform)
    ours = lambda: batches[[(i, 0, False) for i in range(64)]]
    theirs = lambda: torch.utils.data.default_collate([dataset[i] for i in range(64)])
    seeds = [train_ae.seed_of(0, 0, i) for i in range(64)]  # as train_ae.augment's
    same = torch.stack([torch.manual_seed(seed) and dataset[i][0] for i, seed in enumerate(seeds)])
    levels = (ours()[0] - (same * 255).round()).abs()
    assert levels.max() <= 2 and (levels > 1).float().mean() < 2e-6 and torch.get_num_threads() == 1
    peer, note = (version("torchvision"), theirs), f"500 x 375 of {size:.0f} kB, to 256"
    return dict(ours=ours, peer=peer, per=(64, "images/s a core"), note=note)


@rows("latent cache")
def latent_cache(name):
    path = folder()
    np.save(path / "moments-00000.npy", np.zeros((1024, 2, 32, 32, 32), np.float16))
    np.save(path / "labels-00000.npy", np.zeros(1024, np.int64))
    cache = train_dit.Cache(str(path), argparse.Namespace(digits=False))
    order = np.random.RandomState(0).permutation(1024)
    keys = [[(int(i), 0, True) for i in order[j : j + 32]] for j in range(0, 1024, 32)]
    return {"ours": lambda: [cache[key] for key in keys], "per": (1024, "moments/s")}


@rows("Inception features beside pytorch-fid", "Inception features beside torch-fidelity")
def inception(name):
    """In float32 on a GPU, too, ours and theirs; each with the peer's resizing."""
    package, peer = name.split()[-1], None
    net = fid.InceptionV3(half_pixel=package == "pytorch-fid")
    file, batch = folder() / "weights.pth", 64 if CUDA else 16
    torch.save(net.state_dict(), file)
    net = net.fuse().to(DEVICE)
    x = torch.randint(0, 256, (batch, 3, 256, 256), dtype=torch.uint8, device=DEVICE)
    if package == "pytorch-fid" and (theirs := installed("pytorch_fid.inception")):
        theirs.load_state_dict_from_url = lambda *args, **kwargs: torch.load(file, weights_only=True)
        model = theirs.InceptionV3([3]).eval().to(DEVICE)
        peer = lambda: model(x.float() / 255)[0].flatten(1)
    if package == "torch-fidelity" and (theirs := installed("torch_fidelity.feature_extractor_inceptionv3")):
        how = {"feature_extractor_weights_path": str(file)}
        model = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], **how).to(DEVICE)
        peer = lambda: model(x)[0]
    if peer:
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        peer = version(package), torch.no_grad()(exact(peer))
        torch.testing.assert_close(net(x)[0], peer[1](), rtol=1e-3, atol=1e-3)
    flops, note = (batch * counted(lambda: net(x[:1])), "float32"), f"batch {batch}"
    return dict(ours=lambda: net(x), peer=peer, per=(batch, "images/s"), flops=flops, note=note)


@rows("Frechet distance, 2,048 dimensions")
def frechet_distance(name):
    from scipy.linalg import sqrtm

    random, mu = np.random.RandomState(0), np.zeros(2048)
    a, b = (np.cov(random.standard_normal((4096, 2048)) * random.rand(2048), rowvar=False) for _ in range(2))
    theirs = lambda: np.trace(a + b - 2 * sqrtm(a @ b).real)
    return {"ours": lambda: fid.frechet_distance(mu, a, mu, b), "peer": ("scipy's sqrtm", theirs)}


@rows("precision and recall, 2,048 dimensions")
def precision_recall(name):
    n = 10000 if CUDA else 2048
    ref, samples = (torch.randn(n, 2048, device=DEVICE) for _ in range(2))
    ours, flops = lambda: fid.precision_recall(ref, samples), (3 * 2 * n * n * 2048, "float64")
    return {"ours": ours, "flops": flops, "note": f"{n:,} beside {n:,}"}


# ---- Whole processes ----


def script(*command, **variables):
    command, variables = [sys.executable, *map(str, command)], os.environ | variables
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=variables)


@rows("two processes of one thread beside one of two")
def processes(name):
    """Images a second by the log, without the start."""
    wider = "--hidden_size 192 --depth 6 --decoder_depth 6 --num_heads 6".split()

    def step_seconds(flags, batch, *start, threads):
        out, logged = folder(), 2560 // batch
        flags = (*flags, "--batch", batch, "--steps", 5 * logged, "--log_every", logged, "--out", out)
        flags = ("train_ae.py", "--device", "cpu", "--ckpt_every", 10**6, *flags)
        script(*start, *flags, OMP_NUM_THREADS=threads)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return batch / statistics.median(line["images_per_s"] for line in lines[-4:])

    def line(note, flags, batch):
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
        ours = functools.partial(step_seconds, flags, batch, *torchrun, threads="1")
        peer = ("one process", functools.partial(step_seconds, flags, batch, threads="2"))
        how = {"clock": lambda function: function(), "warm_up": 0, "per": (batch, "images/s")}
        return {"ours": ours, "peer": peer, "note": f"{note}, batch {batch}", **how}

    return [line("the demo's VMAE", [], 64), *(line("a wider one", wider, batch) for batch in (64, 256))]


@rows("start")
def start(name):
    def first_line():
        command = [sys.executable, "train_ae.py", "--out", str(folder())]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert any(line.startswith("step 1/") for line in process.stdout)
            process.kill()

    to_first = {"name": "train_ae.py, to the demo's first log line", "ours": first_line}
    return [{"name": "train_ae.py --help", "ours": lambda: script("train_ae.py", "--help")}, to_first]


@rows("demo")
def demo(name):
    out = folder()
    vmae, of_dit = ("train_ae.py", "--out", out / "vmae"), ("sample.py", "--ckpt", out / "dit" / "ckpt.pt")
    commands = [vmae, ("train_dit.py", "--ae", out / "vmae" / "ckpt.pt", "--out", out / "dit"), of_dit]
    calls = {f"the demo's {command[0]}, whole": functools.partial(script, *command) for command in commands}
    return [{"name": name, "ours": call, "warm_up": 0, "rounds": 1} for name, call in calls.items()]


# ---- The table ----


def run_row(name, rounds):
    """In this process -> the row's lines, or the rate of products."""
    ae.choose_device(None)  # as the scripts: TF32 for float32
    torch.manual_seed(0)
    if name.startswith("products "):
        return products(name.split()[1])
    made = ROWS[name](name)
    made = made if isinstance(made, list) else [made]
    return [measure(**{"name": name, "rounds": rounds, **line}) for line in made]


def in_child(name, rounds=1):
    """The same from a process of its own; None if that failed."""
    file = folder() / "row.json"
    command = [sys.executable, __file__, "--row", name, "--rounds", str(rounds), "--json", str(file)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return None
    return json.loads(file.read_text())


def machine():
    info = Path("/proc/cpuinfo")
    names = re.findall("model name.*: (.*)", info.read_text()) if info.exists() else [platform.processor()]
    cpu = f"{(names or [platform.machine()])[0]}, {os.cpu_count()} cores"
    name = torch.cuda.get_device_name() if CUDA else cpu
    return f"{name}; {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def show(x):
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def print_line(line, rates):
    cells = [line["work"], f"{show(line['ours'])} {line['unit']}"] + ["-"] * 5
    if "peer" in line:
        cells[2:4] = f"{show(line['peer'])} {line['peer_name']}", f"{line['ratio']:.2f}"
        if line["peer_name"] == "without LPIPS":
            line["lpips_share"] = 1 - line["ratio"]
            cells[0] += f" ({line['lpips_share']:.0%} of the time)"
    if "flops" in line:
        kind = line["arithmetic"]
        rates[kind] = rates.get(kind) or in_child(f"products {kind}")
        line["share"] = line["flops"] / (rates[kind] or math.nan)
        cells[4:6] = f"{line['flops'] / 1e12:.3g}", f"{line['share']:.0%} of {kind}"
    if "peak_bytes" in line:
        cells[6] = f"{line['peak_bytes'] / 2**30:.2f} GiB"
    print("| " + " | ".join(cells) + " |", flush=True)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--json", help="write the table there, too")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose names hold one of these words")
    parser.add_argument("--rounds", type=int, default=5, help="of each row, after a warm-up (default: 5)")
    parser.add_argument("--demo", action="store_true", help="the demo's three commands, too: minutes")
    kinds = [f"products {kind}" for kind in ("bfloat16", "TF32", "float32", "float64")]
    parser.add_argument("--row", choices=[*ROWS, *kinds], metavar="NAME", help="one row, in this process")
    args = parser.parse_args()
    if args.row:
        result = json.dumps(run_row(args.row, args.rounds), indent=1)
        return Path(args.json).write_text(result) if args.json else print(result)

    print(machine() + "\n\n| work | ours | peer | ratio | TFLOP/s | share of products | peak memory |")
    print("|---" * 7 + "|", flush=True)
    table, rates, failed = [], {}, []
    for name in ROWS:
        if not any(word.lower() in name.lower() for word in args.only) or name == "demo" and not args.demo:
            continue
        lines = in_child(name, args.rounds)
        if lines is None:
            failed.append(name)
            print(f"| {name} | failed" + " | -" * 5 + " |", flush=True)
        for line in lines or []:
            print_line(line, rates)
            table.append(line)
        if not CUDA and any("arithmetic" in line for line in lines or []):
            print(f"| {name}, on a GPU | not measured: no GPU" + " | -" * 5 + " |")
    print(
        "\nProducts: "
        + ", ".join(f"{kind} {rate / 1e12:.3g} TFLOP/s" for kind, rate in rates.items() if rate)
    )
    print("Ratio: the peer's time over ours; above 1 ours is the faster.")
    if args.json:
        whole = {"machine": machine(), "products": rates, "rows": table, "failed": failed}
        Path(args.json).write_text(json.dumps(whole, indent=1))
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
