"""What is true of GPTQ alone: it equals a textbook loop, beats rounding on its grid, and its packed integers say what
was chosen.
"""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formulary.contracts import Data, parts
from formulary.errors import FormularyError, UsageError
from formulary.kernels.compensation import Gram
from formulary.kernels.float32 import faster, has_halves
from formulary.lab.small import inputs_for, tiny
from formulary.papers.quantization import gptq
from formulary.papers.quantization._blockwise import Blockwise
from formulary.papers.quantization._parts import Grid, PackedLinear, pack, replace, round_to_nearest, unpack
from formulary.papers.quantization.gptq.method import GPTQ, compensated, output_errors


def correlated(tokens: int, features: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features // 2, features, generator=generator)
    noise = 0.3 * torch.randn(tokens, features, generator=generator)
    return torch.randn(tokens, features // 2, generator=generator) @ mixing + noise


def data_for(model, n: int = 6, **more) -> Data:
    batch = inputs_for(model, batch=n, **more)
    return Data([{key: value[i] for key, value in batch.items()} for i in range(n)], batch_size=2)


def textbook(weight, hessian, bits, group=None, order=None):
    """Optimal brain quantization in a fixed order, by eliminating columns from the explicit inverse; no Cholesky, no
    batches.
    """
    w, h = weight.double().numpy().copy(), hessian.double().numpy()
    n = w.shape[1]
    order = np.arange(n) if order is None else order
    inverse = np.linalg.inv(h + 0.01 * np.mean(np.diag(h)) * np.eye(n))
    out, top = np.zeros_like(w), 2**bits - 1
    for place, i in enumerate(order):
        if group is None and place == 0 or group is not None and place % group == 0:
            members = w if group is None else w[:, order[place : place + group]]
            low, high = np.minimum(members.min(1), 0), np.maximum(members.max(1), 0)
            scale = (high - low) / top
            zero = np.round(-low / scale)
        out[:, i] = scale * (np.clip(np.round(w[:, i] / scale) + zero, 0, top) - zero)
        w -= np.outer((w[:, i] - out[:, i]) / inverse[i, i], inverse[i])
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, :] = inverse[:, i] = 0
        inverse[i, i] = 1
    return torch.from_numpy(out).float()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [None, 8, 16])
def test_equals_the_textbook_loop(group, act_order):
    weight, x = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)), correlated(200, 40)
    gram, grid = x.T @ x, Grid(3, group)
    order = torch.argsort(gram.diagonal(), descending=True, stable=True).numpy() if act_order else None
    made, damp = compensated(weight, gram, grid, act_order=act_order, block_size=16)
    assert damp == 0.01
    torch.testing.assert_close(made.dense(grid), textbook(weight, gram, 3, group, order), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"act_order": True, "static_groups": True}])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [None, 8, 64])
def test_uncorrelated_inputs_of_equal_size_give_round_to_nearest(group, symmetric, options):
    weight, grid = torch.randn(5, 36), Grid(4, group, symmetric)
    made, _ = compensated(weight, 3 * torch.eye(36), grid, **options)
    assert torch.equal(made.dense(grid), round_to_nearest(weight, grid).dense(grid))


def test_lazy_batches_do_not_change_the_result():
    weight, x, grid = torch.randn(7, 50), correlated(99, 50), Grid(3, 16)
    one, other = (compensated(weight, x.T @ x, grid, block_size=size)[0].dense(grid) for size in (1, 256))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_output_error_is_well_below_rounding_on_the_same_grid(bits):
    weight, x, grid = torch.randn(32, 64), correlated(400, 64), Grid(bits)
    gram = x.T @ x
    both = compensated(weight, gram, grid)[0], round_to_nearest(weight, grid)
    compensation, nearest = output_errors([weight - made.dense(grid) for made in both], gram)
    assert compensation <= 0.6 * nearest


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_are_refused(value):
    x = torch.randn(50, 16)
    x[3, 5] = value
    with pytest.raises(FormularyError, match="NaN"):
        compensated(torch.randn(4, 16), x.T @ x, Grid(bits=4))


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("strip", [7, 16, 40, 256])
def test_output_errors_are_those_of_the_outputs(strip, halves):
    differences, x = [torch.randn(99, 40), torch.randn(99, 40) / 9], torch.randn(60, 40)
    found = output_errors(differences, x.T @ x, strip=strip, halves=halves)
    wanted = [float((x @ difference.T).square().sum()) for difference in differences]
    assert found == pytest.approx(wanted, rel=2e-3 if halves and has_halves() else 1e-5)


