"""What is true of MOHAWK alone: the mixer in its three forms, the three losses, and models that keep a state."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from formulary.contracts import Data, parts
from formulary.contracts.layer import RecurrentState
from formulary.errors import FormularyError, UsageError
from formulary.lab import small
from formulary.papers.distillation.mohawk import DiscreteMamba2, Mohawk
from formulary.papers.distillation.mohawk.method import alignment, imitation, match, orientation, windows

FAMILIES = ["llama", "qwen2", "mixtral", "gpt2", "opt"]
UNTRAINED = {"state": 8, "orient_steps": 0, "align_steps": 0, "steps": 0}


def loud(family: str = "llama"):
    """A tiny model whose linears matter."""
    model = small.tiny(family)
    for part in parts.linears(model):
        part.raw.data.mul_(8)
    return model


def texts(n: int = 8, length: int = 11, **options) -> Data:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 97, (length - i % 3,), generator=generator) for i in range(n)]
    return Data([{"input_ids": row} for row in rows], batch_size=4, **options)


def random_layer(dtype=torch.float32, **sizes) -> DiscreteMamba2:
    """A layer with nothing at its starting value."""
    torch.manual_seed(0)
    layer = DiscreteMamba2(**{"width": 12, "heads": 3, "head_dim": 4, "state": 5, "bias": True, **sizes}).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def by_definition(layer: DiscreteMamba2, u: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Outputs (B,L,D) and matrices (B,H,L,L) in float64, pair of tokens by pair of tokens."""
    weights = {name: p.detach().double().numpy() for name, p in layer.named_parameters()}
    u = u.double().numpy()
    heads, (batch, length, _) = layer.heads, u.shape
    joined = np.concatenate([u @ weights[f"{name}_proj.weight"].T for name in "xbc"], -1)
    taps = weights["filter"]
    mixed = np.zeros_like(joined)
    for t in range(length):
        for back in range(len(taps)):
            if t - back >= 0:
                mixed[:, t] += taps[len(taps) - 1 - back] * joined[:, t - back]
    mixed += weights["filter_bias"]
    x, b, c = (m.reshape(batch, length, heads, -1) for m in np.split(mixed, np.cumsum(layer.sizes)[:2], -1))
    a = 1 / (1 + np.exp(u @ weights["a_proj.weight"].T))
    matrix = np.zeros((batch, heads, length, length))
    for i in range(length):
        for j in range(i + 1):
            kept = a[:, j + 1 : i + 1].prod(1)
            matrix[:, :, i, j] = kept * (c[:, i] * b[:, j]).sum(-1) + weights["skip"] * (i == j)
    y = np.einsum("bhij,bjhk->bihk", matrix, x).reshape(batch, length, -1)
    z = u @ weights["z_proj.weight"].T + weights["z_bias"]
    return (y * z / (1 + np.exp(-z))) @ weights["o_proj.weight"].T + weights["o_proj.bias"], matrix


# ---------------------------------------------------------------- the mixer


@pytest.mark.parametrize("length,conv", [(1, 4), (5, 4), (33, 1), (70, 4)])
def test_all_forms_are_the_definition(length, conv):
    layer, u = random_layer(conv=conv), torch.randn(2, length, 12, generator=torch.Generator().manual_seed(1))
    expected, matrix = by_definition(layer, u)
    with torch.no_grad():
        whole = layer(u)
        np.testing.assert_allclose(whole, expected, atol=1e-5, rtol=1e-4)
        np.testing.assert_allclose(layer.matrix(u), matrix, atol=1e-5, rtol=1e-4)
        state, pieces = layer.initial_state(u), []
        for start in range(0, length, 25):
            y, state = layer.scan(u[:, start : start + 20], None, state)
            pieces.append(y)
            for t in range(start + 20, min(start + 25, length)):
                y, state = layer.step(u[:, t], state)
                pieces.append(y[:, None])
        assert sum(t[0].numel() for t in state) == layer.state_size(length)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-4)


def test_gradients_through_the_kernel_are_those_of_the_matrix():
    """y = T x, once by the recurrence and once by all pairs."""
    layer, u = random_layer(), 0.3 * torch.randn(2, 40, 12)

    def by_matrix():
        x = layer._inputs(u, None, layer.initial_state(u)[1])[0]
        return layer._output((layer.matrix(u) @ x).transpose(1, 2).flatten(2), u)

    found = [torch.autograd.grad(y.sin().sum(), list(layer.parameters())) for y in (layer(u), by_matrix())]
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


