"""ae.py against the reference implementations and the equations, and reading of checkpoints."""

import argparse
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import close, fill, keys_of, normal, reference, saved, shapes, written
from PIL import Image

import ae
import dit
import fid
import sample

SMALL = {"image_size": 64, "hidden_size": 96, "depth": 2, "decoder_depth": 3, "num_heads": 4}
CONV = {"channels": (32, 64, 64, 64)}


@pytest.fixture(scope="module")
def vmae():
    return fill(ae.VMAE(**SMALL), 0)


@pytest.fixture(scope="module")
def vmae_reference():
    return np.load(reference("vmae_seed0.npz"))


# ---- parity with the reference implementations ----


def test_vmae_encodes_and_decodes_as_the_release(vmae, vmae_reference):
    posterior = vmae.encode(normal(200, 2, 3, 64, 64))
    close(posterior.mean, vmae_reference["moments"][:, :16])
    close(posterior.logvar, vmae_reference["moments"][:, 16:].clip(-30, 20))
    close(vmae.decode(posterior.mode()), vmae_reference["recon"])


def test_vmae_masked_pass_is_the_release_s(vmae, vmae_reference):
    x, ids = normal(200, 2, 3, 64, 64), torch.from_numpy(vmae_reference["ids_shuffle"])
    prediction, posterior, mask = vmae.masked_pass(x, torch.zeros(2, 25, 16), ids)
    close(torch.cat([posterior.mean, posterior.logvar], -1), vmae_reference["masked_moments"])
    close(prediction, vmae_reference["masked_pred"])
    assert np.array_equal(mask.numpy(), vmae_reference["mask"])
    close(vmae.patch_error(x, prediction, 1 - mask), vmae_reference["visible_mse"])
    close(vmae.patch_error(x, prediction, mask), vmae_reference["masked_mse"])
    close(ae.kl_unit(posterior.logvar, 1e-3), vmae_reference["kl_std1e3"])


def test_vmae_loss_and_gradients_are_the_release_s(vmae_reference):
    model = fill(ae.VMAE(**SMALL), 0)
    noise, ids = (torch.from_numpy(vmae_reference[name]) for name in ("noise", "ids_shuffle"))
    loss, terms, prediction = model(normal(200, 2, 3, 64, 64), noise, ids)
    close(prediction, vmae_reference["sampled_pred"])
    close(terms["visible"], vmae_reference["sampled_visible_mse"])
    close(terms["masked"], vmae_reference["sampled_masked_mse"])
    close(terms["kl"], vmae_reference["kl_unit"])
    close(loss, vmae_reference["loss"])
    loss.backward()
    close(model.to_latent.weight.grad, vmae_reference["grad_to_latent"])
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    close(norm, vmae_reference["grad_norm"])


def test_sdvae_encodes_and_decodes_as_diffusers_stored_results():
    expected = np.load(reference("sdvae_seed0.npz"))
    model = fill(ae.SDVAE(**CONV), 0)
    posterior = model.encode(normal(400, 2, 3, 64, 64))
    close(torch.cat([posterior.mean, posterior.logvar], 1), expected["moments"])
    close(model.decode(posterior.mode()), expected["recon"])


OLDER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def with_older_names(state):
    """The names that older files of diffusers have for the maps of attention."""
    for new, old in OLDER.items():
        state = {name.replace(f".{new}.", f".{old}."): value for name, value in state.items()}
    return state


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("latent_dim, quant", [(16, False), (4, True)])
def test_sdvae_equals_diffusers_where_installed(tmp_path, latent_dim, quant, older):
    diffusers = pytest.importorskip("diffusers", reason="the peer diffusers is not installed")
    blocks = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    sizes = {"layers_per_block": 2, "latent_channels": latent_dim}
    sizes |= {"use_quant_conv": quant, "use_post_quant_conv": quant}
    theirs = diffusers.AutoencoderKL(3, 3, *blocks, CONV["channels"], **sizes).eval()
    state = with_older_names(theirs.state_dict()) if older else theirs.state_dict()
    torch.save(state, tmp_path / "vae.pt")
    ours, x = ae.load(tmp_path / "vae.pt"), normal(1, 1, 3, 64, 64)
    with torch.no_grad():
        close(ours.encode(x).mean, theirs.encode(x).latent_dist.mean.numpy())
        z = normal(2, 1, latent_dim, 8, 8)
        close(ours.decode(z), theirs.decode(z).sample.numpy())


