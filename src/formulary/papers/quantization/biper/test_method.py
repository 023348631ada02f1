"""What is true of BiPer alone: the gradients of its two signs, the error of the sine against its closed form, the two
stages.
"""

import copy
import math

import pytest
import torch

from formulary.errors import UsageError
from formulary.lab.small import tiny
from formulary.papers.quantization._training import signs
from formulary.papers.quantization.biper.method import (
    BiPer,
    BiPerLinear,
    bireal_sign,
    quantization_error,
    square_wave,
)


def test_the_square_wave_has_the_gradient_of_the_sine():
    w = torch.linspace(-0.5, 0.5, 101, dtype=torch.float64).requires_grad_()
    out = square_wave(20 * w)
    out.sum().backward()
    for value, sign, slope in zip(w.tolist(), out.tolist(), w.grad.tolist()):
        assert sign == (1 if math.sin(20 * value) >= 0 else -1)
        h = 1e-6
        wanted = (math.sin(20 * (value + h)) - math.sin(20 * (value - h))) / (2 * h)
        assert slope == pytest.approx(wanted, abs=1e-5)


def test_the_sign_of_inputs_has_bi_reals_gradient():
    x = torch.linspace(-2, 2, 81).requires_grad_()
    bireal_sign(x).sum().backward()
    torch.testing.assert_close(x.grad, (2 - 2 * x.detach().abs()).clamp(min=0), atol=1e-5, rtol=1e-5)


def laplace_error(phase: float) -> float:
    """The error for Laplace weights of scale b, phase = b omega: E sin^2 - (E |sin|)^2, both in closed form."""
    square = 2 * phase**2 / (1 + 4 * phase**2)
    return square - (phase / math.tanh(math.pi / (2 * phase)) / (1 + phase**2)) ** 2


def test_the_quantization_error_is_the_closed_form_and_has_the_papers_maximum():
    torch.manual_seed(0)
    w = torch.distributions.Laplace(0.0, 0.05).sample((400_000,))
    for frequency in (5.0, 20.0, 60.0):
        assert quantization_error(w, frequency) == pytest.approx(laplace_error(0.05 * frequency), rel=0.02)
    assert laplace_error(0.954882) == pytest.approx(0.102835, abs=1e-6)
    assert laplace_error(100.0) == pytest.approx(0.5 - 4 / math.pi**2, abs=1e-3)


def started(frequency=20.0, size=0.02):
    torch.manual_seed(0)
    weight = size * torch.randn(6, 40)
    layer = BiPerLinear(40, 6, binary_input=False)
    layer.frequency = frequency
    return weight, layer, layer.fit(weight)


def test_small_phases_start_at_the_teachers_weight():
    weight, layer, factor = started(frequency=0.5)
    assert factor == 1
    torch.testing.assert_close(layer.weight.detach(), weight, atol=1e-4, rtol=1e-3)


def test_large_weights_are_scaled_down_to_a_mean_phase_of_one():
    weight, layer, factor = started(size=0.5)
    assert factor < 1 and float((20 * layer.latent.detach()).abs().mean()) == pytest.approx(1, rel=1e-5)
    agree = signs(layer.weight.detach()) == signs(weight)
    assert float(agree.float().mean()) > 0.97


def test_the_second_stage_is_the_least_squares_sign_of_the_first():
    weight, layer, _ = started()
    soft, wave = layer.weight.detach(), (20 * layer.latent.detach()).sin()
    layer.harden()
    hard = layer.weight.detach()
    assert torch.equal(signs(hard), signs(wave)) and all(len(row.abs().unique()) == 1 for row in hard)
    for scale in (0.9, 1.1):
        assert bool(((hard * scale - soft).square().sum(1) > (hard - soft).square().sum(1)).all())
    x = torch.randn(3, 40)
    before = layer(x).detach()
    layer.finish()
    assert torch.equal(layer(x), before) and layer.alpha is None and layer.latent is None


def test_training_brings_it_closer_to_the_teacher_in_two_stages(distance_to_teacher):
    before, _, _ = distance_to_teacher(BiPer(steps=1, learning_rate=3e-3))
    after, trained, report = distance_to_teacher(BiPer(steps=45, learning_rate=3e-3))
    assert after < 0.8 * before
    assert report.figures["steps with the sine, with its sign"] == [30, 15]
    assert all(len(m.weight.abs().unique()) <= m.out_features for m in trained.modules() if isinstance(m, BiPerLinear))


def test_the_penalty_pulls_phases_to_multiples_of_pi(data_for):
    model = tiny("bert")
    found = [
        BiPer(steps=20, penalty=penalty, learning_rate=3e-3).apply(copy.deepcopy(model), data_for(model))[1]
        for penalty in (0.0, 10.0)
    ]
    free, pulled = (report.figures["mean sin^2 of the phases at the end"] for report in found)
    assert pulled < free


@pytest.mark.parametrize("wrong", [{"frequency": 0.0}, {"penalty": -1.0}, {"second": 2.0}, {"second_rate": 0.0}])
def test_parameters_out_of_range_are_refused_in_one_line(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        BiPer(**wrong)
