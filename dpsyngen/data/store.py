"""Images that lie in a file: reading them by their numbers, and the private cache of decoded images.

Files are read with ``pread``, not mapped: memory stays what the caller holds however many images there are, a file that
another program cuts short is an error instead of a SIGBUS that ends the process, and threads do not disturb each other.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import DataError, printable
from dpsyngen.files import write_text

FORMAT = "dpsyngen-image-cache-2"
IMAGES, LABELS, CLASS_NAMES = "images.npy", "labels.npy", "class_names.json"
_MOST_BYTES = 2**30  # of one system call; Linux reads no more than 2 GiB at a time
_SPARE_BYTES = 2**24  # on the disk, for labels and other programs
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Shape = tuple[int, int, int, int]


# ---------------------------------------------------------------------------------------------------- images in files


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


class _Stored:
    """Attributes that stores have in common."""

    shape: Any
    dtype = np.dtype(np.uint8)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return loaded(self, "these images").astype(dtype or np.uint8, copy=False)  # type: ignore[arg-type]


class StoredImages(_Stored):
    """uint8 images ``(N, C, H, W)`` in one file, row after row.

    Args:
        path: the file.
        shape: of all images.
        offset: bytes before the first image.

    Raises:
        DataError: the file cannot be opened, or is shorter than it must be.
    """

    def __init__(self, path: str | os.PathLike[str], shape: Shape, offset: int = 0) -> None:
        self.path, self.shape, self._offset = Path(path), shape, offset
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

    def __getitem__(self, index: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        """See :meth:`ImageStore.__getitem__`.  Neighbours are read together, so sorted indices are read fastest.

        Raises:
            DataError: the file was cut short, or the disk failed.
        """
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


class SelectedImages(_Stored):
    """Some images of a store, by their numbers; nothing is copied until it is read.

    Args:
        images: what they are chosen from.
        index: int64 ``[M]`` in ``0 .. N - 1``.
    """

    def __init__(self, images: ImageStore | NDArray[np.uint8], index: NDArray[np.int64]) -> None:
        chosen: Any = images
        if isinstance(chosen, SelectedImages):
            chosen, index = chosen.images, chosen.index[index]
        self.images: ImageStore | NDArray[np.uint8] = chosen
        self.index = index
        self.shape = (len(index), *chosen.shape[1:])

    def __getitem__(self, index: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        """See :meth:`ImageStore.__getitem__`."""
        # np.asarray drops the class of memory maps, so that the copy is plain memory.
        return np.ascontiguousarray(np.asarray(self.images[self.index[index]]))


def kept_of(images: Any, keep: NDArray[np.bool_]) -> Any:
    """The images of an array (a copy) or a store (a view) where `keep` ``[N]`` is true; all of them as they are."""
    if keep.all():
        return images
    return images[keep] if isinstance(images, np.ndarray) else SelectedImages(images, np.flatnonzero(keep))


def is_mapped(images: object) -> bool:
    """Whether an array is, or is a view of, a memory map."""
    while isinstance(images, np.ndarray):
        if isinstance(images, np.memmap):
            return True
        images = images.base
    return False


# ------------------------------------------------------------------------------------------------------------- memory


def available_bytes() -> int:
    """Memory that a new program could use without swapping (Linux), or the machine's memory elsewhere."""
    with contextlib.suppress(OSError, ValueError), open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 8 * 2**30


def check_fits(num_bytes: int, *, what: str) -> None:
    """Raise DataError when `what` would take more than half of the memory.

    Call it before loading: a few bytes of a hostile file can declare terabytes.
    """
    limit = available_bytes() // 2  # the rest is for the network, the optimiser and the user's other programs
    if num_bytes > limit:
        raise DataError(
            f"{printable(what)} would take {num_bytes / 2**30:,.1f} GiB of memory; at most {limit / 2**30:,.1f} GiB "
            "(half of what is available) is allowed. If the file is sound, save its images as an uncompressed uint8 "
            ".npy file (read from disk as needed), or use a smaller resolution or a larger machine."
        )


def loaded(images: ImageStore, what: str) -> NDArray[np.uint8]:
    """All images of a store in memory.

    Raises:
        DataError: they would take more than half of the memory.
    """
    check_fits(math.prod(images.shape), what=f"{what}, all of it in memory,")
    return images[slice(0, len(images))]


# -------------------------------------------------------------------------------------------------------------- cache


