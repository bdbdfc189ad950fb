"""Train an autoencoder (supplement, section B.1).

    python train_ae.py                                          the demo: a VMAE on digits
    python train_ae.py --tune_decoder                           its last stage
    python train_ae.py --model sdvae                            the demo with another autoencoder
    python train_ae.py --data DIR                               own images, the paper's settings
    torchrun --nproc_per_node=8 train_ae.py --model vmae --data imagenet/train
    python train_ae.py --data DIR --resume                      go on with that run
    python train_ae.py --eval --ckpt A.pt B.pt --data VAL       judge autoencoders

Training writes ckpt.pt, log.jsonl and recon.png (originals above reconstructions) into --out,
--eval writes eval.json and a picture of each autoencoder. Which flags there are depends on the
model: see python train_ae.py --model sdvae --data DIR --help.
"""

import copy
import fcntl
import functools
import hashlib
import json
import math
import multiprocessing.queues
import os
import re
import signal
import sys
import time
import unicodedata
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as transforms
from tqdm import tqdm

import ae
import fid
import sample
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
from sample import generator, to_uint8

# ---- Recipes: how each autoencoder is trained ----
#
# [S] supplement  [R] the authors' release  [V] VQGAN and latent diffusion  [O] our choice
# What a recipe does not set, sizes of the network and weights of its terms, has the default of its
# class in ae.py.

CONV = dict(  # AE, DAE, VAE
    image_size=256,  # [O] pixels on a side
    epochs=20,  # [O]
    warmup=1,  # [O] epochs in which the learning rate rises from 0
    schedule="cosine",  # [O] of the learning rate after the warm-up
    decay_epochs=None,  # [O] the epoch at which the cosine reaches 0; None: the run's last
    batch=2048,  # [S] images per optimiser step, over all processes
    micro_batch=16,  # [O] images per process at once, the rest is gradient accumulation
    base_lr=1e-5,  # [S] learning rate at batch 256, scaled with the batch [R]
    betas=[0.9, 0.95],  # [O] AdamW
    weight_decay=0.0,  # [O] AdamW
    ckpt_every=200,  # [O] steps, each of which takes some seconds
)
VIT = dict(  # VMAE; that MAE is trained in the same way is our choice
    image_size=128,  # [R] pixels on a side; --tune_decoder goes on at 256
    # [R] The release goes on from checkpoint-90, which is written after 91 epochs. A comment there
    # speaks of 400, the name of a file of 200.
    epochs=91,
    warmup=10,  # [R] epochs in which the learning rate rises from 0
    schedule="cosine",  # [R] half of one, to 0, after the warm-up
    decay_epochs=400,  # [R] at which it would be 0
    batch=2048,  # [S] images per optimiser step, over all processes
    # [O] images per process at once. None: 256 at up to 128 pixels, fewer at more
    micro_batch=None,
    base_lr=1e-4,  # [S] learning rate at batch 256, scaled with the batch [R]: here 8e-4
    betas=[0.9, 0.95],  # [R] AdamW
    weight_decay=0.05,  # [R] of all but biases and norms
    ckpt_every=500,  # [O]
    # Further differences of the release: it trains in float16, has LPIPS in training mode, so that
    # its dropout acts, and judges smoothness with the latents' std over the training images.
)
SDVAE = dict(
    image_size=256,  # [O]
    epochs=20,  # [O]
    warmup=1,  # [O]
    schedule="constant",  # [O]
    decay_epochs=None,
    batch=256,  # [S]
    micro_batch=8,  # [O]
    base_lr=1e-5,  # [S] a tenth of VA-VAE's
    betas=[0.5, 0.9],  # [V]
    weight_decay=0.0,  # [V]
    disc_weight=0.5,  # [V] lambda_D of eq. 6, times the adaptive weight
    # [V] First step with the adversarial term: latent diffusion's, the middle of our run. VA-VAE's
    # 5,001 counts the steps of both players and belongs to ten times our learning rate, without
    # warm-up; here it would be the end of the warm-up.
    disc_start=50_001,
    disc_loss="hinge",  # [V] eq. 6 writes "vanilla"
    ckpt_every=200,  # [O]
)
# VMAE's last stage, --tune_decoder: MSE + LPIPS of the posterior mean's reconstruction.
TUNE = dict(
    init="out/vmae/ckpt.pt",  # [R] the end of the first stage; a file of any step will do
    out="out/vmae-tuned",
    freeze_encoder=1,  # [O] the release's comment says so, its script trains the encoder too
    image_size=256,  # [R]
    mask_ratio=0.0,  # [R]
    visible=1.0,  # [R] weight of the MSE
    kl=0.0,  # [R] the decoder is tuned on the posterior's mean
    lpips=10.0,  # [R]
    epochs=10,  # [R]
    warmup=0,  # [R]
    schedule="cosine",  # [R]
    decay_epochs=None,  # [R]
    batch=2048,  # [R]
    micro_batch=32,  # [O]
    base_lr=1e-5,  # [R]
    betas=[0.9, 0.95],  # [R]
    weight_decay=0.05,  # [R]
    ckpt_every=500,  # [O]
)

# What the demo changes, to take minutes on a laptop; all of it is our choice.
DEMO_CONV = dict(
    image_size=32,
    channels=[32, 32, 64, 64],
    lpips=0.0,  # digits need no VGG16
    epochs=4,
    schedule="cosine",
    batch=32,
    micro_batch=32,
    base_lr=8e-3,  # 1e-3 at this batch
    betas=[0.9, 0.95],
)
DEMO_VIT = dict(
    image_size=32,
    hidden_size=96,
    depth=3,
    decoder_depth=3,
    num_heads=4,
    lpips=0.0,
    epochs=10,
    warmup=1,
    decay_epochs=None,
    batch=32,  # many small steps: at 64 the digits are blurred
    base_lr=16e-3,
    weight_decay=0.0,
)
# The discriminator joins for the last fifth of the run: earlier, it undoes what so short a run has
# learned. What was tried is in tests/RESULTS.md.
DEMO_SDVAE = DEMO_CONV | dict(base_lr=16e-3, betas=[0.5, 0.9], disc_start=451)
DEMO_TUNE = dict(
    init="out/demo/vmae/ckpt.pt",
    out="out/demo/vmae-tuned",
    image_size=32,
    lpips=0.0,
    epochs=5,
    batch=32,
    base_lr=16e-3,
    weight_decay=0.0,
)

RECIPES = {  # for each model its recipe, and what the demo changes
    "ae": (CONV, DEMO_CONV),
    "dae": (CONV, DEMO_CONV),
    "vae": (CONV, DEMO_CONV),
    "sdvae": (SDVAE, DEMO_SDVAE),
    "mae": (VIT, DEMO_VIT),
    "vmae": (VIT, DEMO_VIT),
    "tune": (TUNE, DEMO_TUNE),
}

# Settings that fix the shapes of the weights, or their meaning. A checkpoint to start from or to go
# on with brings its own. (Not image_size: a ViT's position tables are resized.)
SIZES = (
    *("channels", "latent_dim", "quant_conv"),
    *("patch_size", "hidden_size", "depth", "decoder_depth", "num_heads"),
)


# ---- Flags ----


