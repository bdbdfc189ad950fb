"""Train an autoencoder (supplement, section B.1).

    python train_ae.py                                          the demo: a VMAE on digits
    python train_ae.py --model sdvae                            the demo with another autoencoder
    python train_ae.py --data DIR --image_size 128              own images, the paper's settings
    torchrun --nproc_per_node=8 train_ae.py --model vmae --data imagenet/train
    python train_ae.py --data DIR --resume                      go on from the last checkpoint
    python train_ae.py --eval --ckpt A.pt B.pt --data VAL       judge autoencoders, a row each

Writes ckpt.pt, log.jsonl and recon.png (originals above reconstructions) into --out.
"""

import argparse
import copy
import datetime
import functools
import glob
import json
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor

import ae
import fid
from ae import choose_device, or_exit

# What argparse is to know of a flag
def number(low, high=math.inf, kind=float, **more):
    """A number from low to high."""
    def check(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)
    check.__name__ = kind.__name__   # for argparse's own message
    return {"type": check, "metavar": kind.__name__.upper(), **more}

one_of = lambda *names: {"choices": names}
count, natural = number(1, kind=int), number(0, kind=int)
share, positive, weight = number(0, 1), number(1e-9), number(0)
betas = number(0, 1, nargs=2)
switch = number(0, 1, int, nargs="?", const=1)
on, place = {"action": "store_true"}, {"metavar": "PATH"}

# A flag a line: name, kind, default without --data (demo), with --data (paper) if that is another, help. A
# dict holds defaults by autoencoder or family, "tune" with --tune_decoder, "*" else. Sources: S supplement,
# R authors' release, V VQGAN and latent diffusion, O our choice.
RUN = [   # of both training scripts
    ("data", place, None, "folder of images, sub-folders are classes; none: the demo's digits"),
    ("resume", on, False, "go on from --out's checkpoint, with its settings"),
    ("seed", natural, 0, "of everything random"),
    ("device", {"metavar": "NAME"}, None, "cpu, cuda, cuda:1, ...; default: cuda if there is one"),
    ("dtype", one_of("float32", "bfloat16"), None, "of matrix products; default: bfloat16 on cuda"),
    ("compile", switch, None, "1 or 0, torch.compile; default: 1 on cuda"),
    ("workers", natural, 0, min(8, os.cpu_count()), "processes a rank that load images or latents"),
    ("log_every", count, 50, "steps between log lines"),
]
BATCH = "images an optimiser step, over all processes, S"
MICRO_BATCH = "images a process at once, the rest is gradient accumulation; if not given, at most this, O"
CLIP = ("grad_clip", positive, math.inf, "longest gradient, longer ones are scaled; S: none")
FLAGS = {
    "run": [
        *RUN,
        ("out", place, "out/demo/{model}", "out/{model}", "folder for checkpoint, log and pictures"),
        ("init", place, None, "checkpoint to start the weights from, of any image size"),
        ("ckpt_every", count, 200, 1000, "steps between checkpoints and pictures"),
    ],
    "model": [
        ("model", one_of(*ae.MODELS), "vmae", "which autoencoder"),
        ("image_size", count, 32, {"conv": 256, "vit": 128, "tune": 256}, "pixels; ViT R, conv O"),
        ("latent_dim", count, {"conv": 16, "vit": 8}, 16, "channels of the latent, R"),
        ("channels", {**count, "nargs": "+"}, [32, 32, 64, 64], [128, 256, 512, 512], "conv: widths, R"),
        ("patch_size", count, 8, "ViT: pixels a side of a token, R"),
        ("hidden_size", count, 96, 192, "ViT: width, S"),
        ("depth", count, 3, 12, "ViT: encoder layers, S"),
        ("decoder_depth", count, 3, 12, "ViT: decoder layers, S"),
        ("num_heads", count, 4, 12, "ViT: heads, R"),
    ],
    "objective (visible, masked, kl, lpips, disc_weight are weights of terms)": [
        ("tune_decoder", on, False, "vmae's last stage: encoder frozen, no mask, MSE + LPIPS, R"),
        ("mask_ratio", share, 0.6, "ViT: share of tokens hidden from the encoder, vmae S, mae O"),
        ("recon", one_of("mse", "l1"), "mse", "conv: reconstruction, eq. 3's or V's"),
        ("noise_std", weight, 0.1, "dae: std of the corruption, O"),
        ("visible", weight, 0.5, "vmae: MSE of visible patches, R"),
        ("masked", weight, {"*": 0.5, "mae": 1.0}, "ViT: MSE of masked patches, R"),
        ("kl", weight, {"*": 5e-9, "vae": 1e-4, "vmae": 1e-6}, "KL: sdvae V rescaled, vae O, vmae R"),
        ("prior_std", positive, 1.0, "vmae: std that the KL draws to, the paper's; R's script has 1e-3"),
        ("lpips", weight, 0.0, {"*": 0.0, "sdvae": 1.0, "vmae": 0.5, "tune": 10.0}, "LPIPS: sdvae V, vmae R"),
        ("disc_weight", weight, 0.5, "sdvae: adversarial term, times the adaptive weight, V"),
        ("disc_start", count, 301, 5001, "sdvae: first step with the adversarial term, V"),
        ("disc_loss", one_of("hinge", "vanilla"), "hinge", "sdvae: V's or eq. 6's"),
    ],
    "optimisation": [
        ("epochs", positive, {"conv": 4, "vit": 10}, {"conv": 20, "vit": 400, "tune": 10}, "ViT R, conv O"),
        ("steps", count, None, "optimiser steps; default: from --epochs"),
        ("warmup", weight, 1, {"conv": 1, "vit": 10, "tune": 0}, "linear, epochs; ViT R, conv O"),
        ("schedule", one_of("cosine", "constant"), "cosine", {"*": "cosine", "sdvae": "constant"},
         "of the learning rate after the warm-up, R, O"),
        ("batch", count, {"conv": 32, "vit": 64}, {"*": 2048, "sdvae": 256}, BATCH),
        ("micro_batch", count, 64, {"conv": 16, "sdvae": 8, "vit": 128, "tune": 32}, MICRO_BATCH),
        ("base_lr", weight, {"conv": 8e-3, "vit": 4e-3}, {"conv": 1e-5, "vit": 1e-4, "tune": 1e-5},
         "learning rate at batch 256, S, tune R"),
        ("lr", weight, None, "learning rate; default: base_lr * batch / 256"),
        ("betas", betas, [0.9, 0.95], {"*": [0.9, 0.95], "sdvae": [0.5, 0.9]}, "AdamW; V, ViT R, O"),
        CLIP,
        ("weight_decay", weight, 0.0, {"conv": 0.0, "vit": 0.05}, "AdamW; sdvae V, ViT R, else O"),
    ],
    "evaluation, with --eval: reconstruction, smoothness, compression and cost of autoencoders": [
        ("eval", on, False, "instead of training: a table, eval.json and a picture each"),
        ("ckpt", {**place, "nargs": "+"}, None, "of ours, the authors' VMAE or diffusers' VAE"),
        ("masks", place, None, "folder of label images like ADE20K's or CelebAMask-HQ's: sigma2, rho"),
        ("inception", place, None, "file of Inception's weights, for rFID; default: downloaded once"),
        ("half_pixel", switch, 1, "rFID with: 1 pytorch-fid's resizing, as the paper; 0 the evaluator's"),
    ],
}
CONV = ("channels", "latent_dim", "recon")
VIT = ("image_size", "patch_size", "hidden_size", "depth", "decoder_depth", "num_heads", "latent_dim",
       "mask_ratio")
