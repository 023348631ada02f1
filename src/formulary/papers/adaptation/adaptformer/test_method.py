"""AdaptFormer: starts as the identity, trains its branches and the head alone, and computes the paper's equation."""

import copy

import pytest
import torch

from formulary.contracts import BlockEdit, Data, parts
from formulary.contracts.edits import edits_of
from formulary.errors import FormularyError, UsageError
from formulary.lab.small import inputs_for, tiny
from formulary.papers.adaptation.adaptformer import AdaptFormer, ParallelBranch
from formulary.papers.adaptation.adaptformer.method import Bottleneck
from formulary.papers.token_reduction.gtp_vit import GTP


def images(model, n=8, labels=(0, 1, 2), **options):
    pixels = inputs_for(model, batch=n, seed=3)["pixel_values"]
    items = [{"pixel_values": p, "labels": torch.tensor(labels[i % len(labels)])} for i, p in enumerate(pixels)]
    return Data(items, batch_size=4, **options)


def classifier(labels=3):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    widths = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=labels, **widths)).eval()


def scaled_dinov2():
    """A DINOv2 whose LayerScale is far from 1, so that a branch inside it would show."""
    model = tiny("dinov2")
    with torch.no_grad():
        for block in parts.blocks(model):
            block.module.layer_scale2.lambda1.mul_(0.01)
    return model


# ---------------------------------------------------------------- identity and equation


def test_untrained_it_gives_the_same_logits_bit_for_bit():
    model = classifier()
    inputs = inputs_for(model)
    expected = model(**inputs).logits
    adapted, report = AdaptFormer(steps=0).apply(model, images(model))
    assert adapted is model and torch.equal(adapted(**inputs).logits, expected)
    assert "new head" not in report.headline


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_a_bare_backbone_gets_a_head_and_keeps_its_features(name):
    model = tiny(name)
    inputs = inputs_for(model)
    before = copy.deepcopy(model.state_dict())
    adapted, report = AdaptFormer(steps=0).apply(model, images(model, facts={"classes": ["cat", "dog", "hen"]}))
    assert type(adapted).__name__.endswith("ForImageClassification") and adapted.config.id2label[2] == "hen"
    assert torch.equal(adapted.base_model(**inputs).last_hidden_state, model(**inputs).last_hidden_state)
    assert "a new head of 3 classes" in report.headline
    assert {p.data_ptr() for p in model.parameters()}.isdisjoint(p.data_ptr() for p in adapted.parameters())
    assert edits_of(model) == [] and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_head_of_another_size_is_replaced_and_the_model_given_stays():
    model = classifier(labels=7)
    adapted, _ = AdaptFormer(steps=1).apply(model, images(model))
    assert adapted is not model and adapted.config.num_labels == 3 and model.config.num_labels == 7


@pytest.mark.parametrize("build", [tiny, scaled_dinov2], ids=["vit", "dinov2 with LayerScale"])
@torch.no_grad()
def test_a_block_computes_the_equation(build):
    model = build("vit") if build is tiny else build()
    adapted, _ = AdaptFormer(bottleneck=5, scale=0.3, steps=0).apply(model, images(model))
    plain, block = parts.blocks(model)[1].module, parts.blocks(adapted)[1].module
    branch = block.adaptformer
    for parameter in branch.parameters():
        parameter.copy_(torch.randn_like(parameter))
    hidden = torch.randn(2, 17, 32)
    at_feed_forward = []
    norm = plain.layernorm_after if hasattr(plain, "layernorm_after") else plain.norm2
    norm.register_forward_pre_hook(lambda _, args: at_feed_forward.append(args[0]))
    expected = plain(hidden)
    h = at_feed_forward[0]
    for b in range(2):
        for t in range(17):
            x = h[b, t]
            x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * branch.norm.weight + branch.norm.bias
            low = torch.stack([(w * x).sum() for w in branch.down.weight]) + branch.down.bias
            low = torch.where(low > 0, low, torch.zeros_like(low))
            expected[b, t] += 0.3 * (torch.stack([(w * low).sum() for w in branch.up.weight]) + branch.up.bias)
    torch.testing.assert_close(block(hidden), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_it_adds_to_what_another_edit_puts_beside_the_feed_forward():
    class Halved(BlockEdit):
        def branch(self, hidden):
            return hidden / 2

    model, hidden = tiny("vit"), torch.randn(1, 17, 32)
    Halved.attach(model, "layers.0")
    expected = model.layers[0](hidden)
    ParallelBranch.attach(model, "layers.0", width=32, bottleneck=2, scale=1.0, learnable_scale=False, norm=False)
    model.layers[0].adaptformer.up.bias.fill_(3.0)
    torch.testing.assert_close(model.layers[0](hidden), expected + 3)


# ---------------------------------------------------------------- what is trained


@pytest.mark.parametrize("learnable, norm", [(False, True), (True, False)])
def test_only_branches_and_head_change_and_all_of_them_do(learnable, norm):
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    method = AdaptFormer(bottleneck=4, steps=4, learnable_scale=learnable, norm=norm)
    adapted, report = method.apply(model, images(model))
    after = adapted.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before if not k.startswith("classifier"))
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])
    fresh = Bottleneck(32, 4, 0.1, learnable, norm).state_dict()
    for block in parts.blocks(adapted):
        trained = block.module.adaptformer.state_dict()
        assert trained.keys() == fresh.keys() and float(trained["up.weight"].abs().max()) > 0
        assert float(trained["down.bias"].abs().max()) > 0
        if learnable:
            assert float(trained["scale"]) != pytest.approx(0.1, abs=1e-9)
    assert {name: p.requires_grad for name, p in adapted.named_parameters() if name in flags} == flags
    assert report.figures["trained weights"] == sum(change.weights for change in report.changes) + 3 * 32 + 3


