"""Zero-TPrune: against loops over single images, the stationary distribution, and what pruning must leave alone."""

import copy

import pytest
import torch

from formulary.contracts import Data, parts
from formulary.errors import FormularyError, UsageError
from formulary.lab.small import inputs_for, tiny
from formulary.papers.token_reduction._parts import kept_index, shared_tokens
from formulary.papers.token_reduction.zero_tprune import ZeroTPrune
from formulary.papers.token_reduction.zero_tprune.ranking import importance, left, page_rank, repeated


def deep(name="vit", layers=4):
    """A tiny ViT with distilled and register tokens where its kind has them."""
    import transformers as t

    torch.manual_seed(0)
    widths = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4}
    if name == "deit":
        return t.DeiTModel(t.DeiTConfig(image_size=16, patch_size=4, intermediate_size=64, **widths)).eval()
    if name == "registers":
        config = t.Dinov2WithRegistersConfig(image_size=28, patch_size=7, num_register_tokens=4, **widths)
        return t.Dinov2WithRegistersModel(config).eval()
    return t.ViTModel(t.ViTConfig(image_size=16, patch_size=4, intermediate_size=64, **widths)).eval()


PREFIX = {"vit": 1, "deit": 2, "registers": 5}
THREE = {"layers": (1, 2, 3), "keep": (0.8, 1.0, 0.75), "similar": 2, "iterations": (6, 2, 1)}


def edited(model, **settings):
    return ZeroTPrune(**settings).apply(copy.deepcopy(model))


# ---------------------------------------------------------------- one image at a time, with loops


def naive_votes(maps, alive, iterations):
    """maps: per head a nested list a[i][j]; alive: the tokens with a say. Per head {token: share}."""
    found = []
    for a in maps:
        share = {i: 1.0 for i in alive}
        share[0] = float((len(a) - 1) ** 0.5)
        for _ in range(iterations):
            share = {j: sum(share[i] * a[i][j] for i in alive) for j in alive}
        image = {j: share[j] for j in alive if j}
        mean = sum(image.values()) / len(image)
        found.append({j: value / mean for j, value in image.items()})
    return found


def naive_importance(maps, alive, iterations, low, high):
    votes = naive_votes(maps, alive, iterations)
    variance = [sum((v - 1) ** 2 for v in head.values()) / len(head) for head in votes]
    good = [head for head, v in zip(votes, variance) if low <= v <= high] or votes
    return {j: (sum(head[j] ** 2 for head in good) / len(good)) ** 0.5 for j in votes[0]}


def naive_kept(maps, keys, keep, similar, iterations, low, high):
    """Tokens that stay, CLS (0) left out; maps as above, keys (L,D)."""
    alive = list(range(len(maps[0])))
    first = naive_importance(maps, alive, 1, low, high)
    order = sorted(first, key=first.get, reverse=True)
    half = len(order) // 2
    more, less = order[: len(order) - half], order[len(order) - half :]
    cosine = lambda i, j: torch.nn.functional.cosine_similarity(keys[i], keys[j], dim=0).item()
    best = {i: max(cosine(i, j) for j in more) for i in less}
    gone = sorted(less, key=best.get, reverse=True)[: min(similar, half)]
    alive = [i for i in alive if i not in gone]
    ranks = naive_importance(maps, alive, iterations, low, high)
    count = max(1, round(len(ranks) * keep))
    return sorted(sorted(ranks, key=ranks.get, reverse=True)[:count])


def naive(model, pixels, layers, keep, similar, iterations, low, high):
    """(states of what is left, patches left) of one image through a ViTModel."""
    x, here = model.embeddings(pixels[None])[0], list(range(16))
    for number, block in enumerate(parts.blocks(model), start=1):
        b, heads = block.module, model.config.num_attention_heads
        normed = b.layernorm_before(x)
        q, k, v = (getattr(b.attention, name)(normed).chunk(heads, dim=1) for name in ("q_proj", "k_proj", "v_proj"))
        maps = [torch.softmax(q[h] @ k[h].T / q[h].shape[1] ** 0.5, -1) for h in range(heads)]
        x = x + b.attention.o_proj(torch.cat([a @ w for a, w in zip(maps, v)], 1))
        x = x + b.mlp(b.layernorm_after(x))
        if number in layers:
            at = layers.index(number)
            lists = [a.tolist() for a in maps]
            kept = naive_kept(lists, torch.cat(k, 1), keep[at], similar, iterations[at], low, high)
            x, here = x[[0, *kept]], [here[i - 1] for i in kept]
    return model.layernorm(x), here


