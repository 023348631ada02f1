"""Bootstrapped SparseFormers: against loops over points and tokens, the ViT's own blocks, and what stays frozen."""

import copy
import math
import statistics

import pytest
import torch
import transformers as t
from torch.nn import functional as F

from formulary.contracts import Data, edits, parts
from formulary.errors import FormularyError, UsageError
from formulary.papers.token_reduction.bootstrap_sparseformer import BootstrapSparseFormer, FocusedEmbeddings
from formulary.papers.token_reduction.bootstrap_sparseformer import focusing
from formulary.papers.token_reduction.bootstrap_sparseformer.focusing import AdaptiveMixing, FocusingBlock, Looking
from formulary.papers.token_reduction.bootstrap_sparseformer.method import Teacher, align, boxes_of

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "initializer_range": 0.2}
SMALL = {"channels": 4, "points": 4, "width": 16, "iterations": 2}


def made(name: str = "vit", layers: int = 6, **options):
    torch.manual_seed(0)
    widths = {**SIZES, "num_hidden_layers": layers, **options}
    if name == "dinov2":
        return t.Dinov2Model(t.Dinov2Config(image_size=28, patch_size=7, layerscale_value=0.7, **widths)).eval()
    if name == "registers":
        config = t.Dinov2WithRegistersConfig(image_size=28, patch_size=7, num_register_tokens=4, **widths)
        return t.Dinov2WithRegistersModel(config).eval()
    plain = {"image_size": 16, "patch_size": 4, "intermediate_size": 48, **widths}
    if name == "deit":
        return t.DeiTModel(t.DeiTConfig(**plain)).eval()
    return {"vit": t.ViTModel, "classifier": t.ViTForImageClassification}[name](t.ViTConfig(**plain)).eval()


PREFIX = {"vit": 1, "classifier": 1, "deit": 2, "dinov2": 1, "registers": 5}


def pixels_for(model, n: int = 6, seed: int = 1):
    side = model.config.image_size
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def pictures(model, n: int = 6, **options) -> Data:
    return Data([{"pixel_values": one} for one in pixels_for(model, n)], batch_size=4, **options)


def applied(model, data=None, **settings):
    return BootstrapSparseFormer(**{**SMALL, "steps": 0, **settings}).apply(copy.deepcopy(model), data or pictures(model))


