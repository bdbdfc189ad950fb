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

Image files are read as a viewer shows them: EXIF orientation applied, transparency over white.
pytorch-fid ignores the first and shows the colors hidden under the second. For the Inception Score,
the images of a .npz file are taken in file order, and those of a folder in a fixed random order.
Existing files are never replaced.
"""

import argparse
import json
import math
import os
import pickle
import signal
import struct
import sys
import time
import zipfile
import zlib
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
    "Inception Score": "images of SAMPLES",
    "FID": "mu, sigma of both",
    "sFID": "mu_s, sigma_s of both",
    "Precision": "more than k = 3 images of both",
    "Recall": "more than k = 3 images of both",
}

SPLIT_SIZE = 5000  # images per split of the Inception Score

# suffixes that Pillow knows and that are documents, videos or data
NO_PICTURES = {".pdf", ".eps", ".ps", ".wmf", ".emf", ".mpg", ".mpeg", ".fli", ".flc"}
NO_PICTURES |= {".h5", ".hdf", ".grib", ".bufr", ".fit", ".fits", ".iim", ".palm"}


# raised by Pillow, zipfile, NumPy and PyTorch on a file that is damaged or of another kind
DAMAGED = (
    *(OSError, EOFError, SyntaxError, ValueError, LookupError, TypeError, AttributeError),
    *(OverflowError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile),
    *(pickle.UnpicklingError, Image.DecompressionBombError),
)


class UserError(ValueError):
    """A user's mistake, such as a damaged file. Its message is the one sentence the user sees."""


def main():
    """Run the command. A user's mistake ends it with one sentence and status 1."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # for paths that the terminal cannot show
    first = local_rank() == 0
    try:
        return evaluate(parse_args())
    except (UserError, OSError) as error:
        sentence = str(error)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends it once more
        sys.exit("stopped" if first else 1)
    except RuntimeError as error:
        # gloo says "Connection closed by peer" or "Connection reset by peer".
        if "by peer" not in str(error):
            raise
        sentence, first = "another process has ended", False
    # Under torchrun the user should see one sentence. Usually all processes run into the same
    # mistake: local rank 0 says it, and torchrun ends the others while they wait. A process that is
    # still there after 10 seconds saw something that no other did.
    if not first:
        time.sleep(10)
    sys.exit(sentence)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.error = refuse_arguments
    add = parser.add_argument
    add("ref", metavar="REF", type=filled, help="real images: a folder or a .npz file")
    add("samples", metavar="SAMPLES", type=filled, nargs="?", help="images to evaluate: likewise")
    add("--save_stats", metavar="FILE", type=filled, help="write REF's statistics and features")
    add("--json", metavar="FILE", type=filled, help="write the metrics to this file too")
    add(
        "--inception", metavar="FILE", type=filled, help="weights; None downloads them once, 91 MiB"
    )
    add(
        "--half_pixel",
        type=int,
        choices=(0, 1),
        default=0,
        help="1 resizes images like pytorch-fid, 0 like TensorFlow 1",
    )
    add("--batch", metavar="N", type=positive, default=64, help="images per batch and process")
    add("--workers", metavar="N", type=positive, default=8, help="decoding threads per process")
    add("--device", metavar="NAME", type=filled, help="cpu, cuda, cuda:1; None is a GPU if present")
    args = parser.parse_intermixed_args()  # flags may stand between REF and SAMPLES

    if not args.samples and (args.json or not args.save_stats):
        parser.error("SAMPLES is missing")
    targets = [os.path.abspath(file) for file in (args.json, args.save_stats) if file]
    for file in targets:
        if os.path.lexists(file) or targets.count(file) > 1:
            raise UserError(f"{file} is there already, or named twice; name another file.")
        if not os.access(os.path.dirname(file), os.W_OK):
            raise UserError(f"{file} cannot be written: its folder is missing or read-only.")
    return args


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the description, and shows defaults."""


def refuse_arguments(message):
    raise UserError(f"{message}; see fid.py --help.")


def filled(text):
    """The argparse type of text that is not empty, as an unset variable of the shell is."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def positive(text):
    """The argparse type of a whole number, 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return number


