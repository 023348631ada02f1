"""Records: what one run of a check saw, and the verdict that follows from it.

`judge` computes the verdict, the intervals, the null, the oracle and the parity of budgets from what a record stores
(outcomes and predictions) and from nothing else. A record carries a SHA-256 over its canonical JSON, so that a hand
edit shows; `validate_record` recomputes both.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from formulary.errors import FormularyError
from formulary.evidence._check import Check
from formulary.evidence._predicates import (
    FAILS,
    HOLDS,
    UNSURE,
    UNTESTABLE,
    Predicate,
    from_specification,
    specification,
)
from formulary.files import write_atomic

FORMAT = 1
PARITY = 0.05
"""Budgets further apart than this are said to be."""

_JUDGED = ("verdict", "headline", "reasons", "predicates", "null", "oracle", "parity")


def rounded(value: float) -> float:
    """Six significant digits: what a record keeps of a number."""
    return float(f"{value:.6g}")


def canonical(value: object) -> str:
    """One spelling of a JSON value, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256(text: str) -> str:
    """Hexadecimal SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf8")).hexdigest()


def protocol(check: Check) -> str:
    """A hash of all that a check declares, its version left out: what may not change under the same version."""
    declared = {
        "claim": check.claim,
        "holds": [specification(p) for p in (check.predicates if check.why is None else ())],
        "arms": sorted(check.arms),
        "facts": [
            check.metric,
            check.items,
            check.redraws,
            check.seeds,
            check.oracle,
            check.null_arm,
            check.scope,
            check.why,
        ],
        "smaller": protocol(check.smaller) if check.smaller else None,
    }
    return sha256(canonical(declared))


def resolved(check: Check, reported: Mapping[str, list[str]]) -> list[Predicate]:
    """The check's predicates with metric, null arm and oracle filled in, given the metrics that each arm reported."""
    out = []
    for predicate in check.predicates:
        metric = check.metric_of(predicate, reported)
        mine = predicate.a == check.method
        arms = {}
        for name, arm in (("null", check.null_arm), ("oracle", check.oracle)):
            if mine and arm and getattr(predicate, name) is None and metric in reported[arm]:
                arms[name] = arm
        out.append(replace(predicate, metric=metric, **arms))
    return out


def _matrix(rows: Mapping[str, Mapping[str, list]], arm: str, metric: str) -> np.ndarray | None:
    """The outcomes (seeds, items) of an arm, or None if some seed failed."""
    table = rows.get(arm, {}).get(metric)
    return None if not table or any(row is None for row in table) else np.array(table, dtype=float)


def _finding(predicate: Predicate, a, b, items: str, name: str) -> dict:
    """What a predicate saw, with numbers as a record keeps them."""
    if a is None or (predicate.b is not None and b is None):
        lost = name if a is None else predicate.b
        return {
            "of": name,
            "estimate": None,
            "low": None,
            "high": None,
            "verdict": UNSURE,
            "sentence": f"{name}: not computed, because {lost} has no outcome for some seed",
        }
    if b is not None and a.shape != b.shape:
        raise FormularyError(
            f"{name} has {a.shape[1]} outcomes per seed and {predicate.b} has {b.shape[1]}; "
            "a comparison needs the same items"
        )
    seen = predicate.judge(a, b, items, name)
    return {
        key: rounded(value) if isinstance(value, float) and math.isfinite(value) else value
        for key, value in seen.items()
    }


def _together(verdicts: Sequence[str]) -> str:
    return FAILS if FAILS in verdicts else HOLDS if all(v == HOLDS for v in verdicts) else UNSURE


def _null(predicates: list[Predicate], record: Mapping) -> dict:
    """The planted null: a named arm must not fulfill all predictions at once, and no outcome planted for one
    prediction may fulfill that one.
    """
    arms, items = record["arms"], record["items"]
    findings, by_arm, planted, how = [], [], [], []
    for p in predicates:
        a, b = _matrix(arms, p.a, p.metric), _matrix(arms, p.b, p.metric) if p.b else None
        if p.null:
            false, name, said = _matrix(arms, p.null, p.metric), p.null, f"the arm {p.null}"
        elif p.rerun:
            false, name = _matrix(record["reruns"], p.rerun, p.metric), f"{p.rerun} again"
            said = f"{p.rerun} rerun with fresh seeds"
        elif a is None or (p.b and b is None):
            false, name, said = None, "planted null", f"none, for want of outcomes of {p.a}"
        else:
            false, said = p.planted("null", a, b)
            name = "planted null"
        finding = _finding(p, false, b, items, name)
        findings.append(finding)
        how.append(said)
        (by_arm if p.null else planted).append(finding["verdict"])
    caught = HOLDS in planted or (bool(by_arm) and _together(by_arm) == HOLDS)
    verdict = HOLDS if caught else _together([v if v != HOLDS else UNSURE for v in planted + by_arm])
    return {"verdict": verdict, "how": how, "predicates": findings}


