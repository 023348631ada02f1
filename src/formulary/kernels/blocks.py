"""A whole Transformer block with int8 or 4-bit linears, or a stack of them, in C++ compiled at first use: what passes between its
parts stays in the cache.

    post-norm: m = norm1(x + out(attention(x))),  y = norm2(m + down(act(up(m))))
    pre-norm:  m = x + out(attention(norm1(x))),  y = m + down(act(up(norm2(m))))

Linears are those of `kernels.int8` or of `kernels.int4`; attention of more than a few queries runs in bfloat16 with float32 sums
where the processor has instructions for it (AMX tiles, AVX-512 BF16), elsewhere in float32. The plain twin is the same block in
PyTorch.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formulary.kernels import encoder, int4, int8
from formulary.kernels.native import library

Linear = int8.Linear | int4.Linear

ACTIVATIONS = {
    "GELUActivation": (0, nn.functional.gelu),
    "GELU": (0, nn.functional.gelu),
    "NewGELUActivation": (1, lambda x: nn.functional.gelu(x, approximate="tanh")),
    "GELUTanh": (1, lambda x: nn.functional.gelu(x, approximate="tanh")),
    "SiLUActivation": (2, nn.functional.silu),
    "SiLU": (2, nn.functional.silu),
    "ReLU": (3, nn.functional.relu),
    "QuickGELUActivation": (4, lambda x: x * torch.sigmoid(1.702 * x)),
}


class Norm(NamedTuple):
    """A LayerNorm, or without a shift an RMSNorm."""

    weight: Tensor
    shift: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        if self.shift is None:
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.shift, self.eps)


@dataclass(frozen=True)
class Block:
    """What a block computes: `activation` is a class name of ACTIVATIONS; queries have `heads` heads of `width`, keys and
    values `groups`. All linears are of one kind, and those of one input have the same groups and order of it.
    """

    query: Linear
    key: Linear
    value: Linear
    out: Linear
    up: Linear
    gate: Linear | None
    down: Linear
    norm1: Norm
    norm2: Norm
    activation: str
    norm_first: bool
    heads: int
    groups: int
    width: int
    scale: float


def plain_encode(block: Block, x: Float[Tensor, "T D"], starts: Int[Tensor, "n"]) -> Float[Tensor, "T D"]:
    """The block over sequences that stand one after the other; sequence s holds the tokens starts[s] to starts[s + 1]."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = (part.unflatten(-1, (-1, block.width)) for part in (query, key, value))
        return encoder.plain_attention(*heads, starts, scale=block.scale).flatten(1)

    return _plain_block(block, x, attend)


