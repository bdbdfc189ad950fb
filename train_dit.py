"""Train a DiT on the latents of a frozen autoencoder (supplement, section B.2).

    python train_dit.py                                    the demo: digits, its VMAE's latents
    python train_dit.py --data DIR --ae vmae.pth           own images, the paper's settings
    torchrun --nproc_per_node=8 train_dit.py --data imagenet/train --ae vmae.pth --cache latents
    python train_dit.py --data DIR --resume                go on from the last checkpoint
    python train_dit.py --data DIR --init dit.pt           fine-tune a trained DiT

Writes ckpt.pt, which holds all that sample.py needs, log.jsonl and samples.png into --out.
"""

import copy
import functools
import hashlib
import json
import os

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import ae
import dit
import fid
from ae import SWITCH, UserError, at_least, fraction, rank_and_world, warn
from train_ae import (
    COMMON,
    Batches,
    Images,
    Run,
    count_flops,
    crop_and_flip,
    finished,
    generator,
    load_batches,
    new_parser,
    settle,
    training_order,
)

# ---- Recipes ----
#
# [S] supplement  [R] the authors' release and LightningDiT  [O] our choice

PAPER = COMMON | dict(
    ae="out/vmae-tuned/ckpt.pt",
    cache=None,
    init=None,
    out="out/dit",
    ckpt_every=5000,  # [O]
    keep_every=20_000,  # [R]
    model="DiT-B/1",  # [S]
    image_size=256,  # [S] pixels on a side, if the autoencoder's file does not say
    qk_norm=1,  # [S] RMSNorm of queries and keys
    class_dropout=0.1,  # [R] share of the labels replaced by the null class
    cosine_loss=False,  # [R] LightningDiT's default is True, the release's logs have it off
    steps=100_000,  # [S] 60,000 for a single class
    batch=1024,  # [S] images per optimiser step, over all processes
    micro_batch=32,  # [O] images per process at once, the rest is gradient accumulation
    lr=2e-4,  # [S]
    schedule="constant",  # [S]
    betas=[0.9, 0.95],  # [R] AdamW
    ema=0.9999,  # [R] decay of the average of the weights
    ema_warmup=0,  # [R] 1: a smaller decay at first, (1 + step) / (10 + step)
    sample_steps=dit.SAMPLING["steps"],
    cfg_scale=dit.SAMPLING["cfg_scale"],
    cfg_channels=dit.SAMPLING["cfg_channels"],
    cfg_start=dit.SAMPLING["cfg_start"],
    shift=dit.SAMPLING["shift"],
)
STEPS_OF_A_SINGLE_CLASS = 60_000  # [S] CelebA-HQ

# What the demo does otherwise, to take minutes on a laptop; all of it is our choice.
DEMO = PAPER | dict(
    ae="out/demo/vmae-tuned/ckpt.pt",
    cache="latents in --out",
    out="out/demo/dit",
    workers=0,
    log_every=50,
    ckpt_every=2000,
    keep_every=None,
    model="DiT-demo/1",
    image_size=32,
    steps=3000,
    batch=32,
    lr=3e-3,
    schedule="cosine",
    ema_warmup=1,  # the run is too short for a constant decay
    sample_steps=50,
    cfg_scale=1.75,
    cfg_channels=16,
)


def recipe_of(flags):
    """The settings in force with these flags, and whose they are, in words."""
    recipe = PAPER
    if "data" not in flags:
        recipe = DEMO | dict(cache=os.path.join(flags.get("out", DEMO["out"]), "latents"))
    if not os.path.exists(recipe["ae"]):  # its decoder is not tuned
        recipe = recipe | dict(ae=recipe["ae"].replace("vmae-tuned", "vmae"))
    return recipe, "train_dit.py"


# ---- Flags ----


