import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import norm

from formulary.errors import FormularyError, UsageError
from formulary.papers.generation.lightsb import LightSB

GRID = np.linspace(-14, 14, 14_001)


def mixture(dim=1, potentials=3, epsilon=0.7, seed=0) -> LightSB:
    torch.manual_seed(seed)
    model = LightSB.build(dim=dim, potentials=potentials, epsilon=epsilon).double().requires_grad_(False)
    model.log_scales.copy_(torch.randn(potentials, dim, dtype=torch.float64) * 0.5 - 0.5)
    model.offsets.copy_(torch.randn(potentials, dtype=torch.float64) * 0.5)
    return model


def log_v(model: LightSB) -> np.ndarray:
    """log v on the grid, from scipy's normal density and the definition alone."""
    shifts, scales = model.shifts[:, 0].numpy(), model.log_scales.exp()[:, 0].numpy()
    weights = (model.offsets / model.config.epsilon).exp().numpy()
    terms = [norm.pdf(GRID, r, math.sqrt(model.config.epsilon * s)) * a for r, s, a in zip(shifts, scales, weights)]
    return np.log(np.maximum(sum(terms), 1e-300))


def gaussians(dim: int, epsilon: float) -> tuple[np.ndarray, ...]:
    """Two Gaussians with diagonal covariances, and slope and shift of the entropic plan y | x ~ N(s x + r, epsilon s).

    The covariance of x and y is s V0 with s the root of V1 = s^2 V0 + epsilon s (Janati et al., arXiv:2006.02572).
    """
    rng = np.random.default_rng(dim)
    m0, m1, v0, v1 = rng.normal(size=dim), rng.normal(size=dim), rng.uniform(0.3, 2, dim), rng.uniform(0.3, 2, dim)
    slope = (np.sqrt(epsilon**2 + 4 * v0 * v1) - epsilon) / (2 * v0)
    return m0, v0, m1, v1, slope, m1 - slope * m0


def with_moments(mean: np.ndarray, variance: np.ndarray, n: int = 400) -> torch.Tensor:
    """Samples whose mean and covariance are exactly the ones given."""
    x = np.random.default_rng(0).normal(size=(n, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / n)).T
    return torch.tensor(x * np.sqrt(variance) + mean)


def optimal(dim: int, epsilon: float) -> tuple[LightSB, dict[str, torch.Tensor]]:
    m0, v0, m1, v1, slope, shift = gaussians(dim, epsilon)
    model = LightSB.build(dim=dim, potentials=1, epsilon=epsilon).double()
    model.shifts.data.copy_(torch.tensor(shift)[None])
    model.log_scales.data.copy_(torch.tensor(slope).log()[None])
    return model, {"x0": with_moments(m0, v0), "x1": with_moments(m1, v1)}


@pytest.mark.parametrize("dim", [1, 2, 3, 4])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 10.0])
def test_the_closed_form_gaussian_plan_is_a_minimum_of_the_loss(dim, epsilon):
    model, batch = optimal(dim, epsilon)
    model.loss(batch).backward()
    for parameter in model.parameters():
        assert float(parameter.grad.abs().max()) < 1e-8 / epsilon
    best = float(model.loss(batch).detach())
    for parameter in (model.shifts, model.log_scales):
        for sign in (-1, 1):
            parameter.data += 0.05 * sign
            assert float(model.loss(batch).detach()) > best + 1e-6
            parameter.data -= 0.05 * sign


