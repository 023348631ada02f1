"""The attention contract: a function of query, key and value in place of scaled dot-product attention, and its one adapter.

The adapter is registered with transformers under the name "formulary", with `sdpa_mask` as its mask function (without which
padding would be ignored in silence). It looks for an `Attention` on the module that calls it; modules without one, decoding
of a single token and cross-attention go to PyTorch's own `scaled_dot_product_attention`.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTRIBUTE = "formulary_attention"


class Attention(nn.Module):
    """One way of computing attention. Subclasses take JSON scalars in their constructor and implement `attend`.

    `lookahead` is how many later positions a block-wise choice of keys may see (0: strictly causal); no weight ever falls on a
    later or a padded key. `exact` says whether the full budget gives scaled dot-product attention, and `full_budget()` returns
    the arguments that do.
    """

    lookahead: ClassVar[int] = 0

    def attend(
        self,
        query: Float[Tensor, "B H L K"],
        key: Float[Tensor, "B H S K"],
        value: Float[Tensor, "B H S K"],
        *,
        mask: Bool[Tensor, "#B #H L S"] | None = None,
        bias: Float[Tensor, "#B #H L S"] | None = None,
        scale: float | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "B H L K"]:
        """Attention output. `mask` is True where a key may be seen; `bias` is added to the scaled scores; `scale` defaults to
        1/sqrt(K). Raises nothing for odd lengths: pad inside."""
        raise NotImplementedError

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """Constructor arguments with which `attend` must equal scaled dot-product attention."""
        raise NotImplementedError

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **kwargs) -> Tensor:
        return self.attend(query, key, value, **kwargs)

    @classmethod
    def attach(cls, model: nn.Module, name: str, **args) -> nn.Module:
        """Set `cls(**args)` on the attention module `name` and switch the model to the adapter."""
        module = model.get_submodule(name)
        setattr(module, ATTRIBUTE, cls(**args))
        if getattr(model.config, "_attn_implementation", None) != "formulary":
            model.set_attn_implementation("formulary")
        return module


def uses_attention(edits: list[dict]) -> bool:
    """Whether any edit sets an attention function, so that loading must choose the adapter."""
    from formulary.contracts.edits import resolve

    return any(isinstance(cls := resolve(entry["cls"]), type) and issubclass(cls, Attention) for entry in edits)


def formulary_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: (B,H,L,K) in, ((B,L,H,K), None) out; keys and values may have fewer heads."""
    attention = module._modules.get(ATTRIBUTE)
    if attention is None or query.shape[2] == 1 or _is_cross(module):
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            position_bias=position_bias,
            **kwargs,
        )
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    asked = getattr(module, "is_causal", False) if is_causal is None else is_causal
    mask, bias = None, position_bias
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
        if attention_mask.dtype == torch.bool:
            mask = attention_mask
        else:
            bias = attention_mask if bias is None else bias + attention_mask
    out = attention.attend(
        query, key, value, mask=mask, bias=bias, scale=scaling, causal=bool(asked) and attention_mask is None
    )
    return out.transpose(1, 2).contiguous(), None


def _is_cross(module: nn.Module) -> bool:
    name = type(module).__name__
    return "Cross" in name or bool(getattr(module, "is_cross_attention", False))


AttentionInterface.register("formulary", formulary_attention)
AttentionMaskInterface.register("formulary", sdpa_mask)
