"""ATS: against loops over single images, and that images of one batch stay strangers to each other."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formulary.contracts import Data, parts
from formulary.errors import FormularyError, UsageError
from formulary.lab.small import inputs_for, tiny
from formulary.papers.token_reduction._parts import kept_index, shared_tokens
from formulary.papers.token_reduction.ats_adaptive_token_sampler import AdaptiveTokenSampler
from formulary.papers.token_reduction.ats_adaptive_token_sampler.method import packed, sample, significance


def sharp(model):
    """The model with attention as peaked as a trained one's."""
    for part in parts.mixers(model):
        for projection in (part.module.q_proj, part.module.k_proj):
            projection.weight.data.mul_(10)
    return model


def edited(model, **settings):
    return AdaptiveTokenSampler(**settings).apply(copy.deepcopy(model))


def images(model, batch=5):
    return inputs_for(model, batch=batch, seed=3)["pixel_values"]


# ---------------------------------------------------------------- one image at a time, with loops


def naive_sample(scores, levels):
    """The set of places that the levels hit; `scores` is a list that sums to 1."""
    order, total, ladder = sorted(range(len(scores)), key=lambda i: scores[i]), 0.0, []
    for place in order:
        total += scores[place]
        ladder.append((total, place))
    hit = set()
    for k in range(levels):
        level = (2 * k + 1) / (2 * levels)
        hit.add(min(ladder, key=lambda rung: abs(rung[0] - level))[1])
    return sorted(hit)


def naive(model, pixels, blocks, levels):
    """(states of what is left, patches left) of one image through a ViTModel; rows of dropped tokens never exist."""
    x, here = model.embeddings(pixels[None])[0], list(range(16))
    for number, block in enumerate(parts.blocks(model), start=1):
        b, heads = block.module, model.config.num_attention_heads
        normed = b.layernorm_before(x)
        q, k, v = (getattr(b.attention, name)(normed).chunk(heads, dim=1) for name in ("q_proj", "k_proj", "v_proj"))
        maps = [torch.softmax(q[h] @ k[h].T / q[h].shape[1] ** 0.5, -1) for h in range(heads)]
        keep = list(range(len(x)))
        if number in blocks:
            size = torch.cat(v, 1).norm(dim=1)
            score = (sum(a[0] for a in maps) * size)[1:].double()
            chosen = naive_sample((score / score.sum()).tolist(), levels)
            keep, here = [0] + [1 + i for i in chosen], [here[i] for i in chosen]
        x = x[keep] + b.attention.o_proj(torch.cat([a[keep] @ w for a, w in zip(maps, v)], 1))
        x = x + b.mlp(b.layernorm_after(x))
    return model.layernorm(x), here


@torch.no_grad()
def test_matches_a_loop_over_single_images():
    model = sharp(tiny("vit"))
    reduced, _ = edited(model, blocks=(1, 2), max_tokens=10, restore=False)
    pixels = images(model)
    states = reduced(pixels).last_hidden_state
    lengths = set()
    for image, state, kept in zip(pixels, states, kept_index(reduced)):
        expected, patches = naive(model, image, (1, 2), 10)
        assert kept.tolist() == [0] + [1 + p for p in patches]
        torch.testing.assert_close(state[: len(kept)], expected, atol=2e-5, rtol=1e-4)
        lengths.add(len(kept))
    assert len(lengths) > 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 20), st.integers(0, 3))
def test_sampling_is_inversion_of_the_cumulative_scores(weights, levels, padding):
    weights = [w + 0.001 * i for i, w in enumerate(weights)]
    scores = torch.tensor([w / sum(weights) for w in weights], dtype=torch.float64)
    expected = naive_sample(scores.tolist(), levels)
    padded = torch.cat([scores, torch.zeros(padding, dtype=torch.float64)])[None]
    real = torch.arange(len(padded[0]))[None] < len(scores)
    assert sample(padded, levels, real)[0].nonzero()[:, 0].tolist() == expected
    assert sample(scores[None], levels)[0].nonzero()[:, 0].tolist() == expected


def test_flat_scores_keep_all_and_peaked_ones_few():
    flat, peaked = torch.full((1, 20), 0.05), torch.full((1, 20), 1e-4)
    peaked[0, 7] = 1 - 19e-4
    assert int(sample(flat, 10).sum()) == 10
    assert int(sample(peaked, 20).sum()) == 2 and bool(sample(peaked, 20)[0, 7])


def test_scores_weigh_attention_by_the_values():
    attention, value = torch.tensor([[[0.1, 0.2], [0.3, 0.2]]]), torch.tensor([[[[3.0], [0]], [[4.0], [2]]]])
    assert significance(attention, value).tolist()[0] == pytest.approx([0.4 * 5 / 2.8, 0.4 * 2 / 2.8])
    assert significance(attention, value, torch.tensor([[True, False]])).tolist() == [[1.0, 0.0]]


