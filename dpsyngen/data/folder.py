"""Folders: image files in class folders, shards of Parquet, WebDataset or Arrow, and patterns that name shards.

In a folder of images the sub-folders are the classes, or a table beside the images says what they are
(:mod:`dpsyngen.data.labels`), or there are none.  Left out without a word: dot files, ``Thumbs.db``, ``desktop.ini``,
``__MACOSX``, ``DICOMDIR``, and the ``about.json`` that this tool writes beside generated images.  Everything else that
is not a PNG, JPEG, WebP, BMP, TIFF, still GIF or DICOM file is listed as bad, because a data set with surprises in it
should be looked at once.

Symbolic links in a folder are not followed: one that leaves it reads files that nobody named, and one that stays counts
an image twice, while the guarantee says one image = one record.  A pattern may match links, which it names.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpsyngen.data.cache import Cache, quiet_decoders
from dpsyngen.data.decode import Form, Item
from dpsyngen.data.dicom import count_frames, is_dicom, pictures
from dpsyngen.data.labels import (
    LABEL_NAMES,
    METADATA,
    TABLE_SUFFIXES,
    check_class_names,
    find_metadata,
    ignored,
    index_labels,
    read_label_table,
    same_name,
)
from dpsyngen.data.source import Found, Job, Options, Source, split_evenly, whole
from dpsyngen.data.tables import SPLITS, STATE, index_tables, saved_files
from dpsyngen.data.webdataset import index_tars
from dpsyngen.errors import BadImage, DataError, listed, printable, require
from dpsyngen.files import NotPlainError, open_plain

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".dcm", ".dicom"})
SHARD_SUFFIXES = (".parquet", ".tar", ".arrow")
_IGNORED = frozenset({"thumbs.db", "desktop.ini", "__macosx", "dicomdir", "about.json"})
_SPLIT = re.compile("(training|train|testing|test|validation|valid|val)(?=[-_.0-9]|$)", re.IGNORECASE)
_SPLIT_FOLDER = re.compile(_SPLIT.pattern + r"([-_. ]?(set|data|split|images|imgs|[0-9]+))*", re.IGNORECASE)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_FILES = 1_000_000
_MOST_FRAMES = 100_000  # of a file; its header may declare any number
_Bad = list[tuple[str, str]]


# ------------------------------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class _Listed:
    """What is in a folder: image files (texts below the root, as millions of paths would fill the memory), the class of
    each, the names of the classes (``()`` without labels), what cannot be used, what is ignored, and the table."""

    files: list[str]
    classes: Sequence[int] | NDArray[np.int64]
    names: tuple[str, ...]
    bad: _Bad
    ignored: tuple[str, ...] = ()
    table: Path | None = None


def find_folder(root: Path, options: Options) -> Found:
    """A folder of images as a source: in the order of class folder, then file name.

    Without labels, or with those of a table, all images are read, in sub-folders or not.  ConfigError if the cache lies
    among them.
    """

    cache = Cache(options.cache).folder
    inside = os.path.relpath(os.path.realpath(cache), os.path.realpath(root))
    allowed = "a folder outside that of the images, or a hidden one in it, as what is in it would count as images"
    require(inside != "." and inside.startswith("."), "cache", str(cache), allowed)

    def files() -> list[tuple[str, str]]:
        found = _list_folder(root, options)
        named = [(name, os.path.join(root, name)) for name in found.files]
        return named if found.table is None else [*named, *whole([found.table])]

    return Found(printable(root), ["folder", os.path.realpath(root)], files, lambda: index_folder(root, options))


def index_folder(root: Path, options: Options) -> Source:
    """The images in a folder.  An empty class is an error, unless bad files are told of later.

    None of them is opened, but where each frame is an image, which the header tells.
    """
    found = _list_folder(root, options)
    files = found.files
    used = set(np.asarray(found.classes).tolist())
    empty = [name for c, name in enumerate(found.names) if c not in used]
    if (empty or not files) and not found.bad:
        what = f"no usable image of the classes {listed(empty)}" if empty else "no usable image in this folder"
        raise DataError(
            f"{printable(root)}: {what}. Give a folder with image files ({', '.join(sorted(IMAGE_SUFFIXES))}), or with "
            "one sub-folder per class, each with images."
        )
    below = functools.partial(os.path.join, str(root))
    parts = [files[part] for part in split_evenly(len(files))]
    jobs = [Job(len(part), functools.partial(map, below, part)) for part in parts]
    index = np.array(found.classes, dtype=np.int64) if found.names else None
    # A table that the user named may lie beside the images.
    named = {path.resolve() for path in (options.label_file, options.groups, options.beside) if path is not None}
    bad, ignored = tuple(b for b in found.bad if not named or (root / b[0]).resolve() not in named), found.ignored
    source = Source(printable(root), jobs, index, found.names, lambda i: files[i], bad, ignored=ignored)
    return _by_frames(root, files, source, options.form) if options.form.frames == "all" else source


def _by_frames(root: Path, files: Sequence[str], source: Source, form: Form) -> Source:
    """A source of these files with each frame of a DICOM file as an image of its own."""
    places: list[tuple[str, int | None]] = []  # file, and frame where there are several
    which: list[int] = []
    bad = list(source.bad)
    with quiet_decoders():
        for i, name in enumerate(files):
            count = 1
            with contextlib.suppress(BadImage, NotPlainError):  # told of when it is read
                count = max(1, count_frames(os.path.join(root, name)))
            if count > (form.group_size or _MOST_FRAMES):
                why = f"{count:,} frames; at most {_MOST_FRAMES:,} are read"
                if form.group_size:
                    why = f"{count:,} frames, which are of one person, but the group size is {form.group_size:,}"
                    why += "; give a larger one with --group-size (from Python: group_size), or --most-per-person"
                bad.append((name, why))
                continue
            places += [(name, frame if count > 1 else None) for frame in range(count)]
            which += [i] * count
    parts = [tuple(places[part]) for part in split_evenly(len(places))]
    jobs = [Job(len(part), functools.partial(_frame_items, str(root), part)) for part in parts]
    labels = None if source.labels is None else source.labels[which]

    def name_of(i: int) -> str:
        file, frame = places[i]
        return file if frame is None else f"{file}, frame {frame + 1}"

    of_file = [file for file, _ in places]
    return replace(source, jobs=jobs, labels=labels, name=name_of, bad=tuple(bad), files=lambda: of_file)


def _frame_items(root: str, places: Sequence[tuple[str, int | None]]) -> Iterator[Item]:
    for name, of_file in itertools.groupby(places, key=lambda place: place[0]):
        frames = [frame for _, frame in of_file if frame is not None]
        path = os.path.join(root, name)
        yield from pictures(path, frames) if frames else [path]


def _list_folder(root: Path, options: Options) -> _Listed:
    """The images of a folder with their classes: from the table that the user named, else from class folders or the
    table in the folder, whichever there is; DataError if that is unclear.
    """
    bad: _Bad = []
    if not options.labels:
        files = _list_all(root, bad)
        return _Listed(files, [0] * len(files), (), bad)
    path = options.label_file or find_metadata(root)
    if path is None and options.label_column is not None:
        raise DataError(
            f"{printable(root)} has no {' or '.join(METADATA)}, so there is no column "
            f"{printable(options.label_column, 80)!r}. Give the table with --labels FILE, or leave the column out."
        )
    asked = options.label_file is not None or options.label_column is not None
    files, classes, names = ([], [], ()) if asked else _list_classes(root, bad)
    if path is None:
        return _Listed(files, classes, names, bad)
    folders = len(names) > 1
    table = read_label_table(path, options.label_column, needed=not folders, named=options.label_file is not None)
    unused = ignored(table.where, table.ignored, "columns")
    if options.label_file is not None and table.column is None:
        raise DataError(
            f"{table.where}: no column is called as labels are ({', '.join(LABEL_NAMES)}); there are "
            f"{listed(table.ignored)}. Say which one has them with --label-column (from Python: label_column=…)."
        )
    if table.column is None:
        return _Listed(files, classes, names, bad, unused, path)
    if names:  # as beside images that this tool has written
        labels, _ = table.of(files)
        pairs = {(c, label) for c, label in zip(classes, labels, strict=True) if label is not None}
        if pairs and len(pairs) == len({c for c, _ in pairs}) == len({label for _, label in pairs}):
            return _Listed(files, classes, names, bad, unused, path)
        if folders:
            raise DataError(
                f"{printable(root)}: the sub-folders are other classes than column {printable(table.column, 80)!r} of "
                f"{printable(path.name)} says. Use the column, with --label-column {printable(table.column, 80)} (from "
                "Python: label_column=…), or move the table elsewhere to use the folders."
            )
    bad = []
    files = _list_all(root, bad)
    labels, told = table.of(files)
    bad += [(file, f"no label in {path.name}") for file, label in zip(files, labels, strict=True) if label is None]
    files = [file for file, label in zip(files, labels, strict=True) if label is not None]
    given = [label for label in labels if label is not None]
    index, names = index_labels(given, None, len(given), table.where) if given else (None, ())
    return _Listed(files, [] if index is None else index, names, bad, (*unused, *told), path)


def _list_all(root: Path, bad: _Bad, folder: str = "") -> list[str]:
    """All image files below a folder of the root, sorted."""
    found: list[str] = []
    folders = [folder]
    while folders:
        inner, images = _scan(root, folders.pop(), bad)
        _refuse_splits(root, inner)
        found += images
        folders += inner
    return sorted(found)


def _list_classes(root: Path, bad: _Bad) -> tuple[list[str], list[int], tuple[str, ...]]:
    """Image files, the class index of each, and the class names; ``()`` for a flat folder.

    Folders whose names differ in their Unicode form alone are one class.
    """
    folders, top = _scan(root, "", bad)
    _refuse_splits(root, folders)
    if not folders:
        return top, [0] * len(top), ()
    bad += [(image, "an image beside the class folders, so it has no label") for image in top]
    names = check_class_names(list(dict.fromkeys(map(same_name, folders))), str(root))
    files: list[str] = []
    classes: list[int] = []
    for folder in folders:
        inner, images = _scan(root, folder, bad)
        for path in inner:
            others: _Bad = []
            deeper = _list_all(root, others, path)
            if deeper and all(_is_dicom(root, file) for file in deeper):  # patient, study, series
                images += deeper
                bad += others
            else:
                bad.append((path, "a folder inside a class folder"))
        files += images
        classes += [names.index(same_name(folder))] * len(images)
    return files, classes, names


def _refuse_splits(root: Path, folders: Sequence[str]) -> None:
    """Raise DataError where folders beside each other are splits: one would train on test images without a word."""
    matches = ((path, _SPLIT_FOLDER.fullmatch(os.path.basename(path))) for path in folders)
    of = {path: match.group(1).lower()[:3] for path, match in matches if match}
    if of and (len(of) == len(folders) or len(set(of.values())) > 1):
        first = min(of, key=lambda path: of[path] != "tra")
        raise DataError(
            f"{printable(root)} holds the splits {', '.join(map(printable, of))}, not classes. Give one of them, such "
            f"as {printable(root / first)}; rename the folders if they are classes."
        )


def _scan(root: Path, folder: str, bad: _Bad) -> tuple[list[str], list[str]]:
    """Sub-folders and image files of one folder, sorted; all else that is not ignored goes to `bad`."""
    folders: list[str] = []
    images: list[str] = []
    try:
        with os.scandir(root / folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        where = printable(error.filename or root)
        raise DataError(f"{where}: cannot be listed ({error.strerror}). Check its permissions.") from error
    for entry in found:
        path = os.path.join(folder, entry.name)
        if entry.name.startswith(".") or entry.name.lower() in _IGNORED or (not folder and entry.name in METADATA):
            continue
        if entry.is_symlink():
            bad.append((path, "a symbolic link, which is not followed; copy the file here"))
        elif entry.is_dir():
            folders.append(path)
        elif not entry.is_file():  # a pipe or device would block or never end
            bad.append((path, "not a plain file"))
        elif os.path.splitext(path)[1].lower() not in IMAGE_SUFFIXES and not _is_dicom(root, path):
            table = "; if it has the labels, give it with --labels" if path.lower().endswith(TABLE_SUFFIXES) else ""
            bad.append((path, f"not an image file by its name{table}"))
        else:
            images.append(path)
    return folders, images


def _is_dicom(root: Path, path: str) -> bool:
    """By its mark, as hospitals export files without a suffix."""
    try:
        with open_plain(root / path, sys.maxsize) as file:
            return is_dicom(file)
    except (OSError, NotPlainError):
        return False


# ------------------------------------------------------------------------------------------------------------- shards


def find_pattern(text: str, options: Options) -> Found | None:
    """The source that a pattern names; None if the text is none, with ``*``, ``?``, ``[…]`` or ``{0000..0099}``.

    Its files may be links: whoever wrote the pattern named them.
    """
    if not any(c in text for c in "*?[") and _RANGE.search(text) is None:
        return None
    paths = [Path(p) for pattern in _expanded(text) for p in sorted(glob.glob(os.path.expanduser(pattern)))]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise DataError(f"{printable(text)!r} matches no file. Patterns have *, ?, [0-9] or {{0000..0099}}.")
    splits = _splits(path.name for path in paths)
    told = f"{printable(text)!r} matches the splits {listed(splits)}, and the images of all of them are taken"
    return find_files(paths, printable(text), options, (told,) if len(splits) > 1 else ())


def _splits(names: Iterable[str]) -> list[str]:
    return sorted({match.group(1).lower() for name in names if (match := _SPLIT.match(name))})


def find_in_folder(folder: Path, options: Options) -> Found | None:
    """The source in a folder of shards or of ``save_to_disk``; None if it is a folder of images."""
    where = printable(folder)
    if (folder / SPLITS).is_file() or (folder / STATE).is_file():
        return find_files(saved_files(folder), where, options)
    for place in (folder, folder / "data"):  # the second as on the hub
        try:
            with os.scandir(place) as entries:
                seen = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError:
            return None
        folders = [e.name for e in seen if e.is_dir()]
        shards = [e for e in seen if Path(e.name).suffix.lower() in SHARD_SUFFIXES and not e.is_dir()]
        if shards or folders != ["data"]:
            break
    if not shards or folders or any(Path(e.name).suffix.lower() in IMAGE_SUFFIXES for e in seen):
        return None  # a folder of images, perhaps with something odd in it, which is listed
    ending = Path(shards[0].name).suffix.lower()
    linked = [e.name for e in shards if e.is_symlink()]
    if linked:
        raise DataError(
            f"{where}: links in a folder are not followed: {listed(linked, 3)}. If they are meant, name them by a "
            f"pattern: {printable(place)}/*{ending}."
        )
    splits = _splits(e.name for e in shards)
    if len(splits) > 1:
        raise DataError(
            f"{printable(place)} holds the splits {listed(splits)}. Give one of them by a pattern, such as "
            f"{printable(place)}/{splits[-1]}*{ending}."
        )
    others = [e.name for e in seen if e not in shards]
    return find_files([place / e.name for e in shards], where, options, ignored(str(place), others))


def find_files(paths: Sequence[Path], where: str, options: Options, told: tuple[str, ...] = ()) -> Found:
    """The source in these shards of one kind, in this order; `told` is of what lies beside them."""
    if len(paths) > _MOST_FILES:
        raise DataError(f"{where}: {len(paths):,} files; at most {_MOST_FILES:,} are read.")
    suffix, *others = sorted({path.suffix.lower() for path in paths})
    if others or suffix not in SHARD_SUFFIXES:
        raise DataError(
            f"{where}: files that end in {listed([suffix, *others])}. Give a pattern of files of one kind, such as "
            f"'*.parquet': {', '.join(SHARD_SUFFIXES)} are read."
        )
    read: Callable[..., Source] = index_tars if suffix == ".tar" else index_tables

    def index() -> Source:
        source = read(paths, where, labels=options.labels, label_column=options.label_column)
        return replace(source, ignored=(*source.ignored, *told))

    return Found(where, [suffix, *map(os.path.realpath, paths)], lambda: whole(paths), index)


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
