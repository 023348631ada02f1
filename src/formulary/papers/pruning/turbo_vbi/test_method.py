"""What is true of Turbo-VBI alone: both modules by brute force, the gradient of the bound, runs, neurons cut out."""

import copy
import itertools
import math

import pytest
import torch
from scipy import integrate
from torch import nn
from torch.distributions import Gamma, Normal, kl_divergence

from formulary.contracts import Data, parts
from formulary.errors import UsageError
from formulary.lab import small
from formulary.papers.pruning._parts import sublayers
from formulary.papers.pruning.turbo_vbi import TurboVBI
from formulary.papers.pruning.turbo_vbi._support import Rows, chain_messages, infer, precisions
from formulary.papers.pruning.turbo_vbi.method import Variational, runs_per_weight


def texts(n=12):
    generator = torch.Generator().manual_seed(0)
    return Data([{"input_ids": torch.randint(3, 97, (8 + i % 3,), generator=generator)} for i in range(n)], batch_size=4)


def main(model, batch):
    with torch.no_grad():
        out = model(**batch)
    return out["logits"] if "logits" in out else out["last_hidden_state"]


@pytest.mark.parametrize("length,p01,p10", [(1, 0.3, 0.2), (6, 0.05, 0.3), (7, 0.4, 0.1), (5, 0.25, 0.75)])
def test_messages_are_those_of_all_supports_counted(length, p01, p10):
    evidence = torch.randn(length, 3, generator=torch.Generator().manual_seed(1), dtype=torch.double) * 2
    ours = chain_messages(evidence, p01, p10)
    for row in range(3):
        mass = torch.zeros(length, 2, dtype=torch.double)
        for support in itertools.product((0, 1), repeat=length):
            p = p01 / (p01 + p10) if support[0] else p10 / (p01 + p10)
            for before, after in itertools.pairwise(support):
                leave = p10 if before else p01
                p *= leave if after != before else 1 - leave
            for i in range(length):
                others = math.exp(sum(float(evidence[j, row]) * support[j] for j in range(length) if j != i))
                mass[i, support[i]] += p * others
        assert torch.allclose(ours[:, row], (mass[:, 1] / mass[:, 0]).log(), atol=1e-9)


def test_independent_supports_hear_nothing_from_one_another():
    messages = chain_messages(torch.randn(9, 4) * 3, 0.2, 0.8)
    assert torch.allclose(messages, torch.full((9, 4), math.log(0.2 / 0.8)), atol=1e-5)


@pytest.mark.parametrize("active,inactive", [((1.0, 1.0), (1.0, 0.01)), ((2.0, 1.5), (3.0, 0.05))])
def test_precisions_and_evidence_are_the_integrals_they_stand_for(active, inactive):
    square, belief = torch.tensor(0.6, dtype=torch.double), torch.tensor(0.4, dtype=torch.double)
    mean, evidence = (float(value) for value in precisions(square, belief, active, inactive))
    on = float(torch.sigmoid(belief))
    prior = [Gamma(*(torch.tensor(v, dtype=torch.double) for v in each)) for each in (active, inactive)]

    def log_q(rho):
        """ln q(rho) up to a constant: the mean of ln p(w, rho | s) under q(w) and q(s)."""
        rho = torch.tensor(rho, dtype=torch.double)
        log_prior = on * prior[0].log_prob(rho) + (1 - on) * prior[1].log_prob(rho)
        return float(log_prior + 0.5 * rho.log() - rho * square / 2)

    def integral(of):
        return integrate.quad(lambda rho: of(rho) * math.exp(log_q(rho)), 1e-9, 400, limit=400, points=[1, 10])[0]

    norm = integral(lambda rho: 1.0)
    assert mean == pytest.approx(integral(lambda rho: rho) / norm, rel=1e-5)
    tensor = lambda rho: torch.tensor(rho, dtype=torch.double)
    wanted = integral(lambda rho: float(prior[0].log_prob(tensor(rho)) - prior[1].log_prob(tensor(rho)))) / norm
    assert evidence == pytest.approx(wanted, rel=1e-4)


def test_a_step_has_the_gradient_of_loss_and_divergence():
    torch.manual_seed(0)
    model = nn.Linear(5, 3, bias=False)
    part = parts.linears(model)[0]
    rows = Rows.of(part, 0.1)
    method = TurboVBI(kl_weight=2.0, steps=1, rounds=1, noise=0.1)
    recipe = Variational([rows], method)
    rows.precision = torch.rand(3, 5) * 5
    mean, log_deviation = rows.mean.clone().requires_grad_(), rows.log_deviation.clone().requires_grad_()
    x, y = torch.randn(7, 5), torch.randn(7, 3)

    def closure():
        value = (model(x) - y).square().mean()
        value.backward()
        return value.detach()

    torch.manual_seed(3)
    recipe.step(model, closure, torch.optim.SGD([rows.mean, rows.log_deviation], lr=0.0))
    torch.manual_seed(3)
    weight = mean + log_deviation.exp() * torch.randn(3, 5)
    prior = Normal(torch.zeros(3, 5), rows.scale / rows.precision.sqrt())
    bound = (x @ weight.mT - y).square().mean()
    bound = bound + 2.0 * kl_divergence(Normal(mean, log_deviation.exp()), prior).mean()
    bound.backward()
    assert torch.allclose(rows.mean.grad, mean.grad, atol=1e-5)
    assert torch.allclose(rows.log_deviation.grad, log_deviation.grad, atol=1e-5)
    assert model.weight.grad is None


