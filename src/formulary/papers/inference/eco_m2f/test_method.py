"""What is true of ECO-M2F alone: depth an image at a time is a shallower model, exits in one pass, labels and the gate."""

import copy

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F
from transformers import Dinov2Backbone, Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification, ViTModel
from transformers import ViTForMaskedImageModeling

from formulary.contracts import Data, edits, parts
from formulary.errors import FormularyError, UsageError
from formulary.lab import small
from formulary.papers.inference.eco_m2f import EcoM2F, ExitBlock
from formulary.papers.inference.eco_m2f.exits import at_depth, depth_of, exit_outputs
from formulary.papers.inference.eco_m2f.method import best_exits, errors, fit_gate, parent_loss, quality

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "initializer_range": 0.2}
LAYERS = 4


def made(cls, layers: int = LAYERS, **options):
    torch.manual_seed(0)
    if cls is Dinov2Model:
        return cls(Dinov2Config(image_size=28, patch_size=7, num_hidden_layers=layers, **SIZES)).eval()
    config = ViTConfig(image_size=16, patch_size=4, intermediate_size=48, num_hidden_layers=layers, **SIZES, **options)
    return cls(config).eval()


def pictures(model, n: int = 6, **options) -> Data:
    pixels = small.inputs_for(model, batch=n)["pixel_values"] * torch.linspace(0.2, 3, n)[:, None, None, None]
    return Data([{"pixel_values": one} for one in pixels], batch_size=4, **options)


