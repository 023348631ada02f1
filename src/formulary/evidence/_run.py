"""Runs a check: contexts shared by arms, the same seeds for the same result, a journal to go on from after an
interruption, and the record.

Notable: every arm of a seed starts from the same random state, so that arms are paired and the order of arms does not
matter; an arm that changes the shared context is an error, since what a later arm sees would depend on it.
"""

import ast
import hashlib
import importlib
import json
import math
import platform
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from formulary import catalogue
from formulary.errors import FormularyError, UsageError, nearest
from formulary.evidence import _turns
from formulary.evidence._check import Check, Outcome
from formulary.evidence._context import changed, fingerprint
from formulary.evidence._predicates import TIME_METRIC, Predicate, specification
from formulary.evidence._record import protocol, read_record, resolved, rounded, sealed, sha256, write_record
from formulary.evidence.timing import LEAST_ROUNDS, compare_times, one_thread
from formulary.files import cache_dir, write_json

FRESH_SEEDS = 10_000
"""The baseline's rerun for the planted null takes its seeds from here on."""

PAPERS = Path(__file__).resolve().parent.parent / "papers"
_SHARED_SOURCES = ("contracts", "evidence", "kernels", "lab")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `done` of `total` outcomes (one per seed and arm), what comes now, and the seconds that
    remain, once they can be told.
    """

    done: int
    total: int
    now: str
    remaining: float | None


def find_room(slug: str) -> Path:
    """The folder of a paper; dashes and underscores are the same. UsageError for an unknown one."""
    card = catalogue.card(slug)
    return PAPERS / card.family / card.room


def checked_slugs(family: str | None = None) -> list[str]:
    """The slugs of all papers that have a check, of one family if named."""
    families = sorted(path.name for path in PAPERS.iterdir() if path.is_dir() and not path.name.startswith("_"))
    if family is not None and family.replace("-", "_") not in families:
        raise UsageError(f"no family is called {family!r}{nearest(family, families)}")
    pattern = f"{family.replace('-', '_') if family else '*'}/*/check.py"
    return sorted(path.parent.name.removeprefix("paper_").replace("_", "-") for path in PAPERS.glob(pattern))


def load_check(slug: str) -> Check:
    """The check of a paper. UsageError for an unknown paper, FormularyError for one that has no check yet."""
    room = find_room(slug)
    if not (room / "check.py").exists():
        raise FormularyError(f"{slug} has no check yet: there is no check.py in its room")
    module = importlib.import_module(f"formulary.papers.{room.parent.name}.{room.name}.check")
    check = getattr(module, "check", None)
    if not isinstance(check, Check):
        raise FormularyError(f"{slug}: check.py defines no `check = Check(...)`")
    return check


def source_hashes(room: Path) -> dict[str, str]:
    """SHA-256 of what a record comes from: the room's modules, the shared parts of its family that these import, and
    the card's claim.
    """
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(room.glob("*.py"))
        if not path.name.startswith("test_") and path.name not in ("__init__.py", "conftest.py")
    }
    hashes |= {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in _shared_parts(room, list(hashes))}
    if (room / "card.toml").exists():
        import tomllib

        hashes["card claim"] = sha256(tomllib.loads((room / "card.toml").read_text(encoding="utf8")).get("claim", ""))
    return hashes


def _shared_parts(room: Path, modules: list[str]) -> list[Path]:
    """The family's `_*.py` that modules of the room import, directly or through one another."""
    every = {path.stem: path for path in room.parent.glob("_*.py") if path.name != "__init__.py"}
    found: set[str] = set()
    waiting = [room / name for name in modules]
    while waiting:
        path = waiting.pop()
        prefixes = ("." if path.parent == room.parent else "..", f"formulary.papers.{room.parent.name}.")
        for name in _imported(path):
            stem = next((name.removeprefix(p) for p in prefixes if name.startswith(p)), "").partition(".")[0]
            if stem in every and stem not in found:
                found.add(stem)
                waiting.append(every[stem])
    return [every[stem] for stem in sorted(found)]


