"""The intervals: against simulation, against scipy on the case it knows, and against an analysis of variance written
out in loops.
"""

import numpy as np
import pytest
from scipy import stats
from scipy.special import ndtr

from formulary.errors import UsageError
from formulary.evidence import interval, limits, median_interval, ratio_interval

RUNS, SEEDS, ITEMS = 4000, 8, 40
GRID = [
    (spread, items, kind) for spread in (0.05, 1, 5) for items in ("fresh", "same") for kind in ("gaussian", "binary")
]


def effects(draw, spread: float, items: str, *, runs: int = RUNS, seeds: int = SEEDS):
    """Seed effects plus item effects, total variance 1, with the spread of seeds `spread` times that of items."""
    of_item = 1 / np.hypot(1, spread)
    shape = (runs, 1, ITEMS) if items == "same" else (runs, seeds, ITEMS)
    return spread * of_item * draw.standard_normal((runs, seeds, 1)) + of_item * draw.standard_normal(shape)


def contrasts(draw, spread: float, items: str, kind: str, *, effect: float = 0.0, runs: int = RUNS, seeds: int = SEEDS):
    """Paired contrasts (runs, seeds, items) whose true mean is `effect`."""
    if kind == "gaussian":
        noise = 0.5 * draw.standard_normal((runs, seeds, ITEMS))
        return effects(draw, spread, items, runs=runs, seeds=seeds) + noise + effect
    coins = [
        draw.random((runs, seeds, ITEMS)) < ndtr(effects(draw, spread, items, runs=runs, seeds=seeds)) for _ in range(2)
    ]
    return coins[0].astype(float) - coins[1] + effect


@pytest.mark.parametrize("spread, items, kind", GRID)
def test_covers_95_percent_with_the_effect_at_the_threshold(spread, items, kind):
    draw = np.random.default_rng([int(100 * spread), items == "same", kind == "binary"])
    _, low, high, _, _ = limits(contrasts(draw, spread, items, kind), items)
    assert 0.93 <= np.mean((low <= 0) & (high >= 0)) <= 0.97
    assert np.mean(high < 0) <= 0.05
    assert np.mean(low >= 0) <= 0.05


def test_ignoring_that_items_are_shared_would_not_cover():
    draw = np.random.default_rng(0)
    _, low, high, _, _ = limits(contrasts(draw, 0.05, "same", "gaussian"), "fresh")
    assert np.mean((low <= 0) & (high >= 0)) < 0.8


@pytest.mark.parametrize("items", ["fresh", "same"])
def test_power_rises_with_seeds(items):
    power = []
    for seeds in (3, 5, 8, 12):
        draw = np.random.default_rng(seeds)
        _, _, high, _, _ = limits(contrasts(draw, 1, items, "gaussian", effect=-0.6, runs=2000, seeds=seeds), items)
        power.append(np.mean(high < 0))
    assert all(more > less + 0.03 for less, more in zip(power, power[1:], strict=False))


def test_detectable_effect_is_seen_in_80_percent_of_runs():
    draw = np.random.default_rng(3)
    error = np.sqrt(1 / 2 / SEEDS + (1 / 2 + 0.25) / (SEEDS * ITEMS))
    df = SEEDS - 1
    effect = (stats.t.ppf(0.975, df) + stats.t.ppf(0.8, df)) * error
    _, _, high, _, _ = limits(contrasts(draw, 1, "fresh", "gaussian", effect=-effect), "fresh")
    assert 0.77 <= np.mean(high < 0) <= 0.83
    one = contrasts(draw, 1, "fresh", "gaussian", runs=1)[0]
    seen = interval(one, "fresh")
    assert seen.detectable == pytest.approx((stats.t.ppf(0.975, df) + stats.t.ppf(0.8, df)) * seen.standard_error)


def test_fresh_items_are_students_t_on_seed_means():
    table = np.random.default_rng(1).standard_normal((6, 9))
    expected = stats.ttest_1samp(table.mean(1), 0).confidence_interval(0.95)
    seen = interval(table, "fresh")
    assert (seen.low, seen.high, seen.df) == pytest.approx((expected.low, expected.high, 5))


