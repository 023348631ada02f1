"""GTP-ViT: against a loop over single images, and what dropping and restoring must leave alone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from formulary.contracts import Data, parts
from formulary.errors import FormularyError, UsageError
from formulary.lab.small import inputs_for, tiny
from formulary.papers.token_reduction.gtp_vit import GTP
from formulary.papers.token_reduction.gtp_vit.method import kept_index, shared_tokens
from formulary.papers.token_reduction.gtp_vit.tokens import choose


def deit():
    from transformers import DeiTConfig, DeiTModel

    torch.manual_seed(0)
    widths = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    return DeiTModel(DeiTConfig(image_size=16, patch_size=4, **widths)).eval()


def registers():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(0)
    return Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            image_size=28,
            patch_size=7,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_register_tokens=4,
        )
    ).eval()


MODELS = {"vit": lambda: tiny("vit"), "dinov2": lambda: tiny("dinov2"), "deit": deit, "registers": registers}
PREFIX = {"vit": 1, "dinov2": 1, "deit": 2, "registers": 5}


def edited(model, **settings):
    return GTP(**settings).apply(copy.deepcopy(model))


# ---------------------------------------------------------------- one image at a time, with loops


def naive_block(block, x, size, patches, graph, drop, alpha, density, heads):
    """x (L,D) and size (L,) of one image; `patches` names all but CLS, `graph[i][j]` weighs what i hears of j."""
    is_vit = hasattr(block, "layernorm_before")
    attention = block.attention
    normed = (block.layernorm_before if is_vit else block.norm1)(x)
    q, k, v = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
    width = x.shape[1] // heads
    itself, read, out = [], [], []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        a = torch.softmax(q[:, part] @ k[:, part].T / width**0.5 + size.log(), dim=-1)
        kept = max(1, round(density * a.numel()))
        a = a * (a >= a.flatten().sort(descending=True).values[kept - 1])
        itself.append(a.diagonal())
        read.append(a.sum(0))
        out.append(a @ v[:, part])
    mixed = attention.o_proj(torch.cat(out, 1))
    x = x + (mixed if is_vit else block.layer_scale1(mixed))
    score = torch.stack(itself).max(0).values * torch.stack(read).max(0).values
    order = sorted(range(len(patches)), key=lambda i: -score[1 + i].item())
    keep, gone = sorted(order[: len(patches) - drop]), order[len(patches) - drop :]
    rows, sizes = [x[0]], [size[0]]
    for i in keep:
        rows.append(x[1 + i] + alpha * sum(graph[patches[i]][patches[j]] * x[1 + j] for j in gone))
        sizes.append(size[1 + i] + alpha * sum(graph[patches[i]][patches[j]] * size[1 + j] for j in gone))
    x, size = torch.stack(rows), torch.stack(sizes)
    if is_vit:
        return x + block.mlp(block.layernorm_after(x)), size, [patches[i] for i in keep]
    return x + block.layer_scale2(block.mlp(block.norm2(x))), size, [patches[i] for i in keep]


def naive_graph(x, height, width, kind, neighbors):
    """Weights of one image's patches (N,D) as nested lists."""
    count = height * width
    edges = [[0.0] * count for _ in range(count)]
    for i in range(count):
        others = [j for j in range(count) if j != i]
        if kind != "semantic":
            for j in others:
                if max(abs(i // width - j // width), abs(i % width - j % width)) == 1:
                    edges[i][j] = 1.0
        if kind != "spatial":
            cosine = lambda j: torch.nn.functional.cosine_similarity(x[i], x[j], dim=0).item()
            for j in sorted(others, key=cosine, reverse=True)[:neighbors]:
                edges[i][j] = 1.0
    degree = [sum(row) for row in edges]
    weight = lambda i, j: edges[i][j] / (degree[i] * degree[j]) ** 0.5 if edges[i][j] else 0.0
    return [[weight(i, j) for j in range(count)] for i in range(count)]


def naive(model, pixels, *, drop, alpha, kind, neighbors, density):
    """The final states (n,D) of the kept tokens and which patches they are, for one image (C,H,W)."""
    patch = model.config.patch_size
    height, width = pixels.shape[1] // patch, pixels.shape[2] // patch
    x = model.embeddings(pixels[None])[0]
    graph = naive_graph(x[1:], height, width, kind, neighbors)
    size, patches = torch.ones(len(x)), list(range(height * width))
    for block in parts.blocks(model):
        heads = model.config.num_attention_heads
        x, size, patches = naive_block(block.module, x, size, patches, graph, drop, alpha, density, heads)
    return model.layernorm(x), patches


@pytest.mark.parametrize("name", ["vit", "dinov2"])
@pytest.mark.parametrize("kind, density", [("both", 1.0), ("spatial", 0.6), ("semantic", 1.0)])
@torch.no_grad()
def test_matches_a_loop_over_single_images(name, kind, density):
    model = tiny(name)
    size = (16, 16) if name == "vit" else (28, 42)
    pixels = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))
    method = {"alpha": 0.3, "neighbors": 3}
    reduced, _ = edited(model, tokens_per_layer=4, graph=kind, attention_density=density, restore=False, **method)
    states = reduced(pixel_values=pixels).last_hidden_state
    for image, state, kept in zip(pixels, states, kept_index(reduced)):
        expected, patches = naive(model, image, drop=4, kind=kind, density=density, **method)
        assert kept.tolist() == [0] + [1 + p for p in patches]
        torch.testing.assert_close(state, expected, atol=2e-5, rtol=1e-4)


