"""The attention adapter: whatever a model's kind, an exact `Attention` changes nothing, and nothing else is touched."""

import copy
import math

import pytest
import torch
from torch import nn

from formulary.contracts import edits, parts
from formulary.contracts.attention import ATTRIBUTE, Attention, formulary_attention
from formulary.errors import FormularyError
from formulary.lab.small import KINDS, inputs_for, tiny


class Textbook(Attention):
    """Attention written out, with a temperature; remembers what it was called with."""

    def __init__(self, temperature: float = 1.0):
        super().__init__()
        self.temperature = temperature
        self.calls = []

    @classmethod
    def full_budget(cls):
        return {"temperature": 1.0}

    def attend(self, query, key, value, *, mask=None, bias=None, scale=None, causal=False):
        self.calls.append({"query": query.shape, "key": key.shape, "mask": mask, "bias": bias, "causal": causal})
        scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale) / self.temperature
        if bias is not None:
            scores = scores + bias
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool) if mask is None else mask
        seen = seen.tril() if causal else seen
        return scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0) @ value


edits.register("test:Textbook", Textbook)


def attach(model: nn.Module, temperature: float = 1.0, ignore=()) -> list[Textbook]:
    found = parts.mixers(model, ignore=ignore)
    return [getattr(Textbook.attach(model, part.name, temperature=temperature), ATTRIBUTE) for part in found]


@torch.no_grad()
def output(model, **inputs):
    out = model(**(inputs or inputs_for(model)))
    return out.logits if "logits" in out else out.last_hidden_state


