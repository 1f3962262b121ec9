"""Images that are not in memory, and how much memory others may take.

Files are read with ``pread``, not mapped: memory stays what the caller holds however many images there are, a file that
another program cuts short is an error instead of a SIGBUS that ends the process, and threads do not disturb each other.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import DataError, printable
from dpsyngen.files import memory_bytes

IMAGES, LABELS, CLASS_NAMES = "images.npy", "labels.npy", "class_names.json"
_LARGE_PIXELS = 2**22  # from which images of several processes take turns
_MOST_BYTES = 2**30  # of one system call; Linux reads no more than 2 GiB at a time
Shape = tuple[int, int, int, int]


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
        """A *fresh* array ``[B, C, H, W]`` of the images at `index`, in time that depends on B alone.

        Args:
            index: a slice, or whole numbers ``[B]`` in ``0 .. N - 1``, in any order, also repeated.
        """


class StoredImages:
    """uint8 images ``(N, C, H, W)`` in one file, row after row, the first after `offset` bytes.

    DataError if the file cannot be opened, or is shorter than it must be.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, path: str | os.PathLike[str], shape: Shape, offset: int = 0) -> None:
        self.path, self.shape, self._offset = Path(os.path.realpath(path)), shape, offset
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{printable(path)} cannot be opened ({error.strerror}).") from error
        self._closed = weakref.finalize(self, os.close, self._descriptor)
        if os.fstat(self._descriptor).st_size < offset + math.prod(shape):
            raise self._cut_short()

    def __repr__(self) -> str:
        return f"StoredImages({printable(self.path)!r}, shape={self.shape})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the file anew."""
        return StoredImages, (self.path, self.shape, self._offset)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        """See :meth:`ImageStore.__getitem__`; DataError if the file was cut short, or the disk failed."""
        rows = np.arange(*index.indices(len(self))) if isinstance(index, slice) else np.asarray(index, dtype=np.int64)
        out = np.empty((len(rows), *self.shape[1:]), dtype=np.uint8)
        if len(rows):
            size, begin, flat = math.prod(self.shape[1:]), 0, out.reshape(-1).data
            for end in [*(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]:  # runs of consecutive rows
                self._read(flat[begin * size : end * size], self._offset + int(rows[begin]) * size)
                begin = end
        return out

    def _read(self, into: memoryview, position: int) -> None:
        done = 0
        while done < len(into):
            try:
                count = os.preadv(self._descriptor, [into[done : done + _MOST_BYTES]], position + done)
            except OSError as error:
                raise DataError(f"{printable(self.path)} cannot be read ({error.strerror}).") from error
            if count == 0:
                raise self._cut_short()
            done += count

    def _cut_short(self) -> DataError:
        return DataError(
            f"{printable(self.path)} is shorter than it must be for {len(self):,} images: it was changed, or not "
            "copied whole. Copy or convert it again."
        )


class SelectedImages:
    """Some images of a store, by their numbers, int64 ``[M]`` in ``0 .. N - 1``; nothing is copied until it is read."""

    dtype = np.dtype(np.uint8)

    def __init__(self, images: ImageStore | NDArray[np.uint8], index: NDArray[np.int64]) -> None:
        chosen: Any = images
        nested = isinstance(chosen, SelectedImages)
        self.images: ImageStore | NDArray[np.uint8] = chosen.images if nested else chosen
        self.index: NDArray[np.int64] = chosen.index[index] if nested else index
        self.shape, self.path = (len(index), *chosen.shape[1:]), getattr(images, "path", None)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        """See :meth:`ImageStore.__getitem__`."""
        # np.asarray drops the class of memory maps, so that the copy is plain memory.
        return np.ascontiguousarray(np.asarray(self.images[self.index[index]]))


def write_header(file: IO[bytes], shape: tuple[int, ...]) -> int:
    """Write the header of a ``.npy`` file of uint8; returns its length."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.tell()


def is_mapped(images: object) -> bool:
    """Whether an array is, or is a view of, a memory map."""
    while isinstance(images, np.ndarray):
        if isinstance(images, np.memmap):
            return True
        images = images.base
    return False


def check_fits(num_bytes: int, *, what: str) -> None:
    """Raise DataError when `what` would take more than half of the memory.

    Call it before loading: a few bytes of a hostile file can declare terabytes.
    """
    limit = memory_bytes()[1] // 2  # the rest is for the network, the optimiser and the user's other programs
    if num_bytes > limit:
        raise DataError(
            f"{printable(what)} would take {num_bytes / 2**30:,.1f} GiB of memory; at most {limit / 2**30:,.1f} GiB "
            "(half of what is available) is allowed. If the file is sound, save its images as an uncompressed uint8 "
            ".npy file (read from disk as needed), or use a smaller resolution or a larger machine."
        )


class PixelBudget:
    """Lets threads in while the pixels that they decode stay within a total.

    A file of some kilobytes can decode to hundreds of megabytes.  One such file is bounded by the limit on pixels; this
    bounds what several of them take together.  Of the processes whose lock file `turns` is the same, one at a time
    decodes a large image.
    """

    def __init__(self, total: int) -> None:
        self.total, self._free = total, total
        self.turns: Path | None = None
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def spend(self, pixels: int) -> Iterator[None]:
        """Hold `pixels` of the total, waiting until they are free.  More than the total counts as all of it."""
        from filelock import FileLock

        pixels = min(pixels, self.total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            turns = self.turns if pixels > _LARGE_PIXELS else None
            with contextlib.nullcontext() if turns is None else FileLock(turns, mode=0o600):
                yield
        finally:
            if pixels > _LARGE_PIXELS:
                # The C library keeps what a thread freed for that thread, so eight threads would hold eight large
                # images' worth.  Other libraries than GNU's have no such function, and another policy.
                with contextlib.suppress(OSError, AttributeError):
                    ctypes.CDLL(None).malloc_trim(0)
            with self._changed:
                self._free += pixels
                self._changed.notify_all()
