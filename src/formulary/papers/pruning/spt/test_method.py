"""What is true of SPT alone: sparse attention against a dense mask, the choice by counting, blocks, routing, merging."""

import copy

import pytest
import torch
from torch.nn import functional as F

from formulary.contracts import Data, parts
from formulary.errors import FormularyError, UsageError
from formulary.lab import small
from formulary.papers.pruning.spt import SPT, PQAttention
from formulary.papers.pruning.spt.feed_forward import LoRA, Routed, RoutedFeedForward, imbalance, project
from formulary.papers.pruning.spt.method import Tuning, adapted, merge


def texts(n=12, length=24):
    generator = torch.Generator().manual_seed(0)
    return Data([{"input_ids": torch.randint(3, 97, (length - i % 3,), generator=generator)} for i in range(n)], batch_size=4)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def problem(length=150, keep=9, seed=0):
    torch.manual_seed(seed)
    attention = PQAttention(keep=keep, head_dim=8, subspaces=4, codewords=4)
    query, key, value = torch.randn(3, 2, 3, length, 8)
    attention.fit(query, key)
    return attention, query, key, value


@pytest.mark.parametrize("length", [1, 63, 150])
def test_attention_and_gradients_are_those_of_a_dense_mask_over_the_chosen_keys(length):
    attention, *tensors = problem(length)
    ours = [x.clone().requires_grad_() for x in tensors]
    theirs = [x.clone().requires_grad_() for x in tensors]
    out = attention.attend(*ours, causal=True)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    chosen = attention.choose(*tensors[:2], seen.expand(2, 3, -1, -1))
    mask = torch.zeros(2, 3, length, length, dtype=torch.bool).scatter_(-1, chosen.long(), True) & seen
    wanted = F.scaled_dot_product_attention(*theirs, attn_mask=mask)
    assert torch.allclose(out, wanted, atol=1e-5)
    above = torch.randn_like(out)
    out.backward(above), wanted.backward(above)
    assert all(torch.allclose(a.grad, b.grad, atol=1e-4) for a, b in zip(ours, theirs))


def test_all_keys_are_scaled_dot_product_attention_with_masks_and_biases():
    _, query, key, value = problem(40)
    attention = PQAttention(head_dim=8, subspaces=4, codewords=4, **PQAttention.full_budget())
    mask, bias = torch.rand(2, 1, 40, 40) > 0.3, torch.randn(1, 3, 40, 40)
    mask[..., 0] = True
    out = attention.attend(query, key, value, mask=mask, bias=bias, scale=0.5)
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.masked_fill(~mask, -torch.inf), scale=0.5)
    assert torch.allclose(out, wanted, atol=1e-5)


def test_the_keys_chosen_share_most_codewords_and_are_the_nearest_of_those():
    attention, query, key, _ = problem(40, keep=5)
    codes = [
        torch.stack([
            (x[..., 2 * m : 2 * m + 2][..., None, :] - attention.codebook[m]).square().sum(-1).argmin(-1) for m in range(4)
        ], -1)
        for x in (query, key)
    ]  # fmt: skip
    allowed = torch.ones(40, 40, dtype=torch.bool).tril().expand(2, 3, -1, -1)
    chosen = attention.choose(query, key, allowed)
    for batch, head, row in [(0, 0, 39), (1, 2, 17), (0, 1, 3), (1, 0, 0)]:
        agree = [int((codes[0][batch, head, row] == codes[1][batch, head, j]).sum()) for j in range(row + 1)]
        wanted = sorted(range(row + 1), key=lambda j: (-agree[j], -j))[:5]
        found = [j for j in chosen[batch, head, row].tolist() if j <= row]
        assert sorted(found) == sorted(wanted)


