"""CIFAR-10, binary version: records of one label byte and 3×32×32 pixel bytes (red, green, blue planes)."""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path

import numpy as np

from dpsyngen.errors import DataError, printable

ARCHIVE_NAME = "cifar-10-binary.tar.gz"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FOLDER = "cifar-10-batches-bin"
_FILES = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
_RECORD = 1 + 3 * 32 * 32
_RECORDS = 10_000  # per file


def cifar_files_in(folder: Path, split: str) -> list[Path] | Path | None:
    """The extracted files of a split in ``folder`` (or its ``cifar-10-batches-bin``), or the archive."""
    for place in (folder, folder / _FOLDER):
        files = [place / name for name in _FILES[split]]
        if all(file.is_file() for file in files):
            return files
    archive = folder / ARCHIVE_NAME
    return archive if archive.is_file() else None


def read_cifar10(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``[N, 3, 32, 32]`` and labels uint8 ``[N]`` of a split (``"train"`` or ``"test"``).

    Raises:
        DataError: files are missing, broken, of the wrong size, or hold labels over 9.
    """
    found = cifar_files_in(folder, split)
    if found is None:
        raise DataError(f"{printable(folder)}: neither {ARCHIVE_NAME} nor {', '.join(_FILES[split])} is there.")
    try:
        if isinstance(found, Path):
            raw = _read_archive(found, _FILES[split])
        else:
            for file in found:
                _checked(file.name, file.stat().st_size)
            raw = [file.read_bytes() for file in found]
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{printable(found)} is broken or truncated ({error}). Copy or download it again.") from error
    records = np.frombuffer(b"".join(raw), dtype=np.uint8).reshape(-1, _RECORD)
    labels = records[:, 0]
    if labels.max() > 9:
        raise DataError(f"{printable(folder)}: labels over 9, so this is not CIFAR-10 (CIFAR-100, perhaps).")
    return records[:, 1:].reshape(-1, 3, 32, 32), labels


def _read_archive(archive: Path, names: tuple[str, ...]) -> list[bytes]:
    """The members with these base names.  Nothing is written to disk, so a member's path cannot lead
    anywhere."""
    content: dict[str, bytes] = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            name = member.name.rpartition("/")[2]
            if name not in names or not member.isreg():
                continue
            _checked(name, member.size)
            stream = tar.extractfile(member)
            content[name] = stream.read() if stream is not None else b""
            if len(content) == len(names):
                return [content[name] for name in names]
    raise DataError(f"{printable(archive)} lacks {', '.join(sorted(set(names) - set(content)))}. Download it again.")


def _checked(name: str, size: int) -> None:
    if size != _RECORDS * _RECORD:
        raise DataError(f"{name} has {size:,} bytes, not {_RECORDS * _RECORD:,}. Copy or download it again.")
