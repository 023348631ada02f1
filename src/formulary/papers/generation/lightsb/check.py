"""Two Gaussian pairs whose bridge is known in closed form, and a Gaussian turned into a ring of eight beside Sinkhorn's
plan."""

from types import SimpleNamespace

import numpy as np
import torch
from scipy.linalg import sqrtm

from formulary import lab
from formulary.evidence import Check, Outcome, all_of, at_most
from formulary.papers.generation.lightsb.method import LightSB

EPSILON, SAMPLES, STEPS = 0.1, 2000, 2000
FIT = {"steps": STEPS, "lr": 1e-2, "schedule": "cosine"}
GAUSSIAN = "cBW-UVP, %"
COST, TARGET = "cost off Sinkhorn's, %", "sliced W2 to the target"


def covariance(dim: int, rng: np.random.Generator, rotated: bool) -> np.ndarray:
    """Variances from 0.3 to 2 along the axes, or along random ones."""
    axes = np.linalg.qr(rng.normal(size=(dim, dim)))[0] if rotated else np.eye(dim)
    return axes * rng.uniform(0.3, 2, dim) @ axes.T


def gaussian_pair(dim: int, rng: np.random.Generator, rotated: bool) -> SimpleNamespace:
    """Samples, and the closed-form plan y | x ~ N(slope x + shift, noise) of arXiv:2006.02572, theorem 1."""
    m0, m1, v0, v1 = (
        rng.normal(size=dim),
        rng.normal(size=dim),
        covariance(dim, rng, rotated),
        covariance(dim, rng, rotated),
    )
    root = sqrtm(v0).real
    cross = root @ sqrtm(4 * root @ v1 @ root + EPSILON**2 * np.eye(dim)).real @ np.linalg.inv(
        root
    ) / 2 - EPSILON / 2 * np.eye(dim)
    slope = cross.T @ np.linalg.inv(v0)
    draw = lambda mean, cov, n: torch.tensor(rng.multivariate_normal(mean, cov, n), dtype=torch.float32)
    return SimpleNamespace(
        x0=draw(m0, v0, SAMPLES), x1=draw(m1, v1, SAMPLES), test=draw(m0, v0, 200),
        slope=slope, shift=m1 - slope @ m0, noise=v1 - slope @ cross, target=(m1, v1),
    )  # fmt: skip


def ring(n: int, rng: np.random.Generator) -> torch.Tensor:
    """Eight Gaussians of deviation 0.3 on a circle of radius 3."""
    angle = 2 * np.pi * rng.integers(8, size=n) / 8
    points = 3 * np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.3 * rng.normal(size=(n, 2))
    return torch.tensor(points, dtype=torch.float32)


def normal(n: int, rng: np.random.Generator) -> torch.Tensor:
    return torch.tensor(rng.normal(size=(n, 2)), dtype=torch.float32)


def prepare(seed: int) -> SimpleNamespace:
    rng = np.random.default_rng(seed)
    return SimpleNamespace(
        seed=seed, rotated=gaussian_pair(2, rng, True), axes=gaussian_pair(16, rng, False),
        x0=normal(SAMPLES, rng), x1=ring(SAMPLES, rng), test=normal(1000, rng),
        fresh=ring(1000, rng), other=ring(1000, rng),
    )  # fmt: skip