def clustered(run_length):
    """A linear whose large weights are a run in every row, with as many large ones strewn about."""
    torch.manual_seed(0)
    part = parts.linears(nn.Linear(64, 40))[0]
    weight = 0.3 * torch.randn(40, 64)
    weight[:, 10:26] += 1.2
    strewn = torch.rand(40, 64) < 0.1
    weight[strewn] += 1.5
    part.raw.data = weight
    rows = Rows.of(part, 0.05)
    for _ in range(4):
        infer([rows], sparsity=0.75, run_length=run_length, active=(1.0, 1.0), inactive=(1.0, 0.01))
    return rows, rows.belief > rows.belief.flatten().kthvalue(round(0.75 * 2560)).values


def test_linked_supports_find_the_runs_and_independent_ones_are_magnitude():
    rows, linked = clustered(16.0)
    _, apart = clustered(1 / 0.75)
    assert runs_per_weight([linked]) < 0.5 * runs_per_weight([apart])
    assert float(linked[:, 10:26].float().mean()) > 0.9 > float(apart[:, 10:26].float().mean())
    magnitude = rows.mean.abs()
    assert float(magnitude[apart].min()) >= float(magnitude[~apart].max()) - 1e-6
    assert float(rows.precision[linked].mean()) < 5 < 40 < float(rows.precision[~linked].mean())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mixtral", "vit"])
def test_the_share_asked_is_zero_and_only_chosen_weights_move(family):
    model = small.tiny(family)
    data = texts() if family != "vit" else Data([{"pixel_values": x} for x in small.inputs_for(model)["pixel_values"]])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [f"*{parts.linears(model)[i].name.rpartition('.')[2]}" for i in (0,)]
    chosen = {part.name for part in parts.linears(model, names)}
    after, report = TurboVBI(sparsity=0.6, steps=3, rounds=2, targets=tuple(names)).apply(model, data)
    assert {change.name for change in report.changes} == chosen
    assert report.figures["zero"] == pytest.approx(0.6, abs=1e-3)
    zero = sum(int((part.weight() == 0).sum()) for part in parts.linears(after, names))
    assert zero / sum(part.weights for part in parts.linears(after, names)) == pytest.approx(0.6, abs=1e-3)
    state = after.state_dict()
    still = [name for name in before if not any(name.startswith(one) for one in chosen)]
    assert still and all(torch.equal(state[name], before[name]) for name in still)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "opt"])
def test_neurons_that_vanished_are_cut_out_and_the_outputs_stay(family, monkeypatch):
    model, data = small.tiny(family).eval(), texts()
    with torch.no_grad():
        for sublayer in sublayers(model)[0]:
            if sublayer.role == "feed-forward":
                for part in sublayer.into:
                    part.raw.mul_(8)
                    if part.bias is not None:
                        part.bias.normal_()
                sublayer.into[0].weight()[3:9] = 0  # nothing in
                sublayer.out.weight()[:, 20] = 0  # nothing out
    batch = small.inputs_for(model)
    wanted = main(model, batch)
    monkeypatch.setattr(TurboVBI, "_tell", lambda *_: None)
    monkeypatch.setattr("formulary.papers.pruning.turbo_vbi.method.fit", untouched)
    after, report = TurboVBI(steps=1, rounds=1).apply(model, data)
    assert torch.allclose(main(after.eval(), batch), wanted, atol=1e-5)
    widths = [sublayer.units for sublayer in sublayers(after)[0] if sublayer.role == "feed-forward"]
    units = 128 if family == "gpt2" else 64
    assert widths == [units - 7] * 2 and report.figures["weights cut out"] > 0


def untouched(model, data, linears, method, loss, seed):
    return [Rows.of(part, 0.05) for part in linears], type("Log", (), {"losses": [0.0], "final": 0.0})


def test_failing_training_brings_the_weights_back():
    model = small.tiny("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Exception, match="the loss is"):
        TurboVBI(learning_rate=1e30, steps=20, rounds=1).apply(model, texts())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "wrong",
    [
        {"sparsity": 1.0}, {"sparsity": 0.05, "run_length": 8.0}, {"run_length": 0.5}, {"active": (1.0,)},
        {"inactive": (1.0, 0.0)}, {"inactive": (1.0, 2.0)}, {"kl_weight": -1.0}, {"steps": 0}, {"rounds": 61},
        {"noise": 0.0}, {"learning_rate": 0.0},
    ],
)  # fmt: skip
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(UsageError, match="turbo-vbi"):
        TurboVBI(**wrong)
