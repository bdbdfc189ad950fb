"""The six autoencoders of the paper (supplement, section A), their objectives, loading of weights.

    AE (eq. 3)  DAE (eq. 4)  VAE (eq. 5)  SDVAE (eq. 6)    convolutional: Stable Diffusion 3's VAE
    MAE (eq. 7)  VMAE (main paper, section 4)              a ViT with masking

    encode(x) -> Posterior      x (B, 3, H, W) in [-1, 1] -> latents (B, C, H/f, W/f)
    decode(z) -> images         z (B, C, H/f, W/f) -> (B, 3, H, W), about [-1, 1], not clamped
    forward(x, noise=None, ids_shuffle=None, perceptual=None) -> loss, terms, reconstruction

The forward pass *is* the objective, so that DDP and torch.compile see all of it. One convention of
scale holds for all six: reconstruction terms are means over pixel values, KL terms are summed over
the latent's channels and averaged over positions and images.

Everything random in a forward pass can be passed in; what is not passed in is drawn. `noise` is
standard normal, shaped like the latents (VAE, SDVAE), like the visible tokens' latents (VMAE:
(B, keep, C), in the order of the visible tokens) or like the image (DAE). `ids_shuffle` (B, L)
permutes the patches of each image; the first `keep` of them are visible. `perceptual` is a callable
(x_hat, x) -> scalar, such as LPIPS.
"""

import argparse
import fnmatch
import hashlib
import inspect
import math
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from fid import UserError, reading


class Posterior:
    """A diagonal Gaussian over latents, in float32.

    moments: mean and log-variance, stacked along `dim`. If `deterministic`, a sample is the mean.
    """

    def __init__(self, moments, deterministic=False, dim=1):
        self.mean, logvar = moments.float().chunk(2, dim)
        self.logvar = logvar.clamp(-30, 20)
        self.deterministic = deterministic

    def sample(self, noise=None):
        if self.deterministic:
            return self.mean
        noise = torch.randn_like(self.mean) if noise is None else noise
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def mode(self):
        return self.mean


