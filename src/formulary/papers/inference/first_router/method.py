"""FiRST: a router before each block of a decoder lets a sequence skip it, for good, by the votes of its first tokens.

    router:   z_l = w_l . x / rms(x) + b_l;  r_l = sigmoid(z_l)
    stage 1:  backbone frozen, each token x <- r_l block_l(x) + (1 - r_l) x;
              cross-entropy + lambda mean_l r_l + sharpness mean r_l (1 - r_l);  lambda += mean r - wanted, each step
    stage 2:  routers frozen, LoRA on the linears, blocks really skipped; merged into the weights at the end
    use:      the first `prompt` tokens run every block; then block l runs if their mean r_l is above a half

Source: arXiv:2410.12513, section 3. There the whole prompt votes, in the prefill. A model that is called with a text
does not know where its prompt ends, so here its first `prompt` real tokens vote: what follows is then the same with and
without a cache, looks at nothing later, and all of it skips, so that no keys are missing that anyone reads. A sequence
of fewer tokens skips nothing. The first and the last block always run. The paper tries values of lambda for a wanted
rate; dual ascent (lambda above) and, at the end, one shift of all biases to the wanted rate on the training texts take
their place, and the norm before the router is ours. In a batch a block is left out, and saves time, once no sequence
wants it.

In: a causal language model and text. Out: the same model, changed in place. Raises UsageError for bad parameters,
FormularyError for models without seams or with too few blocks, and where a cache is not the default one.

>>> from formulary.lab import inputs_for, tiny
>>> model = tiny("llama")
>>> data = Data([{"input_ids": ids} for ids in inputs_for(model, batch=8)["input_ids"]])
>>> routed, report = FiRST(last=0, skip=0.5, prompt=4, router_steps=2, tune_steps=1).apply(model, data)
>>> report.headline
'first-router on 1 block, ... % of the weights; sequences skip 1.00 of 1 routed blocks after 4 tokens, ...'
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formulary.contracts import Data, Report, Transform, parts
from formulary.contracts.edits import Editor
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError
from formulary.papers.inference._parts import in_float32, inputs_of, trained
from formulary.papers.inference.first_router.routing import RoutedBlock, softly

__all__ = ["FiRST", "RoutedBlock"]

CALIBRATED = 64
"""Texts at most whose votes set the biases."""

# ---------------------------------------------------------------- losses


def labels_of(batch: dict[str, Tensor]) -> Tensor:
    """(B,L) the labels, else the text's own tokens, -100 at padding."""
    ids = batch.get("labels", batch["input_ids"])
    return ids.masked_fill(batch["attention_mask"] == 0, -100) if "attention_mask" in batch else ids


def text_loss(model: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
    """Cross-entropy of each next token, in nats."""
    logits = model(**inputs_of(model, batch)).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels_of(batch)[:, 1:].flatten().to(logits.device))


class RouterLoss:
    """Stage 1: the text's loss of the soft mixture, the price of blocks and the push to 0 or 1; `price` is lambda."""

    def __init__(self, wanted: float, sharpness: float):
        self.wanted, self.sharpness, self.price = wanted, sharpness, 0.0

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
        with softly(model) as answers:
            loss = text_loss(model, batch)
            rates = torch.stack(answers).float().sigmoid()
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).to(rates.device)
        rates = rates[:, real.bool()]
        loss = loss + self.price * rates.mean() + self.sharpness * (rates * (1 - rates)).mean()
        self.price = max(0.0, self.price + float(rates.detach().mean()) - self.wanted)
        return loss


def pieces(data: Data, length: int) -> Data:
    """The texts in pieces of at most `length` tokens."""
    found = []
    for item in data.items:
        of_tokens = {key for key, value in item.items() if torch.as_tensor(value).shape[:1] == item["input_ids"].shape}
        for start in range(0, len(item["input_ids"]), length):
            cut = {key: value[start : start + length] if key in of_tokens else value for key, value in item.items()}
            if len(cut["input_ids"]) > 1:
                found.append(cut)
    return replace(data, items=found, labels=None, raw=None)


# ---------------------------------------------------------------- low-rank adapters


