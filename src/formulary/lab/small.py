"""Tiny random models of every architecture the workshop knows, built from config classes in milliseconds."""

import torch
from torch import Tensor, nn

from formulary.errors import UsageError, nearest

_VOCABULARY = 97
_WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def _llama(t):
    return t.LlamaForCausalLM(t.LlamaConfig(vocab_size=_VOCABULARY, num_key_value_heads=2, **_ENDS, **_WIDTHS))


def _qwen2(t):
    return t.Qwen2ForCausalLM(t.Qwen2Config(vocab_size=_VOCABULARY, num_key_value_heads=2, **_ENDS, **_WIDTHS))


def _gpt2(t):
    return t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=_VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **_ENDS)
    )


def _opt(t):
    return t.OPTForCausalLM(
        t.OPTConfig(
            vocab_size=_VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
            **_ENDS,
        )
    )


def _mixtral(t):
    return t.MixtralForCausalLM(
        t.MixtralConfig(
            vocab_size=_VOCABULARY,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=64,
            **_ENDS,
            **_WIDTHS,
        )
    )


def _bert(t):
    return t.BertModel(t.BertConfig(vocab_size=_VOCABULARY, max_position_embeddings=64, pad_token_id=0, **_WIDTHS))


def _albert(t):
    return t.AlbertModel(
        t.AlbertConfig(
            vocab_size=_VOCABULARY, embedding_size=16, max_position_embeddings=64, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, **_WIDTHS,
        )  # fmt: skip
    )


def _vit(t):
    return t.ViTModel(t.ViTConfig(image_size=16, patch_size=4, **_WIDTHS))


def _dinov2(t):
    return t.Dinov2Model(
        t.Dinov2Config(image_size=28, patch_size=7, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    )


def _t5(t):
    return t.T5ForConditionalGeneration(
        t.T5Config(
            vocab_size=_VOCABULARY,
            d_model=32,
            d_ff=64,
            d_kv=8,
            num_layers=2,
            num_heads=4,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
        )
    )


def _bart(t):
    return t.BartForConditionalGeneration(
        t.BartConfig(
            vocab_size=_VOCABULARY,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=64,
            decoder_start_token_id=2,
            forced_eos_token_id=2,
            **_ENDS,
        )
    )


_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BUILDERS = {
    "llama": _llama,
    "qwen2": _qwen2,
    "gpt2": _gpt2,
    "opt": _opt,
    "mixtral": _mixtral,
    "bert": _bert,
    "albert": _albert,
    "vit": _vit,
    "dinov2": _dinov2,
    "t5": _t5,
    "bart": _bart,
}
DECODERS = ("llama", "qwen2", "gpt2", "opt", "mixtral")
ENCODERS = ("bert", "albert")
VISION = ("vit", "dinov2")
ENCODER_DECODERS = ("t5", "bart")
KINDS = DECODERS + ENCODERS + VISION + ENCODER_DECODERS


def tiny(kind: str, *, seed: int = 0) -> nn.Module:
    """A random model of width 32, 2 layers, 4 heads and 97 tokens, in eval mode; the same seed gives the same weights.

    `kind` is one of `KINDS`; llama, qwen2 and mixtral have 2 KV heads. Biases and norm weights are drawn at random
    too, since at their usual zeros and ones a method that loses them would go unseen. The caller's random state is
    kept.

    >>> tiny("gpt2").config.n_embd
    32
    """
    import transformers

    if kind not in _BUILDERS:
        raise UsageError(f"unknown tiny model {kind!r}{nearest(kind, KINDS)}; there are {', '.join(KINDS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _BUILDERS[kind](transformers)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def inputs_for(
    model: nn.Module, *, batch: int = 2, length: int = 12, seed: int = 0, labels: bool = False
) -> dict[str, Tensor]:
    """Random inputs that fit a transformers model: `model(**inputs_for(model))` runs.

    Text models get `input_ids` and an `attention_mask` in which the first row is padded by about a third: on the
    left for decoders (as `generate` wants), on the right for others. Encoder-decoders also get
    `decoder_input_ids`. Vision models get `pixel_values` of the configured image size (at most 224 pixels).
    `labels=True` adds labels for a language model, -100 on padding; for an encoder-decoder they take the place of
    `decoder_input_ids`.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    if hasattr(config, "patch_size"):
        size = config.image_size if config.image_size <= 224 else 224
        return {"pixel_values": torch.randn(batch, config.num_channels, size, size, generator=generator)}
    ids = torch.randint(3, config.vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    padded = length // 3 if batch > 1 else 0
    decoder_only = not config.is_encoder_decoder and hasattr(model, "generate") and model.can_generate()
    mask[0, slice(0, padded) if decoder_only else slice(length - padded, length)] = 0
    ids = ids.masked_fill(mask == 0, config.pad_token_id or 0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if config.is_encoder_decoder:
        shorter = max(1, length // 2)
        inputs["labels" if labels else "decoder_input_ids"] = torch.randint(
            3, config.vocab_size, (batch, shorter), generator=generator
        )
    elif labels:
        inputs["labels"] = ids.masked_fill(mask == 0, -100)
    return inputs