def parse_args():
    """The settings: what the flags say, else the demo, the recipe, the class, in this order.

    A checkpoint to start from or to go on with brings the network's sizes; flags that contradict
    them are refused.
    """
    # Some flags choose the defaults of others, so the command line is read twice.
    first = new_parser(add_help=False)
    add = first.add_argument
    add("--model", choices=list(ae.MODELS), default="vmae", help="which autoencoder")
    add("--tune_decoder", action="store_true", help="VMAE's last stage, of the network in --init")
    add("--eval", action="store_true", help="judge autoencoders, see --eval --help")
    add_run_flags(first)
    chosen, rest = first.parse_known_args()
    if chosen.eval:
        return parse_eval_args()
    if chosen.tune_decoder and chosen.model != "vmae":
        first.error("--tune_decoder is VMAE's last stage: it goes with --model vmae")

    # One dict of defaults.
    settings = ae.settings_of(ae.MODELS[chosen.model])
    recipe, demo = RECIPES["tune" if chosen.tune_decoder else chosen.model]
    settings |= {"out": os.path.join("out", chosen.model)} | recipe
    if chosen.data is None:
        settings |= {"out": os.path.join("out/demo", chosen.model)} | demo
    source, sizes = source_of_sizes(chosen, settings, rest), {}
    if source:
        start = load_start(source, chosen)
        sizes = ae.settings_of(type(start)) | start.args
        sizes = {name: sizes[name] for name in SIZES if name in sizes and name in settings}

    parser = new_parser(__doc__, parents=[first])
    length = parser.add_mutually_exclusive_group().add_argument
    length("--epochs", type=number(float, 1e-9), help="length of the run")
    length("--steps", type=number(int, 1), help="the same in optimiser steps")

    def setting(flag, **options):
        """Add a flag, if the model has the setting."""
        if flag.removeprefix("--") in settings:
            parser.add_argument(flag, **options)

    # the model
    setting("--image_size", type=number(int, 16), help="pixels on a side")
    setting("--latent_dim", type=number(int, 1), help="channels of the latent")
    setting("--channels", type=number(int, 1), nargs="+", help="widths of the levels")
    setting("--quant_conv", **SWITCH, help="1: the 1x1 convolutions of Stable Diffusion 1 and XL")
    setting("--patch_size", type=number(int, 1), help="pixels on a side of a token")
    setting("--hidden_size", type=number(int, 1), help="width of the ViT")
    setting("--depth", type=number(int, 1), help="encoder blocks")
    setting("--decoder_depth", type=number(int, 1), help="decoder blocks")
    setting("--num_heads", type=number(int, 1), help="attention heads")
    # the objective
    setting("--freeze_encoder", **SWITCH, help="0: train the encoder too")
    setting("--mask_ratio", type=number(float, 0, 1), help="share of the tokens that are masked")
    setting("--recon", choices=("mse", "l1"), help="reconstruction term: eq. 3's or VQGAN's")
    setting("--noise_std", type=number(float, 0), help="std of the corruption, eq. 4")
    setting("--visible", type=number(float, 0), help="weight of the visible patches' MSE")
    setting("--masked", type=number(float, 0), help="weight of the masked patches' MSE")
    setting("--kl", type=number(float, 0), help="weight of the KL")
    setting("--prior_std", type=number(float, 1e-9), help="std that the KL pulls towards")
    setting("--lpips", type=number(float, 0), help="weight of LPIPS; above 0 it needs VGG16")
    setting("--disc_weight", type=number(float, 0), help="lambda_D, times the adaptive weight")
    setting("--disc_start", type=number(int, 1), help="first step with the adversarial term")
    setting("--disc_loss", choices=("hinge", "vanilla"), help="D's loss: VQGAN's or eq. 6's")
    # the optimiser
    setting("--warmup", type=number(float, 0), help="epochs of a learning rate that rises from 0")
    ends = "epochs until the cosine reaches 0, at least the run's; None: the run's"
    setting("--decay_epochs", type=number(float, 1e-9), help=ends)
    setting("--base_lr", type=number(float, 0), help="learning rate at batch 256")
    setting("--weight_decay", type=number(float, 0), help="AdamW, of all but biases and norms")
    args = parse_flags(parser, settings, sizes, source)
    if args.tune_decoder:
        # A DiT on the tuned autoencoder goes on drawing from the first stage's posterior.
        args.deterministic = start.deterministic
    return args


def load_start(path, chosen):
    """The autoencoder in a checkpoint that brings the sizes of the network."""
    if chosen.tune_decoder and not os.path.exists(path):
        data = f" --data {chosen.data}" if chosen.data else ""
        raise UserError(
            f"--tune_decoder goes on with the first stage, and there is none in {path}: train it "
            f"(train_ae.py{data}), or name its checkpoint with --init"
        )
    start = ae.load(path)
    if chosen.tune_decoder and start.args["model"] != "vmae":
        raise UserError(f"--tune_decoder is VMAE's last stage, {path} is of another model")
    if start.vit != ae.MODELS[chosen.model].vit:
        raise UserError(f"{path} is of another kind of model: {start.args['model']}")
    return start


def main():
    args = parse_args()
    if args.eval:
        evaluate(args)
    else:
        train(args)
    fid.leave_processes()


# ---- Training ----


