"""Draw pictures from a trained DiT (supplement, section B.2 and figures I, II).

    python sample.py                                             the demo's digits, a row per class
    python sample.py --ckpt out/dit/ckpt.pt                      an ImageNet model: figure II
    python sample.py --ckpt out/dit/ckpt.pt --labels 88 vase     a grid of two classes
    torchrun --nproc_per_node=8 -- sample.py --ckpt out/dit/ckpt.pt --num 50000     for fid.py
    python sample.py --ckpt out/dit/ckpt.pt --num 50000 --npz    also one file, for ADM's evaluator
    python sample.py --ckpt lightningdit.pt --ae vmae.pth --stats latents_stats.pt  others' files

Writes samples.png into --out, or with --num the files samples/000123-207.png (index, class). Those
that are there are kept, so the same command goes on. Sample i depends on --seed and i alone, not on
the number of processes or the batch. (The -- keeps torchrun from taking --num for an abbreviation
of a flag of its own.)
"""

import argparse
import datetime
import functools
import json
import math
import os
import re
import textwrap
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import dit
from ae import UserError, fingerprint, from_checkpoint, read_checkpoint, run_main, whole_file
from ae import load as load_autoencoder

# The ImageNet classes of figure II, from flamingo to vase.
FIGURE_II = [130, 88, 250, 705, 947, 975, 952, 883]


def parse_args():
    parser = new_parser(__doc__)
    add = parser.add_argument_group("what").add_argument
    add("--ckpt", type=text, default="out/demo/dit/ckpt.pt", help="the DiT's checkpoint")
    add("--num", type=number(int, 1), help="draw this many files, not a grid")
    add("--npz", action="store_true", help="with --num: pack them as samples.npz, too")
    add("--per_class", action="store_true", help="with --num: as many of each class, in turns")
    add("--labels", type=text, nargs="+", help="classes, such as 88 vase; None: all, a grid some")
    add("--columns", type=number(int, 1), default=8, help="pictures per class in a grid")
    add("--seed", type=SEED, default=0, help="of noise and labels")
    add("--out", type=text, help="folder to write into; None: the checkpoint's")

    add = parser.add_argument_group("how; None: what the checkpoint says, else the paper's")
    add = add.add_argument
    add("--steps", type=number(int, 1), help="Euler steps")
    add("--cfg_scale", type=number(float, 1), help="guidance scale, 1 is no guidance")
    add("--cfg_channels", type=number(int, 0), help="latent channels that are guided")
    add("--cfg_start", type=number(float, 0, 1), help="t from which guidance applies")
    add("--shift", type=number(float, 1e-9), help="of the time grid, below 1 towards the noise")

    add = parser.add_argument_group("on what").add_argument
    add("--batch", type=number(int, 1), default=64, help="pictures per process at once")
    add("--device", type=text, help="cpu, cuda, cuda:1, ...; None: cuda if there is one")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the DiT's products")
    add("--compile", **SWITCH, default=0, help="1: torch.compile the DiT")

    add = parser.add_argument_group("for a checkpoint that does not carry them").add_argument
    add("--ae", type=text, help="checkpoint of the autoencoder")
    add("--stats", type=text, help="PyTorch file of a dict with the latents' mean, std per channel")
    args = parser.parse_args()
    if (args.npz or args.per_class) and args.num is None:
        raise UserError("--npz and --per_class go with --num, the number of samples")
    return args


