"""Datasets that live in Python: whatever has a length and gives item i.

That is the protocol of PyTorch's map-style datasets, which torchvision's data sets and the ``Dataset`` of Hugging Face
``datasets`` follow too; :class:`MapStyle` states it.  Items are read once, in order, converted by the rules for files
and arrays, and kept as uint8: in memory, or in a file without a name that vanishes with the process.
"""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dpsyngen.data.arrays import arranged, converted
from dpsyngen.data.dataset import ImageDataset
from dpsyngen.data.decode import BadImage, Colour, ImageHeader, check_pixels, decode_image, is_grey, quiet_decoders
from dpsyngen.data.labels import Label, index_labels
from dpsyngen.data.source import BLOCK, LISTED, Options, Survey, keep_of, settle_bad
from dpsyngen.data.store import check_fits, kept_of
from dpsyngen.data.tables import IMAGE_NAMES, LABEL_NAMES
from dpsyngen.errors import ConfigError, DataError, listed, printable, shown

_TRIED_TWICE = 16


@runtime_checkable
class MapStyle(Protocol):
    """What a dataset must have.

    ``dataset[i]`` for i = 0 … N - 1 is an image, a pair ``(image, label)``, or a mapping with "image" (or "img") and,
    if there are labels, "label" (or "labels").

    * image: a PIL image of any size and mode; or an array or CPU tensor ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]`` with
      C = 1 or 3, uint8 in 0..255 or floating point in [0, 1], which is multiplied by 255 and rounded.  Other values are
      an error: what was normalised to another range must be mapped back, ``(x + 1) / 2`` for [-1, 1].
    * label: a whole number, or a text.

    Class names come from ``dataset.classes`` (torchvision) or ``dataset.features`` (Hugging Face); without either the
    labels that occur are the classes, in order.

    ``dataset[i]`` must be the same each time.  Random augmentation is refused: the DP guarantee is about fixed records,
    and a run that is resumed has to find the same images.
    """

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, index: int) -> Any:
        """Item number `index`."""


def is_map_style(source: Any) -> bool:
    """Whether `source` is read as :class:`MapStyle`: it has a length and items, and is no text, mapping or array."""
    plain = isinstance(source, str | bytes | dict | list | tuple | set | np.ndarray) or hasattr(source, "__array__")
    return not plain and isinstance(source, MapStyle)


def read_map_style(source: Any, options: Options) -> ImageDataset:
    """The images of a dataset.

    Raises:
        DataError: items that cannot be used, all in one message; items that differ when they are read again.
        ConfigError: the dataset has no items, or items of another form.
    """
    where = f"{type(source).__module__}.{type(source).__qualname__} of {len(source):,} items"
    if len(source) == 0:
        raise DataError(f"{where}: there are no images in it. Give at least one.")
    reader = _Reader(source, where, options)
    with quiet_decoders():
        reader.require_fixed()
        unknown = options.resolution is None or options.channels == "auto"
        shape = options.shape(len(source), reader.survey() if unknown else Survey())
        colour: Colour = "grey" if shape[1] == 1 else "rgb"
        if options.in_memory(shape):
            check_fits(math.prod(shape), what=where)
            images = np.zeros(shape, dtype=np.uint8)
            for start, block in reader.blocks(shape[2], colour):
                images[start : start + len(block)] = block
            return reader.dataset(images)
        # The file loses its name at once: nobody could tell later of which dataset it is.
        with options.store.making(f"nameless-{secrets.token_hex(8)}", shape) as part:
            for start, block in reader.blocks(shape[2], colour):
                part.write(start, block)
            return reader.dataset(part.images())


