"""The int8 product: each fast path against its plain twin, odd sizes, poisoned memory, and life without a compiler."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formulary.kernels import int8, native


def tokens(rows: int, features: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))


def weights(outputs: int, features: int, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (outputs, features), generator=generator).to(torch.int8)
    return codes, torch.rand(outputs, generator=generator), torch.randn(outputs, generator=generator)


def test_integer_sums_of_both_products_are_exact():
    integers, _, _ = weights(33, 100)
    codes, scale, _ = weights(17, 100, seed=2)
    exact = (integers.long() @ codes.long().mT).float() * scale
    assert torch.equal(int8.plain_product(integers, codes, scale), exact)
    assert not int8.has_onednn() or torch.equal(int8.onednn_product(integers, codes, scale), exact)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 70), features=st.integers(1, 200), threshold=st.sampled_from([1e-3, 4.0, 6.0, 1e30]), seed=st.integers(0, 99))
def test_rounding_in_cpp_is_the_plain_one_to_the_bit(rows, features, threshold, seed):
    x = tokens(rows, features, seed)
    x[0] = 0.0
    seen, plain = int8.quantize(x, threshold), int8.plain_quantize(x, threshold)
    assert torch.equal(seen.integers, plain.integers) and torch.equal(seen.step, plain.step)
    assert torch.equal(seen.columns, plain.columns)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 300), features=st.integers(1, 90), outputs=st.integers(1, 60), bias=st.booleans(), seed=st.integers(0, 99))
def test_the_linear_map_is_its_equation(rows, features, outputs, bias, seed):
    x, (codes, scale, offset) = tokens(rows, features, seed), weights(outputs, features, seed)
    seen = int8.linear(int8.quantize(x, 6.0), codes, scale, offset if bias else None)
    rounded = int8.plain_quantize(x, 6.0)
    inliers = rounded.integers.double() * rounded.step.double()
    whole = torch.where(x.abs() >= 6.0, x.double(), inliers) @ (codes.double() * scale.double()[:, None]).mT
    torch.testing.assert_close(seen.double(), whole + offset.double() * bias, atol=1e-2, rtol=1e-4)


def test_more_rows_than_one_piece_holds_are_all_multiplied():
    x, (codes, scale, bias) = tokens(700, 32), weights(1024, 32)
    pieces = torch.cat([int8.linear(int8.quantize(row, 6.0), codes, scale, bias) for row in x.split(50)])
    assert torch.equal(int8.linear(int8.quantize(x, 6.0), codes, scale, bias), pieces)


def test_results_do_not_depend_on_the_number_of_threads():
    x, (codes, scale, bias) = tokens(900, 257), weights(130, 257)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            seen.append(int8.linear(int8.quantize(x, 6.0), codes, scale, bias))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*seen)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_poisoned_token_stays_alone(value):
    x, (codes, scale, bias) = tokens(20, 64), weights(8, 64)
    clean = int8.linear(int8.quantize(x, 6.0), codes, scale, bias)
    x[3, 5] = value
    seen = int8.linear(int8.quantize(x, 6.0), codes, scale, bias)
    others = torch.arange(20) != 3
    assert not seen[3].isfinite().any() and torch.allclose(seen[others], clean[others], rtol=1e-4, atol=1e-3)


def test_strided_and_half_precision_inputs_are_read_right():
    x, (codes, scale, bias) = tokens(40, 64).bfloat16().float(), weights(8, 64)
    expected = int8.linear(int8.quantize(x, 6.0), codes, scale, bias)
    strided = torch.empty(64, 40).mT.copy_(x)
    assert not strided.is_contiguous()
    assert torch.equal(int8.linear(int8.quantize(strided, 6.0), codes, scale, bias), expected)
    assert torch.equal(int8.linear(int8.quantize(x.bfloat16(), 6.0), codes, scale, bias), expected)


PROGRAM = """
import torch
from formulary.kernels import int8
x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
print(int8.linear(int8.quantize(x, 6.0), torch.eye(16).to(torch.int8), torch.ones(16), None).sub(x).abs().max().item() < 0.03)
print(int8.path())
"""


@pytest.mark.parametrize("missing", ["turned off", "no compiler", "failing compiler"])
def test_without_native_code_the_plain_path_runs_and_says_why(missing, tmp_path):
    environment = {**os.environ, "FORMULARY_CACHE": str(tmp_path / "cache")}
    if missing == "turned off":
        environment["FORMULARY_NATIVE"] = "0"
    elif missing == "no compiler":
        environment.update(PATH=str(tmp_path), CXX="")
    else:
        broken = tmp_path / "c++"
        broken.write_text("#!/bin/sh\necho it broke >&2\nexit 1\n")
        broken.chmod(0o755)
        environment["CXX"] = str(broken)
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120)
    right, path = done.stdout.splitlines()
    assert right == "True" and "in C++" not in path, done.stderr
    said = {"turned off": "FORMULARY_NATIVE", "no compiler": "no C++ compiler", "failing compiler": "it broke"}[missing]
    assert said in path or not int8.has_onednn()


@pytest.mark.skipif(native.compiler() is None, reason="needs a C++ compiler")
def test_a_compiled_library_is_kept_and_a_torn_one_is_never_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("FORMULARY_CACHE", str(tmp_path))
    source = native.Path(native.__file__).with_name("int8_rows.cpp")
    made = native._compiled(source)
    stamp = made.stat().st_mtime_ns
    assert native._compiled(source) == made and made.stat().st_mtime_ns == stamp
    assert [path.name for path in made.parent.iterdir()] == [made.name]
