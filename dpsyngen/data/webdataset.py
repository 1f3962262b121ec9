"""WebDataset: tar files whose members with one stem are one sample: ``0001.jpg`` with ``0001.cls`` or ``0001.json``.

The stem is everything up to the first dot of the file name, the folder included.  The label is the whole number, or the
text, in ``.cls``; or what ``.json`` has under "label" or another usual name.  Other members (captions, masks) are told
of as ignored.  Nothing is unpacked, so no name can lead anywhere; links, devices and sparse members are bad items.
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
from dpsyngen.data.labels import LABEL_NAMES, MAX_NAME_BYTES, Label, ignored, index_labels, label_name
from dpsyngen.data.source import Job, Source, split_evenly
from dpsyngen.errors import MOST_NAMES, DataError, printable
from dpsyngen.files import damaged

IMAGE_ENDINGS = frozenset({"png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif", "dcm"})
_MAX_LABEL_BYTES = 2**20
_MAX_HEADER_BYTES = 2**16  # of a long name, or of a pax header; writers need some hundred
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"\xfd7": "unxz", b"\x28\xb5": "unzstd"}


@dataclass
class _Sample:
    """The members of one stem; after :func:`_samples` also the label."""

    which: str
    images: list[tuple[int, int]] = field(default_factory=list)  # first byte and size of each
    label_file: tarfile.TarInfo | None = None
    label: Label = None
    dotted: str = ""  # a name such as scan_1.0.png, of which ".0.png" is taken for the extension


def index_tars(paths: Sequence[Path], where: str, *, labels: bool, label_column: str | None = None) -> Source:
    """The samples of all shards, in the order of the shards and of their members.

    `label_column` is the key of the label in ``.json``; None: a usual name.
    """
    others: set[str] = set()
    keys: set[str] = set()
    bad: list[tuple[str, str]] = []
    values: list[Label] = []
    names: list[str] = []
    places = array("q")  # first byte and size of each image; as numbers, since there may be millions
    ends = [0]  # of the shards
    for path in paths:
        for sample in _samples(path, bad, labels, label_column, others, keys):
            values.append(sys.intern(sample.label) if isinstance(sample.label, str) else sample.label)
            names.append(sample.which)
            places.extend(sample.images[0])
        ends.append(len(names))
    if keys:
        label_name(sorted(keys), label_column, None, where)  # refuses several
    labelled = any(label is not None for label in values)
    keep = np.array([not labelled or label is not None for label in values], dtype=bool)
    bad += [(names[i], "no label") for i in np.flatnonzero(~keep)]
    if not keep.any():
        first = f" ({len(bad):,} bad items, first {printable(': '.join(bad[0]))})" if bad else ""
        raise DataError(f"{where}: no sample with an image in it{first}. WebDataset has 0001.jpg with 0001.cls.")
    index: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] = ()
    if labelled:
        values = [label for label in values if label is not None]
        texts = [label for label in values if isinstance(label, str)]
        if texts and all(re.fullmatch("-?[0-9]+", text) for text in texts):  # beside "01", "10" is a name, too
            values = [str(label) for label in values]
        index, class_names = index_labels(values, None, len(values), where)
    jobs: list[Job] = []
    rows = np.array(places, dtype=np.int64).reshape(-1, 2)
    for path, start, end in zip(paths, ends, ends[1:], strict=False):
        of_shard = rows[start:end][keep[start:end]]
        parts = (of_shard[part] for part in split_evenly(len(of_shard)))
        jobs += [Job(len(part), functools.partial(_items, path, part)) for part in parts]
    used = np.flatnonzero(keep)
    told = ignored(where, sorted(others) if labels else ())

    def stems() -> list[str]:
        return [names[i].partition(": ")[2] for i in used]

    return Source(where, jobs, index, class_names, lambda i: names[used[i]], tuple(bad), ignored=told, files=stems)


def _items(path: Path, places: NDArray[np.int64]) -> Iterator[Item]:
    with open(path, "rb", buffering=0) as file:
        for offset, size in places.tolist():
            if size > MAX_FILE_BYTES:
                yield BadImage(f"{size:,} bytes: over the limit of {MAX_FILE_BYTES:,}")
                continue
            content = os.pread(file.fileno(), size, offset)
            yield content if len(content) == size else BadImage("truncated: the tar file was changed")


def _samples(
    path: Path, bad: list[tuple[str, str]], labels: bool, column: str | None, others: set[str], keys: set[str]
) -> Iterator[_Sample]:
    """Samples of one image each, with their labels if asked for; all others go to `bad`.  Endings of members, and keys
    in ``.json``, that are not used go to `others`, keys that could be of labels to `keys`."""
    with open(path, "rb", buffering=0) as file:
        for sample in _grouped(path, bad, others):
            try:
                if len(sample.images) != 1:
                    dotted = f": {sample.dotted} has a dot before its extension; rename it" if sample.dotted else ""
                    raise ValueError("two images in one sample" if sample.images else f"no image{dotted}")
                if labels and sample.label_file is not None:
                    sample.label = _label(file.fileno(), sample.label_file, column, others, keys)
            except ValueError as error:
                bad.append((sample.which, str(error)))
            else:
                yield sample


def _grouped(path: Path, bad: list[tuple[str, str]], others: set[str]) -> Iterator[_Sample]:
    """Consecutive members with one stem.  That stem again, further on, would be a second record of one sample."""
    sample = None
    seen: set[int] = set()
    for member in _members(path):
        folder, _, file_name = member.name.rpartition("/")
        if member.isdir() or file_name.startswith("."):
            continue
        if not member.isreg() or member.issparse():
            link = member.issym() or member.islnk()
            why = "a link, which is not followed" if link else "not a plain file"
            bad.append((f"{path.name}: {member.name}", why))
            continue
        stem, _, ending = file_name.partition(".")
        which = f"{path.name}: {folder}/{stem}" if folder else f"{path.name}: {stem}"
        if sample is None or sample.which != which:
            if sample is not None:
                yield sample
            if hash(which) in seen:
                raise DataError(
                    f"{printable(path)}: the members of sample {printable(stem)} do not lie together, or it is there "
                    "twice. Write each sample once, its files one after the other."
                )
            seen.add(hash(which))
            sample = _Sample(which)
        ending = ending.lower()
        if ending in IMAGE_ENDINGS:
            sample.images.append((member.offset_data, member.size))
        elif ending == "cls" or (ending == "json" and not _is_cls(sample.label_file)):
            sample.label_file = member
        elif ending.rpartition(".")[2] in IMAGE_ENDINGS:
            sample.dotted = file_name
        if ending not in IMAGE_ENDINGS and member is not sample.label_file and len(others) < MOST_NAMES:
            others.add(f".{ending}")
    if sample is not None:
        yield sample


def _is_cls(member: tarfile.TarInfo | None) -> bool:
    return member is not None and member.name.lower().endswith(".cls")


class _Headers(io.FileIO):
    """A file of which tarfile can read headers only: they may declare any size, and it believes them."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header has more than {_MAX_HEADER_BYTES:,} bytes")
        return super().read(size)


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """All members of an uncompressed tar file, in order."""
    where = printable(path)
    with damaged(path, "a tar file"), _Headers(path) as file:
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


