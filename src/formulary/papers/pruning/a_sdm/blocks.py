"""Blocks that may go: runs of equal ones, the model without some, and the order in which they are missed least."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formulary.contracts import parts
from formulary.errors import FormularyError

from .experts import Dropped

Batch = dict[str, Tensor]
Run = list[parts.Block]


def runs(model: nn.Module) -> list[Run]:
    """Neighbors in a stack whose weights have the same names and shapes, two or more.

    The blocks of a model of transformers are what `parts.blocks` finds; of any other module, the members of each
    `ModuleList` or `Sequential` that consist of modules and contain no such run themselves.

    >>> block = lambda width: nn.Sequential(nn.Linear(width, width), nn.ReLU())
    >>> found = runs(nn.Sequential(block(8), block(8), nn.ReLU(), block(4), block(4), block(8)))
    >>> [[block.name for block in run] for run in found]
    [['0', '1'], ['3', '4']]
    """
    blocks = parts.blocks(model) or _members(model)
    found: list[Run] = [blocks[:1]] if blocks else []
    for before, block in pairwise(blocks):
        follows = (before.stack, before.index + 1) == (block.stack, block.index)
        if follows and _shapes(before.module) == _shapes(block.module):
            found[-1].append(block)
        else:
            found.append([block])
    found = [run for run in found if len(run) > 1]
    inside = lambda run, block: run[0].stack.startswith(f"{block.name}.")
    return [run for run in found if not any(inside(other, block) for other in found for block in run)]


def _members(model: nn.Module) -> list[parts.Block]:
    return [
        parts.Block(f"{stack}.{index}".lstrip("."), child, index, stack)
        for stack, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        for index, child in enumerate(module)
        if any(True for _ in child.children()) and any(True for _ in child.parameters())
    ]


def _shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, parameter.shape) for name, parameter in module.named_parameters()]


def outputs(model: nn.Module, batch: Batch, at: Sequence[str] = ()) -> tuple[Tensor, list[Tensor]]:
    """(the model's output, what the modules named `at` put out), all float32.

    The output is a tensor, the first of a tuple, `logits`, or `last_hidden_state`.
    """
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    batch = {key: value.to(weight.device) for key, value in batch.items() if key != "labels"}
    batch = {key: value.to(weight.dtype) if value.is_floating_point() else value for key, value in batch.items()}
    seen: dict[str, Tensor] = {}
    hook = lambda name: lambda module, args, output: seen.__setitem__(name, output)
    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in at]
    try:
        found = model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(found, Tensor):
        found = found[0] if isinstance(found, tuple) else found.get("logits", found.get("last_hidden_state"))
    if not isinstance(found, Tensor):
        raise FormularyError(f"a-sdm compares logits or last hidden states, and {type(model).__name__} gives none")
    return found.float(), [seen[name].float() for name in at]


def distance(found: Float[Tensor, "..."], wanted: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """||found - wanted||^2 / ||wanted||^2."""
    return (found - wanted).square().mean() / wanted.square().mean().clamp(min=1e-12)


@contextmanager
def without(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """The model with these blocks left out."""
    kept = {name: model.get_submodule(name) for name in names}
    for name in names:
        model.set_submodule(name, Dropped())
    try:
        yield
    finally:
        for name, module in kept.items():
            model.set_submodule(name, module)


@torch.no_grad()
def why_not(model: nn.Module, blocks: Sequence[parts.Block], batch: Batch) -> dict[str, str]:
    """Name -> why this block cannot be left out: a run of the model shows that it does not map a tensor to its like."""
    calls: dict[str, list[bool]] = {block.name: [] for block in blocks}

    def hook(name: str):
        def see(module, args, kwargs, output):
            first = args[0] if args else next(iter(kwargs.values()), None)
            tensors = isinstance(first, Tensor) and isinstance(output, Tensor)
            calls[name].append(tensors and first.shape == output.shape)

        return see

    handles = [block.module.register_forward_hook(hook(block.name), with_kwargs=True) for block in blocks]
    try:
        outputs(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    once = {name: "the model does not call it exactly once" for name, seen in calls.items() if len(seen) != 1}
    other = {name: "it does not give back what it takes in shape" for name, seen in calls.items() if seen == [False]}
    return once | other


@torch.no_grad()
def order(model: nn.Module, found: list[Run], free: set[str], batches: list[Batch], count: int) -> list[dict]:
    """The `count` blocks to leave out, one row each: always that of `free` without which the output is closest to the
    whole model's, given those that are out already. One block of each run stays. Fewer rows where no more may go.
    """
    wanted = [outputs(model, batch)[0] for batch in batches]
    gone: list[str] = []
    rows: list[dict] = []
    while len(rows) < count:
        left = [[block.name for block in run if block.name not in gone] for run in found]
        candidates = [name for run in left if len(run) > 1 for name in run if name in free]
        if not candidates:
            break
        damage = {}
        for name in candidates:
            with without(model, [*gone, name]):
                errors = [float(distance(outputs(model, b)[0], w)) for b, w in zip(batches, wanted)]
            damage[name] = sum(errors) / len(errors)
        least = min(candidates, key=damage.__getitem__)
        gone.append(least)
        rows.append({"dropped": least, "output error": damage[least], "of": len(candidates)})
    return rows


@dataclass(frozen=True)
class Segment:
    """Neighbors of which one stays: `heir` stands in for the blocks `gone` too, up to where the block `end` was."""

    heir: parts.Block
    gone: tuple[parts.Block, ...]
    end: str


def segments(run: Run, gone: Collection[str]) -> list[Segment]:
    """One for each block of the run that stays: with those gone behind it, and the first also with those before it.

    >>> run = [parts.Block(str(i), nn.ReLU(), i, "") for i in range(6)]
    >>> [(s.heir.name, [block.name for block in s.gone], s.end) for s in segments(run, {"0", "3", "4"})]
    [('1', ['0'], '1'), ('2', ['3', '4'], '4'), ('5', [], '5')]
    """
    stay = [at for at, block in enumerate(run) if block.name not in gone]
    starts = [0, *stay[1:]]
    pieces = [run[start:end] for start, end in zip(starts, [*starts[1:], len(run)])]
    lost = lambda piece: tuple(block for block in piece if block.name in gone)
    return [Segment(run[at], lost(piece), piece[-1].name) for at, piece in zip(stay, pieces)]