def main():
    args = parse_args()
    rank, world, device = join_processes(args.device)

    # The DiT, its autoencoder, and the statistics by which its latents are normalised.
    model, info = dit.load(args.ckpt)
    autoencoder = autoencoder_of(info, args.ckpt, args.ae)
    latent_mean, latent_std = load_statistics(args, info)
    check_fit(model, autoencoder, latent_mean, latent_std)
    parts = [part.to(device) for part in (model, autoencoder, latent_mean, latent_std)]

    settings = sampling_settings(args, info, guided=model.class_dropout_prob > 0)
    class_names = info.get("class_names", [""] * model.num_classes)
    names = names_in_words(class_names)
    labels = parse_labels(args.labels, names)
    if args.compile:
        model.compile(dynamic=False)
    bfloat16 = args.dtype == "bfloat16"
    generate_samples = functools.partial(
        generate, *parts, seed=args.seed, bfloat16=bfloat16, **settings
    )

    out = args.out or os.path.dirname(args.ckpt) or "."
    if args.num is not None:
        record = {
            "model": fingerprint(model.state_dict()),
            "autoencoder": fingerprint(autoencoder.state_dict()),
            "statistics": fingerprint({"mean": latent_mean, "std": latent_std}),
            "seed": args.seed,
            "labels": labels,
            "per_class": args.per_class,
            "dtype": args.dtype,
            **settings,
        }
        classes = labels or list(range(model.num_classes))
        write_files(generate_samples, args, out, classes, record)
    elif rank == 0:
        if model.num_classes == 1:
            labels = [0] * 8
        elif labels is None and is_imagenet(class_names):
            labels = FIGURE_II
        elif labels is None:
            labels = spread(model.num_classes)
        captions = [caption(names, label) if len(names) > 1 else "" for label in labels]
        os.makedirs(out, exist_ok=True)
        path = os.path.join(out, "samples.png")
        write_grid(path, generate_samples, labels, captions, args.columns, args.batch)
        print(f"wrote {path}")
    leave_processes()


# ---- What is drawn, and with what ----


def autoencoder_of(info, owner, named):
    """The autoencoder whose latents a DiT models: the one that its file `owner` carries in info, or
    that --ae names.

    Beside one that the file carries, --ae may name a later decoder to the same encoder. Another
    encoder has other latents: raises UserError.
    """
    if "autoencoder" not in info:
        if not named:
            raise UserError(f"{owner} carries no autoencoder: name it with --ae")
        return load_autoencoder(named)
    carried = from_checkpoint(info["autoencoder"], owner)
    if not named:
        return carried
    tuned = load_autoencoder(named)
    if fingerprint(tuned.encoder_state()) != fingerprint(carried.encoder_state()):
        raise UserError(
            f"--ae {named} is another autoencoder than the one that {owner} carries, on whose "
            "latents it was trained: leave --ae out"
        )
    return tuned


def load_statistics(args, info):
    """Mean and std of the latents, (C, 1, 1) each, from --stats or the DiT's own file."""
    stats, names = info, ("latent_mean", "latent_std")
    if args.stats:
        stats, names = read_checkpoint(args.stats), ("mean", "std")
    if not all(isinstance(stats.get(name), torch.Tensor) for name in names):
        raise UserError(
            f"{args.stats or args.ckpt} holds no tensors {names[0]} and {names[1]} of the latents: "
            "name the file that does with --stats"
        )
    mean, std = (stats[name].float().view(-1, 1, 1) for name in names)
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise UserError(f"the latents' statistics in {args.stats or args.ckpt} are not finite")
    return mean, std


def check_fit(model, autoencoder, latent_mean, latent_std):
    """Raises UserError if the DiT's latents are not those of the autoencoder and the statistics."""
    size = model.grid * model.patch_size
    wanted = (model.in_channels, size, size)
    pixels = autoencoder.image_size if autoencoder.vit else size * autoencoder.patch_size
    found = autoencoder.latent_shape(pixels, pixels)
    if not (found == wanted and len(latent_mean) == len(latent_std) == model.in_channels):
        raise UserError(
            f"the autoencoder's latents {found} or the statistics ({len(latent_mean)} and "
            f"{len(latent_std)} channels) do not fit the DiT's latents {wanted}: name those it was "
            "trained on with --ae, --stats"
        )


def sampling_settings(args, info, guided):
    """Keyword arguments of dit.sample: the flag's, else the checkpoint's, else the paper's.

    guided: whether the model has a null class. Raises UserError for guidance without one.
    """
    settings = dict(dit.SAMPLING)
    if isinstance(info.get("args"), dict):  # a file of train_dit.py
        saved = info["args"]
        settings = {name: saved["sample_steps" if name == "steps" else name] for name in settings}
    if not guided:
        settings["cfg_scale"] = 1.0
    given = {name: getattr(args, name) for name in settings if getattr(args, name) is not None}
    settings |= given
    if settings["cfg_scale"] > 1 and not guided:
        raise UserError(
            "--cfg_scale above 1 needs a DiT of several classes, trained with dropped labels"
        )
    return settings


