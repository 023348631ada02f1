"""Attention, or a whole block, in one native kernel."""

from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from formulary.contracts import Attention, BlockEdit, layouts
from formulary.errors import FormularyError
from formulary.kernels import blocks, encoder, int8

from . import caching
from .packing import PACKED


class FusedAttention(Attention):
    """Softmax attention by the native kernel; what it does not cover (a bias, a mask with structure) by PyTorch's."""

    @classmethod
    def full_budget(cls) -> dict:
        return {}

    def attend(
        self,
        query: Float[Tensor, "B H L K"],
        key: Float[Tensor, "B H S K"],
        value: Float[Tensor, "B H S K"],
        *,
        mask: Bool[Tensor, "#B #H L S"] | None = None,
        bias: Float[Tensor, "#B #H L S"] | None = None,
        scale: float | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "B H L K"]:
        batch, heads, length, width = query.shape
        if mask is not None or bias is not None or key.shape[2] != length or torch.compiler.is_compiling():
            plain = mask if bias is None else bias if mask is None else bias.masked_fill(~mask, -torch.inf)
            plain = plain if plain is None or plain.dtype == torch.bool else plain.to(query.dtype)
            return nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=plain, scale=scale, is_causal=causal
            )
        starts = _starts(batch, length, query.device)
        flat = (x.transpose(1, 2).reshape(batch * length, heads, -1) for x in (query, key, value))
        out = encoder.attention(*flat, starts, scale=scale, causal=causal)
        return out.view(batch, length, heads, width).transpose(1, 2)


def _starts(batch: int, length: int, device: torch.device) -> Int[Tensor, "n"]:
    """Where the sequences begin, and the last one ends, in tokens that stand one after the other."""
    if PACKED.starts is not None:
        return PACKED.starts
    return torch.arange(0, batch * length + 1, length, device=device)


class FusedBlock:
    """Runs a block in one kernel as soon as all its linears are int8 (`int8()`), by becoming the block's class.

    What the kernel does not cover runs as before: gradients, a mask, a cache of another kind than `DynamicCache`, hooks on
    what is inside, other edits of the block, a causal block in bfloat16.
    """

    @classmethod
    def attach(cls, model: nn.Module, name: str) -> nn.Module:
        """Swap the class of the block `name`."""
        block = model.get_submodule(name)
        if layouts.find(block) is None:
            raise FormularyError(f"{name} ({type(block).__name__}) has no layout that is known to the kernel")
        title = f"{cls.__name__}{type(block).__name__}"
        block.__class__ = type(title, (cls, type(block)), {"__module__": cls.__module__})
        return block

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args, **kwargs):
        plain = self._plain_call(hidden_states, attention_mask) and all(x is None for x in args)
        if plain and (packed := self._packed()) is not None:
            run = self._decode if packed.causal else self._encode
            out = run(packed.native, hidden_states, **kwargs)
            if out is not None:
                return out
        return super().forward(hidden_states, attention_mask, *args, **kwargs)

    def _encode(self, native: blocks.Native, hidden: Float[Tensor, "B L D"], **kwargs) -> Float[Tensor, "B L D"] | None:
        if any(isinstance(x, Tensor) for x in kwargs.values()) or kwargs.get("cache") is not None:
            return None
        batch, length, width = hidden.shape
        starts = _starts(batch, length, hidden.device)
        out = native.encode(hidden.detach().float().reshape(batch * length, width), starts)
        return out.to(hidden.dtype).view(batch, length, width)

    def _decode(
        self,
        native: blocks.Native,
        hidden: Float[Tensor, "B L D"],
        *,
        cache=None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> Float[Tensor, "B L D"] | None:
        if hidden.dtype != torch.float32 or position_embeddings is None:
            return None
        batch, length, _ = hidden.shape
        index = self.self_attn.layer_idx
        if cache is None:
            keys, values = (hidden.new_empty(batch, native.groups, length, native.width) for _ in range(2))
            return native.decode(hidden, *position_embeddings, keys, values, 0)
        room = caching.room(cache, index, (batch, native.groups, length, native.width))
        if room is None:
            return None
        out = native.decode(hidden, *position_embeddings, room.keys, room.values, room.past)
        room.show(cache.layers[index], length)
        return out

    def _plain_call(self, hidden: Tensor, mask: Tensor | None) -> bool:
        """Whether this call asks for nothing but the block's output."""
        if self.training or mask is not None or torch.compiler.is_compiling() or hidden.device.type != "cpu":
            return False
        if torch.is_grad_enabled() and (hidden.requires_grad or any(x.requires_grad for x in self.parameters())):
            return False
        return not isinstance(self, BlockEdit)

    def _packed(self) -> "Packed | None":
        """The packed block, packed again when something in it was changed; None when it cannot run natively."""
        made = _PACKED.get(self)
        if made is None or not made.is_what(self):
            layout = layouts.find(self)
            block = None if layout is None else described(layout)
            made = Packed(self, layout, block) if block is not None and blocks.available() else None
            if made is None or not made.is_what(self):  # somebody's hooks are inside
                return None
            _PACKED[self] = made
        return made


class Packed:
    """A block as the kernel takes it, and what it was made from."""

    def __init__(self, module: nn.Module, layout: layouts.Layout, block: blocks.Block):
        self.native, self.causal = blocks.Native(block), layout.causal
        self.children = [
            (parent._modules, name, child, type(child))
            for parent in module.modules()
            for name, child in parent._modules.items()
            if child is not None
        ]
        self.tensors = [
            (held, name, tensor, int8.version(tensor))
            for part in module.modules()
            for held in (part._parameters, part._buffers)
            for name, tensor in held.items()
            if tensor is not None
        ]
        self.thresholds = [(linear, linear.int8().threshold) for linear in layout.linears]

    def is_what(self, module: nn.Module) -> bool:
        """Whether the block is still made of the same modules and values, and nobody looks at what flows inside."""
        for modules, name, child, kind in self.children:
            if modules.get(name) is not child or type(child) is not kind or child._forward_hooks or child._forward_pre_hooks:
                return False
        if any(linear.threshold != threshold for linear, threshold in self.thresholds):
            return False
        return all(held.get(name) is tensor and int8.version(tensor) == seen for held, name, tensor, seen in self.tensors)


_PACKED: WeakKeyDictionary = WeakKeyDictionary()
"""What `FusedBlock`s packed, beside the modules, so that these can be copied and saved."""


def described(layout: layouts.Layout) -> blocks.Block | None:
    """The block as the kernel takes it; None unless its linears are int8 and the rest is of a known kind."""
    if any(not hasattr(linear, "int8") for linear in layout.linears):
        return None
    if type(layout.activation).__name__ not in blocks.ACTIVATIONS:
        return None
    norms = [_norm(norm) for norm in (layout.norm1, layout.norm2)]
    if None in norms:
        return None
    query, key, value, out, up, down = (
        linear.int8() for linear in (layout.query, layout.key, layout.value, layout.out, layout.up, layout.down)
    )
    return blocks.Block(
        query, key, value, out, up, None if layout.gate is None else layout.gate.int8(), down, *norms,
        type(layout.activation).__name__, layout.norm_first, layout.heads, layout.groups, layout.width, layout.scale,
    )  # fmt: skip


def _norm(norm: nn.Module) -> blocks.Norm | None:
    if type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None:
        return blocks.Norm(norm.weight, norm.bias, norm.eps)
    if type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon"):
        return blocks.Norm(norm.weight, None, norm.variance_epsilon)
    return None