def _oracle(predicates: list[Predicate], record: Mapping) -> dict:
    """The planted positive: every prediction must hold for it."""
    arms, items = record["arms"], record["items"]
    findings, how = [], []
    for p in predicates:
        a, b = _matrix(arms, p.a, p.metric), _matrix(arms, p.b, p.metric) if p.b else None
        if p.oracle:
            true, name, said = _matrix(arms, p.oracle, p.metric), p.oracle, f"the arm {p.oracle}"
        elif a is None or (p.b and b is None):
            true, name, said = None, "planted positive", f"none, for want of outcomes of {p.a}"
        else:
            true, said = p.planted("positive", a, b)
            name = "planted positive"
        findings.append(_finding(p, true, b, items, name))
        how.append(said)
    return {"verdict": _together([f["verdict"] for f in findings]), "how": how, "predicates": findings}


def _parity(predicates: list[Predicate], budget: Mapping[str, Mapping[str, int | float]]) -> dict | None:
    """Budgets of every method beside its baseline's. None when no arm states a budget."""
    if not any(budget.values()):
        return None
    pairs, apart = sorted({(p.a, p.b) for p in predicates if p.b}), []
    for a, b in pairs:
        ours, theirs = budget.get(a, {}), budget.get(b, {})
        for key in sorted(set(ours) | set(theirs)):
            if key not in ours or key not in theirs:
                apart.append(f"{key}: stated for {a if key in ours else b}, not for {b if key in ours else a}")
            elif abs(ours[key] - theirs[key]) > PARITY * max(abs(ours[key]), abs(theirs[key])):
                times = f" ({ours[key] / theirs[key]:.3g} x)" if theirs[key] else ""
                apart.append(f"{key}: {a} {ours[key]:.4g}, {b} {theirs[key]:.4g}{times}")
    return {"within": not apart, "apart": apart}


def judge(record: Mapping) -> dict:
    """The verdict of a record and all that leads to it: a pure function of its predictions, outcomes and budgets.

    Gives `verdict`, `headline`, `reasons`, `predicates` (what each saw), `null`, `oracle` and `parity`. A null that
    holds makes the check void, and its verdict inconclusive; a positive that does not hold makes it underpowered, which
    is said.
    """
    if record.get("why") is not None:
        smaller = record.get("smaller")
        asked = [f"the smaller question, {smaller['claim']!r}: {judge(smaller)['headline']}"] if smaller else []
        blank = {"predicates": [], "null": None, "oracle": None, "parity": None}
        headline = "; ".join([f"{UNTESTABLE} ({record['why']})", *asked])
        return {"verdict": UNTESTABLE, "headline": headline, "reasons": [record["why"], *asked], **blank}
    predicates = [from_specification(s) for s in record["predictions"]]
    arms = record["arms"]
    findings = [
        _finding(p, _matrix(arms, p.a, p.metric), _matrix(arms, p.b, p.metric) if p.b else None, record["items"], p.a)
        for p in predicates
    ]
    null, oracle = _null(predicates, record), _oracle(predicates, record)
    verdict, reasons = _together([f["verdict"] for f in findings]), list(record["failures"])
    if null["verdict"] == HOLDS:
        verdict = UNSURE
        held = [f["sentence"] for f in null["predicates"] if f["verdict"] == HOLDS]
        reasons.append(f"void: the planted null fulfills the prediction ({'; '.join(held)})")
    elif any(f["estimate"] is None for f in null["predicates"]) and verdict == HOLDS:
        verdict = UNSURE
        reasons.append("the planted null could not be computed, so nothing shows that this check can fail")
    if oracle["verdict"] != HOLDS:
        missed = [f["sentence"] for f in oracle["predicates"] if f["verdict"] != HOLDS]
        reasons.append(f"underpowered: the planted positive does not fulfill the prediction ({'; '.join(missed)})")
    parity = _parity(predicates, record["budget"])
    if parity and parity["apart"]:
        reasons.append(f"budgets more than {100 * PARITY:.0f} % apart: {'; '.join(parity['apart'])}")
    headline = f"{verdict}: {'; '.join(f['sentence'] for f in findings)}"
    return {
        "verdict": verdict,
        "headline": headline,
        "reasons": reasons,
        "predicates": findings,
        "null": null,
        "oracle": oracle,
        "parity": parity,
    }


