"""Feed-forwards that compute with their first neurons only, while a context lasts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from .._parts import Sublayer


class _First:
    """The class that a linear of a feed-forward takes: it has its first `_width()` outputs or inputs only."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, width = self._part.module.weight, self._part.module.bias, self._width()
        weight = weight.mT if self._part.transposed else weight
        if self._out:
            return nn.functional.linear(x, weight[:, :width], bias)
        return nn.functional.linear(x, weight[:width], None if bias is None else bias[:width])


def neurons(sublayer: Sublayer, share: float) -> int:
    """How many neurons a share of a feed-forward is: at least one."""
    return max(1, round(share * sublayer.units))


@contextmanager
def nested(sublayers: Sequence[Sublayer]) -> Iterator[Callable[[Sequence[float]], None]]:
    """While it lasts, each feed-forward is its first neurons: call what is yielded with one share a feed-forward; at
    first, all 1.

    The weights are sliced, so a narrow pass costs less, and neurons left out get no gradient.
    """
    widths = [sublayer.units for sublayer in sublayers]
    swapped = []

    def narrow(shares: Sequence[float]) -> None:
        widths[:] = [neurons(sublayer, share) for sublayer, share in zip(sublayers, shares, strict=True)]

    try:
        for index, sublayer in enumerate(sublayers):
            for part in (*sublayer.into, sublayer.out):
                cls = type(part.module)
                part.module.__class__ = type(f"First{cls.__name__}", (_First, cls), {"__module__": __name__})
                own = {"_part": part, "_out": part is sublayer.out, "_width": lambda index=index: widths[index]}
                part.module.__dict__.update(own)
                swapped.append((part.module, cls, own))
        yield narrow
    finally:
        for module, cls, own in swapped:
            module.__class__ = cls
            for name in own:
                del module.__dict__[name]
