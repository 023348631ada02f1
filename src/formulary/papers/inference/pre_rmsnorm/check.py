"""Is the rewritten ViT the same function, and is it faster?

The real DINOv2-shaped ViT-S/14 on crops of photographs: the largest difference of its outputs, relative to their size, and the CPU
time of its forward pass, and of one norm alone, against the unchanged model on one thread. The paper reports 1 to 10 % for the
whole. Version 1 asked for 1 %, which timing here cannot tell from a tie (3 %); version 2 asks for the middle of that range.
"""

import copy
from functools import cache

import torch
from torch import nn

from formulary import lab
from formulary.evidence import Check, Outcome, all_of, exact, speedup

from .method import PreRMSNorm, RMSNorm

DIFFERENCE = "largest output difference, relative"


@cache
def models():
    before = lab.vit()[0]
    after, _ = PreRMSNorm().apply(copy.deepcopy(before))
    return before, after.eval()


def setup(seed: int):
    return lab.photo_crops(4, size=224, seed=seed)


def output(model, pixels):
    with torch.inference_mode():
        return model(pixel_values=pixels).last_hidden_state


def rewritten(pixels):
    before, after = models()
    wanted, ours = output(before, pixels), output(after, pixels)
    difference = (ours - wanted).abs().amax((1, 2)) / wanted.abs().amax((1, 2))
    return Outcome({DIFFERENCE: difference.tolist()}, work=lambda: output(after, pixels))


def unchanged(pixels):
    return Outcome({DIFFERENCE: [0.0] * len(pixels)}, work=lambda: output(models()[0], pixels))


def norm(module: nn.Module):
    def arm(pixels):
        x = torch.randn(4 * 257, 384)

        def work():
            with torch.inference_mode():
                module(x)

        return Outcome({}, work=work)

    return arm


check = Check(
    claim="The rewritten model gives the same outputs (relative difference below 1e-4 in float32), a norm takes at least 15 % less CPU "
    "time, and the whole forward pass at least 5 % less.",
    setup=setup,
    arms={
        "pre-rmsnorm": rewritten,
        "unchanged": unchanged,
        "RMSNorm": norm(RMSNorm(384)),
        "LayerNorm": norm(nn.LayerNorm(384, eps=1e-6)),
    },
    holds=all_of(
        exact("pre-rmsnorm", tol=1e-4, metric=DIFFERENCE),
        speedup("RMSNorm", "LayerNorm", at_least=1 / 0.85),
        speedup("pre-rmsnorm", "unchanged", at_least=1 / 0.95),
    ),
    items="fresh",
    redraws="crops of photographs",
    seeds=5,
    version=2,
    scope="ViT-S/14 at 224 pixels in float32 on this CPU",
)
