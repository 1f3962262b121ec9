"""One image file, of any size and pixel format, to one uint8 array.

The choices, made once for all readers:

* **EXIF orientation** is applied, since cameras store portraits lying on their side.
* **Alpha** is composited on white, as viewers and paper show it; before resizing, so that hidden colours do
  not bleed in.
* **16-bit** values are scaled by 255/65535 (white stays white), not clipped as Pillow's own conversion does
  (16-bit RGB is read by Pillow itself, which keeps the high byte).
  The scale is fixed: stretching to an image's own range would change what its grey values mean.
* **Palette, CMYK and YCbCr** become RGB by Pillow's plain formulas; embedded colour profiles are ignored.
* **Resizing** cuts the largest centred square and scales it with LANCZOS, antialiased: the filter with which
  EDM's data sets are prepared.  A box filter blurs more at ratios that are not whole, and sampling without
  antialiasing leaves patterns that DP training would spend its budget on learning.
* **Animations** are refused: which frame was meant is not ours to guess, and frames of one person are many
  records. Multi-picture JPEGs of phones (MPO) count as still: their first picture is the photo.
* **Sizes**: at most 2²⁶ pixels (8192×8192) and 256 MiB an image.  All threads together decode no more than 2²⁶ pixels
  at a time, which keeps hostile files within about 1 GiB, however many there are.
* **Links and pipes** are not opened, also when one takes the place of a file after the folder was listed.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, Literal, NamedTuple

import numpy as np

from dpsyngen.errors import require
from dpsyngen.files import NotPlainError, open_plain

if TYPE_CHECKING:
    from PIL import Image

Colour = Literal["grey", "rgb"]
Encoded = str | os.PathLike[str] | bytes
"""An image file: its path, or its content."""
DEFAULT_RESOLUTION = 32
MIN_RESOLUTION, MAX_RESOLUTION, MAX_NATIVE_RESOLUTION = 8, 256, 64
MAX_PIXELS = 2**26
MAX_FILE_BYTES = 2**28
_LARGE = 2**22  # pixels from which images of several processes take turns

# Only these decoders are reachable: the others are little used and have had more security faults (EPS runs a
# program).
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
_GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}
_HIDDEN_IN_RGB = {"RGBA", "RGBa", "PA", "LA", "La"}


class BadImage(Exception):
    """One image cannot be used; the message says why, and the reader adds where."""


class ImageHeader(NamedTuple):
    """What a file's header tells without decoding its pixels."""

    width: int
    height: int
    is_grey: bool


def check_resolution(resolution: int | None) -> int | None:
    """`resolution` as an int in 8..256, or None (choose by :func:`default_resolution`); otherwise ConfigError."""
    if resolution is None:
        return None
    whole = isinstance(resolution, int | np.integer) and not isinstance(resolution, bool)
    require(
        whole and MIN_RESOLUTION <= resolution <= MAX_RESOLUTION,
        "resolution",
        resolution,
        f"a whole number from {MIN_RESOLUTION} to {MAX_RESOLUTION}. Use 28, 32 or 64, or leave it out to keep the size "
        "of small square images",
    )
    return int(resolution)


def default_resolution(sizes: set[tuple[int, int]]) -> int:
    """The resolution when none was asked for: the native one if all images are one square of 8..64, or 32."""
    if len(sizes) == 1:
        width, height = next(iter(sizes))
        if width == height and MIN_RESOLUTION <= width <= MAX_NATIVE_RESOLUTION:
            return width
    return DEFAULT_RESOLUTION


# -------------------------------------------------------------------------------------------------------------- files


def read_header(path: Encoded) -> ImageHeader:
    """Size and colour of an image file.

    Raises:
        BadImage: not an image, animated, or too large.
    """
    with _open_checked(path) as image:
        return ImageHeader(*image.size, is_grey(image))


def is_grey(image: Image.Image) -> bool:
    """Whether an image is stored in grey: 1, 8 or 16 bits, with or without alpha."""
    return image.mode in _GREY_MODES


