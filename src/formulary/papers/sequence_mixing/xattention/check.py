"""Which blocks hold the attention: antidiagonal scores against mean-pooled and random ones at 25 % density.

Planted heads (L=2048, K=64): a slash like RoPE's, some tokens wide, and three verticals over a slowly drifting topic; and, to see
what an even stride is blind to, a slash one token wide at an even offset, alone in white noise, where only its own mass is counted.
Real heads: queries and keys of every third layer of SmolLM2 on 1,024 tokens of the King James Bible. Every arm keeps the first and
the diagonal block and then its own best.

Version 1 had white noise in place of the topic, which mean pooling averages away: it reached the exact choice, so nothing could be
better by 10 points. Versions 1 and 2 spaced the slash's frequencies evenly, which repeats it every few dozen tokens, and put
verticals or a topic beside the slash at the even offset, which any score finds. Version 4 has 48 heads at the even offset in place of
8. Versions 2 to 4 had loosened the blind prediction, from below random to within 5 points of random, after results had been seen;
version 5 restores it. All thresholds are those of version 1.
"""

from functools import cache

import torch

from formulary import lab
from formulary.contracts import parts
from formulary.contracts.attention import Attention
from formulary.evidence import Check, Outcome, all_of, at_least, at_most
from formulary.kernels.block_sparse import dense_attention
from formulary.papers.sequence_mixing.xattention.method import XAttention, antidiagonal_scores

BLOCK, STRIDE, DENSITY, LENGTH = 32, 4, 0.25, 2048
MEDIUM, EVEN = "mass with a medium slash", "slash mass at an even offset"
REAL, ERROR = "mass in SmolLM2", "relative output error"


class Recorder(Attention):
    """Dense attention that keeps its queries, keys and values."""

    def attend(self, query, key, value, *, mask=None, bias=None, scale=None, causal=False):
        self.seen = query, key, value
        return dense_attention(query, key, value, mask=mask, bias=bias, scale=scale, causal=causal)


@cache
def _smollm2():
    model, tokenizer = lab.smollm2()
    layers = [Recorder.attach(model, part.name) for part in parts.mixers(model)[::3]]
    ids = tokenizer(" ".join(lab.kjv(split="test")), return_tensors="pt", verbose=False)["input_ids"][0]
    return model, [layer.formulary_attention for layer in layers], ids


def planted(seed: int, top_frequency: float, parity: int, heads: int, alone: bool = False):
    """(1, heads, LENGTH, 64) queries and keys, and the slash's offsets: its logit is 9, its width pi / top_frequency tokens.

    The verticals' logit is 5; the topic adds logits of deviation 0.85 that drift over some 64 tokens. `alone` leaves the
    verticals out and makes the noise white.
    """
    g = torch.Generator().manual_seed(seed)
    frequencies = top_frequency * torch.rand(heads, 1, 28, generator=g)
    offset = 2 * torch.randint(150, 600, (heads, 1), generator=g) + parity
    places = torch.arange(LENGTH).expand(heads, -1)
    query, key = (torch.cat([_rotary(frequencies, at), _noise(g, heads, not alone)], -1) for at in (places, places + offset))
    verticals = torch.rand(heads, LENGTH, generator=g).argsort(1)[:, :3]
    query[..., -1], key[..., -1] = 1.0, torch.zeros(heads, LENGTH).scatter_(1, verticals, 0.0 if alone else 5 * 28 / 9)
    return (query * 64**0.5 * 9 / 28).unsqueeze(0), key.unsqueeze(0), offset[:, 0].tolist()


def _rotary(frequencies, places):
    angle = frequencies * places.unsqueeze(-1)
    return torch.cat([angle.cos(), angle.sin()], -1)


def _noise(g, heads: int, slow: bool):
    """(heads, LENGTH, 8) of deviation 1, white or smoothed over some 64 tokens."""
    window = torch.exp(-0.5 * (torch.arange(-96, 97) / 32) ** 2) if slow else (torch.arange(-96, 97) == 0).float()
    noise = torch.randn(heads * 8, 1, LENGTH + 192, generator=g)
    return torch.nn.functional.conv1d(noise, (window / window.norm()).view(1, 1, -1)).view(heads, 8, LENGTH).mT


def setup(seed: int):
    model, layers, ids = _smollm2()
    start = int(torch.randint(len(ids) - 1024, (1,), generator=torch.Generator().manual_seed(seed)))
    with torch.no_grad():
        model(input_ids=ids[None, start : start + 1024], use_cache=False, logits_to_keep=1)
    *medium, _ = planted(seed, torch.pi / 3, 1, heads=8)
    *even, offsets = planted(seed, torch.pi, 0, heads=48, alone=True)
    heads = {MEDIUM: [medium], EVEN: [even], REAL: [layer.seen[:2] for layer in layers]}
    masses = {case: [mass(query, key) for query, key in pairs] for case, pairs in heads.items()}
    masses[EVEN] = [mass(*even, offsets)]
    return {"heads": heads, "masses": masses, "layers": [layer.seen for layer in layers]}


