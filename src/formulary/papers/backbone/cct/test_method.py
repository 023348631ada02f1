import pytest
import torch
from torch import nn
from torch.nn import functional as F

from formulary.errors import FormularyError, UsageError
from formulary.papers.backbone.cct import CCT, ConvTokenizer, SequencePool
from formulary.papers.backbone.cct.method import Block, Config, sinusoids

SMALL = {"image_size": 16, "channels": 1, "classes": 3, "layers": 2, "heads": 2, "width": 16, "mlp_ratio": 1.0}
KINDS = {
    "cct": {"convolutions": 2, "kernel": 3},
    "cvt": {"tokenizer": "patch", "kernel": 4},
    "vit-lite": {"tokenizer": "patch", "kernel": 4, "pool": "class"},
}
# Counted in the official code (SHI-Labs/Compact-Transformers) at 32 x 32, and at 224 x 224 for the two 7x2 models.
OFFICIAL = {
    "vit-lite-2/4": 214_666, "vit-lite-4/4": 413_066, "vit-lite-6/4": 3_190_538, "vit-lite-7/4": 3_716_874,
    "cvt-2/4": 214_539, "cvt-4/4": 412_939, "cvt-6/4": 3_190_283, "cvt-7/4": 3_716_619,
    "cct-2/3x2": 283_723, "cct-4/3x2": 482_123, "cct-6/3x1": 3_233_803, "cct-6/3x2": 3_326_923, "cct-7/3x1": 3_760_139,
    "cct-7/3x2": 3_853_259, "cct-7/7x2": 4_573_735, "cct-14/7x2": 22_367_273,
}  # fmt: skip


@pytest.mark.parametrize("size", CCT.named_sizes)
def test_named_sizes_have_the_official_parameter_counts(size):
    with torch.device("meta"):
        model = CCT.build(size)
    assert sum(p.numel() for p in model.parameters()) == OFFICIAL[size]


def test_every_official_size_is_named():
    assert set(CCT.named_sizes) == set(OFFICIAL)


def test_sequence_pool_is_a_softmax_average():
    torch.manual_seed(0)
    pool, x = SequencePool(5).requires_grad_(False), torch.randn(3, 7, 5)
    for item, pooled in zip(x, pool(x)):
        scores = [float(token @ pool.score.weight[0] + pool.score.bias) for token in item]
        weights = torch.tensor(scores).exp() / torch.tensor(scores).exp().sum()
        expected = sum(weight * token for weight, token in zip(weights, item))
        torch.testing.assert_close(pooled, expected)
    nn.init.zeros_(pool.score.weight)
    torch.testing.assert_close(pool(x), x.mean(dim=1))


@pytest.mark.parametrize("size", [1, 7, 16, 29, 32])
@pytest.mark.parametrize(("kernel", "convolutions"), [(3, 1), (3, 2), (7, 2)])
def test_conv_tokenizer_counts_its_tokens(size, kernel, convolutions):
    tokenizer = ConvTokenizer(2, 8, kernel=kernel, convolutions=convolutions)
    tokens, (height, width) = tokenizer(torch.randn(2, 2, size, 32))
    assert tokens.shape == (2, height * width, 8)
    assert (height, width) == (tokenizer.grid(size), tokenizer.grid(32))


def test_conv_tokenizer_against_a_naive_convolution():
    torch.manual_seed(0)
    tokenizer, image = ConvTokenizer(1, 4, kernel=3), torch.randn(1, 1, 6, 6)
    weight = tokenizer.layers[0].weight[:, 0]
    padded = F.pad(image[0, 0], (1, 1, 1, 1))
    conv = torch.stack(
        [torch.stack([(padded[i : i + 3, j : j + 3] * weight).sum((1, 2)) for j in range(6)]) for i in range(6)]
    )
    conv = F.pad(conv.clamp(min=0), (0, 0, 1, 1, 1, 1), value=-1.0)
    pooled = [conv[2 * i : 2 * i + 3, 2 * j : 2 * j + 3].amax((0, 1)) for i in range(3) for j in range(3)]
    tokens, grid = tokenizer(image)
    assert grid == (3, 3)
    torch.testing.assert_close(tokens[0], torch.stack(pooled))


def test_a_block_equals_torchs_own_pre_norm_layer():
    torch.manual_seed(0)
    block = Block(Config(width=16, heads=2, mlp_ratio=2.0), drop=0.1).eval()
    reference = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True, norm_first=True).eval()
    for norm in (block.norm_attention, block.norm_mlp):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    pairs = {
        "self_attn.in_proj_weight": block.qkv.weight, "self_attn.in_proj_bias": torch.zeros(48),
        "self_attn.out_proj.weight": block.out.weight, "self_attn.out_proj.bias": block.out.bias,
        "linear1.weight": block.mlp[0].weight, "linear1.bias": block.mlp[0].bias,
        "linear2.weight": block.mlp[3].weight, "linear2.bias": block.mlp[3].bias,
        "norm1.weight": block.norm_attention.weight, "norm1.bias": block.norm_attention.bias,
        "norm2.weight": block.norm_mlp.weight, "norm2.bias": block.norm_mlp.bias,
    }  # fmt: skip
    reference.load_state_dict(pairs)
    x = torch.randn(3, 7, 16)
    torch.testing.assert_close(block(x), reference(x), atol=1e-5, rtol=1e-4)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    block = Block(Config(width=8, heads=2), drop=0.25).train()
    branch = torch.ones(4000, 1, 8)
    kept = block.keep(branch)
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert bool((kept == kept[:, :, :1]).all())
    assert abs(float(kept.mean()) - 1) < 0.04
    assert block.eval().keep(branch) is branch


