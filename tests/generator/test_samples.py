"""Writing generated images: whole or not at all, inside the folder, readable again."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpsyngen.data import load_images
from dpsyngen.errors import ConfigError, RunError
from dpsyngen.generator.samples import check_target, folder_names, write_samples

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
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert about == {"seed": 5, "class_names": ["cat", "dog", "emu"]}
    back = load_images(tmp_path / "out")
    assert (back.class_names, back.ignored) == (("cat", "dog", "emu"), ())
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


def test_parquet_keeps_order_labels_and_how_it_was_drawn(tmp_path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    seen: list[int] = []
    names = ('a"b', "é: #1", "---")
    write_samples(tmp_path / "out.parquet", batches(), LABELS, names, {"seed": 5}, seen.append)
    file = pq.ParquetFile(tmp_path / "out.parquet")
    table, notes = file.read(), file.schema_arrow.metadata
    assert table.column("label").to_pylist() == LABELS.tolist()
    assert json.loads(notes[b"about"]) == {"seed": 5}
    features = json.loads(notes[b"huggingface"])["info"]["features"]
    assert features["label"] == {"names": list(names), "_type": "ClassLabel"}
    for number, (row, image) in enumerate(zip(table.column("image").to_pylist(), IMAGES, strict=True)):
        assert row["path"] == f"{number:07d}.png"
        with Image.open(io.BytesIO(row["bytes"])) as stored:
            assert np.array_equal(np.asarray(stored), image[0])
    assert seen == [4, 6]
    assert file.num_row_groups == 2  # written as it came, not collected


def test_parquet_without_pyarrow_is_said_before_anything_is_drawn(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"dpsyngen\[parquet\]"):
        check_target(tmp_path / "out.parquet")


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
    (tmp_path / "f.parquet").touch()
    for out in (tmp_path / "full", tmp_path / "f.npz", tmp_path / "f.parquet"):
        with pytest.raises(RunError, match="exists already"):
            write_samples(out, batches(), LABELS, ("a", "b", "c"), {})
    (tmp_path / "empty").mkdir()
    write_samples(tmp_path / "empty", batches(), LABELS, ("a", "b", "c"), {})
    assert (tmp_path / "empty" / "metadata.csv").exists()


@pytest.mark.parametrize("name", ["out", "out.npz", "out.parquet"])
def test_failure_in_the_middle_leaves_nothing(tmp_path, name) -> None:
    def broken():
        yield IMAGES[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_samples(tmp_path / name, broken(), LABELS, ("a", "b", "c"), {})
    assert list(Path(tmp_path).iterdir()) == []


@pytest.mark.parametrize(
    "names",
    [
        ("b", "2_b", "b"),  # the way out of one clash is taken too
        ("", "0", ""),
        ("a/b", "a:b", "a_b", "a?b"),
        ("metadata.csv", "about.json", "Metadata.csv"),  # files that lie beside the folders
        ("日" * 300, "日" * 299, "x" * 300),  # a file name has 255 bytes at most
        (".", "..", "...", ". ."),
        ("/", "/etc/passwd", "..\\x", "~"),
        (".hidden", " spaced ", "line\nbreak"),
        ("Cat", "cat", "CAT", "0_cat"),  # one folder where case does not count
        ("caf\u00e9", "cafe\u0301", "Straße", "STRASSE"),
        ("\u202egnp", "\u200d", "<script>", "=1+1"),
    ],
)
def test_every_class_has_a_folder_of_its_own(tmp_path, names) -> None:
    folders = folder_names(names)
    assert len(set(folders)) == len(names)
    assert not any("/" in f or f.startswith(".") or len(f.encode()) > 255 for f in folders)
    n = len(names)
    images = np.random.default_rng(1).integers(0, 256, (2 * n, 1, 8, 8), dtype=np.uint8)
    write_samples(tmp_path / "sub" / "out", iter([images]), np.arange(2 * n) % n, names, {})
    assert [p.name for p in tmp_path.rglob("*") if p.name == "passwd"] == []
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["out"]
    with open(tmp_path / "sub" / "out" / "metadata.csv", encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    # The name itself, whatever it holds, stands in the table, and each file where the table says.
    assert [r["class_name"] for r in rows] == list(names) * 2
    for row, image in zip(rows, images, strict=True):
        with Image.open(tmp_path / "sub" / "out" / row["file_name"]) as stored:
            assert np.array_equal(np.asarray(stored), image[0])
    back = load_images(tmp_path / "sub" / "out")
    assert set(back.class_names) == set(folders)
    assert len(back) == 2 * n


def test_classes_without_an_image_have_no_folder_so_that_the_rest_can_be_read(tmp_path) -> None:
    write_samples(tmp_path / "some", batches(), np.full(6, 1), ("cat", "dog", "emu"), {})
    assert load_images(tmp_path / "some").class_names == ("dog",)
    write_samples(tmp_path / "none", batches(), None, ("cat", "dog", "emu"), {})
    assert load_images(tmp_path / "none").labels is None


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_what_was_written_is_read_back_with_its_labels(tmp_path, name, channels) -> None:
    images = np.random.default_rng(2).integers(0, 256, (9, channels, 8, 8), dtype=np.uint8)
    labels = np.array([2, 0, 1, 1, 0, 2, 2, 0, 1])
    write_samples(tmp_path / name, iter([images[:5], images[5:]]), labels, ("a", "b", "c"), {"seed": 1})
    back = load_images(tmp_path / name)
    assert back.channels == channels
    assert {(x.tobytes(), int(y)) for x, y in zip(back.images, back.labels, strict=True)} == {
        (x.tobytes(), int(y)) for x, y in zip(images, labels, strict=True)
    }


def test_failure_spares_an_empty_target_and_what_lies_beside(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.txt").write_text("mine")

    def broken():
        yield IMAGES[:4]
        raise ValueError("out of memory")

    with pytest.raises(ValueError, match="out of memory"):
        write_samples(tmp_path / "empty", broken(), LABELS, ("a", "b", "c"), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "other.txt"]
    assert list((tmp_path / "empty").iterdir()) == []


def test_nothing_is_drawn_for_a_target_that_exists(tmp_path) -> None:
    def never():
        raise AssertionError("images were drawn")
        yield

    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(RunError, match="exists already"):
            write_samples(tmp_path / name, never(), None, (), {})
    assert (tmp_path / "file").read_text() == "mine"


def test_the_working_folder_itself_can_be_written_to(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_samples(Path("."), batches(), None, (), {"x": 1})
    assert {p.name for p in tmp_path.iterdir()} >= {"about.json", "metadata.csv"}
    assert not any(p.name.startswith(".") for p in tmp_path.iterdir())
