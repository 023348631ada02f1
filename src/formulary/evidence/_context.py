"""Notices when an arm changes what all arms share."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from zlib import crc32

import numpy as np


def fingerprint(context: object) -> dict[str, tuple]:
    """A checksum for every tensor, array and module in a context: nested dicts, lists, tuples, dataclasses,
    namespaces and modules are walked.
    """
    return dict(_walk(context, "context", set()))


def changed(before: dict[str, tuple], after: dict[str, tuple]) -> str | None:
    """The first place that was there before and is now other or gone. What was added (a cache) is no change."""
    return next((place for place, mark in before.items() if after.get(place) != mark), None)


def _walk(value: object, place: str, seen: set[int]) -> Iterator[tuple[str, tuple]]:
    import torch

    if isinstance(value, torch.Tensor):
        yield place, _mark(value)
    elif isinstance(value, np.ndarray):
        yield place, (value.shape, str(value.dtype), _sum_of_array(value))
    elif id(value) in seen:
        return
    elif isinstance(value, torch.nn.Module):
        seen.add(id(value))
        for name, module in value.named_modules():
            yield f"{place}.{name}" if name else place, (type(module).__qualname__, module.training)
        for name, tensor in (*value.named_parameters(), *value.named_buffers()):
            yield f"{place}.{name} ", _mark(tensor)
    elif isinstance(value, Mapping):
        seen.add(id(value))
        for key in value:
            yield from _walk(value[key], f"{place}[{key!r}]", seen)
    elif isinstance(value, list | tuple):
        seen.add(id(value))
        for number, item in enumerate(value):
            yield from _walk(item, f"{place}[{number}]", seen)
    elif is_dataclass(value) and not isinstance(value, type):
        seen.add(id(value))
        for entry in fields(value):
            yield from _walk(getattr(value, entry.name, None), f"{place}.{entry.name}", seen)
    elif isinstance(value, SimpleNamespace):
        seen.add(id(value))
        for name, item in vars(value).items():
            yield from _walk(item, f"{place}.{name}", seen)


def _mark(tensor) -> tuple:
    """Shape, type, gradient state and a sum over the tensor's bytes (a memory-bound pass: half a gigabyte takes
    about 0.1 s).
    """
    import torch

    facts = tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad, tensor.is_leaf and tensor.grad is not None
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta" or tensor.numel() == 0:
        return facts
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    raw = raw.clone() if raw.storage_offset() % 8 else raw  # whose bytes could not be read as int64
    whole = raw.numel() // 8 * 8
    return (*facts, int(raw[:whole].view(torch.int64).sum()), int(raw[whole:].sum()))


def _sum_of_array(array: np.ndarray) -> int | None:
    return None if array.dtype.hasobject else crc32(np.ascontiguousarray(array).tobytes())
