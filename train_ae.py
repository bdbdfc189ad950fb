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

def ints(text):
    return [int(part) for part in text.split(",")]

def floats(text):
    return [float(part) for part in text.split(",")]

# A flag a line: name, type, default without --data (demo), default with --data (paper), help. A dict holds
# defaults by model, "*" for the others. Sources: S supplement, R authors' release, V VQGAN and latent
# diffusion, O our choice.
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
        ("image_size", count, 32, {"*": 256, "mae": 128, "vmae": 128}, "pixels a side; ViT R, conv O"),
        ("latent_dim", count, {"*": 16, "mae": 8, "vmae": 8}, 16, "channels of the latent, R"),
        ("channels", ints, [32, 32, 64, 64], [128, 256, 512, 512], "conv: width of each level, R"),
        ("patch_size", count, 8, 8, "ViT: pixels a side of a token, R"),
        ("hidden_size", count, 96, 192, "ViT: width, S"),
        ("depth", count, 3, 12, "ViT: encoder layers, S"),
        ("decoder_depth", count, 3, 12, "ViT: decoder layers, S"),
        ("num_heads", count, 4, 12, "ViT: heads, R"),
    ],
    "objective (visible, masked, kl, lpips, disc_weight are weights of terms)": [
        ("mask_ratio", float, 0.6, 0.6, "ViT: share of tokens hidden from the encoder, vmae S, mae O"),
        ("recon", ("mse", "l1"), "mse", "mse", "conv: reconstruction, eq. 3's or V's"),
        ("noise_std", float, 0.1, 0.1, "dae: std of the corruption, O"),
        ("visible", float, 0.5, 0.5, "vmae: MSE of visible patches, R"),
        ("masked", float, {"*": 0.5, "mae": 1.0}, {"*": 0.5, "mae": 1.0}, "ViT: MSE of masked patches, R"),
        ("kl", float, {"*": 5e-9, "vae": 1e-4, "vmae": 1e-6}, {"*": 5e-9, "vae": 1e-4, "vmae": 1e-6},
         "KL: sdvae V rescaled, vae O, vmae R"),
        ("prior_std", float, 1.0, 1.0, "vmae: std that the KL draws to, the paper's; R's script has 1e-3"),
        ("lpips", float, 0.0, {"*": 0.0, "sdvae": 1.0, "vmae": 0.5}, "LPIPS: sdvae V, vmae R, demo without"),
        ("disc_weight", float, 0.5, 0.5, "sdvae: adversarial term, times the adaptive weight, V"),
        ("disc_start", count, 301, 5001, "sdvae: first step with the adversarial term, V"),
        ("disc_loss", ("hinge", "vanilla"), "hinge", "hinge", "sdvae: V's or eq. 6's"),
    ],
    "optimisation": [
        ("epochs", float, {"*": 4, "mae": 10, "vmae": 10}, {"*": 20, "mae": 400, "vmae": 400}, "R, conv O"),
        ("steps", count, None, None, "optimiser steps; default: from --epochs"),
        ("warmup", float, 1, {"*": 1, "mae": 10, "vmae": 10}, "epochs of linear warm-up; ViT R, conv O"),
        ("schedule", ("cosine", "constant"), "cosine", {"*": "cosine", "sdvae": "constant"}, "ViT R, conv O"),
        ("batch", count, {"*": 32, "mae": 64, "vmae": 64}, {"*": 2048, "sdvae": 256},
         "images an optimiser step, over all processes, S"),
        ("micro_batch", count, 64, {"*": 16, "sdvae": 8, "mae": 128, "vmae": 128},
         "images a process at once, the rest is gradient accumulation; if not given, at most this, O"),
        ("base_lr", float, {"*": 8e-3, "mae": 4e-3, "vmae": 4e-3}, {"*": 1e-5, "mae": 1e-4, "vmae": 1e-4},
         "learning rate at batch 256, S"),
        ("lr", float, None, None, "learning rate; default: base_lr * batch / 256"),
        ("betas", floats, [0.9, 0.95], {"*": [0.9, 0.95], "sdvae": [0.5, 0.9]}, "AdamW; V, ViT R, else O"),
        ("weight_decay", float, 0.0, {"*": 0.0, "mae": 0.05, "vmae": 0.05}, "AdamW; sdvae V, ViT R, else O"),
    ],
}
CONV = ("channels", "latent_dim", "recon")
VIT = ("image_size", "patch_size", "hidden_size", "depth", "decoder_depth", "num_heads", "latent_dim",
       "mask_ratio")