def mass(query, key, offsets=None):
    """(H, NQ, NK): the share of each query block's attention that falls into each key block; of the slash alone, given its offsets."""
    distance = torch.arange(query.shape[2]).unsqueeze(1) - torch.arange(query.shape[2])
    blocks = []
    for head, (q, k) in enumerate(zip(query[0], key[0])):
        weights = (q @ k.T / q.shape[1] ** 0.5).masked_fill_(distance < 0, -torch.inf).softmax(-1)
        if offsets:
            weights = weights * (distance == offsets[head])
        block = weights.unflatten(1, (-1, BLOCK)).sum(-1).unflatten(0, (-1, BLOCK)).mean(1)
        blocks.append(block * len(block) / block.sum())
    return torch.stack(blocks)


def mean_pooled(query, key, true):
    """The usual block score: the attention of mean queries to mean keys."""
    q, k = (x[0].unflatten(1, (-1, BLOCK)).mean(2) for x in (query, key))
    visible = torch.ones_like(true[0], dtype=torch.bool).tril()
    return (q @ k.mT / query.shape[3] ** 0.5).masked_fill(~visible, -torch.inf).softmax(-1)


def captured(score):
    """An arm: the mass in the best quarter of each row's blocks, one outcome a planted head or a layer of SmolLM2."""

    def arm(context):
        values = {}
        for case, pairs in context["heads"].items():
            shares = [_captured(score(q, k, true), true) for (q, k), true in zip(pairs, context["masses"][case])]
            values[case] = shares[0].tolist() if case != REAL else [float(share.mean()) for share in shares]
        return Outcome(values, budget={"density": DENSITY})

    return arm


def _captured(scores, true):
    row = torch.arange(1, true.shape[1] + 1)
    count = (DENSITY * row).ceil().clamp_min(2)
    visible = torch.ones_like(true[0], dtype=torch.bool).tril()
    forced = torch.eye(len(row), dtype=torch.bool)
    forced[:, 0] = True
    rank = scores.masked_fill(~visible, -torch.inf).masked_fill(forced, torch.inf).argsort(-1, descending=True).argsort(-1)
    return (true * ((rank < count[:, None]) & visible)).sum(-1).mean(-1)


def output_error(context):
    """XAttention whole, at its threshold of 0.9: the error of each layer's attention output relative to dense attention."""
    method, errors, densities = XAttention(block_size=BLOCK, stride=STRIDE, threshold=0.9), [], []
    for query, key, value in context["layers"]:
        exact = dense_attention(query, key, value, causal=True)
        errors.append(float((method.attend(query, key, value, causal=True) - exact).norm() / exact.norm()))
        densities.append(method.last_density)
    return {ERROR: errors, "density": densities}


def antidiagonal(count):
    return captured(lambda q, k, true: antidiagonal_scores(q, k, BLOCK, STRIDE, causal=True, antidiagonals=count)[0])


check = Check(
    claim="At 25 % density, blocks chosen by antidiagonal sums hold at least 10 points more attention than by mean pooling on slashes "
    "some tokens wide, and more on SmolLM2's heads; of one-token slashes at even offsets they hold less than random "
    "blocks, and a second antidiagonal adds 10 points; at threshold 0.9 the attention's output changes by less than 10 %.",
    setup=setup,
    arms={
        "antidiagonal": antidiagonal(1),
        "two antidiagonals": antidiagonal(2),
        "mean-pooled": captured(mean_pooled),
        "random": captured(lambda q, k, true: torch.rand_like(true)),
        "exact mass": captured(lambda q, k, true: true),
        "xattention": output_error,
    },
    holds=all_of(
        at_least("antidiagonal", "mean-pooled", plus=0.10, metric=MEDIUM, oracle="exact mass"),
        at_least("antidiagonal", "mean-pooled", metric=REAL, oracle="exact mass"),
        at_most("antidiagonal", "random", metric=EVEN),
        at_least("two antidiagonals", "antidiagonal", plus=0.10, metric=EVEN, oracle="exact mass"),
        at_most("xattention", 0.10, effect=0.02, metric=ERROR),
    ),
    items="fresh",
    redraws="planted heads and the passage of text",
    seeds=6,
    version=5,
    scope="planted heads, and the attention of SmolLM2-135M on one book of English",
)
