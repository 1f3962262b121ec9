"""One image of any form (a file, its content, a PIL image, an array) to one uint8 array.

The choices, made once for all readers:

* **EXIF orientation** is applied, since cameras store portraits lying on their side.
* **Alpha** is composited on white, as viewers and paper show it; before resizing, so that hidden colours do
  not bleed in.
* **16-bit** values are scaled by 255/65535 (white stays white), not clipped as Pillow's own conversion does
  (16-bit RGB is read by Pillow itself, which keeps the high byte); 12-bit TIFF by 255/4095.
  The scale is fixed: stretching to an image's own range would change what its grey values mean.
* **White is zero** where a TIFF says so, which turns a value range round, too.
* **Floating point** in an array lies in [0, 1]; it is multiplied by 255 and rounded.  In files, and for signed and
  32-bit values, black and white are not defined, so a value range must be given (:class:`Form`).
* **Palette, CMYK and YCbCr** become RGB by Pillow's plain formulas; embedded colour profiles are ignored.
* **Resizing** cuts the largest centred square, or adds black bars (:class:`Form`), and scales with LANCZOS,
  antialiased: the filter with which EDM's data sets are prepared.  A box filter blurs more at ratios that are not
  whole, and sampling without antialiasing leaves patterns that DP training would spend its budget on learning.
* **DICOM**, known by its mark, is read by :mod:`dpsyngen.data.dicom`, as its header says.
* **Animations** are refused: which frame was meant is not ours to guess, and frames of one person are many
  records. Multi-picture JPEGs of phones (MPO) count as still: their first picture is the photo.
* **Sizes**: at most 2²⁶ pixels (8192×8192) and 256 MiB an image.  All threads together decode no more than 2²⁶ pixels
  at a time, which keeps hostile files within about 1 GiB, however many there are.
* **Links and pipes** are not opened, also when one takes the place of a file after the folder was listed.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpsyngen.data.dicom import MAX_FILE_BYTES, MAX_PIXELS, DicomFile, Range, is_dicom
from dpsyngen.data.store import PixelBudget
from dpsyngen.errors import BadImage, ConfigError, DataError, printable, shown
from dpsyngen.files import NotPlainError, open_plain

if TYPE_CHECKING:
    from PIL import Image

Colour = Literal["grey", "rgb"]
Item = Any
"""An image: a path, the content of a file, a PIL image, or an array or tensor ``[H, W]``, ``[H, W, C]`` or
``[C, H, W]``; or a BadImage, which says why there is none."""
BUDGET = PixelBudget(MAX_PIXELS)
_MAX_SIDE = 65_535  # pixels, as JPEG; Pillow's own arithmetic ends at 2³¹

# Only these decoders are reachable: the others are little used and have had more security faults (EPS runs a
# program).
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
_GREY_MODES = {"1", "L", "LA", "La", "F", "I", "I;16", "I;16L", "I;16B", "I;16N"}
_HIDDEN_IN_RGB = {"RGBA", "RGBa", "PA", "LA", "La"}


class Form(NamedTuple):
    """How values become grey levels, and rectangles squares; :func:`dpsyngen.data.load.load_images` explains each."""

    value_range: Range | None = None
    fit: Literal["crop", "pad"] = "crop"
    window: Range | None = None
    frames: Literal["first", "all"] | None = None
    group_size: int | None = 1000


AS_STORED = Form()
_NO_WINDOW = "a window is for DICOM files; say with --value-range LOW,HIGH which values are black and white"


class ImageHeader(NamedTuple):
    """What a file's header tells without decoding its pixels."""

    width: int
    height: int
    is_grey: bool


# -------------------------------------------------------------------------------------------------------------- items


def read_header(item: Item) -> ImageHeader:
    """Size and colour of an image, nothing decoded; BadImage if it is none, animated, or too large."""
    if isinstance(item, str | bytes | os.PathLike):
        with _open_checked(item) as image:
            return ImageHeader(image.width, image.height, image.mode in _GREY_MODES)
    if hasattr(item, "getexif") or hasattr(item, "picture"):
        return ImageHeader(item.width, item.height, item.mode in _GREY_MODES)
    _, channels, height, width = _array(item, Form(value_range=(0, 1))).shape
    return ImageHeader(width, height, channels == 1)