@contextmanager
def written_whole(path):
    """Open a file for bytes, beside path until it is complete, so that path is never partial."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


# ---- from two sets of images to the metrics ----


def evaluate(args):
    """Print the metrics of SAMPLES, and write the files that --json and --save_stats ask for."""
    device = choose_device(args.device)
    join_processes(device)
    rank, _ = rank_and_world()

    sets = {}
    for path in (args.ref, args.samples):
        if path and path not in sets:  # the same path twice is processed once
            sets[path] = open_set(path, args.half_pixel)
    net = None
    if any(images.count for images in sets.values()):
        net = load_inception(args.inception, bool(args.half_pixel)).to(device)
    features = {}
    for path, images in sets.items():
        features[path] = images.stored
        if images.count:
            computed = run_network(net, images, path, args.batch, args.workers, device)
            features[path] = computed | images.stored

    if args.save_stats and rank == 0:
        with written_whole(args.save_stats) as file:
            np.savez(file, **features[args.ref])
    if args.samples:
        metrics = compute_metrics(net, features[args.ref], features[args.samples], device)
        if rank == 0:
            report(metrics, args.json)
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


def run_network(net, images, title, batch, workers, device):
    """Run the network on the images of a Folder or Npz, and return their features by name.

    All processes must call it: each runs a part of the images, and all return the whole.
    title: what the progress bar says.
    """
    # Batches are dealt out to the processes in turn. So a batch holds the same images, and its
    # features are rounded in the same way, for any number of processes.
    rank, world = rank_and_world()
    starts = range(rank * batch, images.count, world * batch)
    spans = [(start, min(start + batch, images.count)) for start in starts]
    batches = read_ahead(images.batches(spans, workers))

    pool = torch.zeros(images.count, 2048, device=device)
    of_pool, of_spatial = Statistics(2048, device), Statistics(2023, device)
    bar = tqdm(spans, title, unit="batch", disable=rank > 0)
    for (start, stop), pixels in zip(bar, batches, strict=True):
        batch_pool, spatial = net(pixels.to(device).permute(0, 3, 1, 2))
        pool[images.rows[start:stop]] = batch_pool
        of_pool.update(batch_pool)
        of_spatial.update(spatial)

    # The rows of the images of other processes are zero, so the sum fills them in.
    all_reduce(pool)
    arrays = (*of_pool.finish(), *of_spatial.finish(), pool)
    names = (*STATISTICS, "pool")
    return {name: x.cpu().numpy() for name, x in zip(names, arrays, strict=True)}


def compute_metrics(net, ref, samples, device):
    """Return the metrics by name, without those that cannot be computed.

    ref, samples: features by name. net: its last layer gives the Inception Score; None if no images
    went through the network. All processes must call it, since they share the work.
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


def report(metrics, json_file):
    """Print the metrics, say which are left out and why, and write json_file unless it is None."""
    for name, needed in METRICS.items():
        if name in metrics:
            print(f"{name}: {metrics[name]}")
        else:
            note(f"{name} is left out: it needs {needed}.")
    if json_file:
        with written_whole(json_file) as file:
            file.write(json.dumps(metrics, indent=2).encode() + b"\n")


def note(text):
    """Print a line beside the results, once for all processes."""
    if rank_and_world()[0] == 0:
        print(text, file=sys.stderr)


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


# ---- the network ----


def load_inception(path=None, half_pixel=False):
    """Return the network with the published weights, fused, frozen, in eval mode, on the CPU.

    path: the file of the weights. None is the file in torch's hub cache, which is downloaded on
    first use; with several processes, all must then call this function. half_pixel: see
    InceptionV3. Raises FileNotFoundError if there is no file, UserError if it holds something else.
    """
    if path is None:
        path = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS)
        download_inception(path)
    if not Path(path).exists():
        raise FileNotFoundError(f"There is no file {path} with the Inception weights; get {URL}.")
    net = InceptionV3(half_pixel)
    try:
        # dict() drops the format's version. PyTorch then accepts files without num_batches_tracked.
        with open(path, "rb") as file:
            net.load_state_dict(dict(torch.load(file, map_location="cpu", weights_only=True)))
    except DAMAGED as error:
        raise UserError(f"{path} cannot be read as the Inception weights; get {URL}.") from error
    return net.fuse().requires_grad_(False)


def download_inception(path):
    """Download the published weights to path, unless they are there.

    All processes must call it. Local rank 0 downloads for those of its machine. The others wait in
    the exchange, through which all hear of a failure; then all raise the same FileNotFoundError.
    """
    failure = None
    if local_rank() == 0 and not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(path), hash_prefix="6726825d")
        except (OSError, RuntimeError) as error:  # no connection, no permission; a wrong hash
            failure = str(error)
    failures = [failure]
    if dist.is_initialized():
        failures = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
    if any(failures):
        raise FileNotFoundError(
            f"The Inception weights cannot be downloaded ({max(filter(None, failures))}); put {URL} "
            f"at {path} or give the file with --inception."
        )