def sealed(record: Mapping) -> dict:
    """The record with its judgment and its SHA-256, in reading order: verdict first, outcomes last."""
    facts = {key: value for key, value in record.items() if key not in (*_JUDGED, "sha256")}
    first = {"format": FORMAT, "slug": facts.pop("slug", None)}
    outcomes = {key: facts.pop(key) for key in ("arms", "reruns") if key in facts}
    full = {**first, **judge(record), **facts, **outcomes}
    return {**full, "sha256": sha256(canonical(full))}


def dumps(record: Mapping) -> str:
    """A record as readable JSON: one line for each seed's outcomes, not one for each number."""

    def lines(value, depth: int) -> str:
        pad, flat = " " * depth, json.dumps(value, ensure_ascii=False, allow_nan=False)
        if not value or not isinstance(value, dict | list):
            return flat
        if isinstance(value, list) and not any(isinstance(v, dict | list | str) for v in value):
            return flat
        if isinstance(value, list):
            return "[\n" + ",\n".join(f"{pad} {lines(v, depth + 1)}" for v in value) + f"\n{pad}]"
        return (
            "{\n"
            + ",\n".join(f"{pad} {json.dumps(k, ensure_ascii=False)}: {lines(v, depth + 1)}" for k, v in value.items())
            + f"\n{pad}}}"
        )

    return lines(record, 0) + "\n"


def write_record(record: Mapping, path: Path) -> None:
    """Write a sealed record, atomically."""
    write_atomic(path, dumps(record))


def read_record(room: Path) -> dict | None:
    """The record in a room, or None if it has none. FormularyError for a file that is no record."""
    path = room / "record.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormularyError(f"{path} is not readable as JSON ({error}); run the check again with --record") from None
    if not isinstance(record, dict) or "sha256" not in record:
        raise FormularyError(f"{path} is no record of a check (it has no sha256); run the check again with --record")
    return record


@dataclass(frozen=True)
class Validation:
    """How a stored record stands: `status` is "valid", "stale", "tampered" or "missing", and `reasons` says why."""

    status: str
    reasons: tuple[str, ...] = ()


def _same(old: object, new: object) -> bool:
    """Equal JSON, numbers to four digits (another scipy may round the last one differently), sentences not compared."""
    if isinstance(old, dict) and isinstance(new, dict):
        return set(old) == set(new) and all(
            _same(old[k], new[k])
            for k in old
            if k not in ("sentence", "power", "headline", "reasons", "predicted", "how")
        )
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, float | int) and isinstance(new, float | int) and not isinstance(old, bool):
        return math.isclose(old, new, rel_tol=1e-4, abs_tol=1e-12)
    return old == new


def validate_record(slug: str, *, check: Check | None = None, room: Path | None = None) -> Validation:
    """Check a room's record: its hash, that its verdict follows from its outcomes, and that it is of today's check.

    `check` and `room` are found from the slug if not given. "tampered": a hand edit. "stale": the version, claim or
    protocol of check.py is another one. A valid record whose sources changed since says so in `reasons`.
    """
    from formulary.evidence._run import find_room, load_check, source_hashes

    room = room or find_room(slug)
    record = read_record(room)
    if record is None:
        return Validation("missing", (f"no record yet; run `formulary check {slug} --record`",))
    body = {key: value for key, value in record.items() if key != "sha256"}
    if sha256(canonical(body)) != record["sha256"]:
        return Validation("tampered", ("its SHA-256 is not that of its content: it was edited by hand",))
    try:
        again = judge(record)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        return Validation(
            "tampered", (f"its verdict cannot be computed from its outcomes ({type(error).__name__}: {error})",)
        )
    off = [key for key in _JUDGED if key not in ("headline", "reasons") and not _same(record.get(key), again[key])]
    if off:
        return Validation("tampered", (f"its {', '.join(off)} do not follow from its outcomes",))
    check = check or load_check(slug)
    stale = [
        f"the record is of {name} {record.get(key)!r}, check.py has {value!r}"
        for name, key, value in (("version", "version", check.version), ("claim", "claim", check.claim))
        if record.get(key) != value
    ]
    if not stale and record.get("protocol") != protocol(check):
        stale = ["arms, thresholds or protocol of check.py changed since, under the same version"]
    if stale:
        return Validation("stale", tuple(stale))
    sources = source_hashes(room)
    unused = {name for name in set(record["sources"]) - set(sources) if (room.parent / name).exists()}  # by the room
    changed = sorted(
        name
        for name in (set(sources) | set(record["sources"])) - unused
        if sources.get(name) != record["sources"].get(name)
    )
    return Validation("valid", tuple(f"{name} changed since the record" for name in changed))
