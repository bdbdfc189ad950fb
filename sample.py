"""Draw pictures from a trained DiT (supplement, section B.2 and figures I, II).

    python sample.py                                             the demo's digits, a row a class
    python sample.py --ckpt out/dit/ckpt.pt --labels 130 88      a grid of two classes
    torchrun --nproc_per_node=8 -- sample.py --ckpt out/dit/ckpt.pt --num 50000     for fid.py
    python sample.py --ckpt lightningdit.pt --ae vmae.pth --stats latents_stats.pt  of others

Sample i depends on --seed and i alone, not on the number of processes or the batch. (The --
keeps torchrun from taking --num for an abbreviation of a flag of its own.)
"""

import argparse
import json
import os
import shutil
import sys
import zipfile

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import ae
import dit
from ae import choose_device, or_exit

PAPER = {"sample_steps": 250, "cfg_scale": 10.0, "cfg_channels": 3, "cfg_start": 0.1, "shift": 0.3}
SHOWCASE = [975, 3, 207, 387, 388, 88, 979, 279]   # the ImageNet classes that the authors' release shows
PART = 256   # samples in a file of an unfinished samples.npz

def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, usage="%(prog)s [flags]",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 28, 100))
    parser.error = lambda message: sys.exit(f"sample.py: {message}")
    add = parser.add_argument_group("what").add_argument
    add("--ckpt", default="out/demo/dit/ckpt.pt", help="of train_dit.py or LightningDiT (default: demo)")
    add("--num", type=int, help="write this many to samples.npz (default: draw a grid, samples.png)")
    add("--labels", nargs="+", help="classes, 130 88 or 130,88 (default: all; grid: 10, ImageNet's: 8)")
    add("--columns", type=int, default=8, help="pictures a class in the grid (default: 8)")
    add("--seed", type=int, default=0, help="of noise and labels (default: 0)")
    add("--out", help="folder to write into (default: the checkpoint's)")
    add = parser.add_argument_group("how (default: the checkpoint's, else the paper's)").add_argument
    add("--steps", type=int, help="Euler steps (demo: 100, paper: 250)")
    add("--cfg_scale", type=float, help="guidance, 1 is none (demo: 1.3, paper: 10, 1 with a single class)")
    add("--cfg_channels", type=int, help="guided latent channels, the first ones (demo: 16, paper: 3)")
    add("--cfg_start", type=float, help="time from which on they are (demo and paper: 0.1)")
    add("--shift", type=float, help="of the time grid, below 1 towards the noise (demo and paper: 0.3)")
    add("--batch", type=int, default=64, help="pictures a process draws at once (default: 64)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add = parser.add_argument_group("for a checkpoint that does not carry them").add_argument
    add("--ae", help="checkpoint of the autoencoder")
    add("--stats", help="PyTorch file with the latents' mean and std per channel, a dict with these keys")
    args = parser.parse_args()
    least = {"num": 1, "columns": 1, "batch": 1, "steps": 1, "seed": 0, "cfg_channels": 0, "shift": 1e-9}
    for name, low in least.items():
        if getattr(args, name) is not None and not getattr(args, name) >= low:
            sys.exit(f"--{name} {getattr(args, name)} is too small: {low} at least")
    return args

def load(args):
    """DiT, autoencoder, latent mean and std (C, 1, 1), on the device; class names, sampling settings."""
    model, info = or_exit(dit.load, args.ckpt)
    if not args.ae and "ae" not in info:
        sys.exit(f"{args.ckpt} carries no autoencoder: name it with --ae")
    autoencoder = or_exit(ae.load, args.ae) if args.ae else or_exit(ae.from_checkpoint, info["ae"], args.ckpt)
    stats, prefix = (or_exit(ae.read_checkpoint, args.stats), "") if args.stats else (info, "latent_")
    if prefix + "mean" not in stats or prefix + "std" not in stats:
        sys.exit(f"{args.stats or args.ckpt} carries no latent mean and std: name them by --stats")
    mean, std = (torch.as_tensor(stats[prefix + name]).float().view(-1, 1, 1) for name in ("mean", "std"))
    channels, size = model.x_embedder["proj"].in_channels, model.grid * model.patch_size
    fits = channels == autoencoder.latent_dim == len(mean) == len(std)
    if not fits or size != getattr(autoencoder, "grid", size):
        sys.exit(f"the autoencoder ({autoencoder.latent_dim} channels, {getattr(autoencoder, 'grid', 'any')} "
                 f"a side) or the statistics ({len(mean)}, {len(std)} channels) do not fit the DiT's latents "
                 f"({channels} channels, {size} a side): name those it was trained on with --ae, --stats")
    defaults = info["args"] if info.get("kind") == "dit" else PAPER
    if model.class_dropout_prob == 0:
        defaults = {**defaults, "cfg_scale": 1.0}
    given = {**vars(args), "sample_steps": args.steps}
    settings = {name: defaults[name] if given[name] is None else given[name] for name in PAPER}
    if settings["cfg_scale"] > 1 and model.class_dropout_prob == 0:
        sys.exit("--cfg_scale above 1 needs a DiT of several classes that was trained with dropped labels")
    names = info.get("class_names", [""] * model.num_classes)
    return *(part.to(args.device) for part in (model, autoencoder, mean, std)), names, settings

@torch.no_grad()
def draw(loaded, args, indices, labels):
    """Samples by index -> uint8 (N, H, W, 3) and classes (N,). labels: a class each, or None to draw them."""
    model, autoencoder, mean, std, _, settings = loaded
    channels, size = model.x_embedder["proj"].in_channels, model.grid * model.patch_size
    rngs = [np.random.default_rng((args.seed, index)) for index in indices]
    noise = np.stack([rng.standard_normal((channels, size, size), dtype=np.float32) for rng in rngs])
    drawn = [args.labels[rng.integers(len(args.labels))] for rng in rngs]
    y = torch.tensor(drawn if labels is None else labels)
    batches = list(zip(torch.from_numpy(noise).split(args.batch), y.split(args.batch)))
    images = []
    for batch in tqdm(batches, "drawing", unit="batch", leave=False, disable=args.rank > 0):
        z = dit.sample(model, *(part.to(args.device) for part in batch), *settings.values())
        images.append(ae.to_uint8(autoencoder.decode(z * std + mean)))
    return np.concatenate(images), y.numpy()

def draw_npz(loaded, args, world):
    """samples.npz with arr_0, uint8 (N, H, W, 3), and arr_1, classes (N,), where there are several."""
    path, parts = os.path.join(args.out, "samples.npz"), os.path.join(args.out, "samples.parts")
    wanted = {"ckpt": os.path.realpath(args.ckpt), "modified": os.path.getmtime(args.ckpt), "num": args.num,
              "seed": args.seed, "labels": args.labels, "ae": args.ae, "stats": args.stats, **loaded[5]}
    record = os.path.join(parts, "settings.json")
    rows = {os.path.join(parts, f"{i // PART:06}.npz"): range(args.num)[i:i + PART]
            for i in range(0, args.num, PART)}   # a file each at first: an interrupted run goes on
    mine = [part for part in rows if not os.path.exists(part)][args.rank::world]
    if args.rank == 0 and not os.path.exists(record):
        os.makedirs(parts, exist_ok=True)
        with ae.whole_file(record) as file:
            file.write(json.dumps(wanted).encode())
    if world > 1:
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
        dist.barrier()   # all have looked
    if json.load(open(record)) != wanted:
        sys.exit(f"{parts} holds part of a run with other settings: finish that one, or remove the folder")
    for part in tqdm(mine, f"rank 0 of {world}, {PART} samples a part", unit="part", disable=args.rank > 0):
        images, labels = draw(loaded, args, rows[part], None)
        with ae.whole_file(part) as file:
            np.savez(file, images=images, labels=labels)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if args.rank == 0:   # 50,000 images of 256 pixels are 9.8 GB: streamed, never in memory at once
        shape = (args.num, *np.load(next(iter(rows)))["images"].shape[1:])
        with ae.whole_file(path) as file, zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as out:
                np.lib.format.write_array_header_1_0(out, dict(descr="|u1", fortran_order=False, shape=shape))
                for part in rows:
                    out.write(np.load(part)["images"].tobytes())
            if len(loaded[4]) > 1:
                with archive.open("arr_1.npy", "w") as out:
                    np.save(out, np.concatenate([np.load(part)["labels"] for part in rows]))
        shutil.rmtree(parts)
        print(f"wrote {path}: {args.num} samples")

def main():
    args = parse_args()
    args.rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args.device = choose_device(args.device)
    args.out = args.out or os.path.dirname(args.ckpt) or "."
    loaded = load(args)
    names = loaded[4]
    classes = len(names)
    if args.labels is not None:
        words = [word.strip() for word in ",".join(args.labels).split(",")]
        if not all(word.isdecimal() and int(word) < classes for word in words):
            sys.exit(f"--labels takes class numbers, such as 3 7: this model has classes 0 to {classes - 1}")
        args.labels = [int(word) for word in words]
    or_exit(os.makedirs, args.out, exist_ok=True)
    if args.num is not None:
        args.labels = args.labels or list(range(classes))
        or_exit(draw_npz, loaded, args, world)
    elif args.rank == 0:   # a row a class, or eight rows of the only class
        spread = [i * classes // min(classes, 10) for i in range(min(classes, 10))]
        args.labels = [0] * 8 if classes == 1 else args.labels or (SHOWCASE if classes == 1000 else spread)
        labels = np.repeat(args.labels, args.columns)
        images, _ = draw(loaded, args, range(len(labels)), labels)
        path = os.path.join(args.out, "samples.png")
        titles = ["" if classes == 1 else " ".join(dict.fromkeys((str(c), names[c]))) for c in args.labels]
        ae.save_grid(path, images.reshape(-1, args.columns, *images.shape[1:]), titles)
        print(f"wrote {path}")

if __name__ == "__main__":
    main()
