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

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor, nn

from formulary.contracts import BlockTransform, Replacement, Report, parts
from formulary.contracts.edits import Editor
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError, UsageError
from formulary.kernels import int8


@dataclass(frozen=True, kw_only=True)
class LLMInt8(BlockTransform):
    """Linears inside the blocks as int8 weights, multiplied with activations that are rounded to int8 on the fly; no
    data needed.

    threshold: activations of at least this size stay in floating point (6.0 in the paper; 1e30 turns the
    decomposition off). head: the output head too, and the input embedding with it where they share their weight; in
    decoding one token after the other, reading a head in float takes as long as all blocks in int8. Expert tensors are
    left alone. Raises UsageError for a threshold that is not positive, FormularyError for a head that is not there.

    >>> from formulary.lab import inputs_for, tiny
    >>> model, report = LLMInt8().apply(tiny("bert"))
    >>> model.encoder.layer[0].intermediate.dense.codes.dtype
    torch.int8
    """

    threshold: float = 6.0
    head: bool = False

    observes: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        check_range("llm-int8", "threshold", self.threshold, 1e-6, 1e30)

    @property
    def beyond(self) -> bool:
        return self.head

    def choose(self, model: nn.Module, report: Report) -> list[parts.Linear]:
        chosen = []
        for part in parts.linears(model, self.targets, self.ignore):
            if part.experts:
                report.skipped(part.name, "expert tensors stay in floating point", part.weights)
            else:
                chosen.append(part)
        return chosen

    def run_block(self, block, linears: list[parts.Linear], walk, edit: Editor, report: Report) -> None:
        for part in linears:
            self._replace(part, edit, report)

    def conclude(self, model: nn.Module, edit: Editor, report: Report) -> None:
        if self.head:
            self._replace_head(model, edit, report)
        if report.changes and not int8.level():
            report.note(f"linears run as {int8.path()}")

    def _replace(self, part: parts.Linear, edit: Editor, report: Report) -> None:
        report.changed(part.name, part.weights, "int8")
        sizes = {"in_features": part.in_features, "out_features": part.out_features, "bias": part.bias is not None}
        new = edit.edit(part.name, Int8Linear, **sizes, threshold=float(self.threshold))
        new.store(part.weight())
        if part.bias is not None:
            new.bias = part.bias

    def _replace_head(self, model: nn.Module, edit: Editor, report: Report) -> None:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        name = next((name for name, module in model.named_modules() if module is head), None)
        if not isinstance(head, nn.Linear) or name is None:
            raise FormularyError(f"llm-int8: this {type(model).__name__} has no output head that is a linear: leave head out")
        embedding = model.get_input_embeddings()
        tied = embedding.weight is head.weight
        self._replace(parts.Linear(name, head, "linear"), edit, report)
        if tied and type(embedding) is nn.Embedding:
            name = next(name for name, module in model.named_modules() if module is embedding)
            rows, width = embedding.weight.shape
            report.changed(name, embedding.weight.numel(), "int8")
            edit.edit(name, Int8Embedding, num_embeddings=rows, embedding_dim=width).store(embedding.weight.detach())


class Int8Embedding(Replacement):
    """An embedding of int8 `codes` (V,D) with a `scale` (V,) per row.

    >>> table = Int8Embedding(2, 3)
    >>> table.store(torch.tensor([[1.0, 0.0, -1.0], [2.0, 2.0, 0.0]]))
    >>> table(torch.tensor([1])).tolist()
    [[2.0, 2.0, 0.0]]
    """

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.register_buffer("codes", torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(num_embeddings))

    def store(self, weight: Float[Tensor, "V D"]) -> None:
        """Round `weight` to int8, each row by its largest absolute value."""
        _round_rows(weight, self.codes, self.scale)

    @property
    def weight(self) -> Float[Tensor, "V D"]:
        """The table that the integers stand for."""
        return self.codes.to(self.scale.dtype) * self.scale[:, None]

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch D"]:
        return self.codes[ids].to(self.scale.dtype) * self.scale[ids][..., None]


def _round_rows(weight: Float[Tensor, "out in"], codes: Int8[Tensor, "out in"], scale: Float[Tensor, "out"]) -> None:
    weight = weight.float()
    scale.copy_((weight.abs().amax(1) / 127).clamp(min=torch.finfo(scale.dtype).tiny))
    codes.copy_((weight / scale.float()[:, None]).round().clamp(-127, 127))


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
        _round_rows(weight, self.codes, self.scale)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The weight that the integers stand for, in the dtype of the scales."""
        return self.codes.to(self.scale.dtype) * self.scale[:, None]

    @property
    def path(self) -> str:
        """How this processor multiplies, in words."""
        return int8.path()

    def int8(self) -> int8.Linear:
        """The parts, for a kernel that runs a whole block."""
        return int8.Linear(self.codes, self.scale, self.bias, self.threshold)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return int8_linear(x, self.codes, self.scale, self.bias, self.threshold)
        return int8.linear(x, self.codes, self.scale, self.bias, self.threshold).to(x.dtype)

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
    return int8.linear(x, codes, scale, bias, threshold).to(x.dtype)


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