def real_tokens(model) -> torch.Tensor:
    inputs = inputs_for(model)
    if "attention_mask" not in inputs or model.config.is_encoder_decoder:
        return torch.ones(2, output(model).shape[1], dtype=torch.bool)
    return inputs["attention_mask"].bool()


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_attention_the_adapter_is_sdpa_to_the_bit(kind):
    model = tiny(kind)
    before = output(model)
    model.set_attn_implementation("formulary")
    assert torch.equal(output(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_attention_changes_nothing_under_padding(kind):
    model = tiny(kind)
    before = output(model)
    attentions = attach(model)
    assert (output(model) - before)[real_tokens(model)].abs().max() < 1e-4
    assert all(attention.calls for attention in attentions)
    with pytest.raises(FormularyError, match="one method can set it, not two"):
        attach(model, temperature=3.0)
    other = tiny(kind)
    attach(other, temperature=3.0)
    assert (output(other) - before).abs().max() > 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "mixtral", "bert", "albert", "t5", "bart"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_influence(kind, side):
    model = tiny(kind)
    attach(model, temperature=2.0)
    ids = torch.randint(3, 97, (1, 7), generator=torch.Generator().manual_seed(1))
    extra = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    alone = output(model, input_ids=ids, attention_mask=torch.ones_like(ids), **extra)
    real = slice(3, 10) if side == "left" else slice(0, 7)
    mask = torch.zeros(1, 10, dtype=torch.long)
    mask[:, real] = 1
    outs = []
    for fill in (0, 50):
        padded = torch.full((1, 10), fill).masked_scatter(mask.bool(), ids)
        positions = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if kind not in ("t5", "bart", "opt") else {}
        outs.append(output(model, input_ids=padded, attention_mask=mask, **positions, **extra))
    outs = outs if extra else [out[:, real] for out in outs]
    assert (outs[0] - outs[1]).abs().max() < 1e-5
    moved = side == "left" and kind == "bart"  # BART counts positions from the padding, with any attention
    assert moved or (outs[0] - alone).abs().max() < 1e-4


def test_heads_are_expanded_and_shapes_are_the_contracts():
    model = tiny("llama")
    assert model.config.num_key_value_heads == 2
    (first, _) = attach(model)
    output(model, input_ids=torch.arange(3, 15).unsqueeze(0))
    assert first.calls[0]["query"] == first.calls[0]["key"] == (1, 4, 12, 8)
    assert first.calls[0]["causal"] and first.calls[0]["mask"] is None


def test_position_bias_arrives():
    model = tiny("t5")
    attentions = attach(model)
    output(model)
    assert len(attentions) == 4 and all(a.calls[0]["bias"] is not None for a in attentions)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bart", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_and_without_cache(kind, beams):
    model = tiny(kind)
    inputs = {k: v for k, v in inputs_for(model).items() if k != "decoder_input_ids"}
    given = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    before = model.generate(**inputs, **given)
    attach(model)
    assert torch.equal(model.generate(**inputs, **given, use_cache=True), before)
    assert torch.equal(model.generate(**inputs, **given, use_cache=False), before)


def test_decoding_one_token_is_left_to_sdpa():
    model = tiny("llama")
    attentions = attach(model, temperature=9.0)
    model.generate(**inputs_for(model), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert [len(a.calls) for a in attentions] == [1, 1]


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_cross_attention_is_left_to_sdpa(kind):
    model = tiny(kind)
    attentions = attach(model)
    output(model)
    sizes = {a.calls[0]["query"][2] for a in attentions} | {a.calls[0]["key"][2] for a in attentions}
    assert len(attentions) == 4 and all(len(a.calls) == 1 and a.calls[0]["query"] == a.calls[0]["key"] for a in attentions)
    assert sizes == {12, 6}
    crossed = [name for name, _ in model.named_modules() if name.endswith(("encoder_attn", "EncDecAttention"))]
    with pytest.raises(FormularyError, match="cross-attention"):
        Textbook.attach(model, crossed[0])


def test_a_longer_static_cache_is_cut_as_sdpa_cuts_it():
    query, key, value = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8)
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2
    expected, _ = formulary_attention(module, query, key, value, None)
    setattr(module, ATTRIBUTE, Textbook())
    out, weights = formulary_attention(module, query, key, value, None)
    assert weights is None and torch.allclose(out, expected, atol=1e-5)
    assert module.formulary_attention.calls[0]["key"] == (1, 4, 6, 8)


def test_additive_and_boolean_masks_mean_the_same():
    query, key, value = torch.randn(3, 2, 2, 6, 8).unbind()
    seen = torch.rand(2, 1, 6, 6) < 0.6
    seen |= torch.eye(6, dtype=torch.bool)
    added = torch.zeros(2, 1, 6, 6).masked_fill(~seen, torch.finfo(torch.float32).min)
    module = nn.Module()
    module.is_causal = True
    bias = torch.randn(1, 2, 6, 6)
    for extra in ({}, {"position_bias": bias}):
        expected, _ = formulary_attention(module, query, key, value, seen, **extra)
        setattr(module, ATTRIBUTE, Textbook())
        for mask in (seen, added):
            out, _ = formulary_attention(module, query, key, value, mask, **extra)
            assert torch.allclose(out, expected, atol=1e-5)
        delattr(module, ATTRIBUTE)


@pytest.mark.parametrize("kind", ["llama", "bert", "albert", "vit", "t5", "bart"])
def test_saving_keeps_the_choice(kind, tmp_path):
    model = tiny(kind)
    with edits.editing(model, "test") as edit:
        for part in parts.mixers(model):
            edit.edit(part.name, Textbook, temperature=2.0)
    before = output(model)
    model.save_pretrained(tmp_path, variant="formulary")
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(output(loaded), before)
    chosen = [getattr(part.module, ATTRIBUTE) for part in parts.mixers(loaded)]
    assert all(isinstance(a, Textbook) and a.temperature == 2.0 and a.calls for a in chosen)


def test_ignored_layers_stay_on_sdpa():
    model = tiny("gpt2")
    inputs = inputs_for(model) | {"output_hidden_states": True}
    with torch.no_grad():
        before = model(**inputs).hidden_states
        attach(model, temperature=5.0, ignore=["transformer.h.0.attn"])
        after = model(**inputs).hidden_states
    assert torch.equal(before[1], after[1]) and not torch.allclose(before[2], after[2])


def test_a_failed_edit_gives_the_model_back():
    model = tiny("bert")
    before, implementation = output(model), model.config._attn_implementation
    with pytest.raises(KeyError), edits.editing(model, "test") as edit:
        edit.edit(parts.mixers(model)[0].name, Textbook, temperature=5.0)
        raise KeyError
    assert torch.equal(output(model), before) and model.config._attn_implementation == implementation
    assert not any(ATTRIBUTE in module._modules for module in model.modules())


def test_copies_are_independent():
    model = tiny("vit")
    attach(model)
    before = output(model)
    twin = copy.deepcopy(model)
    for part in parts.mixers(twin):
        getattr(part.module, ATTRIBUTE).temperature = 7.0
    assert torch.equal(output(model), before) and not torch.allclose(output(twin), before)


def test_refusals_are_one_line():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(FormularyError, match="attention interface") as told:
        Textbook.attach(model, "0")
    assert "\n" not in str(told.value)
    with pytest.raises(FormularyError, match="attention interface"):
        Textbook.attach(tiny("llama"), "model.layers.0.mlp")
    module = nn.Module()
    setattr(module, ATTRIBUTE, Textbook())
    with pytest.raises(FormularyError, match="softcap"):
        formulary_attention(module, *torch.randn(3, 1, 2, 5, 4), None, softcap=30.0)
