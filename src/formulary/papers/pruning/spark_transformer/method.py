"""Spark Transformer: feed-forward and attention that keep about k entries, chosen from a part of the input by mean and deviation.

    theta(x) = mean(x) + std(x) Phi^-1(1 - k/n),  StatTopK(x) = max(x - theta, 0)           statistical top-k
    y = V (GELU(StatTopK(K1^T q[:r])) * (K2^T q[r:]))                                        Spark FFN
    y = V (softmax(TopK(K1^T q[:r])) * softplus(K2^T q[r:])), dropped keys at -inf           Spark attention

Source: arXiv:2506.06644, sections 2 and 3. On Gemma-2 2B: r = 1024 of 2304 and k = 8 % in the feed-forward, r = 128 of 256 and
k = 256 keys in attention. Both are made to be trained from scratch: nothing of a trained model carries over.

Points settled here: the softmax sees x - theta on what is kept, which is x since a shift changes nothing; a row with k keys or
fewer keeps all, which is where theta goes as n falls to k. Rotary positions turn channels i and i + K/2 of a head together, so a
split must not part them: the r channels that predict are evenly spaced pairs, as if each half had its own rotation.
"""

from statistics import NormalDist
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, gelu, linear, softplus
from transformers.pytorch_utils import Conv1D

from formulary.contracts.attention import Attention
from formulary.contracts.layer import Layer
from formulary.contracts.parts import count_weights
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError, UsageError

GATHER_ROWS = 4
"""Up to so many tokens at once are worth gathering active rows for; more of them share the dense products."""


class StatTopK(nn.Module):
    """max(x - theta, 0) over the last dimension, where theta lets about the share `keep` of Gaussian entries pass; O(n), no sorting.

    Continuous, and differentiable where no entry equals theta. Statistics are computed in float32 at least, std with n - 1.

    >>> x = torch.randn(100, 4096)
    >>> round(float((StatTopK(0.08)(x) > 0).float().mean()), 2)
    0.08
    """

    def __init__(self, keep: float):
        super().__init__()
        if not 0 < keep < 1:
            raise UsageError(f"spark-transformer: keep must be above 0 and below 1, got {keep}")
        self.keep, self.quantile = keep, NormalDist().inv_cdf(1 - keep)

    def forward(self, x: Float[Tensor, "*B N"]) -> Float[Tensor, "*B N"]:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(y, -1, keepdim=True)
        return (y - mean - self.quantile * variance.clamp_min(1e-12).sqrt()).relu().to(x.dtype)

    def extra_repr(self) -> str:
        return f"keep={self.keep}"


