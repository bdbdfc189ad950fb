"""Throughput beside the alternatives, as a section of tests/BENCH.md.

    python tests/bench.py | tee -a tests/BENCH.md  all rows
    python tests/bench.py --json bench.json        write the table as JSON, too
    python tests/bench.py --demo                   add the demo's four commands, which take minutes
    python tests/bench.py --only training guided   the rows whose names hold one of these words
    python tests/bench.py --row "latent cache"     one row, in this process, as JSON

Each row runs in a process of its own, so that its peak memory is its own: on a CPU the largest
resident set of the process, on a GPU the largest allocation of PyTorch after the warm-up; both
include the peer's. Our code and the peer, where one is installed, take turns round by round. The
table has the medians, and the median of the rounds' ratios.

Training rows time a whole step of the training scripts, except for the loading of images. The rows
of the paper's recipes are the first steps of the scripts themselves, to see whether each recipe's
micro-batch fits the A100 of 40 GB that it is meant for; they need a GPU.

FLOP/s are those of forward and backward passes, a multiply and an add counted as two; their share
is that of the rate of square matrix products in the same arithmetic, and in bfloat16 also that of
the GPU's peak by its data sheet, the MFU. Weights are random.
"""

import argparse
import atexit
import contextlib
import copy
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ae
import dit
import fid
import sample
import train_ae
import train_dit

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The arithmetic of products in float32, as the scripts set it.
TF32 = "TF32" if CUDA else "float32"

# Dense products in bfloat16 that GPUs can do, in TFLOP/s, from their makers' data sheets.
PEAKS = {
    "A10": 125,
    "A30": 165,
    "A40": 150,
    "A100": 312,
    "L4": 121,
    "L40": 181,
    "L40S": 362,
    "H100": 989,
    "H100 PCIe": 756,
    "H200": 989,
    "B200": 2250,
    "RTX 3090": 71,
    "RTX 4090": 165,
    "RTX 5090": 209,
    "RTX A6000": 155,
    "RTX 6000 Ada": 364,
}

# The functions that make the rows, by name. Each takes the row's name and returns the arguments of
# measure, or a list of them if the row has several lines.
ROWS = {}


def rows(*names):
    """A decorator: the function makes the rows of these names."""

    def register(function):
        ROWS.update(dict.fromkeys(names, function))
        return function

    return register


def seconds(function, repeat=1):
    """How long one of `repeat` calls takes, including the device's work."""
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        function()
    if CUDA:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeat


def measure(
    name,
    rounds,
    ours,
    peer=None,  # its name and the function that does the same work
    per=(1, "s"),  # the units of work in a call, and what they are called
    flops=None,  # those of a call, and their arithmetic
    note="",  # is added to the name
    warm_up=3 if CUDA else 1,  # calls before the first round
    clock=seconds,  # (function, repeat) -> seconds
    check=None,  # is called at the end
    memory=False,  # whether to report the peak memory
    memory_goal=None,  # what it is to stay below, in words
):
    """A line of the table, as a dict."""
    functions = [ours]
    if peer:
        functions.append(peer[1])

    # In each round a function is called for half a second at least.
    repeats = []
    for function in functions:
        took = [clock(function, 1) for _ in range(warm_up)]
        repeats.append(math.ceil(0.5 / took[-1]) if took else 1)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    times = [[clock(f, repeat) for f, repeat in zip(functions, repeats)] for _ in range(rounds)]
    if check:
        check()

    medians = [statistics.median(column) for column in zip(*times)]
    values = medians if per[1] == "s" else [per[0] / median for median in medians]
    work = f"{name}, {note}" if note else name
    line = {"work": work, "ours": values[0], "unit": per[1], "rounds": rounds}
    if peer:
        ratio = statistics.median(theirs / mine for mine, theirs in times)
        line |= {"peer": values[1], "peer_name": peer[0], "ratio": ratio}
    if flops:
        line |= {"flops": flops[0] / medians[0], "arithmetic": flops[1]}
    if memory:
        # macOS counts bytes, Linux KiB.
        unit = 1 if sys.platform == "darwin" else 1024
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        line["peak_bytes"] = torch.cuda.max_memory_allocated() if CUDA else resident
    if memory_goal:
        line["memory_goal"] = memory_goal
    return line