def plain_decode(block: Block, x: Tensor, cosine: Tensor, sine: Tensor, keys: Tensor, values: Tensor, past: int) -> Tensor:
    """The twin of `Stack.decode` for one block, `keys` and `values` (B,G,room,K)."""
    length = x.shape[1]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (-1, block.width)).transpose(1, 2) for part in (query, key, value))
        query, key = (part * cosine[:, None] + _half_turned(part) * sine[:, None] for part in (query, key))
        keys[:, :, past : past + length], values[:, :, past : past + length] = key, value
        seen = torch.ones(length, past + length, dtype=torch.bool).tril(past)
        out = nn.functional.scaled_dot_product_attention(
            query, keys[:, :, : past + length], values[:, :, : past + length], attn_mask=seen, scale=block.scale, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(2)

    return _plain_block(block, x, attend)


def _half_turned(x: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat([-right, left], -1)


def _plain_block(block: Block, x: Tensor, attend: Callable) -> Tensor:
    b = block
    seen = b.norm1(x) if b.norm_first else x
    attended = attend(*(_plain(linear, seen) for linear in (b.query, b.key, b.value)))
    middle = x + _plain(b.out, attended)
    middle = middle if b.norm_first else b.norm1(middle)
    seen = b.norm2(middle) if b.norm_first else middle
    act = ACTIVATIONS[b.activation][1]
    inner = _plain(b.up, seen)
    inner = act(inner) if b.gate is None else act(_plain(b.gate, seen)) * inner
    out = middle + _plain(b.down, inner)
    return out if b.norm_first else b.norm2(out)


def _plain(linear: Linear, x: Tensor) -> Tensor:
    return (int8 if isinstance(linear, int8.Linear) else int4).plain_linear(x, *linear)


def fits(block: Block) -> bool:
    """Whether the kernel covers the linears of a block: all of one kind, and those of one input alike."""
    b = block
    if len({type(x) for x in (b.query, b.key, b.value, b.out, b.up, b.gate or b.up, b.down)}) > 1:
        return False
    return _alike(b.query, b.key, b.value) and (b.gate is None or _alike(b.gate, b.up))


def _alike(*linears: Linear) -> bool:
    one = linears[0]
    if isinstance(one, int8.Linear):
        return all(x.threshold == one.threshold for x in linears)
    return all(x.group_size == one.group_size and _same(x.order, one.order) for x in linears)


def _same(order: Tensor | None, other: Tensor | None) -> bool:
    return order is other or order is not None and other is not None and torch.equal(order, other)


# ---------------------------------------------------------------- native


class _Shape(ctypes.Structure):
    """`Shape` of blocks.cpp."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("weight1", "shift1", "weight2", "shift2")],
        *[(name, ctypes.c_float) for name in ("eps1", "eps2", "scale")],
        *[(name, ctypes.c_int32) for name in ("bits", "norm_first", "activation", "gated")],
        *[(name, ctypes.c_int64) for name in ("heads", "groups", "width")],
    ]


class _Int8Block(_Shape):
    """`Block<Linear>` of blocks.cpp."""

    _fields_ = [(name, int8.Struct) for name in ("joint", "out", "up", "down")]


class _Int4Block(_Shape):
    """`Block<Linear4>` of blocks.cpp."""

    _fields_ = [(name, int4.Struct) for name in ("joint", "out", "up", "down")]


class Native:
    """A block as the C++ reads it, its weights packed."""

    def __init__(self, block: Block):
        b = block
        up = b.up if b.gate is None else _in_turns(b.gate, b.up)
        self.weights = [_packed(_joined(b.query, b.key, b.value)), _packed(b.out), _packed(up), _packed(b.down)]
        self.norms = [_float(x) for norm in (b.norm1, b.norm2) for x in (norm.weight, norm.shift)]
        self.groups, self.width = b.groups, b.width
        kind, bits = (_Int8Block, 8) if isinstance(b.out, int8.Linear) else (_Int4Block, 4)
        self.struct = kind(
            *(None if x is None else x.data_ptr() for x in self.norms), b.norm1.eps, b.norm2.eps, b.scale,
            bits, b.norm_first, ACTIVATIONS[b.activation][0], b.gate is not None, b.heads, b.groups, b.width,
            *(weights.struct for weights in self.weights),
        )  # fmt: skip


class Stack:
    """Blocks that run one after the other in one call, and the norm of what comes out, if any."""

    def __init__(self, blocks: list[Native], norm: Norm | None = None):
        self.blocks, self.groups, self.width = blocks, blocks[0].groups, blocks[0].width
        self.norm = None if norm is None else Norm(_float(norm.weight), _float(norm.shift), norm.eps)
        self.structs = (ctypes.c_void_p * len(blocks))(*(ctypes.addressof(block.struct) for block in blocks))

    def encode(self, x: Float[Tensor, "T D"], starts: Int[Tensor, "n"]) -> Float[Tensor, "T D"]:
        """As `plain_encode`, one block after the other; float32."""
        x, starts = x.contiguous(), starts.to(torch.int64).contiguous()
        out = torch.empty_like(x)
        _library().encode(
            self.structs, len(self.blocks), x.data_ptr(), starts.data_ptr(), len(starts) - 1, int8.level(), out.data_ptr()
        )
        return out

    def decode(
        self,
        x: Float[Tensor, "B L D"],
        cosine: Float[Tensor, "#B L K"],
        sine: Float[Tensor, "#B L K"],
        memory: Float[Tensor, "blocks 2 B G room K"],
        past: int,
        normed: bool = False,
    ) -> Float[Tensor, "B L D"]:
        """The causal blocks over L tokens that follow `past` others, whose rotated keys and values `memory` holds for each
        block; those of the L tokens are written behind them. As `plain_decode`, one block after the other; then, when
        `normed`, the norm.
        """
        (batch, length, features), room = x.shape, memory.shape[4]
        if not (memory[0].is_contiguous() and past + length <= room):
            raise ValueError(f"{past} + {length} tokens need contiguous memory with room for them, got {tuple(memory.shape)}")
        x, cosine, sine = x.contiguous(), _spread(cosine, batch), _spread(sine, batch)
        out = torch.empty_like(x)
        weight, shift, eps = self.norm if normed else (None, None, 0.0)
        _library().decode(
            self.structs, len(self.blocks), x.data_ptr(), batch, length, features, cosine.data_ptr(), sine.data_ptr(),
            memory.data_ptr(), memory.stride(0), room, past, *(None if x is None else x.data_ptr() for x in (weight, shift)), eps,
            int8.level(), out.data_ptr(),
        )  # fmt: skip
        return out


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float().contiguous()


def _spread(x: Tensor, batch: int) -> Tensor:
    return (x if len(x) == batch else x.expand(batch, -1, -1)).contiguous()


def available() -> bool:
    """Whether blocks run natively here."""
    return int8.level() > 0 and _library() is not None


def in_halves() -> bool:
    """Whether attention of more than a few queries runs in bfloat16 here."""
    return available() and bool(_library().in_halves())


def _packed(linear: Linear) -> int8.Weights | int4.Weights:
    return int8.Weights(*linear) if isinstance(linear, int8.Linear) else int4.Weights(linear)


PER_OUTPUT = ("codes", "scale", "zero", "bias")


def _joined(*linears: Linear) -> Linear:
    """Linears of one input as one, their outputs one after the other."""
    biases = [x.scale.new_zeros(len(x.codes)) if x.bias is None else x.bias for x in linears]
    linears = [x._replace(bias=bias) for x, bias in zip(linears, biases)]
    return _over_outputs(lambda *parts: torch.cat(parts), *linears)


def _in_turns(gate: Linear, up: Linear) -> Linear:
    """16 outputs of the gate, 16 of the other, and so on, padded with zeros."""
    half = len(up.codes)
    rows = -(-half // 16) * 16

    def turns(x: Tensor) -> Tensor:
        whole = x.new_zeros(2, rows, *x.shape[1:])
        whole[:, :half] = x.unflatten(0, (2, half))
        return whole.unflatten(1, (rows // 16, 16)).transpose(0, 1).flatten(0, 2)

    return _over_outputs(turns, _joined(gate, up))


def _over_outputs(change: Callable, *linears: Linear) -> Linear:
    """The first linear, what it has for each output changed: change(of the first, of the second, ...)."""
    names = [name for name in PER_OUTPUT if name in linears[0]._fields]
    return linears[0]._replace(**{name: change(*(getattr(x, name) for x in linears)) for name in names})


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled library, its functions typed."""
    made = library("blocks")
    if made is not None and int8.level():
        memory, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        made.encode.argtypes, made.encode.restype = [memory, size, memory, memory, size, number, memory], None
        made.decode.argtypes = [
            memory, size, memory, *[size] * 3, *[memory] * 3, *[size] * 3, memory, memory, ctypes.c_float, number, memory
        ]  # fmt: skip
        made.decode.restype = None
    return made