@pytest.mark.parametrize("seed_scale, item_scale", [(1.0, 1.0), (3.0, 0.1), (0.1, 3.0), (0.01, 0.01)])
def test_same_items_follow_the_two_way_table(seed_scale, item_scale):
    draw = np.random.default_rng(2)
    seeds, count = 5, 7
    table = (
        seed_scale * draw.standard_normal((seeds, 1))
        + item_scale * draw.standard_normal((1, count))
        + draw.standard_normal((seeds, count))
    )
    grand = table.mean()
    of_seeds = sum(count * (table[s].mean() - grand) ** 2 for s in range(seeds)) / (seeds - 1)
    of_items = sum(seeds * (table[:, i].mean() - grand) ** 2 for i in range(count)) / (count - 1)
    rest = sum(
        (table[s, i] - table[s].mean() - table[:, i].mean() + grand) ** 2 for s in range(seeds) for i in range(count)
    )
    rest /= (seeds - 1) * (count - 1)
    total = of_seeds + of_items - rest
    if total > max(of_seeds, of_items):
        df = total**2 / (of_seeds**2 / (seeds - 1) + of_items**2 / (count - 1) + rest**2 / ((seeds - 1) * (count - 1)))
    else:
        total, df = max((of_seeds, seeds - 1), (of_items, count - 1))
    half = stats.t.ppf(0.975, df) * np.sqrt(total / (seeds * count))
    seen = interval(table, "same")
    assert (seen.low, seen.high, seen.df) == pytest.approx((grand - half, grand + half, df))


def test_one_item_per_seed_leaves_only_seeds():
    table = np.random.default_rng(4).standard_normal((6, 1))
    assert interval(table, "same") == interval(table, "fresh")


def test_seeds_that_change_nothing_leave_only_items():
    row = np.random.default_rng(5).standard_normal(30)
    seen = interval(np.tile(row, (4, 1)), "same")
    expected = stats.ttest_1samp(row, 0).confidence_interval(0.95)
    assert (seen.low, seen.high, seen.df) == pytest.approx((expected.low, expected.high, 29))


@pytest.mark.parametrize("items", ["fresh", "same"])
def test_no_variance_is_a_point(items):
    seen = interval(np.full((4, 3), 2.5), items)
    assert (seen.estimate, seen.low, seen.high, seen.detectable) == (2.5, 2.5, 2.5, 0.0)


def test_one_seed_is_refused():
    with pytest.raises(UsageError, match="at least 2"):
        interval(np.ones((1, 5)), "fresh")
    with pytest.raises(UsageError, match="'fresh'"):
        interval(np.ones((2, 5)), "nested")


@pytest.mark.parametrize("items", ["fresh", "same"])
def test_fieller_covers_the_true_ratio(items):
    draw = np.random.default_rng(6)
    runs, inside = 500, 0
    bottom = 3 + contrasts(draw, 1, items, "gaussian", runs=runs)
    top = 0.7 * 3 + 0.5 * (bottom - 3) + 0.5 * contrasts(draw, 1, items, "gaussian", runs=runs)
    for above, below in zip(top, bottom, strict=True):
        low, high = ratio_interval(above, below, items)
        inside += low <= 0.7 <= high
    assert 0.93 <= inside / runs <= 0.97


def test_fieller_solves_its_quadratic():
    draw = np.random.default_rng(7)
    bottom = 3 + draw.standard_normal((6, 4))
    top = 0.5 * bottom + draw.standard_normal((6, 4))
    x, y = top.mean(1), bottom.mean(1)
    cov = np.cov(x, y) / 6
    t = stats.t.ppf(0.975, 5) ** 2
    roots = np.roots(
        [y.mean() ** 2 - t * cov[1, 1], -2 * (x.mean() * y.mean() - t * cov[0, 1]), x.mean() ** 2 - t * cov[0, 0]]
    )
    assert ratio_interval(top, bottom, "fresh") == pytest.approx(sorted(roots), rel=1e-6)


@pytest.mark.parametrize("items", ["fresh", "same"])
def test_fieller_agrees_with_the_contrast(items):
    draw = np.random.default_rng(8)
    for _ in range(50):
        bottom = 3 + 0.5 * contrasts(draw, 1, items, "gaussian", runs=1)[0]
        top = 2 + 0.5 * contrasts(draw, 1, items, "gaussian", runs=1)[0]
        low, high = ratio_interval(top, bottom, items)
        for c in (0.5, 0.6, 0.7, 0.8, 0.9):
            at = interval(top - c * bottom, items)
            assert (low <= c <= high) == (at.low <= 0 <= at.high)


def test_fieller_is_unbounded_when_the_baseline_may_be_zero():
    draw = np.random.default_rng(9)
    assert ratio_interval(1 + draw.standard_normal((5, 4)), 0.01 + draw.standard_normal((5, 4)), "fresh") is None


def test_median_interval_is_the_binomial_one():
    draw = np.random.default_rng(10)
    assert median_interval(np.arange(15.0)) == (7.0, 3.0, 11.0)
    samples = draw.lognormal(size=(4000, 15))
    inside = [low <= 1 <= high for _, low, high in map(median_interval, samples)]
    assert abs(np.mean(inside) - (1 - 2 * stats.binom.cdf(3, 15, 0.5))) < 0.012
    with pytest.raises(UsageError, match="at least 6"):
        median_interval(np.arange(5.0))
