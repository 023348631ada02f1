"""A character model, fine-tuned on 500 labeled sentences of each of three tasks, loses parts: those that its validation
loss does not need, or as many of the same sizes at random.

Version 2. Version 1 ran once and was void: four of nine dense models were at chance, where removing everything is free
(accuracy -0.6 [-1.55, 0.32] points, 0.51 [0.21, 0.81] of the blocks out, random removal -1.6 [-3.1, -0.2]). The
thresholds are the card's. New are the tasks, chosen on dense models alone, on seeds from 1000 on: the polarity of two
adjectives, what the first of two nouns is, and the majority of three adjectives, which dense models told right in 99.8,
95 and 90 % of sentences. (Of real text, whether words were swapped or scrambled or which testament it is from, they
learned nothing from 500 sentences.) "A gain on one of three tasks" is asked of the last, named before the run since
dense models are weakest there.

All arms start from the same dense model. The 200 sentences on which AxFormer measures its loss are not among the 500.
Random and magnitude arms leave as many units of each kind, in as large pieces, as AxFormer left; "random" is the mean
of four draws.
"""

import copy
from functools import partial

import numpy as np
import torch

from formulary import lab
from formulary.contracts import Data, parts
from formulary.contracts.edits import editing
from formulary.contracts.heads import with_head
from formulary.errors import FormularyError
from formulary.evidence import Check, Outcome, all_of, at_least
from formulary.papers.pruning._parts import shrink, sublayers, unit_norms

from .method import AxFormer

GOOD = (
    "good righteous holy faithful wise pure upright merciful blessed gentle "
    "strong perfect glad joyful honest just gracious humble kind true"
)
BAD = (
    "evil wicked unclean foolish proud cruel cursed wrathful weak vain "
    "false corrupt bitter guilty froward crooked bloody perverse vile unjust"
)
LIVING = (
    "man king servant lamb lion prophet priest woman serpent shepherd "
    "child eagle horse widow judge raven sheep scribe soldier bullock"
)
THINGS = (
    "sword altar house temple garment stone vessel gate tower table "
    "lamp tent chariot crown basket pillar candle throne ladder trumpet"
)
ADJECTIVES, NOUNS = (BAD.split(), GOOD.split()), (THINGS.split(), LIVING.split())
TASKS, LENGTH, TRAIN, VALIDATION, TEST, STEPS, DRAWS = ("polarity", "subject", "majority"), 64, 500, 200, 500, 100, 4
GAIN, WEAKEST, LOST, BLOCKS = "accuracy gained", "accuracy gained on majority", "accuracy lost", "share of blocks out"


def sentence(task: str, label: int, rng: np.random.Generator) -> str:
    adjective, noun = (lambda k: rng.choice(ADJECTIVES[k])), (lambda k: rng.choice(NOUNS[k]))
    other = rng.integers(2)
    if task == "polarity":
        return f"And the {noun(other)} was {adjective(label)} and {adjective(label)} before the {noun(rng.integers(2))}."
    if task == "subject":
        return f"Behold, the {noun(label)} of the {noun(other)} is {adjective(rng.integers(2))}, saith the LORD."
    a, b, c = (adjective(k) for k in rng.permutation([label, label, other]))
    return f"For he is {a}, and {b}, and {c}."


def sentences(task: str, n: int, rng: np.random.Generator) -> Data:
    labels = rng.integers(2, size=n).tolist()
    texts = [sentence(task, label, rng)[:LENGTH].ljust(LENGTH) for label in labels]
    items = [{"input_ids": lab.tasks.encode(text), "labels": torch.tensor(label)} for text, label in zip(texts, labels)]
    return Data(items, batch_size=25, labels=labels, seed=int(rng.integers(1 << 31)))


def prepare(seed: int) -> list[dict]:
    """One dense model a task, fine-tuned from one that knows the Bible's characters, and what it gets right."""
    found = []
    for task in TASKS:
        rng = np.random.default_rng([seed, TASKS.index(task)])
        train, validation, test = (sentences(task, n, rng) for n in (TRAIN, VALIDATION, TEST))
        base = lab.trained_char_gpt(kind="llama", layers=6, width=64, heads=4, steps=500)
        model = with_head(base, [0, 1])
        model.config.pad_token_id = -1  # every sentence is of one length, and any character may be its last
        lab.train(model, train, steps=STEPS, lr=1e-3, weight_decay=0.01, seed=seed)
        made = {"model": model.eval(), "validation": validation, "test": test, "seed": seed}
        found.append({**made, "right": right(model, test)})
    return found


