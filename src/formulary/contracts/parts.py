"""The parts of a Transformer, whatever its family calls them: kind, blocks, linears, token mixers, feed-forwards.

Notable here: `linears` covers `nn.Linear`, GPT-2's transposed `Conv1D` and 3-D expert tensors under one (out, in) view;
addressing (`targets`, `ignore`) is the same for every verb: globs over dotted names, and class names; `observe` shows a
callback the inputs of each linear with padding left out.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from formulary.contracts import _seams
from formulary.errors import UsageError, nearest
from formulary.kernels.int8 import version

KINDS = ("decoder", "encoder", "encoder-decoder", "vision")


def kind(model: nn.Module) -> str:
    """`decoder`, `encoder`, `encoder-decoder`, `vision`, or `module` for anything that is no Transformer of transformers."""
    config = getattr(model, "config", None)
    if config is None or not blocks(model):
        return "module"
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    if getattr(model, "main_input_name", "") == "pixel_values":
        return "vision"
    causal = any(getattr(module, "is_causal", False) for module in model.modules())
    return "decoder" if causal else "encoder"


# ---------------------------------------------------------------- addressing


def matches(name: str, module: nn.Module, patterns: Iterable[str]) -> bool:
    """Whether a pattern names this module: a glob over its dotted name, its last component, or a class name."""
    last = name.rpartition(".")[2]
    classes = {cls.__name__ for cls in type(module).__mro__[:-2]}
    return any(fnmatchcase(name, p) or p == last or p in classes for p in patterns)


def select(named: Sequence[tuple[str, nn.Module]], targets: Sequence[str], ignore: Sequence[str]) -> list[int]:
    """Indices of `named` chosen by `targets` (all when empty) and not by `ignore`; a pattern that matches nothing is an error."""
    for option, patterns in (("targets", targets), ("ignore", ignore)):
        for pattern in patterns:
            if not any(matches(name, module, [pattern]) for name, module in named):
                names = sorted(name for name, _ in named)
                known = {*names, *(n.rpartition(".")[2] for n in names), *(type(module).__name__ for _, module in named)}
                example = nearest(pattern, known) or f"; names look like {names[0] if names else 'none'!r}"
                raise UsageError(f"{option} {pattern!r} matches nothing in this model{example}")
    return [
        index
        for index, (name, module) in enumerate(named)
        if (not targets or matches(name, module, targets)) and not matches(name, module, ignore)
    ]


# ---------------------------------------------------------------- blocks


@dataclass(frozen=True)
class Block:
    """One Transformer block: its dotted name, module, index in its stack, and the stack's dotted name."""

    name: str
    module: nn.Module
    index: int
    stack: str

    @property
    def has_seam(self) -> bool:
        """Whether an edit can act inside it (`edits.BlockEdit`)."""
        return _seams.find(type(self.module)) is not None


def blocks(model: nn.Module, targets: Sequence[str] = (), ignore: Sequence[str] = ()) -> list[Block]:
    """Every unique block in order; layers that share one module (ALBERT) are one block."""
    found = []
    for stack, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            for index, child in enumerate(module):
                if _seams.is_block(child) and all(child is not block.module for block in found):
                    found.append(Block(f"{stack}.{index}", child, index, stack))
    chosen = select([(block.name, block.module) for block in found], targets, ignore) if targets or ignore else range(len(found))
    return [found[i] for i in chosen]


# ---------------------------------------------------------------- linears


@dataclass(frozen=True)
class Linear:
    """A linear map of the model under one view. `weight()` is (out, in), or (experts, out, in) for expert tensors.

    `name` is the module's dotted name; for expert tensors the parameter's (`...experts.down_proj`).
    """

    name: str
    module: nn.Module
    layout: str  # "linear" (out, in), "conv1d" (in, out), "experts" (E, out, in), "experts-transposed" (E, in, out)
    parameter: str = "weight"

    @property
    def raw(self) -> nn.Parameter:
        """The parameter as the model stores it."""
        return getattr(self.module, self.parameter)

    @property
    def transposed(self) -> bool:
        return self.layout in ("conv1d", "experts-transposed")

    @property
    def experts(self) -> int:
        """Number of experts stacked in the parameter; 0 for a plain linear."""
        return self.raw.shape[0] if self.layout.startswith("experts") else 0

    @property
    def in_features(self) -> int:
        return self.raw.shape[-2 if self.transposed else -1]

    @property
    def out_features(self) -> int:
        return self.raw.shape[-1 if self.transposed else -2]

    @property
    def weights(self) -> int:
        """Number of weights, biases left out."""
        return self.raw.numel()

    @property
    def bias(self) -> Tensor | None:
        """(out,) or None; expert tensors have none here."""
        return getattr(self.module, "bias", None) if not self.experts else None

    def weight(self) -> Tensor:
        """The weight as (out, in) or (experts, out, in), detached; a view wherever the layout allows."""
        value = self.raw.detach()
        return value.mT if self.transposed else value

    def stored(self, weight: Tensor) -> Tensor:
        """`weight`, given as (out, in), in the layout and dtype that the model stores."""
        value = weight.mT if self.transposed else weight
        return value.to(self.raw.dtype).contiguous()


