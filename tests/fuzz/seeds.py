"""Small valid files of every kind that is read: where mutations begin."""

from __future__ import annotations

import gzip
import io
import struct
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

_SIDE = 12


@cache
def images() -> dict[str, tuple[bytes, ...]]:
    """Image files by suffix: several modes, depths, compressions and extras of each format."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8))
    alpha = Image.fromarray(rng.integers(0, 256, (_SIDE, _SIDE, 4), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (_SIDE, _SIDE), dtype=np.uint16))
    grey, palette, bits, cmyk = rgb.convert("L"), rgb.quantize(16), rgb.convert("1"), rgb.convert("CMYK")
    exif = Image.Exif()
    exif[0x0112] = 6

    def frames() -> dict[str, object]:
        # Fresh ones, as Pillow leaves the options of one format in an image for the next.
        return {"save_all": True, "append_images": [grey.convert("RGB")]}

    return {
        "png": (
            _saved(rgb, "PNG", exif=exif),
            _saved(alpha, "PNG"),
            _saved(deep, "PNG"),
            _saved(grey, "PNG"),
            _saved(bits, "PNG"),
            _saved(palette, "PNG", transparency=1),
            _saved(rgb, "PNG", **frames()),
            interlaced_png(),
        ),
        "jpg": (
            _saved(rgb, "JPEG", exif=exif),
            _saved(grey, "JPEG"),
            _saved(cmyk, "JPEG"),
            _saved(rgb.resize((90, 70)), "JPEG", progressive=True),
            _saved(rgb, "MPO", **frames()),
        ),
        "webp": (
            _saved(rgb, "WEBP", exif=exif),
            _saved(alpha, "WEBP", lossless=True),
            _saved(rgb, "WEBP", **frames()),
        ),
        "bmp": (_saved(rgb, "BMP"), _saved(palette, "BMP"), _saved(bits, "BMP")),
        "tif": (
            _saved(rgb, "TIFF"),
            _saved(deep, "TIFF"),
            _saved(alpha, "TIFF", compression="tiff_lzw"),
            _saved(rgb, "TIFF", compression="jpeg"),
            _saved(grey, "TIFF", compression="tiff_adobe_deflate", exif=exif),
            _saved(bits, "TIFF", compression="group4"),
            _saved(rgb, "TIFF", **frames()),
        ),
        "gif": (_saved(palette, "GIF"), _saved(grey, "GIF", transparency=3), _saved(rgb, "GIF", **frames())),
        "dcm": dicom(),
    }


def dicom() -> tuple[bytes, ...]:
    """Some of pydicom's test files: plain and compressed, grey and colour, of several frames, with tables, no image."""
    try:
        import pydicom
    except ImportError:
        return (b"",)
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    names = ("MR_small", "MR_small_RLE", "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless", "MR_small_bigendian")
    names += ("SC_rgb_small_odd", "SC_rgb_small_odd_jpeg", "JPEGLSNearLossless_08", "rtdose_rle", "test-SR")
    return tuple((folder / f"{name}.dcm").read_bytes() for name in names)


def interlaced_png() -> bytes:
    """A grey 8×8 PNG in Adam7 order, which Pillow reads but does not write."""
    import zlib

    from tests.fuzz.mutations import png_file

    steps = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    lines = b"".join(b"\0" + line.tobytes() for x, y, dx, dy in steps for line in pixels[y::dy, x::dx])
    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 1)
    return png_file([(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")])


@cache
def npy() -> tuple[bytes, ...]:
    """Array files: types, layouts, orders and header versions."""
    rng = np.random.default_rng(1)
    grey = rng.integers(0, 256, (5, 9, 9), dtype=np.uint8)
    arrays = (
        grey,
        np.asfortranarray(grey),
        rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8),
        rng.random((3, 1, 8, 8)).astype(np.float32),
        rng.random((3, 8, 8)).astype(">f8"),
        rng.random((3, 8, 8)).astype(np.float16),
    )
    return (*(npy_bytes(a) for a in arrays), npy_bytes(grey, (2, 0)), npy_bytes(grey, (3, 0)))


def npy_bytes(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    """A ``.npy`` file of the array."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version)
    return stream.getvalue()


@cache
def members() -> dict[str, tuple[bytes, ...]]:
    """Array files that a ``.npz`` may hold, by key."""
    return {
        "images": npy(),
        "labels": tuple(
            npy_bytes(np.asarray(a))
            for a in (
                [0, 1, 2, 1, 0],
                ["a", "b", "a", "b", "é"],
                [[1], [0], [1], [0], [2]],
                [0.0, 1.0, np.nan],
                [b"a", b"\xc3\xa9", b"c", b"c", b"a"],
                np.arange(5).astype(np.uint64) << 62,
            )
        ),
        "class_names": (npy_bytes(np.array(["a", "b", "c"])), npy_bytes(np.array([b"a", b"b", b"\xff"]))),
    }


@cache
def idx() -> tuple[tuple[bytes, bytes], ...]:
    """(images, labels) of IDX, as they are and compressed."""
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 256, (6, 10, 10), dtype=np.uint8)
    plain = (idx_bytes(pixels), idx_bytes(np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8)))
    return plain, (gzip.compress(plain[0], mtime=0), gzip.compress(plain[1], mtime=0))


def idx_bytes(array: np.ndarray) -> bytes:
    """An IDX file of unsigned bytes."""
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.copy().save(stream, kind, **options)
    return stream.getvalue()
