"""LTSF-Linear: the whole future of a series from its history by one linear map, the baseline a forecaster has to beat.

For each channel, with the history x of `lookback` steps and the future y of `horizon` steps, both z-scored:

    linear    y = W x + b
    nlinear   y = W (x - x_L) + b + x_L                       x_L the last value: level shifts pass through
    dlinear   y = W_s (x - A x) + W_t A x + b                 A the moving average of 25 steps, its ends replicated

W is shared by all channels, or each has its own (`individual=True`). Source: arXiv:2205.13504, section 4 and figure 2.
`solver="adam"` trains as the paper does: mean squared error, Adam, the learning rate halved each epoch, stopped early
on the last eighth of the rows, weights starting at 1/lookback. `solver="exact"` solves the ridge problem that the model
is (penalty `alpha`, none on b; 0 gives the least-squares solution of least norm): no tuning, and the same to the bit
each time. The three variants describe the same maps up to a constraint (NLinear's row sums are 1), so they differ by
what training and ridge prefer.

A row of X is one history (lookback * channels,), a row of y one future (horizon * channels,), both time-major, as
`windows` cuts them; `fit_series` and `forecast` take the series itself. Raises ValueError for data as scikit-learn
asks, UsageError for parameters.

>>> import numpy as np
>>> t = np.arange(400.0)
>>> series = 0.1 * t + np.sin(t / 3)
>>> model = LTSFLinear("nlinear", lookback=48, horizon=24, solver="exact", alpha=1e-6).fit_series(series)
>>> future = model.forecast(series, steps=30)
>>> bool(np.allclose(future, 0.1 * np.arange(400, 430) + np.sin(np.arange(400, 430) / 3), atol=1e-3))
True
"""

from numbers import Integral
from typing import ClassVar, no_type_check

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy.linalg import lstsq, solve
from scipy.ndimage import uniform_filter1d
from sklearn.base import MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data
from torch.nn import functional as F

from formulary.contracts.estimator import Estimator
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError, UsageError, nearest
from formulary.papers.forecasting._parts import as_series, windows

VARIANTS, SOLVERS = ("linear", "nlinear", "dlinear"), ("adam", "exact")


def decompose(
    x: Float[np.ndarray, "*rows L"], kernel: int = 25
) -> tuple[Float[np.ndarray, "*rows L"], Float[np.ndarray, "*rows L"]]:
    """Season and trend along the last axis: the trend is the moving average of `kernel` (odd) steps, with replicated
    ends."""
    trend = uniform_filter1d(x, kernel, axis=-1, mode="nearest")
    return x - trend, trend


