"""The two loops of error compensation (GPTQ) in C++ compiled at first use, each with a plain twin in PyTorch.

`Gram` sums X^T X over batches of rows, the half above the diagonal alone. `walk` goes over the columns of a weight, rounds each
and lets the columns after it make up for the error; it gives the twin's very bits.
"""

import ctypes
from functools import cache

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from formulary.kernels.native import library, why_not

PANEL = 48


class Gram:
    """X^T X (in, in) float32 of the rows of all batches added so far; with `halves`, of the rows rounded to bfloat16 where the
    processor multiplies those faster.

    >>> gram, x = Gram(3), torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]])
    >>> gram.add(x)
    >>> gram.total().tolist()
    [[1.0, 2.0, 0.0], [2.0, 5.0, 3.0], [0.0, 3.0, 9.0]]
    """

    def __init__(self, features: int, device: torch.device | str = "cpu", *, halves: bool = False):
        self.features, self._native = features, _signed() if torch.device(device).type == "cpu" else None
        self.rounds = halves and hasattr(self._native, "add_gram_of_halves")
        wide = -(-features // PANEL) * PANEL if self._native else features
        self._sums = torch.zeros(wide, wide, device=device)

    def add(self, x: Float[Tensor, "tokens in"]) -> None:
        """One batch of rows; raises MemoryError when there is no room to lay them out."""
        as_is = self.rounds and x.dtype == torch.bfloat16
        x = x.detach().contiguous() if as_is else x.detach().float().contiguous()
        if self._native is None:
            self._sums.addmm_(x.mT, x)
            return
        add = self._native.add_gram_of_bfloat16 if as_is else self._native.add_gram_of_halves if self.rounds else self._native.add_gram
        if add(x.data_ptr(), *x.shape, len(self._sums), self._sums.data_ptr()):
            raise MemoryError("no memory to lay out a batch of activations")

    def merge(self, other: "Gram") -> None:
        """The rows of `other` too."""
        self._sums += other._sums

    def total(self) -> Float[Tensor, "in in"]:
        """The sum so far."""
        if self._native is None:
            return self._sums
        sums = self._sums[: self.features, : self.features]
        return sums.triu() + sums.triu(1).mT


def walk(
    block: Float[Tensor, "columns out"],
    first: int,
    last: int,
    upper: Float[Tensor, "columns columns"],
    scale: Float[Tensor, "groups out"],
    zero: Float[Tensor, "groups out"],
    group: Int[Tensor, "columns"],
    top: int,
    codes: UInt8[Tensor, "columns out"],
) -> None:
    """For the columns i from `first` to `last` of `block`, which is changed in place, in turn

        q = clip(round(w_i / s) + z, 0, top);   e = (w_i - s (q - z)) / U_ii;   w_j -= U_ij e for all j > i

    with the scale s and the zero point z of group[i]. w_i becomes s (q - z) and codes[i] becomes q.

    >>> block, upper, codes = torch.tensor([[1.25], [2.0]]), torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.zeros(2, 1, dtype=torch.uint8)
    >>> walk(block, 0, 2, upper, torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(2, dtype=torch.long), 3, codes)
    >>> block.tolist(), codes.tolist()
    ([[1.0], [2.0]], [[1], [2]])
    """
    native = _signed() if block.device.type == "cpu" and all(x.is_contiguous() for x in (block, codes)) else None
    if native is None:
        return plain_walk(block, first, last, upper, scale, zero, group, top, codes)
    operands = [x.contiguous() for x in (upper, scale, zero, group)]
    native.walk(
        block.data_ptr(), first, last, *block.shape, *(x.data_ptr() for x in operands), top, codes.data_ptr()
    )  # fmt: skip


def plain_walk(block, first, last, upper, scale, zero, group, top, codes) -> None:
    """The twin of `walk` in PyTorch, a column at a time."""
    for i in range(first, last):
        s, z = scale[group[i]], zero[group[i]]
        level = (block[i] / s).round().add(z).clamp(0, top)
        chosen = (level - z) * s
        error = (block[i] - chosen) / upper[i, i]
        block[i + 1 :] -= torch.outer(upper[i, i + 1 :], error)
        block[i], codes[i] = chosen, level.to(torch.uint8)


def path() -> str:
    """Which path runs on this processor, in words."""
    missing = why_not("compensation")
    return f"PyTorch ({missing})" if missing else "C++"


@cache
def _signed() -> ctypes.CDLL | None:
    """The compiled library, its functions typed."""
    made = library("compensation")
    if made is not None:
        memory, size = ctypes.c_void_p, ctypes.c_int64
        for name in ("add_gram", "add_gram_of_halves", "add_gram_of_bfloat16"):
            if hasattr(made, name):
                add = getattr(made, name)
                add.argtypes, add.restype = [memory, size, size, size, memory], ctypes.c_int
        made.walk.argtypes = [memory, size, size, size, size, memory, memory, memory, memory, ctypes.c_float, memory]
        made.walk.restype = None
    return made
