"""fid.py: the network, the metrics, the sets of images and the command line."""

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "tests" / "reference"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands run below

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


def run(*args, ranks=0, script=ROOT / "fid.py"):
    command = [sys.executable]
    if ranks:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run([*command, str(script), *map(str, args)], capture_output=True, text=True)


def stops(monkeypatch, *args):
    """The sentence with which the command stops, run in this process."""
    monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        fid.main()
    sentence = stop.value.code  # a string: the exit status is 1
    assert isinstance(sentence, str) and "\n" not in sentence
    return sentence


def metrics(*args, ranks=0):
    """What the command prints, by name. Without ranks it runs in this process: no imports again."""
    args = [*map(str, args), "--device", "cpu", "--batch", "4"]
    if ranks:
        done = run(*args, ranks=ranks)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(io.StringIO()) as stdout,
        ):
            patch.setattr(sys, "argv", ["fid.py", *args])
            fid.main()
        printed = stdout.getvalue()
    pairs = (line.split(": ") for line in printed.splitlines())
    return {name: float(value) for name, value in pairs}


def assert_sentence(done, *words):
    """One line on stderr beside the progress bars, exit status 1, no traceback."""
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    sentence = done.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in sentence
    assert done.stdout == ""


# the network


def test_tensor_names_and_shapes_are_those_of_the_published_file():
    path = REFERENCE / "inception_2015_12_05.keys.txt"
    listed = dict((line.split("\t") + [""])[:2] for line in path.read_text().splitlines())
    ours = {key: "x".join(map(str, x.shape)) for key, x in fid.InceptionV3().state_dict().items()}
    assert ours == listed


@pytest.mark.parametrize("fused", [False, True])
def test_features_equal_the_reference_implementation(weights, net, fused):
    path = REFERENCE / "inception_seed0.npz"
    expected = np.load(path)
    if not fused:
        net = fid.InceptionV3()
        net.load_state_dict(torch.load(weights, weights_only=True))
    x = np.random.RandomState(500).randint(0, 256, (3, 3, 64, 64), dtype=np.uint8)
    pool, spatial = net(torch.from_numpy(x))
    probs = torch.from_numpy(expected["logits_unbiased"]).double().softmax(1)
    for ours, theirs in (
        (pool, expected["pool"]),
        (spatial, expected["spatial"]),
        (net.probs(pool), probs),
    ):
        torch.testing.assert_close(
            ours, torch.as_tensor(theirs), rtol=1e-4, atol=1e-4 * float(theirs.max())
        )


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


def test_frechet_distance_equals_clean_fid_and_pytorch_fid():
    mu1, sigma1 = random_statistics(0, 400, 40)
    mu2, sigma2 = random_statistics(1, 300, 40)
    ours = fid.frechet_distance(mu1, sigma1, mu2, sigma2)
    for name in ("cleanfid.fid", "pytorch_fid.fid_score"):
        module = pytest.importorskip(name, reason=f"{name} is not installed")
        theirs = getattr(module, "frechet_distance", None) or module.calculate_frechet_distance
        assert ours == pytest.approx(theirs(mu1, sigma1, mu2, sigma2), rel=1e-6)


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
    with pytest.raises(ValueError, match="Inception weights"):
        fid.load_inception(tmp_path / "w.pth")


def test_first_use_downloads_and_checks_the_hash(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(fid, "URL", weights.as_uri())
    with pytest.raises(FileNotFoundError, match="6726825d.*pt_inception-2015-12-05-6726825d.pth"):
        fid.load_inception()
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())
    (tmp_path / "hub" / "checkpoints" / fid.WEIGHTS).write_bytes(weights.read_bytes())
    assert fid.load_inception().fc.weight.shape == (1008, 2048)


