"""Train an autoencoder (supplement, section B.1).

    python train_ae.py                                             the demo: a VMAE on the bundled digits
    python train_ae.py --model sdvae                               the demo with another autoencoder
    python train_ae.py --data DIR --image_size 128                 own images, the paper's settings
    torchrun --nproc_per_node=8 train_ae.py --model vmae --data imagenet/train
    python train_ae.py --data DIR --resume                         go on from the last checkpoint

Writes ckpt.pt, log.jsonl and recon.png (originals above reconstructions) into --out.
"""

import argparse
import copy
import functools
import json
import math
import os
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import RandomResizedCrop

import ae

def count(text):
    """The type of a flag that is a whole number above 0."""
    if int(text) < 1:
        raise ValueError
    return int(text)

# A flag a line: name, type, default without --data (the demo), default with --data (the paper), help. A dict has
# defaults by model, "*" for the others. Sources: S supplement, R the authors' release, V VQGAN / latent diffusion,
# O our choice.
FLAGS = {
    "run": [
        ("data", str, None, None, "folder of images, sub-folders are classes; none: the demo's digits"),
        ("out", str, "out/demo/{model}", "out/{model}", "folder for checkpoint, log and pictures"),
        ("resume", bool, False, False, "go on from --out's checkpoint, with its settings"),
        ("seed", int, 0, 0, "of everything random"),
        ("device", str, None, None, "cpu, cuda, cuda:1, ...; default: cuda if there is one"),
        ("dtype", ("float32", "bfloat16"), None, None, "of matrix products; default: bfloat16 on cuda"),
        ("compile", int, None, None, "1 or 0, torch.compile; default: 1 on cuda"),
        ("workers", int, 0, 8, "processes a rank that decode images"),
        ("log_every", count, 50, 50, "steps between log lines"),
        ("ckpt_every", count, 200, 1000, "steps between checkpoints and pictures"),
    ],
    "model": [
        ("model", tuple(ae.MODELS), "vmae", "vmae", "which autoencoder"),
        ("image_size", count, 32, {"*": 256, "mae": 128, "vmae": 128}, "pixels a side; R for the ViTs, else O"),
        ("latent_dim", count, {"*": 16, "mae": 8, "vmae": 8}, 16, "channels of the latent, R"),
        ("channels", "ints", "32,32,64,64", "128,256,512,512", "conv: width of each level, R (Stable Diffusion 3)"),
        ("patch_size", count, 8, 8, "ViT: pixels a side of a token, R"),
        ("hidden_size", count, 96, 192, "ViT: width, S"),
        ("depth", count, 3, 12, "ViT: encoder layers, S"),
        ("decoder_depth", count, 3, 12, "ViT: decoder layers, S"),
        ("num_heads", count, 4, 12, "ViT: heads, R"),
    ],
    "objective (weights of the terms; a flag that the model has no use for is refused)": [
        ("mask_ratio", float, {"*": 0.6}, 0.6, "ViT: share of tokens hidden from the encoder, S (mae O)"),
        ("recon", ("mse", "l1"), "mse", "mse", "conv: reconstruction term, eq. 3 or V"),
        ("noise_std", float, 0.1, 0.1, "dae: std of the corruption, O"),
        ("visible", float, 0.5, 0.5, "vmae: MSE of visible patches, R"),
        ("masked", float, {"*": 0.5, "mae": 1.0}, {"*": 0.5, "mae": 1.0}, "ViT: MSE of masked patches, R"),
        ("kl", float, {"vmae": 1e-6, "vae": 1e-4, "*": 5e-9}, {"vmae": 1e-6, "vae": 1e-4, "*": 5e-9},
         "KL: vmae R, vae O, sdvae V rescaled"),
        ("prior_std", float, 1.0, 1.0, "vmae: std that the KL draws to, paper 1, R's script 1e-3"),
        ("lpips", float, 0.0, {"*": 0.0, "sdvae": 1.0, "vmae": 0.5}, "LPIPS: sdvae V, vmae R; the demo does without"),
        ("disc_weight", float, 0.5, 0.5, "sdvae: adversarial term, times the adaptive weight, V"),
        ("disc_start", count, 301, 5001, "sdvae: first step with the adversarial term, V"),
        ("disc_loss", ("hinge", "vanilla"), "hinge", "hinge", "sdvae: V, or eq. 6's"),
    ],
    "optimisation": [
        ("epochs", float, {"*": 4, "mae": 10, "vmae": 10}, {"*": 20, "mae": 400, "vmae": 400}, "ViT R, conv O"),
        ("steps", count, None, None, "optimiser steps; default: from --epochs"),
        ("warmup", float, 1, {"*": 1, "mae": 10, "vmae": 10}, "epochs of linear warm-up from 0; ViT R, conv O"),
        ("schedule", ("cosine", "constant"), "cosine", {"*": "cosine", "sdvae": "constant"}, "ViT R, conv O"),
        ("batch", count, {"*": 32, "mae": 64, "vmae": 64}, {"*": 2048, "sdvae": 256}, "images an optimiser step, over all processes, S"),
        ("micro_batch", count, 64, {"*": 16, "sdvae": 8, "mae": 128, "vmae": 128},
         "images a GPU at once, the rest is gradient accumulation; a smaller one may be taken so that it divides"),
        ("base_lr", float, {"*": 8e-3, "mae": 4e-3, "vmae": 4e-3}, {"*": 1e-5, "mae": 1e-4, "vmae": 1e-4}, "S"),
        ("lr", float, None, None, "default: base_lr * batch / 256"),
        ("betas", "floats", "0.9,0.95", {"*": "0.9,0.95", "sdvae": "0.5,0.9"}, "AdamW; sdvae V, ViT R, else O"),
        ("weight_decay", float, 0.0, {"*": 0.0, "mae": 0.05, "vmae": 0.05}, "AdamW; ViT R, sdvae V, else O"),
    ],
}
CONV = ("channels", "latent_dim", "recon")
VIT = ("image_size", "patch_size", "hidden_size", "depth", "decoder_depth", "num_heads", "latent_dim", "mask_ratio")
ARGUMENTS = {"ae": CONV, "dae": (*CONV, "noise_std"), "vae": CONV, "sdvae": CONV, "mae": VIT,
             "vmae": (*VIT, "prior_std")}   # of ae.MODELS, by the flag's name

