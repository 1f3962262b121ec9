"""WebDataset: tar files whose members with one stem are one sample: ``0001.jpg`` with ``0001.cls`` or ``0001.json``.

The stem is everything up to the first dot of the file name, the folder included.  The label is the whole number, or the
text, in ``.cls``; or what ``.json`` has under "label", "cls" or "class".  Members of other kinds (captions, masks) are
left alone.  Nothing is unpacked, so no name can lead anywhere; links, devices and sparse members are bad items.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import sys
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpsyngen.data.decode import MAX_FILE_BYTES, BadImage, Item
from dpsyngen.data.labels import MAX_NAME_BYTES, Label, index_labels
from dpsyngen.data.source import Job, Source, split_evenly
from dpsyngen.errors import DataError, printable

IMAGE_ENDINGS = frozenset({"png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif"})
LABEL_KEYS = ("label", "cls", "class")
_MAX_LABEL_BYTES = 2**20
_MAX_HEADER_BYTES = 2**16  # of a long name, or of a pax header; writers need some hundred
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"\xfd7": "unxz", b"\x28\xb5": "unzstd"}


def _items(path: Path, offsets: NDArray[np.int64], sizes: NDArray[np.int64]) -> Iterator[Item]:
    with open(path, "rb", buffering=0) as file:
        for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
            if size > MAX_FILE_BYTES:
                yield BadImage(f"{size:,} bytes: over the limit of {MAX_FILE_BYTES:,}")
                continue
            content = os.pread(file.fileno(), size, offset)
            yield content if len(content) == size else BadImage("truncated: the tar file was changed")


def index_tars(paths: Sequence[Path], where: str, *, labels: bool) -> Source:
    """The samples of all shards, in the order of the shards and of their members."""
    shards = [_Shard(path) for path in paths]
    for shard in shards:
        shard.read(labels=labels)
    bad = [item for shard in shards for item in shard.bad]
    if any(label is not None for shard in shards for label in shard.labels):
        bad += [item for shard in shards for item in shard.drop_unlabelled()]
        index, names = index_labels([label for s in shards for label in s.labels], None, sum(map(len, shards)), where)
    else:
        index, names = None, ()
    if not any(map(len, shards)):
        first = f" ({len(bad):,} bad items, first {printable(': '.join(bad[0]))})" if bad else ""
        raise DataError(f"{where}: no sample with an image in it{first}. WebDataset has 0001.jpg with 0001.cls.")
    jobs = [job for shard in shards for job in shard.jobs()]

    def name(i: int) -> str:
        for shard in shards:
            if i < len(shard):
                return f"{shard.path.name}: {shard.stems[i]}"
            i -= len(shard)
        return str(i)

    return Source(where, jobs, index, names, name, tuple(bad))


@dataclass
class _Sample:
    stem: str
    images: list[tarfile.TarInfo] = field(default_factory=list)
    label: tarfile.TarInfo | None = None
    is_json: bool = False


class _Shard:
    """Samples of one tar file, as numbers, since there may be millions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets = array("q")
        self.sizes = array("q")
        self.labels: list[Label] = []
        self.stems: list[str] = []
        self.bad: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.stems)

    def jobs(self) -> list[Job]:
        places = (np.array(self.offsets, dtype=np.int64), np.array(self.sizes, dtype=np.int64))
        parts = split_evenly(len(self))
        return [Job(p.stop - p.start, functools.partial(_items, self.path, *(a[p] for a in places))) for p in parts]

    def read(self, *, labels: bool) -> None:
        with open(self.path, "rb", buffering=0) as file:
            for sample in self._samples():
                which = f"{self.path.name}: {sample.stem}"
                label: Label = None
                try:
                    if len(sample.images) != 1:
                        why = "no image, only other files" if not sample.images else "two images in one sample"
                        raise ValueError(why)
                    if labels and sample.label is not None:
                        label = _label(file.fileno(), sample.label, sample.is_json)
                except ValueError as error:
                    self.bad.append((which, str(error)))
                    continue
                self.offsets.append(sample.images[0].offset_data)
                self.sizes.append(sample.images[0].size)
                self.labels.append(sys.intern(label) if isinstance(label, str) else label)
                self.stems.append(sample.stem)

    def drop_unlabelled(self) -> list[tuple[str, str]]:
        """Leave out samples without a label; (which, why) of each."""
        keep = [i for i, label in enumerate(self.labels) if label is not None]
        bad = [
            (f"{self.path.name}: {stem}", "no label")
            for stem, label in zip(self.stems, self.labels, strict=True)
            if label is None
        ]
        self.offsets, self.sizes = (array("q", [a[i] for i in keep]) for a in (self.offsets, self.sizes))
        self.labels, self.stems = [self.labels[i] for i in keep], [self.stems[i] for i in keep]
        return bad

    def _samples(self) -> Iterator[_Sample]:
        """Consecutive members with one stem.  That stem again, further on, would be a second record of one sample."""
        sample: _Sample | None = None
        seen: set[int] = set()
        for member in _members(self.path):
            folder, _, file_name = member.name.rpartition("/")
            if member.isdir() or file_name.startswith("."):
                continue
            if not member.isreg() or member.issparse():
                linked = member.issym() or member.islnk()
                why = "a link, which is not followed" if linked else "not a plain file"
                self.bad.append((f"{self.path.name}: {member.name}", why))
                continue
            stem, _, ending = file_name.partition(".")
            stem, ending = f"{folder}/{stem}" if folder else stem, ending.lower()
            if sample is None or sample.stem != stem:
                if sample is not None:
                    yield sample
                if hash(stem) in seen:
                    raise DataError(
                        f"{printable(self.path)}: the members of sample {printable(stem)} do not lie together, or it "
                        "is there twice. Write each sample once, its files one after the other."
                    )
                seen.add(hash(stem))
                sample = _Sample(stem)
            if ending in IMAGE_ENDINGS:
                sample.images.append(member)
            elif ending == "cls" or (ending == "json" and (sample.label is None or sample.is_json)):
                sample.label, sample.is_json = member, ending == "json"
        if sample is not None:
            yield sample


