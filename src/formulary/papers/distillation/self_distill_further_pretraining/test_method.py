"""What is true of self-distillation for further pre-training alone: what is hidden, the loss by hand, where the student starts,
who learns, how far it goes, and what is saved.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel, ViTModel

from formulary.contracts import Data
from formulary.contracts.report import Report
from formulary.errors import FormularyError, UsageError
from formulary.lab.small import tiny
from formulary.papers.distillation.self_distill_further_pretraining.masking import (
    Pixels,
    Tokens,
    choose_patches,
    hide_tokens,
    patches_of,
)
from formulary.papers.distillation.self_distill_further_pretraining.method import (
    SelfDistillation,
    distance,
    representation,
)

TOKENIZER = SimpleNamespace(mask_token_id=4, all_special_ids=[0, 1, 2, 4])


def images(n=8, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Data([{"pixel_values": torch.randn(3, size, size, generator=generator)} for _ in range(n)], batch_size=4)


def texts(n=8, seed=0, processor=TOKENIZER):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda i: torch.cat([torch.tensor([1]), torch.randint(5, 97, (7 + i % 3,), generator=generator), torch.tensor([2])])
    return Data([{"input_ids": draw(i)} for i in range(n)], batch_size=4, processor=processor)


def mae(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 1}
    options = {"image_size": 16, "patch_size": 4, "norm_pix_loss": True, "decoder_intermediate_size": 128, **options}
    return ViTMAEForPreTraining(ViTMAEConfig(**sizes, **decoder, **options)).eval()


def states(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# ---------------------------------------------------------------- what is hidden


@pytest.mark.parametrize(("count", "share", "kept"), [(16, 0.75, 4), (49, 0.75, 12), (10, 0.9, 1), (4, 0.99, 1), (4, 0.01, 3)])
def test_as_many_patches_stay_in_every_image_and_each_is_as_likely(count, share, kept):
    torch.manual_seed(0)
    visible, restore, hidden = choose_patches(4000, count, share)
    assert visible.shape == (4000, kept) and (hidden.sum(1) == count - kept).all()
    for row in range(5):
        assert set(visible[row].tolist()) == set((~hidden[row]).nonzero().flatten().tolist())
        assert [restore[row, i] for i in visible[row]] == list(range(kept))
    assert ((~hidden).float().mean(0) - kept / count).abs().max() < 0.04


def test_tokens_are_hidden_as_in_bert():
    torch.manual_seed(0)
    ids = torch.randint(5, 10_000, (200, 500))
    free = torch.ones_like(ids, dtype=torch.bool)
    free[:, :50] = False
    shown, asked = hide_tokens(ids, free, 0.15, 4, 10_000)
    assert not asked[:, :50].any() and torch.equal(shown[~asked], ids[~asked])
    assert float(asked[:, 50:].float().mean()) == pytest.approx(0.15, abs=0.005)
    masked, same = (shown == 4)[asked].float().mean(), (shown == ids)[asked].float().mean()
    assert float(masked) == pytest.approx(0.8, abs=0.01) and float(same) == pytest.approx(0.1, abs=0.01)


def test_only_real_tokens_are_asked_for(monkeypatch):
    from formulary.papers.distillation.self_distill_further_pretraining import masking

    seen = []
    original = hide_tokens
    monkeypatch.setattr(masking, "hide_tokens", lambda ids, free, *rest: seen.append((ids, free)) or original(ids, free, *rest))
    SelfDistillation(steps=3).apply(tiny("bert"), texts())
    for ids, free in seen:
        assert torch.equal(free, ids >= 5)


# ---------------------------------------------------------------- the loss


def test_the_masked_loss_of_images_is_that_of_transformers_mae():
    """A ViT with the weights of a ViT-MAE, and its decoder, on the same draw of patches."""
    theirs = mae(mask_ratio=0.75)
    ours = ViTModel(tiny("vit").config, add_pooling_layer=False).eval()
    with torch.no_grad():
        theirs.decoder.decoder_pos_embed.normal_()
        theirs.vit.embeddings.position_embeddings.normal_()
        ours.load_state_dict(theirs.vit.state_dict())
    pixels = next(images().batches())["pixel_values"]
    task = Pixels(ours, pixels, 0.75, 32, 1)
    task.decoder.load_state_dict(theirs.decoder.state_dict())
    torch.manual_seed(5)
    noise = torch.rand(4, 16)
    torch.manual_seed(5)
    with torch.no_grad():
        assert float(task(ours, {"pixel_values": pixels})) == pytest.approx(float(theirs(pixels, noise=noise).loss), rel=1e-5)
    assert not ours.embeddings._forward_hooks
    mean, deviation = patches_of(pixels, 4).mean(-1), patches_of(pixels, 4).std(-1)
    assert mean.abs().max() < 1e-5 and (deviation - 1).abs().max() < 1e-5


def test_hidden_patches_are_not_seen_and_leading_tokens_are():
    model, batch = tiny("dinov2"), next(images(size=28).batches())
    task, seen = Pixels(model, batch["pixel_values"], 0.75, 32, 1), []
    handle = model.encoder.layer[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torch.manual_seed(3)
    task(model, batch)
    torch.manual_seed(3)
    kept, _, hidden = choose_patches(4, 16, 0.75)
    handle.remove()
    whole = model.embeddings(batch["pixel_values"])
    for row in range(4):
        torch.testing.assert_close(seen[0][row], whole[row, [0, *(1 + kept[row]).tolist()]])
    assert seen[0].shape == (4, 5, 32) and hidden.sum() == 48


@pytest.mark.parametrize("family", ["bert", "albert"])
@torch.no_grad()
def test_the_masked_loss_of_texts_by_hand(family):
    model, batch = tiny(family), next(texts().batches())
    task = Tokens(model, 0.4, 4, TOKENIZER.all_special_ids)
    torch.manual_seed(5)
    loss = float(task(model, batch))
    torch.manual_seed(5)
    shown, asked = hide_tokens(batch["input_ids"], batch["input_ids"] >= 5, 0.4, 4, 97)
    hidden = model(input_ids=shown, attention_mask=batch["attention_mask"]).last_hidden_state
    total = 0.0
    for row, place in asked.nonzero().tolist():
        state = task.norm(F.gelu(task.dense(hidden[row, place])))
        scores = [float(state @ word + bias) for word, bias in zip(model.get_input_embeddings().weight, task.bias)]
        total += float(torch.tensor(scores).logsumexp(0)) - scores[batch["input_ids"][row, place]]
    assert loss == pytest.approx(total / int(asked.sum()), rel=1e-4)


def test_a_masked_language_model_is_asked_through_its_own_head():
    config = BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    model, batch = BertForMaskedLM(config).eval(), next(texts().batches())
    task = Tokens(model, 0.4, 4, TOKENIZER.all_special_ids)
    torch.manual_seed(5)
    loss = task(model, batch).item()
    torch.manual_seed(5)
    shown, asked = hide_tokens(batch["input_ids"], batch["input_ids"] >= 5, 0.4, 4, 97)
    labels = batch["input_ids"].masked_fill(~asked, -100)
    wanted = model(input_ids=shown, attention_mask=batch["attention_mask"], labels=labels).loss
    assert task.own and not list(task.parameters()) and loss == pytest.approx(wanted.item(), rel=1e-5)
    before = states(model)
    changed, report = SelfDistillation(steps=2).apply(model, texts())
    assert "BertForMaskedLM is trained too" in report.headline and "new head" not in report.headline
    assert not torch.equal(changed.cls.predictions.transform.dense.weight, before["cls.predictions.transform.dense.weight"])


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_distance_by_hand_and_without_gradient_to_the_teacher(pool):
    model, teacher, batch = tiny("bert"), tiny("bert", seed=1), next(texts().batches())
    with torch.no_grad():
        a, b = model(**batch).last_hidden_state, teacher(**batch).last_hidden_state
    total = 0.0
    for row in range(4):
        real = batch["attention_mask"][row].bool()
        x, y = (h[row, 0] if pool == "cls" else h[row][real].mean(0) for h in (a, b))
        total += sum(float(p - q) ** 2 for p, q in zip(x, y))
    found = distance(model, teacher, batch, pool)
    assert found.item() == pytest.approx(total / 4, rel=1e-4)
    found.backward()
    assert all(p.grad is None for p in teacher.parameters()) and model.embeddings.word_embeddings.weight.grad.any()
    noise = dict(batch, input_ids=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 55))
    assert distance(model, teacher, noise, pool).item() == pytest.approx(found.item(), rel=1e-4)


def test_a_mae_shows_its_whole_image_to_the_representation():
    model = mae(mask_ratio=0.75)
    pixels = next(images().batches())["pixel_values"]
    whole = ViTModel(tiny("vit").config, add_pooling_layer=False).eval()
    whole.load_state_dict(model.vit.state_dict())
    torch.testing.assert_close(representation(model, {"pixel_values": pixels}), whole(pixels).last_hidden_state[:, 0])
    assert model.config.mask_ratio == 0.75


# ---------------------------------------------------------------- the stages


def watched(method, model, data, monkeypatch):
    """The weights, head and teacher with which each stage starts and ends."""
    seen, learn = [], SelfDistillation.learn

    def spy(self, module, loss, data, steps, stage=0):
        teacher = getattr(loss, "keywords", {}).get("teacher")
        entry = {"start": states(module), "teacher": teacher, "teacher before": teacher and states(teacher), "loss": loss}
        losses = learn(self, module, loss, data, steps, stage)
        seen.append({**entry, "end": states(module), "teacher after": teacher and states(teacher)})
        return losses

    monkeypatch.setattr(SelfDistillation, "learn", spy)
    changed, report = method.apply(model, data)
    return changed, report, seen


@pytest.mark.parametrize(("family", "data"), [("vit", images()), ("bert", texts())])
def test_every_stage_starts_at_theta_0_bit_for_bit_with_the_frozen_result_of_the_last_as_teacher(family, data, monkeypatch):
    model = tiny(family)
    before = {f"model.{name}": value for name, value in states(model).items()}
    changed, report, seen = watched(SelfDistillation(steps=2, rounds=2, head_steps=2), model, data, monkeypatch)
    head, *stages = seen
    assert changed is model and len(stages) == 3 and not any(name.startswith("model.") for name in head["start"])
    assert any(not torch.equal(head["start"][name], value) for name, value in head["end"].items())
    for number, stage in enumerate(stages):
        wanted = before | {f"task.{name}": value for name, value in head["end"].items()}
        assert stage["start"].keys() == wanted.keys()
        assert all(torch.equal(stage["start"][name], value) for name, value in wanted.items())
        if number:
            teacher = stage["teacher before"]
            assert all(torch.equal(value, stages[number - 1]["end"][f"model.{name}"]) for name, value in teacher.items())
            assert all(torch.equal(value, teacher[name]) for name, value in stage["teacher after"].items())
            assert not any(p.requires_grad for p in stage["teacher"].parameters()) and not stage["teacher"].training
    assert all(torch.equal(value, stages[-1]["end"][f"model.{name}"]) for name, value in states(changed).items())
    assert stages[0]["teacher"] is None and "distilled, round 2" in report.headline


def test_the_loss_of_a_round_is_the_sum():
    method, model, teacher = SelfDistillation(weight=0.3), tiny("vit"), tiny("vit", seed=1)
    batch = next(images().batches())
    task = Pixels(model, batch["pixel_values"], 0.75, 32, 1)
    whole, values = torch.nn.ModuleDict({"model": model, "task": task}), []
    for run in (lambda: method.loss(whole, batch, teacher=teacher), lambda: task(model, batch)):
        torch.manual_seed(2)
        values.append(run().item())
    assert values[0] == pytest.approx(values[1] + 0.3 * distance(model, teacher, batch).item(), rel=1e-5)


def test_distillation_holds_the_student_to_its_teacher_and_the_distances_are_those_reported():
    """With a large weight the student ends nearer to the teacher's representations than without."""
    data, gaps = images(16), {}
    batch = data.collate(data.items)
    settings = {"steps": 25, "head_steps": 1, "learning_rate": 3e-3, "decoder_width": 32}
    teacher, _ = SelfDistillation(rounds=0, **settings).apply(tiny("vit"), data)
    for weight in (0.0, 10.0):
        model, start = tiny("vit"), tiny("vit")
        student, report = SelfDistillation(weight=weight, **settings).apply(model, data)
        gaps[weight] = distance(student, teacher, batch).item()
        for name, one in (("further pre-trained", teacher), ("distilled, round 1", student)):
            pairs = zip(one.parameters(), start.parameters(), strict=True)
            wanted = sum((a - b).square().sum().item() for a, b in pairs) ** 0.5
            assert report.figures[f"distance from the start, {name}"] == pytest.approx(wanted, rel=1e-4)
    assert gaps[10.0] < 0.5 * gaps[0.0]


