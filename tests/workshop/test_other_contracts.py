"""`use` for recipes, probes, studies, models, estimators and layers, each from data on disk to a directory that loads."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import formulary
from formulary.errors import FormularyError, UsageError
from formulary.lab import small


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of 16 x 16 images, a bright left half and a bright right half, with noise."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, bright in (("left", slice(0, 8)), ("right", slice(8, 16))):
        (folder / name).mkdir()
        for number in range(40):
            pixels = draw.integers(0, 90, (16, 16), dtype=np.uint8)
            pixels[:, bright] += 120
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def write_csv(path, heads, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([heads, *rows])
    return path


def facts(directory) -> dict:
    return json.loads((directory / "formulary.json").read_text())


def test_a_recipe_trains_beside_plain_training(pictures, tmp_path):
    model = small.tiny("vit")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    out = tmp_path / "out"
    outcome = formulary.use("vit-sam", model, data=pictures, out=out, steps=150, learning_rate=3e-3, rounds=6)
    assert [row.name for row in outcome.rows] == ["unchanged", "bf16", "plain training", "vit-sam"]
    accuracy = {row.name: next(q for q in row.qualities if "accuracy" in q.name).interval()[0] for row in outcome.rows}
    assert accuracy["vit-sam"] > 0.8 and accuracy["plain training"] > 0.8
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert "plain training" in outcome.headline
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(formulary.load(out)(images).logits, outcome.model(images).logits)
    assert facts(out)["parameters"]["vit-sam"]["rho"] == 0.1


def test_a_model_is_trained_judged_saved_and_loaded(pictures, tmp_path):
    out = tmp_path / "out"
    quick = {"layers": 1, "width": 32, "heads": 2, "hidden_channels": 16, "steps": 60, "learning_rate": 3e-3}
    outcome = formulary.use("cct", data=pictures, out=out, **quick)
    said = next(note for note in outcome.notes if note.startswith("held-out accuracy"))
    assert float(said.split()[2]) > 0.8 and "commonest class" in said
    images = torch.randn(3, 1, 16, 16)
    assert torch.equal(formulary.load(out).predict(images), outcome.model.predict(images))
    with pytest.raises(FormularyError, match="exists"):
        formulary.use("cct", data=pictures, out=out, **quick)


def test_a_generator_of_pairs_moves_samples_to_the_target(tmp_path):
    draw = np.random.default_rng(0)
    files = [write_csv(tmp_path / f"{shift}.csv", ["x", "y"], draw.normal(shift, 1, (400, 2)).tolist()) for shift in (0, 3)]
    outcome = formulary.use("lightsb", data=",".join(map(str, files)), out=tmp_path / "out", steps=300, learning_rate=1e-2, potentials=5)
    moved = formulary.load(tmp_path / "out").predict(torch.zeros(500, 2))
    assert (moved.mean(0) - 3).abs().max() < 1.0, outcome.notes


def test_an_estimator_forecasts_the_steps_that_follow(tmp_path):
    steps = np.arange(600)
    rows = [[np.sin(2 * np.pi * t / 24), np.cos(2 * np.pi * t / 24)] for t in steps]
    file = write_csv(tmp_path / "series.csv", ["sine", "cosine"], rows)
    outcome = formulary.use("ltsf-linear", data=file, out=tmp_path / "out", lookback=48, horizon=12, epochs=10, random_state=0)
    written = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    truth = np.sin(2 * np.pi * np.arange(600, 612) / 24)
    assert len(written) == 12 and np.abs([float(row["sine"]) for row in written] - truth).max() < 0.2
    ours, naive = (row["mean"] for row in outcome.reports[0].tables["held-out mean absolute error"])
    assert ours < naive / 3


def test_a_study_draws_its_figure_and_lists_its_functions(tmp_path):
    quick = {"d": 3, "prompt_lengths": (4, 8), "steps": 20, "batch": 64}
    outcome = formulary.use("one-step-gd-optimal-icl", out=tmp_path / "out", **quick)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "report.html" in names and any(name.endswith(".png") for name in names)
    assert outcome.reports[0].tables["functions"] and facts(tmp_path / "out")["contract"] == "study"


def test_a_probe_writes_its_tables_and_leaves_the_model(text_model, text, tmp_path):
    before = {path.name: path.read_bytes() for path in text_model.iterdir()}
    settings = {"lengths": (24,), "depths": (0.5,), "needles": 2, "recall": 0.0, "max_new_tokens": 4}
    formulary.use("retrieval-head", text_model, data=text, out=tmp_path / "out", settings=settings, max_length=32)
    assert (tmp_path / "out" / "report.html").exists()
    assert {path.name: path.read_bytes() for path in text_model.iterdir()} == before


def test_a_layer_is_swapped_in_distilled_and_comes_back(text_model, text, tmp_path):
    out = tmp_path / "out"
    outcome = formulary.use("gla", text_model, data=text, out=out, max_length=32, steps=10, learning_rate=1e-3, rounds=6)
    losses = outcome.reports[0].figures["training loss"]["y"]
    assert min(losses[-3:]) < losses[0]
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(formulary.load(out)(ids).logits, outcome.model(ids).logits)


@pytest.mark.parametrize(
    "method, model, options, match",
    [
        ("cct", "lab:vit", {}, "takes no model"),
        ("cct", None, {}, "needs --data"),
        ("vit-sam", None, {}, "needs a model"),
        ("retrieval-head", None, {}, "needs a model"),
        ("one-step-gd-optimal-icl", "lab:vit", {}, "takes no model"),
        ("lightsb", None, {"data": "one.csv"}, "two CSVs"),
        ("ltsf-linear", None, {"data": "nowhere.csv"}, "nowhere.csv"),
        ("cct+gptq", None, {}, "cannot be joined"),
    ],
)
def test_what_a_contract_cannot_take_is_refused_in_one_line(method, model, options, match):
    with pytest.raises((UsageError, FormularyError), match=match) as error:
        formulary.use(method, model, **options)
    assert "\n" not in str(error.value)
