"""What holds for every attention: equal to SDPA at full budget, blind to later and padded keys, any length, two dtypes."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tests.conformance import rooms

ATTENTIONS = rooms.implementing("attention")
every = pytest.mark.parametrize("slug,cls", ATTENTIONS, ids=[f"{slug}-{cls.__name__}" for slug, cls in ATTENTIONS])
LENGTHS = (1, 7, 63, 100)


def qkv(length, keys=None, dtype=torch.float32, heads=3, width=16):
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, heads, n, width) for n in (length, keys or length, keys or length)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@every
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_dtypes_and_full_budget(slug, cls, length, causal, dtype):
    q, k, v = qkv(length, dtype=dtype)
    out = cls(**rooms.quick(cls)).attend(q, k, v, causal=causal)
    assert out.shape == q.shape and out.dtype == dtype and torch.isfinite(out.float()).all()
    if cls.equals_sdpa:
        full = cls(**cls.full_budget()).attend(q, k, v, causal=causal)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(full, sdpa(q, k, v, is_causal=causal), rtol=tolerance, atol=tolerance)


@every
def test_full_budget_with_mask_bias_and_scale_equals_sdpa(slug, cls):
    if not cls.equals_sdpa:
        assert not hasattr(cls, "full_budget") or cls.full_budget.__doc__
        return
    q, k, v = qkv(50)
    mask = torch.ones(2, 1, 50, 50, dtype=torch.bool).tril()
    mask[0, ..., :5] = False
    mask[0, :, :5, 0] = True
    bias = torch.randn(2, 3, 50, 50)
    out = cls(**cls.full_budget()).attend(q, k, v, mask=mask, bias=bias, scale=0.3)
    expected = sdpa(q, k, v, attn_mask=torch.where(mask, bias, -math.inf), scale=0.3)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@every
@pytest.mark.parametrize("length", (40, 300))
def test_no_weight_falls_on_a_padded_key(slug, cls, length):
    q, k, v = qkv(length)
    mask = torch.ones(2, 1, length, length, dtype=torch.bool)
    mask[..., length // 2 :] = False
    attention = cls(**rooms.quick(cls))
    out = attention.attend(q, k, v, mask=mask)
    v_poisoned = v.clone()
    v_poisoned[:, :, length // 2 :] = 1e6
    assert torch.equal(attention.attend(q, k, v_poisoned, mask=mask), out)


@every
@pytest.mark.parametrize("length", (40, 300))
def test_no_weight_falls_on_a_later_key(slug, cls, length):
    """Later values never matter; later queries and keys only as far ahead as `lookahead` says."""
    q, k, v = qkv(length)
    attention = cls(**rooms.quick(cls))
    out = attention.attend(q, k, v, causal=True)
    at = length // 2
    poisoned = v.clone()
    poisoned[:, :, at:] = 1e6
    assert torch.equal(attention.attend(q, k, poisoned, causal=True)[:, :, :at], out[:, :, :at])
    q2, k2 = q.clone(), k.clone()
    q2[:, :, at:], k2[:, :, at:] = torch.randn_like(q2[:, :, at:]), torch.randn_like(k2[:, :, at:])
    blind = max(0, at - attention.lookahead)
    torch.testing.assert_close(attention.attend(q2, k2, v, causal=True)[:, :, :blind], out[:, :, :blind])


@every
def test_gradients_reach_queries_keys_and_values(slug, cls):
    q, k, v = (x.requires_grad_() for x in qkv(70))
    cls(**rooms.quick(cls)).attend(q, k, v, causal=True).sum().backward()
    assert all(torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0 for x in (q, k, v))
