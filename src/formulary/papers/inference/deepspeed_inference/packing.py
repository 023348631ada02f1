"""Padding left out between the first block of a stack and the last: sum(lengths) tokens instead of batch * longest."""

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from formulary.errors import FormularyError


class Packed(threading.local):
    """Where the sequences start, while an `Unpadded` stack is running."""

    starts: Int[Tensor, "n"] | None = None


PACKED = Packed()


class Unpadded:
    """Takes padding out before the first block of a stack and puts zeros in its place after the last."""

    @classmethod
    def fits(cls, stack: nn.Module) -> bool:
        """Whether the stack's forward takes (hidden_states, attention_mask, ...)."""
        return list(inspect.signature(stack.forward).parameters)[:2] == ["hidden_states", "attention_mask"]

    @classmethod
    def attach(cls, model: nn.Module, name: str) -> nn.Module:
        """Swap the class of the stack `name`."""
        stack = model.get_submodule(name)
        if isinstance(stack, cls):
            raise FormularyError(f"{name} already leaves padding out: deepspeed-inference cannot be applied twice")
        if not cls.fits(stack):
            raise FormularyError(f"{name} ({type(stack).__name__}) does not take hidden states and a mask")
        title = f"{cls.__name__}{type(stack).__name__}"
        stack.__class__ = type(title, (cls, type(stack)), {"__module__": cls.__module__})
        return stack

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args, **kwargs):
        seen = keys_seen(attention_mask, hidden_states.shape[:2])
        if seen is None or self._observed(args, kwargs) or not says_padding_alone(attention_mask, seen):
            out = super().forward(hidden_states, attention_mask, *args, **kwargs)
            return out if seen is None else _with_states(out, lambda states: states.masked_fill(~seen[..., None], 0))
        real = seen
        index = real.flatten().nonzero()[:, 0]
        starts = nn.functional.pad(real.sum(1).cumsum(0), (1, 0))
        with _packed(starts):
            out = super().forward(hidden_states.flatten(0, 1)[index][None], None, *args, **kwargs)
        return _with_states(out, lambda states: _unpack(states, index, real))

    def _observed(self, args: tuple, kwargs: dict) -> bool:
        """Whether somebody looks at what is inside (hidden states, attention), or other tensors run along."""
        config = getattr(self, "config", None)
        names = ("output_hidden_states", "output_attentions")
        asked = any(kwargs.get(name, getattr(config, name, False)) for name in names)
        along = any(isinstance(x, Tensor) for x in (*args, *kwargs.values()))
        cached = kwargs.get("cache") is not None
        return self.training or torch.compiler.is_compiling() or asked or along or cached


def keys_seen(mask: Tensor | None, shape: tuple[int, int]) -> Bool[Tensor, "B L"] | None:
    """Which tokens any query may see, from transformers' mask of either kind (B,1,#L,L); None without such a mask."""
    if mask is None or mask.ndim != 4 or mask.shape[0] != shape[0] or mask.shape[-1] != shape[1]:
        return None
    return _allowed(mask)[:, 0].any(1)


def says_padding_alone(mask: Tensor, seen: Bool[Tensor, "B L"]) -> bool:
    """Whether some tokens are padding, none of the sequences is all padding, and the mask says nothing else."""
    if seen.all() or not seen.any(1).all():
        return False
    allowed, wanted = _allowed(mask), seen[:, None, None, :]
    if mask.shape[2] == seen.shape[1]:  # what padding may see is of no interest
        allowed, wanted = (x | ~seen[:, None, :, None] for x in (allowed, wanted))
    biased = mask.dtype != torch.bool and bool(mask[_allowed(mask)].any())
    return not biased and torch.equal(allowed, wanted.expand_as(allowed))


def _allowed(mask: Tensor) -> Bool[Tensor, "B #H #L L"]:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


@contextmanager
def _packed(starts: Int[Tensor, "n"]) -> Iterator[None]:
    before, PACKED.starts = PACKED.starts, starts
    try:
        yield
    finally:
        PACKED.starts = before


def _unpack(
    states: Float[Tensor, "1 T D"], index: Int[Tensor, "T"], real: Bool[Tensor, "B L"]
) -> Float[Tensor, "B L D"]:
    whole = states.new_zeros(real.numel(), states.shape[-1]).index_copy(0, index, states[0])
    return whole.view(*real.shape, -1)


def _with_states(out, change):
    """The output of a stack with its hidden states changed: a tensor, a tuple, or a model output."""
    if isinstance(out, Tensor):
        return change(out)
    if isinstance(out, tuple):
        return (change(out[0]), *out[1:])
    out.last_hidden_state = change(out.last_hidden_state)
    return out
