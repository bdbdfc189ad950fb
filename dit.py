"""The diffusion transformer, LightningDiT with QK-norm, and rectified flow on it (supplement, section B.2).

Time runs from t = 0, noise, to t = 1, data; the network predicts the velocity, data - noise.

    flow_loss(model, x1, y, noise, t)     what training minimises
    sample(model, noise, y, ...)          Euler steps along the velocity, with classifier-free guidance

DiT and its initialisation follow Peebles and Xie, "Scalable Diffusion Models with Transformers"; RMSNorm,
SwiGLU, rotary positions and QK-norm follow Yao and Wang, "Reconstruction vs. Generation", as do tensor names.
"""

import functools
import math
import os
import pickle
import struct

import torch
import torch.nn as nn
import torch.nn.functional as F

# what torch.load raises on files that it did not write, or that lost a part
NO_CHECKPOINT = (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, struct.error,
                 AttributeError, TypeError)

class RMSNorm(nn.Module):
    """x / rms(x) over the last dimension, times a learned weight; in float32 whatever the autocast."""
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, 1e-6).to(x.dtype)

def modulate(x, shift, scale):
    """x (B, L, D); shift, scale (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]

def rotate(x, cos, sin):
    """Rotary positions: channels (2i, 2i + 1) of x (B, L, heads, d) turn by an angle, tables (L, d)."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None, ::2], sin[:, None, ::2]   # the tables hold each angle twice
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -1)
    return turned.flatten(-2).to(x.dtype)

class Attention(nn.Module):
    def __init__(self, dim, num_heads, qk_norm):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()   # one weight for all heads
        self.k_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
    def forward(self, x, cos, sin):
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))   # (B, L, 3, heads, d)
        q, k, v = qkv.unbind(2)
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)
        h = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))   # (B, heads, L, d)
        return self.proj(h.transpose(1, 2).flatten(2))

class SwiGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)
    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)

class Block(nn.Module):
    """A transformer block steered by the condition c (B, D) through adaLN-Zero: x (B, L, D) -> (B, L, D)."""
    def __init__(self, dim, num_heads, qk_norm):
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, num_heads, qk_norm)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim, int(2 / 3 * 4 * dim))   # as many weights as a plain MLP of ratio 4
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
    def forward(self, x, c, cos, sin):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, -1)
        x = x + gate_a[:, None] * self.attn(modulate(self.norm1(x), shift_a, scale_a), cos, sin)
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
    def __init__(self, dim, out):
        super().__init__()
        self.norm_final = RMSNorm(dim)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        return self.linear(modulate(self.norm_final(x), shift, scale))

def position_table(dim, grid):
    """Fixed 2-D sin-cos positions (1, grid^2, dim): half of the channels for the column, half for the row."""
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega   # (grid, dim / 4)
    axis = torch.cat([angles.sin(), angles.cos()], 1)                   # (grid, dim / 2)
    return torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, 0)], 1).float()[None]

def rotary_tables(dim, grid):
    """cos and sin, each (grid^2, dim): half of the channels turn with the row, half with the column."""
    freqs = 10000 ** -(torch.arange(0, dim // 2, 2) / (dim // 2))
    angles = (torch.arange(grid)[:, None] * freqs).repeat_interleave(2, 1)   # (grid, dim / 2), one a pair
    angles = torch.cat([angles.repeat_interleave(grid, 0), angles.repeat(grid, 1)], 1)
    return angles.cos(), angles.sin()

class DiT(nn.Module):
    """input_size: latent positions on a side. Class num_classes is classifier-free guidance's null class; it
    exists if labels are dropped in training, which with a single class they are not.
    """
    def __init__(self, input_size=32, patch_size=1, in_channels=16, hidden_size=768, depth=12, num_heads=12,
                 num_classes=1000, qk_norm=True, class_dropout_prob=0.1):
        super().__init__()
        self.patch_size, self.grid = patch_size, input_size // patch_size
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob if num_classes > 1 else 0.0
        rows = num_classes + (self.class_dropout_prob > 0)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)})
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(rows, hidden_size)})
        self.pos_embed = nn.Parameter(position_table(hidden_size, self.grid), requires_grad=False)
        self.feat_rope = nn.Module()
        cos, sin = rotary_tables(hidden_size // num_heads, self.grid)
        self.feat_rope.register_buffer("freqs_cos", cos)
        self.feat_rope.register_buffer("freqs_sin", sin)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, in_channels * patch_size ** 2)
        self.initialise()
    def initialise(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder["proj"].weight.data.flatten(1))   # as a linear map
        nn.init.zeros_(self.x_embedder["proj"].bias)
        nn.init.normal_(self.y_embedder["embedding_table"].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        # adaLN-Zero: each block starts as the identity, the network as the velocity 0
        for module in (*self.blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
    def forward(self, x, t, y):
        """x (B, C, H, W), t (B,) in [0, 1], y (B,) classes, num_classes for none -> velocity like x."""
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed   # (B, L, D)
        c = self.t_embedder(t) + self.y_embedder["embedding_table"](y)               # (B, D)
        for block in self.blocks:
            x = block(x, c, self.feat_rope.freqs_cos, self.feat_rope.freqs_sin)
        x = self.final_layer(x, c)                                                   # (B, L, p * p * C)
        x = x.unflatten(-1, (self.patch_size, self.patch_size, -1)).unflatten(1, (self.grid, self.grid))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

DiT_models = {name: functools.partial(DiT, patch_size=1, hidden_size=width, depth=depth, num_heads=heads)
              for name, depth, width, heads in (
    ("DiT-demo/1", 4, 128, 4),   # the digits of the demo
    ("DiT-S/1", 12, 384, 6),
    ("DiT-B/1", 12, 768, 12),
    ("DiT-L/1", 24, 1024, 16),
    ("DiT-XL/1", 28, 1152, 16),
)}

def flow_loss(model, x1, y, noise, t, cosine=False):
    """Rectified flow: the mean squared error of the velocity at x_t = t x1 + (1 - t) noise -> scalar.

    x1, noise (B, C, H, W), x1 normalised latents; y, t (B,). cosine adds LightningDiT's 1 - cos(channels).
    """
    t_ = t.view(-1, 1, 1, 1)
    v = model(t_ * x1 + (1 - t_) * noise, t, y).float()
    target = x1 - noise
    loss = F.mse_loss(v, target)
    if cosine:
        loss = loss + (1 - F.cosine_similarity(v, target, dim=1)).mean()
    return loss

def guided_velocity(model, x, t, y, cfg_scale, cfg_channels):
    """v_uncond + cfg_scale (v_cond - v_uncond) on the first cfg_channels channels, v_cond on the others.

    t a float. Without guidance, cfg_scale <= 1, the unconditional half is not computed. Raises ValueError if
    the model has no null class to be guided away from.
    """
    t = torch.full((len(x),), t, device=x.device)
    if cfg_scale <= 1:
        return model(x, t, y).float()
    if model.class_dropout_prob == 0:
        raise ValueError("guidance needs several classes and labels dropped in training: use cfg_scale 1")
    null = torch.full_like(y, model.num_classes)
    v, v_uncond = model(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, null])).float().chunk(2)
    guided = v_uncond[:, :cfg_channels] + cfg_scale * (v - v_uncond)[:, :cfg_channels]
    return torch.cat([guided, v[:, cfg_channels:]], 1)

