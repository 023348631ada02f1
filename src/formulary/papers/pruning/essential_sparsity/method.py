"""Essential sparsity: the share of a checkpoint's smallest weights zeroed at once, before fine-tuning, for free.

    m_s = 1[|w| > t_s],  t_s the s-quantile of |w| over all linear weights of theta_pre
    theta_s = fine-tune(m_s * theta_pre) with m_s fixed
    s* = the largest s up to which every level keeps  A(theta_s) >= (1 - tolerance) A(theta_0)

Source: arXiv:2306.03805, abstract; the ranking is that of the authors' code, over all linears of the blocks together,
embeddings and head left out. With `pattern` "N:M" the N largest of every M neighboring inputs stay instead.

In: any model; data to find s* or to fine-tune. Out: the same model with zeros in its dense weights, so it is no smaller
on disk and no faster without a sparse kernel. A is the accuracy where the data has a label per item, exp(-nats per
token) for language models (1 / perplexity), else the mean cosine with the dense outputs at real tokens.

Raises UsageError for bad or contradictory parameters, FormularyError without data or when no level is within tolerance.

>>> from formulary.lab import small
>>> model, report = EssentialSparsity(sparsity=0.3).apply(small.tiny("bert"))
>>> report.notes
['30 % of the 16384 weights in them are zero; they are stored dense, so nothing is smaller or faster']
"""

import copy
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from formulary.contracts import Data, Report, Transform, parts
from formulary.contracts.edits import Editor
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError, UsageError

Masks = list[Bool[Tensor, "..."]]  # per linear, in the layout that the model stores: True at weights that stay


def magnitude_masks(linears: Sequence[parts.Linear], levels: Sequence[float]) -> Iterator[Masks]:
    """For each level in turn, the masks that drop exactly that share of the smallest |w| of all linears together.

    Of equal weights, those that come first are dropped.
    """
    magnitudes = [_magnitude(part) for part in linears]
    ranked = torch.cat([values.flatten() for values in magnitudes]).cpu().numpy()
    counts = [round(level * ranked.size) for level in levels]
    ranked.partition([max(0, count - 1) for count in counts])
    thresholds = [float(ranked[max(0, count - 1)]) for count in counts]
    del ranked
    for count, threshold in zip(counts, thresholds):
        ties = count - sum(int((values < threshold).sum()) for values in magnitudes)
        masks = []
        for values in magnitudes:
            keep = (values >= threshold).flatten()
            equal = (values == threshold).flatten().nonzero().squeeze(1)[: max(0, ties)]
            keep[equal] = False
            ties -= len(equal)
            masks.append(keep.view(values.shape))
        yield masks


def group_masks(linears: Sequence[parts.Linear], keep: int, group: int) -> Masks:
    """Masks that keep the `keep` largest |w| of every `group` neighboring inputs; of equal ones, the first."""
    masks = []
    for part in linears:
        groups = _magnitude(part).mT if part.transposed else _magnitude(part)
        groups = groups.unflatten(-1, (-1, group))
        order = groups.argsort(dim=-1, descending=True, stable=True)
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :keep], True).flatten(-2)
        masks.append((mask.mT if part.transposed else mask).contiguous())
    return masks


def mask_cosine(a: Masks, b: Masks) -> float:
    """The cosine between two sets of masks, each one vector of zeros and ones: 1 when they keep the same weights."""
    both = sum(int((x & y).sum()) for x, y in zip(a, b))
    return both / math.sqrt(sum(int(x.sum()) for x in a) * sum(int(y.sum()) for y in b))


def share_below(model: nn.Module, threshold: float) -> float:
    """The share of linear weights with |w| < `threshold`; its jump in pre-training is the abrupt sparsification."""
    linears = parts.linears(model)
    small = sum(int((part.raw.detach().abs() < threshold).sum()) for part in linears)
    return small / sum(part.weights for part in linears)


@torch.no_grad()
def zero(linears: Sequence[parts.Linear], masks: Masks) -> None:
    """Set what the masks drop to zero."""
    for part, mask in zip(linears, masks):
        part.raw.mul_(mask)


