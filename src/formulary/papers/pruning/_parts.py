"""What rooms of this family share: a block's attention and feed-forward as units that can go, and their real removal.

A unit is a head (with grouped keys and values, a group of heads) or a neuron of the feed-forward. `sublayers` finds
where they are, `shrink` takes them out: the linears become smaller ones, so weights, files and time fall, and the
edits are replayed from sizes alone. A room that uses `shrink` exports `SlicedLinear`, `FewerHeads` and `Removed`
beside its method.

>>> from formulary.lab import small
>>> found, reasons = sublayers(small.tiny("llama"))
>>> [(sublayer.role, sublayer.units, sublayer.span) for sublayer in found[:2]], reasons
([('attention', 2, 16), ('feed-forward', 64, 1)], {})
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formulary.contracts import Replacement, parts
from formulary.contracts.attention import CROSS
from formulary.contracts.edits import Editor

_COUNTS = ("num_heads", "num_attention_heads", "n_heads")


class SlicedLinear(nn.Linear, Replacement):
    """A linear with fewer inputs or outputs than what it replaces: (..., in_features) -> (..., out_features)."""


class Removed(Replacement):
    """A linear whose inputs are all gone: (..., anything) -> (..., out_features), its bias or zeros at every token."""

    def __init__(self, out_features: int, bias: bool):
        super().__init__()
        self.in_features, self.out_features = 0, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @property
    def weight(self) -> Tensor:
        """(out_features, 0): no weights."""
        return torch.empty(self.out_features, 0) if self.bias is None else self.bias.detach()[:, None][:, :0]

    def forward(self, x: Tensor) -> Tensor:
        value = x.new_zeros(1) if self.bias is None else self.bias
        return value.expand(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"out_features={self.out_features}, bias={self.bias is not None}"


class FewerHeads:
    """Tells a self-attention module how many heads its smaller linears give."""

    @classmethod
    def attach(cls, model: nn.Module, name: str, heads: int) -> nn.Module:
        """Set the module's head count, and what its constructor derived from it."""
        module = model.get_submodule(name)
        for count in _COUNTS:
            if hasattr(module, count):
                if hasattr(module, "all_head_size"):
                    module.all_head_size = module.all_head_size // getattr(module, count) * heads
                setattr(module, count, heads)
        return module


@dataclass(frozen=True)
class Sublayer:
    """The attention or the feed-forward of one block, named by its output projection.

    Each linear of `into` has `units` equal runs of outputs, and `out` has `units` runs of `span` inputs.
    """

    role: str
    block: parts.Block
    into: tuple[parts.Linear, ...]
    out: parts.Linear
    units: int
    mixer: parts.Part | None = None

    @property
    def name(self) -> str:
        return self.out.name

    @property
    def span(self) -> int:
        """Inputs of `out` per unit: the head width (times the heads of a group), or 1."""
        return self.out.in_features // self.units

    @property
    def unit_weights(self) -> int:
        """Weights of one unit, biases left out, which is its multiplications per token without the attention map."""
        return (sum(part.weights for part in self.into) + self.out.weights) // self.units

    @property
    def weights(self) -> int:
        """Number of weights and biases."""
        linears = (*self.into, self.out)
        return sum(part.weights + (0 if part.bias is None else part.bias.numel()) for part in linears)

    def macs(self, tokens: int) -> int:
        """Multiplications of one unit over a sequence of `tokens`, the attention map (both products) included."""
        return tokens * self.unit_weights + (2 * tokens * tokens * self.span if self.role == "attention" else 0)


def sublayers(
    model: nn.Module, targets: Sequence[str] = (), ignore: Sequence[str] = ()
) -> tuple[list[Sublayer], dict[str, str]]:
    """(every attention and feed-forward in order, why a part of the others has none: name -> reason).

    `targets` and `ignore` choose by the names of output projections. Cross-attention is left out.
    """
    found, reasons = [], {}
    linears, mixers = parts.linears(model), {part.block.name: part for part in parts.mixers(model)}
    for block in parts.blocks(model):
        inside = [part for part in linears if part.name.startswith(f"{block.name}.")]
        inside = [part for part in inside if not any(piece in CROSS for piece in part.name.split("."))]
        mixer, attention = mixers.get(block.name), []
        if mixer is not None:
            attention = [part for part in inside if part.name.startswith(f"{mixer.name}.")]
            after = [part for part in inside if part not in attention]
            attention += after[:1] if len(attention) == 3 else []
            sublayer = _attention(block, mixer, attention)
            _file(sublayer, mixer.name, found, reasons)
        feed_forward = [part for part in inside if part not in attention]
        _file(_feed_forward(block, feed_forward), f"{block.name} feed-forward", found, reasons)
    chosen = parts.select([(sublayer.name, sublayer.out.module) for sublayer in found], targets, ignore)
    return [found[i] for i in chosen], reasons


