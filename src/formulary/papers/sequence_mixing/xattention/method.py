"""XAttention: block-sparse attention for long prompts that ranks blocks by their sums along strided antidiagonals.

In every stride x stride tile of the score matrix, only one antidiagonal is computed,

    a[i, j] = 1/(stride sqrt(K)) sum_s query[stride i + stride - 1 - s] . key[stride j + s],

which is one product of reshaped queries and keys at 1/stride of the full cost. softmax over j, summed inside a block of
block_size x block_size, scores the block. Each head and query block keeps its best blocks until they hold `threshold` of the
row's score, and attention is exact within them. Decoding of single tokens stays dense.

Source: arXiv:2503.16428, section 2 and algorithm 1; there stride is 8 or 16 and block_size 128. As in the released code, the
first and the diagonal block are always kept; the paper leaves them to the score. The per-head thresholds that the paper
optionally searches by dynamic programming are left out: one threshold serves all heads of a layer.

With an even stride the sampled entries all have an odd query-key offset, so a pattern of one token's width at an even offset is
never seen. `antidiagonals=2` also samples query phase (stride - 2 - s) mod stride, whose offsets are even, and averages the two
scores, at twice the cost of scoring. This remedy is ours, not the paper's.

>>> q, k, v = torch.randn(3, 1, 2, 300, 16).unbind()
>>> attention = XAttention(block_size=64, stride=8, threshold=0.9)
>>> attention.attend(q, k, v, causal=True).shape, 0 < attention.last_density <= 1
(torch.Size([1, 2, 300, 16]), True)
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from formulary.contracts.attention import Attention
from formulary.contracts.transform import check_range
from formulary.errors import UsageError
from formulary.kernels.block_sparse import block_sparse_attention, dense_attention

CHUNK, ROWS = 1 << 26, 512
"""Sampled scores, and rows of them, computed at a time: bounds the memory of scoring (256 MB), and causal rows stop early."""


class XAttention(Attention):
    """Attention over the blocks that antidiagonal scoring selects; see the module.

    block_size, stride: in tokens; stride divides block_size. threshold: share of a row's score to keep, above 0 and up to 1
    (1 is dense attention). antidiagonals: 1 (the paper) or 2. keep_sink, keep_diagonal: always keep the first visible block, and
    the query block's own. Raises UsageError for other values. `last_density` is the share of the visible blocks that the last call
    computed (None before the first): where it is high, nothing is gained over dense attention.

    A mask hides keys from scoring as well; padding keys, and the queries at their places, have no say in the choice. The block
    grid starts at the first position, so padding on the left shifts it.
    """

    def __init__(
        self,
        block_size: int = 128,
        stride: int = 8,
        threshold: float = 0.9,
        antidiagonals: int = 1,
        keep_sink: bool = True,
        keep_diagonal: bool = True,
    ):
        super().__init__()
        check_range("xattention", "block_size", block_size, 1, 1 << 16)
        check_range("xattention", "stride", stride, 1, block_size)
        check_range("xattention", "antidiagonals", antidiagonals, 1, 2)
        if block_size % stride:
            raise UsageError(f"xattention: stride must divide block_size, got stride {stride} and block_size {block_size}")
        if not 0 < threshold <= 1:
            raise UsageError(f"xattention: threshold must be above 0 and at most 1, got {threshold}")
        self.block_size, self.stride, self.threshold = block_size, stride, threshold
        self.antidiagonals, self.keep_sink, self.keep_diagonal = antidiagonals, keep_sink, keep_diagonal
        self.lookahead = block_size - 1
        self.last_density: float | None = None

    @classmethod
    def full_budget(cls) -> dict[str, float]:
        """With threshold 1 every block is kept."""
        return {"threshold": 1.0}

    def extra_repr(self) -> str:
        return f"block_size={self.block_size}, stride={self.stride}, threshold={self.threshold}, antidiagonals={self.antidiagonals}"

    @torch.compiler.disable
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
        """Attention output; the choice of blocks is not differentiated."""
        given = {"mask": mask, "bias": bias, "scale": scale, "causal": causal}
        if self.threshold == 1 or key.shape[2] <= self.block_size:
            self.last_density = 1.0
            return dense_attention(query, key, value, **given)
        blocks, visible = self.select(query, key, **given)
        self.last_density = float(blocks.sum() / visible.expand_as(blocks).sum().clamp_min(1))
        if self.last_density == 1:
            return dense_attention(query, key, value, **given)
        return block_sparse_attention(query, key, value, blocks, self.block_size, **given)

    @torch.no_grad()
    def select(
        self,
        query: Float[Tensor, "B H L K"],
        key: Float[Tensor, "B H S K"],
        *,
        mask: Bool[Tensor, "#B #H L S"] | None = None,
        bias: Float[Tensor, "#B #H L S"] | None = None,
        scale: float | None = None,
        causal: bool = False,
    ) -> tuple[Bool[Tensor, "B H NQ NK"], Bool[Tensor, "#B #H NQ NK"]]:
        """(blocks chosen, blocks that hold any visible pair), for each block of queries and block of keys."""
        length, keys = query.shape[2], key.shape[2]
        seen = _visible(mask, bias)
        scores = antidiagonal_scores(
            query, key, self.block_size, self.stride, antidiagonals=self.antidiagonals, mask=seen, bias=bias, scale=scale, causal=causal
        )
        visible = _tiles_seen(seen, length, keys, causal, self.block_size, query.device)
        keep = torch.zeros_like(visible)
        if self.keep_sink:
            keep = keep | (visible.cumsum(-1) == 1)
        if self.keep_diagonal:
            keep = keep | _own_blocks(seen, length, keys, self.block_size, query.device)
        return choose(scores, self.threshold, keep=keep & visible) & visible, visible


def antidiagonal_scores(
    query: Float[Tensor, "B H L K"],
    key: Float[Tensor, "B H S K"],
    block_size: int,
    stride: int,
    *,
    antidiagonals: int = 1,
    mask: Bool[Tensor, "#B #H L S"] | None = None,
    bias: Float[Tensor, "#B #H L S"] | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Float[Tensor, "B H NQ NK"]:
    """The score of every block of queries and block of keys, in float32; a full row of blocks adds to block_size / stride.

    A tile takes part in the softmax if any of its pairs is visible. `bias` is sampled along the same antidiagonals.
    """
    length, keys = query.shape[2], key.shape[2]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    allowed = _tiles_seen(mask, length, keys, causal, stride, query.device)
    if mask is not None:
        real_queries, real_keys = _real(mask, length)
        query, key = (x.masked_fill(~real.unsqueeze(-1), 0) for x, real in ((query, real_queries), (key, real_keys)))
        allowed = allowed & _pool(real_queries.unsqueeze(-1), (stride, 1))
    query, key = _pad(query, block_size, 1), _pad(key, block_size, 1)
    allowed = F.pad(allowed, (0, key.shape[2] // stride - allowed.shape[3], 0, query.shape[2] // stride - allowed.shape[2]))
    phases = [query.unflatten(2, (-1, stride)).flip(3)]
    if antidiagonals == 2:
        phases.append(phases[0].roll(-1, dims=3))
    biases = [None] * len(phases) if bias is None else _sampled(_pad(bias, block_size, block_size), stride, antidiagonals)
    key = key.unflatten(2, (-1, stride)).flatten(3)
    cells = block_size // stride
    scores = [_block_scores(phase.flatten(3), key, b, allowed, scale / stride, cells) for phase, b in zip(phases, biases)]
    return sum(scores) / len(scores)


def _block_scores(query: Tensor, key: Tensor, bias: Tensor | None, allowed: Tensor, scale: float, cells: int) -> Tensor:
    """Softmax of the strided scores over the keys, summed in squares of cells x cells, some rows at a time."""
    batch, heads, tiles, _ = query.shape
    step = max(1, min(ROWS, CHUNK // (batch * heads * key.shape[2])) // cells) * cells
    scores = query.new_zeros(batch, heads, tiles // cells, key.shape[2] // cells, dtype=torch.float32)
    for start in range(0, tiles, step):
        rows = slice(start, start + step)
        used = allowed[:, :, rows].flatten(0, 2).any(0).nonzero()[:, 0]
        if not len(used):
            continue
        seen = slice(0, -(-(int(used[-1]) + 1) // cells) * cells)
        hidden = ~allowed[:, :, rows, seen]
        logits = (query[:, :, rows] @ key[:, :, seen].mT).float().mul_(scale)
        if bias is not None:
            logits += bias[:, :, rows, seen]
        weights = logits.masked_fill_(hidden, float("-inf")).softmax(-1).masked_fill_(hidden, 0)
        sums = weights.unflatten(3, (-1, cells)).sum(-1).unflatten(2, (-1, cells)).sum(3)
        scores[:, :, start // cells : (start + step) // cells, : seen.stop // cells] = sums
    return scores


def choose(
    scores: Float[Tensor, "B H NQ NK"], threshold: float, *, keep: Bool[Tensor, "*#batch NQ NK"]
) -> Bool[Tensor, "B H NQ NK"]:
    """The blocks in `keep`, then others in order of decreasing score until at least `threshold` of the row's score is chosen."""
    keep = keep.expand_as(scores)
    order = scores.masked_fill(keep, float("inf")).argsort(dim=-1, descending=True, stable=True)
    ranked = scores.gather(-1, order).double().cumsum(-1)
    before = F.pad(ranked[..., :-1], (1, 0))
    chosen = before < threshold * ranked[..., -1:]
    return torch.zeros_like(keep).scatter(-1, order, chosen) | keep


