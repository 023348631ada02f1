"""Checks, intervals, verdicts, records and timing. Importing this loads no torch, scipy or matplotlib; what needs
them is loaded when first used.
"""

from importlib import import_module

from formulary.evidence._check import Check, Outcome
from formulary.evidence._interval import Interval, interval, limits, median_interval, ratio_interval
from formulary.evidence._predicates import (
    FAILS,
    HOLDS,
    TIME_METRIC,
    UNSURE,
    UNTESTABLE,
    all_of,
    at_least,
    at_most,
    exact,
    no_worse,
    speedup,
    within,
)

_LATER = {
    "run_check": "_run",
    "load_check": "_run",
    "judge": "_record",
    "read_record": "_record",
    "validate_record": "_record",
    "draw": "_plot",
    "compare_times": "timing",
    "Timing": "timing",
    "peak_memory": "memory",
    "peak_memory_of": "memory",
}


def __getattr__(name: str):
    if name in _LATER:
        return getattr(import_module(f"formulary.evidence.{_LATER[name]}"), name)
    raise AttributeError(f"module 'formulary.evidence' has no attribute {name!r}")


__all__ = [
    "Check",
    "FAILS",
    "HOLDS",
    "Interval",
    "Outcome",
    "TIME_METRIC",
    "UNSURE",
    "UNTESTABLE",
    "all_of",
    "at_least",
    "at_most",
    "exact",
    "interval",
    "limits",
    "median_interval",
    "no_worse",
    "ratio_interval",
    "speedup",
    "within",
    *_LATER,
]