@torch.no_grad()
def generate(
    model,
    autoencoder,
    latent_mean,
    latent_std,
    indices,
    labels,
    seed,
    bfloat16=False,
    **settings,
):
    """Samples by index, of the classes labels -> images, uint8 (N, H, W, 3).

    The noise of a sample is by (seed, index). latent_mean, latent_std (C, 1, 1); bfloat16: of the
    DiT's products, while the Euler state and the decoder stay in float32; settings: those of
    dit.sample.
    """
    device = latent_mean.device
    size = model.grid * model.patch_size
    keys = [generator("cpu", SAMPLE, seed, index) for index in indices]
    noise = [torch.randn(model.in_channels, size, size, generator=key) for key in keys]
    noise, y = torch.stack(noise).to(device), torch.tensor(labels, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        z = dit.sample(model, noise, y, **settings)
    z = z * latent_std + latent_mean
    # Some at a time: a convolutional decoder takes 200 MiB for each image.
    return np.concatenate([to_uint8(autoencoder.decode(part)) for part in z.split(16)])


# ---- Classes and their names ----


def is_imagenet(class_names):
    """Whether these are 1,000 WNIDs, such as n02007558, or 1,000 classes without names."""
    if len(class_names) != 1000 or class_names[0] not in ("", "n01440764"):
        return False
    return all(re.fullmatch(r"(n\d{8})?", name) for name in class_names)


def names_in_words(class_names):
    """What people call the classes: torchvision's names for ImageNet, else those of the folders."""
    if not is_imagenet(class_names):
        return class_names
    from torchvision.models import ResNet50_Weights  # here, as it takes a second

    names = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    return [name[0].upper() + name[1:] for name in names]


def caption(names, label):
    """A class as in figure II, "Flamingo (130)"; the number alone if it has no other name."""
    return str(label) if names[label] in ("", str(label)) else f"{names[label]} ({label})"


def parse_labels(words, names):
    """The numbers of the classes that --labels names, or None if it is not given.

    A word is a class's name, else its name in other case, else its number. Raises UserError for a
    word that is none of these, and for a name that several classes have.
    """
    if words is None:
        return None
    labels = []
    for word in words:
        found = [label for label, name in enumerate(names) if name == word]
        found = found or [n for n, name in enumerate(names) if name.lower() == word.lower()]
        if not found and word.isdecimal() and int(word) < len(names):
            found = [int(word)]
        if not found:
            raise UserError(
                f"--labels {word} is none of the model's classes, 0 to {len(names) - 1}: "
                f"{textwrap.shorten(', '.join(names), 200)}"
            )
        if len(found) > 1:
            several = ", ".join(caption(names, label) for label in found)
            raise UserError(f"--labels {word} names several classes, {several}: give a number")
        labels += found
    return labels


def spread(num_classes):
    """At most ten classes, spread over all."""
    count = min(num_classes, 10)
    return [i * num_classes // count for i in range(count)]


# ---- A grid, or files ----


def write_grid(path, generate_samples, labels, captions, columns, batch, quiet=False):
    """A picture with a row of samples for each of labels, `batch` generated at once.

    generate_samples(indices, labels): as generate; captions: of the rows; quiet: without a progress
    bar.
    """
    labels_of_samples = np.repeat(labels, columns).tolist()
    starts = range(0, len(labels_of_samples), batch)
    images = []
    for start in tqdm(starts, "generating", unit="batch", disable=quiet):
        some = labels_of_samples[start : start + batch]
        images.append(generate_samples(range(start, start + len(some)), some))
    images = np.concatenate(images)
    save_grid(path, images.reshape(-1, columns, *images.shape[1:]), captions)


def write_files(generate_samples, args, out, classes, record):
    """samples/000123-207.png for each index below --num, of a class drawn from classes.

    record: all that decides a picture. Files of the same record are not drawn again; raises
    UserError if the folder holds others.
    """
    rank, world = rank_and_world()
    folder, archive = os.path.join(out, "samples"), os.path.join(out, "samples.npz")
    if args.npz and os.path.exists(archive):
        raise UserError(f"{archive} exists: remove it, or name another folder with --out")
    on_rank_0(claim, folder, record)
    check_visible(folder)

    # Each process takes every world-th index.
    there = set(files_by_index(folder))
    missing = [index for index in range(rank, args.num, world) if index not in there]
    starts = range(0, len(missing), args.batch)
    for start in tqdm(starts, "samples of this process", unit="batch", disable=rank > 0):
        indices = missing[start : start + args.batch]
        labels = []
        for index in indices:
            rng = generator("cpu", LABEL, args.seed, index)
            drawn = torch.randint(len(classes), (), generator=rng)
            labels.append(classes[index % len(classes) if args.per_class else drawn])
        images = generate_samples(indices, labels)
        for index, label, image in zip(indices, labels, images, strict=True):
            with whole_file(os.path.join(folder, f"{index:06}-{label}.png")) as file:
                Image.fromarray(image).save(file, "png")

    if world > 1:
        dist.barrier()  # all are drawn
    if args.npz:
        on_rank_0(pack, folder, archive, args.num)
    if rank == 0:
        print(f"{folder} holds {len(files_by_index(folder))} samples")
        if args.npz:
            print(f"wrote {archive}, with {args.num} of them")


def files_by_index(folder):
    """The samples in a folder: names of files by the index of the sample."""
    names = [name for name in os.listdir(folder) if re.fullmatch(r"\d+-\d+\.png", name)]
    return {int(name.split("-")[0]): name for name in names}


def pack(folder, path, num):
    """One .npz of the first samples: arr_0, uint8 (num, H, W, 3), and arr_1, classes (num,).

    50,000 images of 256 pixels are 9.8 GB: they are streamed, never in memory at once.
    """
    names = files_by_index(folder)
    names = [names[index] for index in range(num)]
    shape = (num, *np.asarray(Image.open(os.path.join(folder, names[0]))).shape)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with whole_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for name in tqdm(names, "samples.npz", unit="image"):
                array.write(np.asarray(Image.open(os.path.join(folder, name))).tobytes())
        with archive.open("arr_1.npy", "w") as array:
            np.save(array, np.array([int(name.split("-")[1][:-4]) for name in names]))


# =================================================================================================
# Shared with the training scripts: flags, processes, randomness, pictures
# =================================================================================================


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help with the script's docstring as it is, and with the default of each flag."""


def new_parser(doc=None, **options):
    """An argparse parser whose errors are UserErrors."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=Help, allow_abbrev=False, **options
    )

    def refuse(message):
        raise UserError(message)

    parser.error = refuse
    return parser


def number(convert, low, high=math.inf):
    """An argparse type: a finite number that convert, int or float, reads, from low to high."""

    def parse(word):
        value = convert(word)
        if not low <= value <= high or math.isinf(value):
            limits = f"of {low} or more" if math.isinf(high) else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{word} is not a finite number {limits}")
        return value

    parse.__name__ = convert.__name__  # for argparse's message: "invalid int value: 'x'"
    return parse


def text(word):
    """An argparse type: a word that is not empty, as an unset variable of the shell is."""
    if not word:
        raise argparse.ArgumentTypeError("an empty string")
    return word


SEED = number(int, 0, 2**32 - 1)
DECAY = number(float, 0, 1 - 1e-9)
SWITCH = dict(type=int, choices=(0, 1))


def rank_and_world():
    """This process's number and the number of processes, as torchrun says."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def join_processes(device):
    """Join the other processes, if there are any -> rank, world, this process's device: "cpu" or
    "cuda:N", where it switches on TF32 for products.

    device: what --device says. Raises UserError if it is not there.
    """
    if ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ):
        raise UserError("of RANK and WORLD_SIZE, which torchrun sets, only one is set")
    rank, world = rank_and_world()
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if device in (None, "cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpus else device or "cpu"
    if device not in ("cpu", *gpus):
        raise UserError(f"--device {device} is not there: PyTorch finds {len(gpus)} GPUs")
    if device != "cpu":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        # gloo for what is on the CPU. The others wait while rank 0 draws pictures, or while one
        # process fills the last shard of a cache: hours, not NCCL's ten minutes.
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        try:
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=6))
        except ValueError as error:  # a variable of torchrun's is missing
            raise UserError(f"WORLD_SIZE says {world} processes: {error}") from error
    return rank, world, device


