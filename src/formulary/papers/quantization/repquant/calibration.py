"""What RepQuant learns from calibration: ranges of layers and channels, the softmax's scale, and fitted weights."""

import torch
from jaxtyping import Float
from torch import Tensor

BINS, PER_STEP = 768, 12
"""Attention weights A are counted by -2 log2(A), in bins of 1 / PER_STEP."""
SAMPLE, ROWS = 1 << 16, 1024
"""Values of which a layer's range is chosen, and tokens on which clipping is learned, spread evenly over all."""


class Observed:
    """Statistics of one attention module over real tokens: samples of query, key, value, and counts of its weights."""

    def __init__(self):
        self.values: list[list[Tensor]] = [[], [], []]
        self.weights = torch.zeros(BINS, dtype=torch.float64)

    def add(self, query, key, value, weights: Float[Tensor, "B H L S"], mask, bias) -> None:
        """Take in one batch of self-attention. A real token sees itself, a padded one is seen by nobody."""
        real = torch.ones(weights.shape[0], weights.shape[2], dtype=torch.bool, device=weights.device)
        if mask is not None:
            real = real & mask.diagonal(dim1=-2, dim2=-1).any(-2)
        if bias is not None:
            real = real & (bias > torch.finfo(bias.dtype).min / 2).diagonal(dim1=-2, dim2=-1).any(-2)
        for sample, x in zip(self.values, (query, key, value)):
            tokens = x.transpose(1, 2)[real].flatten(1).float()
            ends = torch.stack([tokens.amin(), tokens.amax()])
            sample += [tokens.flatten()[:: -(-tokens.numel() // SAMPLE)], ends]
        rows = weights.transpose(1, 2)[real]
        level = (-2 * PER_STEP * rows[rows > 0].log2()).round().clamp(0, BINS - 1).long()
        self.weights += torch.bincount(level, minlength=BINS).cpu()


def layer_range(x: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(scale, zero) of one grid for all of x: [min, max], both ends shrunk by the factor of least squared error.

    The scale is rounded to `dtype`, in which it will be stored.

    >>> scale, zero = layer_range(torch.linspace(-1, 2, 1000), 2, torch.float32)
    >>> round(float(scale), 1), float(zero)
    (0.8, 1.0)
    """
    low, high = x.amin().clamp(max=0).float(), x.amax().clamp(min=0).float()
    sample = x.flatten()[:: -(-x.numel() // SAMPLE)].float()
    factor = torch.linspace(0.2, 1.0, 41, device=x.device)
    scales = ((high - low) * factor / (2**bits - 1)).to(dtype).float()
    scales = torch.where(scales == 0, 1.0, scales)
    zeros = (-low * factor / scales).round().clamp(0, 2**bits - 1)
    errors = []
    for scale, zero in zip(scales, zeros):
        levels = ((sample / scale).round() + zero).clamp(0, 2**bits - 1)
        errors.append((sample - (levels - zero) * scale).square().sum())
    best = int(torch.stack(errors).argmin())
    return scales[best], zeros[best]


def clipped_channels(
    x: Float[Tensor, "tokens d"], weight: Float[Tensor, "out d"], bits: int, steps: int, symmetric: bool
) -> tuple[Float[Tensor, "d"], Float[Tensor, "d"]]:
    """(scales, zeros) of each channel of x, clipped for the least ||(x - Q(x)) W^T||^2 met in `steps` steps of Adam.

    The first candidate is min and max themselves, so the result is never worse on the tokens it learns on. With
    `symmetric`, all channels share the zero point 2^(bits-1) and both ends one factor.
    """
    top = 2**bits - 1
    low, high = x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high * 2 ** (bits - 1) / (2 ** (bits - 1) - 1)
    x = x[:: -(-len(x) // ROWS)]
    floor = ((high - low) / top).mean() * 1e-4 + 1e-12
    gram = weight.mT @ weight / x.square().mean().clamp(min=1e-12)
    best = (torch.inf, None, None)
    with torch.enable_grad():
        logits = torch.full((2, len(low)), 4.0, device=x.device, requires_grad=True)
        adam = torch.optim.Adam([logits], lr=0.05)
        for step in range(steps + 1):
            factor = logits.sigmoid() if step else torch.ones_like(logits)
            factor = factor[:1].expand(2, -1) if symmetric else factor
            scale = ((factor[1] * high - factor[0] * low) / top).clamp(min=floor)
            exact_zero = (-factor[0] * low / scale).clamp(0, top)
            zero = _through(torch.full_like(low, 2 ** (bits - 1)) if symmetric else exact_zero)
            error = x - ((_through(x / scale) + zero).clamp(0, top) - zero) * scale
            loss = (error @ gram * error).sum() / x.numel()
            if float(loss.detach()) < best[0]:
                best = (float(loss.detach()), scale.detach(), zero.detach())
            if step and step < steps:
                adam.zero_grad()
                loss.backward()
                adam.step()
    return best[1], best[2]


def _through(x: Tensor) -> Tensor:
    """Rounding whose gradient is passed through."""
    return x + (x.round() - x).detach()


def softmax_scale(counts: Float[Tensor, "bins"], rounded, dtype: torch.dtype) -> Tensor:
    """The largest level s <= 1, in quarter steps of the logarithmic grid, of least squared error on counted weights."""
    values = torch.exp2(-torch.arange(BINS, dtype=torch.float64) / (2 * PER_STEP)).float()
    scales = torch.exp2(-torch.arange(0, 16, 0.125)).to(dtype).float()
    errors = [float((counts * (values - rounded(values, scale)).double().square()).sum()) for scale in scales]
    return scales[min(range(len(errors)), key=errors.__getitem__)]


def reconstructed(
    weight: Float[Tensor, "out in"],
    wanted: Float[Tensor, "tokens out"],
    x: Float[Tensor, "tokens in"],
    gram: Float[Tensor, "in in"],
    damp: float,
) -> Float[Tensor, "out in"]:
    """V of least ||wanted - x V^T||^2 + damp mean(diag gram) ||V - weight||^2, for gram = x^T x."""
    damped = gram.double() + damp * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64, device=x.device)
    change = torch.linalg.solve(damped, (x.mT @ (wanted - x @ weight.mT)).double())
    return weight + change.mT.float()
