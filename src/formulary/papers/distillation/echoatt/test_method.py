"""What is true of EchoAtt alone: layers that use another's attention, projections that are gone, and the two-stage loss."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from formulary.contracts import Data, parts
from formulary.contracts.layer import RecurrentState
from formulary.contracts.transform import in_float32
from formulary.errors import FormularyError, UsageError
from formulary.lab import small
from formulary.papers.distillation.echoatt import EchoAtt
from formulary.papers.distillation.echoatt.method import distillation_loss, labels_of, text_loss
from formulary.papers.distillation.echoatt.sharing import similarity

UNTUNED = {"steps": 0, "text_steps": 0}


def loud(family: str = "llama"):
    """A tiny model whose linears matter."""
    model = small.tiny(family)
    for part in parts.linears(model):
        part.raw.data.mul_(8)
    return model


def deep(layers: int = 6):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=97, num_hidden_layers=layers, max_position_embeddings=64, initializer_range=0.15, **sizes)
    ).eval()


def texts(n: int = 8, length: int = 11, seed: int = 0, **options) -> Data:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 97, (length - i % 3,), generator=generator) for i in range(n)]
    return Data([{"input_ids": row} for row in rows], batch_size=4, **options)


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


# ---------------------------------------------------------------- copy


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "gpt2", "opt"])
def test_an_echo_of_equal_queries_and_keys_changes_nothing(family):
    """Where both layers see the same input and have the same W_q and W_k, sharing is exact: transformers' own output."""
    model, batch = loud(family), small.inputs_for(small.tiny(family))
    blocks = parts.blocks(model)
    with torch.no_grad():
        blocks[1].module.load_state_dict(blocks[0].module.state_dict())
        for part in parts.linears(model):
            if part.name.startswith(blocks[0].name) and part.name.rpartition(".")[2] in OUTPUTS:
                part.raw.zero_()
                if part.bias is not None:
                    part.bias.zero_()
        if family == "mixtral":
            blocks[0].module.mlp.experts.down_proj.zero_()
    expected, real = logits(model, batch), batch["attention_mask"].bool()
    EchoAtt(first=0, last=0, **UNTUNED).apply(model, texts())
    torch.testing.assert_close(logits(model, batch)[real], expected[real], rtol=1e-4, atol=1e-4)


OUTPUTS = ("o_proj", "down_proj", "out_proj", "fc2", "c_proj")