ARGUMENTS = {"ae": CONV, "dae": (*CONV, "noise_std"), "vae": CONV, "sdvae": CONV, "mae": VIT,
             "vmae": (*VIT, "prior_std", "tune_decoder")}   # of the classes in ae.MODELS, by the flag's name

def flags_of(model):
    """Flags that not every autoencoder has."""
    disc = {"disc_weight", "disc_start", "disc_loss"} if model == "sdvae" else set()
    return {*ARGUMENTS[model], *ae.MODELS[model].weights, *disc} - {"image_size"}

# ---- Settings, shared with train_dit.py ----
SIGNALS = (signal.SIGTERM, signal.SIGINT)   # end a training run after its step
FREE_ON_RESUME = {"data", "ae", "cache", "init", "out", "resume", "device", "dtype", "compile", "workers",
                  "steps", "micro_batch", "lr", "grad_clip", "log_every", "ckpt_every"}   # or not

def parse_args(doc, flags, kind):
    """(args, checkpoint of this kind to resume or None). A flag not given is the run's, else the default."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 28, 100),
        argument_default=argparse.SUPPRESS, allow_abbrev=False, usage="%(prog)s [flags]",
        epilog="Sources of defaults: S supplement, R the authors' release and LightningDiT, V VQGAN and\n"
        "latent diffusion, O our choice. demo: without --data, paper: with it. conv: ae, dae, vae, sdvae;\n"
        "vit: mae, vmae; tune: with --tune_decoder.")
    parser.error = lambda message: sys.exit(f"{parser.prog}: {message}")
    for title, rows in flags.items():
        group = parser.add_argument_group(title)
        for name, how, *values, text in rows:
            shown = [", ".join(f"{key} {x}".removeprefix("* ") for key, x in value.items())
                     if isinstance(value, dict) else str(value).replace("None", "none") for value in values]
            if values != [None] and how is not on:
                text += f" ({'demo' if values[1:] else 'default'}: {'; paper: '.join(shown)})"
            group.add_argument(f"--{name}", help=text, **how)
    given = vars(parser.parse_args())

    column = -1 if "data" in given else 0
    args = {name: values[column] for rows in flags.values() for name, _, *values, _ in rows} | given
    model = args["model"]
    keys = ["tune" if "tune_decoder" in given else model, model, "vit" if "mae" in model else "conv", "*"]
    for name, value in args.items():
        if isinstance(value, dict):
            args[name] = next(value[key] for key in keys if key in value)
        elif isinstance(value, str) and name not in given:   # of defaults that name a folder
            args[name] = value.format(model=model, out=args["out"])
    if "eval" in given and "out" not in given:
        args["out"] = "out/eval"
    path, ckpt = os.path.join(args["out"], "ckpt.pt"), None
    if args["resume"]:
        ckpt = or_exit(read_latest, path)
        if ckpt.get("kind") != kind or "args" not in ckpt:
            sys.exit(f"{path} is of kind {ckpt.get('kind')}, this script resumes kind {kind}: check --out")
        saved = ckpt["args"]
        for name in sorted(given.keys() & saved.keys() - FREE_ON_RESUME):
            if given[name] != saved[name]:
                sys.exit(f"{path} is of a run with --{name} {saved[name]}, not {given[name]}: leave the flag "
                         "out to resume it, or start afresh in another --out")
        paths = {name: args[name] for name in ("out", "data", "cache") if name in args}
        for name, value in paths.items():
            if saved[name] and not value:   # no path that a file names is opened
                sys.exit(f"{path} is of a run with --{name} {saved[name]}: to resume, name the folder again")
        args |= {**saved, **given, **paths}
    elif (os.path.exists(path) or os.path.exists(previous(path))) and "eval" not in given:
        sys.exit(f"{path} exists: go on with --resume, or choose another --out")
    return argparse.Namespace(**args, given=set(given)), ckpt

def settings(args):
    """What a checkpoint keeps of the flags: plain values by name."""
    passing = {"given", "resume", "device", "autocast", "compiled"}
    return {name: value for name, value in vars(args).items() if name not in passing}

def setup(args):
    """Device, precision, process group, micro-batch: completes args, returns rank and number of processes."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank == 0:
        print("paper settings" if args.data else "demo settings, for want of --data", flush=True)
    args.device = choose_device(args.device)
    cuda = args.device != "cpu"
    args.autocast = cuda if args.dtype is None else args.dtype == "bfloat16"
    args.compiled = bool(cuda if args.compile is None else args.compile)
    if args.batch % world:
        sys.exit(f"--batch {args.batch} does not divide over {world} processes")
    part = args.batch // world   # images of one process in a step
    if "micro_batch" in args.given and part % args.micro_batch:
        sys.exit(f"--micro_batch {args.micro_batch} does not divide the {part} images of a process in a step")
    args.micro_batch = max(m for m in range(1, min(args.micro_batch, part) + 1) if part % m == 0)
    or_exit(os.makedirs, args.out, exist_ok=True)
    if world > 1:   # the others wait while rank 0 draws pictures, or one fills the cache's last shard
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=6))
    return rank, world

