"""Gated linear recurrences, S_t = diag(decay_t) S_{t-1} + k_t v_t^T and o_t = S_t^T q_t, in four forms that agree.

Three come from `kernels.scan`: `scan` is what to use, O(L) in time; `recurrent_scan` is the plain twin and the ground truth;
`chunked_scan` is matrix products. `quadratic_scan` is attention-shaped and O(L^2 K) in memory. All take logarithms of the decay,
finite and <= 0: (B,H,L,K) for one decay a channel (GLA), (B,H,L,1) for one a head (RetNet, Mamba-2). They compute in float32 at
least and return outputs in the query's dtype; the state stays in the wider dtype. Also `projections`, what a mixer may take over
from the attention it replaces.
"""

from jaxtyping import Float
from torch import Tensor, nn

from formulary.kernels.scan import Scanned, causal_scores, chunked_scan, recurrent_scan, recurrent_step, scan, wide

__all__ = ["chunked_scan", "projections", "quadratic_scan", "recurrent_scan", "recurrent_step", "scan", "wide"]


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
    output = causal_scores(q, k, total) @ v + (q * total.exp()) @ state
    state = total[:, :, -1].exp().unsqueeze(-1) * state + (k * (total[:, :, -1:] - total).exp()).mT @ v
    return output.to(query.dtype), state


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
