"""Self-distillation for further pre-training: a model goes on with masked pre-training on unlabeled target data, then a copy
of what it was before does the same, while its representation is held close to what the first attempt ended with.

    stage 0:  theta_T = argmin L_mask(theta),                              from theta_0; then frozen, the teacher
    stage 1:  min L_mask(theta) + w |h_theta(x) - h_theta_T(x)|_2^2,        from theta_0 again; the result

h is the state of [CLS] after the last norm, of the input without anything hidden, in teacher and student; the distance is a
sum over the width and a mean over the batch, w = 1. L_mask hides 75 % of the patches of an image (MAE: mean squared error of
normalized pixels) or 15 % of the tokens of a text (BERT's rule). With `rounds` above 1 the student is the next teacher.
Heads start each stage as they started the first, and those that the model had none of are thrown away.

Source: arXiv:2210.02871, section 3, and the authors' code (seanie12/self-distillation), from which h, w and the optimizer are;
it has images alone. What the paper says of texts could not be read, so masking, [CLS] and w are there by analogy. The paper's
models bring a decoder; for one that brings none, ours first learns alone on the frozen model (`head_steps`). The paper takes
20,000 steps for either stage, a run here some dozens.

In: an encoder or vision Transformer and unlabeled texts or images. Out: the same model, changed in place, to be fine-tuned. A
`ViTMAEForPreTraining` or `...ForMaskedLM` trains its own head, which then stays in the file. Raises UsageError for bad
parameters, FormularyError for models whose patches cannot be hidden, that carry edits, or in which nothing is trainable.

>>> from formulary.lab import tiny
>>> data = Data([{"pixel_values": torch.randn(3, 16, 16)} for _ in range(8)])
>>> model, report = SelfDistillation(steps=2, head_steps=1).apply(tiny("vit"), data)
>>> report.headline
'self-distill-further-pretraining on 2 blocks, ... % of the weights; ...'
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formulary.contracts import Data, Report, Transform, parts
from formulary.contracts.edits import Editor, edits_of
from formulary.contracts.transform import check_range, in_float32
from formulary.errors import FormularyError, UsageError

from .masking import HEAD, Pixels, Tokens, configured

__all__ = ["SelfDistillation"]

SHARES = {"vision": 0.75, "encoder": 0.15}
"""What is hidden, by the kind of model."""
ENOUGH = 20_000
"""Steps a stage in the paper."""


def representation(model: nn.Module, inputs: dict[str, Tensor], pool: str = "cls") -> Float[Tensor, "B D"]:
    """h: the state of the first token after the last norm, or the mean over real tokens; nothing is hidden."""
    with configured(model.base_model, mask_ratio=0.0):
        states = model.base_model(**inputs).last_hidden_state
    if pool == "cls":
        return states[:, 0]
    real = inputs.get("attention_mask", torch.ones(states.shape[:2], device=states.device))[..., None]
    return (states * real).sum(1) / real.sum(1).clamp(min=1)


def distance(
    model: nn.Module, teacher: nn.Module, inputs: dict[str, Tensor], pool: str = "cls"
) -> Float[Tensor, ""]:
    """|h_model - h_teacher|_2^2, mean over the batch; no gradient enters the teacher."""
    with torch.no_grad():
        wanted = representation(teacher, inputs, pool)
    return (representation(model, inputs, pool) - wanted).square().sum(-1).mean()


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch without labels, floats in float32."""
    return {key: v.float() if v.is_floating_point() else v for key, v in batch.items() if key != "labels"}


