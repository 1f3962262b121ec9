"""What a reader knows of its images before any is decoded: where each lies, its label, and nothing of its pixels."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from dpsyngen.data.decode import BadImage, Colour, ImageHeader, read_header, read_image
from dpsyngen.errors import DataError, listed, printable

BLOCK = 64
"""Images that are decoded and handed on together; a bound on memory, not on the source."""

Item = bytes | str | BadImage
"""An image file's content or path, or why there is none."""
Bad = tuple[int, str]
"""Which image of a job (from 0) cannot be used, and why."""


@dataclass(frozen=True)
class Survey:
    """What headers tell of many images.

    Attributes:
        sizes: (width, height) that occur, two of them at most: whether all are alike is what is asked.
        grey: whether every image is stored in grey.
        readable: how many headers could be read.
    """

    sizes: frozenset[tuple[int, int]] = frozenset()
    grey: bool = True
    readable: int = 0

    def with_(self, other: Survey) -> Survey:
        """Both together."""
        sizes = frozenset(sorted(self.sizes | other.sizes)[:2])
        return Survey(sizes, self.grey and other.grey, self.readable + other.readable)


class Job(Protocol):
    """Consecutive images of a source.  It holds their places, not their pixels, and can be sent to another process."""

    @property
    def count(self) -> int:
        """How many images."""

    def survey(self) -> Survey:
        """Their headers, nothing decoded."""

    def blocks(self, resolution: int, colour: Colour) -> Iterator[tuple[NDArray[np.uint8], list[Bad]]]:
        """The images in order, some at a time, as uint8 ``[B, C, resolution, resolution]``; bad ones are black."""


class EncodedJob(ABC):
    """A job of image files, wherever these are."""

    @property
    @abstractmethod
    def count(self) -> int:
        """How many images."""

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """One for each image, in order."""

    def survey(self) -> Survey:
        """See :class:`Job`."""
        found = Survey()
        for item in self.items():
            header = _caught(read_header, item)
            if isinstance(header, ImageHeader):
                found = found.with_(Survey(frozenset({(header.width, header.height)}), header.is_grey, 1))
        return found

    def blocks(self, resolution: int, colour: Colour) -> Iterator[tuple[NDArray[np.uint8], list[Bad]]]:
        """See :class:`Job`."""
        shape = (1 if colour == "grey" else 3, resolution, resolution)
        items, done = self.items(), 0

        def decode(encoded: bytes | str) -> NDArray[np.uint8]:
            return read_image(encoded, resolution=resolution, colour=colour)

        while done < self.count:
            block = np.zeros((min(BLOCK, self.count - done), *shape), dtype=np.uint8)
            bad: list[Bad] = []
            for i in range(len(block)):
                pixels = _caught(decode, next(items, BadImage("missing: the file was changed")))
                if isinstance(pixels, BadImage):
                    bad.append((done + i, str(pixels)))
                else:
                    block[i] = pixels
            yield block, bad
            done += len(block)


def _caught(read: Callable[[bytes | str], Any], item: Item) -> Any:
    if isinstance(item, BadImage):
        return item
    try:
        return read(item)
    except BadImage as error:
        return error


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
        empty: raises the DataError for classes without an image (none named: for no image at all), given what was left
            out.
    """

    where: str
    jobs: Sequence[Job]
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    name: Callable[[int], str]
    bad: tuple[tuple[str, str], ...] = ()
    every_class: bool = True
    empty: Callable[[Sequence[str], Sequence[tuple[str, str]]], NoReturn] | None = None

    def raise_empty(self, names: Sequence[str], left_out: Sequence[tuple[str, str]]) -> NoReturn:
        """Raise the DataError for these classes without an image, or for no image at all."""
        if self.empty is not None:
            self.empty(names, left_out)
        what = f"no usable image of {listed(names)}" if names else "no usable image in it"
        unused = f" ({len(left_out):,} were left out, first {printable(': '.join(left_out[0]))})" if left_out else ""
        raise DataError(f"{self.where}: {what}{unused}. Add images, or leave the class out.")

    def __len__(self) -> int:
        return sum(job.count for job in self.jobs)


@dataclass(frozen=True)
class Found:
    """A source that was recognised, and is not read yet.

    Attributes:
        where: what was asked for.
        kind: of what format.
        identity: paths, sizes and times of all its files, JSON-able: as long as they are the same, so are the images.
        index: reads the index.
    """

    where: str
    kind: str
    identity: Callable[[], Any]
    index: Callable[[], Source]


def split_evenly(count: int, most: int = 256, least_jobs: int = 32) -> list[range]:
    """0..count - 1 in ranges of at most `most`, some more of them for few images, so that all cores have work."""
    step = max(1, min(most, -(-count // least_jobs)))
    return [range(start, min(start + step, count)) for start in range(0, count, step)]


def file_identity(paths: Sequence[Any]) -> list[list[Any]]:
    """[path, bytes, time of the last change in ns] of each file, for :attr:`Found.identity`."""
    out = []
    for path in paths:
        status = os.stat(path)
        out.append([os.path.realpath(path), status.st_size, status.st_mtime_ns])
    return out
