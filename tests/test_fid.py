"""fid.py: the network, the metrics, the sets of images and the command line."""

import contextlib
import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import types
import zipfile
from argparse import ArgumentTypeError
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    close,
    fails,
    keys_of,
    launch,
    reference,
    run,
    shapes,
    together,
    usage_error,
    written,
)
from PIL import Image
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from torch.utils.data import DataLoader

import fid


def random_images(seed, count, size=32):
    """(count, size, size, 3) uint8, smooth enough to differ from one another in more than noise"""
    rs = np.random.RandomState(seed)
    coarse = torch.from_numpy(rs.rand(count, 3, 4, 4))
    fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    return (255 * fine).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def random_statistics(seed, count, d):
    x = np.random.RandomState(seed).standard_normal((count, d)) @ np.diag(np.linspace(0.1, 2, d))
    return x.mean(0), np.cov(x, rowvar=False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of weights filled by the rule of tests/reference/README.md."""
    net = fid.InceptionV3()
    state = net.state_dict()
    rs = np.random.RandomState(0)
    for key in sorted(state):
        if state[key].is_floating_point():
            z = rs.standard_normal(tuple(state[key].shape))
            if key.endswith("running_var"):
                z = 1 + 0.1 * abs(z)
            elif key.endswith("bn.weight"):
                z = 1 + 0.1 * z
            elif key.endswith("running_mean") or key.endswith("bias"):
                z = 0.1 * z
            else:
                z = z * np.sqrt(2 / np.prod(z.shape[1:]))
            state[key].copy_(torch.from_numpy(z))
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(dict(state), path)
    return path


@pytest.fixture(scope="module")
def net(weights):
    return fid.load_inception(weights)


@pytest.fixture
def quick(monkeypatch):
    """In place of the network one that takes no time, for what has nothing to do with it."""
    random = np.random.RandomState(0)
    a, b = (torch.from_numpy(random.standard_normal((48, d))) for d in (2048, 2023))

    class Quick(torch.nn.Module):
        def forward(self, x):
            x = torch.nn.functional.adaptive_avg_pool2d(x.double() / 255, 4).flatten(1)
            return x @ a, x @ b

        def probs(self, pool):
            return pool[:, :10].double().softmax(1)

    net = Quick()
    monkeypatch.setattr(fid, "load_inception", lambda path=None, half_pixel=False: net)
    return net


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two .npz of images, a folder with the same images as the second"""
    folder = tmp_path_factory.mktemp("sets")
    np.savez(folder / "ref.npz", arr_0=random_images(1, 11))
    images = random_images(2, 9)
    np.savez_compressed(folder / "samples.npz", arr_0=images)
    for i, image in enumerate(images):
        path = folder / "samples" / str(i // 5) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def metrics(*args, ranks=1):
    """What the command prints, by name."""
    args = (*args, "--device cpu --batch 4")
    if ranks > 1:
        printed = together(ranks, "fid.py", *args)
    else:
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            run(fid, *args)
        printed = stdout.getvalue()
    pairs = (line.split(": ") for line in printed.splitlines())
    return {name: float(value) for name, value in pairs}


def open_set(path, workers=1):
    """As fid.open_set, with these flags."""
    return fid.open_set(str(path), types.SimpleNamespace(half_pixel=0, crop=None, workers=workers))


def raises(error):
    """A function that raises it, whatever it is called with."""

    def call(*args, **kwargs):
        raise error

    return call


# the network


def test_tensor_names_and_shapes_are_those_of_the_published_file():
    assert shapes(fid.InceptionV3()) == keys_of("inception_2015_12_05.keys.txt")


def test_features_equal_the_reference_implementation_fused_or_not(weights, net):
    expected = np.load(reference("inception_seed0.npz"))
    unfused = fid.InceptionV3()
    unfused.load_state_dict(torch.load(weights, weights_only=True))
    x = np.random.RandomState(500).randint(0, 256, (3, 3, 64, 64), dtype=np.uint8)
    for either in (net, unfused):
        pool, spatial = either(torch.from_numpy(x))
        close(pool, expected["pool"])
        close(spatial, expected["spatial"])
        probs = torch.from_numpy(expected["logits_unbiased"]).double().softmax(1)
        close(either.probs(pool), probs.numpy())


def test_resizing_is_tensorflow_1s_by_hand():
    x = torch.tensor([[0.0, 10.0], [20.0, 40.0]])[None, None]
    expected = [[0, 5, 10, 10], [10, 17.5, 25, 25], [20, 30, 40, 40], [20, 30, 40, 40]]
    torch.testing.assert_close(fid.resize_tf1(x, 4)[0, 0], torch.tensor(expected))


def test_pool_equals_torch_fidelity_on_the_same_weights(weights, net):
    name = "torch_fidelity.feature_extractor_inceptionv3"
    module = pytest.importorskip(name, reason="torch-fidelity is not installed")
    theirs = module.FeatureExtractorInceptionV3(
        "inception-v3-compat",
        ["2048", "logits_unbiased"],
        feature_extractor_weights_path=str(weights),
    )
    x = torch.from_numpy(random_images(3, 3, 45)).permute(0, 3, 1, 2)
    pool, logits = theirs(x)
    ours, _ = net(x)
    torch.testing.assert_close(ours, pool, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net.probs(ours), logits.softmax(1).double(), rtol=1e-4, atol=1e-8)


def test_half_pixel_equals_pytorch_fid_and_the_default_does_not(weights, net, monkeypatch):
    theirs = pytest.importorskip("pytorch_fid.inception", reason="pytorch-fid is not installed")
    state = torch.load(weights, weights_only=True)
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *a, **k: state)
    x = torch.from_numpy(random_images(3, 3, 45)).permute(0, 3, 1, 2)
    with torch.no_grad():
        pool = theirs.InceptionV3([3]).eval()(x.float() / 255)[0].flatten(1)
    ours, _ = fid.load_inception(weights, half_pixel=True)(x)
    torch.testing.assert_close(ours, pool, rtol=1e-5, atol=1e-5)
    assert (net(x)[0] - pool).abs().max() > 1e-3  # a hundred times the tolerance above


@pytest.mark.parametrize(
    "name, function",
    [
        ("cleanfid.fid", "frechet_distance"),
        ("pytorch_fid.fid_score", "calculate_frechet_distance"),
    ],
)
def test_frechet_distance_equals_clean_fid_and_pytorch_fid(name, function):
    module = pytest.importorskip(name, reason=f"{name} is not installed")
    statistics = (*random_statistics(0, 400, 40), *random_statistics(1, 300, 40))
    theirs = getattr(module, function)(*statistics)
    assert fid.frechet_distance(*statistics) == pytest.approx(theirs, rel=1e-6)


def test_features_ignore_autocast_and_settings_come_back(net):
    x = torch.from_numpy(random_images(3, 2)).permute(0, 3, 1, 2)
    before = torch.backends.cudnn.allow_tf32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = net(x)[0]
    assert torch.equal(inside, net(x)[0])
    assert torch.backends.cudnn.allow_tf32 == before


def test_weights_load_with_and_without_num_batches_tracked(weights, net, tmp_path):
    state = torch.load(weights, weights_only=True)
    assert any("num_batches_tracked" in key for key in state)
    without = {k: v for k, v in state.items() if "num_batches_tracked" not in k}
    torch.save(without, tmp_path / "w.pth")
    assert torch.equal(fid.load_inception(tmp_path / "w.pth").fc.weight, net.fc.weight)
    del state["Mixed_5b.branch1x1.conv.weight"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(RuntimeError, match="Missing key.*Mixed_5b.branch1x1.conv.weight"):
        fid.load_inception(tmp_path / "w.pth")


@pytest.mark.parametrize("content", [b"", b"no weights", pickle.dumps(os.getcwd, 2)])
def test_a_file_that_is_no_file_of_weights_is_named(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(fid.UserError, match="w.pth"):
        fid.load_inception(tmp_path / "w.pth")


def test_first_use_downloads_and_checks_the_hash(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(fid, "URL", weights.as_uri())
    with pytest.raises(RuntimeError, match="invalid hash.*6726825d"):
        fid.load_inception()
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())
    (tmp_path / "hub" / "checkpoints" / fid.WEIGHTS).write_bytes(weights.read_bytes())
    assert fid.load_inception().fc.weight.shape == (1008, 2048)


DOWNLOADS = """
import shutil, sys, time, torch
sys.path.insert(0, {root!r})
import fid
torch.hub.get_dir = lambda: {hub!r}
def download(url, path, *args, **kwargs):
    assert fid.local_rank() == 0
    time.sleep(1)  # a process that did not wait would find no file
    shutil.copy({weights!r}, path)
    print("downloaded")
torch.hub.download_url_to_file = download
fid.join_processes("cpu")
assert fid.local_rank_0_first(fid.load_inception).fc.out_features == 1008
fid.leave_processes()
"""


@pytest.mark.slow
def test_the_first_process_of_a_machine_downloads_and_the_others_find_the_file(weights, tmp_path):
    script = tmp_path / "downloads.py"
    names = {"root": str(ROOT), "hub": str(tmp_path / "hub"), "weights": str(weights)}
    script.write_text(DOWNLOADS.format(**names))
    assert together(2, script).count("downloaded") == 1


def test_wrong_input_to_the_network_is_refused(net):
    for x in (torch.zeros(2, 3, 32, 32), torch.zeros(2, 32, 32, 3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            net(x)


# the metrics


@pytest.mark.parametrize("offset", [0, 1e6])
def test_statistics_equal_numpys_in_any_batches(offset):
    x = np.random.RandomState(0).standard_normal((101, 6)) * np.arange(1, 7) + offset
    statistics = fid.Statistics(6)
    for start, stop in ((0, 1), (1, 50), (50, 101)):
        statistics.update(torch.from_numpy(x[start:stop]))
    mu, sigma = statistics.finish()
    np.testing.assert_allclose(mu, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x - offset, rowvar=False), rtol=1e-9, atol=1e-9)


def definition(mu1, sigma1, mu2, sigma2):
    root = sqrtm(sigma1 @ sigma2).real
    return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)


def test_frechet_distance_equals_the_definition():
    one, two = random_statistics(0, 500, 60), random_statistics(1, 400, 60)
    assert fid.frechet_distance(*one, *two) == pytest.approx(definition(*one, *two), rel=1e-9)
    tensors = [torch.from_numpy(x) for x in (*one, *two)]
    assert fid.frechet_distance(*tensors) == fid.frechet_distance(*one, *two)


def test_frechet_distance_has_its_closed_form_where_covariances_are_of_low_rank():
    # Covariances that commute
    a, b = np.zeros(50), np.zeros(50)
    a[:20] = np.linspace(1, 3, 20)
    b[10:40] = np.linspace(2, 5, 30)
    q = np.linalg.qr(np.random.RandomState(0).standard_normal((50, 50)))[0]
    sigma1, sigma2 = q @ np.diag(a) @ q.T, q @ np.diag(b) @ q.T
    ours = fid.frechet_distance(np.zeros(50), sigma1, np.ones(50), sigma2)
    assert ours == pytest.approx(50 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-8)
    # Fewer images than dimensions, and the same scaled by 2: |mu|^2 + tr(sigma)
    mu, sigma = random_statistics(0, 30, 200)
    ours = fid.frechet_distance(mu, sigma, 2 * mu, 4 * sigma)
    assert ours == pytest.approx(mu @ mu + np.trace(sigma), rel=1e-12)
    # A single point repeated
    ours = fid.frechet_distance(mu + 1, np.zeros((200, 200)), mu, sigma)
    assert ours == pytest.approx(200 + np.trace(sigma), rel=1e-12)


@pytest.mark.parametrize("count", [5, 40, 300])
def test_frechet_distance_of_identical_sets_is_zero_at_any_rank(count):
    for seed in range(5):
        mu, sigma = random_statistics(seed, count, 200)
        sigma *= np.outer(10.0 ** -np.linspace(0, 5, 200), 10.0 ** -np.linspace(0, 5, 200))
        assert 0 <= fid.frechet_distance(mu, sigma, mu, sigma) < 1e-12 * np.trace(sigma)


@pytest.mark.parametrize("count", [50, 1000])
def test_statistics_rounded_to_float32_serve(count):
    one, two = random_statistics(0, count, 200), random_statistics(1, count, 200)
    rounded = fid.frechet_distance(*[x.astype(np.float32) for x in (*one, *two)])
    assert rounded == pytest.approx(fid.frechet_distance(*one, *two), rel=1e-4)


def test_frechet_distance_refuses_what_is_no_pair_of_statistics():
    mu, sigma = random_statistics(0, 30, 10)
    bad = sigma.copy()
    bad[2, 3] = np.nan
    lopsided = sigma + np.triu(np.ones((10, 10)), 1)
    for given, words in (
        ((mu, bad), "NaN"),
        ((mu, -sigma), "negative"),
        ((mu, lopsided), "symmetric"),
        ((mu[:9], sigma[:9, :9]), "fit"),
    ):
        with pytest.raises(ValueError, match=words):
            fid.frechet_distance(mu, sigma, *given)


def test_inception_score_equals_the_definition_with_a_short_last_split():
    p = np.random.RandomState(0).dirichlet(np.ones(7), 23)
    p[0] = np.eye(7)[0]
    scores = []
    for start in (0, 10, 20):
        part = p[start : start + 10]
        kl = [sum(a * np.log(a / b) for a, b in zip(row, part.mean(0)) if a > 0) for row in part]
        scores.append(np.exp(np.mean(kl)))
    assert fid.inception_score(p, split_size=10) == pytest.approx(np.mean(scores), rel=1e-12)


def test_inception_score_depends_on_file_order_and_refuses_nothing():
    p = torch.eye(4).repeat_interleave(2, 0)
    assert fid.inception_score(p, split_size=2) == pytest.approx(1)
    assert fid.inception_score(p[[0, 2, 4, 6, 1, 3, 5, 7]], split_size=4) == pytest.approx(4)
    with pytest.raises(ValueError, match="classes"):
        fid.inception_score(torch.zeros(0, 4))


def brute_force(ref, samples, k):
    def inside(balls, points):
        # The first neighbour is the point itself
        radius = np.sort(cdist(balls, balls), 1)[:, k]
        return (cdist(points, balls) <= radius).any(1).mean()

    return inside(ref, samples), inside(samples, ref)


@pytest.mark.parametrize(
    "k, offset, counts",
    [
        (1, 0, (150, 130)),
        (3, 0, (150, 130)),
        (1, 1000, (150, 130)),
        (3, 1000, (150, 130)),
        (3, 0, (2051, 2500)),
    ],
)
def test_precision_and_recall_equal_brute_force_also_over_block_borders(k, offset, counts):
    rs = np.random.RandomState(0)
    ref = (rs.standard_normal((counts[0], 8)) + offset).astype(np.float32)
    samples = (0.8 * rs.standard_normal((counts[1], 8)) + 0.4 + offset).astype(np.float32)
    expected = brute_force(ref, samples, k)
    assert 0.1 < expected[0] < 0.97 and 0.1 < expected[1] < 0.97
    assert fid.precision_recall(ref, samples, k) == pytest.approx(expected, abs=1e-12)


def test_copies_are_neighbours_and_lie_in_balls_of_radius_zero():
    point = np.random.RandomState(0).standard_normal((1, 2048)).astype(np.float32)
    far = np.random.RandomState(1).standard_normal((6, 2048)).astype(np.float32)
    ref = np.concatenate([far, point.repeat(4, 0)])  # the last four have radius 0
    assert fid.precision_recall(ref, point.repeat(9, 0)) == (1, 0.4)
    # k = 1: the two copies are each other's neighbours, with radius 0, so that 0.5 lies in no ball
    ref, samples = np.array([[0.0], [0], [9], [9.1]]), np.array([[0.5], [9], [20], [30]])
    assert fid.precision_recall(ref, samples, 1) == (0.25, 1)


def test_precision_and_recall_refuse_too_few_points():
    with pytest.raises(ValueError, match="more than 3"):
        fid.precision_recall(np.zeros((3, 5)), np.zeros((9, 5)))


# the command line


@pytest.fixture(scope="module")
def result(weights, sets):
    """What the command prints for ref.npz and samples.npz, in one process."""
    output = ("--json", sets / "out.json", "--save_stats", sets / "stats.npz")
    return metrics(sets / "ref.npz", sets / "samples.npz", "--inception", weights, *output)


def test_command_prints_and_writes_what_the_functions_give_for_all_images_at_once(
    result, net, sets
):
    (ref_pool, ref_spatial), (pool, spatial) = (
        net(torch.from_numpy(np.load(sets / name)["arr_0"]).permute(0, 3, 1, 2))
        for name in ("ref.npz", "samples.npz")
    )
    expected = [fid.inception_score(net.probs(pool))]
    for pair in ((ref_pool, pool), (ref_spatial, spatial)):
        pair = [x.double().numpy() for x in pair]
        statistics = [(x.mean(0), np.cov(x, rowvar=False)) for x in pair]
        expected.append(fid.frechet_distance(*statistics[0], *statistics[1]))
    expected += fid.precision_recall(ref_pool, pool)
    assert list(result) == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    assert list(result.values()) == pytest.approx(expected, rel=1e-4)
    counts = {"REF images": 11, "SAMPLES images": 9}
    assert json.loads((sets / "out.json").read_text()) == result | counts


@pytest.fixture
def stored(quick, sets, tmp_path):
    """A folder with ref.npz and samples.npz, which hold the quick network's features of those sets,
    and alone.npz: the statistics of the first without features, as an older version wrote them."""
    for name in ("ref.npz", "samples.npz"):
        assert metrics(sets / name, "--save_stats", tmp_path / name) == {}
    with np.load(tmp_path / "ref.npz") as ref:
        np.savez(tmp_path / "alone.npz", **{name: ref[name] for name in fid.STATISTICS})
    return tmp_path


def test_a_folder_and_a_npz_of_the_same_images_have_the_same_features(stored, sets):
    metrics(sets / "samples", "--save_stats", stored / "folder.npz")
    with np.load(stored / "folder.npz") as one, np.load(stored / "samples.npz") as two:
        assert sorted(one.files) == sorted(two.files) == sorted(fid.FEATURES)
        for key in one.files:
            # those of a folder are in the order in which the Inception Score takes them
            rows = np.random.RandomState(0).permutation(9) if key == "pool" else ...
            np.testing.assert_allclose(one[key][rows], two[key], rtol=1e-6, atol=1e-9)


def test_what_is_saved_gives_all_metrics_without_the_images(stored, quick, sets, monkeypatch):
    expected = metrics(sets / "ref.npz", sets / "samples.npz")
    score = metrics(sets / "samples.npz", sets / "ref.npz")["Inception Score"]
    passed, forward = [], type(quick).forward

    def counted(net, x):
        passed.append(len(x))
        return forward(net, x)

    monkeypatch.setattr(type(quick), "forward", counted)
    assert metrics(stored / "ref.npz", sets / "samples.npz") == expected
    assert sum(passed) == 9  # those of SAMPLES
    same = metrics(stored / "ref.npz", stored / "ref.npz")
    assert sum(passed) == 9
    # the score of these features, which the last layer alone gives
    assert same["Inception Score"] == pytest.approx(score, rel=1e-9)
    assert max(same["FID"], same["sFID"]) < 1e-9 * expected["FID"]
    assert same["Precision"] == same["Recall"] == 1


def test_statistics_without_features_serve_for_fid_and_alone_need_no_network(
    stored, sets, monkeypatch, capsys
):
    expected = metrics(sets / "ref.npz", sets / "samples.npz")
    capsys.readouterr()
    for folder in (sets, stored):  # images, and features
        flags = ("--json", stored / f"{folder.name}.json")
        found = metrics(stored / "alone.npz", folder / "samples.npz", *flags)
        assert list(found) == ["Inception Score", "FID", "sFID"]
        assert list(found.values()) == pytest.approx(list(expected.values())[:3], rel=1e-6)
        needed = "Precision is left out: it needs more than k = 3 images of both."
        assert needed in capsys.readouterr().err
        # No images are known of the statistics
        counts = {"REF images": 0, "SAMPLES images": 9}
        assert json.loads(flags[1].read_text()) == found | counts

    monkeypatch.setattr(fid, "load_inception", raises(AssertionError("the network is loaded")))
    alone = metrics(stored / "alone.npz", stored / "alone.npz")
    assert list(alone) == ["FID", "sFID"] and max(alone.values()) < 1e-9 * expected["FID"]
    needed = "Inception Score is left out: it needs images or pool features of SAMPLES."
    assert needed in capsys.readouterr().err


def test_of_a_reference_batch_both_parts_serve_and_are_saved(stored, sets):
    """ADM's files have the statistics of all images, and only some of the images."""
    with np.load(stored / "alone.npz") as statistics, np.load(sets / "samples.npz") as images:
        np.savez(stored / "batch.npz", **statistics, **images)
        saved = ("--save_stats", stored / "saved.npz")
        first = metrics(stored / "batch.npz", sets / "ref.npz", *saved)
        apart = metrics(sets / "samples.npz", sets / "ref.npz")
        assert first["FID"] < 1e-6 * apart["FID"] and first["sFID"] < 1e-6 * apart["sFID"]
        assert (first["Precision"], first["Recall"]) == (apart["Precision"], apart["Recall"])
        assert metrics(stored / "saved.npz", sets / "ref.npz") == first
        with np.load(stored / "saved.npz") as ours:
            assert all(np.array_equal(ours[name], statistics[name]) for name in statistics)
            # ADM's evaluator reads these names beside arr_0; pytorch-fid the first two of them
            # The statistics of all images do not say how those were resized, so neither do ours.
            names = {name: x.shape for name, x in ours.items()}
            assert names == fid.STATISTICS | {"pool": (9, 2048)}
            # With the images added it serves there, and here as before
            np.savez(stored / "adm.npz", **ours, **images)
    assert metrics(stored / "adm.npz", sets / "ref.npz") == first


@pytest.mark.slow
@pytest.mark.parametrize("ranks, ref", [(2, "ref.npz"), (4, "ref.npz"), (2, "stats.npz")])
def test_any_number_of_ranks_gives_the_same(result, weights, sets, ranks, ref):
    # 11 and 9 images in batches of 4: three batches, so that of four ranks one has none
    found = metrics(sets / ref, sets / "samples", "--inception", weights, ranks=ranks)
    assert found == pytest.approx(result, rel=1e-5)


def test_folders_are_recursive_and_rgb(tmp_path, capsys):
    (tmp_path / "b").mkdir()
    Image.new("L", (3, 2), 7).save(tmp_path / "c.PNG")
    Image.new("RGB", (3, 2), (1, 2, 3)).save(tmp_path / "b" / "z.bmp")
    (tmp_path / "notes.txt").write_text("no image")
    _, count, batches = open_set(tmp_path, workers=2)
    (batch,) = batches([(0, 2)])
    assert count == 2 and batch.shape == (2, 2, 3, 3)
    assert sorted(batch[:, 0, 0].tolist()) == [[1, 2, 3], [7, 7, 7]]
    assert capsys.readouterr().err == f"{tmp_path}: 2 images, 1 other files passed over\n"


def test_crop_gives_the_numbers_of_the_images_cropped_beforehand(quick, tmp_path):
    for name in ("ref", "samples"):
        for folder in (tmp_path / name, tmp_path / "cropped" / name):
            folder.mkdir(parents=True)
        for i, size in enumerate([20, 33, 40, 70, 24]):
            image = Image.fromarray(random_images(len(name) + i, 1, size)[0]).resize((size + i, 30))
            image.save(tmp_path / name / f"{i}.png")
            fid.center_crop(image, 16).save(tmp_path / "cropped" / name / f"{i}.png")
    found = metrics(tmp_path / "ref", tmp_path / "samples", "--crop 16")
    expected = metrics(tmp_path / "cropped" / "ref", tmp_path / "cropped" / "samples")
    assert found == expected and len(found) == 5 and found["FID"] > 0.01


# folders


def touch(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"")


def test_hidden_names_and_other_files_are_no_images(tmp_path):
    images = ["ants/1.png", "bees/2.JPG", "bees/deep/3.webp", "bees/x.png/4.tiff", "c.jfif"]
    hidden = [".ipynb_checkpoints/1.png", "__MACOSX/ants/1.png", "ants/._1.png", "ants/.x/1.png"]
    others = ["notes.txt", "ants/film.mpg", "ants/paper.PDF", "data.h5", "png"]
    touch(tmp_path, *images, *hidden, *others)
    assert fid.list_images(tmp_path) == (images, len(others))
    assert fid.list_images(str(tmp_path) + "/") == (images, len(others))


def test_suffixes_are_pillows_without_documents_videos_and_data(tmp_path):
    found = [".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm"]
    found += [".tif", ".tiff", ".webp", *({".avif"} & Image.registered_extensions().keys())]
    passed_over = [".bufr", ".emf", ".eps", ".fit", ".fits", ".grib", ".h5", ".hdf", ".mpeg"]
    passed_over += [".mpg", ".pdf", ".ps", ".wmf", ".npy", ".mp4"]
    touch(tmp_path, *("x" + suffix for suffix in found + passed_over))
    files, others = fid.list_images(tmp_path)
    assert files == sorted("x" + suffix for suffix in found) and others == len(passed_over)


def test_links_are_followed_and_no_folder_is_entered_twice(tmp_path):
    touch(tmp_path, "set/ants/1.png", "set/ants/2.png", "bees/3.png", "bees/a/4.png", "no/5.png")
    for link, target in {
        "set/bees": tmp_path / "bees",
        "set/bees_again": tmp_path / "bees" / "a",
        "set/zoo": "ants",
        "set/ants/up": "..",
        "set/ants/self": ".",
        "bees/back": tmp_path / "set",
        "bees/a/up": "..",
    }.items():
        (tmp_path / link).symlink_to(target, target_is_directory=True)
    (tmp_path / "set" / "linked.png").symlink_to(tmp_path / "no" / "5.png")
    expected = ["ants/1.png", "ants/2.png", "bees/3.png", "bees/a/4.png", "linked.png"]
    assert fid.list_images(tmp_path / "set") == (expected, 0)
    # The set itself may be given as a link.
    (tmp_path / "link").symlink_to("set", target_is_directory=True)
    assert fid.list_images(tmp_path / "link") == (expected, 0)


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    touch(tmp_path, "ants/1.png", "bees/2.png")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "bees":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="bees"):
        fid.list_images(tmp_path)


def test_a_folder_without_images_and_no_folder_are_named(tmp_path):
    touch(tmp_path, "set/notes.txt", "set/.x.png")
    with pytest.raises(fid.UserError, match="set has no images .* but 1 other files"):
        fid.list_images(tmp_path / "set")
    for name, error in (("nowhere", FileNotFoundError), ("set/notes.txt", NotADirectoryError)):
        with pytest.raises(error, match=name):
            fid.list_images(tmp_path / name)
    with pytest.raises(fid.UserError, match="a.png is neither a folder nor a .npz file"):
        open_set("a.png")


# pictures


def read(path):
    image = fid.read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_a_plain_jpeg_has_pillows_pixels(tmp_path):
    Image.fromarray(random_images(0, 1, 40)[0]).save(tmp_path / "x.jpg")
    with Image.open(tmp_path / "x.jpg") as image:
        assert np.array_equal(read(tmp_path / "x.jpg"), np.asarray(image))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp"])
def test_orientation_is_applied(tmp_path, suffix):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16, 0] = upright[16:, 32:, 1] = 255
    # what each orientation says about the stored rows and columns
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        Image.fromarray(np.ascontiguousarray(pixels)).save(path, exif=exif, quality=95)
        found = read(path)
        assert found.shape == upright.shape
        assert np.abs(found[4:12, 4:12].astype(int) - (255, 0, 0)).max() < 30
        assert np.abs(found[20:28, 36:44].astype(int) - (0, 255, 0)).max() < 30


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"garbage", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x05x"])
def test_unreadable_exif_turns_nothing(tmp_path, exif):
    Image.new("RGB", (8, 4), (0, 0, 255)).save(tmp_path / "x.jpg", exif=b"Exif\0\0" + exif)
    assert read(tmp_path / "x.jpg").shape == (4, 8, 3)


def test_transparency_is_over_white(tmp_path):
    def saved(image, name, **how):
        image.save(tmp_path / name, **how)
        return read(tmp_path / name)[0].tolist()

    white = [255, 255, 255]
    # a clear, a half transparent and a full pixel
    rgba = np.array([[[9, 0, 0, 0], [100, 50, 0, 51], [1, 2, 3, 255]]], np.uint8)
    expected = [white, [224, 214, 204], [1, 2, 3]]
    for name in ("rgba.png", "rgba.tif"):
        assert saved(Image.fromarray(rgba), name) == expected
    la = np.array([[[9, 0], [100, 51], [7, 255]]], np.uint8)
    assert saved(Image.fromarray(la, "LA"), "la.png") == [white, [224] * 3, [7] * 3]
    palette = Image.new("P", (3, 1))
    palette.putpalette([9, 0, 0, 100, 50, 0, 1, 2, 3])
    palette.putdata([0, 1, 2])
    assert saved(palette, "p.gif", transparency=0) == [white, [100, 50, 0], [1, 2, 3]]
    assert saved(palette, "p.png", transparency=b"\0\x33\xff") == expected
    rgb = Image.fromarray(rgba[..., :3].copy())
    assert saved(rgb, "rgb.png", transparency=(9, 0, 0)) == [white, [100, 50, 0], [1, 2, 3]]
    grey = Image.fromarray(np.array([[9, 100, 7]], np.uint8))
    assert saved(grey, "l.png", transparency=9) == [white, [100] * 3, [7] * 3]
    deep = Image.fromarray(np.array([[9, 25700, 65535]], np.uint16))
    assert saved(deep, "i16.png", transparency=9) == [white, [100] * 3, white]


def test_grey_of_16_bits_is_scaled(tmp_path):
    values = np.array([[0, 257, 4095, 30000, 65535]], np.uint16)
    for name in ("x.png", "x.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert read(tmp_path / name)[0, :, 0].tolist() == [0, 1, 15, 117, 255]
    (tmp_path / "x.pgm").write_bytes(b"P5 5 1 65535\n" + values.astype(">u2").tobytes())
    assert read(tmp_path / "x.pgm")[0, :, 2].tolist() == [0, 1, 15, 117, 255]


def test_other_modes_become_rgb(tmp_path):
    for mode, name in (("1", "one.png"), ("L", "l.png"), ("P", "p.png"), ("CMYK", "c.tif")):
        Image.new("L", (3, 2), 255).convert(mode).save(tmp_path / name)
        assert read(tmp_path / name).tolist() == [[[255] * 3] * 3] * 2


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_32_bits_are_unreadable(tmp_path, dtype):
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "x.tif")
    with pytest.raises(fid.UserError, match="x.tif cannot be read.*32 bits"):
        fid.read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("error", [SyntaxError, struct.error, KeyError])
def test_whatever_pillow_raises_names_the_file(tmp_path, error, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.bmp")
    monkeypatch.setattr("PIL.BmpImagePlugin.BmpImageFile.load", raises(error("no sense")))
    with pytest.raises(fid.UserError, match="x.bmp cannot be read.*no sense"):
        fid.read_image(tmp_path / "x.bmp")


def test_an_image_that_is_too_large_or_missing_is_named(tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for name in ("x.png", "missing.png"):
        with pytest.raises(fid.UserError, match=f"{name} cannot be read"):
            fid.read_image(tmp_path / name)


# the order of the images, and how they were resized


def test_the_score_of_a_folder_is_in_random_order_that_of_a_npz_in_its_own(
    quick, tmp_path, monkeypatch
):
    monkeypatch.setattr(fid, "SPLIT_SIZE", 4)
    # Nine classes of four images each, all of one color; the order of names is 0, 1, 2, ..., 10
    colors = np.random.RandomState(0).randint(0, 256, (9, 1, 1, 3)).astype(np.uint8)
    images = np.tile(colors.repeat(4, 0), (1, 8, 8, 1))
    for i, image in enumerate(images):
        path = tmp_path / "set" / f"class{i // 4}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    np.savez(tmp_path / "set.npz", arr_0=images)
    folder = metrics(tmp_path / "set", tmp_path / "set", "--save_stats", tmp_path / "saved.npz")
    npz = metrics(tmp_path / "set", tmp_path / "set.npz")
    assert npz["Inception Score"] == pytest.approx(1)

    files, _ = fid.list_images(tmp_path / "set")
    probs = quick.probs(quick(torch.from_numpy(images).permute(0, 3, 1, 2))[0])
    ordered = torch.empty_like(probs)
    for file, row in zip(files, np.random.RandomState(0).permutation(len(files))):
        ordered[row] = probs[int(Path(file).stem)]
    expected = fid.inception_score(ordered, 4)
    assert folder["Inception Score"] == pytest.approx(expected, rel=1e-6) and expected > 1.3
    # and what is saved is in the same order
    saved = metrics(tmp_path / "set", tmp_path / "saved.npz")
    assert saved["Inception Score"] == folder["Inception Score"]


@pytest.mark.parametrize("count, short", [(3, 0), (4, 0), (8, 0), (9, 1), (10, 0)])
def test_a_short_last_split_gets_a_line(quick, monkeypatch, capsys, count, short):
    monkeypatch.setattr(fid, "SPLIT_SIZE", 4)
    pool = np.random.RandomState(0).rand(count, 2048).astype(np.float32)
    found = fid.compute_metrics(quick, {"pool": pool}, {"pool": pool}, torch.device("cpu"))
    score = fid.inception_score(quick.probs(torch.from_numpy(pool)), 4)
    assert found["Inception Score"] == pytest.approx(score)
    said = capsys.readouterr().err
    assert said.count("The last split of the Inception Score has 1 of 4 images") == short
    assert said.count("last split") == short


@pytest.mark.parametrize("half_pixel", [0, 1])
def test_statistics_of_others_stay_without_a_label(quick, tmp_path, capsys, half_pixel):
    mu = np.random.RandomState(0).rand(2048)
    np.savez(tmp_path / "theirs.npz", mu=mu, sigma=np.eye(2048))
    saved = ("--save_stats", tmp_path / "saved.npz", "--half_pixel", half_pixel)
    assert metrics(tmp_path / "theirs.npz", *saved) == {}
    said = capsys.readouterr().err.splitlines()
    (line,) = [line for line in said if "theirs.npz does not say" in line]
    assert ("if they are pytorch-fid's, add --half_pixel 1" in line) == (half_pixel == 0)
    with np.load(tmp_path / "saved.npz") as ours:
        assert ours.files == ["mu", "sigma"] and np.array_equal(ours["mu"], mu)


@pytest.mark.parametrize("half_pixel", [0, 1])
def test_what_is_computed_keeps_its_label(quick, sets, tmp_path, capsys, half_pixel):
    for name in ("samples", "samples.npz"):
        saved, again = tmp_path / f"{name}1.npz", tmp_path / f"{name}2.npz"
        metrics(sets / name, "--save_stats", saved, "--half_pixel", half_pixel)
        metrics(saved, "--save_stats", again, "--half_pixel", half_pixel)
        for path in (saved, again):
            with np.load(path) as arrays:
                assert arrays["half_pixel"] == half_pixel
        with pytest.raises(fid.UserError, match=f"was saved with --half_pixel {half_pixel}"):
            metrics(saved, saved, "--half_pixel", 1 - half_pixel)
    assert "does not say" not in capsys.readouterr().err


# what is written


@pytest.mark.parametrize("flag", ["--json", "--save_stats"])
def test_a_file_that_is_there_or_cannot_be_written_is_found_out_before_the_work(
    tmp_path, monkeypatch, flag
):
    monkeypatch.setattr(fid, "join_processes", raises(AssertionError("the work has begun")))
    command = (fid, "ref.npz", "samples.npz")
    (tmp_path / "there").write_bytes(b"before")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("there", "link", ""):
        assert "is there already" in fails(*command, flag, tmp_path / name)
    assert (tmp_path / "there").read_bytes() == b"before"
    twice = ("--json", tmp_path / "x", "--save_stats", f"{tmp_path}/./x")
    assert "x is there already, or named twice" in fails(*command, *twice)

    missing = tmp_path / "no" / "x"
    assert f"{missing} cannot be written" in fails(*command, flag, missing)
    monkeypatch.setattr(fid.os, "access", lambda folder, mode: (folder, mode) != (str(tmp_path), 2))
    assert f"{tmp_path / 'x'} cannot be written" in fails(*command, flag, tmp_path / "x")


def test_results_appear_whole_or_not_at_all(quick, sets, tmp_path, monkeypatch):
    def disk_is_full(file, **arrays):
        file.write(b"some of it")
        assert not (tmp_path / "x").exists()
        raise OSError(28, "No space left on device")

    command = (sets / "samples", sets / "samples", "--save_stats", tmp_path / "x")
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", disk_is_full)
        with pytest.raises(OSError, match="No space left"):
            metrics(*command)
    assert list(tmp_path.iterdir()) == []
    metrics(*command, "--json", tmp_path / "y")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]  # as they are given


def test_of_two_processes_that_write_one_file_either_copy_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "x"
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)
        with fid.whole_file(path) as first:
            first.write(b"first " * 9999)
            patch.setattr(os, "getpid", lambda: 2)
            with fid.whole_file(path) as second:
                second.write(b"second")
            assert path.read_bytes() == b"second"
            first.write(b"end")
    assert path.read_bytes() == b"first " * 9999 + b"end"
    assert list(tmp_path.iterdir()) == [path]


# what goes wrong


def npz_of(**arrays):
    """A function that saves these arrays to a path."""
    return lambda path: np.savez(path, **arrays)


def garbage(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", "no array")


@pytest.mark.parametrize(
    "save, words",
    [
        (npz_of(arr_0=np.zeros((4, 8, 8, 3), np.float32)), ["uint8", "float32"]),
        (npz_of(arr_0=np.zeros((4, 8, 8), np.uint8)), ["(4, 8, 8)"]),
        (npz_of(arr_0=np.array([{}])), ["object"]),
        (npz_of(mu=np.array([{}]), sigma=np.eye(2048)), ["Object"]),
        (npz_of(mu=np.zeros(2048)), ["has only one"]),
        (npz_of(images=np.zeros((4, 8, 8, 3), np.uint8)), ["neither arr_0 nor mu"]),
        (garbage, ["magic"]),
        (written(b"no archive"), []),
    ],
)
def test_a_set_that_cannot_be_used_is_named(tmp_path, save, words):
    save(tmp_path / "a.npz")
    said = fails(fid, tmp_path / "a.npz", "b.png", "--device cpu")
    for word in ("a.npz", *words):
        assert word in said


def test_statistics_that_cannot_be_used_are_refused(quick, sets, tmp_path):
    for mu, words in ((np.full(2048, np.nan), "NaN"), (np.zeros(64), "fit")):
        np.savez(tmp_path / "bad.npz", mu=mu, sigma=np.eye(len(mu)))
        assert words in fails(fid, tmp_path / "bad.npz", sets / "ref.npz", "--device cpu")
    np.savez(tmp_path / "one.npz", arr_0=random_images(0, 1, 8))
    said = fails(fid, tmp_path / "one.npz", sets / "ref.npz", "--device cpu")
    assert "at least 2 images, not 1" in said


def test_a_damaged_image_is_named_and_nothing_written(quick, tmp_path, capsys):
    for i, image in enumerate(random_images(0, 3, 64)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    whole = (tmp_path / "1.png").read_bytes()
    for damage in (b"", b"no image", whole[: len(whole) // 2], whole[:60] + bytes(20) + whole[80:]):
        (tmp_path / "1.png").write_bytes(damage)
        flags = ("--save_stats", tmp_path / "x.npz", "--batch 1 --device cpu")
        assert "1.png cannot be read" in fails(fid, tmp_path, *flags)
        assert not (tmp_path / "x.npz").exists() and capsys.readouterr().out == ""


def test_an_image_of_another_size_is_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 6)).save(tmp_path / "b.png")
    _, _, batches = open_set(tmp_path)
    with pytest.raises(fid.UserError, match="a.png.*8, 8, 3.*b.png.*6, 8, 3.*--crop"):
        list(batches([(0, 1), (1, 2)]))


def spoil(path, name):
    """Give an array of a .npz file a wrong checksum."""
    with zipfile.ZipFile(path) as archive:
        checksum = archive.getinfo(f"{name}.npy").CRC
    data = path.read_bytes()
    assert struct.pack("<L", checksum) in data
    path.write_bytes(data.replace(struct.pack("<L", checksum), struct.pack("<L", checksum ^ 1)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("spans", [[(0, 4), (4, 8), (8, 10)], [(3, 6), (9, 10)], [(0, 4)], []])
def test_every_process_has_its_images_of_a_npz_and_names_a_damaged_one(
    tmp_path, monkeypatch, save, spans
):
    images = random_images(0, 10, 64)
    save(tmp_path / "a.npz", arr_0=images, arr_1=np.arange(10))
    # Since Python 3.13 the checksum is not compared after a seek
    monkeypatch.setattr(zipfile.ZipExtFile, "seek", raises(AssertionError("a seek")))
    _, count, batches = open_set(tmp_path / "a.npz")
    assert count == 10
    for (start, stop), batch in zip(spans, batches(spans), strict=True):
        assert np.array_equal(batch, images[start:stop])
    spoil(tmp_path / "a.npz", "arr_0")
    with pytest.raises(fid.UserError, match="a.npz cannot be read.*CRC"):
        list(batches(spans))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_byte_in_a_npz_is_noticed(tmp_path, save):
    images = np.random.RandomState(0).randint(0, 256, (4, 64, 64, 3), np.uint8)
    save(tmp_path / "a.npz", arr_0=images)
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[20000] ^= 255
    (tmp_path / "a.npz").write_bytes(data)
    _, _, batches = open_set(tmp_path / "a.npz")
    with pytest.raises(fid.UserError, match="a.npz cannot be read"):
        list(batches([(0, 2), (2, 4)]))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_statistics_are_named(tmp_path, save):
    save(tmp_path / "a.npz", **{name: np.ones(shape) for name, shape in fid.STATISTICS.items()})
    spoil(tmp_path / "a.npz", "mu_s")
    with pytest.raises(fid.UserError, match="a.npz cannot be read.*CRC"):
        open_set(tmp_path / "a.npz")


# how the command is called, and how it ends


def test_flags_that_make_no_sense_end_with_the_usage(capsys):
    for flags, words in (
        ("r.npz", ["SAMPLES"]),
        ("r.npz --json x.json --save_stats x.npz", ["SAMPLES"]),
        ("r.npz s.npz --batch 0", ["--batch", "1 or more"]),
        ("r.npz s.npz --batch nan", ["--batch", "nan"]),
        ("r.npz s.npz --workers two", ["--workers", "invalid int value"]),
        ("r.npz s.npz --crop 0", ["--crop", "1 or more"]),
        ("r.npz s.npz --half_pixel 2", ["--half_pixel", "0, 1"]),
        ("r.npz s.npz --half 1", ["--half"]),
        ("'' s.npz", ["REF", "empty"]),
        ("r.npz ''", ["SAMPLES", "empty"]),
        *((f"r.npz s.npz --{name} ''", [f"--{name}", "empty"]) for name in ("json", "save_stats")),
        *((f"r.npz s.npz --{name} ''", [f"--{name}", "empty"]) for name in ("inception", "device")),
    ):
        _, error = usage_error(capsys, fid, flags).split("fid.py: error: ")
        for word in words:
            assert word in error


@pytest.mark.parametrize(
    "word, value",
    [("1", 1), ("2.5", 2.5), ("1e1", 10), ("-inf", None), ("inf", None), ("0.9", None)],
)
def test_a_number_is_finite_and_in_its_range(word, value):
    if value is not None:
        assert fid.number(float, 1)(word) == fid.number(float, 1, value)(word) == value
    else:
        with pytest.raises(ArgumentTypeError, match="not a finite number of 1 or more"):
            fid.number(float, 1)(word)


def test_flags_stand_before_between_and_after_the_sets(monkeypatch):
    words = "--half_pixel 1 ref.npz --batch 3 samples.npz --device cpu"
    monkeypatch.setattr(sys, "argv", ["fid.py", *words.split()])
    args = fid.parse_args()
    assert (args.ref, args.samples, args.half_pixel, args.batch) == ("ref.npz", "samples.npz", 1, 3)
    assert (args.workers, args.inception, args.device, args.crop) == (8, None, "cpu", None)


@pytest.mark.parametrize(
    "name, gpus, local_rank, expected",
    [
        (None, 0, None, "cpu"),
        (None, 1, None, "cuda:0"),
        (None, 4, "2", "cuda:2"),
        ("cuda", 4, "3", "cuda:3"),
        ("cuda:1", 2, None, "cuda:1"),
        ("cpu", 2, "1", "cpu"),
        ("cuda", 0, None, None),
        ("cuda:2", 2, None, None),
        (None, 2, "2", None),
        ("gpu", 2, None, None),
    ],
)
def test_device_is_the_named_one_or_that_of_the_local_rank(
    name, gpus, local_rank, expected, monkeypatch
):
    for variable in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    if expected is None:
        with pytest.raises(fid.UserError, match=f"is not there: PyTorch finds {gpus} GPUs"):
            fid.join_processes(name)
    else:
        assert fid.join_processes(name) == (0, 1, expected)
    assert current == ([expected] if expected and expected != "cpu" else [])


def ending(main):
    """What run_main gives to sys.exit: a string, which is printed and means status 1."""
    with pytest.raises(SystemExit) as stop:
        fid.run_main(main)
    assert isinstance(stop.value.code, str)
    return stop.value.code


def test_ctrl_c_ends_with_a_sentence_also_when_torchrun_sends_it_once_more(monkeypatch):
    ignored = []
    monkeypatch.setattr(signal, "signal", lambda *args: ignored.append(args))
    assert ending(raises(KeyboardInterrupt())) == "stopped; a training run goes on with --resume"
    assert ignored == [(signal.SIGINT, signal.SIG_IGN)]


@pytest.mark.parametrize("error", [TypeError("mine"), PermissionError(13, "denied", "x")])
def test_a_bug_and_an_error_of_the_system_end_with_their_traceback(sets, monkeypatch, error):
    net = types.SimpleNamespace(to=lambda device: raises(error))
    monkeypatch.setattr(fid, "load_inception", lambda *args: net)
    with pytest.raises(type(error)) as caught:
        fails(fid, sets / "ref.npz", sets / "samples.npz", "--device cpu")
    assert caught.value is error
    assert caught.traceback[-1].name == "call"  # the line in the network


def load(work, item):
    """A main that does this work in a loader process."""

    def main():
        batches = iter(DataLoader([item], batch_size=None, collate_fn=work, num_workers=1))
        try:
            next(batches)
        finally:
            batches._shutdown_workers()  # which takes 5 s when left to the garbage collector

    return main


@pytest.mark.parametrize("name", ["x.png", "two\nlines.png"])
def test_a_mistake_found_by_a_loader_process_is_its_own_sentence(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"no image")
    said = ending(load(fid.read_image, str(path)))
    assert said.startswith(f"{path} cannot be read (") and "Traceback" not in said


@pytest.mark.parametrize(
    "torchs_words",
    [
        "DataLoader worker (pid 1) is killed by signal: Killed.",
        "DataLoader worker (pid(s) 1, 2) exited unexpectedly",
    ],
)
def test_a_loader_process_that_died_ends_with_a_sentence_about_memory(torchs_words):
    said = ending(raises(RuntimeError(torchs_words)))
    for word in (torchs_words, "memory", "--shm-size", "--workers"):
        assert word in said


def test_a_bug_in_a_loader_process_ends_with_its_traceback():
    with pytest.raises(RuntimeError, match="Caught RuntimeError in DataLoader worker process 0"):
        fid.run_main(load(torch.device, "nonsense"))
    with pytest.raises(TypeError, match="Caught TypeError in DataLoader worker process 0"):
        fid.run_main(load(abs, "a word"))


def test_closed_streams_change_nothing(monkeypatch):
    done = []

    def work():
        print("a line", flush=True)
        done.extend(fid.tqdm([1, 2]))

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    fid.run_main(work)
    assert done == [1, 2]


def test_a_path_that_the_terminal_cannot_show_is_shown_somehow(tmp_path):
    (tmp_path / "\u0416").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "\u0416" / "x.png")
    with contextlib.redirect_stderr(io.TextIOWrapper(io.BytesIO(), "ascii")) as stderr:
        assert "nowhere" in fails(fid, tmp_path / "\u0416", "nowhere", "--device cpu")
        stderr.flush()
        assert b"\\u0416: 1 images" in stderr.buffer.getvalue()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_process_with_a_gpu_reduces_tensors_of_both_devices(tmp_path):
    x = torch.randn(50, 4)
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=store, rank=0, world_size=1
    )
    try:
        for device in ("cpu", "cuda"):
            statistics = fid.Statistics(4, device)
            statistics.update(x.to(device))
            mu, _ = statistics.finish()
            torch.testing.assert_close(mu.cpu(), x.double().mean(0))
    finally:
        torch.distributed.destroy_process_group()


def test_help_is_quick_narrow_and_shows_defaults():
    command, env = launch(1, "fid.py", "--help")
    start = time.time()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and time.time() - start < 15
    assert max(map(len, done.stdout.splitlines())) <= 100
    parts = ("torchrun", "REF  ", "--json FILE  ", "--batch N  ")
    places = [done.stdout.index(part) for part in parts]
    assert places == sorted(places)
    assert "(default: 64)" in done.stdout


# time and memory


@pytest.mark.slow
def test_frechet_distance_of_2048_dimensions_is_sqrtm_s():
    one, two = random_statistics(0, 5000, 2048), random_statistics(1, 5000, 2048)
    assert fid.frechet_distance(*one, *two) == pytest.approx(definition(*one, *two), rel=1e-6)


def peak_growth(body):
    """The MiB that a program prints, which has fid and peak(), the most memory so far."""
    code = f"""
import resource, sys, types, torch
sys.path.insert(0, {str(ROOT)!r})
import fid
def peak():
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
{body}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.slow
def test_a_npz_streams_through_little_memory(tmp_path):
    images = np.zeros((1200, 256, 256, 3), np.uint8)  # 225 MiB
    images[:, ::8] = 200
    np.savez(tmp_path / "stored.npz", arr_0=images)
    np.savez_compressed(tmp_path / "deflated.npz", arr_0=images)
    grown = peak_growth(f"""
args = types.SimpleNamespace(half_pixel=0, crop=None, workers=1)
before = peak()
for path in ({str(tmp_path / "stored.npz")!r}, {str(tmp_path / "deflated.npz")!r}):
    _, count, batches = fid.open_set(path, args)
    # every second batch is another process's
    for batch in batches([(i, i + 50) for i in range(0, count, 100)]):
        assert batch.shape == (50, 256, 256, 3)
print(peak() - before)""")
    assert grown < 120


@pytest.mark.slow
def test_precision_and_recall_of_5000_against_25000_stay_under_1_gib():
    # few dimensions: the features are no part of the count, and the time is
    grown = peak_growth("""
ref, samples = torch.randn(5000, 16), torch.randn(25000, 16)
before = peak()
fid.precision_recall(ref, samples)
print(peak() - before)""")
    assert grown < 1024
