"""The training scripts and sample.py: one rule of randomness, processes, resume, caches, wrong input."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms.functional import pil_to_tensor

import ae
import dit
import sample
import train_ae
import train_dit
from conftest import TINY_CONV, TINY_VIT, difference, fails, log_of, normal, run, tiny, torchrun

SMALL = ("--batch", 16, "--log_every", 1, "--ckpt_every", 4)


@pytest.fixture(scope="module")
def tiny_dit(tiny_vmae, tmp_path_factory):
    """A DiT trained for 8 steps on the digits."""
    out = tmp_path_factory.mktemp("dit")
    run(train_dit, "--ae", tiny_vmae, "--out", out, *SMALL, "--steps", 8, "--sample_steps", 4)
    return out / "ckpt.pt"


# ---- one rule of randomness: processes and micro-batches change speed, not the run ----


def test_vmae_ends_the_same_with_two_processes_or_other_micro_batches(tmp_path):
    flags = (*TINY_VIT, *SMALL, "--steps", 6)
    run(train_ae, "--out", tmp_path / "one", *flags)
    run(train_ae, "--out", tmp_path / "micro", *flags, "--micro_batch", 4)
    torchrun(2, "train_ae.py", "--out", tmp_path / "two", *flags, "--micro_batch", 4)
    for other in ("micro", "two"):
        assert difference(tmp_path / "one", tmp_path / other) < 1e-5
        for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / other)):
            assert a["step"] == b["step"] and abs(a["masked"] - b["masked"]) < 1e-5
    start = train_ae.ae.MODELS["vmae"](image_size=32, hidden_size=32, depth=1, decoder_depth=1, num_heads=2)
    trained = torch.load(tmp_path / "one" / "ckpt.pt", weights_only=True)["model"]
    assert (
        trained["mask_token"] - start.mask_token
    ).abs().max() > 1e-3  # they agree, and not because nothing moves


def test_dit_ends_the_same_with_two_processes_or_other_micro_batches(tmp_path, tiny_vmae):
    flags = ("--ae", tiny_vmae, *SMALL, "--steps", 6, "--sample_steps", 2)
    run(train_dit, "--out", tmp_path / "one", *flags)
    run(train_dit, "--out", tmp_path / "micro", *flags, "--micro_batch", 4)
    torchrun(2, "train_dit.py", "--out", tmp_path / "two", *flags)
    for other in ("micro", "two"):
        assert difference(tmp_path / "one", tmp_path / other) < 1e-5
        assert difference(tmp_path / "one", tmp_path / other, "ema") < 1e-5
    trained = torch.load(tmp_path / "one" / "ckpt.pt", weights_only=True)
    for part in ("model", "ema"):  # they agree, and not because nothing moves: this weight starts at zero
        assert trained[part]["final_layer.linear.weight"].abs().max() > 1e-4


@pytest.mark.parametrize("model", ["vae", "dae", "mae"])
def test_other_models_end_the_same_with_other_micro_batches(tmp_path, model):
    flags = (*tiny(model), *SMALL, "--steps", 4)
    run(train_ae, "--out", tmp_path / "one", *flags)
    run(train_ae, "--out", tmp_path / "micro", *flags, "--micro_batch", 8)
    assert difference(tmp_path / "one", tmp_path / "micro") < 1e-5


def test_two_processes_train_sdvae_with_one_discriminator(tmp_path):
    flags = ("--model", "sdvae", *TINY_CONV, *SMALL, "--steps", 4, "--disc_start", 2)
    torchrun(2, "train_ae.py", "--out", tmp_path / "two", *flags)
    terms = log_of(tmp_path / "two")
    assert "adv" not in terms[0] and {"adv", "disc", "adaptive", "real", "fake"} <= terms[1].keys()
    assert all(np.isfinite(value) for line in terms for value in line.values())


# ---- resume ----


@pytest.mark.parametrize("model", ["vmae", "sdvae"])
def test_a_resumed_autoencoder_ends_in_the_same_bits(tmp_path, model):
    flags = (*tiny(model), *SMALL, "--schedule", "constant")
    run(train_ae, "--out", tmp_path / "whole", *flags, "--steps", 10)
    run(train_ae, "--out", tmp_path / "cut", *flags, "--steps", 4)
    run(train_ae, "--out", tmp_path / "cut", "--model", model, "--resume", "--steps", 10)
    for part in ("model", "disc") if model == "sdvae" else ("model",):
        assert difference(tmp_path / "whole", tmp_path / "cut", part) == 0
    keep = lambda out: [
        {k: v for k, v in line.items() if not k.endswith(("_per_s", "_left"))} for line in log_of(out)
    ]
    assert keep(tmp_path / "whole") == keep(tmp_path / "cut")


def test_a_resumed_dit_ends_in_the_same_bits_whatever_was_logged_after_the_checkpoint(tmp_path, tiny_vmae):
    flags = ("--ae", tiny_vmae, *SMALL, "--sample_steps", 2, "--schedule", "constant")
    run(train_dit, "--out", tmp_path / "whole", *flags, "--steps", 10)
    run(train_dit, "--out", tmp_path / "cut", *flags, "--steps", 4)
    with open(tmp_path / "cut" / "log.jsonl", "a") as file:
        file.write(json.dumps({"step": 5, "loss": 123.0}) + "\n")  # of a run that was killed before step 8
    run(train_dit, "--out", tmp_path / "cut", "--resume", "--steps", 10)
    for part in ("model", "ema"):
        assert difference(tmp_path / "whole", tmp_path / "cut", part) == 0
    assert [line["loss"] for line in log_of(tmp_path / "whole")] == [
        line["loss"] for line in log_of(tmp_path / "cut")
    ]


def test_a_run_moved_elsewhere_resumes_there_and_a_torn_log_line_is_dropped(tmp_path):
    run(train_ae, "--out", tmp_path / "first", *TINY_VIT, *SMALL, "--steps", 4)
    before = (tmp_path / "first" / "ckpt.pt").read_bytes()
    shutil.copytree(tmp_path / "first", tmp_path / "moved")
    with open(tmp_path / "moved" / "log.jsonl", "a") as file:
        file.write('{"step": 5, "vis')
    run(train_ae, "--out", tmp_path / "moved", "--resume", "--steps", 6)
    assert (tmp_path / "first" / "ckpt.pt").read_bytes() == before
    assert [line["step"] for line in log_of(tmp_path / "moved")] == [1, 2, 3, 4, 5, 6]


def test_resuming_a_finished_run_says_so(tiny_vmae, tiny_dit, capsys):
    before = tiny_vmae.read_bytes(), tiny_dit.read_bytes()
    run(train_ae, "--out", tiny_vmae.parent, "--resume")
    assert "is finished, at step 20" in capsys.readouterr().out
    run(train_dit, "--out", tiny_dit.parent, "--resume")
    assert "is finished, at step 8" in capsys.readouterr().out
    assert (tiny_vmae.read_bytes(), tiny_dit.read_bytes()) == before


# ---- what training shows ----


def test_the_start_prints_what_a_person_checks(tmp_path, tiny_vmae, capsys):
    run(train_ae, "--out", tmp_path / "a", *TINY_VIT, *SMALL, "--steps", 1)
    text = capsys.readouterr().out
    for words in (
        "demo settings",
        "mask_ratio 0.6",
        "lpips 0",
        "4,500 images of 10 classes",
        "parameters",
        "MiB",
        "GFLOPs",
        "step 1/1",
        "visible",
        "masked",
        "kl",
        "lr",
        "images/s",
        "left",
    ):
        assert words in text
    run(train_dit, "--ae", tiny_vmae, "--out", tmp_path / "d", "--steps", 1, "--sample_steps", 1)
    text = capsys.readouterr().out
    mean, std = text.split("normalised latents, first micro-batch: mean ")[1].split("\n")[0].split(", std ")
    assert abs(float(mean)) < 0.1 and abs(float(std) - 1) < 0.1


def test_gflops_are_those_of_the_paper_s_models():
    assert (
        26 < train_ae.gflops(ae.VMAE(), torch.zeros(1, 3, 256, 256)) < 27
    )  # 40% of the encoder's tokens, all of the decoder's
    b = dit.DiT_models["DiT-B/1"](input_size=32, in_channels=16, num_classes=1000)
    count = train_ae.gflops(b, torch.zeros(1, 16, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert abs(count - 212.7) < 0.5


def test_pictures_have_a_row_for_each_thing_shown(tiny_vmae, tiny_dit):
    rows = Image.open(tiny_vmae.parent / "recon.png").height // 66  # digits are shown at 64 pixels
    assert rows == 4  # original, reconstruction, masked input, prediction
    assert Image.open(tiny_dit.parent / "samples.png").height // 66 == 10


# ---- images ----


def test_center_crop_is_adm_s_for_a_known_picture():
    ramp = np.arange(64, dtype=np.uint8)[:, None].repeat(128, 1)
    crop = np.asarray(train_ae.center_crop(Image.fromarray(ramp).convert("RGB"), 32))
    assert crop.shape == (32, 32, 3)
    assert np.array_equal(
        crop[:, 0, 0], np.round(ramp[:, 0].reshape(32, 2).mean(1) + 1e-9)
    )  # BOX halves once
    wide = Image.new("RGB", (100, 40))
    wide.putpixel((50, 20), (255, 255, 255))
    assert (
        np.asarray(train_ae.center_crop(wide, 40))[20, 20].tolist() == [255] * 3
    )  # from column (100 - 40) // 2


def test_class_folders_and_flat_folders(folder):
    images = train_ae.Images(folder)
    assert images.classes == ["ants", "bees", "cats"] and len(images) == 120
    assert images.labels.tolist() == [0] * 40 + [1] * 40 + [2] * 40
    assert images[0].mode == "RGB"
    flat = train_ae.Images(folder / "bees")
    assert flat.classes == [""] and len(flat) == 40


def test_augmentation_depends_on_seed_epoch_and_index_alone(folder):
    image = train_ae.Images(folder)[0]
    make = lambda seed, epoch, index: train_ae.augment(32, seed, True, image, index, epoch, False)
    first = make(0, 1, 2)
    torch.rand(3)
    assert torch.equal(first, make(0, 1, 2))
    assert not any(torch.equal(first, make(*key)) for key in ((1, 1, 2), (0, 2, 2), (0, 1, 3)))


@pytest.mark.parametrize("side", [(37, 50), (9, 12), (300, 400)])
def test_augmentation_is_torchvision_s_random_resized_crop_flipped_where_the_key_says_so(side):
    """On noise, the worst case: PyTorch's weights have 16 bits, Pillow's 32, and both round twice."""
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (*side, 3), dtype=np.uint8))
    crop = T.RandomResizedCrop(32, (0.75, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    for epoch in range(8):
        torch.manual_seed(train_ae.seed_of(3, epoch, 5))
        expected = pil_to_tensor(crop(image))
        ours = train_ae.augment(32, 3, True, image, 5, epoch, False)
        assert torch.equal(train_ae.augment(32, 3, True, image, 5, epoch, True), ours.flip(-1))
        assert ours.shape == (3, 32, 32) and ours.dtype == torch.uint8
        levels = (ours.int() - expected.int()).abs()
        assert levels.max() <= 2 and (levels > 1).sum() <= 1


def test_augmentation_resizes_width_then_height_whatever_pillow_s_order():
    """Pillow from 13 on begins with the height of a tall picture, and other pixels are clipped on the way."""
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 2, (400, 300, 3), dtype=np.uint8) * 255)
    for epoch in range(8):
        torch.manual_seed(train_ae.seed_of(3, epoch, 5))
        top, left, height, width = T.RandomResizedCrop.get_params(image, (0.75, 1.0), (3 / 4, 4 / 3))
        expected = image.crop((left, top, left + width, top + height))
        for size in ((256, height), (256, 256)):
            expected = expected.resize(size, Image.BICUBIC)
        expected = pil_to_tensor(expected)
        levels = (train_ae.augment(256, 3, True, image, 5, epoch, False).int() - expected.int()).abs()
        assert levels.max() <= 2 and (levels > 1).float().mean() < 1e-4


def test_an_epoch_has_every_image_once_whatever_the_number_of_processes():
    class args:
        seed, batch, micro_batch, steps = 0, 12, 3, 10

    whole = [key for keys in train_ae.training_keys(args, 60, 0, 1, 0) for key in keys]
    assert sorted(index for index, _, _ in whole[:60]) == list(range(60))
    assert [epoch for _, epoch, _ in whole] == [0] * 60 + [1] * 60
    assert [index for index, _, _ in whole[:60]] != [index for index, _, _ in whole[60:]]
    halves = [
        [key for keys in train_ae.training_keys(args, 60, rank, 2, 0) for key in keys] for rank in (0, 1)
    ]
    merged = [halves[p % 12 // 6][p // 12 * 6 + p % 6] for p in range(120)]
    assert merged == whole
    late = [key for keys in train_ae.training_keys(args, 60, 0, 1, 7) for key in keys]
    assert late == whole[84:]


def test_training_in_bfloat16_learns_as_in_float32(tmp_path):
    flags = (*TINY_VIT, *SMALL, "--steps", 12, "--lr", 1e-3, "--warmup", 0)
    run(train_ae, "--out", tmp_path / "float32", *flags)
    run(train_ae, "--out", tmp_path / "bfloat16", *flags, "--dtype", "bfloat16")
    for a, b in zip(log_of(tmp_path / "float32"), log_of(tmp_path / "bfloat16")):
        assert a["masked"] != b["masked"] and abs(a["masked"] - b["masked"]) < 0.02 * a["masked"]
    state = torch.load(tmp_path / "bfloat16" / "ckpt.pt", weights_only=True)["model"]
    assert all(value.dtype == torch.float32 for value in state.values())


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vmae", "sdvae"])
def test_compiled_training_is_eager_training(tmp_path, model):
    flags = (*tiny(model), *SMALL, "--steps", 6, "--seed", 1)
    run(train_ae, "--out", tmp_path / "eager", *flags)
    run(train_ae, "--out", tmp_path / "compiled", *flags, "--compile", 1)
    assert difference(tmp_path / "eager", tmp_path / "compiled") < 1e-4
    assert difference(tmp_path / "eager", tmp_path / "eager") == 0


@pytest.mark.slow
def test_compiled_dit_training_is_eager_training(tmp_path, tiny_vmae):
    flags = ("--ae", tiny_vmae, *SMALL, "--steps", 6, "--sample_steps", 1)
    run(train_dit, "--out", tmp_path / "eager", *flags)
    run(train_dit, "--out", tmp_path / "compiled", *flags, "--compile", 1)
    assert difference(tmp_path / "eager", tmp_path / "compiled") < 1e-4


def test_an_unreadable_image_is_skipped_by_name_and_many_stop_the_run(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "images")
    flags = (
        "--data",
        tmp_path / "images",
        "--image_size",
        32,
        "--lpips",
        0,
        *TINY_VIT,
        *SMALL,
        "--steps",
        15,
    )
    (tmp_path / "images" / "ants" / "000.jpg").write_bytes(b"not an image")  # one of those in recon.png
    run(train_ae, "--out", tmp_path / "a", *flags, "--workers", 2)
    assert "000.jpg" in capsys.readouterr().err
    run(
        train_ae, "--out", tmp_path / "often", *flags, "--workers", 0, "--batch", 256, "--steps", 2
    )  # twice a batch
    for name in ("004.jpg", "006.jpg"):
        path = tmp_path / "images" / "bees" / name
        path.write_bytes(path.read_bytes()[:100])
    assert "more than 1%" in fails(train_ae, "--out", tmp_path / "b", *flags, "--workers", 2)


# ---- the latent cache ----


def test_training_from_the_cache_is_training_on_the_fly_up_to_16_bits(tmp_path, folder):
    size = ("--image_size", 32, "--workers", 0)
    run(
        train_ae,
        "--data",
        folder,
        "--out",
        tmp_path / "ae",
        *TINY_VIT,
        *SMALL,
        *size,
        "--steps",
        4,
        "--lpips",
        0,
    )
    flags = (
        "--data",
        folder,
        "--ae",
        tmp_path / "ae" / "ckpt.pt",
        "--model",
        "DiT-demo/1",
        *SMALL,
        *size,
        "--steps",
        6,
        "--sample_steps",
        1,
        "--cfg_scale",
        1,
    )
    run(train_dit, "--out", tmp_path / "fly", *flags)
    run(train_dit, "--out", tmp_path / "cached", *flags, "--cache", tmp_path / "cache")
    torchrun(2, "train_dit.py", "--out", tmp_path / "two", *flags, "--cache", tmp_path / "cache2")
    for a, b, c in zip(*(log_of(tmp_path / name) for name in ("fly", "cached", "two"))):
        assert abs(a["loss"] - b["loss"]) < 1e-3 and abs(b["loss"] - c["loss"]) < 1e-5
    assert torch.load(tmp_path / "cached" / "ckpt.pt", weights_only=True)["class_names"] == [
        "ants",
        "bees",
        "cats",
    ]


def test_the_cache_holds_the_moments_of_each_image_and_its_flip(tmp_path, tiny_vmae, folder, monkeypatch):
    monkeypatch.setattr(train_dit.Cache, "shard", 50)  # three shards
    flags = (
        "--data",
        folder,
        "--ae",
        tiny_vmae,
        "--model",
        "DiT-demo/1",
        *SMALL,
        "--image_size",
        32,
        "--workers",
        0,
        "--steps",
        1,
        "--sample_steps",
        1,
        "--cfg_scale",
        1,
        "--cache",
        tmp_path / "cache",
    )
    run(train_dit, "--out", tmp_path / "a", *flags)
    images, autoencoder = train_ae.Images(folder), ae.load(tiny_vmae)
    for index in (0, 49, 50, 119):
        for flip in (0, 1):
            crop = np.asarray(train_ae.center_crop(images[index], 32))
            crop = crop[:, ::-1].copy() if flip else crop
            x = torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 127.5 - 1
            expected = autoencoder.encode(x)
            moments, labels, _ = train_dit.Cache(tmp_path / "cache", images)[[(index, 0, bool(flip))]]
            posterior = ae.Posterior(moments)
            torch.testing.assert_close(posterior.mean, expected.mean.detach(), rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(posterior.logvar, expected.logvar.detach(), rtol=2e-3, atol=2e-3)
            assert labels.item() == images.labels[index]

    # an interruption: the missing shard is made again, the others are not touched
    shard = tmp_path / "cache" / "moments-00001.npy"
    whole, others = shard.read_bytes(), (tmp_path / "cache" / "moments-00000.npy").stat().st_mtime_ns
    shard.unlink()
    run(train_dit, "--out", tmp_path / "b", *flags)
    assert shard.read_bytes() == whole
    assert (tmp_path / "cache" / "moments-00000.npy").stat().st_mtime_ns == others

    # a cache of another autoencoder or folder is refused
    state = torch.load(tiny_vmae, weights_only=True)
    state["model"]["norm.bias"] += 1
    torch.save(state, tmp_path / "other.pt")
    assert "another autoencoder" in fails(
        train_dit, "--out", tmp_path / "c", *flags, "--ae", tmp_path / "other.pt"
    )
    shutil.copytree(folder, tmp_path / "elsewhere")
    message = fails(train_dit, "--out", tmp_path / "d", *flags, "--data", tmp_path / "elsewhere")
    assert "another folder" in message


def test_the_cache_of_digits_has_no_flips(tmp_path, tiny_vmae):
    run(
        train_dit,
        "--ae",
        tiny_vmae,
        "--out",
        tmp_path / "a",
        *SMALL,
        "--steps",
        1,
        "--sample_steps",
        1,
        "--cache",
        tmp_path / "cache",
    )
    cache = train_dit.Cache(tmp_path / "cache", train_ae.Images(None))
    assert torch.equal(cache[[(7, 0, True)]][0], cache[[(7, 0, False)]][0])


def test_each_access_draws_a_fresh_posterior_sample(tiny_vmae):
    posterior = ae.load(tiny_vmae).encode(normal(0, 1, 3, 32, 32))
    draws = [torch.randn(1, 8, 4, 4, generator=train_ae.generator("cpu", 0, step)) for step in (1, 2)]
    assert not torch.equal(posterior.sample(draws[0]), posterior.sample(draws[1]))


def test_latent_statistics_normalise_each_channel(tiny_vmae):
    images, autoencoder = train_ae.Images(None), ae.load(tiny_vmae).requires_grad_(False)

    class args:
        seed, device, workers, latent_shape = 0, "cpu", 0, (8, 4, 4)

    dataset = train_ae.Batches(images, train_dit.functools.partial(train_dit.crop_and_flip, 32, False))
    mean, std = train_dit.latent_statistics(dataset, autoencoder.encode, args, len(images), 0, 1)
    x = torch.from_numpy(images.files).float()[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
    z = torch.cat([autoencoder.encode(part).sample() for part in x.split(500)])
    torch.testing.assert_close(mean, z.mean((0, 2, 3)), rtol=0.02, atol=0.02)
    torch.testing.assert_close(std, z.std((0, 2, 3)), rtol=0.02, atol=0.02)


# ---- sample.py ----


def test_a_dit_checkpoint_is_enough_to_draw_from(tmp_path, tiny_dit, capsys):
    moved = tmp_path / "alone.pt"
    shutil.copy(tiny_dit, moved)
    run(sample, "--ckpt", moved, "--columns", 3)
    assert str(tmp_path / "samples.png") in capsys.readouterr().out
    assert Image.open(tmp_path / "samples.png").height // 66 == 10
    run(sample, "--ckpt", moved, "--labels", 7, 3, "--columns", 3)
    pair = np.asarray(Image.open(tmp_path / "samples.png"))
    run(sample, "--ckpt", moved, "--labels", "7,3", "--columns", 3)
    assert np.array_equal(pair, np.asarray(Image.open(tmp_path / "samples.png")))
    assert Image.open(tmp_path / "samples.png").height // 66 == 2


def test_sample_i_depends_on_seed_and_i_alone(tmp_path, tiny_dit, monkeypatch):
    monkeypatch.setattr(sample, "PART", 16)
    load = lambda name: np.load(tmp_path / name / "samples.npz")
    flags = ("--ckpt", tiny_dit, "--steps", 4)
    run(sample, *flags, "--num", 40, "--out", tmp_path / "a")
    run(sample, *flags, "--num", 24, "--out", tmp_path / "b", "--batch", 5)
    torchrun(2, "sample.py", *flags, "--num", 40, "--out", tmp_path / "c")
    run(sample, *flags, "--num", 24, "--out", tmp_path / "d", "--seed", 1)
    a = load("a")
    assert a["arr_0"].shape == (40, 32, 32, 3) and a["arr_0"].dtype == np.uint8 and a["arr_1"].shape == (40,)
    for other, n in (("b", 24), ("c", 40)):
        assert np.array_equal(a["arr_1"][:n], load(other)["arr_1"])
        assert (
            np.abs(a["arr_0"][:n].astype(int) - load(other)["arr_0"]).max() <= 1
        )  # rounding of another batch
    assert np.abs(a["arr_0"][:24].astype(int) - load("d")["arr_0"]).max() > 20
    assert len(set(a["arr_1"].tolist())) > 5


def test_a_flat_folder_is_one_class_without_guidance(tmp_path, tiny_vmae, folder):
    run(
        train_dit,
        "--data",
        folder / "ants",
        "--ae",
        tiny_vmae,
        "--model",
        "DiT-demo/1",
        "--workers",
        0,
        *SMALL,
        "--steps",
        2,
        "--sample_steps",
        2,
        "--out",
        tmp_path,
    )
    ckpt = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert len(ckpt["ema"]["y_embedder.embedding_table.weight"]) == 1 and ckpt["args"]["cfg_scale"] == 1
    run(sample, "--ckpt", tmp_path / "ckpt.pt")
    run(sample, "--ckpt", tmp_path / "ckpt.pt", "--num", 3)
    assert np.load(tmp_path / "samples.npz").files == ["arr_0"]  # no labels where there are no classes
    assert "several classes" in fails(sample, "--ckpt", tmp_path / "ckpt.pt", "--cfg_scale", 3)


def test_an_interrupted_samples_npz_goes_on(tmp_path, tiny_dit, monkeypatch):
    monkeypatch.setattr(sample, "PART", 8)
    flags = ("--ckpt", tiny_dit, "--steps", 2, "--num", 30, "--out")
    run(sample, *flags, tmp_path / "whole")
    drawn, real_draw = [], sample.draw

    def draw(loaded, args, indices, labels):
        drawn.append(list(indices))
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return real_draw(loaded, args, indices, labels)

    monkeypatch.setattr(sample, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        run(sample, *flags, tmp_path / "cut")
    assert "other settings" in fails(sample, *flags, tmp_path / "cut", "--seed", 3)
    run(sample, *flags, tmp_path / "cut")
    assert drawn[3:] == [list(range(16, 24)), list(range(24, 30))]  # the first two parts are not drawn again
    for name in ("arr_0", "arr_1"):
        assert np.array_equal(*(np.load(tmp_path / out / "samples.npz")[name] for out in ("whole", "cut")))
    assert not (tmp_path / "cut" / "samples.parts").exists()


def test_weights_of_others_are_drawn_with_ae_and_stats(tmp_path, tiny_vmae, tiny_dit):
    ckpt = torch.load(tiny_dit, weights_only=True)
    torch.save({"ema": ckpt["ema"], "model": ckpt["model"], "opt": {}}, tmp_path / "lightning.pt")
    stats = {name: ckpt[f"latent_{name}"].view(1, -1, 1, 1) for name in ("mean", "std")}
    torch.save(stats, tmp_path / "latents_stats.pt")
    assert "--ae" in fails(sample, "--ckpt", tmp_path / "lightning.pt")
    assert "--stats" in fails(sample, "--ckpt", tmp_path / "lightning.pt", "--ae", tiny_vmae)
    same = ("--num", 6, "--steps", 4, "--cfg_scale", 2, "--cfg_channels", 8)
    run(
        sample,
        "--ckpt",
        tmp_path / "lightning.pt",
        "--ae",
        tiny_vmae,
        "--stats",
        tmp_path / "latents_stats.pt",
        "--out",
        tmp_path / "theirs",
        *same,
    )
    run(sample, "--ckpt", tiny_dit, "--out", tmp_path / "ours", *same)
    assert np.array_equal(*(np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("ours", "theirs")))


# ---- wrong input: one sentence, exit 1 ----


def wrong_autoencoder_runs(tmp):
    (tmp / "empty").mkdir()
    (tmp / "mixed" / "a").mkdir(parents=True)
    for path in (tmp / "mixed" / "1.png", tmp / "mixed" / "a" / "2.png"):
        Image.new("RGB", (40, 40)).save(path)
    yield ("--data", tmp / "nowhere"), "no such folder"
    yield ("--data", tmp / "empty"), "holds no images"
    yield ("--data", tmp / "mixed"), "both in itself and in sub-folders"
    yield ("--model", "vqgan"), "vqgan"
    yield ("--steps", "many"), "many"
    yield ("--lerning_rate", "1"), "lerning_rate"
    yield ("--image_size", 30), "multiple"
    yield ("--model", "ae", "--image_size", 30), "multiple"
    yield ("--mask_ratio", 0.99), "leaves 0 of"
    yield ("--batch", 10, "--micro_batch", 3), "does not divide"
    yield ("--model", "ae", "--channels", 30, 30), "32"
    yield ("--hidden_size", 30), "30"
    yield ("--resume",), "no checkpoint file"
    yield ("--steps", 0), "--steps"
    yield ("--batch", 0), "--batch"
    yield ("--model", "mae", "--mask_ratio", 0), "mask"
    yield ("--device", "gpu"), "gpu"
    yield ("--lr", -1), "--lr"
    yield ("--lr", "nan"), "--lr"
    yield ("--betas", 0.9), "--betas"
    yield ("--betas", 1, 2), "--betas"
    yield ("--prior_std", 0), "--prior_std"
    yield ("--seed", -1), "--seed"
    yield ("--model", "sdvae", "--image_size", 16), "discriminator"
    yield ("--model", "ae", "--mask_ratio", 0.5), "--mask_ratio is not a flag of --model ae"
    yield ("--kl", 0, "--model", "mae"), "--kl is not a flag of --model mae"
    yield ("--disc_start", 3), "--disc_start is not"
    yield ("--recon", "l1"), "--recon is not a flag of --model vmae"
    yield ("--tune_decoder", "--init", "a.pt", "--mask_ratio", 0.5), "--model vmae --tune_decoder"
    yield ("--ckpt", "a.pt"), "--init"


def test_mistakes_with_train_ae_get_one_sentence(tmp_path):
    for k, (flags, words) in enumerate(wrong_autoencoder_runs(tmp_path)):
        assert words in fails(train_ae, "--out", tmp_path / str(k), *flags)


def test_an_out_folder_with_a_checkpoint_is_not_overwritten_nor_resumed_as_another_run(tiny_vmae, tiny_dit):
    assert "--resume" in fails(train_ae, "--out", tiny_vmae.parent)
    assert "--hidden_size 32, not 64" in fails(
        train_ae, "--out", tiny_vmae.parent, "--resume", "--hidden_size", 64
    )
    assert "--batch" in fails(train_dit, "--out", tiny_dit.parent, "--resume", "--batch", 1)
    assert "kind autoencoder" in fails(train_dit, "--out", tiny_vmae.parent, "--resume")
    assert "kind dit" in fails(train_ae, "--out", tiny_dit.parent, "--resume")


def test_mistakes_with_train_dit_and_sample_get_one_sentence(tmp_path, tiny_vmae, tiny_dit):
    out = ("--out", tmp_path / "out")
    assert "no checkpoint file" in fails(train_dit, *out, "--ae", tmp_path / "nothing.pt")
    assert "holds a DiT" in fails(train_dit, *out, "--ae", tiny_dit)
    assert "32 pixels" in fails(train_dit, *out, "--ae", tiny_vmae, "--image_size", 64)
    assert "does not divide" in fails(train_dit, *out, "--ae", tiny_vmae, "--micro_batch", 31)
    assert "classes" in fails(train_dit, *out, "--ae", tiny_vmae, "--class_dropout", 0, "--cfg_scale", 3)
    assert "--shift" in fails(train_dit, *out, "--ae", tiny_vmae, "--shift", 0)
    (tmp_path / "file").write_text("")
    assert "file" in fails(train_dit, "--out", tmp_path / "file", "--ae", tiny_vmae)
    for flag in ("--columns", "--batch", "--seed", "--shift"):
        assert flag in fails(sample, "--ckpt", tiny_dit, flag, -1)
    assert "class numbers" in fails(sample, "--ckpt", tiny_dit, "--labels", "")
    torch.save({"mean": [0.0] * 3, "std": [1.0] * 3}, tmp_path / "stats.pt")
    message = fails(sample, "--ckpt", tiny_dit, "--stats", tmp_path / "stats.pt")
    assert "do not fit" in message and "--ae, --stats" in message
    assert "no checkpoint file" in fails(sample, "--ckpt", tmp_path / "nothing.pt")
    assert "belongs behind" in fails(sample, "--ckpt", tiny_vmae)
    assert "classes 0 to 9" in fails(sample, "--ckpt", tiny_dit, "--labels", "3,10")
    assert "class numbers" in fails(sample, "--ckpt", tiny_dit, "--labels", "cat")
    assert "--num" in fails(sample, "--ckpt", tiny_dit, "--num", 0)
    assert "--steps" in fails(sample, "--ckpt", tiny_dit, "--steps", 0)


def test_a_cache_is_not_made_of_another_folder_nor_taken_for_a_checkpoint(tmp_path, tiny_vmae, folder):
    out = ("--out", tmp_path / "out", "--ae", tiny_vmae)
    for place in (folder, tiny_vmae):
        before = sorted(place.iterdir()) if place.is_dir() else place.read_bytes()
        assert "no latent cache" in fails(train_dit, *out, "--cache", place)
        assert before == (sorted(place.iterdir()) if place.is_dir() else place.read_bytes())
    (tmp_path / "source.json").write_text("{}")
    assert "train_dit.py --cache" in fails(sample, "--ckpt", tmp_path)


def test_latents_are_of_images_of_the_size_the_autoencoder_was_trained_at(tmp_path, folder):
    flags = ("--data", folder, "--workers", 0, "--batch", 8, "--steps", 1)
    run(train_ae, *flags, "--model", "ae", *TINY_CONV, "--image_size", 48, "--out", tmp_path / "ae")
    small = ("--model", "DiT-demo/1", "--sample_steps", 1, "--cfg_scale", 1)
    run(train_dit, *flags, *small, "--ae", tmp_path / "ae" / "ckpt.pt", "--out", tmp_path / "dit")
    args = torch.load(tmp_path / "dit" / "ckpt.pt", weights_only=True)["args"]
    assert args["image_size"] == 48 and args["latent_shape"] == [16, 24, 24]


@pytest.mark.parametrize("module", [train_ae, train_dit, sample])
def test_help_is_narrow_and_has_a_default_of_every_setting(module, capsys):
    with pytest.raises(SystemExit):
        run(module, "--help")
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100 and "None" not in text
    assert " ".join(text.split()).count("demo:") >= 3


def test_lpips_without_its_weights_stops_the_run(tmp_path, folder, monkeypatch):
    import urllib.error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", offline)
    message = fails(train_ae, "--data", folder, "--image_size", 32, "--out", tmp_path / "a", *TINY_VIT)
    assert "--lpips 0" in message and "vgg16-397923af.pth" in message
    assert sys.getsizeof(message) < 1000


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(OSError, match="file cannot be written: disk full"):
        with ae.whole_file(str(path)) as file:
            file.write(b"half")
            raise OSError("disk full")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
    with ae.whole_file(str(path)) as file:
        file.write(b"after")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"


@pytest.mark.parametrize(
    "model, size",
    [
        ("vmae", 24),
        ("vmae", 40),
        ("vmae", 136),
        ("ae", 40),
        ("ae", 136),
        pytest.param("vmae", 512, marks=pytest.mark.slow),
    ],
)
def test_any_size_that_8_divides_goes_through_both_stages_and_sampling(tmp_path, folder, model, size):
    """From tiny, non-square images in class folders; 24 pixels are 3 x 3 latents, 512 are 64 x 64."""
    data = ("--data", folder, "--image_size", size, "--workers", 0, "--batch", 2, "--steps", 1)
    channels = ("--channels", 32, 32, 32, 32) if model == "ae" else TINY_VIT
    run(train_ae, "--out", tmp_path, "--model", model, *channels, *data, "--lpips", 0)
    few = ("--model", "DiT-demo/1", "--sample_steps", 1, "--cfg_scale", 1)
    run(train_dit, "--out", tmp_path / "dit", "--ae", tmp_path / "ckpt.pt", *data, *few)
    latent = torch.load(tmp_path / "dit" / "ckpt.pt", weights_only=True)["args"]["latent_shape"]
    assert latent == [16, size // 8, size // 8]
    run(sample, "--ckpt", tmp_path / "dit" / "ckpt.pt", "--labels", 1, "--columns", 2)
    with Image.open(tmp_path / "dit" / "samples.png") as picture:
        assert picture.height >= size and "bees" in torch.load(tmp_path / "dit" / "ckpt.pt")["class_names"]