def test_stable_diffusion_1_s_vae_has_1x1_convolutions_around_the_latent(tmp_path):
    plain = ae.SDVAE(channels=(32, 64), latent_dim=4)
    state = plain.state_dict()
    maps = {"quant_conv": normal(1, 8, 8, 1, 1), "post_quant_conv": normal(2, 4, 4, 1, 1)}
    biases = {"quant_conv": normal(3, 8), "post_quant_conv": normal(4, 4)}
    for name, weight in maps.items():
        state |= {f"{name}.weight": weight, f"{name}.bias": biases[name]}
    torch.save(with_older_names(state), tmp_path / "vae.pt")
    loaded, x, z = ae.load(tmp_path / "vae.pt"), normal(5, 2, 3, 16, 16), normal(6, 2, 4, 8, 8)
    moments = torch.cat([plain.encode(x).mean, plain.encode(x).logvar], 1)
    moments = torch.einsum("ij,bjhw->bihw", maps["quant_conv"][..., 0, 0], moments)
    moments = moments + biases["quant_conv"].view(-1, 1, 1)
    close(loaded.encode(x).mean, moments[:, :4].detach().numpy())
    # The decoder pads after the map: at the border its bias is missing
    inside = torch.einsum("ij,bjhw->bihw", maps["post_quant_conv"][..., 0, 0], z)
    inside = inside + biases["post_quant_conv"].view(-1, 1, 1)
    close(loaded.decode(z), plain.decode(inside).detach().numpy())
    # What a DiT's checkpoint carries of it is the same autoencoder
    again = ae.from_checkpoint({"model": loaded.state_dict(), "args": loaded.args})
    assert torch.equal(again.decode(z), loaded.decode(z))


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_adversarial_losses_are_vqgan_s(kind):
    expected = np.load(reference("adv_seed0.npz"))
    real, fake = torch.from_numpy(expected["real"]), torch.from_numpy(expected["fake"])
    x, last_layer = torch.zeros(()), torch.ones((), requires_grad=True)
    x_hat = 3 * last_layer

    class Discriminator(torch.nn.Module):
        def forward(self, images):
            return real if images is x else fake * images / 3

    arguments = (Discriminator(), x, x_hat, x_hat.square(), last_layer, 0.5, kind)
    added, loss_d, terms = ae.adversarial_losses(*arguments)
    close(loss_d, expected[kind])
    close(ae.disc_loss(real, fake, kind), expected[kind])
    close(terms["adv"], expected["generator"])
    # Half of it, with the gradient of the rest at the last layer, which is 2 * 3 * 3
    torch.testing.assert_close(added.abs(), torch.tensor(0.5 * 18), rtol=1e-2, atol=0)
    close(terms["real"], real.mean().numpy())
    close(terms["fake"], fake.mean().numpy())


def test_tensor_names_and_shapes_are_the_references():
    pretrained = ae.VMAE(image_size=128)
    assert shapes(pretrained) == keys_of("vmae_f8d16_128_pretrain.keys.txt")
    tuned = shapes(ae.VMAE())
    del tuned["mask_token"]
    assert tuned == keys_of("vmae_f8d16_256.keys.txt")
    with torch.device("meta"):
        assert shapes(ae.SDVAE()) == keys_of("sdvae_f8d16.keys.txt")


def test_parameter_counts_are_the_paper_s():
    with torch.device("meta"):
        for name in ("ae", "dae", "vae", "sdvae"):
            assert sum(p.numel() for p in ae.MODELS[name]().parameters()) == 83_819_683
        assert sum(p.numel() for p in ae.Discriminator().parameters()) == 2_765_633
    vmae = ae.VMAE()
    assert sum(p.numel() for p in vmae.parameters()) - vmae.mask_token.numel() == 11_191_412


