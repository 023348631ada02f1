"""Teacher Intervention speeds up training to ternary weights: at first, the student computes on with the teacher's
attention instead of its own, so that one layer's error does not reach the next.

Of each layer l, with P the attention map, V the values and O = (P V) W_o, in the first `intervention_steps` steps (N):

    step < N/6:  O^T in place of O,      step < N/3:  (P V)^T in place of P V,      then:  P^T in place of P,

and no gradient flows from queries and keys into what they are made of. The loss, then as ever, with scores S:

    L = CE(logits, logits^T) + sum_l [ MSE(S_l, S_l^T) + MSE(H_l, H_l^T) + MSE(A_l, A_l^T) ],

H the hidden states (the embeddings too), A what comes out of the attention block; no labels. Weights are ternary (TWN,
arXiv:1605.04711): a sign(w) where |w| > 0.7 mean |w|, else 0, a the mean |w| of the first; activations (what flows into
linears, queries, keys, values, probabilities) are clipped to 2.5 and on 8 bits; rounding passes gradients through.

Source: arXiv:2302.11812, sections 3 and 4, and the released code: one a for each linear, one for each row of the token
table; the three stages; a new optimizer and learning-rate schedule when intervention ends. The paper intervenes for 60
steps (120 with four layers) of three epochs at a rate of 2e-5. Ours: each token has its own activation scale, where the
code has one a tensor, in which padding would count; padding is left out of losses; no dropout; poolers stay as they
are; A is read where the feed-forward's first linear does, behind the norm in pre-norm blocks.

In: an encoder or a vision Transformer of transformers, and data. Raises UsageError for parameters out of range.

>>> from formulary.lab import inputs_for, tiny
>>> from formulary.contracts import Data
>>> data = Data([{"input_ids": ids} for ids in inputs_for(tiny("bert"), batch=8)["input_ids"]])
>>> model, report = TeacherIntervention(steps=4, intervention_steps=2).apply(tiny("bert"), data)
>>> report.headline
'teacher-intervention-qat on 13 parts, 83 % of the weights'
"""

from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formulary.contracts import Data, Report, parts
from formulary.contracts.edits import Editor
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError, UsageError

from .._tables import replace_table
from .._training import (
    Inputs,
    LowBit,
    LowBitLinear,
    QuantizationAwareTraining,
    block_outputs,
    kept,
    real_positions,
)
from ..tbt_binary_ternary.method import TBTEmbedding
from .attention import ClippedAttention, Tape, attentions, clipped, find_places, taped

WEIGHT_CLIP, BEYOND, WARMUP, WEIGHT_DECAY = 2.5, 0.7, 0.1, 0.01


def ternary(
    w: Float[Tensor, "*rows columns"], by_row: bool
) -> tuple[Float[Tensor, "*rows columns"], Float[Tensor, "*#rows 1"]]:
    """TWN's (levels, scale), with one scale a row or one in all; the gradient to w of their product is the identity.

    >>> ternary(torch.tensor([[0.3, -0.1, 0.9, -0.5]]), by_row=False)
    (tensor([[ 0.,  0.,  1., -1.]]), tensor([[0.7000]]))
    """
    w = w.clamp(-WEIGHT_CLIP, WEIGHT_CLIP)
    size = w.detach().abs()
    over = (-1,) if by_row else tuple(range(w.ndim))
    beyond = size > BEYOND * size.mean(over, keepdim=True)
    scale = ((size * beyond).sum(over, keepdim=True) / beyond.sum(over, keepdim=True).clamp(min=1)).clamp(min=1e-8)
    ratio = w / scale
    return w.detach().sign() * beyond + (ratio - ratio.detach()), scale


