"""A result in a layout that transformers reads alone: loaded in a process without formulary, to the bit; what it cannot hold."""

import json
import os
import subprocess
import sys

import pytest
import torch

import formulary
from formulary.contracts import Data
from formulary.errors import FormularyError, UsageError
from formulary.lab import small
from formulary.papers.quantization._parts import words
from formulary.papers.quantization.gptq import GPTQ
from formulary.workshop import applying, formats

pytest.importorskip("compressed_tensors")

ALONE = """
import sys
import torch
from safetensors.torch import save_file
sys.modules["formulary"] = None  # importing it fails from here on
from transformers import AutoModelForCausalLM
ids = torch.arange(24).reshape(2, 12)
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        out = model(ids).logits
    weights = {name: module.weight.detach().contiguous() for name, module in model.named_modules() if name.endswith("_proj")}
    save_file({"logits": out, **weights}, directory + "/seen.safetensors")
"""
GRIDS = [(4, 16, False), (4, 16, True), (3, None, False), (2, 16, False), (8, 32, True), (5, None, True)]


@pytest.fixture(scope="module")
def loaded_alone(tmp_path_factory):
    """grid -> (our model, what a process without formulary saw of it)."""
    from safetensors.torch import load_file

    folder, made = tmp_path_factory.mktemp("formats"), {}
    for grid in GRIDS:
        model = small.tiny("llama")
        data = Data([{"input_ids": ids} for ids in small.inputs_for(model, batch=4)["input_ids"]])
        bits, group, symmetric = grid
        made[grid], _ = GPTQ(bits=bits, group_size=group, symmetric=symmetric).apply(model, data)
        formats.save(made[grid], folder / str(GRIDS.index(grid)))
    directories = [str(folder / str(i)) for i in range(len(GRIDS))]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", ALONE, *directories], env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    return {grid: (made[grid], load_file(f"{place}/seen.safetensors"), place) for grid, place in zip(GRIDS, directories)}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_transformers_alone_gives_our_weights_and_outputs_to_the_bit(loaded_alone, grid):
    model, seen, place = loaded_alone[grid]
    names = [name for name in seen if name != "logits"]
    assert len(names) == 14 and all(torch.equal(seen[name], model.get_submodule(name).weight) for name in names)
    with torch.no_grad():
        assert torch.equal(seen["logits"], model(torch.arange(24).reshape(2, 12)).logits)
    config = json.loads(open(f"{place}/config.json").read())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["ignore"] == ["lm_head"]


def test_the_model_in_memory_stays_as_it_was(loaded_alone):
    model = loaded_alone[GRIDS[0]][0]
    assert model.config.quantization_config.quant_method == "formulary" and model.hf_quantizer is not None


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_are_what_compressed_tensors_packs(bits):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(0, 2**bits, (5, 37), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    wanted = pack_to_int32((codes.short() - 2 ** (bits - 1)).to(torch.int8), bits)
    assert torch.equal(words(codes, bits), wanted)


def test_use_writes_it_and_says_how_to_load_it(text_model, text, tmp_path):
    out = tmp_path / "out"
    given = {"bits": 4, "group_size": 16, "max_length": 16, "measure": False}
    formulary.use("gptq", text_model, data=text, out=out, format="compressed-tensors", **given)
    assert {"model.safetensors", "config.json", "formulary.json", "tokenizer.json"} <= {file.name for file in out.iterdir()}
    card = (out / "README.md").read_text()
    assert "compressed-tensors" in card and "import formulary" not in card


@pytest.mark.parametrize(
    ("method", "given", "why"),
    [
        ("gptq", {"group_size": 24}, "not a multiple of group_size 24"),
        ("gptq", {"group_size": 16, "act_order": True}, "static_groups=true"),
        ("llm-int8", {}, "packed weights of one method alone"),
        ("gptq+llm-int8", {}, "packed weights of one method alone"),
    ],
)
def test_what_it_cannot_hold_is_refused_before_any_work(method, given, why, text_model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(applying, "apply_all", lambda *_: pytest.fail("work was done"))
    with pytest.raises(FormularyError, match=why) as refusal:
        formulary.use(method, text_model, data=text, out=tmp_path / "out", format="compressed-tensors", max_length=16, **given)
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()


def test_gpt2s_transposed_linears_and_experts_are_refused():
    for kind in ("gpt2", "mixtral"):
        with pytest.raises(FormularyError, match="it is not an nn.Linear"):
            formats.check("compressed-tensors", applying.plan("gptq", {}), small.tiny(kind))


def test_an_unknown_format_and_a_format_without_out_are_usage_errors(text_model):
    with pytest.raises(UsageError, match="did you mean 'compressed-tensors'"):
        formulary.use("gptq", text_model, format="compressed-tensor")
    with pytest.raises(UsageError, match="give --out too"):
        formulary.use("gptq", text_model, format="compressed-tensors")