def _imported(path: Path) -> Iterator[str]:
    """Dotted names of what a module imports; relative ones begin with their dots."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            yield start
            dot = "" if not node.module else "."
            yield from (f"{start}{dot}{alias.name}" for alias in node.names)


def versions() -> dict[str, str]:
    """Versions of what outcomes may depend on."""
    installed = {}
    for name in ("torch", "transformers", "numpy", "scipy"):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return {"python": platform.python_version(), **installed}


def environment() -> dict:
    """The machine as far as it bears on outcomes: versions, architecture and instruction sets; no names, no paths."""
    wanted = (
        "avx2",
        "avx512f",
        "avx512_bf16",
        "avx512_vnni",
        "amx_tile",
        "amx_int8",
        "amx_bf16",
        "asimd",
        "bf16",
        "i8mm",
        "sve",
    )
    try:
        cpu = Path("/proc/cpuinfo").read_text()
        lines = [line for line in cpu.splitlines() if line.startswith(("flags", "Features"))]
        flags = set(lines[0].split(":")[1].split()) if lines else set()
    except OSError:
        flags = {"asimd"} if platform.machine() in ("arm64", "aarch64") else set()
    return {
        **versions(),
        "system": platform.system(),
        "machine": platform.machine(),
        "instruction_sets": [name for name in wanted if name in flags],
        "threads": 1,
    }


def _journal_key(check: Check, room: Path) -> str:
    """Changes with anything that outcomes may depend on: the room, its family's parts, the house's shared code,
    versions, instruction sets.
    """
    house = PAPERS.parent
    files = (path for part in _SHARED_SOURCES for path in sorted((house / part).rglob("*")))
    shared = [path for path in files if path.suffix in (".py", ".cpp", ".hpp")]
    code = {str(path.relative_to(house)): hashlib.sha256(path.read_bytes()).hexdigest() for path in shared}
    sources = {name: value for name, value in source_hashes(room).items() if name != "card claim"}
    return sha256(json.dumps([sources, code, environment(), protocol(check)], sort_keys=True))[:24]


@dataclass(frozen=True)
class _Journal:
    """Finished outcomes on disk, one small file per (seed, unit); `folder` None keeps nothing."""

    folder: Path | None

    def _path(self, seed: int, unit: str) -> Path:
        return self.folder / f"{seed}-{sha256(unit)[:16]}.json"

    def read(self, seed: int, unit: str) -> dict | None:
        if self.folder is None or not self._path(seed, unit).exists():
            return None
        try:
            return json.loads(self._path(seed, unit).read_text(encoding="utf8"))
        except (UnicodeDecodeError, json.JSONDecodeError):
            return None

    def write(self, seed: int, unit: str, entry: dict) -> None:
        if self.folder is not None:
            write_json(self._path(seed, unit), entry)


@dataclass
class _Clock:
    """Counts finished units and guesses what remains from how long units of the same kind took."""

    total: int
    tell: Callable[[Progress], None] | None
    done: int = 0
    spent: dict[str, list[float]] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)

    def skip(self, kind: str) -> None:
        self.done += 1
        self.left[kind] -= 1

    @contextmanager
    def unit(self, kind: str, now: str, counts: bool = True) -> Iterator[None]:
        if self.tell:
            self.tell(Progress(self.done, self.total, now, self.remaining()))
        start = time.perf_counter()
        yield
        self.spent.setdefault(kind, []).append(time.perf_counter() - start)
        self.left[kind] = self.left.get(kind, 1) - 1
        self.done += counts

    def remaining(self) -> float | None:
        if not self.spent:
            return None
        means = {kind: sum(times) / len(times) for kind, times in self.spent.items()}
        usual = sum(means.values()) / len(means)
        return sum(max(count, 0) * means.get(kind, usual) for kind, count in self.left.items())


@contextmanager
def _own_random_state() -> Iterator[None]:
    """One thread, and the caller's random states and gradient mode given back at the end."""
    import torch

    before = random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.is_grad_enabled()
    with one_thread():
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])
            torch.set_grad_enabled(before[3])


def _seed_all(stage: str, seed: int) -> None:
    """Seed python, numpy and torch; the setup and the arms of a seed draw from different streams, all its arms from
    the same one.
    """
    import torch

    number = int(sha256(f"{stage}:{seed}")[:8], 16)
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    torch.set_num_threads(1)
    torch.set_grad_enabled(True)


def _entry(check: Check, arm: str, seed: int, result: Any) -> tuple[dict, Callable[[], Any] | None]:
    """What an arm returned, as {"values": metric -> numbers, "budget", "failure", "timed"}, and its work to time."""
    outcome = result if isinstance(result, Outcome) else Outcome(result)
    if outcome.work is not None and not isinstance(outcome.values, Mapping) and len(outcome.values) == 0:
        outcome = Outcome({}, outcome.budget, outcome.work)
    named = outcome.values if isinstance(outcome.values, Mapping) else {check.metric or "outcome": outcome.values}
    values, failure = {}, None
    for metric, numbers in named.items():
        try:
            row = [float(v) for v in numbers]
        except (TypeError, ValueError):
            raise FormularyError(
                f"arm {arm!r}, seed {seed}: the outcomes of {metric!r} must be a list of numbers, one per item"
            ) from None
        if not row:
            raise FormularyError(f"arm {arm!r}, seed {seed}: no outcomes of {metric!r}")
        bad = sum(not math.isfinite(v) for v in row)
        if bad:
            failure = (
                f"arm {arm!r} failed for seed {seed}: {bad} of its {len(row)} outcomes of {metric!r} are not finite"
            )
        values[metric] = None if bad else row
    budget = {str(k): float(v) for k, v in outcome.budget.items()}
    return {"values": values, "budget": budget, "failure": failure, "timed": outcome.work is not None}, outcome.work


