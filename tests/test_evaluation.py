"""train_ae.py --eval, and the three stages of the paper's VMAE."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_CONV, TINY_VIT, fails, log_of, normal, read, run, size_of, together
from PIL import Image

import ae
import fid
import sample
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
    for ours, a, b in zip(train_ae.ssim(x, y), x.numpy(), y.numpy()):
        theirs = metrics.structural_similarity(a, b, channel_axis=0, data_range=2.0, **window)
        assert abs(ours.item() - theirs) < 1e-4


def test_ssim_is_the_value_that_scikit_image_gave():
    # From the call above, with scikit-image 0.26.0
    theirs = [0.862512, 0.874022, 0.87211]
    assert np.allclose(train_ae.ssim(*two_pictures()), theirs, atol=1e-4)


def test_ssim_by_hand_of_constant_images():
    a, b = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), -0.25)
    c1 = 0.02**2
    # Without variance the second factor is 1
    expected = (2 * 0.5 * -0.25 + c1) / (0.5**2 + 0.25**2 + c1)
    assert abs(train_ae.ssim(a, b).item() - expected) < 1e-9
    assert train_ae.ssim(b, b).item() == 1


def test_compression_of_constructed_latents_by_hand():
    # One channel of std 2, in one image with the labels a and b and another with a alone.
    # The sums of squared differences from the mean of each segment:
    # a: 0, 4 around 2 give 8, and 2, 2, 2, 6 around 3 give 12; b: 10, 14 around 12 give 8.
    segments = [("a", [0.0, 4.0]), ("b", [10.0, 14.0]), ("a", [2.0, 2.0, 2.0, 6.0])]
    labels, std = [label for label, _ in segments], torch.tensor([2.0]).double()
    sums = torch.stack([train_ae.power_sums(torch.tensor([values])) for _, values in segments])
    result = train_ae.compression(labels, sums, std)
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
        sums = torch.stack([train_ae.power_sums(latents[:, part]) for _, part in parts])
        return train_ae.compression([label for label, _ in parts], sums, std)

    a, b = result(z, scale**0), result(z * scale[:, None], scale)
    assert abs(a["sigma2"] - b["sigma2"]) < 1e-9 and abs(a["rho"] - b["rho"]) < 1e-9


def images_named(root, *names):
    """The images of a folder of files with these names, whose content nobody reads."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return train_ae.Images(root)


def test_ade20k_label_images_are_cropped_as_the_photograph(tmp_path):
    images = images_named(tmp_path / "data", "ADE_val_00000001.jpg", "ADE_val_00000002.jpg")
    (tmp_path / "masks").mkdir()
    # Twice as wide as high: columns 20 to 59 remain
    labels = np.zeros((40, 80), np.uint8)
    labels[:, :20], labels[:, 20:40], labels[10:, 40:60] = 9, 3, 7
    Image.fromarray(labels).save(tmp_path / "masks" / "ADE_val_00000001.png")
    first, second = train_ae.find_masks(str(tmp_path / "masks"), images)
    assert [Path(file).name for _, file in first] == ["ADE_val_00000001.png"] and second == []
    found = dict(train_ae.segments(first, 4))
    # 9 is cropped away, and 0 is not a label
    assert found.keys() == {3, 7}
    assert found[3].tolist() == [[True, True, False, False]] * 4
    assert found[7].tolist() == [[False] * 4] + [[False, False, True, True]] * 3
    assert list(train_ae.segments(second, 4)) == []


def test_a_label_image_of_the_same_folder_goes_before_one_of_another(tmp_path):
    images = images_named(tmp_path / "data", "a/1x.jpg", "b/1x.jpg", "c/2x.jpg")
    for name in ("a/1x.png", "b/1x.png", "elsewhere/2x.png"):
        (tmp_path / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / "masks" / name)
    found = train_ae.find_masks(str(tmp_path / "masks"), images)
    names = ["a/1x.png", "b/1x.png", "elsewhere/2x.png"]
    assert found == [[(None, str(tmp_path / "masks" / name))] for name in names]


