"""What is true of TBT alone: levels and steps against loops, LSQ's gradients, attention against SDPA, and that
padding, storing and half precision change nothing that they should not. The parts shared by methods that train at 1
or 2 bits are tested here too.
"""

import copy

import pytest
import torch
from torch.nn import functional as F

from formulary.contracts import parts
from formulary.errors import UsageError
from formulary.lab.small import inputs_for, tiny
from formulary.papers.quantization._training import agreement, in_float32, observe_inputs
from formulary.papers.quantization.tbt_binary_ternary.activations import (
    Elastic,
    ElasticAttention,
    elastic,
    map_error,
    per_row,
)
from formulary.papers.quantization.tbt_binary_ternary.method import TBT, TBTEmbedding, TBTLinear, low_bit_rows
from formulary.papers.quantization.tbt_binary_ternary.plain import MinMax, PlainLinear


@pytest.mark.parametrize("bits", [1, 2])
def test_levels_and_scales_against_a_loop(bits):
    w = torch.randn(5, 37)
    levels, scale = low_bit_rows(w, bits)
    for i in range(5):
        mean = sum(abs(float(v)) for v in w[i]) / 37
        a = mean * 4 / 3 if bits == 2 else mean
        assert float(scale[i]) == pytest.approx(a, rel=1e-5)
        for j in range(37):
            v = float(w[i, j])
            wanted = (1 if v > 0 else -1) if bits == 1 or abs(v) > a / 2 else 0
            assert float(levels[i, j]) == wanted


def test_the_levels_of_uniform_weights_are_equally_frequent():
    levels, _ = low_bit_rows(torch.linspace(-0.3, 0.3, 3001)[None], 2)
    assert [round(float((levels == level).float().mean()), 2) for level in (-1, 0, 1)] == [0.33, 0.33, 0.33]


def test_weights_have_a_straight_through_gradient():
    w = torch.randn(3, 8, requires_grad=True)
    levels, scale = low_bit_rows(w, 2)
    wanted = torch.randn(3, 8)
    (scale * levels * wanted).sum().backward()
    torch.testing.assert_close(w.grad, wanted)


@pytest.mark.parametrize("bits,unsigned", [(1, False), (2, False), (1, True), (2, True)])
def test_elastic_steps_have_the_gradients_of_lsq(bits, unsigned):
    torch.manual_seed(0)
    x, step, weight = torch.randn(50, requires_grad=True), torch.tensor(0.7, requires_grad=True), torch.randn(50)
    out = elastic(x, step, bits, unsigned, count=25)
    (out * weight).sum().backward()
    low, high, slope = (0, bits, 0.0) if unsigned else (-1, 1, 0.0)
    for i in range(50):
        v = float(x[i].detach()) / 0.7
        if bits == 1 and not unsigned:
            q, d_step, inside = (1 if v >= 0 else -1), (1 if v >= 0 else -1), abs(v) <= 1
        else:
            q, inside = min(max(round(v), low), high), low <= v <= high
            d_step = q - v if inside else q
        assert float(out[i].detach()) == pytest.approx(0.7 * q, abs=1e-5)
        assert float(x.grad[i]) == pytest.approx(float(weight[i]) if inside else 0.0, abs=1e-5)
        slope += d_step * float(weight[i]) / (25 * high) ** 0.5
    assert float(step.grad) == pytest.approx(slope, abs=1e-4)


def test_steps_start_where_the_paper_says():
    for bits, unsigned, wanted in ((1, False, 1.0), (2, True, 2 / 3**0.5), (1, True, 2.0)):
        quantizer = Elastic(bits, unsigned)
        quantizer.start(0.5, -0.17)
        assert float(quantizer.step.detach()) == pytest.approx(wanted)
        assert float(quantizer.shift) == pytest.approx(-0.17 if (bits, unsigned) == (2, True) else 0.0)


def test_eight_bits_are_off_by_half_a_level_at_most():
    x = torch.randn(4, 100) * torch.tensor([[1.0], [10.0], [0.1], [1.0]])
    assert bool(((per_row(x, False) - x).abs() <= x.abs().amax(-1, keepdim=True) / 254 * 1.001).all())


@pytest.mark.parametrize("bits", [1, 2])
def test_the_stored_layer_computes_what_the_trained_one_did(bits):
    torch.manual_seed(0)
    layer = TBTLinear(70, 6, bits=bits, activation_bits=2)
    layer.start(torch.randn(6, 70))
    x = torch.randn(3, 70)
    before, weight = layer(x).detach(), layer.weight.detach()
    layer.finish()
    assert torch.equal(layer(x), before) and torch.equal(layer.weight, weight)
    assert layer.codes.shape == (6, 9 * bits) and layer.latent is None
    table = TBTEmbedding(6, 70, bits=bits)
    table.start(torch.randn(6, 70))
    rows = table(torch.tensor([[4, 1]])).detach()
    table.finish()
    assert torch.equal(table(torch.tensor([[4, 1]])), rows) and torch.equal(table.weight[[4, 1]], rows[0])


@pytest.mark.parametrize("causal", [False, True])
def test_attention_without_bits_is_attention(causal):
    q, k, v = torch.randn(3, 2, 3, 9, 8).unbind()
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    mask[0, ..., 6:] = False
    if causal:
        mask, ours = mask.tril(), ElasticAttention(bits=0).attend(q, k, v, mask=mask, causal=True)
    else:
        ours = ElasticAttention(bits=0).attend(q, k, v, mask=mask)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    bias = torch.randn(1, 3, 9, 9)
    torch.testing.assert_close(
        ElasticAttention(bits=0).attend(q, k, v, bias=bias), F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    )


