"""Every synthetic task's labels against a brute-force reading of its inputs, and its statistics against theory."""

import math
import re
from collections import Counter

import pytest
import torch

from formulary import lab
from formulary.errors import UsageError
from formulary.lab import tasks

TASKS = [
    tasks.AssociativeRecall(), tasks.Copying(), tasks.Induction(), tasks.Needle(), tasks.InContextRegression(),
    tasks.ListOps(), tasks.PlantedImages(), tasks.PlantedSeries(), tasks.CharText(),
]  # fmt: skip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(batch):
    return zip(batch["input_ids"].tolist(), batch["labels"].tolist())


@pytest.mark.parametrize("task", TASKS, ids=lambda t: type(t).__name__)
def test_batches_follow_their_seed_and_leave_the_global_random_state(task):
    before = torch.get_rng_state()
    first, again, other = (task.batch(5, generator(seed)) for seed in (1, 1, 2))
    assert all(len(value) == 5 for value in first.values())
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("task", [t for t in TASKS if hasattr(t, "vocab_size")], ids=lambda t: type(t).__name__)
def test_tokens_lie_in_the_vocabulary(task):
    ids = task.batch(64, generator())["input_ids"]
    assert 0 <= int(ids.min()) and int(ids.max()) < task.vocab_size


def test_stream_depends_on_seed_and_step_alone():
    batches = tasks.stream(tasks.Needle(), 2, seed=3)
    sixth = batches(6)
    batches(7)
    assert torch.equal(batches(6)["input_ids"], sixth["input_ids"])
    assert not torch.equal(batches(7)["input_ids"], sixth["input_ids"])
    assert not torch.equal(tasks.stream(tasks.Needle(), 2, seed=4)(6)["input_ids"], sixth["input_ids"])


def test_associative_recall_by_dictionary():
    task = tasks.AssociativeRecall(pairs=6, queries=3, length=40, keys=20, values=10)
    for ids, labels in rows(task.batch(50, generator())):
        table = dict(zip(ids[0:12:2], ids[1:12:2]))
        assert len(table) == 6 and all(1 <= k <= 20 for k in table) and all(21 <= v <= 30 for v in table.values())
        asked = [place for place, label in enumerate(labels) if label != -100]
        assert len(asked) == 3 and len({ids[p - 1] for p in asked}) == 3 and min(asked) > 12
        assert all(labels[p] == ids[p] == table[ids[p - 1]] for p in asked)
        assert Counter(ids[12:])[0] == 28 - 6


def test_copying_by_comparison():
    for ids, labels in rows(tasks.Copying(length=7, vocabulary=5).batch(20, generator())):
        assert ids[:7] == ids[8:] == labels[8:] and ids[7] == 0 and 0 not in ids[:7] and set(labels[:8]) == {-100}


def test_induction_by_search():
    places = set()
    for ids, labels in rows(tasks.Induction(length=12, vocabulary=6).batch(300, generator())):
        seen = [i for i, token in enumerate(ids[:-2]) if token == ids[-2]]
        assert len(seen) == 1 and labels[-1] == ids[-1] == ids[seen[0] + 1] and set(labels[:-1]) == {-100}
        places.add(seen[0])
    assert places == set(range(9))


def test_needle_by_search():
    task = tasks.Needle(length=20, needle=3, vocabulary=9)
    batch = task.batch(300, generator())
    starts = set()
    for (ids, labels), positions in zip(rows(batch), task.positions(batch).tolist()):
        assert ids.count(0) == 1 and ids.count(1) == 1 and ids[16] == 1
        start = ids.index(0) + 1
        assert positions == [start, start + 1, start + 2] and start + 2 < 16
        assert labels[17:] == ids[17:] == ids[start : start + 3] and set(labels[:17]) == {-100}
        starts.add(start)
    assert starts == set(range(1, 14))


def test_linear_regression_is_solved_by_least_squares_and_only_when_linear():
    def residual(**options):
        batch = tasks.InContextRegression(dim=4, examples=12, **options).batch(64, generator())
        x, y = batch["x"].double(), batch["y"].double().unsqueeze(-1)
        weights = torch.linalg.lstsq(x[:, :-1], y[:, :-1]).solution
        return (x[:, -1:] @ weights - y[:, -1:]).abs().max().item(), y.var().item()

    assert residual()[0] < 1e-3 and residual(condition=50.0)[0] < 1e-3
    for options in ({"noise": 0.5}, {"target": "relu"}, {"target": "quadratic"}):
        assert residual(**options)[0] > 0.1


def test_regression_has_the_covariance_and_noise_it_states():
    task = tasks.InContextRegression(dim=5, examples=20, condition=16.0)
    x = task.batch(2000, generator())["x"].flatten(0, 1)
    variances = task.variances()
    torch.testing.assert_close(x.var(0), variances, rtol=0.05, atol=0)
    assert math.isclose(float(variances[0] / variances[-1]), 16, rel_tol=1e-4)
    assert math.isclose(float(variances.mean()), 1, rel_tol=1e-5)
    quiet = tasks.InContextRegression(dim=5, examples=20).batch(2000, generator())["y"]
    loud = tasks.InContextRegression(dim=5, examples=20, noise=2.0).batch(2000, generator())["y"]
    assert abs(float(quiet.var()) - 1) < 0.1 and abs(float((loud - quiet).var()) - 4) < 0.1


