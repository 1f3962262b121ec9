"""Which files a path, a folder or a pattern means: Parquet, WebDataset and Arrow come in one file or in many shards."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from dpsyngen.data.arrow import SPLITS, STATE, arrow_files, index_arrow
from dpsyngen.data.folder import IMAGE_SUFFIXES
from dpsyngen.data.parquet import index_parquet
from dpsyngen.data.source import Found, Source, file_identity
from dpsyngen.data.webdataset import index_tars
from dpsyngen.errors import DataError, listed, printable

SUFFIXES = (".parquet", ".tar", ".arrow")
_KINDS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}
_MOST_FILES = 1_000_000
_SPLIT = re.compile(r"(train|training|test|testing|val|valid|validation)(?=[-_.0-9])", re.IGNORECASE)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_pattern(text: str) -> bool:
    """Whether a path that does not exist may be a pattern: ``*``, ``?``, ``[…]`` or ``{0000..0099}``."""
    return any(c in text for c in "*?[") or _RANGE.search(text) is not None


def find_pattern(text: str, *, labels: bool) -> Found:
    """The source that a pattern names.  Its files may be links: whoever wrote the pattern named them.

    Raises:
        DataError: no file, or files of several kinds.
    """
    paths = [Path(p) for pattern in _expanded(text) for p in sorted(glob.glob(os.path.expanduser(pattern)))]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise DataError(f"{printable(text)!r} matches no file. Patterns have *, ?, [0-9] or {{0000..0099}}.")
    kinds = sorted({path.suffix.lower() for path in paths})
    if len(kinds) > 1 or kinds[0] not in SUFFIXES:
        raise DataError(
            f"{printable(text)!r} matches files that end in {listed(kinds)}; a pattern names files of one kind, one "
            f"of {', '.join(SUFFIXES)}."
        )
    return find_files(paths, kinds[0], printable(text), labels=labels)


def find_in_folder(folder: Path, *, labels: bool) -> Found | None:
    """The source in a folder of shards or of ``save_to_disk``; None if it is a folder of images.

    Raises:
        DataError: shards of several splits or kinds, or links to shards.
    """
    where = printable(folder)
    if (folder / SPLITS).is_file() or (folder / STATE).is_file():
        return find_files(arrow_files(folder), ".arrow", where, labels=labels)
    for place in (folder, folder / "data"):  # the second as on the hub
        try:
            with os.scandir(place) as entries:
                seen = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError:
            return None
        folders = [e.name for e in seen if e.is_dir()]
        shards = [e for e in seen if Path(e.name).suffix.lower() in SUFFIXES and not e.is_dir()]
        if shards:
            break
        if folders != ["data"] or place != folder:
            return None
    images = any(Path(e.name).suffix.lower() in IMAGE_SUFFIXES for e in seen)
    if folders or images:
        return None  # a folder of images with something odd in it, which is listed
    kinds = sorted({Path(e.name).suffix.lower() for e in shards})
    if len(kinds) > 1:
        raise DataError(
            f"{where} holds files that end in {listed(kinds)}. Give a pattern, such as {where}/*{kinds[0]}."
        )
    linked = [e.name for e in shards if e.is_symlink()]
    if linked:
        raise DataError(
            f"{where}: {listed(linked, 3)} {'is a link' if len(linked) == 1 else 'are links'}, and links in a folder "
            f"are not followed. If they are meant, name them by a pattern: {printable(place)}/*{kinds[0]}."
        )
    _refuse_splits([e.name for e in shards], place, kinds[0])
    return find_files([place / e.name for e in shards], kinds[0], where, labels=labels)


def find_files(paths: Sequence[Path], suffix: str, where: str, *, labels: bool) -> Found:
    """The source in these files, in this order."""
    if len(paths) > _MOST_FILES:
        raise DataError(f"{where}: {len(paths):,} files; at most {_MOST_FILES:,} are read.")

    def index() -> Source:
        if suffix == ".parquet":
            return index_parquet(paths, where, labels=labels)
        if suffix == ".arrow":
            return index_arrow(paths, where, labels=labels)
        return index_tars(paths, where, labels=labels)

    return Found(where, _KINDS[suffix], lambda: file_identity(paths), index)


def _refuse_splits(names: Sequence[str], folder: Path, suffix: str) -> None:
    found = {match.group(1).lower() for name in names if (match := _SPLIT.match(name))}
    if len(found) > 1:
        one = sorted(found)[-1]
        raise DataError(
            f"{printable(folder)} holds the splits {listed(sorted(found))}. Give one of them by a pattern, such as "
            f"{printable(folder)}/{one}*{suffix}."
        )


def _expanded(text: str) -> list[str]:
    match = _RANGE.search(text)
    if match is None:
        return [text]
    first, last = match.groups()
    count = int(last[:12]) - int(first[:12]) + 1
    if not 0 < count <= _MOST_FILES:
        raise DataError(f"{printable(text)!r}: a range of {count:,} files; 1 to {_MOST_FILES:,} are allowed.")
    return [
        whole
        for i in range(int(first), int(last) + 1)
        for whole in _expanded(f"{text[: match.start()]}{i:0{len(first)}d}{text[match.end() :]}")
    ]
