"""MOHAWK: turns a causal Transformer into a state space model, by matching it at three scales, one after the other.

    orient:   min |T(u) - softmax(q k' / sqrt(K) + mask)|_F                 a head, each layer alone
    align:    min |mixer(u) - attention(u)|_2                               a token, each layer alone
    imitate:  min -sum_v teacher(v) log student(v)                          a token, the whole model

where u is what flows into the teacher's attention, and T the matrix over tokens of the mixer that stands in its place, a
discrete Mamba-2 (`DiscreteMamba2`). All else (embeddings, feed-forwards, norms, head) is the teacher's at the start.

Source: arXiv:2408.10189, section 4; the mixer is section 5's and the authors' code's (goombalab/phi-mamba). Of the first two
stages only the mixers learn, of the last everything. Three choices: the second stage compares what the mixer puts out, as the
authors' code does with a frozen feed-forward; in Phi, where both branches add up, this is the block's output. A run here sees
some hundred thousand tokens and not 3 billion, so values and output projections start as the teacher's too; `start="random"`
does without. And the learning rates are ours.

In: a causal language model and text. Out: the same model, changed in place, with a recurrent state of fixed size where keys
and values were. `keep` leaves layers their attention (the paper's hybrid keeps 4 of 24). Gradient checkpointing is not
possible. Raises UsageError for bad parameters, FormularyError where no layer is left or the teacher shows no matrices.

>>> from formulary.lab import inputs_for, tiny
>>> model = tiny("llama")
>>> data = Data([{"input_ids": ids} for ids in inputs_for(model, batch=8)["input_ids"]])
>>> student, report = Mohawk(keep=(1,), state=8, orient_steps=2, align_steps=2, steps=2).apply(model, data)
>>> report.headline
'mohawk on 1 of 2 layers, ... % of the weights; 1 skipped: kept as attention; oriented for 2 steps, error ...'
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from formulary.contracts import Data, Report, Transform, parts
from formulary.contracts.attention import ATTRIBUTE
from formulary.contracts.edits import Editor
from formulary.contracts.transform import check_range, in_float32
from formulary.errors import FormularyError, UsageError

from .mixer import DiscreteMamba2, projections

__all__ = ["DiscreteMamba2", "Mohawk"]

ENOUGH = 100_000_000
"""Tokens below which the report says that they are few."""

# ---------------------------------------------------------------- the three losses


def orientation(
    layer: DiscreteMamba2, u: Float[Tensor, "B L D"], real: Bool[Tensor, "B L"], output: tuple
) -> Float[Tensor, ""]:
    """|T(u) - attention matrix|_F over the rows of real tokens, mean over texts and heads."""
    if output[1] is None:
        raise FormularyError("mohawk: the teacher's attention gives no matrix to match; orient_steps=0 does without")
    gap = (layer.matrix(u, real) - output[1]) * real[:, None, :, None]
    return gap.square().sum((-2, -1)).clamp(min=1e-12).sqrt().mean()


def alignment(
    layer: DiscreteMamba2, u: Float[Tensor, "B L D"], real: Bool[Tensor, "B L"], output: tuple
) -> Float[Tensor, ""]:
    """|mixer(u) - attention(u)|_2, mean over real tokens."""
    return (layer(u, real) - output[0])[real].norm(dim=-1).mean()


def imitation(model: nn.Module, batch: dict[str, Tensor], *, teacher: nn.Module) -> Float[Tensor, ""]:
    """Cross-entropy with what the teacher expects next, mean over real tokens, in nats."""
    model.eval()
    with torch.no_grad():
        wanted = teacher(**batch, use_cache=False).logits
    real = real_tokens(batch)
    return F.cross_entropy(model(**batch, use_cache=False).logits[real].float(), wanted[real].float().softmax(-1))


def real_tokens(batch: dict[str, Tensor]) -> Bool[Tensor, "B L"]:
    """Which positions of a batch are no padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


# ---------------------------------------------------------------- training


