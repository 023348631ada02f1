"""What is true of FuseGPT alone: influence by hand, what a fused weight is, the model that comes out, and what may
not move.
"""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from formulary.contracts import Data, parts
from formulary.errors import FormularyError, UsageError
from formulary.lab import small
from formulary.papers.pruning.fusegpt import FuseGPT
from formulary.papers.pruning.fusegpt._fusion import fold, graft, linears_of, values
from formulary.papers.pruning.fusegpt._stack import macro_influence, only_stack, see
from formulary.papers.pruning.fusegpt.method import LOSSES, distil, neighborhood

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15,
}  # fmt: skip


def deep(layers=4, cls=LlamaForCausalLM, config=LlamaConfig, **more):
    torch.manual_seed(0)
    return cls(config(num_hidden_layers=layers, **SIZES, **more)).eval()


def stack_of(model):
    return model.get_submodule(only_stack(model))


def texts(n=12, seed=0, length=10):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 97, (length - i % 3,), generator=generator)} for i in range(n)]


def data(**more):
    return Data(texts(), batch_size=4, **more)


def without(model, gone):
    """A model built from scratch, by transformers alone, with the other blocks' weights."""
    config = copy.deepcopy(model.config)
    kept = [i for i in range(config.num_hidden_layers) if i not in gone]
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    new = type(model)(config).eval()
    state = {k: v for k, v in model.state_dict().items() if ".layers." not in k}
    for to, start in enumerate(kept):
        prefix = f"model.layers.{start}."
        state |= {
            f"model.layers.{to}.{k.removeprefix(prefix)}": v
            for k, v in model.state_dict().items()
            if k.startswith(prefix)
        }
    new.load_state_dict(state)
    return new


def last_states(model, batch):
    """The last block's output, before the final norm."""
    found = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return found[0]


def test_macro_influence_is_that_of_models_built_without_each_block():
    model = deep()
    batches = [small.inputs_for(model), small.inputs_for(model, seed=1)]
    for batch in batches:
        batch["input_ids"][batch["attention_mask"] == 0] = (
            50  # the padding token's embedding is zero, and would be seen as nothing
        )
    found = macro_influence(model, list(stack_of(model)), batches, [0, 1, 2, 3])
    for index in range(4):
        smaller, cosines = without(model, {index}), []
        for batch in batches:
            full, reduced = last_states(model, batch), last_states(smaller, batch)
            for b, t in batch["attention_mask"].nonzero().tolist():
                x, y = full[b, t].double(), reduced[b, t].double()
                cosines.append(float(x @ y / (x.norm() * y.norm())))
        assert found[index] == pytest.approx(1 - sum(cosines) / len(cosines), rel=1e-4)