@pytest.mark.parametrize("low, high", [(0.01, 0.7), (0.0, 1e-4)])
@torch.no_grad()
def test_matches_a_loop_over_single_images(low, high):
    model = deep()
    for part in parts.mixers(model):
        for projection in (part.module.q_proj, part.module.k_proj):
            projection.weight.mul_(8)
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    reduced, report = edited(model, restore=False, v_min=low, v_max=high, **THREE)
    states = reduced(pixel_values=pixels).last_hidden_state
    for image, state, kept in zip(pixels, states, kept_index(reduced)):
        expected, patches = naive(model, image, low=low, high=high, **THREE)
        assert kept.tolist() == [0] + [1 + p for p in patches]
        torch.testing.assert_close(state, expected, atol=2e-5, rtol=1e-4)
    assert report.figures["image tokens after each block"] == [11, 9, 5, 5]


# ---------------------------------------------------------------- identities


def test_many_votes_reach_the_stationary_distribution():
    attention = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0)).double().softmax(-1)
    votes = page_rank(attention, torch.ones(2, 9, dtype=torch.bool), 200, 1)
    for a, found in zip(attention.flatten(0, 1), votes.flatten(0, 1)):
        values, vectors = torch.linalg.eig(a.T)
        stationary = vectors[:, values.real.argmax()].real
        torch.testing.assert_close(found, stationary / stationary.sum())


def test_pruned_tokens_neither_vote_nor_are_voted_for():
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(1, 2, 6, 6, generator=generator).double()
    alive = torch.tensor([[True, True, False, True, False, True]])
    here = alive[0].nonzero()[:, 0]
    whole = page_rank(attention, alive, 3, 0)
    small = page_rank(attention[:, :, here][..., here], alive[:, here], 3, 0)
    torch.testing.assert_close(whole[..., here], small)
    assert bool((whole[..., ~alive[0]] == 0).all())


def test_the_filter_leaves_out_flat_and_peaked_heads():
    alive = torch.ones(1, 4, dtype=torch.bool)
    flat, good, peaked = torch.tensor([[1.0, 1, 1, 1], [0.5, 1, 1, 1.5], [0, 0, 0, 4]])
    found = importance(torch.stack([flat, good, peaked])[None], alive, 0.01, 0.7)
    torch.testing.assert_close(found[0], good)
    none = importance(torch.stack([flat, peaked])[None], alive, 0.01, 0.7)
    torch.testing.assert_close(none[0], ((flat**2 + peaked**2) / 2).sqrt())


def test_a_copy_of_an_important_token_goes():
    keys = torch.eye(6)[None].clone()
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1]])
    keys[0, 4] = keys[0, 1] + 0.1 * keys[0, 2]
    assert repeated(scores, keys, 1).tolist() == [[False, False, False, False, True, False]]
    assert repeated(scores, keys, 3).tolist() == [[False] * 3 + [True] * 3]
    assert repeated(scores, keys, 0).sum() == 0


@pytest.mark.parametrize("count, similar, keep, expected", [(16, 2, 0.8, 11), (3, 10, 0.5, 1), (1, 5, 0.1, 1)])
def test_at_least_one_token_is_left(count, similar, keep, expected):
    assert left(count, similar, keep) == expected


@pytest.mark.parametrize("name", PREFIX)
@torch.no_grad()
def test_lengths_fall_as_reported_and_the_prefix_stays(name):
    model = deep(name)
    reduced, report = edited(model, **THREE)
    lengths = []
    for block in parts.blocks(reduced):
        block.module.mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1] - PREFIX[name]))
    out = reduced(**inputs_for(model)).last_hidden_state
    assert lengths == [16, *report.figures["image tokens after each block"][:-1]] == [16, 11, 9, 5]
    assert out.shape == model(**inputs_for(model)).last_hidden_state.shape
    assert all(kept[: PREFIX[name]].tolist() == list(range(PREFIX[name])) for kept in kept_index(reduced))
    assert [edit for edit in reduced.config.quantization_config.edits if edit["cls"].endswith("RankedAttention")][2:]


