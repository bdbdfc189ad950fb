"""The six autoencoders of the paper (supplement, section A), their objectives, and the loading of weights.

    AE (eq. 3)   DAE (eq. 4)   VAE (eq. 5)   SDVAE (eq. 6)      convolutional, the Stable Diffusion 3 VAE
    MAE (eq. 7)  VMAE (main paper, section 4)                   ViT with masking

    encode(x) -> Posterior      x (B, 3, H, W) in [-1, 1] -> (B, C, H/f, W/f); ValueError if H, W do not fit
    decode(z) -> images         z (B, C, H/f, W/f) -> (B, 3, H, W), about [-1, 1], not clamped
    forward(x, noise=None, ids_shuffle=None, perceptual=None) -> loss, terms, reconstruction

forward *is* the objective, so that DDP and torch.compile see all of it: the sum of `terms` (detached scalars)
times model.weights. Reconstruction terms are means over values, KL terms are summed over channels, averaged
over positions and images. Its random numbers may be handed in: noise is standard normal in the shape of the
latents (VAE, SDVAE; VMAE: (B, keep, C), in the order of the visible tokens) or of the image (DAE);
ids_shuffle (B, L) permutes each image's patches, the first `keep` are visible. randomness(n, size, generator)
draws them for n images of size x size pixels. perceptual is a callable (x_hat, x) -> scalar like LPIPS.
"""

import argparse
import contextlib
import fnmatch
import json
import math
import os
import pickle
import struct
import sys
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

# what reading a file raises that is no checkpoint, or lost a part
NO_CHECKPOINT = (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, struct.error,
                 AttributeError, TypeError, OverflowError, zipfile.BadZipFile)

class Posterior:
    """A diagonal Gaussian over latents, float32; moments hold mean, then log-variance, along `dim`."""
    def __init__(self, moments, deterministic=False, dim=1):
        self.mean, logvar = moments.float().chunk(2, dim)
        self.logvar = logvar.clamp(-30, 20)
        self.deterministic = deterministic   # AE, DAE and MAE: a sample is the mean
    def sample(self, noise=None):
        if self.deterministic:
            return self.mean
        noise = torch.randn_like(self.mean) if noise is None else noise
        return self.mean + torch.exp(0.5 * self.logvar) * noise
    def mode(self):
        return self.mean

def kl_normal(mean, logvar, dim=1):
    """KL(N(mean, e^logvar) || N(0, 1)), eqs. 5 and 6: summed over dim, mean of the rest."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim).mean()

def kl_unit(logvar, prior_std=1.0, dim=-1):
    """VMAE's KL, the mean left free: 1/2 (var/s^2 - 1 - log var/s^2), summed over dim, mean of the rest."""
    logvar = logvar - 2 * math.log(prior_std)
    return 0.5 * (logvar.exp() - 1 - logvar).sum(dim).mean()

def objective(model, terms, x, x_hat, perceptual):
    """What every forward returns: the terms and LPIPS weighted and summed, the terms detached, the images."""
    if perceptual is not None:
        terms["lpips"] = perceptual(x_hat, x)
    weights = {"recon": 1.0, **model.weights}
    loss = sum(weights[name] * term for name, term in terms.items())
    return loss, {name: term.detach() for name, term in terms.items()}, x_hat

# ---- The convolutional backbone: the Stable Diffusion 3 VAE, tensor names of diffusers' AutoencoderKL ----

def named(**layers):
    """One layer after the other, under the names that their tensors have in checkpoints."""
    return nn.Sequential(OrderedDict(layers))

class ResnetBlock(nn.Module):
    """(B, a, H, W) -> (B, b, H, W)."""
    def __init__(self, a, b):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, a, eps=1e-6)
        self.conv1 = nn.Conv2d(a, b, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, b, eps=1e-6)
        self.conv2 = nn.Conv2d(b, b, 3, padding=1)
        self.conv_shortcut = nn.Identity() if a == b else nn.Conv2d(a, b, 1)
    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))

