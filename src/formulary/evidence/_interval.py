"""Intervals for outcomes over a few seeds and many items.

An outcome matrix has one row per seed and one column per item. Seeds are always random: another run would draw others.
Items are random too, and either fresh for every seed (nested) or the same for all of them (crossed). With S seeds, N
items, and the mean squares of the two-way table, MS_s = N var(seed means), MS_i = S var(item means), MS_e = residual
mean square, the variance of the grand mean is

    items "fresh":  v = MS_s / (S N)                                    with S - 1 degrees of freedom
    items "same":   v = max(MS_s + MS_i - MS_e, MS_s, MS_i) / (S N)     with Satterthwaite's degrees of freedom

and the 95 % interval is mean +- t sqrt(v). Source: Searle, Casella and McCulloch, Variance Components (1992), the
two-way random model; Satterthwaite (1946).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from formulary.errors import UsageError

CONFIDENCE = 0.95
POWER = 0.80


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided 95 % interval, degrees of freedom and standard error, in the unit of the outcomes."""

    estimate: float
    low: float
    high: float
    df: float
    standard_error: float

    @property
    def detectable(self) -> float:
        """The distance from the threshold seen in 80 % of repetitions: (t_0.975 + t_0.80) standard errors."""
        return (_t(0.5 + CONFIDENCE / 2, self.df) + _t(POWER, self.df)) * self.standard_error


def _t(probability: float, df):
    from scipy.special import stdtrit

    return stdtrit(df, probability)


def _mean_squares(x, y, items: str):
    """Mean products of two (..., S, N) tables (of one with itself: mean squares): seeds, of items, of the residual."""
    seeds, count = x.shape[-2:]
    x_seed, y_seed = (v.mean(-1, keepdims=True) - v.mean((-2, -1), keepdims=True) for v in (x, y))
    of_seeds = count * (x_seed * y_seed).sum((-2, -1)) / (seeds - 1)
    if items == "fresh" or count == 1:
        return np.stack([of_seeds, np.zeros_like(of_seeds), np.zeros_like(of_seeds)])
    x_item, y_item = (v.mean(-2, keepdims=True) - v.mean((-2, -1), keepdims=True) for v in (x, y))
    of_items = seeds * (x_item * y_item).sum((-2, -1)) / (count - 1)
    x_rest, y_rest = (
        x - x.mean((-2, -1), keepdims=True) - x_seed - x_item,
        y - y.mean((-2, -1), keepdims=True) - y_seed - y_item,
    )
    of_rest = (x_rest * y_rest).sum((-2, -1)) / ((seeds - 1) * (count - 1))
    return np.stack([of_seeds, of_items, of_rest])


def _variance(squares, seeds: int, count: int, items: str):
    """Variance of the grand mean and its degrees of freedom, from the three mean squares."""
    of_seeds, of_items, of_rest = squares
    cells = seeds * count
    if items == "fresh" or count == 1:
        return of_seeds / cells, np.full_like(of_seeds, seeds - 1)
    larger, total = np.maximum(of_seeds, of_items), of_seeds + of_items - of_rest
    parts = of_seeds**2 / (seeds - 1) + of_items**2 / (count - 1) + of_rest**2 / ((seeds - 1) * (count - 1))
    satterthwaite = np.divide(total**2, parts, out=np.full_like(total, seeds - 1.0), where=parts > 0)
    of_larger = np.where(of_seeds >= of_items, seeds - 1.0, count - 1.0)
    return np.maximum(total, larger) / cells, np.where(total > larger, satterthwaite, of_larger)


def _checked(outcomes, items: str):
    if items not in ("fresh", "same"):
        raise UsageError(
            f"items is {items!r}; it must be 'fresh' (other items for every seed) or 'same' (one set for all seeds)"
        )
    if outcomes.shape[-2] < 2:
        raise UsageError(f"{outcomes.shape[-2]} seed: an interval over seeds needs at least 2")
    return outcomes