def _run_seed(
    check: Check, seed: int, arms: Iterable[str], journal: _Journal, clock: _Clock, timing: bool
) -> dict[str, dict]:
    """The entries of one seed: from the journal where it has them, else measured. With `timing`, works are timed
    side by side.
    """
    arms = list(arms)
    entries = {arm: entry for arm in arms if (entry := journal.read(seed, arm))}
    times = journal.read(seed, "the timing") if timing else {}
    again = {arm for arm, entry in entries.items() if timing and entry["timed"] and times is None}
    for arm in arms:
        if arm in entries and arm not in again:
            clock.skip(arm)
    missing = [arm for arm in arms if arm not in entries or arm in again]
    works = {}
    if missing:
        with _turns.computing(), clock.unit("setup", f"seed {seed}: setup", counts=False):
            _seed_all("setup", seed)
            context = check.setup(seed)
        before = fingerprint(context)
        for arm in missing:
            with _turns.computing(), clock.unit(arm, f"seed {seed}: {arm}"):
                _seed_all("arm", seed)
                entry, work = _entry(check, arm, seed, check.arms[arm](context))
                where = changed(before, fingerprint(context))
                if where:
                    raise FormularyError(
                        f"arm {arm!r} changed the context that all arms share ({where}); let it work on a copy.deepcopy"
                    )
                if work is not None:
                    works[arm] = work
                entries.setdefault(arm, entry)
                journal.write(seed, arm, entries[arm])
    if timing and works:
        with _turns.timing(), clock.unit("timing", f"seed {seed}: timing {', '.join(works)}", counts=False):
            seen = compare_times(works, rounds=LEAST_ROUNDS, min_seconds=0.05, seed=seed)
            times = {arm: {TIME_METRIC: list(seen.cpu[arm]), "wall seconds": list(seen.wall[arm])} for arm in works}
            journal.write(seed, "the timing", times)
    return {
        arm: {**entry, "values": {**entry["values"], **(times or {}).get(arm, {})}}
        for arm, entry in ((arm, entries[arm]) for arm in arms)
    }


def _tables(runs: Mapping[int, Mapping[str, dict]], arms: Iterable[str]) -> dict[str, dict[str, list]]:
    """arm -> metric -> one row per seed, rounded; None for a seed that failed. FormularyError when seeds differ in
    what they measured.
    """
    tables = {}
    for arm in arms:
        by_seed = {seed: entries[arm]["values"] for seed, entries in runs.items()}
        first = next(iter(by_seed))
        for seed, values in by_seed.items():
            if set(values) != set(by_seed[first]):
                raise FormularyError(f"arm {arm!r} reports other metrics for seed {seed} than for seed {first}")
        tables[arm] = {}
        for metric in by_seed[first]:
            rows = {seed: values[metric] for seed, values in by_seed.items()}
            sizes = {len(row): seed for seed, row in rows.items() if row is not None}
            if len(sizes) > 1:
                said = ", ".join(f"{size} for seed {seed}" for size, seed in sizes.items())
                raise FormularyError(f"arm {arm!r} has a different number of outcomes of {metric!r} per seed: {said}")
            tables[arm][metric] = [None if row is None else [rounded(v) for v in row] for row in rows.values()]
    return tables


def _budgets(runs: Mapping[int, Mapping[str, dict]], arms: Iterable[str]) -> dict[str, dict[str, float]]:
    """The median over seeds of what each arm spent."""
    out = {}
    for arm in arms:
        stated = [entries[arm]["budget"] for entries in runs.values()]
        out[arm] = {key: rounded(float(np.median([b[key] for b in stated if key in b]))) for key in stated[0]}
    return out


def _reruns(check: Check, predicates: Iterable[Predicate]) -> list[str]:
    """The baselines that the planted null needs again, with fresh seeds."""
    return list(dict.fromkeys(p.rerun for p in predicates if p.rerun))


