"""Generated images: looked at in a notebook, sliced, converted, and written to the disk.

On the disk they are PNGs in class folders with a metadata.csv, one .npz, or one .parquet.  Hugging Face ``datasets``
opens the folder ("imagefolder") and the Parquet file as they are.
"""

from __future__ import annotations

import csv
import html
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from dpsyngen.console import in_notebook
from dpsyngen.diffusion.stages import Stage
from dpsyngen.errors import ConfigError, RunError, listed, printable, require, require_package
from dpsyngen.files import (
    expanded,
    new_folder,
    require_absent_or_empty,
    require_possible,
    write_atomically,
    write_json,
)
from dpsyngen.programs.grid import image_grid, picture, png, png_url
from dpsyngen.programs.saving import image_table, write_tables
from dpsyngen.version import __version__

if TYPE_CHECKING:
    from PIL import Image

_CLASSES, _EACH, _UNLABELLED = 10, 8, 32  # shown at most: classes, images of each; images without classes
_SIDE = 48  # pixels that an image is enlarged to, about
_TAKEN = ("metadata.csv", "about.json")  # files beside the class folders
_FILES = (".npz", ".parquet")
_OTHERS = (*_FILES, ".zip", ".tar", ".npy", ".png", ".csv")  # meant as a file, in another case or of another kind
_LONGEST = 200  # bytes of a folder name; file systems allow 255