def test_a_coloured_label_image_is_one_sentence(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    with pytest.raises(ae.UserError, match=r"a\.png is in colour"):
        list(train_ae.segments([(None, tmp_path / "a.png")], 4))


def test_label_images_are_turned_as_photographs_and_a_palette_s_values_are_labels(tmp_path):
    labels = np.zeros((8, 8), np.uint8)
    labels[:, :4] = 5
    image = Image.fromarray(labels, "L")
    image.putpalette([value for value in range(256) for _ in range(3)])
    turned = Image.Exif()
    turned[0x0112] = 6  # a viewer turns it by a quarter, clockwise
    image.save(tmp_path / "a.png", exif=turned)
    found = dict(train_ae.segments([(None, tmp_path / "a.png")], 4))
    assert found.keys() == {5}
    assert found[5].tolist() == [[True] * 4] * 2 + [[False] * 4] * 2


def test_celebamask_parts_belong_to_the_image_of_their_number(tmp_path):
    images = images_named(tmp_path / "data", "7.jpg", "12.jpg")
    (tmp_path / "masks" / "0").mkdir(parents=True)
    boxes = {"skin": (0, 4, 16, 16), "hair": (0, 0, 16, 4), "l_eye": (4, 8, 8, 12)}
    for part, box in boxes.items():
        image = Image.new("RGB", (16, 16))
        image.paste((255, 255, 255), box)
        image.save(tmp_path / "masks" / "0" / f"00012_{part}.png")
    twelve, seven = train_ae.find_masks(str(tmp_path / "masks"), images)
    assert seven == []
    found = dict(train_ae.segments(twelve, 4))
    assert found["hair"].tolist() == [[True] * 4] + [[False] * 4] * 3
    assert np.argwhere(found["l_eye"]).tolist() == [[2, 1]]
    # Where parts overlap, the eye lies over the skin
    assert found["skin"].sum() == 3 * 4 - 1 and not found["skin"][2, 1]
    # An image with a single part has a segment, too
    hair = [("hair", file) for part, file in twelve if part == "hair"]
    assert [label for label, _ in train_ae.segments(hair, 4)] == ["hair"]


def test_a_label_image_whose_name_ends_like_a_part_holds_labels(tmp_path):
    images = images_named(tmp_path / "data", "bear_skin.jpg")
    (tmp_path / "masks").mkdir()
    Image.new("L", (8, 8), 7).save(tmp_path / "masks" / "bear_skin.png")
    (files,) = train_ae.find_masks(str(tmp_path / "masks"), images)
    assert [label for label, _ in train_ae.segments(files, 4)] == [7]


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


def test_eval_prints_a_row_a_checkpoint_ours_or_the_authors(tmp_path, folder, capsys):
    out, names = tmp_path / "eval", ("ours", "release")
    sizes = {"image_size": 32, "hidden_size": 48, "depth": 1, "decoder_depth": 1, "num_heads": 12}
    vmae = ae.VMAE(**sizes)
    state = vmae.state_dict()
    ours = {"args": {"model": "vmae", **sizes}, "model": state}
    weights = {key: value for key, value in state.items() if key != "mask_token"}
    release = {"model": weights, "args": argparse.Namespace()}
    paths = [tmp_path / file for file in ("ours/ckpt.pt", "release/release.pth")]
    for path, content in zip(paths, (ours, release)):
        path.parent.mkdir()
        torch.save(content, path)
    flags = ("--data", folder / "ants", "--out", out, "--workers 0 --adm_crop 1")
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
    x = torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
    with torch.no_grad():  # 16 at once, as in the command: others are rounded differently
        x_hat = torch.cat([vmae.decode(vmae.encode(part).mode()) for part in x.split(16)])
    mse = ((sample.to_uint8(x_hat).astype(float) - crops) ** 2).mean((1, 2, 3))
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
    assert abs(paper["SSIM"] - train_ae.ssim(x_hat.clamp(-1, 1), x).mean().item()) < 1e-6
    assert abs(paper["SSIM"] - adm["SSIM"]) > 1e-4


@pytest.mark.slow
def test_each_autoencoder_is_judged_at_its_own_size_and_under_its_own_name(
    tmp_path, folder, capsys, monkeypatch
):
    monkeypatch.setattr(train_ae, "EPS", (0.0, 0.3))
    few, out = tmp_path / "few", tmp_path / "eval"
    for name, size in (("ckpt", 48), ("other", 40)):
        channels = [32, 32, 32, 32]
        net = ae.AE(channels)
        args = {"model": "ae", "channels": channels, "image_size": size}
        torch.save({"args": args, "model": net.state_dict()}, tmp_path / f"{name}.pt")
    link_first_images(folder / "cats", few, 3)
    (few / "ckpt.pt").symlink_to(tmp_path / "ckpt.pt")
    # A file of diffusers does not say for which size it was trained
    torch.save(ae.SDVAE(channels=channels).state_dict(), tmp_path / "few.pt")
    files = [tmp_path / name for name in ("ckpt.pt", "other.pt", "few/ckpt.pt", "few.pt")]
    flags = ("--data", few, "--workers 0")
    run(train_ae, "--eval --ckpt", *files, *flags, "--out", out)
    text = (out / "eval.json").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    rows = record["rows"]
    assert [row["autoencoder"] for row in rows] == [tmp_path.name, "other", "few", "few-2"]
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
    flags = (*flags, "--out", tmp_path / "wrong")
    assert "dit.pt" in fails(train_ae, "--eval --ckpt", *files, wrong, *flags)
    assert "|" not in capsys.readouterr().out


def test_rows_are_printed_and_written_as_they_are_done_and_never_replaced(
    tmp_path, tiny_vmae, folder, capsys, monkeypatch
):
    few, cost = tmp_path / "few", train_ae.cost
    link_first_images(folder / "cats", few, 2)

    def stop_at_second(*args):
        monkeypatch.setattr(train_ae, "cost", broken)
        return cost(*args)

    def broken(*args):
        raise OSError("the machine is on fire")

    monkeypatch.setattr(train_ae, "cost", stop_at_second)
    command = ("--eval --ckpt", tiny_vmae, tiny_vmae, "--data", few, "--out", tmp_path / "out")
    assert "on fire" in fails(train_ae, *command, "--workers 0")
    assert len(table(capsys.readouterr().out)) == 1
    (row,) = rows_of(tmp_path / "out")
    assert row["autoencoder"] == tiny_vmae.parent.name
    monkeypatch.undo()
    assert "eval.json exists" in fails(train_ae, *command, "--workers 0")
    assert rows_of(tmp_path / "out") == [row]


def test_eval_ends_at_the_first_image_that_cannot_be_read(tmp_path, tiny_vmae, folder):
    few = tmp_path / "few"
    link_first_images(folder / "cats", few, 3)
    (few / "cut.png").write_bytes(b"no picture")
    flags = ("--data", few, "--out", tmp_path / "out", "--workers 1")
    message = fails(train_ae, "--eval --ckpt", tiny_vmae, *flags)
    assert "cut.png cannot be read" in message
    assert not (tmp_path / "out" / "eval.json").exists()


def test_quality_smoothness_and_compression_are_the_same_on_two_processes(tmp_path, tiny_vmae):
    data, masks = tmp_path / "data", tmp_path / "masks"
    data.mkdir()
    masks.mkdir()
    digits = train_ae.Images(held_out=True)
    for i in range(0, len(digits), 12):
        digits[i].save(data / f"{i}.png")
        labels = np.random.RandomState(i).randint(0, 4, (32, 32)).astype(np.uint8)
        Image.fromarray(labels).save(masks / f"{i}.png")
    start = ("--eval --ckpt", tiny_vmae, "--masks", masks)
    flags = ("--data", data, "--workers 0 --micro_batch 8")
    run(train_ae, *start, "--out", tmp_path / "one", *flags)
    together(2, "train_ae.py", *start, "--out", tmp_path / "two", *flags)
    one, two = rows_of(tmp_path / "one")[0], rows_of(tmp_path / "two")[0]
    assert abs(one["sigma2"] - two["sigma2"]) < 1e-9 and abs(one["rho"] - two["rho"]) < 1e-9
    for key in ("L1", "PSNR", "SSIM"):
        assert abs(one[key] - two[key]) < 1e-6
    # Noise on the latents makes the decodings worse, more of it more so
    smoothness = next(key for key in one if key.startswith("PSNR at eps"))
    assert np.allclose(one[smoothness], two[smoothness], atol=1e-6)
    values = [one["PSNR"], *one[smoothness]]
    assert values[0] > values[3] > values[4] > values[5]
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
        fakes = sample.to_uint8(model.decode(model.encode(x).mode()))
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
    start = ("--tune_decoder --init", pretrain / "ckpt.pt", "--image_size 64 --base_lr 0.032")
    run(train_ae, "--out", tuned, *flags, *start)
    run(train_ae, "--out", free, *flags, *start, "--freeze_encoder 0")
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
    # No patch is masked
    assert "visible" in last and "masked" not in last and last["loss"] == last["visible"]
    assert len(tuned["optimizer"]["state"]) < len(first["optimizer"]["state"])
    # The network is that of the first stage, without a flag that says so
    assert loaded.image_size == 64 and loaded.args["hidden_size"] == 32


def test_each_stage_of_the_demo_finds_the_one_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = "--steps 1 --batch 8 --sample_steps 1"
    message = fails(train_ae, "--tune_decoder")
    assert "there is none in out/demo/vmae/ckpt.pt: train it (train_ae.py)" in message
    run(train_ae, TINY_VIT, "--steps 1")
    # The DiT is not trained on the first stage in silence
    message = fails(train_dit, few)
    for words in ("out/demo/vmae-tuned/ckpt.pt", "train_ae.py, then train_ae.py --tune_decoder"):
        assert words in message
    assert "--ae" in message
    run(train_ae, "--tune_decoder --steps 2")
    run(train_dit, few)
    out = tmp_path / "out" / "demo"
    first, tuned = (read(out / stage / "ckpt.pt")["model"] for stage in ("vmae", "vmae-tuned"))
    theirs = read(out / "dit" / "ckpt.pt")["autoencoder"]["model"]
    assert all(torch.equal(theirs[key], tuned[key]) for key in tuned)
    assert not torch.equal(first["from_latent.weight"], tuned["from_latent.weight"])


def test_a_numbered_file_of_the_first_stage_starts_the_last_one(tmp_path):
    out, tuned = tmp_path / "first", tmp_path / "tuned"
    run(train_ae, "--out", out, TINY_VIT, "--steps 5 --keep_every 2")
    numbered = sorted(path.name for path in out.glob("ckpt-*"))
    assert numbered == ["ckpt-0000002.pt", "ckpt-0000004.pt"]
    kept, last = read(out / "ckpt-0000002.pt"), read(out / "ckpt.pt")
    # A whole checkpoint, of that step
    assert kept["step"] == 2 and kept.keys() == last.keys()
    assert not torch.equal(kept["model"]["to_latent.weight"], last["model"]["to_latent.weight"])
    # Its row in a table has the name of its run
    assert train_ae.name_of(out / "ckpt-0000002.pt", []) == "first-0000002"
    run(train_ae, "--out", tuned, "--tune_decoder --init", out / "ckpt-0000002.pt", "--steps 1")
    assert torch.equal(
        read(tuned / "ckpt.pt")["model"]["to_latent.weight"], kept["model"]["to_latent.weight"]
    )


@pytest.mark.parametrize("kl", [0.0, 1e-3])
def test_a_tuned_decoder_keeps_the_latent_of_its_first_stage_random_or_not(tmp_path, kl):
    first, tuned = tmp_path / "first", tmp_path / "tuned"
    run(train_ae, "--out", first, TINY_VIT, f"--steps 1 --kl {kl}")
    command = ("--out", tuned, "--tune_decoder --schedule constant --init", first / "ckpt.pt")
    for more in ("--steps 1", "--steps 2 --resume"):
        run(train_ae, *command, more)
        net = ae.load(tuned / "ckpt.pt")
        posterior = net.encode(normal(0, 2, 3, 32, 32))
        assert net.args["kl"] == kl and net.deterministic == (kl == 0)
        assert torch.equal(posterior.sample(), posterior.mode()) == (kl == 0)


def test_init_brings_its_sizes_and_refuses_others_by_name(tmp_path, tiny_vmae):
    run(train_ae, "--out", tmp_path / "out", "--init", tiny_vmae, "--steps 1")
    args, theirs = read(tmp_path / "out" / "ckpt.pt")["args"], read(tiny_vmae)["args"]
    sizes = ("patch_size", "hidden_size", "depth", "decoder_depth", "num_heads", "latent_dim")
    assert [args[name] for name in sizes] == [theirs[name] for name in sizes]
    for start in ("", "--tune_decoder"):
        for flag, value in (("num_heads", 2), ("hidden_size", 32), ("latent_dim", 16)):
            other = f"{start} --{flag} {2 * value} --init"
            message = fails(train_ae, "--out", tmp_path / "other", other, tiny_vmae)
            assert f"--{flag} {2 * value}: {tiny_vmae} has {value}" in message


def test_tuning_the_decoder_minimises_mse_plus_ten_lpips_of_the_posterior_mean():
    torch.manual_seed(0)
    sizes = {"image_size": 32, "hidden_size": 48, "depth": 1, "decoder_depth": 1, "init": None}
    recipe = train_ae.RECIPES["tune"] | {"model": "vmae", "tune_decoder": True, "kl": 1e-6}
    model = train_ae.build(argparse.Namespace(**(recipe | sizes)))
    x = normal(0, 2, 3, 32, 32)
    loss, _, x_hat = model(x, perceptual=lambda a, b: (a - b).abs().mean())
    torch.testing.assert_close(x_hat, model.decode(model.encode(x).mean))
    torch.testing.assert_close(loss, (x_hat - x).square().mean() + 10 * (x_hat - x).abs().mean())
    loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert "from_latent.weight" in trained
    assert not {"mask_token", "to_latent.weight", "patch_embed.proj.weight"} & trained


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
    message = fails(train_ae, "--out", out, "--eval --steps 3 --ckpt", tiny_vmae)
    assert "unrecognized arguments: --steps 3" in message
    message = fails(train_ae, "--out", out, "--init", tiny_vmae, "--model ae", TINY_CONV)
    assert "another model" in message and "it holds a vmae" in message
    run(train_ae, "--out", tmp_path / "ae", "--model ae", TINY_CONV, "--steps 1")
    start = ("--tune_decoder --init", tmp_path / "ae" / "ckpt.pt")
    assert "another model" in fails(train_ae, "--out", out, *start)
    message = fails(train_ae, "--out", out, "--tune_decoder --model mae --init", tiny_vmae)
    assert "--model vmae" in message


def test_masks_without_a_label_are_one_sentence(tmp_path, tiny_vmae, folder):
    for file in (folder / "bees").iterdir():
        Image.new("L", (40, 40)).save(tmp_path / f"{file.stem}.png")
    flags = ("--data", folder / "bees", "--masks", tmp_path, "--workers 0")
    message = fails(train_ae, "--eval --ckpt", tiny_vmae, "--out", tmp_path / "out", *flags)
    assert "no label image" in message
