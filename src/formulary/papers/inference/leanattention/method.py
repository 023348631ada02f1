"""LeanAttention: exact attention of a few queries to a long context, in tiles that are dealt out evenly to workers.

    a tile:    m = max(q k'), l = sum exp(q k' - m), o = sum exp(q k' - m) v          of any stretch of keys
    merge:     m = max(m1, m2), l = l1 e^(m1 - m) + l2 e^(m2 - m), o likewise; associative and commutative
    schedule:  the tiles of all (sequence, head) outputs in one line; each of G workers takes a stretch of total/G of
               them, across the ends of outputs; an output is o / l of its merged parts                       (stream-K)

Source: arXiv:2405.10480, section 4; tiles of 256 keys for heads of 64. One worker per head (FlashAttention-2) and equal
splits of each head (FlashDecoding) are other schedules of the same tiles. Query (B,H,L,K), key (B,H,S,K) and value
(B,H,S,V) in, (B,H,L,V) out, computed in float32 at least. Contexts of a batch may be ragged: keys before the first and
after the last that a sequence may see make no tiles.

Settled here: a worker takes its tiles of one output as one product, as the associative merge allows; parts are merged
in the order of the keys, so the result does not depend on which worker ends first. Workers are threads that run one
thread's PyTorch each; where gradients are recorded, the same schedule runs in the caller's thread. Prompts, more than
`few` queries, go to PyTorch's own attention, as the method is made for decoding; single tokens come here.

>>> query, key, value = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1000, 16), torch.randn(1, 2, 1000, 16)
>>> out = LeanAttention(tile=64, workers=3).attend(query, key, value)
>>> bool(torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(query, key, value), atol=1e-5))
True
>>> [sum(last - first for _, first, last in run) for run in schedule([(0, 4), (0, 7)], workers=3)]
[4, 4, 3]
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from jaxtyping import Bool, Float
from threadpoolctl import threadpool_limits
from torch import Tensor

from formulary.contracts.attention import Attention
from formulary.contracts.transform import check_range
from formulary.kernels.block_sparse import dense_attention

Part = tuple[Float[Tensor, "L"], Float[Tensor, "L"], Float[Tensor, "L V"]]
Run = list[tuple[int, int, int]]


# ---------------------------------------------------------------- softmax as a reduction


def partial_attention(scores: Float[Tensor, "L n"], value: Float[Tensor, "n V"]) -> Part:
    """(m, l, o) of a stretch of keys; where a query sees none of them m is -inf, and l and o are 0."""
    largest = scores.amax(-1)
    weights = (scores - largest.nan_to_num(neginf=0.0)[:, None]).exp()
    return largest, weights.sum(-1), weights @ value


def merge(one: Part, two: Part) -> Part:
    """(m, l, o) of two stretches of keys together."""
    largest = torch.maximum(one[0], two[0])
    finite = largest.nan_to_num(neginf=0.0)
    first, second = (one[0] - finite).exp(), (two[0] - finite).exp()
    total = one[1] * first + two[1] * second
    return largest, total, one[2] * first[:, None] + two[2] * second[:, None]


def finish(part: Part) -> Float[Tensor, "L V"]:
    """o / l, and 0 for a query that saw no key."""
    _, total, out = part
    return torch.where(total[:, None] > 0, out / total.clamp_min(torch.finfo(total.dtype).tiny)[:, None], 0)


# ---------------------------------------------------------------- who computes what


def schedule(ranges: Sequence[tuple[int, int]], workers: int) -> list[Run]:
    """Stream-K: for each worker its tiles as (output, first, last) stretches, one tile more or less than the others.

    `ranges[i]` is the first tile of output i and the one after its last.
    """
    total = sum(last - first for first, last in ranges)
    sizes = [total // workers + (w < total % workers) for w in range(workers)]
    runs, output, tile = [], 0, ranges[0][0] if ranges else 0
    for size in sizes:
        run: Run = []
        while size:
            left = ranges[output][1] - tile
            if not left:
                output, tile = output + 1, ranges[output + 1][0]
                continue
            taken = min(left, size)
            run.append((output, tile, tile + taken))
            tile, size = tile + taken, size - taken
        runs.append(run)
    return runs


def tile_ranges(
    seen: Bool[Tensor, "B S"] | None, batch: int, heads: int, keys: int, tile: int
) -> list[tuple[int, int]]:
    """For every (sequence, head), its tiles from the first key that any of its queries may see to the last."""
    whole = (0, -(-keys // tile))
    if seen is None:
        return [whole] * (batch * heads)
    ranges = []
    for row in seen:
        places = row.nonzero()[:, 0]
        ends = (int(places[0]) // tile, int(places[-1]) // tile + 1) if len(places) else (0, 0)
        ranges += [ends] * heads
    return ranges


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """Threads that each run PyTorch on one thread."""

    def alone():
        torch.get_num_threads()  # PyTorch sets a new thread's number at its first question, and would undo the limit
        threadpool_limits(1, user_api="openmp")

    return ThreadPoolExecutor(workers, thread_name_prefix="lean", initializer=alone)


def run_all(work: Callable[[Run], list], runs: list[Run], threads: bool) -> list[list]:
    """`work` of every run, in order; in threads of their own if `threads`."""
    if not threads:
        return [work(run) for run in runs]
    inference = torch.is_inference_mode_enabled()

    def without_gradients(run: Run) -> list:
        with torch.inference_mode(inference), torch.no_grad():
            return work(run)

    return list(_pool(len(runs)).map(without_gradients, runs))


# ---------------------------------------------------------------- the attention


class LeanAttention(Attention):
    """Decode attention over tiles dealt out to workers; see the module.

    tile: keys in a tile. workers: G; 0 for as many as PyTorch has threads. few: the most queries that are not a prompt.
    Raises UsageError for values out of range. `last_tiles` is how many tiles each worker had in the last call.
    """

    def __init__(self, tile: int = 256, workers: int = 0, few: int = 16):
        super().__init__()
        check_range("leanattention", "tile", tile, 1, 1 << 24)
        check_range("leanattention", "workers", workers, 0, 1024)
        check_range("leanattention", "few", few, 1, 4096)
        self.tile, self.workers, self.few = tile, workers, few
        self.last_tiles: list[int] | None = None
        self.equals_sdpa = False  # of an instance: the adapter would decode single tokens with PyTorch's own attention

    @classmethod
    def full_budget(cls) -> dict[str, int]:
        """It is exact always."""
        return {}

    def extra_repr(self) -> str:
        return f"tile={self.tile}, workers={self.workers}, few={self.few}"

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
        batch, heads, length, width = query.shape
        if length > self.few:
            return dense_attention(query, key, value, mask=mask, bias=bias, scale=scale, causal=causal)
        keys = key.shape[2]
        if causal:
            below = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril()[None, None]
            mask = below if mask is None else mask & below
        seen = None if mask is None else mask.any(2).any(1).expand(batch, -1)
        wide = torch.promote_types(query.dtype, torch.float32)
        asked = query.to(wide) * (width**-0.5 if scale is None else scale)
        mask, bias = (None if x is None else x.expand(batch, heads, -1, -1) for x in (mask, bias))

        def part_of(output: int, first: int, last: int) -> Part:
            b, h = divmod(output, heads)
            here = slice(first * self.tile, min(last * self.tile, keys))
            scores = asked[b, h] @ key[b, h, here].to(wide).mT
            scores = scores if bias is None else scores + bias[b, h, :, here]
            scores = scores if mask is None else scores.masked_fill(~mask[b, h, :, here], -torch.inf)
            return partial_attention(scores, value[b, h, here].to(wide))

        runs = schedule(tile_ranges(seen, batch, heads, keys, self.tile), self.workers or torch.get_num_threads())
        self.last_tiles = [sum(last - first for _, first, last in run) for run in runs]
        runs = [run for run in runs if run]
        recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        found = run_all(lambda run: [part_of(*stretch) for stretch in run], runs, len(runs) > 1 and not recorded)
        outputs: list[Part | None] = [None] * (batch * heads)
        for run, made in zip(runs, found):
            for (output, _, _), part in zip(run, made):
                outputs[output] = part if outputs[output] is None else merge(outputs[output], part)
        nothing = asked.new_zeros(length, value.shape[-1])
        rows = [nothing if part is None else finish(part) for part in outputs]
        return torch.stack(rows).view(batch, heads, length, -1).to(value.dtype)
