"""What is true of RepQuant alone: the rewritten model gives the very integers of the calibrated one, the logarithmic
grid, and each part of the recipe lowers the error that it is made for.
"""

import copy

import pytest
import torch

from formulary.contracts import Data, parts
from formulary.errors import UsageError
from formulary.lab.small import inputs_for, tiny
from formulary.papers.quantization import repquant
from formulary.papers.quantization._parts import Grid, on_grid, round_to_nearest
from formulary.papers.quantization.repquant.calibration import (
    Observed,
    clipped_channels,
    layer_range,
    reconstructed,
    softmax_scale,
)
from formulary.papers.quantization.repquant.method import QuantizedAttention, QuantizedLinear, RepQuant, log_sqrt2
from formulary.papers.quantization.repquant.norms import norms_before_linears


def data_for(model, n=6, **more):
    batch = inputs_for(model, batch=n, **more)
    return Data([{key: value[i] for key, value in batch.items()} for i in range(n)], batch_size=3)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "gpt2", "opt", "llama"])
def test_at_eight_bits_hardly_anything_changes(kind):
    model = tiny(kind)
    method = RepQuant(bits=8, activation_bits=8, clip_steps=0, tokens=512, log_softmax=False)
    after, report = method.apply(copy.deepcopy(model), data_for(model))
    batch = inputs_for(model, batch=6)
    with torch.no_grad():
        before, now = (m(**batch)[0] for m in (model, after))
    real = batch["attention_mask"].bool() if "attention_mask" in batch else slice(None)
    assert float((now - before)[real].norm() / before[real].norm()) < 0.03
    assert "4 norms rewritten" in report.headline


