"""Predicates: which side an interval is on, what the planted outcomes are, and what is refused."""

import numpy as np
import pytest

from formulary.errors import UsageError
from formulary.evidence import FAILS, HOLDS, UNSURE, all_of, at_least, at_most, exact, limits, no_worse, speedup, within
from formulary.evidence._predicates import from_specification, reading, specification

DRAW = np.random.default_rng(0)
BASE = 2 + 0.1 * DRAW.standard_normal((8, 1)) + 0.1 * DRAW.standard_normal((8, 30))
NOISE = 0.05 * DRAW.standard_normal((8, 30))


def verdict(predicate, a, b=BASE, items="fresh"):
    return predicate.judge(a, b if predicate.b else None, items, "a")["verdict"]


@pytest.mark.parametrize(
    "predicate, factor, expected",
    [
        (at_most("a", "b", ratio=0.7), 0.5, HOLDS),
        (at_most("a", "b", ratio=0.7), 0.9, FAILS),
        (at_most("a", "b", ratio=0.7), 0.7, UNSURE),
        (at_most("a", "b", minus=0.2), 0.8, HOLDS),
        (at_most("a", "b", minus=0.2), 1.0, FAILS),
        (at_least("a", "b", ratio=1.5), 2.0, HOLDS),
        (at_least("a", "b", ratio=1.5), 1.0, FAILS),
        (at_least("a", "b", plus=0.2), 1.2, HOLDS),
        (at_least("a", "b", plus=0.2), 1.0, FAILS),
        (at_most("a", 1.5), 0.5, HOLDS),
        (at_most("a", 1.5), 1.0, FAILS),
        (at_least("a", 1.5), 1.0, HOLDS),
        (at_least("a", 1.5), 0.5, FAILS),
        (no_worse("a", "b", margin=0.2), 0.5, HOLDS),
        (no_worse("a", "b", margin=0.2), 1.05, HOLDS),
        (no_worse("a", "b", margin=0.2), 1.3, FAILS),
        (no_worse("a", "b", margin=0.2, higher_is_better=True), 1.3, HOLDS),
        (no_worse("a", "b", margin=0.2, higher_is_better=True), 0.5, FAILS),
        (within("a", "b", margin=0.2), 1.0, HOLDS),
        (within("a", "b", margin=0.2), 0.8, FAILS),
        (within("a", "b", margin=0.2), 1.2, FAILS),
        (within("a", "b", margin=0.2), 1.1, UNSURE),
    ],
)
def test_sides(predicate, factor, expected):
    noise = NOISE - NOISE.mean()
    b = BASE + 2 - BASE.mean()
    assert verdict(predicate, factor * b + noise, b) == expected


def test_an_arm_equal_to_its_baseline_is_not_better():
    assert verdict(at_most("a", "b"), BASE.copy()) == FAILS
    assert verdict(at_least("a", "b"), BASE.copy()) == FAILS
    assert verdict(at_most("a", "b", ratio=0.7), 0.7 * BASE) == FAILS
    assert verdict(at_most("a", "b"), BASE * (1 - 1e-9)) == FAILS
    assert verdict(within("a", "b", margin=1e-3), BASE.copy()) == HOLDS


def test_sides_follow_the_interval():
    for shift in np.linspace(-0.1, 0.1, 21):
        a = BASE + NOISE + shift
        _, low, high, _, _ = limits(a - BASE, "fresh")
        assert verdict(at_most("a", "b"), a) == (HOLDS if high < 0 else FAILS if low >= 0 else UNSURE)


def test_a_ratio_is_told_as_a_ratio_and_a_difference_as_a_difference():
    seen = at_most("gptq", "rtn", ratio=0.7, metric="excess loss, nats/token").judge(0.43 * BASE, BASE, "fresh", "gptq")
    assert seen["sentence"] == "gptq / rtn excess loss 0.43 [0.43, 0.43], predicted <= 0.7"
    seen = at_most("gptq", "rtn", minus=0.5, metric="loss, nats/token").judge(BASE - 1, BASE, "fresh", "gptq")
    assert seen["sentence"] == "gptq - rtn loss -1 [-1, -1] nats/token, predicted <= -0.5 nats/token"
    seen = at_most("gptq", "rtn", metric="loss").judge(0.5 * BASE, BASE, "fresh", "gptq")
    assert seen["predicted"] == "< 1"


def test_a_baseline_without_a_sure_sign_is_told_as_a_difference():
    b = np.random.default_rng(1).standard_normal((6, 4))
    seen = at_most("a", "b", ratio=0.5).judge(b + 1, b, "fresh", "a")
    assert seen["of"] == "a - 0.5 x b outcome"
    assert np.isfinite([seen["low"], seen["high"]]).all()


def test_exact_is_spoiled_by_one_item():
    errors = np.full((3, 50), 1e-6)
    assert verdict(exact("a", tol=1e-5), errors) == HOLDS
    errors[2, 49] = -2e-5
    assert verdict(exact("a", tol=1e-5), errors) == FAILS
    assert verdict(exact("a", tol=0), np.zeros((1, 1))) == HOLDS


