"""The alphabet and running text, characters of both: does a router know which blocks a sequence can do without?

The tasks were chosen before any run of the check, instead of the card's: its modular arithmetic is not learned in 1,000
steps, digit sums leave half of the blocks idle, and phrases said over and over are not learned in 200 steps (1.76 and
1.93 nats). Easy is the alphabet from a random letter on, hard the Bible's running text, which needs its blocks: without
the middle two the whole model's loss rose by 0.065 and 0.093 nats on seeds 1000 and 1001. The base model knew the text
and saw both for 200 steps. All arms are tuned by LoRA in the same way, and all run every block for the first 32
characters; losses are of what follows. "fixed" leaves out the two middle blocks, "random" two of the inner six that
differ from seed to seed, "late" the two before the last, which is an early exit but for the last block. What is lost is
against the whole model, tuned as well; times are against the base model as it was. FiRST's steps of router training come
on top. The null of the easy texts are more hard ones. The thresholds are the card's; for time it says "in proportion",
which is put as 1.15 times as fast at a quarter of blocks skipped.
"""

import copy
from functools import partial

import torch
from transformers import DynamicCache

from formulary import lab
from formulary.contracts import Data, parts
from formulary.contracts.edits import editing
from formulary.evidence import Check, Outcome, all_of, at_least, at_most, exact, speedup

from .method import FiRST
from .routing import RoutedBlock

LAYERS, LENGTH, PROMPT, TEXTS, BATCH, DECODED = 8, 128, 32, 40, 8, 24
METHOD = FiRST(skip=0.25, prompt=PROMPT, router_steps=60, router_rate=0.2, tune_steps=30, length=LENGTH)
LOST, SKIPPED, APART = "loss added, nats/character", "blocks skipped", "tokens that differ"


def hard(n: int, draw: torch.Generator, split: str) -> torch.Tensor:
    return lab.tasks.CharText(LENGTH, split=split).batch(n, draw)["input_ids"]


def easy(n: int, draw: torch.Generator, split: str) -> torch.Tensor:
    """The same texts in both splits: there are but 26."""
    letters = lab.tasks.encode("abcdefghijklmnopqrstuvwxyz")
    return letters[(torch.randint(26, (n, 1), generator=draw) + torch.arange(LENGTH)) % 26]