ARGUMENTS = {"ae": CONV, "dae": (*CONV, "noise_std"), "vae": CONV, "sdvae": CONV, "mae": VIT,
             "vmae": (*VIT, "prior_std")}   # of the classes in ae.MODELS, by the flag's name

# ---- Settings, shared with train_dit.py ----

FREE_ON_RESUME = {"data", "out", "resume", "device", "dtype", "compile", "workers", "steps", "micro_batch",
                  "log_every", "ckpt_every"}   # may differ from the run that is resumed

def or_exit(function, *args, **kwargs):
    """Call it; what is the user's mistake ends in its one sentence, not in a traceback."""
    try:
        return function(*args, **kwargs)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: {error}")

def parse_args(doc, flags, kind):
    """(args, checkpoint to resume or None). A flag not given is the resumed run's, else the table's default.

    kind: of the checkpoints that this script resumes.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"{parser.prog}: {message}")
    rows = [(title, *row) for title in flags for row in flags[title]]
    groups = {title: parser.add_argument_group(title) for title in flags}
    for title, name, type_, demo, paper, text in rows:
        if type_ is bool:
            groups[title].add_argument(f"--{name}", action="store_true", help=text)
            continue
        if (demo, paper) != (None, None):
            shown = [", ".join(f"{model} {x}".removeprefix("* ") for model, x in value.items())
                     if isinstance(value, dict) else value for value in (demo, paper)]
            text += f" (demo: {shown[0]}; paper: {shown[1]})"
        choices, type_ = (type_, str) if isinstance(type_, tuple) else (None, type_)
        groups[title].add_argument(f"--{name}", type=type_, choices=choices, help=text)
    given = vars(parser.parse_args())

    model = given.get("model", next(demo for _, name, _, demo, _, _ in rows if name == "model"))
    args = {name: paper if "data" in given else demo for _, name, _, demo, paper, _ in rows}
    args = {k: v.get(model, v["*"]) if isinstance(v, dict) else v for k, v in args.items()}
    args["out"] = args["out"].format(model=model)
    args |= given
    path, ckpt = os.path.join(args["out"], "ckpt.pt"), None
    if args["resume"]:
        ckpt = or_exit(ae.read_checkpoint, path)
        if ckpt.get("kind") != kind:
            sys.exit(f"{path} is of kind {ckpt.get('kind')}, this script resumes kind {kind}: check --out")
        saved = ckpt["args"]
        for name in sorted(given.keys() & saved.keys() - FREE_ON_RESUME):
            if given[name] != saved[name]:
                sys.exit(f"{path} is of a run with --{name} {saved[name]}, not {given[name]}: leave the flag "
                         "out to resume it, or start afresh in another --out")
        args = {**args, **saved, **given}
    elif os.path.exists(path):
        sys.exit(f"{path} exists: go on with --resume, or choose another --out")
    return argparse.Namespace(**args, given=set(given)), ckpt

def settings(args):
    """What a checkpoint keeps of the flags: plain values by name."""
    return {name: value for name, value in vars(args).items() if name not in ("given", "resume", "device")}

def setup(args):
    """Device, precision, process group, micro-batch: completes args, returns rank and number of processes."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.device is None:
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    cuda = args.device.startswith("cuda")
    if args.device != "cpu" and not (cuda and torch.cuda.is_available()):
        sys.exit(f"--device {args.device} is not there: cpu, or cuda where PyTorch finds a GPU")
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.compile = int(cuda) if args.compile is None else args.compile
    if cuda:
        torch.cuda.set_device(args.device)
        torch.set_float32_matmul_precision("high")   # TF32 for what stays float32
    if args.batch % world:
        sys.exit(f"--batch {args.batch} does not divide over {world} processes")
    share = args.batch // world   # images of one process in a step
    if "micro_batch" in args.given and share % args.micro_batch:
        sys.exit(f"--micro_batch {args.micro_batch} does not divide the {share} images of a process a step")
    args.micro_batch = max(m for m in range(1, min(args.micro_batch, share) + 1) if share % m == 0)
    os.makedirs(args.out, exist_ok=True)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return rank, world

