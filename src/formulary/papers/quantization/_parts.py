"""What weight quantizers share: the grid, rounding to the nearest level on it, bit packing, and modules that hold
packed weights.

Notable here: a weight row is cut into groups of columns, each with its own scale s and zero point z; level q stands
for s (q - z). Codes of any width from 2 to 8 bits are packed as planes of 4, 2 and 1 bits (3 = 2 + 1), so that
unpacking is whole-byte arithmetic and a file shrinks by exactly what `bits` says. `round_to_nearest` is the baseline
of every method that chooses levels better.
"""

import inspect
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from formulary.contracts.edits import Editor, Replacement
from formulary.contracts.parts import Linear
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError, UsageError
from formulary.kernels import int4

MIN_FEATURES = 8
"""A linear with fewer inputs is left alone: its scales would weigh as much as its codes."""


# ---------------------------------------------------------------- the grid


@dataclass(frozen=True)
class Grid:
    """A uniform grid per row and group of columns.

    bits: 2 to 8. group_size: columns that share a scale, a multiple of 8; None for whole rows.
    symmetric: levels centered on 0 (zero point 2^(bits-1)) instead of spanning [min, max].
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = False

    def __post_init__(self):
        for name, kind in (("bits", int), ("group_size", int | None), ("symmetric", bool)):
            value = getattr(self, name)
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise UsageError(f"{name}={value!r} is not a valid value for a quantization grid")
        check_range("quantization", "bits", self.bits, 2, 8)
        if self.group_size is not None and (self.group_size < 8 or self.group_size % 8):
            raise UsageError(f"group_size must be a multiple of 8, or None for whole rows, got {self.group_size}")

    def columns(self, in_features: int) -> int:
        """Columns per group: `group_size`, or the whole row (rounded up to 8) when there is one group."""
        whole = -(-in_features // 8) * 8
        return whole if self.group_size is None else min(self.group_size, whole)

    def groups(self, in_features: int) -> int:
        """Number of groups in a row; the last may be short."""
        return -(-in_features // self.columns(in_features))

    def fit(self, values: Float[Tensor, "rows columns"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(scale, zero), each (rows,) float32, of one group; the scale is rounded to `dtype`, in which it will be
        stored.

        Min-max: s = (max - min) / (2^bits - 1), z = round(-min / s), where the range always contains 0, so that 0 is
        a level.
        """
        top = 2**self.bits - 1
        low, high = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scale = ((high - low) / top).to(dtype).float()
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero = torch.full_like(scale, 2 ** (self.bits - 1)) if self.symmetric else (-low / scale).round().clamp(0, top)
        return scale, zero

    def codes(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest level of each value, 0 to 2^bits - 1, as floats."""
        return (values / scale).round().add(zero).clamp(0, 2**self.bits - 1)


@dataclass
class Quantized:
    """A quantized weight: codes (out, in); scale and zero (out, groups); the group of each column, None when they are
    in order.
    """

    codes: UInt8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero: Float[Tensor, "out groups"]
    group_index: Int[Tensor, "in"] | None = None

    def dense(self, grid: Grid) -> Float[Tensor, "out in"]:
        """The weight that the codes stand for, float32."""
        rows, features = self.codes.shape
        if self.group_index is not None:
            return (self.codes.float() - self.zero[:, self.group_index]) * self.scale[:, self.group_index]
        width = grid.columns(features)
        codes = F.pad(self.codes, (0, self.scale.shape[1] * width - features)).view(rows, -1, width)
        return codes.float().sub_(self.zero[..., None]).mul_(self.scale[..., None]).flatten(1)[:, :features]


def round_to_nearest(weight: Float[Tensor, "out in"], grid: Grid, dtype: torch.dtype = torch.float32) -> Quantized:
    """Each weight to its nearest level on the min-max grid, with scales stored in `dtype`.

    >>> weight = torch.tensor([[0.0, 1.0, 2.0, 3.1] * 2])
    >>> round_to_nearest(weight, Grid(bits=2)).codes.tolist()
    [[0, 1, 2, 3, 0, 1, 2, 3]]
    """
    rows, features = weight.shape
    width, groups = grid.columns(features), grid.groups(features)
    padded = F.pad(weight.float(), (0, groups * width - features)).reshape(rows * groups, width)
    scale, zero = grid.fit(padded, dtype)
    codes = grid.codes(padded, scale[:, None], zero[:, None]).to(torch.uint8).view(rows, -1)[:, :features]
    return Quantized(codes, scale.view(rows, groups), zero.view(rows, groups))


# ---------------------------------------------------------------- activations on a fixed grid


def on_grid(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """`x` rounded to the levels s (q - z), 0 <= q < 2^bits, computed in float32 at least, in the dtype of x.

    >>> on_grid(torch.tensor([-1.0, 0.4, 9.0]), torch.tensor(1.0), torch.tensor(1.0), bits=2)
    tensor([-1.,  0.,  2.])
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    scale, zero = scale.to(wide), zero.to(wide)
    return (((x.to(wide) / scale).round() + zero).clamp(0, 2**bits - 1) - zero).mul(scale).to(x.dtype)


# ---------------------------------------------------------------- bit packing


def planes(bits: int) -> list[int]:
    """Widths of the planes that make up a code, highest bits first.

    >>> planes(7)
    [4, 2, 1]
    """
    return [width for width in (8, 4, 2, 1) if bits & width]


def pack(codes: UInt8[Tensor, "*lead columns"], bits: int) -> UInt8[Tensor, "*lead packed"]:
    """Codes below 2^bits, columns a multiple of 8, to columns * bits / 8 bytes.

    >>> pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8), 3).tolist()
    [228, 57, 85]
    """
    packed, low = [], bits
    for width in planes(bits):
        low -= width
        part = ((codes >> low) & (2**width - 1)).unflatten(-1, (8 // width, -1))
        byte = torch.zeros_like(part[..., 0, :])
        for slot in range(8 // width):
            byte |= part[..., slot, :] << (slot * width)
        packed.append(byte)
    return torch.cat(packed, -1)


def unpack(packed: UInt8[Tensor, "*lead packed"], bits: int) -> UInt8[Tensor, "*lead columns"]:
    """The inverse of `pack`.

    >>> unpack(pack(torch.arange(8, dtype=torch.uint8), 3), 3).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    columns = packed.shape[-1] * 8 // bits
    codes, start, low = None, 0, bits
    for width in planes(bits):
        low -= width
        byte = packed[..., start : start + columns * width // 8]
        start += byte.shape[-1]
        slots = [(byte >> (slot * width)) & (2**width - 1) for slot in range(8 // width)] if width < 8 else [byte]
        plane = torch.cat(slots, -1) << low
        codes = plane if codes is None else codes | plane
    return codes


# ---------------------------------------------------------------- modules that hold packed weights


class _Packed(Replacement):
    """Buffers of a packed weight with leading dimensions `lead`: none for a linear, (experts,) for a stack of them."""

    def __init__(self, lead: tuple[int, ...], in_features: int, out_features: int, grid: Grid, ordered: bool):
        super().__init__()
        self.in_features, self.out_features, self.grid, self.ordered = in_features, out_features, grid, ordered
        groups = grid.groups(in_features)
        columns = groups * grid.columns(in_features)
        rows = (*lead, out_features)
        self.register_buffer("codes", torch.zeros(*rows, columns * grid.bits // 8, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(*rows, groups))
        self.register_buffer("zero", None if grid.symmetric else torch.zeros(*rows, groups, dtype=torch.uint8))
        self.register_buffer("group_index", torch.zeros(*lead, in_features, dtype=torch.int32) if ordered else None)

    def store(self, quantized: Quantized, expert: int | None = None) -> None:
        """Take over a quantized weight."""
        at = ... if expert is None else expert
        columns = self.codes.shape[-1] * 8 // self.grid.bits
        self.codes[at] = pack(F.pad(quantized.codes, (0, columns - self.in_features)), self.grid.bits)
        self.scale[at] = quantized.scale.to(self.scale.dtype)
        if self.zero is not None:
            self.zero[at] = quantized.zero.to(torch.uint8)
        if self.group_index is not None:
            self.group_index[at] = quantized.group_index.to(torch.int32)

    def dense(self, expert: Int[Tensor, ""] | int | None = None) -> Float[Tensor, "out in"]:
        """The weight, s (q - z), in the dtype of the scales."""
        codes, scale, zero, index = (_of(expert, b) for b in (self.codes, self.scale, self.zero, self.group_index))
        half = 2 ** (self.grid.bits - 1)
        values = unpack(codes, self.grid.bits).to(scale.dtype)
        if index is not None:
            return (values[:, : self.in_features] - (half if zero is None else zero[:, index])) * scale[:, index]
        values = values.unflatten(1, (scale.shape[1], -1))
        values = (values - (half if zero is None else zero[..., None])) * scale[..., None]
        return values.flatten(1)[:, : self.in_features]

    def extra_repr(self) -> str:
        grid = self.grid
        sizes = f"{self.in_features}, {self.out_features}, bits={grid.bits}, group_size={grid.group_size}"
        return f"{sizes}, symmetric={grid.symmetric}"


class PackedLinear(_Packed):
    """A linear map whose weight is packed integers: dequantized on every call, then multiplied in the activation's
    dtype.

    Input (..., in_features), output (..., out_features). It takes the place of `nn.Linear` and of GPT-2's `Conv1D`.

    >>> layer = PackedLinear(16, 4, bits=3)
    >>> layer.store(round_to_nearest(torch.eye(4, 16), layer.grid))
    >>> layer.codes.shape, torch.equal(layer.weight, torch.eye(4, 16))
    (torch.Size([4, 6]), True)
    """

    slow_because = "packed weights are dequantized to float before each product"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int | None = None,
        symmetric: bool = False,
        bias: bool = False,
        ordered: bool = False,
    ):
        _positive(in_features, out_features)
        super().__init__((), in_features, out_features, Grid(bits, group_size, symmetric), ordered)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The dequantized weight (out_features, in_features)."""
        return self.dense()

    def int4(self) -> int4.Linear | None:
        """The parts, for a kernel that runs a whole block; None for more than 4 bits."""
        if self.grid.bits > 4:
            return None
        codes, zero = unpack(self.codes, self.grid.bits)[:, : self.in_features], self.zero
        if zero is None:
            zero = torch.full_like(self.scale, 2 ** (self.grid.bits - 1), dtype=torch.uint8)
        order = None if self.group_index is None else torch.argsort(self.group_index, stable=True)
        codes = codes if order is None else codes[:, order]
        return int4.Linear(codes, self.scale, zero, self.bias, self.grid.columns(self.in_features), order)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return F.linear(x, self.weight, self.bias)

    @classmethod
    def check_compressed_tensors(cls, part: Linear, grid: Grid, ordered: bool) -> None:
        """Raise FormularyError, saying why, where the layout "pack-quantized" cannot hold `part` on this grid."""
        why, groups = None, grid.group_size and grid.columns(part.in_features)
        if part.layout != "linear":
            why = "it is not an nn.Linear"
        elif ordered:
            why = "its groups are not of neighboring columns; with act_order=true, also set static_groups=true"
        elif groups and part.in_features % grid.group_size:
            why = f"its {part.in_features} inputs are not a multiple of group_size {grid.group_size}"
        if why:
            raise FormularyError(f"compressed-tensors cannot hold {part.name}: {why}")

    def compressed_tensors(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors by their names beside the bias, and the scheme of the weights, of the layout "pack-quantized": bits of
        the codes one after the other in words of 32; zero points alike, along the outputs.
        """
        if type(self).forward is not PackedLinear.forward:
            raise FormularyError(f"compressed-tensors cannot hold a {type(self).__name__}: it does more than its packed weights")
        grid = self.grid
        codes = unpack(self.codes, grid.bits)[:, : self.in_features]
        shape = torch.tensor([self.out_features, self.in_features])
        tensors = {"weight_packed": words(codes, grid.bits), "weight_scale": self.scale, "weight_shape": shape}
        if self.zero is not None:
            tensors["weight_zero_point"] = words(self.zero.mT, grid.bits).mT.contiguous()
        strategy = {"strategy": "channel"} if grid.group_size is None else {"strategy": "group", "group_size": grid.group_size}
        return tensors, {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric, "dynamic": False, **strategy}


def words(codes: UInt8[Tensor, "rows columns"], bits: int) -> Int[Tensor, "rows words"]:
    """Codes of `bits` bits one after the other, lowest bit first, in words of 32 bits; the last is filled with zeros.

    >>> words(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist()
    [[801]]
    """
    stream = (codes.cpu()[..., None] >> torch.arange(bits, dtype=torch.uint8)) & 1
    stream = stream.flatten(1)
    stream = F.pad(stream, (0, -stream.shape[1] % 32)).unflatten(1, (-1, 8))
    bytes_ = (stream << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return bytes_.view(torch.int32)


class PackedStack(_Packed):
    """One 3-D expert tensor as packed integers; indexing gives an expert's weight as the model stores it."""

    def __init__(self, experts: int, in_features: int, out_features: int, grid: Grid, ordered: bool, transposed: bool):
        _positive(experts, in_features, out_features)
        super().__init__((experts,), in_features, out_features, grid, ordered)
        self.transposed = transposed

    def __getitem__(self, expert) -> Float[Tensor, "rows columns"]:
        weight = self.dense(expert)
        return weight.mT if self.transposed else weight

    def detach(self) -> Float[Tensor, "experts rows columns"]:
        """The whole tensor, dequantized."""
        return torch.stack([self[expert] for expert in range(self.codes.shape[0])]).detach()


class PackedExperts:
    """Holds expert tensors of a mixture of experts as packed integers, by becoming the class of the experts module.

    The module computes expert by expert, as transformers' own loop does: the fused implementations need dense tensors.
    """

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        name: str,
        parameter: str,
        bits: int,
        group_size: int | None = None,
        symmetric: bool = False,
        ordered: bool = False,
    ) -> nn.Module:
        """Replace the 3-D tensor `parameter` of the experts module `name`."""
        module = model.get_submodule(name)
        raw = module._parameters.get(parameter)
        if raw is None or raw.ndim != 3:
            raise FormularyError(f"{name} has no 3-D expert tensor {parameter!r} to pack")
        transposed = bool(getattr(module, "is_transposed", False))
        rows, columns = raw.shape[1:]
        out_features, in_features = (columns, rows) if transposed else (rows, columns)
        grid = Grid(bits, group_size, symmetric)
        stack = PackedStack(raw.shape[0], in_features, out_features, grid, ordered, transposed)
        if not isinstance(module, cls):
            loop = inspect.unwrap(type(module).forward)
            members = {"__module__": cls.__module__, "forward": loop}
            module.__class__ = type(f"Packed{type(module).__name__}", (cls, type(module)), members)
        del module._parameters[parameter]
        module.add_module(f"packed_{parameter}", stack)
        return module

    def __getattr__(self, name: str):
        packed = self.__dict__.get("_modules", {}).get(f"packed_{name}")
        return packed if packed is not None else super().__getattr__(name)


def _of(expert: Tensor | int | None, buffer: Tensor | None) -> Tensor | None:
    """The expert's part of a buffer; a tensor index is not turned into a number, which would break a compiled graph."""
    if buffer is None or expert is None:
        return buffer
    return buffer.index_select(0, expert.reshape(1)).squeeze(0) if isinstance(expert, Tensor) else buffer[expert]


def _positive(*sizes: int) -> None:
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise UsageError(f"sizes of a packed weight must be positive integers, got {sizes}")


def replace(edit: Editor, part: Linear, quantized: list[Quantized], grid: Grid) -> nn.Module:
    """Put packed weights in the place of `part`: one `Quantized`, or one per expert."""
    ordered = quantized[0].group_index is not None
    shape = {"bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric, "ordered": ordered}
    if part.experts:
        name = part.name.rpartition(".")[0]
        stack = getattr(edit.edit(name, PackedExperts, parameter=part.parameter, **shape), f"packed_{part.parameter}")
        for expert, one in enumerate(quantized):
            stack.store(one, expert)
        return stack
    sizes = {"in_features": part.in_features, "out_features": part.out_features, "bias": part.bias is not None}
    new = edit.edit(part.name, PackedLinear, **sizes, **shape)
    new.store(quantized[0])
    if part.bias is not None:
        new.bias = part.bias
    return new
