"""Gated linear recurrences, S_t = diag(decay_t) S_{t-1} + k_t v_t^T and o_t = S_t^T q_t, in three forms that agree.

`recurrent_scan` is the plain twin and the ground truth; `chunked_scan` is what to train with, O(L) in time; `quadratic_scan`
is attention-shaped and O(L^2 K) in memory. All take logarithms of the decay, finite and <= 0: (B,H,L,K) for one decay a channel
(GLA), (B,H,L,1) for one a head (RetNet, Mamba-2). They compute in float32 at least and return outputs in the query's dtype; the
state stays in the wider dtype. Also `projections`, what a mixer may take over from the attention it replaces.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

Scanned = tuple[Float[Tensor, "B H L V"], Float[Tensor, "B H K V"]]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a recurrence runs and keeps its state: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def recurrent_step(
    query: Float[Tensor, "B H K"],
    key: Float[Tensor, "B H K"],
    value: Float[Tensor, "B H V"],
    log_decay: Float[Tensor, "B H #K"],
    state: Float[Tensor, "B H K V"],
) -> tuple[Float[Tensor, "B H V"], Float[Tensor, "B H K V"]]:
    """One token: its output and the state after it."""
    q, k, v, g = (t.to(wide(query.dtype)) for t in (query, key, value, log_decay))
    state = g.exp().unsqueeze(-1) * state + k.unsqueeze(-1) * v.unsqueeze(-2)
    return (q.unsqueeze(-2) @ state).squeeze(-2).to(query.dtype), state


def recurrent_scan(
    query: Float[Tensor, "B H L K"],
    key: Float[Tensor, "B H L K"],
    value: Float[Tensor, "B H L V"],
    log_decay: Float[Tensor, "B H L #K"],
    state: Float[Tensor, "B H K V"],
) -> Scanned:
    """Token by token."""
    outputs = []
    for q, k, v, g in zip(*(t.unbind(2) for t in (query, key, value, log_decay))):
        output, state = recurrent_step(q, k, v, g, state)
        outputs.append(output)
    return torch.stack(outputs, 2), state


def quadratic_scan(
    query: Float[Tensor, "B H L K"],
    key: Float[Tensor, "B H L K"],
    value: Float[Tensor, "B H L V"],
    log_decay: Float[Tensor, "B H L #K"],
    state: Float[Tensor, "B H K V"],
) -> Scanned:
    """All pairs of tokens at once, every decay between two of them as one exponential of a sum <= 0 (arXiv:2312.06635, eq. 4)."""
    q, k, v, g = (t.to(wide(query.dtype)) for t in (query, key, value, log_decay))
    total = g.cumsum(2)
    output = _pairs(q, k, total) @ v + (q * total.exp()) @ state
    state = total[:, :, -1].exp().unsqueeze(-1) * state + (k * (total[:, :, -1:] - total).exp()).mT @ v
    return output.to(query.dtype), state


def chunked_scan(
    query: Float[Tensor, "B H L K"],
    key: Float[Tensor, "B H L K"],
    value: Float[Tensor, "B H L V"],
    log_decay: Float[Tensor, "B H L #K"],
    state: Float[Tensor, "B H K V"],
    *,
    chunk: int = 64,
    tile: int = 16,
) -> Scanned:
    """Matrix products within and between chunks (arXiv:2312.06635, sections 4.1 to 4.3); `chunk` is a multiple of `tile`.

    Tokens of earlier chunks act through the state. Within a chunk, tiles of `tile` tokens on the diagonal are done pair by pair;
    other tiles are matrix products that meet at the later tile's start, so that every exponent is <= 0 and nothing overflows.
    """
    length = query.shape[2]
    chunk = min(chunk, -(-length // tile) * tile)
    q, k, v, g = (_cut(t.to(wide(query.dtype)), chunk) for t in (query, key, value, log_decay))
    total = g.cumsum(-2)
    end = total[..., -1:, :]
    added = (k * (end - total).exp()).mT @ v
    starts = []
    for kept, new in zip(end.exp().mT.unbind(2), added.unbind(2)):
        starts.append(state)
        state = kept * state + new
    output = (q * total.exp()) @ torch.stack(starts, 2) + _within_chunk(q, k, g, total, tile) @ v
    return output.flatten(2, 3)[:, :, :length].to(query.dtype), state


def _cut(x: Tensor, chunk: int) -> Tensor:
    """(B,H,L,X) -> (B,H,N,chunk,X); zeros at the end (no decay, no key) leave the state alone."""
    return nn.functional.pad(x, (0, 0, 0, -x.shape[2] % chunk)).unflatten(2, (-1, chunk))


def _pairs(q: Tensor, k: Tensor, total: Tensor) -> Tensor:
    """(..., C, C) causal scores sum_d q_i k_j exp(total_i - total_j), exact, with `total` the running sum of log decays."""
    later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    gap = total.unsqueeze(-2) - total.unsqueeze(-3)
    decay = gap.masked_fill(later.unsqueeze(-1), -torch.inf).exp()
    if total.shape[-1] == 1:
        return (q @ k.mT) * decay.squeeze(-1)
    return (q.unsqueeze(-2) * decay * k.unsqueeze(-3)).sum(-1)


def _within_chunk(q: Tensor, k: Tensor, g: Tensor, total: Tensor, tile: int) -> Tensor:
    """(B,H,N,C,C) causal scores inside each chunk."""
    if g.shape[-1] == 1:
        return _pairs(q, k, total)
    q, g, k_tiles = (t.unflatten(-2, (-1, tile)) for t in (q, g, k))
    local = g.cumsum(-2)
    diagonal, reached = _pairs(q, k_tiles, local), q * local.exp()
    rows = []
    for i in range(q.shape[-3]):
        start = i * tile
        row = [diagonal[..., i, :, :]]
        if start:
            faded = k[..., :start, :] * (total[..., start - 1 : start, :] - total[..., :start, :]).exp()
            row.insert(0, reached[..., i, :, :] @ faded.mT)
        rows.append(nn.functional.pad(torch.cat(row, -1), (0, k.shape[-2] - start - tile)))
    return torch.cat(rows, -2)


def projections(attention: nn.Module) -> dict[str, Float[Tensor, "out in"]]:
    """The weights of an attention module's "query", "key", "value" and "output" projections, as far as it has them.

    Grouped keys and values are repeated to the query's heads. Biases are left out. Knows the names of Llama, Qwen2, Mixtral,
    OPT, BART, BERT, T5 and GPT-2's joint, transposed `c_attn`.
    """
    known = {"query": ("q_proj", "query", "q"), "key": ("k_proj", "key", "k"), "value": ("v_proj", "value", "v")}
    known["output"] = ("o_proj", "out_proj", "o")
    found = {}
    for role, names in known.items():
        module = next((getattr(attention, name) for name in names if hasattr(attention, name)), None)
        if module is not None:
            found[role] = module.weight.detach()
    if hasattr(attention, "c_attn"):
        found.update(zip(("query", "key", "value"), attention.c_attn.weight.detach().T.chunk(3)))
        found["output"] = attention.c_proj.weight.detach().T
    groups = getattr(attention, "num_key_value_groups", 1)
    for role in ("key", "value") if groups > 1 else ():
        heads = found[role].unflatten(0, (-1, attention.head_dim))
        found[role] = heads.repeat_interleave(groups, 0).flatten(0, 1)
    return found
