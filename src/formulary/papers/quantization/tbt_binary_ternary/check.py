"""A small BART learned to turn sequences of digits around; how much of that survives 2 and 1 bits for weights and
activations?

The plain way has TWN's ternary weights (levels beyond 0.7 mean |w|, scale the mean beyond it), activations on 2 bits
between their smallest and largest number, and the labels instead of the teacher. Same start, same steps, same
batches, learning rates chosen from the same grid by `tune()` on other data.
"""

from copy import deepcopy
from functools import partial

import torch

from formulary import lab
from formulary.contracts import Data
from formulary.evidence import Check, Outcome, all_of, at_least, at_most

from .method import TBT
from .plain import Plain

LENGTH, TOKENS, STEPS, BATCH, ITEMS = 8, 16, 200, 16, 128
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
CHOSEN = {"tbt W2A2": 8e-3, "tbt W1A1": 8e-3, "plain W2A2": 4e-3}


def sequences(count: int, seed: int) -> Data:
    """Random sequences of tokens 3 and above; the labels are the same, last one first."""
    ids = torch.randint(3, 3 + TOKENS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    items = [{"input_ids": row, "labels": row.flip(0)} for row in ids]
    return Data(items, batch_size=BATCH, seed=seed, name="sequences")


def teacher():
    """The float model, trained once and kept."""

    def build():
        from transformers import BartConfig, BartForConditionalGeneration

        config = BartConfig(
            vocab_size=3 + TOKENS, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=32,
            dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, init_std=0.1,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = BartForConditionalGeneration(config)
        log = lab.train(model, sequences(20_000, 7), steps=1500, lr=2e-3)
        return model, {"loss": log.final}

    return lab.cached("bart-reverse", build, key={"length": LENGTH, "tokens": TOKENS, "batch": BATCH})


METHODS = {
    "tbt W2A2": partial(TBT, bits=2, activation_bits=2),
    "tbt W1A1": partial(TBT, bits=1, activation_bits=1),
    "plain W2A2": partial(Plain, bits=2, activation_bits=2),
}


def prepare(seed: int) -> dict:
    held_out = sequences(ITEMS, 100_003)
    batch = held_out.collate(held_out.items)
    model = teacher()
    return {"model": model, "data": sequences(STEPS * BATCH, seed), "batch": batch, "full": right(model, batch)}


@torch.no_grad()
def right(model, batch: dict) -> torch.Tensor:
    """Of each sequence, the part of its tokens that is right, each after the right ones before it."""
    return lab.metrics.sequence_accuracy(model.eval()(**batch).logits, batch["labels"], shift=False)


def trained(name: str, lr: float, context: dict):
    method = METHODS[name](steps=STEPS, learning_rate=lr)
    return method.apply(deepcopy(context["model"]), context["data"])[0]


def arm(name: str, context: dict) -> Outcome:
    """Accuracy over chance, as a part of the teacher's."""
    got, chance = right(trained(name, CHOSEN[name], context), context["batch"]), 1 / TOKENS
    budget = {"training steps": STEPS, "tuning trials": len(RATES)}
    return Outcome(((got - chance) / (context["full"].mean() - chance)).tolist(), budget=budget)


def tune(seeds=(1000, 1001)) -> dict[str, dict[float, float]]:
    """For each arm, the mean accuracy of each learning rate on sequences that the check does not see."""
    table, fresh = {}, sequences(256, 200_003)
    for name in METHODS:
        for lr in RATES:
            scores = [right(trained(name, lr, prepare(seed)), fresh.collate(fresh.items)).mean() for seed in seeds]
            table.setdefault(name, {})[lr] = float(sum(scores) / len(scores))
    return table


check = Check(
    claim="After 200 steps a small BART keeps at least 80 % of its accuracy over chance at 2-bit weights and"
    " activations by TBT, and at most 50 % by TWN weights, min-max activations and labels; by TBT at 1 bit for both it"
    " keeps at least 10 %.",
    setup=prepare,
    arms={name: partial(arm, name) for name in METHODS},
    metric="kept accuracy",
    holds=all_of(
        at_least("tbt W2A2", 0.8, effect=0.05),
        at_most("plain W2A2", 0.5, effect=0.1),
        at_least("tbt W1A1", 0.1, effect=0.1),
    ),
    items="same",
    redraws="the training sequences and their order",
    seeds=8,
    version=1,
    scope="one BART of width 64 with 1 + 1 layers that reverses 8 of 16 tokens",
)
