"""Reading data: text, JSONL, CSV, a folder of images, `lab:NAME` or an iterable, into what the model's kind needs.

Every reader gives two parts that share no item: one to calibrate or train on, one held out to judge by. A malformed or
empty file is a one-line error that names it.
"""

import csv
import inspect
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from formulary.contracts.data import Data
from formulary.errors import FormularyError, UsageError, nearest

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
SAMPLES = {"decoder": 32, "encoder": 256, "encoder-decoder": 64, "vision": 48}
HELD_OUT = {"decoder": 16, "encoder": 96, "encoder-decoder": 32, "vision": 32}
LENGTHS = {"decoder": 512, "encoder": 128, "encoder-decoder": 128}
BATCHES = {"decoder": 4, "encoder": 16, "encoder-decoder": 8, "vision": 8}
DEFAULTS = {"lab:minilm": "lab:kjv", "lab:smollm2": "lab:kjv", "lab:vit": "lab:photographs", "lab:rxn": "lab:reactions"}


@dataclass
class Raw:
    """Items as they were read: texts, (source, target) pairs or images, with labels where there are any."""

    kind: str  # "text" | "pairs" | "images"
    items: list
    labels: list | None = None
    test: list | None = None
    test_labels: list | None = None
    name: str = "data"


# ---------------------------------------------------------------- reading


def read(spec: Any, *, labels: str | None = None) -> Raw:
    """Read a data specification; `labels` names the field (CSV, JSONL) that holds labels."""
    if isinstance(spec, str) and spec.startswith("lab:"):
        return _read_lab(spec.removeprefix("lab:"))
    if isinstance(spec, (str, Path)):
        return _read_path(Path(spec).expanduser(), labels)
    if isinstance(spec, Iterable):
        return _read_iterable(list(spec))
    raise UsageError(f"data must be a path, lab:NAME or an iterable of texts or images, not a {type(spec).__name__}")


def _read_lab(name: str) -> Raw:
    from formulary import lab

    found = lab.data(name)
    if found["kind"] not in ("text", "images"):
        raise FormularyError(f"lab:{name} holds {found['kind']}, not the text or images that this method reads")
    return Raw(
        found["kind"], found["train"], found.get("train_labels"), found["test"], found.get("test_labels"), f"lab:{name}"
    )


def _read_iterable(items: list) -> Raw:
    if not items:
        raise FormularyError("the data is empty: give at least one text, image or sequence")
    first = items[0]
    if isinstance(first, str):
        return Raw("text", items)
    if isinstance(first, (tuple, list)) and len(first) == 2 and isinstance(first[0], str) and isinstance(first[1], str):
        return Raw("pairs", [tuple(item) for item in items])
    if isinstance(first, (tuple, list)) and len(first) == 2:
        return Raw("text" if isinstance(first[0], str) else "images", [i[0] for i in items], [i[1] for i in items])
    if hasattr(first, "convert") or (isinstance(first, torch.Tensor) and first.ndim == 3):
        return Raw("images", items)
    raise UsageError(f"data items must be texts, (text, text) pairs, (item, label) pairs or images, not {type(first).__name__}")


def _read_path(path: Path, labels: str | None) -> Raw:
    if not path.exists():
        raise FormularyError(f"no data at {path}")
    if path.is_dir():
        return _read_folder(path)
    if path.stat().st_size == 0:
        raise FormularyError(f"{path} is empty")
    text = _decode(path)
    if path.suffix in (".jsonl", ".ndjson"):
        return _rows(path, list(_json_lines(path, text)), labels)
    if path.suffix in (".csv", ".tsv"):
        rows = list(csv.DictReader(text.splitlines(), delimiter="\t" if path.suffix == ".tsv" else ","))
        return _rows(path, rows, labels)
    if labels is not None:
        raise UsageError(f"--labels needs a CSV or JSONL file with a field {labels!r}; {path.name} is plain text")
    return Raw("text", _paragraphs(path, text), name=path.name)


def _decode(path: Path) -> str:
    data = path.read_bytes()
    if b"\0" in data[:4096]:
        raise FormularyError(f"{path} is binary, not text: give text, JSONL, CSV or a folder of images")
    try:
        return data.decode("utf8")
    except UnicodeDecodeError as error:
        raise FormularyError(f"{path} is not UTF-8 text: {error}") from error


def _paragraphs(path: Path, text: str) -> list[str]:
    blocks = [" ".join(block.split()) for block in text.split("\n\n")]
    if len([b for b in blocks if b]) < 8:
        blocks = [line.strip() for line in text.split("\n")]
    found = [block for block in blocks if block]
    if not found:
        raise FormularyError(f"{path} holds no text")
    return found


def _json_lines(path: Path, text: str):
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise FormularyError(f"{path}, line {number}: not valid JSON: {error}") from error
            yield row if isinstance(row, dict) else {"text": row}


