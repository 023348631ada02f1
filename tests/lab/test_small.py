"""The tiny models: every kind runs on its inputs, forward and backward, with padding on the side that it should be."""

import pytest
import torch

from formulary import lab
from formulary.errors import UsageError
from formulary.lab import small


@pytest.mark.parametrize("kind", small.KINDS)
def test_every_kind_runs_and_follows_its_seed(kind):
    before = torch.get_rng_state()
    model, same, other = lab.tiny(kind), lab.tiny(kind), lab.tiny(kind, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training and sum(p.numel() for p in model.parameters()) < 120_000
    inputs = lab.inputs_for(model, batch=3, length=9)
    with torch.no_grad():
        first, again, different = (m(**inputs)[0] for m in (model, same, other))
    assert first.shape[0] == 3 and first.isfinite().all()
    assert torch.equal(first, again) and not torch.equal(first, different)


@pytest.mark.parametrize("kind", small.DECODERS + small.ENCODER_DECODERS)
def test_language_models_get_labels_and_a_loss(kind):
    model = lab.tiny(kind)
    model(**lab.inputs_for(model, labels=True)).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("kind", small.DECODERS + small.ENCODERS)
def test_padding_is_on_the_right_side_and_matters_to_no_real_token(kind):
    model = lab.tiny(kind)
    inputs = lab.inputs_for(model, length=12)
    mask = inputs["attention_mask"]
    assert mask.sum(1).tolist() == [8, 12] and int(mask[0, 0]) == (0 if kind in small.DECODERS else 1)
    changed = inputs["input_ids"].masked_fill(mask == 0, 50)
    with torch.no_grad():
        one, other = model(**inputs)[0], model(input_ids=changed, attention_mask=mask)[0]
    torch.testing.assert_close(one[mask.bool()], other[mask.bool()], atol=1e-5, rtol=1e-4)


def test_norms_and_biases_are_not_at_their_defaults():
    model = lab.tiny("gpt2")
    assert not torch.equal(model.transformer.ln_f.weight, torch.ones(32))
    assert model.transformer.ln_f.bias.abs().min() > 0


def test_unknown_kind():
    with pytest.raises(UsageError, match="did you mean 'llama'"):
        lab.tiny("lama")
