"""TBT trains a Transformer to 1- or 2-bit weights with scales from statistics, and 1- or 2-bit activations with
learned scales.

Weights, for each row w of a linear or an embedding, with a straight-through gradient:

    2 bits:  a = 4/3 mean |w|,  w^ = a round(clip(w / a, -1, 1));      1 bit:  a = mean |w|,  w^ = a sign(w)

so that the three levels of a uniform w are equally frequent. Activations ("elastic"), with a step a that is learned
and a fixed shift b, for what flows into linears, for queries, keys and values, and for attention probabilities:

    x^ = a clip(round((x - b) / a), Qn, Qp) + b,   -1..1, or 0..1 (1 bit) and 0..2 (2 bits) for what is one-sided

with the gradients of LSQ (arXiv:1902.08153): to x within the range, to a times 1 / sqrt(n Qp). The step starts at 2
mean |x|, one-sided at 4 mean |x| / sqrt(2^bits - 1). At 8 bits each token (each row of probabilities) has its own
scale, max |x|. The student is the model itself; it learns the teacher's logits, block outputs and attention maps.

Source: arXiv:2306.01841, section 3; where the paper's text and the released code could differ, the code's form is
taken: weights are not centered. Ours: which inputs are one-sided is seen in calibration (none below -1.5 mean |x|;
GELU's are), and their shift is the smallest of them, 0 at 1 bit, where the code takes each tensor's own minimum, in
which padding would count; n is a token's numbers, not the batch's; block outputs are compared by relative error.
Cross-attention's products stay in floating point.

In: any Transformer of transformers, and data. Tables tied to a head stay as they are. Raises UsageError for other bits.

>>> from formulary.lab import inputs_for, tiny
>>> from formulary.contracts import Data
>>> data = Data([{"input_ids": ids} for ids in inputs_for(tiny("bert"), batch=8)["input_ids"]])
>>> model, report = TBT(steps=2).apply(tiny("bert"), data)
>>> report.headline
'tbt-binary-ternary on 13 parts, 83 % of the weights'
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formulary.contracts import Data, Report, parts
from formulary.contracts.edits import Editor
from formulary.errors import FormularyError, UsageError

from .._training import (
    CALIBRATION_BATCHES,
    Inputs,
    LowBit,
    LowBitLinear,
    QuantizationAwareTraining,
    distil,
    signs,
)
from .activations import Elastic, ElasticAttention, check_activation, map_error

ONE_SIDED = 1.5


def low_bit_rows(
    w: Float[Tensor, "*rows columns"], bits: int
) -> tuple[Float[Tensor, "*rows columns"], Float[Tensor, "*rows 1"]]:
    """(levels, scale) of weights, row by row; the gradient to w of their product is the identity.

    >>> levels, scale = low_bit_rows(torch.tensor([[0.3, -0.1, 0.9, -0.5]]), bits=2)
    >>> levels, scale
    (tensor([[ 0.,  0.,  1., -1.]]), tensor([[0.6000]]))
    """
    scale = (w.detach().abs().mean(-1, keepdim=True) * (4 / 3 if bits == 2 else 1)).clamp(min=1e-8)
    ratio = w / scale
    levels = ratio.detach().clamp(-1, 1).round() if bits == 2 else signs(ratio.detach())
    return levels + (ratio - ratio.detach()), scale


class TBTLinear(LowBitLinear):
    """A linear map of ternary or binary weights; its input is quantized to `activation_bits` (0: not at all).

    `unsigned`: the input is one-sided, which 8 bits need not mind.
    """

    quantizer = Elastic

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        activation_bits: int,
        unsigned: bool = False,
        bias: bool = False,
    ):
        super().__init__(in_features, out_features, bits, bias)
        check_activation(activation_bits)
        self.elastic = self.quantizer(activation_bits, unsigned and activation_bits < 8) if activation_bits else None

    def low_bit(self, latent):
        return low_bit_rows(latent, self.bits)

    def incoming(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        return x if self.elastic is None else self.elastic(x, self.in_features)


class TBTEmbedding(LowBit):
    """A table of ternary or binary rows: indices to rows."""

    def __init__(self, num_embeddings: int, embedding_dim: int, bits: int, padding_idx: int | None = None):
        super().__init__(num_embeddings, embedding_dim, bits)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    def low_bit(self, latent):
        return low_bit_rows(latent, self.bits)

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch D"]:
        return self.dense(ids)


@dataclass(frozen=True, kw_only=True)
class TBT(QuantizationAwareTraining):
    """Weights of linears inside the blocks and of the token table at `bits`; activations and attention at
    `activation_bits`.

    bits: 2 (three levels) or 1. activation_bits: 1, 2, 8, or 0 for none. embeddings: quantize the token table too,
    where no head shares it. The paper trains some 20 epochs at learning rates from 1e-4 to 7e-4.
    """

    bits: int = 2
    activation_bits: int = 2
    embeddings: bool = True

    unit = "part"
    linear: ClassVar[type[TBTLinear]] = TBTLinear
    attention: ClassVar[type[ElasticAttention]] = ElasticAttention

    def __post_init__(self):
        super().__post_init__()
        if self.bits not in (1, 2):
            raise UsageError(f"tbt-binary-ternary: bits must be 1 or 2, got {self.bits}")
        check_activation(self.activation_bits)

    def layer(self, part: parts.Linear, inputs: Inputs) -> tuple[type[LowBitLinear], dict[str, Any]]:
        unsigned = inputs.low > -ONE_SIDED * inputs.size
        return self.linear, {"bits": self.bits, "activation_bits": self.activation_bits, "unsigned": unsigned}

    def begin(self, layer: TBTLinear, weight: Float[Tensor, "out in"], inputs: Inputs) -> None:
        layer.start(weight)
        if layer.elastic is not None:
            layer.elastic.start(inputs.size, inputs.low)

    def prepare(self, model: nn.Module, teacher: nn.Module, data: Data, edit: Editor, report: Report) -> list[LowBit]:
        quantizers = [layer.elastic for layer in model.modules() if isinstance(layer, TBTLinear) and layer.elastic]
        report.figures["linears with one-sided inputs"] = sum(quantizer.unsigned for quantizer in quantizers)
        if self.activation_bits and not self.targets:
            self._attention(model, teacher, data, edit, report)
        return self._table(model, edit, report) if self.embeddings and not self.targets else []

    def _attention(self, model: nn.Module, teacher: nn.Module, data: Data, edit: Editor, report: Report) -> None:
        """Set quantized attention on the model, with steps from what the teacher's attention computes."""
        watched = {}
        for mixer in parts.mixers(teacher):
            try:
                ElasticAttention.attach(teacher, mixer.name, bits=0)
            except FormularyError as error:
                report.note(f"products of attention stay in floating point: {error}")
                continue
            watched[mixer.name] = teacher.get_submodule(mixer.name).formulary_attention
            watched[mixer.name].sizes = [[], [], [], []]
        device = next(teacher.parameters()).device
        for step in range(min(CALIBRATION_BATCHES, -(-len(data) // data.batch_size))):
            with torch.no_grad():
                teacher(**{key: value.to(device) for key, value in data.sample(step).items()})
        for name, attention in watched.items():
            edit.edit(name, self.attention, bits=self.activation_bits)
            for quantizer, sizes in zip(model.get_submodule(name).formulary_attention.quantizers, attention.sizes):
                quantizer.start(max(1e-6, sum(sizes) / len(sizes)))
            attention.sizes = None
        report.figures["attentions quantized"] = len(watched)

    def _table(self, model: nn.Module, edit: Editor, report: Report) -> list[LowBit]:
        """The token table, unless something else reads it."""
        table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        if not isinstance(table, nn.Embedding):
            return []
        names = [name for name, module in model.named_modules(remove_duplicate=False) if module is table]
        if parts.matches(names[0], table, self.ignore):
            return []
        owners = sum(module._parameters.get("weight") is table.weight for module in model.modules())
        if len(names) > 1 or owners > 1:
            report.skipped(names[0], "a table that is tied stays as it is", table.weight.numel())
        elif type(table) is not nn.Embedding:
            report.skipped(names[0], "a table that is read in a way of its own", table.weight.numel())
        else:
            weight, sizes = table.weight, {"num_embeddings": table.num_embeddings, "embedding_dim": table.embedding_dim}
            new = edit.edit(names[0], TBTEmbedding, **sizes, bits=self.bits, padding_idx=table.padding_idx)
            new.start(weight)
            report.changed(names[0], weight.numel(), f"{self.bits} bits")
            return [new]
        return []

    def train(
        self, model: nn.Module, teacher: nn.Module, data: Data, layers: list[LowBit], report: Report
    ) -> list[float]:
        ours, theirs = ([m for m in one.modules() if isinstance(m, ElasticAttention)] for one in (model, teacher))
        for attention in (*ours, *theirs):
            attention.watching = True
        extra = (lambda: map_error(ours, theirs)) if ours else None
        try:
            return distil(model, teacher, data, steps=self.steps, learning_rate=self.learning_rate, extra=extra)
        finally:
            for attention in ours:
                attention.watching, attention.maps = False, None
