"""DICOM: pydicom's own test files, files made here, and files that lie.  All are read by the one decoder."""

from __future__ import annotations

import io
import struct
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpsyngen.data.cache import quiet_decoders
from dpsyngen.data.decode import BadImage, Form, read_header, read_image
from dpsyngen.data.dicom import count_frames, pictures
from dpsyngen.errors import ConfigError
from dpsyngen.files import NotPlainError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")  # where readers are not asked, but the decoder
pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed: pip install 'dpsyngen[dicom]'")

FILES = Path(pydicom.__file__).parent / "data" / "test_files"
PLANTED = "Grzegorz^Brzeczyszczykiewicz"
"""A name that must be nowhere but in the file."""


def content_of(name: str) -> bytes:
    return (FILES / name).read_bytes()


def picture(content: bytes, window: tuple[float, float] | None = None) -> np.ndarray:
    """At its own size and in its own colour."""
    from dpsyngen.data.dicom import DicomFile

    pixels = DicomFile(io.BytesIO(content)).picture(window)
    return np.asarray(pixels)


def made(pixels: np.ndarray, syntax: str = "1.2.840.10008.1.2.1", **elements: Any) -> bytes:
    """A DICOM file of these stored values, ``[H, W]``, ``[N, H, W]`` or ``[H, W, 3]``."""
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    ds = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    colour = pixels.ndim == 3 and pixels.shape[2] == 3
    ds.PatientName, ds.PatientID = PLANTED, PLANTED
    ds.Rows, ds.Columns = pixels.shape[:2] if colour or pixels.ndim == 2 else pixels.shape[1:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        ds.PlanarConfiguration = 0
    if pixels.ndim == 3 and not colour:
        ds.NumberOfFrames = len(pixels)
    ds.BitsAllocated = ds.BitsStored = 8 * pixels.itemsize
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in elements.items():
        setattr(ds, name, value)
    ds.HighBit = elements.get("HighBit", ds.BitsStored - 1)
    if pixels.dtype.kind == "f":
        ds.FloatPixelData = pixels.astype("<f4").tobytes()
        del ds.BitsStored, ds.HighBit, ds.PixelRepresentation
    elif "PixelData" not in elements:
        ds.PixelData = pixels.tobytes()
        ds["PixelData"].VR = "OW"
    stream = io.BytesIO()
    ds.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def sequence(**elements: Any) -> Any:
    item = pydicom.Dataset()
    for name, value in elements.items():
        setattr(item, name, value)
    return pydicom.Sequence([item])


RAMP = np.arange(-2048, 2048, dtype=np.int16).reshape(64, 64)


def of_window(values: np.ndarray, centre: float, width: float) -> np.ndarray:
    """PS3.3 C.11.2.1.2.1, word for word."""
    y = ((values - (centre - 0.5)) / (width - 1) + 0.5) * 255
    y = np.where(values <= centre - 0.5 - (width - 1) / 2, 0, y)
    return np.rint(np.where(values > centre - 0.5 + (width - 1) / 2, 255, y))


# ------------------------------------------------------------------------------------------------ pydicom's own files

GREY = [
    *("693_J2KI.dcm", "CT_small.dcm", "J2K_pixelrep_mismatch.dcm", "JPEG2000.dcm", "JPEGLSNearLossless_08.dcm"),
    *("JPEGLSNearLossless_16.dcm", "MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_expb.dcm"),
    *("MR_small_implicit.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_padded.dcm"),
    *("examples_overlay.dcm", "image_dfl.dcm", "liver_1frame.dcm", "dicomdirtests/77654033/CR1/6154"),
]
COLOUR = [
    *("ExplVR_BigEnd.dcm", "SC_jpeg_no_color_transform.dcm", "SC_jpeg_no_color_transform_2.dcm", "examples_jpeg2k.dcm"),
    *("SC_rgb_dcmtk_+eb+cr.dcm", "SC_rgb_dcmtk_+eb+cy+np.dcm", "SC_rgb_dcmtk_+eb+cy+s4.dcm", "SC_rgb_gdcm_KY.dcm"),
    *(
        "SC_rgb_jls_lossy_line.dcm",
        "SC_rgb_jls_lossy_sample.dcm",
        "SC_rgb_jpeg_app14_dcmd.dcm",
        "SC_rgb_jpeg_dcmtk.dcm",
    ),
    *("SC_rgb_jpeg_lossy_gdcm.dcm", "SC_rgb_rle.dcm", "SC_rgb_rle_16bit.dcm", "SC_rgb_rle_32bit.dcm"),
    *("SC_rgb_small_odd.dcm", "SC_rgb_small_odd_big_endian.dcm", "SC_ybr_full_422_uncompressed.dcm"),
    *("examples_rgb_color.dcm", "examples_ybr_color.dcm", "SC_rgb_rle_16bit_2frame.dcm"),
]


@pytest.mark.parametrize("name", GREY)
def test_grey_levels_are_what_pydicom_shows(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = pydicom.dcmread(FILES / name)
        stored = pydicom.pixels.pixel_array(ds)
    values = pydicom.pixels.apply_modality_lut(stored, ds).astype(float)
    bits, signed = int(ds.BitsStored), int(ds.PixelRepresentation)
    ends = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1], dtype=float)
    low, high = pydicom.pixels.apply_modality_lut(ends, ds)
    if "WindowWidth" in ds:
        centre, width = (np.atleast_1d(np.array(v, dtype=float))[0] for v in (ds.WindowCenter, ds.WindowWidth))
        expected = of_window(values, centre, width)
    else:
        expected = np.rint((values - low) / (high - low) * 255)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        expected = 255 - expected
    assert np.abs(picture(content_of(name)) - expected).max() <= 1


