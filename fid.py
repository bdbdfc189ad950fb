"""Inception Score, FID, sFID, precision and recall, as OpenAI's TensorFlow evaluator computes them.

examples:
  python fid.py ref.npz samples.npz                 the five metrics, in that evaluator's format
  python fid.py photos/ samples/ --json fid.json    folders of images; the metrics also as a file
  python fid.py photos/ --save_stats ref.npz        statistics of REF, for later runs as their REF
  torchrun --nproc_per_node=8 fid.py ref.npz samples.npz

REF and SAMPLES are each a folder of images (searched recursively, one size within a set) or a .npz
with images as arr_0 (N, H, W, 3) uint8, statistics as mu, sigma (pool features) and mu_s, sigma_s
(spatial features), or both, like ADM's reference batches. Stored statistics go before those of the
images. What cannot be computed is said and left out.
"""
import argparse
import json
import math
import os
import pickle
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
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

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"  # TensorFlow's graph of 2015-12-05, converted
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + WEIGHTS
STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
NEEDS = {"Inception Score": "images of SAMPLES", "FID": "mu, sigma of both", "sFID": "mu_s, sigma_s of both",
         "Precision": "4 images of both", "Recall": "4 images of both"}  # in the evaluator's order

class BadInput(ValueError):
    """What is wrong with a file or an array, and what to do about it, in one sentence."""

def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def all_reduce(x, op=dist.ReduceOp.SUM):
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x

# ---- the network, its modules named as in the published weights ----
class Conv(nn.Module):
    def __init__(self, c_in, c_out, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)
    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)

class Block(nn.Module):
    """Branches side by side over one input, concatenated by channel. A branch is its name and convolutions,
    (channels, kernel) each; (channels, kernel, kernel) forks; branch_pool pools first. halve: stride 2 in the
    last convolution of each branch, and in a max pool beside them."""
    def __init__(self, c_in, *branches, max_pool=False, halve=False):
        super().__init__()
        self.pool = nn.MaxPool2d(3, 1, 1) if max_pool else nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.halve, self.branches = halve, []
        for branch, *convs in branches:
            c, steps = c_in, []
            for i, (c_out, *kernels) in enumerate(convs, 1):
                step = f"{branch}_{i}" if len(convs) > 1 else branch
                steps.append([step + "a", step + "b"] if len(kernels) > 1 else [step])
                stride_padding = (2, "valid") if halve and i == len(convs) else (1, "same")
                for name, kernel in zip(steps[-1], kernels):
                    setattr(self, name, Conv(c, c_out, kernel, *stride_padding))
                c = c_out
            self.branches.append(steps)
    def forward(self, x):
        outputs = []
        for steps in self.branches:
            y = [self.pool(x) if steps[0] == ["branch_pool"] else x]
            for names in steps:
                y = [getattr(self, name)(y[0]) for name in names]
            outputs += y
        return torch.cat(outputs + [F.max_pool2d(x, 3, stride=2)] * self.halve, 1)

def block5(c_in, c_pool):  # (N, c_in, 35, 35) -> (N, 224 + c_pool, 35, 35)
    return Block(c_in, ("branch1x1", (64, 1)), ("branch5x5", (48, 1), (64, 5)),
                 ("branch3x3dbl", (64, 1), (96, 3), (96, 3)), ("branch_pool", (c_pool, 1)))

def block6(c):  # (N, 768, 17, 17) -> (N, 768, 17, 17)
    return Block(768, ("branch1x1", (192, 1)), ("branch7x7", (c, 1), (c, (1, 7)), (192, (7, 1))),
                 ("branch7x7dbl", (c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))),
                 ("branch_pool", (192, 1)))

def block7(c_in, max_pool):  # (N, c_in, 8, 8) -> (N, 2048, 8, 8)
    return Block(c_in, ("branch1x1", (320, 1)), ("branch3x3", (384, 1), (384, (1, 3), (3, 1))),
                 ("branch3x3dbl", (448, 1), (384, 3), (384, (1, 3), (3, 1))), ("branch_pool", (192, 1)),
                 max_pool=max_pool)

