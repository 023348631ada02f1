"""A linear map in 8-bit integers whose weights come in 4x1 blocks, four outputs that share one input, most of them zero.

    y = c_x c_w (q V^T) + b,   q = round(x / c_x),   c_x = max |x| / 127 for each token        (arXiv:2306.16601)

V is stored compressed: `pointers` (rows of blocks + 1) says where the blocks of each four outputs begin, `columns` (blocks)
which input each of them has, `values` (blocks, 4) the integers of its four outputs. With AVX-512 VNNI it runs in C++
compiled at first use; elsewhere in the plain twin. Sums of integers are exact on both.
"""

import ctypes
from functools import cache

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from formulary.errors import FormularyError
from formulary.kernels import int8
from formulary.kernels.native import library, why_not

BLOCK = 4
"""Outputs of a block."""

PANEL = 64
"""Outputs that the C++ works on at once."""

MOST_INPUTS = 65_536
"""Beyond so many, sums might leave 32 bits and columns 16."""


def linear(
    x: Float[Tensor, "*batch in"],
    pointers: Int[Tensor, "pointers"],
    columns: Int[Tensor, "blocks"],
    values: Int8[Tensor, "blocks 4"],
    scale: Float[Tensor, "out"],
    bias: Float[Tensor, "out"] | None,
) -> Float[Tensor, "*batch out"]:
    """float32. A token with a value that is not finite gives NaN. Raises FormularyError when the blocks do not fit.

    >>> x, blocks = torch.randn(3, 8), compress(torch.eye(8).to(torch.int8))
    >>> torch.allclose(linear(x, *blocks, torch.ones(8), None), x, atol=0.02)
    True
    """
    if x.device.type != "cpu" or not level():
        return plain_linear(x, pointers, columns, values, scale, bias)
    x = x.float().contiguous()
    weights = _prepared(x.shape[-1], pointers, columns, values, scale, bias)
    out = x.new_empty(*x.shape[:-1], len(scale))
    rows = x.numel() // x.shape[-1]
    _library().linear(weights.address, x.data_ptr(), rows, torch.get_num_threads(), out.data_ptr())
    return out


# ---------------------------------------------------------------- the compressed format


