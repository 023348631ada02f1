"""BiPFT's 1-bit linear and table, its attention, and the five maps that add rank-1 terms to any such attention; see
`method`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formulary.contracts.attention import ATTRIBUTE
from formulary.errors import FormularyError

from .._training import LowBit, LowBitLinear, signs
from ..tbt_binary_ternary.activations import ElasticAttention, elastic

SPREAD = 0.02
"""Deviation of the maps' weights at the start; their biases start at 0."""


def binary(
    w: Float[Tensor, "*rows columns"], by_row: bool, mean: Float[Tensor, ""]
) -> tuple[Float[Tensor, "*rows columns"], Float[Tensor, "*rows 1"]]:
    """(signs of w - mean, scale mean |w|, of all or of each row); the gradient to w of their product is the identity.

    >>> levels, scale = binary(torch.tensor([[0.5, 0.1], [0.3, 0.7]]), by_row=False, mean=torch.tensor(0.4))
    >>> levels, scale
    (tensor([[ 1., -1.],
            [-1.,  1.]]), tensor([[0.4000],
            [0.4000]]))
    """
    size = w.detach().abs()
    scale = (size.mean(-1, keepdim=True) if by_row else size.mean().expand(*w.shape[:-1], 1)).clamp(min=1e-8)
    ratio = w / scale
    return signs(w.detach() - mean) + (ratio - ratio.detach()), scale


class Latent(LowBit):
    """Low-bit weights that can be trained on when their training has ended: from the floats that were kept (`floats`,
    32 bits a weight), else from the weights themselves.
    """

    by_row = False

    def low_bit(self, latent):
        return binary(latent, self.by_row, self.latent.detach().mean())

    def resume(self) -> None:
        """Begin to train from where training ended."""
        self.start(self.dense() if self.floats is None else self.floats)

    def _keep(self, floats: bool) -> None:
        self.register_buffer("floats", torch.zeros(self.rows, self.columns) if floats else None)

    @torch.no_grad()
    def finish(self) -> None:
        if self.floats is not None:
            self.floats.copy_(self.latent)
        super().finish()

    @property
    def stored_bytes(self) -> int:
        return super().stored_bytes + (0 if self.floats is None else self.floats.nbytes)


class Shifted(nn.Module):
    """The quantizer of what flows into a linear: a sign((x - b) / a), or a round(clip((x - b) / a, 0, 1)) for what is
    one-sided; a step a and a shift b for each feature are learned.
    """

    def __init__(self, features: int, unsigned: bool):
        super().__init__()
        self.unsigned = unsigned
        self.step = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.zeros(features))

    @torch.no_grad()
    def start(self, size: float) -> None:
        """Set the step from the mean |x|."""
        self.step.fill_((4 if self.unsigned else 2) * size)
        self.shift.zero_()

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return elastic(x - self.shift.to(x.dtype), self.step.to(x.dtype), 1, self.unsigned, x.shape[-1])


class BiPFTLinear(Latent, LowBitLinear):
    """A linear map of weights +-s, one s in all, whose input is quantized to 1 bit by `Shifted`."""

    def __init__(
        self, in_features: int, out_features: int, unsigned: bool = False, floats: bool = False, bias: bool = False
    ):
        super().__init__(in_features, out_features, 1, bias)
        self.shifted = Shifted(in_features, unsigned)
        self._keep(floats)

    def incoming(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        return self.shifted(x)


class BiPFTEmbedding(Latent):
    """A table of rows +-s, each row with its own s: indices to rows."""

    by_row = True

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, floats: bool = False):
        super().__init__(num_embeddings, embedding_dim, 1)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self._keep(floats)

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch D"]:
        return self.dense(ids)


class ResidualAttention(ElasticAttention):
    """Attention between queries, keys, values and probabilities of 1 bit; `ResidualMaps` gives it rank-1 terms.

    `terms` (B,L,5) holds r_q, r_k, m_q, m_k and r_v of the layer's input while that is attended to. Two columns beside
    the binary queries and keys hold what is added to their products: (m_q + r_q) r_k^T + r_q m_k^T.
    """

    def __init__(self, bits: int = 1):
        super().__init__(bits)
        self.residual: nn.Linear | None = None
        self.terms: Tensor | None = None

    def _quantized(self, role: int, x: Tensor, count: int) -> Tensor:
        x = super()._quantized(role, x, count)
        if self.terms is None or role == 3:
            return x
        r_q, r_k, m_q, m_k, r_v = self.terms.to(x.dtype)[:, None].unbind(-1)
        if role == 2:
            return x + r_v[..., None]
        beside = torch.stack((m_q + r_q, r_q) if role == 0 else (r_k, m_k), -1)
        return torch.cat((x, beside.expand(-1, x.shape[1], -1, -1)), -1)


class ResidualMaps:
    """Five linear maps from the input of an attention to one number a token, on an attention that already is a
    `ResidualAttention`: its module takes a class that hands it the input.
    """

    @classmethod
    def attach(cls, model: nn.Module, name: str, width: int) -> nn.Module:
        """Add the maps, from `width` features, to the attention module `name`."""
        module = model.get_submodule(name)
        attention = getattr(module, ATTRIBUTE, None)
        if not isinstance(attention, ResidualAttention) or attention.residual is not None:
            there = "has them already" if isinstance(attention, ResidualAttention) else "is no ResidualAttention"
            raise FormularyError(f"{name} cannot take residual maps: it {there}")
        attention.residual = nn.Linear(width, 5)
        nn.init.normal_(attention.residual.weight, std=SPREAD)
        nn.init.zeros_(attention.residual.bias)
        module.__class__ = type(f"Residual{type(module).__name__}", (cls, type(module)), {"__module__": cls.__module__})
        return module

    def forward(self, hidden_states: Float[Tensor, "B L D"], *args, **kwargs):
        attention = getattr(self, ATTRIBUTE)
        attention.terms = attention.residual(hidden_states)
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            attention.terms = None