@torch.no_grad()
def sample(model, noise, y, steps=250, cfg_scale=10.0, cfg_channels=3, cfg_start=0.1, shift=0.3):
    """Euler's method from noise (B, C, H, W), classes y (B,) -> normalised latents (B, C, H, W).

    `steps` evaluations on steps + 1 grid points, which a shift s < 1 moves towards the noise:
    t' = s t / (1 + (s - 1) t). Steps that start at t' < cfg_start are not guided.
    """
    grid = [shift * t / (1 + (shift - 1) * t) for t in (i / steps for i in range(steps + 1))]
    x = noise.float()
    for t, t_next in zip(grid, grid[1:]):
        scale = cfg_scale if t >= cfg_start else 1.0
        x = x + (t_next - t) * guided_velocity(model, x, t, y, scale, cfg_channels)
    return x

def load(path):
    """(DiT with its EMA weights in eval mode on the CPU, info), from a file of train_dit.py or LightningDiT.

    info is the rest of the file; in ours the autoencoder, latent_mean and latent_std, class_names, args.
    Raises FileNotFoundError or ValueError, one sentence that says what is wrong.
    """
    if not os.path.isfile(path):
        hint = f", but there is {path}/ckpt.pt" if os.path.exists(os.path.join(path, "ckpt.pt")) else ""
        if os.path.exists(os.path.join(path, "source.json")):
            hint = ": it is a latent cache, which belongs behind train_dit.py --cache"
        raise FileNotFoundError(f"there is no checkpoint file {path}{hint}")
    try:
        info = torch.load(path, map_location="cpu", weights_only=True)
    except NO_CHECKPOINT:
        raise ValueError(f"{path} is no checkpoint of PyTorch tensors, or a damaged one")
    weights = info.pop("ema", None) or info.get("model") if isinstance(info, dict) else None
    if not isinstance(weights, dict) or not any(key.endswith("x_embedder.proj.weight") for key in weights):
        raise ValueError(f"{path} holds no DiT: an autoencoder belongs behind train_dit.py --ae")
    weights = {k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in weights.items()}
    try:
        if info.get("kind") == "dit":
            model = DiT_models[info["dit_config"].pop("name")](**info["dit_config"])
        else:
            model = DiT(**config_of(weights))
        model.load_state_dict(weights)
    except (RuntimeError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} does not fit this DiT: {' '.join(str(error).split())[:300]}")
    return model.eval(), info

def config_of(weights):
    """DiT's arguments, read off the tensors of a LightningDiT checkpoint."""
    hidden_size, in_channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
    rows = len(weights["y_embedder.embedding_table.weight"])
    return {"input_size": math.isqrt(weights["pos_embed"].shape[1]) * patch_size, "patch_size": patch_size,
            "in_channels": in_channels, "hidden_size": hidden_size,
            "depth": sum(key.endswith("attn.qkv.weight") for key in weights),
            "num_heads": hidden_size // weights["feat_rope.freqs_cos"].shape[1],
            "num_classes": max(1, rows - 1),   # the last row is the null class, except of a single class
            "qk_norm": "blocks.0.attn.q_norm.weight" in weights}