def test_the_echo_is_the_leaders_attention_on_its_own_values():
    """By hand, from transformers' eager attention weights and the follower's own weights, grouped heads included."""
    model, batch = loud(), small.inputs_for(small.tiny("llama"))
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        weights = eager(**batch, output_attentions=True).attentions[0]
    found = {}
    shared, _ = EchoAtt(first=0, last=0, **UNTUNED).apply(copy.deepcopy(model), texts())
    slot = shared.model.layers[1].self_attn
    take = lambda module, args, kwargs, out: found.update(x=kwargs["hidden_states"], y=out[0])
    handle = slot.register_forward_hook(take, with_kwargs=True)
    logits(shared, batch)
    handle.remove()
    old, x = model.model.layers[1].self_attn, found["x"]
    heads = []
    for h in range(4):
        rows = slice(8 * (h // 2), 8 * (h // 2) + 8)
        heads.append(weights[:, h] @ (x @ old.v_proj.weight[rows].T))
    expected = torch.cat(heads, -1) @ old.o_proj.weight.T
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found["y"][real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "share,first,last,expected", [(2, 0, 0, {1: 0, 3: 2, 5: 4}), (3, 1, 0, {2: 1, 3: 1, 5: 4}), (2, 1, 2, {2: 1})]
)
def test_layers_share_in_blocks_and_their_queries_and_keys_are_gone(share, first, last, expected, tmp_path):
    model = deep()
    smaller, report = EchoAtt(share=share, first=first, last=last, **UNTUNED).apply(copy.deepcopy(model), texts())
    followers = {}
    for i, block in enumerate(smaller.model.layers):
        layer = getattr(block.self_attn, "layer", None)
        if layer is not None:
            leader = layer.leader[0]
            followers[i] = next(j for j, b in enumerate(smaller.model.layers) if b.self_attn is leader)
    assert followers == expected
    removed = len(expected) * (32 * 32 + 16 * 32)
    assert parts.count_weights(model) - parts.count_weights(smaller) == removed
    assert sum(change.weights for change in report.changes) == removed
    names = list(smaller.state_dict())
    inside = [name for name in names if any(f"layers.{i}.self_attn" in name for i in expected)]
    assert inside and not any("q_proj" in name or "k_proj" in name for name in inside)
    assert len(names) == len(set(names)) and not any("leader" in name for name in names)
    smaller.save_pretrained(tmp_path, variant="formulary")
    again, batch = LlamaForCausalLM.from_pretrained(tmp_path).eval(), texts().collate(texts().items)
    assert torch.equal(logits(again, batch), logits(smaller, batch))


def test_named_layers_share_and_one_that_is_alone_is_said():
    chosen = tuple(f"model.layers.{i}.self_attn" for i in (0, 1, 5))
    _, report = EchoAtt(targets=chosen, **UNTUNED).apply(deep(), texts())
    assert "1 as 0" in report.headline and "alone at the end" in report.headline and len(report.changes) == 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_is_as_without_and_no_keys_are_kept(family, beams):
    model, _ = EchoAtt(first=0, last=0, **UNTUNED).apply(loud(family), texts())
    inputs = small.inputs_for(model)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, use_cache=False, **options))
    with torch.no_grad():
        kept = model(**inputs, use_cache=True).past_key_values.layers
    assert isinstance(kept[1], RecurrentState) and not isinstance(kept[0], RecurrentState)
    assert [tuple(t.shape) for t in kept[1].state] == [tuple(kept[0].values.shape)]


def test_weights_are_let_go_and_copies_are_their_own():
    model, _ = EchoAtt(first=0, last=0, **UNTUNED).apply(loud(), texts())
    batch = small.inputs_for(model)
    model(**batch).logits.sum().backward()
    leader = model.model.layers[0].self_attn
    assert leader.formulary_attention.weights is None
    again = copy.deepcopy(model)
    assert again.model.layers[1].self_attn.layer.leader[0] is again.model.layers[0].self_attn
    with pytest.raises(FormularyError, match="only run after it"), torch.no_grad():
        model.model.layers[1].self_attn(torch.zeros(1, 3, 32))


# ---------------------------------------------------------------- attend


