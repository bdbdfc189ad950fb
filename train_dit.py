"""Train a DiT on the latents of a frozen autoencoder (supplement, section B.2).

    python train_dit.py                                    the demo: digits, its VMAE's latents
    python train_dit.py --data DIR --ae vmae.pth           own images, the paper's settings
    torchrun --nproc_per_node=8 train_dit.py --data imagenet/train --ae vmae.pth --cache latents
    python train_dit.py --data DIR --ae vmae.pth --resume  the same command goes on
    python train_dit.py --data DIR --init dit.pt           fine-tune a trained DiT

Writes ckpt.pt, which holds all that sample.py needs, log.jsonl and samples.png into --out.
"""

import copy
import functools
import hashlib
import os
import time
from collections import defaultdict

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import dit
import fid
import sample
import train_ae
from ae import Posterior, UserError, fingerprint, from_checkpoint, run_main, whole_file
from sample import DECAY, SWITCH, generator, new_parser, number, on_rank_0, rank_and_world, text

# ---- Recipe ----
#
# [S] supplement  [R] the authors' release and LightningDiT  [O] our choice
# The network's sizes are in dit.DiT_models. The settings of sampling go into the checkpoint, where
# sample.py finds its defaults.

RECIPE = dict(
    out="out/dit",
    model="DiT-B/1",  # [S]
    qk_norm=1,  # [S] RMSNorm of queries and keys; the release's CelebA-HQ has it off
    class_dropout=0.1,  # [R] share of the labels replaced by the null class
    cosine_loss=0,  # [R] LightningDiT's default is 1, the release's logs have it off
    steps=100_000,  # [S] 60,000 for CelebA-HQ
    # [S] images per optimiser step, over all processes; four of the release's logs agree, its
    # settings and its only log with losses say 256
    batch=1024,
    micro_batch=32,  # [O] images per process at once, the rest is gradient accumulation
    lr=2e-4,  # [S]
    schedule="constant",  # [R]
    betas=[0.9, 0.95],  # [R] AdamW, without weight decay
    ckpt_every=1000,  # [O]
    keep_every=20_000,  # [R]
    sample_steps=dit.SAMPLING["steps"],
    cfg_scale=None,  # that of SAMPLING, 10; without a null class 1
    cfg_channels=dit.SAMPLING["cfg_channels"],
    cfg_start=dit.SAMPLING["cfg_start"],
    shift=dit.SAMPLING["shift"],
)

# What the demo changes, to take minutes on a laptop; all of it is our choice.
DEMO = dict(
    out="out/demo/dit",
    model="DiT-demo/1",
    steps=3000,
    batch=32,
    lr=3e-3,
    schedule="cosine",
    keep_every=None,
    sample_steps=50,
    cfg_scale=1.75,
    cfg_channels=16,
)


# ---- Flags ----


def parse_args():
    """The settings: flags, where they are not given --init's, else the recipe's."""
    # --data, which chooses the recipe, is read first; the recipe becomes the flags' defaults.
    words = new_parser(add_help=False)
    words.add_argument("--data", type=text, help="folder of images; None: the demo, on digits")
    demo = words.parse_known_args()[0].data is None

    parser = new_parser(__doc__, parents=[words])
    train_ae.add_run_flags(parser, demo)
    add = parser.add_argument
    add("--ae", type=text, help="the autoencoder's checkpoint; None: --init's, or VMAE's in out")
    add("--cache", type=text, help="folder for the moments of all images; None: encode in training")
    # the network
    sizes = list(dit.DiT_models)
    add("--model", choices=sizes, metavar="SIZE", help=f"of the network: {' '.join(sizes)}")
    add("--image_size", type=number(int, 1), help="pixels on a side; None: the autoencoder's")
    add("--qk_norm", **SWITCH, help="1: RMSNorm of queries and keys")
    # the objective
    add("--class_dropout", type=number(float, 0, 1), help="share of the labels that are dropped")
    add("--cosine_loss", **SWITCH, help="1: add LightningDiT's 1 - cos(velocity, target)")
    # the optimiser
    add("--steps", type=number(int, 1), help="optimiser steps")
    add("--lr", type=number(float, 0), help="learning rate")
    add("--ema", type=DECAY, help="decay of the average of the weights; None: 0.9999 or less")
    # samples.png, and the defaults of sample.py
    add("--sample_steps", type=number(int, 1), help="Euler steps of sampling")
    add("--cfg_scale", type=number(float, 1), help="guidance scale; None: 10, or 1 for one class")
    add("--cfg_channels", type=number(int, 0), help="latent channels that are guided")
    add("--cfg_start", type=number(float, 0, 1), help="t from which guidance applies")
    add("--shift", type=number(float, 1e-9), help="of the time grid, below 1 towards the noise")
    settings = RECIPE | DEMO if demo else RECIPE
    return train_ae.parse_with_init(parser, settings, sizes_of)


