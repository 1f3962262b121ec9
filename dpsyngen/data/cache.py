"""Where decoded private images lie when they are too many for memory.

An entry is a folder of mode 0700 with ``images.npy`` (uint8 ``[N, C, H, W]``), ``labels.npy``, ``class_names.json`` and
``about.json`` of mode 0600, named by a digest of the source's files (paths, sizes, times) and of the options.  It is
made under another name and renamed when it is whole; a lock on its name lets one process make it while others wait.  A
decoding that was interrupted goes on where it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.data.array_format import CLASS_NAMES, HEADER_BYTES, IMAGES, LABELS
from dpsyngen.data.store import StoredImages
from dpsyngen.errors import DataError, printable
from dpsyngen.files import write_text

FORMAT = "dpsyngen-image-cache-1"


def default_folder() -> Path:
    """``$DPSYNGEN_CACHE``, else ``$XDG_CACHE_HOME/dpsyngen/images``, else ``~/.cache/dpsyngen/images``."""
    own = os.environ.get("DPSYNGEN_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "dpsyngen" / "images"


def digest_of(*parts: Any) -> str:
    """A name for what these JSON-able values describe."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Entry:
    """A finished entry.

    Attributes:
        images: the pixels, in the file.
        labels: int64 ``[N]``, or None.
        class_names: of the classes.
        skipped: what was left out, private.
    """

    images: StoredImages
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    skipped: tuple[str, ...]


class Cache:
    """A folder of entries.

    Args:
        folder: made, with mode 0700, when something is to be written.

    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> Entry | None:
        """The entry of this name, if it is there and whole.

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
            count, *row = about["shape"]
            images = StoredImages(path / IMAGES, count, tuple(row), offset=HEADER_BYTES)
            if not about["labelled"]:
                return Entry(images, None, (), tuple(about["skipped"]))
            labels = np.load(path / LABELS, allow_pickle=False)
            if labels.dtype != np.int64 or labels.shape != (count,):
                raise ValueError("the labels do not fit the images")
            names = json.loads((path / CLASS_NAMES).read_text(encoding="utf-8"))
            return Entry(images, labels, tuple(names), tuple(about["skipped"]))
        except (OSError, ValueError, KeyError, TypeError, DataError) as error:
            raise DataError(
                f"{printable(path)}, a copy of decoded images, is damaged ({printable(error)}). Remove it: it is made "
                "again from the source."
            ) from error

    def noted(self, name: str) -> dict[str, Any] | None:
        """What :meth:`note` wrote under this name."""
        try:
            found = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def note(self, name: str, values: dict[str, Any]) -> None:
        """Keep some JSON values."""
        write_text(self.folder / f"{name}.json", json.dumps(values), 0o600)

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[int]:
        """Hold the lock of this name, waiting for it; yields its descriptor.  The folder is made if it is missing.

        Raises:
            DataError: the folder cannot be written, or its file system has no locks.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise self.unusable(error) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                raise self.unusable(error) from error
            yield descriptor
        finally:
            os.close(descriptor)

    def unusable(self, error: OSError) -> DataError:
        """The error that says why the folder cannot be written."""
        return DataError(
            f"the decoded images are too many for memory and go to a file, but the folder {printable(self.folder)} "
            f"cannot be used ({error.strerror}). Give one that you can write to, on a disk with locks: --set "
            "data.cache=PATH (from Python: cache=PATH)."
        )
