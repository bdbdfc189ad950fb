"""Train an autoencoder (supplement, section B.1).

    python train_ae.py                                          the demo: a VMAE on digits
    python train_ae.py --tune_decoder                           its last stage
    python train_ae.py --model sdvae                            the demo with another autoencoder
    python train_ae.py --data DIR --image_size 128              own images, the paper's settings
    torchrun --nproc_per_node=8 train_ae.py --model vmae --data imagenet/train
    python train_ae.py --data DIR --resume                      go on from the last checkpoint
    python train_ae.py --eval --ckpt A.pt B.pt --data VAL       judge autoencoders, a row each

Writes ckpt.pt, log.jsonl and recon.png (originals above reconstructions) into --out.
"""

import argparse
import copy
import datetime
import functools
import glob
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as transforms
from tqdm import tqdm

import ae
import fid
from ae import (
    SWITCH,
    UserError,
    at_least,
    fraction,
    missing_for_compile,
    rank_and_world,
    warn,
)

# ---- Recipes: what each autoencoder is trained with ----
#
# [S] supplement  [M] main paper  [R] the authors' release  [V] VQGAN and latent diffusion
# [O] our choice
# The weights of the loss terms are the `weights` of the classes in ae.py, unless set here.

# Settings of the run, whatever the model. COMMON are those of both training scripts.
COMMON = dict(
    data=None,
    resume=False,
    seed=0,
    device=None,
    dtype=None,
    compile=None,
    workers=min(8, os.cpu_count()),  # [O]
    log_every=100,  # [O]
    keep_every=None,
    steps=None,
    lr=None,
    grad_clip=math.inf,  # [S] no clipping
)
RUN = COMMON | dict(
    model="vmae",
    out="out/{model}",
    init=None,
    ckpt_every=1000,  # [O]
)

CONV = RUN | dict(
    image_size=256,  # [O] pixels on a side
    channels=[128, 256, 512, 512],  # [R] widths of the levels
    latent_dim=16,  # [R] channels of the latent
    recon="mse",  # [S] the reconstruction term, eq. 3
    epochs=20,  # [O]
    warmup=1,  # [O] epochs in which the learning rate rises from 0
    schedule="cosine",  # [O] of the learning rate after the warm-up
    batch=2048,  # [S] images per optimiser step, over all processes
    micro_batch=16,  # [O] images per process at once, the rest is gradient accumulation
    base_lr=1e-5,  # [S] learning rate at batch 256
    betas=[0.9, 0.95],  # [O] AdamW
    weight_decay=0.0,  # [O] AdamW
)
VIT = RUN | dict(
    image_size=128,  # [R] pixels on a side; the decoder is tuned at 256
    patch_size=8,  # [R] pixels on a side of a token
    hidden_size=192,  # [S] width
    depth=12,  # [S] encoder blocks
    decoder_depth=12,  # [S] decoder blocks
    num_heads=12,  # [R]
    latent_dim=16,  # [R] channels of the latent
    mask_ratio=0.6,  # [S] for VMAE, [O] for MAE
    epochs=400,  # [R]
    warmup=10,  # [R]
    schedule="cosine",  # [R]
    batch=2048,  # [S]
    micro_batch=128,  # [O]
    base_lr=1e-4,  # [S]
    betas=[0.9, 0.95],  # [R]
    weight_decay=0.05,  # [R]
)
ADVERSARIAL = dict(
    recon="l1",  # [V] a Laplace likelihood in eq. 6
    batch=256,  # [S]
    micro_batch=8,  # [O]
    betas=[0.5, 0.9],  # [V]
    schedule="constant",  # [O]
    disc_weight=0.5,  # [V] lambda_D of eq. 6, times the adaptive weight
    disc_start=5001,  # [O] first step with the adversarial term
    disc_loss="hinge",  # [V] eq. 6 writes "vanilla"
)
PAPER = {
    "ae": CONV | ae.AE.weights,
    "dae": CONV | ae.DAE.weights | dict(noise_std=0.1),  # [O] std of the corruption, eq. 4
    "vae": CONV | ae.VAE.weights,
    "sdvae": CONV | ae.SDVAE.weights | ADVERSARIAL,
    "mae": VIT | ae.MAE.weights,
    "vmae": VIT
    | ae.VMAE.weights
    | dict(
        prior_std=1.0,  # [M] the std that the KL draws to
        tune_decoder=False,
    ),
}
# VMAE's last stage, --tune_decoder: MSE + LPIPS of the posterior mean's reconstruction. The sizes
# of the network are those of the checkpoint that it starts from.
PAPER["tune"] = RUN | dict(
    tune_decoder=True,
    init="out/vmae/ckpt.pt",
    out="out/vmae-tuned",
    freeze_encoder=1,  # [O] the release's comment says so, its script trains the encoder too
    image_size=256,  # [R]
    lpips=10.0,  # [R]
    epochs=10,  # [R]
    warmup=0,  # [R]
    schedule="cosine",  # [R]
    batch=2048,  # [R]
    micro_batch=32,  # [O]
    base_lr=1e-5,  # [R]
    betas=[0.9, 0.95],  # [R]
    weight_decay=0.05,  # [R]
)

# What the demo does otherwise, to take minutes on a laptop; all of it is our choice.
DEMO_RUN = dict(
    out="out/demo/{model}",
    workers=0,  # digits need no processes that load them
    log_every=50,
    ckpt_every=200,
)
DEMO_CONV = DEMO_RUN | dict(
    image_size=32,
    channels=[32, 32, 64, 64],
    lpips=0.0,  # digits need no VGG16
    epochs=4,
    schedule="cosine",
    batch=32,
    micro_batch=64,
    base_lr=8e-3,
    betas=[0.9, 0.95],
)
DEMO_VIT = DEMO_RUN | dict(
    image_size=32,
    hidden_size=96,
    depth=3,
    decoder_depth=3,
    num_heads=4,
    lpips=0.0,
    epochs=10,
    warmup=1,
    batch=32,  # many small steps: at 64 the digits are blurred
    micro_batch=64,
    base_lr=16e-3,
    weight_decay=0.0,
)
DEMO_TUNE = DEMO_RUN | dict(
    init="out/demo/vmae/ckpt.pt",
    out="out/demo/vmae-tuned",
    image_size=32,
    lpips=0.0,
    epochs=5,
    batch=32,
    micro_batch=64,
    base_lr=16e-3,
    weight_decay=0.0,
)
DEMO = {
    **{name: PAPER[name] | DEMO_CONV for name in ("ae", "dae", "vae", "sdvae")},
    **{name: PAPER[name] | DEMO_VIT for name in ("mae", "vmae")},
    "tune": PAPER["tune"] | DEMO_TUNE,
}
DEMO["sdvae"] |= dict(disc_start=301)

# Settings that are arguments of the classes in ae.py, beside the weights of terms. A name that is
# missing here never reaches its class.
ARGUMENTS = (
    *("image_size", "channels", "latent_dim", "recon", "noise_std"),
    *("patch_size", "hidden_size", "depth", "decoder_depth", "num_heads"),
    *("mask_ratio", "prior_std", "tune_decoder"),
)

EVAL = dict(
    eval=True,
    ckpt=None,
    data=None,
    out="out/eval",
    image_size=None,
    micro_batch=16,  # in float32, of any autoencoder
    masks=None,
    inception=None,
    adm_crop=0,  # [R]
    half_pixel=1,  # [R]
    seed=0,
    device=None,
    workers=COMMON["workers"],
)


