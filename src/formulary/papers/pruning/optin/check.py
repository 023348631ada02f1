"""A digit ViT pruned to 60 % of its multiplications without training: by trajectory, magnitude, logits alone, or
nearby error.

Every arm scores heads and neurons in its own way and spends the budget in the same way. The speed is that of a real
ViT of width 384 pruned to the same budget by magnitude: it depends on the shapes, not on which units stay.
"""

from copy import deepcopy
from functools import cache, partial

import torch

from formulary import lab
from formulary.contracts import Data, Report, parts
from formulary.contracts.edits import editing
from formulary.evidence import Check, Outcome, all_of, at_most, no_worse, speedup
from formulary.papers.pruning._parts import shrink, sublayers, unit_norms

from .method import OPTIN, split_budget
from .scoring import Trajectory

MODELS, SHARE, PATCHES, PHOTO_TOKENS = 10, 0.6, 65, 257
OURS = OPTIN(macs=SHARE, items=8, rows=256, neurons="masked")
ERROR = "added classification error"


class Remembered(Trajectory):
    """Masks each unit once for all arms."""

    def masked(self, sublayer, units, *, own=False):
        known = vars(self).setdefault("known", {})
        if sublayer.name not in known:
            known[sublayer.name] = super().masked(sublayer, units, own=own)
        return known[sublayer.name]


def prepare(seed: int) -> dict:
    """One of the trained ViTs, eight unlabeled digits to calibrate on, and the test digits."""
    model = lab.trained_digit_vit(layers=6, width=64, heads=4, steps=200, seed=seed % MODELS)
    images, _ = lab.digits("train")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: OURS.items]
    batch = {"pixel_values": lab.digit_pixels(torch.from_numpy(images)[chosen])}
    trajectory = Remembered(model, batch, rows=OURS.rows, temperature=OURS.temperature, seed=seed)
    return {"model": model, "seed": seed, "trajectory": trajectory, "batch": batch, "chosen": sublayers(model)[0]}


def smaller(model, scores, tokens: int):
    model = deepcopy(model)
    chosen = sublayers(model)[0]
    with editing(model, "optin") as edit:
        for sublayer, keep in zip(chosen, split_budget(chosen, scores, SHARE, tokens)):
            shrink(edit, sublayer, keep)
    return model


def trajectory(context):
    return OURS.scores(context["trajectory"], context["chosen"], Report("optin", {}, 1))


def logits_alone(context):
    return [context["trajectory"].masked(s, range(s.units))[1] for s in context["chosen"]]


def by_magnitude(context):
    return [unit_norms(sublayer) for sublayer in context["chosen"]]


def nearby_error(context):
    """The squared norm of what a unit adds to its own sublayer's output."""
    found = {}

    def see(part, inputs, expert):
        sublayer = next(s for s in context["chosen"] if s.name == part.name)
        products = (part.weight().mT @ part.weight()) * (inputs.mT @ inputs)
        blocks = products.unflatten(0, (sublayer.units, -1)).unflatten(2, (sublayer.units, -1))
        found[part.name] = blocks.sum((1, 3)).diagonal()

    with parts.observe([s.out for s in context["chosen"]], see) as run:
        run(context["model"], context["batch"])
    return [found[s.name] for s in context["chosen"]]


def at_random(context):
    generator = torch.Generator().manual_seed(context["seed"])
    return [torch.rand(s.units, generator=generator) * s.macs(PATCHES) for s in context["chosen"]]


def with_prior(context):
    """The authors' factor over indices, on a model whose units were put in random order first."""
    generator = torch.Generator().manual_seed(context["seed"])
    scores = []
    for s, score in zip(context["chosen"], trajectory(context)):
        factors = torch.logspace(0, 1, s.units, base=10.0 if s.role == "attention" else 100.0)
        scores.append(score * factors[torch.randperm(s.units, generator=generator)])
    return scores


@torch.no_grad()
def wrong(model):
    images, labels = (torch.from_numpy(part) for part in lab.digits("test"))
    return (model(pixel_values=lab.digit_pixels(images)).logits.argmax(-1) != labels).float()


def arm(score, context) -> Outcome:
    model = smaller(context["model"], score(context), PATCHES)
    added = (wrong(model) - wrong(context["model"])).tolist()
    macs = sum(s.units * s.macs(PATCHES) for s in sublayers(model)[0])
    return Outcome({ERROR: added}, budget={"parameters": parts.count_weights(model), "multiplications": macs})


@cache
def large(pruned: bool):
    model = lab.vit()[0]
    return smaller(model, [unit_norms(s) for s in sublayers(model)[0]], PHOTO_TOKENS) if pruned else model


def timed(pruned: bool, context) -> Outcome:
    model, pixels = large(pruned), lab.photo_crops(2)
    return Outcome({}, work=torch.no_grad()(partial(model, pixel_values=pixels)))


check = Check(
    claim="Pruned to 60 % of its multiplications without training, a digit ViT loses at most 2/3 of the accuracy by "
    "trajectory scores that it loses by weight magnitude, and at most 3 points more than by the change of logits alone "
    "or by trajectory scores times the released factor over unit indices; a real ViT so pruned runs at least 1.2 times "
    "as fast.",
    setup=prepare,
    arms={
        "trajectory": partial(arm, trajectory),
        "magnitude": partial(arm, by_magnitude),
        "logits alone": partial(arm, logits_alone),
        "index prior": partial(arm, with_prior),
        "nearby error": partial(arm, nearby_error),
        "random": partial(arm, at_random),
        "pruned": partial(timed, True),
        "unpruned": partial(timed, False),
    },
    holds=all_of(
        at_most("trajectory", "magnitude", ratio=2 / 3, metric=ERROR),
        no_worse("trajectory", "logits alone", margin=0.03, metric=ERROR),
        no_worse("trajectory", "index prior", margin=0.03, metric=ERROR),
        speedup("pruned", "unpruned", at_least=1.2),
    ),
    items="same",
    redraws="which of ten trained ViTs, the calibration digits and random choices",
    seeds=10,
    version=1,
    scope="ten ViTs of six layers, width 64, on 8 x 8 digits, and the speed of one of width 384",
)  # fmt: skip
