"""Methods joined by `+`: each result comes back from its directory and still generates, and an order without sense is refused."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import formulary
from formulary.contracts import edits
from formulary.errors import FormularyError
from formulary.lab import small

JOINED = {
    "greenformers-lrt+llm-int8": ("llama", {}),
    "gtp-vit+llm-int8": ("vit", {"tokens_per_layer": 1}),
    "matformer+gptq": ("llama", {"steps": 2, "bits": 4}),
    "fusegpt+llm-int8": ("llama", {"steps": 2, "group_size": 2, "prune_rate": 0.5}),
    "gptq+leanattention": ("llama", {"bits": 4}),
    "llm-int8+deepspeed-inference": ("llama", {}),
}
SENSELESS = ["gptq+llm-int8", "llm-int8+greenformers-lrt", "llm-int8+gptq"]


@pytest.fixture
def used(text_model, text, tmp_path):
    """`use` on a tiny model of a family, written to `tmp_path / "out"`."""

    def run(method, family, settings):
        model, data = (small.tiny("vit").eval(), None) if family == "vit" else (text_model, text)
        return formulary.use(method, model, data=data, out=tmp_path / "out", settings=settings, max_length=24, measure=False)

    return run


@pytest.mark.parametrize("method", JOINED)
def test_joined_methods_come_back_and_generate(method, used, tmp_path):
    family, settings = JOINED[method]
    made = used(method, family, settings)
    assert [report.method for report in made.reports] == method.split("+")
    assert all(report.changes for report in made.reports)
    auto = AutoModelForCausalLM if family == "llama" else AutoModel
    loaded, batch = auto.from_pretrained(tmp_path / "out").eval(), small.inputs_for(made.model)
    assert edits.edits_of(loaded) == edits.edits_of(made.model)
    with torch.no_grad():
        assert torch.equal(made.model(**batch)[0], loaded(**batch)[0])
    if family == "llama":
        ids = batch["input_ids"][:1]
        said = [model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for model in (made.model, loaded)]
        assert torch.equal(*said) and said[0].shape[1] == ids.shape[1] + 4


@pytest.mark.parametrize("method", SENSELESS)
def test_an_order_without_sense_is_refused_with_the_reason(method, used, tmp_path):
    first, second = method.split("+")
    with pytest.raises(FormularyError, match=f"{second} found nothing.*{first} has already replaced.*another order") as error:
        used(method, "llama", {})
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
