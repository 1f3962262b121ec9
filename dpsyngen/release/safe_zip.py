"""Zip files from strangers, and zip files that hold nothing but what they show.

Reading refuses everything that a bundle has no use for: paths that lead elsewhere, links, folders, encryption, odd
compression, two members of one name, members that are larger than they say, and bytes that belong to no member (a zip
can carry those before, between and after its members, in comments and in extra fields).
"""

from __future__ import annotations

import os
import re
import stat
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dpsyngen.errors import ReleaseError

MOST_MEMBERS = 2_000_000
MOST_BYTES = 64 * 2**30
LONGEST_NAME = 1024
SMALL = 64 * 2**20
"""Largest member that is read into memory."""

_CHUNK = 1 << 20
_LOCAL_HEADER = 30
_ZIP64 = 1
_DATE = (1980, 1, 1, 0, 0, 0)


def write_zip(path: Path, members: Iterable[tuple[str, Path | bytes]]) -> None:
    """Write a zip whose bytes depend on names and contents only: no dates, owners or modes of files."""
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name, _DATE)
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            info.create_system = 3
            # Weights and pictures are dense already.
            dense = name.endswith((".safetensors", ".png"))
            info.compress_type = zipfile.ZIP_STORED if dense else zipfile.ZIP_DEFLATED
            if isinstance(content, bytes):
                archive.writestr(info, content)
                continue
            info.file_size = content.stat().st_size
            with open(content, "rb") as source, archive.open(info, "w") as target:
                while chunk := source.read(_CHUNK):
                    target.write(chunk)


def is_safe_name(name: str) -> bool:
    """Whether a member's name is a plain relative path: no "..", no empty part, no drive, no control character."""
    parts = name.split("/")
    return (
        0 < len(name.encode("utf-8", "surrogateescape")) <= LONGEST_NAME
        and name.isprintable()
        and not re.search(r"[\\:]", name)
        and all(part not in ("", ".", "..") and len(part.encode("utf-8", "surrogateescape")) <= 255 for part in parts)
    )


class SafeZip:
    """A zip that was found to be sound; see :func:`open_zip`.

    Attributes:
        sizes: declared size of each member in bytes, by name.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self.sizes = {i.filename: i.file_size for i in archive.infolist()}

    def chunks(self, name: str) -> Iterator[bytes]:
        """The content of a member, checked against its declared size and its CRC.

        Raises:
            ReleaseError: it is damaged.
        """
        left = self.sizes[name]
        try:
            with self._archive.open(name) as member:
                while chunk := member.read(_CHUNK):
                    left -= len(chunk)
                    if left < 0:
                        raise ReleaseError(f"{name} is larger than it says.")
                    yield chunk
        except ReleaseError:
            raise
        except Exception as error:  # so do decompressors
            raise ReleaseError(f"{name} is damaged: {error}.") from None
        if left:
            raise ReleaseError(f"{name} is smaller than it says.")

    def read(self, name: str) -> bytes:
        """The content of a small member.  Raises ReleaseError if it is damaged, or larger than SMALL."""
        if self.sizes[name] > SMALL:
            raise ReleaseError(f"{name} has {self.sizes[name]:,} bytes, but at most {SMALL:,} are read.")
        return b"".join(self.chunks(name))

    def extract(self, name: str, folder: Path) -> Path:
        """Write a member below `folder`; its name was checked when the zip was opened."""
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "xb") as f:
            for chunk in self.chunks(name):
                f.write(chunk)
        return target


@contextmanager
def open_zip(path: Path) -> Iterator[SafeZip]:
    """Open a zip from a stranger.

    Raises:
        ReleaseError: not a zip, or one that holds what a bundle has no use for; the message lists up to ten faults.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise ReleaseError(f"{path} cannot be read: {error.strerror}.") from None
    with file:
        try:
            archive = zipfile.ZipFile(file)
            faults = list(_faults(archive, os.fstat(file.fileno()).st_size))
        except Exception as error:  # zipfile raises nearly anything for broken files
            raise ReleaseError(f"{path} is not a zip file, or is damaged ({error}).") from None
        if faults:
            more = f"; and {len(faults) - 10:,} more" if len(faults) > 10 else ""
            raise ReleaseError(f"{path} is not a bundle to be trusted: {'; '.join(faults[:10])}{more}.")
        with archive:
            yield SafeZip(archive)


def _faults(archive: zipfile.ZipFile, length: int) -> Iterator[str]:
    members = archive.infolist()
    if len(members) > MOST_MEMBERS:
        yield f"it has {len(members):,} members, more than {MOST_MEMBERS:,}"
        return
    total = sum(i.file_size for i in members)
    if total > MOST_BYTES:
        yield f"it would unpack to {total:,} bytes, more than {MOST_BYTES:,}"
    if archive.comment:
        yield "it has a comment"
    seen: set[str] = set()
    end = 0
    for i in sorted(members, key=lambda m: m.header_offset):
        name = ascii(i.filename[:200])
        if not is_safe_name(i.filename) or i.orig_filename != i.filename:
            yield f"the name {name} is not allowed"
        # Two names that differ in case only are one file on some systems.
        if i.filename.casefold() in seen:
            yield f"{name} is there twice"
        seen.add(i.filename.casefold())
        kind = stat.S_IFMT(i.external_attr >> 16)
        if i.is_dir() or kind not in (0, stat.S_IFREG):
            yield f"{name} is not a plain file"
        if i.flag_bits & 0x1:
            yield f"{name} is encrypted"
        if i.flag_bits & 0x8:
            yield f"{name} is written as a stream"
        if i.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            yield f"{name} is compressed by method {i.compress_type}"
        if not i.filename.isascii() and not i.flag_bits & 0x800:
            yield f"the name {name} is not in UTF-8"
        if i.compress_type == zipfile.ZIP_STORED and i.compress_size != i.file_size:
            yield f"{name} has two sizes"
        if i.comment:
            yield f"{name} has a comment"
        length_of_name, extra = _local_header(archive, i)
        if any(_foreign(e) for e in (i.extra, extra)):
            yield f"{name} has extra fields"
        if i.header_offset != end:
            yield f"there are bytes before {name} that belong to nothing"
        end = i.header_offset + _LOCAL_HEADER + length_of_name + len(extra) + i.compress_size
    if end != archive.start_dir:
        yield "there are bytes before the directory that belong to nothing"
    if archive.fp is not None and members:
        tail = sum(46 + len(i.orig_filename.encode("utf-8", "surrogateescape")) + len(i.extra) for i in members)
        # End record: 22 bytes; with ZIP64 56 and 20 more.
        if length - archive.start_dir - tail not in (22, 22 + 76):
            yield "there are bytes in or after the directory that belong to nothing"


def _local_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[int, bytes]:
    """Length of the name, and the extra field, before the member: it may differ from that in the directory."""
    assert archive.fp is not None
    archive.fp.seek(info.header_offset)
    header = archive.fp.read(_LOCAL_HEADER)
    if len(header) != _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no header for {info.filename!r}")
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    archive.fp.seek(name, os.SEEK_CUR)
    return name, archive.fp.read(extra)


def _foreign(extra: bytes) -> bool:
    """Whether an extra field holds anything but the sizes of a large file."""
    while extra:
        kind, size = int.from_bytes(extra[:2], "little"), int.from_bytes(extra[2:4], "little")
        if len(extra) < 4 + size or kind != _ZIP64 or size > 28:
            return True
        extra = extra[4 + size :]
    return False
