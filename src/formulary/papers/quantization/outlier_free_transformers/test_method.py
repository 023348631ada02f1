"""What is true of clipped softmax and gated attention alone: exact zeros, gates by hand, a start that changes nothing."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from formulary.contracts import Report, parts
from formulary.contracts.edits import editing
from formulary.errors import FormularyError, UsageError
from formulary.lab.small import inputs_for, tiny
from formulary.papers.quantization.outlier_free_transformers import ClippedSoftmax, GatedAttention
from formulary.papers.quantization.outlier_free_transformers.method import Gate, clipped_softmax

SLUG = "outlier-free-transformers"


def qkv(length=20, heads=2, width=8, dtype=torch.float32, sharpness=2.0):
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, heads, length, width, generator=generator, dtype=dtype) for _ in range(3))
    return sharpness * q, k, v


def out(model, batch):
    with torch.no_grad():
        found = model(**batch)
    return found["logits"] if "logits" in found else found["last_hidden_state"]


# ---------------------------------------------------------------- clipped softmax


@pytest.mark.parametrize("gamma,zeta", [(-0.025, 1.0), (-0.1, 1.0), (0.0, 1.05), (-0.1, 1.1)])
def test_clipping_is_the_papers_formula_number_by_number(gamma, zeta):
    rows = 3 * np.random.default_rng(0).normal(size=(5, 9))
    for row, found in zip(rows, clipped_softmax(torch.from_numpy(rows), gamma, zeta).tolist()):
        total = sum(math.exp(x) for x in row)
        for x, weight in zip(row, found):
            assert weight == pytest.approx(min(1.0, max(0.0, (zeta - gamma) * math.exp(x) / total + gamma)), abs=1e-12)


def test_weights_up_to_the_threshold_are_exactly_zero_and_have_no_gradient():
    scores = (3 * torch.randn(200, 30, dtype=torch.float64)).requires_grad_()
    gamma, zeta = -0.05, 1.02
    weights, soft = clipped_softmax(scores, gamma, zeta), scores.softmax(-1)
    low, high = -gamma / (zeta - gamma), (1 - gamma) / (zeta - gamma)
    assert torch.equal(weights == 0, soft <= low) and torch.equal(weights == 1, soft >= high)
    assert (weights == 0).any() and (weights == 1).any() and ((weights > 0) & (weights < 1)).any()
    weights[(weights == 0) | (weights == 1)].sum().backward()
    assert scores.grad.abs().max() == 0


@pytest.mark.parametrize("alpha,alive", [(0.9, True), (2.0, False), (4.0, False)])
def test_a_flat_row_is_nothing_where_alpha_is_above_1(alpha, alive):
    """The trap that the docstring warns of: such attention has no gradient."""
    q, k, v = (x.requires_grad_() for x in qkv(64))
    found = ClippedSoftmax(alpha, 64).attend(0 * q, k, v)
    grads = torch.autograd.grad(found.square().sum(), (q, v))
    assert (found.abs().max() > 0) == (grads[1].abs().max() > 0) == alive


def test_the_default_is_what_the_paper_trained_bert_with():
    assert ClippedSoftmax().gamma == pytest.approx(-0.025) and ClippedSoftmax().zeta == 1
    assert ClippedSoftmax(alpha=4.0, length=32).gamma == -0.125 and ClippedSoftmax(gamma=-0.5).gamma == -0.5


@pytest.mark.parametrize("case", ["plain", "causal", "mask", "bias", "scale"])
def test_attention_is_its_definition_query_by_query_and_sdpa_without_stretching(case):
    q, k, v = qkv()
    mask = torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[..., 0] = True
    given = {"causal": {"causal": True}, "mask": {"mask": mask}, "bias": {"bias": torch.randn(1, 2, 20, 20)}}
    given = given.get(case, {"scale": 0.2} if case == "scale" else {})
    found = ClippedSoftmax(2.0, 20).attend(q, k, v, **given).double()
    allowed = mask if case == "mask" else torch.ones(1, 1, 20, 20, dtype=torch.bool)
    allowed = (allowed.tril() if case == "causal" else allowed).expand(2, 2, 20, 20)
    bias = given.get("bias", torch.zeros(1)).expand(2, 2, 20, 20)
    for b, h, i in [(0, 0, 0), (0, 1, 7), (1, 0, 13), (1, 1, 19)]:
        keys = allowed[b, h, i].nonzero().flatten().tolist()
        scale = given.get("scale", 8**-0.5)
        logits = np.array([float(q[b, h, i] @ k[b, h, j]) * scale + float(bias[b, h, i, j]) for j in keys])
        p = np.exp(logits) / np.exp(logits).sum()
        expected = np.clip(1.1 * p - 0.1, 0, 1) @ v[b, h, keys].double().numpy()
        np.testing.assert_allclose(found[b, h, i].numpy(), expected, atol=1e-5)
    whole = ClippedSoftmax(**ClippedSoftmax.full_budget()).attend(q, k, v, **given)
    options = {"attn_mask": given.get("mask", given.get("bias")), "is_causal": case == "causal", "scale": given.get("scale")}
    torch.testing.assert_close(whole, sdpa(q, k, v, **options), rtol=1e-4, atol=1e-5)


def test_a_query_that_may_see_nothing_gives_zeros_and_finite_gradients():
    q, k, v = (x.requires_grad_() for x in qkv(5))
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    mask[..., 2, :] = False
    found = ClippedSoftmax(gamma=-0.1).attend(q, k, v, mask=mask)
    assert found[:, :, 2].abs().max() == 0
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(found.sum(), (q, k, v)))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_clipped_models_decode_and_come_back(name, tmp_path):
    """Decoding one token must be clipped too: SDPA would answer something else."""
    model = tiny(name)
    for part in parts.linears(model):
        part.raw.data.mul_(8)
    with editing(model, SLUG) as edit:
        for part in parts.mixers(model):
            edit.edit(part.name, ClippedSoftmax, alpha=2.0, length=16)
    inputs = inputs_for(model)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **settings), model.generate(**inputs, use_cache=False, **settings))
    model.save_pretrained(tmp_path, variant="formulary")
    assert torch.equal(out(type(model).from_pretrained(tmp_path).eval(), inputs), out(model, inputs))


# ---------------------------------------------------------------- gated attention


@pytest.mark.parametrize("kind", ["linear", "mlp", "all"])
def test_gates_are_one_small_network_a_head(kind):
    torch.manual_seed(0)
    gate, x = Gate(width=24, heads=3, kind=kind, pi=0.25, small=False), torch.randn(2, 5, 24)
    found = gate(x)
    assert found.shape == (2, 3, 5, 1)
    for h in range(3):
        seen = x if kind == "all" else x[..., 8 * h : 8 * h + 8]
        for i, (weight, bias) in enumerate(zip(gate.weights, gate.biases)):
            layer = nn.Linear(weight.shape[2], weight.shape[1])
            own = 0 if kind == "all" else h
            layer.weight.data, layer.bias.data = weight.data[own], bias.data[own]
            seen = layer(torch.relu(seen) if i else seen)
        torch.testing.assert_close(found[:, h, :, 0], seen[..., h if kind == "all" else 0].sigmoid())
    sizes = {"linear": 3 * (8 + 1), "mlp": 3 * (8 * 2 + 2 + 2 + 1), "all": 3 * (24 + 1)}
    assert parts.count_weights(gate) == sizes[kind]


def test_gates_start_near_what_is_asked_and_closed_gates_add_nothing():
    x = torch.randn(4, 50, 64)
    for pi in (0.1, 0.25, 0.9):
        assert float(Gate(64, 4, "linear", pi, small=True)(x).mean().detach()) == pytest.approx(pi, abs=0.01)
    layer = GatedAttention(width=64, heads=4)
    layer.gate.biases[-1].data.fill_(-1e9)
    assert torch.equal(layer(x), layer.o_proj.bias.expand_as(x))


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "gpt2", "opt", "bert", "vit", "dinov2", "bart"])
def test_with_gates_at_their_start_a_trained_model_is_as_it_was(family):
    """Projections, biases, grouped keys, rotary positions and padding are transformers' own; then gates that matter."""
    model = tiny(family)
    for part in parts.linears(model):
        part.raw.data.mul_(6)
    batch = inputs_for(model)
    if family == "gpt2":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    before, report = out(model, batch), Report(SLUG, {}, parts.count_weights(model))
    with editing(model, SLUG) as edit:
        slots = GatedAttention.swap(model, edit, report, pi_init=0.4)
    assert len(slots) == len(parts.blocks(model)) and all(slot.layer.factor == 2.5 for slot in slots)
    for slot in slots:
        slot.layer.gate.weights[-1].data.zero_()
    real = batch["attention_mask"].bool() if batch.get("attention_mask") is not None and family != "bart" else ...
    torch.testing.assert_close(out(model, batch)[real], before[real], rtol=1e-3, atol=1e-4 * float(before.abs().max()))
    for slot in slots:
        slot.layer.gate.weights[-1].data.normal_()
    assert (out(model, batch)[real] - before[real]).abs().max() > 0.01 * before.abs().max()


