"""Writing generated images: whole or not at all, inside the folder, readable again."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from dpsyngen.data import load_images
from dpsyngen.errors import RunError
from dpsyngen.samples import folder_names, write_samples

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 1, 8, 8), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def batches(images=IMAGES):
    yield images[:4]
    yield images[4:]


def test_folder(tmp_path) -> None:
    seen = []
    write_samples(tmp_path / "out", batches(), LABELS, ("cat", "dog", "emu"), {"seed": 5}, seen.append)
    with open(tmp_path / "out" / "metadata.csv", encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [r["class_name"] for r in rows] == ["cat", "dog", "emu"] * 2
    assert rows[3]["file_name"] == "cat/0000003.png"
    assert seen == [4, 6]
    assert json.loads((tmp_path / "out" / "about.json").read_text()) == {"seed": 5}
    back = load_images(tmp_path / "out")
    assert back.class_names == ("cat", "dog", "emu")
    assert {x.tobytes() for x in back.images} == {x.tobytes() for x in IMAGES}


@pytest.mark.parametrize("channels", [1, 3])
def test_without_classes_grey_and_colour(tmp_path, channels) -> None:
    images = IMAGES.repeat(channels, 1)
    write_samples(tmp_path / "out", batches(images), None, (), {})
    back = load_images(tmp_path / "out")
    assert back.labels is None
    assert np.array_equal(back.images, images)


def test_npz(tmp_path) -> None:
    write_samples(tmp_path / "out.npz", batches(), LABELS, ("a", "b", "c"), {"seed": 5})
    stored = np.load(tmp_path / "out.npz", allow_pickle=False)
    assert np.array_equal(stored["images"], IMAGES)
    assert json.loads(str(stored["about"])) == {"seed": 5}
    assert load_images(tmp_path / "out.npz").class_names == ("a", "b", "c")


def test_hostile_class_names_stay_inside(tmp_path) -> None:
    names = ("../escape", "a/b", "", "..", "a_b", "con\x00", "x" * 300, "日本 1")
    folders = folder_names(names)
    assert len(set(folders)) == len(names)
    write_samples(tmp_path / "sub" / "out", iter([IMAGES[:1].repeat(8, 0)]), np.arange(8), names, {})
    assert [p.name for p in tmp_path.iterdir()] == ["sub"]
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["out"]
    assert {p.name for p in (tmp_path / "sub" / "out").iterdir() if p.is_dir()} == set(folders)
    assert folder_names(("cat", "dog")) == ("cat", "dog")


def test_nothing_is_overwritten(tmp_path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "f.npz").touch()
    for out in (tmp_path / "full", tmp_path / "f.npz"):
        with pytest.raises(RunError, match="exists already"):
            write_samples(out, batches(), LABELS, ("a", "b", "c"), {})
    (tmp_path / "empty").mkdir()
    write_samples(tmp_path / "empty", batches(), LABELS, ("a", "b", "c"), {})
    assert (tmp_path / "empty" / "metadata.csv").exists()


@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_failure_in_the_middle_leaves_nothing(tmp_path, name) -> None:
    def broken():
        yield IMAGES[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_samples(tmp_path / name, broken(), LABELS, ("a", "b", "c"), {})
    assert list(Path(tmp_path).iterdir()) == []
