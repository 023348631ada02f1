"""The loss of every item of validation data, whatever head a model has."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from formulary.contracts import Data, Report, parts
from formulary.errors import FormularyError
from formulary.lab import metrics


class Losses:
    """Call it for the cross-entropy of each validation item, (N,) in nats, of the model as it is now.

    Models of language: per token of each sequence. Classes: of the item's label, by the model's own head, or by a
    logistic readout of its features (first token of an image, mean over the real tokens of a text), fitted on the
    other items when this is made and left alone from then on. `length`: of the sequences in the first batch.

    Raises FormularyError where there are no labels, or too few to fit a readout.
    """

    def __init__(self, model: nn.Module, data: Data, validation: float, report: Report):
        self.model, self.data, self.readout = model, data, None
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

    @torch.no_grad()
    def __call__(self) -> Float[Tensor, "N"]:
        if self.kind == "readout":
            scores = torch.from_numpy(self.readout.decision_function(self._features(self.data)))
            scores = torch.stack([torch.zeros_like(scores), scores], 1) if scores.ndim == 1 else scores
            columns = torch.from_numpy(np.searchsorted(self.readout.classes_, self.marks))
            return nn.functional.cross_entropy(scores, columns, reduction="none").float()
        if self.kind == "classes":
            logits = torch.cat([self.model(**batch).logits.float() for batch in self._batches(self.data, labels=False)])
            return nn.functional.cross_entropy(logits.cpu(), torch.as_tensor(self.marks), reduction="none")
        if self.causal:
            return metrics.sequence_loss(self.model, self._batches(self.data)).per_token.cpu()
        found = [(self.model(**batch).logits, batch["labels"]) for batch in self._batches(self.data)]
        return torch.cat([metrics.token_nats(*one, shift=False).per_token for one in found]).cpu()

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
        self.readout.fit(self._features(data), marks)

    @torch.no_grad()
    def _features(self, data: Data) -> np.ndarray:
        rows = []
        for batch in self._batches(data, labels=False):
            hidden = self.model(**batch).last_hidden_state.float()
            if "pixel_values" in batch:
                rows.append(hidden[:, 0])
            else:
                real = batch["attention_mask"][..., None].to(hidden.dtype)
                rows.append((hidden * real).sum(1) / real.sum(1))
        return torch.cat(rows).cpu().numpy()
