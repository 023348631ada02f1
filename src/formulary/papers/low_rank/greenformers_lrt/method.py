"""Low-Rank Transformer (LRT): every dense weight of attention and feed-forward becomes two thin factors applied in sequence.

With W in R^{m x n} written as it multiplies a row vector, y = x W + b becomes y = (x E) D + b with E in R^{m x r}, D in R^{r x n}:
parameters and multiplications fall from mn to r(m + n). After training the factors are those of the truncated singular value
decomposition, W ~ U_r S_r V_r^T, E = U_r S_r^{1/2}, D = S_r^{1/2} V_r^T, the best rank-r approximation (Eckart-Young); before
training they are random. Source: arXiv:2108.10808, chapter 3.

The thesis fine-tunes on the task; here `steps` > 0 fine-tunes the factors to reproduce the unfactorized model on unlabeled data,
since that needs no labels.

>>> from formulary.lab import small
>>> model, report = LowRankTransformer(ratio=0.5).apply(small.tiny("bert"))
>>> report.headline
'greenformers-lrt on 12 linear layers, 70 % of the weights'
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formulary.contracts import BlockTransform, Replacement, parts
from formulary.contracts.transform import check_range
from formulary.errors import UsageError


class LowRankLinear(Replacement):
    """y = (x E) D + b: (..., in_features) -> (..., out_features) through `rank` channels."""

    def __init__(self, in_features: int, rank: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.rank, self.out_features = in_features, rank, out_features
        self.reduce = nn.Linear(in_features, rank, bias=False)
        self.expand = nn.Linear(rank, out_features, bias=bias)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The product of the factors, as a linear layer of this size would store it."""
        return self.expand.weight @ self.reduce.weight

    @property
    def bias(self) -> Tensor | None:
        return self.expand.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.reduce(x))


def factorize(weight: Float[Tensor, "out in"], rank: int) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """The two factors of the truncated SVD, each with the square root of the singular values, in the weight's dtype.

    >>> import torch
    >>> reduce, expand = factorize(torch.eye(3), 3)
    >>> torch.allclose(expand @ reduce, torch.eye(3), atol=1e-6)
    True
    """
    u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    root = s[:rank].sqrt()
    return (root[:, None] * vh[:rank]).to(weight.dtype), (u[:, :rank] * root).to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class LowRankTransformer(BlockTransform):
    """Factorize the linear layers inside the blocks.

    `ratio` is the share of each layer's weights that is kept (0 to 1), which fixes r = ratio m n / (m + n); `rank` sets r itself.
    `start` is "svd" (a trained model) or "random" (before training). `steps` of fine-tuning need data.
    """

    ratio: float = 0.5
    rank: int | None = None
    start: Literal["svd", "random"] = "svd"
    steps: int = 0
    learning_rate: float = 5e-4

    observes = False
    quick = {"steps": 2}

    def __post_init__(self):
        super().__post_init__()
        check_range("greenformers-lrt", "ratio", self.ratio, 0.01, 1.0)
        if self.rank is not None:
            check_range("greenformers-lrt", "rank", self.rank, 1, 1_000_000)
        if self.start not in ("svd", "random"):
            raise UsageError(f"greenformers-lrt: start must be svd or random, got {self.start!r}")
        if self.steps < 0 or self.learning_rate <= 0:
            raise UsageError("greenformers-lrt: steps must be at least 0 and learning_rate above 0")

    @property
    def needs_data(self) -> bool:
        """Fine-tuning needs data; the decomposition alone does not."""
        return self.steps > 0

    def rank_for(self, out_features: int, in_features: int) -> int:
        """r for a layer of this size."""
        return self.rank or max(1, int(self.ratio * out_features * in_features / (out_features + in_features)))

    @property
    def streams(self) -> bool:
        """Fine-tuning runs the whole model; the decomposition alone looks at one block at a time."""
        return not self.steps

    def choose(self, model, report):
        chosen = []
        for part in parts.linears(model, self.targets, self.ignore):
            rank = self.rank_for(part.out_features, part.in_features)
            if part.experts:
                report.skipped(part.name, "expert tensors stay dense", part.weights)
            elif rank * (part.out_features + part.in_features) >= part.weights:
                report.skipped(part.name, f"rank {rank} is no smaller than dense", part.weights)
            else:
                chosen.append(part)
        return chosen

    def run_block(self, block, linears, walk, edit, report):
        for part in linears:
            rank = self.rank_for(part.out_features, part.in_features)
            self._replace(part, rank, edit)
            report.changed(part.name, part.weights, f"rank {rank} of {min(part.out_features, part.in_features)}")

    def run(self, model, data, edit, report):
        teacher = copy.deepcopy(model).eval() if self.steps else None
        super().run(model, data, edit, report)
        if self.steps and report.changes:
            new = [model.get_submodule(change.name) for change in report.changes]
            self._fine_tune(model, teacher, new, data, report)

    def _replace(self, part: parts.Linear, rank: int, edit) -> LowRankLinear:
        weight, bias = part.weight().clone(), part.bias
        layer = edit.edit(
            part.name, LowRankLinear, in_features=part.in_features, rank=rank, out_features=part.out_features, bias=bias is not None
        )
        with torch.no_grad():
            if self.start == "svd":
                reduce, expand = factorize(weight, rank)
                layer.reduce.weight.copy_(reduce)
                layer.expand.weight.copy_(expand)
            else:
                # Random factors whose product has the spread of the weight that they replace.
                nn.init.normal_(layer.reduce.weight, std=part.in_features**-0.5)
                nn.init.normal_(layer.expand.weight, std=float(weight.float().std()) * (part.in_features / rank) ** 0.5)
            if bias is not None:
                layer.expand.bias.copy_(bias)
        return layer

    def _fine_tune(self, model, teacher, new: list[LowRankLinear], data, report) -> None:
        from formulary.lab import train

        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        model.requires_grad_(False)
        for layer in new:
            layer.requires_grad_(True)

        def loss(student, batch):
            student.eval()  # dropout would be noise in what is to be reproduced
            with torch.no_grad():
                wanted = teacher(**batch)
            return _disagreement(student(**batch), wanted, batch.get("attention_mask"))

        log = train(model, data.sample, steps=self.steps, lr=self.learning_rate, loss=loss, seed=data.seed)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        report.note(f"fine-tuned for {self.steps} steps on the unfactorized model's outputs, loss {log.losses[0]:.3g} to {log.final:.3g}")


def _disagreement(ours, wanted, mask: Tensor | None) -> Tensor:
    """Mean squared difference of the outputs at real tokens, relative to the size of the wanted ones."""
    key = "logits" if "logits" in wanted else "last_hidden_state"
    a, b = ours[key].float(), wanted[key].float()
    if mask is not None and mask.shape == a.shape[:2]:
        a, b = a[mask.bool()], b[mask.bool()]
    return (a - b).square().mean() / b.square().mean()
