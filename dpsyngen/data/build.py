"""From an index to a data set: decoded once, into memory or into a file, by threads or by processes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dpsyngen.data.array_format import write_at
from dpsyngen.data.bad import settle_bad
from dpsyngen.data.cache import Cache, Entry, digest_of
from dpsyngen.data.dataset import ImageDataset
from dpsyngen.data.decode import Colour, default_resolution
from dpsyngen.data.decode_worker import Processes
from dpsyngen.data.memory import check_fits
from dpsyngen.data.options import Options, in_memory_bytes
from dpsyngen.data.quiet import quiet_decoders
from dpsyngen.data.source import Found, Job, Source, Survey
from dpsyngen.data.unfinished import Unfinished
from dpsyngen.errors import DataError

_FEW = 1024  # images for which starting processes costs more than they gain
_MOST_THREADS = 8


def build(found: Found, options: Options) -> ImageDataset:
    """The images of a source, decoded, or as they were decoded before.

    Raises:
        DataError: bad images, all in one message; no images; too little memory or space on the disk; a source that
            changes while it is read.
    """
    store = options.store
    identity = None
    if not options.always_in_memory_if_small or store.folder.is_dir():
        identity = digest_of(found.kind, found.identity())
        entry = _cached(store, identity, options)
        if entry is not None:
            return _dataset(found.where, entry, options)
    if options.always_in_memory_if_small:
        source = found.index()
        survey = _survey(source, options, store=None)
        shape = _shape(source, survey, options)
        if math.prod(shape) <= in_memory_bytes():
            return _into_memory(source, shape, options)
        prepared: tuple[Source, Survey] | None = (source, survey)
    else:
        prepared = None
    identity = identity or digest_of(found.kind, found.identity())
    with store.locked(identity) as lock:
        entry = _cached(store, identity, options)  # another process may have made it meanwhile
        if entry is None:
            entry = _into_file(found, prepared, identity, store, lock, options)
    return _dataset(found.where, entry, options)


def _dataset(where: str, entry: Entry, options: Options) -> ImageDataset:
    if entry.skipped and not options.skip_bad:  # it was made with skip_bad
        settle_bad([(line, "") for line in entry.skipped], where=where, skip_bad=False)
    return ImageDataset(entry.images, entry.labels, entry.class_names, where, entry.skipped)


# ------------------------------------------------------------------------------------------------ names of entries


def _key(identity: str, resolution: int, colour: Colour, options: Options) -> str:
    return digest_of(identity, resolution, colour, options.labels)


def _headers_name(identity: str, options: Options) -> str:
    # With and without labels a folder has other images.
    return digest_of(identity, "headers", options.labels)


def _cached(store: Cache, identity: str, options: Options) -> Entry | None:
    resolution: int | None = options.resolution
    colour: Any = options.channels
    if resolution is None or colour == "auto":
        noted = store.noted(_headers_name(identity, options))
        if noted is None:
            return None
        try:
            resolution, colour = resolution or int(noted["resolution"]), noted["colour"] if colour == "auto" else colour
        except (KeyError, TypeError, ValueError):
            return None
    return store.get(_key(identity, resolution, colour, options))


# ------------------------------------------------------------------------------------------------------- headers


def _survey(source: Source, options: Options, store: tuple[Cache, int] | None) -> Survey:
    """What the headers say, where that is needed."""
    if options.resolution is not None and options.channels != "auto":
        return Survey()
    found = Survey()
    for _, survey in _each(source, list(enumerate(source.jobs)), _Look(), options, store):
        found = found.with_(survey)
    return found


def _form(survey: Survey, options: Options) -> tuple[int, Colour]:
    if options.channels == "auto":
        colour: Colour = "grey" if survey.readable and survey.grey else "rgb"
    else:
        colour = options.channels
    return options.resolution or default_resolution(set(survey.sizes)), colour


def _shape(source: Source, survey: Survey, options: Options) -> tuple[int, int, int, int]:
    resolution, colour = _form(survey, options)
    return len(source), 1 if colour == "grey" else 3, resolution, resolution


# ------------------------------------------------------------------------------------------------------ decoding


class Sink(Protocol):
    """Where decoded images go."""

    def write(self, row: int, images: NDArray[np.uint8]) -> None:
        """Images ``[B, C, H, W]`` from this row on."""


@dataclass(frozen=True)
class _Memory:
    images: NDArray[np.uint8]

    def write(self, row: int, images: NDArray[np.uint8]) -> None:
        self.images[row : row + len(images)] = images


@dataclass(frozen=True)
class _File:
    path: str
    offset: int
    row_bytes: int

    def write(self, row: int, images: NDArray[np.uint8]) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            write_at(descriptor, images, self.offset + row * self.row_bytes)
        finally:
            os.close(descriptor)


class _Look:
    def __call__(self, job: Any) -> Survey:
        survey: Survey = job.survey()
        return survey


@dataclass(frozen=True)
class _Placed:
    """A job and the number of its first image."""

    job: Job
    first: int


@dataclass(frozen=True)
class _Decode:
    """Decodes a placed job into a sink; returns the numbers of bad images, with the reasons."""

    resolution: int
    colour: Colour
    sink: Sink

    def __call__(self, placed: Any) -> list[tuple[int, str]]:
        bad: list[tuple[int, str]] = []
        row = placed.first
        for images, wrong in placed.job.blocks(self.resolution, self.colour):
            self.sink.write(row, images)
            row += len(images)
            bad += [(placed.first + i, why) for i, why in wrong]
        return bad


def _placed(source: Source) -> list[_Placed]:
    out, first = [], 0
    for job in source.jobs:
        out.append(_Placed(job, first))
        first += job.count
    return out


def _each(
    source: Source, jobs: list[tuple[int, Any]], task: Callable[[Any], Any], options: Options,
    store: tuple[Cache, int] | None,
) -> Iterator[tuple[int, Any]]:  # fmt: skip
    """(number, result) of the task for each job: by processes for many images in a file, else by threads."""
    count = min(options.processes, len(jobs))
    if store is None or count <= 1 or len(source) < _FEW:
        yield from _by_threads(jobs, task, min(_MOST_THREADS, count))
        return
    cache, lock = store
    processes = Processes(count, task, str(cache.folder / "large-images.lock"), lock)
    try:
        yield from processes.map(jobs)
    finally:
        processes.close()


def _by_threads(jobs: list[tuple[int, Any]], task: Callable[[Any], Any], count: int) -> Iterator[tuple[int, Any]]:
    """Threads suffice for few images: Pillow decodes without the interpreter's lock."""
    from PIL import Image

    Image.init()  # registers the decoders once, so that the first files do not race to do it
    with quiet_decoders():
        if count <= 1:
            for number, job in jobs:
                yield number, task(job)
            return
        with ThreadPoolExecutor(count, "dpsyngen-decoding") as pool:
            try:
                yield from pool.map(lambda job: (job[0], task(job[1])), jobs)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _into_memory(source: Source, shape: tuple[int, int, int, int], options: Options) -> ImageDataset:
    check_fits(math.prod(shape), what=f"{source.where} at resolution {shape[2]}")
    images = np.zeros(shape, dtype=np.uint8)
    bad: dict[int, str] = {}
    done = 0
    task = _Decode(shape[2], "grey" if shape[1] == 1 else "rgb", _Memory(images))
    for number, wrong in _each(source, list(enumerate(_placed(source))), task, options, None):
        bad.update(wrong)
        done += source.jobs[number].count
        if options.on_progress is not None:
            options.on_progress(done, len(source))
    skipped = _settled(source, bad, options)
    labels = source.labels
    if bad:
        keep = np.ones(len(images), dtype=bool)
        keep[list(bad)] = False
        images, labels = images[keep], None if labels is None else labels[keep]
    images.flags.writeable = False
    return ImageDataset(images, labels, source.class_names, source.where, skipped)


