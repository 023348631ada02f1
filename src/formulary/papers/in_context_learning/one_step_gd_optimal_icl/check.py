"""A layer trained by Adam on fresh prompts (d = 5, n = 20) against the closed-form step, for isotropic, anisotropic and nonlinear data.

Both arms are layers and are measured alike: "one step" has its weights set by hand. For nonlinear responses, whose step has no simple
closed form, it is estimated on prompts of its own.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from formulary.evidence import Check, Outcome, all_of, at_least, at_most
from formulary.papers.in_context_learning.one_step_gd_optimal_icl.method import (
    LinearSelfAttention,
    best_step,
    effective_matrix,
    gd_layer,
    linear_prompts,
    optimal_step,
    relu_prompts,
    train_layer,
)

D, N, NOISE, STEPS, BATCH = 5, 20, 0.5, 1200, 1024
TESTS, PROMPTS = 50, 1024
COVARIANCE = torch.logspace(1, -1, D, base=4.0).diag()
PLAIN, INVERSE = torch.eye(D), COVARIANCE.inverse()
DRAWS = {
    "isotropic": lambda count, generator: linear_prompts(count, N, D, NOISE, None, generator),
    "anisotropic": lambda count, generator: linear_prompts(count, N, D, NOISE, COVARIANCE, generator),
    "nonlinear": lambda count, generator: relu_prompts(count, N, D, NOISE, generator=generator),
}


def loss_on(case: str) -> str:
    """The name of the metric."""
    return f"squared error on {case} prompts"


COSINE = {
    "isotropic": "cosine with I on isotropic prompts",
    "anisotropic": "cosine with the inverse covariance on anisotropic prompts",
    "nonlinear": "cosine with I on nonlinear prompts",
}
CLEARER = "cosine with the inverse covariance less that with I on anisotropic prompts"
STEP = "relative error of the step on isotropic prompts"


def prepare(seed: int) -> SimpleNamespace:
    """Test prompts of the three kinds, and the nonlinear step from as many others."""
    test = {case: draw(TESTS * PROMPTS, torch.Generator().manual_seed(3 * seed)) for case, draw in DRAWS.items()}
    step = best_step(DRAWS["nonlinear"](2 * TESTS * PROMPTS, torch.Generator().manual_seed(3 * seed + 1)))
    return SimpleNamespace(seed=seed, test=test, nonlinear_step=step)


def trained(context: SimpleNamespace) -> dict[str, LinearSelfAttention]:
    """A layer trained on each kind of prompt."""
    return {case: train_layer(draw, steps=STEPS, batch=BATCH, seed=3 * context.seed + 2) for case, draw in DRAWS.items()}


def by_hand(context: SimpleNamespace) -> dict[str, LinearSelfAttention]:
    """The steps that the theorems name, as layers."""
    eta = optimal_step(N, D, NOISE)
    return {"isotropic": gd_layer(D, eta), "anisotropic": gd_layer(D, eta, INVERSE), "nonlinear": gd_layer(D, context.nonlinear_step)}


def cosine(a: Tensor, b: Tensor) -> float:
    """The cosine of two matrices as vectors."""
    return float((a * b).sum() / (a.norm() * b.norm()))


def arm(layers_of):
    def run(context: SimpleNamespace) -> Outcome:
        layers, values = layers_of(context), {}
        for case, layer in layers.items():
            X, y, x, target = context.test[case]
            with torch.no_grad():
                errors = (layer(X, y, x) - target).square()
            values[loss_on(case)] = errors.view(TESTS, PROMPTS).mean(1).tolist()
            values[COSINE[case]] = [cosine(effective_matrix(layer), INVERSE if case == "anisotropic" else PLAIN)]
        values[CLEARER] = [values[COSINE["anisotropic"]][0] - cosine(effective_matrix(layers["anisotropic"]), PLAIN)]
        learned = float(effective_matrix(layers["isotropic"]).diagonal().mean())
        values[STEP] = [abs(learned / optimal_step(N, D, NOISE) - 1)]
        return Outcome(values, budget={"parameters": sum(p.numel() for p in layers["isotropic"].parameters())})

    return run


check = Check(
    claim="Trained linear attention reaches the loss of the closed-form gradient step within 2 %, and does not beat it by as much, on "
    "isotropic, anisotropic and nonlinear data; its matrix has a cosine of at least 0.99 with I (isotropic), 0.98 with the inverse "
    "covariance and 0.1 less with I (anisotropic), 0.98 with I (ReLU networks); its step is within 5 % of 1/(n+d+1+noise^2).",
    setup=prepare,
    arms={"trained layer": arm(trained), "one step": arm(by_hand)},
    holds=all_of(
        *(at_most("trained layer", "one step", ratio=1.02, metric=loss_on(case)) for case in DRAWS),
        *(at_least("trained layer", "one step", ratio=0.98, metric=loss_on(case)) for case in DRAWS),
        at_least("trained layer", 0.99, metric=COSINE["isotropic"], oracle="one step"),
        at_least("trained layer", 0.98, metric=COSINE["anisotropic"], oracle="one step"),
        at_least("trained layer", 0.10, metric=CLEARER, oracle="one step"),
        at_least("trained layer", 0.98, metric=COSINE["nonlinear"], oracle="one step"),
        at_most("trained layer", 0.05, metric=STEP, oracle="one step"),
    ),
    items="fresh",
    redraws="prompts, initial weights and test prompts",
    seeds=6,
    version=1,
    scope="5 inputs, 20 examples, noise of 0.5, one covariance, ReLU networks of 20 units",
)
