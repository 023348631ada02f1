"""Attention that can do nothing: a softmax stretched and clipped so that it reaches 0, or a learned gate on each head.

    clipped softmax:  out_h = clip((zeta - gamma) softmax(q k' / sqrt(K)) + gamma, 0, 1) v,  gamma = -alpha / T
    gated attention:  out_h(t) = sigmoid(G_h(x_h(t))) * softmax(q k' / sqrt(K)) v

A head that wants to add nothing to the residual must push softmax's inputs apart without end, which the layers before
it do by outliers that eight bits cannot hold. Both changes are for training from scratch, each without the other. A
weight at or below -gamma / (zeta - gamma) becomes exactly 0 and has no gradient. G_h is a small network of each head's
own, shared by all positions, on the head's slice x_h of the attention's input.

Source: arXiv:2306.12929, sections 4.1 and 4.2, and the authors' code, from which the details of G are. There gamma =
-0.025 and zeta = 1 for BERT at T = 128 (alpha 3.2, the default here); alpha of 2 to 4 did well, with T the length
trained on, a constant: rows that see fewer keys are clipped with the same gamma, and so is the decoding of one token.

Beware: with alpha > 1 a flat row is clipped to nothing, so attention whose logits all start near 0 never learns. They
must differ from the start: initial weights of deviation 1/sqrt(width) do at any width, BERT's 0.02 hardly at 64.

>>> q, k, v = torch.randn(3, 1, 2, 50, 16)
>>> ClippedSoftmax(length=50).attend(q, k, v, causal=True).shape
torch.Size([1, 2, 50, 16])
>>> clipped_softmax(torch.tensor([4.0, 0.0, 0.0]), gamma=-0.1)
tensor([0.9611, 0.0000, 0.0000])
"""

import math
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.pytorch_utils import Conv1D

from formulary.contracts.attention import Attention
from formulary.contracts.layer import Layer, State
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError, UsageError

# ---------------------------------------------------------------- clipped softmax


def clipped_softmax(scores: Float[Tensor, "*rows S"], gamma: float, zeta: float = 1.0) -> Float[Tensor, "*rows S"]:
    """softmax over the last dimension, stretched to [gamma, zeta] and clipped to [0, 1]; scores of -inf give 0."""
    return ((zeta - gamma) * scores.softmax(-1) + gamma).clamp(0, 1)


class ClippedSoftmax(Attention):
    """Attention by `clipped_softmax` with gamma = -alpha / length, or the gamma given; see the module.

    alpha and zeta are the paper's; length is T, the sequence length that the model is trained on. Raises UsageError for
    gamma > 0 or zeta < 1. Single tokens are decoded the same way, so `generate` agrees with training. Scores are
    computed in float32 at least.
    """

    equals_sdpa: ClassVar[bool] = False

    def __init__(self, alpha: float = 3.2, length: int = 128, gamma: float | None = None, zeta: float = 1.0):
        super().__init__()
        check_range("outlier-free-transformers", "alpha", alpha, 0, math.inf)
        check_range("outlier-free-transformers", "length", length, 1, 1 << 31)
        self.gamma = -alpha / length if gamma is None else gamma
        check_range("outlier-free-transformers", "gamma", self.gamma, -1e6, 0)
        check_range("outlier-free-transformers", "zeta", zeta, 1, 1e6)
        self.zeta = zeta

    @classmethod
    def full_budget(cls) -> dict[str, float]:
        """Without stretching it is scaled dot-product attention; `equals_sdpa` is False so that decoding is clipped."""
        return {"alpha": 0.0}

    def extra_repr(self) -> str:
        return f"gamma={self.gamma:g}, zeta={self.zeta:g}"

    def attend(
        self,
        query: Float[Tensor, "B H L K"],
        key: Float[Tensor, "B H S K"],
        value: Float[Tensor, "B H S V"],
        *,
        mask: Bool[Tensor, "#B #H L S"] | None = None,
        bias: Float[Tensor, "#B #H L S"] | None = None,
        scale: float | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "B H L V"]:
        scores = self.scores(query, key, mask=mask, bias=bias, scale=scale, causal=causal)
        nothing = (scores == -torch.inf).all(-1, keepdim=True)
        weights = clipped_softmax(scores.masked_fill(nothing, 0), self.gamma, self.zeta)
        return weights.masked_fill(nothing, 0).to(value.dtype) @ value

    def scores(self, query, key, *, mask=None, bias=None, scale=None, causal=False) -> Float[Tensor, "B H L S"]:
        """What the softmax sees; -inf at keys that a query may not see."""
        wide = torch.promote_types(query.dtype, torch.float32)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores = (query @ key.mT).to(wide) * scale
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        return scores


