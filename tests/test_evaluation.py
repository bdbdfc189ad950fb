"""train_ae.py --eval, and the three stages of the paper's VMAE."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_CONV, TINY_VIT, fails, log_of, normal, read, run, size_of, torchrun
from PIL import Image

import ae
import fid
import train_ae
import train_dit


@pytest.fixture(autouse=True)
def no_weights(tmp_path, monkeypatch, offline):
    """No VGG16 in the cache, and no network to download it from."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


# ---- the measures ----


def two_pictures():
    """Three smooth pictures, and the same with noise."""
    x = F.interpolate(normal(0, 3, 3, 12, 12), (48, 40), mode="bicubic").clamp(-1, 1)
    return x, (x + 0.2 * normal(1, 3, 3, 48, 40)).clamp(-1, 1)


def test_ssim_is_scikit_image_s_with_a_gaussian_window():
    why = "the peer scikit-image is not installed"
    metrics = pytest.importorskip("skimage.metrics", reason=why)
    x, y = two_pictures()
    window = {"sigma": 1.5, "gaussian_weights": True, "use_sample_covariance": False}
    for ours, a, b in zip(fid.ssim(x, y), x.numpy(), y.numpy()):
        theirs = metrics.structural_similarity(a, b, channel_axis=0, data_range=2.0, **window)
        assert abs(ours.item() - theirs) < 1e-4


def test_ssim_is_the_value_that_scikit_image_gave():
    # From the call above, with scikit-image 0.26.0
    theirs = [0.862512, 0.874022, 0.87211]
    assert np.allclose(fid.ssim(*two_pictures()), theirs, atol=1e-4)


def test_ssim_by_hand_of_constant_images():
    a, b = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), -0.25)
    c1 = 0.02**2
    # Without variance the second factor is 1
    expected = (2 * 0.5 * -0.25 + c1) / (0.5**2 + 0.25**2 + c1)
    assert abs(fid.ssim(a, b).item() - expected) < 1e-9
    assert fid.ssim(b, b).item() == 1


def test_compression_of_constructed_latents_by_hand():
    # One channel of std 2, in one image with the labels a and b and another with a alone.
    # The sums of squared differences from the mean of each segment:
    # a: 0, 4 around 2 give 8, and 2, 2, 2, 6 around 3 give 12; b: 10, 14 around 12 give 8.
    segments = [("a", [0.0, 4.0]), ("b", [10.0, 14.0]), ("a", [2.0, 2.0, 2.0, 6.0])]
    labels, std = [label for label, _ in segments], torch.tensor([2.0]).double()
    sums = torch.stack([fid.power_sums(torch.tensor([values])) for _, values in segments])
    result = fid.compression(labels, sums, std)
    # Over 8 values, divided by the squared std
    assert abs(result["sigma2"] - (8 + 8 + 12) / 8 / 4) < 1e-12
    # Centroids: a 16 / 6, b 12; within a: 64 - 16^2 / 6, within b: 8
    within = (64 - 16**2 / 6 + 8) / 8
    assert abs(result["rho"] - (12 - 16 / 6) / within**0.5) < 1e-12


def test_compression_divides_each_channel_by_its_own_std():
    z = normal(0, 4, 60).double()
    scale = torch.tensor([1.0, 10.0, 0.1, 3.0]).double()
    parts = [("x", slice(0, 20)), ("y", slice(20, 60))]

    def result(latents, std):
        sums = torch.stack([fid.power_sums(latents[:, part]) for _, part in parts])
        return fid.compression([label for label, _ in parts], sums, std)

    a, b = result(z, scale**0), result(z * scale[:, None], scale)
    assert abs(a["sigma2"] - b["sigma2"]) < 1e-9 and abs(a["rho"] - b["rho"]) < 1e-9


