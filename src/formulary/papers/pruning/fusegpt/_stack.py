"""A stack of blocks taken apart: what each block received, its run on other inputs, its influence, and its removal."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from formulary.contracts import parts
from formulary.errors import FormularyError


@dataclass
class Seen:
    """One batch as the blocks saw it: block i received `inputs[i]` and `calls[i]`; `output` came out of the last."""

    inputs: list[Float[Tensor, "B L D"]]
    calls: list[tuple[tuple, dict]]
    output: Float[Tensor, "B L D"]
    real: Bool[Tensor, "B L"]

    def between(self, start: int, end: int) -> "Seen":
        """The same for blocks `start` to `end` - 1 alone; what went into other blocks is let go."""
        output = self.inputs[end] if end < len(self.inputs) else self.output
        return Seen(self.inputs[start : start + 1], self.calls[start:end], output, self.real)


@torch.no_grad()
def see(model: nn.Module, blocks: Sequence[nn.Module], batch: dict[str, Tensor]) -> Seen:
    """Run the model once. FormularyError when it does not call each block once and in order."""
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in batch.items() if key != "labels"}
    order, inputs, calls, outputs = [], [], [], []

    def before(index: int):
        def hook(module, args, kwargs):
            rest = dict(kwargs)
            order.append(index)
            inputs.append(args[0] if args else rest.pop("hidden_states"))
            calls.append((args[1:], rest))

        return hook

    handles = [block.register_forward_pre_hook(before(i), with_kwargs=True) for i, block in enumerate(blocks)]
    handles.append(blocks[-1].register_forward_hook(lambda module, args, output: outputs.append(_hidden(output))))
    try:
        model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if order != list(range(len(blocks))):
        raise FormularyError(
            f"fusegpt needs a model that calls each block once and in order; {type(model).__name__} does not"
        )
    mask = batch.get("attention_mask")
    real = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    return Seen(inputs, calls, outputs[0], real)


def run(blocks: Sequence[nn.Module], hidden: Float[Tensor, "B L D"], calls: Sequence[tuple]) -> Float[Tensor, "B L D"]:
    """`hidden` through the blocks, each with the other arguments that it was called with."""
    for block, (args, kwargs) in zip(blocks, calls, strict=True):
        hidden = _hidden(block(hidden, *args, **kwargs))
    return hidden


def _hidden(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def macro_influence(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[dict[str, Tensor]], candidates: Sequence[int]
) -> list[float]:
    """MI of each candidate: 1 - the mean, over real tokens, of the cosine between what the last block puts out with
    it and without.

    The last block's output is taken before the final norm. Without the last block, it is what the block received.
    """
    total, tokens = torch.zeros(len(candidates), dtype=torch.double), 0
    for batch in batches:
        seen = see(model, blocks, batch)
        wanted = seen.output[seen.real].double()
        tokens += len(wanted)
        for at, i in enumerate(candidates):
            found = run(blocks[i + 1 :], seen.inputs[i], seen.calls[i + 1 :])[seen.real].double()
            total[at] += nn.functional.cosine_similarity(found, wanted, dim=-1).sum().cpu()
    return (1 - total / tokens).tolist()


def remove(model: nn.Module, stack: nn.ModuleList, index: int) -> None:
    """Take block `index` out of the stack; the config and the blocks' numbers in the cache follow."""
    count, config = len(stack), model.config
    del stack[index]
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list) and len(value) == count:
            setattr(config, name, value[:index] + value[index + 1 :])
    config.num_hidden_layers = count - 1
    for number, block in enumerate(stack):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = number


def only_stack(model: nn.Module) -> str:
    """The dotted name of the one stack that holds all blocks, as many as the config says; FormularyError for any
    other model.
    """
    blocks = parts.blocks(model)
    stacks, layers = {block.stack for block in blocks}, getattr(model.config, "num_hidden_layers", None)
    if len(stacks) != 1 or layers != len(blocks):
        raise FormularyError(
            f"fusegpt needs one stack of blocks that share no weights: {type(model).__name__} has {len(blocks)} in "
            f"{len(stacks)} stacks, its config says {layers}"
        )
    if layers < 2:
        raise FormularyError("fusegpt removes whole blocks, and this model has only one")
    return stacks.pop()
