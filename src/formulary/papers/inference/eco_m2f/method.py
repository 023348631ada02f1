"""ECO-M2F: a vision Transformer runs as many of its blocks as an image needs, by a gate that sees the patch embeddings.

    A, parent:   sum_k alpha_k loss(head(x_k)) over exits k = first_exit .. K, the same head for all, alpha_k growing with k
    B, labels:   of each training image, q_k = the quality at exit k; t = argmax_k q_k - beta k
    C, gate:     softmax(W mean_l x_0,l + b), trained by cross-entropy to t, the parent frozen
    inference:   k = argmax of the gate; blocks 1 .. k, then what follows the last block

Source: arXiv:2404.15244, section 3, and the authors' code, from which are the first exit, 2, and betas between 0.0005
and 0.01 of panoptic quality a layer. A new beta repeats B and C, never A: a model that has exits already keeps its
weights and gets another gate. The paper's encoder sits between a backbone and a decoder, and its gate sees the
backbone's coarsest map; here the blocks of a ViT are the encoder, so that the gate sees its patch embeddings, and the
head is the model's last norm and what comes after. alpha_k = k / sum of exits, and the gate's weight decay, are ours,
and its loss is convex, so that it is minimized whole (L-BFGS) and not by steps.

In: a vision model and images. With a classifier, the loss is cross-entropy and q_k the probability of the label, or,
without labels, of what the unchanged model answers; without one, the loss is the squared error of tokens relative to
the unchanged model's and q_k the cosine with them. Out: the same model, changed in place; in a batch each image stops
at its own depth, and blocks compute the images that are left. `depth_of` gives the depths of the last forward,
`at_depth` holds all images at one. States of inner blocks (`output_hidden_states`) are, behind an image's exit, those at
its exit. Raises UsageError for bad parameters, FormularyError for a model without seams or that reads inner blocks.

>>> from formulary.lab import inputs_for, tiny
>>> model, data = tiny("vit"), Data([{"pixel_values": x} for x in inputs_for(tiny("vit"), batch=8)["pixel_values"]])
>>> model, report = EcoM2F(first_exit=1, parent_steps=3, beta=0.5).apply(model, data)
>>> report.headline
'eco-m2f on 2 blocks, ... % of the weights; ... parent trained for 3 steps, loss ...; leaves after 1.0 of 2 blocks, ...'
>>> with at_depth(model, 2):
...     whole = model(**data.collate(data.items))
>>> depth_of(model).tolist()
[2, 2, 2, 2, 2, 2, 2, 2]
"""

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from formulary.contracts import Data, Report, Transform, parts
from formulary.contracts.edits import Editor
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError
from formulary.papers.inference._parts import in_float32, inputs_of, trained
from formulary.papers.inference.eco_m2f.exits import ExitBlock, answer, at_depth, depth_of, exit_outputs, exits_of

__all__ = ["EcoM2F", "ExitBlock", "at_depth", "depth_of"]

# ---------------------------------------------------------------- steps A, B and C


def errors(found: Tensor, wanted: Tensor) -> Float[Tensor, "exits B"]:
    """The loss of each exit and image: cross-entropy to `wanted` (B,), or the relative squared error to states."""
    if wanted.ndim == 1:
        logits, labels = found.flatten(0, 1).float(), wanted.repeat(len(found))
        return F.cross_entropy(logits, labels, reduction="none").unflatten(0, found.shape[:2])
    apart = (found - wanted).float().square().sum(-1)
    return (apart / wanted.float().square().sum(-1).clamp(min=1e-12)).mean(-1)


def quality(found: Tensor, wanted: Tensor) -> Float[Tensor, "exits B"]:
    """q_k: the probability of the label, or the mean over tokens of the cosine with the wanted state."""
    if wanted.ndim == 1:
        return found.float().softmax(-1).gather(-1, wanted.expand(len(found), -1)[..., None])[..., 0]
    return F.cosine_similarity(found.float(), wanted.float()[None], dim=-1).mean(-1)


