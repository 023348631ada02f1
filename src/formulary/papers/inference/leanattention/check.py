"""Is tiled and merged attention exact, and how much does the busiest worker have to do under three schedules?"""

import heapq
import math
import random

import torch

from formulary.evidence import Check, all_of, at_most, exact

from .method import LeanAttention, finish, merge, partial_attention, schedule

PROBLEMS, CASES, TILE = 200, 12, 256
BUSIEST, EXCESS, ERROR = "busiest worker, times the even share", "tiles beyond the even share", "largest error"


def prepare(seed: int):
    """Decoding steps as (workers, tiles of each output): fewer outputs than workers, ragged contexts of 256 to 512k."""
    draw, problems = random.Random(seed), []
    while len(problems) < PROBLEMS:
        workers, batch, heads = draw.randint(2, 132), draw.randint(1, 8), draw.choice([1, 2, 3, 4, 8, 12, 16, 32])
        if batch * heads < workers:
            contexts = [round(2 ** draw.uniform(8, 19)) for _ in range(batch)]
            problems.append((workers, [math.ceil(n / TILE) for n in contexts for _ in range(heads)]))
    return seed, problems


def busiest(jobs, workers: int) -> int:
    """Tiles of the busiest worker when each that is free takes the longest job left (as good as any whole jobs allow,
    within a third)."""
    loads = [0] * workers
    for job in sorted(jobs, reverse=True):
        heapq.heapreplace(loads, loads[0] + job)
    return max(loads)


def relative(makespan):
    def arm(context):
        return {BUSIEST: [makespan(w, tiles) * w / sum(tiles) for w, tiles in context[1]]}

    return arm


def stream_k(workers: int, tiles: list[int]) -> int:
    runs = schedule([(0, count) for count in tiles], workers)
    return max(sum(last - first for _, first, last in run) for run in runs)


def fixed_split(workers: int, tiles: list[int]) -> int:
    """FlashDecoding: every output in equally many splits, the number of 1 to 16 that is best for this very step."""
    cut = lambda count, splits: [len(range(i, count, splits)) for i in range(splits)]
    return min(busiest([n for c in tiles for n in cut(c, splits)], workers) for splits in range(1, 17))


def lean(context):
    found = relative(stream_k)(context)
    return found | {EXCESS: [stream_k(w, tiles) - sum(tiles) / w for w, tiles in context[1]]}


def errors(context):
    """The largest difference from softmax in float64: of the attention, and of tiles merged in random order."""
    generator, found = torch.Generator().manual_seed(context[0]), []
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))
    for _ in range(CASES):
        batch, heads, keys = draw(1, 4), draw(1, 4), draw(1, 3000)
        query, key, value = (torch.randn(batch, heads, n, 64, generator=generator) for n in (1, keys, keys))
        lengths = torch.randint(1, keys + 1, (batch,), generator=generator)
        mask = (torch.arange(keys) < lengths[:, None])[:, None, None]
        scores = 3 * (query.double() @ key.double().mT) / 8
        expected = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value.double()
        method = LeanAttention(tile=draw(1, 400), workers=draw(1, 9))
        tiled = method.attend(query, key, value, mask=mask, scale=3 / 8)
        n, splits = int(lengths[0]), draw(1, 20)
        ends = sorted({0, n, *(draw(0, n + 1) for _ in range(splits))})
        parts = [
            partial_attention(3 / 8 * query[0, 0] @ key[0, 0, a:b].mT, value[0, 0, a:b]) for a, b in zip(ends, ends[1:])
        ]
        order = torch.randperm(len(parts), generator=generator).tolist()
        whole = parts[order[0]]
        for i in order[1:]:
            whole = merge(whole, parts[i])
        apart = (finish(whole) - expected[0, 0]).abs().max()
        found.append(max(float((tiled - expected).abs().max()), float(apart)))
    return {ERROR: found}


check = Check(
    claim="Tiled attention merged in any order equals softmax attention to 1e-5. With fewer outputs than workers the "
    "busiest worker of stream-K has at most one tile more than an even share, on average at most 1/1.5 of what one "
    "worker per head has, and less than with the best equal splits of all heads.",
    setup=prepare,
    arms={
        "lean": lean,
        "one per head": relative(lambda workers, tiles: busiest(tiles, workers)),
        "fixed split": relative(fixed_split),
        "exactness": errors,
    },
    holds=all_of(
        exact("lean", tol=1.0, metric=EXCESS),
        at_most("lean", "one per head", ratio=1 / 1.5, metric=BUSIEST),
        at_most("lean", "fixed split", metric=BUSIEST),
        exact("exactness", tol=1e-5, metric=ERROR),
    ),
    items="fresh",
    redraws="workers, heads, ragged contexts, splits and numbers",
    seeds=8,
    version=1,
    scope="tiles counted in the schedules, not times, since the house times one thread; merging counts nothing",
)