def products(arithmetic):
    """FLOP/s of the fastest of several products of square matrices with normal entries."""
    dtype = torch.float32 if arithmetic == "TF32" else getattr(torch, arithmetic)
    torch.set_float32_matmul_precision("high" if arithmetic == "TF32" else "highest")
    repeat, rounds = (10, 10) if CUDA else (1, 3)
    best = 0.0
    for n in (2048, 4096, 8192):
        a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
        multiply = functools.partial(torch.matmul, a, b)
        multiply()
        best = max(best, *(2 * n**3 / seconds(multiply, repeat) for _ in range(rounds)))
    return best


def peak_of(gpu):
    """Dense bfloat16 FLOP/s of a GPU by its name, such as "NVIDIA A100-SXM4-40GB", or None."""
    # Not a card of another make that has the name in its own, nor a slice of a card.
    names = [name for name in PEAKS if re.search(rf"\b{name}\b(?! (Laptop|Ti|D|NVL)\b)", gpu)]
    return PEAKS[max(names, key=len)] * 1e12 if names and "MIG" not in gpu else None


def count_flops(function):
    """FLOPs of a call, a multiply and an add counted as two."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def folder():
    """A new folder, which is removed when the process ends."""
    path = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def installed(module):
    """The module, or None if it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def version(package):
    return f"{package} {importlib.metadata.version(package)}"


# ---- Training ----


LR = 1e-4  # any: nothing is learned here


def settings(batch, compiles=CUDA):
    """The settings of a training step of this many images, as the scripts choose them here.

    compiles: whether the network is compiled, which on a CPU needs --compile 1.
    """
    ampere = CUDA and torch.cuda.get_device_capability() >= (8, 0)
    return argparse.Namespace(
        batch=batch,
        dtype="bfloat16" if ampere else "float32",
        compile=compiles,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        grad_clip=math.inf,
    )


def autocast(args):
    return torch.autocast(DEVICE, torch.bfloat16, enabled=args.dtype == "bfloat16")


def training(args, step, skipped, flops, peer):
    """The arguments of measure for a step of training.

    skipped: a list of numbers on the device, to which step adds 1 if it changed nothing, else 0;
    flops: those per image.
    """

    def check():
        assert not torch.stack(skipped).any(), "steps were skipped, so this is not their time"

    note = f"batch {args.batch}"
    if args.dtype == "bfloat16":
        note += ", bfloat16"
    if args.compile:
        note += ", compiled"
    return {
        "ours": step,
        "peer": peer,
        "per": (args.batch, "images/s"),
        "flops": (args.batch * flops, "bfloat16" if args.dtype == "bfloat16" else TF32),
        "note": note,
        "check": check,
        "memory": True,
    }


@rows("DiT-B/1 training")
def dit_training(name):
    batch = 32 if CUDA else 2
    args = settings(batch, compiles=CUDA or shutil.which("g++") is not None)
    net = dit.DiT_models["DiT-B/1"](input_size=32, in_channels=16, num_classes=1000)
    flops = dit_training_flops(net)
    net.to(DEVICE)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, LR, args.betas, weight_decay=0, fused=True)
    if args.compile:
        net.compile(dynamic=False)
    moments = torch.randn(batch, 32, 32, 32, device=DEVICE)
    y = torch.arange(batch, device=DEVICE)
    skipped = []

    def step(model=net):
        """A step as in train_dit.train."""
        rng = {"generator": sample.generator(DEVICE, sample.STEP, 0, len(skipped))}
        rng["device"] = DEVICE
        posterior_noise = torch.randn(batch, 16, 32, 32, **rng)
        noise = torch.randn(batch, 16, 32, 32, **rng)
        t = torch.randn(batch, **rng).sigmoid()
        dropped = torch.rand(batch, **rng) < net.class_dropout_prob

        x1 = ae.Posterior(moments).sample(posterior_noise)
        with autocast(args):
            loss = dit.flow_loss(model, x1, torch.where(dropped, 1000, y), noise, t)
        loss.backward()
        norm = clip_grad_norm_(net.parameters(), args.grad_clip)
        skip = 1 - norm.isfinite().float()
        train_ae.update(optimizer, LR, skip)
        train_dit.update_ema(ema, net, (1 - skip) * (1 - 0.9999))
        skipped.append(skip)

    peer = None
    if args.compile:
        # Module.compile leaves the method forward as it was.
        peer = ("eager", functools.partial(step, net.forward))
    return training(args, step, skipped, flops, peer)