def recipe_of(flags):
    """(recipe, the flags that select it): the settings that flags override; a name for messages."""
    if "eval" in flags:
        return EVAL if "data" in flags else EVAL | dict(workers=0), "--eval"
    recipes = PAPER if "data" in flags else DEMO
    model = flags.get("model", RUN["model"])
    if "tune_decoder" in flags and model == "vmae":
        return recipes["tune"], "--model vmae --tune_decoder"
    return recipes[model], f"--model {model}"


# ---- Flags ----


def parse_args():
    """(args, checkpoint to resume or None)."""
    parser, add = new_parser(__doc__, DEMO, PAPER)
    add("--out", help="folder for checkpoint, log and pictures")
    add("--init", help="checkpoint to start from, of any image size")
    add("--ckpt_every", type=at_least(1), help="steps between checkpoints and pictures")

    add = parser.add_argument_group("model").add_argument
    add("--model", choices=list(ae.MODELS), help="which autoencoder")
    add("--image_size", type=at_least(1), help="pixels on a side")
    add("--latent_dim", type=at_least(1), help="channels of the latent")
    add("--channels", type=at_least(1), nargs="+", help="widths of the levels")
    add("--patch_size", type=at_least(1), help="pixels on a side of a token")
    add("--hidden_size", type=at_least(1), help="width of the ViT")
    add("--depth", type=at_least(1), help="encoder blocks")
    add("--decoder_depth", type=at_least(1), help="decoder blocks")
    add("--num_heads", type=at_least(1), help="attention heads")

    add = parser.add_argument_group("objective").add_argument
    add("--tune_decoder", action="store_true", help="VMAE's last stage, of the network in --init")
    add("--freeze_encoder", **SWITCH, help="in that stage: 0 trains the encoder too")
    add("--mask_ratio", type=fraction, help="share of the tokens that are masked")
    add("--recon", choices=("mse", "l1"), help="reconstruction term: eq. 3's or VQGAN's")
    add("--noise_std", type=at_least(0.0), help="std of the corruption, eq. 4")
    add("--visible", type=at_least(0.0), help="weight of the visible patches' MSE")
    add("--masked", type=at_least(0.0), help="weight of the masked patches' MSE")
    add("--kl", type=at_least(0.0), help="weight of the KL")
    add("--prior_std", type=at_least(1e-9), help="std that the KL draws to (release: 1e-3)")
    add("--lpips", type=at_least(0.0), help="weight of LPIPS; above 0 it needs VGG16")
    add("--disc_weight", type=at_least(0.0), help="lambda_D, times the adaptive weight")
    add("--disc_start", type=at_least(1), help="first step with the adversarial term")
    add("--disc_loss", choices=("hinge", "vanilla"), help="D's loss: VQGAN's or eq. 6's")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=at_least(1e-9), help="length of the run")
    add("--steps", type=at_least(1), help="the same in optimiser steps (default: from --epochs)")
    add("--warmup", type=at_least(0.0), help="epochs in which the learning rate rises from 0")
    add("--schedule", choices=("cosine", "constant"), help="of the learning rate after that")
    add("--batch", type=at_least(1), help="images per optimiser step, over all processes")
    add("--micro_batch", type=at_least(1), help="images per process at once")
    add("--base_lr", type=at_least(0.0), help="learning rate at batch 256")
    add("--lr", type=at_least(0.0), help="learning rate (default: from base_lr, batch)")
    add("--betas", type=fraction, nargs=2, help="AdamW")
    add("--grad_clip", type=at_least(1e-9), help="largest norm of the gradients")
    add("--weight_decay", type=at_least(0.0), help="AdamW, of matrices and the mask token")

    add = parser.add_argument_group("evaluation, instead of training").add_argument
    add("--eval", action="store_true", help="write a table and pictures to --out")
    add("--ckpt", nargs="+", help="files of ours, the authors' VMAE or diffusers' VAE")
    add("--masks", help="label images like ADE20K's or CelebAMask-HQ's")
    add("--inception", help="file of Inception's weights (default: downloaded)")
    add("--adm_crop", **SWITCH, help="1: ADM's crop of the images, 0: the paper's (default: 0)")
    add("--half_pixel", **SWITCH, help="rFID's resizing: 1 pytorch-fid's, 0 ADM's (default: 1)")
    return settle(parser, recipe_of, "autoencoder")


def main():
    try:
        args, ckpt = parse_args()
        if "eval" in args:
            evaluate(args)
        else:
            train(args, ckpt)
    except (UserError, fid.UserError) as error:
        ae.exit_with(error)


# ---- Training ----


def train(args, ckpt):
    """Train an autoencoder, from the start or from the checkpoint ckpt."""
    # The images, how long to train on them, and at which rate.
    images = Images(args.data)
    args.steps = args.steps or max(1, round(args.epochs * len(images) / args.batch))
    args.lr = args.base_lr * args.batch / 256 if args.lr is None else args.lr
    if ckpt and finished(args, ckpt, images):
        return

    # The network, LPIPS if the recipe has it, and eq. 6's discriminator.
    torch.manual_seed(args.seed)  # weights start the same in every process
    if ckpt:
        net, config = build(args, config=ckpt["config"])
    else:
        net, config = build(args, init=args.init)
    lpips = ae.lpips_vgg() if args.lpips > 0 else None
    adversarial = args.model == "sdvae"
    if adversarial and args.image_size < 24:
        raise UserError(
            f"--image_size {args.image_size} is too small for the discriminator: 24 at least"
        )

    run = Run(args)
    net.to(run.device)
    optimizer = make_optimizer(net, args)
    parts = {"model": net, "optimizer": optimizer}
    perceptual = None
    if lpips is not None:
        lpips.to(run.device, memory_format=torch.channels_last)

        def perceptual(x_hat, x):
            return lpips(x_hat, x).mean()

    disc = ae.Discriminator().to(run.device) if adversarial else None
    if run.rank == 0:
        run.introduce(images, net, training_flops(net, args.image_size, lpips, disc))
        shown = Images(held_out=True) if images.digits else images
        crop = functools.partial(crop_and_flip, args.image_size, False)
        preview = preview_images(shown, crop, args.workers, run.device)
    if adversarial:
        if run.world > 1 and run.device != "cpu":
            disc = torch.nn.SyncBatchNorm.convert_sync_batchnorm(disc)
        disc_optimizer = torch.optim.AdamW(
            disc.parameters(), args.lr, args.betas, weight_decay=0, fused=True
        )
        parts |= {"disc": disc, "disc_optimizer": disc_optimizer}

    run.begin(ckpt, **parts)
    if run.compiled:
        compile_for_training(net, adversarial)
    model = net
    if run.world > 1:
        model = DistributedDataParallel(net, gradient_as_bucket_view=True)

    # Digits are only cropped; photographs get a random crop and a flip.
    if images.digits:
        transform = functools.partial(crop_and_flip, args.image_size, False)
    else:
        transform = functools.partial(augment, args.image_size, args.seed)
    order = training_order(args, len(images), run.slices, run.done)
    batches = load_batches(Batches(images, transform), order, args.workers, run.device)
    warmup_steps = args.warmup * len(images) / args.batch

    for step in range(run.done, args.steps):
        # Everything random is drawn for the global batch, and each micro-batch takes its rows: more
        # processes or smaller micro-batches change the speed, not the run. (Of an SD-VAE they do:
        # D's batch norm and the adaptive weight see a micro-batch.)
        draws = net.randomness(args.batch, args.image_size, run.generator(step))
        with_disc = adversarial and step + 1 >= args.disc_start
        totals = {}

        for rows in run.slices:
            x, _ = next(batches)
            draw = {name: values[rows] for name, values in draws.items()}
            # DDP averages gradients over the processes, once per step.
            model.require_backward_grad_sync = rows == run.slices[-1]

            with run.autocast():
                loss, terms, x_hat = model(x, perceptual=perceptual, **draw)
                if with_disc:  # the third term of eq. 6
                    last_layer = net.decoder.conv_out.weight
                    adv_loss, loss_d, adv_terms = ae.adversarial_losses(
                        disc, x, x_hat, loss, last_layer, args.disc_weight, args.disc_loss
                    )
                    loss = loss + adv_loss
                    terms |= adv_terms

            (loss / len(run.slices)).backward()
            if with_disc:
                (loss_d / len(run.slices)).backward()
            for name, term in {"loss": loss.detach(), **terms}.items():
                totals[name] = totals.get(name, 0) + term / len(run.slices)

        optimizers = [optimizer]
        if with_disc:
            run.average_gradients(disc)
            optimizers.append(disc_optimizer)
        run.update(optimizers, run.learning_rate(step, warmup_steps), totals)

        run.listen()
        if run.save_due():
            run.save(kind="autoencoder", name=args.model, config=config, images=len(images))
            run.draw(lambda: draw_reconstructions(net, preview, run))
        if run.ending:
            break
    run.finish("recon.png")


