"""The side-by-side runner: arms in processes of their own, what cannot run is said, tables that are right."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPT = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
import side_by_side

def counting(steps):
    def arm():
        print("noise that an arm prints is no answer")
        return (lambda: sum(range(steps))), {{"cosine": 0.5}}
    return arm

def broken():
    raise ImportError("no such peer")

side_by_side.serve({{"some": counting(200_000), "more": counting(400_000), "broken": broken}}[sys.argv[2]])
"""


@pytest.fixture(scope="module")
def side_by_side():
    spec = importlib.util.spec_from_file_location("side_by_side", FOLDER / "side_by_side.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_arms_run_in_turns_and_a_missing_peer_is_named(side_by_side, tmp_path, capfd):
    script = tmp_path / "arms.py"
    script.write_text(SCRIPT)
    found = side_by_side.measure(str(script), ["some", "more", "broken"], rounds=6)
    assert {name: (len(one["cpu"]), one["facts"]) for name, one in found.items()} == {
        "some": (6, {"cosine": 0.5}), "more": (6, {"cosine": 0.5})
    }  # fmt: skip
    assert min(found["some"]["cpu"]) > 0
    assert "broken: not here (ImportError: no such peer)" in capfd.readouterr().err


def test_the_table_has_the_ratio_within_rounds(side_by_side, tmp_path):
    drift = np.array([1.0, 2.0, 3.0, 1.5, 1.0, 2.5])
    found = {"ours": {"facts": {"cosine": 0.999}, "cpu": drift}, "peer": {"facts": {}, "cpu": 3 * drift}}
    assert side_by_side.ratio(found, "ours", "peer") == (3.0, 3.0, 3.0)
    rows = side_by_side.table(found, ("ours",), 7, "texts", {"cosine": "cosine", "other": "nobody has it"}).splitlines()
    assert rows[2] == "| **ours** | 4 |  | 0.999 |" and rows[3] == "| peer | 1.333 | 3.00x [3.00, 3.00] |  |"
    side_by_side.plot(found, ("ours",), 7, "texts", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_table_says_how_close_to_the_memory_an_arm_comes(side_by_side):
    drift = np.array([1.0, 2.0, 3.0, 1.5, 1.0, 2.5])
    arm = lambda times, **facts: {"facts": facts, "cpu": times * drift}
    found = {"a": arm(4, MB=50.0), "b": arm(2, MB=20.0), "read": arm(1, MB=20.0), "peer": arm(5)}
    rows = side_by_side.table(found, ("a", "b", "absent"), 6, "tokens", {"MB": "MB"}, "read").splitlines()
    assert rows[0] == "|  | tokens/s | a is | b is | MB | of the memory's speed |" and rows[1].count("---") == 6
    assert rows[2] == "| read | 3.429 | 0.25x [0.25, 0.25] | 0.50x [0.50, 0.50] | 20 | 100% |"
    assert rows[3:5] == ["| **b** | 1.714 | 0.50x [0.50, 0.50] |  | 20 | 50% |", "| **a** | 0.8571 |  | 2.00x [2.00, 2.00] | 50 | 62% |"]
    assert rows[5] == "| peer | 0.6857 | 1.25x [1.25, 1.25] | 2.50x [2.50, 2.50] |  |  |"


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_an_arm_that_does_not_exist_fails_before_it_measures(name, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [name, "--arm", "padded: nobody"])
    monkeypatch.setattr(module.side_by_side, "serve", lambda arm: arm())
    with pytest.raises(KeyError, match="nobody"):
        module.main()
    assert module.OURS in module.ARMS
