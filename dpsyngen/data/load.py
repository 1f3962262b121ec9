"""One entrance for private images: a named set, a folder, an array file, an IDX file or arrays."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dpsyngen.data.arrays import dataset_from_arrays
from dpsyngen.data.dataset import ImageDataset
from dpsyngen.data.decode import check_resolution
from dpsyngen.data.folder import read_folder
from dpsyngen.data.idx import find_train_images, is_idx, read_idx_pair
from dpsyngen.data.named import parse_name, read_named, suggest
from dpsyngen.data.npz import read_npy, read_npz
from dpsyngen.errors import ConfigError, DataError
from dpsyngen.shown import printable

_KINDS = "a folder of images, a .npz or .npy file, an IDX file (-idx3-ubyte, .gz too) or a named set"


def load_images(
    source: str | os.PathLike[str] | tuple[np.ndarray, np.ndarray | None],
    *,
    resolution: int | None = None,
    channels: Literal["auto", "grey", "rgb"] = "auto",
    labels: bool = True,
    skip_bad: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> ImageDataset:
    """Read the user's private images.

    Args:
        source: one of

            * a named set: ``"digits"``, ``"fashion-mnist"``, ``"mnist"``, ``"cifar10"``, with ``":train"``
              (default), ``":test"`` or ``":all"``.  The name wins over a file or folder of that name: write
              ``"./mnist"`` (or pass a ``Path``) for the latter;
            * a folder of PNG, JPEG or WebP files (BMP, TIFF and still GIF too): sub-folders are classes, a
              flat folder has no labels.  A folder with ``train-images-idx3-ubyte`` (``.gz``) is read as IDX,
              training split;
            * a ``.npz`` (``images``, ``labels``, optional ``class_names``) or ``.npy`` file (images only);
            * an IDX image file, its labels beside it;
            * a pair of arrays ``(images, labels or None)``.
        resolution: height and width of the result, 8..256.  Images of other sizes are cut to their largest
            centred square and resized.  None: the native size if all images are one square of 8..64 pixels,
            else 32.
        channels: ``"grey"``, ``"rgb"``, or ``"auto"``: grey if every image is stored in grey.
        labels: False ignores labels (for a folder: all images below it, however nested).
        skip_bad: leave out images that cannot be used and list them in ``.skipped``, instead of raising.
            Whether an image is left out depends on that image alone, so the privacy guarantee is not touched.
        on_progress: called as ``(done, total)`` while a folder is decoded.

    Returns:
        The images.  The shape ``[C, H, W]``, the number of images and the class names are treated as
        **public** (with None and ``"auto"`` the shape follows from the images; give both to fix it
        beforehand).

    Raises:
        DataError: the images or labels cannot be read; all bad files are listed in one message.
        ConfigError: an argument has a value that is not allowed.
    """
    resolution = check_resolution(resolution)
    if channels not in ("auto", "grey", "rgb"):
        raise ConfigError(f"channels must be 'auto', 'grey' or 'rgb', not {channels!r}.")
    options: dict[str, Any] = {"resolution": resolution, "channels": channels, "skip_bad": skip_bad}

    if isinstance(source, tuple | list):
        return _from_pair(tuple(source), labels, options)
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(
            f"images must be {_KINDS}, or a pair of arrays (images, labels or None); not {type(source).__name__}."
        )
    text = os.fspath(source)
    if not text.strip():
        raise ConfigError(f"the images' source is empty; give {_KINDS}.")
    named = parse_name(text) if isinstance(source, str) else None
    if named is not None:
        images, values, names = read_named(*named)
        if not labels:
            return dataset_from_arrays(images, None, None, source=":".join(named), **options)
        return dataset_from_arrays(images, values, names, source=":".join(named), **options)

    try:
        path = Path(os.fsdecode(text)).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # too long, or below a folder that may not be entered
        raise DataError(f"{printable(text)} cannot be read ({error.strerror}). Give {_KINDS}.") from error
    except (ValueError, RuntimeError) as error:  # a null byte in the text, or ~ of nobody
        raise DataError(f"{printable(text)} cannot be a path ({printable(error)}). Give {_KINDS}.") from error
    if is_folder:
        train_images = find_train_images(path)
        if train_images is None:
            return read_folder(path, labels=labels, on_progress=on_progress, **options)
        path = train_images
    elif not is_file:
        raise DataError(_not_found(path, os.fsdecode(text)))
    return _from_file(path, labels, options)


def _from_file(path: Path, labels: bool, options: dict[str, Any]) -> ImageDataset:
    where = printable(path)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        images, values, names = read_npz(path, labels=labels)
        return dataset_from_arrays(images, values, names, source=where, **options)
    if suffix == ".npy":
        return dataset_from_arrays(read_npy(path), None, None, source=where, **options)
    if "idx" in path.name.lower() or "ubyte" in path.name.lower() or is_idx(path):
        images, values = read_idx_pair(path, labels=labels)
        return dataset_from_arrays(images, values, None, source=where, **options)
    advice = "unpack it and give the folder" if suffix in (".zip", ".tar", ".gz", ".tgz", ".7z") else f"give {_KINDS}"
    raise DataError(f"{where}: files of this kind are not read; {advice}.")


def _from_pair(pair: tuple[Any, ...], labels: bool, options: dict[str, Any]) -> ImageDataset:
    if len(pair) != 2:
        raise ConfigError(f"arrays must come as a pair (images, labels or None), not {len(pair)} items.")
    try:
        images = pair[0] if isinstance(pair[0], np.ma.MaskedArray) else np.asarray(pair[0])
        values = np.asarray(pair[1]) if labels and pair[1] is not None else None
    except (ValueError, TypeError) as error:
        raise DataError(
            f"arrays: images or labels do not form an array ({printable(error)}). Use np.stack on equal sizes."
        ) from error
    return dataset_from_arrays(images, values, None, source=f"arrays of shape {list(images.shape)}", **options)


def _not_found(path: Path, text: str) -> str:
    near: list[str] = []
    try:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.7)
    except OSError:
        pass  # a parent that cannot be listed has no suggestions to offer
    hint = f"Did you mean {printable(path.parent / near[0])}? " if near else ""
    return f"{printable(path)!r} is neither a file or folder nor a named set. {hint}{suggest(text)}"
