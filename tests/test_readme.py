"""The documents say what is there: their commands parse, their names, files and links exist."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import ae
import dit

DOCUMENTS = {
    name: (ROOT / name).read_text()
    for name in ("README.md", "tests/RESULTS.md", "tests/BENCH.md", "tests/reference/README.md")
}
README = DOCUMENTS["README.md"]
SCRIPTS = ("ae", "dit", "train_ae", "train_dit", "sample", "fid")
FILES = [f"{script}.py" for script in SCRIPTS]


def commands(text):
    """(script, its flags) of every command in a document's code blocks and tables."""
    text = re.sub(r"\$\{\w+%\.pt\}|\$\w+", "ae", text)  # shell variables
    text = re.sub(r"\{[\w,-]+\}", "ae", text)  # and lists
    text = re.sub(r"\\\n +", "", text)  # a command on two lines
    lines = re.findall(r"^ {4}(.+)$", text, re.MULTILINE)
    lines += re.findall(r"`(?:python )?(\w+\.py [^`]+)`", text)
    for line in lines:
        for command in re.split(r"&&|;", line.split(" #")[0]):
            found = re.search(r"(?<![\w/])(\w+)\.py(?: (.*))?$", command.strip())
            flags = shlex.split(found[2] or "") if found else []
            # N stands for a number, in a sentence.
            if found and found[1] in SCRIPTS and "N" not in flags:
                yield found[1], flags


COMMANDS = [
    pytest.param(script, flags, id=f"{name}: {script} {' '.join(flags)}")
    for name in ("README.md", "tests/RESULTS.md")
    for script, flags in commands(DOCUMENTS[name])
]


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """What --init names is read for its sizes: a small VMAE and a small DiT, by script."""
    folder = tmp_path_factory.mktemp("starts")
    vmae = {"model": "vmae", "image_size": 16, "hidden_size": 12, "depth": 1, "decoder_depth": 1}
    net = ae.build(vmae)
    torch.save({"model": net.state_dict(), "args": vmae}, folder / "train_ae")
    net = dit.DiT_models["DiT-demo/1"](input_size=4, num_classes=2)
    args = {"model": "DiT-demo/1", "qk_norm": 1, "image_size": 32}
    torch.save(
        {"ema": net.state_dict(), "args": args, "class_names": ["a", "b"]}, folder / "train_dit"
    )
    return folder


def test_the_readme_has_a_command_for_each_script():
    found = [script for script, _ in commands(README)]
    assert set(found) == {"train_ae", "train_dit", "sample", "fid"}
    assert len(found) > 20
    assert len(list(commands(DOCUMENTS["tests/RESULTS.md"]))) > 20


@pytest.mark.parametrize("script, flags", COMMANDS)
def test_every_command_has_flags_that_exist(script, flags, starts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no run has been
    if "--init" in flags or "--tune_decoder" in flags:
        named = flags[flags.index("--init") + 1] if "--init" in flags else None
        default = "out/vmae/ckpt.pt" if "--data" in flags else "out/demo/vmae/ckpt.pt"
        start = Path(named or default)
        start.parent.mkdir(parents=True, exist_ok=True)
        start.symlink_to(starts / script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    module = importlib.import_module(script)
    if "--help" in flags:
        with pytest.raises(SystemExit) as stop:
            module.parse_args()
        assert stop.value.code == 0
    else:
        module.parse_args()


def test_the_demo_and_the_tests_are_one_line_each_that_can_be_copied():
    lines = re.findall(r"^ {4}(python3 .*)$", README, re.MULTILINE)
    scripts = [[c for c in line.split(" && ") if c.startswith("python ")] for line in lines]
    four = re.findall(r"^ {4}(python .*?) +# +\d+ s", README, re.MULTILINE)
    assert scripts == [four, ["python -m pytest tests"]]
    assert len(four) == 4


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_name_that_a_document_places_in_a_file_is_there(name):
    placed = []
    module = None
    for row in re.findall(r"^\|.*\|$", DOCUMENTS[name], re.MULTILINE):
        if not row.startswith("| |"):  # which goes on with the file of the row above
            module = None
        for word in re.findall(r"`([^` ]+)`", row):
            if word in FILES:
                module = importlib.import_module(Path(word).stem)
            elif module and re.fullmatch(r"[A-Za-z_.]+", word):
                placed.append((module, word))
    # In sentences: `ae.load(path)`, or `train_ae.py` `evaluate`.
    for file, word in re.findall(rf"`({'|'.join(SCRIPTS)})\.([A-Za-z_.]+)[`(]", DOCUMENTS[name]):
        if word != "py":
            placed.append((importlib.import_module(file), word))
    for file, word in re.findall(r"`(\w+)\.py` `([A-Za-z_.]+)`", DOCUMENTS[name]):
        placed.append((importlib.import_module(file), word))

    for module, word in placed:
        thing = module
        for part in word.split("."):
            assert hasattr(thing, part), f"{word} is not in {module.__name__}.py"
            thing = getattr(thing, part)
    assert len(placed) > {"README.md": 20, "tests/reference/README.md": 30}.get(name, -1)


@pytest.mark.parametrize("name", ["README.md", "tests/RESULTS.md", "tests/reference/README.md"])
def test_every_flag_that_a_sentence_names_is_there(name):
    code = "".join((ROOT / file).read_text() for file in FILES)
    others = {"shm-size", "ipc", "node_rank"}  # of Docker and torchrun
    flags = set(re.findall(r"`--([\w-]+)[^`]*`", DOCUMENTS[name])) - others
    assert flags
    for flag in flags:
        assert f'"--{flag}"' in code, flag


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_picture_link_and_file_that_a_document_names_is_there(name):
    text, folder = DOCUMENTS[name], (ROOT / name).parent
    links = re.findall(r"\]\((?!http)([^)#]*)(#[^)]*)?\)", text)
    for path, anchor in [*links, *((path, "") for path in re.findall(r'src="([^"]+)"', text))]:
        assert (folder / path).is_file() or not path, path
        heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        slugs = ["#" + re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
        assert not anchor or anchor in slugs, anchor
    for path in re.findall(r"`((?:tests|assets)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_readme_shows_what_the_demo_draws_and_the_comparison():
    assert {"assets/samples.png", "assets/comparison.png"} <= set(
        re.findall(r'(?:src="|!\[[^]]*\]\()([^")]+)', README)
    )


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_document_is_wrapped_at_100_columns(name):
    for line in DOCUMENTS[name].splitlines():
        # Tables, links, and the commands of one line each cannot be wrapped.
        free = line.startswith(("|", "    python3 ")) or "](http" in line
        assert len(line) <= 100 or free, line


def test_the_readme_is_short():
    assert len(README.encode()) <= 11_000
    assert sum(map(bool, README.splitlines())) <= 145
    assert max(len(line) for line in README.splitlines() if line.startswith("|")) <= 100
    assert "<details>" not in README
