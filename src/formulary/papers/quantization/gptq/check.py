"""At 3 bits, does error compensation lose much less of a real language model's quality than rounding on the same grid?
"""

from copy import deepcopy
from functools import cache

import torch

from formulary import lab
from formulary.contracts import Data, parts
from formulary.evidence import Check, at_most
from formulary.lab.metrics import sequence_loss

from .._parts import Grid, round_to_nearest
from .method import GPTQ

BLOCKS = "model.layers.[0-5].*"
GRID = Grid(bits=3)
CALIBRATION, HELD_OUT = (8, 512), (12, 256)


@cache
def smollm2():
    return lab.smollm2()


def windows(verses: list[str], shape: tuple[int, int], seed: int) -> torch.Tensor:
    """(sequences, tokens) ids, each sequence starting at a random verse."""
    count, length = shape
    starts = torch.randint(len(verses) - length, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    tokenizer = smollm2()[1]
    return torch.stack([torch.tensor(tokenizer(" ".join(verses[s : s + 60]))["input_ids"][:length]) for s in starts])


def nats(model) -> torch.Tensor:
    """Loss of each held-out sequence, nats/token."""
    ids = windows(lab.kjv(split="test"), HELD_OUT, seed=12345)
    return sequence_loss(model, [{"input_ids": chunk} for chunk in ids.split(4)]).per_token


@cache
def unquantized_nats() -> torch.Tensor:
    return nats(smollm2()[0])


@cache
def rounded_excess() -> list[float]:
    model = deepcopy(smollm2()[0])
    with torch.no_grad():
        for part in parts.linears(model, targets=[BLOCKS]):
            part.raw.copy_(part.stored(round_to_nearest(part.weight(), GRID).dense(GRID)))
    return (nats(model) - unquantized_nats()).tolist()


def prepare(seed: int) -> Data:
    ids = windows(lab.kjv(split="train"), CALIBRATION, seed)
    return Data([{"input_ids": row} for row in ids], batch_size=4, seed=seed)


def gptq(calibration: Data) -> list[float]:
    model, _ = GPTQ(bits=GRID.bits, targets=(BLOCKS,)).apply(deepcopy(smollm2()[0]), calibration)
    return (nats(model) - unquantized_nats()).tolist()


check = Check(
    claim="At 3 bits per weight, one scale per row, error compensation raises the loss by at most 0.7 of what rounding"
    " to nearest does.",
    setup=prepare,
    arms={
        "gptq": gptq,
        "rtn": lambda calibration: rounded_excess(),
        "unquantized": lambda calibration: [0.0] * HELD_OUT[0],
    },
    metric="excess loss, nats/token",
    holds=at_most("gptq", "rtn", ratio=0.7),
    items="same",
    redraws="calibration text",
    seeds=6,
    version=1,
    oracle="unquantized",
    scope="SmolLM2-135M with 6 of its 30 blocks quantized, on the King James Bible",
)
