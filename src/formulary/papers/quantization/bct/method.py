"""BCT rounds everything in a Transformer to integers, in small blocks that each have a power of two as their scale.

    s = 2^ceil(log2(max |x| / (2^(k-1) - 1))),   q = round(x / s),   for each block of x, k = 4 or 8 bits

so that sums over blocks need integer products and shifts alone. Weights and embeddings are stored so; the inputs of
linears, both products of attention, and what goes into and out of norms and activation functions are rounded so as they
come. exp (softmax) and the activation functions then take one of 256 values each, and are tables. No data, no training.

Source: arXiv:2304.01483, section 3. Emulated in floating point: the values are those of the integers, the products are
not integer. We could not verify the paper's block and table sizes: a block is `block` neighbors of one row; scores and
attention weights have one scale a row, since blocks of keys would shift with padding; exp is a table of 8 bits; mean
and variance of norms, and the softmax's division, are taken in floating point of rounded numbers. Biases and the norms'
own parameters are kept as they are.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2CLS

from formulary.contracts import Attention, Data, Replacement, Report, Transform, parts
from formulary.contracts.edits import Editor
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError, UsageError

from .._parts import MIN_FEATURES, pack, unpack

_FUNCTIONS = tuple({cls[0] if isinstance(cls, tuple) else cls for cls in ACT2CLS.values()})


def shifts(x: Float[Tensor, "*lead columns"], bits: int, block: int) -> Int[Tensor, "*lead blocks"]:
    """The exponent of each block's scale; a block of zeros has the smallest, -126.

    >>> shifts(torch.tensor([[127.0, 3.0, 128.0, 0.0]]), bits=8, block=2)
    tensor([[0, 1]], dtype=torch.int32)
    """
    x = F.pad(x.detach().float(), (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    mantissa, exponent = torch.frexp(x.abs().amax(-1) / (2 ** (bits - 1) - 1))
    return (exponent - (mantissa == 0.5).int()).clamp(min=-126, max=126).masked_fill(mantissa == 0, -126)


def in_blocks(x: Float[Tensor, "*lead columns"], bits: int, block: int) -> Float[Tensor, "*lead columns"]:
    """x rounded block by block along its last dimension, in its own dtype; the rounding passes gradients through.

    >>> in_blocks(torch.tensor([1.0, 0.3, 100.0, 0.3]), bits=8, block=2).tolist()
    [1.0, 0.296875, 100.0, 0.0]
    """
    scale = torch.exp2(shifts(x, bits, block).float())
    scale = scale.repeat_interleave(block, -1)[..., : x.shape[-1]]
    rounded = ((x.detach().float() / scale).round() * scale).to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded


# ---------------------------------------------------------------- parts


class _Stored(Replacement):
    """Rows of numbers as packed integers, with a shift for each block of `block` neighbors in a row.

    `like` is there for its dtype, which is that of what is read.
    """

    def __init__(self, rows: int, columns: int, bits: int, block: int):
        super().__init__()
        if rows < 1 or columns < 1:
            raise UsageError(f"sizes of block-wise weights must be positive, got {rows} and {columns}")
        _check(bits, block)
        self.rows, self.columns, self.bits, self.block = rows, columns, bits, block
        blocks = -(-columns // block)
        self.register_buffer("codes", torch.zeros(rows, blocks * block * bits // 8, dtype=torch.uint8))
        self.register_buffer("shifts", torch.zeros(rows, blocks, dtype=torch.int8))
        self.register_buffer("like", torch.zeros(()))

    def store(self, weight: Float[Tensor, "rows columns"]) -> None:
        """Round `weight` to integers; it is a little smaller than `bits / 32` of float32."""
        weight, half = F.pad(weight.float(), (0, -self.columns % self.block)), 2 ** (self.bits - 1)
        shift = shifts(weight, self.bits, self.block)
        codes = (weight.unflatten(-1, (-1, self.block)) / torch.exp2(shift.float())[..., None]).round() + half
        self.codes.copy_(pack(codes.flatten(1).to(torch.uint8), self.bits))
        self.shifts.copy_(shift)

    def dense(self, rows: Int[Tensor, "*some"] | None = None) -> Float[Tensor, "*some columns"]:
        """The numbers that the integers stand for, of all rows or of some."""
        codes, shift = (self.codes, self.shifts) if rows is None else (self.codes[rows], self.shifts[rows])
        values = unpack(codes, self.bits).to(self.like.dtype) - 2 ** (self.bits - 1)
        values = values.unflatten(-1, (-1, self.block)) * torch.exp2(shift.to(self.like.dtype))[..., None]
        return values.flatten(-2)[..., : self.columns]

    @property
    def weight(self) -> Float[Tensor, "rows columns"]:
        """All of them, (rows, columns)."""
        return self.dense()

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.columns}, bits={self.bits}, block={self.block}"


class BlockLinear(_Stored):
    """A linear map whose weight is stored in blocks; its input is rounded to `activation_bits` (0: not at all)."""

    slow_because = "integers in blocks are turned to floating point before each product"

    def __init__(
        self, in_features: int, out_features: int, bits: int, block: int, activation_bits: int = 8, bias: bool = False
    ):
        super().__init__(out_features, in_features, bits, block)
        if activation_bits not in (0, 4, 8):
            raise UsageError(f"bct: activation_bits must be 4, 8, or 0 for none, got {activation_bits}")
        self.in_features, self.out_features, self.activation_bits = in_features, out_features, activation_bits
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if self.activation_bits:
            x = in_blocks(x, self.activation_bits, self.block)
        return F.linear(x, self.weight, self.bias)


class BlockEmbedding(_Stored):
    """A table of embeddings stored in blocks: indices to rows."""

    def __init__(self, num_embeddings: int, embedding_dim: int, bits: int, block: int, padding_idx: int | None = None):
        super().__init__(num_embeddings, embedding_dim, bits, block)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch D"]:
        return self.dense(ids)


class _Rounds:
    """Rounds a module's input and output to 8 bits in blocks, by becoming the module's class."""

    @classmethod
    def attach(cls, model: nn.Module, name: str, block: int) -> nn.Module:
        """Swap the class of the module `name`."""
        module = model.get_submodule(name)
        if isinstance(module, _Rounds):
            raise FormularyError(f"{name} is rounded in blocks already: bct cannot be applied twice")
        title = f"{cls.__name__}{type(module).__name__}"
        module.__class__ = type(title, (cls, type(module)), {"__module__": cls.__module__})
        module.bct_block = block
        return module

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return in_blocks(super().forward(in_blocks(x, 8, self.bct_block), *args, **kwargs), 8, self.bct_block)


class BlockNorm(_Rounds):
    """A norm between rounded numbers."""


class BlockActivation(_Rounds):
    """An activation function of 8-bit integers to 8-bit integers: for each shift, a table of 256 entries."""


class BlockAttention(Attention):
    """Attention in 8-bit integers with power-of-two scales; exp is a table of at most 255 entries of 8 bits."""

    equals_sdpa = False

    def __init__(self, block: int = 64):
        super().__init__()
        _check(8, block)
        self.block = block

    def attend(
        self,
        query: Float[Tensor, "B H L K"],
        key: Float[Tensor, "B H S K"],
        value: Float[Tensor, "B H S V"],
        *,
        mask: Bool[Tensor, "#B #H L S"] | None = None,
        bias: Float[Tensor, "#B #H L S"] | None = None,
        scale: float | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "B H L V"]:
        """Attention output; a query that may see no key gets zeros."""
        q, k, v = (in_blocks(x, 8, self.block).float() for x in (query, key, value))
        scores = q @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if bias is not None:
            scores = scores + bias
        if causal:
            seen = torch.ones(1, 1, *scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            mask = seen if mask is None else mask & seen
        hidden = scores < torch.finfo(torch.float32).min / 2 if mask is None else ~mask | (scores < -1e30)
        scores = in_blocks(scores.masked_fill(hidden, 0.0), 8, scores.shape[-1]).masked_fill(hidden, -torch.inf)
        below = scores - scores.amax(-1, keepdim=True).clamp(min=-1e30)
        table = below.exp()
        table = table + ((255 * table).round() / 255 - table).detach()
        weights = table / table.sum(-1, keepdim=True).clamp(min=1e-30)
        return (in_blocks(weights, 8, weights.shape[-1]) @ v).to(query.dtype)


# ---------------------------------------------------------------- the method


@dataclass(frozen=True, kw_only=True)
class BCT(Transform):
    """Weights of linears inside the blocks at `bits`, embeddings and everything that is computed at 8.

    bits: 4 or 8. block: neighbors that share a shift, a multiple of 8. everything: round activations, attention, norms
    and activation functions too; otherwise weights and embeddings alone. Tables tied to a head, or shared by several
    modules, and expert tensors stay as they are, and the report says so. Raises UsageError for other values.

    >>> from formulary.lab import tiny
    >>> model, report = BCT(bits=4, block=32).apply(tiny("bert"))
    >>> round(report.figures["linear weights: bytes of float32 / bytes stored"], 2)
    7.53
    """

    bits: int = 4
    block: int = 64
    everything: bool = True

    unit = "part"
    shift_invariant = False

    def __post_init__(self):
        super().__post_init__()
        _check(self.bits, self.block)

    def run(self, model: nn.Module, data: Data | None, edit: Editor, report: Report) -> None:
        stored = weights = 0
        for part in parts.linears(model, self.targets, self.ignore):
            if part.experts:
                report.skipped(part.name, "expert tensors stay as they are", part.weights)
                continue
            if part.in_features < MIN_FEATURES:
                report.skipped(part.name, f"fewer than {MIN_FEATURES} inputs", part.weights)
                continue
            sizes = {"in_features": part.in_features, "out_features": part.out_features, "bias": part.bias is not None}
            rounds = 8 if self.everything else 0
            weight, bias = part.weight(), part.bias
            new = edit.edit(part.name, BlockLinear, **sizes, bits=self.bits, block=self.block, activation_bits=rounds)
            new.store(weight)
            if bias is not None:
                new.bias = bias
            stored += new.codes.numel() + new.shifts.numel()
            weights += part.weights
            report.changed(part.name, part.weights, f"{self.bits} bits")
        if weights:
            report.figures["linear weights: bytes of float32 / bytes stored"] = 4 * weights / stored
        if not self.targets:
            self._embeddings(model, edit, report)
        if self.everything and weights:
            self._operations(model, edit, report)

    def _embeddings(self, model: nn.Module, edit: Editor, report: Report) -> None:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, nn.Embedding) and not parts.matches(name, module, self.ignore):
                names.setdefault(id(module.weight), []).append(name)
        for found in names.values():
            table = model.get_submodule(found[0])
            if len(found) > 1 or (head is not None and getattr(head, "weight", None) is table.weight):
                report.skipped(found[0], "a table that is tied stays as it is", table.weight.numel())
            elif type(table) is not nn.Embedding:
                report.skipped(found[0], "a table that is read in a way of its own", table.weight.numel())
            else:
                weight = table.weight.detach().clone()
                sizes = {"num_embeddings": table.num_embeddings, "embedding_dim": table.embedding_dim}
                sizes["padding_idx"] = table.padding_idx
                edit.edit(found[0], BlockEmbedding, **sizes, bits=8, block=self.block).store(weight)
                report.changed(found[0], weight.numel(), "8 bits")

    def _operations(self, model: nn.Module, edit: Editor, report: Report) -> None:
        for mixer in parts.mixers(model):
            try:
                edit.edit(mixer.name, BlockAttention, block=self.block)
            except FormularyError as error:
                report.note(f"products of attention stay in floating point: {error}")
        counts = {"norms": 0, "activation functions": 0}
        inside = tuple(f"{block.name}." for block in parts.blocks(model))
        for name, module in list(model.named_modules()):
            if not name.startswith(inside) or list(module.children()):
                continue
            if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
                edit.edit(name, BlockNorm, block=self.block)
                counts["norms"] += 1
            elif isinstance(module, _FUNCTIONS):
                edit.edit(name, BlockActivation, block=self.block)
                counts["activation functions"] += 1
        report.figures["rounded besides linears"] = counts


def _check(bits: int, block: int) -> None:
    if bits not in (4, 8):
        raise UsageError(f"bct: bits must be 4 or 8, got {bits}")
    check_range("bct", "block", block, 8, 65536)
    if block % 8:
        raise UsageError(f"bct: block must be a multiple of 8, got {block}")