def _rows(path: Path, rows: list[dict], labels: str | None) -> Raw:
    if not rows:
        raise FormularyError(f"{path} has no rows")
    fields = [str(key) for key in rows[0]]
    if labels is not None and labels not in fields:
        raise UsageError(f"{path} has no field {labels!r}{nearest(labels, fields)}; fields: {', '.join(fields)}")
    values = [row.get(labels) for row in rows] if labels else None
    if {"source", "target"} <= set(fields):
        return Raw("pairs", [(str(r["source"]), str(r["target"])) for r in rows], values, name=path.name)
    strings = [f for f in fields if f != labels and isinstance(rows[0][f], str)]
    field = next((f for f in ("text", "sentence", "content") if f in strings), strings[0] if strings else None)
    if field is None:
        raise FormularyError(f"{path} has no text field; fields: {', '.join(fields)}")
    texts = [str(row.get(field) or "").strip() for row in rows]
    kept = [i for i, text in enumerate(texts) if text]
    if not kept:
        raise FormularyError(f"{path}: field {field!r} holds no text")
    return Raw("text", [texts[i] for i in kept], [values[i] for i in kept] if values else None, name=path.name)


def _read_folder(path: Path) -> Raw:
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGES)
    if not files:
        texts = sorted(p for p in path.rglob("*.txt"))
        if not texts:
            raise FormularyError(f"{path} holds no images ({', '.join(sorted(IMAGES))}) and no .txt files")
        return Raw("text", [t for p in texts for t in _paragraphs(p, _decode(p))], name=path.name)
    from PIL import Image, UnidentifiedImageError

    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                images.append(image.convert("RGB"))
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            raise FormularyError(f"{file} is not a readable image: {str(error).splitlines()[0]}") from error
    classes = [file.relative_to(path).parts[0] if len(file.relative_to(path).parts) > 1 else None for file in files]
    labeled = all(classes) and len(set(classes)) > 1
    return Raw("images", images, classes if labeled else None, name=path.name)


# ---------------------------------------------------------------- encoding


def prepare(
    spec: Any,
    model: torch.nn.Module,
    kind: str,
    processor: Any,
    *,
    labels: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    max_length: int | None = None,
    samples: int | None = None,
) -> tuple[Data, Data]:
    """(calibration or training data, held-out data) for a model of this kind.

    `samples` bounds the first part. Raises FormularyError for data that is empty, binary, of the wrong sort, or shorter than one
    sequence, and for text when the model directory has no tokenizer.
    """
    raw = read(spec, labels=labels)
    wanted = "images" if kind == "vision" else "text"
    if raw.kind != wanted and not (kind == "encoder-decoder" and raw.kind == "pairs"):
        raise FormularyError(f"{raw.name} holds {raw.kind}, but this {kind} model reads {wanted}")
    if wanted == "text" and processor is None:
        raise FormularyError("the model directory has no tokenizer (tokenizer.json), so text cannot be read for it")
    encode = {"decoder": _encode_stream, "encoder": _encode_texts, "encoder-decoder": _encode_pairs, "vision": _encode_images}
    classes = _classes(raw, model)
    index = {value: i for i, value in enumerate(classes or [])}
    options = dict(
        batch_size=batch_size or BATCHES[kind], seed=seed, processor=processor, name=raw.name,
        pad_token_id=getattr(processor, "pad_token_id", None) or 0, facts={"classes": classes} if classes else {},
    )  # fmt: skip
    length = _length(model, kind, max_length)
    shuffled, shuffled_labels = _shuffle(raw.items, raw.labels, seed)
    train_n, test_n = samples or SAMPLES[kind], HELD_OUT[kind]
    takes_labels = "labels" in inspect.signature(type(model).forward).parameters

    def make(items, marks, n):
        rows, marks, source = encode[kind](items, marks, n, length, processor, model, raw.name)
        if marks is not None and takes_labels and kind in ("encoder", "vision"):
            rows = [dict(row, labels=torch.tensor(index[mark])) for row, mark in zip(rows, marks)]
        return Data(rows, labels=None if marks is None else [index[m] for m in marks], raw=source, **options)

    if raw.test is not None:
        test, test_labels = _shuffle(raw.test, raw.test_labels, seed + 1)
        return make(shuffled, shuffled_labels, train_n), make(test, test_labels, test_n)
    cut = _cut(len(shuffled), kind)
    if cut == len(shuffled):
        return _halves(make(shuffled, shuffled_labels, train_n + test_n), raw.name)
    pick = lambda s: (shuffled[s], None if shuffled_labels is None else shuffled_labels[s])
    return make(*pick(slice(0, cut)), train_n), make(*pick(slice(cut, None)), test_n)


