"""One layer of linear self-attention, trained on regression prompts, learns one step of gradient descent; here are both, to compare.

A prompt holds n pairs z_i = (x_i, y_i) and a query z_q = (x, 0). The layer, without softmax, predicts the last entry of

    W_PV (sum_i z_i z_i^T) W_KQ z_q,

and with y_i = w.x_i + noise, w ~ N(0, I), x ~ N(0, I) its loss E (prediction - y)^2 is least for eta (sum_i y_i x_i).x: one step of
gradient descent from zero on half the sum of squared errors, of size

    eta = 1/(n + d + 1 + noise^2),    loss = d + noise^2 - n d eta.

With x ~ N(0, S) and w ~ N(0, S^-1) it is the preconditioned step eta (sum_i y_i x_i)^T S^-1 x with the same eta and loss. With
nonlinear y, from a family of functions that no rotation and no change of sign alters, and x ~ N(0, I), it is a plain step again, with
its own eta (`best_step`).

Source: arXiv:2307.03576, theorems 1, 2 and 3 (isotropic, anisotropic, nonlinear). The paper gives eta as a ratio of expectations; that
ratio is worked out above: E y (X^T y).x = n d, and E |X^T y|^2 = n d (n + d + 1 + noise^2).

>>> X, y, x, target = linear_prompts(4096, 20, 5, noise=0.5, generator=torch.Generator().manual_seed(0))
>>> prediction = one_step_gd(X, y, x, optimal_step(20, 5, noise=0.5))
>>> round(expected_loss(20, 5, noise=0.5), 3), bool((mean_loss(prediction, target) / expected_loss(20, 5, noise=0.5) - 1).abs() < 0.1)
(1.44, True)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formulary.contracts.report import Report
from formulary.contracts.study import Study
from formulary.contracts.transform import check_range
from formulary.errors import UsageError

Prompts = tuple[Float[Tensor, "B n d"], Float[Tensor, "B n"], Float[Tensor, "B d"], Float[Tensor, "B"]]
"""Inputs X, responses y, query inputs x, and the queries' responses."""


class LinearSelfAttention(nn.Module):
    """A layer of linear self-attention over tokens (x_i, y_i) of width d + 1, with all of W_KQ and W_PV, (d + 1, d + 1) each.

    The entries start as N(0, std^2), from torch's random state. At zero the loss has a saddle, where training would stay.
    """

    def __init__(self, d: int, std: float = 0.1):
        super().__init__()
        check_range("one-step-gd-optimal-icl", "d", d, 1, 1 << 12)
        self.W_KQ = nn.Parameter(std * torch.randn(d + 1, d + 1))
        self.W_PV = nn.Parameter(std * torch.randn(d + 1, d + 1))

    def forward(self, X: Float[Tensor, "B n d"], y: Float[Tensor, "B n"], x: Float[Tensor, "B d"]) -> Float[Tensor, "B"]:
        """The prediction at x: the last entry of the query's output, the query itself not being attended to."""
        tokens = torch.cat([X, y.unsqueeze(-1)], -1)
        weights = tokens @ (x @ self.W_KQ[:, :-1].T).unsqueeze(-1)
        attended = (tokens.mT @ weights).squeeze(-1)
        return attended @ self.W_PV[-1]


def optimal_step(n: int, d: int, noise: float = 0.0) -> float:
    """The step size of the layer that is best on linear prompts, 1/(n + d + 1 + noise^2); `noise` is the deviation of y."""
    _check(n, d, noise)
    return 1 / (n + d + 1 + noise**2)


def expected_loss(n: int, d: int, noise: float = 0.0, step: float | None = None) -> float:
    """E (prediction - y)^2 of one step of size `step` (the best by default) on linear prompts, the noise of the query's y included."""
    eta = optimal_step(n, d, noise) if step is None else step
    return d + noise**2 - 2 * eta * n * d + eta**2 * n * d / optimal_step(n, d, noise)


def one_step_gd(
    X: Float[Tensor, "B n d"],
    y: Float[Tensor, "B n"],
    x: Float[Tensor, "B d"],
    eta: float,
    preconditioner: Float[Tensor, "d d"] | None = None,
) -> Float[Tensor, "B"]:
    """Predict at x after one step of size `eta` from zero on half the summed squared error of X, y: eta (X^T y)^T P x, P = I by default."""
    moved = x if preconditioner is None else x @ preconditioner.T
    return eta * torch.einsum("bnd,bn,bd->b", X, y, moved)


def best_step(prompts: Prompts, preconditioner: Float[Tensor, "d d"] | None = None) -> float:
    """The step size of least mean loss on these prompts, whatever their responses: sum target g / sum g^2 for the unit step's g."""
    X, y, x, target = prompts
    unit = one_step_gd(X, y, x, 1.0, preconditioner).double()
    return float((unit @ target.double()) / (unit @ unit))


