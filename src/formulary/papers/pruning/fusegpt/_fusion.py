"""Linears while they are trained: parametrizations that add low-rank terms and masked weights of removed blocks, and
their folding.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from formulary.contracts import parts
from formulary.errors import FormularyError

Linears = dict[str, parts.Linear]  # the linears of one block, by their names inside it


class Fusion(nn.Module):
    """A parametrization: W, as the model stores it, to W + B A + sum_j (P_j Q_j) * W_j in the same layout."""

    def __init__(self, part: parts.Linear, rank: int):
        super().__init__()
        self.transposed, self.sizes = part.transposed, (*part.raw.shape[:-2], part.out_features, part.in_features)
        self.rank = min(rank, *self.sizes[-2:])
        self.new = {"device": part.raw.device, "dtype": part.raw.dtype}
        self.low = nn.ParameterList(self._factors())
        self.grafted: list[Tensor | None] = []
        self.grafts = nn.ParameterList()

    def _factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A zero (out, rank) and a random (rank, in) one, for each expert where there are any."""
        *experts, rows, columns = self.sizes
        random = torch.empty(*experts, self.rank, columns, **self.new).uniform_(-1, 1) / math.sqrt(columns)
        return nn.Parameter(torch.zeros(*experts, rows, self.rank, **self.new)), nn.Parameter(random)

    def graft(self, removed: Float[Tensor, "*experts out in"] | None) -> None:
        """Add a term for a removed weight; with None the term is P Q alone."""
        self.grafted.append(removed)
        self.grafts.extend(self._factors())

    def forward(self, weight: Tensor) -> Tensor:
        total = (weight.mT if self.transposed else weight) + self.low[0] @ self.low[1]
        for j, removed in enumerate(self.grafted):
            mask = self.grafts[2 * j] @ self.grafts[2 * j + 1]
            total = total + (mask if removed is None else mask * removed)
        return total.mT.contiguous() if self.transposed else total


class BiasFusion(nn.Module):
    """A parametrization: b to b + sum_j c_j * b_j, each (out,)."""

    def __init__(self, like: Float[Tensor, "out"]):
        super().__init__()
        self.like = like.clone()
        self.grafted: list[Tensor | None] = []
        self.grafts = nn.ParameterList()

    def graft(self, removed: Float[Tensor, "out"] | None) -> None:
        """Add a term for a removed bias; with None the term is c alone."""
        self.grafted.append(removed)
        self.grafts.append(nn.Parameter(torch.zeros_like(self.like)))

    def forward(self, bias: Float[Tensor, "out"]) -> Float[Tensor, "out"]:
        return bias + sum(c if removed is None else c * removed for c, removed in zip(self.grafts, self.grafted))


def graft(onto: Linears, removed: Linears, rank: int, weights: bool = True) -> None:
    """Give every linear of a block a term for its namesake in the removed block; with `weights` False one without its
    weight.
    """
    for name, part in onto.items():
        (weight, bias), own_bias = values(removed[name]), values(part)[1]
        fusion = _fusion(part.module, part.parameter, lambda: Fusion(part, rank))
        fusion.graft(weight.clone() if weights else None)
        if own_bias is not None:
            fusion = _fusion(part.module, "bias", lambda: BiasFusion(own_bias))
            fusion.graft(bias.clone() if weights else None)


def values(part: parts.Linear) -> tuple[Float[Tensor, "*experts out in"], Float[Tensor, "out"] | None]:
    """The weight, as (out, in), and the bias of a linear as they are now, parametrized or not, detached."""
    weight, bias = getattr(part.module, part.parameter).detach(), getattr(part.module, "bias", None)
    return weight.mT if part.transposed else weight, None if bias is None or weight.ndim == 3 else bias.detach()


def _fusion(module: nn.Module, name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """The parametrization of a parameter, made when there is none yet."""
    if not parametrize.is_parametrized(module, name):
        parametrize.register_parametrization(module, name, make(), unsafe=True)
    return module.parametrizations[name][0]


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Turn every parametrized weight and bias into an ordinary one with the value that it has now."""
    for module in [module for module in model.modules() if parametrize.is_parametrized(module)]:
        for name in list(module.parametrizations):
            value = getattr(module, name).clone()
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            getattr(module, name).copy_(value)


def linears_of(model: nn.Module, stack: nn.ModuleList) -> dict[int, Linears]:
    """The linears of every block of the stack, by the block's id; FormularyError when the blocks do not correspond."""
    found, every = {}, parts.linears(model)
    for block in parts.blocks(model):
        inside = f"{block.name}."
        found[id(block.module)] = {
            part.name.removeprefix(inside): part for part in every if part.name.startswith(inside)
        }
    shapes = [{name: part.raw.shape for name, part in found[id(block)].items()} for block in stack]
    if any(shape != shapes[0] for shape in shapes):
        raise FormularyError(
            "fusegpt grafts the weights of one block onto another, and this model's blocks differ in shape"
        )
    return found


def originals(linears: Linears) -> list[nn.Parameter]:
    """The frozen weights under the parametrizations of a block's linears."""
    return [part.module.parametrizations[part.parameter].original for part in linears.values()]
