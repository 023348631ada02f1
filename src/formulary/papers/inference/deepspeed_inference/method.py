"""DeepSpeed Inference on a CPU: attention in one fused kernel, no work on padding, and weights that stream from disk.

    fuse     softmax(q k' / sqrt(d)) v per sequence, its scores never leaving the cache; with padding removed between
             the first block and the last, sum(lengths) tokens instead of batch * longest
    stream   while block i computes, block i + 1 is read ahead; what block i read is given back when it is done

Source: arXiv:2207.00032, sections 3 (kernels fused over tokens) and 6 (ZeRO-Inference). Its other parts (tensor,
pipeline and expert parallelism, CUDA graphs) are for several GPUs. Outputs are those of the unchanged model; at padded
positions they are zero instead of arbitrary.

Streaming works on a model loaded from disk (Linux), whose weights are then pages of its file: giving them back and
reading ahead are hints to the kernel (madvise), which lose nothing that was written, and memory holds about two blocks
and what is in no block. A model changed in memory runs as before.

Pixels (B,C,H,W) or ids (B,L) in, the model's own outputs out. Raises FormularyError when nothing of a model can be
fused or streamed.

>>> from formulary.lab.small import inputs_for, tiny
>>> model, report = DeepSpeedInference().apply(tiny("bert"))
>>> report.headline
'deepspeed-inference on 3 modules, 27 % of the weights'
"""

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from formulary.contracts import Attention, Data, Report, Transform, parts
from formulary.contracts.edits import Editor
from formulary.errors import FormularyError, UsageError
from formulary.kernels import encoder

from .streaming import Streamed


@dataclass(frozen=True, kw_only=True)
class DeepSpeedInference(Transform):
    """fuse: compute attention in the native kernel and leave padding out. stream: keep the blocks' weights on disk and
    read them as they are needed. Raises UsageError when both are off.
    """

    fuse: bool = True
    stream: bool = False

    supports = frozenset({"encoder", "decoder", "vision"})
    unit = "module"

    def __post_init__(self):
        super().__post_init__()
        if not (self.fuse or self.stream):
            raise UsageError("deepspeed-inference: fuse and stream are both off, so there is nothing to do")

    def run(self, model: nn.Module, data: Data | None, edit: Editor, report: Report) -> None:
        if self.fuse:
            self._fuse(model, edit, report)
        if self.stream:
            self._stream(model, edit, report)

    def _fuse(self, model: nn.Module, edit: Editor, report: Report) -> None:
        fused = 0
        for part in parts.mixers(model, self.targets, self.ignore):
            try:
                edit.edit(part.name, FusedAttention)
            except FormularyError as error:
                report.skipped(part.name, str(error), parts.count_weights(part.module))
                continue
            fused += 1
            report.changed(part.name, parts.count_weights(part.module), "attention in one kernel")
        if parts.kind(model) == "encoder" and fused:
            for stack in dict.fromkeys(block.stack.rpartition(".")[0] for block in parts.blocks(model)):
                if stack and Unpadded.fits(model.get_submodule(stack)):
                    edit.edit(stack, Unpadded)
                    report.changed(stack, 0, "padding left out")
                else:
                    report.note(f"padding stays in {stack or type(model).__name__}: its forward takes no mask")
        if encoder.path() != "C++":
            report.note(f"attention runs in {encoder.path()}: only padding is saved")

    def _stream(self, model: nn.Module, edit: Editor, report: Report) -> None:
        blocks = parts.blocks(model)
        chosen = {block.name for block in parts.blocks(model, self.targets, self.ignore)}
        for here, following in zip(blocks, [*blocks[1:], blocks[0]]):
            if here.name not in chosen:
                continue
            if not here.has_seam:
                report.skipped(here.name, "no seam is known inside it", parts.count_weights(here.module))
                continue
            ahead = following.name if following.name in chosen else ""
            edit.edit(here.name, Streamed, ahead=ahead)
            report.changed(here.name, parts.count_weights(here.module), "streamed once it is loaded from disk")
        report.note("weights stream when the result is loaded from disk; in memory it runs as before")


# ---------------------------------------------------------------- fused


class _Packed(threading.local):
    """Where the sequences start, while an `Unpadded` stack is running."""

    starts: Int[Tensor, "n"] | None = None


_PACKED = _Packed()