def dit_training_flops(net):
    """FLOPs of forward and backward pass of a DiT for one image."""
    net = copy.deepcopy(net).to("meta")  # where nothing is computed
    size = net.grid * net.patch_size

    def forward_and_backward():
        x1, noise = (torch.zeros(1, net.in_channels, size, size, device="meta") for _ in range(2))
        y, t = torch.zeros(1, dtype=torch.long, device="meta"), torch.zeros(1, device="meta")
        dit.flow_loss(net, x1, y, noise, t).backward()

    return count_flops(forward_and_backward)


def random_lpips():
    """As ae.lpips_vgg, except for VGG16's weights, which need a download."""
    from lpips import LPIPS

    lpips = ae.LPIPS(LPIPS(net="vgg", pnet_rand=True, verbose=False))
    return lpips.eval().requires_grad_(False)


@rows(
    "VMAE training at 128",
    "VMAE training at 128 with LPIPS",
    "VMAE training at 256",
    "VMAE training at 256 with LPIPS",
    "SD-VAE training at 256 with LPIPS, discriminator",
)
def autoencoder_training(name):
    size, adversarial = int(name.split()[3]), "discriminator" in name
    batch = (16384 if CUDA else 1024) // size
    if adversarial:
        batch = 8 if CUDA else 1
    args = settings(batch)

    net = ae.SDVAE() if adversarial else ae.VMAE(image_size=size)
    disc = ae.Discriminator() if adversarial else None
    lpips = perceptual = None
    if "LPIPS" in name:
        lpips = random_lpips()

        def perceptual(x_hat, x):
            return lpips(x_hat, x).mean()

    flops = autoencoder_training_flops(net, size, lpips, disc)

    optimizers = [train_ae.make_optimizer(net.to(DEVICE), args)]
    if adversarial:
        optimizers.append(train_ae.make_optimizer(disc.to(DEVICE), args))
    if lpips is not None:
        lpips.to(DEVICE, memory_format=torch.channels_last)
    if args.compile:
        train_ae.compile_for_training(net, adversarial)
    x = torch.randn(batch, 3, size, size, device=DEVICE).clamp(-1, 1)
    skipped = []

    def step(perceptual=perceptual):
        """A step as in train_ae.train."""
        draws = net.randomness(batch, size, sample.generator(DEVICE, sample.STEP, 0, len(skipped)))
        with autocast(args):
            loss, _, x_hat = net(x, perceptual=perceptual, **draws)
            if adversarial:
                last_layer = net.decoder.conv_out.weight
                adv_loss, loss_d, _ = ae.adversarial_losses(disc, x, x_hat, loss, last_layer)
                loss = loss + adv_loss
        loss.backward()
        if adversarial:
            loss_d.backward()
        norms = [clip_grad_norm_(net.parameters(), args.grad_clip)]
        if adversarial:
            norms.append(clip_grad_norm_(disc.parameters(), args.grad_clip))
        skip = 1 - torch.stack(norms).isfinite().all().float()
        for optimizer in optimizers:
            train_ae.update(optimizer, LR, skip)
        skipped.append(skip)

    peer = None
    if lpips is not None and not adversarial:
        peer = ("without LPIPS", functools.partial(step, None))
    return training(args, step, skipped, flops, peer)


