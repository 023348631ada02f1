"""What is true of LRT alone: the Eckart-Young error, exactness at full rank, the number of weights."""

import copy

import numpy as np
import pytest
import torch

from formulary.contracts import Data, parts
from formulary.errors import FormularyError, UsageError
from formulary.lab import small
from formulary.papers.low_rank.greenformers_lrt import LowRankLinear, LowRankTransformer
from formulary.papers.low_rank.greenformers_lrt.method import factorize


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (16, 16)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_error_is_that_of_eckart_and_young(shape, rank):
    weight = torch.randn(shape)
    reduce, expand = factorize(weight, rank)
    tail = np.linalg.svd(weight.double().numpy(), compute_uv=False)[rank:]
    error = np.linalg.norm((expand @ reduce - weight).double().numpy())
    assert error == pytest.approx(np.sqrt((tail**2).sum()), rel=1e-4, abs=1e-5)
    balance = (reduce.norm(dim=1) - expand.norm(dim=0)).abs().max()
    assert balance < 1e-4, "each factor carries the square root of the singular values"


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit", "t5"])
def test_a_model_of_low_rank_is_reproduced(family):
    """Weights that already have rank 3 lose nothing at rank 3, transposed layouts included."""
    model = small.tiny(family)
    for part in parts.linears(model):
        u, s, vh = torch.linalg.svd(part.weight(), full_matrices=False)
        part.raw.data.copy_(part.stored((u[:, :3] * s[:3]) @ vh[:3]))
    batch = small.inputs_for(model)
    expected = model(**batch)[0]
    changed, _ = LowRankTransformer(rank=3).apply(copy.deepcopy(model))
    torch.testing.assert_close(changed(**batch)[0], expected, rtol=1e-3, atol=1e-4)


def test_the_weights_are_as_many_as_the_ratio_says():
    model = small.tiny("llama")
    before = sum(part.weights for part in parts.linears(model))
    changed, report = LowRankTransformer(ratio=0.5).apply(model)
    after = sum(m.reduce.weight.numel() + m.expand.weight.numel() for m in changed.modules() if isinstance(m, LowRankLinear))
    assert 0.4 * before < after <= 0.5 * before
    assert all("rank" in change.note for change in report.changes)


def test_a_rank_that_saves_nothing_is_skipped_and_said():
    changed, report = LowRankTransformer(rank=12).apply(small.tiny("llama"))
    assert any("no smaller than dense" in skip.note for skip in report.skips) and "skipped" in report.headline
    with pytest.raises(FormularyError, match="nothing to change"):
        LowRankTransformer(rank=1000).apply(small.tiny("llama"))


def test_the_weight_reads_as_the_product_and_computes_it():
    layer, x = LowRankLinear(6, 2, 4), torch.randn(3, 6)
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)


def test_fine_tuning_brings_the_outputs_back():
    model = small.tiny("bert")
    items = [{"input_ids": torch.randint(3, 97, (10,), generator=torch.Generator().manual_seed(i))} for i in range(8)]
    batch = Data(items).collate(items)
    expected = model(**batch)[0]
    error = {}
    for steps in (0, 40):
        changed, report = LowRankTransformer(ratio=0.3, steps=steps, learning_rate=5e-3).apply(copy.deepcopy(model), Data(items))
        error[steps] = (changed(**batch)[0] - expected).detach().square().mean().item()
        assert ("fine-tuned" in report.headline) == (steps > 0)
    assert error[40] < 0.8 * error[0]


@pytest.mark.parametrize("wrong", [{"ratio": 0.0}, {"ratio": 1.5}, {"rank": 0}, {"steps": -1}, {"learning_rate": 0.0}])
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(UsageError, match="greenformers-lrt"):
        LowRankTransformer(**wrong)


def test_fine_tuning_without_data_is_refused():
    with pytest.raises(FormularyError, match="needs data"):
        LowRankTransformer(steps=3).apply(small.tiny("bert"))
