"""Attention between 8-bit numbers, and the tapes on which teacher and student keep what a pass computes, so that one can
be put in the other's place.

Calls are told apart by their order alone, which is the same in both models; so a block that is called several times
(ALBERT) has as many entries.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from formulary.contracts import Attention, parts
from formulary.errors import UsageError

from ..tbt_binary_ternary.activations import per_row

SPLICES = ("output", "context", "map")


def clipped(x: Float[Tensor, "*any n"], clip: float) -> Float[Tensor, "*any n"]:
    """x within [-clip, clip] on 8 bits, 127 steps to the largest |x| of its last dimension; clipped numbers pass no
    gradient.

    >>> clipped(torch.tensor([0.0, 1.0, -9.0]), 2.54)
    tensor([ 0.0000,  1.0000, -2.5400])
    """
    return per_row(x.clamp(-clip, clip), unsigned=False)


@dataclass
class Call:
    """What one attention computed: queries and keys as they came, scaled scores, which of them count (True: a real query
    that may see the key; None: all), the map, and the context.
    """

    query: Float[Tensor, "B H L K"]
    key: Float[Tensor, "B H S K"]
    scores: Float[Tensor, "B H L S"]
    real: Bool[Tensor, "#B #H L S"] | None
    map: Float[Tensor, "B H L S"]
    context: Float[Tensor, "B H L V"]


@dataclass
class Tape:
    """What one model computed in its last pass: what entered its first block, calls of attention, outputs of the
    projections behind them, and inputs of the linears behind those.

    While `splice` names one of `SPLICES`, the model takes that from `teacher` in place of its own.
    """

    teacher: "Tape | None" = None
    splice: str | None = None
    entered: list[Tensor] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    attended: list[Tensor] = field(default_factory=list)

    def clear(self) -> None:
        """Forget the last pass."""
        for kept in (self.entered, self.calls, self.outputs, self.attended):
            kept.clear()


class ClippedAttention(Attention):
    """Attention whose queries, keys, values and probabilities are on 8 bits within [-clip, clip] (None: as they are).

    While it has a `tape`, it writes each call on it and follows its splice.
    """

    equals_sdpa = False

    def __init__(self, clip: float | None = 2.5):
        super().__init__()
        if clip is not None and not 0 < clip < 1e6:
            raise UsageError(f"teacher-intervention-qat: clip must be above 0 and below 1e6, got {clip}")
        self.clip = clip
        self.tape: Tape | None = None

    def _rounded(self, x: Float[Tensor, "*any n"]) -> Float[Tensor, "*any n"]:
        return x if self.clip is None else clipped(x, self.clip)

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
        """Attention output; a query that may see no key gets zeros."""
        if causal:
            earlier = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
            mask = earlier if mask is None else mask & earlier
        q, k, v = (self._rounded(x) for x in (query, key, value))
        scores = (q @ k.mT).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
        if bias is not None:
            scores = scores + bias
        if mask is None:
            weights = scores.softmax(-1)
        else:
            weights = scores.masked_fill(~mask, torch.finfo(torch.float32).min).softmax(-1).masked_fill(~mask, 0.0)
        given = None if self.tape is None or self.tape.splice is None else self.tape.teacher.calls[len(self.tape.calls)]
        used = given.map if given is not None and self.tape.splice == "map" else weights
        context = self._rounded(used).to(v.dtype) @ v
        if self.tape is not None:
            real = None if mask is None else mask & mask.any(-2)[..., None] if mask.shape[-1] == mask.shape[-2] else mask
            self.tape.calls.append(Call(query, key, scores, real, weights, context))
        return given.context if given is not None and self.tape.splice == "context" else context


@dataclass(frozen=True)
class Places:
    """Names of linears: those that make queries and keys, those that project contexts, and those behind these."""

    inputs: list[str]
    outputs: list[str]
    behind: list[str]


def attentions(model: nn.Module) -> list[ClippedAttention]:
    """All of them, in order."""
    return [module for module in model.modules() if isinstance(module, ClippedAttention)]


def find_places(model: nn.Module, batch: dict[str, Tensor]) -> Places:
    """Where to cut and splice, seen in one pass: queries and keys share memory with the outputs of the linears that made
    them; the first linear called after an attention projects its context, and the next reads what the attention block
    gives.
    """
    tape, called = Tape(), []
    with ExitStack() as stack:
        for part in parts.linears(model):
            see = lambda module, args, out, name=part.name: called.append((name, out, len(tape.calls)))
            stack.callback(part.module.register_forward_hook(see).remove)
        for attention in attentions(model):
            attention.tape = tape
            stack.callback(setattr, attention, "tape", None)
        with torch.no_grad():
            model(**batch)
    memory = {x.untyped_storage().data_ptr() for call in tape.calls for x in (call.query, call.key)}
    inputs = [name for name, out, _ in called if out.untyped_storage().data_ptr() in memory]
    after = [[name for name, _, calls in called if calls == i + 1][:2] for i in range(len(tape.calls))]
    once = lambda names: list(dict.fromkeys(names))
    return Places(once(inputs), once(n[0] for n in after if n), once(n[1] for n in after if len(n) > 1))


@contextmanager
def taped(model: nn.Module, places: Places, teacher: Tape | None = None) -> Iterator[Tape]:
    """Within the context, the model's tape holds its last pass (call `clear` before each) and its splice is followed:
    what flows into queries and keys is then detached, so that each layer is repaired by its own losses.
    """
    tape = Tape(teacher)

    def detached(module, args):
        return (args[0].detach(), *args[1:]) if tape.splice else None

    def projected(module, args, out):
        tape.outputs.append(out)
        return tape.teacher.outputs[len(tape.outputs) - 1] if tape.splice == "output" else None

    def attended(module, args):
        tape.attended.append(args[0])

    def entered(module, args, kwargs):
        if not tape.entered:
            tape.entered.append(args[0] if args else kwargs["hidden_states"])

    with ExitStack() as stack:
        first = parts.blocks(model)[0].module
        stack.callback(first.register_forward_pre_hook(entered, with_kwargs=True).remove)
        for names, add, hook in (
            (places.inputs, "register_forward_pre_hook", detached),
            (places.outputs, "register_forward_hook", projected),
            (places.behind, "register_forward_pre_hook", attended),
        ):
            for name in names:
                stack.callback(getattr(model.get_submodule(name), add)(hook).remove)
        for attention in attentions(model):
            attention.tape = tape
            stack.callback(setattr, attention, "tape", None)
        yield tape