@pytest.mark.parametrize("halves", [False, True])
def test_hessians_are_of_the_inputs_or_of_these_in_bfloat16(halves):
    """Every sum of gptq's walk against a plain one over what reaches the layers."""
    assert GPTQ.halves
    model = tiny("llama")
    walk = Blockwise(model, data_for(model), halves=halves)
    linears = [part for part in parts.linears(model) if part.name.startswith(walk.blocks[0].name)]
    seen: dict[str, list] = {}
    walk.observe(walk.blocks[0], linears, lambda part, x, expert: seen.setdefault(part.name, []).append(x.clone()))
    rounds = Gram(8, halves=halves).rounds
    assert rounds or not halves or not has_halves()
    for part, (gram,) in walk.grams(walk.blocks[0], linears):
        x = torch.cat(seen[part.name])
        x = x.bfloat16().float() if rounds else x
        torch.testing.assert_close(gram, x.T @ x, atol=1e-5, rtol=1e-4)


@given(bits=st.integers(2, 8), rows=st.integers(1, 5), bytes_=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_packing_is_lossless_and_as_small_as_the_bits_say(bits, rows, bytes_, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, 8 * bytes_), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpack(packed, bits), codes)


@given(st.integers(2, 8), st.integers(8, 45), st.sampled_from([None, 8, 24]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_packed_linear_has_exactly_the_chosen_weights(bits, features, group, symmetric):
    grid = Grid(bits, group, symmetric)
    quantized = round_to_nearest(torch.randn(3, features), grid)
    layer = PackedLinear(features, 3, bits, group, symmetric)
    layer.store(quantized)
    assert torch.equal(layer.weight, quantized.dense(grid))
    x = torch.randn(2, features)
    assert torch.equal(layer(x), x @ layer.weight.mT)


def test_rounding_error_is_at_most_half_a_step():
    weight, grid = torch.randn(9, 30), Grid(5, 8)
    quantized = round_to_nearest(weight, grid)
    step = quantized.scale.repeat_interleave(8, 1)[:, :30]
    assert bool(((weight - quantized.dense(grid)).abs() <= 0.5001 * step).all())


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_packed_model_computes_what_its_dense_twin_does(kind):
    model = tiny(kind)
    dense, data = copy.deepcopy(model), data_for(model)
    model, report = GPTQ(bits=4, group_size=16, act_order=True).apply(model, data)
    with torch.no_grad():
        for part in parts.linears(dense):
            if part.experts:
                experts = model.get_submodule(part.name.rpartition(".")[0])
                part.raw.copy_(getattr(experts, part.parameter).detach())
            else:
                part.raw.copy_(part.stored(model.get_submodule(part.name).weight))
        batch = inputs_for(model)
        torch.testing.assert_close(model(**batch).logits, dense(**batch).logits, atol=1e-5, rtol=1e-5)
    assert len(report.changes) == len(parts.linears(dense)) and not parts.linears(model)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "bert", "albert", "t5", "bart", "dinov2"])
def test_each_block_is_calibrated_on_the_output_of_the_changed_ones(kind):
    """What `Blockwise` shows of the last block is what the whole changed model would show."""
    model = tiny(kind)
    data = data_for(model)
    seen: dict[str, list] = {"blockwise": [], "whole": []}
    walk = Blockwise(model, data)
    classes = [type(module) for module in model.modules()]
    with torch.no_grad():
        for block in walk.blocks[:-1]:
            for parameter in block.module.parameters():
                parameter.mul_(1.1)
            walk.advance(block)
        last = [part for part in parts.linears(model) if part.name.startswith(walk.blocks[-1].name)]
        walk.observe(walk.blocks[-1], last, lambda part, x, expert: seen["blockwise"].append(x.clone()))
        with faster(), parts.observe(last, lambda part, x, expert: seen["whole"].append(x.clone())) as run:
            for batch in data.batches():
                run(model, batch)
    assert len(seen["whole"]) > 0 and len(seen["whole"]) == len(seen["blockwise"])
    assert all(torch.equal(a, b) for a, b in zip(seen["whole"], seen["blockwise"]))
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_padding_is_left_out_of_calibration(kind):
    def codes(fill: int, masked: bool):
        model = tiny(kind)
        batch = inputs_for(model, batch=4)
        batch["input_ids"][batch["attention_mask"] == 0] = fill
        if not masked:
            del batch["attention_mask"]
        items = [{key: value[i] for key, value in batch.items()} for i in range(4)]
        if not masked:
            items = [item | {"attention_mask": torch.ones(12, dtype=torch.long)} for item in items]
        model, _ = GPTQ(bits=3).apply(model, Data(items, batch_size=4))
        return torch.cat([value.flatten() for key, value in model.state_dict().items() if key.endswith("codes")])

    assert torch.equal(codes(5, masked=True), codes(77, masked=True))
    assert not torch.equal(codes(5, masked=False), codes(77, masked=False))


