"""Training steps on a device that is not the CPU, without such a device.

In FakeTensorMode a tensor has a shape and a device but no values. An operation on tensors of two
devices raises, and so does reading a value, for which a GPU would have to finish all that it was
given. Forward passes are run on a fake "cuda". PyTorch built for CUDA cannot run a backward pass
there without a driver (it asks the driver for streams), so whole steps are run on a fake "meta",
which is told apart from the CPU in the same way.
"""

import argparse

import pytest
import torch
import torch.nn as nn
from conftest import run, tiny
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    unset_fake_temporarily,
)
from torch.torch_version import TorchVersion

import ae
import dit
import fid
import train_ae
import train_dit

# Without a driver PyTorch 2.4 and 2.8 abort in forward passes on a fake "cuda"; 2.14 does not.
CUDA = "cuda" if TorchVersion(torch.__version__) >= (2, 14) else "meta"
# Raised where a value would be read.
WAITS = DataDependentOutputException, DynamicOutputShapeException
SIZE, BATCH = 32, 2
CONV = {"channels": (32, 32), "latent_dim": 4}
VIT = {"image_size": SIZE, "hidden_size": 32, "depth": 1, "decoder_depth": 1, "num_heads": 2}
TINY = {name: VIT if model.vit else CONV for name, model in ae.MODELS.items()}


@pytest.fixture(autouse=True)
def fake():
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def made(device, kind, *args, **kwargs):
    """kind(*args, **kwargs), moved to the device: its parameters and buffers become fake ones.

    As with .to(device), any other tensors that it keeps stay on the CPU.
    """
    with unset_fake_temporarily():
        module = kind(*args, **kwargs)
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                fake = torch.empty_like(p, device=device)
                part._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device=device)
    return module


def autoencoder(name, device, **more):
    return made(device, ae.MODELS[name], **TINY[name], **more)


def draws(net, device):
    """The random arguments of forward: the shapes of randomness(), drawn on the device."""
    on_cpu = net.randomness(BATCH, SIZE, torch.Generator("cpu"))
    drawn = {name: torch.empty_like(value, device=device) for name, value in on_cpu.items()}
    assert "ids_shuffle" in drawn or not net.vit
    return drawn


def images(device):
    return torch.randn(BATCH, 3, SIZE, SIZE, device=device)


def perceptual(x_hat, x):
    """In place of LPIPS."""
    return (x_hat - x).square().mean()


def all_on(device, *tensors):
    assert tensors and all(tensor.device.type == device for tensor in tensors)


def gradients_of(module):
    grads = [p.grad for p in module.parameters() if p.requires_grad]
    assert all(grad is not None for grad in grads)
    return grads


# ---- the mode notices what it is here for ----


@pytest.mark.parametrize("device", sorted({CUDA, "meta"}))
def test_a_tensor_left_on_the_cpu_raises(device):
    class Forgetful(ae.VAE):
        def forward(self, x, noise=None, ids_shuffle=None, perceptual=None):
            noise = torch.randn(noise.shape)  # no device
            return super().forward(x, noise)

    net = made(device, Forgetful, **CONV)
    with pytest.raises(RuntimeError, match="devices"):
        net(images(device), **draws(net, device))


@pytest.mark.parametrize("device", sorted({CUDA, "meta"}))
@pytest.mark.parametrize("read", [torch.Tensor.item, bool])
def test_waiting_for_a_value_raises(device, read):
    net = autoencoder("ae", device)
    loss, _, _ = net(images(device))
    with pytest.raises(DataDependentOutputException):
        read(loss)


# ---- autoencoders ----


@pytest.mark.parametrize("name", ae.MODELS)
def test_a_forward_pass_stays_on_cuda(name):
    net = autoencoder(name, CUDA)
    x = images(CUDA)
    loss, terms, x_hat = net(x, perceptual=perceptual, **draws(net, CUDA))
    all_on(CUDA, loss, *terms.values(), x_hat)
    assert loss.requires_grad and x_hat.shape == x.shape and "lpips" in terms
    # What is not passed in is drawn, on the device too
    loss, terms, x_hat = net(x)
    all_on(CUDA, loss, *terms.values(), x_hat)


@pytest.mark.parametrize("name", ae.MODELS)
def test_encoding_and_decoding_stay_on_cuda(name):
    net = autoencoder(name, CUDA)
    posterior = net.encode(images(CUDA))
    z = posterior.sample()
    all_on(CUDA, posterior.mean, posterior.logvar, z, posterior.mode(), net.decode(z))
    assert z.shape[1:] == net.latent_shape(SIZE, SIZE)


@pytest.mark.parametrize("name", ae.MODELS)
def test_a_training_step_stays_on_the_device(name):
    net = autoencoder(name, "meta")
    loss, terms, x_hat = net(images("meta"), perceptual=perceptual, **draws(net, "meta"))
    loss.backward()
    all_on("meta", loss, *terms.values(), x_hat, *gradients_of(net))


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_an_adversarial_step_stays_on_the_device(kind):
    net = autoencoder("sdvae", "meta")
    disc = made("meta", ae.Discriminator)
    x = images("meta")
    loss, terms, x_hat = net(x, perceptual=perceptual, **draws(net, "meta"))
    last_layer = net.decoder.conv_out.weight
    adv, loss_d, adv_terms = ae.adversarial_losses(disc, x, x_hat, loss, last_layer, 0.5, kind)
    (loss + adv).backward()
    loss_d.backward()
    all_on("meta", adv, loss_d, *terms.values(), *adv_terms.values())
    all_on("meta", *gradients_of(net), *gradients_of(disc))


