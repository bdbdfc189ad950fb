"""Inception Score, FID, sFID, precision and recall, as OpenAI's TensorFlow evaluator computes them.

    python fid.py ref.npz samples.npz                 the five metrics, in that evaluator's format
    python fid.py photos/ samples/ --json fid.json    folders of images; also write a file
    python fid.py photos/ samples/ --crop 256         photographs of any size, cropped as ADM does
    python fid.py photos/ --save_stats ref.npz        run the network once; REF later: ref.npz
    torchrun --nproc_per_node=8 fid.py ref.npz samples.npz

REF and SAMPLES are each a folder of images (searched recursively, all of one size) or a .npz file.
The file holds images as arr_0 (N, H, W, 3) uint8, statistics as mu, sigma (pool features) and
mu_s, sigma_s (spatial features), or both, like ADM's reference batches. --save_stats writes
these statistics, and as pool (N, 2048) the pool features of the images for precision and recall, so
that REF is not computed again. What is stored takes precedence over the images. Metrics that cannot
be computed are left out with a message.

Image files are read as a viewer shows them: EXIF orientation applied, transparency over white.
pytorch-fid ignores the first and shows the colours hidden under the second. Colour profiles are
ignored, as by every evaluator. For the Inception Score, the images of a .npz file are taken in file
order, and those of a folder in a fixed random order. Existing files are never replaced.
"""

import argparse
import functools
import json
import math
import os
import re
import signal
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy.linalg import lapack
from tqdm import tqdm

# the weights of TensorFlow's graph of 2015-12-05, converted to PyTorch
WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + WEIGHTS

# the features of a set of images: statistics of N images for FID and sFID, the pool features
# themselves, and how the images were resized; the keys and shapes of what --save_stats writes
# (mu_s: 7 of the channels of Mixed_6d at 17 x 17 positions, see InceptionV3.forward)
STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}
FEATURES = {**STATISTICS, "pool": ("N", 2048), "half_pixel": ()}

# the metrics in the evaluator's order, with what each is computed from
METRICS = {
    "Inception Score": "images or pool features of SAMPLES",
    "FID": "mu, sigma of both",
    "sFID": "mu_s, sigma_s of both",
    "Precision": "more than k = 3 images of both",
    "Recall": "more than k = 3 images of both",
}

SPLIT_SIZE = 5000  # images per split of the Inception Score


def parse_args():
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("ref", metavar="REF", type=text, help="real images: a folder or a .npz file")
    add("samples", metavar="SAMPLES", type=text, nargs="?", help="images to evaluate: likewise")
    add("--save_stats", metavar="FILE", type=text, help="write REF's statistics and features")
    add("--json", metavar="FILE", type=text, help="write the metrics to this file too")
    add("--inception", metavar="FILE", type=text, help="weights; None downloads them once, 91 MiB")
    add("--half_pixel", **SWITCH, default=0, help="resizing: 1 pytorch-fid's, 0 TensorFlow 1's")
    add("--crop", metavar="N", type=number(int, 1), help="ADM's crop of folders to N x N pixels")
    add("--batch", metavar="N", type=number(int, 1), default=64, help="images per batch, process")
    add("--workers", metavar="N", type=number(int, 1), default=8, help="decoding threads a process")
    add("--device", metavar="NAME", type=text, help="cpu, cuda, cuda:1; None is a GPU if present")
    args = parser.parse_intermixed_args()  # flags may stand between REF and SAMPLES

    if not args.samples and (args.json or not args.save_stats):
        parser.error("SAMPLES is missing")
    targets = [os.path.abspath(file) for file in (args.json, args.save_stats) if file]
    for file in targets:
        if os.path.lexists(file) or targets.count(file) > 1:
            raise UserError(f"{file} is there already, or named twice: name another file")
        if not os.access(os.path.dirname(file), os.W_OK):
            raise UserError(f"{file} cannot be written: its folder is missing or read-only")
    return args


# ---- from two sets of images to the metrics ----