def build(args, init=None, config=None):
    """The autoencoder that the flags describe, and its class's arguments, which checkpoints keep.

    init: a checkpoint of a model of the same sizes, whose weights it gets; --tune_decoder also
    takes its sizes. config: the arguments, of a run that is resumed. Raises UserError if the flags
    or the checkpoint do not fit.
    """
    model = ae.MODELS[args.model]
    tune = args.model == "vmae" and args.tune_decoder
    if tune and not config and not os.path.exists(init):
        raise UserError(
            f"--tune_decoder is VMAE's last stage, and there is no first one in {init}: train it, "
            "or name a checkpoint with --init"
        )
    start = ae.load(init) if init else None
    if tune and start and start.recipe["name"] != "vmae":
        raise UserError(f"--tune_decoder is VMAE's last stage, {init} is of another model")
    if config is None:
        config = {name: getattr(args, name) for name in ARGUMENTS if name in args}
        config["weights"] = {name: getattr(args, name) for name in model.weights if name in args}
        if tune:
            # The KL is no term of this stage, but its weight says whether the latent is the mean.
            config["weights"]["kl"] = start.weights["kl"]
            config = start.recipe["config"] | config
    net = model(**config)
    net.latent_shape(args.image_size, args.image_size)  # raises if the size does not fit

    if tune:
        net.mask_token.requires_grad_(False)  # nothing is masked
        if args.freeze_encoder:
            net.requires_grad_(False)
            for name, module in net.named_children():
                module.requires_grad_(name == "from_latent" or name.startswith("decoder"))

    if start:
        state = start.state_dict()
        if start.masked and net.masked:
            state = ae.resize_positions(state, net.grid)
        # Heads leave no trace in the shapes; 12 is the default of the class.
        heads = [c.get("num_heads", 12) for c in (start.recipe["config"], config)]
        if shapes(state) != shapes(net.state_dict()) or heads[0] != heads[1]:
            raise UserError(
                f"--init {init} is of another model or of other sizes than the flags say: "
                f"it holds a {start.recipe['name']} of {start.recipe['config']}"
            )
        net.load_state_dict(state)
    return net, config


def shapes(state):
    return {name: tensor.shape for name, tensor in state.items()}


def make_optimizer(net, args):
    """AdamW on what of net is trained; biases and norms, which have one dimension, do not decay."""
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, args.lr, args.betas, fused=True)


def compile_for_training(net, adversarial):
    """torch.compile, in place.

    adaptive_weight takes gradients at the decoder's last layer, which must be left as it is: of an
    SD-VAE only what comes before that is compiled.
    """
    parts = [net]
    if adversarial:
        parts = [net.encoder, net.decoder.mid_block, *net.decoder.up_blocks]
    # DDP's own splitting of the graph has computed wrong gradients (PyTorch 2.4). Sizes never
    # change in training; if they may, all levels of an SD-VAE share a graph of symbolic sizes,
    # which 2.8 fails to compile.
    torch._dynamo.config.optimize_ddp = False
    for part in parts:
        part.compile(dynamic=False)


def training_flops(net, size, lpips=None, disc=None):
    """FLOPs of forward and backward pass of all that trains or judges one image."""
    net, lpips, disc = (copy.deepcopy(part) for part in (net, lpips, disc))
    for part in (net, lpips, disc):
        if part is not None:
            part.to("meta")  # where nothing is computed

    def forward_and_backward():
        x = torch.zeros(1, 3, size, size, device="meta")
        loss, _, x_hat = net(x, perceptual=lpips)
        if disc is not None:
            last_layer = net.decoder.conv_out.weight
            adv, loss_d, _ = ae.adversarial_losses(disc, x, x_hat, loss, last_layer)
            loss_d.backward()
            loss = loss + adv
        loss.sum().backward()

    return count_flops(forward_and_backward)


# ---- Pictures ----


