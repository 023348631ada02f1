"""The README's walkthrough, run as it is written, in order, in an empty directory."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf8")
COMMANDS = re.findall(r"^\$ (formulary .*)$", README, re.M)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("walkthrough")


def test_the_walkthrough_uses_every_verb():
    assert {command.split()[1] for command in COMMANDS} >= {"find", "show", "check", "use", "compare"}


def test_the_walkthrough_runs(folder):
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        done = subprocess.run([sys.executable, "-m", "formulary.cli", *words], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    for program in PYTHON:
        done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{program}\n{done.stderr[-1500:]}"


def test_the_files_that_it_names_exist():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    for target in re.findall(r"`make (\w+)`", README):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
