"""A check from end to end on tiny made-up rooms: what it refuses, what it proves about itself, and what its record
says.
"""

import json
import random

import numpy as np
import pytest
import torch

from formulary.errors import FormularyError, UsageError
from formulary.evidence import (
    FAILS,
    HOLDS,
    UNSURE,
    UNTESTABLE,
    Check,
    Outcome,
    all_of,
    at_least,
    at_most,
    exact,
    no_worse,
    run_check,
    speedup,
)

N = 12


def prepare(seed):
    return {"x": 3 + torch.randn(N), "scale": 1 + 0.1 * random.random()}


def baseline(context):
    return (context["scale"] * (context["x"] + 0.1 * torch.rand(N))).tolist()


def better(context):
    return (0.5 * context["scale"] * (context["x"] + 0.1 * torch.rand(N))).tolist()


def made(arms=None, holds=None, **changes):
    facts = {
        "claim": "better loses less",
        "setup": prepare,
        "metric": "loss, nats",
        "seeds": 6,
        "redraws": "everything",
    } | changes
    return Check(
        arms=arms or {"better": better, "baseline": baseline},
        holds=holds or at_most("better", "baseline", ratio=0.7),
        **facts,
    )


def test_a_method_that_is_better_holds_with_its_null_and_positive():
    record = run_check(made())
    assert (record["verdict"], record["null"]["verdict"], record["oracle"]["verdict"]) == (HOLDS, FAILS, HOLDS)
    assert record["predicates"][0]["estimate"] == pytest.approx(0.5, abs=0.01)
    assert np.array(record["arms"]["better"]["loss, nats"]).shape == (6, N)
    assert record["null"]["how"] == ["baseline rerun with fresh seeds"]
    assert record["reruns"]["baseline"]["loss, nats"] != record["arms"]["baseline"]["loss, nats"]


def test_a_method_that_is_the_baseline_does_not_hold():
    for ratio in (1.0, 0.7):
        record = run_check(made({"better": baseline, "baseline": baseline}, at_most("better", "baseline", ratio=ratio)))
        assert record["verdict"] == FAILS
        assert record["null"]["verdict"] != HOLDS


def test_a_prediction_that_anything_fulfills_is_void():
    record = run_check(
        made(holds=at_most("better", "baseline", ratio=0.999, null="worse"), arms=ARMS_WITH_VACUOUS_NULL)
    )
    assert record["verdict"] == UNSURE
    assert record["null"]["verdict"] == HOLDS
    assert "void" in record["reasons"][0]


def test_one_void_prediction_among_several_makes_the_check_void():
    """A ratio of negative scores asks for nothing: the rerun baseline fulfills it, though not the other prediction."""

    def both(arm):
        return lambda context: {"loss": arm(context), "score": [-v for v in baseline(context)]}

    holds = all_of(
        at_most("better", "baseline", ratio=0.7, metric="loss"),
        at_most("better", "baseline", ratio=0.5, metric="score"),
    )
    record = run_check(made({"better": both(better), "baseline": both(baseline)}, holds, metric=None))
    assert [p["verdict"] for p in record["null"]["predicates"]] == [FAILS, HOLDS]
    assert (record["verdict"], record["null"]["verdict"]) == (UNSURE, HOLDS)
    assert "void" in record["reasons"][0]


ARMS_WITH_VACUOUS_NULL = {
    "better": better,
    "baseline": baseline,
    "worse": lambda context: [0.9 * v for v in baseline(context)],
}


def test_an_impossible_threshold_shows_as_a_positive_that_fails():
    record = run_check(
        made(
            oracle="half",
            holds=at_most("better", "baseline", ratio=0.01),
            arms={"better": better, "baseline": baseline, "half": better},
        )
    )
    assert (record["verdict"], record["oracle"]["verdict"]) == (FAILS, FAILS)
    assert any("underpowered" in reason for reason in record["reasons"])


def test_too_few_seeds_for_the_noise_is_underpowered():
    def noisy(context):
        return (np.array(better(context)) + 4 * torch.randn(1).item()).tolist()

    record = run_check(made({"better": noisy, "baseline": baseline}, seeds=3))
    assert record["verdict"] == UNSURE
    assert record["oracle"]["verdict"] == UNSURE
    assert any("underpowered" in reason for reason in record["reasons"])


def test_one_of_several_predictions_can_fail_alone():
    both = all_of(at_most("better", "baseline", ratio=0.7), exact("better", tol=1e-3, metric="error"))
    for error, expected in ((1e-4, HOLDS), (1e-2, FAILS)):
        arms = {
            "better": lambda c, e=error: {"loss": better(c), "error": [0.0, e]},
            "baseline": lambda c: {"loss": baseline(c)},
        }
        record = run_check(
            made(arms, all_of(at_most("better", "baseline", ratio=0.7, metric="loss"), both[1]), metric=None)
        )
        assert [p["verdict"] for p in record["predicates"]] == [HOLDS, expected]
        assert record["verdict"] == expected
        assert [p["verdict"] for p in record["null"]["predicates"]] == [FAILS, FAILS]