# ---- Settings, shared with train_dit.py ----

FREE_ON_RESUME = {"data", "out", "resume", "device", "dtype", "compile", "workers", "steps", "epochs", "micro_batch",
                  "log_every", "ckpt_every"}   # may differ from the run that is resumed

def or_exit(function, *args, **kwargs):
    """Call it; what is the user's mistake ends in its one sentence, not in a traceback."""
    try:
        return function(*args, **kwargs)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: {error}")

def parse_args(doc, flags, kind_of_ckpt):
    """(args, checkpoint to resume or None); a flag not given is the resumed run's, else the table's default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"{parser.prog}: {message}")
    kinds = {"ints": lambda text: [int(part) for part in text.split(",")],
             "floats": lambda text: [float(part) for part in text.split(",")]}
    for title, rows in flags.items():
        group = parser.add_argument_group(title)
        for name, kind, demo, paper, text in rows:
            if kind is bool:
                group.add_argument(f"--{name}", action="store_true", help=text)
                continue
            choices = kind if isinstance(kind, tuple) else None
            if demo is not None or paper is not None:
                text += f" (demo: {demo}; paper: {paper})"
            group.add_argument(f"--{name}", type=kinds.get(kind, str if choices else kind), choices=choices, help=text)
    given = vars(parser.parse_args())

    args = {}
    for name, kind, demo, paper, _ in (row for rows in flags.values() for row in rows):
        default = paper if "data" in given else demo
        if isinstance(default, dict):
            default = default.get(given.get("model", args["model"]), default["*"])
        args[name] = kinds[kind](default) if kind in kinds else default
    args["out"] = args["out"].format(model=given.get("model", args["model"]))
    args |= given
    path, ckpt = os.path.join(args["out"], "ckpt.pt"), None
    if args["resume"]:
        ckpt = or_exit(ae.read_checkpoint, path)
        if ckpt.get("kind") != kind_of_ckpt:
            sys.exit(f"{path} is of kind {ckpt.get('kind')}, this script resumes kind {kind_of_ckpt}: check --out")
        saved = ckpt["args"]
        for name in sorted(given.keys() & saved.keys() - FREE_ON_RESUME):
            if given[name] != saved[name]:
                sys.exit(f"{path} is of a run with --{name} {saved[name]}, not {given[name]}: leave the flag out to "
                         "resume, or start afresh in another --out")
        args = {**args, **saved, **given}
    elif os.path.exists(path):
        sys.exit(f"{path} exists: go on with --resume, or choose another --out")
    return argparse.Namespace(**args, given=sorted(given)), ckpt

def setup(args):
    """Device, precision and process group. Fills in args.device, args.dtype, args.compile; returns rank, world."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.device is None:
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    cuda = args.device.startswith("cuda")
    if args.device != "cpu" and not (cuda and torch.cuda.is_available()):
        sys.exit(f"--device {args.device} is not there: cpu, or cuda where PyTorch finds a GPU")
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.compile = cuda if args.compile is None else bool(args.compile)
    if cuda:
        torch.cuda.set_device(args.device)
        torch.set_float32_matmul_precision("high")   # TF32 for what stays float32
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    if args.batch % world:
        sys.exit(f"--batch {args.batch} does not divide over {world} processes")
    share = args.batch // world   # images of one process in a step
    if "micro_batch" in args.given and share % args.micro_batch:
        sys.exit(f"--micro_batch {args.micro_batch} does not divide the {share} images that a process has in a step")
    args.micro_batch = max(m for m in range(1, min(args.micro_batch, share) + 1) if share % m == 0)
    os.makedirs(args.out, exist_ok=True)
    return rank, world