def _cut(n: int, kind: str) -> int:
    """Where the held-out quarter begins; a decoder's text of fewer than 8 pieces is split after it is cut into sequences."""
    if kind == "decoder" and n < 8:
        return n
    if n < 4:
        raise FormularyError(f"the data has {n} item(s), too few to hold some out: give at least 4")
    return n - max(1, n // 4)


def _halves(data: Data, name: str) -> tuple[Data, Data]:
    if len(data) < 2:
        raise FormularyError(f"{name} gives {len(data)} sequence, too few to hold one out: give more text or a smaller --max-length")
    return data.split(0.25)


def _shuffle(items: Sequence, labels: Sequence | None, seed: int) -> tuple[list, list | None]:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    return [items[i] for i in order], None if labels is None else [labels[i] for i in order]


def _classes(raw: Raw, model) -> list | None:
    """The label values in the order of the model's own classes where it knows them, else sorted."""
    if raw.labels is None:
        return None
    found = set(raw.labels) | set(raw.test_labels or [])
    known = getattr(model.config, "label2id", None) or {}
    if found <= set(known):
        return sorted(known, key=known.get)
    if all(isinstance(v, int) for v in found) and found <= set(range(getattr(model.config, "num_labels", 0))):
        return list(range(model.config.num_labels))
    return sorted(found, key=lambda v: (str(type(v)), v))


def _length(model, kind: str, asked: int | None) -> int:
    """Tokens per sequence: what was asked, within what the model's positions allow."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if asked is not None and asked < 2:
        raise UsageError(f"max length must be at least 2 tokens, got {asked}")
    if asked is not None and limit and asked > limit:
        raise UsageError(f"max length {asked} is more than the model's {limit} positions")
    wanted = asked or LENGTHS.get(kind, 0)
    return min(wanted, limit) if limit else wanted


def _encode_stream(items, marks, n, length, tokenizer, model, name):
    """Texts joined and cut into `n` sequences of `length` tokens, as language-model evaluation does."""
    ids, wanted = [], n * length
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for start in range(0, len(items), 256):
        for row in tokenizer(items[start : start + 256], add_special_tokens=False)["input_ids"]:
            ids += row + separator
        if len(ids) >= wanted:
            break
    count = min(n, len(ids) // length)
    if not count:
        raise FormularyError(
            f"{name} has {len(ids)} tokens here, fewer than one sequence of {length}: give more text or a smaller --max-length"
        )
    rows = torch.tensor(ids[: count * length]).view(count, length)
    return [{"input_ids": row, "labels": row.clone()} for row in rows], None, items


def _encode_texts(items, marks, n, length, tokenizer, model, name):
    texts = items[:n]
    encoded = tokenizer(texts, truncation=True, max_length=length)
    keys = [key for key in ("input_ids", "token_type_ids") if key in encoded]
    rows = [{key: torch.tensor(encoded[key][i]) for key in keys} for i in range(len(texts))]
    if all(len(row["input_ids"]) < 2 for row in rows):
        raise FormularyError(f"{name} gives no tokens: is it text that this tokenizer knows?")
    return rows, None if marks is None else marks[:n], texts


def _encode_pairs(items, marks, n, length, tokenizer, model, name):
    """(source, target) pairs; plain texts become pairs of their first and second half."""
    pairs = [item if isinstance(item, tuple) else _halve(item) for item in items]
    pairs = [pair for pair in pairs if pair[0] and pair[1]][:n]
    if not pairs:
        raise FormularyError(f"{name} gives no (source, target) pairs: texts need at least two words")
    source = tokenizer([p[0] for p in pairs], truncation=True, max_length=length)["input_ids"]
    target = tokenizer([p[1] for p in pairs], truncation=True, max_length=length)["input_ids"]
    return [{"input_ids": torch.tensor(s), "labels": torch.tensor(t)} for s, t in zip(source, target)], None, pairs


def _halve(text: str) -> tuple[str, str]:
    words = text.split()
    middle = len(words) // 2
    return " ".join(words[:middle]), " ".join(words[middle:])


def _encode_images(items, marks, n, length, processor, model, name):
    images = items[:n]
    if isinstance(images[0], torch.Tensor):
        rows = [{"pixel_values": image.float()} for image in images]
    else:
        if processor is None:
            processor = _default_image_processor(model)
        values = [processor(image, return_tensors="pt")["pixel_values"][0] for image in images]
        rows = [{"pixel_values": value} for value in values]
    return rows, None if marks is None else marks[:n], images


def _default_image_processor(model):
    """Resize to the model's image size and normalize with ImageNet's statistics, for directories that say nothing."""
    from transformers import ViTImageProcessorPil

    size = getattr(model.config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return ViTImageProcessorPil(
        size={"height": height, "width": width}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
