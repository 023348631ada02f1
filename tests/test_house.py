"""The rules of the house: who may import whom, what a room holds, what the wheel leaves out."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from formulary.catalogue import cards
from formulary.catalogue.rooms import exports, has_code, room_path

ROOT = Path(__file__).parents[1]
ROOMS = [slug for slug in sorted(cards()) if has_code(slug)]


def test_imports_follow_the_design():
    done = subprocess.run([sys.executable, "-c", "from importlinter.cli import lint_imports_command as l; l()"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("slug", ROOMS)
def test_a_room_is_whole(slug):
    room = room_path(slug)
    assert {"__init__.py", "card.toml", "method.py", "check.py", "test_method.py"} <= {p.name for p in room.iterdir()}
    assert exports(slug), "a room's __init__.py exports its method"
    body = ast.parse((room / "__init__.py").read_text()).body
    assert len(body) == 1 and isinstance(body[0], ast.ImportFrom), "one line"
    assert "arXiv:" in ast.get_docstring(ast.parse((room / "method.py").read_text()))


@pytest.mark.parametrize("slug", ROOMS)
def test_a_record_is_there_and_valid_and_has_a_null_and_a_positive(slug):
    from formulary.evidence import read_record, validate_record

    assert validate_record(slug).status == "valid"
    record = read_record(room_path(slug))
    if record["verdict"] != "not testable here":
        assert record["null"]["verdict"] != "holds here"
        assert record["oracle"]["verdict"] in ("holds here", "does not hold here", "inconclusive")


@pytest.mark.parametrize("slug", ROOMS)
def test_a_room_imports_only_what_it_may(slug):
    family = cards()[slug].family
    allowed = ("contracts", "evidence", "lab", "kernels", "errors", "files", f"papers.{family}")
    for file in room_path(slug).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name == "formulary":
                    names_from = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
                    assert all(n in ("lab", "contracts", "evidence", "kernels") for n in names_from) or file.name == "test_method.py"
                elif name.startswith("formulary."):
                    inside = name.removeprefix("formulary.")
                    assert inside.startswith(allowed) or file.name == "test_method.py", f"{file.name} imports {name}"


def test_nothing_here_reads_a_pickle_or_runs_what_it_reads():
    """No pickle, eval, exec or unguarded torch.load anywhere in the package."""
    for file in (ROOT / "src").rglob("*.py"):
        if file.name.startswith("test_"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("pickle.load", "pickle.loads", "joblib.load", "eval", "exec", "os.system"), f"{file}: {called}"
                assert called != "torch.load" or "weights_only=True" in ast.unparse(node), f"{file}: {called}"


MODULES = sorted(
    ".".join(file.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
    for file in (ROOT / "src").rglob("*.py")
    if not file.name.startswith("test_") and ">>>" in file.read_text()
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_run(name):
    tried = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert tried.failed == 0, "see what was printed above"
    assert tried.attempted, f"{name} has examples, but doctest finds none"