def test_padding_before_a_text_is_not_seen():
    layer, u = random_layer(), torch.randn(1, 9, 12)
    padded, mask = torch.cat([torch.randn(1, 4, 12), u], 1), torch.arange(13)[None] >= 4
    torch.testing.assert_close(layer(padded, mask)[:, 4:], layer(u), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.matrix(padded, mask)[..., 4:, 4:], layer.matrix(u), atol=1e-5, rtol=1e-4)
    assert not layer.matrix(padded, mask)[..., 4:, :4].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_attention_matrix_for_its_own_the_new_mixer_is_the_attention(family):
    """Identity filter and unit gate: W_o (A x) with the teacher's values is the teacher's output, shared heads and biases too."""
    model, seen = loud(family), {}
    model.set_attn_implementation("eager")
    part = parts.mixers(model)[1]
    layer = DiscreteMamba2(**DiscreteMamba2.arguments(part, state=8))
    assert layer.start_from(part.module) == ["value", "output"]
    take = lambda module, args, kwargs, out: seen.update(u=kwargs.get("hidden_states", args[0] if args else None), out=out)
    part.module.register_forward_hook(take, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=small.inputs_for(model)["input_ids"])
        x = layer._inputs(seen["u"], None, layer.initial_state(seen["u"])[1])[0]
        y = layer._output((seen["out"][1] @ x).transpose(1, 2).flatten(2), seen["u"])
    torch.testing.assert_close(y, seen["out"][0], atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- the stages


def test_the_first_two_losses_by_hand():
    teacher, data = loud(), texts(3)
    batch = data.collate(data.items)
    real = batch["attention_mask"].bool()
    teacher.set_attn_implementation("eager")
    layer = random_layer(width=32, heads=4, head_dim=8, bias=False)
    expected = {"orientation": [], "alignment": []}
    for item in data.items:
        got = {}
        take = lambda module, args, kwargs, out: got.update(u=kwargs["hidden_states"], out=out[0])
        handle = teacher.model.layers[1].self_attn.register_forward_hook(take, with_kwargs=True)
        with torch.no_grad():
            maps = teacher(input_ids=item["input_ids"][None], output_attentions=True).attentions[1]
            gaps = layer.matrix(got["u"]) - maps
            expected["orientation"] += [float(torch.linalg.matrix_norm(gap, ord="fro")) for gap in gaps[0]]
            expected["alignment"] += (layer(got["u"]) - got["out"])[0].norm(dim=-1).tolist()
        handle.remove()
    seen = {}
    take = lambda module, args, kwargs, out: seen.update(u=kwargs["hidden_states"], out=out)
    handle = teacher.model.layers[1].self_attn.register_forward_hook(take, with_kwargs=True)
    with torch.no_grad():
        teacher(**batch)
        for loss in (orientation, alignment):
            found = float(loss(layer, seen["u"], real, seen["out"]))
            assert found == pytest.approx(np.mean(expected[loss.__name__]), rel=1e-4)
    handle.remove()


def test_the_last_loss_is_the_divergence_and_the_teachers_entropy():
    teacher, model, data = loud(), loud(), texts(3)
    with torch.no_grad():
        model.lm_head.weight.add_(0.1 * torch.randn_like(model.lm_head.weight))
    values = []
    for item in data.items:
        with torch.no_grad():
            p, q = (m(input_ids=item["input_ids"][None]).logits[0].double().softmax(-1) for m in (teacher, model))
        values += ((p * (p / q).log()).sum(-1) - (p * p.log()).sum(-1)).tolist()
    found = float(imitation(model, data.collate(data.items), teacher=teacher).detach())
    assert found == pytest.approx(np.mean(values), rel=1e-5)


def prepared(targets: tuple = ()):
    """(teacher, student's mixers by name, batches) with nothing learned."""
    teacher = loud()
    student, _ = Mohawk(**{**UNTRAINED, "targets": targets, "start": "random"}).apply(copy.deepcopy(teacher), texts())
    teacher.requires_grad_(False).set_attn_implementation("eager")
    layers = {part.name: student.get_submodule(part.name).layer for part in parts.mixers(teacher, targets)}
    return teacher, layers, windows(texts(), 128, torch.device("cpu"))


@pytest.mark.parametrize("loss,still", [(orientation, ("x_proj", "o_proj", "z_proj", "z_bias")), (alignment, ())])
def test_a_stage_trains_what_its_loss_is_made_of_and_lowers_it(loss, still):
    teacher, layers, batches = prepared()
    before = {name: copy.deepcopy(layer.state_dict()) for name, layer in layers.items()}
    frozen = copy.deepcopy(teacher.state_dict())
    found = match(teacher, layers, batches, loss, steps=40, rate=5e-3)
    for name, layer in layers.items():
        assert found[-1][name] < 0.8 * found[0][name]
        moved = {key for key, value in layer.state_dict().items() if not torch.equal(value, before[name][key])}
        assert moved == {key for key in before[name] if not key.startswith(still)}
        inner = layer.sizes[0]
        assert torch.equal(layer.filter[:, :inner], before[name]["filter"][:, :inner]) == bool(still)
    assert all(torch.equal(value, frozen[key]) for key, value in teacher.state_dict().items())
    assert not any(module._forward_hooks for module in teacher.modules())


def test_layers_learn_alone():
    """All at once or one after the other: the same weights."""
    teacher, layers, batches = prepared()
    match(teacher, layers, batches, orientation, steps=3, rate=5e-3)
    for name in layers:
        _, again, _ = prepared()
        match(teacher, {name: again[name]}, batches, orientation, steps=3, rate=5e-3)
        for key, value in again[name].state_dict().items():
            assert torch.equal(value, layers[name].state_dict()[key])


def test_the_student_comes_to_its_teacher():
    teacher, data = loud(), texts()
    batch = data.collate(data.items)
    real = batch["attention_mask"].bool()

    def gap(**settings) -> float:
        model, _ = Mohawk(**{**UNTRAINED, **settings}).apply(copy.deepcopy(teacher), data)
        with torch.no_grad():
            a, b = (m(**batch).logits[real].log_softmax(-1) for m in (model, teacher))
        return float(F.kl_div(a, b, log_target=True, reduction="batchmean"))

    untrained, oriented = gap(), gap(orient_steps=40, align_rate=5e-3)
    both = gap(orient_steps=40, align_steps=40, align_rate=5e-3)
    assert both < oriented < untrained
    assert gap(orient_steps=40, align_steps=40, align_rate=5e-3, steps=40, learning_rate=5e-3) < 0.8 * both
    assert gap(start="random") > untrained


def test_the_last_stage_may_leave_all_but_the_mixers():
    teacher = loud()
    settings = {**UNTRAINED, "steps": 2, "learning_rate": 1e-2}
    mixers = tuple(part.name for part in parts.mixers(teacher))
    for tuned in ("all", "mixers"):
        model, _ = Mohawk(**settings, tuned=tuned).apply(copy.deepcopy(teacher), texts())
        rest = {key: value for key, value in model.state_dict().items() if not key.startswith(mixers)}
        assert all(torch.equal(value, teacher.state_dict()[key]) for key, value in rest.items()) == (tuned == "mixers")


def test_windows_are_cut_from_other_places_and_the_same_for_the_same_step():
    data = Data([{"input_ids": torch.arange(40), "labels": torch.arange(40)}] * 4, batch_size=2)
    sample = windows(data, 8, torch.device("cpu"))
    starts = [int(sample(step)["input_ids"][0, 0]) for step in range(12)]
    assert len(set(starts)) > 5 and starts == [int(sample(step)["input_ids"][0, 0]) for step in range(12)]
    assert set(sample(0)) == {"input_ids", "attention_mask"} and sample(0)["input_ids"].shape == (2, 8)
    assert torch.equal(sample(3)["input_ids"][0], torch.arange(starts[3], starts[3] + 8))
    later = windows(data, 8, torch.device("cpu"), done=5)
    assert [int(later(step)["input_ids"][0, 0]) for step in range(7)] == starts[5:]


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [(), (0,), (1,)])
def test_generation_with_a_state_is_as_without(family, keep):
    model, _ = Mohawk(**UNTRAINED, keep=keep).apply(loud(family), texts())
    inputs = small.inputs_for(model)
    for beams in (1, 3):
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
        assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, use_cache=False, **options))
    with torch.no_grad():
        kept = model(**inputs, use_cache=True).past_key_values.layers
    for index, place in enumerate(kept):
        assert isinstance(place, RecurrentState) == (index not in keep)
        if index not in keep:
            layer = parts.blocks(model)[index].module.get_submodule("attn" if family == "gpt2" else "self_attn").layer
            assert sum(t[0].numel() for t in place.state) == layer.state_size(1)