def fitted(x0: torch.Tensor, x1: torch.Tensor, seed: int, steps: int = STEPS) -> LightSB:
    """The bridge with 50 potentials, trained on random pairs of samples."""

    def batch(step: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return {name: x[torch.randint(len(x), (128,), generator=generator)] for name, x in (("x0", x0), ("x1", x1))}

    torch.manual_seed(seed)
    model = LightSB.build(dim=x0.shape[1], potentials=50, epsilon=EPSILON)
    model.start({"x0": x0, "x1": x1})
    if steps:
        lab.train(model, batch, loss=lambda model, batch: model.loss(batch), seed=seed, **FIT)
    return model.requires_grad_(False).eval()


def unexplained(pair: SimpleNamespace, means: np.ndarray, covariances: np.ndarray) -> float:
    """Squared Bures-Wasserstein distance of the plan's moments to the true conditionals, mean over test points, in % of
    the target's variance."""
    root = sqrtm(pair.noise).real
    eigenvalues = np.linalg.eigvalsh(root @ covariances @ root).clip(min=0)
    spread = np.trace(pair.noise) + np.trace(covariances, axis1=-2, axis2=-1) - 2 * np.sqrt(eigenvalues).sum(-1)
    true = pair.test.double().numpy() @ pair.slope.T + pair.shift
    return 100 * float((((means - true) ** 2).sum(-1) + spread).mean()) / float(np.trace(pair.target[1]))


def moments(model: LightSB, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Means (n, D) and covariances (n, D, D) of the model's plan at each x."""
    log_weights, means, variances = (part.double().numpy() for part in model.plan(x))
    weights = np.exp(log_weights) / np.exp(log_weights).sum(-1, keepdims=True)
    mean = np.einsum("nk,nkd->nd", weights, means)
    away = means - mean[:, None]
    within = np.einsum("nk,kd->nd", weights, variances)[:, :, None] * np.eye(means.shape[-1])
    return mean, np.einsum("nk,nki,nkj->nij", weights, away, away, optimize=True) + within


def sliced(a: torch.Tensor, b: torch.Tensor) -> float:
    """Sliced 2-Wasserstein distance of two samples of equal size over 200 fixed directions."""
    angle = torch.linspace(0, torch.pi, 201)[:-1]
    directions = torch.stack([angle.cos(), angle.sin()])
    return float(((a @ directions).sort(0).values - (b @ directions).sort(0).values).pow(2).mean().sqrt())


def sinkhorn_cost(x: torch.Tensor, y: torch.Tensor, rounds: int = 300) -> float:
    """Mean |y - x|^2 under the discrete entropic plan between two samples, by Sinkhorn's iteration in the log
    domain."""
    squares = torch.cdist(x.double(), y.double()) ** 2
    kernel, g = -squares / (2 * EPSILON), torch.zeros(len(y), dtype=torch.float64)
    uniform_x, uniform_y = -torch.log(torch.tensor(float(len(x)))), -torch.log(torch.tensor(float(len(y))))
    for _ in range(rounds):
        f = uniform_x - (kernel + g).logsumexp(1)
        g = uniform_y - (kernel + f[:, None]).logsumexp(0)
    return float(((kernel + g + f[:, None]).exp() * squares).sum())


def bridge(steps: int):
    def run(c: SimpleNamespace) -> Outcome:
        models = [fitted(p.x0, p.x1, c.seed, steps) for p in (c.rotated, c.axes)]
        model = fitted(c.x0, c.x1, c.seed, steps)
        end = model.predict(c.test)
        reference = sinkhorn_cost(c.test, c.fresh)
        off = 100 * abs(float((end - c.test).pow(2).sum(1).mean()) / reference - 1)
        gaussian = max(unexplained(pair, *moments(m, pair.test)) for pair, m in zip((c.rotated, c.axes), models))
        budget = {"parameters": sum(p.numel() for p in model.parameters()), "steps": steps}
        return Outcome({GAUSSIAN: [gaussian], COST: [off], TARGET: [sliced(end, c.fresh)]}, budget=budget)

    return run


def independent(c: SimpleNamespace) -> dict[str, list[float]]:
    """Ends drawn without looking at the start: the best plan for infinite noise, and the floor of the distance to the
    target."""
    gaussian = max(unexplained(pair, pair.target[0], pair.target[1][None]) for pair in (c.rotated, c.axes))
    off = 100 * abs(float((c.other - c.test).pow(2).sum(1).mean()) / sinkhorn_cost(c.test, c.fresh) - 1)
    return {GAUSSIAN: [gaussian], COST: [off], TARGET: [sliced(c.other, c.fresh)]}


check = Check(
    claim="From 2,000 samples a side, the bridge is within 2 % of the closed-form plan between Gaussians (the worse of "
    "a rotated pair in 2 and an axis-parallel pair in 16 dimensions), costs within 5 % of Sinkhorn's plan, and ends "
    "within 1.25 of the sampling floor of its target.",
    setup=prepare,
    arms={"lightsb": bridge(STEPS), "untrained": bridge(0), "independent": independent},
    holds=all_of(
        at_most("lightsb", 2.0, metric=GAUSSIAN),
        at_most("lightsb", 5.0, metric=COST),
        at_most("lightsb", "independent", ratio=1.25, metric=TARGET),
    ),
    items="fresh",
    redraws="the Gaussians, all samples, initialization and batches",
    seeds=8,
    version=1,
    scope="epsilon 0.1, 50 potentials with diagonal matrices, 2,000 steps",
)
