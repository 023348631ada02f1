"""The equations of GTP-ViT, and the image tokens of one forward pass (arXiv:2311.03035, section 3)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formulary.errors import FormularyError
from formulary.papers.token_reduction._parts import grid_distances, rows


def token_scores(attention: Float[Tensor, "B H L L"], prefix: int) -> Float[Tensor, "B n"]:
    """How hard each image token is to regenerate, times how widely it is read; the first `prefix` have no score."""
    itself = attention.diagonal(dim1=-2, dim2=-1).amax(1).float()
    broadcast = attention.sum(-2, dtype=torch.float32).amax(1)
    return (itself * broadcast)[:, prefix:]


def choose(scores: Float[Tensor, "B n"], drop: int) -> tuple[Int[Tensor, "B kept"], Int[Tensor, "B drop"]]:
    """Indices of the kept and of the `drop` lowest tokens, each ascending; of equal scores the later token goes."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    kept = scores.shape[1] - drop
    return order[:, :kept].sort(dim=1).values, order[:, kept:].sort(dim=1).values


def token_graph(
    distances: Float[Tensor, "N N"], cosines: Float[Tensor, "B N N"] | None, kind: str, neighbors: int
) -> Float[Tensor, "#B N N"]:
    """Row i weighs whom token i hears, its 8 neighbors in the grid and/or its `neighbors` most similar."""
    edges = (distances < 2.5)[None] if kind != "semantic" else torch.zeros_like(cosines, dtype=torch.bool)
    if kind != "spatial":
        itself = torch.eye(len(distances), dtype=torch.bool, device=distances.device)
        nearest_ones = cosines.masked_fill(itself, -2).topk(min(neighbors, len(distances) - 1), dim=-1).indices
        edges = edges | torch.zeros_like(cosines, dtype=torch.bool).scatter(2, nearest_ones, True)
    graph = edges.float()
    graph.diagonal(dim1=-2, dim2=-1).zero_()
    scale = graph.sum(-1).clamp_min(1).rsqrt()
    return scale[..., :, None] * graph * scale[..., None, :]


def sparsify(attention: Float[Tensor, "B H L L"], density: float) -> Float[Tensor, "B H L L"]:
    """Each map with all but its largest `density` part of entries set to zero, not normalized again."""
    entries = attention[0, 0].numel()
    kept = max(1, round(density * entries))
    least = attention.flatten(2).kthvalue(entries - kept + 1, dim=-1).values[..., None, None]
    return attention.masked_fill(attention < least, 0)


class Tokens:
    """The image tokens of the forward under way, shared by the edited parts of one model and of no copy of it.

    `kept` (B,n): which patches are left, ascending. `sizes` (B,n), or None while all are 1. `scores` (B,n): of the last
    attention. `graph` (1 or B,N,N): weights. `nearness` (1 or B,N,N): higher for patches that are nearer to each other.
    """

    def __init__(self, graph: str, neighbors: int):
        self.kind, self.neighbors = graph, neighbors
        self.height = self.width = self.prefix = 0
        self.graph = self.nearness = self.kept = self.sizes = self.scores = None

    def __deepcopy__(self, memo: dict) -> "Tokens":
        return Tokens(self.kind, self.neighbors)

    def start(self, embeddings: Float[Tensor, "B L D"]) -> None:
        """Forget the last images and build the graph of these."""
        count = self.height * self.width
        self.prefix = embeddings.shape[1] - count
        if self.prefix < 0 or not count:
            raise FormularyError(
                f"gtp-vit: {embeddings.shape[1]} tokens do not hold a grid of {self.height} x {self.width} patches"
            )
        distances, cosines = grid_distances(self.height, self.width, embeddings.device), None
        if self.kind != "spatial":
            unit = nn.functional.normalize(embeddings.detach()[:, self.prefix :].float(), dim=-1)
            cosines = unit @ unit.mT
        self.graph = token_graph(distances, cosines, self.kind, self.neighbors)
        self.nearness = -distances[None] if cosines is None else 0.49 * cosines - distances
        self.kept = torch.arange(count, device=embeddings.device).expand(len(embeddings), -1)
        self.sizes = self.scores = None

    def reduce(self, hidden: Float[Tensor, "B L D"], drop: int, alpha: float) -> Float[Tensor, "B M D"]:
        """Propagate and drop the `drop` image tokens of lowest score, leaving at least one."""
        drop = min(drop, self.kept.shape[1] - 1)
        if not drop:
            return hidden
        keep, gone = choose(self.scores, drop)
        prefix, image = hidden[:, : self.prefix], hidden[:, self.prefix :]
        kept, dropped, sizes = rows(image, keep), rows(image, gone), self.sizes
        if alpha:
            weight = self._edges(self.kept.gather(1, keep), self.kept.gather(1, gone))
            kept = kept + alpha * (weight.to(hidden.dtype) @ dropped)
            sizes = torch.ones_like(self.scores) if sizes is None else sizes
            sizes = sizes.gather(1, keep) + alpha * (weight @ sizes.gather(1, gone)[..., None])[..., 0]
        self.kept, self.sizes = self.kept.gather(1, keep), sizes
        return torch.cat([prefix, kept], dim=1)

    def _edges(self, keep: Int[Tensor, "B kept"], gone: Int[Tensor, "B drop"]) -> Float[Tensor, "B kept drop"]:
        """The graph's weights from dropped to kept tokens, both given as patches."""
        graph = self.graph.expand(len(keep), -1, -1)
        return rows(graph.gather(2, gone[:, None].expand(-1, graph.shape[1], -1)), keep)

    def restore(self, hidden: Float[Tensor, "B M D"]) -> Float[Tensor, "B L D"]:
        """All tokens again: each patch gets the state of the kept one nearest in the grid."""
        if self.kept.shape[1] < self.height * self.width:
            nearness = self.nearness.expand(len(hidden), -1, -1)
            source = nearness.gather(2, self.kept[:, None].expand(-1, nearness.shape[1], -1)).argmax(-1)
            hidden = torch.cat([hidden[:, : self.prefix], rows(hidden[:, self.prefix :], source)], dim=1)
        return hidden

    def end(self) -> None:
        """Give back the memory of what only the blocks needed."""
        self.graph = self.nearness = self.sizes = self.scores = None

    @property
    def bias(self) -> Float[Tensor, "B 1 1 L"] | None:
        """log s for the keys, 0 for the prefix; None while every size is 1."""
        return None if self.sizes is None else nn.functional.pad(self.sizes.log(), (self.prefix, 0))[:, None, None]
