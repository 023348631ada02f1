"""Kills streamed runs at chosen moments and finishes them: `python -m tests.workshop.killing JOBS`, JSON in and out.

It is a process of its own so that it may fork: every run is a child that shares what was imported here once. The moments are
the calls with which a run makes something lasting (sync, rename, remove), and times drawn at random.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import formulary  # noqa: F401  (registers the loader)
from formulary.contracts import Data
from formulary.papers.low_rank.greenformers_lrt.method import LowRankTransformer
from formulary.papers.quantization.gptq.method import GPTQ
from formulary.workshop import saving
from formulary.workshop.disk import DiskModel
from formulary.workshop.journal import facts_of, unfinished
from formulary.workshop.streaming import Run
from tests.conformance import rooms

METHODS = {"gptq": GPTQ(bits=4, group_size=16, act_order=True), "random": LowRankTransformer(start="random")}
LASTING = ((os, "fsync"), (os, "replace"), (os, "rename"), (shutil, "rmtree"))


def stream(method, source: Path, out: Path, data: Data | None = None):
    """What `use` does without measuring, on texts of several lengths in batches of two: the report, None if `out` is there."""
    if out.exists():
        return None
    disk = DiskModel(source)
    data = data or replace(rooms.data_for(disk.model, n=4), batch_size=2)
    with unfinished(out, facts_of(disk, method, data)) as (folder, journal):
        run = Run(disk, method, data, folder, journal)
        report = run.go()
        run.describe()
    return report


def child(method, source: Path, out: Path, kill_at: int | None = None) -> int:
    """A run in a process of its own, killed at the `kill_at`-th lasting call; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    calls = [0]

    def counted(function):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    try:
        for module, name in LASTING:
            setattr(module, name, counted(getattr(module, name)))
        stream(method, source, out)
        out.with_name("calls").write_text(str(calls[0]))
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def ends(pid: int) -> int:
    """How a child ended: 0 done, 1 with an error, -9 killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def content(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}


def tear(out: Path) -> None:
    """Cut the end off the journal's last line, as a kill in the middle of writing it would."""
    journal = saving.partial(out) / "journal.jsonl"
    if journal.exists() and journal.stat().st_size > 9:
        os.truncate(journal, journal.stat().st_size - 9)


def kill_and_finish(method, source: Path, folder: Path, moments: list) -> dict:
    """One uninterrupted run, then one for each moment, and how those went: a number of lasting calls, "N torn" (the journal's
    last line is cut, and the next run killed too), "every N" (killed again and again), "step N" (at each N-th call), or "random".
    """
    stream(method, source, folder / "first")
    start = time.monotonic()
    assert ends(child(method, source, folder / "whole")) == 0
    took = time.monotonic() - start
    expected, calls, failures = content(folder / "whole"), int((folder / "calls").read_text()), []
    steps = [str(n) for moment in moments if "step" in moment for n in range(1, calls + 1, int(moment.split()[1]))]
    for moment in [*steps, *(moment for moment in moments if "step" not in moment)]:
        out, kills = folder / "killed" / "out", 0
        word, _, more = moment.partition(" ")
        if word == "random":
            wait = random.uniform(0, took)
            pid = child(method, source, out)
            time.sleep(wait)
            os.kill(pid, signal.SIGKILL)
            kills += ends(pid) == -9
            moment = f"after {wait:.3f} s of {took:.3f} s"
        elif word == "every":
            while ends(child(method, source, out, int(more))) == -9 and kills < 20:
                kills += 1
        else:
            kills += ends(child(method, source, out, int(word))) == -9
            if more:
                tear(out)
                ends(child(method, source, out, 6))
        code = ends(child(method, source, out))
        left = sorted(path.name for path in out.parent.iterdir() if path.name not in ("out", "calls"))
        same = code == 0 and content(out) == expected
        if not same or left not in ([], ["out.partial"]) or (word != "random" and not kills):
            failures.append({"moment": moment, "code": code, "kills": kills, "left": left})
        shutil.rmtree(out.parent, ignore_errors=True)
    return {"calls": calls, "seconds": took, "failures": failures}


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = json.loads(sys.argv[1])
    done = [kill_and_finish(METHODS[name], Path(source), Path(folder), moments) for name, source, folder, moments in jobs]
    print(json.dumps(done))
