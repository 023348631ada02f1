"""The verb `compare`: several methods on the same model, data and machine, timed in the same rounds.

A method that refuses the model is a row that says why; ties in time share a rank; a Pareto plot shows time against quality.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from formulary.contracts import parts
from formulary.errors import FormularyError, UsageError
from formulary.workshop import applying, measuring, models, saving, tables, using
from formulary.workshop.measuring import Row
from formulary.workshop.methods import training_free as training_free_methods


@dataclass
class Comparison:
    """What `compare` returns: measured rows, ranks by time (ties share one), who refused, and the files written."""

    name: str
    data: str
    rows: list[Row]
    ranks: dict[str, int]
    refused: dict[str, str]
    headlines: dict[str, str]
    notes: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "model": self.name,
            "data": self.data,
            "table": [dict(row.as_dict(), rank_by_time=self.ranks[row.name], pareto=row.name in self.front()) for row in self.rows],
            "refused": self.refused,
            "notes": self.notes,
            "files": [str(f) for f in self.files],
        }

    def front(self) -> set[str]:
        """Rows that no other beats in both time and the main quality; within a tie or an overlapping interval nobody beats."""
        return {row.name for row in self.rows if not any(_dominates(other, row) for other in self.rows)}

    def __str__(self) -> str:
        ranked = sorted(self.rows, key=lambda row: self.ranks[row.name])
        order = ", ".join(f"{self.ranks[r.name]}. {r.name}" for r in ranked)
        pieces = [f"{self.name} on {self.data}", "", tables.as_text(self.rows), "", f"By CPU time (ties share a rank): {order}"]
        pieces.append(f"Not beaten in both time and quality: {', '.join(r.name for r in self.rows if r.name in self.front())}")
        pieces += [f"{name}: {line}" for name, line in self.headlines.items()]
        pieces += [f"{row.name} is not faster: {row.why_not_faster}" for row in self.rows if row.why_not_faster]
        pieces += [f"{name} refused: {why}" for name, why in self.refused.items()]
        pieces += [f"Note: {note}" for note in self.notes] + [f"Wrote {file}" for file in self.files]
        return "\n".join(pieces)


def compare(
    *methods: str,
    model: Any,
    training_free: bool = False,
    data: Any = None,
    settings: dict[str, Any] | None = None,
    targets: tuple[str, ...] = (),
    ignore: tuple[str, ...] = (),
    labels: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    max_length: int | None = None,
    samples: int | None = None,
    revision: str | None = None,
    rounds: int = measuring.ROUNDS,
    out: str | Path | None = None,
    progress=None,
) -> Comparison:
    """Apply each method to its own copy of the model and measure all side by side with `unchanged` and `bf16`.

    `training_free` adds every method of the catalogue that changes a model of this kind without training. `settings` are
    `{"gptq.bits": 3}` for one method, `{"bits": 3}` for all that have it. `out` is a directory for the HTML report, the plot
    and the JSON. Raises UsageError for an unknown method or setting; a method that refuses the model is
    listed in `refused`.
    """
    if training_free:
        shape = model if isinstance(model, nn.Module) else models.skeleton(models.locate(model, revision))
        methods = tuple(dict.fromkeys([*methods, *training_free_methods(parts.kind(shape))]))
    if not methods:
        raise UsageError("compare needs at least one method, for example: compare gptq llm-int8 --model lab:minilm")
    if len(set(methods)) < len(methods):
        raise UsageError("compare was given the same method twice")
    target = saving.check_out(out) if out is not None else None
    plans = _plans(methods, settings or {}, targets, ignore)
    options = using.Options(data, labels, dtype, device, seed, batch_size, max_length, samples, revision, rounds)
    say = progress or (lambda text: None)
    say(f"loading {model}")
    session = using.open_session(model, options, [p for ps in plans.values() for p in ps])
    changed, reports, refused = {}, {}, {}
    for name, ps in plans.items():
        say(f"applying {name}")
        try:
            changed[name], reports[name] = applying.apply_all(ps, session.loaded.model, session.train)
        except FormularyError as error:
            refused[name] = str(error)
    if not changed:
        raise FormularyError("every method refused: " + "; ".join(f"{k}: {v}" for k, v in refused.items()))
    say("measuring")
    with tempfile.TemporaryDirectory() as scratch:
        rows = session.measure(changed, Path(scratch))
    for row in rows[2:]:
        row.headline = reports[row.name][-1].headline
        if row.ratio.estimate > 0.97:
            row.why_not_faster = measuring.why_not_faster(
                changed[row.name], session.loaded.model, session.kind, session.held_out
            )
    headlines = {name: "; ".join(r.headline for r in rs) for name, rs in reports.items()}
    found = Comparison(
        session.loaded.name, session.train.name, rows, _ranks(rows, session.timing), refused, headlines, session.notes
    )
    if target is not None:
        _write(found, target)
    return found


def _plans(methods, settings: dict[str, Any], targets, ignore) -> dict[str, list[applying.Plan]]:
    """A plan per method; every setting must be taken by at least one."""
    names = {name: [s.strip() for s in name.split("+")] for name in methods}
    untaken, plans = dict.fromkeys(settings), {}
    for method in methods:
        mine = {}
        for key, value in settings.items():
            owner, dot, _ = key.partition(".")
            if dot and owner in names[method]:
                mine[key] = value
            elif not dot:
                try:
                    applying.plan(method, {key: value}, targets, ignore)
                    mine[key] = value
                except UsageError as error:
                    if "has no parameter" not in str(error):
                        raise
        plans[method] = applying.plan(method, mine, targets, ignore)
        for key in mine:
            untaken.pop(key, None)
    if untaken:
        raise UsageError(f"no method here has the setting {next(iter(untaken))!r}")
    return plans


def _ranks(rows: list[Row], timing) -> dict[str, int]:
    """1 for the fastest; a row that ties with the first of a rank shares it."""
    ranks, rank, head = {}, 0, None
    for place, row in enumerate(sorted(rows, key=lambda r: r.seconds), 1):
        if head is None or timing.ratio(row.name, head).verdict not in ("tie", "inconclusive"):
            rank, head = place, row.name
        ranks[row.name] = rank
    return ranks


def _dominates(a: Row, b: Row) -> bool:
    """Whether `a` is clearly faster and clearly no worse, or clearly better and clearly no slower."""
    if a is b or not (a.qualities and b.qualities):
        return False
    faster = a.seconds < 0.97 * b.seconds
    no_slower = a.seconds <= b.seconds
    qa, qb = a.qualities[0], b.qualities[0]
    (ma, la, ha), (mb, lb, hb) = qa.interval(), qb.interval()
    better = ha < lb if qa.better == "lower" else la > hb
    no_worse = ma <= mb if qa.better == "lower" else ma >= mb
    return (faster and no_worse) or (better and no_slower)


def _write(found: Comparison, target: Path) -> None:
    from formulary.files import write_json
    from formulary.workshop import html

    with saving.staged(target) as stage:
        html.pareto_plot(found, stage / "pareto.png")
        found.files = [target / name for name in ("report.html", "pareto.png", "comparison.json")]
        write_json(stage / "comparison.json", {**found.as_dict(), "files": []})
        html.report(found, stage / "report.html", stage / "pareto.png")