def read_image(path: Encoded, *, resolution: int, colour: Colour) -> np.ndarray:
    """An image file as uint8 ``[C, resolution, resolution]``, C = 1 for ``"grey"``, 3 for ``"rgb"``.

    Raises:
        BadImage: not an image, truncated, animated, too large, or with pixels of no defined range.
    """
    with _open_checked(path) as image:
        try:
            whole = image.width * image.height
            # JPEG can decode at 1/2, 1/4 or 1/8 size at a fraction of the cost; a margin of 4× leaves LANCZOS its
            # say.
            image.draft(None, (4 * resolution, 4 * resolution))
            # A progressive JPEG is held whole, whatever size is asked for.
            pixels = whole if image.info.get("progressive") else image.width * image.height
            with _budget.spend(pixels):
                try:
                    return decode_image(image, resolution=resolution, colour=colour)
                finally:
                    image.close()  # its pixels go before the next image comes
        except BadImage:
            raise
        except Exception as error:  # broken files make Pillow raise nearly anything: OSError, SyntaxError, struct.error
            raise BadImage(f"broken or truncated ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _file_of(encoded: Encoded) -> BinaryIO:
    if isinstance(encoded, bytes):
        if len(encoded) > MAX_FILE_BYTES:
            raise BadImage(f"{len(encoded):,} bytes: over the limit of {MAX_FILE_BYTES:,}")
        return io.BytesIO(encoded)
    try:
        # Given by its path, Pillow would follow links and map the file, and a file that shrinks while it is mapped ends
        # the process.
        return open_plain(encoded, MAX_FILE_BYTES)
    except NotPlainError as error:
        raise BadImage(str(error)) from error


@contextmanager
def _open_checked(encoded: Encoded) -> Iterator[Image.Image]:
    """The opened image, whose pixels are not decoded yet."""
    from PIL import Image

    with _file_of(encoded) as file:
        try:
            image = Image.open(file, formats=_FORMATS)
        except Image.DecompressionBombError as error:
            raise BadImage(f"far too many pixels, perhaps a decompression bomb ({error})") from error
        except Image.UnidentifiedImageError as error:
            empty = file.seek(0, io.SEEK_END) == 0
            raise BadImage("empty file" if empty else "not an image that can be read") from error
        except Exception as error:
            raise BadImage(f"cannot be opened ({_reason(error)})") from error
        with image:
            check_pixels(image)
            try:
                frames = getattr(image, "n_frames", 1)
            except Exception as error:  # counting frames parses the file
                raise BadImage(f"broken or truncated ({_reason(error)})") from error
            if frames > 1 and image.format != "MPO":
                raise BadImage(f"animated or of several pages ({frames} frames); save the one that is meant")
            yield image


def check_pixels(image: Image.Image) -> None:
    """Raise BadImage for an image of more than 2²⁶ pixels."""
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{image.width}×{image.height} pixels: over the limit of {MAX_PIXELS:,} (decompression bomb?)")


# ------------------------------------------------------------------------------------------------------------- pixels


def decode_image(image: Image.Image, *, resolution: int, colour: Colour) -> np.ndarray:
    """An opened image as uint8 ``[C, resolution, resolution]``, by the rules at the top of this module.

    Raises:
        BadImage: its pixels have no defined range (floating point), or more than 16 bits.
        OSError: the file is truncated.  Pillow raises other types as well for broken files.
    """
    mode = "L" if colour == "grey" else "RGB"
    plain = _plain(_upright(image))
    if plain.mode != mode:
        plain = plain.convert(mode)
    return image_to_array(resize_square(plain, resolution))


def resize_square(image: Image.Image, resolution: int) -> Image.Image:
    """The largest centred square of an 8-bit L or RGB image, scaled to `resolution`."""
    from PIL import Image

    width, height = image.size
    if (width, height) == (resolution, resolution):
        return image
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)


