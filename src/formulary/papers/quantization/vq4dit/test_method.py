"""What is true of VQ4DiT alone: k-means against scikit-learn, the mix of candidates against a loop, what is frozen, and
that calibration lowers the error that it is made for.
"""

import copy

import pytest
import torch

from formulary.contracts import Data, parts
from formulary.errors import FormularyError, UsageError
from formulary.lab.small import inputs_for, tiny
from formulary.papers.quantization.vq4dit.method import (
    VQ4DiT,
    VQLinear,
    Soft,
    block_error,
    k_means,
    nearest,
    random_inputs,
)

SMALL = {"codewords": 16, "dim": 2}


def data_for(model, n=8):
    batch = inputs_for(model, batch=n)
    return Data([{key: value[i] for key, value in batch.items()} for i in range(n)], batch_size=4)


def test_k_means_is_as_good_as_scikit_learns():
    from sklearn.cluster import KMeans

    torch.manual_seed(0)
    points = torch.randn(1500, 2)
    codebook, codes = k_means(points, 16)
    ours = float((codebook[codes] - points).square().sum())
    assert ours <= 1.1 * KMeans(16, n_init=1, random_state=0).fit(points.numpy()).inertia_
    assert torch.equal(codes, torch.cdist(points, codebook).argmin(1))


def test_a_codeword_without_vectors_finds_some():
    points = torch.cat([torch.zeros(50, 2), torch.tensor([[9.0, 9.0], [-9.0, 9.0], [9.0, -9.0]])])
    torch.manual_seed(0)
    codebook, codes = k_means(points, 4)
    assert float((codebook[codes] - points).abs().max()) < 1e-6


def test_candidates_are_the_nearest_codewords():
    vectors, codebook = torch.randn(70, 3), torch.randn(9, 3)
    distance, index = nearest(vectors, codebook, 4)
    every = torch.cdist(vectors, codebook).square().sort(1)
    torch.testing.assert_close(distance, every.values[:, :4], atol=1e-4, rtol=1e-4)
    assert torch.equal(index, every.indices[:, :4])


def test_the_mix_of_candidates_against_a_loop():
    torch.manual_seed(0)
    soft = Soft(torch.randn(20, 2), torch.randn(8, 2), 3)
    soft.frozen[4] = True
    for i, row in enumerate(soft.weight()):
        ratios = [float(r) for r in soft.logits[i].detach().exp() / soft.logits[i].detach().exp().sum()]
        if i == 4:
            ratios = [float(r == max(ratios)) for r in ratios]
        mixed = sum(r * soft.codebook[c] for r, c in zip(ratios, soft.candidates[i]))
        torch.testing.assert_close(row, mixed)
    assert soft.logits[0, 0] > soft.logits[0, 1], "the nearest starts with the largest ratio"


def test_a_frozen_sub_vector_has_no_gradient_and_stays():
    soft = Soft(torch.randn(20, 2), torch.randn(8, 2), 2)
    with torch.no_grad():
        soft.logits[:5, 1] = soft.logits[:5, 0] + 9
    soft.freeze(0.99)
    soft.weight().sum().backward()
    assert bool(soft.frozen[:5].all()) and not soft.logits.grad[soft.frozen].any()
    assert soft.logits.grad[~soft.frozen].any()
    assert torch.equal(soft.codes()[:5], soft.candidates[:5, 1])


def test_the_regularizer_is_zero_when_all_is_decided():
    soft = Soft(torch.randn(20, 2), torch.randn(8, 2), 2)
    assert 0 < float(soft.undecided().detach()) < 1
    with torch.no_grad():
        soft.logits.zero_()
        assert float(soft.undecided()) == 1
        soft.logits[:, 0] = 60
        assert float(soft.undecided()) < 1e-6


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_without_steps_every_weight_is_its_nearest_codeword(kind):
    model = tiny(kind)
    old = {part.name: part.weight().clone() for part in parts.linears(model)}
    model, report = VQ4DiT(**SMALL, steps=0).apply(model)
    for change in report.changes:
        layer = model.get_submodule(change.name)
        pieces = old[change.name].reshape(-1, 2)
        near = layer.codebook[torch.cdist(pieces, layer.codebook).argmin(1)].detach()
        error = (layer.weight.detach().reshape(-1, 2) - pieces).square().sum(1)
        torch.testing.assert_close(error, (near - pieces).square().sum(1), atol=1e-6, rtol=1e-4)
        assert len(layer.weight.detach().reshape(-1, 2).unique(dim=0)) <= 16


def test_calibration_lowers_the_error_of_blocks():
    def error(**more):
        model = tiny("vit")
        data = data_for(model)
        made, report = VQ4DiT(**SMALL, **more).apply(copy.deepcopy(model), data)
        with torch.no_grad():
            return float(block_error(made, model, next(data.batches()))), report

    (alone, _), (tuned, _), (chosen, report) = error(steps=0), error(steps=15, candidates=1), error(steps=15)
    assert tuned < 0.9 * alone and chosen < 0.9 * alone
    assert 0 < report.figures["sub-vectors moved to another codeword"] < 1


def test_with_one_candidate_the_assignments_stay():
    model = tiny("vit")
    codes = [VQ4DiT(**SMALL, candidates=1, steps=steps).apply(copy.deepcopy(model))[0] for steps in (0, 4)]
    one, other = ({k: v for k, v in m.state_dict().items() if k.endswith(".codes")} for m in codes)
    assert one and all(torch.equal(one[key], other[key]) for key in one)


def test_block_error_leaves_padding_out():
    model, other = tiny("bert"), tiny("bert", seed=1)
    batch = inputs_for(model)
    with torch.no_grad():
        error = float(block_error(other, model, batch))
        batch["input_ids"][batch["attention_mask"] == 0] = 77
        assert abs(float(block_error(other, model, batch)) - error) < 1e-4 * error


@pytest.mark.parametrize("kind", ["llama", "t5", "dinov2"])
def test_no_data_is_needed(kind):
    model, report = VQ4DiT(**SMALL, steps=2, samples=4).apply(tiny(kind))
    assert "without data" in report.headline
    assert len(random_inputs(model, 3)) == 3 and all(layer.soft is None for layer in _layers(model))


def test_the_file_is_as_small_as_said(tmp_path):
    model, report = VQ4DiT(**SMALL, steps=0).apply(tiny("bert"))
    layers = _layers(model)
    stored = sum(layer.codes.numel() + 4 * layer.codebook.numel() for layer in layers)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    assert report.figures["bits per weight, codebooks counted"] == pytest.approx(8 * stored / weights)
    assert len(layers) == 12 and stored < weights * 4 / 10


def _layers(model):
    return [module for module in model.modules() if isinstance(module, VQLinear)]


def test_what_does_not_fit_is_skipped_and_said():
    model = tiny("mixtral")
    _, report = VQ4DiT(codewords=16, dim=2, steps=0).apply(model)
    assert "expert tensors stay dense" in report.headline
    with pytest.raises(FormularyError, match="too small for a codebook of 256"):
        VQ4DiT(steps=0).apply(tiny("llama"))


WRONG = [{"codewords": 100}, {"codewords": 512}, {"dim": 0}, {"candidates": 0}, {"steps": -1}, {"freeze": 0.1}]


@pytest.mark.parametrize("wrong", WRONG)
def test_parameters_out_of_range_are_refused_in_one_line(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        VQ4DiT(**wrong)
