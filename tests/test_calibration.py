"""How two settings that no source gives were chosen: lambda_KL of eq. 5, ae.VAE.weights["kl"], and
the noise of eq. 4, the default of ae.DAE's noise_std.

The paper's AE reconstructs ImageNet at PSNR 32.18, its VAE at 29.40, its DAE at 31.31: the KL costs
2.78 dB, the noise 0.87 dB. An autoencoder with linear encoder and decoder on Gaussian data has its
optimum in closed form, so the setting that costs a linear one as much can be computed from the
spectrum of the data alone: here of 8 x 8 patches of photographs, which become 16 latent channels.

    python tests/test_calibration.py PHOTOS      prints both settings for a folder of photographs
"""

import functools
import inspect
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

sys.path.insert(0, str(Path(__file__).parents[1]))

import ae
import train_ae

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "imagenet-sample"
TARGETS = {"kl": 32.18 - 29.40, "noise_std": 32.18 - 31.31}  # dB
OURS = {
    "kl": ae.VAE.weights["kl"],
    "noise_std": inspect.signature(ae.DAE).parameters["noise_std"].default,
}
CHANNELS = 16
VALUES = 8 * 8 * 3  # of a patch, over which the reconstruction term is a mean


def vae_error(variance, kl):
    """The error that the optimal linear VAE makes on a component of this variance.

    The loss is E (x - d z)^2 / 192 + kl * KL(N(a x, s^2) || N(0, 1)), z = a x + s noise. With
    c = 96 kl its minimum is at d^2 = v - c, a = d / v, s^2 = c / v for v > c: the posterior's mean
    is decoded to (1 - c / v) x, with the error c^2 / v. A component of less variance than c
    collapses, and its error is v.
    """
    c = VALUES / 2 * kl
    return np.where(variance > c, c**2 / variance, variance)


def dae_error(variance, noise_std):
    """The error that the optimal linear DAE makes on a component of this variance, without noise.

    The loss is E (x - g (x + s noise))^2, whose minimum is the Wiener gain g = v / (v + s^2).
    Judged on clean images, it loses (1 - g)^2 of the variance v.
    """
    gain = variance / (variance + noise_std**2)
    return variance * (1 - gain) ** 2


ERRORS = {"kl": vae_error, "noise_std": dae_error}


def spectrum(images, crop):
    """Variances (192,) of the principal components of the images' 8 x 8 patches, largest first."""
    patches = []
    for i in range(len(images)):
        x = crop(images[i], i, 0, False)
        x = x / 127.5 - 1 if x.dtype == torch.uint8 else x
        patches.append(x.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 3, 4, 0).reshape(-1, VALUES))
    covariance = torch.cat(patches).T.double().cov()
    return torch.linalg.eigvalsh(covariance).flip(0).numpy()


def spectra(images):
    """As in training, on random crops, and as judged, on the paper's crop, which is smoother."""
    training = spectrum(images, functools.partial(train_ae.augment, 256, 0))
    return training, spectrum(images, functools.partial(train_ae.crop_for_judging, 256))


def decibels_lost(variances, name, value):
    """PSNR that the optimal linear model with this setting loses to a plain one.

    Both lose the components after the sixteenth; the plain one keeps the others as they are.
    """
    kept, rest = variances[:CHANNELS], variances[CHANNELS:].sum()
    return 10 * np.log10((ERRORS[name](kept, value).sum() + rest) / rest)


def calibrated(variances, name):
    return brentq(lambda value: decibels_lost(variances, name, value) - TARGETS[name], 1e-6, 10)


@pytest.mark.parametrize("variance, kl", [(3.0, 2e-3), (0.5, 5e-3), (0.1, 2e-3)])
def test_the_vae_s_closed_form_is_where_gradient_descent_ends(variance, kl):
    start = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)  # a, d, log s^2
    parameters = start.requires_grad_()
    optimizer = torch.optim.LBFGS([parameters], max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        a, d, logvar = parameters
        recon = (variance * (1 - d * a) ** 2 + d**2 * logvar.exp()) / VALUES
        # The KL of a mean a x with variance `variance` of x, averaged over x.
        loss = recon + kl * 0.5 * (a**2 * variance + logvar.exp() - 1 - logvar)
        optimizer.zero_grad()
        (1e3 * loss).backward()
        return 1e3 * loss

    for _ in range(20):
        optimizer.step(closure)
    a, d, _ = parameters.tolist()
    assert abs(variance * (1 - d * a) ** 2 - vae_error(variance, kl)) < 1e-4 * variance


def test_the_linear_vae_s_kl_is_that_of_ae_py():
    a, s = 0.7, 0.3
    x = torch.linspace(-1, 1, 9).view(9, 1, 1, 1)
    by_hand = 0.5 * (a**2 * x.square().mean() + s**2 - 1 - np.log(s**2))
    ours = ae.kl_normal(a * x, torch.full_like(x, np.log(s**2)))
    torch.testing.assert_close(ours, by_hand)


def test_the_dae_s_closed_form_is_where_least_squares_on_noised_data_end():
    """The map of rank 2 that best restores 4 components."""
    variances, noise_std = np.array([3.0, 0.5, 0.04, 0.01]), 0.33
    random = np.random.default_rng(0)
    x = np.sqrt(variances) * random.standard_normal((400_000, 4))
    noised = x + noise_std * random.standard_normal(x.shape)
    best, *_ = np.linalg.lstsq(noised, x, rcond=None)
    # Of all maps of rank 2 the best keeps the principal components of what this one restores.
    _, _, directions = np.linalg.svd(noised @ best, full_matrices=False)
    best = best @ directions[:2].T @ directions[:2]
    error = (x - x @ best).var(0)
    expected = [*dae_error(variances[:2], noise_std), *variances[2:]]
    assert np.allclose(error, expected, rtol=0.03)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs the photographs of ../shared/data")
def test_the_kl_and_the_noise_cost_linear_models_of_photographs_the_paper_s_decibels():
    images = train_ae.Images(PHOTOS)
    images.files, images.labels = images.files[::6], images.labels[::6]
    training, judged = spectra(images)
    for name, low, high in (("kl", 1.2e-3, 2.2e-3), ("noise_std", 0.30, 0.37)):
        assert low < calibrated(judged, name) < OURS[name] < calibrated(training, name) < high
    # 1e-4 and 0.1, which one might guess, would cost nothing.
    for variances in (training, judged):
        assert decibels_lost(variances, "kl", 1e-4) < 0.05
        assert decibels_lost(variances, "noise_std", 0.1) < 0.03


if __name__ == "__main__":
    crops = "random crops, as in training", "the paper's crop, on which it is judged"
    for crop, variances in zip(crops, spectra(train_ae.Images(sys.argv[1]))):
        for name, ours in OURS.items():
            print(
                f"{crop}: --{name} {calibrated(variances, name):.3g} costs {TARGETS[name]:.2f} dB, "
                f"{ours:.3g} costs {decibels_lost(variances, name, ours):.2f} dB"
            )