def test_offline_says_which_file_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(fid, "URL", "http://127.0.0.1:9/" + fid.WEIGHTS)
    with pytest.raises(FileNotFoundError) as error:
        fid.load_inception()
    assert fid.URL in str(error.value)
    assert str(tmp_path / "checkpoints" / fid.WEIGHTS) in str(error.value)


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


def test_statistics_need_two_features():
    statistics = fid.Statistics(4)
    statistics.update(torch.ones(1, 4))
    with pytest.raises(ValueError, match="at least 2"):
        statistics.finish()


def definition(mu1, sigma1, mu2, sigma2):
    linalg = pytest.importorskip("scipy.linalg")
    root = linalg.sqrtm(sigma1 @ sigma2).real
    return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)


def test_frechet_distance_equals_the_definition():
    one, two = random_statistics(0, 500, 60), random_statistics(1, 400, 60)
    assert fid.frechet_distance(*one, *two) == pytest.approx(definition(*one, *two), rel=1e-9)
    tensors = [torch.from_numpy(x) for x in (*one, *two)]
    assert fid.frechet_distance(*tensors) == fid.frechet_distance(*one, *two)


def test_frechet_distance_of_commuting_covariances_of_low_rank():
    a, b = np.zeros(50), np.zeros(50)
    a[:20] = np.linspace(1, 3, 20)
    b[10:40] = np.linspace(2, 5, 30)
    q = np.linalg.qr(np.random.RandomState(0).standard_normal((50, 50)))[0]
    sigma1, sigma2 = q @ np.diag(a) @ q.T, q @ np.diag(b) @ q.T
    ours = fid.frechet_distance(np.zeros(50), sigma1, np.ones(50), sigma2)
    assert ours == pytest.approx(50 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-8)


@pytest.mark.parametrize("count", [5, 40, 300])
def test_frechet_distance_of_identical_sets_is_zero_at_any_rank(count):
    for seed in range(5):
        mu, sigma = random_statistics(seed, count, 200)
        sigma *= np.outer(10.0 ** -np.linspace(0, 5, 200), 10.0 ** -np.linspace(0, 5, 200))
        assert 0 <= fid.frechet_distance(mu, sigma, mu, sigma) < 1e-12 * np.trace(sigma)


def test_frechet_distance_of_fewer_images_than_dimensions():
    # between n images and the same scaled by 2 the distance is known: |mu|^2 + tr(sigma)
    mu, sigma = random_statistics(0, 30, 200)
    expected = mu @ mu + np.trace(sigma)
    assert fid.frechet_distance(mu, sigma, 2 * mu, 4 * sigma) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_from_a_single_point_repeated():
    mu, sigma = random_statistics(0, 30, 10)
    expected = 10 + np.trace(sigma)
    ours = fid.frechet_distance(mu + 1, np.zeros((10, 10)), mu, sigma)
    assert ours == pytest.approx(expected, rel=1e-12)


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


@pytest.mark.parametrize("count", [10, 23])
def test_inception_score_equals_the_definition_with_a_short_last_split(count):
    p = np.random.RandomState(0).dirichlet(np.ones(7), count)
    p[0] = np.eye(7)[0]
    scores = []
    for start in range(0, count, 10):
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
        own = ((balls[:, None] - balls[None]) ** 2).sum(-1)
        np.fill_diagonal(own, np.inf)
        radius = np.sort(own, 1)[:, k - 1]
        return (((points[:, None] - balls[None]) ** 2).sum(-1) <= radius).any(1).mean()

    return inside(ref.astype(np.float64), samples), inside(samples.astype(np.float64), ref)


@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_brute_force(offset, k):
    rs = np.random.RandomState(0)
    ref = (rs.standard_normal((150, 8)) + offset).astype(np.float32)
    samples = (0.8 * rs.standard_normal((130, 8)) + 0.4 + offset).astype(np.float32)
    expected = brute_force(ref, samples, k)
    assert 0.1 < expected[0] < 0.97 and 0.1 < expected[1] < 0.97
    assert fid.precision_recall(ref, samples, k) == pytest.approx(expected, abs=1e-12)


