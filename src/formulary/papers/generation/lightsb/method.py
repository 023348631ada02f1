"""Light Schrodinger Bridge: a stochastic map between two distributions, fitted as one Gaussian mixture without
simulation.

The entropic plan for the cost |x - y|^2 / 2 and noise `epsilon` is pi(y | x) = exp(x.y / epsilon) v(y) / c(x). The
adjusted potential v is an unnormalized mixture of K Gaussians with diagonal S_k, which makes everything closed:

    v(y)      = sum_k a_k N(y | r_k, epsilon S_k)
    pi(y | x) = sum_k w_k(x) N(y | r_k + S_k x, epsilon S_k),   w_k(x) = a_k(x) / c(x)
    a_k(x)    = a_k exp((x.S_k x + 2 r_k.x) / (2 epsilon)),     c(x) = sum_k a_k(x)
    loss      = mean_x0 log c(x0) - mean_x1 log v(x1)    = KL(true plan || plan) + constant
    drift     g(x, t) = epsilon grad_x log phi_t(x)
    phi_t(x)  = sum_k a_k |D_k|^(-1/2) exp(sum_i [(s_i - 1) x_i^2 + 2 r_i x_i - t r_i^2] / (2 epsilon d_i))
    D_k       = t S_k + (1 - t) I, with s, r and d the entries of S_k, r_k and D_k

The last line is the paper's formula with its matrices multiplied out: nothing in it is singular at t = 0 or t = 1, and
phi_0(x) = c(x) exp(-|x|^2 / (2 epsilon)).

Source: arXiv:2310.01174, section 3. Shapes: x0, x1, x (B, D). Raises UsageError for a parameter out of range. Full
matrices S_k, which the paper mentions beside the diagonal ones, are not offered.

>>> import torch
>>> _ = torch.manual_seed(0)
>>> batch = {"x0": torch.randn(512, 2), "x1": 3 + torch.randn(512, 2)}
>>> model = LightSB.build(dim=2, potentials=4, epsilon=1.0)
>>> model.start(batch)
>>> optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
>>> for _ in range(200):
...     optimizer.zero_grad(); loss = model.loss(batch); loss.backward(); optimizer.step()
>>> bool((model.predict(batch["x0"]).mean(0) - 3).abs().max() < 0.2)
True
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formulary.contracts import Model
from formulary.contracts.transform import check_range
from formulary.errors import UsageError, nearest

PATHS = ("bridge", "euler")


@dataclass(frozen=True)
class Config:
    """`potentials` is K; `epsilon` the variance that the Brownian motion gains over unit time; `scale` the first value
    of every S_k."""

    dim: int = 2
    potentials: int = 50
    epsilon: float = 0.1
    scale: float = 0.1

    def __post_init__(self):
        check_range("lightsb", "dim", self.dim, 1, 2**20)
        check_range("lightsb", "potentials", self.potentials, 1, 2**20)
        check_range("lightsb", "epsilon", self.epsilon, 1e-6, 1e6)
        check_range("lightsb", "scale", self.scale, 1e-6, 1e6)


class Plan(NamedTuple):
    """pi(y | x), a Gaussian mixture: log weights (B, K), means (B, K, D), and variances (K, D) that no x changes."""

    log_weights: Tensor
    means: Tensor
    variances: Tensor


class LightSB(Model):
    """The bridge from the distribution of x0 to that of x1. `predict(x0)` draws where a point ends."""

    Config = Config
    accepts: ClassVar[str] = "pairs"
    training: ClassVar[dict[str, Any]] = {"steps": 10_000, "lr": 1e-3, "batch_size": 128, "schedule": "constant"}

    def __init__(self, config: Config):
        super().__init__(config)
        shape = (config.potentials, config.dim)
        self.shifts = nn.Parameter(torch.randn(shape))
        self.log_scales = nn.Parameter(torch.full(shape, math.log(config.scale)))
        self.offsets = nn.Parameter(torch.full((config.potentials,), -config.epsilon * math.log(config.potentials)))

    @property
    def log_alpha(self) -> Float[Tensor, "K"]:
        """log a_k. The parameter is epsilon log a_k, so that one step moves it as far as it moves r_k."""
        return self.offsets / self.config.epsilon

    @torch.no_grad()
    def start(self, batch: dict[str, Tensor]) -> None:
        """Put each r_k on a sample of the target (with repetition if there are fewer samples than potentials)."""
        x1, count = batch["x1"], self.config.potentials
        if x1.ndim != 2 or x1.shape[1] != self.config.dim or not len(x1):
            raise UsageError(f"lightsb: x1 must be (B, {self.config.dim}), not {tuple(x1.shape)}")
        chosen = torch.randperm(len(x1)).repeat(-(-count // len(x1)))[:count]
        self.shifts.copy_(x1[chosen])

    def loss(self, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
        """KL from the true plan up to a constant, in nats, from independent samples `x0` and `x1`."""
        return self.log_normalizer(batch["x0"]).mean() - self.log_mixture(batch["x1"]).mean()

    def log_normalizer(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B"]:
        """log c(x)."""
        return self._log_tilted(x).logsumexp(-1)

    def log_mixture(self, y: Float[Tensor, "B D"]) -> Float[Tensor, "B"]:
        """log v(y)."""
        epsilon, scales = self.config.epsilon, self.log_scales.exp()
        squares = ((y.unsqueeze(1) - self.shifts) ** 2 / scales).sum(-1) / (2 * epsilon)
        log_volume = (self.log_scales + math.log(2 * math.pi * epsilon)).sum(-1) / 2
        return (self.log_alpha - log_volume - squares).logsumexp(-1)

    def log_potential(self, x: Float[Tensor, "B D"], t: float) -> Float[Tensor, "B"]:
        """log phi_t(x), the forward Schrodinger potential, of which the drift is epsilon times the gradient."""
        return self._log_terms(x, t)[0].logsumexp(-1)

    def plan(self, x: Float[Tensor, "B D"]) -> Plan:
        """The conditional plan pi(. | x)."""
        scales = self.log_scales.exp()
        means = self.shifts + scales * x.unsqueeze(1)
        return Plan(self._log_tilted(x).log_softmax(-1), means, self.config.epsilon * scales)

    def drift(self, x: Float[Tensor, "B D"], t: float) -> Float[Tensor, "B D"]:
        """g(x, t) of the bridge dX = g(X, t) dt + sqrt(epsilon) dW, for 0 <= t <= 1."""
        check_range("lightsb", "t", t, 0, 1)
        terms, spread = self._log_terms(x, t)
        pull = (self.shifts + (self.log_scales.exp() - 1) * x.unsqueeze(1)) / spread
        return (terms.softmax(-1).unsqueeze(-1) * pull).sum(1)

    @torch.no_grad()
    def predict(self, inputs: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """One draw from pi(. | x) for each x, with torch's global generator."""
        log_weights, means, variances = self.plan(inputs)
        chosen = torch.multinomial(log_weights.exp(), 1)[:, 0]
        return means[torch.arange(len(inputs)), chosen] + variances[chosen].sqrt() * torch.randn_like(inputs)

    @torch.no_grad()
    def sample_path(
        self, x0: Float[Tensor, "B D"], steps: int = 100, *, kind: str = "bridge"
    ) -> Float[Tensor, "T B D"]:
        """Paths from t = 0 to 1, steps + 1 points at equal distances.

        "bridge" draws the end and then the Brownian bridge to it: exact at any number of steps. "euler" follows the
        drift (Euler-Maruyama), exact only as the steps grow.
        """
        check_range("lightsb", "steps", steps, 1, 10**7)
        if kind not in PATHS:
            raise UsageError(f"lightsb: a path is one of {', '.join(PATHS)}, not {kind!r}{nearest(kind, PATHS)}")
        end = self.predict(x0) if kind == "bridge" else None
        path, dt, epsilon = [x0], 1 / steps, self.config.epsilon
        for step in range(steps):
            x, left = path[-1], (steps - step) * dt
            if end is None:
                x = x + dt * self.drift(x, step * dt) + math.sqrt(epsilon * dt) * torch.randn_like(x)
            elif step == steps - 1:
                x = end
            else:
                x = x + (end - x) * (dt / left) + math.sqrt(epsilon * dt * (left - dt) / left) * torch.randn_like(x)
            path.append(x)
        return torch.stack(path)

    def _log_tilted(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """log a_k(x)."""
        return self.log_alpha + (x**2 @ self.log_scales.exp().T + 2 * x @ self.shifts.T) / (2 * self.config.epsilon)

    def _log_terms(self, x: Float[Tensor, "B D"], t: float) -> tuple[Float[Tensor, "B K"], Float[Tensor, "K D"]]:
        """The logarithms of phi_t's terms, and the diagonals of D_k."""
        scales = self.log_scales.exp()
        spread = t * scales + (1 - t)
        exponent = (
            x**2 @ ((scales - 1) / spread).T + 2 * x @ (self.shifts / spread).T - t * (self.shifts**2 / spread).sum(-1)
        )
        return self.log_alpha - spread.log().sum(-1) / 2 + exponent / (2 * self.config.epsilon), spread