def test_one_scale_gives_the_integers_of_one_scale_per_channel():
    """The rewriting in float64, against the docstring's definition of the per-channel grid."""
    torch.manual_seed(0)
    spread = torch.logspace(-1, 1, 24, dtype=torch.float64)
    norm = torch.nn.LayerNorm(24, dtype=torch.float64)
    norm.weight.data, norm.bias.data = spread, spread * torch.randn(24, dtype=torch.float64)
    linear = torch.nn.Linear(24, 7, dtype=torch.float64)
    hidden = torch.randn(500, 24, dtype=torch.float64)
    x = norm(hidden).detach()
    scales, zeros = clipped_channels(x, linear.weight.detach(), 4, 5, False)
    integers = ((x / scales).round() + zeros).clamp(0, 15)
    quantized = (integers - zeros) * scales @ linear.weight.mT + linear.bias

    scale, zero = scales.mean(), zeros.mean().round()
    ratio, shift = scales / scale, scale * (zero - zeros)
    norm.weight.data, norm.bias.data = norm.weight / ratio, norm.bias / ratio - shift
    weight = linear.weight * ratio
    again = norm(hidden)
    assert torch.equal(((again / scale).round() + zero).clamp(0, 15), integers)
    rewritten = on_grid(again, scale, zero, 4) @ weight.mT + linear.bias + weight @ shift
    torch.testing.assert_close(rewritten, quantized, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", ["vit", "opt", "llama"])
def test_without_rounding_the_rewritten_model_is_the_same_function(kind, monkeypatch):
    """With activations left unrounded, what is left is the rewriting and the error of 8-bit weights."""
    monkeypatch.setattr(repquant.method, "on_grid", lambda x, *grid: x)
    monkeypatch.setattr(QuantizedAttention, "rounded", lambda self, weights, scale: weights)
    model = tiny(kind)
    after, _ = RepQuant(bits=8, clip_steps=2, tokens=256).apply(copy.deepcopy(model), data_for(model))
    norms = [key for key in model.state_dict() if "norm" in key or "ln_" in key]
    assert sum(not torch.equal(after.state_dict()[key], model.state_dict()[key]) for key in norms) >= 4
    batch = inputs_for(model)
    with torch.no_grad():
        before, now = (m(**batch)[0] for m in (model, after))
    real = batch["attention_mask"].bool() if "attention_mask" in batch else slice(None)
    assert float((now - before)[real].norm() / before[real].norm()) < 0.01


def test_norms_that_feed_something_else_are_found_out():
    def found(kind):
        model = tiny(kind)
        return norms_before_linears(model, inputs_for(model, batch=1))

    assert found("bert") == {} and found("albert") == {}
    assert found("bart") == {}, "the last encoder block's norm is its output, which cross-attention's linears read"
    llama = found("llama")
    assert llama["model.layers.0.input_layernorm"] == [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    assert llama["model.layers.1.post_attention_layernorm"] == [f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up")]
    assert not any("post_attention" in name for name in found("mixtral")), "a router reads it too"
    assert len(found("dinov2")) == len(found("gpt2")) == len(found("opt")) == 4
    t5 = found("t5")
    assert len(t5) == 10 and all("final" not in name for name in t5)


def test_norms_whose_readers_are_shared_are_left_alone():
    """One linear in two blocks reads two norms: rewriting either would change what it does for the other."""
    model = tiny("vit")
    first, second = (block.module for block in parts.blocks(model))
    alone = norms_before_linears(model, inputs_for(model))
    second.attention.q_proj = first.attention.q_proj
    shared = norms_before_linears(model, inputs_for(model))
    before = {name for name, readers in alone.items() if any(reader.endswith("q_proj") for reader in readers)}
    assert len(before) == 2 and set(shared) == set(alone) - before


def test_clipping_minds_the_weights_that_read_the_channels():
    """Clipping errs in all channels at once where they share a tail, and rounding does not; so weights that add channels
    up want less clipping, and knowing them gives less error of the output."""
    generator = torch.Generator().manual_seed(0)
    x = 0.3 * torch.randn(600, 1, generator=generator) ** 3 + torch.randn(600, 16, generator=generator)
    weight = torch.ones(4, 16) + 0.05 * torch.randn(4, 16, generator=generator)
    error = []
    for known in (weight, torch.eye(16)):
        scales, zeros = clipped_channels(x, known, 3, 200, False)
        error.append(float(((x - on_grid(x, scales, zeros, 3)) @ weight.mT).square().mean()))
    assert error[0] < 0.7 * error[1]


@pytest.mark.parametrize("bits", [3, 4])
def test_logarithmic_grid_is_the_shift_and_parity_form(bits):
    """s 2^-ceil(q/2), times sqrt(2) for odd q: shifts and one constant."""
    attention, scale = torch.rand(2000).pow(6), torch.tensor(0.7)
    q = (-2 * (attention / scale).log2()).round().clamp(min=0)
    parity = torch.where(q % 2 == 1, 2**0.5, 1.0)
    expected = torch.where(q < 2**bits, scale * 2 ** -(q / 2).ceil() * parity, 0.0)
    torch.testing.assert_close(log_sqrt2(attention, scale, bits), expected)


def test_softmax_scale_is_the_best_of_a_brute_force():
    torch.manual_seed(0)
    weights = (4 * torch.randn(2, 2, 40, 40)).softmax(-1)
    observed, attention = Observed(), QuantizedAttention(3)
    observed.add(*torch.randn(3, 2, 2, 40, 8).unbind(), weights, None, None)
    found = softmax_scale(observed.weights, attention.rounded, torch.float32)
    error = lambda scale: float((weights - log_sqrt2(weights, scale, 3)).square().sum())
    assert error(found) <= 1.02 * min(error(scale) for scale in torch.linspace(0.05, 1, 96))


def test_clipping_is_never_worse_and_helps_with_outliers():
    torch.manual_seed(0)
    x, weight = torch.randn(4000, 16), torch.randn(8, 16)
    x[torch.randint(4000, (16,)), torch.arange(16)] = 15.0

    def error(steps, symmetric):
        scale, zero = clipped_channels(x, weight, 4, steps, symmetric)
        return float(((x - on_grid(x, scale, zero, 4)) @ weight.mT).square().sum())

    for symmetric in (False, True):
        assert error(1, symmetric) <= error(0, symmetric) and error(60, symmetric) < 0.8 * error(0, symmetric)


def test_reconstruction_solves_the_ridge_regression():
    torch.manual_seed(0)
    weight, x = torch.randn(3, 6), torch.randn(50, 6)
    noisy = x + 0.3 * torch.randn(50, 6)
    gram, wanted = noisy.mT @ noisy, x @ weight.mT
    found = reconstructed(weight, wanted, noisy, gram, 0.05).requires_grad_()
    loss = (wanted - noisy @ found.mT).square().sum() + 0.05 * gram.diagonal().mean() * (found - weight).square().sum()
    loss.backward()
    assert float(found.grad.abs().max()) < 1e-3 * float(gram.max())


def test_every_reconstructed_layer_is_better_than_rounding():
    model = tiny("vit")
    _, report = RepQuant(clip_steps=0).apply(model, data_for(model, n=12))
    rows = report.tables["relative squared output error"]
    assert len(rows) == 12 and all(row["as stored"] < row["round to nearest"] for row in rows)


def test_layer_range_shrinks_only_where_it_pays():
    flat = torch.rand(5000) * 3 - 1
    scale, _ = layer_range(flat, 4, torch.float32)
    assert float(scale) > 0.9 * 3 / 15
    tailed = torch.cat([flat, torch.tensor([60.0])])
    assert float(layer_range(tailed, 4, torch.float32)[0]) < 0.8 * 61 / 15


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
def test_padding_changes_nothing_in_calibration(kind):
    def after(fill):
        model = tiny(kind)
        batch = inputs_for(model, batch=4)
        batch["input_ids"][batch["attention_mask"] == 0] = fill
        items = [{key: value[i] for key, value in batch.items()} for i in range(4)]
        model, _ = RepQuant(clip_steps=2, tokens=64).apply(model, Data(items, batch_size=4))
        return model.state_dict()

    one, other = after(5), after(77)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_padded_rows_leave_no_trace_in_what_attention_observes():
    torch.manual_seed(0)
    mask = torch.ones(2, 1, 10, 10, dtype=torch.bool).tril()
    mask[0, ..., :4] = False

    def observed(poison):
        q, k, v = torch.randn(3, 2, 3, 10, 8, generator=torch.Generator().manual_seed(1)).unbind()
        weights = torch.rand(2, 3, 10, 10, generator=torch.Generator().manual_seed(2))
        for x in (q, k, v, weights):
            x[0, :, :4] = poison
        found = Observed()
        found.add(q, k, v, weights, mask, None)
        return torch.cat([found.weights, *(torch.cat(sample) for sample in found.values)])

    assert torch.equal(observed(0.5), observed(0.001))


def test_attention_at_eight_bits_is_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 20, 8).unbind()
    attention = QuantizedAttention(8, log_softmax=False)
    attention.observed = Observed()
    exact = attention.attend(q, k, v, causal=True)
    torch.testing.assert_close(exact, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    attention.settle()
    assert float((attention.attend(q, k, v, causal=True) - exact).norm() / exact.norm()) < 0.03


def test_expert_tensors_and_routers():
    _, report = RepQuant(clip_steps=0, tokens=64).apply(tiny("mixtral"), data_for(tiny("mixtral")))
    assert len(report.skips) == 4 and "expert tensors stay in floating point" in report.headline


def test_a_quantized_linear_is_the_product_of_rounded_parts():
    layer, weight = QuantizedLinear(16, 5, bits=4, activation_bits=3), torch.randn(5, 16)
    layer.store(round_to_nearest(weight, Grid(4)))
    layer.input_scale.fill_(0.5)
    layer.input_zero.fill_(4.0)
    x = torch.randn(9, 16)
    rounded = (((2 * x).round() + 4).clamp(0, 7) - 4) / 2
    torch.testing.assert_close(layer(x), rounded @ round_to_nearest(weight, Grid(4)).dense(Grid(4)).mT)


WRONG = [{"bits": 1}, {"activation_bits": 9}, {"clip_steps": -1}, {"tokens": 0}, {"damp": 0.0}]


@pytest.mark.parametrize("wrong", WRONG)
def test_parameters_out_of_range_are_refused_in_one_line(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        RepQuant(**wrong)
