"""What rooms of this family share: a model trained in float32, without dropout, and given back in its own dtypes."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from formulary.contracts import Data
from formulary.contracts.transform import in_float32

__all__ = ["in_float32", "inputs_of", "trained"]


def inputs_of(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch without its labels, on the model's device and in its dtype."""
    like = next(model.parameters())
    cast = lambda x: x.to(like.device, like.dtype) if x.is_floating_point() else x.to(like.device)
    return {key: cast(value) for key, value in batch.items() if key != "labels"}


def trained(
    model: nn.Module, data: Data, loss: Callable, *, steps: int, learning_rate: float, schedule: str = "linear"
) -> list[float]:
    """Train what requires a gradient on `loss(model, batch)`, without dropout, by AdamW; gives the loss of each step."""
    from formulary.lab import train

    def objective(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        model.eval()
        return loss(model, batch)

    optimizer = partial(torch.optim.AdamW, lr=learning_rate, weight_decay=0.0, fused=True)
    options = {"lr": learning_rate, "optimizer": optimizer, "schedule": schedule, "seed": data.seed}
    return train(model, data, loss=objective, steps=steps, **options).losses