def test_null_arm_and_oracle_take_the_methods_place():
    arms = {"better": better, "baseline": baseline, "best": lambda c: [0.1] * N, "broken": lambda c: [9.0] * N}
    record = run_check(made(arms, oracle="best", null_arm="broken"))
    assert (record["null"]["how"], record["oracle"]["how"]) == (["the arm broken"], ["the arm best"])
    assert record["reruns"] == {}
    assert (record["verdict"], record["null"]["verdict"], record["oracle"]["verdict"]) == (HOLDS, FAILS, HOLDS)


def test_no_worse_and_a_constant():
    arms = {"better": lambda c: [v + 0.01 for v in baseline(c)], "baseline": baseline}
    record = run_check(
        made(arms, all_of(no_worse("better", "baseline", margin=0.5), at_least("better", 1.0, effect=0.5)))
    )
    assert (record["verdict"], record["null"]["verdict"], record["oracle"]["verdict"]) == (HOLDS, FAILS, HOLDS)
    worse = run_check(
        made(
            {"better": lambda c: [v + 2 for v in baseline(c)], "baseline": baseline},
            no_worse("better", "baseline", margin=0.5),
        )
    )
    assert worse["verdict"] == FAILS


def test_outcomes_are_the_same_again_and_leave_the_callers_random_state_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = run_check(made())
    assert torch.equal(torch.rand(3), expected)
    again = run_check(made())
    assert first == again
    turned = made({"baseline": baseline, "better": better})
    assert run_check(turned)["arms"]["better"] == first["arms"]["better"]


def test_arms_of_a_seed_draw_the_same_random_numbers():
    record = run_check(
        made({"better": lambda c: torch.rand(4), "baseline": lambda c: torch.rand(4)}, at_most("better", "baseline"))
    )
    assert record["arms"]["better"] == record["arms"]["baseline"]
    assert record["verdict"] == FAILS


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_outcomes_that_are_not_finite_are_a_failed_run(bad):
    def sometimes(context):
        values = better(context)
        if context["x"][0] > 3:
            values[5] = bad
        return values

    record = run_check(made({"better": sometimes, "baseline": baseline}))
    assert record["verdict"] == UNSURE
    assert record["predicates"][0]["estimate"] is None
    assert "arm 'better' failed for seed" in record["failures"][0]
    assert "1 of its 12 outcomes of 'loss, nats' are not finite" in record["failures"][0]
    lost = [row is None for row in record["arms"]["better"]["loss, nats"]]
    assert any(lost) and not all(lost)
    assert all(json.loads(json.dumps(record, allow_nan=False))["arms"]["baseline"]["loss, nats"])


def test_an_arm_that_fails_beside_the_prediction_does_not_spoil_it():
    record = run_check(made({"better": better, "baseline": baseline, "extra": lambda c: [float("nan")]}))
    assert record["verdict"] == HOLDS
    assert len(record["failures"]) == 6


def changes_a_tensor(context):
    context["x"].mul_(0.5)
    return context["x"].tolist()


def replaces_an_entry(context):
    context["x"] = context["x"] * 0.5
    return context["x"].tolist()


@pytest.mark.parametrize("arm", [changes_a_tensor, replaces_an_entry])
def test_an_arm_that_changes_the_shared_context_is_named(arm):
    with pytest.raises(FormularyError, match=r"arm 'better' changed the context .*\['x'\]"):
        run_check(made({"better": arm, "baseline": baseline}))


def test_an_arm_that_changes_a_shared_model_is_named():
    def train(context):
        context["model"].weight.data.add_(1e-3)
        return [1.0]

    arms = {"better": train, "baseline": lambda c: [2.0]}
    with pytest.raises(FormularyError, match="changed the context .*weight"):
        run_check(made(arms, setup=lambda seed: {"model": torch.nn.Linear(3, 3)}))
    with pytest.raises(FormularyError, match="changed the context"):
        run_check(
            made(
                {"better": lambda c: [float(c["model"].eval().training)], "baseline": lambda c: [2.0]},
                setup=lambda seed: {"model": torch.nn.Linear(3, 3)},
            )
        )


def test_items_must_be_as_many_for_every_seed_and_every_arm():
    with pytest.raises(FormularyError, match="arm 'better' has a different number of outcomes"):
        run_check(made({"better": lambda c: [1.0] * (2 + int(c["x"][0] > 3)), "baseline": baseline}))
    with pytest.raises(FormularyError, match="needs the same items"):
        run_check(made({"better": lambda c: [1.0] * 3, "baseline": baseline}))
    with pytest.raises(FormularyError, match="no outcomes"):
        run_check(made({"better": lambda c: [], "baseline": baseline}))
    with pytest.raises(FormularyError, match="list of numbers"):
        run_check(made({"better": lambda c: ["a"], "baseline": baseline}))