class TernaryLinear(LowBitLinear):
    """A linear map of ternary weights with one scale; its input is clipped to `clip` and on 8 bits."""

    def __init__(self, in_features: int, out_features: int, clip: float = 2.5, bias: bool = False):
        super().__init__(in_features, out_features, 2, bias)
        self.clip = clip

    def incoming(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        return clipped(x, self.clip)

    def low_bit(self, latent):
        return ternary(latent, by_row=False)


class TernaryEmbedding(TBTEmbedding):
    """A table of ternary rows, each with its own scale: indices to rows."""

    def low_bit(self, latent):
        return ternary(latent, by_row=True)


@dataclass(frozen=True, kw_only=True)
class TeacherIntervention(QuantizationAwareTraining):
    """Linears inside the blocks and the token table at 2 bits, attention and activations at 8.

    steps: of training. intervention_steps: how many of them, the first, are with intervention (0: none, which is
    TernaryBERT's training). learning_rate: the highest, in both parts. clip: of activations. embeddings: the token table
    too, where no head shares it. With `targets`, attention and the table stay and there is no intervention.
    """

    steps: int = 60
    intervention_steps: int = 20
    clip: float = 2.5
    embeddings: bool = True

    supports = frozenset({"encoder", "vision"})
    unit = "part"
    quick: ClassVar[dict[str, Any]] = {"steps": 4, "intervention_steps": 3}

    def __post_init__(self):
        super().__post_init__()
        check_range(self.slug, "clip", self.clip, 1e-3, 1e6)
        if not 0 <= self.intervention_steps <= self.steps:
            raise UsageError(
                f"{self.slug}: intervention_steps must be between 0 and steps={self.steps}, got {self.intervention_steps}"
            )

    def layer(self, part: parts.Linear, inputs: Inputs) -> tuple[type[LowBitLinear], dict[str, Any]]:
        return TernaryLinear, {"clip": self.clip}

    def prepare(self, model: nn.Module, teacher: nn.Module, data: Data, edit: Editor, report: Report) -> list[LowBit]:
        if self.targets:
            report.note("no intervention: only targets are changed")
            return []
        for mixer in parts.mixers(teacher):
            try:
                ClippedAttention.attach(teacher, mixer.name, clip=None)
            except FormularyError as error:
                report.note(f"no intervention, attention in floating point: {error}")
                continue
            edit.edit(mixer.name, ClippedAttention, clip=self.clip)
        return replace_table(model, TernaryEmbedding, self.ignore, edit, report, bits=2) if self.embeddings else []

    def train(
        self, model: nn.Module, teacher: nn.Module, data: Data, layers: list[LowBit], report: Report
    ) -> list[float]:
        from formulary.lab import train

        device = next(model.parameters()).device
        batch = floats({key: value.to(device) for key, value in data.collate(data.items[:1]).items()})
        places = find_places(teacher, batch)
        report.figures["attentions intervened in"] = len(attentions(teacher)) if self.intervention_steps else 0
        losses, taken = [], 0
        with taped(teacher, places) as theirs, taped(model, places, theirs) as ours:

            def objective(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
                model.eval()
                nonlocal taken
                ours.splice, taken = stage(taken, self.intervention_steps), taken + 1
                return imitation(model, teacher, ours, theirs, floats(batch))

            for first, last in ((0, self.intervention_steps), (self.intervention_steps, self.steps)):
                if first < last:
                    losses += train(
                        model,
                        lambda i, first=first: data.sample(first + i),
                        steps=last - first,
                        lr=self.learning_rate,
                        loss=objective,
                        schedule="linear",
                        warmup=round(WARMUP * (last - first)),
                        weight_decay=WEIGHT_DECAY,
                        seed=data.seed,
                    ).losses
        return losses


def stage(step: int, intervention_steps: int) -> str | None:
    """What is the teacher's in this step, counted from 0.

    >>> [stage(step, 6) for step in range(7)]
    ['output', 'context', 'map', 'map', 'map', 'map', None]
    """
    if step >= intervention_steps:
        return None
    return "output" if step < intervention_steps / 6 else "context" if step < intervention_steps / 3 else "map"


def floats(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch in float32, without labels."""
    wide = lambda value: value.float() if value.is_floating_point() else value
    return {key: wide(value) for key, value in batch.items() if key != "labels"}


def imitation(model: nn.Module, teacher: nn.Module, ours: Tape, theirs: Tape, batch: dict[str, Tensor]) -> Tensor:
    """The loss L of both models on a batch, padding left out; CE is given less the entropy of the teacher's logits."""
    ours.clear(), theirs.clear()
    with block_outputs(teacher) as wanted, torch.no_grad():
        target = teacher(**batch)
    with block_outputs(model) as made:
        out = model(**batch)
    real = real_positions(model, batch, False)
    pairs = [((a, b) for (_, a), (_, b) in zip(made, wanted, strict=True))]
    pairs += [zip(ours.entered, theirs.entered, strict=True), zip(ours.attended, theirs.attended, strict=True)]
    loss = sum(F.mse_loss(kept(a, real), kept(b, real)) for a, b in chain(*pairs))
    for a, b in zip(ours.calls, theirs.calls, strict=True):
        distance, counts = (a.scores - b.scores).square(), torch.ones_like(a.scores) if b.real is None else b.real
        loss = loss + (distance * counts).sum() / counts.expand_as(distance).sum().clamp(min=1)
    if "logits" in out:
        a, b = kept(out["logits"], real), kept(target["logits"], real)
        if a.shape[-1] == 1:
            return loss + F.mse_loss(a, b)
        loss = loss + F.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="batchmean")
    return loss
