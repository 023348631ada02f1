"""LLM.int8() multiplies in 8-bit integers, with a scale per token and per output, and keeps the few huge activations
in floating point.

For a token x (in,) and weight W (out, in), with outliers O = {j : |x_j| >= 6} and c_w = max_j |W_kj| / 127:

    y_k = sum_{j in O} x_j W'_kj + c_x c_w[k] sum_{j not in O} q_j V_kj + b_k,   W' = c_w V,
    V = round(W / c_w),   c_x = max_{j not in O} |x_j| / 127,   q = round(x / c_x)

Source: arXiv:2208.07339, section 3 and equation 8. The integer products are summed exactly in 32 bits.

The paper takes a column as an outlier for a whole batch when any of its tokens exceeds the threshold; so a token's
result depends on its neighbors and on padding. Here every token has its own outliers, which is the paper's rule for a
batch of one token: padding, batching and decoding with a cache change nothing. Columns that are outliers for some
token are multiplied in float for those tokens alone.
"""

import threading
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formulary.contracts import Data, Replacement, Report, Transform, parts
from formulary.contracts.edits import Editor
from formulary.contracts.transform import check_range
from formulary.errors import UsageError
from formulary.kernels import int8


@dataclass(frozen=True, kw_only=True)
class LLMInt8(Transform):
    """Linears inside the blocks as int8 weights, multiplied with activations that are rounded to int8 on the fly; no
    data needed.

    threshold: activations of at least this size stay in floating point (6.0 in the paper; 1e30 turns the
    decomposition off). Expert tensors are left alone. Raises UsageError for a threshold that is not positive.

    >>> from formulary.lab import inputs_for, tiny
    >>> model, report = LLMInt8().apply(tiny("bert"))
    >>> model.encoder.layer[0].intermediate.dense.codes.dtype
    torch.int8
    """

    threshold: float = 6.0

    def __post_init__(self):
        super().__post_init__()
        check_range("llm-int8", "threshold", self.threshold, 1e-6, 1e30)

    def run(self, model: nn.Module, data: Data | None, edit: Editor, report: Report) -> None:
        for part in parts.linears(model, self.targets, self.ignore):
            if part.experts:
                report.skipped(part.name, "expert tensors stay in floating point", part.weights)
                continue
            report.changed(part.name, part.weights, "int8")
            sizes = {"in_features": part.in_features, "out_features": part.out_features, "bias": part.bias is not None}
            new = edit.edit(part.name, Int8Linear, **sizes, threshold=float(self.threshold))
            new.store(part.weight())
            if part.bias is not None:
                new.bias = part.bias
        for module in {part.name: part for part in [*parts.mixers(model), *parts.feed_forwards(model)]}.values():
            several = sum(isinstance(child, Int8Linear) for child in module.module.children()) > 1
            if several and not isinstance(module.module, SharedInput):
                edit.edit(module.name, SharedInput)
        if report.changes and not int8.has_onednn():
            report.note("this machine multiplies integers through floating point: smaller, not faster")


class Int8Linear(Replacement):
    """A linear map with int8 weights `codes` (out, in) and a `scale` (out,) per output; `path` says how it multiplies
    here.

    >>> layer = Int8Linear(16, 4)
    >>> layer.store(torch.eye(4, 16))
    >>> torch.allclose(layer(torch.arange(16.0)), torch.tensor([0.0, 1, 2, 3]), atol=0.03)
    True
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, threshold: float = 6.0):
        super().__init__()
        if not all(isinstance(size, int) and size > 0 for size in (in_features, out_features)):
            raise UsageError(f"sizes of an int8 linear must be positive integers, got {in_features} and {out_features}")
        check_range("llm-int8", "threshold", threshold, 1e-6, 1e30)
        self.in_features, self.out_features, self.threshold = in_features, out_features, threshold
        self.register_buffer("codes", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def store(self, weight: Float[Tensor, "out in"]) -> None:
        """Round `weight` to int8, each row by its largest absolute value."""
        scale = (weight.float().abs().amax(1) / 127).clamp(min=torch.finfo(self.scale.dtype).tiny)
        self.scale.copy_(scale)
        self.codes.copy_((weight.float() / self.scale.float()[:, None]).round().clamp(-127, 127))

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The weight that the integers stand for, in the dtype of the scales."""
        return self.codes.to(self.scale.dtype) * self.scale[:, None]

    @property
    def path(self) -> str:
        """How this processor multiplies, in words."""
        return int8.path()

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return int8_linear(x, self.codes, self.scale, self.bias, self.threshold)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, threshold={self.threshold}"


# ---------------------------------------------------------------- the product


@torch.library.custom_op(
    "formulary::int8_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor codes, Tensor scale, Tensor? bias, float threshold) -> Tensor",
)
def int8_linear(x, codes, scale, bias, threshold):
    """x (..., in), codes int8 (out, in), scale (out,), bias (out,) or None -> (..., out) in the dtype of x.

    Opaque to `torch.compile`. Its gradient is that of the dequantized weight; the rounding of x is passed over.
    """
    out = int8.linear(_SHARED.tokens(x, threshold), codes, scale, bias)
    return out.to(x.dtype).view(*x.shape[:-1], codes.shape[0])


@int8_linear.register_fake
def _(x, codes, scale, bias, threshold):
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def _save(ctx, inputs, output):
    _, codes, scale, _, _ = inputs
    ctx.save_for_backward(codes, scale)


def _backward(ctx, grad):
    codes, scale = ctx.saved_tensors
    weight = codes.to(grad.dtype) * scale.to(grad.dtype)[:, None]
    bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
    return grad @ weight, None, None, bias, None


int8_linear.register_autograd(_backward, setup_context=_save)


class _Shared(threading.local):
    """The integers of the last input, while a module that hands one tensor to several linears is running."""

    active = False
    last: tuple[Tensor, float, int8.Tokens] | None = None

    def tokens(self, x: Tensor, threshold: float) -> int8.Tokens:
        if not self.active:
            return int8.quantize(x, threshold)
        if self.last is None or self.last[0] is not x or self.last[1] != threshold:
            self.last = (x, threshold, int8.quantize(x, threshold))
        return self.last[2]

    @contextmanager
    def sharing(self):
        before, self.active, self.last = (self.active, self.last), True, None
        try:
            yield
        finally:
            self.active, self.last = before


_SHARED = _Shared()


class SharedInput:
    """Quantizes once what a module hands to several of its linears (query, key and value; gate and up), by becoming
    the module's class.

    The integers live no longer than the module's forward pass, in which the tensor is not written to. Results are the
    same.
    """

    @classmethod
    def attach(cls, model: nn.Module, name: str) -> nn.Module:
        """Swap the class of the module `name`."""
        module = model.get_submodule(name)
        title = f"SharedInput{type(module).__name__}"
        module.__class__ = type(title, (cls, type(module)), {"__module__": cls.__module__})
        return module

    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        with _SHARED.sharing():
            return super().forward(*args, **kwargs)
