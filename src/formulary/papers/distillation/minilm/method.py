"""MiniLM: a student learns the self-attention of the teacher's last layer, so that its depth and width are free.

With A = softmax(Q K^T / sqrt(d_k)) and VR = softmax(V V^T / sqrt(d_k)) of the last layer, per head and with each model's own head
size d_k, over a text x of |x| real tokens and A_h heads (padding is neither a query nor a key):

    L = L_AT + L_VR,  L_AT = 1 / (A_h |x|) sum_{a,t} KL(A^teacher_{a,t} || A^student_{a,t}),  L_VR the same with VR.

A student with at most half the teacher's layers and at most half its width learns from a teacher assistant: the teacher's depth at
the student's width, itself distilled from the teacher. Source: arXiv:2002.10957, sections 3.1 to 3.3.

The paper trains for 400,000 steps on batches of 1,024 texts, asks nothing of the student's first weights, and fine-tunes on the task
afterwards. A run here has a few hundred steps, so a student as wide as its teacher starts from the teacher's weights, with layers
taken at equal distances (of 6: the 2nd, 4th and 6th), as DistilBERT does (arXiv:1910.01108); `start="random"` does without.

>>> from formulary.lab import small
>>> from formulary.contracts import Data
>>> model = small.tiny("bert")
>>> texts = Data([{"input_ids": torch.arange(3, 12)}, {"input_ids": torch.arange(20, 25)}])
>>> student, report = MiniLM(steps=2).apply(model, texts)
>>> model.config.num_hidden_layers, student.config.num_hidden_layers
(2, 1)
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from formulary.contracts import Data, Transform, parts
from formulary.contracts.edits import edits_of
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError, UsageError

_ROLES = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"))
_NEVER = -1e9


class Projections(NamedTuple):
    """Queries, keys and values of one attention layer, each (batch, heads, length, head size)."""

    query: Float[Tensor, "B H L K"]
    key: Float[Tensor, "B H L K"]
    value: Float[Tensor, "B H L K"]


# ---------------------------------------------------------------- the loss


def log_relation(a: Float[Tensor, "B H L K"], b: Float[Tensor, "B H L K"], real: Bool[Tensor, "B L"]) -> Float[Tensor, "B H L L"]:
    """log softmax(a b^T / sqrt(K)) over the real positions of `b`, in float32 or better."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    scores = a.to(dtype) @ b.to(dtype).mT / a.shape[-1] ** 0.5
    return scores.masked_fill(~real[:, None, None, :], _NEVER).log_softmax(-1)


def divergence(
    teacher: Float[Tensor, "B H L L"], student: Float[Tensor, "B H L L"], real: Bool[Tensor, "B L"]
) -> Float[Tensor, ""]:
    """KL(teacher || student) of log distributions: mean over heads and each text's real queries, then over the texts."""
    by_query = (teacher.exp() * (teacher - student)).sum(-1).mean(1)
    return ((by_query * real).sum(1) / real.sum(1).clamp(min=1)).mean()


def attention_loss(teacher: Projections, student: Projections, real: Bool[Tensor, "B L"]) -> Float[Tensor, ""]:
    """L_AT. Raises FormularyError when the numbers of heads differ."""
    _same_heads(teacher, student)
    return divergence(log_relation(teacher.query, teacher.key, real), log_relation(student.query, student.key, real), real)


def value_loss(teacher: Projections, student: Projections, real: Bool[Tensor, "B L"]) -> Float[Tensor, ""]:
    """L_VR. Raises FormularyError when the numbers of heads differ."""
    _same_heads(teacher, student)
    return divergence(log_relation(teacher.value, teacher.value, real), log_relation(student.value, student.value, real), real)


def minilm_loss(teacher: Projections, student: Projections, real: Bool[Tensor, "B L"]) -> Float[Tensor, ""]:
    """L = L_AT + L_VR."""
    return attention_loss(teacher, student, real) + value_loss(teacher, student, real)


def _same_heads(teacher: Projections, student: Projections) -> None:
    ours, theirs = student.query.shape[1], teacher.query.shape[1]
    if ours != theirs:
        raise FormularyError(f"minilm compares attention head by head: the student has {ours} heads, the teacher {theirs}")


# ---------------------------------------------------------------- reading the last layer


