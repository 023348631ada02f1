"""What is true of LLM.int8() alone: the decomposition, exact integer sums, independence of padding and neighbors, the head.
"""

import copy

import pytest
import torch

import formulary
from formulary.contracts import edits, parts
from formulary.errors import FormularyError, UsageError
from formulary.kernels import int8
from formulary.lab.small import inputs_for, tiny
from formulary.papers.quantization.llm_int8.method import Int8Embedding, Int8Linear, LLMInt8


def reference(x, weight, bias, threshold):
    """The docstring's equation, token by token in float64."""
    c_w = weight.double().abs().amax(1) / 127
    v = (weight.double() / c_w[:, None]).round()
    out = []
    for token in x.double().reshape(-1, x.shape[-1]):
        outlier = token.abs() >= threshold
        rest = token.masked_fill(outlier, 0)
        c_x = rest.abs().max() / 127
        q = (rest / c_x).round()
        out.append((v * c_w[:, None])[:, outlier] @ token[outlier] + c_x * c_w * (v @ q) + bias.double())
    return torch.stack(out).view(*x.shape[:-1], -1).float()


def layer_and_input(tokens=700, features=64, outputs=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = Int8Linear(features, outputs, bias=True)
    weight = torch.randn(outputs, features, generator=generator)
    layer.store(weight)
    layer.bias.data = torch.randn(outputs, generator=generator)
    x = torch.randn(tokens, features, generator=generator)
    x[::3, 5] = 40 * torch.randn(len(x[::3]), generator=generator)
    x[7, 9] = -11.0
    return layer, weight, x


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("threshold", [6.0, 1e30])
def test_equals_the_equation(threshold, fast, monkeypatch):
    if not fast:
        monkeypatch.setattr(int8, "has_onednn", lambda: False)
        monkeypatch.setattr(int8, "level", lambda: 0)
    layer, weight, x = layer_and_input()
    layer.threshold = threshold
    seen, expected = layer(x), reference(x, weight, layer.bias.detach(), threshold)
    near = (seen - expected).abs() <= 1e-4 * expected.abs().clamp(min=1)
    assert near.all(1).float().mean() > 0.97, "a tie in rounding may move a token by one step, no more"
    assert (seen - expected).abs().max() < 0.2
    assert layer(x[:0]).shape == (0, 24)


def test_outliers_in_float_keep_the_other_values_precise():
    layer, _, x = layer_and_input()
    exact = x @ layer.weight.mT + layer.bias
    error = {}
    for threshold in (6.0, 1e30):
        layer.threshold = threshold
        error[threshold] = float(((layer(x) - exact).norm() / exact.norm()).detach())
    assert error[6.0] < 0.35 * error[1e30]


def test_a_token_does_not_depend_on_its_neighbors():
    layer, _, x = layer_and_input()
    together = layer(x)
    poisoned = x.clone()
    poisoned[1::2] = 1e4
    torch.testing.assert_close(layer(poisoned)[::2], together[::2], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(torch.cat([layer(row[None]) for row in x[:20]]), together[:20], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_padding_changes_nothing_at_real_tokens(kind):
    model, _ = LLMInt8(threshold=0.5).apply(tiny(kind))
    batch = inputs_for(model)
    real = batch["attention_mask"][0].bool()
    ids = batch["input_ids"][:1, real]
    alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "llama":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch)[0][0, real], model(**alone)[0][0], atol=1e-4, rtol=1e-4)


def test_writing_new_weights_is_seen():
    layer, weight, x = layer_and_input()
    before = layer(x)
    layer.store(-weight)
    torch.testing.assert_close(layer(x) - layer.bias, layer.bias - before, atol=1e-3, rtol=1e-4)
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer_and_input(seed=1)[0].state_dict())
    assert torch.equal(twin(x), layer_and_input(seed=1)[0](x))


def test_gradient_is_that_of_the_dequantized_weight():
    layer, _, x = layer_and_input()
    x.requires_grad_()
    upstream = torch.randn(700, 24)
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.weight)
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0))


def test_memory_of_the_weights_is_a_quarter():
    model = tiny("gpt2")
    weights = sum(part.weights for part in parts.linears(model))
    model, report = LLMInt8().apply(model)
    codes = [value for name, value in model.state_dict().items() if name.endswith("codes")]
    assert sum(value.numel() * value.element_size() for value in codes) == weights
    assert all(isinstance(model.get_submodule(change.name), Int8Linear) for change in report.changes)


def test_expert_tensors_are_skipped_and_said():
    _, report = LLMInt8().apply(tiny("mixtral"))
    assert len(report.skips) == 4 and "expert tensors stay in floating point" in report.headline


@pytest.mark.parametrize("threshold", [0.0, -6.0])
def test_a_threshold_out_of_range_is_refused_in_one_line(threshold):
    with pytest.raises(UsageError, match="threshold"):
        LLMInt8(threshold=threshold)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_tied_head_and_its_embedding_come_back_from_disk(kind, tmp_path):
    model = tiny(kind)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    small, report = LLMInt8(head=True).apply(copy.deepcopy(model))
    table, head = small.get_input_embeddings(), small.get_output_embeddings()
    assert isinstance(table, Int8Embedding) and isinstance(head, Int8Linear) and torch.equal(table.codes, head.codes)
    error = (table.weight - model.get_input_embeddings().weight).abs().amax(1)
    assert (error <= table.scale / 2 + 1e-7).all()
    small.save_pretrained(tmp_path, variant="formulary")
    batch = inputs_for(model)
    with torch.no_grad():
        assert torch.equal(formulary.load(tmp_path)(**batch).logits, small(**batch).logits)
    assert model.config.tie_word_embeddings and not small.config.tie_word_embeddings


def test_a_failure_after_the_head_leaves_the_model_tied():
    model = tiny("gpt2")
    with pytest.raises(RuntimeError, match="stop"), edits.editing(model, "llm-int8") as edit:
        edit.edit("lm_head", Int8Linear, in_features=model.config.hidden_size, out_features=model.config.vocab_size)
        raise RuntimeError("stop")
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.transformer.wte.weight


def test_a_head_that_is_not_there_is_refused():
    with pytest.raises(FormularyError, match="no output head"):
        LLMInt8(head=True).apply(tiny("bert"))
