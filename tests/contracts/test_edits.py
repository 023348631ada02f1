"""Edits on eleven families: the identity is bit-identical, failure undoes, copies are independent, directories come back."""

import copy
import json

import pytest
import torch
import transformers
from torch import nn

import formulary  # noqa: F401  (registers the loader)
from formulary.contracts import edits, parts
from formulary.contracts.edits import BlockEdit, Replacement, editing
from formulary.errors import FormularyError
from formulary.lab import small

FAMILIES = ("llama", "qwen2", "gpt2", "opt", "mixtral", "bert", "albert", "vit", "dinov2", "t5", "bart")


class Identity(BlockEdit):
    pass


class Shift(BlockEdit):
    """Adds a constant at each of the three places where an edit may act."""

    def middle(self, hidden):
        return super().middle(hidden) + self.by

    def branch(self, hidden):
        return torch.full_like(hidden, self.by)

    def after(self, hidden):
        return super().after(hidden) + self.by


class Scaled(Replacement):
    """A linear with a learned scale and a buffer, to see both come back."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.register_buffer("scale", torch.randn(out_features))

    def forward(self, x):
        return nn.functional.linear(x, self.weight) * self.scale


edits.register("test:Identity", Identity)
edits.register("test:Shift", Shift)
edits.register("test:Scaled", Scaled)


def run(model, batch):
    with torch.no_grad():
        out = model(**batch)
    return out.logits if "logits" in out else out.last_hidden_state


@pytest.fixture(params=FAMILIES)
def case(request):
    model = small.tiny(request.param).eval()
    return model, small.inputs_for(model)


def apply(model, cls, **args):
    with editing(model, "test") as edit:
        for block in parts.blocks(model):
            edit.edit(block.name, cls, **args)


def test_the_identity_edit_is_bit_identical(case):
    model, batch = case
    before = run(model, batch)
    apply(model, Identity)
    assert torch.equal(run(model, batch), before)


def test_an_edit_acts_and_its_copy_is_independent(case):
    model, batch = case
    before = run(model, batch)
    apply(model, Shift, by=0.25)
    changed = run(model, batch)
    assert not torch.allclose(changed, before)
    again = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(run(again, batch), changed)


def test_save_and_load_through_transformers_is_bit_identical(case, tmp_path):
    model, batch = case
    apply(model, Shift, by=0.25)
    with editing(model, "test") as edit:
        part = parts.linears(model)[-1]
        if part.layout == "linear":
            edit.edit(part.name, Scaled, in_features=part.in_features, out_features=part.out_features)
    expected = run(model, batch)
    model.save_pretrained(tmp_path, variant="formulary")
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["model.formulary.safetensors"]
    auto = type(model)
    loaded = auto.from_pretrained(tmp_path).eval()
    assert torch.equal(run(loaded, batch), expected)
    assert edits.edits_of(loaded) == edits.edits_of(model)
    assert not hasattr(loaded.config, "transformers_weights")
    loaded.save_pretrained(tmp_path / "again", variant="formulary")
    twice = auto.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(run(twice, batch), expected)


def test_a_failure_undoes_everything(case):
    model, batch = case
    before, classes = run(model, batch), [type(module) for module in model.modules()]
    with pytest.raises(KeyboardInterrupt):
        with editing(model, "test") as edit:
            for block in parts.blocks(model):
                edit.edit(block.name, Shift, by=1.0)
                first = next(block.module.parameters())
                edit.set(first, torch.zeros_like(first))
            part = parts.linears(model)[0]
            if part.layout == "linear":
                edit.edit(part.name, Scaled, in_features=part.in_features, out_features=part.out_features)
            model.train()
            raise KeyboardInterrupt
    assert torch.equal(run(model, batch), before)
    assert [type(module) for module in model.modules()] == classes
    assert edits.edits_of(model) == [] and not model.training


def test_two_edits_stack_on_one_block(case):
    model, batch = case
    once, twice = copy.deepcopy(model), copy.deepcopy(model)
    apply(once, Shift, by=0.25)
    apply(twice, Identity)
    apply(twice, Shift, by=0.25)
    assert torch.equal(run(once, batch), run(twice, batch))
    with pytest.raises(FormularyError, match="already carries Shift"):
        apply(twice, Shift, by=0.25)


def test_a_machine_without_formulary_gets_no_file_instead_of_a_wrong_model(tmp_path):
    import subprocess
    import sys

    model = small.tiny("bert")
    apply(model, Identity)
    model.save_pretrained(tmp_path, variant="formulary")
    program = f"import transformers; transformers.AutoModel.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0 and "no file named model.safetensors" in done.stderr


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "encoder.layer.0", "cls": "os:system", "args": {}},
        {"name": "encoder.layer.0", "cls": "gptq:apply", "args": {}},
        {"name": "encoder.layer.9", "cls": "test:Identity", "args": {}},
        {"name": "encoder.layer.0.output.dense", "cls": "test:Scaled", "args": {"in_features": 64, "nonsense": 1}},
        {"name": "encoder.layer.0", "cls": "test:Identity"},
        {"name": 3, "cls": [], "args": {}},
    ],
)
def test_a_malformed_edit_in_a_file_is_a_one_line_error(entry, tmp_path):
    small.tiny("bert").save_pretrained(tmp_path, variant="formulary")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "formulary", "edits": [entry]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormularyError) as error:
        transformers.AutoModel.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_importing_formulary_first_or_last_registers_the_loader():
    import subprocess
    import sys

    check = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; assert 'formulary' in m, list(m)"
    for program in (f"import formulary; import transformers; {check}", f"import transformers; {check.replace('; assert', '; import formulary; assert')}"):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_importing_formulary_alone_imports_nothing_heavy():
    import subprocess
    import sys

    program = "import sys, formulary; print([m for m in ('torch', 'transformers', 'numpy', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"
