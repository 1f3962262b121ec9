"""Parquet, and what ``Dataset.save_to_disk`` of Hugging Face datasets writes: tables with a column of image files.

The metadata of ``datasets``, where a schema has them, say which column has the images, which the labels, and what the
classes are called; without them names of columns do.  Paths in a table are not followed.  A row group of Parquet, or a
record batch of an Arrow stream, is the smallest part that can be read on its own, so it is one job.
"""

from __future__ import annotations

import functools
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.data.decode import MAX_FILE_BYTES, BadImage, Item
from dpsyngen.data.labels import LABEL_NAMES, check_class_names, could_be_labels, ignored, index_labels, label_name
from dpsyngen.data.source import Job, Source
from dpsyngen.data.store import check_fits
from dpsyngen.errors import DataError, listed, printable, require_package
from dpsyngen.files import damaged, open_plain

IMAGE_NAMES = ("image", "img")
_ROWS = 64  # of a row group that are in memory together
STATE, SPLITS = "state.json", "dataset_dict.json"
_MAX_JSON_BYTES = 2**23
_MAX_THRIFT_BYTES = 2**26  # of a text in the footer of a Parquet file
_MAX_THRIFT_ITEMS = 2**20


# ------------------------------------------------------------------------------------------------------------ columns


@dataclass(frozen=True)
class Columns:
    """The columns that are read, and what the numbers in that of labels stand for, if the table says so."""

    image: str
    label: str | None
    class_names: tuple[str, ...] | None
    unused: tuple[str, ...] = field(compare=False)


def _columns_of(schema: Any, path: Path, *, labels: bool, asked: str | None) -> Columns:
    where = printable(path)
    features = _features(schema.metadata, where)
    image = image_of(schema.names, features, where)
    if image is None:
        raise DataError(
            f"{where} has no column of images: its columns are {listed(schema.names)}. Name it 'image'; its values are "
            "the content of image files (struct of bytes and path, as Hugging Face datasets writes it, or binary)."
        )
    _check_image_type(schema.field(image).type, image, where)
    others = [name for name in schema.names if name != image]
    label = None
    if labels:
        label = label_of(others, features, asked, where, lambda: _could_be_labels(path, schema, others))
    others = [name for name in others if name != label]
    names = features[label].get("names") if label and _declared([label], features, "ClassLabel") else None
    if names is not None and not isinstance(names, list):
        raise DataError(f"{where}: the class names in its metadata are damaged. Save it again.")
    given = None if names is None else check_class_names(names, where)
    return Columns(image, label, given, tuple(others) if labels else ())


