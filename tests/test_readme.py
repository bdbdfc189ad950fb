"""The README says what is there: its commands parse, its names and files exist."""

import importlib
import re
import shlex
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
SCRIPTS = ("train_ae", "train_dit", "sample", "fid")


def commands():
    """(script, its flags) of every command in the README's code blocks and tables."""
    text = re.sub(r"\$\{\w+%\.pt\}|\$\w+", "ae", README)  # shell variables
    text = re.sub(r"\{[\w,-]+\}", "ae", text)  # and lists
    text = re.sub(r"\\\n +", "", text)  # a command on two lines
    lines = re.findall(r"^ {4}(.+)$", text, re.MULTILINE)
    lines += re.findall(r"`(train_ae\.py [^`]+)`", text)
    for line in lines:
        for command in re.split(r"&&|;", line.split(" #")[0]):
            found = re.search(r"(?<![\w/])(\w+)\.py(?: (.*))?$", command.strip())
            if found and found[1] in SCRIPTS:
                yield found[1], shlex.split(found[2] or "")


def test_the_readme_has_a_command_for_each_script():
    assert {script for script, _ in commands()} == set(SCRIPTS)
    assert len(list(commands())) > 30


@pytest.mark.parametrize("script, flags", commands(), ids=" ".join)
def test_every_command_of_the_readme_has_flags_that_exist(script, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no run has been
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    importlib.import_module(script).parse_args()


def test_every_name_that_the_readme_places_in_a_file_is_there():
    placed = []
    for row in re.findall(r"^\|.*\|$", README, re.MULTILINE):
        module = None
        for word in re.findall(r"`([^` ]+)`", row):
            if re.fullmatch(r"(ae|dit|train_ae|train_dit|sample|fid)\.py", word):
                module = importlib.import_module(word.removesuffix(".py"))
            elif module and re.fullmatch(r"[A-Za-z_.]+", word):
                placed.append(word)
                thing = module
                for name in word.split("."):
                    assert hasattr(thing, name), f"{word} is not in {module.__name__}.py"
                    thing = getattr(thing, name)
    assert len(placed) > 50


def test_every_picture_and_file_that_the_readme_names_is_there():
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    pictures = re.findall(r'src="([^"]+)"', README)
    for link in links + pictures:
        assert (ROOT / link).is_file(), link
    assert pictures
    for path in re.findall(r"`((?:tests|assets)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path


def test_every_fold_of_the_readme_opens_and_closes():
    assert README.count("<details><summary>") == README.count("</summary>\n\n")
    assert README.count("<details>") == README.count("\n\n</details>") > 5
