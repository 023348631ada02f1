"""Predictions that a check makes before it runs, each testable, each with a planted null and a planted positive.

A predicate knows the arm it is about (`a`, the method), what it is compared with (`b`, an arm or a constant), and how
far it must be on the right side. It judges two outcome matrices (seeds, items) and says what it saw in one sentence.
Everything here is a pure function of numbers and names, so that a verdict can be computed again from a record.

The planted outcomes take the method's place:
- "better than": the null is the baseline rerun with fresh seeds. The positive is the baseline improved by twice the
  predicted effect.
- "no worse than" and "within": the null is the baseline worsened by twice the margin. The positive is the baseline
  itself.
- against a constant: the null sits exactly on the constant. The positive is beyond it by twice the effect.
- exact: the null is the outcome with one single item perturbed to twice the tolerance. The positive is 0 everywhere.
- speedup: the null is the baseline against itself, one round later. The positive is the baseline sped up by twice the
  predicted gain.

An improved or worsened baseline keeps the method's own scatter: it is the method's outcomes, moved so that their mean
is the one said. A baseline moved by a constant would have no scatter against itself and would hold at any number of
seeds, so that it could never show a check to be underpowered.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float

from formulary.errors import UsageError
from formulary.evidence._interval import interval, median_interval, ratio_interval

HOLDS, FAILS, UNSURE, UNTESTABLE = "holds here", "does not hold here", "inconclusive", "not testable here"

ROUNDING = 1e-6
"""Outcomes are kept to six digits, so a difference below this part of their size is no difference."""

DEFAULT_EFFECT = 0.05
"""The effect, as a part of the baseline's mean, that a prediction without a size ("better") should be able to see."""

TIME_METRIC = "CPU seconds"
TIE, WIDE = 0.03, 0.10

Matrix = Float[np.ndarray, "S N"]
Number = int | float