def test_a_hybrid_is_saved_and_loaded_as_it_was(tmp_path):
    model, report = Mohawk(keep=(1,), state=8, orient_steps=1, align_steps=1, steps=1).apply(loud("gpt2"), texts())
    assert "1 skipped: kept as attention" in report.headline and [c.name for c in report.changes] == ["transformer.h.0.attn"]
    assert set(report.tables) == {"oriented", "aligned"} and "3 billion" in report.headline
    model.save_pretrained(tmp_path, variant="formulary")
    again, inputs = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), small.inputs_for(model)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_half_precision_comes_back_and_so_does_what_failed():
    model = loud().to(torch.bfloat16)
    student, _ = Mohawk(state=8, orient_steps=1, align_steps=1, steps=1).apply(copy.deepcopy(model), texts())
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    again = copy.deepcopy(model)
    with pytest.raises(FormularyError, match="not finite"):
        Mohawk(state=8, orient_steps=30, align_rate=1e6).apply(again, texts())
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("wrong", [{"state": 0}, {"conv": 0}, {"orient_steps": -1}, {"length": 1}, {"align_rate": 0.0}])
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(UsageError, match=f"mohawk: {next(iter(wrong))}"):
        Mohawk(**wrong)


def test_layers_that_are_not_there_and_none_left_are_refused():
    with pytest.raises(UsageError, match="keep=2 names no layer"):
        Mohawk(keep=(2,)).apply(loud(), texts())
    with pytest.raises(FormularyError, match="none of 2 layers"):
        Mohawk(keep=(0, 1)).apply(loud(), texts())
    model, _ = Mohawk(**UNTRAINED).apply(loud(), texts())
    with pytest.raises(FormularyError, match="no"):
        Mohawk(**UNTRAINED).apply(model, texts())


def test_the_rate_of_a_stage_falls_linearly(monkeypatch):
    teacher, layers, batches = prepared()
    rates, step = [], torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    match(teacher, layers, batches, alignment, steps=4, rate=0.004)
    assert rates == pytest.approx([0.004, 0.003, 0.002, 0.001])
