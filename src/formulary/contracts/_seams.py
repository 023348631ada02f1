"""How each supported block class runs, split where an edit may act: after its attention, beside and after its feed-forward.

A seam is two functions. `attend(block, hidden, *args, **kwargs) -> (hidden, extras)` runs the block up to and including its
attention residual (cross-attention too). `feed_forward(block, hidden, branch) -> hidden` runs the rest and, when `branch` is
a tensor, adds it to the residual sum (after LayerScale, before a post-norm). With the identity edit the block computes the
very same operations in the same order as transformers' own forward. Classes are named by path, so nothing is imported early.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Seam:
    """The two halves of a block, and how its outputs are packed (T5 returns position biases beside the states)."""

    attend: Callable
    feed_forward: Callable
    pack: Callable = lambda hidden, extras: hidden


def find(cls: type) -> Seam | None:
    """The seam of a block class or of the class it derives from, or None."""
    return next((SEAMS[base.__name__] for base in cls.__mro__ if base.__name__ in SEAMS and _is_transformers(base)), None)


def is_block(module: nn.Module) -> bool:
    """Whether a member of a `ModuleList` is a Transformer block: it has a seam, or transformers checkpoints it as a layer."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return find(type(module)) is not None or isinstance(module, GradientCheckpointingLayer)


def _is_transformers(cls: type) -> bool:
    return cls.__module__.startswith("transformers.models.")


def _add(hidden: Tensor, branch: Tensor | None) -> Tensor:
    return hidden if branch is None else hidden + branch


