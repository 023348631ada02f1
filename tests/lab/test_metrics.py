"""Metrics against numpy, transformers' own loss and hand-made cases."""

import numpy as np
import pytest
import torch

from formulary import lab
from formulary.errors import UsageError
from formulary.lab import metrics


def test_sequence_loss_equals_transformers_loss_without_padding():
    model = lab.tiny("llama")
    ids = lab.inputs_for(model, batch=1, labels=True)
    loss = metrics.sequence_loss(model, [ids])
    with torch.no_grad():
        expected = model(**ids).loss
    assert loss.tokens.tolist() == [11]
    torch.testing.assert_close(loss.per_token[0], expected)
    assert abs(loss.perplexity - float(expected.exp())) < 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_padding_on_either_side_changes_no_sequence(kind, side):
    model = lab.tiny(kind)
    batch = lab.inputs_for(model)
    if side == "right":
        batch = {key: value.flip(1) for key, value in batch.items()}
    if kind == "gpt2":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    together = metrics.sequence_loss(model, [batch])
    whole = [row[mask.bool()].unsqueeze(0) for row, mask in zip(batch["input_ids"], batch["attention_mask"])]
    alone = metrics.sequence_loss(model, [{"input_ids": ids} for ids in whole])
    assert together.tokens.tolist() == alone.tokens.tolist() == [7, 11]
    torch.testing.assert_close(together.nats, alone.nats, atol=1e-4, rtol=1e-5)


def test_sequence_loss_of_an_encoder_decoder():
    model = lab.tiny("t5")
    batch = lab.inputs_for(model, labels=True)
    with torch.no_grad():
        expected = model(**batch).loss
    loss = metrics.sequence_loss(model, [batch])
    torch.testing.assert_close(loss.nats.sum() / loss.tokens.sum(), expected)
    with pytest.raises(UsageError, match="must carry labels"):
        metrics.sequence_loss(model, [lab.inputs_for(model)])


def test_nothing_to_predict_is_refused():
    model = lab.tiny("gpt2")
    with pytest.raises(UsageError, match="no token to predict"):
        metrics.sequence_loss(model, [{"input_ids": torch.tensor([[5]])}])


def test_masked_models_are_not_shifted():
    logits = torch.full((1, 3, 4), -10.0)
    logits[0, 1, 2] = 10.0
    labels = torch.tensor([[-100, 2, -100]])
    assert metrics.token_nats(logits, labels, shift=False).nats < 1e-6
    assert metrics.sequence_accuracy(logits, labels, shift=False).tolist() == [1.0]
    assert metrics.sequence_accuracy(logits, labels, shift=True).tolist() == [0.0]


def test_cosine_and_correlation_against_numpy():
    a, b = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)), torch.randn(5, 3, 4)
    for i in range(5):
        x, y = a[i].flatten().numpy(), b[i].flatten().numpy()
        assert abs(float(metrics.cosine(a, b)[i]) - x @ y / np.linalg.norm(x) / np.linalg.norm(y)) < 1e-6
        assert abs(float(metrics.correlation(a, b)[i]) - np.corrcoef(x, y)[0, 1]) < 1e-6
    assert torch.allclose(metrics.correlation(a, 3 * a + 2), torch.ones(5))


def test_retrieval_overlap_by_sorting():
    generator = torch.Generator().manual_seed(0)
    queries, documents = torch.randn(4, 6, generator=generator), torch.randn(30, 6, generator=generator)
    others = torch.randn(4, 3, generator=generator), torch.randn(30, 3, generator=generator)

    def best(q, d):
        scores = [float(q @ x / x.norm()) for x in d]
        return set(sorted(range(len(d)), key=lambda i: -scores[i])[:5])

    expected = [len(best(queries[i], documents) & best(others[0][i], others[1])) / 5 for i in range(4)]
    assert torch.allclose(metrics.retrieval_overlap(queries, documents, *others, k=5), torch.tensor(expected))
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    same = metrics.retrieval_overlap(queries, documents, 2 * queries @ turn, documents @ turn, k=5)
    assert same.tolist() == [1.0] * 4


def test_linear_cka_ignores_rotation_and_scale_only():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(400, 5, generator=generator), torch.randn(400, 5, generator=generator)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator)).Q
    assert abs(metrics.linear_cka(a, 3 * a @ turn + 1) - 1) < 1e-6
    assert metrics.linear_cka(a, b) < 0.1


def test_accuracy_is_per_item():
    assert metrics.accuracy(torch.eye(3), torch.tensor([0, 2, 2])).tolist() == [1.0, 0.0, 1.0]
