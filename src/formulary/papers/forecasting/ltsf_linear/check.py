"""Planted series with trend, two seasons, correlated noise and level shifts: linear maps against a Transformer and
simple forecasts."""

from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from sklearn.linear_model import Ridge
from torch import nn
from torch.nn import functional as F

from formulary import lab
from formulary.evidence import Check, Outcome, all_of, at_most
from formulary.papers.forecasting._parts import seasonal_naive, windows
from formulary.papers.forecasting.ltsf_linear.method import LTSFLinear

LOOKBACK, SHORT, HORIZON, CHANNELS = 96, 24, 48, 5
TRAIN, TEST, EPOCHS, BATCH = 2400, 800, 5, 32
RATES = {"transformer": (3e-4, 1e-3, 3e-3), "dlinear": (1e-3, 5e-3, 2e-2), "nlinear": (1e-3, 5e-3, 2e-2)}
TUNING_SEED = 987_654


class DirectTransformer(nn.Module):
    """An encoder over the time steps, all channels in one token, and a decoder whose learned queries give all future
    steps at once."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.embed, self.head = nn.Linear(CHANNELS, width), nn.Linear(width, CHANNELS)
        self.places = nn.Parameter(0.02 * torch.randn(LOOKBACK, width))
        self.queries = nn.Parameter(0.02 * torch.randn(HORIZON, width))
        shape = {
            "nhead": 4,
            "dim_feedforward": 2 * width,
            "dropout": 0.05,
            "activation": "gelu",
            "batch_first": True,
            "norm_first": True,
        }
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, **shape), 2, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(width, **shape), 1, norm=nn.LayerNorm(width))

    def forward(self, x):
        memory = self.encoder(self.embed(x.unflatten(1, (LOOKBACK, CHANNELS))) + self.places)
        return self.head(self.decoder(self.queries.expand(len(x), -1, -1), memory)).flatten(1)


def prepare(seed: int) -> SimpleNamespace:
    """A new series of 5 channels, z-scored by its first 2,400 steps, on which all arms train; the next 800 are the
    test."""
    task = lab.tasks.PlantedSeries(past=TRAIN, future=TEST, channels=CHANNELS)
    batch = task.batch(1, torch.Generator().manual_seed(seed))
    series = torch.cat([batch["past_values"], batch["future_values"]], dim=1)[0].double().numpy()
    series = (series - series[:TRAIN].mean(0)) / series[:TRAIN].std(0)
    return SimpleNamespace(seed=seed, train=series[:TRAIN], test=series[TRAIN - LOOKBACK :])


def linear(variant: str, lr: float, seed: int, lookback: int = LOOKBACK) -> LTSFLinear:
    return LTSFLinear(
        variant,
        lookback,
        HORIZON,
        epochs=EPOCHS,
        patience=EPOCHS,
        batch_size=BATCH,
        learning_rate=lr,
        random_state=seed,
    )


def transformer(train: np.ndarray, lr: float, seed: int) -> DirectTransformer:
    X, y = (torch.from_numpy(part).float() for part in windows(train, LOOKBACK, HORIZON))

    def batch(step: int) -> dict[str, torch.Tensor]:
        chosen = torch.randint(len(X), (BATCH,), generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
        return {"x": X[chosen], "y": y[chosen]}

    torch.manual_seed(seed)
    model = DirectTransformer()
    loss = lambda model, batch: F.mse_loss(model(batch["x"]), batch["y"])
    lab.train(model, batch, steps=EPOCHS * -(-len(X) // BATCH), lr=lr, loss=loss, seed=seed)
    return model.eval()


def fitted(name: str, train: np.ndarray, lr: float, seed: int):
    """A function from histories to futures, and its number of parameters."""
    if name == "transformer":
        model = transformer(train, lr, seed)
        predict = lambda X: torch.cat([model(part) for part in torch.from_numpy(X).float().split(256)]).double().numpy()
        return torch.no_grad()(predict), sum(p.numel() for p in model.parameters())
    model = linear(name, lr, seed).fit_series(train)
    return model.predict, model.coef_.size + model.intercept_.size


def error(predict, series: np.ndarray, lookback: int = LOOKBACK) -> float:
    """Mean squared error over all windows whose futures lie in the test part."""
    X, y = windows(series[LOOKBACK - lookback :], lookback, HORIZON)
    return float(np.mean((predict(X) - y) ** 2))


@cache
def tuned(name: str) -> float:
    """The learning rate with the least error on a series that no seed uses."""
    c = prepare(TUNING_SEED)
    return min(RATES[name], key=lambda lr: error(fitted(name, c.train, lr, TUNING_SEED)[0], c.test))


def arm(name: str):
    def run(c: SimpleNamespace) -> Outcome:
        predict, parameters = fitted(name, c.train, tuned(name), c.seed)
        return Outcome(
            [error(predict, c.test)],
            budget={"parameters": parameters, "epochs": EPOCHS, "tuning trials": len(RATES[name])},
        )

    return run


def short(c: SimpleNamespace) -> Outcome:
    """DLinear that sees a quarter of the history."""
    model = linear("dlinear", tuned("dlinear"), c.seed, SHORT).fit_series(c.train)
    budget = {
        "parameters": model.coef_.size + model.intercept_.size,
        "epochs": EPOCHS,
        "tuning trials": len(RATES["dlinear"]),
    }
    return Outcome([error(model.predict, c.test, SHORT)], budget=budget)


def ridge(c: SimpleNamespace) -> list[float]:
    """scikit-learn's ridge regression on the same windows, shared by the channels."""
    by_channel = lambda rows, steps: rows.reshape(len(rows), steps, CHANNELS).swapaxes(1, 2).reshape(-1, steps)
    X, y = windows(c.train, LOOKBACK, HORIZON)
    model = Ridge(1.0).fit(by_channel(X, LOOKBACK), by_channel(y, HORIZON))
    forecast = lambda X: (
        model.predict(by_channel(X, LOOKBACK)).reshape(len(X), CHANNELS, HORIZON).swapaxes(1, 2).reshape(len(X), -1)
    )
    return [error(forecast, c.test)]


def naive(c: SimpleNamespace) -> list[float]:
    """The last season repeated; the period (1, 7 or 24 steps) is the best one on the training part."""
    forecast = lambda period: lambda X: seasonal_naive(X, HORIZON, period, CHANNELS)
    return [error(forecast(min((1, 7, 24), key=lambda period: error(forecast(period), c.train))), c.test)]


check = Check(
    claim="DLinear and NLinear have at least 10 % less squared error than a Transformer with direct decoder and tuned "
    "learning rate, DLinear less than the best seasonal naive forecast, and less with 96 steps of history than 24.",
    setup=prepare,
    arms={
        "dlinear": arm("dlinear"), "nlinear": arm("nlinear"), "transformer": arm("transformer"),
        "dlinear, 24 steps": short,
        "seasonal naive": naive, "ridge": ridge,
    },
    metric="squared error, training variances",
    holds=all_of(
        at_most("dlinear", "transformer", ratio=0.9), at_most("nlinear", "transformer", ratio=0.9),
        at_most("dlinear", "seasonal naive"), at_most("dlinear", "dlinear, 24 steps"),
    ),
    items="fresh",
    redraws="the series, initialization and batches",
    seeds=5,
    version=1,
    scope="planted series of 5 channels and 3,200 steps with level shifts, 48 steps ahead",
)  # fmt: skip
