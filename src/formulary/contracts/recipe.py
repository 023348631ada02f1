"""The recipe contract: a way of training, as hooks into the loop of `lab.train`. A hook that is not overridden means the default."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from formulary.contracts.transform import slug_of


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Subclass it as a frozen dataclass of the paper's parameters and override the hooks that the paper changes.

    `hooks()` names those; the loop uses its own default for the others.
    """

    @property
    def slug(self) -> str:
        """The method's name in the catalogue."""
        return slug_of(type(self))

    def parameters(self) -> dict[str, Any]:
        """The recipe's parameters as JSON-ready values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def hooks(cls) -> frozenset[str]:
        """The hooks that this recipe defines."""
        return frozenset(name for name in HOOKS if getattr(cls, name) is not getattr(Recipe, name))

    def init(self, model: nn.Module) -> None:
        """Initialize or prepare the model before the first step."""

    def batch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Change a batch (augment, mask, pack) before it is used."""
        return batch

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The scalar to minimize; default: the model's own `.loss` on the batch."""
        raise NotImplementedError

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer."""
        raise NotImplementedError

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """A learning-rate scheduler with `step()` and `state_dict()`."""
        raise NotImplementedError

    def step(self, model: nn.Module, closure: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
        """One update; `closure()` clears gradients, runs the loss and its backward, and returns the loss."""
        raise NotImplementedError

    def control(self, loop: Any) -> None:
        """Called after each step with the loop (`loop.step`, `loop.steps`, `loop.model`, `loop.optimizer`): grow, freeze, stop."""


HOOKS = ("init", "batch", "loss", "optimizer", "scheduler", "step", "control")
