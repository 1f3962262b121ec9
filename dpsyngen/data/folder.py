"""A folder of image files: its sub-folders are the classes, or it is flat and has no labels.

Left out without a word: dot files, ``Thumbs.db``, ``desktop.ini``, ``__MACOSX``, and the ``metadata.csv`` and
``about.json`` that this tool writes beside generated images.  Everything else that is not
a PNG, JPEG, WebP, BMP, TIFF or still GIF file is *odd* and listed as bad, because a data set with surprises
in it should be looked at once.  Symbolic links are not followed: one that leaves the folder reads files that
nobody named, and one that stays counts an image twice, while the guarantee says one image = one record.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from dpsyngen.data.labels import check_class_names
from dpsyngen.data.source import EncodedJob, Found, Item, Source, split_evenly
from dpsyngen.errors import DataError, listed, printable

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
# The last two are what `dpsyngen sample` writes beside its class folders, so that its output can be read back.
_IGNORED = frozenset({"thumbs.db", "desktop.ini", "__macosx", "metadata.csv", "about.json"})
_SPLIT_NAMES = frozenset({"train", "training", "test", "testing", "val", "valid", "validation"})
_Bad = list[tuple[str, str]]


def find_folder(root: Path, *, labels: bool) -> Found:
    """A folder of images as a source: in the order of class name, then file name (plain string order: "10" before
    "2").

    Args:
        root: the folder; each direct sub-folder is a class.  Without sub-folders the images are unlabelled.
        labels: False reads all images, in sub-folders or not, without labels.
    """

    def identity() -> Any:
        files, _, names = _listed(root, labels, [])
        digest = hashlib.sha256()
        for name in files:
            status = os.lstat(root / name)
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
        return [os.path.realpath(root), len(files), names, digest.hexdigest()]

    return Found(printable(root), "folder", identity, lambda: index_folder(root, labels=labels))


def index_folder(root: Path, *, labels: bool) -> Source:
    """What is in the folder, nothing of it opened.

    Raises:
        DataError: an empty folder or class, unless there are bad or odd files, which are told of later.
    """
    bad: list[tuple[str, str]] = []
    files, classes, class_names = _listed(root, labels, bad)
    empty = sorted(set(range(len(class_names))) - set(classes))
    if (empty or not files) and not bad:
        _raise_empty(root, [class_names[c] for c in empty], bad)
    jobs = [_FolderJob(str(root), tuple(files[r.start : r.stop])) for r in split_evenly(len(files))]
    return Source(
        printable(root),
        jobs,
        np.array(classes, dtype=np.int64) if class_names else None,
        class_names,
        lambda i: files[i],
        tuple(bad),
        empty=lambda names, left_out: _raise_empty(root, names, left_out),
    )


@dataclass(frozen=True)
class _FolderJob(EncodedJob):
    root: str
    files: tuple[str, ...]

    @property
    def count(self) -> int:
        return len(self.files)

    def items(self) -> Iterator[Item]:
        for name in self.files:
            yield os.path.join(self.root, name)


def _listed(root: Path, labels: bool, bad: _Bad) -> tuple[list[str], list[int], tuple[str, ...]]:
    try:
        files, classes, names = _list_files(root, labels=labels, bad=bad)
    except OSError as error:
        where = printable(error.filename or root)
        raise DataError(f"{where}: cannot be listed ({error.strerror}). Check its permissions.") from error
    # Texts below the root: of millions of files, paths would fill the memory.
    return [str(file.relative_to(root)) for file in files], classes, names


def _list_files(root: Path, *, labels: bool, bad: _Bad) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Image files, the class index of each, and the class names (``()`` when there are no labels)."""
    folders, top = _scan(root, root, bad)
    if not labels:
        while folders:
            inner, images = _scan(folders.pop(), root, bad)
            top += images
            folders += inner
        return sorted(top), [0] * len(top), ()
    if not folders:
        return top, [0] * len(top), ()
    bad += [(image.name, "an image beside the class folders, so it has no label") for image in top]
    files: list[Path] = []
    classes: list[int] = []
    nested = 0
    for index, folder in enumerate(folders):
        inner, images = _scan(folder, root, bad)
        nested += bool(inner)
        bad += [(str(path.relative_to(root)), "a folder inside a class folder") for path in inner]
        files += images
        classes += [index] * len(images)
    names = tuple(folder.name for folder in folders)
    check_class_names(names, str(root))
    if nested and _SPLIT_NAMES.issuperset(name.lower() for name in names):
        raise DataError(
            f"{printable(root)} holds the splits {', '.join(map(printable, names))}, not classes. "
            f"Give one of them, such as {printable(root / names[-1])}."
        )
    return files, classes, names


def _scan(folder: Path, root: Path, bad: _Bad) -> tuple[list[Path], list[Path]]:
    """Sub-folders and image files of one folder, sorted; all else that is not ignored goes to ``bad``."""
    folders: list[Path] = []
    images: list[Path] = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith(".") or entry.name.lower() in _IGNORED:
                continue
            path = folder / entry.name
            if entry.is_symlink():
                bad.append(
                    (
                        str(path.relative_to(root)),
                        "a symbolic link, which is not followed; copy the file here",
                    )
                )
            elif entry.is_dir():
                folders.append(path)
            elif not entry.is_file():  # a pipe or device would block or never end
                bad.append((str(path.relative_to(root)), "not a plain file"))
            elif path.suffix.lower() not in IMAGE_SUFFIXES:
                bad.append((str(path.relative_to(root)), "not an image file by its name"))
            else:
                images.append(path)
    return folders, images


def _raise_empty(root: Path, names: Sequence[str], bad: Sequence[tuple[str, str]]) -> NoReturn:
    if names:
        what = f"class folder{'s' if len(names) > 1 else ''} without a usable image: {listed(names)}"
        todo = "Add images, or remove the folder if the class does not exist."
    else:
        what = "no usable image in this folder"
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        todo = f"Give a folder with image files ({suffixes}) or with one sub-folder per class."
    unused = f" ({len(bad)} bad items were left out, first {printable(': '.join(bad[0]))})" if bad else ""
    raise DataError(f"{printable(root)}: {what}{unused}. {todo}")