class _Headers(io.FileIO):
    """A file of which tarfile can read headers only: they may declare any size, and it believes them."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header has more than {_MAX_HEADER_BYTES:,} bytes")
        return super().read(size)


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """All members of an uncompressed tar file, in order."""
    where = printable(path)
    try:
        with _Headers(path) as file:
            start = file.read(2)
            if start in _COMPRESSED:
                raise DataError(
                    f"{where} is compressed, so its images can only be read from the beginning. Image files are small "
                    f"already: unpack the outer layer once, with {_COMPRESSED[start]}, and give the .tar file."
                )
            file.seek(0)
            total = os.fstat(file.fileno()).st_size
            with tarfile.open(fileobj=file, mode="r:", errorlevel=2) as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                    if member.isreg() and not member.issparse() and not 0 <= member.size <= total - member.offset_data:
                        raise DataError(f"{where} is truncated within {printable(member.name)}. Copy it again.")
                    yield member
                # tarfile takes a damaged header for the end, which would silently leave out the rest.
                file.seek(tar.offset)
                if file.read(512).strip(b"\0"):
                    raise DataError(f"{where}: the header at byte {tar.offset:,} is damaged. Copy it again.")
    except DataError:
        raise
    except Exception as error:  # tarfile raises many types for broken files
        why = printable(error) or type(error).__name__
        raise DataError(f"{where} is not a tar file, or is damaged or truncated ({why}). Copy it again.") from error


def _label(descriptor: int, member: tarfile.TarInfo, is_json: bool) -> Label:
    if member.size > _MAX_LABEL_BYTES:
        raise ValueError(f"a label of {member.size:,} bytes")
    content = os.pread(descriptor, member.size, member.offset_data)
    found: Label
    if is_json:
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):
            raise ValueError("its .json file is not JSON") from None
        found = next((values[k] for k in LABEL_KEYS if k in values), None) if isinstance(values, dict) else None
        if isinstance(found, bool) or not isinstance(found, int | str | None):
            raise ValueError("its label in .json is neither a whole number nor a text")
    else:
        try:
            found = content.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise ValueError("its label in .cls is not UTF-8") from None
    if isinstance(found, str) and not 0 < len(found) <= MAX_NAME_BYTES:
        raise ValueError("its label is empty, or too long for the name of a class")
    if isinstance(found, str) and not is_json and re.fullmatch("-?[0-9]+", found):
        found = int(found)
    if isinstance(found, int) and not -(2**63) <= found < 2**63:
        raise ValueError("its label is a number beyond 64 bits")
    return found
