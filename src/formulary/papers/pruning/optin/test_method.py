"""What is true of OPTIN alone: scores by hand, budgets by brute force, units that are really gone."""

import copy
import itertools
import math

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from formulary.contracts import Data, parts
from formulary.contracts.edits import editing
from formulary.errors import FormularyError, UsageError
from formulary.lab import small
from formulary.papers.pruning._parts import runs, shrink, sublayers
from formulary.papers.pruning.optin import OPTIN, least_squares, split_budget
from formulary.papers.pruning.optin.scoring import Trajectory, divergence


def loud(family: str):
    """A tiny model whose linears matter."""
    model = small.tiny(family)
    for part in parts.linears(model):
        part.raw.data.mul_(8)
    return model


def classifier(layers: int = 3):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 24, "num_labels": 3, "vocab_size": 97}
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **sizes)).eval()
    for part in parts.linears(model):
        part.raw.data.mul_(6)
    return model


def texts(n: int = 4) -> Data:
    generator = torch.Generator().manual_seed(0)
    return Data([{"input_ids": torch.randint(3, 97, (12 - 2 * (i % 3),), generator=generator)} for i in range(n)])


def trajectory(model, batch, **settings):
    return Trajectory(model, batch, **{"rows": 768, "temperature": 4.0, "seed": 0, **settings})


def zeroed(model, sublayer, units):
    """A copy of the model in which the output projection does not read these units."""
    model = copy.deepcopy(model)
    part = next(part for part in parts.linears(model) if part.name == sublayer.name)
    weight = part.weight().clone()
    weight[:, runs(torch.tensor(units), sublayer.span)] = 0
    part.raw.data.copy_(part.stored(weight))
    return model


def by_hand(model, other, batch, later):
    """Distortion and divergence of `other` from transformers' own hidden states, one pair of real tokens at a time."""
    real = batch["attention_mask"].flatten().bool() if "attention_mask" in batch else slice(None)
    with torch.no_grad():
        a, b = (m(**batch, output_hidden_states=True) for m in (model, other))
    total = 0.0
    for k in later:
        rows = [out.hidden_states[k + 1].flatten(0, 1)[real].double() for out in (a, b)]
        for i, j in itertools.product(range(len(rows[0])), repeat=2):
            cosines = [float(r[i] @ r[j] / (r[i].norm() * r[j].norm())) for r in rows]
            total += (cosines[0] - cosines[1]) ** 2
    return total, a, b


@pytest.mark.parametrize("layer,later", [(0, [1, 2]), (1, [2]), (2, [2])])
def test_scores_are_those_of_zeroed_weights(layer, later):
    model, batch = classifier(), next(texts(3).batches())
    seen = trajectory(model, batch)
    for sublayer in sublayers(model)[0][2 * layer : 2 * layer + 2]:
        distortion, change = seen.masked(sublayer, [1, 3])
        for unit, got, moved in zip((1, 3), distortion, change):
            total, a, b = by_hand(model, zeroed(model, sublayer, [unit]), batch, later)
            p, q = ((out.logits.double() / 4).softmax(-1) for out in (a, b))
            assert float(got) == pytest.approx(total, rel=1e-3, abs=1e-5)
            assert float(moved) == pytest.approx(16 * float((p * (p / q).log()).sum()), rel=1e-3, abs=1e-5)


def test_shared_layers_are_masked_at_every_use():
    """ALBERT's one block runs twice, so what comes after its first use is its second."""
    model, batch = loud("albert"), small.inputs_for(small.tiny("albert"))
    sublayer = sublayers(model)[0][1]
    total, _, _ = by_hand(model, zeroed(model, sublayer, [5]), batch, [1])
    assert float(trajectory(model, batch).masked(sublayer, [5])[0]) == pytest.approx(total, rel=1e-3)


def test_padding_plays_no_part():
    model, batch = classifier(), next(texts(3).batches())
    longer = {key: torch.nn.functional.pad(value, (0, 5), value=0) for key, value in batch.items()}
    sublayer = sublayers(model)[0][0]
    scores = [trajectory(model, one).masked(sublayer, range(4)) for one in (batch, longer)]
    for a, b in zip(*scores):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_gradients_estimate_what_small_units_do():
    """With weights so small that the first order is all there is, own layer counted, and many probes."""
    model, batch = classifier(), next(texts(3).batches())
    chosen = [s for s in sublayers(model)[0] if s.role == "feed-forward"]
    for sublayer in chosen:
        sublayer.out.raw.data.mul_(1e-2)
    seen = trajectory(model, batch)
    for sublayer, guess in zip(chosen, seen.estimated(chosen, 1e6, 600)):
        distortion, change = seen.masked(sublayer, range(sublayer.units), own=True)
        exact = distortion + 1e6 * change
        assert torch.corrcoef(torch.stack([exact.log(), guess.log()]))[0, 1] > 0.97
        assert float((guess / exact).median()) == pytest.approx(1, abs=0.1)


