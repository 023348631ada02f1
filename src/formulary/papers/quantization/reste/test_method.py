"""What is true of ReSTE alone: its gradient against the formula, its limits, the schedule, and what is stored."""

import copy
import math

import pytest
import torch

from formulary.errors import UsageError
from formulary.lab.small import tiny
from formulary.papers.quantization._training import Inputs, signs
from formulary.papers.quantization.reste.method import (
    ReSTE,
    ReSTELinear,
    estimating_error,
    exponent_at,
    power,
    rectified_sign,
)


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0, 10.0])
def test_the_gradient_is_the_formulas(exponent):
    torch.manual_seed(0)
    edges = torch.tensor([-1.49, 1.51, 0.0999, -0.1001])
    x = torch.cat([torch.randn(200), 0.1 * torch.randn(100), edges]).requires_grad_()
    out = rectified_sign(x, exponent)
    out.sum().backward()
    assert torch.equal(out.detach(), signs(x.detach()))
    for value, slope in zip(x.tolist(), x.grad.tolist()):
        size = abs(value)
        inner, outer = 0.1 ** (1 / exponent) / 0.1, size ** (1 / exponent - 1) / exponent
        wanted = 0.0 if size > 1.5 else inner if size <= 0.1 else outer
        assert slope == pytest.approx(wanted, rel=1e-4), value


def test_the_estimator_goes_from_the_identity_to_the_sign():
    x = torch.randn(1000)
    torch.testing.assert_close(power(x, 1.0), x)
    errors = [estimating_error(x, o) for o in (1.0, 2.0, 3.0, 6.0, 10.0, 1000.0)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01
    by_hand = math.sqrt(sum((math.copysign(1, v) * (1 - abs(v) ** 0.5)) ** 2 for v in x.tolist()) / 1000)
    assert errors[1] == pytest.approx(by_hand, rel=1e-4)


def test_larger_exponents_have_more_uneven_gradients():
    x = torch.randn(5000)
    spread = []
    for exponent in (1.0, 2.0, 3.0, 6.0):
        y = x.clone().requires_grad_()
        rectified_sign(y, exponent).sum().backward()
        spread.append(float(y.grad.abs().var()))
    assert spread == sorted(spread)


def test_the_exponent_rises_as_a_cosine():
    assert [round(exponent_at(done, 3.0), 4) for done in (0.0, 0.5, 1.0)] == [1.0, round(3 - math.sqrt(2), 4), 3.0]
    assert exponent_at(0.7, 1.0) == 1.0


def layer_of(weight, inputs=None):
    layer = ReSTELinear(weight.shape[1], weight.shape[0], binary_input=inputs is not None)
    layer.start(weight)
    if inputs is not None:
        layer.expect(inputs)
    return layer


def test_weights_are_signs_times_one_scale():
    torch.manual_seed(0)
    weight = torch.randn(5, 19)
    layer = layer_of(weight)
    torch.testing.assert_close(layer.weight.detach(), signs(weight) * weight.abs().mean())
    before = layer(torch.eye(19)).detach()
    layer.finish()
    assert torch.equal(layer(torch.eye(19)), before) and layer.codes.shape == (5, 3)


def test_inputs_have_two_values_and_a_gradient():
    inputs = Inputs.of(torch.tensor([0.0, 0.0, 3.0, 1.0]))
    layer = layer_of(torch.randn(4, 8), inputs)
    x = torch.tensor([[0.0, 0.1, 0.9, 1.1, 5.0, -5.0, 1.0, 2.0]], requires_grad=True)
    out = layer.incoming(x)
    assert out.detach().tolist() == [[0.0, 0.0, 0.0, 2.0, 2.0, 0.0, 2.0, 2.0]]
    out.sum().backward()
    assert x.grad[0, 4] == 0 and x.grad[0, 5] == 0 and x.grad[0, 3] > 0


def test_training_brings_it_closer_to_the_teacher(distance_to_teacher):
    before, _, _ = distance_to_teacher(ReSTE(steps=1, learning_rate=3e-3))
    after, _, report = distance_to_teacher(ReSTE(steps=40, learning_rate=3e-3))
    assert after < 0.8 * before
    assert 0 < report.figures["estimating error of weights at the end"] < 0.5


def test_what_stands_at_padding_changes_nothing(data_for):
    model = tiny("bert")
    first, second = data_for(model), data_for(model)
    for item in second.items:
        item["input_ids"] = item["input_ids"].masked_fill(item["attention_mask"] == 0, 55)
    one, other = (ReSTE(steps=3).apply(copy.deepcopy(model), data)[0].state_dict() for data in (first, second))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("wrong", [{"exponent": 0.5}, {"small": 0.0}, {"bound": 0.01}, {"steps": 0}])
def test_parameters_out_of_range_are_refused_in_one_line(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        ReSTE(**wrong)
