"""A gated linear recurrence over a sequence, forward and backward, in C++ compiled at first use, and its plain twins.

    S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t        per head; S_t is (K, V)

Decays are given as finite logarithms <= 0: (B,H,L,K) for one a channel (GLA), (B,H,L,1) for one a head (RetNet, Mamba-2), None
for none (linear attention); V = 1 with a head a channel is Mamba's. Every form computes in float32 at least, returns outputs in
the query's dtype and the state in the wider one. `recurrent_scan` is the plain twin and the ground truth.

The C++ goes token by token with a piece of the state in registers, so it never divides by a decay. `chunked_scan`, matrix
products in PyTorch, stands in where it cannot run: without a compiler, on other devices and dtypes, inside `torch.compile` and
for gradients of gradients.
"""

import ctypes
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formulary.errors import UsageError
from formulary.kernels.native import library, why_not

Scanned = tuple[Float[Tensor, "B H L V"], Float[Tensor, "B H K V"]]

SEGMENT = 256
"""Tokens between two states that are kept for the backward pass."""


def scan(
    query: Float[Tensor, "B H L K"],
    key: Float[Tensor, "B H L K"],
    value: Float[Tensor, "B H L V"],
    log_decay: Float[Tensor, "B H L #K"] | None,
    state: Float[Tensor, "B H K V"] | None = None,
) -> Scanned:
    """Outputs and the state after the last token, from `state` (zeros if None). O(L) in time; threads share batch and heads.

    Operands are read by their strides, so views of projections and expanded tensors are not copied; the output's memory is
    (B,L,H,V). Raises UsageError for shapes that do not fit.

    >>> q, k, v, g = torch.randn(2, 4, 100, 8), torch.randn(2, 4, 100, 8), torch.randn(2, 4, 100, 16), -torch.rand(2, 4, 100, 8)
    >>> out, state = scan(q, k, v, g)
    >>> out.shape, state.shape
    (torch.Size([2, 4, 100, 16]), torch.Size([2, 4, 8, 16]))
    >>> torch.allclose(out, recurrent_scan(q, k, v, g, torch.zeros_like(state))[0], atol=1e-5)
    True
    """
    if state is None:
        state = query.new_zeros(*query.shape[:2], query.shape[-1], value.shape[-1], dtype=wide(query.dtype))
    _check(query, key, value, log_decay, state)
    given = (query, key, value, log_decay, state)
    if not _runs_native(*given):
        return chunked_scan(*given)
    given = (query, key, value, log_decay, state.float())
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        return _Scan.apply(*given)
    return _forward(*given, kept=None)


def path() -> str:
    """Which path runs on this processor, in words."""
    missing = why_not("scan")
    return f"matrix products in PyTorch ({missing})" if missing else "C++"


# ---------------------------------------------------------------- the plain twins


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a recurrence runs and keeps its state: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def recurrent_step(
    query: Float[Tensor, "B H K"],
    key: Float[Tensor, "B H K"],
    value: Float[Tensor, "B H V"],
    log_decay: Float[Tensor, "B H #K"] | None,
    state: Float[Tensor, "B H K V"],
) -> tuple[Float[Tensor, "B H V"], Float[Tensor, "B H K V"]]:
    """One token: its output and the state after it."""
    q, k, v = (t.to(wide(query.dtype)) for t in (query, key, value))
    decay = 1.0 if log_decay is None else log_decay.to(q.dtype).exp().unsqueeze(-1)
    state = decay * state + k.unsqueeze(-1) * v.unsqueeze(-2)
    return (q.unsqueeze(-2) @ state).squeeze(-2).to(query.dtype), state