def _features(metadata: dict[bytes, bytes] | None, where: str) -> dict[str, Any]:
    """By column, a mapping with ``_type``, as ``datasets`` writes it; ``{}`` where there is none."""
    text = (metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    with damaged(where, "a table with the metadata of Hugging Face datasets"):
        if len(text) > _MAX_JSON_BYTES:
            raise ValueError("too long")
        return dict(json.loads(text)["info"]["features"].items())


def image_of(names: Sequence[str], features: dict[str, Any], where: str) -> str | None:
    """The column that Hugging Face datasets declares as "Image", or else the one of a usual name.

    DataError if several are declared, and none has a usual name.
    """
    typed = _declared(names, features, "Image")
    if len(typed) == 1:
        return typed[0]
    known = label_name(typed or names, None, IMAGE_NAMES, where)
    if known is None and typed:
        raise DataError(f"{where} has several columns of images: {listed(typed)}. Rename one to {IMAGE_NAMES[0]!r}.")
    return known


def label_of(
    names: Sequence[str],
    features: dict[str, Any],
    asked: str | None,
    where: str,
    could_be: Callable[[], Sequence[str]] = tuple,
) -> str | None:
    """The column that was asked for, or that Hugging Face datasets declares as "ClassLabel", or one of a usual name.

    DataError as of :func:`~dpsyngen.data.labels.label_name`; `could_be` is asked for columns of other names.
    """
    typed = _declared(names, features, "ClassLabel")
    if len(typed) == 1 and asked is None:
        return typed[0]
    usual = any(name in LABEL_NAMES for name in names)
    return label_name(names, asked, None, where, typed or (() if asked or usual else could_be()))


def _declared(names: Sequence[str], features: dict[str, Any], kind: str) -> list[str]:
    return [n for n in names if isinstance(features.get(n), dict) and features[n].get("_type") == kind]


def _could_be_labels(path: Path, schema: Any, names: Sequence[str]) -> list[str]:
    """The columns whose first values repeat as classes do."""
    import pyarrow.types as types

    plain = (types.is_integer, types.is_string, types.is_large_string, types.is_dictionary, types.is_boolean)
    found = []
    for name in names:
        if any(is_kind(schema.field(name).type) for is_kind in plain):
            with _guarded(path):
                array = next(iter(_arrays(path, 0, name)), None)
                if array is not None and could_be_labels(array.to_pylist()):
                    found.append(name)
    return found


def _check_image_type(kind: Any, name: str, where: str) -> None:
    import pyarrow.types as types

    inner = kind
    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        inner = kind.field(index).type if index >= 0 else None
    if inner is None or not (types.is_binary(inner) or types.is_large_binary(inner)):
        raise DataError(
            f"{where}: column {printable(name)!r} is {printable(kind, 100)}, not image files (binary, or a struct with "
            "'bytes' as Hugging Face datasets writes it). Cast it with datasets.Image(), and save it again."
        )


# -------------------------------------------------------------------------------------------------------------- files


def _guarded(path: Path) -> AbstractContextManager[None]:
    return damaged(path, "an Arrow stream" if _is_arrow(path) else "a Parquet file")


def _is_arrow(path: Path) -> bool:
    return path.suffix.lower() == ".arrow"


def _parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(
        path,
        memory_map=False,  # a file that is cut short while it is mapped ends the process
        pre_buffer=False,
        buffer_size=2**20,  # pages are read as they are needed, so a row group of any size takes little memory
        thrift_string_size_limit=_MAX_THRIFT_BYTES,
        thrift_container_size_limit=_MAX_THRIFT_ITEMS,
    )


@contextmanager
def _stream(path: Path) -> Iterator[tuple[Any, Any]]:
    """An Arrow stream, mapped, and its reader: of its record batches only what is asked for is touched."""
    import pyarrow as pa

    with pa.memory_map(str(path), "rb") as file:
        yield file, pa.ipc.open_stream(file)


def _schema(path: Path) -> Any:
    with _guarded(path):
        if _is_arrow(path):
            with _stream(path) as (_, reader):
                return reader.schema
        with _parquet(path) as table:
            return table.schema_arrow


def _parts(path: Path, label: str | None) -> Iterator[tuple[int, int, Any]]:
    """(part, rows, column of labels or None) of each row group, by its number, or record batch, by its first byte."""
    if _is_arrow(path):
        with _stream(path) as (file, reader):
            start = file.tell()
            for batch in reader:
                yield start, batch.num_rows, None if label is None else batch.column(label)
                start = file.tell()
        return
    with _parquet(path) as table:
        for group in range(table.num_row_groups):
            rows, column = table.metadata.row_group(group).num_rows, None
            if label is not None:
                check_fits(8 * rows, what=f"{path}: labels of a row group of {rows:,} rows")
                column = table.read_row_group(group, columns=[label], use_threads=False).column(0).combine_chunks()
            yield group, rows, column


def _arrays(path: Path, part: int, column: str) -> Iterator[Any]:
    """A column of one row group (some rows at a time) or of one record batch; `part` as of :func:`_parts`, or 0."""
    if _is_arrow(path):
        with _stream(path) as (file, reader):
            if part > file.tell():
                reader.read_next_batch()  # the first one, as the dictionaries of other columns come with it
                file.seek(part)
            yield reader.read_next_batch().column(column)
        return
    with _parquet(path) as table:
        for batch in table.iter_batches(_ROWS, row_groups=[part], columns=[column], use_threads=False):
            yield batch.column(0)


def saved_files(folder: Path) -> list[Path]:
    """The files of a data set that ``save_to_disk`` wrote to `folder`, in order."""
    if (folder / SPLITS).is_file():
        splits = _json(folder / SPLITS).get("splits")
        splits = [s for s in splits if isinstance(s, str)] if isinstance(splits, list) else []
        raise DataError(
            f"{printable(folder)} holds the splits {listed(splits)}. Give one of them, such as "
            f"{printable(folder / splits[0]) if splits else 'its folder'}."
        )
    entries = _json(folder / STATE).get("_data_files")
    names: list[Any] = [e.get("filename") for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []
    if not names or not all(isinstance(n, str) and n and "/" not in n and not n.startswith(".") for n in names):
        raise DataError(f"{printable(folder / STATE)} does not list the files beside it. Save the data set again.")
    paths = [folder / name for name in names]
    for path in paths:
        if path.is_symlink() or not path.is_file():
            raise DataError(f"{printable(path)} is missing, or a link, which is not followed. Copy the data set again.")
    return paths


def _json(path: Path) -> dict[str, Any]:
    with damaged(path, "a JSON file"), open_plain(path, _MAX_JSON_BYTES) as file:
        found = json.load(file)
    return found if isinstance(found, dict) else {}


# -------------------------------------------------------------------------------------------------------------- index


def index_tables(paths: Sequence[Path], where: str, *, labels: bool, label_column: str | None = None) -> Source:
    """The rows of all files, in their order; ConfigError without pyarrow."""
    require_package("pyarrow", "reading Parquet and Arrow", "parquet")
    columns = None
    for path in paths:
        found = _columns_of(_schema(path), path, labels=labels, asked=label_column)
        if columns not in (None, found):
            raise DataError(
                f"{where}: {printable(path.name)} has other columns or class names than {printable(paths[0].name)}. "
                "Give files of one data set."
            )
        columns = found
    assert columns is not None

    jobs: list[Job] = []
    values: list[Any] = []
    places: list[tuple[int, Path, NDArray[np.int64]]] = []  # first image, file, rows of it that are used, of each job
    bad: list[tuple[str, str]] = []
    done = 0
    for path in paths:
        first = 0
        with _guarded(path):
            for part, rows, column in _parts(path, columns.label):
                present = np.ones(rows, dtype=bool)
                if column is not None:
                    present, labels_of_part = _labels_of(column, columns, where)
                    values.append(labels_of_part)
                    bad += [(f"{path.name}: row {first + i}", "no label") for i in np.flatnonzero(~present).tolist()]
                if len(present) != rows:
                    raise DataError(f"{where} is damaged: {len(present):,} labels for {rows:,} rows. Copy it again.")
                if present.any():
                    places.append((done, path, first + np.flatnonzero(present)))
                    jobs.append(Job(int(present.sum()), functools.partial(_items, path, part, present, columns.image)))
                    done += jobs[-1].count
                first += rows
    if not done:
        raise DataError(f"{where}: there is no image{' with a label' if bad else ''} in it. Give at least one.")
    index: NDArray[np.int64] | None = None
    names: tuple[str, ...] = ()
    if columns.label is not None:
        whole = all(isinstance(part, np.ndarray) for part in values)
        flat = np.concatenate(values) if whole else [value for part in values for value in part]
        index, names = index_labels(flat, columns.class_names, done, where)
    starts = [start for start, *_ in places]

    def name(i: int) -> str:
        start, file, rows = places[bisect_right(starts, i) - 1]
        return f"{file.name}: row {rows[i - start]}"

    def files() -> list[str]:
        texts = {path: _paths_in(path, columns.image) for path in paths}
        return [texts[file][row] for _, file, rows in places for row in rows.tolist()]

    # A sole "index" is what `dpsyngen programs save` writes.
    told = ignored(where, () if columns.unused == ("index",) else columns.unused, "columns")
    return Source(where, jobs, index, names, name, tuple(bad), columns.class_names is None, ignored=told, files=files)


def _paths_in(path: Path, column: str) -> list[str]:
    """What the image files in a table were called, as the structs in `column` say; "" where one does not."""
    kind = _schema(path).field(column).type
    if not (hasattr(kind, "get_field_index") and any(field.name == "path" for field in kind)):
        raise DataError(
            f"{printable(path)}: column {printable(column)!r} has no 'path' beside the bytes, so a table of file names "
            "cannot say whose image a row is. Save it with datasets.Image()."
        )
    with _guarded(path):
        parts = _parts(path, column if _is_arrow(path) else f"{column}.path")
        return [str(text or "") for _, _, values in parts for text in values.field("path").to_pylist()]


def _labels_of(column: Any, columns: Columns, where: str) -> tuple[NDArray[np.bool_], NDArray[np.int64] | list[str]]:
    """(which rows have a label, those labels) of an Arrow array.

    A row without one is null, or -1 where classes have names, as in Hugging Face datasets.
    """
    import pyarrow as pa
    import pyarrow.types as types

    column.validate(full=True)
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    whole = types.is_integer(kind) or types.is_null(kind)
    if not (whole or types.is_string(kind) or types.is_large_string(kind)):
        raise DataError(
            f"{where}: column {printable(columns.label)!r} is {printable(kind, 100)}; labels are whole numbers or "
            "texts. Convert it, or ask for images without labels (labels=False)."
        )
    present = np.array(column.is_valid().to_numpy(zero_copy_only=False), dtype=bool)
    if not whole:
        return present, [value for value in column.to_pylist() if value is not None]
    numbers = column.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    if columns.class_names is not None:
        present &= numbers != -1
    return present, numbers[present]


def _items(path: Path, part: int, keep: NDArray[np.bool_], column: str) -> Iterator[Item]:
    """The images in one part of a file, of its rows those in `keep`; an error if the part cannot be read."""
    import pyarrow.types as types

    row = 0
    with _guarded(path):
        for array in _arrays(path, part, column):
            array.validate(full=True)  # offsets of a stranger's file may point anywhere in memory
            if types.is_struct(array.type):
                array = array.flatten()[array.type.get_field_index("bytes")]  # null where the struct is
            for value in array:
                if keep[row]:
                    yield _content(value)
                row += 1


def _content(value: Any) -> Item:
    buffer = value.as_buffer() if value.is_valid else None
    if buffer is None:
        return BadImage("there is no image in the table (only a path, perhaps, and paths are not followed)")
    if buffer.size > MAX_FILE_BYTES:
        return BadImage(f"{buffer.size:,} bytes: over the limit of {MAX_FILE_BYTES:,}")
    content: bytes = buffer.to_pybytes()
    return content
