"""What is true of TransKD alone: its losses and modules, what it reads of a model, and the student it leaves."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForSemanticSegmentation,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PvtV2Config,
    PvtV2ForImageClassification,
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerModel,
    Swinv2Config,
    Swinv2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.modeling_outputs import SemanticSegmenterOutput

from formulary.contracts import Data, parts
from formulary.errors import FormularyError, UsageError
from formulary.lab import small
from formulary.papers.distillation.transkd import TransKD
from formulary.papers.distillation.transkd.fusion import (
    CrossSelectiveFusion,
    GlobalLocalMixer,
    PatchEmbeddingAlignment,
    SelectiveKernel,
    channel_wise,
)
from formulary.papers.distillation.transkd.method import distil, embedding_loss, new_pupil, new_student, task_loss
from formulary.papers.distillation.transkd.stages import own_stages, reading

STAGED = {
    "num_encoder_blocks": 3, "depths": [2, 3, 1], "hidden_sizes": [8, 16, 32], "num_attention_heads": [1, 2, 4],
    "patch_sizes": [3, 3, 3], "strides": [2, 2, 2], "sr_ratios": [2, 1, 1], "mlp_ratios": [2, 2, 2], "num_labels": 3, "initializer_range": 0.2,
}  # fmt: skip


def staged(cls=SegformerForSemanticSegmentation):
    torch.manual_seed(0)
    if cls is PvtV2ForImageClassification:
        return cls(PvtV2Config(image_size=16, **STAGED)).eval()
    return cls(SegformerConfig(decoder_hidden_size=16, **STAGED)).eval()


def vit(cls=ViTModel, layers=6, **options):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_attention_heads": 4, "initializer_range": 0.2}
    if cls is Dinov2WithRegistersModel:
        return cls(Dinov2WithRegistersConfig(num_hidden_layers=layers, num_register_tokens=3, **sizes)).eval()
    return cls(ViTConfig(intermediate_size=48, num_hidden_layers=layers, **sizes, **options)).eval()


def pictures(n=6, side=16, maps=False, **options) -> Data:
    draw = torch.Generator().manual_seed(1)
    items = [{"pixel_values": torch.randn(3, side, side, generator=draw)} for _ in range(n)]
    if maps:
        items = [{**item, "labels": torch.randint(3, (side, side), generator=draw)} for item in items]
    return Data(items, batch_size=3, **options)


def hooks_of(model):
    """Hooks of this package; transformers leaves its own where states were asked for."""
    every = [hook for module in model.modules() for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())]
    return [hook for hook in every if hook.__module__.startswith("formulary")]


def of_batch(model, data, stages=3):
    batch = data.collate(data.items)
    with reading(model, stages) as features, torch.no_grad():
        assert hooks_of(model)
        out = model(pixel_values=batch["pixel_values"], output_hidden_states=True)
        return out, features(batch["pixel_values"])


# ---------------------------------------------------------------- losses and modules


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_channel_wise_distillation_is_torchs_kl_channel_by_channel(temperature):
    draw = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 5, 3, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    total = 0.0
    for image in range(2):
        for channel in range(5):
            p, q = (x[image, channel].flatten() / temperature for x in (teacher, student))
            total += float(F.kl_div(q.log_softmax(0), p.softmax(0), reduction="sum"))
    assert float(channel_wise(student, teacher, temperature)) == pytest.approx(temperature**2 * total / 10, rel=1e-10)
    shifted = teacher + torch.randn(2, 5, 1, 1, generator=draw, dtype=torch.float64)
    assert abs(float(channel_wise(shifted, teacher, temperature))) < 1e-12


def test_selective_kernel_weighs_two_branches_to_one():
    torch.manual_seed(0)
    fuse = SelectiveKernel(6, 4).train()
    x, y = torch.randn(2, 3, 6, 5, 5)
    weights = fuse.weights(x, y)
    assert weights.shape == (2, 3, 6, 1, 1) and weights.min() > 0
    torch.testing.assert_close(weights.sum(0), torch.ones(3, 6, 1, 1))
    torch.testing.assert_close(fuse(x, x), x)
    code = (x + y).mean((2, 3)) @ fuse.squeeze[0].weight[:, :, 0, 0].T
    code = ((code - code.mean(0)) / (code.var(0, correction=0) + 1e-5).sqrt()).relu()
    branches = [code @ branch.weight[:, :, 0, 0].T + branch.bias for branch in fuse.branches]
    by_hand = torch.sigmoid(branches[0] - branches[1])[..., None, None]
    torch.testing.assert_close(fuse(x, y), by_hand * x + (1 - by_hand) * y)


def test_the_fusion_goes_from_the_deepest_stage_up_and_not_back():
    torch.manual_seed(0)
    csf = CrossSelectiveFusion([3, 4, 5], [6, 7, 8]).eval()
    maps = [torch.randn(2, c, s, s, requires_grad=True) for c, s in ((3, 8), (4, 4), (5, 2))]
    found = csf(maps)
    assert [x.shape for x in found] == [(2, 6, 8, 8), (2, 7, 4, 4), (2, 8, 2, 2)]
    for stage, x in enumerate(found):
        grads = torch.autograd.grad(x.square().sum(), maps, retain_graph=True, allow_unused=True)
        assert [grad is not None for grad in grads] == [below >= stage for below in range(3)]
    deep = csf.enter[2](maps[2])
    middle = csf.fuse[1](csf.enter[1](maps[1]), deep.repeat_interleave(2, 2).repeat_interleave(2, 3))
    top = csf.fuse[0](csf.enter[0](maps[0]), middle.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(found[2], csf.leave[2](deep))
    torch.testing.assert_close(found[0], csf.leave[0](top))


def test_one_image_of_one_position_trains():
    csf = CrossSelectiveFusion([3, 4], [6, 7]).train()
    found = csf([torch.randn(1, 3, 2, 2), torch.randn(1, 4, 1, 1)])
    assert all(torch.isfinite(x).all() for x in found)


def test_the_mixer_is_torchs_attention_and_a_gated_convolution():
    torch.manual_seed(0)
    mixer, e = GlobalLocalMixer(8, 2), torch.randn(3, 5, 8)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    attention.load_state_dict(
        {
            "in_proj_weight": mixer.query_key_value.weight, "in_proj_bias": torch.zeros(24),
            "out_proj.weight": mixer.out.weight, "out_proj.bias": mixer.out.bias,
        }
    )  # fmt: skip
    local, gate = (F.conv1d(e.mT, c.weight, c.bias, padding=1) for c in (mixer.local, mixer.gate))
    nn.init.uniform_(mixer.weights)
    expected = mixer.weights[0] * attention(e, e, e)[0] + mixer.weights[1] * F.glu(torch.cat([local, gate], 1), 1).mT
    torch.testing.assert_close(mixer(e), expected)


def test_alignment_is_linear_and_assistants_embed_at_the_teachers_width():
    torch.manual_seed(0)
    student = staged()
    data = pictures()
    _, found = of_batch(student, data)
    inputs = [data.collate(data.items)["pixel_values"], *found.maps[:-1]]
    base = PatchEmbeddingAlignment([8, 16, 32], [12, 20, 36])
    for lift, e, out in zip(base.lift, found.embeddings, base(found.embeddings, inputs)):
        torch.testing.assert_close(out, e @ lift.weight.T + lift.bias)
    helped = PatchEmbeddingAlignment([8, 16, 32], [8, 16, 32], projections=[patch.proj for _, patch in own_stages(student)])
    for assistant, (_, patch), lift in zip(helped.assistants, own_stages(student), helped.lift):
        assistant.project.load_state_dict(patch.proj.state_dict())
        nn.init.eye_(lift.weight), nn.init.zeros_(lift.bias)
    for stage, (e, out) in enumerate(zip(found.embeddings, helped(found.embeddings, inputs))):
        torch.testing.assert_close(out, (0.1 * (stage + 1) + 0.1 * (stage + 4)) * e, rtol=1e-4, atol=1e-5)


def test_stage_weights_are_the_last_ones_of_fewer_stages():
    pairs = [(torch.zeros(2, 3), torch.full((2, 3), float(value))) for value in (1, 2, 3, 4, 5)]
    for stages, weights in ((1, [1.0]), (2, [0.5, 1]), (4, [0.1, 0.1, 0.5, 1]), (5, [0.1, 0.1, 0.1, 0.5, 1])):
        found, wanted = zip(*pairs[:stages])
        expected = sum(w * (i + 1) ** 2 for i, w in enumerate(weights))
        assert float(embedding_loss(found, wanted)) == pytest.approx(expected)


# ---------------------------------------------------------------- reading and student


@pytest.mark.parametrize("cls", [SegformerForSemanticSegmentation, PvtV2ForImageClassification])
def test_own_stages_are_read_as_the_model_gives_them(cls):
    model, data = staged(cls), pictures()
    out, found = of_batch(model, data)
    for ours, theirs in zip(found.maps, out.hidden_states):
        torch.testing.assert_close(ours, theirs)
    assert [tuple(e.shape) for e in found.embeddings] == [(6, 64, 8), (6, 16, 16), (6, 4, 32)]
    _, patch = own_stages(model)[1]
    with torch.no_grad():
        torch.testing.assert_close(found.embeddings[1], patch(out.hidden_states[0])[0])
    assert not hooks_of(model)


@pytest.mark.parametrize("cls,prefix", [(ViTModel, 1), (Dinov2WithRegistersModel, 4)])
def test_a_plain_vit_is_parted_into_stages_of_patches(cls, prefix):
    model, data = vit(cls), pictures()
    out, found = of_batch(model, data)
    for stage, (start, end) in enumerate(((0, 2), (2, 4), (4, 6))):
        torch.testing.assert_close(found.embeddings[stage], out.hidden_states[start][:, prefix:])
        if end < 6:
            torch.testing.assert_close(found.maps[stage].flatten(2).mT, out.hidden_states[end][:, prefix:])
    assert found.maps[2].shape == (6, 32, 4, 4)


def test_the_student_has_its_share_of_layers_and_width():
    student, origin = new_student(staged(), 0.5, 0.5)
    config = student.config
    assert (config.depths, config.hidden_sizes, config.decoder_hidden_size) == ([1, 2, 1], [4, 8, 16], 8)
    assert origin == "random weights" and [len(stage.blocks) for stage, _ in own_stages(student)] == [1, 2, 1]
    student, _ = new_student(vit(), 0.34, 0.6)
    assert (student.config.num_hidden_layers, student.config.hidden_size, student.config.intermediate_size) == (3, 20, 29)


def test_a_student_as_wide_starts_from_layers_at_equal_distances():
    for teacher in (vit(), staged()):
        student, origin = new_student(teacher, 0.5, 1.0)
        theirs, ours = parts.blocks(teacher), parts.blocks(student)
        chosen = [1, 3, 5] if len(theirs[0].stack.split(".")) == 1 or len(ours) == 3 else [1, 2, 4, 5]
        assert "teacher's weights" in origin and len(ours) == len(chosen)
        for block, index in zip(ours, chosen):
            state = theirs[index].module.state_dict()
            assert all(torch.equal(value, state[key]) for key, value in block.module.state_dict().items())
    other, origin = new_student(vit(), 0.5, 1.0, "random")
    assert origin == "random weights" and not torch.equal(other.layers[2].mlp.fc1.weight, vit().layers[5].mlp.fc1.weight)


# ---------------------------------------------------------------- training


def test_a_student_that_gives_the_teachers_features_has_no_loss_left():
    """With the teacher itself as the student, modules set to the identity, and its own classes as the task."""
    teacher, data = vit(), pictures()
    out, wanted = of_batch(teacher, data)
    pupil = new_pupil(copy.deepcopy(teacher), wanted, wanted)
    for lift in pupil.pea.lift:
        nn.init.eye_(lift.weight), nn.init.zeros_(lift.bias)
    assert embedding_loss(pupil.pea(wanted.embeddings, []), wanted.embeddings) == 0
    assert sum(channel_wise(a, b) for a, b in zip(wanted.maps, wanted.maps)) == 0
    assert task_loss(out, out, labeled=False) == 0


def test_the_loss_is_the_sum_of_its_terms(monkeypatch):
    seen = []
    teacher, data = staged(), pictures(maps=True)

    def record(pupil, batches, *, loss, **options):
        seen.append((float(loss(pupil, batches.collate(batches.items)).detach()), pupil))

    monkeypatch.setattr("formulary.lab.train", record)
    student, _ = new_student(teacher, 0.5, 0.5)
    terms = distil(teacher, student, data, stages=3, steps=1, learning_rate=1e-3, csf=0.3, pea=0.7, temperature=2.0)
    task, maps, aligned = terms[0]
    assert seen[0][0] == pytest.approx(task + 0.3 * maps + 0.7 * aligned, rel=1e-5) and min(terms[0]) > 0
    batch, pupil = data.collate(data.items), seen[0][1]
    with torch.no_grad():
        logits = F.interpolate(student(batch["pixel_values"]).logits, size=16, mode="bilinear", align_corners=False)
    assert task == pytest.approx(float(F.cross_entropy(logits, batch["labels"])), rel=1e-5)
    (_, wanted), (_, found) = of_batch(teacher, data), of_batch(student, data)
    with torch.no_grad():
        lifted = pupil.pea(found.embeddings, [])
        expected = [float(((a - b) ** 2).mean()) for a, b in zip(lifted, wanted.embeddings)]
    assert aligned == pytest.approx(0.1 * expected[0] + 0.5 * expected[1] + expected[2], rel=1e-5)


@pytest.mark.parametrize("embedding", ["base", "gl", "ea"])
def test_only_the_student_learns_and_only_it_is_saved(embedding, tmp_path):
    teacher, data = staged(), pictures(maps=True)
    state = {key: value.clone() for key, value in teacher.state_dict().items()}
    teacher.train()
    student, report = TransKD(steps=2, embedding=embedding).apply(teacher, data)
    assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items()) and teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not hooks_of(teacher) and not hooks_of(student)
    assert student.state_dict().keys() == type(student)(student.config).state_dict().keys() and not student.training
    student.save_pretrained(tmp_path)
    again, batch = AutoModelForSemanticSegmentation.from_pretrained(tmp_path).eval(), data.collate(data.items)
    with torch.no_grad():
        assert torch.equal(again(batch["pixel_values"]).logits, student(batch["pixel_values"]).logits)
    assert parts.count_weights(again) < 0.5 * parts.count_weights(teacher) and len(report.changes) == 4


def test_training_lowers_every_term():
    teacher, data = staged(), pictures(maps=True)
    student, _ = new_student(teacher, 0.5, 0.5)
    terms = distil(teacher, student, data, stages=3, steps=20, learning_rate=2e-2)
    first, last = (torch.tensor(terms[part]).mean(0) for part in (slice(0, 2), slice(-2, None)))
    assert (last < torch.tensor([1.0, 0.7, 0.7]) * first).all(), (first, last)


def test_what_the_task_is_is_said():
    headline = lambda model, data: TransKD(steps=1).apply(model, data)[1].headline
    classes = vit(ViTForImageClassification, num_labels=3)
    marks = [0, 1, 2, 0, 1, 2]
    assert "no labels" not in headline(classes, pictures(labels=marks))
    assert "teacher's classes" in headline(classes, pictures(labels=[3, *marks[1:]]))
    assert "teacher's classes" in headline(classes, pictures(labels=marks, facts={"classes": ["cat", "dog"]}))
    assert "teacher's classes" in headline(staged(), pictures(labels=marks))
    assert "no labels" not in headline(staged(), pictures(maps=True)) and "no labels" not in headline(
        staged(SegformerForImageClassification), pictures(labels=marks)
    )
    assert "teacher's last states" in headline(vit(), pictures(labels=marks))
    assert "nothing but CSF and PEA" in TransKD(steps=1, width=0.5).apply(vit(), pictures())[1].headline


def test_a_bare_hierarchical_model_keeps_the_shape_of_its_states():
    model, data = staged(SegformerModel), pictures()
    student, _ = TransKD(steps=1).apply(model, data)
    images = data.collate(data.items)["pixel_values"]
    assert student(images).last_hidden_state.shape == model(images).last_hidden_state.shape


@pytest.mark.parametrize(
    "wrong", [{"depth": 0.0}, {"width": 1.5}, {"steps": 0}, {"csf": -1.0}, {"temperature": 0.0}, {"targets": ("query",)}]
)
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(UsageError, match="transkd"):
        TransKD(**wrong)


def test_label_maps_of_other_classes_are_refused_and_ignored_pixels_are_not():
    data = pictures(maps=True)
    data.items[1]["labels"][0, 0] = 255
    assert "no labels" not in TransKD(steps=1).apply(staged(), data)[1].headline
    data.items[2]["labels"][3, 3] = 7
    with pytest.raises(FormularyError, match="have class 7, and the model has classes 0 to 2"):
        TransKD(steps=1).apply(staged(), data)


def test_models_that_it_cannot_read_are_refused():
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    swin = Swinv2Model(Swinv2Config(**sizes)).eval()
    with pytest.raises(FormularyError, match="a patch embedding in every stage"):
        TransKD(steps=1).apply(swin, pictures())
    with pytest.raises(UsageError, match="embedding=ea needs"):
        TransKD(steps=1, embedding="ea").apply(vit(), pictures())
    with pytest.raises(UsageError, match="no smaller"):
        TransKD(steps=1, depth=1.0).apply(vit(), pictures())
    with pytest.raises(FormularyError, match="does not support a decoder"):
        TransKD().apply(small.tiny("llama"), pictures())


def test_without_labels_the_task_is_the_teachers_classes():
    torch.manual_seed(0)
    ours, theirs = ({"logits": torch.randn(4, 3, *shape)} for shape in ((5, 5), (5, 5)))
    out, wanted = (SemanticSegmenterOutput(**one) for one in (ours, theirs))
    expected = 0.0
    for image, scores in zip(ours["logits"], theirs["logits"]):
        for y in range(5):
            for x in range(5):
                expected += float(image[:, y, x].logsumexp(0) - image[scores[:, y, x].argmax(), y, x]) / 100
    assert float(task_loss(out, wanted, labeled=False)) == pytest.approx(expected, rel=1e-5)
