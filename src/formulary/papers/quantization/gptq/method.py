"""GPTQ quantizes the columns of a weight one by one and lets the columns still to come make up for each rounding error.

For a linear with weight W (out, in) and calibration inputs X (tokens, in), minimize ||X (W - Q)^T||^2 over Q on a
uniform grid. With H = 2 X^T X + damp * mean(diag H) I and U the upper Cholesky factor of H^-1, for each column i in
turn:

    Q[:, i] = grid(W[:, i]);   e = (W[:, i] - Q[:, i]) / U[i, i];   W[:, i:] -= e U[i, i:]

Source: arXiv:2210.17323, sections 3.3 and 4, algorithm 1 (lazy batches of 128 columns). Activation order (columns by
falling diag H) and static groups are options of the authors' later code. The model is quantized block by block, each
calibrated on the output of the quantized blocks before it. The factor 2 in H cancels and is left out.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formulary.contracts import BlockTransform, Report, parts
from formulary.contracts.blockwise import Blockwise, gram_bytes
from formulary.contracts.edits import Editor
from formulary.contracts.parts import Linear
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError, UsageError

from .._parts import MIN_FEATURES, Grid, PackedExperts, PackedLinear, Quantized, replace, round_to_nearest

__all__ = ["GPTQ", "PackedExperts", "PackedLinear", "compensated"]


@dataclass(frozen=True, kw_only=True)
class GPTQ(BlockTransform):
    """Weights of the linears inside the blocks as packed integers of `bits` bits; activations, heads and embeddings
    stay as they are.

    bits: 2 to 8. group_size: columns that share a scale and zero point, a multiple of 8; None (or -1) for whole rows.
    symmetric: levels centered on 0. act_order: columns with the largest inputs first. static_groups: with act_order,
    groups of neighboring columns with grids taken from the original weight, instead of groups in quantization order.
    damp: added to the diagonal of H, as a fraction of its mean. block_size: columns per lazy update; changes speed,
    not results.

    `apply(model, data)` needs calibration data; the paper takes 128 sequences of 2,048 tokens. Raises UsageError for
    a parameter out of range, and FormularyError when calibration meets NaN. Raised damping, and inputs, layers and
    experts that no token reached (their weights are rounded to nearest) are notes of the report.

    >>> from formulary.contracts import Data
    >>> from formulary.lab import inputs_for, tiny
    >>> model = tiny("llama")
    >>> data = Data([{"input_ids": ids} for ids in inputs_for(model, batch=8)["input_ids"]])
    >>> model, report = GPTQ(bits=3).apply(model, data)
    >>> report.headline
    'gptq on 14 linear layers, 74 % of the weights'
    >>> model.model.layers[0].mlp.down_proj
    PackedLinear(64, 32, bits=3, group_size=None, symmetric=False)
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = False
    act_order: bool = False
    static_groups: bool = False
    damp: float = 0.01
    block_size: int = 128

    needs_data: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        self.grid
        check_range("gptq", "damp", self.damp, 0.0, 1.0)
        check_range("gptq", "block_size", self.block_size, 1, 65536)
        if self.static_groups and not (self.act_order and self.grid.group_size):
            raise UsageError("gptq: static_groups needs act_order=true and a group_size")

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, None if self.group_size == -1 else self.group_size, self.symmetric)

    def choose(self, model: nn.Module, report: Report) -> list[Linear]:
        chosen = []
        for part in parts.linears(model, self.targets, self.ignore):
            if part.in_features < MIN_FEATURES:
                report.skipped(part.name, f"fewer than {MIN_FEATURES} inputs", part.weights)
            else:
                chosen.append(part)
        return chosen

    def run_block(self, block, linears: list[Linear], walk: Blockwise, edit: Editor, report: Report) -> None:
        made: dict[str, list[Quantized]] = {}
        for part, grams in walk.grams(block, linears):
            weights = part.weight().float() if part.experts else part.weight().float()[None]
            names = [f"{part.name}[{e}]" for e in range(part.experts)] or [part.name]
            made[part.name] = [self._one(name, one, grams.pop(0), part, report) for name, one in zip(names, weights)]
        for part in linears:
            report.changed(part.name, part.weights, f"{self.bits} bits")
            replace(edit, part, made.pop(part.name), self.grid)

    def conclude(self, model: nn.Module, edit: Editor, report: Report) -> None:
        unreached, dead = report.figures.get("unreached"), report.figures.get("dead inputs")
        if unreached:
            report.note(
                f"{len(unreached)} weight matrices were reached by no calibration token and rounded to nearest,"
                f" such as {unreached[0]}"
            )
        if dead:
            report.note(
                f"{sum(dead.values())} inputs of {len(dead)} weight matrices are zero on all calibration tokens:"
                " rounded to nearest"
            )

    def working_bytes(self, linears: list[Linear]) -> int:
        """The largest Hessian with its factors in float64, and some float32 copies of a weight matrix."""
        square, matrix = (lambda part: part.in_features**2), (lambda part: part.weights)
        return max(gram_bytes(part) + 24 * square(part) + 24 * matrix(part) for part in linears)

    def _one(self, name: str, weight: Tensor, gram: Tensor | None, part, report: Report) -> Quantized:
        """Quantize one weight matrix and enter its error into the report."""
        dtype = part.raw.dtype
        rounded = round_to_nearest(weight, self.grid, dtype)
        if gram is None or not gram.any():
            report.figures["unreached"] = [*report.figures.get("unreached", []), name]
            if self._permuted:
                index = torch.arange(weight.shape[1], device=weight.device) // self.grid.columns(weight.shape[1])
                rounded.group_index = index
            return rounded
        if not torch.isfinite(gram).all():
            raise FormularyError(f"the inputs of {name} overflow or are NaN in calibration: try another dtype or data")
        dead = int((gram.diagonal() == 0).sum())
        if dead:
            report.figures["dead inputs"] = {**report.figures.get("dead inputs", {}), name: dead}
        made, damp = compensated(
            weight, gram, self.grid, dtype=dtype, damp=self.damp, act_order=self.act_order,
            static_groups=self.static_groups, block_size=self.block_size,
        )  # fmt: skip
        if damp > self.damp:
            report.note(f"the Hessian of {name} needed damping of {damp:g} instead of {self.damp:g}")
        energy = output_error(weight, torch.zeros_like(weight), gram)
        report.tables.setdefault("relative squared output error", []).append({
            "layer": name,
            "gptq": output_error(weight, made.dense(self.grid), gram) / max(energy, 1e-30),
            "round to nearest": output_error(weight, rounded.dense(self.grid), gram) / max(energy, 1e-30),
        })  # fmt: skip
        return made

    @property
    def _permuted(self) -> bool:
        """Whether groups follow the quantization order, so that each column's group must be stored."""
        return self.act_order and self.grid.group_size is not None and not self.static_groups


