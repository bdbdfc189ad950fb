"""The paper's comparison at the demo's scale: six autoencoders, the same DiT on each one's latents.

    python tests/paper.py                     some hours on two cores, for three seeds
    python tests/paper.py --seeds 1           one run of each instead of three

Writes tables.md, which tests/RESULTS.md shows as it is, and pictures.png into --out, after each
seed and at the end. It can be stopped at any time (Ctrl-C): the same command goes on.

What it does, in this order, on the demo's digits and with the demo's models:

1. It trains a classifier of digits, which takes the place of Inception: no network that is trained
   on photographs says much about digits.
2. It measures how long a step of each autoencoder takes, alone on one thread, and turns the budget
   of seconds into steps. From then on no clock decides anything, and the same steps give the same
   numbers.
3. It chooses each autoencoder's learning rate: half of the demo's, the demo's or its double,
   whichever reconstructs the held-out digits best (PSNR) at the end of a whole run, so that what
   comes late in a run, as SD-VAE's discriminator does, counts for what it is. That run is the first
   of the comparison.
4. It trains each autoencoder for the same time, then the same DiT on its latents, and draws
   samples; likewise for the rows of the paper's ablation that need no LPIPS, and for VMAEs with
   other priors and weights of the latent regulariser. It does so for each seed.
5. It compares the six at the same number of steps, one run each.

The warm-up takes the same share of every run, and SD-VAE's discriminator joins at the same point
of it. VMAE's budget includes the tuning of its decoder, both stages with the chosen factor. The
rows of the ablation and of the regularisers have VMAE's steps and rates. The DiT's settings and the
guidance are the demo's, the same for all, as in the paper; the demo's were chosen on VMAE's
latents, which is in its favour.

The held-out digits choose the learning rates and are what reconstructions are judged on; samples
are judged against the training digits, since a DiT draws those.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import io
import json
import math
import multiprocessing
import signal
import statistics
import sys
import textwrap
import time
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ae
import fid
import sample
import train_ae
import train_dit

# ---- Recipes: what the comparison spends ----

BUDGET = dict(
    seconds=240.0,  # of training for each autoencoder, on one thread
    steps=400,  # of the comparison at equal steps
    rates=[0.5, 1.0, 2.0],  # learning rates that are tried, in units of the demo's
    warmup=0.1,  # share of a run's steps in which the learning rate rises
    disc_start=0.5,  # share of an SD-VAE's steps before the discriminator joins
    disc_weight=0.1,  # SD-VAE's lambda_D; the demo's, 0.5, wants a longer run
    tuning=0.3,  # share of VMAE's seconds, or steps, that tune its decoder
    timed=60,  # steps that are timed
    dit_steps=1200,
    samples=2000,
    sample_steps=25,
    classifier_epochs=25,
    flags={},  # of the scripts, by model
)
# A few steps of small models, which show that all of it runs.
SMOKE = BUDGET | dict(
    seconds=0.2,
    steps=4,
    rates=[1.0],
    timed=2,
    dit_steps=3,
    samples=60,
    sample_steps=2,
    classifier_epochs=1,
    flags=dict.fromkeys(("ae", "dae", "vae", "sdvae"), "--batch 4 --channels 32 32 32 32")
    | dict.fromkeys(("mae", "vmae"), "--hidden_size 32 --depth 1 --decoder_depth 1 --num_heads 2"),
)

NAMES = {"ae": "AE", "dae": "DAE", "vae": "VAE", "sdvae": "SD-VAE", "mae": "MAE", "vmae": "VMAE"}

# Each row adds a term to VMAE's objective. The last of the paper, LPIPS, needs a download.
ABLATION = {
    "MSE only": "--mask_ratio 0 --kl 0",
    "+ masked prediction": "--kl 0",
    "+ latent regulariser": "",
}
# VMAE's KL: prior std and weight. The release has the last row, the main paper std 1 and no weight.
REGULARISERS = {
    "std 1, weight 1e-6": "",
    "std 1, weight 1e-5": "--kl 1e-5",
    "std 1, weight 1e-4": "--kl 1e-4",
    "std 1, weight 1e-3": "--kl 1e-3",
    "std 1e-3, weight 1e-6": "--prior_std 1e-3",
}


# ---- The comparison ----


def main():
    args = parse_args()
    threads = torch.get_num_threads()
    # Scripts beside each other do not share threads, and results do not depend on the machine's.
    torch.set_num_threads(1)
    on_sigterm = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        compare(args, SMOKE if args.smoke else BUDGET)
    finally:
        torch.set_num_threads(threads)
        signal.signal(signal.SIGTERM, on_sigterm)


def parse_args():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--out", default="out/paper", type=Path, help="folder for all results")
    count = fid.number(int, 1)
    add("--jobs", default=2, type=count, help="scripts at a time, of one thread each (default: 2)")
    add("--seeds", default=3, type=count, help="runs of each autoencoder (default: 3)")
    add("--smoke", action="store_true", help="a few steps of small models, to see that it runs")
    return parser.parse_args()


def compare(args, budget):
    """All of it, or what is left of it."""
    out = args.out
    sample.claim(out, recipes(budget))
    if not (out / "classifier.pt").exists():
        print("training the classifier", flush=True)
        net = train_classifier(budget["classifier_epochs"])
        with fid.whole_file(out / "classifier.pt") as file:
            torch.save(net.state_dict(), file)
    speed = remembered(out / "speed.json", lambda: measure_speed(out, budget))

    search = {
        (m, rate): at_equal_seconds(m, rate, 0, speed, budget) | {"with_dit": False}
        for m in NAMES
        for rate in budget["rates"]
    }
    found = run_all(search.values(), args, budget)
    psnr = {key: found[piece["name"]]["PSNR"] for key, piece in search.items()}
    best = {m: max(budget["rates"], key=lambda rate: psnr[m, rate]) for m in NAMES}

    first = {m: out / at_equal_seconds(m, best[m], 0, speed, budget)["name"] for m in NAMES}
    stages = []
    for seed in range(args.seeds):
        stage = [at_equal_seconds(m, best[m], seed, speed, budget) for m in NAMES]
        for folder, rows in (("ablation", ABLATION), ("regulariser", REGULARISERS)):
            stage += [variant(folder, rows, row, best["vmae"], seed, speed, budget) for row in rows]
        stages.append(stage)
    stages.append([at_equal_steps(m, best[m], 0, budget) for m in NAMES])

    pieces = []
    for stage in stages:
        pieces += stage
        results = run_all(pieces, args, budget)
        print("\n" + write_tables(out, budget, speed, psnr, best, results))
        draw_pictures(first, out / "pictures.png")
        print(f"wrote {out}/tables.md and {out}/pictures.png")


def recipes(budget):
    """All that decides the results; those in --out must have been made with the same."""
    autoencoders = {name: recipe | demo for name, (recipe, demo) in train_ae.RECIPES.items()}
    dit = train_dit.RECIPE | train_dit.DEMO | {"sampling": train_dit.DEMO_SAMPLING}
    # As it is after reading
    return json.loads(json.dumps(budget | {"autoencoders": autoencoders, "dit": dit}))


def remembered(path, compute):
    """What the JSON file holds; the first time, it is computed and written."""
    if not path.exists():
        value = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        with fid.whole_file(path) as file:
            file.write(json.dumps(value, indent=1).encode())
    return json.loads(path.read_text())


# ---- Pieces: an autoencoder, and perhaps a DiT on it; each has a folder and results in it ----


def at_equal_seconds(model, rate, seed, speed, budget):
    steps = steps_for(budget["seconds"], speed[model], budget)
    return piece(f"seconds/{model}-x{rate:g}-{seed}", model, steps, rate, seed)


def at_equal_steps(model, rate, seed, budget):
    tuning = round(budget["tuning"] * budget["steps"]) if model == "vmae" else 0
    return piece(f"steps/{model}-{seed}", model, [budget["steps"] - tuning, tuning], rate, seed)


def variant(folder, rows, row, rate, seed, speed, budget):
    """A VMAE with the flags rows[row]. The row without flags is the VMAE of the comparison at equal
    seconds, and is not trained again."""
    if not rows[row]:
        return at_equal_seconds("vmae", rate, seed, speed, budget)
    name = f"{folder}/{list(rows).index(row)}-{seed}"
    steps = steps_for(budget["seconds"], speed["vmae"], budget)
    return piece(name, "vmae", steps, rate, seed, rows[row])


def piece(name, model, steps, rate, seed, flags=""):
    """steps: of training and of the decoder's tuning; flags: of the training alone."""
    return dict(
        name=name, model=model, steps=steps, rate=rate, seed=seed, flags=flags, with_dit=True
    )


