"""Train a DiT on the latents of a frozen autoencoder (supplement, section B.2).

    python train_dit.py                                    the demo: digits, its VMAE's latents
    python train_dit.py --data DIR --ae out/vmae/ckpt.pt   own images, the paper's settings
    torchrun --nproc_per_node=8 train_dit.py --data imagenet/train --ae vmae.pth --cache latents
    python train_dit.py --data DIR --resume                go on from the last checkpoint

Writes ckpt.pt, which holds all that sample.py needs, log.jsonl and samples.png into --out.
"""

import copy
import functools
import hashlib
import json
import os
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.functional import pil_to_tensor

import ae
import dit
from ae import or_exit
from train_ae import (BATCH, CLIP, MICRO_BATCH, RUN, Batches, Images, Run, betas, center_crop, count,
                      finished, generator, introduce, load_batches, micro_batches, natural, on, one_of,
                      parse_args, place, positive, power_sums, schedule, setup, share, switch, training_keys,
                      weight)

# As in train_ae.py. Sources: S supplement, R the authors' release and LightningDiT, O our choice.
FLAGS = {
    "run": [
        *RUN,
        ("ae", place, "out/demo/vmae/ckpt.pt", "out/vmae/ckpt.pt", "checkpoint of the autoencoder"),
        ("cache", place, "{out}/latents", None, "folder for all images' moments; none: encode on the fly"),
        ("out", place, "out/demo/dit", "out/dit", "folder for checkpoint, log and pictures"),
        ("ckpt_every", count, 2000, 5000, "steps between checkpoints and pictures"),
    ],
    "model": [
        ("model", one_of(*dit.DiT_models), "DiT-demo/1", "DiT-B/1", "size of the network, S"),
        ("image_size", count, 32, 256, "pixels a side, S; default: those the autoencoder was trained at"),
        ("qk_norm", switch, 1, "1 or 0, RMSNorm of queries and keys, S"),
        ("class_dropout", share, 0.1, "share of labels dropped, of a single class none, R"),
        ("cosine_loss", on, False, "add LightningDiT's 1 - cos(velocity, target) over channels"),
    ],
    "optimisation": [
        ("steps", count, 3300, 100000, "optimiser steps, of a single class 60000 by default, S"),
        ("batch", count, 32, 1024, BATCH),
        ("micro_batch", count, 32, MICRO_BATCH),
        ("lr", weight, 3e-3, 2e-4, "learning rate, S"),
        ("schedule", one_of("cosine", "constant"), "cosine", "constant", "of the learning rate, S"),
        ("betas", betas, [0.9, 0.95], "AdamW, R"),
        CLIP,
        ("ema", share, 0.9999, "decay of the average of weights at the end of its warm-up, R"),
    ],
    "sampling, for samples.png and as defaults of sample.py": [
        ("sample_steps", count, 100, 250, "Euler steps, S"),
        ("cfg_scale", weight, 1.3, 10.0, "guidance; 1, none, with a single class, R"),
        ("cfg_channels", natural, 16, 3, "latent channels that are guided, the first ones, R"),
        ("cfg_start", share, 0.1, "time from which on they are, R"),
        ("shift", positive, 0.3, "of the time grid, below 1 towards the noise, R"),
    ],
}

