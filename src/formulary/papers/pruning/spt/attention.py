"""Attention to the L keys whose product-quantized codes agree most with the query's, storing L weights a query."""

from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from formulary.contracts.attention import Attention
from formulary.contracts.transform import check_range
from formulary.errors import UsageError

ROWS, SAMPLE, LLOYD = 128, 4096, 8
"""Queries computed at a time; queries and keys that codewords are learned from; rounds of k-means."""


class SparseAttention(torch.autograd.Function):
    """softmax(q k' scale + bias) v over the keys in `chosen`, (B, H, L, n); backward needs n weights a query, not S."""

    @staticmethod
    def forward(ctx, query, key, value, bias, chosen, seen, scale):
        weights = torch.empty(chosen.shape, dtype=query.dtype, device=query.device)
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        for rows in _chunks(query.shape[2]):
            index, scores = chosen[:, :, rows].long(), query[:, :, rows] @ key.mT * scale
            if bias is not None:
                scores = scores + bias[:, :, rows]
            kept = scores.gather(-1, index).float().masked_fill(~seen[:, :, rows], -torch.inf)
            weights[:, :, rows] = kept.softmax(-1).nan_to_num(0).to(query.dtype)
            dense = torch.zeros_like(scores).scatter_(-1, index, weights[:, :, rows])
            out[:, :, rows] = dense @ value
        ctx.save_for_backward(query, key, value, chosen, weights)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, chosen, weights = ctx.saved_tensors
        grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for rows in _chunks(query.shape[2]):
            index, weight, above = chosen[:, :, rows].long(), weights[:, :, rows], grad[:, :, rows]
            at_weights = (above @ value.mT).gather(-1, index)
            at_scores = weight * (at_weights - (weight * at_weights).sum(-1, keepdim=True)) * ctx.scale
            shape = *weight.shape[:-1], key.shape[2]
            at_scores = torch.zeros(shape, dtype=weight.dtype, device=weight.device).scatter_(-1, index, at_scores)
            dense = torch.zeros_like(at_scores).scatter_(-1, index, weight)
            grads[0][:, :, rows] = at_scores @ key
            grads[1].add_(at_scores.mT @ query[:, :, rows])
            grads[2].add_(dense.mT @ above)
        return *grads, None, None, None, None


def _chunks(length: int):
    return [slice(start, start + ROWS) for start in range(0, length, ROWS)]


