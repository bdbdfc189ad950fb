"""Draw pictures from a trained DiT (supplement, section B.2 and figures I, II).

    python sample.py                                             the demo's digits, a row per class
    python sample.py --ckpt out/dit/ckpt.pt                      an ImageNet model: figure II
    python sample.py --ckpt out/dit/ckpt.pt --labels 88 vase     a grid of two classes
    torchrun --nproc_per_node=8 -- sample.py --ckpt out/dit/ckpt.pt --num 50000     for fid.py
    python sample.py --ckpt out/dit/ckpt.pt --num 50000 --npz    also one file, for ADM's evaluator
    python sample.py --ckpt lightningdit.pt --ae vmae.pth --stats latents_stats.pt  others' files

Writes samples.png into --out, or with --num the files samples/000123-207.png (index, number of the
class). Those that are there are kept, so the same command completes them. The noise of sample i
depends on --seed and i alone, its class on --labels and --per_class, too; the number of processes
and the batch change rounding only, by one level in some pixels at most. (The -- keeps torchrun from
taking --num for an abbreviation of a flag of its own.)
"""

import functools
import json
import os
import re
import textwrap
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import ae
import dit
from fid import (
    SWITCH,
    UserError,
    join_processes,
    leave_processes,
    new_parser,
    number,
    rank_and_world,
    run_main,
    text,
    wait_for_all,
    whole_file,
)

# The ImageNet classes of figure II, from flamingo to vase.
FIGURE_II = [130, 88, 250, 705, 947, 975, 952, 883]


def parse_args():
    parser = new_parser(__doc__)
    add = parser.add_argument_group("what").add_argument
    add("--ckpt", type=text, default="out/demo/dit/ckpt.pt", help="the DiT's checkpoint")
    add("--num", type=number(int, 1), help="draw this many files, not a grid")
    add("--npz", action="store_true", help="with --num: pack them as samples.npz, too")
    add("--per_class", action="store_true", help="with --num: as many of each class, in turns")
    add(
        "--labels",
        type=text,
        nargs="+",
        help="classes, such as 88 vase n02007558; None: all, in a grid at most ten",
    )
    add("--columns", type=number(int, 1), default=8, help="pictures per class in a grid")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of noise and labels")
    add("--out", type=text, help="folder to write into; None: the checkpoint's")

    add = parser.add_argument_group("how; None: what the checkpoint says, else the paper's")
    add = add.add_argument
    add("--steps", type=number(int, 1), help="Euler steps")
    add("--cfg_scale", type=number(float, 1), help="guidance scale, 1 is no guidance")
    add("--cfg_channels", type=number(int, 0), help="latent channels that are guided")
    add("--cfg_start", type=number(float, 0, 1), help="shifted t from which guidance applies")
    add("--shift", type=number(float, 1e-9), help="of the time grid, below 1 towards the noise")

    add = parser.add_argument_group("on what").add_argument
    add("--batch", type=number(int, 1), default=64, help="pictures per process at once")
    add("--device", type=text, help="cpu, cuda, cuda:1, ...; None: cuda if there is one")
    dtypes = ("float32", "float16", "bfloat16")
    add("--dtype", choices=dtypes, default="float32", help="of the DiT's products")
    add("--compile", **SWITCH, default=0, help="1: torch.compile the DiT")

    add = parser.add_argument_group("for a checkpoint that does not carry them").add_argument
    add("--ae", type=text, help="checkpoint of the autoencoder")
    add("--stats", type=text, help="PyTorch file of a dict with the latents' mean, std per channel")
    args = parser.parse_args()
    if (args.npz or args.per_class) and args.num is None:
        parser.error("--npz and --per_class go with --num, the number of samples")
    return args


