"""A digit ViT is trained to ternary weights by its own teacher for 150 steps, the first 50 with intervention or none: how
many steps until it is within 2 points of the teacher, and how far hidden states are from the teacher's after 50.

Same loss, batches and steps; without intervention it is TernaryBERT's training, with one schedule of the learning rate.
All is measured without intervention, every fifth step. Rates were chosen by `tune()` from the same grid for the fewest
steps, on training digits that were held out, over seeds that no check uses. The paper's gain in accuracy has no room
here: a pilot without intervention lost 0.8 points in all. A run that never comes so near counts as 150 steps.
"""

from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from formulary import lab
from formulary.contracts import Data
from formulary.evidence import Check, Outcome, all_of, at_most

from .._training import block_outputs
from .attention import attentions
from .method import TeacherIntervention

STEPS, FIRST, BATCH, EVERY, BELOW, VALIDATION = 150, 50, 16, 5, 0.02, 300
RATES = (1e-3, 2e-3, 4e-3)
CHOSEN = {"intervention": 2e-3, "plain": 2e-3}
STEPS_TAKEN, HIDDEN = "steps to within 2 points", "hidden squared error after 50 steps"


def digits(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and labels of "train" or "test", or of the shuffled train's parts: "validate", 300 of them, and "fit"."""
    images, labels = (torch.from_numpy(part) for part in lab.digits("test" if split == "test" else "train"))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = lab.digit_pixels(images[order]), labels[order]
    chosen = {"validate": slice(0, VALIDATION), "fit": slice(VALIDATION, None)}.get(split, slice(None))
    return images[chosen], labels[chosen]


@dataclass(frozen=True, kw_only=True)
class Watched(Data):
    """Data that calls `look(step)` before the batch of each step."""

    look: Callable[[int], None]

    def sample(self, step: int) -> dict[str, torch.Tensor]:
        self.look(step)
        return super().sample(step)


def prepare(seed: int, fit: str = "train", split: str = "test") -> dict:
    pixels, labels = digits(split)
    return {"seed": seed, "model": lab.trained_digit_vit(), "fit": digits(fit)[0], "pixels": pixels, "labels": labels}


@torch.no_grad()
def right(model, context: dict) -> torch.Tensor:
    return lab.metrics.accuracy(model.eval()(pixel_values=context["pixels"]).logits, context["labels"])


@torch.no_grad()
def hidden_error(model, context: dict) -> float:
    """Mean over blocks and digits of the squared distance to the teacher's hidden states."""
    with block_outputs(model) as ours, block_outputs(context["model"]) as theirs:
        model.eval()(pixel_values=context["pixels"]), context["model"](pixel_values=context["pixels"])
    return sum(float(F.mse_loss(a, b)) for (_, a), (_, b) in zip(ours, theirs)) / len(ours)


class Done(Exception):
    """Nothing more is to be seen."""


def trained(name: str, lr: float, context: dict) -> dict[str, list[float]]:
    """What is seen on the way; training ends when there is no more to see."""
    student, goal = deepcopy(context["model"]), right(context["model"], context).mean() - BELOW
    reached, hidden = [], []

    def look(step: int) -> None:
        tape = attentions(student)[0].tape if attentions(student) else None
        if tape is None or step % EVERY:
            return
        tape.splice = None
        if step == FIRST:
            hidden.append(hidden_error(student, context))
        if not reached and right(student, context).mean() >= goal:
            reached.append(float(step))
        if reached and hidden:
            raise Done

    first = FIRST if name == "intervention" else 0
    data = Watched([{"pixel_values": x} for x in context["fit"]], batch_size=BATCH, seed=context["seed"], look=look)
    with suppress(Done):
        TeacherIntervention(steps=STEPS, intervention_steps=first, learning_rate=lr).apply(student, data)
    return {STEPS_TAKEN: reached or [float(STEPS)], HIDDEN: hidden}


def arm(name: str, context: dict) -> Outcome:
    budget = {"training steps": STEPS, "tuning trials": len(RATES)}
    return Outcome(trained(name, CHOSEN[name], context), budget=budget)


def tune(seeds=(1000, 1001)) -> dict[str, dict[float, float]]:
    """For each arm, the mean number of steps of each learning rate on training digits that were held out."""
    taken = lambda name, lr, seed: trained(name, lr, prepare(seed, "fit", "validate"))[STEPS_TAKEN][0]
    return {n: {lr: sum(taken(n, lr, s) for s in seeds) / len(seeds) for lr in RATES} for n in CHOSEN}


check = Check(
    claim="With the teacher's attention in the first 50 of 150 steps, a ternary digit ViT comes within 2 points of its"
    " teacher in at most 0.7 of the steps that it takes without, and after those 50 its hidden states are nearer to the"
    " teacher's.",
    setup=prepare,
    arms={name: partial(arm, name) for name in CHOSEN},
    holds=all_of(
        at_most("intervention", "plain", ratio=0.7, metric=STEPS_TAKEN),
        at_most("intervention", "plain", metric=HIDDEN),
    ),
    items="fresh",
    redraws="the order of the training digits",
    seeds=10,
    version=1,
    scope="one ViT of width 64 with 4 layers on scikit-learn's digits, 150 steps of 16",
)
