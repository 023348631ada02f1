"""What is true of gated linear attention alone: the recurrence, its three forms, their gradients, stability and padding."""

import numpy as np
import pytest
import torch
from torch import nn

from formulary.contracts import Report, parts
from formulary.contracts.edits import editing
from formulary.errors import FormularyError, UsageError
from formulary.lab.small import tiny
from formulary.papers.sequence_mixing._parts import chunked_scan, projections, quadratic_scan, recurrent_scan, recurrent_step
from formulary.papers.sequence_mixing.gla import GatedLinearAttention


def inputs(length, *, batch=2, heads=2, key=5, value=3, decay=None, dtype=torch.float32, channels=True, seed=0):
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=draw, dtype=dtype)
    log_decay = -torch.rand(batch, heads, length, key if channels else 1, generator=draw, dtype=dtype)
    log_decay = log_decay if decay is None else torch.full_like(log_decay, float(np.log(decay)))
    q, k, v = normal(batch, heads, length, key), normal(batch, heads, length, key), normal(batch, heads, length, value)
    return q, k, v, log_decay, normal(batch, heads, key, value)


def double_loop(q, k, v, g, state):
    """Outputs and final state from the definition: every pair of tokens, with the product of the decays between them."""
    q, k, v, g, state = (t.double().numpy() for t in (q, k, v, g, state))
    alpha = np.broadcast_to(np.exp(g), k.shape)
    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    for t in range(q.shape[2] + 1):
        at = min(t, q.shape[2] - 1)
        total = alpha[:, :, : at + 1].prod(2)[..., None] * state
        for j in range(at + 1):
            kept = alpha[:, :, j + 1 : at + 1].prod(2)
            total = total + (kept * k[:, :, j])[..., None] * v[:, :, j][..., None, :]
        if t == q.shape[2]:
            return out, total
        out[:, :, t] = np.einsum("bhk,bhkv->bhv", q[:, :, t], total)