@pytest.mark.parametrize("rotary", [None, 100.0])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_in_pieces_with_padding_it_is_the_whole(rotary, kv_heads):
    torch.manual_seed(0)
    layer, x = GatedAttention(32, 4, kv_heads, rotary=rotary), torch.randn(2, 12, 32)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :5] = False
    whole, end = layer.scan(x, mask, layer.initial_state(x))
    first, state = layer.scan(x[:, :7], mask[:, :7], layer.initial_state(x))
    second, state = layer.scan(x[:, 7:11], None, state)
    last, state = layer.step(x[:, 11], state)
    pieces = torch.cat([first, second, last[:, None]], 1)
    torch.testing.assert_close(pieces[mask], whole[mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x[:1, 5:])[0], whole[0, 5:], rtol=1e-4, atol=1e-5)
    assert all(torch.allclose(a.float(), b.float(), atol=1e-5) for a, b in zip(state, end))


def test_attention_that_does_more_is_refused_in_one_line():
    for family, why in (("albert", "LayerNorm"), ("t5", "position biases")):
        model = tiny(family)
        report = Report(SLUG, {}, 1)
        with editing(model, SLUG) as edit:
            assert GatedAttention.swap(model, edit, report) == []
        assert report.skips and all(why in skip.note for skip in report.skips)
    scaled = copy.deepcopy(tiny("llama"))
    scaled.config.rope_parameters["rope_type"] = "linear"
    with pytest.raises(FormularyError, match="special type"):
        GatedAttention.arguments(parts.mixers(scaled)[0])


@pytest.mark.parametrize(
    "cls,wrong",
    [
        (ClippedSoftmax, {"alpha": -1.0}),
        (ClippedSoftmax, {"length": 0}),
        (ClippedSoftmax, {"gamma": 0.1}),
        (ClippedSoftmax, {"zeta": 0.9}),
        (GatedAttention, {"heads": 5}),
        (GatedAttention, {"kv_heads": 3}),
        (GatedAttention, {"gate": "none"}),
        (GatedAttention, {"pi_init": 1.0}),
        (GatedAttention, {"rotary": 0.5}),
    ],
)
def test_wrong_arguments_are_named_in_one_line(cls, wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))) as told:
        cls(**({"width": 32} if cls is GatedAttention else {}), **wrong)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gated_models_generate_with_a_cache_as_without(name):
    model = tiny(name)
    for part in parts.linears(model):
        part.raw.data.mul_(8)
    with editing(model, SLUG) as edit:
        GatedAttention.swap(model, edit, Report(SLUG, {}, 1), gate="mlp")
    inputs = inputs_for(model)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    assert torch.equal(model.generate(**inputs, **settings), model.generate(**inputs, use_cache=False, **settings))
