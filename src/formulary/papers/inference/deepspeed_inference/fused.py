"""Attention, a whole block, or a whole stack of blocks in one native kernel."""

import threading
from collections.abc import Callable
from operator import attrgetter, is_
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from formulary.contracts import Attention, BlockEdit, layouts
from formulary.errors import FormularyError
from formulary.kernels import blocks, encoder

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
    """Runs a block in one kernel as soon as all its linears are in integers (`int8()` or `int4()`), by becoming the
    block's class.

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
        if RUNNING.left:
            return RUNNING.passed(self, hidden_states, attention_mask, kwargs)
        out = None
        if attention_mask is None and all(x is None for x in args):
            out = self._natively(hidden_states, kwargs)
        return super().forward(hidden_states, attention_mask, *args, **kwargs) if out is None else out

    def _natively(self, hidden: Tensor, kwargs: dict) -> Tensor | None:
        """What all blocks of the running stack give when this is its first one, else this one alone; None where the kernel
        does not cover it.
        """
        if torch.compiler.is_compiling() or hidden.device.type != "cpu" or torch.is_grad_enabled() and hidden.requires_grad:
            return None
        modules = RUNNING.stack.blocks() if RUNNING.stack is not None else [self]
        run = _decode if layouts.find(self).causal else _encode
        if modules[0] is self and len(modules) > 1 and (stack := _packed_stack(RUNNING.stack, modules)) is not None:
            return run(stack, modules, hidden, RUNNING.ahead, **kwargs)
        native = _packed_block(self)
        return None if native is None else run(blocks.Stack([native]), [self], hidden, _at_once, **kwargs)


def _encode(
    stack: blocks.Stack, modules: list[nn.Module], hidden: Float[Tensor, "B L D"], hand_over: Callable, **kwargs
) -> Float[Tensor, "B L D"] | None:
    if any(isinstance(x, Tensor) for x in kwargs.values()) or kwargs.get("cache") is not None:
        return None
    batch, length, width = hidden.shape
    out = stack.encode(hidden.detach().float().reshape(batch * length, width), _starts(batch, length, hidden.device))
    return hand_over(out.to(hidden.dtype).view(batch, length, width), None, lambda: None)


def _decode(
    stack: blocks.Stack,
    modules: list[nn.Module],
    hidden: Float[Tensor, "B L D"],
    hand_over: Callable,
    *,
    cache=None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs,
) -> Float[Tensor, "B L D"] | None:
    """What causal `modules` give; `hand_over(output, position_embeddings, finish)` calls `finish` when the cache may show it."""
    if hidden.dtype != torch.float32 or position_embeddings is None:
        return None
    batch, length, _ = hidden.shape
    shape = (batch, stack.groups, length, stack.width)
    if cache is None:  # keys and values are of no use to anybody else: all blocks have the same place for them
        memory = hidden.new_empty(1, 2, *shape).expand(len(modules), -1, -1, -1, -1, -1)
        return hand_over(stack.decode(hidden, *position_embeddings, memory, 0), position_embeddings, lambda: None)
    room = caching.room_for(cache, modules[0].self_attn.layer_idx, len(modules), shape)
    if room is None:
        return None

    def finish() -> None:
        room.past, room.writer, room.unchecked = room.past + length, ref(stack), 0

    return hand_over(stack.decode(hidden, *position_embeddings, room.memory, room.past), position_embeddings, finish)


def _at_once(output: Tensor, positions: tuple[Tensor, Tensor] | None, finish: Callable[[], None]) -> Tensor:
    finish()
    return output


# ---------------------------------------------------------------- all blocks of a stack at once


class Astray(Exception):
    """A stack asked something else of its blocks than what the first one had computed for all."""


class Running(threading.local):
    """The `FusedStack` whose forward is running, and how far: `result` is what all its blocks gave, `left` are those that are
    still to be asked, the last one first.
    """

    stack: "FusedStack | None" = None
    left: list[nn.Module] = []

    def start(self, stack: "FusedStack | None") -> None:
        self.stack, self.left, self.result, self.positions, self.finish = stack, [], None, None, None

    def ahead(self, result: Tensor, positions: tuple[Tensor, Tensor] | None, finish: Callable[[], None]) -> Tensor:
        """The first block gave what all give."""
        self.left, self.result, self.positions, self.finish = self.stack.blocks()[:0:-1], result, positions, finish
        return result

    def passed(self, block: nn.Module, hidden: Tensor, mask: Tensor | None, kwargs: dict) -> Tensor:
        """The next block is asked."""
        expected = self.left.pop() is block and hidden is self.result
        if not expected or mask is not None or kwargs.get("position_embeddings") is not self.positions:
            raise Astray
        if not self.left:
            self.finish()
        return hidden


RUNNING = Running()


class FusedStack:
    """Runs all blocks of a stack in one call of the kernel, by becoming the stack's class: its first block computes
    what all give, and the others pass that on.

    When the stack asks anything else of them (only some, in another order, not what the block before gave), all is done
    again block by block. Once a causal stack's cache was written in one call, the tokens that follow run without the stack's
    own forward, which would take as long as a third of the weights; what the blocks are made of is then looked at with every
    CHECKED-th.
    """

    @classmethod
    def attach(cls, model: nn.Module, name: str, blocks: str) -> nn.Module:
        """Swap the class of the stack `name`, whose blocks are the list `blocks` in it."""
        stack = model.get_submodule(name)
        if isinstance(stack, cls):
            raise FormularyError(f"{name} already runs its blocks at once: deepspeed-inference cannot be applied twice")
        base = type(stack)  # whose name the new class keeps, since transformers looks up by it what can be recorded
        stack.__class__ = type(base.__name__, (cls, base), {"__module__": base.__module__, "__qualname__": base.__qualname__})
        stack.fused_blocks = blocks
        return stack

    def blocks(self) -> list[nn.Module]:
        return list(self._modules[self.fused_blocks]._modules.values())

    def forward(self, *args, **kwargs):
        if RUNNING.stack is not None or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        out = None if args else self._continued(**kwargs)
        if out is not None:
            return out
        RUNNING.start(self)
        try:
            out = super().forward(*args, **kwargs)
            if not RUNNING.left:
                return out
        except Astray:
            pass
        finally:
            RUNNING.start(None)
        return super().forward(*args, **kwargs)

    def _continued(
        self,
        *,
        input_ids: Int[Tensor, "B L"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache=None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast | None:
        """The next tokens of a generation that is under way, or None."""
        packed = _STACKS.get(self, (None, None))[1]
        if packed is None or packed.norm is None or torch.is_grad_enabled() or self.training or input_ids is None:
            return None
        room = caching.room_of(cache, *input_ids.shape)
        if room is None or room.writer() is not packed or room.unchecked >= CHECKED:
            return None
        if any(value for name, value in kwargs.items() if name != "return_dict") or kwargs.get("return_dict") is False:
            return None
        if _observed(self.config):
            return None
        past, (_, length) = room.past, input_ids.shape
        if attention_mask is not None and not (attention_mask.shape[1:] == (past + length,) and attention_mask.all()):
            return None
        positions = torch.arange(past, past + length)[None]
        if position_ids is not None and not torch.equal(position_ids, positions.expand_as(position_ids)):
            return None
        hidden = self.embed_tokens(input_ids)
        if hidden.dtype != torch.float32:
            return None
        out = packed.decode(hidden, *self.rotary_emb(hidden, position_ids=positions), room.memory, past, normed=True)
        room.past, room.unchecked = past + length, room.unchecked + 1
        return BaseModelOutputWithPast(last_hidden_state=out, cache=cache)


CHECKED = 16


def _observed(config) -> bool:
    """Whether the model gives more than its last states, or gives them as a tuple."""
    return config.output_hidden_states or config.output_attentions or not config.return_dict


def _final_norm(stack: nn.Module) -> nn.Module | None:
    """What norms the last block's output in a stack that does nothing else than embed, run its blocks and norm."""
    bases = [base.__name__ for base in type(stack).__mro__ if base.__module__.startswith("transformers.models.")]
    return stack.norm if {"LlamaModel", "Qwen2Model"} & {*bases} else None


