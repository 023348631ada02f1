"""GTP-ViT: each block of a trained ViT drops its least needed image tokens, after passing them on to their neighbors.

    select:     score_i = max_h A_h[i,i] * max_h sum_j A_h[j,i]; the P image tokens of lowest score are dropped
    graph:      G = 8 neighbors in the image, or k nearest by cosine of the embeddings, or both; G' = D^-1/2 G D^-1/2
    summarize:  x_keep += alpha G'[keep,drop] x_drop, and the token sizes s likewise, from s = 1
    attention:  A_h = softmax(q k' / sqrt(d) + log s), then all but its largest theta N^2 entries are zeroed

Source: arXiv:2311.03035, section 3. In each block the attention works on N tokens and the feed-forward on N - P; CLS,
distillation and register tokens stay. Pixels (B,C,H,W) in; the model's own outputs come out, of their usual shapes when
`restore` is on: after the last block each dropped token gets the state of the kept token nearest to it in the image.
Hidden states of inner blocks (`output_hidden_states`) hold the kept tokens only. As in the released code, G' is
normalized once and its kept part never again. The paper tunes theta for each model and P (0.5 to 1.0); the default 1 is
the code's, and finding the threshold is slow on a CPU. A block with P = 0 needs no statistics and calls PyTorch's own
attention, so P = 0 and alpha = 0 leave the outputs as they are, bit for bit.

Raises FormularyError for a model without a grid of patches or without a seam, for one whose inner blocks feed a dense
head, and, when it runs, for an attention mask or gradient checkpointing.

>>> import torch
>>> from formulary.lab.small import inputs_for, tiny
>>> model, report = GTP(tokens_per_layer=4).apply(tiny("vit"))
>>> tuple(model(**inputs_for(model)).last_hidden_state.shape), report.figures["image tokens after each block"]
((2, 17, 32), [12, 8])
>>> kept_index(model).shape  # positions of CLS and 8 image tokens, for each of 2 images
torch.Size([2, 9])
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from formulary.contracts import Attention, BlockEdit, Data, Report, Transform, parts
from formulary.contracts.edits import Editor
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError, UsageError, nearest
from formulary.papers.token_reduction._parts import PREFIX_TOKENS, grid, patches, refuse_masks
from formulary.papers.token_reduction.gtp_vit.tokens import Tokens, sparsify, token_scores

GRAPHS = ("both", "spatial", "semantic")


def shared_tokens(model: nn.Module) -> Tokens:
    """The `Tokens` of an edited model. Raises FormularyError when the model has none."""
    for module in model.modules():
        if isinstance(module, PatchGrid):
            return module.gtp_tokens
    raise FormularyError(f"this {type(model).__name__} carries no gtp-vit edits")


def kept_index(model: nn.Module) -> Int[Tensor, "B M"]:
    """Positions, in the whole token sequence, of the tokens that the last forward kept to the end, CLS first."""
    tokens = shared_tokens(model)
    if tokens.kept is None:
        raise FormularyError("no tokens were kept yet: run the model first")
    prefix = torch.arange(tokens.prefix, device=tokens.kept.device).expand(len(tokens.kept), -1)
    return torch.cat([prefix, tokens.kept + tokens.prefix], dim=1)


# ---------------------------------------------------------------- edits


class PatchGrid:
    """Makes the patch embedding note the grid's height and width for the blocks, and hold what they share."""

    @classmethod
    def attach(cls, model: nn.Module, name: str, *, graph: str, neighbors: int) -> nn.Module:
        module = model.get_submodule(name)
        bases = (cls, type(module))
        module.__class__ = type("".join(base.__name__ for base in bases), bases, {"__module__": cls.__module__})
        module.gtp_tokens = Tokens(graph, neighbors)
        return module

    def forward(self, pixel_values: Tensor, *args, **kwargs) -> Tensor:
        self.gtp_tokens.height, self.gtp_tokens.width = grid(self.projection, pixel_values)
        return super().forward(pixel_values, *args, **kwargs)


class ScoredAttention(Attention):
    """Softmax attention with the keys' log sizes added; if `scored`, it sparsifies its map and scores the tokens."""

    def __init__(self, scored: bool, density: float):
        super().__init__()
        self.scored, self.density, self.tokens = scored, density, None

    @classmethod
    def attach(cls, model: nn.Module, name: str, **args) -> nn.Module:
        module = super().attach(model, name, **args)
        module.formulary_attention.tokens = shared_tokens(model)
        return module

    def attend(
        self,
        query: Float[Tensor, "B H L K"],
        key: Float[Tensor, "B H L K"],
        value: Float[Tensor, "B H L K"],
        *,
        mask: Bool[Tensor, "#B #H L L"] | None = None,
        bias: Float[Tensor, "#B #H L L"] | None = None,
        scale: float | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "B H L K"]:
        refuse_masks("gtp-vit", mask, bias, causal)
        sizes = self.tokens.bias
        if not self.scored:
            sizes = None if sizes is None else sizes.to(query.dtype)
            return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=sizes, scale=scale)
        scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
        attention = (scores if sizes is None else scores + sizes.to(scores.dtype)).softmax(-1)
        if self.density < 1:
            attention = sparsify(attention, self.density)
        self.tokens.scores = token_scores(attention.detach(), self.tokens.prefix)
        return attention @ value


