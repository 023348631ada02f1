"""A-SDM leaves out a diffusion model's least needed blocks; the layers that stay inherit those that went as experts.

Redundancy is measured: the block goes without which the model's output stays closest to what it was, again and again,
until `drop_rate` of them are out. Of each run of neighbors that lost blocks one stays, the heir. Every convolution or
linear of it mixes its own weights with those of its namesakes in the lost blocks, anew for each sample:

    W(x) = sum_e r_e(x) W_e,   r(x) = sigmoid(linear(mean of x over all positions))

A teacher, which is the model as it was, trains the shorter one by

    L = d(output, teacher's) + feature_weight mean_s d(h_s, teacher's),   d(a, b) = ||a - b||^2 / ||b||^2

with h_s the state where a block that stays hands over to the next. Progressive incubation: run by run, blocks go and
their heir alone learns inside the teacher, which is frozen otherwise; then all blocks that stayed learn together.

Source: arXiv:2312.15516 (v1; the author withdrew a later version), as far as its abstract and the catalogue's notes
tell: the full text could not be read, nor code of the authors' found. Left out: the semantic-aware supervision, whose point is an image encoder
such as CLIP that knows what a picture shows, which a denoiser on its own does not come with; and global-regional
interactive attention, whose form is not in those sources. Ours: errors are relative, so that one setting fits all
models; an heir's own ratio starts at `start` and inherited ones at 1 - start, near plain removal; biases are mixed as
weights are; the teacher's output stands in for the true noise; what lies outside the blocks stays the teacher's.

In: a vision model of transformers, or any module with runs of blocks of equal shape that map a tensor to its like (a
convolutional or Transformer denoiser), and data as it is called: noised images with their times, as `model(**batch)`
takes them. Out: the same model in which the blocks that went do not run. Not for text: pooling over positions would
see padding and, in a decoder, later tokens. Raises UsageError for bad parameters and FormularyError where no block may
go, or when training diverges.

>>> from formulary.lab import inputs_for, tiny
>>> data = Data([{"pixel_values": image} for image in inputs_for(tiny("vit"), batch=4)["pixel_values"]])
>>> model, report = ASDM(steps=2).apply(tiny("vit"), data)
>>> [change.note for change in report.changes]
['dropped', '6 layers inherited from 1 block']
>>> [type(block).__name__ for block in model.layers], type(model.layers[0].mlp.fc1).__name__
(['ViTLayer', 'Dropped'], 'ExpertLinear')
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from formulary.contracts import Data, Report, Transform, parts
from formulary.contracts.edits import Editor
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError, UsageError

from .blocks import Batch, Run, Segment, distance, order, outputs, runs, segments, why_not
from .experts import Dropped, ExpertConv2d, ExpertLinear, Experts, inherit


@dataclass(frozen=True, kw_only=True)
class ASDM(Transform):
    """Leave out `drop_rate` of the blocks that may go, rounded up; `targets` and `ignore` say which those are.

    steps: of distillation in all, on batches of the data; 0 only drops and hands over. incubation: the part of them in
    which heirs learn one by one. learning_rate: of weights, router_rate: of what gives the ratios; Adam, falling by a
    cosine in each stage. experts: "inherited", "random" (as many, drawn at random with the same spread) or "none"
    (plain removal and distillation). start: r of an heir's own weights before training. calibration: items on which
    redundancy is measured, which takes about as many runs of the model on them as there are blocks, for each block that
    goes.
    """

    drop_rate: float = 0.25
    steps: int = 40
    incubation: float = 0.25
    learning_rate: float = 3e-4
    router_rate: float = 0.01
    feature_weight: float = 1.0
    experts: Literal["inherited", "random", "none"] = "inherited"
    start: float = 0.9
    calibration: int = 8

    supports = frozenset({"vision"})
    needs_data = True
    trains = True
    unit = "block"
    quick: ClassVar[dict[str, Any]] = {"steps": 2, "calibration": 4}

    def __post_init__(self):
        super().__post_init__()
        for name in ("drop_rate", "start"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"a-sdm: {name} must be between 0 and 1, got {getattr(self, name)}")
        check_range("a-sdm", "incubation", self.incubation, 0, 1)
        check_range("a-sdm", "feature_weight", self.feature_weight, 0, 1e6)
        for name, least in (("steps", 0), ("calibration", 1)):
            check_range("a-sdm", name, getattr(self, name), least, 10_000_000)
        for name in ("learning_rate", "router_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"a-sdm: {name} must be above 0, got {getattr(self, name)}")
        if self.experts not in ("inherited", "random", "none"):
            raise UsageError(f"a-sdm: experts must be inherited, random or none, got {self.experts!r}")

    def admit(self, model: nn.Module, data: Data | None) -> None:
        """Also takes modules that are no Transformers of transformers, such as a U-Net."""
        if parts.kind(model) != "module":
            super().admit(model, data)
        elif data is None:
            raise FormularyError("a-sdm needs data to train on: items with the arguments of the model's forward")

    def run(self, model: nn.Module, data: Data, edit: Editor, report: Report) -> None:
        teacher = copy.deepcopy(model).float().eval().requires_grad_(False)
        found, gone = self._study(teacher, data, report)
        edit.keep(model)
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        edit.on_failure(lambda: model.to(dtype))
        model.float().eval().requires_grad_(False)
        every = [segment for run in found for segment in segments(run, gone)]
        changed = sorted((s for s in every if s.gone), key=lambda s: min(gone.index(b.name) for b in s.gone))
        measured = list(data.take(range(min(self.calibration, len(data)))).batches())
        wanted = [outputs(teacher, batch)[0] for batch in measured]

        @torch.no_grad()
        def error() -> float:
            return sum(float(distance(outputs(model, b)[0], w)) for b, w in zip(measured, wanted)) / len(measured)

        ends, spent = [segment.end for segment in every], 0
        for segment in changed:
            layers = self._hand_over(model, segment, edit, report)
            share = int(self.steps * self.incubation) // len(changed)
            row = {"heir": segment.heir.name, "dropped": [block.name for block in segment.gone], "layers": layers}
            row["output error before"] = error()
            self._distil(model, teacher, [segment], ends, data, range(spent, spent + share))
            report.tables.setdefault("stages", []).append({**row, "output error after": error()})
            spent += share
        self._distil(model, teacher, every, ends, data, range(spent, self.steps))
        report.figures["output error, distilled"] = error()
        model.to(dtype).requires_grad_(True)
        self._account(teacher, model, changed, report)

    def _study(self, teacher: nn.Module, data: Data, report: Report) -> tuple[list[Run], list[str]]:
        """(every run of equal blocks, the blocks to leave out in order)."""
        found = runs(teacher)
        if not found:
            raise FormularyError(f"a-sdm found no neighboring blocks of equal shape in this {type(teacher).__name__}")
        batches = list(data.take(range(min(self.calibration, len(data)))).batches())
        every = [block for run in found for block in run]
        chosen = parts.select([(block.name, block.module) for block in every], self.targets, self.ignore)
        named = {every[i].name for i in chosen}
        for name, reason in why_not(teacher, every, batches[0]).items():
            if name in named:
                report.skipped(name, reason)
                named.discard(name)
        count = math.ceil(len(named) * self.drop_rate - 1e-9)
        rows = order(teacher, found, named, batches, count)
        if not rows:
            raise FormularyError(f"a-sdm may leave out none of the {len(every)} blocks of {type(teacher).__name__}")
        if len(rows) < count:
            report.note(f"only {len(rows)} of {count} blocks left out: one of each run of equal blocks must stay")
        report.tables["redundancy"] = rows
        report.figures["output error, dropped"] = rows[-1]["output error"]
        return found, [row["dropped"] for row in rows]

    def _hand_over(self, model: nn.Module, segment: Segment, edit: Editor, report: Report) -> int:
        """Leave the segment's blocks out and make the heir's layers mixtures; how many they are."""
        heir, count = model.get_submodule(segment.heir.name), 0
        gone = [model.get_submodule(block.name) for block in segment.gone]
        named = [(name, layer) for name, layer in heir.named_modules() if type(layer) in (nn.Linear, nn.Conv2d)]
        for name, layer in named if self.experts != "none" else []:
            if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
                report.note(f"{segment.heir.name}.{name} inherited nothing: its padding is not one of zeros")
                continue
            cls, arguments = inherit(layer)
            new = edit.edit(f"{segment.heir.name}.{name}", cls, experts=1 + len(gone), **arguments)
            self._fill(new, [layer, *(block.get_submodule(name) for block in gone)])
            count += 1
        for block in segment.gone:
            edit.edit(block.name, Dropped)
        return count

    @torch.no_grad()
    def _fill(self, new: Experts, layers: Sequence[nn.Module]) -> None:
        odds = math.log(self.start / (1 - self.start))
        new.route_bias.fill_(-odds)[0] = odds
        for i, layer in enumerate(layers):
            drawn = self.experts == "random" and i > 0
            weight = layer.weight
            new.weights[i] = torch.randn_like(weight) * weight.std(correction=0) if drawn else weight
            if layer.bias is not None and not drawn:
                new.biases[i] = layer.bias

    def _distil(
        self,
        model: nn.Module,
        teacher: nn.Module,
        taught: Sequence[Segment],
        ends: Sequence[str],
        data: Data,
        steps: range,
    ) -> None:
        """Train the heirs of `taught` alone, on the batches of these steps."""
        named = [one for segment in taught for one in model.get_submodule(segment.heir.name).named_parameters()]
        named = [(name.rpartition(".")[2], parameter) for name, parameter in named]
        routers = [parameter for name, parameter in named if name in ("route", "route_bias")]
        ids = {id(parameter) for parameter in routers}
        weights = [parameter for _, parameter in named if id(parameter) not in ids]
        groups = [{"params": weights, "lr": self.learning_rate}, {"params": routers, "lr": self.router_rate}]
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, len(steps)))
        for _, parameter in named:
            parameter.requires_grad_(True)
        for step in steps:
            optimizer.zero_grad(set_to_none=True)
            loss = self.loss(model, teacher, ends, data.sample(step))
            if not torch.isfinite(loss):
                raise FormularyError(f"a-sdm: the loss is {loss.item()} at step {step}: try a smaller learning_rate")
            loss.backward()
            optimizer.step()
            schedule.step()
        for _, parameter in named:
            parameter.grad = None
            parameter.requires_grad_(False)

    def loss(self, model: nn.Module, teacher: nn.Module, ends: Sequence[str], batch: Batch) -> torch.Tensor:
        """L on one batch; `ends` names where the states are taken, in both."""
        found, states = outputs(model, batch, ends)
        with torch.no_grad():
            wanted, targets = outputs(teacher, batch, ends)
        features = sum(distance(state, target) for state, target in zip(states, targets)) / len(ends)
        return distance(found, wanted) + self.feature_weight * features

    def _account(self, teacher: nn.Module, model: nn.Module, changed: Sequence[Segment], report: Report) -> None:
        weights = lambda block: parts.count_weights(teacher.get_submodule(block.name))
        for row, segment in zip(report.tables["stages"], changed):
            for block in segment.gone:
                report.changed(block.name, weights(block), "dropped")
            count, blocks = row["layers"], f"{len(segment.gone)} block{'s' if len(segment.gone) > 1 else ''}"
            taught = f"{count} layers inherited from {blocks}" if count else f"stands in for {blocks}"
            if self.experts == "random" and count:
                taught = f"{count} layers with random experts for {blocks}"
            report.changed(segment.heir.name, weights(segment.heir), taught)
        gone = [row["dropped"] for row in report.tables["redundancy"]]
        report.note(f"blocks left out, in this order: {', '.join(gone)}")
        report.note(f"{parts.count_weights(model):,} weights where there were {parts.count_weights(teacher):,}")
        before, after = report.figures["output error, dropped"], report.figures["output error, distilled"]
        report.note(f"squared error of the output {before:.3g}, after {self.steps} steps {after:.3g}")