class Rows(Conv1D):
    """x @ weight with weight (in, out) and no bias: an active input reads one contiguous row."""

    def __init__(self, out_features: int, in_features: int):
        super().__init__(out_features, in_features)
        nn.init.normal_(self.weight, std=in_features**-0.5)
        self.register_parameter("bias", None)

    def forward(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        return x @ self.weight


class SparkFFN(Layer):
    """A feed-forward in which about `keep` of `hidden` neurons act on a token: (..., D) in and out, 2 D hidden weights.

    The first `predictor` of the input's channels choose the neurons and set their gate, the others their value. Without gradients,
    up to 4 tokens read only the rows of active neurons. Raises UsageError for shares outside (0, 1).

    >>> layer = SparkFFN(width=36, hidden=96)
    >>> layer(torch.randn(2, 5, 36)).shape, layer.predict_proj.in_features
    (torch.Size([2, 5, 36]), 16)
    """

    replaces = "feed-forward"

    def __init__(self, width: int, hidden: int, keep: float = 0.08, predictor: float = 4 / 9):
        super().__init__()
        self.split = round(width * predictor)
        check_range("spark-transformer", "predictor channels", self.split, 1, width - 1)
        check_range("spark-transformer", "hidden", hidden, 2, 1 << 24)
        self.topk = StatTopK(keep)
        self.predict_proj = nn.Linear(self.split, hidden, bias=False)
        self.up_proj = nn.Linear(width - self.split, hidden, bias=False)
        self.down_proj = Rows(width, hidden)

    @classmethod
    def arguments(cls, part, **settings):
        """As many weights as the feed-forward that is replaced (1.5 times a gated one's neurons), unless `hidden` is set."""
        if hasattr(part.module, "experts"):
            raise FormularyError("spark-transformer: a mixture of experts already is sparse; it is left as it is")
        parity = max(2, round(count_weights(part.module) / (2 * part.width)))
        return super().arguments(part, **{"hidden": parity, **settings})

    def forward(self, x: Float[Tensor, "*B D"], mask: Bool[Tensor, "B L"] | None = None) -> Float[Tensor, "*B D"]:
        gate = self.topk(self.predict_proj(x[..., : self.split]))
        if self._gathers(x):
            rows = zip(gate.flatten(0, -2), x[..., self.split :].flatten(0, -2))
            return torch.cat([self._active(*row) for row in rows]).view(x.shape)
        return self.down_proj(gelu(gate) * self.up_proj(x[..., self.split :]))

    def _gathers(self, x: Tensor) -> bool:
        few = x.numel() <= GATHER_ROWS * x.shape[-1] and x.ndim > 1
        plain = type(self.up_proj) is nn.Linear and type(self.down_proj) is Rows
        return few and plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def _active(self, gate: Float[Tensor, "N"], rest: Float[Tensor, "M"]) -> Float[Tensor, "1 D"]:
        """The output for one token from the rows of its active neurons alone."""
        index = gate.nonzero().squeeze(1)
        value = gelu(gate[index]) * linear(rest, self.up_proj.weight[index])
        return embedding_bag(index[None], self.down_proj.weight, per_sample_weights=value[None], mode="sum")


class SparkAttention(Attention):
    """Attention to about `keep` keys, chosen and weighed by a part of the channels and modulated by the others.

    `predictor` is the share of a head's channels that choose. The statistics of a row cover the keys that its query may see; the
    largest score is always kept. Computed densely: it says what the method computes, and saves no time here. Single tokens are
    decoded the same way. It is never scaled dot-product attention, since softplus of the second scores multiplies the weights.

    >>> attention = SparkAttention(keep=4)
    >>> q, k, v = torch.randn(3, 1, 2, 50, 8)
    >>> attention.attend(q, k, v, causal=True).shape
    torch.Size([1, 2, 50, 8])
    """

    equals_sdpa: ClassVar[bool] = False

    def __init__(self, keep: int = 256, predictor: float = 0.5):
        super().__init__()
        check_range("spark-transformer", "keep", keep, 1, 1 << 31)
        if not 0 < predictor < 1:
            raise UsageError(f"spark-transformer: predictor must be above 0 and below 1, got {predictor}")
        self.keep, self.predictor = keep, predictor

    @classmethod
    def full_budget(cls) -> dict[str, int]:
        """No key is dropped; the modulation remains, so this is not scaled dot-product attention."""
        return {"keep": 1 << 31}

    def attend(
        self,
        query: Float[Tensor, "B H L K"],
        key: Float[Tensor, "B H S K"],
        value: Float[Tensor, "B H S K"],
        *,
        mask: Bool[Tensor, "#B #H L S"] | None = None,
        bias: Float[Tensor, "#B #H L S"] | None = None,
        scale: float | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "B H L K"]:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        chosen = self.channels(query.shape[-1]).to(query.device)
        scores, second = ((query[..., c] @ key[..., c].mT).float() * scale for c in (chosen, ~chosen))
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device)
        allowed = (allowed.tril() if causal else allowed).expand_as(scores)
        if bias is not None:
            scores, allowed = scores + bias, allowed & (bias > torch.finfo(bias.dtype).min / 4)
        kept = self.kept(scores, allowed if mask is None else allowed & mask)
        nothing = ~kept.any(-1, keepdim=True)
        weights = scores.masked_fill(~kept, -torch.inf).softmax(-1).masked_fill(nothing, 0)
        return (weights * softplus(second)).to(value.dtype) @ value

    def channels(self, width: int) -> Bool[Tensor, "K"]:
        """Which of a head's channels choose: pairs (i, i + K/2), evenly spaced, about `predictor` of all."""
        half = width // 2
        ends = torch.floor(torch.arange(half + 1) * self.predictor + 0.5)
        pairs = ends[1:] > ends[:-1]
        if not pairs.any() or pairs.all():
            raise UsageError(f"spark-transformer: predictor {self.predictor} leaves one part of a head of {width} channels empty")
        return torch.cat([pairs, pairs, torch.zeros(width % 2, dtype=torch.bool)])

    def kept(self, scores: Float[Tensor, "B H L S"], allowed: Bool[Tensor, "B H L S"]) -> Bool[Tensor, "B H L S"]:
        """Keys at or above each row's threshold, among those allowed."""
        count = allowed.sum(-1, keepdim=True)
        seen = scores.detach().masked_fill(~allowed, 0)
        mean = seen.sum(-1, keepdim=True) / count.clamp_min(1)
        variance = (seen - mean).masked_fill(~allowed, 0).square().sum(-1, keepdim=True) / (count - 1).clamp_min(1)
        share = (1 - self.keep / count.clamp_min(1).double()).clamp_min(0)
        threshold = mean + variance.sqrt() * torch.special.ndtri(share).to(scores.dtype)
        threshold = threshold.masked_fill(count <= self.keep, -torch.inf)
        largest = scores.detach().masked_fill(~allowed, -torch.inf).amax(-1, keepdim=True)
        return allowed & (scores >= torch.minimum(threshold, largest))
