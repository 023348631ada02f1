"""Masked losses: what is hidden of an image or a text, and the head that is asked what stood there and is thrown away.

A task is called as `task(model, inputs)` and gives the loss; `frozen=True` passes no gradient into the model. A model with a
head of its own (`ViTMAEForPreTraining`, `...ForMaskedLM`) uses that, and its task has no weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTMAEConfig
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEDecoder

from formulary.errors import FormularyError

HEAD = 32
"""Width of one head of the decoder."""


@contextmanager
def configured(model: nn.Module, **values: Any) -> Iterator[None]:
    """Within the context, the model's config has these values where it has such names at all."""
    before = {name: getattr(model.config, name) for name in values if hasattr(model.config, name)}
    try:
        for name in before:
            setattr(model.config, name, values[name])
        yield
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)


# ---------------------------------------------------------------- images


def patches_of(pixels: Float[Tensor, "B C H W"], size: int) -> Float[Tensor, "B N P"]:
    """Patches row by row, each with mean 0 and deviation 1; P = size * size * C, channels last."""
    grid = pixels.unfold(2, size, size).unfold(3, size, size)
    flat = grid.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    return (flat - flat.mean(-1, keepdim=True)) / (flat.var(-1, keepdim=True) + 1e-6).sqrt()


def choose_patches(
    batch: int, count: int, share: float
) -> tuple[Int[Tensor, "B K"], Int[Tensor, "B N"], Bool[Tensor, "B N"]]:
    """Which patches of each image stay visible, where each patch of the shuffled row belongs, and which are hidden.

    As many stay in every image: the part 1 - share of them, rounded down, at least one and never all.
    """
    order = torch.rand(batch, count).argsort(1)
    restore = order.argsort(1)
    kept = max(1, min(count - 1, int(count * (1 - share) + 1e-6)))
    return order[:, :kept], restore, restore >= kept


class Pixels(nn.Module):
    """Mean squared error of the normalized pixels of hidden patches, which a decoder tells from the visible ones.

    The encoder sees [CLS] (and other leading tokens) and the visible patches alone. Raises FormularyError for a model whose
    embeddings are not such a row of tokens.
    """

    def __init__(self, model: nn.Module, pixels: Float[Tensor, "B C H W"], share: float, width: int, layers: int):
        super().__init__()
        self.share, self.size = share, model.config.patch_size
        self.own = type(model).__name__ == "ViTMAEForPreTraining"
        if not self.own:
            self.count, self.lead = self._tokens(model, pixels)
            config = ViTMAEConfig(
                hidden_size=model.config.hidden_size, patch_size=self.size, num_channels=pixels.shape[1],
                decoder_hidden_size=width, decoder_intermediate_size=4 * width, decoder_num_hidden_layers=layers,
                decoder_num_attention_heads=width // HEAD, attn_implementation="sdpa",
            )  # fmt: skip
            self.decoder = ViTMAEDecoder(config, self.count)

    def _tokens(self, model: nn.Module, pixels: Tensor) -> tuple[int, int]:
        """Number of patches, and of tokens before them."""
        name, embeddings = type(model).__name__, getattr(model.base_model, "embeddings", None)
        height, width = pixels.shape[-2:]
        if height != width or not isinstance(self.size, int) or height % self.size:
            shape = f"{height} x {width} in patches of {self.size}"
            raise FormularyError(f"self-distill-further-pretraining needs square images of whole patches, not {shape}")
        count = (height // self.size) ** 2
        with torch.no_grad():
            tokens = embeddings(pixels[:1]) if embeddings is not None else None
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[1] <= count or count < 2:
            why = ": give the ViTMAEForPreTraining around it" if name == "ViTMAEModel" else ", which needs [CLS] and patches"
            raise FormularyError(f"self-distill-further-pretraining cannot hide patches from a {name}{why}")
        return count, tokens.shape[1] - count

    def forward(self, model: nn.Module, inputs: dict[str, Tensor], frozen: bool = False) -> Float[Tensor, ""]:
        pixels = inputs["pixel_values"]
        if self.own:
            with configured(model, mask_ratio=self.share, norm_pix_loss=True):
                return model(pixel_values=pixels).loss
        kept, restore, hidden = (t.to(pixels.device) for t in choose_patches(len(pixels), self.count, self.share))

        def visible(module: nn.Module, args: tuple, tokens: Tensor) -> Tensor:
            chosen = tokens[:, self.lead :].gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))
            return torch.cat([tokens[:, : self.lead], chosen], 1)

        handle = model.base_model.embeddings.register_forward_hook(visible)
        try:
            with torch.set_grad_enabled(not frozen):
                states = model.base_model(pixel_values=pixels).last_hidden_state
        finally:
            handle.remove()
        told = self.decoder(torch.cat([states[:, :1], states[:, self.lead :]], 1), restore).logits
        return (told - patches_of(pixels, self.size))[hidden].square().mean()


# ---------------------------------------------------------------- texts


def hide_tokens(
    ids: Int[Tensor, "B L"], free: Bool[Tensor, "B L"], share: float, mask_token: int | None, vocabulary: int
) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """The ids with some hidden, and which are asked for: each `free` one with probability `share`.

    Of those, 80 % become the mask token, 10 % a random one, and 10 % stay, as in BERT; without a mask token all become
    random ones.
    """
    asked = (torch.rand(ids.shape).to(ids.device) < share) & free
    roll, random = torch.rand(ids.shape).to(ids.device), torch.randint(vocabulary, ids.shape).to(ids.device)
    if mask_token is None:
        return torch.where(asked, random, ids), asked
    shown = torch.where(roll < 0.8, torch.full_like(ids, mask_token), torch.where(roll < 0.9, random, ids))
    return torch.where(asked, shown, ids), asked


class Tokens(nn.Module):
    """Cross-entropy, in nats, of the hidden tokens: a dense layer, GELU, LayerNorm, and the model's own embeddings as output
    weights, unless the model has such a head.
    """

    def __init__(self, model: nn.Module, share: float, mask_token: int | None, special: list[int]):
        super().__init__()
        self.share, self.mask_token, self.special = share, mask_token, special
        self.own = type(model).__name__.endswith("ForMaskedLM")
        if not self.own:
            vocabulary, width = model.get_input_embeddings().weight.shape
            self.dense, self.norm = nn.Linear(model.config.hidden_size, width), nn.LayerNorm(width)
            self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, model: nn.Module, inputs: dict[str, Tensor], frozen: bool = False) -> Float[Tensor, ""]:
        ids = inputs["input_ids"]
        free = ~torch.isin(ids, torch.tensor(self.special, device=ids.device, dtype=ids.dtype))
        if "attention_mask" in inputs:
            free &= inputs["attention_mask"].bool()
        vocabulary = model.get_input_embeddings().weight.shape[0]
        shown, asked = hide_tokens(ids, free, self.share, self.mask_token, vocabulary)
        shown = {**inputs, "input_ids": shown}
        if self.own:
            logits = model(**shown).logits[asked]
        else:
            with torch.set_grad_enabled(not frozen):
                states, table = model.base_model(**shown).last_hidden_state[asked], model.get_input_embeddings().weight
            logits = self.norm(F.gelu(self.dense(states))) @ (table.detach() if frozen else table).T + self.bias
        return F.cross_entropy(logits, ids[asked], reduction="sum") / asked.sum().clamp(min=1)
