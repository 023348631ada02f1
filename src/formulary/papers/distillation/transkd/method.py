"""TransKD: a small Transformer learns the stage maps and the patch embeddings of a large one, besides its task.

    L = task + csf sum_m T^2 KL(softmax(F_m^teacher / T) || softmax(CSF_m(F^student) / T))     over positions, mean over channels
             + pea sum_m w_m mean (E_m^teacher - PEA_m(E_m^student))^2

F_m: the map (B,C,H,W) at the end of stage m, E_m: what its patch embedding gives (B,N,C). CSF fuses the student's maps from the
deepest stage to the shallowest; PEA lifts each embedding to the teacher's width; `embedding` "gl" puts GL-Mixer before the last,
"ea" adds embedding assistants (see `fusion`). All of these are thrown away after training.

Source: arXiv:2202.13393, section III. Weights w = (0.1, 0.1, 0.5, 1), lambda = T = 1 and AdamW with a linear decay are the
authors' code's, which uses this KL or, in its last version, ReviewKD's squared errors on pooled maps. It trains for 1,000 epochs
at 6e-5 from random weights. A run here has some dozens of steps and a higher rate, and a student as wide as its teacher starts
from the teacher's layers at equal distances unless `start="random"`; a narrower one is always random.

In: a vision model of transformers whose stages each have a patch embedding (SegFormer, PVTv2), or a plain ViT, whose layers are
parted into up to four stages: there w_m is on what enters the stage, a real patch embedding in the first alone, and all maps are
of one size, so that CSF has nothing to upsample. The task is the model's own loss where items have labels (maps for a segmenter),
else the teacher's classes, else the error of last states relative to the teacher's. Out: a new model of the same class.
Raises UsageError for bad parameters, FormularyError for a model whose stages are not known or that is edited.

>>> from formulary.lab import inputs_for, tiny
>>> model = tiny("vit")
>>> data = Data([{"pixel_values": image} for image in inputs_for(model, batch=4)["pixel_values"]])
>>> student, report = TransKD(steps=2).apply(model, data)
>>> model.config.num_hidden_layers, student.config.num_hidden_layers
(2, 1)
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formulary.contracts import Data, Report, Transform, parts
from formulary.contracts.edits import Editor, edits_of
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError, UsageError
from formulary.papers.distillation.minilm.method import spaced
from formulary.papers.distillation.transkd.fusion import CrossSelectiveFusion, PatchEmbeddingAlignment, channel_wise
from formulary.papers.distillation.transkd.stages import Features, own_stages, reading

STAGE_WEIGHTS = (0.1, 0.1, 0.5, 1.0)

# ---------------------------------------------------------------- the student


def new_student(teacher: nn.Module, depth: float, width: float, start: str = "teacher") -> tuple[nn.Module, str]:
    """A float32 model of the teacher's class with these shares of its layers and width, and where its weights are from.

    Layers are rounded up, widths to a multiple of the heads, of which there are as many as before. Raises UsageError when
    that is as large as the teacher.
    """
    config = copy.deepcopy(teacher.config)
    fewer = lambda layers: max(1, math.ceil(depth * layers - 1e-9))
    narrower = lambda size, heads=1: max(1, round(size * width / heads)) * heads
    if own_stages(teacher):
        config.depths = [fewer(layers) for layers in config.depths]
        config.hidden_sizes = [narrower(*pair) for pair in zip(config.hidden_sizes, config.num_attention_heads)]
        names = ("decoder_hidden_size",)
    else:
        config.num_hidden_layers = fewer(config.num_hidden_layers)
        config.hidden_size = narrower(config.hidden_size, config.num_attention_heads)
        names = ("intermediate_size",)
        if hasattr(config, "stage_names"):
            config.stage_names = config.stage_names[: config.num_hidden_layers + 1]
            config.set_output_features_output_indices(None, None)
    for name in names:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, narrower(getattr(config, name)))
    student = type(teacher)(config).float().to(next(teacher.parameters()).device).eval()
    if getattr(teacher.base_model, "pooler", teacher) is None:
        student.base_model.pooler = None
    if parts.count_weights(student) >= parts.count_weights(teacher):
        raise UsageError(f"transkd: a student of {depth:g} of the depth and {width:g} of the width is no smaller than this teacher")
    if start == "random" or width != 1:
        return student, "random weights"
    _take_layers(teacher, student)
    return student, "its teacher's weights, layers at equal distances"


def _take_layers(teacher: nn.Module, student: nn.Module) -> None:
    theirs, ours = parts.blocks(teacher), parts.blocks(student)
    inside = tuple(f"{block.name}." for block in theirs)
    state = {key: value for key, value in teacher.state_dict().items() if not key.startswith(inside)}
    for stack in dict.fromkeys(block.stack for block in ours):
        there, here = ([block for block in blocks if block.stack == stack] for blocks in (theirs, ours))
        for block, index in zip(here, spaced(len(there), len(here))):
            state |= {f"{block.name}.{key}": value for key, value in there[index].module.state_dict().items()}
    student.load_state_dict(state)


# ---------------------------------------------------------------- training


class Pupil(nn.Module):
    """The student with CSF and PEA, trained together."""

    def __init__(self, student: nn.Module, csf: CrossSelectiveFusion, pea: PatchEmbeddingAlignment):
        super().__init__()
        self.student, self.csf, self.pea = student, csf, pea


def new_pupil(student: nn.Module, wanted: Features, found: Features, embedding: str = "base") -> Pupil:
    """CSF and PEA between the student and a teacher that gave `wanted` where it gave `found`."""
    channels = lambda features: [x.shape[1] for x in features.maps]
    widths = lambda features: [x.shape[2] for x in features.embeddings]
    heads = student.config.num_attention_heads
    projections = [patch.proj for _, patch in own_stages(student)] if embedding == "ea" else ()
    pea = PatchEmbeddingAlignment(
        widths(found),
        widths(wanted),
        heads=(heads if isinstance(heads, int) else heads[-1]) if embedding == "gl" else 0,
        projections=projections,
    )
    return Pupil(student, CrossSelectiveFusion(channels(found), channels(wanted)), pea).to(found.maps[0].device)


def task_loss(out: Any, wanted: Any, labeled: bool) -> Float[Tensor, ""]:
    """The student's own loss, else cross-entropy to its teacher's classes, else the relative error of last states."""
    if labeled:
        return out.loss
    if "logits" in out:
        return F.cross_entropy(out.logits.float(), wanted.logits.argmax(1))
    ours, theirs = out.last_hidden_state.float(), wanted.last_hidden_state.float()
    if ours.shape != theirs.shape:
        return ours.new_zeros(())
    return (ours - theirs).square().sum() / theirs.square().sum()


def embedding_loss(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Float[Tensor, ""]:
    """sum_m w_m mean (wanted - found)^2; fewer than four stages have the last weights."""
    weights = (len(found) * STAGE_WEIGHTS[:1] + STAGE_WEIGHTS)[-len(found) :]
    return sum(weight * F.mse_loss(ours, theirs) for weight, ours, theirs in zip(weights, found, wanted))


def distil(
    teacher: nn.Module, student: nn.Module, data: Any, *, stages: int, steps: int, learning_rate: float, csf: float = 1.0,
    pea: float = 1.0, temperature: float = 1.0, embedding: str = "base", seed: int = 0,
) -> list[tuple[float, float, float]]:  # fmt: skip
    """Train `student` in place on batches of `data`; gives task loss, CSF's and PEA's of each step."""
    from formulary.lab import train

    terms = []
    with reading(teacher, stages) as theirs, reading(student, stages) as ours:

        def features(batch: dict[str, Tensor]) -> tuple[Any, Any, Features, Features]:
            images = {key: value for key, value in batch.items() if key != "labels"}
            with torch.no_grad():
                answer = teacher(**_cast(teacher, images))
            out = student(**_cast(student, batch))
            return answer, out, theirs(images["pixel_values"]), ours(images["pixel_values"])

        def objective(pupil: Pupil, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
            answer, out, wanted, found = features(batch)
            task = task_loss(out, answer, "labels" in batch)
            inputs = [batch["pixel_values"].float(), *found.maps[:-1]]
            maps = sum(channel_wise(a, b, temperature) for a, b in zip(pupil.csf(found.maps), wanted.maps))
            aligned = embedding_loss(pupil.pea(found.embeddings, inputs), wanted.embeddings)
            terms.append((float(task.detach()), float(maps.detach()), float(aligned.detach())))
            return task + csf * maps + pea * aligned

        with torch.no_grad():
            _, _, wanted, found = features(_first_batch(data, teacher))
        if (sizes := [x.shape[2:] for x in found.maps]) != [x.shape[2:] for x in wanted.maps]:
            raise FormularyError(f"transkd compares stage maps of one size, and the student's are {sizes}")
        pupil = new_pupil(student, wanted, found, embedding)
        train(pupil, data, steps=steps, lr=learning_rate, loss=objective, weight_decay=0.01, schedule="linear", seed=seed)
    return terms


def _first_batch(data: Any, model: nn.Module) -> dict[str, Tensor]:
    batch = data.sample(0) if hasattr(data, "sample") else data(0)
    return {key: value[:2].to(next(model.parameters()).device) for key, value in batch.items()}


def _cast(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    dtype = next(model.parameters()).dtype
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


# ---------------------------------------------------------------- the transform


@dataclass(frozen=True, kw_only=True)
class TransKD(Transform):
    """Make a student of `depth` of the layers of each stage and `width` of the channels, and train it for `steps`.

    width: a half by default; 1 where the model's states are its output. csf: lambda of the stage maps, pea: of the embeddings.
    embedding: "base", "gl" (GL-Mixer) or "ea" (embedding assistants; stages with patch embeddings only).
    """

    depth: float = 0.5
    width: float | None = None
    steps: int = 60
    learning_rate: float = 3e-4
    csf: float = 1.0
    pea: float = 1.0
    temperature: float = 1.0
    embedding: Literal["base", "gl", "ea"] = "base"
    start: Literal["teacher", "random"] = "teacher"

    supports: ClassVar[frozenset[str]] = frozenset({"vision"})
    needs_data: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    unit: ClassVar[str] = "block"
    quick: ClassVar[dict[str, Any]] = {"steps": 2}

    def __post_init__(self):
        super().__post_init__()
        if self.targets or self.ignore:
            raise UsageError("transkd makes a new model, so targets and ignore have no meaning: leave them out")
        ranges = {"depth": (1e-6, 1), "width": (1e-6, 1), "steps": (1, 10_000_000), "learning_rate": (1e-12, 1.0)}
        for name, limits in {**ranges, "csf": (0, 1e6), "pea": (0, 1e6), "temperature": (1e-3, 1e3)}.items():
            if getattr(self, name) is not None:
                check_range("transkd", name, getattr(self, name), *limits)
        for name, known in (("embedding", ("base", "gl", "ea")), ("start", ("teacher", "random"))):
            if getattr(self, name) not in known:
                raise UsageError(f"transkd: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    def run(self, model: nn.Module, data: Data, edit: Editor, report: Report) -> nn.Module:
        model.eval()
        kind, stages = self._admit(model, data)
        width = self.width or (1.0 if kind == "states" else 0.5)
        student, origin = new_student(model, self.depth, width, self.start)
        stages = stages or min(len(STAGE_WEIGHTS), len(parts.blocks(student)))
        data = self._labeled(model, data, kind, report)
        settings = {name: getattr(self, name) for name in ("steps", "learning_rate", "csf", "pea", "temperature", "embedding")}
        terms = distil(model, student, data, stages=stages, seed=data.seed, **settings)
        student = student.eval().to(next(model.parameters()).dtype)
        for block in parts.blocks(student):
            report.changed(block.name, parts.count_weights(block.module), f"{width:g} of the width")
        first, last = (", ".join(f"{name} {value:.3g}" for name, value in zip(("task", "CSF", "PEA"), terms[i])) for i in (0, -1))
        report.note(f"{parts.count_weights(student):,} of {parts.count_weights(model):,} weights, from {origin}")
        report.note(f"{stages} stage{'s'[: stages > 1]}, {self.steps} steps, losses {first} to {last}")
        if kind == "states" and width != 1:
            report.note("its states are narrower than its teacher's, so nothing but CSF and PEA taught it: train a head on it")
        return student

    def _admit(self, model: nn.Module, data: Data) -> tuple[str, int]:
        """What the model gives ("states", "classes" or "maps" of classes), and how many stages it has (0: a plain ViT)."""
        who, own = type(model).__name__, own_stages(model)
        if edits_of(model):
            raise FormularyError("transkd copies a plain model, and this one carries edits of another method: distil first")
        plain = all(isinstance(getattr(model.config, name, None), int) for name in ("num_hidden_layers", "num_attention_heads"))
        plain = plain and hasattr(model.config, "patch_size") and len({block.stack for block in parts.blocks(model)}) == 1
        if not own and not plain:
            raise FormularyError(f"transkd needs a patch embedding in every stage, or one stack of layers; not so in this {who}")
        if not own and self.embedding == "ea":
            raise UsageError(f"transkd: embedding=ea needs a patch embedding in every stage, and this {who} has one alone")
        with torch.no_grad():
            out = model(**_cast(model, {key: x for key, x in _first_batch(data, model).items() if key != "labels"}))
        shown = out.get("logits", out.get("last_hidden_state"))
        if shown is None or ("logits" in out and shown.ndim == 4 and not own):
            wanted = "classes, maps of classes from own stages, or last states"
            raise FormularyError(f"transkd needs a model that gives {wanted}; not so this {who}")
        return "states" if "logits" not in out else "maps" if shown.ndim == 4 else "classes", len(own)

    def _labeled(self, model: nn.Module, data: Data, kind: str, report: Report) -> Data:
        """The data with labels in its items where they are the model's, else without any."""
        marks = data.labels if kind == "classes" and data.labels is not None else [item.get("labels") for item in data.items]
        bare = [{key: value for key, value in item.items() if key != "labels"} for item in data.items]
        classes = model.config.num_labels if kind != "states" else 0
        shape = {"classes": 0, "maps": 2}.get(kind)
        marks = [torch.as_tensor(mark) if isinstance(mark, int | Tensor) else None for mark in marks]
        known = all(mark is not None and mark.ndim == shape and not mark.is_floating_point() for mark in marks)
        if kind == "classes" and known:
            known = len(data.facts.get("classes", ())) in (0, classes) and 0 <= min(marks) and max(marks) < classes
        if kind == "maps" and known:
            seen = torch.cat([mark.flatten() for mark in marks]).unique()
            wrong = [c for c in seen.tolist() if c != model.config.semantic_loss_ignore_index and not 0 <= c < max(classes, 2)]
            if wrong:
                raise FormularyError(f"transkd: the label maps have class {wrong[-1]}, and the model has classes 0 to {classes - 1}")
        if known and classes:
            return replace(data, items=[{**item, "labels": mark.long()} for item, mark in zip(bare, marks)])
        if classes == 1:
            raise FormularyError("transkd: a model of one class needs labels of its own, and the data has none")
        report.note(f"no labels of the model's own: the task is its teacher's {'classes' if classes else 'last states'}")
        return replace(data, items=bare)
