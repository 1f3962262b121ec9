"""From the index of a source to a data set: images are decoded once, into memory or into a file of the cache.

A reader lists where each image lies and what its label is, and reads no pixels (:class:`Source`).  Its :class:`Job`\\ s
are then decoded: by threads into memory, or by processes where many images go to a file.
"""

from __future__ import annotations

import functools
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from dpsyngen.data.dataset import ImageDataset
from dpsyngen.data.decode import (
    BadImage,
    Colour,
    ImageHeader,
    default_resolution,
    quiet_decoders,
    read_header,
    read_image,
    share_budget,
)
from dpsyngen.data.store import Cache, Entry, Part, Shape, check_fits, digest_of, kept_of
from dpsyngen.errors import DataError, listed, printable

IN_MEMORY_BYTES = 2**30
"""Decoded images that take more go to a file (with ``cache="auto"``)."""
BLOCK = 64
"""Images that are decoded and handed on together; a bound on memory, not on the source."""
LISTED = 1000  # lines of bad images in a message: whoever mends the files needs all of them
_FEW = 1024  # images for which starting processes costs more than they gain
_MOST_THREADS = 8

Channels = Literal["auto", "grey", "rgb"]
Item = bytes | str | BadImage
"""An image file's content or path, or why there is none."""
Bad = tuple[int, str]
"""Which image of a job (from 0) cannot be used, and why."""


@dataclass(frozen=True)
class Options:
    """How images are read: the arguments of :func:`dpsyngen.data.load.load_images`, where they are explained."""

    resolution: int | None = None
    channels: Channels = "auto"
    labels: bool = True
    skip_bad: bool = False
    cache: str = "auto"
    workers: int | None = None
    on_progress: Callable[[int, int], None] | None = None

    @property
    def auto(self) -> bool:
        """Whether the size decides if images go to a file."""
        return self.cache == "auto"

    @property
    def store(self) -> Cache:
        """Where decoded images lie if they do not lie in memory."""
        return Cache(None if self.auto else Path(self.cache))

    def in_memory(self, shape: Shape) -> bool:
        """Whether images of this shape stay in memory; a machine's torchrun processes share 1 GiB."""
        ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
        most = IN_MEMORY_BYTES // max(1, int(ranks) if ranks.isdigit() else 1)
        return self.auto and math.prod(shape) <= most

    def shape(self, count: int, seen: Survey) -> Shape:
        """Shape of the result, from what was asked for and from what the headers say."""
        resolution = self.resolution or default_resolution(set(seen.sizes))
        grey = self.channels == "grey" or (self.channels == "auto" and seen.any and seen.grey)
        return count, 1 if grey else 3, resolution, resolution