# ---- the equations ----


def test_kl_is_that_of_torch_distributions():
    mean, logvar = normal(0, 5, 4, 3, 3), normal(1, 5, 4, 3, 3)
    q = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(ae.kl_normal(mean, logvar), kl.sum(1).mean())
    centred = torch.distributions.Normal(0.0, (0.5 * logvar).exp())
    for std in (1.0, 0.1):
        kl = torch.distributions.kl_divergence(centred, torch.distributions.Normal(0.0, std))
        torch.testing.assert_close(ae.kl_unit(logvar, std, dim=1), kl.sum(1).mean())


def test_posterior_clamps_the_log_variance_and_samples_by_the_noise():
    moments, noise = torch.tensor([3.0, 3.0, -100.0, 100.0]), torch.ones(1, 2, 1, 1)
    moments = moments.view(1, 4, 1, 1)
    posterior = ae.Posterior(moments)
    assert posterior.logvar.flatten().tolist() == [-30, 20]
    torch.testing.assert_close(posterior.sample(noise), 3 + (0.5 * posterior.logvar).exp())
    fixed = ae.Posterior(moments, deterministic=True)
    assert torch.equal(fixed.sample(noise), posterior.mode())


@pytest.mark.parametrize("name", ["ae", "dae", "vae", "sdvae"])
def test_objectives_of_eqs_3_to_6_term_by_term(name):
    torch.manual_seed(0)
    model = ae.MODELS[name](channels=(32, 32), weights={"lpips": 0.7})
    x = normal(3, 2, 3, 16, 16)
    draws = model.randomness(2, 16, torch.Generator().manual_seed(1))
    loss, terms, x_hat = model(x, perceptual=lambda a, b: (a - b).abs().mean(), **draws)
    posterior = model.encode(x + 0.33 * draws["noise"] if name == "dae" else x)
    z = posterior.mean
    if name in ("vae", "sdvae"):
        z = z + (0.5 * posterior.logvar).exp() * draws["noise"]
    torch.testing.assert_close(x_hat, model.decode(z))
    # SD-VAE's likelihood is VQGAN's, a Laplace one
    recon = (x_hat - x).abs().mean() if name == "sdvae" else ((x_hat - x) ** 2).mean()
    expected = recon + 0.7 * (x_hat - x).abs().mean()
    if name in ("vae", "sdvae"):
        kl = 0.5 * (posterior.mean**2 + posterior.logvar.exp() - 1 - posterior.logvar).sum(1).mean()
        expected = expected + {"vae": 1.8e-3, "sdvae": 5e-9}[name] * kl
        torch.testing.assert_close(terms["kl"], kl.detach())
    torch.testing.assert_close(loss, expected)
    assert not any(term.requires_grad for term in terms.values())


def test_without_a_kl_weight_the_latent_is_the_mean():
    sizes = {"image_size": 32, "hidden_size": 48, "depth": 1, "decoder_depth": 1}
    x = normal(0, 2, 3, 32, 32)
    for weight, deterministic in ((0.0, True), (1e-6, False)):
        posterior = ae.VMAE(**sizes, weights={"kl": weight}).encode(x)
        assert torch.equal(posterior.sample(), posterior.mean) == deterministic
        noise = ae.VMAE(**sizes, weights={"kl": weight}).randomness(2, 32, torch.Generator())
        assert ("noise" not in noise) == deterministic


def test_mae_s_loss_ignores_the_visible_patches():
    torch.manual_seed(0)
    model = ae.MAE(**SMALL)
    x = normal(4, 2, 3, 64, 64)
    ids = model.randomness(2, 64, torch.Generator().manual_seed(0))["ids_shuffle"]
    loss, terms, x_hat = model(x, ids_shuffle=ids)

    def patches(image):
        return F.unfold(image, 8, stride=8).transpose(1, 2)  # (B, L, pixels)

    error = (patches(x_hat) - patches(x)).square().mean(-1)
    hidden = torch.ones(2, 64, dtype=torch.bool).scatter(1, ids[:, :25], False)
    torch.testing.assert_close(loss, error[hidden].mean())
    assert terms.keys() == {"masked"}