def listops_by_recursion(text):
    """Rewrites the innermost list to its value until one number is left."""
    operations = {
        "MIN": min,
        "MAX": max,
        "MED": lambda v: sorted(v)[(len(v) - 1) // 2],
        "SM": lambda v: sum(v) % 10,
    }
    while "[" in text:
        text = re.sub(r"\[(\w+)((?: \d)+) \]", lambda m: str(operations[m[1]](list(map(int, m[2].split())))), text)
    return int(text)


def test_listops_by_two_other_evaluators():
    task = tasks.ListOps(depth=5, arguments=5, length=48)
    batch = task.batch(300, generator())
    for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"].tolist(), batch["labels"].tolist()):
        text = " ".join(task.TOKENS[i] for i in ids.tolist() if i)
        assert task.evaluate(ids) == label == listops_by_recursion(text)
        assert sum(mask) == len(text.split()) and (ids[sum(mask) :] == 0).all()
    assert set(batch["labels"].tolist()) == set(range(10))
    assert int(batch["attention_mask"].sum(1).max()) > 40


@pytest.mark.parametrize("depth, length", [(1, 4), (3, 5), (9, 16)])
def test_listops_keeps_its_bounds(depth, length):
    task = tasks.ListOps(depth=depth, arguments=9, length=length)
    for row in task.batch(40, generator())["input_ids"].tolist():
        level = deepest = 0
        for token in row:
            level += task.TOKENS[token].startswith("[") - (task.TOKENS[token] == "]")
            deepest = max(deepest, level)
        assert level == 0 and 1 <= deepest <= depth


def test_planted_digit_is_where_it_is_said_to_be_and_nowhere_else():
    task = tasks.PlantedImages(size=40, scale=2, noise=0.0)
    batch, corners = task.sample(20, generator())
    digits, labels = (torch.from_numpy(part) for part in lab.digits("train"))
    for pixels, label, (row, column) in zip(batch["pixel_values"], batch["labels"], corners.tolist()):
        window = pixels[0, row : row + 16, column : column + 16]
        assert torch.equal(pixels[0], pixels[2])
        assert pixels[0].sum() == window.sum() > 0
        found = (digits == window[::2, ::2]).flatten(1).all(1).nonzero().flatten()
        assert len(found) and label in labels[found]
    many = task.sample(500, generator())[1]
    assert all(set(many[:, axis].tolist()) == set(range(25)) for axis in (0, 1))
    noisy = tasks.PlantedImages(size=40, noise=0.3).batch(50, generator())["pixel_values"]
    assert abs(float(noisy[:, 0, :4].std()) - 0.3) < 0.1


def test_planted_series_is_the_sum_of_its_parts_and_each_part_is_what_it_says():
    task = tasks.PlantedSeries(
        past=200, future=50, channels=3, periods=(20.0, 7.0), noise=0.5, correlation=0.8, shift_rate=0.02
    )
    parts = task.parts(200, generator())
    batch = task.batch(200, generator())
    whole = torch.cat([batch["past_values"], batch["future_values"]], dim=1)
    torch.testing.assert_close(whole, sum(parts.values()))
    assert batch["past_values"].shape == (200, 200, 3) and batch["future_values"].shape == (200, 50, 3)
    assert parts["trend"].diff(n=2, dim=1).abs().max() < 1e-4
    torch.testing.assert_close(parts["season 1"][:, 20:], parts["season 1"][:, :-20], atol=1e-3, rtol=0)
    noise = parts["noise"]
    assert abs(float(noise.std()) - 0.5) < 0.02 and abs(float(noise[:, 0].std()) - 0.5) < 0.05
    assert abs(float((noise[:, 1:] * noise[:, :-1]).mean() / noise.square().mean()) - 0.8) < 0.02
    assert abs(float((parts["shifts"].diff(dim=1) != 0).float().mean()) - 0.02) < 0.003


def test_char_text_is_the_bible():
    batch = tasks.CharText(length=40, split="test").batch(10, generator())
    text = "\n".join(lab.kjv("test"))
    assert all(tasks.decode(ids) in text for ids in batch["input_ids"])
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert tasks.decode(tasks.encode("Ruth~")) == "Ruth\n"


@pytest.mark.parametrize(
    "make",
    [
        lambda: tasks.AssociativeRecall(pairs=4, queries=5),
        lambda: tasks.AssociativeRecall(length=10),
        lambda: tasks.Needle(length=8, needle=4),
        lambda: tasks.InContextRegression(target="cubic"),
        lambda: tasks.ListOps(depth=0),
        lambda: tasks.PlantedImages(size=8, scale=2),
        lambda: tasks.PlantedSeries(correlation=1.0),
    ],
)
def test_impossible_tasks_are_refused(make):
    with pytest.raises(UsageError):
        make()
