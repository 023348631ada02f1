"""FuseGPT: remove whole blocks one at a time, and graft each one's weights onto its neighbors by a short local
distillation.

The block to go is the one with the least macro influence, recomputed after every removal: MI_i = 1 - mean cos(h,
h_i), where h and h_i are the last hidden states with and without block i. Then, in each of `group_size` neighbors,
every linear becomes

W' = W + B A + sum_j (P_j Q_j) * W_j,   b' = b + sum_j c_j * b_j,   * elementwise, W_j, b_j of the j-th block that
went

with W and W_j frozen, A, Q (rank, in) random and B, P (out, rank), c (out,) zero, so that it starts as plain removal.
The group is trained to put out what it did with the block, on its real inputs; P, Q and c at `learning_rate`, all
else (A, B, biases, norms) at `base_learning_rate`, Adam with a cosine schedule. In the end everything is folded into
ordinary linears.

Source: arXiv:2411.14507, section 3 (v3: "From Pruning to Grafting"), and the authors' code. Where they leave room:
"with" is the model as it is now, grafts included, as in their code. Their loss is the KL divergence of softmaxed
hidden states, and the code's softmax runs over the batch, most likely a slip; here `loss="kl"` softmaxes each token's
features, and the default "mse" is each token's squared error over its target's squared norm (a few tokens of a
language model are a thousand times as large as the rest). Their code drops c when it folds.

In: a causal language model of one stack of blocks, and text. Out: a new, ordinary model with fewer layers in its
config, in the dtype of the one given, which stays as it is. Raises UsageError for bad parameters, FormularyError for
a model with edits, with shared or too few blocks, or when training diverges.

>>> from formulary.lab import inputs_for, tiny
>>> model = tiny("llama")
>>> data = Data([{"input_ids": ids} for ids in inputs_for(model, batch=8)["input_ids"]])
>>> smaller, report = FuseGPT(prune_rate=0.5, rank=4, steps=2).apply(model, data)
>>> model.config.num_hidden_layers, smaller.config.num_hidden_layers, len(smaller.model.layers)
(2, 1, 1)
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from formulary.contracts import Data, Report, Transform, parts
from formulary.contracts.edits import Editor, edits_of
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError, UsageError

from ._fusion import Linears, fold, graft, linears_of, originals
from ._stack import Seen, macro_influence, only_stack, remove, run, see

# ---------------------------------------------------------------- local distillation


def neighborhood(index: int, count: int, group_size: int) -> range:
    """The blocks of the group around `index`, itself included: half before it (the greater half), half behind, moved
    inside at the ends.

    >>> neighborhood(10, 32, 7), neighborhood(1, 32, 7), neighborhood(31, 32, 7), neighborhood(0, 4, 7)
    (range(6, 14), range(0, 8), range(24, 32), range(0, 4))
    """
    size = min(group_size + 1, count)
    start = min(max(0, index - size // 2), count - size)
    return range(start, start + size)


def relative_error(
    found: Float[Tensor, "B L D"], wanted: Float[Tensor, "B L D"], real: Bool[Tensor, "B L"]
) -> Float[Tensor, ""]:
    """||found - wanted||^2 / ||wanted||^2 of each real token, and the mean of those."""
    found, wanted = found[real], wanted[real]
    return ((found - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-12)).mean()


def divergence(
    found: Float[Tensor, "B L D"], wanted: Float[Tensor, "B L D"], real: Bool[Tensor, "B L"]
) -> Float[Tensor, ""]:
    """KL(softmax(wanted) || softmax(found)) over each real token's features, and the mean of those."""
    found, wanted = found[real].log_softmax(-1), wanted[real].log_softmax(-1)
    return nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean")


LOSSES = {"mse": relative_error, "kl": divergence}


