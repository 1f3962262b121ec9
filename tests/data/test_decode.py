from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpsyngen.data import load_images
from dpsyngen.data.cache import read_headers
from dpsyngen.data.decode import BadImage, Form, ImageHeader, read_header, read_image
from dpsyngen.data.source import Job, Options, Source
from dpsyngen.errors import ConfigError


def read(path: Path, colour: Any = "rgb", resolution: int = 8) -> np.ndarray:
    return read_image(path, resolution=resolution, colour=colour)


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def test_pixels_are_kept_when_nothing_changes(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    path = save(Image.fromarray(pixels), tmp_path / "a.png")
    assert np.array_equal(read(path), pixels.transpose(2, 0, 1))
    assert read(path, "grey").shape == (1, 8, 8)


def test_16_bit_is_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    path = save(Image.fromarray(ramp), tmp_path / "a.png")
    assert read_header(path).is_grey
    assert np.array_equal(read(path, "grey")[0], np.rint(ramp / 257).astype(np.uint8))
    tiff = save(Image.fromarray(ramp), tmp_path / "a.tif")
    assert np.array_equal(read(tiff, "grey"), read(path, "grey"))


@pytest.mark.parametrize("pixels", [np.ones((8, 8), dtype=np.float32), np.full((8, 8), 70000, dtype=np.int32)])
def test_pixels_without_a_defined_white_are_bad(tmp_path: Path, pixels: np.ndarray) -> None:
    with pytest.raises(BadImage, match="8 or 16 bits"):
        read(save(Image.fromarray(pixels), tmp_path / "a.tif"))


def tiff(path: Path, values: np.ndarray, bits: int, white: int, *, sample_format: int = 1) -> Path:
    """A TIFF of one strip; `white` is its photometric interpretation, 0 where zero is white."""
    height, width = values.shape
    if bits == 12:
        a, b = values.ravel()[::2].astype(int), values.ravel()[1::2].astype(int)
        data = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype("u1").tobytes()
    else:
        data = values.astype(f"<{'if'[sample_format == 3] if sample_format > 1 else 'u'}{bits // 8}").tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, white), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(data)), (339, sample_format)]
    content = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags))
    path.write_bytes(content + b"".join(struct.pack("<HHII", t, 4, 1, v) for t, v in tags) + struct.pack("<I", 0))
    return path


def test_what_a_tiff_says_of_its_values_is_applied(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 1, 8), (8, 1))
    levels = np.rint(ramp * 255)
    for bits, white in ((8, 1), (8, 0), (12, 1), (16, 1), (16, 0)):
        got = read(tiff(tmp_path / "a.tif", np.rint(ramp * (2**bits - 1)), bits, white), "grey")[0]
        assert np.abs(got - (levels if white else 255 - levels)).max() <= 1, (bits, white)
    for bits, sample_format, low, high in ((16, 2, -1000, 1000), (32, 2, 0, 100_000), (32, 3, -1, 1)):
        for white in (0, 1) if sample_format == 3 else (1,):
            path = tiff(tmp_path / "a.tif", low + ramp * (high - low), bits, white, sample_format=sample_format)
            with pytest.raises(BadImage, match="--value-range"):
                read(path, "grey")
            got = read_image(path, resolution=8, colour="grey", form=Form((low, high)))[0]
            assert np.abs(got - (levels if white else 255 - levels)).max() <= 1


def test_a_value_range_is_of_stored_values(tmp_path: Path) -> None:
    mask = np.eye(8, dtype=np.uint8)
    for image in (Image.fromarray(mask), Image.fromarray(mask == 1), Image.fromarray(np.stack([mask] * 3, -1))):
        save(image, tmp_path / "a.png")
        got = read_image(tmp_path / "a.png", resolution=8, colour="grey", form=Form((0, 1)))
        assert np.array_equal(got[0], 255 * mask)
    inverted = tiff(tmp_path / "a.tif", mask, 8, 0)
    assert np.array_equal(read_image(inverted, resolution=8, colour="grey", form=Form((0, 1)))[0], 255 - 255 * mask)
    twelve = save(Image.fromarray(np.full((8, 8), 4095, dtype=np.uint16)), tmp_path / "b.png")
    assert read_image(twelve, resolution=8, colour="grey", form=Form((0, 4095))).min() == 255


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (400, 1)])
def test_rectangles_are_cut_or_padded(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (200, 200, 200))
    assert read_image(image, resolution=8, colour="rgb").min() == 200
    padded = read_image(image, resolution=8, colour="rgb", form=Form(fit="pad"))
    filled = max(1, round(8 * min(size) / max(size)))
    assert (padded == 200).sum() == 3 * 8 * filled
    assert (padded == 0).sum() == 3 * 8 * (8 - filled)
    if min(size) > 8:
        assert np.array_equal(read_image(np.asarray(image), resolution=8, colour="rgb", form=Form(fit="pad")), padded)


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 1)
    path = save(image, tmp_path / "a.png", transparency=1)
    pixels = read(path)
    assert not read_header(path).is_grey
    assert pixels[:, 1, 1].tolist() == [255, 0, 0]
    assert pixels[:, 0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (8, 8), (0,) * (len(mode) - 1) + (0,))
    image.putpixel((3, 3), (0,) * (len(mode) - 1) + (255,))
    image.putpixel((4, 4), (0,) * (len(mode) - 1) + (128,))
    pixels = read(save(image, tmp_path / "a.png"), "grey")[0]
    assert (pixels[0, 0], pixels[3, 3]) == (255, 0)
    assert 126 <= pixels[4, 4] <= 128