def seed_of(*key):
    """Integers, such as (seed, epoch, index) -> one seed."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])

def generator(device, *key):
    """All that is random in a step comes from generator(device, seed, step)."""
    return torch.Generator(device).manual_seed(seed_of(*key))

def save(path, ckpt):
    """Whole or not at all: a reader never sees a half-written file."""
    with open(path + ".tmp", "wb") as file:
        torch.save(ckpt, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)

def log(args, step, terms, speed):
    """A line on the screen and in log.jsonl: step, the terms by name, images a second, time left."""
    left = int((args.steps - step) * args.batch / speed)
    print(f"step {step}/{args.steps}  " + "  ".join(f"{name} {value:.4g}" for name, value in terms.items())
          + f"  {speed:.0f} images/s  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left", flush=True)
    with open(os.path.join(args.out, "log.jsonl"), "a") as file:
        file.write(json.dumps({"step": step, **terms, "images_per_s": round(speed, 1), "seconds_left": left}) + "\n")

def rewind_log(args, step):
    """Drop the lines after a step, which a resumed run writes again."""
    path = os.path.join(args.out, "log.jsonl")
    lines = open(path).readlines() if os.path.exists(path) else []
    with open(path, "w") as file:
        file.writelines(line for line in lines if json.loads(line)["step"] <= step)

def settings(args):
    """What a checkpoint keeps of the flags: plain values by name."""
    return {name: value for name, value in vars(args).items() if name not in ("given", "resume")}

def introduce(args, images, world):
    """Which settings are in force, on which images."""
    print(f"{'demo' if args.data is None else 'paper'} settings, {'without' if args.data is None else 'with'} --data; "
          f"in force: " + "  ".join(f"{name} {value}" for name, value in settings(args).items()))
    source = "the bundled MNIST digits" if args.data is None else args.data
    print(f"{len(images):,} images of {len(images.classes)} classes from {source}; {args.steps:,} steps of {args.batch} "
          f"images on {world} processes in micro-batches of {args.micro_batch}")

def describe(name, model, gflops):
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}: {parameters:,} parameters, {parameters * 4 / 2 ** 20:.1f} MiB in float32, "
          f"{gflops:.4g} GFLOPs forward an image, three times that in training")

def gflops(module, *shapes_and_dtypes):
    """Of one call of a module, multiply and add counted as two, computed on PyTorch's meta device."""
    module = copy.deepcopy(module).to("meta")
    inputs = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes_and_dtypes]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops() / 1e9

# ---- Images, shared with train_dit.py ----

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)   # what Pillow raises on bad files