def test_what_calibration_did_not_reach_is_rounded_and_said():
    model = tiny("mixtral")
    weight = model.model.layers[1].mlp.experts.down_proj.detach().clone()
    data = Data([{"input_ids": torch.tensor([5])}])
    model, report = GPTQ(bits=4).apply(model, data)
    expert = int(report.figures["unreached"][-1].rpartition("[")[2][:-1])
    grid = Grid(4)
    packed = model.model.layers[1].mlp.experts.down_proj
    assert torch.equal(packed[expert], round_to_nearest(weight[expert], grid).dense(grid))
    assert "reached by no calibration token" in report.headline


def test_damping_is_raised_until_the_hessian_is_positive_definite_and_said():
    model = tiny("bert")
    _, report = GPTQ(bits=4, damp=0.0).apply(model, data_for(model, n=2))
    assert "needed damping of" in report.headline


def test_inputs_that_are_always_zero_do_no_harm():
    x = correlated(100, 16)
    x[:, 3] = 0
    weight, grid = torch.randn(4, 16), Grid(4)
    made = compensated(weight, x.T @ x, grid)[0].dense(grid)
    assert torch.equal(made[:, 3], round_to_nearest(weight, grid).dense(grid)[:, 3])


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch):
    model = tiny("mixtral")
    batch = inputs_for(model)
    before, classes = model(**batch).logits, [type(module) for module in model.modules()]
    calls = []

    def fails_late(*args, **kwargs):
        calls.append(args)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return replace(*args, **kwargs)

    monkeypatch.setattr(gptq.method, "replace", fails_late)
    with pytest.raises(KeyboardInterrupt):
        GPTQ(bits=3).apply(model, data_for(model))
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(**batch).logits, before)


def test_narrow_linears_are_skipped_with_a_reason():
    model = tiny("llama")
    model.model.layers[0].adapter = torch.nn.Linear(4, 4)
    _, report = GPTQ(bits=4).apply(model, data_for(model))
    assert [skip.name for skip in report.skips] == ["model.layers.0.adapter"]
    assert "fewer than 8 inputs" in report.headline


@pytest.mark.parametrize(
    "settings_",
    [
        {"bits": 0},
        {"bits": 17},
        {"group_size": 12},
        {"group_size": 0},
        {"damp": -1.0},
        {"static_groups": True},
        {"block_size": 0},
    ],
)
def test_parameters_out_of_range_are_refused_in_one_line(settings_):
    with pytest.raises(UsageError) as refusal:
        GPTQ(**settings_)
    assert "\n" not in str(refusal.value) and next(iter(settings_)) in str(refusal.value)


@pytest.mark.parametrize("args", [{"bits": 17}, {"bits": 4, "in_features": -1}, {"bits": 4, "group_size": 7}])
def test_a_damaged_config_is_refused(args):
    with pytest.raises(FormularyError):
        PackedLinear(**{"in_features": 8, "out_features": 8} | args)


@pytest.mark.parametrize("value", [1e25, torch.nan])
def test_calibration_that_overflows_is_refused_by_name_and_nothing_changes(value):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FormularyError, match="layers.1.mlp.*(overflow|NaN)"):
        GPTQ(bits=4).apply(model, data_for(model))
    assert all(torch.equal(x.nan_to_num(), before[key].nan_to_num()) for key, x in model.state_dict().items())
