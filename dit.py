"""The diffusion transformer, LightningDiT with QK-norm, and rectified flow on it (supplement, B.2).

Time runs from t = 0, noise, to t = 1, data; the network predicts the velocity, data - noise.

    flow_loss(model, x1, y, noise, t)     what training minimises
    sample(model, noise, y, ...)          Euler steps along the velocity, with guidance

DiT and its initialisation follow Peebles and Xie, "Scalable Diffusion Models with Transformers";
RMSNorm, SwiGLU, rotary positions and QK-norm follow Yao and Wang, "Reconstruction vs. Generation",
as do the tensor names.
"""

import functools
import itertools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from ae import plain_names, position_table, read_checkpoint
from fid import UserError


class RMSNorm(nn.Module):
    """x / rms(x) over the last dimension, times a learned weight; computed in float32."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, 1e-6).to(x.dtype)


def modulate(x, shift, scale):
    """x (B, L, D); shift, scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def rotate(x, cos, sin):
    """Rotary positions: each pair of channels (2i, 2i + 1) of x turns by its token's angle.

    x (B, L, heads, d); cos, sin (L, d).
    """
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None, ::2], sin[:, None, ::2]  # the tables hold each angle twice
    turned = first * cos - second * sin, first * sin + second * cos
    # Rounded before they are stacked, which halves what is written.
    return torch.stack([half.to(x.dtype) for half in turned], -1).flatten(-2)


