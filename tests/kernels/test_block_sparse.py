"""Block-sparse attention against its definition and its twin: odd sizes, any density, masks, shared heads, views, poison."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formulary.kernels import block_sparse
from formulary.kernels.block_sparse import block_sparse_attention, dense_block_attention, gathered_attention

DTYPES = [torch.float32, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
CASES = ["full", "causal", "mask", "bias", "mask, bias and causal"]


def operands(length, keys=None, heads=2, groups=2, width=32, wide=None, block=32, density=0.4, dtype=torch.float32, seed=0):
    """query, key, value and blocks."""
    g = torch.Generator().manual_seed(seed)
    keys = keys or length
    shapes = [(2, heads, length, width), (2, groups, keys, width), (2, groups, keys, wide or width)]
    query, key, value = (torch.randn(shape, generator=g).to(dtype) for shape in shapes)
    blocks = torch.rand(2, heads, math.ceil(length / block), math.ceil(keys / block), generator=g) < density
    return 2 * query, key, value, blocks


def extras(case, length, keys, heads=2, seed=0):
    g = torch.Generator().manual_seed(seed + 1)
    extra = {"causal": "causal" in case}
    if "mask" in case:
        extra["mask"] = torch.rand(2, 1, length, keys, generator=g) < 0.5
    if "bias" in case:
        extra["bias"] = torch.randn(1, heads, length, keys, generator=g)
    return extra


def definition(query, key, value, blocks, block, *, mask=None, bias=None, scale=None, causal=False):
    """In float64, pair by pair."""
    query, key, value = (x.double() for x in (query, key, value))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    i, j = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
    seen = blocks[:, :, i // block, j // block]
    seen = seen & (j <= i) if causal else seen
    seen = seen & mask if mask is not None else seen
    scores = query @ key.mT * (query.shape[3] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias
    return scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0) @ value


def check(seen, wanted, dtype):
    assert seen.dtype == dtype
    atol, rtol = (1e-5, 1e-5) if dtype == torch.float32 else (1e-2, 2**-7)  # weights and outputs are rounded to 8 bits
    torch.testing.assert_close(seen.double(), wanted.double(), atol=atol, rtol=rtol)


@every_dtype
@pytest.mark.parametrize("length", [1, 63, 100, 2000])
@pytest.mark.parametrize("case", CASES)
def test_odd_lengths(length, case, dtype):
    block = 128 if length == 2000 else 32
    *given, blocks = operands(length, width=64, block=block, dtype=dtype)
    extra = extras(case, length, length)
    seen = block_sparse_attention(*given, blocks, block, **extra)
    twin = dense_block_attention(*(x.float() for x in given), blocks, block, **extra)
    check(seen, twin, dtype)
    if length < 2000:
        check(seen, definition(*given, blocks, block, **extra), dtype)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 150),
    keys=st.integers(1, 150),
    block=st.sampled_from([1, 4, 16, 24, 48, 64, 128, 200]),
    width=st.sampled_from([16, 48, 64, 128]),
    wide=st.sampled_from([16, 80, 128]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    case=st.sampled_from(CASES),
    seed=st.integers(0, 99),
)
def test_attention_is_its_definition(length, keys, block, width, wide, heads, density, dtype, case, seed):
    *given, blocks = operands(length, keys, *heads, width, wide, block, density, dtype, seed)
    extra = extras(case, length, keys, heads[0], seed)
    seen = block_sparse_attention(*given, blocks, block, **extra)
    check(seen, definition(*given, blocks, block, **extra), dtype)


@every_dtype
def test_queries_that_see_nothing_get_zeros_and_memory_may_be_poisoned(dtype):
    *given, blocks = operands(100, 70, block=16, density=0.3, dtype=dtype)
    blocks[:, :, 2] = False
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        assert torch.empty(3).isnan().all()
        seen = block_sparse_attention(*given, blocks, 16)
        nothing = block_sparse_attention(*given, torch.zeros_like(blocks), 16)
        masked = block_sparse_attention(*given, blocks, 16, mask=torch.zeros(1, 1, 100, 70, dtype=torch.bool))
    finally:
        torch.use_deterministic_algorithms(False)
    assert (seen[:, :, 32:48] == 0).all() and (nothing == 0).all() and (masked == 0).all()
    check(seen, definition(*given, blocks, 16), dtype)


@every_dtype
@pytest.mark.parametrize("causal", [True, False])
def test_what_is_not_chosen_is_never_read(causal, dtype):
    """Key blocks that nobody chose, and what lies in memory around the operands, may be NaN."""
    *given, blocks = operands(100, block=16, dtype=dtype)
    blocks[..., 3] = False
    clean = block_sparse_attention(*given, blocks, 16, causal=causal)
    poisoned = []
    for x in given:
        around = torch.full((2, 2, 140, 48), float("nan"), dtype=dtype)
        around[:, :, 20:120, 16:] = x
        poisoned.append(around[:, :, 20:120, 16:])
    for x in poisoned[1:]:
        x[:, :, 48:64] = float("nan")
    assert torch.equal(block_sparse_attention(*poisoned, blocks, 16, causal=causal), clean) and clean.isfinite().all()


@every_dtype
def test_a_nan_reaches_those_who_see_it_and_nobody_else(dtype):
    query, key, value, blocks = operands(64, block=16, density=1.0, dtype=dtype)
    blocks[:, :, 1, 2] = False
    blocks[:, :, 3] = False  # sees nothing, where a row of NaN was computed before
    clean = block_sparse_attention(query, key, value, blocks, 16)
    key[0, 0, 40, 3] = float("nan")
    seen = block_sparse_attention(query, key, value, blocks, 16)
    hit = torch.zeros(2, 2, 64, dtype=torch.bool)
    hit[0, 0] = True
    hit[0, 0, 16:32] = hit[0, 0, 48:] = False
    assert seen[hit].isnan().all() and torch.equal(seen[~hit], clean[~hit])


def test_views_of_projections_and_expanded_heads_are_read_by_their_strides():
    projected = torch.randn(2, 90, 3, 4, 32)
    query, key, value = (x.transpose(1, 2) for x in projected.unbind(2))
    blocks = torch.rand(2, 4, 3, 3) < 0.6
    expected = block_sparse_attention(*(x.contiguous() for x in (query, key, value)), blocks, 32, causal=True)
    assert not query.is_contiguous()
    assert torch.equal(block_sparse_attention(query, key, value, blocks, 32, causal=True), expected)
    shared = block_sparse_attention(query, key[:, :2], value[:, :2], blocks, 32)
    repeated = (x[:, [0, 0, 1, 1]] for x in (key, value))
    assert torch.equal(block_sparse_attention(query, *repeated, blocks, 32), shared)
    one = (x[:, :1].expand(-1, 4, -1, -1) for x in (key, value))
    single = block_sparse_attention(query, key[:, :1], value[:, :1], blocks, 32)
    assert torch.equal(block_sparse_attention(query, *one, blocks, 32), single)
    turned = [x.mT.contiguous().mT for x in (query, key, value)]
    assert torch.equal(block_sparse_attention(*turned, blocks, 32, causal=True), expected)


@every_dtype
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_bias_may_hide_and_be_of_another_dtype(dtype, bias_dtype):
    *given, blocks = operands(80, dtype=dtype)
    bias = torch.randn(1, 2, 80, 80).to(bias_dtype)
    bias[..., 5:40] = -math.inf
    bias[:, :, 7] = -math.inf
    seen = block_sparse_attention(*given, blocks, 32, bias=bias)
    check(seen, definition(*given, blocks, 32, bias=bias.double()), dtype)
    lowest = torch.finfo(torch.float32 if bias_dtype == torch.float64 else bias_dtype).min
    bias = bias.clamp_min(lowest)
    chosen = blocks | torch.eye(3, dtype=torch.bool)
    seen = block_sparse_attention(*given, chosen, 32, bias=bias)
    check(seen, definition(*given, chosen, 32, bias=bias.double()), dtype)


@every_dtype
@pytest.mark.parametrize("scale", [1.0, 0.3, 0.0, -0.5])
def test_huge_scores_and_an_own_scale(scale, dtype):
    query, key, value, blocks = operands(70, dtype=dtype, density=0.7)
    for factor in (1, 100):
        seen = block_sparse_attention(factor * query, key, value, blocks, 32, scale=scale)
        assert seen.isfinite().all()
        if factor == 1:
            check(seen, definition(query, key, value, blocks, 32, scale=scale), dtype)
    top = block_sparse_attention(1000 * query.float(), key.float(), value.float(), blocks, 32)
    torch.testing.assert_close(top.double(), definition(1000 * query, key, value, blocks, 32), atol=0.02, rtol=0.02)


def test_gradients_are_those_of_the_plain_twin():
    *given, blocks = operands(75, heads=4)
    results = []
    for attend in (block_sparse_attention, dense_block_attention):
        bias = torch.randn(1, 1, 75, 75, generator=torch.Generator().manual_seed(3))
        leaves = [x.clone().requires_grad_() for x in (*given, bias)]
        attend(*leaves[:3], blocks, 32, bias=leaves[3], causal=True).sin().sum().backward()
        results.append([x.grad for x in leaves])
    for seen, wanted in zip(*results):
        torch.testing.assert_close(seen, wanted, atol=2e-5, rtol=1e-4)


def test_only_a_bias_that_learns_takes_the_path_with_gradients():
    *given, blocks = operands(40)
    bias = torch.zeros(1, 1, 40, 40, requires_grad=True)
    block_sparse_attention(*given, blocks, 32, bias=bias).sum().backward()
    assert bias.grad.abs().sum() > 0
    with torch.no_grad():
        assert not block_sparse_attention(*given, blocks, 32, bias=bias).requires_grad


@pytest.mark.parametrize("dtype, width", [(torch.float32, 8), (torch.float32, 20), (torch.float32, 144), (torch.float64, 32)])
def test_other_widths_and_dtypes_take_the_gathered_path(dtype, width):
    *given, blocks = operands(50, heads=4, width=width, dtype=dtype)
    seen = block_sparse_attention(*given, blocks, 32, causal=True)
    assert torch.equal(seen, gathered_attention(*given, blocks, 32, causal=True))
    torch.testing.assert_close(seen.double(), definition(*given, blocks, 32, causal=True), atol=1e-5, rtol=1e-5)


@every_dtype
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    *given, blocks = operands(500, block=64, dtype=dtype)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            seen.append(block_sparse_attention(*given, blocks, 64, causal=True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*seen)


def test_the_path_told_is_the_path_taken(monkeypatch):
    *given, blocks = operands(60)
    half = [x.bfloat16() for x in given]
    taken = []

    def watched(name, run):
        return lambda *args, **more: (taken.append(name), run(*args, **more))[1]

    for name in ("_native_attention", "gathered_attention"):
        monkeypatch.setattr(block_sparse, name, watched(name, getattr(block_sparse, name)))
    here = block_sparse.level()
    for level in range(here + 1):
        for amx in (False, True):
            monkeypatch.setattr(block_sparse, "level", lambda: level)
            monkeypatch.setattr(block_sparse, "_has_amx", lambda: amx)
            for tensors in (given, half):
                dtype = tensors[0].dtype
                check(block_sparse_attention(*tensors, blocks, 32), definition(*tensors, blocks, 32), dtype)
                told = block_sparse.path(dtype)
                assert (taken[-1] == "_native_attention") == ("C++" in told)
                assert ("AMX" in told) == (amx and dtype == torch.bfloat16)
                assert ("in float32" in told) == (level == 1 and not amx and dtype == torch.bfloat16)
    assert "float16" in block_sparse.path(torch.float16)


@pytest.mark.parametrize("wrong", ["blocks", "groups", "keys"])
def test_operands_that_do_not_belong_together_are_refused(wrong):
    query, key, value, blocks = operands(64, heads=4)
    if wrong == "blocks":
        blocks = blocks[..., :1]
    if wrong == "groups":
        key, value = (x[:, [0, 0, 0]] for x in (key, value))
    if wrong == "keys":
        key, value = key[:, :, :30], value[:, :, :30]
    with pytest.raises(ValueError, match="got") as told:
        block_sparse_attention(query, key, value, blocks, 32)
    assert "\n" not in str(told.value)