def train(args):
    """Train an autoencoder: from scratch, from the weights in --init, or, with --resume, from the
    checkpoint in --out."""
    # The processes, the images, the checkpoint to go on from, what follows from other settings.
    rank, world, device = fid.join_processes(args.device)
    images = Images(args.data)
    ckpt = open_run(args)
    steps_per_epoch = len(images) / args.batch
    if args.steps is None:
        args.steps = max(1, round(args.epochs * steps_per_epoch))
    args.epochs = round(args.steps / steps_per_epoch, 3)
    if args.micro_batch is None:
        # The memory of a micro-batch grows with its pixels.
        args.micro_batch = max(1, int(256 * min(1, 128 / args.image_size) ** 2))
    resolve(args, device)
    first_step = check_run(args, images, ckpt)
    picture = os.path.join(args.out, "recon.png")
    if first_step > args.steps:
        if rank == 0:
            print(f"finished before: see {args.out}/ckpt.pt and {picture}")
        return
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")

    # The learning rate: its highest value, and the steps at which it reaches that and 0.
    peak_lr = args.base_lr * args.batch / 256
    warmup_steps = args.warmup * steps_per_epoch
    decay_steps = max(args.steps, (args.decay_epochs or 0) * steps_per_epoch)

    # The network, and the discriminator of eq. 6.
    torch.manual_seed(sample.seed_of(sample.NETWORK, args.seed))  # the same in every process
    net = build(args, start_anew=ckpt is None).to(device)
    optimizer = make_optimizer(net, args)
    adversarial = isinstance(net, ae.SDVAE)
    if adversarial:
        if args.image_size < 24:
            raise UserError(f"--image_size {args.image_size}: the discriminator needs 24 at least")
        disc = ae.Discriminator().to(device)
        if world > 1 and device != "cpu":  # [O] latent diffusion's is per GPU
            disc = torch.nn.SyncBatchNorm.convert_sync_batchnorm(disc)
        disc_optimizer = make_optimizer(disc, args)
    if ckpt:
        net.load_state_dict(ckpt["model"])
        optimizer.load_state_dict(ckpt["optimizer"])
        if adversarial:
            disc.load_state_dict(ckpt["disc"])
            disc_optimizer.load_state_dict(ckpt["disc_optimizer"])
    del ckpt
    describe(args, images, net, peak_lr, warmup_steps)
    preview = preview_images(args, images, device) if rank == 0 else None

    # LPIPS, if it is a term; the network as it is trained.
    perceptual = perceptual_loss(device) if vars(args).get("lpips") else None
    if args.compile:
        compile_for_training(net, adversarial)
    model = net
    if world > 1:
        model = DistributedDataParallel(net, gradient_as_bucket_view=True)

    # Digits are only cropped; photographs get a random crop and a flip.
    transform = functools.partial(augment, args.image_size, args.seed)
    if images.digits:
        transform = functools.partial(crop_and_flip, args.image_size)
    slices = cut_batch(args)
    order = training_order(args, images, slices, first_step)
    batches = load_batches(Batches(images, transform), order, args.workers, device)

    log = Log(args, first_step)
    for step in range(first_step, args.steps + 1):
        # Masks and noise are drawn for the global batch, and each micro-batch takes its rows: more
        # processes or smaller micro-batches change the rounding alone. SD-VAE is the exception: D's
        # batch norm and the adaptive weight see one micro-batch at a time. (The order of the images
        # and their flips have keys of their own, see training_order; so have crops, see augment.)
        rng = generator(device, sample.STEP, args.seed, step)
        randomness = net.randomness(args.batch, args.image_size, rng)
        with_disc = adversarial and step >= args.disc_start

        for rows in slices:
            x, _ = next(batches)
            # DDP averages gradients over the processes, once per step.
            model.require_backward_grad_sync = rows == slices[-1]

            with autocast:
                drawn = {name: values[rows] for name, values in randomness.items()}
                loss, terms, x_hat = model(x, perceptual=perceptual, **drawn)
                loss_d = 0.0  # of the discriminator
                if with_disc:  # the third term of eq. 6
                    last_layer = net.decoder.conv_out.weight
                    adv_loss, loss_d, adv_terms = ae.adversarial_losses(
                        disc, x, x_hat, loss, last_layer, args.disc_weight, args.disc_loss
                    )
                    loss = loss + adv_loss
                    terms |= adv_terms

            # One pass for both players: each one's loss has no gradient for the other's weights.
            ((loss + loss_d) / len(slices)).backward()
            log.add(**terms, loss=loss.detach())

        # The optimiser step. A loss that is not finite, in any process, makes the norm of the
        # averaged gradients not finite in all: the step then changes nothing.
        norm = clip_grad_norm_(net.parameters(), args.grad_clip)
        finite = norm.isfinite()
        if with_disc:
            if world > 1:  # as DDP does it for the other player
                for p in disc.parameters():
                    dist.all_reduce(p.grad)
                    p.grad /= world
            finite = finite & clip_grad_norm_(disc.parameters(), args.grad_clip).isfinite()
        skip = 1 - finite.float()
        lr = learning_rate(args, step, peak_lr, warmup_steps, decay_steps)
        update(optimizer, lr, skip)
        if with_disc:
            update(disc_optimizer, lr, skip)
        log.add(grad_norm=norm, skipped=skip)

        # A log line, every --log_every steps; it waits for the device.
        if step in (1, args.steps) or step % args.log_every == 0:
            log.write(step, lr)

        # Pictures and a checkpoint, every --ckpt_every or --keep_every steps and at the end.
        numbered = bool(args.keep_every) and step % args.keep_every == 0
        if rank == 0 and (numbered or step % args.ckpt_every == 0 or step == args.steps):
            states = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
            if adversarial:
                states["disc"] = disc.state_dict()
                states["disc_optimizer"] = disc_optimizer.state_dict()
            save_reconstructions(args, net, preview, picture)
            log.add_picture(picture, step)
            save(args, step, images, numbered, states)
            log.restart_clock(step)  # images/s are those of training alone

    if rank == 0:
        print(f"finished: see {args.out}/ckpt.pt and {picture}")


def build(args, start_anew=True):
    """The autoencoder that the settings describe, with the weights of --init if there are any and
    the run starts anew. Raises UserError if the settings do not fit."""
    net = ae.build(vars(args))
    net.latent_shape(args.image_size, args.image_size)  # raises if the size does not fit
    if args.init and start_anew:
        state = ae.load(args.init).state_dict()
        if net.vit:
            state = ae.resize_positions(state, net.grid)
        net.load_state_dict(state)
    if args.tune_decoder:
        # Unused at mask ratio 0, where weight decay would only shrink it.
        net.mask_token.requires_grad_(False)
        if args.freeze_encoder:
            for name in net.encoder_state():
                net.get_parameter(name).requires_grad_(False)
    return net


def perceptual_loss(device):
    """LPIPS as the term of an objective, (x_hat, x) -> scalar."""
    lpips = fid.local_rank_0_first(ae.lpips_vgg)
    lpips = lpips.to(device, memory_format=torch.channels_last)
    return lambda x_hat, x: lpips(x_hat, x).mean()


def make_optimizer(net, args):
    """AdamW on the parameters of net that are trained; biases and norms, which have one dimension,
    do not decay. Its learning rate is set at each step.
    """
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, 0, args.betas, fused=True)


# ---- Pictures ----


