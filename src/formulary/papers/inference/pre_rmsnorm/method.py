"""Pre-RMSNorm: an exact rewrite of a pre-LN Transformer in which every LayerNorm becomes the cheaper RMSNorm.

LayerNorm ignores the mean of the residual stream, so what writes to the stream may be centered without changing any output:
W <- W - mean over output rows, b <- b - mean(b), and the embedding likewise. The stream x then has zero mean, and
LayerNorm(x) = gamma * RMSNorm(x) + beta with RMSNorm(x) = x / sqrt(mean(x^2) + eps); gamma and beta are folded into the
linear maps that read the norm: W <- W diag(gamma), b <- b + W beta. Source: arXiv:2305.14858, sections 3.1 and 3.2.

A zero-mean vector of width d is known from d - 1 entries. `CRMSNorm`, `compress_writer` and `compress_reader` (section 3.3) drop
the last one; they are here as identities and are not applied to whole models, whose width would become odd.

LayerScale (DINOv2) multiplies what is written, so it is folded into the writer before centering. Decoders tie the embedding to
the head, which must not be centered, so their first block centers the stream on entry, and the last norm keeps gamma and beta.
Dropout would break the zero mean: the rewrite is for inference.

>>> from formulary.lab import small
>>> model, report = PreRMSNorm().apply(small.tiny("vit"))
>>> report.headline
'pre-rmsnorm on 5 norms, 2 % of the weights; gamma and beta folded into the next linear at 4 of 5 norms'
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formulary.contracts import BlockEdit, Replacement, Transform, parts
from formulary.errors import FormularyError


class RMSNorm(Replacement):
    """x / sqrt(mean(x^2) + eps) over the last dimension (..., dim), with weight and bias when `affine`."""

    def __init__(self, dim: int, eps: float = 1e-6, affine: bool = False):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        x = x * torch.rsqrt(norm * norm / self.dim + self.eps)
        return x if self.weight is None else torch.addcmul(self.bias, x, self.weight)


class CenteredInput(BlockEdit):
    """Takes the mean out of the residual stream as it enters the block, which LayerNorm would not have seen."""

    def before(self, hidden):
        hidden = super().before(hidden)
        return hidden - hidden.mean(-1, keepdim=True)


class CRMSNorm(nn.Module):
    """RMSNorm of a zero-mean vector from its first d - 1 entries: x / sqrt((sum x^2 + (sum x)^2) / d + eps), (..., d-1) in and out.

    >>> x = torch.tensor([[1.0, -3.0, 2.0]])
    >>> torch.allclose(CRMSNorm(3, 0.0)(x[:, :2]), RMSNorm(3, 0.0)(x)[:, :2])
    True
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x: Float[Tensor, "*batch short"]) -> Float[Tensor, "*batch short"]:
        total = x.square().sum(-1, keepdim=True) + x.sum(-1, keepdim=True).square()
        return x * torch.rsqrt(total / self.dim + self.eps)


def center(weight: Float[Tensor, "out *rest"]) -> Float[Tensor, "out *rest"]:
    """The weight or bias with its mean over output rows taken out, so that what it writes has zero mean."""
    return weight - weight.mean(0, keepdim=True)


def compress_writer(weight: Float[Tensor, "out *rest"]) -> Float[Tensor, "short *rest"]:
    """A centered output projection without its last row: it writes d - 1 entries."""
    return center(weight)[:-1]