def kl_normal(mean, logvar, dim=1):
    """KL(N(mean, var) || N(0, 1)) of eqs. 5 and 6, summed over `dim`, averaged over the rest."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim).mean()


def kl_unit(logvar, prior_std=1.0, dim=-1):
    """VMAE's KL, which leaves the mean free: 1/2 (var/s^2 - 1 - log var/s^2) with s = prior_std.

    Summed over `dim`, averaged over the rest (main paper, section 4).
    """
    logvar = logvar - 2 * math.log(prior_std)
    return 0.5 * (logvar.exp() - 1 - logvar).sum(dim).mean()


class Autoencoder(nn.Module):
    """What the six have in common.

    Attributes of the class: `weights`, the lambda of each term of its objective; `vit`, whether it
    is a ViT, which takes images of one size only.

    Attributes of an instance: `latent_dim`, the latent's channels C; `patch_size`, the pixels f on
    a side of a latent position; `image_size`, the pixels on a side of the images it was trained on,
    None if that is unknown; `deterministic`, whether its latent is the posterior's mean and not a
    sample; `args`, the settings in its file, where `load` made it.
    """

    vit = False
    weights = {}

    def __init__(self, latent_dim, patch_size, image_size, weights):
        super().__init__()
        self.latent_dim, self.patch_size, self.image_size = latent_dim, patch_size, image_size
        # Weights that are not given keep the class's values.
        weights = dict(weights)
        if unknown := weights.keys() - self.weights.keys():
            raise ValueError(f"{type(self).__name__} has no terms {unknown}")
        self.weights = self.weights | weights
        self.deterministic = not self.weights.get("kl")  # without a KL, variance is not trained

    def latent_shape(self, height, width):
        """(C, h, w) of the latents of images of this size; raises UserError if it does not fit."""
        f = self.patch_size
        if height % f or width % f:
            raise UserError(f"image size {(height, width)} is not a multiple of {f} pixels")
        return self.latent_dim, height // f, width // f

    def encoder_state(self):
        """The tensors that `encode` reads, by name: two autoencoders that share them have the same
        latents, whatever their decoders."""
        decoder = ("decoder", "post_quant_conv", "from_latent", "mask_token")
        return {k: v for k, v in self.state_dict().items() if not k.startswith(decoder)}

    def randomness(self, n, size, generator):
        """The random arguments of forward for n images of size x size pixels, by name.

        A class whose forward takes some overrides it. What forward draws by itself is the same in
        every process, which all seed PyTorch's default generator alike.
        """
        return {}

    def objective(self, terms, x, x_hat, perceptual):
        """sum_i lambda_i * term_i, the terms as detached scalars, the reconstruction.

        Every forward returns this. LPIPS joins the terms here; the reconstruction term of eqs. 3 to
        6 has no lambda.
        """
        if perceptual is not None:
            terms["lpips"] = perceptual(x_hat, x)
        weights = {"recon": 1.0, **self.weights}
        loss = None
        for name, term in terms.items():
            # Not 0 + 1 * term: torch.compile folds that into the term itself, and detaching the
            # term below would then detach the loss.
            weighted = term if weights[name] == 1 else weights[name] * term
            loss = weighted if loss is None else loss + weighted
        return loss, {name: term.detach() for name, term in terms.items()}, x_hat


# ---- The convolutional four, on the Stable Diffusion 3 VAE ----
# Modules are named as in diffusers' AutoencoderKL, so that its weights load as they are.


class AE(Autoencoder):
    """Autoencoder, eq. 3: |x - g(f(x))|^2. DAE, VAE and SDVAE share its network.

    channels: widths of the levels, multiples of 32; each level but the last halves the resolution.
    Raises UserError for other widths.
    """

    weights = {"lpips": 0.0}

    def __init__(
        self,
        channels=(128, 256, 512, 512),
        latent_dim=16,  # channels C of the latent
        recon="mse",  # eq. 3, or "l1" as in VQGAN
        image_size=None,  # pixels on a side in training; any multiple of f can be encoded
        quant_conv=0,  # 1: 1x1 convolutions around the latent, as in Stable Diffusion 1 and XL
        weights=(),  # lambda of terms, by name
    ):
        if any(width % 32 for width in channels):
            raise UserError(f"--channels {' '.join(map(str, channels))} are not multiples of 32")
        super().__init__(latent_dim, 2 ** (len(channels) - 1), image_size, weights)
        self.recon_loss = {"mse": F.mse_loss, "l1": F.l1_loss}[recon]
        narrow, wide = channels[0], channels[-1]

        self.encoder = named(
            conv_in=nn.Conv2d(3, narrow, 3, padding=1),
            down_blocks=levels(DownBlock, channels),
            mid_block=MidBlock(wide),
            conv_norm_out=nn.GroupNorm(32, wide, eps=1e-6),
            conv_act=nn.SiLU(),
            conv_out=nn.Conv2d(wide, 2 * latent_dim, 3, padding=1),
        )
        self.decoder = named(
            conv_in=nn.Conv2d(latent_dim, wide, 3, padding=1),
            mid_block=MidBlock(wide),
            up_blocks=levels(UpBlock, channels[::-1]),
            conv_norm_out=nn.GroupNorm(32, narrow, eps=1e-6),
            conv_act=nn.SiLU(),
            conv_out=nn.Conv2d(narrow, 3, 3, padding=1),
        )
        self.quant_conv = self.post_quant_conv = nn.Identity()
        if quant_conv:
            self.quant_conv = nn.Conv2d(2 * latent_dim, 2 * latent_dim, 1)
            self.post_quant_conv = nn.Conv2d(latent_dim, latent_dim, 1)
        # A tenth faster on a CPU, with the same values.
        self.to(memory_format=torch.channels_last)

    def encode(self, x):
        self.latent_shape(*x.shape[-2:])  # raises if the size does not fit
        return Posterior(self.quant_conv(self.encoder(x)), self.deterministic)

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x, noise=None, ids_shuffle=None, perceptual=None):
        x_hat = self.decode(self.encode(x).mode())
        terms = {"recon": self.recon_loss(x_hat.float(), x)}
        return self.objective(terms, x, x_hat, perceptual)


class DAE(AE):
    """Denoising autoencoder, eq. 4, with p_c(x~|x) = N(x, noise_std^2).

    The input is noised, the target is not. No source gives the noise. Ours is calibrated: trained
    with it, a linear DAE of photographs loses about 0.87 dB on clean ones, as the paper's DAE (PSNR
    31.31) does against its AE (32.18); 0.1 would cost 0.02 dB. See tests/test_calibration.py.
    """

    def __init__(self, *, noise_std=0.33, **kwargs):
        super().__init__(**kwargs)
        self.noise_std = noise_std

    def randomness(self, n, size, generator):
        shape = (n, 3, size, size)
        return {"noise": torch.randn(shape, generator=generator, device=generator.device)}

    def forward(self, x, noise=None, ids_shuffle=None, perceptual=None):
        noise = torch.randn_like(x) if noise is None else noise
        x_hat = self.decode(self.encode(x + self.noise_std * noise).mode())
        terms = {"recon": self.recon_loss(x_hat.float(), x)}
        return self.objective(terms, x, x_hat, perceptual)


class VAE(AE):
    """Variational autoencoder, eq. 5: -log p(x|z), Gaussian, + lambda_KL * KL(q(z|x) || N(0, 1)).

    No source gives lambda_KL. Ours is calibrated: with it a linear VAE of photographs loses about
    2.8 dB, as the paper's VAE (PSNR 29.40) does against its AE (32.18). See
    tests/test_calibration.py.
    """

    weights = {"kl": 1.8e-3, "lpips": 0.0}

    def randomness(self, n, size, generator):
        shape = (n, *self.latent_shape(size, size))
        return {"noise": torch.randn(shape, generator=generator, device=generator.device)}

    def forward(self, x, noise=None, ids_shuffle=None, perceptual=None):
        posterior = self.encode(x)
        x_hat = self.decode(posterior.sample(noise))
        terms = {
            "recon": self.recon_loss(x_hat.float(), x),
            "kl": kl_normal(posterior.mean, posterior.logvar),
        }
        return self.objective(terms, x, x_hat, perceptual)


class SDVAE(VAE):
    """Stable Diffusion's VAE, eq. 6 without its third term.

    The third term needs a second player: train_ae.py adds it with `adversarial_losses`. The
    likelihood is VQGAN's, a Laplace one: recon="l1".
    """

    # VQGAN's and latent diffusion's. Their 1e-6 is for sums over pixels and latents; on our means
    # over 3 * 256 * 256 values and 32 * 32 positions it is 1e-6 * 1,024 / 196,608.
    weights = {"kl": 5e-9, "lpips": 1.0}

    def __init__(self, *, recon="l1", **kwargs):  # MSE beside LPIPS would weigh ten times less
        super().__init__(recon=recon, **kwargs)


class Discriminator(nn.Sequential):
    """D of eq. 6: VQGAN's PatchGAN, images (B, 3, H, W) -> logits (B, 1, H/8 - 2, W/8 - 2)."""

    def __init__(self):
        layers = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2)]
        for a, b, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
            layers.append(nn.Conv2d(a, b, 4, stride, 1, bias=False))
            # Without running averages: D is never in eval mode, and they would keep a NaN.
            layers.append(nn.BatchNorm2d(b, track_running_stats=False))
            layers.append(nn.LeakyReLU(0.2))
        layers.append(nn.Conv2d(512, 1, 4, 1, 1))
        super().__init__(OrderedDict(main=nn.Sequential(*layers)))

        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)