def preview_images(args, images, device):
    """Ten images for recon.png, (10, 3, S, S), spread over all; of digits, held-out ones."""
    shown = Images(held_out=True) if images.digits else images
    keys = [[(i * len(shown) // 10, 0, False) for i in range(10)]]
    crop = functools.partial(crop_and_flip, args.image_size)
    return next(load_batches(Batches(shown, crop), keys, 0, device))[0]


@torch.no_grad()
def save_reconstructions(args, net, x, path):
    """recon.png: originals, reconstructions; with masking also what the encoder sees in training
    and what the decoder makes of it."""
    # A copy is not compiled. The original would compile SD-VAE's parts again, for this batch size.
    net = copy.deepcopy(net)
    pictures = {"original": x, "reconstruction": net.decode(net.encode(x).mode())}
    if net.vit and args.mask_ratio > 0:
        rng = generator(x.device, sample.PICTURE, args.seed)
        randomness = net.randomness(len(x), net.image_size, rng)
        prediction, _, mask = net.masked_pass(x, **randomness)
        mask = mask.view(-1, 1, net.grid, net.grid)
        mask = F.interpolate(mask, scale_factor=net.patch_size)  # of pixels
        pictures["masked input"] = x * (1 - mask)
        pictures["prediction"] = torch.where(mask > 0, prediction, x)
    rows = [to_uint8(row) for row in pictures.values()]
    sample.save_grid(path, rows, list(pictures))


# =================================================================================================
# Shared with train_dit.py: flags, the start of a run, its steps, log, checkpoints; images, batches
# =================================================================================================

# Settings that may change on --resume.
FREE = {
    *("resume", "data", "cache", "out", "device", "dtype", "compile", "workers", "micro_batch"),
    *("log_every", "ckpt_every", "keep_every", "base_lr", "lr", "grad_clip", "tensorboard"),
    "epochs",  # which follows from --steps
}


def add_common_flags(parser):
    """The flags of training and of --eval."""
    add = parser.add_argument
    add("--data", type=text, help="folder of images; None: the demo, on digits")
    add("--out", type=text, help="folder for what is written")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of everything random")
    add("--device", type=text, help="cpu, cuda, cuda:1, ...; None: cuda if there is one")
    add("--workers", type=number(int, 0), help="loader processes per rank; None: by the CPUs")
    add(
        "--micro_batch",
        type=number(int, 1),
        help="images per process at once, at most; None: by their size",
    )


def add_run_flags(parser):
    """The flags of both training scripts."""
    add_common_flags(parser)
    add = parser.add_argument
    add("--init", type=text, help="checkpoint to start from; it brings the network's sizes")
    add("--resume", action="store_true", help="go on from --out's checkpoint, if there is one")
    add("--dtype", choices=("float32", "bfloat16"), help="of products; None: bfloat16 on cuda")
    add("--compile", **SWITCH, help="torch.compile; None: 1 on cuda")
    add("--log_every", type=number(int, 1), default=50, help="steps between log lines")
    add("--ckpt_every", type=number(int, 1), help="steps between checkpoints")
    add("--keep_every", type=number(int, 1), help="steps between numbered checkpoints that stay")
    add("--tensorboard", action="store_true", help="also log for TensorBoard, into --out")
    add("--batch", type=number(int, 1), help="images per optimiser step, over all processes")
    add("--schedule", choices=("cosine", "constant"), help="of the learning rate")
    add("--betas", type=number(float, 0, 1 - 1e-9), nargs=2, help="AdamW")
    # [R] no clipping
    add("--grad_clip", type=number(float, 1e-9), default=math.inf, help="largest norm of gradients")


def source_of_sizes(chosen, settings, rest):
    """The checkpoint that brings the sizes of the network, or None: that of --out with --resume,
    else that of --init. For --help no file is read."""
    if "-h" in rest or "--help" in rest:
        return None
    ckpt = os.path.join(chosen.out or settings["out"], "ckpt.pt")
    if chosen.resume and os.path.exists(ckpt):
        return ckpt
    return chosen.init or settings.get("init")


def parse_flags(parser, settings, sizes, source):
    """Parse the command line. Defaults are the settings, each of which must have its flag, and the
    sizes that the file `source` brings; raises UserError for a flag that differs from these."""
    missing = settings.keys() - vars(parser.parse_args([])).keys()
    assert not missing, f"settings without a flag: {missing}"
    # argparse makes lists of flags, and a file's are compared with them.
    defaults = settings | sizes
    defaults = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    for name in sizes:
        if getattr(args, name) != defaults[name]:
            raise UserError(f"--{name} {getattr(args, name)}: {source} has {defaults[name]}")
    return args


# ---- The start of a run ----


def open_run(args):
    """Claim --out -> with --resume its checkpoint, else None."""
    if rank_and_world()[0] == 0:
        print("demo settings (no --data given)" if args.data is None else "paper settings")
        claim_out(args)
        # The system releases the lock when this process ends, and loader processes do not have it.
        lock = os.open(os.path.join(args.out, ".lock"), os.O_CREAT | os.O_WRONLY)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"another run is writing into {args.out}: end it first") from None
        except OSError as error:
            print(f"warning: {args.out} cannot be locked ({error}): start no second run in it")
    wait_for_all()
    path = os.path.join(args.out, "ckpt.pt")
    if not (args.resume and os.path.exists(path)):
        return None
    ckpt = ae.read_checkpoint(path)
    if not {"model", "optimizer", "step", "args", "images"} <= ckpt.keys():
        raise UserError(f"{path} is no checkpoint of a run, which --resume could go on with")
    # Files that the run began with, which are not read again, and the --ema that it chose.
    for name in ("ae", "init", "stats", "ema"):
        if name in ckpt["args"] and name in args and (name != "ema" or args.ema is None):
            setattr(args, name, ckpt["args"][name])
    if "decay_epochs" in args and "decay_epochs" not in ckpt["args"]:
        args.decay_epochs = None  # files until 2026-11: the cosine ends with the run
    if vars(args).get("tune_decoder") and "deterministic" not in ckpt["args"]:
        ckpt["args"]["kl"] = 0.0  # files until 2026-11 have the first stage's weight
    return ckpt


def claim_out(args):
    """Make --out. Raises UserError where nothing may be written: inside --data, beside other files
    without --resume, among numbered checkpoints of which none is ckpt.pt."""
    data = Path(args.data).resolve() if args.data else None
    for folder in filter(None, (args.out, vars(args).get("cache"))):
        if data in (Path(folder).resolve(), *Path(folder).resolve().parents):
            raise UserError(f"{folder} lies inside --data {args.data}: choose another folder")
    os.makedirs(args.out, exist_ok=True)
    files = sorted(file.name for file in os.scandir(args.out) if file.is_file())
    files = [name for name in files if not name.startswith(".")]
    resume = vars(args).get("resume")
    if files and not resume:
        hint = "" if resume is None else "go on with --resume, or "
        raise UserError(f"{args.out} has files: {hint}choose another --out")
    numbered = [name for name in files if re.fullmatch(r"ckpt-\d+\.pt", name)]
    if numbered and "ckpt.pt" not in files:
        raise UserError(
            f"{args.out} has no ckpt.pt: to go on from {numbered[-1]}, copy it to ckpt.pt"
        )


def resolve(args, device):
    """Settle, in place, the settings that follow from the device and the number of processes."""
    on_gpu = device != "cpu"
    args.device = "cuda" if on_gpu else "cpu"
    if args.dtype is None:
        # GPUs before Ampere have no bfloat16 products.
        ampere = on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)
        args.dtype = "bfloat16" if ampere else "float32"
    if args.compile is None:
        args.compile = int(on_gpu)
    if args.workers is None:
        args.workers = default_workers(args.data)
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # TF32 for what is not in bfloat16
    _, world = rank_and_world()
    if args.batch % world:
        raise UserError(f"--batch {args.batch} does not divide over {world} processes")
    # --micro_batch is lowered to a divisor of each process's share of the batch.
    share = args.batch // world
    most = min(args.micro_batch, share)
    args.micro_batch = max(m for m in range(1, most + 1) if share % m == 0)


def cut_batch(args):
    """This process's share of every global batch, as slices of it, one per micro-batch."""
    rank, world = rank_and_world()
    share = args.batch // world
    starts = range(rank * share, (rank + 1) * share, args.micro_batch)
    return [slice(start, start + args.micro_batch) for start in starts]


def default_workers(data):
    """Loader processes per rank: the CPUs that this process may use, shared by the ranks of the
    machine, 16 at most; none for digits."""
    if data is None:
        return 0
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(16, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def check_run(args, images, ckpt):
    """The step that the run begins or goes on with.

    Raises UserError if the settings or images of ckpt were others, and if the processes do not see
    the same images and the same checkpoint.
    """
    rank, _ = rank_and_world()
    first_step = ckpt["step"] + 1 if ckpt else 1
    if ckpt:
        changed = compare_with(ckpt, args, images)
        if rank == 0:
            print(f"going on from step {ckpt['step']}", *changed)
    elif args.resume and rank == 0:
        print(f"{args.out} has no checkpoint: the run begins")

    found = torch.tensor([first_step, int(images.fingerprint()[:15], 16)])
    least, most = (
        fid.all_reduce(found.clone(), op) for op in (dist.ReduceOp.MIN, dist.ReduceOp.MAX)
    )
    if not torch.equal(least, most):
        raise UserError(
            f"the processes see different images in --data, or a different checkpoint in "
            f"{args.out}: both must be the same on all nodes"
        )
    return first_step


def compare_with(ckpt, args, images):
    """The settings, as flags, that have changed since ckpt was written.

    Raises UserError if this changes the course of the run: if the images are others, or settings
    beside those of FREE.
    """
    if ckpt["images"] != images.fingerprint():
        raise UserError(f"--resume: the run in {args.out} has other images than --data has now")
    saved, now = ckpt["args"], vars(args)
    # With a constant learning rate, or with a cosine that ends after both, a longer run begins like
    # a shorter one.
    decay = (now.get("decay_epochs") or 0) * len(images) / args.batch
    same_start = args.schedule == "constant" or decay >= max(saved["steps"], args.steps)
    free = FREE | {"steps"} if same_start else FREE
    changed = [name for name in now if name in saved and now[name] != saved[name]]
    for name in changed:
        if name not in free:
            raise UserError(
                f"--resume: the run in {args.out} has --{name} {saved[name]}, not {now[name]}"
            )
    return [f"--{name} {now[name]}" for name in changed if name != "resume"]


def describe(args, images, net, peak_lr, warmup_steps=0):
    """Print the settings, the images, the schedule, the network and where it runs."""
    rank, world = rank_and_world()
    if rank > 0:
        return
    print("  ".join(f"{name} {value}" for name, value in vars(args).items()))
    names = ", ".join(name or "." for name in images.classes[:5])
    print(
        f"{len(images):,} images of {len(images.classes)} classes ({names}"
        f"{', ...' if len(images.classes) > 5 else ''}) in {args.data or 'the bundled digits'}, "
        f"{images.passed_over} other files passed over"
    )
    print(
        f"{args.steps:,} steps of {args.batch} images, {args.micro_batch} at once; learning rate "
        f"up to {peak_lr:.3g} after {math.ceil(warmup_steps):,} steps of warm-up"
    )
    if args.steps <= warmup_steps:
        print("warning: the run ends within its warm-up: shorten it with --warmup")
    parameters = sum(p.numel() for p in net.parameters())
    print(
        f"{args.model}: {parameters:,} parameters, {parameters * 4 / 2**20:.1f} MiB in float32, "
        f"on {args.device} in {args.dtype}{', compiled (off: --compile 0)' if args.compile else ''}"
        f"; processes: {world}",
        flush=True,
    )


# ---- A step ----


def compile_for_training(net, adversarial=False):
    """torch.compile, in place, of an autoencoder or a DiT.

    adaptive_weight takes gradients at the decoder's last layer, which must be left as it is: of an
    SD-VAE only what comes before that is compiled.
    """
    parts = [net]
    if adversarial:
        parts = [net.encoder, net.decoder.mid_block, *net.decoder.up_blocks]
    # DDP's splitting of the graph has computed wrong gradients (PyTorch 2.4): compile it whole.
    # Sizes never change in training; if they may, all levels of an SD-VAE share a graph of symbolic
    # sizes, which 2.8 fails to compile.
    torch._dynamo.config.optimize_ddp = False
    for part in parts:
        part.compile(dynamic=False)


def learning_rate(args, step, lr, warmup_steps, decay_steps):
    """Linear warm-up from 0, at step 1, to lr, then constant or half a cosine, which would reach 0
    after decay_steps."""
    before = step - 1  # steps that have been done
    if before < warmup_steps:
        return lr * before / warmup_steps
    if args.schedule == "constant":
        return lr
    angle = math.pi * (before - warmup_steps) / max(1, decay_steps - warmup_steps)
    return lr * 0.5 * (1 + math.cos(angle))


def update(optimizer, lr, skip):
    """An optimiser step; where skip, a number on the device, is 1, it changes nothing."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    # A fused optimiser reads this on the device, as with torch.amp's scaler, and does nothing if it
    # is 1: no process has to wait for the number.
    optimizer.found_inf = skip
    optimizer.step()
    optimizer.zero_grad()


# ---- Log and checkpoint ----


class Log:
    """The lines of a run on the screen, in log.jsonl and, with --tensorboard, for TensorBoard.

    A line has the mean of each number that was added since the last line: over steps, micro-batches
    and processes, without values that are not finite. All processes must add the same names.
    A run that goes on begins by dropping the lines from first_step on: those steps are run again.
    """

    def __init__(self, args, first_step):
        rank, _ = rank_and_world()
        self.args = args
        self.path = Path(args.out, "log.jsonl")
        if rank == 0 and self.path.exists():
            trim_log(self.path, first_step)
        self.numbers = defaultdict(list)  # on the device, by name
        self.skipped_in_row = 0  # steps up to the last line
        self.writer = None
        if args.tensorboard and rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            folder = os.path.join(args.out, "tensorboard")
            self.writer = SummaryWriter(folder, purge_step=first_step)
        self.restart_clock(first_step - 1)

    def restart_clock(self, step):
        """Count images per second from now on, after this step."""
        self.since_time, self.since_step = time.time(), step

    def add(self, **numbers):
        """Numbers on the device for the next line; "skipped" is 1 for a step that was skipped."""
        for name, value in numbers.items():
            self.numbers[name].append(value)

    def write(self, step, lr):
        """Write a line; waits for the device. Raises UserError if the last 20 steps, or more, were
        all skipped."""
        args, (rank, world) = self.args, rank_and_world()
        sums = []
        for numbers in map(torch.stack, self.numbers.values()):
            finite = numbers.isfinite()
            total = numbers.where(finite, 0).double().sum()
            sums.append(torch.stack([total, finite.double().sum()]))
        sums = torch.stack(sums)  # (names, 2): the sum and the number of the finite values
        if world > 1:
            dist.all_reduce(sums)
        means = (sums[:, 0] / sums[:, 1]).tolist()  # waits for the device
        images_per_s = (step - self.since_step) * args.batch / (time.time() - self.since_time)
        line = dict(zip(self.numbers, means, strict=True)) | {"lr": lr}
        if args.device == "cuda":
            line["GiB"] = torch.cuda.max_memory_allocated() / 2**30
        if rank == 0:
            left = int((args.steps - step) * args.batch / images_per_s)
            print(
                f"step {step}/{args.steps}",
                *(f"{name} {value:.4g}" for name, value in line.items()),
                f"{images_per_s:.0f} images/s",
                f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left",
                sep="  ",
                flush=True,
            )
            if self.writer:
                for name, value in (line | {"images_per_s": images_per_s}).items():
                    self.writer.add_scalar(name, value, step)
            # JSON has no NaN, the mean of no finite values.
            line = {name: None if math.isnan(value) else value for name, value in line.items()}
            line = {"step": step, **line, "images_per_s": images_per_s, "seconds_left": left}
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")

        # The ones at the end of the list are skipped steps in a row.
        skipped = self.numbers["skipped"]
        at_end = int(torch.stack(skipped).flip(0).cumprod(0).sum())
        self.skipped_in_row = at_end + (self.skipped_in_row if at_end == len(skipped) else 0)
        if self.skipped_in_row >= 20:
            raise UserError(
                "20 steps in a row had a loss or a gradient that is not finite and were skipped: "
                "go on from the last checkpoint with --resume and a smaller learning rate, or "
                "--grad_clip 1"
            )
        self.numbers.clear()
        self.restart_clock(step)

    def add_picture(self, picture, step):
        """With --tensorboard, add a picture that has been saved."""
        if self.writer:
            pixels = np.asarray(Image.open(picture))
            self.writer.add_image(os.path.basename(picture), pixels, step, dataformats="HWC")


def trim_log(path, first_step):
    """Drop the lines of a log from first_step on, and a broken one, as a run that was killed leaves
    it."""
    kept = []
    for line in path.read_bytes().splitlines():
        with suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] < first_step:
                kept.append(line + b"\n")
    with whole_file(path) as file:
        file.writelines(kept)


def save(args, step, images, numbered, content):
    """Write ckpt.pt, and before it, if `numbered`, a checkpoint of the same content that stays."""
    # args: --resume compares them; ae.load, --init and --resume find the network's sizes there.
    # images: --resume compares them.
    ckpt = {"step": step, "args": vars(args), "images": images.fingerprint(), **content}
    for name in [f"ckpt-{step:07}.pt", "ckpt.pt"] if numbered else ["ckpt.pt"]:
        with whole_file(os.path.join(args.out, name), sync=True) as file:
            torch.save(ckpt, file)


# ---- Images and batches ----


class Images:
    """RGB images by index, with .labels (N,) and .classes, their names: the demo's digits, those of
    training or the `held_out` ones, or the files of a folder (fid.list_images).

    Each sub-folder is a class, with all that lies deeper in it; a flat folder is one class, "".
    Raises OSError or UserError for a folder that is missing, empty, or of images beside
    sub-folders.
    """

    def __init__(self, folder=None, held_out=False):
        self.folder, self.digits = folder, folder is None
        self.unreadable = set()  # images that have been named in a warning
        if self.digits:
            # 50 x 100 tiles of 28 x 28, 500 in order for each digit; the last 50 of each are held
            # out.
            sheet = Image.open(os.path.join(os.path.dirname(__file__), "assets", "digits.png"))
            tiles = np.asarray(sheet).reshape(50, 28, 100, 28).swapaxes(1, 2)
            tiles = tiles.reshape(10, 500, 28, 28)
            tiles = tiles[:, 450:] if held_out else tiles[:, :450]
            self.pixels = np.pad(tiles.reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
            self.labels = np.arange(10).repeat(tiles.shape[1])
            self.classes = list("0123456789")
            self.passed_over = 0
            return

        files, self.passed_over = fid.list_images(folder)
        tops = [file.split(os.sep)[0] if os.sep in file else "" for file in files]
        classes, self.labels = np.unique(tops, return_inverse=True)
        # Systems write accents in two ways; names are compared in one.
        self.classes = [unicodedata.normalize("NFC", name) for name in classes.tolist()]
        if len(self.classes) > 1 and "" in self.classes:
            raise UserError(
                f"--data {folder} holds images both in itself and in sub-folders: move the former"
            )
        # One array of bytes, which loader processes share; of a list of strings each gets a copy.
        self.files = np.array([os.fsencode(file) for file in files])

    def path(self, index):
        return os.path.join(self.folder, os.fsdecode(self.files[index]))

    def fingerprint(self):
        """16 hexadecimal digits that tell the images from others by their names in the folder."""
        content = self.pixels if self.digits else self.files
        return hashlib.sha256(content.tobytes()).hexdigest()[:16]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if self.digits:
            return Image.fromarray(self.pixels[index]).convert("RGB")
        return fid.read_image(self.path(index))


def crop_and_flip(size, image, index, epoch, flip):
    """A transform of Batches: ADM's crop, flipped if the key says so."""
    pixels = transforms.pil_to_tensor(fid.center_crop(image, size))
    return pixels.flip(-1) if flip else pixels


def augment(size, seed, image, index, epoch, flip):
    """A transform of Batches: a random crop by (seed, epoch, index), flipped if the key says so.

    As in the release: torchvision's RandomResizedCrop of 75 to 100% of the area, resized
    bicubically.
    """
    # get_params draws from the default generator.
    torch.default_generator.manual_seed(sample.seed_of(sample.CROP, seed, epoch, index))
    top, left, height, width = RandomResizedCrop.get_params(image, (0.75, 1.0), (3 / 4, 4 / 3))
    pixels = transforms.pil_to_tensor(image.crop((left, top, left + width, top + height)))[None]
    # PyTorch's resize takes a third of Pillow's time. It begins with the width and agrees with
    # Pillow to 1/255; one value in a million is off by 2/255.
    pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)[0]
    return pixels.flip(-1) if flip else pixels


def training_order(args, images, slices, first_step):
    """Yields for each micro-batch of this process the keys (index, epoch, flip) of its images.

    The shuffled epochs, each by (seed, epoch), are concatenated; a step takes the next `batch`
    images. Flips are by (seed, step); digits are never flipped.
    """
    n = len(images)

    @functools.lru_cache(2)
    def order(epoch):
        return np.random.default_rng(sample.seed_of(sample.ORDER, args.seed, epoch)).permutation(n)

    for step in range(first_step, args.steps + 1):
        flips = (
            torch.rand(args.batch, generator=generator("cpu", sample.FLIP, args.seed, step)) < 0.5
        )
        for rows in slices:
            keys = []
            for place in range(args.batch)[rows]:
                epoch, position = divmod((step - 1) * args.batch + place, n)
                flip = bool(flips[place]) and not images.digits
                keys.append((int(order(epoch)[position]), epoch, flip))
            yield keys


class Batches(torch.utils.data.Dataset):
    """Micro-batches by their keys [(index, epoch, flip), ...]: pixels (B, 3, S, S), labels (B,).

    transform(image, index, epoch, flip) -> (3, S, S), uint8 or float in [-1, 1]. An image that
    cannot be read is named in a warning, and the next one takes its place. Raises UserError after
    100 of them in a row; strict: at the first.
    """

    def __init__(self, images, transform, strict=False):
        self.images, self.transform, self.strict = images, transform, strict

    def read(self, index):
        """The image with this index or the next one that can be read, with its index."""
        for place in range(index, index + 100):
            place %= len(self.images)
            try:
                return self.images[place], place
            except UserError as error:
                if self.strict:
                    raise
                if place not in self.images.unreadable:
                    self.images.unreadable.add(place)
                    print(f"warning: replaced by the next image: {error}", file=sys.stderr)
        raise UserError(f"100 images in a row cannot be read, from {self.images.path(index)} on")

    def __getitem__(self, keys):
        pixels, labels = [], []
        for index, epoch, flip in keys:
            image, found = self.read(index)
            pixels.append(self.transform(image, found, epoch, flip))
            labels.append(self.images.labels[found])
        return torch.stack(pixels), torch.tensor(labels)


def load_batches(dataset, keys, workers, device):
    """Yields what dataset holds for each of keys, on the device, with uint8 pixels as floats in
    [-1, 1]; `workers` processes work ahead."""
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        pin_memory=device != "cpu",
        worker_init_fn=end_if_a_batch_is_lost,
    )
    # Batches come as files in /dev/shm, not through sockets, which a worker that dies would break.
    torch.multiprocessing.set_sharing_strategy("file_system")
    # Workers inherit that Ctrl-C is blocked: it ends the script alone, and they go with it.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    batches = iter(loader)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    for x, *rest in batches:
        x, *rest = (values.to(device, non_blocking=True) for values in (x, *rest))
        yield x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x, *rest


