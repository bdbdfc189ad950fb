"""dit.py against the reference implementation and the equations, and reading of checkpoints."""

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import close, fill, keys_of, normal, reference, saved, shapes, written

import dit
import fid


@pytest.fixture(scope="module")
def model():
    return fill(dit.DiT(8, 1, 16, 96, 3, 4, 10), 0).eval()


@pytest.fixture(scope="module")
def expected():
    return np.load(reference("dit_seed0.npz"))


# ---- parity with the reference implementation ----


def test_forward_is_lightningdit_s(model, expected):
    t, y = torch.tensor([0.02, 0.3, 0.7, 0.99]), torch.tensor([0, 3, 5, 10])
    close(model(normal(100, 4, 16, 8, 8), t, y), expected["out"])


def test_flow_loss_is_the_reference_s(model, expected):
    x1, noise = normal(700, 4, 16, 8, 8), normal(800, 4, 16, 8, 8)
    t, y = torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.tensor([0, 1, 10, 2])
    close(dit.flow_loss(model, x1, y, noise, t), expected["flow_loss"])


def test_guided_velocity_is_the_reference_s(model, expected):
    x, y = normal(700, 4, 16, 8, 8)[:2], torch.tensor([1, 2])
    close(dit.guided_velocity(model, x, 0.5, y, 4, 3), expected["guided"])


@pytest.mark.parametrize(
    "name, settings",
    [
        ("euler_plain", (10, 1, 3, 0.1, 1.0)),
        ("euler_paper", (10, 10, 3, 0.1, 0.3)),
        ("euler_all", (7, 2, 16, 0.1, 0.3)),
    ],
)
def test_euler_runs_are_the_reference_s(model, expected, name, settings):
    noise, y = normal(900, 2, 16, 8, 8), torch.tensor([1, 2])
    close(dit.sample(model, noise, y, *settings), expected[name])


def test_names_shapes_and_count_of_dit_b_are_lightningdit_s():
    b = dit.DiT_models["DiT-B/1"](input_size=32, in_channels=16, num_classes=1000)
    assert sum(p.numel() for p in b.parameters()) == 131_122_960
    assert shapes(b) == keys_of("lightningdit_b1_f8d16.keys.txt")