def test_similarity_is_the_cosine_of_transformers_attention():
    model, data = deep(4), texts(n=6)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    expected = torch.zeros(4, 4)
    for item in data.items:
        with torch.no_grad():
            maps = eager(input_ids=item["input_ids"][None], output_attentions=True).attentions
        for i in range(4):
            for j in range(4):
                heads = [(maps[i][0, h].flatten(), maps[j][0, h].flatten()) for h in range(4)]
                expected[i, j] += sum(float(F.cosine_similarity(a, b, 0)) for a, b in heads) / 24
    before = model.config._attn_implementation
    torch.testing.assert_close(similarity(model, data.batches()), expected, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == before and not any("formulary" in name for name, _ in model.named_modules())


# ---------------------------------------------------------------- adjust


def test_the_loss_of_stage_1_is_its_three_terms_token_by_token():
    teacher, model, data = deep(2), deep(2), texts(n=3)
    with torch.no_grad():
        model.lm_head.weight.add_(0.1 * torch.randn_like(model.lm_head.weight))
        model.model.layers[0].self_attn.v_proj.weight.mul_(1.5)
    terms = {"hidden": [], "soft": [], "hard": []}
    for item in data.items:
        outputs = {m: [] for m in (model, teacher)}
        handles = [
            layer.register_forward_hook(lambda module, args, out, m=m: outputs[m].append(out))
            for m in outputs for layer in m.model.layers
        ]  # fmt: skip
        with torch.no_grad():
            a, b = (m(input_ids=item["input_ids"][None]) for m in (model, teacher))
        for handle in handles:
            handle.remove()
        for t in range(len(item["input_ids"])):
            pairs = [(x[0, t], y[0, t]) for x, y in zip(outputs[model], outputs[teacher])]
            terms["hidden"].append(sum(float((x - y).square().sum() / y.square().sum()) for x, y in pairs) / 2)
            p, q = (b.logits[0, t] / 3).softmax(-1), (a.logits[0, t] / 3).softmax(-1)
            terms["soft"].append(9 * float((p * (p / q).log()).sum()))
            terms["hard"].append(-float(a.logits[0, t].log_softmax(-1)[b.logits[0, t].argmax()]))
    batch = data.collate(data.items)
    for name, values in terms.items():
        weights = {key: float(key == name) for key in terms}
        found = distillation_loss(model, batch, teacher=teacher, temperature=3.0, **weights).detach()
        assert float(found) == pytest.approx(sum(values) / len(values), rel=1e-3), name
    own = [m.item() for m in (text_loss(model, data.collate([item])).detach() for item in data.items)]
    counts = [len(item["input_ids"]) - 1 for item in data.items]
    mean = sum(o * c for o, c in zip(own, counts)) / sum(counts)
    assert float(text_loss(model, batch).detach()) == pytest.approx(mean, rel=1e-4)
    assert int((labels_of(batch) != -100).sum()) == sum(counts) + 3


def test_distillation_brings_the_student_to_its_teacher():
    """On the texts that it saw: the teacher is random, so there is nothing to learn about others."""
    teacher, data = deep(), texts(n=8)
    for part in parts.mixers(teacher):
        for linear in part.module.children():
            linear.weight.data.mul_(2)
    batch = data.collate(data.items)
    real = batch["attention_mask"].bool()

    def gap(model):
        a, b = (logits(m, batch)[real].log_softmax(-1) for m in (model, teacher))
        return float(F.kl_div(a, b, log_target=True, reduction="batchmean"))

    untuned, _ = EchoAtt(first=1, last=1, **UNTUNED).apply(copy.deepcopy(teacher), data)
    settings = {"steps": 30, "text_steps": 0, "hard": 0.0, "learning_rate": 1e-3}
    tuned, report = EchoAtt(first=1, last=1, **settings).apply(copy.deepcopy(teacher), data)
    assert gap(tuned) < 0.7 * gap(untuned) and "distilled for 30 steps" in report.headline
    assert not any(note.startswith("text for") for note in report.notes)


def test_half_precision_is_trained_in_float32_and_given_back():
    model = deep(3).to(torch.bfloat16)
    smaller, _ = EchoAtt(first=0, last=0, steps=1, text_steps=0).apply(model, texts())
    assert {p.dtype for p in smaller.parameters()} == {torch.bfloat16}
    with pytest.raises(RuntimeError, match="stop"), in_float32(smaller):
        assert {p.dtype for p in smaller.parameters()} == {torch.float32}
        raise RuntimeError("stop")
    assert {p.dtype for p in smaller.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "wrong", [{"share": 1}, {"first": -1}, {"steps": -1}, {"soft": -1.0}, {"temperature": 0.0}, {"learning_rate": math.inf}]
)
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(UsageError, match=f"echoatt: {next(iter(wrong))}"):
        EchoAtt(**wrong)


def test_too_few_layers_and_a_loss_of_nothing_are_refused():
    with pytest.raises(FormularyError, match="it takes two"):
        EchoAtt().apply(deep(4), texts())
    with pytest.raises(UsageError, match="one of hidden, soft and hard"):
        EchoAtt(hidden=0.0, soft=0.0, hard=0.0)
