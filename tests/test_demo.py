"""The demo as a newcomer runs it, and whether its digits are digits."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY_VIT, log_of, run
from torch import nn

import train_ae


def digits(held_out):
    """The bundled digits in [0, 1], with their labels."""
    images = train_ae.Images(None, held_out)
    return torch.from_numpy(images.files).float()[:, None] / 255, torch.from_numpy(images.labels)


class Classifier(nn.Module):
    """A small convolutional network that tells digits apart."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 8 * 8, 128)
        self.out = nn.Linear(128, 10)

    def features(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.relu(self.hidden(F.dropout(x.flatten(1), 0.3, self.training)))

    def forward(self, x):
        return self.out(self.features(x))


def train_classifier(epochs=25):
    torch.manual_seed(0)
    x, y = digits(held_out=False)
    net = Classifier()
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * 45)
    for _ in range(epochs):
        for rows in torch.randperm(4500).split(100):
            # Small rotations, scales and shifts
            affine = torch.eye(2, 3) + 0.1 * torch.randn(len(rows), 2, 3)
            grid = F.affine_grid(affine, x[rows].shape, align_corners=False)
            loss = F.cross_entropy(net(F.grid_sample(x[rows], grid, align_corners=False)), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval().requires_grad_(False)


def test_the_bundled_digits_are_500_of_each_and_50_of_each_are_held_out():
    train, held = train_ae.Images(None), train_ae.Images(None, held_out=True)
    assert np.bincount(train.labels).tolist() == [450] * 10
    assert np.bincount(held.labels).tolist() == [50] * 10
    seen = {image.tobytes() for image in train.files}
    assert not any(image.tobytes() in seen for image in held.files)
    image = np.asarray(train[0])
    assert image.shape == (32, 32, 3) and not image[:2].any() and not image[:, -2:].any()


@pytest.mark.parametrize("model", ["ae", "dae", "vae", "sdvae", "mae"])
def test_each_of_the_other_autoencoders_learns_in_the_demo(tmp_path, model):
    sizes = TINY_VIT if model == "mae" else "--channels 32 32 32"
    flags = "--steps 40 --batch 8 --lr 1e-3 --warmup 0.01 --log_every 1"
    run(train_ae, "--out", tmp_path, f"--model {model} {sizes} {flags}")
    losses = [line.get("recon", line.get("masked")) for line in log_of(tmp_path)]
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:3])
    assert (tmp_path / "recon.png").exists()


@pytest.mark.slow
def test_the_demo_draws_digits_of_the_class_asked_for_varied_and_not_copied(tmp_path):
    for line in ("train_ae.py", "train_dit.py", "sample.py", "sample.py --num 500"):
        script, *flags = line.split()
        command = [sys.executable, ROOT / script, *flags]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(command, cwd=tmp_path, env=env, check=True)
    # In KiB: 4 GiB
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 * 2**20
    out = tmp_path / "out" / "demo" / "dit"
    assert (out / "samples.png").exists()

    net = train_classifier()
    held, held_y = digits(held_out=True)
    assert (net(held).argmax(1) == held_y).float().mean() >= 0.97
    samples = np.load(out / "samples.npz")
    x = torch.from_numpy(samples["arr_0"]).float().mean(-1)[:, None] / 255
    y = torch.from_numpy(samples["arr_1"])
    accuracy = (net(x).argmax(1) == y).float().mean().item()

    real, real_y = digits(held_out=False)

    def spread(images):
        return net.features(images).var(0).sum().item()

    ratios = [spread(x[y == c]) / spread(real[real_y == c]) for c in range(10)]

    def nearest(images):
        return torch.cdist(images.flatten(1), real.flatten(1)).min(1).values

    # A copy would lie closer to a training digit than any real, held-out digit does
    copied = (nearest(x) < 0.5 * nearest(held).min()).sum().item()
    print(f"accuracy {accuracy:.3f}, variance ratios {np.round(ratios, 2)}, copies {copied}")
    assert accuracy >= 0.95
    assert min(ratios) >= 0.5
    assert copied == 0
