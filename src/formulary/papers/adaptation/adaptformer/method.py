"""AdaptFormer: a bottleneck beside each frozen feed-forward of a vision Transformer, trained with the task head alone.

    out = h + MLP(LN(h)) + s * (W_up ReLU(W_down LN'(h) + b_down) + b_up),   h: (B,L,D), after the attention's residual

W_down (r,D) is drawn as torch draws a linear layer; W_up and the biases start at zero, so that training starts at the
pre-trained function, bit for bit. LN' is the branch's own. Where a block scales its feed-forward (LayerScale), the
branch is not scaled by it.

Source: arXiv:2205.13535, section 3; trained as there by SGD with momentum 0.9, no weight decay and a cosine schedule,
with a batch normalization without parameters before a new head. The released code leaves LN' out (`norm=False`), drops
out a tenth of the bottleneck, which is not done here, and scales its learning rate, 0.1, by batch / 256.

In: a vision model and labeled images. Where its head has as many classes as the data, it is adapted in place; any other
becomes a new model, transformers' classifier around a copy of the backbone, and the one given stays as it is. No weight
of the backbone changes. Saved as formulary edits: PEFT has no form for a nonlinear parallel branch.

Raises FormularyError without labels, with fewer than two classes, or when the blocks have no seam.

>>> import torch
>>> from formulary.contracts import Data
>>> from formulary.lab.small import tiny
>>> data = Data([{"pixel_values": torch.randn(3, 16, 16)} for _ in range(8)], labels=[0, 1] * 4)
>>> model, report = AdaptFormer(bottleneck=4, steps=2).apply(tiny("vit"), data)
>>> type(model).__name__, model(data.collate(data.items)["pixel_values"]).logits.shape
('ViTForImageClassification', torch.Size([8, 2]))
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formulary.contracts import BlockEdit, Data, Replacement, Report, Transform, parts
from formulary.contracts.edits import Editor, editing
from formulary.contracts.heads import with_head
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError, UsageError


class Bottleneck(nn.Module):
    """`scale * up(relu(down(norm(h))))`, (B,L,D) to (B,L,D); zero until `up` is trained."""

    def __init__(self, width: int, bottleneck: int, scale: float, learnable_scale: bool, norm: bool):
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        self.scale = nn.Parameter(torch.tensor(float(scale))) if learnable_scale else scale
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, hidden: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        return self.scale * self.up(self.down(self.norm(hidden)).relu())


class ParallelBranch(BlockEdit):
    """Adds a `Bottleneck` beside the block's feed-forward."""

    def setup(self, model: nn.Module, **args) -> None:
        self.adaptformer = Bottleneck(**args)

    def branch(self, hidden: Tensor) -> Tensor:
        beside = super().branch(hidden)
        ours = self.adaptformer(hidden)
        return ours if beside is None else beside + ours


class NormalizedHead(Replacement):
    """A linear classifier after a batch normalization without parameters, (B,F) to (B,classes)."""

    def __init__(self, features: int, classes: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(features, affine=False, eps=1e-6)
        self.linear = nn.Linear(features, classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    def forward(self, features: Float[Tensor, "B F"]) -> Float[Tensor, "B C"]:
        norm = self.norm
        if self.training and len(features) == 1:  # one image has no variance: use what was gathered
            return self.linear(nn.functional.batch_norm(features, norm.running_mean, norm.running_var, eps=norm.eps))
        return self.linear(norm(features))


@dataclass(frozen=True, kw_only=True)
class AdaptFormer(Transform):
    """Train a bottleneck of `bottleneck` numbers beside every chosen block's feed-forward, and the task head.

    scale: s, fixed, or where a `learnable_scale` starts. norm: the branch's own LayerNorm. steps: how many batches;
    0 adds the branches untrained. lr: the highest learning rate, not scaled by the batch size.
    """

    bottleneck: int = 64
    scale: float = 0.1
    learnable_scale: bool = False
    norm: bool = True
    steps: int = 200
    lr: float = 0.1

    supports = frozenset({"vision"})
    needs_data = True
    trains = True
    adapter = True
    unit = "block"
    quick: ClassVar[dict[str, Any]] = {"bottleneck": 4, "steps": 3}
    mergeable: ClassVar[bool] = False
    why_not_mergeable: ClassVar[str] = "a ReLU stands between its projections, so no weight of the backbone can hold it"

    def __post_init__(self):
        super().__post_init__()
        check_range("adaptformer", "bottleneck", self.bottleneck, 1, 100_000)
        check_range("adaptformer", "scale", self.scale, -1000, 1000)
        check_range("adaptformer", "steps", self.steps, 0, 10_000_000)
        if not 0 < self.lr < float("inf"):
            raise UsageError(f"adaptformer: lr must be above 0, got {self.lr}")

    def run(self, model: nn.Module, data: Data, edit: Editor, report: Report) -> nn.Module | None:
        for block in parts.blocks(model):
            if not block.has_seam:
                inside = f"the {type(block.module).__name__}s of this {type(model).__name__}"
                raise FormularyError(f"adaptformer cannot act inside {inside}: no seam is known")
        data, classes = labeled(data)
        if getattr(model, "num_labels", None) == len(classes) and hasattr(model, "classifier"):
            self._adapt(model, data, edit, report)
            return None
        report.note(f"a new head of {len(classes)} classes on the {type(model).__name__}'s backbone")
        new = with_head(model, classes)
        with editing(new, self.slug) as own:
            own.edit("classifier", NormalizedHead, features=new.classifier.in_features, classes=len(classes))
            self._adapt(new, data, own, report)
        return new

    def _adapt(self, model: nn.Module, data: Data, edit: Editor, report: Report) -> None:
        from formulary.lab.training import train

        whole, blocks = parts.count_weights(model), parts.blocks(model, self.targets, self.ignore)
        shape = {name: getattr(self, name) for name in ("bottleneck", "scale", "learnable_scale", "norm")}
        model.requires_grad_(False)
        for block in blocks:
            new = edit.edit(block.name, ParallelBranch, width=model.config.hidden_size, **shape)
            added = parts.count_weights(new.adaptformer)
            report.changed(block.name, added, f"{added} weights beside the feed-forward")
        edit.keep(model.classifier)
        model.classifier.requires_grad_(True)
        branches = sum(change.weights for change in report.changes)
        report.figures["trained in branches, of the model's weights"] = branches / whole
        report.figures["trained weights"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if self.steps:
            log = train(model, data, steps=self.steps, lr=self.lr, optimizer="sgd", weight_decay=0.0, seed=data.seed)
            report.figures["loss of the first step, nats"] = log.losses[0]
            report.figures["loss of the last tenth, nats"] = log.final


def labeled(data: Data) -> tuple[Data, Sequence[Any]]:
    """The data with each item's class index as `labels`, and the classes: at least two, or a FormularyError."""
    if "labels" in data.items[0]:
        marks = [int(item["labels"]) for item in data.items]
    elif data.labels is not None:
        marks = list(data.labels)
    else:
        raise FormularyError("adaptformer trains on labels: give a folder with one subfolder a class, or --labels")
    classes = data.facts.get("classes")
    if classes is None:
        numbered = all(isinstance(mark, int) for mark in marks)
        classes = list(range(max(marks) + 1)) if numbered else sorted(set(marks), key=str)
        marks = [classes.index(mark) for mark in marks]
    if len(classes) < 2:
        raise FormularyError(f"adaptformer needs at least two classes; {data.name} has {len(classes)}")
    items = [{**item, "labels": torch.tensor(mark)} for item, mark in zip(data.items, marks)]
    return replace(data, items=items), classes
