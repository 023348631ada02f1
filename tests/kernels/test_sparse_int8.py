"""The block-sparse int8 product: against the dense one of the same weights and the plain twin, at any density and odd sizes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formulary.errors import FormularyError
from formulary.kernels import int8, native, sparse_int8

PATHS = [sparse_int8.plain_linear, sparse_int8.linear][: 1 + sparse_int8.level()]
DENSITIES = st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0])


def tokens(rows: int, features: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))


def weights(outputs: int, features: int, density: float, seed: int = 1):
    """(codes, scale, bias) with that share of 4x1 blocks, the rest zero."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (outputs, features), generator=generator).to(torch.int8)
    keep = torch.rand(-(-outputs // 4), features, generator=generator) < density
    codes *= keep.repeat_interleave(4, 0)[:outputs]
    return codes, torch.rand(outputs, generator=generator), torch.randn(outputs, generator=generator)


def test_this_machine_runs_natively_where_it_can():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert sparse_int8.level() == int("avx512_vnni" in flags and native.compiler() is not None)
    assert ("VNNI in C++" in sparse_int8.path()) == bool(sparse_int8.level())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 150), features=st.integers(1, 200), outputs=st.integers(1, 70), density=DENSITIES,
    bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_the_dense_product_of_the_same_weights(rows, features, outputs, density, bias, seed):
    x, (codes, scale, offset) = tokens(rows, features, seed), weights(outputs, features, density, seed)
    x[0] = 0.0
    offset = offset if bias else None
    for path in PATHS:
        seen = path(x, *sparse_int8.compress(codes), scale, offset)
        torch.testing.assert_close(seen, int8.plain_linear(x, codes, scale, offset, 1e30), atol=1e-4, rtol=1e-5)
    if sparse_int8.level() and int8.level():
        assert torch.equal(seen, int8.linear(x, codes, scale, offset, 1e30))


@pytest.mark.parametrize("rows", [1, 4, 5, 16, 17, 64, 65, 129])
def test_integer_sums_are_exact_for_every_tile(rows):
    """With 127 in every token, the step is 1: what comes out is the sum of products of integers itself."""
    codes, _, _ = weights(50, 131, 0.3)
    x = torch.randint(-127, 128, (rows, 131), generator=torch.Generator().manual_seed(rows)).float()
    x[:, 0] = 127.0
    exact = (x.long() @ codes.long().mT).float()
    for path in PATHS:
        assert torch.equal(path(x, *sparse_int8.compress(codes), torch.ones(50), None), exact)


def test_the_largest_sums_do_not_overflow():
    x, codes = torch.full((70, 4096), -127.0), torch.full((6, 4096), -127, dtype=torch.int8)
    for path in PATHS:
        assert (path(x, *sparse_int8.compress(codes), torch.ones(6), None) == 4096 * 127 * 127).all()


def test_columns_beyond_16_bits_with_a_sign_are_read_right():
    codes = torch.zeros(4, 50_000, dtype=torch.int8)
    codes[:, [7, 32_767, 32_768, 49_999]] = torch.tensor([1, 2, 3, 4], dtype=torch.int8)
    blocks = sparse_int8.compress(codes)
    x = torch.zeros(2, 50_000)
    x[:, [7, 32_767, 32_768, 49_999]] = torch.tensor([127.0, 100.0, 10.0, 1.0])
    assert blocks[1].dtype == torch.int32 and sparse_int8.compress(codes[:, :99])[1].dtype == torch.int16
    for path in PATHS:
        assert path(x, *blocks, torch.ones(4), None).tolist() == [[361.0] * 4] * 2


@settings(max_examples=30, deadline=None)
@given(features=st.integers(1, 50), outputs=st.integers(1, 30), density=DENSITIES, seed=st.integers(0, 99))
def test_compressing_loses_nothing(features, outputs, density, seed):
    codes, _, _ = weights(outputs, features, density, seed)
    pointers, columns, values = sparse_int8.compress(codes)
    assert torch.equal(sparse_int8.decompress(pointers, columns, values, features, outputs), codes)
    filled = torch.nn.functional.pad(codes, (0, 0, 0, -outputs % 4)).view(-1, 4, features)
    assert len(values) == len(columns) == pointers[-1] == filled.ne(0).any(1).sum()


def test_blocks_of_zeros_may_be_kept_and_rows_may_be_empty():
    codes, scale, bias = weights(40, 30, 0.3)
    codes[8:16] = 0
    keep = torch.ones(10, 30, dtype=torch.bool)
    keep[3] = False
    blocks = sparse_int8.compress(codes, keep)
    assert len(blocks[2]) == 270 and blocks[0].diff().tolist() == [30, 30, 30, 0, 30, 30, 30, 30, 30, 30]
    x = tokens(20, 30)
    for path in PATHS:
        torch.testing.assert_close(path(x, *blocks, scale, bias), int8.plain_linear(x, codes, scale, bias, 1e30))


@pytest.mark.parametrize("rows", [1, 3, 9, 20, 70])
def test_poisoned_memory_is_never_read_and_all_of_the_output_is_written(rows):
    codes, scale, bias = weights(37, 45, 0.4)
    blocks, clean = sparse_int8.compress(codes), tokens(rows, 45)
    expected = sparse_int8.plain_linear(clean, *blocks, scale, bias)
    around = torch.full((rows + 80, 45), torch.nan)
    around[40 : 40 + rows] = clean
    sparse_int8.linear(around[:40], *blocks, scale, bias)  # what it leaves in memory that the next call uses again
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        for path in PATHS:
            seen = path(around[40 : 40 + rows], *blocks, scale, bias)
            torch.testing.assert_close(seen, expected, atol=1e-4, rtol=1e-5)
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rows", [2, 10, 70])
def test_a_poisoned_token_stays_alone(rows, value):
    x, (codes, scale, bias) = tokens(rows, 67), weights(12, 67, 0.3)
    for path in PATHS:
        clean = path(x, *sparse_int8.compress(codes), scale, bias)
        poisoned = x.clone()
        poisoned[1, 66] = value
        seen = path(poisoned, *sparse_int8.compress(codes), scale, bias)
        others = torch.arange(rows) != 1
        assert seen[1].isnan().all() and torch.equal(seen[others], clean[others])


def test_packed_weights_follow_what_is_written_to_them():
    x, (codes, scale, bias) = tokens(9, 40), weights(24, 40, 0.3)
    blocks = sparse_int8.compress(codes)
    for change in (lambda: blocks[2].neg_(), lambda: scale.mul_(2), lambda: bias.add_(1), lambda: blocks[2][3:].zero_()):
        sparse_int8.linear(x, *blocks, scale, bias)
        change()
        expected = sparse_int8.plain_linear(x, *blocks, scale, bias)
        torch.testing.assert_close(sparse_int8.linear(x, *blocks, scale, bias), expected, atol=1e-4, rtol=1e-5)


def test_results_do_not_depend_on_the_number_of_threads_or_on_other_rows():
    x, (codes, scale, bias) = tokens(700, 257), weights(530, 257, 0.2)
    blocks, before, seen = sparse_int8.compress(codes), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for size in (1, 7, 60, 700):
                part = x[:60] if size < 60 else x
                seen.append(torch.cat([sparse_int8.linear(some, *blocks, scale, bias) for some in part.split(size)]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(seen[3][: len(other)], other) for other in seen) or not sparse_int8.level()


def test_strided_empty_and_half_precision_inputs_are_read_right():
    x, (codes, scale, bias) = tokens(40, 64).bfloat16().float(), weights(8, 64, 0.5)
    blocks = sparse_int8.compress(codes)
    expected = sparse_int8.linear(x, *blocks, scale, bias)
    strided = torch.empty(64, 40).mT.copy_(x)
    assert not strided.is_contiguous()
    assert torch.equal(sparse_int8.linear(strided, *blocks, scale, bias), expected)
    assert torch.equal(sparse_int8.linear(x.bfloat16(), *blocks, scale, bias), expected)
    assert torch.equal(sparse_int8.linear(x.view(5, 8, 64), *blocks, scale, bias), expected.view(5, 8, 8))
    for path in PATHS:
        assert path(x[:0], *blocks, scale, bias).shape == (0, 8)


@pytest.mark.parametrize("damage", ["column", "negative column", "twice", "pointer", "end", "rows"])
def test_damaged_blocks_are_refused_before_anything_is_read(damage):
    codes, scale, _ = weights(8, 10, 1.0)
    pointers, columns, values = sparse_int8.compress(codes)
    if damage == "column":
        columns[3] = 10_000
    elif damage == "negative column":
        columns[0] = -1
    elif damage == "twice":
        columns[4] = columns[3]
    elif damage == "pointer":
        pointers[1] = 21
    elif damage == "end":
        pointers[-1] = 19
    else:
        pointers = pointers[:-1]
    for path in PATHS:
        with pytest.raises(FormularyError, match="columns" if "column" in damage or damage == "twice" else "pointers"):
            path(tokens(3, 10), pointers, columns, values, scale, None)


def test_too_many_inputs_are_refused():
    with pytest.raises(FormularyError, match="65536 inputs, not 65537"):
        sparse_int8.decompress(*sparse_int8.compress(torch.zeros(1, 65_537, dtype=torch.int8)), 65_537, 1)


PROGRAM = """
import torch
from formulary.kernels import sparse_int8
x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
blocks = sparse_int8.compress(torch.eye(16).to(torch.int8))
print(sparse_int8.linear(x, *blocks, torch.ones(16), None).sub(x).abs().max().item() < 0.03)
print(sparse_int8.path())
"""


def test_without_a_compiler_the_plain_path_runs_and_says_why(tmp_path):
    environment = {**os.environ, "FORMULARY_CACHE": str(tmp_path / "cache"), "PATH": str(tmp_path), "CXX": ""}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120)
    right, path = done.stdout.splitlines()
    assert right == "True" and "decompressed" in path and "no C++ compiler" in path, done.stderr


def test_the_twin_needs_no_onednn(monkeypatch):
    x, (codes, scale, bias) = tokens(30, 64), weights(20, 64, 0.3)
    expected = sparse_int8.plain_linear(x, *sparse_int8.compress(codes), scale, bias)
    monkeypatch.setattr(int8, "has_onednn", lambda: False)
    seen = sparse_int8.plain_linear(x, *sparse_int8.compress(codes), scale, bias)
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-6)
