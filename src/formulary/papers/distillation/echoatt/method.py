"""EchoAtt: middle layers of a decoder reuse the attention matrix of a layer before them, and distillation adjusts them.

    attend:  cos(A_i, A_j) of all layers on some text; the first and last differ from the rest, inner ones hardly
    copy:    middle layers in blocks of k; the first of a block computes A = softmax(q k' / sqrt(K) + mask), the others
             use that A, head by head, in out = concat_h(A_h (x W_v)_h) W_o: no W_q, no W_k, no cached keys
    adjust:  stage 1: hidden * error(states) + soft * T^2 KL(teacher / T || student / T) + hard * CE(teacher's choice)
             stage 2: CE of the text itself

Source: arXiv:2409.14595, section 3. All other weights are the teacher's at the start. The paper's TinyLLaMA loses about
4 % of its weights, which is k = 2 in all but a few layers at the ends. Which layers stay alone, the weights of the three
losses and T were not in what could be read of the paper: the defaults are ours. So is the error of states, each token's
squared error over its squared norm, mean over layers and tokens (the paper: MSE), since a few tokens of a language model
are a thousand times as large as the rest.

In: a causal language model and text. Out: the same model, changed in place, with fewer weights, and with cached values
alone in layers that echo. A is computed in the open, without PyTorch's fused attention: on short texts that saves time,
on long ones it may not. Gradient checkpointing is not possible. Raises UsageError for bad parameters, FormularyError
where no two layers are left.

>>> from formulary.lab import inputs_for, tiny
>>> model = tiny("llama")
>>> data = Data([{"input_ids": ids} for ids in inputs_for(model, batch=8)["input_ids"]])
>>> smaller, report = EchoAtt(first=0, last=0, steps=2, text_steps=0).apply(model, data)
>>> report.headline
'echoatt on 1 layer, ... % of the weights; attending as another layer: 1 as 0; distilled for 2 steps, loss ...'
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formulary.contracts import Data, Report, Transform, parts
from formulary.contracts.edits import Editor
from formulary.contracts.transform import check_range, in_float32
from formulary.errors import FormularyError, UsageError

from .sharing import Attend, Echo, projections, similarity

__all__ = ["Attend", "Echo", "EchoAtt"]

MEASURED = 4
"""Batches on which similarity is measured."""

# ---------------------------------------------------------------- adjusting


def labels_of(batch: dict[str, Tensor]) -> Tensor:
    """(B,L) the text's own tokens, -100 at padding."""
    ids = batch.get("labels", batch["input_ids"])
    return ids.masked_fill(batch["attention_mask"] == 0, -100) if "attention_mask" in batch else ids


def text_loss(model: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
    """Cross-entropy of each next token, in nats."""
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels_of(batch)[:, 1:].flatten())


