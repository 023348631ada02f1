"""A streamed run gives the bits of one in memory, takes little memory, and goes on where it was killed or refuses."""

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
import transformers
from filelock import FileLock
from safetensors.torch import load_file, save_file

import formulary
from formulary.contracts import BlockTransform, Data, edits, parts
from formulary.contracts.blockwise import Blockwise, gram_bytes
from formulary.errors import FormularyError, UsageError
from formulary.lab import small
from formulary.papers.low_rank.greenformers_lrt.method import LowRankTransformer
from formulary.papers.quantization.gptq.method import GPTQ
from formulary.papers.quantization.llm_int8.method import LLMInt8
from formulary.workshop import journal, measuring, models, saving, streaming
from formulary.workshop.disk import DiskModel
from formulary.workshop.journal import MappedOutputs
from tests.conformance import rooms
from tests.workshop.conftest import save_with_tokenizer
from tests.workshop.killing import content, stream

BLOCKS = 28
LAST_BLOCK = ("model.layers.0.self_attn.k_proj", f"model.layers.{BLOCKS - 1}.self_attn.*")
LAYERWISE = [(slug, cls) for slug, cls in rooms.implementing("transform") if issubclass(cls, BlockTransform)]
CASES = [("gptq", GPTQ, family) for family in ("llama", "gpt2", "opt", "mixtral", "bert", "albert", "t5", "bart", "vit")]
CASES += [(slug, cls, family) for slug, cls in LAYERWISE if slug != "gptq" for family in ("llama", "bert")]
KILLS = [
    ("deeper", "gptq", ["step 4", "5 torn", "12 torn", "every 9", "random", "random", "random"]),
    ("t5", "gptq", ["step 13"]),
    ("albert", "gptq", ["step 7"]),
    ("bert", "random", ["step 3"]),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The directory of a tiny model of a family; "deeper" is a Llama of three blocks."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def directory(family: str):
        if family not in made:
            made[family] = folder / family
            model = small.tiny("llama" if family == "deeper" else family)
            if family == "deeper":
                model.config.num_hidden_layers = 3
                model = type(model)(model.config)
            model.save_pretrained(made[family])
        return made[family]

    return directory


def data_for(path) -> Data:
    """Texts (or images) of several lengths in batches of two."""
    return replace(rooms.data_for(models.skeleton(path), n=4), batch_size=2)


def assert_same(out, changed, report, streamed) -> None:
    """The directory holds the tensors, edits and facts of the model that was changed in memory, and the reports are equal."""
    loaded = models.load_directory(out)
    ours, theirs = loaded.state_dict(), changed.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    stored = [tensor for file in out.glob("*.safetensors") for tensor in load_file(file)]
    assert len(stored) == len(set(stored))
    assert edits.edits_of(loaded) == edits.edits_of(changed)
    assert json.loads(json.dumps(report.as_dict())) == streamed.as_dict() and streamed.headline == report.headline


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize("slug,cls,family", CASES, ids=[f"{slug}-{family}" for slug, _, family in CASES])
def test_streamed_and_in_memory_give_the_same_bits(saved, tmp_path, slug, cls, family):
    method = cls(**{name: value for name, value in rooms.quick(cls).items() if name != "steps"})
    path = saved(family)
    changed, report = method.apply(models.load_directory(path), data_for(path))
    streamed = stream(method, path, tmp_path / "out", data_for(path))
    assert_same(tmp_path / "out", changed, report, streamed)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "method",
    [
        GPTQ(targets=("lm_head", "model.layers.1.mlp.*")),
        LLMInt8(head=True),
        LowRankTransformer(start="random", ignore=("q_proj",)),
        GPTQ(bits=3, group_size=16, act_order=True),
    ],
    ids=["head and one block", "int8 head", "random factors", "order"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_heads_and_random_numbers(tmp_path, method, tied):
    model = small.tiny("llama")
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.bfloat16().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    changed, report = method.apply(models.load_directory(tmp_path / "model"), data_for(tmp_path / "model"))
    streamed = stream(method, tmp_path / "model", tmp_path / "out", data_for(tmp_path / "model"))
    assert_same(tmp_path / "out", changed, report, streamed)


def test_use_writes_the_same_directory_and_it_can_be_used_again(text_model, text, tmp_path):
    options = {"data": text, "max_length": 24, "batch_size": 3, "measure": False}
    formulary.use("gptq", text_model, out=tmp_path / "memory", **options)
    outcome = formulary.use("gptq", text_model, out=tmp_path / "streamed", stream=True, **options)
    assert outcome.model is None and any("streamed block by block from disk, 2 blocks" in note for note in outcome.notes)
    one, other = ({f.name: f for f in (tmp_path / name).iterdir()} for name in ("memory", "streamed"))
    weights = {name for name in other if ".safetensors" in name}
    assert len(weights) == 5 and "model.formulary.safetensors.index.json" in weights
    assert set(one) - {"model.formulary.safetensors"} == set(other) - weights
    assert all(one[name].read_bytes() == other[name].read_bytes() for name in ("generation_config.json", "tokenizer.json"))
    config, sharded = (json.loads(files["config.json"].read_text()) for files in (one, other))
    assert sharded["quantization_config"].pop("sharded") is True and sharded == config
    facts = json.loads(other["formulary.json"].read_text())
    assert facts["reports"][0]["headline"] == outcome.reports[0].headline
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "streamed").eval()
    batch = small.inputs_for(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, formulary.load(tmp_path / "memory")(**batch).logits)
    formulary.load(tmp_path / "streamed").save_pretrained(tmp_path / "resaved", variant="formulary")
    with torch.no_grad():
        assert torch.equal(formulary.load(tmp_path / "resaved")(**batch).logits, loaded(**batch).logits)
    again = formulary.use("xattention", tmp_path / "streamed", out=tmp_path / "both", **options)
    with torch.no_grad():
        assert torch.equal(formulary.load(tmp_path / "both")(**batch).logits, again.model(**batch).logits)
    formulary.use("llm-int8", tmp_path / "memory", out=tmp_path / "twice", stream=True, targets=("lm_head",), **options)
    made = {entry["cls"] for entry in edits.edits_of(formulary.load(tmp_path / "twice"))}
    assert made == {"gptq:PackedLinear", "llm-int8:Int8Linear"}


def test_it_measures_when_the_model_fits_and_says_so_when_not(text_model, text, tmp_path, monkeypatch):
    options = {"data": text, "max_length": 24, "rounds": 6}
    monkeypatch.setattr(measuring, "measure_memory", lambda *args: 10**8)
    outcome = formulary.use("llm-int8", text_model, out=tmp_path / "fits", stream=True, **options)
    row = outcome.rows[-1]
    assert [row.name for row in outcome.rows] == ["unchanged", "bf16", "llm-int8"]
    assert row.seconds > 0 and row.qualities and row.memory > 0 and row.run_memory > 0 and outcome.model is not None
    monkeypatch.setattr(streaming, "available_memory", lambda: 0)
    outcome = formulary.use("llm-int8", text_model, out=tmp_path / "tight", **options)
    assert any("streamed since" in note and "0 MB are free" in note for note in outcome.notes)
    assert any("quality were not measured" in note for note in outcome.notes)
    unchanged, half, row = outcome.rows
    assert row.disk == sum(f.stat().st_size for f in (tmp_path / "tight").glob("*.safetensors")) and row.run_memory > 0
    assert unchanged.disk > half.disk > 0 and row.seconds is None and not row.qualities
    assert "memory of the run" in str(outcome)
    with pytest.raises(UsageError, match="max_loss needs the quality measured"):
        formulary.use("llm-int8", text_model, out=tmp_path / "loss", max_loss=0.5, **options)


# ---------------------------------------------------------------- memory


def test_only_one_block_is_in_memory_and_none_is_kept_alive(saved, tmp_path, monkeypatch):
    alive, seen = [], []
    load = DiskModel.load

    def watched(disk, name, shard=None):
        gc.collect()
        seen.append([other for other, value in alive if value() is not None])
        load(disk, name, shard)
        alive.extend((name, weakref.ref(value)) for value in disk.model.get_submodule(name).parameters() if value.ndim > 1)

    monkeypatch.setattr(DiskModel, "load", watched)
    stream(GPTQ(bits=4), saved("llama"), tmp_path / "out", data_for(saved("llama")))
    assert len(seen) == 5 and not any(seen)  # two blocks to see their order, two to change them, the head


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_frugal_grams_are_the_same_and_hold_no_more_than_the_largest(family):
    model = small.tiny(family)
    data = replace(rooms.data_for(model, n=4), batch_size=2)
    walks = [Blockwise(model, data, frugal=frugal) for frugal in (False, True)]
    block = walks[0].blocks[0]
    here = [part for part in parts.linears(model) if part.name.startswith(f"{block.name}.")]
    largest = max(gram_bytes(part) for part in here)
    assert all(sum(map(gram_bytes, group)) <= largest for group in walks[1]._passes(here))
    assert len(walks[1]._passes(here)) < len(here) and len(walks[0]._passes(here)) == 1
    for (part, grams), (other, frugal) in zip(*(walk.grams(block, here) for walk in walks), strict=True):
        assert part is other and len(grams) == len(frugal) == max(1, part.experts)
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(grams, frugal))


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A Llama of 400 MB in 28 blocks, and one of two tiny ones."""
    folder = tmp_path_factory.mktemp("big")
    save_with_tokenizer("llama", folder / "small")
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=768, intermediate_size=2048, num_hidden_layers=BLOCKS, num_attention_heads=12,
        tie_word_embeddings=False, max_position_embeddings=64, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder / "model")
    for file in (folder / "small").glob("token*"):
        (folder / "model" / file.name).write_bytes(file.read_bytes())
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in transformers.LlamaForCausalLM(config).state_dict().items()}
    pool, homes = torch.randn(2048 * 768).mul(0.02).bfloat16(), {}
    for number in range(BLOCKS + 1):
        here = [name for name in shapes if name.startswith(f"model.layers.{number}.")] or [n for n in shapes if "layers" not in n]
        made = {name: pool[: shapes[name].numel()].roll(7 * len(homes)).view(shapes[name]).clone() for name in here}
        save_file(made, folder / "model" / f"part-{number}.safetensors", {"format": "pt"})
        homes |= dict.fromkeys(here, f"part-{number}.safetensors")
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    return folder


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the process's memory from /proc")
def test_a_model_several_times_larger_than_the_memory_allowed(big, text, tmp_path):
    size = sum(file.stat().st_size for file in (big / "model").glob("*.safetensors"))
    program = [sys.executable, "-m", "tests.workshop.capped", big / "small", big / "model", text, tmp_path / "out", "120"]
    done = subprocess.run(list(map(str, program)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert size > 390e6 and found["grown"] < size / 3.5
    assert any("streamed since" in note for note in found["notes"])
    assert "allocate" in found["refused"] or "MemoryError" in found["refused"], "the cap must be one that a run in memory meets"


# ---------------------------------------------------------------- killed and finished


@pytest.fixture(scope="module")
def killed(saved, tmp_path_factory):
    """What became of runs that were killed and repeated, for each of `KILLS`; in one process, since imports take longest."""
    jobs = [(method, str(saved(family)), str(tmp_path_factory.mktemp(family)), moments) for family, method, moments in KILLS]
    done = subprocess.run([sys.executable, "-m", "tests.workshop.killing", json.dumps(jobs)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("number", range(len(KILLS)), ids=[f"{family}-{method}" for family, method, _ in KILLS])
def test_killed_at_any_moment_and_rerun_it_ends_with_the_same_bytes(killed, number):
    assert killed[number]["calls"] > 15 and killed[number]["failures"] == []


class Stopped(BaseException):
    """Stands for Ctrl-C or a crash in the middle of a run."""


@pytest.fixture
def stopped(text_model, text, tmp_path, monkeypatch):
    """An unfinished run of `use` with its first block done: (options, out)."""
    options = {"data": text, "max_length": 24, "batch_size": 3, "measure": False, "stream": True, "bits": 4}
    with monkeypatch.context() as patch:
        run_block = GPTQ.run_block
        patch.setattr(GPTQ, "run_block", lambda self, block, *more: _stop() if block.index else run_block(self, block, *more))
        with pytest.raises(Stopped):
            formulary.use("gptq", text_model, out=tmp_path / "out", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.txt", "out.partial"]
    return options, tmp_path / "out"


def _stop():
    raise Stopped


def test_a_stopped_run_goes_on_and_says_so(stopped, text_model, tmp_path):
    options, out = stopped
    outcome = formulary.use("gptq", text_model, out=out, **{**options, "stream": None})
    assert any("to go on with" in note for note in outcome.notes)
    assert "1 of 2 blocks had been finished by an earlier run" in outcome.notes
    formulary.use("gptq", text_model, out=tmp_path / "whole", **options)
    assert content(out) == content(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.txt", "out", "whole"]


@pytest.mark.parametrize("what", ["parameter", "target", "data", "batch", "threads", "model", "dtype", "code", "version"])
def test_what_would_change_the_bits_is_refused_and_nothing_is_lost(stopped, text_model, text, tmp_path, what, monkeypatch):
    options, out = stopped
    kept, model, more, match = content(saving.partial(out)), text_model, {}, what
    if what == "parameter":
        more, match = {"bits": 3}, r"bits \(4, now 3\)"
    elif what == "target":
        more, match = {"targets": ("q_proj",)}, r"targets \(\[\], now \['q_proj'\]\)"
    elif what == "data":
        text.write_text(text.read_text() + "\n\nAnother line of the word.")
    elif what == "batch":
        more, match = {"batch_size": 2}, r"batch size \(3, now 2\)"
    elif what == "threads":
        torch.set_num_threads(2)
        match = r"threads \(1, now 2\)"
    elif what == "model":
        model = shutil.copytree(text_model, tmp_path / "model")
        os.utime(model / "model.safetensors", (1, 1))
    elif what == "dtype":
        more, match = {"dtype": "bfloat16"}, r"dtype \(torch.float32, now torch.bfloat16\)"
    elif what == "code":
        monkeypatch.setattr(journal, "_sources", lambda cls: [text])
        match = "source code"
    elif what == "version":
        monkeypatch.setattr(journal, "__version__", "9.9")
        match = r"formulary \(.*, now 9.9\)"
    with pytest.raises(FormularyError, match=f"holds an unfinished run with other .*{match}.*delete") as error:
        formulary.use("gptq", model, out=out, **{**options, **more})
    assert "\n" not in str(error.value) and content(saving.partial(out)) == kept and not out.exists()


def test_deleting_what_is_left_starts_over(stopped, text_model, tmp_path):
    options, out = stopped
    shutil.rmtree(saving.partial(out))
    formulary.use("gptq", text_model, out=out, **{**options, "bits": 3})
    assert json.loads((out / "formulary.json").read_text())["parameters"]["gptq"]["bits"] == 3


def test_two_runs_at_once(stopped, text_model):
    options, out = stopped
    with FileLock(saving.partial(out) / "lock"), pytest.raises(FormularyError, match="is in use: another run is making"):
        formulary.use("gptq", text_model, out=out, **options)


@pytest.mark.parametrize("damage", ["other", "torn", "journal"])
def test_what_was_kept_is_damaged(stopped, text_model, damage):
    options, out = stopped
    file = next((saving.partial(out) / "activations").glob("*-00001.safetensors"))
    if damage == "other":
        save_file({"0": torch.zeros(1)}, file, {"block": "model.layers.1", "nest": '{"tensor": "0"}'})
    elif damage == "torn":
        file.write_bytes(file.read_bytes()[:50])
    else:
        journal_file = saving.partial(out) / "journal.jsonl"
        journal_file.write_bytes(journal_file.read_bytes().replace(b'"sequential"', b'"sequen\n'))
    with pytest.raises(FormularyError, match="does not fit the journal|is damaged") as error:
        formulary.use("gptq", text_model, out=out, **options)
    assert "\n" not in str(error.value) and not out.exists()
    if damage == "journal":
        shutil.rmtree(saving.partial(out))
    formulary.use("gptq", text_model, out=out, **options)
    assert out.exists()


@pytest.mark.parametrize("after", [1, 4, 9, 12])
def test_a_full_disk_keeps_what_was_done(text_model, text, tmp_path, monkeypatch, after):
    options = {"data": text, "max_length": 24, "measure": False, "stream": True}
    written = []

    def full(*args, **kwargs):
        written.append(args)
        if len(written) >= after:
            raise OSError(28, "No space left on device")
        return save_file(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_file", full)
        with pytest.raises(FormularyError, match="disk is full; make room and repeat the call") as error:
            formulary.use("gptq", text_model, out=tmp_path / "out", **options)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    formulary.use("gptq", text_model, out=tmp_path / "out", **options)
    formulary.use("gptq", text_model, out=tmp_path / "whole", **options)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_room_for_the_activations_is_asked_for_before_any_work(text_model, text, tmp_path, monkeypatch):
    size = sum(file.stat().st_size for file in text_model.glob("*.safetensors"))
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: type("U", (), {"free": size + 1000})())
    with pytest.raises(FormularyError, match="are needed and 0 MB are free"):
        formulary.use("gptq", text_model, out=tmp_path / "out", data=text, stream=True, max_length=24, measure=False)
    assert [p.name for p in tmp_path.iterdir()] == ["data.txt"]


# ---------------------------------------------------------------- refusals and what is said


@pytest.mark.parametrize("damage", ["nan", "missing", "shape"])
def test_a_damaged_model_is_refused_and_nothing_is_left(text_model, text, tmp_path, damage):
    model = shutil.copytree(text_model, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "nan":
        weights[name][0, 0] = float("nan")
    elif damage == "missing":
        del weights[name]
    else:
        weights[name] = weights[name][:-1].clone()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    match = {"nan": f"weight {name} has NaN", "missing": "is incomplete", "shape": "cannot be loaded as LlamaForCausalLM"}[damage]
    with pytest.raises(FormularyError, match=match) as error:
        formulary.use("gptq", model, out=tmp_path / "out", data=text, stream=True, max_length=24, measure=False)
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.txt", "model"]


def test_what_cannot_be_streamed_is_refused(text_model, text, tmp_path):
    options = {"data": text, "out": tmp_path / "out", "stream": True, "measure": False, "max_length": 24}
    for method, model, more, match in (
        ("xattention", text_model, {}, "xattention with these settings works on the whole model at once"),
        ("gptq+llm-int8", text_model, {}, "one method at a time"),
        ("gptq", small.tiny("llama"), {}, "the model is in memory already"),
        ("greenformers-lrt", text_model, {"steps": 2}, "works on the whole model at once"),
        ("gptq", text_model, {"out": None}, "needs --out"),
        ("quan", text_model, {}, "not a method that works on one block at a time"),
    ):
        if method == "quan":
            method = next(slug for slug, _ in rooms.implementing("recipe"))
        with pytest.raises(UsageError, match=match) as error:
            formulary.use(method, model, **{**options, **more})
        assert "\n" not in str(error.value)
    with pytest.raises(FormularyError, match="found nothing to change"):
        formulary.use("gptq", text_model, **options, ignore=("*",))
    assert [p.name for p in tmp_path.iterdir()] == ["data.txt"]


def test_a_run_in_memory_for_which_there_may_be_too_little_says_so(text_model, text, monkeypatch):
    monkeypatch.setattr(streaming, "available_memory", lambda: 0)
    outcome = formulary.use("llm-int8", text_model, data=text, max_length=24, measure=False)
    assert any("but the model was not streamed: from disk to disk needs --out" in note for note in outcome.notes)


def test_dry_run_prints_the_memory_map_and_the_peak(text_model, text, tmp_path):
    call = [sys.executable, "-m", "formulary.cli", "use", "gptq", text_model, "--data", text, "--out", tmp_path / "out"]
    call += ["--stream", "--dry-run", "--max-length", "24", "--samples", "8", "--batch-size", "2"]
    done = subprocess.run(list(map(str, call)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = next(line for line in done.stdout.splitlines() if "would be streamed as asked" in line)
    assert "0.0 MB of activations in memory-mapped files" in said and 100 < int(said.split("about ")[1].split()[0]) < 2000
    assert [p.name for p in tmp_path.iterdir()] == ["data.txt"]


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "vit", "albert"])
def test_what_dry_run_says_of_the_map_is_what_the_files_hold(saved, tmp_path, family, monkeypatch):
    sizes = []
    monkeypatch.setattr(DiskModel, "drop_rest", lambda disk: sizes.append(saved_sizes(tmp_path)))
    path, method = saved(family), GPTQ(bits=4)
    stream(method, path, tmp_path / "out", data_for(path))
    said, sizes = streaming.activation_bytes(models.skeleton(path), method, data_for(path)), sizes[0]
    if family == "albert":  # one block that the model calls twice: nothing is kept between blocks
        assert sum(sizes) == said == 0
    else:
        assert said <= sum(sizes) <= (said + 500 * len(sizes)) * (1 if family != "t5" else 3)


def saved_sizes(folder) -> list[int]:
    return [file.stat().st_size for file in folder.glob("out.partial/activations/*")]


def test_nested_outputs_come_back_as_they_were(tmp_path):
    outputs = MappedOutputs(tmp_path / "kept", torch.device("cpu"))
    block = parts.blocks(small.tiny("t5"))[0]
    nest = (torch.randn(3, 4).mT.bfloat16(), None, [torch.arange(3), True, 2.5], (torch.tensor(1.0),))
    outputs.put(block, 7, nest)
    found = outputs.get(block.stack, 7)
    assert torch.equal(found[0], nest[0]) and found[0].is_contiguous() and found[0].dtype == torch.bfloat16
    assert found[1] is None and torch.equal(found[2][0], nest[2][0]) and found[2][1:] == [True, 2.5]
    assert isinstance(found, tuple) and isinstance(found[2], list) and found[3][0].shape == ()
    assert outputs.has(block, 7) and not outputs.has(block, 6) and outputs.origin(block.stack, 7) == block.name
    with pytest.raises(FormularyError, match="gives a dict"):
        outputs.put(block, 7, {"a": 1})
