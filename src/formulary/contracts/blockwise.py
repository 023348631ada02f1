"""Runs a model one block at a time over all the data, so that each block is calibrated on the output of those already
changed.

The model's own code computes everything between blocks (masks, positions, cross-attention), and each block runs twice
in all: blocks already done hand out their recorded output instead of computing, and the run stops after the block
that is looked at. It is exact for any model that calls each block once and in order. Where a block is called more
often (ALBERT) every run is one of the whole model: exact too, and slower. Float32 products run in `kernels.float32`, with
`halves` in bfloat16.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from formulary.contracts import parts
from formulary.contracts.data import Data
from formulary.contracts.parts import Block, Linear
from formulary.kernels import float32
from formulary.kernels.compensation import Gram
from formulary.kernels.int8 import version


FEW = 16
"""Tokens that tell the order in which a model calls its blocks."""


class _Reached(Exception):
    """Ends a forward pass after the block that is looked at."""


class _Recorded:
    """The class that a finished block takes for the length of a run: it hands out what the stack's last block gave."""

    def forward(self, *args, **kwargs):
        return self._recorded[0]


class Outputs:
    """What the block of each stack that was run last gave, by batch: in memory. A subclass may keep it elsewhere."""

    def __init__(self):
        self._kept: dict[tuple[str, int], tuple[str, Any]] = {}

    def has(self, block: Block, index: int) -> bool:
        """Whether what is kept for this batch came from this very block."""
        return self._kept.get((block.stack, index), ("", None))[0] == block.name

    def put(self, block: Block, index: int, output: Any) -> None:
        """Keep the block's output in the place of its stack's earlier one; `output` is a tensor or a nest of them."""
        self._kept[block.stack, index] = block.name, map_tensors(Tensor.contiguous, output)

    def get(self, stack: str, index: int) -> Any:
        """The output that is kept."""
        return self._kept[stack, index][1]


class _Apart(Exception):
    """Two linears that had the same input so far have another one each."""


class _Grams:
    """X^T X by linear and expert. Those that are called one after the other on the very same tensor (queries, keys and values)
    share one sum.
    """

    def __init__(self, share: bool, halves: bool):
        self.share, self.halves = share, halves
        self.sums, self.leader, self.latest = {}, {}, None

    def add(self, key: tuple[str, int | None], x: Tensor) -> None:
        state = (x.data_ptr(), x.shape, x.stride(), version(x))
        same = self.latest is not None and self.latest[1] == state and self.share
        leader = self.latest[0] if same else key
        if self.leader.setdefault(key, leader) != leader:
            raise _Apart
        if leader == key:
            if key not in self.sums:
                self.sums[key] = Gram(x.shape[1], x.device, halves=self.halves)
            self.sums[key].add(x)
        self.latest = leader, state, x  # keeps x alive, so that no other tensor takes its place in memory

    def take(self, key: tuple[str, int | None]) -> Tensor | None:
        """The sum, forgotten when nothing else shares it; None where no row came."""
        self.latest = None
        leader = self.leader.pop(key, None)
        if leader is None:
            return None
        if isinstance(self.sums[leader], Gram):
            self.sums[leader] = self.sums[leader].total()
        return self.sums[leader] if leader in self.leader.values() else self.sums.pop(leader)


