"""What tests of this family's training rooms share."""

import copy

import pytest
import torch

from formulary.contracts import Data, parts
from formulary.lab.small import inputs_for, tiny

from ._training import agreement


@pytest.fixture
def data_for():
    """A function: data of `n` items that fit a tiny model."""

    def made(model, n=8, **more):
        batch = inputs_for(model, batch=n, **more)
        return Data([{key: value[i] for key, value in batch.items()} for i in range(n)], batch_size=4)

    return made


@pytest.fixture
def distance_to_teacher(data_for):
    """A function of a method: (distance from a tiny BERT whose linears matter after the method, model, report)."""
    teacher = tiny("bert")
    with torch.no_grad():
        for part in parts.linears(teacher):
            part.raw.mul_(4)
    data = data_for(teacher)

    def measured(method):
        trained, report = method.apply(copy.deepcopy(teacher), data)
        with torch.no_grad():
            return float(agreement(trained, teacher, data.collate(data.items))), trained, report

    return measured
