"""BiPFT trains an encoder whose weights and activations have 1 bit, and adds to its attention what binarizing loses,
estimated with rank-1 terms.

    W_b = mean |W| sign(W - mean W),    x_b = a sign((x - b) / a),  or a round(clip((x - b) / a, 0, 1)) if one-sided

with a and b learned, straight-through gradients, and floats behind the weights while they are trained. Of queries
Q = Q_b + e_q, keys and values, five linear maps of the layer's input X (B,L,D) to one number a token estimate the rest,
r_q = X w_1, r_k = X w_2, m_q = X w_3, m_k = X w_4, r_v = X w_5, shared by all heads:

    S = (Q_b K_b^T + m_q r_k^T + r_q m_k^T + r_q r_k^T) / sqrt(K),    context = A_b (V_b + r_v 1^T)

where r estimates what was lost, m what was kept, and A_b = softmax(S) on {0, a}. Where batches have labels the model
learns its own loss (masked language modeling, a task), else the logits of the model that it was; and hidden states of
the latter, unless `distil=false`. Applied to a model that it made, it trains that on, in binary form, on labels alone.

Source: arXiv:2312.08937, section 3, and the released code: maps in floating point with a bias, scores corrected before
they are scaled, one scale for each linear and for each row of the token table, b for each feature and in linears alone;
a teacher in pre-training (hidden states and the sentence-pair head; masked words are learned from labels), AdamW at
2e-4 falling linearly over 500,000 steps. Ours: which inputs are one-sided is seen in calibration, where the code has
probabilities alone; n in the gradient of a is a token's numbers; hidden states are compared by relative error; 200
steps at a higher rate; floats behind weights are dropped at the end unless `keep_floats`; poolers and heads stay dense.

In: an encoder or a vision Transformer of transformers, and data. Raises UsageError for parameters out of range.

>>> from formulary.lab import inputs_for, tiny
>>> from formulary.contracts import Data
>>> data = Data([{"input_ids": ids} for ids in inputs_for(tiny("bert"), batch=8)["input_ids"]])
>>> model, report = BiPFT(steps=2).apply(tiny("bert"), data)
>>> report.headline
'bipft on 13 parts, 83 % of the weights'
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formulary.contracts import Data, Report, parts
from formulary.contracts.edits import Editor
from formulary.errors import FormularyError

from .._tables import replace_table
from .._training import Inputs, LowBit, LowBitLinear, agreement, block_errors, in_float32
from ..tbt_binary_ternary.method import ONE_SIDED, TBT
from .layers import BiPFTEmbedding, BiPFTLinear, Latent, ResidualAttention, ResidualMaps


@dataclass(frozen=True, kw_only=True)
class BiPFT(TBT):
    """Weights of linears inside the blocks and of the token table, activations and attention at 1 bit.

    residual: the five maps of each attention; without them it is the paper's binary baseline. distil: learn the hidden
    states of the model as it was; false for a model with random weights. keep_floats: store the floats behind the
    weights too, 32 bits each, so that training goes on from them. embeddings: the token table too, where no head shares
    it. All else is trained as it is. With `targets`, attention and the table stay, and of the rest only biases and norms
    are trained.
    """

    residual: bool = True
    distil: bool = True
    keep_floats: bool = False
    learning_rate: float = 1e-3
    bits: int = field(default=1, init=False)
    activation_bits: int = field(default=1, init=False)

    supports = frozenset({"encoder", "vision"})
    attention: ClassVar[type[ResidualAttention]] = ResidualAttention

    def layer(self, part: parts.Linear, inputs: Inputs) -> tuple[type[LowBitLinear], dict[str, Any]]:
        return BiPFTLinear, {"unsigned": inputs.low > -ONE_SIDED * inputs.size, "floats": self.keep_floats}

    def begin(self, layer: BiPFTLinear, weight: Float[Tensor, "out in"], inputs: Inputs) -> None:
        layer.start(weight)
        layer.shifted.start(inputs.size)

    def run(self, model: nn.Module, data: Data, edit: Editor, report: Report) -> None:
        made = [(name, module) for name, module in model.named_modules() if isinstance(module, Latent)]
        labeled = "labels" in data.items[0]
        if not labeled and (made or not self.distil):
            why = "this model is binary already" if made else "distil=false"
            raise FormularyError(f"{self.slug}: {why}, so there are only labels to learn from, and {data.name} has none")
        self._go_on(made, model, data, edit, report) if made else super().run(model, data, edit, report)

    def _go_on(
        self, made: list[tuple[str, Latent]], model: nn.Module, data: Data, edit: Editor, report: Report
    ) -> None:
        """Train a model that this method made, on its labels."""
        if self.targets or self.ignore:
            report.note("training goes on for all of the model, whatever targets and ignore say")
        report.weights += sum(layer.rows * layer.columns for _, layer in made)
        edit.keep(model)
        model.eval().requires_grad_(True)
        for name, layer in made:
            edit.on_failure(partial(setattr, layer, "latent", None))
            layer.resume()
            report.changed(name, layer.rows * layer.columns, "1 bit, trained on")
        with in_float32(model):
            losses = self.train(model, None, data, [layer for _, layer in made], report)
            for _, layer in made:
                layer.finish()
        tail = losses[-max(1, len(losses) // 10) :]
        report.figures["training loss, first step and last tenth"] = [losses[0], sum(tail) / len(tail)]

    def prepare(self, model: nn.Module, teacher: nn.Module, data: Data, edit: Editor, report: Report) -> list[LowBit]:
        linears = [module for module in model.modules() if isinstance(module, BiPFTLinear)]
        report.figures["linears with one-sided inputs"] = sum(layer.shifted.unsigned for layer in linears)
        if self.targets:
            report.note("attention and the token table stay in floating point: only targets are changed")
            return []
        self._attention(model, teacher, data, edit, report)
        if self.residual:
            for mixer in parts.mixers(model):
                if hasattr(mixer.module, "formulary_attention"):
                    module = edit.edit(mixer.name, ResidualMaps, width=mixer.width)
                    module.formulary_attention.residual.to(next(teacher.parameters()).dtype)
        floats = {"floats": self.keep_floats}
        tables = replace_table(model, BiPFTEmbedding, self.ignore, edit, report, **floats) if self.embeddings else []
        rest = list(self._dense(model))
        edit.keep(nn.ParameterList(rest))
        for parameter in rest:
            parameter.requires_grad_(True)
        return tables

    def _dense(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """What stays dense and is trained: all that stands behind no binary weight."""
        latent = {id(module.latent) for module in model.modules() if isinstance(module, Latent)}
        return (parameter for parameter in model.parameters() if id(parameter) not in latent)

    def train(
        self, model: nn.Module, teacher: nn.Module | None, data: Data, layers: list[LowBit], report: Report
    ) -> list[float]:
        from formulary.lab import train

        teacher = teacher if self.distil else None
        optimizer = partial(torch.optim.AdamW, lr=self.learning_rate, weight_decay=0.0, fused=True)
        options = {"steps": self.steps, "lr": self.learning_rate, "optimizer": optimizer, "seed": data.seed}
        return train(model, data, schedule="linear", loss=partial(objective, teacher=teacher), **options).losses


def objective(model: nn.Module, batch: dict[str, Tensor], *, teacher: nn.Module | None) -> Float[Tensor, ""]:
    """The model's own loss where the batch has labels, else the distance of its logits from the teacher's; with a
    teacher, plus the mean over blocks of the relative error of hidden states. No dropout.
    """
    model.eval()
    batch = {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}
    if "labels" not in batch:
        return agreement(model, teacher, batch)
    if teacher is None:
        return model(**batch).loss
    errors, ours, _ = block_errors(model, teacher, batch)
    return ours.loss + torch.stack(errors).mean()
