"""What every reader returns: images, labels and class names in one fixed form."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpsyngen.data.labels import check_class_names, same_name
from dpsyngen.data.store import ImageStore, SelectedImages, check_fits, is_mapped
from dpsyngen.errors import DataError, listed

_HASH_CHUNK_BYTES = 16 * 2**20
_LOOKED_AT = 2048
_FLAT = 17  # a sixteenth of white, and what resizing adds beside edges
NEARLY_BLACK = (
    "most images are nearly black, or of one grey: their values span no more than a sixteenth of black to white.  If "
    "that is not how they look, say which values are black and white: --value-range LOW,HIGH (data.value_range), such "
    "as 0,1 for masks of 0 and 1 or 0,4095 for 12 bits stored in 16; for DICOM --window CENTRE,WIDTH (data.window), "
    "such as 40,400 for CT of soft parts.  It is public: take it from the format, not from these images."
)


def numbered(values: Sequence[Any]) -> np.ndarray:
    """int64 [N]: equal numbers, from 0, for equal values."""
    known: dict[Any, int] = {}
    return np.array([known.setdefault(value, len(known)) for value in values], dtype=np.int64)


@dataclass(frozen=True, eq=False, repr=False)
class ImageDataset:
    """Private images with their labels.

    The shape ``[C, H, W]``, the class names and the number of images are treated as public; all else is private.

    Attributes:
        images: uint8 ``[N, C, H, W]``, C = 1 (grey) or 3 (RGB), H = W.  An array (perhaps a read-only memory map
            or view), or an :class:`~dpsyngen.data.store.ImageStore`, whose images are not in memory.  :meth:`batch`
            reads both; :meth:`array` is all of them in memory.
        labels: int64 ``[N]``, values in ``0 .. len(class_names) - 1``; None for unlabelled images.
        class_names: one name per class, in label order; ``()`` exactly when `labels` is None.  What they may be:
            :mod:`dpsyngen.data.labels`.
        source: what was asked for, in words a person can read.
        skipped: what was left out under ``skip_bad=True``, each as ``"where: why"``.  Private (it holds file names).
        ignored: what was found beside the images and is not used, a sentence each, of which ``load_images`` warns.
        persons: int64 ``[N]``, whose image each is, by a number that says nothing else; None: not known.  Private.

    Raises:
        DataError: the fields do not fit together as above.
    """

    images: np.ndarray | ImageStore
    labels: np.ndarray | None
    class_names: tuple[str, ...]
    source: str
    skipped: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    persons: np.ndarray | None = None

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if self.persons is not None and (self.persons.dtype != np.int64 or self.persons.shape != (len(images),)):
            raise DataError(f"persons must be int64 [{len(images)}], one for each image. Use with_persons.")
        square = len(images.shape) == 4 and images.shape[2] == images.shape[3]
        if images.dtype != np.uint8 or not square or images.shape[1] not in (1, 3):
            raise DataError(
                f"images must be uint8 [N, C, H, W] with C = 1 or 3 and H = W, not {images.dtype} "
                f"{list(images.shape)}. Use load_images, which converts."
            )
        if (labels is None) != (self.class_names == ()):
            raise DataError("class_names must be () exactly when labels is None. Give both, or neither.")
        check_class_names(self.class_names, self.source)
        if labels is None:
            return
        if labels.dtype != np.int64 or labels.shape != (len(images),):
            raise DataError(f"labels must be int64 [{len(images)}], not {labels.dtype} {list(labels.shape)}.")
        if len(labels) and not (labels.min() >= 0 and labels.max() < len(self.class_names)):
            names = f"{len(self.class_names)} class names"
            raise DataError(f"labels go from {labels.min()} to {labels.max()}, but there are {names}, from number 0.")

    def __repr__(self) -> str:
        """Tell what is public, and where the images are; none of their pixels."""
        count, channels, side, _ = self.images.shape
        classes = f", {self.num_classes} classes" if self.class_names else ""
        where = "in memory" if isinstance(self.images, np.ndarray) and not is_mapped(self.images) else "in a file"
        colour = "grey" if channels == 1 else "RGB"
        return f"<ImageDataset: {count:,} {colour} images of {side}×{side}{classes}, {where}, from {self.source}>"

    def __len__(self) -> int:
        """Number of images N (one image = one record)."""
        return len(self.images)

    @property
    def resolution(self) -> int:
        """Height and width in pixels."""
        return int(self.images.shape[2])

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return int(self.images.shape[1])

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for unlabelled images."""
        return len(self.class_names)

    @property
    def file(self) -> Path | None:
        """The private file that the decoded images are read from; None if they are in memory, or it has no name."""
        path: Path | None = getattr(self.images, "path", None)
        return path if path is not None and path.exists() else None

    def subset(self, indices: np.ndarray | Sequence[int]) -> ImageDataset:
        """The images at `indices` (int ``[M]``, any order, or a bool mask ``[N]``); classes stay the same.

        Images in memory are copied.  Images in a file stay there: the result remembers which ones it has.

        Raises:
            IndexError: an index is not in ``-N .. N - 1``.
        """
        index = self._rows(indices)
        labels, persons = (None if v is None else v[index] for v in (self.labels, self.persons))
        if isinstance(self.images, np.ndarray) and not is_mapped(self.images):
            return replace(self, images=self.images[index], labels=labels, persons=persons)
        return replace(self, images=SelectedImages(self.images, index), labels=labels, persons=persons)

    def with_persons(self, persons: Any) -> ImageDataset:
        """The same images with whose each of them is: ``[N]`` whole numbers or texts, of which nothing is kept but
        which are equal.
        """
        values = np.asarray(persons)
        texts = values.dtype.kind == "O" and all(isinstance(value, str) for value in values.flat)  # as of pandas
        if values.shape != (len(self),) or not (texts or values.dtype.kind in "iuU"):
            raise DataError(
                f"groups must be whole numbers or texts [{len(self)}], whose image each is, not {values.dtype} "
                f"{list(values.shape)}. (Of images that are left out as bad there must be none, too.)"
            )
        whose = values.tolist()
        return replace(self, persons=numbered([same_name(w.strip()) if isinstance(w, str) else w for w in whose]))

    def images_a_person(self, most: int | None = None) -> tuple[int, int]:
        """How many images a person has at most, and how many images there are; at most `most` of each counted."""
        if self.persons is None:
            return 1, len(self)
        counts = np.bincount(self.persons)
        counts = counts if most is None else np.minimum(counts, most)
        return int(counts.max(initial=0)), int(counts.sum())

    def at_most(self, most: int, rank: Callable[[bytes], str]) -> ImageDataset:
        """At most `most` images of each person, in their order: those whose content has the least `rank`.

        With a keyed digest as `rank`, of hexadecimal digits, that is a choice at random which depends on the key and
        on the person's own images alone: without a person, all images of the others stay as they are.
        """
        assert self.persons is not None
        many = np.flatnonzero((np.bincount(self.persons) > most)[self.persons])
        parts = (many[start : start + _LOOKED_AT] for start in range(0, len(many), _LOOKED_AT))
        ranks = [int(rank(image.tobytes())[:16], 16) for part in parts for image in self.batch(part)]
        order = np.lexsort((many, np.array(ranks, dtype=np.uint64), self.persons[many]))
        _, first, counts = np.unique(self.persons[many][order], return_index=True, return_counts=True)
        place = np.arange(len(many)) - np.repeat(first, counts)
        keep = np.ones(len(self), dtype=bool)
        keep[many[order[place >= most]]] = False
        return self if keep.all() else self.subset(keep)

    @property
    def absent_classes(self) -> tuple[str, ...]:
        """Names of the classes of which there is no image."""
        counts = np.bincount([] if self.labels is None else self.labels, minlength=self.num_classes)
        return tuple(name for name, count in zip(self.class_names, counts, strict=True) if not count)

    def with_classes(self, class_names: Sequence[str], what: str) -> ImageDataset:
        """Number the labels by the classes of another set, of some of which there may be no image here.

        `what` these images are is said in messages.  DataError: there are images of other classes, or one set has none.
        """
        places = {same_name(name): i for i, name in enumerate(class_names)}
        others = [name for name in self.class_names if same_name(name) not in places]
        if others or bool(class_names) != bool(self.class_names):
            also = f"; not among them: {listed(others)}" if others and class_names else ""
            raise DataError(
                f"the {what} images have the classes {listed(self.class_names)}, but the others have "
                f"{listed(class_names)}{also}. Give images of the same classes; there may be none of some of them."
            )
        if self.labels is None:
            return self
        index = np.array([places[same_name(name)] for name in self.class_names], dtype=np.int64)
        return replace(self, labels=index[self.labels], class_names=tuple(class_names))

    def batch(self, indices: np.ndarray | Sequence[int]) -> np.ndarray:
        """The images at `indices` as a fresh, contiguous, writable uint8 array ``[B, C, H, W]``.

        B = 0 is legal: Poisson sampling draws empty batches.  Memory is taken for the B images alone, wherever they
        lie. Several threads may call this.  IndexError beyond ``-N .. N - 1``; DataError if their file cannot be read
        any more.
        """
        # np.asarray drops the memmap subclass, so that the copy is plain memory.
        return np.ascontiguousarray(np.asarray(self.images[self._rows(indices)]))

    def array(self) -> np.ndarray:
        """All images as one array ``[N, C, H, W]``, read-only where it is not a copy; training does not need it.

        Raises:
            DataError: they lie in a file and would take more than half of the memory.  Take a :meth:`subset`.
        """
        if isinstance(self.images, np.ndarray):
            return self.images
        check_fits(math.prod(self.images.shape), what=f"{self.source}, all of it in memory,")
        return self.images[slice(0, len(self))]

    def _rows(self, indices: np.ndarray | Sequence[int]) -> np.ndarray:
        """Indices or a mask as int64 in 0..N - 1."""
        index = np.asarray(indices)
        if index.dtype == bool:
            if index.shape != (len(self),):
                raise IndexError(f"a mask of shape {list(index.shape)} for {len(self)} images")
            return np.flatnonzero(index)
        # An empty list would become float64, which numpy refuses as an index.
        if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
            raise IndexError(f"indices of type {index.dtype} and shape {list(index.shape)}: give whole numbers [B]")
        index = index.astype(np.int64, copy=False)
        if index.size and not (index.min() >= -len(self) and index.max() < len(self)):
            raise IndexError(f"indices from {index.min()} to {index.max()} for {len(self)} images")
        return np.where(index < 0, index + len(self), index)

    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) over the shape, the images, the labels and the class names, wherever they lie.

        It serves to recognise the same data in a resumed run.  **The digest is derived from private data**: someone
        who guesses the whole data set can confirm the guess, so it belongs in the private half of a run.
        """
        header = {
            "format": "dpsyngen-images-1",
            "shape": list(self.images.shape),
            "labelled": self.labels is not None,
            "class_names": list(self.class_names),
        }
        digest = hashlib.sha256(json.dumps(header).encode("ascii"))
        per_chunk = max(1, _HASH_CHUNK_BYTES // max(1, int(np.prod(self.images.shape[1:]))))
        for start in range(0, len(self), per_chunk):
            digest.update(np.ascontiguousarray(self.images[start : start + per_chunk]).tobytes())
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


def is_nearly_black(dataset: ImageDataset) -> bool:
    """Whether the values of most images (of 2,048 that are looked at) span no more than a sixteenth of black to white.

    Such are 10 and 12 bits stored in 16, masks of 0 and 1, and CT without a window, where nothing says so.
    """
    some = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), _LOOKED_AT)).astype(np.int64))
    dark = sum(int((np.ptp(dataset.batch(part), (1, 2, 3)) <= _FLAT).sum()) for part in np.array_split(some, 32))
    return 2 * dark > len(some)