def test_the_divergence_is_torchs():
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    logs = [(x / 4).log_softmax(-1) for x in (a, b)]
    theirs = 16 * torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="sum")
    torch.testing.assert_close(divergence(a, b, 4.0).float(), theirs)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_split_is_the_best_of_all(share):
    chosen = sublayers(small.tiny("bert"))[0][:2]
    generator = torch.Generator().manual_seed(3)
    scores = [torch.rand(4, generator=generator) * 9, torch.rand(64, generator=generator)]
    cost = [s.macs(11) for s in chosen]
    budget, best = share * sum(s.units * c for s, c in zip(chosen, cost)), (-1.0, None)
    ranked = scores[1].sort(descending=True).values
    for heads in itertools.product((0, 1), repeat=4):
        left = budget - sum(heads) * cost[0]
        if left >= 0:
            total = float((scores[0] * torch.tensor(heads)).sum() + ranked[: int(left // cost[1])].sum())
            best = max(best, (total, [i for i in range(4) if heads[i]]))
    kept = split_budget(chosen, scores, share, 11)
    assert kept[0] == best[1]
    assert float(scores[0][kept[0]].sum() + scores[1][kept[1]].sum()) == pytest.approx(best[0], rel=1e-5)
    assert sum(len(k) * c for k, c in zip(kept, cost)) <= budget


def test_least_squares_is_numpys():
    generator = torch.Generator().manual_seed(0)
    x, weight, keep = torch.randn(50, 12, generator=generator), torch.randn(7, 12, generator=generator), [0, 2, 3]
    parts_of = (x.unflatten(1, (4, 3))[:, :, None] * weight.unflatten(1, (4, 3)).transpose(0, 1)[None]).sum(-1)
    kept, whole = parts_of[:, keep].transpose(1, 2).reshape(-1, 3), parts_of.sum(1).reshape(-1)[:, None]
    theirs = torch.linalg.lstsq(kept, whole).solution
    torch.testing.assert_close(least_squares(x.mT @ x, weight, 4, keep).float(), theirs[:, 0], rtol=0, atol=0.01)


@pytest.mark.parametrize("family", ["bert", "albert", "vit", "dinov2", "llama", "opt", "bart"])
@pytest.mark.parametrize("left", ["some", "one", "none"])
def test_shrinking_is_zeroing_and_takes_weights_away(family, left, tmp_path):
    """The parts that the family shares: smaller linears give what zeroed ones give."""
    model = loud(family)
    wanted, small_one, batch = copy.deepcopy(model), copy.deepcopy(model), small.inputs_for(model)
    with editing(small_one, "optin") as edit:
        for sublayer in sublayers(small_one)[0]:
            keep = {"some": range(1, sublayer.units, 2), "one": [1], "none": []}[left]
            gone = sorted(set(range(sublayer.units)) - set(keep))
            wanted = zeroed(wanted, sublayer, gone)
            shrink(edit, sublayer, keep)
    with torch.no_grad():
        ours, theirs = (m(**batch)[0] for m in (small_one, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    before, after = (sum(p.numel() for b in parts.blocks(m) for p in b.module.parameters()) for m in (model, small_one))
    assert after < 0.75 * before
    small_one.save_pretrained(tmp_path, variant="formulary")
    with torch.no_grad():
        assert torch.equal(type(model).from_pretrained(tmp_path).eval()(**batch)[0], ours)


def test_a_budget_of_almost_nothing_leaves_a_model_that_runs():
    model, report = OPTIN(macs=0.01).apply(classifier(), texts())
    assert report.figures["multiplications kept"] <= 0.01 and "0 of 12 heads stay" in report.headline
    assert model(**next(texts().batches())).logits.isfinite().all()


def test_rescaling_brings_the_output_of_a_sublayer_nearest():
    model, name, seen = classifier(), "bert.encoder.layer.2.output.dense", []
    for flag in (None, False, True):
        changed = copy.deepcopy(model)
        if flag is not None:
            OPTIN(macs=0.5, rescale=flag, targets=(name,)).apply(changed, texts())
        rows = []
        handle = changed.get_submodule(name).register_forward_hook(lambda m, args, out: rows.append(out))
        with torch.no_grad():
            batch = next(texts().batches())
            changed(**batch)
        handle.remove()
        seen.append(rows[0][batch["attention_mask"].bool()])
    assert (seen[2] - seen[0]).norm() < (seen[1] - seen[0]).norm()


def test_neurons_are_estimated_where_masking_would_take_long(monkeypatch):
    _, report = OPTIN(macs=0.6).apply(classifier(), texts())
    assert "random gradients" not in report.headline
    monkeypatch.setattr("formulary.papers.pruning.optin.method.PASSES", 10)
    _, report = OPTIN(macs=0.6).apply(classifier(), texts())
    assert "72 neurons scored by 64 random gradients" in report.headline


@pytest.mark.parametrize(
    "wrong",
    [{"macs": 0.0}, {"macs": 1.0}, {"items": 0}, {"rows": 1}, {"temperature": 0.0}, {"ratio": -1.0}, {"probes": 0},
     {"macs": math.nan}],
)
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(UsageError, match="optin"):
        OPTIN(**wrong)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(FormularyError, match="matches nothing"):
        OPTIN(targets=("nowhere",)).apply(classifier(), texts())