class FusedAttention(Attention):
    """Softmax attention by the native kernel; what it does not cover (a bias, a mask with structure) by PyTorch's."""

    @classmethod
    def full_budget(cls) -> dict:
        return {}

    def attend(
        self,
        query: Float[Tensor, "B H L K"],
        key: Float[Tensor, "B H S K"],
        value: Float[Tensor, "B H S K"],
        *,
        mask: Bool[Tensor, "#B #H L S"] | None = None,
        bias: Float[Tensor, "#B #H L S"] | None = None,
        scale: float | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "B H L K"]:
        batch, heads, length, width = query.shape
        if mask is not None or bias is not None or key.shape[2] != length or torch.compiler.is_compiling():
            plain = mask if bias is None else bias if mask is None else bias.masked_fill(~mask, -torch.inf)
            plain = plain if plain is None or plain.dtype == torch.bool else plain.to(query.dtype)
            return nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=plain, scale=scale, is_causal=causal
            )
        starts = _PACKED.starts
        if starts is None:
            starts = torch.arange(0, batch * length + 1, length, device=query.device)
        flat = (x.transpose(1, 2).reshape(batch * length, heads, -1) for x in (query, key, value))
        out = encoder.attention(*flat, starts, scale=scale, causal=causal)
        return out.view(batch, length, heads, width).transpose(1, 2)


class Unpadded:
    """Takes padding out before the first block of a stack and puts zeros in its place after the last."""

    @classmethod
    def fits(cls, stack: nn.Module) -> bool:
        """Whether the stack's forward takes (hidden_states, attention_mask, ...)."""
        return list(inspect.signature(stack.forward).parameters)[:2] == ["hidden_states", "attention_mask"]

    @classmethod
    def attach(cls, model: nn.Module, name: str) -> nn.Module:
        """Swap the class of the stack `name`."""
        stack = model.get_submodule(name)
        if isinstance(stack, cls):
            raise FormularyError(f"{name} already leaves padding out: deepspeed-inference cannot be applied twice")
        if not cls.fits(stack):
            raise FormularyError(f"{name} ({type(stack).__name__}) does not take hidden states and a mask")
        title = f"{cls.__name__}{type(stack).__name__}"
        stack.__class__ = type(title, (cls, type(stack)), {"__module__": cls.__module__})
        return stack

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args, **kwargs):
        seen = keys_seen(attention_mask, hidden_states.shape[:2])
        if seen is None or self._observed(args, kwargs) or not says_padding_alone(attention_mask, seen):
            out = super().forward(hidden_states, attention_mask, *args, **kwargs)
            return out if seen is None else _with_states(out, lambda states: states.masked_fill(~seen[..., None], 0))
        real = seen
        index = real.flatten().nonzero()[:, 0]
        starts = nn.functional.pad(real.sum(1).cumsum(0), (1, 0))
        with _packed(starts):
            out = super().forward(hidden_states.flatten(0, 1)[index][None], None, *args, **kwargs)
        return _with_states(out, lambda states: _unpack(states, index, real))

    def _observed(self, args: tuple, kwargs: dict) -> bool:
        """Whether somebody looks at what is inside (hidden states, attention), or other tensors run along."""
        config = getattr(self, "config", None)
        names = ("output_hidden_states", "output_attentions")
        asked = any(kwargs.get(name, getattr(config, name, False)) for name in names)
        along = any(isinstance(x, Tensor) for x in (*args, *kwargs.values()))
        cached = kwargs.get("past_key_values") is not None
        return self.training or torch.compiler.is_compiling() or asked or along or cached


def keys_seen(mask: Tensor | None, shape: tuple[int, int]) -> Bool[Tensor, "B L"] | None:
    """Which tokens any query may see, from transformers' mask of either kind (B,1,#L,L); None without such a mask."""
    if mask is None or mask.ndim != 4 or mask.shape[0] != shape[0] or mask.shape[-1] != shape[1]:
        return None
    return _allowed(mask)[:, 0].any(1)


def says_padding_alone(mask: Tensor, seen: Bool[Tensor, "B L"]) -> bool:
    """Whether some tokens are padding, none of the sequences is all padding, and the mask says nothing else."""
    if seen.all() or not seen.any(1).all():
        return False
    allowed, wanted = _allowed(mask), seen[:, None, None, :]
    if mask.shape[2] == seen.shape[1]:  # what padding may see is of no interest
        allowed, wanted = (x | ~seen[:, None, :, None] for x in (allowed, wanted))
    biased = mask.dtype != torch.bool and bool(mask[_allowed(mask)].any())
    return not biased and torch.equal(allowed, wanted.expand_as(allowed))


def _allowed(mask: Tensor) -> Bool[Tensor, "B #H #L L"]:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


@contextmanager
def _packed(starts: Int[Tensor, "n"]) -> Iterator[None]:
    before, _PACKED.starts = _PACKED.starts, starts
    try:
        yield
    finally:
        _PACKED.starts = before


def _unpack(
    states: Float[Tensor, "1 T D"], index: Int[Tensor, "T"], real: Bool[Tensor, "B L"]
) -> Float[Tensor, "B L D"]:
    whole = states.new_zeros(real.numel(), states.shape[-1]).index_copy(0, index, states[0])
    return whole.view(*real.shape, -1)


def _with_states(out, change):
    """The output of a stack with its hidden states changed: a tensor, a tuple, or a model output."""
    if isinstance(out, Tensor):
        return change(out)
    if isinstance(out, tuple):
        return (change(out[0]), *out[1:])
    out.last_hidden_state = change(out.last_hidden_state)
    return out