@torch.no_grad()
def shaken(module, scale: float = 0.5):
    """Every parameter moved, so that nothing is zero or at its start."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in module.named_parameters():
        if not name.endswith("boxes"):
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator) / max(1, parameter.shape[-1]) ** 0.5)
    return module


def some_boxes(batch: int = 2, tokens: int = 3, seed: int = 0):
    corner, size = torch.rand(2, batch, tokens, 2, generator=torch.Generator().manual_seed(seed))
    return torch.cat([corner - 0.3, corner + 0.7 * size], dim=-1)


# ---------------------------------------------------------------- one number at a time


def naive_sample(feature, x: float, y: float):
    """feature (C,h,w) at x, y of 0 to 1: pixel (i, j) has its middle at ((j + 0.5) / w, (i + 0.5) / h)."""
    height, width = feature.shape[1:]
    across, down = min(max(x * width - 0.5, 0), width - 1), min(max(y * height - 0.5, 0), height - 1)
    j, i = int(across), int(down)
    a, b = across - j, down - i
    right, below = min(j + 1, width - 1), min(i + 1, height - 1)
    upper = (1 - a) * feature[:, i, j] + a * feature[:, i, right]
    return (1 - b) * upper + b * ((1 - a) * feature[:, below, j] + a * feature[:, below, right])


def naive_points(box, offsets):
    """offsets: [(x, y)] of one token; its points."""
    found = []
    for axis in range(2):
        values = [offset[axis] for offset in offsets]
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        low, high = box[axis], box[axis + 2]
        found.append([(low + high) / 2 + (v - mean) / (3 * deviation) * (high - low) for v in values])
    return list(zip(*found))


def naive_code(box, width):
    count = width // 4
    frequency = [math.pi * math.exp(math.log(128) * k / (count - 1)) for k in range(count)]
    code = []
    for value in box:
        code += [math.sin(value * f) for f in frequency[0::2]] + [math.cos(value * f) for f in frequency[1::2]]
    return torch.tensor(code)


def naive_mixing(mixing, samples, token):
    """samples (P,C) and token (W,) by loops over the entries of both matrices."""
    made = mixing.generate(token)
    points, channels = samples.shape
    by_channel = made[: channels**2].view(channels, channels)
    by_point = made[channels**2 :].view(32, points)
    out = torch.zeros(32, channels)
    for q in range(32):
        for d in range(channels):
            pairs = ((p, c) for p in range(points) for c in range(channels))
            out[q, d] = sum(by_point[q, p] * samples[p, c] * by_channel[c, d] for p, c in pairs)
    return mixing.out(F.gelu(out).flatten())


def test_bilinear_sampling_and_points_by_loops():
    generator = torch.Generator().manual_seed(0)
    features, boxes = torch.randn(2, 3, 5, 7, generator=generator), some_boxes()
    offsets = torch.randn(2, 3, 4, 2, generator=generator)
    points = focusing.points_in(boxes, offsets)
    found = focusing.sampled(features, points)
    for b in range(2):
        for n in range(3):
            expected = naive_points(boxes[b, n].tolist(), offsets[b, n].tolist())
            torch.testing.assert_close(points[b, n], torch.tensor(expected), rtol=1e-3, atol=1e-4)
            for p, (x, y) in enumerate(points[b, n].tolist()):
                torch.testing.assert_close(found[b, n, p], naive_sample(features[b], x, y), rtol=1e-4, atol=1e-5)


def test_boxes_and_their_codes_by_hand():
    boxes = torch.tensor([[[0.2, 0.4, 0.6, 0.5]]])
    change = torch.tensor([[[0.5, -1.0, math.log(2), math.log(0.5)]]])
    # middle (0.4, 0.45), size (0.4, 0.1) -> middle (0.6, 0.35), size (0.8, 0.05)
    torch.testing.assert_close(focusing.moved(boxes, change), torch.tensor([[[0.2, 0.325, 1.0, 0.375]]]))
    assert torch.allclose(focusing.moved(boxes, torch.zeros(1, 1, 4)), boxes)
    some = some_boxes()
    code = focusing.position_code(some, 24)
    for b in range(2):
        for n in range(3):
            torch.testing.assert_close(code[b, n], naive_code(some[b, n].tolist(), 24), rtol=1e-3, atol=2e-4)


def test_first_boxes_overlap_in_a_square_grid_and_the_rest_see_all():
    nine = focusing.initial_boxes(9)
    assert nine[0].tolist() == [0, 0, 0.5, 0.5] and nine[1].tolist() == [0.25, 0, 0.75, 0.5]
    assert nine[3].tolist() == [0, 0.25, 0.5, 0.75] and nine[8].tolist() == [0.5, 0.5, 1, 1]
    many = focusing.initial_boxes(48)
    assert many[35].tolist() == [0.5, 0.5, 1, 1] and (many[36:] == torch.tensor([0.0, 0, 1, 1])).all()
    assert focusing.initial_boxes(1).tolist() == [[0, 0, 1, 1]]


@torch.no_grad()
def test_adaptive_mixing_by_loops():
    torch.manual_seed(0)
    mixing, samples, tokens = AdaptiveMixing(16, 4, 3), torch.randn(2, 3, 4, 3), torch.randn(2, 3, 16)
    for module in (mixing, shaken(copy.deepcopy(mixing))):
        found = module(samples, tokens)
        for b in range(2):
            for n in range(3):
                expected = naive_mixing(module, samples[b, n], tokens[b, n])
                torch.testing.assert_close(found[b, n], expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_focusing_block_token_by_token():
    """Looking by the loops above; attention by torch's own module."""
    torch.manual_seed(0)
    block = shaken(FocusingBlock(128, 4, 3))
    assert block.heads == 2
    features, tokens, boxes = torch.randn(1, 3, 6, 5), torch.randn(1, 3, 128), some_boxes(1)
    look, seen = block.look, []
    for token, box in zip(tokens[0], boxes[0].tolist()):
        offsets = (look.offset(token) + look.offset_bias).view(4, 2).tolist()
        samples = torch.stack([naive_sample(features[0], *point) for point in naive_points(box, offsets)])
        seen.append(token + naive_mixing(look.mixing, samples, token) + look.place(naive_code(box, 128)))
    x = torch.stack(seen)[None]
    attention = torch.nn.MultiheadAttention(128, 2, batch_first=True)
    attention.in_proj_weight.copy_(block.qkv.weight), attention.in_proj_bias.copy_(block.qkv.bias)
    attention.out_proj.load_state_dict(block.joined.state_dict())
    normed = block.norm_attention(x)
    x = x + attention(normed, normed, normed)[0]
    x = x + block.feed_forward(block.norm_feed_forward(x))
    found, moved = block(tokens, boxes, features)
    torch.testing.assert_close(found, x, rtol=1e-3, atol=2e-3)
    change = block.move(x)[0]
    for box, new, (dx, dy, dw, dh) in zip(boxes[0].tolist(), moved[0].tolist(), change.tolist()):
        width, height = box[2] - box[0], box[3] - box[1]
        middle = (box[0] + box[2]) / 2 + dx * width, (box[1] + box[3]) / 2 + dy * height
        half = width * math.exp(dw) / 2, height * math.exp(dh) / 2
        expected = [middle[0] - half[0], middle[1] - half[1], middle[0] + half[0], middle[1] + half[1]]
        assert new == pytest.approx(expected, rel=1e-2, abs=1e-2)