def mixed(n: int, draw: torch.Generator, split: str) -> torch.Tensor:
    return torch.cat([easy(n // 2, draw, split), hard(n - n // 2, draw, split)])


def base():
    def build():
        model = copy.deepcopy(lab.trained_char_gpt(layers=LAYERS, width=96, heads=4, steps=500))
        rows = lambda step: mixed(16, torch.Generator().manual_seed(step), "train")
        lab.train(model, lambda step: {"input_ids": (ids := rows(step)), "labels": ids}, steps=200, lr=1e-3)
        return model.eval()

    return lab.cached("char-alphabet", build, key={"layers": LAYERS, "steps": 200})


def fixed(model, data: Data, skipped: tuple[int, ...]):
    """The model without these blocks after the first tokens, tuned."""
    linears = parts.linears(model)
    with editing(model, "first-router") as edit:
        for block in parts.blocks(model)[1:-1]:
            changed = edit.edit(block.name, RoutedBlock, index=block.index, prompt=PROMPT, leads=block.index == 1)
            changed.router.bias.data.fill_(-10.0 if block.index in skipped else 10.0)
        METHOD._tune(model, linears, data)
    return model


def prepare(seed: int) -> dict:
    """Training text, test text (easy, then hard), and the whole and the routed model, both tuned."""
    draw = torch.Generator().manual_seed(seed)
    train = mixed(METHOD.router_steps * BATCH, draw, "train")
    data = Data([{"input_ids": row} for row in train], batch_size=BATCH, seed=seed)
    test = torch.cat([easy(TEXTS, draw, "test"), hard(TEXTS, draw, "test")])
    whole = fixed(copy.deepcopy(base()), data, ())
    routed, _ = METHOD.apply(copy.deepcopy(base()), data)
    return {"data": data, "test": test, "others": hard(TEXTS, draw, "test"), "whole": whole, "routed": routed, "seed": seed}


def losses(model, rows: torch.Tensor) -> torch.Tensor:
    labels = rows.clone()
    labels[:, :PROMPT] = -100
    return lab.metrics.sequence_loss(model, [{"input_ids": rows, "labels": labels}]).per_token


def lost(model, context: dict) -> dict:
    return {LOST: (losses(model, context["test"]) - losses(context["whole"], context["test"])).tolist()}


def routed(context: dict) -> Outcome:
    budget = {"parameters": parts.count_weights(context["routed"])}
    return Outcome(lost(context["routed"], context), budget=budget, work=decoding(context["routed"], context))


def without(choose, context: dict) -> Outcome:
    model = fixed(copy.deepcopy(base()), context["data"], choose(context["seed"]))
    return Outcome(lost(model, context), budget={"parameters": parts.count_weights(model)})


def two_at_random(seed: int) -> tuple[int, ...]:
    return tuple((1 + torch.randperm(LAYERS - 2, generator=torch.Generator().manual_seed(seed))[:2]).tolist())


@torch.no_grad()
def decoding(model, context: dict):
    """Decoding of one hard text from a copy of its cache, so that only new tokens are timed."""
    ids, cache = context["test"][-1:, : PROMPT + 16], DynamicCache(config=model.config)
    model(input_ids=ids, cache=cache, use_cache=True)

    @torch.no_grad()
    def work():
        mine, token = copy.deepcopy(cache), ids[:, -1:]
        for _ in range(DECODED):
            token = model(input_ids=token, cache=mine, use_cache=True).logits[:, -1:].argmax(-1)

    return work


@torch.no_grad()
def skips(choose, context: dict) -> dict:
    """How many blocks each text leaves out, read from what its cache has no keys of."""
    found = []
    for row in choose(context):
        cache = DynamicCache(config=context["routed"].config)
        context["routed"](input_ids=row[None], cache=cache, use_cache=True)
        found.append(sum(layer.get_seq_length() < LENGTH for layer in cache.layers))
    return {SKIPPED: found}


@torch.no_grad()
def cached(context: dict) -> dict:
    """Greedy decoding of whole, easy and hard texts with a cache and without."""
    options = {"max_new_tokens": DECODED, "do_sample": False, "pad_token_id": 0}
    found = []
    for row in context["test"][:: TEXTS // 4, : PROMPT + 16]:
        one, other = (context["routed"].generate(row[None], use_cache=use, **options) for use in (True, False))
        found.append(float((one != other).sum()))
    return {APART: found}


check = Check(
    claim="On the alphabet and running text, FiRST at a quarter of blocks skipped loses at most half of what a "
    "model without its two middle blocks does, skips more blocks on the alphabet, decodes at least 1.15 times as fast as "
    "the whole model, and the same tokens with a cache as without.",
    setup=prepare,
    arms={
        "first": routed,
        "fixed": partial(without, lambda seed: (3, 4)),
        "random": partial(without, two_at_random),
        "late": partial(without, lambda seed: (5, 6)),
        "whole": lambda context: Outcome({}, work=decoding(base(), context)),
        "easy": partial(skips, lambda context: context["test"][:TEXTS]),
        "hard": partial(skips, lambda context: context["test"][TEXTS:]),
        "more hard": partial(skips, lambda context: context["others"]),
        "cached and not": cached,
    },
    holds=all_of(
        at_most("first", "fixed", ratio=0.5, metric=LOST, null="random"),
        at_least("easy", "hard", metric=SKIPPED, null="more hard"),
        speedup("first", "whole", at_least=1.15),
        exact("cached and not", tol=0, metric=APART),
    ),
    items="fresh",
    redraws="training and test text, and which blocks go at random",
    seeds=5,
    version=1,
    scope="one Llama of eight blocks of width 96 on characters of one book",
)
