"""Gated linear attention: linear attention whose state fades at a rate that depends on the input, channel by channel.

    alpha_t = sigmoid(x_t W1 W2 + b)^(1/tau)                     (d_k), in (0, 1)
    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t     per head, S_t is (d_k, d_v)
    y_t = (swish(x_t W_r + b_r) * LayerNorm(o_t)) W_O            norm per head, heads joined

Source: arXiv:2312.06635, eq. 3 and sections 4.3, 4.4: d_k = d/2 and d_v = d over all heads, 4 heads, W1 of rank 16, tau = 16, no
encoding of positions. Two things follow the authors' code where the paper is silent: keys are scaled by the root of the head's
key width, and query, key and decay projections start small (Xavier with gain 2^-2.5).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from formulary.contracts.layer import Layer, State
from formulary.errors import FormularyError, UsageError
from formulary.papers.sequence_mixing._parts import projections, recurrent_step, scan, wide


class GatedLinearAttention(Layer):
    """A causal token mixer with a state of fixed size: (B,L,D) in and out, O(L) in time, O(1) in memory per decoded token.

    `expand_k` and `expand_v` are d_k/D and d_v/D. The recurrence runs in float32 at least. Raises UsageError for widths that the
    heads do not divide.

    >>> layer = GatedLinearAttention(width=32, heads=4)
    >>> x = torch.randn(2, 7, 32)
    >>> layer(x).shape, layer.state_size(1000)
    (torch.Size([2, 7, 32]), 128)
    """

    replaces = "token mixer"
    causal = True
    recurrent = True

    def __init__(
        self,
        width: int,
        heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        tau: float = 16.0,
    ):
        super().__init__()
        key_width, value_width = round(width * expand_k), round(width * expand_v)
        if heads < 1 or not key_width or not value_width or key_width % heads or value_width % heads:
            raise UsageError(
                f"gla: {heads} heads must divide the key width {key_width} and the value width {value_width} "
                f"(width {width}, expand_k {expand_k}, expand_v {expand_v})"
            )
        if gate_rank < 1 or tau <= 0:
            raise UsageError(f"gla: gate_rank must be at least 1 and tau above 0, got {gate_rank} and {tau}")
        self.heads, self.tau = heads, tau
        self.q_proj = nn.Linear(width, key_width, bias=False)
        self.k_proj = nn.Linear(width, key_width, bias=False)
        self.v_proj = nn.Linear(width, value_width, bias=False)
        self.decay_down = nn.Linear(width, gate_rank, bias=False)
        self.decay_up = nn.Linear(gate_rank, key_width)
        self.norm = nn.LayerNorm(value_width // heads, elementwise_affine=False)
        self.gate_proj = nn.Linear(width, value_width)
        self.o_proj = nn.Linear(value_width, width, bias=False)
        for linear in (self.q_proj, self.k_proj, self.decay_down, self.decay_up):
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)

    @classmethod
    def arguments(cls, part, **settings):
        """As many heads as the attention that is replaced, unless set. Refuses attention that looks both ways."""
        if not part.causal:
            raise FormularyError("gla is causal: it cannot replace attention that looks both ways")
        return super().arguments(part, **{"heads": part.heads, **settings})

    def start_from(self, old: nn.Module) -> list[str]:
        """Take over the projections of `old` whose shapes fit: values and output, with `expand_k=1` queries and keys too."""
        own = {"query": self.q_proj, "key": self.k_proj, "value": self.v_proj, "output": self.o_proj}
        taken = [role for role, weight in projections(old).items() if weight.shape == own[role].weight.shape]
        if "query" not in taken or "key" not in taken:
            taken = [role for role in taken if role not in ("query", "key")]
        with torch.no_grad():
            for role in taken:
                own[role].weight.copy_(projections(old)[role])
        return taken

    def initial_state(self, x: Float[Tensor, "B L D"]) -> State:
        key, value = self.q_proj.out_features // self.heads, self.v_proj.out_features // self.heads
        return (x.new_zeros(x.shape[0], self.heads, key, value, dtype=wide(x.dtype)),)

    def scan(
        self, x: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"] | None, state: State
    ) -> tuple[Float[Tensor, "B L D"], State]:
        """In one kernel. Where `mask` is False a token has no key and no decay, so the state passes it unchanged."""
        q, k, v, g = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self._inputs(x))
        if mask is not None:
            padding = ~mask[:, None, :, None]
            k, v, g = k.masked_fill(padding, 0), v.masked_fill(padding, 0), g.masked_fill(padding, 0)
        with torch.autocast(x.device.type, enabled=False):
            out, after = scan(q, k, v, g, state[0])
        return self._output(out.transpose(1, 2), x), (after,)

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        q, k, v, g = (t.unflatten(-1, (self.heads, -1)) for t in self._inputs(x))
        with torch.autocast(x.device.type, enabled=False):
            out, after = recurrent_step(q, k, v, g, state[0])
        return self._output(out, x), (after,)

    def state_size(self, length: int) -> int:
        return self.q_proj.out_features * self.v_proj.out_features // self.heads

    def log_decay(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B K"]:
        """log alpha, in float32 at least, heads joined; always below 0."""
        logits = self.decay_up(self.decay_down(x)).to(wide(x.dtype))
        return nn.functional.logsigmoid(logits) / self.tau

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key, value and log decay, heads joined."""
        scale = (self.k_proj.out_features // self.heads) ** -0.5
        return self.q_proj(x), self.k_proj(x) * scale, self.v_proj(x), self.log_decay(x)

    def _output(self, out: Float[Tensor, "*B H V"], x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        normed = self.norm(out).flatten(-2)
        return self.o_proj(nn.functional.silu(self.gate_proj(x)) * normed)