def autoencoder_training_flops(net, size, lpips=None, disc=None):
    """FLOPs of forward and backward pass of all that trains or judges one image."""
    net, lpips, disc = (copy.deepcopy(part) for part in (net, lpips, disc))
    for part in (net, lpips, disc):
        if part is not None:
            part.to("meta")  # where nothing is computed

    def forward_and_backward():
        x = torch.zeros(1, 3, size, size, device="meta")
        loss, _, x_hat = net(x, perceptual=lpips)
        if disc is not None:
            last_layer = net.decoder.conv_out.weight
            adv_loss, loss_d, _ = ae.adversarial_losses(disc, x, x_hat, loss, last_layer)
            loss_d.backward()
            loss = loss + adv_loss
        loss.sum().backward()

    return count_flops(forward_and_backward)


RECIPES = {f"the paper's recipe, {name}": name for name in [*train_ae.RECIPES, "dit"]}


@rows(*RECIPES)
def paper_recipe(name):
    """Three steps of a training script with the paper's settings, on images that are noise.

    The peak memory is that of the whole run: of the random numbers for the global batch, of
    gradients that accumulate, of the pictures at the end.
    """
    model = RECIPES[name]
    trainer, (recipe, _) = train_ae, train_ae.RECIPES.get(model, (None, None))
    flags = ["--model", model]
    if model == "sdvae":
        flags += ["--disc_start", "1"]
    if model == "tune":
        flags = ["--tune_decoder", "--init", random_vmae()]
    if model == "dit":
        trainer, recipe = train_dit, train_dit.RECIPE
        flags = ["--ae", random_vmae(), "--sample_steps", "2"]

    at_once = recipe["micro_batch"] or 256  # as train_ae.train, at a ViT's 128 pixels

    # Two classes of one image each; only their number matters.
    data, out = folder(), folder() / "out"
    for label in ("0", "1"):
        (data / label).mkdir()
        Image.new("RGB", (8, 8)).save(data / label / "image.png")

    def noise(dataset, keys, workers, device):
        """In place of train_ae.load_batches, so that no GPU waits for images."""
        size = recipe.get("image_size", 256)  # a DiT takes its autoencoder's
        for some in keys:
            x = torch.rand(len(some), 3, size, size, device=device) * 2 - 1
            yield x, torch.zeros(len(some), dtype=torch.long, device=device)

    def step_seconds():
        """Of the last step; the first one compiles."""
        train_ae.load_batches = noise
        ae.lpips_vgg = random_lpips
        words = [*flags, "--data", data, "--out", out, "--steps", 3, "--log_every", 1]
        sys.argv = [trainer.__name__ + ".py", *map(str, words)]
        with contextlib.redirect_stdout(sys.stderr):
            trainer.main()
        line = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
        assert line["skipped"] == 0, "steps were skipped, so this is not their time"
        return recipe["batch"] / line["images_per_s"]

    return {
        "ours": step_seconds,
        "per": (recipe["batch"], "images/s"),
        "note": f"{at_once} images of {recipe['batch']:,} at once",
        "warm_up": 0,
        "rounds": 1,
        "clock": lambda function, repeat: function(),
        "memory": True,
        "memory_goal": "40 GB",
    }


def random_vmae():
    """The path of a checkpoint of the paper's VMAE, at 256 pixels, with random weights."""
    path, state = folder() / "vmae.pt", ae.VMAE().state_dict()
    torch.save({"model": state, "args": {"model": "vmae"}}, path)
    return path


# ---- Encoding, sampling, loading, evaluation ----


