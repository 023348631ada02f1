import pytest
import torch

from formulary.errors import UsageError
from formulary.papers.in_context_learning.one_step_gd_optimal_icl import OneStepGD
from formulary.papers.in_context_learning.one_step_gd_optimal_icl.method import (
    LinearSelfAttention,
    best_step,
    effective_matrix,
    expected_loss,
    gd_layer,
    linear_prompts,
    mean_loss,
    one_step_gd,
    optimal_step,
    other_parts,
    relu_prompts,
    train_layer,
)

SIGMA = torch.tensor([[2.0, 0.6, 0.0], [0.6, 1.0, -0.2], [0.0, -0.2, 0.3]])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("n, d, noise, covariance", [(6, 3, 0.0, None), (1, 4, 1.5, None), (15, 2, 0.5, None), (6, 3, 0.7, SIGMA)])
def test_the_step_is_the_best_of_a_grid_and_its_loss_the_expected_one(n, d, noise, covariance):
    prompts = linear_prompts(200_000, n, d, noise, covariance, generator())
    inverse = None if covariance is None else covariance.inverse()
    X, y, x, target = prompts
    unit = one_step_gd(X, y, x, 1.0, inverse)
    grid = torch.linspace(0.8, 1.2, 41) * optimal_step(n, d, noise)
    losses = torch.stack([mean_loss(eta * unit, target) for eta in grid])
    assert float(grid[losses.argmin()]) == pytest.approx(optimal_step(n, d, noise), rel=0.04)
    assert best_step(prompts, inverse) == pytest.approx(optimal_step(n, d, noise), rel=0.03)
    assert float(losses[20]) == pytest.approx(expected_loss(n, d, noise), rel=0.02)
    assert float(losses[0]) == pytest.approx(expected_loss(n, d, noise, step=float(grid[0])), rel=0.02)


def test_prompts_have_the_moments_they_should():
    X, y, x, target = linear_prompts(100_000, 4, 3, 0.5, SIGMA, generator())
    flat = X.flatten(0, 1)
    assert torch.allclose(flat.T @ flat / len(flat), SIGMA, atol=0.02)
    assert torch.allclose(x.T @ x / len(x), SIGMA, atol=0.02)
    assert float(y.var()) == pytest.approx(3 + 0.25, rel=0.02) and float(target.var()) == pytest.approx(3.25, rel=0.02)
    assert float((X[:, 0] @ SIGMA.inverse() * x).sum(1).mul(y[:, 0] * target).mean()) == pytest.approx(3, rel=0.1)


def test_one_prompt_shares_its_function_between_examples_and_query():
    X, y, x, target = linear_prompts(50, 8, 3, generator=generator())
    w = torch.linalg.lstsq(X, y.unsqueeze(-1)).solution.squeeze(-1)
    assert torch.allclose((w * x).sum(1), target, atol=1e-3)
    X, y, x, target = relu_prompts(50_000, 2, 3, 0.0, generator=generator())
    flipped = relu_prompts(50_000, 2, 3, 0.0, generator=generator(1))
    assert float(y.mean()) == pytest.approx(0, abs=0.03) and float(y.var()) == pytest.approx(3, rel=0.05)
    assert float((target * y[:, 0] * (X[:, 0] * x).sum(1)).mean()) > 1 and not torch.equal(flipped[1], y)


def test_the_layer_is_linear_attention_written_out():
    layer = LinearSelfAttention(3, std=1.0)
    X, y, x, _ = linear_prompts(4, 5, 3, 0.5, generator=generator())
    predictions = layer(X, y, x)
    for b in range(4):
        query, out = torch.cat([x[b], torch.zeros(1)]), torch.zeros(4)
        for i in range(5):
            token = torch.cat([X[b, i], y[b, i : i + 1]])
            out += layer.W_PV @ token * (token @ layer.W_KQ @ query)
        assert torch.allclose(predictions[b], out[-1], atol=1e-3)


