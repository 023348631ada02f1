"""Arms timed against each other, each in a process of its own and one at a time, on one thread.

An arm is a function without arguments that loads what it needs and returns `(work, facts)`: `work()` is one measured call, and
`facts` is a dict of numbers about its results. Every round runs all arms once, in random order; what counts is the median over
rounds of the ratio of CPU times within a round, with an exact interval. CPU time covers all threads of an arm's process.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from formulary.evidence._interval import median_interval

DOCS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
ONE = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
ONE["TOKENIZERS_PARALLELISM"] = "false"


def serve(arm: Callable) -> None:
    """The arm's own process: one line of facts, then CPU and wall seconds for every line read."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    work, facts = arm()
    work()
    print(json.dumps(facts), file=channel, flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        print(json.dumps([time.process_time() - cpu, time.perf_counter() - wall]), file=channel, flush=True)


def measure(script: str, arms: list[str], rounds: int) -> dict[str, dict]:
    """name -> {"facts", "cpu": seconds per round} for the arms that start here; the others are named with their error."""
    running, found = {}, {}
    for name in arms:
        process = subprocess.Popen(
            [sys.executable, script, "--arm", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={**os.environ, **ONE},
        )  # fmt: skip
        line = process.stdout.readline()
        if not line:
            last = (process.stderr.read().strip().splitlines() or ["no message"])[-1]
            print(f"{name}: not here ({last[:160]})", file=sys.stderr)
            continue
        running[name], found[name] = process, {"facts": json.loads(line), "cpu": []}
        print(f"{name}: ready {json.loads(line)}", file=sys.stderr)
    order = random.Random(0)
    for number in range(rounds):
        for name in order.sample(list(running), len(running)):
            running[name].stdin.write("go\n")
            running[name].stdin.flush()
            found[name]["cpu"].append(json.loads(running[name].stdout.readline())[0])
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    for process in running.values():
        process.stdin.close()
        process.wait()
    return found


def ratio(found: dict, faster: str, slower: str) -> tuple[float, float, float]:
    """How many times as fast as `slower` `faster` is: median over rounds and its 95 % interval."""
    return median_interval(np.array(found[slower]["cpu"]) / np.array(found[faster]["cpu"]))


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names)} logical cores, one thread"


def table(
    found: dict, ours: tuple[str, ...], items: int, unit: str, facts: dict[str, str], limit: str | None = None
) -> str:
    """Markdown, fastest first: items per second, how many times as fast each of `ours` is, and the chosen facts that any arm has.

    With `limit`, an arm that only reads, the share of the memory's speed at which each arm reads its "MB" of weights an item.
    """
    line = lambda *cells: "| " + " | ".join(cells) + " |"
    ours = tuple(name for name in ours if name in found)
    facts = {key: title for key, title in facts.items() if any(key in one["facts"] for one in found.values())}
    rows = [line("", f"{unit}/s", *(f"{name} is" for name in ours), *facts.values(), *(["of the memory's speed"] if limit else []))]
    rows += ["|---" * (2 + len(ours) + len(facts) + bool(limit)) + "|"]
    for name, one in sorted(found.items(), key=lambda pair: float(np.median(pair[1]["cpu"]))):
        times = ["" if name == mine else "{:.2f}x [{:.2f}, {:.2f}]".format(*ratio(found, mine, name)) for mine in ours]
        shown = ["" if one["facts"].get(key) is None else f"{one['facts'][key]:.4g}" for key in facts]
        if limit:
            part = "MB" in one["facts"] and limit in found and one["facts"]["MB"] / found[limit]["facts"]["MB"]
            shown.append(f"{part * ratio(found, name, limit)[0]:.0%}" if part else "")
        label = f"**{name}**" if name in ours else name
        rows.append(line(label, f"{items / float(np.median(one['cpu'])):.4g}", *times, *shown))
    return "\n".join(rows)


def plot(found: dict, ours: tuple[str, ...], items: int, unit: str, path: Path) -> None:
    """Items per second of every arm, one dot a round."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = sorted(found, key=lambda name: float(np.median(found[name]["cpu"])), reverse=True)
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(names) + 1.2))
    for row, name in enumerate(names):
        speeds = items / np.array(found[name]["cpu"])
        color = "tab:orange" if name in ours else "tab:blue"
        axes.barh(row, float(np.median(speeds)), color=color, alpha=0.5)
        axes.plot(speeds, np.full(len(speeds), row), "o", color=color, markersize=3)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(f"{unit} per second of CPU time, one thread; a dot is a round")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


@dataclass(frozen=True)
class Section:
    """A setting in which all arms but those in `without` are measured; `items` is how many one call works on; `limit` is the arm
    that only reads.
    """

    title: str
    items: int
    unit: str
    without: tuple[str, ...] = ()
    limit: str | None = None


def run(
    script: str, doc: str, arms: dict[str, Callable], ours: tuple[str, ...], sections: dict[str, Section], *, facts: dict[str, str],
    rounds: int,
) -> None:
    """The command line of a benchmark: an arm's own process with `--arm SECTION: NAME`, else all of them, a table and a
    plot for each section; `arms` take the section's name.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--only", nargs="*", metavar="ARM", help="these arms alone; nothing is written to docs/benchmarks")
    options = parser.parse_args()
    if options.rounds < 6:
        parser.error("an interval of 95 % needs at least 6 rounds")
    if options.arm:
        section, _, name = options.arm.partition(": ")
        return serve(lambda: arms[name](section))
    DOCS.mkdir(parents=True, exist_ok=True)
    page = Path(script).stem
    text = [f"# {page.capitalize()}: {doc.splitlines()[0]}", "", f"`python benchmarks/{page}.py` on {machine()}.", ""]
    for name, section in sections.items():
        chosen = options.only or [arm for arm in arms if arm not in section.without]
        found = measure(script, [f"{name}: {arm}" for arm in chosen], options.rounds)
        found = {arm.partition(": ")[2]: one for arm, one in found.items()}
        shown = table(found, ours, section.items, section.unit, facts, section.limit)
        print(shown, flush=True)
        if options.only:
            continue
        plot(found, ours, section.items, section.unit, DOCS / f"{page}-{name}.png")
        text += [f"## {section.title}", "", shown, "", f"![]({page}-{name}.png)", ""]
        (DOCS / f"{page}.md").write_text("\n".join(text))
