"""Array files: ``.npz`` (images, labels, class names) and ``.npy`` (images).  Nothing is ever unpickled.

A header says how much memory an array takes, so it is read first, with bounds of its own; numpy's loader is not used,
since it trusts sizes and picks members by other rules than the check before it.
"""

from __future__ import annotations

import io
import math
import warnings
import zipfile
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from dpsyngen.data.arrays import to_text
from dpsyngen.data.labels import MAX_NAME_BYTES, check_class_count
from dpsyngen.data.memory import check_fits
from dpsyngen.errors import DataError, listed, printable, shown

IMAGE_KEYS = ("images", "x", "x_train", "arr_0")
LABEL_KEYS = ("labels", "y", "y_train")
NAME_KEY = "class_names"
MAX_HEADER_BYTES = 10_000  # numpy writes about 100
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}  # what numpy writes; others have dictionaries of any size
_READ_BYTES = 2**22


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        # In Python's integers, so that a hostile shape does not overflow to something small.
        return math.prod(self.shape) * self.dtype.itemsize


def read_npy(path: Path) -> np.ndarray:
    """The array of a ``.npy`` file, memory-mapped read-only.

    Raises:
        DataError: broken, or it holds Python objects.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                raise DataError(f"{printable(path)} is a .npz file by its content. Rename it to end in .npz.")
            file.seek(0)
            header = _read_header(file, path, None)
            offset = file.tell()
            if file.seek(0, io.SEEK_END) - offset < header.num_bytes:
                raise ValueError(f"{header.num_bytes:,} bytes are declared, but fewer are there")
        if header.num_bytes == 0:  # cannot be mapped
            return np.zeros(header.shape, header.dtype)
        order = "F" if header.fortran_order else "C"
        return np.memmap(path, header.dtype, "r", offset, header.shape, order)  # type: ignore[call-overload]
    except DataError:
        raise
    except Exception as error:  # numpy raises many types for broken files
        raise _unreadable(path, error) from error


def npy_offset(path: Path) -> int:
    """Bytes before the first value of a ``.npy`` file that :func:`read_npy` has read.

    Raises:
        DataError: it was replaced by something else meanwhile.
    """
    try:
        with path.open("rb") as file:
            _read_header(file, path, None)
            return file.tell()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def read_npz(path: Path, *, labels: bool) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...] | None]:
    """Images, labels and class names of a ``.npz`` file.  Only these are read, whatever else the file holds.

    Keys: images under ``images``, ``x``, ``x_train`` or ``arr_0``; labels under ``labels``, ``y`` or
    ``y_train``; names under ``class_names`` (strings).  The first key that is there wins.

    Raises:
        DataError: broken, without images, of Python objects, declaring more than half of the memory, with a key that is
            there twice, or compressed in another way than numpy does.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path)
            image_key = next((key for key in IMAGE_KEYS if key in members), None)
            if image_key is None:
                raise DataError(
                    f"{printable(path)} has no images: its keys are {listed(members)}. "
                    f"Save them under 'images' ({listed(IMAGE_KEYS)} are known)."
                )
            label_key = next((key for key in LABEL_KEYS if labels and key in members), None)
            keys = [key for key in (image_key, label_key, NAME_KEY if label_key else None) if key in members]
            headers: dict[str, _Header] = {}
            for key in keys:
                with archive.open(members[key]) as member:
                    headers[key] = _read_header(member, path, key)
            if NAME_KEY in headers:
                _check_names(headers[NAME_KEY], path)
            check_fits(sum(header.num_bytes for header in headers.values()), what=str(path))
            arrays = {key: _read_member(archive, members[key], path, key) for key in keys}
    except DataError:
        raise
    except Exception as error:  # OSError, BadZipFile, RuntimeError (a password), zlib.error, …
        raise _unreadable(path, error) from error
    names = to_text(arrays[NAME_KEY], f"{printable(path)}: '{NAME_KEY}'") if NAME_KEY in arrays else None
    return arrays[image_key], arrays[label_key] if label_key else None, names


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The members that are arrays, by key.  Names with folders in them are never keys, and nothing is unpacked."""
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if not info.filename.endswith(".npy"):
            continue
        key = info.filename.removesuffix(".npy")
        if key in found and key in (*IMAGE_KEYS, *LABEL_KEYS, NAME_KEY):
            raise DataError(
                f"{printable(path)}: '{key}' is in it twice, so it is unclear which is meant. Save it again."
            )
        if info.compress_type not in _METHODS and key in (*IMAGE_KEYS, *LABEL_KEYS, NAME_KEY):
            raise DataError(f"{printable(path)}: '{key}' is not compressed as numpy does. Use np.savez_compressed.")
        found[key] = info
    return found


def _check_names(header: _Header, path: Path) -> None:
    if len(header.shape) != 1 or header.dtype.kind not in "US":
        raise DataError(f"{printable(path)}: '{NAME_KEY}' must be a one-dimensional array of strings.")
    check_class_count(header.shape[0], str(path))
    if header.dtype.itemsize > 16 * MAX_NAME_BYTES:
        raise DataError(f"{printable(path)}: class names have at most {MAX_NAME_BYTES} bytes. Use shorter ones.")


def _read_header(stream: IO[bytes], path: Path, key: str | None) -> _Header:
    """The header of a ``.npy`` stream, which is left at the first value."""
    start = stream.read(8)
    if start[:6] != b"\x93NUMPY" or len(start) != 8:
        raise ValueError("it does not begin like a .npy file")
    if start[6] not in (1, 2, 3):
        raise ValueError(f"it is of .npy version {start[6]}.{start[7]}, which is not known")
    width = 2 if start[6] == 1 else 4
    length_bytes = stream.read(width)
    length = int.from_bytes(length_bytes, "little")
    if length > MAX_HEADER_BYTES:  # in time: numpy reads as much as is declared, up to 4 GiB
        raise ValueError(f"its header of {length:,} bytes is too long")
    whole = io.BytesIO(length_bytes + stream.read(length))
    read = np.lib.format.read_array_header_1_0 if start[6] == 1 else np.lib.format.read_array_header_2_0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers that Python 2 wrote
        header = _Header(*read(whole))
    if header.dtype.hasobject:
        what = f": '{key}'" if key else ""
        raise DataError(
            f"{printable(path)}{what} holds Python objects, which could run code when read. Save it as a plain array: "
            "np.stack(images) for images, np.array(names, dtype=str) for names."
        )
    if any(n < 0 for n in header.shape):
        raise ValueError(f"its shape {shown(header.shape)} is negative")
    return header


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, key: str) -> np.ndarray:
    """An array, read into memory that is taken once; the check sum is checked at the end."""
    with archive.open(info) as member:
        header = _read_header(member, path, key)
        buffer = np.empty(header.num_bytes, dtype=np.uint8)
        done = 0
        while done < len(buffer):
            part = member.read(min(_READ_BYTES, len(buffer) - done))
            if not part:
                raise EOFError(f"{header.num_bytes:,} bytes are declared, but only {done:,} are there")
            buffer[done : done + len(part)] = np.frombuffer(part, dtype=np.uint8)
            done += len(part)
        if member.read(1):
            raise ValueError("there are more bytes than declared")
    if header.num_bytes == 0:
        return np.zeros(header.shape, header.dtype)
    return np.ndarray(header.shape, header.dtype, buffer.data, order="F" if header.fortran_order else "C")


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{printable(path)} is broken or truncated ({printable(error)}). Save or copy it again.")
