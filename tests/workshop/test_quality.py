"""Intervals of quality: those of scipy."""

import numpy as np
import pytest
from scipy import stats

from formulary.workshop.quality import Quality


@pytest.mark.parametrize("count", [2, 5, 40])
def test_the_interval_is_students(count):
    values = np.random.default_rng(count).normal(3.0, 0.5, count)
    wanted = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    assert Quality("loss", values, "lower").interval() == pytest.approx((values.mean(), *wanted))
    assert Quality("perplexity", values, "lower", show="exp").interval() == pytest.approx(np.exp((values.mean(), *wanted)))


def test_one_item_has_no_interval():
    mean, *ends = Quality("loss", np.array([2.0]), "lower").interval()
    assert mean == 2.0 and np.isnan(ends).all()
