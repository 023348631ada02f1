"""The probe contract: whatever a probe does to a model, the model is what it was."""

from dataclasses import dataclass

import pytest
import torch

from formulary.contracts import Probe
from formulary.lab.small import inputs_for, tiny


@dataclass(frozen=True, kw_only=True)
class Careless(Probe):
    """Leaves hooks, a training mode, another attention implementation and transformers' own hooks behind."""

    fail: bool = False

    def look(self, model, data, report):
        model.register_forward_hook(lambda module, args, output: None)
        model.register_forward_pre_hook(lambda module, args: None)
        model.set_attn_implementation("eager")
        report.tables["seen"] = [{"layers": len(model(**inputs_for(model), output_attentions=True).attentions)}]
        model.train()
        torch.rand(5)
        if self.fail:
            raise KeyError("fail")


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("kind", ["llama", "bert", "vit"])
def test_nothing_is_left_behind(kind, fail):
    model = tiny(kind)
    state, implementation = torch.get_rng_state(), model.config._attn_implementation
    for _ in range(2):
        if fail:
            with pytest.raises(KeyError):
                Careless(fail=True).run(model)
        else:
            assert Careless().run(model).tables["seen"] == [{"layers": 2}]
    assert not any(module._forward_hooks or module._forward_pre_hooks or module.training for module in model.modules())
    assert model.config._attn_implementation == implementation and torch.equal(torch.get_rng_state(), state)


def test_attention_weights_can_still_be_asked_for():
    model = tiny("llama")
    model.set_attn_implementation("eager")
    Careless().run(model)
    assert len(model(**inputs_for(model), output_attentions=True).attentions) == 2
