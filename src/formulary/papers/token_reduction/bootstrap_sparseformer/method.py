"""SparseFormer from a trained ViT: a few latent tokens look at the image through boxes that move, then go through the
ViT's later blocks; what is new learns, without labels, to give the ViT's own output.

    look:    points p_k = (x, y) + (o_k - mean o) / (3 std o) * (w, h);  X = features at p (bilinear), P x C
             t <- t + W GELU(M_p(t) X M_c(t));   t <- t + linear(norm(code of the box))
    focus:   look;  t <- t + attention(norm(t));  t <- t + mlp(norm(t));  x, y += d_xy * (w, h);  (w, h) *= exp(d_wh)
             one block for all `iterations`, t + s_i before each; every t starts from the same vector
    cortex:  widen, look once more, put CLS before, then blocks N/3 .. N of the ViT; its first N/3 are gone
    loss:    1 - cosine(CLS after the last norm, that of the unchanged ViT)

Source: arXiv:2312.01987, its figure 2 (a quarter as many latents as patches, trained blocks N/3 to 2N/3, frozen ones
behind), and for what the modules are the authors' code (showlab/sparseformer), in which the matrices M mix without an
activation between them, unlike SparseFormer's first paper (arXiv:2304.03768). The code for bootstrapping is not public:
the loss, and that CLS starts from the mean of what the ViT has there for the first images, are settled here. Weights
start with deviation 0.4 / sqrt(inputs), the authors' 0.02 at their width of 384.

In: a vision model with a CLS token, and images. Out: the same model, changed in place, smaller, with the same head. Its
CLS output is trained; where `restore` is on, each patch has the state of the latent whose box is nearest, so that
shapes stay, but nothing was trained to make those states the patches' own. `boxes_of` gives the last forward's boxes.

Raises UsageError for bad parameters, FormularyError for a model without CLS, seams or a grid of patches, one that reads
inner blocks, and when it runs for an attention mask.

>>> from formulary.lab import inputs_for, tiny
>>> model, data = tiny("vit"), Data([{"pixel_values": x} for x in inputs_for(tiny("vit"), batch=8)["pixel_values"]])
>>> model, report = BootstrapSparseFormer(steps=3).apply(model, data)
>>> tuple(model(**inputs_for(model)).last_hidden_state.shape), report.figures["tokens"], tuple(boxes_of(model).shape)
((2, 17, 32), [5, 17], (2, 4, 4))
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from formulary.contracts import Data, Report, Transform, parts
from formulary.contracts.edits import Editor
from formulary.contracts.transform import check_range, in_float32
from formulary.errors import FormularyError, UsageError
from formulary.papers.token_reduction._parts import grid, patches

from .focusing import FocusedEmbeddings, LatentBlock, Truncated, focused

__all__ = ["BootstrapSparseFormer", "FocusedEmbeddings", "LatentBlock", "Teacher", "Truncated", "align", "boxes_of"]

SLUG = "bootstrap-sparseformer"


def boxes_of(model: nn.Module) -> Float[Tensor, "B n 4"]:
    """(x1, y1, x2, y2) in parts of the image, of each latent at its last look in the last forward."""
    boxes = focused(model).seen.boxes
    if boxes is None:
        raise FormularyError("no image was looked at yet: run the model first")
    return boxes


# ---------------------------------------------------------------- alignment


class Teacher:
    """What the unchanged model gives for its first `aligned` tokens, computed once for each image of one data set."""

    def __init__(self, model: nn.Module, aligned: int = 1):
        self.model, self.aligned = model.eval(), aligned
        self.known: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> Float[Tensor, "B K D"]:
        index = batch["index"].tolist()
        if new := [row for row, item in enumerate(index) if item not in self.known]:
            states = outputs(self.model, batch["pixel_values"][new], self.aligned)
            self.known.update({index[row]: state for row, state in zip(new, states)})
        return torch.stack([self.known[item] for item in index])

    def of_their_mean(self) -> float:
        """The mean cosine that one output for all images would reach, the mean of those seen."""
        states = torch.stack(list(self.known.values()))
        return float(F.cosine_similarity(states.mean(0, keepdim=True), states, dim=-1).mean())


def outputs(model: nn.Module, pixels: Tensor, aligned: int) -> Float[Tensor, "B K D"]:
    """The final states of CLS and, where there is one, of the distillation token."""
    like = next(model.parameters())
    return model.base_model(pixel_values=pixels.to(like.device, like.dtype)).last_hidden_state[:, :aligned]


def align(
    model: nn.Module, teacher: Teacher, data: Data, trained: Sequence[nn.Module], *, steps: int, learning_rate: float
) -> list[float]:
    """Train the modules `trained` of `model` so that its CLS is in the direction of the teacher's; each step's loss."""
    from formulary.lab import train

    data = replace(data, items=[{"pixel_values": x["pixel_values"], "index": i} for i, x in enumerate(data.items)])
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found = outputs(model.eval(), batch["pixel_values"], teacher.aligned)
        return 1 - F.cosine_similarity(found, teacher(batch), dim=-1).mean()

    optimizer = partial(torch.optim.AdamW, lr=learning_rate, weight_decay=0.0, fused=True)
    return train(model, data, steps=steps, lr=learning_rate, loss=loss, optimizer=optimizer, seed=data.seed).losses


# ---------------------------------------------------------------- the transform


@dataclass(frozen=True, kw_only=True)
class BootstrapSparseFormer(Transform):
    """Put `tokens` latents before the last blocks of a ViT and train them to give its CLS.

    tokens: 0 for a quarter of the patches. width: of the focusing Transformer, 0 for half of the model's. iterations:
    how often it looks. points: samples of one look. channels: of the features that are sampled. truncated: first blocks
    that are left out; tuned: blocks behind these that are trained, if `targets` and `ignore` choose them; -1 for a
    third of the blocks. steps and learning_rate: of the alignment, by AdamW; a batch is the data's. restore: give the
    outputs all patches again.
    """

    tokens: int = 0
    width: int = 0
    iterations: int = 4
    points: int = 16
    channels: int = 64
    truncated: int = -1
    tuned: int = -1
    steps: int = 300
    learning_rate: float = 5e-4
    restore: bool = True

    supports: ClassVar[frozenset[str]] = frozenset({"vision"})
    needs_data: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    unit: ClassVar[str] = "part"
    quick: ClassVar[dict[str, Any]] = {"steps": 2, "iterations": 2, "channels": 8}

    def __post_init__(self):
        super().__post_init__()
        lowest = {"tokens": 0, "width": 0, "iterations": 1, "points": 2, "channels": 1, "truncated": -1, "tuned": -1}
        for name, low in {**lowest, "steps": 0}.items():
            check_range(SLUG, name, getattr(self, name), low, 10_000_000)
        check_range(SLUG, "learning_rate", self.learning_rate, 1e-12, 1.0)
        if self.width % 4:
            raise UsageError(f"{SLUG}: width must be a multiple of 4, for the code of a box, got {self.width}")

    def run(self, model: nn.Module, data: Data, edit: Editor, report: Report) -> None:
        model.eval()
        embedding, count = patches(SLUG, model, data)
        name = embedding.rpartition(".")[0]
        blocks, (start, frozen) = self._stages(model, name)
        teacher = copy.deepcopy(model).requires_grad_(False)
        chosen = {block.name for block in parts.blocks(model, self.targets, self.ignore)}
        tuned = [block for block in blocks[start:frozen] if block.name in chosen]
        prefix = self._focus(model, teacher, embedding, blocks[start].name, count, data, edit, report)
        for block in blocks[:start]:
            report.changed(block.name, parts.count_weights(block.module), "left out")
            edit.edit(block.name, Truncated)
        last = blocks[-1].name
        for block in dict.fromkeys((blocks[start].name, last)):
            edit.edit(block, LatentBlock, restore=self.restore and block == last)
        for block in tuned:
            report.changed(block.name, parts.count_weights(block.module), "trained")
            edit.keep(block.module)
        if self.steps:
            wanted = Teacher(teacher, prefix - getattr(model.config, "num_register_tokens", 0))
            trained = [model.get_submodule(name), *(block.module for block in tuned)]
            with in_float32(model, teacher):
                losses = align(model, wanted, data, trained, steps=self.steps, learning_rate=self.learning_rate)
            reached, constant = 1 - _end(losses), wanted.of_their_mean()
            report.figures["cosine with the unchanged CLS, in training"] = reached
            report.figures["that of one CLS for all images"] = constant
            done = f"trained for {self.steps} steps on {len(data)} images"
            report.note(f"{done}, cosine of CLS {reached:.3f} (one CLS for all images: {constant:.3f})")
        else:
            report.note("not trained: steps is 0")
        cost = _operations(model, data) / _operations(teacher, data)
        report.figures["operations, of the unchanged model's"] = cost
        if cost >= 1:
            report.note(f"it takes {cost:.1f} times the operations of the unchanged model, whose images have few patches")

    def _stages(self, model: nn.Module, embeddings: str) -> tuple[list[parts.Block], tuple[int, int]]:
        """All blocks, and where the trained and the frozen ones begin."""
        blocks, who = parts.blocks(model), type(model).__name__
        if getattr(model, "stage_names", None) or not hasattr(model.get_submodule(embeddings), "cls_token"):
            raise FormularyError(f"{SLUG} needs a model that reads a CLS token after its last block; not so this {who}")
        depth = len(blocks)
        start = depth // 3 if self.truncated < 0 else self.truncated
        if start >= depth:
            raise UsageError(f"{SLUG}: truncated must leave one of the {depth} blocks of this {who}, got {start}")
        if start + self.tuned > depth:
            left = f"{depth - start}, the blocks left in this {who}"
            raise UsageError(f"{SLUG}: tuned must be at most {left}, got {self.tuned}")
        frozen = max(start, 2 * depth // 3) if self.tuned < 0 else start + self.tuned
        return blocks, (start, frozen)

    def _focus(
        self, model: nn.Module, teacher: nn.Module, embedding: str, first: str, count: int, data: Data, edit: Editor,
        report: Report,
    ) -> int:  # fmt: skip
        """Put the focusing Transformer in the embeddings' place; how many tokens, CLS first, stand before the latents."""
        projection, name = model.get_submodule(embedding).projection, embedding.rpartition(".")[0]
        hidden, tokens = model.config.hidden_size, self.tokens or max(1, count // 4)
        entering = _entering(teacher, first, next(data.batches())["pixel_values"], projection)
        width = self.width or hidden // 8 * 4
        if tokens >= count:
            report.note(f"{tokens} latents are no fewer than the {count} patches")
        report.changed(name, parts.count_weights(model.get_submodule(name)), f"{tokens} latents for {count} patches")
        new = edit.edit(
            name, FocusedEmbeddings, hidden=hidden, prefix=len(entering), patch=list(projection.kernel_size),
            pixel_channels=projection.in_channels, tokens=tokens, width=width, iterations=self.iterations,
            points=self.points, channels=self.channels,
        )  # fmt: skip
        edit.set(new.cls_token, entering[None])
        report.figures["tokens"] = [len(entering) + tokens, len(entering) + count]
        return len(entering)


def _end(losses: list[float]) -> float:
    """The mean of the last tenth, at least one."""
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


@torch.no_grad()
def _entering(teacher: nn.Module, block: str, pixels: Tensor, projection: nn.Conv2d) -> Float[Tensor, "prefix D"]:
    """The mean over images of the CLS and other tokens before the patches, as they enter a block."""
    seen: list[Tensor] = []
    height, width = grid(projection, pixels)
    handle = teacher.get_submodule(block).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    teacher(pixel_values=pixels.to(projection.weight))
    handle.remove()
    return seen[0][:, : seen[0].shape[1] - height * width].float().mean(0)


@torch.no_grad()
def _operations(model: nn.Module, data: Data) -> int:
    """Floating-point operations of matrix products and convolutions for one image."""
    pixels = data.collate(data.items[:1])["pixel_values"].to(next(model.parameters()))
    counted = copy.deepcopy(model).requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        counted(pixel_values=pixels)
    return counter.get_total_flops()