class Images:
    """RGB images by index, with .labels and .classes: the digits of the demo, or the files of a folder.

    Sub-folders are classes, whatever lies deeper in them; a flat folder is one class.
    """
    def __init__(self, folder=None, held_out=False):
        self.digits = folder is None
        if self.digits:   # 50 x 100 tiles, 500 in order for each digit; the last 50 of each are held out
            sheet = np.asarray(Image.open(os.path.join(os.path.dirname(__file__), "assets", "digits.png")))
            tiles = sheet.reshape(50, 28, 100, 28).swapaxes(1, 2).reshape(10, 500, 28, 28)
            tiles = tiles[:, 450:] if held_out else tiles[:, :450]
            self.files = np.pad(tiles.reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
            self.labels = np.arange(10).repeat(tiles.shape[1])
            self.classes = list("0123456789")
            return
        if not os.path.isdir(folder):
            sys.exit(f"--data {folder}: there is no such folder")
        self.files = sorted(os.path.join(root, name) for root, _, names in os.walk(folder, followlinks=True)
                            for name in names if name.lower().endswith(SUFFIXES) and not name.startswith("."))
        tops = [os.path.relpath(file, folder).split(os.sep)[:-1] for file in self.files]
        tops = [parts[0] if parts else "" for parts in tops]
        self.classes, self.labels = np.unique(tops, return_inverse=True)
        self.classes = self.classes.tolist()
        if not self.files:
            sys.exit(f"--data {folder} holds no images ({' '.join(SUFFIXES)})")
        if len(self.classes) > 1 and "" in self.classes:
            sys.exit(f"--data {folder} holds images both in itself and in sub-folders: sub-folders are classes, a "
                     "folder of one class has none")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        if self.digits:
            return Image.fromarray(self.files[index]).convert("RGB")
        with Image.open(self.files[index]) as image:
            return image.convert("RGB")

def center_crop(image, size):
    """ADM's: halve with BOX while that leaves at least `size`, BICUBIC to a shorter side of `size`, crop."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))

def augment(size, seed, photographs, image, index, epoch, flip):
    """The transform of Batches: random-resized crop of scale (0.75, 1), BICUBIC, and a flip half of the time, by
    (seed, epoch, index); digits as they are."""
    if not photographs:
        return center_crop(image, size)
    torch.manual_seed(seed_of(seed, epoch, index))   # torchvision draws from the global generator, nothing else does
    top, left, height, width = RandomResizedCrop.get_params(image, (0.75, 1.0), (3 / 4, 4 / 3))
    image = image.crop((left, top, left + width, top + height)).resize((size, size), Image.BICUBIC)
    return image.transpose(Image.FLIP_LEFT_RIGHT) if torch.rand(()) < 0.5 else image

class Batches(torch.utils.data.Dataset):
    """Micro-batches, each made by one worker: batches[[(index, *key), ...]] -> uint8 (B, 3, S, S), labels (B,), bad.

    transform(image, index, *key) -> image of S x S pixels. An unreadable image is replaced by the next one and its
    index returned in `bad`; beyond 1% of all there is no more.
    """
    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __getitem__(self, keys):
        pixels, labels, bad = [], [], []
        for index, *key in keys:
            image = None
            while image is None and len(bad) <= len(self.images) / 100:
                try:
                    image = self.images[index]
                except UNREADABLE:
                    bad.append(index)
                    index = (index + 1) % len(self.images)
            if image is None:
                return 0, 0, bad
            pixels.append(np.asarray(self.transform(image, index, *key)))
            labels.append(self.images.labels[index])
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(labels), bad

def load_batches(dataset, keys, args):
    """Yields images (B, 3, S, S) in [-1, 1] and labels (B,) on the device, prepared by workers ahead of time."""
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=keys, num_workers=args.workers,
                                         pin_memory=args.device.startswith("cuda"))
    bad = set()
    for x, y, unreadable in loader:
        for index in sorted(set(unreadable) - bad):
            print(f"warning: skipped {dataset.images.files[index]}, which cannot be read", file=sys.stderr)
        bad |= set(unreadable)
        if len(bad) > len(dataset.images) / 100:
            sys.exit(f"{len(bad)} of {len(dataset.images)} images cannot be read, more than 1%: mend or remove them")
        x = x.to(args.device, non_blocking=True)
        x = x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x
        yield x, y.to(args.device, non_blocking=True)

def training_keys(args, n, rank, world, start):
    """(index, epoch, flip) of each image, micro-batch by micro-batch: this rank's part of every global batch.

    The epochs' orders, by (seed, epoch), stand one behind the other; a step takes the next `batch` images.
    """
    order = functools.lru_cache(2)(lambda epoch: np.random.default_rng((args.seed, epoch)).permutation(n))
    share = args.batch // world
    for step in range(start, args.steps):
        flips = torch.rand(args.batch, generator=generator("cpu", args.seed, step, 1)) < 0.5
        for row in range(rank * share, (rank + 1) * share, args.micro_batch):
            places = [step * args.batch + row + i for i in range(args.micro_batch)]
            yield [(int(order(p // n)[p % n]), p // n, bool(flips[p % args.batch])) for p in places]

# ---- Training ----

def schedule(args, step, warmup):
    """The learning rate of a step, counted from 0: linear warm-up from 0, then constant or half a cosine to 0."""
    if step < warmup:
        return args.lr * step / warmup
    if args.schedule == "constant":
        return args.lr
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup)))

def preview_images(args):
    """Ten images for pictures (10, 3, S, S): held-out digits, or spread over the folder."""
    images = Images(args.data, held_out=True)
    picked = [center_crop(images[i * len(images) // 10], args.image_size) for i in range(10)]
    return torch.from_numpy(np.stack(picked)).permute(0, 3, 1, 2).to(args.device).float() / 127.5 - 1

@torch.no_grad()
def draw_reconstructions(net, x, args):
    """recon.png: originals, reconstructions; of a ViT also what training shows it and what it predicts from that."""
    rows = {"original": x, "reconstruction": net.decode(net.encode(x).mode())}
    if "mask_ratio" in ARGUMENTS[args.model]:
        draws = net.randomness(len(x), args.image_size, generator("cpu", args.seed))
        draws = {name: value.to(args.device) for name, value in draws.items()}
        prediction, _, mask = net.masked_pass(x, **draws)
        mask = mask.view(-1, 1, net.grid, net.grid)
        mask = mask.repeat_interleave(net.patch_size, 2).repeat_interleave(net.patch_size, 3)
        rows |= {"masked input": x * (1 - mask), "prediction": prediction}
    ae.save_grid(os.path.join(args.out, "recon.png"), [ae.to_uint8(row) for row in rows.values()], list(rows))

def main():
    args, ckpt = parse_args(__doc__, FLAGS, "autoencoder")
    rank, world = setup(args)
    images = Images(args.data)
    n = len(images)
    if args.steps is None:
        args.steps = max(1, round(args.epochs * n / args.batch))
    warmup = args.warmup * n / args.batch
    args.lr = args.base_lr * args.batch / 256 if args.lr is None else args.lr

    torch.manual_seed(args.seed)   # weights start the same on every rank
    config = {name: getattr(args, name) for name in ARGUMENTS[args.model]}
    config["weights"] = {name: getattr(args, name, 1.0) for name in ae.MODELS[args.model].weights if name != "recon"}
    net = or_exit(ae.MODELS[args.model], **config).to(args.device)
    if args.image_size % net.patch_size:
        sys.exit(f"--image_size {args.image_size} is not a multiple of {net.patch_size}, the pixels of a latent position")
    perceptual = None
    if args.lpips > 0:
        lpips = or_exit(ae.lpips_vgg).to(args.device)
        perceptual = lambda x_hat, x: lpips(x_hat, x).mean()

    decayed = [p for p in net.parameters() if p.requires_grad and p.ndim > 1]   # not biases, not norms
    others = [p for p in net.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=args.betas, fused=True)
    if args.model == "sdvae":
        disc = ae.Discriminator().to(args.device)
        if world > 1 and args.device.startswith("cuda"):
            disc = nn.SyncBatchNorm.convert_sync_batchnorm(disc)
        disc_optimizer = torch.optim.AdamW(disc.parameters(), args.lr, args.betas, weight_decay=0, fused=True)

    start = 0
    if ckpt:
        start = ckpt["step"]
        if ckpt["images"] != n:
            sys.exit(f"--resume: the run had {ckpt['images']} images, --data holds {n}")
        if start >= args.steps:
            print(f"{args.out} is finished, at step {start}")
            return
        net.load_state_dict(ckpt["model"])
        optimizer.load_state_dict(ckpt["optimizer"])
        if args.model == "sdvae":
            disc.load_state_dict(ckpt["disc"])
            disc_optimizer.load_state_dict(ckpt["disc_optimizer"])

    if args.compile:   # of sdvae in parts: adaptive_weight takes gradients at the last layer, outside of them
        sdvae_parts = [net.encoder, net.decoder.mid_block, *net.decoder.up_blocks] if args.model == "sdvae" else []
        for part in sdvae_parts or [net]:
            part.compile()
    model = DistributedDataParallel(net) if world > 1 else net
    share = args.batch // world
    accumulate = share // args.micro_batch   # micro-batches a step
    if rank == 0:
        introduce(args, images, world)
        describe(args.model, net, gflops(net, ((1, 3, args.image_size, args.image_size), torch.float32)))
        rewind_log(args, start)
        preview = preview_images(args)

    dataset = Batches(images, functools.partial(augment, args.image_size, args.seed, not images.digits))
    batches = load_batches(dataset, training_keys(args, n, rank, world, start), args)
    clock, clock_step = time.time(), start
    for step in range(start, args.steps):
        lr = schedule(args, step, warmup)
        adversarial = args.model == "sdvae" and step + 1 >= args.disc_start
        draws = net.randomness(args.batch, args.image_size, generator(args.device, args.seed, step))
        totals = {}
        for row in range(rank * share, (rank + 1) * share, args.micro_batch):
            x, _ = next(batches)
            draw = {name: value[row:row + args.micro_batch] for name, value in draws.items()}
            last = row + args.micro_batch == (rank + 1) * share
            model.require_backward_grad_sync = last   # gradients travel once a step
            with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.dtype == "bfloat16"):
                loss, terms, x_hat = model(x, perceptual=perceptual, **draw)
                if adversarial:   # the third term of eq. 6
                    disc.requires_grad_(False)   # its gradients are to come from its own loss alone
                    adv = ae.generator_loss(disc(x_hat).float())
                    weight = ae.adaptive_weight(loss, adv, net.decoder.conv_out.weight)
                    loss = loss + args.disc_weight * weight * adv
                    disc.requires_grad_(True)
                    real, fake = disc(x).float(), disc(x_hat.detach()).float()
                    loss_d = ae.disc_loss(real, fake, args.disc_loss)
                    terms |= {"adv": adv, "adaptive": weight, "disc": loss_d, "real": real.mean(), "fake": fake.mean()}
            (loss / accumulate).backward()
            if adversarial:
                (loss_d / accumulate).backward()
            for name, term in terms.items():
                totals[name] = totals.get(name, 0) + term.detach() / accumulate
        optimizers = [optimizer]
        if adversarial:
            optimizers.append(disc_optimizer)
            for p in disc.parameters():
                if world > 1:
                    dist.all_reduce(p.grad)
                    p.grad /= world
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = lr
            opt.step()
            opt.zero_grad()

        step += 1   # from here on the number of steps done
        if step == 1 or step % args.log_every == 0 or step == args.steps:
            values = torch.stack(list(totals.values()))
            if world > 1:
                dist.all_reduce(values)
            values = (values / world).tolist()   # the first wait for the device since the last line
            if rank == 0:
                speed = (step - clock_step) * args.batch / (time.time() - clock)
                log(args, step, {**dict(zip(totals, values)), "lr": lr}, speed)
            clock, clock_step = time.time(), step
        if rank == 0 and (step % args.ckpt_every == 0 or step == args.steps):
            draw_reconstructions(net.eval(), preview, args)
            net.train()
            ckpt = {"kind": "autoencoder", "name": args.model, "config": config, "model": net.state_dict(),
                    "optimizer": optimizer.state_dict(), "step": step, "images": n, "args": settings(args)}
            if args.model == "sdvae":
                ckpt |= {"disc": disc.state_dict(), "disc_optimizer": disc_optimizer.state_dict()}
            save(os.path.join(args.out, "ckpt.pt"), ckpt)
    if rank == 0:
        print(f"wrote {args.out}/ckpt.pt and {args.out}/recon.png")
    if world > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    main()
