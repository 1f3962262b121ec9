"""Tables that give images their labels: ``metadata.csv`` or ``metadata.jsonl`` in a folder, as Hugging Face has it, or
a file that the user names.

One column has names of image files, another one the label of each.  Names are looked up among the files of the folder:
nothing that a table says is opened.  Unicode forms do not matter: a Mac decomposes names that Linux does not.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpsyngen.data.labels import MAX_NAME_BYTES, Label, could_be_labels, label_name, same_name
from dpsyngen.errors import DataError, listed, printable
from dpsyngen.files import damaged, open_plain

METADATA = ("metadata.csv", "metadata.jsonl")
TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl")
PERSON_NAMES = ("person", "person_id", "patient", "patient_id", "patientid", "subject", "subject_id", "participant")
FILE_NAMES = ("file_name", "filename", "file", "path", "image", "image_id", "image_path", "image_name")
_MAX_BYTES = 2**29


def find_metadata(folder: Path) -> Path | None:
    """The table of a folder of Hugging Face ``datasets``; DataError if there are two."""
    found = [folder / name for name in METADATA if os.path.lexists(folder / name)]
    if len(found) > 1:
        raise DataError(f"{printable(folder)} holds {' and '.join(METADATA)}. Keep the one that is meant.")
    return found[0] if found else None


@dataclass(frozen=True)
class LabelTable:
    """The labels of a table.

    Attributes:
        where: the file.
        column: the name of the column of labels; None if no column holds them.
        labels: by name of the image file, with "/" and in NFC; None: no label is given.
        ignored: the names of columns that are not used.
    """

    where: str
    column: str | None
    labels: Mapping[str, Label]
    ignored: tuple[str, ...]

    def of(self, files: Sequence[str]) -> tuple[list[Label], tuple[str, ...]]:
        """The label of each file (None where the table has none), and what is told of rows without a file.

        A row names a file by its path below the folder, or by its last part, with its extension or without, if no other
        file is called so.

        Args:
            files: paths below the folder.
        """
        ways: list[dict[str, int]] = [{}, {}, {}]  # number of the file by each way of naming it; -1: of several
        for i, file in enumerate(files):
            path = same_name(file.replace(os.sep, "/"))
            base = path.rpartition("/")[2]
            for way, name in zip(ways, (path, base, os.path.splitext(base)[0]), strict=True):
                way[name] = -1 if name in way else i
        out: list[Label] = [None] * len(files)
        unused, unclear, given = [], [], set[int]()
        for name, label in self.labels.items():
            number = next((way[name] for way in ways if name in way), None)
            if number is None:
                unused.append(name)
            elif number < 0:
                unclear.append(name)
            elif number in given and out[number] != label:
                which = printable(files[number])
                raise DataError(f"{self.where}: {which!r} is named by several rows, which do not agree. Keep one.")
            else:
                out[number] = label
                given.add(number)
        if unclear:
            raise DataError(
                f"{self.where}: {listed(unclear, 3)} could be several images. Name each by its path below the folder."
            )
        rows = f"{len(unused):,} row{'s' * (len(unused) > 1)}"
        return out, (f"{self.where}: {rows} of no image here, such as {listed(unused, 1)}, ignored",) if unused else ()


def read_label_table(path: Path, column: str | None, *, needed: bool, named: bool = False) -> LabelTable:
    """Read a table: CSV with commas, semicolons or tabs, or JSON Lines; UTF-8.

    Args:
        path: a plain file of at most 512 MiB.
        column: the column of labels; None: the one that is called as usual ("label", "class", "target", …).
        needed: whether it is an error if no column is called so, but one could be meant.
        named: whether the user gave it as a table of labels: beside the names, a sole column is then meant.

    Raises:
        DataError: it is damaged or too large, has no column of file names, names a file twice, or it is unclear which
            column has the labels.
    """
    where = printable(path)
    files, others, rows, at = _read(path, "a table of labels")
    fitting = [name for name in others if could_be_labels([row[at[name]] for row in rows])] if needed else []
    if named and column is None and fitting == others and len(others) == 1:
        column = others[0]
    chosen = label_name(others, column, None, where, could_be=fitting)
    labels: dict[str, Label] = {}
    values = [None] * len(rows) if chosen is None else _labels([row[at[chosen]] for row in rows], where, chosen)
    for row, value in zip(rows, values, strict=True):
        name = same_name(str(row[at[files]]).replace("\\", "/").removeprefix("./"))
        if name in labels and labels[name] != value:
            raise DataError(f"{where}: {printable(name)!r} is there twice, with different labels. Keep one.")
        labels[name] = value
    # The second is what `dpsyngen sample` writes beside the number of a class.
    unused = [name for name in others if name != chosen and others != ["label", "class_name"]]
    return LabelTable(where, chosen, labels, tuple(unused))


def read_persons(path: Path, files: Sequence[str]) -> list[str]:
    """Whose image each of the files is, as a table of the same form says.  **Private**: names of persons.

    Args:
        path: the table; the column of persons is one of :data:`PERSON_NAMES`, or the only one beside the file names.
        files: paths below the folder, or names.

    Raises:
        DataError: as for :func:`read_label_table`; a file has no person.  No message says what a person is called.
    """
    where = printable(path)
    name_column, others, rows, at = _read(path, "a table of persons", show=False)
    column = label_name(others, None, PERSON_NAMES, where) or (others[0] if len(others) == 1 else None)
    if column is None:
        raise DataError(
            f"{where}: it is unclear which column says whose image a file is: there are {listed(others)}. Call it "
            f"{PERSON_NAMES[0]!r}."
        )
    persons: dict[str, Label] = {}
    bare = not any("." in os.path.basename(file) for file in files)  # as in WebDataset, and in exports of hospitals
    for row in rows:
        name = same_name(str(row[at[name_column]]).replace("\\", "/").removeprefix("./"))
        person = None if row[at[column]] is None else same_name(str(row[at[column]]).strip())
        if bare:
            folder, slash, base = name.rpartition("/")
            name = folder + slash + base.partition(".")[0]
        if persons.setdefault(name, person) != person:
            raise DataError(f"{where}: {printable(name)!r} is there twice, with different persons. Keep one.")
    given, _ = LabelTable(where, column, persons, ()).of(files)
    missing = [file for file, person in zip(files, given, strict=True) if not person]
    if missing:
        raise DataError(
            f"{where} says no person for {len(missing):,} of {len(files):,} images, such as {listed(missing, 3)}. Add "
            "a row for each: whether images are of one person decides what ε means."
        )
    return [str(person) for person in given]


def _read(path: Path, what: str, show: bool = True) -> tuple[str, list[str], list[list[Any]], dict[str, int]]:
    """The column of file names, the others, the rows, and where each column is in them.

    Without `show` no message quotes the first line: of a table without a line of names it is a person's.
    """
    where = printable(path)
    with damaged(path, what), open_plain(path, _MAX_BYTES) as file:
        text = file.read().decode("utf-8-sig")
        names, rows = _json_lines(text) if path.suffix.lower() == ".jsonl" else _separated(text)
    files = label_name(names, None, FILE_NAMES, where) if names else None
    if files is None:
        seen = f": its columns are {listed(names)}" if show else " in its first line, which names the columns"
        raise DataError(f"{where} has no column of file names{seen}. Call it {FILE_NAMES[0]!r}.")
    return files, [name for name in names if name != files], rows, {name: names.index(name) for name in names}


def _separated(text: str) -> tuple[list[str], list[list[Any]]]:
    """Names of the columns and rows; the separator is what the first line has most of."""
    first = text.partition("\n")[0]
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True))
    rows = [row for row in rows if row]
    names = [name.strip() for name in rows[0]] if rows else []
    for number, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise ValueError(f"row {number} has {len(row)} cells, but there are {len(names)} columns")
    return _distinct(names), [[cell.strip() or None for cell in row] for row in rows[1:]]


def _json_lines(text: str) -> tuple[list[str], list[list[Any]]]:
    found = [json.loads(line) for line in text.split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in found):
        raise ValueError("a line is not a JSON object")
    names = list(dict.fromkeys(name for row in found for name in row))
    return names, [[row.get(name) for name in names] for row in found]


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("two columns have the same name")
    return names


def _labels(values: Sequence[Any], where: str, column: str) -> list[Label]:
    """Whole numbers if all of them are, also as the text "1" or, as pandas writes them beside missing ones, "1.0"."""
    wrong = next((v for v in values if v is not None and not isinstance(v, str | int | float)), None)
    if wrong is not None:
        raise DataError(
            f"{where}: column {printable(column, 80)!r} holds a {type(wrong).__name__}, but a label is a whole number "
            "or a text. Where an image has several labels, choose one finding, or name each combination that matters."
        )
    texts = [None if v is None else str(v).lower() if isinstance(v, bool) else str(v) for v in values]
    given = [text for text in texts if text]
    if any(len(text) > MAX_NAME_BYTES for text in given):
        raise DataError(f"{where}: column {printable(column, 80)!r} has texts that are too long for names of classes.")
    if all(re.fullmatch(r"-?\d{1,18}(\.0+)?", text) for text in given):
        return [int(text.partition(".")[0]) if text else None for text in texts]
    return [text or None for text in texts]
