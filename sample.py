"""Draw pictures from a trained DiT (supplement, section B.2 and figures I, II).

    python sample.py                                             the demo's digits, a row per class
    python sample.py --ckpt out/dit/ckpt.pt                      an ImageNet model: figure II
    python sample.py --ckpt out/dit/ckpt.pt --labels 88 vase     a grid of two classes
    torchrun --nproc_per_node=8 -- sample.py --ckpt out/dit/ckpt.pt --num 50000     for fid.py
    python sample.py --ckpt out/dit/ckpt.pt --num 1000 --png     files, for tools that want them
    python sample.py --ckpt lightningdit.pt --ae vmae.pth --stats latents_stats.pt  others' files

Sample i depends on --seed and i alone, not on the number of processes or the batch. (The -- keeps
torchrun from taking --num for an abbreviation of a flag of its own.)
"""

import argparse
import dataclasses
import datetime
import difflib
import json
import os
import re
import shutil
import zipfile

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import ae
import dit
from ae import SWITCH, UserError, at_least, fraction

# The ImageNet classes of figure II, from flamingo to vase.
FIGURE_II = [130, 88, 250, 705, 947, 975, 952, 883]
DECODED_AT_ONCE = 16  # images: a convolutional decoder takes 200 MiB for each
SAMPLES_PER_PART = 256  # in a file of an unfinished samples.npz


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        usage="%(prog)s [flags]",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 28, 100),
    )

    def refuse(message):
        raise UserError(message)

    parser.error = refuse
    add = parser.add_argument_group("what").add_argument
    add("--ckpt", default="out/demo/dit/ckpt.pt", help="the DiT's checkpoint (default: the demo's)")
    add("--num", type=at_least(1), help="draw this many into samples.npz, not a grid")
    add("--png", action="store_true", help="with --num: PNG files, in the folder samples, instead")
    add(
        "--labels", nargs="+", help="classes, such as 88 vase (default: all; in a grid at most ten)"
    )
    add("--columns", type=at_least(1), default=8, help="pictures per class in a grid (default: 8)")
    add("--seed", type=at_least(0), default=0, help="of noise and labels (default: 0)")
    add("--out", help="folder to write into (default: the checkpoint's)")

    add = parser.add_argument_group(
        "how (default: the checkpoint's, else the paper's)"
    ).add_argument
    add("--steps", type=at_least(1), help="Euler steps (demo: 50, paper: 250)")
    add("--cfg_scale", type=at_least(0.0), help="guidance scale, 1 is none (demo: 1.75, paper: 10)")
    add("--cfg_channels", type=at_least(0), help="guided latent channels (demo: 16, paper: 3)")
    add("--cfg_start", type=fraction, help="t from which guidance applies (demo and paper: 0.1)")
    add("--shift", type=at_least(1e-9), help="of the time grid, below 1 towards the noise (0.3)")
    add("--batch", type=at_least(1), default=64, help="pictures per process at once (default: 64)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the DiT's products (default: float32)")
    add("--compile", **SWITCH, help="torch.compile the DiT (default: 0)")

    add = parser.add_argument_group("for a checkpoint that does not carry them").add_argument
    add("--ae", help="checkpoint of the autoencoder")
    add("--stats", help="PyTorch file of a dict with the latents' mean and std per channel")
    args = parser.parse_args()
    if args.png and args.num is None:
        raise UserError("--png goes with --num, which says how many files to write")
    return args


def main():
    try:
        args = parse_args()
        device = ae.choose_device(args.device)
        source = Source.load(args, device)
        out = args.out or os.path.dirname(args.ckpt) or "."
        names = names_in_words(source.class_names)
        labels = parse_labels(args.labels, names)
        ae.make_folder(out)
        if args.num is not None:
            write_samples(source, args, out, labels)
        elif ae.rank_and_world()[0] == 0:
            draw_grid(source, args, out, labels, names)
    except UserError as error:
        ae.exit_with(error)


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
    """The classes that --labels names, such as 88 vase or 88,vase; None if it is not given.

    Raises UserError for a number or name that no class has, and for a name that several have.
    """
    if words is None:
        return None
    by_name = {}
    for label, name in enumerate(names):
        by_name.setdefault(name.lower(), []).append(label)
    by_name.pop("", None)

    def captions(labels):
        return ", ".join(caption(names, label) for label in labels)

    labels = []
    for word in ",".join(words).split(","):
        word = word.strip()
        found = by_name.get(word.lower(), [])
        if word.isdecimal():  # never a name, even where folders are called 1, 2, 3
            found = [int(word)] if int(word) < len(names) else []
        if len(found) > 1:
            raise UserError(
                f"--labels {word} is the name of several classes, {captions(found)}: give a number"
            )
        if not found:
            near = difflib.get_close_matches(word.lower(), by_name, n=5, cutoff=0.5)
            near = [label for name in near for label in by_name[name]]
            raise UserError(
                f"--labels takes class numbers or names, and {word!r} is none of this model's "
                f"classes 0 to {len(names) - 1}"
                + (f"; the nearest names are {captions(near)}" if near else "")
            )
        labels += found
    return labels


