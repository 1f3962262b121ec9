"""Large ``.npy`` files, and folders of arrays: ``images.npy`` with ``labels.npy`` and ``class_names.json``.

An array of the right form is used where it lies; nothing is copied.  One that must be converted (floating point,
another size or colour) is converted once, into memory or into the cache, as its size says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpsyngen.data.array_format import CLASS_NAMES, HEADER_BYTES, IMAGES, LABELS, npy_header, write_at, write_labels
from dpsyngen.data.arrays import arranged, converted, dataset_from_arrays, to_labels
from dpsyngen.data.build import build
from dpsyngen.data.dataset import ImageDataset
from dpsyngen.data.decode import Colour, default_resolution
from dpsyngen.data.npz import npy_offset, read_npy
from dpsyngen.data.options import Options, in_memory_bytes
from dpsyngen.data.source import BLOCK, Bad, Found, Source, Survey, file_identity, split_evenly
from dpsyngen.data.store import StoredImages
from dpsyngen.errors import DataError, printable
from dpsyngen.files import NotPlainError, open_plain

_MAX_NAMES_BYTES = 2**23


def read_array_folder(folder: Path, options: Options) -> ImageDataset:
    """A folder with ``images.npy``, and ``labels.npy`` and ``class_names.json`` (a list of texts) if there are any.

    Raises:
        DataError: they are broken, do not fit together, or are links.
    """
    for name in (IMAGES, LABELS, CLASS_NAMES):
        if (folder / name).is_symlink():
            raise DataError(f"{printable(folder / name)} is a link, which is not followed. Copy the file here.")
    labels: np.ndarray | None = None
    names: list[str] | None = None
    if options.labels and (folder / LABELS).is_file():
        labels = np.asarray(read_npy(folder / LABELS))
        if (folder / CLASS_NAMES).is_file():
            names = _names(folder / CLASS_NAMES)
    return read_array_file(folder / IMAGES, labels, names, options, where=printable(folder))


def read_array_file(
    path: Path, labels: np.ndarray | None, names: list[str] | None, options: Options, *, where: str
) -> ImageDataset:
    """The images of a ``.npy`` file.

    Args:
        path: the file.
        labels: numbers or texts, one an image, or None.
        names: of the classes, see :func:`dpsyngen.data.arrays.dataset_from_arrays`.
        options: how they are read.
        where: for messages.

    Raises:
        DataError: see :func:`dpsyngen.data.arrays.dataset_from_arrays`.
    """
    images = read_npy(path)
    pixels = arranged(images, where)
    if len(pixels) == 0:
        raise DataError(f"{where}: there are no images in it. Give at least one.")
    colour = _colour(pixels, options)
    resolution = options.resolution or default_resolution({(pixels.shape[3], pixels.shape[2])})
    shape = (len(pixels), 1 if colour == "grey" else 3, resolution, resolution)
    small = math.prod(shape) <= in_memory_bytes() and options.always_in_memory_if_small
    if pixels.dtype == np.uint8 and pixels.shape == shape and not small and images.flags.c_contiguous:
        channels_last = images.ndim == 4 and pixels.strides[1] == 1 and pixels.shape[1] > 1
        row = (resolution, resolution, shape[1]) if channels_last else shape[1:]
        index, class_names = to_labels(labels, names, len(pixels), where)
        stored = StoredImages(path, len(pixels), row, offset=npy_offset(path), channels_last=channels_last)
        return ImageDataset(stored, index, class_names, where)
    if small or (pixels.dtype == np.uint8 and pixels.shape[2:] == shape[2:] and pixels.shape[1] <= shape[1]):
        # Converted in memory, or a view of the file with nothing to convert.
        return dataset_from_arrays(
            images, labels, names, source=where, resolution=options.resolution, channels=options.channels,
            skip_bad=options.skip_bad,
        )  # fmt: skip

    def index_file() -> Source:
        index, class_names = to_labels(labels, names, len(pixels), where)
        jobs = [ArrayJob(str(path), r.start, r.stop) for r in split_evenly(len(pixels))]
        return Source(where, jobs, index, class_names, lambda i: f"image {i}", every_class=False)

    files = [p for p in (path, path.with_name(LABELS), path.with_name(CLASS_NAMES)) if p == path or p.is_file()]
    return build(Found(where, "npy", lambda: file_identity(files), index_file), options)


@dataclass(frozen=True)
class ArrayJob:
    """Consecutive images of a ``.npy`` file; see :class:`dpsyngen.data.source.Job`."""

    path: str
    start: int
    stop: int

    @property
    def count(self) -> int:
        """How many images."""
        return self.stop - self.start

    def survey(self) -> Survey:
        """See :class:`dpsyngen.data.source.Job`."""
        pixels = arranged(read_npy(Path(self.path)), self.path)
        return Survey(frozenset({(pixels.shape[3], pixels.shape[2])}), pixels.shape[1] == 1, self.count)

    def blocks(self, resolution: int, colour: Colour) -> Iterator[tuple[NDArray[np.uint8], list[Bad]]]:
        """See :class:`dpsyngen.data.source.Job`."""
        pixels = arranged(read_npy(Path(self.path)), self.path)
        for start in range(self.start, self.stop, BLOCK):
            images, bad = converted(np.array(pixels[start : min(start + BLOCK, self.stop)]), resolution, colour)
            yield images, [(start - self.start + i, why) for i, why in bad]


def save_images(dataset: ImageDataset, folder: Path) -> None:
    """Write a data set as a folder of arrays, which :func:`~dpsyngen.data.load.load_images` reads without copying it.

    The folder gets mode 0700 and its files 0600: they are as private as the images.

    Args:
        dataset: its images may lie in a file; 16 MiB of them are in memory at a time.
        folder: must not exist, or be empty.

    Raises:
        RunError: the folder has something in it.
    """
    from dpsyngen.files import require_absent_or_empty, write_atomically

    require_absent_or_empty(folder, "the folder")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    if dataset.labels is not None:
        write_labels(folder, dataset.labels, dataset.class_names)

    def write(path: Path) -> None:
        step = max(1, 2**24 // math.prod(dataset.images.shape[1:]))
        row_bytes = math.prod(dataset.images.shape[1:])
        with open(path, "wb", buffering=0) as file:
            file.write(npy_header(tuple(dataset.images.shape)))
            for start in range(0, len(dataset), step):
                rows = np.arange(start, min(start + step, len(dataset)))
                write_at(file.fileno(), dataset.batch(rows), HEADER_BYTES + start * row_bytes)

    write_atomically(folder / IMAGES, write, 0o600)


def _colour(pixels: np.ndarray, options: Options) -> Colour:
    if options.channels == "auto":
        return "grey" if pixels.shape[1] == 1 else "rgb"
    return options.channels


def _names(path: Path) -> list[str]:
    try:
        with open_plain(path, _MAX_NAMES_BYTES) as file:
            names = json.load(file)
    except (NotPlainError, ValueError, RecursionError) as error:
        raise DataError(f"{printable(path)} cannot be read ({printable(error)}). It holds a list of texts.") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{printable(path)} must hold a list of texts, the names of the classes in order.")
    return names
