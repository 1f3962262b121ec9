"""Layouts of saved images on the disk, written shard by shard."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError
from dpsyngen.files import write_atomically

Images = NDArray[np.uint8]


def png(image: Images) -> bytes:
    """One image, [C, H, W], as a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    pixels = image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


class Layout(ABC):
    """A way to keep images; `write` may be called in any order and again for the same shard, in other processes.

    Args:
        out: the folder.
        first: index of the first image of all.
        count: how many images there are in all.
        shard_size: images of a shard; the last may have fewer.
        shape: channels, height, width.
    """

    name: ClassVar[str]
    about: ClassVar[str]

    def __init__(self, out: Path, first: int, count: int, shard_size: int, shape: tuple[int, int, int]) -> None:
        self.out, self.first, self.count, self.shard_size, self.shape = out, first, count, shard_size, shape
        self.shards = -(-count // shard_size)
        self.digits = max(8, len(str(first + count - 1)))

    @classmethod  # noqa: B027 (optional)
    def require(cls) -> None:
        """Raise ConfigError if something this layout needs is not installed."""

    def prepare(self) -> None:  # noqa: B027 (optional)
        """Make what must exist before the first shard."""

    @abstractmethod
    def write(self, shard: int, start: int, images: Images) -> None:
        """Write one shard, whose first image has index `start`; images are [N, C, H, W]."""

    def finish(self) -> None:  # noqa: B027 (optional)
        """Bring the shards together once all are written."""

    @abstractmethod
    def files(self) -> list[str]:
        """Names of the files, relative to the folder; for a folder of images a pattern."""

    def _named(self, start: int, images: Images) -> Iterator[tuple[str, bytes]]:
        for k, image in enumerate(images):
            yield f"{start + k:0{self.digits}}.png", png(image)


class Folder(Layout):
    name = "folder"
    about = "one PNG file an image, in images/"

    def prepare(self) -> None:
        (self.out / "images").mkdir(exist_ok=True)

    def write(self, shard: int, start: int, images: Images) -> None:
        for name, data in self._named(start, images):
            (self.out / "images" / name).write_bytes(data)

    def files(self) -> list[str]:
        return ["images/*.png"]


class Zip(Layout):
    name = "zip"
    about = "one images.zip of PNG files"

    @property
    def _parts(self) -> Path:
        return self.out / ".parts"

    def prepare(self) -> None:
        if not (self.out / "images.zip").exists():
            self._parts.mkdir(exist_ok=True)

    def write(self, shard: int, start: int, images: Images) -> None:
        def write(path: Path) -> None:
            with zipfile.ZipFile(path, "w") as archive:
                for name, data in self._named(start, images):
                    archive.writestr(zipfile.ZipInfo(name), data)  # stored: PNG is compressed; dated 1980

        write_atomically(self._parts / f"{shard:06}.zip", write)

    def finish(self) -> None:
        def write(path: Path) -> None:
            with zipfile.ZipFile(path, "w") as whole:
                for shard in range(self.shards):
                    with zipfile.ZipFile(self._parts / f"{shard:06}.zip") as part:
                        for info in part.infolist():
                            whole.writestr(zipfile.ZipInfo(info.filename), part.read(info))

        if self._parts.is_dir():  # else it was finished before
            write_atomically(self.out / "images.zip", write)
            shutil.rmtree(self._parts)

    def files(self) -> list[str]:
        return ["images.zip"]


class WebDataset(Layout):
    name = "webdataset"
    about = "tar files of PNG and JSON pairs, one a shard"

    def _name(self, shard: int) -> str:
        return f"images-{shard:06}.tar"

    def write(self, shard: int, start: int, images: Images) -> None:
        def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)  # without date, owner or group
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

        def write(path: Path) -> None:
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
                for k, (name, data) in enumerate(self._named(start, images)):
                    add(archive, name, data)
                    add(archive, name.replace(".png", ".json"), json.dumps({"index": start + k}).encode())

        write_atomically(self.out / self._name(shard), write)

    def files(self) -> list[str]:
        return [self._name(shard) for shard in range(self.shards)]


class Parquet(Layout):
    name = "parquet"
    about = "Parquet files that Hugging Face datasets opens, one a shard; needs pyarrow"

    @classmethod
    def require(cls) -> None:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise ConfigError(
                "The format parquet needs pyarrow, which is not installed: pip install 'dpsyngen[parquet]', "
                "or choose another format."
            ) from None

    def _name(self, shard: int) -> str:
        return f"data/train-{shard:05}-of-{self.shards:05}.parquet"

    def prepare(self) -> None:
        (self.out / "data").mkdir(exist_ok=True)

    def write(self, shard: int, start: int, images: Images) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        named = list(self._named(start, images))
        image = pa.array(
            [{"bytes": data, "path": name} for name, data in named],
            type=pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        )
        index = pa.array(range(start, start + len(named)), type=pa.int64())
        features = {"image": {"_type": "Image"}, "index": {"dtype": "int64", "_type": "Value"}}
        table = pa.table({"image": image, "index": index}).replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
        write_atomically(self.out / self._name(shard), lambda path: pq.write_table(table, path, compression="none"))

    def files(self) -> list[str]:
        return [self._name(shard) for shard in range(self.shards)]


class Npy(Layout):
    name = "npy"
    about = "one images.npy, uint8 [N, H, W] or [N, H, W, 3], which NumPy can map into memory"

    def prepare(self) -> None:
        path = self.out / "images.npy"
        if path.exists():
            return
        channels, height, width = self.shape
        shape = (self.count, height, width) if channels == 1 else (self.count, height, width, channels)

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.lib.format.write_array_header_1_0(
                    file,
                    {"descr": "|u1", "fortran_order": False, "shape": shape},
                )
                # Claimed now, so that a disk that is too small says so before anything is drawn.
                os.posix_fallocate(file.fileno(), file.tell(), int(np.prod(shape)))

        write_atomically(path, write)

    def write(self, shard: int, start: int, images: Images) -> None:
        whole = np.load(self.out / "images.npy", mmap_mode="r+")
        begin = start - self.first
        whole[begin : begin + len(images)] = images[:, 0] if len(images[0]) == 1 else images.transpose(0, 2, 3, 1)
        whole.flush()

    def files(self) -> list[str]:
        return ["images.npy"]


LAYOUTS: dict[str, type[Layout]] = {layout.name: layout for layout in (Folder, Zip, WebDataset, Parquet, Npy)}