def steps_for(seconds, per_step, budget):
    """[steps, steps of tuning] that take this long; per_step as in measure_speed."""
    first, second = per_step["first"], per_step["second"]
    if per_step["second_is"] == "tuning":
        shares = (1 - budget["tuning"], budget["tuning"])
        return [max(1, round(s * seconds / t)) for s, t in zip(shares, (first, second))]
    share = budget["disc_start"]
    return [max(1, round(seconds / (share * first + (1 - share) * second))), 0]


def run_all(pieces, args, budget):
    """Results by the pieces' names; those that are not there yet are computed, --jobs at a time."""
    pieces = list({piece["name"]: piece for piece in pieces}.values())
    results, waiting = {}, []
    for piece in pieces:
        path = result_of(piece, args.out)
        if path.exists():
            results[piece["name"]] = json.loads(path.read_text())
        else:
            waiting.append(piece)

    work = functools.partial(run_piece, out=args.out, budget=budget)
    with workers(min(args.jobs, len(waiting))) as as_they_end:
        for piece, result in as_they_end(work, waiting):
            results[piece["name"]] = result
            told = "  ".join(f"{k} {v:.4g}" for k, v in result.items() if isinstance(v, float))
            print(f"{len(results)} of {len(pieces)}: {piece['name']}  {told}", flush=True)
    return results