class _Reader:
    def __init__(self, source: Any, where: str, options: Options) -> None:
        self.source, self.where, self.options = source, where, options
        self.image_key, self.label_key = _keys_of(source, where)
        self.labels: list[Label] = []
        self.bad: dict[int, str] = {}

    def require_fixed(self) -> None:
        """Raise DataError if items are not the same when they are read again."""
        count = len(self.source)
        for i in sorted({round(k * (count - 1) / max(1, _TRIED_TWICE - 1)) for k in range(_TRIED_TWICE)}):
            first, again = (_tried(self.source, self._plain, i) for _ in range(2))
            if isinstance(first, BadImage) or isinstance(again, BadImage):
                continue  # it is told of later, with all others
            if first[1] != again[1] or not _same(first[0], again[0]):
                raise DataError(
                    f"{self.where}: item {i} is not the same when it is read again. Random augmentation (flips, crops, "
                    "jitter) must be left out: differential privacy is about fixed records, and a resumed run must "
                    "find the same images. Give the dataset with deterministic transforms, or none."
                )

    def survey(self) -> Survey:
        """Sizes and colours of all items."""
        found = Survey()
        for header in self._items(lambda item: _header_of(self._plain(item)[0])):
            if not isinstance(header, BadImage):
                found = found.with_header(header)
        return found

    def blocks(self, resolution: int, colour: Colour) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(number of the first, images) of all items in order; labels and what is bad are collected on the way."""

        def convert(item: Any) -> tuple[NDArray[np.uint8], Label]:
            image, label = self._plain(item)
            return _pixels_of(image, resolution, colour), label

        items, done, count = self._items(convert), 0, len(self.source)
        shape = (1 if colour == "grey" else 3, resolution, resolution)
        while done < count:
            block = np.zeros((min(BLOCK, count - done), *shape), dtype=np.uint8)
            for i, item in enumerate(itertools.islice(items, len(block))):
                if isinstance(item, BadImage):
                    self.bad[done + i] = str(item)
                    self.labels.append(None)
                else:
                    block[i] = item[0]
                    self.labels.append(item[1])
            yield done, block
            done += len(block)
            if self.options.on_progress is not None:
                self.options.on_progress(done, count)
            if len(self.bad) > LISTED and not self.options.skip_bad:
                self._settle()

    def dataset(self, images: Any) -> ImageDataset:
        """The data set, of an array or store in which bad images are black."""
        labelled = any(label is not None for label in self.labels)
        if labelled:
            self.bad.update({i: "no label" for i, v in enumerate(self.labels) if v is None and i not in self.bad})
        skipped = self._settle()
        if len(self.bad) == len(self.labels):
            raise DataError(f"{self.where}: no usable image in it. Give at least one.")
        labels, names = None, ()
        if labelled:
            values = [value for i, value in enumerate(self.labels) if i not in self.bad]
            given = _class_names_of(self.source, self.label_key)
            labels, names = index_labels(values, given, len(values), self.where)
        images = kept_of(images, keep_of(len(images), self.bad))
        if isinstance(images, np.ndarray):
            images.flags.writeable = False
        return ImageDataset(images, labels, names, self.where, skipped)

    def _settle(self) -> tuple[str, ...]:
        lines = [(f"item {i}", self.bad[i]) for i in sorted(self.bad)]
        return settle_bad(lines, where=self.where, skip_bad=self.options.skip_bad)

    def _items(self, work: Any) -> Iterator[Any]:
        """``work`` of each item in order; BadImage where it fails."""
        count, workers = len(self.source), self.options.workers or 1
        if workers <= 1:
            yield from (_tried(self.source, work, i) for i in range(count))
            return
        from torch.utils.data import DataLoader

        tried: Any = _Tried(self.source, work)
        yield from DataLoader(tried, batch_size=None, num_workers=min(workers, count), collate_fn=_as_it_is)

    def _plain(self, item: Any) -> tuple[Any, Label]:
        """The image and the label of an item."""
        label: Any = None
        if isinstance(item, dict):
            if self.image_key not in item:
                raise ConfigError(
                    f"{self.where}: items have {listed(item)}, but no 'image'. Rename the one that is meant."
                )
            image, label = item[self.image_key], item.get(self.label_key)
        elif isinstance(item, tuple | list):
            if not 1 <= len(item) <= 2:
                raise ConfigError(
                    f"{self.where}: items of {len(item)} parts; an image, (image, label) or a mapping with 'image' and "
                    "'label' is read."
                )
            image, label = item[0], item[1] if len(item) == 2 else None
        else:
            image = item
        return image, _label_of(label) if self.options.labels else None


def _as_it_is(item: Any) -> Any:
    return item


def _tried(source: Any, work: Any, index: int) -> Any:
    """``work(source[index])``, or BadImage if that fails."""
    try:
        return work(source[index])
    except BadImage as error:
        return error
    except ConfigError:
        raise
    except Exception as error:  # the user's own code, or Pillow, which raises nearly anything
        return BadImage(f"{type(error).__name__}: {printable(error)}")


class _Tried:
    """Items through a function, for the processes of a DataLoader."""

    def __init__(self, source: Any, work: Any) -> None:
        self.source, self.work = source, work

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        return _tried(self.source, self.work, index)


# -------------------------------------------------------------------------------------------------------------- items


def _is_pil(image: Any) -> bool:
    return hasattr(image, "getexif") and hasattr(image, "mode")


def _array(image: Any) -> NDArray[Any]:
    """An image that is an array or a tensor as ``[1, C, H, W]``."""
    if not isinstance(image, np.ndarray) and not hasattr(image, "__array__"):
        raise BadImage(f"the image is {shown(type(image).__name__)}: a PIL image, an array or a CPU tensor is read")
    array = np.asarray(image)
    if array.ndim not in (2, 3):
        raise BadImage(f"the image has shape {list(array.shape)}: [H, W], [H, W, C] or [C, H, W] is read")
    if 0 in array.shape:
        raise BadImage(f"the image has shape {list(array.shape)}, which is empty")
    try:
        whole: NDArray[Any] = arranged(array[None, None] if array.ndim == 2 else array[None], "the image")
    except DataError as error:
        raise BadImage(str(error).removeprefix("the image: ")) from None
    return whole


def _header_of(image: Any) -> ImageHeader:
    if _is_pil(image):
        return ImageHeader(*image.size, is_grey(image))
    _, channels, height, width = _array(image).shape
    return ImageHeader(width, height, channels == 1)


def _pixels_of(image: Any, resolution: int, colour: Colour) -> NDArray[np.uint8]:
    """uint8 ``[C, resolution, resolution]``."""
    if _is_pil(image):
        check_pixels(image)
        return decode_image(image, resolution=resolution, colour=colour)
    pixels, bad = converted(_array(image), resolution, colour)
    if bad:
        raise BadImage(f"{bad[0][1]}; [0, 1] or uint8 is read, for [-1, 1] give (x + 1) / 2")
    return pixels[0]


def _same(a: Any, b: Any) -> bool:
    if _is_pil(a) and _is_pil(b):
        return bool(a.mode == b.mode and a.size == b.size and a.tobytes() == b.tobytes())
    return np.array_equal(np.asarray(a), np.asarray(b), equal_nan=np.asarray(a).dtype.kind == "f")


def _label_of(value: Any) -> Label:
    if value is None or isinstance(value, str):
        return value
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "iu":
        raise BadImage(f"the label is {shown(value)}: a whole number or a text is read")
    return int(array.reshape(()))


def _keys_of(source: Any, where: str) -> tuple[str, str]:
    """Names of the image and of the label in items that are mappings."""
    features: Any = getattr(source, "features", None)
    if hasattr(features, "items"):
        kinds = {name: type(feature).__name__ for name, feature in features.items()}
    else:
        first = source[0]
        kinds = dict.fromkeys(first, "") if isinstance(first, dict) else {}
    keys = []
    for kind, usual in (("Image", IMAGE_NAMES), ("ClassLabel", LABEL_NAMES)):
        typed = [name for name, of in kinds.items() if of == kind]
        if len(typed) > 1 and not set(typed) & set(usual):
            raise DataError(f"{where} has several columns of {kind}: {listed(typed)}. Rename one to {usual[0]!r}.")
        names = [*(typed if len(typed) == 1 else ()), *usual]
        keys.append(next((name for name in names if name in kinds), usual[0]))
    return keys[0], keys[1]


def _class_names_of(source: Any, label_key: str) -> tuple[str, ...] | None:
    features: Any = getattr(source, "features", None)
    if hasattr(features, "get"):
        names = getattr(features.get(label_key), "names", None)
        return None if names is None else tuple(names)
    for _ in range(8):  # through torch.utils.data.Subset and its like
        classes = getattr(source, "classes", None)
        if isinstance(classes, list | tuple) and classes:
            # torchvision's ImageNet has several words for a class.
            return tuple(", ".join(map(str, c)) if isinstance(c, list | tuple) else str(c) for c in classes)
        source = getattr(source, "dataset", None)
    return None
