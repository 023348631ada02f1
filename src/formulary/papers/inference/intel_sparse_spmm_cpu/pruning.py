"""Pruning to blocks: which stay, and training while the others go.

>>> weight = torch.tensor([[1.0, 3.0], [1.0, 0.0]])
>>> block_mask(weight, 0.5, block=2)
tensor([[False,  True]])
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from formulary.contracts import Data, parts
from formulary.contracts.transform import in_float32
from formulary.kernels.sparse_int8 import BLOCK

RAMP, CUTS = 2 / 3, 20
"""The share of the steps in which sparsity rises, and in how many cuts."""


def block_mask(weight: Float[Tensor, "out in"], sparsity: float, block: int = BLOCK) -> Bool[Tensor, "rows in"]:
    """True at the blocks of `block` outputs that stay: those with the largest norm, at least one."""
    squares = nn.functional.pad(weight.float().square(), (0, 0, 0, -len(weight) % block))
    norms = squares.unflatten(0, (-1, block)).sum(1)
    kept = norms.flatten().topk(max(1, round((1 - sparsity) * norms.numel()))).indices
    return torch.zeros(norms.numel(), dtype=torch.bool, device=norms.device).index_fill_(0, kept, True).view(norms.shape)


@torch.no_grad()
def cut(chosen: Sequence[parts.Linear], masks: Sequence[Tensor], block: int = BLOCK) -> None:
    """Zero what the masks do not keep."""
    for part, mask in zip(chosen, masks):
        weight = part.weight()
        weight.mul_(mask.repeat_interleave(block, 0)[: len(weight)])


def prune_and_train(
    model: nn.Module,
    chosen: Sequence[parts.Linear],
    data: Data,
    sparsity: float,
    *,
    steps: int,
    learning_rate: float,
    block: int = BLOCK,
) -> list[float]:
    """Prune in `CUTS` cuts while all of the model trains towards what it was; gives the loss of each step."""
    from formulary.lab import train

    teacher = copy.deepcopy(model).eval()
    rising = max(1, int(RAMP * steps))
    every = -(-rising // CUTS)
    masks, taken = [], 0

    def objective(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        nonlocal masks, taken
        model.eval()  # dropout would be noise in what is to be reproduced
        if masks:
            cut(chosen, masks, block)
        if taken == rising or (taken < rising and taken % every == 0):
            level = sparsity * (1 - (1 - taken / rising) ** 3)
            masks = [block_mask(part.weight(), level, block) for part in chosen]
            cut(chosen, masks, block)
        taken += 1
        return disagreement(model, teacher, batch)

    with in_float32(model, teacher):
        log = train(model, data, steps=steps, lr=learning_rate, loss=objective, seed=data.seed)
        cut(chosen, masks, block)
        cut(chosen, [block_mask(part.weight(), sparsity, block) for part in chosen], block)
    return log.losses


def disagreement(model: nn.Module, teacher: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
    """The relative squared error of the blocks' outputs at real tokens, mean over blocks, plus KL(teacher || model) of the
    logits where there are any, in nats, else the relative squared error of the last hidden states.
    """
    mask = batch.get("attention_mask")
    batch = {key: value.float() if value.is_floating_point() else value for key, value in batch.items() if key != "labels"}

    def real(x: Tensor) -> Tensor:
        fits = mask is not None and x.ndim == 3 and mask.shape == x.shape[:2]
        return x[mask.bool()] if fits else x.flatten(0, -2)

    def error(ours: Tensor, theirs: Tensor) -> Tensor:
        ours, theirs = real(ours), real(theirs)
        return (ours - theirs).square().sum() / theirs.square().sum().clamp(min=1e-12)

    with block_outputs(teacher) as wanted, torch.no_grad():
        theirs = teacher(**batch)
    with block_outputs(model) as made:
        ours = model(**batch)
    loss = torch.stack([error(a, b) for a, b in zip(made, wanted, strict=True)]).mean()
    if "logits" not in theirs:
        return loss + error(ours["last_hidden_state"], theirs["last_hidden_state"])
    a, b = (real(out["logits"]).log_softmax(-1) for out in (ours, theirs))
    return loss + (b.exp() * (b - a)).sum(-1).mean()


@contextmanager
def block_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """The hidden states after each block, in the order of the calls made within the context."""
    seen: list[Tensor] = []
    take = lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    handles = [block.module.register_forward_hook(take) for block in parts.blocks(model)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
