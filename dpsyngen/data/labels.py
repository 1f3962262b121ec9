"""Classes: what they may be called, the class of each image from labels of any form, and tables that say them.

Class names are public.  They end up in terminals, JSON, YAML, CSV, HTML and ``.npz`` files, and as file names where
they can be.  A name that some of these could not hold, or that would not look like what it is, is refused before
anything is trained; all others are kept to the last character, in Unicode's composed form (NFC): macOS spells file
names in another one.

Tables are ``metadata.csv`` or ``metadata.jsonl`` in a folder, as Hugging Face has it, or a file that the user names.
One column has names of image files, another one the label of each.  Names are looked up among the files of the folder:
nothing that a table says is opened.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import DataError, listed, printable
from dpsyngen.files import damaged, open_plain

MAX_CLASSES = 10_000
MAX_NAME_BYTES = 255  # in UTF-8, like file names
# Marks that make text read in another order than it is stored in.  Those that only join or separate letters, which
# several scripts need, are allowed.
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
LABEL_NAMES = ("label", "labels", "class", "cls", "target", "targets", "y", "y_train")
"""What columns, keys and arrays of labels are usually called, whatever the format."""
Label = int | str | None
METADATA = ("metadata.csv", "metadata.jsonl")
TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl")
PERSON_NAMES = ("person", "person_id", "patient", "patient_id", "patientid", "subject", "subject_id", "participant")
FILE_NAMES = ("file_name", "filename", "file", "path", "image", "image_id", "image_path", "image_name")
_MAX_BYTES = 2**29


def same_name(name: str) -> str:
    """The text in one Unicode form (NFC): Linux, Windows and Macs spell one name with different characters."""
    return unicodedata.normalize("NFC", name)


def label_name(
    names: Sequence[str],
    asked: str | None,
    usual: Sequence[str] | None,
    where: str,
    could_be: Sequence[str] = (),
) -> str | None:
    """Which of the names (of columns, keys or arrays) is that of the labels; None if none is.

    It is the one that the user `asked` for, or the first that has a `usual` name, or the only one of a name in
    :data:`LABEL_NAMES`; case, spaces and hyphens do not matter.  DataError if the one that was asked for is not there,
    or if it is unclear which is meant: several are called so, or none while some `could_be` labels.
    """
    if asked is not None:
        if asked not in names:
            raise DataError(f"{where} has no {printable(asked, 80)!r}: it has {listed(names)}.")
        return asked
    folded = {name: re.sub("[ -]+", "_", name.strip().lower()) for name in names}
    if usual is not None:
        return next((name for known in usual for name in names if folded[name] == known), None)
    found = [name for name in names if folded[name] in LABEL_NAMES]
    if len(found) == 1 or not (found or could_be):
        return next(iter(found), None)
    why = "could all be the labels" if found else "could be the labels, but no name says so"
    raise DataError(
        f"{where}: {listed(found or could_be)} {why}. Say which with --label-column (from Python: label_column=…), or "
        "train without classes: --unconditional (labels=False)."
    )


def ignored(where: str, names: Iterable[object], what: str = "beside the images") -> tuple[str, ...]:
    """What is told of names that are not used; ``()`` if there are none."""
    names = list(names)
    return (f"{printable(where)}: ignored {what}: {listed(names)}",) if names else ()


def could_be_labels(values: Sequence[object]) -> bool:
    """Whether these values, one for each image, repeat as classes do: some kinds, each of them twice on average."""
    kinds = {repr(value) for value in values if value is not None}
    return 1 < len(kinds) <= max(2, min(len(values) // 2, MAX_CLASSES))


def check_class_count(count: int, source: str) -> None:
    """Raise DataError for more than 10,000 classes."""
    if count > MAX_CLASSES:
        raise DataError(
            f"{printable(source)}: {count:,} classes; at most {MAX_CLASSES:,} are allowed, as each one is a row of "
            "weights in the network. If the labels are numbers of records or file names, leave them out (labels=False)."
        )


def check_class_names(names: Sequence[str], source: str) -> tuple[str, ...]:
    """The names in NFC; DataError unless they, from this source, can be shown, stored everywhere, and told apart."""
    check_class_count(len(names), source)
    first: dict[str, str] = {}
    for name in names:
        if why := _why_not(name):
            raise DataError(f"{printable(source)}: class name {printable(name, 80)!r} {why}. Rename the class.")
        composed = same_name(name)
        if composed in first:
            other = first[composed]
            alike = "are the same" if other == name else "look the same but are spelt with different Unicode characters"
            raise DataError(f"{printable(source)}: the class names {listed((other, name))} {alike}. Rename one.")
        first[composed] = name
    return tuple(first)


def _why_not(name: str) -> str | None:
    if not isinstance(name, str):
        return "is not text"
    if not name or name.isspace():
        return "is empty"
    # A character takes a byte at least, so a text of any length is judged without encoding all of it.
    try:
        size = len(name[: MAX_NAME_BYTES + 1].encode("utf-8"))
    except UnicodeEncodeError:
        return "is not valid Unicode (perhaps a file name that is not UTF-8)"
    if size > MAX_NAME_BYTES:
        return f"is longer than {MAX_NAME_BYTES} bytes in UTF-8"
    if any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in name):
        return "holds control characters or line breaks"
    if not _REORDERING.isdisjoint(name):
        return "holds characters that reverse the direction of reading"
    return None


def index_labels(
    labels: NDArray | Sequence[Label] | None, class_names: Sequence[str] | None, count: int, source: str
) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """The class of each image, int64 ``[N]``, and the names of the classes; (None, ()) without labels.

    Args:
        labels: whole numbers or texts, an array ``[N]`` or ``[N, 1]`` or a sequence of either kind.
        class_names: names in label order (numbers are then 0, 1, …).  Without them the distinct labels, sorted, are
            the classes and their text is their name: which values occur is then taken as public.
        count: N.
        source: for messages.

    DataError for anything else: numbers that are negative or beyond the names, say, or texts that are not among them.
    """
    if labels is None:
        return None, ()
    if isinstance(labels, np.ndarray):
        labels = _checked(_of_objects(labels, source), count, source)
        if labels.dtype.kind in "US":
            labels = to_text(labels, f"{source}: labels")
    texts = [] if isinstance(labels, np.ndarray) else [label for label in labels if isinstance(label, str)]
    if texts:
        # Looked up one by one: in an array each text would take what the longest takes.
        if len(texts) < len(labels):
            raise DataError(f"{source}: some labels are numbers, some texts. Use one kind for all images.")
        texts = [same_name(text) for text in texts]
        names = check_class_names(sorted(set(texts)) if class_names is None else class_names, source)
        rank = {name: i for i, name in enumerate(names)}
        unknown = sorted(set(texts) - set(rank))
        if unknown:
            raise DataError(f"{source}: labels {listed(unknown)} are not among the class names {listed(names)}.")
        return np.array([rank[text] for text in texts], dtype=np.int64), names
    numbers = np.asarray(labels)
    if numbers.min() < 0:
        raise DataError(f"{source}: {int((numbers < 0).sum())} labels are negative. Leave out unlabelled images.")
    if class_names is not None:
        class_names = check_class_names(class_names, source)
        if numbers.max() >= len(class_names):
            raise DataError(
                f"{source}: labels go up to {numbers.max()} but there are {len(class_names)} class names. "
                "Number the classes from 0."
            )
        return numbers.astype(np.int64), class_names
    distinct, index = np.unique(numbers, return_inverse=True)
    names = tuple(map(str, distinct.tolist()))
    check_class_names(names, source)
    return index.astype(np.int64), names


def _checked(labels: NDArray, count: int, source: str) -> NDArray:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise DataError(
            f"{source}: labels of shape {list(labels.shape)}; [N] is allowed. If rows are one-hot, give "
            "labels.argmax(1). If images have several labels, choose one finding (labels[:, k]), name each combination "
            "that matters, or leave the labels out."
        )
    if len(labels) != count:
        raise DataError(f"{source}: {count} images but {len(labels)} labels. Give one label per image.")
    if labels.dtype.kind not in "iuUS":
        raise DataError(
            f"{source}: labels of type {labels.dtype}; whole numbers or strings are allowed. "
            "Save labels.astype('int64'), after replacing missing values."
        )
    length = labels.dtype.itemsize // {"U": 4, "S": 1}.get(labels.dtype.kind, 8)
    if length > 4 * MAX_NAME_BYTES:  # in time: sorting them would fill the memory
        raise DataError(
            f"{source}: labels that are texts of {length:,} characters; class names have at most {MAX_NAME_BYTES} "
            "bytes. Use short names, or numbers with class_names."
        )
    return labels


def _of_objects(labels: NDArray, source: str) -> NDArray:
    """Labels of pandas (a column of texts, a categorical), which are arrays of objects, as texts or whole numbers."""
    if labels.dtype.kind != "O":
        return labels
    values = labels.ravel().tolist()
    missing = sum(value is None or value != value or type(value).__name__ == "NAType" for value in values)
    kinds = {type(value) for value in values}
    if missing:
        raise DataError(f"{source}: {missing:,} labels are missing. Leave out these images, or name a class for them.")
    if not (all(issubclass(k, str) for k in kinds) or all(issubclass(k, int | np.integer) for k in kinds)):
        seen = listed(sorted(kind.__name__ for kind in kinds))
        raise DataError(f"{source}: labels are of the types {seen}; texts alone or whole numbers alone are allowed.")
    if any(isinstance(value, str) and len(value) > MAX_NAME_BYTES for value in values):
        raise DataError(f"{source}: labels are texts of more than {MAX_NAME_BYTES} characters. Use short names.")
    return np.array(values).reshape(labels.shape)


def to_text(values: NDArray, what: str) -> tuple[str, ...]:
    """Whole numbers, texts or bytes (UTF-8) of an array ``[N]`` as strings; DataError if they are not Unicode."""
    try:
        if values.dtype.kind == "U" and values.dtype.itemsize and len(values):
            codes = np.ascontiguousarray(values).view(values.dtype.byteorder + "u4")
            if codes.max() > sys.maxunicode:  # numpy would make broken strings of them, which crash Python later
                raise ValueError(f"code point {codes.max():#x}")
        return tuple(v.decode("utf-8") if isinstance(v, bytes) else str(v) for v in values.tolist())
    except ValueError as error:
        raise DataError(f"{what} are not valid Unicode ({printable(error)}). Save them as UTF-8 text.") from error


# ------------------------------------------------------------------------------------------------------------- tables


def find_metadata(folder: Path) -> Path | None:
    """The table of a folder of Hugging Face ``datasets``; DataError if there are two."""
    found = [folder / name for name in METADATA if os.path.lexists(folder / name)]
    if len(found) > 1:
        raise DataError(f"{printable(folder)} holds {' and '.join(METADATA)}. Keep the one that is meant.")
    return found[0] if found else None


@dataclass(frozen=True)
class LabelTable:
    """The labels of a table."""

    where: str  # the file
    column: str | None  # name of the column of labels; None if no column holds them
    labels: Sequence[tuple[str, Label]]  # with the name of the image file, "/" in it and in NFC; None: none is given
    ignored: tuple[str, ...]  # names of columns that are not used

    def of(self, files: Sequence[str]) -> tuple[list[Label], tuple[str, ...]]:
        """The label of each file (None where the table has none), and what is told of rows without a file.

        A row names a file by its path below the folder, or by its last part, with its extension or without, if no other
        file is called so.
        """
        ways: list[dict[str, int]] = [{}, {}, {}]  # number of the file by each way of naming it; -1: of several
        for i, file in enumerate(files):
            path = same_name(file.replace(os.sep, "/"))
            base = path.rpartition("/")[2]
            for way, name in zip(ways, (path, base, os.path.splitext(base)[0]), strict=True):
                way[name] = -1 if name in way else i
        # By the number of a file, or by a name that no file here has.
        given, unused, unclear = dict[int | str, Label](), [], []
        for name, label in self.labels:
            key: int | str = next((way[name] for way in ways if name in way), name)
            if key == -1:
                unclear.append(name)
            elif given.setdefault(key, label) != label:
                which = printable(key if isinstance(key, str) else files[key])
                raise DataError(f"{self.where}: {which!r} is named by several rows, which do not agree. Keep one.")
            elif key == name:
                unused.append(name)
        if unclear:
            raise DataError(
                f"{self.where}: {listed(unclear, 3)} could be several images. Name each by its path below the folder."
            )
        rows = f"{len(unused):,} row{'s' * (len(unused) > 1)}"
        out = [given.get(i) for i in range(len(files))]
        return out, (f"{self.where}: {rows} of no image here, such as {listed(unused, 1)}, ignored",) if unused else ()


def read_label_table(path: Path, column: str | None, *, needed: bool, named: bool = False) -> LabelTable:
    """Read a table: CSV with commas, semicolons or tabs, or JSON Lines; UTF-8, at most 512 MiB.

    `column` is that of labels; None: the one that is called as usual.  If none is, but one could be meant, that is an
    error where labels are `needed`; in a table that the user `named`, a sole column beside the file names is meant.

    DataError if it is damaged, or has no column of file names; see also :func:`label_name`.
    """
    where = printable(path)
    files, columns = _read(path, "a table of labels")
    others = list(columns)
    fitting = [name for name in others if could_be_labels(columns[name])] if needed else []
    if named and column is None and fitting == others and len(others) == 1:
        column = others[0]
    chosen = label_name(others, column, None, where, could_be=fitting)
    values = [None] * len(files) if chosen is None else _labels(columns[chosen], where, chosen)
    # The second is what `dpsyngen sample` writes beside the number of a class.
    unused = [name for name in others if name != chosen and others != ["label", "class_name"]]
    return LabelTable(where, chosen, list(zip(files, values, strict=True)), tuple(unused))


def read_persons(path: Path, files: Sequence[str]) -> list[str]:
    """Whose image each of the files is, as a table of the same form says.  **Private**: names of persons.

    Their column is one of :data:`PERSON_NAMES`, or the only one beside the file names.  DataError as for
    :func:`read_label_table`, or where a file has no person; no message says what a person is called.
    """
    where = printable(path)
    names, columns = _read(path, "a table of persons", show=False)
    others = list(columns)
    column = label_name(others, None, PERSON_NAMES, where) or (others[0] if len(others) == 1 else None)
    if column is None:
        raise DataError(
            f"{where}: it is unclear which column says whose image a file is: there are {listed(others)}. Call it "
            f"{PERSON_NAMES[0]!r}."
        )
    if not any("." in os.path.basename(file) for file in files):  # as in WebDataset, and in exports of hospitals
        parts = (name.rpartition("/") for name in names)
        names = [folder + slash + base.partition(".")[0] for folder, slash, base in parts]
    persons = [None if person is None else same_name(str(person).strip()) for person in columns[column]]
    given, _ = LabelTable(where, column, list(zip(names, persons, strict=True)), ()).of(files)
    missing = [file for file, person in zip(files, given, strict=True) if not person]
    if missing:
        raise DataError(
            f"{where} says no person for {len(missing):,} of {len(files):,} images, such as {listed(missing, 3)}. Add "
            "a row for each: whether images are of one person decides what ε means."
        )
    return [str(person) for person in given]


def _read(path: Path, what: str, show: bool = True) -> tuple[list[str], dict[str, list[Any]]]:
    """The names of files, with "/" and in NFC, and the other columns by name.

    Without `show` no message quotes the first line: of a table without a line of names it is a person's.
    """
    where = printable(path)
    with damaged(path, what), open_plain(path, _MAX_BYTES) as file:
        text = file.read().decode("utf-8-sig")
        columns = _json_lines(text) if path.suffix.lower() == ".jsonl" else _separated(text)
    files = label_name(list(columns), None, FILE_NAMES, where)
    if files is None:
        seen = f": its columns are {listed(columns)}" if show else " in its first line, which names the columns"
        raise DataError(f"{where} has no column of file names{seen}. Call it {FILE_NAMES[0]!r}.")
    return [same_name(str(name).replace("\\", "/").removeprefix("./")) for name in columns.pop(files)], columns


def _separated(text: str) -> dict[str, list[Any]]:
    """Columns by name; the separator is what the first line has most of."""
    first = text.partition("\n")[0]
    found = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True)
    rows = [row for row in found if row]
    names = [name.strip() for name in rows[0]] if rows else []
    for number, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise ValueError(f"row {number} has {len(row)} cells, but there are {len(names)} columns")
    if len(set(names)) < len(names):
        raise ValueError("two columns have the same name")
    return {name: [row[i].strip() or None for row in rows[1:]] for i, name in enumerate(names)}


def _json_lines(text: str) -> dict[str, list[Any]]:
    # NaN, as Python writes what is missing, is no JSON.
    found = [json.loads(line, parse_constant=lambda _: None) for line in text.split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in found):
        raise ValueError("a line is not a JSON object")
    return {name: [row.get(name) for row in found] for name in dict.fromkeys(name for row in found for name in row)}


def _labels(values: Sequence[Any], where: str, column: str) -> list[Label]:
    """Whole numbers if all of them are, also as the text "1" or, as pandas writes them beside missing ones, "1.0"; but
    "01" is a name.
    """
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
    if all(re.fullmatch(r"(0|-?[1-9][0-9]{0,17})(\.0+)?", text) for text in given):
        return [int(text.partition(".")[0]) if text else None for text in texts]
    return [text or None for text in texts]