def _visible(mask: Tensor | None, bias: Tensor | None) -> Bool[Tensor, "#B #H L S"] | None:
    """The mask, with pairs that an additive mask hides (the dtype's lowest value, or -inf) taken out."""
    if bias is None:
        return mask
    shown = _shown(bias)
    if bool(shown.all()):
        return mask
    return shown if mask is None else shown & mask


def _shown(bias: Float[Tensor, "#B #H L S"]) -> Bool[Tensor, "#B #H L S"]:
    return bias > torch.finfo(bias.dtype).min / 2


def _tiles_seen(
    mask: Bool[Tensor, "#B #H L S"] | None, length: int, keys: int, causal: bool, size: int, device: torch.device
) -> Bool[Tensor, "#B #H NQ NK"]:
    """Whether any pair of a size x size tile may be seen."""
    if mask is not None:
        return _pool(mask.tril() if causal else mask, (size, size))
    seen = torch.ones(1, 1, -(-length // size), -(-keys // size), dtype=torch.bool, device=device)
    return seen.tril() if causal else seen


def _offset(mask: Bool[Tensor, "#B #H L S"] | None, length: int) -> int:
    """The key position of the first query: with a mask, queries are the last of the keys that anyone sees."""
    if mask is None or not bool(mask.any()):
        return 0
    return max(0, int(mask.any(2).nonzero()[:, -1].max()) + 1 - length)


def _real(mask: Bool[Tensor, "#B #H L S"], length: int) -> tuple[Bool[Tensor, "#B #H L"], Bool[Tensor, "#B #H S"]]:
    """Which queries and keys are no padding: a key that nobody sees is padding, and so is the query at its place."""
    real_keys = mask.any(2)
    own = real_keys[..., _offset(mask, length) :][..., :length]
    return F.pad(own, (0, length - own.shape[-1]), value=True) & mask.any(3), real_keys


def _own_blocks(mask: Tensor | None, length: int, keys: int, size: int, device: torch.device) -> Bool[Tensor, "NQ NK"]:
    """For each block of queries, the blocks of keys at the same positions."""
    first = torch.arange(0, length, size, device=device).unsqueeze(1) + _offset(mask, length)
    start = torch.arange(0, keys, size, device=device).unsqueeze(0)
    return (start < first + size) & (start + size > first)


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    """The last two axes padded with zeros to multiples."""
    return F.pad(x, (0, -x.shape[3] % columns, 0, -x.shape[2] % rows))


def _pool(seen: Bool[Tensor, "B H L S"], size: tuple[int, int]) -> Bool[Tensor, "B H NQ NK"]:
    """Whether any pair of a tile is True."""
    return _pad(seen, *size).unflatten(3, (-1, size[1])).any(-1).unflatten(2, (-1, size[0])).any(3)


def _sampled(bias: Float[Tensor, "B H L S"], stride: int, antidiagonals: int) -> list[Tensor]:
    """The mean of the bias along each tile's antidiagonal, one (B,H,L/stride,S/stride) for each that is sampled.

    Pairs that the bias hides count as 0, like those that a boolean mask hides.
    """
    tiles = bias.float().masked_fill(~_shown(bias), 0).unflatten(3, (-1, stride)).unflatten(2, (-1, stride)).transpose(3, 4)
    s = torch.arange(stride, device=bias.device)
    return [tiles[..., (stride - 1 - shift - s) % stride, s].mean(-1) for shift in range(antidiagonals)]