def test_precision_and_recall_are_the_same_over_block_borders():
    rs = np.random.RandomState(0)
    ref, samples = rs.standard_normal((2051, 3)), rs.standard_normal((2500, 3)) + 0.5
    scipy = pytest.importorskip("scipy.spatial")
    trees = [scipy.cKDTree(x) for x in (ref, samples)]
    radii = [tree.query(x, 4)[0][:, 3] for tree, x in zip(trees, (ref, samples))]
    cross = scipy.distance.cdist(samples, ref)
    expected = ((cross <= radii[0]).any(1).mean(), (cross <= radii[1][:, None]).any(0).mean())
    assert fid.precision_recall(ref, samples) == pytest.approx(expected, abs=1e-12)


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


def test_command_prints_the_five_metrics_in_order_and_writes_them(result, sets):
    assert list(result) == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    assert json.loads((sets / "out.json").read_text()) == result


def test_command_equals_the_functions_on_all_images_at_once(result, net, sets):
    features = [
        net(torch.from_numpy(np.load(sets / name)["arr_0"]).permute(0, 3, 1, 2))
        for name in ("ref.npz", "samples.npz")
    ]
    (ref_pool, ref_spatial), (pool, spatial) = [
        [x.double().numpy() for x in pair] for pair in features
    ]
    expected = [fid.inception_score(net.probs(torch.from_numpy(pool)))]
    for a, b in ((ref_pool, pool), (ref_spatial, spatial)):
        sigma_a, sigma_b = (np.cov(x, rowvar=False) for x in (a, b))
        expected.append(fid.frechet_distance(a.mean(0), sigma_a, b.mean(0), sigma_b))
    expected += fid.precision_recall(ref_pool, pool)
    assert list(result.values()) == pytest.approx(expected, rel=1e-4)


def test_a_folder_and_a_npz_of_the_same_images_have_the_same_statistics(weights, sets, tmp_path):
    folder, npz = tmp_path / "folder.npz", tmp_path / "npz.npz"
    assert metrics(sets / "samples", "--save_stats", folder, "--inception", weights) == {}
    assert metrics(sets / "samples.npz", "--save_stats", npz, "--inception", weights) == {}
    with np.load(folder) as one, np.load(npz) as two:
        assert one.files == ["half_pixel", *fid.STATISTICS, "pool"]
        for key in one.files:
            np.testing.assert_allclose(one[key], two[key], rtol=1e-6, atol=1e-9)


@pytest.fixture(scope="module")
def statistics_alone(result, sets):
    """A .npz file of statistics without features, such as that of an older version."""
    with np.load(sets / "stats.npz") as stored:
        np.savez(sets / "alone.npz", **{name: stored[name] for name in fid.STATISTICS})
    return sets / "alone.npz"


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_saved_reference_gives_all_metrics_without_the_network(
    result, weights, sets, ranks, monkeypatch
):
    passed, forward = [], fid.InceptionV3.forward

    def counted(net, x):
        passed.append(len(x))
        return forward(net, x)

    monkeypatch.setattr(fid.InceptionV3, "forward", counted)
    args = (sets / "stats.npz", sets / "samples.npz", "--inception", weights)
    again = metrics(*args, ranks=ranks)
    if ranks:
        assert again == pytest.approx(result, rel=1e-5)
    else:
        assert again == result and sum(passed) == 9  # those of SAMPLES


