"""What training at 1 or 2 bits shares: weights that are trained as floats behind a quantizer and stored as packed
codes, and the distillation of a quantized model from the model that it was.

Notable here: while it is trained a layer holds `latent`, a float32 parameter, and multiplies by `scale * levels` of
it, both differentiable; `finish` stores the levels as codes of `bits` bits and drops the latent. No dropout while
distilling: the target is the teacher's own output. Models in half precision are trained in float32 and given back as
they came.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from formulary.contracts import Data, Replacement, Report, Transform, parts
from formulary.contracts.edits import Editor
from formulary.contracts.transform import check_range, in_float32
from formulary.errors import UsageError

from ._parts import MIN_FEATURES, pack, unpack

CALIBRATION_BATCHES = 8
VALUES = 1 << 16
"""Numbers kept of each linear's calibration inputs, taken at equal distances."""


def signs(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """1 where x >= 0, else -1: a bit has no zero.

    >>> signs(torch.tensor([-2.0, 0.0, 3.0]))
    tensor([-1.,  1.,  1.])
    """
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


# ---------------------------------------------------------------- layers


class LowBit(Replacement):
    """`rows` x `columns` weights of `bits` bits, 1 (levels -1 and 1) or 2 (-1, 0 and 1), with one scale a row.

    A subclass implements `low_bit`.
    """

    slow_because = "low-bit weights are expanded to floating point before each product"

    def __init__(self, rows: int, columns: int, bits: int):
        super().__init__()
        if rows < 1 or columns < 1:
            raise UsageError(f"sizes of low-bit weights must be positive, got {rows} and {columns}")
        if bits not in (1, 2):
            raise UsageError(f"low-bit weights have 1 or 2 bits, got {bits}")
        self.rows, self.columns, self.bits = rows, columns, bits
        self.register_buffer("codes", torch.zeros(rows, -(-columns // 8) * bits, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(rows, 1))
        self.register_parameter("latent", None)

    def low_bit(
        self, latent: Float[Tensor, "*rows columns"]
    ) -> tuple[Float[Tensor, "*rows columns"], Float[Tensor, "*#rows 1"]]:
        """(levels, scale) of latent weights, differentiable: the weight is their product."""
        raise NotImplementedError

    def start(self, weight: Float[Tensor, "rows columns"]) -> None:
        """Begin to train from `weight`."""
        self.latent = nn.Parameter(weight.detach().float().clone())

    @torch.no_grad()
    def finish(self) -> None:
        """Store the levels of the latent weight as codes, and drop it."""
        levels, scale = self.low_bit(self.latent)
        codes = (levels.round() + 1) / (2 if self.bits == 1 else 1)
        self.codes.copy_(pack(F.pad(codes.to(torch.uint8), (0, -self.columns % 8)), self.bits))
        self.scale.copy_(scale)
        self.latent = None

    def dense(self, at: Tensor | None = None) -> Float[Tensor, "*some columns"]:
        """The weights of all rows, or of some."""
        if self.latent is not None:
            levels, scale = self.low_bit(self.latent if at is None else F.embedding(at, self.latent))
            return scale * levels
        codes, scale = (self.codes, self.scale) if at is None else (self.codes[at], self.scale[at])
        levels = unpack(codes, self.bits)[..., : self.columns].to(scale.dtype)
        return scale * (levels * (2 if self.bits == 1 else 1) - 1)

    @property
    def weight(self) -> Float[Tensor, "rows columns"]:
        """All of them, (rows, columns)."""
        return self.dense()

    @property
    def stored_bytes(self) -> int:
        """Of codes and scales."""
        return self.codes.numel() + self.scale.numel() * self.scale.element_size()


class LowBitLinear(LowBit):
    """A linear map of low-bit weights, (..., in_features) to (..., out_features); `incoming` may quantize its input."""

    def __init__(self, in_features: int, out_features: int, bits: int, bias: bool = False):
        super().__init__(out_features, in_features, bits)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def incoming(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        """The input that is multiplied."""
        return x

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return F.linear(self.incoming(x), self.weight.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}"


class BinaryLinear(LowBitLinear):
    """1-bit weights and, with `binary_input`, inputs of two values: c + m sign((x - c) / d), by the subclass's `sign`.

    c is the mean of calibration inputs, m their mean distance from it and d its root mean square: constants of the
    layer.
    """

    def __init__(self, in_features: int, out_features: int, binary_input: bool = True, bias: bool = False):
        super().__init__(in_features, out_features, 1, bias)
        self.binary_input = binary_input
        for name, value in (("center", 0.0), ("magnitude", 1.0), ("deviation", 1.0)):
            self.register_buffer(name, torch.tensor(value) if binary_input else None)

    def expect(self, inputs: "Inputs") -> None:
        """Take c, m and d from calibration."""
        if self.binary_input:
            for name in ("center", "magnitude", "deviation"):
                getattr(self, name).fill_(getattr(inputs, name))

    def sign(self, x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """`signs` with the method's gradient."""
        raise NotImplementedError

    def incoming(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        if not self.binary_input:
            return x
        c, m, d = (value.to(x.dtype) for value in (self.center, self.magnitude, self.deviation))
        return c + m * self.sign((x - c) / d)


# ---------------------------------------------------------------- calibration


@dataclass(frozen=True)
class Inputs:
    """Of the numbers that flow into one linear on calibration tokens: mean, mean distance and root mean squared
    distance from it, mean |x|, and the smallest.
    """

    center: float
    magnitude: float
    deviation: float
    size: float
    low: float

    @classmethod
    def of(cls, x: Tensor) -> "Inputs":
        away = x - x.mean()
        numbers = (x.mean(), away.abs().mean(), away.square().mean().sqrt(), x.abs().mean(), x.min())
        center, magnitude, deviation, size, low = (float(number) for number in numbers)
        return cls(center, max(magnitude, 1e-6), max(deviation, 1e-6), max(size, 1e-6), low)


def observe_inputs(model: nn.Module, chosen: list[parts.Linear], data: Data) -> dict[str, Inputs]:
    """What flows into each linear in the first batches of `data`, padding left out; a linear that no token reaches is
    absent.
    """
    seen: dict[str, list[Tensor]] = {}
    device = next(model.parameters()).device
    each = VALUES // CALIBRATION_BATCHES

    def see(part: parts.Linear, x: Tensor, expert: int | None) -> None:
        values = x.float().flatten()
        if len(values):
            seen.setdefault(part.name, []).append(values[:: -(-len(values) // each)].clone())

    with parts.observe(chosen, see) as run:
        for step in range(min(CALIBRATION_BATCHES, -(-len(data) // data.batch_size))):
            run(model, {key: value.to(device) for key, value in data.sample(step).items()})
    return {name: Inputs.of(torch.cat(values)) for name, values in seen.items()}


# ---------------------------------------------------------------- distillation


@contextmanager
def block_outputs(model: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """(block, hidden states) in the order of the calls made within the context."""
    seen: list[tuple[str, Tensor]] = []
    take = lambda name: lambda module, args, out: seen.append((name, out[0] if isinstance(out, tuple) else out))
    handles = [block.module.register_forward_hook(take(block.name)) for block in parts.blocks(model)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def real_positions(model: nn.Module, batch: dict[str, Tensor], decoder: bool) -> Bool[Tensor, "B L"] | None:
    """True at the tokens that are no padding, of the decoder of an encoder-decoder or of the only stack; None: all
    are.
    """
    if not (decoder and getattr(model.config, "is_encoder_decoder", False)):
        mask = batch.get("attention_mask")
    else:
        mask = batch.get("decoder_attention_mask")
        mask = batch["labels"] != -100 if mask is None and "labels" in batch else mask
    return None if mask is None else mask.bool()


def kept(x: Float[Tensor, "B *rest"], real: Tensor | None) -> Float[Tensor, "tokens D"]:
    """The rows of x at real positions; all of them when it has no such positions (pooled outputs, images)."""
    if real is not None and x.ndim == 3 and real.shape == x.shape[:2]:
        return x[real.to(x.device)]
    return x.reshape(-1, x.shape[-1])


def relative_error(ours: Float[Tensor, "N D"], theirs: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """||ours - theirs||^2 / ||theirs||^2."""
    return (ours - theirs).square().sum() / theirs.square().sum().clamp(min=1e-12)


def block_errors(model: nn.Module, teacher: nn.Module, batch: dict[str, Tensor]) -> tuple[list[Tensor], Any, Any]:
    """(the relative error of each block's output, padding left out; the model's output; the teacher's)."""
    with block_outputs(teacher) as wanted, torch.no_grad():
        theirs = teacher(**batch)
    with block_outputs(model) as made:
        ours = model(**batch)
    errors = []
    for (name, a), (_, b) in zip(made, wanted, strict=True):
        real = real_positions(model, batch, "decoder" in name.split("."))
        errors.append(relative_error(kept(a, real).float(), kept(b, real).float()))
    return errors, ours, theirs


def agreement(model: nn.Module, teacher: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
    """KL(teacher || model) of the logits, in nats per token, plus the mean over blocks of the relative error of their
    outputs.

    A model without logits has the relative error of its last hidden states in their place. Padding counts nowhere.
    """
    errors, ours, theirs = block_errors(model, teacher, batch)
    loss, real = torch.stack(errors).mean(), real_positions(model, batch, True)
    if "logits" in ours:
        a, b = kept(ours["logits"], real).log_softmax(-1), kept(theirs["logits"], real).log_softmax(-1)
        return loss + (b.exp() * (b - a)).sum(-1).mean()
    return loss + relative_error(kept(ours["last_hidden_state"], real), kept(theirs["last_hidden_state"], real))


def distil(
    model: nn.Module,
    teacher: nn.Module,
    data: Data,
    *,
    steps: int,
    learning_rate: float,
    extra: Callable[[], Tensor] | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[float]:
    """Lower `agreement` (+ `extra()`, asked after both passes) over what requires a gradient; gives the loss of each
    step.

    AdamW without decay, linear fall of the learning rate. `progress(done)` is told before each step which part, 0 to
    1, is done.
    """
    from formulary.lab import train

    taken = 0

    def objective(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        nonlocal taken
        model.eval()
        if progress is not None:
            progress(taken / steps)
        taken += 1
        loss = agreement(model, teacher, _inputs(model, batch))
        return loss if extra is None else loss + extra()

    optimizer = partial(torch.optim.AdamW, lr=learning_rate, weight_decay=0.0, fused=True)
    options = {"steps": steps, "lr": learning_rate, "loss": objective, "optimizer": optimizer, "seed": data.seed}
    return train(model, data, schedule="linear", **options).losses


def _inputs(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch in float32, without labels that only a loss needs."""
    needed = getattr(model.config, "is_encoder_decoder", False)
    wide = lambda value: value.float() if value.is_floating_point() else value
    return {key: wide(value) for key, value in batch.items() if key != "labels" or needed}


# ---------------------------------------------------------------- the transform


@dataclass(frozen=True, kw_only=True)
class QuantizationAwareTraining(Transform):
    """Replace the linears inside the blocks by `LowBitLinear`s and train them with the model that they came from as
    teacher.

    steps: of training. learning_rate: the highest, of AdamW. Biases and norms are trained too; embeddings and heads
    stay. A room implements `layer`, and `train` where one call of `distil` will not do. Expert tensors and linears of
    fewer than 8 inputs stay dense.
    """

    steps: int = 200
    learning_rate: float = 5e-4

    needs_data = True
    trains = True
    shift_invariant = False
    quick: ClassVar[dict[str, Any]] = {"steps": 3}

    def __post_init__(self):
        super().__post_init__()
        check_range(self.slug, "steps", self.steps, 1, 10_000_000)
        check_range(self.slug, "learning_rate", self.learning_rate, 1e-9, 1.0)

    def layer(self, part: parts.Linear, inputs: Inputs) -> tuple[type[LowBitLinear], dict[str, Any]]:
        """The class that takes the place of `part`, and its arguments besides sizes and bias."""
        raise NotImplementedError

    def begin(self, layer: LowBitLinear, weight: Float[Tensor, "out in"], inputs: Inputs) -> None:
        """Set a new layer up to be trained."""
        layer.start(weight)

    def prepare(
        self, model: nn.Module, teacher: nn.Module, data: Data, edit: Editor, report: Report
    ) -> list[LowBit]:
        """Change what the room changes besides linears; gives low-bit modules to train."""
        return []

    def train(
        self, model: nn.Module, teacher: nn.Module, data: Data, layers: list[LowBit], report: Report
    ) -> list[float]:
        """Train; gives the loss of each step."""
        return distil(model, teacher, data, steps=self.steps, learning_rate=self.learning_rate)

    def run(self, model: nn.Module, data: Data, edit: Editor, report: Report) -> None:
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        model.eval().requires_grad_(False)
        layers = self._replace(model, data, edit, report)
        if not layers:
            return
        layers += self.prepare(model, teacher, data, edit, report)
        small = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
        edit.keep(nn.ParameterList(small))
        for parameter in small:
            parameter.requires_grad_(True)
        with in_float32(model, teacher):
            losses = self.train(model, teacher, data, layers, report)
            for layer in layers:
                layer.finish()
        tail = losses[-max(1, len(losses) // 10) :]
        report.figures["training loss, first step and last tenth"] = [losses[0], sum(tail) / len(tail)]
        changed = sum(change.weights for change in report.changes)
        report.figures["bits per weight, scales counted"] = 8 * sum(layer.stored_bytes for layer in layers) / changed

    def _replace(self, model: nn.Module, data: Data, edit: Editor, report: Report) -> list[LowBitLinear]:
        chosen = []
        for part in parts.linears(model, self.targets, self.ignore):
            if part.experts:
                report.skipped(part.name, "expert tensors stay dense", part.weights)
            elif part.in_features < MIN_FEATURES:
                report.skipped(part.name, f"fewer than {MIN_FEATURES} inputs", part.weights)
            else:
                chosen.append(part)
        seen, layers = observe_inputs(model, chosen, data), []
        for part in chosen:
            if part.name not in seen:
                report.skipped(part.name, "no calibration token reached it", part.weights)
                continue
            cls, args = self.layer(part, seen[part.name])
            weight, bias = part.weight(), part.bias
            sizes = {"in_features": part.in_features, "out_features": part.out_features, "bias": bias is not None}
            layer = edit.edit(part.name, cls, **sizes, **args)
            if bias is not None:
                layer.bias = bias
            self.begin(layer, weight, seen[part.name])
            layers.append(layer)
            report.changed(part.name, part.weights, f"{layer.bits} bit{'s' if layer.bits > 1 else ''}")
        return layers