@pytest.mark.parametrize("name", COLOUR)
def test_colours_are_what_pydicom_shows(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = pydicom.dcmread(FILES / name)
        expected = pydicom.pixels.pixel_array(ds, index=0) / (2 ** int(ds.BitsStored) - 1) * 255
    assert np.abs(picture(content_of(name)) - expected).max() <= 1


def test_a_palette_becomes_rgb() -> None:
    ds = pydicom.dcmread(FILES / "examples_palette.dcm")
    expected = pydicom.pixels.apply_color_lut(ds.pixel_array, ds) // 256
    assert np.array_equal(picture(content_of("examples_palette.dcm")), expected)
    assert not read_header(FILES / "examples_palette.dcm").is_grey


def test_the_one_decoder_takes_files_and_contents(tmp_path: Path) -> None:
    (tmp_path / "IM0001").write_bytes(content_of("MR_small.dcm"))  # no suffix, as hospitals export
    for item in (FILES / "MR_small.dcm", tmp_path / "IM0001", content_of("MR_small.dcm")):
        assert read_header(item) == (64, 64, True)
        got = read_image(item, resolution=64, colour="grey")
        assert np.array_equal(got[0], picture(content_of("MR_small.dcm")))
        assert read_image(item, resolution=8, colour="rgb").shape == (3, 8, 8)


# ------------------------------------------------------------------------------------------------------- grey levels


def test_full_scale_is_that_of_the_stored_bits() -> None:
    twelve = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    assert np.array_equal(picture(made(twelve, BitsStored=12)), np.rint(twelve / 4095 * 255))
    assert np.array_equal(picture(made(RAMP, BitsStored=12)), np.rint((RAMP + 2048.0) / 4095 * 255))
    # Old scanners kept overlays in the bits that are not stored.
    junk = (RAMP.view(np.uint16) & 0x0FFF) | 0x5000
    assert np.array_equal(picture(made(junk.view(np.int16), BitsStored=12)), picture(made(RAMP, BitsStored=12)))


def test_rescale_window_and_monochrome1() -> None:
    scale: dict[str, Any] = {"BitsStored": 12, "RescaleSlope": 0.5, "RescaleIntercept": -100}
    expected = of_window(RAMP * 0.5 - 100, 40, 400)
    for syntax in ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"):
        got = picture(made(RAMP, syntax, WindowCenter=[40, 500], WindowWidth=[400, 2000], **scale))
        assert np.abs(got - expected).max() <= 1
        light = picture(
            made(RAMP, syntax, WindowCenter=40, WindowWidth=400, PhotometricInterpretation="MONOCHROME1", **scale)
        )
        assert np.array_equal(light, 255 - got)
    # The user's window replaces the file's, and its ends are where a user expects them.
    asked = picture(made(RAMP, WindowCenter=0, WindowWidth=9, **scale), (40, 400))
    assert np.abs(asked - ((RAMP * 0.5 - 100 - 40) / 400 + 0.5).clip(0, 1) * 255).max() <= 0.51


def test_other_functions_of_the_window() -> None:
    exact = picture(made(RAMP, WindowCenter=10, WindowWidth=100, VOILUTFunction="LINEAR_EXACT"))
    assert np.abs(exact - ((RAMP - 10) / 100 + 0.5).clip(0, 1) * 255).max() <= 0.51
    sigmoid = picture(made(RAMP, WindowCenter=10, WindowWidth=100, VOILUTFunction="SIGMOID"))
    assert np.abs(sigmoid - 255 / (1 + np.exp(-4 * (RAMP - 10.0) / 100))).max() <= 0.51
    with pytest.raises(BadImage, match="--window"):
        picture(made(RAMP, WindowCenter=10, WindowWidth=0))


def test_tables_of_the_modality_and_of_the_display() -> None:
    values = np.arange(64, dtype=np.uint16).reshape(8, 8)
    table = np.linspace(4095, 0, 64).astype(np.uint16)
    lut = sequence(LUTDescriptor=[64, 0, 12], LUTData=table.tobytes())
    expected = np.rint(table[values] / 4095 * 255)
    deep = sequence(LUTDescriptor=[64, 0, 16], LUTData=(table * 16).astype(np.uint16).tobytes())
    assert np.abs(picture(made(values, ModalityLUTSequence=deep)) - expected).max() <= 1
    assert np.array_equal(picture(made(values, VOILUTSequence=lut, WindowCenter=1, WindowWidth=2)), expected)


def test_enhanced_files_have_the_values_of_each_frame() -> None:
    def groups(intercept: float) -> Any:
        return sequence(
            PixelValueTransformationSequence=sequence(RescaleSlope=1, RescaleIntercept=intercept),
            FrameVOILUTSequence=sequence(WindowCenter=0, WindowWidth=101),
        )

    frames = np.stack([RAMP, RAMP])
    content = made(frames, PerFrameFunctionalGroupsSequence=pydicom.Sequence([groups(0)[0], groups(-30)[0]]))
    from dpsyngen.data.dicom import DicomFile

    file = DicomFile(io.BytesIO(content))
    for i, intercept in enumerate((0, -30)):
        file.frame = i
        assert np.abs(np.asarray(file.picture()) - of_window(RAMP + intercept, 0, 101)).max() <= 1
    shared = picture(made(RAMP, SharedFunctionalGroupsSequence=groups(-30)))
    assert np.abs(shared - of_window(RAMP - 30, 0, 101)).max() <= 1


def test_floating_point_needs_a_window() -> None:
    values = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
    with pytest.raises(BadImage, match="--window"):
        picture(made(values))
    assert np.array_equal(picture(made(values), (0, 2)), np.rint((values.astype(float) + 1) / 2 * 255))
    with pytest.raises(BadImage, match="NaN"):
        picture(made(np.full((8, 8), np.nan, dtype=np.float32)), (0, 2))


def test_settings_that_are_of_other_files(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="--window CENTRE,WIDTH"):
        read_image(FILES / "MR_small.dcm", resolution=8, colour="grey", form=Form(value_range=(0, 4095)))
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(BadImage, match="--value-range"):
        read_image(tmp_path / "a.png", resolution=8, colour="grey", form=Form(window=(0, 100)))


def test_several_frames_are_refused_until_one_says_which() -> None:
    content = made(np.stack([RAMP, RAMP[::-1]]))
    size: Any = {"resolution": 64, "colour": "grey"}
    with pytest.raises(BadImage, match="2 frames: say --frames first, or all"):
        read_image(content, **size)
    assert np.array_equal(read_image(content, **size, form=Form(frames="first"))[0], picture(made(RAMP)))
    with pytest.raises(BadImage, match="folder of files only"):
        read_image(content, **size, form=Form(frames="all"))


# ------------------------------------------------------------------------------------------------- broken and hostile


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("MR_truncated.dcm", "broken or truncated pixel data"),
        ("badVR.dcm", "broken or truncated DICOM header"),
        ("rtplan.dcm", "without an image"),
        ("test-SR.dcm", "without an image"),
        ("waveform_ecg.dcm", "without an image"),
        ("dicomdirtests/DICOMDIR", "without an image"),
        ("SC_rgb_jpeg_gdcm.dcm", "pylibjpeg-libjpeg.*GPL-3"),
        ("JPEG-lossy.dcm", "pylibjpeg-libjpeg.*GPL-3"),
        ("no_meta.dcm", "DICM after 128 bytes"),
    ],
)
def test_files_that_cannot_be_read_are_told_of_in_words(name: str, why: str) -> None:
    with pytest.raises(BadImage, match=why):
        read_image(FILES / name, resolution=8, colour="grey")