# Llama, Qwen2, Mixtral: pre-norm, RMSNorm
def _llama_attend(block, hidden_states, attention_mask=None, position_ids=None, cache=None, use_cache=False,
                position_embeddings=None, **kwargs):
    attended, _ = block.self_attn(
        hidden_states=block.input_layernorm(hidden_states),
        attention_mask=attention_mask,
        position_ids=position_ids,
        cache=cache,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    return hidden_states + attended, None


def _mixtral_attend(block, hidden_states, position_embeddings=None, attention_mask=None, position_ids=None,
                    cache=None, **kwargs):
    attended, _ = block.self_attn(
        hidden_states=block.input_layernorm(hidden_states),
        position_embeddings=position_embeddings,
        attention_mask=attention_mask,
        position_ids=position_ids,
        cache=cache,
        **kwargs,
    )
    return hidden_states + attended, None


def _llama_feed_forward(block, hidden, branch):
    return _add(hidden + block.mlp(block.post_attention_layernorm(hidden)), branch)


def _gpt2_attend(block, hidden_states, cache=None, attention_mask=None, encoder_hidden_states=None,
                 encoder_attention_mask=None, use_cache=False, **kwargs):
    attended, _ = block.attn(
        block.ln_1(hidden_states),
        cache=cache,
        attention_mask=attention_mask,
        use_cache=use_cache,
        **kwargs,
    )
    hidden = attended + hidden_states
    if encoder_hidden_states is not None:
        crossed, _ = block.crossattention(
            block.ln_cross_attn(hidden),
            cache=cache,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
        )
        hidden = hidden + crossed
    return hidden, None


def _gpt2_feed_forward(block, hidden, branch):
    return _add(hidden + block.mlp(block.ln_2(hidden)), branch)


def _dropout(block, hidden):
    return nn.functional.dropout(hidden, p=block.dropout, training=block.training)


def _opt_attend(block, hidden_states, attention_mask=None, cache=None, use_cache=False, position_ids=None,
                **kwargs):
    normed = block.self_attn_layer_norm(hidden_states) if block.do_layer_norm_before else hidden_states
    attended, _ = block.self_attn(
        hidden_states=normed,
        cache=cache,
        position_ids=position_ids,
        attention_mask=attention_mask,
        **kwargs,
    )
    hidden = hidden_states + _dropout(block, attended)
    return hidden if block.do_layer_norm_before else block.self_attn_layer_norm(hidden), None


def _opt_feed_forward(block, hidden, branch):
    rows = hidden.reshape(-1, hidden.size(-1))
    normed = block.final_layer_norm(rows) if block.do_layer_norm_before else rows
    out = block.fc2(block.activation_fn(block.fc1(normed)))
    out = _add((rows + _dropout(block, out)).view(hidden.shape), branch)
    return out if block.do_layer_norm_before else block.final_layer_norm(out)


def _bert_attend(block, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None,
                 cache=None, **kwargs):
    hidden, _ = block.attention(hidden_states, attention_mask, cache=cache, **kwargs)
    if block.is_decoder and encoder_hidden_states is not None:
        hidden, _ = block.crossattention(
            hidden, None, encoder_hidden_states, encoder_attention_mask, cache=cache, **kwargs
        )
    return hidden, None


def _bert_feed_forward(block, hidden, branch):
    output = block.output
    inner = output.dropout(output.dense(block.intermediate(hidden)))
    return output.LayerNorm(_add(inner + hidden, branch))


def _albert_attend(block, hidden_states, attention_mask=None, **kwargs):
    hidden, _ = block.attention(hidden_states, attention_mask, **kwargs)
    return hidden, None


def _albert_feed_forward(block, hidden, branch):
    return block.full_layer_layer_norm(_add(block.ff_chunk(hidden) + hidden, branch))


def _vit_attend(block, hidden_states, attention_mask=None, **kwargs):
    attended, _ = block.attention(block.layernorm_before(hidden_states), attention_mask, **kwargs)
    return block.dropout(attended) + hidden_states, None


def _vit_feed_forward(block, hidden, branch):
    return _add(block.dropout(block.mlp(block.layernorm_after(hidden))) + hidden, branch)


def _dinov2_attend(block, hidden_states, attention_mask=None, **kwargs):
    attended, _ = block.attention(block.norm1(hidden_states), attention_mask=attention_mask, **kwargs)
    return block.drop_path(block.layer_scale1(attended)) + hidden_states, None


def _dinov2_feed_forward(block, hidden, branch):
    return _add(block.drop_path(block.layer_scale2(block.mlp(block.norm2(hidden)))) + hidden, branch)


def _clamp_half(hidden: Tensor) -> Tensor:
    """T5 and BART keep float16 finite; other dtypes pass through."""
    if hidden.dtype != torch.float16:
        return hidden
    largest = torch.finfo(torch.float16).max
    limit = torch.where(torch.isinf(hidden).any(), largest - 1000, largest)
    return torch.clamp(hidden, min=-limit, max=limit)


def _t5_attend(block, hidden_states, attention_mask=None, position_bias=None, encoder_hidden_states=None,
               encoder_attention_mask=None, encoder_decoder_position_bias=None, cache=None, **kwargs):
    hidden, self_bias, _ = block.layer[0](
        hidden_states,
        attention_mask=attention_mask,
        position_bias=position_bias,
        cache=cache,
        **kwargs,
    )
    hidden, cross_bias = _clamp_half(hidden), None
    if block.is_decoder and encoder_hidden_states is not None:
        hidden, cross_bias, _ = block.layer[1](
            hidden,
            key_value_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
            position_bias=encoder_decoder_position_bias,
            cache=cache,
            **kwargs,
        )
        hidden = _clamp_half(hidden)
    return hidden, (self_bias, cross_bias)


def _t5_feed_forward(block, hidden, branch):
    return _clamp_half(_add(block.layer[-1](hidden), branch))


def _bart_self(block, hidden_states, **kwargs):
    attended, _ = block.self_attn(hidden_states, **kwargs)
    return block.self_attn_layer_norm(hidden_states + _dropout(block, attended))


def _bart_encoder_attend(block, hidden_states, attention_mask=None, **kwargs):
    return _bart_self(block, hidden_states, attention_mask=attention_mask, **kwargs), None


def _bart_decoder_attend(block, hidden_states, attention_mask=None, encoder_hidden_states=None,
                         encoder_attention_mask=None, cache=None, use_cache=True, **kwargs):
    hidden = _bart_self(
        block, hidden_states, cache=cache, attention_mask=attention_mask, **kwargs
    )
    if encoder_hidden_states is not None:
        crossed, _ = block.encoder_attn(
            hidden,
            key_value_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
            cache=cache,
            **kwargs,
        )
        hidden = block.encoder_attn_layer_norm(hidden + _dropout(block, crossed))
    return hidden, None


def _bart_feed_forward(block, hidden, branch):
    inner = block.activation_fn(block.fc1(hidden))
    inner = nn.functional.dropout(inner, p=block.activation_dropout, training=block.training)
    out = block.final_layer_norm(_add(hidden + _dropout(block, block.fc2(inner)), branch))
    is_encoder = not hasattr(block, "encoder_attn")
    return _clamp_half(out) if is_encoder and not torch.isfinite(out).all() else out


SEAMS: dict[str, Seam] = {
    "LlamaDecoderLayer": Seam(_llama_attend, _llama_feed_forward),
    "Qwen2DecoderLayer": Seam(_llama_attend, _llama_feed_forward),
    "MixtralDecoderLayer": Seam(_mixtral_attend, _llama_feed_forward),
    "GPT2Block": Seam(_gpt2_attend, _gpt2_feed_forward),
    "OPTDecoderLayer": Seam(_opt_attend, _opt_feed_forward),
    "BertLayer": Seam(_bert_attend, _bert_feed_forward),
    "AlbertLayer": Seam(_albert_attend, _albert_feed_forward),
    "ViTLayer": Seam(_vit_attend, _vit_feed_forward),
    "DeiTLayer": Seam(_vit_attend, _vit_feed_forward),
    "Dinov2Layer": Seam(_dinov2_attend, _dinov2_feed_forward),
    "Dinov2WithRegistersLayer": Seam(_dinov2_attend, _dinov2_feed_forward),
    "T5Block": Seam(_t5_attend, _t5_feed_forward, lambda hidden, extras: (hidden, *extras)),
    "BartEncoderLayer": Seam(_bart_encoder_attend, _bart_feed_forward),
    "BartDecoderLayer": Seam(_bart_decoder_attend, _bart_feed_forward),
}
