"""The 4-bit product against its plain twin: odd sizes, groups that do not divide the inputs, any order, poisoned memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formulary.kernels import int4, int8

native_only = pytest.mark.skipif(not int4.available(), reason="no native path on this processor")


def weights(outputs: int, inputs: int, group_size: int, *, seed: int = 0, bias: bool = True, ordered: bool = False) -> int4.Linear:
    g = torch.Generator().manual_seed(seed)
    groups = -(-inputs // group_size)
    levels = lambda *shape: torch.randint(0, 16, shape, generator=g).to(torch.uint8)
    scale = 0.01 + torch.rand(outputs, groups, generator=g)
    return int4.Linear(
        levels(outputs, inputs), scale, levels(outputs, groups), torch.randn(outputs, generator=g) if bias else None, group_size,
        torch.randperm(inputs, generator=g) if ordered else None,
    )  # fmt: skip


def dense(weights: int4.Linear) -> torch.Tensor:
    """(out, in), its columns in the order of the inputs; column by column, without the twin's ways."""
    out = torch.empty(weights.codes.shape, dtype=torch.double)
    for place in range(out.shape[1]):
        group = place // weights.group_size
        column = weights.scale[:, group].double() * (weights.codes[:, place].double() - weights.zero[:, group].double())
        out[:, place if weights.order is None else int(weights.order[place])] = column
    return out


def inputs(rows: int, features: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 140), features=st.integers(1, 210), outputs=st.integers(1, 70), bias=st.booleans(),
    group_size=st.sampled_from([8, 24, 32, 64, 96, 136, 1000]), ordered=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_it_is_the_dense_product_up_to_the_rounding_of_the_inputs(rows, features, outputs, bias, group_size, ordered, seed):
    made, x = weights(outputs, features, group_size, seed=seed, bias=bias, ordered=ordered), inputs(rows, features, seed)
    x[0] = 0.0
    exact = x.double() @ dense(made).mT + (made.bias.double() if bias else 0)
    half_a_step = x.double().abs().amax(1, keepdim=True) / 127 / 2
    allowed = 1.01 * half_a_step * dense(made).abs().sum(1) + 1e-3 * (1 + exact.abs())
    for seen in (int4.linear(x, made), int4.plain_linear(x, *made)):
        assert bool(((seen.double() - exact).abs() <= allowed).all())


@native_only
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 140), features=st.integers(1, 210), outputs=st.integers(1, 70),
    group_size=st.sampled_from([8, 24, 32, 64, 128, 136, 1000]), ordered=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_fast_path_is_the_plain_twin(rows, features, outputs, group_size, ordered, seed):
    made, x = weights(outputs, features, group_size, seed=seed, ordered=ordered), inputs(rows, features, seed)
    terms = x.double().abs() @ dense(made).abs().mT + made.bias.abs()
    error = (int4.linear(x, made) - int4.plain_linear(x, *made)).abs() / terms
    assert float(error.median()) < 1e-3 and float(error.max()) < 2e-2, "what rounds the other way may differ by a step"


@native_only
@pytest.mark.parametrize("group_size", [32, 40, 1000])
def test_integers_are_multiplied_exactly(group_size):
    """Where the rounding of inputs changes nothing and scales are powers of two, so does nothing else."""
    made = weights(45, 200, group_size)
    made = made._replace(scale=torch.full_like(made.scale, 0.25), bias=None)
    for rows in (1, 2, 3, 4, 5, 6, 7, 65, 70):
        x = torch.randint(-127, 128, (rows, 200), generator=torch.Generator().manual_seed(rows)).float()
        x[:, ::8] = 127.0
        assert torch.equal(int4.linear(x, made), (x.double() @ dense(made).mT).float())


def test_a_huge_input_costs_only_its_own_block_its_precision():
    made, x = weights(64, 128, 64, bias=False), inputs(4, 128)
    made = made._replace(scale=torch.full_like(made.scale, 0.25))
    x[:, :32], x[:, 3] = 0.0, 3000.0
    exact = x.double() @ dense(made).mT
    others = (x[:, 32:].double() @ dense(made)[:, 32:].mT).norm(dim=1)
    error = (int4.linear(x, made).double() - exact).norm(dim=1)
    assert bool((error < 0.02 * others).all()) and bool((exact.norm(dim=1) > 50 * others).all())


@native_only
def test_results_do_not_depend_on_threads_or_other_rows():
    x, made = inputs(300, 257), weights(1100, 257, 32)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            seen.append(int4.linear(x, made))
            torch.testing.assert_close(torch.cat([int4.linear(some, made) for some in x.split(3)]), seen[-1], atol=2e-3, rtol=1e-4)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*seen)


@native_only
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rows", [3, 20])
def test_a_poisoned_token_stays_alone(rows, value):
    x, made = inputs(rows, 64), weights(8, 64, 32)
    clean = int4.linear(x, made)
    x[2, 5] = value
    seen = int4.linear(x, made)
    others = torch.arange(rows) != 2
    assert not seen[2].isfinite().any() and torch.equal(seen[others], clean[others])


@native_only
def test_strided_and_half_precision_inputs_are_read_right():
    x, made = inputs(40, 64).bfloat16().float(), weights(8, 64, 32)
    expected = int4.linear(x, made)
    assert torch.equal(int4.linear(torch.empty(64, 40).mT.copy_(x), made), expected)
    assert torch.equal(int4.linear(x.bfloat16(), made), expected)
    assert torch.equal(int4.linear(x.view(5, 8, 64), made), expected.view(5, 8, 8))


def test_tiny_and_zero_scales_are_kept():
    made = weights(6, 64, 32, bias=False)
    scale = made.scale.clone()
    scale[0], scale[1, 0] = 0.0, 1e-9
    made = made._replace(scale=scale * 1e-12)
    x = inputs(3, 64)
    exact = x.double() @ dense(made).mT
    assert float((int4.linear(x, made).double() - exact).norm()) < 0.01 * float(exact.norm()) and not int4.linear(x, made)[:, 0].any()


def test_without_native_code_the_plain_twin_runs(monkeypatch):
    x, made = inputs(5, 40), weights(7, 40, 32)
    monkeypatch.setattr(int8, "level", lambda: 0)
    assert not int4.available() and torch.equal(int4.linear(x, made), int4.plain_linear(x, *made))