# ---------------------------------------------------------------- packed blocks

VERSION, TRAINING, THRESHOLD = attrgetter("_version"), attrgetter("training"), attrgetter("threshold")


class Origin:
    """What packed blocks were made from. It is asked for every token, hence the lists that C loops over; it holds no block,
    so that these can go.
    """

    def __init__(self, modules: list[nn.Module]):
        self.blocks, self.block_kinds = [ref(block) for block in modules], [*map(type, modules)]
        every = [part for block in modules for part in block.modules()]
        self.parts = [part for part in every if all(part is not block for block in modules)]
        self.kinds = [*map(type, self.parts)]
        held = [
            (members, name, x)
            for part in every
            for members in (part._modules, part._parameters, part._buffers)
            for name, x in members.items()
            if x is not None
        ]
        self.holders, self.names, self.held = ([*column] for column in zip(*held))
        self.counted = [x for x in self.held if isinstance(x, Tensor) and not x.is_inference()]
        self.versions = [*map(VERSION, self.counted)]
        self.trained = [x for x in self.held if isinstance(x, nn.Parameter)]
        self.linears = [part for part in self.parts if hasattr(part, "int8")]
        self.thresholds = [*map(THRESHOLD, self.linears)]
        watched = self.parts if len(modules) == 1 else every  # who looks at a block alone sees what it gives alone
        self.hooks = [hooks for part in watched for hooks in (part._forward_hooks, part._forward_pre_hooks)]

    def is_current(self, modules: list[nn.Module]) -> bool:
        """Whether `modules` are still these blocks, made of the same modules and values."""
        return (
            [block() for block in self.blocks] == modules
            and all(map(is_, map(type, modules), self.block_kinds))
            and all(map(is_, map(type, self.parts), self.kinds))
            and all(map(is_, map(dict.get, self.holders, self.names), self.held))
            and [*map(VERSION, self.counted)] == self.versions
            and [*map(THRESHOLD, self.linears)] == self.thresholds
        )

    def is_plain(self, modules: list[nn.Module]) -> bool:
        """Whether nobody trains, or looks at what flows inside."""
        trains = torch.is_grad_enabled() and any(x.requires_grad for x in self.trained)
        return not trains and not any(self.hooks) and not any(map(TRAINING, modules))


