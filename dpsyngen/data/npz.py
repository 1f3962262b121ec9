"""Array files: ``.npz`` (images, labels, class names) and ``.npy`` (images).  Nothing is ever unpickled."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy as np

from dpsyngen.data.bad import listed, printable
from dpsyngen.data.memory import check_fits
from dpsyngen.errors import DataError

IMAGE_KEYS = ("images", "x", "x_train", "arr_0")
LABEL_KEYS = ("labels", "y", "y_train")
NAME_KEY = "class_names"


def read_npy(path: Path) -> np.ndarray:
    """The array of a ``.npy`` file, memory-mapped read-only.

    Raises:
        DataError: broken, or it holds Python objects.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(array, np.ndarray):  # np.load goes by the content, not by the name
        array.close()
        raise DataError(f"{printable(path)} is a .npz file by its content. Rename it to end in .npz.")
    return array


def read_npz(path: Path, *, labels: bool) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...] | None]:
    """Images, labels and class names of a ``.npz`` file.  Only these are read, whatever else the file holds.

    Keys: images under ``images``, ``x``, ``x_train`` or ``arr_0``; labels under ``labels``, ``y`` or
    ``y_train``; names under ``class_names`` (strings).  The first key that is there wins.

    Raises:
        DataError: broken, without images, of Python objects, or declaring more than half of the memory.
    """
    try:
        shapes = _declared(path)
        image_key = next((key for key in IMAGE_KEYS if key in shapes), None)
        if image_key is None:
            raise DataError(
                f"{printable(path)} has no images: its keys are {listed(shapes)}. "
                f"Save them under 'images' ({listed(IMAGE_KEYS)} are known)."
            )
        label_key = next((key for key in LABEL_KEYS if labels and key in shapes), None)
        keys = [key for key in (image_key, label_key, NAME_KEY if label_key else None) if key in shapes]
        for key in keys:
            if shapes[key][1].hasobject:
                raise DataError(
                    f"{printable(path)}: '{key}' holds Python objects, which could run code when read. Save "
                    "it "
                    "as a plain array: np.stack(images) for images, np.array(names, dtype=str) for names."
                )
        check_fits(sum(_num_bytes(*shapes[key]) for key in keys), what=str(path))
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in keys}
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
    ) as error:
        if isinstance(error, DataError):
            raise
        raise _unreadable(path, error) from error
    except Exception as error:  # zlib.error and what other decompressors raise
        raise _unreadable(path, error) from error
    names = None
    if NAME_KEY in arrays:
        if arrays[NAME_KEY].ndim != 1 or arrays[NAME_KEY].dtype.kind not in "US":
            raise DataError(f"{printable(path)}: '{NAME_KEY}' must be a one-dimensional array of strings.")
        names = tuple(str(name) for name in arrays[NAME_KEY].astype(str))
    return arrays[image_key], arrays[label_key] if label_key else None, names


def _declared(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of each array in a ``.npz``, from the headers alone, so that bombs are seen in time."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                continue
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                if version == (1, 0):
                    shape, _, dtype = np.lib.format.read_array_header_1_0(member)
                else:
                    shape, _, dtype = np.lib.format.read_array_header_2_0(member)
            found[info.filename.removesuffix(".npy")] = (shape, dtype)
    return found


def _num_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    # In Python's integers, so that a hostile shape does not overflow to something small.
    return math.prod(shape) * dtype.itemsize


def _unreadable(path: Path, error: Exception) -> DataError:
    if "object" in str(error).lower():
        return DataError(
            f"{printable(path)} holds Python objects, which could run code when read. Save a plain array: "
            "np.stack(images)."
        )
    return DataError(f"{printable(path)} is broken or truncated ({printable(error)}). Save or copy it again.")
