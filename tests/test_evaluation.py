"""train_ae.py --eval, and the three stages of the paper's VMAE."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT,
    TINY_CONV,
    TINY_VIT,
    fails,
    log_of,
    normal,
    read,
    run,
    size_of,
    together,
    usage_error,
)
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


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file of random weights in place of Inception's."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(fid.InceptionV3().state_dict(), path)
    return path


def distance(x_hat, x):
    """In place of LPIPS."""
    return (x_hat - x).abs().mean((1, 2, 3), keepdim=True)


distance.to = lambda device: distance


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


def test_a_label_image_belongs_to_the_image_at_the_same_path_alone(tmp_path, capsys):
    masks, images = tmp_path / "masks", tmp_path / "data"
    for folder, names in (
        (masks, ("ant/0000.png", "0001.png", "elsewhere/0001.png")),
        (images, ("ant/0000.jpg", "ant/0001.jpg", "bee/0000.jpg")),
    ):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    found = train_ae.find_masks(str(masks), train_ae.Images(images))
    assert found == [str(masks / "ant" / "0000.png"), None, None]
    assert "1 of 3 images have a label image" in capsys.readouterr().out


def test_label_images_are_cropped_as_the_photograph_and_0_is_no_label(tmp_path):
    # Twice as wide as high: columns 20 to 59 remain
    labels = np.zeros((40, 80), np.uint8)
    labels[:, :20], labels[:, 20:40], labels[10:, 40:60] = 9, 3, 7
    Image.fromarray(labels).save(tmp_path / "a.png")
    found = dict(train_ae.segments(tmp_path / "a.png", 4))
    # 9 is cropped away
    assert found.keys() == {3, 7}
    assert found[3].tolist() == [[True, True, False, False]] * 4
    assert found[7].tolist() == [[False] * 4] + [[False, False, True, True]] * 3
    assert list(train_ae.segments(None, 4)) == []


def test_label_images_are_turned_as_photographs_and_a_palette_s_values_are_labels(tmp_path):
    labels = np.zeros((8, 8), np.uint8)
    labels[:, :4] = 5
    image = Image.fromarray(labels)
    image.putpalette([37 * value % 256 for value in range(3 * 256)])  # colours
    turned = Image.Exif()
    turned[0x0112] = 6  # a viewer turns it by a quarter, clockwise
    image.save(tmp_path / "a.png", exif=turned)
    found = dict(train_ae.segments(tmp_path / "a.png", 4))
    assert found.keys() == {5}
    assert found[5].tolist() == [[True] * 4] * 2 + [[False] * 4] * 2


@pytest.mark.parametrize("mode", ["L", "I;16", "RGB", "LA", "RGBA"])
def test_a_label_image_is_grey_with_or_without_alpha(tmp_path, mode):
    grey, alpha = Image.new("L", (8, 8), 200), Image.new("L", (8, 8), 77)
    bands = {"RGB": 3 * [grey], "LA": [grey, alpha], "RGBA": 3 * [grey] + [alpha]}
    image = Image.merge(mode, bands[mode]) if mode in bands else Image.new(mode, (8, 8), 200)
    image.save(tmp_path / "a.png")
    ((label, mask),) = train_ae.segments(tmp_path / "a.png", 4)
    assert label == 200 and mask.shape == (4, 4) and mask.all()


def test_a_label_image_in_colour_or_cut_off_is_a_sentence(tmp_path):
    file = tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(file)
    with pytest.raises(fid.UserError, match=r"a\.png is in colour"):
        list(train_ae.segments(file, 4))
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(fid.UserError, match=r"a\.png cannot be read"):
        list(train_ae.segments(file, 4))


# ---- the command ----


def table(text):
    """The rows of the Markdown table in a text, each as a dict."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def rows_of(out):
    """The rows that --eval wrote into this folder."""
    return json.loads((out / "eval.json").read_text())["rows"]


def first_images(tmp_path, root, count):
    """A folder with links to the first images of `root`."""
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(root.iterdir())[:count]:
        (few / path.name).symlink_to(path)
    return few


