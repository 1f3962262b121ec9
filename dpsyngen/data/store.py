"""Images that lie in a file and are read when they are asked for.

Files are read, not mapped: what is read belongs to the caller alone, so memory stays what the caller holds however
many images there are, a file that another program cuts short is an error and does not end the process, and threads
and processes do not disturb one another (each read says where it begins).
"""

from __future__ import annotations

import math
import os
import weakref
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dpsyngen.data.memory import check_fits
from dpsyngen.errors import DataError, printable

_MOST_BYTES = 2**30  # of one system call; Linux reads no more than 2 GiB at a time


@runtime_checkable
class ImageStore(Protocol):
    """What :class:`~dpsyngen.data.dataset.ImageDataset` needs of images that are not an array.

    Any object with these four will do (an HDF5 or Zarr array behind a thin class, say).  Several threads may read at
    the same time.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, C, H, W)``."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """``uint8``."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, index: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        """A *fresh* array ``[B, C, H, W]`` of the images at ``index``, in time that depends on B alone.

        Args:
            index: a slice, or whole numbers ``[B]`` in ``0 .. N - 1``, in any order, also repeated.
        """


class StoredImages:
    """uint8 images in one file, row after row.

    Args:
        path: the file.
        count: N.
        row: shape of one image as it is stored: ``(C, H, W)``, or ``(H, W, C)`` with `channels_last`.
        offset: bytes before the first image.
        channels_last: whether each image is stored ``(H, W, C)``.

    Raises:
        DataError: the file cannot be opened, or is shorter than it must be.
    """

    def __init__(
        self, path: str | os.PathLike[str], count: int, row: tuple[int, int, int], *, offset: int = 0,
        channels_last: bool = False,
    ) -> None:  # fmt: skip
        self._places = (os.fspath(path), count, row, offset, channels_last)
        self.path = Path(path)
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{printable(path)} cannot be opened ({error.strerror}).") from error
        self._closed = weakref.finalize(self, os.close, self._descriptor)
        self._count, self._row, self._offset, self._channels_last = count, row, offset, channels_last
        self._row_bytes = math.prod(row)
        if os.fstat(self._descriptor).st_size < offset + count * self._row_bytes:
            raise self._cut_short()

    def __repr__(self) -> str:
        return f"StoredImages({printable(self.path)!r}, shape={self.shape})"

    def __reduce__(self) -> tuple[Any, ...]:
        path, count, row, offset, channels_last = self._places
        return _open, (path, count, row, offset, channels_last)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, C, H, W)``."""
        a, b, c = self._row
        return (self._count, c, a, b) if self._channels_last else (self._count, a, b, c)

    @property
    def dtype(self) -> np.dtype[Any]:
        """``uint8``."""
        return np.dtype(np.uint8)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        """See :meth:`ImageStore.__getitem__`.  Neighbours are read together, so sorted indices are read fastest.

        Raises:
            DataError: the file was cut short, or the disk failed.
        """
        rows = _whole_numbers(index, self._count)
        out = np.empty((len(rows), *self._row), dtype=np.uint8)
        flat = out.reshape(-1).data if len(rows) else memoryview(b"")
        ends = np.append(np.flatnonzero(np.diff(rows) != 1) + 1, len(rows)) if len(rows) else rows
        begin = 0
        for end in ends.tolist():
            self._read(flat[begin * self._row_bytes : end * self._row_bytes], int(rows[begin]))
            begin = end
        return np.ascontiguousarray(out.transpose(0, 3, 1, 2)) if self._channels_last else out

    def _read(self, into: memoryview, row: int) -> None:
        position, done = self._offset + row * self._row_bytes, 0
        while done < len(into):
            try:
                count = os.preadv(self._descriptor, [into[done : done + _MOST_BYTES]], position + done)
            except OSError as error:
                raise DataError(f"{printable(self.path)} cannot be read ({error.strerror}).") from error
            if count == 0:
                raise self._cut_short()
            done += count

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return loaded(self, str(self.path)).astype(dtype or np.uint8, copy=False)

    def _cut_short(self) -> DataError:
        return DataError(
            f"{printable(self.path)} is shorter than it must be for {self._count:,} images: it was changed or not "
            "copied whole. Copy or convert it again."
        )


class SelectedImages:
    """Some images of a store, by their numbers; nothing is copied until it is read.

    Args:
        images: what they are chosen from.
        index: int64 ``[M]`` in ``0 .. N - 1``.
    """

    def __init__(self, images: ImageStore | NDArray[np.uint8], index: NDArray[np.int64]) -> None:
        chosen: Any = images
        nested = isinstance(chosen, SelectedImages)
        self.images: ImageStore | NDArray[np.uint8] = chosen.images if nested else images
        self.index: NDArray[np.int64] = chosen.index[index] if nested else index

    @property
    def shape(self) -> tuple[int, ...]:
        """``(M, C, H, W)``."""
        return (len(self.index), *self.images.shape[1:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """``uint8``."""
        return np.dtype(np.uint8)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        """See :meth:`ImageStore.__getitem__`."""
        # np.asarray drops the class of memory maps, so that the copy is plain memory.
        return np.ascontiguousarray(np.asarray(self.images[self.index[index]]))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return loaded(self, "these images").astype(dtype or np.uint8, copy=False)


def loaded(images: ImageStore, what: str) -> NDArray[np.uint8]:
    """All images of a store in memory.

    Raises:
        DataError: they would take more than half of the memory.
    """
    check_fits(math.prod(images.shape), what=f"{what}, all of it in memory,")
    return images[slice(0, len(images))]


def is_mapped(images: object) -> bool:
    """Whether an array is, or is a view of, a memory map."""
    while isinstance(images, np.ndarray):
        if isinstance(images, np.memmap):
            return True
        images = images.base
    return False


def _whole_numbers(index: slice | NDArray[np.int64], count: int) -> NDArray[np.int64]:
    if isinstance(index, slice):
        return np.arange(*index.indices(count), dtype=np.int64)
    return np.asarray(index, dtype=np.int64)


def _open(path: str, count: int, row: tuple[int, int, int], offset: int, channels_last: bool) -> StoredImages:
    return StoredImages(path, count, row, offset=offset, channels_last=channels_last)
