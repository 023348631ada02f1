"""Whole blocks in one kernel against their plain twin, at odd sizes, on every path that this processor has."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from formulary.kernels import blocks, int4, int8, native

pytestmark = pytest.mark.skipif(not blocks.available(), reason="no native path on this processor")
PATHS = [(1, ("-mno-avx512bf16",)), *((level, ()) for level in (1, 2) if level <= int8.level())]
SIZES = [  # width, inner width, heads, groups, width of a head, norm first, gated, activation, RMSNorm
    (384, 1536, 12, 12, 32, False, False, "GELUActivation", False),
    (48, 100, 3, 1, 20, True, True, "SiLUActivation", True),
    (70, 90, 5, 5, 7, True, False, "NewGELUActivation", False),
    (64, 128, 2, 2, 64, False, False, "QuickGELUActivation", False),
    (33, 17, 1, 1, 33, True, False, "ReLU", True),
]


KINDS = [8, 32, 64, 1000]  # 8 bits, or 4 bits in groups of so many inputs


def linear(generator, inputs: int, outputs: int, kind: int, bias: bool = True) -> blocks.Linear:
    offset = 0.1 * torch.randn(outputs, generator=generator) if bias else None
    if kind > 8:
        groups = -(-inputs // kind)
        codes, zero = (torch.randint(0, 16, (outputs, n), generator=generator).to(torch.uint8) for n in (inputs, groups))
        scale = (0.05 + 0.15 * torch.rand(outputs, groups, generator=generator)).half().float()
        scale[:, 0] = 0.25  # in units of which, a power of two, the others are kept in half precision: exactly
        scale *= 2.0 ** round(-math.log2(inputs) / 2)
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs)) if kind == 64 else None
        return int4.Linear(codes, scale, zero, offset, kind, order)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    scale = weight.abs().amax(1) / 127
    return int8.Linear((weight / scale[:, None]).round().to(torch.int8), scale, offset, 2.0)


def made(size, kind: int = 8, seed: int = 0) -> tuple[blocks.Block, torch.Generator]:
    width, inner, heads, groups, each, first, gated, activation, rms = size
    g = torch.Generator().manual_seed(seed)
    norm = lambda: blocks.Norm(
        1 + 0.1 * torch.randn(width, generator=g), None if rms else 0.1 * torch.randn(width, generator=g), 1e-5
    )
    block = blocks.Block(
        linear(g, width, heads * each, kind), linear(g, width, groups * each, kind, False), linear(g, width, groups * each, kind),
        linear(g, heads * each, width, kind), linear(g, width, inner, kind), linear(g, width, inner, kind) if gated else None,
        linear(g, inner, width, kind), norm(), norm(), activation, first, heads, groups, each, each**-0.5,
    )  # fmt: skip
    return block, g


@pytest.fixture(params=PATHS, ids=str)
def path(request, monkeypatch):
    """Every path of the kernel that this processor can run: without tiles, and without bfloat16 besides."""
    level, flags = request.param
    monkeypatch.setattr(int8, "level", lambda: level)
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, *flags))
    again = lambda: (native.library.cache_clear(), blocks._library.cache_clear())
    again()
    assert blocks.available() and not (flags and blocks.in_halves())
    yield
    again()


def in_halves(query, key, value, attn_mask=None, scale=None, is_causal=False, enable_gqa=False):
    """Attention as the kernel has it in bfloat16: queries, keys, values and shares rounded, their sum not."""
    query, key, value = (x.bfloat16().float() for x in (query, key, value))
    key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = query @ key.mT * scale
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    shares = scores - scores.amax(-1, keepdim=True) if scores.numel() else scores
    shares = shares.exp()
    return shares.bfloat16().float() @ value / shares.sum(-1, keepdim=True)


def same(seen: torch.Tensor, plain: Callable[[], torch.Tensor], queries: int = 99) -> bool:
    """Equal up to what rounds the other way inside. The kernel has few queries in float32."""
    with pytest.MonkeyPatch.context() as patch:
        if blocks.in_halves() and queries > 4:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", in_halves)
        wanted = plain()
    error = (seen - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return seen.shape == wanted.shape and float(error.median()) < 1e-3 and float(error.max()) < 3e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_encoding_is_the_plain_block(size, kind, path):
    block, g = made(size, kind)
    assert blocks.fits(block)
    if size[2] != size[3]:
        return grouped(block, g)
    x, starts = torch.randn(333, size[0], generator=g), torch.tensor([0, 1, 18, 18, 146, 333])
    assert same(blocks.Stack([blocks.Native(block)]).encode(x, starts), lambda: blocks.plain_encode(block, x, starts))


def grouped(block: blocks.Block, g) -> None:
    """Heads that share keys and values: the same block with these repeated for each."""
    x, starts = torch.randn(40, 48, generator=g), torch.tensor([0, 40])
    names = ("codes", "scale", "zero", "bias")
    repeat = lambda one: one._replace(
        **{name: None if value is None else value.repeat(3, *[1] * (value.ndim - 1)) for name, value in one._asdict().items() if name in names}
    )
    wide = blocks.Block(**{**vars(block), "key": repeat(block.key), "value": repeat(block.value), "groups": 3})
    assert same(blocks.Stack([blocks.Native(block)]).encode(x, starts), lambda: blocks.plain_encode(wide, x, starts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "length", "past"), [(1, 40, 0), (1, 1, 7), (2, 1, 33), (1, 3, 70), (2, 3, 5), (2, 17, 9), (1, 100, 130)])
def test_decoding_is_the_plain_block(batch, length, past, kind, path):
    for size in (SIZES[1], (64, 70, 4, 2, 16, True, True, "SiLU", True)):
        block, g = made(size, kind)
        groups, each = size[3], size[4]
        x = torch.randn(batch, length, size[0], generator=g)
        cosine, sine = (torch.randn(batch, length, each // 2, generator=g).repeat(1, 1, 2) for _ in range(2))
        caches = [torch.randn(batch, groups, past + length + 3, each, generator=g) for _ in range(2)]
        memory = torch.stack(caches)[None]
        seen = blocks.Stack([blocks.Native(block)]).decode(x, cosine, sine, memory, past)
        assert same(seen, lambda: blocks.plain_decode(block, x, cosine, sine, *caches, past), length)
        for seen, wanted in zip(memory[0], caches):
            torch.testing.assert_close(seen, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kinds", [(8, 8, 8), (8, 32, 1000)])
@pytest.mark.parametrize("normed", [False, True])
def test_a_stack_is_its_blocks_one_after_the_other(kinds, normed):
    some = [made(SIZES[1], kind, seed)[0] for seed, kind in enumerate(kinds)]
    norm, g = some[0].norm1, torch.Generator().manual_seed(9)
    x, cosine, sine = torch.randn(2, 5, 48, generator=g), *torch.randn(2, 1, 5, 20, generator=g)
    memory = torch.randn(3, 2, 2, 1, 16, 20, generator=g)
    apart = memory.clone()
    seen = blocks.Stack([*map(blocks.Native, some)], norm).decode(x, cosine, sine, memory, 6, normed=normed)
    wanted = x
    for i, block in enumerate(some):
        wanted = blocks.Stack([blocks.Native(block)]).decode(wanted, cosine, sine, apart[i : i + 1], 6)
    assert torch.equal(memory, apart)
    torch.testing.assert_close(seen, norm(wanted) if normed else wanted, atol=1e-5, rtol=1e-5)


def test_a_stack_encodes_as_its_blocks_one_after_the_other():
    some = [blocks.Native(made(SIZES[0], kind, seed)[0]) for seed, kind in enumerate((8, 32, 8))]
    x, starts = torch.randn(1300, 384, generator=torch.Generator().manual_seed(9)), torch.tensor([0, 500, 520, 520, 1300])
    kept, wanted = x.clone(), x
    seen = blocks.Stack(some).encode(x, starts)
    for block in some:
        wanted = blocks.Stack([block]).encode(wanted, starts)
    assert torch.equal(seen, wanted) and torch.equal(x, kept)


def test_blocks_that_the_kernel_does_not_cover_are_told_apart():
    block, other = made(SIZES[1], 64)[0], made(SIZES[1], 8)[0]
    assert blocks.fits(block) and blocks.fits(other)
    turned = block.key._replace(order=block.key.order.flip(0))
    for change in (
        {"down": other.down}, {"key": turned}, {"key": block.key._replace(order=None)}, {"gate": block.gate._replace(group_size=32)}
    ):  # fmt: skip
        assert not blocks.fits(replace(block, **change))
    assert not blocks.fits(replace(other, key=other.key._replace(threshold=3.0)))


def test_room_that_is_too_small_is_refused():
    block, _ = made(SIZES[1])
    with pytest.raises(ValueError, match="room"):
        blocks.Stack([blocks.Native(block)]).decode(torch.zeros(1, 2, 48), *torch.zeros(2, 1, 2, 20), torch.zeros(1, 2, 1, 1, 4, 20), 3)


@pytest.mark.parametrize("kind", [8, 32])
def test_sequences_do_not_see_each_other_and_threads_change_nothing(kind):
    block, g = made(SIZES[0], kind)
    x, starts = torch.randn(700, 384, generator=g), torch.tensor([0, 300, 301, 700])
    stack, before, seen = blocks.Stack([blocks.Native(block)]), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            seen.append(stack.encode(x, starts))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*seen)
    poisoned = x.clone()
    poisoned[300] = float("nan")
    out = stack.encode(poisoned, starts)
    assert out[300].isnan().all() and torch.equal(out[:300], seen[0][:300]) and torch.equal(out[301:], seen[0][301:])
    for a, b in zip(starts.tolist(), starts.tolist()[1:]):
        assert same(stack.encode(x[a:b], torch.tensor([0, b - a])), lambda: seen[0][a:b])


@pytest.mark.parametrize("activation", sorted(blocks.ACTIVATIONS))
def test_activations(activation):
    """Identity everywhere but in the feed-forward, whose one inner unit of interest sweeps from -9 to 9."""
    width = 32
    eye = int8.Linear(torch.eye(width).mul(127).to(torch.int8), torch.full((width,), 1 / 127), None, 1e-9)
    none = int8.Linear(torch.zeros(width, width, dtype=torch.int8), torch.zeros(width), None, 1e-9)
    norm = blocks.Norm(torch.ones(width), None, 0.0)
    block = blocks.Block(none, none, none, none, eye, None, eye, norm, norm, activation, True, 1, 1, width, 1.0)
    x = torch.randn(200, width, generator=torch.Generator().manual_seed(0))
    seen = blocks.Stack([blocks.Native(block)]).encode(x, torch.tensor([0, 200])) - x
    wanted = blocks.ACTIVATIONS[activation][1](torch.nn.functional.rms_norm(x, (width,)))
    torch.testing.assert_close(seen, wanted, atol=5e-5, rtol=1e-5)