@pytest.mark.parametrize("channels", [True, False])
@pytest.mark.parametrize("length", [1, 15, 33, 63, 70])
def test_every_form_is_the_definition(length, channels):
    given = inputs(length, channels=channels)
    out, state = double_loop(*given)
    for scan in (recurrent_scan, chunked_scan, quadratic_scan):
        found, after = scan(*given)
        np.testing.assert_allclose(found.numpy(), out, atol=2e-5, rtol=1e-4)
        np.testing.assert_allclose(after.numpy(), state, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("scan", [chunked_scan, quadratic_scan])
@pytest.mark.parametrize("length", [63, 100, 129])
def test_gradients_are_those_of_the_plain_twin(scan, length):
    def gradients(form):
        given = [t.requires_grad_() for t in inputs(length, dtype=torch.float64)]
        out, state = form(*given)
        return torch.autograd.grad(out.sin().sum() + state.square().sum(), given)

    for twin, found in zip(gradients(recurrent_scan), gradients(scan)):
        torch.testing.assert_close(found, twin, atol=1e-9, rtol=1e-7)


def test_gradcheck_over_chunks_and_tiles():
    given = [t.requires_grad_() for t in inputs(7, batch=1, heads=1, key=2, value=2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *args: chunked_scan(*args, chunk=4, tile=2), given)


def test_gradient_of_the_decay_is_a_reverse_sum():
    """Section 4.3 of the paper: d log alpha_t = sum over s >= t of (q dq - k dk) when nothing is read from the last state."""
    q, k, v, g, state = inputs(40, dtype=torch.float64)
    given = [t.requires_grad_() for t in (q, k, g)]
    dq, dk, dg = torch.autograd.grad(chunked_scan(q, k, v, g, torch.zeros_like(state))[0].sin().sum(), given)
    torch.testing.assert_close(dg, (q * dq - k * dk).detach().flip(2).cumsum(2).flip(2), atol=1e-10, rtol=1e-8)


def test_stays_finite_and_exact_where_the_naive_form_overflows():
    given = inputs(2048, batch=1, decay=1e-3)
    q, k, v, g, state = given
    total = g.cumsum(2)
    naive = ((q * total.exp()) @ (k / total.exp()).mT).tril() @ v
    assert not torch.isfinite(naive).all()
    twin, _ = recurrent_scan(*given)
    given = [t.requires_grad_() for t in given]
    out, after = chunked_scan(*given)
    torch.testing.assert_close(out, twin, atol=1e-5, rtol=1e-4)
    assert all(torch.isfinite(t).all() for t in torch.autograd.grad(out.sum() + after.sum(), given))


def test_layer_is_the_paper_s_formula():
    """The whole layer written again with numpy, token by token and head by head."""
    torch.manual_seed(0)
    layer = GatedLinearAttention(width=16, heads=2, gate_rank=3, tau=4.0).double()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    w = {name: parameter.detach().numpy() for name, parameter in layer.named_parameters()}
    row, sigmoid = x[0].numpy(), lambda z: 1 / (1 + np.exp(-z))
    alpha = sigmoid(row @ w["decay_down.weight"].T @ w["decay_up.weight"].T + w["decay_up.bias"]) ** (1 / 4)
    swish = (z := row @ w["gate_proj.weight"].T + w["gate_proj.bias"]) * sigmoid(z)
    q, k, v = (row @ w[f"{name}_proj.weight"].T for name in "qkv")
    heads = []
    for h in range(2):
        channels, state, out = slice(4 * h, 4 * h + 4), np.zeros((4, 8)), []
        for t in range(9):
            state = alpha[t, channels, None] * state + np.outer(k[t, channels] / 2, v[t, 8 * h : 8 * h + 8])
            o = q[t, channels] @ state
            out.append((o - o.mean()) / np.sqrt(o.var() + 1e-5))
        heads.append(np.array(out))
    expected = (swish * np.concatenate(heads, -1)) @ w["o_proj.weight"].T
    np.testing.assert_allclose(layer(x)[0].detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("length", [1, 20, 65])
def test_whole_equals_parts_equals_steps(length):
    torch.manual_seed(0)
    layer, x = GatedLinearAttention(width=16, heads=2), torch.randn(3, length, 16)
    whole, after = layer.scan(x, None, layer.initial_state(x))
    state, outs = layer.initial_state(x), []
    for t in range(length):
        out, state = layer.step(x[:, t], state)
        outs.append(out)
    first, middle = layer.scan(x[:, : length // 2 + 1], None, layer.initial_state(x))
    torch.testing.assert_close(torch.stack(outs, 1), whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state[0], after[0], atol=1e-5, rtol=1e-4)
    if length > 1:
        rest, last = layer.scan(x[:, length // 2 + 1 :], None, middle)
        torch.testing.assert_close(torch.cat([first, rest], 1), whole, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(last[0], after[0], atol=1e-5, rtol=1e-4)


def test_no_token_sees_a_later_one():
    torch.manual_seed(0)
    layer, x = GatedLinearAttention(width=16, heads=2), torch.randn(1, 70, 16)
    changed = x.clone()
    changed[:, 41] += 1
    difference = (layer(changed) - layer(x)).abs().amax((0, 2))
    assert difference[:41].max() == 0 and difference[41:60].min() > 0


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_as_if_it_were_not_there(left):
    torch.manual_seed(0)
    layer, x = GatedLinearAttention(width=16, heads=2), torch.randn(1, 20, 16)
    junk = torch.full((1, 7, 16), 1e3)
    padded = torch.cat([junk, x] if left else [x, junk], 1)
    mask = torch.ones(1, 27, dtype=torch.bool)
    mask[:, slice(0, 7) if left else slice(20, 27)] = False
    alone, state = layer.scan(x, None, layer.initial_state(x))
    out, after = layer.scan(padded, mask, layer.initial_state(padded))
    torch.testing.assert_close(out[:, 7:] if left else out[:, :20], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after[0], state[0], atol=1e-6, rtol=1e-5)


def test_half_precision_runs_the_recurrence_in_float32():
    torch.manual_seed(0)
    layer, x = GatedLinearAttention(width=16, heads=2), torch.randn(1, 200, 16)
    exact = layer(x)
    half, given = layer.bfloat16(), x.bfloat16()
    out, state = half.scan(given, None, half.initial_state(given))
    assert out.dtype == torch.bfloat16 and state[0].dtype == torch.float32
    assert (out.float() - exact).norm() < 0.05 * exact.norm()
    q, k, v, g, start = inputs(300, decay=0.999)
    rounded = [t.bfloat16() for t in (q, k, v)]
    ours = chunked_scan(*rounded, g, start)[0]
    torch.testing.assert_close(ours, recurrent_scan(*(t.float() for t in rounded), g, start)[0].bfloat16(), atol=0.05, rtol=0.01)


def test_state_does_not_grow_and_is_what_state_size_says():
    layer = GatedLinearAttention(width=32, heads=4)
    for length in (1, 300):
        x = torch.randn(2, length, 32)
        state = layer.scan(x, None, layer.initial_state(x))[1]
        assert sum(t[0].numel() for t in state) == layer.state_size(length) == 4 * 4 * 8


def test_step_matches_a_scan_of_one_token():
    q, k, v, g, state = inputs(1)
    out, after = recurrent_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], g[:, :, 0], state)
    whole, last = chunked_scan(q, k, v, g, state)
    torch.testing.assert_close(out, whole[:, :, 0])
    torch.testing.assert_close(after, last)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5"])
def test_projections_reproduce_the_attention_they_were_taken_from(name):
    """Queries, keys (repeated to all heads) and values that the old module computes, from the weights found in it."""
    model = tiny(name)
    old = parts.mixers(model)[-1].module
    x, found = torch.randn(5, 32), projections(old)
    bias = lambda module: 0 if getattr(module, "bias", None) is None else module.bias
    if name == "gpt2":
        expected = dict(zip(("query", "key", "value"), (old.c_attn(x) - old.c_attn.bias).chunk(3, -1)))
    else:
        q, k, v = (old.q_proj, old.k_proj, old.v_proj) if name != "t5" else (old.q, old.k, old.v)
        expected = {role: module(x) - bias(module) for role, module in (("query", q), ("key", k), ("value", v))}
    for role, y in expected.items():
        y = y.unflatten(-1, (-1, 8)).repeat_interleave(32 // y.shape[-1], 1).flatten(1)
        torch.testing.assert_close(x @ found[role].T, y, atol=1e-5, rtol=1e-4)
    assert found["output"].shape == (32, 32)


def test_swap_takes_over_what_fits_and_says_so():
    model = tiny("llama")
    old = parts.mixers(model)
    report = Report("gla", {}, parts.count_weights(model), "token mixer")
    with editing(model, "gla") as edit:
        slots = GatedLinearAttention.swap(model, edit, report)
    assert torch.equal(slots[0].layer.o_proj.weight, old[0].module.o_proj.weight)
    assert slots[0].layer.heads == 4 and slots[0].layer.q_proj.out_features == 16
    assert {change.note for change in report.changes} == {"started from its value, output"}
    wider = GatedLinearAttention(width=32, heads=4, expand_k=1.0)
    assert wider.start_from(old[1].module) == ["query", "key", "value", "output"]
    assert torch.equal(wider.k_proj.weight[:8], wider.k_proj.weight[8:16])


def test_refuses_in_one_line():
    with pytest.raises(UsageError, match="3 heads must divide the key width 16"):
        GatedLinearAttention(width=32, heads=3)
    with pytest.raises(UsageError, match="tau above 0"):
        GatedLinearAttention(width=32, tau=0.0)
    with pytest.raises(UsageError, match="did you mean 'heads'"):
        GatedLinearAttention.arguments(parts.mixers(tiny("llama"))[0], head=2)
    with pytest.raises(FormularyError, match="looks both ways"):
        GatedLinearAttention.arguments(parts.mixers(tiny("bert"))[0])


def test_swapped_model_learns():
    model = tiny("llama")
    with editing(model, "gla") as edit:
        GatedLinearAttention.swap(model, edit, Report("gla", {}, 1))
    ids = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    layer = model.model.layers[0].self_attn.layer
    assert isinstance(layer, nn.Module) and all(p.grad.abs().sum() > 0 for p in layer.parameters())
