"""From the index of a source to a data set: images are decoded once, into memory or into a private file.

Few images are decoded by threads.  Many of them go to a file, by processes; it is read again as long as the source does
not change.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import io
import json
import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.data.dataset import ImageDataset, numbered
from dpsyngen.data.decode import BUDGET, Form, ImageHeader
from dpsyngen.data.labels import read_persons
from dpsyngen.data.source import Bad, Found, Job, Options, Source, few, keep_of, settle_bad
from dpsyngen.data.store import IMAGES, LABELS, SelectedImages, Shape, StoredImages, check_fits, write_header
from dpsyngen.errors import DataError, listed, printable
from dpsyngen.files import cache_home, expanded, sync_folder, write_bytes, write_text

FORMAT = "dpsyngen-image-cache-5"
IN_MEMORY_BYTES = 2**30
"""Decoded images that take more go to a file (with ``cache="auto"``)."""
_SPARE_BYTES = 2**24  # on the disk, for labels and other programs
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FEW = 1024  # images for which starting processes costs more than they gain
_MOST_THREADS = 8


def in_memory(shape: Shape, options: Options) -> bool:
    """Whether decoded images of this shape stay in memory; a machine's torchrun processes share 1 GiB."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    most = IN_MEMORY_BYTES // max(1, int(ranks) if ranks.isdigit() else 1)
    return options.cache == "auto" and math.prod(shape) <= most


def build(found: Found, options: Options) -> ImageDataset:
    """The images of a source, decoded, or as they were decoded before.

    Raises:
        DataError: bad images, all in one message; no images; too little memory or space on the disk; a source that
            changes while it is read.
    """
    store, key = Cache(options.cache), _key(found, options)

    def persons() -> NDArray[np.int64] | None:
        return None if options.groups is None else _index(found, options).persons

    made = store.get(key, found, persons)
    if made is None and options.cache == "auto":
        source = _index(found, options)
        shape = options.shape(len(source), read_headers(source, options))
        if in_memory(shape, options):
            check_fits(math.prod(shape), what=f"{source.where} at resolution {shape[2]}")
            images = np.zeros(shape, dtype=np.uint8)
            return settled(source, images, decode(source, images, options), options)
    if made is None:
        with store.locked(key):  # which may have taken hours, in which another process made it, or the source changed
            made = store.get(key, found, persons)
            if made is None:
                made = _into_file(found, key, store, options)
    if made.skipped and not options.skip_bad:  # it was made with skip_bad
        told = [(which, why) for which, _, why in (line.partition(": ") for line in made.skipped)]
        settle_bad(told, where=found.where, skip_bad=False)
    return made


