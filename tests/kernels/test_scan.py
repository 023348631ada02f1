"""The native recurrence against the plain one, which goes step by step: outputs, states and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formulary.errors import UsageError
from formulary.kernels import scan as module
from formulary.kernels.scan import chunked_scan, recurrent_scan, scan

GATES = ["channel", "head", "none"]
native = pytest.mark.skipif(module._library() is None, reason="no C++ here: the plain path is tested elsewhere")


def operands(length, *, batch=2, heads=2, keys=5, values=3, gate="channel", fade=1.0, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
    q, k, v = (normal(batch, heads, length, width) for width in (keys, keys, values))
    gates = (batch, heads, length, keys if gate == "channel" else 1)
    decay = -fade * torch.rand(gates, generator=draw, dtype=torch.float64).to(dtype)
    return [q, k, v, None if gate == "none" else decay, normal(batch, heads, keys, values)]


def results(form, given, dtype=None):
    """Output, last state and the gradients of a fixed function of both, in the order of the operands."""
    given = [x if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in given]
    output, state = form(*given)
    draw = torch.Generator().manual_seed(9)
    weights = [torch.randn(x.shape, generator=draw).to(torch.bfloat16).to(x.dtype) for x in (output, state)]
    loss = (output * weights[0]).sum().to(state.dtype) + (state * weights[1]).sum()
    return [output.detach(), state.detach(), *torch.autograd.grad(loss, [x for x in given if x is not None])]


def assert_same(found, wanted, tolerance=1e-5):
    """Within `tolerance` of the largest number of a tensor; for gradients, of the largest of all gradients, since that of the
    decays is the small difference of two others.
    """
    for i, (ours, truth) in enumerate(zip(found, wanted, strict=True)):
        assert ours.shape == truth.shape
        largest = max(x.abs().max().item() for x in (wanted[2:] if i > 1 else [truth]))
        torch.testing.assert_close(ours.double(), truth.double(), rtol=0.0, atol=tolerance * max(1.0, largest))


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 80),
    heads=st.sampled_from([(1, 1), (2, 3)]),
    keys=st.sampled_from([1, 3, 4, 16, 17, 33, 64]),
    values=st.sampled_from([1, 2, 16, 40, 64, 80]),
    gate=st.sampled_from(GATES),
    fade=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_outputs_and_gradients_are_those_of_the_plain_twin(length, heads, keys, values, gate, fade, seed):
    made = operands(length, batch=heads[0], heads=heads[1], keys=keys, values=values, gate=gate, fade=fade, seed=seed)
    assert_same(results(scan, made), results(recurrent_scan, made, torch.float64))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("length", [1, 63, 100, 256, 257, 2000])
def test_odd_lengths_and_more_than_one_segment(length, gate):
    made = operands(length, batch=1, gate=gate, fade=0.01)
    assert_same(results(scan, made), results(recurrent_scan, made, torch.float64))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("form", [recurrent_scan, chunked_scan])
def test_gradcheck_on_the_plain_paths(form, gate):
    made = operands(7, batch=1, heads=1, keys=2, values=2, gate=gate, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in made if x is not None]
    whole = lambda *x: form(*x) if gate != "none" else form(*x[:3], None, x[3])
    assert torch.autograd.gradcheck(whole, leaves)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("length", [1, 5, 64, 130])
def test_matrix_products_are_the_plain_twin(length, gate):
    made = operands(length, gate=gate, dtype=torch.float64)
    assert_same(results(chunked_scan, made), results(recurrent_scan, made), tolerance=1e-12)


def test_float64_stays_float64():
    made = operands(70, dtype=torch.float64)
    found = results(scan, made)
    assert found[0].dtype == found[1].dtype == torch.float64
    assert_same(found, results(recurrent_scan, made), tolerance=1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_bfloat16_operands_with_a_float32_state(gate):
    *half, decay, state = operands(300, keys=20, values=40, gate=gate, fade=0.1)
    made = [*(x.bfloat16() for x in half), decay, state]
    found, wanted = results(scan, made), results(recurrent_scan, made)
    assert [x.dtype for x in found] == [x.dtype for x in wanted]
    assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32
    exact = [x.dtype == torch.float32 for x in found]
    assert sum(exact) == (2 if gate == "none" else 3)
    for ours, twin, full in zip(found, wanted, exact):
        assert_same([ours], [twin], tolerance=1e-5 if full else 2**-7)


@pytest.mark.parametrize("form", [scan, chunked_scan])
@pytest.mark.parametrize("fade", [20.0, 200.0, 1e4])
def test_gates_that_forget_everything_neither_overflow_nor_blur(form, fade):
    made = operands(150, keys=17, values=20)
    made[3] = torch.where(torch.rand(made[3].shape, generator=torch.Generator().manual_seed(3)) < 0.5, -fade, -1e-6)
    found = results(form, made)
    assert all(torch.isfinite(x).all() for x in found)
    exact = results(recurrent_scan, made, torch.float64)
    if form is scan:
        assert_same(found, exact)
    else:
        assert_same(found[:2], exact[:2], tolerance=1e-3)


def test_slow_gates_stay_exact_over_a_long_text():
    """The gradient of the decays is a running sum, which starts anew with every segment."""
    made = operands(20_000, batch=1, heads=1, keys=4, values=4, fade=1e-2)
    assert_same(results(scan, made), results(chunked_scan, made, torch.float64), tolerance=5e-6)


@pytest.mark.parametrize("cut", [1, 31, 256, 300])
def test_parts_with_the_state_handed_on_are_the_whole(cut):
    made = operands(400, fade=0.02)
    early = scan(*(x[:, :, :cut] for x in made[:4]), made[4])
    late = scan(*(x[:, :, cut:] for x in made[:4]), early[1])
    whole = scan(*made)
    assert_same([torch.cat([early[0], late[0]], 2), late[1]], whole)


def test_a_missing_state_is_zeros():
    made = operands(10)
    assert torch.equal(scan(*made[:4])[0], scan(*made[:4], torch.zeros_like(made[4]))[0])


def test_what_has_no_gradient_gets_none():
    made = operands(40)
    for only in range(5):
        leaves = [x.clone().requires_grad_(i == only) for i, x in enumerate(made)]
        plain = [x.clone().requires_grad_(i == only) for i, x in enumerate(made)]
        scan(*leaves)[0].square().sum().backward()
        recurrent_scan(*plain)[0].square().sum().backward()
        assert [x.grad is not None for x in leaves] == [i == only for i in range(5)]
        assert_same([leaves[only].grad], [plain[only].grad])
    assert not scan(*made)[0].requires_grad
    with torch.no_grad():
        assert not scan(*leaves)[0].requires_grad
    assert torch.equal(scan(*made)[0], scan(*leaves)[0])


def test_gradients_of_gradients_are_those_of_the_plain_twin():
    def second(form):
        leaves = [x.clone().requires_grad_() for x in operands(20)]
        first = torch.autograd.grad(form(*leaves)[0].sin().sum(), leaves[1:4], create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)

    assert_same(second(scan), second(recurrent_scan))


@native
def test_views_are_read_by_their_strides_and_give_the_same(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: pytest.fail("copied") if x.ndim == 4 and x.shape[2] == 50 else x)
    joined = torch.randn(2, 50, 3 * 4 * 16, generator=torch.Generator().manual_seed(0))
    q, k, v = joined.view(2, 50, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
    rate = torch.tensor([-0.5, -0.1, -0.02, 0.0]).view(1, 4, 1, 1).expand(2, 4, 50, 1)
    shared = k[:, :1].expand(2, 4, 50, 16)
    found = scan(q, shared, v, rate)
    assert found[0].transpose(1, 2).is_contiguous()
    monkeypatch.undo()
    assert torch.equal(found[0], scan(*(x.contiguous() for x in (q, shared, v, rate)))[0])
    assert_same(found, recurrent_scan(q, shared, v, rate, torch.zeros_like(found[1])))


def test_a_width_that_is_expanded_is_copied_not_misread():
    q, k, v, g, state = operands(30)
    flat = g[..., :1].expand(-1, -1, -1, 5)
    assert torch.equal(scan(q, k, v, flat, state)[0], scan(q, k, v, flat.contiguous(), state)[0])


def test_memory_that_was_not_written_is_not_read():
    made = operands(70, keys=17, values=20)
    clean = results(scan, made)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)  # fills new memory with NaN
        assert torch.empty(3).isnan().all()
        assert all(torch.equal(*pair) for pair in zip(results(scan, made), clean))
    finally:
        torch.use_deterministic_algorithms(before)


def test_a_head_never_sees_another():
    made = operands(60)
    clean = scan(*made)[0]
    for x in made:
        x[0, 1] = float("nan")
    seen = scan(*made)[0]
    assert seen[0, 1].isnan().all()
    seen[0, 1] = clean[0, 1]
    assert torch.equal(seen, clean)


@native
def test_results_do_not_depend_on_the_number_of_threads():
    made, before, seen = operands(120, heads=5), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            seen.append(results(scan, made))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*seen))


@native
def test_where_the_native_path_cannot_run_the_plain_one_does(monkeypatch):
    made = operands(90)
    expected = results(scan, made)
    wanted = torch.func.grad(lambda q: scan(q, *made[1:])[0].sum())(made[0])
    assert_same([wanted], [torch.autograd.grad(scan(q := made[0].clone().requires_grad_(), *made[1:])[0].sum(), q)[0]])
    monkeypatch.setattr(module, "_call", lambda *_: pytest.fail("native code was called"))
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        assert_same(results(scan, made), expected)
    monkeypatch.setattr(module, "_library", lambda: None)
    assert_same(results(scan, made), expected)


def test_the_path_is_said(monkeypatch):
    assert module.path() == ("C++" if module._library() else f"matrix products in PyTorch ({module.why_not('scan')})")
    monkeypatch.setattr(module, "why_not", lambda name: "no C++ compiler is on the path")
    assert module.path() == "matrix products in PyTorch (no C++ compiler is on the path)"


@pytest.mark.parametrize("wrong", range(5))
def test_shapes_that_do_not_fit_are_refused(wrong):
    made = operands(10)
    made[wrong] = made[wrong][:, :1]
    with pytest.raises(UsageError, match=r"state \(B,H,K,V\); got"):
        module._check(*made)


def test_it_is_mamba_2_s_recurrence():
    """transformers' own, whose gates belong to heads, whose keys and queries are shared by them and whose inputs are scaled."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    draw = torch.Generator().manual_seed(0)
    x, step = torch.randn(2, 75, 6, 8, generator=draw), torch.rand(2, 75, 6, generator=draw)
    rate, b, c = -torch.rand(6, generator=draw), *torch.randn(2, 2, 75, 1, 16, generator=draw)
    theirs, last = mamba2_chunk_scan(x, step, rate, b, c, chunk_size=32, return_final_states=True)
    heads = lambda t: t.expand(-1, -1, 6, -1).transpose(1, 2)
    ours = scan(heads(c), heads(b), (x * step[..., None]).transpose(1, 2), (rate * step).transpose(1, 2)[..., None])
    assert_same(ours, [theirs.transpose(1, 2), last.mT])


def test_it_is_mamba_s_recurrence():
    """A head a channel, with values of width one and a gate of its own for every number of the state."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    draw = torch.Generator().manual_seed(0)
    x, step = torch.randn(2, 10, 75, generator=draw), torch.rand(2, 10, 75, generator=draw)
    rate, b, c = -torch.rand(10, 16, generator=draw), *torch.randn(2, 2, 16, 75, generator=draw)
    theirs, last = mamba_selective_scan(x, step, rate, b, c, return_last_state=True)
    shared = lambda t: t.mT[:, None].expand(-1, 10, -1, -1)
    ours = scan(shared(c), shared(b), (x * step)[..., None], rate[:, None] * step[..., None])
    assert_same(ours, [theirs[..., None], last[..., None]])