class Blockwise:
    """Observe a block's linears, change them, then `advance` past the block, for each of `blocks` in order.

    `outputs` is where outputs of blocks are kept. `frugal` makes `grams` hold no more than the largest matrix at a time,
    for more passes over the data. `sequential` says whether blocks are called once each and in order; a run over the
    first item tells when it is not given. `halves`: linears of a float32 model compute in bfloat16, and X^T X takes its
    factors so, where the processor has instructions for that.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        *,
        outputs: Outputs | None = None,
        frugal: bool = False,
        sequential: bool | None = None,
        halves: bool = False,
    ):
        self.model, self.data, self.frugal, self.halves = model.eval(), data, frugal, halves
        self.device = next(p.device for p in model.parameters() if p.device.type != "meta")
        self.blocks = parts.blocks(model)
        self.outputs = Outputs() if outputs is None else outputs
        self.done: set[str] = set()
        names = [block.name for block in self.blocks]
        self.sequential = self._calls() == names if sequential is None else sequential

    def observe(self, block: Block | None, linears: Sequence[Linear], see: Callable) -> None:
        """`see(part, inputs (tokens, in), expert)` for all the data, padding left out; a block of None runs the whole
        model. The others are taken to call the linears as the first batch does.
        """
        calls, last = [], None

        def looked(part, x, expert):
            see(part, x, expert)
            calls.append(part)
            if part is last:
                raise _Reached

        with parts.observe(linears, looked) as run:
            for index, batch in enumerate(self.data.batches()):
                self._run(lambda batch: run(self.model, batch), batch, index, block if self.sequential else None)
                if len(calls) == len(linears) and not any(part.experts for part in linears):
                    last = calls[-1]  # what follows it need not be computed for the other batches
                calls.clear()

    def grams(self, block: Block | None, linears: Sequence[Linear]) -> Iterator[tuple[Linear, list[Tensor | None]]]:
        """(part, X^T X of its inputs in float32, one per expert or just one), None where no token came, in order."""
        for group in self._passes(linears):
            found = self._grams(block, group, share=True)
            if found is None:
                found = self._grams(block, group, share=False)
            for part in group:
                yield part, [found.take((part.name, expert)) for expert in (range(part.experts) or [None])]

    def _grams(self, block: Block | None, linears: Sequence[Linear], share: bool) -> "_Grams | None":
        """The sums over all the data; None if linears that shared an input in one batch do not in another."""
        grams = _Grams(share, self.halves)
        try:
            self.observe(block, linears, lambda part, x, expert: grams.add((part.name, expert), x))
        except _Apart:
            return None
        return grams

    def advance(self, block: Block) -> None:
        """Record the block's output on all the data; the blocks after it will see that."""
        if self.sequential and block is not self.blocks[-1]:
            run = torch.no_grad()(lambda batch: self.model(**batch))
            for index, batch in enumerate(self.data.batches()):
                if not self.outputs.has(block, index):
                    self.outputs.put(block, index, self._run(run, batch, index, block))
            self.done.add(block.name)

    def _passes(self, linears: Sequence[Linear]) -> list[list[Linear]]:
        """The linears to observe together."""
        if not self.frugal:
            return [list(linears)]
        sizes = [gram_bytes(part) for part in linears]
        groups: list[list[Linear]] = []
        left = 0
        for part, size in zip(linears, sizes):
            if size > left:
                groups.append([])
                left = max(sizes)
            groups[-1].append(part)
            left -= size
        return groups

    def _run(self, run: Callable, batch: dict, index: int, stop: Block | None):
        """One forward pass, up to the end of the block `stop`, whose output is returned, if no observer ended it before."""
        batch = _on(self.device, batch)
        seen = []

        def reached(module, args, output):
            seen.append(output)
            raise _Reached

        with ExitStack() as stack:
            kept = {}
            for block in self.blocks:
                if stop is not None and block.module is stop.module:
                    break
                if stop is not None or block.name in self.done:
                    if block.stack not in kept:
                        kept[block.stack] = self.outputs.get(block.stack, index)
                    stack.enter_context(handing_out([block.module], kept[block.stack]))
            if stop is not None:
                handle = stop.module.register_forward_hook(reached)
                stack.callback(handle.remove)
            try:
                with float32.faster(halves=self.halves):
                    run(batch)
            except _Reached:
                return seen[0] if seen else None

    def _calls(self) -> list[str]:
        """Names of the blocks in the order in which the model calls them, from a run over the first item that ends
        where an output head begins.
        """
        called = []

        def reached(*_):
            raise _Reached

        with ExitStack() as stack, torch.no_grad():
            for block in self.blocks:
                handle = block.module.register_forward_pre_hook(lambda *_, name=block.name: called.append(name))
                stack.callback(handle.remove)
            head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
            if head is not None:
                stack.callback(head.register_forward_pre_hook(reached).remove)
            batch = next(self.data.take([0]).batches())
            if batch.keys() <= {"input_ids", "attention_mask"}:
                batch = {key: value[:, :FEW] for key, value in batch.items()}
            try:
                with float32.faster():
                    self.model(**_on(self.device, batch))
            except _Reached:
                pass
        return called


def inside(linears: Sequence[Linear], block: Block) -> list[Linear]:
    """Those of `linears` that are in the block."""
    return [part for part in linears if part.name.startswith(f"{block.name}.")]


def outside(linears: Sequence[Linear], model: nn.Module) -> list[Linear]:
    """Those of `linears` that are in no block."""
    within = tuple(f"{block.name}." for block in parts.blocks(model))
    return [part for part in linears if not part.name.startswith(within)]


def gram_bytes(part: Linear) -> int:
    """Bytes of the matrices X^T X of a linear."""
    return 4 * part.in_features**2 * max(1, part.experts)


def map_tensors(function: Callable[[Tensor], Any], nest: Any) -> Any:
    """`nest` with `function` applied to every tensor in its tuples and lists.

    >>> map_tensors(len, (torch.zeros(2), None))
    (2, None)
    """
    if isinstance(nest, Tensor):
        return function(nest)
    return type(nest)(map_tensors(function, one) for one in nest) if type(nest) in (tuple, list) else nest


@cache
def _recorded_class(cls: type) -> type:
    return type(f"Recorded{cls.__name__}", (_Recorded, cls), {"__module__": __name__})


@contextmanager
def handing_out(modules: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Within the context these blocks give `output` at once instead of computing, so that a model goes on from there.

    >>> block = nn.Linear(2, 2)
    >>> with handing_out([block], torch.ones(2)):
    ...     block(torch.zeros(2))
    tensor([1., 1.])
    """
    classes = [type(module) for module in modules]
    try:
        for module, cls in zip(modules, classes):
            module.__dict__["_recorded"] = (output,)
            module.__class__ = _recorded_class(cls)
        yield
    finally:
        for module, cls in zip(modules, classes):
            module.__class__ = cls
            module.__dict__.pop("_recorded", None)


def _on(device: torch.device, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in batch.items()}