@contextmanager
def fixed(linears: Sequence[parts.Linear], masks: Masks) -> Iterator[None]:
    """While it lasts, training leaves dropped weights at zero: they have no gradient, in the clipped norm either."""
    trained = [(part.raw, mask) for part, mask in zip(linears, masks) if part.raw.requires_grad]
    handles = [raw.register_hook(lambda grad, mask=mask: grad * mask) for raw, mask in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class EssentialSparsity(Transform):
    """Zero the smallest weights at once, as many as the checkpoint gives for free, or as many as asked.

    sparsity: the share to zero; None looks for the essential sparsity among `levels`, which needs data.
    pattern: "N:M" keeps N of every M neighboring inputs; sparsity must then be None. tolerance: the relative drop of
    performance that counts as free. steps: of fine-tuning with the mask fixed (AdamW at `learning_rate`) after zeroing,
    at each level and for the dense model alike; the search then measures on a quarter of the data that is held out.
    """

    sparsity: float | None = None
    pattern: str | None = None
    levels: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    tolerance: float = 0.01
    steps: int = 0
    learning_rate: float = 2e-5

    quick: ClassVar[dict] = {"levels": (0.1, 0.3), "tolerance": 0.9, "steps": 1}

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "levels", tuple(self.levels))
        if self.pattern is not None and self.sparsity is not None:
            raise UsageError("essential-sparsity: pattern fixes the sparsity; give one of the two")
        if self.pattern is not None:
            self._group()
        if self.sparsity is not None:
            check_range("essential-sparsity", "sparsity", self.sparsity, 0.001, 0.999)
        for level in self.levels:
            check_range("essential-sparsity", "levels", level, 0.001, 0.999)
        if not self.levels or list(self.levels) != sorted(set(self.levels)):
            raise UsageError(f"essential-sparsity: levels must rise from one to the next, got {self.levels}")
        check_range("essential-sparsity", "tolerance", self.tolerance, 0.0, 1.0)
        check_range("essential-sparsity", "steps", self.steps, 0, 10_000_000)
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"essential-sparsity: learning_rate must be above 0, got {self.learning_rate}")

    def _group(self) -> tuple[int, int]:
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        if not found or not 0 < int(found[1]) < int(found[2]) <= 1024:
            raise UsageError(f"essential-sparsity: pattern is N:M, 0 < N < M <= 1024, as 2:4; got {self.pattern!r}")
        return int(found[1]), int(found[2])

    @property
    def needs_data(self) -> bool:
        """The search and fine-tuning need data; zeroing a given share does not."""
        return self.steps > 0 or (self.sparsity is None and self.pattern is None)

    def run(self, model: nn.Module, data: Data | None, edit: Editor, report: Report) -> None:
        linears = self._linears(model, report)
        if not linears:
            return
        searches, sparsity = self.sparsity is None and self.pattern is None, self.sparsity
        judge = Judge(model, data, self.steps, self.learning_rate, searches) if self.needs_data else None
        if searches:
            sparsity = self._search(model, linears, judge, edit, report)
        masks = group_masks(linears, *self._group()) if self.pattern else next(magnitude_masks(linears, [sparsity]))
        for part, mask in zip(linears, masks):
            edit.set(part.raw, part.raw.detach() * mask)
            report.changed(part.name, part.weights, f"{_percent(1 - float(mask.float().mean()))} zero")
        if self.steps:
            edit.keep(model)
            log = judge.tune(linears, masks)
            losses = f"loss {log.losses[0]:.3g} to {log.final:.3g}"
            report.note(f"fine-tuned for {self.steps} steps with the mask fixed, {losses}")
        total, dropped = sum(part.weights for part in linears), sum(int((part.raw == 0).sum()) for part in linears)
        where = "in them are zero; they are stored dense, so nothing is smaller or faster"
        report.note(f"{_percent(dropped / total)} of the {total} weights {where}")

    def _linears(self, model: nn.Module, report: Report) -> list[parts.Linear]:
        chosen = parts.linears(model, self.targets, self.ignore)
        if self.pattern is None:
            return chosen
        fit = []
        for part in chosen:
            if part.in_features % self._group()[1]:
                report.skipped(part.name, f"inputs are no multiple of {self._group()[1]}", part.weights)
            else:
                fit.append(part)
        return fit

    def _search(
        self, model: nn.Module, linears: list[parts.Linear], judge: "Judge", edit: Editor, report: Report
    ) -> float:
        """The last level up to which every one is within tolerance; the model is as before afterwards."""
        touched = [*model.parameters(), *model.buffers()] if self.steps else [part.raw for part in linears]
        start = [tensor.detach().clone() for tensor in touched]

        def restore():
            for tensor, value in zip(touched, start):
                tensor.data.copy_(value)

        edit.on_failure(restore)
        dense = judge.score(linears, [torch.ones_like(part.raw, dtype=torch.bool) for part in linears])
        restore()
        curve = [(0.0, dense, 0.0)]
        for level, masks in zip(self.levels, magnitude_masks(linears, self.levels)):
            zero(linears, masks)
            reached = judge.score(linears, masks)
            curve.append((level, reached, (dense - reached) / max(dense, 1e-12)))
            restore()
        report.tables["performance by sparsity"] = [
            {"sparsity": level, judge.measure: value, "relative drop": drop} for level, value, drop in curve
        ]
        beyond = next((i for i, point in enumerate(curve) if point[2] > self.tolerance), len(curve))
        if beyond == 1:
            first, cost, free = _percent(curve[1][0]), _percent(curve[1][2]), _percent(self.tolerance)
            raise FormularyError(
                f"essential-sparsity: {first} of the weights already cost {cost} of the {judge.measure}, over {free}: "
                "raise tolerance, add smaller levels, or set sparsity"
            )
        level, _, drop = curve[beyond - 1]
        report.figures["essential sparsity"] = level
        next_level = [f"{_percent(point[2])} at {_percent(point[0])}" for point in curve[beyond : beyond + 1]]
        then = ", " + "".join(next_level or ["the last level that was tried"])
        report.note(f"essential sparsity {_percent(level)}: the {judge.measure} falls by {_percent(drop)} there{then}")
        return level


