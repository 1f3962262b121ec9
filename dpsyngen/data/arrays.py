"""From arrays in any accepted layout to an :class:`ImageDataset`; files of arrays come through here too.

Layouts: ``[N, H, W]`` (grey), ``[N, H, W, C]`` and ``[N, C, H, W]`` with C = 1 or 3.  Values: uint8, or
floating point in [0, 1] (multiplied by 255 and rounded).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from dpsyngen.data.bad import settle_bad
from dpsyngen.data.dataset import ImageDataset
from dpsyngen.data.decode import MAX_PIXELS, array_to_image, default_resolution, image_to_array, resize_square
from dpsyngen.data.labels import MAX_NAME_BYTES, check_class_count, check_class_names
from dpsyngen.data.memory import check_fits
from dpsyngen.errors import DataError, listed, printable

Channels = Literal["auto", "grey", "rgb"]
_CHUNK_VALUES = 4 * 2**20
_MAX_SIDE = 65_535  # pixels, as JPEG; Pillow's own arithmetic ends at 2³¹


def dataset_from_arrays(
    images: np.ndarray,
    labels: np.ndarray | None,
    class_names: Sequence[str] | None,
    *,
    source: str,
    resolution: int | None,
    channels: Channels,
    skip_bad: bool,
) -> ImageDataset:
    """A data set from arrays in any accepted layout, without copying where nothing has to change.

    Args:
        images: uint8 or float in [0, 1]; ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]``, C = 1 or 3.
        labels: whole numbers or strings ``[N]`` (or ``[N, 1]``), or None.
        class_names: names in label order (labels are then 0, 1, …).  Without them, the distinct label values,
            sorted, are the classes, and their text is their name: which values occur is then taken as public.
            Names of bytes are read as UTF-8.
        source: shown in messages and kept in the data set.
        resolution: None keeps the size of square images of 8..64 pixels, else 32.
        channels: ``"auto"`` keeps what is there.
        skip_bad: leave out float images with NaN, infinite or out-of-range values.

    Raises:
        DataError: other types, shapes or values than these, or counts that differ.
    """
    pixels = arranged(images, source)
    if len(pixels) == 0:
        raise DataError(f"{source}: there are no images in it. Give at least one.")
    label_index, names = to_labels(labels, class_names, len(pixels), source)
    skipped: tuple[str, ...] = ()
    if pixels.dtype != np.uint8:
        pixels, good, skipped = _from_float(pixels, source, skip_bad)
        if label_index is not None:
            label_index = label_index[good]
    pixels = _to_channels(pixels, channels, source)
    pixels = _to_resolution(pixels, resolution or default_resolution({(pixels.shape[3], pixels.shape[2])}), source)
    pixels = pixels.view()
    pixels.flags.writeable = False
    return ImageDataset(pixels, label_index, names, source, skipped)


def arranged(images: np.ndarray, source: str) -> np.ndarray:
    """Images in any accepted layout as a view ``[N, C, H, W]``.

    Raises:
        DataError: another type or shape.
    """
    shape = list(images.shape)
    if isinstance(images, np.ma.MaskedArray):
        raise DataError(f"{source}: masked images; the mask would be lost. Fill it first: images.filled(255).")
    if images.dtype.hasobject:
        raise DataError(f"{source}: the images are Python objects, perhaps of several sizes. Make one array: np.stack.")
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise DataError(
            f"{source}: images of type {images.dtype}; uint8 (0..255) or floating point (0..1) is allowed. "
            "If the values are 0..255, save images.astype('uint8')."
        )
    result = _arrange(images, shape, source)
    height, width = result.shape[2:]
    if 0 in (height, width) and len(result):
        raise DataError(f"{source}: images of {height}×{width} pixels are empty.")
    if max(height, width) > _MAX_SIDE or height * width > MAX_PIXELS:
        raise DataError(
            f"{source}: images of {height}×{width} pixels; at most {_MAX_SIDE:,} a side and {MAX_PIXELS:,} in all "
            "are allowed. Cut them into smaller ones."
        )
    return result


def _arrange(images: np.ndarray, shape: list[int], source: str) -> np.ndarray:
    if images.ndim == 3 and not (shape[-1] in (1, 3) and shape[0] != 0):
        return images[:, None]
    if images.ndim == 4:
        first, last = shape[1] in (1, 3), shape[3] in (1, 3)
        if first and last:
            raise DataError(
                f"{source}: shape {shape} could be [N, C, H, W] or [N, H, W, C]. Use images of at least 8×8 "
                "pixels, "
                "or save grey images as [N, H, W]."
            )
        if first:
            return images
        if last:
            return images.transpose(0, 3, 1, 2)
    hint = (
        "Composite an alpha channel first, " if images.ndim == 4 else "Reshape flattened rows or add the axis N first, "
    )
    raise DataError(
        f"{source}: images of shape {shape}; [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1 or 3 is "
        "allowed. "
        f"{hint}then save again."
    )


def to_labels(
    labels: np.ndarray | None, class_names: Sequence[str] | None, count: int, source: str
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """int64 labels ``[N]`` and the class names, from numbers or texts; see :func:`dataset_from_arrays`.

    Raises:
        DataError: another type or shape, a count that differs, or impossible names.
    """
    if labels is None:
        return None, ()
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise DataError(f"{source}: labels of shape {list(labels.shape)}; [N] is allowed. For one-hot rows: argmax(1).")
    if len(labels) != count:
        raise DataError(f"{source}: {count} images but {len(labels)} labels. Give one label per image.")
    if labels.dtype.kind in "US" and _length(labels.dtype) > 4 * MAX_NAME_BYTES:
        raise DataError(
            f"{source}: labels that are texts of {_length(labels.dtype):,} characters; class names have at most "
            f"{MAX_NAME_BYTES} bytes. Use short names, or numbers with class_names."
        )
    if class_names is not None:
        check_class_names(class_names, source)
    if labels.dtype.kind not in "iuUS":
        raise DataError(
            f"{source}: labels of type {labels.dtype}; whole numbers or strings are allowed. "
            "Save labels.astype('int64'), after replacing missing values."
        )
    if labels.dtype.kind in "iu":
        if labels.min() < 0:
            raise DataError(f"{source}: {int((labels < 0).sum())} labels are negative. Leave out unlabelled images.")
        if class_names is not None:
            if labels.max() >= len(class_names):
                raise DataError(
                    f"{source}: labels go up to {labels.max()} but there are {len(class_names)} class names. "
                    "Number the classes from 0."
                )
            return labels.astype(np.int64), tuple(class_names)
    distinct, index = np.unique(labels, return_inverse=True)
    check_class_count(len(distinct), source)
    texts = to_text(distinct, f"{source}: labels")
    if class_names is None:
        return index.astype(np.int64), texts
    order = {name: i for i, name in enumerate(class_names)}
    unknown = sorted(set(texts) - set(order))
    if unknown:
        raise DataError(f"{source}: labels {listed(unknown)} are not among the class names {listed(order)}.")
    return np.array([order[text] for text in texts], dtype=np.int64)[index], tuple(class_names)


def converted(
    pixels: np.ndarray, resolution: int, colour: Literal["grey", "rgb"]
) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """A few images ``[N, C, H, W]``, uint8 or floating point in [0, 1], as uint8 of the form that is wanted.

    Returns:
        contiguous uint8 ``[N, C, resolution, resolution]``; (which, why) of those that are no images, which are black.
    """
    bad: list[tuple[int, str]] = []
    if pixels.dtype != np.uint8:
        pixels, bad = _rounded(pixels)
    pixels = _to_resolution(_to_channels(pixels, colour, "images"), resolution, "images")
    return np.ascontiguousarray(pixels), bad


def to_text(values: np.ndarray, what: str) -> tuple[str, ...]:
    """Whole numbers, texts or bytes (UTF-8) of an array ``[N]`` as strings.

    Raises:
        DataError: they are not valid Unicode.
    """
    try:
        if values.dtype.kind == "U" and values.dtype.itemsize and len(values):
            codes = np.ascontiguousarray(values).view(values.dtype.byteorder + "u4")
            if codes.max() > sys.maxunicode:  # numpy would make broken strings of them, which crash Python later
                raise ValueError(f"code point {codes.max():#x}")
        return tuple(v.decode("utf-8") if isinstance(v, bytes) else str(v) for v in values.tolist())
    except ValueError as error:
        raise DataError(f"{what} are not valid Unicode ({printable(error)}). Save them as UTF-8 text.") from error


def _length(dtype: np.dtype) -> int:
    """Characters of a text type."""
    return dtype.itemsize // (4 if dtype.kind == "U" else 1)


def _from_float(pixels: np.ndarray, source: str, skip_bad: bool) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    check_fits(pixels.size, what=source)
    result = np.zeros(pixels.shape, dtype=np.uint8)
    bad: list[tuple[str, str]] = []
    good = np.ones(len(pixels), dtype=bool)
    for part in _chunks(pixels.shape):
        result[part], wrong = _rounded(np.asarray(pixels[part]))
        bad += [(f"image {part.start + i}", why) for i, why in wrong]
        good[[part.start + i for i, _ in wrong]] = False
    if bad and not good.any():
        raise DataError(
            f"{source}: every image has values outside 0..1 (or NaN). Divide 0..255 by 255, or map -1..1 by "
            "(x + 1) / 2."
        )
    skipped = settle_bad(bad, where=source, skip_bad=skip_bad)
    return (result[good] if bad else result), good, skipped


def _rounded(values: np.ndarray) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Floating point in [0, 1] times 255, rounded; images with other values are black, and listed."""
    flat = values.reshape(len(values), -1)
    finite = np.isfinite(flat).all(axis=1)
    inside = np.asarray((flat >= 0) & (flat <= 1)).all(axis=1)
    bad = [
        (i, "values outside 0..1" if finite[i] else "NaN or infinite values") for i in np.flatnonzero(~inside).tolist()
    ]
    # float64: float16 cannot hold 255·x to half a grey level; bad images are blanked, as NaN has no uint8.
    clean = np.where(inside.reshape(-1, 1, 1, 1), values, 0).astype(np.float64)
    return np.rint(255 * clean).astype(np.uint8), bad