def preview_images(images, crop, workers, device):
    """Ten images for pictures (10, 3, S, S), spread over all; crop is a transform of Batches."""
    keys = [[(i * len(images) // 10, 0, False) for i in range(10)]]
    return next(load_batches(Batches(images, crop), keys, workers, device))[0]


@torch.no_grad()
def draw_reconstructions(net, x, run):
    """recon.png: originals, reconstructions; with masking also what the encoder sees in training
    and what the decoder makes of it."""
    # A copy is not compiled, so that the pictures' batch does not compile everything once more.
    net = copy.deepcopy(net)
    pictures = {"original": x, "reconstruction": net.decode(net.encode(x).mode())}
    if "mask_ratio" in run.args:
        draws = net.randomness(len(x), net.image_size, generator(run.device, run.args.seed))
        prediction, _, mask = net.masked_pass(x, **draws)
        mask = mask.view(-1, 1, net.grid, net.grid)
        mask = F.interpolate(mask, scale_factor=net.patch_size)  # of pixels
        pictures["masked input"] = x * (1 - mask)
        pictures["prediction"] = torch.where(mask > 0, prediction, x)
    rows = [ae.to_uint8(images) for images in pictures.values()]
    ae.save_grid(os.path.join(run.args.out, "recon.png"), rows, list(pictures))


# =================================================================================================
# Shared with train_dit.py: flags and their settling, the run, images and batches
# =================================================================================================

SIGNALS = (signal.SIGTERM, signal.SIGINT)  # end a training run after its step

# Dense products in bfloat16 that GPUs can do, in TFLOP/s, from their makers' data sheets.
PEAKS = {
    "A10": 125,
    "A30": 165,
    "A40": 150,
    "A100": 312,
    "L4": 121,
    "L40": 181,
    "L40S": 362,
    "H100": 989,
    "H100 PCIe": 756,
    "H200": 989,
    "B200": 2250,
    "RTX 3090": 71,
    "RTX 4090": 165,
    "RTX 5090": 209,
    "RTX A6000": 155,
    "RTX 6000 Ada": 364,
}

# Flags that may differ from those of the run that --resume goes on with.
FREE_ON_RESUME = {
    *("data", "cache", "out", "resume", "device", "dtype", "compile", "workers"),
    *("steps", "micro_batch", "lr", "grad_clip", "log_every", "ckpt_every", "keep_every"),
}


class Help(argparse.RawDescriptionHelpFormatter):
    """--help, with the default of each flag in the demo and with the paper's settings."""

    def __init__(self, prog, demo, paper):
        super().__init__(prog, max_help_position=28, width=100)
        self.demo, self.paper = demo, paper

    def _get_default_metavar_for_optional(self, action):
        return action.type.__name__.upper() if action.type else "NAME"

    def _get_help_string(self, action):
        demo, paper = (in_words(action.dest, recipes) for recipes in (self.demo, self.paper))
        if not paper:
            return action.help
        defaults = f"demo: {demo or 'none'}; paper: {paper}"
        if demo == paper:
            defaults = f"default: {paper}"
        return f"{action.help} ({defaults})".replace("%", "%%")


def in_words(name, recipes):
    """A setting's values in recipes by name, such as "20 (conv), 400 (vit)"; "" if it has none."""
    owners = {}
    for owner, recipe in recipes.items():
        value = recipe.get(name)
        if value is not None and value is not False and value is not True:
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            owners.setdefault(text, []).append(owner)
    elsewhere_none = any(name in recipe and recipe[name] is None for recipe in recipes.values())
    if len(owners) < 2 and not elsewhere_none:
        return "".join(owners)
    families = {"ae dae vae sdvae": "conv", "mae vmae": "vit", "mae vmae tune": "vit"}
    families["ae dae vae sdvae mae vmae"] = "first stage"
    names = {text: " ".join(found) for text, found in owners.items()}
    return ", ".join(f"{text} ({families.get(found, found)})" for text, found in names.items())


def new_parser(doc, demo, paper):
    """A parser with the flags of both training scripts, and add_argument of their group.

    It has no defaults: they are settled later. demo, paper: recipes by name, for --help.
    """
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=functools.partial(Help, demo=demo, paper=paper),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        usage="%(prog)s [flags]",
        epilog="demo: without --data; paper: with it. Where the defaults come from: see the "
        "recipes at the top of\nthe script.",
    )

    def refuse(message):
        raise UserError(message)

    parser.error = refuse
    add = parser.add_argument_group("run").add_argument
    add("--data", help="folder of images (default: the demo's digits)")
    add("--resume", action="store_true", help="go on from --out's checkpoint, with its settings")
    add("--seed", type=at_least(0), help="of everything random")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--dtype", choices=("float32", "bfloat16"), help="of products (default: bfloat16 on cuda)")
    add("--compile", **SWITCH, help="torch.compile (default: 1 on cuda)")
    add("--workers", type=at_least(0), help="processes per rank that load images or latents")
    add("--log_every", type=at_least(1), help="steps between log lines")
    add("--keep_every", type=at_least(1), help="steps between numbered files of the weights")
    return parser, add


def settle(parser, recipe_of, kind):
    """(args, ckpt) from the command line; ckpt is the checkpoint to resume, of this kind, or None.

    A flag that is not given takes the run's value when resuming, else the recipe's. recipe_of:
    flags -> settings, whose they are. args.given holds the names of the flags that were given.
    Raises UserError, before anything is written.
    """
    flags = vars(parser.parse_args())
    recipe, owner = recipe_of(flags)
    args = recipe | flags
    if "out" not in flags:
        args["out"] = args["out"].format(model=args.get("model"))
    path, ckpt, allowed = os.path.join(args["out"], "ckpt.pt"), None, recipe.keys()

    if args.get("resume"):
        ckpt = read_latest(path)
        if ckpt.get("kind") != kind or "args" not in ckpt:
            raise UserError(
                f"{path} is of kind {ckpt.get('kind')}, not {kind}, which this script resumes: "
                "check --out"
            )
        if "optimizer" not in ckpt:
            raise UserError(
                f"{path} is a numbered file, which has no optimiser to resume: start from it with "
                "--init"
            )
        saved = ckpt["args"]
        for name in sorted(flags.keys() & saved.keys() - FREE_ON_RESUME):
            if flags[name] != saved[name]:
                raise UserError(
                    f"{path} is of a run with --{name} {saved[name]}, not {flags[name]}: leave the "
                    "flag out to resume it, or start afresh in another --out"
                )
        # Paths that a file names are never opened: they have to be given again.
        paths = {name: args[name] for name in ("out", "data", "cache") if name in args}
        for name, value in paths.items():
            if saved[name] and not value:
                raise UserError(
                    f"{path} is of a run with --{name} {saved[name]}: to resume, name the folder "
                    "again"
                )
        # What the checkpoint does not hold, such as --device, comes from the recipe of its model.
        selects = {k: saved[k] for k in ("model", "data", "tune_decoder") if saved.get(k)}
        recipe, owner = recipe_of(selects | flags)
        args = recipe | saved | flags | paths
        allowed = saved.keys() | FREE_ON_RESUME
    elif "eval" not in args and (os.path.exists(path) or os.path.exists(previous(path))):
        raise UserError(f"{path} exists: go on with --resume, or choose another --out")

    for name in sorted(flags.keys() - allowed):
        hint = ""
        if name in EVAL and "eval" not in flags:
            hint = ", only of --eval: to start from a checkpoint, name it with --init"
        raise UserError(f"--{name} is not a flag of {owner}{hint}")
    return argparse.Namespace(**args, given=set(flags)), ckpt


def settings(args):
    """What a checkpoint keeps of the flags: plain values by name."""
    return {k: v for k, v in vars(args).items() if k not in ("given", "resume", "device")}


def previous(path):
    return path.removesuffix(".pt") + ".previous.pt"


def read_latest(path):
    """The checkpoint to resume: ckpt.pt, or the one before if that is damaged or missing."""
    try:
        return ae.read_checkpoint(path)
    except UserError as error:
        if not os.path.exists(previous(path)):
            raise
        warn(f"{error}; going on from the one before, {previous(path)}")
        # ckpt.pt is damaged, so it must not take the place of the good one before it.
        return {**ae.read_checkpoint(previous(path)), "damaged": True}


def finished(args, ckpt, images):
    """True, and says so, if the run of ckpt is complete. Raises UserError for other images."""
    n, classes = len(images), images.classes
    if (ckpt["images"], ckpt.get("class_names", classes)) != (n, classes):
        raise UserError(
            f"--resume: the run had {ckpt['images']} images, --data holds {n}, or other classes"
        )
    complete = ckpt["step"] >= args.steps
    if complete and rank_and_world()[0] == 0:
        print(f"{args.out} is finished, at step {ckpt['step']}")
    return complete


def join_processes(args):
    """Make --out and join the other processes -> rank, world, device ("cpu" or "cuda:N")."""
    rank, world = rank_and_world()
    device = ae.choose_device(args.device)
    ae.make_folder(args.out)
    if world > 1:
        # gloo for what is on the CPU. The others wait while rank 0 draws pictures, or while one
        # process fills the last shard of a cache: hours, not NCCL's ten minutes.
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=6))
    return rank, world, device


def seed_of(*key):
    """Integers, such as (seed, epoch, index) -> one seed."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def generator(device, *key):
    """The source of all that is random under this key, such as (seed, step)."""
    return torch.Generator(device).manual_seed(seed_of(*key))


def count_flops(function):
    """FLOPs of a call, a multiply and an add counted as two."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def gflops(module, *inputs, method="forward"):
    """GFLOPs of one call, on PyTorch's meta device, where nothing is computed."""
    module, inputs = copy.deepcopy(module).to("meta"), [x.to("meta") for x in inputs]
    with torch.no_grad():
        return count_flops(lambda: getattr(module, method)(*inputs)) / 1e9


def peak_of(gpu):
    """Dense bfloat16 FLOP/s of a GPU by its name, such as "NVIDIA A100-SXM4-40GB", or None."""
    # Not a card of another make that has the name in its own, nor a slice of a card.
    names = [name for name in PEAKS if re.search(rf"\b{name}\b(?! (Laptop|Ti|D|NVL)\b)", gpu)]
    return PEAKS[max(names, key=len)] * 1e12 if names and "MIG" not in gpu else None


