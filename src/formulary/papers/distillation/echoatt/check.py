"""Six middle layers of an eight-layer character model share two attention matrices: what does it cost, and what does
distillation give back?

Blocks of three, layers 2 and 3 attending as 1, 5 and 6 as 4. Distillation (two thirds of the steps) and then text, against
as many steps on text alone, each at its best of three learning rates on training books, on a seed that is not measured. A
step of distillation costs one more pass of the teacher. "ends" lets the first and last three layers share instead. The
teacher was trained once; forward times are of 8 sequences of 128, the teacher's with PyTorch's fused attention.
"""

import copy
from functools import cache, partial

import torch

from formulary import lab
from formulary.contracts import Data, parts
from formulary.evidence import Check, Outcome, all_of, at_least, at_most, speedup

from .method import EchoAtt
from .sharing import similarity

LAYERS, LENGTH, WINDOWS, STEPS, BATCH, TUNING_SEED = 8, 128, 48, 36, 8, 1000
RATES = (3e-4, 1e-3, 3e-3)
LOSS, COSINE = "loss, nats/character", "cosine of attention"
ENDS = tuple(f"model.layers.{i}.self_attn" for i in (0, 1, 2, 5, 6, 7))


def teacher():
    return lab.trained_char_gpt(layers=LAYERS, width=96, heads=4, steps=500)


def windows(split: str, count: int, seed: int) -> torch.Tensor:
    return lab.tasks.CharText(LENGTH, split=split).batch(count, torch.Generator().manual_seed(seed))["input_ids"]


def losses(model, split: str, seed: int) -> list[float]:
    batch = {"input_ids": windows(split, WINDOWS, 2**31 + seed)}
    return lab.metrics.sequence_loss(model, [batch]).per_token.tolist()


def shared(seed: int, targets: tuple = (), **settings):
    """The teacher with six layers sharing, after `settings` of training on the seed's text."""
    rows = windows("train", STEPS * BATCH, seed)
    data = Data([{"input_ids": row} for row in rows], batch_size=BATCH, seed=seed)
    settings = {"steps": 0, "text_steps": 0, **settings}
    return EchoAtt(share=3, first=1, last=1, targets=targets, **settings).apply(copy.deepcopy(teacher()), data)[0]


TRAINED = {"distilled": {"steps": STEPS * 2 // 3, "text_steps": STEPS // 3}, "text only": {"text_steps": STEPS}}


@cache
def best_rate(name: str) -> float:
    loss = lambda rate: sum(losses(shared(TUNING_SEED, learning_rate=rate, **TRAINED[name]), "train", TUNING_SEED))
    return min(RATES, key=loss)


def trained(name: str, seed: int) -> Outcome:
    model = shared(seed, learning_rate=best_rate(name), **TRAINED[name])
    budget = {"parameters": parts.count_weights(model), "tokens": STEPS * BATCH * LENGTH, "tuning trials": len(RATES)}
    return Outcome({LOSS: losses(model, "test", seed)}, budget=budget)


def untrained(make, seed: int) -> Outcome:
    model, batch = make(seed), windows("test", BATCH, seed)
    return Outcome({LOSS: losses(model, "test", seed)}, work=torch.no_grad()(lambda: model(input_ids=batch)))


def alike(pairs, seed: int) -> Outcome:
    """Of each of 16 sequences, the mean cosine of neighboring layers."""
    rows = windows("test", 16, 2**30 + seed)
    found = [similarity(copy.deepcopy(teacher()), [{"input_ids": row[None]}]) for row in rows]
    return Outcome({COSINE: [sum(float(one[i, i + 1]) for i in pairs) / len(pairs) for one in found]})


check = Check(
    claim="Inner layers of an eight-layer character model attend more alike than its first or last two; with six of them "
    "sharing two attention matrices it is within 3 % of its loss after 36 steps of distillation and text, at least 0.01 "
    "nats better than after 36 steps of text alone, and at least 1.1 times as fast; shared untrained, middle layers lose "
    "less than those at the ends.",
    setup=lambda seed: seed,
    arms={
        "distilled": partial(trained, "distilled"),
        "text only": partial(trained, "text only"),
        "untrained": partial(untrained, shared),
        "ends, untrained": partial(untrained, partial(shared, targets=ENDS)),
        "teacher": partial(untrained, lambda seed: teacher()),
        "inner": partial(alike, range(1, LAYERS - 2)),
        "first and last": partial(alike, (0, LAYERS - 2)),
    },
    holds=all_of(
        at_most("distilled", "teacher", ratio=1.03, metric=LOSS),
        at_most("distilled", "text only", minus=0.01, metric=LOSS),
        speedup("untrained", "teacher", at_least=1.1),
        at_least("inner", "first and last", metric=COSINE),
        at_most("untrained", "ends, untrained", metric=LOSS),
    ),
    items="fresh",
    redraws="training and test text",
    seeds=5,
    version=1,
    scope="one Llama of eight layers of width 96, trained for 500 steps on characters of one book",
)