@pytest.mark.parametrize("name", ["MR_small.dcm", "MR_small_RLE.dcm", "SC_rgb_jpeg_dcmtk.dcm", "examples_jpeg2k.dcm"])
def test_files_cut_short_anywhere(name: str) -> None:
    content = content_of(name)
    for end in (*range(132, 1200, 97), *range(1200, len(content) - 200, max(1, len(content) // 15))):
        with pytest.raises(BadImage) as told:
            read_image(content[:end], resolution=8, colour="grey")
        assert "CompressedSamples" not in str(told.value)


@pytest.mark.parametrize("cut", [0.95, 0.5])
@pytest.mark.parametrize(
    "name", ["693_J2KI.dcm", "SC_rgb_jpeg_dcmtk.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_RLE.dcm"]
)
def test_compressed_pictures_cut_short(name: str, cut: float) -> None:
    ds = pydicom.dcmread(FILES / name)
    code = pydicom.encaps.get_frame(ds.PixelData, 0, number_of_frames=1)
    ds.PixelData = pydicom.encaps.encapsulate([code[: int(cut * len(code))]])
    ds.save_as(stream := io.BytesIO())
    with pytest.raises(BadImage, match="broken or truncated"):
        picture(stream.getvalue())


def test_no_message_quotes_the_header() -> None:
    """Whatever stands where: pydicom's own messages would quote it."""
    for name in ("Rows", "PhotometricInterpretation", "NumberOfFrames", "WindowWidth", "TransferSyntaxUID"):
        content = made(RAMP, WindowCenter=40, WindowWidth=400, NumberOfFrames=1)
        tag = struct.pack("<HH", *divmod(pydicom.datadict.tag_for_keyword(name), 2**16))
        at = content.index(tag) + 8
        spoilt = content[: at - 2] + struct.pack("<H", len(PLANTED)) + PLANTED.encode() + content[at:]
        with quiet_decoders(), pytest.raises(BadImage) as told:
            picture(spoilt)
        assert PLANTED[:8] not in str(told.value), name
        assert told.value.__suppress_context__ or told.value.__context__ is None


def j2k_of(width: int, height: int) -> bytes:
    """A JPEG 2000 stream that says it is of this size."""
    Image.new("L", (64, 64)).save(stream := io.BytesIO(), "JPEG2000", no_jp2=True)
    code = bytearray(stream.getvalue())
    code[8:16] = struct.pack(">II", width, height)
    return bytes(code)


def jpeg_of(width: int, height: int) -> bytes:
    Image.new("L", (64, 64)).save(stream := io.BytesIO(), "JPEG")
    code = bytearray(stream.getvalue())
    at = code.index(b"\xff\xc0") + 5
    code[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(code)


@pytest.mark.parametrize(
    ("syntax", "code"),
    [
        ("1.2.840.10008.1.2.4.90", j2k_of(9_000, 9_000)),
        ("1.2.840.10008.1.2.4.50", jpeg_of(60_000, 60_000)),
        ("1.2.840.10008.1.2.4.80", jpeg_of(60_000, 60_000)),
        ("1.2.840.10008.1.2.5", struct.pack("<16L", 200, 64, *[0] * 14)),
    ],
)
def test_pictures_of_another_size_than_the_header_says(syntax: str, code: bytes) -> None:
    content = made(np.zeros((64, 64), np.uint8), syntax, PixelData=pydicom.encaps.encapsulate([code]))
    with pytest.raises(BadImage, match=r"another size|another number"):
        picture(content)


def test_small_files_that_would_decode_to_much(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadImage, match="bomb"):
        picture(made(RAMP, Rows=60_000, Columns=60_000))
    with pytest.raises(BadImage, match="bomb"):
        read_header(made(RAMP, Rows=60_000, Columns=60_000))
    # 64 MiB of runs, of which Pillow unpacks as many bytes as there must be.
    runs = bytes([129, 7]) * 2**19
    code = struct.pack("<16L", 1, 64, *[0] * 14) + runs
    content = made(np.zeros((64, 64), np.uint8), "1.2.840.10008.1.2.5", PixelData=pydicom.encaps.encapsulate([code]))
    assert picture(content).tolist() == [[7] * 64] * 64
    monkeypatch.setattr("dpsyngen.data.dicom.MAX_FILE_BYTES", 2**20)
    deflated = made(RAMP, "1.2.840.10008.1.2.1.99")
    start = deflated.index(b"1.2.840.10008.1.2.1.99") + 22
    squeezing = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    with pytest.raises(BadImage, match="bomb"):
        picture(deflated[:start] + squeezing.compress(bytes(2**21)) + squeezing.flush())


@pytest.mark.parametrize(("limit", "size"), [("MAX_PIXELS", RAMP.size), ("MAX_FRAME_BYTES", RAMP.nbytes)])
def test_size_of_a_frame(monkeypatch: pytest.MonkeyPatch, limit: str, size: int) -> None:
    monkeypatch.setattr(f"dpsyngen.data.dicom.{limit}", size)
    assert picture(made(RAMP)).shape == RAMP.shape
    monkeypatch.setattr(f"dpsyngen.data.dicom.{limit}", size - 1)
    with pytest.raises(BadImage, match=rf"\b{size - 1:,} (pixels|bytes).*bomb"):
        picture(made(RAMP))


def test_size_of_a_file_of_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.dcm").write_bytes(content := made(RAMP))
    assert count_frames(str(tmp_path / "a.dcm")) == 1
    monkeypatch.setattr("dpsyngen.data.dicom.MAX_FILE_BYTES", len(content) - 1)
    with pytest.raises(NotPlainError, match="over the limit"):
        count_frames(str(tmp_path / "a.dcm"))
    (found,) = pictures(str(tmp_path / "a.dcm"), [0])
    assert "over the limit" in str(found)


def test_unusual_arrangements_are_refused() -> None:
    for elements, why in (
        ({"BitsStored": 12, "HighBit": 15}, "arrangement of bits"),
        ({"PhotometricInterpretation": "YBR_PARTIAL_420"}, "photometric interpretation"),
        ({"PhotometricInterpretation": "HSV"}, "photometric interpretation"),
        ({"NumberOfFrames": -1}, "arrangement"),
    ):
        with pytest.raises(BadImage, match=why):
            picture(made(RAMP, **elements))


def test_without_pydicom_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ConfigError, match=r"pip install 'dpsyngen\[dicom\]'"):
        read_image(FILES / "MR_small.dcm", resolution=8, colour="grey")
