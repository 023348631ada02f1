"""LeanAttention: against softmax in float64, the algebra of merging, and the schedule's promises."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formulary.contracts import edits, parts
from formulary.errors import UsageError
from formulary.lab.small import inputs_for, tiny
from formulary.papers.inference.leanattention import LeanAttention
from formulary.papers.inference.leanattention.method import finish, merge, partial_attention, schedule, tile_ranges


def drawn(length, keys, batch=2, heads=3, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, n, width, generator=generator) for n in (length, keys, keys)]


def reference(query, key, value, mask=None, bias=None, scale=None):
    """Softmax attention in float64; a query that sees nothing gets 0."""
    scores = query.double() @ key.double().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias.double()
    weights = scores.exp() if mask is None else scores.exp() * mask
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights @ value.double() / total.clamp_min(1e-300), 0)


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("length, keys", [(1, 1), (1, 100), (3, 257), (16, 64)])
def test_equals_softmax_whatever_the_tiles_and_workers(workers, length, keys):
    query, key, value = drawn(length, keys)
    for tile in (1, 7, 64, 1000):
        attention = LeanAttention(tile=tile, workers=workers)
        out = attention.attend(query, key, value)
        torch.testing.assert_close(out.double(), reference(query, key, value), atol=1e-5, rtol=1e-5)
        assert sum(attention.last_tiles) == 6 * math.ceil(keys / tile) and len(attention.last_tiles) == workers
        assert max(attention.last_tiles) - min(attention.last_tiles) <= 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_contexts_make_no_tiles_of_padding(side):
    query, key, value = drawn(2, 90)
    real = torch.zeros(2, 90, dtype=torch.bool)
    real[0, slice(55, 90) if side == "left" else slice(0, 35)] = True
    real[1] = True
    mask, bias = real[:, None, None].expand(-1, -1, 2, -1), torch.randn(1, 3, 2, 90)
    attention = LeanAttention(tile=10, workers=4)
    out = attention.attend(query, key, value, mask=mask, bias=bias, scale=0.4)
    torch.testing.assert_close(out.double(), reference(query, key, value, mask, bias, 0.4), atol=1e-5, rtol=1e-5)
    assert sum(attention.last_tiles) == 3 * (4 + 9)
    value[0, :, ~real[0]] = 1e6
    assert torch.equal(attention.attend(query, key, value, mask=mask, bias=bias, scale=0.4), out)


def test_a_query_that_sees_nothing_gets_zeros():
    query, key, value = drawn(2, 30)
    mask = torch.ones(2, 1, 2, 30, dtype=torch.bool)
    mask[0], mask[1, :, 1] = False, False
    for workers in (1, 3):
        out = LeanAttention(tile=8, workers=workers).attend(query, key, value, mask=mask)
        torch.testing.assert_close(out.double(), reference(query, key, value, mask), atol=1e-5, rtol=1e-5)
        assert bool((out[0] == 0).all() and (out[1, :, 1] == 0).all() and (out[1, :, 0] != 0).any())


def test_merging_parts_of_very_different_size_does_not_overflow():
    value = torch.tensor([[1.0], [2.0]])
    low, high = (partial_attention(torch.tensor([[score]]), row[None]) for score, row in zip((-500.0, 500.0), value))
    for pair in ((low, high), (high, low)):
        assert finish(merge(*pair)).tolist() == [[2.0]]


def test_merging_is_associative_and_commutative_with_a_neutral_part():
    generator = torch.Generator().manual_seed(0)
    scores = 30 * torch.randn(2, 60, generator=generator).double()
    scores[0, :20] = -torch.inf
    value = torch.randn(60, 4, generator=generator).double()
    a, b, c = (partial_attention(scores[:, i : i + 20], value[i : i + 20]) for i in (0, 20, 40))
    expected = scores.softmax(-1) @ value
    for whole in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(merge(c, a), b), merge(b, merge(c, a))):
        torch.testing.assert_close(finish(whole), expected)
    assert bool(torch.isfinite(merge(a, a)[1]).all())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=10), st.integers(1, 40))
def test_the_schedule_deals_out_each_tile_once_in_even_stretches(tiles, workers):
    ranges = [(5, 5 + count) for count in tiles]
    runs = schedule(ranges, workers)
    dealt = [(output, tile) for run in runs for output, first, last in run for tile in range(first, last)]
    assert dealt == [(i, tile) for i, (first, last) in enumerate(ranges) for tile in range(first, last)]
    loads = [sum(last - first for _, first, last in run) for run in runs]
    assert len(runs) == workers and max(loads) - min(loads) <= 1 and max(loads) < sum(tiles) / workers + 1


def test_tile_ranges_cover_what_is_seen():
    seen = torch.tensor([[False] * 10 + [True] * 3 + [False] * 7, [False] * 20])
    assert tile_ranges(seen, 2, 2, 20, 4) == [(2, 4), (2, 4), (0, 0), (0, 0)]
    assert tile_ranges(None, 1, 2, 20, 6) == [(0, 4), (0, 4)]


def test_gradients_are_those_of_softmax_and_threads_record_none():
    leaves = [x.requires_grad_() for x in drawn(2, 50)]
    LeanAttention(tile=8, workers=3).attend(*leaves).sin().sum().backward()
    twins = [x.detach().clone().requires_grad_() for x in leaves]
    reference(*twins).sin().sum().backward()
    for leaf, twin in zip(leaves, twins):
        torch.testing.assert_close(leaf.grad, twin.grad, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert not LeanAttention(tile=8, workers=3).attend(*leaves).requires_grad
    with torch.inference_mode():
        assert LeanAttention(tile=8, workers=3).attend(*leaves).is_inference()


def test_bfloat16_is_computed_in_float32():
    query, key, value = (x.bfloat16() for x in drawn(1, 200))
    out = LeanAttention(tile=16, workers=2).attend(query, key, value)
    torch.testing.assert_close(out, reference(query, key, value).bfloat16(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_models_decode_with_it_and_generate_the_same(kind):
    model = tiny(kind)
    inputs = inputs_for(model, length=20)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    with edits.editing(model, "leanattention") as edit:
        for part in parts.mixers(model):
            edit.edit(part.name, LeanAttention, tile=4, workers=2)
    assert torch.equal(copy.deepcopy(model).generate(**inputs, **options), expected)
    model.generate(**inputs, **options)
    assert all(sum(part.module.formulary_attention.last_tiles) > 0 for part in parts.mixers(model))


@pytest.mark.parametrize("wrong", [{"tile": 0}, {"workers": -1}, {"few": 0}])
def test_wrong_arguments_are_named_in_one_line(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))) as told:
        LeanAttention(**wrong)
    assert "\n" not in str(told.value)
