"""Exact attention over chosen blocks of keys, in plain PyTorch on top of the fused `scaled_dot_product_attention`.

The score matrix is cut into blocks of `block_size` queries by `block_size` keys; each query block attends to the key blocks
chosen for it and to nothing else, with one softmax over all of them. Query blocks that chose equally many key blocks are
computed in one call on their gathered keys, so the cost is that of the chosen blocks. `block_sparse_attention` equals its plain
twin `dense_block_attention` in outputs and gradients.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F


def block_sparse_attention(
    query: Float[Tensor, "B H L K"],
    key: Float[Tensor, "B H S K"],
    value: Float[Tensor, "B H S V"],
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
    lengths are fine. `mask` is True where a key may be seen; `causal` hides keys after the query's own place. A query that sees
    no key gets zeros, as in PyTorch.

    >>> q, k, v = torch.randn(3, 1, 2, 100, 8).unbind()
    >>> blocks = torch.rand(1, 2, 4, 4) < 0.5
    >>> sparse = block_sparse_attention(q, k, v, blocks, 32, causal=True)
    >>> bool(torch.allclose(sparse, dense_block_attention(q, k, v, blocks, 32, causal=True), atol=1e-5))
    True
    """
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
    key: Float[Tensor, "B H S K"],
    value: Float[Tensor, "B H S V"],
    blocks: Bool[Tensor, "B H NQ NK"],
    block_size: int,
    *,
    mask: Bool[Tensor, "#B #H L S"] | None = None,
    bias: Float[Tensor, "#B #H L S"] | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Float[Tensor, "B H L V"]:
    """The plain twin of `block_sparse_attention`: every score is computed, and those outside the chosen blocks are masked."""
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
