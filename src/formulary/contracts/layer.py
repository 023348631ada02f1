"""The layer contract: a module of ours in place of a token mixer or feed-forward, and its one adapter into transformers.

A recurrent mixer implements `scan` (a stretch of tokens from a state) and `step` (one token); the `Slot` carries the state in
the model's own cache, counts tokens there, and finds padding in whatever mask the model passes, so that `generate` is right.
"""

from collections.abc import Sequence
from inspect import signature
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from formulary.contracts import parts
from formulary.contracts.report import Report
from formulary.errors import FormularyError, UsageError, nearest

State = tuple[Tensor, ...]


class Layer(nn.Module):
    """(B,L,D) in, (B,L,D) out, in place of what `replaces` names. Constructor arguments are JSON scalars.

    `replaces` is "token mixer" or "feed-forward". A mixer sets `causal`; a recurrent one sets `recurrent` and implements
    `initial_state`, `scan` and `step`.

    >>> from formulary.contracts.edits import editing
    >>> from formulary.lab import tiny
    >>> from formulary.papers.sequence_mixing.gla import GatedLinearAttention
    >>> model, report = tiny("llama"), Report("gla", {}, weights=12_000, unit="token mixer")
    >>> with editing(model, "gla") as edit:
    ...     slots = GatedLinearAttention.swap(model, edit, report, ignore=["*layers.0*"])
    >>> slots[0].layer.state_size(10_000), report.changes[0].note
    (128, 'started from its value, output')
    """

    replaces: ClassVar[str]
    causal: ClassVar[bool] = False
    recurrent: ClassVar[bool] = False

    @classmethod
    def arguments(cls, part: parts.Part, **settings) -> dict[str, Any]:
        """Constructor arguments that fit `part` (its width, heads, causality), with the user's `settings` applied.

        Raises UsageError for a setting that the constructor does not have, FormularyError where the layer cannot stand.
        """
        known = [name for name in signature(cls).parameters if name != "width"]
        for name in settings:
            if name not in known:
                raise UsageError(f"{cls.__name__} has no parameter {name!r}{nearest(name, known)}; parameters: {', '.join(known)}")
        return {"width": part.width, **settings}

    @classmethod
    def swap(
        cls, model: nn.Module, edit, report: Report, *, targets: Sequence[str] = (), ignore: Sequence[str] = (), **settings
    ) -> list["Slot"]:
        """Put one layer in place of every mixer or feed-forward that `targets` and `ignore` choose; training comes after.

        Each starts from what it replaces. Places where it cannot stand are skipped, with the reason in `report`. `edit` is the
        `Editor` of `edits.editing(model, slug)`.
        """
        slots = []
        for part in (parts.feed_forwards if cls.replaces == "feed-forward" else parts.mixers)(model, targets, ignore):
            weights = parts.count_weights(part.module)
            try:
                slot = edit.edit(part.name, cls, **cls.arguments(part, **settings))
            except UsageError:
                raise
            except FormularyError as error:
                report.skipped(part.name, str(error), weights)
                continue
            taken = slot.layer.start_from(part.module)
            report.changed(part.name, weights, f"started from its {', '.join(taken)}" if taken else "started at random")
            slots.append(slot)
        return slots

    def start_from(self, old: nn.Module) -> list[str]:
        """Take over what fits from the module that is replaced (projections, say) and name it; default: nothing."""
        return []

    def forward(self, x: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"] | None = None) -> Float[Tensor, "B L D"]:
        """`mask` is True at real tokens; padding must not influence the others."""
        return self.scan(x, mask, self.initial_state(x))[0]

    def initial_state(self, x: Float[Tensor, "B L D"]) -> State:
        """The state before the first token, batch first in every tensor, on the device of `x`; float32 at least is wise."""
        raise NotImplementedError

    def scan(
        self, x: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"] | None, state: State
    ) -> tuple[Float[Tensor, "B L D"], State]:
        """A stretch of tokens from `state`; returns outputs and the state after the last."""
        raise NotImplementedError

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        """One token."""
        raise NotImplementedError

    def state_size(self, length: int) -> int:
        """Numbers kept per sequence after `length` tokens."""
        raise NotImplementedError

    @classmethod
    def attach(cls, model: nn.Module, name: str, **args) -> "Slot":
        """Put `Slot(cls(**args))` in place of the module `name`."""
        from formulary.contracts.edits import _set_submodule

        old = model.get_submodule(name)
        if getattr(old, "has_relative_attention_bias", False):
            raise FormularyError(f"{name} computes the position bias that the other layers use: it cannot be replaced")
        slot = Slot(cls(**args), old)
        _set_submodule(model, name, slot)
        return slot


class RecurrentState(DynamicLayer):
    """What one recurrent layer keeps in the model's cache: tensors with the batch first, and how many tokens it has seen."""

    is_croppable = False

    def __init__(self, state: State | None = None):
        super().__init__()
        self.state, self.seen = state, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reset(self) -> None:
        self.state, self.seen = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise FormularyError("a recurrent state cannot forget tokens: assisted generation needs a model without recurrent layers")

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu"))

    def prefetch(self) -> None:
        """Nothing to do: the state is moved when it is next used."""

    def _map(self, change) -> None:
        if self.state is not None:
            self.state = tuple(change(t) for t in self.state)


class Slot(nn.Module):
    """Stands where transformers calls an attention or feed-forward module, and calls a `Layer` there.

    Returns what the replaced module did: attention modules return (hidden, weights), T5's also its position bias, a
    feed-forward the hidden states alone.
    """

    def __init__(self, layer: Layer, old: nn.Module):
        super().__init__()
        self.layer = layer
        self.layer_idx = getattr(old, "layer_idx", None)
        self.is_causal = bool(getattr(old, "is_causal", False))
        self.returns = "hidden" if layer.replaces == "feed-forward" else "t5" if "T5" in type(old).__name__ else "pair"
        if self.is_causal and self.returns != "hidden" and not layer.causal:
            raise FormularyError(f"a {type(layer).__name__} looks at later tokens: it cannot replace causal attention")

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args, **kwargs):
        if self.returns == "hidden":
            return self.layer(hidden_states)
        mask = kwargs.get("mask", attention_mask)
        mask = mask if isinstance(mask, Tensor) and mask.ndim in (2, 4) else None
        out = self._mix(hidden_states, _padding(mask, hidden_states.shape[1]), self._state_in(kwargs.get("cache")))
        return (out, kwargs.get("position_bias"), None) if self.returns == "t5" else (out, None)

    def _mix(self, x: Tensor, mask: Tensor | None, kept: RecurrentState | None) -> Tensor:
        if not self.layer.recurrent:
            return self.layer(x, mask)
        state = kept.state if kept is not None and kept.state is not None else self.layer.initial_state(x)
        if x.shape[1] == 1 and kept is not None and kept.seen and mask is None:
            y, state = self.layer.step(x[:, 0], state)
            out = y[:, None]
        else:
            out, state = self.layer.scan(x, mask, state)
        if kept is not None:
            kept.state, kept.seen = state, kept.seen + x.shape[1]
        return out

    def _state_in(self, cache) -> RecurrentState | None:
        """This layer's place in the model's cache, made on first use."""
        if cache is None or not self.layer.recurrent:
            return None
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        if not hasattr(cache, "layers") or self.layer_idx is None:
            raise FormularyError(f"a recurrent layer cannot keep its state in a {type(cache).__name__}; use the default dynamic cache")
        while len(cache.layers) <= self.layer_idx:
            cache.layers.append(DynamicLayer())
        place = cache.layers[self.layer_idx]
        if not isinstance(place, RecurrentState):
            if type(place) not in (DynamicLayer, DynamicSlidingWindowLayer) or place.get_seq_length():
                raise FormularyError(
                    f"a recurrent layer cannot keep its state in a {type(place).__name__} that is in use or of fixed size; "
                    "use the default dynamic cache"
                )
            place = cache.layers[self.layer_idx] = RecurrentState()
        return place


def _padding(mask: Tensor | None, length: int) -> Tensor | None:
    """(B,L) True at real tokens among the last `length` positions, from a 2-D or 4-D mask, boolean or additive.

    In a 4-D mask a real token sees itself, whatever its window, and a padded one is seen by nobody.
    """
    if mask is None:
        return None
    mask = mask[:, 0].diagonal(offset=mask.shape[-1] - length, dim1=-2, dim2=-1) if mask.ndim == 4 else mask[:, -length:]
    mask = mask if mask.dtype == torch.bool else mask > 0 if not mask.is_floating_point() else mask > -1
    return mask if torch.compiler.is_compiling() or not bool(mask.all()) else None