def adversarial_losses(disc, x, x_hat, loss, last_layer, weight=0.5, kind="hinge"):
    """The third term of eq. 6, as each of the two players minimises it.

    disc: the discriminator; x, x_hat (B, 3, H, W): images and their reconstructions; loss: the
    other terms of eq. 6; last_layer: the decoder's last weight; weight, kind: lambda_D and the form
    of D's loss. Returns what to add to the autoencoder's loss, D's own loss, and what to log.
    """
    # The autoencoder's turn: D judges the reconstructions and learns nothing.
    disc.requires_grad_(False)
    adv = -disc(x_hat).float().mean()  # whatever the form of D's loss
    adaptive = adaptive_weight(loss, adv, last_layer)
    disc.requires_grad_(True)

    # D's turn, on the same images (latent diffusion runs the autoencoder again): no gradient
    # reaches the autoencoder.
    real, fake = disc(x).float(), disc(x_hat.detach()).float()
    loss_d = disc_loss(real, fake, kind)

    terms = {"adv": adv, "adaptive": adaptive, "disc": loss_d}
    terms |= {"real": real.mean(), "fake": fake.mean()}
    return weight * adaptive * adv, loss_d, {name: term.detach() for name, term in terms.items()}


def disc_loss(real_logits, fake_logits, kind="hinge"):
    """The adversarial term as D minimises it: "vanilla" is eq. 6's, "hinge" VQGAN's default."""
    if kind == "vanilla":
        return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())
    raise ValueError(f'kind is "hinge" or "vanilla", not "{kind}"')


