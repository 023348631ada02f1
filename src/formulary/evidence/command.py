"""`formulary check`: runs checks and prints what they saw.

Several checks run in processes of their own, as many at once as there are cores; while one of them times, the others wait. What
a check sees does not depend on it: each runs on one thread from its own seeds.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill, indent

import numpy as np

from formulary.errors import FormularyError, UsageError
from formulary.evidence import _turns

PROGRAM = (sys.executable, "-m", "formulary.cli", "check")
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
    plot: bool = True,
    workers: int | None = None,
    run: Callable | None = None,
) -> int:
    """Run the check of one paper, of a family or of all, print the reports (or JSON), draw; gives the exit code.

    `out` is the picture for one check and a directory for several; without it one check draws
    `formulary-check-SLUG.png` here and several draw nothing; with `plot` False nothing is drawn. `seeds` explores with
    another number than declared.
    `workers` is how many of several checks run at once, if not given one for every core that has 2 GB of memory free.
    `run` runs a slug's check here, one after the other, instead. One check that is refused does not stop the others.
    UsageError for contradictory options; a KeyboardInterrupt keeps what was finished and passes through.
    """
    from formulary.evidence._run import checked_slugs, run_check

    several = everything or family is not None
    if several == (slug is not None):
        raise UsageError("name one paper, or a --family, or --all")
    if record and seeds is not None:
        raise UsageError("--seeds explores and --record records the declared number of seeds; use one of the two")
    if workers is not None and (not several or workers < 1):
        raise UsageError("--workers says how many of several checks run at once: 1 or more, with --all or --family")
    slugs = checked_slugs(family) if several else [slug]
    if out is not None and not plot:
        raise UsageError("--out names a picture and --no-plot draws none; use one of the two")
    plots = _plots(slugs, several, Path(out) if out else None) if plot else {}
    options = {"record": record, "fresh": fresh, "seeds": seeds}
    if not several:
        made = _one(run or run_check, slug, quiet=as_json, plot=plots.get(slug), **options)
        if as_json:
            print(json.dumps(made, indent=1, ensure_ascii=False, allow_nan=False))
        return 0
    start, done, seconds = time.monotonic(), {}, {}
    ran = _here(run, slugs, options) if run else _apart(slugs, workers or _affordable_workers(), options)
    for name, made, took in ran:
        done[name], seconds[name] = made, took
        if "error" in made:
            print(f"{name}: error: {made['error']}", file=sys.stderr)
        else:
            _tell(made, record=record, quiet=as_json, plot=plots.get(name))
    made = [done[name] for name in slugs]
    if as_json:
        print(json.dumps(made, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        print(summary(made, seconds, time.monotonic() - start))
    return int(any("error" in one for one in made))


Ran = tuple[str, dict, float]
"""A slug, its record or {"slug", "error"}, and how many seconds it took."""


def _here(run: Callable, slugs: Iterable[str], options: Mapping) -> Iterator[Ran]:
    """Every check in this process, one after the other."""
    for slug in slugs:
        start = time.monotonic()
        try:
            made = _one(run, slug, tell=False, **options)
        except FormularyError as error:
            made = {"slug": slug, "error": str(error)}
        yield slug, made, time.monotonic() - start


def _apart(slugs: Iterable[str], workers: int, options: Mapping) -> Iterator[Ran]:
    """Every check in a process of its own, `workers` at once; they stop for one another's timings."""
    from concurrent.futures import ThreadPoolExecutor, as_completed

    with tempfile.TemporaryDirectory(prefix="formulary-turns-") as folder, ThreadPoolExecutor(workers) as pool:
        processes = _Processes(_turns.environment(folder))
        try:
            for future in as_completed([pool.submit(_in_a_process, name, options, processes) for name in slugs]):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise


class _Processes:
    """Processes that are stopped together, as by Ctrl-C; `variables` are added to their environment."""

    def __init__(self, variables: Mapping[str, str]):
        self.environment = {**os.environ, **variables}
        self.lock, self.running, self.stopped = threading.Lock(), set(), False

    def output(self, program: list[str]) -> tuple[str, int]:
        """What the program printed on standard output, and its exit code."""
        with self.lock:
            if self.stopped:
                return "", -signal.SIGINT
            process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=self.environment)
            self.running.add(process)
        text, _ = process.communicate()
        with self.lock:
            self.running.discard(process)
        return text, process.returncode

    def stop(self) -> None:
        """Interrupt all that run; none starts afterwards."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.send_signal(signal.SIGINT)


def _in_a_process(slug: str, options: Mapping, processes: _Processes) -> Ran:
    """One check by `formulary check SLUG --json`; its progress goes to standard error as it comes."""
    arguments = [f"--{name}" for name in ("record", "fresh") if options[name]]
    arguments += ["--seeds", str(options["seeds"])] if options["seeds"] is not None else []
    start = time.monotonic()
    text, code = processes.output([*PROGRAM, slug, "--json", "--no-plot", *arguments])
    try:
        made = json.loads(text)
    except json.JSONDecodeError:
        made = {"error": f"its process ended with exit code {code} and no record"}
    if "error" in made:
        made = {"slug": slug, "error": made["error"]}
    return slug, made, time.monotonic() - start


def _affordable_workers() -> int:
    """One for every core that this process may use, as long as each has 2 GB of free memory; one where checks cannot wait for
    one another.
    """
    if not _turns.supported():
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return cores
    return max(1, min(cores, free // 2_000_000_000))


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
    run: Callable, slug: str, *, record: bool, fresh: bool, seeds: int | None, quiet: bool = False, plot: Path | None = None,
    tell: bool = True,
) -> dict:  # fmt: skip
    with _shown_progress(slug) as progress:
        try:
            made = run(slug, record=record, resume=not fresh, seeds=seeds, progress=progress)
        except NotImplementedError as error:
            raise FormularyError(f"{slug} is not written yet: {error}") from None
        except KeyboardInterrupt:
            print(f"{slug}: what was finished is kept; the same command goes on from there", file=sys.stderr)
            raise
    if tell:
        _tell(made, record=record, quiet=quiet, plot=plot)
    return made


def _tell(made: dict, *, record: bool, quiet: bool, plot: Path | None) -> None:
    """Draw the picture and print the report."""
    drawn = None
    if plot is not None and (made.get("arms") or made.get("smaller")):
        from formulary.evidence._plot import draw

        drawn = draw(made, plot)
    if not quiet:
        print(report(made))
        if drawn:
            print(f"  plot: {drawn}")
        print("  recorded in the paper's room\n" if record else "")


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


def summary(records: list[dict], seconds: Mapping[str, float], total: float) -> str:
    """One line for each of several checks, with how long it took, and how long all took together."""
    if not records:
        return "No paper there has a check yet."
    rows = [[r["slug"], f"error: {r['error']}" if "error" in r else r["verdict"]] for r in records]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    lines = [f"{slug:<{widths[0]}}  {said:<{widths[1]}}  {seconds[slug]:5.0f} s" for slug, said in rows]
    return "\n".join([*lines, f"{len(rows)} checks in {total / 60:.0f} min {total % 60:02.0f} s"])
