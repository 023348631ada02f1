"""What is true of MiniLM alone: its loss, what the loss may see, and the student it makes."""

import copy
import math

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel

from formulary.contracts import Data
from formulary.errors import FormularyError, UsageError
from formulary.lab import small
from formulary.papers.distillation.minilm import MiniLM
from formulary.papers.distillation.minilm.method import (
    Projections,
    attention_loss,
    distil,
    last_projections,
    minilm_loss,
    new_student,
    refuse_other_attention,
    spaced,
    value_loss,
)


def projections(heads=2, size=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return Projections(*(torch.randn(2, heads, 5, size, generator=generator, dtype=dtype) for _ in range(3)))


REAL = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0]]).bool()


def texts(n=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 97, (7 + i % 4,), generator=generator)} for i in range(n)]


def deep(layers=4, width=32, heads=4):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=2 * width,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return BertModel(config).eval()


def naive(teacher, student, pairs) -> float:
    """The paper's sums, one number at a time."""

    def softmax_row(a, b, x, head, t):
        keys = [j for j in range(5) if REAL[x, j]]
        scores = [sum(float(p) * float(q) for p, q in zip(a[x, head, t], b[x, head, j])) / math.sqrt(a.shape[-1]) for j in keys]
        total = sum(math.exp(s) for s in scores)
        return [math.exp(s) / total for s in scores]

    by_text = []
    for x in range(2):
        total = 0.0
        for one, other in pairs:
            for head in range(teacher.query.shape[1]):
                for t in (t for t in range(5) if REAL[x, t]):
                    p = softmax_row(getattr(teacher, one), getattr(teacher, other), x, head, t)
                    q = softmax_row(getattr(student, one), getattr(student, other), x, head, t)
                    total += sum(a * math.log(a / b) for a, b in zip(p, q))
        by_text.append(total / (teacher.query.shape[1] * int(REAL[x].sum())))
    return sum(by_text) / 2


def test_the_loss_is_the_papers_sum_also_across_head_sizes():
    teacher, student = projections(size=4), projections(size=3, seed=1)
    at, vr = [("query", "key")], [("value", "value")]
    assert float(attention_loss(teacher, student, REAL)) == pytest.approx(naive(teacher, student, at), rel=1e-12)
    assert float(value_loss(teacher, student, REAL)) == pytest.approx(naive(teacher, student, vr), rel=1e-12)
    assert float(minilm_loss(teacher, student, REAL)) == pytest.approx(naive(teacher, student, at + vr), rel=1e-12)


def test_what_stands_at_padding_is_not_seen():
    teacher, student = projections(), projections(seed=1)
    expected = minilm_loss(teacher, student, REAL)
    for made in (teacher, student):
        for tensor in made:
            tensor.masked_fill_(~REAL[:, None, :, None], 1e3)
    torch.testing.assert_close(minilm_loss(teacher, student, REAL), expected, rtol=0, atol=0)


def test_different_numbers_of_heads_are_refused():
    with pytest.raises(FormularyError, match="the student has 3 heads, the teacher 2"):
        minilm_loss(projections(heads=2), projections(heads=3), REAL)


@pytest.mark.parametrize("family", small.ENCODERS)
def test_the_captured_attention_is_the_models_own(family):
    model = small.tiny(family)
    refuse_other_attention(model, small.inputs_for(model))
    assert not any(module._forward_hooks for module in model.modules())
    batch = small.inputs_for(model)
    with last_projections(model) as seen, torch.no_grad():
        model(**batch)
        one = seen()
        model(**batch)
        assert minilm_loss(one, seen(), batch["attention_mask"].bool()) == 0


def test_attention_of_another_kind_is_refused(monkeypatch):
    model = small.tiny("bert")
    monkeypatch.setattr(model.encoder.layer[-1].attention.self, "scaling", 1.0)
    with pytest.raises(FormularyError, match="is another"):
        refuse_other_attention(model, small.inputs_for(model))


