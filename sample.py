"""Draw pictures from a trained DiT (supplement, section B.2 and figures I, II).

    python sample.py                                             the demo's digits, a row per class
    python sample.py --ckpt out/dit/ckpt.pt --labels 130 88      a grid of two classes
    torchrun --nproc_per_node=8 -- sample.py --ckpt out/dit/ckpt.pt --num 50000     for fid.py
    python sample.py --ckpt lightningdit.pt --ae vmae.pth --stats latents_stats.pt  others' files

Sample i depends on --seed and i alone, not on the number of processes or the batch. (The -- keeps
torchrun from taking --num for an abbreviation of a flag of its own.)
"""

import argparse
import dataclasses
import datetime
import json
import os
import shutil
import zipfile

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import ae
import dit
from ae import UserError, at_least, fraction

SHOWCASE = [975, 3, 207, 387, 388, 88, 979, 279]  # the ImageNet classes of the authors' release
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
    add("--labels", nargs="+", help="classes, such as 130 88 (default: all, in a grid ten)")
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

    add = parser.add_argument_group("for a checkpoint that does not carry them").add_argument
    add("--ae", help="checkpoint of the autoencoder")
    add("--stats", help="PyTorch file of a dict with the latents' mean and std per channel")
    return parser.parse_args()


def main():
    try:
        args = parse_args()
        device = ae.choose_device(args.device)
        source = Source.load(args, device)
        out = args.out or os.path.dirname(args.ckpt) or "."
        labels = parse_labels(args.labels, len(source.class_names))
        ae.make_folder(out)
        if args.num is not None:
            write_npz(source, args, out, labels)
        elif ae.rank_and_world()[0] == 0:
            draw_grid(source, args, out, labels)
    except UserError as error:
        ae.exit_with(error)


def parse_labels(words, num_classes):
    """The classes that --labels names, such as 130 88 or 130,88; None if it is not given."""
    if words is None:
        return None
    words = [word.strip() for word in ",".join(words).split(",")]
    if not all(word.isdecimal() and int(word) < num_classes for word in words):
        raise UserError(
            f"--labels takes class numbers, such as 3 7: this model has classes 0 to {num_classes - 1}"
        )
    return [int(word) for word in words]


def draw_grid(source, args, out, labels):
    """samples.png: a row per class, or eight rows of the only class."""
    num_classes = len(source.class_names)
    if num_classes == 1:
        labels = [0] * 8
    elif labels is None and num_classes == 1000:
        labels = SHOWCASE
    elif labels is None:
        count = min(num_classes, 10)
        labels = [i * num_classes // count for i in range(count)]  # spread over all
    labels_of_samples = np.repeat(labels, args.columns)
    indices = range(len(labels_of_samples))
    images, _ = source.draw(indices, args.seed, args.batch, labels=labels_of_samples)

    titles = []
    for label in labels:
        number, name = str(label), source.class_names[label]
        titles.append(number if name == number else f"{number} {name}")
    if num_classes == 1:
        titles = [""] * len(labels)
    path = os.path.join(out, "samples.png")
    ae.save_grid(path, images.reshape(-1, args.columns, *images.shape[1:]), titles)
    print(f"wrote {path}")


def write_npz(source, args, out, labels):
    """samples.npz with arr_0, uint8 (N, H, W, 3), and arr_1, classes (N,), if there are several.

    Until it is complete, samples.parts holds a file for each 256 samples, so that an interrupted
    run goes on. Raises UserError if they were drawn with other settings.
    """
    rank, world = ae.rank_and_world()
    folder = os.path.join(out, "samples.parts")
    classes = list(range(len(source.class_names))) if labels is None else labels
    starts = range(0, args.num, SAMPLES_PER_PART)
    parts = {
        os.path.join(folder, f"{start // SAMPLES_PER_PART:06}.npz"): range(
            start, min(start + SAMPLES_PER_PART, args.num)
        )
        for start in starts
    }
    if rank == 0:
        claim_parts(folder, source, args, classes)
    missing = [part for part in parts if not os.path.exists(part)]
    if world > 1:
        # Only to wait for each other, which needs no GPU and can take hours.
        dist.init_process_group("gloo", timeout=datetime.timedelta(hours=24))
        dist.barrier()  # all have looked

    title = f"rank 0 of {world}, {SAMPLES_PER_PART} samples per part"
    for part in tqdm(missing[rank::world], title, unit="part", disable=rank > 0):
        images, y = source.draw(parts[part], args.seed, args.batch, classes=classes)
        with ae.whole_file(part) as file:
            np.savez(file, images=images, labels=y)
    if world > 1:
        ae.leave_processes()
    if rank == 0:
        path = os.path.join(out, "samples.npz")
        join_parts(list(parts), path, args.num, with_labels=len(source.class_names) > 1)
        shutil.rmtree(folder)
        print(f"wrote {path}: {args.num} samples")


def claim_parts(folder, source, args, classes):
    """Make the folder of an unfinished samples.npz, or check that its settings are the same."""
    settings = {
        "ckpt": os.path.realpath(args.ckpt),
        "modified": os.path.getmtime(args.ckpt),
        "num": args.num,
        "seed": args.seed,
        "labels": classes,
        "ae": args.ae,
        "stats": args.stats,
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


@dataclasses.dataclass
class Source:
    """What samples are drawn with."""

    model: dit.DiT
    autoencoder: ae.Autoencoder
    latent_mean: torch.Tensor  # (C, 1, 1)
    latent_std: torch.Tensor  # (C, 1, 1)
    class_names: list
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
                f"channels) do not fit the DiT's latents {wanted}: name those it was trained on with "
                "--ae, --stats"
            )

        settings = settings_of(args, info, guided=model.class_dropout_prob > 0)
        names = info.get("class_names", [""] * model.num_classes)
        return cls(*(part.to(device) for part in (model, autoencoder, mean, std)), names, settings)

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
            z = dit.sample(self.model, some_noise.to(device), some_y.to(device), **self.settings)
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
            "--cfg_scale above 1 needs a DiT of several classes that was trained with dropped labels"
        )
    return settings


if __name__ == "__main__":
    main()