@torch.no_grad()
def right(model, data: Data) -> np.ndarray:
    logits = torch.cat([model(input_ids=batch["input_ids"]).logits for batch in data.batches()])
    return (logits.argmax(-1) == torch.tensor(data.labels)).double().numpy()


def specialized(one: dict) -> dict:
    """What AxFormer leaves, made once for all arms: which test sentences are right, its parts, blocks out, weights."""
    if "specialized" not in one:
        model = copy.deepcopy(one["model"])
        rows = [{"part": s.role, "kept": s.units} for s in sublayers(model)[0]]
        blocks = 0.0
        try:
            model, report = AxFormer().apply(model, one["validation"])
            rows, blocks = report.tables["units kept"], report.figures["blocks out"]
        except FormularyError as error:  # a model that is best as it is loses nothing
            if "nothing to change" not in str(error):
                raise
        found = {"right": right(model, one["test"]), "rows": rows, "blocks": blocks}
        one["specialized"] = {**found, "weights": parts.count_weights(model)}
    return one["specialized"]


def axformer(context: list[dict]) -> Outcome:
    runs = [specialized(one) for one in context]
    gains = [run["right"] - one["right"] for one, run in zip(context, runs)]
    values = {GAIN: np.concatenate(gains).tolist(), WEAKEST: gains[-1].tolist()}
    values[BLOCKS] = [run["blocks"] for run in runs]
    return Outcome(values, budget={"parameters": sum(run["weights"] for run in runs)})


def pruned(one: dict, rank) -> tuple[np.ndarray, int]:
    """As much of each kind of part as AxFormer took; `rank` scores (part, unit), and what scores least goes."""
    model = copy.deepcopy(one["model"])
    chosen, rows = sublayers(model)[0], specialized(one)["rows"]
    with editing(model, "axformer") as edit:
        for role in ("attention", "feed-forward"):
            of = [s for s in chosen if s.role == role]
            scores = [rank(s) for s in of]
            counts = sorted(row["kept"] for row in rows if row["part"] == role)
            for i, kept in zip(np.argsort([float(s.mean()) for s in scores]), counts):
                keep = sorted(scores[i].argsort(descending=True)[:kept].tolist())
                if kept < of[i].units:
                    shrink(edit, of[i], keep, bias=bool(kept))
    return right(model, one["test"]), parts.count_weights(model)


def at_random(context: list[dict]) -> Outcome:
    lost = []
    for one in context:
        generators = [torch.Generator().manual_seed(DRAWS * one["seed"] + i) for i in range(DRAWS)]
        lost.append(one["right"] - np.mean([pruned(one, random_rank(g))[0] for g in generators], axis=0))
    return Outcome({LOST: np.concatenate(lost).tolist()})


def random_rank(generator: torch.Generator):
    return lambda sublayer: torch.rand((), generator=generator) + torch.rand(sublayer.units, generator=generator) / 1e3


def by_magnitude(context: list[dict]) -> Outcome:
    runs = [(one, *pruned(one, lambda sublayer: unit_norms(sublayer))) for one in context]
    lost = np.concatenate([one["right"] - correct for one, correct, _ in runs])
    return Outcome({LOST: lost.tolist()}, budget={"parameters": sum(weights for *_, weights in runs)})


check = Check(
    claim="On three tasks of 500 sentences, AxFormer takes out at least 30 % of the attentions and feed-forwards of a "
    "fine-tuned character model at no more than half a point of accuracy, with a gain on the task where it is weakest, "
    "while parts of the same sizes taken out at random cost at least 3 points.",
    setup=prepare,
    arms={"axformer": axformer, "random": at_random, "magnitude": by_magnitude},
    holds=all_of(
        at_least("axformer", -0.005, effect=0.01, metric=GAIN),
        at_least("axformer", 0.30, effect=0.10, metric=BLOCKS),
        at_least("axformer", 0.0, effect=0.01, metric=WEAKEST),
        at_least("random", 0.03, effect=0.02, metric=LOST),
    ),
    items="fresh",
    redraws="sentences, heads and random removals",
    seeds=6,
    version=2,
    scope="a Llama of six blocks of width 64 on three kinds of generated sentences of 64 characters",
)
