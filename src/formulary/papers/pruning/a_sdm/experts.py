"""Layers that mix the weights of their experts anew for each sample, and what is left of a block that is gone.

With pool(x) the mean of x over all positions of a sample, and E experts:

r(x) = sigmoid(route pool(x) + route_bias),   W(x) = sum_e r_e(x) W_e,   b(x) = sum_e r_e(x) b_e

so that a layer costs one pass however many experts it has, and the mixing.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formulary.contracts import Replacement
from formulary.errors import UsageError


class Experts(Replacement):
    """What both layers share: weights (E, *shape), biases (E, shape[0]) or None, and the router over `channels`."""

    def __init__(self, experts: int, channels: int, shape: Sequence[int], bias: bool):
        super().__init__()
        if min(experts, channels, *shape) < 1:
            raise UsageError(f"a-sdm: a layer of {experts} experts of shape {tuple(shape)} has no weights")
        self.weights = nn.Parameter(torch.zeros(experts, *shape))
        self.biases = nn.Parameter(torch.zeros(experts, shape[0])) if bias else None
        self.route = nn.Parameter(torch.zeros(experts, channels))
        self.route_bias = nn.Parameter(torch.zeros(experts))

    @property
    def weight(self) -> Tensor:
        """The first expert: what the layer was before it inherited."""
        return self.weights[0]

    def mixed(self, pooled: Float[Tensor, "B channels"]) -> tuple[Tensor, Tensor | None]:
        """(weight (B, *shape), bias (B, shape[0]) or None) of each sample."""
        ratios = F.linear(pooled, self.route, self.route_bias).sigmoid()
        weight = (ratios @ self.weights.flatten(1)).unflatten(1, self.weights.shape[1:])
        return weight, None if self.biases is None else ratios @ self.biases


class ExpertLinear(Experts):
    """(B, ..., in_features) -> (B, ..., out_features); a sample is all that one index of the first dimension holds.

    >>> layer = ExpertLinear(8, 4, experts=2)
    >>> layer(torch.ones(3, 5, 8)).shape, layer(torch.ones(3, 8)).shape
    (torch.Size([3, 5, 4]), torch.Size([3, 4]))
    """

    slow_because = "each sample's weights are mixed from the experts before each product"

    def __init__(self, in_features: int, out_features: int, experts: int, bias: bool = False):
        super().__init__(experts, in_features, (out_features, in_features), bias)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Float[Tensor, "B *positions in"]) -> Float[Tensor, "B *positions out"]:
        rows = x.reshape(len(x), -1, self.in_features)
        weight, bias = self.mixed(rows.mean(1))
        out = rows @ weight.mT if bias is None else torch.baddbmm(bias[:, None], rows, weight.mT)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, experts={len(self.weights)}, bias={self.biases is not None}"


class ExpertConv2d(Experts):
    """(B, in_channels, H, W) -> (B, out_channels, H', W'), as `nn.Conv2d` with zero padding.

    >>> ExpertConv2d(8, 4, [3, 3], experts=2, padding=[1, 1])(torch.ones(2, 8, 5, 5)).shape
    torch.Size([2, 4, 5, 5])
    """

    slow_because = ExpertLinear.slow_because

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: list[int],
        experts: int,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
        bias: bool = False,
    ):
        super().__init__(experts, in_channels, (out_channels, in_channels // groups, *kernel_size), bias)
        self.stride, self.padding, self.dilation, self.groups = tuple(stride), tuple(padding), tuple(dilation), groups

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B O Y X"]:
        weight, bias = self.mixed(x.mean((2, 3)))
        one, groups = x.reshape(1, -1, *x.shape[2:]), len(x) * self.groups
        out = F.conv2d(one, weight.flatten(0, 1), None, self.stride, self.padding, self.dilation, groups)
        out = out.view(len(x), -1, *out.shape[2:])
        return out if bias is None else out + bias[..., None, None]

    def extra_repr(self) -> str:
        return f"{tuple(self.weights.shape[1:])}, experts={len(self.weights)}, bias={self.biases is not None}"


class Dropped(Replacement):
    """A block that is gone: gives back its first argument.

    >>> Dropped()(torch.ones(2), "a mask")
    tensor([1., 1.])
    """

    def forward(self, *args, **kwargs) -> Tensor:
        return args[0] if args else next(iter(kwargs.values()))


def inherit(heir: nn.Linear | nn.Conv2d) -> tuple[type, dict]:
    """(class, arguments without `experts`) of the layer that takes the place of `heir`.

    >>> inherit(nn.Linear(8, 4))
    (<class 'formulary.papers.pruning.a_sdm.experts.ExpertLinear'>, {'bias': True, 'in_features': 8, 'out_features': 4})
    """
    same = {"bias": heir.bias is not None}
    if isinstance(heir, nn.Linear):
        return ExpertLinear, same | {"in_features": heir.in_features, "out_features": heir.out_features}
    sizes = {name: list(getattr(heir, name)) for name in ("kernel_size", "stride", "padding", "dilation")}
    same |= {"in_channels": heir.in_channels, "out_channels": heir.out_channels, "groups": heir.groups}
    return ExpertConv2d, same | sizes