def test_packing_keeps_order_and_marks_padding():
    index, real = packed(torch.tensor([[True, False, True, True], [False, False, True, False]]))
    assert index[0].tolist() == [0, 2, 3] and index[1, 0] == 2
    assert real.tolist() == [[True] * 3, [True, False, False]]
    assert packed(torch.tensor([[False, True]]))[1] is None


# ---------------------------------------------------------------- batches, state, report


@pytest.mark.parametrize("name", ["vit", "dinov2"])
@torch.no_grad()
def test_an_image_does_not_depend_on_the_others(name):
    model = sharp(tiny(name))
    reduced, _ = edited(model, blocks=(1, 2), max_tokens=10)
    pixels = images(model)
    together, kept = reduced(pixels).last_hidden_state, kept_index(reduced)
    assert len({len(one) for one in kept}) > 1 and together.shape[1] == 17
    for i in range(5):
        alone = reduced(pixels[i : i + 1]).last_hidden_state
        assert torch.equal(kept_index(reduced)[0], kept[i])
        torch.testing.assert_close(alone[0], together[i], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_restored_states_are_those_of_the_nearest_real_token():
    model = sharp(tiny("vit"))
    bare, _ = edited(model, blocks=(1, 2), max_tokens=6, restore=False)
    whole, _ = edited(model, blocks=(1, 2), max_tokens=6)
    pixels = images(model)
    short, full = bare(pixels).last_hidden_state, whole(pixels).last_hidden_state
    for b, kept in enumerate(kept_index(whole)):
        places = [(int(p) - 1, short[b, i]) for i, p in enumerate(kept) if p]
        for patch in range(16):
            distance = lambda q: (q // 4 - patch // 4) ** 2 + (q % 4 - patch % 4) ** 2
            assert torch.equal(full[b, 1 + patch], min(places, key=lambda place: distance(place[0]))[1])


@torch.no_grad()
def test_the_report_counts_what_the_blocks_see():
    model = sharp(tiny("vit"))
    data = Data([{"pixel_values": image} for image in images(model)], batch_size=5)
    reduced, report = AdaptiveTokenSampler(max_tokens=9).apply(copy.deepcopy(model), data)
    reduced(data.collate(data.items)["pixel_values"])
    counts = [len(kept) - 1 for kept in kept_index(reduced)]
    assert report.figures["image tokens after each block"] == [16, pytest.approx(sum(counts) / 5)]
    assert report.figures["multiply-adds, of the unreduced model's"] < 1
    assert [change.name for change in report.changes] == ["layers.1"]
    assert not any(part.module._forward_pre_hooks for part in parts.feed_forwards(reduced))


def test_gradients_reach_dropped_tokens_and_copies_share_nothing():
    model = sharp(tiny("vit"))
    reduced, _ = edited(model, blocks=(2,), max_tokens=4)
    inner = []
    keep = lambda _, args: inner.append(args[0]) or args[0].retain_grad()
    handle = parts.blocks(reduced)[1].module.register_forward_pre_hook(keep)
    reduced(images(model)).last_hidden_state[:, 0].square().sum().backward()
    handle.remove()
    gone = sorted(set(range(17)) - set(kept_index(reduced)[0].tolist()))
    assert gone and bool((inner[0].grad[0, gone].abs().sum(-1) > 0).all())
    twin = copy.deepcopy(reduced)
    assert shared_tokens(twin) is not shared_tokens(reduced)
    assert all(part.module.formulary_attention.tokens is shared_tokens(twin) for part in parts.mixers(twin))
    with torch.no_grad():
        assert torch.equal(twin(images(model)).last_hidden_state, reduced(images(model)).last_hidden_state)


@pytest.mark.parametrize(
    "wrong, says", [({"blocks": (2, 1)}, "blocks must ascend"), ({"max_tokens": -1}, "max_tokens must be between 0")]
)
def test_wrong_parameters_are_refused(wrong, says):
    with pytest.raises(UsageError, match=says):
        AdaptiveTokenSampler(**wrong)


def test_what_cannot_be_sampled_is_refused():
    model = tiny("dinov2")
    with pytest.raises(UsageError, match="blocks must be between 1 and 2 in this model, got 3"):
        edited(model, blocks=(3,))
    reduced, report = edited(model, max_tokens=40)
    assert "max_tokens 40 is more than the 16 patches" in report.headline
    with pytest.raises(FormularyError, match="carries a method that did"):
        edited(reduced)
    with pytest.raises(FormularyError, match="attention mask"):
        reduced(images(model, 2), attention_mask=torch.tensor([[1] * 17, [1] * 15 + [0] * 2]))
    reduced.activation_checkpointing_enable()
    reduced.train()
    with pytest.raises(FormularyError, match="gradient checkpointing"):
        reduced(images(model))
