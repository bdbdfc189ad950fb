"""Train a DiT on the latents of a frozen autoencoder (supplement, section B.2).

    python train_dit.py                                    the demo: digits, its VMAE's latents
    python train_dit.py --data DIR --ae vmae.pth           own images, the paper's settings
    torchrun --nproc_per_node=8 train_dit.py --data imagenet/train --ae vmae.pth --cache latents
    python train_dit.py --data DIR --ae vmae.pth --resume  go on with that run
    python train_dit.py --data DIR --init dit.pt           fine-tune a trained DiT

Writes ckpt.pt, which holds all that sample.py needs, log.jsonl and samples.png into --out.
"""

import copy
import functools
import hashlib
import os

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import ae
import dit
import fid
import sample
import train_ae
from fid import (
    SWITCH,
    UserError,
    new_parser,
    number,
    rank_and_world,
    text,
    wait_for_all,
    whole_file,
)
from sample import generator

# ---- Recipe ----
#
# [S] supplement  [R] the authors' release and LightningDiT  [O] our choice
# The network's sizes are in dit.DiT_models, the settings of sampling in dit.SAMPLING.

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
    sample_steps=dit.SAMPLING["steps"],  # of samples.png, and the default of sample.py
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
)
DEMO_SAMPLING = dit.SAMPLING | dict(cfg_scale=1.75, cfg_channels=16)


# ---- Flags ----


def parse_args():
    """The settings: what the flags say, else the demo, the recipe, in this order. A checkpoint to
    start from or to go on with brings the network's sizes; flags that contradict them are refused.
    """
    # Some flags choose the defaults of others, so the command line is read twice.
    first = new_parser(add_help=False)
    train_ae.add_run_flags(first)
    chosen, rest = first.parse_known_args()
    settings = RECIPE | DEMO if chosen.data is None else RECIPE
    source, sizes = train_ae.source_of_sizes(chosen, settings, rest), {}
    if source:
        # LightningDiT's file does not name its sizes.
        args = ae.read_checkpoint(source).get("args")
        if isinstance(args, dict):
            sizes = {k: args[k] for k in ("model", "qk_norm", "image_size") if k in args}

    parser = new_parser(__doc__, parents=[first])
    add = parser.add_argument
    add("--ae", type=text, help="the autoencoder's checkpoint; None: --init's, or VMAE's in out")
    add("--stats", type=text, help="file of the latents' mean, std; None: --init's, or computed")
    add("--cache", type=text, help="folder for the moments of all images; None: encode in training")
    # the network
    names = list(dit.DiT_models)
    add("--model", choices=names, metavar="SIZE", help=f"of the network: {' '.join(names)}")
    add("--image_size", type=number(int, 1), help="pixels on a side; None: the autoencoder's")
    add("--qk_norm", **SWITCH, help="1: RMSNorm of queries and keys")
    # the objective
    add("--class_dropout", type=number(float, 0, 1), help="share of the labels that are dropped")
    add("--cosine_loss", **SWITCH, help="1: add LightningDiT's 1 - cos(velocity, target)")
    # the optimiser
    add("--steps", type=number(int, 1), help="optimiser steps")
    add("--lr", type=number(float, 0), help="learning rate")
    ema = "decay of the average of the weights; None: 0.9999 or less"
    add("--ema", type=number(float, 0, 1 - 1e-9), help=ema)
    add("--sample_steps", type=number(int, 1), help="Euler steps of samples.png")
    return train_ae.parse_flags(parser, settings, sizes, source)


def main():
    train(parse_args())
    fid.leave_processes()


# ---- Training ----


