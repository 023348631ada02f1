"""Timing and memory. The one test about time has pure work of a fixed size, paired rounds, and a busy neighbor."""

import subprocess
import sys

import numpy as np
import pytest

from formulary.errors import FormularyError, UsageError
from formulary.evidence import Timing, compare_times, peak_memory, peak_memory_of


def work(size=100_000):
    total = 0
    for i in range(size):
        total += i * i
    return total


def read_beside_a_busy_process(seed):
    neighbor = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        return compare_times({"once": work, "again": work, "twice": lambda: (work(), work())}, seed=seed)
    finally:
        neighbor.kill()
        neighbor.wait()


def test_equal_work_is_a_tie_and_double_work_is_double_beside_a_busy_process():
    # Three readings at most, one of which must be right: the suite's other worker can change the clock in mid-reading
    # (1.88 was read once, in CI). A reading that is biased is wrong all three times.
    wrong = []
    for seed in range(3):
        timing = read_beside_a_busy_process(seed)
        if timing.ratio("again").verdict == "tie" and 1.9 <= timing.ratio("twice").estimate <= 2.1:
            break
        wrong.append((timing.ratio("again"), timing.ratio("twice")))
    assert len(wrong) < 3, wrong
    assert timing.ratio("twice").verdict == "slower"
    assert timing.ratio("once", "twice").verdict == "faster"
    assert timing.ratio("twice").speedup[0] == pytest.approx(0.5, abs=0.03)


def fixed(ratios):
    rounds = np.linspace(1, 1.5, len(ratios))
    return Timing(
        "a",
        {"a": tuple(rounds), "b": tuple(rounds * ratios)},
        {"a": tuple(rounds), "b": tuple(3 * rounds * ratios)},
        {"a": 1, "b": 1},
    )


def test_a_ratio_is_paired_within_rounds_and_the_clock_drift_cancels():
    even = fixed(np.full(15, 1.5)).ratio("b")
    assert (even.estimate, even.low, even.high, even.wall) == pytest.approx((1.5, 1.5, 1.5, 4.5))
    assert even.verdict == "slower"


@pytest.mark.parametrize(
    "ratios, verdict",
    [
        (np.linspace(0.97, 1.03, 15), "tie"),
        (np.full(15, 1.02), "tie"),
        (np.linspace(0.5, 1.5, 15), "inconclusive"),
        (np.linspace(0.85, 0.95, 15), "faster"),
        (np.linspace(1.7, 2.3, 15), "slower"),
    ],
)
def test_verdicts(ratios, verdict):
    assert fixed(ratios).ratio("b").verdict == verdict


def test_every_arm_runs_in_every_round_in_an_order_that_the_seed_draws():
    def orders(seed):
        calls = []
        works = {name: lambda name=name: (calls.append(name), work(2000)) for name in "abc"}
        compare_times(works, rounds=6, min_seconds=1e-9, warmup=0, seed=seed)
        return calls[-18:]

    first = orders(0)
    assert all(sorted(first[i : i + 3]) == ["a", "b", "c"] for i in range(0, 18, 3))
    assert first == orders(0) != orders(1)


def test_short_works_get_more_rounds_and_long_ones_no_less_than_15():
    assert 15 < len(compare_times({"short": lambda: work(500)}).cpu["short"]) <= 51
    assert len(compare_times({"long": lambda: work(10)}, min_seconds=0.06).cpu["long"]) == 15


def test_a_measurement_lasts_long_enough():
    timing = compare_times({"short": lambda: work(100)}, rounds=6, min_seconds=0.01)
    assert timing.repetitions["short"] > 100
    assert min(timing.cpu["short"]) * timing.repetitions["short"] > 0.003


def test_wrong_calls():
    with pytest.raises(UsageError, match="did you mean 'dense'"):
        compare_times({"dense": work}, baseline="dens")
    with pytest.raises(UsageError, match="at least one"):
        compare_times({})
    with pytest.raises(UsageError, match="at least 6"):
        compare_times({"a": work}, rounds=5)
    with pytest.raises(UsageError, match="no arm"):
        fixed(np.ones(15)).ratio("c")


def test_peak_memory_is_that_of_the_fresh_process():
    here = bytearray(300_000_000)
    small = peak_memory([sys.executable, "-S", "-c", "pass"])
    large = peak_memory([sys.executable, "-S", "-c", "bytearray(200_000_000); x = 1"])
    assert len(here) > large > 200_000_000 > 60_000_000 > small
    base, more = peak_memory_of("builtins:bytearray", [10]), peak_memory_of("builtins:bytearray", [150_000_000])
    assert more - base == pytest.approx(150_000_000, rel=0.1)


def test_a_measured_process_that_fails():
    with pytest.raises(FormularyError, match="code 3: too bad"):
        peak_memory([sys.executable, "-c", "import sys; print('too bad', file=sys.stderr); sys.exit(3)"])
    with pytest.raises(FormularyError, match="ValueError"):
        peak_memory_of("builtins:int", ["x"])
    with pytest.raises(FormularyError, match="still running"):
        peak_memory([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.5)
    with pytest.raises(UsageError, match="no command"):
        peak_memory(["no-such-command"])
    with pytest.raises(UsageError, match="package.module:name"):
        peak_memory_of("builtins")
