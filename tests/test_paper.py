"""The paper's comparison at the demo's scale, with a few steps of small models."""

import json
import math
import os
import signal
import threading
import time

import paper
import pytest
from conftest import fails, run

import train_ae


@pytest.fixture
def few_digits(monkeypatch):
    """Fifty digits to train on, twenty held out."""
    init = train_ae.Images.__init__

    def few(images, folder=None, held_out=False):
        init(images, folder, held_out)
        every = 25 if held_out else 90
        images.pixels, images.labels = images.pixels[::every], images.labels[::every]

    monkeypatch.setattr(train_ae.Images, "__init__", few)


def rows_of(tables, title):
    """The rows of the first table below this title, without header, as lists of cells."""
    lines, *_ = [
        part.splitlines()
        for part in tables.split(f"### {title}")[1].split("### ")[0].split("\n\n")
        if part.startswith("|")
    ]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[2:]]


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_the_comparison_has_a_row_for_each_and_goes_on_where_it_was(
    tmp_path, few_digits, monkeypatch
):
    flags = ("--smoke --jobs 1 --seeds 1 --out", tmp_path)
    # Stopped after the classifier and what is timed
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(paper, "run_all", interrupt)
        run(paper, *flags)
    assert (tmp_path / "speed.json").exists() and not list(tmp_path.rglob("result.json"))

    run(paper, *flags)
    tables = (tmp_path / "tables.md").read_text()
    assert (tmp_path / "pictures.png").exists()
    for title in ("0.2 training seconds", "4 training steps"):
        rows = rows_of(tables, f"Samples and reconstructions, {title}")
        assert [row[0] for row in rows] == [*paper.NAMES.values(), "held-out digits"]
        for _, distance, spatial, score, precision, recall, accuracy, *_ in rows:
            assert 0 <= float(distance) < 100 and 0 <= float(spatial) < 1000
            assert 1 <= float(score) <= 10
            assert all(0 <= float(share) <= 1 for share in (precision, recall, accuracy))
        # Real digits are closer to real ones than anything that four steps have taught.
        assert float(rows[-1][1]) < min(float(row[1]) for row in rows[:-1])
        assert all(3 < float(row[7]) < 40 and -1 < float(row[8]) < 1 for row in rows[:-1])
        smoothness = rows_of(tables, f"Smoothness, {title}")
        assert [len(row) for row in smoothness] == [1 + len(train_ae.EPS)] * 6
    assert [row[-1] for row in rows_of(tables, "Ablation of VMAE")] == ["1", "1", "1"]
    regularisers = rows_of(tables, "Latent regularisers of VMAE")
    assert [row[0] for row in regularisers] == list(paper.REGULARISERS)
    for *_, posterior_std, runs in regularisers:
        assert runs == "1" and 10 < float(posterior_std) < 1000  # percent

    # A second call reads the results and trains nothing.
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    for name in ("run_piece", "timed", "train_classifier"):
        monkeypatch.setattr(paper, name, pytest.fail)
    run(paper, *flags)
    assert (tmp_path / "tables.md").read_text() == tables
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}

    # Results of other recipes are not mixed in.
    monkeypatch.setitem(paper.SMOKE, "seconds", 0.3)
    message = fails(paper, *flags)
    assert "other settings" in message and "its seconds is 0.2 and not 0.3" in message


def test_a_budget_of_seconds_becomes_steps():
    budget = paper.BUDGET
    alike = {"first": 0.1, "second": 0.1, "second_is": None}
    assert paper.steps_for(60, alike, budget) == [600, 0]
    # The discriminator doubles the time of the second half of an SD-VAE's steps.
    adversarial = {"first": 0.1, "second": 0.2, "second_is": "adversarial"}
    assert paper.steps_for(60, adversarial, budget) == [400, 0]
    tuned = {"first": 0.1, "second": 0.05, "second_is": "tuning"}
    steps, tuning = paper.steps_for(60, tuned, budget)
    assert math.isclose(0.1 * steps + 0.05 * tuning, 60, rel_tol=0.01)


def test_one_run_has_no_spread_and_none_is_a_dash():
    assert paper.mean_and_spread([]) == "-"
    assert paper.mean_and_spread([0.51234]) == "0.512"
    assert paper.mean_and_spread([1001.2]) == "1001.2"
    assert paper.mean_and_spread([10.0, 12.0]) == "11.0 ± 1.4"


def test_results_are_computed_once(tmp_path):
    path = tmp_path / "a" / "result.json"
    assert paper.remembered(path, lambda: {"a": 1}) == {"a": 1}
    assert paper.remembered(path, None) == json.loads(path.read_text()) == {"a": 1}


def work_for_a_minute(path):
    path.touch()
    time.sleep(60)


@pytest.mark.slow
def test_a_signal_ends_the_workers_and_not_their_piece_alone(tmp_path):
    pieces = [tmp_path / str(number) for number in range(6)]

    def interrupt_when_two_work():
        while not all(path.exists() for path in pieces[:2]):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as paper.main
    threading.Thread(target=interrupt_when_two_work).start()
    try:
        with pytest.raises(KeyboardInterrupt), paper.workers(2) as as_they_end:
            list(as_they_end(work_for_a_minute, pieces))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.time() - pieces[0].stat().st_mtime < 30
    assert not all(path.exists() for path in pieces)