def test_plain_removal_is_the_model_built_without_the_blocks_and_the_least_influence_goes():
    model, batch = deep(), small.inputs_for(deep())
    smaller, report = FuseGPT(prune_rate=0.5, steps=0).apply(model, data())
    gone = [row["removed"] for row in report.tables["removals"]]
    first = macro_influence(model, list(stack_of(model)), data().take(range(8)).batches(), [0, 1, 2, 3])
    assert gone[0] == first.index(min(first)) and len(set(gone)) == 2
    again = without(model, {gone[0]})
    second = macro_influence(again, list(stack_of(again)), data().take(range(8)).batches(), [0, 1, 2])
    assert gone[1] == [i for i in range(4) if i != gone[0]][second.index(min(second))]
    with torch.no_grad():
        assert torch.equal(smaller(**batch).logits, without(model, set(gone))(**batch).logits)
    assert "grafted onto nothing" in report.headline and [c.note for c in report.changes] == ["removed"] * 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_fused_weight_is_the_papers_sum_and_starts_as_plain_removal(family):
    model = small.tiny(family).requires_grad_(False)
    stack, batch = stack_of(model), small.inputs_for(model)
    own = linears_of(model, stack)
    onto, removed = own[id(stack[0])], own[id(stack[1])]
    both = lambda part: (part.weight().clone(), None if part.bias is None else part.bias.detach().clone())
    before, other = ({name: both(part) for name, part in of.items()} for of in (onto, removed))
    expected = model(**batch).logits
    graft(onto, removed, 3)
    graft(onto, removed, 3)
    assert torch.equal(model(**batch).logits, expected)
    wanted = {}
    for name, part in onto.items():
        fusion = part.module.parametrizations[part.parameter][0]
        with torch.no_grad():
            for factor in fusion.parameters():
                factor.copy_(torch.randn_like(factor))
        (b, a), (p, q, s, t) = ([f.detach() for f in factors] for factors in (fusion.low, fusion.grafts))
        w, r = before[name][0], other[name][0]
        for _ in range(20):
            *e, i, j = (int(torch.randint(n, ())) for n in w.shape)
            dot = lambda x, y: sum(float(x[(*e, i, k)]) * float(y[(*e, k, j)]) for k in range(3))
            wanted[name, (*e, i, j)] = float(w[(*e, i, j)]) + dot(b, a) + (dot(p, q) + dot(s, t)) * float(r[(*e, i, j)])
        if values(part)[1] is not None:
            with torch.no_grad():
                part.module.parametrizations["bias"][0].grafts[0].fill_(0.5)
    while_trained = model(**batch).logits
    fold(model)
    assert torch.equal(model(**batch).logits, while_trained)
    for (name, index), value in wanted.items():
        assert float(onto[name].weight()[index]) == pytest.approx(value, abs=1e-4)
    for name, part in onto.items():
        if part.bias is not None:
            torch.testing.assert_close(part.bias.detach(), before[name][1] + 0.5 * other[name][1])
    assert not any("Parametrized" in type(module).__name__ for module in model.modules())


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_distillation_brings_the_group_closer_on_new_text_and_touches_nothing_else(loss):
    model = deep(6)
    new = Data(texts(8, seed=9), batch_size=8).collate(texts(8, seed=9))
    settings = {"prune_rate": 0.1, "group_size": 2, "rank": 8, "loss": loss}
    plain, _ = FuseGPT(steps=0, **settings).apply(model, data())
    fused, report = FuseGPT(steps=40, learning_rate=0.03, base_learning_rate=1e-3, **settings).apply(model, data())
    row = report.tables["removals"][0]
    assert row[f"{loss} after"] < 0.9 * row[f"{loss} before"] and len(row["taken in by"]) == 2
    gone, near = row["removed"], neighborhood(row["removed"], 6, 2)

    def error(smaller):
        kept = [i for i in range(6) if i != gone]
        with torch.no_grad():
            wanted, found = (m(**new, output_hidden_states=True).hidden_states for m in (model, smaller))
        after = near.stop - 1  # the state after the group, in a model with a block less
        if after == len(kept):
            wanted, found = (last_states(m, new) for m in (model, smaller))
        else:
            wanted, found = wanted[near.stop], found[after]
        return float(LOSSES[loss](found, wanted, new["attention_mask"].bool()))

    assert error(fused) < error(plain)
    changed = {
        n.split(".")[2] for (n, a), b in zip(plain.named_parameters(), fused.parameters()) if not torch.equal(a, b)
    }
    assert changed == {str(i) for i in range(near.start, near.stop - 1)}
    assert "norm" in "".join(
        n for (n, a), b in zip(plain.named_parameters(), fused.parameters()) if not torch.equal(a, b)
    )


def test_without_grafts_the_terms_and_trained_numbers_are_as_many():
    counts = []
    for weights in (True, False):
        model = deep().requires_grad_(False)
        own, stack = linears_of(model, stack_of(model)), stack_of(model)
        graft(own[id(stack[0])], own[id(stack[1])], 3, weights)
        counts.append(sum(p.numel() for p in stack[0].parameters()))
        part = own[id(stack[0])]["mlp.up_proj"]
        fusion, start = part.module.parametrizations["weight"][0], part.module.parametrizations["weight"].original
        with torch.no_grad():
            fusion.grafts[0].normal_()
        change = values(part)[0] - start
        rank = torch.linalg.matrix_rank(
            change / own[id(stack[1])]["mlp.up_proj"].weight() if weights else change, rtol=1e-3
        )
        assert int(rank) == 3
    assert counts[0] == counts[1]


def test_padding_is_not_seen():
    def padded(fill):
        items = []
        for ids in (item["input_ids"] for item in texts(8, length=9)):
            mask = torch.tensor([1] * len(ids) + [0] * 4)[:9]
            items.append({"input_ids": torch.cat([ids, torch.full((4,), fill)])[:9], "attention_mask": mask})
        return Data(items, batch_size=4)

    (one, first), (other, second) = (FuseGPT(steps=3, rank=4).apply(deep(), padded(fill)) for fill in (5, 77))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
    assert first.tables == second.tables


