"""Image files that lie, explode, change or vanish."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpsyngen import files
from dpsyngen.data import arrays, decode, dicom, folder, labels, load_images, tables, webdataset
from dpsyngen.data.decode import BadImage, read_header, read_image
from dpsyngen.errors import DataError, ReleaseError
from dpsyngen.generator import files as released
from dpsyngen.generator import guarantee
from dpsyngen.release import bundle
from tests.fuzz import seeds
from tests.fuzz.mutations import png_chunks, png_file


def read(path: Path, resolution: int = 8) -> np.ndarray:
    return read_image(path, resolution=resolution, colour="rgb")


def blank_png(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    squeezed = zlib.compressobj(9)
    line = bytes(1 + width * depth * channels // 8)
    data = b"".join(squeezed.compress(line) for _ in range(height)) + squeezed.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return png_file([(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")])


def test_pixel_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(blank_png(40, 25))
    monkeypatch.setattr(decode, "MAX_PIXELS", 1000)
    assert read(tmp_path / "a.png").shape == (3, 8, 8)
    monkeypatch.setattr(decode, "MAX_PIXELS", 999)
    with pytest.raises(BadImage, match="bomb"):
        read(tmp_path / "a.png")
    with pytest.raises(BadImage, match="bomb"):
        read_header(tmp_path / "a.png")


def test_file_size_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = blank_png(8, 8)
    (tmp_path / "a.png").write_bytes(content)
    monkeypatch.setattr(decode, "MAX_FILE_BYTES", len(content) - 1)
    with pytest.raises(BadImage, match="over the limit"):
        read(tmp_path / "a.png")


LIMITS = {
    "one image": (decode.MAX_PIXELS, decode.MAX_FILE_BYTES, decode._MAX_SIDE),
    "a DICOM frame": (dicom.MAX_FRAME_BYTES,),
    "what a source may take": (),
    "header of an array": (arrays.MAX_HEADER_BYTES,),
    "long name or pax header in a tar; a label file in it": (webdataset._MAX_HEADER_BYTES, webdataset._MAX_LABEL_BYTES),
    "texts and lists in the footer of a Parquet file": (tables._MAX_THRIFT_BYTES, tables._MAX_THRIFT_ITEMS),
    "shards of a source": (folder._MOST_FILES,),
    "table of labels or persons; `class_names.json`": (labels._MAX_BYTES, arrays._MAX_NAMES_BYTES),
    "frames of a DICOM file": (folder._MOST_FRAMES,),
    "classes, and the name of one": (labels.MAX_CLASSES, labels.MAX_NAME_BYTES),
    "settings": (files.MAX_BYTES, files.MAX_DEPTH, files.MAX_VALUES, files.MAX_DIGITS),
    "generator.json; header of a weights file; certificate": (
        *(released.MAX_JSON_BYTES, released.MAX_HEADER_BYTES),
        guarantee._MAX_BYTES,
    ),
    "a released generator": (released.MAX_RESOLUTION, released.MAX_STAGES, released.MAX_RANK),
    "a bundle": (bundle.MOST_MEMBERS, bundle.MOST_BYTES, bundle.LONGEST_NAME, bundle.SMALL),
}


def test_limits_are_what_the_documentation_says() -> None:
    page = (Path(__file__).parents[2] / "docs" / "hostile-input.md").read_text(encoding="utf-8")
    stated = {}
    for line in page.split("\n## Limits\n")[1].split("\n## ")[0].strip().splitlines()[2:]:
        name, said = line.strip("| ").split(" | ")
        numbers = re.findall(r"(?<!-)\b(\d[\d,]*)(?: ([KMG])iB)?", said)  # not the 8 of UTF-8
        stated[name] = tuple(int(n.replace(",", "")) << " KMG".index(unit or " ") * 10 for n, unit in numbers)
    assert stated == LIMITS
    assert decode.BUDGET.total == dicom.MAX_PIXELS == decode.MAX_PIXELS
    assert dicom.MAX_FILE_BYTES == webdataset.MAX_FILE_BYTES == tables.MAX_FILE_BYTES == decode.MAX_FILE_BYTES


def test_tables_and_certificates_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (labels, guarantee):
        monkeypatch.setattr(module, "_MAX_BYTES", 20)
    (tmp_path / "labels.csv").write_text("file_name,label\na.png,1\n")
    with pytest.raises(DataError, match="over the limit of 20"):
        labels.read_label_table(tmp_path / "labels.csv", None, needed=True)
    (tmp_path / "privacy.json").write_text("{" + " " * 20)
    with pytest.raises(ReleaseError, match="over the limit of 20"):
        guarantee.Guarantee.read(tmp_path)


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_compressed_chunks_that_explode(tmp_path: Path, kind: bytes) -> None:
    """Sixteen megabytes in some kilobytes of text or colour profile: either not inflated, or refused."""
    chunks = png_chunks(seeds.images()["png"][3])
    bomb = b"k\0\0" + zlib.compress(bytes(2**24), 9)
    chunks.insert(1, (kind, bomb))
    (tmp_path / "a.png").write_bytes(png_file(chunks))
    tracemalloc.start()
    try:
        shape, refused = read(tmp_path / "a.png").shape, ""
    except BadImage as error:
        shape, refused = None, str(error).lower()
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert shape == (3, 8, 8) or "too large" in refused
    assert most < 2**22


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (3, 7)])
def test_extreme_shapes_are_read(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (10, 20, 30)).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png")[:, 4, 4].tolist() == [10, 20, 30]


def test_no_pixels(tmp_path: Path) -> None:
    for name, content in (
        ("a.png", blank_png(0, 8)),
        ("a.gif", seeds.images()["gif"][1][:6] + bytes(4) + seeds.images()["gif"][1][10:]),
        ("a.bmp", seeds.images()["bmp"][0][:18] + bytes(8) + seeds.images()["bmp"][0][26:]),
    ):
        (tmp_path / name).write_bytes(content)
        try:
            read(tmp_path / name)
        except BadImage:
            continue
        assert name == "a.gif"  # whose frame says its own size


def test_wrong_check_sum(tmp_path: Path) -> None:
    content = bytearray(seeds.images()["png"][0])
    content[20] ^= 1  # in the header chunk
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(BadImage):
        read(tmp_path / "a.png")


def test_interlaced_png(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(seeds.interlaced_png())
    assert np.array_equal(read(tmp_path / "a.png")[0], np.arange(64).reshape(8, 8))


@pytest.mark.parametrize("kind", sorted(seeds.images()))
def test_suffix_that_lies(tmp_path: Path, kind: str) -> None:
    """The content decides, among the formats that are read at all."""
    for suffix in seeds.images():
        (tmp_path / f"a.{suffix}").write_bytes(seeds.images()[kind][0])
        assert read(tmp_path / f"a.{suffix}").shape == (3, 8, 8)


def test_exif_that_cannot_be_written_again_does_not_matter(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[:4] = 255
    # Orientation 6, and an entry whose type does not exist.
    entries = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack(">HHII", 0x9999, 77, 5, 0)
    exif = b"MM\0*" + struct.pack(">IH", 8, 2) + entries + bytes(4)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)), (b"eXIf", exif)]
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + line.tobytes() for line in pixels))), (b"IEND", b"")]
    (tmp_path / "a.png").write_bytes(png_file(chunks))
    assert np.array_equal(read(tmp_path / "a.png")[0], np.rot90(pixels, -1))


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_as_pillow_turns_it(tmp_path: Path, rng: np.random.Generator, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        expected = np.asarray(ImageOps.exif_transpose(image)).transpose(2, 0, 1)
    assert np.array_equal(read(tmp_path / "a.png"), expected)


def test_links_and_pipes_are_not_opened(tmp_path: Path) -> None:
    """Also when they take a file's place after the folder was listed."""
    (tmp_path / "real.png").write_bytes(blank_png(8, 8))
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadImage, match="symbolic link"):
        read(tmp_path / "link.png")
    with pytest.raises(BadImage, match="not a plain file"):
        read(tmp_path / "pipe.png")