@torch.no_grad()
def test_the_stem_is_a_quarter_as_fine_and_normalized_over_channels():
    features = focusing.Stem(3, 8)(torch.randn(2, 3, 32, 48))
    assert features.shape == (2, 8, 8, 12)
    deviation, mean = torch.std_mean(features, dim=1, correction=0)
    assert mean.abs().max() < 1e-5 and (deviation - 1).abs().max() < 1e-2


# ---------------------------------------------------------------- identities


@pytest.mark.parametrize("name", PREFIX)
@torch.no_grad()
def test_the_cortex_is_the_vits_own_later_blocks(name, monkeypatch):
    model, pixels = made(name), None
    pixels = pixels_for(model)
    embed = next(module for path, module in model.named_modules() if path.rpartition(".")[2] == "embeddings")
    reduced, report = applied(model, truncated=2, restore=False)
    monkeypatch.setattr(FocusedEmbeddings, "forward", lambda self, pixel_values, **options: embed(pixel_values))
    shallow = copy.deepcopy(model)
    stack = parts.blocks(shallow)[0].stack
    del shallow.get_submodule(stack)[:2]
    assert torch.equal(reduced.base_model(pixels).last_hidden_state, shallow.base_model(pixels).last_hidden_state)
    assert len(parts.blocks(reduced)) == 4 and report.figures["tokens"] == [PREFIX[name] + 4, PREFIX[name] + 16]


