"""Datasets that live in Python: whatever has a length and gives item i.

That is the protocol of PyTorch's map-style datasets, which torchvision's data sets and the ``Dataset`` of Hugging Face
``datasets`` follow too; :class:`MapStyle` states it.  Items are read once, in order, converted by the rules for files
and arrays, and kept as uint8: in memory, or in a file without a name that vanishes with the process.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dpsyngen.data.cache import Cache, decode, in_memory, quiet_decoders, read_headers, settled
from dpsyngen.data.dataset import ImageDataset
from dpsyngen.data.decode import BadImage, Item, as_array
from dpsyngen.data.labels import Label, ignored, index_labels
from dpsyngen.data.source import Job, Options, Source, keep_of, split_evenly
from dpsyngen.data.store import check_fits
from dpsyngen.data.tables import IMAGE_NAMES, image_of, label_of
from dpsyngen.errors import ConfigError, DataError, listed, printable, shown

_TRIED_TWICE = 16


@runtime_checkable
class MapStyle(Protocol):
    """What a dataset must have.

    ``dataset[i]`` for i = 0 … N - 1 is an image, a pair ``(image, label)``, or a mapping with "image" (or "img") and,
    if there are labels, "label" (or "labels").

    * image: a PIL image of any size and mode; or an array or tensor ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]`` with
      C = 1 or 3, uint8 in 0..255, uint16 in 0..65535, bool, or floating point in [0, 1], which is multiplied by 255 and
      rounded.  Other values are an error without a ``value_range``: what was normalised must be mapped back,
      ``(x + 1) / 2`` for [-1, 1].
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
    """The images of a dataset; DataError for items that cannot be used, or that differ when they are read again."""
    where = f"{type(source).__module__}.{type(source).__qualname__} of {len(source):,} items"
    if len(source) == 0:
        raise DataError(f"{where}: there are no images in it. Give at least one.")
    items = _Items(source, where, options)
    with quiet_decoders():
        items.require_fixed()
        shape = options.shape(len(source), read_headers(items.as_source(), options))
        if in_memory(shape, options):
            check_fits(math.prod(shape), what=where)
            return items.decode(np.zeros(shape, dtype=np.uint8))
        # Without a name, as nobody could tell later of which dataset the file is.
        with Cache(options.cache).making(None, shape) as file:
            return items.decode(file)


class _Items:
    """(image, label) of each item, or a BadImage; also for the processes of a DataLoader."""

    def __init__(self, source: Any, where: str, options: Options) -> None:
        self.source, self.where, self.options = source, where, options
        self.image_key, self.label_key, self.ignored = _keys_of(source, where, options)
        self.labels: list[Label] = []

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, Label] | BadImage:
        try:
            return self._plain(self.source[index])
        except BadImage as error:
            return error
        except ConfigError:
            raise
        except Exception as error:  # the user's own code, or Pillow, which raises nearly anything
            return BadImage(f"{type(error).__name__}: {printable(error)}")

    def _plain(self, item: Any) -> tuple[Any, Label]:
        label: Any = None
        if isinstance(item, dict):
            if self.image_key not in item:
                raise ConfigError(
                    f"{self.where}: items have {listed(item)}, but no 'image'. Rename the one that is meant."
                )
            item, label = item[self.image_key], item.get(self.label_key)
        elif isinstance(item, tuple | list):
            if not 1 <= len(item) <= 2:
                raise ConfigError(
                    f"{self.where}: items of {len(item)} parts; an image, (image, label) or a mapping with 'image' and "
                    "'label' is read."
                )
            item, label = item[0], item[1] if len(item) == 2 else None
        if isinstance(item, str | bytes | os.PathLike):  # nobody said that files should be opened
            raise BadImage(f"the image is {shown(type(item).__name__)}: a PIL image, an array or a tensor is read")
        return item, _label_of(label) if self.options.labels else None

    def require_fixed(self) -> None:
        """Raise DataError if items are not the same when they are read again."""
        for i in sorted({round(k) for k in np.linspace(0, len(self) - 1, _TRIED_TWICE)}):
            first, again = self[i], self[i]
            if isinstance(first, BadImage) or isinstance(again, BadImage):
                continue  # it is told of later, with all others
            if first[1] != again[1] or not _same(first[0], again[0]):
                raise DataError(
                    f"{self.where}: item {i} is not the same when it is read again. Leave out random augmentation "
                    "(flips, crops, jitter): differential privacy is about fixed records, which a resumed run needs."
                )

    def as_source(self) -> Source:
        """All images, to be read once and in order; their labels are noted on the way."""
        images = self._images()
        jobs = [
            Job(part.stop - part.start, functools.partial(itertools.islice, images, part.stop - part.start))
            for part in split_evenly(len(self))
        ]
        return Source(self.where, jobs, None, (), lambda i: f"item {i}", (), False, True, self.ignored)

    def _images(self) -> Iterator[Item]:
        self.labels.clear()
        items: Any = (self[i] for i in range(len(self)))
        workers = min(self.options.workers or 1, len(self))
        if workers > 1:
            from torch.utils.data import DataLoader

            whole: Any = self
            items = DataLoader(whole, batch_size=None, num_workers=workers, collate_fn=_as_it_is)
        for item in items:
            image, label = (item, None) if isinstance(item, BadImage) else item
            self.labels.append(label)
            yield image

    def decode(self, target: NDArray[np.uint8]) -> ImageDataset:
        """The data set, its images decoded into an array or a mapped file."""
        source = self.as_source()
        bad = decode(source, target, self.options)
        if any(label is not None for label in self.labels):
            bad = {i: "no label" for i, label in enumerate(self.labels) if label is None} | bad
            values = [label for i, label in enumerate(self.labels) if i not in bad]
            if values:
                given = _class_names_of(self.source, self.label_key)
                index, names = index_labels(values, given, len(values), self.where)
                labels = np.zeros(len(self), dtype=np.int64)
                np.place(labels, keep_of(len(self), bad), cast("NDArray[np.int64]", index))
                source = replace(source, labels=labels, class_names=names)
        return settled(source, target, bad, self.options)


def _as_it_is(item: Any) -> Any:
    return item


def _same(a: Any, b: Any) -> bool:
    if hasattr(a, "tobytes") and hasattr(a, "mode"):
        return bool(a.mode == b.mode and a.size == b.size and a.tobytes() == b.tobytes())
    a, b = as_array(a), as_array(b)
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def _label_of(value: Any) -> Label:
    if value is None or isinstance(value, str):
        return value
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "iu":
        raise BadImage(f"the label is {shown(value)}: a whole number or a text is read")
    return int(array.reshape(()))


def _keys_of(source: Any, where: str, options: Options) -> tuple[str, str, tuple[str, ...]]:
    """Names of the image and of the label in items that are mappings, and what is told of other names."""
    features: Any = getattr(source, "features", None)
    if hasattr(features, "items"):
        kinds = {name: {"_type": type(feature).__name__} for name, feature in features.items()}
    else:
        first = _first(source)
        kinds = {name: {} for name in first} if isinstance(first, dict) else {}
    image = image_of(list(kinds), kinds, where) or IMAGE_NAMES[0]
    others = [name for name in kinds if name != image]
    if not options.labels:
        return image, "", ()
    label = label_of(others, kinds, options.label_column, where) or ""
    return image, label, ignored(where, [name for name in others if name != label], "in each item")


def _first(source: Any) -> Any:
    """The first item that can be read, of a few; None if none can, which is told of later."""
    for i in range(min(_TRIED_TWICE, len(source))):
        with contextlib.suppress(Exception):
            return source[i]
    return None


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
