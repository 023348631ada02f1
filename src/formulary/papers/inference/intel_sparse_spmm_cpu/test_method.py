"""What is true of 4x1 block pruning alone: brute force at tiny size, nested masks while it trains, the layer's equation."""

import copy

import pytest
import torch

import formulary
from formulary.contracts import Data, parts
from formulary.errors import FormularyError, UsageError
from formulary.kernels import int8, sparse_int8
from formulary.lab.small import inputs_for, tiny
from formulary.papers.inference.intel_sparse_spmm_cpu import IntelSparseSpmmCpu, SparseInt8Linear, pruning
from formulary.papers.inference.intel_sparse_spmm_cpu.pruning import block_mask, disagreement, prune_and_train


def texts(n: int = 8) -> Data:
    generator = torch.Generator().manual_seed(0)
    items = [{"input_ids": torch.randint(3, 97, (9 - i % 3,), generator=generator)} for i in range(n)]
    return Data(items, batch_size=4)


def blocks_of(weight: torch.Tensor, block: int = 4) -> dict[tuple[int, int], torch.Tensor]:
    return {(i, j): weight[i : i + block, j] for i in range(0, len(weight), block) for j in range(weight.shape[1])}


@pytest.mark.parametrize("outputs", [1, 4, 10, 12])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.8, 0.999])
@pytest.mark.parametrize("block", [1, 4])
def test_the_blocks_with_the_largest_norms_stay(outputs, sparsity, block):
    weight = torch.randn(outputs, 7, generator=torch.Generator().manual_seed(outputs))
    ranked = sorted(blocks_of(weight, block).items(), key=lambda item: -float(item[1].square().sum()))
    wanted = {place for place, _ in ranked[: max(1, round((1 - sparsity) * len(ranked)))]}
    mask = block_mask(weight, sparsity, block)
    assert {(i, j) for i, j in blocks_of(weight, block) if mask[i // block, j]} == wanted


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_the_layer_is_the_pruned_and_rounded_linear(family):
    model = tiny(family)
    before = {part.name: part.weight().clone() for part in parts.linears(model)}
    model, report = IntelSparseSpmmCpu(steps=0).apply(model)
    assert {change.name for change in report.changes} == set(before)
    for name, weight in before.items():
        layer, keep = model.get_submodule(name), block_mask(weight, 0.8).repeat_interleave(4, 0)[: len(weight)]
        assert isinstance(layer, SparseInt8Linear) and not (layer.weight[~keep] != 0).any()
        assert ((layer.weight - weight * keep).abs() <= layer.scale[:, None] / 2 + 1e-7).all()
        x = torch.randn(3, layer.in_features)
        step = x.abs().amax(1, keepdim=True) / 127
        expected = (x / step).round() * step @ layer.weight.mT + (0 if layer.bias is None else layer.bias)
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


def test_at_sparsity_zero_it_is_int8_alone():
    model = tiny("bert")
    weight = parts.linears(model)[0].weight().clone()
    layer = IntelSparseSpmmCpu(sparsity=0.0, steps=0).apply(model)[0].get_submodule(parts.linears(tiny("bert"))[0].name)
    scale = weight.abs().amax(1) / 127
    codes, x = (weight / scale[:, None]).round().to(torch.int8), torch.randn(5, 32)
    torch.testing.assert_close(layer(x), int8.plain_linear(x, codes, scale, layer.bias, 1e30), atol=1e-5, rtol=1e-5)


def test_a_weight_that_is_dropped_does_not_coarsen_what_stays():
    weight = torch.tensor([[100.0, 1.0, -0.5]]).expand(4, 3)
    layer = SparseInt8Linear(3, 4, blocks=2)
    layer.store(weight, torch.tensor([[False, True, True]]))
    assert layer.values.tolist() == [[127] * 4, [-64] * 4] and layer.weight[:, 1].allclose(torch.ones(4))


def test_blocks_go_step_by_step_and_none_comes_back(monkeypatch):
    seen, model = [], tiny("bert")
    chosen = parts.linears(model)

    def record(*arguments):
        seen.append([part.weight() != 0 for part in chosen])
        return disagreement(*arguments)

    monkeypatch.setattr(pruning, "disagreement", record)
    losses = prune_and_train(model, chosen, texts(), 0.8, steps=30, learning_rate=1e-3)
    seen.append([part.weight() != 0 for part in chosen])
    shares = [float(torch.cat([mask.flatten() for mask in masks]).float().mean()) for masks in seen]
    assert len(losses) == 30 and shares[0] == 1.0 and shares[20] == shares[-1] == pytest.approx(0.2, abs=0.01)
    assert 0.2 < shares[5] < 0.8 and shares == sorted(shares, reverse=True)
    for earlier, later in zip(seen, seen[1:]):
        assert not any((b & ~a).any() for a, b in zip(earlier, later))
    for part in chosen:
        assert all(bool((block == 0).all()) or bool((block != 0).all()) for block in blocks_of(part.weight()).values())


def test_training_comes_nearer_to_the_unchanged_model_than_pruning_at_once():
    model, data = tiny("llama"), texts()
    for part in parts.linears(model):
        part.raw.data.mul_(5)
    batch = next(data.batches())
    distance = []
    for steps in (0, 60):
        after, _ = IntelSparseSpmmCpu(sparsity=0.5, steps=steps, learning_rate=3e-3).apply(copy.deepcopy(model), data)
        distance.append(float(disagreement(after, model, batch).detach()))
    assert distance[1] < 0.5 * distance[0]


def test_padding_plays_no_part_in_the_distance():
    model, other = tiny("bert"), tiny("bert")
    for part in parts.linears(other):
        part.raw.data.mul_(1.1)
    batch = inputs_for(model)
    changed = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 50, batch["input_ids"])}
    assert (changed["input_ids"] != batch["input_ids"]).any()
    with torch.no_grad():
        seen = [float(disagreement(model, other, some)) for some in (batch, changed)]
    assert seen[0] == pytest.approx(seen[1], rel=1e-4) and seen[0] > 0


