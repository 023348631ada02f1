"""How good a changed model is: outcomes per held-out item by the model's kind, each beside the unchanged model's, with intervals.

Decoders: loss per sequence, shown as perplexity. Encoders: cosine of sentence embeddings and agreement of retrieval. Vision:
cosine of the pooled feature, of every dense token, and agreement of predictions. Encoder-decoders: teacher-forced loss. With
labels: accuracy. Every figure is paired with the unchanged model on the same items.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from formulary.contracts.data import Data
from formulary.lab import metrics


@dataclass(frozen=True)
class Quality:
    """One measure of one model: an outcome per item, how to show its mean, and which direction is better.

    `loss` says how much worse than the reference value the mean is, as a fraction (0.01 = 1 %), for `--max-loss`.
    """

    name: str
    outcomes: np.ndarray
    better: str  # "lower" | "higher"
    show: str = "mean"  # "mean" | "exp"
    reference: float | None = None  # the unchanged model's mean; for agreements the perfect value 1

    def interval(self) -> tuple[float, float, float]:
        """(estimate, low, high): the mean with its 95 % t interval over items, on the scale shown."""
        from scipy.special import stdtrit

        x = np.asarray(self.outcomes, dtype=float)
        mean = float(x.mean())
        half = float(stdtrit(len(x) - 1, 0.975) * x.std(ddof=1) / len(x) ** 0.5) if len(x) > 1 else float("nan")
        values = (mean, mean - half, mean + half)
        if self.show == "exp":
            return tuple(float(np.exp(min(v, 700))) for v in values)
        low, high = (max(values[1], -1.0), min(values[2], 1.0)) if self.better == "higher" else values[1:]
        return mean, low, high

    def loss(self) -> float:
        """Relative loss against the unchanged model, 0 when as good or better."""
        if self.reference is None:
            return 0.0
        ours = self.interval()[0]
        best = float(np.exp(self.reference)) if self.show == "exp" else self.reference
        gap = ours - best if self.better == "lower" else best - ours
        return max(0.0, gap / abs(best)) if best else max(0.0, gap)


def measure(model: nn.Module, kind: str, data: Data, reference: dict[str, Tensor], probe: Data | None = None) -> list[Quality]:
    """The qualities of `model` on held-out `data`; the first is the main one. `reference` comes from `reference_outputs`.

    `probe` (the calibration part, labeled) is what a linear probe is fitted on when labels are given and the model has no
    classification head.
    """
    found = MEASURES[kind](model, data, reference)
    if data.labels is not None and kind in ("encoder", "vision"):
        found.insert(0, _accuracy(model, data, reference, probe))
    return found


def reference_outputs(model: nn.Module, kind: str, data: Data, probe: Data | None = None) -> dict[str, Tensor]:
    """What the unchanged model says about the held-out items: what agreements and losses are measured against."""
    out = outputs(model, kind, data)
    if data.labels is not None and kind in ("encoder", "vision"):
        out["correct"] = _correct(model, data, probe, out)
    return out


# ---------------------------------------------------------------- outputs per item


@torch.no_grad()
def outputs(model: nn.Module, kind: str, data: Data) -> dict[str, Tensor]:
    """Per-item tensors: `loss` for decoders and encoder-decoders, `vector` and more for encoders and vision; float32."""
    was = model.training
    model.eval()
    try:
        if kind in ("decoder", "encoder-decoder"):
            return {"loss": metrics.sequence_loss(model, data.batches()).per_token.float()}
        found: dict[str, list[Tensor]] = {}
        for batch in data.batches():
            for key, value in READERS[kind](model, batch).items():
                found.setdefault(key, []).append(value.float())
        return {key: torch.cat(values) for key, values in found.items()}
    finally:
        model.train(was)


def _cast(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def _read_encoder(model, batch) -> dict[str, Tensor]:
    batch = {k: v for k, v in batch.items() if k != "labels"}
    backbone = model.base_model if hasattr(model, "base_model") else model
    hidden = backbone(**batch).last_hidden_state.float()
    mask = batch["attention_mask"][..., None].float()
    found = {"vector": nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)}
    if _classifies(model):
        found["logits"] = model(**batch).logits
    return found


def _read_vision(model, batch) -> dict[str, Tensor]:
    batch = _cast(model, {k: v for k, v in batch.items() if k != "labels"})
    backbone = model.base_model if hasattr(model, "base_model") else model
    hidden = backbone(**batch).last_hidden_state.float()
    if hidden.ndim == 4:  # a map of states (B,C,H,W), of a model without [CLS]
        tokens = hidden.flatten(2).mT
        found = {"vector": tokens.mean(1), "tokens": tokens}
    else:
        found = {"vector": hidden[:, 0], "tokens": hidden[:, 1:]}
    if _classifies(model):
        found["logits"] = model(**batch).logits
    return found


READERS: dict[str, Callable] = {"encoder": _read_encoder, "vision": _read_vision}


def _classifies(model: nn.Module) -> bool:
    return "Classification" in type(model).__name__


# ---------------------------------------------------------------- qualities


def _decoder(model, data, reference) -> list[Quality]:
    loss = outputs(model, "decoder", data)["loss"]
    return [Quality("perplexity", loss.numpy(), "lower", "exp", float(reference["loss"].mean()))]


def _encoder_decoder(model, data, reference) -> list[Quality]:
    loss = outputs(model, "encoder-decoder", data)["loss"]
    return [Quality("teacher-forced perplexity", loss.numpy(), "lower", "exp", float(reference["loss"].mean()))]


def _encoder(model, data, reference) -> list[Quality]:
    ours = outputs(model, "encoder", data)
    found = [_agreement("embedding cosine", metrics.cosine(ours["vector"], reference["vector"]))]
    if len(data) > 20:
        mine, theirs = ours["vector"], reference["vector"]
        overlap = metrics.retrieval_overlap(mine[::2], mine[1::2], theirs[::2], theirs[1::2], k=10)
        found.append(_agreement("retrieval top-10 agreement", overlap))
    return found + _predictions(ours, reference)


def _vision(model, data, reference) -> list[Quality]:
    ours = outputs(model, "vision", data)
    found = [_agreement("feature cosine", metrics.cosine(ours["vector"], reference["vector"]))]
    if ours["tokens"].shape == reference["tokens"].shape:
        dense = nn.functional.cosine_similarity(ours["tokens"], reference["tokens"], dim=-1).mean(1)
        found.append(_agreement("dense token cosine", dense))
    return found + _predictions(ours, reference)


def _predictions(ours, reference) -> list[Quality]:
    if "logits" not in ours or "logits" not in reference or ours["logits"].shape != reference["logits"].shape:
        return []
    same = (ours["logits"].argmax(-1) == reference["logits"].argmax(-1)).float()
    return [_agreement("prediction agreement", same)]


def _agreement(name: str, values: Tensor) -> Quality:
    return Quality(name, values.double().numpy(), "higher", reference=1.0)


MEASURES: dict[str, Callable] = {
    "decoder": _decoder,
    "encoder": _encoder,
    "encoder-decoder": _encoder_decoder,
    "vision": _vision,
}


def _accuracy(model, data, reference, probe) -> Quality:
    kind = "vision" if "pixel_values" in data.items[0] else "encoder"
    correct = _correct(model, data, probe, outputs(model, kind, data))
    name = "accuracy" if _classifies(model) else "accuracy of a linear probe"
    return Quality(name, correct.numpy(), "higher", reference=float(reference["correct"].mean()))


def _correct(model, data, probe, ours) -> Tensor:
    """1 where the label is predicted: by the model's own head, else by logistic regression on its features."""
    labels = np.asarray(data.labels)
    if _classifies(model) and model.config.num_labels == len(data.facts.get("classes", [])):
        return torch.tensor((ours["logits"].argmax(-1).numpy() == labels).astype(float))
    from sklearn.linear_model import LogisticRegression

    kind = "vision" if "pixel_values" in data.items[0] else "encoder"
    train = outputs(model, kind, probe)["vector"].numpy()
    fitted = LogisticRegression(max_iter=2000).fit(train, np.asarray(probe.labels))
    return torch.tensor((fitted.predict(ours["vector"].numpy()) == labels).astype(float))