def windows(data: Data, length: int, device: torch.device, *, done: int = 0) -> Callable[[int], dict[str, Tensor]]:
    """step -> batch, of which `length` tokens are left, from a place that changes from step to step; after `done` others."""

    def sample(step: int) -> dict[str, Tensor]:
        step += done
        batch = {key: value for key, value in data.sample(step).items() if key in ("input_ids", "attention_mask")}
        free = max(0, batch["input_ids"].shape[1] - length)
        generator = torch.Generator().manual_seed(1_000_003 * data.seed + step)
        start = int(torch.randint(free + 1, (), generator=generator))
        return {key: value[:, start : start + length].to(device) for key, value in batch.items()}

    return sample


def match(
    teacher: nn.Module,
    layers: dict[str, DiscreteMamba2],
    batches: Callable[[int], dict[str, Tensor]],
    loss: Callable[..., Float[Tensor, ""]],
    *,
    steps: int,
    rate: float,
) -> list[dict[str, float]]:
    """Train each layer on `loss(layer, u, real, output)` of the teacher's attention of that name; gives the losses a step.

    Each learns while the teacher runs, so that one layer's matrices are in memory at a time.
    """
    trained = [p for layer in layers.values() for p in layer.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    found: list[dict[str, float]] = []

    def learn(name: str, module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        u = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        with torch.enable_grad():
            value = loss(layers[name], u.detach(), real, output)
            value.backward()
        found[-1][name] = float(value.detach())

    handles = [
        teacher.get_submodule(name).register_forward_hook(partial(learn, name), with_kwargs=True) for name in layers
    ]
    try:
        for step in range(steps):
            batch = batches(step)
            real = real_tokens(batch)
            found.append({})
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                teacher.base_model(**batch, use_cache=False)
            if not all(map(math.isfinite, found[-1].values())):
                raise FormularyError(f"mohawk: a loss is not finite at step {step + 1}: try a smaller align_rate")
            optimizer.step()
            schedule.step()
    finally:
        for handle in handles:
            handle.remove()
    optimizer.zero_grad(set_to_none=True)
    return found


# ---------------------------------------------------------------- the transform


@dataclass(frozen=True, kw_only=True)
class Mohawk(Transform):
    """Replace attention by discrete Mamba-2 mixers, and distil the model that it was into them.

    keep: numbers, from 0, of layers that stay attention; `targets` and `ignore` choose by name. state, conv: sizes of a
    mixer a head. orient_steps, align_steps, steps: of the three stages; length: tokens of each text that a step looks at.
    align_rate, learning_rate: the highest, of AdamW, in the first two stages and the last. start: where values and
    outputs begin ("teacher", "random"). tuned: what the last stage trains ("all", "mixers").
    """

    keep: tuple[int, ...] = ()
    state: int = 64
    conv: int = 4
    orient_steps: int = 50
    align_steps: int = 50
    steps: int = 50
    length: int = 128
    align_rate: float = 2e-3
    learning_rate: float = 5e-4
    start: Literal["teacher", "random"] = "teacher"
    tuned: Literal["all", "mixers"] = "all"

    supports: ClassVar[frozenset[str]] = frozenset({"decoder"})
    needs_data: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    unit: ClassVar[str] = "layer"
    quick: ClassVar[dict[str, Any]] = {"state": 4, "orient_steps": 1, "align_steps": 1, "steps": 1}

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "keep", (self.keep,) if isinstance(self.keep, int) else tuple(self.keep))
        for name, low in {"state": 1, "conv": 1, "orient_steps": 0, "align_steps": 0, "steps": 0, "length": 2}.items():
            check_range("mohawk", name, getattr(self, name), low, 10_000_000)
        for name in ("align_rate", "learning_rate"):
            check_range("mohawk", name, getattr(self, name), 1e-9, 1e6)
        for name, known in (("start", ("teacher", "random")), ("tuned", ("all", "mixers"))):
            if getattr(self, name) not in known:
                raise UsageError(f"mohawk: {name} must be {' or '.join(known)}, got {getattr(self, name)!r}")

    def run(self, model: nn.Module, data: Data, edit: Editor, report: Report) -> None:
        model.eval()
        chosen = self.choose(model, report)
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        teacher.set_attn_implementation("eager")
        edit.keep(model)
        layers = self.replace(chosen, edit, report)
        batches = partial(windows, data, self.length, next(model.parameters()).device)
        first = self.orient_steps + self.align_steps
        with in_float32(model, teacher):
            if self.orient_steps:
                self.match("oriented", teacher, layers, batches(), orientation, self.orient_steps, report)
            if self.align_steps:
                self.match("aligned", teacher, layers, batches(done=self.orient_steps), alignment, self.align_steps, report)
            if self.steps:
                self.imitate(model, teacher, layers, batches(done=first), data.seed, report)
        tokens = (first + self.steps) * int(real_tokens(batches()(0)).sum())
        if tokens < ENOUGH:
            report.note(f"about {tokens:,} tokens in all, where the paper takes 3 billion: do not expect its quality")

    def choose(self, model: nn.Module, report: Report) -> list[parts.Part]:
        """The attentions to replace."""
        every = parts.mixers(model)
        for index in self.keep:
            if not 0 <= index < len(every):
                raise UsageError(f"mohawk: keep={index} names no layer of this model; they are 0 to {len(every) - 1}")
        kept = {every[index].name for index in self.keep}
        asked = parts.mixers(model, self.targets, self.ignore)
        for part in asked:
            if part.name in kept:
                report.skipped(part.name, "kept as attention", parts.count_weights(part.module))
            if hasattr(part.module, ATTRIBUTE):
                raise FormularyError(f"mohawk: another method computes the attention of {part.name}; apply mohawk first")
        chosen = [part for part in asked if part.name not in kept]
        if not chosen:
            raise FormularyError(f"mohawk: none of {len(every)} layers is left to replace")
        return chosen

    def replace(self, chosen: list[parts.Part], edit: Editor, report: Report) -> dict[str, DiscreteMamba2]:
        """Put the mixers in place; gives them by name."""
        layers, cached = {}, 0
        for part in chosen:
            arguments = DiscreteMamba2.arguments(part, state=self.state, conv=self.conv)
            layer = layers[part.name] = edit.edit(part.name, DiscreteMamba2, **arguments).layer
            taken = layer.start_from(part.module) if self.start == "teacher" else []
            note = f"started from its {' and '.join(taken)}" if taken else "started at random"
            cached += 2 * len(projections(part.module)[0])
            report.changed(part.name, parts.count_weights(part.module), note)
        tokens = sum(layer.state_size(1) for layer in layers.values()) / cached
        report.figures["tokens whose keys and values are as large as the state"] = round(tokens)
        return layers

    def match(self, name: str, teacher, layers: dict[str, DiscreteMamba2], batches, loss, steps: int, report: Report) -> None:
        """One of the first two stages."""
        found = match(teacher, layers, batches, loss, steps=steps, rate=self.align_rate)
        report.tables[name] = [{"layer": key, "before": found[0][key], "after": found[-1][key]} for key in layers]
        before, after = (sum(one.values()) / len(layers) for one in (found[0], found[-1]))
        report.note(f"{name} for {steps} steps, error {before:.3g} to {after:.3g}")

    def imitate(self, model, teacher, layers: dict[str, DiscreteMamba2], batches, seed: int, report: Report) -> None:
        """The last stage."""
        from formulary.lab import train

        model.requires_grad_(self.tuned == "all")
        for layer in layers.values():
            layer.requires_grad_(True)
        optimizer = partial(torch.optim.AdamW, lr=self.learning_rate, weight_decay=0.0, fused=True)
        options = {"lr": self.learning_rate, "optimizer": optimizer, "schedule": "linear", "seed": seed}
        losses = train(model, batches, steps=self.steps, loss=partial(imitation, teacher=teacher), **options).losses
        what = "everything" if self.tuned == "all" else "its mixers"
        report.note(f"{what} imitated the teacher for {self.steps} steps, loss {losses[0]:.3g} to {losses[-1]:.3g}")