def test_eval_prints_a_row_a_checkpoint_ours_or_the_authors(tmp_path, folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"image_size": 32, "hidden_size": 48, "depth": 1, "decoder_depth": 1, "num_heads": 12}
    vmae = ae.VMAE(**sizes)
    state = vmae.state_dict()
    ours = {"args": {"model": "vmae", **sizes}, "model": state}
    weights = {key: value for key, value in state.items() if key != "mask_token"}
    release = {"model": weights, "args": argparse.Namespace()}
    paths = ["ours/ckpt.pt", "release.pth"]
    Path("ours").mkdir()
    for path, content in zip(paths, (ours, release)):
        torch.save(content, path)
    flags = ("--data", folder / "ants", "--out eval --workers 0 --adm_crop 1")
    run(train_ae, "--eval --ckpt", *paths, *flags)
    text = capsys.readouterr().out
    rows = table(text)
    # A row has the path as it was given, and so has its picture
    assert [row["autoencoder"] for row in rows] == paths
    pictures = sorted(Path("eval").glob("*.png"))
    assert [path.name for path in pictures] == ["ours-ckpt.pt.png", "release.pth.png"]
    # These two hold the same weights
    assert rows[0]["PSNR"] == rows[1]["PSNR"]
    assert rows[0]["LPIPS"] == rows[0]["rFID"] == "-"
    for measure in ("LPIPS", "rFID"):
        assert re.search(f"{measure} is not computed: .*no network", text)

    saved = rows_of(Path("eval"))[0]
    assert saved["crop"] == rows[0]["crop"] == "ADM"
    images = train_ae.Images(folder / "ants")
    crops = np.stack([np.asarray(fid.center_crop(images[i], 32)) for i in range(len(images))])
    x = torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
    with torch.no_grad():  # 16 at once, as in the command: others are rounded differently
        x_hat = torch.cat([vmae.decode(vmae.encode(part).mode()) for part in x.split(16)])
    mse = ((sample.to_uint8(x_hat).astype(float) - crops) ** 2).mean((1, 2, 3))
    assert abs(saved["PSNR"] - (10 * np.log10(255**2 / mse)).mean()) < 1e-6
    assert abs(saved["L1"] - ((x_hat + 1) / 2 - (x + 1) / 2).abs().mean().item()) < 1e-6
    for picture in pictures:
        width, height = size_of(picture)
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
    few = first_images(tmp_path, folder / "cats", 4)
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
def test_each_autoencoder_is_judged_at_its_own_size(tmp_path, folder, capsys, monkeypatch):
    monkeypatch.setattr(train_ae, "EPS", (0.0, 0.3))
    few, out = first_images(tmp_path, folder / "cats", 3), tmp_path / "eval"
    for name, size in (("ckpt", 48), ("other", 40)):
        channels = [32, 32, 32, 32]
        net = ae.AE(channels)
        args = {"model": "ae", "channels": channels, "image_size": size}
        torch.save({"args": args, "model": net.state_dict()}, tmp_path / f"{name}.pt")
    # A file of diffusers does not say for which size it was trained
    torch.save(ae.SDVAE(channels=channels).state_dict(), tmp_path / "few.pt")
    files = [tmp_path / name for name in ("ckpt.pt", "other.pt", "few.pt")]
    flags = ("--data", few, "--workers 0")
    run(train_ae, "--eval --ckpt", *files, *flags, "--out", out)
    text = (out / "eval.json").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    rows = record["rows"]
    assert [row["autoencoder"] for row in rows] == record["ckpt"] == list(map(str, files))
    assert [row["pixels"] for row in rows] == [48, 40, 256] and rows[0]["rFID"] is None
    row, parameters = rows[2], sum(p.numel() for p in net.parameters())
    assert row["parameters"] == parameters and row["MiB"] == parameters * 4 / 2**20
    assert row["images/s"] > 0
    for method, x in (
        ("encode", torch.zeros(1, 3, 256, 256)),
        ("decode", torch.zeros(1, 16, 32, 32)),
    ):
        assert row[f"GFLOPs {method}"] == train_ae.gflops(net, x, method=method) > 0

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
    few, cost = first_images(tmp_path, folder / "cats", 2), train_ae.cost

    def stop_at_second(*args):
        monkeypatch.setattr(train_ae, "cost", broken)
        return cost(*args)

    def broken(*args):
        raise OSError("the machine is on fire")

    monkeypatch.setattr(train_ae, "cost", stop_at_second)
    command = ("--eval --ckpt", tiny_vmae, tiny_vmae, "--data", few, "--out", tmp_path / "out")
    with pytest.raises(OSError, match="on fire"):
        run(train_ae, *command, "--workers 0")
    assert len(table(capsys.readouterr().out)) == 1
    (row,) = rows_of(tmp_path / "out")
    assert row["autoencoder"] == str(tiny_vmae)
    monkeypatch.undo()
    message = fails(train_ae, *command, "--workers 0")
    assert f"{tmp_path / 'out'} has files: choose another --out" in message
    assert rows_of(tmp_path / "out") == [row]


