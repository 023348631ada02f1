"""PyTorch's linears and attention without gradients on the fastest path that this processor has, to rounding the same.

MKL, with which PyTorch multiplies float32, keeps off AVX-512 on processors that are not Intel's; oneDNN does not. Attention
without a mask runs in `kernels.encoder`, in float32 also where it is given half precision. The plain twin is the same code
outside `faster`. With `halves`, linears round factors and results to bfloat16, which some processors multiply twice as fast.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from formulary.kernels import encoder
from formulary.kernels.int8 import version

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FEW_ROWS = 32
"""Below that, laying the weight out takes longer than is won."""


class faster(TorchFunctionMode):
    """Context in which `nn.functional.linear` of float32 tensors and `scaled_dot_product_attention` of float32, bfloat16 and
    float16 ones take the faster path on the CPU. Where gradients are recorded, and for all else, it changes nothing. With
    `halves`, float32 linears take factors and give results in bfloat16, summing in float32, where the processor has instructions
    for that.

    >>> layer, x = torch.nn.Linear(64, 48), torch.randn(40, 64)
    >>> with torch.no_grad(), faster():
    ...     seen = layer(x)
    >>> torch.allclose(seen, layer(x), atol=1e-5)
    True
    """

    def __init__(self, halves: bool = False):
        super().__init__()
        self.halves, self._latest = halves and has_halves(), (None, 0, None)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.linear and _plain(args, kwargs, (torch.float32,)):
            return self._linear(*args, **kwargs) if self.halves else linear(*args, **kwargs)
        if function is F.scaled_dot_product_attention and _plain(args, kwargs, FLOATS):
            return attention(*args, **kwargs)
        return function(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`linear` in bfloat16; an input that comes again (queries, keys and values) is rounded once."""
        if input.numel() < FEW_ROWS * weight.shape[-1]:
            return F.linear(input, weight, bias)
        if self._latest[0] is not input or self._latest[1] != version(input):
            self._latest = input, version(input), input.bfloat16()
        return linear(self._latest[2], weight.bfloat16(), None if bias is None else bias.bfloat16()).float()


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`nn.functional.linear` without gradients."""
    if not has_onednn() or weight.ndim != 2 or not weight.numel() or input.numel() < FEW_ROWS * weight.shape[1]:
        return F.linear(input, weight, bias)
    weight = weight if weight.mT.is_contiguous() else weight.contiguous()  # oneDNN takes either order as it is
    return torch.ops.mkldnn._linear_pointwise(input.contiguous(), weight, bias, "none", [], "")


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`nn.functional.scaled_dot_product_attention` without gradients."""
    alike = query.ndim == 4 and query.shape[::2] == key.shape[::2] == value.shape[::2] and key.shape[1] == value.shape[1]
    if attn_mask is not None or dropout_p or not alike or query.shape[-1] != value.shape[-1] or query.shape[1] % key.shape[1]:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    batch, _, length, _ = query.shape
    starts = torch.arange(batch + 1) * length
    rows = (x.transpose(1, 2).flatten(0, 1).float() for x in (query, key, value))
    out = encoder.attention(*rows, starts, scale=scale, causal=is_causal).to(query.dtype)
    return out.unflatten(0, (batch, length)).transpose(1, 2)


def _plain(args: tuple, kwargs: dict, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether all tensors are on the CPU and of one of these dtypes, and no gradient is recorded."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    return not torch.is_grad_enabled() and all(x.dtype in dtypes and x.device.type == "cpu" for x in tensors)


@cache
def has_onednn() -> bool:
    """Whether oneDNN's float32 product is here."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def has_halves() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32, through oneDNN."""
    return has_onednn() and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
