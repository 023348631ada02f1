"""What holds for every layer, alone and in place of a part of tiny decoders."""

import copy

import pytest
import torch

import formulary  # noqa: F401
from formulary.contracts import parts
from formulary.contracts.edits import editing
from formulary.contracts.report import Report
from formulary.lab import small
from tests.conformance import rooms

LAYERS = rooms.implementing("layer")
every = pytest.mark.parametrize("slug,cls", LAYERS, ids=[f"{slug}-{cls.__name__}" for slug, cls in LAYERS])
MIXERS = [pair for pair in LAYERS if pair[1].replaces == "token mixer"]
mixers = pytest.mark.parametrize("slug,cls", MIXERS, ids=[slug for slug, _ in MIXERS])
RECURRENT = [pair for pair in MIXERS if pair[1].recurrent]
recurrent = pytest.mark.parametrize("slug,cls", RECURRENT, ids=[slug for slug, _ in RECURRENT])


def part_of(family="llama", cls=None):
    model = small.tiny(family)
    return (parts.feed_forwards if cls.replaces == "feed-forward" else parts.mixers)(model)[0]


def layer(cls, dtype=torch.float32):
    torch.manual_seed(0)
    return cls(**cls.arguments(part_of("llama", cls), **rooms.quick(cls))).to(dtype).eval()


def swapped(slug, cls, family, targets=()):
    model = rooms.tiny(family)
    report = Report(slug, {}, parts.count_weights(model), cls.replaces)
    torch.manual_seed(0)
    with editing(model, slug) as edit:
        cls.swap(model, edit, report, targets=targets, **rooms.quick(cls))
    return model, report


@every
@pytest.mark.parametrize("length", (1, 7, 63, 100))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_dtypes_and_gradients(slug, cls, length, dtype):
    module = layer(cls, dtype)
    x = torch.randn(2, length, 32, dtype=dtype, requires_grad=True)
    y = module(x)
    assert y.shape == x.shape and y.dtype == dtype
    y.float().square().mean().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


@mixers
def test_a_causal_mixer_sees_nothing_later(slug, cls):
    if not cls.causal:
        assert cls.causal is False
        return
    module, x = layer(cls), torch.randn(2, 90, 32)
    again = x.clone()
    again[:, 50:] = torch.randn(2, 40, 32)
    torch.testing.assert_close(module(x)[:, :50], module(again)[:, :50], rtol=1e-4, atol=1e-5)


@mixers
@pytest.mark.parametrize("left", [True, False])
def test_padding_influences_nobody(slug, cls, left):
    module, x = layer(cls), torch.randn(2, 40, 32)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, slice(0, 9) if left else slice(31, 40)] = False
    out = module(x, mask)
    alone = module(x[:1, mask[0]])
    torch.testing.assert_close(out[:1, mask[0]], alone, rtol=1e-4, atol=1e-5)


@recurrent
def test_whole_sequence_equals_step_by_step(slug, cls):
    module, x = layer(cls), torch.randn(2, 75, 32)
    state, steps = module.initial_state(x), []
    for t in range(75):
        y, state = module.step(x[:, t], state)
        steps.append(y)
    whole, end = module.scan(x, None, module.initial_state(x))
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=1e-3, atol=1e-5)
    for a, b in zip(state, end):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    first, middle = module.scan(x[:, :31], None, module.initial_state(x))
    second, _ = module.scan(x[:, 31:], None, middle)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-3, atol=1e-5)


@recurrent
def test_the_state_has_the_size_it_says(slug, cls):
    module = layer(cls)
    for length in (1, 50):
        x = torch.randn(3, length, 32)
        _, state = module.scan(x, None, module.initial_state(x))
        assert sum(t[0].numel() for t in state) == module.state_size(length)


@every
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_equals_generation_without(slug, cls, family, beams):
    model, report = swapped(slug, cls, family)
    assert report.changes or (family == "mixtral" and report.skips), "only a mixture of experts may be left alone, with a reason"
    inputs = {k: v for k, v in small.inputs_for(model).items() if k in ("input_ids", "attention_mask")}
    options = dict(max_new_tokens=6, do_sample=False, num_beams=beams, pad_token_id=0)
    cached = model.generate(**inputs, use_cache=True, **options)
    assert torch.equal(cached, model.generate(**inputs, use_cache=False, **options))


@every
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saved_and_loaded_it_is_bit_identical(slug, cls, family, tmp_path):
    model, _ = swapped(slug, cls, family)
    batch = small.inputs_for(model)
    expected = rooms.main(model, batch)
    assert torch.equal(rooms.main(copy.deepcopy(model), batch), expected)
    model.save_pretrained(tmp_path, variant="formulary")
    assert torch.equal(rooms.main(type(model).from_pretrained(tmp_path).eval(), batch), expected)


@every
def test_it_can_replace_only_some(slug, cls):
    model, report = swapped(slug, cls, "llama", targets=("model.layers.1.*",))
    assert [change.name.split(".")[2] for change in report.changes] == ["1"]