def recurrent_scan(
    query: Float[Tensor, "B H L K"],
    key: Float[Tensor, "B H L K"],
    value: Float[Tensor, "B H L V"],
    log_decay: Float[Tensor, "B H L #K"] | None,
    state: Float[Tensor, "B H K V"],
) -> Scanned:
    """Token by token: the plain twin."""
    outputs = []
    for t in range(query.shape[2]):
        decay = None if log_decay is None else log_decay[:, :, t]
        output, state = recurrent_step(query[:, :, t], key[:, :, t], value[:, :, t], decay, state)
        outputs.append(output)
    return torch.stack(outputs, 2), state


def chunked_scan(
    query: Float[Tensor, "B H L K"],
    key: Float[Tensor, "B H L K"],
    value: Float[Tensor, "B H L V"],
    log_decay: Float[Tensor, "B H L #K"] | None,
    state: Float[Tensor, "B H K V"],
    *,
    chunk: int = 64,
    tile: int = 4,
) -> Scanned:
    """Matrix products within and between chunks (arXiv:2312.06635, sections 4.1 to 4.3); `chunk` is `tile` times a power of 2.

    Tokens of earlier chunks act through the state. Within a chunk, the second half sees the first through a matrix product that
    meets where they touch, so that every exponent is <= 0 and nothing overflows; then the halves of the halves, down to tiles of
    `tile` tokens, which are done pair by pair. The paper has one level of tiles instead; this is three times as fast on a CPU.
    """
    if log_decay is None:
        log_decay = query.new_zeros(1, 1, 1, 1).expand(*query.shape[:3], 1)
    length = query.shape[2]
    while chunk // 2 >= max(length, tile):
        chunk //= 2
    q, k, v, g = (_cut(t.to(wide(query.dtype)), chunk) for t in (query, key, value, log_decay))
    total = g.cumsum(-2)
    end = total[..., -1:, :]
    added = (k * (end - total).exp()).mT @ v
    starts = []
    for kept, new in zip(end.exp().mT.unbind(2), added.unbind(2)):
        starts.append(state)
        state = kept * state + new
    output = (q * total.exp()) @ torch.stack(starts, 2)
    size = chunk
    while True:
        qs, ks, vs, gs = (t.unflatten(-2, (-1, size)) for t in (q, k, v, g))
        total = gs.cumsum(-2)
        if size == tile or g.shape[-1] == 1:
            output = output + (causal_scores(qs, ks, total) @ vs).flatten(-3, -2)
            return output.flatten(2, 3)[:, :, :length].to(query.dtype), state
        early, late, middle = slice(size // 2), slice(size // 2, size), total[..., size // 2 - 1, :].unsqueeze(-2)
        reached = qs[..., late, :] * (total[..., late, :] - middle).exp()
        left = ks[..., early, :] * (middle - total[..., early, :]).exp()
        output = output + nn.functional.pad((reached @ left.mT) @ vs[..., early, :], (0, 0, size // 2, 0)).flatten(-3, -2)
        size //= 2


def causal_scores(
    q: Float[Tensor, "*n C K"], k: Float[Tensor, "*n C K"], total: Float[Tensor, "*n C #K"]
) -> Float[Tensor, "*n C C"]:
    """sum_d q_i k_j exp(total_i - total_j) for j <= i, exact, with `total` the running sum of log decays."""
    later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    gap = total.unsqueeze(-2) - total.unsqueeze(-3)
    decay = gap.masked_fill(later.unsqueeze(-1), -torch.inf).exp()
    if total.shape[-1] == 1:
        return (q @ k.mT) * decay.squeeze(-1)
    return (q.unsqueeze(-2) * decay * k.unsqueeze(-3)).sum(-1)


def _cut(x: Tensor, chunk: int) -> Tensor:
    """(B,H,L,X) -> (B,H,N,chunk,X); zeros at the end (no decay, no key) leave the state alone."""
    return nn.functional.pad(x, (0, 0, 0, -x.shape[2] % chunk)).unflatten(2, (-1, chunk))


# ---------------------------------------------------------------- the C++


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, log_decay, state):
        batch, heads, length, keys = query.shape
        kept = torch.empty(batch, heads, -(-length // SEGMENT), keys, value.shape[-1])
        ctx.save_for_backward(query, key, value, log_decay, state, kept)
        return _forward(query, key, value, log_decay, state, kept)

    @staticmethod
    def backward(ctx, d_output, d_after):
        *given, kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # gradients of gradients, which only PyTorch's own operations have
            asked = [x for x, needed in zip(given, ctx.needs_input_grad) if needed]
            found = iter(torch.autograd.grad(chunked_scan(*given), asked, (d_output, d_after), create_graph=True))
            return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
        query, key, value, log_decay, _ = given
        found = [_empty(x, x.shape[-1]) for x in (query, key, value)]
        found.append(None if log_decay is None else _empty(log_decay, log_decay.shape[-1]))
        d_after, d_state = d_after.contiguous(), torch.empty_like(d_after, memory_format=torch.contiguous_format)
        _call("scan_backward", (query, key, value, log_decay, d_output, *found), (kept, d_after, d_state))
        return *found, d_state


def _forward(query, key, value, log_decay, state, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    out, state = _empty(query, value.shape[-1]), state.contiguous()
    after = torch.empty_like(state)
    _call("scan_forward", (query, key, value, log_decay, out), (state, after, kept))
    return out, after


def _empty(like: Tensor, width: int) -> Tensor:
    """(B,H,L,width) whose memory is (B,L,H,width), so that joining heads copies nothing."""
    batch, heads, length, _ = like.shape
    return like.new_empty(batch, length, heads, width).transpose(1, 2)


class _Operand(ctypes.Structure):
    """`Operand` of scan.cpp."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("batch", "head", "token")],
        ("half", ctypes.c_int32),
    ]

    @classmethod
    def of(cls, x: Tensor | None) -> "_Operand":
        return cls() if x is None else cls(x.data_ptr(), *x.stride()[:3], x.dtype == torch.bfloat16)


class _Sizes(ctypes.Structure):
    """`Sizes` of scan.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "heads", "length", "keys", "values", "channels", "segment")]


def _call(name: str, tensors: tuple[Tensor | None, ...], matrices: tuple[Tensor | None, ...]) -> None:
    """`tensors` begin with query, key, value and log_decay and are read and written by their strides; `matrices` are dense."""
    tensors = [x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors]
    query, _, value, log_decay = tensors[:4]
    channels = 0 if log_decay is None else log_decay.shape[-1]
    sizes = _Sizes(*query.shape, value.shape[-1], channels, SEGMENT)
    operands = (_Operand * len(tensors))(*map(_Operand.of, tensors))
    if getattr(_library(), name)(ctypes.byref(sizes), operands, *(None if x is None else x.data_ptr() for x in matrices)):
        raise MemoryError("no memory for the states of one head")


def _runs_native(*tensors: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    plain = all(
        x is None or (type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16))
        for x in tensors
    )
    return plain and _library() is not None


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled library, its functions typed."""
    made = library("scan")
    for name in ("scan_forward", "scan_backward") if made else ():
        getattr(made, name).argtypes, getattr(made, name).restype = [ctypes.c_void_p] * 5, ctypes.c_int
    return made


def _check(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, state: Tensor) -> None:
    *outer, keys = query.shape
    fit = len(outer) == 3 and key.shape == query.shape and list(value.shape[:3]) == outer and value.ndim == 4
    fit = fit and (log_decay is None or list(log_decay.shape) in ([*outer, keys], [*outer, 1]))
    if not fit or list(state.shape) != [*outer[:2], keys, value.shape[-1]]:
        shapes = [None if x is None else tuple(x.shape) for x in (query, key, value, log_decay, state)]
        raise UsageError(
            "scan: query and key must be (B,H,L,K), value (B,H,L,V), log decay (B,H,L,K), (B,H,L,1) or None, state (B,H,K,V); "
            f"got {', '.join(map(str, shapes))}"
        )