def result_of(piece, out):
    return out / piece["name"] / ("result.json" if piece["with_dit"] else "autoencoder.json")


@contextlib.contextmanager
def workers(number):
    """Gives a function that applies another to each of a list and yields (item, result).

    With one worker that happens in this process.
    """
    if number <= 1:
        yield lambda work, items: ((item, work(item)) for item in items)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        number, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    )

    def as_they_end(work, items):
        futures = {pool.submit(work, item): item for item in items}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()

    try:
        yield as_they_end
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def run_piece(piece, out, budget):
    """Train, judge, and remember the result."""
    folder = out / piece["name"]
    started = time.time()
    path = train_autoencoder(piece, folder, budget)
    classifier = load_classifier(out)
    result = judge_reconstructions(ae.load(path), classifier)
    if piece["with_dit"]:
        samples = generate(path, piece["seed"], folder, budget)
        images, labels = (torch.from_numpy(array) for array in samples)
        result |= judge_images(images, labels, classifier)
    result["seconds"] = time.time() - started  # of all that, with whatever ran beside it
    return remembered(result_of(piece, out), lambda: result)


def train_autoencoder(piece, folder, budget):
    """Train an autoencoder and, of a VMAE, tune its decoder; returns the checkpoint's path."""
    model, (steps, tuning), factor = piece["model"], piece["steps"], piece["rate"]
    _, recipe = train_ae.RECIPES[model]
    warmup = budget["warmup"] * steps * recipe["batch"] / len(train_ae.Images())  # in epochs
    sizes = budget["flags"].get(model, "").split()
    flags = ["--model", model, *sizes, *piece["flags"].split(), "--seed", piece["seed"]]
    flags += ["--steps", steps, "--warmup", warmup, "--base_lr", factor * recipe["base_lr"]]
    if model == "sdvae":
        flags += ["--disc_start", 1 + round(budget["disc_start"] * steps)]
        flags += ["--disc_weight", budget["disc_weight"]]
    path = train(train_ae, folder / "ae", flags)
    if tuning:
        rate = factor * train_ae.DEMO_TUNE["base_lr"]
        flags = ["--tune_decoder", "--init", path, "--seed", piece["seed"]]
        flags += ["--steps", tuning, "--base_lr", rate]
        path = train(train_ae, folder / "tuned", flags)
    return path


def generate(path, seed, folder, budget):
    """Train the DiT on an autoencoder's latents -> images uint8 (N, H, W, 3), classes (N,)."""
    flags = ["--ae", path, "--steps", budget["dit_steps"], "--seed", seed]
    flags += ["--sample_steps", budget["sample_steps"]]
    dit_path = train(train_dit, folder / "dit", flags)
    archive = folder / "dit" / "samples.npz"
    if not archive.exists():
        flags = ["--ckpt", dit_path, "--seed", seed, "--batch", 250]
        call(sample, [*flags, "--num", budget["samples"], "--npz"], folder / "dit")
    with np.load(archive) as samples:
        return samples["arr_0"], samples["arr_1"]