def test_latents_of_masked_patches_are_never_computed_and_their_pixels_never_seen():
    torch.manual_seed(0)
    model = ae.VMAE(**SMALL)
    x = normal(5, 1, 3, 64, 64)
    draws = model.randomness(1, 64, torch.Generator().manual_seed(0))
    prediction, posterior, mask = model.masked_pass(x, **draws)
    assert posterior.mean.shape == (1, 25, 16)
    pixels = F.interpolate(mask.view(1, 1, 8, 8), scale_factor=8.0)
    again, _, _ = model.masked_pass(x + 10 * pixels, **draws)
    assert torch.equal(prediction, again)


def test_without_masking_vmae_has_no_masked_term_and_agrees_with_encode_and_decode():
    torch.manual_seed(0)
    model = ae.VMAE(**SMALL, mask_ratio=0.0)
    x = normal(6, 2, 3, 64, 64)
    draws = model.randomness(2, 64, torch.Generator().manual_seed(0))
    loss, terms, x_hat = model(x, torch.zeros(2, 64, 16), draws["ids_shuffle"])
    assert terms.keys() == {"visible", "kl"} and torch.isfinite(loss)
    torch.testing.assert_close(x_hat, model.decode(model.encode(x).mode()), atol=1e-5, rtol=1e-4)


def test_randomness_handed_in_is_all_the_randomness():
    for name, model_class in ae.MODELS.items():
        torch.manual_seed(0)
        model = model_class(**SMALL) if "mae" in name else model_class(channels=(32, 32))
        x = normal(7, 2, 3, 64, 64)
        draws = [model.randomness(2, 64, torch.Generator().manual_seed(1)) for _ in range(2)]
        first, second = (model(x, **drawn)[0] for drawn in draws)
        assert torch.equal(first, second), name


def test_adaptive_weight_balances_the_gradient_norms_at_the_last_layer():
    torch.manual_seed(0)
    model, disc = ae.SDVAE(channels=(32, 32)), ae.Discriminator()
    x = normal(8, 2, 3, 32, 32)
    loss, _, x_hat = model(x)
    adv = -disc(x_hat).mean()
    weight = ae.adaptive_weight(loss, adv, model.decoder.conv_out.weight)
    norms = []
    for value in (loss, adv):
        model.zero_grad()
        value.backward(retain_graph=True)
        norms.append(model.decoder.conv_out.weight.grad.norm())
    torch.testing.assert_close(weight, norms[0] / (norms[1] + 1e-4))


def test_disc_loss_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match="hinge"):
        ae.disc_loss(torch.zeros(1), torch.zeros(1), "wasserstein")


def test_gradients_agree_with_finite_differences():
    torch.manual_seed(0)
    model = ae.VMAE(image_size=16, hidden_size=16, depth=1, decoder_depth=1, num_heads=2).double()
    x = normal(9, 1, 3, 16, 16).double()
    draws = model.randomness(1, 16, torch.Generator().manual_seed(0))
    draws["noise"] = draws["noise"].double()

    # Posterior computes in float32, so that a smaller step would measure its rounding
    def loss():
        return model(x, **draws)[0].double()

    loss().backward()
    for parameter in (model.decoder_embed.weight, model.mask_token, model.to_latent.weight):
        direction = torch.randn_like(parameter)
        slope = (parameter.grad * direction).sum()
        with torch.no_grad():
            parameter += 1e-2 * direction
            up = loss()
            parameter -= 2e-2 * direction
            down = loss()
            parameter += 1e-2 * direction
        torch.testing.assert_close((up - down) / 2e-2, slope, rtol=2e-2, atol=1e-5)