def main():
    """Print the metrics of SAMPLES, and write the files that --json and --save_stats ask for."""
    args = parse_args()
    rank, _, device = join_processes(args.device)

    # The same path twice is processed once.
    sets = {path: open_set(path, args) for path in (args.ref, args.samples) if path}
    features = {path: stored for path, (stored, _, _) in sets.items()}

    # The network is for images, and its last layer for the Inception Score of stored features.
    net = None
    if any(count for _, count, _ in sets.values()) or "pool" in features.get(args.samples, ()):
        load = functools.partial(load_inception, args.inception, bool(args.half_pixel))
        net = local_rank_0_first(load).to(device)
    for path, (stored, count, batches) in sets.items():
        if count:
            features[path] = run_network(net, count, batches, path, args.batch, device) | stored

    # Ranks other than 0 have nothing left to do, and wait for it at the end.
    if rank == 0 and args.save_stats:
        with whole_file(args.save_stats) as file:
            np.savez(file, **features[args.ref])
    if rank == 0 and args.samples:
        metrics = compute_metrics(net, features[args.ref], features[args.samples], device)
        for name, needed in METRICS.items():
            if name in metrics:
                print(f"{name}: {metrics[name]}")
            else:
                note(f"{name} is left out: it needs {needed}.")
        if args.json:
            # 0 for a file that holds only statistics
            sides = {"REF images": args.ref, "SAMPLES images": args.samples}
            counts = {side: len(features[path].get("pool", ())) for side, path in sides.items()}
            with whole_file(args.json) as file:
                file.write(json.dumps(metrics | counts, indent=2).encode() + b"\n")
    leave_processes()


def run_network(net, count, batches, title, batch, device):
    """Run the network on a set of images, and return their features by name.

    All processes must call it: each runs a part of the images, and all return the whole. count,
    batches: as open_set returns them; title: what the progress bar says.
    """
    # Batches are dealt out to the processes in turn. So a batch holds the same images, and its
    # features are rounded in the same way, for any number of processes.
    rank, world = rank_and_world()
    starts = range(rank * batch, count, world * batch)
    spans = [(start, min(start + batch, count)) for start in starts]

    pool = torch.zeros(count, 2048, device=device)
    of_pool, of_spatial = Statistics(2048, device), Statistics(2023, device)
    bar = tqdm(spans, title, unit="batch", disable=rank > 0)
    for (start, stop), pixels in zip(bar, batches(spans), strict=True):
        batch_pool, spatial = net(pixels.to(device).permute(0, 3, 1, 2))
        pool[start:stop] = batch_pool
        of_pool.update(batch_pool)
        of_spatial.update(spatial)

    # The rows of the images of other processes are zero, so the sum fills them in.
    all_reduce(pool)
    arrays = (*of_pool.finish(), *of_spatial.finish(), pool)
    names = (*STATISTICS, "pool")
    return {name: x.cpu().numpy() for name, x in zip(names, arrays, strict=True)}


def compute_metrics(net, ref, samples, device):
    """Return the metrics by name, without those that cannot be computed.

    ref, samples: features by name. net: its last layer gives the Inception Score; None if there are
    neither images nor, in samples, stored pool features.
    """
    ref_pool, pool = (torch.as_tensor(x.get("pool", ()), device=device) for x in (ref, samples))
    metrics = {}
    if net is not None and len(pool):
        metrics["Inception Score"] = inception_score(net.probs(pool), SPLIT_SIZE)
        last = len(pool) % SPLIT_SIZE
        if len(pool) > SPLIT_SIZE and 0 < last < SPLIT_SIZE / 2:
            note(
                f"The last split of the Inception Score has {last} of {SPLIT_SIZE} images but "
                "counts as much as the others, which lowers the score."
            )
    # The same distance of other features: FID's are pooled, sFID's 7 channels of a middle layer.
    for name, mu, sigma in (("FID", "mu", "sigma"), ("sFID", "mu_s", "sigma_s")):
        if {mu, sigma} <= ref.keys() & samples.keys():
            metrics[name] = frechet_distance(ref[mu], ref[sigma], samples[mu], samples[sigma])
    if min(len(ref_pool), len(pool)) > 3:
        metrics["Precision"], metrics["Recall"] = precision_recall(ref_pool, pool)
    return metrics


def note(sentence):
    """Print a line to stderr, from rank 0."""
    if rank_and_world()[0] == 0:
        print(sentence, file=sys.stderr)


# ---- measures ----


