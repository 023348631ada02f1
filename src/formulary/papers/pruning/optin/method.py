"""OPTIN: heads and neurons removed in one shot, by how much masking each changes the relations between tokens later on.

    score(u) = sum_{k > l} || G(F_k) - G(F_k without u) ||_F^2 + s T^2 KL(softmax(z/T) || softmax(z without u / T))

for a unit u of layer l, with F_k the hidden states after layer k on one unlabeled batch, G(F) = Fn Fn^T over up to K
rows of unit length, padding left out, and z the logits. Units of the last layer are judged by F of that layer. s is the
power of ten that makes the distortion about `ratio` times the divergence. Then heads and neurons are ranked over all
layers; for every number of heads the rest of the budget goes to the best neurons, and the split with the largest total
score stays. Source: arXiv:2403.17921, section 3.

In: an encoder or vision model and unlabeled data; out: the same model with smaller linears. Token reduction is not
included.

The authors' code differs: it draws s anew for every unit, halves the last layer's scores, and for language multiplies
scores by a factor that falls with the unit's index (10 to 1 over heads, 100 to 1 over neurons). None of the three is
done here. Masking takes one forward pass per unit (blocks before it are not run again). Where `neurons="auto"` would
need more than `PASSES` multiplications, neurons are estimated by gradients instead, which the paper does not do; the
report says so.

Raises UsageError for bad parameters, FormularyError without data.

>>> from formulary.lab import small
>>> from formulary.contracts import Data
>>> model, report = OPTIN(macs=0.5).apply(small.tiny("vit"), Data([{"pixel_values": torch.ones(3, 16, 16)}]))
>>> round(report.figures["multiplications kept"], 1)
0.5
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formulary.contracts import Data, Report, Transform, parts
from formulary.contracts.edits import Editor
from formulary.contracts.transform import check_range
from formulary.errors import UsageError
from formulary.papers.pruning._parts import FewerHeads, Removed, SlicedLinear, Sublayer, runs, shrink, sublayers

from .scoring import Trajectory

__all__ = ["OPTIN", "FewerHeads", "Removed", "SlicedLinear", "least_squares", "split_budget"]

PASSES = 3e12
"""Multiplications of masked forward passes up to which `neurons="auto"` masks: about two minutes on two cores."""

Scores = list[Float[Tensor, "_"]]  # one per sublayer, a score per unit


def split_budget(sublayers: Sequence[Sublayer], scores: Scores, share: float, tokens: int) -> list[list[int]]:
    """The units that stay in each sublayer, with at most `share` of the multiplications and the largest total score.

    Heads are taken in the order of their scores, and so are neurons; only the number of heads is searched.
    """
    ranked = {}
    for role in ("attention", "feed-forward"):
        places = [s for s, part in enumerate(sublayers) if part.role == role]
        units = [(score, s, unit) for s in places for unit, score in enumerate(scores[s].tolist())]
        units.sort(key=lambda unit: (-unit[0], unit[1:]))
        costs = torch.tensor([0] + [sublayers[s].macs(tokens) for _, s, _ in units]).cumsum(0)
        worth = torch.tensor([0.0] + [score for score, _, _ in units], dtype=torch.float64).cumsum(0)
        ranked[role] = units, costs, worth
    (heads, head_costs, head_worth), (neurons, neuron_costs, neuron_worth) = ranked.values()
    budget = share * float(head_costs[-1] + neuron_costs[-1])
    left = budget - head_costs
    affordable = torch.searchsorted(neuron_costs, left.clamp(min=0), right=True) - 1
    total = (head_worth + neuron_worth[affordable]).masked_fill(left < 0, -math.inf)
    best = int(total.argmax())
    kept: list[list[int]] = [[] for _ in sublayers]
    for _, s, unit in heads[:best] + neurons[: int(affordable[best])]:
        kept[s].append(unit)
    return [sorted(units) for units in kept]


def least_squares(
    products: Float[Tensor, "in in"], weight: Float[Tensor, "out in"], units: int, keep: Sequence[int]
) -> Float[Tensor, "kept"]:
    """The factors m of the kept units with which the output is nearest to that of all: min_m || sum m_u o_u - sum o_u
    ||^2.

    `products` is X^T X of the inputs. A little ridge pulls m to 1.
    """
    weight = weight.double()
    inner = (weight.mT @ weight) * products.double()
    inner = inner.unflatten(0, (units, -1)).sum(1).unflatten(1, (units, -1)).sum(2)
    kept = torch.tensor(list(keep), dtype=torch.long, device=inner.device)
    gone = torch.ones(units, dtype=torch.bool, device=inner.device)
    gone[kept] = False
    known = inner[kept][:, kept]
    known = known + 1e-3 * known.diagonal().mean() * torch.eye(len(kept), dtype=known.dtype, device=known.device)
    return 1 + torch.linalg.solve(known, inner[kept][:, gone].sum(1))


@dataclass(frozen=True, kw_only=True)
class OPTIN(Transform):
    """Keep the heads and neurons that matter to later layers, within a budget of multiplications.

    macs: the share of the chosen sublayers' multiplications that stays. items: how many data items make the one batch.
    rows: K. temperature: T. ratio: of distortion to divergence. neurons: "masked", "estimated" (by `probes`
    gradients) or "auto". rescale: scale what stays by least squares on all data, so that each sublayer's output is
    nearest to before.
    """

    macs: float = 0.6
    items: int = 16
    rows: int = 768
    temperature: float = 4.0
    ratio: float = 10.0
    neurons: Literal["auto", "masked", "estimated"] = "auto"
    probes: int = 64
    rescale: bool = False

    supports: ClassVar[frozenset[str]] = frozenset({"encoder", "vision"})
    needs_data: ClassVar[bool] = True
    unit: ClassVar[str] = "sublayer"

    def __post_init__(self):
        super().__post_init__()
        check_range("optin", "macs", self.macs, 0.01, 0.99)
        check_range("optin", "items", self.items, 1, 1_000_000)
        check_range("optin", "rows", self.rows, 2, 1_000_000)
        check_range("optin", "probes", self.probes, 1, 1_000_000)
        for name in ("temperature", "ratio"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"optin: {name} must be above 0, got {getattr(self, name)}")
        if self.neurons not in ("auto", "masked", "estimated"):
            raise UsageError(f"optin: neurons must be auto, masked or estimated, got {self.neurons!r}")

    def run(self, model: nn.Module, data: Data, edit: Editor, report: Report) -> None:
        model.eval()
        chosen, reasons = sublayers(model, self.targets, self.ignore)
        for name, reason in reasons.items():
            report.skipped(name, reason)
        if not chosen:
            return
        if len(data) < self.items:
            report.note(f"calibrated on all {len(data)} items that there are, not {self.items}")
        batch = data.collate(data.items[: self.items])
        device = next(model.parameters()).device
        batch = {key: value.to(device) for key, value in batch.items() if key != "labels"}
        trajectory = Trajectory(model, batch, rows=self.rows, temperature=self.temperature, seed=data.seed)
        scores = self.scores(trajectory, chosen, report)
        tokens = max(1, round(len(trajectory.real) / trajectory.size))
        kept = split_budget(chosen, scores, self.macs, tokens)
        factors = self._factors(model, data, chosen, kept) if self.rescale else [None] * len(chosen)
        for sublayer, keep, factor in zip(chosen, kept, factors):
            self._remove(sublayer, keep, factor, edit, report)
        self._tell(chosen, kept, tokens, report)

    def scores(self, trajectory: Trajectory, chosen: Sequence[Sublayer], report: Report) -> Scores:
        """The score of every unit of these sublayers."""
        estimate = self._estimates(trajectory, chosen)
        masked = [s for s in chosen if s.role == "attention" or not estimate]
        found = {s.name: trajectory.masked(s, range(s.units)) for s in masked}
        scale = self._scale(found.values()) if found else 1.0
        if trajectory.logits is None:
            report.note("this model gives no logits, so only relations between tokens count")
        rest = [s for s in chosen if s.name not in found]
        scores = {name: distortion + scale * change for name, (distortion, change) in found.items()}
        if rest:
            scores |= zip((s.name for s in rest), trajectory.estimated(rest, scale, self.probes))
            many = sum(s.units for s in rest)
            report.note(f"{many} neurons scored by {self.probes} random gradients, not each by a masked forward pass")
        return [scores[s.name] for s in chosen]

    def _estimates(self, trajectory: Trajectory, chosen: Sequence[Sublayer]) -> bool:
        """Whether neurons are estimated."""
        depth, every = len(trajectory.order), trajectory.order
        cost = 0
        for s in chosen:
            if s.role == "feed-forward":
                later = depth - every.index(trajectory.blocks[s.block.name])
                cost += s.units * later * parts.count_weights(s.block.module) * trajectory.tokens
        return self.neurons == "estimated" or (self.neurons == "auto" and cost > PASSES)

    def _scale(self, found) -> float:
        """The power of ten that brings mean distortion / mean divergence nearest to `ratio`."""
        distortion, change = (float(torch.cat(values).mean()) for values in zip(*found))
        if not (distortion > 0 and change > 0):
            return 1.0
        return 10.0 ** round(math.log10(distortion / change / self.ratio))

    @torch.no_grad()
    def _factors(self, model, data: Data, chosen, kept) -> list[Tensor | None]:
        """Per sublayer, the least-squares factors of the kept units."""
        products = {s.name: torch.zeros(s.out.in_features, s.out.in_features, device=s.out.raw.device) for s in chosen}

        def see(part, inputs, expert):
            products[part.name] += inputs.float().mT @ inputs.float()

        with parts.observe([s.out for s in chosen], see) as run:
            for batch in data.batches():
                run(model, {k: v.to(next(model.parameters()).device) for k, v in batch.items() if k != "labels"})
        return [
            least_squares(products[s.name], s.out.weight(), s.units, keep) if 0 < len(keep) < s.units else None
            for s, keep in zip(chosen, kept)
        ]

    def _remove(self, sublayer: Sublayer, keep: list[int], factor: Tensor | None, edit: Editor, report: Report) -> None:
        noun = "heads" if sublayer.role == "attention" else "neurons"
        if len(keep) == sublayer.units:
            report.skipped(sublayer.name, f"all its {noun} stay", sublayer.weights)
            return
        if factor is not None:
            weight = sublayer.out.weight().clone()
            columns = runs(torch.tensor(keep, device=weight.device), sublayer.span)
            weight[:, columns] *= factor.repeat_interleave(sublayer.span).to(weight)
            edit.set(sublayer.out.raw, sublayer.out.stored(weight))
        shrink(edit, sublayer, keep)
        report.changed(sublayer.name, sublayer.weights, f"{len(keep)} of {sublayer.units} {noun}")

    def _tell(self, chosen, kept, tokens: int, report: Report) -> None:
        whole = sum(s.macs(tokens) * s.units for s in chosen)
        share = sum(s.macs(tokens) * len(keep) for s, keep in zip(chosen, kept)) / whole
        report.figures["multiplications kept"] = share
        report.tables["units kept"] = [
            {"layer": s.block.name, "part": s.role, "kept": len(keep), "of": s.units} for s, keep in zip(chosen, kept)
        ]
        for role, noun in (("attention", "heads"), ("feed-forward", "neurons")):
            here = [(len(keep), s.units) for s, keep in zip(chosen, kept) if s.role == role]
            if here:
                report.note(f"{sum(n for n, _ in here)} of {sum(m for _, m in here)} {noun} stay")
        report.note(f"{100 * share:.0f} % of the multiplications at {tokens} tokens")