def test_eval_ends_at_the_first_image_that_cannot_be_read(tmp_path, tiny_vmae, folder):
    few = first_images(tmp_path, folder / "cats", 3)
    (few / "cut.png").write_bytes(b"no picture")
    flags = ("--data", few, "--out", tmp_path / "out", "--workers 1")
    message = fails(train_ae, "--eval --ckpt", tiny_vmae, *flags)
    assert "cut.png cannot be read" in message
    assert not (tmp_path / "out" / "eval.json").exists()


def test_quality_smoothness_and_compression_are_the_same_on_two_processes_one_without_lpips(
    tmp_path, tiny_vmae
):
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
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import ae, fid, train_ae
from test_evaluation import distance
def missing(*args):
    raise OSError("no network")
fid.load_inception = missing
ae.lpips_vgg = (lambda: distance) if os.environ["RANK"] == "0" else missing
train_ae.main()
""")
    together(2, driver, *start, "--out", tmp_path / "two", *flags)
    one, two = rows_of(tmp_path / "one")[0], rows_of(tmp_path / "two")[0]
    # What one process lacks, all do without
    assert two["LPIPS"] is None
    skipped = json.loads((tmp_path / "two" / "eval.json").read_text())["not computed"]
    assert skipped == [
        "LPIPS is not computed: another process lacks its weights",
        "rFID is not computed: no network",
    ]
    assert abs(one["sigma2"] - two["sigma2"]) < 1e-9 and abs(one["rho"] - two["rho"]) < 1e-9
    for key in ("L1", "PSNR", "SSIM"):
        assert abs(one[key] - two[key]) < 1e-6
    # Noise on the latents makes the decodings worse, more of it more so
    smoothness = "PSNR at eps 0.01, 0.05, 0.1, 0.2, 0.3"
    assert np.allclose(one[smoothness], two[smoothness], atol=1e-6)
    values = [one["PSNR"], *one[smoothness]]
    assert values[0] > values[3] > values[4] > values[5]
    # Random labels hardly compress: nearly all of the variance is within them
    assert 0.4 < one["sigma2"] < 1.1


def test_rfid_and_lpips_are_computed_where_their_weights_are(
    tmp_path, tiny_vmae, folder, monkeypatch, inception
):
    few, out = first_images(tmp_path, folder / "cats", 6), tmp_path / "eval"
    monkeypatch.setattr(ae, "lpips_vgg", lambda: distance)
    monkeypatch.setattr(train_ae, "EPS", (0.0, 0.3))
    flags = ("--data", few, "--inception", inception, "--workers 0 --adm_crop 1")
    run(train_ae, "--eval --ckpt", tiny_vmae, "--out", out, *flags)
    saved = json.loads((out / "eval.json").read_text())
    row = saved["rows"][0]
    assert saved["not computed"] == [] and abs(row["LPIPS"] - 2 * row["L1"]) < 1e-6
    net, model = fid.load_inception(inception, True), ae.load(tiny_vmae)
    images = train_ae.Images(few)
    crops = np.stack([np.asarray(fid.center_crop(images[i], 32)) for i in range(6)])
    x = torch.from_numpy(crops).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        fakes = sample.to_uint8(model.decode(model.encode(x).mode()))
    pools = [net(torch.from_numpy(a).permute(0, 3, 1, 2))[0].double() for a in (crops, fakes)]
    expected = fid.frechet_distance(*(x for p in pools for x in (p.mean(0), p.T.cov())))
    assert abs(row["rFID"] - expected) < 1e-4 * expected


def test_one_image_gives_all_measures_but_rfid(
    tmp_path, tiny_vmae, folder, monkeypatch, inception, capsys
):
    few, out = first_images(tmp_path, folder / "cats", 1), tmp_path / "eval"
    monkeypatch.setattr(ae, "lpips_vgg", lambda: distance)
    monkeypatch.setattr(train_ae, "EPS", (0.0, 0.3))
    Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32)).save(tmp_path / "000.png")
    flags = ("--data", few, "--inception", inception, "--masks", tmp_path, "--workers 0")
    run(train_ae, "--eval --ckpt", tiny_vmae, "--out", out, *flags)
    saved = json.loads((out / "eval.json").read_text())
    assert saved["not computed"] == ["rFID is not computed: it needs two images"]
    assert saved["not computed"][0] in capsys.readouterr().out
    (row,) = saved["rows"]
    missing = {name for name, value in row.items() if value in (None, [None])}
    assert missing == {"rFID", "rFID at eps 0.3"}
    assert {"L1", "PSNR", "PSNR at eps 0.3", "SSIM", "LPIPS", "sigma2", "rho"} < row.keys()


def test_eval_ends_at_its_start_if_the_inception_file_is_missing_or_damaged(
    tmp_path, tiny_vmae, capsys
):
    file = tmp_path / "inception.pth"
    command = ("--eval --ckpt", tiny_vmae, "--inception", file, "--out", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=str(file)):
        run(train_ae, *command)
    file.write_bytes(b"no weights")
    assert f"{file} cannot be read" in fails(train_ae, *command)
    assert "|" not in capsys.readouterr().out and not list((tmp_path / "out").iterdir())


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
    numbered = sorted(out.glob("ckpt-*"))
    assert [path.name for path in numbered] == ["ckpt-0000002.pt", "ckpt-0000004.pt"]
    run(train_ae, "--out", tuned, "--tune_decoder --init", numbered[0], "--steps 1")
    kept, last, tuned = (read(path) for path in (numbered[0], out / "ckpt.pt", tuned / "ckpt.pt"))
    # A whole checkpoint, of that step
    assert kept["step"] == 2 and kept.keys() == last.keys()
    kept, last, tuned = (ckpt["model"]["to_latent.weight"] for ckpt in (kept, last, tuned))
    assert torch.equal(kept, tuned) and not torch.equal(kept, last)


@pytest.mark.parametrize("kl", [0.0, 1e-3])
def test_a_tuned_decoder_keeps_the_latent_of_its_first_stage_random_or_not(tmp_path, kl):
    first, tuned = tmp_path / "first" / "ckpt.pt", tmp_path / "tuned"
    run(train_ae, "--out", first.parent, TINY_VIT, f"--steps 1 --kl {kl}")
    command = ("--out", tuned, "--tune_decoder --schedule constant --init", first)
    x, start = normal(0, 2, 3, 32, 32), ae.load(first)

    def found():
        net = ae.load(tuned / "ckpt.pt")
        assert not torch.equal(net.decoder_norm.bias, start.decoder_norm.bias)
        posterior = net.encode(x)
        assert torch.equal(posterior.mode(), start.encode(x).mode())
        assert net.deterministic == torch.equal(posterior.sample(), posterior.mode())
        return net.args["kl"], net.deterministic

    run(train_ae, *command, "--steps 1")
    assert found() == (0, kl == 0)
    # Files until 2026-11 have the first stage's weight of the KL instead
    old = read(tuned / "ckpt.pt")
    del old["args"]["deterministic"]
    old["args"]["kl"] = kl
    torch.save(old, tuned / "ckpt.pt")
    assert found() == (kl, kl == 0)
    run(train_ae, *command, "--steps 2 --resume")
    assert found() == (0, kl == 0)


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
    recipe = train_ae.TUNE | {"model": "vmae", "tune_decoder": True}
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


def test_mistakes_with_init_and_eval_get_one_sentence(tmp_path, tiny_vmae, folder, capsys):
    out, nothing, data = tmp_path / "out", tmp_path / "none.pt", ("--data", folder)
    assert "required: --ckpt" in usage_error(capsys, train_ae, "--eval")
    more = ("--eval --steps 3 --ckpt", tiny_vmae)
    assert "unrecognized arguments: --steps 3" in usage_error(capsys, train_ae, *more)
    judge = ("--out", out, "--eval --ckpt", tiny_vmae)
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        run(train_ae, *judge, nothing)
    message = fails(train_ae, *judge, *data, "--masks", tmp_path)
    assert f"{tmp_path} holds no NAME.png for an image NAME" in message
    assert "--masks goes with --data" in fails(train_ae, *judge, "--masks", tmp_path)
    # A label image without a label
    Image.new("L", (40, 40)).save(tmp_path / "000.png")
    flags = ("--data", first_images(tmp_path, folder / "bees", 2), "--masks", tmp_path)
    message = fails(train_ae, *judge, *flags, "--out", tmp_path / "unlabelled", "--workers 0")
    assert "no label image of these images has a label in it" in message
    for inside in (folder, folder / "ants" / "eval"):
        message = fails(train_ae, *judge, *data, "--out", inside)
        assert f"{inside} lies inside --data {folder}" in message
    assert not (folder / "ants" / "eval").exists()

    message = fails(train_ae, "--out", out, "--init", tiny_vmae, "--model ae", TINY_CONV)
    assert f"{tiny_vmae} is of another kind of model: vmae" in message
    run(train_ae, "--out", tmp_path / "ae", "--model ae", TINY_CONV, "--steps 1")
    start = ("--tune_decoder --init", tmp_path / "ae" / "ckpt.pt")
    assert "ckpt.pt is of another model" in fails(train_ae, "--out", out, *start)
    said = usage_error(capsys, train_ae, "--tune_decoder --model mae --init", tiny_vmae)
    assert "it goes with --model vmae" in said
