"""The index: one JSON of all cards, verdicts and search postings, so that `find` and `show` read one file and import nothing heavy.

The wheel carries it (`hatch_build.py` writes it). Elsewhere it is built at first use into the cache, and again whenever a card, a
record or this code changed. Readers and builders never wait for each other: the file is replaced whole, and a cache that cannot
be written only costs the time to build.
"""

import json
import os
from functools import cache
from pathlib import Path

from formulary.errors import FormularyError
from formulary.catalogue._card import PAPERS, VERDICTS, Card

HERE = Path(__file__).resolve().parent
PACKAGED = HERE / "index.json"
SLACK_SECONDS = 60.0
RECORD_KEYS = ("verdict", "headline", "claim", "scope", "version", "date", "why", "items", "redraws", "metric")


def build(papers: Path = PAPERS) -> dict:
    """The index of every card under `papers`. Raises UsageError when a card is wrong, FormularyError when a record is damaged."""
    from formulary.catalogue._card import read_cards
    from formulary.catalogue._search import pair_lines, postings

    found = read_cards(papers)
    cards = [card.as_dict() for card in found.values()]
    records = {card.slug: record for card in found.values() if (record := read_record(papers / card.family / card.room / "record.json"))}
    stats = _stats(papers)
    return {
        "fingerprint": _digest(stats),
        "sizes": _digest([entry[:2] for entry in stats]),
        "slugs": list(found),
        "cards": cards,
        "records": records,
        "postings": postings(cards),
        "pairs": pair_lines(cards),
    }


@cache
def load() -> dict:
    """The index in force: the packaged one, else the cached one, else one built now and cached."""
    stats = _stats(PAPERS)
    if (packaged := _read_if(PACKAGED, "sizes", _digest([entry[:2] for entry in stats]))) and _newest(stats) <= _mtime(PACKAGED) + SLACK_SECONDS:
        return packaged
    place = _cache_file()
    if place and (cached := _read_if(place, "fingerprint", _digest(stats))):
        return cached
    index = build(PAPERS)
    if place:
        _write(place, index)
    return index


def dump(index: dict) -> str:
    """The index as the text of its file; it begins with the two fingerprints, so that a stale file is known by its first line."""
    return json.dumps(index, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def as_card(table: dict) -> Card:
    """The card of one entry of `index["cards"]`, validated when the index was built."""
    return Card(**{**table, "contract": tuple(table["contract"])})


def read_record(path: Path) -> dict | None:
    """What `find` and `show` need of a record: the verdict and the numbers under it, never the outcomes of each item."""
    try:
        record = json.loads(path.read_text("utf8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise FormularyError(f"record of {path.parent.name}: {path.name} is not valid JSON: {error}") from None
    verdict = record.get("verdict") if isinstance(record, dict) else None
    if not isinstance(verdict, str) or not verdict.startswith(VERDICTS[:4]):
        raise FormularyError(f"record of {path.parent.name}: {path.name} has no known verdict; rerun `formulary check --record`")
    slim = {key: record[key] for key in RECORD_KEYS if isinstance(record.get(key), (str, int))}
    seeds = record.get("seeds")
    slim["seeds"] = len(seeds) if isinstance(seeds, list) else seeds if isinstance(seeds, int) else None
    slim["reasons"] = [reason for reason in _list(record.get("reasons")) if isinstance(reason, str)]
    slim["predicates"] = [_scalars(entry) for entry in _list(record.get("predicates")) if isinstance(entry, dict)]
    for planted in ("null", "oracle"):
        entry = record.get(planted)
        slim[planted] = _scalars(entry) if isinstance(entry, dict) else None
    return slim


def _list(value) -> list:
    return value if isinstance(value, list) else []


def _scalars(table: dict) -> dict:
    """The entries of `table` that are one number, text, truth value or null."""
    return {key: value for key, value in table.items() if not isinstance(value, (dict, list))}


def _stats(papers: Path) -> list[tuple[str, int, int]]:
    """(path, size, mtime in ns) of every file that the index is made from, in a fixed order."""
    found = []
    for family in sorted(_folders(papers)):
        for room in sorted(_folders(family)):
            for name in ("card.toml", "record.json"):
                try:
                    stat = os.stat(f"{room}/{name}")
                except OSError:
                    continue
                found.append((f"{os.path.basename(family)}/{os.path.basename(room)}/{name}", stat.st_size, stat.st_mtime_ns))
    for name in ("_card.py", "_index.py", "_search.py", "_text.py"):
        stat = os.stat(HERE / name)
        found.append((name, stat.st_size, stat.st_mtime_ns))
    return found


def _folders(path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return [entry.path for entry in entries if entry.name[0] not in "._" and entry.is_dir()]
    except OSError:
        return []


def _digest(rows: list[tuple]) -> str:
    from hashlib import blake2b

    return blake2b("\n".join(" ".join(map(str, row)) for row in rows).encode(), digest_size=16).hexdigest()


def _newest(stats: list[tuple[str, int, int]]) -> float:
    return max(entry[2] for entry in stats) / 1e9


def _mtime(path: Path) -> float:
    return os.stat(path).st_mtime


def _read_if(path: Path, key: str, digest: str) -> dict | None:
    """The index in `path` when its `key` is `digest`; None when it is another one, missing or damaged."""
    try:
        with open(path, encoding="utf8") as file:
            head = file.read(200)
            return json.loads(head + file.read()) if f'"{key}":"{digest}"' in head else None
    except (OSError, ValueError):
        return None


def _cache_file() -> Path | None:
    """Where this installation's index is cached; None when there is no place for it."""
    from formulary.files import cache_dir

    try:
        return cache_dir("catalogue") / f"index-{_digest([(str(HERE),)])}.json"
    except OSError:
        return None


def _write(place: Path, index: dict) -> None:
    from formulary.files import write_atomic

    try:
        write_atomic(place, dump(index))
    except OSError:
        return
