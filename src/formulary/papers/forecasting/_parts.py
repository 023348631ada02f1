"""What forecasting rooms share: reading a series as an array, cutting it into windows, the seasonal naive forecast."""

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from formulary.errors import FormularyError


def as_series(series: ArrayLike) -> Float[np.ndarray, "T C"]:
    """A series (T,) or (T, C) as float64 (T, C). FormularyError when it is not numeric, has other axes, or lacks
    values."""
    try:
        values = np.asarray(series, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise FormularyError(f"the series is not numeric: {str(error).splitlines()[0]}") from None
    if values.ndim not in (1, 2) or not values.size:
        raise FormularyError(
            f"a series has one row a time step and one column a channel; this has the shape {values.shape}"
        )
    values = values.reshape(len(values), -1)
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise FormularyError(
            f"the series lacks values in {bad.sum()} of {len(values)} steps, first in step {bad.argmax()}: fill them in"
        )
    return values


def windows(
    series: ArrayLike, lookback: int, horizon: int, *, stride: int = 1
) -> tuple[Float[np.ndarray, "n LC"], Float[np.ndarray, "n TC"]]:
    """Every `stride`-th history and the future that follows it, one pair a row, time-major: step 0 of all channels,
    then step 1.

    >>> X, y = windows(np.arange(6), lookback=3, horizon=2)
    >>> X.tolist(), y.tolist()
    ([[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]], [[3.0, 4.0], [4.0, 5.0]])
    """
    values = as_series(series)
    if min(lookback, horizon, stride) < 1:
        raise FormularyError(
            f"windows need lookback, horizon and stride of 1 or more, not {lookback}, {horizon} and {stride}"
        )
    if len(values) < lookback + horizon:
        raise FormularyError(
            f"the series has {len(values)} steps, fewer than one window of {lookback} + {horizon}: give more"
        )
    cut = np.lib.stride_tricks.sliding_window_view(values, lookback + horizon, axis=0)[::stride].swapaxes(1, 2)
    return np.array(cut[:, :lookback]).reshape(len(cut), -1), np.array(cut[:, lookback:]).reshape(len(cut), -1)


def seasonal_naive(
    X: Float[np.ndarray, "n LC"], horizon: int, period: int, channels: int = 1
) -> Float[np.ndarray, "n TC"]:
    """The last `period` steps of each history, repeated over the horizon; `period` 1 repeats the last value.

    >>> seasonal_naive(np.array([[0.0, 1.0, 2.0]]), horizon=3, period=2).tolist()
    [[1.0, 2.0, 1.0]]
    """
    season = X.reshape(len(X), -1, channels)[:, -period:]
    return season[:, np.arange(horizon) % period].reshape(len(X), -1)
