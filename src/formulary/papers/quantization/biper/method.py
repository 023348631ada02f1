"""BiPer makes weights binary by a square wave and trains them with the gradient of the sine of the same period.

    w_b = sign(sin(omega w)),   d w_b / dw := omega cos(omega w),   output row j scaled by a learned alpha_j

The frequency omega sets the error by which the sign stands for the sine, E[(sin(omega w) - gamma sign(sin(omega
w)))^2] at its best gamma. Two stages: the weight is alpha sin(omega w), without a sign, for the first two thirds of
the steps; then the sign is put in, with an identity gradient through it. Inputs of linears are binary from the start,
with the gradient max(0, 2 - 2 |x|) of Bi-Real nets (arXiv:1808.00278). The loss has tau times the sum over layers of
mean sin^2(omega w) added.

Source: arXiv:2404.01278, section 3, and the authors' code, from which the regularizer and the second stage's lower
learning rate are. Ours, for the paper trains convolutional networks with batch norms from nothing: the student starts
from its teacher's weights and learns the teacher's outputs, by AdamW; latent weights are scaled down where their mean
phase |omega w| would be above 1 radian, for a phase beyond pi turns a weight's sign; alpha starts at the
least-squares fit and is multiplied by its row's mean |sin| when the sign is put in; inputs become c + d sign((x - c)
/ s), with mean, mean distance and deviation of calibration inputs, where the code divides by each sample's deviation
while training.

In: any Transformer of transformers, and data. Expert tensors, embeddings and heads stay as they are. Raises
UsageError for parameters out of range.

>>> from formulary.lab import inputs_for, tiny
>>> from formulary.contracts import Data
>>> data = Data([{"input_ids": ids} for ids in inputs_for(tiny("bert"), batch=8)["input_ids"]])
>>> model, report = BiPer(steps=3).apply(tiny("bert"), data)
>>> report.headline
'biper on 12 linear layers, 70 % of the weights'
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formulary.contracts import Data, Report, parts
from formulary.contracts.transform import check_range

from .._training import BinaryLinear, Inputs, LowBit, QuantizationAwareTraining, distil, signs


def bireal_sign(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """sign(x), 1 at 0, whose gradient is max(0, 2 - 2 |x|).

    >>> x = torch.tensor([-2.0, 0.25, 1.0], requires_grad=True)
    >>> bireal_sign(x).sum().backward()
    >>> x.grad
    tensor([0.0000, 1.5000, 0.0000])
    """
    sign = signs(x.detach())
    if not x.requires_grad:
        return sign
    within = x.clamp(-1, 1)
    surrogate = within * (2 - within.abs())
    return sign + (surrogate - surrogate.detach())


def square_wave(phase: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """sign(sin(phase)), 1 at 0, whose gradient is cos(phase).

    >>> square_wave(torch.tensor([-1.0, 1.0, 4.0]))
    tensor([-1.,  1., -1.])
    """
    wave = phase.sin()
    sign = signs(wave.detach())
    return sign + (wave - wave.detach())


def quantization_error(latent: Float[Tensor, "*any"], frequency: float) -> float:
    """Mean square of sin(omega w) - gamma sign(sin(omega w)), at the best gamma, mean |sin(omega w)|."""
    wave = (frequency * latent.detach()).sin()
    return float(wave.square().mean() - wave.abs().mean() ** 2)


class BiPerLinear(BinaryLinear):
    """A linear map of 1-bit weights with a scale a row, and of inputs of two values unless `binary_input` is off.

    What follows matters while it is trained alone: omega, and whether the weight is the sine itself (`soft`, stage 1).
    """

    frequency, soft = 20.0, True

    def __init__(self, in_features: int, out_features: int, binary_input: bool = True, bias: bool = False):
        super().__init__(in_features, out_features, binary_input, bias)
        self.register_parameter("alpha", None)

    def sign(self, x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        return bireal_sign(x)

    def low_bit(self, latent):
        phase = self.frequency * latent
        return (phase.sin() if self.soft else square_wave(phase)), self.alpha

    def fit(self, weight: Float[Tensor, "out in"]) -> float:
        """Start from `weight`, with least-squares alphas; gives the factor, at most 1, by which latent weights are
        smaller.
        """
        weight = weight.detach().float()
        factor = min(1.0, 1 / max(self.frequency * float(weight.abs().mean()), 1e-12))
        self.start(factor * weight)
        wave = (self.frequency * self.latent.detach()).sin()
        energy = wave.square().sum(1, keepdim=True).clamp(min=1e-12)
        self.alpha = nn.Parameter((wave * weight).sum(1, keepdim=True) / energy)
        return factor

    @torch.no_grad()
    def harden(self) -> None:
        """Put the sign in: stage 2. alpha becomes the least-squares scale of the signs for alpha times the sine."""
        self.alpha.mul_((self.frequency * self.latent).sin().abs().mean(1, keepdim=True))
        self.soft = False

    def finish(self) -> None:
        super().finish()
        self.alpha = None


@dataclass(frozen=True, kw_only=True)
class BiPer(QuantizationAwareTraining):
    """Linears inside the blocks at 1 bit, and their inputs too unless `binary_input` is off.

    frequency: omega; the paper's are 20 and 30. penalty: tau. second: the part of the steps that stage 2 takes;
    second_rate: its learning rate, as a part of the first's.
    """

    frequency: float = 20.0
    penalty: float = 0.04
    second: float = 1 / 3
    second_rate: float = 0.18
    binary_input: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_range("biper", "frequency", self.frequency, 1e-3, 1e4)
        check_range("biper", "penalty", self.penalty, 0.0, 1e3)
        check_range("biper", "second", self.second, 0.0, 1.0)
        check_range("biper", "second_rate", self.second_rate, 1e-6, 1e3)

    def layer(self, part: parts.Linear, inputs: Inputs) -> tuple[type[BiPerLinear], dict[str, Any]]:
        return BiPerLinear, {"binary_input": self.binary_input}

    def begin(self, layer: BiPerLinear, weight: Float[Tensor, "out in"], inputs: Inputs) -> None:
        layer.frequency = self.frequency
        layer.shrunk = layer.fit(weight)
        layer.expect(inputs)

    def train(
        self, model: nn.Module, teacher: nn.Module, data: Data, layers: list[LowBit], report: Report
    ) -> list[float]:
        shrunk = sum(layer.shrunk < 1 for layer in layers)
        if shrunk:
            report.note(f"latent weights of {shrunk} layers were scaled down to a mean phase of 1 radian")
        second = min(self.steps, max(1, round(self.second * self.steps)))
        losses = self._stage(model, teacher, data, layers, self.steps - second, 1.0)
        for layer in layers:
            layer.harden()
        losses += self._stage(model, teacher, replace(data, seed=data.seed + 1), layers, second, self.second_rate)
        errors = [quantization_error(layer.latent, self.frequency) for layer in layers]
        report.figures["quantization error of the sine at the end"] = sum(errors) / len(errors)
        squares = [float((layer.frequency * layer.latent.detach()).sin().square().mean()) for layer in layers]
        report.figures["mean sin^2 of the phases at the end"] = sum(squares) / len(squares)
        report.figures["steps with the sine, with its sign"] = [self.steps - second, second]
        return losses

    def _stage(self, model, teacher, data: Data, layers: list[LowBit], steps: int, rate: float) -> list[float]:
        def regularizer() -> Tensor:
            squares = [(layer.frequency * layer.latent).sin().square().mean() for layer in layers]
            return self.penalty * torch.stack(squares).sum()

        options = {"steps": steps, "learning_rate": rate * self.learning_rate, "extra": regularizer}
        return distil(model, teacher, data, **options) if steps else []