def read_image(item: Item, *, resolution: int, colour: Colour, form: Form = AS_STORED) -> NDArray[np.uint8]:
    """An image as uint8 ``[C, resolution, resolution]``, C = 1 for ``"grey"``, 3 for ``"rgb"``.

    Raises:
        BadImage: not an image, truncated, animated, too large, or with pixels of no defined range.
    """
    try:
        if isinstance(item, str | bytes | os.PathLike):
            with _open_checked(item) as image:
                return _decoded(image, resolution, colour, form)
        if hasattr(item, "picture"):  # a frame of a DicomFile
            return _decoded(item, resolution, colour, form)
        if hasattr(item, "getexif"):
            _check_pixels(item)
            return _from_pil(item, resolution, colour, form)
        values = _to_8_bit(_array(item, form)[0], form.value_range)
        if values.shape == (1 if colour == "grey" else 3, resolution, resolution):
            return values
        from PIL import Image

        with BUDGET.spend(values[0].size):
            whole = Image.fromarray(np.ascontiguousarray(values[0] if len(values) == 1 else values.transpose(1, 2, 0)))
            return _from_pil(whole, resolution, colour, Form(fit=form.fit))
    except (BadImage, ConfigError):  # the second: a library is missing
        raise
    except Exception as error:  # broken files make Pillow raise nearly anything: OSError, SyntaxError, struct.error
        raise BadImage(f"broken or truncated ({_reason(error)})") from error


def _array(image: Any, form: Form) -> NDArray[Any]:
    """An image that is an array or a tensor as ``[1, C, H, W]``."""
    if isinstance(image, BadImage):
        raise image
    if not isinstance(image, np.ndarray) and not hasattr(image, "__array__"):
        raise BadImage(f"the image is {shown(type(image).__name__)}: a PIL image, an array or a tensor is read")
    array = as_array(image)
    if array.ndim not in (2, 3) or 0 in array.shape:
        why = ": [H, W], [H, W, C] or [C, H, W] is read" if array.ndim not in (2, 3) else ", which is empty"
        raise BadImage(f"the image has shape {list(array.shape)}{why}")
    try:
        return arranged(array[None, None] if array.ndim == 2 else array[None], "the image", form)
    except DataError as error:
        raise BadImage(str(error).removeprefix("the image: ")) from None


# -------------------------------------------------------------------------------------------------------------- files


def _decoded(image: Any, resolution: int, colour: Colour, form: Form) -> NDArray[np.uint8]:
    if hasattr(image, "picture"):  # a DicomFile
        if form.value_range is not None:
            raise BadImage("DICOM says itself what its values are: instead of a value range say --window CENTRE,WIDTH")
        if image.frame is None and image.frames > 1 and form.frames != "first":
            how = "all are read from a folder of files only" if form.frames else "say --frames first, or all"
            raise BadImage(f"{image.frames:,} frames: {how} (from Python: frames)")
        with BUDGET.spend(image.cost):
            return _from_pil(image.picture(form.window), resolution, colour, Form(fit=form.fit))
    whole = image.width * image.height
    # JPEG can decode at 1/2, 1/4 or 1/8 size at a fraction of the cost; a margin of 4× leaves LANCZOS its say.
    image.draft(None, (4 * resolution, 4 * resolution))
    # A progressive JPEG is held whole, whatever size is asked for.
    pixels = whole if image.info.get("progressive") else image.width * image.height
    with BUDGET.spend(pixels):
        try:
            return _from_pil(image, resolution, colour, form)
        finally:
            image.close()  # its pixels go before the next image comes


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _file_of(encoded: str | bytes | os.PathLike[str]) -> BinaryIO:
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
def _open_checked(encoded: str | bytes | os.PathLike[str]) -> Iterator[Any]:
    """The opened image, of Pillow or a DicomFile, whose pixels are not decoded yet."""
    from PIL import Image

    with _file_of(encoded) as file:
        if is_dicom(file):
            yield DicomFile(file)
            return
        try:
            image = Image.open(file, formats=_FORMATS)
        except Image.UnidentifiedImageError as error:
            empty = file.seek(0, io.SEEK_END) == 0
            why = f"not an image that can be read ({', '.join(_FORMATS)}, or DICOM with DICM after 128 bytes)"
            raise BadImage("empty file" if empty else why) from error
        except Exception as error:
            raise BadImage(f"cannot be opened ({_reason(error)})") from error
        with image:
            _check_pixels(image)
            try:
                frames = getattr(image, "n_frames", 1)
            except Exception as error:  # counting frames parses the file
                raise BadImage(f"broken or truncated ({_reason(error)})") from error
            if frames > 1 and image.format != "MPO":
                raise BadImage(f"animated or of several pages ({frames} frames); save the one that is meant")
            yield image


