"""A linear map in 8-bit integers with a scale per token and per output, and outliers in floating point.

    y = c_x c_w (q V^T) + x_O W'_O^T + b,   x = c_x q + x_O,   W' = c_w V        (arXiv:2208.07339, equation 8)

The product runs in oneDNN's int8 kernel; what stands before and after it, in C++ compiled at first use. Each has a plain
twin in PyTorch, which runs where the fast one is missing.
"""

import ctypes
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from formulary.kernels.native import library, why_not


class Tokens(NamedTuple):
    """Rows in integers: `values` = step * integers, plus what `columns` hold at or above `threshold`."""

    values: Float[Tensor, "tokens in"]
    integers: Int8[Tensor, "tokens in"]
    step: Float[Tensor, "tokens 1"]
    columns: Int[Tensor, "m"]
    threshold: float


def quantize(x: Float[Tensor, "*batch in"], threshold: float) -> Tokens:
    """Every row of `x` rounded to 8 bits by the largest of its absolute values below `threshold`.

    >>> tokens = quantize(torch.tensor([[127.0, -1.0, 500.0]]), threshold=200.0)
    >>> tokens.integers.tolist(), tokens.step.tolist(), tokens.columns.tolist()
    ([[127, -1, 0]], [[1.0]], [2])
    """
    values = x.reshape(-1, x.shape[-1]).float().contiguous()
    native = _native(values)
    if native is None:
        return plain_quantize(values, threshold)
    rows, n = values.shape
    integers, step = torch.empty(rows, n, dtype=torch.int8), torch.empty(rows, 1)
    outlier = torch.zeros(n, dtype=torch.bool)
    native.quantize_rows(_at(values), rows, n, threshold, _at(integers), _at(step), _at(outlier))
    return Tokens(values, integers, step, outlier.nonzero()[:, 0], threshold)


def plain_quantize(values: Float[Tensor, "tokens in"], threshold: float) -> Tokens:
    """The twin of the C++ path of `quantize`."""
    outlier = values.abs() >= threshold
    inliers = values.masked_fill(outlier, 0.0)
    step = (inliers.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    integers = (inliers * step.reciprocal()).round().to(torch.int8)
    return Tokens(values, integers, step, outlier.any(0).nonzero()[:, 0], threshold)


def linear(tokens: Tokens, codes: Int8[Tensor, "out in"], scale: Float[Tensor, "out"], bias: Float[Tensor, "out"] | None):
    """(tokens, out) float32, a piece at a time, so that sums stay in the second-level cache until they are finished.

    >>> x, codes, scale = torch.randn(3, 8), torch.eye(8).to(torch.int8), torch.ones(8)
    >>> torch.allclose(linear(quantize(x, 6.0), codes, scale, None), x, atol=0.02)
    True
    """
    scale, bias = scale.float(), None if bias is None else bias.float()
    multiply = onednn_product if tokens.values.device.type == "cpu" and has_onednn() else plain_product
    weight = (codes[:, tokens.columns].float() * scale[:, None]).mT.contiguous()
    native = _native(tokens.values)
    finish = plain_finish if native is None else _native_finish
    rows, features = len(tokens.values), len(codes)
    out = tokens.values.new_empty(rows, features)
    size = max(64, 2**18 // features)
    for start in range(0, rows, size):
        some = slice(start, start + size)
        piece = tokens._replace(values=tokens.values[some], integers=tokens.integers[some], step=tokens.step[some])
        finish(multiply(piece.integers, codes, scale), piece, bias, weight, out[some])
    return out


def plain_finish(product: Tensor, tokens: Tokens, bias: Tensor | None, weight: Float[Tensor, "m out"], out: Tensor) -> None:
    """out = step * product + bias + outliers @ weight: the twin of the C++ path."""
    torch.mul(product, tokens.step, out=out)
    if bias is not None:
        out += bias
    if len(weight):
        some = tokens.values[:, tokens.columns]
        out.addmm_(torch.where(some.abs() >= tokens.threshold, some, 0.0), weight)


def _native_finish(product: Tensor, tokens: Tokens, bias: Tensor | None, weight: Tensor, out: Tensor) -> None:
    rows, features = out.shape
    library("int8_rows").finish_rows(
        _at(product), rows, features, _at(tokens.step), None if bias is None else _at(bias.contiguous()),
        _at(tokens.values), tokens.values.shape[1], tokens.threshold, _at(tokens.columns), len(weight), _at(weight), _at(out),
    )  # fmt: skip


def plain_product(integers: Int8[Tensor, "tokens in"], codes: Int8[Tensor, "out in"], scale: Float[Tensor, "out"]):
    """(tokens, out) float32: the product of integers, times the scale of each output. The twin of `onednn_product`, in
    float.
    """
    return (integers.float() @ codes.float().mT) * scale


_PREPARED = WeakTensorKeyDictionary()
"""Weights in oneDNN's own layout, for as long as the int8 tensor they were made from lives and is not written to."""


def onednn_product(integers: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The same in oneDNN, exact: sums are in 32 bits."""
    version = 0 if codes.is_inference() else codes._version
    made = _PREPARED.get(codes)
    if made is None or made[0] != version:
        made = (version, torch.ops.onednn.qlinear_prepack(codes, None), torch.zeros(len(codes), dtype=torch.long))
        _PREPARED[codes] = made
    return torch.ops.onednn.qlinear_pointwise(
        integers, 1.0, 0, made[1], scale, made[2], None, 1.0, 0, torch.float32, "none", [], "none"
    )


@cache
def has_onednn() -> bool:
    """Whether oneDNN's int8 product is here, has VNNI instructions, and is exact: without them, sums saturate at 16
    bits.
    """
    if not (hasattr(torch.ops.onednn, "qlinear_pointwise") and torch.backends.mkldnn.is_available()):
        return False
    if not torch.cpu._is_vnni_supported():
        return False
    largest = torch.full((4, 64), 127, dtype=torch.int8)
    seen = onednn_product(largest, -largest, torch.ones(4))
    return bool((seen == -64 * 127 * 127).all())


def path() -> str:
    """Which path runs on this processor, in words."""
    if not has_onednn():
        return "plain (integers multiplied in floating point)"
    missing = why_not("int8_rows")
    return f"oneDNN int8, rounding in PyTorch ({missing})" if missing else "oneDNN int8, rounding in C++"


def _native(values: Tensor) -> ctypes.CDLL | None:
    return _signed() if values.device.type == "cpu" else None


@cache
def _signed() -> ctypes.CDLL | None:
    """The compiled library, its functions typed."""
    made = library("int8_rows")
    if made is not None:
        memory, size, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        made.quantize_rows.argtypes = [memory, size, size, real, memory, memory, memory]
        made.finish_rows.argtypes = [memory, size, size, memory, memory, memory, size, real, memory, size, memory, memory]
        made.quantize_rows.restype = made.finish_rows.restype = None
    return made


def _at(tensor: Tensor) -> int:
    return tensor.data_ptr()
