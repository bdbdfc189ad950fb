"""Inception Score, FID, sFID, precision and recall, as OpenAI's TensorFlow evaluator computes them.

examples:
  python fid.py ref.npz samples.npz                 the five metrics, in that evaluator's format
  python fid.py photos/ samples/ --json fid.json    folders of images; also write a file
  python fid.py photos/ --save_stats ref.npz        run the network on REF once; REF later: ref.npz
  torchrun --nproc_per_node=8 fid.py ref.npz samples.npz

REF and SAMPLES are each a folder of images (searched recursively, all of one size) or a .npz file.
The file holds images as arr_0 (N, H, W, 3) uint8, statistics as mu, sigma (pool features) and
mu_s, sigma_s (spatial features), or both, like ADM's reference batches. --save_stats writes
these statistics, and as pool (N, 2048) the pool features of the images for precision and recall, so
that REF is not computed again. What is stored takes precedence over the images. Metrics that cannot
be computed are left out with a message.
"""

import argparse
import json
import math
import os
import pickle
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import lapack
from tqdm import tqdm

# the weights of TensorFlow's graph of 2015-12-05, converted to PyTorch
WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + WEIGHTS

# the statistics that a .npz file may hold, with their shapes
STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}

# the metrics in the evaluator's order, with what each is computed from
METRICS = {
    "Inception Score": "images of SAMPLES",
    "FID": "mu, sigma of both",
    "sFID": "mu_s, sigma_s of both",
    "Precision": "4 images of both",
    "Recall": "4 images of both",
}

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class UserError(ValueError):
    """A user's mistake, such as a damaged file. Its message is the one sentence the user sees."""


class MissingFile(UserError, FileNotFoundError):
    """A file that does not exist or could not be downloaded."""


def main():
    try:
        evaluate(parse_args())
    except UserError as error:
        exit_once(error)


def parse_args():
    wide = partial(argparse.RawDescriptionHelpFormatter, width=100)
    parser = ArgumentParser(description=__doc__, formatter_class=wide)
    add = parser.add_argument_group("sets").add_argument
    add("ref", metavar="REF", help="real images to compare with: a folder or a .npz file")
    add("samples", metavar="SAMPLES", nargs="?", help="images to evaluate: a folder or a .npz file")
    add = parser.add_argument_group("output").add_argument
    add("--json", metavar="FILE", help="write the metrics to this file too")
    add(
        "--save_stats",
        metavar="FILE.npz",
        help="write REF's statistics and features; needs no SAMPLES",
    )
    add = parser.add_argument_group("network").add_argument
    add("--inception", metavar="FILE", help="its weights (default: downloaded once, 91 MiB)")
    on_off = {"nargs": "?", "type": switch, "const": 1, "default": 0, "metavar": "0|1"}
    add("--half_pixel", **on_off, help="resize like pytorch-fid (default: like TensorFlow 1)")
    add("--tf32", **on_off, help="faster, less exact convolutions on a GPU (default: float32)")
    add = parser.add_argument_group("speed", "of each process").add_argument
    add("--batch", type=at_least(1), default=64, metavar="N", help="images per batch (default: 64)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--workers", type=at_least(1), default=8, metavar="N", help="decoding threads (default: 8)")
    args = parser.parse_args()

    if not (args.samples or args.save_stats):
        parser.error("SAMPLES is missing")
    for flag, file in (("--json", args.json), ("--save_stats", args.save_stats)):
        if file and not Path(file).absolute().parent.is_dir():
            parser.error(f"{flag} {file} cannot be written because its folder does not exist")
    return args


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, except that a wrong command line raises UserError."""

    def error(self, message):
        raise UserError(f"{message}; see fid.py --help.")


def at_least(low):
    """Return an argparse type: a number of the same type as low (int or float), low or more."""

    def number(text):
        value = type(low)(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"must be {low} or more, not {text}")
        return value

    return number


def switch(text):
    """The argparse type of a flag that is on (1, or the flag alone) or off (0)."""
    if text not in ("0", "1"):
        # text may be REF, which argparse takes for the value of a flag in front of it.
        raise argparse.ArgumentTypeError(
            f"takes 0 or 1, not {text}; put a flag without a number after REF and SAMPLES"
        )
    return int(text)


def exit_once(error):
    """Exit with the error's message, so that the user sees it once even under torchrun.

    There, all processes usually run into the same mistake. Local rank 0 exits with the message at
    once, and the others wait: torchrun ends them when it sees that local rank 0 has exited. A
    process that is still there after 10 seconds has seen something that local rank 0 has not, such
    as a damaged image, so it exits with the message itself.
    """
    if local_rank() > 0:
        time.sleep(10)
    sys.exit(str(error))


# ---- from two sets of images to the metrics ----


def evaluate(args):
    """Print the metrics of SAMPLES, and write the files that --json and --save_stats ask for."""
    device = choose_device(args.device)
    if "RANK" in os.environ:  # set by torchrun
        backend = "nccl" if device.type == "cuda" else "gloo"
        # The other processes wait while the weights are downloaded, perhaps slowly.
        dist.init_process_group(backend, timeout=timedelta(hours=1))
    rank, _ = rank_and_world()

    # If REF and SAMPLES are the same path, it is processed once.
    sets = {path: open_set(path, args.half_pixel) for path in (args.ref, args.samples) if path}
    net = None
    if any(image_set.count for image_set in sets.values()):
        net = load_inception(args.inception, bool(args.half_pixel), bool(args.tf32)).to(device)
    features = {}
    for path, image_set in sets.items():
        if image_set.count:
            features[path] = extract_features(
                net, image_set, path, batch=args.batch, workers=args.workers, device=device
            )
        else:
            features[path] = Features(image_set.pool.to(device), image_set.statistics)

    if args.save_stats and rank == 0:
        arrays = {"half_pixel": args.half_pixel, **features[args.ref].statistics}
        if len(features[args.ref].pool):
            arrays["pool"] = features[args.ref].pool.cpu().numpy()
        np.savez(args.save_stats, **arrays)
    if args.samples:
        metrics = compute_metrics(net, features[args.ref], features[args.samples])
        if rank == 0:
            report(metrics, args.json)
    if dist.is_initialized():
        leave_processes()


def choose_device(name):
    """Return the torch.device for --device, and make it current if it is a GPU.

    Without a name it is a GPU if there is one. "cuda" is cuda:0, or under torchrun the GPU whose
    number is LOCAL_RANK. Raises UserError if there is no such device.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name is None:
        name = "cuda" if gpus else "cpu"
    if name == "cuda" and gpus:
        name = f"cuda:{local_rank()}"
    if name not in ("cpu", *gpus):
        raise UserError(
            f"--device {name} is not available; choose from {', '.join(['cpu', *gpus])}."
        )
    if name != "cpu":
        torch.cuda.set_device(name)
    return torch.device(name)


