"""Adaptive token sampling: in chosen blocks of a trained ViT, each image keeps as many tokens as its scores call for.

    score:   S_j = A_cls,j |V_j| / sum_i A_cls,i |V_i| over image tokens, A summed over heads, |V_j| over all of them
    sample:  with the scores in ascending order and Psi their cumulative sum, the tokens whose Psi is nearest to
             1/2K, 3/2K, ..., (2K-1)/2K; a token hit more than once is kept once, so K' <= K are left
    attend:  O = A_kept V: every token is a key and a value once more, only CLS and the kept ones are queries

Source: arXiv:2111.15667, section 3; no parameters and no training. Peaked scores hit few tokens often, flat ones many.
The released code differs: it rescales Psi to start at 0 and spaces the levels evenly from its smallest value to 1.
Pixels (B,C,H,W) in; the model's own outputs come out, of their usual shapes when `restore` is on: after the last block
each dropped token gets the state of the kept token nearest in the grid. CLS, distillation and register tokens stay.

A batch is as long as its longest image; what pads the others is seen by no key and no score, so an image gives the same
alone (without `restore`, outputs end in that padding; `_parts.kept_index` says what is real). `max_tokens` is K:
at most so many image tokens are left by a chosen block. By default it is the number of patches, so that a block drops
only what the scores let fall. Dropped tokens are not attended for, but pass through the output projection as zeros.

Raises FormularyError for a model without a grid of patches, without a seam or without a CLS token, and when it runs for
an attention mask or gradient checkpointing; UsageError for blocks that the model does not have.

>>> from formulary.lab.small import inputs_for, tiny
>>> model, report = AdaptiveTokenSampler(blocks=(1,), max_tokens=8).apply(tiny("vit"))
>>> tuple(model(**inputs_for(model)).last_hidden_state.shape), report.headline
((2, 17, 32), 'ats-adaptive-token-sampler on 1 block, 42 % of the weights')
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from formulary.contracts import Attention, Data, Report, Transform, parts
from formulary.contracts.edits import Editor
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError, UsageError
from formulary.papers.token_reduction._parts import (
    PatchGrid,
    TokenBlock,
    multiply_adds,
    patches,
    refuse_masks,
    shared_tokens,
)

SLUG = "ats-adaptive-token-sampler"


# ---------------------------------------------------------------- the equations


def significance(
    attention: Float[Tensor, "B H n"], value: Float[Tensor, "B H n K"], real: Bool[Tensor, "B n"] | None = None
) -> Float[Tensor, "B n"]:
    """Scores of the image tokens, which sum to 1, from what CLS attends to and the values; padding scores 0."""
    size = value.transpose(1, 2).flatten(2).norm(dim=-1)
    scores = attention.sum(1) * size
    scores = scores if real is None else scores * real
    return scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def sample(scores: Float[Tensor, "B n"], levels: int, real: Bool[Tensor, "B n"] | None = None) -> Bool[Tensor, "B n"]:
    """Which tokens inverse transform sampling at `levels` fixed levels hits; of two equally near ones, the lower."""
    ranked = scores if real is None else scores.masked_fill(~real, -1)  # padding comes first, where nothing is hit
    order = ranked.argsort(dim=1, stable=True)
    total = scores.gather(1, order).double().cumsum(1)
    if real is not None:
        total = total.masked_fill(~real.gather(1, order), -torch.inf)
    at = (2 * torch.arange(levels, device=scores.device, dtype=total.dtype) + 1) / (2 * levels)
    above = torch.searchsorted(total, at.expand(len(total), -1).contiguous()).clamp_max(total.shape[1] - 1)
    below = (above - 1).clamp_min(0)
    nearer = at - total.gather(1, below) <= total.gather(1, above) - at
    hit = order.gather(1, torch.where(nearer, below, above))
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, hit, True)


def packed(kept: Bool[Tensor, "B n"]) -> tuple[Int[Tensor, "B m"], Bool[Tensor, "B m"] | None]:
    """The indices of the kept tokens, ascending, and which of them are no padding: None when no image needs any."""
    counts = kept.sum(1)
    longest = int(counts.max())
    index = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    real = torch.arange(longest, device=kept.device) < counts[:, None]
    return index, None if bool(real.all()) else real


# ---------------------------------------------------------------- edits


class SampledAttention(Attention):
    """Attention that keeps padding out and, if it `samples`, asks for CLS and the tokens that its scores hit alone."""

    def __init__(self, samples: bool, max_tokens: int):
        super().__init__()
        self.samples, self.max_tokens, self.tokens = samples, max_tokens, None

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
        refuse_masks(SLUG, mask, bias, causal)
        tokens, seen = self.tokens, None
        if tokens.real is not None:
            seen = nn.functional.pad(tokens.real, (tokens.prefix, 0), value=True)[:, None, None]
        if not self.samples:
            return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)
        kept = self.choose(self._read(query, key, seen, scale), value[:, :, tokens.prefix :].detach())
        index, real = tokens.choice = packed(kept)
        prefix = torch.arange(tokens.prefix, device=query.device).expand(len(query), -1)
        asked = torch.cat([prefix, index + tokens.prefix], 1)[:, None, :, None]
        asked = asked.expand(-1, query.shape[1], -1, query.shape[3])
        out = scaled_dot_product_attention(query.gather(2, asked), key, value, attn_mask=seen, scale=scale)
        return torch.zeros_like(query).scatter(2, asked, out)

    def _read(self, query: Tensor, key: Tensor, seen: Tensor | None, scale: float | None) -> Float[Tensor, "B H n"]:
        """What CLS attends to among the image tokens."""
        scores = (query[:, :, :1] * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
        scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
        wide = torch.promote_types(scores.dtype, torch.float32)
        return scores.softmax(-1, dtype=wide)[:, :, 0, self.tokens.prefix :].detach()

    def choose(self, attention: Float[Tensor, "B H n"], value: Float[Tensor, "B H n K"]) -> Bool[Tensor, "B n"]:
        """The image tokens that stay."""
        real = self.tokens.real
        return sample(significance(attention, value.to(attention.dtype), real), self.max_tokens, real)


class Sampling(TokenBlock):
    """Between attention and feed-forward, what the attention chose goes on."""

    def middle(self, hidden: Tensor) -> Tensor:
        return self.chosen(super().middle(hidden))


# ---------------------------------------------------------------- the method


@dataclass(frozen=True, kw_only=True)
class AdaptiveTokenSampler(Transform):
    """Sample tokens in the blocks `blocks` (counted from 1), at most `max_tokens` image tokens in each.

    blocks: empty for the paper's on DeiT-S, 4 to 12 of 12, scaled to the model's depth. max_tokens: K, the levels that
    are sampled; 0 for the number of patches. restore: give the outputs all tokens again.
    """

    blocks: tuple[int, ...] = ()
    max_tokens: int = 0
    restore: bool = True

    supports = frozenset({"vision"})
    unit = "block"

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "blocks", tuple(self.blocks))
        check_range(SLUG, "max_tokens", self.max_tokens, 0, 1_000_000)
        if list(self.blocks) != sorted(set(self.blocks)):
            raise UsageError(f"{SLUG}: blocks must ascend, got {self.blocks}")

    def run(self, model: nn.Module, data: Data | None, edit: Editor, report: Report) -> None:
        embedding, count = patches(SLUG, model, data)
        if not any(name.endswith("cls_token") for name, _ in model.named_parameters()):
            raise FormularyError(f"{SLUG} scores by a CLS token; this {type(model).__name__} has none")
        every, levels = parts.blocks(model), self.max_tokens or count
        depth = len(every)
        wanted = self.blocks or range(1 - -depth // 4, depth + 1)
        if bad := [place for place in wanted if not 1 <= place <= depth]:
            raise UsageError(f"{SLUG}: blocks must be between 1 and {depth} in this model, got {bad[0]}")
        if levels > count:
            report.note(f"max_tokens {levels} is more than the {count} patches: it bounds nothing")
        chosen = {block.name for block in parts.blocks(model, self.targets, self.ignore)}
        mixers = {part.block.name: part.name for part in parts.mixers(model)}
        edit.edit(embedding, PatchGrid, owner=SLUG)
        for place, block in enumerate(every, start=1):
            samples = place in wanted and block.name in chosen
            edit.edit(mixers[block.name], SampledAttention, samples=samples, max_tokens=levels)
            edit.edit(block.name, Sampling, first=place == 1, last=place == depth, restore=self.restore)
            if samples:
                report.changed(block.name, parts.count_weights(block.module), f"samples at {levels} levels")
        if data is not None and "pixel_values" in data.items[0] and report.changes:
            report.figures.update(_figures(model, data, count))


@torch.no_grad()
def _figures(model: nn.Module, data: Data, count: int) -> dict:
    """Image tokens after each block, the mean over the data's first batch, and the blocks' multiply-adds for them."""
    tokens, lengths, was = shared_tokens(model), [], model.training

    def note(*_):
        lengths.append(tokens.kept.shape[1] if tokens.real is None else tokens.real.sum(1).float().mean().item())

    handles = [part.module.register_forward_pre_hook(note) for part in parts.feed_forwards(model)]
    try:
        model.eval()(pixel_values=next(data.batches())["pixel_values"].to(next(model.parameters())))
    finally:
        for handle in handles:
            handle.remove()
        model.train(was)
    left = [float(n) for n in (count, *lengths)]
    cost = multiply_adds(model, list(zip(left, left[1:]))) / multiply_adds(model, [(count, count)] * len(lengths))
    return {"image tokens after each block": lengths, "multiply-adds, of the unreduced model's": cost}
