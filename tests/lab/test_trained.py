"""The cache of trained models: one training per content, the same bits each time; and that the lab's models learn."""

import pytest
import torch
from torch import nn

from formulary import lab
from formulary.errors import FormularyError, UsageError
from formulary.lab import tasks, trained


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FORMULARY_CACHE", str(tmp_path))
    return tmp_path


def test_builds_once_for_each_key_and_source(empty_cache):
    calls = []

    def build():
        calls.append(1)
        return lab.tiny("llama", seed=3), {"loss": 1.5}

    first, second = (lab.cached("thing", build, key={"seed": 3}) for _ in range(2))
    assert len(calls) == 1 and first.lab_meta == second.lab_meta == {"loss": 1.5} and not first.training
    inputs = lab.inputs_for(first)
    with torch.no_grad():
        assert torch.equal(first(**inputs).logits, second(**inputs).logits)
        assert torch.equal(first(**inputs).logits, lab.tiny("llama", seed=3)(**inputs).logits)
    lab.cached("thing", build, key={"seed": 4})
    assert len(calls) == 2

    def build():
        calls.append(2)
        return lab.tiny("llama", seed=5)

    other = lab.cached("thing", build, key={"seed": 3})
    assert calls == [1, 1, 2] and other.lab_meta == {}
    with torch.no_grad():
        assert not torch.equal(first(**inputs).logits, other(**inputs).logits)
    assert not [p for p in empty_cache.rglob("*") if p.suffix in (".pt", ".bin", ".pkl")]


def test_a_plain_module_needs_make():
    def build():
        torch.manual_seed(0)
        return nn.Linear(2, 3)

    def make():
        return nn.Linear(2, 3)

    with pytest.raises(FormularyError, match="needs make="):
        lab.cached("plain", build, key={})
    before = torch.get_rng_state()
    first, second = (lab.cached("plain", build, key={}, make=make) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    torch.set_rng_state(before)


def test_refusals(empty_cache):
    def build():
        return lab.tiny("bert")

    with pytest.raises(UsageError, match="must be JSON"):
        lab.cached("thing", build, key={"x": torch.ones(1)})
    with pytest.raises(UsageError, match="source can be read"):
        lab.cached("thing", len, key={})
    lab.cached("thing", build, key={})
    (file,) = empty_cache.rglob("model.safetensors")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(FormularyError, match="delete it, and it is trained again"):
        lab.cached("thing", build, key={})


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_char_models_train_and_come_back(kind):
    options = {"layers": 1, "width": 32, "heads": 2, "kind": kind, "steps": 25}
    model = lab.trained_char_gpt(**options)
    again = lab.trained_char_gpt(**options)
    uniform = torch.tensor(float(len(tasks.characters()))).log()
    assert model.lab_meta["nats_per_character"] < uniform - 0.5
    ids = tasks.encode("And God said").unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_digit_vit_trains_and_reports_its_accuracy():
    model = lab.trained_digit_vit(layers=1, width=32, heads=2, steps=60)
    images, labels = (torch.from_numpy(part) for part in lab.digits("test"))
    with torch.no_grad():
        found = model(pixel_values=trained.digit_pixels(images)).logits.argmax(-1)
    assert model.lab_meta["accuracy"] == pytest.approx((found == labels).float().mean().item())
    assert model.lab_meta["accuracy"] > 0.2
