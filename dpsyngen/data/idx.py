"""IDX files, the format of MNIST: ``*-images-idx3-ubyte`` with ``*-labels-idx1-ubyte`` beside it, either with
``.gz``.

Layout (big-endian): two zero bytes, the type (0x08 = unsigned byte), the number of dimensions, each dimension
as uint32, then the values.  Uncompressed image files are memory-mapped.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from dpsyngen.data.memory import check_fits
from dpsyngen.errors import DataError, printable

_UBYTE = 0x08
_READ_BYTES = 2**22
_TRAIN_IMAGES = ("train-images-idx3-ubyte", "train-images.idx3-ubyte")


def is_idx(path: Path) -> bool:
    """Whether a file (gzip-compressed or not) begins like an IDX file of unsigned bytes."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            head = stream.read(4)
    except (OSError, EOFError, zlib.error):
        return False
    return head[:3] == bytes((0, 0, _UBYTE))


def find_train_images(folder: Path) -> Path | None:
    """The IDX training images in a folder (uncompressed before ``.gz``), or None.  Links do not count: nobody named
    what they lead to."""
    candidates = (folder / (name + ending) for ending in ("", ".gz") for name in _TRAIN_IMAGES)
    return next((path for path in candidates if path.is_file() and not path.is_symlink()), None)


def labels_beside(images: Path) -> Path:
    """The label file that belongs to an image file: ``images`` → ``labels``, ``idx3`` → ``idx1``, ``.gz`` or
    not.

    Raises:
        DataError: there is none.
    """
    stem = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    endings = (".gz", "") if images.suffix == ".gz" else ("", ".gz")
    candidates = [images.with_name(stem + ending) for ending in endings]
    for path in candidates:
        if path.is_file() and path.name != images.name:
            return path
    raise DataError(
        f"{printable(images)}: no labels beside it (looked for {candidates[0].name} and "
        f"{candidates[1].name}). "
        "Put them there, or ask for images without labels (labels=False)."
    )


def read_idx_images(path: Path) -> np.ndarray:
    """Images as uint8 ``[N, H, W]``; a read-only memory map unless gzip-compressed.

    Raises:
        DataError: not IDX, not of unsigned bytes, labels instead of images, or a size that its header denies.
    """
    return _read(path, dims=3, what="images [N, H, W]")


def read_idx_labels(path: Path) -> np.ndarray:
    """Labels as uint8 ``[N]``.

    Raises:
        DataError: as :func:`read_idx_images`.
    """
    return _read(path, dims=1, what="labels [N]")


def read_idx_pair(images_path: Path, *, labels: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Images ``[N, H, W]`` and, if asked for, the labels ``[N]`` found beside them.

    Raises:
        DataError: as above, or the counts differ.
    """
    images = read_idx_images(images_path)
    if not labels:
        return images, None
    labels_path = labels_beside(images_path)
    label_values = read_idx_labels(labels_path)
    if len(images) != len(label_values):
        raise DataError(
            f"{printable(images_path)} has {len(images)} images but {printable(labels_path.name)} has "
            f"{len(label_values)} labels. They must come from the same split of the same set."
        )
    return images, label_values


def _read(path: Path, *, dims: int, what: str) -> np.ndarray:
    try:
        if path.suffix != ".gz":
            return _read_plain(path, dims, what)
        with gzip.open(path) as stream:
            shape = _shape(stream.read(4 + 4 * dims), path, dims, what)
            expected = math.prod(shape)
            check_fits(expected, what=str(path))
            # Into memory that is taken once; one byte more is enough to see that there is too much, so a gzip bomb is
            # never inflated.
            data = np.empty(expected, dtype=np.uint8)
            done = 0
            while count := stream.readinto(data.data[done : done + _READ_BYTES]):
                done += count
            too_long = bool(stream.read(1))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{printable(path)} is broken or truncated ({error}). Copy or download it again.") from error
    if done != expected or too_long:
        raise _wrong_size(path, shape)
    return data.reshape(shape)


def _read_plain(path: Path, dims: int, what: str) -> np.ndarray:
    offset = 4 + 4 * dims
    with path.open("rb") as stream:
        shape = _shape(stream.read(offset), path, dims, what)
    if path.stat().st_size != offset + math.prod(shape):
        raise _wrong_size(path, shape)
    if 0 in shape:
        # An empty file cannot be mapped; and other dimensions may be larger than any array's.
        return np.zeros((0,) * dims, dtype=np.uint8)
    return np.memmap(path, dtype=np.uint8, mode="r", offset=offset, shape=shape)


def _shape(header: bytes, path: Path, dims: int, what: str) -> tuple[int, ...]:
    if len(header) < 4 or header[:2] != b"\0\0":
        raise DataError(f"{printable(path)} is not an IDX file: it begins with {header[:4].hex(' ') or 'nothing'}.")
    if header[2] != _UBYTE:
        raise DataError(
            f"{printable(path)}: IDX values of type 0x{header[2]:02x}; only unsigned bytes (0x08) are read."
        )
    if header[3] != dims:
        kind = {1: "labels", 3: "images"}.get(header[3], "other data")
        raise DataError(
            f"{printable(path)} holds {kind} ({header[3]} dimensions) where {what} are wanted. Check the name."
        )
    if len(header) != 4 + 4 * dims:
        raise DataError(f"{printable(path)} is truncated within its header. Copy or download it again.")
    return tuple(int(n) for n in np.frombuffer(header, dtype=">u4", offset=4))


def _wrong_size(path: Path, shape: tuple[int, ...]) -> DataError:
    return DataError(
        f"{printable(path)} is truncated or has extra bytes: its header says {'×'.join(map(str, shape))} "
        "values. "
        "Copy or download it again."
    )