def train(script, folder, flags):
    """Run a training script to its end, or what is left of it; returns the checkpoint's path."""
    call(script, [*flags, "--device", "cpu", "--resume"], folder)
    return folder / "ckpt.pt"


def call(script, flags, folder):
    """Run a script in this process; what it prints goes to log.txt in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    argv, sys.argv = sys.argv, [f"{script.__name__}.py", *map(str, flags), "--out", str(folder)]
    try:
        with (
            open(folder / "log.txt", "a") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            script.main()
    finally:
        sys.argv = argv


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def measure_speed(out, budget):
    """Seconds per step by model, before and after what changes them within a run.

    That is an SD-VAE's discriminator, and the tuning of a VMAE's decoder.
    """
    print("timing a step of each autoencoder, alone", flush=True)
    speed = {}
    for model in NAMES:
        second_is = None
        if model == "sdvae":
            first = timed(model, "before", out, budget, "--disc_start", budget["timed"] + 1)
            second = timed(model, "after", out, budget, "--disc_start", 1)
            second_is = "adversarial"
        else:
            first = second = timed(model, "training", out, budget)
        if model == "vmae":
            start = out / "speed" / "vmae-training" / "ckpt.pt"
            second = timed(model, "tuning", out, budget, "--tune_decoder", "--init", start)
            second_is = "tuning"
        speed[model] = {"first": first, "second": second, "second_is": second_is}
        print(f"{NAMES[model]}: {first:.4f}, {second:.4f} s", flush=True)
    return speed


def timed(model, part, out, budget, *flags):
    """Seconds per step: the median over the log's lines after the first, which is the warm-up."""
    folder, steps = out / "speed" / f"{model}-{part}", budget["timed"]
    # The tuning takes the sizes of its --init.
    sizes = [] if "--init" in flags else budget["flags"].get(model, "").split()
    every = max(1, steps // 10)
    flags = ["--model", model, *sizes, *flags, "--steps", steps, "--log_every", every]
    train(train_ae, folder, flags)
    batch = ae.read_checkpoint(folder / "ckpt.pt")["args"]["batch"]
    return batch / statistics.median(line["images_per_s"] for line in log_of(folder)[1:])


# ---- The judge: a classifier of digits ----


class Classifier(nn.Module):
    """A small convolutional network that tells digits (B, 1, 32, 32) in [0, 1] apart."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 8 * 8, 128)
        self.out = nn.Linear(128, 10)

    def maps(self, x):
        """What the second pooling gives, (B, 64, 8, 8)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        return F.max_pool2d(F.relu(self.conv2(x)), 2)

    def features(self, x):
        """The hidden layer, (B, 128)."""
        maps = self.maps(x).flatten(1)
        return F.relu(self.hidden(F.dropout(maps, 0.3, self.training)))

    def spatial(self, x):
        """The first 7 channels of the maps, as sFID takes 7 of Inception's: (B, 448)."""
        return self.maps(x)[:, :7].flatten(1)

    def forward(self, x):
        return self.out(self.features(x))


def digits(held_out):
    """The bundled digits (N, 1, 32, 32) in [0, 1], with their labels."""
    images = train_ae.Images(None, held_out)
    return torch.from_numpy(images.pixels).float()[:, None] / 255, torch.from_numpy(images.labels)


def grey(images):
    """Images uint8 (N, H, W, 3) -> the classifier's (N, 1, H, W) in [0, 1]."""
    return images.float().mean(-1)[:, None] / 255


def train_classifier(epochs=25):
    torch.manual_seed(0)
    x, y = digits(held_out=False)
    net = Classifier()
    optimizer = torch.optim.AdamW(net.parameters())
    steps = epochs * math.ceil(len(x) / 100)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(100):
            # Small rotations, scales and shifts
            affine = torch.eye(2, 3) + 0.1 * torch.randn(len(rows), 2, 3)
            grid = F.affine_grid(affine, x[rows].shape, align_corners=False)
            loss = F.cross_entropy(net(F.grid_sample(x[rows], grid, align_corners=False)), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval().requires_grad_(False)


def load_classifier(out):
    net = Classifier()
    net.load_state_dict(torch.load(out / "classifier.pt", weights_only=True))
    return net.eval().requires_grad_(False)


def distance(a, b):
    """The Frechet distance of two sets of features (N, d)."""
    sets = []
    for features in (a, b):
        statistics = fid.Statistics(features.shape[1])
        statistics.update(features)
        sets += statistics.finish()
    return fid.frechet_distance(*sets)


@functools.cache
def training_features(net):
    """Of the training digits, whose distance and neighbourhoods samples are judged by."""
    x, _ = digits(held_out=False)
    return net.features(x), net.spatial(x)


def judge_images(images, labels, net):
    """Samples, uint8 (N, H, W, 3), of these classes against the training digits."""
    x = grey(images)
    features, spatial = net.features(x), net.spatial(x)
    real, real_spatial = training_features(net)
    logits = net.out(features)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        precision, recall = fid.precision_recall(real, features)
    return {
        "gFD": distance(real, features),
        "sFD": distance(real_spatial, spatial),
        "IS": fid.inception_score(logits.softmax(1)),
        "precision": precision,
        "recall": recall,
        "accuracy": (logits.argmax(1) == labels).double().mean().item(),
    }


@torch.no_grad()
def judge_reconstructions(autoencoder, net):
    """Of the held-out digits: train_ae.py --eval's measures, and rFD in the classifier's features.

    "rFD at eps" are those of decodings with noise on the latents. "posterior std, %" is the
    posterior's (rms) in percent of its channel's std over all images, averaged over the channels.
    """
    images = train_ae.Images(held_out=True)
    args = types.SimpleNamespace(micro_batch=50, workers=0, seed=0)
    crop = functools.partial(train_ae.crop_for_judging, autoencoder.image_size)
    batches = functools.partial(train_ae.batches_to_judge, args, images, crop, "cpu")
    originals, decoded = [], []

    def keep_features(x_hat, x):
        """Stands where LPIPS does, which sees each batch once for each eps."""
        for kept, pixels in ((originals, x), (decoded, x_hat)):
            kept.append(net.features(grey(torch.from_numpy(sample.to_uint8(pixels)))))
        return torch.zeros(len(x))

    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        std, _ = train_ae.latents_std(autoencoder, batches("latents"), None)
        quality = train_ae.reconstructions(
            args, autoencoder, batches("reconstructions"), std, keep_features, None
        )
        variances = [
            autoencoder.encode(x).logvar.exp().mean((0, 2, 3)) for _, x in batches("posterior")
        ]
    number = len(train_ae.EPS)
    real = torch.cat(originals[::number])
    distances = [distance(real, torch.cat(decoded[k::number])) for k in range(number)]
    measured = {name: quality[name] for name in ("L1", "PSNR", "SSIM")}
    percent = 100 * (torch.stack(variances).mean(0).sqrt() / std).mean().item()
    return measured | {
        "rFD": distances[0],
        "rFD at eps": distances[1:],
        "posterior std, %": percent,
    }


# ---- Tables and the picture ----


def write_tables(out, budget, speed, psnr, best, results):
    """tables.md: a Markdown text with what was spent and what came of it."""
    judge = load_classifier(out)
    held = train_ae.Images(held_out=True)
    pixels = torch.from_numpy(held.pixels)[..., None].expand(-1, -1, -1, 3)
    real = judge_images(pixels, torch.from_numpy(held.labels), judge)
    seconds = f"{budget['seconds']:g} training seconds"

    rows = []
    for model in NAMES:
        times = dict.fromkeys((speed[model]["first"], speed[model]["second"]))
        steps = steps_for(budget["seconds"], speed[model], budget)
        trials = ", ".join(f"{psnr[model, rate]:.2f}" for rate in budget["rates"])
        ms = ", ".join(f"{1000 * t:.1f}" for t in times)
        taken = " + ".join(map(str, filter(None, steps)))
        rows.append([NAMES[model], ms, taken, f"x {best[model]:g}", trials])
    header = ["autoencoder", "ms a step", f"steps in {seconds}", "learning rate", "PSNR of trials"]
    text = [
        f"### What was spent, {seconds}",
        paragraph(
            f"On one thread; VMAE's include the tuning of its decoder. Learning rates of "
            f"{', '.join(f'{rate:g}' for rate in budget['rates'])} times the demo's were tried. "
            "Two times per step are SD-VAE's before and after its discriminator joins, and VMAE's "
            "in its two stages."
        ),
        markdown(header, rows),
    ]

    measures = ["gFD", "sFD", "IS", "precision", "recall", "accuracy"]
    quality = ["PSNR", "SSIM", "rFD"]
    for kind, title in (("seconds", seconds), ("steps", f"{budget['steps']} training steps")):
        found = {NAMES[m]: runs_of(results, f"{kind}/{m}-") for m in NAMES}
        text += [
            f"### Samples and reconstructions, {title}",
            table(found, [*measures, *quality], last=["held-out digits", real]),
            f"### Smoothness, {title}",
            "rFD of decodings with noise of eps standard deviations on the latents.",
            smoothness(found),
        ]

    found = {}
    for number, row in enumerate(ABLATION):
        name = f"ablation/{number}-" if ABLATION[row] else "seconds/vmae-"
        found[row] = runs_of(results, name)
    text += [
        f"### Ablation of VMAE, {seconds}",
        "Without the paper's last row, LPIPS, which needs a download.",
        table(found, [*measures, *quality]),
    ]

    found = {
        row: runs_of(results, f"regulariser/{number}-" if flags else "seconds/vmae-")
        for number, (row, flags) in enumerate(REGULARISERS.items())
    }
    text += [
        f"### Latent regularisers of VMAE, {seconds}",
        paragraph(
            "The std of the KL's prior and its weight. The posterior's std is in percent of its "
            "channel's."
        ),
        table(found, [*measures, *quality, "posterior std, %"]),
        "Smoothness, as above:",
        smoothness(found),
    ]

    text = "\n\n".join(text)
    (out / "tables.md").write_text(text + "\n")
    return text


def paragraph(text):
    return textwrap.fill(text, 100, break_on_hyphens=False)


def runs_of(results, start):
    return [result for name, result in results.items() if name.startswith(start)]


def table(found, measures, last=None):
    """A row per name in found, a column per measure; `last` is a row of single values."""
    rows = []
    for name, runs in found.items():
        cells = [mean_and_spread([run[measure] for run in runs]) for measure in measures]
        rows.append([name, *cells, len(runs)])
    if last:
        name, values = last
        cells = [mean_and_spread([values[m]] if m in values else []) for m in measures]
        rows.append([name, *cells, "-"])
    return markdown(["", *measures, "n"], rows)


def smoothness(found):
    rows = []
    for name, runs in found.items():
        columns = zip(*([run["rFD"], *run["rFD at eps"]] for run in runs))
        cells = [mean_and_spread(values) for values in columns] or ["-"] * len(train_ae.EPS)
        rows.append([name, *cells])
    return markdown(["", *(f"eps {eps:g}" for eps in train_ae.EPS)], rows)


def mean_and_spread(values):
    if not values:
        return "-"
    mean = statistics.mean(values)
    digits = 1 if abs(mean) >= 10 else 3
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


@torch.no_grad()
def draw_pictures(folders, path):
    """A row per autoencoder, of the run in its folder: reconstructions, then samples.

    The first row has held-out digits: those reconstructed, then others to compare samples with.
    """
    held = train_ae.Images(held_out=True)
    per_class = len(held) // 10
    shown, others = (np.arange(10) * per_class + k for k in (0, 1))
    x = torch.from_numpy(held.pixels[shown]).float()[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
    rows = [np.repeat(held.pixels[np.concatenate([shown, others])][..., None], 3, -1)]
    labels = ["held-out digits"]
    for model, folder in folders.items():
        tuned = folder / "tuned" / "ckpt.pt"
        autoencoder = ae.load(tuned if tuned.exists() else folder / "ae" / "ckpt.pt")
        decoded = sample.to_uint8(autoencoder.decode(autoencoder.encode(x).mode()))
        with np.load(folder / "dit" / "samples.npz") as samples:
            first = [np.flatnonzero(samples["arr_1"] == c)[0] for c in range(10)]
            rows.append(np.concatenate([decoded, samples["arr_0"][first]]))
        labels.append(NAMES[model])
    sample.save_grid(path, rows, labels)


if __name__ == "__main__":
    fid.run_main(main)