def resize_tf1(x, size=299):
    """x (N, C, H, W) float -> (N, C, size, size), bilinear as in TensorFlow 1: pixel i is at i * H / size."""
    for dim in (3, 2):
        source = torch.arange(size, device=x.device) * (x.shape[dim] / size)
        low = source.long()
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        weight = source - low if dim == 3 else (source - low)[:, None]
        x_low = x.index_select(dim, low)
        x = x_low + (x.index_select(dim, high) - x_low) * weight
    return x

class InceptionV3(nn.Module):
    """TensorFlow's Inception graph of 2015-12-05, untrained, in eval mode; `load_inception` has the weights.
    half_pixel: resize as pytorch-fid (bilinear, half-pixel centres), not as TensorFlow 1. tf32: let a GPU
    round the convolutions' inputs to TF32; otherwise it does not, whatever the caller's settings."""
    def __init__(self, half_pixel=False, tf32=False):
        super().__init__()
        self.half_pixel, self.tf32 = half_pixel, tf32
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2, "valid")
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, 1, "valid")
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, 1, "valid")
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block5(192, 32), block5(256, 64), block5(288, 64)
        self.Mixed_6a = Block(288, ("branch3x3", (384, 3)), ("branch3x3dbl", (64, 1), (96, 3), (96, 3)),
                              halve=True)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(block6, (128, 160, 160, 192))
        self.Mixed_7a = Block(768, ("branch3x3", (192, 1), (320, 3)),
                              ("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)), halve=True)
        self.Mixed_7b = block7(1280, max_pool=False)
        self.Mixed_7c = block7(2048, max_pool=True)  # so in the published graph; the paper averages
        self.fc = nn.Linear(2048, 1008)
        self.eval()
    @torch.no_grad()
    def forward(self, x):
        """Images x (N, 3, H, W) uint8 -> pool (N, 2048), which FID compares, and spatial (N, 2023), sFID."""
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3:
            raise BadInput(f"Images must be uint8 of shape (N, 3, H, W), not {x.dtype} {tuple(x.shape)}.")
        # callers may train under autocast, and PyTorch's own default is TF32 convolutions
        with (torch.autocast(x.device.type, enabled=False),
              torch.backends.cudnn.flags(enabled=True, allow_tf32=self.tf32)):
            if self.half_pixel:
                x = 2 * F.interpolate(x.float() / 255, (299, 299), mode="bilinear", align_corners=False) - 1
            else:
                x = (resize_tf1(x.float()) - 128) / 128
            x = x.contiguous(memory_format=torch.channels_last)
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (N, 64, 147, 147)
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))  # (N, 192, 71, 71)
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))  # (N, 288, 35, 35)
            x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (N, 768, 17, 17)
            # the graph's mixed_6/conv is this block's 1x1 branch, its first channels; height, width, channel
            spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (N, 2048, 8, 8)
            return x.mean((2, 3)), spatial
    @torch.no_grad()
    def probs(self, pool):
        """pool (N, 2048) -> class probabilities (N, 1008) float64; the evaluator leaves fc's bias out."""
        return (pool.double() @ self.fc.weight.double().T).softmax(1)
    @torch.no_grad()
    def fuse(self):
        """Fold batch norms into their convolutions, go to channels_last, in place: same results, faster."""
        for module in self.modules():
            if isinstance(module, Conv) and isinstance(module.bn, nn.BatchNorm2d):
                conv, bn = module.conv, module.bn
                scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
                conv.weight.copy_(conv.weight * scale.view(-1, 1, 1, 1))
                conv.bias = nn.Parameter((bn.bias - bn.running_mean * scale).float())
                module.bn = nn.Identity()
        return self.to(memory_format=torch.channels_last)