class SpatialAttention(nn.Module):
    """Self-attention over the H * W positions, one head."""
    def __init__(self, channels):
        super().__init__()
        self.group_norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)   # (B, 1, H * W, C)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h).squeeze(1).transpose(1, 2).reshape(x.shape)

class Level(nn.Module):
    """`depth` residual blocks; "middle" has attention after the first, "down" halves, "up" doubles H, W."""
    def __init__(self, a, b, depth, kind):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(b if i else a, b) for i in range(depth))
        self.attentions = nn.ModuleList([SpatialAttention(b)] if kind == "middle" else [])
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        if kind == "down":   # padded right and below
            self.downsamplers.append(named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(b, b, 3, stride=2)))
        if kind == "up":
            upsample = nn.Upsample(scale_factor=2.0)
            self.upsamplers.append(named(upsample=upsample, conv=nn.Conv2d(b, b, 3, padding=1)))
    def forward(self, x):
        x = self.resnets[0](x)
        for layer in (*self.attentions, *self.resnets[1:], *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x

def levels(channels, depth, kind):
    """Level after level through the widths; all but the last change the resolution."""
    steps = zip([channels[0], *channels], channels, [kind] * (len(channels) - 1) + [None])
    return nn.Sequential(*(Level(a, b, depth, kind) for a, b, kind in steps))

class AE(nn.Module):
    """Autoencoder, eq. 3: |x - g(f(x))|^2. Also what DAE, VAE and SDVAE are built on."""
    deterministic = True
    weights = {"lpips": 0.0}

    def __init__(self, channels=(128, 256, 512, 512), latent_dim=16, recon="mse", weights=()):
        super().__init__()
        if any(width % 32 for width in channels):
            raise ValueError(f"channels {channels} are not multiples of 32")
        self.weights = self.weights | dict(weights)   # those not given are the class's
        self.recon = {"mse": F.mse_loss, "l1": F.l1_loss}[recon]   # eq. 3's, VQGAN's
        self.patch_size = 2 ** (len(channels) - 1)   # f, the pixels on a side of a latent position
        self.latent_dim = latent_dim
        self.encoder = named(conv_in=nn.Conv2d(3, channels[0], 3, padding=1),
                             down_blocks=levels(channels, 2, "down"),
                             mid_block=Level(channels[-1], channels[-1], 2, "middle"),
                             conv_norm_out=nn.GroupNorm(32, channels[-1], eps=1e-6), conv_act=nn.SiLU(),
                             conv_out=nn.Conv2d(channels[-1], 2 * latent_dim, 3, padding=1))
        self.decoder = named(conv_in=nn.Conv2d(latent_dim, channels[-1], 3, padding=1),
                             mid_block=Level(channels[-1], channels[-1], 2, "middle"),
                             up_blocks=levels(channels[::-1], 3, "up"),
                             conv_norm_out=nn.GroupNorm(32, channels[0], eps=1e-6), conv_act=nn.SiLU(),
                             conv_out=nn.Conv2d(channels[0], 3, 3, padding=1))
        self.to(memory_format=torch.channels_last)   # a tenth faster on a CPU
    def randomness(self, n, size, generator):
        return {}
    def encode(self, x):
        if any(side % self.patch_size for side in x.shape[-2:]):
            raise ValueError(f"image size {tuple(x.shape[-2:])} is not a multiple of {self.patch_size}")
        return Posterior(self.encoder(x), self.deterministic)
    def decode(self, z):
        return self.decoder(z)
    def forward(self, x, noise=None, ids_shuffle=None, perceptual=None):
        x_hat = self.decode(self.encode(x).mode())
        return objective(self, {"recon": self.recon(x_hat.float(), x)}, x, x_hat, perceptual)

class DAE(AE):
    """Denoising autoencoder, eq. 4, p_c(x~|x) = N(x, noise_std^2): the input is noised, the target is not."""
    def __init__(self, *args, noise_std=0.1, **kwargs):
        super().__init__(*args, **kwargs)
        self.noise_std = noise_std
    def randomness(self, n, size, generator):
        return {"noise": torch.randn(n, 3, size, size, generator=generator, device=generator.device)}
    def forward(self, x, noise=None, ids_shuffle=None, perceptual=None):
        noise = torch.randn_like(x) if noise is None else noise
        x_hat = self.decode(self.encode(x + self.noise_std * noise).mode())
        return objective(self, {"recon": self.recon(x_hat.float(), x)}, x, x_hat, perceptual)

class VAE(AE):
    """Variational autoencoder, eq. 5: -log p(x|z), Gaussian, + lambda_KL * KL(q(z|x) || N(0, 1))."""
    deterministic = False
    weights = {"kl": 1e-4, "lpips": 0.0}

    def randomness(self, n, size, generator):
        shape = (n, self.latent_dim, size // self.patch_size, size // self.patch_size)
        return {"noise": torch.randn(shape, generator=generator, device=generator.device)}
    def forward(self, x, noise=None, ids_shuffle=None, perceptual=None):
        posterior = self.encode(x)
        x_hat = self.decode(posterior.sample(noise))
        terms = {"recon": self.recon(x_hat.float(), x), "kl": kl_normal(posterior.mean, posterior.logvar)}
        return objective(self, terms, x, x_hat, perceptual)

class SDVAE(VAE):
    """Stable Diffusion's VAE, eq. 6. train_ae.py, which trains D, adds adaptive_weight * generator_loss."""
    weights = {"kl": 5e-9, "lpips": 1.0}

class Discriminator(nn.Sequential):
    """VQGAN's PatchGAN, 3 layers from 64 channels: images (B, 3, H, W) -> logits (B, 1, H/8 - 2, W/8 - 2)."""
    def __init__(self):
        layers = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2)]
        for a, b, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
            layers += [nn.Conv2d(a, b, 4, stride, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
        super().__init__(OrderedDict(main=nn.Sequential(*layers, nn.Conv2d(512, 1, 4, 1, 1))))
        for module in self.main:
            module.track_running_stats = False   # running averages are of no use, and would keep a NaN
            if not isinstance(module, nn.LeakyReLU):   # convolutions around 0, batch norms around 1
                nn.init.normal_(module.weight, float(isinstance(module, nn.BatchNorm2d)), 0.02)

def disc_loss(real_logits, fake_logits, kind="hinge"):
    """The adversarial term of eq. 6 as D minimises it: "vanilla" the equation's, "hinge" VQGAN's default."""
    if kind not in ("hinge", "vanilla"):
        raise ValueError(f'kind is "hinge" or "vanilla", not "{kind}"')
    penalty = F.softplus if kind == "vanilla" else lambda logits: F.relu(1 + logits)
    return 0.5 * (penalty(-real_logits).mean() + penalty(fake_logits).mean())

def generator_loss(fake_logits):
    """The adversarial term as the autoencoder minimises it, in both variants."""
    return -fake_logits.mean()

def adaptive_weight(loss, adv, last_layer):
    """VQGAN's factor, which gives both gradients one norm at the decoder's last weight (no KL reaches it)."""
    norm = lambda term: torch.autograd.grad(term, last_layer, retain_graph=True)[0].norm()
    return (norm(loss) / (norm(adv) + 1e-4)).clamp(0, 1e4)

# ---- The ViT backbone: MAE and VMAE, tensor names of the authors' release ----

def position_table(dim, grid):
    """Fixed 2-D sin-cos positions (1, grid^2, dim): half of the channels for the column, half for the row."""
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega   # (grid, dim / 4)
    axis = torch.cat([angles.sin(), angles.cos()], 1)                   # (grid, dim / 2)
    return torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)], 1).float()[None]