# ---- LPIPS ----


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::torchvision", "ignore:::lpips")  # which load the old way
def test_lpips_is_the_package_s_on_the_vgg16_of_the_hub_cache_frozen_and_in_eval_mode(
    tmp_path, monkeypatch
):
    import lpips
    import torchvision

    torch.manual_seed(0)
    with torch.device("meta"):
        state = torchvision.models.vgg16().state_dict()
    # Random weights; the 120 million of the classifier are never read
    names = [name for name in state if name.startswith("features.")]
    features = {name: 0.05 * torch.randn(state[name].shape) for name in names}
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(features, tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth")

    ours = ae.lpips_vgg()
    assert not ours.training and not any(module.training for module in ours.modules())
    assert not any(p.requires_grad for p in ours.parameters())
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    mapped = {
        f"net.{name}": features["features." + name.split(".", 1)[1]]
        for name, _ in theirs.net.named_parameters()
    }
    theirs.load_state_dict(mapped, strict=False)
    x, y = normal(0, 2, 3, 64, 64).clamp(-1, 1), normal(1, 2, 3, 64, 64).clamp(-1, 1)
    distance = ours(x, y)
    assert distance.min() > 0 and torch.equal(ours(x, x), torch.zeros(2, 1, 1, 1))
    torch.testing.assert_close(distance, theirs(x, y).detach())
    # Under autocast the features are rounded, but not their mean
    with torch.autocast("cpu", torch.bfloat16):
        rounded = ours(x, y)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, rounded.bfloat16().float())
    torch.testing.assert_close(rounded, distance, rtol=0.02, atol=0)


# ---- checkpoints ----


def test_a_loaded_autoencoder_saves_and_loads_again(tmp_path):
    for name, config in (("mae", SMALL), ("dae", {**CONV, "noise_std": 0.3}), ("vmae", SMALL)):
        args = {"model": name, **config, "lpips": 0.25, "batch": 8}
        model = ae.build(args)
        state = model.state_dict()
        torch.save({"model": state, "args": args}, tmp_path / "a.pt")
        first = ae.load(tmp_path / "a.pt")
        second = ae.from_checkpoint({"args": first.args, "model": first.state_dict()})
        assert type(second) is type(model) and second.weights == model.weights
        assert second.weights["lpips"] == 0.25
        assert getattr(second, "noise_std", None) == config.get("noise_std")
        for ours, original in zip(second.state_dict().values(), state.values()):
            assert torch.equal(ours, original)


def test_settings_are_the_constructor_s_arguments_and_the_weights_of_terms():
    assert ae.settings_of(ae.AE) == {
        "channels": (128, 256, 512, 512),
        "latent_dim": 16,
        "recon": "mse",
        "image_size": None,
        "quant_conv": 0,
        "lpips": 0.0,
    }
    assert ae.settings_of(ae.DAE) == ae.settings_of(ae.AE) | {"noise_std": 0.33}
    changed = {"recon": "l1", "kl": 5e-9, "lpips": 1.0}
    assert ae.settings_of(ae.SDVAE) == ae.settings_of(ae.AE) | changed
    added = {"prior_std": 1.0, "visible": 0.5, "masked": 0.5, "kl": 1e-6, "lpips": 0.5}
    assert ae.settings_of(ae.VMAE) == ae.settings_of(ae.MAE) | added