def adaptive_weight(loss, adv, last_layer):
    """VQGAN's factor of the adversarial term.

    It scales the term so that its gradient at the decoder's last layer has the same norm as the
    other terms'. (The KL has no gradient there.)
    """
    (grad_loss,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
    (grad_adv,) = torch.autograd.grad(adv, last_layer, retain_graph=True)
    # The bound acts on mean losses, as in VQGAN; latent diffusion's acts on sums over pixels.
    return (grad_loss.norm() / (grad_adv.norm() + 1e-4)).clamp(0, 1e4)


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
    """Single-head self-attention over the H * W positions of (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__()
        self.group_norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        # The single head has no dimension of its own: compiled for CUDA, one of size 1 crashed in
        # PyTorch 2.11.
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H * W, C)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h).transpose(1, 2).reshape(x.shape)


class DownBlock(nn.Module):
    """A level of the encoder: (B, a, H, W) -> (B, b, H/2, W/2), or (B, b, H, W) for the last."""

    def __init__(self, a, b, last):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(a, b), ResnetBlock(b, b)])
        self.downsamplers = nn.ModuleList()
        if not last:
            # Padded on the right and below only, as the published weights expect.
            pad, conv = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(b, b, 3, stride=2)
            self.downsamplers.append(named(pad=pad, conv=conv))

    def forward(self, x):
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class MidBlock(nn.Module):
    """Attention between two residual blocks: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels) for _ in range(2)])
        self.attentions = nn.ModuleList([SpatialAttention(channels)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class UpBlock(nn.Module):
    """A level of the decoder: (B, a, H, W) -> (B, b, 2H, 2W), or (B, b, H, W) for the last."""

    def __init__(self, a, b, last):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(a, b), ResnetBlock(b, b), ResnetBlock(b, b)])
        self.upsamplers = nn.ModuleList()
        if not last:
            upsample, conv = nn.Upsample(scale_factor=2.0), nn.Conv2d(b, b, 3, padding=1)
            self.upsamplers.append(named(upsample=upsample, conv=conv))

    def forward(self, x):
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


def levels(block, channels):
    """One block per level, through the widths; the last one keeps the resolution."""
    widths = zip([channels[0], *channels[:-1]], channels, strict=True)
    last = len(channels) - 1
    return nn.Sequential(*(block(a, b, i == last) for i, (a, b) in enumerate(widths)))


def named(**layers):
    """Layers in sequence, under the names that their tensors have in checkpoints."""
    return nn.Sequential(OrderedDict(layers))


# ---- MAE and VMAE, on a ViT ----
# Modules are named as in the authors' release, so that its weights load as they are.


