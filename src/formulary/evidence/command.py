"""`formulary check`: runs checks and prints what they saw."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill, indent

import numpy as np

from formulary.errors import FormularyError, UsageError

_PLOT_ENDINGS = (".png", ".svg", ".pdf")


def check_command(
    slug: str | None = None,
    *,
    everything: bool = False,
    family: str | None = None,
    record: bool = False,
    as_json: bool = False,
    fresh: bool = False,
    seeds: int | None = None,
    out: str | Path | None = None,
    run: Callable | None = None,
) -> int:
    """Run the check of one paper, of a family or of all, print the reports (or JSON), draw; gives the exit code.

    `out` is the picture for one check and a directory for several; without it one check draws
    `formulary-check-SLUG.png` here and several draw nothing. `seeds` explores with another number than declared. `run`
    runs a slug's check, `run_check` if not given. One check that is refused does not stop the others. UsageError for
    contradictory options; a KeyboardInterrupt keeps what was finished and passes through.
    """
    from formulary.evidence._run import checked_slugs, run_check

    several = everything or family is not None
    if several == (slug is not None):
        raise UsageError("name one paper, or a --family, or --all")
    if record and seeds is not None:
        raise UsageError("--seeds explores and --record records the declared number of seeds; use one of the two")
    slugs = checked_slugs(family) if several else [slug]
    plots = _plots(slugs, several, Path(out) if out else None)
    done, code = [], 0
    for name in slugs:
        try:
            done.append(
                _one(
                    run or run_check, name, record=record, quiet=as_json, fresh=fresh, seeds=seeds, plot=plots.get(name)
                )
            )
        except FormularyError as error:
            if not several:
                raise
            code = 1
            done.append({"slug": name, "error": str(error)})
            print(f"{name}: error: {error}", file=sys.stderr)
    if as_json:
        print(json.dumps(done if several else done[0], indent=1, ensure_ascii=False, allow_nan=False))
    elif several:
        print(summary(done))
    return code


def _plots(slugs: list[str], several: bool, out: Path | None) -> dict[str, Path]:
    """Where each picture goes; refused before anything runs when it cannot be written."""
    if several and out is None:
        return {}
    if several:
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out {out} is a file; for several checks it is a directory")
        out.mkdir(parents=True, exist_ok=True)
        return {slug: out / f"formulary-check-{slug}.png" for slug in slugs}
    path = out or Path(f"formulary-check-{slugs[0]}.png")
    if path.suffix not in _PLOT_ENDINGS:
        raise UsageError(f"--out {path}: the picture's name must end in one of {', '.join(_PLOT_ENDINGS)}")
    if not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise FormularyError(f"--out {path}: its directory does not exist or is not writable")
    return {slugs[0]: path}


def _one(
    run: Callable, slug: str, *, record: bool, quiet: bool, fresh: bool, seeds: int | None, plot: Path | None
) -> dict:
    with _shown_progress(slug) as progress:
        try:
            made = run(slug, record=record, resume=not fresh, seeds=seeds, progress=progress)
        except NotImplementedError as error:
            raise FormularyError(f"{slug} is not written yet: {error}") from None
        except KeyboardInterrupt:
            print(f"{slug}: what was finished is kept; the same command goes on from there", file=sys.stderr)
            raise
    drawn = None
    if plot is not None and (made.get("arms") or made.get("smaller")):
        from formulary.evidence._plot import draw

        drawn = draw(made, plot)
    if not quiet:
        print(report(made))
        if drawn:
            print(f"  plot: {drawn}")
        print("  recorded in the paper's room\n" if record else "")
    return made


@contextmanager
def _shown_progress(slug: str) -> Iterator[Callable]:
    """A bar on a terminal, else a line every two seconds; on standard error, so that reports and JSON stay clean."""
    if not sys.stderr.isatty():
        yield _Lines(slug)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn(slug),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.description}"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, left="")
        yield lambda p: bar.update(task, description=p.now, completed=p.done, total=p.total, left=_left(p.remaining))


class _Lines:
    """Prints progress as plain lines, not more than one in two seconds."""

    def __init__(self, slug: str):
        self.slug, self.last = slug, 0.0

    def __call__(self, p) -> None:
        if time.monotonic() - self.last >= 2:
            self.last = time.monotonic()
            print(
                f"{self.slug}: {p.done} of {p.total}, {p.now} {_left(p.remaining)}".rstrip(),
                file=sys.stderr,
                flush=True,
            )


def _left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"about {seconds:.0f} s left" if seconds < 90 else f"about {seconds / 60:.0f} min left"


def report(record: Mapping) -> str:
    """A record for a reader: verdict, predictions with intervals, null and positive, budgets, and every seed."""
    said = f"exploratory, not recorded: {record['verdict']}" if record["exploratory"] else record["verdict"]
    lines = [
        f"{record['slug']}: {said}",
        fill(f"claim: {record['claim']}", 110, initial_indent="  ", subsequent_indent="    "),
    ]
    if record.get("why") is not None:
        lines.append(fill(f"why: {record['why']}", 110, initial_indent="  ", subsequent_indent="    "))
        if record["smaller"]:
            lines += ["  instead, a smaller question was asked:", indent(_measured(record["smaller"]), "  ")]
        return "\n".join(lines)
    return "\n".join([*lines, _measured(record)])


def _measured(record: Mapping) -> str:
    lines = []
    if record.get("why") is None and record["exploratory"] is False:
        lines.append(
            f"  about: {record['scope']}; {len(record['seeds'])} seeds, {record['items']} items, "
            f"a seed redraws {record['redraws']}"
        )
    for finding in record["predicates"]:
        lines.append(f"  - {finding['sentence']}: {finding['verdict']}")
        if finding.get("power"):
            lines.append(f"      {finding['power']}")
    for key, name in (("null", "planted null"), ("oracle", "planted positive")):
        planted = record[key]
        lines.append(f"  {name}: {planted['verdict']}")
        lines += [
            f"      {f['sentence']} ({how})" for f, how in zip(planted["predicates"], planted["how"], strict=True)
        ]
    lines += [f"  note: {reason}" for reason in record["reasons"]]
    budget = {arm: spent for arm, spent in record["budget"].items() if spent}
    if budget:
        kinds = sorted({kind for spent in budget.values() for kind in spent})
        rows = [[arm, *(f"{spent[k]:.6g}" if k in spent else "-" for k in kinds)] for arm, spent in budget.items()]
        lines += ["  budget", *_table(["", *kinds], rows)]
        if record["parity"]["within"]:
            lines.append("    within 5 % of each other")
    for metric in record["metrics"]:
        lines += [
            f"  {metric}, mean per seed",
            *_table(["seed", *map(str, record["seeds"])], _seed_rows(record, metric)),
        ]
    return "\n".join(lines)


def _seed_rows(record: Mapping, metric: str) -> list[list[str]]:
    rows = []
    for arm, metrics in record["arms"].items():
        if metric in metrics:
            rows.append([arm, *("failed" if row is None else f"{np.mean(row):.4g}" for row in metrics[metric])])
    return rows


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return [
        "    "
        + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in [head, *rows]
    ]


def summary(records: list[dict]) -> str:
    """One line for each of several checks."""
    rows = [[r["slug"], f"error: {r['error']}" if "error" in r else r["verdict"]] for r in records]
    width = max([len(row[0]) for row in rows], default=0)
    return (
        "\n".join(f"{slug.ljust(width)}  {said}" for slug, said in rows) if rows else "No paper there has a check yet."
    )