def test_a_setting_without_a_default_and_a_weight_of_no_term_are_errors():
    class Sharp(ae.AE):
        def __init__(self, *, sharpness, **kwargs):
            super().__init__(**kwargs)

    with pytest.raises(AssertionError, match="Sharp's sharpness has no default"):
        ae.settings_of(Sharp)
    with pytest.raises(ValueError, match=r"VAE has no terms {'klx'}"):
        ae.VAE(channels=(32,), weights={"klx": 1})


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_prefixes_of_ddp_and_compile_are_dropped_in_any_order(tmp_path, prefix):
    model = ae.VMAE(**SMALL)
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({"model": state, "args": {"model": "vmae", **SMALL}}, tmp_path / "a.pt")
    loaded = ae.load(tmp_path / "a.pt").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "name, width, heads, guess",
    [
        (None, 192, 12, False),
        (None, 96, 12, True),
        ("mae_for_ldmae_f8d16_prev", 192, 12, False),
        ("mae_for_ldmae_f8d16_prev_large", 192, 16, False),
        ("ldmae_mode_small", 96, 8, False),
    ],
)
def test_the_release_s_vmae_loads_without_mask_token_and_its_name_gives_the_heads(
    tmp_path, capsys, name, width, heads, guess
):
    model = ae.VMAE(image_size=64, hidden_size=width, depth=2, decoder_depth=3, num_heads=heads)
    state = {k: v for k, v in model.state_dict().items() if k != "mask_token"}
    state["perceptual_loss.net.weight"] = torch.zeros(3)
    namespace = argparse.Namespace(lr=1.0, **({"model": name} if name else {}))
    torch.save({"model": state, "args": namespace, "epoch": 3}, tmp_path / "release.pth")
    loaded = ae.load(tmp_path / "release.pth")
    assert isinstance(loaded, ae.VMAE) and not loaded.training
    assert loaded.args["num_heads"] == heads
    x, z = normal(0, 1, 3, 64, 64), normal(1, 1, 16, 8, 8)
    assert torch.equal(loaded.encode(x).mean, model.encode(x).mean)
    assert torch.equal(loaded.decode(z), model.decode(z))
    assert ("is a guess" in capsys.readouterr().out) == guess


def test_the_encoder_s_tensors_are_those_that_encode_reads():
    x = normal(0, 1, 3, 64, 64)
    for model in (ae.VMAE(**SMALL), ae.SDVAE(**CONV)):
        before = model.encode(x).mean
        encoder = model.encoder_state()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name not in encoder:
                    parameter.add_(1.0)
        assert torch.equal(model.encode(x).mean, before)
        read = [p for name, p in model.named_parameters() if name in encoder and p.requires_grad]
        loss = model.encode(x).mean.square().sum() + model.encode(x).logvar.square().sum()
        assert all(grad.any() for grad in torch.autograd.grad(loss, read))


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("echo harmed",)


@pytest.mark.parametrize(
    "content, words",
    [
        (lambda path: None, "no checkpoint file"),
        (written(b""), "cannot be read"),
        (written(b"hello, I am a text file"), "cannot be read"),
        # The message names the class that is no plain data
        (saved({"model": Evil()}), rf"cannot be read \(.*{os.system.__module__}\.system"),
        (saved({"best": np.float64(0.5)}), r"cannot be read \(.*numpy\S+multiarray\.scalar"),
        (saved({"out": Path("out")}), r"cannot be read \(.*pathlib\S*\.PosixPath"),
        (saved(torch.zeros(3)), "holds a Tensor"),
        (saved({"weight": torch.zeros(3)}), "no autoencoder"),
        (saved({"model": {"x_embedder.proj.weight": torch.zeros(1)}}), "holds a DiT"),
        (saved({"args": {"model": "gan"}, "model": {}}), "no autoencoder"),
        (saved({"encoder.down.0.block.0.norm1.weight": torch.zeros(1)}), "diffusers"),
        (saved({"first_stage_model.encoder.down.0.a": torch.zeros(1)}), "diffusers"),
    ],
)
def test_a_file_that_is_no_autoencoder_gets_a_sentence(tmp_path, content, words, capfd):
    path = tmp_path / "file.pt"
    content(path)
    with pytest.raises((FileNotFoundError, fid.UserError), match=words) as error:
        ae.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value) and "()" not in str(error.value)
    assert "harmed" not in capfd.readouterr().out


def test_a_bug_in_a_class_and_weights_that_do_not_fit_come_through_load_as_themselves(
    tmp_path, monkeypatch
):
    class Buggy(ae.AE):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.widest = self.chanels[-1]

    monkeypatch.setitem(ae.MODELS, "buggy", Buggy)
    weights = {"encoder.conv_in.weight": torch.zeros(1)}
    for name, error, words in (
        ("buggy", AttributeError, "has no attribute 'chanels'"),
        ("ae", RuntimeError, "Missing key.*size mismatch"),
    ):
        torch.save({"args": {"model": name, **CONV}, "model": weights}, tmp_path / "a.pt")
        with pytest.raises(error, match=f"(?s){words}") as raised:
            ae.load(tmp_path / "a.pt")
        assert not isinstance(raised.value, fid.UserError)