def mean_loss(prediction: Float[Tensor, "B"], target: Float[Tensor, "B"]) -> Float[Tensor, ""]:
    """The mean squared error."""
    return (prediction - target).square().mean()


def gd_layer(d: int, eta: float, preconditioner: Float[Tensor, "d d"] | None = None) -> LinearSelfAttention:
    """The layer that is one (preconditioned) step of gradient descent, its weights set by hand."""
    layer = LinearSelfAttention(d, std=0.0)
    with torch.no_grad():
        layer.W_KQ[:-1, :-1] = eta * (torch.eye(d) if preconditioner is None else preconditioner)
        layer.W_PV[-1, -1] = 1.0
    return layer


def effective_matrix(layer: LinearSelfAttention) -> Float[Tensor, "d d"]:
    """A in (sum y_i x_i)^T A x, the part of the layer's prediction that gradient descent has too: P for one step is eta P.

    The prediction has two parts more, in sum x_i x_i^T and in sum y_i^2; `other_parts` measures those.
    """
    value_x, value_y = layer.W_PV[-1, :-1], layer.W_PV[-1, -1]
    return (value_y * layer.W_KQ[:-1, :-1] + torch.outer(value_x, layer.W_KQ[-1, :-1])).detach()


def other_parts(layer: LinearSelfAttention, X: Float[Tensor, "B n d"], y: Float[Tensor, "B n"], x: Float[Tensor, "B d"]) -> float:
    """Root mean square, on these prompts, of what the layer predicts beyond (sum y_i x_i)^T A x; 0 for gradient descent."""
    with torch.no_grad():
        rest = layer(X, y, x) - one_step_gd(X, y, x, 1.0, effective_matrix(layer))
    return float(rest.square().mean().sqrt())


def linear_prompts(
    count: int,
    n: int,
    d: int,
    noise: float = 0.0,
    covariance: Float[Tensor, "d d"] | None = None,
    generator: torch.Generator | None = None,
) -> Prompts:
    """`count` prompts with x ~ N(0, S), w ~ N(0, S^-1), y = w.x + N(0, noise^2); S is `covariance`, I by default."""
    _check(n, d, noise)
    x = torch.randn(count, n + 1, d, generator=generator)
    w = torch.randn(count, d, generator=generator)
    y = torch.einsum("bnd,bd->bn", x, w) + noise * torch.randn(count, n + 1, generator=generator)
    if covariance is not None:
        x = x @ _factor(covariance, d).T
    return x[:, :-1], y[:, :-1], x[:, -1], y[:, -1]


def relu_prompts(count: int, n: int, d: int, noise: float = 0.0, hidden: int = 20, generator: torch.Generator | None = None) -> Prompts:
    """`count` prompts with x ~ N(0, I) and y = a.relu(U x) + N(0, noise^2), a new network each: a ~ N(0, 2/hidden), U ~ N(0, 1)."""
    _check(n, d, noise)
    x = torch.randn(count, n + 1, d, generator=generator)
    U, a = torch.randn(count, d, hidden, generator=generator), torch.randn(count, hidden, generator=generator)
    y = torch.einsum("bnh,bh->bn", (x @ U).relu(), a) * (2 / hidden) ** 0.5
    y = y + noise * torch.randn(count, n + 1, generator=generator)
    return x[:, :-1], y[:, :-1], x[:, -1], y[:, -1]


