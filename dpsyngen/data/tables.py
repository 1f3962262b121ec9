"""Image columns of Arrow data, whether they come from Parquet or from ``save_to_disk``."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dpsyngen.data.columns import Columns
from dpsyngen.data.decode import MAX_FILE_BYTES, BadImage
from dpsyngen.data.given_labels import index_of_labels
from dpsyngen.data.labels import MAX_NAME_BYTES
from dpsyngen.data.source import EncodedJob, Item, Source
from dpsyngen.errors import ConfigError, DataError, DpsyngenError, printable


def require_arrow(what: str) -> Any:
    """The package pyarrow.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import pyarrow
    except ImportError:
        raise ConfigError(
            f"{what} is read with pyarrow, which is not installed: pip install 'dpsyngen[parquet]'."
        ) from None
    return pyarrow


@contextmanager
def guarded(path: Path, what: str) -> Iterator[None]:
    """Make a DataError of whatever a damaged file has pyarrow raise, which is nearly anything."""
    try:
        yield
    except DpsyngenError:
        raise
    except Exception as error:
        raise DataError(
            f"{printable(path)} is not {what}, or is damaged ({printable(error)}). Copy or save it again."
        ) from error


def check_image_type(kind: Any, name: str, where: str) -> None:
    """Raise DataError unless the Arrow type is binary, or a struct with binary ``bytes``."""
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


def images_of(column: Any) -> Iterator[Item]:
    """The image files in an Arrow array."""
    import pyarrow.types as types

    column.validate(full=True)  # offsets of a stranger's file may point anywhere in memory
    if types.is_struct(column.type):
        column = column.flatten()[column.type.get_field_index("bytes")]  # null where the struct is
    for value in column:
        buffer = value.as_buffer() if value.is_valid else None
        if buffer is None:
            yield BadImage("there is no image in the table (only a path, perhaps, and paths are not followed)")
        elif buffer.size > MAX_FILE_BYTES:
            yield BadImage(f"{buffer.size:,} bytes: over the limit of {MAX_FILE_BYTES:,}")
        else:
            yield buffer.to_pybytes()


class Labels:
    """Labels of a table, collected part by part.

    Args:
        columns: which column they are in, and the names of the classes.
        where: the source, for messages.
    """

    def __init__(self, columns: Columns, where: str) -> None:
        self.columns, self.where = columns, where
        self._parts: list[np.ndarray | list[str]] = []

    def add(self, column: Any) -> NDArray[np.bool_]:
        """Take in an Arrow array; which of its rows have a label.

        A row without one is null, or -1 where classes have names, as in Hugging Face datasets.

        Raises:
            DataError: the labels are neither whole numbers nor texts.
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
                f"{self.where}: column {printable(self.columns.label)!r} is {printable(kind, 100)}; labels are whole "
                "numbers or texts. Convert it, or ask for images without labels (labels=False)."
            )
        present = np.array(column.is_valid().to_numpy(zero_copy_only=False), dtype=bool)
        if not whole:
            values = [value for value in column.to_pylist() if value is not None]
            if any(not 0 < len(value) <= MAX_NAME_BYTES for value in values):
                raise DataError(f"{self.where}: a label is empty, or too long for the name of a class.")
            self._parts.append(values)
            return present
        numbers = column.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
        if self.columns.class_names is not None:
            present &= numbers != -1
        self._parts.append(numbers[present])
        return present

    def index(self) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
        """Class of each row that has a label, and the names of the classes."""
        if all(isinstance(part, np.ndarray) for part in self._parts):
            return index_of_labels(np.concatenate(self._parts), self.columns.class_names, self.where)
        texts = [value for part in self._parts for value in (part.tolist() if isinstance(part, np.ndarray) else part)]
        return index_of_labels(texts, self.columns.class_names, self.where)


def indexed(
    where: str,
    columns: Columns,
    parts: Iterable[tuple[Part, Any]],
) -> Source:
    """The index of a table.

    Args:
        where: what was asked for.
        columns: see :func:`dpsyngen.data.columns.choose_columns`.
        parts: its parts in order, each with its column of labels (None without labels).

    Raises:
        DataError: there is no row, or labels cannot be used.
    """
    labels = None if columns.label is None else Labels(columns, where)
    jobs: list[TableJob] = []
    bad: list[tuple[str, str]] = []
    places: list[tuple[int, Part, NDArray[np.int64] | None]] = []  # first image, part, rows that are used
    done = 0
    for part, column in parts:
        if labels is None:
            job = TableJob(part, None, columns.image)
        else:
            if len(column) != part.rows:
                raise DataError(f"{where} is damaged: {len(column):,} labels for {part.rows:,} rows. Copy it again.")
            with guarded(Path(part.path), "what it was"):
                present = labels.add(column)
            job = TableJob(part, None if present.all() else present, columns.image)
            bad += [(part.called(row), "no label") for row in np.flatnonzero(~present).tolist()]
        if job.count:
            jobs.append(job)
            places.append((done, part, None if job.keep is None else np.flatnonzero(job.keep)))
            done += job.count
    if not done:
        raise DataError(f"{where}: there is no image{' with a label' if bad else ''} in it. Give at least one.")
    index, names = (None, ()) if labels is None else labels.index()
    starts = [start for start, _, _ in places]

    def name(i: int) -> str:
        start, part, rows = places[bisect_right(starts, i) - 1]
        return part.called(i - start if rows is None else int(rows[i - start]))

    return Source(where, jobs, index, names, name, tuple(bad), every_class=columns.class_names is None)


class Part(Protocol):
    """Consecutive rows of a file that are read together."""

    @property
    def path(self) -> str:
        """The file."""

    @property
    def rows(self) -> int:
        """How many."""

    def called(self, row: int) -> str:
        """What a row is called in messages."""

    def arrays(self, column: str) -> Iterator[Any]:
        """The column as Arrow arrays, together of ``rows`` rows."""


@dataclass(frozen=True)
class TableJob(EncodedJob):
    """The images in one part; of its rows those in `keep`, or all."""

    part: Part
    keep: NDArray[np.bool_] | None
    column: str

    @property
    def count(self) -> int:
        """How many images."""
        return self.part.rows if self.keep is None else int(self.keep.sum())

    def items(self) -> Iterator[Item]:
        """See :class:`EncodedJob`.  A part that cannot be read is an error, as its rows cannot be told apart."""
        row = 0
        with guarded(Path(self.part.path), "what it was"):
            for array in self.part.arrays(self.column):
                for item in images_of(array):
                    if self.keep is None or self.keep[row]:
                        yield item
                    row += 1
