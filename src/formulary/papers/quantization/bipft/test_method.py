"""What is true of BiPFT alone: weights and activations against loops, the rank-1 terms against the paper's expanded
products, and going on in binary form from what was stored.
"""

import copy

import pytest
import torch
from torch.nn import functional as F

from formulary.contracts import Data
from formulary.errors import FormularyError, UsageError
from formulary.lab.small import inputs_for, tiny
from formulary.papers.quantization.bipft.layers import (
    BiPFTEmbedding,
    BiPFTLinear,
    ResidualAttention,
    ResidualMaps,
    Shifted,
    binary,
)
from formulary.papers.quantization.bipft.method import BiPFT, objective
from formulary.papers.quantization.tbt_binary_ternary.activations import ElasticAttention


@pytest.fixture
def labeled():
    """A function: data of labels for a random classifier of tokens, and the classifier around an encoder."""

    def made(encoder, n=8):
        from transformers import BertForTokenClassification

        model = BertForTokenClassification(copy.deepcopy(encoder.config)).eval()
        model.bert = encoder
        for module in model.modules():
            if hasattr(module, "config"):
                module.config = model.config
        batch = inputs_for(tiny("bert"), batch=n)
        marks = torch.randint(2, batch["input_ids"].shape, generator=torch.Generator().manual_seed(0))
        batch["labels"] = marks.masked_fill(batch["attention_mask"] == 0, -100)
        return model, Data([{key: value[i] for key, value in batch.items()} for i in range(n)], batch_size=4)

    return made


def attention_with(terms=None, bits=1):
    attention = ResidualAttention(bits)
    for quantizer, step in zip(attention.quantizers, (0.7, 0.9, 0.5, 0.3)):
        quantizer.start(step)
    attention.terms = terms
    return attention


@pytest.mark.parametrize("by_row", [False, True])
def test_weights_are_the_papers_and_have_a_straight_through_gradient(by_row):
    torch.manual_seed(0)
    w, wanted = (torch.randn(5, 37) + 0.3).requires_grad_(True), torch.randn(5, 37)
    levels, scale = binary(w, by_row, w.detach().mean())
    (levels * scale * wanted).sum().backward()
    numbers = [[float(v) for v in row] for row in w.detach()]
    mean, size = sum(map(sum, numbers)) / 185, sum(abs(v) for row in numbers for v in row) / 185
    for i, row in enumerate(numbers):
        a = sum(map(abs, row)) / 37 if by_row else size
        assert (levels * scale)[i].tolist() == pytest.approx([a if v >= mean else -a for v in row], rel=1e-4)
    torch.testing.assert_close(w.grad, wanted)


@pytest.mark.parametrize("unsigned", [False, True])
def test_activations_and_their_gradients_against_a_loop(unsigned):
    torch.manual_seed(0)
    quantizer = Shifted(9, unsigned)
    with torch.no_grad():
        quantizer.step.fill_(0.8)
        quantizer.shift.normal_(std=0.3)
    x, weight = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    out = quantizer(x)
    (out * weight).sum().backward()
    shift, slope = [0.0] * 9, 0.0
    for i in range(4):
        for j in range(9):
            v = (float(x[i, j].detach()) - float(quantizer.shift[j].detach())) / 0.8
            q = round(min(max(v, 0.0), 1.0)) if unsigned else 1 if v >= 0 else -1
            inside = 0 <= v <= 1 if unsigned else abs(v) <= 1
            assert float(out[i, j].detach()) == pytest.approx(0.8 * q, abs=1e-6)
            assert float(x.grad[i, j]) == pytest.approx(float(weight[i, j]) if inside else 0.0)
            shift[j] -= float(weight[i, j]) if inside else 0.0
            slope += float(weight[i, j]) * ((q - v if inside else q) if unsigned else q) / 3
    assert quantizer.shift.grad.tolist() == pytest.approx(shift, abs=1e-5)
    assert float(quantizer.step.grad) == pytest.approx(slope, abs=1e-4)


