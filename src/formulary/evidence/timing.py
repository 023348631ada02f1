"""The one way to time: paired CPU-time ratios in random order, on one thread, with an interval.

On a machine that others use, wall time and minima mislead. CPU time still drifts with clock speed and shared caches,
and it drifts for all arms of a round alike; so each round times every arm once, in random order, and what counts is the
median over rounds of the ratio within a round. Its interval lies between two order statistics: exact for a median
whatever the distribution, without resampling. CPU time covers every thread of this process, so a peer that brings its
own thread pool must be timed in a process of its own; what waits for a disk or for children is read by its wall time.
"""

import gc
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from formulary.errors import UsageError, nearest
from formulary.evidence._interval import median_interval
from formulary.evidence._predicates import reading

_SETTLE_SECONDS = 0.3
"""Worker threads of an earlier parallel region spin for about this long, and their spinning would be counted."""

FEWEST_ROUNDS, LEAST_ROUNDS, MOST_ROUNDS = 6, 15, 51
_ARM_SECONDS = 0.75


@dataclass(frozen=True)
class Ratio:
    """time(arm) / time(baseline): the median over rounds with its 95 % interval. `wall` is the same median of
    wall-clock ratios.

    `verdict` is "faster", "slower", "tie" (the interval contains 1 or the effect is below 3 %) or "inconclusive" (such
    an interval, wider than +-10 %).
    """

    estimate: float
    low: float
    high: float
    wall: float
    verdict: str

    @property
    def speedup(self) -> tuple[float, float, float]:
        """The same the other way up: how many times as fast as the baseline, with its interval."""
        return 1 / self.estimate, 1 / self.high, 1 / self.low


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one number per round: `cpu` and `wall` map arm -> rounds; `repetitions` is how many calls
    made one measurement.
    """

    baseline: str
    cpu: Mapping[str, tuple[float, ...]]
    wall: Mapping[str, tuple[float, ...]]
    repetitions: Mapping[str, int]

    def ratio(self, arm: str, baseline: str | None = None) -> Ratio:
        """How the arm's time stands to the baseline's (to another arm's, if one is named)."""
        base = baseline or self.baseline
        for name in (arm, base):
            if name not in self.cpu:
                raise UsageError(
                    f"no arm {name!r} was timed (there are {', '.join(self.cpu)}){nearest(name, self.cpu)}"
                )
        middle, low, high = median_interval(np.array(self.cpu[arm]) / np.array(self.cpu[base]))
        verdict = {"above": "slower", "below": "faster"}.get(reading(middle, low, high), reading(middle, low, high))
        return Ratio(middle, low, high, float(np.median(np.array(self.wall[arm]) / np.array(self.wall[base]))), verdict)

    def seconds(self, arm: str) -> float:
        """Median CPU seconds of one call."""
        return float(np.median(self.cpu[arm]))

    def wall_seconds(self, arm: str) -> float:
        """Median wall-clock seconds of one call."""
        return float(np.median(self.wall[arm]))


def compare_times(
    works: Mapping[str, Callable[[], Any]],
    *,
    baseline: str | None = None,
    rounds: int | None = None,
    min_seconds: float = 0.015,
    warmup: int = 1,
    seed: int = 0,
) -> Timing:
    """Time callables of no arguments against each other on one thread.

    Every arm is called `warmup` times, then so many times per measurement that one lasts at least `min_seconds` of CPU.
    In each of the `rounds` all arms are measured once, in an order drawn from `seed`. If not given, they are as many as
    let an arm be measured for about 0.75 s, from 15 (the least for a result to report) to 51: on a machine with 17
    processes on 2 cores, equal arms read as 1.00 +- 0.01 in 51 rounds of 15 ms, and +- 0.05 in 15 rounds of 50 ms.
    `baseline` is the first arm if not named. Raises UsageError for no arms, an unknown baseline or less than 6 rounds;
    errors of a work pass through.

    >>> work = lambda: sum(range(2000))
    >>> timing = compare_times({"once": work, "again": work}, rounds=6, min_seconds=0.002)
    >>> sorted(timing.cpu), len(timing.cpu["once"])
    (['again', 'once'], 6)
    """
    if not works:
        raise UsageError("compare_times() needs at least one work")
    base = baseline or next(iter(works))
    if base not in works:
        raise UsageError(f"the baseline {base!r} is none of the works ({', '.join(works)}){nearest(base, works)}")
    if rounds is not None and rounds < FEWEST_ROUNDS:
        raise UsageError(f"rounds={rounds}; the interval of a median needs at least {FEWEST_ROUNDS}, and a result to report {LEAST_ROUNDS}")
    order, draw = list(works), random.Random(seed)
    cpu, wall = {arm: [] for arm in works}, {arm: [] for arm in works}
    with one_thread(), _no_collection():
        repetitions = {arm: _repetitions(work, min_seconds, warmup) for arm, work in works.items()}
        for _ in range(rounds or _affordable(works, repetitions)):
            draw.shuffle(order)
            for arm in order:
                spent = _measure(works[arm], repetitions[arm])
                cpu[arm].append(spent[0])
                wall[arm].append(spent[1])
    return Timing(base, {k: tuple(v) for k, v in cpu.items()}, {k: tuple(v) for k, v in wall.items()}, repetitions)


def _affordable(works: Mapping[str, Callable[[], Any]], repetitions: Mapping[str, int]) -> int:
    """The number of rounds in which the slowest arm is measured for about `_ARM_SECONDS`."""
    longest = max(_measure(work, repetitions[arm])[0] * repetitions[arm] for arm, work in works.items())
    return min(max(int(_ARM_SECONDS / max(longest, 1e-9)), LEAST_ROUNDS), MOST_ROUNDS)


def _measure(work: Callable[[], Any], repetitions: int) -> tuple[float, float]:
    """CPU and wall seconds of one call."""
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repetitions):
        work()
    return (time.process_time() - cpu) / repetitions, (time.perf_counter() - wall) / repetitions


@contextmanager
def _no_collection() -> Iterator[None]:
    """The garbage collector off, and what is there already frozen, so that collecting between measurements is quick."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def _repetitions(work: Callable[[], Any], min_seconds: float, warmup: int) -> int:
    """How many calls last `min_seconds` of CPU: doubled until a tenth of it is reached, so that the clock's grain
    does not matter.
    """
    for _ in range(warmup):
        work()
    count = 1
    while (each := _measure(work, count)[0]) * count < min_seconds / 10 and count < 1 << 24:
        count *= 2
    return max(count if each == 0 else 1, ceil(min_seconds / each) if each else 1)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch and for the linear algebra under numpy, and what it was before afterwards."""
    from threadpoolctl import threadpool_limits

    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 1
    with threadpool_limits(limits=1):
        if torch:
            torch.set_num_threads(1)
        if before > 1:
            time.sleep(_SETTLE_SECONDS)
        try:
            yield
        finally:
            if torch:
                torch.set_num_threads(before)
