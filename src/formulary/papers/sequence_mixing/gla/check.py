"""Character-level language models that differ only in how the state of linear attention fades, and one with softmax attention.

Prediction, from the paper's ablation (section 5.2: with a learned gate 14.77 perplexity, with RetNet's fixed decay 16.55, without
decay 23.21) and its main claim (equal to a Transformer): gated is better than both, by at least 0.02 nats than no decay, and
within 0.05 nats of softmax. All have the same parameters (a wider feed-forward where there is no gate), steps and tuning.
"""

import hashlib
import math
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from formulary import lab
from formulary.contracts import Report
from formulary.contracts.edits import editing, register
from formulary.contracts.parts import count_weights
from formulary.evidence import Check, Outcome, all_of, at_most, no_worse
from formulary.papers.sequence_mixing.gla.method import GatedLinearAttention

WIDTH, HEADS, LENGTH, STEPS, RATES, TUNING_SEED = 64, 4, 128, 200, (2e-3, 5e-3, 1e-2), 77
SOURCES = [Path(__file__).with_name("method.py"), Path(__file__).parent.with_name("_parts.py")]


class FixedDecay(GatedLinearAttention):
    """RetNet's decay, 1 - 2^(-5-h) for head h, whatever the input."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        del self.decay_down, self.decay_up

    def _inputs(self, x):
        decay = torch.tensor([self.rate(h) for h in range(self.heads)]).expand(*x.shape[:-1], -1)
        scale = (self.k_proj.out_features // self.heads) ** -0.5
        return self.q_proj(x), self.k_proj(x) * scale, self.v_proj(x), decay

    def rate(self, head):
        return math.log(1 - 2.0 ** (-5 - head))


class NoDecay(FixedDecay):
    """Linear attention."""

    def rate(self, head):
        return 0.0


MIXERS = {"gated": GatedLinearAttention, "fixed decay": FixedDecay, "no decay": NoDecay, "softmax": None}
for cls in (FixedDecay, NoDecay):
    register(f"gla-check:{cls.__name__}", cls)


def make(arm):
    """An untrained Llama of two layers with the arm's mixer."""
    mixer = MIXERS[arm]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(lab.tasks.characters()), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS,
            intermediate_size=168 if arm == "gated" else 176, max_position_embeddings=LENGTH, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip
    if mixer is not None:
        with editing(model, "gla") as edit:
            mixer.swap(model, edit, Report("gla", {}, count_weights(model)), heads=HEADS)
    return model


def trained(arm, seed, lr):
    def build():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = make(arm)
        lab.train(model, lab.tasks.stream(lab.tasks.CharText(LENGTH), 8, seed=seed), steps=STEPS, lr=lr, seed=seed)
        return model

    digest = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()
    key = {"arm": arm, "seed": seed, "lr": lr, "steps": STEPS, "width": WIDTH, "length": LENGTH, "sources": digest}
    return lab.cached("gla-char", build, key=key, make=lambda: make(arm))


def losses(model, split, seed):
    """Nats per character of 48 windows."""
    windows = lab.tasks.CharText(LENGTH, split=split).batch(48, torch.Generator().manual_seed(seed))
    return lab.metrics.sequence_loss(model, [windows]).per_token.tolist()


def tuned(arm):
    """The rate with the least loss on windows of the training books, for a seed that is not measured."""
    return min(RATES, key=lambda lr: sum(losses(trained(arm, TUNING_SEED, lr), "train", TUNING_SEED)))


def arm(name):
    def run(seed):
        model = trained(name, seed, tuned(name))
        budget = {"parameters": count_weights(model), "tokens": STEPS * 8 * LENGTH, "tuning trials": len(RATES)}
        return Outcome(losses(model, "test", 0), budget=budget)

    return run


check = Check(
    claim="With equal parameters and steps, linear attention with a learned gate models text better than with RetNet's fixed decay, "
    "at least 0.02 nats better than with none, and at most 0.05 nats worse than softmax attention.",
    setup=lambda seed: seed,
    arms={name: arm(name) for name in MIXERS},
    metric="loss, nats/character",
    holds=all_of(at_most("gated", "fixed decay"), at_most("gated", "no decay", minus=0.02), no_worse("gated", "softmax", margin=0.05)),
    items="same",
    redraws="initialization and training batches",
    seeds=5,
    version=1,
    scope=f"a model of two layers of width {WIDTH}, trained for {STEPS} steps on the King James Bible",
)
