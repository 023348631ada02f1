"""On a real sentence encoder: the error of 4-bit weights in blocks of 64 with power-of-two scales against one scale per
tensor and one per row, and what 8-bit integers everywhere do to sentence vectors.
"""

from copy import deepcopy
from functools import cache

import torch

from formulary import lab
from formulary.contracts import parts
from formulary.evidence import Check, all_of, at_least, at_most

from .method import BCT

SENTENCES = 48
ERROR, COSINE, RATIO = "relative squared weight error", "cosine distance to fp32", "times smaller"


@cache
def minilm():
    return lab.minilm()


def prepare(seed: int) -> dict:
    model, tokenizer = minilm()
    verses = lab.kjv(split="test")
    chosen = torch.randperm(len(verses), generator=torch.Generator().manual_seed(seed))[:SENTENCES].tolist()
    texts = [verses[i] for i in chosen]
    return {"texts": texts, "vectors": lab.embed(model, tokenizer, texts)}


def distance(model, context: dict) -> list[float]:
    vectors = lab.embed(model, minilm()[1], context["texts"])
    return (1 - (vectors * context["vectors"]).sum(-1)).tolist()


def weight_errors(model) -> list[float]:
    """Of each linear inside the blocks of the original model."""
    found = []
    for part in parts.linears(minilm()[0]):
        changed, weight = model.get_submodule(part.name).weight.detach(), part.weight()
        found.append(float((changed - weight).square().sum() / weight.square().sum()))
    return found


@cache
def compressed(bits: int, everything: bool):
    return BCT(bits=bits, everything=everything).apply(deepcopy(minilm()[0]))


@cache
@torch.no_grad()
def absmax(per_row: bool):
    """A copy at 4 bits with one scale for each tensor, or each row."""
    model = deepcopy(minilm()[0])
    for part in parts.linears(model):
        largest = part.raw.abs().amax(1, keepdim=True) if per_row else part.raw.abs().max()
        part.raw.copy_((part.raw / (largest / 7)).round() * (largest / 7))
    return model


def blocks(bits: int, everything: bool):
    def arm(context: dict) -> dict[str, list[float]]:
        model, report = compressed(bits, everything)
        ratio = report.figures["linear weights: bytes of float32 / bytes stored"]
        return {ERROR: weight_errors(model), COSINE: distance(model, context), RATIO: [ratio]}

    return arm


def rounded(per_row: bool):
    def arm(context: dict) -> dict[str, list[float]]:
        return {ERROR: weight_errors(absmax(per_row)), COSINE: distance(absmax(per_row), context)}

    return arm


check = Check(
    claim="4-bit weights in blocks of 64 have at most half the squared error of one scale per tensor, less than one per"
    " row, and are at least 7.5 times smaller; 8-bit integers everywhere turn sentence vectors by a cosine of at most"
    " 0.005.",
    setup=prepare,
    arms={
        "4-bit blocks": blocks(4, False),
        "8-bit everything": blocks(8, True),
        "4-bit per tensor": rounded(False),
        "4-bit per row": rounded(True),
        "fp32": lambda context: {ERROR: [0.0] * 36, COSINE: [0.0] * SENTENCES},
    },
    holds=all_of(
        at_most("4-bit blocks", "4-bit per tensor", ratio=0.5, metric=ERROR, oracle="fp32"),
        at_most("4-bit blocks", "4-bit per row", metric=ERROR, oracle="fp32"),
        at_least("4-bit blocks", 7.5, metric=RATIO, effect=0.2),
        at_most("8-bit everything", 0.005, metric=COSINE, effect=0.002),
    ),
    items="same",
    redraws="sentences",
    seeds=6,
    version=1,
    scope="all-MiniLM-L6-v2 on verses of the King James Bible; weights are the same in every seed",
)