def leave_processes():
    """Wait for the other processes, then close the process group."""
    if not dist.is_initialized():
        return
    # PyTorch 2.4 can hang in destroy_process_group if a thread of gloo's holds the last reference
    # to the barrier. This variable holds one until after that.
    barrier = dist.barrier(async_op=True)
    barrier.wait()
    dist.destroy_process_group()


def on_rank_0(function, *args):
    """Call a function in the first process, and return its result in all of them. Its UserError or
    OSError is raised in all, too, so that none waits for one that has ended."""
    result = error = None
    if rank_and_world()[0] == 0:
        try:
            result = function(*args)
        except (UserError, OSError) as found:
            error = found
    if dist.is_initialized():
        box = [result, error]
        dist.broadcast_object_list(box)
        result, error = box
    if error is not None:
        raise error
    return result


def check_visible(path):
    """Raises UserError, in all processes, if one of them does not see a path that rank 0 made.

    A file system that nodes share may show it late: each has a minute.
    """
    deadline = time.time() + 60
    while not (seen := os.path.exists(path)) and time.time() < deadline:
        time.sleep(1)
    everywhere = [seen]
    if dist.is_initialized():
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, seen)
    if not all(everywhere):
        raise UserError(f"{path} must be on a file system that all nodes share")


def claim(folder, record):
    """Make a folder for files that took time, with the record of what they are made from, or check
    that it has this record. record: plain values by name. Raises UserError if it has another."""
    path = os.path.join(folder, "settings.json")
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        if set(os.listdir(folder)) - {"settings.json.tmp"}:
            raise UserError(f"{folder} holds other files: choose another folder")
        with whole_file(path) as file:
            file.write(json.dumps(record, indent=1).encode())
    try:
        found = json.loads(Path(path).read_text())
        different = [name for name, value in record.items() if found.get(name) != value]
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): choose another folder") from error
    if different:
        name = different[0]
        raise UserError(
            f"{folder} was made with other settings, its {name} is {found.get(name)} and not "
            f"{record[name]}: choose another folder"
        )