@torch.no_grad()
def test_an_image_does_not_depend_on_the_others_and_kept_states_are_restored():
    model = deep()
    bare, _ = edited(model, restore=False, **THREE)
    whole, _ = edited(model, **THREE)
    pixels = inputs_for(model, batch=4)["pixel_values"]
    short, full, kept = bare(pixels).last_hidden_state, whole(pixels).last_hidden_state, kept_index(whole)
    for i in range(4):
        torch.testing.assert_close(whole(pixels[i : i + 1]).last_hidden_state[0], full[i], atol=1e-5, rtol=1e-5)
        assert torch.equal(full[i, kept[i]], short[i])
        places = [(int(p) - 1, row) for p, row in zip(kept[i], short[i]) if p]
        for patch in range(16):
            distance = lambda q: (q // 4 - patch // 4) ** 2 + (q % 4 - patch % 4) ** 2
            nearest = min(places, key=lambda place: distance(place[0]))
            assert torch.equal(full[i, 1 + patch], nearest[1])


@torch.no_grad()
def test_a_copy_has_its_own_state_and_a_stopped_forward_leaves_nothing():
    model, _ = edited(deep(), **THREE)
    inputs = inputs_for(model)
    out = model(**inputs).last_hidden_state
    twin = copy.deepcopy(model)
    tokens = shared_tokens(twin)
    assert tokens is not shared_tokens(model)
    assert all(part.module.formulary_attention.tokens is tokens for part in parts.mixers(twin)[:3])
    handle = parts.blocks(model)[1].module.mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs)
    handle.remove()
    assert torch.equal(model(**inputs).last_hidden_state, out) and torch.equal(twin(**inputs).last_hidden_state, out)


# ---------------------------------------------------------------- the search, the report, refusals


def test_the_search_takes_the_best_of_its_draws_at_its_budget(monkeypatch):
    seen, cosine = [], torch.nn.functional.cosine_similarity
    spy = lambda *args, **kwargs: seen.append(cosine(*args, **kwargs)) or seen[-1]
    monkeypatch.setattr(torch.nn.functional, "cosine_similarity", spy)
    data = Data([{"pixel_values": torch.randn(3, 16, 16)} for _ in range(6)], batch_size=6, seed=3)
    settings = {**THREE, "trials": 6, "budget": 0.8}
    reduced, report = ZeroTPrune(**settings).apply(deep(), data)
    best = max(float(values.mean()) for values in seen)
    assert len(seen) == 6 and report.figures["cosine of the chosen draw's features"] == pytest.approx(best)
    assert 0.77 < report.figures["multiply-adds, of the unreduced model's"] <= 0.8
    pixels = data.collate(data.items)["pixel_values"]
    whole, mine = (model(pixels).last_hidden_state[:, 0].detach() for model in (deep(), reduced))
    assert float(cosine(mine, whole, dim=-1).mean()) == pytest.approx(best, abs=1e-6)
    _, same = ZeroTPrune(**settings).apply(deep(), data)
    assert same.figures == report.figures and "chosen from 6 draws" in report.headline


def test_defaults_scale_to_the_depth_and_say_so():
    reduced, report = edited(deep(layers=4))
    assert [change.name for change in report.changes] == ["layers.0", "layers.1", "layers.2"]
    assert "block 3 of 4 is several of the paper's positions" in report.headline
    assert "similar lowered from 10 to 8 after block 1" in report.headline


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"keep": (0.5,)}, "keep needs one value for each of 5 layers"),
        ({"layers": (2, 1), "keep": (0.5, 0.5), "iterations": (1, 1)}, "layers must ascend"),
        ({"keep": (1.0, 0.9, 0.8, 0.7, 0.0)}, "keep must be above 0"),
        ({"iterations": (0, 1, 1, 1, 1)}, "iterations must be between 1"),
        ({"similar": -1}, "similar must be between 0"),
        ({"v_min": 0.8}, "v_min must be between 0 and v_max"),
        ({"budget": 2.0}, "budget must be between"),
    ],
)
def test_wrong_parameters_are_refused(wrong, says):
    with pytest.raises(UsageError, match=says) as error:
        ZeroTPrune(**wrong)
    assert "\n" not in str(error.value)


def test_what_cannot_be_pruned_is_refused():
    with pytest.raises(UsageError, match="layers must be between 1 and 3"):
        edited(deep(), layers=(4,), keep=(0.5,), iterations=(1,))
    with pytest.raises(FormularyError, match="prune nothing"):
        edited(deep(), layers=(1,), keep=(1.0,), iterations=(1,), similar=0)
    with pytest.raises(FormularyError, match="carries a method that did"):
        edited(edited(deep(), **THREE)[0], **THREE)
    with pytest.raises(FormularyError, match="trials choose by images"):
        edited(deep(), trials=2, **THREE)
    model, _ = edited(tiny("dinov2"), layers=(1,), keep=(0.5,), iterations=(1,))
    with pytest.raises(FormularyError, match="attention mask"):
        model(inputs_for(model)["pixel_values"], attention_mask=torch.tensor([[1] * 17, [1] * 15 + [0] * 2]))
    model.activation_checkpointing_enable()
    model.train()
    with pytest.raises(FormularyError, match="gradient checkpointing"):
        model(inputs_for(model)["pixel_values"])
