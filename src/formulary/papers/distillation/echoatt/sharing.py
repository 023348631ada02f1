"""A layer that keeps its attention matrix, layers that use it, and how alike the attention of two layers is."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from formulary.contracts import Attention, Layer, parts
from formulary.contracts.attention import ATTRIBUTE
from formulary.contracts.layer import State
from formulary.errors import FormularyError


class Attend(Attention):
    """Softmax attention that keeps its weights, (B,H,L,S), until the last layer that echoes it has run."""

    equals_sdpa: ClassVar[bool] = False

    def __init__(self):
        super().__init__()
        self.weights: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "weights": None}

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """It always is scaled dot-product attention; `equals_sdpa` is False so that decoding comes here too."""
        return {}

    def attend(
        self,
        query: Float[Tensor, "B H L K"],
        key: Float[Tensor, "B H S K"],
        value: Float[Tensor, "B H S V"],
        *,
        mask: Bool[Tensor, "#B #H L S"] | None = None,
        bias: Float[Tensor, "#B #H L S"] | None = None,
        scale: float | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "B H L V"]:
        scores = (query @ key.mT).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores if bias is None else scores + bias
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        if mask is not None:
            nothing = ~mask.any(-1, keepdim=True)
            scores = scores.masked_fill(~(mask | nothing), -torch.inf)
        self.weights = scores.softmax(-1).to(value.dtype)
        return self.weights @ value


class Echo(Layer):
    """(B,L,D) in and out: values mixed by the weights of the layer `leader`, and the output projection.

    `last`: it is the last to use them. The state is the values of all tokens so far.
    """

    replaces = "token mixer"
    causal = True
    recurrent = True

    def __init__(
        self, width: int, heads: int, kv_heads: int, head_dim: int, last: bool, value_bias: bool, output_bias: bool
    ):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.last = heads, kv_heads, head_dim, last
        self.v_proj = nn.Linear(width, kv_heads * head_dim, value_bias)
        self.o_proj = nn.Linear(heads * head_dim, width, output_bias)
        self.leader: tuple[nn.Module, ...] = ()

    @classmethod
    def attach(cls, model: nn.Module, name: str, leader: str, **args):
        """In place of the attention `name`, reading what the attention `leader` of the same model computed just before."""
        slot = super().attach(model, name, **args)
        slot.layer.leader = (model.get_submodule(leader),)  # in a tuple, or its weights would be saved here too
        return slot

    @classmethod
    def arguments(cls, part, **settings):
        value, _, output, _ = projections(part.module)
        head_dim = output.shape[1] // part.heads
        sizes = {"heads": part.heads, "kv_heads": value.shape[0] // head_dim, "head_dim": head_dim}
        return super().arguments(part, **sizes, **settings)

    def initial_state(self, x: Float[Tensor, "B L D"]) -> State:
        return (x.new_zeros(x.shape[0], self.kv_heads, 0, self.head_dim),)

    def scan(
        self, x: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"] | None, state: State
    ) -> tuple[Float[Tensor, "B L D"], State]:
        """`mask` plays no part: the weights already are those of the leader's mask."""
        attend = getattr(self.leader[0], ATTRIBUTE)
        value = torch.cat([state[0], self.v_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)], 2)
        if attend.weights is None or attend.weights.shape[2:] != (x.shape[1], value.shape[2]):
            raise FormularyError("a layer that echoes another's attention can only run after it, on the same tokens")
        weights = attend.weights.unflatten(1, (self.kv_heads, -1)).flatten(2, 3)
        out = (weights @ value).unflatten(2, (-1, x.shape[1])).flatten(1, 2)
        if self.last:
            attend.weights = None
        return self.o_proj(out.transpose(1, 2).flatten(2)), (value,)

    def step(self, x: Float[Tensor, "B D"], state: State) -> tuple[Float[Tensor, "B D"], State]:
        y, state = self.scan(x[:, None], None, state)
        return y[:, 0], state

    def state_size(self, length: int) -> int:
        return self.kv_heads * self.head_dim * length


def projections(attention: nn.Module) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """The weights (out, in) and biases of its value and its output projection; of GPT-2's joint one, the last third.

    Raises FormularyError where it has none of a known name.
    """
    found = []
    for names in (("v_proj", "c_attn"), ("o_proj", "out_proj", "c_proj")):
        name = next((n for n in names if isinstance(getattr(attention, n, None), nn.Linear | Conv1D)), None)
        if name is None:
            raise FormularyError(f"echoatt knows no projection {' or '.join(names)} in a {type(attention).__name__}")
        linear = getattr(attention, name)
        weight = linear.weight.detach().T if isinstance(linear, Conv1D) else linear.weight.detach()
        rows = slice(len(weight) // 3 * 2 if name == "c_attn" else 0, None)
        found += [weight[rows], None if linear.bias is None else linear.bias.detach()[rows]]
    return tuple(found)


@torch.no_grad()
def similarity(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Float[Tensor, "layers layers"]:
    """cos(A_i, A_j) of the attention matrices of every two layers, mean over heads and texts; rows of padding left out."""
    mixers, before = parts.mixers(model), model.config._attn_implementation
    total, count = torch.zeros(len(mixers), len(mixers)), 0
    attends: list[Attend] = []
    try:
        for mixer in mixers:
            attends.append(getattr(Attend.attach(model, mixer.name), ATTRIBUTE))
        for batch in batches:
            model(**batch)
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[:, None, :, None]
            flat = torch.stack([F.normalize((a.weights.float() * real).flatten(2), dim=-1) for a in attends])
            total += torch.einsum("ibhx,jbhx->ij", flat, flat).cpu() / flat.shape[2]
            count += flat.shape[1]
    finally:
        for mixer in mixers[: len(attends)]:
            delattr(mixer.module, ATTRIBUTE)
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)
    return total / count
