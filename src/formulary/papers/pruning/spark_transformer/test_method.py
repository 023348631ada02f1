"""What is true of Spark Transformer alone: how many entries are kept, the formulas, the gathered path, and parameter parity."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from formulary.contracts import Report, parts
from formulary.contracts.edits import editing
from formulary.errors import UsageError
from formulary.lab.small import inputs_for, tiny
from formulary.papers.pruning.spark_transformer import SparkAttention, SparkFFN, StatTopK


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("keep", [0.02, 0.08, 0.2])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-3.0, 0.1)])
def test_keeps_its_share_of_gaussian_entries(keep, mean, std):
    x = draw(200, 4096) * std + mean
    kept = (StatTopK(keep)(x) > 0).float().mean()
    assert abs(kept / keep - 1) < 0.02


def test_soft_threshold_is_the_formula_and_orders_entries_as_top_k_does():
    x = draw(3, 50, dtype=torch.float64)
    y = StatTopK(0.1)(x)
    row = x.numpy()
    theta = row.mean(1, keepdims=True) + row.std(1, ddof=1, keepdims=True) * norm.ppf(0.9)
    np.testing.assert_allclose(y.numpy(), np.maximum(row - theta, 0), atol=1e-12)
    for values, kept in zip(x, y > 0):
        assert set(values.topk(int(kept.sum())).indices.tolist()) == set(kept.nonzero().flatten().tolist())


def test_gradient_passes_through_the_threshold():
    x = draw(4, 12, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(StatTopK(0.3), x)
    shifted = torch.autograd.grad(StatTopK(0.3)(x).sum(), x)[0].sum(-1)
    torch.testing.assert_close(shifted, torch.zeros_like(shifted))
    constant = torch.ones(2, 8, requires_grad=True)
    assert torch.isfinite(torch.autograd.grad(StatTopK(0.3)(constant).sum(), constant)[0]).all()


def test_feed_forward_is_the_paper_s_formula():
    torch.manual_seed(0)
    layer = SparkFFN(width=18, hidden=40, keep=0.2).double()
    q = draw(18, dtype=torch.float64).numpy()
    k1, k2, v = (m.weight.detach().numpy() for m in (layer.predict_proj, layer.up_proj, layer.down_proj))
    assert k1.shape == (40, 8) and k2.shape == (40, 10) and v.shape == (40, 18)
    x = k1 @ q[:8]
    gate = np.maximum(x - x.mean() - x.std(ddof=1) * norm.ppf(0.8), 0)
    expected = sum(g * norm.cdf(g) * (k2[i] @ q[8:]) * v[i] for i, g in enumerate(gate))
    np.testing.assert_allclose(layer(torch.from_numpy(q)[None, None])[0, 0].detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathered_rows_give_the_dense_output(shape, dtype):
    torch.manual_seed(0)
    layer, x = SparkFFN(width=32, hidden=96).to(dtype), draw(*shape, 32).to(dtype)
    dense = layer(x).detach()
    with torch.no_grad():
        assert layer._gathers(x) and not layer._gathers(x.repeat(9, 1, 1))
        torch.testing.assert_close(layer(x), dense, **({"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}))


def test_gathering_reads_active_rows_only():
    """Rows of neurons that are off may hold anything."""
    torch.manual_seed(0)
    layer, x = SparkFFN(width=32, hidden=96), draw(1, 1, 32)
    with torch.no_grad():
        before = layer(x)
        off = layer.topk(layer.predict_proj(x[..., : layer.split]))[0, 0] == 0
        assert 0.5 < off.float().mean() < 1
        layer.up_proj.weight[off], layer.down_proj.weight[off] = torch.nan, torch.nan
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize(("name", "neurons"), [("llama", 96), ("vit", 64), ("gpt2", 128)])
def test_has_the_parameters_of_what_it_replaces(name, neurons):
    """A gated feed-forward of 64 neurons gives 1.5 times as many; a plain one as many, but for its biases."""
    model, report = tiny(name), Report("spark-transformer", {}, 1)
    olds = [parts.count_weights(part.module) for part in parts.feed_forwards(model)]
    with editing(model, "spark-transformer") as edit:
        slots = SparkFFN.swap(model, edit, report)
    assert len(slots) == 2 and abs(slots[0].layer.predict_proj.out_features - neurons) <= 2
    assert all(abs(parts.count_weights(slot) / old - 1) < 0.02 for slot, old in zip(slots, olds))
    assert sum(part.layout == "conv1d" and "layer" in part.name for part in parts.linears(model)) == 2
    assert torch.isfinite(next(iter(model(**inputs_for(model)).values()))).all()


def test_experts_are_left_alone():
    model, report = tiny("mixtral"), Report("spark-transformer", {}, 1)
    with editing(model, "spark-transformer") as edit:
        assert SparkFFN.swap(model, edit, report) == []
    assert len(report.skips) == 2 and "already is sparse" in report.skips[0].note


def brute_force(q, k, v, allowed, *, keep, chosen, scale):
    """Spark attention query by query, from the definition."""
    out = np.zeros_like(q)
    for t in range(len(q)):
        keys = np.flatnonzero(allowed[t])
        first, second = k[keys][:, chosen] @ q[t, chosen] * scale, k[keys][:, ~chosen] @ q[t, ~chosen] * scale
        if len(keys) > keep:
            theta = first.mean() + first.std(ddof=1) * norm.ppf(1 - keep / len(keys))
            on = first >= min(theta, first.max())
        else:
            on = np.ones(len(keys), bool)
        weights = np.exp(first[on] - first[on].max())
        out[t] = (weights / weights.sum() * np.log1p(np.exp(second[on]))) @ v[keys[on]]
    return out


@pytest.mark.parametrize("keep", [1, 4, 100])
@pytest.mark.parametrize("masked", ["no", "boolean", "additive"])
def test_attention_is_the_definition_over_allowed_keys(keep, masked):
    q, k, v = (draw(1, 2, 23, 8, seed=seed) for seed in range(3))
    padded = torch.arange(23) < 5
    attention = SparkAttention(keep=keep)
    chosen = attention.channels(8).numpy()
    allowed = np.tril(np.ones((23, 23), bool)) & (~padded.numpy() if masked != "no" else True)
    mask = torch.from_numpy(allowed)[None, None]
    given = {
        "no": {"causal": True},
        "boolean": {"mask": mask},
        "additive": {"bias": torch.zeros(1, 1, 23, 23).masked_fill(~mask, torch.finfo(torch.float32).min)},
    }[masked]
    found = attention.attend(q, k, v, **given)
    for head in range(2):
        arrays = (x[0, head].double().numpy() for x in (q, k, v))
        rows = slice(0 if masked == "no" else 5, None)
        expected = np.zeros((23, 8))
        q64, k64, v64 = arrays
        expected[rows] = brute_force(q64[rows], k64, v64, allowed[rows], keep=keep, chosen=chosen, scale=8**-0.5)
        np.testing.assert_allclose(found[0, head].numpy(), expected, atol=2e-5)


def test_attention_keeps_about_as_many_keys_as_asked():
    q, k = draw(1, 1, 400, 64, seed=1), draw(1, 1, 400, 64, seed=2)
    attention = SparkAttention(keep=32)
    allowed = torch.ones(1, 1, 400, 400, dtype=torch.bool).tril()
    kept = attention.kept(q @ k.mT / 8, allowed).sum(-1)[0, 0]
    assert torch.equal(kept[:32], torch.arange(1, 33)) and abs(kept[100:].float().mean() / 32 - 1) < 0.05


def test_attention_gradients_and_full_budget():
    q, k, v = (draw(1, 1, 6, 4, seed=seed, dtype=torch.float64).requires_grad_() for seed in range(3))
    whole = SparkAttention(**SparkAttention.full_budget())
    assert not SparkAttention.equals_sdpa
    found = whole.attend(q, k, v, causal=True)
    half = whole.channels(4)
    scores, second = ((q[..., c] @ k[..., c].mT / 2) for c in (half, ~half))
    later = torch.ones(6, 6, dtype=torch.bool).triu(1)
    expected = (scores.masked_fill(later, -math.inf).softmax(-1) * nn.functional.softplus(second)) @ v
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    ours, theirs = (torch.autograd.grad(out.sin().sum(), (q, k, v)) for out in (found, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_a_query_that_may_see_nothing_gives_zeros_and_finite_gradients():
    q, k, v = (draw(1, 1, 5, 4, seed=seed).requires_grad_() for seed in range(3))
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    mask[..., 2, :] = False
    out = SparkAttention(keep=2).attend(q, k, v, mask=mask)
    assert out[0, 0, 2].abs().max() == 0
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize(("width", "share"), [(8, 0.5), (16, 0.25), (9, 0.5), (6, 0.34)])
def test_channels_that_turn_together_stay_together(width, share):
    chosen = SparkAttention(predictor=share).channels(width)
    half = width // 2
    assert torch.equal(chosen[:half], chosen[half : 2 * half]) and chosen.sum() == 2 * round(half * share)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generates_with_a_cache_as_without(name):
    """Decoding must go through Spark attention too: SDPA would answer something else."""
    torch.manual_seed(0)
    model, report = tiny(name), Report("spark-transformer", {}, 1)
    with editing(model, "spark-transformer") as edit:
        SparkFFN.swap(model, edit, report)
        for part in parts.mixers(model):
            edit.edit(part.name, SparkAttention, keep=4)
    inputs = inputs_for(model)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **settings), model.generate(**inputs, use_cache=False, **settings))


def test_refuses_in_one_line():
    for build in (lambda: StatTopK(1.0), lambda: SparkFFN(width=32, hidden=64, keep=0.0), lambda: SparkAttention(predictor=1.0)):
        with pytest.raises(UsageError, match="must be above 0 and below 1"):
            build()
    with pytest.raises(UsageError, match="predictor channels must be between 1 and 31"):
        SparkFFN(width=32, hidden=64, predictor=1.0)
    with pytest.raises(UsageError, match="leaves one part of a head of 4 channels empty"):
        SparkAttention(predictor=0.1).channels(4)