def parent_loss(model: nn.Module, batch: dict[str, Tensor], *, teacher: nn.Module, first_exit: int) -> Float[Tensor, ""]:
    """Step A: the mean loss of every exit, weighted by k / sum of exits."""
    inputs = inputs_of(model, batch)
    found, _ = exit_outputs(model, inputs)
    alpha = torch.arange(first_exit, first_exit + len(found), device=found.device, dtype=torch.float32)
    return (alpha / alpha.sum()) @ errors(found, target(teacher, batch, inputs)).mean(1)


@torch.no_grad()
def target(teacher: nn.Module, batch: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """The labels (B,), else the teacher's classes (B,) or states (B,L,D)."""
    if "labels" in batch:
        return batch["labels"].to(next(teacher.parameters()).device)
    given = answer(teacher(**inputs))
    return given.argmax(-1) if given.ndim == 2 else given


def best_exits(qualities: Float[Tensor, "exits N"], beta: float) -> Int[Tensor, "N"]:
    """Step B: for each image the place of the exit of the largest q_k - beta k."""
    cost = beta * torch.arange(len(qualities), dtype=qualities.dtype, device=qualities.device)
    return (qualities - cost[:, None]).argmax(0)


@torch.enable_grad()
def fit_gate(
    features: Float[Tensor, "N D"], labels: Int[Tensor, "N"], exits: int, decay: float
) -> tuple[Float[Tensor, "exits D"], Float[Tensor, "exits"]]:
    """Step C: weight and bias of the gate; `decay` is on weights of features of deviation 1."""
    deviation, mean = torch.std_mean(features, dim=0, correction=0)
    scale = 1 / deviation.clamp(min=1e-6 * deviation.max() + 1e-12)
    x = (features - mean) * scale
    weight, bias = (torch.zeros(*size, requires_grad=True) for size in ((exits, x.shape[1]), (exits,)))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    folded = weight.detach() * scale
    return folded, bias.detach() - folded @ mean


# ---------------------------------------------------------------- the transform


@dataclass(frozen=True, kw_only=True)
class EcoM2F(Transform):
    """Train exits after every block from `first_exit` on, and a gate that chooses one for each image.

    beta: what a further block must add to the quality (a probability or a cosine) to be worth it. parent_steps: of step
    A, at most `learning_rate`, by AdamW. gate_decay: weight decay of the gate.
    """

    beta: float = 0.01
    first_exit: int = 2
    parent_steps: int = 30
    learning_rate: float = 1e-4
    gate_decay: float = 1e-3

    supports: ClassVar[frozenset[str]] = frozenset({"vision"})
    needs_data: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    unit: ClassVar[str] = "block"
    quick: ClassVar[dict[str, Any]] = {"first_exit": 1, "parent_steps": 2}

    def __post_init__(self):
        super().__post_init__()
        check_range("eco-m2f", "beta", self.beta, 0, 1)
        check_range("eco-m2f", "first_exit", self.first_exit, 1, 1_000_000)
        check_range("eco-m2f", "parent_steps", self.parent_steps, 0, 10_000_000)
        check_range("eco-m2f", "learning_rate", self.learning_rate, 1e-12, 1.0)
        check_range("eco-m2f", "gate_decay", self.gate_decay, 0, 1e6)

    def run(self, model: nn.Module, data: Data, edit: Editor, report: Report) -> None:
        model.eval()
        blocks = self._blocks(model)
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        data = self._labeled(model, data, report)
        edit.keep(model)
        if isinstance(blocks[0].module, ExitBlock):
            report.changed(blocks[0].name, parts.count_weights(blocks[0].module.exit_gate), "its gate alone")
            report.note(f"it had exits already, from {blocks[0].module.first_exit} on: step A was not repeated")
            exits_of(teacher).fixed = len(blocks)
        else:
            self._add_exits(model, blocks, edit, report)
        first_exit = blocks[0].module.first_exit
        with in_float32(model, teacher):
            if self.parent_steps and edit.made:
                model.requires_grad_(True)
                loss = partial(parent_loss, teacher=teacher, first_exit=first_exit)
                losses = trained(model, data, loss, steps=self.parent_steps, learning_rate=self.learning_rate)
                report.note(f"parent trained for {self.parent_steps} steps, loss {losses[0]:.3g} to {losses[-1]:.3g}")
            self._train_gate(model, teacher, data, edit, report)

    def _blocks(self, model: nn.Module) -> list[parts.Block]:
        """All blocks, in one stack that nothing else reads."""
        blocks, who = parts.blocks(model), type(model).__name__
        if seamless := [block for block in blocks if not block.has_seam]:
            kind = type(seamless[0].module).__name__
            raise FormularyError(f"eco-m2f cannot act inside the {kind}s of this {who}: no seam is known")
        if len({block.stack for block in blocks}) > 1 or getattr(model, "stage_names", None):
            raise FormularyError(f"eco-m2f needs one stack of blocks whose last state alone is read; not so in this {who}")
        if self.first_exit > len(blocks):
            raise FormularyError(f"eco-m2f: first_exit {self.first_exit} is beyond the {len(blocks)} blocks of this {who}")
        return blocks

    def _labeled(self, model: nn.Module, data: Data, report: Report) -> Data:
        """The data with its labels in the items where the model classifies them, else without any."""
        marks = data.labels if data.labels is not None else [item.get("labels") for item in data.items]
        known = all(isinstance(mark, int) or isinstance(mark, Tensor) and mark.ndim == 0 for mark in marks)
        classes = getattr(getattr(model, "config", None), "num_labels", 0) if "Classification" in type(model).__name__ else 0
        bare = [{key: value for key, value in item.items() if key != "labels"} for item in data.items]
        if classes and known and 0 <= min(marks) and max(marks) < classes:
            return replace(data, items=[{**item, "labels": torch.as_tensor(mark)} for item, mark in zip(bare, marks)])
        report.note(f"judged by the {'classes' if classes else 'states of tokens'} that the unchanged model gives")
        return replace(data, items=bare)

    def _add_exits(self, model: nn.Module, blocks: list[parts.Block], edit: Editor, report: Report) -> None:
        for index, block in enumerate(blocks):
            edit.edit(block.name, ExitBlock, index=index, count=len(blocks), first_exit=self.first_exit)
            note = "always runs" if index < self.first_exit else "runs where the gate says so"
            report.changed(block.name, parts.count_weights(block.module), note)

    @torch.no_grad()
    def _train_gate(self, model: nn.Module, teacher: nn.Module, data: Data, edit: Editor, report: Report) -> None:
        seen: list[tuple[Tensor, Tensor]] = []
        for batch in data.batches():
            inputs = inputs_of(model, batch)
            found, features = exit_outputs(model, inputs)
            seen.append((quality(found, target(teacher, batch, inputs)).cpu(), features.cpu()))
        qualities, features = torch.cat([q for q, _ in seen], 1), torch.cat([x for _, x in seen])
        labels = best_exits(qualities, self.beta)
        weight, bias = fit_gate(features, labels, len(qualities), self.gate_decay)
        gate = parts.blocks(model)[0].module.exit_gate
        edit.set(gate.weight, weight)
        edit.set(gate.bias, bias)
        chosen = F.linear(features, weight, bias).argmax(-1)
        self._tell(qualities, labels, chosen, parts.blocks(model)[0].module, report)

    def _tell(self, qualities: Tensor, labels: Tensor, chosen: Tensor, first: ExitBlock, report: Report) -> None:
        share = lambda exits, k: float((exits == k).float().mean())
        report.tables["exits"] = [
            {
                "blocks": first.first_exit + k,
                "mean quality": float(qualities[k].mean()),
                "best for": share(labels, k),
                "chosen for": share(chosen, k),
            }
            for k in range(len(qualities))
        ]
        depth, reached = float(chosen.float().mean()) + first.first_exit, qualities.gather(0, chosen[None]).mean()
        report.figures["mean depth"], report.figures["share of blocks"] = depth, depth / first.exit_count
        report.note(
            f"leaves after {depth:.1f} of {first.exit_count} blocks, quality {float(reached):.3f} "
            f"(at full depth {float(qualities[-1].mean()):.3f}), on the training images"
        )
