"""Linears pruned to 4x1 blocks and rounded to int8, multiplied by a kernel that skips what was pruned.

A block is 4 consecutive outputs of one input. Of each weight W (out, in) the blocks with the largest norm stay, a share
1 - s of all; the others are zero. While it trains, s rises along s_t = s (1 - (1 - t)^3), t from 0 to 1 over the first
two thirds of the steps; the target is the unchanged model's output. Then, for a token x and c_w = max_j |W_kj| / 127:

    y_k = c_x c_w[k] sum_{j in blocks(k)} q_j V_kj + b_k,   V = round(W / c_w),   c_x = max_j |x_j| / 127,   q = round(x / c_x)

Source: arXiv:2306.16601, whose blocks and use of VNNI the authors' kernel documentation gives in detail. The paper generates
code for each matrix, its pattern in the instruction stream; `kernels/sparse_int8` reads the pattern from memory instead.

Pixels (B,C,H,W) or ids (B,L) in, the model's own outputs out. Raises FormularyError where no linear can be pruned.

>>> from formulary.lab.small import inputs_for, tiny
>>> model, report = IntelSparseSpmmCpu(steps=0).apply(tiny("bert"))
>>> layer = model.encoder.layer[0].intermediate.dense
>>> layer.values.shape, float((layer.weight == 0).float().mean()) >= 0.8
(torch.Size([102, 4]), True)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from formulary.contracts import Data, Replacement, Report, Transform, parts
from formulary.contracts.edits import Editor
from formulary.contracts.transform import check_range
from formulary.errors import UsageError
from formulary.kernels import sparse_int8
from formulary.kernels.sparse_int8 import BLOCK, MOST_INPUTS

from .pruning import block_mask, prune_and_train


@dataclass(frozen=True, kw_only=True)
class IntelSparseSpmmCpu(Transform):
    """sparsity: the share of each linear's blocks that is pruned. steps: of training while it is pruned and after, with the
    unchanged model as teacher (AdamW, highest `learning_rate`); 0 prunes at once and needs no data. Expert tensors and
    linears of more than 65,536 inputs are left alone. Raises UsageError for values out of range.
    """

    sparsity: float = 0.8
    steps: int = 200
    learning_rate: float = 5e-4

    supports = frozenset({"encoder", "decoder", "vision"})
    shift_invariant = False
    quick: ClassVar[dict] = {"steps": 2}

    def __post_init__(self):
        super().__post_init__()
        check_range("intel-sparse-spmm-cpu", "sparsity", self.sparsity, 0.0, 0.999)
        check_range("intel-sparse-spmm-cpu", "steps", self.steps, 0, 10_000_000)
        check_range("intel-sparse-spmm-cpu", "learning_rate", self.learning_rate, 1e-9, 1.0)

    @property
    def trains(self) -> bool:
        """Whether it trains while it prunes."""
        return self.steps > 0

    @property
    def needs_data(self) -> bool:
        """Training needs data; pruning at once does not."""
        return self.trains

    def run(self, model: nn.Module, data: Data | None, edit: Editor, report: Report) -> None:
        chosen = []
        for part in parts.linears(model, self.targets, self.ignore):
            if part.experts:
                report.skipped(part.name, "expert tensors stay in floating point", part.weights)
            elif part.in_features > MOST_INPUTS:
                report.skipped(part.name, f"more than {MOST_INPUTS} inputs", part.weights)
            else:
                chosen.append(part)
        if self.steps and chosen:
            edit.keep(model)
            losses = prune_and_train(
                model, chosen, data, self.sparsity, steps=self.steps, learning_rate=self.learning_rate
            )
            tail = losses[-max(1, self.steps // 10) :]
            report.note(f"trained for {self.steps} steps, to a distance of {sum(tail) / len(tail):.3g} from the unchanged model")
        for part in chosen:
            replace(edit, part, block_mask(part.weight(), self.sparsity))
            report.changed(part.name, part.weights, f"{100 * self.sparsity:.3g} % pruned, int8")
        if chosen and not self.steps:
            report.note("pruned at once, without training")
        if chosen and not sparse_int8.level():
            report.note(f"linears run as {sparse_int8.path()}")


# ---------------------------------------------------------------- the layer


def replace(edit: Editor, part: parts.Linear, keep: Bool[Tensor, "rows in"]) -> "SparseInt8Linear":
    """Put the kept blocks of a linear in its place."""
    sizes = {"in_features": part.in_features, "out_features": part.out_features, "bias": part.bias is not None}
    weight, bias = part.weight(), part.bias
    new = edit.edit(part.name, SparseInt8Linear, **sizes, blocks=int(keep.sum()))
    new.store(weight, keep)
    if bias is not None:
        new.bias = bias
    return new


class SparseInt8Linear(Replacement):
    """A linear map whose weight is `blocks` 4x1 blocks of int8 `values`, found by `pointers` and `columns`, with a `scale` per
    output; see `kernels.sparse_int8`. `path` says how it multiplies here.

    >>> layer = SparseInt8Linear(16, 4, blocks=4)
    >>> layer.store(torch.eye(4, 16), torch.arange(16)[None] < 4)
    >>> torch.allclose(layer(torch.arange(16.0)), torch.tensor([0.0, 1, 2, 3]), atol=0.07)
    True
    """

    def __init__(self, in_features: int, out_features: int, blocks: int, bias: bool = False):
        super().__init__()
        rows = -(-out_features // BLOCK)
        if not (0 < in_features <= MOST_INPUTS and out_features > 0 and 0 <= blocks <= rows * in_features):
            raise UsageError(f"no block-sparse linear has {in_features} inputs, {out_features} outputs and {blocks} blocks")
        self.in_features, self.out_features, self.blocks = in_features, out_features, blocks
        self.register_buffer("pointers", (in_features * torch.arange(rows + 1, dtype=torch.int32)).clamp(max=blocks))
        columns = torch.arange(blocks, dtype=torch.int32) % in_features
        self.register_buffer("columns", columns.to(sparse_int8.column_type(in_features)))
        self.register_buffer("values", torch.zeros(blocks, BLOCK, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @torch.no_grad()
    def store(self, weight: Float[Tensor, "out in"], keep: Bool[Tensor, "rows in"]) -> None:
        """Take over the blocks to keep, each output rounded by its largest absolute value among them."""
        weight = weight.float() * keep.repeat_interleave(BLOCK, 0)[: len(weight)]
        self.scale.copy_((weight.abs().amax(1) / 127).clamp(min=torch.finfo(self.scale.dtype).tiny))
        codes = (weight / self.scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        for buffer, value in zip((self.pointers, self.columns, self.values), sparse_int8.compress(codes, keep), strict=True):
            buffer.copy_(value)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The weight that the blocks stand for, in the dtype of the scales."""
        return _dense(self.pointers, self.columns, self.values, self.scale, self.in_features, self.scale.dtype)

    @property
    def path(self) -> str:
        """How this processor multiplies, in words."""
        return sparse_int8.path()

    @property
    def slow_because(self) -> str | None:
        """Why it is no faster than a dense linear, where it is not."""
        return None if sparse_int8.level() else f"linears run as {sparse_int8.path()}"

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return sparse_int8_linear(x, self.pointers, self.columns, self.values, self.scale, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, blocks={self.blocks}"


def _dense(pointers, columns, values, scale, inputs: int, dtype: torch.dtype) -> Tensor:
    return sparse_int8.decompress(pointers, columns, values, inputs, len(scale)).to(dtype) * scale.to(dtype)[:, None]


@torch.library.custom_op(
    "formulary::sparse_int8_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor pointers, Tensor columns, Tensor values, Tensor scale, Tensor? bias) -> Tensor",
)
def sparse_int8_linear(x, pointers, columns, values, scale, bias):
    """x (..., in) -> (..., out) in the dtype of x; see `kernels.sparse_int8.linear`.

    Opaque to `torch.compile`. Its gradient is that of the dequantized weight; the rounding of x is passed over.
    """
    return sparse_int8.linear(x, pointers, columns, values, scale, bias).to(x.dtype)


@sparse_int8_linear.register_fake
def _(x, pointers, columns, values, scale, bias):
    return x.new_empty(*x.shape[:-1], scale.shape[0])


def _save(ctx, inputs, output):
    x, *blocks, _ = inputs
    ctx.inputs = x.shape[-1]
    ctx.save_for_backward(*blocks)


def _backward(ctx, grad):
    bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[5] else None
    return grad @ _dense(*ctx.saved_tensors, ctx.inputs, grad.dtype), None, None, None, None, bias


sparse_int8_linear.register_autograd(_backward, setup_context=_save)