class MAE(Autoencoder):
    """Masked autoencoder, eq. 7: |M * (x - g(f(x_v)))|^2, over the masked patches alone.

    VMAE shares its network. Patches are masked in training only: `encode` takes all of them.
    Raises UserError for sizes that do not fit together.
    """

    vit = True
    weights = {"masked": 1.0, "lpips": 0.0}

    def __init__(
        self,
        image_size=256,  # pixels on a side
        # Pixels on a side of a token. The supplement's "patch size (32, 32)" is the grid of tokens.
        patch_size=8,
        hidden_size=192,  # width D
        depth=12,  # blocks of the encoder
        decoder_depth=12,  # blocks of the decoder
        num_heads=12,
        latent_dim=16,  # channels C of the latent
        # Share of the patches that the encoder does not see in training: the supplement's. The
        # release has 0.25.
        mask_ratio=0.6,
        weights=(),  # lambda of terms, by name
    ):
        if image_size % patch_size:
            raise UserError(
                f"image size {image_size} is not a multiple of the patch size {patch_size}"
            )
        if hidden_size % 4 or hidden_size % num_heads:
            raise UserError(
                f"hidden size {hidden_size} is not a multiple of 4 and of the {num_heads} heads"
            )
        super().__init__(latent_dim, patch_size, image_size, weights)
        self.grid = image_size // patch_size
        num_patches = self.grid**2  # L
        self.keep = int(num_patches * (1 - mask_ratio))  # visible patches
        # MAE learns from masked patches alone, so there must be one.
        most = num_patches if "visible" in self.weights else num_patches - 1
        if not 1 <= self.keep <= most:
            raise UserError(f"mask ratio {mask_ratio} leaves {self.keep} of {num_patches} patches")

        # Encoder: patches with positions -> blocks -> mean and log-variance of each token.
        patch_map = nn.Conv2d(3, hidden_size, patch_size, patch_size)
        self.patch_embed = nn.ModuleDict({"proj": patch_map})
        table = position_table(hidden_size, self.grid)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.Sequential(*(Block(hidden_size, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.to_latent = nn.Linear(hidden_size, 2 * latent_dim)

        # Decoder: latents and mask tokens with positions -> blocks -> pixels.
        self.from_latent = nn.Linear(latent_dim, hidden_size)
        self.decoder_embed = nn.Linear(hidden_size, hidden_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.decoder_pos_embed = nn.Parameter(table.clone(), requires_grad=False)
        self.decoder_blocks = nn.Sequential(
            *(Block(hidden_size, num_heads) for _ in range(decoder_depth))
        )
        self.decoder_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.decoder_pred = nn.ModuleDict(
            {
                "linear_pred": nn.Linear(hidden_size, 3 * patch_size**2),
                # Removes the seams between patches.
                "conv_smoother": nn.Conv2d(3, 3, 3, padding=1),
            }
        )
        self.initialize_weights()

    def initialize_weights(self):
        # Xavier for linear maps, of which the patch embedding is one, with zero biases. The biases
        # of the two convolutions keep PyTorch's own initialisation, as in the release.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed["proj"].weight.data.flatten(1))
        nn.init.normal_(self.mask_token, std=0.02)

    def encode_tokens(self, x, ids_keep=None):
        """Images -> moments (B, tokens, 2C) of the patches ids_keep (B, tokens), or of all."""
        self.latent_shape(*x.shape[-2:])  # raises if the size does not fit
        tokens = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)  # (B, L, D)
        tokens = tokens + self.pos_embed
        if ids_keep is not None:
            tokens = tokens.gather(1, ids_keep[..., None].expand(-1, -1, tokens.shape[2]))
        return self.to_latent(self.norm(self.blocks(tokens)))

    def decode_tokens(self, z, ids_shuffle=None):
        """Latents -> images: (B, keep, C) of the patches that ids_shuffle (B, L) puts first, or of
        all patches in order."""
        tokens = self.decoder_embed(self.from_latent(z))  # the release's two linear maps
        if ids_shuffle is not None:
            # Append mask tokens, which have no latent, and restore the image's order.
            num_masked = ids_shuffle.shape[1] - z.shape[1]
            mask_tokens = self.mask_token.to(tokens.dtype).expand(z.shape[0], num_masked, -1)
            tokens = torch.cat([tokens, mask_tokens], 1)  # (B, L, D)
            ids_restore = ids_shuffle.argsort(1)
            tokens = tokens.gather(1, ids_restore[..., None].expand(tokens.shape))
        tokens = tokens + self.decoder_pos_embed

        patches = self.decoder_pred["linear_pred"](self.decoder_norm(self.decoder_blocks(tokens)))
        # Patches to their places: (B, h, w, p, p, 3) -> (B, 3, h, p, w, p) -> (B, 3, H, W).
        patches = patches.view(-1, self.grid, self.grid, self.patch_size, self.patch_size, 3)
        images = patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return self.decoder_pred["conv_smoother"](images)

    def encode(self, x):
        moments = self.encode_tokens(x).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return Posterior(moments, self.deterministic)

    def decode(self, z):
        return self.decode_tokens(z.flatten(2).transpose(1, 2))  # (B, L, C)

    def latent_shape(self, height, width):
        if (height, width) != (self.image_size, self.image_size):
            raise UserError(
                f"images are {height} x {width}, this model takes {self.image_size} pixels: "
                f"use --image_size {self.image_size}"
            )
        return super().latent_shape(height, width)

    def randomness(self, n, size, generator):
        options = {"generator": generator, "device": generator.device}
        drawn = {}
        if not self.deterministic:
            drawn["noise"] = torch.randn(n, self.keep, self.latent_dim, **options)
        drawn["ids_shuffle"] = torch.rand(n, self.grid**2, **options).argsort(1)
        return drawn

    def masked_pass(self, x, noise=None, ids_shuffle=None):
        """Encode the visible patches, decode all -> images, posterior, mask.

        A visible patch becomes a token, its token a latent, drawn from the posterior, and the
        latent a token of the decoder. The token of a masked patch is dropped before the encoder's
        blocks: at its position the decoder gets the mask token. The posterior is that of the
        visible tokens, (B, keep, C); the mask (B, L) is 1 for masked patches, 0 for visible ones.
        """
        if ids_shuffle is None:
            ids_shuffle = torch.rand(len(x), self.grid**2, device=x.device).argsort(1)
        ids_keep = ids_shuffle[:, : self.keep]
        posterior = Posterior(self.encode_tokens(x, ids_keep), self.deterministic, dim=-1)
        x_hat = self.decode_tokens(posterior.sample(noise), ids_shuffle)
        mask = torch.ones(ids_shuffle.shape, device=x.device).scatter(1, ids_keep, 0.0)
        return x_hat, posterior, mask

    def patch_error(self, x, x_hat, selected):
        """The mean squared error over the patches that `selected` (B, L) marks with 1."""
        error = F.avg_pool2d((x_hat.float() - x).square().mean(1), self.patch_size).flatten(1)
        return (error * selected).sum() / selected.sum()

    def forward(self, x, noise=None, ids_shuffle=None, perceptual=None):
        x_hat, _, mask = self.masked_pass(x, noise, ids_shuffle)
        terms = {"masked": self.patch_error(x, x_hat, mask)}
        return self.objective(terms, x, x_hat, perceptual)


class VMAE(MAE):
    """Variational masked autoencoder, the paper's own (main paper, section 4):

    L = visible MSE + lambda_M * masked MSE + lambda_P * LPIPS + lambda_reg * KL.

    The weights below are the release's, half of L with lambda_M = lambda_P = 1, lambda_reg = 2e-6.
    The last stage, which tunes the decoder on MSE + 10 LPIPS, is the same objective with mask_ratio
    0 and other weights.

    The KL pulls the variance alone, towards prior_std^2. Its weight is the release's, which has a
    prior_std of 1e-3; the main paper has unit variance and gives no weight. With unit variance it
    hardly acts: the posterior's std stays near 2% of its channel's (tests/RESULTS.md has other
    weights).
    """

    # The release's script sets another weight of the visible term, 0.75, but never passes it on.
    weights = {"visible": 0.5, "masked": 0.5, "kl": 1e-6, "lpips": 0.5}

    def __init__(self, *, prior_std=1.0, **kwargs):  # main paper; the release's script has 1e-3
        super().__init__(**kwargs)
        self.prior_std = prior_std

    def forward(self, x, noise=None, ids_shuffle=None, perceptual=None):
        x_hat, posterior, mask = self.masked_pass(x, noise, ids_shuffle)
        terms = {"visible": self.patch_error(x, x_hat, 1 - mask)}
        # Without masked patches their mean would be 0/0: the term is absent.
        if self.keep < self.grid**2:
            terms["masked"] = self.patch_error(x, x_hat, mask)
        terms["kl"] = kl_unit(posterior.logvar, self.prior_std)
        return self.objective(terms, x, x_hat, perceptual)


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
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, D / heads)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, L, D)
        x = x + self.attn["proj"](h)
        return x + self.mlp(self.norm2(x))


def position_table(dim, grid):
    """Fixed 2-D sin-cos positions (1, grid^2, dim).

    The first half of the channels encodes the column, the second half the row; each half holds the
    sines, then the cosines.
    """
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega  # (grid, dim / 4)
    axis = torch.cat([angles.sin(), angles.cos()], 1)  # (grid, dim / 2)
    return torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)], 1).float()[None]


