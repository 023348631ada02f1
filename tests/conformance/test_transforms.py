"""What holds for every transform, on tiny models of every kind that it supports."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers

import formulary  # noqa: F401  (registers the loader)
from formulary.contracts import edits, parts
from formulary.contracts.report import Report
from formulary.contracts.transform import refuse_nan
from formulary.errors import FormularyError
from formulary.lab import small
from tests.conformance import rooms

TRANSFORMS = rooms.implementing("transform")
CASES = [
    pytest.param(slug, cls, family, id=f"{slug}-{family}")
    for slug, cls in TRANSFORMS
    for family, kind in rooms.KIND.items()
    if kind in cls.supports
]
REFUSALS = [
    pytest.param(slug, cls, family, id=f"{slug}-{family}")
    for slug, cls in TRANSFORMS
    for family, kind in rooms.KIND.items()
    if kind not in cls.supports
]
every = pytest.mark.parametrize("slug,cls,family", CASES)


def applied(cls, family):
    """(model before, model after, report, batch), or the refusal of a model that this transform cannot change, as a string."""
    before = rooms.tiny(family)
    try:
        after, report = cls(**rooms.quick(cls)).apply(copy.deepcopy(before), rooms.data_for(before))
    except FormularyError as error:
        return str(error)
    return before, after.eval(), report, small.inputs_for(before)


_cache = {}


def cached(slug, cls, family):
    """One application per case, shared by the tests."""
    if (slug, family) not in _cache:
        _cache[slug, family] = applied(cls, family)
    return _cache[slug, family]


@pytest.fixture
def case(slug, cls, family):
    """(before, after, report, batch), or None where the method refuses this family of a kind that it supports, in one line."""
    found = cached(slug, cls, family)
    if isinstance(found, str):
        assert "\n" not in found and len(found) < 300
        return None
    before, after, report, batch = found
    return before, copy.deepcopy(after), report, batch


@pytest.mark.parametrize("slug,cls", TRANSFORMS, ids=[slug for slug, _ in TRANSFORMS])
def test_every_kind_it_supports_has_a_family_that_it_changes(slug, cls):
    for kind in cls.supports:
        found = [cached(slug, cls, family) for family in rooms.FAMILIES[kind]]
        assert not all(isinstance(f, str) for f in found), f"{kind}: {found}"


@every
def test_it_changes_something_and_says_what(case, slug, cls, family):
    if case is None:
        return
    before, after, report, batch = case
    assert report.coverage > 0 and report.method == slug
    assert report.headline.startswith(slug) and "\n" not in report.headline
    assert report.parameters == cls(**rooms.quick(cls)).parameters()


@every
def test_output_keys_and_shapes_stay(case, slug, cls, family):
    if case is None:
        return
    before, after, report, batch = case
    if type(after) is not type(before):
        assert "Classification" in type(after).__name__ and cls.trains
        return
    old, new = rooms.outputs(before, batch), rooms.outputs(after, batch)
    assert {k: v.shape for k, v in old.items()} == {k: v.shape for k, v in new.items()}
    assert all(torch.isfinite(v.float()).all() for v in new.values())


@every
def test_it_is_deterministic_under_a_seed(case, slug, cls, family):
    if case is None:
        return
    before, after, report, batch = case
    torch.manual_seed(123)
    again, _ = cls(**rooms.quick(cls)).apply(copy.deepcopy(before), rooms.data_for(before))
    assert torch.equal(rooms.main(again.eval(), batch), rooms.main(after, batch))


@every
def test_saved_and_loaded_it_is_bit_identical(case, slug, cls, family, tmp_path):
    if case is None:
        return
    before, after, report, batch = case
    edited = bool(edits.edits_of(after))
    after.save_pretrained(tmp_path, variant="formulary" if edited else None)
    loaded = type(after).from_pretrained(tmp_path).eval() if not edited else _auto(after).from_pretrained(tmp_path).eval()
    assert torch.equal(rooms.main(loaded, batch), rooms.main(after, batch))
    assert all(module._non_persistent_buffers_set <= _known_non_persistent(before) for module in after.modules())


def _auto(model):
    """transformers' own class, since an edited model keeps it."""
    return getattr(transformers, type(model).__name__)


def _known_non_persistent(model) -> set[str]:
    return set().union(*(module._non_persistent_buffers_set for module in model.modules()))


