"""What is true of one-shot magnitude pruning alone: torch's masks, zeros that stay, a planted knee that is found."""

import copy

import numpy as np
import pytest
import torch
from torch.nn.utils import prune
from transformers import ViTConfig, ViTForImageClassification

from formulary.contracts import Data, parts
from formulary.errors import FormularyError, UsageError
from formulary.lab import small, train
from formulary.papers.pruning.essential_sparsity import EssentialSparsity, magnitude_masks, mask_cosine, share_below
from formulary.papers.pruning.essential_sparsity import check as experiment
from formulary.papers.pruning.essential_sparsity.method import Judge, group_masks


def texts(n: int = 8, length: int = 10) -> Data:
    seeded = [torch.Generator().manual_seed(i) for i in range(n)]
    ids = [torch.randint(3, 97, (length - i % 4,), generator=generator) for i, generator in enumerate(seeded)]
    return Data([{"input_ids": row} for row in ids], batch_size=4)


def loud_bert():
    """A tiny BERT whose linears matter: at their usual size, without any of them its outputs hardly change."""
    model = small.tiny("bert")
    for part in parts.linears(model):
        part.raw.data.mul_(10)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "t5"])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_the_zeros_are_those_of_torch(family, sparsity):
    theirs, ours = small.tiny(family), small.tiny(family)
    chosen = [(part.module, "weight") for part in parts.linears(theirs)]
    prune.global_unstructured(chosen, pruning_method=prune.L1Unstructured, amount=sparsity)
    EssentialSparsity(sparsity=sparsity).apply(ours)
    for (module, _), part in zip(chosen, parts.linears(ours)):
        assert torch.equal(module.weight, part.raw), part.name


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_equal_weights_do_not_change_how_many_are_dropped(family):
    """On a coarse grid most weights are tied, as they are in a quantized checkpoint and in bfloat16."""
    model = small.tiny(family)
    linears = parts.linears(model)
    for part in linears:
        part.raw.data.copy_((part.raw.data * 20).round() / 20)
    every = np.concatenate([part.raw.detach().abs().numpy().ravel() for part in linears])
    for level, masks in zip((0.2, 0.55, 0.83), magnitude_masks(linears, (0.2, 0.55, 0.83))):
        kept = np.concatenate([mask.numpy().ravel() for mask in masks])
        assert (~kept).sum() == round(level * len(every))
        assert every[~kept].max() <= every[kept].min()


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_n_of_m_keeps_the_largest_of_each_group_of_inputs(family):
    model = small.tiny(family)
    linears = parts.linears(model)
    before = [part.weight().clone() for part in linears]
    EssentialSparsity(pattern="2:4").apply(model)
    for part, old in zip(linears, before):
        wanted = old.clone().reshape(-1, 4)
        for group in wanted:
            for i in sorted(range(4), key=lambda i: abs(float(group[i])))[:2]:
                group[i] = 0
        assert torch.equal(part.weight(), wanted.reshape(old.shape))


def test_groups_that_do_not_fit_are_skipped_and_said():
    _, report = EssentialSparsity(pattern="1:64").apply(small.tiny("llama"))
    assert {skip.note for skip in report.skips} == {"inputs are no multiple of 64"} and len(report.changes) == 2
    with pytest.raises(FormularyError, match="no multiple of 48"):
        EssentialSparsity(pattern="1:48").apply(small.tiny("llama"))


def test_fine_tuning_equals_training_of_torch_pruned_weights():
    """The masked gradient is that of w * m, also where its norm is clipped; so the trained weights are the same."""
    data = texts()
    ours, theirs = small.tiny("llama"), small.tiny("llama")
    _, report = EssentialSparsity(sparsity=0.5, steps=5, learning_rate=1e-2).apply(ours, data)
    chosen = [(part.module, "weight") for part in parts.linears(theirs)]
    prune.global_unstructured(chosen, pruning_method=prune.L1Unstructured, amount=0.5)

    def loss(model, batch):
        return model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss

    train(theirs, data, steps=5, lr=1e-2, loss=loss)
    for module, name in chosen:
        prune.remove(module, name)
    for (name, a), (_, b) in zip(sorted(ours.named_parameters()), sorted(theirs.named_parameters())):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    assert share_below(ours, 1e-30) == 0.5
    assert "fine-tuned for 5 steps" in report.headline