@dataclass
class Features:
    """A set of images as the metrics see it."""

    pool: torch.Tensor  # (N, 2048) of the images in file order; N is 0 if there are statistics only
    statistics: dict  # float64 arrays by their names in STATISTICS


def extract_features(net, image_set, title, batch, workers, device):
    """Run the network on all images of a set and return its Features.

    All processes must call it: each runs a part of the images, and all return the whole.
    title: what the progress bar says.
    """
    # Batches are dealt out to the processes in turn. So a batch holds the same images, and its
    # features are rounded in the same way, for any number of processes.
    rank, world = rank_and_world()
    count = image_set.count
    starts = range(rank * batch, count, world * batch)
    spans = [(start, min(start + batch, count)) for start in starts]
    batches = read_ahead(image_set.batches(spans, workers))

    pool = torch.zeros(count, 2048, device=device)
    of_pool, of_spatial = Statistics(2048, device), Statistics(2023, device)
    work = zip(spans, batches, strict=True)
    bar = tqdm(work, title, total=len(spans), unit="batch", disable=rank > 0)
    for (start, stop), images in bar:
        pool[start:stop], spatial = net(images.to(device).permute(0, 3, 1, 2))
        of_pool.update(pool[start:stop])
        of_spatial.update(spatial)

    # The rows of the images of other processes are zero, so the sum fills them in.
    pool = all_reduce(pool)
    mu, sigma = of_pool.finish()
    mu_s, sigma_s = of_spatial.finish()
    computed = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s}
    computed = {name: array.cpu().numpy() for name, array in computed.items()}
    return Features(pool, computed | image_set.statistics)


def compute_metrics(net, ref, samples):
    """Return the metrics by name, without those that cannot be computed. ref, samples: Features.

    net: its last layer gives the Inception Score; None if no images went through the network.
    All processes must call it, since precision and recall share the work between them.
    """
    metrics = {}
    if net is not None and len(samples.pool):
        metrics["Inception Score"] = inception_score(net.probs(samples.pool))
    for name, mu, sigma in (("FID", "mu", "sigma"), ("sFID", "mu_s", "sigma_s")):
        if {mu, sigma} <= ref.statistics.keys() & samples.statistics.keys():
            metrics[name] = frechet_distance(
                ref.statistics[mu],
                ref.statistics[sigma],
                samples.statistics[mu],
                samples.statistics[sigma],
            )
    if min(len(ref.pool), len(samples.pool)) > 3:
        metrics["Precision"], metrics["Recall"] = precision_recall(ref.pool, samples.pool)
    return metrics