Item = tuple[NDArray[np.uint8], int] | NDArray[np.uint8]
_Batches = Iterable[NDArray[np.uint8]]
_Labels = NDArray[np.int64] | None
Several = slice | Sequence[int] | NDArray[np.integer[Any]] | NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Samples:
    """Generated images.

    A notebook shows some of them, a row a class.  They are a map-style data set: ``samples[i]`` is ``(image, label)``,
    or the image alone where there are no classes, so a PyTorch ``DataLoader`` takes them.  ``samples[10:20]``,
    ``samples[[3, 1]]`` and ``samples[samples.labels == 2]`` are Samples again.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N], or None.
        class_names: names of the classes.
        settings: sampler, steps, seed, guidance: enough, with the labels, to draw them again.
        private: whether the generator carries a privacy guarantee, which its images share; None: not known.

    >>> pixels = np.zeros((3, 1, 8, 8), dtype=np.uint8)
    >>> samples = Samples(pixels, np.array([0, 1, 1]), ("cat", "dog"), {"seed": 0}, private=True)
    >>> samples
    Samples(3 images of 1x8x8; classes 'cat', 'dog')
    >>> len(samples[samples.labels == 1]), samples[2][1]
    (2, 1)
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    settings: dict[str, Any]
    private: bool | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: Several) -> Samples: ...
    def __getitem__(self, index: int | Several) -> Item | Samples:
        """One image with its label, or several as Samples; IndexError beyond the last image."""
        if isinstance(index, int | np.integer):
            image = self.images[index]
            return image if self.labels is None else (image, int(self.labels[index]))
        chosen = index if isinstance(index, slice) else np.asarray(index)
        if isinstance(chosen, np.ndarray) and not chosen.size:
            chosen = chosen.astype(np.int64)  # an empty list has no type of its own
        return replace(self, images=self.images[chosen], labels=None if self.labels is None else self.labels[chosen])

    def __iter__(self) -> Iterator[Item]:
        """What ``samples[i]`` gives, for each i."""
        return (self[i] for i in range(len(self)))

    @property
    def classes(self) -> tuple[str, ...]:
        """The same as `class_names`, by the name that torchvision's data sets have for it."""
        return self.class_names

    def to_pil(self) -> list[Image.Image]:
        """Each image as a Pillow image, of mode "L" or "RGB"."""
        return [picture(pixels) for pixels in self.images]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write all images to a ``.npz`` or ``.parquet`` file or a folder; RunError if there is something already."""
        target = expanded(path)
        about = {"dpsyngen": __version__, "private": self.private, "count": len(self), **self.settings}
        write_samples(target, [self.images], self.labels, self.class_names, about)
        return target

    def grid(self, columns: int | None = None, scale: int | None = None) -> Image.Image:
        """Images side by side in one Pillow image.

        Args:
            columns: images to a row; None: a row a class with the first few of each, as a notebook shows them.
            scale: side of the square of pixels that shows one pixel; None: what makes an image about 48 pixels wide.
        """
        if not len(self):
            raise ConfigError("there are no images to be shown.")
        scale = self._scale if scale is None else scale
        if columns is not None:
            return image_grid(self.images, columns, scale=scale)
        rows = self._rows()
        width = max(len(images) for _, images in rows)
        blank = np.full((width, *self.images.shape[1:]), 128, dtype=np.uint8)  # the level of the gaps
        filled = [np.concatenate([images, blank[len(images) :]]) for _, images in rows]
        return image_grid(np.concatenate(filled), width, scale=scale)

    def show(self) -> None:
        """Show them: in a notebook below the cell, elsewhere in the system's picture viewer."""
        if in_notebook():
            from IPython.display import display

            display(self)
        else:
            self.grid().show()

    @property
    def _scale(self) -> int:
        return max(1, round(_SIDE / self.images.shape[-1]))

    def _rows(self) -> list[tuple[str, NDArray[np.uint8]]]:
        """What is shown: (class name or "", images [n, C, H, W]) for each row."""
        if self.labels is None:
            shown = self.images[:_UNLABELLED]
            return [("", shown[i : i + _EACH]) for i in range(0, len(shown), _EACH)]
        present = np.unique(self.labels)[:_CLASSES].tolist()
        return [(self.class_names[c], self.images[np.flatnonzero(self.labels == c)[:_EACH]]) for c in present]

    def __repr__(self) -> str:
        count, (channels, height, width) = len(self), self.images.shape[1:]
        classes = f"; classes {listed(self.class_names)}" if self.labels is not None else ""
        loud = "; NOT PRIVATE" if self.private is False else ""
        return f"Samples({count:,} image{'' if count == 1 else 's'} of {channels}x{height}x{width}{classes}{loud})"

    def _repr_png_(self) -> bytes | None:
        return png(self.grid()) if len(self) else None

    def _repr_html_(self) -> str:
        if not len(self):
            return html.escape(repr(self))
        lines, shown = [], 0
        for name, images in self._rows():
            shown += len(images)
            strip, name = image_grid(images, len(images)), html.escape(printable(name, 80))
            size = f'width="{self._scale * strip.width}" height="{self._scale * strip.height}"'
            alt = f"{len(images)} generated images{f' of class {name}' if name else ''}"
            image = f'<img alt="{alt}" {size} style="image-rendering: pixelated" src="{png_url(strip)}">'
            head = f'<th scope="row" style="text-align: right">{name}</th>' if name else ""
            lines.append(f'<tr>{head}<td style="text-align: left">{image}</td></tr>')
        text = f"{len(self):,} generated image{'' if len(self) == 1 else 's'}"
        text += f", {shown:,} of them shown" if shown < len(self) else ""
        text += "; the generator is <strong>NOT PRIVATE</strong>" if self.private is False else ""
        return f'<table class="dpsyngen-samples"><caption>{text}</caption>{"".join(lines)}</table>'


@dataclass(frozen=True)
class Trajectory:
    """How some images came about, at K of the sampler's steps, from pure noise to the image.

    Attributes:
        sigmas: [K] noise levels, from σ_max down to σ_min.
        stages: [K] the stage that owns each.
        noisy: uint8 [K, N, C, H, W], what the sampler had, dimmed by σ_d/√(σ² + σ_d²) with σ_d = √(1/3), so that it is
            not saturated.
        denoised: uint8 [K, N, C, H, W], D(x; σ): the images that were expected of it.
        samples: the images that it became, as :meth:`dpsyngen.Generator.sample` gives them.
    """

    sigmas: tuple[float, ...]
    stages: tuple[Stage, ...]
    noisy: NDArray[np.uint8]
    denoised: NDArray[np.uint8]
    samples: Samples


def check_target(out: Path) -> None:
    """Raise RunError if writing to `out` would overwrite anything, ConfigError if what it needs is not installed.

    ConfigError, too, for the name of a file of another kind.
    """
    if out.suffix == ".parquet":
        require_package("pyarrow", "Parquet", "parquet")
    if out.suffix in _FILES:
        require_possible(out, "--out")
        if out.exists():
            raise RunError(f"--out {out} exists already.  Choose another path or move it away.")
        return
    require(out.suffix.lower() not in _OTHERS, "--out", out, "a folder, or a file that ends in .npz or .parquet")
    require_absent_or_empty(out, "--out")


