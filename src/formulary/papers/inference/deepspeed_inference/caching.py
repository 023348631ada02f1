"""Keys and values of a `DynamicCache` kept in memory with room to grow, so that a new token is written and nothing is copied.

The cache sees views of that memory, as long as what is filled. Whoever changes the cache otherwise (beams reordered, tokens
taken off, a copy) leaves another tensor or another length there, and what it says is then copied to new memory.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

LEAST = 64


@dataclass
class Room:
    """Memory for one layer's keys and values (B,G,room,K), `past` tokens of which are filled."""

    keys: Float[Tensor, "B G room K"]
    values: Float[Tensor, "B G room K"]
    past: int

    def show(self, layer: DynamicLayer, length: int) -> None:
        """Let the cache see `length` tokens more."""
        self.past += length
        layer.keys, layer.values = self.keys[:, :, : self.past], self.values[:, :, : self.past]

    def is_what(self, layer: DynamicLayer) -> bool:
        """Whether the cache still shows this memory, and all that was filled."""
        return all(
            seen.data_ptr() == kept.data_ptr() and seen.shape[2] == self.past and seen.stride() == kept.stride()
            for seen, kept in ((layer.keys, self.keys), (layer.values, self.values))
        )


_ROOMS: WeakKeyDictionary = WeakKeyDictionary()


def room(cache, index: int, shape: tuple[int, int, int, int]) -> Room | None:
    """Room for `shape` = (B,G,L,K) more in layer `index` of a DynamicCache in float32; None for a cache of another kind."""
    if type(cache) is not DynamicCache:
        return None
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) <= index or type(cache.layers[index]) is not DynamicLayer:
        return None
    layer = cache.layers[index]
    batch, groups, length, width = shape
    if not layer.is_initialized:
        empty = torch.empty(batch, groups, 0, width)
        layer.lazy_initialization(empty, empty)
        layer.keys, layer.values = empty, empty
    if layer.keys.dtype != torch.float32 or layer.keys.device.type != "cpu":
        return None
    past = layer.get_seq_length()
    kept = _ROOMS.get(layer)
    if kept is None or not kept.is_what(layer) or past + length > kept.keys.shape[2]:
        size = max(LEAST, 2 * (past + length))
        keys, values = (torch.empty(batch, groups, size, width) for _ in range(2))
        if past:
            keys[:, :, :past], values[:, :, :past] = layer.keys, layer.values
        kept = _ROOMS[layer] = Room(keys, values, past)
    return kept