def test_drop_rates_rise_linearly_to_the_last_block():
    model = CCT.build("cct-4/3x2", stochastic_depth=0.3)
    assert [block.drop for block in model.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("kind", KINDS)
def test_overfits_one_batch_and_every_parameter_gets_a_gradient(kind):
    torch.manual_seed(0)
    model = CCT.build(**SMALL, **KINDS[kind], attention_dropout=0.0, stochastic_depth=0.0, label_smoothing=0.0)
    batch = {"pixel_values": torch.randn(6, 1, 16, 16), "labels": torch.tensor([0, 1, 2, 0, 1, 2])}
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    assert abs(float(model.loss(batch).detach()) - torch.tensor(3.0).log()) < 0.3
    for _ in range(80):
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert float(model.loss(batch).detach()) < 0.05
    assert model.eval().predict(batch["pixel_values"]).argmax(1).equal(batch["labels"])


@pytest.mark.parametrize("positions", ["learnable", "sine", "none"])
def test_other_image_sizes_resize_the_positions(positions):
    torch.manual_seed(0)
    model = CCT.build(**SMALL, positions=positions).eval()
    for height, width in ((16, 16), (21, 21), (33, 9)):
        assert model.predict(torch.randn(2, 1, height, width)).shape == (2, 3)
    if positions != "none":
        assert model._positions((8, 8)) is model.position
        resized = model._positions((16, 16)).detach()
        square = model.position.detach()[0].unflatten(0, (8, 8)).permute(2, 0, 1)
        back = F.avg_pool2d(resized[0].unflatten(0, (16, 16)).permute(2, 0, 1), 2)
        assert float(F.cosine_similarity(back.flatten(), square.flatten(), dim=0)) > 0.95


def test_the_class_token_keeps_its_own_position():
    model = CCT.build(**SMALL, **KINDS["vit-lite"])
    torch.testing.assert_close(model._positions((6, 2))[:, 0], model.position[:, 0])
    assert model._positions((6, 2)).shape == (1, 13, 16)
    before = model._positions((6, 2))[:, 1:].detach().clone()
    model.position.data[:, 0] = 1000.0
    torch.testing.assert_close(model._positions((6, 2))[:, 1:], before)


def test_sinusoids_written_out():
    import math

    found = sinusoids(5, 6)
    for p in range(5):
        for i in range(6):
            angle = p / 10000 ** (2 * (i // 2) / 6)
            assert float(found[p, i]) == pytest.approx(math.cos(angle) if i % 2 else math.sin(angle), abs=1e-6)


def test_label_smoothing_is_in_the_loss():
    torch.manual_seed(0)
    model = CCT.build(**SMALL, label_smoothing=0.2).eval()
    batch = {"pixel_values": torch.randn(4, 1, 16, 16), "labels": torch.tensor([0, 1, 2, 0])}
    log = model(batch["pixel_values"]).log_softmax(-1)
    expected = -(0.8 * log.gather(1, batch["labels"][:, None])[:, 0] + 0.2 * log.mean(1)).mean()
    torch.testing.assert_close(model.loss(batch), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_bit_identical(tmp_path, dtype):
    torch.manual_seed(0)
    model = CCT.build(**SMALL, positions="sine").to(dtype).eval()
    model.save(tmp_path / "model")
    again = CCT.load(tmp_path / "model")
    pixels = torch.randn(2, 1, 16, 16, dtype=dtype)
    assert again.config == model.config
    assert again.predict(pixels).equal(model.predict(pixels))


def test_one_line_errors(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'cct-7/3x2'"):
        CCT.build("cct-7/3x9")
    with pytest.raises(UsageError, match="did you mean 'kernel'"):
        CCT.build(kernell=3)
    with pytest.raises(UsageError, match="did you mean 'patch'"):
        CCT.build(tokenizer="path")
    with pytest.raises(UsageError, match="3 heads do not divide"):
        CCT.build(heads=3)
    with pytest.raises(UsageError, match="do not divide an image of 30"):
        CCT.build("cvt-2/4").eval().predict(torch.rand(1, 3, 30, 32))
    with pytest.raises(FormularyError, match="is not a saved cct model") as caught:
        CCT.load(tmp_path)
    assert "\n" not in str(caught.value)
    model = CCT.build(**SMALL)
    model.save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(FormularyError, match="is not a saved cct model"):
        CCT.load(tmp_path)
    CCT.build(**{**SMALL, "width": 32}).save(tmp_path / "other")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(FormularyError, match="size mismatch") as caught:
        CCT.load(tmp_path)
    assert "\n" not in str(caught.value)