def linears(model: nn.Module, targets: Sequence[str] = (), ignore: Sequence[str] = ()) -> list[Linear]:
    """The linear maps inside the model's blocks, in forward order of registration.

    Heads, poolers, embeddings and weights tied to an embedding are left alone unless `targets` names them.
    A model without recognizable blocks gives all its linears.

    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    >>> [part.name.rpartition(".")[2] for part in linears(model)]
    ['query', 'key', 'value', 'dense', 'dense', 'dense']
    """
    every = list(_every_linear(model))
    inside = [f"{block.name}." for block in blocks(model)]
    tied = _tied(model)
    default = [
        i
        for i, part in enumerate(every)
        if (not inside or part.name.startswith(tuple(inside))) and id(part.raw) not in tied
    ]
    chosen = select([(part.name, part.module) for part in every], targets, ignore)
    return [every[i] for i in chosen if targets or i in set(default)]


def _every_linear(model: nn.Module) -> Iterator[Linear]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield Linear(name, module, "linear")
        elif isinstance(module, Conv1D):
            yield Linear(name, module, "conv1d")
        elif hasattr(module, "num_experts"):
            layout = "experts-transposed" if getattr(module, "is_transposed", False) else "experts"
            for parameter, value in module.named_parameters(recurse=False):
                if value.ndim == 3 and parameter in ("gate_up_proj", "up_proj", "down_proj"):
                    yield Linear(f"{name}.{parameter}", module, layout, parameter)


def _tied(model: nn.Module) -> set[int]:
    """Ids of parameters used by an embedding, and of the output head's weight."""
    ids = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return ids | ({id(head.weight)} if head is not None and hasattr(head, "weight") else set())