@dataclass(frozen=True)
class Survey:
    """What headers tell of many images.

    Attributes:
        sizes: (width, height) that occur, two of them at most: whether all are alike is what is asked.
        grey: whether every image is stored in grey.
        any: whether a header could be read.
    """

    sizes: frozenset[tuple[int, int]] = frozenset()
    grey: bool = True
    any: bool = False

    def with_(self, other: Survey) -> Survey:
        """Both together."""
        sizes = frozenset(sorted(self.sizes | other.sizes)[:2])
        return Survey(sizes, self.grey and other.grey, self.any or other.any)

    def with_header(self, header: ImageHeader) -> Survey:
        """With one more image."""
        return self.with_(Survey(frozenset({(header.width, header.height)}), header.is_grey, True))


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
                found = found.with_header(header)
        return found

    def blocks(self, resolution: int, colour: Colour) -> Iterator[tuple[NDArray[np.uint8], list[Bad]]]:
        """See :class:`Job`."""
        shape = (1 if colour == "grey" else 3, resolution, resolution)
        items, done = self.items(), 0
        while done < self.count:
            block = np.zeros((min(BLOCK, self.count - done), *shape), dtype=np.uint8)
            bad: list[Bad] = []
            for i in range(len(block)):
                item = next(items, BadImage("missing: the file was changed"))
                pixels = _caught(lambda e: read_image(e, resolution=resolution, colour=colour), item)
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
        empty: what to say of classes without an image (none named: of no image at all): "what.  What to do."
    """

    where: str
    jobs: Sequence[Job]
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    name: Callable[[int], str]
    bad: tuple[tuple[str, str], ...] = ()
    every_class: bool = True
    empty: Callable[[Sequence[str]], tuple[str, str]] | None = None

    def raise_empty(self, names: Sequence[str], left_out: Sequence[tuple[str, str]]) -> NoReturn:
        """Raise the DataError for these classes without an image, or for no image at all."""
        what = f"no usable image of {listed(names)}" if names else "no usable image in it"
        todo = "Add images, or leave the class out."
        if self.empty is not None:
            what, todo = self.empty(names)
        unused = f" ({len(left_out):,} were left out, first {printable(': '.join(left_out[0]))})" if left_out else ""
        raise DataError(f"{self.where}: {what}{unused}. {todo}")

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
    return [[os.path.realpath(path), (s := os.stat(path)).st_size, s.st_mtime_ns] for path in paths]


def settle_bad(bad: Sequence[tuple[str, str]], *, where: str, skip_bad: bool) -> tuple[str, ...]:
    """List all bad images in one error, or return them as the record of what was skipped.

    Args:
        bad: (which, why) of every bad file or array entry.
        where: the source that was asked for.
        skip_bad: leave them out instead of raising.

    Returns:
        ``"which: why"`` for each, when `skip_bad`.

    Raises:
        DataError: there are bad images and `skip_bad` is False; it lists the first 1,000.
    """
    lines = tuple(f"{printable(which)}: {printable(why)}" for which, why in bad)
    if not lines or skip_bad:
        return lines
    shown = "".join(f"\n  {line}" for line in lines[:LISTED])
    more = f"\n  … and {len(lines) - LISTED:,} more" if len(lines) > LISTED else ""
    count = "1 item" if len(lines) == 1 else f"{len(lines)} items"
    raise DataError(
        f"{printable(where)}: {count} cannot be used:{shown}{more}\n"
        "Mend or remove them, or leave them out with --skip-bad (from Python: skip_bad=True)."
    )


# ------------------------------------------------------------------------------------------------------------- decode


def build(found: Found, options: Options) -> ImageDataset:
    """The images of a source, decoded, or as they were decoded before.

    Raises:
        DataError: bad images, all in one message; no images; too little memory or space on the disk; a source that
            changes while it is read.
    """
    store = options.store
    if options.auto and not store.folder.is_dir():
        key, entry = "", None
    else:
        key = _key(found, options)
        entry = store.get(key)
    source = None
    if entry is None and options.auto:
        source = found.index()
        shape = options.shape(len(source), _survey(source, options, None))
        if options.in_memory(shape):
            check_fits(math.prod(shape), what=f"{source.where} at resolution {shape[2]}")
            images = np.zeros(shape, dtype=np.uint8)
            bad = _decode(source, images, options, None)
            entry = _settled(source, bad, options)
            images = kept_of(images, keep_of(len(images), bad))
            images.flags.writeable = False
            return ImageDataset(images, entry.labels, entry.class_names, source.where, entry.skipped)
    if entry is None:
        key = key or _key(found, options)
        with store.locked(key):
            entry = store.get(key)  # another process may have made it meanwhile
            if entry is None:
                _into_file(found, source, key, store, options)
                entry = store.get(key)
    assert entry is not None
    if entry.skipped and not options.skip_bad:  # it was made with skip_bad
        settle_bad([(line, "") for line in entry.skipped], where=found.where, skip_bad=False)
    return ImageDataset(entry.images, entry.labels, entry.class_names, found.where, entry.skipped)


def _key(found: Found, options: Options) -> str:
    return digest_of(found.kind, found.identity(), options.resolution, options.channels, options.labels)


def keep_of(count: int, bad: Any) -> NDArray[np.bool_]:
    """bool ``[count]``, false for the numbers in `bad`."""
    keep = np.ones(count, dtype=bool)
    keep[list(bad)] = False
    return keep


def _into_file(found: Found, source: Source | None, key: str, store: Cache, options: Options) -> None:
    before, turns = found.identity(), store.folder / "large-images.lock"
    source = source or found.index()
    shape = options.shape(len(source), _survey(source, options, turns))
    with store.making(key, shape) as part:
        bad = _decode(source, part, options, turns)
        if found.identity() != before:
            raise DataError(f"{source.where} was changed while it was read. Try again when nothing writes to it.")
        store.publish(key, part, bad, _settled(source, bad, options))


def _settled(source: Source, bad: dict[int, str], options: Options) -> Entry:
    """What goes with the images that are left; an error for bad ones that may not be, and for classes without any."""
    left_out = sorted([*source.bad, *((source.name(i), why) for i, why in bad.items())])
    skipped = settle_bad(left_out, where=source.where, skip_bad=options.skip_bad)
    labels, empty = source.labels, []
    if labels is not None:
        labels = labels[keep_of(len(labels), bad)]
        counts = np.bincount(labels, minlength=len(source.class_names))
        empty = [source.class_names[c] for c in np.flatnonzero(counts == 0)] if source.every_class else []
    if empty or len(bad) == len(source):
        source.raise_empty(empty, left_out)
    return Entry(None, labels, source.class_names, skipped)


def _survey(source: Source, options: Options, turns: Path | None) -> Survey:
    """What the headers say, where that is needed."""
    seen = Survey()
    if options.resolution is None or options.channels == "auto":
        for found in _each(_look, source.jobs, len(source), options, turns):
            seen = seen.with_(found)
    return seen


def _look(job: Job) -> Survey:
    return job.survey()


def _decode(source: Source, target: NDArray[np.uint8] | Part, options: Options, turns: Path | None) -> dict[int, str]:
    """Decode all images into an array or a file; the numbers of the bad ones, with the reasons."""
    firsts = np.cumsum([0, *(job.count for job in source.jobs)]).tolist()
    task = functools.partial(_decode_job, target)
    bad: dict[int, str] = {}
    done = 0
    for count, wrong in _each(task, list(zip(firsts, source.jobs, strict=False)), len(source), options, turns):
        bad.update(wrong)
        done += count
        if options.on_progress is not None:
            options.on_progress(done, len(source))
    return bad


def _decode_job(target: NDArray[np.uint8] | Part, placed: tuple[int, Job]) -> tuple[int, list[Bad]]:
    first, job = placed
    bad: list[Bad] = []
    row, (_, channels, resolution, _) = first, target.shape
    for images, wrong in job.blocks(resolution, "grey" if channels == 1 else "rgb"):
        if isinstance(target, Part):
            target.write(row, images)
        else:
            target[row : row + len(images)] = images
        row += len(images)
        bad += [(first + i, why) for i, why in wrong]
    return row - first, bad


def _each(
    task: Callable[[Any], Any], jobs: Sequence[Any], images: int, options: Options, turns: Path | None
) -> Iterator[Any]:
    """Results of the task for all jobs, in any order: from processes for many images in a file, else from threads."""
    count = min(options.workers or len(os.sched_getaffinity(0)), len(jobs))
    if turns is not None and count > 1 and images >= _FEW:
        yield from _by_processes(functools.partial(_apart, task, turns), jobs, count)
        return
    from PIL import Image

    Image.init()  # registers the decoders once, so that the first files do not race to do it
    # Threads suffice for few images: Pillow decodes without the interpreter's lock.
    with quiet_decoders(), ThreadPoolExecutor(max(1, min(_MOST_THREADS, count)), "dpsyngen-decoding") as pool:
        try:
            yield from pool.map(task, jobs)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _by_processes(task: Callable[[Any], Any], jobs: Sequence[Any], count: int) -> Iterator[Any]:
    # joblib, as the processes of multiprocessing import the user's main module again, which would run a script without
    # an `if __name__ == "__main__"` a second time.
    from joblib import Parallel, delayed
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    # Without max_nbytes=None joblib would write large arguments, that is private data, to a temporary folder.
    parallel = Parallel(count, return_as="generator_unordered", max_nbytes=None, idle_worker_timeout=5)
    try:
        yield from parallel(delayed(task)(job) for job in jobs)
    except TerminatedWorkerError as error:
        raise DataError(
            "a process that decoded images was ended from outside. Perhaps memory ran out (use fewer: --set "
            "data.workers=1), or a file is broken in a way that the image library does not survive (read it in parts "
            "to find which)."
        ) from error


def _apart(task: Callable[[Any], Any], turns: Path, job: Any) -> Any:
    """The task in a process of its own."""
    share_budget(turns)
    with quiet_decoders():
        return task(job)
