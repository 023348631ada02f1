"""Sharpness-aware minimization: each step uses the gradient at the nearby weights where the loss is, to first order, worst.

    g = grad L(w),   eps = rho g / ||g||_2,   g' = grad L(w + eps) on the same batch,   w <- optimizer step at w with g',

the norm taken over all trained weights together. Flat minima suit ViTs and MLP-Mixers that are trained from scratch, whose minima are
otherwise sharp; `largest_hessian_eigenvalue` and `perturbed_loss` measure that. A step costs two forward and two backward passes.

Source: arXiv:2106.01548, section 4.1 and eqs. (2), (3) (SAM itself: arXiv:2010.01412); the measures are those of its section 3. There
the optimizer is AdamW with weight decay 0.3, gradients are clipped to norm 1, and rho grows with the model: 0.1 for ViT-S/16, 0.2 for
ViT-B/16, up to 0.6 for Mixer-B/16. The recipe leaves the optimizer to the loop: `lab.train(..., recipe=SAM(), weight_decay=0.3)`.

Dropout draws the same masks in both passes, and buffers (the statistics of batch norm) are those of the pass at w, so that rho = 0 is
the plain optimizer to the bit. Weights kept in bfloat16 round most of eps away: train in float32.

No callback or wrapped optimizer can bring this to transformers' Trainer, which calls `optimizer.step()` without a closure, so that the
second gradient cannot be computed there; it takes a subclass whose `training_step` does both passes.

>>> model = nn.Linear(2, 1)
>>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
>>> def closure():
...     optimizer.zero_grad()
...     loss = model(torch.ones(4, 2)).square().mean()
...     loss.backward()
...     return loss.detach()
>>> before = closure()
>>> for _ in range(20): _ = SAM(rho=0.05).step(model, closure, optimizer)
>>> bool(closure() < before)
True
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from formulary.contracts.recipe import Recipe
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError

Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class SAM(Recipe):
    """Sharpness-aware steps with any optimizer; see the module.

    rho: the length of eps in weight space, 0 to 10. Raises UsageError for others. What the optimizer holds is perturbed, except
    parameters without a gradient; if the second pass raises, the weights are what they were.
    """

    rho: float = 0.1

    def __post_init__(self):
        check_range("vit-sam", "rho", self.rho, 0, 10)

    def step(self, model: nn.Module, closure: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
        """One update; returns the loss at w. `closure()` clears gradients, runs loss and backward, and may clip."""
        randomness = _random_states()
        loss = closure()
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        with kept([*parameters, *model.buffers()]):
            ascend(parameters, self.rho)
            _set_random_states(randomness)
            closure()
        optimizer.step()
        return loss


@torch.no_grad()
def ascend(parameters: list[nn.Parameter], rho: float) -> None:
    """Add rho g / ||g|| to the parameters in place, g being their gradients as one vector; a zero gradient moves nothing."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters]
    norm = float(torch.linalg.vector_norm(torch.stack([n.cpu() for n in norms]))) if norms else 0.0
    if norm > 0:
        for p in parameters:
            p.add_(p.grad, alpha=rho / norm)


@contextmanager
def kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put the values of these tensors back at the end, bit for bit, whatever happens in between."""
    copies = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in copies:
                tensor.copy_(copy)


def largest_hessian_eigenvalue(
    model: nn.Module, batch: dict[str, Tensor], loss: Loss | None = None, *, iterations: int = 300, tolerance: float = 0.02, seed: int = 0
) -> float:
    """The largest eigenvalue of the Hessian of the loss in the trained weights, by power iteration with Hessian-vector products.

    `loss(model, batch)` is a scalar; by default the model's own `.loss`. The model is measured in eval mode. Stops when
    ||Hv - lambda v|| <= tolerance |lambda|, which bounds the error in lambda to an eigenvalue by the same. Where the largest in size is
    negative, or ties, the iteration goes on with H + s I, s being that size. Raises FormularyError when `iterations` do not suffice.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise FormularyError(f"{type(model).__name__} has no parameter that requires a gradient, so its loss has no Hessian here")
    with _measuring(model), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        value = (loss or _own_loss)(model, batch)
        gradient = _flat(torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True))
        if not gradient.requires_grad:
            return 0.0

        def product(v: Tensor) -> Tensor:
            return _flat(torch.autograd.grad(gradient @ v, parameters, retain_graph=True, materialize_grads=True)).detach()

        generator = torch.Generator().manual_seed(seed)
        v = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype).to(gradient.device)
        found, size, v = _power_iteration(product, v, iterations, tolerance)
        if found is not None and found >= 0:
            return found
        v = v + torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype).to(gradient.device) / len(v) ** 0.5
        found, *_ = _power_iteration(lambda u: product(u) + size * u, v, iterations, tolerance / 2)
    if found is None:
        raise FormularyError(f"the power iteration is not within {tolerance:g} after {iterations} products: raise iterations or tolerance")
    return found - size


def _power_iteration(product, v: Float[Tensor, "P"], iterations: int, tolerance: float) -> tuple[float | None, float, Float[Tensor, "P"]]:
    """(eigenvalue of largest size, or None without convergence; an estimate of its size; the vector)."""
    size = 0.0
    for _ in range(iterations):
        v = v / v.norm()
        moved = product(v)
        value, size = float(v @ moved), float(moved.norm())
        if float((moved - value * v).norm()) <= tolerance * abs(value):
            return value, size, v
        v = moved
    return None, size, v


@torch.no_grad()
def perturbed_loss(
    model: nn.Module, batch: dict[str, Tensor], loss: Loss | None = None, *, std: float, samples: int = 10, seed: int = 0
) -> float:
    """The mean loss over `samples` draws of N(0, std^2) noise on every trained weight: E L(w + eps). The weights are put back.

    In eval mode; the same seed gives the same noise to every model of this shape.
    """
    check_range("vit-sam", "std", std, 0, 1e6)
    check_range("vit-sam", "samples", samples, 1, 1_000_000)
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    values = []
    with _measuring(model):
        for _ in range(samples):
            with kept(parameters):
                for p in parameters:
                    p.add_(torch.randn(p.shape, generator=generator).to(p), alpha=std)
                values.append(float((loss or _own_loss)(model, batch)))
    return sum(values) / samples


def _own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def _flat(tensors: Iterable[Tensor]) -> Float[Tensor, "P"]:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards every module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _random_states() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_random_states(states: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(states[0])
    if states[1]:
        torch.cuda.set_rng_state_all(states[1])