def test_the_discriminator_stays_on_cuda():
    disc, x = made(CUDA, ae.Discriminator), images(CUDA)
    logits = disc(x)
    losses = [ae.disc_loss(logits, logits, kind) for kind in ("hinge", "vanilla")]
    all_on(CUDA, logits, *losses)


def test_tuning_the_decoder_stays_on_the_device():
    for device in (CUDA, "meta"):
        recipe = train_ae.TUNE | VIT | {"init": None}
        args = argparse.Namespace(model="vmae", tune_decoder=True, **recipe)
        net = made(device, train_ae.build, args)
        assert net.deterministic and not net.blocks[0].attn["qkv"].weight.requires_grad
        loss, terms, x_hat = net(images(device), perceptual=perceptual, **draws(net, device))
        all_on(device, loss, *terms.values(), x_hat)
        assert terms.keys() == {"visible", "kl", "lpips"}
    loss.backward()
    all_on("meta", *gradients_of(net))


# ---- the loop of train_ae.py ----


class Optimizer:
    """As much of an optimiser as a step needs; the fused AdamW takes no tensors without values."""

    def __init__(self, net, args):
        self.param_groups = [{"params": [p for p in net.parameters() if p.requires_grad]}]

    def step(self):
        all_on("meta", self.found_inf, *(p.grad for p in self.param_groups[0]["params"]))

    def zero_grad(self):
        for p in self.param_groups[0]["params"]:
            p.grad = None

    def state_dict(self):
        return {}


class Generator(torch.Generator):
    """On the CPU, as "meta" has none; what is drawn from it is on "meta"."""

    device = torch.device("meta")


def batches(dataset, keys, workers, device):
    """In place of train_ae.load_batches."""
    while True:
        yield images(device), None


@pytest.mark.parametrize("name", ["vmae", "sdvae"])
def test_only_a_step_that_is_logged_waits_for_the_device(name, tmp_path, monkeypatch):
    build, discriminator, write = train_ae.build, ae.Discriminator, train_ae.Log.write
    logged = []

    def wait(log, step, lr):
        logged.append((step, dict(log.numbers)))
        assert {"loss", "grad_norm", "skipped"} < log.numbers.keys()
        all_on("meta", *(value for values in log.numbers.values() for value in values))
        # PyTorch 2.4 says it in other words
        with pytest.raises((*WAITS, AttributeError), match="nonzero|_local_scalar_dense|unbacked"):
            write(log, step, lr)
        log.numbers.clear()

    monkeypatch.setattr(train_ae.Log, "write", wait)
    monkeypatch.setattr(fid, "join_processes", lambda device: (0, 1, "meta"))
    monkeypatch.setattr(train_ae, "check_run", lambda *_: 1)  # which compares numbers
    monkeypatch.setattr(train_ae, "generator", lambda *key: Generator("cpu"))
    # The networks are made where they belong, since fake parameters cannot be moved.
    monkeypatch.setattr(train_ae, "build", lambda *args, **more: made("meta", build, *args, **more))
    monkeypatch.setattr(ae, "Discriminator", lambda: made("meta", discriminator))
    monkeypatch.setattr(nn.Module, "to", lambda module, *_, **__: module)
    monkeypatch.setattr(train_ae, "make_optimizer", Optimizer)
    monkeypatch.setattr(train_ae, "load_batches", batches)
    for function in ("preview_images", "save", "save_reconstructions"):
        monkeypatch.setattr(train_ae, function, lambda *_, **__: None)

    flags = "--dtype float32 --compile 0 --steps 4 --log_every 4 --batch 4 --micro_batch 2"
    run(train_ae, "--out", tmp_path, tiny(name), flags)
    first, last = logged
    assert (first[0], last[0]) == (1, 4) and len(last[1]["loss"]) == 6
    assert name != "sdvae" or len(last[1]["adaptive"]) == 4


# ---- DiT ----


def tiny_dit(device):
    net = made(device, dit.DiT, 4, 1, 16, 32, 2, 2, 3)
    assert net.class_dropout_prob > 0
    return net


def flow(net, device, cosine):
    """The loss of a step of train_dit.train, from images that are encoded on the fly."""
    vmae = autoencoder("vmae", device).requires_grad_(False)
    x1 = ae.Posterior(train_dit.encode(vmae, images(device))).sample()
    labels = torch.zeros(BATCH, dtype=torch.long, device=device)
    y = torch.where(torch.rand(BATCH, device=device) < 0.1, net.num_classes, labels)
    noise, t = torch.randn(x1.shape, device=device), torch.randn(BATCH, device=device).sigmoid()
    return dit.flow_loss(net, x1, y, noise, t, cosine)


@pytest.mark.parametrize("cosine", [False, True])
def test_a_dit_s_loss_stays_on_cuda_and_its_step_on_the_device(cosine):
    all_on(CUDA, flow(tiny_dit(CUDA), CUDA, cosine))
    net = tiny_dit("meta")
    loss = flow(net, "meta", cosine)
    loss.backward()
    all_on("meta", loss, *gradients_of(net))
    average = tiny_dit("meta").requires_grad_(False)
    train_dit.update_ema(average, net, torch.ones((), device="meta") * 0.1)
    all_on("meta", *average.parameters())


def test_three_guided_steps_of_sampling_stay_on_cuda():
    net, noise = tiny_dit(CUDA), torch.randn(BATCH, 16, 4, 4, device=CUDA)
    y = torch.zeros(BATCH, dtype=torch.long, device=CUDA)
    z = dit.sample(net, noise, y, steps=3, cfg_scale=4.0, cfg_start=0.0)
    all_on(CUDA, z)
    assert z.shape == noise.shape