def inception_score(probs, split_size=SPLIT_SIZE):
    """Inception Score (Salimans et al. 2016), a float.

    It is exp(mean KL(p(y|x) || p(y))), computed on each split of the images in order and averaged;
    a shorter last split has the same weight as the others.

    probs (N, classes): class probabilities, an array or tensor whose rows sum to 1. Raises
    ValueError for another shape and for N = 0.
    """
    probs = torch.as_tensor(probs)
    if probs.ndim != 2 or len(probs) == 0:
        raise ValueError(f"Probabilities must be of shape (N, classes), not {tuple(probs.shape)}.")
    scores = []
    for p in probs.double().split(split_size):
        kl = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))  # xlogy: 0 log 0 = 0
        scores.append(kl.sum(1).mean().exp().item())
    return sum(scores) / len(scores)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 sqrt(sigma1 sigma2)), a float (Heusel et al. 2017).

    This is FID for the statistics of pool features, and sFID for those of spatial features.

    mu (d,), sigma (d, d): means and covariances, arrays or tensors. Raises UserError for shapes
    that do not fit together, for NaN and infinity, and for matrices that are not covariances.
    """
    statistics = (mu1, sigma1, mu2, sigma2)
    statistics = [np.asarray(torch.as_tensor(x, device="cpu").double()) for x in statistics]
    mu1, sigma1, mu2, sigma2 = statistics
    d = mu1.size
    shapes = [x.shape for x in statistics]
    if shapes != [(d,), (d, d), (d,), (d, d)]:
        raise UserError(f"Statistics of shapes {shapes} do not fit together.")
    if not all(np.isfinite(x).all() and np.allclose(x, x.T) for x in statistics):
        raise UserError(
            "Statistics contain NaN, infinity or a covariance that is not symmetric; "
            "compute them again."
        )

    # With sigma = R R^T, the matrix sigma1 sigma2 has the same nonzero eigenvalues as
    # (R1^T R2)(R1^T R2)^T. The pivoting in square_root sorts the rows of R1^T R2 by size, which
    # keeps the small eigenvalues exact: two equal sets of any rank are at 1e-14 of the trace.
    r1, r2 = sorted((square_root(sigma1), square_root(sigma2)), key=lambda r: r.shape[1])
    roots = torch.linalg.eigvalsh(r1.T @ r2 @ (r1.T @ r2).T).clamp(min=0).sqrt()
    # This part is the minimum of |R1 - R2 Q|^2 over orthogonal Q: only rounding makes it negative.
    traces = r1.square().sum() + r2.square().sum() - 2 * roots.sum()
    return float(np.square(mu1 - mu2).sum() + max(traces.item(), 0))


def square_root(sigma):
    """Return a tensor R (d, rank) with R R^T = sigma, a covariance of shape (d, d).

    Its Cholesky decomposition with pivoting drops the null space, where sigma is rounding noise
    whose square root is not small. Raises UserError for clearly negative eigenvalues.
    """
    tolerance = len(sigma) * np.finfo(float).eps * sigma.max()
    factor, order, rank, _ = lapack.dpstrf(sigma, tol=tolerance, lower=1)
    root = np.tril(factor)[np.argsort(order), :rank]
    # Statistics that were stored as float32 have more noise than the tolerance allows for, and the
    # decomposition stops too early. The eigenvalues tell the noise from the rest.
    if abs(np.square(root).sum() - sigma.trace()) > 1e-9 * sigma.trace():
        values, vectors = np.linalg.eigh(sigma)
        if values[0] < -1e-6 * abs(values[-1]):
            raise UserError("A covariance must not have negative eigenvalues; compute it again.")
        root = vectors[:, values > tolerance] * np.sqrt(values[values > tolerance])
    return torch.from_numpy(root)


class Statistics:
    """Mean and unbiased covariance of features (N, dim) that come in batches, in float64.

    Call update(features) for each batch, on every process with its own, and finish() at the end.
    device: where they are accumulated; with NCCL, the GPU of the process.
    """

    def __init__(self, dim, device="cpu"):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        # the sum of (x - mean)(x - mean)^T
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features):
        """Add a batch of at least one feature, (N, dim)."""
        x = features.to(self.mean)
        share = len(x) / (self.count + len(x))
        step = x.mean(0) - self.mean
        # A sum of x x^T would lose digits when the mean is subtracted from it. So take the
        # deviations from the mean of the batch, and one more row for the distance of the means.
        rows = torch.cat([x - x.mean(0), math.sqrt(self.count * share) * step[None]])
        self.scatter.addmm_(rows.T, rows)
        self.mean += share * step
        self.count += len(x)

    def finish(self):
        """Return mu (dim,) and sigma (dim, dim) of the features of all processes.

        All processes must call it. Raises UserError if there are fewer than 2 features.
        """
        count = all_reduce(torch.tensor(self.count, device=self.mean.device)).item()
        if count < 2:
            raise UserError(f"A covariance needs at least 2 images, not {count}.")
        mean = all_reduce(self.mean * self.count) / count
        step = self.mean - mean
        scatter = all_reduce(self.scatter + self.count * torch.outer(step, step))
        return mean, scatter / (count - 1)


def precision_recall(ref_pool, sample_pool, k=3):
    """Improved precision and recall (Kynkaanniemi et al. 2019), two floats in [0, 1].

    Each point is the centre of a ball that reaches to its k-th nearest other point of the same set.
    Precision is the fraction of samples that lie in some ball of the reference, recall the fraction
    of the reference that lies in some ball of the samples. Distances are float64.

    ref_pool (N, d), sample_pool (M, d): features, arrays or tensors on one device. Raises
    ValueError for other shapes and if N or M is not above k.
    """
    ref, samples = torch.as_tensor(ref_pool), torch.as_tensor(sample_pool)
    if ref.ndim != 2 or ref.shape[1:] != samples.shape[1:] or min(len(ref), len(samples)) <= k:
        raise ValueError(
            f"Precision and recall need features (more than {k}, d) of both sets, "
            f"not {tuple(ref.shape)} and {tuple(samples.shape)}."
        )
    center = ref.mean(0).double()
    ref_radii = squared_radii(ref, center, k, "radii of REF")
    sample_radii = squared_radii(samples, center, k, "radii of SAMPLES")

    # In how many balls of the other set does each point lie?
    ref_hits, sample_hits = torch.zeros_like(ref_radii), torch.zeros_like(sample_radii)
    for rows, columns, distances in squared_distances(samples, ref, center, "precision, recall"):
        sample_hits[rows] += (distances <= ref_radii[columns]).sum(1)
        ref_hits[columns] += (distances <= sample_radii[rows, None]).sum(0)
    return (sample_hits > 0).double().mean().item(), (ref_hits > 0).double().mean().item()


def squared_radii(points, center, k, title):
    """Return the squared distance (N,) from each of points (N, d) to its k-th nearest other."""
    nearest = torch.full((len(points), k), math.inf, dtype=torch.float64, device=points.device)
    for rows, columns, distances in squared_distances(points, points, center, title):
        if rows == columns:
            # A point is not its own neighbour, but a copy of it in another row is one.
            distances.fill_diagonal_(math.inf)
        nearest[rows] = torch.cat([nearest[rows], distances], 1).topk(k, largest=False).values
    return nearest[:, -1]


def squared_distances(a, b, center, title, size=2048):
    """Yield a slice of a, a slice of b and the squared distances between their rows, 32 MiB.

    a (N, d), b (M, d). center (d,) is subtracted from both: the smaller the norms, the smaller the
    rounding error.
    """
    for i in tqdm(range(0, len(a), size), title, unit="block"):
        x = a[i : i + size].double() - center
        for j in range(0, len(b), size):
            y = b[j : j + size].double() - center
            scale = x.square().sum(1, keepdim=True) + y.square().sum(1)
            distances = torch.addmm(scale, x, y.T, alpha=-2)
            # For x = y, |x|^2 + |y|^2 - 2xy is rounding noise of either sign.
            distances.masked_fill_(distances < a.shape[1] * np.finfo(float).eps * scale, 0)
            yield slice(i, i + size), slice(j, j + size), distances


# ---- the network ----


def load_inception(path=None, half_pixel=False):
    """Return the network with the published weights, fused, frozen, in eval mode, on the CPU.

    path: the file of the weights. None is the file in torch's hub cache, which is downloaded on
    first use. half_pixel: see InceptionV3. Raises UserError if the file cannot be read.
    """
    if path is None:
        state = torch.hub.load_state_dict_from_url(
            URL, map_location="cpu", check_hash=True, file_name=WEIGHTS, weights_only=True
        )
    else:
        with open(path, "rb") as file, reading(path):
            state = torch.load(file, map_location="cpu", weights_only=True)
    net = InceptionV3(half_pixel)
    # dict() drops the format's version. PyTorch then accepts files without num_batches_tracked.
    net.load_state_dict(dict(state))
    return net.fuse().requires_grad_(False)


class InceptionV3(nn.Module):
    """TensorFlow's Inception graph of 2015-12-05, in eval mode, with random weights.

    load_inception returns it with the published weights, whose names its modules have.

    half_pixel: resize the images as pytorch-fid does (bilinear, half-pixel centres) and not as
    TensorFlow 1. Convolutions are float32, whatever the caller's settings are.
    """

    def __init__(self, half_pixel=False):
        super().__init__()
        self.half_pixel = half_pixel
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2, padding="valid")
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding="valid")
        self.Mixed_5b = Mixed5(192, c_pool=32)
        self.Mixed_5c = Mixed5(256, c_pool=64)
        self.Mixed_5d = Mixed5(288, c_pool=64)
        self.Mixed_6a = Mixed6a()
        self.Mixed_6b = Mixed6(128)
        self.Mixed_6c = Mixed6(160)
        self.Mixed_6d = Mixed6(160)
        self.Mixed_6e = Mixed6(192)
        self.Mixed_7a = Mixed7a()
        self.Mixed_7b = Mixed7(1280, average_pool)
        # The published graph has a max pool here, where Szegedy et al. average.
        self.Mixed_7c = Mixed7(2048, max_pool)
        self.fc = nn.Linear(2048, 1008)
        self.eval()

    @torch.no_grad()
    def forward(self, x):
        """Return the features of images x (N, 3, H, W) uint8, of any size.

        pool (N, 2048) is for FID, precision and recall; spatial (N, 2023) is for sFID. Raises
        ValueError for images of another type or shape.
        """
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"Images must be uint8 (N, 3, H, W), not {x.dtype} {tuple(x.shape)}.")
        # The caller may be training under autocast, and PyTorch's default is TF32 convolutions.
        with (
            torch.autocast(x.device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            if self.half_pixel:
                x = x.float() / 255
                x = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
            else:
                x = (resize_tf1(x.float()) - 128) / 128
            x = x.contiguous(memory_format=torch.channels_last)

            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = F.max_pool2d(x, 3, stride=2)  # (N, 64, 73, 73)
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
            x = F.max_pool2d(x, 3, stride=2)  # (N, 192, 35, 35)
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (N, 288, 35, 35)
            x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (N, 768, 17, 17)

            # The evaluator reads the graph's mixed_6/conv: the 1x1 branch of Mixed_6d, whose
            # channels come first. It keeps the first 7, flattened by height, width and channel.
            spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)

            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (N, 2048, 8, 8)
            return x.mean((2, 3)), spatial

    @torch.no_grad()
    def probs(self, pool):
        """Return class probabilities (N, 1008) float64 of pool features (N, 2048).

        Like the evaluator, without the bias of the last layer.
        """
        return (pool.double() @ self.fc.weight.double().T).softmax(1)

    @torch.no_grad()
    def fuse(self):
        """Fold the batch norms into the convolutions, go to channels_last, and return the network.

        It works in place: the network is faster, with the same results up to rounding.
        """
        for module in self.modules():
            if isinstance(module, Conv) and isinstance(module.bn, nn.BatchNorm2d):
                conv, bn = module.conv, module.bn
                scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
                conv.weight.copy_(conv.weight * scale.view(-1, 1, 1, 1))
                conv.bias = nn.Parameter((bn.bias - bn.running_mean * scale).float())
                module.bn = nn.Identity()
        return self.to(memory_format=torch.channels_last)


def resize_tf1(x, size=299):
    """Resize images (N, C, H, W) float to (N, C, size, size), bilinearly as in TensorFlow 1.

    Row i of the result is read at row i * H / size of the image: no half-pixel centres, no
    antialiasing. The same goes for columns.
    """
    for dim in (3, 2):
        source = torch.arange(size, device=x.device) * (x.shape[dim] / size)
        low = source.long()
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        weight = source - low
        if dim == 2:
            weight = weight[:, None]
        x_low = x.index_select(dim, low)
        x = x_low + (x.index_select(dim, high) - x_low) * weight
    return x


def average_pool(x):
    """The mean over 3x3 pixels; padding is not counted."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x):
    """The maximum over 3x3 pixels."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


class Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed5(nn.Module):
    """(N, c_in, 35, 35) -> (N, 224 + c_pool, 35, 35)"""

    def __init__(self, c_in, c_pool):
        super().__init__()
        self.branch1x1 = Conv(c_in, 64, 1)
        self.branch5x5_1 = Conv(c_in, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5)
        self.branch3x3dbl_1 = Conv(c_in, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(c_in, c_pool, 1)

    def forward(self, x):
        branches = [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(average_pool(x)),
        ]
        return torch.cat(branches, 1)


class Mixed6a(nn.Module):
    """(N, 288, 35, 35) -> (N, 768, 17, 17)"""

    def __init__(self):
        super().__init__()
        self.branch3x3 = Conv(288, 384, 3, stride=2, padding="valid")
        self.branch3x3dbl_1 = Conv(288, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2, padding="valid")

    def forward(self, x):
        branches = [
            self.branch3x3(x),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            F.max_pool2d(x, 3, stride=2),
        ]
        return torch.cat(branches, 1)


class Mixed6(nn.Module):
    """(N, 768, 17, 17) -> (N, 768, 17, 17), with c channels inside the 7x7 branches"""

    def __init__(self, c):
        super().__init__()
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1 = Conv(768, c, 1)
        self.branch7x7_2 = Conv(c, c, (1, 7))
        self.branch7x7_3 = Conv(c, 192, (7, 1))
        self.branch7x7dbl_1 = Conv(768, c, 1)
        self.branch7x7dbl_2 = Conv(c, c, (7, 1))
        self.branch7x7dbl_3 = Conv(c, c, (1, 7))
        self.branch7x7dbl_4 = Conv(c, c, (7, 1))
        self.branch7x7dbl_5 = Conv(c, 192, (1, 7))
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x):
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branches = [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(average_pool(x)),
        ]
        return torch.cat(branches, 1)


class Mixed7a(nn.Module):
    """(N, 768, 17, 17) -> (N, 1280, 8, 8)"""

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = Conv(768, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2, padding="valid")
        self.branch7x7x3_1 = Conv(768, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2, padding="valid")

    def forward(self, x):
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        branches = [
            self.branch3x3_2(self.branch3x3_1(x)),
            self.branch7x7x3_4(seven),
            F.max_pool2d(x, 3, stride=2),
        ]
        return torch.cat(branches, 1)


class Mixed7(nn.Module):
    """(N, c_in, 8, 8) -> (N, 2048, 8, 8); pool is average_pool or max_pool"""

    def __init__(self, c_in, pool):
        super().__init__()
        self.pool = pool
        self.branch1x1 = Conv(c_in, 320, 1)
        self.branch3x3_1 = Conv(c_in, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3))
        self.branch3x3_2b = Conv(384, 384, (3, 1))
        self.branch3x3dbl_1 = Conv(c_in, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1))
        self.branch_pool = Conv(c_in, 192, 1)

    def forward(self, x):
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        ]
        return torch.cat(branches, 1)


# ---- sets of images ----

# suffixes that Pillow knows and that are documents, videos or data
NO_PICTURES = {".pdf", ".eps", ".ps", ".wmf", ".emf", ".mpg", ".mpeg", ".fli", ".flc"}
NO_PICTURES |= {".h5", ".hdf", ".grib", ".bufr", ".fit", ".fits", ".iim", ".palm"}


def list_images(folder):
    """Find the images of a folder and its sub-folders, whose links are followed.

    Returns their paths relative to it, sorted, and the number of other files, which are passed
    over. An image has a suffix that Pillow knows and that is no document, video or data. Names that
    begin with "." and __MACOSX are not there. Raises OSError if a folder is missing or cannot be
    read, UserError if there are no images.
    """
    suffixes = Image.registered_extensions().keys() - NO_PICTURES
    files, others, seen, errors = [], 0, set(), []
    for path, folders, names in os.walk(folder, followlinks=True, onerror=errors.append):
        real = os.path.realpath(path)
        if real in seen:  # reached through a link
            folders.clear()  # os.walk goes on into what is left in this list
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__MACOSX")
        inside = os.path.join(os.path.relpath(path, folder), "").removeprefix("./")
        for name in names:
            if os.path.splitext(name)[1].lower() in suffixes and name[0] != ".":
                files.append(inside + name)
            elif name[0] != ".":
                others += 1
    if errors:
        raise errors[0]
    if not files:
        raise UserError(f"{folder} has no images (.jpg, .png, .webp, ...) but {others} other files")
    return sorted(files), others


def read_image(file, labels=False):
    """Read a file as a viewer shows it, and return a PIL image in mode RGB.

    EXIF orientation is applied, and transparency is put over white. (pytorch-fid ignores the first
    and shows the colours hidden under the second.) Colour profiles are ignored. 16-bit grey is
    scaled by 65535, so a camera's 12 bits in 16 stay dark; 16-bit colours are cut to 8 bits by
    Pillow.

    labels: only apply the orientation, and keep the values as they are stored. Raises UserError
    with the file's name if it cannot be read or has 32 bits per channel.
    """
    with reading(file), Image.open(file) as image:
        image.load()
        with suppress(Exception):  # EXIF data that cannot be read turn nothing
            ImageOps.exif_transpose(image, in_place=True)
        if labels:
            return image.copy()
        # A PNG or PGM file has no more than 16 bits, but may come in a mode of 32.
        narrow = image.mode == "I" and image.format in ("PNG", "PPM")
        if narrow or image.mode.startswith("I;16"):
            pixels = np.asarray(image)
            clear = pixels == image.info.get("transparency", -1)
            image = Image.fromarray(np.where(clear, 255, pixels >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError("it has 32 bits per channel: save it with 8 or 16")
        elif image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
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


def open_set(path, args):
    """Return the stored features of a set of images by name, the number of images that have to go
    through the network, and a function batches(spans).

    batches yields the images of each span (start, stop), (N, H, W, 3) uint8, all of one size.
    Raises UserError for a file that cannot be used, OSError for one that is missing.
    """
    if os.path.isdir(path):
        files, others = list_images(path)
        note(f"{path}: {len(files)} images, {others} other files passed over")
        # The Inception Score is computed in splits. In the order of their names a split often holds
        # few classes, which lowers the score, so the order is random, but always the same.
        order = np.random.RandomState(0).permutation(len(files)).argsort()
        files = [os.path.join(path, files[i]) for i in order]
        batches = functools.partial(folder_batches, files, args.workers, args.crop)
        return {"half_pixel": args.half_pixel}, len(files), batches

    if not path.endswith(".npz"):
        raise UserError(f"{path} is neither a folder nor a .npz file")
    with open(path, "rb") as stream, reading(path), np.load(stream) as file:
        stored = {name: file[name] for name in FEATURES if name in file.files}
        if not stored and "arr_0" not in file.files:
            raise ValueError(f"it has neither arr_0 nor {', '.join(STATISTICS)}")
        if ("mu" in stored) != ("sigma" in stored) or ("mu_s" in stored) != ("sigma_s" in stored):
            raise ValueError("of mu and sigma, or of mu_s and sigma_s, it has only one")
        if not all(np.isfinite(array).all() for array in stored.values()):
            raise ValueError("its features contain NaN or infinity")
        count = 0
        if "pool" not in stored and "arr_0" in file.files:
            with file.zip.open("arr_0.npy") as array:
                count = read_header(array)[0]
    if not stored:
        stored["half_pixel"] = args.half_pixel
    elif "half_pixel" not in stored:
        hint = "" if args.half_pixel else "; if they are pytorch-fid's, add --half_pixel 1"
        note(f"{path} does not say how the images of its statistics were resized{hint}.")
    elif stored["half_pixel"] != args.half_pixel:
        raise UserError(
            f"{path} was saved with --half_pixel {stored['half_pixel']}: give that here, too"
        )
    return stored, count, functools.partial(npz_batches, path)


def folder_batches(files, workers, crop, spans):
    """Yield the images of the files in each span; `workers` threads decode the next ones ahead."""

    def read(file):
        image = read_image(file)
        return np.asarray(center_crop(image, crop) if crop else image)

    def stack(span, images):
        images = list(images)
        for file, image in zip(files[slice(*span)], images, strict=True):
            if image.shape != shape:
                raise UserError(
                    f"{file} is (H, W, 3) = {image.shape}, but {files[0]} is {shape}: bring the "
                    "images of a set to one size first, or --crop them"
                )
        return torch.from_numpy(np.stack(images))

    shape = read(files[0]).shape
    with ThreadPoolExecutor(workers) as pool:
        before = None
        for span in spans:
            coming = span, pool.map(read, files[slice(*span)])  # which begins at once
            if before:
                yield stack(*before)
            before = coming
        if before:
            yield stack(*before)


def npz_batches(path, spans):
    """Yield the images of a .npz file in each span.

    The array may be compressed and larger than memory, so the file is read in pieces. It is read
    forward and to its end, where zipfile compares the checksum: since Python 3.13 a seek switches
    that off.
    """
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        _, *shape = read_header(stream)
        size, position = math.prod(shape), 0
        for start, stop in spans:
            with reading(path):
                for _ in range(position, start):
                    stream.read(size)  # an image of another process
                pixels = bytearray(stream.read((stop - start) * size))
            yield torch.frombuffer(pixels, dtype=torch.uint8).view(-1, *shape)
            position = stop
        with reading(path):
            while stream.read(2**20):
                pass


def read_header(stream):
    """Read the header of arr_0.npy and return its shape, (N, H, W, 3); the pixels come next."""
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0}
    header = read.get(version, np.lib.format.read_array_header_2_0)(stream)
    shape, fortran_order, dtype = header
    if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[3] != 3 or not shape[0]:
        raise ValueError(f"arr_0 must be uint8 (N, H, W, 3) in C order, but is {dtype} {shape}")
    return shape


# ---- what the other scripts import, too: flags, processes, files, how a script ends ----


class UserError(ValueError):
    """A mistake or a limit that the user can do something about; they see only the message."""


def run_main(main):
    """Run a script's main. A UserError, Ctrl-C and a loader process that died end it with one
    sentence; everything else ends in its traceback."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115 (a closed one is None)
        with suppress(AttributeError):  # a notebook's cannot be changed
            stream.reconfigure(errors="backslashreplace")  # for paths that it cannot show
        setattr(sys, name, stream)
    try:
        main()
    except UserError as error:
        # That of a loader process comes with its traceback, whose last line has the sentence.
        sys.exit(str(error).rpartition("UserError: ")[2].strip())
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends it once more
        sys.exit("stopped; a training run goes on with --resume")
    except RuntimeError as error:
        # PyTorch raises this wherever the script happens to be.
        if not re.match(r"DataLoader worker \(pid", str(error)):
            raise
        sys.exit(
            "a process that loads images died, perhaps for want of memory or of room in "
            "/dev/shm (in Docker: --shm-size or --ipc=host): try fewer --workers "
            f"({str(error).splitlines()[0]})"
        )


