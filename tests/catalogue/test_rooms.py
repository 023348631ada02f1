"""Rooms: where they are, what they export, and starting a new one."""

import ast
import importlib.util
import subprocess
import sys

import pytest

from formulary.catalogue import CONTRACTS, _new, _show, card, cards, rooms
from formulary.errors import UsageError


def test_a_room_is_found_by_either_spelling():
    assert rooms.family_of("llm_int8") == "quantization"
    assert rooms.room_path("llm-int8").name == "llm_int8" and (rooms.room_path("3mt") / "card.toml").is_file()


def test_a_card_alone_cannot_be_loaded():
    with pytest.raises(UsageError, match="palm-2 is a card only: it has nothing to run"):
        rooms.load_room("palm-2")
    assert rooms.exports("palm-2") == [] and rooms.parameters("palm-2") == {} and not rooms.has_code("palm-2")


@pytest.fixture
def house(tmp_path, monkeypatch):
    for module in (rooms, _new):
        monkeypatch.setattr(module, "PAPERS", tmp_path)
    return tmp_path


def example(contract: str) -> str:
    return next(slug for slug, one in cards().items() if one.contract and one.contract[0] == contract and one.tier != "D")


@pytest.mark.parametrize("contract", CONTRACTS)
def test_a_new_room_imports_and_its_tests_fail_until_written(house, contract):
    slug = example(contract)
    made = _new.scaffold(slug, papers=house)
    assert made.written == ("__init__.py", "method.py", "check.py", "test_method.py") and not made.kept
    method = load(made.room / "method.py")
    names = rooms.exports(slug)
    assert names and all(isinstance(getattr(method, name), type) for name in names)
    assert list(rooms.parameters(slug)) == names
    prepare = load(made.room / "check.py").check.setup
    with pytest.raises(NotImplementedError, match=f"{slug}: write prepare in check.py"):
        prepare(0)
    tests = ast.parse((made.room / "test_method.py").read_text("utf8"))
    assert [line.name for line in tests.body if isinstance(line, ast.FunctionDef)] == ["test_against_something_independent"]


def load(path):
    spec = importlib.util.spec_from_file_location(f"scaffolded_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def test_the_tests_of_a_new_room_are_collected_and_fail_with_the_reason(tmp_path):
    made = _new.scaffold(example("probe"), papers=tmp_path)
    name = _new.class_name(made.slug)
    path = made.room / "test_method.py"
    one = card(made.slug)
    path.write_text(path.read_text("utf8").replace(f"formulary.papers.{one.family}.{one.room}", "method"), "utf8")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)], capture_output=True, text=True, cwd=made.room)
    assert done.returncode == 1 and f"{made.slug}: {name} is not tested yet; write test_method.py" in done.stdout


def test_nothing_is_overwritten(house):
    first = _new.scaffold("swin", papers=house)
    (first.room / "method.py").write_text("mine")
    (first.room / "check.py").unlink()
    second = _new.scaffold("swin", papers=house)
    assert second.written == ("check.py",) and "method.py" in second.kept
    assert (first.room / "method.py").read_text() == "mine"


def test_a_paper_that_has_no_card_gets_one(house):
    from formulary.catalogue._card import read_cards

    made = _new.scaffold("brand-new", family="feed-forward", title="A brand new thing", contract=["layer", "recipe"], arxiv="2501.00001", papers=house)
    one = read_cards(house)["brand-new"]
    assert (one.year, one.published, one.family, one.contract) == (2025, "2025-01", "feed_forward", ("layer", "recipe"))
    assert (house / "feed_forward/__init__.py").is_file() and "card.toml" in made.text()
    assert "BrandNew, BrandNewRecipe" in (made.room / "__init__.py").read_text()
    assert "test_the_card_is_written" in (made.room / "test_method.py").read_text()


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"family": "prunning"}, "did you mean 'pruning'"),
        ({"contract": ["transfrom"]}, "did you mean 'transform'"),
        ({"arxiv": "none"}, "not an arXiv id"),
        ({"tier": "Q"}, "unknown tier"),
    ],
)
def test_wrong_facts_write_nothing(house, facts, said):
    with pytest.raises(UsageError, match=said):
        _new.scaffold("brand-new", **{"family": "pruning", "title": "T", "contract": ["transform"], "papers": house, **facts})
    assert not list(house.iterdir())


def test_parameters_are_read_without_importing(house):
    room = house / "backbone/swin"
    room.mkdir(parents=True)
    (room / "__init__.py").write_text("from .method import Swin, SwinLayer, helper\n")
    (room / "method.py").write_text(
        "import nothing_of_the_kind\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Swin:\n    bits: int = 4\n    group_size: int | None = None\n    must: float\n    unit: ClassVar[str] = 'x'\n    _hidden: int = 0\n"
        "class SwinLayer:\n    def __init__(self, width: int, *, heads: int = 8, bias=True):\n        pass\n"
        "def helper():\n    pass\nclass Private:\n    pass\n"
    )
    found = rooms.parameters("swin")
    assert [(p.name, p.type, p.default) for p in found["Swin"]] == [("bits", "int", "4"), ("group_size", "int | None", "None"), ("must", "float", None)]
    assert [(p.name, p.type, p.default) for p in found["SwinLayer"]] == [("width", "int", None), ("heads", "int", "8"), ("bias", "", "True")]
    assert list(found) == ["Swin", "SwinLayer"] and rooms.exports("swin") == ["Swin", "SwinLayer", "helper"]
    page = _show.page("swin")
    assert "bits: int = 4" in page and "formulary use swin" in page and "import Swin, SwinLayer, helper" in page
    (room / "method.py").write_text("def broken(:\n")
    with pytest.raises(UsageError, match="room swin: method.py line 1 is not valid Python"):
        rooms.parameters("swin")


def test_every_room_with_code_can_be_read():
    for slug in cards():
        if rooms.has_code(slug):
            assert rooms.exports(slug), slug
            assert rooms.load_room(slug).__name__.endswith(card(slug).room)
