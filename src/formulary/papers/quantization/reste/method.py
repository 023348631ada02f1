"""ReSTE trains 1-bit weights and activations with the gradient of a power function, which goes from the identity
towards the sign.

With f(x) = sign(x) |x|^(1/o), the sign function is used forward, and backward

    d sign / dx := g(x) = (1/o) |x|^((1-o)/o)  for m < |x| <= t;   m^(1/o) / m  for |x| <= m;   0  for |x| > t

o = 1 is the straight-through estimator. In training o rises, o(e) = 1 + (1 - cos(pi e / 2E)) (o_end - 1): a large o
makes f close to the sign (small estimating error ||sign(x) - f(x)||) and its gradients uneven (large variance of
|gradient|); o_end = 3 is the balance. A weight is sign(w) times mean |w| of its layer.

Source: arXiv:2308.06689, sections 3.2 to 3.4. Ours, for the paper trains convolutional networks with batch norms from
nothing: the student starts from its teacher's weights and learns the teacher's outputs, by AdamW; w is divided by the
root mean square of the layer's first weights before f, since t and m are for numbers of unit size and all weights of
a Transformer would be below m, where f' is flat; inputs become c + d sign(x - c), with the mean c and mean distance d
of calibration inputs, since no norm follows a linear here to center and scale them.

In: any Transformer of transformers, and data. Expert tensors, embeddings and heads stay as they are. Raises
UsageError for parameters out of range.

>>> from formulary.lab import inputs_for, tiny
>>> from formulary.contracts import Data
>>> data = Data([{"input_ids": ids} for ids in inputs_for(tiny("bert"), batch=8)["input_ids"]])
>>> model, report = ReSTE(steps=2).apply(tiny("bert"), data)
>>> report.headline
'reste on 12 linear layers, 70 % of the weights'
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formulary.contracts import Data, Report, parts
from formulary.contracts.transform import check_range

from .._training import BinaryLinear, Inputs, LowBit, QuantizationAwareTraining, distil, signs


def power(x: Float[Tensor, "*any"], exponent: float) -> Float[Tensor, "*any"]:
    """f(x) = sign(x) |x|^(1/exponent).

    >>> power(torch.tensor([-4.0, 0.0, 9.0]), 2.0)
    tensor([-2.,  0.,  3.])
    """
    return x.sign() * x.abs() ** (1 / exponent)


def rectified_sign(
    x: Float[Tensor, "*any"], exponent: float, small: float = 0.1, bound: float = 1.5
) -> Float[Tensor, "*any"]:
    """sign(x), 1 at 0, whose gradient is g.

    >>> x = torch.tensor([-2.0, 0.05, 1.0], requires_grad=True)
    >>> rectified_sign(x, 2.0).sum().backward()
    >>> x.grad
    tensor([0.0000, 3.1623, 0.5000])
    """
    sign = signs(x.detach())
    if not x.requires_grad:
        return sign
    flat = x.clamp(-small, small) * small ** (1 / exponent - 1)
    surrogate = flat + sign * x.abs().clamp(small, bound) ** (1 / exponent)
    return sign + (surrogate - surrogate.detach())


def estimating_error(x: Float[Tensor, "*any"], exponent: float) -> float:
    """Root mean square of sign(x) - f(x)."""
    return float((signs(x) - power(x, exponent)).square().mean().sqrt())


def exponent_at(done: float, end: float) -> float:
    """o when the part `done`, 0 to 1, of the training is done.

    >>> exponent_at(0.0, 3.0), round(exponent_at(1.0, 3.0), 6)
    (1.0, 3.0)
    """
    return 1 + (1 - math.cos(math.pi * done / 2)) * (end - 1)


class ReSTELinear(BinaryLinear):
    """A linear map of 1-bit weights with one scale, and of inputs of two values unless `binary_input` is off.

    What follows matters while it is trained alone: the exponent now, m, t, and the size of weights that counts as 1.
    """

    exponent, small, bound, unit = 1.0, 0.1, 1.5, 1.0

    def sign(self, x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        return rectified_sign(x, self.exponent, self.small, self.bound)

    def low_bit(self, latent):
        return self.sign(latent / self.unit), latent.abs().mean().reshape(1, 1)

    def error(self) -> float:
        """The estimating error of the latent weights."""
        return estimating_error(self.latent.detach() / self.unit, self.exponent)


@dataclass(frozen=True, kw_only=True)
class ReSTE(QuantizationAwareTraining):
    """Linears inside the blocks at 1 bit, and their inputs too unless `binary_input` is off.

    exponent: o_end, 1 or more; 1 is the straight-through estimator. small: m. bound: t.
    """

    exponent: float = 3.0
    small: float = 0.1
    bound: float = 1.5
    binary_input: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_range("reste", "exponent", self.exponent, 1.0, 100.0)
        check_range("reste", "small", self.small, 1e-6, 1.0)
        check_range("reste", "bound", self.bound, self.small, 1e6)

    def layer(self, part: parts.Linear, inputs: Inputs) -> tuple[type[ReSTELinear], dict[str, Any]]:
        return ReSTELinear, {"binary_input": self.binary_input}

    def begin(self, layer: ReSTELinear, weight: Float[Tensor, "out in"], inputs: Inputs) -> None:
        layer.start(weight)
        layer.expect(inputs)
        layer.small, layer.bound = self.small, self.bound
        layer.unit = max(float(layer.latent.detach().square().mean().sqrt()), 1e-12)

    def train(
        self, model: nn.Module, teacher: nn.Module, data: Data, layers: list[LowBit], report: Report
    ) -> list[float]:
        def progress(done: float) -> None:
            for layer in layers:
                layer.exponent = exponent_at(done, self.exponent)

        options = {"steps": self.steps, "learning_rate": self.learning_rate, "progress": progress}
        losses = distil(model, teacher, data, **options)
        report.figures["estimating error of weights at the end"] = sum(layer.error() for layer in layers) / len(layers)
        return losses