def new_parser(doc=None, **options):
    """An argparse parser that shows the docstring as it is and the default of each flag."""

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    return argparse.ArgumentParser(
        description=doc, formatter_class=Help, allow_abbrev=False, **options
    )


def number(convert, low, high=math.inf):
    """An argparse type: a finite number that convert, int or float, reads, from low to high."""

    def parse(word):
        value = convert(word)
        if not low <= value <= high or math.isinf(value):
            limits = f"of {low} or more" if math.isinf(high) else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{word} is not a finite number {limits}")
        return value

    parse.__name__ = convert.__name__  # for argparse's message: "invalid int value: 'x'"
    return parse


def text(word):
    """An argparse type: a word that is not empty, as an unset variable of the shell is."""
    if not word:
        raise argparse.ArgumentTypeError("an empty string")
    return word


SWITCH = dict(type=int, choices=(0, 1))  # of a flag that is on or off


def local_rank():
    """This process's number on its machine; 0 if torchrun has not set it."""
    return int(os.environ.get("LOCAL_RANK", 0))


def rank_and_world():
    """This process's rank and the number of processes: 0 and 1 without torch.distributed."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def join_processes(device=None):
    """Join the other processes that torchrun has started, if any. Returns this process's rank,
    their number, and this process's device, "cpu" or "cuda:N", which becomes the current one.

    device: "cpu", "cuda:N", or "cuda", which is GPU LOCAL_RANK of the machine; None is "cuda" if
    there is a GPU. Raises UserError if there is no such device.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    device = device or ("cuda" if gpus else "cpu")
    if device == "cuda":
        device = f"cuda:{local_rank()}"
    if device not in ("cpu", *gpus):
        raise UserError(f"--device {device} is not there: PyTorch finds {len(gpus)} GPUs")
    if device != "cpu":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        # gloo for what is on the CPU. The others wait for hours while rank 0 draws pictures or
        # computes precision and recall, not for NCCL's ten minutes.
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timedelta(hours=6))
    return *rank_and_world(), device