@rows(
    "VMAE encoding at 256",
    "VMAE decoding at 256",
    "SD-VAE encoding at 256",
    "SD-VAE decoding at 256",
)
def codec(name):
    """In float32, with TF32 products on a GPU, as train_dit.py encodes and sample.py decodes."""
    encode, conv = "encoding" in name, "SD" in name
    batch = 16 if CUDA else 1
    net = ae.SDVAE() if conv else ae.VMAE()
    net.eval().requires_grad_(False)
    shape = (3, 256, 256) if encode else (16, 32, 32)
    inputs = torch.randn(batch, *shape)
    gflops = train_ae.gflops(net, inputs[:1], method="encode" if encode else "decode")
    net, inputs = net.to(DEVICE), inputs.to(DEVICE)

    def ours():
        return net.encode(inputs).mean if encode else net.decode(inputs)

    peer = None
    if conv and (diffusers := installed("diffusers")):
        model = diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        model.load_state_dict(net.state_dict())
        model = model.eval().requires_grad_(False).to(DEVICE)

        def theirs():
            if encode:
                return model.encode(inputs).latent_dist.mean
            return model.decode(inputs).sample

        tolerance = 1e-2 if CUDA else 1e-3
        assert (theirs() - ours()).abs().max() < tolerance, "not the same outputs"
        peer = (version("diffusers"), theirs)

    return {
        "ours": ours,
        "peer": peer,
        "per": (batch, "images/s"),
        "flops": (batch * gflops * 1e9, TF32),
        "note": f"batch {batch}",
    }


@rows("DiT-B/1 sampling, guided")
def sampling(name):
    batch, steps = (64, 20) if CUDA else (1, 4)
    net = dit.DiT_models["DiT-B/1"](input_size=32, in_channels=16, num_classes=1000).eval()
    y, noise = torch.zeros(batch, dtype=torch.long), torch.randn(batch, 16, 32, 32)
    gflops = train_ae.gflops(net, noise[:1], torch.zeros(1), y[:1])
    net, y, noise = net.to(DEVICE), y.to(DEVICE), noise.to(DEVICE)

    # A few steps stand for the whole: their share of an image is that of the evaluations.
    evaluated, whole = evaluations(steps), evaluations(250)
    return {
        "ours": lambda: dit.sample(net, noise, y, steps),
        "per": (batch * evaluated / whole, "images/s of 250 steps"),
        "flops": (batch * evaluated * gflops * 1e9, TF32),
        "note": f"batch {batch}",
    }


def evaluations(steps):
    """How often the network is evaluated for one image; guided steps have two evaluations."""
    evaluated = []

    def model(x, t, y):
        evaluated.append(len(x))
        return x

    model.num_classes, model.class_dropout_prob = 1000, 0.1
    dit.sample(model, torch.zeros(1, 16, 1, 1), torch.zeros(1, dtype=torch.long), steps)
    return sum(evaluated)


@rows("loading of JPEGs")
def image_loading(name):
    """Photographs, cropped, resized and flipped on one core, as by torchvision.

    Both give the same pixels to 1/255, except for single ones.
    """
    from torchvision import datasets
    from torchvision import transforms as T

    torch.set_num_threads(1)
    n = 64
    path = folder() / "noise"
    path.mkdir()
    random = np.random.RandomState(0)
    for i in range(n):
        image = Image.fromarray(like_a_photograph(random, 375, 500))
        image.save(path / f"{i:02}.jpg", quality=90)
    kilobytes = sum(file.stat().st_size for file in path.iterdir()) / n / 1000

    transform = functools.partial(train_ae.augment, 256, 0)
    batches = train_ae.Batches(train_ae.Images(str(path)), transform)
    crop = T.RandomResizedCrop(256, (0.75, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    cropped = datasets.ImageFolder(path.parent, T.Compose([crop, T.ToTensor()]))
    transform = T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor()])
    augmented = datasets.ImageFolder(path.parent, transform)

    # The same crops, by the seeds of train_ae.augment. Flips are up to the keys, here without.
    def crop_of(i):
        torch.manual_seed(sample.seed_of(sample.CROP, 0, 0, i))
        return (cropped[i][0] * 255).round()

    pixels, _ = batches[[(i, 0, False) for i in range(n)]]
    levels = (pixels - torch.stack([crop_of(i) for i in range(n)])).abs()
    assert levels.max() <= 2 and (levels > 1).float().mean() < 2e-6
    assert torch.get_num_threads() == 1

    # For the time every second image is flipped.
    keys = [(i, 0, i % 2 == 1) for i in range(n)]

    def theirs():
        return torch.utils.data.default_collate([augmented[i] for i in range(n)])

    return {
        "ours": lambda: batches[keys],
        "peer": (version("torchvision"), theirs),
        "per": (n, "images/s a core"),
        "note": f"500 x 375 of {kilobytes:.0f} kB, to 256",
    }