@pytest.mark.parametrize("dim", [1, 4])
def test_training_finds_the_closed_form_gaussian_plan(dim):
    epsilon = 0.5
    truth, batch = optimal(dim, epsilon)
    torch.manual_seed(0)
    model = LightSB.build(dim=dim, potentials=1, epsilon=epsilon).double()
    model.start(batch)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(model.log_scales.exp(), truth.log_scales.exp(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(model.shifts, truth.shifts, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("x", [-1.3, 0.0, 0.8])
def test_the_plan_is_the_tilted_potential_normalized(x):
    model = mixture()
    tilted = x * GRID / model.config.epsilon + log_v(model)
    log_c = logsumexp(tilted) + math.log(GRID[1] - GRID[0])
    point = torch.tensor([[x]], dtype=torch.float64)
    assert float(model.log_normalizer(point)) == pytest.approx(log_c, abs=1e-8)
    log_weights, means, variances = model.plan(point)
    assert float(log_weights.exp().sum()) == pytest.approx(1)
    density = sum(
        float(w) * norm.pdf(GRID, float(m), math.sqrt(float(v)))
        for w, m, v in zip(log_weights[0].exp(), means[0, :, 0], variances[:, 0])
    )
    np.testing.assert_allclose(density, np.exp(tilted - log_c), atol=1e-9)


def test_log_mixture_in_more_dimensions():
    model = mixture(dim=3)
    y = torch.randn(5, 3, dtype=torch.float64)
    components = torch.distributions.Normal(model.shifts, (0.7 * model.log_scales.exp()).sqrt())
    expected = (components.log_prob(y.unsqueeze(1)).sum(-1) + model.offsets / 0.7).logsumexp(-1)
    torch.testing.assert_close(model.log_mixture(y), expected)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("x", [-1.1, 0.6])
def test_the_drift_is_the_derivative_of_the_heat_flow_of_the_potential(x, t):
    """phi_t(x) = int N(y | x, epsilon (1 - t)) exp(|y|^2 / (2 epsilon)) v(y) dy, integrated and differentiated
    numerically."""
    model = mixture(epsilon=0.7)
    epsilon = 0.7
    log_terminal = GRID**2 / (2 * epsilon) + log_v(model)

    def log_phi(at):
        return logsumexp(log_terminal + norm.logpdf(GRID, at, math.sqrt(epsilon * (1 - t)))) + math.log(
            GRID[1] - GRID[0]
        )

    point = torch.tensor([[x]], dtype=torch.float64)
    slope = (log_phi(x + 1e-4) - log_phi(x - 1e-4)) / 2e-4
    assert float(model.drift(point, t)) == pytest.approx(epsilon * slope, rel=1e-5, abs=1e-5)
    gap = float(model.log_potential(point, t)) - log_phi(x)
    other = float(model.log_potential(point + 0.5, t)) - log_phi(x + 0.5)
    assert gap == pytest.approx(other, abs=1e-6)


def test_the_drift_is_the_gradient_of_the_log_potential_up_to_the_last_moment():
    model = mixture(dim=4, potentials=5)
    for t in (0.0, 0.5, 1.0):
        x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(model.log_potential(x, t).sum(), x)
        torch.testing.assert_close(model.drift(x, t).detach(), 0.7 * gradient)


def test_the_plan_equals_sinkhorns_on_a_grid():
    epsilon = 0.5
    m0, v0, m1, v1, slope, shift = gaussians(1, epsilon)
    x, y = np.linspace(-6, 6, 121) + m0, np.linspace(-6, 6, 121) + m1
    log_p, log_q = (norm.logpdf(z, m, math.sqrt(v)) for z, m, v in ((x, m0[0], v0[0]), (y, m1[0], v1[0])))
    log_p, log_q = log_p - logsumexp(log_p), log_q - logsumexp(log_q)
    kernel = -((x[:, None] - y) ** 2) / (2 * epsilon)
    g = np.zeros_like(y)
    for _ in range(200):
        f = log_p - logsumexp(kernel + g, axis=1)
        g = log_q - logsumexp(kernel + f[:, None], axis=0)
    conditional = np.exp(kernel + g - logsumexp(kernel + g, axis=1, keepdims=True))
    model, _ = optimal(1, epsilon)
    middle = slice(45, 76, 5)
    plan = model.requires_grad_(False).plan(torch.tensor(x[middle, None]))
    means = conditional[middle] @ y
    np.testing.assert_allclose(plan.means[:, 0, 0], means, atol=5e-4)
    np.testing.assert_allclose(np.full(7, float(plan.variances)), conditional[middle] @ y**2 - means**2, rtol=1e-3)


def test_samples_follow_the_plan():
    model, x = mixture(dim=2), torch.tensor([[0.4, -0.9]], dtype=torch.float64).repeat(20_000, 1)
    y = model.predict(x)
    log_weights, means, variances = model.plan(x[:1])
    weights = log_weights[0].exp()[:, None]
    mean = (weights * means[0]).sum(0)
    variance = (weights * (variances + means[0] ** 2)).sum(0) - mean**2
    torch.testing.assert_close(y.mean(0), mean, atol=0.04, rtol=0)
    torch.testing.assert_close(y.var(0), variance, atol=0, rtol=0.05)


def test_exact_and_stepwise_paths_agree_in_distribution():
    model = mixture(epsilon=0.3)
    x0 = torch.randn(4000, 1, dtype=torch.float64)
    exact, stepwise = model.sample_path(x0, 10), model.sample_path(x0, 100, kind="euler")[::10]
    assert exact.shape == (11, 4000, 1) and bool((exact[0] == x0).all())
    for a, b in zip(exact[1:], stepwise[1:]):
        assert abs(float(a.mean() - b.mean())) < 0.08
        assert float(a.std() / b.std()) == pytest.approx(1, abs=0.06)


def test_between_its_ends_an_exact_path_is_a_brownian_bridge():
    model, steps = mixture(dim=2, epsilon=0.3), 5
    path = model.sample_path(torch.randn(20_000, 2, dtype=torch.float64), steps)
    away = [path[i] - path[0] - (path[-1] - path[0]) * i / steps for i in range(steps + 1)]
    for i in range(1, steps):
        t = i / steps
        torch.testing.assert_close(
            away[i].var(0), torch.full((2,), 0.3 * t * (1 - t), dtype=torch.float64), atol=0, rtol=0.05
        )
        ahead = (away[1] * away[i]).mean(0)
        torch.testing.assert_close(
            ahead, torch.full((2,), 0.3 * (1 - t) / steps, dtype=torch.float64), atol=0, rtol=0.08
        )


def test_start_puts_the_potentials_on_target_samples():
    torch.manual_seed(0)
    x1 = torch.randn(30, 2)
    for potentials in (7, 50):
        model = LightSB.build(dim=2, potentials=potentials)
        model.start({"x0": x1, "x1": x1})
        nearest = torch.cdist(model.shifts.detach(), x1).min(1).values
        assert float(nearest.max()) < 1e-6
        assert len(model.shifts.detach().unique(dim=0)) == min(potentials, 30)


def test_far_points_and_small_noise_stay_finite():
    torch.manual_seed(0)
    model = LightSB.build(dim=8, potentials=20, epsilon=1e-3)
    x = 50 * torch.randn(16, 8)
    model.loss({"x0": x, "x1": x}).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    assert bool(model.predict(x).isfinite().all()) and bool(model.sample_path(x, 5).isfinite().all())


def test_save_and_load_bit_identical(tmp_path):
    model = LightSB.build(dim=3, potentials=4, epsilon=0.25)
    model.save(tmp_path)
    again = LightSB.load(tmp_path)
    x = torch.randn(5, 3)
    assert again.config == model.config
    torch.manual_seed(1)
    expected = model.predict(x)
    torch.manual_seed(1)
    assert again.predict(x).equal(expected)


def test_one_line_errors(tmp_path):
    with pytest.raises(UsageError, match="epsilon must be between"):
        LightSB.build(epsilon=0.0)
    with pytest.raises(UsageError, match="did you mean 'potentials'"):
        LightSB.build(potential=3)
    with pytest.raises(UsageError, match="none are named"):
        LightSB.build("small")
    with pytest.raises(UsageError, match=r"x1 must be \(B, 2\)"):
        LightSB.build(dim=2).start({"x1": torch.zeros(4, 3)})
    with pytest.raises(UsageError, match="did you mean 'euler'"):
        LightSB.build(dim=2).sample_path(torch.zeros(1, 2), 3, kind="eulr")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormularyError, match="is not a saved lightsb model"):
        LightSB.load(tmp_path)
