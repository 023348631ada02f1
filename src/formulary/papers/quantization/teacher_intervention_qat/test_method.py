"""What is true of Teacher Intervention alone: TWN against a loop, the three splices and what they cut, and that a spliced
pass is the teacher's own where nothing else differs.
"""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM

from formulary.contracts import parts
from formulary.errors import UsageError
from formulary.lab.small import inputs_for, tiny
from formulary.papers.quantization.teacher_intervention_qat.attention import (
    ClippedAttention,
    attentions,
    clipped,
    find_places,
    taped,
)
from formulary.papers.quantization.teacher_intervention_qat.method import (
    TeacherIntervention,
    TernaryEmbedding,
    TernaryLinear,
    imitation,
    stage,
    ternary,
)


def with_attention(kind: str, seed: int = 0):
    """A tiny model whose linears matter, with watched attention of full precision."""
    model = tiny(kind, seed=seed)
    with torch.no_grad():
        for part in parts.linears(model):
            part.raw.mul_(4)
    for mixer in parts.mixers(model):
        ClippedAttention.attach(model, mixer.name, clip=None)
    return model


@pytest.mark.parametrize("by_row", [False, True])
def test_levels_and_scales_against_a_loop(by_row):
    w = torch.randn(4, 33).clamp(-2.5, 2.5)
    levels, scale = ternary(w, by_row)
    for i, row in enumerate(w.tolist()):
        group = row if by_row else w.flatten().tolist()
        threshold = 0.7 * sum(map(abs, group)) / len(group)
        beyond = [abs(v) for v in group if abs(v) > threshold]
        assert float(scale[i if by_row else 0]) == pytest.approx(sum(beyond) / len(beyond), rel=1e-5)
        assert levels[i].tolist() == [0 if abs(v) <= threshold else (1 if v > 0 else -1) for v in row]
    assert scale.shape == ((4, 1) if by_row else (1, 1))


def test_weights_pass_gradients_within_the_clip():
    w = torch.tensor([[0.3, -0.1, 3.0, -0.5]], requires_grad=True)
    levels, scale = ternary(w, False)
    (levels * scale * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert w.grad.tolist() == [pytest.approx([1.0, 2.0, 0.0, 4.0])]


def test_activations_are_clipped_and_have_at_most_255_values():
    x = (4 * torch.randn(3, 2000)).requires_grad_()
    out = clipped(x, 2.5)
    out.sum().backward()
    assert all(len(row.unique()) <= 255 for row in out) and float(out.detach().abs().max()) == 2.5
    assert torch.equal(x.grad == 0, x.detach().abs() > 2.5)
    assert float((out - x.clamp(-2.5, 2.5)).detach().abs().max()) <= 2.5 / 254 * 1.001


def test_the_stored_layers_compute_what_the_trained_ones_did():
    layer, table = TernaryLinear(70, 6), TernaryEmbedding(6, 70, bits=2)
    x, ids = torch.randn(3, 70), torch.tensor([[4, 1]])
    for module, given in ((layer, x), (table, ids)):
        module.start(torch.randn(6, 70))
        before = module(given).detach()
        module.finish()
        assert torch.equal(module(given), before)
    assert layer.scale.unique().numel() == 1 and table.scale.unique().numel() == 6


@pytest.mark.parametrize("causal", [False, True])
def test_attention_without_a_clip_is_attention(causal):
    q, k, v = torch.randn(3, 2, 3, 9, 8).unbind()
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    mask[0, ..., 6:] = False
    bias = torch.randn(1, 3, 9, 9)
    ours = ClippedAttention(clip=None)
    seen = mask.tril() if causal else mask
    torch.testing.assert_close(
        ours.attend(q, k, v, mask=mask, causal=causal), F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    )
    torch.testing.assert_close(ours.attend(q, k, v, bias=bias), F.scaled_dot_product_attention(q, k, v, attn_mask=bias))


def test_the_stages_are_those_of_the_released_code():
    for steps in (3, 60, 120):
        for step in range(steps + 5):
            wanted = "output" if step < steps / 6 else "context" if step < steps / 3 else "map" if step < steps else None
            assert stage(step, steps) == wanted
    assert stage(0, 0) is None


@pytest.mark.parametrize("kind", ["bert", "albert", "vit", "dinov2"])
def test_places_are_where_the_model_has_them(kind):
    model = with_attention(kind)
    places = find_places(model, inputs_for(model, batch=1))
    layers = 1 if kind == "albert" else 2
    ends = lambda names: {name.rpartition(".")[2] for name in names}
    assert len(places.inputs) == 2 * layers and len(places.outputs) == len(places.behind) == layers
    assert ends(places.inputs) in ({"query", "key"}, {"q_proj", "k_proj"})
    assert ends(places.outputs) <= {"dense", "o_proj"} and ends(places.behind) <= {"dense", "ffn", "fc1"}
    assert all("intermediate" in name for name in places.behind) or kind != "bert"


@pytest.mark.parametrize("kind", ["bert", "albert", "vit"])
@pytest.mark.parametrize("splice", ["output", "context", "map"])
def test_a_splice_takes_the_teachers_and_no_gradient_passes_it(kind, splice):
    """The student has other queries and keys, and for a splice behind them other values and projections too: with the
    teacher's tensors in their place it computes what the teacher does.
    """
    teacher = with_attention(kind)
    student, batch = copy.deepcopy(teacher), inputs_for(teacher)
    places = find_places(teacher, batch)
    assert all(attention.tape is None for attention in attentions(teacher))
    order = [part.name for part in parts.linears(teacher)]
    values = [name for name in order if name.endswith(("value", "v_proj"))]
    broken = {"map": places.inputs, "context": [*places.inputs, *values]}
    broken = broken.get(splice, [*places.inputs, *values, *places.outputs])
    with torch.no_grad():
        for name in broken:
            student.get_submodule(name).weight.normal_()
    with taped(teacher, places) as theirs, taped(student, places, theirs) as ours:
        target, own = teacher(**batch).last_hidden_state, student(**batch).last_hidden_state
        assert not torch.allclose(own, target, atol=1e-2)
        theirs.clear(), ours.clear()
        ours.splice = splice
        with torch.no_grad():
            teacher(**batch)
        spliced = student(**batch).last_hidden_state
        torch.testing.assert_close(spliced, target)
        spliced.square().sum().backward()
        for name in broken:
            grad = student.get_submodule(name).weight.grad
            assert grad is None or not grad.any()
        last = student.get_submodule(places.behind[-1]).weight.grad
        assert last.any()
        assert len(ours.calls) == len(theirs.calls) == 2 and len(ours.entered) == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())