def output_error(
    weight: Float[Tensor, "out in"], other: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]
) -> float:
    """||X (W - W')^T||^2 for gram = X^T X."""
    difference = weight - other
    return float((difference @ gram * difference).sum())


def compensated(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    grid: Grid,
    *,
    dtype: torch.dtype = torch.float32,
    damp: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    block_size: int = 128,
) -> tuple[Quantized, float]:
    """Quantize `weight` for inputs with X^T X = `gram`; returns it and the damping that was needed.

    The weights of inputs that are always zero are rounded to nearest (the authors' code sets them to zero). When H is
    not positive definite in float64, `damp` is raised tenfold until it is.

    >>> weight, x = torch.randn(4, 16), torch.randn(99, 16)
    >>> quantized, damp = compensated(weight, x.T @ x, Grid(bits=4))
    >>> quantized.codes.shape, damp
    (torch.Size([4, 16]), 0.01)
    """
    features = weight.shape[1]
    dead = gram.diagonal() == 0
    columns = weight.float().mT.contiguous()
    width = grid.columns(features)
    static = round_to_nearest(columns.mT, grid, dtype) if grid.group_size is None or static_groups else None
    order = torch.argsort(gram.diagonal(), descending=True, stable=True) if act_order else torch.arange(features)
    order = order.to(weight.device)
    upper, damp = _inverse_factor(gram + torch.diag(dead.to(gram.dtype)), order, damp)
    columns, codes = columns[order], torch.empty_like(columns, dtype=torch.uint8)
    scales, zeros = [], []
    lazy = max(width, block_size // width * width) if static is None else block_size
    for start in range(0, features, lazy):
        end = min(start + lazy, features)
        errors = torch.empty_like(columns[start:end])
        for i in range(start, end):
            if static is not None:
                group = int(order[i]) // width
                scale, zero = static.scale[:, group], static.zero[:, group]
            elif i % width == 0:
                scale, zero = grid.fit(columns[i : i + width].mT, dtype)
                scales.append(scale)
                zeros.append(zero)
            level = grid.codes(columns[i], scale, zero)
            codes[i] = level.to(torch.uint8)
            errors[i - start] = (columns[i] - (level - zero) * scale) / upper[i, i]
            columns[i + 1 : end] -= torch.outer(upper[i, i + 1 : end], errors[i - start])
        columns[end:] -= upper[start:end, end:].mT @ errors
    inverse = torch.argsort(order)
    scale = torch.stack(scales, 1) if static is None else static.scale
    zero = torch.stack(zeros, 1) if static is None else static.zero
    index = inverse // width if act_order and static is None else None
    return Quantized(codes[inverse].mT.contiguous(), scale, zero, index), damp


def _inverse_factor(hessian: Tensor, order: Tensor, damp: float) -> tuple[Tensor, float]:
    """U (in, in), upper triangular with U^T U = H^-1, for columns in `order`, float32; and the damping that it took."""
    hessian = hessian[order][:, order]
    mean = hessian.diagonal().double().mean()
    while True:  # letting go of each matrix once the next is there: in float64 they are what takes most memory
        matrix = hessian.double()
        matrix.diagonal().add_(damp * mean)
        matrix, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            matrix = torch.cholesky_inverse(matrix)
            matrix, failed = torch.linalg.cholesky_ex(matrix, upper=True)
        if not failed:
            return matrix.float(), damp
        damp = max(10 * damp, 1e-6)