def wait_for_all():
    """Wait until all processes, if there are several, have come here."""
    if dist.is_initialized():
        dist.barrier()


def leave_processes():
    """Wait for the other processes, then close the process group."""
    if dist.is_initialized():
        # PyTorch before 2.8 can hang in destroy_process_group if a thread of gloo's holds the last
        # reference to the barrier. This variable holds one until after that.
        barrier = dist.barrier(async_op=True)
        barrier.wait()
        dist.destroy_process_group()


def local_rank_0_first(load):
    """Return load(), which downloads a file in the first process of a machine; the others come
    after it and find the file."""
    if local_rank() > 0:
        wait_for_all()
    result = load()
    if local_rank() == 0:
        wait_for_all()
    return result


def all_reduce(x, op=dist.ReduceOp.SUM):
    """Reduce the tensor x over all processes, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x


@contextmanager
def whole_file(path, sync=False):
    """A binary file to write, which becomes `path` when all of it is written.

    Until then its name has this process's number, so that of two processes either file is whole.
    sync: wait until it is on the disk.
    """
    part = f"{path}.{os.getpid()}.tmp"
    try:
        with open(part, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


@contextmanager
def reading(path):
    """Around the reading of a file of which nothing is known: whatever the reader raises, dozens of
    kinds, becomes a UserError with the file's name."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} cannot be read ({reason})") from error


if __name__ == "__main__":
    run_main(main)