@contextmanager
def last_projections(model: nn.Module) -> Iterator[Callable[[], Projections]]:
    """Within the context, the yielded function gives the last layer's projections in the latest forward pass.

    Layers that share one module (ALBERT) call it several times; the last call counts. Raises FormularyError when the attention has
    no three linear layers for queries, keys and values of one size.
    """
    heads, linears = _query_key_value(model)
    seen: dict[int, Tensor] = {}

    def hook(role: int):
        return lambda module, args, output: seen.__setitem__(role, output)

    handles = [linear.register_forward_hook(hook(role)) for role, linear in enumerate(linears)]
    try:
        yield lambda: Projections(*(seen[role].unflatten(-1, (heads, -1)).transpose(1, 2) for role in range(3)))
    finally:
        for handle in handles:
            handle.remove()


def _query_key_value(model: nn.Module) -> tuple[int, list[nn.Linear]]:
    mixers = parts.mixers(model)
    if mixers:
        children, heads = dict(mixers[-1].module.named_children()), mixers[-1].heads
        for names in _ROLES:
            linears = [children.get(name) for name in names]
            if all(isinstance(linear, nn.Linear) and linear.out_features == linears[0].out_features for linear in linears):
                return heads, linears
    raise FormularyError(
        f"minilm needs separate query, key and value layers of one size in the last attention, and {type(model).__name__} has none"
    )


def real_tokens(batch: dict[str, Tensor]) -> Bool[Tensor, "B L"]:
    """Which positions of a batch are no padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def refuse_other_attention(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Raise FormularyError when the last layer's attention is not softmax(Q K^T / sqrt(d_k)) of its linears' outputs.

    Rotary or relative positions act after those linears, and the hooks would compare something else than the attention.
    """
    model = copy.deepcopy(model)  # transformers leaves hooks of its own where attention was asked for
    model.set_attn_implementation("eager")
    with last_projections(model) as projections, torch.no_grad():
        own = model.base_model(**batch, output_attentions=True).attentions
    query, key, _ = projections()
    real = real_tokens(batch)
    ours = log_relation(query, key, real).exp()
    if not own or own[-1].shape != ours.shape or ((own[-1] - ours).abs().amax((1, 3)) * real).max() > 1e-3:
        raise FormularyError(f"minilm knows softmax(QK^T/sqrt(d)) attention only, and that of {type(model).__name__} is another")


# ---------------------------------------------------------------- the student


def new_student(teacher: nn.Module, layers: int, width: int, start: str = "teacher") -> tuple[nn.Module, str]:
    """A float32 model of the teacher's class in that size, in eval mode, and where its first weights are from.

    The feed-forward keeps its proportion to the width, and the number of heads stays. Raises UsageError when the heads do not divide
    the width.
    """
    config = copy.deepcopy(teacher.config)
    before, heads = config.hidden_size, config.num_attention_heads
    if width % heads:
        near = max(1, round(width / heads)) * heads
        raise UsageError(f"minilm: the student needs the teacher's {heads} heads, which do not divide width={width}; try {near}")
    config.num_hidden_layers, config.hidden_size = layers, width
    for name in ("intermediate_size", "hidden_dim"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, max(1, round(getattr(config, name) * width / before)))
    if isinstance(getattr(config, "head_dim", None), int):
        config.head_dim = width // heads
    student = type(teacher)(config).float().to(next(teacher.parameters()).device).eval()
    if getattr(teacher.base_model, "pooler", teacher) is None:
        student.base_model.pooler = None
    if start == "random" or width != before:
        return student, "random weights"
    return student, _take_layers(teacher, student)


