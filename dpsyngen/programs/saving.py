"""Saving many images of a program, on all cores, with a manifest that says how to draw them again.

Several processes of torchrun can share a job, too: each draws and writes shards, the main one makes the folder and
writes the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dpsyngen.distributed import ALONE, END, Ranks
from dpsyngen.errors import ConfigError, RunError, require_package
from dpsyngen.files import new_folder, require_absent_or_empty, strict_text, sync_disk, write_atomically, write_text
from dpsyngen.programs.base import MAX_INDEX, Program, as_choice, as_integer
from dpsyngen.programs.drawing import Images
from dpsyngen.programs.grid import picture, png
from dpsyngen.programs.registry import TIERS, make_program
from dpsyngen.version import __version__

MANIFEST = "manifest.json"
FORMAT_VERSION = 3
SHARD_SIZE = 1000
FORMATS = ("folder", "parquet")

_SHARDS = "shards"  # the command to the other processes of torchrun


@dataclass(frozen=True)
class _Job:
    """Images `start` to start + count − 1 of a program, to be written to a folder in shards."""

    program: Program
    folder: Path
    start: int
    count: int
    format: str
    shard_size: int

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_size)

    def indices(self, shard: int) -> range:
        first = self.start + shard * self.shard_size
        return range(first, min(first + self.shard_size, self.start + self.count))

    @property
    def place(self) -> Path:
        """The folder of the images or tables."""
        return self.folder / ("images" if self.format == "folder" else "data")

    def files(self) -> list[str]:
        """Return the names of the files, relative to the folder; for a folder of images a pattern."""
        return ["images/*.png"] if self.format == "folder" else [f"data/{self._table(k)}" for k in range(self.shards)]

    def _table(self, shard: int) -> str:
        return f"train-{shard:05}-of-{self.shards:05}.parquet"  # the name that `datasets` looks for

    def write(self, shard: int) -> str:
        """Draw and write one shard; returns the SHA-256 of its pixels."""
        indices = self.indices(shard)
        images = self.program.batch(indices)
        digits = max(8, len(str(self.start + self.count - 1)))
        names = [f"{index:0{digits}}.png" for index in indices]
        if self.format == "folder":
            for name, image in zip(names, images, strict=True):
                (self.place / name).write_bytes(png(picture(image), optimize=False))
        else:
            of_index = {"index": (np.array(indices), {"dtype": "int64", "_type": "Value"})}
            path, table = self.place / self._table(shard), image_table(names, images, of_index, {})
            write_atomically(path, lambda target: write_tables(target, [table]))
        return hashlib.sha256(images.tobytes()).hexdigest()


def image_table(names: Sequence[str], images: Images, columns: Mapping[str, Any], notes: Mapping[str, str]) -> Any:
    """Make an Arrow table of images, as PNG files with names, in the form of ``datasets``.

    `columns` are more columns: whole numbers and their feature, by name; `notes` is more metadata.
    """
    import pyarrow as pa

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": png(picture(x), optimize=False), "path": n} for n, x in zip(names, images, strict=True)]
    arrays = {name: pa.array(numbers, pa.int64()) for name, (numbers, _) in columns.items()}
    features = {"image": {"_type": "Image"}} | {name: feature for name, (_, feature) in columns.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}}), **notes}
    return pa.table({"image": pa.array(rows, image), **arrays}).replace_schema_metadata(metadata)


def write_tables(path: Path, tables: Iterable[Any]) -> None:
    """Write tables of one schema as a Parquet file, each as a row group."""
    from pyarrow.parquet import ParquetWriter

    several = iter(tables)
    first = next(several)
    with ParquetWriter(path, first.schema, compression="none") as file:  # PNG is compressed
        for table in chain([first], several):
            file.write_table(table)


def save_images(
    program: Program,
    out: str | os.PathLike[str],
    count: int,
    *,
    format: str = "folder",
    start: int = 0,
    shard_size: int = SHARD_SIZE,
    workers: int = 1,
    on_progress: Callable[[int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Path:
    """Write images `start` to start + count − 1 of `program` to the folder `out`; returns the path of the manifest.

    The manifest holds the program's configuration and prior tier, the version, and the SHA-256 of the pixels (uint8,
    [N, C, H, W]) of each shard and of these hashes together.  The files are the same for any number of workers, and all
    of them appear at the end; an interrupted job leaves nothing that keeps it from being started again.

    Args:
        out: a folder that does not exist or is empty.
        format: "folder" (one PNG file an image, in ``images/``) or "parquet" (one file a shard, in ``data/``).
        shard_size: images that are drawn and written together.
        workers: threads.
        on_progress: called with the number of images done in all.
        ranks: the processes that share the work in place of `workers`, which all see the folder; this is the main one,
            the others are in :func:`follow_saving`.

    Raises:
        ConfigError: an argument is out of range, or a library that the format needs is missing.
        RunError: `out` has something in it, or another process writes there.
    """
    as_choice("format", format, FORMATS)
    start = as_integer("start", start, 0, MAX_INDEX)
    count = as_integer("count", count, 1, MAX_INDEX - start + 1)
    shard_size = min(as_integer("shard_size", shard_size, 1, 10**7), count)
    workers = as_integer("workers", workers, 1, 1024)
    if workers > 1 and not ranks.alone:
        raise ConfigError("--workers does not go with torchrun, which starts the processes itself.")
    if format == "parquet":
        require_package("pyarrow", "Parquet", "parquet")
    target = Path(out)
    require_absent_or_empty(target, "--out")
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(target) as folder:
        job = _Job(program, folder, start, count, format, shard_size)
        job.place.mkdir()
        hashes: list[str] = []
        report = on_progress or (lambda done: None)
        report(0)
        with ThreadPoolExecutor(workers, "dpsyngen-saving") as pool:  # what draws and writes releases Python's lock
            parts = pool.map(job.write, range(job.shards)) if ranks.alone else _by_ranks(job, ranks)
            # Closed whatever happens, so that nothing is written any more when the folder goes.
            with closing(parts):  # type: ignore[type-var]  # a generator
                for digest in parts:
                    hashes.append(digest)
                    report(min(count, len(hashes) * shard_size))
        about = {
            "format_version": FORMAT_VERSION,
            "dpsyngen": __version__,
            "program": program.config(),
            "prior_tier": program.prior_tier,
            "prior_tier_meaning": TIERS[program.prior_tier],
            **{name: getattr(job, name) for name in ("start", "count", "format", "shard_size")},
            "files": job.files(),
            "sha256": hashlib.sha256("".join(hashes).encode()).hexdigest(),
            "shard_sha256": hashes,
        }
        sync_disk(folder)  # before there is a manifest that says that they are there
        write_text(folder / MANIFEST, strict_text(about, indent=1) + "\n")
    return target / MANIFEST


def _by_ranks(job: _Job, ranks: Ranks) -> Iterator[str]:
    """Write all shards with the processes of torchrun, each round a shard each; yields the hashes of their pixels."""
    settings = vars(job) | {"program": job.program.config(), "folder": job.folder.absolute()}
    for first in range(0, job.shards, ranks.count):
        with ranks.lead(_SHARDS, first=first, job=settings):
            parts = _part(job, first + ranks.rank, ranks)
        yield from filter(None, parts)


def _part(job: _Job, shard: int, ranks: Ranks) -> list[str | None]:
    """Write this process's shard, if there is such a one; returns the hashes of all."""

    def write() -> str | None:
        if shard >= job.shards:
            return None
        if not job.place.is_dir():
            raise RunError(f"{job.folder} is not the folder of the main process: give one that all machines share.")
        return job.write(shard)

    return ranks.gather(ranks.agree(write))


def follow_saving(ranks: Ranks) -> None:
    """Write the shards of this process, which is not the main one, until that ends the job, or fails (Dismissed)."""
    while (command := ranks.next_command()).name != END:
        job = command.values["job"]
        _part(_Job(**job | {"program": make_program(**job["program"])}), command.values["first"] + ranks.rank, ranks)
