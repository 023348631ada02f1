"""Where a vision model's stages begin and end, and what flows there: of stages of its own, or of a plain ViT's layers."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from formulary.contracts import parts
from formulary.papers.distillation.minilm.method import spaced


class Features(NamedTuple):
    """Of each stage, shallow first: the map at its end (B,C,H,W) and the embedding that enters it (B,N,C), in float32."""

    maps: list[Tensor]
    embeddings: list[Tensor]


def own_stages(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(stage, its patch embedding) of a hierarchical Transformer; none for a plain one."""
    found = []
    for module in model.modules():
        children = dict(module.named_children())
        patch = children.get("patch_embeddings", children.get("patch_embedding"))
        if hasattr(patch, "proj") and any(isinstance(child, nn.ModuleList) for child in children.values()):
            found.append((module, patch))
    return found


@contextmanager
def reading(model: nn.Module, stages: int) -> Iterator[Callable[[Tensor], Features]]:
    """Within the context, the yielded function gives the features of the latest forward pass, whose images it takes.

    A plain ViT is parted into `stages` of its layers; a hierarchical one has its own.
    """
    ends: dict[int, Tensor | tuple] = {}
    entries: dict[int, Tensor | tuple] = {}
    keep = lambda store, stage: lambda module, args, out: store.__setitem__(stage, out)
    enter = lambda stage: lambda module, args, named: entries.__setitem__(stage, args[0] if args else named["hidden_states"])
    handles, own = [], own_stages(model)
    for stage, (module, patch) in enumerate(own):
        handles += [patch.register_forward_hook(keep(entries, stage)), module.register_forward_hook(keep(ends, stage))]
    if not own:
        blocks = [block.module for block in parts.blocks(model)]
        last = spaced(len(blocks), stages)
        for stage, (start, end) in enumerate(zip([0, *(i + 1 for i in last)], last)):
            handles.append(blocks[start].register_forward_pre_hook(enter(stage), with_kwargs=True))
            handles.append(blocks[end].register_forward_hook(keep(ends, stage)))

    def features(images: Float[Tensor, "B C H W"]) -> Features:
        if own:
            sizes = [entry[1:] for entry in entries.values()]
            return Features([_map(ends[m], *size) for m, size in enumerate(sizes)], [_first(e).float() for e in entries.values()])
        size = [side // patch for side, patch in zip(images.shape[2:], _patch_size(model))]
        count = math.prod(size)
        embeddings = [entries[m][:, -count:].float() for m in range(stages)]
        return Features([_map(_first(ends[m])[:, -count:], *size) for m in range(stages)], embeddings)

    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def _first(out: Any) -> Tensor:
    return _first(out[0]) if isinstance(out, tuple) else out


def _map(out: Any, height: int, width: int) -> Float[Tensor, "B C H W"]:
    """Tokens (B,N,C), or what is a map already, as a float32 map."""
    out = _first(out).float()
    return out if out.ndim == 4 else out.mT.unflatten(2, (height, width))


def _patch_size(model: nn.Module) -> tuple[int, int]:
    size = model.config.patch_size
    return (size, size) if isinstance(size, int) else tuple(size)