def test_a_saved_reference_of_a_reference_batch_keeps_both_of_its_parts(
    weights, sets, statistics_alone, tmp_path
):
    """ADM's files have the statistics of all images, and only some of the images."""
    with np.load(statistics_alone) as stored, np.load(sets / "samples.npz") as images:
        np.savez(tmp_path / "batch.npz", **stored, arr_0=images["arr_0"])
    flags = (sets / "ref.npz", "--inception", weights)
    saved = ("--save_stats", tmp_path / "saved.npz")
    first = metrics(tmp_path / "batch.npz", *flags, *saved)
    assert metrics(tmp_path / "saved.npz", *flags) == first
    with np.load(tmp_path / "saved.npz") as ours, np.load(statistics_alone) as stored:
        assert all(np.array_equal(ours[name], stored[name]) for name in stored)
        # ADM's evaluator reads these names beside arr_0; pytorch-fid the first two of them
        assert {name: x.shape for name, x in ours.items()} == {
            "half_pixel": (),
            **fid.STATISTICS,
            "pool": (9, 2048),
        }
        # With the images added it serves there, and here as before
        with np.load(tmp_path / "batch.npz") as batch:
            np.savez(tmp_path / "adm.npz", **ours, arr_0=batch["arr_0"])
    assert metrics(tmp_path / "adm.npz", *flags) == first


def test_a_saved_reference_is_not_mixed_with_images_that_are_resized_otherwise(sets, weights):
    args = (sets / "stats.npz", sets / "samples.npz", "--inception", weights)
    with pytest.raises(SystemExit, match="it was saved with --half_pixel 0"):
        metrics(*args, "--half_pixel")


def test_statistics_serve_as_reference_without_precision_and_recall(
    result, weights, sets, statistics_alone, capsys
):
    again = metrics(statistics_alone, sets / "samples.npz", "--inception", weights)
    assert list(again) == ["Inception Score", "FID", "sFID"]
    assert list(again.values()) == pytest.approx(list(result.values())[:3], rel=1e-6)
    assert "Precision is left out: it needs 4 images of both." in capsys.readouterr().err


@pytest.mark.parametrize("with_features", [False, True])
def test_what_is_stored_needs_neither_network_nor_images(
    sets, result, statistics_alone, with_features, capsys
):
    file = sets / "stats.npz" if with_features else statistics_alone
    alone = metrics(file, file, "--inception", "nowhere.pth")
    assert list(alone)[:2] == ["FID", "sFID"]
    assert max(alone["FID"], alone["sFID"]) < 1e-9 * result["FID"]
    assert list(alone.values())[2:] == ([1, 1] if with_features else [])
    assert "Inception Score is left out: it needs images of SAMPLES." in capsys.readouterr().err


def test_stored_statistics_go_before_those_of_the_images(
    result, weights, sets, statistics_alone, tmp_path
):
    with np.load(statistics_alone) as stored, np.load(sets / "samples.npz") as images:
        np.savez(tmp_path / "both.npz", **stored, arr_0=images["arr_0"])
    both = metrics(sets / "ref.npz", tmp_path / "both.npz", "--inception", weights)
    assert both["FID"] < 1e-6 * result["FID"] and both["sFID"] < 1e-6 * result["sFID"]
    assert both["Precision"] == result["Precision"]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_ranks_gives_the_same(result, weights, sets, ranks):
    # 11 and 9 images in batches of 4: three batches, so that of four ranks one has none
    args = (sets / "ref.npz", sets / "samples", "--inception", weights)
    assert metrics(*args, ranks=ranks) == pytest.approx(result, rel=1e-5)


def test_npz_is_read_alike_stored_or_deflated_whole_or_by_ranks(tmp_path):
    images = random_images(5, 10, 8)
    for save, name in ((np.savez, "stored.npz"), (np.savez_compressed, "deflated.npz")):
        save(tmp_path / name, arr_0=images, arr_1=np.arange(10))
        opened = fid.open_set(tmp_path / name)
        assert opened.count == 10
        for spans in ([(0, 4), (4, 8), (8, 10)], [(3, 6), (9, 10)]):
            for (start, stop), batch in zip(spans, opened.batches(spans, 1), strict=True):
                assert np.array_equal(batch, images[start:stop])