def spaced(count: int, chosen: int) -> list[int]:
    """`chosen` of `count` layers at equal distances, the last one among them.

    >>> spaced(6, 3), spaced(6, 4)
    ([1, 3, 5], [0, 2, 3, 5])
    """
    return [(i + 1) * count // chosen - 1 for i in range(chosen)]


def _take_layers(teacher: nn.Module, student: nn.Module) -> str:
    theirs, ours = parts.blocks(teacher), parts.blocks(student)
    taken = spaced(len(theirs), len(ours))
    state = {key: value for key, value in teacher.state_dict().items() if not any(key.startswith(f"{b.name}.") for b in theirs)}
    for block, index in zip(ours, taken):
        state |= {f"{block.name}.{key}": value for key, value in theirs[index].module.state_dict().items()}
    student.load_state_dict(state)
    if len(theirs) == 1:
        return "its teacher's weights"
    return f"its teacher's embeddings and layer{'s'[: len(taken) > 1]} {', '.join(str(i + 1) for i in taken)} of {len(theirs)}"


def distil(
    teacher: nn.Module, student: nn.Module, data: Data, *, steps: int, learning_rate: float, loss: Callable = minilm_loss
) -> list[float]:
    """Train all of `student` in place on `loss(teacher projections, student projections, real)`; gives the loss of each step."""
    from formulary.lab import train

    with last_projections(teacher) as wanted, last_projections(student) as ours:

        def objective(student: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            batch = {key: value for key, value in batch.items() if key != "labels"}
            with torch.no_grad():
                teacher.base_model(**batch)
            student.base_model(**batch)
            return loss(wanted(), ours(), real_tokens(batch))

        optimizer = adamw(learning_rate)
        log = train(
            student, data, steps=steps, lr=learning_rate, loss=objective, optimizer=optimizer, schedule="linear", seed=data.seed
        )
        return log.losses


def adamw(learning_rate: float) -> Callable:
    """AdamW without decay in one fused pass: with embeddings this large the plain one takes a third of a short step."""
    return partial(torch.optim.AdamW, lr=learning_rate, weight_decay=0.0, fused=True)


@dataclass(frozen=True, kw_only=True)
class MiniLM(Transform):
    """Make a student of `layers` (half of the teacher's by default) and `width` (the teacher's by default).

    `start` is "teacher" (its layers, where the widths agree) or "random". `assistant` puts a teacher assistant between when the student
    has at most half the layers and at most half the width; both distillations then take `steps`. The paper's `learning_rate` is 5e-4.
    """

    layers: int | None = None
    width: int | None = None
    steps: int = 150
    learning_rate: float = 5e-4
    start: Literal["teacher", "random"] = "teacher"
    assistant: bool = True

    supports = frozenset({"encoder"})
    needs_data = True
    trains = True
    unit = "layer"
    quick = {"steps": 2}

    def __post_init__(self):
        super().__post_init__()
        if self.targets or self.ignore:
            raise UsageError("minilm makes a new model, so targets and ignore have no meaning: leave them out")
        for name in ("layers", "width"):
            if getattr(self, name) is not None:
                check_range("minilm", name, getattr(self, name), 1, 1_000_000)
        check_range("minilm", "steps", self.steps, 1, 10_000_000)
        if not 0 < self.learning_rate < float("inf"):
            raise UsageError(f"minilm: learning_rate must be above 0, got {self.learning_rate}")
        if self.start not in ("teacher", "random"):
            raise UsageError(f"minilm: start must be teacher or random, got {self.start!r}")

    def run(self, model, data, edit, report):
        layers, width = self._size(model)
        model.eval()
        if self.assistant and layers <= model.config.num_hidden_layers / 2 and width <= model.config.hidden_size / 2:
            helper = self._distilled(model, model.config.num_hidden_layers, width, "assistant", data, report)
            student = self._distilled(helper, layers, width, "the assistant's student", data, report)
        else:
            student = self._distilled(model, layers, width, "student", data, report)
        student = student.to(next(model.parameters()).dtype)
        for block in parts.blocks(student):
            report.changed(block.name, parts.count_weights(block.module), f"1 of {layers} layers, width {width}")
        report.note(f"{parts.count_weights(student):,} of {parts.count_weights(model):,} weights, the embeddings trained too")
        if len(parts.blocks(model)) < model.config.num_hidden_layers:
            report.note("its layers share weights, so fewer layers save time and not space")
        report.note("the loss asks for the last layer's attention, not for the teacher's outputs: what follows that layer's "
                    "query, key and value got no gradient; fine-tune on your task, as the paper does")  # fmt: skip
        return student

    def _size(self, model: nn.Module) -> tuple[int, int]:
        """(layers, width) of the student; a one-line error for a model that cannot teach or a size that is none."""
        if edits_of(model):
            raise FormularyError("minilm copies a plain model, and this one carries edits of another method: distil first")
        _query_key_value(model)
        deep, wide = model.config.num_hidden_layers, model.config.hidden_size
        layers, width = self.layers or max(1, deep // 2), self.width or wide
        if layers > deep or width > wide or (layers, width) == (deep, wide):
            raise UsageError(f"minilm: the student must be smaller than the teacher's {deep} layers of width {wide}, not {layers} of {width}")
        groups = getattr(model.config, "num_hidden_groups", 1)
        if layers < groups:
            raise UsageError(f"minilm: this {type(model).__name__} has {groups} groups of layers, so layers must be at least {groups}")
        return layers, width

    def _distilled(self, teacher: nn.Module, layers: int, width: int, role: str, data: Data, report) -> nn.Module:
        student, origin = new_student(teacher, layers, width, self.start)
        one = {key: value[:1].to(next(student.parameters()).device) for key, value in data.sample(0).items() if key != "labels"}
        refuse_other_attention(student, one)
        losses = distil(teacher, student, data, steps=self.steps, learning_rate=self.learning_rate)
        report.note(f"{role} of {layers} layers, width {width}, from {origin}, {self.steps} steps, "
                    f"loss {losses[0]:.3g} to {losses[-1]:.3g}")  # fmt: skip
        return student
