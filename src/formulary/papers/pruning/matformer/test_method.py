"""What is true of MatFormer alone: nested passes are slices, what a step trains, how shares mix, what comes out."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from formulary.contracts import Data, parts
from formulary.errors import FormularyError, UsageError
from formulary.lab import small
from formulary.papers.pruning._parts import sublayers
from formulary.papers.pruning.matformer import MatFormer
from formulary.papers.pruning.matformer.method import loss_for, mix, nested, train_nested

SHARES = (0.125, 0.25, 0.5, 1.0)


def feed_forwards(model):
    return [sublayer for sublayer in sublayers(model)[0] if sublayer.role == "feed-forward"]


def scaled(family):
    """A tiny model whose feed-forwards are heard."""
    model = small.tiny(family)
    with torch.no_grad():
        for part in parts.linears(model):
            part.raw.mul_(8)
    return model


def main(model, batch):
    with torch.no_grad():
        out = model(**batch)
    return out["logits"] if "logits" in out else out["last_hidden_state"]


def texts(n=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 97, (8 + i % 3,), generator=generator)} for i in range(n)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "vit", "t5", "bart"])
def test_a_nested_pass_is_the_model_with_the_other_neurons_at_zero(family):
    model = scaled(family)
    found, batch = feed_forwards(model), small.inputs_for(model)
    whole, state = main(model, batch), {key: value.clone() for key, value in model.state_dict().items()}
    shares = [SHARES[i % 3] for i in range(len(found))]
    with nested(found) as narrow:
        assert torch.allclose(main(model, batch), whole, atol=1e-5)
        narrow(shares)
        ours = main(model, batch)
    assert torch.equal(main(model, batch), whole) and not torch.allclose(ours, whole, atol=1e-3)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any("First" in type(module).__name__ or "_part" in module.__dict__ for module in model.modules())
    silenced = copy.deepcopy(model)
    for sublayer, share in zip(feed_forwards(silenced), shares):
        with torch.no_grad():
            sublayer.out.weight()[:, int(share * sublayer.units) :] = 0  # a view: what a neuron says counts for nothing
    assert torch.allclose(main(silenced, batch), ours, atol=1e-4 * float(ours.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_what_is_cut_out_is_the_nested_pass_of_the_trained_model(family, tmp_path):
    data, keep = Data(texts(), batch_size=4), (0.25, 0.5)
    model, _ = MatFormer(steps=4, keep=(1.0,)).apply(scaled(family), data)
    cut, report = MatFormer(steps=4, keep=keep).apply(scaled(family), data)
    batch = small.inputs_for(model)
    with nested(feed_forwards(model)) as narrow:
        narrow(keep)
        assert torch.allclose(main(model, batch), main(cut, batch), atol=1e-5)
    assert [sublayer.units for sublayer in feed_forwards(cut)] == [
        int(s * w.units) for s, w in zip(keep, feed_forwards(model))
    ]
    removed = parts.count_weights(model) - parts.count_weights(cut)
    assert removed == sum(
        (w.units - c.units) * (w.unit_weights + sum(part.bias is not None for part in w.into))
        for w, c in zip(feed_forwards(model), feed_forwards(cut))
    )
    assert report.tables["nested models"][-1]["weights"] == parts.count_weights(cut)
    model.save_pretrained(tmp_path / "whole"), cut.save_pretrained(tmp_path / "cut", variant="formulary")
    sizes = [sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors")) for name in ("whole", "cut")]
    assert sizes[1] < sizes[0] - 3 * removed


def test_a_step_draws_one_width_and_leaves_the_neurons_beyond_it_alone():
    model, data = scaled("llama"), Data(texts(), batch_size=4)
    found, before = feed_forwards(model), copy.deepcopy(model)
    losses = train_nested(
        model, data, found, SHARES, (0.0, 1.0, 0.0, 0.0), steps=3, learning_rate=1e-2, loss=loss_for(model, data)[0]
    )
    assert len(losses) == 3
    for sublayer, old in zip(found, feed_forwards(before)):
        for part, was in zip((*sublayer.into, sublayer.out), (*old.into, old.out)):
            moved = part.weight() != was.weight()
            inside, outside = (moved[:16], moved[16:]) if part is not sublayer.out else (moved[:, :16], moved[:, 16:])
            assert inside.any() and not outside.any()
    assert not torch.equal(model.model.embed_tokens.weight, before.model.embed_tokens.weight)


def test_widths_are_drawn_as_often_as_asked():
    model, data = small.tiny("llama"), Data(texts(), batch_size=2)
    found, drawn = feed_forwards(model), []
    model.requires_grad_(False).model.norm.requires_grad_(True)

    def loss(model, batch):
        out = model.model.layers[0].mlp.down_proj
        drawn.append(out._width())
        return model.model.norm.weight.sum() * 0

    train_nested(model, data, found, SHARES, (1.0, 0.0, 2.0, 1.0), steps=400, learning_rate=1e-3, loss=loss)
    counts = {width: drawn.count(width) for width in (8, 16, 32, 64)}
    assert counts[16] == 0 and 150 < counts[32] < 250 and 60 < counts[8] < 140 and 60 < counts[64] < 140


def test_training_makes_first_neurons_worth_more_than_plain_training_does():
    def fresh():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        return LlamaForCausalLM(LlamaConfig(vocab_size=16, initializer_range=0.1, **sizes))

    table = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    items = []
    for start in range(16):
        ids = [start]
        for _ in range(7):
            ids.append(int(table[(ids[-1] + 3) % 16]))
        items.append({"input_ids": torch.tensor(ids)})
    data, loss = Data(items, batch_size=16), {}
    for name, shares in (("nested", (0.125, 1.0)), ("plain", (1.0,))):
        model, _ = MatFormer(granularities=shares, keep=(1.0,), steps=30, learning_rate=2e-2).apply(fresh(), data)
        batch = data.collate(data.items)
        with nested(feed_forwards(model)) as narrow, torch.no_grad():
            narrow([0.125])
            loss[name] = float(model(**batch, labels=batch["input_ids"]).loss)
    assert loss["nested"] < 0.8 * loss["plain"]


def test_mixed_shares_rise_and_come_as_near_as_they_can():
    for layers in (1, 3, 6):
        for share in (0.125, 0.2, 0.3, 0.5, 0.7, 0.99, 1.0):
            found = mix(share, SHARES, layers)
            assert len(found) == layers and list(found) == sorted(found) and len(set(found)) <= 2
            neighbors = [s for s in (max(s for s in SHARES if s <= share), min(s for s in SHARES if s >= share))]
            assert set(found) <= set(neighbors)
            best = min(
                abs(((layers - k) * neighbors[0] + k * neighbors[1]) / layers - share) for k in range(layers + 1)
            )
            assert abs(sum(found) / layers - share) == pytest.approx(best)


def test_without_labels_a_decoder_learns_the_next_token_and_others_their_own_outputs_padding_left_out():
    model = small.tiny("llama")
    data = Data(texts(), batch_size=4)
    loss, words = loss_for(model, data)
    batch = data.sample(0)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert torch.equal(loss(model, batch), model(**batch, labels=labels).loss) and "next token" in words
    bert = small.tiny("bert")
    loss, words = loss_for(bert, data)
    assert loss(bert, batch).item() == 0 and "its own outputs" in words
    with torch.no_grad():
        bert.encoder.layer[1].output.dense.weight.mul_(3)
    first = loss(bert, batch)
    batch["input_ids"][batch["attention_mask"] == 0] = 50
    assert first > 0 and torch.allclose(loss(bert, batch), first, rtol=1e-5)


def test_half_precision_is_trained_in_float32_and_failure_brings_it_back():
    model = small.tiny("llama").bfloat16()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    data = Data(texts(), batch_size=4)
    with pytest.raises(FormularyError, match="the loss is"):
        MatFormer(steps=30, learning_rate=1e30).apply(model, data)
    assert all(torch.equal(v, state[k]) and v.dtype == torch.bfloat16 for k, v in model.state_dict().items())
    cut, _ = MatFormer(steps=3).apply(model, data)
    assert {parameter.dtype for parameter in cut.parameters()} == {torch.bfloat16}


def test_a_saved_mixture_loads(tmp_path):
    cut, report = MatFormer(steps=2, keep=(0.3,)).apply(small.tiny("llama"), Data(texts(), batch_size=4))
    assert [change.note for change in report.changes] == ["16 of 64 neurons", "16 of 64 neurons"]
    cut.eval().save_pretrained(tmp_path, variant="formulary")
    batch = small.inputs_for(cut)
    assert torch.equal(main(AutoModelForCausalLM.from_pretrained(tmp_path), batch), main(cut, batch))


def test_experts_wrong_numbers_of_shares_and_missing_pairs_are_refused():
    data = Data(texts())
    with pytest.raises(FormularyError, match="experts"):
        MatFormer(steps=1).apply(small.tiny("mixtral"), data)
    with pytest.raises(UsageError, match="3 shares, but there are 2"):
        MatFormer(keep=(0.5, 0.5, 0.5)).apply(small.tiny("llama"), data)
    with pytest.raises(FormularyError, match="encoder-decoder on pairs"):
        MatFormer().apply(small.tiny("t5"), data)


@pytest.mark.parametrize(
    "wrong",
    [
        {"granularities": (0.5, 0.25, 1.0)}, {"granularities": (0.5,)}, {"granularities": (0.0, 1.0)}, {"keep": (1.5,)},
        {"keep": (0.1,)}, {"keep": (0.3, 0.5)}, {"probabilities": (1.0,)}, {"steps": 0}, {"learning_rate": 0.0},
    ],
)  # fmt: skip
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(UsageError, match="matformer"):
        MatFormer(**wrong)
