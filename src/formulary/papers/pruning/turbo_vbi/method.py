"""Turbo-VBI: Bayesian pruning whose kept weights come in runs along the rows, since a Markov chain links supports.

    p(w | rho) = N(0, 1/rho),  p(rho | s) = Gamma(a, b) if s = 1, else Gamma(a', b') with a large mean,
    p(s) = p(s_1) prod_i p(s_{i+1} | s_i) along the weights into one neuron

Module A holds q(w) = N(mu, sigma^2), q(rho) and q(s), with e = E[s] and E[w^2] = mu^2 + sigma^2:

    minimize  loss(mu + sigma eps) + (kl_weight / W) KL(q(w) || N(0, 1/E[rho]))   over mu and sigma, of W weights
    q(rho) = Gamma(e a + (1-e) a' + 1/2,  e b + (1-e) b' + E[w^2]/2)
    log-odds of q(s=1) = l + m,  l = log b^a G(a') / (b'^a' G(a)) + (a-a') E[ln rho] - (b-b') E[rho]

Module B gets l, runs forward-backward over the chain and returns m, the log-odds from the other weights of the row.
At the end the weights with the least log-odds are dropped, as many as `sparsity` says.

Source: arXiv:2302.10483, abstract and the model it describes; parameters are those of the first author's later code
(D-Turbo-VBI), which has 1 and E[w^2] where the density of a real w gives 1/2 and E[w^2]/2, as here. Ours: w is counted
in root mean squares of its linear, since the paper trains from scratch; p01 and p10 of the chain come from
the share kept and the mean length of its runs, l is centered so that this share is active, and the modules take one
turn a round: on weights trained before, more turns without training in between made runs far longer than the prior's.
No damping.

In: any model but encoder-decoders; data to train on. The loss is the model's own on labels, that of the next token, or
else the distance to the model's outputs before. Only the chosen weights are trained. Out: the same model with zeros; a
feed-forward neuron whose weights all vanished is cut out of its linears and what it added goes into the bias. Zeros
elsewhere are stored densely: no smaller on disk, no faster without a sparse kernel.

Raises UsageError for bad parameters, FormularyError without data or where the model gives nothing to train on.

>>> from formulary.lab import small
>>> model = small.tiny("llama")
>>> data = Data([{"input_ids": ids} for ids in small.inputs_for(model, batch=8)["input_ids"]])
>>> model, report = TurboVBI(sparsity=0.75, steps=2, rounds=1).apply(model, data)
>>> report.figures["zero"], report.figures["runs per kept weight, and by chance"]
(0.75, [..., 0.75...])
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from formulary.contracts import Data, Report, Transform, parts
from formulary.contracts.edits import Editor
from formulary.contracts.transform import check_range
from formulary.errors import UsageError

from .._parts import Removed, SlicedLinear, Sublayer, shrink, sublayers
from ..matformer.method import loss_for
from ._support import Rows, infer, smallest

__all__ = ["Removed", "SlicedLinear", "TurboVBI", "runs_per_weight"]


class Variational:
    """A recipe that trains the posteriors of some linears by sampled weights, and infers their supports in between."""

    def __init__(self, linears: Sequence[Rows], method: "TurboVBI"):
        self.linears, self.method = linears, method
        self.price = method.kl_weight / sum(rows.mean.numel() for rows in linears)
        self.every = -(-method.steps // method.rounds)
        self.infer()

    def infer(self) -> None:
        method = self.method
        infer(
            self.linears, sparsity=method.sparsity, run_length=method.run_length, active=method.active,
            inactive=method.inactive,
        )  # fmt: skip

    def optimizer(self, _) -> torch.optim.Optimizer:
        posterior = [tensor for rows in self.linears for tensor in (rows.mean, rows.log_deviation)]
        return torch.optim.Adam(posterior, lr=self.method.learning_rate)

    def step(self, model: nn.Module, closure, optimizer: torch.optim.Optimizer) -> Tensor:
        """One sample of all weights, its gradient at mean and deviation, and the gradient of the divergence."""
        noise = [torch.randn_like(rows.mean).mul_(rows.log_deviation.exp()) for rows in self.linears]
        for rows, moved in zip(self.linears, noise):
            rows.write(rows.mean + moved)
        value = closure()
        for rows, moved in zip(self.linears, noise):
            grad, per_square = rows.gradient(), rows.precision / rows.scale**2
            rows.log_deviation.grad = grad * moved + self.price * (per_square * (2 * rows.log_deviation).exp() - 1)
            rows.mean.grad = grad.add_(per_square.mul_(rows.mean), alpha=self.price)
        optimizer.step()
        return value

    def control(self, loop) -> None:
        if loop.step % self.every == 0 or loop.step == loop.steps:
            self.infer()


def fit(model: nn.Module, data, linears: Sequence[parts.Linear], method: "TurboVBI", loss, seed: int):
    """(the posterior of each linear after training, the log); the linears are left with their means, the small ones
    zero.
    """
    from formulary.lab import train

    posterior = [Rows.of(part, method.noise) for part in linears]
    recipe = Variational(posterior, method)
    model.requires_grad_(False)
    for part in linears:
        part.raw.requires_grad_(True)
    log = train(model, data, steps=method.steps, lr=method.learning_rate, recipe=recipe, loss=loss, seed=seed)
    threshold = smallest([rows.belief for rows in posterior], method.sparsity)
    for rows in posterior:
        rows.write(rows.mean * (rows.belief > threshold))
    return posterior, log


def runs_per_weight(kept: Sequence[Tensor]) -> float:
    """How many runs of neighbors the kept weights, (rows, in) each, come in along the rows, for one kept weight.

    >>> runs_per_weight([torch.tensor([[True, True, False, True], [False, True, True, True]])])
    0.5
    """
    runs = sum(int((mask[:, 1:] & ~mask[:, :-1]).sum() + mask[:, 0].sum()) for mask in kept)
    return runs / max(1, sum(int(mask.sum()) for mask in kept))


@dataclass(frozen=True, kw_only=True)
class TurboVBI(Transform):
    """Train weights with a prior under which kept ones cluster, and drop the rest; see the module.

    sparsity: the share of weights to drop, over all chosen linears together. run_length: the mean length of a run of
    kept weights under the prior; 1 / sparsity makes the supports independent of one another. active, inactive: shape
    and rate of the precision's Gamma prior. kl_weight: what the mean divergence of a weight counts beside the loss; W
    weights seen through N independent observations have W / N. steps, learning_rate: of Adam; rounds: how often supports
    are inferred on the way. noise: the deviation that weights start with, in root mean squares of their linear.
    """

    sparsity: float = 0.5
    run_length: float = 4.0
    active: tuple[float, ...] = (1.0, 1.0)
    inactive: tuple[float, ...] = (1.0, 0.01)
    kl_weight: float = 1.0
    steps: int = 60
    rounds: int = 6
    learning_rate: float = 1e-3
    noise: float = 0.01

    supports: ClassVar[frozenset[str]] = frozenset({"decoder", "encoder", "vision"})
    needs_data: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    quick: ClassVar[dict[str, Any]] = {"steps": 2, "rounds": 1, "sparsity": 0.8}

    def __post_init__(self):
        super().__post_init__()
        check_range("turbo-vbi", "sparsity", self.sparsity, 0.01, 0.999)
        least = max(1.0, 1 / self.sparsity - 1)
        check_range("turbo-vbi", "run_length", self.run_length, least, 1e6)
        for name in ("active", "inactive"):
            value = tuple(getattr(self, name))
            object.__setattr__(self, name, value)
            if len(value) != 2 or not all(0 < number < math.inf for number in value):
                raise UsageError(f"turbo-vbi: {name} is a shape and a rate, both above 0, got {value}")
        if not self.inactive[0] / self.inactive[1] > self.active[0] / self.active[1]:
            raise UsageError("turbo-vbi: inactive must have a larger mean precision (shape / rate) than active")
        check_range("turbo-vbi", "kl_weight", self.kl_weight, 0.0, 1e9)
        check_range("turbo-vbi", "steps", self.steps, 1, 10_000_000)
        check_range("turbo-vbi", "rounds", self.rounds, 1, self.steps)
        check_range("turbo-vbi", "noise", self.noise, 1e-6, 1.0)
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"turbo-vbi: learning_rate must be above 0, got {self.learning_rate}")

    def run(self, model: nn.Module, data: Data, edit: Editor, report: Report) -> None:
        linears = parts.linears(model, self.targets, self.ignore)
        if not linears:
            return
        edit.keep(*{id(part.module): part.module for part in linears}.values())
        loss, words = loss_for(model, data)
        posterior, log = fit(model, data, linears, self, loss, data.seed)
        kept = [rows.part.weight().reshape(rows.mean.shape) != 0 for rows in posterior]
        for part, mask in zip(linears, kept):
            report.changed(part.name, part.weights, f"{1 - float(mask.float().mean()):.1%} zero")
        self._tell(posterior, kept, report)
        report.note(f"trained on {words}: {log.losses[0]:.3g} to {log.final:.3g} over {self.steps} steps")
        before = parts.count_weights(model)
        dead, neurons = self._remove(model, data, linears, edit, report)
        gone = before - parts.count_weights(model)
        report.figures["weights cut out"] = gone
        report.note(f"{dead} of {neurons} feed-forward neurons vanished and are cut out, {gone:,} weights with biases")

    @staticmethod
    def _tell(posterior: Sequence[Rows], kept: Sequence[Tensor], report: Report) -> None:
        total = sum(mask.numel() for mask in kept)
        zero = 1 - sum(int(mask.sum()) for mask in kept) / total
        runs = runs_per_weight(kept)
        report.figures["zero"] = round(zero, 6)
        report.figures["runs per kept weight, and by chance"] = [runs, zero]
        report.tables["linears"] = [
            {
                "linear": rows.part.name, "zero": 1 - float(mask.float().mean()),
                "runs per kept weight": runs_per_weight([mask]), "rows that vanished": int((~mask.any(1)).sum()),
                "mean deviation / scale": float(rows.log_deviation.exp().mean()) / rows.scale,
            }
            for rows, mask in zip(posterior, kept)
        ]  # fmt: skip
        where = "stored densely, so they are unstructured to any kernel but a sparse one"
        report.note(f"{zero:.1%} of {total:,} weights are zero, {where}; {1 / max(runs, 1e-9):.2f} kept ones in a row")

    def _remove(
        self, model: nn.Module, data: Data, linears: Sequence[parts.Linear], edit: Editor, report: Report
    ) -> tuple[int, int]:
        """Cut out the neurons that have nothing in or nothing out; (how many, of how many)."""
        names = {part.name for part in linears}
        found, reasons = sublayers(model)
        for name, reason in reasons.items():
            if name.endswith("feed-forward"):
                report.note(f"no neuron is cut out of {name}: {reason}")
        found = [
            sublayer for sublayer in found
            if sublayer.role == "feed-forward" and names & {part.name for part in (*sublayer.into, sublayer.out)}
        ]  # fmt: skip
        if not found:
            return 0, 0
        values = _first_inputs(model.eval(), data, [sublayer.out for sublayer in found])
        gone = 0
        for sublayer in found:
            dead, constant = _dead(sublayer, values[sublayer.name])
            if dead.any():
                if sublayer.out.bias is not None:
                    added = sublayer.out.weight().float() @ torch.where(dead, constant, 0.0)
                    edit.set(sublayer.out.bias, sublayer.out.bias.detach() + added.to(sublayer.out.bias.dtype))
                shrink(edit, sublayer, (~dead).nonzero().squeeze(1).tolist())
            gone += int(dead.sum())
        return gone, sum(sublayer.units for sublayer in found)


def _dead(sublayer: Sublayer, values: Tensor) -> tuple[Tensor, Tensor]:
    """(which neurons say nothing or always the same, what they say), from their weights and from `values`, (tokens,
    neurons).
    """
    unheard = (sublayer.out.weight() == 0).all(0)
    deaf = torch.stack([(part.weight() == 0).all(1) for part in sublayer.into]).any(0)
    constant = torch.where(deaf, values[0].float(), 0.0)
    still = deaf & (values == values[:1]).all(0)
    if sublayer.out.bias is None:
        still &= constant == 0
    return unheard | still, constant


def _first_inputs(model: nn.Module, data: Data, outs: Sequence[parts.Linear]) -> dict[str, Tensor]:
    """What flows into each of `outs` at the tokens of the first batch."""
    seen: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in data.sample(0).items()}
    with parts.observe(outs, lambda part, inputs, _: seen.update({part.name: inputs.clone()})) as run:
        run(model, batch)
    return seen