def folder_names(class_names: tuple[str, ...]) -> tuple[str, ...]:
    """A folder name for each class: the class name where that is a safe file name, distinct on any file system.

    Some file systems take "A" and "a", or two spellings of one accent, for the same.
    """
    out: list[str] = []
    taken = set(_TAKEN)
    for number, name in enumerate(class_names):
        safe = re.sub(r"[^\w .+-]", "_", name).strip(" .")
        safe = safe.encode()[:_LONGEST].decode(errors="ignore").strip(" .")
        while not safe or _folded(safe) in taken:
            safe = f"{number}_{safe}".rstrip("_")
        out.append(safe)
        taken.add(_folded(safe))
    return tuple(out)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name.casefold())


def write_samples(
    out: Path,
    batches: Iterable[NDArray[np.uint8]],
    labels: NDArray[np.int64] | None,
    class_names: tuple[str, ...],
    about: dict[str, Any],
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write images to `out`: a ``.npz`` or ``.parquet`` file, or else a folder; it appears whole or not at all.

    Args:
        out: must not exist (or be an empty folder).
        batches: uint8 [n, C, H, W] each.
        labels: class of each image, or None.
        class_names: names of the classes.
        about: provenance, written beside the images: ``about.json``, where the names of the classes are, too; the array
            ``about`` of a ``.npz``; the key ``about`` of a Parquet file's metadata.
        on_progress: called with the number of images written so far.
    """
    check_target(out)
    out.parent.mkdir(parents=True, exist_ok=True)

    def counted() -> Iterator[NDArray[np.uint8]]:
        done = 0
        for batch in batches:
            yield batch
            done += len(batch)  # when the next one is asked for, the last one has been written
            if on_progress:
                on_progress(done)

    drawn = counted(), labels, class_names, about
    if out.suffix in _FILES:
        write = _write_npz if out.suffix == ".npz" else _write_parquet
        write_atomically(out, lambda path: write(path, *drawn))
    else:
        with new_folder(out) as partial:
            _write_folder(partial, *drawn)


def _write_npz(path: Path, batches: _Batches, labels: _Labels, names: tuple[str, ...], about: dict[str, Any]) -> None:
    arrays: dict[str, Any] = {"images": np.concatenate(list(batches)), "about": json.dumps(about)}
    if labels is not None:
        arrays |= {"labels": labels, "class_names": np.array(names)}
    with open(path, "wb") as f:
        np.savez_compressed(f, **arrays)


def _write_parquet(
    path: Path, batches: _Batches, labels: _Labels, names: tuple[str, ...], about: dict[str, Any]
) -> None:
    """A row group for each batch; columns ``image`` and, with classes, ``label``."""
    feature = {"names": list(names), "_type": "ClassLabel"}

    def tables() -> Iterator[Any]:
        number = 0
        for batch in batches:
            rows, number = range(number, number + len(batch)), number + len(batch)
            of_label = {} if labels is None else {"label": (labels[rows.start : rows.stop], feature)}
            yield image_table([f"{n:07d}.png" for n in rows], batch, of_label, {"about": json.dumps(about)})

    write_tables(path, tables())


def _write_folder(
    folder: Path, batches: _Batches, labels: _Labels, names: tuple[str, ...], about: dict[str, Any]
) -> None:
    folders = folder_names(names)
    # Only those with images: a folder without any is refused when the samples are read back.
    for present in () if labels is None else np.unique(labels).tolist():
        (folder / folders[present]).mkdir()
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as f:
        table = csv.writer(f)
        table.writerow(["file_name"] if labels is None else ["file_name", "label", "class_name"])
        for number, pixels in enumerate(pixels for batch in batches for pixels in batch):
            name, row = f"{number:07d}.png", []
            if labels is not None:
                label = int(labels[number])
                name, row = f"{folders[label]}/{name}", [label, names[label]]
            picture(pixels).save(folder / name)
            table.writerow([name, *row])
    write_json(folder / "about.json", about if labels is None else about | {"class_names": list(names)})
