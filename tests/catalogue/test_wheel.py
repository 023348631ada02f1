"""The wheel, alone in an environment that has nothing else, answers `find` and `show`."""

import json
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from formulary.catalogue import cards

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The unpacked wheel; built by hatchling where it is installed, else by pip, which fetches it."""
    place = tmp_path_factory.mktemp("wheel")
    build = ["hatchling", "build", "-t", "wheel", "-d", str(place)] if find_spec("hatchling") else ["pip", "wheel", "-q", "--no-deps", "-w", str(place), "."]
    done = subprocess.run([sys.executable, "-m", *build], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = place.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(place / "site")
    return place / "site"


def alone(site, *args):
    """Run the command with the wheel as the only package there is."""
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from formulary.cli import main; main({list(args)!r})"
    return subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, env={"HOME": str(site / "no-home"), "PATH": os.defpath}, cwd=site)


def test_the_wheel_carries_the_index_and_no_tests(site):
    index = json.loads((site / "formulary/catalogue/index.json").read_text("utf8"))
    assert index["slugs"] == list(cards())
    assert (site / "formulary/papers/quantization/gptq/card.toml").is_file()
    assert not list(site.rglob("test_*.py"))


def test_nothing_else_is_there(site):
    done = subprocess.run([sys.executable, "-I", "-S", "-c", "import torch"], capture_output=True, text=True)
    assert done.returncode == 1 and "No module named 'torch'" in done.stderr


def test_find_and_show_answer_with_verdicts(site):
    found = alone(site, "find", "8-bit matrix multiplication with outlier features", "--json")
    assert found.returncode == 0, found.stderr
    first = json.loads(found.stdout)["results"][0]
    assert first["slug"] == "llm-int8" and first["verdict"]
    shown = alone(site, "show", "gptq")
    assert shown.returncode == 0 and "What was measured" in shown.stdout and not shown.stderr
    for path in site.glob("formulary/papers/*/*/record.json"):
        slug = path.parent.name.removeprefix("paper_").replace("_", "-")
        assert json.loads(path.read_text("utf8"))["verdict"] in alone(site, "show", slug).stdout


def test_the_packaged_index_is_what_answers(site):
    assert not (site / "no-home").exists()
    index = site / "formulary/catalogue/index.json"
    text = index.read_text("utf8")
    index.write_text(text.replace("GPTQ: Accurate", "GPTQ: Packaged"), "utf8")
    try:
        assert "GPTQ: Packaged" in alone(site, "show", "gptq").stdout
    finally:
        index.write_text(text, "utf8")


def test_what_needs_more_says_so(site):
    done = alone(site, "find", "x", "--semantic")
    assert done.returncode == 1 and done.stderr.startswith("error: --semantic needs torch") and done.stderr.count("\n") == 1
    mistyped = alone(site, "show", "gtpq")
    assert mistyped.returncode == 2 and "did you mean 'gptq'" in mistyped.stderr