def compress_reader(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out short"]:
    """A linear map that reads d - 1 entries of a zero-mean vector as the given one reads all d: W[:, :-1] - W[:, -1:]."""
    return weight[:, :-1] - weight[:, -1:]


class Plan(NamedTuple):
    """Where a block class keeps its norms (each with the linears that read it), and what it writes with (with its LayerScale)."""

    norms: dict[str, tuple[str, ...]]
    writers: dict[str, str | None]


_VIT = Plan(
    {"layernorm_before": ("attention.q_proj", "attention.k_proj", "attention.v_proj"), "layernorm_after": ("mlp.fc1",)},
    {"attention.o_proj": None, "mlp.fc2": None},
)
_DINOV2 = Plan(
    {"norm1": ("attention.q_proj", "attention.k_proj", "attention.v_proj"), "norm2": ("mlp.fc1",)},
    {"attention.o_proj": "layer_scale1", "mlp.fc2": "layer_scale2"},
)
PLANS = {
    "ViTLayer": _VIT,
    "DeiTLayer": _VIT,
    "Dinov2Layer": _DINOV2,
    "Dinov2WithRegistersLayer": _DINOV2,
    "GPT2Block": Plan({"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)}, {"attn.c_proj": None, "mlp.c_proj": None}),
    "OPTDecoderLayer": Plan(
        {"self_attn_layer_norm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "final_layer_norm": ("fc1",)},
        {"self_attn.out_proj": None, "fc2": None},
    ),
}
FINAL_NORMS = ("layernorm", "ln_f", "final_layer_norm")
TABLES = ("cls_token", "mask_token", "register_tokens", "distillation_token", "position_embeddings")


def plan_for(block: nn.Module) -> Plan:
    """The plan of a block; FormularyError when it is post-LN, already RMSNorm, or not known."""
    plan = next((PLANS[cls.__name__] for cls in type(block).__mro__ if cls.__name__ in PLANS), None)
    name = type(block).__name__
    if plan is None and any("RMSNorm" in type(m).__name__ or "T5LayerNorm" in type(m).__name__ for m in block.modules()):
        raise FormularyError(f"pre-rmsnorm: {name} already uses RMSNorm")
    if plan is None or getattr(block, "do_layer_norm_before", True) is False:
        raise FormularyError(f"pre-rmsnorm: {name} is not a pre-LN block that it knows (post-LN blocks cannot be rewritten)")
    missing = [path for path in (*plan.norms, *plan.writers) if not _has(block, path)]
    if missing:
        raise FormularyError(f"pre-rmsnorm: {name} has no {missing[0]} (a gated or changed feed-forward is not supported)")
    if any(not isinstance(block.get_submodule(norm), nn.LayerNorm) for norm in plan.norms):
        raise FormularyError(f"pre-rmsnorm: {name} has no LayerNorm left to rewrite")
    return plan


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class PreRMSNorm(Transform):
    """Rewrite every block, the embeddings and the last norm. It applies to the whole model, so `targets` and `ignore` are refused."""

    supports = frozenset({"vision", "decoder"})
    unit = "norm"

    def __post_init__(self):
        super().__post_init__()
        if self.targets or self.ignore:
            raise FormularyError("pre-rmsnorm rewrites the whole residual stream: it takes no targets or ignore")

    def run(self, model, data, edit, report):
        blocks = parts.blocks(model)
        plans = [plan_for(block.module) for block in blocks]
        final = next((f"{prefix}{n}" for prefix in _homes(model) for n in FINAL_NORMS if _is_norm(model, f"{prefix}{n}")), None)
        if final is None:
            raise FormularyError(f"pre-rmsnorm: {type(model).__name__} has no last LayerNorm that it knows")
        linears = {part.name: part for part in parts.linears(model, targets=["*"])}
        with torch.no_grad():
            self._center_embedding(model, blocks[0], edit)
            folded = 0
            for block, plan in zip(blocks, plans):
                for writer, scale in plan.writers.items():
                    _center_writer(linears[f"{block.name}.{writer}"], getattr(block.module, scale) if scale else None, edit)
                for norm, readers in plan.norms.items():
                    folded += _replace(model, f"{block.name}.{norm}", [linears[f"{block.name}.{r}"] for r in readers], edit, report)
            _replace(model, final, [], edit, report)
        report.note(f"gamma and beta folded into the next linear at {folded} of {len(report.changes)} norms")

    def _center_embedding(self, model, first: parts.Block, edit) -> None:
        """Vision: the patch projection and all tables. Decoders: the first block centers, since the table is the head's too."""
        if parts.kind(model) == "decoder":
            edit.edit(first.name, CenteredInput)
            return
        embeddings = model.base_model.embeddings
        conv = next(module for module in embeddings.modules() if isinstance(module, nn.Conv2d))
        edit.set(conv.weight, center(conv.weight))
        if conv.bias is not None:
            edit.set(conv.bias, center(conv.bias))
        for name, table in embeddings.named_parameters():
            if name.rpartition(".")[2] in TABLES:
                edit.set(table, table - table.mean(-1, keepdim=True))


def _homes(model) -> list[str]:
    """Prefixes under which the last norm may live: the base model, and a decoder inside it."""
    prefix = getattr(model, "base_model_prefix", "")
    base = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    return [base, f"{base}decoder.", f"{base}encoder."]


def _is_norm(model, name: str) -> bool:
    return _has(model, name) and isinstance(model.get_submodule(name), nn.LayerNorm)


def _center_writer(part: parts.Linear, scale: nn.Module | None, edit) -> None:
    weight, bias = part.weight().clone(), None if part.bias is None else part.bias.detach().clone()
    if scale is not None:
        lam = scale.lambda1.detach()
        weight, bias = lam[:, None] * weight, None if bias is None else lam * bias
        edit.set(scale.lambda1, torch.ones_like(lam))
    edit.set(part.raw, part.stored(center(weight)))
    if bias is not None:
        edit.set(part.bias, center(bias))


def _replace(model, name: str, readers: list[parts.Linear], edit, report) -> bool:
    """Put an RMSNorm at `name`; True when gamma and beta went into the readers, else it keeps them."""
    old = model.get_submodule(name)
    dim, gamma = old.normalized_shape[0], old.weight
    beta = old.bias if old.bias is not None else torch.zeros_like(gamma)
    fold = bool(readers) and all(part.bias is not None or not bool(beta.any()) for part in readers)
    if fold:
        for part in readers:
            weight = part.weight().clone()
            if part.bias is not None:
                edit.set(part.bias, part.bias + weight @ beta)
            edit.set(part.raw, part.stored(weight * gamma))
    new = edit.edit(name, RMSNorm, dim=dim, eps=old.eps, affine=not fold)
    if not fold:
        new.weight.copy_(gamma)
        new.bias.copy_(beta)
    report.changed(name, 2 * dim, "folded" if fold else "keeps gamma and beta")
    return fold