class Run:
    """A training run: its processes, device and precision, its share of each global batch, its
    learning rate, its steps, log and checkpoints, and the signals that end it.

    Only a step that is logged or saved waits for the device. Raises UserError if the batch does not
    divide or the device is not there.
    """

    def __init__(self, args):
        self.args = args
        rank, world = rank_and_world()
        share = args.batch // world  # images of this process in a step
        if args.batch % world:
            raise UserError(f"--batch {args.batch} does not divide over {world} processes")
        if "micro_batch" in args.given and share % args.micro_batch:
            raise UserError(
                f"--micro_batch {args.micro_batch} does not divide the {share} images of a process "
                "in a step"
            )
        largest = min(args.micro_batch, share)
        args.micro_batch = max(m for m in range(1, largest + 1) if share % m == 0)
        self.slices = slices_of(share, args.micro_batch, rank)

        self.rank, self.world, self.device = join_processes(args)
        on_gpu = self.device != "cpu"
        # GPUs before Ampere have no bfloat16 products.
        ampere = on_gpu and torch.cuda.get_device_capability(self.device) >= (8, 0)
        self.bfloat16 = ampere if args.dtype is None else args.dtype == "bfloat16"
        self.compiled = on_gpu if args.compile is None else bool(args.compile)
        missing = missing_for_compile(self.device)
        if self.compiled and missing:
            self.compiled = False
            if self.rank == 0:
                warn(f"torch.compile needs {missing}, which is not here: training goes on without")

    def introduce(self, images, net, training_flops):
        """Print the settings in force, the data, the network and its cost per image in training."""
        args, self.training_flops = self.args, training_flops  # for the log's MFU, too
        print("demo settings (no --data given)" if args.data is None else "paper settings")
        print("  ".join(f"{name} {value}" for name, value in settings(args).items()))
        print(
            f"{len(images):,} images of {len(images.classes)} classes, "
            f"{args.data or 'the bundled digits'}; {args.steps:,} steps of {args.batch} images, "
            f"{args.micro_batch} at once"
        )
        parameters = sum(p.numel() for p in net.parameters())
        print(
            f"{args.model}: {parameters:,} parameters, {parameters * 4 / 2**20:.1f} MiB in "
            f"float32, {training_flops / 1e9:.4g} GFLOPs per image in training"
        )
        print(
            f"{self.world} processes on {self.device}, "
            f"{'bfloat16' if self.bfloat16 else 'float32'}{', compiled' if self.compiled else ''}",
            flush=True,
        )

    def begin(self, ckpt, **parts):
        """Start counting, from ckpt if there is one.

        parts: the modules and optimisers that checkpoints hold, by name; they get ckpt's state.
        """
        self.parts = parts
        if ckpt:
            for name, part in parts.items():
                part.load_state_dict(ckpt[name])
        self.done = ckpt["step"] if ckpt else 0  # steps taken or skipped
        skipped = ckpt["skipped"] if ckpt else 0.0
        self.skipped = torch.tensor(skipped, device=self.device)  # steps skipped, in all
        self.skipped_in_row = torch.zeros((), device=self.device)  # up to now
        # The same on the CPU: of a GPU, as it was some steps ago.
        self.skipped_in_row_seen = torch.zeros((), pin_memory=self.device != "cpu")
        self.saved = 0 if ckpt and "damaged" in ckpt else self.done  # the step that ckpt.pt holds

        self.log_path = os.path.join(self.args.out, "log.jsonl")
        if self.rank == 0 and os.path.exists(self.log_path):
            self.trim_log()

        self.ending = self.signalled = False
        self.handlers = {number: signal.signal(number, self.on_signal) for number in SIGNALS}
        self.start_clock()

    def on_signal(self, number, frame):
        self.signalled = True

    def start_clock(self):
        """Speed is measured from here on."""
        self.clock = time.time(), self.done

    def trim_log(self):
        """Drop the log lines after the checkpoint: those steps are run again."""
        with open(self.log_path, "rb") as old, ae.whole_file(self.log_path) as new:
            for line in old:
                try:
                    kept = line.endswith(b"\n") and json.loads(line)["step"] <= self.done
                except (ValueError, TypeError, KeyError):  # blank or broken
                    kept = False
                if kept:
                    new.write(line)

    # ---- What a step needs ----

    def generator(self, *key):
        """The source of all that is random under this key, such as a step; alike everywhere."""
        return generator(self.device, self.args.seed, *key)

    def autocast(self):
        kind = self.device.split(":")[0]
        return torch.autocast(kind, torch.bfloat16, enabled=self.bfloat16)

    def learning_rate(self, step, warmup_steps=0):
        """Linear warm-up from 0, then constant or half a cosine to 0."""
        args = self.args
        if step < warmup_steps:
            return args.lr * step / warmup_steps
        if args.schedule == "constant":
            return args.lr
        angle = math.pi * (step - warmup_steps) / max(1, args.steps - warmup_steps)
        return args.lr * 0.5 * (1 + math.cos(angle))

    def average_gradients(self, module):
        """Over the processes, for a module that DDP does not wrap."""
        if self.world > 1:
            for p in module.parameters():
                dist.all_reduce(p.grad)
                p.grad /= self.world

    # ---- The optimiser step ----

    def update(self, optimizers, lr, terms):
        """Clip, step, count, and log if it is due -> 1.0, or 0.0 if the step was skipped.

        A step with a loss or a gradient that is not finite changes nothing. terms: detached scalars
        of this process, by name.
        """
        norms = [self.clip(optimizer) for optimizer in optimizers]
        values = torch.stack(list(terms.values()))
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        taken = torch.cat([values, torch.stack(norms)]).isfinite().all().float()

        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            # A fused optimiser reads this on the device, as with torch.amp, and does nothing if it
            # is 1: no process has to wait for the number.
            optimizer.found_inf = 1 - taken
            optimizer.step()
            optimizer.zero_grad()
        self.count(taken)
        if self.log_due():
            self.log(dict(zip(terms, values, strict=True)) | {"grad_norm": norms[0]}, lr)
        return taken

    def clip(self, optimizer):
        """Scale gradients that are longer than --grad_clip; returns their norm before that."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return torch.nn.utils.clip_grad_norm_(parameters, self.args.grad_clip)

    def count(self, taken):
        self.done += 1
        self.skipped += 1 - taken
        self.skipped_in_row = (self.skipped_in_row + 1) * (1 - taken)
        self.skipped_in_row_seen.copy_(self.skipped_in_row, non_blocking=True)

    def log_due(self):
        return self.done in (1, self.args.steps) or self.done % self.args.log_every == 0

    def log(self, terms, lr):
        """A line on the screen and in log.jsonl; waits for the device."""
        names = [*terms, "skipped"]
        values = torch.stack([*terms.values(), self.skipped]).tolist()
        if self.rank == 0:
            terms = dict(zip(names, values, strict=True)) | {"lr": lr}
            speed = (self.done - self.clock[1]) * self.args.batch / (time.time() - self.clock[0])
            left = int((self.args.steps - self.done) * self.args.batch / speed)
            usage = self.usage_of_gpu(speed)
            print(
                f"step {self.done}/{self.args.steps}",
                *(f"{name} {value:.4g}" for name, value in terms.items()),
                f"{speed:.0f} images/s",
                *(f"{name} {value:.3g}" for name, value in usage.items()),
                f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left",
                sep="  ",
                flush=True,
            )
            line = {"step": self.done, **terms, **usage}
            line |= {"images_per_s": round(speed, 1), "seconds_left": left}
            try:
                with open(self.log_path, "a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                warn(error)
        self.start_clock()

    def usage_of_gpu(self, speed):
        """Peak memory in GiB, and MFU, the share of the GPU's bfloat16 peak that training reaches.

        speed: images per second, of all processes. Empty on a CPU; no MFU for GPUs that are not in
        PEAKS. An SD-VAE's discriminator is counted from the first step.
        """
        if self.device == "cpu":
            return {}
        usage = {"GiB": torch.cuda.max_memory_allocated(self.device) / 2**30}
        peak = peak_of(torch.cuda.get_device_name(self.device))
        if peak:
            usage["MFU"] = speed * self.training_flops / (self.world * peak)
        return usage

    # ---- After the step ----

    def listen(self):
        """Learn, from all processes, of signals and of too many skipped steps.

        Raises UserError after 20 skipped steps in a row.
        """
        flags = torch.tensor([self.signalled, self.skipped_in_row_seen >= 20], dtype=torch.int)
        if self.world > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)  # on the CPU: it does not wait for a GPU
        self.ending = bool(flags[0])
        if flags[1]:
            raise UserError(
                "20 steps in a row had a loss or a gradient that is not finite and were skipped: "
                "go on from the last checkpoint with --resume and a smaller --lr or --grad_clip 1"
            )

    def save_due(self):
        due = self.done % self.args.ckpt_every == 0 or self.keep_due()
        return self.ending or due or self.done == self.args.steps

    def keep_due(self):
        return bool(self.args.keep_every) and self.done % self.args.keep_every == 0

    def save(self, **ckpt):
        """Write ckpt and the parts as ckpt.pt, and keep the one before as ckpt.previous.pt.

        Every --keep_every steps also a numbered file that stays, without what only --resume needs.
        A disk that is full costs this checkpoint, not the run.
        """
        if self.rank > 0:
            return
        path = os.path.join(self.args.out, "ckpt.pt")
        ckpt |= {"step": self.done, "skipped": self.skipped.item(), "args": settings(self.args)}
        states = {name: part.state_dict() for name, part in self.parts.items()}
        weights = "ema" if "ema" in states else "model"
        try:
            with ae.whole_file(path, keep_old_as=previous(path) if self.saved else None) as file:
                torch.save(ckpt | states, file)
            self.saved = self.done
            if self.keep_due():
                with ae.whole_file(f"{path.removesuffix('.pt')}-{self.done:07}.pt") as file:
                    torch.save(ckpt | {weights: states[weights]}, file)
        except UserError as error:
            warn(f"step {self.done} is not saved, older files stay as they were: {error}")
        self.start_clock()

    def draw(self, function):
        """Call function, which draws the run's picture, unless a signal ends the run.

        A disk or a memory that is full costs the picture, not the run.
        """
        if self.rank > 0 or self.ending:
            return
        try:
            function()
        except (OSError, torch.cuda.OutOfMemoryError) as error:
            warn(f"no picture of step {self.done}: {error}")
        self.start_clock()

    def finish(self, picture):
        """Close the process group and report where the run ended."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.world > 1:
            ae.leave_processes()  # not while rank 0 is still saving
        if self.rank > 0:
            return
        if self.saved < self.done:
            raise UserError("the end of the run is not saved: make room, then go on with --resume")
        if self.ending:
            launch = "python"
            if self.world > 1:
                launch = f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']} --"
                if os.environ["LOCAL_WORLD_SIZE"] != str(self.world):
                    launch = "on each machine, with torchrun's flags as before: torchrun ... --"
            command = shlex.join(sys.argv if self.args.resume else [*sys.argv, "--resume"])
            print(f"stopped by a signal after step {self.done}; to go on:\n{launch} {command}")
        else:
            print(f"wrote {self.args.out}/ckpt.pt and {self.args.out}/{picture}")
        sys.stdout.flush()


SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


class Images:
    """RGB images by index, with .labels and .classes: the demo's digits, or a folder's files.

    Raises UserError for a folder that is missing, empty, or of images beside sub-folders.
    """

    def __init__(self, folder=None, held_out=False):
        self.folder, self.digits = folder, folder is None
        if self.digits:
            self.read_digits(held_out)
        else:
            self.find_files(folder)

    def read_digits(self, held_out):
        # 50 x 100 tiles of 28 x 28, 500 in order for each digit; the last 50 of each are held out.
        sheet = Image.open(os.path.join(os.path.dirname(__file__), "assets", "digits.png"))
        tiles = np.asarray(sheet).reshape(50, 28, 100, 28).swapaxes(1, 2).reshape(10, 500, 28, 28)
        tiles = tiles[:, 450:] if held_out else tiles[:, :450]
        self.files = np.pad(tiles.reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
        self.labels = np.arange(10).repeat(tiles.shape[1])
        self.classes = list("0123456789")

    def find_files(self, folder):
        if not os.path.isdir(folder):
            raise UserError(f"--data {folder}: there is no such folder")
        self.files = sorted(
            os.path.join(root, name)
            for root, _, names in os.walk(folder, followlinks=True)
            for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        )
        if not self.files:
            raise UserError(f"--data {folder} holds no images ({' '.join(SUFFIXES)})")
        # Sub-folders are classes, whatever lies deeper in them; a flat folder is one class, "".
        folders = [os.path.dirname(os.path.relpath(file, folder)) for file in self.files]
        tops = [path.split(os.sep)[0] for path in folders]
        self.classes, self.labels = np.unique(tops, return_inverse=True)
        self.classes = self.classes.tolist()
        if len(self.classes) > 1 and "" in self.classes:
            raise UserError(
                f"--data {folder} holds images both in itself and in sub-folders: move the former"
            )

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        if self.digits:
            return Image.fromarray(self.files[index]).convert("RGB")
        with Image.open(self.files[index]) as image:
            image.load()
            if max(image.size) > 50 * min(image.size):
                raise ValueError("a strip, of which a square crop shows nothing")
            if image.mode.startswith("I"):  # 16-bit grey, which convert would clip at 255
                values = np.asarray(image) >> 8
                image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
            return image if image.mode == "RGB" else image.convert("RGB")


def center_crop(image, size):
    """ADM's crop of a PIL image to size x size: halve with BOX while that leaves at least `size`,
    resize the shorter side to `size` with BICUBIC, cut out the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    scaled = round(image.width * scale), round(image.height * scale)
    image = image.resize(scaled, Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def crop_and_flip(size, mirror, image, index, epoch, flip):
    """A transform of Batches: ADM's crop, flipped if the key says so and `mirror` allows it."""
    pixels = transforms.pil_to_tensor(center_crop(image, size))
    return pixels.flip(-1) if flip and mirror else pixels


def crop_for_judging(size, image, index, epoch, flip):
    """A transform of Batches: the paper's crop for judging reconstructions, floats in [-1, 1].

    The shorter side is resized to `size` bilinearly with antialiasing, without rounding to bytes,
    and the centre is cut out. Its pictures are smoother than those of ADM's crop: the same codec
    gains more than 1 dB on photographs.
    """
    x = transforms.pil_to_tensor(image) / 127.5 - 1
    return transforms.center_crop(transforms.resize(x, [size], antialias=True), [size])


def augment(size, seed, image, index, epoch, flip):
    """A transform of Batches: a random crop by (seed, epoch, index), flipped if the key says so.

    torchvision's RandomResizedCrop of 75 to 100% of the area, resized bicubically.
    """
    torch.default_generator.manual_seed(seed_of(seed, epoch, index))  # get_params draws from it
    top, left, height, width = RandomResizedCrop.get_params(image, (0.75, 1.0), (3 / 4, 4 / 3))
    pixels = transforms.pil_to_tensor(image.crop((left, top, left + width, top + height)))[None]
    # PyTorch's resize takes a third of Pillow's time. It begins with the width and agrees with
    # Pillow to 1/255; one value in a million is off by 2/255.
    pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)[0]
    return pixels.flip(-1) if flip else pixels