def load_inception(path=None, half_pixel=False, tf32=False):
    """The network with the published weights, fused, frozen, in eval mode, on the CPU. path: their file; None
    is torch's hub cache, filled by a download on first use. Raises FileNotFoundError where that fails,
    ValueError for a file of anything else."""
    if path is None:
        path = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if not path.exists():
                torch.hub.download_url_to_file(URL, str(path), "6726825d", rank_and_world()[0] == 0)
        except (OSError, RuntimeError) as error:  # no connection; another hash
            raise FileNotFoundError(f"The Inception weights cannot be downloaded ({error}); put {URL} "
                                    f"at {path} or give the file with --inception.") from error
    net = InceptionV3(half_pixel, tf32)
    try:
        # dict() drops the format's version, without which PyTorch lets num_batches_tracked be missing
        net.load_state_dict(dict(torch.load(path, map_location="cpu", weights_only=True)))
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, TypeError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as the Inception weights; get {URL}.") from error
    return net.requires_grad_(False).fuse()

# ---- the metrics ----
class Statistics:
    """Mean and unbiased covariance of features that come in batches, float64, over all ranks: for each batch
    (N, dim), N at least 1, every rank its own, `update(features)`; after the last `finish()`."""
    def __init__(self, dim, device="cpu"):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # sum (x - mean)(x - mean)^T
    def update(self, features):
        x = features.to(self.mean)
        share = len(x) / (self.count + len(x))
        step = x.mean(0) - self.mean
        # raw products would cancel: deviations from the batch's mean, and the means' distance as one more row
        rows = torch.cat([x - x.mean(0), math.sqrt(self.count * share) * step[None]])
        self.scatter.addmm_(rows.T, rows)
        self.mean += share * step
        self.count += len(x)
    def finish(self):
        """-> mu (dim,), sigma (dim, dim). Collective. Raises ValueError for fewer than 2 features."""
        count = all_reduce(torch.tensor(self.count, device=self.mean.device)).item()
        if count < 2:
            raise BadInput(f"A covariance needs at least 2 images, not {count}.")
        mean = all_reduce(self.mean * self.count) / count
        step = self.mean - mean
        return mean, all_reduce(self.scatter + self.count * torch.outer(step, step)) / (count - 1)

