"""Blocks that a sequence skips by the votes of its first tokens, with what was voted kept beside the keys and values."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer

from formulary.contracts import BlockEdit
from formulary.errors import FormularyError


class Votes(DynamicLayer):
    """A block's keys and values, the sum of its votes so far, and how many real tokens each sequence has."""

    is_croppable = False

    def __init__(self):
        super().__init__()
        self.votes: Float[Tensor, "B"] | None = None
        self.count: Int[Tensor, "B"] | None = None

    def reset(self) -> None:
        super().reset()
        self.votes = self.count = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map(lambda t: t[indices])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise FormularyError("a vote cannot be taken back: assisted generation needs a model without first-router")

    def _map(self, change) -> None:
        if self.votes is not None:
            self.votes, self.count = change(self.votes), change(self.count)


class Router(nn.Module):
    """z = w . x / rms(x) + b: (B,L,D) -> (B,L); the block is wanted where sigmoid(z) is above a half."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.full((1,), 2.0))

    def forward(self, hidden: Float[Tensor, "B L D"]) -> Float[Tensor, "B L"]:
        return F.rms_norm(hidden, hidden.shape[-1:], eps=1e-6) @ self.weight + self.bias


@dataclass
class Routing:
    """What the blocks of a model share: whether they are mixed softly, and the routers' answers of that pass."""

    soft: bool = False
    answers: list[Float[Tensor, "B L"]] = field(default_factory=list)


class RoutedBlock(BlockEdit):
    """A block that runs for the first `prompt` real tokens of a sequence, and then if their mean vote is above a half."""

    def setup(self, model: nn.Module, *, index: int, prompt: int, leads: bool) -> None:
        self.cache_index, self.prompt = index, prompt
        self.routing = Routing() if leads else routing_of(model)
        self.router = Router(model.config.hidden_size)

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if self.routing.soft:
            z = self.router(hidden_states)
            self.routing.answers.append(z)
            return torch.lerp(hidden_states, super().forward(hidden_states, *args, **kwargs), z.sigmoid()[..., None])
        wanted = self._wanted(hidden_states, _real(args, kwargs, hidden_states), _place(args, kwargs, self.cache_index))
        if bool(wanted.all()):
            return super().forward(hidden_states, *args, **kwargs)
        if not bool(wanted.any()):
            return hidden_states
        length = hidden_states.shape[1]
        used = length if bool(wanted[:, -1].any()) else int(wanted.any(0).nonzero().max()) + 1
        cut = lambda value: _first(value, used, length)
        out = super().forward(cut(hidden_states), *map(cut, args), **{key: cut(value) for key, value in kwargs.items()})
        out = torch.where(wanted[:, :used, None], out, hidden_states[:, :used])
        return torch.cat([out, hidden_states[:, used:]], dim=1) if used < length else out

    def _wanted(self, hidden: Tensor, real: Tensor, kept: Votes | None) -> Bool[Tensor, "B L"]:
        """Which tokens the block computes: those that vote, padding, and all of a sequence that voted for it."""
        fresh = kept is None or kept.votes is None
        votes = hidden.new_zeros(len(hidden), dtype=torch.float32) if fresh else kept.votes
        count = real.new_zeros(len(hidden), dtype=torch.long) if fresh else kept.count
        if fresh or not bool((count >= self.prompt).all()):
            place = count[:, None] + real.cumsum(1) - 1
            voting = real & (place < self.prompt)
            votes = votes + (self.router(hidden).float().sigmoid() * voting).sum(1)
            count = count + real.sum(1)
            if kept is not None:
                kept.votes, kept.count = votes, count
            early = voting | ~real
        else:
            early = torch.zeros_like(real)
        return early | (votes > 0.5 * self.prompt)[:, None]


def routing_of(model: nn.Module) -> Routing:
    """The `Routing` of an edited model. Raises FormularyError when the model has none."""
    for module in model.modules():
        if isinstance(module, RoutedBlock):
            return module.routing
    raise FormularyError(f"this {type(model).__name__} carries no first-router edits")


@contextmanager
def softly(model: nn.Module) -> Iterator[list[Float[Tensor, "B L"]]]:
    """Within the context blocks are mixed with what they are given; yields the routers' answers of the pass."""
    routing = routing_of(model)
    routing.soft, routing.answers = True, []
    try:
        yield routing.answers
    finally:
        routing.soft, routing.answers = False, []


def _real(args: tuple, kwargs: dict[str, Any], hidden: Tensor) -> Bool[Tensor, "B L"]:
    """Which tokens are no padding, from the mask that the block is given: a real token sees itself."""
    masks = [value for value in (*args, kwargs.get("attention_mask")) if isinstance(value, Tensor) and value.ndim == 4]
    if not masks:
        return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    mask = masks[0][:, 0].diagonal(offset=masks[0].shape[-1] - hidden.shape[1], dim1=-2, dim2=-1)
    return (mask if mask.dtype == torch.bool else mask > -1).expand(len(hidden), -1)


def _place(args: tuple, kwargs: dict[str, Any], index: int) -> Votes | None:
    """Where the cache keeps this block's keys and values, made on first use; None without a cache."""
    cache = next((value for value in (*args, kwargs.get("cache")) if hasattr(value, "layers")), None)
    if cache is None:
        return None
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    if not isinstance(cache.layers[index], Votes):
        if type(cache.layers[index]) is not DynamicLayer or cache.layers[index].get_seq_length():
            kind = type(cache.layers[index]).__name__
            raise FormularyError(f"first-router keeps votes in the default dynamic cache, not in a {kind} or one in use")
        cache.layers[index] = Votes()
    return cache.layers[index]


def _first(value: Any, used: int, length: int) -> Any:
    """An argument of the block for its first `used` of `length` tokens: states, masks, positions, tables of rotations."""
    if isinstance(value, tuple):
        return tuple(_first(one, used, length) for one in value)
    if not isinstance(value, Tensor) or used == length:
        return value
    if value.ndim == 4:
        return value[:, :, :used, : value.shape[-1] - (length - used)]
    return value[:, :used] if value.ndim in (2, 3) and value.shape[1] == length else value
