"""Does keeping outliers in floating point keep int8 harmless where a few hidden dimensions are up to 60 times as
large as the rest?

Outliers are emulated in a trained character model: two dimensions of every norm's output are multiplied and the weights
that read them divided, so that the function is unchanged.
"""

from copy import deepcopy

import torch

from formulary import lab
from formulary.contracts import parts
from formulary.evidence import Check, all_of, at_least, at_most
from formulary.lab.metrics import sequence_loss
from formulary.lab.tasks import CharText

from .method import LLMInt8

SCALES = (20, 60)
WINDOWS, DIMENSIONS = 48, 2


def metric(scale: int) -> str:
    return f"loss increase at {scale}x, %"


@torch.no_grad()
def with_outliers(model, scale: float, seed: int):
    """A copy of a Llama whose norms have `DIMENSIONS` outputs `scale` times as large, and whose outputs are the same.
    """
    model, generator = deepcopy(model), torch.Generator().manual_seed(seed)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            chosen = torch.randperm(len(norm.weight), generator=generator)[:DIMENSIONS]
            norm.weight[chosen] *= scale
            for reader in readers:
                reader.weight[:, chosen] /= scale
    return model


@torch.no_grad()
def absmax_per_tensor(model):
    """Int8 with one scale for each whole weight and each whole input, emulated in float."""

    def rounded(x):
        step = x.abs().max() / 127
        return (x / step).round() * step

    for part in parts.linears(model):
        part.raw.copy_(rounded(part.raw))
        part.module.register_forward_pre_hook(lambda module, args: (rounded(args[0]), *args[1:]))
    return model


def prepare(seed: int) -> dict:
    model = lab.trained_char_gpt()
    text = CharText(128, split="test").batch(WINDOWS, torch.Generator().manual_seed(12345))
    models = {scale: with_outliers(model, scale, seed) for scale in SCALES}
    return {"models": models, "text": text, "nats": {scale: nats(made, text) for scale, made in models.items()}}


def nats(model, text) -> torch.Tensor:
    return sequence_loss(model, [text]).per_token.double()


def increase(quantize):
    """An arm: how much the loss of each window grows, in per cent of the mean loss, once `quantize` has had the model.
    """

    def arm(context: dict) -> dict[str, list[float]]:
        found = {}
        for scale, model in context["models"].items():
            before = context["nats"][scale]
            after = nats(quantize(deepcopy(model)), context["text"])
            found[metric(scale)] = (100 * (after - before) / before.mean()).tolist()
        return found

    return arm


check = Check(
    claim="With two dimensions of every layer 20 or 60 times as large, LLM.int8() raises the loss by at most 0.5 %; at"
    " 60 times, one scale per tensor raises it by at least 10 % and vector-wise scales alone by more than 0.5 %.",
    setup=prepare,
    arms={
        "llm-int8": increase(lambda model: LLMInt8().apply(model)[0]),
        "vector-wise": increase(lambda model: LLMInt8(threshold=1e30).apply(model)[0]),
        "absmax per tensor": increase(absmax_per_tensor),
        "unquantized": increase(lambda model: model),
    },
    holds=all_of(
        at_most("llm-int8", 0.5, metric=metric(20), effect=0.25),
        at_most("llm-int8", 0.5, metric=metric(60), effect=0.25),
        at_least("absmax per tensor", 10.0, metric=metric(60), effect=5.0),
        at_least("vector-wise", 0.5, metric=metric(60), effect=0.25),
    ),
    items="same",
    redraws="which dimensions are large",
    seeds=8,
    version=2,
    scope="outliers emulated in a character model of 0.8 M parameters",
)
