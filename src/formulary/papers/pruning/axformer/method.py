"""AxFormer: parts of a fine-tuned model taken out one by one, wherever its loss on validation data falls without them.

    for layers l = L .. 1, feed-forward before attention:
        try without the whole part                 if loss < best and more than half of the items lose nothing: it stays out
        else, if loss < inspect * best:            the same for each of its neuron groups, or heads, one by one

with `best` the loss of the last model that was kept. Before that, for l = 1 .. L, selective hard attention: layer l
attends to the k keys with the largest scores of each query and head, softmax(top_k(q k' / sqrt(K))) v, wherever the
same test says so.

Source: arXiv:2010.03688 (v2), and the authors' code, from which order, test, k = 30, inspect = 1.1 and twelve groups of
neurons are; the loss is cross-entropy, since accuracy on few items moves in steps. Their code keeps the k largest
weights as they are; here, as in the paper, the softmax is over the k. Their code only masks; here what is out is gone,
so that time and size fall too.

In: a model with its task's head (classes or language), or an encoder or vision model without one, for which a logistic
readout of its features is fitted first and then left alone; labeled data (text alone for language models), of which
`validation` is for the losses. Out: the same model with smaller linears. Nothing is trained. With `tolerance` above 0,
in nats, a part goes if the loss stays below best + tolerance, where best is the lowest so far. What comes before the
block that trials change is computed once for all of them, and a trial of a piece ends when half of the items are worse
off: the same outcome in less time. An attention whose
query, key and value are one linear (GPT-2) and expert tensors stay, which the report says.

Raises UsageError for bad parameters, FormularyError where there are no labels.

>>> from formulary.lab import small
>>> model = small.tiny("gpt2")
>>> data = Data([{"input_ids": ids} for ids in small.inputs_for(model, batch=8)["input_ids"]])
>>> smaller, report = AxFormer(tolerance=1.0).apply(model, data)
>>> report.figures["blocks out"]
1.0
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from formulary.contracts import Attention, Data, Report, Transform, parts
from formulary.contracts.attention import ATTRIBUTE
from formulary.contracts.edits import Editor
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError, UsageError
from formulary.papers.pruning._parts import FewerHeads, Removed, SlicedLinear, Sublayer, runs, shrink, sublayers

from .losses import Losses

__all__ = ["AxFormer", "FewerHeads", "HardAttention", "Removed", "SlicedLinear"]


class HardAttention(Attention):
    """Attention to the `keep` keys with the largest scores of each query and head; the others get no weight.

    Among equal scores at the threshold all are kept. Single tokens are decoded the same way.

    >>> q, k, v = torch.randn(3, 1, 2, 50, 8)
    >>> HardAttention(keep=4).attend(q, k, v, causal=True).shape
    torch.Size([1, 2, 50, 8])
    """

    equals_sdpa: ClassVar[bool] = False

    def __init__(self, keep: int = 30):
        super().__init__()
        check_range("axformer", "keep", keep, 1, 1 << 31)
        self.keep = keep

    @classmethod
    def full_budget(cls) -> dict[str, int]:
        """Every key: scaled dot-product attention."""
        return {"keep": 1 << 31}

    def attend(
        self,
        query: Float[Tensor, "B H L K"],
        key: Float[Tensor, "B H S K"],
        value: Float[Tensor, "B H S V"],
        *,
        mask: Bool[Tensor, "#B #H L S"] | None = None,
        bias: Float[Tensor, "#B #H L S"] | None = None,
        scale: float | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "B H L V"]:
        scores = (query @ key.mT).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores if bias is None else scores + bias
        hidden = torch.zeros_like(scores, dtype=torch.bool) if mask is None else (~mask).expand_as(scores)
        if causal:
            hidden = hidden | torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
        if self.keep < scores.shape[-1]:
            least = scores.detach().topk(self.keep, -1).values[..., -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        nothing = hidden.all(-1, keepdim=True)
        weights = scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
        return weights.to(value.dtype) @ value


@dataclass
class Trial:
    """The loss of the best model so far, and the losses of all items before anything was changed."""

    losses: Losses
    base: Float[Tensor, "N"]
    best: float
    tolerance: float

    def passes(self, short: bool = False) -> tuple[bool, float]:
        """(whether the model as it is now is good enough to go on from, its loss). `short` ends a trial that has failed: the
        loss is then of the items seen.
        """
        seen, harmed = [], 0
        for losses in self.losses.by_batch():
            before = self.base[sum(map(len, seen)) :][: len(losses)]
            harmed += int((~(losses <= before + self.tolerance)).sum())
            seen.append(losses)
            if short and 2 * harmed >= len(self.base):
                break
        found = torch.cat(seen)
        loss = float(found.mean())
        good = loss < self.best + self.tolerance and 2 * harmed < len(self.base)
        self.best = min(self.best, loss) if good else self.best
        return good, loss


@dataclass(frozen=True, kw_only=True)
class AxFormer(Transform):
    """Take out what the task is better off without; see the module. `targets` and `ignore` choose by output projections.

    tolerance: nats that the loss may lie above the lowest so far. inspect: how many times the best a loss may be for the
    part to be tried in pieces. groups: pieces of a feed-forward. hard_attention: k, None leaves attention as it is.
    validation: the share of the data on which losses are measured where a readout is fitted on the rest; else it is all.
    items: of these at most; a trial is a pass over them, and there are some 700 trials in a model of 30 blocks.
    """

    tolerance: float = 0.0
    inspect: float = 1.1
    groups: int = 12
    hard_attention: int | None = 30
    validation: float = 0.5
    items: int | None = None

    supports: ClassVar[frozenset[str]] = frozenset({"decoder", "encoder", "vision"})
    needs_data: ClassVar[bool] = True
    unit: ClassVar[str] = "part"
    quick: ClassVar[dict[str, Any]] = {"tolerance": 1.0, "hard_attention": 4}

    def __post_init__(self):
        super().__post_init__()
        check_range("axformer", "tolerance", self.tolerance, 0, 1e6)
        check_range("axformer", "inspect", self.inspect, 1, 1e6)
        check_range("axformer", "groups", self.groups, 1, 1_000_000)
        check_range("axformer", "validation", self.validation, 0.01, 0.99)
        if self.items is not None:
            check_range("axformer", "items", self.items, 1, 1 << 31)
        if self.hard_attention is not None:
            check_range("axformer", "hard_attention", self.hard_attention, 1, 1 << 31)
        if not all(math.isfinite(value) for value in (self.tolerance, self.inspect, self.validation)):
            raise UsageError("axformer: tolerance, inspect and validation must be numbers")

    @torch.no_grad()
    def run(self, model: nn.Module, data: Data, edit: Editor, report: Report) -> None:
        model.eval()
        chosen, reasons = sublayers(model, self.targets, self.ignore)
        for name, reason in reasons.items():
            report.skipped(name, reason)
        losses = Losses(model, data, self.validation, report, self.items)
        base = losses()
        trial = Trial(losses, base, float(base.mean()), self.tolerance)
        hard: set[str] = set()
        if self.hard_attention is not None and self.hard_attention < losses.length:
            hard = self._harden(model, chosen, trial, edit, report)
        kept, previous = {}, {after.name: before for before, after in zip(parts.blocks(model), parts.blocks(model)[1:])}
        for block, group in groupby(reversed(chosen), lambda sublayer: sublayer.block):
            losses.start_after(previous.get(block.name))
            kept |= {sublayer.name: self._try(sublayer, trial, edit, report) for sublayer in group}
        losses.start_after(None)
        for sublayer in chosen:
            self._remove(sublayer, kept[sublayer.name], sublayer.name in hard, edit, report)
        self._tell(chosen, kept, report)
        report.figures["validation loss before and after, nats"] = [float(base.mean()), float(losses().mean())]

    def _harden(self, model, chosen: Sequence[Sublayer], trial: Trial, edit: Editor, report: Report) -> set[str]:
        """Hard attention in every layer whose trial passes, first layers first; which ones."""
        before, hard = model.config._attn_implementation, set()
        for sublayer in chosen:
            if (mixer := sublayer.mixer) is None:
                continue
            try:
                HardAttention.attach(model, mixer.name, keep=self.hard_attention)
            except FormularyError as error:
                report.note(f"no hard attention in {mixer.name}: {error}")
                continue
            try:
                passed, loss = trial.passes()
            finally:
                delattr(mixer.module, ATTRIBUTE)
            self._log(report, mixer.name, f"with {self.hard_attention} keys", loss, passed)
            if passed:
                edit.edit(mixer.name, HardAttention, keep=self.hard_attention)
                hard.add(sublayer.name)
        if not hard and model.config._attn_implementation != before:
            model.set_attn_implementation(before)
        if hard:
            report.note(f"{len(hard)} attentions see {self.hard_attention} keys only")
        return hard

    def _try(self, sublayer: Sublayer, trial: Trial, edit: Editor, report: Report) -> list[int] | None:
        """The units that stay, or None for none of the part, its bias included; what goes is masked from here on."""
        out = sublayer.out
        edit.keep(out.module)
        weight, bias = out.weight().clone(), None if out.bias is None else out.bias.detach().clone()

        def mask(gone: list[int]) -> None:
            masked = weight.clone()
            masked[:, runs(torch.tensor(gone, dtype=torch.long), sublayer.span)] = 0
            out.raw.data.copy_(out.stored(masked))
            if bias is not None:
                out.bias.data.copy_(bias if len(gone) < sublayer.units else torch.zeros_like(bias))

        mask(list(range(sublayer.units)))
        passed, loss = trial.passes()
        self._log(report, sublayer.name, "without the whole", loss, passed)
        if passed:
            return None
        gone: list[int] = []
        if loss < self.inspect * trial.best:
            pieces = sublayer.units if sublayer.role == "attention" else min(self.groups, sublayer.units)
            for piece in torch.arange(sublayer.units).tensor_split(pieces):
                if len(gone) + len(piece) == sublayer.units:
                    break
                mask(gone + piece.tolist())
                passed, loss = trial.passes(short=True)
                self._log(report, sublayer.name, f"without units {int(piece[0])} to {int(piece[-1])}", loss, passed)
                gone += piece.tolist() if passed else []
        mask(gone)
        return [unit for unit in range(sublayer.units) if unit not in set(gone)]

    @staticmethod
    def _log(report: Report, part: str, tried: str, loss: float, passed: bool) -> None:
        report.tables.setdefault("trials", []).append({"part": part, "tried": tried, "loss": loss, "kept so": passed})

    def _remove(self, sublayer: Sublayer, keep: list[int] | None, hard: bool, edit: Editor, report: Report) -> None:
        if keep is None:
            shrink(edit, sublayer, [], bias=False)
            report.changed(sublayer.name, sublayer.weights, f"{sublayer.role} out")
        elif len(keep) < sublayer.units:
            noun = "heads" if sublayer.role == "attention" else "neurons"
            report.changed(sublayer.name, sublayer.weights, f"{len(keep)} of {sublayer.units} {noun} stay")
            shrink(edit, sublayer, keep)
        elif hard:
            report.changed(sublayer.name, sublayer.weights, f"attends to {self.hard_attention} keys")
        else:
            report.skipped(sublayer.name, "the loss is no better without any of it", sublayer.weights)

    def _tell(self, chosen: Sequence[Sublayer], kept: dict[str, list[int] | None], report: Report) -> None:
        out = sum(units is None for units in kept.values())
        report.figures["blocks out"] = out / max(1, len(chosen))
        report.note(f"{out} of {len(chosen)} attentions and feed-forwards are out as a whole")
        report.tables["units kept"] = [
            {"layer": s.block.name, "part": s.role, "kept": len(kept[s.name] or ()), "of": s.units} for s in chosen
        ]