@pytest.mark.parametrize("learnable, norm, extra", [(False, False, 0), (False, True, 64), (True, True, 65)])
def test_the_number_of_weights_is_the_formula(learnable, norm, extra):
    branch = Bottleneck(32, 5, 0.1, learnable, norm)
    assert parts.count_weights(branch) == 2 * 32 * 5 + 5 + 32 + extra


def test_at_real_size_it_trains_under_five_percent():
    from transformers import ViTConfig, ViTModel

    with torch.device("meta"):
        model = ViTModel(ViTConfig())
        branches = sum(parts.count_weights(Bottleneck(768, 64, 0.1, False, True)) for _ in parts.blocks(model))
    assert branches == 12 * (2 * 768 * 64 + 64 + 768 + 2 * 768)
    assert 0.01 < branches / parts.count_weights(model) < 0.02


def test_training_lowers_the_loss_and_is_the_same_under_a_seed():
    model = tiny("dinov2")
    data = images(model)
    first, report = AdaptFormer(bottleneck=8, steps=30).apply(model, data)
    assert report.figures["loss of the last tenth, nats"] < 0.5 * report.figures["loss of the first step, nats"]
    second, _ = AdaptFormer(bottleneck=8, steps=30).apply(model, data)
    inputs = inputs_for(model)
    assert torch.equal(first(**inputs).logits, second(**inputs).logits)


def test_a_last_batch_of_one_image_trains():
    model = tiny("vit")
    adapted, _ = AdaptFormer(bottleneck=4, steps=6).apply(model, images(model, n=9))
    assert all(bool(value.isfinite().all()) for value in adapted.state_dict().values())


# ---------------------------------------------------------------- saving, stacking, refusing


def test_saved_and_loaded_with_a_new_head_and_on_top_of_another_method(tmp_path):
    reduced, _ = GTP(tokens_per_layer=3).apply(tiny("vit"))
    adapted, _ = AdaptFormer(bottleneck=4, steps=2).apply(reduced, images(reduced))
    inputs = inputs_for(adapted)
    assert torch.equal(
        AdaptFormer(steps=0).apply(reduced, images(reduced))[0].base_model(**inputs).last_hidden_state,
        reduced(**inputs).last_hidden_state,
    )
    adapted.eval().save_pretrained(tmp_path, variant="formulary")
    loaded = type(adapted).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, adapted(**inputs).logits)
    assert loaded.classifier.weight.shape == (3, 32)


def test_labels_may_be_names_beside_the_items():
    model = tiny("vit")
    items = [{"pixel_values": item["pixel_values"]} for item in images(model).items]
    adapted, _ = AdaptFormer(steps=1, bottleneck=2).apply(model, Data(items, labels=["b", "a"] * 4))
    assert adapted.config.id2label == {0: "a", 1: "b"}


def test_a_failure_while_training_leaves_the_model_as_it_was():
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    data = images(model)
    data.items[5]["pixel_values"] = data.items[5]["pixel_values"] * float("nan")
    with pytest.raises(FormularyError, match="loss is nan"):
        AdaptFormer(bottleneck=4, steps=4).apply(model, data)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and edits_of(model) == []


@pytest.mark.parametrize("wrong", [{"bottleneck": 0}, {"lr": 0.0}, {"steps": -1}])
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        AdaptFormer(**wrong)


def test_data_and_models_that_do_not_fit_are_refused_in_one_line():
    from transformers import SwinConfig, SwinModel

    vit = tiny("vit")
    unlabeled = Data([{"pixel_values": torch.zeros(3, 16, 16)}])
    swin = SwinModel(SwinConfig(image_size=32, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4))
    cases = {
        "trains on labels": (vit, unlabeled),
        "at least two classes": (vit, images(vit, labels=(0,))),
        "no seam is known": (swin, images(swin)),
        "does not support an encoder": (tiny("bert"), unlabeled),
    }
    for says, (model, data) in cases.items():
        with pytest.raises(FormularyError, match=says) as error:
            AdaptFormer(steps=1).apply(model, data)
        assert "\n" not in str(error.value)