def test_ade20k_label_images_are_cropped_as_the_photograph(tmp_path):
    # Twice as wide as high: columns 20 to 59 remain
    labels = np.zeros((40, 80), np.uint8)
    labels[:, :20], labels[:, 20:40], labels[10:, 40:60] = 9, 3, 7
    Image.fromarray(labels).save(tmp_path / "ADE_val_00000001.png")
    masks = train_ae.find_masks(str(tmp_path))
    assert list(masks) == ["ADE_val_00000001"]
    found = dict(train_ae.segments(masks["ADE_val_00000001"], 4))
    # 9 is cropped away, and 0 is not a label
    assert found.keys() == {3, 7}
    assert found[3].tolist() == [[True, True, False, False]] * 4
    assert found[7].tolist() == [[False] * 4] + [[False, False, True, True]] * 3


def test_a_coloured_label_image_is_one_sentence(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    with pytest.raises(ae.UserError, match=r"a\.png is in colour"):
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
    # An image with a single part has a segment, too
    assert [label for label, _ in train_ae.segments(masks["12"][:1], 4)] == ["hair"]


# ---- the command ----


def table(text):
    """The rows of the Markdown table in a text, each as a dict."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def rows_of(out):
    """The rows that --eval wrote into this folder."""
    return json.loads((out / "eval.json").read_text())["rows"]


def link_first_images(root, few, count):
    """Make the folder `few`, with links to the first images of `root`."""
    few.mkdir()
    for path in sorted(root.iterdir())[:count]:
        (few / path.name).symlink_to(path)


def test_eval_prints_a_row_a_checkpoint_whoever_made_it(tmp_path, folder, capsys):
    out, names = tmp_path / "eval", ("ours", "release", "diffusers")
    sizes = {"image_size": 32, "hidden_size": 48, "depth": 1, "decoder_depth": 1, "num_heads": 12}
    vmae = ae.VMAE(**sizes)
    state = vmae.state_dict()
    ours = {"kind": "autoencoder", "name": "vmae", "config": sizes, "model": state}
    weights = {key: value for key, value in state.items() if key != "mask_token"}
    release = {"model": weights, "args": argparse.Namespace()}
    diffusers = ae.SDVAE(channels=(32, 32)).state_dict()
    files = ("ours/ckpt.pt", "release/release.pth", "diffusers/diffusers.pt")
    paths = [tmp_path / file for file in files]
    for path, content in zip(paths, (ours, release, diffusers)):
        path.parent.mkdir()
        torch.save(content, path)
    flags = ("--data", folder / "ants", "--out", out, "--image_size 32 --workers 0 --adm_crop 1")
    run(train_ae, "--eval --ckpt", *paths, *flags)
    text = capsys.readouterr().out
    rows = table(text)
    assert [row["autoencoder"] for row in rows] == list(names)
    # These two hold the same weights
    assert rows[0]["PSNR"] == rows[1]["PSNR"]
    assert rows[0]["LPIPS"] == rows[0]["rFID"] == "-"
    assert "LPIPS is not computed" in text and "vgg16-397923af.pth" in text
    assert "rFID is not computed" in text and "pt_inception-2015-12-05-6726825d.pth" in text

    saved = rows_of(out)[0]
    assert saved["crop"] == rows[0]["crop"] == "ADM"
    images = train_ae.Images(folder / "ants")
    crops = np.stack([np.asarray(train_ae.center_crop(images[i], 32)) for i in range(len(images))])
    x = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        x_hat = vmae.decode(vmae.encode(x).mode())
    mse = ((ae.to_uint8(x_hat).astype(float) - crops) ** 2).mean((1, 2, 3))
    assert abs(saved["PSNR"] - (10 * np.log10(255**2 / mse)).mean()) < 1e-6
    assert abs(saved["L1"] - ((x_hat + 1) / 2 - (x + 1) / 2).abs().mean().item()) < 1e-6
    for name in names:
        width, height = size_of(out / f"{name}.png")
        assert height // 66 == 10 and width // 66 == 1 + len(train_ae.EPS)


def test_the_paper_s_crop_is_bilinear_with_antialiasing_on_floats_and_central():
    for width, height, box in ((100, 64, (9, 0, 41, 32)), (64, 100, (0, 9, 32, 41))):
        values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        ours = train_ae.crop_for_judging(32, Image.fromarray(values), 0, 0, False)
        # 100 becomes 50 pixels long. Pillow resizes floats, too, a channel at a time.
        size = (50, 32) if width > height else (32, 50)
        for channel, plane in zip(ours, np.moveaxis(values, -1, 0).astype(np.float32)):
            resized = Image.fromarray(plane).resize(size, Image.BILINEAR).crop(box)
            assert np.abs(np.asarray(resized) / 127.5 - 1 - channel.numpy()).max() < 1e-5


def test_eval_judges_on_the_paper_s_crop_unless_told_otherwise(tmp_path, tiny_vmae, folder):
    few = tmp_path / "few"
    link_first_images(folder / "cats", few, 4)
    start = ("--eval --ckpt", tiny_vmae, "--data", few, "--workers 0")
    run(train_ae, *start, "--out", tmp_path / "paper")
    run(train_ae, *start, "--out", tmp_path / "adm", "--adm_crop 1")
    paper, adm = rows_of(tmp_path / "paper")[0], rows_of(tmp_path / "adm")[0]
    assert (paper["crop"], adm["crop"]) == ("paper", "ADM")

    net, images = ae.load(tiny_vmae), train_ae.Images(few)
    x = torch.stack([train_ae.crop_for_judging(32, images[i], i, 0, False) for i in range(4)])
    with torch.no_grad():
        x_hat = net.decode(net.encode(x).mode())
    assert abs(paper["L1"] - (x_hat - x).abs().mean().item() / 2) < 1e-6
    assert abs(paper["SSIM"] - fid.ssim(x_hat.clamp(-1, 1), x).mean().item()) < 1e-6
    assert abs(paper["SSIM"] - adm["SSIM"]) > 1e-4


def test_each_autoencoder_is_judged_at_its_own_size_and_under_its_own_name(
    tmp_path, folder, capsys, monkeypatch
):
    monkeypatch.setattr(train_ae, "EPS", (0.0, 0.3))
    few, out = tmp_path / "few", tmp_path / "eval"
    for name, size in (("ckpt", 48), ("other", 40)):
        channels = [32, 32, 32, 32]
        net = ae.AE(channels)
        ckpt = {"kind": "autoencoder", "name": "ae", "config": {"channels": channels}}
        ckpt |= {"args": {"image_size": size}, "model": net.state_dict()}
        torch.save(ckpt, tmp_path / f"{name}.pt")
    link_first_images(folder / "cats", few, 3)
    (few / "ckpt.pt").symlink_to(tmp_path / "ckpt.pt")
    # A file like diffusers' does not say for which size it was trained
    torch.save(net.state_dict(), tmp_path / "few.pt")
    files = [tmp_path / name for name in ("ckpt.pt", "other.pt", "few/ckpt.pt", "few.pt")]
    flags = ("--data", few, "--out", out, "--workers 0")
    run(train_ae, "--eval --ckpt", *files, *flags)
    text = (out / "eval.json").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    rows = record["rows"]
    assert [row["autoencoder"] for row in rows] == [tmp_path.name, "other", "few", "few-3"]
    assert [row["pixels"] for row in rows] == [48, 40, 48, 256]
    assert record["ckpt"] == list(map(str, files)) and rows[0]["rFID"] is None
    row, parameters = rows[3], sum(p.numel() for p in net.parameters())
    assert row["parameters"] == parameters and row["MiB"] == parameters * 4 / 2**20
    assert row["images/s"] > 0
    gflops = train_ae.gflops(net, torch.zeros(1, 3, 256, 256), method="encode")
    assert row["GFLOPs encode"] == gflops

    # A file that is not an autoencoder is found before the first one is judged
    wrong = tmp_path / "dit.pt"
    torch.save({"ema": {"x_embedder.proj.weight": torch.zeros(1)}}, wrong)
    capsys.readouterr()
    assert "dit.pt" in fails(train_ae, "--eval --ckpt", *files, wrong, *flags)
    assert "|" not in capsys.readouterr().out


def test_smoothness_falls_with_eps_and_two_processes_say_the_same(tmp_path, tiny_vmae):
    run(train_ae, "--eval --ckpt", tiny_vmae, "--out", tmp_path / "one")
    torchrun(2, "train_ae.py", "--eval --ckpt", tiny_vmae, "--out", tmp_path / "two")
    one, two = rows_of(tmp_path / "one")[0], rows_of(tmp_path / "two")[0]
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
        sides = images[i].height, images[i].width
        labels = np.random.RandomState(i).randint(0, 4, sides).astype(np.uint8)
        Image.fromarray(labels).save(masks / f"{Path(file).stem}.png")
    start = ("--eval --ckpt", tiny_vmae, "--masks", masks)
    flags = ("--data", folder / "bees", "--workers 0 --micro_batch 8")
    run(train_ae, *start, "--out", tmp_path / "one", *flags)
    torchrun(2, "train_ae.py", *start, "--out", tmp_path / "two", *flags)
    one, two = rows_of(tmp_path / "one")[0], rows_of(tmp_path / "two")[0]
    assert abs(one["sigma2"] - two["sigma2"]) < 1e-9 and abs(one["rho"] - two["rho"]) < 1e-9
    # Random labels hardly compress: nearly all of the variance is within them
    assert 0.4 < one["sigma2"] < 1.1
    assert "holds no" in fails(train_ae, *start, "--out", tmp_path / "x")


def test_rfid_and_lpips_are_computed_where_their_weights_are(
    tmp_path, tiny_vmae, folder, monkeypatch
):
    few, out, weights = tmp_path / "few", tmp_path / "eval", tmp_path / "inception.pth"
    torch.manual_seed(0)
    torch.save(fid.InceptionV3().state_dict(), weights)

    def distance(x_hat, x):
        return (x_hat - x).abs().mean((1, 2, 3), keepdim=True)

    distance.to = lambda device: distance
    monkeypatch.setattr(ae, "lpips_vgg", lambda: distance)
    monkeypatch.setattr(train_ae, "EPS", (0.0, 0.3))
    link_first_images(folder / "cats", few, 6)
    flags = ("--data", few, "--inception", weights, "--workers 0 --adm_crop 1")
    run(train_ae, "--eval --ckpt", tiny_vmae, "--out", out, *flags)
    saved = json.loads((out / "eval.json").read_text())
    row = saved["rows"][0]
    assert saved["not computed"] == [] and abs(row["LPIPS"] - 2 * row["L1"]) < 1e-6
    inception, model = fid.load_inception(weights, True), ae.load(tiny_vmae)
    images = train_ae.Images(few)
    crops = np.stack([np.asarray(train_ae.center_crop(images[i], 32)) for i in range(6)])
    x = torch.from_numpy(crops).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        fakes = ae.to_uint8(model.decode(model.encode(x).mode()))
    pools = [inception(torch.from_numpy(a).permute(0, 3, 1, 2))[0].double() for a in (crops, fakes)]
    expected = fid.frechet_distance(*(x for p in pools for x in (p.mean(0), p.T.cov())))
    assert abs(row["rFID"] - expected) < 1e-4 * expected


# ---- the recipe ----


def test_position_tables_are_interpolated_bilinearly():
    state = ae.VMAE(image_size=32, hidden_size=48, depth=1, decoder_depth=1).state_dict()
    table = state["pos_embed"].clone()
    resized = ae.resize_positions(state, 8)["pos_embed"].view(8, 8, 48)
    square = table.view(4, 4, 48)
    # With align_corners=False each new position is a quarter step away from the nearest old one
    upper = 0.75 * square[1, 2] + 0.25 * square[1, 1]
    lower = 0.75 * square[2, 2] + 0.25 * square[2, 1]
    torch.testing.assert_close(resized[3, 4], 0.75 * upper + 0.25 * lower)


def test_the_three_stages_are_two_commands_and_keep_tables_encoder_and_mask_token(tmp_path, folder):
    pretrain, tuned, free = (tmp_path / name for name in ("pretrain", "tuned", "free"))
    flags = ("--data", folder, "--workers 0 --batch 8 --lpips 0 --warmup 0 --steps 3")
    run(train_ae, "--out", pretrain, *flags, TINY_VIT, "--image_size 32")
    flags = ("--init", pretrain / "ckpt.pt", *flags, "--image_size 64 --tune_decoder --lr 1e-3")
    run(train_ae, "--out", tuned, *flags)
    run(train_ae, "--out", free, *flags, "--freeze_encoder 0")
    last, loaded = log_of(tuned)[-1], ae.load(tuned / "ckpt.pt")
    first, tuned, free = (read(out / "ckpt.pt") for out in (pretrain, tuned, free))
    larger = ae.resize_positions(dict(first["model"]), 8)
    fresh = ae.VMAE(image_size=64, hidden_size=32, depth=1, decoder_depth=1, num_heads=2)
    # The table was interpolated, and not computed anew
    assert not torch.allclose(larger["pos_embed"], fresh.pos_embed)
    for key, value in tuned["model"].items():
        trained = key.startswith(("from_latent", "decoder")) and key != "decoder_pos_embed"
        assert torch.equal(value, larger[key]) != trained, key
    # As in the release, the encoder can be trained too; the mask token and the tables never are
    fixed = [key for key in free["model"] if torch.equal(free["model"][key], larger[key])]
    assert sorted(fixed) == ["decoder_pos_embed", "mask_token", "pos_embed"]
    assert last.keys() & {"recon", "visible", "masked", "kl"} == {"recon"}
    assert len(tuned["optimizer"]["state"]) < len(first["optimizer"]["state"])
    # The network is that of the first stage, without a flag that says so
    assert loaded.tune_decoder and loaded.image_size == 64
    assert tuned["config"]["hidden_size"] == 32 and tuned["config"]["mask_ratio"] == 0.6


def test_each_stage_of_the_demo_finds_the_one_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out" / "demo"
    assert "no first one in out/demo/vmae/ckpt.pt" in fails(train_ae, "--tune_decoder")
    run(train_ae, TINY_VIT, "--steps 1")
    run(train_dit, "--steps 1 --batch 8 --sample_steps 1 --out first")
    run(train_ae, "--tune_decoder --steps 2")
    run(train_dit, "--steps 1 --batch 8 --sample_steps 1 --out second")
    for dit_folder, stage in (("first", "vmae"), ("second", "vmae-tuned")):
        theirs, ours = read(f"{dit_folder}/ckpt.pt")["ae"], read(out / stage / "ckpt.pt")
        assert all(torch.equal(theirs["model"][key], ours["model"][key]) for key in ours["model"])
    first, tuned = (read(out / stage / "ckpt.pt")["model"] for stage in ("vmae", "vmae-tuned"))
    assert not torch.equal(first["from_latent.weight"], tuned["from_latent.weight"])


def test_a_numbered_file_of_the_first_stage_starts_the_last_one(tmp_path):
    out, tuned = tmp_path / "first", tmp_path / "tuned"
    run(train_ae, "--out", out, TINY_VIT, "--steps 5 --keep_every 2")
    assert sorted(path.name for path in out.glob("ckpt-*")) == [
        "ckpt-0000002.pt",
        "ckpt-0000004.pt",
    ]
    kept, last = read(out / "ckpt-0000002.pt"), read(out / "ckpt.pt")
    # No optimiser, and the weights of that step
    assert kept["step"] == 2 and "optimizer" not in kept and "optimizer" in last
    assert not torch.equal(kept["model"]["to_latent.weight"], last["model"]["to_latent.weight"])
    # It is no file to resume, and its row in a table has the name of its run.
    shutil.copy(out / "ckpt-0000002.pt", tmp_path / "ckpt.pt")
    assert "no optimiser to resume" in fails(train_ae, "--out", tmp_path, "--resume")
    assert train_ae.name_of(out / "ckpt-0000002.pt", []) == "first-0000002"
    run(train_ae, "--out", tuned, "--tune_decoder --init", out / "ckpt-0000002.pt", "--steps 1")
    assert torch.equal(
        read(tuned / "ckpt.pt")["model"]["to_latent.weight"], kept["model"]["to_latent.weight"]
    )


def test_a_tuned_decoder_keeps_the_deterministic_latent_of_its_first_stage(tmp_path):
    first, tuned = tmp_path / "first", tmp_path / "tuned"
    run(train_ae, "--out", first, TINY_VIT, "--steps 1 --kl 0")
    flags = "--tune_decoder --ckpt_every 1 --schedule constant --steps 1"
    run(train_ae, "--out", tuned, "--init", first / "ckpt.pt", flags)
    assert ae.load(tuned / "ckpt.pt").deterministic
    run(train_ae, "--out", tuned, "--resume --tune_decoder --steps 2")
    assert ae.load(tuned / "ckpt.pt").deterministic


def test_init_refuses_another_number_of_heads(tmp_path, tiny_vmae):
    flags = TINY_VIT.replace("--num_heads 2", "--num_heads 4")
    assert "other sizes" in fails(train_ae, "--out", tmp_path, "--init", tiny_vmae, flags)


def test_tuning_the_decoder_minimises_mse_plus_ten_lpips_of_the_posterior_mean():
    torch.manual_seed(0)
    sizes = {"image_size": 32, "hidden_size": 48, "depth": 1, "decoder_depth": 1}
    model = ae.VMAE(**sizes, tune_decoder=True, weights={"lpips": 10.0})
    x = normal(0, 2, 3, 32, 32)
    loss, _, x_hat = model(x, perceptual=lambda a, b: (a - b).abs().mean())
    torch.testing.assert_close(x_hat, model.decode(model.encode(x).mean))
    torch.testing.assert_close(loss, (x_hat - x).square().mean() + 10 * (x_hat - x).abs().mean())
    loss.backward()
    assert not model.mask_token.grad.any()
    assert model.from_latent.weight.grad is not None


@pytest.mark.parametrize(
    "flags, terms",
    [
        ("--mask_ratio 0 --kl 0 --lpips 0", {"visible", "kl"}),
        ("--kl 0 --lpips 0", {"visible", "masked", "kl"}),
        ("--lpips 0", {"visible", "masked", "kl"}),
    ],
)
def test_the_ablation_s_rows_differ_in_flags(tmp_path, folder, flags, terms):
    small = f"{TINY_VIT} --image_size 32 --workers 0 --batch 8 --steps 2"
    run(train_ae, "--data", folder, "--out", tmp_path / "a", small, flags)
    line = log_of(tmp_path / "a")[-1]
    assert line.keys() & {"visible", "masked", "kl", "lpips"} == terms
    assert np.isfinite(line["visible"])
    weights = {"visible": 0.5, "masked": 0.5, "kl": 0 if "--kl" in flags else 1e-6}
    assert abs(line["loss"] - sum(weights[name] * line[name] for name in terms)) < 1e-6


def test_mistakes_with_init_and_eval_get_one_sentence(tmp_path, tiny_vmae):
    out, nothing = tmp_path / "out", tmp_path / "none.pt"
    assert "--ckpt" in fails(train_ae, "--out", out, "--eval")
    assert "no checkpoint file" in fails(train_ae, "--out", out, "--eval --ckpt", nothing)
    message = fails(train_ae, "--out", out, "--init", tiny_vmae)
    assert "other sizes" in message and "'hidden_size': 32" in message
    message = fails(train_ae, "--out", out, "--init", tiny_vmae, "--model ae", TINY_CONV)
    assert "other sizes" in message
    run(train_ae, "--out", tmp_path / "ae", "--model ae", TINY_CONV, "--steps 1")
    start = ("--tune_decoder --init", tmp_path / "ae" / "ckpt.pt")
    assert "another model" in fails(train_ae, "--out", out, *start)
    assert "not a flag" in fails(train_ae, "--out", out, "--tune_decoder --depth 1")


def test_masks_without_a_label_are_one_sentence(tmp_path, tiny_vmae, folder):
    for file in train_ae.Images(folder / "bees").files:
        Image.new("L", (40, 40)).save(tmp_path / f"{Path(file).stem}.png")
    flags = ("--data", folder / "bees", "--masks", tmp_path, "--workers 0")
    message = fails(train_ae, "--eval --ckpt", tiny_vmae, "--out", tmp_path / "out", *flags)
    assert "no label image" in message