def _text(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e4 else f"{value:.4g}"


def _estimate(estimate: float, low: float, high: float, unit: str) -> str:
    return f"{_text(estimate)} [{_text(low)}, {_text(high)}]{unit}"


def _sides(low: float, high: float) -> str:
    """The verdict on a contrast that should be below 0; touching 0 is not below it."""
    return HOLDS if high < 0 else FAILS if low >= 0 else UNSURE


def _finite(**numbers: Number | None) -> None:
    for name, value in numbers.items():
        if value is not None and not math.isfinite(value):
            raise UsageError(f"{name}={value} in a predicate; it must be a finite number")


def _split(metric: str) -> tuple[str, str]:
    """A metric's name and its unit: "loss, nats/token" -> ("loss", " nats/token")."""
    name, _, unit = metric.partition(",")
    return name.strip(), f" {unit.strip()}" if unit.strip() else ""


def moved(outcomes: Matrix, mean: float) -> Matrix:
    """The same outcomes with another mean: what a method of that quality and this scatter would have given."""
    return outcomes - outcomes.mean() + mean


@dataclass(frozen=True)
class Contrast:
    """`a` is at most (or at least) `ratio * b + shift` in the mean; with `b` None, at most (or at least) the
    constant `shift`.
    """

    direction: str
    a: str
    b: str | None
    ratio: float
    shift: float
    metric: str | None
    effect: float | None
    null: str | None
    oracle: str | None

    def __post_init__(self):
        _finite(ratio=self.ratio, shift=self.shift, effect=self.effect)
        if self.a == self.b:
            raise UsageError(f"a predicate compares the arm {self.a!r} with itself")
        if self.effect is not None and self.effect <= 0:
            raise UsageError(f"effect={self.effect}; it is the size worth seeing, above 0 and in the metric's unit")
        if self.b is not None and self.ratio <= 0:
            raise UsageError(f"ratio={self.ratio}; it must be above 0")
        if self.b is None and self.shift == 0 and self.effect is None:
            raise UsageError(f"a prediction of {self.a!r} against 0 needs effect=, the size worth seeing")
        if self.b is not None and self.kind is None:
            raise UsageError(
                f"ratio={self.ratio} and a shift of {self.shift} pull in opposite directions; use one of the two"
            )

    @property
    def sign(self) -> int:
        """+1 when lower is better, -1 when higher is."""
        return 1 if self.direction == "at most" else -1

    @property
    def kind(self) -> str | None:
        """ "better" asks more than the baseline gives, "no worse" allows a margin, "constant" has no baseline."""
        if self.b is None:
            return "constant"
        demands = (self.sign * (1 - self.ratio), -self.sign * self.shift)
        return "better" if min(demands) >= 0 else "no worse" if max(demands) <= 0 else None

    @property
    def rerun(self) -> str | None:
        """The arm to run again with fresh seeds for the planted null."""
        return self.b if self.kind == "better" and self.null is None else None

    def judge(self, a: Matrix, b: Matrix | None, items: str, name: str) -> dict:
        """What the outcomes say, `a` being called `name`."""
        target = self.shift if b is None else self.ratio * b + self.shift
        seen = interval(self.sign * (a - target), items)
        none = ROUNDING * max(abs(a.mean()), abs(np.mean(target)))
        low, high = (0.0 if abs(limit) <= none else limit for limit in (seen.low, seen.high))
        return {**self._shown(a, b, items, name, seen.detectable), "df": seen.df, "verdict": _sides(low, high)}

    def _shown(self, a: Matrix, b: Matrix | None, items: str, name: str, detectable: float) -> dict:
        """The estimate as a reader wants it: a mean, a difference, a ratio, or else the contrast itself."""
        metric, unit = _split(self.metric or "outcome")
        away = -self.sign * detectable
        fieller = ratio_interval(a, b, items) if b is not None and self.shift == 0 and b.mean() > 0 else None
        if b is None:
            seen = interval(a, items)
            of, estimate, low, high, bound = f"{name} {metric}", seen.estimate, seen.low, seen.high, self.shift
        elif fieller:
            of, unit, bound = f"{name} / {self.b} {metric}", "", self.ratio
            estimate, (low, high), away = a.mean() / b.mean(), fieller, away / b.mean()
        else:
            factor = "" if self.ratio == 1 else f"{_text(self.ratio)} x "
            seen = interval(a - self.ratio * b, items)
            of, estimate, low, high, bound = (
                f"{name} - {factor}{self.b} {metric}",
                seen.estimate,
                seen.low,
                seen.high,
                self.shift,
            )
        strict = self.kind == "better" and self.ratio == 1 and self.shift == 0
        sign = ("<" if self.sign > 0 else ">") + ("" if strict else "=")
        predicted = f"{sign} {_text(bound)}{unit}"
        return {
            "of": of,
            "estimate": float(estimate),
            "low": float(low),
            "high": float(high),
            "predicted": predicted,
            "bound": float(bound),
            "detectable": float(bound + away),
            "sentence": f"{of} {_estimate(estimate, low, high, unit)}, predicted {predicted}",
            "power": f"smallest effect it could have seen (80 % power): {of} of {_text(bound + away)}{unit}",
        }

    def planted(self, which: str, a: Matrix, b: Matrix | None) -> tuple[Matrix, str]:
        """The outcomes in the method's place and what they are; `which` is "null" or "positive". A "better than"
        null is a rerun, not made here.
        """
        if b is None:
            if which == "null":
                return moved(a, self.shift), f"outcomes with the scatter of {self.a}, exactly on {_text(self.shift)}"
            effect = self.effect or DEFAULT_EFFECT * abs(self.shift)
            return moved(
                a, self.shift - self.sign * 2 * effect
            ), f"outcomes with the scatter of {self.a}, {_text(2 * effect)} beyond {_text(self.shift)}"
        base = b.mean()
        gap = self.ratio * base + self.shift - base
        if self.kind == "no worse":
            worse = f"{self.b} worsened by twice the margin ({_text(2 * abs(gap))}), with the scatter of {self.a}"
            return (
                (moved(a, base + 2 * gap), worse)
                if which == "null"
                else (moved(a, base), f"{self.b} itself, with the scatter of {self.a}")
            )
        if self.effect is not None or (self.ratio == 1 and self.shift == 0):
            gap = -self.sign * (self.effect or DEFAULT_EFFECT * abs(base))
        return moved(
            a, base + 2 * gap
        ), f"{self.b} improved by twice the effect ({_text(2 * abs(gap))}), with the scatter of {self.a}"


@dataclass(frozen=True)
class Within:
    """The mean of `a` differs from that of `b` (an arm) by less than `margin`, either way."""

    a: str
    b: str
    margin: float
    metric: str | None
    null: str | None
    oracle: str | None

    rerun = None

    def __post_init__(self):
        _finite(margin=self.margin)
        if self.margin <= 0:
            raise UsageError(f"within(..., margin={self.margin}); the margin must be above 0")
        if self.a == self.b:
            raise UsageError(f"a predicate compares the arm {self.a!r} with itself")

    def judge(self, a: Matrix, b: Matrix | None, items: str, name: str) -> dict:
        """Holds when the whole interval is inside the margins, fails when all of it is outside."""
        seen = interval(a - b, items)
        inside, outside = (
            max(abs(seen.low), abs(seen.high)) < self.margin,
            seen.low >= self.margin or seen.high <= -self.margin,
        )
        metric, unit = _split(self.metric or "outcome")
        of = f"{name} - {self.b} {metric}"
        predicted = f"within +-{_text(self.margin)}{unit}"
        largest = max(0.0, self.margin - seen.detectable)
        return {
            "of": of,
            "estimate": seen.estimate,
            "low": seen.low,
            "high": seen.high,
            "predicted": predicted,
            "bound": self.margin,
            "detectable": largest,
            "sentence": f"{of} {_estimate(seen.estimate, seen.low, seen.high, unit)}, predicted {predicted}",
            "power": f"largest difference it could have seen to be within it (80 % power): {_text(largest)}{unit}"
            if largest > 0
            else "too noisy to see that even equal arms are within the margin (80 % power)",
            "df": seen.df,
            "verdict": HOLDS if inside else FAILS if outside else UNSURE,
        }

    def planted(self, which: str, a: Matrix, b: Matrix | None) -> tuple[Matrix, str]:
        """See `Contrast.planted`."""
        if which == "null":
            return moved(
                a, b.mean() + 2 * self.margin
            ), f"{self.b} moved by twice the margin, with the scatter of {self.a}"
        return moved(a, b.mean()), f"{self.b} itself, with the scatter of {self.a}"


@dataclass(frozen=True)
class Exact:
    """Every outcome of `a` is at most `tol` in absolute value: an identity, so one item that is off makes it fail."""

    a: str
    tol: float
    metric: str | None
    null: str | None
    oracle: str | None

    b = None
    rerun = None

    def __post_init__(self):
        _finite(tol=self.tol)
        if self.tol < 0:
            raise UsageError(f"exact(..., tol={self.tol}); the tolerance cannot be negative")

    def judge(self, a: Matrix, b: Matrix | None, items: str, name: str) -> dict:
        """No sampling, so no interval: it holds or it does not."""
        largest = float(np.abs(a).max())
        metric, unit = _split(self.metric or "outcome")
        of, predicted = f"{name} largest |{metric}|", f"<= {_text(self.tol)}{unit} for every item"
        return {
            "of": of,
            "estimate": largest,
            "low": None,
            "high": None,
            "predicted": predicted,
            "bound": self.tol,
            "detectable": self.tol,
            "sentence": f"{of} {_text(largest)}{unit} over {a.shape[0]} x {a.shape[1]} outcomes, predicted {predicted}",
            "power": "smallest effect it could have seen: one item beyond the tolerance",
            "df": None,
            "verdict": HOLDS if largest <= self.tol else FAILS,
        }

    def planted(self, which: str, a: Matrix, b: Matrix | None) -> tuple[Matrix, str]:
        """See `Contrast.planted`."""
        if which == "positive":
            return np.zeros_like(a), "0 for every item"
        broken = np.minimum(np.abs(a), self.tol)
        broken[0, 0] = 2 * self.tol or 1.0
        return broken, f"the outcomes of {self.a} with one single item at {_text(broken[0, 0])}"


@dataclass(frozen=True)
class Speedup:
    """`a` is at least `at_least` times as fast as `b`: the median over rounds of paired ratios time(b) / time(a).

    The outcomes are seconds per round, with the arms of a round timed next to each other; with `b` None they are the
    ratios themselves. Over seeds, the interval is Student's t on the logarithms of the medians; for one seed, the exact
    interval of a median.
    """

    a: str
    b: str | None
    at_least: float
    metric: str | None
    null: str | None
    oracle: str | None

    rerun = None

    def __post_init__(self):
        _finite(at_least=self.at_least)
        if self.at_least <= 0:
            raise UsageError(f"speedup(..., at_least={self.at_least}); it is a factor above 0, such as 1.5")
        if self.a == self.b:
            raise UsageError(f"a predicate compares the arm {self.a!r} with itself")

    def judge(self, a: Matrix, b: Matrix | None, items: str, name: str) -> dict:
        """Judged as every time is: a tie if the interval contains 1 or the effect is below 3 %, unless the interval
        is wider than +-10 %.
        """
        ratio = a if b is None else b / a
        if ratio.shape[0] == 1:
            middle, low, high = median_interval(ratio[0])
            df = None
        else:
            logs = interval(np.log(np.median(ratio, axis=1, keepdims=True)), "fresh")
            middle, low, high, df = math.exp(logs.estimate), math.exp(logs.low), math.exp(logs.high), logs.df
        half = max(high / middle, middle / low)
        tie = reading(middle, low, high) == "tie"
        if tie and self.at_least >= 1:
            verdict = FAILS
        else:
            verdict = HOLDS if low > self.at_least else FAILS if high <= self.at_least else UNSURE
        of = f"{name} speedup" + (f" over {self.b}" if self.b else "")
        predicted = f">= {_text(self.at_least)} x" if self.at_least != 1 else "> 1 x"
        return {
            "of": of,
            "estimate": middle,
            "low": low,
            "high": high,
            "predicted": predicted,
            "bound": self.at_least,
            "detectable": self.at_least * half,
            "sentence": f"{of} {_estimate(middle, low, high, ' x')}{' (a tie)' if tie else ''}, predicted {predicted}",
            "power": f"smallest effect it could have seen: {_text(self.at_least * half)} x",
            "df": df,
            "verdict": verdict,
        }

    def planted(self, which: str, a: Matrix, b: Matrix | None) -> tuple[Matrix, str]:
        """See `Contrast.planted`."""
        gain = 2 * (self.at_least - 1) or 2 * DEFAULT_EFFECT
        goal = (1.0 if which == "null" else 1 + gain) if self.at_least >= 1 else (1 + gain if which == "null" else 1.0)
        if which == "null" and self.at_least >= 1 and b is not None:
            return np.roll(b, 1, axis=1), f"{self.b} against itself, one round later"
        factor = np.median(a if b is None else b / a) / goal
        return (
            a / factor if b is None else a * factor
        ), f"the times of {self.a}, scaled to a speedup of {_text(goal)} x"


def reading(ratio: float, low: float, high: float) -> str:
    """How a ratio of times reads: "tie", "above", "below" or "inconclusive" (a tie needs an interval within +-10 %).

    >>> reading(1.01, 0.99, 1.02), reading(1.5, 1.4, 1.6), reading(1.0, 0.8, 1.2)
    ('tie', 'above', 'inconclusive')
    """
    if (low > 1 or high < 1) and abs(ratio - 1) >= TIE:
        return "above" if ratio > 1 else "below"
    return "tie" if high / ratio - 1 <= WIDE and 1 - low / ratio <= WIDE else "inconclusive"


Predicate = Contrast | Within | Exact | Speedup
KINDS = {"contrast": Contrast, "within": Within, "exact": Exact, "speedup": Speedup}


def specification(predicate: Predicate) -> dict:
    """A predicate as JSON scalars; `from_specification` is its inverse."""
    return {"kind": type(predicate).__name__.lower(), **asdict(predicate)}


def from_specification(facts: Mapping) -> Predicate:
    """The predicate that a record stores."""
    facts = dict(facts)
    return KINDS[facts.pop("kind")](**facts)


def _compared(direction, a, b, ratio, shift, metric, effect, null, oracle) -> Contrast:
    effect = None if effect is None else float(effect)
    if not isinstance(b, str):
        if ratio is not None or shift:
            raise UsageError(f"ratio=, minus= and plus= compare with an arm, not with the constant {b}")
        return Contrast(direction, a, None, 0.0, float(b), metric, effect, null, oracle)
    return Contrast(direction, a, b, 1.0 if ratio is None else float(ratio), float(shift), metric, effect, null, oracle)


def at_most(
    a: str,
    b: str | Number,
    *,
    ratio: Number | None = None,
    minus: Number = 0.0,
    metric: str | None = None,
    effect: Number | None = None,
    null: str | None = None,
    oracle: str | None = None,
) -> Contrast:
    """Predict mean(a) <= ratio * mean(b) - minus, or mean(a) <= b when `b` is a number. Lower is better.

    An interval that only touches the threshold does not hold, and neither does an arm that equals its baseline under
    `ratio=1`. A ratio above 1 or a negative `minus` is a margin ("no worse than"). `effect`, in the metric's unit, is
    the size that the check should be able to see: twice it is planted as the positive (default: the predicted one; 5 %
    of the baseline for a prediction without a size). `null` and `oracle` name arms that take the method's place in this
    predicate alone.

    >>> at_most("gptq", "rtn", ratio=0.7).kind
    'better'
    >>> at_most("int8", "fp32", ratio=1.01).kind
    'no worse'
    """
    return _compared("at most", a, b, ratio, -minus, metric, effect, null, oracle)


def at_least(
    a: str,
    b: str | Number,
    *,
    ratio: Number | None = None,
    plus: Number = 0.0,
    metric: str | None = None,
    effect: Number | None = None,
    null: str | None = None,
    oracle: str | None = None,
) -> Contrast:
    """Predict mean(a) >= ratio * mean(b) + plus, or mean(a) >= b when `b` is a number. Higher is better; the mirror
    image of `at_most`.

    >>> at_least("xattention", "random blocks", plus=0.05, metric="recall").kind
    'better'
    """
    return _compared("at least", a, b, ratio, plus, metric, effect, null, oracle)


def no_worse(
    a: str,
    b: str,
    *,
    margin: Number,
    higher_is_better: bool = False,
    metric: str | None = None,
    null: str | None = None,
    oracle: str | None = None,
) -> Contrast:
    """Predict that `a` is worse than `b` by less than `margin` (in the metric's unit); better by any amount is fine.

    >>> no_worse("int8", "fp32", margin=0.01, metric="loss, nats/token").kind
    'no worse'
    """
    if not margin > 0:
        raise UsageError(f"no_worse(..., margin={margin}); the margin must be above 0")
    direction, shift = ("at least", -margin) if higher_is_better else ("at most", margin)
    return Contrast(direction, a, b, 1.0, float(shift), metric, None, null, oracle)


def within(
    a: str, b: str, *, margin: Number, metric: str | None = None, null: str | None = None, oracle: str | None = None
) -> Within:
    """Predict |mean(a) - mean(b)| < margin, both ways: an equivalence. For one way only, see `no_worse`.

    >>> within("merged", "unmerged", margin=1e-3).margin
    0.001
    """
    return Within(a, b, float(margin), metric, null, oracle)


def exact(
    a: str, *, tol: Number, metric: str | None = None, null: str | None = None, oracle: str | None = None
) -> Exact:
    """Predict that every outcome of `a` (an error, which should be 0) is at most `tol` in absolute value.

    >>> exact("recurrent = chunked", tol=1e-4, metric="largest difference").tol
    0.0001
    """
    return Exact(a, float(tol), metric, null, oracle)


def speedup(
    a: str,
    b: str | None = None,
    *,
    at_least: Number = 1.0,
    metric: str | None = TIME_METRIC,
    null: str | None = None,
    oracle: str | None = None,
) -> Speedup:
    """Predict that `a` runs at least `at_least` times as fast as `b` in CPU time.

    Both arms return `Outcome(values, work=callable)`; the runner times the works of a seed side by side, in random
    order, in many rounds. Without `b`, the outcomes of `a` under `metric` are the paired ratios time(baseline) /
    time(a), one per round.

    >>> speedup("llm-int8", "fp32", at_least=1.5).at_least
    1.5
    """
    return Speedup(a, b, float(at_least), metric, null, oracle)


def all_of(*predicates: Predicate) -> tuple[Predicate, ...]:
    """Every predicate must hold; any that fails makes the whole fail.

    >>> len(all_of(at_most("gptq", "rtn", ratio=0.7), exact("identity", tol=0.0)))
    2
    """
    if not predicates:
        raise UsageError("all_of() needs at least one predicate")
    return predicates
