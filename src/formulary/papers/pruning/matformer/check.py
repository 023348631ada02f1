"""Small language models: nested feed-forwards against separate models of the same sizes, with as many steps in all.

Rate and steps were chosen on seed 1,000 with separate models alone: after 150 steps the width hardly mattered.
"""

import hashlib
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from formulary import lab
from formulary.contracts import Data, parts
from formulary.evidence import Check, Outcome, all_of, at_least, at_most, speedup

from .._parts import sublayers
from .method import MatFormer, nested

LAYERS, WIDTH, HIDDEN, LENGTH, BATCH, STEPS, RATE = 2, 64, 256, 96, 8, 300, 5e-3
SHARES = (0.125, 0.25, 0.5, 1.0)
MIXED = ((0.125, 0.25), (0.125, 0.5), (0.25, 0.5), (0.25, 1.0), (0.5, 1.0))
LOSS, AGREEMENT = "loss, nats/character", "same next character as the whole model"
FILES = sorted(Path(__file__).parent.glob("[_m]*.py"))
SOURCE = hashlib.sha256(b"".join(file.read_bytes() for file in FILES)).hexdigest()


def fresh(hidden: int, width: int = WIDTH, heads: int = 4) -> nn.Module:
    sizes = {"hidden_size": width, "intermediate_size": hidden, "num_attention_heads": heads}
    tokens = {"vocab_size": len(lab.tasks.characters()), "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}
    rest = {"num_hidden_layers": LAYERS, "max_position_embeddings": LENGTH, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens, **rest))


def trained(shares: tuple[float, ...], share: float, seed: int) -> nn.Module:
    """A model of `share` of the neurons, trained with `shares` nested in it, `STEPS` steps for each of them."""

    def build():
        torch.manual_seed(seed)
        method = MatFormer(granularities=shares, keep=(1.0,), steps=STEPS * len(shares), learning_rate=RATE)
        items = [{"input_ids": row, "labels": row} for row in windows("train", method.steps * BATCH, seed)]
        return method.apply(fresh(round(share * HIDDEN)), Data(items, BATCH, seed))[0]

    sizes = [LAYERS, WIDTH, HIDDEN, LENGTH, BATCH, STEPS, RATE]
    key = {"shares": shares, "share": share, "seed": seed, "sizes": sizes, "source": SOURCE}
    return lab.cached("matformer-char", build, key=key)


def windows(split: str = "test", count: int = 64, seed: int = 0) -> torch.Tensor:
    return lab.tasks.CharText(LENGTH, split=split).batch(count, torch.Generator().manual_seed(seed))["input_ids"]


def logits(model: nn.Module, shares: tuple[float, ...] = (1.0,) * LAYERS) -> torch.Tensor:
    """Next-character logits of the test windows from the first neurons of each layer."""
    found = [sublayer for sublayer in sublayers(model)[0] if sublayer.role == "feed-forward"]
    with nested(found) as narrow, torch.no_grad():
        narrow(shares)
        return model.eval()(windows()).logits


def losses(*found: torch.Tensor) -> dict[str, list[float]]:
    """Each window's loss from logits of several models, and its mean over them."""
    return {LOSS: torch.stack([lab.metrics.token_nats(out, windows()).per_token for out in found]).mean(0).tolist()}


def widths(name: str, seed: int) -> dict[str, list[float]]:
    """The mean loss over four widths (cut: at 1/4), and how often the smaller models choose as the whole one."""
    model = trained(SHARES if name == "nested" else (1.0,), 1.0, seed)
    found = [logits(model, (share,) * LAYERS) for share in SHARES]
    if name == "separate":
        found = [logits(trained((1.0,), share, seed)) for share in SHARES]
    *small, whole = (out.argmax(-1) for out in found)
    agreement = sum((chosen == whole).double().mean(1) for chosen in small) / len(small)
    return losses(*(found[1:2] if name == "cut to 1/4" else found)) | {AGREEMENT: agreement.tolist()}


def mixed(seed: int) -> dict[str, list[float]]:
    return losses(*(logits(trained(SHARES, 1.0, seed), shares) for shares in MIXED))


def line(seed: int) -> dict[str, list[float]]:
    """The loss at as many neurons as each mixed model has, on the line through the nested models."""
    model, found = trained(SHARES, 1.0, seed), []
    loss = {share: torch.tensor(losses(logits(model, (share,) * LAYERS))[LOSS]) for share in SHARES}
    for size in (sum(shares) / LAYERS for shares in MIXED):  # none of them a trained share
        low, high = max(share for share in SHARES if share < size), min(share for share in SHARES if share > size)
        found.append(torch.lerp(loss[low], loss[high], (size - low) / (high - low)))
    return {LOSS: torch.stack(found).mean(0).tolist()}


def running(keep: tuple[float, ...]) -> Outcome:
    """64 tokens through a model of width 512 and 4,096 neurons cut to `keep`."""
    ids = windows()[:1, :64]
    model = MatFormer(keep=keep, steps=1).apply(fresh(4096, 512, 8), Data([{"input_ids": ids[0]}]))[0].eval()
    run = torch.no_grad()(lambda: model(ids, use_cache=False))
    return Outcome(work=run, budget={"parameters": parts.count_weights(model)})


check = Check(
    claim="Nested feed-forwards of four widths lose at most 3 % more than separate models of as many steps in all; a "
    "quarter cut out of a whole model loses at least 20 % more than a separate one of that width; mixed models lie at "
    "most 1 % above the line through nested ones, which agree with each other more; the smallest mix is twice as fast.",
    setup=lambda seed: seed,
    arms={
        **{name: partial(widths, name) for name in ("nested", "separate", "cut to 1/4")},
        "separate 1/4": lambda seed: losses(logits(trained((1.0,), 0.25, seed))),
        "mixed": mixed, "line": line,
        "run 1/8 and 1/4": lambda seed: running((0.125, 0.25)), "run whole": lambda seed: running((1.0,)),
    },
    holds=all_of(
        at_most("nested", "separate", ratio=1.03, metric=LOSS),
        at_least("cut to 1/4", "separate 1/4", ratio=1.2, metric=LOSS, null="separate"),
        at_most("mixed", "line", ratio=1.01, metric=LOSS),
        at_least("nested", "separate", metric=AGREEMENT, null="cut to 1/4"),
        speedup("run 1/8 and 1/4", "run whole", at_least=2),
    ),
    items="same", redraws="initialization, training text and the widths drawn", seeds=5, version=1,
    scope=f"Llamas of {LAYERS} layers and width {WIDTH}, trained on the King James Bible, {STEPS} steps for each width",
)  # fmt: skip