def end_if_a_batch_is_lost(worker):
    """In loader processes: one that cannot send a batch, for want of room in /dev/shm, says so and
    ends, which the script notices. PyTorch would wait for the batch without end."""

    def end(error, batch):
        print(f"a batch was lost: {error}", file=sys.stderr, flush=True)
        os._exit(1)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)


# =================================================================================================
# Evaluation of autoencoders: reconstruction, smoothness, compression, cost
# =================================================================================================

EPS = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3)  # of noise on latents, in units of each channel's std


def parse_eval_args():
    """The flags of --eval."""
    parser = new_parser(__doc__)
    add_common_flags(parser)
    parser.set_defaults(out="out/eval", micro_batch=16)
    add = parser.add_argument
    add("--eval", action="store_true", help="judge autoencoders: a table and pictures in --out")
    add("--ckpt", type=text, nargs="+", required=True, help="of ours, VMAE's authors, diffusers")
    add("--masks", type=text, help="folder of label images, NAME.png for the image NAME")
    add("--inception", type=text, help="file of Inception's weights; None: downloaded")
    # Both defaults are the release's.
    add("--adm_crop", **SWITCH, default=0, help="1: ADM's crop of the images, 0: the paper's")
    add("--half_pixel", **SWITCH, default=1, help="rFID's resizing: 1 pytorch-fid's, 0 ADM's")
    return parser.parse_args()