def image_to_array(image: Image.Image) -> np.ndarray:
    """An L or RGB image as uint8 ``[C, H, W]``."""
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def array_to_image(pixels: np.ndarray) -> Image.Image:
    """uint8 ``[1 or 3, H, W]`` as an L or RGB image; the inverse of :func:`image_to_array`."""
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)))


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says.

    Unlike ``ImageOps.exif_transpose`` this makes no copy where none is needed, and does not write the EXIF data anew,
    which fails for data that can be read.
    """
    from PIL import Image

    image.load()  # PNG may have its EXIF data behind the pixels
    orientation = image.getexif().get(0x0112)
    turns = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"]
    if isinstance(orientation, int) and 2 <= orientation <= 8:
        return image.transpose(Image.Transpose[turns[orientation - 2]])
    return image


def _plain(image: Image.Image) -> Image.Image:
    """The image with 8 bits a channel and nothing transparent: mode 1, L or RGB."""
    if image.mode == "F":
        raise BadImage("floating-point pixels have no fixed white; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.mode in _HIDDEN_IN_RGB or image.has_transparency_data:
        return _on_white(image)
    if image.mode in ("1", "L", "RGB"):
        return image
    return image.convert("RGB")  # P, CMYK, YCbCr, HSV; through RGB also for grey, as CMYK → L differs


def _on_white(image: Image.Image) -> Image.Image:
    """The image laid on white, as RGB; in strips, as all of it at a time would take thrice the memory."""
    from PIL import Image

    result = Image.new("RGB", image.size)
    rows = max(1, 2**20 // max(1, image.width))
    for top in range(0, image.height, rows):
        strip = (0, top, image.width, min(top + rows, image.height))
        layer = image.crop(strip).convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        result.paste(Image.alpha_composite(white, layer).convert("RGB"), strip)
    return result


def _from_16_bit(image: Image.Image) -> Image.Image:
    from PIL import Image

    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise BadImage("more than 16 bits a channel, so white is not defined; save it with 8 or 16 bits")
    table = ((np.arange(65536) * 255 + 32767) // 65535).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int) and 0 <= transparent <= 65535:
        table[transparent] = 255
    grey = np.empty(values.shape, dtype=np.uint8)
    rows = max(1, 2**20 // max(1, values.shape[1]))
    for start in range(0, len(values), rows):  # in parts, as an index takes 8 bytes a pixel
        grey[start : start + rows] = table[values[start : start + rows]]
    return Image.fromarray(grey)


# ----------------------------------------------------------------------------------------------------- memory, silence


class PixelBudget:
    """Lets threads in while the pixels that they decode stay within a total.

    A file of some kilobytes can decode to hundreds of megabytes.  One such file is bounded by the limit on pixels; this
    bounds what several of them take together.

    Args:
        total: pixels.
        turns: a lock file; of the processes that have the same one, one at a time decodes a large image.
    """

    def __init__(self, total: int, turns: str | os.PathLike[str] | None = None) -> None:
        self.total, self.turns = total, turns
        self._free = total
        self._changed = threading.Condition()

    @contextmanager
    def spend(self, pixels: int) -> Iterator[None]:
        """Hold `pixels` of the total, waiting until they are free.  More than the total counts as all of it."""
        from filelock import FileLock

        pixels = min(pixels, self.total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            large = self.turns is not None and pixels > _LARGE
            with FileLock(self.turns, mode=0o600) if large else contextlib.nullcontext():
                yield
        finally:
            if pixels > _LARGE:
                # The C library keeps what a thread freed for that thread, so eight threads would hold eight large
                # images' worth.  Other libraries than GNU's have no such function, and another policy.
                with contextlib.suppress(OSError, AttributeError):
                    ctypes.CDLL(None).malloc_trim(0)
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_budget = PixelBudget(MAX_PIXELS)


def share_budget(path: str | os.PathLike[str]) -> None:
    """From now on, take turns with the other processes that gave this lock file: one large image at a time."""
    global _budget
    if _budget.turns != path:
        _budget = PixelBudget(MAX_PIXELS, path)


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """No warnings, no log lines on the terminal, and no messages of libtiff while the context lasts.

    What decoders say of a broken file names no file; whatever of it matters is raised as an error and reported with
    the file's name.  An application that collects the log of Pillow still gets it.
    """
    logger, ignored = logging.getLogger("PIL"), logging.NullHandler()
    logger.addHandler(ignored)  # without any handler, Python prints errors to the terminal
    handler = _set_tiff_handler(None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _set_tiff_handler(handler)
        logger.removeHandler(ignored)


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
