"""What ``Dataset.save_to_disk`` of Hugging Face datasets writes: a folder of Arrow streams and ``state.json``.

Also single ``.arrow`` files, as in the cache of that library.  Where a record batch begins is noted in one pass, so
that each can be read on its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpsyngen.data.columns import choose_columns, features_of
from dpsyngen.data.memory import check_fits
from dpsyngen.data.source import Source
from dpsyngen.data.tables import Part, check_image_type, guarded, indexed, require_arrow
from dpsyngen.errors import DataError, listed, printable
from dpsyngen.files import NotPlainError, open_plain

STATE = "state.json"
SPLITS = "dataset_dict.json"
_MAX_JSON_BYTES = 2**23


@dataclass(frozen=True)
class RecordBatch:
    """One record batch of an Arrow stream; see :class:`dpsyngen.data.tables.Part`."""

    path: str
    offset: int
    rows: int
    first: int

    def called(self, row: int) -> str:
        """``"<file>: row <number in the file>"``."""
        return f"{Path(self.path).name}: row {self.first + row}"

    def arrays(self, column: str) -> Iterator[Any]:
        """The column, whole."""
        import pyarrow as pa

        with pa.OSFile(self.path, "rb") as file:
            schema = pa.ipc.open_stream(file).schema
            file.seek(self.offset)
            yield pa.ipc.read_record_batch(pa.ipc.read_message(file), schema).column(schema.get_field_index(column))


def arrow_files(folder: Path) -> list[Path]:
    """The files of a data set that was saved to `folder`, in order.

    Raises:
        DataError: it holds several splits, or its description is damaged.
    """
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


def index_arrow(paths: Sequence[Path], where: str, *, labels: bool) -> Source:
    """The rows of all files, in their order.

    Raises:
        DataError: a file is damaged, files differ in their columns, or there is no column of images.
        ConfigError: pyarrow is missing.
    """
    pa = require_arrow("Arrow")
    columns = None
    for path in paths:
        with guarded(path, "an Arrow stream"):
            with pa.OSFile(str(path), "rb") as file:
                schema = pa.ipc.open_stream(file).schema
            features = features_of(schema.metadata, printable(path))
            found = choose_columns(schema.names, features, printable(path), labels=labels)
            check_image_type(schema.field(found.image).type, found.image, printable(path))
        if columns not in (None, found):
            raise DataError(
                f"{where}: {printable(path.name)} has other columns or class names than {printable(paths[0].name)}. "
                "Give files of one data set."
            )
        columns = found
    assert columns is not None

    def parts() -> Iterator[tuple[Part, Any]]:
        for path in paths:
            with guarded(path, "an Arrow stream"):
                yield from _batches(path, columns.label)

    return indexed(where, columns, parts())


def _batches(path: Path, label: str | None) -> Iterator[tuple[Part, Any]]:
    """The record batches of a file, each with its labels.  Of the mapped file, only headers and labels are touched."""
    import pyarrow as pa

    first = 0
    with pa.memory_map(str(path), "rb") as file:
        schema = pa.ipc.open_stream(file).schema
        while True:
            offset = file.tell()
            try:
                message = pa.ipc.read_message(file)
            except EOFError:
                return
            if message.type != "record batch":
                raise DataError(f"{printable(path)}: a {message.type} where rows were expected. Save it without them.")
            check_fits(message.body.size, what=f"{path}: a record batch")
            batch = pa.ipc.read_record_batch(message, schema)
            rows = batch.num_rows
            yield (
                RecordBatch(str(path), offset, rows, first),
                None if label is None else batch.column(schema.get_field_index(label)),
            )
            first += rows


def _json(path: Path) -> dict[str, Any]:
    try:
        with open_plain(path, _MAX_JSON_BYTES) as file:
            found = json.load(file)
    except (NotPlainError, ValueError, RecursionError) as error:
        raise DataError(f"{printable(path)} cannot be read ({printable(error)}). Save the data set again.") from error
    return found if isinstance(found, dict) else {}
