"""Native attention and GELU against PyTorch's: odd sizes, shared heads, strided views, gradients, poisoned memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from formulary.kernels import encoder


def operands(lengths, heads=4, shared=2, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(sum(lengths), n, width, generator=generator)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return draw(heads), draw(shared), draw(shared), starts


def brute(query, key, value, starts, scale, causal):
    """The definition in float64, one query at a time."""
    out, groups = torch.empty(query.shape, dtype=torch.float64), query.shape[1] // key.shape[1]
    for start, end in zip(starts.tolist(), starts.tolist()[1:]):
        for i in range(start, end):
            for h in range(query.shape[1]):
                last = i + 1 if causal else end
                scores = key[start:last, h // groups].double() @ query[i, h].double() * scale
                out[i, h] = scores.softmax(0) @ value[start:last, h // groups].double()
    return out


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any),
    width=st.sampled_from([1, 8, 15, 16, 32, 33, 64, 80]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3)]),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_attention_is_its_definition(lengths, width, heads, causal, seed):
    query, key, value, starts = operands(lengths, *heads, width, seed)
    seen = encoder.attention(query, key, value, starts, causal=causal)
    torch.testing.assert_close(seen.double(), brute(query, key, value, starts, width**-0.5, causal), atol=2e-6, rtol=1e-5)
    plain = encoder.plain_attention(query, key, value, starts, causal=causal)
    torch.testing.assert_close(seen, plain, atol=2e-6, rtol=1e-5)


def test_huge_scores_and_an_own_scale_do_not_overflow():
    query, key, value, starts = operands([50])
    seen = encoder.attention(100 * query, 100 * key, value, starts, scale=1.0)
    torch.testing.assert_close(seen, encoder.plain_attention(100 * query, 100 * key, value, starts, scale=1.0), atol=1e-4, rtol=1e-4)


def test_views_of_projections_are_read_by_their_strides():
    projected = torch.randn(30, 3 * 4 * 16)
    query, key, value = projected.view(30, 3, 4, 16).unbind(1)
    starts = torch.tensor([0, 13, 30])
    assert not query.is_contiguous()
    expected = encoder.attention(query.contiguous(), key.contiguous(), value.contiguous(), starts)
    assert torch.equal(encoder.attention(query, key, value, starts), expected)


def test_a_sequence_never_sees_another():
    query, key, value, starts = operands([17, 23])
    clean = encoder.attention(query, key, value, starts)
    for x in (query, key, value):
        x[:17] = float("nan")
    seen = encoder.attention(query, key, value, starts)
    assert torch.equal(seen[17:], clean[17:]) and seen[:17].isnan().all()


def test_gradients_are_those_of_the_plain_twin():
    query, key, value, starts = operands([9, 4])
    leaves = [x.requires_grad_() for x in (query, key, value)]
    encoder.attention(*leaves, starts).square().sum().backward()
    seen = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad = None
    encoder.plain_attention(*leaves, starts).square().sum().backward()
    for ours, x in zip(seen, leaves):
        torch.testing.assert_close(ours, x.grad)


@pytest.mark.parametrize("size", [1, 15, 16, 1000, 70_001])
def test_gelu_is_pytorch_s(size):
    x = 4 * torch.randn(size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encoder.gelu(x), nn.functional.gelu(x), atol=2e-6, rtol=1e-5)


def test_gelu_at_the_ends():
    x = torch.tensor([0.0, -0.0, 30.0, -30.0, 1e30, float("inf"), float("nan")])
    seen = encoder.gelu(x)
    assert seen[:6].tolist() == [0.0, 0.0, 30.0, 0.0, torch.tensor(1e30).item(), float("inf")] and seen[6].isnan()


def test_results_do_not_depend_on_the_number_of_threads():
    query, key, value, starts = operands([60, 31, 5, 80])
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            seen.append(encoder.attention(query, key, value, starts))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*seen)


@pytest.mark.parametrize("width", [1, 16, 33, 384])
def test_embeddings_are_summed_and_normed(width):
    g = torch.Generator().manual_seed(width)
    tables = [3 * torch.randn(rows, width, generator=g) for rows in (50, 7, 2)]
    ids = [torch.randint(0, len(table), (5, 9), generator=g) for table in tables]
    weight, shift = torch.randn(2, width, generator=g)
    seen = encoder.embed(tables, ids, weight, shift, 1e-3)
    total = sum(table.double()[i] for i, table in zip(ids, tables))
    centered = total - total.mean(-1, keepdim=True)
    wanted = centered / (centered.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight + shift
    torch.testing.assert_close(seen.double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.plain_embed(tables, ids, weight, shift, 1e-3), seen, atol=1e-5, rtol=1e-5)
    strided = [torch.randn(len(table), 2 * width, generator=g)[:, :width].copy_(table) for table in tables]
    assert torch.equal(encoder.embed(strided, [i.int() for i in ids], weight, shift, 1e-3), seen)
    assert encoder.embed(tables, [i[:0] for i in ids], weight, shift, 1e-3).shape == (0, 9, width)


@pytest.mark.parametrize("wrong", [-1, 7])
def test_an_id_that_no_table_has_is_refused(wrong):
    tables, ids = [torch.randn(9, 4), torch.randn(7, 4)], [torch.tensor([3]), torch.tensor([wrong])]
    with pytest.raises(IndexError):
        encoder.embed(tables, ids, torch.ones(4), torch.zeros(4), 1e-5)