def square_root(sigma):
    """R (d, rank), R R^T = sigma. Pivoting leaves out the null space: noise, and its root is not small."""
    tolerance = len(sigma) * np.finfo(float).eps * sigma.max()
    factor, order, rank, _ = lapack.dpstrf(sigma, tol=tolerance, lower=1)
    root = np.tril(factor)[np.argsort(order), :rank]
    if abs(np.square(root).sum() - sigma.trace()) > 1e-9 * sigma.trace():  # coarser noise: kept as float32?
        values, vectors = np.linalg.eigh(sigma)
        if values[0] < -1e-6 * abs(values[-1]):
            raise BadInput("A covariance must not have negative eigenvalues; compute it again.")
        root = vectors[:, values > tolerance] * np.sqrt(values[values > tolerance])
    return torch.from_numpy(root)

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 sqrt(sigma1 sigma2)), a float: FID, sFID (Heusel et al. 2017).
    mu (d,), sigma (d, d), arrays or tensors. Raises ValueError for other shapes, NaN, and no covariances."""
    given = [np.asarray(torch.as_tensor(x, device="cpu").double()) for x in (mu1, sigma1, mu2, sigma2)]
    mu1, sigma1, mu2, sigma2 = given
    d = mu1.size
    if [x.shape for x in given] != [(d,), (d, d), (d,), (d, d)]:
        raise BadInput(f"Statistics of shapes {[x.shape for x in given]} do not fit together.")
    if not all(np.isfinite(x).all() and np.allclose(x, x.T) for x in given):
        raise BadInput("Statistics contain NaN or a covariance that is not symmetric; compute them again.")
    # sigma1 sigma2 has the eigenvalues of (R1^T R2)(R1^T R2)^T; pivoting sorts the rows of R1^T R2 by size,
    # which keeps the small eigenvalues exact: equal sets of any rank come to 1e-14 of the trace
    r1, r2 = sorted((square_root(sigma1), square_root(sigma2)), key=lambda r: r.shape[1])
    roots = torch.linalg.eigvalsh(r1.T @ r2 @ (r1.T @ r2).T).clamp(min=0).sqrt()
    # min |R1 - R2 Q|^2 over rotations Q, so what is below 0 is the last digit
    traces = r1.square().sum() + r2.square().sum() - 2 * roots.sum()
    return float(np.square(mu1 - mu2).sum() + max(traces.item(), 0))

def inception_score(probs, split_size=5000):
    """exp(mean KL(p(y|x) || p(y))) of each split in order, averaged; a short last one counts as any (Salimans
    et al. 2016). probs (N, classes), array or tensor, rows that sum to 1. Raises ValueError if not."""
    probs = torch.as_tensor(probs)
    if probs.ndim != 2 or len(probs) == 0:
        raise BadInput(f"Probabilities must be of shape (N, classes), not {tuple(probs.shape)}.")
    scores = []
    for p in probs.double().split(split_size):
        kl = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))  # xlogy: 0 log 0 = 0
        scores.append(kl.sum(1).mean().exp().item())
    return sum(scores) / len(scores)

def precision_recall(ref_pool, sample_pool, k=3):
    """Improved precision and recall (Kynkaanniemi et al. 2019), two floats: the share of samples inside some
    ball of the reference, and the reverse. A ball reaches from its point to the k-th nearest other point.
    ref_pool (N, d), sample_pool (M, d), arrays or tensors on one device; distances are float64. Collective:
    every rank gives all features. Raises ValueError for other shapes, and N or M <= k."""
    ref, samples = torch.as_tensor(ref_pool), torch.as_tensor(sample_pool)
    if ref.ndim != 2 or ref.shape[1:] != samples.shape[1:] or min(len(ref), len(samples)) <= k:
        raise BadInput(f"Precision and recall need features (more than {k}, d) of both sets, "
                       f"not {tuple(ref.shape)} and {tuple(samples.shape)}.")
    rank, world = rank_and_world()
    center = ref.mean(0).double()  # the smaller the norms, the less distances round
    def blocks(a, b, what, size=2048):
        """This rank's rows of a against all of b: yields slices of both and squared distances, 32 MiB."""
        for i in tqdm(range(rank * size, len(a), world * size), what, unit="block", disable=rank > 0):
            x = a[i:i + size].double() - center
            for j in range(0, len(b), size):
                y = b[j:j + size].double() - center
                scale = x.square().sum(1, keepdim=True) + y.square().sum(1)
                distances = torch.addmm(scale, x, y.T, alpha=-2)
                # |x|^2 + |y|^2 - 2xy is rounding noise of either sign where x = y
                distances.masked_fill_(distances < ref.shape[1] * np.finfo(float).eps * scale, 0)
                yield slice(i, i + size), slice(j, j + size), distances
    def radii(points, what):
        nearest = torch.full((len(points), k), math.inf, dtype=torch.float64, device=points.device)
        for rows, columns, distances in blocks(points, points, what):
            if rows == columns:
                distances.fill_diagonal_(math.inf)  # itself, told by its place: a copy is a neighbour
            nearest[rows] = torch.cat([nearest[rows], distances], 1).topk(k, largest=False).values
        return all_reduce(nearest[:, -1].contiguous(), dist.ReduceOp.MIN)

    ref_radii, sample_radii = radii(ref, "radii of REF"), radii(samples, "radii of SAMPLES")
    ref_hits, sample_hits = torch.zeros_like(ref_radii), torch.zeros_like(sample_radii)
    for rows, columns, distances in blocks(samples, ref, "precision, recall"):
        sample_hits[rows] += (distances <= ref_radii[columns]).sum(1)
        ref_hits[columns] += (distances <= sample_radii[rows, None]).sum(0)
    return tuple((all_reduce(hits) > 0).double().mean().item() for hits in (sample_hits, ref_hits))