def count_weights(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


# ---------------------------------------------------------------- token mixers and feed-forwards


@dataclass(frozen=True)
class Part:
    """A module with a role in a block, and what a replacement must fit: width, heads, causality, place in the stack."""

    name: str
    module: nn.Module
    block: Block
    width: int
    heads: int
    causal: bool
    layer_index: int


def mixers(model: nn.Module, targets: Sequence[str] = (), ignore: Sequence[str] = ()) -> list[Part]:
    """The self-attention module of every block, the one that calls the attention function; cross-attention is left out."""
    return _parts(model, _attention_of, targets, ignore)


def feed_forwards(model: nn.Module, targets: Sequence[str] = (), ignore: Sequence[str] = ()) -> list[Part]:
    """The feed-forward module of every block that keeps it in one module (Llama, GPT-2, ViT, DINOv2, T5, Mixtral ...)."""
    return _parts(model, _feed_forward_of, targets, ignore)


def _parts(model, find: Callable, targets: Sequence[str], ignore: Sequence[str]) -> list[Part]:
    found = []
    for block in blocks(model):
        inner = find(block.module)
        if inner is None:
            continue
        local, module = inner
        width, heads = _width_and_heads(model, module)
        mixer = _attention_of(block.module)
        causal = bool(getattr(mixer[1], "is_causal", False)) if mixer else False
        index = getattr(mixer[1], "layer_idx", None) if mixer else None
        found.append(Part(f"{block.name}.{local}", module, block, width, heads, causal, block.index if index is None else index))
    chosen = select([(part.name, part.module) for part in found], targets, ignore)
    return [found[i] for i in chosen]


def _attention_of(block: nn.Module) -> tuple[str, nn.Module] | None:
    crossed = ("encoder_attn", "crossattention", "EncDecAttention")
    for name, module in block.named_modules():
        if any(cross in name for cross in crossed) or not name:
            continue
        if hasattr(module, "is_causal") and not any(hasattr(child, "is_causal") for child in module.children()):
            return name, module
    return None


def _feed_forward_of(block: nn.Module) -> tuple[str, nn.Module] | None:
    for name, module in block.named_modules():
        if name.rpartition(".")[2] in ("mlp", "DenseReluDense"):
            return name, module
    return None


def _width_and_heads(model, module: nn.Module) -> tuple[int, int]:
    config = getattr(module, "config", None) or model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(config, "hidden_size", None) or config.d_model
    heads = next((getattr(module, n) for n in ("num_heads", "num_attention_heads", "n_heads") if hasattr(module, n)), None)
    return width, heads or config.num_attention_heads


# ---------------------------------------------------------------- observing


@contextmanager
def observe(parts: Sequence[Linear], see: Callable[[Linear, Float[Tensor, "tokens in"], int | None], None]):
    """Within the context, `see(part, inputs, expert)` receives what flows into each linear, (tokens, in), padding left out.

    Call the yielded function as `run(model, batch)` in place of `model(**batch)`: it is what knows the batch's padding.
    `expert` is the expert's index for expert tensors, else None.
    """
    masks: dict[str, Tensor | None] = {}
    handles, latest = [], ()

    def rows(x: Tensor, mask: Tensor | None) -> Tensor:
        """The real tokens; the same tensor again for linears that are called on one input, one after the other."""
        nonlocal latest
        if not latest or latest[0] is not x or latest[1] is not mask or latest[2] != version(x):
            latest = x, mask, version(x), _real_tokens(x, mask)
        return latest[3]

    def hook_linear(part: Linear):
        def hook(module, args):
            see(part, rows(args[0], _mask_for(part.name, masks)), None)

        return part.module.register_forward_pre_hook(hook)

    def hook_experts(module: nn.Module, of: list[Linear]):
        def hook(module, args):
            for part, tokens, expert in _expert_inputs(module, of, args, _mask_for(of[0].name, masks)):
                see(part, tokens, expert)

        return module.register_forward_pre_hook(hook)

    def run(model: nn.Module, batch: dict[str, Tensor]):
        masks.update(_masks(model, batch))
        with torch.no_grad():
            return model(**batch)

    by_module: dict[int, list[Linear]] = {}
    for part in parts:
        if part.experts:
            by_module.setdefault(id(part.module), []).append(part)
        else:
            handles.append(hook_linear(part))
    handles += [hook_experts(of[0].module, of) for of in by_module.values()]
    try:
        yield run
    finally:
        latest = ()
        for handle in handles:
            handle.remove()


def _masks(model, batch: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Which positions are real, for what flows through the encoder (or the only stack) and through the decoder; None for all."""

    def mask(key):
        value = batch.get(key)
        return value.bool() if value is not None and value.ndim == 2 and not value.all() else None

    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return {"encoder": mask("attention_mask"), "decoder": mask("attention_mask")}
    decoder = mask("decoder_attention_mask")
    if batch.get("decoder_attention_mask") is None and "labels" in batch and batch["labels"].ndim == 2:
        decoder = batch["labels"] != -100
    return {"encoder": mask("attention_mask"), "decoder": decoder}


def _mask_for(name: str, masks: dict[str, Tensor | None]) -> Tensor | None:
    """The mask of the sequence that flows into the part `name`: cross-attention's keys and values read the encoder's."""
    path = name.split(".")
    crosses = any(p in ("encoder_attn", "EncDecAttention") for p in path) and path[-1] in ("k_proj", "v_proj", "k", "v")
    return masks.get("decoder" if "decoder" in path and not crosses else "encoder")


def _real_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask is None or mask.numel() != len(rows):
        return rows
    return rows[mask.reshape(-1).to(rows.device)]


def _expert_inputs(module, of: list[Linear], args, mask: Tensor | None):
    """Yield (part, inputs, expert) as the experts' own forward would route them."""
    hidden, routed = args[0].detach(), args[1]
    if hidden.ndim == 3:
        hidden, routed = hidden.flatten(0, 1), routed.flatten(0, 1)
    real = torch.ones(len(hidden), dtype=torch.bool) if mask is None or mask.numel() != len(hidden) else mask.reshape(-1)
    by_name = {part.parameter: part for part in of}
    first = by_name.get("gate_up_proj") or by_name.get("up_proj")
    first = first or Linear("", module, of[0].layout, "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj")
    for expert in range(module.num_experts):
        tokens = hidden[(routed == expert).any(-1) & real.to(hidden.device)]
        if not len(tokens):
            continue
        if first.parameter in by_name:
            yield by_name[first.parameter], tokens, expert
        if "down_proj" in by_name:
            inner = tokens @ first.weight()[expert].to(tokens.dtype).mT
            if first.parameter == "gate_up_proj":
                gate, up = inner.chunk(2, dim=-1)
                inner = module.act_fn(gate) * up
            else:
                inner = module.act_fn(inner)
            yield by_name["down_proj"], inner, expert