def rotary_tables(dim, grid):
    """cos and sin, each (grid^2, dim): the first half of the channels turns with the row, the
    second half with the column."""
    freqs = 10000 ** -(torch.arange(0, dim // 2, 2) / (dim // 2))
    angles = (torch.arange(grid)[:, None] * freqs).repeat_interleave(2, 1)  # (grid, dim / 2)
    angles = torch.cat([angles.repeat_interleave(grid, 0), angles.repeat(grid, 1)], 1)
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Self-attention with QK-norm and rotary positions, (B, L, D) -> (B, L, D)."""

    def __init__(self, dim, num_heads, qk_norm):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        # One weight for all heads.
        self.q_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, cos, sin):
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, L, 3, heads, d)
        q, k, v = qkv.unbind(2)
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, L, d)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.proj(h.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """(B, L, D) -> (B, L, D)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """A transformer block, x (B, L, D) -> (B, L, D), conditioned on c (B, D) by adaLN-Zero."""

    def __init__(self, dim, num_heads, qk_norm):
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, num_heads, qk_norm)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim, int(2 / 3 * 4 * dim))  # as many weights as a plain MLP of ratio 4
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, cos, sin):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, -1)
        h = self.attn(modulate(self.norm1(x), shift_a, scale_a), cos, sin)
        x = x + gate_a[:, None] * h
        return x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class TimestepEmbedder(nn.Module):
    """t (B,) in [0, 1] -> (B, D), through 128 frequencies; t enters as it is, not times 1000."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        freqs = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angles = t.float()[:, None] * freqs
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1))


class FinalLayer(nn.Module):
    """x (B, L, D), c (B, D) -> (B, L, out)."""

    def __init__(self, dim, out):
        super().__init__()
        self.norm_final = RMSNorm(dim)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """The velocity of latents x (B, C, H, W) at time t (B,) for the classes y (B,).

    Class num_classes is the null class of classifier-free guidance. It exists only if labels are
    dropped in training; with a single class they never are.
    """

    def __init__(
        self,
        input_size=32,  # latent positions on a side
        patch_size=1,  # latent positions on a side of a token
        in_channels=16,  # channels C of the latent
        hidden_size=768,  # width D
        depth=12,  # blocks
        num_heads=12,
        num_classes=1000,
        qk_norm=True,
        class_dropout_prob=0.1,  # share of the labels that training replaces by the null class
    ):
        super().__init__()
        if input_size % patch_size:
            raise UserError(
                f"latents of {input_size} x {input_size} positions do not divide into patches of "
                f"{patch_size} x {patch_size}: choose a --model of patch 1, or another --image_size"
            )
        self.patch_size, self.grid = patch_size, input_size // patch_size
        self.in_channels, self.num_classes = in_channels, num_classes
        self.class_dropout_prob = class_dropout_prob if num_classes > 1 else 0.0
        rows = num_classes + 1 if self.class_dropout_prob > 0 else num_classes

        patch_map = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)
        self.x_embedder = nn.ModuleDict({"proj": patch_map})
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(rows, hidden_size)})
        table = position_table(hidden_size, self.grid)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.feat_rope = nn.Module()
        cos, sin = rotary_tables(hidden_size // num_heads, self.grid)
        self.feat_rope.register_buffer("freqs_cos", cos)
        self.feat_rope.register_buffer("freqs_sin", sin)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, in_channels * patch_size**2)
        self.initialize_weights()

    def initialize_weights(self):
        # Xavier for linear maps, of which the patch embedding is one, with zero biases.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder["proj"].weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder["proj"].bias)

        # Small embeddings of labels and times.
        nn.init.normal_(self.y_embedder["embedding_table"].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)

        # adaLN-Zero: each block starts as the identity, the network as the velocity 0.
        for module in (*self.blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x, t, y):
        """x (B, C, H, W), t (B,) in [0, 1], y (B,) classes -> velocity (B, C, H, W)."""
        p = self.patch_size
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed  # (B, L, D)
        c = self.t_embedder(t) + self.y_embedder["embedding_table"](y)  # (B, D)
        for block in self.blocks:
            x = block(x, c, self.feat_rope.freqs_cos, self.feat_rope.freqs_sin)
        x = self.final_layer(x, c)  # (B, L, p * p * C)
        # Patches to their places: (B, h, w, p, p, C) -> (B, C, h, p, w, p) -> (B, C, H, W).
        x = x.unflatten(-1, (p, p, -1)).unflatten(1, (self.grid, self.grid))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def flow_loss(model, x1, y, noise, t, cosine=False):
    """Rectified flow: the mean squared error of the velocity at x_t = t x1 + (1 - t) noise.

    x1, noise (B, C, H, W), x1 normalised latents; y, t (B,) -> scalar. cosine adds LightningDiT's
    1 - cos(velocity, target) over channels.
    """
    t_ = t.view(-1, 1, 1, 1)
    v = model(t_ * x1 + (1 - t_) * noise, t, y).float()
    target = x1 - noise
    loss = F.mse_loss(v, target)
    if cosine:
        loss = loss + (1 - F.cosine_similarity(v, target, dim=1)).mean()
    return loss


def guided_velocity(model, x, t, y, cfg_scale, cfg_channels):
    """Classifier-free guidance: v_uncond + cfg_scale (v_cond - v_uncond) on the first cfg_channels
    of the latent, v_cond on the others; both velocities come from one batch of twice the size.

    x (B, C, H, W), t a float, y (B,) -> velocity (B, C, H, W). Raises UserError, a ValueError, if
    the model has no null class.
    """
    if model.class_dropout_prob == 0:
        raise UserError(
            "guidance needs several classes and labels dropped in training: use cfg_scale 1"
        )
    t = torch.full((2 * len(x),), t, device=x.device)
    null = torch.full_like(y, model.num_classes)
    v = model(x.repeat(2, 1, 1, 1), t, torch.cat([y, null])).float()
    v_cond, v_uncond = v.chunk(2)
    guided = v_uncond[:, :cfg_channels] + cfg_scale * (v_cond - v_uncond)[:, :cfg_channels]
    return torch.cat([guided, v_cond[:, cfg_channels:]], 1)


# How the paper samples. [S] supplement  [R] the authors' release, whose demo pictures use
# neither cfg_start nor shift
SAMPLING = dict(
    steps=250,  # [S] Euler steps; the release's integrator evaluates 249 times
    cfg_scale=10.0,  # [R] guidance scale; 1 is no guidance, as for a single class
    cfg_channels=3,  # [R] latent channels that are guided, the first ones
    cfg_start=0.1,  # [R] t, on the shifted grid, from which guidance applies
    shift=0.3,  # [R] of the time grid; below 1 there are more steps near the noise
)


@torch.no_grad()
def sample(
    model,
    noise,
    y,
    steps=SAMPLING["steps"],
    cfg_scale=SAMPLING["cfg_scale"],
    cfg_channels=SAMPLING["cfg_channels"],
    cfg_start=SAMPLING["cfg_start"],
    shift=SAMPLING["shift"],
):
    """Euler's method: noise (B, C, H, W), classes y (B,) -> normalised latents (B, C, H, W).

    `steps` evaluations on a grid of steps + 1 times, u = 0, 1/steps, ..., 1, which the shift s
    bends: t = s u / (1 + (s - 1) u). With cfg_scale > 1, a step is guided if its starting time
    t >= cfg_start; the others take the conditional velocity.
    """
    uniform = [i / steps for i in range(steps + 1)]
    grid = [shift * u / (1 + (shift - 1) * u) for u in uniform]
    x = noise.float()
    for t, t_next in itertools.pairwise(grid):
        if cfg_scale > 1 and t >= cfg_start:
            v = guided_velocity(model, x, t, y, cfg_scale, cfg_channels)
        else:
            v = model(x, torch.full((len(x),), t, device=x.device), y).float()
        x = x + (t_next - t) * v
    return x


# The sizes of Peebles and Xie, with their patch of 2 and with 1, as in the paper's DiT-B/1. On the
# 32 x 32 latents of 256 pixels, patch 2 has 256 tokens, patch 1 has 1,024.
DiT_models = {
    "DiT-XL/1": functools.partial(DiT, patch_size=1, depth=28, hidden_size=1152, num_heads=16),
    "DiT-XL/2": functools.partial(DiT, patch_size=2, depth=28, hidden_size=1152, num_heads=16),
    "DiT-L/1": functools.partial(DiT, patch_size=1, depth=24, hidden_size=1024, num_heads=16),
    "DiT-L/2": functools.partial(DiT, patch_size=2, depth=24, hidden_size=1024, num_heads=16),
    "DiT-B/1": functools.partial(DiT, patch_size=1, depth=12, hidden_size=768, num_heads=12),
    "DiT-B/2": functools.partial(DiT, patch_size=2, depth=12, hidden_size=768, num_heads=12),
    "DiT-S/1": functools.partial(DiT, patch_size=1, depth=12, hidden_size=384, num_heads=6),
    "DiT-S/2": functools.partial(DiT, patch_size=2, depth=12, hidden_size=384, num_heads=6),
    # The demo's digits.
    "DiT-demo/1": functools.partial(DiT, patch_size=1, depth=4, hidden_size=128, num_heads=4),
}


def load(path):
    """A DiT with its EMA weights, in eval mode on the CPU, and info, the rest of its file.

    The file is from train_dit.py or LightningDiT. In ours, info holds the settings (args), the
    names of the classes (class_names), the statistics of the latents (latent_mean, latent_std), the
    settings of sampling (sampling) and the autoencoder (autoencoder, as ae.from_checkpoint takes
    it). Raises FileNotFoundError, UserError (a ValueError).
    """
    info = read_checkpoint(path)
    weights = plain_names(info.pop("ema", None) or info.get("model", info))
    if "x_embedder.proj.weight" not in weights:
        raise UserError(f"{path} holds no DiT: pass an autoencoder to train_dit.py --ae")
    if "feat_rope.freqs_cos" not in weights:
        raise UserError(f"{path} holds a DiT of another kind, not LightningDiT's")
    config = config_of(weights, info)
    if config["num_classes"] == 1:
        # Guidance needs several classes: DiT has no null class here, LightningDiT's may.
        table = "y_embedder.embedding_table.weight"
        weights[table] = weights[table][:1]
    model = DiT(**config)
    model.load_state_dict(weights)
    return model.eval(), info


def sampling_of(info, model):
    """The settings of `sample` for a model: those in info, what load returns of its file, else the
    paper's; without guidance if the model has no null class."""
    settings = dict(info.get("sampling", SAMPLING))
    args = info.get("args")
    if isinstance(args, dict) and "cfg_scale" in args:  # files of train_dit.py until 2026-11
        settings = {n: args["sample_steps" if n == "steps" else n] for n in SAMPLING}
    if model.class_dropout_prob == 0:
        settings["cfg_scale"] = 1.0
    return settings


def config_of(weights, info):
    """DiT's arguments, read off the tensors of a checkpoint.

    The number of classes is that of class_names in our files and of the config in LightningDiT's.
    If neither is there, the last row of several is the null class.
    """
    hidden_size, in_channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
    rows = len(weights["y_embedder.embedding_table.weight"])
    if "class_names" in info:
        num_classes = len(info["class_names"])
    else:
        config = info.get("config") or {}
        num_classes = config.get("data", {}).get("num_classes", max(1, rows - 1))
    return {
        "input_size": math.isqrt(weights["pos_embed"].shape[1]) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": sum(key.endswith("attn.qkv.weight") for key in weights),
        "num_heads": hidden_size // weights["feat_rope.freqs_cos"].shape[1],
        "num_classes": num_classes,
        "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
        # Above 0: the model has a null class. The value itself matters in training alone.
        "class_dropout_prob": 0.1 if rows > num_classes else 0.0,
    }
