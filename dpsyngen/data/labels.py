"""What a class may be called.

Class names are public.  They end up in terminals, JSON, YAML, CSV, HTML and ``.npz`` files, and so as file names where
they can be.  A name that some of these could not hold, or that would not look like what it is, is refused while nothing
is trained yet; all others are kept as they are, to the last character.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from dpsyngen.errors import DataError, listed, printable

MAX_CLASSES = 10_000
MAX_NAME_BYTES = 255  # in UTF-8, like file names
# Marks that make text read in another order than it is stored in.  Those that only join or separate letters, which
# several scripts need, are allowed.
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def check_class_count(count: int, source: str) -> None:
    """Raise DataError for more than 10,000 classes."""
    if count > MAX_CLASSES:
        raise DataError(
            f"{printable(source)}: {count:,} classes; at most {MAX_CLASSES:,} are allowed, as each one is a row of "
            "weights in the network. If the labels are numbers of records or file names, leave them out (labels=False)."
        )


def check_class_names(names: Sequence[str], source: str) -> None:
    """Raise DataError unless these names can be shown and stored everywhere, and told apart.

    Args:
        names: one for each class.
        source: where they come from, for the message.
    """
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