def _check_pixels(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{image.width}×{image.height} pixels: over the limit of {MAX_PIXELS:,} (decompression bomb?)")


# ------------------------------------------------------------------------------------------------------------- pixels


def _from_pil(image: Image.Image, resolution: int, colour: Colour, form: Form) -> NDArray[np.uint8]:
    if form.window is not None:
        raise BadImage(_NO_WINDOW)
    mode = "L" if colour == "grey" else "RGB"
    deep = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())) and not image.mode.startswith("I")
    if deep and form.value_range is not None:
        raise BadImage("16 bits in colour or with alpha are read as 8, which a value range cannot stretch; convert it")
    plain = _plain(_upright(image), form.value_range)
    if plain.mode != mode:
        plain = plain.convert(mode)
    pixels = np.asarray(_square(plain, resolution, form.fit), dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _square(image: Image.Image, resolution: int, fit: Literal["crop", "pad"]) -> Image.Image:
    """An 8-bit L or RGB image, scaled to `resolution`: its largest centred square, or all of it between black bars."""
    from PIL import Image, ImageOps

    width, height = image.size
    if fit == "crop" or width == height:
        return ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    scaled_width, scaled_height = (max(1, round(side * resolution / max(width, height))) for side in (width, height))
    scaled = image.resize((scaled_width, scaled_height), Image.Resampling.LANCZOS)
    bars = Image.new(image.mode, (resolution, resolution))
    bars.paste(scaled, ((resolution - scaled_width) // 2, (resolution - scaled_height) // 2))
    return bars


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


def _plain(image: Image.Image, value_range: Range | None) -> Image.Image:
    """The image with 8 bits a channel and nothing transparent: mode 1, L or RGB."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_numbers(image, value_range)
    stored, bilevel = np.arange(256), image.mode == "1"
    if image.mode in _HIDDEN_IN_RGB or image.has_transparency_data:
        plain = _on_white(image)
    elif image.mode in ("1", "L", "RGB"):
        plain = image
    else:
        plain = image.convert("RGB")  # P, CMYK, YCbCr, HSV; through RGB also for grey, as CMYK → L differs
    if value_range is None:
        return plain
    if bilevel:
        plain, stored = plain.convert("L"), stored // 255
    if _tag(image, _PHOTOMETRIC) == 0:  # Pillow has inverted these already
        stored, value_range = stored[::-1], value_range[::-1]
    return plain.point(_levels(stored, value_range).tolist() * len(plain.getbands()))


_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339


def _tag(image: Image.Image, tag: int) -> Any:
    """The (first) value of a TIFF tag; None where there is none, or the image is no TIFF file."""
    value = getattr(image, "tag_v2", {}).get(tag)
    return value[0] if isinstance(value, tuple) and value else value


def _levels(values: NDArray[Any], value_range: Range) -> NDArray[np.uint8]:
    """Grey levels of numbers, from black at the first of the range to white at the second."""
    black, white = value_range
    # float64: float16 cannot hold 255·x to half a grey level.
    scaled = (values.astype(np.float64) - black) * (255 / (white - black))
    return np.rint(np.clip(scaled, 0, 255, out=scaled), out=scaled).astype(np.uint8)


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


def _from_numbers(image: Image.Image, value_range: Range | None) -> Image.Image:
    """The image in grey, from one of 12, 16 or 32 bits or of floating point."""
    from PIL import Image

    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise BadImage("NaN or infinite values")
    if value_range is None:
        signed = image.mode == "F" or _tag(image, _SAMPLE_FORMAT) == 2
        if signed or (values.size and (values.min() < 0 or values.max() > 65535)):
            raise BadImage(
                "floating-point, signed or 32-bit pixels have no fixed black and white: say which values they are with "
                "--value-range LOW,HIGH (from Python: value_range), or save it with 8 or 16 bits a channel"
            )
        value_range = (0, 4095 if _tag(image, _BITS) == 12 else 65535)
    if _tag(image, _PHOTOMETRIC) == 0:
        value_range = value_range[::-1]
    grey = np.empty(values.shape, dtype=np.uint8)
    rows = max(1, 2**20 // max(1, values.shape[1]))
    for start in range(0, len(values), rows):  # in parts, as the numbers between take 8 bytes a pixel
        grey[start : start + rows] = _levels(values[start : start + rows], value_range)
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


# ------------------------------------------------------------------------------------------------------------- arrays


_FULL_SCALE = {"uint8": 255, "uint16": 65535, "bool": 1}  # floating point: 1


def as_array(values: Any) -> NDArray[Any]:
    """Any array or tensor (bfloat16, on a GPU, with a gradient) as an array of NumPy; DataError for what cannot be."""
    if isinstance(values, np.ma.MaskedArray):
        return values
    try:
        if hasattr(values, "detach"):
            values = values.detach().cpu()
            kind = str(values.dtype)
            values = values.float() if "bfloat16" in kind or "float8" in kind else values
        array = np.asarray(values)
        # bfloat16 of JAX and ml_dtypes is a type that NumPy knows nothing of.
        return array.astype(np.float32) if "float" in array.dtype.name and array.dtype.kind != "f" else array
    except Exception as error:  # ragged lists, sparse tensors, arrays of other devices
        raise DataError(
            f"{type(values).__name__} does not form an array ({printable(error)}). Use np.stack on equal sizes."
        ) from error


def _to_8_bit(image: NDArray[Any], value_range: Range | None) -> NDArray[np.uint8]:
    """An image of numbers as uint8; BadImage for NaN, and for floating point beyond 0..1 without a range."""
    if image.dtype == np.uint8 and value_range is None:
        return image
    low, high = image.min(), image.max()  # NaN where there is one
    if not (np.isfinite(low) and np.isfinite(high)):
        raise BadImage("NaN or infinite values")
    if image.dtype.kind == "f" and value_range is None and not 0 <= low <= high <= 1:
        raise BadImage(
            "values outside 0..1: divide 0..255 by 255; for [-1, 1] give (x + 1) / 2; or say which values are black "
            "and white with --value-range LOW,HIGH (from Python: value_range)"
        )
    return _levels(image, value_range or (0, _FULL_SCALE.get(image.dtype.name, 1)))


def arranged(images: np.ndarray, source: str, form: Form) -> np.ndarray:
    """Images in any accepted layout as a view ``[N, C, H, W]``; DataError for another shape, or a type whose black and
    white are not known.
    """
    if form.window is not None:
        raise DataError(f"{source}: {_NO_WINDOW}.")
    if isinstance(images, np.ma.MaskedArray):
        raise DataError(f"{source}: masked images; the mask would be lost. Fill it first: images.filled(255).")
    if images.dtype.hasobject:
        raise DataError(f"{source}: the images are Python objects, perhaps of several sizes. Make one array: np.stack.")
    known = images.dtype.name in _FULL_SCALE or images.dtype.kind == "f"
    if not known and not (form.value_range is not None and images.dtype.kind in "iu"):
        raise DataError(
            f"{source}: images of type {images.dtype}; uint8 (0..255), uint16 (0..65535), bool or floating point "
            "(0..1) is allowed, and other whole numbers with --value-range LOW,HIGH (from Python: value_range), the "
            "values of black and white. If the values are 0..255, save images.astype('uint8')."
        )
    result = _arrange(images, source)
    height, width = result.shape[2:]
    if 0 in (height, width) and len(result):
        raise DataError(f"{source}: images of {height}×{width} pixels are empty.")
    if max(height, width) > _MAX_SIDE or height * width > MAX_PIXELS:
        raise DataError(
            f"{source}: images of {height}×{width} pixels; at most {_MAX_SIDE:,} a side and {MAX_PIXELS:,} in all "
            "are allowed. Cut them into smaller ones."
        )
    return result


def _arrange(images: np.ndarray, source: str) -> np.ndarray:
    shape = list(images.shape)
    if images.ndim == 3 and not (shape[-1] in (1, 3) and shape[0] != 0):
        return images[:, None]
    if images.ndim == 4:
        first, last = shape[1] in (1, 3), shape[3] in (1, 3)
        if first and last:
            raise DataError(
                f"{source}: shape {shape} could be [N, C, H, W] or [N, H, W, C]. Use images of at least 8×8 pixels, "
                "or save grey images as [N, H, W]."
            )
        if first or last:
            return images if first else images.transpose(0, 3, 1, 2)
    hint = "Composite an alpha channel" if images.ndim == 4 else "Reshape flattened rows, or add the axis N"
    raise DataError(
        f"{source}: images of shape {shape}; [N, H, W], [N, H, W, C] or [N, C, H, W] with C = 1 or 3 is allowed. "
        f"{hint} first, then save again."
    )