def digest_of(*parts: Any) -> str:
    """A name for what these JSON-able values describe."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Entry:
    """Decoded images in the cache: the good ones, int64 labels ``[N]``, class names, and what was left out."""

    images: ImageStore
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """The file of an entry that is being made; images are written to it by number.

    Attributes:
        path: ``images.npy`` in a folder of its own.
        shape: of all images, ``(N, C, H, W)``, those included that turn out bad.
        offset: bytes before the first image.
    """

    path: Path
    shape: Shape
    offset: int

    def write(self, row: int, images: NDArray[np.uint8]) -> None:
        """Write contiguous images ``[B, C, H, W]`` from number `row` on; several processes may do so at a time."""
        with open(self.path, "r+b") as file:
            file.seek(self.offset + row * math.prod(self.shape[1:]))
            file.write(images.data)

    def images(self) -> StoredImages:
        """The images, to be read."""
        return StoredImages(self.path, self.shape, self.offset)


class Cache:
    """A folder of decoded private images: folders of mode 0700, files of mode 0600.

    An entry is named by a digest of its source's files (paths, sizes, times) and of the options.  It is made under
    another name and renamed when it is whole; one that was interrupted is removed and starts again.

    Args:
        folder: None: ``$DPSYNGEN_CACHE``, else ``$XDG_CACHE_HOME/dpsyngen/images``, else ``~/.cache/dpsyngen/images``.
            It is made when something is to be written.
    """

    def __init__(self, folder: Path | None = None) -> None:
        own, base = os.environ.get("DPSYNGEN_CACHE"), os.environ.get("XDG_CACHE_HOME")
        default = Path(own) if own else Path(base or "~/.cache") / "dpsyngen" / "images"
        self.folder = (folder or default).expanduser()

    def get(self, key: str) -> Entry | None:
        """The entry of this name, if there is one.

        Raises:
            DataError: others can write to it, so nobody knows whose images it has; or it is damaged.
        """
        path = self.folder / key
        try:
            status = os.lstat(path)
        except OSError:
            return None
        if not path.is_dir() or path.is_symlink() or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise DataError(
                f"{printable(path)} is not a folder that only you can read, so it is not used for private images. "
                "Remove it, or give another folder: --set data.cache=PATH (from Python: cache=PATH)."
            )
        try:
            about = json.loads((path / "about.json").read_text(encoding="utf-8"))
            stored = Part(path / IMAGES, tuple(about["shape"]), about["offset"]).images()
            keep = np.ones(len(stored), dtype=bool)
            keep[about["bad"]] = False
            labels = np.load(path / LABELS, allow_pickle=False) if about["labelled"] else None
            if labels is not None and (labels.dtype != np.int64 or labels.shape != (keep.sum(),)):
                raise ValueError("the labels do not fit the images")
            return Entry(kept_of(stored, keep), labels, tuple(about["class_names"]), tuple(about["skipped"]))
        except (OSError, ValueError, LookupError, TypeError, DataError) as error:
            raise DataError(
                f"{printable(path)}, a copy of decoded images, is damaged ({printable(error)}). Remove it: it is made "
                "again from the source."
            ) from error

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold the lock of this name, waiting for it; one process makes an entry while others wait.

        Raises:
            DataError: the folder cannot be written, or its file system has no locks.
        """
        from filelock import FileLock

        lock = FileLock(self.folder / f"{name}.lock", mode=0o600)
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            raise self._unusable(error) from error
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def making(self, key: str, shape: Shape) -> Iterator[Part]:
        """A fresh part, with its room on the disk taken before anything is decoded; call it with the lock held.

        Whatever :meth:`publish` has not renamed is removed in the end.

        Raises:
            DataError: the disk has too little space, or the folder cannot be written.
        """
        for left in self.folder.glob(f"{key}-*.part"):
            warnings.warn("decoding these images was interrupted before: it starts again.", stacklevel=2)
            shutil.rmtree(left, ignore_errors=True)
        size = math.prod(shape) + _SPARE_BYTES
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if size > shutil.disk_usage(self.folder).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            folder = Path(tempfile.mkdtemp(dir=self.folder, prefix=f"{key}-", suffix=".part"))  # mode 0700
        except OSError as error:
            raise self._unusable(error, size) from error
        try:
            yield self._claimed(folder, shape)
        except OSError as error:
            if error.errno in _FULL:
                raise self._unusable(error, size) from error
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _claimed(self, folder: Path, shape: Shape) -> Part:
        descriptor = os.open(folder / IMAGES, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            offset = file.tell()
            try:
                os.posix_fallocate(file.fileno(), 0, offset + math.prod(shape))
            except OSError as error:
                if error.errno in _FULL:
                    raise
                file.truncate(offset + math.prod(shape))  # a file system that cannot take room ahead
        return Part(folder / IMAGES, shape, offset)

    def publish(self, key: str, part: Part, bad: Iterable[int], entry: Entry) -> None:
        """Give a part, all of whose images are written, its name.

        Args:
            key: the name.
            part: from :meth:`making`.
            bad: numbers of the images that are left out; their rows stay in the file, unused.
            entry: labels of the other images, class names, and what was left out, in words.
        """
        folder = part.path.parent
        about = {"shape": part.shape, "offset": part.offset, "bad": sorted(bad), "labelled": entry.labels is not None}
        about |= {"class_names": entry.class_names, "skipped": entry.skipped}
        if entry.labels is not None:
            np.save(folder / LABELS, entry.labels, allow_pickle=False)
            os.chmod(folder / LABELS, 0o600)
        with open(part.path, "rb+") as file:
            os.fsync(file.fileno())
        write_text(folder / "about.json", json.dumps(about), 0o600)
        os.rename(folder, self.folder / key)

    def _unusable(self, error: OSError | NotImplementedError, size: int = 0) -> DataError:
        if getattr(error, "errno", None) in _FULL:
            free = shutil.disk_usage(self.folder).free
            return DataError(
                f"the decoded images need {size / 2**30:,.2f} GiB in {printable(self.folder)}, but "
                f"{free / 2**30:,.2f} GiB are free. Free some space, give a folder on a larger disk (--set "
                "data.cache=PATH; from Python: cache=PATH), or use a smaller resolution."
            )
        why = getattr(error, "strerror", None) or error
        return DataError(
            f"the decoded images are too many for memory and go to a file, but the folder {printable(self.folder)} "
            f"cannot be used ({printable(why)}). Give one that you can write to, on a disk with locks: --set "
            "data.cache=PATH (from Python: cache=PATH)."
        )