def train(args):
    """Train a DiT, from the start or from the checkpoint in --out."""
    # The processes, the images, the checkpoint to go on from, what follows from other settings.
    rank, world, device = fid.join_processes(args.device)
    images = train_ae.Images(args.data)
    num_classes = len(images.classes)
    if args.data is None and args.cache is None:
        args.cache = os.path.join(args.out, "latents")  # those of digits are small
    ckpt = train_ae.open_run(args)
    if ckpt and "autoencoder" not in ckpt:
        raise UserError(f"{args.out}/ckpt.pt is no checkpoint of a DiT's run")
    train_ae.resolve(args, device)
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")
    if args.ema is None:
        # [R] 0.9999 from 60,000 steps on. A shorter run gets a smaller decay, so that its initial
        # weights, too, have faded to a share of e^-6 at its end.
        args.ema = max(0.0, min(0.9999, 1 - 6 / args.steps))

    # What the run begins with: the autoencoder; the DiT to start from, if any; and info, the content
    # of ckpt, else of the file of --init, else nothing.
    start, info = None, ckpt or {}
    if ckpt:
        autoencoder = ae.from_checkpoint(ckpt["autoencoder"])
    else:
        if args.init:
            start, info = dit.load(args.init)
        if "autoencoder" not in info and args.ae is None:
            args.ae = tuned_vmae(args.data)
        autoencoder = sample.load_autoencoder(info, args.init, args.ae)
    autoencoder.to(device).requires_grad_(False)
    if args.image_size is None:
        args.image_size = autoencoder.image_size or 256
    channels, size, _ = autoencoder.latent_shape(args.image_size, args.image_size)
    first_step = train_ae.check_run(args, images, ckpt)
    picture = os.path.join(args.out, "samples.png")
    if first_step > args.steps:
        if rank == 0:
            print(f"finished before: see {args.out}/ckpt.pt and {picture}")
        return

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
    if ckpt:
        net.load_state_dict(ckpt["model"])
        ema.load_state_dict(ckpt["ema"])
        optimizer.load_state_dict(ckpt["optimizer"])
    train_ae.describe(args, images, net, args.lr)

    # Moments of posteriors come from the cache, or from images that are encoded on the fly.
    crop = functools.partial(train_ae.crop_and_flip, args.image_size)
    dataset = train_ae.Batches(images, crop)
    if args.cache:
        fill_cache(args, dataset, autoencoder, device)
        dataset = Cache(args.cache)

    def load_moments(keys):
        """Yields moments (B, 2C, h, w) and labels (B,)."""
        for x, labels in train_ae.load_batches(dataset, keys, args.workers, device):
            yield x.float() if args.cache else encode(autoencoder, x), labels

    # The statistics that normalise the latents. A run that goes on has its own.
    stats = None if ckpt else args.stats
    if "latent_mean" in info or stats:
        latent_mean, latent_std = sample.load_statistics(info, args.init, stats)
    else:
        latent_mean, latent_std = latent_statistics(args, images, load_moments, autoencoder)
    sample.check_latents(net, autoencoder, latent_mean, latent_std)
    latent_mean, latent_std = latent_mean.to(device), latent_std.to(device)

    # The settings of sampling: the recipe's, or those of the run that goes on.
    recipe = dit.SAMPLING if args.data else DEMO_SAMPLING
    sampling = dit.sampling_of(ckpt or {"sampling": recipe}, net)
    sampling["steps"] = args.sample_steps
    del ckpt, start, info

    def save_samples():
        """samples.png: a row for each of (at most) ten classes, drawn with the EMA weights."""
        parts = ema, autoencoder, latent_mean, latent_std
        generate = functools.partial(sample.generate, *parts, seed=args.seed, **sampling)
        classes = sample.spread(num_classes)
        captions = [images.classes[label] for label in classes]
        at_once = max(1, args.micro_batch // 2)  # guidance doubles the batch
        sample.write_grid(picture, generate, classes, captions, 8, at_once)

    if args.compile:
        train_ae.compile_for_training(net)
    model = net
    if world > 1:
        model = DistributedDataParallel(net, gradient_as_bucket_view=True)

    slices = train_ae.cut_batch(args)
    batches = load_moments(train_ae.training_order(args, images, slices, first_step))
    log = train_ae.Log(args, first_step)
    for step in range(first_step, args.steps + 1):
        # Noises, times and dropped labels are drawn for the global batch, by (seed, step), and each
        # micro-batch takes its rows: more processes or smaller micro-batches change the rounding
        # alone. Which images a step has, and which are flipped, is train_ae.training_order's;
        # nothing else is random.
        rng = {"generator": generator(device, sample.STEP, args.seed, step), "device": device}
        posterior_noise = torch.randn(args.batch, channels, size, size, **rng)
        noise = torch.randn(args.batch, channels, size, size, **rng)
        t = torch.randn(args.batch, **rng).sigmoid()  # [R] logit-normal times
        dropped = torch.rand(args.batch, **rng) < net.class_dropout_prob

        for rows in slices:
            moments, y = next(batches)
            posterior = ae.Posterior(moments, autoencoder.deterministic)
            x1 = (posterior.sample(posterior_noise[rows]) - latent_mean) / latent_std
            y = torch.where(dropped[rows], num_classes, y)  # the null class
            # DDP averages gradients over the processes, once per step.
            model.require_backward_grad_sync = rows == slices[-1]

            with autocast:
                loss = dit.flow_loss(model, x1, y, noise[rows], t[rows], args.cosine_loss)
            (loss / len(slices)).backward()
            log.add(loss=loss.detach())

        # The optimiser step and the average of the weights. A loss that is not finite, in any
        # process, makes the norm of the averaged gradients not finite: the step changes nothing.
        lr = train_ae.learning_rate(args, step, args.lr, 0, args.steps)
        norm = clip_grad_norm_(net.parameters(), args.grad_clip)
        skip = 1 - norm.isfinite().float()
        train_ae.update(optimizer, lr, skip)
        update_ema(ema, net, (1 - skip) * (1 - args.ema))
        log.add(grad_norm=norm, skipped=skip)

        # A log line, every --log_every steps; it waits for the device.
        if step in (1, args.steps) or step % args.log_every == 0:
            log.write(step, lr)

        # A checkpoint, every --ckpt_every steps; before those that stay and the last, pictures.
        numbered = bool(args.keep_every) and step % args.keep_every == 0
        if rank == 0 and (numbered or step % args.ckpt_every == 0 or step == args.steps):
            if numbered or step == args.steps:
                save_samples()
                log.add_picture(picture, step)
            # What a checkpoint holds and who reads it; sample.py and --init do so with dit.load.
            content = {
                "model": net.state_dict(),  # --resume
                "optimizer": optimizer.state_dict(),  # --resume
                "ema": ema.state_dict(),  # sample.py, --init, --resume
                "class_names": images.classes,  # sample.py, --init
                "latent_mean": latent_mean.flatten(),  # sample.py, --init, --resume
                "latent_std": latent_std.flatten(),  # sample.py, --init, --resume
                "sampling": sampling,  # sample.py, --resume
                # sample.py, --init, --resume
                "autoencoder": {"model": autoencoder.state_dict(), "args": autoencoder.args},
            }
            # save adds "step" and the fingerprint of the images, for --resume, and "args": --init and
            # --resume find the network's sizes there, --resume all that must not change.
            train_ae.save(args, step, images, numbered, content)
            log.restart_clock(step)  # images/s are those of training alone

    if rank == 0:
        print(f"finished: see {args.out}/ckpt.pt and {picture}")


def tuned_vmae(data):
    """Where train_ae.py --tune_decoder leaves its result; raises UserError if it is not there."""
    path = os.path.join("out" if data else "out/demo", "vmae-tuned", "ckpt.pt")
    if not os.path.exists(path):
        flags = f" --data {data}" if data else ""
        raise UserError(
            f"there is no autoencoder in {path}: train it (train_ae.py{flags}, then "
            f"train_ae.py{flags} --tune_decoder), or name another with --ae"
        )
    return path


def start_from(net, start, info, path, classes):
    """Give net the weights of start, the DiT in the file `path`, of which info is the rest.

    A class keeps the embedding of the class of its name there, or of its number where the file has
    no names; others get new ones. Raises UserError for other latents.
    """
    if (start.in_channels, start.grid) != (net.in_channels, net.grid):
        raise UserError(
            f"--init {path} is a DiT of latents of {start.in_channels} channels on a grid of "
            f"{start.grid}, here they have {net.in_channels} on {net.grid}: check --ae and "
            "--image_size"
        )
    table = "y_embedder.embedding_table.weight"
    old, new_table = start.state_dict(), net.state_dict()[table]
    old_table = old.pop(table)
    by = "name"
    names = info.get("class_names", [])
    if not names and start.num_classes == net.num_classes:  # LightningDiT's file has no names
        by, names = "number", classes
    rows = {name: row for row, name in enumerate(names)}
    kept = [(label, rows[name]) for label, name in enumerate(classes) if name in rows]
    for label, row in kept:
        new_table[label] = old_table[row]
    if start.class_dropout_prob > 0 and net.class_dropout_prob > 0:
        new_table[-1] = old_table[-1]
    net.load_state_dict(old | {table: new_table})
    if rank_and_world()[0] == 0:
        print(
            f"starting from {path}, which has {len(kept)} of these {len(classes)} classes by {by}"
        )


@torch.no_grad()
def update_ema(ema, net, rate):
    """ema += rate * (net - ema); the rate of a skipped step is 0."""
    for average, weight in zip(ema.parameters(), net.parameters(), strict=True):
        average.lerp_(weight, rate)


# ---- Latents ----

# Images that are encoded together, at most. The rounding of the cache depends on this number.
AT_ONCE = 32


@torch.no_grad()
def encode(autoencoder, x):
    """Images (B, 3, S, S) -> the moments of their posteriors (B, 2C, h, w).

    In float32 (TF32 products on a GPU): the rounding of bfloat16 is a fifth of the posterior's std.
    """
    posteriors = [autoencoder.encode(part) for part in x.split(AT_ONCE)]
    return torch.cat([torch.cat([p.mean, p.logvar], 1) for p in posteriors])


def latent_statistics(args, images, load_moments, autoencoder):
    """Mean and unbiased std (C, 1, 1) per channel; a sample each of 10,000 random images, which are
    not flipped, as in LightningDiT."""
    rank, world = rank_and_world()
    n = len(images)
    seed = sample.seed_of(sample.STATISTICS, args.seed)
    picked = np.random.default_rng(seed).permutation(n)[:10000].tolist()
    parts = [picked[i : i + 100] for i in range(0, len(picked), 100)]
    mine = range(rank, len(parts), world)
    keys = [[(index, 0, False) for index in parts[k]] for k in mine]
    device = next(autoencoder.parameters()).device
    statistics = fid.Statistics(autoencoder.latent_dim, device)
    bar = tqdm(mine, "latent statistics", unit="batch", disable=rank > 0)
    for k, (moments, _) in zip(bar, load_moments(keys), strict=True):
        posterior = ae.Posterior(moments, autoencoder.deterministic)
        rng = generator(device, sample.STATISTICS, args.seed, 1, k)  # the key above ends in 0, 0
        noise = torch.randn(posterior.mean.shape, generator=rng, device=device)
        statistics.update(posterior.sample(noise).transpose(0, 1).flatten(1).T)  # (B * h * w, C)
    mean, covariance = statistics.finish()
    return mean.float().view(-1, 1, 1), covariance.diagonal().sqrt().float().view(-1, 1, 1)


SHARD = 8192  # images in a file of the cache


class Cache(torch.utils.data.Dataset):
    """The moments of every image and its flip, in 16 bit, read by index from memory-mapped files.

    Shards of 8,192 images: moments-00000.npy (n, 2, 2C, h, w), where [:, 1] are the flips', and
    labels-00000.npy (n,). It takes the place of Batches. Rounding to 16 bit moves a latent by less
    than 0.001 of its channel's std (rms) and the posterior's std by 0.1%. An image that cannot be
    read is replaced, and named, by the run that fills the cache.
    """

    def __init__(self, folder):
        self.folder = folder
        self.opened = {}  # moments and labels by number of the shard

    def shard(self, k):
        # Opened at first use, so that a loader process opens its own.
        if k not in self.opened:
            with fid.reading(f"shard {k} of {self.folder}"):
                moments = np.load(f"{self.folder}/moments-{k:05}.npy", mmap_mode="r")
                self.opened[k] = moments, np.load(f"{self.folder}/labels-{k:05}.npy")
        return self.opened[k]

    def __getitem__(self, keys):
        moments, labels = [], []
        for index, _epoch, flip in keys:
            of_shard, labels_of_shard = self.shard(index // SHARD)
            moments.append(of_shard[index % SHARD, int(flip)])
            labels.append(int(labels_of_shard[index % SHARD]))
        return torch.from_numpy(np.stack(moments)), torch.tensor(labels)


def fill_cache(args, dataset, autoencoder, device):
    """Write the shards that are missing; the processes take turns.

    Raises UserError if the folder has the latents of other images or of another encoder, and for
    moments beyond 16 bits.
    """
    rank, world = rank_and_world()
    images, n = dataset.images, len(dataset.images)
    if rank == 0:
        # Of 1.28 million files on a network disk, looking at each takes minutes.
        some = [] if images.digits else [images.path(n * i // 100) for i in range(min(n, 100))]
        sizes = [os.path.getsize(path) if os.path.exists(path) else 0 for path in some]
        record = {
            "format": 2,
            "autoencoder": ae.fingerprint(autoencoder.encoder_state()),
            "names": images.fingerprint(),
            "sizes": hashlib.sha256(str(sizes).encode()).hexdigest()[:16],  # in bytes
            "image_size": args.image_size,
            "precision": "float32" if args.device == "cpu" else "TF32",
        }
        sample.claim(args.cache, record)
    wait_for_all()

    shards = range(-(-n // SHARD))
    missing = [k for k in shards if not os.path.exists(f"{args.cache}/moments-{k:05}.npy")]
    wait_for_all()  # all have looked
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
            x, y = next(batches)
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
            with whole_file(f"{args.cache}/{name}-{k:05}.npy", sync=True) as file:
                np.save(file, np.concatenate(parts))
    bar.close()
    wait_for_all()


if __name__ == "__main__":
    fid.run_main(main)