MODELS = {"ae": AE, "dae": DAE, "vae": VAE, "sdvae": SDVAE, "mae": MAE, "vmae": VMAE}


def settings_of(model):
    """The settings of a class of MODELS, by name with their defaults: what its constructor takes,
    and the weights of its terms, as {"patch_size": 8, ..., "masked": 1.0}. They are the flags of
    train_ae.py --model."""
    settings = {}
    for base in model.mro()[: model.mro().index(Autoencoder)]:
        parameters = inspect.signature(base.__init__).parameters
        for name, parameter in parameters.items():
            if name not in ("self", "kwargs", "weights", *settings):
                missing = parameter.default is parameter.empty
                assert not missing, f"{base.__name__}'s {name} has no default"
                settings[name] = parameter.default
        if "kwargs" not in parameters:  # else it passes on what its base takes
            break
    return settings | model.weights


def build(args):
    """The autoencoder that args["model"] names, with those of its settings that args has."""
    model = MODELS[args["model"]]
    given = {name: args[name] for name in settings_of(model) if name in args}
    weights = {name: given.pop(name) for name in model.weights if name in given}
    return model(**given, weights=weights)


# ---- Loading: checkpoints of ours and of others, the network of LPIPS ----


def load(path):
    """An autoencoder in eval mode from a file of train_ae.py, VMAE's authors or diffusers.

    .safetensors files are read too. Raises FileNotFoundError if there is no such file, UserError (a
    ValueError) if it holds no autoencoder or is damaged.
    """
    return from_checkpoint(read_checkpoint(path), path)