def report(metrics, json_file):
    """Print the metrics, say which are left out and why, and write json_file unless it is None."""
    for name, needed in METRICS.items():
        if name in metrics:
            print(f"{name}: {metrics[name]}")
        else:
            print(f"{name} is left out: it needs {needed}.", file=sys.stderr)
    if json_file:
        Path(json_file).write_text(json.dumps(metrics, indent=2) + "\n")


# ---- measures of generated images ----


def inception_score(probs, split_size=5000):
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

    Each point is the center of a ball that reaches to its k-th nearest other point of the same set.
    Precision is the fraction of samples that lie in some ball of the reference, recall the fraction
    of the reference that lies in some ball of the samples. Distances are float64.

    ref_pool (N, d), sample_pool (M, d): all features, arrays or tensors on one device. With several
    processes, all must call it with the same features. Raises ValueError for other shapes and if N
    or M is not above k.
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
    precision = (all_reduce(sample_hits) > 0).double().mean().item()
    recall = (all_reduce(ref_hits) > 0).double().mean().item()
    return precision, recall


def squared_radii(points, center, k, title):
    """Return the squared distance (N,) from each of points (N, d) to its k-th nearest other."""
    nearest = torch.full((len(points), k), math.inf, dtype=torch.float64, device=points.device)
    for rows, columns, distances in squared_distances(points, points, center, title):
        if rows == columns:
            # A point is not its own neighbour, but a copy of it in another row is one.
            distances.fill_diagonal_(math.inf)
        nearest[rows] = torch.cat([nearest[rows], distances], 1).topk(k, largest=False).values
    # The rows of other processes are still infinite.
    return all_reduce(nearest[:, -1].contiguous(), dist.ReduceOp.MIN)


def squared_distances(a, b, center, title, size=2048):
    """Yield a slice of a, a slice of b and the squared distances between their rows, 32 MiB.

    The rows of a are divided among the processes. a (N, d), b (M, d). center (d,) is subtracted
    from both: the smaller the norms, the smaller the rounding error.
    """
    rank, world = rank_and_world()
    starts = range(rank * size, len(a), world * size)
    for i in tqdm(starts, title, unit="block", disable=rank > 0):
        x = a[i : i + size].double() - center
        for j in range(0, len(b), size):
            y = b[j : j + size].double() - center
            scale = x.square().sum(1, keepdim=True) + y.square().sum(1)
            distances = torch.addmm(scale, x, y.T, alpha=-2)
            # For x = y, |x|^2 + |y|^2 - 2xy is rounding noise of either sign.
            distances.masked_fill_(distances < a.shape[1] * np.finfo(float).eps * scale, 0)
            yield slice(i, i + size), slice(j, j + size), distances


# ---- measures of autoencoders, for train_ae.py --eval ----


