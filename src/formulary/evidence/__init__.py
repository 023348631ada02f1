"""Checks, intervals, verdicts, records and timing.

A `Check` states predictions: `at_most(a, b, ratio=, minus=)` and `at_least(a, b, ratio=, plus=)` compare the means of two
arms, or of an arm and a constant (then `effect=`, the size to be seen, or `oracle=`, an arm that reaches it, is needed for
the planted positive); `no_worse(a, b, margin=)` and `within(a, b, margin=)` are one-sided and two-sided equivalence;
`exact(a, tol=)` is an identity, every item of it; `speedup(a, b, at_least=)` times the arms' `Outcome(values, work=callable)`
side by side; `all_of(...)` joins them. Arms return one number an item, or metric -> numbers (name the metric in the
predicate), or an `Outcome` that also states a `budget`.

Importing this loads no torch, scipy or matplotlib; what needs
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