def distil(
    group: Sequence[nn.Module],
    seen: Sequence[Seen],
    *,
    steps: int,
    learning_rate: float,
    base_learning_rate: float,
    loss: str = "mse",
) -> tuple[float, float]:
    """Train what may be trained in `group` to put out `seen[i].output`; the loss on up to four batches before and
    after.
    """
    fast = [p for block in group for name, p in block.named_parameters() if ".grafts." in name and p.requires_grad]
    ids = {id(p) for p in fast}
    slow = [p for block in group for p in block.parameters() if p.requires_grad and id(p) not in ids]
    optimizer = torch.optim.Adam(
        [{"params": fast, "lr": learning_rate}, {"params": slow, "lr": base_learning_rate}], betas=(0.9, 0.95)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def value(one: Seen) -> Tensor:
        with parametrize.cached():
            return LOSSES[loss](run(group, one.inputs[0], one.calls), one.output, one.real)

    def mean() -> float:
        with torch.no_grad():
            return sum(float(value(one)) for one in seen[:4]) / len(seen[:4])

    before, order = mean(), []
    for step in range(steps):
        order = order or torch.randperm(len(seen)).tolist()
        optimizer.zero_grad(set_to_none=True)
        now = value(seen[order.pop()])
        if not torch.isfinite(now):
            raise FormularyError(
                f"the distillation loss is {now.item()} at step {step + 1}: try a smaller learning_rate"
            )
        now.backward()
        optimizer.step()
        schedule.step()
    return before, mean()


# ---------------------------------------------------------------- the transform


@dataclass(frozen=True, kw_only=True)
class FuseGPT(Transform):
    """Remove `prune_rate` of the blocks, rounded up; `targets` and `ignore` say which blocks may go.

    group_size: neighbors that take a removed block in. rank: of both low-rank terms of each linear. steps: of
    distillation after each removal, on batches of the data; 0 removes and grafts nothing. The paper takes 20 epochs
    of 32 to 1,024 sequences of 2,048 tokens. calibration: sequences on which the macro influence is measured, which
    costs as much as L/2 runs of the whole model on them for each removal. graft=False leaves the removed weights out,
    P_j Q_j instead of (P_j Q_j) * W_j: the same parameters, and no fusion.
    """

    prune_rate: float = 0.25
    group_size: int = 7
    rank: int = 128
    steps: int = 100
    learning_rate: float = 1e-3
    base_learning_rate: float = 9.65e-6
    loss: Literal["mse", "kl"] = "mse"
    calibration: int = 8
    graft: bool = True

    supports = frozenset({"decoder"})
    needs_data = True
    trains = True
    unit = "block"
    quick: ClassVar[dict[str, Any]] = {"steps": 2, "rank": 4, "calibration": 4}

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.prune_rate < 1:
            raise UsageError(f"fusegpt: prune_rate must be between 0 and 1, got {self.prune_rate}")
        for name, least in (("group_size", 1), ("rank", 1), ("calibration", 1), ("steps", 0)):
            check_range("fusegpt", name, getattr(self, name), least, 10_000_000)
        for name in ("learning_rate", "base_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"fusegpt: {name} must be above 0, got {getattr(self, name)}")
        if self.loss not in LOSSES:
            raise UsageError(f"fusegpt: loss must be mse or kl, got {self.loss!r}")

    def run(self, model: nn.Module, data: Data, edit: Editor, report: Report) -> nn.Module:
        if edits_of(model):
            raise FormularyError(
                "fusegpt copies a plain model, and this one carries edits of another method: fuse first"
            )
        stack = only_stack(model)
        blocks = parts.blocks(model)
        free = {block.index for block in parts.blocks(model, self.targets, self.ignore)}
        wanted = math.ceil(len(blocks) * self.prune_rate)
        if wanted > min(len(free), len(blocks) - 1):
            raise UsageError(
                f"fusegpt: prune_rate={self.prune_rate} removes {wanted} of {len(blocks)} blocks, and "
                f"{min(len(free), len(blocks) - 1)} may go"
            )
        smaller = copy.deepcopy(model).float().eval().requires_grad_(False)
        absorbed = self._shrink(smaller, smaller.get_submodule(stack), data, free, wanted, report)
        fold(smaller)
        smaller = smaller.to(next(model.parameters()).dtype).requires_grad_(True)
        self._account(model, smaller, blocks, absorbed, report)
        return smaller

    def _shrink(
        self, model, stack: nn.ModuleList, data: Data, free: set[int], wanted: int, report: Report
    ) -> dict[int, list[int]]:
        """Remove blocks until `wanted` are gone; original index of each one -> those that took it in."""
        every, absorbed = list(range(len(stack))), {}
        own = linears_of(model, stack)
        smallest = min(min(part.in_features, part.out_features) for of in own.values() for part in of.values())
        measure = data.take(range(min(self.calibration, len(data))))
        while len(absorbed) < wanted:
            candidates = [at for at, index in enumerate(every) if index in free]
            influence = macro_influence(model, list(stack), measure.batches(), candidates)
            least = min(range(len(candidates)), key=influence.__getitem__)
            at, removed = candidates[least], stack[candidates[least]]
            near = neighborhood(at, len(every), self.group_size)
            seen = self._seen(model, stack, data, near, at)
            remove(model, stack, at)
            gone = every.pop(at)
            row = {"removed": gone, "macro influence": influence[least]}
            if self.steps:
                group = list(stack[near.start : near.stop - 1])
                row |= self._fuse(group, removed, own, seen)
            absorbed[gone] = every[near.start : near.stop - 1] if self.steps else []
            report.tables.setdefault("removals", []).append({**row, "taken in by": absorbed[gone]})
        if self.steps and smallest < self.rank:
            report.note(f"rank {self.rank} cut to the smaller side of a weight where that is less, as {smallest}")
        return absorbed

    def _seen(self, model, stack: nn.ModuleList, data: Data, near: range, at: int) -> list[Seen]:
        """What goes into the group and comes out of it with block `at`, on as many batches as there are steps for."""
        count = min(self.steps, -(-len(data) // data.batch_size))
        found = []
        for step in range(count):
            seen = see(model, list(stack), data.sample(step)).between(near.start, near.stop)
            del seen.calls[at - near.start]
            found.append(seen)
        return found

    def _fuse(
        self, group: list[nn.Module], removed: nn.Module, own: dict[int, Linears], seen: list[Seen]
    ) -> dict[str, float]:
        for block in group:
            graft(own[id(block)], own[id(removed)], self.rank, self.graft)
            frozen = {id(p) for p in originals(own[id(block)])}
            for parameter in block.parameters():
                parameter.requires_grad_(id(parameter) not in frozen)
        before, after = distil(
            group,
            seen,
            steps=self.steps,
            learning_rate=self.learning_rate,
            base_learning_rate=self.base_learning_rate,
            loss=self.loss,
        )
        for block in group:
            block.requires_grad_(False)
        return {f"{self.loss} before": before, f"{self.loss} after": after}

    def _account(
        self, model, smaller, blocks: list[parts.Block], absorbed: dict[int, list[int]], report: Report
    ) -> None:
        takers = {index for taken in absorbed.values() for index in taken}
        for block in blocks:
            weights = parts.count_weights(block.module)
            if block.index in absorbed:
                report.changed(block.name, weights, "removed")
            elif block.index in takers:
                report.changed(block.name, weights, "took in a neighbor")
        gone = ", ".join(str(index) for index in absorbed)
        report.note(f"blocks removed, in this order: {gone} (0 to {len(blocks) - 1})")
        report.note(f"{parts.count_weights(smaller):,} of {parts.count_weights(model):,} weights left")
        if not self.steps:
            report.note("steps=0: removed blocks were grafted onto nothing")
        elif len(blocks) - 1 < self.group_size:
            report.note(f"the group is all {len(blocks) - 1} other blocks, fewer than group_size={self.group_size}")