def test_hidden_colour_does_not_bleed_into_a_resized_image(tmp_path: Path) -> None:
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    assert read(save(image, tmp_path / "a.png")).min() == 255


def test_cmyk(tmp_path: Path) -> None:
    path = save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "a.jpg", quality=100)
    red, green, blue = read(path)[:, 4, 4].tolist()
    assert red > 240
    assert max(green, blue) < 20


def test_one_bit(tmp_path: Path) -> None:
    path = save(Image.new("1", (8, 8), 1), tmp_path / "a.png")
    assert read_header(path).is_grey
    assert read(path, "grey").min() == 255


def test_exif_rotation(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[:4] = 255  # bright top half
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: has to be turned 90° clockwise to be upright
    path = save(Image.fromarray(pixels), tmp_path / "a.png", exif=exif)
    assert np.array_equal(read(path, "grey")[0], np.rot90(pixels, -1))


def test_resize_is_centred_and_antialiased(tmp_path: Path) -> None:
    pixels = np.zeros((64, 128), dtype=np.uint8)
    pixels[:, 32:96] = np.indices((64, 64)).sum(axis=0) % 2 * 255  # a checkerboard in the middle, black beside it
    result = read(save(Image.fromarray(pixels), tmp_path / "a.png"), "grey")[0]
    assert result.shape == (8, 8)
    assert 110 < result.min() <= result.max() < 145


def test_large_jpeg_is_resized_like_png(tmp_path: Path) -> None:
    x = np.mgrid[0:600, 0:400][1]
    image = Image.fromarray((x * 255 // 400).astype(np.uint8))
    jpeg = read(save(image, tmp_path / "a.jpg", quality=95), "grey", 16)
    png = read(save(image, tmp_path / "a.png"), "grey", 16)
    assert np.abs(jpeg.astype(int) - png).max() <= 4


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_animations_are_bad(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = save(frames[0], tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(BadImage, match="2 frames"):
        read_header(path)


def test_multi_picture_jpeg_is_a_photo(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    frames[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=frames[1:])
    assert read(tmp_path / "a.jpg").min() > 250


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
def test_truncated(tmp_path: Path, suffix: str, rng: np.random.Generator) -> None:
    path = save(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)), tmp_path / f"a.{suffix}")
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(BadImage):
            read(path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bomb(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (10_000, 30_000):  # Pillow warns of the first, and refuses the second
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        (tmp_path / "a.png").write_bytes(
            b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        )
        with pytest.raises(BadImage, match="bomb"):
            read(tmp_path / "a.png")


def test_unwanted_decoders_are_out_of_reach(tmp_path: Path) -> None:
    save(Image.new("L", (8, 8)), tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(BadImage, match="not an image"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize("value", [7, 257, 32.5, "many", True, -1])
def test_resolution_out_of_range(value: Any) -> None:
    with pytest.raises(ConfigError, match="resolution is"):
        load_images("digits", resolution=value)


def test_resolution() -> None:
    assert load_images("digits", resolution=np.int64(28)).resolution == 28  # type: ignore[arg-type]
    for sizes, side in (
        ({(28, 28)}, 28),
        *((s, 32) for s in ({(65, 65)}, {(28, 27)}, {(28, 28), (32, 32)}, {(4, 4)}, set())),
    ):
        assert Options().shape(1, {ImageHeader(*size, True) for size in sizes})[2:] == (side, side)


def test_headers_of_any_number_of_sizes_take_no_memory() -> None:
    images = [np.zeros((8 + i, 8, 3), dtype=np.uint8) for i in range(40)] + [np.zeros((8, 8), dtype=np.uint8)]
    job = Job(len(images), lambda: iter(images))
    assert len(job.headers()) <= 3
    found = read_headers(Source("s", [job] * 3, None, (), str), Options())
    assert len(found) <= 3
    assert Options().shape(1, found) == (1, 3, 32, 32)