def _label(descriptor: int, member: tarfile.TarInfo, column: str | None, others: set[str], keys: set[str]) -> Label:
    if member.size > _MAX_LABEL_BYTES:
        raise ValueError(f"a label of {member.size:,} bytes")
    content = os.pread(descriptor, member.size, member.offset_data)
    found: Label
    if _is_cls(member):
        try:
            found = content.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise ValueError("its label in .cls is not UTF-8") from None
    else:
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):
            raise ValueError("its .json file is not JSON") from None
        values = values if isinstance(values, dict) else {}
        usual = (column,) if column is not None else LABEL_NAMES
        key = next((key for key in usual if key in values), None)
        found = values.get(key)
        keys.update(k for k in usual if k in values)
        if len(others) < MOST_NAMES:
            others.update(f"{k} of .json" for k in list(values)[:MOST_NAMES] if k != key)
        if isinstance(found, bool) or not isinstance(found, int | str | None):
            raise ValueError("its label in .json is neither a whole number nor a text")
    if isinstance(found, str) and not 0 < len(found) <= MAX_NAME_BYTES:
        raise ValueError("its label is empty, or too long for the name of a class")
    if isinstance(found, str) and _is_cls(member) and re.fullmatch("0|-?[1-9][0-9]*", found):
        found = int(found)
    if isinstance(found, int) and not -(2**63) <= found < 2**63:
        raise ValueError("its label is a number beyond 64 bits")
    return found