def test_half_precision_trains_in_float32_and_comes_back_as_it_was():
    model = tiny("bert").bfloat16()
    after, _ = IntelSparseSpmmCpu(steps=3, learning_rate=1e-6).apply(copy.deepcopy(model), texts())
    dtypes = {name: value.dtype for name, value in model.named_parameters() if name in dict(after.named_parameters())}
    assert set(dtypes.values()) == {torch.bfloat16}
    assert all(dict(after.named_parameters())[name].dtype == dtype for name, dtype in dtypes.items())


def test_gradient_is_that_of_the_dequantized_weight():
    layer = SparseInt8Linear(20, 10, blocks=18, bias=True)
    weight = torch.randn(10, 20)
    layer.store(weight, block_mask(weight, 0.7))
    layer.bias.data = torch.randn(10)
    x, upstream = torch.randn(2, 5, 20, requires_grad=True), torch.randn(2, 5, 10)
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.weight)
    torch.testing.assert_close(layer.bias.grad, upstream.sum((0, 1)))


@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_files_hold_six_bytes_a_block(sparsity, tmp_path):
    model, _ = IntelSparseSpmmCpu(sparsity=sparsity, steps=0).apply(tiny("vit"))
    model.save_pretrained(tmp_path, variant="formulary")
    for name, layer in model.named_modules():
        if isinstance(layer, SparseInt8Linear):
            rows = -(-layer.out_features // 4)
            assert layer.blocks == max(1, round((1 - sparsity) * rows * layer.in_features))
            assert layer.values.nbytes + layer.columns.nbytes == 6 * layer.blocks
    batch = inputs_for(model)
    with torch.no_grad():
        loaded = formulary.load(tmp_path)
        assert torch.equal(loaded(**batch)[0], model(**batch)[0])


def test_a_damaged_file_is_refused_in_one_line(tmp_path):
    model, _ = IntelSparseSpmmCpu(steps=0).apply(tiny("bert"))
    layer = model.encoder.layer[0].output.dense
    layer.columns[0] = 10_000
    with pytest.raises(FormularyError, match="columns of a block-sparse weight"):
        model(**inputs_for(model))


def test_without_native_code_the_report_says_so(monkeypatch):
    monkeypatch.setattr(sparse_int8, "_library", lambda: None)
    model, report = IntelSparseSpmmCpu(steps=0).apply(tiny("bert"))
    assert "decompressed" in report.headline and "decompressed" in model.encoder.layer[0].output.dense.slow_because


def test_experts_are_skipped_and_said():
    _, report = IntelSparseSpmmCpu(steps=0).apply(tiny("mixtral"))
    assert len(report.skips) == 4 and "expert tensors stay in floating point" in report.headline


@pytest.mark.parametrize("wrong", [{"sparsity": 1.0}, {"sparsity": -0.1}, {"steps": -1}, {"learning_rate": 0.0}])
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(UsageError, match="intel-sparse-spmm-cpu"):
        IntelSparseSpmmCpu(**wrong)


@pytest.mark.parametrize("sizes", [(0, 4, 0), (4, 0, 0), (4, 4, 5), (70_000, 4, 1)])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(UsageError, match="no block-sparse linear"):
        SparseInt8Linear(sizes[0], sizes[1], blocks=sizes[2])
