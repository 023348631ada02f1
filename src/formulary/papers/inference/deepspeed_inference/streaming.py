"""Blocks whose weights stay on disk: hints to the kernel about pages of the model's file (section 6 of the paper)."""

import ctypes
import mmap
import sys
import weakref
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from formulary.contracts import BlockEdit

PAGE = mmap.PAGESIZE


class Ahead:
    """The block to read ahead. A copy of a model has its weights in memory, so a copy of this knows no block."""

    def __init__(self, block: nn.Module | None):
        self.block = (lambda: None) if block is None else weakref.ref(block)

    def __deepcopy__(self, memo: dict) -> "Ahead":
        return Ahead(None)


class Streamed(BlockEdit):
    """Reads the weights of the block `ahead` ahead, and gives back its own when it is done."""

    def setup(self, model: nn.Module, *, ahead: str) -> None:
        self.streamed_ahead = Ahead(model.get_submodule(ahead) if ahead else None)

    def before(self, hidden: Tensor) -> Tensor:
        following = self.streamed_ahead.block()
        if following is not None:
            advise(following, "read ahead")
        return super().before(hidden)

    def after(self, hidden: Tensor) -> Tensor:
        hidden = super().after(hidden)
        if not torch.is_grad_enabled():
            advise(self, "give back")
        return hidden


ADVICE = {"read ahead": 3, "give back": 21}
"""MADV_WILLNEED and MADV_PAGEOUT of Linux. Neither can lose what was written to a page."""


def advise(module: nn.Module, what: str) -> int:
    """Tell the kernel about the weights of a module that are pages of a safetensors file; returns how many bytes."""
    libc, done = _libc(), 0
    if libc is None or torch.compiler.is_compiling():
        return 0
    for start, end in file_pages(module):
        done += 0 if libc.madvise(start, end - start, ADVICE[what]) else end - start
    return done


_KNOWN: "weakref.WeakKeyDictionary[nn.Module, tuple]" = weakref.WeakKeyDictionary()


def file_pages(module: nn.Module) -> list[tuple[int, int]]:
    """The address ranges of whole pages inside those weights of a module that are maps of a safetensors file."""
    tensors = [x for x in (*module.parameters(), *module.buffers()) if x.device.type == "cpu" and x.is_contiguous()]
    spans = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in tensors]
    if module not in _KNOWN or _KNOWN[module][0] != spans:
        maps = _maps()
        whole = [(-(-start // PAGE) * PAGE, end // PAGE * PAGE) for start, end in spans]
        inside = [(a, b) for a, b in whole if a < b and any(low <= a and b <= high for low, high in maps)]
        _KNOWN[module] = (spans, inside)
    return _KNOWN[module][1]


def _maps() -> list[tuple[int, int]]:
    """The address ranges of this process that are maps of safetensors files."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf8", errors="replace").splitlines()
    except OSError:
        return []
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(".safetensors")]
    return [(int(low, 16), int(high, 16)) for low, high in ranges]


@cache
def _libc() -> ctypes.CDLL | None:
    """The C library where it has Linux's madvise, else None."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