@torch.no_grad()
def evaluate(args):
    """--eval: a Markdown table with a row per checkpoint, eval.json and a picture each in --out.

    The paper's conventions: crop_for_judging; posterior mean; PSNR of uint8 images, averaged; SSIM
    of images clamped to [-1, 1], over a range of 2; LPIPS on unclamped decodings; rFID with
    pytorch-fid's resizing. L1 on [0, 1], a scale that the paper does not state: its AE's PSNR of
    32.18 is a root mean square error of 0.025 there, and of 0.049 on [-1, 1], for which its L1 of
    0.0218 would be too small.
    """
    rank, _, device = fid.join_processes(args.device)
    if device != "cpu":
        torch.set_float32_matmul_precision("high")  # TF32 products
    if args.workers is None:
        args.workers = default_workers(args.data)
    if rank == 0:
        print("demo settings (no --data given)" if args.data is None else "paper settings")
        claim_out(args)
    # All files are read before hours go into the first.
    nets = [ae.load(path) for path in args.ckpt]
    images = Images(args.data, held_out=True)
    masks = find_masks(args.masks, images) if args.masks else None
    skipped = []
    lpips = load_if_there("LPIPS", ae.lpips_vgg, skipped)
    load = functools.partial(fid.load_inception, args.inception, bool(args.half_pixel))
    inception = load() if args.inception else load_if_there("rFID", load, skipped)
    lpips, inception = (network and network.to(device) for network in (lpips, inception))
    if len(images) < 2 and inception:
        skipped.append("rFID is not computed: it needs two images")

    rows = []
    for path, net in zip(args.ckpt, nets, strict=True):
        net.to(device)
        size = net.image_size or (32 if images.digits else 256)
        crop = functools.partial(crop_for_judging, size)
        if args.adm_crop:
            crop = functools.partial(crop_and_flip, size)
        row = {"autoencoder": path, "pixels": size, "crop": "ADM" if args.adm_crop else "paper"}

        batches = functools.partial(batches_to_judge, args, images, crop, device)
        std, segments_found = latents_std(net, batches(f"{path}, latents"), masks)
        again = batches(f"{path}, reconstructions")
        quality = reconstructions(args, net, again, std, lpips, inception)
        if masks is not None:
            quality |= compression_of_all(segments_found, std)
        preview = save_perturbed(args, net, std, images, crop, path)
        rows.append(row | cost(net, preview) | quality)

        # Rows appear as they are done.
        if rank == 0:
            print_row(rows)
            # JSON has no NaN.
            plain = json.loads(json.dumps(rows), parse_constant=lambda nan: None)
            found = {"data": args.data, "ckpt": args.ckpt, "rows": plain, "not computed": skipped}
            with whole_file(os.path.join(args.out, "eval.json")) as file:
                file.write(json.dumps(found, indent=1).encode())
    if rank == 0:
        print("\n".join(skipped))