def distillation_loss(
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    teacher: nn.Module,
    hidden: float,
    soft: float,
    hard: float,
    temperature: float,
) -> Float[Tensor, ""]:
    """Stage 1: the weighted sum of errors in states, softened logits and the teacher's likeliest tokens."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with states(teacher) as wanted, torch.no_grad():
        theirs = teacher(**inputs).logits
    with states(model) as made:
        ours = model(**inputs).logits
    real = labels_of(inputs) != -100
    pairs = zip(made, wanted, strict=True)
    errors = [(a[real] - b[real]).square().sum(-1) / b[real].square().sum(-1).clamp(min=1e-12) for a, b in pairs]
    a, b = ours[real].float(), theirs[real].float()
    divergence = F.kl_div(
        (a / temperature).log_softmax(-1), (b / temperature).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    hardened = F.cross_entropy(a, b.argmax(-1))
    return hidden * torch.stack(errors).mean() + soft * temperature**2 * divergence + hard * hardened


@contextmanager
def states(model: nn.Module) -> Iterator[list[Float[Tensor, "B L D"]]]:
    """What each block puts out in a pass within the context."""
    seen: list[Tensor] = []
    take = lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    handles = [block.module.register_forward_hook(take) for block in parts.blocks(model)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def adjust(model: nn.Module, data: Data, loss: Callable, *, steps: int, learning_rate: float) -> list[float]:
    """Train all of the model on `loss(model, batch)`, without dropout; gives the loss of each step."""
    from formulary.lab import train

    def objective(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        model.eval()
        return loss(model, batch)

    optimizer = partial(torch.optim.AdamW, lr=learning_rate, weight_decay=0.0, fused=True)
    options = {"steps": steps, "lr": learning_rate, "optimizer": optimizer, "schedule": "linear", "seed": data.seed}
    return train(model, data, loss=objective, **options).losses


# ---------------------------------------------------------------- the transform


@dataclass(frozen=True, kw_only=True)
class EchoAtt(Transform):
    """Let blocks of `share` layers use one attention matrix, and distil the model that it was into it.

    first, last: layers at the ends that stay as they are. `targets` names the layers that share instead (by their
    attentions); those that are chosen form blocks in order. steps: of stage 1; text_steps: of stage 2. hidden, soft,
    hard, temperature: of the loss of stage 1; learning_rate: the highest, of AdamW, in both stages.
    """

    share: int = 2
    first: int = 2
    last: int = 1
    steps: int = 100
    text_steps: int = 50
    hidden: float = 1.0
    soft: float = 1.0
    hard: float = 1.0
    temperature: float = 2.0
    learning_rate: float = 3e-4

    supports: ClassVar[frozenset[str]] = frozenset({"decoder"})
    needs_data: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    unit: ClassVar[str] = "layer"
    quick: ClassVar[dict[str, Any]] = {"first": 0, "last": 0, "steps": 2, "text_steps": 1}

    def __post_init__(self):
        super().__post_init__()
        check_range("echoatt", "share", self.share, 2, 1_000_000)
        for name in ("first", "last", "steps", "text_steps"):
            check_range("echoatt", name, getattr(self, name), 0, 10_000_000)
        for name in ("hidden", "soft", "hard"):
            check_range("echoatt", name, getattr(self, name), 0, 1e6)
        if self.steps and not self.hidden + self.soft + self.hard > 0:
            raise UsageError("echoatt: one of hidden, soft and hard must be above 0")
        for name in ("temperature", "learning_rate"):
            check_range("echoatt", name, getattr(self, name), 1e-9, 1e6)

    def run(self, model: nn.Module, data: Data, edit: Editor, report: Report) -> None:
        model.eval()
        device = next(model.parameters()).device
        on_device = lambda batch: {key: value.to(device) for key, value in batch.items() if key != "labels"}
        blocks = self.blocks(model, report)
        measured = data.take(range(min(len(data), MEASURED * data.batch_size)))
        alike = similarity(model, map(on_device, measured.batches()))
        report.tables["similarity of attention"] = [
            {"layer": i, **{str(j): float(value) for j, value in enumerate(row)}} for i, row in enumerate(alike)
        ]
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        edit.keep(model)
        self.copy(blocks, alike, edit, report)
        model.requires_grad_(True)
        with in_float32(model, teacher):
            weights = {name: getattr(self, name) for name in ("hidden", "soft", "hard", "temperature")}
            distilling = partial(distillation_loss, teacher=teacher, **weights)
            for name, steps, loss in (("distilled", self.steps, distilling), ("text", self.text_steps, text_loss)):
                if steps:
                    losses = adjust(model, data, loss, steps=steps, learning_rate=self.learning_rate)
                    report.note(f"{name} for {steps} steps, loss {losses[0]:.3g} to {losses[-1]:.3g}")
        report.figures["weights left"] = parts.count_weights(model) / parts.count_weights(teacher)

    def blocks(self, model: nn.Module, report: Report) -> list[list[parts.Part]]:
        """The layers of each shared block, its leader first."""
        every = parts.mixers(model)
        if self.targets or self.ignore:
            chosen = parts.mixers(model, self.targets, self.ignore)
        else:
            chosen = every[self.first : len(every) - self.last]
        found = [chosen[i : i + self.share] for i in range(0, len(chosen), self.share)]
        if not found or len(found[0]) < 2:
            raise FormularyError(f"echoatt: {len(chosen)} of {len(every)} layers are left to share; it takes two")
        for part in (part for block in found for part in block):
            projections(part.module)
            if getattr(part.module, "sliding_window", None) is not None:
                raise FormularyError(f"echoatt: {part.name} attends within a sliding window, which is not shared")
        if len(found[-1]) == 1:
            report.skipped(found[-1][0].name, "alone at the end of the shared blocks")
        return [block for block in found if len(block) > 1]

    @torch.no_grad()
    def copy(self, blocks: list[list[parts.Part]], alike: Tensor, edit: Editor, report: Report) -> None:
        """Put the edits in place, with the teacher's values and outputs."""
        every = [part.name for part in parts.mixers(edit.model)]
        for leader, *followers in blocks:
            edit.edit(leader.name, Attend)
            for part in followers:
                value, value_bias, output, output_bias = projections(part.module)
                biases = {"value_bias": value_bias is not None, "output_bias": output_bias is not None}
                sizes = Echo.arguments(part, last=part is followers[-1], **biases)
                layer = edit.edit(part.name, Echo, leader=leader.name, **sizes).layer
                for linear, weight, bias in ((layer.v_proj, value, value_bias), (layer.o_proj, output, output_bias)):
                    linear.weight.copy_(weight)
                    if bias is not None:
                        linear.bias.copy_(bias)
                gone = parts.count_weights(part.module) - parts.count_weights(layer)
                like = float(alike[every.index(leader.name), every.index(part.name)])
                report.changed(part.name, gone, f"attends as layer {leader.layer_index}, similarity {like:.2f}")
        pairs = [f"{', '.join(str(part.layer_index) for part in rest)} as {first.layer_index}" for first, *rest in blocks]
        report.note(f"attending as another layer: {', '.join(pairs)}")