def introduce(args, images, world, net, *inputs):
    """The settings in force, the data, the size of the network and its cost on one image, the inputs."""
    print("  ".join(f"{name} {value}" for name, value in settings(args).items()) + f"  device {args.device}  "
          f"{'bfloat16' if args.autocast else 'float32'}{', compiled' if args.compiled else ''}")
    print(f"{len(images):,} images of {len(images.classes)} classes, {args.data or 'the bundled digits'}; "
          f"{args.steps:,} steps of {args.batch} on {world} processes, {args.micro_batch} at once")
    parameters = sum(p.numel() for p in net.parameters())
    print(f"{args.model}: {parameters:,} parameters, {parameters * 4 / 2 ** 20:.1f} MiB in float32, "
          f"{gflops(net, *inputs):.4g} GFLOPs forward an image, three times that in training", flush=True)

def gflops(module, *inputs, method="forward"):
    """Of one call, multiply and add counted as two; on PyTorch's meta device, so nothing is computed."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        getattr(copy.deepcopy(module).to("meta"), method)(*(x.to("meta") for x in inputs))
    return counter.get_total_flops() / 1e9

def seed_of(*key):
    """Integers, such as (seed, epoch, index) -> one seed."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])

def generator(device, *key):
    """All that is random in a step comes from generator(device, seed, step)."""
    return torch.Generator(device).manual_seed(seed_of(*key))

def previous(path):
    return path.removesuffix(".pt") + ".previous.pt"

def read_latest(path):
    """The checkpoint to resume: ckpt.pt, or with a warning the one before if that is damaged or missing."""
    try:
        return ae.read_checkpoint(path)
    except (OSError, ValueError) as error:
        if not os.path.exists(previous(path)):
            raise
        print(f"warning: {error}; going on from the one before, {previous(path)}", file=sys.stderr)
        return {**ae.read_checkpoint(previous(path)), "damaged": True}   # the latest, which is not to be kept

def finished(args, ckpt, images):
    """Whether the run to resume has no steps left, which it says. The images must be the same."""
    n = len(images)
    if (ckpt["images"], ckpt.get("class_names", images.classes)) != (n, images.classes):
        sys.exit(f"--resume: the run had {ckpt['images']} images, --data holds {n}, or other classes")
    if ckpt["step"] >= args.steps:
        print(f"{args.out} is finished, at step {ckpt['step']}")
    return ckpt["step"] >= args.steps