def load_if_there(measure, load, skipped):
    """The network that a measure needs; None, with the reason added to `skipped`, if its weights
    cannot be had. If one process lacks them, all do without."""

    def attempt():
        try:
            return load()
        except OSError as error:
            skipped.append(f"{measure} is not computed: {error}")

    network = fid.local_rank_0_first(attempt)
    lacking = fid.all_reduce(torch.tensor(int(network is None))).item()
    if lacking and network:
        skipped.append(f"{measure} is not computed: another process lacks its weights")
    return None if lacking else network


def print_row(rows):
    """Print the last of rows, dicts of the same keys, as a row of a Markdown table; before the
    first row its head."""

    def show(value):
        if isinstance(value, list):
            return ", ".join(map(show, value))
        if isinstance(value, float):
            return "-" if math.isnan(value) else f"{value:.4g}"
        return str(value)

    if len(rows) == 1:
        print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    print("| " + " | ".join(map(show, rows[-1].values())) + " |", flush=True)


def crop_for_judging(size, image, index, epoch, flip):
    """A transform of Batches: the paper's crop for judging reconstructions, floats in [-1, 1].

    The shorter side is resized to `size` bilinearly with antialiasing, without rounding to bytes,
    and the centre is cut out. Its pictures are smoother than those of ADM's crop: the same codec
    gains more than 1 dB on photographs.
    """
    x = transforms.pil_to_tensor(image) / 127.5 - 1
    return transforms.center_crop(transforms.resize(x, [size], antialias=True), [size])


def batches_to_judge(args, images, crop, device, title):
    """Yields the indices of a micro-batch and its images (B, 3, S, S); micro-batches take turns
    over the processes. title: of the progress bar."""
    rank, world = rank_and_world()
    parts = torch.arange(len(images)).split(args.micro_batch)[rank::world]
    parts = [part.tolist() for part in parts]
    keys = [[(index, 0, False) for index in part] for part in parts]
    batches = load_batches(Batches(images, crop, strict=True), keys, args.workers, device)
    bar = tqdm(parts, title, unit="batch", disable=rank > 0)
    for part, (x, _) in zip(bar, batches, strict=True):
        yield part, x


def latents_std(net, batches, masks):
    """The std (C,) of the latents' channels over all images, and this process's segments.

    A segment is a label in one image: (label, power_sums of its latents). masks: the label image of
    each image, or None.
    """
    device = next(net.parameters()).device
    statistics = fid.Statistics(net.latent_dim, device)
    found = []
    for indices, x in batches:
        z = net.encode(x).mode()
        statistics.update(z.transpose(0, 1).flatten(1).T)
        for index, z_of_image in zip(indices, z, strict=True) if masks else []:
            for label, mask in segments(masks[index], z.shape[-1]):
                inside = z_of_image[:, torch.from_numpy(mask).to(device)]
                found.append((label, power_sums(inside).cpu()))
    _, covariance = statistics.finish()
    return covariance.diagonal().sqrt(), found


def perturbed(args, net, x, std, indices):
    """Yields the decodings of posterior mean + eps * std * N(0, 1), for each of EPS.

    The noise of an image is by (seed, index), the same for each eps.
    """
    z = net.encode(x).mode()
    keys = [generator("cpu", sample.PERTURBATION, args.seed, index) for index in indices]
    noise = torch.stack([torch.randn(z.shape[1:], generator=key) for key in keys])
    noise = noise.to(z.device) * std.float().view(-1, 1, 1)
    for eps in EPS:
        yield net.decode(z + eps * noise).float()


def reconstructions(args, net, batches, std, lpips, inception):
    """L1, PSNR, SSIM, LPIPS and rFID, without noise on the latents and with it."""
    device, count = std.device, 0
    sums = {
        name: torch.zeros(len(EPS), dtype=torch.float64, device=device)
        for name in ("L1", "PSNR", "SSIM", "LPIPS")
    }
    real = fid.Statistics(2048, device)
    decoded = [fid.Statistics(2048, device) for _ in EPS]
    for indices, x in batches:
        count += len(x)
        original = torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2).to(device)
        if inception:
            real.update(inception(original)[0])
        for k, x_hat in enumerate(perturbed(args, net, x, std, indices)):
            result = torch.from_numpy(to_uint8(x_hat)).permute(0, 3, 1, 2).to(device)
            mse = (result.double() - original.double()).square().mean((1, 2, 3))
            psnr = 10 * torch.log10(255**2 / mse.clamp(min=1e-10))
            sums["L1"][k] += ((x_hat - x).abs().mean((1, 2, 3)) / 2).double().sum()
            sums["PSNR"][k] += psnr.sum()
            sums["SSIM"][k] += ssim(x_hat.clamp(-1, 1), x).sum()
            sums["LPIPS"][k] += lpips(x_hat, x).double().sum() if lpips else math.nan
            if inception:
                decoded[k].update(inception(result)[0])

    count = fid.all_reduce(torch.tensor(count, device=device)).item()
    means = {name: (fid.all_reduce(values) / count).tolist() for name, values in sums.items()}
    means["rFID"] = [math.nan] * len(EPS)
    if inception and count > 1:
        real = real.finish()
        means["rFID"] = [fid.frechet_distance(*real, *fake.finish()) for fake in decoded]
    quality = {name: values[0] for name, values in means.items()}
    for name in ("PSNR", "LPIPS", "rFID"):
        quality[f"{name} at eps {', '.join(map(str, EPS[1:]))}"] = means[name][1:]
    return quality


