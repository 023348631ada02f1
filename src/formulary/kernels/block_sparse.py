"""Exact attention over chosen blocks of keys.

The score matrix is cut into blocks of `block_size` queries by `block_size` keys; each query block attends to the key blocks
chosen for it and to nothing else, with one softmax over all of them. `block_sparse_attention` runs in C++ compiled at first use
where the processor has AVX-512, and otherwise, or where gradients are recorded, in `gathered_attention`. Both equal the plain
twin `dense_block_attention`, the latter in gradients as well.
"""

import ctypes
from functools import cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from formulary.kernels.native import library, why_not


def block_sparse_attention(
    query: Float[Tensor, "B H L K"],
    key: Float[Tensor, "B G S K"],
    value: Float[Tensor, "B G S V"],
    blocks: Bool[Tensor, "B H NQ NK"],
    block_size: int,
    *,
    mask: Bool[Tensor, "#B #H L S"] | None = None,
    bias: Float[Tensor, "#B #H L S"] | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Float[Tensor, "B H L V"]:
    """softmax(scale * query key^T + bias) value, over the keys of the chosen blocks that may be seen.

    `blocks[b, h, i, j]` chooses key block j for query block i; NQ = ceil(L / block_size), NK = ceil(S / block_size), so odd
    lengths are fine. Keys and values may have fewer heads, G, each shared by H / G neighbors. `mask` is True where a key may be
    seen; `causal` hides keys after the query's own place; `scale` defaults to 1/sqrt(K). A query that sees no key gets zeros, as
    in PyTorch. Raises ValueError where the blocks do not fit the lengths.

    >>> q, k, v = torch.randn(3, 1, 2, 100, 16).unbind()
    >>> blocks = torch.rand(1, 2, 4, 4) < 0.5
    >>> sparse = block_sparse_attention(q, k, v, blocks, 32, causal=True)
    >>> bool(torch.allclose(sparse, dense_block_attention(q, k, v, blocks, 32, causal=True), atol=1e-5))
    True
    """
    _check(query, key, value, blocks, block_size)
    given = {"mask": mask, "bias": bias, "scale": scale, "causal": causal}
    if _is_native(query, key, value, mask, bias, scale):
        return _native_attention(query, key, value, blocks, block_size, **given)
    return gathered_attention(query, key, value, blocks, block_size, **given)


def gathered_attention(
    query: Float[Tensor, "B H L K"],
    key: Float[Tensor, "B G S K"],
    value: Float[Tensor, "B G S V"],
    blocks: Bool[Tensor, "B H NQ NK"],
    block_size: int,
    *,
    mask: Bool[Tensor, "#B #H L S"] | None = None,
    bias: Float[Tensor, "#B #H L S"] | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Float[Tensor, "B H L V"]:
    """The same in PyTorch on top of the fused `scaled_dot_product_attention`, with gradients.

    Query blocks that chose equally many key blocks are computed in one call on their gathered keys, so the cost is that of the
    chosen blocks.
    """
    key, value = (_expanded(x, query.shape[1]) for x in (key, value))
    batch, heads, length, _ = query.shape
    keys = key.shape[2]
    if causal:
        blocks = blocks.tril()
        if mask is not None or bias is not None or keys < length:
            mask, causal = _with_causal(mask, length, keys, query.device), False
    tiles = _Tiles(mask, bias, block_size, length, keys) if mask is not None or bias is not None else None
    q_blocks = _cut(query, block_size)
    k_blocks, v_blocks = _cut(key, block_size).flatten(0, 2), _cut(value, block_size).flatten(0, 2)
    rows = blocks.flatten(0, 2)
    partial = _partial_rows(blocks, causal, keys, block_size).flatten()

    outputs, places = [], []
    for count, cut in torch.stack([rows.sum(-1), partial], 1).unique(dim=0).tolist():
        place = ((rows.sum(-1) == count) & (partial == bool(cut))).nonzero()[:, 0]
        places.append(place)
        if count == 0:
            outputs.append(value.new_zeros(len(place), block_size, value.shape[-1]))
            continue
        chosen = rows[place].nonzero()[:, 1].view(len(place), count)
        which_head = place // blocks.shape[2]
        index = (which_head[:, None] * blocks.shape[3] + chosen).flatten()
        k = k_blocks.index_select(0, index).view(len(place), 1, count * block_size, -1)
        v = v_blocks.index_select(0, index).view(len(place), 1, count * block_size, -1)
        q = q_blocks.flatten(0, 2).index_select(0, place).unsqueeze(1)
        if tiles is not None:
            attn_mask = tiles.gather(which_head // heads, which_head % heads, place % blocks.shape[2], chosen)
        else:
            attn_mask = _last_block_mask(count, block_size, causal, keys, query.device) if cut else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=scale)
        outputs.append(out.squeeze(1))
    out = torch.cat(outputs).index_select(0, torch.cat(places).argsort())
    return out.view(batch, heads, -1, value.shape[-1])[:, :, :length]


def dense_block_attention(
    query: Float[Tensor, "B H L K"],
    key: Float[Tensor, "B G S K"],
    value: Float[Tensor, "B G S V"],
    blocks: Bool[Tensor, "B H NQ NK"],
    block_size: int,
    *,
    mask: Bool[Tensor, "#B #H L S"] | None = None,
    bias: Float[Tensor, "#B #H L S"] | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Float[Tensor, "B H L V"]:
    """The plain twin of `block_sparse_attention`: every score is computed, and those outside the chosen blocks are masked."""
    key, value = (_expanded(x, query.shape[1]) for x in (key, value))
    length, keys = query.shape[2], key.shape[2]
    seen = blocks.repeat_interleave(block_size, 2).repeat_interleave(block_size, 3)[:, :, :length, :keys]
    if mask is not None:
        seen = seen & mask
    if causal:
        seen = seen & torch.ones(length, keys, dtype=torch.bool, device=query.device).tril()
    attn_mask = seen if bias is None else bias.masked_fill(~seen, float("-inf"))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, scale=scale)


def dense_attention(
    query: Float[Tensor, "B H L K"],
    key: Float[Tensor, "B H S K"],
    value: Float[Tensor, "B H S V"],
    *,
    mask: Bool[Tensor, "#B #H L S"] | None = None,
    bias: Float[Tensor, "#B #H L S"] | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Float[Tensor, "B H L V"]:
    """PyTorch's `scaled_dot_product_attention` with the arguments of the attention contract."""
    if causal and (mask is not None or bias is not None):
        mask, causal = _with_causal(mask, query.shape[2], key.shape[2], query.device), False
    attn_mask = mask if bias is None else bias
    if mask is not None and bias is not None:
        attn_mask = torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, scale=scale, is_causal=causal)


# ---------------------------------------------------------------- native


def path(dtype: torch.dtype = torch.float32) -> str:
    """Which path runs on this processor, in words, for head widths that the C++ takes and where no gradients are recorded."""
    computed = _computed_in(dtype)
    if computed is not None:
        return "AVX-512 BF16 in C++" if computed == torch.bfloat16 else "AVX-512 in C++" + ", in float32" * (computed != dtype)
    if dtype == torch.bfloat16 and _has_amx():
        return "gathered, PyTorch (whose attention has AMX for bfloat16)"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"gathered, PyTorch (no kernel for {str(dtype).removeprefix('torch.')})"
    return f"gathered, PyTorch ({why_not('block_sparse') or 'this processor has no AVX-512'})"


def level() -> int:
    """0: no native path here; 1: AVX-512; 2: AVX-512 BF16 as well."""
    return _library().level() if _library() else 0


def _computed_in(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype in which the C++ computes such operands; None where it does not."""
    if dtype == torch.bfloat16 and not _has_amx():
        return (None, torch.float32, torch.bfloat16)[level()]
    return torch.float32 if dtype == torch.float32 and level() else None


def _is_native(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float | None) -> bool:
    tensors = [x for x in (query, key, value, mask, bias) if x is not None]
    if any(x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad) for x in tensors):
        return False
    if not query.dtype == key.dtype == value.dtype or (mask is not None and mask.dtype != torch.bool):
        return False
    fits = all(width in range(16, 129, 16) for width in (query.shape[3], value.shape[3]))
    return fits and (scale is None or scale > 0) and _computed_in(query.dtype) is not None


def _native_attention(query, key, value, blocks, block_size, *, mask, bias, scale, causal) -> Tensor:
    computed, seen = _computed_in(query.dtype), (*query.shape[:3], key.shape[2])
    scale = query.shape[3] ** -0.5 if scale is None else scale
    operands = [x.to(computed) for x in (query, key, value)]
    if bias is not None and bias.dtype != torch.bfloat16:
        bias = bias.float()
    operands += [None if x is None else x.expand(seen) for x in (mask, bias)]
    operands = [x if x is None or x.stride(3) == 1 else x.contiguous() for x in operands]
    blocks = blocks.bool().contiguous()
    out = operands[0].new_empty(len(query), query.shape[2], query.shape[1], value.shape[3]).transpose(1, 2)
    call = _Call(
        *map(_rows, (*operands, out)), blocks.data_ptr(), *query.shape[:2], key.shape[1], *seen[2:], query.shape[3],
        value.shape[3], block_size, scale, causal, computed == torch.bfloat16, bias is not None and bias.dtype == torch.bfloat16,
    )  # fmt: skip
    _library().block_sparse(ctypes.byref(call))
    return out.to(query.dtype)


def _check(query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, block_size: int) -> None:
    """ValueError for operands that do not belong together: the C++ reads memory by their shapes."""
    (batch, heads, length, width), (groups, keys) = query.shape, key.shape[1:3]
    if tuple(key.shape) != (batch, groups, keys, width) or value.shape[:3] != key.shape[:3] or not groups or heads % groups:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"query, key and value must be (B,H,L,K), (B,G,S,K) and (B,G,S,V) with H a multiple of G, got {shapes}")
    wanted = (batch, heads, -(-length // block_size), -(-keys // block_size))
    if tuple(blocks.shape) != wanted:
        raise ValueError(f"blocks of {block_size} of these queries and keys are {wanted}, got {tuple(blocks.shape)}")


class _Rows(ctypes.Structure):
    """`Rows` of block_sparse.cpp."""

    _fields_ = [("at", ctypes.c_void_p), *[(name, ctypes.c_int64) for name in ("batch", "head", "token")]]


class _Call(ctypes.Structure):
    """`Call` of block_sparse.cpp."""

    _fields_ = [
        *[(name, _Rows) for name in ("query", "key", "value", "mask", "bias", "out")],
        ("blocks", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("batch", "heads", "groups", "length", "keys", "width", "wide", "block")],
        ("scale", ctypes.c_float),
        *[(name, ctypes.c_int32) for name in ("causal", "half", "half_bias")],
    ]


def _rows(x: Tensor | None) -> _Rows:
    """Where rows lie, with steps in bytes; nowhere for None."""
    return _Rows() if x is None else _Rows(x.data_ptr(), *(step * x.element_size() for step in x.stride()[:3]))


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled library, its functions typed; None where the processor has nothing for it."""
    made = library("block_sparse")
    if made is None or not made.level():
        return None
    made.block_sparse.argtypes, made.block_sparse.restype = [ctypes.c_void_p], None
    return made


@cache
def _has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


# ---------------------------------------------------------------- gathering


def _expanded(x: Float[Tensor, "B G S K"], heads: int) -> Float[Tensor, "B H S K"]:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


class _Tiles:
    """The mask and the bias cut into (block_size, block_size) tiles, gathered for chosen blocks as one additive or boolean mask."""

    def __init__(self, mask: Tensor | None, bias: Tensor | None, block_size: int, length: int, keys: int):
        if mask is None and keys % block_size:
            mask = torch.ones(1, 1, length, keys, dtype=torch.bool, device=bias.device)
        self.mask = None if mask is None else _cut_both(mask, block_size)
        self.bias = None if bias is None else _cut_both(bias, block_size)

    def gather(self, item: Tensor, head: Tensor, row: Tensor, chosen: Int[Tensor, "N C"]) -> Tensor:
        """(N, 1, block_size, C * block_size) for N query blocks and their C key blocks."""
        mask, bias = (_pick(tiles, item, head, row, chosen) for tiles in (self.mask, self.bias))
        if bias is None or mask is None:
            return mask if bias is None else bias
        return bias.masked_fill(~mask, float("-inf"))


def _pick(tiles: Tensor | None, item: Tensor, head: Tensor, row: Tensor, chosen: Tensor) -> Tensor | None:
    if tiles is None:
        return None
    item, head = item % tiles.shape[0], head % tiles.shape[1]
    picked = tiles[item[:, None], head[:, None], row[:, None], :, chosen]
    return picked.transpose(1, 2).flatten(2).unsqueeze(1)


def _with_causal(mask: Tensor | None, length: int, keys: int, device: torch.device) -> Tensor:
    causal = torch.ones(1, 1, length, keys, dtype=torch.bool, device=device).tril()
    return causal if mask is None else causal & mask


def _cut(x: Float[Tensor, "B H L K"], block_size: int) -> Float[Tensor, "B H N block K"]:
    return F.pad(x, (0, 0, 0, -x.shape[2] % block_size)).unflatten(2, (-1, block_size))


def _cut_both(x: Tensor, block_size: int) -> Tensor:
    """(B,H,L,S) -> (B,H,NQ,block,NK,block), padded with False or 0."""
    x = F.pad(x, (0, -x.shape[3] % block_size, 0, -x.shape[2] % block_size))
    return x.unflatten(3, (-1, block_size)).unflatten(2, (-1, block_size))


def _partial_rows(blocks: Bool[Tensor, "B H NQ NK"], causal: bool, keys: int, block_size: int) -> Bool[Tensor, "B H NQ"]:
    """Query blocks whose last chosen block is seen in part: the diagonal one when causal, else a last block that is not full."""
    if causal:
        return F.pad(blocks.diagonal(dim1=2, dim2=3), (0, max(0, blocks.shape[2] - blocks.shape[3])))
    if keys % block_size:
        return blocks[..., -1]
    return blocks.new_zeros(blocks.shape[:3])


def _last_block_mask(count: int, block_size: int, causal: bool, keys: int, device: torch.device) -> Tensor:
    """(block_size, count * block_size): all of it, but for the last block its lower triangle or its real keys."""
    seen = torch.ones(block_size, count * block_size, dtype=torch.bool, device=device)
    last = seen[:, -block_size:]
    if causal:
        last.tril_()
    else:
        last[:, keys % block_size :] = False
    return seen
