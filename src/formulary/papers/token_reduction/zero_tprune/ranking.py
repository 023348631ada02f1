"""The equations of Zero-TPrune's stages (arXiv:2305.17328, section 3), on attention maps and keys."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from formulary.papers.token_reduction._parts import rows


def page_rank(
    attention: Float[Tensor, "B H L L"], alive: Bool[Tensor, "B L"], iterations: int, prefix: int
) -> Float[Tensor, "B H L"]:
    """The share of votes of each token that is `alive` after `iterations` rounds; CLS, the first of a prefix, starts
    with sqrt(N) times the votes of the others."""
    batch, heads, length, _ = attention.shape
    mine = alive[:, None].to(attention.dtype)
    votes = mine.expand(batch, heads, length).clone()
    if prefix:
        votes[..., 0] *= (length - prefix) ** 0.5
    for _ in range(iterations):
        votes = (votes[..., None, :] @ attention)[..., 0, :] * mine
        votes = votes / votes.sum(-1, keepdim=True)
    return votes


def importance(
    votes: Float[Tensor, "B H n"], alive: Bool[Tensor, "B n"], low: float, high: float
) -> Float[Tensor, "B n"]:
    """The root mean square over heads of the image tokens' votes, by the heads of variance in [low, high]."""
    mine = alive[:, None].to(votes.dtype)
    votes = votes * mine
    count = mine.sum(-1, keepdim=True)
    votes = votes * count / votes.sum(-1, keepdim=True)
    variance = ((votes - 1).square() * mine).sum(-1) / count[..., 0]
    passes = (variance >= low) & (variance <= high)
    passes = (passes | ~passes.any(1, keepdim=True)).to(votes.dtype)
    return ((votes.square() * passes[..., None]).sum(1) / passes.sum(1, keepdim=True)).sqrt()


def repeated(scores: Float[Tensor, "B n"], keys: Float[Tensor, "B n D"], count: int) -> Bool[Tensor, "B n"]:
    """True at the `count` tokens of the less important half whose keys are most like one of the other half."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    half = scores.shape[1] // 2
    more, less = order[:, : len(order[0]) - half], order[:, len(order[0]) - half :]
    unit = nn.functional.normalize(keys, dim=-1)
    nearest = (rows(unit, less) @ rows(unit, more).mT).amax(-1)
    gone = less.gather(1, nearest.argsort(dim=1, descending=True, stable=True)[:, :count])
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, gone, True)


def left(count: int, similar: int, keep: float) -> int:
    """How many of `count` image tokens a pruning layer leaves: at least one."""
    return max(1, round((count - min(similar, count // 2)) * keep))