def test_metrics_must_be_clear():
    arms = {"better": lambda c: {"loss": [1.0], "time": [1.0]}, "baseline": lambda c: {"loss": [2.0], "time": [3.0]}}
    with pytest.raises(UsageError, match="several metrics"):
        run_check(made(arms, metric=None))
    with pytest.raises(UsageError, match="reports no 'lost'.*did you mean 'loss'"):
        run_check(made(arms, at_most("better", "baseline", metric="lost")))


def test_budgets_are_compared():
    def arms(more):
        return {
            "better": lambda c: Outcome(better(c), budget={"parameters": 100 + more, "tokens": 5}),
            "baseline": lambda c: Outcome(baseline(c), budget={"parameters": 100, "tokens": 5}),
        }

    assert run_check(made(arms(4)))["parity"] == {"within": True, "apart": []}
    apart = run_check(made(arms(20)))
    assert apart["parity"]["apart"] == ["parameters: better 120, baseline 100 (1.2 x)"]
    assert any("budgets more than 5 % apart" in reason for reason in apart["reasons"])
    assert run_check(made())["parity"] is None
    half = {"better": lambda c: Outcome(better(c), budget={"flops": 1}), "baseline": baseline}
    assert run_check(made(half))["parity"]["apart"] == ["flops: stated for better, not for baseline"]


def test_works_are_timed_side_by_side():
    def arms(factor):
        return {
            "fast": lambda c: Outcome(work=lambda: sum(range(2000))),
            "slow": lambda c: Outcome([1.0], work=lambda: sum(range(2000 * factor))),
        }

    twice = run_check(made(arms(20), speedup("fast", "slow", at_least=2), seeds=1))
    assert np.array(twice["arms"]["fast"]["CPU seconds"]).shape == (1, 15)
    assert (twice["verdict"], twice["null"]["verdict"]) == (HOLDS, FAILS)
    assert twice["arms"]["slow"]["loss, nats"] == [[1.0]]


def test_not_testable_with_a_smaller_question():
    alone = run_check(Check.not_testable("needs ImageNet-22k", claim="pre-training helps"))
    assert (alone["verdict"], alone["headline"], alone["smaller"]) == (
        UNTESTABLE,
        "not testable here (needs ImageNet-22k)",
        None,
    )
    record = run_check(Check.not_testable("needs ImageNet-22k", claim="pre-training helps", smaller=made()))
    assert (record["verdict"], record["smaller"]["verdict"], record["smaller"]["claim"]) == (
        UNTESTABLE,
        HOLDS,
        "better loses less",
    )
    assert "the smaller question" in record["headline"]


def test_other_seeds_are_for_exploring():
    record = run_check(made(), seeds=3)
    assert record["exploratory"] and len(record["seeds"]) == 3
    assert not run_check(made())["exploratory"]
    with pytest.raises(UsageError, match="at least 2"):
        run_check(made(), seeds=1)


def test_progress_counts_to_the_end():
    seen = []
    run_check(made(seeds=3), progress=seen.append)
    assert seen[0].done == 0 and seen[0].remaining is None
    assert seen[-1].done == seen[-1].total == 3 * 3
    assert all(p.remaining >= 0 for p in seen[2:])
    assert [p.done for p in seen] == sorted(p.done for p in seen)


def test_one_thread_inside_and_the_callers_number_after():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        inside = []
        run_check(
            made(
                {"better": lambda c: [inside.append(torch.get_num_threads()) or 1.0], "baseline": lambda c: [2.0]},
                seeds=2,
            )
        )
        assert set(inside) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"claim": " "}, "claim"),
        ({"items": "sam"}, "did you mean 'same'"),
        ({"seeds": 1}, "at least 2"),
        ({"version": 0}, "start at 1"),
        ({"oracle": "bettr"}, "did you mean 'better'"),
        ({"null_arm": "nothing"}, "no arm"),
        ({"holds": at_most("better", "basline")}, "did you mean 'baseline'"),
        ({"setup": None}, "setup="),
    ],
)
def test_a_check_made_wrongly_is_refused(changes, said):
    with pytest.raises(UsageError, match=said):
        made(**changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8, torch.bool])
def test_views_that_start_anywhere_are_watched(dtype):
    """One item of a tensor starts at bytes that are no multiple of 8."""
    from formulary.evidence._context import changed, fingerprint

    whole = torch.ones(40).to(dtype)
    views = {"scalar": whole[3], "tail": whole[5:], "whole": whole.view(8, 5)[1]}
    before = fingerprint(views)
    assert changed(before, fingerprint(views)) is None
    whole[3] = 0
    assert changed(before, fingerprint(views)) == "context['scalar']"
    whole[3], whole[39] = 1, 0
    assert changed(before, fingerprint(views)) == "context['tail']"