def compress(
    codes: Int8[Tensor, "out in"], keep: Bool[Tensor, "rows in"] | None = None
) -> tuple[Int[Tensor, "pointers"], Int[Tensor, "blocks"], Int8[Tensor, "blocks 4"]]:
    """(pointers, columns, values) of the blocks to keep, by default those that are not all zero; a last row of fewer than
    four outputs is filled with zeros.

    >>> [part.tolist() for part in compress(torch.tensor([[0, 5], [0, 6]], dtype=torch.int8))]
    [[0, 1], [1], [[5, 6, 0, 0]]]
    """
    blocks = F.pad(codes, (0, 0, 0, -len(codes) % BLOCK)).unflatten(0, (-1, BLOCK)).transpose(1, 2)
    keep = blocks.ne(0).any(2) if keep is None else keep
    pointers = F.pad(keep.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return pointers, keep.nonzero()[:, 1].to(column_type(codes.shape[1])), blocks[keep].contiguous()


def column_type(inputs: int) -> torch.dtype:
    """The smallest integers that hold a column of so many inputs.

    >>> column_type(768), column_type(65_536)
    (torch.int16, torch.int32)
    """
    return torch.int16 if inputs <= 32_768 else torch.int32


def decompress(
    pointers: Int[Tensor, "pointers"], columns: Int[Tensor, "blocks"], values: Int8[Tensor, "blocks 4"], inputs: int, outputs: int
) -> Int8[Tensor, "out in"]:
    """The inverse of `compress`.

    >>> codes = torch.randint(-9, 9, (6, 5)).to(torch.int8)
    >>> torch.equal(decompress(*compress(codes), 5, 6), codes)
    True
    """
    rows = _rows(pointers, columns, values, inputs, outputs)
    blocks = values.new_zeros(-(-outputs // BLOCK), inputs, BLOCK)
    blocks[rows, columns.long()] = values
    return blocks.transpose(1, 2).flatten(0, 1)[:outputs].contiguous()


def _rows(pointers: Tensor, columns: Tensor, values: Tensor, inputs: int, outputs: int) -> Int[Tensor, "blocks"]:
    """The row of each block. Raises FormularyError for blocks that do not fit: they may come from a damaged file."""
    counts = pointers.diff()
    fits = len(counts) == -(-outputs // BLOCK) and int(pointers[0]) == 0 and int(pointers[-1]) == len(columns) == len(values)
    if not fits or int(counts.min()) < 0:
        raise FormularyError(f"pointers of a block-sparse weight of {outputs} outputs do not fit its {len(values)} blocks")
    if inputs > MOST_INPUTS:
        raise FormularyError(f"a block-sparse weight may have up to {MOST_INPUTS} inputs, not {inputs}")
    rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    rising = ((columns.diff() > 0) | (rows.diff() > 0)).all()
    if len(columns) and not (rising and 0 <= int(columns.min()) <= int(columns.max()) < inputs):
        raise FormularyError(f"columns of a block-sparse weight must rise within each row, from 0 to at most {inputs - 1}")
    return rows


# ---------------------------------------------------------------- packed weights


class Struct(ctypes.Structure):
    """`Sparse` of sparse_int8.cpp."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("quads", "first", "sums", "scale", "bias")],
        *[(name, ctypes.c_int64) for name in ("inputs", "outputs", "wide")],
    ]


class Weights:
    """Weights as the C++ reads them, blocks in fours; `address` is that of a struct that points into tensors that live as
    long as this.
    """

    def __init__(self, inputs: int, pointers: Tensor, columns: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None):
        outputs = len(scale)
        wide = -(-outputs // PANEL) * PANEL
        row, counts = _rows(pointers, columns, values, inputs, outputs), pointers.diff().long()
        first = F.pad((-(-counts // 4)).cumsum(0), (1, wide // BLOCK - len(counts)))
        first[len(counts) + 1 :] = first[len(counts)]
        place = 4 * first[row] + torch.arange(len(row)) - pointers[row].long()
        quads = torch.zeros(int(first[-1]), 24, dtype=torch.uint8)
        fours = torch.zeros(4 * len(quads), dtype=torch.int16)
        fours[place] = columns.to(torch.int32).to(torch.int16)
        quads[:, :8] = fours.view(torch.uint8).view(-1, 8)
        bytes_ = torch.zeros(4 * len(quads), BLOCK, dtype=torch.int8)
        bytes_[place] = values
        quads[:, 8:] = bytes_.view(-1, 4, BLOCK).mT.reshape(-1, 16).view(torch.uint8)
        sums = torch.zeros(wide // BLOCK, BLOCK, dtype=torch.int32).index_add_(0, row, values.to(torch.int32))
        self.quads, self.first, self.sums = quads, first.to(torch.int32), -128 * sums.flatten()
        self.scale, self.bias = torch.zeros(wide), torch.zeros(wide)
        self.scale[:outputs] = scale.detach()
        if bias is not None:
            self.bias[:outputs] = bias.detach()
        pointed = (self.quads, self.first, self.sums, self.scale, self.bias)
        self.struct = Struct(*(part.data_ptr() for part in pointed), inputs, outputs, wide)
        self.address = ctypes.addressof(self.struct)


_PREPARED = WeakTensorKeyDictionary()
"""Packed weights, for as long as the values that they were made from live and nothing was written to them."""


def _prepared(inputs: int, pointers: Tensor, columns: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Weights:
    """The weights packed, at the first call and whenever they were written to."""
    state = (inputs, *((id(part), int8.version(part)) for part in (pointers, columns, values, scale, bias)))
    made = _PREPARED.get(values)
    if made is None or made[0] != state:
        made = _PREPARED[values] = (state, Weights(inputs, pointers, columns, values, scale, bias))
    return made[1]


# ---------------------------------------------------------------- the plain twin


def plain_linear(x, pointers, columns, values, scale, bias) -> Tensor:
    """The twin of `linear` in PyTorch: decompressed weights, in oneDNN's int8 product or in double precision."""
    tokens = x.reshape(-1, x.shape[-1]).float()
    finite = tokens.isfinite().all(1, keepdim=True)
    integers, step, _ = int8.plain_quantize(tokens.masked_fill(~finite, 0.0), float("inf"))
    codes, scale = decompress(pointers, columns, values, x.shape[-1], len(scale)), scale.float()
    if x.device.type == "cpu" and int8.has_onednn():
        out = int8.onednn_product(integers, codes, scale)
    else:
        out = (integers.double() @ codes.double().mT).float() * scale
    out *= torch.where(finite, step, torch.nan)
    if bias is not None:
        out += bias.float()
    return out.view(*x.shape[:-1], len(scale))


# ---------------------------------------------------------------- which path


def level() -> int:
    """0: no native path here; 1: AVX-512 VNNI."""
    return 1 if _library() else 0


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled library, its functions typed; None where the processor has nothing for it."""
    made = library("sparse_int8")
    if made is None or not made.level():
        return None
    memory, size = ctypes.c_void_p, ctypes.c_int64
    made.linear.argtypes, made.linear.restype = [memory, memory, size, size, memory], None
    return made


def path() -> str:
    """Which path runs on this processor, in words."""
    if level():
        return "block-sparse AVX-512 VNNI in C++"
    missing = why_not("sparse_int8") or "this processor has no AVX-512 VNNI"
    dense = "oneDNN int8" if int8.has_onednn() else "double precision"
    return f"decompressed weights in {dense}, rounding in PyTorch ({missing})"
