"""What is true of AxFormer alone: the walk by hand, parts that are really gone, hard attention by brute force."""

import copy
import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from formulary.contracts import Data, Report, parts
from formulary.errors import FormularyError, UsageError
from formulary.kernels import float32
from formulary.lab import small
from formulary.papers.pruning.axformer import AxFormer, HardAttention
from formulary.papers.pruning.axformer.losses import Losses
from formulary.papers.pruning.axformer.method import Trial


def classifier(layers: int = 3, seed: int = 0, scale: float = 6.0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 24, "num_labels": 3, "vocab_size": 97}
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **sizes)).eval()
    for part in parts.linears(model):
        part.raw.data.mul_(scale)
        part.bias.data.normal_(std=0.3)
    model.classifier.weight.data.mul_(10)
    return model


def texts(n: int = 24, classes: int = 3, seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 97, (12 - 2 * (i % 3),), generator=generator) for i in range(n)]
    marks = [i // 2 % classes for i in range(n)]
    items = [{"input_ids": row, "labels": torch.tensor(mark)} for row, mark in zip(ids, marks)]
    return Data(items, batch_size=7, labels=marks)


def losses_of(model, data):
    """One item at a time, by transformers' own loss."""
    with torch.no_grad():
        return torch.tensor([float(model(**data.collate([item])).loss) for item in data.items])


def masked(model, out: dict):
    """A copy without what `out` names, {(layer, role): units or "all"}, masked in BERT's own modules as the authors do."""
    model = copy.deepcopy(model)
    for (layer, role), units in out.items():
        block = model.bert.encoder.layer[layer]
        dense = (block.attention.output if role == "attention" else block.output).dense
        if units == "all":
            dense.register_forward_hook(lambda m, args, y: torch.zeros_like(y))
        else:
            span = 8 if role == "attention" else 1
            columns = [span * unit + i for unit in units for i in range(span)]
            dense.weight.data[:, columns] = 0
    return model


def by_hand(model, data, *, tolerance: float, inspect: float, groups: int):
    """The paper's walk, in its own words, over masked copies; what is out in the end, and its loss."""
    base = losses_of(model, data)
    best, out = float(base.mean()), {}

    def tried(candidate):
        found = losses_of(masked(model, candidate), data)
        loss = float(found.mean())
        return loss < best + tolerance and int((found <= base + tolerance).sum()) > len(found) / 2, loss

    for layer in reversed(range(3)):
        neurons = [t.tolist() for t in torch.arange(24).tensor_split(groups)]
        for role, pieces in (("feed-forward", neurons), ("attention", [[head] for head in range(4)])):
            passed, loss = tried({**out, (layer, role): "all"})
            if passed:
                out[layer, role], best = "all", min(best, loss)
            elif loss < inspect * best:
                for piece in pieces:
                    gone = [*out.get((layer, role), []), *map(int, piece)]
                    if len(gone) == (24 if role == "feed-forward" else 4):
                        break
                    passed, loss = tried({**out, (layer, role): gone})
                    if passed:
                        out[layer, role], best = gone, min(best, loss)
    return out


@pytest.mark.parametrize("seed,tolerance,inspect", [(1, 0.0, 1.5), (3, 0.0, 1.5), (5, 0.01, 1.5)])
def test_the_walk_is_the_papers(seed, tolerance, inspect):
    model, data = classifier(seed=seed), texts(n=12, seed=seed)
    out = by_hand(model, data, tolerance=tolerance, inspect=inspect, groups=4)
    settings = {"tolerance": tolerance, "inspect": inspect, "groups": 4, "hard_attention": None}
    pruned, report = AxFormer(**settings).apply(copy.deepcopy(model), data)
    kept = report.tables["units kept"]
    rows = {(int(row["layer"].rpartition(".")[2]), row["part"]): row["of"] - row["kept"] for row in kept}
    units = {"attention": 4, "feed-forward": 24}
    assert rows == {key: units[key[1]] if out.get(key) == "all" else len(out.get(key, [])) for key in rows}
    assert any(value == "all" for value in out.values()) and any(value != "all" for value in out.values())
    torch.testing.assert_close(losses_of(pruned, data), losses_of(masked(model, out), data), rtol=1e-3, atol=1e-4)
    before, after = report.figures["validation loss before and after, nats"]
    assert after < before + tolerance and before == pytest.approx(float(losses_of(model, data).mean()), rel=1e-5)
    assert after == pytest.approx(float(losses_of(pruned, data).mean()), rel=1e-5)


def test_what_is_out_is_gone_from_weights_and_file_and_comes_back_so(tmp_path):
    model, data = classifier(), texts()
    pruned, report = AxFormer(tolerance=5.0, hard_attention=4).apply(copy.deepcopy(model), data)
    assert report.figures["blocks out"] == 1 and "6 of 6 attentions" in report.headline
    counts = [sum(parts.count_weights(block.module) for block in parts.blocks(m)) for m in (model, pruned)]
    assert counts[1] < 0.1 * counts[0]
    pruned.save_pretrained(tmp_path, variant="formulary")
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(losses_of(again, data), losses_of(pruned, data))


def test_a_part_that_the_loss_needs_stays_and_the_weights_are_as_they_were():
    """One attention carries the answer: the class is one token's presence, read by a head trained on the dense model."""
    model, data = classifier(), texts()
    with torch.no_grad():
        states = torch.cat([model.bert(input_ids=item["input_ids"][None]).pooler_output for item in data.items])
        wanted = nn.functional.one_hot(torch.tensor(data.labels)).float()
        model.classifier.weight.copy_(20 * torch.linalg.lstsq(states, wanted).solution.T)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(FormularyError, match="nothing to change"):
        AxFormer(hard_attention=None).apply(model, data)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("case", ["plain", "causal", "mask", "bias"])
def test_hard_attention_is_the_softmax_over_the_largest_scores(case):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (2 * torch.randn(2, 2, 15, 8, generator=generator) for _ in range(3))
    mask = torch.rand(2, 1, 15, 15, generator=generator) < 0.6
    mask[0, :, 3] = False
    given = {"causal": {"causal": True}, "mask": {"mask": mask}, "bias": {"bias": torch.randn(1, 2, 15, 15)}}.get(case, {})
    found = HardAttention(keep=3).attend(q, k, v, **given)
    for b in range(2):
        for h in range(2):
            for i in range(15):
                keys = [j for j in range(15) if (case != "causal" or j <= i) and (case != "mask" or mask[b, 0, i, j])]
                bias = given["bias"][0, h, i] if case == "bias" else torch.zeros(15)
                scores = {j: float(q[b, h, i] @ k[b, h, j]) / math.sqrt(8) + float(bias[j]) for j in keys}
                top = sorted(keys, key=lambda j: -scores[j])[:3]
                total = sum(math.exp(scores[j]) for j in top)
                expected = sum((math.exp(scores[j]) / total * v[b, h, j] for j in top), torch.zeros(8))
                torch.testing.assert_close(found[b, h, i], expected, rtol=1e-4, atol=1e-5)
    given.pop("mask", None)
    whole = HardAttention(**HardAttention.full_budget()).attend(q, k, v, **given)
    options = {"attn_mask": given.get("bias"), "is_causal": case == "causal"}
    torch.testing.assert_close(whole, nn.functional.scaled_dot_product_attention(q, k, v, **options), rtol=1e-4, atol=1e-5)


def test_hard_attention_stays_where_the_loss_falls_and_nowhere_else():
    model, data = classifier(seed=1), texts(n=12)
    untouched, report = AxFormer(tolerance=0.0, hard_attention=12).apply(copy.deepcopy(model), data)
    assert not any("keys" in row["tried"] for row in report.tables["trials"]), "no text has more than 12 tokens"
    found, report = AxFormer(hard_attention=5).apply(copy.deepcopy(model), data)
    trials = [row for row in report.tables["trials"] if "keys" in row["tried"]]
    hard = {name.removesuffix(".formulary_attention") for name, m in found.named_modules() if isinstance(m, HardAttention)}
    assert len(trials) == 3 and hard == {row["part"] for row in trials if row["kept so"]} and 0 < len(hard) < 3
    plain, _ = AxFormer(hard_attention=None).apply(copy.deepcopy(model), data)
    assert plain.config._attn_implementation == model.config._attn_implementation != "formulary"


def test_losses_are_transformers_own_and_padding_plays_no_part():
    data = texts()
    model = classifier()
    torch.testing.assert_close(Losses(model, data, 0.5, Report("", {}, 1))(), losses_of(model, data), rtol=1e-4, atol=1e-5)
    llama = small.tiny("llama")
    words = Data([{"input_ids": item["input_ids"]} for item in data.items], batch_size=5, pad_left=True)
    with torch.no_grad():
        alone = [float(llama(input_ids=i["input_ids"][None], labels=i["input_ids"][None]).loss) for i in words.items]
    torch.testing.assert_close(Losses(llama, words, 0.5, Report("", {}, 1))(), torch.tensor(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama", "albert"])
def test_losses_start_after_a_block_whose_outcome_is_kept(family, monkeypatch):
    monkeypatch.setattr(float32, "linear", lambda *args: 1.01 * nn.functional.linear(*args))  # what is kept takes the same path
    model, data = small.tiny(family), texts()
    plain = Data([{"input_ids": item["input_ids"]} for item in data.items], batch_size=7, labels=data.labels)
    losses, blocks, ran = Losses(model, plain, 0.5, Report("", {}, 1)), parts.blocks(model), []
    for part in parts.linears(model):
        part.module.register_forward_pre_hook(lambda module, args, name=part.name: ran.append(name))
    whole = losses()
    everything = set(ran)
    ran.clear()
    losses.start_after(blocks[0])
    assert not [name for name in ran if not name.startswith(f"{blocks[0].name}.")]
    ran.clear()
    assert torch.equal(losses(), whole)
    shared = len(blocks) == 1
    assert set(ran) == {name for name in everything if shared or not name.startswith(f"{blocks[0].name}.")}
    with torch.no_grad():
        parts.linears(model)[-1].raw.mul_(3)
    assert not torch.equal(changed := losses(), whole)
    losses.start_after(None)
    ran.clear()
    assert torch.equal(losses(), changed) and set(ran) == everything


def test_a_short_trial_ends_when_half_of_the_items_are_worse_off():
    model, data = classifier(), texts()
    losses = Losses(model, data, 0.5, Report("", {}, 1))
    base = losses()
    ran = []
    model.classifier.register_forward_hook(lambda *_: ran.append(1))
    for lower, batches in ((0, 4), (14, 2), (11, 4)):  # of 24 items in batches of 7, the first `lower` are made to be worse off
        trial = lambda: Trial(losses, base - (torch.arange(24) < lower).float(), float(base.mean()) + 1, 0.0)
        ran.clear()
        passed, loss = trial().passes(short=True)
        assert (passed, len(ran)) == (lower < 12, batches)
        assert loss == pytest.approx(float(base[: 7 * batches].mean()), rel=1e-5)
        assert trial().passes()[0] == passed


@pytest.mark.parametrize("classes", [2, 3])
def test_a_readout_stands_for_the_head_of_a_model_that_has_none(classes):
    model, data = small.tiny("bert"), texts(classes=classes)
    plain = Data([{"input_ids": item["input_ids"]} for item in data.items], batch_size=7, labels=data.labels)
    report = Report("", {}, 1)
    losses = Losses(model, plain, 0.5, report)
    assert "readout fitted on 12 items" in report.headline
    rows = []
    for item in plain.items:
        with torch.no_grad():
            rows.append(model(input_ids=item["input_ids"][None]).last_hidden_state[0].mean(0).numpy())
    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(rows[0::2], data.labels[0::2])
    logs = fitted.predict_log_proba(rows[1::2])
    expected = [-logs[i][mark] for i, mark in enumerate(data.labels[1::2])]
    torch.testing.assert_close(losses(), torch.tensor(expected).float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_losses_are_of_as_many_items_as_asked(family):
    model, data = small.tiny(family), texts()
    plain = Data([{"input_ids": item["input_ids"]} for item in data.items], batch_size=7, labels=data.labels)
    few, whole = (Losses(model, plain, 0.5, Report("", {}, 1), items) for items in (9, None))
    assert len(few()) == len(few) == 9 < len(whole)
    torch.testing.assert_close(few(), whole()[:9], rtol=1e-4, atol=1e-5)
    _, report = AxFormer(tolerance=1.0, items=5, hard_attention=None).apply(model, plain)
    assert report.parameters["items"] == 5


def test_without_labels_it_says_so():
    for model in (classifier(), small.tiny("bert")):
        bare = Data([{"input_ids": item["input_ids"]} for item in texts().items])
        with pytest.raises(FormularyError, match="labels"):
            AxFormer().apply(model, bare)


@pytest.mark.parametrize(
    "wrong", [{"tolerance": -1.0}, {"inspect": 0.5}, {"groups": 0}, {"validation": 0.0}, {"hard_attention": 0}, {"items": 0}]
)
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(UsageError, match=f"axformer: {next(iter(wrong))}"):
        AxFormer(**wrong)