def _file(sublayer: Sublayer | str, name: str, found: list[Sublayer], reasons: dict[str, str]) -> None:
    if isinstance(sublayer, str):
        reasons[name] = sublayer
    else:
        found.append(sublayer)


def _attention(block: parts.Block, mixer: parts.Part, linears: list[parts.Linear]) -> Sublayer | str:
    if len(linears) != 4:
        return "its query, key, value and output are no four linears"
    *into, out = linears
    head_dim, rest = divmod(out.in_features, mixer.heads)
    if rest or any(part.out_features % head_dim for part in into):
        return "its linears do not divide into its heads"
    if getattr(mixer.module, "has_relative_attention_bias", None) is not None:
        return "its heads have position biases of their own"
    units = min(part.out_features for part in into) // head_dim
    return Sublayer("attention", block, tuple(into), out, units, mixer)


def _feed_forward(block: parts.Block, linears: list[parts.Linear]) -> Sublayer | str:
    if any(part.experts for part in linears):
        return "experts' neurons are not told apart"
    if len(linears) not in (2, 3) or any(part.out_features != linears[-1].in_features for part in linears[:-1]):
        return "it is no pair or triple of linears around its neurons"
    return Sublayer("feed-forward", block, tuple(linears[:-1]), linears[-1], linears[-1].in_features)


def unit_norms(sublayer: Sublayer) -> Float[Tensor, "units"]:
    """The squared norm of all weights of each unit, in float32."""
    into = [part.weight().float().square().sum(1) for part in sublayer.into]
    every = [*into, sublayer.out.weight().float().square().sum(0)]
    return sum(squares.unflatten(0, (sublayer.units, -1)).sum(1) for squares in every)


def runs(units: Int[Tensor, "kept"], length: int) -> Int[Tensor, "rows"]:
    """The indices of the runs of `length` that belong to `units`.

    >>> runs(torch.tensor([0, 2]), 3).tolist()
    [0, 1, 2, 6, 7, 8]
    """
    return (units[:, None] * length + torch.arange(length, device=units.device)).flatten()


@torch.no_grad()
def shrink(edit: Editor, sublayer: Sublayer, keep: Sequence[int], *, bias: bool = True) -> None:
    """Leave only the units `keep` (indices in rising order) in the sublayer; with none left, `bias` keeps its output
    bias.

    A removed unit is exactly one whose inputs to `out` are zero.
    """
    units = torch.as_tensor(list(keep), dtype=torch.long, device=sublayer.out.raw.device)
    for part in sublayer.into:
        rows = runs(units, part.out_features // sublayer.units)
        if len(units):
            _slice(edit, part, part.weight()[rows], None if part.bias is None else part.bias[rows])
        else:
            edit.edit(part.name, Removed, out_features=part.out_features // sublayer.units, bias=False)
    if len(units):
        _slice(edit, sublayer.out, sublayer.out.weight()[:, runs(units, sublayer.span)], sublayer.out.bias)
    else:
        old = sublayer.out.bias if bias else None
        new = edit.edit(sublayer.name, Removed, out_features=sublayer.out.out_features, bias=old is not None)
        if old is not None:
            new.bias.copy_(old)
    if sublayer.mixer is not None:
        heads = sublayer.mixer.heads // sublayer.units * max(1, len(units))
        edit.edit(sublayer.mixer.name, FewerHeads, heads=heads)


def _slice(edit: Editor, part: parts.Linear, weight: Tensor, bias: Tensor | None) -> None:
    rows, columns = weight.shape
    kept = weight.clone(), None if bias is None else bias.detach().clone()
    new = edit.edit(part.name, SlicedLinear, in_features=columns, out_features=rows, bias=bias is not None)
    new.weight.copy_(kept[0])
    if bias is not None:
        new.bias.copy_(kept[1])