class Judge:
    """Measures performance (`measure`; higher is better); with `search`, three quarters of the data only train."""

    def __init__(self, model: nn.Module, data: Data, steps: int, learning_rate: float, search: bool):
        self.model, self.steps, self.learning_rate = model.eval(), steps, learning_rate
        self.train, self.held_out = data.split() if steps and search else (data, data)
        with torch.no_grad():
            batch = next(data.batches())
            logits = model(**batch).get("logits")
        causal = parts.kind(model) == "decoder"
        if logits is not None and logits.ndim == 2 and "labels" in batch:
            self.measure = "accuracy"
        elif logits is not None and (causal or (parts.kind(model) == "encoder-decoder" and "labels" in batch)):
            self.measure = "probability per token"
        else:
            self.measure = "cosine with the dense outputs"
            self.teacher = copy.deepcopy(model).eval() if steps else None
            self.wanted = [_real_rows(model, b) for b in self.held_out.batches()]

    def score(self, linears: Sequence[parts.Linear], masks: Masks) -> float:
        """Performance after fine-tuning with these masks."""
        from formulary.lab.metrics import sequence_loss

        if self.steps:
            self.tune(linears, masks)
        if self.measure == "probability per token":
            return 1 / sequence_loss(self.model, self.held_out.batches()).perplexity
        if self.measure == "accuracy":
            with torch.no_grad():
                right = [self.model(**b)["logits"].argmax(-1) == b["labels"] for b in self.held_out.batches()]
            return float(torch.cat(right).float().mean())
        ours = torch.cat([_real_rows(self.model, batch) for batch in self.held_out.batches()])
        return float(nn.functional.cosine_similarity(ours, torch.cat(self.wanted)).mean())

    def tune(self, linears: Sequence[parts.Linear], masks: Masks):
        """Fine-tune all weights that the masks keep; returns the log."""
        from formulary.lab import train

        with fixed(linears, masks):
            settings = {"steps": self.steps, "lr": self.learning_rate, "seed": self.train.seed}
            return train(self.model, self.train, loss=self._loss, **settings)

    def _loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if self.measure == "cosine with the dense outputs":
            with torch.no_grad():
                wanted = _real_rows(self.teacher, batch)
            return (_real_rows(model, batch) - wanted).square().mean() / wanted.square().mean()
        if "labels" not in batch:
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            batch = {**batch, "labels": batch["input_ids"].masked_fill(real == 0, -100)}
        return model(**batch)["loss"]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _magnitude(part: parts.Linear) -> Tensor:
    """|w| as stored, float32 at least."""
    return part.raw.detach().abs().to(torch.promote_types(part.raw.dtype, torch.float32)).contiguous()


def _real_rows(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(rows, width) of the model's main output in float32, padding left out."""
    with torch.set_grad_enabled(model.training):
        out = model(**batch)
    rows = (out["logits"] if "logits" in out else out["last_hidden_state"]).float()
    mask = batch.get("decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask")
    if mask is not None and mask.shape == rows.shape[:2]:
        return rows[mask.bool()]
    return rows.flatten(0, -2)