@pytest.mark.parametrize("steps", [0, 1])
def test_a_planted_knee_is_found(steps):
    """Two fifths of the weights are made negligible; beyond them, real ones go."""
    model = loud_bert()
    linears = parts.linears(model)
    for part, mask in zip(linears, next(magnitude_masks(linears, [0.4]))):
        part.raw.data.copy_(torch.where(mask, part.raw, 1e-7 * part.raw))
    before = copy.deepcopy(model)
    method = EssentialSparsity(tolerance=1e-4, steps=steps, learning_rate=1e-7)
    _, report = method.apply(model, texts())
    assert report.figures["essential sparsity"] == 0.4 and "essential sparsity 40 %" in report.headline
    curve = report.tables["performance by sparsity"]
    assert [row["sparsity"] for row in curve] == [0.0, *method.levels] and curve[5]["relative drop"] > 1e-4
    if not steps:
        for ours, old in zip(parts.linears(model), parts.linears(before)):
            large = old.raw.abs() > 1e-5
            assert torch.equal(ours.raw[large], old.raw[large])
        assert share_below(model, 1e-30) == pytest.approx(0.4, abs=1e-4)
        assert share_below(before, 1e-5) == pytest.approx(0.4, abs=1e-3)


def test_no_free_level_is_an_error_and_changes_nothing():
    model = loud_bert()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FormularyError, match="raise tolerance"):
        EssentialSparsity(levels=(0.6, 0.9), tolerance=1e-6, steps=2, learning_rate=1e-3).apply(model, texts())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_padding_plays_no_part():
    """One text at a time has no padding; four at a time have."""
    found = []
    for size in (1, 4):
        data = Data(texts().items, batch_size=size)
        _, report = EssentialSparsity(levels=(0.1, 0.5), tolerance=1.0).apply(loud_bert(), data)
        found.append([row["cosine with the dense outputs"] for row in report.tables["performance by sparsity"]])
    assert found[0] == pytest.approx(found[1], abs=1e-5) and found[0][2] < 0.999


def test_a_language_model_is_judged_by_its_loss():
    model, data = small.tiny("gpt2"), texts()
    total = count = 0
    for item in data.items:
        ids = item["input_ids"]
        logs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        total, count = total - float(logs[torch.arange(len(ids) - 1), ids[1:]].sum().detach()), count + len(ids) - 1
    judge = Judge(model, data, 0, 1e-3, True)
    assert judge.measure == "probability per token"
    assert judge.score([], []) == pytest.approx(np.exp(-total / count), rel=1e-4)


def test_a_classifier_is_judged_by_its_accuracy():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_labels": 3}
    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, **sizes)).eval()
    images = torch.randn(8, 3, 16, 16)
    said = model(images).logits.argmax(-1)
    marks = (said + torch.tensor([1, 1, 0, 0, 0, 0, 0, 0])) % 3
    items = [{"pixel_values": image, "labels": mark} for image, mark in zip(images, marks)]
    judge = Judge(model, Data(items, batch_size=3), 0, 1e-3, True)
    assert judge.measure == "accuracy" and judge.score([], []) == 0.75


def test_the_cosine_of_masks():
    linears = parts.linears(small.tiny("llama"))
    half, same, fewer = magnitude_masks(linears, (0.5, 0.5, 0.75))
    assert mask_cosine(half, same) == 1.0 and mask_cosine(half, [~mask for mask in half]) == 0.0
    flat = [torch.cat([mask.flatten() for mask in masks]).double() for masks in (half, fewer)]
    assert mask_cosine(half, fewer) == pytest.approx(float(torch.nn.functional.cosine_similarity(*flat, dim=0)))
    assert mask_cosine(group_masks(linears, 1, 2), half) < 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"sparsity": 0.0}, {"sparsity": 1.0}, {"levels": ()}, {"levels": (0.5, 0.2)}, {"levels": (0.5, 1.5)},
        {"tolerance": -0.1}, {"steps": -1}, {"learning_rate": 0.0}, {"pattern": "4:2"}, {"pattern": "2-4"},
        {"pattern": "2:4", "sparsity": 0.5},
    ],
)  # fmt: skip
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(UsageError, match="essential-sparsity"):
        EssentialSparsity(**wrong)


def test_the_search_without_data_is_refused():
    with pytest.raises(FormularyError, match="needs data"):
        EssentialSparsity().apply(small.tiny("bert"))


def test_the_check_compares_masks_of_the_same_size():
    """Tickets, whose rounds are nested, drop as many weights as one shot does; so do random masks."""
    seen, ids = [], torch.randint(3, 97, (8, 10), generator=torch.Generator().manual_seed(0))
    data = Data([{"input_ids": row, "labels": row} for row in ids])
    context = {"model": small.tiny("llama"), "data": data}
    for way in (experiment.one_shot, experiment.at_random, experiment.iterative):
        seen.append(share_below(way(context, 0.3), 1e-30))
    assert seen == pytest.approx([0.3] * 3, abs=1e-4) and experiment.check.method == "one shot"