def test_folders_are_recursive_sorted_and_rgb(tmp_path):
    (tmp_path / "b").mkdir()
    Image.new("L", (3, 2), 7).save(tmp_path / "c.PNG")
    Image.new("RGB", (3, 2), (1, 2, 3)).save(tmp_path / "b" / "z.bmp")
    (tmp_path / "notes.txt").write_text("no image")
    opened = fid.open_set(tmp_path)
    (batch,) = opened.batches([(0, 2)], 2)
    assert opened.count == 2
    # In the order of names, whatever folders they are in
    assert batch[:, 0, 0].tolist() == [[7, 7, 7], [1, 2, 3]] and batch.shape == (2, 2, 3, 3)


# what goes wrong


def save_bad_sets(folder):
    images = random_images(0, 4, 8)
    np.savez(folder / "good.npz", arr_0=images)
    np.savez(folder / "float.npz", arr_0=images.astype(np.float32))
    np.savez(folder / "shape.npz", arr_0=images[..., 0])
    np.savez(folder / "one.npz", arr_0=images[:1])
    np.savez(folder / "pickled.npz", arr_0=np.array([{}], dtype=object))
    np.savez(folder / "pickled_mu.npz", mu=np.array([{}], dtype=object), sigma=np.eye(2048))
    np.savez(folder / "dimension.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(folder / "nan.npz", mu=np.full(2048, np.nan), sigma=np.eye(2048))
    np.savez(folder / "pool.npz", pool=np.zeros((4, 64)))
    np.savez(folder / "nan_pool.npz", pool=np.full((4, 2048), np.nan))
    np.savez(folder / "other.npz", images=images)
    (folder / "text.npz").write_text("no archive")
    (folder / "empty").mkdir()


@pytest.mark.parametrize(
    "name, words",
    [
        ("float.npz", ["float.npz", "uint8", "float32"]),
        ("shape.npz", ["shape.npz", "(4, 8, 8)"]),
        ("one.npz", ["one.npz", "2 or more"]),
        ("pickled.npz", ["pickled.npz", "object"]),
        ("pickled_mu.npz", ["pickled_mu.npz", "Object"]),
        ("dimension.npz", ["dimension.npz", "(2048,)", "(64,)"]),
        ("nan.npz", ["nan.npz", "finite"]),
        ("pool.npz", ["pool.npz", "(4, 64)"]),
        ("nan_pool.npz", ["nan_pool.npz", "finite"]),
        ("other.npz", ["other.npz", "arr_0"]),
        ("text.npz", ["text.npz"]),
        ("empty", ["empty", "0 images"]),
        ("missing", ["missing"]),
    ],
)
def test_a_set_that_cannot_be_used_is_named(tmp_path, name, words):
    save_bad_sets(tmp_path)
    assert fid.open_set(tmp_path / "good.npz").count == 4
    with pytest.raises(ValueError) as error:
        fid.open_set(tmp_path / name)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_damaged_image_is_named(tmp_path):
    for i in range(3):
        Image.fromarray(random_images(i, 1, 64)[0]).save(tmp_path / f"{i}.png")
    whole = (tmp_path / "1.png").read_bytes()
    for damage in (b"", b"no image", whole[: len(whole) // 2], whole[:60] + bytes(20) + whole[80:]):
        (tmp_path / "1.png").write_bytes(damage)
        batches = fid.open_set(tmp_path).batches
        with pytest.raises(ValueError, match="1.png cannot be read"):
            list(batches([(0, 3)], 2))


def test_an_image_of_another_size_or_depth_is_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 6)).save(tmp_path / "b.png")
    Image.new("I;16", (8, 8)).save(tmp_path / "c.png")
    batches = fid.open_set(tmp_path).batches
    with pytest.raises(ValueError, match="b.png.*6.*8.*a.png"):
        list(batches([(1, 2)], 1))
    with pytest.raises(ValueError, match="c.png.*8 bits"):
        list(batches([(2, 3)], 1))


def test_a_damaged_npz_is_named(tmp_path):
    rs = np.random.RandomState(0)
    np.savez(tmp_path / "a.npz", arr_0=rs.randint(0, 256, (4, 64, 64, 3), dtype=np.uint8))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[20000] ^= 255
    (tmp_path / "a.npz").write_bytes(data)
    batches = fid.open_set(tmp_path / "a.npz").batches
    with pytest.raises(ValueError, match="a.npz is damaged.*CRC"):
        list(batches([(0, 2), (2, 4)], 1))


def test_the_command_says_one_sentence_and_exits_with_1(sets, tmp_path, monkeypatch):
    ref = sets / "ref.npz"
    assert_sentence(run(ref, tmp_path / "nowhere"), "nowhere")
    assert_sentence(run(ref, ref, "--bogus"), "--bogus")
    for flags, words in (
        ("", ["SAMPLES"]),
        (f"{ref} --batch 0", ["--batch", "1 or more"]),
        (f"{ref} --workers two", ["--workers", "two"]),
        (f"{ref} --json {tmp_path}/no/x.json", ["--json", "x.json"]),
        (f"{ref} --half_pixel 2", ["--half_pixel", "0 or 1"]),
        (f"--tf32 {ref}", ["--tf32", "after REF and SAMPLES"]),
        (f"{ref} --device tpu", ["--device tpu", "cpu"]),
        (f"{ref} --device cuda:99", ["--device cuda:99", "cpu"]),
        (f"{ref} --device cpu --inception {tmp_path}/no.pth", ["no.pth", fid.URL]),
    ):
        sentence = stops(monkeypatch, ref, *flags.split())
        for word in words:
            assert word in sentence


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", (0, 0)),
        ("--half_pixel", (1, 0)),
        ("--half_pixel 0 --tf32 1", (0, 1)),
        ("--tf32", (0, 1)),
    ],
)
def test_switches_are_on_alone_or_with_1(flags, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fid.py", "ref.npz", "samples.npz", *flags.split()])
    args = fid.parse_args()
    assert (args.half_pixel, args.tf32) == expected


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
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    if expected is None:
        with pytest.raises(fid.UserError, match="is not available; choose from cpu"):
            fid.choose_device(name)
    else:
        assert fid.choose_device(name) == torch.device(expected)
    assert current == ([expected] if expected and expected != "cpu" else [])


def test_processes_other_than_local_rank_0_wait_before_they_stop(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(fid.time, "sleep", waits.append)
    for local_rank, expected in ((None, []), ("0", []), ("1", [10])):
        if local_rank:
            monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert "nowhere" in stops(monkeypatch, tmp_path / "nowhere", tmp_path)
        assert waits == expected


def test_under_torchrun_one_process_says_what_all_have_seen(sets):
    done = run(sets / "ref.npz", sets / "nowhere", "--device", "cpu", ranks=2)
    assert done.returncode == 1
    assert done.stderr.count(f"There is no folder or .npz file {sets / 'nowhere'}.") == 1


DOWNLOADS = """
import shutil, sys, torch
import torch.distributed as dist
sys.path.insert(0, {root!r})
import fid
dist.init_process_group("gloo")
torch.hub.get_dir = lambda: {hub!r}
def say(text):
    sys.stdout.write(text + chr(10))  # in one piece: two processes share the pipe
    sys.stdout.flush()
def download(url, path, *args, **kwargs):
    say(f"downloads: {{fid.local_rank()}}")
    if failing:
        raise OSError("no connection")
    shutil.copy({weights!r}, path)
torch.hub.download_url_to_file = download
for failing in (True, False):
    try:
        say(f"loaded: {{fid.load_inception().fc.out_features}}")
    except fid.MissingFile as error:
        say(f"missing: {{error}}")
dist.barrier()
dist.destroy_process_group()
"""


def test_one_process_downloads_and_all_hear_of_it(weights, tmp_path):
    script = tmp_path / "downloads.py"
    names = {"root": str(ROOT), "hub": str(tmp_path / "hub"), "weights": str(weights)}
    script.write_text(DOWNLOADS.format(**names))
    done = run(ranks=2, script=script)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("downloads: 0") == 2 and "downloads: 1" not in lines
    missing = [line for line in lines if line.startswith("missing")]
    assert len(missing) == 2 and len(set(missing)) == 1 and "no connection" in missing[0]
    assert lines.count("loaded: 1008") == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nccl_takes_features_on_the_cpu_and_on_the_gpu(tmp_path):
    ref, samples = torch.randn(50, 4), torch.randn(40, 4)
    expected = fid.precision_recall(ref, samples)
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("nccl", init_method=store, rank=0, world_size=1)
    try:
        for device in ("cpu", "cuda"):
            found = fid.precision_recall(ref.to(device), samples.to(device))
            assert found == pytest.approx(expected)
            statistics = fid.Statistics(4, device)
            statistics.update(ref.to(device))
            mu, _ = statistics.finish()
            torch.testing.assert_close(mu.cpu(), ref.double().mean(0))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("content", [None, b"", b"no weights", pickle.dumps(os.getcwd, 2)])
def test_a_file_without_the_weights_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ValueError, match="w.pth cannot be read as the Inception weights"):
        fid.load_inception(tmp_path / "w.pth")


def test_a_damaged_image_stops_the_command(weights, tmp_path):
    for i, image in enumerate(random_images(0, 4)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:100])
    done = run(tmp_path, "--save_stats", tmp_path / "x.npz", "--inception", weights, "--batch", 2)
    assert_sentence(done, "3.png")
    assert not (tmp_path / "x.npz").exists()