def save_perturbed(args, net, std, images, crop, path):
    """Save a picture of ten images with noise on their latents; returns the images. path: of the
    checkpoint, by which the picture is named."""
    keys = [[(i * len(images) // 10, 0, False) for i in range(10)]]
    x = next(load_batches(Batches(images, crop, strict=True), keys, 0, str(std.device)))[0]
    first = rank_and_world()[0] == 0
    decoded = perturbed(args, net, x, std, range(len(x)))
    bar = tqdm(decoded, f"{path}, picture", len(EPS), unit="eps", disable=not first)
    columns = [to_uint8(image) for image in (x, *bar)]
    if first:
        titles = ["original", *(f"eps {eps:g}" for eps in EPS)]
        picture = os.path.join(args.out, path.replace(os.sep, "-") + ".png")
        sample.save_grid(picture, np.stack(columns, 1), [""] * len(x), titles)
    return x


def cost(net, x):
    """Parameters, their size, FLOPs and speed of encoding and decoding x (B, 3, S, S)."""
    start = time.time()  # without a warm-up: save_perturbed has just run both networks
    for _ in tqdm(range(3), "speed", unit="round", disable=rank_and_world()[0] > 0):
        z = net.encode(x).mode()
        net.decode(z).sum().item()  # waits for the device
    speed = 3 * len(x) / (time.time() - start)
    parameters = sum(p.numel() for p in net.parameters())
    return {
        "parameters": parameters,
        "MiB": parameters * 4 / 2**20,
        "GFLOPs encode": gflops(net, x[:1], method="encode"),
        "GFLOPs decode": gflops(net, z[:1], method="decode"),
        "images/s": speed,
    }


def gflops(module, *inputs, method="forward"):
    """GFLOPs of one call, a multiply and an add counted as two; on PyTorch's meta device, where
    nothing is computed."""
    module, inputs = copy.deepcopy(module).to("meta"), [x.to("meta") for x in inputs]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        getattr(module, method)(*inputs)
    return counter.get_total_flops() / 1e9


def ssim(x, y, data_range=2.0):
    """Structural similarity (Wang et al. 2004) of B pairs of images, (B,) float64; 1 if equal.

    It is computed in Gaussian windows of 11 x 11 pixels, sigma 1.5, and averaged over the channels
    and all positions where the window lies inside the image, as in torchmetrics up to 1.4.1; later
    versions include the border, 0.001 to 0.02 apart. Which one the paper used is unknown.

    x, y (B, 3, H, W): images, not clamped here; H and W at least 11. data_range: the length of the
    interval of their values, 2 for [-1, 1].
    """
    window = torch.exp(-torch.arange(-5, 6, device=x.device).double().square() / (2 * 1.5**2))
    window = window / window.sum()
    # float64, because the variances below are small differences of large numbers
    x, y = (images.double().flatten(0, 1)[:, None] for images in (x, y))  # (3B, 1, H, W)
    images = torch.cat([x, y, x * x, y * y, x * y])
    # The window is a product: rows, then columns, which takes a fifth of the time.
    images = F.conv2d(F.conv2d(images, window.view(1, 1, 1, 11)), window.view(1, 1, 11, 1))
    mean_x, mean_y, xx, yy, xy = images.chunk(5)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * (xy - mean_x * mean_y) + c2) / (xx - mean_x**2 + yy - mean_y**2 + c2)
    return (luminance * structure).view(-1, 3 * luminance[0].numel()).mean(1)


def power_sums(z):
    """z (C, n) -> (3, C) float64: the number, sum and sum of squares of each channel's values."""
    return torch.stack([z.double() ** power for power in range(3)]).sum(2)


def compression(labels, sums, std):
    """Perceptual compression: how compact and how separate latents are under ground-truth masks.

    The supplement names this evaluation but gives no formulas; these two are our reading. A segment
    is the part of one image that has one label.

    labels: a label for each of S segments; those of equal str() are one label.
    sums (S, 3, C) float64: power_sums of the latents of each segment.
    std (C,): standard deviation of all latents per channel, by which they are divided first.

    Returns a dict of two floats. "sigma2" is the variance within a segment, averaged over the
    channels and, weighted by size, over the segments. "rho" is the mean distance between the
    centroids of two labels, divided by the square root of the variance within a label, which is
    summed over the channels; it is NaN for a single label.
    """
    scale = torch.stack([std**0, std, std**2])
    n, total, squares = (sums / scale).unbind(1)  # (S, C) each
    sigma2 = ((squares - total**2 / n).sum(0) / n.sum(0)).mean()

    # The sums of a label are those of its segments, added up.
    _, index = np.unique([str(label) for label in labels], return_inverse=True)
    member = F.one_hot(torch.from_numpy(index)).T.double()  # (labels, S)
    n, total, squares = member @ n, member @ total, member @ squares  # (labels, C) each
    variance = (squares - total**2 / n).sum() / n[:, 0].sum()
    rho = torch.pdist(total / n).mean() / variance.sqrt()
    return {"sigma2": sigma2.item(), "rho": rho.item()}


def compression_of_all(found, std):
    """sigma2 and rho of the segments that all processes found."""
    gathered = [found]
    if dist.is_initialized():
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, found)
    found = [segment for part in gathered for segment in part]
    if not found:
        raise UserError("--masks: no label image of these images has a label in it")
    labels, sums = zip(*found, strict=True)
    return compression(labels, torch.stack(sums), std.cpu())


def find_masks(folder, images):
    """The label image of each of images, by path, or None: NAME.png for the image NAME, in the same
    sub-folder. Raises UserError if no image has one."""
    if images.digits:
        raise UserError("--masks goes with --data")
    stems = [os.path.splitext(os.fsdecode(file))[0] for file in images.files]
    masks = [os.path.join(folder, f"{stem}.png") for stem in stems]
    masks = [mask if os.path.exists(mask) else None for mask in masks]
    found = sum(mask is not None for mask in masks)
    if not found:
        raise UserError(f"--masks {folder} holds no NAME.png for an image NAME of --data")
    if rank_and_world()[0] == 0:
        print(f"{found} of {len(masks)} images have a label image")
    return masks


def segments(file, grid):
    """Yields (label, mask) for each label of a label image; mask: boolean (grid, grid).

    The label image is cropped as both crops of images do it, to the square in its centre, and each
    cell of the grid has the label at its own centre. Value 0 is no label; a palette's values are
    numbers, never colours. file: None for an image without one. Raises UserError for a label image
    in colour.
    """
    if file is None:
        return
    image = fid.read_image(file, labels=True)
    values = np.asarray(ImageOps.fit(image, (grid, grid), Image.NEAREST))
    if values.ndim > 2:
        colours = values[..., :3] if values.shape[2] > 2 else values[..., :1]  # without alpha
        if (colours != colours[..., :1]).any():
            raise UserError(
                f"--masks: {file} is in colour; a label image has one value per pixel, the label"
            )
        values = colours[..., 0]
    for label in np.unique(values[values > 0]).tolist():
        yield label, values == label


if __name__ == "__main__":
    fid.run_main(main)