def _to_channels(pixels: np.ndarray, channels: Channels, source: str) -> np.ndarray:
    have = pixels.shape[1]
    if channels == "rgb" and have == 1:
        return np.broadcast_to(pixels, (len(pixels), 3, *pixels.shape[2:]))  # a view: costs no memory
    if channels != "grey" or have == 1:
        return pixels
    check_fits(pixels.size // 3, what=source)
    grey = np.empty((len(pixels), 1, *pixels.shape[2:]), dtype=np.uint8)
    for part in _chunks(pixels.shape):
        red, green, blue = np.moveaxis(np.asarray(pixels[part], dtype=np.uint32), 1, 0)
        # Luma of ITU-R BT.601 in the fixed-point form Pillow uses, so that folders and arrays agree to the
        # bit.
        grey[part, 0] = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16
    return grey


def _to_resolution(pixels: np.ndarray, resolution: int, source: str) -> np.ndarray:
    count, channels, height, width = pixels.shape
    if height == width == resolution:
        return pixels
    check_fits(count * channels * resolution**2, what=f"{source} at resolution {resolution}")
    result = np.empty((count, channels, resolution, resolution), dtype=np.uint8)
    for i in range(count):
        result[i] = image_to_array(resize_square(array_to_image(pixels[i]), resolution))
    return result


def _chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    step = max(1, _CHUNK_VALUES // max(1, int(np.prod(shape[1:]))))
    return (slice(start, start + step) for start in range(0, shape[0], step))
