from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpsyngen.data import ImageDataset, load_images
from dpsyngen.data.labels import MAX_CLASSES, check_class_names
from dpsyngen.errors import DataError

X = np.zeros((2, 8, 8), dtype=np.uint8)
ALLOWED = (
    "../escape",
    "<script>alert(1)</script>",
    "=1+1",
    " cat ",
    "日本語",
    "نیم\u200cفاصله",  # a joiner that Persian spelling needs
    "👩\u200d🔬",
    "e\u0301",
    "'\"\\`$;|&",
    "x" * 255,
    "日" * 85,
)
REFUSED = {
    "": "empty",
    " \t": "empty",
    "x" * 256: "255 bytes",
    "日" * 86: "255 bytes",
    "x" * 10**6: "255 bytes",
    "a\nb": "control",
    "a\x00": "control",
    "\x1b[31mred": "control",
    "a\x85b": "control",
    "a\u2028b": "line breaks",
    "\u202egnp.exe": "reverse",
    "\u2066x": "reverse",
    "\udcff": "Unicode",
}


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed_names_are_kept_to_the_last_character_composed(tmp_path: Path, name: str) -> None:
    composed = unicodedata.normalize("NFC", name)
    assert load_images((X, [name, "other"])).class_names == tuple(sorted((composed, "other")))
    np.savez(tmp_path / "a.npz", images=X, labels=[0, 1], class_names=[name, "other"])
    assert load_images(tmp_path / "a.npz").class_names == (composed, "other")


@pytest.mark.parametrize(("name", "why"), REFUSED.items())
def test_refused_names(tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(DataError, match=why) as caught:
        check_class_names((name, "other"), "here")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400
    with pytest.raises(DataError, match=why):
        ImageDataset(X[:, None], np.array([0, 1]), (name, "other"), "here")
    if "\x00" not in name:  # numpy drops NULs at the end
        with pytest.raises(DataError):
            load_images((X, np.array([name, "other"])))


@pytest.mark.parametrize("name", ["a\nb", "\u202egnp", "\x1b[2J", os.fsdecode(b"caf\xe9")])
def test_refused_folder_names(class_folder: Path, name: str) -> None:
    try:
        (class_folder / name).mkdir()
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    Image.new("L", (16, 16)).save(class_folder / name / "a.png")
    for skip_bad in (False, True):
        with pytest.raises(DataError, match="Rename the class") as caught:
            load_images(class_folder, skip_bad=skip_bad)
        assert str(caught.value).isprintable()
    assert len(load_images(class_folder, labels=False)) == 7


@pytest.mark.parametrize(
    ("names", "alike"),
    [
        (("a", "a"), "are the same"),
        (("caf\u00e9", "cafe\u0301"), "different Unicode"),
        (("\u212b", "\u00c5"), "different Unicode"),
    ],
)
def test_names_that_cannot_be_told_apart(names: tuple[str, str], alike: str) -> None:
    with pytest.raises(DataError, match=alike):
        check_class_names(names, "here")
    check_class_names(("a", "A", "ａ"), "here")  # these can


def test_too_many_classes(tmp_path: Path) -> None:
    x = np.zeros((MAX_CLASSES + 1, 8, 8), dtype=np.uint8)
    labels = np.arange(MAX_CLASSES + 1)
    assert load_images((x[1:], labels[1:])).num_classes == MAX_CLASSES
    for values in (labels, labels.astype(str), labels.astype("S")):
        with pytest.raises(DataError, match="10,001 classes") as caught:
            load_images((x, values))
        assert len(str(caught.value)) < 400
    np.savez(tmp_path / "a.npz", images=X, labels=[0, 1], class_names=labels.astype(str))
    with pytest.raises(DataError, match="10,001 classes"):
        load_images(tmp_path / "a.npz")


def test_labels_at_the_ends_of_64_bits() -> None:
    data = load_images((X, np.array([2**64 - 1, 2**63], dtype=np.uint64)))
    assert data.class_names == ("9223372036854775808", "18446744073709551615")
    assert data.labels is not None
    assert data.labels.tolist() == [1, 0]


def test_labels_of_bytes(tmp_path: Path) -> None:
    assert load_images((X, np.array(["é".encode(), b"a"]))).class_names == ("a", "é")
    with pytest.raises(DataError, match="valid Unicode"):
        load_images((X, np.array([b"\xff", b"a"])))
    np.savez(tmp_path / "a.npz", images=X, labels=[0, 1], class_names=np.array([b"\xff", b"a"]))
    with pytest.raises(DataError, match="valid Unicode"):
        load_images(tmp_path / "a.npz")


def test_long_texts_are_refused_by_their_type(tmp_path: Path) -> None:
    """Before anything is done with them: an array gives each text the room of the longest."""
    long = np.array(["x" * 4081, "a"])
    with pytest.raises(DataError, match="texts of 4,081 characters"):
        load_images((X, long))
    np.savez(tmp_path / "a.npz", images=X, labels=[0, 1], class_names=long)
    with pytest.raises(DataError, match="strings of at most 255 bytes"):
        load_images(tmp_path / "a.npz")


@pytest.mark.parametrize("code", [0x110000, 0x7FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("order", "<>")
def test_code_points_that_do_not_exist(code: int, order: str) -> None:
    """numpy makes strings of them that crash Python when they are looked at."""
    labels = np.array([code, 97], dtype=f"{order}u4").view(f"{order}U1")
    with pytest.raises(DataError, match="code point"):
        load_images((X, labels))


def test_very_wide_text_labels_are_refused_before_they_are_sorted() -> None:
    with pytest.raises(DataError, match="5,000 characters"):
        load_images((X, np.array(["x" * 5000, "y"])))