def sizes_of(args):
    """The sizes of the DiT in --init, if its file is ours: LightningDiT's does not name them."""
    settings = dit.load(args.init)[1].get("args")
    if not isinstance(settings, dict):
        return {}
    return {name: settings[name] for name in ("model", "qk_norm", "image_size")}


def main():
    train(parse_args())
    sample.leave_processes()


# ---- Training ----


def train(args):
    """Train a DiT, from the start or from the checkpoint in --out."""
    # The images, the processes, the autoencoder, and what follows from other settings.
    images = train_ae.Images(args.data)
    num_classes = len(images.classes)
    rank, world, device = sample.join_processes(args.device)
    slices = train_ae.resolve(args, rank, world, device)
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")
    if args.ema is None:
        # [R] 0.9999 from 60,000 steps on. A shorter run gets a smaller decay, so that its initial
        # weights, too, have faded to a share of e^-6 at its end.
        args.ema = max(0.0, min(0.9999, 1 - 6 / args.steps))
    guidance = num_classes > 1 and args.class_dropout > 0
    if args.cfg_scale is None:
        args.cfg_scale = dit.SAMPLING["cfg_scale"] if guidance else 1.0
    if args.cfg_scale > 1 and not guidance:
        raise UserError("--cfg_scale above 1 needs several classes and --class_dropout above 0")
    if args.data is None and args.cache is None:
        args.cache = os.path.join(args.out, "latents")  # those of digits are small
    start, info = dit.load(args.init) if args.init else (None, {})
    autoencoder = frozen_autoencoder(args, info)
    if args.image_size is None:
        args.image_size = autoencoder.image_size or 256
    channels, size, _ = autoencoder.latent_shape(args.image_size, args.image_size)

    # The network, the average of its weights, the optimiser.
    torch.manual_seed(sample.seed_of(sample.NETWORK, args.seed))  # the same in every process
    net = dit.DiT_models[args.model](
        input_size=size,
        in_channels=channels,
        num_classes=num_classes,
        qk_norm=bool(args.qk_norm),
        class_dropout_prob=args.class_dropout,
    )
    if start:
        start_from(net, start, info, args.init, images.classes)
    net.to(device)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.lr, args.betas, weight_decay=0, fused=True)

    # The checkpoint, with --resume. It carries the autoencoder and the statistics of its latents.
    ckpt = train_ae.begin(args, images, net)
    first_step = ckpt["step"] + 1 if ckpt else 1
    if ckpt:
        info = ckpt
        autoencoder = from_checkpoint(ckpt["autoencoder"])
        net.load_state_dict(ckpt["model"])
        ema.load_state_dict(ckpt["ema"])
        optimizer.load_state_dict(ckpt["optimizer"])
    autoencoder.to(device).requires_grad_(False)

    # Moments of posteriors come from the cache, or from images that are encoded on the fly.
    crop = functools.partial(train_ae.crop_and_flip, args.image_size)
    dataset = train_ae.Batches(images, crop)
    if args.cache:
        on_rank_0(claim_cache, args, images, autoencoder)
        sample.check_visible(args.cache)
        fill_cache(args, dataset, autoencoder, device)
        dataset = Cache(args.cache)

    def load_moments(keys):
        """Yields moments (B, 2C, h, w), labels (B,) and flags of unreadable images (B,)."""
        for x, *rest in train_ae.load_batches(dataset, keys, args.workers, device):
            moments = x.float() if args.cache else encode(autoencoder, x)
            yield moments, *rest

    # The statistics that normalise the latents.
    if "latent_mean" in info:
        latent_mean, latent_std = info["latent_mean"], info["latent_std"]
    else:
        latent_mean, latent_std = latent_statistics(args, images, load_moments, autoencoder)
    latent_mean = latent_mean.to(device).view(-1, 1, 1)
    latent_std = latent_std.to(device).view(-1, 1, 1)
    del ckpt, start, info

    if args.compile:
        train_ae.compile_for_training(net)
    model = net
    if world > 1:
        model = DistributedDataParallel(net, gradient_as_bucket_view=True)

    batches = load_moments(train_ae.training_order(args, images, slices, first_step))
    history = defaultdict(list)  # what the next log line averages: numbers on the device, by name
    skipped_in_row = torch.zeros((), device=device)
    since = time.time(), first_step - 1  # the clock for images/s: its start, and after which step

    for step in range(first_step, args.steps + 1):
        # Noises, times and dropped labels are drawn for the global batch, by (seed, step), and each
        # micro-batch takes its rows: more processes or smaller micro-batches change the speed, not
        # the run. Which images a step has, and which are flipped, is train_ae.training_order's;
        # nothing else is random.
        rng = {"generator": generator(device, sample.STEP, args.seed, step), "device": device}
        posterior_noise = torch.randn(args.batch, channels, size, size, **rng)
        noise = torch.randn(args.batch, channels, size, size, **rng)
        t = torch.randn(args.batch, **rng).sigmoid()
        dropped = torch.rand(args.batch, **rng) < net.class_dropout_prob

        for rows in slices:
            moments, y, unreadable = next(batches)
            posterior = Posterior(moments, autoencoder.deterministic)
            x1 = (posterior.sample(posterior_noise[rows]) - latent_mean) / latent_std
            y = torch.where(dropped[rows], num_classes, y)  # the null class
            if rank == 0 and step == first_step and rows == slices[0]:
                print(f"normalised latents at first: mean {x1.mean():.3f}, std {x1.std():.3f}")
            # DDP averages gradients over the processes, once per step.
            model.require_backward_grad_sync = rows == slices[-1]

            with autocast:
                loss = dit.flow_loss(model, x1, y, noise[rows], t[rows], args.cosine_loss)
            (loss / len(slices)).backward()
            history["loss"].append(loss.detach())
            history["unreadable"].append(unreadable.mean())

        # The optimiser step and the average of the weights. A loss that is not finite, in any
        # process, makes the norm of the averaged gradients not finite: the step changes nothing.
        lr = train_ae.learning_rate(args, step, args.lr)
        norm = clip_grad_norm_(net.parameters(), args.grad_clip)
        skip = 1 - norm.isfinite().float()
        train_ae.update(optimizer, lr, skip)
        update_ema(ema, net, (1 - skip) * (1 - args.ema))
        skipped_in_row = (skipped_in_row + 1) * skip
        history["grad_norm"].append(norm)
        history["skipped"].append(skip)

        # A log line, every --log_every steps; it waits for the device.
        if step in (1, args.steps) or step % args.log_every == 0:
            train_ae.log(args, step, history, lr, skipped_in_row, since)
            history, since = defaultdict(list), (time.time(), step)

        # A checkpoint, every --ckpt_every steps; pictures with those that stay and at the end.
        numbered = bool(args.keep_every) and step % args.keep_every == 0
        if rank == 0 and (numbered or step % args.ckpt_every == 0 or step == args.steps):
            ckpt = {
                # For --resume:
                "model": net.state_dict(),
                "optimizer": optimizer.state_dict(),
                # For sample.py and --init, which read them with dit.load; all but the names for
                # --resume, too:
                "class_names": images.classes,
                "ema": ema.state_dict(),
                "latent_mean": latent_mean.flatten(),
                "latent_std": latent_std.flatten(),
                "autoencoder": {"model": autoencoder.state_dict(), "args": autoencoder.args},
            }
            # save adds "step" and the fingerprint of the images, for --resume, and "args": --resume
            # compares them, sample.py finds its defaults there, and --init the network's sizes.
            train_ae.save(args, step, images, numbered, ckpt)
            if numbered or step == args.steps:
                save_samples(args, (ema, autoencoder, latent_mean, latent_std), images.classes)
            since = time.time(), step  # images/s are those of training alone

    if rank == 0:
        print(f"finished: see {args.out}/ckpt.pt and {args.out}/samples.png")


