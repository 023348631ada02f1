"""`contracts.parts` against eleven families: what it finds, how it is addressed, what flows through it."""

import copy

import pytest
import torch
from torch import nn

from formulary.contracts import parts
from formulary.errors import UsageError
from formulary.lab import small

# kind, blocks, linears, mixers, feed-forwards kept in one module, for the tiny models of two layers (each stack)
EXPECTED = {
    "llama": ("decoder", 2, 14, 2, 2),
    "qwen2": ("decoder", 2, 14, 2, 2),
    "gpt2": ("decoder", 2, 8, 2, 2),
    "opt": ("decoder", 2, 12, 2, 0),
    "mixtral": ("decoder", 2, 12, 2, 2),
    "bert": ("encoder", 2, 12, 2, 0),
    "albert": ("encoder", 1, 6, 1, 0),
    "vit": ("vision", 2, 12, 2, 2),
    "dinov2": ("vision", 2, 12, 2, 2),
    "t5": ("encoder-decoder", 4, 32, 4, 4),
    "bart": ("encoder-decoder", 4, 32, 4, 0),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_what_is_found(family):
    model = small.tiny(family)
    found = (
        parts.kind(model),
        len(parts.blocks(model)),
        len(parts.linears(model)),
        len(parts.mixers(model)),
        len(parts.feed_forwards(model)),
    )
    assert found == EXPECTED[family]
    assert all(block.has_seam for block in parts.blocks(model))


@pytest.mark.parametrize("family", EXPECTED)
def test_the_view_computes_what_the_module_computes(family):
    model = small.tiny(family)
    for part in parts.linears(model):
        weight = part.weight()
        assert weight.shape[-2:] == (part.out_features, part.in_features)
        assert torch.equal(part.stored(weight), part.raw)
        if not part.experts:
            x = torch.randn(3, part.in_features)
            torch.testing.assert_close(part.module(x), nn.functional.linear(x, weight, part.bias), rtol=1e-5, atol=1e-5)


def test_heads_poolers_and_tied_weights_are_left_alone_unless_asked():
    model = small.tiny("llama")
    assert not [part for part in parts.linears(model) if "lm_head" in part.name]
    assert [part.name for part in parts.linears(model, targets=["lm_head"])] == ["lm_head"]
    bert = small.tiny("bert")
    assert not [part for part in parts.linears(bert) if "pooler" in part.name]


def test_addressing_by_glob_last_name_and_class():
    model = small.tiny("llama")
    names = lambda **options: [part.name for part in parts.linears(model, **options)]
    assert names(targets=["model.layers.0.*"]) == [n for n in names() if n.startswith("model.layers.0.")]
    assert names(targets=["q_proj"]) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert names(ignore=["*.mlp.*"]) == [n for n in names() if ".mlp." not in n]
    assert len(parts.blocks(model, targets=["LlamaDecoderLayer"])) == 2


@pytest.mark.parametrize("option", ["targets", "ignore"])
def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_name(option):
    with pytest.raises(UsageError, match=f"{option} 'q_porj' matches nothing.*q_proj"):
        parts.linears(small.tiny("llama"), **{option: ["q_porj"]})


@pytest.mark.parametrize("family", EXPECTED)
def test_observed_inputs_are_those_of_the_real_tokens(family):
    """What `observe` shows for a padded batch is what flows when each row is run alone without its padding."""
    model = small.tiny(family).eval()
    batch = small.inputs_for(model, batch=2, length=7)
    if family == "gpt2":  # its absolute positions count padding unless told otherwise
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    linears = parts.linears(model)

    def collect(batches):
        seen = {}
        with parts.observe(linears, lambda part, x, expert: seen.setdefault((part.name, expert), []).append(x.clone())) as run:
            for one in batches:
                run(model, one)
        return {key: torch.cat(rows) for key, rows in seen.items()}

    together = collect([batch])
    alone = collect(_rows_without_padding(batch))
    assert together.keys() == alone.keys()
    for key in together:
        a, b = (x[torch.argsort(x[:, 0])] for x in (together[key], alone[key]))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def _rows_without_padding(batch):
    """One batch per row with its padding cut off, for encoder and decoder inputs alike."""
    for i in range(len(next(iter(batch.values())))):
        row = {key: value[i : i + 1] for key, value in batch.items()}
        if "attention_mask" in row:
            real = row["attention_mask"][0].bool()
            for key in ("input_ids", "attention_mask", "token_type_ids", "position_ids"):
                if key in row:
                    row[key] = row[key][:, real]
            if "labels" in row and "decoder_input_ids" not in row and row["labels"].shape[1] == len(real):
                row["labels"] = row["labels"][:, real]
        if "decoder_attention_mask" in row:
            real = row["decoder_attention_mask"][0].bool()
            for key in ("decoder_input_ids", "decoder_attention_mask", "labels"):
                if key in row:
                    row[key] = row[key][:, real]
        yield row


def test_hooks_are_gone_after_observing():
    model = small.tiny("mixtral")
    with parts.observe(parts.linears(model), lambda *_: None):
        assert any(module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_experts_are_seen_as_they_are_routed():
    """Every expert's inputs, recomputed from the router's choice by hand."""
    model = small.tiny("mixtral").eval()
    batch = small.inputs_for(model)
    experts = model.model.layers[0].mlp.experts
    routed = {}
    experts.register_forward_pre_hook(lambda module, args: routed.update(hidden=args[0], index=args[1]))
    seen = {}
    linears = [part for part in parts.linears(model) if part.module is experts]
    with parts.observe(linears, lambda part, x, e: seen.__setitem__((part.parameter, e), x)) as run:
        run(model, batch)
    real = batch["attention_mask"].bool().flatten()
    for expert in range(experts.num_experts):
        chosen = torch.tensor([expert in row for row in routed["index"].tolist()]) & real
        if chosen.any():
            x = routed["hidden"][chosen]
            gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, -1)
            torch.testing.assert_close(seen["gate_up_proj", expert], x)
            torch.testing.assert_close(seen["down_proj", expert], nn.functional.silu(gate) * up, rtol=1e-4, atol=1e-5)


def test_parts_survive_deepcopy():
    model = small.tiny("t5")
    again = copy.deepcopy(model)
    assert [p.name for p in parts.linears(model)] == [p.name for p in parts.linears(again)]
    assert not {id(p.raw) for p in parts.linears(model)} & {id(p.raw) for p in parts.linears(again)}


def test_a_decoder_mask_that_is_given_counts_even_where_all_is_real_and_labels_only_without_one():
    """Labels of -100 may hide the loss of tokens that flow through the decoder like any other."""
    model, seen = small.tiny("t5"), {}
    part = next(part for part in parts.linears(model) if part.name.startswith("decoder"))
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.tensor([[-100, 5, 6]])}
    masked = {**batch, "decoder_attention_mask": torch.ones(1, 3, dtype=torch.long)}
    for name, given in (("without", batch), ("with", masked)):
        with parts.observe([part], lambda part, x, expert: seen.update({name: len(x)})) as run:
            run(model, given)
    assert seen == {"without": 2, "with": 3}