class Run:
    """The bookkeeping of a training run: its log, its checkpoints, and what may happen on the way.

    A step with a loss or a gradient that is not finite changes nothing, 20 of them in a row end the run;
    SIGTERM and SIGINT end it after the step, saved. Only a step that is logged or saved waits for the device.
    parts: modules and optimisers by their names in checkpoints; those of ckpt, if there is one, go on.
    """
    def __init__(self, args, rank, world, ckpt, **parts):
        self.args, self.rank, self.world, self.parts = args, rank, world, parts
        for name in parts if ckpt else ():
            parts[name].load_state_dict(ckpt[name])
        self.done = ckpt["step"] if ckpt else 0   # steps
        self.skipped = torch.tensor(ckpt["skipped"] if ckpt else 0.0, device=args.device)   # of these
        self.saved = 0 if ckpt and "damaged" in ckpt else self.done   # the step that ckpt.pt holds
        self.in_row = torch.zeros((), device=args.device)              # skipped ones, up to now
        self.seen = torch.zeros((), pin_memory=args.device != "cpu")   # the same, on a GPU some steps ago
        self.ending = self.signalled = False
        for number in SIGNALS:
            signal.signal(number, lambda *_: setattr(self, "signalled", True))
        self.log = os.path.join(args.out, "log.jsonl")
        if rank == 0 and os.path.exists(self.log):   # what follows the checkpoint comes again
            with open(self.log, "rb") as old, ae.whole_file(self.log) as new:
                new.writelines(line for line in old   # not torn, not later
                               if line.endswith(b"\n") and json.loads(line)["step"] <= self.done)
        self.clock = time.time(), self.done
    def step(self, terms, optimizers, lr):
        """An optimiser step, logged if due -> 1.0, or 0.0 if skipped. terms: detached, of this process."""
        norms = []
        for optimizer in optimizers:
            groups = optimizer.param_groups
            for group in groups:
                group["lr"] = lr
            grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
            norms.append(torch.stack(torch._foreach_norm(grads)).norm())
            if self.args.grad_clip < math.inf:
                torch._foreach_mul_(grads, (self.args.grad_clip / norms[-1]).clamp(max=1))
        values = torch.stack(list(terms.values()))
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        bad = 1 - torch.cat([values, torch.stack(norms)]).isfinite().all().float()
        for optimizer in optimizers:
            optimizer.found_inf = bad   # as torch.amp tells a fused optimiser, on the device, to do nothing
            optimizer.step()
            optimizer.zero_grad()
        self.skipped += bad
        self.in_row = (self.in_row + 1) * bad
        self.seen.copy_(self.in_row, non_blocking=True)
        self.done += 1
        if self.done == 1 or self.done % self.args.log_every == 0 or self.done == self.args.steps:
            values = torch.cat([values, norms[0][None], self.skipped[None]]).tolist()   # waits for the device
            if self.rank == 0:
                self.write({**dict(zip([*terms, "grad_norm", "skipped"], values)), "lr": lr})
            self.clock = time.time(), self.done
        return 1 - bad
    def write(self, terms):
        """A line on the screen and in log.jsonl."""
        speed = (self.done - self.clock[1]) * self.args.batch / (time.time() - self.clock[0])
        left = int((self.args.steps - self.done) * self.args.batch / speed)
        print(f"step {self.done}/{self.args.steps}", *(f"{name} {term:.4g}" for name, term in terms.items()),
              f"{speed:.0f} images/s", f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left", sep="  ",
              flush=True)
        line = {"step": self.done, **terms, "images_per_s": round(speed, 1), "seconds_left": left}
        try:
            with open(self.log, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            print(f"warning: {error}", file=sys.stderr)
    def due(self):
        """Whether a checkpoint is: by the number of steps, or because a signal reached any process."""
        flags = torch.tensor([self.signalled, self.seen >= 20], dtype=torch.int)
        if self.world > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)   # on the CPU, it does not wait for a GPU
        self.ending = bool(flags[0])
        if flags[1]:
            sys.exit("20 steps in a row had a loss or a gradient that is not finite and were skipped: go on "
                     "from the last checkpoint with --resume and a smaller --lr or --grad_clip 1")
        return self.ending or self.done % self.args.ckpt_every == 0 or self.done == self.args.steps
    def save(self, draw, **ckpt):
        """ckpt and the parts as ckpt.pt, the one before as ckpt.previous.pt; then the picture, by draw()."""
        if self.rank > 0:
            return
        path = os.path.join(self.args.out, "ckpt.pt")
        ckpt |= {name: part.state_dict() for name, part in self.parts.items()}
        ckpt |= {"step": self.done, "skipped": self.skipped.item(), "args": settings(self.args)}
        try:
            with ae.whole_file(path, previous(path) if self.saved else None) as file:
                torch.save(ckpt, file)
            self.saved = self.done
        except OSError as error:
            print(f"warning: step {self.done} is not saved, {path} stays as it was: {error}", file=sys.stderr)
        try:
            if not self.ending:
                draw()
        except OSError as error:
            print(f"warning: no picture of step {self.done}: {error}", file=sys.stderr)
        self.clock = time.time(), self.done   # without the time this took
    def finish(self, picture):
        """The last words."""
        if self.world > 1:
            dist.barrier()   # none leaves while rank 0 is still saving
            dist.destroy_process_group()
        if self.rank > 0:
            return
        if self.saved < self.done:
            sys.exit("the end of the run is not saved: make room, then go on with --resume")
        if self.ending:
            launch = f"torchrun --nproc_per_node={self.world} --" if self.world > 1 else "python"
            command = shlex.join(sys.argv) + " --resume" * (not self.args.resume)
            print(f"stopped by a signal after step {self.done}; to go on:\n{launch} {command}", flush=True)
        else:
            print(f"wrote {self.args.out}/ckpt.pt and {self.args.out}/{picture}")

# ---- Images, shared with train_dit.py ----
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")

class Images:
    """RGB images by index, with .labels and .classes: the demo's digits, or a folder's files."""
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
        # sub-folders are classes, whatever lies deeper in them; a flat folder is one class, ""
        tops = [os.path.dirname(os.path.relpath(file, folder)).split(os.sep)[0] for file in self.files]
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
            image.load()
            if max(image.size) > 50 * min(image.size):
                raise ValueError("a strip of which a square crop shows nothing")
            if image.mode.startswith("I"):   # 16-bit grey, which convert would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            return image if image.mode == "RGB" else image.convert("RGB")