# ---------------------------------------------------------------- identities


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_dropping_nothing_is_the_identity_bit_for_bit(name):
    model = MODELS[name]()
    reduced, _ = edited(model, tokens_per_layer=0, alpha=0.0)
    inputs = inputs_for(model)
    assert torch.equal(reduced(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


@torch.no_grad()
def test_without_propagation_every_token_keeps_its_size():
    model = tiny("vit")
    reduced, _ = edited(model, tokens_per_layer=3, alpha=0.0)
    biases = []
    tokens = shared_tokens(reduced)
    parts.blocks(reduced)[1].module.mlp.register_forward_hook(lambda *_: biases.append(tokens.bias))
    reduced(**inputs_for(model))
    assert biases == [None]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_each_block_drops_and_the_prefix_stays(name):
    model = MODELS[name]()
    reduced, report = edited(model, tokens_per_layer=2)
    lengths = []
    for block in parts.blocks(reduced):
        block.module.mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    out = reduced(**inputs_for(model)).last_hidden_state
    prefix, layers = PREFIX[name], len(lengths)
    assert lengths == [prefix + 16 - 2 * (i + 1) for i in range(layers)]
    assert report.figures["image tokens after each block"] == [length - prefix for length in lengths]
    assert out.shape[1] == prefix + 16
    assert kept_index(reduced)[:, :prefix].tolist() == [list(range(prefix))] * 2


@torch.no_grad()
def test_an_image_does_not_depend_on_the_others():
    model = tiny("dinov2")
    reduced, _ = edited(model, tokens_per_layer=4)
    pixels = inputs_for(model, batch=5)["pixel_values"]
    together, kept = reduced(pixels).last_hidden_state, kept_index(reduced)
    for i in range(5):
        alone = reduced(pixels[i : i + 1]).last_hidden_state
        assert torch.equal(kept_index(reduced)[0], kept[i])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_restore_puts_kept_tokens_back_and_fills_from_the_nearest():
    model = registers()
    bare, _ = edited(model, tokens_per_layer=3, restore=False)
    whole, _ = edited(model, tokens_per_layer=3)
    inputs = inputs_for(model)
    short, full, kept = bare(**inputs).last_hidden_state, whole(**inputs).last_hidden_state, kept_index(whole)
    assert full.shape == (2, 21, 32) and short.shape == (2, 12, 32)
    for b in range(2):
        assert torch.equal(full[b, kept[b]], short[b])
        places = [(int(p) - 5, row) for p, row in zip(kept[b], short[b]) if p >= 5]
        for patch in range(16):
            distance = lambda q: (q // 4 - patch // 4) ** 2 + (q % 4 - patch % 4) ** 2
            least = min(distance(q) for q, _ in places)
            candidates = [row for q, row in places if distance(q) == least]
            assert any(torch.equal(full[b, 5 + patch], row) for row in candidates)


# ---------------------------------------------------------------- compute, gradients, state


@torch.no_grad()
def test_compute_falls_as_the_report_says():
    model = tiny("dinov2")
    reduced, report = edited(model, tokens_per_layer=6, graph="spatial")
    model.set_attn_implementation("eager")
    inputs, counts = inputs_for(model), []
    for which in (model, reduced):
        with FlopCounterMode(display=False) as counter:
            which(**inputs)
        counts.append(sum(counter.get_flop_counts()["Dinov2Model.encoder"].values()))
    said = report.figures["multiply-adds, of the unreduced model's"]
    assert counts[1] < counts[0]
    assert said == pytest.approx(counts[1] / counts[0], rel=2e-3)


def test_dropped_tokens_still_pass_on_gradients():
    model = tiny("vit")
    reached = {}
    for alpha in (0.0, 0.3):
        reduced, _ = edited(model, tokens_per_layer=6, alpha=alpha, graph="spatial", targets=("layers.1",))
        inner = []
        second = parts.blocks(reduced)[1].module
        second.register_forward_pre_hook(lambda _, args: inner.append(args[0]) or args[0].retain_grad())
        mixer = parts.mixers(reduced)[1].module
        mixer.register_forward_hook(lambda _, args, out: (torch.zeros_like(out[0]), None))
        reduced(**inputs_for(model)).last_hidden_state[:, 1:].square().sum().backward()
        gone = [sorted(set(range(17)) - set(kept.tolist())) for kept in kept_index(reduced)]
        reached[alpha] = sum(float(inner[0].grad[b, i].abs().sum()) for b in range(2) for i in gone[b])
    assert reached[0.0] == 0 and reached[0.3] > 0


def test_a_copy_has_its_own_state_even_after_a_forward_with_gradients():
    model, _ = edited(tiny("vit"), tokens_per_layer=4)
    inputs = inputs_for(model)
    out = model(**inputs).last_hidden_state
    twin = copy.deepcopy(model)
    tokens = shared_tokens(twin)
    assert tokens is not shared_tokens(model)
    assert all(block.module.gtp_tokens is tokens for block in parts.blocks(twin))
    assert all(part.module.formulary_attention.tokens is tokens for part in parts.mixers(twin))
    kept = kept_index(model)
    other = inputs_for(model, batch=3, seed=5)
    twin(**other)
    assert torch.equal(kept_index(model), kept) and kept_index(twin).shape == (3, 9)
    assert torch.equal(twin(**inputs).last_hidden_state, out)


@torch.no_grad()
def test_a_forward_that_was_stopped_leaves_nothing_behind():
    model, _ = edited(tiny("vit"), tokens_per_layer=4)
    inputs = inputs_for(model)
    expected = model(**inputs).last_hidden_state
    handle = parts.blocks(model)[1].module.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs)
    handle.remove()
    assert torch.equal(model(**inputs).last_hidden_state, expected)
    assert shared_tokens(model).graph is None


@torch.no_grad()
def test_saved_and_loaded_the_outputs_are_the_same_bits(tmp_path):
    model, _ = edited(tiny("dinov2"), tokens_per_layer=3, attention_density=0.8)
    model.save_pretrained(tmp_path, variant="formulary")
    loaded = type(model).from_pretrained(tmp_path).eval()
    inputs = inputs_for(model)
    assert torch.equal(loaded(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
    assert torch.equal(kept_index(loaded), kept_index(model))


@torch.no_grad()
def test_bfloat16_drops_by_scores_summed_in_float32():
    model = tiny("vit").bfloat16()
    reduced, _ = edited(model, tokens_per_layer=4)
    out = reduced(pixel_values=inputs_for(model)["pixel_values"].bfloat16()).last_hidden_state
    assert out.dtype == torch.bfloat16 and bool(out.isfinite().all()) and kept_index(reduced).shape == (2, 9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=12), st.data())
def test_choose_splits_by_score(scores, draw):
    drop = draw.draw(st.integers(0, len(scores) - 1))
    keep, gone = choose(torch.tensor([scores], dtype=torch.float32), drop)
    keep, gone = keep[0].tolist(), gone[0].tolist()
    assert sorted(keep + gone) == list(range(len(scores))) and keep == sorted(keep) and len(gone) == drop
    assert all(scores[k] > scores[g] or (scores[k] == scores[g] and k < g) for k in keep for g in gone)


# ---------------------------------------------------------------- what it says and refuses


def test_too_many_tokens_are_lowered_and_said():
    model = tiny("vit")
    reduced, report = edited(model, tokens_per_layer=50)
    assert "lowered from 50 to 7: 2 blocks share 16 image tokens" in report.headline
    small = Data([{"pixel_values": torch.zeros(3, 8, 8)}])
    _, report = GTP(tokens_per_layer=2).apply(tiny("vit"), small)
    assert "lowered from 2 to 1" in report.headline
    reduced(torch.randn(1, 3, 8, 8), interpolate_pos_encoding=True)
    assert kept_index(reduced).shape == (1, 2)


def test_only_chosen_blocks_drop():
    _, report = edited(tiny("vit"), tokens_per_layer=4, ignore=("*.0",))
    assert report.figures["image tokens after each block"] == [16, 12]
    assert "1 blocks not chosen keep their tokens" in report.headline


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"tokens_per_layer": -1}, "tokens_per_layer must be between 0"),
        ({"alpha": 2.0}, "alpha must be between 0 and 1, got 2.0"),
        ({"neighbors": 0}, "neighbors must be between 1"),
        ({"attention_density": 0.0}, "attention_density must be above 0"),
        ({"graph": "spacial"}, "did you mean 'spatial'?"),
    ],
)
def test_wrong_parameters_are_refused(wrong, says):
    with pytest.raises(UsageError) as error:
        GTP(**wrong)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_models_that_cannot_lose_tokens_are_refused():
    from transformers import Dinov2Backbone, Dinov2Config, SwinConfig, SwinModel

    config = Dinov2Config(image_size=28, patch_size=7, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    config.out_features = ["stage1", "stage2"]
    swin = SwinModel(SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4))
    twice = GTP(tokens_per_layer=1).apply(tiny("vit"))[0]
    refusals = {
        "does not support a decoder": tiny("gpt2"),
        "reads from inner blocks: stage1, stage2": Dinov2Backbone(config),
        "no seam is known": swin,
        "carries a method that did: apply one": twice,
    }
    for says, model in refusals.items():
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(FormularyError, match=says) as error:
            GTP(tokens_per_layer=1).apply(model)
        assert "\n" not in str(error.value)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_masks_and_gradient_checkpointing_are_refused_when_run():
    model, _ = edited(tiny("dinov2"), tokens_per_layer=2)
    pixels = inputs_for(model)["pixel_values"]
    with pytest.raises(FormularyError, match="attention mask"):
        model(pixels, attention_mask=torch.tensor([[1] * 17, [1] * 15 + [0] * 2]))
    model.activation_checkpointing_enable()
    model.train()
    with pytest.raises(FormularyError, match="gradient checkpointing"):
        model(pixels)
    assert isinstance(model, nn.Module)
