"""The index file: built once, refreshed when a card or a record changes, never a reason to fail."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from formulary.catalogue import _card, _find, _index, find, record
from formulary.errors import FormularyError

RECORD = {
    "slug": "gptq",
    "verdict": "holds here",
    "headline": "holds here: gptq / rtn excess loss 0.55",
    "reasons": [],
    "claim": "Much less loss than rounding.",
    "version": 2,
    "seeds": [0, 1, 2, 3, 4, 5, 6, 7],
    "date": "2026-11-21",
    "predicates": [
        {"of": "gptq / rtn excess loss", "estimate": 0.55, "low": 0.5, "high": 0.6, "verdict": "holds here", "sentence": "gptq / rtn excess loss 0.55 [0.5, 0.6], predicted <= 0.7"}
    ],
    "null": {"verdict": "does not hold here", "how": "rtn rerun", "predicates": []},
    "oracle": {"verdict": "holds here", "how": "unquantized", "predicates": []},
    "arms": {"gptq": {"excess loss": [[0.1] * 50] * 8}},
}


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A small house of three cards with its own cache; the packaged index is out of the way."""
    papers = tmp_path / "papers"
    for slug in ("gptq", "swin", "palm-2"):
        card = _find.card(slug)
        shutil.copytree(_card.PAPERS / card.family / card.room, papers / card.family / card.room, ignore=shutil.ignore_patterns("*.py", "record.json"))
    monkeypatch.setattr(_index, "PAPERS", papers)
    monkeypatch.setattr(_index, "PACKAGED", tmp_path / "index.json")
    monkeypatch.setenv("FORMULARY_CACHE", str(tmp_path / "cache"))
    _index.load.cache_clear()
    yield papers
    _index.load.cache_clear()


def reload() -> dict:
    _index.load.cache_clear()
    return _index.load()


def test_the_index_is_cached_and_read_again(house, monkeypatch):
    first = reload()
    assert first["slugs"] == ["gptq", "palm-2", "swin"]
    monkeypatch.setattr(_index, "build", lambda papers: pytest.fail("built again without a change"))
    assert reload() == first


def test_a_changed_card_a_new_record_and_a_removed_card_are_seen(house):
    assert reload()["records"] == {}
    (house / "quantization/gptq/record.json").write_text(json.dumps(RECORD))
    assert reload()["records"]["gptq"]["verdict"] == "holds here"
    assert [hit.card.slug for hit in find(verdict="holds here")] == ["gptq"]
    path = house / "quantization/gptq/card.toml"
    path.write_text(path.read_text("utf8").replace("GPTQ: Accurate", "GPTX: Accurate"), "utf8")
    assert reload()["cards"][0]["title"].startswith("GPTX")
    path.unlink()
    assert reload()["slugs"] == ["palm-2", "swin"]


def test_the_packaged_index_serves_until_something_changes(house, monkeypatch):
    _index.PACKAGED.write_text(_index.dump(_index.build(house)), "utf8")
    with monkeypatch.context() as patched:
        patched.setattr(_index, "build", lambda papers: pytest.fail("built although packaged"))
        assert reload()["slugs"] == ["gptq", "palm-2", "swin"]
    path = house / "quantization/gptq/record.json"
    path.write_text(json.dumps(RECORD))
    assert "gptq" in reload()["records"]
    _index.PACKAGED.write_text(_index.dump(_index.build(house)), "utf8")
    path.write_text(json.dumps(RECORD).replace("2026-11-21", "2026-11-22"))
    later = os.stat(_index.PACKAGED).st_mtime + 1000
    os.utime(path, (later, later))
    assert reload()["records"]["gptq"]["date"] == "2026-11-22"


@pytest.mark.parametrize("damage", ["", "{", '{"fingerprint":"0"}', "cut", "\x00\x01"])
def test_a_damaged_cache_is_built_again(house, damage):
    expected = reload()
    place = _index._cache_file()
    text = place.read_text("utf8")
    place.write_text(text[: len(text) // 2] if damage == "cut" else damage, "utf8")
    assert reload() == expected
    assert place.read_text("utf8") == text


def test_a_cache_that_cannot_be_written_is_no_failure(house, monkeypatch, tmp_path):
    blocked = tmp_path / "a-file"
    blocked.write_text("")
    monkeypatch.setenv("FORMULARY_CACHE", str(blocked / "below"))
    assert reload()["slugs"] == ["gptq", "palm-2", "swin"]

    def refuse(path, content):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("FORMULARY_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr("formulary.files.write_atomic", refuse)
    assert reload()["slugs"] == ["gptq", "palm-2", "swin"]
    assert not list((tmp_path / "other").rglob("*.json"))


def test_processes_that_start_together_agree(tmp_path):
    code = "from formulary.catalogue import _index; i = _index.load(); print(len(i['slugs']), i['fingerprint'])"
    env = os.environ | {"FORMULARY_CACHE": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {process.communicate()[0] for process in running}
    assert len(said) == 1 and all(process.returncode == 0 for process in running)
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert all(name.startswith("index-") for name in left) and len(left) <= 1


def test_a_record_is_kept_small_and_read_with_care(house):
    path = house / "quantization/gptq/record.json"
    path.write_text(json.dumps(RECORD))
    reload()
    seen = record("gptq")
    assert seen["seeds"] == 8 and seen["null"]["verdict"] == "does not hold here" and "arms" not in seen
    assert len(json.dumps(seen)) < 1500
    path.write_text(json.dumps({"verdict": "not testable here", "why": "needs ImageNet", "seeds": 5, "predicates": None, "null": None}))
    reload()
    assert record("gptq")["why"] == "needs ImageNet" and record("gptq")["seeds"] == 5
    assert [hit.card.slug for hit in find(verdict="not testable here")] == ["gptq"]


@pytest.mark.parametrize(("text", "said"), [("{", "is not valid JSON"), ("[]", "has no known verdict"), ('{"verdict": "great"}', "has no known verdict")])
def test_a_damaged_record_is_named(house, text, said):
    (house / "quantization/gptq/record.json").write_text(text)
    with pytest.raises(FormularyError) as caught:
        reload()
    assert str(caught.value).startswith("record of gptq: ") and said in str(caught.value)


def test_a_wrong_card_stops_the_index_with_its_name(house):
    path = house / "backbone/swin/card.toml"
    path.write_text(path.read_text("utf8").replace('tier = "B"', 'tier = "X"'), "utf8")
    with pytest.raises(FormularyError, match="card swin: unknown tier 'X'"):
        reload()
