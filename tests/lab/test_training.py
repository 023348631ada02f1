"""The loop: it learns, runs every hook, resumes to the bit after a kill, and refuses what it cannot use."""

import copy
import json
import math
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from formulary import lab
from formulary.contracts import Recipe
from formulary.errors import FormularyError, UsageError
from formulary.lab import tasks
from formulary.lab.training import train, tuned_lr


class Regressor(nn.Module):
    """Small, with dropout and a buffer, so that a lost random state or buffer shows."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.norm, self.last = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return self.last(self.drop(torch.tanh(self.norm(self.first(x))))).squeeze(-1)


def batches(step):
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
    return {"x": x, "y": x[:, 0] - 2 * x[:, 1]}


def squared(model, batch):
    return (model(batch["x"]) - batch["y"]).square().mean()


@dataclass(frozen=True, kw_only=True)
class Sharp(Recipe):
    """SAM as a recipe: climb `rho` along the gradient, take the gradient there, come back and step."""

    rho: float = 0.05

    def step(self, model, closure, optimizer):
        loss = closure()
        trained = [p for p in model.parameters() if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in trained]).norm()
        climbs = [self.rho * p.grad / norm for p in trained]
        with torch.no_grad():
            for p, climb in zip(trained, climbs):
                p.add_(climb)
        closure()
        with torch.no_grad():
            for p, climb in zip(trained, climbs):
                p.sub_(climb)
        optimizer.step()
        return loss


def run(folder=None, steps=10, source=batches, recipe=None, **options):
    model = Regressor()
    log = train(model, source, steps=steps, lr=0.05, loss=squared, recipe=recipe, checkpoint=folder, every=5, **options)
    return model, log


def dies_at(step, source=batches):
    def batch(now):
        if now == step:
            raise KeyboardInterrupt
        return source(now)

    return batch


def assert_same(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("recipe", [None, Sharp()], ids=["adamw", "sam"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_resumes_bit_identically(tmp_path, recipe, optimizer):
    straight, log = run(recipe=recipe, optimizer=optimizer)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, source=dies_at(7), recipe=recipe, optimizer=optimizer)
    assert len(list(tmp_path.iterdir())) == 2
    resumed, again = run(tmp_path, recipe=recipe, optimizer=optimizer)
    assert_same(straight.state_dict(), resumed.state_dict())
    assert again.resumed_from == 5 and again.losses == log.losses and again.learning_rates == log.learning_rates
    assert len(set(log.losses)) == 10


def test_resumes_bit_identically_from_an_iterable_and_is_done_when_done(tmp_path):
    straight, log = run()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, source=(dies_at(9)(step) for step in range(10)))
    resumed, again = run(tmp_path, source=[batches(step) for step in range(10)])
    assert_same(straight.state_dict(), resumed.state_dict())
    finished, third = run(tmp_path)
    assert third.resumed_from == 10 and third.losses == log.losses
    assert_same(straight.state_dict(), finished.state_dict())


KILLED = """
import os, signal, sys
import torch
from formulary.lab.training import train
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
def batches(step):
    if step == int(sys.argv[2]): os.kill(os.getpid(), signal.SIGKILL)
    return {"x": torch.randn(16, 3, generator=torch.Generator().manual_seed(step))}
def loss(model, batch):
    return (model(batch["x"]) - 1).square().mean()
