"""Blocks that let each image of a batch leave at its own depth, and the outputs of a model at every exit in one pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formulary.contracts import BlockEdit
from formulary.errors import FormularyError


@dataclass
class Exits:
    """What the blocks of a model share: the depth of each image of this forward, or the states at all exits."""

    fixed: int | None = None
    collecting: bool = False
    depths: Int[Tensor, "B"] | None = None
    features: Float[Tensor, "B D"] | None = None
    states: list[Float[Tensor, "B L D"]] = field(default_factory=list)


class ExitBlock(BlockEdit):
    """A block that computes the images that go on, and leaves the others as they are; the first one has the gate."""

    def setup(self, model: nn.Module, *, index: int, count: int, first_exit: int) -> None:
        self.exit_index, self.exit_count, self.first_exit = index, count, first_exit
        self.exits = Exits() if index == 0 else exits_of(model)
        if index == 0:
            self.exit_gate = nn.Linear(model.config.hidden_size, count - first_exit + 1)

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if self.exit_index == 0:
            self._start(hidden_states)
        if self.exits.collecting:
            return self._collect(super().forward(hidden_states, *args, **kwargs))
        going = self.exits.depths > self.exit_index
        if bool(going.all()):
            return super().forward(hidden_states, *args, **kwargs)
        if not bool(going.any()):
            return hidden_states
        pick = lambda value: value[going] if isinstance(value, Tensor) and len(value) == len(going) > 1 else value
        left = super().forward(hidden_states[going], *map(pick, args), **{key: pick(value) for key, value in kwargs.items()})
        return hidden_states.index_put((going,), left)

    def _start(self, hidden: Tensor) -> None:
        exits, features = self.exits, hidden.mean(1)
        if exits.collecting:
            exits.features = features.detach()
        elif exits.fixed is not None:
            exits.depths = torch.full((len(hidden),), exits.fixed, device=hidden.device)
        else:
            exits.depths = self.exit_gate(features).argmax(-1) + self.first_exit

    def _collect(self, hidden: Tensor) -> Tensor:
        """The block's states; at the last block those of all exits, one exit after the other along the batch."""
        if self.exit_index + 1 >= self.first_exit:
            self.exits.states.append(hidden)
        return torch.cat(self.exits.states) if self.exit_index + 1 == self.exit_count else hidden


def exits_of(model: nn.Module) -> Exits:
    """The `Exits` of an edited model. Raises FormularyError when the model has none."""
    for module in model.modules():
        if isinstance(module, ExitBlock):
            return module.exits
    raise FormularyError(f"this {type(model).__name__} carries no eco-m2f edits")


def depth_of(model: nn.Module) -> Int[Tensor, "B"]:
    """How many blocks each image of the last forward went through."""
    depths = exits_of(model).depths
    if depths is None:
        raise FormularyError("no depth was chosen yet: run the model first")
    return depths


@contextmanager
def at_depth(model: nn.Module, depth: int) -> Iterator[None]:
    """Within the context every image goes through `depth` blocks, whatever the gate says."""
    exits = exits_of(model)
    before, exits.fixed = exits.fixed, depth
    try:
        yield
    finally:
        exits.fixed = before


def exit_outputs(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Float[Tensor, "B D"]]:
    """(exits, B, ...) the model's logits, or states without a classifier, at every exit; and what the gate sees."""
    exits = exits_of(model)
    exits.collecting = True
    try:
        out = answer(model(**batch))
        return out.unflatten(0, (len(exits.states), -1)), exits.features
    finally:
        exits.collecting, exits.states, exits.features = False, [], None


def answer(out: Any) -> Tensor:
    """Logits (B,C), or the last states (B,L,D) of a model that does not classify."""
    value = out["logits"] if "logits" in out else out.get("last_hidden_state")
    if value is None or value.ndim != (2 if "logits" in out else 3):
        raise FormularyError("eco-m2f knows what is good of a model that gives classes or states of tokens, not of this one")
    return value
