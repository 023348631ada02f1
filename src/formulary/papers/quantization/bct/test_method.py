"""What is true of BCT alone: scales are powers of two just large enough, integers fit their bits, tables of 256 entries
suffice, and at 8 bits hardly anything changes.
"""

import copy
import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from formulary.contracts import parts
from formulary.errors import FormularyError, UsageError
from formulary.lab.small import inputs_for, tiny
from formulary.papers.quantization.bct.method import BCT, BlockAttention, BlockLinear, _Rounds, in_blocks, shifts


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 70])
def test_every_block_against_the_formula(bits, columns):
    x = torch.randn(5, columns) * torch.logspace(-4, 4, 5)[:, None]
    x[0, :32], x[1, :32] = 0.0, 2.0 * (2 ** (bits - 1) - 1)
    rounded, top = in_blocks(x, bits, 32), 2 ** (bits - 1) - 1
    for row, out in zip(x.tolist(), rounded.tolist()):
        for start in range(0, columns, 32):
            block = row[start : start + 32]
            largest = max(abs(v) for v in block)
            s = 2.0 ** math.ceil(math.log2(largest / top)) if largest else 1.0
            for v, o in zip(block, out[start : start + 32]):
                assert o == pytest.approx(s * round(v / s), rel=1e-5, abs=1e-30) and abs(o / s) <= top


def test_shifts_of_the_stored_weight_are_those_of_the_formula_and_codes_are_lossless():
    weight = torch.randn(7, 70)
    layer = BlockLinear(70, 7, bits=4, block=32, activation_bits=0)
    layer.store(weight)
    assert torch.equal(layer.weight, in_blocks(weight, 4, 32))
    assert torch.equal(layer.shifts.int(), shifts(weight, 4, 32))
    x = torch.randn(3, 70)
    assert torch.equal(layer(x), x @ layer.weight.mT)


def test_an_activation_function_has_at_most_256_values_in_a_block():
    model, _ = BCT(bits=8, block=64).apply(tiny("bert"))
    function = next(m for m in model.modules() if isinstance(m, _Rounds) and "GELU" in type(m).__name__)
    x = torch.randn(1, 100_000)
    function.bct_block = 100_000
    out = function(x)
    assert len(out.unique()) <= 256
    assert float((out - torch.nn.functional.gelu(x)).abs().max()) < 0.08


def test_attention_is_close_to_attention_and_its_exp_is_a_table():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 40, 16).unbind()
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    mask[0, ..., :9] = False
    out, exact = BlockAttention().attend(q, k, v, mask=mask), sdpa(q, k, v, attn_mask=mask).nan_to_num(0.0)
    seen = mask.any(-1).expand(2, 3, 40)
    assert float((out - exact)[seen].norm() / exact[seen].norm()) < 0.03
    assert not out[~seen].any()


@pytest.mark.parametrize("kind", ["bert", "llama", "vit", "t5"])
def test_at_eight_bits_hardly_anything_changes(kind):
    model = tiny(kind)
    after, report = BCT(bits=8, block=32).apply(copy.deepcopy(model))
    batch = inputs_for(model)
    with torch.no_grad():
        before, now = (m(**batch)[0] for m in (model, after))
    real = batch["attention_mask"].bool() if kind in ("bert", "llama") else slice(None)
    assert float((now - before)[real].norm() / before[real].norm()) < 0.06
    assert report.figures["rounded besides linears"]["norms"] >= 4
    assert report.figures["rounded besides linears"]["activation functions"] >= 2


def test_weights_alone_leave_the_rest_as_it_is():
    model, report = BCT(bits=8, block=32, everything=False).apply(tiny("bert"))
    assert not any(isinstance(m, (_Rounds, BlockAttention)) for m in model.modules())
    assert "rounded besides linears" not in report.figures


def test_tied_tables_stay_and_others_shrink():
    _, report = BCT(block=32).apply(tiny("gpt2"))
    assert "tied" in report.headline
    model, report = BCT(block=32).apply(tiny("bert"))
    assert model.embeddings.word_embeddings.codes.dtype == torch.uint8
    linears = sum(part.weights for part in parts.linears(tiny("bert")))
    stored = sum(v.numel() for n, v in model.named_buffers() if ".layer." in n and n.endswith(("codes", "shifts")))
    assert report.figures["linear weights: bytes of float32 / bytes stored"] == pytest.approx(4 * linears / stored)


def test_gradients_pass_through_the_rounding():
    x = torch.randn(4, 64, requires_grad=True)
    in_blocks(x, 8, 32).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_applied_twice_is_refused():
    model, _ = BCT(block=32).apply(tiny("bert"))
    with pytest.raises(FormularyError):
        BCT(block=32).apply(model)


@pytest.mark.parametrize("wrong,word", [({"bits": 3}, "bits"), ({"block": 12}, "block"), ({"block": 0}, "block")])
def test_parameters_out_of_range_are_refused_in_one_line(wrong, word):
    with pytest.raises(UsageError, match=word):
        BCT(**wrong)