def draw_grid(source, args, out, labels, names):
    """samples.png: a row per class, or eight rows of the only class."""
    num_classes = len(names)
    if num_classes == 1:
        labels = [0] * 8
    elif labels is None and is_imagenet(source.class_names):
        labels = FIGURE_II
    elif labels is None:
        count = min(num_classes, 10)
        labels = [i * num_classes // count for i in range(count)]  # spread over all
    labels_of_samples = np.repeat(labels, args.columns)
    indices = range(len(labels_of_samples))
    images, _ = source.draw(indices, args.seed, args.batch, labels=labels_of_samples)

    captions = [caption(names, label) if num_classes > 1 else "" for label in labels]
    path = os.path.join(out, "samples.png")
    ae.save_grid(path, images.reshape(-1, args.columns, *images.shape[1:]), captions)
    print(f"wrote {path}")


def write_samples(source, args, out, labels):
    """samples.npz with arr_0, uint8 (N, H, W, 3), and arr_1, classes (N,), if there are several; or
    with --png the same pictures in the folder samples.

    Until that is complete, samples.parts holds a file for each 256 samples, so that an interrupted
    run goes on. Raises UserError if they were drawn with other settings.
    """
    rank, world = ae.rank_and_world()
    folder = os.path.join(out, "samples.parts")
    path = os.path.join(out, "samples" if args.png else "samples.npz")
    if args.png and os.path.exists(path):
        raise UserError(f"{path} exists: remove it and {folder}, or name another folder with --out")
    classes = list(range(len(source.class_names))) if labels is None else labels
    starts = range(0, args.num, SAMPLES_PER_PART)
    parts = {
        os.path.join(folder, f"{start // SAMPLES_PER_PART:06}.npz"): range(
            start, min(start + SAMPLES_PER_PART, args.num)
        )
        for start in starts
    }
    if world > 1:
        # Only to wait for each other, which needs no GPU and can take hours.
        dist.init_process_group("gloo", timeout=datetime.timedelta(hours=24))
    if rank == 0:
        claim_parts(folder, source, args, classes)
    if world > 1:
        dist.barrier()
    missing = [part for part in parts if not os.path.exists(part)]
    if world > 1:
        dist.barrier()  # all have looked

    title = f"rank 0 of {world}, {SAMPLES_PER_PART} samples per part"
    for part in tqdm(missing[rank::world], title, unit="part", disable=rank > 0):
        images, y = source.draw(parts[part], args.seed, args.batch, classes=classes)
        with ae.whole_file(part) as file:
            np.savez(file, images=images, labels=y)
    if args.png:
        if world > 1:
            dist.barrier()  # all parts are drawn
        pictures = os.path.join(folder, "png")
        for part in tqdm(list(parts)[rank::world], "PNG files", unit="part", disable=rank > 0):
            write_png_files(part, parts[part], pictures, source.class_names)
    if world > 1:
        ae.leave_processes()
    if rank == 0:
        if args.png:
            os.replace(pictures, path)  # as soon as all of them are there
        else:
            join_parts(list(parts), path, args.num, with_labels=len(source.class_names) > 1)
        shutil.rmtree(folder)
        print(f"wrote {path}: {args.num} samples")


def claim_parts(folder, source, args, classes):
    """Make the folder of an unfinished samples.npz, or check that its settings are the same."""
    files = [path for path in (args.ckpt, args.ae, args.stats) if path]
    settings = {
        "files": [[os.path.realpath(f), os.path.getmtime(f), os.path.getsize(f)] for f in files],
        "num": args.num,
        "seed": args.seed,
        "labels": classes,
        "bfloat16": source.bfloat16,
        **source.settings,
    }
    path = os.path.join(folder, "settings.json")
    if not os.path.exists(path):
        # Parts without settings are what is left of a run that was killed while it removed them.
        shutil.rmtree(folder, ignore_errors=True)
        ae.make_folder(folder)
        with ae.whole_file(path) as file:
            file.write(json.dumps(settings).encode())
    with open(path) as file:
        if json.load(file) != settings:
            raise UserError(
                f"{folder} holds part of a run with other settings: finish that one, or remove the "
                "folder"
            )


def join_parts(parts, path, num, with_labels):
    """One .npz from the files of its parts.

    50,000 images of 256 pixels are 9.8 GB: they are streamed, never in memory at once.
    """
    shape = (num, *np.load(parts[0])["images"].shape[1:])
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with ae.whole_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for part in parts:
                array.write(np.load(part)["images"].tobytes())
        if with_labels:
            with archive.open("arr_1.npy", "w") as array:
                np.save(array, np.concatenate([np.load(part)["labels"] for part in parts]))


def write_png_files(part, indices, folder, class_names):
    """The samples of a part as 000000.png and so on; of several classes, in a sub-folder each."""
    arrays = np.load(part)
    for index, image, label in zip(indices, arrays["images"], arrays["labels"], strict=True):
        of_class = os.path.join(folder, class_folder(class_names, label))
        ae.make_folder(of_class)
        path = os.path.join(of_class, f"{index:06}.png")
        try:
            Image.fromarray(image).save(path)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error}") from error


