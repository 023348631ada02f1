"""The int8 product: each fast path against its plain twin, odd sizes, poisoned memory, and life without a compiler."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

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
    assert int8.has_onednn() or not torch.cpu._is_vnni_supported()
    assert not int8.has_onednn() or torch.equal(int8.onednn_product(integers, codes, scale), exact)


LEVELS = [level for level in (1, 2) if level <= int8.level()]


@contextmanager
def running_at(level: int):
    """The native paths up to `level`: 0 is the plain twin."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "level", lambda: level)
        yield


def test_this_machine_runs_natively_where_it_can():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert int8.level() == 0 or "avx512_vnni" in flags
    assert int8.level() or "avx512_vnni" not in flags or native.compiler() is None


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 150), features=st.integers(1, 200), outputs=st.integers(1, 100), bias=st.booleans(),
    threshold=st.sampled_from([1e-3, 2.0, 6.0, 1e30]), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_path_is_the_equation(rows, features, outputs, bias, threshold, seed):
    x, (codes, scale, offset) = tokens(rows, features, seed), weights(outputs, features, seed)
    x[0] = 0.0
    rounded = int8.plain_quantize(x, threshold)
    inliers = rounded.integers.double() * rounded.step.double()
    whole = torch.where(x.abs() >= threshold, x.double(), inliers) @ (codes.double() * scale.double()[:, None]).mT
    for level in (0, *LEVELS):
        with running_at(level):
            seen = int8.linear(x, codes, scale, offset if bias else None, threshold)
        torch.testing.assert_close(seen.double(), whole + offset.double() * bias, atol=1e-2, rtol=1e-4)


@pytest.mark.skipif(len(LEVELS) < 2, reason="this processor has one native path")
@pytest.mark.parametrize("rows", [1, 4, 5, 16, 17, 64, 97])
def test_tiles_and_vectors_agree_to_the_bit(rows):
    x, (codes, scale, bias) = tokens(rows, 257), weights(130, 257)
    seen = []
    for level in LEVELS:
        with running_at(level):
            seen.append(int8.linear(x, codes, scale, bias, 6.0))
    assert torch.equal(*seen)


def test_the_largest_sums_do_not_overflow():
    x = torch.full((20, 4096), 127.0)
    codes = torch.full((40, 4096), -127, dtype=torch.int8)
    for level in (0, *LEVELS):
        with running_at(level):
            assert (int8.linear(x, codes, torch.ones(40), None, 1e30) == -4096 * 127 * 127).all()


def test_packed_weights_follow_what_is_written_to_them():
    x, (codes, scale, bias) = tokens(9, 40), weights(24, 40)
    for change in (lambda: codes.neg_(), lambda: scale.mul_(2), lambda: bias.add_(1)):
        int8.linear(x, codes, scale, bias, 6.0)
        change()
        torch.testing.assert_close(
            int8.linear(x, codes, scale, bias, 6.0), int8.plain_linear(x, codes, scale, bias, 6.0), atol=1e-2, rtol=1e-4
        )
    assert not torch.equal(int8.linear(x, codes, scale, bias, 6.0), int8.linear(x, codes, scale, bias, 2.0))


def test_results_do_not_depend_on_the_number_of_threads_or_on_other_rows():
    x, (codes, scale, bias) = tokens(900, 257), weights(1100, 257)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            seen.append(int8.linear(x, codes, scale, bias, 6.0))
            seen.append(torch.cat([int8.linear(some, codes, scale, bias, 6.0) for some in x.split(3)]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(seen[0], other) for other in seen[1:]) or not LEVELS


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_poisoned_token_stays_alone(value):
    x, (codes, scale, bias) = tokens(20, 64), weights(8, 64)
    clean = int8.linear(x, codes, scale, bias, 6.0)
    x[3, 5] = value
    seen = int8.linear(x, codes, scale, bias, 6.0)
    others = torch.arange(20) != 3
    assert not seen[3].isfinite().any() and torch.allclose(seen[others], clean[others], rtol=1e-4, atol=1e-3)


def test_strided_and_half_precision_inputs_are_read_right():
    x, (codes, scale, bias) = tokens(40, 64).bfloat16().float(), weights(8, 64)
    expected = int8.linear(x, codes, scale, bias, 6.0)
    strided = torch.empty(64, 40).mT.copy_(x)
    assert not strided.is_contiguous()
    assert torch.equal(int8.linear(strided, codes, scale, bias, 6.0), expected)
    assert torch.equal(int8.linear(x.bfloat16(), codes, scale, bias, 6.0), expected)
    assert torch.equal(int8.linear(x.view(5, 8, 64), codes, scale, bias, 6.0), expected.view(5, 8, 8))


PROGRAM = """
import torch
from formulary.kernels import int8
x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
print(int8.linear(x, torch.eye(16).to(torch.int8), torch.ones(16), None, 6.0).sub(x).abs().max().item() < 0.03)
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
    assert said in path


@pytest.mark.skipif(native.compiler() is None, reason="needs a C++ compiler")
def test_a_compiled_library_is_kept_and_a_torn_one_is_never_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("FORMULARY_CACHE", str(tmp_path))
    source = native.Path(native.__file__).with_name("int8.cpp")
    made = native._compiled(source)
    stamp = made.stat().st_mtime_ns
    assert native._compiled(source) == made and made.stat().st_mtime_ns == stamp
    assert [path.name for path in made.parent.iterdir()] == [made.name]
