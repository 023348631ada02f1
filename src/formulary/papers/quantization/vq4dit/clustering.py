"""Codebooks of sub-vectors: nearest codewords, and k-means (the start of arXiv:2408.17131, section 3)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def nearest(
    vectors: Float[Tensor, "N dim"], codebook: Float[Tensor, "k dim"], n: int
) -> tuple[Float[Tensor, "N n"], Int[Tensor, "N n"]]:
    """(squared distances, indices) of the `n` nearest codewords of each vector, nearest first."""
    distance, index = [], []
    for chunk in vectors.split(1 << 12):
        d = torch.addmm(codebook.square().sum(1), chunk, codebook.mT, alpha=-2)
        best = d.topk(n, dim=1, largest=False) if n > 1 else d.min(dim=1, keepdim=True)
        distance.append((best.values + chunk.square().sum(1, keepdim=True)).clamp(min=0))
        index.append(best.indices)
    return torch.cat(distance), torch.cat(index)


def k_means(
    vectors: Float[Tensor, "N dim"], k: int, rounds: int = 25
) -> tuple[Float[Tensor, "k dim"], Int[Tensor, "N"]]:
    """(codebook, assignments) after `rounds` of Lloyd's algorithm from k random vectors; the caller seeds torch.

    Codewords are found on at most 65,536 of the vectors, drawn at random. One that loses all its vectors moves to the
    vector that is farthest from its own.

    >>> points = torch.tensor([[0.0, 0.0], [0.1, 0.0], [5.0, 5.0], [5.1, 5.0]])
    >>> k_means(points, 2)[0].sort(0).values
    tensor([[0.0500, 0.0000],
            [5.0500, 5.0000]])
    """
    order = torch.randperm(len(vectors))
    codebook, some = vectors[order[:k]].clone(), vectors if len(vectors) <= 1 << 16 else vectors[order[: 1 << 16]]
    for _ in range(rounds):
        distance, index = nearest(some, codebook, 1)
        index = index[:, 0]
        count = torch.bincount(index, minlength=k)
        total = torch.zeros_like(codebook).index_add_(0, index, some)
        empty = count == 0
        codebook = torch.where(empty[:, None], codebook, total / count.clamp(min=1)[:, None])
        if bool(empty.any()):
            codebook[empty] = some[distance[:, 0].topk(int(empty.sum())).indices]
    return codebook, nearest(vectors, codebook, 1)[1][:, 0]
