"""The two modules of turbo inference: precisions and supports of single weights, and the Markov chain along a row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from formulary.contracts import parts


def chain_messages(evidence: Float[Tensor, "length rows"], p01: float, p10: float) -> Float[Tensor, "length rows"]:
    """What a Markov chain down each column says about every support, its own evidence left out, as log-odds of s = 1.

    `evidence` are log-odds too; p01 = p(s_{i+1} = 1 | s_i = 0), p10 = p(s_{i+1} = 0 | s_i = 1); the chain starts in its
    stationary distribution. This is sum-product, forward and backward.

    >>> chain_messages(torch.tensor([[0.0], [4.0], [0.0]]), 0.1, 0.1).sigmoid().squeeze(1)
    tensor([0.8856, 0.5000, 0.8856])
    """
    forward, backward = torch.empty_like(evidence), torch.empty_like(evidence)
    forward[0] = torch.logit(evidence.new_tensor(p01 / (p01 + p10)))
    for i in range(1, len(evidence)):
        active = torch.sigmoid(forward[i - 1] + evidence[i - 1])
        forward[i] = torch.logit(p01 + (1 - p01 - p10) * active)
    backward[-1] = 0
    for i in range(len(evidence) - 1, 0, -1):
        active = torch.sigmoid(backward[i] + evidence[i])
        following = p10 + (1 - 2 * p10) * active, (1 - p01) + (2 * p01 - 1) * active  # from s = 1 and from s = 0
        backward[i - 1] = torch.log(following[0] / following[1])
    return forward + backward


def precisions(
    square: Tensor, belief: Tensor, active: Sequence[float], inactive: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """(E[rho], the log-odds of s = 1 that q(rho) gives): one update of q(rho), then of the evidence for s.

    `square` is E[w^2], `belief` the log-odds of q(s = 1), `active` and `inactive` shape and rate of the Gamma priors.
    """
    (a, b), (a_off, b_off) = active, inactive
    on = torch.sigmoid(belief)
    shape, rate = a_off + (a - a_off) * on + 0.5, b_off + (b - b_off) * on + square / 2
    mean, log_mean = shape / rate, torch.digamma(shape) - torch.log(rate)
    constant = _log_norm(a, b) - _log_norm(a_off, b_off)
    return mean, constant + (a - a_off) * log_mean - (b - b_off) * mean


def _log_norm(a: float, b: float) -> float:
    shape = torch.tensor(a, dtype=torch.double)
    return float(shape * torch.log(torch.tensor(b, dtype=torch.double)) - torch.lgamma(shape))


@dataclass
class Rows:
    """The posterior of one linear's weights, (rows, in) in float32: a row holds what flows into one neuron.

    `scale` is the root mean square of the weights before training; precisions are in units of it.
    """

    part: parts.Linear
    mean: Tensor
    log_deviation: Tensor
    scale: float
    precision: Tensor
    belief: Tensor
    evidence: Tensor

    @classmethod
    def of(cls, part: parts.Linear, noise: float) -> "Rows":
        mean = part.weight().float().reshape(-1, part.in_features).clone()
        scale = max(float(mean.square().mean().sqrt()), 1e-8)
        full = lambda value: torch.full_like(mean, value)
        log_deviation = full(float(torch.log(torch.tensor(noise * scale))))
        return cls(part, mean, log_deviation, scale, full(1.0), full(0.0), full(0.0))

    @property
    def square(self) -> Tensor:
        """E[w^2] in units of the scale."""
        return (self.mean.square() + (2 * self.log_deviation).exp()) / self.scale**2

    def write(self, rows: Tensor) -> None:
        """Make `rows` the linear's weights."""
        self.part.raw.data.copy_(self.part.stored(rows.view(self.part.weight().shape)))

    def gradient(self) -> Tensor:
        """(rows, in): the gradient that the last backward pass left at the linear's weights, which is taken away."""
        grad, self.part.raw.grad = self.part.raw.grad, None
        if grad is None:
            return torch.zeros_like(self.mean)
        return (grad.mT if self.part.transposed else grad).float().reshape(self.mean.shape)


@torch.no_grad()
def infer(
    linears: Sequence[Rows],
    *,
    sparsity: float,
    run_length: float,
    active: Sequence[float],
    inactive: Sequence[float],
) -> None:
    """One turn of turbo inference of supports and precisions with the weights' posterior held: module A, then B."""
    p10 = 1 / run_length
    p01 = p10 * (1 - sparsity) / sparsity
    for rows in linears:
        rows.precision, rows.evidence = precisions(rows.square, rows.belief, active, inactive)
    threshold = smallest([rows.evidence for rows in linears], sparsity)
    for width in {rows.mean.shape[1] for rows in linears}:
        group = [rows for rows in linears if rows.mean.shape[1] == width]
        evidence = torch.cat([rows.evidence for rows in group]).mT.contiguous() - threshold
        messages = chain_messages(evidence, p01, p10).mT.split([len(rows.mean) for rows in group])
        for rows, message in zip(group, messages):
            rows.belief = rows.evidence - threshold + message


def smallest(values: Sequence[Tensor], share: float) -> float:
    """The largest of the `share` smallest entries of all tensors together."""
    every = torch.cat([value.flatten() for value in values])
    return float(every.kthvalue(min(len(every), max(1, round(share * len(every))))).values)
