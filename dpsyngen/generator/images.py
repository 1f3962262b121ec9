"""Generated images as a user holds them: looked at in a notebook, sliced, converted, written to the disk."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from dpsyngen.diffusion.stages import Stage
from dpsyngen.errors import ConfigError, listed, printable

if TYPE_CHECKING:
    from PIL import Image

_CLASSES, _EACH, _UNLABELLED = 10, 8, 32  # shown at most: classes, images of each; images without classes
_SIDE = 48  # pixels that an image is enlarged to, about

Item = tuple[NDArray[np.uint8], int] | NDArray[np.uint8]
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
        """One image with its label, or several as Samples.

        Raises:
            IndexError: beyond the last image.
        """
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

    # -------------------------------------------------------------------------------------------- elsewhere

    def to_pil(self) -> list[Image.Image]:
        """Each image as a Pillow image, of mode "L" or "RGB"."""
        from PIL import Image

        return [
            Image.fromarray(p[0] if len(p) == 1 else np.ascontiguousarray(np.moveaxis(p, 0, -1))) for p in self.images
        ]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write all images: to a ``.npz`` file, or as PNGs in class folders with ``metadata.csv`` and ``about.json``.

        Args:
            path: must not exist (or be an empty folder); what is written appears whole or not at all.

        Raises:
            RunError: there is something at `path` already.
        """
        from dpsyngen.generator.samples import write_samples
        from dpsyngen.version import __version__

        target = Path(path).expanduser()
        about = {"dpsyngen": __version__, "private": self.private, "count": len(self), **self.settings}
        write_samples(target, [self.images], self.labels, self.class_names, about)
        return target

    # ------------------------------------------------------------------------------------------- looking at

    def grid(self, columns: int | None = None, scale: int | None = None) -> Image.Image:
        """Images side by side in one Pillow image.

        Args:
            columns: images to a row, in the order in which they are; None: a row a class, and of each class the first
                few, as a notebook shows them.
            scale: side of the square of pixels that shows one pixel; None: what makes an image about 48 pixels wide.

        Raises:
            ConfigError: there are no images, or an argument is not a number above 0.
        """
        from dpsyngen.programs.grid import image_grid

        if not len(self):
            raise ConfigError("there are no images to be shown.")
        if scale is None:
            scale = max(1, round(_SIDE / self.images.shape[-1]))
        if columns is not None:
            return image_grid(self.images, columns, scale=scale)
        rows = self._rows()
        width = max(len(images) for _, images in rows)
        blank = np.full((width, *self.images.shape[1:]), 128, dtype=np.uint8)  # the level of the gaps
        filled = [np.concatenate([images, blank[len(images) :]]) for _, images in rows]
        return image_grid(np.concatenate(filled), width, scale=scale)

    def show(self) -> None:
        """Show them: in a notebook below the cell, elsewhere in the system's picture viewer."""
        from dpsyngen.console import in_notebook

        if in_notebook():
            from IPython.display import display

            display(self)
        else:
            self.grid().show()

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
        return _png(self.grid()) if len(self) else None

    def _repr_html_(self) -> str:
        if not len(self):
            return html.escape(repr(self))
        from dpsyngen.programs.grid import image_grid

        rows = self._rows()
        scale = max(1, round(_SIDE / self.images.shape[-1]))
        lines = []
        for name, images in rows:
            strip = image_grid(images, len(images))
            size = f'width="{scale * strip.width}" height="{scale * strip.height}"'
            of = f" of class {printable(name, 80)}" if name else ""
            picture = (
                f'<img alt="{len(images)} generated images{html.escape(of)}" {size} style="image-rendering: pixelated" '
                f'src="data:image/png;base64,{base64.b64encode(_png(strip)).decode()}">'
            )
            head = f'<th scope="row" style="text-align: right">{html.escape(printable(name, 80))}</th>' if name else ""
            lines.append(f'<tr>{head}<td style="text-align: left">{picture}</td></tr>')
        shown = sum(len(images) for _, images in rows)
        text = f"{len(self):,} generated image{'' if len(self) == 1 else 's'}"
        if shown < len(self):
            text += f", {shown:,} of them shown"
        if self.private is False:
            text += "; the generator is <strong>NOT PRIVATE</strong>"
        return f'<table class="dpsyngen-samples"><caption>{text}</caption>{"".join(lines)}</table>'


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


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