def like_a_photograph(random, height, width):
    """Noise at several scales, uint8 (height, width, 3): the coarser the scale, the stronger."""
    total = 0
    for scale in (1, 2, 4, 8, 16, 32, 64, 128):
        noise = random.randint(0, 256, (height // scale + 2, width // scale + 2, 3))
        noise = Image.fromarray(noise.astype(np.uint8)).resize((width, height), Image.BICUBIC)
        total = total + (np.asarray(noise) - 128.0) * scale**0.4
    return (128 + 55 * total / total.std()).clip(0, 255).astype(np.uint8)


@rows("latent cache")
def latent_cache(name):
    path = folder()
    np.save(path / "moments-00000.npy", np.zeros((1024, 2, 32, 32, 32), np.float16))
    np.save(path / "labels-00000.npy", np.zeros(1024, np.int64))
    cache = train_dit.Cache(str(path))
    order = np.random.RandomState(0).permutation(1024).tolist()
    keys = [[(i, 0, True) for i in order[j : j + 32]] for j in range(0, 1024, 32)]
    return {"ours": lambda: [cache[key] for key in keys], "per": (1024, "moments/s")}


@rows("Inception features beside pytorch-fid", "Inception features beside torch-fidelity")
def inception(name):
    """In float32 on a GPU, too, both ours and theirs; each with the peer's resizing."""
    package = name.split()[-1]
    batch = 64 if CUDA else 16
    net = fid.InceptionV3(half_pixel=package == "pytorch-fid")
    file = folder() / "weights.pth"
    torch.save(net.state_dict(), file)
    net = net.fuse().to(DEVICE)
    x = torch.randint(0, 256, (batch, 3, 256, 256), dtype=torch.uint8, device=DEVICE)

    load = features_of_pytorch_fid if package == "pytorch-fid" else features_of_torch_fidelity
    features = load(file)
    peer = None
    if features:

        @torch.no_grad()
        @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        def theirs():
            return features(x)

        torch.testing.assert_close(net(x)[0], theirs(), rtol=1e-3, atol=1e-3)
        peer = (version(package), theirs)

    return {
        "ours": lambda: net(x),
        "peer": peer,
        "per": (batch, "images/s"),
        "flops": (batch * count_flops(lambda: net(x[:1])), "float32"),
        "note": f"batch {batch}",
    }


def features_of_pytorch_fid(file):
    """Its function from images to features, with the weights of this file, if it is installed."""
    module = installed("pytorch_fid.inception")
    if not module:
        return None

    def load_weights(*args, **kwargs):
        return torch.load(file, weights_only=True)

    # Otherwise it downloads its weights.
    module.load_state_dict_from_url = load_weights
    model = module.InceptionV3([3]).eval().to(DEVICE)
    return lambda x: model(x.float() / 255)[0].flatten(1)


def features_of_torch_fidelity(file):
    """Its function from images to features, with the weights of this file, if it is installed."""
    module = installed("torch_fidelity.feature_extractor_inceptionv3")
    if not module:
        return None
    model = module.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file)
    )
    model.to(DEVICE)
    return lambda x: model(x)[0]


@rows("Fréchet distance, 2,048 dimensions")
def frechet_distance(name):
    from scipy.linalg import sqrtm

    random, mu = np.random.RandomState(0), np.zeros(2048)
    samples = [random.standard_normal((4096, 2048)) * random.rand(2048) for _ in range(2)]
    a, b = (np.cov(x, rowvar=False) for x in samples)

    def theirs():
        return np.trace(a + b - 2 * sqrtm(a @ b).real)

    return {
        "ours": lambda: fid.frechet_distance(mu, a, mu, b),
        "peer": ("scipy's sqrtm", theirs),
    }


