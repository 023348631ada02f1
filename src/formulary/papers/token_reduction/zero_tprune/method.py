"""Zero-TPrune: after some blocks of a trained ViT, tokens that repeat another or that few others read leave, untrained.

    rank:      s <- A_h' s over the tokens left, rescaled each time, from s = 1 and CLS = sqrt(N)  (Weighted Page Rank)
    heads:     s_j = sqrt(mean_h s_hj^2) over the heads with v_min <= var_j(s_h) <= v_max          (EIR, VHF)
    I' stage:  one vote of the block's attention A ranks the image tokens; nothing leaves
    S stage:   of the less important half, the `similar` tokens whose keys are nearest (cosine) to one of the other half
    I stage:   `iterations` votes among what is left; of it the `keep` part of highest rank stays

Source: arXiv:2305.17328, section 3; the defaults (after blocks 1, 3, 6, 9 and 11 of 12) are those of section 4 for
DeiT-S, about 34 % fewer multiply-adds. Pixels (B,C,H,W) in; the model's own outputs come out, of their usual shapes
when `restore` is on: after the last block each pruned token gets the state of the kept token nearest in the grid.
CLS, distillation and register tokens stay.

Settled here: variances are those of image tokens rescaled to a mean of 1; where no head passes the filter, all count;
votes from and for pruned tokens are left out and the rest is not normalized again; keys are compared over all heads.
With `trials`, keep ratios and numbers of similar tokens are drawn at random until they cost about `budget`, and the
draw whose features on the data's first batch are nearest to the unpruned model's is taken (a Monte Carlo search).

Raises FormularyError for a model without a grid of patches or without a seam, and when it runs for an attention mask or
gradient checkpointing; UsageError for positions that the model does not have.

>>> from formulary.lab.small import inputs_for, tiny
>>> model, report = ZeroTPrune(layers=(1,), keep=(0.75,), similar=4, iterations=(5,)).apply(tiny("vit"))
>>> tuple(model(**inputs_for(model)).last_hidden_state.shape), report.figures["image tokens after each block"]
((2, 17, 32), [9, 9])
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

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
from formulary.papers.token_reduction.zero_tprune.ranking import importance, left, page_rank, repeated

SLUG = "zero-tprune"


# ---------------------------------------------------------------- edits


class RankedAttention(Attention):
    """Softmax attention that leaves the choice of image tokens to its block."""

    def __init__(self, iterations: int, keep: float, similar: int, v_min: float, v_max: float):
        super().__init__()
        self.iterations, self.keep, self.similar, self.tokens = iterations, keep, similar, None
        self.v_min, self.v_max = v_min, v_max

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
        scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
        attention = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        self.tokens.choice = self.choose(attention.detach(), key.detach()), None
        return attention.to(value.dtype) @ value

    def choose(self, attention: Float[Tensor, "B H L L"], key: Float[Tensor, "B H L K"]) -> Int[Tensor, "B kept"]:
        """The image tokens that stay, ascending, counted among those that are here."""
        prefix = self.tokens.prefix
        alive = torch.ones(len(attention), attention.shape[-1], dtype=torch.bool, device=attention.device)
        count = attention.shape[-1] - prefix
        similar = min(self.similar, count // 2)
        if similar:
            first = self._importance(attention, alive, 1)
            features = key.transpose(1, 2).flatten(2)[:, prefix:].float()
            alive[:, prefix:] = ~repeated(first, features, similar)
        ranks = self._importance(attention, alive, self.iterations).masked_fill(~alive[:, prefix:], -1)
        order = ranks.argsort(dim=1, descending=True, stable=True)
        return order[:, : left(count, similar, self.keep)].sort(dim=1).values

    def _importance(self, attention: Tensor, alive: Tensor, iterations: int) -> Float[Tensor, "B n"]:
        votes = page_rank(attention, alive, iterations, self.tokens.prefix)[..., self.tokens.prefix :]
        return importance(votes, alive[:, self.tokens.prefix :], self.v_min, self.v_max)


class Pruning(TokenBlock):
    """After the block, what its attention chose goes on."""

    def after(self, hidden: Tensor) -> Tensor:
        return super().after(self.chosen(hidden))


# ---------------------------------------------------------------- the method


@dataclass(frozen=True, kw_only=True)
class ZeroTPrune(Transform):
    """Prune image tokens after blocks `layers` (counted from 1): `similar` ones, then all but the `keep` part.

    layers: empty for the paper's positions, scaled to the model's depth. keep and iterations: one per layer.
    v_min, v_max: the variances between which a head has a say. trials: random draws of keep ratios and similar tokens
    to choose from with data, 0 to use the given ones; budget: the multiply-adds to draw for, of the unpruned blocks'.
    restore: give the outputs all tokens again.
    """

    layers: tuple[int, ...] = ()
    keep: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 1.0)
    similar: int = 10
    iterations: tuple[int, ...] = (30, 5, 5, 1, 1)
    v_min: float = 0.01
    v_max: float = 0.7
    trials: int = 0
    budget: float = 0.65
    restore: bool = True

    supports = frozenset({"vision"})
    unit = "pruning layer"
    paper: ClassVar[tuple[int, ...]] = (1, 3, 6, 9, 11)

    def __post_init__(self):
        super().__post_init__()
        for name in ("layers", "keep", "iterations"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_range(SLUG, "similar", self.similar, 0, 100_000)
        check_range(SLUG, "trials", self.trials, 0, 10_000)
        check_range(SLUG, "budget", self.budget, 0.05, 1)
        if not 0 <= self.v_min <= self.v_max:
            raise UsageError(f"{SLUG}: v_min must be between 0 and v_max, got {self.v_min} and {self.v_max}")
        count = len(self.layers or self.paper)
        for name in ("keep", "iterations"):
            if len(getattr(self, name)) != count:
                got = getattr(self, name)
                raise UsageError(f"{SLUG}: {name} needs one value for each of {count} layers, got {got}")
        for share, votes in zip(self.keep, self.iterations):
            check_range(SLUG, "iterations", votes, 1, 10_000)
            if not 0 < share <= 1:
                raise UsageError(f"{SLUG}: keep must be above 0 and at most 1, got {share}")
        if list(self.layers) != sorted(set(self.layers)):
            raise UsageError(f"{SLUG}: layers must ascend, got {self.layers}")

    def run(self, model: nn.Module, data: Data | None, edit: Editor, report: Report) -> None:
        embedding, count = patches(SLUG, model, data)
        plan = self._plan(model, count, report)
        if self.trials:
            plan = self._searched(model, embedding, count, plan, data, report)
        for name, cls, args in self._edits(model, embedding, plan):
            edit.edit(name, cls, **args)
        blocks, after = parts.blocks(model), _counts(len(parts.blocks(model)), count, plan)
        for layer in plan:
            block = blocks[layer - 1]
            report.changed(block.name, parts.count_weights(block.module), f"leaves {after[layer - 1]} image tokens")
        report.figures["image tokens after each block"] = after
        report.figures["multiply-adds, of the unreduced model's"] = _cost(model, count, plan)

    def _plan(self, model: nn.Module, count: int, report: Report) -> dict[int, tuple[float, int, int]]:
        """Layer -> (keep, similar, iterations), in ascending order."""
        blocks = parts.blocks(model)
        chosen = {block.name for block in parts.blocks(model, self.targets, self.ignore)}
        depth, plan = len(blocks), {}
        wanted = self.layers or [max(1, min(depth - 1, round(depth * place / 12))) for place in self.paper]
        for layer, keep, iterations in zip(wanted, self.keep, self.iterations):
            if not 1 <= layer < depth:
                raise UsageError(f"{SLUG}: layers must be between 1 and {depth - 1} in this model, got {layer}")
            if layer in plan:
                report.note(f"block {layer} of {depth} is several of the paper's positions and prunes once")
            elif blocks[layer - 1].name not in chosen:
                report.note("blocks not chosen prune nothing")
            elif keep == 1 and not self.similar:
                report.skipped(blocks[layer - 1].name, "keep 1 and similar 0 prune nothing")
            else:
                plan[layer] = keep, self.similar, iterations
        for layer, here in zip(plan, _before(count, plan)):
            if self.similar > here // 2:
                half = f"{here // 2} after block {layer}, half of its tokens"
                report.note(f"similar lowered from {self.similar} to {half}")
        return plan

    def _edits(self, model: nn.Module, embedding: str, plan: dict) -> list[tuple[str, type, dict[str, Any]]]:
        """Every edit as (name, class, arguments); a block that neither prunes nor begins nor ends needs none."""
        blocks, mixers = parts.blocks(model), {part.block.name: part.name for part in parts.mixers(model)}
        edits: list = [(embedding, PatchGrid, {"owner": SLUG})]
        for layer, block in enumerate(blocks, start=1):
            ends = {"first": layer == 1, "last": layer == len(blocks), "restore": self.restore}
            if layer in plan:
                keep, similar, iterations = plan[layer]
                variances = {"v_min": self.v_min, "v_max": self.v_max}
                args = {"keep": keep, "similar": similar, "iterations": iterations, **variances}
                edits.append((mixers[block.name], RankedAttention, args))
            if layer in plan or ends["first"] or ends["last"]:
                edits.append((block.name, Pruning, ends))
        return edits

    def _searched(self, model, embedding: str, count: int, plan: dict, data: Data | None, report: Report) -> dict:
        """The plan of `trials` random ones of about the wanted cost whose features change least."""
        if data is None:
            raise FormularyError(f"{SLUG}: trials choose by images: give --data, or trials=0")
        batch = {"pixel_values": next(data.batches())["pixel_values"].to(next(model.parameters()))}
        whole, best = _features(model, batch), None
        generator = torch.Generator().manual_seed(data.seed)
        for drawn in _draws(model, count, plan, self.trials, self.budget, generator):
            trial = copy.deepcopy(model)
            for name, cls, args in self._edits(model, embedding, drawn):
                cls.attach(trial, name, **args)
            alike = nn.functional.cosine_similarity(_features(trial, batch), whole, dim=-1).mean().item()
            if best is None or alike > best[0]:
                best = alike, drawn
        report.figures["cosine of the chosen draw's features"] = best[0]
        report.note(f"keep and similar chosen from {self.trials} draws at about {self.budget:.0%} of the multiply-adds")
        return best[1]


def _before(count: int, plan: dict) -> list[int]:
    """Image tokens at each pruning layer, before it prunes."""
    counts = [count]
    for keep, similar, _ in plan.values():
        counts.append(left(counts[-1], similar, keep))
    return counts


def _counts(depth: int, count: int, plan: dict) -> list[int]:
    """Image tokens after each block."""
    after = []
    for layer in range(1, depth + 1):
        count = left(count, plan[layer][1], plan[layer][0]) if layer in plan else count
        after.append(count)
    return after


def _cost(model: nn.Module, count: int, plan: dict) -> float:
    """The blocks' multiply-adds under `plan`, of those without pruning; the ranking's own are left out."""
    depth = len(parts.blocks(model))
    within = [count, *_counts(depth, count, plan)[:-1]]
    return multiply_adds(model, [(n, n) for n in within]) / multiply_adds(model, [(count, count)] * depth)


def _draws(model, count: int, plan: dict, trials: int, budget: float, generator: torch.Generator) -> Sequence[dict]:
    """`trials` random plans that cost between 0.97 and 1 of `budget`; FormularyError when few do."""
    found = []
    for _ in range(500 * trials):
        draw = torch.rand(2, len(plan), generator=generator).tolist()
        random = {}
        for layer, share, similar in zip(plan, *draw):
            random[layer] = 1 - 0.7 * share**2, int(similar * 0.15 * count), plan[layer][2]
        if 0.97 * budget <= _cost(model, count, random) <= budget:
            found.append(random)
        if len(found) == trials:
            return found
    raise FormularyError(f"{SLUG}: too few draws cost about {budget:.0%}: set another budget, or other layers")


@torch.no_grad()
def _features(model: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, "B D"]:
    """Logits, or else the first token's final state."""
    was, out = model.training, model.eval()(**batch)
    model.train(was)
    return (out["logits"] if "logits" in out else out["last_hidden_state"][:, 0]).float()