def _key(found: Found, options: Options) -> str:
    parts = [FORMAT, found.place, options.resolution, options.channels, options.labels, options.form]
    parts += [options.label_column, options.label_file and os.path.realpath(options.label_file)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _index(found: Found, options: Options) -> Source:
    """The index, with whose image each is, by number, where a table says it; names of persons go no further."""
    source = found.index()
    if options.groups is None:
        return source
    files = [source.name(i) for i in range(len(source))] if source.files is None else source.files()
    if options.form.frames != "all":
        return replace(source, persons=numbered(read_persons(options.groups, files)))
    distinct = list(dict.fromkeys(files))  # images of one name are frames of a file, so of one person
    whose = dict(zip(distinct, read_persons(options.groups, distinct), strict=True))
    return replace(source, persons=numbered([whose[file] for file in files]))


def _into_file(found: Found, key: str, store: Cache, options: Options) -> ImageDataset:
    # The index lies between the two digests, as what it lists is filed under them.
    content, turns = found.content(), store.folder / "large-images.lock"
    source = _index(found, options)
    shape = options.shape(len(source), read_headers(source, options, turns))
    with store.making(key, shape) as images:
        bad = decode(source, images, options, turns)
        if found.content() != content:
            raise DataError(f"{source.where} was changed while it was read. Try again when nothing writes to it.")
        path = store.publish(key, content, images, bad, settled(source, images, bad, options))
    return store.read(path, found.where, source.persons)


def settled(source: Source, images: NDArray[np.uint8], bad: dict[int, str], options: Options) -> ImageDataset:
    """The good images of a decoded source; DataError for bad ones that may not be, and for classes without any left.

    `images` are all of it, in memory or in a file that is mapped (:meth:`Cache.making`); `bad` is from :func:`decode`.
    """
    left_out = [*source.bad, *((source.name(i), bad[i]) for i in sorted(bad))]
    skipped = settle_bad(left_out, where=source.where, skip_bad=options.skip_bad)
    held: Any = images
    if isinstance(images, np.memmap):
        held = StoredImages(str(images.filename), images.shape, images.offset)
    else:
        images.flags.writeable = False
    told = (skipped, source.ignored, source.persons)
    found = ImageDataset(held, source.labels, source.class_names, source.where, *told)
    found = found.subset(keep_of(len(source), bad)) if bad else found
    empty = found.absent_classes if source.every_class else ()
    if empty or not len(found):
        what = f"no usable image of {listed(empty)}" if empty else "no usable image in it"
        unused = f" ({len(left_out):,} were left out, first {printable(': '.join(left_out[0]))})" if left_out else ""
        raise DataError(f"{source.where}: {what}{unused}. Add images, or leave the class out.")
    return found


# ------------------------------------------------------------------------------------------------------------- decode


def read_headers(source: Source, options: Options, turns: Path | None = None) -> set[ImageHeader]:
    """What headers say, where the shape of the result depends on it."""
    found: set[ImageHeader] = set()
    if options.resolution is None or options.channels == "auto":
        for headers in _each(Job.headers, source.jobs, source, options, turns):
            found = few(found | headers)  # photographs are of millions of sizes
    return found


def decode(source: Source, target: NDArray[np.uint8], options: Options, turns: Path | None = None) -> dict[int, str]:
    """Decode all images into an array; the numbers of the bad ones, with the reasons.

    `target` is uint8 ``[N, C, H, W]``, perhaps mapped: processes write into the file then.  `turns` is of
    :class:`~dpsyngen.data.store.PixelBudget`, given where processes may decode.
    """
    firsts = np.cumsum([0, *(job.count for job in source.jobs)]).tolist()
    placed = list(zip(firsts, source.jobs, strict=False))
    bad: dict[int, str] = {}
    done = 0
    for count, wrong in _each(functools.partial(_decode_job, target, options.form), placed, source, options, turns):
        bad.update(wrong)
        done += count
        if options.on_progress is not None:
            options.on_progress(done, len(source))
    return bad


def _decode_job(target: NDArray[np.uint8], form: Form, placed: tuple[int, Job]) -> tuple[int, list[Bad]]:
    first, job = placed
    return job.count, [(first + i, why) for i, why in job.decode(target[first : first + job.count], form)]


def _each(
    task: Callable[[Any], Any], jobs: Sequence[Any], source: Source, options: Options, turns: Path | None
) -> Iterator[Any]:
    """Results of the task for all jobs, in any order: from processes for many images in a file, else from threads."""
    if source.in_order:
        yield from map(task, jobs)
        return
    count = min(options.workers or len(os.sched_getaffinity(0)), len(jobs))
    if turns is not None and count > 1 and len(source) >= _FEW:
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
            "data.workers=1), or the image library does not survive some file (read them in parts to find which)."
        ) from error


def _apart(task: Callable[[Any], Any], turns: Path, job: Any) -> Any:
    """The task in a process of its own."""
    BUDGET.turns = turns  # large images one at a time, of all processes
    with quiet_decoders():
        return task(job)


