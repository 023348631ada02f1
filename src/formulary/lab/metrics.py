"""Metrics that keep every item's outcome, since intervals need them; means are the caller's business.

>>> import torch
>>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
tensor([1., 0.])
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formulary.errors import UsageError

IGNORE = -100


@dataclass(frozen=True)
class SequenceLoss:
    """Summed negative log-likelihood (nats) and counted tokens of each sequence."""

    nats: Float[Tensor, "N"]
    tokens: Int[Tensor, "N"]

    @property
    def per_token(self) -> Float[Tensor, "N"]:
        """Nats per token of each sequence."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Of the whole: exp(all nats / all tokens), every token counting the same."""
        return float((self.nats.double().sum() / self.tokens.sum()).exp())


def token_nats(logits: Float[Tensor, "B L V"], labels: Int[Tensor, "B L"], *, shift: bool = True) -> SequenceLoss:
    """Loss of each sequence, leaving out labels of -100.

    `shift=True` is for causal models, where the logits at t predict the label at t + 1; `shift=False` for masked
    models and for decoders of encoder-decoders. A sequence with no label counts 0 tokens.
    """
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    nats = nn.functional.cross_entropy(
        logits.transpose(1, 2).float(), labels, ignore_index=IGNORE, reduction="none"
    )
    return SequenceLoss(nats.sum(1), (labels != IGNORE).sum(1))


@torch.no_grad()
def sequence_loss(model: nn.Module, batches) -> SequenceLoss:
    """`token_nats` of a transformers language model over dict batches, every sequence an item, in order.

    Labels are the batch's own, else `input_ids` without padding. Causal models are shifted, masked ones and
    encoder-decoders are not. What a causal model says at a padded place is left out, so that a sequence counts the
    same alone and padded on either side (transformers' own loss counts the first token after left padding). Raises
    UsageError when no token is left to predict.
    """
    config = model.config
    masked = "MaskedLM" in type(model).__name__
    nats, tokens = [], []
    for batch in batches:
        labels = batch.get("labels")
        if labels is None:
            if masked or config.is_encoder_decoder:
                raise UsageError("batches of a masked model or an encoder-decoder must carry labels")
            labels = batch["input_ids"]
            if "attention_mask" in batch:
                labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORE)
        causal = not (masked or config.is_encoder_decoder)
        if causal and "attention_mask" in batch:
            labels = labels.clone()
            labels[:, 1:].masked_fill_(batch["attention_mask"][:, :-1] == 0, IGNORE)
        inputs = dict(batch) if config.is_encoder_decoder else {k: v for k, v in batch.items() if k != "labels"}
        logits = model(**inputs).logits
        found = token_nats(logits, labels, shift=causal)
        nats.append(found.nats)
        tokens.append(found.tokens)
    if not tokens or not int(torch.cat(tokens).sum()):
        raise UsageError("there is no token to predict in these batches")
    return SequenceLoss(torch.cat(nats), torch.cat(tokens))


def accuracy(logits: Float[Tensor, "N V"], labels: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    """1 where the largest logit is the label's, else 0."""
    return (logits.argmax(-1) == labels).float()


def sequence_accuracy(
    logits: Float[Tensor, "B L V"], labels: Int[Tensor, "B L"], *, shift: bool = True
) -> Float[Tensor, "B"]:
    """The share of labels (those not -100) that each sequence gets right; `shift` as in `token_nats`."""
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    asked = labels != IGNORE
    right = (logits.argmax(-1) == labels) & asked
    return right.sum(1) / asked.sum(1)


def cosine(a: Float[Tensor, "N *rest"], b: Float[Tensor, "N *rest"]) -> Float[Tensor, "N"]:
    """The cosine between the two versions of each item, all its numbers taken as one vector."""
    return nn.functional.cosine_similarity(a.flatten(1).double(), b.flatten(1).double(), dim=1).float()


def correlation(a: Float[Tensor, "N *rest"], b: Float[Tensor, "N *rest"]) -> Float[Tensor, "N"]:
    """Pearson's correlation between the two versions of each item, as for saliency or depth maps."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    return cosine(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True))


def retrieval_overlap(
    queries: Float[Tensor, "Q D"],
    documents: Float[Tensor, "N D"],
    other_queries: Float[Tensor, "Q E"],
    other_documents: Float[Tensor, "N E"],
    *,
    k: int = 10,
) -> Float[Tensor, "Q"]:
    """For each query, the share of its `k` nearest documents (by cosine) that two encoders agree on."""
    k = min(k, len(documents))
    one = _nearest(queries, documents, k)
    other = _nearest(other_queries, other_documents, k)
    return (one.unsqueeze(2) == other.unsqueeze(1)).any(2).float().mean(1)


def _nearest(queries, documents, k: int) -> Tensor:
    normalized = nn.functional.normalize(queries, dim=-1) @ nn.functional.normalize(documents, dim=-1).T
    return normalized.topk(k, dim=1).indices


def linear_cka(a: Float[Tensor, "N D"], b: Float[Tensor, "N E"]) -> float:
    """Linear centered kernel alignment of features (arXiv:1905.00414, section 3): 1 up to rotation and scale."""
    a, b = (x.double() - x.double().mean(0) for x in (a, b))
    return float((a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm()))