class Block(nn.Module):
    """A pre-norm transformer block, (B, L, D) -> (B, L, D)."""
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = named(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim))
    def forward(self, x):
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)   # each (B, heads, L, D / heads)
        x = x + self.attn["proj"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))

class MAE(nn.Module):
    """Masked autoencoder, eq. 7: |M * (x - g(f(x_v)))|^2 over the masked patches alone. Also VMAE's base."""
    deterministic = True
    weights = {"masked": 1.0, "lpips": 0.0}

    def __init__(self, image_size=256, patch_size=8, hidden_size=192, depth=12, decoder_depth=12,
                 num_heads=12, latent_dim=16, mask_ratio=0.6, weights=()):
        super().__init__()
        self.weights = self.weights | dict(weights)
        if image_size % patch_size:
            raise ValueError(f"image size {image_size} is not a multiple of the patch size {patch_size}")
        if hidden_size % 4 or hidden_size % num_heads:
            raise ValueError(f"hidden size {hidden_size} is not a multiple of 4 and of the {num_heads} heads")
        self.image_size, self.patch_size, self.grid = image_size, patch_size, image_size // patch_size
        self.latent_dim = latent_dim
        self.keep = int(self.grid ** 2 * (1 - mask_ratio))   # of L tokens, in forward; encode takes all
        fewest = 0 if "visible" in self.weights else 1   # masked patches: MAE learns from them alone
        if not 0 < self.keep <= self.grid ** 2 - fewest:
            raise ValueError(f"mask ratio {mask_ratio} leaves {self.keep} of {self.grid ** 2} patches")
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, hidden_size, patch_size, patch_size)})
        self.pos_embed = nn.Parameter(position_table(hidden_size, self.grid), requires_grad=False)
        self.blocks = nn.Sequential(*(Block(hidden_size, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.to_latent = nn.Linear(hidden_size, 2 * latent_dim)
        self.from_latent = nn.Linear(latent_dim, hidden_size)
        self.decoder_embed = nn.Linear(hidden_size, hidden_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.decoder_pos_embed = nn.Parameter(position_table(hidden_size, self.grid), requires_grad=False)
        self.decoder_blocks = nn.Sequential(*(Block(hidden_size, num_heads) for _ in range(decoder_depth)))
        self.decoder_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.decoder_pred = nn.ModuleDict({"linear_pred": nn.Linear(hidden_size, 3 * patch_size ** 2),
                                           "conv_smoother": nn.Conv2d(3, 3, 3, padding=1)})   # removes seams
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.xavier_uniform_(self.patch_embed["proj"].weight.data.flatten(1))   # as a linear map
        nn.init.normal_(self.mask_token, std=0.02)
    def encode_tokens(self, x, ids_keep=None):
        """Images -> moments (B, tokens, 2C) of the patches ids_keep (B, tokens), by default of all (B, L)."""
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"images are {tuple(x.shape[-2:])}, this model takes {self.image_size} pixels: "
                             f"--image_size {self.image_size}")
        tokens = self.patch_embed["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed   # (B, L, D)
        if ids_keep is not None:
            tokens = tokens.take_along_dim(ids_keep[..., None], 1)
        return self.to_latent(self.norm(self.blocks(tokens)))
    def decode_tokens(self, z, ids_shuffle):
        """Latents of the visible tokens (B, keep, C), which ids_shuffle (B, L) put first -> (B, 3, H, W)."""
        tokens = self.decoder_embed(self.from_latent(z))
        masked = ids_shuffle.shape[1] - z.shape[1]   # mask tokens never pass the latent
        tokens = torch.cat([tokens, self.mask_token.to(tokens.dtype).expand(len(z), masked, -1)], 1)
        ids_restore = ids_shuffle.argsort(1)
        tokens = tokens.take_along_dim(ids_restore[..., None], 1) + self.decoder_pos_embed
        patches = self.decoder_pred["linear_pred"](self.decoder_norm(self.decoder_blocks(tokens)))
        patches = patches.view(-1, self.grid, self.grid, self.patch_size, self.patch_size, 3)
        images = patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return self.decoder_pred["conv_smoother"](images)
    def encode(self, x):
        moments = self.encode_tokens(x).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return Posterior(moments, self.deterministic)
    def decode(self, z):
        z = z.flatten(2).transpose(1, 2)   # (B, L, C)
        return self.decode_tokens(z, torch.arange(z.shape[1], device=z.device).expand(len(z), -1))
    def randomness(self, n, size, generator):
        how = {"generator": generator, "device": generator.device}
        noise = {} if self.deterministic else {"noise": torch.randn(n, self.keep, self.latent_dim, **how)}
        return {**noise, "ids_shuffle": torch.rand(n, self.grid ** 2, **how).argsort(1)}
    def masked_pass(self, x, noise=None, ids_shuffle=None):
        """Encode what is visible, decode all -> images, Posterior (B, keep, C), mask (B, L), 1 = masked."""
        if ids_shuffle is None:
            ids_shuffle = torch.rand(len(x), self.grid ** 2, device=x.device).argsort(1)
        ids_keep = ids_shuffle[:, :self.keep]
        posterior = Posterior(self.encode_tokens(x, ids_keep), self.deterministic, dim=-1)
        x_hat = self.decode_tokens(posterior.sample(noise), ids_shuffle)
        mask = torch.ones(ids_shuffle.shape, device=x.device).scatter(1, ids_keep, 0.0)
        return x_hat, posterior, mask
    def patch_error(self, x, x_hat, patches):
        """Mean squared error over the patches (B, L) that are marked with 1."""
        error = F.avg_pool2d((x_hat.float() - x).square().mean(1), self.patch_size).flatten(1)
        return (error * patches).sum() / patches.sum()
    def forward(self, x, noise=None, ids_shuffle=None, perceptual=None):
        x_hat, _, mask = self.masked_pass(x, noise, ids_shuffle)
        return objective(self, {"masked": self.patch_error(x, x_hat, mask)}, x, x_hat, perceptual)

class VMAE(MAE):
    """Variational masked autoencoder, the paper's own (main paper, section 4):

    L = visible MSE + lambda_M * masked MSE + lambda_P * LPIPS + lambda_reg * KL. The KL draws the variance
    alone to prior_std^2. weights: the release's, that is lambda_M = lambda_P = 1, lambda_reg = 2e-6, halved.
    """
    deterministic = False
    weights = {"visible": 0.5, "masked": 0.5, "kl": 1e-6, "lpips": 0.5}

    def __init__(self, *args, prior_std=1.0, tune_decoder=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.prior_std = prior_std
        self.tune_decoder = tune_decoder   # the last stage: the encoder is done, nothing is masked
    def forward(self, x, noise=None, ids_shuffle=None, perceptual=None):
        if self.tune_decoder:
            with torch.no_grad():
                z = self.encode(x).mode()
            x_hat = self.decode(z)
            return objective(self, {"recon": F.mse_loss(x_hat.float(), x)}, x, x_hat, perceptual)
        x_hat, posterior, mask = self.masked_pass(x, noise, ids_shuffle)
        terms = {"visible": self.patch_error(x, x_hat, 1 - mask)}
        if self.keep < self.grid ** 2:   # else a mean over no patches, 0/0: the term is absent
            terms["masked"] = self.patch_error(x, x_hat, mask)
        terms["kl"] = kl_unit(posterior.logvar, self.prior_std)
        return objective(self, terms, x, x_hat, perceptual)

MODELS = {"ae": AE, "dae": DAE, "vae": VAE, "sdvae": SDVAE, "mae": MAE, "vmae": VMAE}

# ---- Weights: LPIPS's network, checkpoints of ours and of others ----

def lpips_vgg():
    """lpips v0.1 on VGG16, frozen: net(x_hat, x) -> (B, 1, 1, 1). FileNotFoundError, ValueError."""
    import lpips
    from torchvision.models import VGG16_Weights
    url = VGG16_Weights.IMAGENET1K_V1.url
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    advice = f"put {url} at {path}, or train without it: --lpips 0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")   # lpips calls torchvision the old way, and would unpickle freely:
        net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)   # pnet_rand leaves VGG16 to us
    try:   # the hub's cache, else the download
        vgg = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        for name, parameter in net.net.named_parameters():   # slice1.0.weight is VGG16's features.0.weight
            parameter.data.copy_(vgg["features." + name.split(".", 1)[1]])
    except OSError as error:
        raise FileNotFoundError(f"LPIPS's VGG16 cannot be downloaded ({error}): {advice}")
    except NO_CHECKPOINT:
        raise ValueError(f"{path} is damaged: {advice}")
    return net.eval().requires_grad_(False)

def read_checkpoint(path):
    """A checkpoint file -> dict on the CPU; nothing in it can run code. FileNotFoundError, ValueError."""
    torch.serialization.add_safe_globals([argparse.Namespace])   # the release's files hold one
    if os.path.exists(os.path.join(path, "source.json")):
        raise ValueError(f"{path} is a latent cache, no checkpoint: it belongs behind train_dit.py --cache")
    if not os.path.isfile(path):
        hint = f", but there is {path}/ckpt.pt" if os.path.exists(os.path.join(path, "ckpt.pt")) else ""
        raise FileNotFoundError(f"there is no checkpoint file {path}{hint}")
    try:
        if str(path).endswith(".safetensors"):
            return read_safetensors(path)
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():   # torch compares no checksums
            raise ValueError
    except NO_CHECKPOINT:
        raise ValueError(f"{path} is no checkpoint of PyTorch tensors, or a damaged one")
    if not isinstance(ckpt, dict):
        raise ValueError(f"{path} holds a {type(ckpt).__name__}, not a checkpoint")
    return ckpt

def read_safetensors(path):
    """Hugging Face's format: the header's length in 8 bytes, the header in JSON, the tensors' bytes."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, os.path.getsize(path))))
        data = bytearray(file.read())
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return {name: torch.frombuffer(data[slice(*entry["data_offsets"])], dtype=types[entry["dtype"]])
            .view(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}

def load(path):
    """As from_checkpoint, from a file, .safetensors too. FileNotFoundError, ValueError."""
    return from_checkpoint(read_checkpoint(path), path)

def from_checkpoint(ckpt, path="checkpoint"):
    """An autoencoder in eval mode from what train_ae.py, VMAE's authors or diffusers saved, or ValueError."""
    try:
        state = {k: v for k, v in ckpt.get("model", ckpt).items() if not k.startswith("perceptual_loss.")}
        if ckpt.get("kind") == "autoencoder":
            name, config = ckpt["name"], ckpt["config"]
        elif "from_latent.weight" in state:   # the authors' VMAE; all released have 12 heads
            hidden_size, _, patch_size, _ = state["patch_embed.proj.weight"].shape
            state.setdefault("mask_token", torch.zeros(1, 1, hidden_size))   # files for generation lack it
            name, config = "vmae", {
                "image_size": math.isqrt(state["pos_embed"].shape[1]) * patch_size, "patch_size": patch_size,
                "hidden_size": hidden_size, "latent_dim": state["from_latent.weight"].shape[1],
                "depth": len(fnmatch.filter(state, "blocks.*.norm1.weight")),
                "decoder_depth": len(fnmatch.filter(state, "decoder_blocks.*.norm1.weight"))}
        elif "encoder.conv_in.weight" in state:   # diffusers' AutoencoderKL
            first = sorted(fnmatch.filter(state, "encoder.down_blocks.*.resnets.0.conv1.weight"))
            name, config = "sdvae", {"channels": [len(state[key]) for key in first],
                                     "latent_dim": state["decoder.conv_in.weight"].shape[1]}
        elif "x_embedder.proj.weight" in state:
            raise ValueError(f"{path} holds a DiT, not an autoencoder: it belongs behind sample.py --ckpt")
        else:
            raise ValueError(f"{path} holds no autoencoder that this program knows")
        model = MODELS[name](**config)
        model.load_state_dict(state)
    except (RuntimeError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} does not fit any autoencoder here: {' '.join(str(error).split())[:300]}")
    model.recipe = {"kind": "autoencoder", "name": name, "config": config}   # with "model" a checkpoint
    if not hasattr(model, "image_size"):   # convolutions take any; that of training, None if it is not known
        model.image_size = ckpt.get("args", {}).get("image_size")
    return model.eval()

def resize_positions(state, grid):
    """A ViT's state dict with its position tables interpolated, bilinearly, to grid x grid tokens."""
    for name in ("pos_embed", "decoder_pos_embed"):
        side = math.isqrt(state[name].shape[1])
        table = state[name].transpose(1, 2).unflatten(2, (side, side))   # (1, D, side, side)
        state[name] = F.interpolate(table, (grid, grid), mode="bilinear").flatten(2).transpose(1, 2)
    return state

# ---- What all scripts share ----

def or_exit(function, *args, **kwargs):
    """Call it; what is the user's mistake ends in its one sentence, not in a traceback."""
    try:
        return function(*args, **kwargs)
    except (OSError, ValueError) as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: {error}")

@contextlib.contextmanager
def whole_file(path, before=None):
    """A binary file to write, which appears under its name when all of it is on the disk; else OSError.

    before: where to keep the file that had the name.
    """
    try:
        with open(path + ".tmp", "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if before and os.path.exists(path):
            os.replace(path, before)
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:   # torch.save lays its own error upon the disk's
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        while error.__context__:
            error = error.__context__
        raise OSError(f"{path} cannot be written: {error}")

def choose_device(name):
    """This process's device, "cpu" or "cuda:N", from what --device says; TF32 for float32 on a GPU."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name in (None, "cuda"):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpus else name or "cpu"
    if name not in ("cpu", *gpus):
        sys.exit(f"--device {name} is not there: PyTorch finds {len(gpus)} GPUs")
    if name != "cpu":
        torch.cuda.set_device(name)
        torch.set_float32_matmul_precision("high")
    return name

def to_uint8(x):
    """Images (B, 3, H, W), about [-1, 1] -> NumPy uint8 (B, H, W, 3): floor(clamp(127.5 x + 128))."""
    return (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

def save_grid(path, rows, labels, columns=()):
    """A PNG with a labelled row for each of rows, uint8 (N, H, W, 3) of one shape; columns: their titles."""
    scale = max(1, 64 // rows[0].shape[1])   # small images are enlarged, pixels stay sharp
    rows = np.stack(rows).repeat(scale, 2).repeat(scale, 3)
    rows = np.pad(rows, ((0, 0), (0, 0), (0, 2), (0, 2), (0, 0)), constant_values=255)
    R, N, H, W, _ = rows.shape
    font = ImageFont.load_default(max(14, H // 12))
    margin, top = 12 + int(max(map(font.getlength, labels))), int(1.5 * font.size) if columns else 0
    canvas = Image.new("RGB", (margin + N * W, top + R * H), "white")
    canvas.paste(Image.fromarray(rows.transpose(0, 2, 1, 3, 4).reshape(R * H, N * W, 3)), (margin, top))
    draw = ImageDraw.Draw(canvas)
    for r, label in enumerate(labels):
        draw.text((margin - 6, top + r * H + H // 2), label, "black", font, anchor="rm")
    for n, title in enumerate(columns):
        draw.text((margin + n * W + W // 2, top // 2), title, "black", font, anchor="mm")
    canvas.save(path)
