"""Two of eight blocks leave a character model: are grafts of their weights worth more than low-rank terms without them?

Equal trained parameters, steps, data and tuning trials; random blocks are the mean over all 28 pairs.
"""

import hashlib
from functools import cache, partial
from itertools import combinations
from pathlib import Path

import torch
from torch import nn

from formulary import lab
from formulary.contracts import Data, parts
from formulary.evidence import Check, Outcome, all_of, at_most, speedup

from ._stack import only_stack, remove
from .method import FuseGPT

LAYERS, WIDTH, PRETRAINING, LENGTH = 8, 96, 500, 128
STEPS, BATCH, RANK, TUNING_SEED = 20, 8, 8, 1000
EXCESS = "excess loss, nats/character"
# A step of P moves W' as much in both arms where the first's rate is 27 times the other's: weights are about 0.04.
RATES = {"fusegpt": (1e-2, 3e-2, 1e-1, 3e-1), "low rank": (1e-3, 3e-3, 1e-2, 3e-2)}
FILES = sorted(Path(__file__).parent.glob("[_m]*.py"))
SOURCE = hashlib.sha256(b"".join(file.read_bytes() for file in FILES)).hexdigest()


def whole() -> nn.Module:
    return lab.trained_char_gpt(layers=LAYERS, width=WIDTH, heads=4, steps=PRETRAINING)


@cache
def windows(split: str, count: int, seed: int) -> torch.Tensor:
    """(count, LENGTH) characters of the books of a split."""
    return lab.tasks.CharText(LENGTH, split=split).batch(count, torch.Generator().manual_seed(seed))["input_ids"]


def excess(model: nn.Module, split: str = "test", seed: int = 0) -> list[float]:
    """Nats per character of each of 48 windows beyond the whole model's."""
    batch = {"input_ids": windows(split, 48, seed)}
    return (lab.metrics.sequence_loss(model, [batch]).per_token - dense(split, seed)).tolist()


@cache
def dense(split: str, seed: int) -> torch.Tensor:
    return lab.metrics.sequence_loss(whole(), [{"input_ids": windows(split, 48, seed)}]).per_token


def prepare(seed: int) -> Data:
    return Data([{"input_ids": row} for row in windows("train", STEPS * BATCH, seed)], batch_size=BATCH, seed=seed)


def distilled(name: str, rate: float, seed: int) -> nn.Module:
    """Six blocks, by the arm `name` at learning rate `rate`."""

    def build():
        method = FuseGPT(steps=STEPS, rank=RANK, learning_rate=rate, graft=name == "fusegpt")
        return method.apply(whole(), prepare(seed))[0]

    sizes = [LAYERS, WIDTH, PRETRAINING, LENGTH, STEPS, BATCH, RANK]
    key = {"arm": name, "rate": rate, "seed": seed, "sizes": sizes, "source": SOURCE}
    return lab.cached("fusegpt-char", build, key=key)


@cache
def tuned(name: str) -> float:
    """The rate that does best on other windows of the training books, for data that is not measured."""
    return min(RATES[name], key=lambda rate: sum(excess(distilled(name, rate, TUNING_SEED), "train", TUNING_SEED + 1)))


def distillation(name: str, data: Data) -> Outcome:
    model = distilled(name, tuned(name), data.seed)
    budget = {"parameters": parts.count_weights(model), "tokens": 2 * STEPS * BATCH * LENGTH}
    budget["tuning trials"] = len(RATES[name])
    return Outcome({EXCESS: excess(model)}, budget=budget, work=running(model))


def running(model: nn.Module):  # on 8 windows
    return torch.no_grad()(lambda: model(windows("test", 48, 0)[:8], use_cache=False))


def by_influence(data: Data) -> Outcome:
    """The same two removals, and no distillation."""
    return Outcome({EXCESS: excess(FuseGPT(steps=0).apply(whole(), data)[0])})


@cache
def of_any_two() -> list[float]:
    """The mean over all pairs of blocks."""
    found = []
    for first, second in combinations(range(LAYERS), 2):
        model = whole()
        for index in (second, first):
            remove(model, model.get_submodule(only_stack(model)), index)
        found.append(excess(model))
    return torch.tensor(found).mean(0).tolist()


check = Check(
    claim="With two of eight blocks gone, grafting their weights onto the others leaves less excess loss than the same "
    "local distillation without them; that one undoes at least half of the removal's; the blocks of least influence "
    "cost less than random ones; and the smaller model is at least 1.2 times as fast.",
    setup=prepare,
    arms={
        "fusegpt": partial(distillation, "fusegpt"), "low rank": partial(distillation, "low rank"),
        "least influence": by_influence, "random blocks": lambda data: Outcome({EXCESS: of_any_two()}),
        "whole": lambda data: Outcome(work=running(whole())),
    },
    holds=all_of(
        at_most("fusegpt", "low rank", metric=EXCESS),
        at_most("low rank", "least influence", ratio=0.5, metric=EXCESS),
        at_most("least influence", "random blocks", metric=EXCESS),
        speedup("fusegpt", "whole", at_least=1.2),
    ),
    items="same", redraws="the text of the macro influence and of the distillation, and the random factors",
    seeds=8, version=1,
    scope=f"a Llama of width {WIDTH} trained on the King James Bible for {PRETRAINING} steps, {STEPS} steps a removal",
)  # fmt: skip
