"""Whole blocks in one kernel against their plain twin, at odd sizes, on every path that this processor has."""

import pytest
import torch

from formulary.kernels import blocks, int8

pytestmark = pytest.mark.skipif(not blocks.available(), reason="no native path on this processor")
LEVELS = [level for level in (1, 2) if level <= int8.level()]
SIZES = [  # width, inner width, heads, groups, width of a head, norm first, gated, activation, RMSNorm
    (384, 1536, 12, 12, 32, False, False, "GELUActivation", False),
    (48, 100, 3, 1, 20, True, True, "SiLUActivation", True),
    (70, 90, 5, 5, 7, True, False, "NewGELUActivation", False),
    (64, 128, 2, 2, 64, False, False, "QuickGELUActivation", False),
    (33, 17, 1, 1, 33, True, False, "ReLU", True),
]


def linear(generator, inputs: int, outputs: int, bias: bool = True) -> int8.Linear:
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    scale = weight.abs().amax(1) / 127
    offset = 0.1 * torch.randn(outputs, generator=generator) if bias else None
    return int8.Linear((weight / scale[:, None]).round().to(torch.int8), scale, offset, 2.0)


def made(size, seed: int = 0) -> tuple[blocks.Block, torch.Generator]:
    width, inner, heads, groups, each, first, gated, activation, rms = size
    g = torch.Generator().manual_seed(seed)
    norm = lambda: blocks.Norm(
        1 + 0.1 * torch.randn(width, generator=g), None if rms else 0.1 * torch.randn(width, generator=g), 1e-5
    )
    block = blocks.Block(
        linear(g, width, heads * each), linear(g, width, groups * each, False), linear(g, width, groups * each),
        linear(g, heads * each, width), linear(g, width, inner), linear(g, width, inner) if gated else None,
        linear(g, inner, width), norm(), norm(), activation, first, heads, groups, each, each**-0.5,
    )  # fmt: skip
    return block, g


def same(seen: torch.Tensor, wanted: torch.Tensor, level: int) -> bool:
    """Equal up to what rounds the other way inside; attention on tiles is in bfloat16 besides."""
    error = (seen - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return seen.shape == wanted.shape and float(error.median()) < (1e-3, 1e-2)[level - 1] and float(error.max()) < 3e-2


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_encoding_is_the_plain_block(size, level, monkeypatch):
    monkeypatch.setattr(int8, "level", lambda: level)
    block, g = made(size)
    if size[2] != size[3]:
        seen, wanted = grouped(block, g)
    else:
        x, starts = torch.randn(333, size[0], generator=g), torch.tensor([0, 1, 18, 18, 146, 333])
        seen, wanted = blocks.Native(block).encode(x, starts), blocks.plain_encode(block, x, starts)
    assert same(seen, wanted, level)


def grouped(block: blocks.Block, g) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads that share keys and values: the same block with these repeated for each."""
    x, starts = torch.randn(40, 48, generator=g), torch.tensor([0, 40])
    repeat = lambda one: one._replace(
        **{name: None if value is None else value.repeat(3, *[1] * (value.ndim - 1)) for name, value in one._asdict().items() if name != "threshold"}
    )
    wide = blocks.Block(**{**vars(block), "key": repeat(block.key), "value": repeat(block.value), "groups": 3})
    return blocks.Native(block).encode(x, starts), blocks.plain_encode(wide, x, starts)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("batch", "length", "past"), [(1, 40, 0), (1, 1, 7), (2, 3, 5), (2, 17, 9), (1, 100, 130)])
def test_decoding_is_the_plain_block(batch, length, past, level, monkeypatch):
    monkeypatch.setattr(int8, "level", lambda: level)
    for size in (SIZES[1], (64, 70, 4, 2, 16, True, True, "SiLU", True)):
        block, g = made(size)
        groups, each = size[3], size[4]
        x = torch.randn(batch, length, size[0], generator=g)
        cosine, sine = (torch.randn(batch, length, each // 2, generator=g).repeat(1, 1, 2) for _ in range(2))
        caches = [torch.randn(batch, groups, past + length + 3, each, generator=g) for _ in range(2)]
        plain = [cache.clone() for cache in caches]
        native = blocks.Native(block)
        assert same(native.decode(x, cosine, sine, *caches, past), blocks.plain_decode(block, x, cosine, sine, *plain, past), level)
        for seen, wanted in zip(caches, plain):
            torch.testing.assert_close(seen, wanted, atol=1e-4, rtol=1e-4)


def test_room_that_is_too_small_is_refused():
    block, _ = made(SIZES[1])
    cache = torch.zeros(1, 1, 4, 20)
    with pytest.raises(ValueError, match="room"):
        blocks.Native(block).decode(torch.zeros(1, 2, 48), *torch.zeros(2, 1, 2, 20), cache, cache, 3)


def test_sequences_do_not_see_each_other_and_threads_change_nothing():
    block, g = made(SIZES[0])
    x, starts = torch.randn(700, 384, generator=g), torch.tensor([0, 300, 301, 700])
    native, before, seen = blocks.Native(block), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            seen.append(native.encode(x, starts))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*seen)
    poisoned = x.clone()
    poisoned[300] = float("nan")
    out = native.encode(poisoned, starts)
    assert out[300].isnan().all() and torch.equal(out[:300], seen[0][:300]) and torch.equal(out[301:], seen[0][301:])
    for a, b in zip(starts.tolist(), starts.tolist()[1:]):
        assert same(native.encode(x[a:b], torch.tensor([0, b - a])), seen[0][a:b], int8.level())


@pytest.mark.parametrize("activation", sorted(blocks.ACTIVATIONS))
def test_activations(activation):
    """Identity everywhere but in the feed-forward, whose one inner unit of interest sweeps from -9 to 9."""
    width = 32
    eye = int8.Linear(torch.eye(width).mul(127).to(torch.int8), torch.full((width,), 1 / 127), None, 1e-9)
    none = int8.Linear(torch.zeros(width, width, dtype=torch.int8), torch.zeros(width), None, 1e-9)
    norm = blocks.Norm(torch.ones(width), None, 0.0)
    block = blocks.Block(none, none, none, none, eye, None, eye, norm, norm, activation, True, 1, 1, width, 1.0)
    x = torch.randn(200, width, generator=torch.Generator().manual_seed(0))
    seen = blocks.Native(block).encode(x, torch.tensor([0, 200])) - x
    wanted = blocks.ACTIVATIONS[activation][1](torch.nn.functional.rms_norm(x, (width,)))
    torch.testing.assert_close(seen, wanted, atol=5e-5, rtol=1e-5)
