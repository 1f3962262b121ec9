"""An entry of the cache while it is made: room taken ahead, a journal of what is done, a name when it is whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time

import numpy as np
from numpy.typing import NDArray

from dpsyngen.data.array_format import HEADER_BYTES, IMAGES, npy_header, write_at, write_labels
from dpsyngen.data.cache import FORMAT, Cache, Entry
from dpsyngen.data.store import StoredImages
from dpsyngen.errors import DataError, printable
from dpsyngen.files import sync_folder, write_text

_SPARE_BYTES = 2**24  # for labels, the journal and other programs
_SYNC_SECONDS = 5.0
Shape = tuple[int, int, int, int]


class Unfinished:
    """An entry in the making.  Call it with the lock held.

    Args:
        cache: where.
        key: name of the entry.
        shape: of all images, ``(N, C, H, W)``, those included that turn out bad.
        resumable: whether an interrupted one of this name goes on; else it begins anew.

    Raises:
        DataError: the disk has too little space, or the folder cannot be written.  Nothing is decoded yet.
    """

    def __init__(self, cache: Cache, key: str, shape: Shape, *, resumable: bool = True) -> None:
        self.cache, self.key, self.shape = cache, key, shape
        self.folder = cache.folder / f"{key}.part"
        self.images, self._journal = self.folder / IMAGES, self.folder / "done.jsonl"
        self.row_bytes = int(np.prod(shape[1:]))
        self.bad: dict[int, str] = {}
        self.done: set[int] = set()
        self._pending: list[str] = []
        self._synced = time.monotonic()
        try:
            if not (resumable and self._resume()):
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(mode=0o700)
                self._claim()
        except OSError as error:
            raise self._no_space(error) from error
        self._file = os.open(self.images, os.O_RDWR | os.O_CLOEXEC)

    @property
    def offset(self) -> int:
        """Bytes before the first image in :attr:`images`."""
        return HEADER_BYTES

    def finished(self, job: int, bad: list[tuple[int, str]]) -> None:
        """Remember that a job's images are written, and which of them (by their number in the source) are bad.

        What is remembered has reached the disk before, so that a power failure costs some seconds of work at most.
        """
        self._pending.append(json.dumps([job, bad]))
        self.bad.update(bad)
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self._sync()

    def _sync(self) -> None:
        os.fdatasync(self._file)
        with open(self._journal, "a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in self._pending))
            file.flush()
            os.fsync(file.fileno())
        self._pending.clear()
        self._synced = time.monotonic()

    def publish(
        self, labels: NDArray[np.int64] | None, class_names: tuple[str, ...], skipped: tuple[str, ...]
    ) -> Entry:
        """Leave out the bad images, and give the entry its name.

        Args:
            labels: int64 ``[N]``, of all images, bad ones included.
            class_names: of the classes.
            skipped: what was left out, in words.
        """
        keep = np.ones(self.shape[0], dtype=bool)
        keep[list(self.bad)] = False
        try:
            # From here on the rows move, so what was done cannot be taken up again.
            self._journal.unlink(missing_ok=True)
            self._compact(keep)
            shape = (int(keep.sum()), *self.shape[1:])
            os.pwrite(self._file, npy_header(shape), 0)
            os.ftruncate(self._file, HEADER_BYTES + shape[0] * self.row_bytes)
            os.fsync(self._file)
            about = {"format": FORMAT, "shape": shape, "labelled": labels is not None, "skipped": skipped}
            if labels is not None:
                write_labels(self.folder, labels[keep], class_names)
            write_text(self.folder / "about.json", json.dumps(about), 0o600)
            sync_folder(self.folder)
            os.rename(self.folder, self.cache.folder / self.key)
            sync_folder(self.cache.folder)
        except OSError as error:
            raise self._no_space(error) from error
        finally:
            self.close()
        entry = self.cache.get(self.key)
        assert entry is not None
        return entry

    def flush(self) -> None:
        """Remember what was finished; for an interruption that is caught."""
        with contextlib.suppress(OSError):
            self._sync()

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _compact(self, keep: NDArray[np.bool_]) -> None:
        """Move the good rows together, in pieces."""
        rows = np.flatnonzero(keep)
        moved = np.flatnonzero(rows != np.arange(len(rows)))
        if not len(moved):
            return
        step = max(1, 2**24 // self.row_bytes)
        source = StoredImages(self.images, self.shape[0], self.shape[1:], offset=HEADER_BYTES)
        for start in range(int(moved[0]), len(rows), step):
            piece = source[rows[start : start + step]]
            write_at(self._file, piece, HEADER_BYTES + start * self.row_bytes)

    def _resume(self) -> bool:
        """Take up an interrupted entry of the same shape; whether there is one."""
        try:
            lines = self._journal.read_text(encoding="utf-8").splitlines(keepends=True)
            if json.loads(lines[0]) != list(self.shape):
                return False
            size = HEADER_BYTES + self.shape[0] * self.row_bytes
            status = os.lstat(self.folder)
            if os.lstat(self.images).st_size != size or status.st_mode & 0o077 or status.st_uid != os.geteuid():
                return False
            for k, line in enumerate(lines[1:], 1):
                if k == len(lines) - 1 and not line.endswith("\n"):
                    # A power failure tore it off; what comes next must not be written behind it.
                    write_text(self._journal, "".join(lines[:-1]), 0o600)
                    break
                job, bad = json.loads(line)
                self.done.add(int(job))
                self.bad.update((int(row), str(why)) for row, why in bad)
        except (OSError, ValueError, IndexError, TypeError):
            self.done, self.bad = set(), {}
            return False
        return True

    def _claim(self) -> None:
        """Take the room on the disk, before anything is decoded."""
        size = HEADER_BYTES + self.shape[0] * self.row_bytes
        free = shutil.disk_usage(self.cache.folder).free
        if size + _SPARE_BYTES > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        descriptor = os.open(self.images, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            try:
                os.posix_fallocate(descriptor, 0, size)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                os.ftruncate(descriptor, size)  # a file system that cannot take room ahead
            os.pwrite(descriptor, npy_header(self.shape), 0)
            os.fsync(descriptor)
        except BaseException:
            os.unlink(self.images)
            raise
        finally:
            os.close(descriptor)
        write_text(self._journal, json.dumps(self.shape) + "\n", 0o600)

    def _no_space(self, error: OSError) -> DataError:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return self.cache.unusable(error)
        size = HEADER_BYTES + self.shape[0] * self.row_bytes + _SPARE_BYTES
        free = shutil.disk_usage(self.cache.folder).free
        return DataError(
            f"the decoded images need {size / 2**30:,.2f} GiB in {printable(self.cache.folder)}, but "
            f"{free / 2**30:,.2f} GiB are free. Free some space, give a folder on a larger disk (--set "
            "data.cache=PATH; from Python: cache=PATH), or use a smaller resolution."
        )
