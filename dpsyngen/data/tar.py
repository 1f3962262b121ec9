"""The members of a tar file, without unpacking any: names, kinds, and where their bytes are.

Python's own reader believes what headers declare, sparse files and terabytes among it, and keeps an object for each
member.  This one reads headers of ustar, GNU and pax files and nothing else, within bounds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from dpsyngen.errors import DataError, printable

_BLOCK = 512
_MAX_EXTRA_BYTES = 2**16  # of a long name, or of a pax header; writers need some hundred
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"\xfd7": "unxz", b"\x28\xb5": "unzstd"}

Kind = Literal["file", "folder", "link", "other"]


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a tar file.

    Attributes:
        name: its whole name, as stored.
        kind: "link" is a symbolic or hard link; "other" is a device, a pipe, or a sparse file.
        offset: where its content begins.
        size: bytes of its content.
    """

    name: str
    kind: Kind
    offset: int
    size: int


def members(path: Path) -> Iterator[Member]:
    """All members of an uncompressed tar file, in order.

    Raises:
        DataError: not a tar file, compressed, truncated, or with a header that is damaged or too long.
    """
    try:
        with open(path, "rb", buffering=2**16) as file:
            yield from _members(file, path)
    except OSError as error:
        raise DataError(f"{printable(path)} cannot be read ({error.strerror}).") from error


def read_content(file: BinaryIO, offset: int, size: int) -> bytes:
    """The content of a member; shorter if the file was cut short.  Threads may share `file`."""
    return os.pread(file.fileno(), size, offset)


def _members(file: BinaryIO, path: Path) -> Iterator[Member]:
    total = os.fstat(file.fileno()).st_size
    position, first = 0, True
    long_name: str | None = None
    extra: dict[str, str] = {}
    while position + _BLOCK <= total:
        file.seek(position)
        header = file.read(_BLOCK)
        if not header.strip(b"\0"):
            return  # the end; what may lie behind it was never part of the archive
        if not _sum_is_right(header):
            raise _no_tar(path, header) if first else _damaged(path, position, "its check sum is wrong")
        first = False
        size = _number(header[124:136], path, position)
        kind, offset = header[156:157], position + _BLOCK
        if kind in b"Lxg" and kind:
            if size > _MAX_EXTRA_BYTES:
                raise _damaged(path, position, f"it has {size:,} bytes, more than {_MAX_EXTRA_BYTES:,}")
            content = file.read(size)
            if kind == b"L":
                long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == b"x":
                extra = _pax(content, path, position)
            position = offset + -(-size // _BLOCK) * _BLOCK
            continue
        sparse = kind == b"S" or any(key.startswith("GNU.sparse") for key in extra)
        name = extra.get("path") or long_name or _name(header)
        if "size" in extra:
            size = int(extra["size"]) if extra["size"].isascii() and extra["size"].isdigit() else -1
        has_content = kind not in b"123456" or not kind
        if not 0 <= size <= total - offset and has_content:
            raise DataError(f"{printable(path)} is truncated within {printable(name)}. Copy or download it again.")
        yield Member(name, "other" if sparse else _kind(kind, name), offset, size if has_content else 0)
        long_name, extra = None, {}
        position = offset + (-(-size // _BLOCK) * _BLOCK if has_content else 0)
    if first:
        raise _no_tar(path, b"")
    if position > total:
        raise DataError(f"{printable(path)} is truncated. Copy or download it again.")


def _kind(flag: bytes, name: str) -> Kind:
    if flag in (b"1", b"2"):
        return "link"
    if flag == b"5" or (flag in (b"0", b"\0") and name.endswith("/")):
        return "folder"
    return "file" if flag in (b"0", b"\0", b"7") else "other"


def _sum_is_right(header: bytes) -> bool:
    field = header[148:156].strip(b" \0")
    try:
        return sum(header) - sum(header[148:156]) + 8 * 32 == int(field or b"x", 8)
    except ValueError:
        return False


def _number(field: bytes, path: Path, position: int) -> int:
    if field[0] & 0x80:  # GNU: binary, for sizes from 8 GiB on
        return int.from_bytes(field, "big") & ((1 << 88) - 1)
    digits = field.split(b"\0")[0].strip(b" ")
    try:
        return int(digits or b"0", 8)
    except ValueError:
        raise _damaged(path, position, "its size is no number") from None


def _name(header: bytes) -> str:
    name, prefix = header[:100].split(b"\0")[0], b""
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0")[0]
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _pax(content: bytes, path: Path, position: int) -> dict[str, str]:
    """Records ``"<length> <key>=<value>\\n"``; the length counts all of the record."""
    found: dict[str, str] = {}
    at = 0
    while at < len(content) and content[at : at + 1] != b"\0":
        space = content.find(b" ", at, at + 8)
        length = content[at:space] if space > at else b""
        end = at + int(length) if length.isdigit() else 0
        record = content[space + 1 : end]
        if end <= space or end > len(content) or not record.endswith(b"\n") or b"=" not in record:
            raise _damaged(path, position, "its pax records do not add up")
        key, _, value = record[:-1].partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at = end
    return found


def _damaged(path: Path, position: int, why: str) -> DataError:
    return DataError(f"{printable(path)}: the header at byte {position:,} is damaged ({why}). Copy it again.")


def _no_tar(path: Path, header: bytes) -> DataError:
    tool = _COMPRESSED.get(header[:2])
    if tool:
        return DataError(
            f"{printable(path)} is compressed, so its images can only be read from the beginning. Image files are "
            f"small already: unpack the outer layer once, with {tool}, and give the .tar file."
        )
    return DataError(f"{printable(path)} is not a tar file, or is empty.")
