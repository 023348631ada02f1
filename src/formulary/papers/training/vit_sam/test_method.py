import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from formulary import lab
from formulary.errors import FormularyError, UsageError
from formulary.lab.small import inputs_for, tiny
from formulary.papers.training.vit_sam import SAM
from formulary.papers.training.vit_sam.method import ascend, largest_hessian_eigenvalue, perturbed_loss

CURVATURE = torch.tensor([1.0, 4.0, 0.5])


class Quadratic(nn.Module):
    """L(w) = sum c w^2 / 2 over two parameters, beside one that is frozen and one without a gradient."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([[3.0]]))
        self.frozen, self.unused = nn.Parameter(torch.tensor([5.0]), requires_grad=False), nn.Parameter(torch.tensor([7.0]))

    def loss(self, batch=None):
        w = torch.cat([self.a, self.b.flatten()])
        return (CURVATURE * w * w).sum() / 2 + 0 * self.frozen.sum()


def closure_of(model, optimizer, loss, seen=None):
    def closure():
        optimizer.zero_grad(set_to_none=True)
        value = loss(model)
        value.backward()
        if seen is not None:
            seen.append([p.detach().clone() for p in model.parameters()])
        return value.detach()

    return closure


def test_the_update_is_the_closed_form_on_a_quadratic():
    model = Quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    w = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    for _ in range(5):
        value = SAM(rho=0.3).step(model, closure_of(model, optimizer, Quadratic.loss), optimizer)
        assert float(value) == pytest.approx(float((CURVATURE * w * w).sum() / 2), rel=1e-5)
        gradient = CURVATURE * w
        w = w - 0.1 * CURVATURE * (w + 0.3 * gradient / gradient.norm())
        assert torch.allclose(torch.cat([model.a, model.b.flatten()]).double(), w, atol=1e-6)
    assert model.frozen.item() == 5 and model.unused.item() == 7


def test_the_second_gradient_is_at_distance_rho_and_the_weights_come_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    start, seen = copy.deepcopy(model), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    SAM(rho=0.7).step(model, closure_of(model, optimizer, lambda m: F.cross_entropy(m(x), y), seen), optimizer)
    moved = torch.cat([(b - a).flatten() for a, b in zip(*seen)])
    F.cross_entropy(start(x), y).backward()
    gradient = torch.cat([p.grad.flatten() for p in start.parameters()])
    assert float(moved.norm()) == pytest.approx(0.7, rel=1e-4)
    assert float(F.cosine_similarity(moved, gradient, dim=0)) == pytest.approx(1, abs=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters()))


def test_weights_come_back_when_the_second_pass_fails():
    model = Quadratic()
    optimizer, calls = torch.optim.SGD(model.parameters(), lr=0.1), []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise FormularyError("the loss is nan")
        return closure_of(model, optimizer, Quadratic.loss)()

    with pytest.raises(FormularyError, match="the loss is nan"):
        SAM(rho=0.3).step(model, closure, optimizer)
    assert torch.equal(model.a, torch.tensor([1.0, -2.0])) and torch.equal(model.b, torch.tensor([[3.0]]))


class Noisy(nn.Module):
    """Dropout and batch norm, whose randomness and statistics a second pass would disturb."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))

    def loss(self, batch):
        return F.cross_entropy(self.body(batch["x"]), batch["y"])


def noisy_run(recipe, **settings):
    torch.manual_seed(0)
    model = Noisy()

    def batch(step):
        g = torch.Generator().manual_seed(step)
        return {"x": torch.randn(16, 4, generator=g), "y": torch.randint(3, (16,), generator=g)}

    log = lab.train(model, batch, steps=6, lr=0.01, weight_decay=0.3, loss=lambda m, b: m.loss(b), recipe=recipe, **settings)
    return log.losses, model.state_dict()


@pytest.mark.parametrize("clip", [None, 0.1])
def test_rho_0_is_plain_adamw_to_the_bit(clip):
    (plain_losses, plain), (losses, state) = noisy_run(None, clip=clip), noisy_run(SAM(rho=0.0), clip=clip)
    assert losses == plain_losses and all(torch.equal(state[k], plain[k]) for k in plain)
    other = noisy_run(SAM(rho=0.2), clip=clip)[1]
    assert not torch.equal(other["body.0.weight"], plain["body.0.weight"])
    assert int(other["body.1.num_batches_tracked"]) == 6


