"""MatFormer: one training run whose feed-forwards contain smaller ones as their first neurons, so that smaller models
can be cut out.

With widths m_1 < ... < m_g = d_ff, the i-th nested feed-forward is

    FFN_i(x) = act(x W1[:m_i]^T) W2[:, :m_i]^T        (gate and up cut alike where it is gated; biases follow)

Attention, norms and embeddings are shared and whole. Each step draws one i for the whole batch and all layers and
takes a step on the ordinary loss. Afterwards any trained width can be chosen for each layer (Mix'n'Match) without
further training; widths that do not fall with depth and differ by one size only ("gentle slope") do best. A sub-model
is slices of the weights.

Source: arXiv:2310.07707, sections 3.1 to 3.3. The paper trains from scratch; here training starts from the model
given, whose first neurons are no better than the others, so few steps will not do for narrow widths.

In: a model whose feed-forwards are two or three linears, and data to train on. The loss is the model's own where the
data has labels, that of the next token for a causal language model; any other model learns to repeat its own outputs,
of all its neurons, before training (the report says which). Out: the model trained and cut in place to `keep`,
smaller and faster, saved as formulary edits, since a config has no widths per layer.

Raises UsageError for bad parameters, FormularyError when no feed-forward can be told apart (experts), or for an
encoder-decoder without labels.

>>> from formulary.lab import inputs_for, tiny
>>> model = tiny("llama")
>>> data = Data([{"input_ids": ids} for ids in inputs_for(model, batch=8)["input_ids"]])
>>> model, report = MatFormer(steps=2, keep=(0.25, 0.5)).apply(model, data)
>>> [layer.mlp.down_proj for layer in model.model.layers]
[SlicedLinear(in_features=16, out_features=32, bias=False), SlicedLinear(in_features=32, out_features=32, bias=False)]
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from formulary.contracts import Data, Report, Transform, parts
from formulary.contracts.edits import Editor
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError, UsageError

from .._parts import SlicedLinear, Sublayer, shrink, sublayers
from ._nested import nested, neurons

__all__ = ["MatFormer", "SlicedLinear", "mix", "nested", "train_nested"]

Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]


def mix(share: float, granularities: Sequence[float], layers: int) -> tuple[float, ...]:
    """One trained share a layer, rising with depth between the two around `share`, their mean as near to it as it can
    be.

    >>> mix(0.4, (0.125, 0.25, 0.5, 1.0), 5)
    (0.25, 0.25, 0.5, 0.5, 0.5)
    """
    below = max((one for one in granularities if one <= share), default=min(granularities))
    above = min((one for one in granularities if one >= share), default=max(granularities))
    wide = round(layers * (share - below) / (above - below)) if above > below else 0
    return (below,) * (layers - wide) + (above,) * wide


def train_nested(
    model: nn.Module,
    data: Data,
    found: Sequence[Sublayer],
    granularities: Sequence[float],
    probabilities: Sequence[float],
    *,
    steps: int,
    learning_rate: float,
    loss: Loss,
) -> list[float]:
    """Train `model` in place, one granularity a step; the loss of each step. The draws follow `data.seed`."""
    from formulary.lab import train

    weights = torch.tensor(probabilities, dtype=torch.double)
    with nested(found) as narrow:

        def one_width(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            narrow([granularities[int(torch.multinomial(weights, 1))]] * len(found))
            return loss(model, batch)

        return train(model, data, steps=steps, lr=learning_rate, loss=one_width, seed=data.seed).losses


# ---------------------------------------------------------------- what is trained on


def loss_for(model: nn.Module, data: Data) -> tuple[Loss, str]:
    """The loss for this model and data, and what it is in words."""
    if "labels" in data.items[0] and "labels" in inspect.signature(model.forward).parameters:
        return lambda model, batch: model(**batch).loss, "the model's own loss on the data's labels"
    if model.config.is_encoder_decoder:
        raise FormularyError("matformer trains an encoder-decoder on pairs: give data with source and target")
    if parts.kind(model) == "decoder":
        return _next_token, "the loss of the next token"
    whole = copy.deepcopy(model).eval().requires_grad_(False)

    def repeat(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        batch = {key: value for key, value in batch.items() if key != "labels"}
        with torch.no_grad():
            wanted = _main(whole(**batch))
        error, mask = (_main(model(**batch)) - wanted).square(), batch.get("attention_mask")
        if mask is not None and mask.shape == error.shape[:2]:
            error, wanted = error[mask.bool()], wanted[mask.bool()]
        return error.mean() / wanted.square().mean()

    return repeat, "the squared error from its own outputs before, over their square, since it has no loss on this data"


def _next_token(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    mask = batch.get("attention_mask")
    labels = batch["input_ids"] if mask is None else batch["input_ids"].masked_fill(mask == 0, -100)
    return model(**batch, labels=labels).loss


def _main(output) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        if name in output:
            return output[name]
    raise FormularyError(
        "matformer has nothing to train on: the data has no labels, and the model gives no logits or states"
    )


@contextmanager
def _float32(model: nn.Module, edit: Editor) -> Iterator[None]:
    """Weights in float32 while it lasts, since half precision loses small steps; their own dtype afterwards, on
    failure too.
    """
    dtypes = [(parameter, parameter.dtype) for parameter in model.parameters()]

    def back() -> None:
        for parameter, dtype in dtypes:
            parameter.data = parameter.data.to(dtype)

    edit.on_failure(back)
    for parameter, _ in dtypes:
        parameter.data = parameter.data.float()
    yield
    back()


def _as_float32(loss: Loss) -> Loss:
    def on_float32(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return loss(model, {key: value.float() if value.is_floating_point() else value for key, value in batch.items()})

    return on_float32


def _weights_of_one(sublayer: Sublayer) -> int:
    """Weights and biases of one neuron."""
    return sublayer.unit_weights + sum(part.bias is not None for part in sublayer.into)


# ---------------------------------------------------------------- the transform


@dataclass(frozen=True, kw_only=True)
class MatFormer(Transform):
    """Train with nested feed-forwards, then cut the model to `keep`.

    granularities: the trained widths as shares of each feed-forward, rising to 1. probabilities: how often each is
    drawn; equally often by default. keep: what to cut out, a trained share for each feed-forward from front to back,
    or one share of all, for which trained ones that rise with depth are mixed. steps, learning_rate: of AdamW with a
    cosine schedule. `targets` and `ignore` choose feed-forwards by their output projections.
    """

    granularities: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    probabilities: tuple[float, ...] = ()
    keep: tuple[float, ...] = (0.5,)
    steps: int = 200
    learning_rate: float = 1e-3

    needs_data = True
    trains = True
    unit = "feed-forward"
    quick: ClassVar[dict[str, Any]] = {"steps": 3}

    def __post_init__(self):
        super().__post_init__()
        for name in ("granularities", "probabilities", "keep"):
            value = getattr(self, name)
            object.__setattr__(self, name, (float(value),) if isinstance(value, int | float) else tuple(value))
        shares = self.granularities
        if not shares or list(shares) != sorted(set(shares)) or shares[-1] != 1 or shares[0] <= 0:
            raise UsageError(f"matformer: granularities must be shares that rise from above 0 to 1, got {shares}")
        odds = self.probabilities
        if odds and (len(odds) != len(shares) or min(odds) < 0 or not 0 < sum(odds) < math.inf):
            raise UsageError(
                f"matformer: probabilities must be one number of at least 0 for each granularity, got {odds}"
            )
        if not self.keep or any(not 0 < share <= 1 for share in self.keep):
            raise UsageError(f"matformer: keep must be shares above 0 and at most 1, got {self.keep}")
        if len(self.keep) == 1 and self.keep[0] < shares[0]:
            raise UsageError(f"matformer: keep={self.keep[0]} is below the smallest granularity, {shares[0]}")
        if len(self.keep) > 1 and not set(self.keep) <= set(shares):
            raise UsageError(
                f"matformer: keep {self.keep} names a share that is not trained; granularities are {shares}"
            )
        check_range("matformer", "steps", self.steps, 1, 10_000_000)
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"matformer: learning_rate must be above 0, got {self.learning_rate}")

    def run(self, model: nn.Module, data: Data, edit: Editor, report: Report) -> None:
        found = self._feed_forwards(model, report)
        if not found:
            return
        shares = mix(self.keep[0], self.granularities, len(found)) if len(self.keep) == 1 else self.keep
        if len(shares) != len(found):
            raise UsageError(f"matformer: keep has {len(shares)} shares, but there are {len(found)} feed-forwards")
        edit.keep(model)
        with _float32(model, edit):
            loss, words = loss_for(model, data)
            loss, before = _as_float32(loss), parts.count_weights(model)
            model.requires_grad_(True)
            losses = train_nested(
                model, data, found, self.granularities, self.probabilities or (1.0,) * len(self.granularities),
                steps=self.steps, learning_rate=self.learning_rate, loss=loss,
            )  # fmt: skip
            self._measure(model, data, found, shares, loss, report)
        for sublayer, share in zip(found, shares):
            width = neurons(sublayer, share)
            report.changed(sublayer.name, sublayer.weights, f"{width} of {sublayer.units} neurons")
            if width < sublayer.units:
                shrink(edit, sublayer, range(width))
        report.note(
            f"trained on {words}: {losses[0]:.3g} to {sum(losses[-8:]) / len(losses[-8:]):.3g} over {self.steps} steps"
        )
        report.note(f"kept {', '.join(f'{share:g}' for share in shares)} of the neurons, front to back")
        report.note(f"{parts.count_weights(model):,} of {before:,} weights left")

    def _feed_forwards(self, model: nn.Module, report: Report) -> list[Sublayer]:
        chosen, reasons = sublayers(model, self.targets, self.ignore)
        for name, reason in reasons.items():
            if name.endswith("feed-forward"):
                report.skipped(name, reason)
        return [sublayer for sublayer in chosen if sublayer.role == "feed-forward"]

    def _measure(
        self, model: nn.Module, data: Data, found, shares: Sequence[float], loss: Loss, report: Report
    ) -> None:
        """The loss of every granularity and of what is kept, on up to four batches of the training data."""
        model.eval()
        device, rows = next(model.parameters()).device, []
        with nested(found) as narrow, torch.no_grad():
            for name, each in [
                *((f"{g:g} everywhere", (g,) * len(found)) for g in self.granularities),
                ("kept", tuple(shares)),
            ]:
                narrow(each)
                of = [
                    loss(model, {k: v.to(device) for k, v in data.sample(i).items()}) for i in range(min(4, self.steps))
                ]
                gone = sum((s.units - neurons(s, share)) * _weights_of_one(s) for s, share in zip(found, each))
                row = {"weights": parts.count_weights(model) - gone, "training loss": float(sum(of)) / len(of)}
                rows.append({"neurons": name, **row})
        report.tables["nested models"] = rows
