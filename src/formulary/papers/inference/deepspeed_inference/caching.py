"""Keys and values of a `DynamicCache` kept in memory with room to grow, so that a new token is written and nothing is copied.

The layers of the cache then show views of that memory, made when somebody asks for them. Whoever sets their keys or values
(beams reordered, tokens taken off, a mask that needs PyTorch's attention) is believed: what they say is copied to new
memory at the next token.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

LEAST = 64


class Room:
    """Memory for the keys and values of some layers, `past` tokens of which are filled; `layers` are who shows it.

    `writer()` is what filled it last, and `unchecked` how often since it was looked at.
    """

    def __init__(self, layers: "list[RoomyLayer]", memory: Float[Tensor, "layers 2 B G room K"], past: int):
        self.memory, self.past, self.layers, self.writer, self.unchecked = memory, past, layers, lambda: None, 0
        for row, layer in enumerate(layers):
            layer.leave()
            layer.room, layer.row = self, row

    def fits(self, layers: list[DynamicLayer], batch: int, length: int) -> bool:
        """Whether `layers` still show all of it and there is room for `length` more tokens in `batch` sequences."""
        return layers == self.layers and self.memory.shape[2] == batch and self.past + length <= self.memory.shape[4]


class RoomyLayer(DynamicLayer):
    """A layer that shows row `row` of a `room`, or the keys and values that it was `given`."""

    _layer_type = None
    room: Room | None
    row: int
    given: list[Tensor | None]

    @classmethod
    def of(cls, layer: DynamicLayer) -> "RoomyLayer":
        """The layer itself, which becomes one."""
        if type(layer) is DynamicLayer:
            layer.given = [layer.__dict__.pop(name) for name in ("keys", "values")]
            layer.room, layer.__class__ = None, cls
        return layer

    def leave(self) -> None:
        """Show copies of its own from now on."""
        room = self.__dict__.get("room")
        if room is not None:
            self.given = [room.memory[self.row, which][:, :, : room.past] for which in (0, 1)]
            self.room, room.layers = None, []

    def _set(self, which: int, tensor: Tensor | None) -> None:
        self.leave()
        self.given[which] = tensor

    def _get(self, which: int) -> Tensor | None:
        return self.given[which] if self.room is None else self.room.memory[self.row, which][:, :, : self.room.past]

    keys = property(lambda self: self._get(0), lambda self, tensor: self._set(0, tensor))
    values = property(lambda self: self._get(1), lambda self, tensor: self._set(1, tensor))


def room_of(cache, batch: int, length: int) -> Room | None:
    """The room that all layers of a cache share, when there is one with room for `length` tokens more."""
    if type(cache) is not DynamicCache or not cache.layers:
        return None
    room = getattr(cache.layers[0], "room", None)
    return room if room is not None and room.fits(cache.layers, batch, length) else None


def room_for(cache, first: int, count: int, shape: tuple[int, int, int, int]) -> Room | None:
    """Room for `shape` = (B,G,L,K) more in the layers from `first` on, `count` of them, of a DynamicCache in float32; None for
    a cache of another kind.
    """
    if type(cache) is not DynamicCache:
        return None
    while len(cache.layers) < first + count and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layers = cache.layers[first : first + count]
    if len(layers) < count or any(type(layer) not in (RoomyLayer, DynamicLayer) for layer in layers):
        return None
    batch, groups, length, width = shape
    room = getattr(layers[0], "room", None)
    if room is not None and room.fits(layers, batch, length):
        return room
    past = {layer.get_seq_length() for layer in layers}
    filled = [x for layer in layers if layer.get_seq_length() for x in (layer.keys, layer.values)]
    if len(past) > 1 or any(x.dtype != torch.float32 or x.device.type != "cpu" or x.shape[0] != batch for x in filled):
        return None
    past = past.pop()
    memory = torch.empty(count, 2, batch, groups, max(LEAST, 2 * (past + length)), width)
    if past:
        for row, layer in enumerate(layers):
            memory[row, 0, :, :, :past], memory[row, 1, :, :, :past] = layer.keys, layer.values
    for layer in layers:
        if not layer.is_initialized:
            layer.lazy_initialization(memory[0, 0], memory[0, 1])
    return Room([RoomyLayer.of(layer) for layer in layers], memory, past)
