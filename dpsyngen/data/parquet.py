"""Parquet files with a column of images, as Hugging Face datasets has them on disk and on its hub.

A row group is the smallest part that can be read on its own, so it is one job.  Files with row groups of some hundred
rows, which ``datasets`` writes, are decoded on all cores; one row group of a million rows is decoded on one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpsyngen.data.columns import choose_columns, features_of
from dpsyngen.data.memory import check_fits
from dpsyngen.data.source import BLOCK, Source
from dpsyngen.data.tables import Part, check_image_type, guarded, indexed, require_arrow
from dpsyngen.errors import DataError, printable

_MAX_THRIFT_BYTES = 2**26  # of a text in a footer
_MAX_THRIFT_ITEMS = 2**20
_BUFFER_BYTES = 2**20


@dataclass(frozen=True)
class RowGroup:
    """One row group of a Parquet file; see :class:`dpsyngen.data.tables.Part`."""

    path: str
    group: int
    rows: int
    first: int

    def called(self, row: int) -> str:
        """``"<file>: row <number in the file>"``."""
        return f"{Path(self.path).name}: row {self.first + row}"

    def arrays(self, column: str) -> Iterator[Any]:
        """The column, a few rows at a time."""
        with _opened(Path(self.path)) as file:
            for batch in file.iter_batches(BLOCK, row_groups=[self.group], columns=[column], use_threads=False):
                yield batch.column(0)


def index_parquet(paths: Sequence[Path], where: str, *, labels: bool) -> Source:
    """The rows of all files, in their order.

    Raises:
        DataError: a file is damaged, files differ in their columns, or there is no column of images.
        ConfigError: pyarrow is missing.
    """
    require_arrow("Parquet")
    columns = None
    for path in paths:
        with guarded(path, "a Parquet file"), _opened(path) as file:
            schema = file.schema_arrow
            found = choose_columns(
                schema.names, features_of(schema.metadata, printable(path)), printable(path), labels=labels
            )
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
            first = 0
            with guarded(path, "a Parquet file"), _opened(path) as file:
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    values = None
                    if columns.label is not None:
                        check_fits(8 * rows, what=f"{path}: labels of a row group of {rows:,} rows")
                        table = file.read_row_group(group, columns=[columns.label], use_threads=False)
                        values = table.column(0).combine_chunks()
                    yield RowGroup(str(path), group, rows, first), values
                    first += rows

    return indexed(where, columns, parts())


def _opened(path: Path) -> Any:
    import pyarrow.parquet as pq

    # Not mapped: a file that is cut short while it is mapped ends the process.
    return pq.ParquetFile(
        path,
        memory_map=False,
        pre_buffer=False,
        buffer_size=_BUFFER_BYTES,  # pages are read as they are needed, so a row group of any size takes little memory
        thrift_string_size_limit=_MAX_THRIFT_BYTES,
        thrift_container_size_limit=_MAX_THRIFT_ITEMS,
    )