def frozen_autoencoder(args, info):
    """The autoencoder whose latents the DiT models; info: what the file of --init holds."""
    if "autoencoder" not in info and args.ae is None:
        args.ae = os.path.join("out" if args.data else "out/demo", "vmae-tuned", "ckpt.pt")
        if not os.path.exists(args.ae):
            data = f" --data {args.data}" if args.data else ""
            raise FileNotFoundError(
                f"there is no autoencoder in {args.ae}: train it (train_ae.py{data}, then "
                f"train_ae.py{data} --tune_decoder), or name another with --ae"
            )
    return sample.autoencoder_of(info, args.init, args.ae)


def start_from(net, start, info, path, classes):
    """Give net the weights of start, the DiT in the file `path`, of which info is the rest.

    A class keeps the embedding of the class of its name there, or of its number where the file has
    no names; others get new ones. Raises UserError if the sizes differ.
    """
    table = "y_embedder.embedding_table.weight"
    old, new = start.state_dict(), net.state_dict()
    old_table, new_table = old.pop(table), new.pop(table)
    if {k: v.shape for k, v in old.items()} != {k: v.shape for k, v in new.items()}:
        raise UserError(
            f"--init {path} is a DiT of other sizes than the flags say, or of other latents (there "
            f"they have {start.in_channels} channels on a grid of {start.grid}, here "
            f"{net.in_channels} on {net.grid}): check --model, --qk_norm, --ae and --image_size"
        )
    names = info.get("class_names")
    if names is None:  # LightningDiT's
        names = classes if start.num_classes == net.num_classes else []
    kept = [name for name in classes if name in names]
    for name in kept:
        new_table[classes.index(name)] = old_table[names.index(name)]
    if start.class_dropout_prob > 0 and net.class_dropout_prob > 0:
        new_table[-1] = old_table[-1]
    net.load_state_dict(old | {table: new_table})
    if rank_and_world()[0] == 0:
        print(f"starting from {path}, which has {len(kept)} of these {len(classes)} classes")