def ssim(x, y, data_range=2.0):
    """Structural similarity (Wang et al. 2004) of B pairs of images, (B,) float64; 1 if equal.

    It is computed in Gaussian windows of 11 x 11 pixels, sigma 1.5, and averaged over the channels
    and all positions where the window lies inside the image.

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


# ---- the network ----


def load_inception(path=None, half_pixel=False, tf32=False):
    """Return the network with the published weights, fused, frozen, in eval mode, on the CPU.

    path: the file of the weights. None is the file in torch's hub cache, which is downloaded on
    first use; with several processes, all must then call this function. half_pixel, tf32: see
    InceptionV3. Raises MissingFile if there is no file, UserError if it holds something else.
    """
    if path is None:
        path = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS)
        download_inception(path)
    if not Path(path).exists():
        raise MissingFile(
            f"{path} cannot be read as the Inception weights: it does not exist; get {URL}."
        )
    net = InceptionV3(half_pixel, tf32)
    # what PyTorch raises for a file that is damaged or holds something else
    unreadable = (OSError, RuntimeError, EOFError, TypeError, ValueError, pickle.UnpicklingError)
    try:
        # dict() drops the format's version. PyTorch then accepts files without num_batches_tracked.
        net.load_state_dict(dict(torch.load(path, map_location="cpu", weights_only=True)))
    except unreadable as error:
        raise UserError(f"{path} cannot be read as the Inception weights; get {URL}.") from error
    return net.fuse().requires_grad_(False)


def download_inception(path):
    """Download the published weights to path, unless they are there.

    All processes must call it. Local rank 0 downloads for the processes of its machine, which wait
    for it. If one download fails, all processes raise the same MissingFile.
    """
    failure = None
    if local_rank() == 0 and not path.exists():
        rank, _ = rank_and_world()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                URL, str(path), hash_prefix="6726825d", progress=rank == 0
            )
        except (OSError, RuntimeError) as error:  # no connection, no permission; a wrong hash
            failure = (
                f"The Inception weights cannot be downloaded ({error}); put {URL} at {path} "
                "or give the file with --inception."
            )
    failures = [failure]
    if dist.is_initialized():
        failures = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
    for failure in failures:
        if failure:
            raise MissingFile(failure)


class InceptionV3(nn.Module):
    """TensorFlow's Inception graph of 2015-12-05, in eval mode, with random weights.

    load_inception returns it with the published weights, whose names its modules have.

    half_pixel: resize the images as pytorch-fid does (bilinear, half-pixel centers) and not as
    TensorFlow 1. tf32: let a GPU round the inputs of convolutions to TF32; without it they are
    float32, whatever the caller's settings are.
    """

    def __init__(self, half_pixel=False, tf32=False):
        super().__init__()
        self.half_pixel = half_pixel
        self.tf32 = tf32
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
        # The published graph has a max pool here, where the paper averages.
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
            torch.backends.cudnn.flags(enabled=True, allow_tf32=self.tf32),
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

            # The evaluator reads the graph's mixed_6/conv: the 1x1 branch of Mixed_6d, which is the
            # first of its channels. It keeps 7 of them, flattened by height, width and channel.
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

    Row i of the result is read at row i * H / size of the image: no half-pixel centers, no
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


@dataclass
class ImageSet:
    """A folder or a .npz file that has been opened; no image has been read yet."""

    # the number of images that have to go through the network; 0 if their features are stored
    count: int
    # batches(spans, workers) yields for each span (start, stop) the images from start to stop,
    # (N, H, W, 3) uint8; workers is the number of threads that decode image files
    batches: Callable | None
    # the statistics that are stored in the file, float64 arrays by their names in STATISTICS
    statistics: dict
    # the pool features that are stored in the file, (N, 2048); N is 0 if there are none
    pool: torch.Tensor = torch.zeros(0, 2048)


def open_set(path, half_pixel=0):
    """Return the ImageSet of a folder or .npz file. Raises UserError if it cannot be used.

    half_pixel: how images are resized, which must be how those were whose features are stored.
    """
    if Path(path).is_dir():
        return open_folder(path)
    if zipfile.is_zipfile(path):
        return open_npz(path, half_pixel)
    if not Path(path).exists():
        raise UserError(f"There is no folder or .npz file {path}.")
    raise UserError(f"{path} is neither a folder nor a .npz file; give one of the two.")


def open_folder(path):
    """Return the ImageSet of a folder, its files in the order of their names.

    Sub-folders are often classes. In the order of paths, a split of the Inception Score would hold
    few classes, and the score would be too low.
    """
    files = [file for file in Path(path).rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES]
    files.sort(key=lambda file: (file.name, file))
    if len(files) < 2:
        suffixes = " ".join(IMAGE_SUFFIXES)
        raise UserError(f"{path} has {len(files)} images ({suffixes}); at least 2 are needed.")
    return ImageSet(len(files), partial(folder_batches, files), statistics={})


def folder_batches(files, spans, workers):
    """Yield the images of each span, as ImageSet.batches describes. They must be of one size."""
    first = decode(files[0])
    with ThreadPoolExecutor(workers) as pool:
        for start, stop in spans:
            images = list(pool.map(decode, files[start:stop]))
            for file, image in zip(files[start:stop], images, strict=True):
                if image.shape != first.shape:
                    raise UserError(
                        f"{file} is (H, W, 3) = {image.shape}, but {files[0]} is {first.shape}; "
                        "bring the images of a set to one size first."
                    )
            yield torch.from_numpy(np.stack(images))


def decode(file):
    """Return an image file as an array (H, W, 3) uint8, RGB. Raises UserError if that fails."""
    try:
        with Image.open(file) as image:
            if image.mode[0] in "IF":  # 16 or 32 bits
                raise ValueError("it has more than 8 bits per channel")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{file} cannot be read as an image ({error}); replace or remove it."
        ) from error


def open_npz(path, half_pixel=0):
    """Return the ImageSet of a .npz file. half_pixel: as in open_set."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if "half_pixel" in arrays and arrays["half_pixel"] != half_pixel:
                raise ValueError(f"it was saved with --half_pixel {arrays['half_pixel']}")
            statistics = read_statistics(arrays)
            if "pool" in arrays:
                return ImageSet(0, None, statistics, read_pool(arrays))
            if "arr_0" in arrays:
                with arrays.zip.open("arr_0.npy") as stream:
                    count, *shape = read_header(stream)
                    batches = partial(npz_batches, path, shape, stream.tell())
                return ImageSet(count, batches, statistics)
            if statistics:
                return ImageSet(0, None, statistics)
            raise ValueError(f"it has neither arr_0 nor {', '.join(STATISTICS)}")
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise UserError(f"{path} cannot be used ({error}); write or download it again.") from error