class Tuned(nn.Module):
    """A model whose linears also add up(down(x)); `merge` puts the products into the weights."""

    def __init__(self, model: nn.Module, linears: list[parts.Linear], rank: int):
        super().__init__()
        self.model, self.linears = model, linears
        sizes = [(part.in_features, part.out_features) for part in linears]
        self.down = nn.ParameterList(torch.randn(rank, d) / d**0.5 for d, _ in sizes)
        self.up = nn.ParameterList(torch.zeros(f, rank) for _, f in sizes)

    @contextmanager
    def adding(self) -> Iterator[None]:
        hooks = []
        for part, down, up in zip(self.linears, self.down, self.up):
            add = lambda module, args, out, down=down, up=up: out + (args[0] @ down.T) @ up.T
            hooks.append(part.module.register_forward_hook(add))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def merge(self) -> None:
        for part, down, up in zip(self.linears, self.down, self.up):
            part.raw.data.copy_(part.stored(part.weight() + up @ down))


# ---------------------------------------------------------------- the transform


@dataclass(frozen=True, kw_only=True)
class FiRST(Transform):
    """Train routers that skip the share `skip` of all blocks, and the model to bear it.

    prompt: how many tokens of a sequence vote. first, last: blocks at the ends that always run. sharpness: weight of
    the push of r to 0 or 1. router_steps, router_rate: of stage 1 and its highest learning rate; tune_steps, rank,
    learning_rate: of stage 2, which 0 steps leave out. length: tokens of the pieces of text that are trained on.
    """

    skip: float = 0.25
    prompt: int = 32
    first: int = 1
    last: int = 1
    sharpness: float = 0.1
    router_steps: int = 30
    router_rate: float = 0.2
    tune_steps: int = 20
    rank: int = 8
    learning_rate: float = 1e-3
    length: int = 128

    supports: ClassVar[frozenset[str]] = frozenset({"decoder"})
    needs_data: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    unit: ClassVar[str] = "block"
    quick: ClassVar[dict[str, Any]] = {"last": 0, "skip": 0.4, "prompt": 4, "router_steps": 2, "tune_steps": 1, "rank": 2}

    def __post_init__(self):
        super().__post_init__()
        check_range("first-router", "skip", self.skip, 0, 1)
        for name in ("prompt", "first", "router_steps", "rank"):
            check_range("first-router", name, getattr(self, name), 1, 10_000_000)
        for name in ("last", "tune_steps", "sharpness"):
            check_range("first-router", name, getattr(self, name), 0, 10_000_000)
        for name in ("router_rate", "learning_rate"):
            check_range("first-router", name, getattr(self, name), 1e-12, 10.0)
        check_range("first-router", "length", self.length, 2, 10_000_000)

    def run(self, model: nn.Module, data: Data, edit: Editor, report: Report) -> None:
        model.eval()
        blocks = self._blocks(model)
        share = self.skip * len(parts.blocks(model)) / len(blocks)
        if share > 1:
            most = len(blocks) / len(parts.blocks(model))
            raise FormularyError(f"first-router: only {most:.2f} of all blocks have a router, less than skip={self.skip}")
        texts = pieces(data, self.length)
        if not any(len(item["input_ids"]) > self.prompt for item in texts.items):
            report.note(f"no training text has more than the {self.prompt} tokens that vote: lower prompt")
        edit.keep(model)
        linears = self._linears(model, report)
        for block in blocks:
            edit.edit(block.name, RoutedBlock, index=block.index, prompt=self.prompt, leads=block is blocks[0])
            report.changed(block.name, parts.count_weights(block.module), "skipped by sequences that vote so")
        with in_float32(model):
            losses = self._train_routers(model, blocks, texts, 1 - share)
            shift = self._calibrate(blocks, self._answers(model, texts), share)
            skipped = [(z.sigmoid().mean(-1) <= 0.5).float() for z in self._answers(model, texts)]
            if self.tune_steps:
                tuned = self._tune(model, linears, texts)
        self._tell(blocks, skipped, report)
        said = f"loss {losses[0]:.3g} to {losses[-1]:.3g}, biases then shifted by {shift:.2g}"
        report.note(f"routers trained for {self.router_steps} steps, {said}")
        if self.tune_steps:
            report.note(f"tuned by LoRA for {self.tune_steps} steps, loss {tuned[0]:.3g} to {tuned[-1]:.3g}, merged")

    def _blocks(self, model: nn.Module) -> list[parts.Block]:
        """The blocks that get a router: those that are chosen, but for the ends."""
        every, who = parts.blocks(model), type(model).__name__
        if seamless := [block for block in every if not block.has_seam]:
            raise FormularyError(f"first-router cannot act inside the {type(seamless[0].module).__name__}s of this {who}")
        names = {block.name for block in parts.blocks(model, self.targets, self.ignore)}
        found = [block for block in every[self.first : len(every) - self.last] if block.name in names]
        if not found:
            raise FormularyError(f"first-router: of {len(every)} blocks none is left between the first and last that stay")
        return found

    def _linears(self, model: nn.Module, report: Report) -> list[parts.Linear]:
        every = parts.linears(model)
        if self.tune_steps and any(part.experts for part in every):
            report.note("experts were not tuned")
        return [part for part in every if not part.experts]

    def _train_routers(self, model: nn.Module, blocks: list[parts.Block], texts: Data, wanted: float) -> list[float]:
        model.requires_grad_(False)
        for block in blocks:
            block.module.router.requires_grad_(True)
        options = {"steps": self.router_steps, "learning_rate": self.router_rate}
        losses = trained(model, texts, RouterLoss(wanted, self.sharpness), **options)
        model.requires_grad_(False)
        return losses

    @torch.no_grad()
    def _answers(self, model: nn.Module, texts: Data) -> list[Float[Tensor, "blocks prompt"]]:
        """z of the tokens that vote, of the first `CALIBRATED` texts of enough tokens; no block is skipped there."""
        device = next(model.parameters()).device
        found, seen = [], []
        blocks = [block.module for block in parts.blocks(model) if isinstance(block.module, RoutedBlock)]
        take = lambda module, args, z: seen.append(z)
        hooks = [block.router.register_forward_hook(take) for block in blocks]
        longest = min(self.prompt, max(len(item["input_ids"]) for item in texts.items))
        try:
            for item in texts.items:
                if len(item["input_ids"]) >= longest and len(found) < CALIBRATED:
                    seen.clear()
                    model(input_ids=item["input_ids"][None, :longest].to(device), use_cache=False)
                    found.append(torch.stack([z[0] for z in seen]).float())
        finally:
            for hook in hooks:
                hook.remove()
        return found

    @torch.no_grad()
    def _calibrate(self, blocks: list[parts.Block], answers: list[Tensor], share: float) -> float:
        """Shift all biases so that `share` of (text, block), or the least more, are voted out; gives the shift."""
        z = torch.stack(answers)
        low, high = -float(z.max()) - 0.1, -float(z.min()) + 0.1
        for _ in range(50):
            middle = (low + high) / 2
            out = float(((z + middle).sigmoid().mean(-1) <= 0.5).double().mean())
            low, high = (middle, high) if out >= share - 1e-9 else (low, middle)
        for block in blocks:
            block.module.router.bias.add_(low - 1e-4)
        return low - 1e-4

    def _tune(self, model: nn.Module, linears: list[parts.Linear], texts: Data) -> list[float]:
        tuned = Tuned(model, linears, self.rank).to(next(model.parameters()).device)
        loss = lambda tuned, batch: text_loss(tuned.model, batch)
        with tuned.adding():
            losses = trained(tuned, texts, loss, steps=self.tune_steps, learning_rate=self.learning_rate)
        tuned.merge()
        return losses

    def _tell(self, blocks: list[parts.Block], skipped: list[Tensor], report: Report) -> None:
        rates = torch.stack(skipped)
        report.tables["routers"] = [
            {"block": block.name, "skipped by": float(rate)} for block, rate in zip(blocks, rates.mean(0))
        ]
        mean, kinds = float(rates.sum(1).mean()), len({tuple(row) for row in rates.tolist()})
        report.figures["blocks skipped by a sequence"] = mean
        report.note(
            f"sequences skip {mean:.2f} of {len(blocks)} routed blocks after {self.prompt} tokens, "
            f"in {kinds} different ways among {len(rates)} training texts"
        )