def parse_args():
    """(args, checkpoint to resume or None)."""
    parser, add = new_parser(__doc__, {"": DEMO}, {"": PAPER})
    add("--ae", help="autoencoder's checkpoint; if its decoder is not tuned, the first stage's")
    add("--cache", help="folder for the moments of all images")
    add("--init", help="DiT to start from, of ours or LightningDiT's; ours brings its autoencoder")
    add("--out", help="folder for checkpoint, log and pictures")
    add("--ckpt_every", type=at_least(1), help="steps between checkpoints and pictures")

    add = parser.add_argument_group("model").add_argument
    add("--model", choices=list(dit.DiT_models), help="size of the network")
    add("--image_size", type=at_least(1), help="pixels on a side; if not given: the autoencoder's")
    add("--qk_norm", **SWITCH, help="RMSNorm of queries and keys")
    add("--class_dropout", type=fraction, help="share of the labels that are dropped")
    add("--cosine_loss", action="store_true", help="add LightningDiT's 1 - cos(velocity, target)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=at_least(1), help="optimiser steps; 60000 for a single class")
    add("--batch", type=at_least(1), help="images per optimiser step, over all processes")
    add("--micro_batch", type=at_least(1), help="images per process at once, at most")
    add("--lr", type=at_least(0.0), help="learning rate")
    add("--schedule", choices=("cosine", "constant"), help="of the learning rate")
    add("--betas", type=fraction, nargs=2, help="AdamW")
    add("--grad_clip", type=at_least(1e-9), help="largest norm of the gradients")
    add("--ema", type=fraction, help="decay of the average of the weights")
    add("--ema_warmup", **SWITCH, help="1: a smaller decay at first")

    add = parser.add_argument_group("sampling: samples.png and sample.py's defaults").add_argument
    add("--sample_steps", type=at_least(1), help="Euler steps")
    add("--cfg_scale", type=at_least(0.0), help="guidance scale, 1 is none")
    add("--cfg_channels", type=at_least(0), help="latent channels that are guided")
    add("--cfg_start", type=fraction, help="t from which guidance applies")
    add("--shift", type=at_least(1e-9), help="of the time grid, below 1 towards the noise")
    return settle(parser, recipe_of, "dit")


def main():
    try:
        train(*parse_args())
    except UserError as error:
        ae.exit_with(error)


# ---- Training ----


def train(args, ckpt):
    """Train a DiT, from the start or from the checkpoint ckpt."""
    # The images; a single class has no null class and no guidance.
    images = Images(args.data)
    num_classes = len(images.classes)

    # The DiT to start from. One of ours brings its settings, its autoencoder and the statistics of
    # its latents, unless --ae names another autoencoder.
    start, info, carried = None, {}, ckpt
    if args.init and not ckpt:
        start, info = dit.load(args.init)
        if info.get("kind") == "dit":
            for name in {"model", "qk_norm", "class_dropout"} - args.given:
                setattr(args, name, info["args"][name])
            if "ae" not in args.given:
                args.ae, carried = args.init, info
                if "image_size" not in args.given:
                    args.image_size = info["args"]["image_size"]
    if num_classes == 1 and not ckpt and "steps" not in args.given:
        args.steps = STEPS_OF_A_SINGLE_CLASS
    if num_classes == 1 or args.class_dropout == 0:
        if "cfg_scale" in args.given and args.cfg_scale > 1:
            raise UserError("--cfg_scale above 1 needs several classes and --class_dropout above 0")
        args.cfg_scale = 1.0
    if ckpt and finished(args, ckpt, images):
        return

    # The frozen autoencoder, and the shape of its latents.
    autoencoder = ae.from_checkpoint(carried["ae"]) if carried else ae.load(args.ae)
    if not carried and "image_size" not in args.given:
        args.image_size = autoencoder.image_size or args.image_size
        if args.data and args.image_size < PAPER["image_size"] and rank_and_world()[0] == 0:
            warn(
                f"the autoencoder was trained at {args.image_size} pixels, and so is the DiT; for "
                "the paper's 256 tune its decoder first: train_ae.py --tune_decoder"
            )
    args.latent_shape = list(autoencoder.latent_shape(args.image_size, args.image_size))
    run = Run(args)
    autoencoder.to(run.device).requires_grad_(False)

    # The network.
    torch.manual_seed(args.seed)  # weights start the same in every process
    config = {
        "input_size": args.latent_shape[1],
        "in_channels": args.latent_shape[0],
        "num_classes": num_classes,
        "qk_norm": bool(args.qk_norm),
        "class_dropout_prob": args.class_dropout,
    }
    net = dit.DiT_models[args.model](**config)
    if start:
        start_from(net, start, args.init, info.get("class_names"), images.classes)
    net.to(run.device)

    # Where posteriors come from: moments that a cache holds, or images that are encoded on the fly.
    dataset = Batches(images, functools.partial(crop_and_flip, args.image_size, not images.digits))
    posterior_of = functools.partial(encode, autoencoder, args.micro_batch)
    if args.cache:
        cache = Cache(args.cache, images)
        cache.claim(cache_source(images, autoencoder, args.image_size, run), run)
        cache.fill(posterior_of, dataset, run)
        dataset = cache
        posterior_of = functools.partial(ae.Posterior, deterministic=autoencoder.deterministic)
    if carried:
        latent_mean, latent_std = carried["latent_mean"], carried["latent_std"]
    else:
        latent_mean, latent_std = latent_statistics(dataset, posterior_of, len(images), run)
    latent_mean = latent_mean.to(run.device).view(-1, 1, 1)
    latent_std = latent_std.to(run.device).view(-1, 1, 1)

    # The average of the weights, the optimiser.
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.lr, args.betas, weight_decay=0, fused=True)
    if run.rank == 0:
        run.introduce(images, net, training_flops(net, args.latent_shape))
    run.begin(ckpt, model=net, ema=ema, optimizer=optimizer)
    del ckpt, start, info, carried
    if run.compiled:
        torch._dynamo.config.optimize_ddp = False  # as in train_ae.compile_for_training
        net.compile(dynamic=False)
    model = net
    if run.world > 1:
        model = DistributedDataParallel(net, gradient_as_bucket_view=True)

    order = training_order(args, len(images), run.slices, run.done)
    batches = load_batches(dataset, order, args.workers, run.device)
    first_step = run.done

    for step in range(first_step, args.steps):
        # Everything random is drawn for the global batch, and each micro-batch takes its rows: more
        # processes or smaller micro-batches change the speed, not the run.
        on_device = {"generator": run.generator(step), "device": run.device}
        posterior_noise = torch.randn(args.batch, *args.latent_shape, **on_device)
        noise = torch.randn(args.batch, *args.latent_shape, **on_device)
        t = torch.randn(args.batch, **on_device).sigmoid()
        dropped = torch.rand(args.batch, **on_device) < net.class_dropout_prob
        total = 0

        for rows in run.slices:
            x, y = next(batches)
            x1 = (posterior_of(x).sample(posterior_noise[rows]) - latent_mean) / latent_std
            y = torch.where(dropped[rows], num_classes, y)  # the null class
            if run.rank == 0 and step == first_step and rows == run.slices[0]:
                print(
                    f"normalised latents, first micro-batch: mean {x1.mean():.3f}, "
                    f"std {x1.std():.3f}"
                )
            # DDP averages gradients over the processes, once per step.
            model.require_backward_grad_sync = rows == run.slices[-1]

            with run.autocast():
                loss = dit.flow_loss(model, x1, y, noise[rows], t[rows], args.cosine_loss)
            (loss / len(run.slices)).backward()
            total = total + loss.detach() / len(run.slices)

        taken = run.update([optimizer], run.learning_rate(step), {"loss": total})
        decay = min(args.ema, (1 + step) / (10 + step)) if args.ema_warmup else args.ema
        update_ema(ema, net, taken * (1 - decay))

        run.listen()
        if run.save_due():
            run.save(
                kind="dit",
                dit_config={"name": args.model, **config},
                images=len(images),
                class_names=images.classes,
                latent_mean=latent_mean.flatten(),
                latent_std=latent_std.flatten(),
                ae={**autoencoder.recipe, "model": autoencoder.state_dict()},
            )
            run.draw(
                lambda: draw_samples(ema, autoencoder, latent_mean, latent_std, images.classes, run)
            )
        if run.ending:
            break
    run.finish("samples.png")