def test_what_the_caller_froze_stays(monkeypatch):
    model = tiny("vit")
    model.embeddings.requires_grad_(False)
    before = states(model)
    SelfDistillation(steps=2, head_steps=1).apply(model, images())
    same = {name for name, value in states(model).items() if torch.equal(value, before[name])}
    assert all(name in same for name in before if name.startswith("embeddings.")) and len(same) < len(before) / 2
    with pytest.raises(FormularyError, match="requires a gradient"):
        SelfDistillation(steps=2).apply(model.requires_grad_(False), images())


# ---------------------------------------------------------------- what comes out


@pytest.mark.parametrize(("family", "data"), [("vit", images()), ("bert", texts())])
def test_the_head_is_not_in_the_saved_file(family, data, tmp_path):
    model = tiny(family)
    changed, report = SelfDistillation(steps=1, head_steps=1).apply(copy.deepcopy(model), data)
    names = []
    for one in (model, changed):
        one.save_pretrained(tmp_path)
        names.append(set(load_file(tmp_path / "model.safetensors")))
    assert names[0] == names[1] and "thrown away" in report.headline
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, changed.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_vit_mae_trains_its_own_decoder_and_gives_a_vit():
    model = mae()
    before = states(model)
    changed, report = SelfDistillation(steps=2).apply(model, images())
    ViTModel(tiny("vit").config, add_pooling_layer=False).load_state_dict(changed.vit.state_dict())
    moved = {name for name, value in states(changed).items() if not torch.equal(value, before[name])}
    assert any(name.startswith("decoder.") for name in moved) and any(name.startswith("vit.layers") for name in moved)
    assert "vit.embeddings.position_embeddings" not in moved and "ViTMAEForPreTraining is trained too" in report.headline


