"""Parquet and Arrow in the layout of Hugging Face datasets."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from dpsyngen.data import load_images, tables
from dpsyngen.errors import DataError
from tests.data.encoded import pixels, png, table, write_parquet, write_saved

pa = pytest.importorskip("pyarrow")

IMAGES = pixels(25)
FILES = [png(image) for image in IMAGES]


@pytest.fixture(params=["parquet", "saved"])
def write(request, tmp_path: Path):
    """Writes a table in one of the two formats; returns what to load."""

    def parquet(data) -> Path:
        return write_parquet(tmp_path / "x.parquet", data)

    def saved(data) -> Path:
        return write_saved(tmp_path / "saved", [data.slice(0, 10), data.slice(10)])

    return parquet if request.param == "parquet" else saved


def test_images_labels_and_names_of_classes(write) -> None:
    labels = np.arange(25) % 2
    data = load_images(write(table(FILES, labels, ["cat", "dog", "unicorn"])))
    assert np.array_equal(data.images[:, 0], IMAGES)
    assert np.array_equal(data.labels, labels)
    assert data.class_names == ("cat", "dog", "unicorn")
    without = load_images(data.source, labels=False)
    assert (without.labels, without.class_names) == (None, ())


@pytest.mark.parametrize(
    ("labels", "names"),
    [([7, 3] * 12 + [7], ("3", "7")), (["b", "a"] * 12 + ["b"], ("a", "b"))],
)
def test_labels_without_names(write, labels, names) -> None:
    data = load_images(write(table(FILES, labels)))
    assert data.class_names == names
    assert data.labels.tolist() == [1, 0] * 12 + [1]


def test_bad_rows_are_listed_by_their_number_or_left_out(write) -> None:
    files = [*FILES]
    files[3], files[12], files[24] = None, FILES[12][:50], b""
    labels = [0, 1] * 12 + [0]
    labels[5], labels[20] = None, -1
    path = write(table(files, labels, ["a", "b"]))
    with pytest.raises(DataError, match="5 items") as caught:
        load_images(path)
    message = str(caught.value)
    assert "paths are not followed" in message
    assert re.search("row 5, .*: no label", message)
    for row in ("row 3:", ": empty file"):
        assert row in message
    data = load_images(path, skip_bad=True)
    keep = [i for i in range(25) if i not in (3, 5, 12, 20, 24)]
    assert np.array_equal(data.images[:, 0], IMAGES[keep])
    assert data.labels.tolist() == [i % 2 for i in keep]
    assert len(data.skipped) == 5


def test_row_numbers_are_those_of_the_file_when_rows_before_have_no_label(tmp_path: Path) -> None:
    files = [*FILES]
    files[17] = b"broken"
    labels = [None, None] + [0, 1] * 11 + [0]
    path = write_parquet(tmp_path / "x.parquet", table(files, labels, ["a", "b"]))
    with pytest.raises(DataError, match="row 17: not an image"):
        load_images(path)


def test_shards_and_splits(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    (hub / "data").mkdir(parents=True)
    (hub / "README.md").write_text("x")
    labels = np.arange(25) % 2
    for k, part in enumerate((slice(0, 10), slice(10, 25))):
        name = f"train-{k:05}-of-00002.parquet"
        write_parquet(hub / "data" / name, table(FILES[part], labels[part], ["a", "b"]))
    data = load_images(hub)
    assert np.array_equal(data.images[:, 0], IMAGES)
    assert load_images(hub / "data").fingerprint() == data.fingerprint()
    write_parquet(hub / "data" / "test-00000-of-00001.parquet", table(FILES[:4], labels[:4], ["a", "b"]))
    with pytest.raises(DataError, match=r"splits 'test', 'train'(.|\n)*train\*\.parquet"):
        load_images(hub)
    assert len(load_images(str(hub / "data" / "test*.parquet"))) == 4
    write_parquet(hub / "data" / "train-00002-of-00002.parquet", table(FILES[:4], labels[:4], ["b", "a"]))
    with pytest.raises(DataError, match="other columns or class names"):
        load_images(str(hub / "data" / "train*.parquet"))


def test_saved_dictionaries_name_their_splits(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    write_saved(tmp_path / "d" / "train", [table(FILES)])
    with pytest.raises(DataError, match="splits 'train', 'test'"):
        load_images(tmp_path / "d")
    assert len(load_images(tmp_path / "d" / "train")) == 25
    assert len(load_images(tmp_path / "d" / "train" / "data-00000-of-00001.arrow")) == 25


@pytest.mark.parametrize("name", ["../x.arrow", "/etc/passwd", "", ".hidden", None, 3])
def test_a_description_cannot_name_files_elsewhere(tmp_path: Path, name) -> None:
    folder = write_saved(tmp_path / "s", [table(FILES)])
    os.link(folder / "data-00000-of-00001.arrow", tmp_path / "x.arrow")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(DataError, match="does not list the files beside it"):
        load_images(folder)


def test_links_in_a_saved_folder_are_not_followed(tmp_path: Path) -> None:
    folder = write_saved(tmp_path / "s", [table(FILES)])
    (folder / "data-00000-of-00001.arrow").rename(tmp_path / "x.arrow")
    (folder / "data-00000-of-00001.arrow").symlink_to(tmp_path / "x.arrow")
    with pytest.raises(DataError, match="link"):
        load_images(folder)


@pytest.mark.parametrize(
    ("columns", "features", "why"),
    [
        ({"text": ["a"]}, {}, "no column of images"),
        ({"image": [1]}, {}, "not image files"),
        ({"image": [{"path": "x"}]}, {}, "not image files"),
        ({"image": [FILES[0]], "label": [1.5]}, {}, "whole numbers or texts"),
        ({"image": [FILES[0]], "label": [[1]]}, {}, "whole numbers or texts"),
        ({"left": [FILES[0]], "right": [FILES[0]]}, {"left": "Image", "right": "Image"}, "several columns of images"),
        (
            {"image": [FILES[0]], "a": [1], "b": [1]},
            {"a": "ClassLabel", "b": "ClassLabel"},
            r"'a', 'b' could be the labels",
        ),
    ],
)
def test_tables_of_another_form(write, columns, features, why) -> None:
    data = pa.table(columns)
    kinds = {name: {"_type": kind, "names": ["x", "y"]} for name, kind in features.items()}
    data = data.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": kinds}})})
    with pytest.raises(DataError, match=why):
        load_images(write(data))


def test_columns_are_used_or_named(write) -> None:
    dx, text = ["x", "y"] * 12 + ["x"], [f"caption {i}" for i in range(25)]
    path = write(pa.table({"image": FILES, "dx": dx, "text": text}))
    with pytest.raises(DataError, match=r"'dx' could be the labels.*--label-column"):
        load_images(path)
    with pytest.warns(UserWarning, match="ignored columns: 'text'"):
        assert load_images(path, label_column="dx").class_names == ("x", "y")
    assert load_images(path, labels=False).ignored == ()
    with pytest.raises(DataError, match="has no 'sex'"):
        load_images(path, label_column="sex")


def test_a_column_that_cannot_be_labels_is_named(write) -> None:
    path = write(pa.table({"image": FILES, "text": [f"caption {i}" for i in range(25)]}))
    with pytest.warns(UserWarning, match="ignored columns: 'text'"):
        assert load_images(path).labels is None


def test_a_pattern_over_splits_is_told_of(tmp_path: Path) -> None:
    for name in ("train-0.parquet", "test-0.parquet"):
        write_parquet(tmp_path / name, table(FILES[:4], [0, 1, 0, 1], ["a", "b"]))
    with pytest.warns(UserWarning, match="matches the splits 'test', 'train'"):
        assert len(load_images(str(tmp_path / "*.parquet"))) == 8


def test_plain_binary_columns_and_usual_names(write) -> None:
    data = pa.table({"img": FILES, "labels": pa.array(["x", "y"] * 12 + ["x"]).dictionary_encode()})
    if write.__name__ == "saved":
        data = data.set_column(1, "labels", data["labels"].cast(pa.string()))
    loaded = load_images(write(data))
    assert np.array_equal(loaded.images[:, 0], IMAGES)
    assert loaded.class_names == ("x", "y")


@pytest.mark.parametrize("metadata", [b"{", b'{"info": 3}', b'{"info": {"features": []}}', b"[" * 100_000])
def test_damaged_metadata(write, metadata) -> None:
    with pytest.raises(DataError, match="metadata"):
        load_images(write(table(FILES).replace_schema_metadata({"huggingface": metadata})))


@pytest.mark.parametrize("limit", ["tables._MAX_JSON_BYTES", "tables.MAX_FILE_BYTES", "decode.MAX_FILE_BYTES"])
def test_more_than_the_limits(write, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    path = write(table(FILES, [0, 1] * 12 + [0], ["a", "b"]))
    assert len(load_images(path)) == 25
    monkeypatch.setattr(f"dpsyngen.data.{limit}", 10)
    in_footer = limit == "tables._MAX_JSON_BYTES" and path.is_file()
    with pytest.raises(DataError, match="metadata of Hugging Face" if in_footer else "over the limit of 10"):
        load_images(path)


@pytest.mark.parametrize(("limit", "least"), [("_MAX_THRIFT_BYTES", 100), ("_MAX_THRIFT_ITEMS", 2)])
def test_limits_on_the_footer_of_parquet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, least: int
) -> None:
    path = write_parquet(tmp_path / "x.parquet", table(FILES))
    assert len(load_images(path)) == 25
    monkeypatch.setattr(tables, limit, least)
    with pytest.raises(DataError, match="Parquet file"):
        load_images(path)


def test_damaged_files(write, tmp_path: Path) -> None:
    """Cut at many places, and with bytes changed: a sound result or an error of ours, and no crash."""
    path = write(table(FILES[:8], [0, 1] * 4, ["a", "b"]))
    file = path if path.is_file() else sorted(path.glob("*.arrow"))[0]
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(80):
        content = bytearray(whole)
        if i % 2:
            for place in rng.integers(0, len(whole), 3):
                content[place] ^= 1 << int(rng.integers(8))
        else:
            del content[int(rng.integers(len(whole))) :]
        file.write_bytes(content)
        try:
            load_images(path, resolution=16, channels="grey", skip_bad=True)
        except DataError:
            refused += 1
    assert refused > 30


def test_no_record_batch_is_read_once_for_each_after_it(tmp_path: Path, monkeypatch) -> None:
    labels = pa.array(["b", "a"] * 12 + ["b"]).dictionary_encode()
    data, read, open_stream = table(FILES, labels), [], pa.ipc.open_stream

    class Counting:
        def __init__(self, file) -> None:
            self.reader = open_stream(file)
            self.schema = self.reader.schema

        def read_next_batch(self):
            read.append(1)
            return self.reader.read_next_batch()

        def __iter__(self):
            return iter(self.reader)

    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file, pa.ipc.new_stream(file, data.schema) as writer:
        writer.write_table(data, max_chunksize=1)
    monkeypatch.setattr(pa.ipc, "open_stream", Counting)
    found = load_images(tmp_path / "x.arrow", workers=1)
    assert np.array_equal(found.images[:, 0], IMAGES)
    assert found.labels.tolist() == [1, 0] * 12 + [1]
    assert len(read) <= 4 * 25  # twice, for headers and for pixels, each with the first


def test_no_images(write) -> None:
    with pytest.raises(DataError, match="there is no image"):
        load_images(write(table([], pa.array([], pa.int64()), ["a"])))


def test_the_own_writers_of_datasets_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    from PIL import Image

    rows = {"image": [Image.fromarray(i) for i in IMAGES], "label": [0, 1] * 12 + [0]}
    made = datasets.Dataset.from_dict(rows, features=features)
    made.to_parquet(str(tmp_path / "x.parquet"))
    made.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    made.shuffle(seed=0).save_to_disk(str(tmp_path / "shuffled"))
    first, second, third = (load_images(tmp_path / name) for name in ("x.parquet", "saved", "shuffled"))
    in_python = load_images(made)
    assert np.array_equal(first.images[:, 0], IMAGES)
    assert first.class_names == ("cat", "dog")
    assert first.fingerprint() == second.fingerprint() == in_python.fingerprint()
    assert sorted(i.tobytes() for i in third.images) == sorted(i.tobytes() for i in first.images)
    assert load_images(made.shuffle(seed=0)).fingerprint() == third.fingerprint()
    with pytest.raises(ValueError, match="splits 'train'"):
        load_images(datasets.DatasetDict({"train": made}))


def test_without_pyarrow_the_extra_is_named(write, monkeypatch) -> None:
    import sys

    path = write(table(FILES))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"dpsyngen\[parquet\]"):
        load_images(path)
