"""The faster float32 path against PyTorch's own, and where it must keep out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from formulary.kernels import encoder, float32
from formulary.kernels.float32 import faster
from formulary.lab.small import inputs_for, tiny


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 200])
@pytest.mark.parametrize("bias", [False, True])
def test_linears_are_pytorchs_to_rounding(rows, bias):
    layer, x = nn.Linear(70, 45, bias=bias), torch.randn(3, rows, 70)
    with torch.no_grad():
        wanted = layer(x)
        with faster():
            torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(layer(x.mT.contiguous().mT), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [0, 1, 70])
@pytest.mark.parametrize("outputs", [1, 45])
def test_a_weight_may_be_in_any_order(outputs, features, dtype):
    x, weight = torch.randn(40, features, dtype=dtype), torch.randn(outputs, features, dtype=dtype)
    wanted = F.linear(x.double(), weight.double()).to(dtype)
    for same in (weight, weight.mT.contiguous().mT, torch.stack([weight, weight], -1)[..., 0]):
        torch.testing.assert_close(float32.linear(x, same), wanted)


@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("bias", [False, True])
def test_with_halves_factors_are_in_bfloat16_where_that_is_faster(monkeypatch, has, bias):
    monkeypatch.setattr(float32, "has_halves", lambda: has)
    layer, x = nn.Linear(70, 45, bias=bias), torch.randn(3, 40, 70)
    half = lambda value: value.bfloat16().double()
    with torch.no_grad():
        exact = F.linear(half(x), half(layer.weight), half(layer.bias) if bias else None)
        wanted = exact.float() if has else layer(x)
        with faster(halves=True):
            seen = layer(x)
            assert seen.dtype == torch.float32
            torch.testing.assert_close(seen, wanted, atol=1e-5, rtol=2**-7 if has else 1e-5)
            x.mul_(2).sub_(1)  # the same tensor with other values
            torch.testing.assert_close(layer(x), layer(x.clone()), atol=0, rtol=0)
            torch.testing.assert_close(layer(x[:, :1]), F.linear(x[:, :1], layer.weight, layer.bias), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shared", [1, 2, 4])
def test_attention_is_pytorchs_to_rounding(causal, shared):
    query, key, value = torch.randn(2, 4, 37, 16), *(torch.randn(2, 4 // shared, 37, 16) for _ in range(2))
    with torch.no_grad():
        given = {"is_causal": causal, "scale": 0.3, "enable_gqa": shared > 1}
        wanted = F.scaled_dot_product_attention(query, key, value, **given)
        with faster():
            torch.testing.assert_close(F.scaled_dot_product_attention(query, key, value, **given), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision_is_at_least_as_exact_as_pytorchs(dtype):
    exact = [torch.randn(2, 3, 50, 16).to(dtype) for _ in range(3)]
    with torch.no_grad():
        wanted = F.scaled_dot_product_attention(*(x.double() for x in exact), is_causal=True)
        plain = F.scaled_dot_product_attention(*exact, is_causal=True)
        with faster():
            seen = F.scaled_dot_product_attention(*exact, is_causal=True)
    assert seen.dtype == dtype
    assert (seen.double() - wanted).abs().mean() <= 1.01 * (plain.double() - wanted).abs().mean()


def test_masks_other_lengths_gradients_and_other_dtypes_stay_with_pytorch(monkeypatch):
    """None of these may reach the fast functions' own products."""
    monkeypatch.setattr(encoder, "attention", None)
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    attend = F.scaled_dot_product_attention
    with torch.no_grad(), faster():
        assert attend(query, key, key).shape == query.shape
        assert attend(query, query, query, attn_mask=mask).shape == query.shape
        assert attend(*[query.double()] * 3).dtype == torch.float64
        assert F.linear(torch.ones(64, 4).double(), torch.ones(3, 4).double()).dtype == torch.float64
    layer = nn.Linear(8, 8)
    with faster():
        layer(torch.randn(64, 8)).sum().backward()
        attend(query.requires_grad_(), query, query).sum().backward()
    assert layer.weight.grad is not None and query.grad is not None


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "dinov2"])
def test_a_whole_model_gives_the_same_states(kind):
    model = tiny(kind).eval()
    batch = inputs_for(model, batch=6)
    with torch.no_grad():
        wanted = model(**batch)[0]
        with faster():
            torch.testing.assert_close(model(**batch)[0], wanted, atol=1e-4, rtol=1e-4)


def test_the_fast_paths_are_taken(monkeypatch):
    taken = []
    for name in ("linear", "attention"):
        function = getattr(float32, name)
        monkeypatch.setattr(float32, name, lambda *args, name=name, function=function, **kw: (taken.append(name), function(*args, **kw))[1])
    with torch.no_grad(), faster():
        F.linear(torch.ones(64, 4), torch.ones(3, 4))
        F.scaled_dot_product_attention(*[torch.ones(1, 1, 4, 8)] * 3)
    assert taken == ["linear", "attention"]
