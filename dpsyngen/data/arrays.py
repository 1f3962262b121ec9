"""Images that are arrays already: in Python, in ``.npy`` and ``.npz`` files, and in folders of arrays.

Layouts: ``[N, H, W]`` (grey), ``[N, H, W, C]`` and ``[N, C, H, W]`` with C = 1 or 3.  Values: see
:mod:`dpsyngen.data.decode`.  Nothing is copied where nothing has to change, and nothing is ever
unpickled.  The header of a file says how much memory its array takes, so it is read first, with bounds of its own.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpsyngen.data.cache import build, decode, in_memory, read_headers, settled
from dpsyngen.data.dataset import ImageDataset
from dpsyngen.data.decode import Form, ImageHeader, Item, arranged
from dpsyngen.data.labels import MAX_NAME_BYTES, check_class_count, ignored, index_labels, label_name, to_text
from dpsyngen.data.source import Found, Job, Options, Source, split_evenly, whole
from dpsyngen.data.store import CLASS_NAMES, IMAGES, LABELS, Shape, StoredImages, check_fits, write_header
from dpsyngen.errors import DataError, listed, printable, shown
from dpsyngen.files import damaged, open_plain, require_absent_or_empty, write_atomically, write_bytes, write_text

IMAGE_KEYS = ("images", "x", "x_train", "arr_0")
NAME_KEY = "class_names"
MAX_HEADER_BYTES = 10_000  # numpy writes about 100
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}  # what numpy writes; others have dictionaries of any size
_MAX_NAMES_BYTES = 2**23


# --------------------------------------------------------------------------------------------------- arrays in memory


def dataset_from_arrays(
    images: np.ndarray | Sequence[Item],
    labels: np.ndarray | None,
    class_names: Sequence[str] | None,
    source: str,
    options: Options,
) -> ImageDataset:
    """A data set from arrays in any accepted layout, or from a list of images in any form.

    Args:
        images: uint8, uint16, bool or float in [0, 1]; ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]``, C = 1 or 3;
            or Pillow images, arrays, tensors, paths or contents of files, also mixed.
        labels: whole numbers or strings ``[N]`` (or ``[N, 1]``), or None.
        class_names: see :func:`dpsyngen.data.labels.index_labels`.
        source: shown in messages and kept in the data set.
        options: size, colour, and whether float images with NaN, infinite or out-of-range values are left out.

    DataError for other types, shapes or values than these, or counts that differ.
    """
    pixels = arranged(images, source, options.form) if isinstance(images, np.ndarray) else images
    index, names = index_labels(labels, class_names, len(pixels), source)
    items = _source(len(pixels), lambda part: iter(pixels[part]), index, names, source)
    if isinstance(pixels, np.ndarray):
        shape = _shape(pixels, options, source)
        if _is_right(pixels, shape, options):
            return ImageDataset(np.broadcast_to(pixels, shape, subok=True), index, names, source)
    else:
        shape = options.shape(len(pixels), read_headers(items, options))
    check_fits(math.prod(shape), what=f"{source} at resolution {shape[2]}")
    target = np.zeros(shape, dtype=np.uint8)
    return settled(items, target, decode(items, target, options), options)


def _shape(pixels: np.ndarray, options: Options, where: str) -> Shape:
    count, channels, height, width = pixels.shape
    if count == 0:
        raise DataError(f"{where}: there are no images in it. Give at least one.")
    return options.shape(count, {ImageHeader(width, height, channels == 1)})


def _is_right(pixels: np.ndarray, shape: Shape, options: Options) -> bool:
    """Whether a view of the array is the result: grey images are RGB by repeating their channel."""
    if pixels.dtype != np.uint8 or options.form.value_range is not None:
        return False
    return pixels.shape[2:] == shape[2:] and pixels.shape[1] <= shape[1]


def _source(
    count: int,
    items: Callable[[slice], Iterator[Item]],
    index: NDArray[np.int64] | None,
    names: tuple[str, ...],
    where: str,
) -> Source:
    jobs = [Job(part.stop - part.start, functools.partial(items, part)) for part in split_evenly(count)]
    return Source(where, jobs, index, names, lambda i: f"image {i}", every_class=False)


# -------------------------------------------------------------------------------------------------- .npy and .npz


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        # In Python's integers, so that a hostile shape does not overflow to something small.
        return math.prod(self.shape) * self.dtype.itemsize


def _read_header(stream: IO[bytes], path: Path, key: str | None) -> _Header:
    """The header of a ``.npy`` stream, which is left at the first value."""
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):  # only tables need another, in which a header may declare 4 GiB, which numpy would read
        raise ValueError(f"it is of .npy version {version}, and plain arrays are of (1, 0)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers that Python 2 wrote
        header = _Header(*np.lib.format.read_array_header_1_0(stream, MAX_HEADER_BYTES))
    if header.dtype.hasobject:
        what = f": '{key}'" if key else ""
        raise DataError(
            f"{printable(path)}{what} holds Python objects, which could run code when read. Save it as a plain array: "
            "np.stack(images) for images, np.array(names, dtype=str) for names."
        )
    if any(n < 0 for n in header.shape):
        raise ValueError(f"its shape {shown(header.shape)} is negative")
    return header


def read_npy(path: Path) -> np.ndarray:
    """The array of a ``.npy`` file, memory-mapped read-only."""
    with damaged(path, "a .npy file"):
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                raise DataError(f"{printable(path)} is a .npz file by its content. Rename it to end in .npz.")
            file.seek(0)
            header = _read_header(file, path, None)
            if os.fstat(file.fileno()).st_size - file.tell() < header.num_bytes:
                raise ValueError(f"{header.num_bytes:,} bytes are declared, but fewer are there")
        if header.num_bytes == 0:  # cannot be mapped
            return np.zeros(header.shape, header.dtype)
        return np.lib.format.open_memmap(path, mode="r")


def read_npz(
    path: Path, *, labels: bool, label_column: str | None = None
) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...] | None, tuple[str, ...]]:
    """Images, labels and class names of a ``.npz`` file, and texts that tell what else is ignored.

    Keys: images under ``images``, ``x``, ``x_train`` or ``arr_0``; labels under `label_column` or a usual
    name, see :data:`~dpsyngen.data.labels.LABEL_NAMES`; names of classes under ``class_names`` (strings).

    DataError if it is broken, without images, of Python objects, of more than half of the memory, with a key that is
    there twice or unclear, or compressed in another way than numpy does.
    """
    with damaged(path, "a .npz file"), zipfile.ZipFile(path) as archive:
        members: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            key = info.filename.removesuffix(".npy")  # what is no array keeps its ending, and is told of
            if key in members:  # the array whose size was checked must be the one that is read
                raise DataError(f"{printable(path)}: '{printable(key, 80)}' is in it twice. Save it again.")
            members[key] = info
        image_key = next((key for key in IMAGE_KEYS if key in members), None)
        if image_key is None:
            known = f"{listed(members)}. Save them under one of {listed(IMAGE_KEYS)}"
            raise DataError(f"{printable(path)} has no images: its keys are {known}.")
        label_key, told = _label_key(archive, members, path, image_key, label_column) if labels else (None, ())
        wanted = [key for key in (image_key, label_key, NAME_KEY if label_key else None) if key in members]
        headers = {key: _header_of(archive, members[key], path, key) for key in wanted}
        if NAME_KEY in headers:
            names = headers[NAME_KEY]
            if len(names.shape) != 1 or names.dtype.kind not in "US" or names.dtype.itemsize > 16 * MAX_NAME_BYTES:
                allowed = f"one axis of strings of at most {MAX_NAME_BYTES} bytes"
                raise DataError(f"{printable(path)}: '{NAME_KEY}' must be {allowed}.")
            check_class_count(names.shape[0], str(path))
        check_fits(sum(header.num_bytes for header in headers.values()), what=str(path))
        arrays = {}
        for key in wanted:
            with archive.open(members[key]) as member:
                arrays[key] = np.lib.format.read_array(member, allow_pickle=False)
                if member.read(1):  # at the end of a member its check sum is checked, too
                    raise ValueError(f"'{key}' has more bytes than declared")
    texts = to_text(arrays[NAME_KEY], f"{printable(path)}: '{NAME_KEY}'") if NAME_KEY in arrays else None
    return arrays[image_key], arrays[label_key] if label_key else None, texts, told


def _header_of(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, key: str) -> _Header:
    if info.compress_type not in _METHODS:
        raise DataError(f"{printable(path)}: '{key}' is not compressed as numpy does. Use np.savez_compressed.")
    with archive.open(info) as member:
        return _read_header(member, path, key)


def _label_key(
    archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], path: Path, image_key: str, asked: str | None
) -> tuple[str | None, tuple[str, ...]]:
    """The key of the labels, by :func:`~dpsyngen.data.labels.label_name`, and what is told of arrays that are not used.

    An array of another name could hold them if it has a whole number or a text for each image.
    """
    headers: dict[str, _Header | None] = {}
    for key, info in members.items():
        try:
            headers[key] = _header_of(archive, info, path, key)
        except (DataError, ValueError, NotImplementedError, RuntimeError, EOFError):
            headers[key] = None  # no array, or of Python objects; if it is one of ours, this is told of later
    own = headers.pop(image_key)
    count = own.shape[0] if own is not None and own.shape else -1
    shapes = ((count,), (count, 1))
    fitting = [k for k, h in headers.items() if h is not None and h.shape in shapes and h.dtype.kind in "iuUS"]
    others = [key for key in headers if key != NAME_KEY]
    chosen = label_name(others, asked, None, printable(path), could_be=[k for k in fitting if k != NAME_KEY])
    # "about" is what `dpsyngen sample` says of its images.
    others = [other for other in headers if other not in (chosen, NAME_KEY if chosen else None, "about")]
    return chosen, ignored(str(path), others)


# -------------------------------------------------------------------------------------- large files, folders of arrays


def read_array_folder(folder: Path, options: Options) -> ImageDataset:
    """A folder with ``images.npy``, and ``labels.npy`` and ``class_names.json`` (a list of texts) if there are any."""
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


def _names(path: Path) -> list[str]:
    with damaged(path, "a JSON file"), open_plain(path, _MAX_NAMES_BYTES) as file:
        names = json.load(file)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{printable(path)} must hold a list of texts, the names of the classes in order.")
    return names


def read_array_file(
    path: Path, labels: np.ndarray | None, names: list[str] | None, options: Options, *, where: str
) -> ImageDataset:
    """The images of a ``.npy`` file; arguments and errors as of :func:`dataset_from_arrays`.

    An array of the right form is used where it lies.  One that must be converted (floating point, another size or
    colour) is converted once, into memory or into the cache, as its size says.
    """
    images, form = read_npy(path), options.form
    pixels = arranged(images, where, form)
    shape = _shape(pixels, options, where)
    small, right = in_memory(shape, options), _is_right(pixels, shape, options)
    if right and pixels.shape == shape and not small and pixels.flags.c_contiguous:
        index, class_names = index_labels(labels, names, len(pixels), where)
        return ImageDataset(StoredImages(path, shape, images.offset), index, class_names, where)  # type: ignore[attr-defined]
    if small or right:
        return dataset_from_arrays(images, labels, names, where, options)

    def index_file() -> Source:
        index, class_names = index_labels(labels, names, len(pixels), where)
        return _source(len(pixels), functools.partial(_npy_items, path, form), index, class_names, where)

    files = [p for p in (path, path.with_name(LABELS), path.with_name(CLASS_NAMES)) if p == path or p.is_file()]
    place = ["npy", form.value_range, os.path.realpath(path)]
    return build(Found(where, place, lambda: whole(files), index_file), options)


def _npy_items(path: Path, form: Form, part: slice) -> Iterator[Item]:
    yield from arranged(read_npy(path), str(path), form)[part]


def save_images(dataset: ImageDataset, folder: Path) -> None:
    """Write a data set as a folder of arrays, which :func:`~dpsyngen.data.load.load_images` reads without copying it.

    The folder gets mode 0700 and its files 0600: they are as private as the images.

    At most 256 images are in memory at a time.  RunError: `folder` has something in it.
    """
    require_absent_or_empty(folder, "the folder")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            write_header(file, dataset.images.shape)
            for part in split_evenly(len(dataset)):
                file.write(dataset.batch(np.arange(part.start, part.stop)).data)

    if dataset.labels is not None:
        buffer = io.BytesIO()
        np.save(buffer, dataset.labels, allow_pickle=False)
        write_bytes(folder / LABELS, buffer.getvalue(), 0o600)
        write_text(folder / CLASS_NAMES, json.dumps(dataset.class_names, ensure_ascii=False), 0o600)
    write_atomically(folder / IMAGES, write, 0o600)