@pytest.mark.parametrize("name", PREFIX)
@torch.no_grad()
def test_cls_starts_from_what_the_vit_has_there(name):
    model = made(name)
    data = pictures(model)
    reduced, _ = applied(model, data, truncated=3)
    first = next(data.batches())["pixel_values"]
    entering = model.base_model(first, output_hidden_states=True).hidden_states[3]
    found = focusing.focused(reduced).cls_token[0]
    torch.testing.assert_close(found, entering[:, : PREFIX[name]].mean(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(focusing.focused(reduced)(first)[:, : PREFIX[name]], found.expand(4, -1, -1))


@torch.no_grad()
def test_boxes_stay_at_first_and_move_once_moving_is_learned():
    reduced, _ = applied(made(), tokens=9)
    reduced(pixels_for(reduced))
    assert torch.allclose(boxes_of(reduced), focusing.initial_boxes(9).expand(6, -1, -1), atol=1e-6)
    shaken(focusing.focused(reduced).focus.move, 3.0)
    reduced(pixels_for(reduced))
    moved = boxes_of(reduced)
    assert (moved[0] - moved[1]).abs().max() > 1e-4, "each image has its own boxes"
    assert ((moved[..., 2:] - moved[..., :2]) > 0).all()


@torch.no_grad()
def test_an_image_does_not_depend_on_the_others():
    reduced, _ = applied(made(), tokens=5)
    shaken(focusing.focused(reduced))
    pixels = pixels_for(reduced)
    whole = reduced(pixels).last_hidden_state
    for i in range(6):
        torch.testing.assert_close(reduced(pixels[i : i + 1]).last_hidden_state[0], whole[i], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_patches_get_the_state_of_the_latent_that_is_nearest():
    model = made("dinov2")
    bare, whole = (applied(model, tokens=5, restore=restore)[0] for restore in (False, True))
    shaken(focusing.focused(bare)), shaken(focusing.focused(whole))
    pixels = torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(0))
    short, full = bare(pixels).last_hidden_state, whole(pixels).last_hidden_state
    assert short.shape == (2, 6, 32) and full.shape == (2, 25, 32) and torch.equal(short[:, 0], full[:, 0])
    for i in range(2):
        middles = [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in boxes_of(whole)[i].tolist()]
        for patch in range(24):
            x, y = (patch % 6 + 0.5) / 6, (patch // 6 + 0.5) / 4
            nearest = min(range(5), key=lambda k: (middles[k][0] - x) ** 2 + (middles[k][1] - y) ** 2)
            assert torch.equal(full[i, 1 + patch], short[i, 1 + nearest])


# ---------------------------------------------------------------- training


def test_the_loss_is_one_minus_the_cosine_of_cls_and_the_teacher_sees_an_image_once():
    model = made("classifier")
    data = pictures(model)
    reduced, _ = applied(model, data)
    pixels = data.collate(data.items)["pixel_values"]
    wanted, found = (m.base_model(pixels).last_hidden_state[:, 0] for m in (model, reduced))
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(found.detach(), wanted.detach())]
    seen = []
    handle = model.vit.embeddings.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    whole = Data(data.items, batch_size=6)
    losses = align(reduced, Teacher(model), whole, [focusing.focused(reduced)], steps=3, learning_rate=1e-3)
    handle.remove()
    assert losses[0] == pytest.approx(1 - sum(cosines) / 6, abs=1e-5) and sum(seen) == 6


@pytest.mark.parametrize("settings, trained", [({}, (2, 3)), ({"tuned": 0}, ()), ({"ignore": ("layers.3",)}, (2,))])
def test_only_the_focusing_part_and_early_blocks_are_trained(settings, trained):
    model = made()
    reduced, report = applied(model, steps=3, learning_rate=1e-2, **settings)
    before, after = model.state_dict(), reduced.state_dict()
    changed = {key.split(".")[1] for key in before if key.startswith("layers.") and key in after
               and not torch.equal(before[key], after[key])}  # fmt: skip
    assert changed == {str(i) for i in trained} and not any(key.startswith(("layers.0.", "layers.1.")) for key in after)
    rest = [key for key in before if not key.startswith(("layers.", "embeddings."))]
    assert rest and all(torch.equal(before[key], after[key]) for key in rest)
    fresh, _ = applied(model, **settings)
    still = {key for key, value in focusing.focused(fresh).state_dict().items()
             if torch.equal(value, focusing.focused(reduced).state_dict()[key])}  # fmt: skip
    assert not still, "all of the focusing part learns"
    assert [change.name for change in report.changes if change.note == "trained"] == [f"layers.{i}" for i in trained]


def test_training_brings_cls_to_the_unchanged_vits():
    model = made("deit")
    data = pictures(model, n=8)
    pixels, found = data.collate(data.items)["pixel_values"], {}
    for steps in (0, 120):
        reduced, report = applied(model, data, steps=steps, learning_rate=5e-3)
        ours, theirs = (m(pixels).last_hidden_state[:, :2].detach() for m in (reduced, model))
        found[steps] = float(F.cosine_similarity(ours, theirs, dim=-1).mean())
    assert 1 - found[120] < 0.3 * (1 - found[0]), found
    assert report.figures["cosine with the unchanged CLS, in training"] == pytest.approx(found[120], abs=0.05)
    one = theirs.mean(0)
    constant = sum(float(F.cosine_similarity(one[k], image[k], dim=0)) for image in theirs for k in range(2)) / 16
    assert report.figures["that of one CLS for all images"] == pytest.approx(constant, abs=1e-4) and constant < found[120]


def test_a_box_finds_a_spot():
    """Where the answer is the brightness at a place, the box goes there by the gradient through the samples."""
    down, across = torch.meshgrid(torch.arange(16) / 16, torch.arange(16) / 16, indexing="ij")
    spot = torch.exp(-((across - 0.7) ** 2 + (down - 0.3) ** 2) / 0.05)[None, None]
    change, offsets = torch.zeros(1, 1, 4, requires_grad=True), Looking._spread(4).view(1, 1, 4, 2)
    optimizer = torch.optim.Adam([change], lr=0.05)
    for _ in range(60):
        boxes = focusing.moved(torch.tensor([[[0.25, 0.25, 0.75, 0.75]]]), change)
        loss = -focusing.sampled(spot, focusing.points_in(boxes, offsets)).mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    center, size = focusing.centers_and_sizes(boxes.detach()[0, 0])
    assert center.tolist() == pytest.approx([0.73, 0.33], abs=0.05) and (size < 0.4).all()


# ---------------------------------------------------------------- files and refusals


@pytest.mark.parametrize("name", ["deit", "registers"])
@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    reduced, _ = applied(made(name), steps=1)
    reduced.eval().save_pretrained(tmp_path, variant="formulary")
    again, pixels = type(reduced).from_pretrained(tmp_path).eval(), pixels_for(reduced)
    assert torch.equal(again(pixels).last_hidden_state, reduced(pixels).last_hidden_state)
    assert torch.equal(boxes_of(again), boxes_of(reduced)) and parts.count_weights(again) == parts.count_weights(reduced)


def test_half_precision_is_trained_in_float32_and_comes_back_so_on_failure_too():
    model = made().bfloat16()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(FormularyError, match="the loss is"):
        BootstrapSparseFormer(**{**SMALL, "steps": 40, "learning_rate": 1.0}).apply(model, with_nan(model))
    now = model.state_dict()
    assert all(torch.equal(now[key], state[key]) and now[key].dtype == torch.bfloat16 for key in state)
    reduced, _ = applied(model, steps=2)
    assert {parameter.dtype for parameter in reduced.parameters()} == {torch.bfloat16}
    out = reduced(pixels_for(model)).last_hidden_state
    assert out.dtype == torch.bfloat16 and torch.isfinite(out.float()).all()


def with_nan(model) -> Data:
    data = pictures(model)
    data.items[5]["pixel_values"][0, 0, 0] = torch.nan
    return data


def test_what_it_says():
    model = made()
    _, report = applied(model, tokens=16)
    assert "16 latents are no fewer than the 16 patches" in report.headline and "not trained" in report.headline
    large = made(image_size=64, patch_size=2, layers=3)
    _, report = applied(large, pictures(large), steps=1)
    assert report.figures["operations, of the unchanged model's"] < 0.5
    assert "trained for 1 steps on 6 images" in report.headline
    assert [(c.name, c.note) for c in report.changes] == [
        ("embeddings", "256 latents for 1024 patches"), ("layers.0", "left out"), ("layers.1", "trained"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [{"tokens": -1}, {"width": 18}, {"iterations": 0}, {"points": 1}, {"channels": 0}, {"truncated": -2}, {"tuned": -2},
     {"steps": -1}, {"learning_rate": 0.0}],
)  # fmt: skip
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(UsageError, match=f"bootstrap-sparseformer: {next(iter(wrong))}") as error:
        BootstrapSparseFormer(**wrong)
    assert "\n" not in str(error.value)


def test_what_it_cannot_do_is_refused_and_leaves_the_model_alone():
    model = made()
    for settings, said in (({"truncated": 6}, "must leave one of the 6"), ({"truncated": 3, "tuned": 4}, "at most 3")):
        with pytest.raises(UsageError, match=said):
            BootstrapSparseFormer(**SMALL, **settings).apply(model, pictures(model))
    assert edits.edits_of(model) == []
    backbone = t.Dinov2Backbone(t.Dinov2Config(image_size=28, patch_size=7, num_hidden_layers=3, **SIZES))
    with pytest.raises(FormularyError, match="reads a CLS token after its last block"):
        applied(backbone)
    reduced, _ = applied(model)
    with pytest.raises(FormularyError, match="no convolution that embeds patches"):
        applied(reduced, pictures(model))
    with pytest.raises(FormularyError, match="no bootstrap-sparseformer edits"):
        boxes_of(model)
    with pytest.raises(FormularyError, match="no image was looked at"):
        boxes_of(copy.deepcopy(reduced))
    with pytest.raises(FormularyError, match="bool_masked_pos"):
        reduced(pixels_for(model), bool_masked_pos=torch.zeros(6, 16, dtype=torch.bool))
    with pytest.raises(FormularyError, match="attention_mask"):
        reduced(pixels_for(model), attention_mask=torch.tensor([[1] * 17] * 5 + [[1] * 10 + [0] * 7]))