class Propagation(BlockEdit):
    """Between attention and feed-forward, `drop` tokens pass on their content and leave; the last may restore them."""

    def setup(self, model: nn.Module, *, drop: int, alpha: float, first: bool, last: bool, restore: bool) -> None:
        self.gtp_tokens, self.gtp_drop, self.gtp_alpha = shared_tokens(model), drop, alpha
        self.gtp_first, self.gtp_last, self.gtp_restore = first, last, restore

    @property
    def kept_index(self) -> Int[Tensor, "B n"] | None:
        """The patches that the last forward kept, the same for all blocks; `kept_index(model)` counts CLS in."""
        return self.gtp_tokens.kept

    def before(self, hidden: Tensor) -> Tensor:
        if getattr(self, "gradient_checkpointing", False) and self.training:
            raise FormularyError("gtp-vit cannot replay a block's token choice: train without gradient checkpointing")
        if self.gtp_first:
            self.gtp_tokens.start(hidden)
        return super().before(hidden)

    def middle(self, hidden: Tensor) -> Tensor:
        hidden = super().middle(hidden)
        return self.gtp_tokens.reduce(hidden, self.gtp_drop, self.gtp_alpha) if self.gtp_drop else hidden

    def after(self, hidden: Tensor) -> Tensor:
        hidden = super().after(hidden)
        if self.gtp_last:
            hidden = self.gtp_tokens.restore(hidden) if self.gtp_restore else hidden
            self.gtp_tokens.end()
        return hidden


# ---------------------------------------------------------------- the method


@dataclass(frozen=True, kw_only=True)
class GTP(Transform):
    """Drop `tokens_per_layer` (P) image tokens in each chosen block, each passing `alpha` of itself along the graph.

    graph: "spatial" (8 neighbors in the image), "semantic" (the `neighbors` most similar embeddings) or "both".
    attention_density: the part of each attention map that is kept (theta). restore: give the outputs all tokens again.
    One image token always stays: P is lowered to fit the data's image size, or the configured one without data, and by
    the blocks for smaller images.
    """

    tokens_per_layer: int = 8
    alpha: float = 0.1
    graph: str = "both"
    neighbors: int = 8
    attention_density: float = 1.0
    restore: bool = True

    supports = frozenset({"vision"})
    unit = "block"

    def __post_init__(self):
        super().__post_init__()
        check_range("gtp-vit", "tokens_per_layer", self.tokens_per_layer, 0, 100_000)
        check_range("gtp-vit", "alpha", self.alpha, 0, 1)
        check_range("gtp-vit", "neighbors", self.neighbors, 1, 100_000)
        if not 0 < self.attention_density <= 1:
            raise UsageError(f"gtp-vit: attention_density must be above 0 and at most 1, got {self.attention_density}")
        if self.graph not in GRAPHS:
            near = nearest(self.graph, GRAPHS)
            raise UsageError(f"gtp-vit: graph must be one of {', '.join(GRAPHS)}, got {self.graph!r}{near}")

    def run(self, model: nn.Module, data: Data | None, edit: Editor, report: Report) -> None:
        blocks = parts.blocks(model)
        embedding, count = patches(self.slug, model, data)
        chosen = {block.name for block in parts.blocks(model, self.targets, self.ignore)}
        drop = _fitting(self.tokens_per_layer, count, len(chosen), report)
        edit.edit(embedding, PatchGrid, graph=self.graph, neighbors=self.neighbors)
        mixers = {part.block.name: part.name for part in parts.mixers(model)}
        for block in blocks:
            acts = block.name in chosen
            scored = acts and (drop > 0 or self.attention_density < 1)
            ends = {"first": block is blocks[0], "last": block is blocks[-1], "restore": self.restore}
            edit.edit(mixers[block.name], ScoredAttention, scored=scored, density=self.attention_density)
            edit.edit(block.name, Propagation, drop=drop if acts else 0, alpha=self.alpha, **ends)
            if acts:
                report.changed(block.name, parts.count_weights(block.module), f"drops {drop} image tokens")
        if len(chosen) < len(blocks):
            report.note(f"{len(blocks) - len(chosen)} blocks not chosen keep their tokens")
        report.figures.update(_figures(model, blocks, chosen, drop, count))


def _fitting(drop: int, patches: int, layers: int, report: Report) -> int:
    """The number of tokens to drop per block, lowered so that one is left at the end."""
    fits = (patches - 1) // max(1, layers)
    if drop > fits:
        report.note(f"tokens_per_layer lowered from {drop} to {fits}: {layers} blocks share {patches} image tokens")
    return min(drop, fits)


def _figures(model, blocks: Sequence[parts.Block], chosen: set[str], drop: int, patches: int) -> dict:
    """Image tokens after each block, and the blocks' multiply-adds relative to before, for `patches` tokens."""
    prefix = sum(value.shape[1] for name, value in model.named_parameters() if name.endswith(PREFIX_TOKENS))
    linears, width = parts.linears(model), model.config.hidden_size
    whole, left, counts, before, after = prefix + patches, patches, [], 0, 0
    for block in blocks:
        of_block = {part.name: part.weights for part in linears if part.name.startswith(f"{block.name}.")}
        mixing = sum(weights for name, weights in of_block.items() if ".attention." in name)
        feeding, length = sum(of_block.values()) - mixing, prefix + left
        dropped = drop if block.name in chosen else 0
        left -= dropped
        counts.append(left)
        before += whole * (mixing + feeding) + 2 * width * whole**2
        after += length * mixing + 2 * width * length**2 + (prefix + left) * feeding + dropped * left * width
    return {"image tokens after each block": counts, "multiply-adds, of the unreduced model's": after / before}