# Everything random has a key of four numbers: its stream, --seed and two more, such as a step or an
# index (0 where there are none). So nothing depends on what was drawn with other keys.
NETWORK, STEP, FLIP, ORDER, CROP, STATISTICS, PICTURE, SAMPLE, LABEL, PERTURBATION = range(10)


def seed_of(stream, seed, a=0, b=0):
    """The seed of what is random under this key."""
    return int(np.random.SeedSequence((stream, seed, a, b)).generate_state(1, np.uint64)[0])


def generator(device, stream, seed, a=0, b=0):
    """The source of all that is random under this key."""
    return torch.Generator(device).manual_seed(seed_of(stream, seed, a, b))


def to_uint8(x):
    """Images (B, 3, H, W) in about [-1, 1] -> NumPy uint8 (B, H, W, 3).

    It is floor(clamp(127.5 x + 128, 0, 255)). Raises UserError for pixels that are not finite.
    """
    if not x.isfinite().all():
        raise UserError("a picture has pixels that are not finite: the weights are damaged")
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def save_grid(path, rows, labels, columns=()):
    """Save a PNG with a labelled row of pictures for each of rows.

    rows: arrays of one shape, uint8 (N, H, W, 3); labels: one per row, long ones are wrapped;
    columns: titles above them.
    """
    scale = max(1, 64 // rows[0].shape[1])  # small images are enlarged, pixels stay sharp
    rows = np.stack(rows).repeat(scale, 2).repeat(scale, 3)
    rows = np.pad(rows, ((0, 0), (0, 0), (0, 2), (0, 2), (0, 0)), constant_values=255)
    R, N, H, W, _ = rows.shape

    font = ImageFont.load_default(max(14, H // 12))
    lines_per_row = max(1, int(H / (1.4 * font.size)))
    labels = [wrap(label, lines_per_row) for label in labels]
    margin = 12 + int(max(font.getlength(line) for label in labels for line in label.split("\n")))
    top = int(1.5 * font.size) if columns else 0
    canvas = Image.new("RGB", (margin + N * W, top + R * H), "white")
    pixels = rows.transpose(0, 2, 1, 3, 4).reshape(R * H, N * W, 3)
    canvas.paste(Image.fromarray(pixels), (margin, top))

    pen = ImageDraw.Draw(canvas)
    for r, label in enumerate(labels):
        middle = (margin - 6, top + r * H + H // 2)
        pen.text(middle, label, "black", font, anchor="rm", align="right")
    for n, title in enumerate(columns):
        pen.text((margin + n * W + W // 2, top // 2), title, "black", font, anchor="mm")
    with whole_file(path) as file:
        canvas.save(file, "png")


def wrap(label, max_lines):
    """The label in lines of 20 characters, or of as many more as max_lines lines need."""
    width = 20
    while len(textwrap.wrap(label, width)) > max_lines:
        width += 1
    return textwrap.fill(label, width)


if __name__ == "__main__":
    run_main(main)
