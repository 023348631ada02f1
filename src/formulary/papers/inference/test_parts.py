"""What rooms of this family share: training that moves only what the loss pulls at, without dropout, and the batch it sees."""

import pytest
import torch
from torch import nn

from formulary.contracts import Data
from formulary.papers.inference._parts import inputs_of, trained


class Pulled(nn.Module):
    """One weight that the loss pulls at, one that it has a gradient of zero for, and dropout."""

    def __init__(self):
        super().__init__()
        self.pulled, self.still, self.frozen = (nn.Parameter(torch.full((3,), 2.0)) for _ in range(3))
        self.frozen.requires_grad_(False)
        self.dropout = nn.Dropout(0.9)

    def forward(self, x):
        return self.dropout(x * self.pulled + 0 * self.still + self.frozen)


def test_training_has_no_decay_and_no_dropout_and_gives_every_loss():
    data, model, outs = Data([{"x": torch.ones(3)} for _ in range(4)], batch_size=2), Pulled(), []

    def loss(model, batch):
        outs.append(model(batch["x"]).detach())
        return (model(batch["x"]) - 1).square().mean()

    losses = trained(model.train(), data, loss, steps=5, learning_rate=0.1)
    assert len(losses) == 5 and losses[0] == pytest.approx(9.0) and losses[-1] < losses[0]
    assert all(bool((out != 0).all()) for out in outs), "dropout would hide nine of ten"
    assert torch.equal(model.still, torch.full((3,), 2.0)) and torch.equal(model.frozen, torch.full((3,), 2.0))
    assert not torch.equal(model.pulled, torch.full((3,), 2.0))


def test_a_batch_comes_without_labels_and_in_the_models_dtype():
    model = Pulled().bfloat16()
    seen = inputs_of(model, {"x": torch.ones(2, 3), "ids": torch.ones(2, dtype=torch.long), "labels": torch.ones(2)})
    assert {key: value.dtype for key, value in seen.items()} == {"x": torch.bfloat16, "ids": torch.long}