@every
def test_a_failing_apply_leaves_the_model_as_it_was(case, slug, cls, family, monkeypatch):
    if case is None:
        return
    before, after, report, batch = case
    model = copy.deepcopy(before)
    state, expected = rooms.state(model), rooms.main(model, batch)
    classes = {name: type(module) for name, module in model.named_modules()}
    calls = []

    def stop_at_the_last(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == len(report.changes):
            raise KeyboardInterrupt

    monkeypatch.setattr(Report, "changed", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        cls(**rooms.quick(cls)).apply(model, rooms.data_for(before))
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(rooms.main(model, batch), expected) and edits.edits_of(model) == []
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@every
def test_copies_are_independent(case, slug, cls, family):
    if case is None:
        return
    before, after, report, batch = case
    expected = rooms.main(after, batch)
    again = copy.deepcopy(after)
    with torch.no_grad():
        for tensor in [*after.parameters(), *after.buffers()]:
            tensor.zero_()
    assert torch.equal(rooms.main(again, batch), expected)


@every
def test_padding_does_not_change_real_tokens(case, slug, cls, family):
    if case is None or rooms.KIND[family] in ("vision", "encoder-decoder"):
        return
    before, after, report, batch = case
    if family == "gpt2" or not cls.shift_invariant:
        batch = dict(batch, position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0))
    real = batch["attention_mask"][0].bool()
    alone = {k: v[:1, real] for k, v in batch.items()}
    ours, theirs = rooms.main(after, batch)[0][real], rooms.main(after, alone)[0]
    scale = theirs.abs().max()
    assert (ours - theirs).abs().max() < 2e-3 * scale


@every
def test_generation_with_a_cache_equals_generation_without(case, slug, cls, family):
    if case is None or rooms.KIND[family] not in ("decoder", "encoder-decoder"):
        return
    before, after, report, batch = case
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    with_cache = after.generate(**inputs, use_cache=True, **options)
    assert torch.equal(with_cache, after.generate(**inputs, use_cache=False, **options))


@pytest.mark.parametrize("part", range(4))
def test_everything_compiles(part):
    """In a process of its own: the shape checks that tests run under are nothing that a user's `torch.compile` would see."""
    slugs = [slug for slug, _ in TRANSFORMS][part::4]
    command = [sys.executable, "-m", "tests.conformance.compiling", *slugs]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    differences = json.loads(done.stdout.splitlines()[-1])
    assert all(any(case.startswith(f"{slug}-") for case in differences) for slug in slugs)
    assert {case: d for case, d in differences.items() if not d < 1e-4} == {}


@every
def test_it_works_in_bfloat16(case, slug, cls, family):
    if case is None or family not in ("llama", "bert", "vit", "t5"):
        return
    before, after, report, batch = case
    model = copy.deepcopy(before).to(torch.bfloat16)
    data = rooms.data_for(before)
    half = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in batch.items()}
    data = type(data)(**{**vars(data), "items": [{k: v.bfloat16() if v.is_floating_point() else v for k, v in i.items()} for i in data.items]})
    after, _ = cls(**rooms.quick(cls)).apply(model, data)
    out = rooms.main(after.eval(), half)
    assert out.dtype == torch.bfloat16 and torch.isfinite(out.float()).all()


@pytest.mark.parametrize("slug,cls", TRANSFORMS, ids=[slug for slug, _ in TRANSFORMS])
def test_nan_weights_are_refused(slug, cls):
    family = next(f for f, kind in rooms.KIND.items() if kind in cls.supports)
    model = rooms.tiny(family)
    first = parts.linears(model)[0]
    with torch.no_grad():
        first.raw[0, 0] = float("nan")
    with pytest.raises(FormularyError, match="NaN or infinite"):
        cls(**rooms.quick(cls)).apply(model, rooms.data_for(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_weight_is_found_wherever_it_is(value, dtype):
    layer = torch.nn.Linear(9, 100).to(dtype)
    refuse_nan(layer)
    refuse_nan(torch.nn.Linear(2, 3, device="meta"))
    refuse_nan(torch.nn.ParameterList([torch.empty(0)]))
    with torch.no_grad():
        layer.weight[61, 5] = value
    with pytest.raises(FormularyError, match="weight body.weight has NaN or infinite"):
        refuse_nan(layer, "body")


@pytest.mark.parametrize("slug,cls,family", REFUSALS)
def test_other_kinds_get_a_one_line_refusal(slug, cls, family):
    model = rooms.tiny(family)
    with pytest.raises(FormularyError, match=f"{slug} does not support") as error:
        cls(**rooms.quick(cls)).apply(model, rooms.data_for(model))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("slug,cls", [t for t in TRANSFORMS if t[1].needs_data], ids=lambda v: v if isinstance(v, str) else "")
def test_missing_data_is_a_one_line_refusal(slug, cls):
    family = next(f for f, kind in rooms.KIND.items() if kind in cls.supports)
    with pytest.raises(FormularyError, match="needs data"):
        cls(**rooms.quick(cls)).apply(rooms.tiny(family), None)