def _measure(check: Check, seeds: list[int], journal: _Journal, tell: Callable[[Progress], None] | None) -> dict:
    """Run every arm for every seed, then the baselines again; gives the measured part of a record."""
    expected = [] if check.null_arm else _reruns(check, check.predicates)
    clock = _Clock(len(seeds) * (len(check.arms) + len(expected)), tell)
    clock.left = {arm: len(seeds) for arm in check.arms} | {"setup": len(seeds) * (1 + bool(expected))}
    for arm in expected:
        clock.left[arm] += len(seeds)
    runs = {seed: _run_seed(check, seed, check.arms, journal, clock, timing=True) for seed in seeds}
    arms = _tables(runs, check.arms)
    predicates = resolved(check, {arm: list(metrics) for arm, metrics in arms.items()})
    again = _reruns(check, predicates)
    clock.total = len(seeds) * (len(check.arms) + len(again))
    fresh = (
        {s + FRESH_SEEDS: _run_seed(check, s + FRESH_SEEDS, again, journal, clock, timing=False) for s in seeds}
        if again
        else {}
    )
    if tell:
        tell(Progress(clock.total, clock.total, "done", 0.0))
    failures = [
        e["failure"] for run in (runs, fresh) for entries in run.values() for e in entries.values() if e["failure"]
    ]
    return {
        "predictions": [specification(p) for p in predicates],
        "metrics": sorted({metric for metrics in arms.values() for metric in metrics}),
        "failures": failures,
        "budget": _budgets(runs, check.arms),
        "arms": arms,
        "reruns": _tables(fresh, again) if again else {},
    }


def run_check(
    check: str | Check,
    *,
    slug: str | None = None,
    room: Path | None = None,
    seeds: int | None = None,
    record: bool = False,
    resume: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> dict:
    """Run a check and give its record; with `record`, also write it into the room.

    check: a slug, or a `Check` (then `slug` and `room`, the folder of its sources, say where it belongs; without a room
    nothing is journaled).
    seeds: another number of seeds than declared, for exploring: the record then says `exploratory` and cannot be
    written.
    resume: go on from the outcomes that an interrupted run of the very same sources left; they are kept under the cache
    directory.
    progress: called with a `Progress` before each step.

    Raises FormularyError for an arm that changes the shared context or measures other items for other seeds, for a
    refused record, and UsageError for an unknown slug or a wrong number of seeds. Outcomes that are not finite do not
    stop the run: they are `failures` of the record.
    """
    if isinstance(check, str):
        with _turns.computing():
            slug, room, check = slug or check, room or find_room(check), load_check(check)
    slug, number = slug or "unnamed", check.seeds if seeds is None else seeds
    if number < 2 and check.seeds >= 2:
        raise UsageError(f"--seeds {number}; an interval over seeds needs at least 2")
    stored = read_record(room) if room and record else None
    if record:
        _allow_recording(check, slug, room, number, stored)
    inner = check.smaller if check.why is not None else check
    measured = None
    if inner is not None:
        journal = _Journal(cache_dir("checks", slug, _journal_key(inner, room)) if room else None)
        if not resume and journal.folder:
            for path in journal.folder.glob("*.json"):
                path.unlink()
        with _own_random_state():
            measured = _measure(
                inner, list(range(number if inner is check or seeds else inner.seeds)), journal, progress
            )
    facts = _facts(check, slug, room, measured, exploratory=seeds is not None and seeds != check.seeds)
    made = sealed(facts)
    if record:
        write_record(made, room / "record.json")
    return made


def _facts(check: Check, slug: str, room: Path | None, measured: dict | None, exploratory: bool) -> dict:
    """All of a record but its judgment and its hash."""
    facts = {
        "slug": slug,
        "claim": check.claim,
        "scope": check.scope,
        "version": check.version,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "exploratory": exploratory,
        "protocol": protocol(check),
        "environment": environment(),
        "sources": source_hashes(room) if room else {},
    }
    if check.why is not None:
        smaller = check.smaller
        inner = sealed(_facts(smaller, slug, room, measured, exploratory)) if smaller else None
        return {**facts, "why": check.why, "smaller": inner}
    rows = [table for metrics in measured["arms"].values() for table in metrics.values()]
    return {**facts, "items": check.items, "redraws": check.redraws, "seeds": list(range(len(rows[0]))), **measured}


def _allow_recording(check: Check, slug: str, room: Path | None, seeds: int, stored: dict | None) -> None:
    """FormularyError when a record must not be written."""
    if room is None:
        raise FormularyError("a record is written into a room, and this check has none")
    if seeds != check.seeds:
        raise FormularyError(
            f"{slug} declares {check.seeds} seeds; a run with {seeds} is for exploring and is not recorded"
        )
    if stored and stored.get("version", 0) > check.version:
        raise FormularyError(
            f"{slug}: the stored record is of version {stored['version']}, check.py is of version {check.version}"
        )
    if stored and stored.get("version") == check.version and stored.get("protocol") != protocol(check):
        raise FormularyError(
            f"{slug}: claim, arms, thresholds or protocol changed since the stored record; "
            f"raise version={check.version} to {check.version + 1} in check.py"
        )