# ---- sets of images ----
def decode(file):  # -> (H, W, 3) uint8
    try:
        with Image.open(file) as image:
            if image.mode[0] in "IF":
                raise BadInput("more than 8 bits a channel")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"{file} cannot be read as an image ({error}); replace or remove it.") from error

def folder_batches(files, spans, workers):
    """For each (start, stop) of spans images start to stop, (N, H, W, 3) uint8, decoded by threads."""
    first = decode(files[0])
    with ThreadPoolExecutor(workers) as pool:
        for start, stop in spans:
            images = list(pool.map(decode, files[start:stop]))
            for file, image in zip(files[start:stop], images):
                if image.shape != first.shape:
                    raise BadInput(f"{file} is (H, W, 3) = {image.shape}, but {files[0]} is {first.shape}; "
                                   "bring the images of a set to one size first.")
            yield torch.from_numpy(np.stack(images))

def npz_batches(path, shape, offset, spans, workers):
    """The same of arr_0 in a .npz, read forward in pieces: it may be deflated, and larger than memory."""
    size = math.prod(shape)
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
            for start, stop in spans:
                stream.seek(offset + start * size)  # over the other ranks' images
                pixels = bytearray(stream.read((stop - start) * size))
                if len(pixels) < (stop - start) * size:
                    raise EOFError("arr_0 is cut off")
                yield torch.frombuffer(pixels, dtype=torch.uint8).view(-1, *shape)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise BadInput(f"{path} is damaged ({error}); write or download it again.") from error

