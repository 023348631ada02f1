"""The attention contract: a function of query, key and value in place of scaled dot-product attention, and its one adapter.

The adapter is registered with transformers under the name "formulary", with `sdpa_mask` as its mask function (without which
padding would be ignored in silence). It looks for an `Attention` on the module that calls it; modules without one (cross-attention
never has one) go to PyTorch's own `scaled_dot_product_attention`, and so does the decoding of a single token, except where an
`Attention` is never equal to it (`equals_sdpa = False`).
"""

import inspect
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from formulary.errors import FormularyError

ATTRIBUTE = "formulary_attention"
CROSS = ("encoder_attn", "crossattention", "EncDecAttention")


class Attention(nn.Module):
    """One way of computing attention. Subclasses take JSON scalars in their constructor and implement `attend`.

    `lookahead` is how many later positions a block-wise choice of keys may see (0: strictly causal; a subclass whose choice
    depends on its arguments sets it on the instance); no weight ever falls on a later or a padded key. `equals_sdpa` says whether
    the full budget gives scaled dot-product attention, and `full_budget()` returns the arguments that do.
    Dropout of attention weights is not applied: there may be no weights to drop.
    """

    lookahead: int = 0
    equals_sdpa: ClassVar[bool] = True

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
        1/sqrt(K); `causal` lets query i see keys 0 to i (then S = L). Raises nothing for odd lengths: pad inside. A query that may see no
        key gets zeros, or any finite value: it is padding."""
        raise NotImplementedError

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """Constructor arguments with which `attend` must equal scaled dot-product attention."""
        raise NotImplementedError

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **kwargs) -> Tensor:
        return self.attend(query, key, value, **kwargs)

    @classmethod
    def attach(cls, model: nn.Module, name: str, **args) -> nn.Module:
        """Set `cls(**args)` on the self-attention module `name` and switch the model to the adapter.

        Raises FormularyError for cross-attention, which stays with SDPA, for a module whose attention was set before, and when the
        module does not compute its attention through transformers' attention interface, since it would then never ask.
        """
        module = model.get_submodule(name)
        if _is_cross(name, module):
            raise FormularyError(f"{name} is cross-attention; an attention method replaces self-attention only")
        if hasattr(module, ATTRIBUTE):
            there = type(getattr(module, ATTRIBUTE)).__name__
            raise FormularyError(f"{name} already computes its attention by {there}: one method can set it, not two")
        if not _dispatches(model, module):
            raise FormularyError(
                f"{name} ({type(module).__name__}) does not call transformers' attention interface, so its attention cannot be set"
            )
        setattr(module, ATTRIBUTE, cls(**args))
        if model.config._attn_implementation != "formulary":
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
    if attention is None or (query.shape[2] == 1 and attention.equals_sdpa):
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
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise FormularyError(f"{type(attention).__name__} cannot stand in {type(module).__name__}, whose attention uses {name}")
    asked = getattr(module, "is_causal", False) if is_causal is None else is_causal
    causal = bool(asked) and attention_mask is None and query.shape[2] > 1
    if causal and key.shape[2] > query.shape[2]:
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    mask, bias = _mask_and_bias(attention_mask, position_bias, query.shape[2], key.shape[2])
    out = attention.attend(query, key, value, mask=mask, bias=bias, scale=scaling, causal=causal)
    return out.transpose(1, 2).contiguous(), None


def _mask_and_bias(mask: Tensor | None, bias: Tensor | None, length: int, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """(boolean mask, additive bias), each (#B,#H,L,S) or None, from transformers' mask of either kind and its position bias."""
    mask, bias = (None if x is None else x[..., :keys].expand(-1, -1, length, -1) for x in (mask, bias))
    if mask is not None and mask.dtype != torch.bool:
        mask, bias = None, mask if bias is None else bias + mask
    return mask, bias


def _dispatches(model: nn.Module, module: nn.Module) -> bool:
    """Whether the module's code looks its attention function up in transformers' registry."""
    can = getattr(model, "_can_set_attn_implementation", None)
    forwards = (vars(cls)["forward"] for cls in type(module).__mro__ if "forward" in vars(cls))
    asks = any("ALL_ATTENTION_FUNCTIONS" in getattr(inspect.unwrap(forward), "__globals__", ()) for forward in forwards)
    return can is not None and can() and hasattr(module, "is_causal") and asks


def _is_cross(name: str, module: nn.Module) -> bool:
    return "Cross" in type(module).__name__ or any(part in CROSS for part in name.split("."))


AttentionInterface.register("formulary", formulary_attention)
AttentionMaskInterface.register("formulary", sdpa_mask)