def slices_of(share, micro_batch, rank):
    """This process's share of every global batch, as slices of it, one per micro-batch."""
    starts = range(rank * share, (rank + 1) * share, micro_batch)
    return [slice(start, start + micro_batch) for start in starts]


def training_order(args, n, slices, first_step):
    """Yields for each micro-batch of this process the keys (index, epoch, flip) of its images.

    The shuffled epochs, each by (seed, epoch), are concatenated; a step takes the next `batch`
    images. Flips are by (seed, step).
    """

    @functools.lru_cache(2)
    def order(epoch):
        return np.random.default_rng((args.seed, epoch)).permutation(n)

    for step in range(first_step, args.steps):
        flips = torch.rand(args.batch, generator=generator("cpu", args.seed, step, 1)) < 0.5
        for rows in slices:
            keys = []
            for place in range(args.batch)[rows]:
                epoch, position = divmod(step * args.batch + place, n)
                keys.append((int(order(epoch)[position]), epoch, bool(flips[place])))
            yield keys


class Batches(torch.utils.data.Dataset):
    """Micro-batches, each made by one worker: keys [(index, epoch, flip), ...] -> pixels, labels,
    unreadable indices.

    transform(image, index, epoch, flip) -> (3, S, S), uint8 or float in [-1, 1]; pixels
    (B, 3, S, S), labels (B,). An image that cannot be read is replaced by the next one. If more
    than the tolerated share of all images are found unreadable within a micro-batch, pixels and
    labels are 0.
    """

    def __init__(self, images, transform, tolerate=0.01):
        self.images, self.transform = images, transform
        self.limit = tolerate * len(images)  # of unreadable images

    def __getitem__(self, keys):
        pixels, labels, unreadable = [], [], set()
        for index, epoch, flip in keys:
            image = None
            while image is None:
                try:
                    image = self.images[index]
                # What Pillow raises on files that are damaged or no images.
                except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                    unreadable.add(index)
                    if len(unreadable) > self.limit:
                        return 0, 0, sorted(unreadable)
                    index = (index + 1) % len(self.images)
            pixels.append(self.transform(image, index, epoch, flip))
            labels.append(self.images.labels[index])
        return torch.stack(pixels), torch.tensor(labels), sorted(unreadable)


def load_batches(dataset, keys, workers, device):
    """Yields images (B, 3, S, S) in [-1, 1], or what else dataset holds, and labels (B,).

    They are on the device; `workers` processes work ahead. Raises UserError if too many images
    cannot be read or a worker dies.
    """
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        pin_memory=device != "cpu",
        worker_init_fn=ignore_signals,
    )
    unreadable = set()
    try:
        for x, y, newly_unreadable in loader:
            for index in set(newly_unreadable) - unreadable:
                warn(f"{dataset.images.files[index]} cannot be read, skipped")
            unreadable.update(newly_unreadable)
            if len(unreadable) > dataset.limit:
                raise UserError(
                    f"{len(unreadable)} of {len(dataset.images)} images cannot be read, more than "
                    f"{dataset.limit / len(dataset.images):.0%}: remove them"
                )
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            yield x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x, y
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise UserError(
                "a process that loads images died, perhaps for want of memory; try fewer --workers "
                f"({error})"
            ) from error
        raise