def expanded(attention, q, k, v, terms, mask, real):
    """Head by head, query by query: the product of all that is kept and lost, less what is not estimated so."""
    q, k, v = (quantizer(x, 24) for quantizer, x in zip(attention.quantizers, (q, k, v)))
    out = torch.zeros_like(v)
    for b in range(q.shape[0]):
        r_q, r_k, m_q, m_k, r_v = terms[b].unbind(-1)
        for h in range(q.shape[1]):
            whole = torch.outer(m_q + r_q, m_k + r_k) - torch.outer(m_q, m_k)
            scores = (q[b, h] @ k[b, h].T + whole) / q.shape[-1] ** 0.5
            for i in range(q.shape[2]):
                allowed = mask[b, 0, i]
                weights = torch.zeros(q.shape[2])
                weights[allowed] = scores[i][allowed].softmax(-1)
                weights = attention.quantizers[3](weights, 24)
                out[b, h, i] = weights @ v[b, h] + (weights @ r_v)
    return out


def test_attention_against_the_expanded_products_and_gradients():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 7, 8).requires_grad_(True).unbind()
    terms = torch.randn(2, 7, 5, requires_grad=True)
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    mask[0, ..., 5:] = False
    attention = attention_with(terms)
    weight, seen = torch.randn(2, 3, 7, 8), []
    for out in (attention.attend(q, k, v, mask=mask), expanded(attention, q, k, v, terms, mask, None)):
        inputs = (terms, *attention.parameters())
        seen.append((out, *torch.autograd.grad((out * weight).sum(), inputs, retain_graph=True)))
    for ours, wanted in zip(*seen, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    assert float(seen[0][1].abs().min(0).values.sum()) > 0 and all(bool(term.any()) for term in seen[0][1].unbind(-1))


def test_without_terms_or_with_zeros_it_is_plain_binary_attention():
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind()
    plain = ElasticAttention(1)
    plain.load_state_dict(attention_with().state_dict())
    wanted = plain.attend(q, k, v)
    assert torch.equal(attention_with().attend(q, k, v), wanted)
    torch.testing.assert_close(attention_with(torch.zeros(1, 5, 5)).attend(q, k, v), wanted)
    assert not torch.allclose(attention_with(torch.randn(1, 5, 5)).attend(q, k, v), wanted)


def test_maps_read_the_layers_input_and_zero_maps_change_nothing(data_for):
    model = tiny("bert")
    plain, _ = BiPFT(steps=1, residual=False).apply(copy.deepcopy(model), data_for(model))
    batch = inputs_for(model)
    with torch.no_grad():
        wanted = plain(**batch)[0]
        name = "encoder.layer.0.attention.self"
        ResidualMaps.attach(plain, name, width=32)
        module = plain.get_submodule(name)
        attention, seen = module.formulary_attention, []
        assert attention.residual.weight.shape == (5, 32)
        assert 0.01 < float(attention.residual.weight.std()) < 0.03 and not attention.residual.bias.any()
        attention.residual.weight.mul_(50)
        attention.quantizers[0].register_forward_hook(lambda *_: seen.append(attention.terms))
        assert not torch.equal(plain(**batch)[0], wanted) and attention.terms is None
        torch.testing.assert_close(seen[0], F.linear(plain.embeddings(batch["input_ids"]), attention.residual.weight))
        attention.residual.weight.zero_()
        torch.testing.assert_close(plain(**batch)[0], wanted)
    with pytest.raises(FormularyError, match="has them already"):
        ResidualMaps.attach(plain, name, width=32)
    with pytest.raises(FormularyError, match="is no ResidualAttention"):
        ResidualMaps.attach(model, name, width=32)


@pytest.mark.parametrize("floats", [False, True])
def test_what_is_stored_computes_the_same_and_can_be_trained_on(floats):
    torch.manual_seed(0)
    x, ids, w = torch.randn(3, 70), torch.tensor([[4, 1]]), torch.randn(6, 70)
    for layer, given in ((BiPFTLinear(70, 6, floats=floats), x), (BiPFTEmbedding(6, 70, floats=floats), ids)):
        layer.start(w + 0.2)
        before, dense = layer(given).detach(), layer.weight.detach()
        assert torch.equal(dense > 0, w + 0.2 >= (w + 0.2).mean())
        assert given is x or torch.equal(before, dense[ids])
        layer.finish()
        assert torch.equal(layer(given), before) and layer.latent is None and layer.codes.shape == (6, 9)
        assert layer.stored_bytes == 6 * 9 + 6 * 4 + floats * 6 * 70 * 4
        layer.resume()
        torch.testing.assert_close(layer(given), before)
        assert torch.equal(layer.latent, w + 0.2) == floats


def test_training_brings_it_closer_to_the_teacher_and_moves_what_stays_dense(distance_to_teacher):
    before, _, _ = distance_to_teacher(BiPFT(steps=1, learning_rate=3e-3))
    after, model, report = distance_to_teacher(BiPFT(steps=40, learning_rate=3e-3))
    assert after < 0.7 * before
    assert not torch.equal(model.embeddings.position_embeddings.weight, tiny("bert").embeddings.position_embeddings.weight)
    assert all(bool(module.residual.bias.any()) for module in model.modules() if isinstance(module, ResidualAttention))
    assert report.figures["attentions quantized"] == 2


def test_it_goes_on_in_binary_form_at_a_task(labeled, data_for):
    encoder, _ = BiPFT(steps=3, keep_floats=True).apply(tiny("bert"), data_for(tiny("bert")))
    model, data = labeled(encoder)
    levels = {name: value.clone() for name, value in model.state_dict().items() if name.endswith(".codes")}
    model, report = BiPFT(steps=40, learning_rate=1e-2, distil=False).apply(model, data)
    first, last = report.figures["training loss, first step and last tenth"]
    assert last < 0.8 * first and len(report.changes) == 13 and 0.8 < report.coverage < 0.95
    assert any(not torch.equal(model.state_dict()[name], value) for name, value in levels.items())
    for layer in (module for module in model.modules() if isinstance(module, BiPFTLinear)):
        assert layer.latent is None and len(layer.weight.unique()) == 2
    with torch.no_grad():
        batch = data.collate(data.items)
        assert float(model(**batch).loss) < first


def test_going_on_starts_from_the_floats_that_were_kept(labeled, data_for):
    encoder, _ = BiPFT(steps=2, keep_floats=True).apply(tiny("bert"), data_for(tiny("bert")))
    model, data = labeled(encoder)
    kept = {name: value.clone() for name, value in model.state_dict().items() if name.endswith(".floats")}
    model, _ = BiPFT(steps=1, learning_rate=1e-9, distil=False).apply(model, data)
    assert len(kept) == 13 and all(len(value.unique()) > 2 for value in kept.values())
    for name, value in kept.items():
        torch.testing.assert_close(model.state_dict()[name], value, atol=1e-6, rtol=0)


def test_a_failure_while_going_on_leaves_the_model_as_it_was(labeled, data_for, monkeypatch):
    encoder, _ = BiPFT(steps=2).apply(tiny("bert"), data_for(tiny("bert")))
    model, data = labeled(encoder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(BiPFT, "train", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        BiPFT(steps=2).apply(model, data)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())


def test_the_loss_is_the_models_own_where_there_are_labels_and_hidden_states_with_a_teacher(labeled):
    model, data = labeled(tiny("bert"))
    batch, teacher = data.collate(data.items), copy.deepcopy(model)
    with torch.no_grad():
        own = float(model(**batch).loss)
        assert float(objective(model, batch, teacher=None)) == pytest.approx(own)
        assert float(objective(model, batch, teacher=teacher)) == pytest.approx(own)
        teacher.bert.encoder.layer[0].output.dense.bias[0].add_(1.0)
        assert float(objective(model, batch, teacher=teacher)) > own + 0.01


@pytest.mark.parametrize("again,method", [(True, {"steps": 1}), (False, {"steps": 1, "distil": False})])
def test_no_labels_and_no_teacher_is_a_one_line_refusal(again, method, data_for):
    model, data = tiny("bert"), data_for(tiny("bert"))
    if again:
        BiPFT(steps=1).apply(model, data)
    with pytest.raises(FormularyError, match="only labels to learn from, and data has none"):
        BiPFT(**method).apply(model, data)


def test_targets_leave_attention_and_the_table(data_for):
    model, report = BiPFT(steps=2, targets=("*.dense",)).apply(tiny("bert"), data_for(tiny("bert")))
    assert not any(isinstance(module, ResidualAttention | BiPFTEmbedding) for module in model.modules())
    assert torch.equal(model.embeddings.word_embeddings.weight, tiny("bert").embeddings.word_embeddings.weight)
    assert "only targets" in str(report.notes)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"learning_rate": 0.0}])
def test_parameters_out_of_range_are_refused_in_one_line(wrong):
    with pytest.raises(UsageError, match=f"bipft: {next(iter(wrong))}"):
        BiPFT(**wrong)
