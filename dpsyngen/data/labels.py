"""Classes: what they may be called, and the class of each image from labels of any form.

Class names are public.  They end up in terminals, JSON, YAML, CSV, HTML and ``.npz`` files, and as file names where
they can be.  A name that some of these could not hold, or that would not look like what it is, is refused before
anything is trained; all others are kept to the last character, in Unicode's composed form (NFC): macOS spells file
names in another one.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import DataError, listed, printable

MAX_CLASSES = 10_000
MAX_NAME_BYTES = 255  # in UTF-8, like file names
# Marks that make text read in another order than it is stored in.  Those that only join or separate letters, which
# several scripts need, are allowed.
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
LABEL_NAMES = ("label", "labels", "class", "cls", "target", "targets", "y", "y_train")
"""What columns, keys and arrays of labels are usually called, whatever the format."""
Label = int | str | None


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
    """Which of the names is that of the labels; None if none is.

    Args:
        names: of columns, keys or arrays.
        asked: the one that the user named, if any (the setting ``data.label_column``).
        usual: what it is usually called, in order; None: :data:`LABEL_NAMES`.  Case, spaces and hyphens do not matter.
        where: the source, for messages.
        could_be: those that hold what could be labels, whatever they are called.

    Raises:
        DataError: the one that was asked for is not there, or it is unclear which one is meant.
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
    bad = [(name, why) for name in names if (why := _why_not(name))]
    if bad:
        which = f"class name {printable(bad[0][0], 80)!r} {bad[0][1]}"
        more = f" ({len(bad) - 1:,} more are not allowed)" if len(bad) > 1 else ""
        raise DataError(f"{printable(source)}: {which}{more}. Rename the class.")
    first: dict[str, str] = {}
    for name in names:
        composed = unicodedata.normalize("NFC", name)
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

    Raises:
        DataError: another type or shape, a count that differs, numbers that are negative or beyond the names, texts
            that are not among them, or impossible names.
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
        one_hot = labels.ndim == 2 and labels.dtype.kind in "biuf" and bool((labels.astype(bool).sum(1) == 1).all())
        advice = (
            "These rows are one-hot: give labels.argmax(1)."
            if one_hot
            else "Here images have several labels or none, but each needs one class: choose one finding "
            "(labels[:, k]), name each combination that matters, or leave the labels out."
        )
        raise DataError(f"{source}: labels of shape {list(labels.shape)}; [N] is allowed. {advice}")
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
