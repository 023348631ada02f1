"""Records: the verdict follows from them, edits show, and a record of another check is stale. And runs that are
interrupted go on.
"""

import json
import os
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace

import pytest

from formulary.errors import FormularyError
from formulary.evidence import FAILS, HOLDS, Check, at_most, judge, read_record, run_check, validate_record
from formulary.evidence._record import canonical, dumps, sha256, write_record

CHECK = Check(
    claim="half is at most 0.7 of whole",
    setup=lambda seed: [3.0 + 0.1 * seed + i for i in range(5)],
    arms={"half": lambda c: [v / 2 for v in c], "whole": lambda c: c},
    holds=at_most("half", "whole", ratio=0.7),
    metric="loss",
    items="same",
    redraws="an offset",
    seeds=5,
)


@pytest.fixture
def room(tmp_path, monkeypatch):
    monkeypatch.setenv("FORMULARY_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "family" / "made_up"
    folder.mkdir(parents=True)
    (folder / "method.py").write_text("METHOD = 1\n")
    (folder / "check.py").write_text("CHECK = 1\n")
    (folder / "test_method.py").write_text("")
    (folder / "card.toml").write_text('claim = "halves"\n')
    return folder


def reseal(record):
    """What a forger would do: hash the edited record again."""
    body = {key: value for key, value in record.items() if key != "sha256"}
    return {**body, "sha256": sha256(canonical(body))}


def validation(room, check=CHECK):
    return validate_record("made-up", check=check, room=room)


def test_a_record_is_written_read_and_valid(room):
    made = run_check(CHECK, slug="made-up", room=room, record=True)
    assert read_record(room) == made
    assert validation(room).status == "valid"
    assert set(made["sources"]) == {"check.py", "method.py", "card claim"}
    assert made["environment"]["threads"] == 1 and made["environment"]["torch"]
    text = (room / "record.json").read_text()
    assert str(room.parent) not in text and os.uname().nodename not in text
    assert text.count("\n") < 200


def test_a_verdict_is_a_pure_function_of_its_record(room):
    made = run_check(CHECK, slug="made-up", room=room)
    again = judge(json.loads(dumps(made)))
    assert {key: made[key] for key in again} == again
    worse = deepcopy(made)
    worse["arms"]["half"]["loss"] = worse["arms"]["whole"]["loss"]
    assert (made["verdict"], judge(worse)["verdict"]) == (HOLDS, FAILS)


@pytest.mark.parametrize("reseals", [False, True])
@pytest.mark.parametrize(
    "edit",
    [
        lambda r: r.update(verdict=FAILS),
        lambda r: r["predicates"][0].update(estimate=0.1),
        lambda r: r["null"].update(verdict="inconclusive"),
        lambda r: r["arms"]["half"]["loss"][0].__setitem__(0, 0.0),
        lambda r: r["predictions"][0].update(ratio=0.4),
        lambda r: r["arms"].pop("whole"),
    ],
)
def test_an_edit_by_hand_shows(room, edit, reseals):
    record = run_check(CHECK, slug="made-up", room=room)
    edit(record)
    write_record(reseal(record) if reseals else record, room / "record.json")
    assert validation(room).status == "tampered"


def test_an_edit_of_anything_breaks_the_hash(room):
    record = run_check(CHECK, slug="made-up", room=room)
    write_record({**record, "date": "2020-01-01"}, room / "record.json")
    assert validation(room).status == "tampered"


def test_a_record_of_another_check_is_stale(room):
    run_check(CHECK, slug="made-up", room=room, record=True)
    for other in (
        replace(CHECK, version=2),
        replace(CHECK, claim="something else"),
        replace(CHECK, holds=at_most("half", "whole", ratio=0.8)),
        replace(CHECK, seeds=6),
    ):
        assert validation(room, other).status == "stale"
    (room / "method.py").write_text("METHOD = 2\n")
    assert validation(room).status == "valid"
    assert validation(room).reasons == ("method.py changed since the record",)


def test_a_record_minds_the_shared_parts_that_its_room_imports(room):
    (room / "method.py").write_text("from .._parts import one\n")
    parts, other = room.parent / "_parts.py", room.parent / "_other.py"
    parts.write_text("from . import _deeper\n")
    (room.parent / "_deeper.py").write_text("")
    run_check(CHECK, slug="made-up", room=room, record=True)
    other.write_text("unrelated = 1\n")
    assert validation(room).reasons == ()
    (room.parent / "_deeper.py").write_text("two = 2\n")
    assert validation(room).reasons == ("_deeper.py changed since the record",)
    parts.write_text("")
    assert validation(room).reasons == ("_parts.py changed since the record",)
    parts.unlink()
    assert validation(room).reasons == ("_parts.py changed since the record",)


def test_a_missing_or_broken_record_says_so(room):
    assert validation(room).status == "missing"
    (room / "record.json").write_text("{")
    with pytest.raises(FormularyError, match="not readable as JSON"):
        validation(room)
    (room / "record.json").write_text("[]")
    with pytest.raises(FormularyError, match="no record"):
        validation(room)


def test_recording_is_refused_without_a_new_version(room):
    run_check(CHECK, slug="made-up", room=room, record=True)
    before = (room / "record.json").read_bytes()
    changed = replace(CHECK, holds=at_most("half", "whole", ratio=0.8))
    with pytest.raises(FormularyError, match="raise version=1 to 2"):
        run_check(changed, slug="made-up", room=room, record=True)
    with pytest.raises(FormularyError, match="declares 5 seeds"):
        run_check(CHECK, slug="made-up", room=room, record=True, seeds=3)
    with pytest.raises(FormularyError, match="room"):
        run_check(CHECK, record=True)
    assert (room / "record.json").read_bytes() == before
    run_check(replace(changed, version=2), slug="made-up", room=room, record=True)
    assert read_record(room)["version"] == 2
    with pytest.raises(FormularyError, match="version 2"):
        run_check(CHECK, slug="made-up", room=room, record=True)


def test_a_run_goes_on_from_its_journal_until_a_source_changes(room):
    calls = []
    check = replace(CHECK, arms={"half": lambda c: calls.append(1) or [v / 2 for v in c], "whole": lambda c: c})

    def count(**options):
        calls.clear()
        run_check(check, slug="made-up", room=room, **options)
        return len(calls)

    assert [count(), count(), count(resume=False), count()] == [5, 0, 5, 0]
    (room / "test_method.py").write_text("assert True\n")
    assert count() == 0
    (room / "method.py").write_text("METHOD = 3\n")
    assert [count(), count()] == [5, 0]
    for kept in (room.parent.parent / "cache").rglob("*.json"):
        kept.write_text("{")
    assert count() == 5


ROOM = """
import sys, time
from pathlib import Path
import torch
from formulary.evidence import Check, at_most, run_check

def slow(context):
    time.sleep(PAUSE)
    print("arm done", flush=True)
    return (context + torch.rand(4)).tolist()

check = Check(claim="c", setup=lambda seed: 3 + torch.randn(4), arms={"a": slow, "b": lambda c: [2 * v for v in
slow(c)]},
              holds=at_most("a", "b", ratio=0.7), metric="loss", seeds=5)
if __name__ == "__main__":
    room = Path(sys.argv[1])
    run_check(check, slug="slow", room=room, record=True)
"""


def test_interrupted_and_resumed_is_bit_identical(tmp_path):
    """Killed by SIGINT in the middle; the second run measures only what is missing and gives the record of an
    uninterrupted one.
    """

    def start(name):
        room = tmp_path / name / "room"
        room.mkdir(parents=True, exist_ok=True)
        (room / "check.py").write_text(ROOM.replace("PAUSE", "0.05"))
        env = {**os.environ, "FORMULARY_CACHE": str(tmp_path / name / "cache")}
        return subprocess.Popen(
            [sys.executable, str(room / "check.py"), str(room)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores Ctrl-C
        )

    whole, stopped = start("whole"), start("stopped")
    for _ in range(4):
        assert stopped.stdout.readline() == "arm done\n"
    time.sleep(0.02)
    stopped.send_signal(signal.SIGINT)
    _, said = stopped.communicate(timeout=60)
    assert stopped.returncode != 0 and "KeyboardInterrupt" in said
    assert not (tmp_path / "stopped" / "room" / "record.json").exists()
    resumed, _ = start("stopped").communicate(timeout=60)
    all_of_it, _ = whole.communicate(timeout=60)
    assert all_of_it.count("arm done") == 15
    assert 8 <= resumed.count("arm done") <= 12
    first, second = (
        json.loads((tmp_path / name / "room" / "record.json").read_text()) for name in ("whole", "stopped")
    )
    assert first == second