def from_checkpoint(ckpt, path="the checkpoint"):
    """As `load`, from the dict that the file holds; path: its name in messages."""
    args = ckpt.get("args")
    state = plain_names(ckpt.get("model", ckpt))
    state = {k: v for k, v in state.items() if not k.startswith("perceptual_loss.")}
    if "x_embedder.proj.weight" in state:
        raise UserError(f"{path} holds a DiT, not an autoencoder: pass it to sample.py --ckpt")
    elif isinstance(args, dict) and args.get("model") in MODELS:
        pass  # a file of ours
    elif "from_latent.weight" in state:
        args = args_of_release(state, getattr(args, "model", None))
        # The release's files for generation have no mask token: without a mask it is not used.
        state.setdefault("mask_token", torch.zeros(1, 1, args["hidden_size"]))
    elif "encoder.down_blocks.0.resnets.0.conv1.weight" in state:
        state = {modern_name(name): value for name, value in state.items()}
        args = args_of_diffusers(state)
    elif any("encoder.down.0." in name for name in state):
        raise UserError(
            f"{path} has latent diffusion's own tensor names: take the file that diffusers has of "
            "this VAE, vae/diffusion_pytorch_model.safetensors"
        )
    else:
        raise UserError(f"{path} holds no autoencoder that this program knows")
    model = build(args)
    # VMAE's last stage has no KL, but keeps the posterior that its first stage learned.
    model.deterministic = args.get("deterministic", model.deterministic)
    model.load_state_dict(state)
    model.args = args  # together with the weights, this makes a checkpoint again
    return model.eval()


def args_of_release(state, name):
    """VMAE's settings, read off the tensors of the authors' file; name: what it calls its network.

    The number of heads leaves no trace in the tensors. All published files have 12, the release's
    code also builds networks called ..._large and ..._small of 16 and 8.
    """
    hidden_size, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    num_heads = 16 if "_large" in str(name) else 8 if "_small" in str(name) else 12
    if name is None and hidden_size != 192:
        print(f"the file does not say how many heads it has: {num_heads} is a guess")
    return {
        "model": "vmae",
        "image_size": math.isqrt(state["pos_embed"].shape[1]) * patch_size,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "latent_dim": state["from_latent.weight"].shape[1],
        "depth": len(fnmatch.filter(state, "blocks.*.norm1.weight")),
        "decoder_depth": len(fnmatch.filter(state, "decoder_blocks.*.norm1.weight")),
        "num_heads": num_heads,
    }


def modern_name(name):
    """Today's name of a tensor of diffusers; older files name the maps of attention differently."""
    renamed = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    old = "|".join(renamed)
    return re.sub(rf"(?<=attentions\.0\.)({old})(?=\.)", lambda found: renamed[found[0]], name)


