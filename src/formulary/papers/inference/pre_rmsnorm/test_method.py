"""What is true of Pre-RMSNorm alone: exact equivalence, a zero-mean stream, the compressed identity, refusals."""

import copy

import pytest
import torch
import transformers
from torch import nn

from formulary.contracts import parts
from formulary.errors import FormularyError
from formulary.lab import small
from formulary.papers.inference.pre_rmsnorm import CRMSNorm, PreRMSNorm, RMSNorm
from formulary.papers.inference.pre_rmsnorm.method import center, compress_reader, compress_writer

FAMILIES = ("vit", "dinov2", "gpt2", "opt")


def prepared(family, dtype):
    """A tiny model whose biases, norms and LayerScale are far from their starting values."""
    model = small.tiny(family).to(dtype)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def run(model, batch):
    with torch.no_grad():
        out = model(**batch)
    return out.logits if "logits" in out else out.last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_outputs_are_the_same(family, dtype, tolerance):
    model = prepared(family, dtype)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in small.inputs_for(model).items()}
    expected = run(model, batch)
    changed, report = PreRMSNorm().apply(copy.deepcopy(model))
    assert (run(changed, batch) - expected).abs().max() < tolerance
    norms = [m for m in changed.modules() if isinstance(m, nn.LayerNorm)]
    assert not norms and sum(isinstance(m, RMSNorm) for m in changed.modules()) == 5 == len(report.changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_has_zero_mean_where_norms_read_it(family):
    model = prepared(family, torch.float64)
    changed, _ = PreRMSNorm().apply(model)
    means = []
    for module in changed.modules():
        if isinstance(module, RMSNorm):
            module.register_forward_pre_hook(lambda m, args: means.append(args[0].mean(-1).abs().max().item()))
    run(changed, {k: v.double() if v.is_floating_point() else v for k, v in small.inputs_for(changed).items()})
    assert len(means) == 5 and max(means) < 1e-12


def test_folding_removes_gamma_and_beta_where_a_bias_can_take_them():
    changed, report = PreRMSNorm().apply(prepared("vit", torch.float32))
    assert sorted(change.note for change in report.changes) == ["folded"] * 4 + ["keeps gamma and beta"]
    assert "folded into the next linear at 4 of 5 norms" in report.headline
    config = transformers.ViTConfig(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, qkv_bias=False
    )
    model = transformers.ViTModel(config).eval().double()
    nn.init.normal_(model.layers[0].layernorm_before.bias)
    batch = {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64)}
    expected = run(model, batch)
    changed, report = PreRMSNorm().apply(model)
    assert (run(changed, batch) - expected).abs().max() < 1e-9
    assert [c.note for c in report.changes] == ["keeps gamma and beta", "folded", "keeps gamma and beta"]


def test_rmsnorm_of_a_centered_vector_is_layer_norm():
    x, norm = torch.randn(5, 32, dtype=torch.float64), nn.LayerNorm(32, eps=1e-3).double()
    ours = RMSNorm(32, 1e-3)(x - x.mean(-1, keepdim=True))
    torch.testing.assert_close(ours, norm(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(RMSNorm(32, 1e-3)(x), nn.functional.rms_norm(x, (32,), eps=1e-3), rtol=1e-12, atol=1e-12)


def test_the_compressed_norm_reads_and_writes_one_entry_less():
    """writer -> norm -> reader through d - 1 entries equals the same through d."""
    write, read, x = torch.randn(16, 8).double(), torch.randn(5, 16).double(), torch.randn(3, 8).double()
    full = RMSNorm(16, 1e-3)(x @ center(write).T) @ read.T
    short = CRMSNorm(16, 1e-3)(x @ compress_writer(write).T) @ compress_reader(read).T
    torch.testing.assert_close(short, full, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family,why", [("llama", "already uses RMSNorm"), ("mixtral", "already uses RMSNorm"), ("bert", "does not support")])
def test_models_it_cannot_rewrite_are_refused(family, why):
    with pytest.raises(FormularyError, match=why):
        PreRMSNorm().apply(small.tiny(family))


def test_a_post_norm_opt_is_refused_and_a_second_application_too():
    config = transformers.OPTConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32,
        max_position_embeddings=64, do_layer_norm_before=False,
    )  # fmt: skip
    with pytest.raises(FormularyError, match="post-LN"):
        PreRMSNorm().apply(transformers.OPTForCausalLM(config))
    changed, _ = PreRMSNorm().apply(small.tiny("vit"))
    with pytest.raises(FormularyError, match="no LayerNorm left"):
        PreRMSNorm().apply(changed)


def test_the_untied_parts_of_a_decoder_keep_the_embedding():
    model = small.tiny("gpt2")
    before = model.transformer.wte.weight.clone()
    changed, _ = PreRMSNorm().apply(model)
    assert torch.equal(changed.transformer.wte.weight, before) and changed.lm_head.weight is changed.transformer.wte.weight
    assert parts.kind(changed) == "decoder"
