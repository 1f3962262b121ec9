"""Datasets that live in Python: whatever has a length and gives item i.

That is the protocol of PyTorch's map-style datasets, which torchvision's data sets and the ``Dataset`` of Hugging Face
``datasets`` follow too; :class:`MapStyle` states it.  Items are read once, in order, converted by the rules for files
and arrays, and kept as uint8: in memory, or in a file without a name that vanishes with the process.
"""

from __future__ import annotations

import itertools
import math
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dpsyngen.data.array_format import write_at
from dpsyngen.data.bad import LISTED, settle_bad
from dpsyngen.data.dataset import ImageDataset
from dpsyngen.data.decode import BadImage, Colour, default_resolution
from dpsyngen.data.given_labels import index_of_labels
from dpsyngen.data.memory import check_fits
from dpsyngen.data.options import Options, in_memory_bytes
from dpsyngen.data.python_items import Label, class_names_of, form_of, keys_of, label_of, pixels_of, same
from dpsyngen.data.quiet import quiet_decoders
from dpsyngen.data.source import BLOCK, Survey
from dpsyngen.data.unfinished import Unfinished
from dpsyngen.errors import ConfigError, DataError, listed, printable

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
        resolution, colour = options.resolution, options.channels
        if resolution is None or colour == "auto":
            survey = reader.survey()
            resolution = resolution or default_resolution(set(survey.sizes))
            if colour == "auto":
                colour = "grey" if survey.readable and survey.grey else "rgb"
        shape = (len(source), 1 if colour == "grey" else 3, resolution, resolution)
        if options.always_in_memory_if_small and math.prod(shape) <= in_memory_bytes():
            return _into_memory(reader, shape, colour)
        return _into_file(reader, shape, colour)


class _Reader:
    def __init__(self, source: Any, where: str, options: Options) -> None:
        self.source, self.where, self.options = source, where, options
        self.image_key, self.label_key = keys_of(source, where)
        self.labels: list[Label] = []
        self.bad: dict[int, str] = {}

    def require_fixed(self) -> None:
        """Raise DataError if items are not the same when they are read again."""
        count = len(self.source)
        for i in sorted({round(k * (count - 1) / max(1, _TRIED_TWICE - 1)) for k in range(_TRIED_TWICE)}):
            try:
                first, again = (self._plain(self.source[i]) for _ in range(2))
            except BadImage:
                continue  # it is told of later, with all others
            except ConfigError:
                raise
            except Exception:
                continue
            if first[1] != again[1] or not same(first[0], again[0]):
                raise DataError(
                    f"{self.where}: item {i} is not the same when it is read again. Random augmentation (flips, crops, "
                    "jitter) must be left out: differential privacy is about fixed records, and a resumed run must "
                    "find the same images. Give the dataset with deterministic transforms, or none."
                )

    def survey(self) -> Survey:
        """Sizes and colours of all items."""
        found = Survey()
        for item in self._items(lambda item: form_of(self._plain(item)[0])):
            if not isinstance(item, BadImage):
                found = found.with_(Survey(frozenset({item[:2]}), item[2], 1))
        return found

    def blocks(self, resolution: int, colour: Colour) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(number of the first, images) of all items in order; labels and what is bad are collected on the way."""

        def convert(item: Any) -> tuple[NDArray[np.uint8], Label]:
            image, label = self._plain(item)
            return pixels_of(image, resolution, colour), label

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
                settle_bad(self._bad_lines(), where=self.where, skip_bad=False)

    def settled(self) -> tuple[NDArray[np.bool_], NDArray[np.int64] | None, tuple[str, ...], tuple[str, ...]]:
        """(which items are kept, labels of all, class names, what was skipped)."""
        labelled = any(label is not None for label in self.labels)
        if labelled:
            self.bad.update({i: "no label" for i, v in enumerate(self.labels) if v is None and i not in self.bad})
        skipped = settle_bad(self._bad_lines(), where=self.where, skip_bad=self.options.skip_bad)
        keep = np.ones(len(self.labels), dtype=bool)
        keep[list(self.bad)] = False
        if not keep.any():
            raise DataError(f"{self.where}: no usable image in it. Give at least one.")
        if not labelled:
            return keep, None, (), skipped
        names = class_names_of(self.source, self.label_key)
        values = [v for v, good in zip(self.labels, keep.tolist(), strict=True) if good]
        good, class_names = index_of_labels(values, names, self.where)
        assert good is not None
        labels = np.zeros(len(keep), dtype=np.int64)
        labels[keep] = good
        return keep, labels, class_names, skipped

    def _bad_lines(self) -> list[tuple[str, str]]:
        return [(f"item {i}", self.bad[i]) for i in sorted(self.bad)]

    def _items(self, work: Any) -> Iterator[Any]:
        """``work`` of each item in order; BadImage where it fails."""
        count, workers = len(self.source), self.options.workers or 1
        tried = _Tried(self.source, work)
        if workers <= 1:
            yield from (tried[i] for i in range(count))
            return
        from torch.utils.data import DataLoader

        dataset: Any = tried
        yield from DataLoader(dataset, batch_size=None, num_workers=min(workers, count), collate_fn=_as_it_is)

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
        return image, label_of(label) if self.options.labels else None


def _as_it_is(item: Any) -> Any:
    return item


class _Tried:
    """Items through a function, errors made into :class:`BadImage`; for use in other processes too."""

    def __init__(self, source: Any, work: Any) -> None:
        self.source, self.work = source, work

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.work(self.source[index])
        except BadImage as error:
            return error
        except ConfigError:
            raise
        except Exception as error:  # the user's own code, or Pillow, which raises nearly anything
            return BadImage(f"{type(error).__name__}: {printable(error)}")


def _into_memory(reader: _Reader, shape: tuple[int, int, int, int], colour: Colour) -> ImageDataset:
    check_fits(math.prod(shape), what=reader.where)
    images = np.zeros(shape, dtype=np.uint8)
    for start, block in reader.blocks(shape[2], colour):
        images[start : start + len(block)] = block
    keep, labels, names, skipped = reader.settled()
    if not keep.all():
        images, labels = images[keep], None if labels is None else labels[keep]
    images.flags.writeable = False
    return ImageDataset(images, labels, names, reader.where, skipped)


def _into_file(reader: _Reader, shape: tuple[int, int, int, int], colour: Colour) -> ImageDataset:
    """Into a file that has no name any more when this returns: nobody could tell later of which dataset it is."""
    store = reader.options.store
    key = f"nameless-{secrets.token_hex(8)}"
    with store.locked("nameless"):
        part = Unfinished(store, key, shape, resumable=False)
    try:
        import os

        descriptor = os.open(part.images, os.O_WRONLY | os.O_CLOEXEC)
        try:
            row_bytes = part.row_bytes
            for start, block in reader.blocks(shape[2], colour):
                write_at(descriptor, block, part.offset + start * row_bytes)
        finally:
            os.close(descriptor)
        _, labels, names, skipped = reader.settled()
        part.bad.update(reader.bad)
        entry = part.publish(labels, names, skipped)
    finally:
        part.close()
        for left in (part.folder, Path(store.folder) / key):
            shutil.rmtree(left, ignore_errors=True)
    return ImageDataset(entry.images, entry.labels, entry.class_names, reader.where, entry.skipped)