def shallow(model, depth: int):
    """transformers' own model of fewer layers, with the weights of the first ones."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = depth
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    new = type(model)(config).eval()
    known = new.state_dict().keys()
    new.load_state_dict({key: value for key, value in model.state_dict().items() if key in known})
    return new


def with_exits(model, seed: int = 3, first_exit: int = 1):
    """Exits, and a gate that sends images to all of them."""
    model, _ = EcoM2F(first_exit=first_exit, parent_steps=0).apply(model, pictures(model))
    gate = parts.blocks(model)[0].module.exit_gate
    with torch.no_grad():
        gate.weight.normal_(generator=torch.Generator().manual_seed(seed))
        gate.bias.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def value(model, batch):
    with torch.no_grad():
        out = model(**batch)
    return out.logits if "logits" in out else out.last_hidden_state


@pytest.mark.parametrize("cls", [ViTModel, Dinov2Model, ViTForImageClassification])
def test_each_image_is_what_a_model_of_its_depth_makes_of_it(cls):
    model = with_exits(made(cls))
    batch = pictures(model, n=10).collate(pictures(model, n=10).items)
    found, depths = value(model, batch), depth_of(model)
    assert len(set(depths.tolist())) > 2
    embedded = {}
    embeddings = next(module for name, module in model.named_modules() if name.endswith("embeddings"))
    handle = embeddings.register_forward_hook(lambda module, args, out: embedded.update(x=out))
    value(model, batch)
    handle.remove()
    gate = parts.blocks(model)[0].module.exit_gate
    assert depths.tolist() == (1 + (embedded["x"].mean(1) @ gate.weight.T + gate.bias).argmax(1)).tolist()
    for image, depth, one in zip(batch["pixel_values"], depths.tolist(), found):
        torch.testing.assert_close(one[None], value(shallow(model, depth), {"pixel_values": image[None]}), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [ViTModel, Dinov2Model, ViTForImageClassification])
def test_all_exits_of_one_pass_are_the_shallower_models(cls):
    model = with_exits(made(cls), first_exit=2)
    batch = pictures(model).collate(pictures(model).items)
    with torch.no_grad():
        found, features = exit_outputs(model, batch)
    assert len(found) == LAYERS - 1 and features.shape == (6, 32)
    for depth, one in zip(range(2, LAYERS + 1), found):
        torch.testing.assert_close(one, value(shallow(model, depth), batch), rtol=1e-4, atol=1e-5)
        with at_depth(model, depth):
            assert torch.equal(one, value(model, batch))
    assert parts.blocks(model)[0].module.exits.states == []


def test_blocks_compute_the_images_that_are_left_and_no_other():
    model = with_exits(made(ViTModel))
    batch, rows = pictures(model, n=10).collate(pictures(model, n=10).items), [0] * LAYERS
    for i, block in enumerate(parts.blocks(model)):
        count = lambda module, args, out, i=i: rows.__setitem__(i, rows[i] + len(out))
        block.module.mlp.register_forward_hook(count)
    value(model, batch)
    assert rows == [int((depth_of(model) > i).sum()) for i in range(LAYERS)] and rows[-1] < 10


@pytest.mark.parametrize("labels", [True, False])
def test_the_parents_loss_is_the_weighted_sum_over_exits(labels):
    cls = ViTForImageClassification if labels else ViTModel
    model, teacher = with_exits(made(cls), first_exit=2), made(cls)
    with torch.no_grad():
        model.base_model.layers[1].mlp.fc1.weight.add_(0.1)
    data, total = pictures(model), 0.0
    batch = data.collate(data.items)
    marks = torch.tensor([0, 1, 1, 0, 1, 0])
    for depth in range(2, LAYERS + 1):
        out = value(shallow(model, depth), batch)
        if labels:
            one = F.cross_entropy(out, marks)
        else:
            wanted = value(teacher, batch)
            pairs = [(a, b) for i in range(6) for a, b in zip(out[i], wanted[i])]
            one = sum(float(((a - b) ** 2).sum() / (b**2).sum()) for a, b in pairs) / len(pairs)
        total += depth / (2 + 3 + 4) * float(one)
    given = {**batch, "labels": marks} if labels else batch
    assert float(parent_loss(model, given, teacher=teacher, first_exit=2).detach()) == pytest.approx(total, rel=1e-3)


def test_qualities_and_errors_by_hand():
    found, states = torch.randn(2, 3, 5), torch.randn(2, 3, 4, 5)
    labels, wanted = torch.tensor([4, 0, 2]), torch.randn(3, 4, 5)
    for k in range(2):
        for i in range(3):
            assert float(quality(found, labels)[k, i]) == pytest.approx(float(found[k, i].softmax(0)[labels[i]]), rel=1e-5)
            assert float(errors(found, labels)[k, i]) == pytest.approx(-float(found[k, i].log_softmax(0)[labels[i]]), rel=1e-5)
            cosines = [float(F.cosine_similarity(a, b, dim=0)) for a, b in zip(states[k, i], wanted[i])]
            assert float(quality(states, wanted)[k, i]) == pytest.approx(sum(cosines) / 4, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.05, 0.4])
def test_the_best_exit_is_that_of_the_largest_utility(beta):
    qualities = torch.rand(5, 40, generator=torch.Generator().manual_seed(0))
    expected = [max(range(5), key=lambda k: float(qualities[k, i]) - beta * k) for i in range(40)]
    assert best_exits(qualities, beta).tolist() == expected


def test_the_gate_is_multinomial_logistic_regression_on_standardized_features():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 6, generator=generator) * torch.tensor([1.0, 10, 0.1, 3, 1, 1]) + 5
    labels = (features[:, 1] > 9).long() + 2 * (features[:, 0] > 5.5).long()
    weight, bias = fit_gate(features, labels, 4, decay=1e-2)
    deviation, mean = torch.std_mean(features, dim=0, correction=0)
    x = ((features - mean) / deviation).numpy()
    reference = LogisticRegression(C=1 / (2 * 200 * 1e-2), max_iter=5000, tol=1e-8).fit(x, labels.numpy())
    theirs = torch.from_numpy(reference.predict_proba(x)).float()
    torch.testing.assert_close((features @ weight.T + bias).softmax(1), theirs, rtol=0, atol=2e-3)


def test_another_beta_gives_another_gate_and_keeps_the_parent(tmp_path):
    model = made(ViTModel)
    data = pictures(model)
    model, first = EcoM2F(first_exit=1, parent_steps=2, beta=0.0).apply(model, data)
    state, before = {k: v.clone() for k, v in model.state_dict().items()}, edits.edits_of(model)
    value(model, data.collate(data.items))
    assert depth_of(model).tolist() == [LAYERS] * 6, "without a cost the full depth is best"
    assert "parent trained for 2 steps" in first.headline
    model, report = EcoM2F(first_exit=1, parent_steps=2, beta=1.0).apply(model, data)
    value(model, data.collate(data.items))
    assert depth_of(model).tolist() == [1] * 6 and report.figures["mean depth"] == 1.0
    changed = [key for key, kept in state.items() if not torch.equal(kept, model.state_dict()[key])]
    assert changed and all("exit_gate" in key for key in changed)
    assert "step A was not repeated" in report.headline and edits.edits_of(model) == before
    model.save_pretrained(tmp_path, variant="formulary")
    again, batch = ViTModel.from_pretrained(tmp_path).eval(), data.collate(data.items)
    assert torch.equal(value(again, batch), value(model, batch)) and depth_of(again).tolist() == [1] * 6


def test_training_brings_early_exits_to_the_unchanged_models_states():
    model = made(ViTModel)
    data = pictures(model, n=8)
    batch = data.collate(data.items)
    wanted = value(model, batch)
    found = {}
    for steps in (0, 40):
        changed, _ = EcoM2F(first_exit=2, parent_steps=steps, learning_rate=2e-3).apply(copy.deepcopy(model), data)
        with torch.no_grad():
            found[steps] = errors(exit_outputs(changed, batch)[0], wanted).mean(1)
    assert (found[40][:-1] < 0.7 * found[0][:-1]).all(), found


def test_what_images_are_judged_by_is_said():
    data = pictures(made(ViTModel), labels=[0, 1, 2, 0, 1, 2])
    judge = lambda model, data: EcoM2F(first_exit=1, parent_steps=0).apply(model, data)[1].headline
    assert "states of tokens" in judge(made(ViTModel), data)
    assert "judged" not in judge(made(ViTForImageClassification, num_labels=3), data)
    assert "classes that the unchanged model gives" in judge(made(ViTForImageClassification, num_labels=2), data)
    plain = Data([{**item, "labels": torch.tensor(1)} for item in data.items], batch_size=4)
    assert "judged" not in judge(made(ViTForImageClassification, num_labels=3), plain)


@pytest.mark.parametrize("wrong", [{"beta": -1.0}, {"first_exit": 0}, {"parent_steps": -1}, {"learning_rate": 0.0}, {"gate_decay": -1.0}])
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(UsageError, match=f"eco-m2f: {next(iter(wrong))}"):
        EcoM2F(**wrong)


def test_models_that_it_cannot_judge_are_refused_and_left_alone():
    backbone = Dinov2Backbone(Dinov2Config(image_size=28, patch_size=7, num_hidden_layers=2, out_features=["stage1"], **SIZES))
    masked = made(ViTForMaskedImageModeling)
    for model, said in ((backbone, "one stack of blocks"), (masked, "classes or states"), (made(ViTModel, 1), "beyond the 1 blocks")):
        with pytest.raises(FormularyError, match=said):
            EcoM2F(parent_steps=0).apply(model, pictures(model))
        assert not any(isinstance(module, ExitBlock) for module in model.modules())
    with pytest.raises(FormularyError, match="no eco-m2f edits"):
        depth_of(made(ViTModel))


def test_a_model_in_half_precision_comes_back_so():
    model = made(ViTModel, 2).to(torch.bfloat16)
    data = Data([{"pixel_values": item["pixel_values"].to(torch.bfloat16)} for item in pictures(model).items], batch_size=4)
    changed, _ = EcoM2F(first_exit=1, parent_steps=2).apply(model, data)
    assert {p.dtype for name, p in changed.named_parameters() if "exit_gate" not in name} == {torch.bfloat16}
