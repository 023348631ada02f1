"""`use` and `compare` end to end on tiny directories: the table, the files, and what comes back from them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import formulary
from formulary.contracts import edits
from formulary.errors import UsageError
from formulary.lab import small
from formulary.workshop import html, methods, tables
from formulary.workshop.comparing import Comparison
from formulary.workshop.measuring import Row
from formulary.workshop.quality import Quality
from tests.workshop.conftest import TEXT


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """One full run of `use`, measured and saved."""
    folder = tmp_path_factory.mktemp("use")
    data = folder / "data.txt"
    data.write_text(TEXT)
    outcome = formulary.use("gptq", source, data=data, out=folder / "out", bits=4, rounds=6)
    return outcome, folder / "out", source


def test_the_table_has_the_baselines_and_the_method(made):
    outcome, out, source = made
    assert [row.name for row in outcome.rows] == ["unchanged", "bf16", "gptq"]
    for row in outcome.rows:
        assert row.seconds > 0 and row.memory > 10e6 and row.disk > 0
        estimate, low, high = row.qualities[0].interval()
        assert low <= estimate <= high
    unchanged = outcome.rows[0]
    assert unchanged.qualities[0].interval()[0] == pytest.approx(1, abs=1e-6)
    assert unchanged.disk == (source / "model.safetensors").stat().st_size
    assert outcome.rows[2].disk == sum(f.stat().st_size for f in out.glob("*.safetensors"))
    assert outcome.rows[1].disk < 0.6 * unchanged.disk


def test_the_directory_is_complete(made):
    outcome, out, source = made
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "model.formulary.safetensors", "tokenizer.json", "LICENSE", "README.md", "formulary.json"} <= names
    facts = json.loads((out / "formulary.json").read_text())
    assert facts["method"] == "gptq" and facts["parameters"]["gptq"]["bits"] == 4
    assert [row["row"] for row in facts["table"]] == ["unchanged", "bf16", "gptq"]
    card = (out / "README.md").read_text()
    assert "| bf16 |" in card and "2210.17323" in card


def test_it_comes_back_bit_identically_by_both_doors(made):
    outcome, out, source = made
    from transformers import AutoModel

    batch = small.inputs_for(outcome.model)
    with torch.no_grad():
        expected = outcome.model(**batch).last_hidden_state
        for loaded in (formulary.load(out), AutoModel.from_pretrained(out).eval()):
            assert torch.equal(loaded(**batch).last_hidden_state, expected)
            assert edits.edits_of(loaded)


def test_a_result_can_be_used_again_with_another_method(made, tmp_path):
    outcome, out, source = made
    again = formulary.use("xattention", out, data=[f"word {i} in a line" for i in range(20)], out=tmp_path / "both", measure=False)
    loaded = formulary.load(tmp_path / "both")
    batch = small.inputs_for(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).last_hidden_state, again.model(**batch).last_hidden_state)
    assert {entry["cls"].split(":")[0] for entry in edits.edits_of(loaded)} == {"gptq", "xattention"}


def test_a_module_in_memory_stays_as_it_is():
    model = small.tiny("bert")
    batch = small.inputs_for(model)
    with torch.no_grad():
        before = model(**batch).last_hidden_state

    class Tokenizer:
        pad_token_id = 0

        def __call__(self, texts, **options):
            return {"input_ids": [[3 + (ord(c) % 90) for c in t][:20] for t in texts]}

    from formulary.workshop import applying, inputs

    train, _ = inputs.prepare([f"text number {i}" for i in range(12)], model, "encoder", Tokenizer())
    changed, reports = applying.apply_all(applying.plan("gptq+xattention", {"bits": 4}), model, train)
    with torch.no_grad():
        assert torch.equal(model(**batch).last_hidden_state, before)
    assert [r.method for r in reports] == ["gptq", "xattention"] and edits.edits_of(model) == []


def test_dry_run_computes_nothing(source, tmp_path):
    outcome = formulary.use("gptq", source, data=["a text of words"] * 9, out=tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists() and outcome.model is None
    assert any("12 linear layers" in note for note in outcome.notes)
    assert any("9 text" in note for note in outcome.notes)


def test_compare_measures_side_by_side_and_lists_refusals(source, text, tmp_path):
    found = formulary.compare(
        "gptq", "xattention", "gtp-vit", model=source, data=text, settings={"gptq.bits": 3}, rounds=6, out=tmp_path / "report"
    )
    assert [row.name for row in found.rows] == ["unchanged", "bf16", "gptq", "xattention"]
    assert list(found.refused) == ["gtp-vit"] and "does not support" in found.refused["gtp-vit"]
    assert set(found.ranks.values()) <= {1, 2, 3, 4} and 1 in found.ranks.values()
    assert found.front()
    page = (tmp_path / "report" / "report.html").read_text()
    assert "gptq" in page and "data:image/png" in page and "<script" not in page
    assert json.loads((tmp_path / "report" / "comparison.json").read_text())["refused"]


def test_training_free_means_every_method_of_the_kind_that_does_not_train(source, text, monkeypatch):
    asked = {}
    monkeypatch.setattr("formulary.workshop.using.open_session", lambda model, options, plans: asked.update(plans=plans) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        formulary.compare("llm-int8+deepspeed-inference", model=source, training_free=True, data=text)
    slugs = {plan.slug for plan in asked["plans"]}
    assert {"gptq", "llm-int8", "greenformers-lrt", "xattention", "optin"} <= slugs
    assert not {"minilm", "matformer", "gtp-vit", "gla", "vit-sam"} & slugs, "these train, or change another kind of model"
    assert "gtp-vit" in methods.training_free("vision")
    transforms = [plan.instance() for plan in asked["plans"] if plan.contract == "transform"]
    assert not any(getattr(method, "steps", 0) for method in transforms), "a method that takes steps trains"


@pytest.mark.parametrize(
    "losses, scale", [((3.0, 3.1, 18.0), "log"), ((3.0, 3.1, 3.2), "linear"), ((0.9, 0.8, -0.2), "linear")]
)
def test_qualities_that_lie_far_apart_are_drawn_on_a_logarithmic_axis(tmp_path, monkeypatch, losses, scale):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure.axes[0]))
    show, better = ("mean", "higher") if losses[0] < 1 else ("exp", "lower")
    rows = [Row(name, seconds=1.0, qualities=[Quality("q", np.array([x, x + 0.01]), better, show)]) for name, x in zip("abc", losses)]
    html.pareto_plot(Comparison("m", "d", rows, {}, {}, {}), tmp_path / "plot.png")
    assert drawn[0].get_yscale() == scale
    labels = [text.xyann[1] for text in drawn[0].texts]
    assert all(0 <= height <= 1 for height in labels) and len(set(labels)) == 3


def test_ties_share_a_rank():
    from formulary.evidence.timing import Timing
    from formulary.workshop.comparing import _ranks

    cpu = {"a": (1.0,) * 15, "b": (1.01,) * 15, "c": (2.0,) * 15}
    timing = Timing("a", cpu, cpu, dict.fromkeys(cpu, 1))
    assert _ranks([Row(n, seconds=timing.seconds(n)) for n in cpu], timing) == {"a": 1, "b": 1, "c": 3}


@pytest.mark.parametrize(
    "text_,kind,expected",
    [("3", int, 3), ("0.5", float, 0.5), ("yes", bool, True), ("none", int | None, None), ("64", int | None, 64), ("a, b", tuple[str, ...], ("a", "b"))],
)
def test_settings_are_read_as_their_types(text_, kind, expected):
    assert methods._convert("x", text_, kind) == expected


def test_a_setting_of_the_wrong_type_is_named():
    with pytest.raises(UsageError, match="x='many' is not a valid int"):
        methods._convert("x", "many", int)


def test_a_wide_table_is_turned():
    from formulary.workshop.measuring import Row

    rows = [Row(f"a rather long name {i}", seconds=0.1, decode_seconds=0.2, memory=10**9, disk=10**8) for i in range(3)]
    assert tables.as_text(rows[:1]).splitlines()[0].split()[0] == "CPU"
    turned = tables.as_text([Row("a name as long as a whole sentence could be, or longer " * 2, seconds=0.1), *rows]).splitlines()
    assert turned[2].startswith("CPU time per item") and "a rather long name 2" in turned[0]


def test_the_command_line_prints_the_table_or_json_and_exit_codes(source, text, tmp_path):
    call = lambda *args: subprocess.run([sys.executable, "-m", "formulary.cli", *map(str, args)], capture_output=True, text=True)
    done = call("use", "gptq", source, "--data", text, "--set", "bits=3", "--out", tmp_path / "out", "--rounds", "6", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["table"][2]["row"] == "gptq"
    again = call("use", "gptq", source, "--data", text, "--out", tmp_path / "out")
    assert again.returncode == 1 and again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
    wrong = call("use", "gptq", source, "--data", text, "--set", "bits=17")
    assert wrong.returncode == 2 and "bits" in wrong.stderr
