"""Are 30 % of a pre-trained language model's weights free when the smallest go at once, and do later ones cost more?

A character model pre-trained on the King James Bible is fine-tuned on Python's documentation: dense, after zeroing the
smallest weights once, after zeroing as many at random, and after three rounds of fine-tuning, pruning and rewinding.
The last fine-tuning is the same for all.
"""

from copy import deepcopy
from functools import cache

import torch

from formulary import lab
from formulary.contracts import Data, parts
from formulary.evidence import Check, all_of, at_least, at_most, no_worse
from formulary.lab.metrics import sequence_accuracy

from .method import EssentialSparsity, fixed, magnitude_masks, zero

SHARE, STEPS, RATE, ROUNDS = 0.3, 50, 1e-3, 3
ACCURACY, DROP = "next-character accuracy", "loss of next-character accuracy"


@cache
def documentation(split: str) -> torch.Tensor:
    """(windows, 64) ids of the texts of a split; characters that the Bible lacks are line ends."""
    ids = lab.tasks.encode("\n".join(lab.python_docs(split)))
    return ids[: len(ids) // 64 * 64].view(-1, 64)


def held_out() -> torch.Tensor:
    """256 windows of the test texts, evenly spaced."""
    every = documentation("test")
    return every[:: len(every) // 256][:256]


def prepare(seed: int) -> dict:
    """The checkpoint, windows to fine-tune on, and what is fine-tuned already, for arms that share it."""
    every = documentation("train")
    chosen = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[: 8 * STEPS]
    data = Data([{"input_ids": row, "labels": row} for row in every[chosen]], batch_size=8, seed=seed)
    return {"model": lab.trained_char_gpt(layers=3, width=96, heads=4, steps=600), "data": data, "done": {}}


def fine_tuned(context, masks):
    """The checkpoint with the masks applied and kept, fine-tuned on the documentation."""
    model = deepcopy(context["model"])
    linears = parts.linears(model)
    masks = masks or [torch.ones_like(part.raw, dtype=torch.bool) for part in linears]
    zero(linears, masks)
    with fixed(linears, masks):
        lab.train(model, context["data"], steps=STEPS, lr=RATE, seed=context["data"].seed)
    return model


def one_shot(context, share: float):
    method = EssentialSparsity(sparsity=share, steps=STEPS, learning_rate=RATE)
    return method.apply(deepcopy(context["model"]), context["data"])[0]


def at_random(context, share: float):
    generator = torch.Generator().manual_seed(context["data"].seed)
    linears = parts.linears(deepcopy(context["model"]))
    for part in linears:
        part.raw.data = torch.rand(part.raw.shape, generator=generator)
    return fine_tuned(context, next(magnitude_masks(linears, [share])))


def iterative(context, share: float):
    """Lottery-ticket masks: prune the fine-tuned weights a little, rewind to the checkpoint with it, and again."""
    masks = None
    for done in range(1, ROUNDS + 1):
        linears = parts.linears(fine_tuned(context, masks))
        masks = next(magnitude_masks(linears, [1 - (1 - share) ** (done / ROUNDS)]))
    return fine_tuned(context, masks)


def right(context, way, share: float) -> torch.Tensor:
    """The share of characters of each held-out window that the model predicts."""
    key = way.__name__, share
    if key not in context["done"]:
        model = (fine_tuned(context, None) if share == 0 else way(context, share)).eval()
        with torch.no_grad():
            context["done"][key] = sequence_accuracy(model(held_out()).logits, held_out())
    return context["done"][key]


def accuracy(way, share: float):
    return lambda context: {ACCURACY: right(context, way, share).tolist()}


def drop(low: float, high: float):
    return lambda context: {DROP: (right(context, one_shot, low) - right(context, one_shot, high)).tolist()}


check = Check(
    claim="With 30 % of a character model's linear weights zeroed before fine-tuning, the smallest cost less than 1 "
    "point of accuracy, random ones at least 5, and three rounds of iterative pruning gain less than 1 point over one "
    "shot; going from 60 to 90 % costs at least 5 times what going from 0 to 30 % does, and 5 points more.",
    setup=prepare,
    arms={
        "one shot": accuracy(one_shot, SHARE), "dense": accuracy(one_shot, 0.0), "random": accuracy(at_random, SHARE),
        "iterative": accuracy(iterative, SHARE), "60 to 90 %": drop(0.6, 0.9), "0 to 30 %": drop(0.0, SHARE),
    },
    holds=all_of(
        no_worse("one shot", "dense", margin=0.01, higher_is_better=True, metric=ACCURACY),
        at_most("random", "dense", minus=0.05, metric=ACCURACY),
        no_worse("one shot", "iterative", margin=0.01, higher_is_better=True, metric=ACCURACY),
        at_least("60 to 90 %", "0 to 30 %", ratio=5, plus=0.05, metric=DROP),
    ),
    items="same",
    redraws="the fine-tuning text and the random masks",
    seeds=8,
    version=1,
    scope="one Llama of width 96, pre-trained on the Bible, fine-tuned for 50 steps on Python's documentation",
)  # fmt: skip