@rows("precision and recall, 2,048 dimensions")
def precision_recall(name):
    n = 10000 if CUDA else 2048
    ref, samples = (torch.randn(n, 2048, device=DEVICE) for _ in range(2))
    # The distances within each of the two sets and between them.
    flops = 3 * 2 * n * n * 2048
    return {
        "ours": lambda: fid.precision_recall(ref, samples),
        "flops": (flops, "float64"),
        "note": f"{n:,} beside {n:,}",
    }


# ---- Whole processes ----


def script(*command, **variables):
    """Run a script of the project, with these environment variables."""
    command = [sys.executable, *map(str, command)]
    env = os.environ | variables
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=env)


@rows("two processes of one thread beside one of two")
def processes(name):
    """Images per second as the log has them, so without the start."""
    wider = "--hidden_size=192 --depth=6 --decoder_depth=6 --num_heads=6"

    def step_seconds(number, flags, batch):
        """Of training in 1 or 2 processes, with two threads in all."""
        launcher = []
        if number == 2:
            # Without the "--" torchrun takes --num_heads for one of its own flags.
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
        out, logged = folder(), 2560 // batch
        script(
            *launcher,
            *("train_ae.py", "--device", "cpu", "--out", out, "--batch", batch, *flags.split()),
            *("--steps", 5 * logged, "--log_every", logged, "--ckpt_every", 10**6),
            OMP_NUM_THREADS=str(2 // number),
        )
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return batch / statistics.median(line["images_per_s"] for line in lines[-4:])

    def line(note, flags, batch):
        return {
            "ours": functools.partial(step_seconds, 2, flags, batch),
            "peer": ("one process", functools.partial(step_seconds, 1, flags, batch)),
            "per": (batch, "images/s"),
            "note": f"{note}, batch {batch}",
            "warm_up": 0,
            "clock": lambda function, repeat: function(),
        }

    return [
        line("the demo's VMAE", "", 64),
        line("a wider one", wider, 64),
        line("a wider one", wider, 256),
    ]


@rows("start")
def start(name):
    def first_line():
        command = [sys.executable, "train_ae.py", "--out", str(folder())]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert any(line.startswith("step 1/") for line in process.stdout)
            process.kill()

    return [
        {"name": "train_ae.py --help", "ours": lambda: script("train_ae.py", "--help")},
        {"name": "train_ae.py, to the demo's first log line", "ours": first_line},
    ]


@rows("demo")
def demo(name):
    out = folder()
    tuned = out / "vmae-tuned"
    commands = [
        ("train_ae.py", "--out", out / "vmae"),
        ("train_ae.py", "--tune_decoder", "--init", out / "vmae" / "ckpt.pt", "--out", tuned),
        ("train_dit.py", "--ae", tuned / "ckpt.pt", "--out", out / "dit"),
        ("sample.py", "--ckpt", out / "dit" / "ckpt.pt"),
    ]
    return [
        {
            "name": f"the demo's {command[0]}{' --tune_decoder' * (tuned in command)}, whole",
            "ours": functools.partial(script, *command),
            "warm_up": 0,
            "rounds": 1,
        }
        for command in commands
    ]


# ---- The table ----


def run_row(name, rounds):
    """Run a row in this process; returns its lines, or the rate of products."""
    if CUDA:
        torch.set_float32_matmul_precision("high")  # TF32 in place of float32, as in the scripts
    torch.manual_seed(0)
    if name.startswith("products "):
        return products(name.split()[1])
    made = ROWS[name](name)
    lines = made if isinstance(made, list) else [made]
    return [measure(**{"name": name, "rounds": rounds, **line}) for line in lines]


def in_child(name, rounds=1):
    """The same in a process of its own; None if that fails."""
    file = folder() / "row.json"
    command = [sys.executable, __file__, "--row", name, "--rounds", str(rounds)]
    command += ["--json", str(file)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return None
    return json.loads(file.read_text())


def machine():
    """The GPU or the CPU, and the threads, in words."""
    if CUDA:
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        names = [platform.processor()]
        if info.exists():
            names = re.findall("model name.*: (.*)", info.read_text())
        name = f"{(names or [platform.machine()])[0]}, {os.cpu_count()} cores"
    return f"{name}; {torch.get_num_threads()} threads"


def head():
    """What precedes the table: on what it was measured, and when."""
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    packages = ("torch", "torchvision", "diffusers", "pytorch-fid", "torch-fidelity")
    versions = [
        version(package)
        for package in packages
        if importlib.util.find_spec(package.replace("-", "_"))
    ]
    measured = f"{', '.join(versions)}; {time.strftime('%Y-%m-%d')}, commit {commit or 'unknown'}"
    return f"""
## {machine()}

{textwrap.fill(measured, 100, break_on_hyphens=False)}

| work | ours | peer | ratio | TFLOP/s | share of products | peak memory |
{"|---" * 7}|"""


def show(x):
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def print_line(line, rates):
    """Print a line of the table and add what it derives; rates: of products, by arithmetic."""
    cells = [line["work"], f"{show(line['ours'])} {line['unit']}"] + ["-"] * 5
    if "peer" in line:
        cells[2] = f"{show(line['peer'])} {line['peer_name']}"
        cells[3] = f"{line['ratio']:.2f}"
        if line["peer_name"] == "without LPIPS":
            line["lpips_share"] = 1 - line["ratio"]
            cells[0] += f" ({line['lpips_share']:.0%} of the time)"
    if "flops" in line:
        kind = line["arithmetic"]
        rates[kind] = rates.get(kind) or in_child(f"products {kind}")
        line["share"] = line["flops"] / (rates[kind] or math.nan)
        cells[4] = f"{line['flops'] / 1e12:.3g}"
        cells[5] = f"{line['share']:.0%} of {kind}"
        peak = peak_of(torch.cuda.get_device_name()) if CUDA and kind == "bfloat16" else None
        if peak:
            line["mfu"] = line["flops"] / peak
            cells[5] += f", MFU {line['mfu']:.0%}"
    if "peak_bytes" in line:
        cells[6] = f"{line['peak_bytes'] / 2**30:.2f} GiB"
    if "memory_goal" in line:
        cells[6] += f" of {line['memory_goal']}"
    print("| " + " | ".join(cells) + " |", flush=True)


def parse_args():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--json", help="write the table there, too")
    add("--only", nargs="+", default=[""], help="rows whose names hold one of these words")
    add("--rounds", type=fid.number(int, 1), default=5, help="of each row (default: 5)")
    add("--demo", action="store_true", help="add the demo's four commands, which take minutes")
    kinds = [f"products {kind}" for kind in ("bfloat16", "TF32", "float32", "float64")]
    add("--row", choices=[*ROWS, *kinds], metavar="NAME", help="one row, in this process")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.row:
        result = json.dumps(run_row(args.row, args.rounds), indent=1)
        if args.json:
            Path(args.json).write_text(result)
        else:
            print(result)
        return

    print(head(), flush=True)
    table, rates, failed = [], {}, []
    for name in ROWS:
        chosen = any(word.lower() in name.lower() for word in args.only)
        if not chosen or (name == "demo" and not args.demo):
            continue
        if name in RECIPES and not CUDA:  # they take hours without a GPU
            continue
        lines = in_child(name, args.rounds)
        if lines is None:
            failed.append(name)
            print(f"| {name} | failed" + " | -" * 5 + " |", flush=True)
            continue
        for line in lines:
            print_line(line, rates)
            table.append(line)

    known = [f"{kind} {rate / 1e12:.3g} TFLOP/s" for kind, rate in rates.items() if rate]
    print("\nSquare products: " + ", ".join(known))
    if args.json:
        whole = {"machine": machine(), "products": rates, "rows": table, "failed": failed}
        Path(args.json).write_text(json.dumps(whole, indent=1))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
