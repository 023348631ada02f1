"""Which norms feed linears and nothing else, found by watching where each norm's output goes in one forward pass.

A norm's scale and shift may be moved into the linears that read it only if nobody else reads it: not the residual
stream (post-norm blocks), not a router, and not the caller of the block. The pass runs under a `TorchFunctionMode`, so
it asks no model for names.
"""

from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from formulary.contracts import parts

_SAME_CHANNELS = ("view", "reshape", "flatten", "contiguous", "to")
"""Functions whose result has the same channels as their argument, if its last dimension is the same."""


class _Watch(TorchFunctionMode):
    """Follows tensors from norms to what takes them; `elsewhere` holds the norms that something but a linear read."""

    def __init__(self):
        super().__init__()
        self.norm_of: dict[int, str] = {}
        self.kept: list[Tensor] = []
        self.elsewhere: set[str] = set()
        self.inside_linear = 0

    def follow(self, tensor: Tensor, norm: str) -> None:
        """`tensor` is kept, so that its id stays its own."""
        self.norm_of[id(tensor)] = norm
        self.kept.append(tensor)

    def norms(self, value) -> set[str]:
        """The norms whose output is among the tensors of `value`."""
        return {self.norm_of[id(leaf)] for leaf in tree_leaves(value) if id(leaf) in self.norm_of}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.inside_linear and any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            read = self.norms((args, kwargs))
            same = getattr(func, "__name__", "") in _SAME_CHANNELS and isinstance(out, Tensor)
            if same and len(read) == 1 and out.shape[-1:] == args[0].shape[-1:]:
                self.follow(out, *read)
            else:
                self.elsewhere |= read
        return out


def norms_before_linears(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, list[str]]:
    """Norm inside a block -> the linears of the block that read it, for norms that nothing else reads."""
    watch = _Watch()
    sources: dict[str, set[str | None]] = {}
    inputs: dict[str, Tensor] = {}
    norms = _norms(model)

    def after_norm(name):
        def hook(module, args, output):
            watch.follow(output, name)
            inputs.setdefault(name, args[0].detach().reshape(-1, args[0].shape[-1])[:4])

        return hook

    def before_linear(name):
        def hook(module, args):
            sources.setdefault(name, set()).add(watch.norm_of.get(id(args[0])))
            watch.inside_linear += 1

        return hook

    def after_linear(module, args, output):
        watch.inside_linear -= 1

    def after_block(module, args, output):
        watch.elsewhere |= watch.norms(output if isinstance(output, tuple | list | dict) else [output])

    with ExitStack() as stack:
        handles = [norm.register_forward_hook(after_norm(name)) for name, norm in norms.items()]
        handles += [block.module.register_forward_hook(after_block) for block in parts.blocks(model)]
        for part in parts.linears(model, ["*"]):
            if not part.experts:
                handles.append(part.module.register_forward_pre_hook(before_linear(part.name)))
                handles.append(part.module.register_forward_hook(after_linear))
        for handle in handles:
            stack.callback(handle.remove)
        with torch.no_grad(), watch:
            model(**batch)
    readers: dict[str, list[str]] = {}
    for linear, norm_names in sources.items():
        if len(norm_names) > 1:
            watch.elsewhere |= norm_names - {None}
        else:
            readers.setdefault(next(iter(norm_names)), []).append(linear)
    return {
        name: readers[name]
        for name, norm in norms.items()
        if name in readers and name not in watch.elsewhere and _scales(norm, inputs[name])
    }


def _norms(model: nn.Module) -> dict[str, nn.Module]:
    """Modules inside blocks that look like norms: no children, a weight of one dimension, perhaps a bias."""
    inside = tuple(f"{block.name}." for block in parts.blocks(model))
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(inside)
        and {key for key, _ in module.named_parameters()} in ({"weight"}, {"weight", "bias"})
        and module.weight.ndim == 1
        and not list(module.children())
    }


@torch.no_grad()
def _scales(norm: nn.Module, x: Tensor) -> bool:
    """Whether the output, less the bias, grows in proportion to the weight."""
    once, twice = (torch.func.functional_call(norm, {"weight": k * norm.weight}, (x,)).double() for k in (1, 2))
    bias = 0 if getattr(norm, "bias", None) is None else norm.bias.double()
    return torch.allclose(twice - bias, 2 * (once - bias), rtol=0.02, atol=1e-3 * float(once.abs().max() + 1e-9))
