"""The loops of error compensation against their plain twins: sums over odd shapes, and the walk to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formulary.kernels import compensation
from formulary.kernels.compensation import Gram, plain_walk, walk

needs_compiler = pytest.mark.skipif(compensation.path() != "C++", reason=compensation.path())


@given(st.lists(st.integers(0, 300), min_size=1, max_size=3), st.integers(1, 150), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_gram_is_the_sum_over_batches(batches, features, seed):
    x = torch.randn(sum(batches), features, generator=torch.Generator().manual_seed(seed))
    gram = Gram(features)
    for batch in x.split(batches):
        gram.add(batch)
    torch.testing.assert_close(gram.total().double(), x.double().mT @ x.double(), atol=1e-3, rtol=1e-4)
    assert torch.equal(gram.total(), gram.total().mT)


def test_strided_and_half_precision_rows_count_as_they_are():
    x = torch.randn(90, 40)
    gram, half = Gram(20), Gram(40)
    gram.add(x[:, ::2])
    half.add(x.bfloat16())
    torch.testing.assert_close(gram.total(), x[:, ::2].mT @ x[:, ::2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(half.total(), x.bfloat16().float().mT @ x.bfloat16().float(), atol=1e-4, rtol=1e-4)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=3), st.integers(1, 150), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_gram_of_halves_is_that_of_the_rows_in_bfloat16(batches, features, seed):
    """Where the processor has no such products, of the rows as they are."""
    x = torch.randn(sum(batches), features, generator=torch.Generator().manual_seed(seed))
    gram, of_bfloat16 = Gram(features, halves=True), Gram(features, halves=True)
    for batch in x.split(batches):
        gram.add(batch)
        of_bfloat16.add(batch.bfloat16())
    assert not gram.rounds or torch.equal(of_bfloat16.total(), gram.total())
    rounded = x.bfloat16().double() if gram.rounds else x.double()
    torch.testing.assert_close(gram.total().double(), rounded.mT @ rounded, atol=1e-3, rtol=1e-4)
    assert torch.equal(gram.total(), gram.total().mT)
    assert gram.rounds == (compensation.path() == "C++" and torch.cpu._is_avx512_bf16_supported())


@needs_compiler
@given(
    columns=st.integers(1, 70), rows=st.integers(1, 50), groups=st.integers(1, 3), bits=st.integers(2, 8), seed=st.integers(0, 99),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_walk_gives_its_twins_bits(columns, rows, groups, bits, seed, cut):
    g = torch.Generator().manual_seed(seed)
    first, last = sorted(int(share * columns) for share in cut)
    upper = torch.randn(columns, columns, generator=g).triu() + 4 * torch.eye(columns)
    block, top = torch.randn(columns, rows, generator=g), 2**bits - 1
    scale = torch.rand(groups, rows, generator=g) + 0.01
    zero = torch.randint(0, top + 1, (groups, rows), generator=g).float()
    group = torch.randint(0, groups, (columns,), generator=g)
    results = []
    for function in (walk, plain_walk):
        changed, codes = block.clone(), torch.full((columns, rows), 255, dtype=torch.uint8)
        function(changed, first, last, upper, scale, zero, group, top, codes)
        results.append((changed, codes))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][0][:first], block[:first])


@needs_compiler
def test_ties_go_to_the_even_level_and_far_values_to_the_ends():
    block = torch.tensor([[0.5, 1.5, 2.5, -9e9, 9e9]])
    codes = torch.zeros(1, 5, dtype=torch.uint8)
    walk(block, 0, 1, torch.ones(1, 1), torch.ones(1, 5), torch.full((1, 5), 1.0), torch.zeros(1, dtype=torch.long), 7, codes)
    assert codes.tolist() == [[1, 3, 3, 0, 7]] and block.tolist() == [[0.0, 2.0, 2.0, -1.0, 6.0]]


@needs_compiler
def test_without_native_code_the_twin_runs(monkeypatch):
    x = torch.randn(50, 30)
    native = Gram(30)
    native.add(x)
    monkeypatch.setattr(compensation, "_signed", lambda: None)
    plain = Gram(30)
    plain.add(x)
    torch.testing.assert_close(plain.total(), native.total(), atol=1e-4, rtol=1e-4)