def test_the_codebook_is_k_means_and_follows_what_it_stands_for():
    torch.manual_seed(0)
    centers = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]])
    x = (centers[torch.randint(4, (1, 1, 400))] + 0.1 * torch.randn(1, 1, 400, 2)).float()
    attention = PQAttention(head_dim=2, subspaces=1, codewords=4)
    attention.fit(x, x)
    assert torch.cdist(centers, attention.codebook[0]).min(1).values.max() < 0.1
    before, moved = attention.codebook.clone(), attention.parts(x + 1.0)
    attention.move(moved, 0.5)
    assert torch.allclose(attention.codebook, before + 0.5, atol=0.02)


def routed(family, blocks=4, active=2):
    model = small.tiny(family).eval()
    with torch.no_grad():
        for part in parts.linears(model):
            part.raw.mul_(4)
    part = parts.feed_forwards(model)[0]
    plain = copy.deepcopy(part.module)
    return plain, RoutedFeedForward.attach(model, part.name, blocks, active)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_blocks_with_gates_of_one_are_the_feed_forward_and_fewer_compute_less(family, monkeypatch):
    plain, module = routed(family, active=4)
    x = torch.randn(2, 7, 32)
    module.router.weight.data.zero_(), module.router.bias.data.zero_()
    with torch.no_grad():
        assert torch.allclose(module(x), plain(x), atol=1e-5)
    module.active, seen = 2, []
    real = Routed.block
    monkeypatch.setattr(Routed, "block", lambda self, tokens, block: seen.append(len(tokens)) or real(self, tokens, block))
    module.router.weight.data.normal_()
    module(x)
    assert len(seen) == 4 and sum(seen) == 2 * 14


def test_a_token_gets_its_chosen_blocks_times_their_gates():
    plain, module = routed("llama")
    module.router.weight.data.normal_()
    x = torch.randn(5, 32)
    with torch.no_grad():
        ours, gates = module(x), torch.sigmoid(x @ module.router.weight.mT + module.router.bias)
        hidden = plain.act_fn(plain.gate_proj(x)) * plain.up_proj(x)
        for token in range(5):
            wanted = torch.zeros(32)
            for block in gates[token].argsort(descending=True)[:2]:
                rows = slice(16 * block, 16 * block + 16)
                wanted += 2 * gates[token, block] * (hidden[token, rows] @ plain.down_proj.weight[:, rows].mT)
            assert torch.allclose(ours[token], wanted, atol=1e-5)


def test_the_calibrated_router_picks_the_blocks_that_add_most():
    _, module = routed("llama")
    x = torch.randn(2000, 32)
    with torch.no_grad():
        module.gate_proj.weight[:16].copy_(torch.eye(32)[0] * 5)
        module.gate_proj.weight[16:32].copy_(-torch.eye(32)[0] * 5)
    module.calibrate(x)
    with torch.no_grad():
        gates = torch.sigmoid(module.router(x))
    sure = x[:, 0].abs() > 0.7
    assert float(((gates[:, 0] > gates[:, 1]) == (x[:, 0] > 0))[sure].float().mean()) > 0.95
    assert float((2 * gates - 1).abs().mean()) < 0.3


def test_balance_is_one_when_even_and_grows_with_unevenness():
    even = imbalance(torch.full((8, 4), 0.5), torch.arange(16).view(8, 2) % 4)
    probability = torch.tensor([[0.9, 0.9, 0.1, 0.1]]).repeat(8, 1)
    uneven = imbalance(probability, torch.tensor([[0, 1]]).repeat(8, 1))
    assert float(even) == pytest.approx(1.0) and float(uneven) == pytest.approx(1.8)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_lora_starts_as_nothing_and_merges_to_what_it_was(family):
    model, batch = small.tiny(family).eval(), small.inputs_for(small.tiny(family))
    linears = parts.linears(model)
    if family != "opt":
        RoutedFeedForward.attach(model, parts.feed_forwards(model)[0].name, 4, 2)
    before = logits(model, batch)
    inside = {p.name for p in linears if any(isinstance(m, Routed) and p.module in m.children() for m in model.modules())}
    with adapted(linears, inside, 3) as factors:
        assert torch.allclose(logits(model, batch), before, atol=1e-6)
        assert sum(isinstance(part.module, LoRA) for part in linears) == len(linears) - len(inside)
        with torch.no_grad():
            for factor in factors:
                factor.normal_(std=0.2)
        unmerged = logits(model, batch)
        x = torch.randn(3, linears[-1].in_features)
        assert not torch.allclose(project(linears[-1].module, x), x @ linears[-1].weight().mT, atol=1e-3)
        merge(linears)
    assert torch.allclose(logits(model, batch), unmerged, atol=1e-4)
    assert not torch.allclose(unmerged, before, atol=1e-3)
    assert not any(isinstance(module, LoRA) or "_lora" in module.__dict__ for module in model.modules())