def _into_file(
    found: Found, prepared: tuple[Source, Survey] | None, identity: str, store: Cache, lock: int, options: Options
) -> Entry:
    before = found.identity()
    if prepared is None:
        source = found.index()
        survey = _survey(source, options, (store, lock))
    else:
        source, survey = prepared
    shape = _shape(source, survey, options)
    colour: Colour = "grey" if shape[1] == 1 else "rgb"
    if options.resolution is None or options.channels == "auto":
        resolution, native = _form(survey, Options())
        store.note(_headers_name(identity, options), {"resolution": resolution, "colour": native})
    part = Unfinished(store, _key(identity, shape[2], colour, options), shape)
    try:
        left = [(i, placed) for i, placed in enumerate(_placed(source)) if i not in part.done]
        done = len(source) - sum(placed.job.count for _, placed in left)
        task = _Decode(shape[2], colour, _File(str(part.images), part.offset, part.row_bytes))
        try:
            for number, wrong in _each(source, left, task, options, (store, lock)):
                part.finished(number, wrong)
                done += source.jobs[number].count
                if options.on_progress is not None:
                    options.on_progress(done, len(source))
        finally:
            part.flush()
        if found.identity() != before:
            raise DataError(f"{source.where} was changed while it was read. Try again when nothing writes to it.")
        skipped = _settled(source, part.bad, options)
        return part.publish(source.labels, source.class_names, skipped)
    finally:
        part.close()


def _settled(source: Source, bad: dict[int, str], options: Options) -> tuple[str, ...]:
    """What was skipped; an error for bad images that may not be, and for classes that have none left."""
    left_out = sorted([*source.bad, *((source.name(i), why) for i, why in bad.items())])
    skipped = settle_bad(left_out, where=source.where, skip_bad=options.skip_bad)
    empty: list[str] = []
    if source.every_class and source.labels is not None:
        left = np.delete(source.labels, list(bad))
        empty = [
            source.class_names[c] for c in np.flatnonzero(np.bincount(left, minlength=len(source.class_names)) == 0)
        ]
    if empty or len(bad) == len(source):
        source.raise_empty(empty, left_out)
    return skipped
