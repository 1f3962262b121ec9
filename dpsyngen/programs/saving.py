"""Saving many images of a program, on all cores, with a manifest that says how to draw them again.

Several processes of torchrun can share a job, too: each draws and writes shards, and the main one writes the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dpsyngen.distributed import ALONE, END, Ranks
from dpsyngen.errors import ConfigError, RunError, require_package
from dpsyngen.files import require_absent_or_empty, strict_text, write_atomically, write_text
from dpsyngen.programs.base import MAX_INDEX, Program, as_choice, as_integer
from dpsyngen.programs.drawing import Images
from dpsyngen.programs.grid import picture, png
from dpsyngen.programs.registry import TIERS, make_program
from dpsyngen.version import __version__

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
SHARD_SIZE = 1000
FORMATS = ("folder", "parquet")

_WHAT = ("format_version", "program", "start", "count", "format", "shard_size")  # what --resume must agree on
_LOCK = ".lock"
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

    def about(self) -> dict[str, Any]:
        """Return what the manifest says before anything is drawn."""
        return {
            "format_version": FORMAT_VERSION,
            "dpsyngen": __version__,
            "program": self.program.config(),
            "prior_tier": self.program.prior_tier,
            "prior_tier_meaning": TIERS[self.program.prior_tier],
            **{name: getattr(self, name) for name in ("start", "count", "format", "shard_size")},
            "complete": False,
        }

    def files(self) -> list[str]:
        """Return the names of the files, relative to the folder; for a folder of images a pattern."""
        return ["images/*.png"] if self.format == "folder" else [self._table(k) for k in range(self.shards)]

    def _table(self, shard: int) -> str:
        return f"data/train-{shard:05}-of-{self.shards:05}.parquet"  # the name that `datasets` looks for

    def write(self, shard: int) -> str:
        """Draw and write one shard, over what may be there of it; returns the SHA-256 of its pixels."""
        indices = self.indices(shard)
        images = self.program.batch(indices)
        digits = max(8, len(str(self.start + self.count - 1)))
        names = [f"{index:0{digits}}.png" for index in indices]
        if self.format == "folder":
            for name, image in zip(names, images, strict=True):
                (self.folder / "images" / name).write_bytes(png(picture(image), optimize=False))
            os.sync()  # before the manifest says that they are there
        else:
            of_index = {"index": (np.array(indices), {"dtype": "int64", "_type": "Value"})}
            path, table = self.folder / self._table(shard), image_table(names, images, of_index, {})
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
    resume: bool = False,
    on_progress: Callable[[int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Path:
    """Write images `start` to start + count − 1 of `program` to the folder `out`; returns the path of the manifest.

    The manifest holds the program's configuration and prior tier, the version, and the SHA-256 of the pixels (uint8,
    [N, C, H, W]) of each shard and of these hashes together; until all is written, it says ``"complete": false``.  The
    files are the same for any number of workers.

    Args:
        out: a folder that does not exist or is empty; with `resume`, one that an interrupted job left.
        format: "folder" (one PNG file an image, in ``images/``) or "parquet" (one file a shard, in ``data/``).
        shard_size: images that are drawn and written together.
        workers: threads.
        resume: do an interrupted job again from its start, in its folder; the settings must be the same.
        on_progress: called with the number of images done in all.
        ranks: the processes that share the work in place of `workers`, which all see the folder; this is the main one,
            the others are in :func:`follow_saving`.

    Raises:
        ConfigError: an argument is out of range, or a library that the format needs is missing.
        RunError: `out` has something in it, or, with `resume`, holds no such job or one with other settings.
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
    job = _Job(program, Path(out), start, count, format, shard_size)
    manifest = job.folder / MANIFEST
    _check_folder(job, resume)
    # The manifest is written first and again at the end: a folder without "complete": true is known to be unfinished.
    (job.folder / job.files()[0]).parent.mkdir(parents=True, exist_ok=True)
    with _alone(job.folder):
        write_text(manifest, strict_text(job.about(), indent=1) + "\n")
        hashes: list[str] = []
        report = on_progress or (lambda done: None)
        report(0)
        with ThreadPoolExecutor(workers, "dpsyngen-saving") as pool:  # what draws and writes releases Python's lock
            parts = pool.map(job.write, range(job.shards)) if ranks.alone else _by_ranks(job, ranks)
            # Closed whatever happens, so that nothing is written any more when the folder's lock goes.
            with closing(parts):  # type: ignore[type-var]  # a generator
                for digest in parts:
                    hashes.append(digest)
                    report(min(count, len(hashes) * shard_size))
        whole = hashlib.sha256("".join(hashes).encode()).hexdigest()
        about = job.about() | {"complete": True, "files": job.files(), "sha256": whole, "shard_sha256": hashes}
        write_text(manifest, strict_text(about, indent=1) + "\n")
    return manifest


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that no second process writes over files of a job that counts as complete."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(folder / _LOCK, blocking=False):
            yield
            (folder / _LOCK).unlink(missing_ok=True)
    except Timeout:
        raise RunError(f"another process is saving to {folder}.  Wait for it or stop it first.") from None


def _check_folder(job: _Job, resume: bool) -> None:
    """Refuse a folder that holds something or, with `resume`, no unfinished job of the same settings."""
    try:
        before = dict(json.loads((job.folder / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        before = {}  # nothing that can be read
    unfinished = before.get("complete") is False
    if not resume:
        if unfinished:
            raise RunError(f"{job.folder} holds a job that was interrupted (or still runs): --resume does it again.")
        require_absent_or_empty(job.folder, "--out")
        return
    if not unfinished:
        why = "is finished already" if before else f"holds no {MANIFEST} of an interrupted job"
        raise RunError(f"{job.folder} {why}: leave out --resume, and save to a new folder.")
    now = json.loads(strict_text(job.about()))
    other = [key for key in _WHAT if before.get(key) != now[key]]
    if other:
        raise RunError(
            f"{job.folder} was begun with another {', '.join(other)}: give the same as before "
            f"({', '.join(f'{key}: {before.get(key)}' for key in other)}), or save to a new folder."
        )


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
        if not (job.folder / MANIFEST).exists():
            raise RunError(f"{job.folder} is not the folder of the main process: give one that all machines share.")
        return job.write(shard)

    return ranks.gather(ranks.agree(write))


def follow_saving(ranks: Ranks) -> None:
    """Write the shards of this process, which is not the main one, until that ends the job, or fails (Dismissed)."""
    while (command := ranks.next_command()).name != END:
        job = command.values["job"]
        _part(_Job(**job | {"program": make_program(**job["program"])}), command.values["first"] + ranks.rank, ranks)
