"""TBT's quantizers of activations, with learned steps, and attention that is computed with them; see `method`."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from formulary.contracts import Attention
from formulary.errors import UsageError

from .._training import signs


def elastic(
    x: Float[Tensor, "*any"], step: Float[Tensor, ""], bits: int, unsigned: bool, count: int
) -> Float[Tensor, "*any"]:
    """x rounded to multiples of `step`, with LSQ's gradients; `count` is n, the numbers that share the step.

    >>> elastic(torch.tensor([-3.0, 0.2, 0.6, 9.0]), torch.tensor(1.0), bits=2, unsigned=False, count=4)
    tensor([-1.,  0.,  1.,  1.])
    """
    low, high = (0, bits) if unsigned else (-1, 1)
    step = step.clamp(min=1e-5)
    if step.requires_grad and torch.is_grad_enabled():
        part = (count * high) ** -0.5
        step = step * part + (step * (1 - part)).detach()
    if bits == 1 and not unsigned:
        within = x.clamp(-step.detach(), step.detach())
        return step * signs(x.detach()) + (within - within.detach())
    ratio = (x / step).clamp(low, high)
    return step * (ratio.detach().round() + (ratio - ratio.detach()))


def per_row(x: Float[Tensor, "*any n"], unsigned: bool) -> Float[Tensor, "*any n"]:
    """x rounded to 8 bits with the scale max |x| of its last dimension; the rounding passes gradients through."""
    scale = x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-8) / (255 if unsigned else 127)
    rounded = (x.detach() / scale).round() * scale
    return rounded if not x.requires_grad else x + (rounded - x.detach())


class Elastic(nn.Module):
    """The quantizer of one activation: `bits` 1, 2, or 8 (which has nothing to learn)."""

    def __init__(self, bits: int, unsigned: bool):
        super().__init__()
        self.bits, self.unsigned = bits, unsigned
        if bits < 8:
            self.step = nn.Parameter(torch.ones(()))
            self.register_buffer("shift", torch.zeros(()))

    def start(self, size: float, low: float = 0.0) -> None:
        """Set the step from the mean |x|, and the shift of a one-sided input of 2 bits from its smallest number."""
        if self.bits < 8:
            with torch.no_grad():
                self.step.fill_(4 * size / (2**self.bits - 1) ** 0.5 if self.unsigned else 2 * size)
                self.shift.fill_(low if self.unsigned and self.bits == 2 else 0.0)

    def forward(self, x: Float[Tensor, "*any"], count: int) -> Float[Tensor, "*any"]:
        if self.bits == 8:
            return per_row(x, self.unsigned)
        shift = self.shift.to(x.dtype)
        return elastic(x - shift, self.step.to(x.dtype), self.bits, self.unsigned, count) + shift


def check_activation(bits: int) -> None:
    if bits not in (0, 1, 2, 8):
        raise UsageError(f"tbt-binary-ternary: activation_bits must be 1, 2, 8, or 0 for none, got {bits}")


class ElasticAttention(Attention):
    """Attention whose queries, keys, values and probabilities are quantized to `bits` (0: not at all).

    While `watching`, `maps` holds the last call's probabilities before their rounding, and which queries are real;
    while `sizes` is a list, mean magnitudes of queries, keys, values and probabilities are added to it, padding left
    out.
    """

    equals_sdpa = False
    quantizer = Elastic

    def __init__(self, bits: int = 2):
        super().__init__()
        check_activation(bits)
        self.quantizers = nn.ModuleList([self.quantizer(bits, role == 3) for role in range(4)] if bits else [])
        self.watching = False
        self.maps: tuple[Tensor, Tensor] | None = None
        self.sizes: list[list[float]] | None = None

    def _quantized(self, role: int, x: Tensor, count: int) -> Tensor:
        return self.quantizers[role](x, count) if self.quantizers else x

    def _look(self, tensors: tuple[Tensor, ...], seen: Bool[Tensor, "#B #H L S"]) -> None:
        """Keep what calibration and training ask for; in self-attention a position is real if any query may see it."""
        key = seen.any(-2)[..., None]
        query = key if seen.shape[-2] == seen.shape[-1] else seen.any(-1)[..., None]
        if self.watching:
            self.maps = tensors[3], query
        for sizes, x, real in zip(self.sizes or (), tensors, (query, key, key, seen & query)):
            chosen = x.detach().float().abs() * real
            sizes.append(float(chosen.sum() / real.expand_as(chosen).sum().clamp(min=1)))

    def attend(
        self,
        query: Float[Tensor, "B H L K"],
        key: Float[Tensor, "B H S K"],
        value: Float[Tensor, "B H S V"],
        *,
        mask: Bool[Tensor, "#B #H L S"] | None = None,
        bias: Float[Tensor, "#B #H L S"] | None = None,
        scale: float | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "B H L V"]:
        """Attention output; a query that may see no key gets zeros."""
        length, keys, count = query.shape[2], key.shape[2], query.shape[1] * query.shape[3]
        seen = torch.ones(1, 1, length, keys, dtype=torch.bool, device=query.device) if mask is None else mask
        if causal:
            seen = seen & torch.ones(length, keys, dtype=torch.bool, device=query.device).tril()
        if bias is not None:
            seen = seen & (bias > torch.finfo(bias.dtype).min / 2)
        q, k, v = (self._quantized(role, x, count) for role, x in enumerate((query, key, value)))
        scores = (q @ k.mT).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
        if bias is not None:
            scores = scores + bias
        weights = scores.masked_fill(~seen, torch.finfo(torch.float32).min).softmax(-1).masked_fill(~seen, 0.0)
        if self.watching or self.sizes is not None:
            self._look((query, key, value, weights), seen)
        return self._quantized(3, weights, count).to(value.dtype) @ v


def map_error(ours: list[ElasticAttention], theirs: list[ElasticAttention]) -> Float[Tensor, ""]:
    """Mean over layers, heads and real queries of the squared distance of attention maps."""
    errors = []
    for one, other in zip(ours, theirs, strict=True):
        (a, real), (b, _) = one.maps, other.maps
        distance = (a - b).square().sum(-1, keepdim=True)
        errors.append((distance * real).sum() / real.expand_as(distance).sum().clamp(min=1))
    return torch.stack(errors).mean()