class InceptionV3(nn.Module):
    """TensorFlow's Inception graph of 2015-12-05, in eval mode, with random weights.

    load_inception returns it with the published weights, whose names its modules have.

    half_pixel: resize the images as pytorch-fid does (bilinear, half-pixel centers) and not as
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


def list_images(folder):
    """Find the images of a folder and its sub-folders.

    Returns their paths relative to it, sorted, and the number of other files, which were passed
    over. An image has a suffix that Pillow knows and that is no document, video or data. Names that
    begin with "." and __MACOSX are not there. A linked folder is followed unless it leads into the
    set itself or to a folder around it, and no folder is listed twice.

    Raises FileNotFoundError if there is no such folder, UserError if it holds no images, and
    OSError if a folder in it cannot be read.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"There is no folder {folder}.")
    suffixes = Image.registered_extensions().keys() - NO_PICTURES
    files, others = [], 0
    root, seen = os.path.realpath(folder), set()
    for path, folders, names in os.walk(folder, followlinks=True, onerror=throw):
        here = os.path.realpath(path)
        if here in seen:
            folders.clear()  # os.walk goes on into what is left in this list
            continue
        seen.add(here)
        folders[:] = sorted(
            name
            for name in folders
            if is_visible(name) and not leads_back(os.path.join(path, name), root, here)
        )
        inside = os.path.relpath(path, folder)
        for name in filter(is_visible, names):
            if os.path.splitext(name)[1].lower() in suffixes:
                files.append(name if inside == "." else f"{inside}/{name}")
            else:
                others += 1
    if not files:
        raise UserError(
            f"{folder} has no images but {others} other files; images have suffixes such as "
            ".jpg, .png or .webp."
        )
    return sorted(files), others


def throw(error):
    raise error


def is_visible(name):
    return not name.startswith(".") and name != "__MACOSX"


def leads_back(folder, *places):
    """Whether a folder is a link to something that lies in one of these places or around it."""
    if not os.path.islink(folder):
        return False
    target = os.path.realpath(folder)
    return any(os.path.commonpath([target, place]) in (target, place) for place in places)