def test_without_a_mask_token_it_is_said_and_tokens_become_random():
    ids = torch.full((50, 40), 7)
    shown, asked = hide_tokens(ids, ids == 7, 0.5, None, 97)
    assert float((shown != ids)[asked].float().mean()) > 0.95 and torch.equal(shown[~asked], ids[~asked])
    _, report = SelfDistillation(steps=1).apply(tiny("bert"), texts(processor=None))
    assert "no mask token" in report.headline


def test_models_whose_patches_cannot_be_hidden_are_refused():
    bare = ViTMAEModel(mae().config)
    with pytest.raises(FormularyError, match="give the ViTMAEForPreTraining"):
        SelfDistillation().apply(bare, images())
    oblong = Data([{"pixel_values": torch.randn(3, 28, 42)}] * 4)
    with pytest.raises(FormularyError, match="square images"):
        SelfDistillation().apply(tiny("dinov2"), oblong)


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"rounds": -1}, {"mask": 1.0}, {"weight": -1.0}, {"decoder_width": 40}, {"targets": ("query",)}],
)
def test_parameters_out_of_range_are_refused_in_one_line(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SelfDistillation(**wrong)


def test_labels_are_not_looked_at():
    data = images()
    labeled = Data([dict(item, labels=torch.tensor(1)) for item in data.items], batch_size=4)
    made = [SelfDistillation(steps=2, head_steps=1).apply(tiny("vit"), one)[0] for one in (data, labeled)]
    assert all(torch.equal(a, b) for a, b in zip(made[0].parameters(), made[1].parameters()))
    assert isinstance(SelfDistillation(steps=1).apply(tiny("vit"), labeled)[1], Report)
