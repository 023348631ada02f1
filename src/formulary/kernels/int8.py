"""A linear map in 8-bit integers with a scale per token and per output, and outliers in floating point.

    y = c_x c_w (q V^T) + x_O W'_O^T + b,   x = c_x q + x_O,   W' = c_w V        (arXiv:2208.07339, equation 8)

On x86 it runs in C++ compiled at first use, on AMX tiles or AVX-512 VNNI, from weights packed once; elsewhere in the plain
twin, whose product is oneDNN's where that is exact. Sums of integers are exact on every path.
"""

import ctypes
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from formulary.kernels.native import library, why_not


def linear(
    x: Float[Tensor, "*batch in"],
    codes: Int8[Tensor, "out in"],
    scale: Float[Tensor, "out"],
    bias: Float[Tensor, "out"] | None,
    threshold: float,
) -> Float[Tensor, "*batch out"]:
    """float32. Every row of x is rounded to 8 bits by the largest of its absolute values below `threshold`; what is at
    or above stays as it is.

    >>> x, codes, scale = torch.randn(3, 8), torch.eye(8).to(torch.int8), torch.ones(8)
    >>> torch.allclose(linear(x, codes, scale, None, 6.0), x, atol=0.02)
    True
    """
    native = level()
    if x.device.type != "cpu" or not native:
        return plain_linear(x, codes, scale, bias, threshold)
    x = x.float().contiguous()
    weights = prepared(codes, scale, bias, threshold)
    out = x.new_empty(*x.shape[:-1], len(codes))
    _library().linear(ctypes.byref(weights.struct), x.data_ptr(), out.numel() // len(codes), native, out.data_ptr())
    return out


class Linear(NamedTuple):
    """An int8 linear: codes (out, in), scale (out,), bias (out,) or None. A module with a method `int8` that gives one, and
    its `threshold`, can run in a kernel for whole blocks.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    threshold: float


# ---------------------------------------------------------------- packed weights


class Struct(ctypes.Structure):
    """`Linear` of int8.hpp."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("packed", "sums", "scale", "bias")],
        *[(name, ctypes.c_int64) for name in ("inputs", "outputs", "deep", "wide")],
        ("threshold", ctypes.c_float),
    ]


class Weights:
    """Weights as the C++ reads them; `struct` points into tensors that live as long as this."""

    def __init__(self, codes: Int8[Tensor, "out in"], scale: Tensor, bias: Tensor | None, threshold: float):
        outputs, inputs = codes.shape
        deep, wide = -(-inputs // 64) * 64, -(-outputs // 32) * 32
        self.packed = torch.zeros(wide // 16, deep // 4, 16, 4, dtype=torch.int8)
        self.sums = torch.zeros(wide, dtype=torch.int32)
        self.scale, self.bias = torch.zeros(wide), torch.zeros(wide)
        self.scale[:outputs] = scale.detach()
        if bias is not None:
            self.bias[:outputs] = bias.detach()
        codes = codes.contiguous()
        _library().pack(codes.data_ptr(), outputs, inputs, deep, self.packed.data_ptr(), self.sums.data_ptr())
        pointers = (x.data_ptr() for x in (self.packed, self.sums, self.scale, self.bias))
        self.struct = Struct(*pointers, inputs, outputs, deep, wide, threshold)


_PREPARED = WeakTensorKeyDictionary()
"""Packed weights, for as long as the int8 tensor they were made from lives and nothing was written to them."""


def prepared(codes: Tensor, scale: Tensor, bias: Tensor | None, threshold: float) -> Weights:
    """The weights packed, at the first call and whenever they were written to."""
    state = (*((id(x), version(x)) for x in (codes, scale, bias)), threshold)
    made = _PREPARED.get(codes)
    if made is None or made[0] != state:
        made = _PREPARED[codes] = (state, Weights(codes, scale, bias, threshold))
    return made[1]


def version(tensor: Tensor | None) -> int:
    """Changes whenever the tensor was written to, as far as torch keeps count."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


# ---------------------------------------------------------------- the plain twin


class Tokens(NamedTuple):
    """Rows in integers, values = step * integers + outliers."""

    integers: Int8[Tensor, "tokens in"]
    step: Float[Tensor, "tokens 1"]
    outliers: Float[Tensor, "tokens in"]


def plain_linear(x, codes, scale, bias, threshold) -> Tensor:
    """The twin of `linear` in PyTorch."""
    integers, step, outliers = plain_quantize(x.reshape(-1, x.shape[-1]).float(), threshold)
    scale = scale.float()
    product = onednn_product if x.device.type == "cpu" and has_onednn() else plain_product
    out = product(integers, codes, scale).mul_(step)
    if bias is not None:
        out += bias.float()
    columns = (outliers != 0).any(0).nonzero()[:, 0]
    if len(columns):
        out += outliers[:, columns] @ (codes[:, columns].float() * scale[:, None]).mT
    return out.view(*x.shape[:-1], len(codes))


def plain_quantize(values: Float[Tensor, "tokens in"], threshold: float) -> Tokens:
    """Rows rounded to 8 bits.

    >>> tokens = plain_quantize(torch.tensor([[127.0, -1.0, 500.0]]), threshold=200.0)
    >>> tokens.integers.tolist(), tokens.step.tolist(), tokens.outliers.tolist()
    ([[127, -1, 0]], [[1.0]], [[0.0, 0.0, 500.0]])
    """
    outlier = ~(values.abs() < threshold)
    inliers = values.masked_fill(outlier, 0.0)
    step = (inliers.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    integers = (inliers * step.reciprocal()).round().to(torch.int8)
    return Tokens(integers, step, torch.where(outlier, values, 0.0))


def plain_product(integers: Int8[Tensor, "tokens in"], codes: Int8[Tensor, "out in"], scale: Float[Tensor, "out"]):
    """(tokens, out) float32: the product of integers, times the scale of each output. The twin of `onednn_product`, in
    float.
    """
    return (integers.float() @ codes.float().mT) * scale


def onednn_product(integers: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The same in oneDNN, exact: sums are in 32 bits. Integers go in unsigned, with 128 as their zero, since for signed ones
    oneDNN has nothing but its reference product where there is no AMX, which is a thousand times slower.
    """
    shifted = integers.view(torch.uint8) ^ 128
    weight = torch.ops.onednn.qlinear_prepack(codes, None)
    zeros = torch.zeros(len(codes), dtype=torch.long)
    return torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, 128, weight, scale, zeros, None, 1.0, 0, torch.float32, "none", [], "none"
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


# ---------------------------------------------------------------- which path


def level() -> int:
    """0: no native path here; 1: AVX-512 VNNI; 2: AMX."""
    return _library().level() if _library() else 0


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled library, its functions typed; None where the processor has nothing for it."""
    made = library("int8")
    if made is None or not made.level():
        return None
    memory, size = ctypes.c_void_p, ctypes.c_int64
    made.pack.argtypes, made.pack.restype = [memory, size, size, size, memory, memory], None
    made.linear.argtypes, made.linear.restype = [memory, memory, size, ctypes.c_int32, memory], None
    return made


def path() -> str:
    """Which path runs on this processor, in words."""
    if found := level():
        return ("AVX-512 VNNI in C++", "AMX int8 in C++")[found - 1]
    missing = why_not("int8") or "this processor has no AVX-512 VNNI"
    return f"oneDNN int8, rounding in PyTorch ({missing})" if has_onednn() else f"integers in floating point ({missing})"