def test_files_that_vanish_or_shrink_while_the_folder_is_read(
    class_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpsyngen.data import source as module

    def late(name: str, **options: object) -> np.ndarray:
        path = Path(name)
        if path.name == "0.png":
            path.unlink(missing_ok=True)
        if path.name == "1.png":
            path.write_bytes(path.read_bytes()[:50])
        return read_image(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "read_image", late)
    with pytest.raises(DataError, match="4 items") as caught:
        load_images(class_folder)
    assert "No such file" in str(caught.value)
    assert len(load_images(class_folder, skip_bad=True)) == 2


def test_unreadable_files_and_folders(class_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the refusal is simulated."""
    real_open, real_scandir = os.open, os.scandir

    def refuse(path: object, *rest: object, **options: object) -> int:
        if str(path).endswith("cats/0.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DataError, match="Permission denied") as caught:
        load_images(class_folder)
    assert "1 item" in str(caught.value)

    def refuse_folder(path: object) -> object:
        if str(path).endswith("dogs"):
            raise PermissionError(13, "Permission denied", str(path))
        return real_scandir(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", refuse_folder)
    with pytest.raises(DataError, match="dogs: cannot be listed"):
        load_images(class_folder)


def test_16_bit_with_a_transparent_value(tmp_path: Path) -> None:
    values = np.array([[0, 300, 65535, 1000] * 2] * 8, dtype=np.uint16)
    header = struct.pack(">IIBBBBB", 8, 8, 16, 0, 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    chunks = [(b"IHDR", header), (b"tRNS", struct.pack(">H", 300)), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    (tmp_path / "a.png").write_bytes(png_file(chunks))
    assert read(tmp_path / "a.png")[0, 0, :4].tolist() == [0, 255, 255, 4]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_in_strips_is_transparency_at_once(tmp_path: Path, rng: np.random.Generator, mode: str) -> None:
    """Large images are laid on white strip by strip."""
    image = Image.fromarray(rng.integers(0, 256, (1500, 1000, 4), dtype=np.uint8))  # two strips, of which one is short
    if mode == "LA":
        image = image.convert("LA")
    if mode == "P":
        image = image.convert("RGB").quantize(16)
        image.info["transparency"] = 3
    layer = image.convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", layer.size, (255,) * 4), layer).convert("RGB")
    assert np.array_equal(np.asarray(decode._on_white(image)), np.asarray(expected))


def test_decoders_say_nothing(class_folder: Path) -> None:
    """Pillow logs errors, and libtiff prints them by itself; in a process where nobody collects logs."""
    tiff = bytearray(seeds.images()["tif"][4])
    at = tiff.find(b"\x78\x9c")  # the deflated pixels
    tiff[at + 4 : at + 30] = b"\xff" * 26
    (class_folder / "cats" / "broken.tif").write_bytes(tiff)
    samples = bytearray(seeds.images()["tif"][0])
    at = samples.find(struct.pack("<HHI", 277, 3, 1))
    samples[at + 8] = 200  # samples per pixel
    (class_folder / "cats" / "many.tif").write_bytes(samples)
    code = "import sys; from dpsyngen.data import load_images; print(load_images(sys.argv[1], skip_bad=True).skipped)"
    done = subprocess.run([sys.executable, "-c", code, str(class_folder)], capture_output=True, text=True)
    assert done.stdout.count("broken.tif") == done.stdout.count("many.tif") == 1
    assert done.stderr == ""