def args_of_diffusers(state):
    """SDVAE's settings, read off the tensors of diffusers' AutoencoderKL."""
    first_of_level = sorted(fnmatch.filter(state, "encoder.down_blocks.*.resnets.0.conv1.weight"))
    return {
        "model": "sdvae",
        "channels": [len(state[key]) for key in first_of_level],
        "latent_dim": state["decoder.conv_in.weight"].shape[1],
        "quant_conv": int("quant_conv.weight" in state),
    }


def plain_names(state):
    """Tensors by name, without the prefixes that DDP and torch.compile put before their names."""
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in state.items()}


def resize_positions(state, grid):
    """A ViT's state dict with its position tables interpolated bilinearly to grid x grid tokens."""
    for name in ("pos_embed", "decoder_pos_embed"):
        side = math.isqrt(state[name].shape[1])
        table = state[name].transpose(1, 2).unflatten(2, (side, side))  # (1, D, side, side)
        state[name] = F.interpolate(table, (grid, grid), mode="bilinear").flatten(2).transpose(1, 2)
    return state


def read_checkpoint(path):
    """The dict that a checkpoint file holds, on the CPU. Nothing in the file can run code.

    Raises FileNotFoundError, UserError.
    """
    if not os.path.isfile(path):
        # A folder of ours or of diffusers' save_pretrained.
        inside = [Path(path, name) for name in ("ckpt.pt", "diffusion_pytorch_model.safetensors")]
        hint = "".join(f", but there is {file}" for file in inside if file.exists())
        raise FileNotFoundError(f"there is no checkpoint file {path}{hint}")
    with reading(path):
        if str(path).endswith(".safetensors"):
            import safetensors.torch

            return safetensors.torch.load_file(path)
        # The authors' files hold an argparse.Namespace, which is plain data.
        torch.serialization.add_safe_globals([argparse.Namespace])
        try:
            ckpt = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # Of its many lines one names what is no plain data, if that is the reason.
            named = re.search("(Unsupported|Trying to load unsupported) .*", str(error))
            raise ValueError(named[0] if named else error) from error
        # torch.load does not compare checksums: a flipped byte would go unnoticed.
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip() is not None:
            raise zipfile.BadZipFile("a checksum differs")
    if not isinstance(ckpt, dict):
        raise UserError(f"{path} holds a {type(ckpt).__name__}, not a checkpoint")
    return ckpt


def fingerprint(state):
    """16 hexadecimal digits that tell one dict of tensors from another."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class LPIPS(nn.Module):
    """The last term of eq. 6: the sum over layers l of w_l |psi_l(x) - psi_l(x_hat)|^2.

    net: the package's network. Images (B, 3, H, W) in [-1, 1] -> (B, 1, 1, 1), in float32: under
    autocast only the features psi_l are computed in lower precision.
    """

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x_hat, x):
        features = [self.net.net(self.net.scaling_layer(images)) for images in (x_hat, x)]
        distance = 0
        # The meta device, on which FLOPs are counted, knows no autocast.
        with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):
            for psi_hat, psi, weight in zip(*features, self.net.lins, strict=True):
                psi_hat, psi = psi_hat.float(), psi.float()
                # Both are scaled to length 1 at each position.
                length_hat, length = (
                    torch.linalg.vector_norm(p, dim=1, keepdim=True) + 1e-10 for p in (psi_hat, psi)
                )
                difference = psi_hat / length_hat - psi / length
                distance = distance + weight(difference**2).mean((2, 3), keepdim=True)
        return distance


def lpips_vgg():
    """LPIPS v0.1 on VGG16, frozen, in eval mode; VGG16's weights are downloaded on first use."""
    import lpips
    from torchvision.models import VGG16_Weights

    vgg = torch.hub.load_state_dict_from_url(
        VGG16_Weights.IMAGENET1K_V1.url, map_location="cpu", check_hash=True, weights_only=True
    )
    # lpips would load VGG16 in torchvision's old way, which warns and unpickles freely. pnet_rand
    # leaves the network to us.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    # lpips calls VGG16's features.0.weight slice1.0.weight, and so on.
    for name, parameter in net.net.named_parameters():
        parameter.data.copy_(vgg["features." + name.split(".", 1)[1]])
    return LPIPS(net).eval().requires_grad_(False)