def test_the_result_is_an_ordinary_directory_and_the_model_given_stays(tmp_path):
    kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    model = deep(cls=Qwen2ForCausalLM, config=Qwen2Config, layer_types=kinds, use_sliding_window=True, sliding_window=4)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    smaller, report = FuseGPT(prune_rate=0.5, steps=3, rank=4, targets=("*.0", "*.1")).apply(model, data())
    row = report.tables["removals"][0]
    plain, error = without(model, {row["removed"]}), []
    for batch in (data().sample(step) for step in range(3)):
        error.append(
            LOSSES["mse"](last_states(plain, batch), last_states(model, batch), batch["attention_mask"].bool())
        )
    assert row["mse before"] == pytest.approx(float(sum(error)) / 3, rel=1e-4)  # each block with the mask of its kind
    assert (
        all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        and model.config.num_hidden_layers == 4
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for each in (model, smaller) for m in each.modules())
    gone = {row["removed"] for row in report.tables["removals"]}
    assert smaller.config.layer_types == [kind for i, kind in enumerate(kinds) if i not in gone]
    assert [block.self_attn.layer_idx for block in smaller.model.layers] == [0, 1]
    model.save_pretrained(tmp_path / "whole"), smaller.save_pretrained(tmp_path / "smaller")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    batch = small.inputs_for(model)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, smaller(**batch).logits)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "smaller")]
    assert sizes[1] < 0.7 * sizes[0] and parts.count_weights(smaller) < parts.count_weights(model)
    assert all(parameter.requires_grad for parameter in smaller.parameters())


def test_a_later_removal_keeps_earlier_grafts_and_all_steps_are_within_the_group():
    model = deep(6)
    smaller, report = FuseGPT(prune_rate=0.5, steps=4, rank=4, group_size=3, learning_rate=0.05).apply(model, data())
    rows = report.tables["removals"]
    assert len(rows) == 3 and all(row["mse after"] < row["mse before"] for row in rows)
    gone = {row["removed"] for row in rows}
    assert len(gone) == 3 and all(not gone_before & set(row["taken in by"]) for gone_before, row in zip(
        ({r["removed"] for r in rows[: i + 1]} for i in range(3)), rows))  # fmt: skip
    assert {c.name.rpartition(".")[2]: c.note for c in report.changes if c.note == "removed"}.keys() == {
        str(i) for i in gone
    }


def test_the_group_is_that_of_the_authors_code():
    for count, size in ((32, 8), (16, 4), (8, 8)):
        for index in range(count):
            if index - size // 2 < 0:
                expected = range(size)
            elif index + size // 2 - 1 > count - 1:
                expected = range(count - size, count)
            else:
                expected = range(index - size // 2, index + size // 2)
            assert neighborhood(index, count, size - 1) == expected


def test_only_chosen_blocks_go_and_what_cannot_be_done_is_refused():
    model = deep()
    _, report = FuseGPT(prune_rate=0.25, steps=0, targets=("*.layers.3",)).apply(model, data())
    assert [row["removed"] for row in report.tables["removals"]] == [3]
    with pytest.raises(UsageError, match="removes 2 of 4 blocks, and 1 may go"):
        FuseGPT(prune_rate=0.5, targets=("*.layers.3",)).apply(model, data())
    with pytest.raises(FormularyError, match="only one"):
        FuseGPT().apply(deep(1), data())
    with pytest.raises(FormularyError, match="does not support an encoder"):
        FuseGPT().apply(small.tiny("bert"), data())
    shared = deep()
    shared.model.layers[2] = shared.model.layers[1]
    with pytest.raises(FormularyError, match="share no weights"):
        FuseGPT().apply(shared, data())
    uneven = deep()
    uneven.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 48)
    with pytest.raises(FormularyError, match="differ in shape"):
        FuseGPT().apply(uneven, data())
    group = [torch.nn.Linear(2, 2)]
    seen = see(model, list(stack_of(model)), small.inputs_for(model))
    with pytest.raises(FormularyError, match="try a smaller learning_rate"):
        seen.output = seen.output * float("nan")
        distil(list(stack_of(model)), [seen], steps=1, learning_rate=1.0, base_learning_rate=1.0)
    assert group


@pytest.mark.parametrize(
    "wrong", [{"prune_rate": 0.0}, {"prune_rate": 1.0}, {"rank": 0}, {"steps": -1}, {"learning_rate": 0.0}]
)
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(UsageError, match="fusegpt"):
        FuseGPT(**wrong)