def ignore_signals(worker):
    """In loader processes: a signal ends the training loop after its step, and they go with it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# =================================================================================================
# Evaluation of autoencoders: reconstruction, smoothness, compression, cost
# =================================================================================================

EPS = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3)  # of noise on latents, in units of each channel's std


@torch.no_grad()
def evaluate(args):
    """--eval: a Markdown table with a row per checkpoint, eval.json and a picture each in --out.

    The paper's conventions: crop_for_judging; posterior mean; PSNR of uint8 images, averaged; SSIM
    of images clamped to [-1, 1], over a range of 2; LPIPS on unclamped decodings; rFID with
    pytorch-fid's resizing. L1's scale is not stated: the AE's PSNR, 32.18, is a root mean square
    error of 0.025 on [0, 1], 0.049 on [-1, 1]; its L1, 0.0218, goes with the first.
    """
    if not args.ckpt:
        raise UserError("--eval needs --ckpt CKPT [CKPT ...]")
    # All files are read before hours go into the first.
    nets = [ae.load(path) for path in args.ckpt]
    images = Images(args.data, held_out=True)
    masks = find_masks(args.masks) if args.masks else {}
    names = [] if images.digits else map(image_name, images.files)
    if args.masks and not any(name in masks for name in names):
        raise UserError(
            f"--masks {args.masks} holds no NAME.png or 00012_hair.png for the images of --data"
        )
    rank, world, device = join_processes(args)
    if rank == 0:
        print(
            "demo settings (no --data given)" if args.data is None else "paper settings", flush=True
        )

    skipped = []
    lpips = load_if_there("LPIPS", ae.lpips_vgg, device, skipped)
    load_inception = functools.partial(fid.load_inception, args.inception, bool(args.half_pixel))
    inception = load_if_there("rFID", load_inception, device, skipped)

    rows = []
    for path, net in zip(args.ckpt, nets, strict=True):
        net.to(device)
        # A ViT takes images of one size alone.
        size = net.image_size if net.masked else args.image_size or net.image_size
        size = size or (32 if images.digits else 256)
        name = name_of(path, [row["autoencoder"] for row in rows])
        judge = Judge(name, net, size, images, args, device)
        std, segments_found = judge.latents(masks)
        quality = judge.reconstructions(std, lpips, inception)
        if masks:
            quality |= judge.compression(std, segments_found)
        preview = judge.draw(std)
        crop = "ADM" if args.adm_crop else "paper"
        row = {"autoencoder": name, "pixels": size, "crop": crop}
        rows.append(row | judge.cost(preview) | quality)

    if rank == 0:
        print_table(rows)
        print("\n".join(skipped))
        # JSON has no NaN.
        rows = json.loads(json.dumps(rows), parse_constant=lambda nan: None)
        record = {"data": args.data, "ckpt": args.ckpt, "rows": rows, "not computed": skipped}
        Path(args.out, "eval.json").write_text(json.dumps(record, indent=1))
    if world > 1:
        ae.leave_processes()


def load_if_there(measure, load, device, skipped):
    """The network that a measure needs, or None, with the reason added to `skipped`.

    If it cannot be loaded in one process, all do without.
    """
    network, reason = None, None
    try:
        network = load().to(device)
    except (UserError, fid.UserError) as error:
        reason = str(error)
    reasons = [reason]
    if dist.is_initialized():
        reasons = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, reason)
    for reason in reasons:
        if reason:
            skipped.append(f"{measure} is not computed: {reason}")
            return None
    return network


def name_of(path, taken):
    """What a checkpoint is called in the table: its file's name, or its folder's for ckpt.pt.

    The numbered files of a folder keep their numbers: vmae-0056301.
    """
    path = Path(os.path.abspath(path))
    name = path.stem
    if re.fullmatch(r"ckpt(-\d{7})?", name):
        name = path.parent.name + name.removeprefix("ckpt")
    return f"{name}-{len(taken)}" if name in taken else name


def print_table(rows):
    """Rows, dicts of the same keys, as a Markdown table."""

    def show(value):
        if isinstance(value, list):
            return ", ".join(map(show, value))
        if isinstance(value, float):
            return "-" if math.isnan(value) else f"{value:.4g}"
        return str(value)

    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(map(show, row.values())) + " |")


class Judge:
    """Measures one autoencoder on images of size x size pixels, shared out over the processes."""

    def __init__(self, name, net, size, images, args, device):
        self.name, self.net, self.images, self.args, self.device = name, net, images, args, device
        if args.adm_crop:
            self.crop = functools.partial(crop_and_flip, size, False)
        else:
            self.crop = functools.partial(crop_for_judging, size)
        self.rank, self.world = rank_and_world()
        # Micro-batches take turns over the processes.
        indices = torch.arange(len(images)).split(args.micro_batch)[self.rank :: self.world]
        self.indices = [part.tolist() for part in indices]

    def batches(self, title):
        """Yields the indices of a micro-batch and its images (B, 3, S, S); title: of the bar."""
        dataset = Batches(self.images, self.crop, tolerate=0)
        keys = [[(index, 0, False) for index in part] for part in self.indices]
        batches = load_batches(dataset, keys, self.args.workers, self.device)
        parts = tqdm(self.indices, f"{self.name}, {title}", unit="batch", disable=self.rank > 0)
        for part, (x, _) in zip(parts, batches, strict=True):
            yield part, x

    def latents(self, masks):
        """The std (C,) of the latents' channels over all images, and this process's segments.

        A segment is a label in one image: (label, fid.power_sums of its latents).
        """
        sums = torch.zeros(3, self.net.latent_dim, dtype=torch.float64, device=self.device)
        found = []
        for indices, x in self.batches("latents"):
            for index, z in zip(indices, self.net.encode(x).mode(), strict=True):
                sums += fid.power_sums(z.flatten(1))
                files = masks.get(image_name(self.images.files[index]), []) if masks else []
                for label, mask in segments(files, z.shape[-1]):
                    inside = z[:, torch.from_numpy(mask).to(z.device)]
                    found.append((label, fid.power_sums(inside).cpu()))
        n, total, squares = fid.all_reduce(sums)
        return ((squares - total**2 / n) / (n - 1)).sqrt(), found

    def perturbed(self, x, std, indices):
        """Decodings of posterior mean + eps * std * N(0, 1), for each of EPS.

        The noise of an image is by (seed, index), the same for each eps.
        """
        z = self.net.encode(x).mode()
        noise = [
            torch.randn(z.shape[1:], generator=generator("cpu", self.args.seed, index))
            for index in indices
        ]
        noise = torch.stack(noise).to(z.device) * std.float().view(-1, 1, 1)
        return [self.net.decode(z + eps * noise).float() for eps in EPS]

    def reconstructions(self, std, lpips, inception):
        """L1, PSNR, SSIM, LPIPS and rFID, without noise on the latents and with it."""
        sums = {
            name: torch.zeros(len(EPS), dtype=torch.float64, device=self.device)
            for name in ("L1", "PSNR", "SSIM", "LPIPS")
        }
        real = fid.Statistics(2048, self.device)
        decoded = [fid.Statistics(2048, self.device) for _ in EPS]
        for indices, x in self.batches("reconstructions"):
            original = self.to_bytes(x)
            if inception:
                real.update(inception(original)[0])
            for k, x_hat in enumerate(self.perturbed(x, std, indices)):
                result = self.to_bytes(x_hat)
                mse = (result.double() - original.double()).square().mean((1, 2, 3))
                psnr = 10 * torch.log10(255**2 / mse.clamp(min=1e-10))
                sums["L1"][k] += ((x_hat - x).abs().mean((1, 2, 3)) / 2).double().sum()
                sums["PSNR"][k] += psnr.sum()
                sums["SSIM"][k] += fid.ssim(x_hat.clamp(-1, 1), x).sum()
                sums["LPIPS"][k] += lpips(x_hat, x).double().sum() if lpips else math.nan
                if inception:
                    decoded[k].update(inception(result)[0])

        means = {name: (fid.all_reduce(s) / len(self.images)).tolist() for name, s in sums.items()}
        means["rFID"] = [math.nan] * len(EPS)
        if inception:
            real = real.finish()
            means["rFID"] = [fid.frechet_distance(*real, *fake.finish()) for fake in decoded]
        quality = {name: values[0] for name, values in means.items()}
        quality[f"PSNR at eps {EPS[1:]}"] = means["PSNR"][1:]
        quality["LPIPS at them"] = means["LPIPS"][1:]
        quality["rFID at them"] = means["rFID"][1:]
        return quality

    def to_bytes(self, x):
        """Images as they would be saved: uint8 (B, 3, H, W), on the device."""
        return torch.from_numpy(ae.to_uint8(x)).permute(0, 3, 1, 2).to(self.device)

    def compression(self, std, found):
        """sigma2 and rho of the segments that all processes found."""
        gathered = [found]
        if self.world > 1:
            gathered = [None] * self.world
            dist.all_gather_object(gathered, found)
        found = [segment for part in gathered for segment in part]
        if not found:
            raise UserError(f"--masks {self.args.masks}: no label image of these has a label in it")
        labels, sums = zip(*found, strict=True)
        return fid.compression(labels, torch.stack(sums), std.cpu())

    def draw(self, std):
        """Save a picture of ten images with noise on their latents; returns the images."""
        x = preview_images(self.images, self.crop, self.args.workers, self.device)
        columns = [ae.to_uint8(image) for image in [x, *self.perturbed(x, std, range(len(x)))]]
        if self.rank == 0:
            titles = ["original", *(f"eps {eps:g}" for eps in EPS)]
            path = os.path.join(self.args.out, f"{self.name}.png")
            ae.save_grid(path, np.stack(columns, 1), [""] * len(x), titles)
        return x

    def cost(self, x):
        """Parameters, their size, FLOPs and speed of encoding and decoding x (B, 3, S, S)."""
        start = time.time()  # the pictures have warmed up
        for _ in range(3):
            z = self.net.encode(x).mode()
            self.net.decode(z).sum().item()  # waits for the device
        speed = 3 * len(x) / (time.time() - start)
        parameters = sum(p.numel() for p in self.net.parameters())
        return {
            "parameters": parameters,
            "MiB": parameters * 4 / 2**20,
            "GFLOPs encode": gflops(self.net, x[:1], method="encode"),
            "decode": gflops(self.net, z[:1], method="decode"),
            "images/s": speed,
        }


def image_name(path):
    """A file's name, without leading zeros if it is a number.

    CelebAMask-HQ's images do not have them, its masks do.
    """
    name = Path(path).stem
    return str(int(name)) if name.isdecimal() else name


def find_masks(folder):
    """Label images, by the name of the image they belong to: lists of (file, part).

    ADE20K's NAME.png, whose values are labels (part ""), and CelebAMask-HQ's 00012_hair.png, the
    part "hair" of image 12.
    """
    masks = {}
    pattern = os.path.join(glob.escape(folder), "**", "*.png")
    for file in sorted(glob.glob(pattern, recursive=True)):
        name = Path(file).stem
        number, _, part = name.partition("_")
        if part and number.isdecimal():
            name = number
        else:
            part = ""
        masks.setdefault(image_name(name), []).append((file, part))
    return masks


def segments(files, grid):
    """Yields (label, mask) for each label of an image's label images.

    The label image is cropped as both crops of images do it, to the square in its centre, and each
    cell of the grid has the label at its own centre. files: (file, part) of find_masks; mask:
    boolean (grid, grid). Value 0 is no label. Raises UserError for label images in colour.
    """
    for file, part in files:
        with Image.open(file) as image:
            image = image.convert("L") if part else image
            values = np.asarray(ImageOps.fit(image, (grid, grid), Image.NEAREST))
        if values.ndim > 2:
            raise UserError(
                f"--masks: {file} is in colour; a label image has one value per pixel, the label"
            )
        for value in np.unique(values[values > 0]):
            yield part or int(value), values == value


if __name__ == "__main__":
    main()