def limits(outcomes: Float[np.ndarray, "*batch S N"], items: str):
    """Mean, lower limit, upper limit, degrees of freedom and standard error of many tables, each of shape `batch`.

    >>> table = np.array([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]])
    >>> [round(float(v), 3) for v in limits(table, "fresh")]
    [2.5, -3.853, 8.853, 1.0, 0.5]
    """
    outcomes = _checked(outcomes, items)
    seeds, count = outcomes.shape[-2:]
    variance, df = _variance(_mean_squares(outcomes, outcomes, items), seeds, count, items)
    error, mean = np.sqrt(variance), outcomes.mean((-2, -1))
    half = _t(0.5 + CONFIDENCE / 2, df) * error
    return mean, mean - half, mean + half, df, error


def interval(outcomes: Float[np.ndarray, "S N"], items: str) -> Interval:
    """The interval of one table's mean, over new seeds and new items. `items` is "fresh" or "same".

    >>> table = np.array([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]])
    >>> interval(table, "same").low < interval(table, "same").estimate
    True
    """
    mean, low, high, df, error = (float(v) for v in limits(outcomes, items))
    return Interval(mean, low, high, df, error)


def ratio_interval(
    top: Float[np.ndarray, "S N"], bottom: Float[np.ndarray, "S N"], items: str
) -> tuple[float, float] | None:
    """Fieller's 95 % interval of mean(top) / mean(bottom): every c for which the interval of top - c bottom contains 0.

    None when it is unbounded, which is when the mean of `bottom` cannot be told from 0. Source: Fieller (1954); here
    the variance of the contrast is the two-way one above, so that the interval contains c exactly when the contrast
    with c is undecided.

    >>> bottom = np.array([[2.0, 4.0], [2.2, 4.2], [1.9, 3.9]])
    >>> low, high = ratio_interval(0.5 * bottom, bottom, "fresh")
    >>> round(low, 6), round(high, 6)
    (0.5, 0.5)
    """
    _checked(top, items)
    seeds, count = top.shape
    top_mean, bottom_mean = float(top.mean()), float(bottom.mean())
    squares = [_mean_squares(x, y, items) for x, y in ((top, top), (top, bottom), (bottom, bottom))]

    def decided(c):
        """Above 0 where the contrast with ratio c excludes 0."""
        variance, df = _variance(
            np.maximum(squares[0] - 2 * c * squares[1] + c * c * squares[2], 0), seeds, count, items
        )
        return abs(top_mean - c * bottom_mean) - float(_t(0.5 + CONFIDENCE / 2, df) * np.sqrt(variance))

    variance, df = _variance(squares[2], seeds, count, items)
    if abs(bottom_mean) <= float(_t(0.5 + CONFIDENCE / 2, df) * np.sqrt(variance)):
        return None
    center = top_mean / bottom_mean
    half = -decided(center) / abs(bottom_mean)
    if half <= 0:
        return center, center
    low, high = _edge(decided, center, -half / 4), _edge(decided, center, half / 4)
    return None if low is None or high is None else (low, high)


def _edge(decided: Callable, center: float, step: float) -> float | None:
    """The first c beyond `center`, on the side of `step`, where `decided` turns positive: doubling steps outward,
    then bisection.
    """
    inside = center
    for _ in range(60):
        outside = center + step
        if decided(outside) > 0:
            break
        inside, step = outside, 2 * step
    else:
        return None
    while abs(outside - inside) > 1e-9 * max(abs(inside), abs(outside - center)):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if decided(middle) > 0 else (middle, outside)
    return (inside + outside) / 2


def median_interval(values: Float[np.ndarray, " R"]) -> tuple[float, float, float]:
    """Median of independent values and its 95 % interval between two order statistics: exact, without resampling.

    The number of values below the true median is binomial(R, 1/2), so the k-th smallest and the k-th largest enclose it
    with probability 1 - 2 P(X < k); k is the largest that leaves at most 2.5 % on each side (R = 15: the 4th and the
    12th, 96.5 %). At least 6 values.

    >>> median_interval(np.arange(15.0))
    (7.0, 3.0, 11.0)
    """
    from scipy.special import bdtr

    count = len(values)
    if count < 6:
        raise UsageError(f"{count} rounds: the interval of a median needs at least 6")
    ordered = np.sort(values)
    below = max(k for k in range(1, count) if bdtr(k - 1, count, 0.5) <= (1 - CONFIDENCE) / 2)
    return float(np.median(values)), float(ordered[below - 1]), float(ordered[count - below])