log = train(model, batches, steps=10, lr=1e-2, checkpoint=sys.argv[1], every=5, loss=loss)
print(log.resumed_from, repr(log.losses), repr([p.tolist() for p in model.parameters()]))
"""


def test_a_killed_process_resumes_bit_identically(tmp_path):
    def start(folder, dies):
        command = [sys.executable, "-c", KILLED, str(tmp_path / folder), str(dies)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    killed, straight = start("a", 8), start("b", -1)
    assert killed.wait() == -signal.SIGKILL
    resumed = start("a", -1)
    first, second = (process.communicate()[0].split(" ", 1) for process in (straight, resumed))
    assert (first[0], second[0]) == ("0", "5") and first[1] == second[1]


def test_learns_and_leaves_the_random_state_and_mode_alone():
    model = lab.tiny("gpt2")
    before, mode = torch.get_rng_state(), model.training
    log = train(model, tasks.stream(tasks.Copying(length=3, vocabulary=4), 16), steps=60, lr=1e-2)
    assert log.losses[0] > 3 and log.final < 1.8 and log.cpu_seconds > 0
    assert torch.equal(torch.get_rng_state(), before) and model.training == mode
    assert all(p.grad is None for p in model.parameters())


def test_the_seed_decides():
    one, other, same = run(seed=1)[1].losses, run(seed=2)[1].losses, run(seed=1)[1].losses
    assert one == same != other


def test_adamw_equals_a_plain_loop():
    model, twin = nn.Linear(3, 1), None
    twin = copy.deepcopy(model)
    loss = lambda m, b: (m(b["x"]).squeeze(-1) - b["y"]).square().mean()
    train(model, batches, steps=6, lr=0.1, loss=loss, weight_decay=0.3, schedule="constant", warmup=0, clip=0.5)
    decayed, plain = {"params": [twin.weight], "weight_decay": 0.3}, {"params": [twin.bias], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decayed, plain], lr=0.1)
    for step in range(6):
        optimizer.zero_grad()
        loss(twin, batches(step)).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        optimizer.step()
    assert_same(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("schedule, end", [("cosine", 0.01), ("linear", 0.01), ("constant", 1.0)])
def test_schedules(schedule, end):
    rates = run(steps=40, schedule=schedule, warmup=4)[1].learning_rates
    assert [round(r / 0.05, 6) for r in rates[:4]] == [0.25, 0.5, 0.75, 1.0]
    assert max(rates) == rates[3] and abs(rates[-1] / 0.05 - end) < 0.05
    assert all(a >= b for a, b in zip(rates[3:], rates[4:]))


def test_every_hook_is_called_in_turn():
    calls = []

    class Everything:
        def init(self, model):
            calls.append("init")
            nn.init.zeros_(model.last.weight)

        def batch(self, batch):
            calls.append("batch")
            return {"x": batch["x"], "target": batch["y"] * 0}

        def loss(self, model, batch):
            calls.append("loss")
            return (model(batch["x"]) - batch["target"]).square().mean()

        def optimizer(self, params):
            calls.append("optimizer")
            return torch.optim.SGD(params, lr=0.1)

        def scheduler(self, optimizer):
            calls.append("scheduler")
            return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

        def step(self, model, closure, optimizer):
            calls.append("step")
            loss = closure()
            optimizer.step()
            return loss

        def control(self, loop):
            calls.append("control")
            loop.stop = loop.step == 2

    model = Regressor()
    log = train(model, batches, steps=9, lr=1.0, recipe=Everything())
    once = ["batch", "step", "loss", "control"]
    assert calls == ["init", "optimizer", "scheduler", *once, *once]
    assert log.learning_rates == [0.1, 0.05] and log.stopped_at == 2


def test_recipe_state_is_in_the_checkpoint(tmp_path):
    class Averages:
        def control(self, loop):
            start = {k: v.detach().clone() for k, v in loop.model.named_parameters()}
            kept = loop.state.setdefault("average", start)
            for name, value in kept.items():
                value.mul_(0.9).add_(loop.model.state_dict()[name], alpha=0.1)
            if loop.step == 10:
                seen.append({k: v.clone() for k, v in kept.items()})

    seen = []
    run(recipe=Averages())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, source=dies_at(7), recipe=Averages())
    run(tmp_path, recipe=Averages())
    assert_same(*seen)


def test_frozen_parameters_stay():
    model = Regressor()
    model.first.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    train(model, batches, steps=3, lr=0.1, loss=squared, weight_decay=0.1)
    assert torch.equal(model.first.weight, before["first.weight"])
    assert not torch.equal(model.last.weight, before["last.weight"])


def test_a_loss_that_is_not_finite_names_the_step_and_spares_the_weights():
    model = Regressor()
    kept = {}

    def poisoned(step):
        if step == 3:
            kept.update({k: v.clone() for k, v in model.named_parameters()})
        batch = batches(step)
        return {**batch, "y": batch["y"] * math.nan} if step == 3 else batch

    with pytest.raises(FormularyError, match="the loss is nan at step 4"):
        train(model, poisoned, steps=10, lr=0.1, loss=squared)
    assert_same(dict(model.named_parameters()), kept)


def test_data_of_the_contracts_can_be_trained_on():
    from formulary.contracts import Data

    model = lab.tiny("gpt2")
    ids = torch.randint(3, 97, (6, 8), generator=torch.Generator().manual_seed(0))
    data = Data([{"input_ids": row, "labels": row} for row in ids], batch_size=4)
    log = train(model, data, steps=30, lr=1e-2)
    assert log.final < 0.7 * log.losses[0]


def test_refusals(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'adamw'"):
        run(optimizer="admaw")
    with pytest.raises(UsageError, match="did you mean 'cosine'"):
        run(schedule="cosin")
    with pytest.raises(UsageError, match="steps >= 1"):
        run(steps=0)
    with pytest.raises(FormularyError, match="ran out at step 3"):
        run(source=[batches(0), batches(1)])
    with pytest.raises(UsageError, match="returned no loss"):
        train(lab.tiny("bert"), lambda step: lab.inputs_for(lab.tiny("bert")), steps=1, lr=0.1)
    frozen = Regressor().requires_grad_(False)
    with pytest.raises(FormularyError, match="nothing to train"):
        train(frozen, batches, steps=1, lr=0.1, loss=squared)


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(FormularyError, match="of another run .steps 10, now 20"):
        run(tmp_path, steps=20)
    with pytest.raises(FormularyError, match="of another run .recipe"):
        run(tmp_path, recipe=Sharp())
    with pytest.raises(FormularyError, match="does not fit this model"):
        train(nn.Linear(3, 1), batches, steps=10, lr=0.05, loss=squared, checkpoint=tmp_path)
    (tensors,) = tmp_path.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.raises(FormularyError, match="cannot be read"):
        run(tmp_path)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(FormularyError, match="cannot be read"):
        run(tmp_path)


def test_checkpoints_hold_json_and_safetensors_only(tmp_path):
    run(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["state.json", "step-00000010.safetensors"]
    assert json.loads((tmp_path / "state.json").read_text())["settings"]["steps"] == 10


def test_a_checkpoint_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FormularyError, match="cannot write the checkpoint"):
        run(tmp_path / "file")


def test_tuned_lr_finds_the_rate_in_the_middle_and_counts_divergence_as_infinite():
    held_out = [batches(1000 + i) for i in range(3)]
    best, table = tuned_lr(
        lambda: nn.Linear(3, 1), batches, validation=held_out, lrs=(1e-6, 0.1, 1e30), steps=40, clip=None,
        optimizer="sgd", loss=lambda m, b: (m(b["x"]).squeeze(-1) - b["y"]).square().mean(),
    )  # fmt: skip
    assert best == 0.1 and table[0.1] < 0.1 < table[1e-6] < table[1e30] == math.inf
    with pytest.raises(FormularyError, match="every learning rate diverged: 0.1"):
        tuned_lr(Regressor, batches, validation=lambda model: math.nan, lrs=(0.1,), steps=1, loss=squared)
    with pytest.raises(UsageError, match="cannot tune"):
        tuned_lr(Regressor, batches, validation=held_out, steps=1, optimizer=torch.optim.SGD)