@pytest.mark.parametrize(
    "ratio, at_least_, expected",
    [
        (2.0, 1.5, HOLDS),
        (1.2, 1.5, FAILS),
        (1.0, 1.0, FAILS),
        (1.02, 1.0, FAILS),
        (1.06, 1.0, HOLDS),
        (0.99, 0.9, HOLDS),
        (0.8, 0.9, FAILS),
    ],
)
def test_speedup(ratio, at_least_, expected):
    draw = np.random.default_rng(2)
    b = 1 + 0.003 * draw.standard_normal((5, 15))
    a = 1 / ratio + 0.003 * draw.standard_normal((5, 15))
    assert verdict(speedup("a", "b", at_least=at_least_), a, b) == expected
    assert verdict(speedup("a", "b", at_least=at_least_), a[:1], b[:1]) == expected
    assert verdict(speedup("a", at_least=at_least_), b / a) == expected


def test_speedup_too_noisy_is_inconclusive_and_a_tie_says_so():
    draw = np.random.default_rng(3)
    noisy = np.exp(0.4 * draw.standard_normal((5, 15)) + 0.3 * draw.standard_normal((5, 1)))
    assert verdict(speedup("a", "b"), noisy, np.ones((5, 15))) == UNSURE
    even = 1 + 0.002 * draw.standard_normal((5, 15))
    assert "(a tie)" in speedup("a", "b").judge(even, np.ones((5, 15)), "fresh", "a")["sentence"]


def test_readings_of_a_time_ratio():
    assert reading(1.0, 0.99, 1.01) == "tie"
    assert reading(1.02, 1.01, 1.03) == "tie"
    assert reading(1.05, 1.02, 1.08) == "above"
    assert reading(0.5, 0.45, 0.55) == "below"
    assert reading(1.0, 0.85, 1.15) == "inconclusive"


EVERY = [
    at_most("a", "b", ratio=0.7),
    at_most("a", "b"),
    at_most("a", "b", minus=0.3),
    at_least("a", "b", ratio=1.2),
    at_least("a", "b", plus=0.3),
    at_most("a", "b", ratio=1.1),
    no_worse("a", "b", margin=0.1),
    no_worse("a", "b", margin=0.1, higher_is_better=True),
    within("a", "b", margin=0.1),
    at_most("a", 1.0),
    at_least("a", 0, effect=0.5),
    exact("a", tol=0.01),
    exact("a", tol=0),
    speedup("a", "b", at_least=1.5),
    speedup("a", "b"),
    speedup("a", "b", at_least=0.9),
    speedup("a", at_least=2),
]


@pytest.mark.parametrize("predicate", EVERY, ids=lambda p: f"{type(p).__name__} {p.a} {p.b}")
@pytest.mark.parametrize("factor", [0.2, 1.0, 1.3, 5.0])
def test_planted_null_never_holds_and_planted_positive_does(predicate, factor):
    """Whatever the method did: the planted outcomes are about the check, with the method's scatter only."""
    a = factor * BASE + 0.1 * NOISE if predicate.b else factor + NOISE
    a = np.abs(a)
    b = BASE if predicate.b else None
    if predicate.rerun is None:
        assert verdict(predicate, predicate.planted("null", a, b)[0]) != HOLDS
    if factor <= 1.3:
        assert verdict(predicate, predicate.planted("positive", a, b)[0]) == HOLDS


def test_positive_of_a_noisy_comparison_does_not_hold():
    draw = np.random.default_rng(4)
    noisy = 0.5 * BASE + 3 * draw.standard_normal((8, 1))
    predicate = at_most("a", "b", ratio=0.7)
    assert verdict(predicate, predicate.planted("positive", noisy, BASE)[0]) != HOLDS


def test_a_negative_baseline_shows_as_a_positive_that_fails():
    predicate = at_most("a", "b", ratio=0.7)
    assert verdict(predicate, predicate.planted("positive", -BASE, -BASE)[0], -BASE) != HOLDS
    assert verdict(predicate, -BASE, -BASE) == HOLDS


def test_only_better_than_reruns_its_baseline():
    assert at_most("a", "b", ratio=0.7).rerun == "b"
    assert at_most("a", "b").rerun == "b"
    assert at_most("a", "b", ratio=0.7, null="c").rerun is None
    assert at_most("a", "b", ratio=1.1).rerun is None
    assert no_worse("a", "b", margin=1).rerun is None


@pytest.mark.parametrize("predicate", EVERY, ids=lambda p: f"{type(p).__name__} {p.a} {p.b}")
def test_a_specification_comes_back(predicate):
    import json

    assert from_specification(json.loads(json.dumps(specification(predicate)))) == predicate


@pytest.mark.parametrize(
    "wrong, said",
    [
        (lambda: at_most("a", "a"), "with itself"),
        (lambda: at_most("a", "b", ratio=0), "above 0"),
        (lambda: at_most("a", "b", ratio=float("nan")), "finite"),
        (lambda: at_most("a", "b", ratio=0.7, minus=-1), "opposite"),
        (lambda: at_most("a", 3, ratio=0.7), "constant"),
        (lambda: at_least("a", 0), "effect="),
        (lambda: at_least("a", 1, effect=-1), "above 0"),
        (lambda: within("a", "b", margin=0), "margin"),
        (lambda: no_worse("a", "b", margin=-1), "margin"),
        (lambda: exact("a", tol=-1), "tolerance"),
        (lambda: speedup("a", "b", at_least=0), "factor"),
        (lambda: all_of(), "at least one"),
    ],
)
def test_wrong_predicates_are_refused(wrong, said):
    with pytest.raises(UsageError, match=said):
        wrong()