def train_layer(
    draw: Callable[[int, torch.Generator], Prompts], *, steps: int = 1200, batch: int = 1024, lr: float = 0.02, seed: int = 0
) -> LinearSelfAttention:
    """A layer trained by Adam on the squared error of fresh prompts, `draw(batch, generator)`; the rate falls to zero as a cosine.

    Prompts and the initial weights come from `seed` alone. The theorems are about the best layer, and training may end elsewhere: for
    d = 2, n = 6, noise 0.5 two of three seeds stay in a local minimum of loss 1.54, where the best is 0.95, that leans on
    sum x_i x_i^T (`other_parts`). Raises UsageError when the loss stops being finite.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = LinearSelfAttention(draw(1, torch.Generator().manual_seed(seed))[0].shape[2])
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        X, y, x, target = draw(batch, generator)
        loss = mean_loss(layer(X, y, x), target)
        if not torch.isfinite(loss):
            raise UsageError(f"one-step-gd-optimal-icl: the loss is {loss.item()} at step {step + 1}; try an lr below {lr}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return layer


def _factor(covariance: Tensor, d: int) -> Tensor:
    """F, symmetric, with F F = S, so that x = F u and w = F^-1 v have w.x = v.u for any u and v."""
    if covariance.shape != (d, d) or not torch.allclose(covariance, covariance.T):
        raise UsageError(f"one-step-gd-optimal-icl: covariance must be a symmetric {d} x {d} matrix")
    values, vectors = torch.linalg.eigh(covariance)
    if values.min() <= 0:
        raise UsageError("one-step-gd-optimal-icl: covariance must be positive definite")
    return (vectors * values.sqrt()) @ vectors.T


def _check(n: int, d: int, noise: float) -> None:
    check_range("one-step-gd-optimal-icl", "n", n, 1, 1 << 20)
    check_range("one-step-gd-optimal-icl", "d", d, 1, 1 << 12)
    check_range("one-step-gd-optimal-icl", "noise", noise, 0, 1e6)


@dataclass(frozen=True, kw_only=True)
class OneStepGD(Study):
    """Trained layers against the closed form: the loss over the prompt's length, and the matrices learned.

    d: width of x. prompt_lengths: the n of the loss curve; the longest is also trained on anisotropic inputs, whose variances go from
    `spread` to 1/`spread`. noise: deviation of y. steps, batch: of training. Raises UsageError outside the ranges.
    """

    d: int = 5
    prompt_lengths: tuple[int, ...] = (2, 5, 10, 20)
    noise: float = 0.0
    spread: float = 4.0
    steps: int = 800
    batch: int = 1024
    seed: int = 0
    quick: ClassVar[dict[str, Any]] = {"d": 3, "prompt_lengths": (4, 8), "steps": 20, "batch": 64}

    def __post_init__(self):
        if not self.prompt_lengths:
            raise UsageError("one-step-gd-optimal-icl: prompt_lengths must name at least one length")
        for n in self.prompt_lengths:
            _check(n, self.d, self.noise)
        check_range(self.slug, "spread", self.spread, 1, 1000)
        check_range(self.slug, "steps", self.steps, 1, 1_000_000)
        check_range(self.slug, "batch", self.batch, 1, 1_000_000)

    @classmethod
    def functions(cls) -> dict[str, Callable]:
        """The closed forms, the layer and its training, and the prompts."""
        offered = (optimal_step, expected_loss, one_step_gd, best_step, gd_layer, train_layer, effective_matrix, other_parts,
                   linear_prompts, relu_prompts)  # fmt: skip
        return {function.__name__: function for function in offered}

    def figure(self, report: Report) -> None:
        """Loss over the prompt's length for the trained layer, one step and zero; learned matrices over eta, isotropic and not."""
        lengths = sorted(self.prompt_lengths)
        for n in lengths:
            layer, X, y, x, target = self._trained(n, None)
            with torch.no_grad():
                measured = float(mean_loss(layer(X, y, x), target))
            step = float(effective_matrix(layer).diagonal().mean())
            row = {"n": n, "trained layer": measured, "one step": expected_loss(n, self.d, self.noise)}
            optimal = optimal_step(n, self.d, self.noise)
            report.tables.setdefault("loss", []).append(row | {"learned step": step, "optimal step": optimal})
            if measured > 1.05 * row["one step"]:
                report.note(f"at n = {n} training ended at a loss of {measured:.3g}, above the optimum of {row['one step']:.3g}")
        rows = report.tables["loss"]
        curves = {name: [row[name] for row in rows] for name in ("trained layer", "one step")}
        curves["predicting 0"] = [self.d + self.noise**2] * len(rows)
        report.figures["loss over prompt length"] = {
            "kind": "lines", "x": lengths, "y": curves, "title": "Trained linear attention and one step of gradient descent",
            "xlabel": "examples in the prompt", "ylabel": "squared error",
        }  # fmt: skip
        variances = torch.logspace(1, -1, self.d, base=self.spread)
        anisotropic = self._trained(lengths[-1], variances.diag())[0]
        for name, learned in {"isotropic": layer, "anisotropic": anisotropic}.items():
            values = effective_matrix(learned) / optimal_step(lengths[-1], self.d, self.noise)
            report.figures[f"matrix, {name}"] = {
                "kind": "heatmap", "values": values.tolist(), "title": f"Effective matrix over the optimal step, {name} inputs",
                "xlabel": "entry of x", "ylabel": "entry of the gradient",
            }  # fmt: skip
        learned = (effective_matrix(anisotropic).diagonal() / optimal_step(lengths[-1], self.d, self.noise)).tolist()
        inverse = variances.reciprocal().tolist()
        report.tables["preconditioner"] = [
            {"inverse variance": predicted, "learned": found} for predicted, found in zip(inverse, learned)
        ]

    def _trained(self, n: int, covariance: Tensor | None):
        """A trained layer and the fresh prompts to measure it on."""
        draw = lambda count, generator: linear_prompts(count, n, self.d, self.noise, covariance, generator)
        layer = train_layer(draw, steps=self.steps, batch=self.batch, seed=self.seed)
        return layer, *draw(1 << 14, torch.Generator().manual_seed(self.seed + 1))