def center_crop(image, size):
    """ADM's: halve with BOX while that leaves at least `size`, BICUBIC to a shorter side of `size`, crop."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))

def augment(size, seed, photographs, image, index, epoch, flip):
    """The transform of Batches: a random-resized crop by (seed, epoch, index), flipped where the key says so."""
    if not photographs:   # digits, pictures for a look
        return pil_to_tensor(center_crop(image, size))
    torch.default_generator.manual_seed(seed_of(seed, epoch, index))   # torchvision draws from it
    top, left, height, width = RandomResizedCrop.get_params(image, (0.75, 1.0), (3 / 4, 4 / 3))
    pixels = pil_to_tensor(image.crop((left, top, left + width, top + height)))[None]
    # Pillow's resize, width first, in a third of its time; to 1/255, a value in a million to 2/255
    pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)[0]
    return pixels.flip(-1) if flip else pixels

class Batches(torch.utils.data.Dataset):
    """Micro-batches, each made by one worker: [[(index, *key), ...]] -> uint8 (B, 3, S, S), labels (B,), bad.

    transform(image, index, *key) -> uint8 (3, S, S). An unreadable image is replaced by the next, its
    index put into `bad`; with more than the tolerated share of all in there, the batch is 0.
    """
    def __init__(self, images, transform, tolerate=0.01):
        self.images, self.transform, self.limit = images, transform, tolerate * len(images)
    def __getitem__(self, keys):
        pixels, labels, bad = [], [], set()
        for index, *key in keys:
            image = None
            while image is None:
                try:
                    image = self.images[index]
                except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):   # Pillow's
                    bad.add(index)
                    if len(bad) > self.limit:
                        return 0, 0, sorted(bad)
                    index = (index + 1) % len(self.images)
            pixels.append(self.transform(image, index, *key))
            labels.append(self.images.labels[index])
        return torch.stack(pixels), torch.tensor(labels), sorted(bad)

def ignore_signals(worker):
    """A signal to the process group is the training loop's, which ends after its step; workers go with it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

def load_batches(dataset, keys, args):
    """Yields images (B, 3, S, S) in [-1, 1] and labels (B,) on the device; workers work ahead."""
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=keys, num_workers=args.workers,
                                         pin_memory=args.device != "cpu", worker_init_fn=ignore_signals)
    bad = set()
    try:
        for x, y, unreadable in loader:
            for index in set(unreadable) - bad:
                print(f"warning: {dataset.images.files[index]} cannot be read, skipped", file=sys.stderr)
            bad.update(unreadable)
            if len(bad) > dataset.limit:
                sys.exit(f"{len(bad)} of {len(dataset.images)} images cannot be read, more than "
                         f"{dataset.limit / len(dataset.images):.0%}: remove them")
            x, y = (part.to(args.device, non_blocking=True) for part in (x, y))
            yield x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x, y
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            sys.exit(f"a process that loads images died, for want of memory? Try fewer --workers. {error}")
        raise

def micro_batches(args, rank, world):
    """This process's part of every global batch, as slices of it, a micro-batch each."""
    part = args.batch // world
    starts = range(rank * part, (rank + 1) * part, args.micro_batch)
    return [slice(start, start + args.micro_batch) for start in starts]