class Cache:
    """The moments of every image and its flip, in 16 bit, read by index from memory-mapped files.

    Shards of 4,096 images: moments-00000.npy (n, 2, 2C, h, w), [:, 1] the flips', and labels-00000.npy (n,).
    """
    shard = 4096
    limit = 0   # of images that may be unreadable: they were replaced when it was written

    def __init__(self, folder, images):
        self.folder, self.images = folder, images
    def path(self, kind, k):
        return os.path.join(self.folder, f"{kind}-{k:05}.npy")
    @functools.lru_cache(None)
    def open(self, kind, k):
        return np.load(self.path(kind, k), mmap_mode="r" if kind == "moments" else None)
    def __getitem__(self, keys):
        flipped = not self.images.digits   # digits never are
        places = [(index // self.shard, index % self.shard, int(flip and flipped)) for index, _, flip in keys]
        moments = np.stack([self.open("moments", k)[row, flip] for k, row, flip in places])
        labels = [int(self.open("labels", k)[row]) for k, row, _ in places]
        return torch.from_numpy(moments), torch.tensor(labels), []
    def fill(self, source, encode, dataset, args, rank, world):
        """Write the shards that are missing, every world-th one; refuse a folder made from another source."""
        path = os.path.join(self.folder, "source.json")
        if rank == 0 and os.path.exists(self.folder) and not os.path.exists(path):
            if os.path.isfile(self.folder) or set(os.listdir(self.folder)) - {"source.json.tmp"}:
                sys.exit(f"--cache {self.folder} exists and is no latent cache: choose another folder")
        or_exit(os.makedirs, self.folder, exist_ok=True)
        n = len(self.images)
        missing = [k for k in range(-(-n // self.shard)) if not os.path.exists(self.path("moments", k))]
        missing = missing[rank::world]
        if rank == 0 and not os.path.exists(path):
            with ae.whole_file(path) as file:
                file.write(json.dumps(source, indent=1).encode())
        if world > 1:
            dist.barrier()
        with open(path) as file:
            found = json.load(file)
        for name, value in source.items():
            if found.get(name) != value:
                sys.exit(f"--cache {self.folder} was made with another {name}, {found.get(name)} and not "
                         f"{value}: choose another folder")
        rows = {k: range(k * self.shard, min(n, (k + 1) * self.shard)) for k in missing}
        keys = [[(i, 0, False) for i in rows[k][j:j + 64]]
                for k in missing for j in range(0, len(rows[k]), 64)]
        batches = load_batches(dataset, keys, args)
        for done, k in enumerate(missing):
            moments, labels = [], []
            while sum(map(len, labels)) < len(rows[k]):
                x, y = next(batches)
                pair = [encode(x), encode(x.flip(-1))]
                pair = torch.stack([torch.cat([p.mean, p.logvar], 1) for p in pair], 1)
                moments.append(pair.half().cpu().numpy())
                labels.append(y.cpu().numpy())
            for kind, parts in (("labels", labels), ("moments", moments)):   # moments last: they mark it done
                with ae.whole_file(self.path(kind, k)) as file:
                    np.save(file, np.concatenate(parts))
            print(f"cached shard {done + 1} of {len(missing)} (rank {rank})", flush=True)
        if world > 1:
            dist.barrier()

def crop_and_flip(size, mirror, image, index, epoch, flip):
    """The transform of Batches: flipped after the crop, where mirror is True and the key says so."""
    pixels = pil_to_tensor(center_crop(image, size))
    return pixels.flip(-1) if flip and mirror else pixels

def cache_source(args, images, autoencoder):
    """What makes a cache valid: the autoencoder's weights, the files, the size."""
    weights = hashlib.sha256()
    for name, tensor in sorted(autoencoder.state_dict().items()):
        weights.update(name.encode() + tensor.cpu().numpy().tobytes())
    listing = "digits" if images.digits else "\n".join(images.files)
    return {"autoencoder": weights.hexdigest()[:16], "folder": args.data and os.path.realpath(args.data),
            "files": hashlib.sha256(os.fsencode(listing)).hexdigest()[:16], "image_size": args.image_size}

def latent_statistics(dataset, encode, args, n, rank, world):
    """Mean and unbiased std per channel, (C,) each, of one sample of 10,000 random unflipped images."""
    picked = np.random.default_rng((args.seed, n)).permutation(n)[:10000]
    chunks = [picked[i:i + 100] for i in range(0, len(picked), 100)]
    keys = [[(int(i), 0, False) for i in chunk] for chunk in chunks[rank::world]]
    sums = torch.zeros(3, args.latent_shape[0], dtype=torch.float64, device=args.device)
    for k, (x, _) in enumerate(load_batches(dataset, keys, args)):
        posterior = encode(x)
        noise = torch.randn(posterior.mean.shape, device=x.device,
                            generator=generator(args.device, args.seed, rank + k * world, 2))
        sums += power_sums(posterior.sample(noise).transpose(0, 1).flatten(1))   # of (C, B * h * w)
    if world > 1:
        dist.all_reduce(sums)
    n, total, squares = sums
    mean = total / n
    return mean.float(), ((squares - n * mean.square()) / (n - 1)).sqrt().float()

@torch.no_grad()
def draw_samples(ema, autoencoder, latent_mean, latent_std, args, class_names):
    """samples.png: a row for each of (at most) ten classes, drawn with the EMA weights."""
    rows = min(10, ema.num_classes)
    classes = np.arange(rows) * ema.num_classes // rows
    y = torch.tensor(classes, device=args.device).repeat_interleave(8)
    noise = torch.randn(len(y), *args.latent_shape, generator=generator("cpu", args.seed)).to(args.device)
    z = dit.sample(ema, noise, y, args.sample_steps, args.cfg_scale, args.cfg_channels, args.cfg_start,
                   args.shift)
    images = [ae.to_uint8(autoencoder.decode(part)) for part in (z * latent_std + latent_mean).split(8)]
    images = np.concatenate(images)
    ae.save_grid(os.path.join(args.out, "samples.png"), images.reshape(rows, 8, *images.shape[1:]),
                 [class_names[c] for c in classes])

def main():
    args, ckpt = parse_args(__doc__, FLAGS, "dit")
    rank, world = setup(args)
    images = Images(args.data)
    n, num_classes = len(images), len(images.classes)
    if num_classes == 1 and not ckpt and "steps" not in args.given:
        args.steps = 60000
    if num_classes == 1 or args.class_dropout == 0:   # no null class, no guidance
        if "cfg_scale" in args.given and args.cfg_scale > 1:
            sys.exit("--cfg_scale above 1 needs several classes and --class_dropout above 0")
        args.cfg_scale = 1.0
    if ckpt and finished(args, ckpt, images):
        return

    autoencoder = or_exit(ae.from_checkpoint, ckpt["ae"]) if ckpt else or_exit(ae.load, args.ae)
    autoencoder = autoencoder.to(args.device).requires_grad_(False)
    if not ckpt and "image_size" not in args.given:
        args.image_size = autoencoder.image_size or args.image_size
    autocast = functools.partial(torch.autocast, args.device.split(":")[0], torch.bfloat16,
                                 enabled=args.autocast)

    @torch.no_grad()
    def encode(x):
        with autocast():
            return autoencoder.encode(x)

    probe = or_exit(encode, torch.zeros(1, 3, args.image_size, args.image_size, device=args.device))
    args.latent_shape = list(probe.mean.shape[1:])
    dataset = Batches(images, functools.partial(crop_and_flip, args.image_size, not images.digits))
    if args.cache:
        cache = Cache(args.cache, images)
        or_exit(cache.fill, cache_source(args, images, autoencoder), encode, dataset, args, rank, world)
        dataset = cache

        def encode(x):   # what is read are moments
            return ae.Posterior(x, autoencoder.deterministic)
    if ckpt:
        latent_mean, latent_std = ckpt["latent_mean"].to(args.device), ckpt["latent_std"].to(args.device)
    else:
        latent_mean, latent_std = latent_statistics(dataset, encode, args, n, rank, world)
    latent_mean, latent_std = latent_mean.view(-1, 1, 1), latent_std.view(-1, 1, 1)

    torch.manual_seed(args.seed)   # weights start the same on every rank
    config = {"input_size": args.latent_shape[1], "in_channels": args.latent_shape[0],
              "num_classes": num_classes, "qk_norm": bool(args.qk_norm),
              "class_dropout_prob": args.class_dropout}
    net = dit.DiT_models[args.model](**config).to(args.device)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], args.lr, args.betas,
                                  weight_decay=0, fused=True)
    run = Run(args, rank, world, ckpt, model=net, ema=ema, optimizer=optimizer)
    del ckpt
    if args.compiled:
        net.compile()
    model = DistributedDataParallel(net, gradient_as_bucket_view=True) if world > 1 else net
    if rank == 0:
        introduce(args, images, world, net, torch.zeros(1, *args.latent_shape), torch.zeros(1),
                  torch.zeros(1, dtype=torch.long))

    batches = load_batches(dataset, training_keys(args, n, rank, world, run.done), args)
    first, slices = run.done, micro_batches(args, rank, world)
    for step in range(first, args.steps):
        # the global batch's random numbers, of which each micro-batch takes its rows
        draw = generator(args.device, args.seed, step)
        shape = (args.batch, *args.latent_shape)
        posterior_noise = torch.randn(shape, generator=draw, device=args.device)
        noise = torch.randn(shape, generator=draw, device=args.device)
        t = torch.randn(args.batch, generator=draw, device=args.device).sigmoid()
        dropped = torch.rand(args.batch, generator=draw, device=args.device) < net.class_dropout_prob
        total = 0
        for rows in slices:
            x, y = next(batches)
            x1 = (encode(x).sample(posterior_noise[rows]) - latent_mean) / latent_std
            y = torch.where(dropped[rows], num_classes, y)   # the null class
            if rank == 0 and step == first and rows == slices[0]:
                print(f"normalised latents, first micro-batch: mean {x1.mean():.3f}, std {x1.std():.3f}")
            model.require_backward_grad_sync = rows == slices[-1]   # gradients travel once a step
            with autocast():
                loss = dit.flow_loss(model, x1, y, noise[rows], t[rows], args.cosine_loss)
            (loss / len(slices)).backward()
            total = total + loss.detach() / len(slices)
        counts = run.step({"loss": total}, [optimizer], schedule(args, step, 0))
        rate = counts * (1 - min(args.ema, (1 + step) / (10 + step)))
        with torch.no_grad():
            for average, weight_now in zip(ema.parameters(), net.parameters()):
                average.lerp_(weight_now, rate)
        if run.due():
            run.save(lambda: draw_samples(ema, autoencoder, latent_mean, latent_std, args, images.classes),
                     kind="dit", dit_config={"name": args.model, **config}, images=n,
                     class_names=images.classes, latent_mean=latent_mean.flatten(),
                     latent_std=latent_std.flatten(),
                     ae={**autoencoder.recipe, "model": autoencoder.state_dict()})
        if run.ending:
            break
    run.finish("samples.png")

if __name__ == "__main__":
    main()
