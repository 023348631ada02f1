"""A network with 1-bit weights and activations learns digits: a square wave with the sine's gradient against the sign
with a straight-through gradient, and what the frequency does to accuracy and to the error of the sign for the sine.

STE passes gradients within 1, for weights and inputs; Bi-Real has BiPer's inputs and STE's weights. All have learned
scales a row, the same start, batches and number of steps (two thirds of BiPer's without the sign); learning rates are
chosen by the family's `tune(CHOSEN, RATES, trained)` on other images and seeds.
"""

from functools import partial

import torch

from formulary.evidence import Check, Outcome, all_of, at_least, at_most, within

from .._binary_net import BinaryNet, fit, right
from .._training import signs
from .method import BiPer, BiPerLinear, quantization_error

STEPS, SECOND, RATES = 300, 100, (1e-3, 3e-3, 1e-2)
CHOSEN = {"biper 20": 3e-3, "biper 10": 1e-2, "biper 30": 3e-3, "ste": 1e-2, "bi-real": 3e-3}
ACCURACY, ERROR = "accuracy", "quantization error"


def clipped_sign(x):
    """sign(x) with a gradient of 1 within 1."""
    inside = x.clamp(-1, 1)
    return signs(x.detach()) + (inside - inside.detach())


class BiRealLinear(BiPerLinear):
    """Bi-Real's inputs, and weights by the sign."""

    def low_bit(self, latent):
        return clipped_sign(latent), self.alpha


class STELinear(BiRealLinear):
    """Inputs and weights by the sign."""

    def sign(self, x):
        return clipped_sign(x)


LAYERS = {"ste": STELinear, "bi-real": BiRealLinear}


def trained(name: str, lr: float, seed: int, split: str = "train") -> BinaryNet:
    frequency = float(name.removeprefix("biper ")) if name.startswith("biper") else 20.0

    def begin(layer: BiPerLinear, weight) -> None:
        layer.frequency = frequency
        layer.fit(weight)
        if name in LAYERS:
            layer.alpha.data.copy_(weight.detach().abs().mean(1, keepdim=True))

    torch.manual_seed(seed)
    cls = LAYERS.get(name, BiPerLinear)
    net = BinaryNet(lambda width: cls(width, width), begin)
    if name in LAYERS:
        fit(net, STEPS, lr, seed=seed, split=split)
        return net
    method = BiPer(frequency=frequency)
    penalty = lambda: method.penalty * sum((frequency * layer.latent).sin().square().mean() for layer in net.binary)
    fit(net, STEPS - SECOND, lr, seed=seed, split=split, penalty=penalty)
    for layer in net.binary:
        layer.harden()
    fit(net, SECOND, method.second_rate * lr, seed=seed + 500_000, split=split, penalty=penalty)
    return net


def arm(name: str, seed: int) -> Outcome:
    net = trained(name, CHOSEN[name], seed)
    values = {ACCURACY: right(net).tolist()}
    if name.startswith("biper"):
        values[ERROR] = [quantization_error(layer.latent, layer.frequency) for layer in net.binary]
    return Outcome(values, budget={"training steps": STEPS, "tuning trials": len(RATES)})


check = Check(
    claim="BiPer at omega = 20 is at least 0.5 points more accurate than STE after as many steps; at omega = 10 the sign"
    " stands for the sine with at most 0.9 of the error at 20; accuracy at 10 and at 30 is within 2 points of that"
    " at 20.",
    setup=lambda seed: seed,
    arms={name: partial(arm, name) for name in CHOSEN},
    holds=all_of(
        at_least("biper 20", "ste", plus=0.005, effect=0.0075, metric=ACCURACY),
        at_most("biper 10", "biper 20", ratio=0.9, metric=ERROR),
        within("biper 10", "biper 20", margin=0.02, metric=ACCURACY),
        within("biper 30", "biper 20", margin=0.02, metric=ACCURACY),
    ),
    items="same",
    redraws="first weights and batches",
    seeds=10,
    version=1,
    scope="a perceptron with two binary layers of 128 on 4,000 MNIST digits, 300 steps",
)