def introduce(args, images, world, net, *inputs):
    """The settings in force, the data, the size of the network and its cost on one image, the inputs."""
    print(f"{'paper settings' if args.data else 'demo settings, for want of --data'}; in force: "
          + "  ".join(f"{name} {value}" for name, value in settings(args).items()))
    print(f"{len(images):,} images of {len(images.classes)} classes, {args.data or 'the bundled digits'}; "
          f"{args.steps:,} steps of {args.batch} on {world} processes, {args.micro_batch} at once")
    parameters = sum(p.numel() for p in net.parameters())
    print(f"{args.model}: {parameters:,} parameters, {parameters * 4 / 2 ** 20:.1f} MiB in float32, "
          f"{gflops(net, *inputs):.4g} GFLOPs forward an image, three times that in training", flush=True)

def gflops(module, *inputs):
    """Of one call, multiply and add counted as two; on PyTorch's meta device, so nothing is computed."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(module).to("meta")(*(x.to("meta") for x in inputs))
    return counter.get_total_flops() / 1e9

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
    line = {"step": step, **terms, "images_per_s": round(speed, 1), "seconds_left": left}
    with open(os.path.join(args.out, "log.jsonl"), "a") as file:
        file.write(json.dumps(line) + "\n")

def rewind_log(args, step):
    """Drop the lines after a step, which a resumed run writes again."""
    path = os.path.join(args.out, "log.jsonl")
    lines = open(path).readlines() if os.path.exists(path) else []
    with open(path, "w") as file:
        file.writelines(line for line in lines if json.loads(line)["step"] <= step)

# ---- Images, shared with train_dit.py ----

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)   # Pillow's on bad files

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
            sys.exit(f"--data {folder} holds images both in itself and in sub-folders: move the former")

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
    """The transform of Batches: random-resized crop of scale (0.75, 1), BICUBIC, and a flip half of the time,
    by (seed, epoch, index); digits as they are.
    """
    if not photographs:
        return center_crop(image, size)
    torch.manual_seed(seed_of(seed, epoch, index))   # torchvision draws from the global generator
    top, left, height, width = RandomResizedCrop.get_params(image, (0.75, 1.0), (3 / 4, 4 / 3))
    image = image.crop((left, top, left + width, top + height)).resize((size, size), Image.BICUBIC)
    return image.transpose(Image.FLIP_LEFT_RIGHT) if torch.rand(()) < 0.5 else image

class Batches(torch.utils.data.Dataset):
    """Micro-batches, each made by one worker: [[(index, *key), ...]] -> uint8 (B, 3, S, S), labels (B,), bad.

    transform(image, index, *key) -> image of S x S pixels. An unreadable image is replaced by the next, its
    index put into `bad`; with more than 1% of all images in there, the batch is 0.
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
    """Yields images (B, 3, S, S) in [-1, 1] and labels (B,) on the device; workers work ahead."""
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=keys, num_workers=args.workers,
                                         pin_memory=args.device.startswith("cuda"))
    bad = set()
    for x, y, unreadable in loader:
        for index in sorted(set(unreadable) - bad):
            print(f"warning: skipped {dataset.images.files[index]}, which cannot be read", file=sys.stderr)
        bad |= set(unreadable)
        if len(bad) > len(dataset.images) / 100:
            sys.exit(f"{len(bad)} of {len(dataset.images)} images cannot be read, more than 1%: remove them")
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
    """The learning rate of a step, the first is 0: warm-up from 0, then constant or half a cosine to 0."""
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
    """recon.png: originals, reconstructions; of a ViT also what it sees in training, and its prediction."""
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
    terms = [name for name in ae.MODELS[args.model].weights if name != "recon"]
    config["weights"] = {name: getattr(args, name) for name in terms}
    net = or_exit(ae.MODELS[args.model], **config).to(args.device)
    if args.image_size % net.patch_size:
        sys.exit(f"--image_size {args.image_size} is not a multiple of {net.patch_size}")
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

    if args.compile:
        parts = [net]
        if args.model == "sdvae":   # adaptive_weight takes gradients at the last layer, not compiled
            parts = [net.encoder, net.decoder.mid_block, *net.decoder.up_blocks]
        for part in parts:
            part.compile()
    model = DistributedDataParallel(net) if world > 1 else net
    share = args.batch // world
    accumulate = share // args.micro_batch   # micro-batches a step
    if rank == 0:
        introduce(args, images, world, net, torch.zeros(1, 3, args.image_size, args.image_size))
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
                    terms |= {"adv": adv, "adaptive": weight, "disc": loss_d, "real": real.mean(),
                              "fake": fake.mean()}
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