@torch.no_grad()
def update_ema(ema, net, rate):
    """ema += rate * (net - ema); the rate of a skipped step is 0."""
    for average, weight in zip(ema.parameters(), net.parameters(), strict=True):
        average.lerp_(weight, rate)


def save_samples(args, parts, class_names):
    """samples.png: a row for each of (at most) ten classes, drawn with the EMA weights.

    parts: the EMA, the autoencoder, mean and std of the latents, as sample.generate takes them.
    """
    settings = {name: getattr(args, name) for name in dit.SAMPLING if name != "steps"}
    generate_samples = functools.partial(
        sample.generate, *parts, seed=args.seed, steps=args.sample_steps, **settings
    )
    classes = sample.spread(len(class_names))
    captions = [class_names[label] for label in classes]
    path = os.path.join(args.out, "samples.png")
    at_once = max(1, args.micro_batch // 2)  # guidance doubles the batch
    sample.write_grid(path, generate_samples, classes, captions, 8, at_once, quiet=True)


# ---- Latents ----

AT_ONCE = 32  # images that are encoded together; fixed, since another number rounds otherwise


@torch.no_grad()
def encode(autoencoder, x):
    """Images (B, 3, S, S) -> the moments of their posteriors (B, 2C, h, w).

    In float32 (TF32 products on a GPU): the rounding of bfloat16 would be as large as the
    posterior's std.
    """
    posteriors = [autoencoder.encode(part) for part in x.split(AT_ONCE)]
    return torch.cat([torch.cat([p.mean, p.logvar], 1) for p in posteriors])


def latent_statistics(args, images, load_moments, autoencoder):
    """Mean and unbiased std (C,) per channel; a sample each of 10,000 random images, unflipped."""
    rank, world = rank_and_world()
    n = len(images)
    seed = sample.seed_of(sample.STATISTICS, args.seed)
    picked = np.random.default_rng(seed).permutation(n)[:10000].tolist()
    parts = [picked[i : i + 100] for i in range(0, len(picked), 100)]
    mine = range(rank, len(parts), world)
    keys = [[(index, 0, False) for index in parts[k]] for k in mine]
    device = next(autoencoder.parameters()).device
    sums = torch.zeros(3, autoencoder.latent_dim, dtype=torch.float64, device=device)
    bar = tqdm(mine, "latent statistics", unit="batch", disable=rank > 0)
    for k, (moments, _, _) in zip(bar, load_moments(keys), strict=True):
        posterior = Posterior(moments, autoencoder.deterministic)
        rng = generator(device, sample.STATISTICS, args.seed, 1, k)
        noise = torch.randn(posterior.mean.shape, generator=rng, device=device)
        # (C, B * h * w)
        sums += train_ae.power_sums(posterior.sample(noise).transpose(0, 1).flatten(1))
    count, total, squares = fid.all_reduce(sums)
    mean = total / count
    return mean.float(), ((squares - count * mean.square()) / (count - 1)).sqrt().float()


SHARD = 8192  # images in a file of the cache


def shard_path(folder, name, k):
    return os.path.join(folder, f"{name}-{k:05}.npy")


class Cache(torch.utils.data.Dataset):
    """The moments of every image and its flip, in 16 bit, read by index from memory-mapped files.

    Shards of 8,192 images: moments-00000.npy (n, 2, 2C, h, w), where [:, 1] are the flips', and
    labels-00000.npy (n,). It takes the place of Batches. Rounding to 16 bit moves a latent by less
    than 0.001 of its channel's std (rms) and the posterior's std by 0.1%.
    """

    def __init__(self, folder):
        self.folder = folder
        self.opened = {}  # moments and labels by number of the shard

    def shard(self, k):
        # Opened at first use, so that a loader process opens its own.
        if k not in self.opened:
            try:
                moments = np.load(shard_path(self.folder, "moments", k), mmap_mode="r")
                self.opened[k] = moments, np.load(shard_path(self.folder, "labels", k))
            except (ValueError, EOFError) as error:
                raise UserError(f"the cache {self.folder} is damaged ({error})") from error
        return self.opened[k]

    def __getitem__(self, keys):
        moments, labels = [], []
        for index, _epoch, flip in keys:
            of_shard, labels_of_shard = self.shard(index // SHARD)
            moments.append(of_shard[index % SHARD, int(flip)])
            labels.append(int(labels_of_shard[index % SHARD]))
        return torch.from_numpy(np.stack(moments)), torch.tensor(labels), torch.zeros(len(keys))


def claim_cache(args, images, autoencoder):
    """Make the cache's folder, or check that it was made of the same images, by path within the
    folder, size and time of modification, and of the same latents. Raises UserError if not."""
    listing = ["digits"]
    if not images.digits:
        listing = []
        for index in range(len(images)):
            path = images.path(index)
            status = os.stat(path, follow_symlinks=os.path.exists(path))  # or a broken link itself
            name = os.fsdecode(images.files[index])
            listing.append(f"{name} {status.st_size} {status.st_mtime_ns}")
    record = {
        "format": 2,
        "autoencoder": fingerprint(autoencoder.encoder_state()),
        "images": hashlib.sha256(os.fsencode("\n".join(listing))).hexdigest()[:16],
        "image_size": args.image_size,
        "precision": "float32" if args.device == "cpu" else "TF32",
    }
    sample.claim(args.cache, record)


def fill_cache(args, dataset, autoencoder, device):
    """Write the shards that are missing; the processes take turns.

    Raises UserError for moments beyond 16 bits.
    """
    rank, world = rank_and_world()
    n = len(dataset.images)
    shards = range(-(-n // SHARD))
    missing = [k for k in shards if not os.path.exists(shard_path(args.cache, "moments", k))]
    if world > 1:
        dist.barrier()  # all have looked
    spans = {k: range(k * SHARD, min(n, (k + 1) * SHARD)) for k in missing[rank::world]}
    keys = [
        [(index, 0, False) for index in span[i : i + AT_ONCE]]
        for span in spans.values()
        for i in range(0, len(span), AT_ONCE)
    ]
    batches = train_ae.load_batches(dataset, keys, args.workers, device)
    bar = tqdm(total=len(keys), desc="latents", unit="batch", disable=rank > 0 or not keys)
    for k, span in spans.items():
        moments, labels = [], []
        while sum(map(len, labels)) < len(span):
            x, y, _ = next(batches)
            pair = [encode(autoencoder, x), encode(autoencoder, x.flip(-1))]
            pair = torch.stack(pair, 1).half()
            if not pair.isfinite().all():
                raise UserError(
                    "a latent is not finite, or beyond the 65,504 that 16 bits can hold: train "
                    "without --cache"
                )
            moments.append(pair.cpu().numpy())
            labels.append(y.cpu().numpy())
            bar.update()
        # The moments come last: where they are, the shard is complete.
        for name, parts in (("labels", labels), ("moments", moments)):
            with whole_file(shard_path(args.cache, name, k)) as file:
                np.save(file, np.concatenate(parts))
    bar.close()
    if world > 1:
        dist.barrier()


if __name__ == "__main__":
    run_main(main, fid.UserError)