def test_help_is_quick_grouped_and_narrow():
    start = time.time()
    done = run("--help")
    assert done.returncode == 0 and time.time() - start < 15
    assert max(map(len, done.stdout.splitlines())) <= 100
    places = [done.stdout.index(word) for word in ("torchrun", "output:", "speed:")]
    assert places == sorted(places)


# time and memory


@pytest.mark.slow
def test_frechet_distance_of_2048_dimensions_is_sqrtm_s():
    linalg = pytest.importorskip("scipy.linalg")
    one, two = random_statistics(0, 5000, 2048), random_statistics(1, 5000, 2048)
    root = linalg.sqrtm(one[1] @ two[1])
    expected = ((one[0] - two[0]) ** 2).sum() + np.trace(one[1] + two[1] - 2 * root.real)
    assert fid.frechet_distance(*one, *two) == pytest.approx(expected, rel=1e-6)


PEAK = """
import resource, sys, torch
sys.path.insert(0, {root!r})
import fid
def peak():
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
{body}
"""


def peak_growth(body):
    code = PEAK.format(root=str(ROOT), body=body)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_npz_streams_through_little_memory(tmp_path, save):
    images = np.zeros((2000, 256, 256, 3), np.uint8)  # 375 MiB
    images[:, ::8] = 200
    save(tmp_path / "large.npz", arr_0=images)
    grown = peak_growth(f"""
opened = fid.open_set({str(tmp_path / "large.npz")!r})
before, total = peak(), 0
for batch in opened.batches([(i, i + 50) for i in range(0, opened.count, 50)], 1):
    total += len(batch)
assert total == 2000
print(peak() - before)""")
    assert grown < 120


@pytest.mark.slow
def test_precision_and_recall_of_10000_against_50000_stay_under_2_gib():
    # few dimensions: the features are no part of the count, and the time is
    grown = peak_growth("""
ref, samples = torch.randn(10000, 16), torch.randn(50000, 16)
before = peak()
fid.precision_recall(ref, samples)
print(peak() - before)""")
    assert grown < 2048