def test_only_the_student_learns_and_only_up_to_its_last_queries_keys_and_values():
    teacher = deep()
    state = {key: value.clone() for key, value in teacher.state_dict().items()}
    next(teacher.parameters()).requires_grad_(False)
    teacher.encoder.layer[1].train()
    modes, flags = [m.training for m in teacher.modules()], [p.requires_grad for p in teacher.parameters()]
    student, report = MiniLM(steps=4).apply(teacher, Data(texts(), batch_size=4))
    assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())
    assert [m.training for m in teacher.modules()] == modes and [p.requires_grad for p in teacher.parameters()] == flags
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(module._forward_hooks for module in [*teacher.modules(), *student.modules()])
    still = {key for key, value in student.encoder.layer[1].state_dict().items() if torch.equal(value, state[f"encoder.layer.3.{key}"])}
    assert {key.split(".")[0] for key in still} >= {"intermediate", "output"} and "attention.output.dense.weight" in still
    assert not any(".self." in key and "weight" in key for key in still)
    moved = student.encoder.layer[0].output.dense.weight - state["encoder.layer.1.output.dense.weight"]
    assert 0 < moved.abs().max() < 0.05
    assert "got no gradient" in report.headline and "layers 2, 4 of 4" in report.headline and len(report.changes) == 2


def test_distillation_brings_the_relations_of_new_texts_closer():
    teacher = deep()
    new = Data(texts(4, seed=9)).collate(texts(4, seed=9))

    def gap(student):
        with last_projections(teacher) as wanted, last_projections(student) as ours, torch.no_grad():
            teacher(**new), student(**new)
            return float(minilm_loss(wanted(), ours(), new["attention_mask"].bool()))

    torch.manual_seed(0)
    student, _ = new_student(teacher, 2, 32)
    before = gap(student)
    losses = distil(teacher, student, Data(texts(32), batch_size=8), steps=12, learning_rate=2e-3)
    assert gap(student) < 0.95 * before and losses[-1] < losses[0]


def test_a_narrow_student_has_an_assistant_between():
    teacher, data = deep(), Data(texts(), batch_size=4)
    student, report = MiniLM(steps=2, layers=2, width=16).apply(teacher, data)
    assert (student.config.num_hidden_layers, student.config.hidden_size, student.config.intermediate_size) == (2, 16, 32)
    assert "assistant of 4 layers, width 16, from random weights" in report.headline
    for setting in ({"width": 16, "layers": 2, "assistant": False}, {"width": 16, "layers": 3}, {"width": 20, "layers": 2}):
        assert "assistant" not in MiniLM(steps=1, **setting).apply(teacher, data)[1].headline


def test_the_student_is_a_smaller_plain_directory(tmp_path):
    teacher = deep()
    student, report = MiniLM(steps=2).apply(teacher, Data(texts()))
    teacher.save_pretrained(tmp_path / "teacher"), student.save_pretrained(tmp_path / "student")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("teacher", "student")]
    loaded = AutoModel.from_pretrained(tmp_path / "student")
    assert len(loaded.encoder.layer) == loaded.config.num_hidden_layers == 2 and sizes[1] < 0.75 * sizes[0]
    assert 0 < report.coverage < 1


def test_a_seed_fixes_the_student_whatever_the_callers_random_state():
    teacher, data = deep(), Data(texts(), batch_size=4, seed=5)
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(MiniLM(steps=2, start="random").apply(copy.deepcopy(teacher), data)[0].state_dict())
    assert all(torch.equal(value, made[1][key]) for key, value in made[0].items())


def test_layers_are_taken_at_equal_distances_with_the_last():
    assert [spaced(12, 6), spaced(6, 1), spaced(3, 3)] == [[1, 3, 5, 7, 9, 11], [5], [0, 1, 2]]


def test_models_and_sizes_that_do_not_fit_are_refused():
    data = Data(texts())
    with pytest.raises(UsageError, match="4 heads, which do not divide width=30; try 32"):
        MiniLM(width=30, steps=1).apply(deep(width=40), data)
    with pytest.raises(UsageError, match="must be smaller"):
        MiniLM(layers=4).apply(deep(), data)
    with pytest.raises(FormularyError, match="does not support a decoder"):
        MiniLM().apply(small.tiny("llama"), data)
    fused = deep()
    fused.encoder.layer[-1].attention.self.query = torch.nn.Identity()
    with pytest.raises(FormularyError, match="needs separate query, key and value"):
        MiniLM().apply(fused, data)


@pytest.mark.parametrize("wrong", [{"layers": 0}, {"steps": 0}, {"learning_rate": 0.0}, {"targets": ("query",)}])
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(UsageError, match="minilm"):
        MiniLM(**wrong)