def read_statistics(arrays):
    """Return the statistics stored in a .npz file, float64 arrays by name.

    Raises ValueError for another shape, NaN or infinity.
    """
    statistics = {name: arrays[name].astype(np.float64) for name in STATISTICS if name in arrays}
    for name, array in statistics.items():
        if array.shape != STATISTICS[name] or not np.isfinite(array).all():
            raise ValueError(
                f"{name} must be finite numbers of shape {STATISTICS[name]}, but has shape "
                f"{array.shape} or contains NaN or infinity"
            )
    return statistics


def read_pool(arrays):
    """Return the pool features stored in a .npz file, (N, 2048) float32.

    Raises ValueError for another shape, NaN or infinity.
    """
    pool = torch.from_numpy(arrays["pool"].astype(np.float32, copy=False))
    if pool.ndim != 2 or pool.shape[1] != 2048 or not pool.isfinite().all():
        raise ValueError(
            "pool must be finite numbers of shape (images, 2048), but has shape "
            f"{tuple(pool.shape)} or contains NaN or infinity"
        )
    return pool


def read_header(stream):
    """Read the header of arr_0.npy and return its shape, (N, H, W, 3); the pixels come next.

    Raises ValueError if it does not hold at least 2 images in uint8.
    """
    np.lib.format.read_magic(stream)
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[0] < 2 or shape[3] != 3:
        raise ValueError(
            f"arr_0 must be uint8 of shape (2 or more, H, W, 3) in C order, but is {dtype} {shape}"
        )
    return shape


def npz_batches(path, shape, offset, spans, workers):
    """Yield the images of each span, as ImageSet.batches describes; workers is not used.

    The array may be compressed and larger than memory, so the file is read forward in pieces.
    shape: of one image. offset: where the pixels begin in arr_0.npy.
    """
    size = math.prod(shape)
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
            for start, stop in spans:
                stream.seek(offset + start * size)  # over the images of other processes
                pixels = bytearray(stream.read((stop - start) * size))
                if len(pixels) < (stop - start) * size:
                    raise EOFError("arr_0 is cut off")
                yield torch.frombuffer(pixels, dtype=torch.uint8).view(-1, *shape)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}); write or download it again.") from error


def read_ahead(batches):
    """Yield from the iterator batches; a thread reads the next one while the caller works."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = reader.submit(next, batches, None)
            yield batch


# ---- several processes ----


def local_rank():
    """This process's number on its machine; 0 if torchrun has not set it."""
    return int(os.environ.get("LOCAL_RANK", 0))


def rank_and_world():
    """This process's rank and the number of processes: 0 and 1 without torch.distributed."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def leave_processes():
    """Close the process group, with gloo after all processes have come here."""
    if dist.get_backend() == "gloo":
        # The barrier holds the calls that it waits for, and through them tensors of Python's, which
        # cannot be freed without the interpreter's lock. If a thread of gloo's were the last to let
        # go of them, it would wait for the lock, and destroy_process_group, which has the lock, for
        # the thread (seen with PyTorch 2.4). This variable outlives both.
        barrier = dist.barrier(async_op=True)
        barrier.wait()
    dist.destroy_process_group()


def all_reduce(x, op=dist.ReduceOp.SUM):
    """Reduce the tensor x over all processes, in place, and return it.

    NCCL reduces tensors on a GPU only, so one on the CPU goes through the process's current GPU.
    """
    if dist.is_initialized():
        reduced = x.cuda() if dist.get_backend() == "nccl" else x
        dist.all_reduce(reduced, op)
        x.copy_(reduced)
    return x


if __name__ == "__main__":
    main()
