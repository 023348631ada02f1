"""At 4 bits for weights and activations, how much of a classifier's accuracy does the whole recipe keep where norm
outputs differ 30-fold between channels, and what does each of its steps add?

The spread is emulated in a trained digit ViT: every channel of a norm's output is multiplied and the weights that read
it divided by the same number, so that the function is unchanged. All arms share the code, the 4-bit grids, ranges of
least squared error and the calibration images; they differ in the named steps alone.
"""

from copy import deepcopy

import torch

from formulary import lab
from formulary.contracts import Data, parts
from formulary.evidence import Check, all_of, at_most, exact, no_worse
from formulary.lab.metrics import accuracy
from formulary.lab.trained import digit_pixels

from .._parts import on_grid
from .calibration import clipped_channels
from .method import RepQuant
from .norms import norms_before_linears

SPREAD, IMAGES = 30.0, 64
DROP, DIVERGENCE, GAP = "accuracy drop, points", "divergence from fp32, nats", "relative change by the rewriting"


@torch.no_grad()
def with_spread(model, seed: int, batch: dict):
    """A copy whose norm outputs differ up to `SPREAD`-fold in size between channels, and whose outputs are the same."""
    model, generator = deepcopy(model), torch.Generator().manual_seed(seed)
    linears = {part.name: part for part in parts.linears(model)}
    for name, readers in norms_before_linears(model, batch).items():
        norm = model.get_submodule(name)
        factor = SPREAD ** (torch.rand(len(norm.weight), generator=generator) - 0.5)
        norm.weight.mul_(factor)
        norm.bias.mul_(factor)
        for reader in readers:
            linears[reader].raw.div_(factor)
    return model


@torch.no_grad()
def prepare(seed: int) -> dict:
    images, _ = lab.digits("train")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:IMAGES]
    calibration = Data([{"pixel_values": p} for p in digit_pixels(torch.from_numpy(images[chosen]))], 16, seed)
    model = with_spread(lab.trained_digit_vit(), seed, next(calibration.take([0]).batches()))
    images, labels = (torch.from_numpy(part) for part in lab.digits("test"))
    pixels = digit_pixels(images)
    logits = model(pixel_values=pixels).logits
    return {"model": model, "calibration": calibration, "pixels": pixels, "labels": labels, "logits": logits}


def recipe(**settings):
    """An arm: each test image's loss of accuracy, and the divergence of its class probabilities, at W4A4."""

    @torch.no_grad()
    def arm(context: dict) -> dict[str, list[float]]:
        model, _ = RepQuant(**settings).apply(deepcopy(context["model"]), context["calibration"])
        logits, before = model(pixel_values=context["pixels"]).logits, context["logits"]
        drop = 100 * (accuracy(before, context["labels"]) - accuracy(logits, context["labels"]))
        wanted = before.log_softmax(-1)
        divergence = (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1)
        return {DROP: drop.tolist(), DIVERGENCE: divergence.tolist()}

    return arm


@torch.no_grad()
def rewriting(context: dict) -> dict[str, list[float]]:
    """For every norm: how far one scale for the layer, after rewriting, is from one per channel before, in float64."""
    model, found = context["model"], []
    linears = {part.name: part for part in parts.linears(model)}
    batch = context["calibration"].collate(context["calibration"].items)
    for name, readers in norms_before_linears(model, batch).items():
        weight = torch.cat([linears[reader].weight() for reader in readers]).double()
        x = 3 * torch.randn(500, weight.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        x = x * model.get_submodule(name).weight + model.get_submodule(name).bias
        scales, zeros = clipped_channels(x, weight, 4, 10, False)
        before = on_grid(x, scales, zeros, 4) @ weight.mT
        scale, zero = scales.mean(), zeros.mean().round()
        ratio, shift = scales / scale, scale * (zero - zeros)
        new = weight * ratio
        after = on_grid(x / ratio - shift, scale, zero, 4) @ new.mT + new @ shift
        found.append(float((after - before).norm() / before.norm()))
    return {GAP: found}


OFF = {"reparameterize": False, "log_softmax": False, "clip_steps": 0, "reconstruct": False}
check = Check(
    claim="With norm outputs that differ 30-fold between channels, W4A4 by RepQuant loses at most a third of the"
    " accuracy that one range per layer loses; rewriting changes nothing; rewriting, the logarithmic softmax and weight"
    " reconstruction each lower the divergence from fp32, and dual clipping does not raise it by more than 0.02 nats.",
    setup=prepare,
    arms={
        "repquant": recipe(),
        "one range per layer": recipe(**OFF),
        "+ rewriting": recipe(**OFF | {"reparameterize": True}),
        "+ log softmax": recipe(**OFF | {"reparameterize": True, "log_softmax": True}),
        "+ dual clipping": recipe(reconstruct=False),
        "rewriting alone": rewriting,
        "fp32": lambda context: {name: [0.0] * len(context["pixels"]) for name in (DROP, DIVERGENCE)},
    },
    holds=all_of(
        at_most("repquant", "one range per layer", ratio=1 / 3, metric=DROP, oracle="fp32"),
        exact("rewriting alone", tol=1e-6, metric=GAP),
        at_most("+ rewriting", "one range per layer", metric=DIVERGENCE, oracle="fp32"),
        at_most("+ log softmax", "+ rewriting", metric=DIVERGENCE, oracle="fp32"),
        no_worse("+ dual clipping", "+ log softmax", margin=0.02, metric=DIVERGENCE),
        at_most("repquant", "+ dual clipping", metric=DIVERGENCE, oracle="fp32"),
    ),
    items="same",
    redraws="which channels are large, and the calibration images",
    seeds=8,
    version=1,
    scope="channel spread emulated in a digit ViT of 0.14 M parameters",
)
