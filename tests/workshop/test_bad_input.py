"""Every kind of bad input gets a one-line error that names it, and nothing is lost or left behind."""

import json
import signal
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import formulary
from formulary.errors import FormularyError, UsageError
from formulary.lab import small
from formulary.workshop import inputs, models, saving

def assert_refused(match, *args, kind=FormularyError, **options):
    """The call is refused in one line that matches, and the directory it ran in holds what it held."""
    with pytest.raises(kind, match=match) as error:
        formulary.use(*args, measure=False, **options)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the model


def test_a_pickle_instead_of_safetensors(directory):
    torch.save({}, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    assert_refused("pickled weights .pytorch_model.bin.", "xattention", directory)


@pytest.mark.parametrize("where", ["top", "nested"])
def test_remote_code(directory, where):
    config = json.loads((directory / "config.json").read_text())
    (config if where == "top" else config.setdefault("inner", {}))["auto_map"] = {"AutoModel": "evil.Model"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "evil.py").write_text("raise SystemExit('ran')")
    assert_refused("remote code", "xattention", directory)


@pytest.mark.parametrize("damage", ["truncated", "header", "longer", "empty"])
def test_a_damaged_safetensors_file(directory, damage):
    file = directory / "model.safetensors"
    data = file.read_bytes()
    changed = {"truncated": data[:-100], "header": struct.pack("<Q", 1 << 60) + data[8:], "longer": data + b"x", "empty": b""}
    file.write_bytes(changed[damage])
    assert_refused("model.safetensors is truncated or corrupt", "xattention", directory)


def test_a_config_that_is_not_json_or_missing(directory):
    (directory / "config.json").write_text("{")
    assert_refused("config.json is not valid JSON", "xattention", directory)
    (directory / "config.json").unlink()
    assert_refused("no config.json", "xattention", directory)


def test_a_missing_tokenizer(directory, text):
    for file in directory.glob("token*"):
        file.unlink()
    assert_refused("no tokenizer", "xattention", directory, data=text)


def test_a_missing_shard_and_a_shard_outside(directory):
    (directory / "model.safetensors").rename(directory / "part.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert_refused("gone.safetensors, which is missing", "xattention", directory)
    index.write_text(json.dumps({"weight_map": {"a": "../part.safetensors"}}))
    assert_refused("outside the model directory", "xattention", directory)


def test_a_kind_that_the_method_does_not_support(directory, text):
    assert_refused("gtp-vit does not support an encoder model", "gtp-vit", directory, data=text)


def test_nan_weights(directory, text):
    weights = load_file(directory / "model.safetensors")
    weights["encoder.layer.0.attention.self.query.weight"][0, 0] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    assert_refused("NaN or infinite", "gptq", directory, data=text)
    assert_refused("NaN or infinite", "xattention", directory, data=text)


def test_no_model_at_all(tmp_path):
    assert_refused("no model directory at", "xattention", str(tmp_path / "nowhere"))
    assert_refused("needs a model", "xattention", kind=UsageError)
    assert_refused("no lab model 'minilmm'.*minilm", "xattention", "lab:minilmm", kind=UsageError)


# ---------------------------------------------------------------- the method


@pytest.mark.parametrize(
    "method,options,match",
    [
        ("gtpq", {}, "gtpq.*did you mean.*gptq"),
        ("gptq", {"bist": 3}, "no parameter 'bist'.*bits"),
        ("gptq", {"bits": 0}, "bits"),
        ("gptq", {"bits": 17}, "bits"),
        ("gptq", {"settings": {"bits": "three"}}, "bits='three' is not a valid int"),
        ("gptq+gptq", {}, "same method twice"),
        ("gptq+", {}, "no method"),
        ("palm-2", {}, "card only"),
        ("gptq+cct", {}, "cannot be joined"),
        ("xattention", {"strid": 4}, "no parameter 'strid'.*stride"),
    ],
)
def test_an_unknown_method_or_parameter(source, method, options, match):
    assert_refused(match, method, source, kind=UsageError, **options)


def test_a_target_that_matches_nothing(source, text):
    assert_refused("targets 'qeury' matches nothing.*query", "gptq", source, data=text, targets=("qeury",), kind=UsageError)
    assert_refused("ignore 'nothing-like-it' matches nothing", "xattention", source, data=text, ignore=("nothing-like-it",), kind=UsageError)


# ---------------------------------------------------------------- the data


@pytest.mark.parametrize(
    "name,content,match",
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n \n", "holds no text"),
        ("binary.txt", b"\x00\x01\x02\xff" * 100, "is binary"),
        ("latin.txt", "caf\xe9".encode("latin1") * 50, "not UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
        ("fields.csv", b"a,b\n1,2\n", None),
        ("one.txt", b"only one line", "too few"),
    ],
)
def test_unusable_data(source, tmp_path, name, content, match):
    file = tmp_path / name
    file.write_bytes(content)
    if match is None:
        assert_refused("no field 'label'", "gptq", source, data=file, labels="label", kind=UsageError)
    else:
        assert_refused(match, "gptq", source, data=file)


def test_data_shorter_than_one_sequence(tmp_path):
    model = small.tiny("llama")

    class Tokenizer:
        eos_token_id, pad_token_id = 2, 0

        def __call__(self, texts, **options):
            return {"input_ids": [[3] * len(t.split()) for t in texts]}

    with pytest.raises(FormularyError, match="fewer than one sequence of 512"):
        inputs.prepare(["a b c"] * 10, model, "decoder", Tokenizer())


def test_missing_or_wrong_data(source, tmp_path):
    assert_refused("no data at", "gptq", source, data=tmp_path / "nowhere.txt")
    assert_refused("needs data", "gptq", source)
    assert_refused("holds images, but this encoder model reads text", "gptq", source, data=[torch.zeros(3, 8, 8)] * 8)
    assert_refused("data is empty", "gptq", source, data=[])


# ---------------------------------------------------------------- the output


def test_out_that_exists_or_cannot_be_written(source, text, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert_refused("exists", "gptq", source, data=text, out=out)
    assert (out / "mine.txt").read_text() == "precious"
    file = tmp_path / "file"
    file.write_text("x")
    assert_refused("cannot be written", "gptq", source, data=text, out=file / "inside")


def test_a_full_disk_leaves_nothing(source, text, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_facts", full)
    assert_refused("disk is full; nothing was written", "gptq", source, data=text, out=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.txt"]


def test_too_little_space_is_seen_before_any_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: type("U", (), {"free": 10})())
    assert_refused("are needed and 0 MB are free", "gptq", source, data=tmp_path / "never-read.txt", out=tmp_path / "out")


def test_max_loss_refuses_and_writes_nothing(source, text, tmp_path):
    with pytest.raises(FormularyError, match="more than --max-loss"):
        formulary.use("gptq", source, data=text, bits=2, out=tmp_path / "out", max_loss=1e-9, rounds=6)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_killed_at_any_moment_nothing_half_made_is_left(source, text, tmp_path, stop):
    """Ctrl-C removes everything at once; after a kill the next run sweeps up and ends as if nothing had happened."""
    out = tmp_path / "results" / "out"
    program = (
        "import time, sys, formulary\nfrom formulary.workshop import saving\nreal = saving.write_facts\n"
        "def slow(*a):\n    real(*a); print('staged', flush=True); time.sleep(60)\n"
        "saving.write_facts = slow\n"
        f"formulary.use('gptq', {str(source)!r}, data={str(text)!r}, out={str(out)!r}, measure=False)"
    )
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background ignores Ctrl-C
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL, preexec_fn=heard
    )
    assert process.stdout.readline().strip() == "staged"
    process.send_signal(stop)
    process.wait(30)
    assert not out.exists()
    if stop == signal.SIGINT:
        assert list(out.parent.iterdir()) == []
    formulary.use("gptq", source, data=text, out=out, measure=False)
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert models.load(out) is not None


def test_the_source_is_never_changed(source, text, tmp_path):
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in source.iterdir()}
    formulary.use("gptq", source, data=text, out=tmp_path / "out", measure=False)
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in source.iterdir()} == before