@pytest.mark.parametrize("size, millions", [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_each_size_has_the_published_number_of_weights(size, millions):
    """DiT's table 1, latents of 32 x 32 x 4; LightningDiT-XL/1's of 16 x 16 x 32 is 675, too."""
    shape = {1: dict(input_size=16, in_channels=32), 2: dict(input_size=32, in_channels=4)}
    for patch, latents in shape.items():
        with torch.device("meta"):
            model = dit.DiT_models[f"DiT-{size}/{patch}"](**latents, num_classes=1000)
        assert model.patch_size == patch and model.grid == 16
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert round(trained / 1e6) == millions


# ---- the network ----


def test_a_new_network_predicts_the_velocity_zero():
    model = dit.DiT(4, 1, 16, 32, 2, 2, 10)
    assert not model(normal(0, 2, 16, 4, 4), torch.rand(2), torch.tensor([0, 10])).any()


def test_a_single_class_has_no_null_row_and_refuses_guidance():
    model = dit.DiT(4, 1, 16, 32, 1, 2, 1)
    assert len(model.y_embedder["embedding_table"].weight) == 1
    with pytest.raises(ValueError, match="cfg_scale 1"):
        dit.guided_velocity(model, normal(0, 1, 16, 4, 4), 0.5, torch.tensor([0]), 2.0, 3)
    undropped = dit.DiT(4, 1, 16, 32, 1, 2, 10, class_dropout_prob=0)
    assert len(undropped.y_embedder["embedding_table"].weight) == 10


def test_attention_depends_on_relative_positions_alone():
    cos, sin = dit.rotary_tables(16, 6)
    q, k = normal(0, 16), normal(1, 16)

    def turned(x):
        return dit.rotate(x.expand(1, 36, 1, 16), cos, sin)[0, :, 0].view(6, 6, 16)

    scores = torch.einsum("ijd,kld->ijkl", turned(q), turned(k))
    # In both pairs the positions differ by (+2, -1)
    torch.testing.assert_close(scores[1, 2, 3, 1], scores[2, 4, 4, 3])
    # Another difference gives another score
    assert abs(scores[1, 2, 3, 1] - scores[1, 2, 2, 0]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotate_rounds_as_turning_stacking_and_then_casting(dtype):
    cos, sin = dit.rotary_tables(16, 6)
    x = normal(0, 2, 36, 3, 16).to(dtype)
    ours = dit.rotate(x, cos, sin)
    first, second = x[..., ::2], x[..., 1::2]
    cos, sin = cos[:, None, ::2], sin[:, None, ::2]
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -1)
    assert turned.dtype == torch.float32
    assert ours.dtype == dtype and torch.equal(ours, turned.flatten(-2).to(dtype))


def test_larger_patches_put_each_pixel_back_in_its_place():
    model = dit.DiT(8, 2, 4, 32, 0, 2, 10)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    x = normal(0, 1, 4, 8, 8)
    changed = x.clone()
    # The patch in row 1, column 2
    changed[:, :, 2:4, 4:6] += 1
    t, y = torch.tensor([0.5]), torch.tensor([0])
    difference = (model(x, t, y) - model(changed, t, y)).abs().sum(1)[0]
    assert difference[2:4, 4:6].min() > 0
    difference[2:4, 4:6] = 0
    assert not difference.any()


def test_latents_that_do_not_divide_into_patches_are_refused():
    assert dit.DiT(3, 1, 4, 32, 0, 2, 10).grid == 3
    with pytest.raises(ValueError, match="3 x 3 positions do not divide into patches of 2 x 2"):
        dit.DiT(3, 2, 4, 32, 0, 2, 10)


# ---- the loss and the sampler ----


def test_flow_loss_is_zero_for_the_true_velocity_and_its_square_otherwise():
    x1, noise, t = normal(0, 3, 4, 2, 2), normal(1, 3, 4, 2, 2), torch.tensor([0.1, 0.5, 0.9])
    y = torch.zeros(3, dtype=torch.long)

    def oracle(x, times, y):
        """The true velocity at x_t, from data and noise that are both known here."""
        times = times.view(-1, 1, 1, 1)
        torch.testing.assert_close(x, times * x1 + (1 - times) * noise)
        return x1 - noise

    def off(x, times, y):
        return oracle(x, times, y) + 3

    assert dit.flow_loss(oracle, x1, y, noise, t) == 0
    torch.testing.assert_close(dit.flow_loss(off, x1, y, noise, t), torch.tensor(9.0))


def test_cosine_loss_adds_one_minus_the_cosine_over_the_channels():
    x1, noise, t = normal(0, 2, 4, 2, 2), normal(1, 2, 4, 2, 2), torch.tensor([0.2, 0.7])
    y = torch.zeros(2, dtype=torch.long)
    v = normal(2, 2, 4, 2, 2)

    def model(x, t, y):
        return v

    plain = dit.flow_loss(model, x1, y, noise, t)
    added = dit.flow_loss(model, x1, y, noise, t, cosine=True) - plain
    u = x1 - noise
    cosine = (u * v).sum(1) / (u.square().sum(1).sqrt() * v.square().sum(1).sqrt())
    torch.testing.assert_close(added, (1 - cosine).mean())


class Recorder(torch.nn.Module):
    """Stands in for a DiT: predicts the same velocity everywhere, and records its calls."""

    num_classes, class_dropout_prob = 10, 0.1

    def __init__(self, velocity):
        super().__init__()
        self.velocity, self.calls = velocity, []

    def forward(self, x, t, y):
        self.calls.append((len(x), t[0].item(), y.tolist()))
        return self.velocity.expand(len(x), -1, -1, -1)


def test_250_steps_are_250_evaluations_on_the_shifted_grid_and_end_at_the_data():
    velocity = normal(0, 1, 4, 2, 2)
    model = Recorder(velocity)
    noise = normal(1, 1, 4, 2, 2)
    out = dit.sample(model, noise, torch.tensor([3]), steps=250, cfg_scale=1.0, shift=0.3)
    assert len(model.calls) == 250
    # The time steps add up to 1
    torch.testing.assert_close(out, noise + velocity)
    grid = np.arange(250) / 250
    assert np.allclose([t for _, t, _ in model.calls], 0.3 * grid / (1 - 0.7 * grid))


def test_guided_velocity_is_its_formula_for_every_scale_and_sampling_guides_above_1_alone(model):
    x, y = normal(0, 2, 16, 8, 8), torch.tensor([1, 2])
    conditional = model(x, torch.full((2,), 0.5), y)
    unconditional = model(x, torch.full((2,), 0.5), torch.tensor([10, 10]))
    for scale in (0.0, 0.5, 1.0):
        v = dit.guided_velocity(model, x, 0.5, y, scale, 16)
        torch.testing.assert_close(v, unconditional + scale * (conditional - unconditional))
    for scale in (0.0, 0.5, 1.0):
        recorder = Recorder(normal(0, 1, 4, 2, 2))
        dit.sample(recorder, normal(1, 1, 4, 2, 2), torch.tensor([3]), 5, scale)
        assert [(size, y) for size, _, y in recorder.calls] == 5 * [(1, [3])]


def test_below_cfg_start_the_unconditional_half_is_not_computed():
    model = Recorder(normal(0, 1, 4, 2, 2))
    dit.sample(model, normal(1, 2, 4, 2, 2), torch.tensor([3, 4]), 250, 10.0, 3, 0.1, 0.3)
    plain = [call for call in model.calls if call[1] < 0.1]
    guided = [call for call in model.calls if call[1] >= 0.1]
    assert all(size == 2 and y == [3, 4] for size, _, y in plain)
    assert all(size == 4 and y == [3, 4, 10, 10] for size, _, y in guided)
    # The fraction of steps that the paper's settings leave unguided
    assert abs(len(plain) / 250 - 0.27) < 0.005


def test_guidance_touches_the_first_channels_alone(model):
    x, y = normal(0, 2, 16, 8, 8), torch.tensor([1, 2])
    conditional = model(x, torch.full((2,), 0.5), y)
    unconditional = model(x, torch.full((2,), 0.5), torch.tensor([10, 10]))
    v = dit.guided_velocity(model, x, 0.5, y, 3.0, 5)
    torch.testing.assert_close(v[:, 5:], conditional[:, 5:])
    torch.testing.assert_close(v[:, :5], (unconditional + 3 * (conditional - unconditional))[:, :5])


# ---- checkpoints ----


@pytest.mark.parametrize("classes, qk_norm", [(10, True), (1, False)])
def test_a_lightningdit_checkpoint_loads_its_ema_weights(tmp_path, classes, qk_norm):
    ema = fill(dit.DiT(8, 1, 16, 96, 3, 4, classes, qk_norm), 1)
    raw = fill(dit.DiT(8, 1, 16, 96, 3, 4, classes, qk_norm), 2)
    weights = {"module." + k: v for k, v in raw.state_dict().items()}
    ckpt = {"model": weights, "ema": ema.state_dict(), "opt": {}, "config": {}}
    torch.save(ckpt, tmp_path / "lightning.pt")
    loaded, info = dit.load(tmp_path / "lightning.pt")
    assert not loaded.training and "autoencoder" not in info
    x, t, y = normal(0, 2, 16, 8, 8), torch.tensor([0.1, 0.8]), torch.zeros(2, dtype=torch.long)
    assert torch.equal(loaded(x, t, y), ema(x, t, y))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_a_file_of_weights_alone_is_a_dit_too(tmp_path, prefix, suffix):
    model = fill(dit.DiT(8, 1, 16, 96, 3, 4, 10), 1)
    state = {prefix + name: value for name, value in model.state_dict().items()}
    path = tmp_path / f"dit{suffix}"
    if suffix == ".pt":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    loaded, _ = dit.load(path)
    assert loaded.num_classes == 10 and loaded.class_dropout_prob > 0
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


@pytest.mark.parametrize(
    "config, dropout, classes",
    [({"data": {"num_classes": 5}}, 0.0, 5), ({"data": {"num_classes": 4}}, 0.1, 4), ({}, 0.0, 4)],
)
def test_the_config_of_a_lightningdit_file_says_whether_the_last_row_is_the_null_class(
    tmp_path, config, dropout, classes
):
    rows = 5 if dropout == 0 else 4
    model = dit.DiT(4, 1, 16, 32, 1, 2, rows, class_dropout_prob=dropout)
    torch.save({"ema": model.state_dict(), "config": config}, tmp_path / "dit.pt")
    loaded, _ = dit.load(tmp_path / "dit.pt")
    assert loaded.num_classes == classes
    # Without a config the last of five rows is taken for the null class
    assert (loaded.class_dropout_prob > 0) == (classes == 4)


@pytest.mark.parametrize("config", [{"data": {"num_classes": 1}}, {}])
def test_the_null_class_of_a_lightningdit_file_of_one_class_is_not_needed(tmp_path, config):
    model = fill(dit.DiT(4, 1, 16, 32, 1, 2, 2, class_dropout_prob=0), 0)  # the class and the null
    torch.save({"ema": model.state_dict(), "config": config}, tmp_path / "dit.pt")
    loaded, _ = dit.load(tmp_path / "dit.pt")
    assert loaded.num_classes == 1 and loaded.class_dropout_prob == 0
    x, t, y = normal(0, 2, 16, 4, 4), torch.tensor([0.1, 0.8]), torch.zeros(2, dtype=torch.long)
    assert torch.equal(loaded(x, t, y), model(x, t, y))


# As Peebles and Xie's, which has no rotary positions
OTHER = {"x_embedder.proj.weight": torch.zeros(8, 4, 2, 2), "pos_embed": torch.zeros(1, 16, 8)}


@pytest.mark.parametrize(
    "content, words",
    [
        (lambda path: None, "no checkpoint file"),
        (written(b"hello, I am a text file"), "cannot be read"),
        (saved([1, 2]), "holds a list, not a checkpoint"),
        (saved({"model": {"patch_embed.proj.weight": torch.zeros(1)}}), "train_dit.py --ae"),
        (saved({"ema": OTHER, "args": {}, "class_names": ["a"]}), "a DiT of another kind"),
        (saved(OTHER), "a DiT of another kind"),
    ],
)
def test_a_file_that_is_no_dit_gets_a_sentence(tmp_path, content, words):
    content(tmp_path / "file.pt")
    with pytest.raises((FileNotFoundError, fid.UserError), match=words) as error:
        dit.load(tmp_path / "file.pt")
    assert "\n" not in str(error.value) and "file.pt" in str(error.value)


def test_a_file_with_a_tensor_missing_is_not_loaded(tmp_path, model):
    state = model.state_dict()
    del state["blocks.1.mlp.w3.bias"]
    torch.save(state, tmp_path / "dit.pt")
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.1\.mlp\.w3\.bias"):
        dit.load(tmp_path / "dit.pt")