def test_attention_of_few_bits_has_few_levels():
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind()
    attention = ElasticAttention(bits=2)
    attention.quantizers[3].start(0.2)
    seen = []
    attention.quantizers[3].register_forward_hook(lambda module, args, out: seen.append(out))
    attention.attend(q, k, v)
    assert len(seen[0].unique()) <= 3 and float(seen[0].detach().min()) == 0


def test_maps_are_compared_at_real_queries_alone():
    one, other = ElasticAttention(bits=0), ElasticAttention(bits=0)
    real = torch.tensor([True, True, False])[None, None, :, None]
    a, b = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)
    a[..., 0, 0], a[..., 2, :] = 1.0, 99.0
    one.maps, other.maps = (a, real), (b, real)
    assert float(map_error([one], [other])) == pytest.approx(0.5)


@pytest.mark.parametrize("kind,bits", [("bert", 1), ("llama", 2)])
def test_what_stands_at_padding_changes_nothing(kind, bits, data_for):
    model = tiny(kind)
    first, second = data_for(model), data_for(model)
    for item in second.items:
        item["input_ids"] = item["input_ids"].masked_fill(item["attention_mask"] == 0, 55)
    assert any((item["attention_mask"] == 0).any() for item in first.items)
    method = TBT(steps=3, bits=bits, activation_bits=bits, embeddings=False)
    one, other = (method.apply(copy.deepcopy(model), data)[0].state_dict() for data in (first, second))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_training_brings_it_closer_to_the_teacher(distance_to_teacher):
    before, _, _ = distance_to_teacher(TBT(steps=1, learning_rate=3e-3, embeddings=False))
    after, _, report = distance_to_teacher(TBT(steps=40, learning_rate=3e-3, embeddings=False))
    assert after < 0.7 * before
    first, last = report.figures["training loss, first step and last tenth"]
    assert last < first


def test_the_agreement_of_a_model_with_itself_is_perfect():
    for kind in ("gpt2", "vit", "t5"):
        model = tiny(kind)
        with torch.no_grad():
            assert float(agreement(model, copy.deepcopy(model), inputs_for(model))) == pytest.approx(0, abs=1e-6)


def test_inputs_are_observed_without_padding(data_for):
    model = tiny("bert")
    chosen = parts.linears(model)[:1]
    data = data_for(model)
    seen = observe_inputs(model, chosen, data)[chosen[0].name]
    rows = []
    with torch.no_grad():
        for item in data.items:
            rows.append(model.embeddings(item["input_ids"][None])[0][item["attention_mask"].bool()])
    x = torch.cat(rows)
    assert seen.center == pytest.approx(float(x.mean()), abs=1e-5)
    assert seen.magnitude == pytest.approx(float((x - x.mean()).abs().mean()), rel=1e-4)
    assert seen.low == pytest.approx(float(x.min()), rel=1e-5)


def test_half_precision_is_trained_in_float32_and_given_back():
    model = tiny("vit").to(torch.bfloat16)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with in_float32(model):
        assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept[name]) and value.dtype == torch.bfloat16


def test_what_is_stored_is_as_small_as_said(data_for):
    model = tiny("bert")
    _, report = TBT(steps=1).apply(model, data_for(model))
    changed = [module for module in model.modules() if isinstance(module, TBTLinear | TBTEmbedding)]
    stored = sum(module.codes.numel() + 4 * module.scale.numel() for module in changed)
    weights = sum(change.weights for change in report.changes)
    assert report.figures["bits per weight, scales counted"] == pytest.approx(8 * stored / weights)
    size = lambda model: sum(tensor.nbytes for tensor in model.state_dict().values())
    extra = sum(t.nbytes for name, t in model.state_dict().items() if name.endswith((".step", ".shift")))
    assert size(tiny("bert")) - size(model) == 4 * weights - stored - extra


def test_a_tied_table_stays_and_is_named(data_for):
    _, report = TBT(steps=1).apply(tiny("gpt2"), data_for(tiny("gpt2")))
    assert "tied" in report.headline


@pytest.mark.parametrize("wrong", [{"bits": 3}, {"activation_bits": 4}, {"steps": 0}, {"learning_rate": 0.0}])
def test_parameters_out_of_range_are_refused_in_one_line(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        TBT(**wrong)


def test_the_plain_baseline_is_twns_and_min_max():
    w = torch.randn(4, 33)
    layer = PlainLinear(33, 4, bits=2, activation_bits=2)
    levels, scale = layer.low_bit(w)
    for row, level, a in zip(w, levels, scale):
        beyond = [abs(float(v)) for v in row if abs(float(v)) > 0.7 * float(row.abs().mean())]
        assert float(a) == pytest.approx(sum(beyond) / len(beyond), rel=1e-5)
        assert [int(v) for v in level] == [0 if abs(float(v)) not in beyond else (1 if v > 0 else -1) for v in row]
    x = torch.tensor([-1.0, -0.4, 0.3, 2.0])
    torch.testing.assert_close(MinMax(2, False)(x, 4), torch.tensor([-1.0, 0.0, 0.0, 2.0]))