class LTSFLinear(MultiOutputMixin, RegressorMixin, Estimator):
    """Linear, NLinear and DLinear.

    `lookback` and `horizon` are what `fit_series` cuts; `fit` takes both from its data. `channels` says how many series
    a row holds (None: 1 in `fit`, all columns in `fit_series`). `epochs` to `random_state` are for Adam alone, `alpha`
    for exact alone.
    """

    accepts: ClassVar[str] = "series"

    @no_type_check  # scikit-learn asks that any value is stored here and refused in `fit`
    def __init__(
        self,
        variant: str = "dlinear",
        lookback: int = 336,
        horizon: int = 96,
        channels: int | None = None,
        individual: bool = False,
        kernel: int = 25,
        solver: str = "adam",
        alpha: float = 1.0,
        learning_rate: float = 5e-3,
        batch_size: int = 32,
        epochs: int = 10,
        patience: int = 3,
        validation_fraction: float = 0.125,
        random_state: int | None = 0,
    ):
        self.variant = variant
        self.lookback = lookback
        self.horizon = horizon
        self.channels = channels
        self.individual = individual
        self.kernel = kernel
        self.solver = solver
        self.alpha = alpha
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.epochs = epochs
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.random_state = random_state

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = self.solver == "adam" or self.variant == "nlinear"
        return tags

    def fit(self, X, y) -> "LTSFLinear":
        """Fit on histories X (n, lookback * channels) and futures y (n, horizon * channels) or (n,), rows in time
        order."""
        return self._fit(X, y, 1 if self.channels is None else self.channels)

    def predict(self, X) -> np.ndarray:
        """Futures (n, horizon * channels), or (n,) if y had one axis."""
        check_is_fitted(self)
        forecast = self._predict(validate_data(self, X, dtype=np.float64, reset=False))
        return forecast[:, 0] if self.single_output_ else forecast

    def fit_series(self, series: ArrayLike) -> "LTSFLinear":
        """Fit on every window of a series (T, C) or (T,)."""
        values = as_series(series)
        if self.channels not in (None, values.shape[1]):
            raise UsageError(f"ltsf-linear: channels={self.channels}, but the series has {values.shape[1]}")
        self._check_parameters()
        X, y = windows(values, self.lookback, self.horizon)
        if len(X) < 2:
            raise FormularyError(
                f"the series has {len(values)} steps, one window of {self.lookback} + {self.horizon}: give more"
            )
        return self._fit(X, y, values.shape[1])

    def forecast(self, series: ArrayLike, steps: int | None = None) -> np.ndarray:
        """The `steps` values (default: the horizon) that follow a series (T, C) or (T,), in its own units and shape.

        Beyond the horizon, forecasts are taken as history. FormularyError when the series is shorter than one history.
        """
        check_is_fitted(self)
        values, steps = as_series(series), self.horizon_ if steps is None else steps
        if steps < 1 or values.shape[1] != len(self.mean_):
            raise FormularyError(
                f"ltsf-linear was fitted on {len(self.mean_)} channel(s) and forecasts 1 step or more; "
                f"asked: {values.shape[1]} channel(s), {steps} steps"
            )
        if len(values) < self.lookback_:
            raise FormularyError(f"the series has {len(values)} steps; ltsf-linear needs the last {self.lookback_}")
        start = len(values)
        while len(values) < start + steps:
            future = self._predict(values[-self.lookback_ :].reshape(1, -1))
            values = np.concatenate([values, future.reshape(self.horizon_, -1)])
        found = values[start : start + steps]
        return found[:, 0] if np.ndim(series) == 1 else found

    def check_fitted(self) -> None:
        channels, parts = len(self.mean_), 2 if self.variant == "dlinear" else 1
        maps = channels if self.individual else 1
        shapes = (self.coef_.shape, self.intercept_.shape, self.scale_.shape)
        if shapes != ((maps, self.horizon_, parts * self.lookback_), (maps, self.horizon_), (channels,)):
            raise ValueError(f"its arrays have shapes that do not fit each other: {shapes}")
        if not all(np.isfinite(array).all() for array in (self.coef_, self.intercept_, self.mean_, self.scale_)):
            raise ValueError("its arrays have NaN or infinite values")

    def _fit(self, X, y, channels: int) -> "LTSFLinear":
        self._check_parameters()
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True, ensure_min_samples=2)
        self.single_output_ = y.ndim == 1
        y = y.astype(np.float64).reshape(len(y), -1)
        if X.shape[1] % channels or y.shape[1] % channels:
            raise ValueError(
                f"rows of X ({X.shape[1]}) and y ({y.shape[1]}) must divide by the number of channels ({channels})"
            )
        self.lookback_, self.horizon_ = X.shape[1] // channels, y.shape[1] // channels
        histories = X.reshape(len(X), -1, channels)
        self.mean_, deviation = histories.mean(axis=(0, 1)), histories.std(axis=(0, 1))
        self.scale_ = np.where(deviation > 1e-12 * np.maximum(1, np.abs(self.mean_)), deviation, 1.0)
        features, level = self._features(X)
        targets = (y.reshape(len(y), -1, channels) - self.mean_) / self.scale_
        targets = targets.swapaxes(1, 2) - level
        solver = self._solve_exactly if self.solver == "exact" else self._train
        self.coef_, self.intercept_ = solver(features, targets)
        return self

    def _predict(self, X: Float[np.ndarray, "n LC"]) -> Float[np.ndarray, "n TC"]:
        features, level = self._features(X)
        scaled = np.einsum(
            "ncf,ctf->nct",
            features,
            np.broadcast_to(self.coef_, (len(self.mean_), *self.coef_.shape[1:])),
            optimize=True,
        )
        forecast = (scaled + self.intercept_ + level).swapaxes(1, 2) * self.scale_ + self.mean_
        return forecast.reshape(len(X), -1)

    def _features(self, X: Float[np.ndarray, "n LC"]) -> tuple[Float[np.ndarray, "n C F"], Float[np.ndarray, "n C 1"]]:
        """What the linear map is applied to, and the level that is added back to its result."""
        x = ((X.reshape(len(X), self.lookback_, -1) - self.mean_) / self.scale_).swapaxes(1, 2)
        level = x[:, :, -1:] if self.variant == "nlinear" else np.zeros_like(x[:, :, -1:])
        return np.concatenate(decompose(x, self.kernel), axis=-1) if self.variant == "dlinear" else x - level, level

    def _solve_exactly(
        self, features: Float[np.ndarray, "n C F"], targets: Float[np.ndarray, "n C T"]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ridge with the penalty alpha on the weights: coef (1 or C, T, F) and intercept (1 or C, T)."""
        if self.individual:
            pairs = [(features[:, c], targets[:, c]) for c in range(features.shape[1])]
        else:
            pairs = [(features.reshape(-1, features.shape[2]), targets.reshape(-1, targets.shape[2]))]
        coefficients, intercepts = [], []
        for x, y in pairs:
            x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
            x, y = x - x_mean, y - y_mean
            weights = (
                solve(x.T @ x + self.alpha * np.eye(x.shape[1]), x.T @ y, assume_a="pos")
                if self.alpha > 0
                else lstsq(x, y)[0]
            )
            coefficients.append(weights.T)
            intercepts.append(y_mean - weights.T @ x_mean)
        return np.stack(coefficients), np.stack(intercepts)

    def _train(
        self, features: Float[np.ndarray, "n C F"], targets: Float[np.ndarray, "n C T"]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Adam with early stopping; returns what `_solve_exactly` does and sets `n_iter_`, the epochs run."""
        x, y = torch.from_numpy(features).float(), torch.from_numpy(targets).float()
        held_out = min(len(x) - 1, max(1, round(self.validation_fraction * len(x))))
        train = len(x) - held_out
        maps = x.shape[1] if self.individual else 1
        weight = torch.full((maps, y.shape[2], x.shape[2]), 1 / self.lookback_).requires_grad_()
        bias = torch.zeros(maps, y.shape[2]).requires_grad_()
        optimizer = torch.optim.Adam([weight, bias], lr=self.learning_rate)
        random, best, waited = check_random_state(self.random_state), (np.inf, None, None), 0
        for self.n_iter_ in range(1, self.epochs + 1):
            for rows in torch.from_numpy(random.permutation(train)).split(self.batch_size):
                optimizer.zero_grad()
                with torch.enable_grad():
                    F.mse_loss(_apply(x[rows], weight, bias), y[rows]).backward()
                optimizer.step()
            with torch.no_grad():
                loss = float(F.mse_loss(_apply(x[train:], weight, bias), y[train:]))
            if loss < best[0]:
                best, waited = (loss, weight.detach().clone(), bias.detach().clone()), 0
            else:
                waited += 1
            if waited == self.patience:
                break
            optimizer.param_groups[0]["lr"] /= 2
        if best[1] is None:
            raise FormularyError(
                f"ltsf-linear diverged at learning_rate={self.learning_rate}: try a smaller one, or solver='exact'"
            )
        return best[1].double().numpy(), best[2].double().numpy()

    def _check_parameters(self) -> None:
        for name, known in (("variant", VARIANTS), ("solver", SOLVERS)):
            value = getattr(self, name)
            if value not in known:
                raise UsageError(
                    f"ltsf-linear: {name} {value!r} is none of {', '.join(known)}{nearest(str(value), known)}"
                )
        for name in ("lookback", "horizon", "channels", "batch_size", "epochs", "patience", "kernel"):
            value = getattr(self, name)
            if not (isinstance(value, Integral) and value >= 1) and not (name == "channels" and value is None):
                raise UsageError(f"ltsf-linear: {name} must be a whole number of 1 or more, got {value!r}")
        for name, low, high in (("alpha", 0, 1e30), ("learning_rate", 1e-12, 1e3), ("validation_fraction", 0, 0.9)):
            check_range("ltsf-linear", name, getattr(self, name), low, high)
        if self.kernel % 2 == 0:
            raise UsageError(
                f"ltsf-linear: kernel must be odd, so that the moving average is centered; got {self.kernel}"
            )


def _apply(
    x: Float[torch.Tensor, "n C F"], weight: Float[torch.Tensor, "maps T F"], bias: Float[torch.Tensor, "maps T"]
) -> Float[torch.Tensor, "n C T"]:
    if len(weight) == 1:
        return F.linear(x, weight[0], bias[0])
    return torch.einsum("ncf,ctf->nct", x, weight) + bias
