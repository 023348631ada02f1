"""Runs a model one block at a time over all the data, so that each block is calibrated on the output of those already
changed.

The model's own code computes everything between blocks (masks, positions, cross-attention), and each block runs twice
in all: blocks already done hand out their recorded output instead of computing, and the run stops after the block
that is looked at. It is exact for any model that calls each block once and in order. Where a block is called more
often (ALBERT) every run is one of the whole model: exact too, and slower.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from formulary.contracts import Data, parts
from formulary.contracts.parts import Block, Linear


class _Reached(Exception):
    """Ends a forward pass after the block that is looked at."""


class _Recorded:
    """The class that a finished block takes for the length of a run: it hands out what the stack's last block gave."""

    def forward(self, *args, **kwargs):
        return self._recorded[0]


class Blockwise:
    """Observe a block's linears, change them, then `advance` past the block, for each of `blocks` in order."""

    def __init__(self, model: nn.Module, data: Data):
        self.model, self.data, self.device = model.eval(), data, next(model.parameters()).device
        self.blocks = parts.blocks(model)
        self.sequential = self._calls() == [block.name for block in self.blocks]
        self._outputs: dict[str, list] = {}

    def observe(self, block: Block | None, linears: Sequence[Linear], see: Callable) -> None:
        """`see(part, inputs (tokens, in), expert)` for all the data, padding left out; a block of None runs the whole
        model.
        """
        stop = block if self.sequential else None
        with parts.observe(linears, see) as run:
            for index, batch in enumerate(self.data.batches()):
                self._run(lambda batch: run(self.model, batch), batch, index, stop)

    def advance(self, block: Block) -> None:
        """Record the block's output on all the data; the blocks after it will see that."""
        if self.sequential and block is not self.blocks[-1]:
            run = torch.no_grad()(lambda batch: self.model(**batch))
            self._outputs[block.stack] = [
                self._run(run, batch, index, block) for index, batch in enumerate(self.data.batches())
            ]

    def _run(self, run: Callable, batch: dict, index: int, stop: Block | None):
        """One forward pass, up to the end of the block `stop`, whose output is returned."""
        batch = _on(self.device, batch)
        seen = []

        def reached(module, args, output):
            seen.append(output)
            raise _Reached

        with ExitStack() as stack:
            for block in self.blocks:
                if stop is None or block.module is stop.module:
                    break
                stack.enter_context(_recorded(block.module, self._outputs[block.stack][index]))
            if stop is not None:
                handle = stop.module.register_forward_hook(reached)
                stack.callback(handle.remove)
            try:
                run(batch)
            except _Reached:
                return seen[0]

    def _calls(self) -> list[str]:
        """Names of the blocks in the order in which the model calls them, from a run over the first item."""
        called = []
        with ExitStack() as stack, torch.no_grad():
            for block in self.blocks:
                handle = block.module.register_forward_pre_hook(lambda *_, name=block.name: called.append(name))
                stack.callback(handle.remove)
            batch = next(self.data.take([0]).batches())
            self.model(**_on(self.device, batch))
        return called


@contextmanager
def _recorded(module: nn.Module, output):
    cls = type(module)
    module.__class__ = type(f"Recorded{cls.__name__}", (_Recorded, cls), {"__module__": __name__})
    module.__dict__["_recorded"] = (output,)
    try:
        yield
    finally:
        module.__class__ = cls
        del module.__dict__["_recorded"]


def _on(device: torch.device, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in batch.items()}
