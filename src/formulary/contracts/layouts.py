"""What a plain Transformer block consists of, for kernels that run a whole block at once.

Only blocks whose forward is nothing but these parts are here; classes are named by path, so nothing is imported early.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Layout:
    """The parts of a block in the order of their use. Without `norm_first`, norms follow the residual sums.

    A causal one has rotary positions. Queries have `heads` heads of `width`, keys and values `groups`; `gate` is None for a plain feed-forward.
    """

    query: nn.Module
    key: nn.Module
    value: nn.Module
    out: nn.Module
    up: nn.Module
    gate: nn.Module | None
    down: nn.Module
    norm1: nn.Module
    norm2: nn.Module
    activation: nn.Module
    norm_first: bool
    causal: bool
    heads: int
    groups: int
    width: int
    scale: float

    @property
    def linears(self) -> list[nn.Module]:
        return [x for x in (self.query, self.key, self.value, self.out, self.gate, self.up, self.down) if x is not None]


def find(block: nn.Module) -> Layout | None:
    """The layout of a block of a known class, or None."""
    for base in type(block).__mro__:
        if base.__name__ in LAYOUTS and base.__module__.startswith("transformers.models."):
            return LAYOUTS[base.__name__](block)
    return None


def _bert(block) -> Layout | None:
    inner = block.attention.self
    if block.chunk_size_feed_forward or inner.is_causal:
        return None
    return Layout(
        inner.query, inner.key, inner.value, block.attention.output.dense, block.intermediate.dense, None, block.output.dense,
        block.attention.output.LayerNorm, block.output.LayerNorm, block.intermediate.intermediate_act_fn,
        norm_first=False, causal=False, heads=inner.num_attention_heads, groups=inner.num_attention_heads,
        width=inner.attention_head_size, scale=inner.scaling,
    )  # fmt: skip


def _vit(block) -> Layout:
    inner, mlp = block.attention, block.mlp
    return Layout(
        inner.q_proj, inner.k_proj, inner.v_proj, inner.o_proj, mlp.fc1, None, mlp.fc2,
        block.layernorm_before, block.layernorm_after, mlp.activation_fn,
        norm_first=True, causal=False, heads=inner.num_attention_heads, groups=inner.num_attention_heads,
        width=inner.head_dim, scale=inner.scaling,
    )  # fmt: skip


def _llama(block) -> Layout | None:
    inner, mlp = block.self_attn, block.mlp
    if getattr(inner, "sliding_window", None):
        return None
    return Layout(
        inner.q_proj, inner.k_proj, inner.v_proj, inner.o_proj, mlp.up_proj, mlp.gate_proj, mlp.down_proj,
        block.input_layernorm, block.post_attention_layernorm, mlp.act_fn,
        norm_first=True, causal=True, heads=inner.config.num_attention_heads, groups=inner.config.num_key_value_heads,
        width=inner.head_dim, scale=inner.scaling,
    )  # fmt: skip


LAYOUTS: dict[str, Callable] = {
    "BertLayer": _bert,
    "RobertaLayer": _bert,
    "XLMRobertaLayer": _bert,
    "ElectraLayer": _bert,
    "ViTLayer": _vit,
    "DeiTLayer": _vit,
    "LlamaDecoderLayer": _llama,
    "Qwen2DecoderLayer": _llama,
}