def main():
    args = parse_args()
    rank, world, device = join_processes(args.device)

    if device != "cpu":
        torch.set_float32_matmul_precision("high")  # TF32 products

    # The DiT, its autoencoder, and the statistics by which its latents are normalised.
    model, info = dit.load(args.ckpt)
    autoencoder = load_autoencoder(info, args.ckpt, args.ae)
    latent_mean, latent_std = load_statistics(info, args.ckpt, args.stats)
    check_latents(model, autoencoder, latent_mean, latent_std)

    # The settings of sampling: the flag's, else the checkpoint's, else the paper's.
    settings = dit.sampling_of(info, model)
    given = {name: getattr(args, name) for name in settings}
    settings |= {name: value for name, value in given.items() if value is not None}
    class_names = info.get("class_names", [""] * model.num_classes)
    names = names_in_words(class_names)
    labels = parse_labels(args.labels, names, class_names)

    if args.compile:
        model.compile(dynamic=False)
    parts = [part.to(device) for part in (model, autoencoder, latent_mean, latent_std)]
    generate_samples = functools.partial(
        generate, *parts, seed=args.seed, dtype=args.dtype, **settings
    )
    out = args.out or os.path.dirname(args.ckpt) or "."
    if args.num is not None:
        # All that decides a picture, beside its index.
        record = {
            "model": ae.fingerprint(model.state_dict()),
            "autoencoder": ae.fingerprint(autoencoder.state_dict()),
            "statistics": ae.fingerprint({"mean": latent_mean, "std": latent_std}),
            "seed": args.seed,
            "labels": labels,
            "per_class": args.per_class,
            "dtype": args.dtype,
            "class_names": class_names,  # in the order of the numbers in the files' names
            **settings,
        }
        write_files(generate_samples, args, out, labels or range(model.num_classes), record)
    elif rank == 0:
        labels = labels or labels_of_grid(class_names)
        captions = [caption(names, label) if len(names) > 1 else "" for label in labels]
        os.makedirs(out, exist_ok=True)
        path = os.path.join(out, "samples.png")
        write_grid(path, generate_samples, labels, captions, args.columns, args.batch)
        print(f"wrote {path}")
    leave_processes()


# ---- What is drawn, and with what ----


def load_autoencoder(info, path, named):
    """The autoencoder whose latents a DiT models: the one that its file carries in info, or that
    --ae names.

    path: the DiT's file. Beside an autoencoder that the file carries, --ae may name a later decoder
    to the same encoder. Another encoder has other latents: raises UserError.
    """
    if "autoencoder" not in info:
        if not named:
            raise UserError(f"{path} carries no autoencoder: name it with --ae")
        return ae.load(named)
    carried = ae.from_checkpoint(info["autoencoder"], path)
    if not named:
        return carried
    later = ae.load(named)
    if ae.fingerprint(later.encoder_state()) != ae.fingerprint(carried.encoder_state()):
        raise UserError(
            f"--ae {named} is another autoencoder than the one that {path} carries, on whose "
            "latents it was trained: leave --ae out"
        )
    return later


def load_statistics(info, path, stats):
    """Mean and std of the latents, (C, 1, 1) each, from the file that --stats names, or from info,
    which the DiT's file `path` holds."""
    found, names = info, ("latent_mean", "latent_std")
    if stats:
        path, found, names = stats, ae.read_checkpoint(stats), ("mean", "std")
    if not all(isinstance(found.get(name), torch.Tensor) for name in names):
        raise UserError(
            f"{path} holds no tensors {names[0]} and {names[1]} of the latents: name the file that "
            "does with --stats"
        )
    return [found[name].float().view(-1, 1, 1) for name in names]


def check_latents(model, autoencoder, latent_mean, latent_std):
    """Raises UserError if the DiT's latents are not those of the autoencoder and the statistics, or
    if these cannot normalise."""
    size = model.grid * model.patch_size
    pixels = autoencoder.image_size if autoencoder.vit else size * autoencoder.patch_size
    found = autoencoder.latent_shape(pixels, pixels)
    if not found == (model.in_channels, size, size) == (len(latent_mean), size, size):
        raise UserError(
            f"the autoencoder's latents {found} or the statistics ({len(latent_mean)} channels) do "
            f"not fit the DiT's latents {(model.in_channels, size, size)}: name those it was "
            "trained on with --ae, --stats"
        )
    if not (latent_mean.isfinite().all() and latent_std.isfinite().all() and latent_std.min() > 0):
        raise UserError("the latents' mean or std is not finite, or a channel's std not above 0")


