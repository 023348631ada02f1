"""Embeddings and their norm, attention over sequences of their own lengths, and GELU, in C++ compiled at first use; each with a
plain twin.

Tokens of all sequences stand one after the other, without padding: (tokens, heads, width), cut at `starts`. Gradients,
other devices and other dtypes than float32 take the plain twin.
"""

import ctypes
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formulary.kernels.native import library, why_not


def attention(
    query: Float[Tensor, "T H K"],
    key: Float[Tensor, "T G K"],
    value: Float[Tensor, "T G K"],
    starts: Int[Tensor, "n"],
    *,
    scale: float | None = None,
    causal: bool = False,
) -> Float[Tensor, "T H K"]:
    """Softmax attention within each sequence; sequence s holds the tokens starts[s] to starts[s + 1], and H is a multiple
    of G. `scale` defaults to 1/sqrt(K).

    >>> x = torch.randn(3, 2, 8)
    >>> seen = attention(x, x, x, torch.tensor([0, 1, 3]))
    >>> torch.allclose(seen[0], x[0]), seen.shape
    (True, torch.Size([3, 2, 8]))
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    native = _native(query, key, value)
    if native is None:
        return plain_attention(query, key, value, starts, scale=scale, causal=causal)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    tokens, heads, width = query.shape
    out = query.new_empty(tokens, heads, width)
    starts = starts.to(torch.int64).contiguous()
    operands = [part for x in (query, key, value) for part in (x.data_ptr(), x.stride(0), x.stride(1))]
    failed = native.attention(
        *operands, starts.data_ptr(), len(starts) - 1, heads, heads // key.shape[1], width, scale, causal, out.data_ptr()
    )
    if failed:
        raise MemoryError("no memory for the scores of one attention head")
    return out


def plain_attention(query, key, value, starts, *, scale: float | None = None, causal: bool = False) -> Tensor:
    """The twin of `attention`: PyTorch's own, one sequence at a time."""
    pieces = []
    for start, end in zip(starts.tolist(), starts.tolist()[1:]):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        seen = nn.functional.scaled_dot_product_attention(
            q, k, v, scale=scale, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1]
        )
        pieces.append(seen[0].transpose(0, 1))
    return torch.cat(pieces) if pieces else torch.empty_like(query)


def gelu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """x Phi(x), with an absolute error below 2e-6.

    >>> x = torch.linspace(-4, 4, 33)
    >>> torch.allclose(gelu(x), nn.functional.gelu(x), atol=1e-6)
    True
    """
    native = _native(x)
    if native is None:
        return nn.functional.gelu(x)
    x = x.contiguous()
    out = torch.empty_like(x)
    native.gelu_all(x.data_ptr(), x.numel(), out.data_ptr())
    return out


def embed(
    tables: list[Float[Tensor, "_ D"]],
    ids: list[Int[Tensor, "*batch"]],
    weight: Float[Tensor, "D"],
    shift: Float[Tensor, "D"],
    eps: float,
) -> Float[Tensor, "*batch D"]:
    """LayerNorm of the sum of one row of each table. Raises IndexError for an id that a table does not have.

    >>> words, places = torch.randn(9, 4), torch.randn(3, 4)
    >>> embed([words, places], [torch.tensor([8, 8]), torch.tensor([0, 1])], torch.ones(4), torch.zeros(4), 1e-5).shape
    torch.Size([2, 4])
    """
    native = _native(weight, shift, *tables)
    inside = (not x.numel() or 0 <= int(x.min()) and int(x.max()) < len(table) for x, table in zip(ids, tables))
    if native is None or not all(inside):
        return plain_embed(tables, ids, weight, shift, eps)
    tables, weight, shift = [x.contiguous() for x in tables], weight.contiguous(), shift.contiguous()
    ids = [x.to(torch.int64).contiguous() for x in ids]
    out = tables[0].new_empty(*ids[0].shape, tables[0].shape[1])
    pointers = ((ctypes.c_void_p * len(some))(*(x.data_ptr() for x in some)) for some in (tables, ids))
    native.embed(
        *pointers, len(tables), ids[0].numel(), out.shape[-1], weight.data_ptr(), shift.data_ptr(), eps, out.data_ptr()
    )
    return out


def plain_embed(tables, ids, weight, shift, eps) -> Tensor:
    """The twin of `embed`."""
    total = sum(nn.functional.embedding(x, table) for x, table in zip(ids, tables))
    return nn.functional.layer_norm(total, weight.shape, weight, shift, eps)


def path() -> str:
    """Which path runs on this processor, in words."""
    missing = why_not("encoder")
    return f"PyTorch ({missing})" if missing else "C++"


def _native(*tensors: Tensor) -> ctypes.CDLL | None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return None
    if any(x.device.type != "cpu" or x.dtype != torch.float32 for x in tensors):
        return None
    return _signed()


@cache
def _signed() -> ctypes.CDLL | None:
    """The compiled library, its functions typed."""
    made = library("encoder")
    if made is not None:
        memory, size = ctypes.c_void_p, ctypes.c_int64
        operand = [memory, size, size]
        made.attention.argtypes = [*operand * 3, memory, *[size] * 4, ctypes.c_float, ctypes.c_int32, memory]
        made.attention.restype = ctypes.c_int
        made.embed.argtypes = [memory, memory, *[size] * 3, memory, memory, ctypes.c_float, memory]
        made.embed.restype = None
        made.gelu_all.argtypes, made.gelu_all.restype = [memory, size, memory], None
    return made
