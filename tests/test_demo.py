"""The demo as a newcomer runs it, and whether its digits are digits."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_VIT, log_of, run
from paper import digits, distance, grey, judge_images, train_classifier

import train_ae


def test_the_bundled_digits_are_500_of_each_and_50_of_each_are_held_out():
    train, held = train_ae.Images(None), train_ae.Images(None, held_out=True)
    assert np.bincount(train.labels).tolist() == [450] * 10
    assert np.bincount(held.labels).tolist() == [50] * 10
    seen = {image.tobytes() for image in train.pixels}
    assert not any(image.tobytes() in seen for image in held.pixels)
    image = np.asarray(train[0])
    assert image.shape == (32, 32, 3) and not image[:2].any() and not image[:, -2:].any()


@pytest.mark.parametrize("model", ["ae", "dae", "vae", "sdvae", "mae"])
def test_each_of_the_other_autoencoders_learns_in_the_demo(tmp_path, model):
    sizes = TINY_VIT if model == "mae" else "--channels 32 32 32"
    flags = "--steps 30 --batch 4 --image_size 24 --base_lr 0.064 --warmup 0.01 --log_every 1"
    run(train_ae, "--out", tmp_path, f"--model {model} {sizes} {flags}")
    losses = [line.get("recon", line.get("masked")) for line in log_of(tmp_path)]
    assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:3])
    assert (tmp_path / "recon.png").exists()


@pytest.mark.slow
def test_the_demo_draws_digits_of_the_class_asked_for_varied_and_not_copied(tmp_path):
    commands = ("train_ae.py", "train_ae.py --tune_decoder", "train_dit.py", "sample.py")
    for line in (*commands, "sample.py --num 2000 --npz"):
        script, *flags = line.split()
        command = [sys.executable, ROOT / script, *flags]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(command, cwd=tmp_path, env=env, check=True)
    unit = 1 if sys.platform == "darwin" else 2**10
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit < 4 * 2**30
    out = tmp_path / "out" / "demo" / "dit"
    assert (out / "samples.png").exists()

    net = train_classifier()
    held, held_y = digits(held_out=True)
    assert (net(held).argmax(1) == held_y).float().mean() >= 0.97
    samples = np.load(out / "samples.npz")
    images, y = torch.from_numpy(samples["arr_0"]), torch.from_numpy(samples["arr_1"])
    measures = judge_images(images, y, net)
    x = grey(images)

    real, real_y = digits(held_out=False)
    real_distance = distance(net.features(real), net.features(held))

    def spread(images):
        return net.features(images).var(0).sum().item()

    ratios = [spread(x[y == c]) / spread(real[real_y == c]) for c in range(10)]

    def nearest(images):
        return torch.cdist(images.flatten(1), real.flatten(1)).min(1).values

    # A copy would lie closer to a training digit than any real, held-out digit does
    copied = (nearest(x) < 0.5 * nearest(held).min()).sum().item()
    print(
        f"{measures}, the distance of held-out digits {real_distance:.1f}, "
        f"variance ratios {np.round(ratios, 2)}, copies {copied}"
    )
    assert measures["accuracy"] >= 0.97
    assert measures["gFD"] <= 2 * real_distance
    assert min(ratios) >= 0.5
    assert copied == 0
