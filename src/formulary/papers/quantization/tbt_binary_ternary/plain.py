"""What the check compares TBT with: TWN's ternary weights, min-max activations, and labels instead of a teacher."""

from torch import nn

from formulary import lab
from formulary.contracts.edits import register

from .._training import LowBit
from .activations import ElasticAttention
from .method import TBT, TBTLinear


class MinMax(nn.Module):
    """2^bits levels between the smallest and the largest number of the tensor."""

    def __init__(self, bits: int, unsigned: bool):
        super().__init__()
        self.bits, self.unsigned = bits, unsigned

    def start(self, size: float, low: float = 0.0) -> None:
        """Nothing is learned."""

    def forward(self, x, count: int):
        low, high = x.detach().amin(), x.detach().amax()
        step = (high - low).clamp(min=1e-8) / (2**self.bits - 1)
        return x + (((x - low) / step).round() * step + low - x).detach()


class PlainLinear(TBTLinear):
    """TWN's ternary weights, min-max activations."""

    quantizer = MinMax

    def low_bit(self, latent):
        size = latent.detach().abs()
        beyond = size > 0.7 * size.mean(-1, keepdim=True)
        scale = (size * beyond).sum(-1, keepdim=True) / beyond.sum(-1, keepdim=True).clamp(min=1)
        levels, ratio = latent.detach().sign() * beyond, latent / scale
        return levels + (ratio - ratio.detach()), scale


class PlainAttention(ElasticAttention):
    """Attention with min-max queries, keys, values and probabilities."""

    quantizer = MinMax


class Plain(TBT):
    """The baseline, trained on labels."""

    linear, attention = register("tbt-plain:linear", PlainLinear), register("tbt-plain:attention", PlainAttention)

    def train(self, model, teacher, data, layers: list[LowBit], report):
        return lab.train(model, data, steps=self.steps, lr=self.learning_rate, schedule="linear", seed=data.seed).losses