@torch.no_grad()
def generate(
    model,
    autoencoder,
    latent_mean,
    latent_std,
    indices,
    labels,
    seed,
    dtype="float32",
    **settings,
):
    """Samples by index, of the classes labels -> images, uint8 (N, H, W, 3).

    The noise of a sample is by (seed, index). latent_mean, latent_std (C, 1, 1); dtype: of the
    DiT's products, while the Euler state and the decoder stay in float32; settings: those of
    dit.sample.
    """
    device = latent_mean.device
    size = model.grid * model.patch_size
    keys = [generator("cpu", SAMPLE, seed, index) for index in indices]
    noise = [torch.randn(model.in_channels, size, size, generator=key) for key in keys]
    noise, y = torch.stack(noise).to(device), torch.tensor(labels, device=device)
    with torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
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


def parse_labels(words, names, class_names):
    """The numbers of the classes that --labels names, or None if it is not given.

    A word is a class's name, else its name in other case, else that of its folder, else its number.
    Raises UserError for a word that is none of these, and for a name that several classes have.
    """
    if words is None:
        return None
    labels = []
    for word in words:
        word = unicodedata.normalize("NFC", word)  # as the names of classes are in the file
        found = [label for label, name in enumerate(names) if name == word]
        found = found or [n for n, name in enumerate(names) if name.lower() == word.lower()]
        found = found or [label for label, name in enumerate(class_names) if name == word]
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


def labels_of_grid(class_names):
    """The rows of a grid if --labels is not given."""
    if is_imagenet(class_names):
        return FIGURE_II
    return [0] * 8 if len(class_names) == 1 else spread(len(class_names))


def spread(num_classes):
    """At most ten classes, spread over all."""
    count = min(num_classes, 10)
    return [i * num_classes // count for i in range(count)]


# ---- A grid, or files ----


def write_grid(path, generate_samples, labels, captions, columns, batch):
    """A picture with a row of samples for each of labels, `batch` generated at once.

    generate_samples(indices, labels): as generate; captions: of the rows.
    """
    labels_of_samples = np.repeat(labels, columns).tolist()
    starts = range(0, len(labels_of_samples), batch)
    images = []
    for start in tqdm(starts, "generating", unit="batch"):
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
    names = record["class_names"]
    odd = [i for i, name in enumerate(names) if name.isdecimal() and int(name) != i]
    if odd and rank == 0:
        print(
            f"note: files are named by the number of a class among all, not by its name: "
            f"{odd[0]} is the class {names[odd[0]]}, see settings.json"
        )
    if rank == 0:
        claim(folder, record)
    wait_for_all()

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

    wait_for_all()  # all are drawn
    if rank == 0:
        print(f"{folder} holds {len(files_by_index(folder))} samples")
        if args.npz:
            pack(folder, archive, args.num)
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


def claim(folder, record):
    """Make a folder for files that took time, with the record of what they are made from, or check
    that it has this record. record: plain values by name. Raises UserError if it has another."""
    path = os.path.join(folder, "settings.json")
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        if any(not name.endswith(".tmp") for name in os.listdir(folder)):
            raise UserError(f"{folder} holds other files: choose another folder")
        with whole_file(path) as file:
            file.write(json.dumps(record, indent=1).encode())
    found = json.loads(Path(path).read_text())
    for name in record:
        if name in found and found[name] != record[name]:
            raise UserError(
                f"{folder} was made with other settings, its {name} is {found[name]} and not "
                f"{record[name]}: choose another folder"
            )


# =================================================================================================
# Shared with the training scripts: random numbers, pictures
# =================================================================================================

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
        raise UserError(
            "a picture has pixels that are not finite: the weights have diverged, --cfg_scale is "
            "too large, or sample.py needs --dtype float32"
        )
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