def test_a_truncated_checkpoint_gets_a_sentence_wherever_it_is_cut(tmp_path):
    torch.save({"model": ae.AE(channels=(32,)).state_dict()}, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    for share in (0.001, 0.1, 0.5, 0.9, 0.999):
        (tmp_path / "cut.pt").write_bytes(content[: int(share * len(content))])
        with pytest.raises(fid.UserError, match=r"cut\.pt cannot be read"):
            ae.load(tmp_path / "cut.pt")


def test_wrong_image_sizes_are_named():
    with pytest.raises(ValueError, match="not a multiple"):
        ae.AE(channels=(32, 32)).encode(torch.zeros(1, 3, 15, 16))
    with pytest.raises(ValueError, match="64 pixels"):
        ae.VMAE(**SMALL).encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="not a multiple"):
        ae.VMAE(image_size=60)
    with pytest.raises(ValueError, match="leaves 0 of"):
        ae.VMAE(image_size=32, mask_ratio=0.99)


# ---- pictures ----


def test_to_uint8_is_the_floor_of_127_5_x_plus_128_clamped():
    x = torch.tensor([-2, -1, -0.999, 0, 0.5, 0.9999, 1, 3]).view(1, 1, 1, 8).expand(1, 3, 1, 8)
    assert sample.to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 0, 128, 191, 255, 255, 255]

    # Every value survives the way into the network's range and back
    values = np.arange(256, dtype=np.uint8)
    image = (torch.from_numpy(values).float() / 127.5 - 1).view(1, 1, 1, -1).expand(1, 3, 1, -1)
    assert np.array_equal(sample.to_uint8(image)[0, 0, :, 0], values)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_are_an_error_and_no_black_picture(value):
    x = torch.zeros(2, 3, 4, 4)
    x[1, 2, 3, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        sample.to_uint8(x)


@pytest.mark.parametrize("side", [32, 256])
@pytest.mark.parametrize(
    "label",
    ["Fig (952)", "American Staffordshire terrier (180)", 9 * "word " + 9 * "longer_" + "(3)"],
)
def test_captions_of_any_length_stay_beside_their_row(tmp_path, side, label):
    rows = np.full((3, 2, side, side, 3), 200, np.uint8)
    sample.save_grid(tmp_path / "grid.png", rows, ["", label, ""])
    picture = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    shown = max(side, 64) + 2  # pixels of an image and the gap behind it
    margin = picture[:, : -2 * shown]
    ink = np.argwhere(margin < 128)
    assert len(ink) > 20 and margin.shape[1] < 360
    # In the middle row, and nothing is cut off at the left
    assert ink[:, 0].min() >= shown and ink[:, 0].max() < 2 * shown and ink[:, 1].min() > 2
    assert abs(ink[:, 0].mean() - 1.5 * shown) < 0.1 * shown


def test_a_safetensors_file_is_read(tmp_path):
    model = ae.SDVAE(channels=(32, 32), latent_dim=4)
    halves = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    path = tmp_path / "vae.safetensors"
    safetensors.torch.save_file(halves, path, metadata={"format": "pt"})
    loaded = ae.load(path).state_dict()
    for name, half in halves.items():
        assert torch.equal(loaded[name], half.float())
    for damaged in (path.read_bytes()[:-100], b"\xff" * 100, b""):
        path.write_bytes(damaged)
        with pytest.raises(fid.UserError, match="vae.safetensors cannot be read"):
            ae.load(path)


def test_a_folder_where_a_checkpoint_belongs_leads_to_the_file_inside(tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(b"")
    for load in (ae.load, dit.load):
        with pytest.raises(FileNotFoundError, match=r"ckpt\.pt"):
            load(tmp_path)
