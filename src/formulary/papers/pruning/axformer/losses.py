"""The loss of every item of validation data, whatever head a model has.

Trials change a model at its end first, and many of them the same block. `Losses.start_after` keeps what comes before.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from formulary.contracts import Data, Report, parts
from formulary.contracts.blockwise import Blockwise, handing_out, map_tensors
from formulary.errors import FormularyError
from formulary.kernels import float32
from formulary.lab import metrics


class _Reached(Exception):
    """Ends a forward pass after the block whose outcome is kept."""


class Losses:
    """Call it for the cross-entropy of each validation item, (N,) in nats, of the model as it is now.

    Models of language: per token of each sequence. Classes: of the item's label, by the model's own head, or by a
    logistic readout of its features (first token of an image, mean over the real tokens of a text), fitted on the
    other items when this is made and left alone from then on. `length`: of the sequences in the first batch; `items`: how many
    are taken at most.

    Raises FormularyError where there are no labels, or too few to fit a readout.
    """

    def __init__(self, model: nn.Module, data: Data, validation: float, report: Report, items: int | None = None):
        self.model, self.data, self.readout = model, data, None
        self.blocks = parts.blocks(model)
        self.last, self.kept = None, []  # the block to start after, and what it gives for every batch
        self.causal = parts.kind(model) == "decoder" and "Classification" not in type(model).__name__
        with torch.no_grad():
            first = next(self._batches(data, labels=False))
            out, self.length = model(**first), model.base_model(**first).last_hidden_state.shape[1]
        self.kind = "readout" if "logits" not in out else "classes" if out.logits.ndim == 2 else "tokens"
        if self.kind == "tokens" and not self.causal and "labels" not in data.items[0]:
            raise FormularyError("axformer prunes by the loss of the task, and these items have no labels")
        self.marks = None if self.kind == "tokens" else self._marks()
        if self.kind == "readout":
            every = max(2, round(1 / validation))
            held = np.arange(len(data)) % every == every - 1
            fit, self.data = (data.take(np.flatnonzero(part).tolist()) for part in (~held, held))
            self._fit(fit, self.marks[~held], self.marks[held])
            self.marks = self.marks[held]
            report.note(f"without a head: a logistic readout fitted on {len(fit)} items stands for it")
        if items is not None and items < len(self.data):
            self.data = self.data.take(range(items))
            self.marks = None if self.marks is None else self.marks[:items]
        self.sequential = len(self.blocks) > 1 and Blockwise(model, self.data).sequential

    def __len__(self) -> int:
        return len(self.data)

    def __call__(self) -> Float[Tensor, "N"]:
        return torch.cat(list(self.by_batch()))

    @torch.no_grad()
    def start_after(self, block: parts.Block | None) -> None:
        """From now on what `block` gives is handed out, and nothing before it computes; None: everything computes. The model
        must not change up to there. Where blocks are not called once each and in order, everything goes on to compute.
        """
        self.last, self.kept = None, []
        if block is None or not self.sequential:
            return
        given = []

        def reached(module, args, output):
            given.append(map_tensors(Tensor.clone, output))
            raise _Reached

        handle = block.module.register_forward_hook(reached)
        try:
            for batch in self._batches(self.data, labels=False):
                with suppress(_Reached), float32.faster():
                    self.model(**batch)
        finally:
            handle.remove()
        self.last, self.kept = block, given

    def by_batch(self) -> Iterator[Float[Tensor, "n"]]:
        """The same a batch at a time."""
        at = 0
        for index, batch in enumerate(self._batches(self.data)):
            with torch.no_grad(), self._from_kept(index), float32.faster():
                found = self._losses(batch, at)
            at += len(found)
            yield found.cpu()

    def _losses(self, batch: dict[str, Tensor], at: int) -> Float[Tensor, "n"]:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        if self.kind == "readout":
            scores = torch.from_numpy(self.readout.decision_function(self._features(inputs)))
            scores = torch.stack([torch.zeros_like(scores), scores], 1) if scores.ndim == 1 else scores
            columns = np.searchsorted(self.readout.classes_, self.marks[at : at + len(scores)])
            return nn.functional.cross_entropy(scores, torch.from_numpy(columns), reduction="none").float()
        if self.kind == "classes":
            logits = self.model(**inputs).logits.float().cpu()
            marks = torch.as_tensor(self.marks[at : at + len(logits)])
            return nn.functional.cross_entropy(logits, marks, reduction="none")
        if self.causal:
            return metrics.sequence_loss(self.model, [batch]).per_token
        return metrics.token_nats(self.model(**inputs).logits, batch["labels"], shift=False).per_token

    def _from_kept(self, index: int) -> AbstractContextManager:
        if self.last is None:
            return nullcontext()
        before = next(i for i, block in enumerate(self.blocks) if block.name == self.last.name)
        return handing_out([block.module for block in self.blocks[: before + 1]], self.kept[index])

    def _batches(self, data: Data, labels: bool = True) -> Iterator[dict[str, Tensor]]:
        """On the model's device and in its dtype."""
        like = next(self.model.parameters())
        for batch in data.batches():
            cast = lambda x: x.to(like.device, like.dtype) if x.is_floating_point() else x.to(like.device)
            yield {key: cast(value) for key, value in batch.items() if labels or key != "labels"}

    def _marks(self) -> np.ndarray:
        first = self.data.items[0]
        if "labels" in first and torch.as_tensor(first["labels"]).ndim == 0:
            return np.array([int(item["labels"]) for item in self.data.items])
        if self.data.labels is None:
            raise FormularyError("axformer prunes by the loss of the task: give labels (--labels)")
        return np.asarray(self.data.labels)

    def _fit(self, data: Data, marks: np.ndarray, held: np.ndarray) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        if len(set(marks)) < 2 or set(held) - set(marks):
            raise FormularyError(f"axformer: {len(marks)} items are too few to fit a readout of every class: give more")
        self.readout = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        self.readout.fit(np.concatenate([self._features(batch) for batch in self._batches(data, labels=False)]), marks)

    @torch.no_grad()
    def _features(self, batch: dict[str, Tensor]) -> np.ndarray:
        hidden = self.model(**batch).last_hidden_state.float()
        if "pixel_values" in batch:
            return hidden[:, 0].cpu().numpy()
        real = batch["attention_mask"][..., None].to(hidden.dtype)
        return ((hidden * real).sum(1) / real.sum(1)).cpu().numpy()
