"""DICOM, the files of hospitals: each picture in one as an 8-bit image.  Needs the extra ``dicom`` (pydicom, pyjpegls).

* **Grey levels** follow the header, frame by frame: stored bits and sign, modality LUT (rescale slope and intercept),
  then VOI LUT or the first window (PS3.3 C.11.2), or the window that was asked for; MONOCHROME1 is inverted.  Where no
  window is given, black and white are the ends of what the stored bits can hold, never of what is in an image.
* **Colour**: palettes and YBR become RGB.
* **Frames** of one file show one person, so which are meant must be said.
* **Nothing else of the header is read**: pydicom skips all elements but those named here, and its messages, which may
  quote a header, are never shown.
* **Compression**: RLE (here), JPEG and JPEG 2000 (Pillow), JPEG-LS (pyjpegls).  JPEG Lossless and 12-bit JPEG need a
  plug-in that a user adds.  The size that is coded in a picture must be the header's before it is decoded, since a
  small file could decode to terabytes.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import BadImage, require_package
from dpsyngen.files import NotPlainError, open_plain

if TYPE_CHECKING:
    from PIL import Image

Range = tuple[float, float]
_ToLevels = Callable[[NDArray[Any]], NDArray[np.uint8]]
MAX_PIXELS, MAX_FILE_BYTES = 2**26, 2**28
"""Of an image of any kind, and of its file, a DICOM file also when it is inflated."""
MAX_FRAME_BYTES = 2**27
"""Of one picture, decoded: 2²⁶ pixels of 16 bits."""
_STRIP = 2**20  # values that are converted together, as the numbers between take 8 bytes each
_GREY_OR_PALETTE = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_DATA = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_PALETTE = [
    f"{kind}{colour}PaletteColorLookupTable{part}"
    for colour in ("Red", "Green", "Blue")
    for kind, part in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
]
_ELEMENTS = (
    *("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "ExtendedOffsetTable"),
    *("ExtendedOffsetTableLengths", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "WindowCenter"),
    *("WindowWidth", "VOILUTFunction", "VOILUTSequence", "SharedFunctionalGroupsSequence"),
    *("PerFrameFunctionalGroupsSequence", *_PALETTE),
)
_DEFLATED, _RLE = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5"
_JPEG = "1.2.840.10008.1.2.4."
_JPEG_12 = _JPEG + "51"
# Decoders that refuse broken files without ending the process, as gdcm does.  For other kinds it is the user's choice.
_TRUSTED = dict.fromkeys((_JPEG + "50", _JPEG + "90", _JPEG + "91"), "pillow")
_TRUSTED |= dict.fromkeys((_JPEG + "80", _JPEG + "81"), "pyjpegls")
_OTHERS = "pip install pylibjpeg pylibjpeg-libjpeg (its licence is the GPL-3), or write the file uncompressed"
_JPEG_2000 = tuple(_JPEG + end for end in ("90", "91", "201", "202", "203"))
_SIZE_MARKERS = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})  # start of frame, JPEG-LS's too


def is_dicom(file: BinaryIO) -> bool:
    """Whether a file, which is read from its beginning and set back to it, has the mark of DICOM."""
    file.seek(0)
    start = file.read(132)
    file.seek(0)
    return start[128:] == b"DICM"


def count_frames(path: str) -> int:
    """How many frames the header of a file says it has; 0 if it is no DICOM file; BadImage if it is broken."""
    with open_plain(path, MAX_FILE_BYTES) as file:
        return DicomFile(file).frames if is_dicom(file) else 0


def pictures(path: str, frames: Sequence[int]) -> Iterator[DicomFile | BadImage]:
    """These frames of a file, which is open as long as they are asked for: each time the same object."""
    try:
        with open_plain(path, MAX_FILE_BYTES) as file:
            whole = DicomFile(file)
            for whole.frame in frames:
                yield whole
    except (NotPlainError, BadImage) as error:
        yield from [BadImage(str(error))] * len(frames)


class DicomFile:
    """The pictures in a DICOM file, which stays open; as far as is asked, like a Pillow image that is not decoded yet.

    Attributes:
        width, height: pixels, checked against the limits.
        mode: "L", or "RGB" for colour.
        frames: how many pictures; what the header says.
        frame: which of them is meant, from 0; None: not said.
        cost: pixels of the budget (:class:`~dpsyngen.data.store.PixelBudget`) for decoding one.

    Raises:
        BadImage: no image, broken, too large, or of a form that is not read.
        ConfigError: pydicom is not installed.
    """

    def __init__(self, file: BinaryIO) -> None:
        require_package("pydicom", "reading DICOM", "dicom")
        self._file = file
        self.frame: int | None = None
        self._whole: Any = None
        with _saying("broken or truncated DICOM header"):
            h = _read(file, pixels=False)
            self.syntax = str(h.file_meta.get("TransferSyntaxUID", ""))
            if "Rows" not in h or "Columns" not in h:
                raise BadImage("a DICOM object without an image (a report, plan or directory, say)")
            self.width, self.height, self._samples = int(h.Columns), int(h.Rows), int(h.get("SamplesPerPixel") or 1)
            self.frames = int(h.get("NumberOfFrames") or 1)
            self._allocated, self._colour = int(h.BitsAllocated), str(h.get("PhotometricInterpretation", ""))
            self._signed, self._stored = int(h.get("PixelRepresentation") or 0) == 1, int(h.get("BitsStored") or 0)
            high = int(h.get("HighBit") or self._stored - 1)
        pixels = self.width * self.height
        size = pixels * self._samples * -(-self._allocated // 8)
        if pixels > MAX_PIXELS or size > MAX_FRAME_BYTES:
            limit = f"{MAX_PIXELS:,} pixels or {MAX_FRAME_BYTES:,} bytes (decompression bomb?)"
            raise BadImage(f"{self.width}×{self.height} pixels, {size:,} bytes: over the limit of {limit}")
        if not self.syntax:
            raise BadImage("it does not say how its pixels are stored (no transfer syntax); write it again")
        least = 0 if self._samples == 1 and self._allocated >= 32 else 1  # floating point has no bits stored
        is_sound = min(pixels, self.frames) > 0 and self._allocated in (1, 8, 16, 32, 64) and self._samples in (1, 3)
        if not is_sound or not least <= self._stored <= self._allocated or (self._stored and high != self._stored - 1):
            raise BadImage("its size or its arrangement of bits is none that is read; write it again")
        kinds = _GREY_OR_PALETTE if self._samples == 1 else _COLOURS
        if self._colour not in kinds:
            raise BadImage(f"its photometric interpretation is none of {', '.join(kinds)}; write it again")
        self.mode = "L" if self._colour.startswith("MONOCHROME") else "RGB"
        self.cost = max(pixels, size // 2)

    def picture(self, window: Range | None = None) -> Image.Image:
        """The picture of :attr:`frame` as a Pillow image, L or RGB.

        `window` is centre and width, for grey pictures, in values of the modality (Hounsfield units for CT): black is
        at centre - width/2, white at centre + width/2.  None: as the header says.  BadImage if it is broken, truncated,
        of a compression without a decoder, or without a window where one is needed.
        """
        from PIL import Image

        with _saying("broken or truncated pixel data"):
            if self._whole is None:
                self._whole = _read(self._file, pixels=True)
            raw, colour = self._decoded()
            grey = self.mode == "L"
            to_levels = self._grey_levels(window) if grey else self._rgb_levels(colour)
            out = np.empty(raw.shape[:2] if grey else (*raw.shape[:2], 3), dtype=np.uint8)
            rows = max(1, _STRIP // self.width)
            for start in range(0, self.height, rows):
                out[start : start + rows] = to_levels(raw[start : start + rows])
        return Image.fromarray(out)

    def _decoded(self) -> tuple[NDArray[Any], str]:
        """Stored values ``[H, W]`` or ``[H, W, 3]``, and what their colours are by now."""
        from pydicom.encaps import get_frame
        from pydicom.pixels import get_decoder
        from pydicom.uid import UID

        if not any(name in self._whole for name in _DATA):
            raise BadImage("a DICOM object without pixels")
        uid, plugin = UID(self.syntax), ""
        try:
            decoder = get_decoder(uid)
        except NotImplementedError:
            raise BadImage("compressed as a video, or by a method that is not read; write it uncompressed") from None
        if uid.is_encapsulated:
            offsets = [self._whole.get(name) for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")]
            tables: Any = None if None in offsets else tuple(offsets)
            code = get_frame(
                self._whole.PixelData, self.frame or 0, number_of_frames=self.frames, extended_offsets=tables
            )
            if self.syntax == _RLE:
                return self._from_rle(code), self._colour
            plugin = self._plugin(decoder.available_plugins)
            if not plugin:
                install = "pip install 'dpsyngen[dicom]'" if self.syntax in _TRUSTED else _OTHERS
                raise BadImage(f"compressed as {uid.name}, which needs a decoder: {install}")
            if _coded_size(code, self.syntax in _JPEG_2000) != (self.width, self.height):
                raise BadImage("its compressed picture has another size than its header says, or none")
        values, about = decoder.as_array(self._whole, index=self.frame or 0, raw=True, decoding_plugin=plugin)
        return values, str(about["photometric_interpretation"])

    def _plugin(self, available: Collection[str]) -> str:
        """Which of pydicom's decoders for the file's compression may see its bytes; "": none."""
        if self.syntax == _JPEG_12 and self._stored > 8:  # Pillow reads 8 bits of it only
            available = set(available) - {"pillow"}
        choice = _TRUSTED.get(self.syntax) or ("pylibjpeg" if "pylibjpeg" in available else next(iter(available), ""))
        return choice if choice in available else ""

    def _from_rle(self, code: bytes) -> NDArray[Any]:
        """PS3.5 Annex G: a segment for each byte of a pixel, the highest first, in PackBits.

        Pillow unpacks them into as many bytes as there must be; pydicom would unpack whatever is there.
        """
        from PIL import Image

        pixels, width = self.width * self.height, self._allocated // 8
        count, *starts = struct.unpack("<16L", code[:64])
        if count != self._samples * width:
            raise BadImage("broken pixel data (another number of RLE segments than its header says)")
        out = np.empty((pixels, self._samples, width), dtype=np.uint8)
        for i in range(count):
            segment = code[starts[i] : starts[i + 1] if i + 1 < count else None]
            unpacked = Image.frombytes("L", (pixels, 1), segment, "packbits", "L")
            out[:, i // width, width - 1 - i % width] = np.asarray(unpacked)[0]
        values = out.view(f"<{'i' if self._signed else 'u'}{width}")
        shift = self._allocated - self._stored  # bits beyond the stored ones may hold anything
        values = values << shift >> shift
        return values.reshape((self.height, self.width, self._samples)[: 2 if self._samples == 1 else 3])

    # ------------------------------------------------------------------------------------------------------- levels

    def _of_frame(self, group: str) -> Any:
        """What holds these elements: functional groups of the frame (enhanced files), those of all frames, or the
        file."""
        for name, i in (("PerFrameFunctionalGroupsSequence", self.frame or 0), ("SharedFunctionalGroupsSequence", 0)):
            groups = self._whole.get(name) or ()
            if i < len(groups) and groups[i].get(group):
                return groups[i].get(group)[0]
        return self._whole

    def _grey_levels(self, window: Range | None) -> _ToLevels:
        from pydicom.pixels import apply_modality_lut, apply_voi_lut

        modality = self._of_frame("PixelValueTransformationSequence")
        voi = self._of_frame("FrameVOILUTSequence")
        table = window is None and voi.get("VOILUTSequence")
        function = "LINEAR_EXACT"
        if window is None and not table and voi.get("WindowWidth") not in (None, ""):
            window = _first(voi.WindowCenter), _first(voi.WindowWidth)
            function = str(voi.get("VOILUTFunction") or "LINEAR")
        if table:
            low, high = 0.0, 2.0 ** (int(table[0].LUTDescriptor[2]) or 16) - 1
        elif window is not None:
            centre, width = window
            if not (width > 0 and np.isfinite(centre + width)):
                raise BadImage("its window has no width; say --window CENTRE,WIDTH (from Python: window)")
            if function not in ("LINEAR_EXACT", "SIGMOID") and width > 1:  # PS3.3 C.11.2.1.2.1
                centre, width = centre - 0.5, width - 1
            low, high = centre - width / 2, centre + width / 2
        elif "ModalityLUTSequence" in modality:
            low, high = 0.0, 2.0 ** (int(modality.ModalityLUTSequence[0].LUTDescriptor[2]) or 16) - 1
        elif _DATA[0] not in self._whole:
            raise BadImage("floating-point pixels without a window; say --window CENTRE,WIDTH (from Python: window)")
        else:
            least = -(2.0 ** (self._stored - 1)) if self._signed else 0.0
            ends = np.array([least, least + 2.0**self._stored - 1])
            low, high = sorted(map(float, apply_modality_lut(ends, modality)))
        inverted = self._colour == "MONOCHROME1"

        def levels(raw: NDArray[Any]) -> NDArray[np.uint8]:
            values = apply_modality_lut(raw, modality)
            if table:
                values = apply_voi_lut(np.rint(values).astype(np.int64), voi)
            values = values.astype(np.float64)
            if not np.isfinite(values).all():
                raise BadImage("NaN or infinite values")
            if function == "SIGMOID":
                y = 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
            else:
                y = ((values - low) / (high - low)).clip(0, 1)
            grey = np.rint(255 * y).astype(np.uint8)
            return 255 - grey if inverted else grey

        return levels

    def _rgb_levels(self, colour: str) -> _ToLevels:
        from pydicom.pixels import apply_color_lut, convert_color_space

        def levels(raw: NDArray[Any]) -> NDArray[np.uint8]:
            if self._colour == "PALETTE COLOR":
                rgb = apply_color_lut(raw, self._whole)
                return (rgb >> 8 if rgb.dtype.itemsize == 2 else rgb).astype(np.uint8)
            eight = raw if self._stored == 8 else np.rint(raw * (255 / (2**self._stored - 1))).astype(np.uint8)
            return convert_color_space(eight, colour, "RGB") if colour.startswith("YBR") else eight

        return levels


# ------------------------------------------------------------------------------------------------------------- reading


@contextmanager
def _saying(why: str) -> Iterator[None]:
    """Whatever fails inside is BadImage with these words: those of pydicom may quote the header."""
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except Exception:
        raise BadImage(why) from None


def _read(file: BinaryIO, *, pixels: bool) -> Any:
    """The elements that pictures need, as a data set of pydicom."""
    from pydicom import dcmread
    from pydicom.filereader import data_element_generator

    file.seek(132)
    meta = list(data_element_generator(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2))
    if any(e.tag == 0x00020010 and bytes(e.value or b"").strip(b"\0 ") == _DEFLATED.encode() for e in meta):
        inflating = zlib.decompressobj(-zlib.MAX_WBITS)
        inflating.decompress(file.read(), MAX_FILE_BYTES)
        if inflating.unconsumed_tail:
            raise BadImage(f"more than {MAX_FILE_BYTES:,} bytes when it is inflated (decompression bomb?)")
    file.seek(0)
    tags = [*_ELEMENTS, *(_DATA if pixels else ())]
    return dcmread(file, stop_before_pixels=not pixels, specific_tags=tags)


def _first(value: Any) -> float:
    return float(value if isinstance(value, int | float | str) else value[0])


def _coded_size(code: bytes, jpeg_2000: bool) -> tuple[int, int] | None:
    """(width, height) that a compressed picture says of itself; None if it is none."""
    if jpeg_2000:
        from PIL import Image

        with Image.open(io.BytesIO(code), formats=("JPEG2000",)) as image:
            return image.size
    at = 2
    while code[:2] == b"\xff\xd8" and at + 9 <= len(code) and code[at] == 0xFF:
        if code[at + 1] in _SIZE_MARKERS:
            height, width = struct.unpack(">HH", code[at + 5 : at + 9])
            return width, height
        at += 1 if code[at + 1] == 0xFF else 2 + int.from_bytes(code[at + 2 : at + 4], "big")
    return None