def test_clipping_leaves_eps_as_it_is():
    model, clipped = Quadratic(), Quadratic()
    for m in (model, clipped):
        m.loss().backward()
    nn.utils.clip_grad_norm_(clipped.parameters(), 0.01)
    for m in (model, clipped):
        ascend([m.a, m.b], 0.3)
    assert torch.allclose(model.a, clipped.a, atol=1e-6) and not torch.equal(model.a, Quadratic().a)


def test_a_zero_gradient_moves_nothing():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model)
    SAM(rho=0.5).step(model, closure_of(model, optimizer, lambda m: 0 * m(torch.ones(1, 2)).sum()), optimizer)
    assert torch.equal(model.weight, before.weight)


def test_a_frozen_backbone_is_neither_moved_nor_counted():
    model = tiny("vit").train()
    frozen = [p for name, p in model.named_parameters() if "layer" in name and not p.requires_grad_(False).requires_grad]
    values, batch = [p.clone() for p in frozen], inputs_for(model)
    loss = lambda m, b: m(**b).last_hidden_state.square().mean()
    log = lab.train(model, lambda step: batch, steps=8, lr=1e-2, recipe=SAM(rho=0.05), loss=loss, schedule="constant")
    assert frozen and all(torch.equal(a, b) for a, b in zip(frozen, values)) and log.losses[-1] < log.losses[0]


def full_hessian(model, batch, loss):
    names, values = zip(*model.named_parameters())
    shapes, flat = [v.shape for v in values], torch.cat([v.detach().flatten() for v in values])

    def at(w):
        pieces = w.split([s.numel() for s in shapes])
        state = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes)}
        return loss(lambda x: torch.func.functional_call(model, state, (x,)), batch)

    return torch.autograd.functional.hessian(at, flat)


def small_net(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, {"x": torch.randn(12, 3).double(), "y": torch.randint(3, (12,))}


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"])


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_lambda_max_is_that_of_the_whole_hessian(seed, sign):
    model, batch = small_net(seed)
    loss = lambda m, b: sign * cross_entropy(m, b)
    eigenvalues = torch.linalg.eigvalsh(full_hessian(model, batch, loss))
    before = copy.deepcopy(model)
    found = largest_hessian_eigenvalue(model, batch, loss, iterations=5000, tolerance=1e-4)
    assert found == pytest.approx(float(eigenvalues[-1]), rel=1e-2)
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters())) and model.training


class Diagonal(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.w = nn.Parameter(torch.ones(size))


@pytest.mark.parametrize(
    "curvature, expected", [([2.0, -2.0, 1.0], 2.0), ([-3.0, -1.0, 0.5], 0.5), ([-3.0, -2.0], -2.0), ([0.0, 0.0], 0.0)]
)
def test_lambda_max_with_ties_and_negative_curvature(curvature, expected):
    c = torch.tensor(curvature)
    found = largest_hessian_eigenvalue(Diagonal(len(c)), {}, lambda m, b: (c * m.w * m.w).sum() / 2, tolerance=1e-4)
    assert found == pytest.approx(expected, abs=1e-2)


def test_lambda_max_of_a_transformer_and_of_a_linear_loss_and_without_convergence():
    model = tiny("vit")
    loss = lambda m, b: m(**b).last_hidden_state.square().sum(-1).sin().mean()
    assert largest_hessian_eigenvalue(model, inputs_for(model), loss, tolerance=0.1) > 0
    assert largest_hessian_eigenvalue(Diagonal(2), {}, lambda m, b: m.w.sum()) == 0
    with pytest.raises(FormularyError, match="raise iterations"):
        largest_hessian_eigenvalue(*small_net(0), cross_entropy, iterations=1, tolerance=1e-9)
    with pytest.raises(FormularyError, match="no parameter"):
        largest_hessian_eigenvalue(Diagonal(2).requires_grad_(False), {}, lambda m, b: m.w.sum())


def test_the_loss_under_noise_is_that_of_a_quadratic_and_the_weights_come_back():
    c, model = torch.linspace(0.5, 3, 20), Diagonal(20).train()
    value = perturbed_loss(model, {}, lambda m, b: (c * m.w * m.w).sum() / 2, std=0.3, samples=3000)
    assert value == pytest.approx(float(c.sum() / 2 * (1 + 0.3**2)), rel=0.02)
    assert torch.equal(model.w, torch.ones(20)) and model.training
    assert perturbed_loss(model, {}, lambda m, b: m.w.sum(), std=0.0, samples=1) == 20


def test_wrong_rho_is_named_in_one_line():
    with pytest.raises(UsageError, match="vit-sam: rho must be between 0 and 10, got -0.1") as told:
        SAM(rho=-0.1)
    assert "\n" not in str(told.value)