def test_training_moves_linears_routers_and_codebooks_and_nothing_else():
    model = small.tiny("llama")
    before = copy.deepcopy(model.state_dict())
    after, report = SPT(steps=6, share=0.25, learning_rate=1e-2).apply(model, texts())
    state = after.state_dict()
    names = {f"{part.name}.weight" for part in parts.linears(after)} - {n for n in state if "router" in n}
    assert all(torch.equal(state[name], before[name]) != (name in names) for name in before)
    assert len([n for n in state if n.endswith("codebook")]) == 2 and len(report.changes) == 4
    assert report.figures["stored attention, bytes a sequence: dense, sparse"] == [4 * 8 * 24 * 24, 6 * 8 * 24 * 6]
    assert not any("learn" in vars(m) or getattr(m, "watch", None) for m in after.modules())


def test_attention_alone_and_feed_forwards_alone():
    alone, report = SPT(steps=1, active=4).apply(small.tiny("llama"), texts())
    assert not any(isinstance(m, Routed) for m in alone.modules()) and len(report.changes) == 2
    alone, report = SPT(steps=1, share=1.0).apply(small.tiny("llama"), texts())
    assert not any(isinstance(m, PQAttention) for m in alone.modules()) and len(report.changes) == 2


def test_what_cannot_be_done_is_said():
    with pytest.raises(FormularyError, match="3 subspaces"):
        SPT(steps=1, subspaces=3, active=4).apply(small.tiny("llama"), texts())
    _, report = SPT(steps=1, share=0.5).apply(small.tiny("mixtral"), texts())
    assert len(report.skips) == 2 and "no pair or triple" in report.headline
    _, report = SPT(steps=1, share=0.5).apply(small.tiny("opt"), texts())
    assert "all stay dense" in report.headline


@pytest.mark.parametrize(
    "wrong",
    [
        {"share": 0.0}, {"share": 1.0, "active": 4}, {"subspaces": 0}, {"codewords": 256}, {"blocks": 0}, {"active": 5},
        {"rank": 0}, {"steps": 0}, {"balance": -1.0}, {"learning_rate": 0.0},
    ],
)  # fmt: skip
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(UsageError, match="spt"):
        SPT(**wrong)


def test_the_loss_is_the_tasks_and_the_mean_imbalance_of_what_was_routed():
    modules = [routed("llama")[1] for _ in range(2)]
    torch.manual_seed(0)
    tokens = [torch.randn(9, modules[0].router.in_features) for _ in modules]

    def task(model, batch):
        return sum(module(x).sum() * 0 + 2.0 for module, x in zip(modules, tokens))

    loss = Tuning(task, [], modules, balance=0.3, rate=1e-3).loss(torch.nn.Identity(), {})
    uneven = []
    for module, x in zip(modules, tokens):
        probability = module.router(x).sigmoid()
        uneven.append(float(imbalance(probability, probability.topk(module.active, -1).indices).detach()))
    assert float(loss.detach()) == pytest.approx(4.0 + 0.3 * sum(uneven) / 2, rel=1e-5) and all(u > 1 for u in uneven)
    assert all(module.watch is None for module in modules)
