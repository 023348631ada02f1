"""GPTQ quantizes the columns of a weight one by one and lets the columns still to come make up for each rounding error.

For a linear with weight W (out, in) and calibration inputs X (tokens, in), minimize ||X (W - Q)^T||^2 over Q on a
uniform grid. With H = 2 X^T X + damp * mean(diag H) I and U the upper Cholesky factor of H^-1, for each column i in
turn:

    Q[:, i] = grid(W[:, i]);   e = (W[:, i] - Q[:, i]) / U[i, i];   W[:, i:] -= e U[i, i:]

Source: arXiv:2210.17323, sections 3.3 and 4, algorithm 1 (lazy batches of 128 columns). Activation order (columns by
falling diag H) and static groups are options of the authors' later code. The model is quantized block by block, each
calibrated on the output of the quantized blocks before it. The factor 2 in H cancels and is left out.

H^-1 is never formed. With R upper triangular and H = R R^T, U is R^-1, and what the columns before a batch s:e make of it is

    W[:, s:e] + (W - Q)[:, :s] R[:s, s:e] R[s:e, s:e]^-1

with the original W. Inside the batch, the walk needs R[s:e, s:e]^-1 = U[s:e, s:e] alone.
"""

from collections.abc import Sequence
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
from formulary.kernels import compensation, float32

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

    `apply(model, data)` needs calibration data; the paper takes 128 sequences of 2,048 tokens. Where the processor has
    products of bfloat16, calibration (not the weights' own arithmetic) computes linears in it in float32 models too. Raises UsageError for
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
    halves: ClassVar[bool] = True
    layer: ClassVar[type] = PackedLinear

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
        known: list = []  # X^T X of the matrix before and its factor: queries, keys and values have the same
        for part, grams in walk.grams(block, linears):
            weights = part.weight().float() if part.experts else part.weight().float()[None]
            names = [f"{part.name}[{e}]" for e in range(part.experts)] or [part.name]
            made[part.name] = [self._one(name, one, grams.pop(0), part, report, known) for name, one in zip(names, weights)]
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

    def _one(self, name: str, weight: Tensor, gram: Tensor | None, part, report: Report, known: list) -> Quantized:
        """Quantize one weight matrix and enter its error into the report."""
        dtype = part.raw.dtype
        rounded = round_to_nearest(weight, self.grid, dtype)
        if gram is None or not gram.diagonal().any():
            report.figures["unreached"] = [*report.figures.get("unreached", []), name]
            if self.ordered:
                index = torch.arange(weight.shape[1], device=weight.device) // self.grid.columns(weight.shape[1])
                rounded.group_index = index
            return rounded
        if not torch.isfinite(gram.diagonal()).all():
            raise FormularyError(f"the inputs of {name} overflow or are NaN in calibration: try another dtype or data")
        dead = int((gram.diagonal() == 0).sum())
        if dead:
            report.figures["dead inputs"] = {**report.figures.get("dead inputs", {}), name: dead}
        if not known or known[0] is not gram:
            known.clear()
            known += [gram, _factor(gram, _order(gram) if self.act_order else None, self.damp)]
        made, damp = compensated(
            weight, gram, self.grid, dtype=dtype, damp=self.damp, act_order=self.act_order,
            static_groups=self.static_groups, block_size=self.block_size, factor=known[1],
        )  # fmt: skip
        if damp > self.damp:
            report.note(f"the Hessian of {name} needed damping of {damp:g} instead of {self.damp:g}")
        differences = [weight, *(weight - one.dense(self.grid) for one in (made, rounded))]
        energy, ours, nearest = output_errors(differences, gram, halves=self.halves)
        report.tables.setdefault("relative squared output error", []).append({
            "layer": name, "gptq": ours / max(energy, 1e-30), "round to nearest": nearest / max(energy, 1e-30)
        })  # fmt: skip
        return made

    @property
    def ordered(self) -> bool:
        """Whether groups follow the quantization order, so that each column's group must be stored."""
        return self.act_order and self.grid.group_size is not None and not self.static_groups


def output_errors(
    differences: Sequence[Float[Tensor, "out in"]], gram: Float[Tensor, "in in"], *, halves: bool = False, strip: int = 256
) -> list[float]:
    """||X D^T||^2 for each difference D and gram = X^T X, of which only what is on and below the diagonal is read, `strip` rows at
    a time. With `halves` to three digits, on processors that multiply bfloat16 faster.

    >>> output_errors([torch.ones(1, 2)], torch.tensor([[3.0, 1.0], [1.0, 4.0]]))
    [9.0]
    """
    dtype = torch.bfloat16 if halves and gram.device.type == "cpu" and float32.has_halves() else gram.dtype
    factors, totals = [difference.to(dtype) for difference in differences], [0.0] * len(differences)
    for start in range(0, gram.shape[1], strip):
        end = min(start + strip, gram.shape[1])
        twice = gram[start:end, :end].clone()
        twice[:, :start] *= 2
        twice = twice.to(dtype).mT
        for number, (difference, factor) in enumerate(zip(differences, factors)):
            totals[number] += float(_product(factor[:, :end], twice).float().mul_(difference[:, start:end]).sum())
    return totals


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
    factor: tuple[Tensor, float] | None = None,
) -> tuple[Quantized, float]:
    """Quantize `weight` for inputs with X^T X = `gram`; returns it and the damping that was needed. `factor` is what `_factor`
    gives, where it is known from another weight with the same inputs.

    The weights of inputs that are always zero are rounded to nearest (the authors' code sets them to zero). When H is
    not positive definite in float64, `damp` is raised tenfold until it is.

    >>> weight, x = torch.randn(4, 16), torch.randn(99, 16)
    >>> quantized, damp = compensated(weight, x.T @ x, Grid(bits=4))
    >>> quantized.codes.shape, damp
    (torch.Size([4, 16]), 0.01)
    """
    features = weight.shape[1]
    width = grid.columns(features)
    order = _order(gram) if act_order else None
    factor, damp = _factor(gram, order, damp) if factor is None else factor
    original = weight.float().mT.contiguous() if order is None else weight.float().mT[order]
    place = torch.arange(features, device=weight.device)
    if grid.group_size is None or static_groups:
        static, group = round_to_nearest(weight, grid, dtype), (place if order is None else order) // width
        scale, zero, lazy = static.scale.mT.contiguous(), static.zero.mT.contiguous(), block_size
    else:
        static, group, lazy = None, place // width, max(width, block_size // width * width)
        scale, zero = (original.new_empty(grid.groups(features), len(weight)) for _ in range(2))
    codes, errors = torch.empty_like(original, dtype=torch.uint8), torch.empty_like(original)
    for start in range(0, features, lazy):
        end = min(start + lazy, features)
        own = factor[start:end, start:end]
        upper = torch.linalg.solve_triangular(own, torch.eye(end - start, dtype=own.dtype, device=own.device), upper=True)
        block = original[start:end].clone()
        if start:
            block += _product(upper.float().mT, _product(factor[:start, start:end].float().mT, errors[:start]))
        for first in range(0, end - start, width if static is None else end - start):
            last = min(first + width, end - start) if static is None else end - start
            if static is None:
                at = (start + first) // width
                scale[at], zero[at] = grid.fit(block[first:last].mT, dtype)
            compensation.walk(
                block, first, last, upper.float(), scale, zero, group[start:end], 2**grid.bits - 1, codes[start:end]
            )
        errors[start:end] = original[start:end] - block
    index = None
    if order is not None:
        back = torch.argsort(order)
        codes, index = codes[back], back // width if static is None else None
    return Quantized(codes.mT.contiguous(), scale.mT.contiguous(), zero.mT.contiguous(), index), damp


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right."""
    return float32.linear(left, right.mT) if left.device.type == "cpu" else left @ right


def _order(gram: Tensor) -> Tensor:
    """The columns with the largest inputs first."""
    return torch.argsort(gram.diagonal(), descending=True, stable=True)


def _factor(gram: Tensor, order: Tensor | None, damp: float) -> tuple[Tensor, float]:
    """R (in, in) float64, upper triangular with R R^T = H, for columns in `order`; and the damping that it took. What is below
    R's diagonal is anything. Raises FormularyError for X^T X with NaN or infinite values.
    """
    if not torch.isfinite(gram.diagonal()).all():  # no entry is larger than the two of its diagonal
        raise FormularyError("calibration inputs overflow or are NaN: try another dtype or data")
    hessian = gram + torch.diag((gram.diagonal() == 0).to(gram.dtype))
    hessian = (hessian if order is None else hessian[order][:, order]).flip(0, 1).double()
    mean, diagonal = hessian.diagonal().mean(), hessian.diagonal().clone()
    while True:
        hessian.diagonal().copy_(diagonal + damp * mean)
        lower, failed = _cholesky(hessian)
        if not failed:
            return lower.flip(0, 1), damp
        damp = max(10 * damp, 1e-6)


def _cholesky(matrix: Tensor) -> tuple[Tensor, bool]:
    """L with L L^T = `matrix`, of which only the lower half counts, and whether there is none. On a CPU by SciPy's OpenBLAS: MKL,
    which PyTorch has, takes more than twice as long on processors that are not Intel's.
    """
    if matrix.device.type != "cpu":
        lower, failed = torch.linalg.cholesky_ex(matrix)
        return lower, bool(failed)
    from scipy.linalg import lapack

    lower, failed = lapack.dpotrf(matrix.numpy().T, lower=1, clean=0)  # symmetric, so that the transpose is in Fortran's order
    return torch.from_numpy(lower), failed != 0