_BLOCKS: WeakKeyDictionary = WeakKeyDictionary()
_STACKS: WeakKeyDictionary = WeakKeyDictionary()
"""(origin, packed) of blocks and of stacks, beside the modules, so that these can be copied and saved; packed is None where the
kernel does not cover them.
"""


def _packed_block(block: nn.Module, observed: bool = False) -> blocks.Native | None:
    """The packed block, packed again when something in it was changed; None when it cannot run natively now."""
    origin, native = _BLOCKS.get(block, (None, None))
    if origin is None or not origin.is_current([block]):
        found = layouts.find(block) if blocks.available() and not isinstance(block, BlockEdit) else None
        described_ = None if found is None else described(found)
        origin, native = _BLOCKS[block] = Origin([block]), None if described_ is None else blocks.Native(described_)
    return native if native is not None and (observed or origin.is_plain([block])) else None


def _packed_stack(stack: FusedStack, modules: list[nn.Module]) -> blocks.Stack | None:
    """The same for all blocks of a stack."""
    origin, packed = _STACKS.get(stack, (None, None))
    modules = [*modules, *([norm] if (norm := _final_norm(stack)) is not None else [])]
    if origin is None or not origin.is_current(modules):
        natives = [_packed_block(block, observed=True) if isinstance(block, FusedBlock) else None for block in stack.blocks()]
        last = None if norm is None else _norm(norm)
        origin, packed = _STACKS[stack] = Origin(modules), None if None in natives else blocks.Stack(natives, last)
    return packed if packed is not None and origin.is_plain(modules) else None


def described(layout: layouts.Layout) -> blocks.Block | None:
    """The block as the kernel takes it; None unless its linears are in integers and the rest is of a known kind."""
    if type(layout.activation).__name__ not in blocks.ACTIVATIONS or any(not _has_integers(x) for x in layout.linears):
        return None
    norms = [_norm(norm) for norm in (layout.norm1, layout.norm2)]
    linears = {name: _integers(getattr(layout, name)) for name in ("query", "key", "value", "out", "up", "down")}
    gate = None if layout.gate is None else _integers(layout.gate)
    if None in norms or None in linears.values() or (gate is None) != (layout.gate is None):
        return None
    block = blocks.Block(
        **linears, gate=gate, norm1=norms[0], norm2=norms[1], activation=type(layout.activation).__name__,
        norm_first=layout.norm_first, heads=layout.heads, groups=layout.groups, width=layout.width, scale=layout.scale,
    )  # fmt: skip
    return block if blocks.fits(block) else None


def _has_integers(linear: nn.Module) -> bool:
    return hasattr(linear, "int8") or hasattr(linear, "int4")


def _integers(linear: nn.Module) -> blocks.Linear | None:
    """A linear in integers, or None when it has more bits than the kernel takes."""
    return linear.int8() if hasattr(linear, "int8") else linear.int4()


def _norm(norm: nn.Module) -> blocks.Norm | None:
    if type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None:
        return blocks.Norm(norm.weight, norm.bias, norm.eps)
    if type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon"):
        return blocks.Norm(norm.weight, None, norm.variance_epsilon)
    return None
