"""A linear map with 4-bit weights in groups of inputs, each with a scale and a zero point, and inputs rounded to 8 bits.

    y_o = sum_g s[o, g] sum_(b in g) c_b sum_(j in b) q_j (v[o, j] - z[o, g]) + b_o,   x_j = c_b q_j

Inputs are rounded in blocks, each by its largest absolute value: the groups themselves, or where these are long, parts of
them of at most 32. So a huge input costs its own block its precision and nobody else, and no threshold is needed. On x86
it runs in C++ compiled at first use, with AVX-512 VNNI; elsewhere in the plain twin.
"""

import ctypes
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from formulary.kernels import int8
from formulary.kernels.native import library

LONGEST = 32
"""Inputs that are rounded together, at most."""


class Linear(NamedTuple):
    """A 4-bit linear: codes (out, in) and zero points (out, groups) from 0 to 15, scale (out, groups), bias (out,) or None.

    Groups are of `group_size` columns each, a multiple of 8, the last one may be short; column j of the codes belongs to
    input order[j], or j. A module with a method `int4` that gives one can run in a kernel for whole blocks.
    """

    codes: UInt8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero: UInt8[Tensor, "out groups"]
    bias: Float[Tensor, "out"] | None
    group_size: int
    order: Int[Tensor, "in"] | None = None


def linear(x: Float[Tensor, "*batch in"], weights: Linear) -> Float[Tensor, "*batch out"]:
    """float32.

    >>> codes, ones = torch.eye(8).to(torch.uint8), torch.ones(8, 1)
    >>> x = torch.randn(3, 8)
    >>> torch.allclose(linear(x, Linear(codes, ones, 0 * ones.byte(), None, 8)), x, atol=0.02)
    True
    """
    if x.device.type != "cpu" or not available():
        return plain_linear(x, *weights)
    x = x.float().contiguous()
    out = x.new_empty(*x.shape[:-1], len(weights.codes))
    made = Weights(weights)
    _library().linear(ctypes.byref(made.struct), x.data_ptr(), out.numel() // len(weights.codes), out.data_ptr())
    return out


def block_of(group_size: int) -> int:
    """How many inputs are rounded together: the longest part of a group of at most 32 and of whole eights.

    >>> [block_of(size) for size in (8, 32, 64, 128, 96, 136)]
    [8, 32, 32, 32, 32, 8]
    """
    return max(size for size in range(8, LONGEST + 1, 8) if group_size % size == 0)


# ---------------------------------------------------------------- packed weights


class Struct(ctypes.Structure):
    """`Linear4` of int4.hpp."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("packed", "scale", "bias", "order")],
        *[(name, ctypes.c_int64) for name in ("inputs", "outputs", "deep", "wide", "group", "block")],
    ]


class Weights:
    """Weights as the C++ reads them; `struct` points into tensors that live as long as this."""

    def __init__(self, weights: Linear):
        outputs, inputs = weights.codes.shape
        group = _group(weights)
        groups, wide = -(-inputs // group), -(-outputs // 32) * 32
        deep = groups * group
        self.scale, self.bias = torch.zeros(wide), torch.zeros(wide)
        scale = weights.scale.detach().float()
        self.scale[:outputs] = scale.abs().amax(1)
        if weights.bias is not None:
            self.bias[:outputs] = weights.bias.detach()
        self.order = None
        if weights.order is not None:
            self.order = torch.full((deep,), -1, dtype=torch.int32)
            self.order[:inputs] = weights.order
        self.packed = torch.zeros(wide // 16, groups, 8 * group + 48, dtype=torch.uint8)
        pointers = (None if x is None else x.data_ptr() for x in (self.packed, self.scale, self.bias, self.order))
        self.struct = Struct(*pointers, inputs, outputs, deep, wide, group, block_of(group))
        codes = torch.nn.functional.pad(weights.codes, (0, deep - inputs)).contiguous()
        scale = (scale / self.scale[:outputs, None].clamp(min=1e-30)).contiguous()
        zero = weights.zero.contiguous()
        _library().pack(ctypes.byref(self.struct), codes.data_ptr(), scale.data_ptr(), zero.data_ptr())


def _group(weights: Linear) -> int:
    """The size of a group; one that holds the whole row is padded with zeros to whole blocks."""
    inputs = weights.codes.shape[1]
    return -(-inputs // LONGEST) * LONGEST if weights.group_size >= inputs else weights.group_size


# ---------------------------------------------------------------- the plain twin


def plain_linear(x, codes, scale, zero, bias, group_size, order=None) -> Tensor:
    """The twin of `linear` in PyTorch."""
    weights = Linear(codes, scale, zero, bias, group_size, order)
    group = torch.arange(codes.shape[1], device=x.device) // _group(weights)
    x = x.float() if order is None else x.float()[..., order]
    rounded = plain_round(x, block_of(_group(weights)))
    dense = (codes.float() - zero.float()[:, group]) * scale.float()[:, group]
    return torch.nn.functional.linear(rounded, dense, None if bias is None else bias.float())


def plain_round(x: Float[Tensor, "*batch in"], block: int) -> Float[Tensor, "*batch in"]:
    """`x` rounded to 8 bits in blocks.

    >>> plain_round(torch.tensor([127.0, 0.6, -3.2, 0, 0, 0, 0, 0, 1.27, 0.006]), 8).tolist()[:3]
    [127.0, 1.0, -3.0]
    """
    features = x.shape[-1]
    parts = torch.nn.functional.pad(x, (0, -features % block)).unflatten(-1, (-1, block))
    step = (parts.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return ((parts * step.reciprocal()).round() * step).flatten(-2)[..., :features]


# ---------------------------------------------------------------- native


def available() -> bool:
    """Whether the product runs natively here."""
    return int8.level() > 0 and _library() is not None


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled library, its functions typed; None where the processor has nothing for it."""
    made = library("int4")
    if made is None or not made.level():
        return None
    memory, size = ctypes.c_void_p, ctypes.c_int64
    made.pack.argtypes, made.pack.restype = [memory] * 4, None
    made.linear.argtypes, made.linear.restype = [memory, memory, size, memory], None
    return made
