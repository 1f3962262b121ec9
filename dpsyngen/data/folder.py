"""A folder of image files: its sub-folders are the classes, or it is flat and has no labels.

Left out without a word: dot files, ``Thumbs.db``, ``desktop.ini``, ``__MACOSX``, and the ``metadata.csv`` and
``about.json`` that this tool writes beside generated images.  Everything else that is not
a PNG, JPEG, WebP, BMP, TIFF or still GIF file is *odd* and listed as bad, because a data set with surprises
in it should be looked at once.  Symbolic links are not followed: one that leaves the folder reads files that
nobody named, and one that stays counts an image twice, while the guarantee says one image = one record.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from dpsyngen.class_names import check_class_names
from dpsyngen.data.bad import settle_bad
from dpsyngen.data.dataset import ImageDataset
from dpsyngen.data.decode import BadImage, Colour, ImageHeader, default_resolution, read_header, read_image
from dpsyngen.data.memory import check_fits
from dpsyngen.data.quiet import quiet_decoders
from dpsyngen.errors import DataError
from dpsyngen.shown import listed, printable

Progress = Callable[[int, int], None]
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
# The last two are what `dpsyngen sample` writes beside its class folders, so that its output can be read back.
_IGNORED = frozenset({"thumbs.db", "desktop.ini", "__macosx", "metadata.csv", "about.json"})
_SPLIT_NAMES = frozenset({"train", "training", "test", "testing", "val", "valid", "validation"})
_BLOCK = 1024  # files handed to the pool at a time, so that a million files do not queue a million futures

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_Bad = list[tuple[str, str]]


def read_folder(
    root: Path,
    *,
    resolution: int | None,
    channels: Literal["auto", "grey", "rgb"],
    labels: bool,
    skip_bad: bool,
    on_progress: Progress | None = None,
) -> ImageDataset:
    """All images of a folder, in the order of class name, then file name (plain string order: "10" before
    "2").

    Args:
        root: the folder; each direct sub-folder is a class.  Without sub-folders the images are unlabelled.
        resolution: height and width; None keeps the size if all images are one square of 8..64 pixels, else
            32.
        channels: ``"auto"`` is grey if every file is stored in grey (1, 8 or 16 bits, with or without alpha).
        labels: False reads all images, in sub-folders or not, without labels.
        skip_bad: leave bad files out and list them in ``skipped``, instead of raising.
        on_progress: called as ``(done, total)`` files while decoding.

    Raises:
        DataError: bad or odd files (all in one message), an empty folder or class, images beside the class
        folders.
    """
    bad: _Bad = []
    try:
        files, classes, class_names = _list_files(root, labels=labels, bad=bad)
    except OSError as error:
        where = printable(error.filename or root)
        raise DataError(f"{where}: cannot be listed ({error.strerror}). Check its permissions.") from error
    empty = sorted(set(range(len(class_names))) - set(classes))
    if (empty or not files) and (skip_bad or not bad):
        _raise_empty(root, [class_names[c] for c in empty], bad)

    headers: list[ImageHeader | BadImage | None] = [None] * len(files)
    if resolution is None or channels == "auto":
        headers = list(_in_pool(lambda file: _caught(read_header, file), files))
    known = [header for header in headers if isinstance(header, ImageHeader)]
    size = resolution or default_resolution({(header.width, header.height) for header in known})
    colour: Colour
    if channels == "auto":
        colour = "grey" if known and all(header.is_grey for header in known) else "rgb"
    else:
        colour = channels

    shape = (len(files), 1 if colour == "grey" else 3, size, size)
    check_fits(int(np.prod(shape)), what=f"{root} at resolution {size}")
    images = np.zeros(shape, dtype=np.uint8)
    good = np.ones(len(files), dtype=bool)

    def decode(job: tuple[Path, ImageHeader | BadImage | None]) -> np.ndarray | BadImage:
        file, header = job
        if isinstance(header, BadImage):
            return header
        return _caught(lambda path: read_image(path, resolution=size, colour=colour), file)

    for i, result in enumerate(_in_pool(decode, list(zip(files, headers, strict=True)))):
        if isinstance(result, BadImage):
            good[i] = False
            bad.append((str(files[i].relative_to(root)), str(result)))
        else:
            images[i] = result
        if on_progress is not None:
            on_progress(i + 1, len(files))

    skipped = settle_bad(sorted(bad), where=str(root), skip_bad=skip_bad)
    labels_array = np.array(classes, dtype=np.int64)
    if not good.all():
        images, labels_array = images[good], labels_array[good]
    empty = sorted(set(range(len(class_names))) - set(labels_array.tolist()))
    if empty or not len(images):
        _raise_empty(root, [class_names[c] for c in empty], bad)
    images.flags.writeable = False
    return ImageDataset(images, labels_array if class_names else None, class_names, printable(root), skipped)


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


def _caught(read: Callable[[Path], _Result], file: Path) -> _Result | BadImage:
    try:
        return read(file)
    except BadImage as error:
        return error


def _in_pool(work: Callable[[_Item], _Result], items: Sequence[_Item]) -> Iterator[_Result]:
    """``work`` of each item, in order.  Threads suffice: Pillow decodes without the interpreter lock."""
    from PIL import Image

    Image.init()  # registers the decoders once, so that the first files do not race to do it
    with quiet_decoders(), ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(items), _BLOCK):
            yield from pool.map(work, items[start : start + _BLOCK])


def _raise_empty(root: Path, names: Sequence[str], bad: Sequence[tuple[str, str]]) -> None:
    if names:
        what = f"class folder{'s' if len(names) > 1 else ''} without a usable image: {listed(names)}"
        todo = "Add images, or remove the folder if the class does not exist."
    else:
        what = "no usable image in this folder"
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        todo = f"Give a folder with image files ({suffixes}) or with one sub-folder per class."
    unused = f" ({len(bad)} bad items were left out, first {printable(': '.join(bad[0]))})" if bad else ""
    raise DataError(f"{printable(root)}: {what}{unused}. {todo}")