def class_folder(class_names, label):
    """The sub-folder of a class: called as in the data or, if that is not known, by its number."""
    if len(class_names) == 1:
        return "."
    name = class_names[label]
    # The name comes from a file, which must not lead to other places.
    if name and name[0] != "." and name.isprintable() and name == os.path.basename(name):
        return name
    return f"{label:0{len(str(len(class_names) - 1))}}"


@dataclasses.dataclass
class Source:
    """What samples are drawn with."""

    model: dit.DiT
    autoencoder: ae.Autoencoder
    latent_mean: torch.Tensor  # (C, 1, 1)
    latent_std: torch.Tensor  # (C, 1, 1)
    class_names: list  # the data's folders; "" where the checkpoint does not tell
    bfloat16: bool  # in the DiT's products; the Euler state and the decoder stay float32
    settings: dict  # keyword arguments of dit.sample

    @classmethod
    def load(cls, args, device):
        """From the files that the flags name. Raises UserError if they do not fit together."""
        model, info = dit.load(args.ckpt)
        if not args.ae and "ae" not in info:
            raise UserError(f"{args.ckpt} carries no autoencoder: name it with --ae")
        autoencoder = ae.load(args.ae) if args.ae else ae.from_checkpoint(info["ae"], args.ckpt)
        mean, std = load_statistics(args, info)

        size = model.grid * model.patch_size
        wanted = (model.in_channels, size, size)
        pixels = autoencoder.image_size if autoencoder.masked else size * autoencoder.patch_size
        found = autoencoder.latent_shape(pixels, pixels)
        if not (found == wanted and len(mean) == len(std) == model.in_channels):
            raise UserError(
                f"the autoencoder's latents {found} or the statistics ({len(mean)} and {len(std)} "
                f"channels) do not fit the DiT's latents {wanted}: name those it was trained on "
                "with --ae, --stats"
            )

        settings = settings_of(args, info, guided=model.class_dropout_prob > 0)
        if args.compile:
            missing = ae.missing_for_compile(device)
            if not missing:
                model.compile(dynamic=False)
            elif ae.rank_and_world()[0] == 0:
                ae.warn(
                    f"torch.compile needs {missing}, which is not here: sampling goes on eagerly"
                )
        names = info.get("class_names", [""] * model.num_classes)
        bfloat16 = args.dtype == "bfloat16"
        parts = (part.to(device) for part in (model, autoencoder, mean, std))
        return cls(*parts, names, bfloat16, settings)

    @torch.no_grad()
    def draw(self, indices, seed, batch, labels=None, classes=None):
        """Samples by index -> uint8 (N, H, W, 3) and their classes (N,).

        labels: the class of each sample; if not given, each is drawn from `classes`.
        """
        shape = (self.model.in_channels, *[self.model.grid * self.model.patch_size] * 2)
        noise, drawn = [], []
        for index in indices:
            rng = np.random.default_rng((seed, index))
            noise.append(rng.standard_normal(shape, dtype=np.float32))
            if labels is None:
                drawn.append(classes[rng.integers(len(classes))])
        noise = torch.from_numpy(np.stack(noise))
        y = torch.as_tensor(drawn if labels is None else labels)

        images, device = [], self.latent_mean.device
        batches = list(zip(noise.split(batch), y.split(batch), strict=True))
        quiet = ae.rank_and_world()[0] > 0
        for some_noise, some_y in tqdm(
            batches, "drawing", unit="batch", leave=False, disable=quiet
        ):
            some_noise, some_y = some_noise.to(device), some_y.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
                z = dit.sample(self.model, some_noise, some_y, **self.settings)
            for part in (z * self.latent_std + self.latent_mean).split(DECODED_AT_ONCE):
                images.append(ae.to_uint8(self.autoencoder.decode(part)))
        return np.concatenate(images), y.numpy()


def load_statistics(args, info):
    """Mean and std of the latents, (C, 1, 1) each, from --stats or the DiT's own file."""
    stats, names = info, ("latent_mean", "latent_std")
    if args.stats:
        stats, names = ae.read_checkpoint(args.stats), ("mean", "std")
    if not all(name in stats for name in names):
        raise UserError(
            f"{args.stats or args.ckpt} carries no latent mean and std: name them by --stats"
        )
    return [torch.as_tensor(stats[name]).float().view(-1, 1, 1) for name in names]


def settings_of(args, info, guided):
    """Keyword arguments of dit.sample: the flag's, else the checkpoint's, else the paper's.

    guided: whether the model has a null class. Raises UserError for guidance without one.
    """
    settings = dict(dit.SAMPLING)
    if info.get("kind") == "dit":
        saved = info["args"]
        settings = {name: saved["sample_steps" if name == "steps" else name] for name in settings}
    if not guided:
        settings["cfg_scale"] = 1.0
    for name in settings:
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    if settings["cfg_scale"] > 1 and not guided:
        raise UserError(
            "--cfg_scale above 1 needs a DiT of several classes, trained with dropped labels"
        )
    return settings


if __name__ == "__main__":
    main()
