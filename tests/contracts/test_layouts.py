"""Layouts against what `parts` finds in the same blocks, and blocks that are more than their layout says."""

import pytest
from transformers import BertConfig, BertModel, Qwen2Config, Qwen2Model, RobertaConfig, RobertaModel

from formulary.contracts import layouts, parts
from formulary.lab.small import tiny

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 64}


def block_of(model):
    return parts.blocks(model)[0].module


@pytest.mark.parametrize("kind", ["bert", "roberta", "vit", "llama", "qwen2"])
def test_the_linears_are_all_that_the_block_has(kind):
    model = RobertaModel(RobertaConfig(**SIZES)) if kind == "roberta" else tiny(kind)
    block = parts.blocks(model)[0]
    layout = layouts.find(block.module)
    inside = {id(part.module) for part in parts.linears(model) if part.name.startswith(f"{block.name}.")}
    assert {id(linear) for linear in layout.linears} == inside
    assert layout.causal == (parts.kind(model) == "decoder")
    assert layout.heads * layout.width == layout.query.out_features == layout.out.in_features
    assert layout.groups * layout.width == layout.key.out_features == layout.value.out_features
    assert layout.up.out_features == layout.down.in_features


@pytest.mark.parametrize("more", [{"is_decoder": True}, {"is_decoder": True, "add_cross_attention": True}, {"chunk_size_feed_forward": 4}])
def test_a_bert_that_does_more_has_no_layout(more):
    assert layouts.find(block_of(BertModel(BertConfig(**SIZES)))) is not None
    assert layouts.find(block_of(BertModel(BertConfig(**SIZES, **more)))) is None


def test_a_sliding_window_has_no_layout():
    config = {"num_key_value_heads": 1, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    assert layouts.find(block_of(Qwen2Model(Qwen2Config(**SIZES, num_key_value_heads=1)))) is not None
    assert layouts.find(block_of(Qwen2Model(Qwen2Config(**SIZES, **config)))) is None


@pytest.mark.parametrize("kind", ["gpt2", "opt", "albert", "t5", "bart", "mixtral", "dinov2"])
def test_other_blocks_have_none(kind):
    assert all(layouts.find(block.module) is None for block in parts.blocks(tiny(kind)))