def adamw(parameters: Sequence[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """MAE's AdamW: second moment 0.95, no decay of norms and biases."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=(0.9, 0.95), fused=True)


def moved(module: nn.Module, start: dict[str, Tensor]) -> tuple[float, float]:
    """Euclidean distance of all parameters from `start` (by name), and the norm of those."""
    before = [start[name].double() for name, _ in module.named_parameters()]
    gaps = [p.detach().double() - q for p, q in zip(module.parameters(), before, strict=True)]
    return tuple(float(sum(v.square().sum() for v in vectors)) ** 0.5 for vectors in (gaps, before))


@dataclass(frozen=True, kw_only=True)
class SelfDistillation(Transform):
    """Further pre-train for `steps`, then `rounds` times again from the start, distilled from the result before.

    rounds: 0 is further pre-training alone. weight: w. mask: the share that is hidden (0.75 of an image, 0.15 of a text). pool: h
    is the state of [CLS] ("cls") or the mean over tokens ("mean"). head_steps: in which a new head learns alone, before the first
    stage; decoder_layers, decoder_width: of the one for images, the width a multiple of 32. learning_rate: the highest, of
    AdamW, falling linearly; weight_decay.
    """

    steps: int = 30
    rounds: int = 1
    weight: float = 1.0
    mask: float | None = None
    pool: Literal["cls", "mean"] = "cls"
    head_steps: int = 30
    decoder_layers: int = 1
    decoder_width: int = 128
    learning_rate: float = 1.5e-4
    weight_decay: float = 0.01

    supports: ClassVar[frozenset[str]] = frozenset({"encoder", "vision"})
    needs_data: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    unit: ClassVar[str] = "block"
    quick: ClassVar[dict[str, Any]] = {"steps": 2, "head_steps": 1, "decoder_width": 32}

    def __post_init__(self):
        super().__post_init__()
        slug = "self-distill-further-pretraining"
        if self.targets or self.ignore:
            raise UsageError(f"{slug} trains the whole model, so targets and ignore have no meaning: leave them out")
        for name, low in {"steps": 1, "rounds": 0, "head_steps": 0, "decoder_layers": 1, "decoder_width": HEAD}.items():
            check_range(slug, name, getattr(self, name), low, 10_000_000)
        for name, low, high in (("weight", 0, 1e6), ("learning_rate", 1e-9, 1e3), ("weight_decay", 0, 1e3)):
            check_range(slug, name, getattr(self, name), low, high)
        if self.mask is not None:
            check_range(slug, "mask", self.mask, 0.01, 0.99)
        if self.pool not in ("cls", "mean"):
            raise UsageError(f"{slug}: pool must be cls or mean, got {self.pool!r}")
        if self.decoder_width % HEAD:
            raise UsageError(f"{slug}: decoder_width must be a multiple of {HEAD}, got {self.decoder_width}")

    def run(self, model: nn.Module, data: Data, edit: Editor, report: Report) -> None:
        if edits_of(model):
            raise FormularyError(f"{self.slug} trains a plain model, and this one carries edits: use it before other methods")
        if not any(p.requires_grad for p in model.base_model.parameters()):
            raise FormularyError(f"{self.slug} trains what requires a gradient, and nothing in this model does")
        model.eval()
        edit.keep(model)
        with in_float32(model):
            task = self.task(model, data, report)
            if self.head_steps and not task.own:
                losses = self.learn(task, partial(self.head_loss, model), data, self.head_steps)
                report.note(f"new head alone for {self.head_steps} steps, loss {losses[0]:.3g} to {losses[-1]:.3g}")
            self.stages(model, task, data, report)
        if self.steps < ENOUGH:
            report.note(f"the paper takes {ENOUGH:,} steps a stage: do not expect its gain")

    def stages(self, model: nn.Module, task: nn.Module, data: Data, report: Report) -> None:
        """Further pre-training, and as many rounds of distillation, each from the weights of now."""
        whole = nn.ModuleDict({"model": model, "task": task})
        start = {name: value.clone() for name, value in whole.state_dict().items()}
        theta = {name: p.detach().clone() for name, p in model.named_parameters()}
        teacher = None
        for stage in range(self.rounds + 1):
            whole.load_state_dict(start)
            losses = self.learn(whole, partial(self.loss, teacher=teacher), data, self.steps, stage)
            name, (far, norm) = f"distilled, round {stage}" if stage else "further pre-trained", moved(model, theta)
            report.note(f"{name} for {self.steps} steps, loss {losses[0]:.3g} to {losses[-1]:.3g}, "
                        f"moved by {far / norm:.2%} of its norm")  # fmt: skip
            report.figures[f"distance from the start, {name}"] = far
            if stage < self.rounds:
                teacher = copy.deepcopy(model).eval().requires_grad_(False)
        for block in parts.blocks(model):
            inside = {name: theta[f"{block.name}.{name}"] for name, _ in block.module.named_parameters()}
            far, norm = moved(block.module, inside)
            report.changed(block.name, parts.count_weights(block.module), f"moved by {far / norm:.2%} of its norm")
        trained = sum(p.numel() for name, p in model.named_parameters() if not torch.equal(p, theta[name]))
        report.note(f"with embeddings and all, {trained:,} of {parts.count_weights(model):,} weights moved")

    def task(self, model: nn.Module, data: Data, report: Report) -> Pixels | Tokens:
        """What is hidden, and the head that is asked for it, on the model's device."""
        kind, device = parts.kind(model), next(model.parameters()).device
        share = self.mask or SHARES[kind]
        if kind == "vision":
            pixels = inputs_of(data.sample(0))["pixel_values"].to(device)
            task = Pixels(model, pixels, share, self.decoder_width, self.decoder_layers)
        else:
            mask_token = getattr(data.processor, "mask_token_id", None)
            special = getattr(data.processor, "all_special_ids", None) or [data.pad_token_id]
            if mask_token is None:
                report.note("no mask token is known without a tokenizer that has one: hidden tokens become random ones")
            task = Tokens(model, share, mask_token, list(special))
        own = f"the head of this {type(model).__name__} is trained too, and kept"
        report.note(own if task.own else "a head of ours is thrown away")
        return task.to(device)

    def learn(self, module: nn.Module, loss, data: Data, steps: int, stage: int = 0) -> list[float]:
        """Train `module` in place on `loss(module, batch)`; gives the loss of each step."""
        from formulary.lab import train

        optimizer = partial(adamw, learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        options = {"schedule": "linear", "warmup": 0, "clip": None, "seed": data.seed + stage}
        return train(module, data, steps=steps, lr=self.learning_rate, loss=loss, optimizer=optimizer, **options).losses

    def head_loss(self, model: nn.Module, task: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
        """L_mask with the model frozen."""
        return task(model, inputs_of(batch), frozen=True)

    def loss(self, whole: nn.ModuleDict, batch: dict[str, Tensor], *, teacher: nn.Module | None) -> Float[Tensor, ""]:
        """L_mask, and with a teacher w times the distance to it."""
        model, inputs = whole["model"], inputs_of(batch)
        masked = whole["task"](model, inputs)
        return masked if teacher is None else masked + self.weight * distance(model, teacher, inputs, self.pool)
