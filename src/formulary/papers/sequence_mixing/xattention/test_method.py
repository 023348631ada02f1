import copy
import math

import pytest
import torch
from torch.nn import functional as F

from formulary.contracts import edits, parts
from formulary.errors import UsageError
from formulary.kernels.block_sparse import block_sparse_attention, dense_block_attention
from formulary.lab.small import inputs_for, tiny
from formulary.papers.sequence_mixing.xattention import XAttention
from formulary.papers.sequence_mixing.xattention.method import antidiagonal_scores, choose


def qkv(length=100, keys=None, batch=2, heads=3, width=16, sharpness=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, n, width) for n in (length, keys or length, keys or length)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return sharpness * query, key, value


def brute_force_scores(query, key, block, stride, causal, second=False, bias=None):
    """Block scores from the whole score matrix, one tile at a time."""
    length, keys, width = query.shape[0], key.shape[0], query.shape[1]
    full = torch.zeros(math.ceil(length / block) * block, math.ceil(keys / block) * block)
    full[:length, :keys] = query @ key.T / math.sqrt(width)
    if bias is not None:
        full[:length, :keys] += bias
    rows, columns = len(full) // stride, full.shape[1] // stride
    tiles = torch.full((rows, columns), -torch.inf)
    for i in range(math.ceil(length / stride)):
        for j in range(math.ceil(keys / stride)):
            if causal and j > i:
                continue
            tile = full[stride * i : stride * (i + 1), stride * j : stride * (j + 1)]
            phase = [(stride - 1 - second - s) % stride for s in range(stride)]
            tiles[i, j] = sum(tile[phase[s], s] for s in range(stride)) / stride
    weights = tiles[: math.ceil(length / stride)].softmax(-1)
    scores = torch.zeros(math.ceil(length / block), math.ceil(keys / block))
    for i, j in torch.cartesian_prod(torch.arange(len(weights)), torch.arange(columns)).tolist():
        scores[i * stride // block, j * stride // block] += weights[i, j]
    return scores


@pytest.mark.parametrize("length, stride, causal", [(64, 4, True), (63, 4, False), (100, 8, True), (45, 3, True)])
def test_scores_are_antidiagonal_sums_of_the_full_matrix(length, stride, causal):
    query, key, _ = qkv(length)
    block = 4 * stride
    one = antidiagonal_scores(query, key, block, stride, causal=causal)
    both = antidiagonal_scores(query, key, block, stride, causal=causal, antidiagonals=2)
    for b, h in ((0, 0), (1, 2)):
        first = brute_force_scores(query[b, h], key[b, h], block, stride, causal)
        second = brute_force_scores(query[b, h], key[b, h], block, stride, causal, second=True)
        assert torch.allclose(one[b, h], first, atol=1e-4)
        assert torch.allclose(both[b, h], (first + second) / 2, atol=1e-4)


def test_a_bias_is_sampled_along_the_same_antidiagonals():
    query, key, _ = qkv(50)
    bias = torch.randn(1, 3, 50, 50)
    for antidiagonals in (1, 2):
        scores = antidiagonal_scores(query, key, 16, 4, bias=bias, antidiagonals=antidiagonals)
        expected = [brute_force_scores(query[1, 2], key[1, 2], 16, 4, False, second, bias[0, 2]) for second in range(antidiagonals)]
        assert torch.allclose(scores[1, 2], sum(expected) / antidiagonals, atol=1e-4)


def test_scoring_in_pieces_is_scoring_at_once(monkeypatch):
    query, key, _ = qkv(150)
    whole = antidiagonal_scores(query, key, 16, 4, causal=True)
    monkeypatch.setattr("formulary.papers.sequence_mixing.xattention.method.CHUNK", 1)
    assert torch.allclose(antidiagonal_scores(query, key, 16, 4, causal=True), whole, atol=1e-6)


def brute_force_choice(scores, threshold, keep):
    chosen = {j for j in range(len(scores)) if keep[j]}
    for j in sorted(set(range(len(scores))) - chosen, key=lambda j: -scores[j]):
        if sum(scores[c] for c in chosen) >= threshold * sum(scores):
            break
        chosen.add(j)
    return [j in chosen for j in range(len(scores))]


def test_choice_adds_blocks_until_the_threshold():
    scores = torch.rand(1, 2, 6, 9, generator=torch.Generator().manual_seed(0)) ** 4
    keep = torch.zeros(6, 9, dtype=torch.bool)
    keep[:, 0] = keep[2, 5] = True
    for threshold in (0.1, 0.5, 0.9, 0.999):
        chosen = choose(scores, threshold, keep=keep)
        for h in range(2):
            for i in range(6):
                expected = brute_force_choice(scores[0, h, i].double().tolist(), threshold, keep[i].tolist())
                assert chosen[0, h, i].tolist() == expected


@pytest.mark.parametrize("length", [63, 100, 500])
@pytest.mark.parametrize("case", ["causal", "full", "mask", "bias", "mask and bias", "causal and bias", "more keys"])
def test_sparse_equals_its_plain_twin_forward_and_backward(length, case):
    keys = length + 37 if case == "more keys" else length
    query, key, value = qkv(length, keys)
    generator = torch.Generator().manual_seed(1)
    blocks = torch.rand(2, 3, math.ceil(length / 32), math.ceil(keys / 32), generator=generator) < 0.4
    given = {"causal": "causal" in case}
    if "mask" in case or case == "more keys":
        given["mask"] = torch.rand(2, 1, length, keys, generator=generator) < 0.5
    if "bias" in case:
        given["bias"] = torch.randn(1, 3, length, keys, generator=generator)
    results = []
    for attend in (block_sparse_attention, dense_block_attention):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        if "bias" in given:
            leaves.append(given["bias"].clone().requires_grad_())
        out = attend(*leaves[:3], blocks, 32, **given | ({"bias": leaves[3]} if len(leaves) == 4 else {}))
        out.sin().sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    for sparse, dense in zip(*results):
        assert torch.isfinite(sparse).all() and torch.allclose(sparse, dense, atol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_attend_computes_the_selected_blocks(causal):
    query, key, value = qkv(203)
    attention = XAttention(block_size=32, stride=8, threshold=0.5)
    blocks, visible = attention.select(query, key, causal=causal)
    out = attention.attend(query, key, value, causal=causal)
    assert torch.allclose(out, dense_block_attention(query, key, value, blocks, 32, causal=causal), atol=1e-5)
    assert attention.last_density == pytest.approx(int(blocks.sum()) / (6 * int(visible.sum())))
    assert attention.last_density < 0.9 and blocks[..., 0].all() and blocks.diagonal(dim1=2, dim2=3).all()


def test_the_full_budget_and_short_sequences_are_sdpa():
    query, key, value = qkv(100)
    for attention in (XAttention(block_size=16, **XAttention.full_budget()), XAttention(threshold=0.1)):
        assert torch.equal(attention.attend(query, key, value, causal=True), F.scaled_dot_product_attention(query, key, value, is_causal=True))
        assert attention.last_density == 1


@pytest.mark.parametrize("antidiagonals", [1, 2])
def test_no_weight_on_later_keys_and_no_look_beyond_the_own_block(antidiagonals):
    query, key, value = qkv(100)
    attention = XAttention(block_size=16, stride=4, threshold=0.5, antidiagonals=antidiagonals)
    out = attention.attend(query, key, value, causal=True)
    moved = attention.attend(query, key, torch.cat([value[:, :, :37], value[:, :, 37:] + 9], dim=2), causal=True)
    assert torch.equal(out[:, :, :37], moved[:, :, :37])
    assert attention.lookahead == 15
    for x in (query, key, value):
        x[:, :, 48:] = 7.0
    assert torch.allclose(out[:, :, :48], attention.attend(query, key, value, causal=True)[:, :, :48], atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_gets_no_weight_and_no_say(side, causal):
    query, key, value = qkv(100)
    real = torch.zeros(100, dtype=torch.bool)
    real[slice(21, 100) if side == "left" else slice(0, 79)] = True
    mask = real.expand(2, 1, 100, 100).clone()
    mask[1] = True
    mask = mask.tril() if causal else mask
    attention = XAttention(block_size=16, stride=4, threshold=0.5)
    out = attention.attend(query, key, value, mask=mask)
    density = attention.last_density
    for x in (query, key, value):
        x[0, :, ~real] = 1000.0
    again = attention.attend(query, key, value, mask=mask)
    assert torch.isfinite(again).all() and density == attention.last_density < 1
    assert torch.equal(out[0, :, real], again[0, :, real]) and torch.equal(out[1], again[1])


def test_right_padding_is_as_if_absent():
    query, key, value = qkv(75, batch=1)
    attention = XAttention(block_size=16, stride=4, threshold=0.5)
    out = attention.attend(query, key, value, causal=True)
    more = [torch.cat([x, torch.randn(1, 3, 26, 16)], dim=2) for x in (query, key, value)]
    mask = (torch.arange(101) < 75).expand(1, 1, 101, 101).tril()
    assert torch.allclose(attention.attend(*more, mask=mask)[:, :, :75], out, atol=1e-5)


def test_a_prompt_continued_on_a_cache_chooses_as_the_whole_prompt():
    query, key, value = qkv(128)
    attention = XAttention(block_size=16, stride=4, threshold=0.5)
    whole = attention.attend(query, key, value, causal=True)
    mask = torch.ones(128, 128, dtype=torch.bool).tril()[64:].expand(1, 1, 64, 128)
    assert torch.allclose(attention.attend(query[:, :, 64:], key, value, mask=mask), whole[:, :, 64:], atol=1e-5)


def test_additive_masks_hide_as_boolean_ones_do():
    query, key, value = qkv(100)
    mask = torch.ones(100, 100, dtype=torch.bool).tril()[None, None]
    attention = XAttention(block_size=16, stride=4, threshold=0.5)
    out = attention.attend(query, key, value, mask=mask)
    for lowest in (float("-inf"), torch.finfo(torch.float32).min):
        bias = torch.zeros(1, 1, 100, 100).masked_fill(~mask, lowest)
        assert torch.allclose(attention.attend(query, key, value, bias=bias), out, atol=1e-5)


def test_bf16_and_gradients():
    query, key, value = (x.bfloat16().requires_grad_() for x in qkv(100))
    attention = XAttention(block_size=16, stride=4, threshold=0.5)
    out = attention.attend(query, key, value, causal=True)
    out.float().sum().backward()
    blocks, _ = attention.select(query, key, causal=True)
    exact = dense_block_attention(query.float(), key.float(), value.float(), blocks, 16, causal=True)
    assert out.dtype == torch.bfloat16 and (out - exact).abs().max() < 0.05
    assert all(x.grad is not None and torch.isfinite(x.grad).all() for x in (query, key, value))


def test_one_antidiagonal_is_blind_to_even_offsets_and_two_are_not():
    rows = torch.eye(64)
    for offset in (31, 32):
        query, key = 400 * rows.roll(offset, dims=0)[None, None], rows[None, None]
        seen = {}
        for antidiagonals in (1, 2):
            scores = antidiagonal_scores(query, key, 8, 4, antidiagonals=antidiagonals, causal=True)[0, 0, 7]
            seen[antidiagonals] = float(scores[(56 - offset) // 8 : (63 - offset) // 8 + 1].sum() / scores.sum())
        assert seen[1] > 0.9 if offset % 2 else seen[1] < 0.3
        assert seen[2] > 0.5


@pytest.mark.parametrize("kind", ["llama", "bert", "vit", "t5"])
def test_on_models_saved_and_loaded(kind, tmp_path):
    model = tiny(kind)
    inputs = inputs_for(model, length=24)
    key = "logits" if kind in ("llama", "t5") else "last_hidden_state"
    with torch.no_grad():
        dense = model(**inputs)[key]
        with edits.editing(model, "xattention") as edit:
            for part in parts.mixers(model):
                edit.edit(part.name, XAttention, block_size=4, stride=2, threshold=0.4)
        sparse = model(**inputs)[key]
        assert not torch.equal(sparse, dense) and torch.isfinite(sparse).all()
        assert torch.equal(copy.deepcopy(model)(**inputs)[key], sparse)
        model.save_pretrained(tmp_path, variant="formulary")
        assert torch.equal(type(model).from_pretrained(tmp_path).eval()(**inputs)[key], sparse)


@pytest.mark.parametrize(
    "wrong", [{"stride": 0}, {"stride": 48}, {"threshold": 0.0}, {"threshold": 1.1}, {"antidiagonals": 3}, {"block_size": 0}]
)
def test_wrong_arguments_are_named_in_one_line(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))) as told:
        XAttention(**wrong)
    assert "\n" not in str(told.value)