@pytest.mark.parametrize("preconditioner", [None, SIGMA.inverse()])
def test_with_weights_set_by_hand_the_layer_is_a_gradient_step(preconditioner):
    X, y, x, _ = linear_prompts(6, 7, 3, 0.5, generator=generator())
    layer, eta = gd_layer(3, 0.1, preconditioner), 0.1
    for b in range(6):
        w = torch.zeros(3, requires_grad=True)
        (0.5 * (X[b] @ w - y[b]).square().sum()).backward()
        stepped = -eta * w.grad if preconditioner is None else -eta * preconditioner.T @ w.grad
        assert torch.allclose(layer(X, y, x)[b], stepped @ x[b], atol=1e-4)
        assert torch.allclose(one_step_gd(X, y, x, eta, preconditioner)[b], stepped @ x[b], atol=1e-4)
    assert torch.allclose(effective_matrix(layer), eta * (torch.eye(3) if preconditioner is None else preconditioner))
    assert other_parts(layer, X, y, x) < 1e-5


def test_the_effective_matrix_is_the_part_that_is_bilinear_in_gradient_and_query():
    layer = LinearSelfAttention(3, std=0.7)
    X, y, x, _ = linear_prompts(5, 6, 3, 0.5, generator=generator())
    odd = (layer(X, y, x) - layer(X, -y, x)) / 2
    assert torch.allclose(odd, one_step_gd(X, y, x, 1.0, effective_matrix(layer)), atol=1e-3)
    even = (layer(X, y, x) + layer(X, -y, x)) / 2
    assert other_parts(layer, X, y, x) == pytest.approx(float(even.detach().square().mean().sqrt()), rel=1e-3)


def test_training_finds_the_step_and_depends_on_its_seed_alone():
    draw = lambda count, g: linear_prompts(count, 12, 4, 0.5, None, g)
    layer = train_layer(draw, steps=300, batch=512)
    found = effective_matrix(layer) / optimal_step(12, 4, 0.5)
    assert torch.allclose(found, torch.eye(4), atol=0.15)
    seen = []
    keep = lambda count, g: seen.append(draw(count, g)) or seen[-1]
    torch.manual_seed(5)
    short = [train_layer(keep, steps=5, batch=8, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(short[0].W_KQ, short[1].W_KQ) and not torch.equal(short[0].W_KQ, short[2].W_KQ)
    last = [seen[i][0] for i in (5, 11, 17)]
    assert torch.equal(last[0], last[1]) and not torch.equal(last[0], last[2]) and not torch.equal(last[0], seen[4][0])


def test_training_that_diverges_says_so():
    with pytest.raises(UsageError, match="try an lr below"):
        train_layer(lambda count, g: tuple(1e30 * part for part in linear_prompts(count, 4, 2, 0.0, None, g)), steps=9, batch=8)


def test_the_figure_holds_what_was_trained():
    report = OneStepGD(d=2, prompt_lengths=(6, 3), steps=200, batch=256).run()
    assert [row["n"] for row in report.tables["loss"]] == [3, 6]
    for row in report.tables["loss"]:
        assert row["one step"] == pytest.approx(expected_loss(row["n"], 2)) and row["trained layer"] < 1.3 * row["one step"]
    assert len(report.figures) == 3 and len(report.figures["matrix, anisotropic"]["values"]) == 2
    assert not report.notes and OneStepGD(d=2, prompt_lengths=(6,), steps=1, batch=8).run().notes
    learned = [row["learned"] for row in report.tables["preconditioner"]]
    assert learned[1] / learned[0] > 4


@pytest.mark.parametrize(
    "wrong", [{"d": 0}, {"prompt_lengths": ()}, {"prompt_lengths": (0,)}, {"noise": -1.0}, {"spread": 0.5}, {"steps": 0}]
)
def test_wrong_parameters_are_named_in_one_line(wrong):
    with pytest.raises(UsageError, match="n must" if wrong.get("prompt_lengths") else next(iter(wrong))) as told:
        OneStepGD(**wrong)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("covariance", [torch.eye(2), torch.ones(3, 3), torch.arange(9.0).view(3, 3)])
def test_a_covariance_must_be_one(covariance):
    with pytest.raises(UsageError, match="covariance must be"):
        linear_prompts(2, 4, 3, covariance=covariance)
