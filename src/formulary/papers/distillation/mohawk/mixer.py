"""Discrete Mamba-2: a state space mixer whose matrix over tokens can take the place of an attention matrix."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from formulary.contracts import Layer
from formulary.contracts.layer import State
from formulary.errors import FormularyError, UsageError
from formulary.kernels.scan import causal_scores, recurrent_step, scan, wide
from formulary.papers.distillation.echoatt.sharing import projections as of_known_names

UNIT_GATE = 1.2784645427610738
"""silu(UNIT_GATE) = 1."""


class DiscreteMamba2(Layer):
    """A causal mixer with a state of fixed size: (B,L,D) in and out, O(L) in time, O(1) in memory a decoded token.

    Per head, with x, b, c and a projected from the input and x, b, c averaged over `conv` tokens by a filter a channel:

        S_t = sigmoid(-a_t) S_{t-1} + b_t x_t',  y_t = S_t' c_t + D x_t,  out_t = W_o (y_t * silu(W_z u_t + z))

    or y = T x with T_ij = c_i'b_j prod_{k=j+1..i} sigmoid(-a_k), + D where i = j (`matrix`). The filter starts as the
    identity and the gate silu(...) as 1, so that only T, the values x and W_o are left, as in attention. Nothing is
    squashed behind the filter and nothing normalized. Raises UsageError for sizes below 1.

    >>> layer = DiscreteMamba2(width=32, heads=4, head_dim=8, state=16)
    >>> u = torch.randn(2, 7, 32)
    >>> layer(u).shape, layer.matrix(u).shape, layer.state_size(1000)
    (torch.Size([2, 7, 32]), torch.Size([2, 4, 7, 7]), 992)
    """

    replaces = "token mixer"
    causal = True
    recurrent = True

    def __init__(self, width: int, heads: int, head_dim: int, state: int = 64, conv: int = 4, bias: bool = False):
        super().__init__()
        if min(width, heads, head_dim, state, conv) < 1:
            raise UsageError(f"mohawk: sizes must be at least 1, got {width}, {heads}, {head_dim}, {state} and {conv}")
        self.heads, self.conv, inner = heads, conv, heads * head_dim
        self.sizes = (inner, heads * state, heads * state)
        self.x_proj = nn.Linear(width, inner, bias=False)
        self.b_proj = nn.Linear(width, heads * state, bias=False)
        self.c_proj = nn.Linear(width, heads * state, bias=False)
        self.a_proj = nn.Linear(width, heads, bias=False)
        self.z_proj = nn.Linear(width, inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=bias)
        self.z_bias = nn.Parameter(torch.full((inner,), UNIT_GATE))
        self.filter = nn.Parameter(torch.zeros(conv, sum(self.sizes)))
        self.filter_bias = nn.Parameter(torch.zeros(sum(self.sizes)))
        self.skip = nn.Parameter(torch.ones(heads))
        nn.init.zeros_(self.z_proj.weight)
        with torch.no_grad():
            self.filter[-1] = 1

    @classmethod
    def arguments(cls, part, **settings) -> dict[str, Any]:
        """The heads and head size of the attention that is replaced. Refuses attention that looks both ways."""
        if not part.causal:
            raise FormularyError("mohawk is causal: it cannot replace attention that looks both ways")
        _, _, output, bias = projections(part.module)
        sizes = {"heads": part.heads, "head_dim": output.shape[1] // part.heads, "bias": bias is not None}
        return super().arguments(part, **sizes, **settings)

    @torch.no_grad()
    def start_from(self, old: nn.Module) -> list[str]:
        """Take over the values, shared ones repeated, and the output projection of `old`."""
        value, value_bias, output, output_bias = projections(old)
        inner = self.sizes[0]
        repeat = lambda t: t.unflatten(0, (-1, inner // self.heads)).repeat_interleave(inner // len(t), 0).flatten(0, 1)
        self.x_proj.weight.copy_(repeat(value))
        self.o_proj.weight.copy_(output)
        if value_bias is not None:
            self.filter_bias[:inner].copy_(repeat(value_bias))
        if output_bias is not None:
            self.o_proj.bias.copy_(output_bias)
        return ["value", "output"]

    def initial_state(self, x: Float[Tensor, "B L D"]) -> State:
        """The state S, (B,H,S,K) in float32 at least, and what the filter still sees, (B,conv-1,*)."""
        state, head_dim = self.sizes[1] // self.heads, self.sizes[0] // self.heads
        window = x.new_zeros(len(x), self.conv - 1, sum(self.sizes))
        return x.new_zeros(len(x), self.heads, state, head_dim, dtype=wide(x.dtype)), window

    def scan(
        self, x: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"] | None, state: State
    ) -> tuple[Float[Tensor, "B L D"], State]:
        """In one kernel. Where `mask` is False a token has no b and no decay, and the filter sees zeros."""
        value, b, c, log_decay, window = self._inputs(x, mask, state[1])
        with torch.autocast(x.device.type, enabled=False):
            y, after = scan(c, b, value, log_decay, state[0])
        y = y + self.skip[:, None, None] * value
        return self._output(y.transpose(1, 2).flatten(2), x), (after, window)

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        *found, window = self._inputs(x[:, None], None, state[1])
        value, b, c, log_decay = (t[:, :, 0] for t in found)
        with torch.autocast(x.device.type, enabled=False):
            y, after = recurrent_step(c, b, value, log_decay, state[0])
        y = y + self.skip[:, None] * value
        return self._output(y.flatten(1), x), (after, window)

    def matrix(self, x: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"] | None = None) -> Float[Tensor, "B H L L"]:
        """T, in float32 at least; with `mask`, columns of padding are 0 below the diagonal."""
        _, b, c, log_decay, _ = self._inputs(x, mask, self.initial_state(x)[1])
        scores = causal_scores(c.to(log_decay.dtype), b.to(log_decay.dtype), log_decay.cumsum(2))
        return scores + torch.diag_embed(self.skip[:, None].expand(-1, x.shape[1]))

    def state_size(self, length: int) -> int:
        return self.sizes[0] * self.sizes[1] // self.heads + (self.conv - 1) * sum(self.sizes)

    def _inputs(self, u: Tensor, mask: Tensor | None, window: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, b and c, each (B,H,L,*), the logarithms of decays (B,H,L,1), and the filter's next window."""
        padding = None if mask is None else ~mask[:, :, None]
        hide = lambda t: t if padding is None else t.masked_fill(padding, 0)
        seen = torch.cat([window.to(u.dtype), hide(torch.cat([self.x_proj(u), self.b_proj(u), self.c_proj(u)], -1))], 1)
        length = u.shape[1]
        mixed = sum(weights * seen[:, j : j + length] for j, weights in enumerate(self.filter)) + self.filter_bias
        x, b, c = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in hide(mixed).split(self.sizes, -1))
        log_decay = hide(F.logsigmoid(-self.a_proj(u).to(wide(u.dtype))))
        return x, b, c, log_decay.transpose(1, 2).unsqueeze(-1), seen[:, length:]

    def _output(self, y: Float[Tensor, "*B I"], u: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return self.o_proj(y * F.silu(self.z_proj(u) + self.z_bias))


def projections(attention: nn.Module) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """The weights (out, in) and biases of its value and its output projection."""
    try:
        return of_known_names(attention)
    except FormularyError:
        kind = type(attention).__name__
        raise FormularyError(f"mohawk knows no value and output projection of its own in a {kind}") from None