def open_set(path):
    """Folder or .npz -> number of images, a function (spans, workers) -> batches, stored statistics."""
    if Path(path).is_dir():
        files = sorted(f for f in Path(path).rglob("*") if f.suffix.lower() in SUFFIXES)
        if len(files) < 2:
            raise BadInput(f"{path} has {len(files)} images ({' '.join(SUFFIXES)}); at least 2 are needed.")
        return len(files), partial(folder_batches, files), {}
    if not zipfile.is_zipfile(path):
        raise BadInput(f"{path} is neither a folder nor a .npz; give one of the two.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            stored = {key: arrays[key].astype(np.float64) for key in STATISTICS if key in arrays}
            for key, array in stored.items():
                if array.shape != STATISTICS[key] or not np.isfinite(array).all():
                    raise BadInput(f"{key} is {array.shape} or has NaN, not {STATISTICS[key]} finite numbers")
            if "arr_0" not in arrays:
                if not stored:
                    raise BadInput(f"it has neither arr_0 nor {', '.join(STATISTICS)}")
                return 0, None, stored
            with arrays.zip.open("arr_0.npy") as stream:
                np.lib.format.read_magic(stream)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
                if dtype != np.uint8 or fortran or len(shape) != 4 or shape[0] < 2 or shape[3] != 3:
                    raise BadInput(f"arr_0 is not uint8 (2 or more, H, W, 3) in C order but {dtype} {shape}")
                return shape[0], partial(npz_batches, path, shape[1:], stream.tell()), stored
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise BadInput(f"{path} cannot be used ({error}); write or download it again.") from error

def evaluate(net, opened, what, args, device):
    """-> pool features of a set's images (N, 2048) in file order, its statistics by name."""
    (count, batches, stored), batch = opened, args.batch
    if not count:
        return torch.zeros(0, 2048), stored
    rank, world = rank_and_world()
    # batches take turns over the ranks, so that one holds the same images, and rounds the same, on any number
    spans = [(i, min(i + batch, count)) for i in range(rank * batch, count, world * batch)]
    pool = torch.zeros(count, 2048, device=device)
    of_pool, of_spatial = Statistics(2048, device), Statistics(2023, device)
    unread = batches(spans, args.workers)
    with tqdm(spans, what, unit="batch", disable=rank > 0) as bar, ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, unread, None)
        for start, stop in bar:
            images = coming.result()
            coming = reader.submit(next, unread, None)  # while the network works on these
            pool[start:stop], spatial = net(images.to(device).permute(0, 3, 1, 2))
            of_pool.update(pool[start:stop])
            of_spatial.update(spatial)
    computed = [x.cpu().numpy() for x in (*of_pool.finish(), *of_spatial.finish())]
    return all_reduce(pool), dict(zip(STATISTICS, computed)) | stored  # rows of other ranks' images are zero

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=lambda prog: (
        argparse.RawDescriptionHelpFormatter(prog, width=100)))
    parser.error = lambda message: sys.exit(f"{message}; see fid.py --help.")
    add = parser.add_argument_group("sets").add_argument
    add("ref", metavar="REF", help="what to compare with, real images: folder or .npz")
    add("samples", metavar="SAMPLES", nargs="?", help="what to judge: folder or .npz")
    add = parser.add_argument_group("output").add_argument
    add("--json", metavar="FILE", help="write the metrics there, too (default: only print)")
    add("--save_stats", metavar="FILE.npz", help="write the statistics of REF there; no SAMPLES needed")
    add = parser.add_argument_group("network").add_argument
    add("--inception", metavar="FILE", help="its weights (default: downloaded once, 91 MiB)")
    add("--half_pixel", action="store_true", help="resize as pytorch-fid does (default: as TensorFlow 1)")
    add("--tf32", action="store_true", help="coarser, faster convolutions on a GPU (default: float32)")
    add = parser.add_argument_group("speed").add_argument
    add("--batch", type=int, default=64, help="images at once in each process (default: %(default)s)")
    add("--device", choices=["cuda", "cpu"], help="(default: cuda where there is one)")
    add("--workers", type=int, default=8, help="decoding threads of each process (default: %(default)s)")
    args = parser.parse_args()
    if not (args.samples or args.save_stats):
        parser.error("SAMPLES is missing")
    if min(args.batch, args.workers) < 1:
        parser.error("--batch and --workers must be 1 or more")
    for file in (args.json, args.save_stats):
        if file and not Path(file).absolute().parent.is_dir():
            parser.error(f"{file} cannot be written, its folder does not exist")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        if not torch.cuda.is_available():
            parser.error("there is no CUDA device, use --device cpu")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    sets = {path: open_set(path) for path in (args.ref, args.samples) if path}
    net = None
    if any(count for count, _, _ in sets.values()):
        net = load_inception(args.inception, args.half_pixel, args.tf32).to(device)
    done = {path: evaluate(net, opened, path, args, device) for path, opened in sets.items()}
    ref_pool, ref = done[args.ref]
    if args.save_stats and rank_and_world()[0] == 0:
        np.savez(args.save_stats, **ref)
    if not args.samples:
        return
    pool, samples = done[args.samples]
    metrics = {}
    if len(pool):
        metrics["Inception Score"] = inception_score(net.probs(pool))
    for name, mu, sigma in (("FID", "mu", "sigma"), ("sFID", "mu_s", "sigma_s")):
        if {mu, sigma} <= ref.keys() & samples.keys():
            metrics[name] = frechet_distance(ref[mu], ref[sigma], samples[mu], samples[sigma])
    if min(len(ref_pool), len(pool)) > 3:
        metrics["Precision"], metrics["Recall"] = precision_recall(ref_pool, pool)
    if rank_and_world()[0] > 0:
        return
    for name in NEEDS:
        if name in metrics:
            print(f"{name}: {metrics[name]}")
        else:
            print(f"{name} is left out: it needs {NEEDS[name]}.", file=sys.stderr)
    if args.json:
        Path(args.json).write_text(json.dumps(metrics, indent=2) + "\n")

if __name__ == "__main__":
    try:
        main()
    except (BadInput, FileNotFoundError) as error:
        sys.exit(str(error))
