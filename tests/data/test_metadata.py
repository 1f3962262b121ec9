"""Labels from a table beside the images, or from one that the user names."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpsyngen.config import load_config
from dpsyngen.data import load_images
from dpsyngen.data.load import load_private
from dpsyngen.errors import ConfigError, DataError
from tests.data.encoded import pixels, png, samples, table, write_parquet, write_saved, write_tar


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Eight images in one folder, 0.png to 7.png."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, image in enumerate(pixels(8)):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


def classes_of(source: Path, **options: Any) -> list[str]:
    """The name of the class of each image, in order."""
    data = load_images(source, **options)
    assert data.labels is not None
    return [data.class_names[i] for i in data.labels]


def csv_of(rows: dict[str, object], head: str = "file_name,label", separator: str = ",") -> str:
    lines = [head, *(f"{name},{value}" for name, value in rows.items())]
    return "\n".join(line.replace(",", separator) for line in lines) + "\n"


EVEN = {f"{i}.png": "ab"[i % 2] for i in range(8)}


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_metadata_csv(flat: Path, separator: str, encoding: str) -> None:
    (flat / "metadata.csv").write_text(csv_of(EVEN, separator=separator), encoding=encoding)
    assert classes_of(flat) == list("abababab")
    assert load_images(flat, labels=False).labels is None


def test_metadata_jsonl(flat: Path) -> None:
    rows = [{"file_name": name, "Label": i % 3, "box": [1, 2]} for i, name in enumerate(EVEN)]
    (flat / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match="ignored columns: 'box'"):
        assert classes_of(flat) == list("01201201")
    (flat / "metadata.csv").write_text(csv_of(EVEN))
    with pytest.raises(DataError, match="Keep the one that is meant"):
        load_images(flat)


def test_labels_that_start_with_a_zero_are_names_of_their_own(flat: Path) -> None:
    values = ["010", "10", "1", "01"]
    (flat / "metadata.csv").write_text(csv_of({name: values[i % 4] for i, name in enumerate(EVEN)}))
    assert load_images(flat).class_names == ("01", "010", "1", "10")


def test_what_is_missing_in_json_lines_is_no_value(flat: Path, tmp_path: Path) -> None:
    """Python and pandas write it as NaN, which is no JSON."""
    rows = [{"file_name": name, "label": [1.0, float("nan"), 2.0][i % 3]} for i, name in enumerate(EVEN)]
    (flat / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="no label in metadata"):
        load_images(flat)
    assert load_images(flat, skip_bad=True).class_names == ("1", "2")
    table = tmp_path / "persons.jsonl"
    table.write_text("\n".join(json.dumps({"file_name": name, "person": float("nan")}) for name in EVEN))
    with pytest.raises(DataError, match="says no person for 5 of 5 images"):
        load_images(flat, skip_bad=True, groups=table)


@pytest.mark.parametrize("values", [["0", "10", "2"], ["0.0", "10.0", "2.0"]])
def test_numbers_are_classes_in_order(flat: Path, values: list[str]) -> None:
    (flat / "metadata.csv").write_text(csv_of({f"{i}.png": values[i % 3] for i in range(8)}))
    data = load_images(flat)
    assert data.class_names == ("0", "2", "10")


def test_images_may_lie_in_folders(flat: Path) -> None:
    root = flat.parent / "set"
    root.mkdir()
    flat.rename(root / "images")
    (root / "metadata.csv").write_text(csv_of({f"images/{name}": label for name, label in EVEN.items()}))
    assert classes_of(root) == list("abababab")


def test_images_without_a_row_and_rows_without_an_image(flat: Path) -> None:
    rows = {**EVEN, "7.png": "", "9.png": "a"}
    del rows["6.png"]
    (flat / "metadata.csv").write_text(csv_of(rows))
    with pytest.raises(DataError, match=r"2 items(.|\n)*6\.png, 7\.png: no label in metadata\.csv"):
        load_images(flat)
    with pytest.warns(UserWarning, match=r"1 row of no image here, such as '9\.png', ignored"):
        data = load_images(flat, skip_bad=True)
    assert (len(data), len(data.skipped)) == (6, 2)


def test_unusual_columns_are_never_dropped_or_guessed(flat: Path) -> None:
    path = flat / "metadata.csv"
    head, rows = "file_name,dx,patient", {name: f"{label},p{name}" for name, label in EVEN.items()}
    path.write_text(csv_of(rows, head))
    with pytest.raises(DataError, match=r"'dx' could be the labels.*--label-column"):
        load_images(flat)
    with pytest.warns(UserWarning, match="ignored columns: 'patient'"):
        assert classes_of(flat, label_column="dx") == list("abababab")
    with pytest.raises(DataError, match="has no 'sex'"):
        load_images(flat, label_column="sex")
    path.write_text(csv_of(rows, "file_name,label,class"))
    with pytest.raises(DataError, match="'label', 'class' could all be the labels"):
        load_images(flat)
    path.write_text(csv_of({name: f"text of {name}" for name in EVEN}, "file_name,text"))
    with pytest.warns(UserWarning, match="ignored columns: 'text'"):
        assert load_images(flat).labels is None


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("name of it,label\n0.png,a\n", "no column of file names"),
        ("file_name,label\n0.png,a,b\n", "3 cells"),
        ("file_name,label,label\n0.png,a,b\n", "two columns"),
        ('file_name,label\n"0.png,a\n', "damaged"),
        ("file_name,label\n0.png,a\n0.png,b\n", "'0.png' is named by several rows"),
        (csv_of(EVEN) + "9.png,a\n9.png,b\n", "'9.png' is named by several rows"),  # absent, and still unclear
        (f"file_name,label\n0.png,{'x' * 300}\n", "too long"),
        ("", "no column of file names"),
    ],
)
def test_tables_of_another_form(flat: Path, content: str, why: str) -> None:
    (flat / "metadata.csv").write_text(content)
    with pytest.raises(DataError, match=why):
        load_images(flat)


def test_tables_of_another_encoding_or_of_several_labels(flat: Path) -> None:
    (flat / "metadata.csv").write_bytes(csv_of({"0.png": "é"}).encode("latin-1"))
    with pytest.raises(DataError, match="damaged"):
        load_images(flat)
    (flat / "metadata.csv").unlink()
    (flat / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": n, "labels": [1, 2]}) for n in EVEN))
    with pytest.raises(DataError, match="several labels"):
        load_images(flat)


def test_class_folders_and_a_column_must_agree(class_folder: Path) -> None:
    rows = {f"{c}/{i}.png": c.upper() for c in ("cats", "dogs") for i in range(3)}
    (class_folder / "metadata.csv").write_text(csv_of(rows))
    assert load_images(class_folder).class_names == ("cats", "dogs")
    (class_folder / "metadata.csv").write_text(csv_of({**rows, "cats/0.png": "DOGS"}))
    with pytest.raises(DataError, match=r"sub-folders are other classes than column 'label'"):
        load_images(class_folder)
    assert classes_of(class_folder, label_column="label") == ["DOGS", "CATS", "CATS", "DOGS", "DOGS", "DOGS"]
    (class_folder / "metadata.csv").write_text(csv_of(rows, "file_name,kind"))
    with pytest.warns(UserWarning, match="ignored columns: 'kind'"):
        assert load_images(class_folder).class_names == ("cats", "dogs")


@pytest.mark.parametrize("way", ["{path}", "{name}", "{stem}", "./{path}"])
def test_a_table_that_is_named(tmp_path: Path, way: str) -> None:
    rows = {}
    for i, image in enumerate(pixels(6)):
        path = tmp_path / "photos" / f"patient{i // 2}" / f"scan{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        named = way.format(path=path.relative_to(tmp_path / "photos"), name=path.name, stem=path.stem)
        rows[named] = "ab"[i % 2]
    table = tmp_path / "labels.csv"
    table.write_text(csv_of(rows, "image_id,dx"))
    assert classes_of(tmp_path / "photos", labels=table) == list("ababab")  # there is no other column
    assert classes_of(tmp_path / "photos", labels=table, label_column="dx") == list("ababab")
    table.write_text(csv_of({name: f"{label},7" for name, label in rows.items()}, "image_id,dx,site"))
    with pytest.raises(DataError, match=r"'dx' could be the labels"):
        load_images(tmp_path / "photos", labels=table)
    assert classes_of(tmp_path / "photos", labels=table, label_column="dx") == list("ababab")
    table.write_text(csv_of({"a": "x"}, "image_id,text"))
    with pytest.raises(DataError, match="no column is called as labels are"):
        load_images(tmp_path / "photos", labels=table)


def test_names_that_several_images_have_are_unclear(class_folder: Path) -> None:
    table = class_folder.parent / "labels.csv"
    table.write_text(csv_of({f"{i}.png": "x" for i in range(3)}))
    with pytest.raises(DataError, match="could be several images"):
        load_images(class_folder, labels=table)


def test_unicode_forms_are_one_name(flat: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "sténose") for form in ("NFC", "NFD"))
    (flat / "0.png").rename(flat / f"{apart}.png")
    rows = {f"{composed}.png": apart, **{f"{i}.png": composed for i in range(1, 8)}}
    (flat / "metadata.csv").write_text(csv_of(rows), encoding="utf-8")
    assert load_images(flat).class_names == (composed,)
    other = flat.parent / "folders"
    for name in (composed, apart, "normal"):
        (other / name).mkdir(parents=True)
        Image.fromarray(pixels(1)[0]).save(other / name / "a.png")
    data = load_images(other)
    assert data.class_names == ("normal", composed)
    assert sorted(np.bincount(data.labels).tolist()) == [1, 2]


def test_decoded_images_are_made_anew_when_the_table_changes(flat: Path, tmp_path: Path) -> None:
    (flat / "metadata.csv").write_text(csv_of(EVEN))
    options: dict[str, Any] = {"cache": tmp_path / "cache"}
    assert classes_of(flat, **options) == list("abababab")
    (flat / "metadata.csv").write_text(csv_of({**EVEN, "0.png": "b"}, "file_name,label") + "9.png,a\n")
    for _ in range(2):  # what is ignored is told of from the cache, too
        with pytest.warns(UserWarning, match="1 row of no image"):
            assert classes_of(flat, **options) == list("bbababab")


def test_tables_are_for_folders_of_images(flat: Path, tmp_path: Path) -> None:
    (flat / "labels.csv").write_text(csv_of(EVEN))
    with pytest.raises(DataError, match=r"labels\.csv: not an image file by its name; if it has the labels"):
        load_images(flat)
    with pytest.raises(ValueError, match="a table is for image folders"):
        load_images("digits", labels=flat / "labels.csv")
    with pytest.raises(ValueError, match="has no columns"):
        load_images((pixels(4), [0, 1, 0, 1]), label_column="x")
    (flat / "labels.csv").rename(tmp_path / "labels.csv")
    with pytest.raises(DataError, match="there is no column 'dx'"):
        load_images(flat, label_column="dx")
    assert classes_of(flat, labels=tmp_path / "labels.csv") == list("abababab")


# ------------------------------------------------------------------------------------------------- whose image it is

NAMES = ("Ivanova", "Okonkwo", "Grünbaum")
WHOSE = {f"{i}.png": NAMES[i % 3] for i in range(8)}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("head", ["file_name,person", "file,Patient ID", "image,whatever it is called"])
def test_persons_of_a_table_become_numbers(flat: Path, tmp_path: Path, inside: bool, head: str) -> None:
    table = (flat if inside else tmp_path) / "patients.csv"
    table.write_text(csv_of(dict(reversed(WHOSE.items())), head), encoding="utf-8")
    data = load_images(flat, groups=table)
    assert data.persons is not None
    assert data.persons.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert data.images_a_person() == (3, 8)
    assert data.images_a_person(2) == (2, 6)
    assert not any(name in repr(vars(data)) for name in NAMES)
    assert data.subset([7, 2]).persons.tolist() == [1, 2]  # type: ignore[union-attr]


def test_persons_are_kept_in_no_cache_and_follow_images_that_are_left_out(flat: Path, tmp_path: Path) -> None:
    table = tmp_path / "patients.csv"
    table.write_text(csv_of({**WHOSE, "0a.png": NAMES[2]}, "file_name,person"), encoding="utf-8")
    (flat / "0a.png").write_bytes(b"broken")
    for cache in (tmp_path / "cache", tmp_path / "cache", "auto"):
        data = load_images(flat, groups=table, skip_bad=True, cache=cache)
        assert data.persons.tolist() == [0, 2, 1, 0, 2, 1, 0, 2]  # type: ignore[union-attr]
    assert load_images(flat, skip_bad=True, cache=tmp_path / "cache").persons is None
    kept = b"".join(path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert kept
    assert not any(name.encode() in kept for name in NAMES)


def test_persons_of_shards(tmp_path: Path) -> None:
    images = pixels(6)
    csv = tmp_path / "patients.csv"
    csv.write_text(csv_of({f"{i:06}.png": NAMES[i // 3] for i in range(6)}, "file_name,person"))
    tar = write_tar(tmp_path / "s.tar", samples(images))
    assert load_images(tar, groups=csv).persons.tolist() == [0, 0, 0, 1, 1, 1]  # type: ignore[union-attr]
    content = table([png(image) for image in images], [0, None, 1, 0, 1, 1])
    structs = [{"bytes": png(image), "path": f"{i:06}.png"} for i, image in enumerate(images)]
    content = content.set_column(0, content.schema.field(0), [structs])
    for source in (write_parquet(tmp_path / "t.parquet", content, 4), write_saved(tmp_path / "saved", [content])):
        data = load_images(source, groups=csv, skip_bad=True)
        assert data.persons.tolist() == [0, 0, 1, 1, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (csv_of({f"{i}.png": NAMES[0] for i in range(7)}, "file_name,person"), "no person for 1 of 8 images, such as"),
        (csv_of({**WHOSE, "3.png": ""}, "file_name,person"), "no person for 1 of 8 images"),
        (csv_of(WHOSE, "file_name,person") + f"0.png,{NAMES[2]}\n", "'0.png' is named by several rows"),
        ("file_name,age,ward\n0.png,3,Okonkwo\n", "unclear which column says whose image.* 'age', 'ward'"),
        ("number,person\n1,Okonkwo\n", "no column of file names"),
        ("0.png,Okonkwo\n1.png,Ivanova\n", "no column of file names in its first line"),
        (csv_of(WHOSE, "file_name,person") + f"0,{NAMES[2]}\n", "'0.png' is named by several rows"),
        ("", "no column of file names"),
    ],
)
def test_tables_of_persons_that_do_not_do(flat: Path, tmp_path: Path, text: str, message: str) -> None:
    csv = tmp_path / "patients.csv"
    csv.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as told:
        load_images(flat, groups=csv)
    assert not any(name in str(told.value) for name in NAMES)


def test_a_person_is_one_in_any_unicode_form_and_by_any_number(flat: Path, tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "Grünbaum") for form in ("NFC", "NFD"))
    assert composed != apart
    rows = [{"file": f"{i}.png", "person": [composed, apart + " ", 0, "0"][i % 4]} for i in range(8)]
    lines = tmp_path / "p.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in rows))
    expected = [0, 0, 1, 1, 0, 0, 1, 1]
    assert load_images(flat, groups=lines).persons.tolist() == expected  # type: ignore[union-attr]
    whose = [composed, apart, "x", "x "] * 2
    assert load_images((pixels(8), None)).with_persons(whose).persons.tolist() == expected  # type: ignore[union-attr]


def test_the_table_of_a_run_may_lie_among_other_images_and_is_not_read(flat: Path) -> None:
    """As where `evaluate --data` gets the folder that was trained on."""
    (flat / "patients.csv").write_text("no table of persons")
    settings = {"privacy": {"groups": str(flat / "patients.csv")}}
    assert len(load_private(flat, load_config(settings, preset="cpu-small"))) == len(EVEN)
    with pytest.raises(DataError, match="no column of file names"):
        load_private(flat, load_config(settings, preset="cpu-small"), groups=flat / "patients.csv")


def test_shards_of_one_name_are_told_apart(tmp_path: Path) -> None:
    csv = tmp_path / "patients.csv"
    csv.write_text("file_name,person\n0.png,a\n1.png,b\n2.png,a\n")
    for site, names in (("north", "01"), ("south", "2")):
        (tmp_path / site).mkdir()
        files = [{"bytes": png(pixels(3)[int(name)]), "path": f"{name}.png"} for name in names]
        content = table([None] * len(files))
        content = content.set_column(0, content.schema.field(0), [files])
        write_parquet(tmp_path / site / "images.parquet", content, 1)
    data = load_images(f"{tmp_path}/*/images.parquet", groups=csv)
    assert data.persons.tolist() == [0, 1, 0]


def test_images_of_one_name_in_two_shards_are_not_taken_for_one(tmp_path: Path) -> None:
    """A row could be of either: whose image it is decides what ε means."""
    csv = tmp_path / "patients.csv"
    csv.write_text("file_name,person\n0.png,Ivanova\n")
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        content = table([png(pixels(2)[shard])], [shard])
        content = content.set_column(0, content.schema.field(0), [[{"bytes": png(pixels(2)[shard]), "path": "0.png"}]])
        write_parquet(tmp_path / "shards" / f"{shard}.parquet", content, 1)
    with pytest.raises(DataError, match="could be several images"):
        load_images(tmp_path / "shards", groups=csv)


def test_images_without_file_names_have_no_persons_in_a_table(tmp_path: Path) -> None:
    csv = tmp_path / "patients.csv"
    csv.write_text(csv_of(WHOSE, "file_name,person"), encoding="utf-8")
    np.savez(tmp_path / "images.npz", images=pixels(8))
    with pytest.raises(ConfigError, match="have no file names"):
        load_images(tmp_path / "images.npz", groups=csv)
    bare = write_parquet(tmp_path / "t.parquet", pa_binary([png(image) for image in pixels(3)]))
    with pytest.raises(DataError, match="has no 'path' beside the bytes"):
        load_images(bare, groups=csv)


def pa_binary(images: list[bytes]) -> Any:
    import pyarrow as pa

    return pa.table({"image": images})