def test_queries_and_keys_repair_only_their_own_layer():
    """Under a splice the second layer's scores move no weight of the first; without one they do."""
    teacher = with_attention("bert")
    student, batch = with_attention("bert", seed=1), inputs_for(teacher)
    places = find_places(teacher, batch)
    first = student.get_submodule(places.behind[0]).weight
    for splice, moved in (("map", False), (None, True)):
        first.grad = None
        with taped(teacher, places) as theirs, taped(student, places, theirs) as ours:
            teacher(**batch)
            ours.splice = splice
            student(**batch)
            ours.calls[1].scores.square().sum().backward()
        assert (first.grad is not None and bool(first.grad.any())) == moved


def test_the_loss_is_its_formula_without_padding():
    teacher = with_attention("bert")
    student, batch = with_attention("bert", seed=1), inputs_for(teacher)
    places, one = find_places(teacher, batch), {key: value[1:] for key, value in batch.items()}
    with taped(teacher, places) as theirs, taped(student, places, theirs) as ours, torch.no_grad():
        loss = float(imitation(student, teacher, ours, theirs, one))
        a, b = (m(**one, output_hidden_states=True).hidden_states for m in (student, teacher))
        ours.clear(), theirs.clear()
        teacher(**one), student(**one)
        wanted = sum(F.mse_loss(x, y) for x, y in zip(a, b))
        wanted += sum(F.mse_loss(x.scores, y.scores) for x, y in zip(ours.calls, theirs.calls))
        wanted += sum(F.mse_loss(x, y) for x, y in zip(ours.attended, theirs.attended))
        assert loss == pytest.approx(float(wanted), rel=1e-4)
        other = dict(batch, input_ids=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 55))
        padded = [float(imitation(student, teacher, ours, theirs, given)) for given in (batch, other)]
        assert padded[0] == pytest.approx(padded[1], rel=1e-5)


def test_training_brings_it_closer_to_the_teacher(distance_to_teacher):
    before, _, _ = distance_to_teacher(TeacherIntervention(steps=1, intervention_steps=0, embeddings=False))
    after, model, report = distance_to_teacher(
        TeacherIntervention(steps=40, intervention_steps=20, learning_rate=3e-3, embeddings=False)
    )
    assert after < 0.7 * before and report.figures["attentions intervened in"] == 2
    assert all(attention.tape is None for attention in attentions(model))


def test_the_clip_is_that_of_every_quantizer(data_for):
    model, _ = TeacherIntervention(steps=1, intervention_steps=1, clip=1.5).apply(tiny("vit"), data_for(tiny("vit")))
    clips = [module.clip for module in model.modules() if isinstance(module, TernaryLinear | ClippedAttention)]
    assert clips == [1.5] * 14


def test_with_targets_attention_stays_and_it_is_said(data_for):
    model = tiny("bert")
    _, report = TeacherIntervention(steps=1, intervention_steps=1, targets=("query",)).apply(model, data_for(model))
    assert "no intervention" in report.headline and not attentions(model) and len(report.changes) == 2


@pytest.mark.parametrize("wrong", [{"intervention_steps": 61}, {"intervention_steps": -1}, {"clip": 0.0}, {"steps": 0}])
def test_parameters_out_of_range_are_refused_in_one_line(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        TeacherIntervention(**wrong)


def test_a_table_that_a_head_shares_stays_and_it_is_said(data_for):
    config = BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    model = BertForMaskedLM(config)
    changed, report = TeacherIntervention(steps=1, intervention_steps=1).apply(model, data_for(tiny("bert")))
    assert not any(isinstance(module, TernaryEmbedding) for module in changed.modules())
    assert changed.get_input_embeddings().weight is changed.get_output_embeddings().weight and "tied" in report.headline