@contextlib.contextmanager
def quiet_decoders() -> Iterator[None]:
    """No warnings, no log lines on the terminal, and no messages of libtiff while the context lasts.

    What decoders say of a broken file names no file; whatever of it matters is raised as an error and reported with
    the file's name.  An application that collects the log of Pillow still gets it, but nobody gets that of pydicom,
    which quotes what is in a file.
    """
    logger, ignored, dicom = logging.getLogger("PIL"), logging.NullHandler(), logging.getLogger("pydicom")
    dicom.propagate, propagated = False, dicom.propagate
    logger.addHandler(ignored)  # without any handler, Python prints errors to the terminal
    handler = _set_tiff_handler(None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _set_tiff_handler(handler)
        logger.removeHandler(ignored)
        dicom.propagate = propagated


def _set_tiff_handler(handler: int | None) -> int | None:
    """Have libtiff call this function (an address; None: nothing) for errors; returns the one before it.

    libtiff prints to the terminal by itself, and Pillow has no switch for that.
    """
    try:
        from PIL import _imaging

        # A symbol is looked up in the libraries that a module was linked with, too.
        change = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
    except (ImportError, OSError, AttributeError):
        return None  # a Pillow without libtiff, or with its names hidden: it may print
    change.restype, change.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    before: int | None = change(handler)
    return before


# -------------------------------------------------------------------------------------------------------------- cache


class Cache:
    """A folder of decoded private images: folders of mode 0700, files of mode 0600.

    An entry is named by two digests: of its source's path and the options (the key), and of what is in the source's
    files, so that redacted images are never read as they were, whatever sizes and times say; the entry from before
    is removed then.  It is made under another name and renamed when it is whole; one that was interrupted starts again.
    `folder` "auto" is ``$DPSYNGEN_CACHE``, else ``images`` in :func:`dpsyngen.files.cache_home`.
    """

    def __init__(self, folder: str = "auto") -> None:
        given = os.environ.get("DPSYNGEN_CACHE") if folder == "auto" else folder
        self.folder = expanded(given) if given else cache_home() / "images"

    def get(self, key: str, found: Found, persons: Callable[[], NDArray[np.int64] | None]) -> ImageDataset | None:
        """The entry of this key and content, if there is one; the content is read only where there is one of the key.

        `persons` reads [N], whose the images are, those that are left out included; no entry keeps that.
        """
        if not self._entries(key):
            return None
        whose, path = persons(), self.folder / f"{key}-{found.content()}"
        return self.read(path, found.where, whose) if os.path.lexists(path) else None

    def _entries(self, key: str) -> list[Path]:
        return [path for path in self.folder.glob(f"{key}-*") if path.suffix != ".part"]

    def read(self, path: Path, source: str, persons: NDArray[np.int64] | None) -> ImageDataset:
        """An entry; DataError if others could have put it there, or it is damaged."""
        status = os.lstat(path)
        if not path.is_dir() or path.is_symlink() or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise DataError(
                f"{printable(path)} is not a folder that only you can read, so it is not used for private images. "
                "Remove it, or give another folder: --set data.cache=PATH (from Python: cache=PATH)."
            )
        try:
            about = json.loads((path / "about.json").read_text(encoding="utf-8"))
            stored = StoredImages(path / IMAGES, tuple(about["shape"]), about["offset"])
            labels = np.load(path / LABELS, allow_pickle=False) if about["labelled"] else None
            keep = keep_of(len(stored), about["bad"])
            told = (tuple(about["skipped"]), tuple(about["ignored"]), None if persons is None else persons[keep])
            images: Any = SelectedImages(stored, np.flatnonzero(keep)) if about["bad"] else stored
            return ImageDataset(images, labels, tuple(about["class_names"]), source, *told)
        except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
            raise DataError(
                f"{printable(path)}, a copy of decoded images, is damaged ({printable(error)}). Remove it: it is made "
                "again from the source."
            ) from error

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold the lock of this name, waiting for it; one process makes an entry while others wait."""
        from filelock import FileLock

        with contextlib.ExitStack() as held:
            try:
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                held.enter_context(FileLock(self.folder / f"{name}.lock", mode=0o600))
            except (OSError, NotImplementedError) as error:
                raise self._unusable(error) from error
            yield

    @contextlib.contextmanager
    def making(self, key: str | None, shape: Shape) -> Iterator[np.memmap[Any, np.dtype[np.uint8]]]:
        """A fresh file, mapped, with its room on the disk taken before anything is decoded.

        Call it with the key's lock held.  Whatever :meth:`publish` has not renamed is removed in the end; what a killed
        process left, by the next call.  Without a key the file has no name, and vanishes with whoever has it open.
        DataError if there is no room, or no folder.
        """
        for left in self.folder.glob(f"{key}-*.part") if key else ():
            warnings.warn("decoding these images was interrupted before: it starts again.", stacklevel=2)
            shutil.rmtree(left, ignore_errors=True)
        path, size = None, math.prod(shape) + _SPARE_BYTES
        with contextlib.ExitStack() as at_end:
            try:
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                if size > shutil.disk_usage(self.folder).free:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if key is None:
                    file = at_end.enter_context(tempfile.TemporaryFile(dir=self.folder))
                    path = f"/proc/self/fd/{file.fileno()}"
                else:
                    folder = tempfile.mkdtemp(dir=self.folder, prefix=f"{key}-", suffix=".part")  # mode 0700
                    at_end.callback(shutil.rmtree, folder, ignore_errors=True)
                    path = os.path.join(folder, IMAGES)
                    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
                    file = at_end.enter_context(os.fdopen(descriptor, "w+b"))
                offset = write_header(file, shape)
                # On file systems that cannot take room ahead, this writes zeros.
                os.posix_fallocate(file.fileno(), 0, offset + math.prod(shape))
                file.flush()
                yield np.memmap(path, np.uint8, "r+", offset, shape)
            except OSError as error:
                if path is not None and error.errno not in _FULL:
                    raise  # not of this folder, but of the source
                raise self._unusable(error, size) from error

    def publish(
        self,
        key: str,
        content: str,
        images: np.memmap[Any, np.dtype[np.uint8]],
        bad: Iterable[int],
        made: ImageDataset,
    ) -> Path:
        """Name a file from :meth:`making`, all written, by key and content; what the source was before goes.

        Rows of `bad` images stay in the file, unused; `made` has labels, class names, and what was left out.
        """
        path = Path(str(images.filename))
        folder = path.parent
        about = {"shape": images.shape, "offset": images.offset, "bad": sorted(bad)}
        about |= {"labelled": made.labels is not None, "class_names": made.class_names}
        about |= {"skipped": made.skipped, "ignored": made.ignored}
        if made.labels is not None:
            labels = io.BytesIO()
            np.save(labels, made.labels, allow_pickle=False)
            write_bytes(folder / LABELS, labels.getvalue(), 0o600)
        images.flush()
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        write_text(folder / "about.json", json.dumps(about), 0o600)
        # Everything in it is on the disk by now, so a power failure cannot leave the name on an entry without content.
        place = self.folder / f"{key}-{content}"
        os.rename(folder, place)
        sync_folder(self.folder)
        for path in self._entries(key):  # whoever reads one goes on with the file that is open
            if path != place:
                shutil.rmtree(path, ignore_errors=True)
        return place

    def _unusable(self, error: Exception, size: int = 0) -> DataError:
        if getattr(error, "errno", None) in _FULL:
            free = shutil.disk_usage(self.folder).free
            return DataError(
                f"the decoded images need {size / 2**30:,.2f} GiB in {printable(self.folder)}, but "
                f"{free / 2**30:,.2f} GiB are free. Free some space, give a folder on a larger disk (--set "
                "data.cache=PATH; from Python: cache=PATH), or use a smaller resolution."
            )
        why = getattr(error, "strerror", None) or error
        return DataError(
            f"the decoded images go to a file, but the folder {printable(self.folder)} cannot be used "
            f"({printable(why)}). Give one that you can write to, on a disk with locks: --set data.cache=PATH (from "
            "Python: cache=PATH)."
        )