# ---------------------------------------------------------------- gated attention


class Gate(nn.Module):
    """sigmoid(G_h(x_h)) for every head: (B,L,D) -> (B,H,L,1).

    kind: "linear" (one weight a channel of the head's slice), "mlp" (a hidden layer of a quarter of the slice, ReLU) or
    "all" (linear in all channels). The bias of its last layer starts at logit(pi), so that gates start near `pi`;
    `small` also starts the last weights near 0.
    """

    def __init__(self, width: int, heads: int, kind: str, pi: float, small: bool):
        super().__init__()
        self.heads = 1 if kind == "all" else heads
        inputs, outputs = width // self.heads, heads // self.heads
        sizes = [inputs, max(1, inputs // 4), outputs] if kind == "mlp" else [inputs, outputs]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in zip(sizes, sizes[1:]):
            bound = fan_in**-0.5
            self.weights.append(nn.init.uniform_(torch.empty(self.heads, fan_out, fan_in), -bound, bound))
            self.biases.append(nn.init.uniform_(torch.empty(self.heads, fan_out), -bound, bound))
        nn.init.constant_(self.biases[-1], math.log(pi / (1 - pi)))
        if small:
            nn.init.normal_(self.weights[-1], std=0.01)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B H L 1"]:
        h = x.unflatten(-1, (self.heads, -1))
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            h = torch.einsum("blhi,hoi->blho", h.relu() if i else h, weight) + bias
        return h.flatten(2).transpose(1, 2).unsqueeze(-1).sigmoid()


class GatedAttention(Layer):
    """Multi-head self-attention with a gate on each head's output, from the attention's input: (B,L,D) in and out.

    kv_heads: fewer for grouped queries. rotary: the base of rotary positions, None without them. output: whether it has
    an output projection (BERT's attention module has none). gate, pi_init: see `Gate`. fine_tuning: outputs are
    multiplied by 1 / pi_init and gates start near it, so that a layer that took over trained projections starts out as
    the attention that it replaces.

    Raises UsageError for widths that do not divide. No dropout. The state is keys, values and which of them are real.

    >>> layer = GatedAttention(width=32, heads=4, rotary=10000.0)
    >>> layer(torch.randn(2, 7, 32)).shape, layer.state_size(10)
    (torch.Size([2, 7, 32]), 650)
    """

    replaces = "token mixer"
    causal = True
    recurrent = True

    def __init__(
        self,
        width: int,
        heads: int = 4,
        kv_heads: int | None = None,
        causal: bool = True,
        rotary: float | None = None,
        bias: bool = True,
        output: bool = True,
        gate: str = "linear",
        pi_init: float = 0.25,
        fine_tuning: bool = False,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or width % heads or heads % kv_heads:
            raise UsageError(
                f"outlier-free-transformers: heads={heads} must divide width {width}, and kv_heads={kv_heads} the heads"
            )
        if gate not in ("linear", "mlp", "all"):
            raise UsageError(f"outlier-free-transformers: gate must be linear, mlp or all, got {gate!r}")
        if not 0 < pi_init < 1:
            raise UsageError(f"outlier-free-transformers: pi_init must be above 0 and below 1, got {pi_init}")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.causal, self.rotary, self.factor = causal, rotary, 1 / pi_init if fine_tuning else 1.0
        if rotary is not None and (rotary <= 1 or self.head_dim % 2):
            raise UsageError(
                f"outlier-free-transformers: rotary must be a base above 1, on heads of even width; got {rotary} and "
                f"{self.head_dim}"
            )
        self.q_proj = nn.Linear(width, width, bias)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias)
        self.o_proj = nn.Linear(width, width, bias) if output else nn.Identity()
        self.gate = Gate(width, heads, gate, pi_init, fine_tuning)

    @classmethod
    def arguments(cls, part, **settings):
        """As the attention that is replaced, `fine_tuning` unless set. Refuses attention with parts of other kinds."""
        module, config = part.module, getattr(part.module, "config", None)
        found, rope = _projections(module), getattr(config, "rope_parameters", None)
        others = [name for name, child in module.named_children() if child not in found.values()]
        rest = [name for name in others if list(getattr(module, name).parameters())]
        usual = math.isclose(getattr(module, "scaling", 1.0), (part.width // part.heads) ** -0.5)
        if hasattr(module, "has_relative_attention_bias") or not usual:
            raise FormularyError("its attention has position biases or a scale of its own")
        if rest or len(found) < 2:
            raise FormularyError(f"its attention has parts of another kind: {', '.join(rest) or type(module).__name__}")
        if getattr(module, "sliding_window", None) is not None:
            raise FormularyError("its attention is within a sliding window")
        if rope and (rope.get("rope_type") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0):
            raise FormularyError("its rotary positions are of a special type")
        own = {
            "heads": part.heads,
            "kv_heads": part.heads // getattr(module, "num_key_value_groups", 1),
            "causal": part.causal,
            "rotary": float(rope["rope_theta"]) if rope else None,
            "bias": any(getattr(linear, "bias", None) is not None for linear in found.values()),
            "output": "output" in found,
        }
        return super().arguments(part, **{**own, "fine_tuning": True, **settings})

    @torch.no_grad()
    def start_from(self, old: nn.Module) -> list[str]:
        """Take over the projections of `old` with their biases."""
        own = {"query": self.q_proj, "key": self.k_proj, "value": self.v_proj, "output": self.o_proj}
        for role, linear in _projections(old).items():
            weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
            into = [own[r] for r in ("query", "key", "value")] if role == "joint" else [own[role]]
            for i, to in enumerate(into):
                to.weight.copy_(weight.chunk(len(into))[i])
                if to.bias is not None:
                    to.bias.copy_(0 * to.bias if linear.bias is None else linear.bias.chunk(len(into))[i])
        return [role for role, linear in own.items() if isinstance(linear, nn.Linear)]

    def initial_state(self, x: Float[Tensor, "B L D"]) -> State:
        nothing = x.new_zeros(x.shape[0], self.kv_heads, 0, self.head_dim)
        return nothing, nothing, torch.zeros(x.shape[0], 0, dtype=torch.bool, device=x.device)

    def scan(
        self, x: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"] | None, state: State
    ) -> tuple[Float[Tensor, "B L D"], State]:
        projected = (projection(x) for projection in (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in projected)
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        past = state[2].shape[1]
        if self.rotary is not None:
            position = (state[2].sum(1, keepdim=True) + real.cumsum(1) - 1).clamp(min=0)
            query, key = self._rotate(query, position), self._rotate(key, position)
        state = torch.cat([state[0], key], 2), torch.cat([state[1], value], 2), torch.cat([state[2], real], 1)
        allowed = None if mask is None and not past else self._allowed(state[2], past)
        given = {"attn_mask": allowed, "is_causal": self.causal and allowed is None}
        out = scaled_dot_product_attention(query, *state[:2], enable_gqa=self.kv_heads < self.heads, **given)
        out = out * (self.factor * self.gate(x))
        return self.o_proj(out.transpose(1, 2).flatten(2)), state

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        y, state = self.scan(x[:, None], None, state)
        return y[:, 0], state

    def state_size(self, length: int) -> int:
        return (2 * self.kv_heads * self.head_dim + 1) * length

    def _allowed(self, real: Bool[Tensor, "B S"], past: int) -> Bool[Tensor, "B 1 L S"]:
        """Real keys, none of them later where it is causal, and the own one, so that no query sees nothing."""
        keys = torch.arange(real.shape[1], device=real.device)
        own = keys[past:, None]
        seen = real[:, None, None] & (keys <= own) if self.causal else real[:, None, None]
        return seen | (keys == own)

    def _rotate(self, x: Float[Tensor, "B H L K"], position: Tensor) -> Float[Tensor, "B H L K"]:
        """Channels i and i + K/2 turned by position / rotary^(2i/K)."""
        half = x.shape[-1] // 2
        rates = self.rotary ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angle = position[:, None, :, None] * rates
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x.split(half, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _projections(attention: nn.Module) -> dict[str, nn.Module]:
    """The query, key, value and output projections of an attention module, by their usual names; "joint": the first
    three in one.
    """
    names = {"query": ("q_proj", "query"), "key": ("k_proj", "key"), "value": ("v_proj", "value"), "joint": ("c_attn",)}
    names["output"] = ("o_proj", "out_proj", "c_proj")
    found = {role: next((getattr(attention, n) for n in of if hasattr(attention, n)), None) for role, of in names.items()}
    return {role: linear for role, linear in found.items() if isinstance(linear, nn.Linear | Conv1D)}
