"""WebDataset: tar files whose members with one stem are one sample: ``0001.jpg`` with ``0001.cls`` or ``0001.json``.

The stem is everything up to the first dot of the file name, the folder included.  The label is the whole number, or the
text, in ``.cls``; or what ``.json`` has under "label", "cls" or "class".  Members of other kinds (captions, masks) are
left alone.  Nothing is unpacked, so no name can lead anywhere; links, devices and sparse members are bad items.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpsyngen.data.decode import MAX_FILE_BYTES, BadImage
from dpsyngen.data.given_labels import index_of_labels
from dpsyngen.data.labels import MAX_NAME_BYTES
from dpsyngen.data.source import EncodedJob, Item, Source, split_evenly
from dpsyngen.data.tar import Member, members, read_content
from dpsyngen.errors import DataError, printable

IMAGE_ENDINGS = frozenset({"png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif"})
LABEL_KEYS = ("label", "cls", "class")
_MAX_LABEL_BYTES = 2**20


@dataclass(frozen=True)
class _TarJob(EncodedJob):
    path: str
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]

    @property
    def count(self) -> int:
        return len(self.offsets)

    def items(self) -> Iterator[Item]:
        with open(self.path, "rb", buffering=0) as file:
            for offset, size in zip(self.offsets.tolist(), self.sizes.tolist(), strict=True):
                if size > MAX_FILE_BYTES:
                    yield BadImage(f"{size:,} bytes: over the limit of {MAX_FILE_BYTES:,}")
                    continue
                content = read_content(file, offset, size)
                yield content if len(content) == size else BadImage("truncated: the tar file was changed")


@dataclass
class _Sample:
    stem: str
    images: list[Member]
    label: Member | None = None
    is_json: bool = False


class _Shard:
    """Samples of one tar file, as numbers, since there may be millions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets = array("q")
        self.sizes = array("q")
        self.labels: list[int | str | None] = []
        self.stems: list[str] = []
        self.bad: list[tuple[str, str]] = []

    def read(self, *, labels: bool) -> None:
        with open(self.path, "rb", buffering=0) as file:
            for sample in self._samples():
                which = f"{self.path.name}: {sample.stem}"
                if len(sample.images) != 1:
                    why = "no image, only other files" if not sample.images else "two images in one sample"
                    self.bad.append((which, why))
                    continue
                label: int | str | None = None
                if labels and sample.label is not None:
                    try:
                        label = _label(read_content(file, sample.label.offset, _bounded(sample.label)), sample.is_json)
                    except ValueError as error:
                        self.bad.append((which, str(error)))
                        continue
                self.offsets.append(sample.images[0].offset)
                self.sizes.append(sample.images[0].size)
                self.labels.append(sys.intern(label) if isinstance(label, str) else label)
                self.stems.append(sample.stem)

    def _samples(self) -> Iterator[_Sample]:
        """Consecutive members with one stem.  That stem again, further on, would be a second record of one sample."""
        sample: _Sample | None = None
        seen: set[int] = set()
        for member in members(self.path):
            folder, _, file_name = member.name.rpartition("/")
            if member.kind == "folder" or file_name.startswith("."):
                continue
            if member.kind != "file":
                why = "a link, which is not followed" if member.kind == "link" else "not a plain file"
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
                sample = _Sample(stem, [])
            if ending in IMAGE_ENDINGS:
                sample.images.append(member)
            elif ending == "cls" or (ending == "json" and (sample.label is None or sample.is_json)):
                sample.label, sample.is_json = member, ending == "json"
        if sample is not None:
            yield sample


def index_tars(paths: Sequence[Path], where: str, *, labels: bool) -> Source:
    """The samples of all shards, in the order of the shards and of their members.

    Raises:
        DataError: a shard is no tar file, or damaged; no sample has an image.
    """
    shards = [_Shard(path) for path in paths]
    for shard in shards:
        shard.read(labels=labels)
    bad = [item for shard in shards for item in shard.bad]
    labelled = any(label is not None for shard in shards for label in shard.labels)
    if labelled:
        for shard in shards:
            _drop_unlabelled(shard, bad)
    jobs = []
    for shard in shards:
        offsets, sizes = np.array(shard.offsets, dtype=np.int64), np.array(shard.sizes, dtype=np.int64)
        jobs += [
            _TarJob(str(shard.path), offsets[r.start : r.stop], sizes[r.start : r.stop])
            for r in split_evenly(len(offsets))
        ]
    names = [(shard.path.name, shard.stems) for shard in shards]
    values = [label for shard in shards for label in shard.labels] if labelled else None
    if not any(shard.offsets for shard in shards):
        first = f" ({len(bad):,} bad items, first {printable(': '.join(bad[0]))})" if bad else ""
        raise DataError(f"{where}: no sample with an image in it{first}. WebDataset has 0001.jpg with 0001.cls.")
    index, class_names = index_of_labels(values, None, where)
    return Source(where, jobs, index, class_names, lambda i: _name_of(names, i), tuple(bad))


def _drop_unlabelled(shard: _Shard, bad: list[tuple[str, str]]) -> None:
    keep = [i for i, label in enumerate(shard.labels) if label is not None]
    if len(keep) == len(shard.labels):
        return
    kept = set(keep)
    bad += [(f"{shard.path.name}: {stem}", "no label") for i, stem in enumerate(shard.stems) if i not in kept]
    shard.offsets, shard.sizes = (array("q", [a[i] for i in keep]) for a in (shard.offsets, shard.sizes))
    shard.labels, shard.stems = [shard.labels[i] for i in keep], [shard.stems[i] for i in keep]


def _name_of(names: Sequence[tuple[str, Sequence[str]]], i: int) -> str:
    for shard, stems in names:
        if i < len(stems):
            return f"{shard}: {stems[i]}"
        i -= len(stems)
    return str(i)


def _bounded(member: Member) -> int:
    if member.size > _MAX_LABEL_BYTES:
        raise ValueError(f"a label of {member.size:,} bytes")
    return member.size


def _label(content: bytes, is_json: bool) -> int | str | None:
    if is_json:
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):
            raise ValueError("its .json file is not JSON") from None
        found = next((values[k] for k in LABEL_KEYS if k in values), None) if isinstance(values, dict) else None
        if isinstance(found, bool) or not isinstance(found, int | str | None):
            raise ValueError("its label in .json is neither a whole number nor a text")
        if isinstance(found, str) and not 0 < len(found) <= MAX_NAME_BYTES:
            raise ValueError("its label in .json is empty, or too long for the name of a class")
    else:
        try:
            found = content.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise ValueError("its label in .cls is not UTF-8") from None
        if not found or len(found) > MAX_NAME_BYTES:
            raise ValueError("its label in .cls is empty, or too long for the name of a class")
        digits = found.removeprefix("-")
        found = int(found) if digits.isascii() and digits.isdigit() else found
    if isinstance(found, int) and not -(2**63) <= found < 2**63:
        raise ValueError("its label is a number beyond 64 bits")
    return found
