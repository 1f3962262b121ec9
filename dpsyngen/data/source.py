"""What a reader knows of its images before any is decoded: where each lies, its label, and nothing of its pixels."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from dpsyngen.data.decode import AS_STORED, BadImage, Colour, Form, ImageHeader, Item, Range, read_header, read_image
from dpsyngen.data.store import Shape
from dpsyngen.errors import DataError, printable
from dpsyngen.files import NotPlainError, open_plain

_MOST_REASONS, _MOST_NAMED = 20, 5  # of bad images in a message, and images of each
_READERS = 8
Channels = Literal["auto", "grey", "rgb"]
Bad = tuple[int, str]
"""Which image (by its number) cannot be used, and why."""


class FormOptions(TypedDict, total=False):
    """Arguments of :func:`~dpsyngen.data.load.load_images`, where they are explained."""

    value_range: Range | None
    fit: Literal["crop", "pad"]
    window: Range | None
    frames: Literal["first", "all"] | None
    group_size: int | None
    groups: str | os.PathLike[str] | None
    beside: str | os.PathLike[str] | None


@dataclass(frozen=True)
class Options:
    """How images are read: the arguments of :func:`dpsyngen.data.load.load_images`, where they are explained."""

    resolution: int | None = None
    channels: Channels = "auto"
    labels: bool = True
    label_file: Path | None = None
    label_column: str | None = None
    skip_bad: bool = False
    cache: str = "auto"
    workers: int | None = None
    form: Form = AS_STORED
    groups: Path | None = None
    beside: Path | None = None
    on_progress: Callable[[int, int], None] | None = None

    def shape(self, count: int, headers: set[ImageHeader]) -> Shape:
        """Shape of the result, from what was asked for and from what headers say.

        The resolution that nobody asked for is the native one if all images are one square of 8..64, else 32.
        """
        sizes = {(header.width, header.height) for header in headers}
        width, height = sizes.pop() if len(sizes) == 1 else (0, 0)
        resolution = self.resolution or (width if width == height and 8 <= width <= 64 else 32)
        all_grey = bool(headers) and all(header.is_grey for header in headers)
        grey = self.channels == "grey" or (self.channels == "auto" and all_grey)
        return count, 1 if grey else 3, resolution, resolution


def few(headers: set[ImageHeader]) -> set[ImageHeader]:
    """At most three of the headers, which differ in size, or are not all grey, if all of them do."""
    return {min(headers), max(headers), min(headers, key=lambda h: h.is_grey)} if headers else set()


@dataclass(frozen=True)
class Job:
    """`count` consecutive images of a source: their places, not their pixels, so another process can have it.

    `items` yields them in order: paths, contents of files, arrays, or a BadImage.
    """

    count: int
    items: Callable[[], Iterator[Item]]

    def headers(self) -> set[ImageHeader]:
        """The :func:`few` headers of its images; nothing is decoded."""
        found: set[ImageHeader] = set()
        for item in self.items():
            with suppress(BadImage):  # it is told of later, with all others
                found = few(found | {read_header(item)})
        return found

    def decode(self, rows: NDArray[np.uint8], form: Form) -> Iterator[Bad]:
        """Decode the images in order into rows ``[count, C, H, W]`` of zeros; yields the bad ones, which stay black."""
        colour: Colour = "grey" if rows.shape[1] == 1 else "rgb"
        items = self.items()
        for i in range(self.count):
            try:
                item = next(items, BadImage("missing: the file was changed"))
                rows[i] = read_image(item, resolution=rows.shape[2], colour=colour, form=form)
            except BadImage as error:
                yield i, str(error)


@dataclass(frozen=True)
class Source:
    """The index of a source.

    Attributes:
        where: what was asked for, as a person can read it.
        jobs: all images, in order.
        labels: int64 ``[N]``, or None.
        class_names: one for each class; ``()`` without labels.
        name: what image number i is called, for messages.
        bad: (which, why) of what is left out already: it is no image, or has no label.
        every_class: whether a class that is left without images is an error, as it is when the images make the classes.
        in_order: whether its jobs can only be done one after the other, by the thread that asks.
        files: the name of each image's file, for tables that name files; None: what `name` gives.
        persons: for ``ImageDataset.persons``.
        ignored: for ``ImageDataset.ignored``.
    """

    where: str
    jobs: Sequence[Job]
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    name: Callable[[int], str]
    bad: tuple[tuple[str, str], ...] = ()
    every_class: bool = True
    in_order: bool = False
    ignored: tuple[str, ...] = ()
    files: Callable[[], Sequence[str]] | None = None
    persons: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return sum(job.count for job in self.jobs)


@dataclass(frozen=True)
class Found:
    """A source that was recognised, and is not read yet.

    Attributes:
        where: what was asked for.
        place: format and paths, JSON-able: what it is called in the cache.
        files: names and paths of all files that the images and labels follow from, listed anew by each call.
        index: reads the index.
    """

    where: str
    place: Any
    files: Callable[[], Sequence[tuple[str, str]]]
    index: Callable[[], Source]

    def content(self) -> str:
        """Digest the names and contents of all files: as long as it is the same, so are the images.

        Sizes and times would tell less: redaction can leave both as they were.
        """
        files, digest = self.files(), hashlib.sha256()
        with ThreadPoolExecutor(_READERS, "dpsyngen-reading") as pool:  # both reading and hashing let others run
            for lines in pool.map(_contents, [files[part] for part in split_evenly(len(files))]):
                digest.update(lines)
        return digest.hexdigest()


def _contents(files: Sequence[tuple[str, str]]) -> bytes:
    parts: list[str] = []
    for name, path in files:
        try:
            with open_plain(path, sys.maxsize) as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        except (NotPlainError, OSError) as error:  # it is told of when it is decoded
            content = str(error)
        parts += [name, content, ""]
    return "\0".join(parts).encode("utf-8", "surrogateescape")


def whole(paths: Iterable[str | os.PathLike[str]]) -> list[tuple[str, str]]:
    """Files for :attr:`Found.files`, of which only the order matters; links in a pattern were meant."""
    return [("", os.path.realpath(path)) for path in paths]


def split_evenly(count: int) -> list[slice]:
    """0..count - 1 in parts of at most 256; for few images in 32 smaller ones, so that all cores have work."""
    step = max(1, min(256, -(-count // 32)))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def keep_of(count: int, bad: Iterable[int]) -> NDArray[np.bool_]:
    """bool ``[count]``, false for the numbers in `bad`."""
    keep = np.ones(count, dtype=bool)
    keep[list(bad)] = False
    return keep


def settle_bad(bad: Sequence[tuple[str, str]], *, where: str, skip_bad: bool) -> tuple[str, ...]:
    """The record ``"which: why"`` of each of the `bad` (which, why) that are left out.

    Raises:
        DataError: there are some, and `skip_bad` is False; it names the first few of each reason, and their number.
    """
    if not bad or skip_bad:
        return tuple(f"{printable(which)}: {printable(why)}" for which, why in bad)
    reasons: dict[str, list[str]] = {}
    for which, why in bad:
        reasons.setdefault(why, []).append(which)
    shown = ""
    for why, names in list(reasons.items())[:_MOST_REASONS]:
        some = f", … ({len(names):,} in all)" if len(names) > _MOST_NAMED else ""
        shown += f"\n  {', '.join(map(printable, names[:_MOST_NAMED]))}{some}: {printable(why)}"
    if len(reasons) > _MOST_REASONS:
        left = sum(map(len, list(reasons.values())[_MOST_REASONS:]))
        shown += f"\n  … and {left:,} more, for other reasons"
    raise DataError(
        f"{printable(where)}: {len(bad):,} item{'s' * (len(bad) > 1)} cannot be used:{shown}\n"
        "Mend or remove them, or leave them out with --skip-bad (from Python: skip_bad=True), which names each."
    )
