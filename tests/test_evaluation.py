"""train_ae.py --eval, and the three stages of the paper's VMAE."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import ae
import fid
import train_ae
from conftest import TINY_CONV, TINY_VIT, fails, log_of, normal, run, torchrun


@pytest.fixture(autouse=True)
def no_weights(tmp_path, monkeypatch):
    """A TORCH_HOME without VGG16, and no network."""
    import urllib.error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", offline)


# ---- the measures ----


def test_ssim_is_scikit_image_s_with_a_gaussian_window():
    metrics = pytest.importorskip("skimage.metrics", reason="the peer scikit-image is not installed")
    x = F.interpolate(normal(0, 3, 3, 12, 12), (48, 40), mode="bicubic").clamp(-1, 1)
    y = (x + 0.2 * normal(1, 3, 3, 48, 40)).clamp(-1, 1)
    for ours, a, b in zip(train_ae.ssim(x, y), x, y):
        theirs = metrics.structural_similarity(
            a.numpy(),
            b.numpy(),
            channel_axis=0,
            data_range=2.0,
            sigma=1.5,
            gaussian_weights=True,
            use_sample_covariance=False,
        )
        assert abs(ours.item() - theirs) < 1e-4


def test_ssim_is_the_value_that_scikit_image_gave():
    x = F.interpolate(normal(0, 3, 3, 12, 12), (48, 40), mode="bicubic").clamp(-1, 1)
    y = (x + 0.2 * normal(1, 3, 3, 48, 40)).clamp(-1, 1)
    assert np.allclose(
        train_ae.ssim(x, y), [0.862512, 0.874022, 0.87211], atol=1e-4
    )  # the call above, scikit-image 0.26.0


def test_ssim_by_hand_of_constant_images():
    a, b = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), -0.25)
    c1 = 0.02**2
    expected = (2 * 0.5 * -0.25 + c1) / (0.5**2 + 0.25**2 + c1)  # without variance the second factor is 1
    assert abs(train_ae.ssim(a, b).item() - expected) < 1e-9
    assert train_ae.ssim(b, b).item() == 1


def test_compression_of_constructed_latents_by_hand():
    # one channel of std 2, on an image of two labels and another of one of them:
    # "a" holds 0, 4 (mean 2, squares 8) and 2, 2, 2, 6 (mean 3, squares 12); "b" 10, 14 (mean 12, squares 8)
    segments = [("a", [0.0, 4.0]), ("b", [10.0, 14.0]), ("a", [2.0, 2.0, 2.0, 6.0])]
    sums = torch.stack([train_ae.power_sums(torch.tensor([values])) for _, values in segments])
    result = train_ae.compression([label for label, _ in segments], sums, torch.tensor([2.0]).double())
    assert abs(result["sigma2"] - (8 + 8 + 12) / 8 / 4) < 1e-12  # over 8 values, divided by the squared std
    # centroids: a 16 / 6, b 12; within a: 64 - 16^2 / 6, within b: 8
    within = (64 - 16**2 / 6 + 8) / 8
    assert abs(result["rho"] - (12 - 16 / 6) / within**0.5) < 1e-12


def test_compression_divides_each_channel_by_its_own_std():
    z = normal(0, 4, 60).double()
    scale = torch.tensor([1.0, 10.0, 0.1, 3.0]).double()
    parts = [("x", slice(0, 20)), ("y", slice(20, 60))]

    def result(latents, std):
        sums = torch.stack([train_ae.power_sums(latents[:, part]) for _, part in parts])
        return train_ae.compression([label for label, _ in parts], sums, std)

    a, b = result(z, scale**0), result(z * scale[:, None], scale)
    assert abs(a["sigma2"] - b["sigma2"]) < 1e-9 and abs(a["rho"] - b["rho"]) < 1e-9


def test_ade20k_label_images_are_cropped_as_the_photograph(tmp_path):
    labels = np.zeros((40, 80), np.uint8)  # wider than high: columns 20 to 59 remain
    labels[:, :20], labels[:, 20:40], labels[10:, 40:60] = 9, 3, 7
    Image.fromarray(labels).save(tmp_path / "ADE_val_00000001.png")
    masks = train_ae.find_masks(str(tmp_path))
    assert list(masks) == ["ADE_val_00000001"]
    found = dict(train_ae.segments(masks["ADE_val_00000001"], 4))
    assert found.keys() == {3, 7}  # 9 is cropped away, 0 is no label
    assert found[3].tolist() == [[True, True, False, False]] * 4
    assert found[7].tolist() == [[False] * 4] + [[False, False, True, True]] * 3


def test_a_coloured_label_image_is_one_sentence(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    with pytest.raises(SystemExit, match="a.png is in colour"):
        list(train_ae.segments([(tmp_path / "a.png", "")], 4))


def test_celebamask_parts_belong_to_the_image_of_their_number(tmp_path):
    (tmp_path / "0").mkdir()
    for part, box in (("hair", (0, 0, 16, 4)), ("l_eye", (4, 8, 8, 12))):
        image = Image.new("RGB", (16, 16))
        image.paste((255, 255, 255), box)
        image.save(tmp_path / "0" / f"00012_{part}.png")
    masks = train_ae.find_masks(str(tmp_path))
    assert list(masks) == ["12"] == [train_ae.image_name("00012")]
    found = dict(train_ae.segments(masks["12"], 4))
    assert found["hair"].tolist() == [[True] * 4] + [[False] * 4] * 3
    assert np.argwhere(found["l_eye"]).tolist() == [[2, 1]]
    assert [label for label, _ in train_ae.segments(masks["12"][:1], 4)] == [
        "hair"
    ]  # of an image of one part, too


# ---- the command ----


def table(text):
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def test_eval_prints_a_row_a_checkpoint_whoever_made_it(tmp_path, folder, capsys):
    sizes = {"image_size": 32, "hidden_size": 48, "depth": 1, "decoder_depth": 1}
    vmae = ae.VMAE(**sizes, num_heads=12)
    release = {key: value for key, value in vmae.state_dict().items() if key != "mask_token"}
    for name in ("ours", "release", "diffusers"):
        (tmp_path / name).mkdir()
    torch.save({"model": release, "args": argparse.Namespace()}, tmp_path / "release" / "release.pth")
    torch.save(ae.SDVAE(channels=(32, 32)).state_dict(), tmp_path / "diffusers" / "diffusers.pt")
    torch.save(
        {
            "kind": "autoencoder",
            "name": "vmae",
            "config": {**sizes, "num_heads": 12},
            "model": vmae.state_dict(),
        },
        tmp_path / "ours" / "ckpt.pt",
    )
    paths = [next((tmp_path / name).iterdir()) for name in ("ours", "release", "diffusers")]
    run(
        train_ae,
        "--eval",
        "--ckpt",
        *paths,
        "--data",
        folder / "ants",
        "--image_size",
        32,
        "--workers",
        0,
        "--out",
        tmp_path / "eval",
    )
    text = capsys.readouterr().out
    rows = table(text)
    assert [row["autoencoder"] for row in rows] == ["ours", "release", "diffusers"]
    assert rows[0]["PSNR"] == rows[1]["PSNR"]  # the same weights
    assert rows[0]["LPIPS"] == rows[0]["rFID"] == "-"
    assert "LPIPS is not computed" in text and "vgg16-397923af.pth" in text
    assert "rFID is not computed" in text and "pt_inception-2015-12-05-6726825d.pth" in text

    saved = json.loads((tmp_path / "eval" / "eval.json").read_text())["rows"][0]
    images = train_ae.Images(folder / "ants")
    crops = np.stack([np.asarray(train_ae.center_crop(images[i], 32)) for i in range(len(images))])
    x = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        x_hat = vmae.decode(vmae.encode(x).mode())
    mse = ((ae.to_uint8(x_hat).astype(float) - crops) ** 2).mean((1, 2, 3))
    assert abs(saved["PSNR"] - (10 * np.log10(255**2 / mse)).mean()) < 1e-6
    assert abs(saved["L1"] - ((x_hat + 1) / 2 - (x + 1) / 2).abs().mean().item()) < 1e-6
    for name in ("ours", "release", "diffusers"):
        width, height = Image.open(tmp_path / "eval" / f"{name}.png").size
        assert height // 66 == 10 and width // 66 == 1 + len(train_ae.EPS)


def test_each_autoencoder_is_judged_at_its_own_size_and_under_its_own_name(tmp_path, folder, capsys):
    for name, size in (("ckpt", 48), ("other", 40)):
        net = ae.AE(channels=(32, 32))
        config = {"kind": "autoencoder", "name": "ae", "config": {"channels": [32, 32]}}
        torch.save(
            {**config, "args": {"image_size": size}, "model": net.state_dict()}, tmp_path / f"{name}.pt"
        )
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "ckpt.pt").symlink_to(tmp_path / "ckpt.pt")
    torch.save(net.state_dict(), tmp_path / "few.pt")  # as diffusers': no size is known
    for path in sorted((folder / "cats").iterdir())[:3]:
        (tmp_path / "few" / path.name).symlink_to(path)
    files = [tmp_path / name for name in ("ckpt.pt", "other.pt", "few/ckpt.pt", "few.pt")]
    flags = ("--eval", "--data", tmp_path / "few", "--workers", 0, "--out", tmp_path / "eval", "--ckpt")
    run(train_ae, *flags, *files)
    text = (tmp_path / "eval" / "eval.json").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    rows = record["rows"]
    assert [row["autoencoder"] for row in rows] == [tmp_path.name, "other", "few", "few-3"]
    assert [row["pixels"] for row in rows] == [48, 40, 48, 256]
    assert record["ckpt"] == list(map(str, files)) and rows[0]["rFID"] is None
    row, parameters = rows[3], sum(p.numel() for p in net.parameters())
    assert row["parameters"] == parameters and row["MiB"] == parameters * 4 / 2**20 and row["images/s"] > 0
    assert row["GFLOPs encode"] == train_ae.gflops(net, torch.zeros(1, 3, 256, 256), method="encode")

    torch.save({"ema": {"x_embedder.proj.weight": torch.zeros(1)}}, tmp_path / "dit.pt")
    capsys.readouterr()
    assert "dit.pt" in fails(train_ae, *flags, *files, tmp_path / "dit.pt")
    assert "|" not in capsys.readouterr().out  # before the first is judged


def test_smoothness_falls_with_eps_and_two_processes_say_the_same(tmp_path, tiny_vmae):
    flags = ("--eval", "--ckpt", tiny_vmae)
    run(train_ae, *flags, "--out", tmp_path / "one")
    torchrun(2, "train_ae.py", *flags, "--out", tmp_path / "two")
    one, two = (json.loads((tmp_path / out / "eval.json").read_text())["rows"][0] for out in ("one", "two"))
    smoothness = next(key for key in one if key.startswith("PSNR at eps"))
    values = [one["PSNR"], *one[smoothness]]
    assert values[0] > values[3] > values[4] > values[5]
    for key in ("L1", "PSNR", "SSIM"):
        assert abs(one[key] - two[key]) < 1e-6
    assert np.allclose(one[smoothness], two[smoothness], atol=1e-6)


def test_masks_give_sigma2_and_rho_also_on_two_processes(tmp_path, tiny_vmae, folder):
    masks = tmp_path / "masks"
    masks.mkdir()
    images = train_ae.Images(folder / "bees")
    for i, file in enumerate(images.files):
        labels = np.random.RandomState(i).randint(0, 4, (images[i].height, images[i].width)).astype(np.uint8)
        Image.fromarray(labels).save(masks / f"{Path(file).stem}.png")
    flags = ("--eval", "--ckpt", tiny_vmae, "--data", folder / "bees", "--workers", 0, "--masks", masks)
    run(train_ae, *flags, "--out", tmp_path / "one", "--micro_batch", 8)
    torchrun(2, "train_ae.py", *flags, "--out", tmp_path / "two", "--micro_batch", 8)
    one, two = (json.loads((tmp_path / out / "eval.json").read_text())["rows"][0] for out in ("one", "two"))
    assert abs(one["sigma2"] - two["sigma2"]) < 1e-9 and abs(one["rho"] - two["rho"]) < 1e-9
    assert 0.4 < one["sigma2"] < 1.1  # random labels hardly compress: the variance within is nearly all of it
    assert "holds no" in fails(
        train_ae, "--eval", "--ckpt", tiny_vmae, "--masks", masks, "--out", tmp_path / "x"
    )


def test_rfid_and_lpips_are_computed_where_their_weights_are(tmp_path, tiny_vmae, folder, monkeypatch):
    torch.manual_seed(0)
    net = fid.InceptionV3()
    torch.save(net.state_dict(), tmp_path / "inception.pth")
    distance = lambda x_hat, x: (x_hat - x).abs().mean((1, 2, 3), keepdim=True)
    distance.to = lambda device: distance
    monkeypatch.setattr(ae, "lpips_vgg", lambda: distance)
    monkeypatch.setattr(train_ae, "EPS", (0.0, 0.3))
    (tmp_path / "few").mkdir()
    for path in sorted((folder / "cats").iterdir())[:6]:
        (tmp_path / "few" / path.name).symlink_to(path)
    run(
        train_ae,
        "--eval",
        "--ckpt",
        tiny_vmae,
        "--data",
        tmp_path / "few",
        "--workers",
        0,
        "--inception",
        tmp_path / "inception.pth",
        "--out",
        tmp_path / "eval",
    )
    saved = json.loads((tmp_path / "eval" / "eval.json").read_text())
    row = saved["rows"][0]
    assert saved["not computed"] == [] and abs(row["LPIPS"] - 2 * row["L1"]) < 1e-6
    inception, model, images = (
        fid.load_inception(tmp_path / "inception.pth", True),
        ae.load(tiny_vmae),
        train_ae.Images(tmp_path / "few"),
    )
    crops = np.stack([np.asarray(train_ae.center_crop(images[i], 32)) for i in range(6)])
    with torch.no_grad():
        fakes = ae.to_uint8(
            model.decode(model.encode(torch.from_numpy(crops).permute(0, 3, 1, 2) / 127.5 - 1).mode())
        )
    pools = [inception(torch.from_numpy(a).permute(0, 3, 1, 2))[0].double() for a in (crops, fakes)]
    expected = fid.frechet_distance(*(x for p in pools for x in (p.mean(0), p.T.cov())))
    assert abs(row["rFID"] - expected) < 1e-4 * expected


# ---- the recipe ----


def test_position_tables_are_interpolated_bilinearly():
    state = ae.VMAE(image_size=32, hidden_size=48, depth=1, decoder_depth=1).state_dict()
    table = state["pos_embed"].clone()
    resized = ae.resize_positions(state, 8)["pos_embed"].view(8, 8, 48)
    square = table.view(4, 4, 48)
    # with align_corners False the middle of four old positions is a quarter step away from the nearest
    expected = 0.75 * (0.75 * square[1, 2] + 0.25 * square[1, 1]) + 0.25 * (
        0.75 * square[2, 2] + 0.25 * square[2, 1]
    )
    torch.testing.assert_close(resized[3, 4], expected)


def test_the_three_stages_keep_tables_encoder_and_mask_token(tmp_path, folder):
    common = ("--data", folder, "--workers", 0, "--batch", 8, *TINY_VIT, "--lpips", 0, "--warmup", 0)
    run(train_ae, *common, "--image_size", 32, "--steps", 3, "--out", tmp_path / "pretrain")
    second = (*common, "--image_size", 64, "--steps", 3, "--init")
    run(train_ae, *second, tmp_path / "pretrain" / "ckpt.pt", "--out", tmp_path / "larger")
    tune = (
        *second,
        tmp_path / "larger" / "ckpt.pt",
        "--lr",
        1e-3,
        "--tune_decoder",
        "--out",
        tmp_path / "tuned",
    )
    run(train_ae, *tune)
    small, larger, tuned = (
        torch.load(tmp_path / name / "ckpt.pt", weights_only=True) for name in ("pretrain", "larger", "tuned")
    )
    tables = ae.resize_positions(dict(small["model"]), 8)
    fresh = ae.VMAE(image_size=64, hidden_size=32, depth=1, decoder_depth=1, num_heads=2)
    assert torch.equal(larger["model"]["pos_embed"], tables["pos_embed"])
    assert not torch.allclose(larger["model"]["pos_embed"], fresh.pos_embed)  # kept, not computed anew
    for key, value in tuned["model"].items():
        trained = key.startswith(("from_latent", "decoder")) and key != "decoder_pos_embed"
        assert torch.equal(value, larger["model"][key]) != trained, key
    assert log_of(tmp_path / "tuned")[-1].keys() & {"recon", "visible", "masked", "kl"} == {"recon"}
    assert len(tuned["optimizer"]["state"]) < len(larger["optimizer"]["state"])
    assert ae.load(tmp_path / "tuned" / "ckpt.pt").tune_decoder


def test_tuning_the_decoder_minimises_mse_plus_ten_lpips_of_the_posterior_mean():
    torch.manual_seed(0)
    model = ae.VMAE(
        image_size=32, hidden_size=48, depth=1, decoder_depth=1, tune_decoder=True, weights={"lpips": 10.0}
    )
    x = normal(0, 2, 3, 32, 32)
    loss, terms, x_hat = model(x, perceptual=lambda a, b: (a - b).abs().mean())
    torch.testing.assert_close(x_hat, model.decode(model.encode(x).mean))
    torch.testing.assert_close(loss, (x_hat - x).square().mean() + 10 * (x_hat - x).abs().mean())
    loss.backward()
    assert model.to_latent.weight.grad is None and not model.mask_token.grad.any()
    assert model.from_latent.weight.grad is not None


@pytest.mark.parametrize(
    "flags, terms",
    [
        (("--mask_ratio", 0, "--kl", 0, "--lpips", 0), {"visible", "kl"}),
        (("--kl", 0, "--lpips", 0), {"visible", "masked", "kl"}),
        (("--lpips", 0), {"visible", "masked", "kl"}),
    ],
)
def test_the_ablation_s_rows_differ_in_flags(tmp_path, folder, flags, terms):
    run(
        train_ae,
        "--data",
        folder,
        "--image_size",
        32,
        "--workers",
        0,
        "--batch",
        8,
        *TINY_VIT,
        "--steps",
        2,
        "--out",
        tmp_path / "a",
        *flags,
    )
    line = log_of(tmp_path / "a")[-1]
    assert line.keys() & {"visible", "masked", "kl", "lpips"} == terms
    assert np.isfinite(line["visible"])
    weights = {"visible": 0.5, "masked": 0.5, "kl": 0 if "--kl" in flags else 1e-6}
    assert abs(line["loss"] - sum(weights[name] * line[name] for name in terms)) < 1e-6


def test_mistakes_with_init_and_eval_get_one_sentence(tmp_path, tiny_vmae):
    assert "--ckpt" in fails(train_ae, "--eval", "--out", tmp_path / "a")
    assert "no checkpoint file" in fails(
        train_ae, "--eval", "--ckpt", tmp_path / "none.pt", "--out", tmp_path / "b"
    )
    message = fails(train_ae, "--init", tiny_vmae, "--out", tmp_path / "c")
    assert "other sizes" in message and "'hidden_size': 32" in message
    assert "other sizes" in fails(
        train_ae, "--init", tiny_vmae, "--model", "ae", *TINY_CONV, "--out", tmp_path / "d"
    )
    assert "--init" in fails(train_ae, "--tune_decoder", "--out", tmp_path / "e")


def test_masks_without_a_label_are_one_sentence(tmp_path, tiny_vmae, folder):
    for file in train_ae.Images(folder / "bees").files:
        Image.new("L", (40, 40)).save(tmp_path / f"{Path(file).stem}.png")
    flags = ("--data", folder / "bees", "--workers", 0, "--masks", tmp_path, "--out", tmp_path / "out")
    assert "no label image" in fails(train_ae, "--eval", "--ckpt", tiny_vmae, *flags)