def read_image(file):
    """Read a file as a viewer shows it, and return a PIL image in mode RGB.

    EXIF orientation is applied, and transparency is put over white. (pytorch-fid ignores the first
    and shows the colors hidden under the second.) 16-bit grey is scaled by 65535, so a camera's 12
    bits in 16 stay dark; 16-bit colors are cut to 8 bits by Pillow. Raises UserError with the
    file's name if it cannot be read or has 32 bits per channel.
    """
    try:
        with Image.open(file) as image:
            image.load()
            with suppress(*DAMAGED):  # Unreadable EXIF data turn nothing.
                ImageOps.exif_transpose(image, in_place=True)
            # A PNG or PGM file has no more than 16 bits, but may come in a mode of 32.
            narrow = image.mode == "I" and image.format in ("PNG", "PPM")
            if narrow or image.mode.startswith("I;16"):
                pixels = np.asarray(image)
                clear = pixels == image.info.get("transparency", -1)
                image = Image.fromarray(np.where(clear, 255, pixels >> 8).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise ValueError("it has 32 bits per channel; save it with 8 or 16")
            elif image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image if image.mode == "RGB" else image.convert("RGB")
    except DAMAGED as error:
        raise UserError(
            f"{file} cannot be read as an image ({error}); replace or remove it."
        ) from error


def open_set(path, half_pixel=0):
    """Return the Folder or Npz of a path, of which no image has been read yet.

    half_pixel: how images are resized, which must be how those were whose features are stored.
    Raises UserError or OSError if it cannot be used.
    """
    if os.path.isdir(path):
        return Folder(path, half_pixel)
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no folder or .npz file {path}.")
    return Npz(path, half_pixel)


class Folder:
    """The images of a folder; the attributes are those of Npz."""

    def __init__(self, path, half_pixel):
        files, others = list_images(path)
        self.files = [os.path.join(path, file) for file in files]
        self.count = len(files)
        self.stored = {"half_pixel": half_pixel}
        # The Inception Score is computed in splits. In the order of their names a split often holds
        # few classes, which lowers the score, so the order is random, but always the same.
        self.rows = np.random.RandomState(0).permutation(self.count)
        passed_over = f", {others} other files passed over" if others else ""
        note(f"{path}: {self.count} images{passed_over}")

    def batches(self, spans, workers):
        """Yield the images of each span (start, stop), (N, H, W, 3) uint8, all of one size.

        workers: the number of threads that decode.
        """
        first = np.asarray(read_image(self.files[0]))
        with ThreadPoolExecutor(workers) as pool:
            for start, stop in spans:
                files = self.files[start:stop]
                images = list(pool.map(lambda file: np.asarray(read_image(file)), files))
                for file, image in zip(files, images, strict=True):
                    if image.shape != first.shape:
                        raise UserError(
                            f"{file} is (H, W, 3) = {image.shape}, but {self.files[0]} is "
                            f"{first.shape}; bring the images of a set to one size first."
                        )
                yield torch.from_numpy(np.stack(images))


class Npz:
    """The images of a .npz file, features of images, or both.

    count: how many images have to go through the network; 0 if their pool features are stored.
    stored: the features in the file, by name. Without half_pixel they do not say how the images
    were resized. rows: the row of the pool features for each image.
    """

    def __init__(self, path, half_pixel):
        self.path = path
        self.count = 0
        try:
            with zipfile.ZipFile(path) as archive:
                self.stored = read_stored(archive)
                if "pool" not in self.stored and "arr_0.npy" in archive.namelist():
                    with archive.open("arr_0.npy") as stream:
                        self.count, *self.shape = read_header(stream)
                        end = stream.tell() + self.count * math.prod(self.shape)
                    if archive.getinfo("arr_0.npy").file_size < end:
                        raise ValueError("arr_0 is cut off")
            if not self.stored and not self.count:
                raise ValueError(f"it has neither arr_0 nor {', '.join(STATISTICS)}")
        except DAMAGED as error:
            raise UserError(
                f"{path} cannot be used ({error}); write or download it again."
            ) from error
        self.rows = np.arange(self.count)

        if not self.stored:
            self.stored = {"half_pixel": half_pixel}
        elif "half_pixel" not in self.stored:
            hint = "" if half_pixel else "; if they are pytorch-fid's, add --half_pixel 1"
            note(f"{path} does not say how the images of its statistics were resized{hint}.")
        elif self.stored["half_pixel"] != half_pixel:
            raise UserError(
                f"{path} was saved with --half_pixel {self.stored['half_pixel']}; give that here, too."
            )

    def batches(self, spans, workers):
        """Yield the images of each span (start, stop), (N, H, W, 3) uint8; workers is not used.

        The array may be compressed and larger than memory, so the file is read in pieces. It is
        read forward and to its end, where zipfile compares the checksum: since Python 3.13 a seek
        switches that off.
        """
        size = math.prod(self.shape)
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as stream:
                read_header(stream)
                position = 0
                for start, stop in spans:
                    for _ in range(position, start):
                        stream.read(size)  # an image of another process
                    pixels = bytearray(stream.read((stop - start) * size))
                    yield torch.frombuffer(pixels, dtype=torch.uint8).view(-1, *self.shape)
                    position = stop
                while stream.read(2**20):
                    pass
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise UserError(
                f"{self.path} is damaged ({error}); write or download it again."
            ) from error


def read_stored(archive):
    """Return the features in an opened .npz file, by name. Raises ValueError if they are odd."""
    stored = {}
    dtypes = {"pool": np.float32, "half_pixel": np.int64}
    for name, shape in FEATURES.items():
        if f"{name}.npy" not in archive.namelist():
            continue
        with archive.open(f"{name}.npy") as stream:
            array = np.lib.format.read_array(stream)
            stream.read()  # at the end, zipfile compares the checksum
        array = array.astype(dtypes.get(name, np.float64), copy=False)
        expected = tuple(len(array) if n == "N" else n for n in shape)
        if array.shape != expected or not np.isfinite(array).all():
            raise ValueError(
                f"{name} must be finite numbers of shape {shape}, but has shape {array.shape} or "
                "contains NaN or infinity"
            )
        stored[name] = array
    for pair in ({"mu", "sigma"}, {"mu_s", "sigma_s"}):
        if len(pair & stored.keys()) == 1:
            raise ValueError(f"it has only one of {' and '.join(sorted(pair))}")
    return stored


def read_header(stream):
    """Read the header of arr_0.npy and return its shape, (N, H, W, 3); the pixels come next.

    Raises ValueError if it does not hold at least 2 images in uint8.
    """
    if np.lib.format.read_magic(stream) == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    else:
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
    fits = len(shape) == 4 and shape[0] >= 2 and min(shape) > 0 and shape[3] == 3
    if dtype != np.uint8 or fortran_order or not fits:
        raise ValueError(
            f"arr_0 must be uint8 of shape (2 or more, H, W, 3) in C order, but is {dtype} {shape}"
        )
    return shape


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


def join_processes(device):
    """Join the other processes that torchrun has started, if any."""
    if "RANK" not in os.environ:
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        # The other processes wait while the weights are downloaded, perhaps slowly.
        dist.init_process_group(backend, timeout=timedelta(hours=1))
    except ValueError as error:  # a variable that torchrun sets is missing
        raise UserError(f"RANK is set, but {error}; start with torchrun, or unset RANK.") from error


def leave_processes():
    """Close the process group, if any, with gloo after all processes have come here."""
    if not dist.is_initialized():
        return
    if dist.get_backend() == "gloo":
        # PyTorch 2.4 can hang in destroy_process_group if a thread of gloo's holds the last
        # reference to the barrier. This variable holds one until after that.
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