def training_keys(args, n, rank, world, start):
    """(index, epoch, flip) of each image, micro-batch by micro-batch: this rank's part of every global batch.

    The epochs' orders, by (seed, epoch), stand one behind the other; a step takes the next `batch` images.
    """
    order = functools.lru_cache(2)(lambda epoch: np.random.default_rng((args.seed, epoch)).permutation(n))
    for step in range(start, args.steps):
        flips = torch.rand(args.batch, generator=generator("cpu", args.seed, step, 1)) < 0.5
        for rows in micro_batches(args, rank, world):
            places = range(step * args.batch, (step + 1) * args.batch)[rows]
            yield [(int(order(p // n)[p % n]), p // n, bool(flips[p % args.batch])) for p in places]

# ---- Training ----
def schedule(args, step, warmup):
    """The learning rate of a step, the first is 0: warm-up from 0, then constant or half a cosine to 0."""
    if step < warmup:
        return args.lr * step / warmup
    if args.schedule == "constant":
        return args.lr
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup)))

def preview_images(images, args):
    """Ten images for pictures (10, 3, S, S), spread over all."""
    dataset = Batches(images, functools.partial(augment, args.image_size, args.seed, False))
    return next(load_batches(dataset, [[(i * len(images) // 10, 0, False) for i in range(10)]], args))[0]

@torch.no_grad()
def draw_reconstructions(net, x, args):
    """recon.png: originals, reconstructions; of a ViT also what training shows it, and its prediction."""
    rows = {"original": x, "reconstruction": net.decode(net.encode(x).mode())}
    if "mask_ratio" in ARGUMENTS[args.model]:
        draws = net.randomness(len(x), args.image_size, generator(args.device, args.seed))
        prediction, _, mask = net.masked_pass(x, **draws)
        mask = F.interpolate(mask.view(-1, 1, net.grid, net.grid), scale_factor=net.patch_size)   # of pixels
        rows |= {"masked input": x * (1 - mask), "prediction": torch.where(mask > 0, prediction, x)}
    ae.save_grid(os.path.join(args.out, "recon.png"), [ae.to_uint8(row) for row in rows.values()], list(rows))

# ---- Evaluation ----
EPS = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3)   # of noise on latents, in units of each channel's std

def ssim(x, y, data_range=2.0):
    """Wang et al. 2004: images (B, 3, H, W) -> (B,), mean over channels and places; Gaussian, sigma 1.5."""
    window = torch.exp(-torch.arange(-5, 6, device=x.device).double().square() / (2 * 1.5 ** 2))
    window = torch.outer(window, window)[None, None] / window.sum() ** 2
    x, y = (image.double().flatten(0, 1)[:, None] for image in (x, y))   # variances are small differences
    mean_x, mean_y, xx, yy, xy = (F.conv2d(image, window) for image in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x ** 2 + mean_y ** 2 + c1)
    structure = (2 * (xy - mean_x * mean_y) + c2) / (xx - mean_x ** 2 + yy - mean_y ** 2 + c2)
    return (luminance * structure).view(-1, 3 * luminance[0].numel()).mean(1)

def image_name(name):
    """Numbers without leading zeros, which CelebAMask-HQ's images do not have and its masks do."""
    return str(int(name)) if name.isdecimal() else name

def find_masks(folder):
    """Label images by their image's name: ADE20K's NAME.png, CelebAMask-HQ's 00012_hair.png for image 12."""
    masks = {}
    for file in sorted(glob.glob(os.path.join(glob.escape(folder), "**", "*.png"), recursive=True)):
        name = Path(file).stem
        number, _, part = name.partition("_")
        owner, part = (number, part) if part and number.isdecimal() else (name, "")
        masks.setdefault(image_name(owner), []).append((file, part))
    return masks

def segments(files, grid):
    """(label, boolean mask (grid, grid)) of an image's label images, cropped as it is; 0 is no label."""
    for file, part in files:
        with Image.open(file) as image:
            image = image.convert("L") if part else image
            values = np.asarray(ImageOps.fit(image, (grid, grid), Image.NEAREST))
        if values.ndim > 2:
            sys.exit(f"--masks: {file} is in colour; a label image has one value a pixel, the label")
        for value in np.unique(values[values > 0]):
            yield part or int(value), values == value   # CelebAMask-HQ's name, ADE20K's value

def power_sums(z):
    """z (C, n) -> (3, C): n, sum and sum of squares of each channel, float64."""
    return torch.stack([z.double() ** power for power in range(3)]).sum(2)

def compression(labels, sums, std):
    """sigma2 and rho of segments, a label in one image each: our reading, the supplement gives no formulas.

    labels, sums (S, 3, C): of each segment, power_sums; std (C,): of all latents, by which they are divided.
    sigma2: the variance within a segment, mean over channels and, weighted by size, over segments. rho: the
    mean distance between the centroids of two labels over the root of the variance within a label, or NaN.
    """
    n, total, squares = (sums / torch.stack([std ** 0, std, std ** 2])).unbind(1)   # (S, C) each
    sigma2 = ((squares - total ** 2 / n).sum(0) / n.sum(0)).mean()
    _, index = np.unique([str(label) for label in labels], return_inverse=True)
    member = F.one_hot(torch.from_numpy(index)).T.double()   # (labels, S)
    n, total, squares = member @ n, member @ total, member @ squares
    variance = (squares - total ** 2 / n).sum() / n[:, 0].sum()
    return {"sigma2": sigma2.item(), "rho": (torch.pdist(total / n).mean() / variance.sqrt()).item()}

def perturbed(net, x, std, args, indices):
    """Decodings of posterior mean + eps * std * N(0, 1) for each of EPS; the noise is by (seed, index)."""
    z = net.encode(x).mode()
    noise = torch.stack([torch.randn(z.shape[1:], generator=generator("cpu", args.seed, i)) for i in indices])
    noise = noise.to(z.device) * std.float().view(-1, 1, 1)
    return [net.decode(z + eps * noise).float() for eps in EPS]

def judge(net, args, images, masks, lpips, inception, rank, world):
    """What the table says of one autoencoder, as a dict, and the std of its latents' channels (C,)."""
    dataset = Batches(images, functools.partial(augment, args.image_size, args.seed, False), tolerate=0)
    parts = [part.tolist() for part in torch.arange(len(images)).split(args.micro_batch)[rank::world]]
    keys = [[(index, 0, False) for index in part] for part in parts]

    moments, found = torch.zeros(3, net.latent_dim, dtype=torch.float64, device=args.device), []
    for part, (x, _) in zip(parts, load_batches(dataset, keys, args)):
        for index, z in zip(part, or_exit(net.encode, x).mode()):
            moments += power_sums(z.flatten(1))
            files = masks.get(image_name(Path(images.files[index]).stem), []) if masks else []
            for label, mask in segments(files, z.shape[-1]):
                found.append((label, power_sums(z[:, torch.from_numpy(mask).to(z.device)]).cpu()))
    n, total, squares = fid.all_reduce(moments)
    std = ((squares - total ** 2 / n) / (n - 1)).sqrt()

    to_bytes = lambda images: torch.from_numpy(ae.to_uint8(images)).permute(0, 3, 1, 2).to(args.device)
    tally = torch.zeros(len(EPS), 4, dtype=torch.float64, device=args.device)
    # of the originals, then of the decodings for each of EPS
    features = [fid.Statistics(2048, args.device) for _ in range(1 + len(EPS))] if inception else []
    for part, (x, _) in zip(parts, load_batches(dataset, keys, args)):
        original, decodings = to_bytes(x), perturbed(net, x, std, args, part)
        for tally_eps, x_hat in zip(tally, decodings):
            l1 = (x_hat - x).abs().mean((1, 2, 3)) / 2
            mse = (to_bytes(x_hat).double() - original.double()).square().mean((1, 2, 3))
            psnr = 10 * torch.log10(255 ** 2 / mse.clamp(min=1e-10))
            distance = lpips(x_hat, x).flatten() if lpips else torch.full_like(l1, math.nan)
            tally_eps += torch.stack([l1, psnr, ssim(x_hat, x), distance]).sum(1)
        for statistics, image in zip(features, [x, *decodings]):
            statistics.update(inception(to_bytes(image))[0])
    l1, psnr, similarity, distance = (fid.all_reduce(tally) / len(images)).T.tolist()
    features = [statistics.finish() for statistics in features]
    rfid = [fid.frechet_distance(*features[0], *fake) for fake in features[1:]] or [math.nan] * len(EPS)
    row = {"L1": l1[0], "PSNR": psnr[0], "SSIM": similarity[0], "LPIPS": distance[0], "rFID": rfid[0],
           f"PSNR at eps {EPS[1:]}": psnr[1:], "LPIPS at them": distance[1:], "rFID at them": rfid[1:]}
    if masks:
        gathered = [found] * world
        if world > 1:
            dist.all_gather_object(gathered, found)
        if not any(gathered):
            sys.exit(f"--masks {args.masks}: no label image of these has a label in it")
        labels, sums = zip(*sum(gathered, []))
        row |= compression(labels, torch.stack(sums), std.cpu())
    return row, std

@torch.no_grad()
def evaluate(args):
    """--eval: a Markdown table with a row a checkpoint on the screen, eval.json and a picture each in --out.

    The paper's conventions: posterior mean; PSNR of uint8 images, averaged; SSIM over a range of 2 and LPIPS
    on unclamped decodings; rFID with pytorch-fid's resizing. L1's scale is not stated: the AE's PSNR, 32.18,
    is a root mean square error of 0.025 on [0, 1], 0.049 on [-1, 1]; its L1, 0.0218, goes with the first.
    """
    if not args.ckpt:
        sys.exit("--eval needs --ckpt CKPT [CKPT ...]")
    if "micro_batch" not in args.given:
        args.micro_batch = 16   # in float32, of any autoencoder
    args.batch = args.micro_batch * int(os.environ.get("WORLD_SIZE", 1))
    rank, world = setup(args)
    nets = [or_exit(ae.load, path) for path in args.ckpt]   # all, before hours go into the first
    images, masks = Images(args.data, held_out=True), find_masks(args.masks) if args.masks else {}
    if args.masks and (images.digits or not any(image_name(Path(file).stem) in masks
                                            for file in images.files)):
        sys.exit(f"--masks {args.masks} holds no NAME.png or 00012_hair.png for the images of --data")
    absent = []
    def if_there(measure, load, *flags):
        try:
            return load(*flags).to(args.device)
        except (FileNotFoundError, ValueError) as error:
            absent.append(f"{measure} is not computed: {error}")
    lpips = if_there("LPIPS", ae.lpips_vgg)
    inception = if_there("rFID", fid.load_inception, args.inception, bool(args.half_pixel))

    rows, given = [], args.image_size if "image_size" in args.given else None
    for path, net in zip(map(Path, map(os.path.abspath, args.ckpt)), nets):
        net.to(args.device)
        size = given if given and not hasattr(net, "grid") else net.image_size   # a ViT takes its own alone
        args.image_size = size or (32 if images.digits else 256)
        quality, std = judge(net, args, images, masks, lpips, inception, rank, world)
        x, name = preview_images(images, args), path.parent.name if path.stem == "ckpt" else path.stem
        name += f"-{len(rows)}" * any(name == row["autoencoder"] for row in rows)
        columns = [ae.to_uint8(image) for image in [x, *perturbed(net, x, std, args, range(len(x)))]]
        if rank == 0:
            ae.save_grid(os.path.join(args.out, f"{name}.png"), np.stack(columns, 1), [""] * len(x),
                         ["original", *(f"eps {eps:g}" for eps in EPS)])
        start = time.time()   # the pictures have warmed up
        for _ in range(3):
            z = net.encode(x).mode()
            net.decode(z).sum().item()   # waits for the device
        speed = 3 * len(x) / (time.time() - start)
        parameters = sum(p.numel() for p in net.parameters())
        rows.append({"autoencoder": name, "pixels": args.image_size, "parameters": parameters,
                     "MiB": parameters * 4 / 2 ** 20, "GFLOPs encode": gflops(net, x[:1], method="encode"),
                     "decode": gflops(net, z[:1], method="decode"), "images/s": speed, **quality})
    if rank == 0:
        print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
        show = lambda v: "-" if v != v else f"{v:.4g}" if isinstance(v, float) else str(v)
        for row in rows:
            cells = [", ".join(map(show, v)) if isinstance(v, list) else show(v) for v in row.values()]
            print("| " + " | ".join(cells) + " |")
        print("\n".join(absent))
        rows = json.loads(json.dumps(rows), parse_constant=lambda nan: None)   # which JSON does not have
        record = {"data": args.data, "ckpt": args.ckpt, "rows": rows, "not computed": absent}
        Path(args.out, "eval.json").write_text(json.dumps(record, indent=1))
    if world > 1:
        dist.destroy_process_group()

def main():
    args, ckpt = parse_args(__doc__, FLAGS, "autoencoder")
    if args.eval:
        return evaluate(args)
    rank, world = setup(args)
    images = Images(args.data)
    n = len(images)
    args.steps = args.steps or max(1, round(args.epochs * n / args.batch))
    if ckpt and finished(args, ckpt, images):
        return
    if args.lr is None:
        args.lr = args.base_lr * args.batch / 256

    torch.manual_seed(args.seed)   # weights start the same on every rank
    allowed = flags_of(args.model)
    if args.tune_decoder:
        allowed -= {"mask_ratio", "visible", "masked", "kl", "prior_std"}
    for name in args.given & set().union(*map(flags_of, ae.MODELS)) - allowed:
        sys.exit(f"--{name} is not a flag of --model {args.model}{' --tune_decoder' * args.tune_decoder}")
    for name in args.given & {"ckpt", "masks", "inception", "half_pixel"}:
        sys.exit(f"--{name} is a flag of --eval: to start from a checkpoint, name it with --init")
    if args.tune_decoder and not (args.init or ckpt):
        sys.exit("--tune_decoder is VMAE's last stage: it needs --init CKPT")
    config = {name: getattr(args, name) for name in ARGUMENTS[args.model]}
    config["weights"] = {name: getattr(args, name) for name in ae.MODELS[args.model].weights}
    net = or_exit(ae.MODELS[args.model], **config).to(args.device)
    if args.init and not ckpt:
        start = or_exit(ae.load, args.init)
        state = start.state_dict()
        if "pos_embed" in state and hasattr(net, "grid"):
            state = ae.resize_positions(state, net.grid)
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in net.state_dict().items()}:
            sys.exit(f"--init {args.init} is of another model or of other sizes than the flags say: "
                     f"it holds a {start.recipe['name']} of {start.recipe['config']}")
        net.load_state_dict(state)
    if args.tune_decoder:   # what comes after the latent; not mask_token, nothing is masked
        net.requires_grad_(False)
        for name, module in net.named_children():
            module.requires_grad_(name == "from_latent" or name.startswith("decoder"))
    if args.image_size % net.patch_size:
        sys.exit(f"--image_size {args.image_size} is not a multiple of {net.patch_size}")
    if args.model == "sdvae" and args.image_size < 24:
        sys.exit(f"--image_size {args.image_size} is too small for sdvae's discriminator: 24 at least")
    perceptual = None
    if args.lpips > 0:
        lpips = or_exit(ae.lpips_vgg).to(args.device, memory_format=torch.channels_last)
        perceptual = lambda x_hat, x: lpips(x_hat, x).mean()

    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": args.weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]   # biases and norms
    optimizer = torch.optim.AdamW(groups, args.lr, args.betas, fused=True)
    parts, compiled = {"model": net, "optimizer": optimizer}, [net]
    if args.model == "sdvae":
        disc = ae.Discriminator().to(args.device)
        if world > 1 and args.device.startswith("cuda"):
            disc = torch.nn.SyncBatchNorm.convert_sync_batchnorm(disc)
        disc_optimizer = torch.optim.AdamW(disc.parameters(), args.lr, args.betas, weight_decay=0, fused=True)
        parts |= {"disc": disc, "disc_optimizer": disc_optimizer}
        # adaptive_weight takes gradients at the last layer, which is not compiled
        compiled = [net.encoder, net.decoder.mid_block, *net.decoder.up_blocks]
    for module in compiled if args.compiled else ():
        module.compile()
    model = DistributedDataParallel(net, gradient_as_bucket_view=True) if world > 1 else net
    if rank == 0:
        introduce(args, images, world, net, torch.zeros(1, 3, args.image_size, args.image_size))
        preview = preview_images(Images(held_out=True) if images.digits else images, args)

    run = Run(args, rank, world, ckpt, **parts)
    dataset = Batches(images, functools.partial(augment, args.image_size, args.seed, not images.digits))
    batches = load_batches(dataset, training_keys(args, n, rank, world, run.done), args)
    slices = micro_batches(args, rank, world)
    for step in range(run.done, args.steps):
        adversarial = args.model == "sdvae" and step + 1 >= args.disc_start
        draws = net.randomness(args.batch, args.image_size, generator(args.device, args.seed, step))
        totals = {}
        for rows in slices:
            x, _ = next(batches)
            draw = {name: value[rows] for name, value in draws.items()}
            model.require_backward_grad_sync = rows == slices[-1]   # gradients travel once a step
            with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.autocast):
                loss, terms, x_hat = model(x, perceptual=perceptual, **draw)
                if adversarial:   # the third term of eq. 6
                    disc.requires_grad_(False)   # its gradients are to come from its own loss alone
                    adv = ae.generator_loss(disc(x_hat).float())
                    adaptive = ae.adaptive_weight(loss, adv, net.decoder.conv_out.weight)
                    loss = loss + args.disc_weight * adaptive * adv
                    disc.requires_grad_(True)
                    real, fake = disc(x).float(), disc(x_hat.detach()).float()
                    loss_d = ae.disc_loss(real, fake, args.disc_loss)
                    terms |= {"adv": adv, "adaptive": adaptive, "disc": loss_d, "real": real.mean(),
                              "fake": fake.mean()}
            (loss / len(slices)).backward()
            if adversarial:
                (loss_d / len(slices)).backward()
            for name, term in {"loss": loss, **terms}.items():
                totals[name] = totals.get(name, 0) + term.detach() / len(slices)
        for p in disc.parameters() if adversarial and world > 1 else ():
            dist.all_reduce(p.grad)
            p.grad /= world
        optimizers = [optimizer, disc_optimizer] if adversarial else [optimizer]
        run.step(totals, optimizers, schedule(args, step, args.warmup * n / args.batch))
        if run.due():
            run.save(lambda: draw_reconstructions(net, preview, args), kind="autoencoder", name=args.model,
                     config=config, images=n)
        if run.ending:
            break
    run.finish("recon.png")

if __name__ == "__main__":
    main()