def start_from(net, start, path, their_classes, classes):
    """Give net the weights of start, the DiT in the file `path`.

    The embeddings of the classes are kept if the classes are the same, by name and order, or by
    number where the file has no names (None). Otherwise they start afresh, and only the null
    class's is kept. Raises UserError if the sizes differ.
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
    same = their_classes in (None, classes) and start.num_classes == net.num_classes
    if same:
        new_table[: net.num_classes] = old_table[: net.num_classes]
    if start.class_dropout_prob > 0 and net.class_dropout_prob > 0:
        new_table[-1] = old_table[-1]
    net.load_state_dict(old | {table: new_table})
    if rank_and_world()[0] == 0:
        print(
            f"starting from {path}, "
            + ("its classes are these" if same else "with new embeddings for other classes")
        )


@torch.no_grad()
def update_ema(ema, net, rate):
    """ema += rate * (net - ema); the rate of a skipped step is 0."""
    for average, weight in zip(ema.parameters(), net.parameters(), strict=True):
        average.lerp_(weight, rate)


@torch.no_grad()
def encode(autoencoder, micro_batch, x):
    """Images (B, 3, S, S) -> the posterior of their latents, micro_batch images at once.

    In float32 (TF32 products on a GPU): bfloat16 would cost as much of the latents' std as the
    posterior's own.
    """
    posteriors = [autoencoder.encode(part) for part in x.split(micro_batch)]
    moments = torch.cat([torch.cat([p.mean, p.logvar], 1) for p in posteriors])
    return ae.Posterior(moments, autoencoder.deterministic)


def training_flops(net, latent_shape):
    """FLOPs of forward and backward pass for one image."""
    net = copy.deepcopy(net).to("meta")  # where nothing is computed

    def forward_and_backward():
        x1, noise = (torch.zeros(1, *latent_shape, device="meta") for _ in range(2))
        y, t = torch.zeros(1, dtype=torch.long, device="meta"), torch.zeros(1, device="meta")
        dit.flow_loss(net, x1, y, noise, t).backward()

    return count_flops(forward_and_backward)


@torch.no_grad()
def draw_samples(ema, autoencoder, latent_mean, latent_std, class_names, run):
    """samples.png: a row for each of (at most) ten classes, drawn with the EMA weights."""
    args, columns = run.args, 8
    num_rows = min(10, ema.num_classes)
    classes = np.arange(num_rows) * ema.num_classes // num_rows
    y = torch.tensor(classes).repeat_interleave(columns)
    noise = torch.randn(len(y), *args.latent_shape, generator=generator("cpu", args.seed))
    settings = {name: getattr(args, name) for name in dit.SAMPLING if name != "steps"}

    images = []
    # Guidance doubles the batch.
    at_once = max(1, args.micro_batch // 2)
    for some_noise, some_y in zip(noise.split(at_once), y.split(at_once), strict=True):
        some_noise, some_y = some_noise.to(run.device), some_y.to(run.device)
        z = dit.sample(ema, some_noise, some_y, steps=args.sample_steps, **settings)
        for part in (z * latent_std + latent_mean).split(8):
            images.append(ae.to_uint8(autoencoder.decode(part)))
    images = np.concatenate(images)
    rows = images.reshape(num_rows, columns, *images.shape[1:])
    ae.save_grid(os.path.join(args.out, "samples.png"), rows, [class_names[c] for c in classes])


# ---- Latents ----


class Cache:
    """The moments of every image and its flip, in 16 bit, read by index from memory-mapped files.

    Shards of 4,096 images: moments-00000.npy (n, 2, 2C, h, w), where [:, 1] are the flips', and
    labels-00000.npy (n,). It takes the place of Batches. Rounding to 16 bit moves a latent by less
    than 0.001 of its channel's std (rms) and the posterior's std by 0.1%.
    """

    shard = 4096
    most_open = 500  # files of moments; a process may not open many, ImageNet has 313
    limit = 0  # unreadable images were replaced when the cache was written

    def __init__(self, folder, images):
        self.folder, self.images = folder, images
        self.opened, self.labels = {}, {}  # arrays by number of the shard

    def path(self, kind, k):
        return os.path.join(self.folder, f"{kind}-{k:05}.npy")

    def moments_of(self, k):
        if k not in self.opened:
            if len(self.opened) >= self.most_open:
                del self.opened[next(iter(self.opened))]
            self.opened[k] = np.load(self.path("moments", k), mmap_mode="r")
        return self.opened[k]

    def labels_of(self, k):
        if k not in self.labels:
            self.labels[k] = np.load(self.path("labels", k))
        return self.labels[k]

    def __getitem__(self, keys):
        moments, labels = [], []
        for index, _epoch, flip in keys:
            k, row = divmod(index, self.shard)
            flipped = int(flip and not self.images.digits)  # digits never are
            moments.append(self.moments_of(k)[row, flipped])
            labels.append(int(self.labels_of(k)[row]))
        return torch.from_numpy(np.stack(moments)), torch.tensor(labels), []

    def fill(self, posterior_of, dataset, run):
        """Write the shards that are missing; the processes take turns.

        posterior_of: images -> their posteriors. Raises UserError for moments beyond 16 bits.
        """
        n = len(self.images)
        size = run.args.micro_batch
        missing = [
            k for k in range(-(-n // self.shard)) if not os.path.exists(self.path("moments", k))
        ][run.rank :: run.world]
        if run.world > 1:
            dist.barrier()  # all have looked
        shards = {k: range(k * self.shard, min(n, (k + 1) * self.shard)) for k in missing}
        keys = [
            [(index, 0, False) for index in shard[j : j + size]]
            for shard in shards.values()
            for j in range(0, len(shard), size)
        ]
        batches = load_batches(dataset, keys, run.args.workers, run.device)
        bar = tqdm(total=len(keys), desc="latents", unit="batch", disable=run.rank > 0 or not keys)
        for k, shard in shards.items():
            moments, labels = [], []
            while sum(map(len, labels)) < len(shard):
                x, y = next(batches)
                pair = [posterior_of(x), posterior_of(x.flip(-1))]
                pair = [torch.cat([p.mean, p.logvar], 1) for p in pair]
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
            for kind, parts in (("labels", labels), ("moments", moments)):
                with ae.whole_file(self.path(kind, k)) as file:
                    np.save(file, np.concatenate(parts))
        bar.close()
        if run.world > 1:
            dist.barrier()

    def claim(self, source, run):
        """Make the folder, or check that it was made from the same source; rank 0 does.

        source: a dict of plain values. Raises UserError for a folder made from another source.
        """
        if run.rank == 0:
            self.claim_by_rank_0(source)
        if run.world > 1:
            dist.barrier()

    def claim_by_rank_0(self, source):
        path = os.path.join(self.folder, "source.json")
        if not os.path.exists(path):
            if os.path.isfile(self.folder) or (
                os.path.exists(self.folder) and set(os.listdir(self.folder)) - {"source.json.tmp"}
            ):
                raise UserError(
                    f"--cache {self.folder} exists and is no latent cache: choose another folder"
                )
            ae.make_folder(self.folder)
            with ae.whole_file(path) as file:
                file.write(json.dumps(source, indent=1).encode())
        with open(path) as file:
            found = json.load(file)
        for name, value in source.items():
            if found.get(name) != value:
                raise UserError(
                    f"--cache {self.folder} is of other latents, its {name} is {found.get(name)} "
                    f"and not {value}: choose another folder"
                )


def cache_source(images, autoencoder, image_size, run):
    """What makes a cache valid: the autoencoder's weights, the files, the size, the precision.

    The files by path within the folder, size and time of modification. Only rank 0 asks for it.
    """
    if run.rank > 0:
        return None
    weights = hashlib.sha256()
    for name, tensor in sorted(autoencoder.state_dict().items()):
        weights.update(name.encode() + tensor.cpu().numpy().tobytes())
    listing = ["digits"]
    if not images.digits:
        listing = []
        for file in images.files:
            status = os.stat(file)
            name = os.path.relpath(file, images.folder)
            listing.append(f"{name} {status.st_size} {status.st_mtime_ns}")
    return {
        "autoencoder": weights.hexdigest()[:16],
        "images": hashlib.sha256(os.fsencode("\n".join(listing))).hexdigest()[:16],
        "image_size": image_size,
        "precision": "float32" if run.device == "cpu" else "TF32",
    }


def latent_statistics(dataset, posterior_of, n, run):
    """Mean and unbiased std (C,) per channel; a sample each of 10,000 random images, unflipped."""
    picked = np.random.default_rng((run.args.seed, n)).permutation(n)[:10000].tolist()
    chunks = [picked[i : i + 100] for i in range(0, len(picked), 100)]
    mine = range(run.rank, len(chunks), run.world)
    keys = [[(index, 0, False) for index in chunks[k]] for k in mine]
    sums = torch.zeros(3, run.args.latent_shape[0], dtype=torch.float64, device=run.device)
    batches = load_batches(dataset, keys, run.args.workers, run.device)
    mine = tqdm(mine, "latent statistics", unit="batch", disable=run.rank > 0)
    for k, (x, _) in zip(mine, batches, strict=True):
        posterior = posterior_of(x)
        draw = run.generator(k, 2)
        noise = torch.randn(posterior.mean.shape, device=run.device, generator=draw)
        sums += fid.power_sums(posterior.sample(noise).transpose(0, 1).flatten(1))  # (C, B * h * w)
    if run.world > 1:
        dist.all_reduce(sums)
    count, total, squares = sums
    mean = total / count
    return mean.float(), ((squares - count * mean.square()) / (count - 1)).sqrt().float()


if __name__ == "__main__":
    main()