class PQAttention(Attention):
    """Attention to `keep` keys of each query: those that share its codeword in most of `subspaces` parts of a head.

    Queries and keys of a layer share one codebook of `codewords` entries a part. Of keys that agree in as many parts the
    nearest come first. Choosing reads codes alone; forward and backward compute in chunks of 128 queries and store `keep`
    weights a query. Single tokens are decoded the same way. Biases are added to scores and get no gradient.

    `fit` learns the codebook by k-means. With `learn`, a forward pass moves every codeword by that rate towards the mean
    of what it stands for; with `learn` 1 it is fitted anew.

    >>> attention = PQAttention(keep=4, head_dim=8)
    >>> q, k, v = torch.randn(3, 1, 2, 50, 8)
    >>> attention.fit(q, k)
    >>> attention.attend(q, k, v, causal=True).shape
    torch.Size([1, 2, 50, 8])
    """

    equals_sdpa: ClassVar[bool] = False
    learn: float = 0.0

    def __init__(self, keep: int = 64, head_dim: int = 64, subspaces: int = 8, codewords: int = 16):
        super().__init__()
        check_range("spt", "keep", keep, 1, 1 << 31)
        check_range("spt", "codewords", codewords, 2, 255)
        if not 1 <= subspaces <= 255 or head_dim % subspaces:
            raise UsageError(f"spt: subspaces must divide the head's {head_dim} channels, got {subspaces}")
        self.keep, self.subspaces = keep, subspaces
        self.register_buffer("codebook", torch.zeros(subspaces, codewords, head_dim // subspaces))

    @classmethod
    def full_budget(cls) -> dict[str, int]:
        """Every key: scaled dot-product attention."""
        return {"keep": 1 << 31}

    def parts(self, x: Float[Tensor, "B H L K"]) -> Float[Tensor, "M N P"]:
        """Every vector of every head, cut into the parts that are quantized."""
        return x.detach().to(self.codebook.dtype).reshape(-1, self.subspaces, self.codebook.shape[-1]).transpose(0, 1)

    def nearest(self, split: Float[Tensor, "M N P"]) -> Int[Tensor, "M N"]:
        """The codeword nearest to each part."""
        book = self.codebook
        return (book.square().sum(-1)[:, None] - 2 * split @ book.mT).argmin(-1)

    def codes(self, x: Float[Tensor, "B H L K"]) -> UInt8[Tensor, "M B H L"]:
        return self.nearest(self.parts(x)).to(torch.uint8).view(self.subspaces, *x.shape[:-1])

    @torch.no_grad()
    def fit(self, query: Float[Tensor, "B H L K"], key: Float[Tensor, "B H S K"]) -> None:
        """Learn the codebook from up to 4,096 queries and as many keys, evenly spaced."""
        each = [self.parts(x) for x in (query, key)]
        split = torch.cat([part[:, :: -(-part.shape[1] // SAMPLE)] for part in each], 1)
        index = torch.zeros(len(split), 1, dtype=torch.long, device=split.device)
        far = torch.full(split.shape[:2], torch.inf, dtype=split.dtype, device=split.device)
        for word in range(self.codebook.shape[1]):  # k-means++: the next one is drawn by squared distance
            drawn = split.gather(1, index[..., None].expand(-1, -1, split.shape[-1]))
            self.codebook[:, word] = drawn[:, 0]
            far = torch.minimum(far, (split - drawn).square().sum(-1))
            index = far.clamp_min(1e-30).multinomial(1)
        for _ in range(LLOYD):
            self.move(split, 1.0)

    def move(self, split: Float[Tensor, "M N P"], rate: float) -> None:
        """Move codewords by `rate` towards the mean of the parts nearest to them."""
        index = self.nearest(split)
        sums = torch.zeros_like(self.codebook).scatter_add_(1, index[..., None].expand_as(split), split)
        count = torch.zeros_like(self.codebook[..., 0]).scatter_add_(1, index, torch.ones_like(split[..., 0]))[..., None]
        mean = torch.where(count > 0, sums / count.clamp_min(1), self.codebook)
        self.codebook.lerp_(mean, rate)

    @torch.no_grad()
    def choose(
        self, query: Float[Tensor, "B H L K"], key: Float[Tensor, "B H S K"], allowed: Bool[Tensor, "B H L S"]
    ) -> Int[Tensor, "B H L n"]:
        """The keys of each query by agreement of codes, allowed ones first."""
        ours, theirs = self.codes(query), self.codes(key)
        length, position = key.shape[2], torch.arange(key.shape[2], device=key.device)
        picked = []
        for rows in _chunks(query.shape[2]):
            agree = sum((a[:, :, rows, None] == b[:, :, None]).to(torch.uint8) for a, b in zip(ours, theirs))
            rank = torch.where(allowed[:, :, rows], agree.int() * length + position, -1)
            picked.append(rank.topk(min(self.keep, length), -1, sorted=False).indices)
        return torch.cat(picked, 2).to(torch.int16 if length < 1 << 15 else torch.int32)

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
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        allowed = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        allowed = (allowed.tril() if causal else allowed)[None, None]
        if mask is not None:
            allowed = allowed & mask
        if bias is not None:
            allowed = allowed & (bias > torch.finfo(bias.dtype).min / 4)
        allowed = allowed.expand(*query.shape[:3], key.shape[2])
        if self.learn == 1.0:
            self.fit(query, key)
        elif self.learn:
            with torch.no_grad():
                self.move(torch.cat([self.parts(query), self.parts(key)], 1), self.learn)
        chosen = self.choose(query, key, allowed)
        seen = allowed.gather(-1, chosen.long())
        return SparseAttention.apply(query, key, value, bias, chosen, seen, scale)
