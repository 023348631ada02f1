"""DeepSpeed Inference on a CPU: attention in one fused kernel, no work on padding, and weights that stream from disk.

    fuse     softmax(q k' / sqrt(d)) v per sequence, its scores never leaving the cache; with padding removed between
             the first block and the last, sum(lengths) tokens instead of batch * longest; a BERT's embeddings and
             their norm in one pass; a block whose linears are int8 (llm-int8, applied before or after) or at most
             4-bit (gptq) in one kernel from its input to its output, and all of a stack in one call
    stream   while block i computes, block i + 1 is read ahead; what block i read is given back when it is done

Source: arXiv:2207.00032, sections 3 (kernels fused over tokens) and 6 (ZeRO-Inference). Its other parts (tensor,
pipeline and expert parallelism, CUDA graphs) are for several GPUs. Outputs are those of the unchanged model; at padded
positions they are zero instead of arbitrary, and blocks of at most 4 bits round the inputs of their linears to 8 bits.

Streaming works on a model loaded from disk (Linux), whose weights are then pages of its file: giving them back and
reading ahead are hints to the kernel (madvise), which lose nothing that was written, and memory holds about two blocks
and what is in no block. A model changed in memory runs as before.

Pixels (B,C,H,W) or ids (B,L) in, the model's own outputs out. Raises FormularyError when nothing of a model can be
fused or streamed.

>>> from formulary.lab.small import inputs_for, tiny
>>> model, report = DeepSpeedInference().apply(tiny("bert"))
>>> report.headline.partition(";")[0]
'deepspeed-inference on 5 modules, 27 % of the weights'
"""

from dataclasses import dataclass

from torch import nn

from formulary.contracts import Data, Report, Transform, layouts, parts
from formulary.contracts.edits import Editor
from formulary.errors import FormularyError, UsageError
from formulary.kernels import blocks, encoder, int8

from .embedding import FusedEmbeddings
from .fused import FusedAttention, FusedBlock, FusedStack
from .packing import Unpadded
from .streaming import Streamed


@dataclass(frozen=True, kw_only=True)
class DeepSpeedInference(Transform):
    """fuse: compute attention, and blocks in int8, in native kernels and leave padding out. stream: keep the blocks' weights on disk and
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
        fused = whole = 0
        mixers = parts.mixers(model)
        embeddings = [(name, module) for name, module in model.named_modules() if name and FusedEmbeddings.fits(module)]
        every = [*((part.name, part.module) for part in mixers), *embeddings]
        chosen = {every[index][0] for index in parts.select(every, self.targets, self.ignore)}
        for part in (part for part in mixers if part.name in chosen):
            try:
                edit.edit(part.name, FusedAttention)
            except FormularyError as error:
                report.skipped(part.name, str(error), parts.count_weights(part.module))
                continue
            fused += 1
            report.changed(part.name, parts.count_weights(part.module), "attention in one kernel")
            if layouts.find(part.block.module) is not None:
                edit.edit(part.block.name, FusedBlock)
                whole += 1
        if parts.kind(model) == "encoder" and fused:
            for stack in dict.fromkeys(block.stack.rpartition(".")[0] for block in parts.blocks(model)):
                if stack and Unpadded.fits(model.get_submodule(stack)):
                    edit.edit(stack, Unpadded)
                    report.changed(stack, 0, "padding left out")
                else:
                    report.note(f"padding stays in {stack or type(model).__name__}: its forward takes no mask")
        for name in (name for name, _ in embeddings if fused and name in chosen):
            edit.edit(name, FusedEmbeddings)
            report.changed(name, 0, "embeddings and their norm in one kernel")
        for stack in dict.fromkeys(block.stack for block in parts.blocks(model)):
            owner, _, name = stack.rpartition(".")
            inside = [block.module for block in parts.blocks(model) if block.stack == stack]
            if fused and owner and all(isinstance(block, FusedBlock) for block in inside):
                edit.edit(owner, FusedStack, blocks=name)
                report.changed(owner, 0, "all blocks in one call")
        if whole and blocks.available():
            report.note(
                f"{whole} blocks run in one kernel each once their linears are int8 ({int8.path()}) or at most 4-bit (AVX-512"
                " VNNI, their inputs rounded to 8 bits)"
            )
        if encoder.path() != "C++":
            report.note(f"attention runs in {encoder.path()}: only padding is saved")

    def _stream(self, model: nn.Module, edit: Editor, report: Report) -> None:
        every = parts.blocks(model)
        chosen = {block.name for block in parts.blocks(model, self.targets, self.ignore)}
        for here, following in zip(every, [*every[1:], every[0]]):
            if here.name not in chosen:
                continue
            if not here.has_seam:
                report.skipped(here.name, "no seam is known inside it", parts.count_weights(here.module))
                continue
            ahead = following.name if following.name in chosen else ""
            edit.edit(here.name, Streamed, ahead=ahead)
            report.changed(here.name, parts.count_weights(here.module), "streamed once it is loaded from disk")
        report.note("weights stream when the result is loaded from disk; in memory it runs as before")
