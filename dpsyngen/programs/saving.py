"""Saving many images of a program: by all cores, resumable, with a manifest that says how to draw them again.

Several processes of torchrun can share a job, too: each draws and writes shards, and the main one keeps the books.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpsyngen.distributed import ALONE, END, Ranks
from dpsyngen.errors import ConfigError, RunError
from dpsyngen.files import require_absent_or_empty, write_text
from dpsyngen.programs.base import MAX_INDEX, Program
from dpsyngen.programs.checks import as_choice, as_integer
from dpsyngen.programs.formats import LAYOUTS, Layout
from dpsyngen.programs.registry import TIERS, make_program
from dpsyngen.version import __version__

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
SHARD_SIZE = 1000

_PROGRESS = ".progress.jsonl"
_LOCK = ".lock"
_WHAT = ("program", "start", "count", "format", "shard_size")  # of a manifest: what a resumed job must agree on


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
    in the order [N, C, H, W]) of each shard and of these hashes together.  Whatever the number of workers and however
    often the job was interrupted, the files come out the same.

    Args:
        program: what draws.
        out: a folder that does not exist or is empty; with `resume` one that an interrupted job left.
        count: how many images.
        format: "folder", "zip", "webdataset", "parquet" or "npy"; see `formats`.
        start: index of the first image.
        shard_size: images that are drawn, written and written down as done together.
        workers: processes.  With more than one, a script must guard its own start with ``if __name__ == "__main__"``.
        resume: go on with an interrupted job; its settings must be the same.
        on_progress: called with the number of images done in all.
        ranks: the processes that share the work, which all see the folder; this is the main one, the others are in
            :func:`follow_saving`.  They stand in place of `workers`.

    Raises:
        ConfigError: an argument is out of range, or a library that the format needs is missing.
        RunError: `out` has something in it, or, with `resume`, holds no such job or one with other settings.
    """
    folder = Path(out)
    as_choice("format", format, tuple(LAYOUTS), "a format")
    start = as_integer("start", start, 0, MAX_INDEX)
    count = as_integer("count", count, 1, MAX_INDEX - start + 1)
    shard_size = min(as_integer("shard_size", shard_size, 1, 10**7), count)
    workers = as_integer("workers", workers, 1, 1024)
    if workers > 1 and not ranks.alone:
        raise ConfigError("--workers does not go with torchrun, which starts the processes itself.")
    LAYOUTS[format].require()
    job: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "dpsyngen": __version__,
        "program": program.config(),
        "prior_tier": program.prior_tier,
        "prior_tier_meaning": TIERS[program.prior_tier],
        "start": start,
        "count": count,
        "format": format,
        "shard_size": shard_size,
        "complete": False,
    }
    if resume:
        _check_same(folder, job)
    else:
        require_absent_or_empty(folder, "--out")
        folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if not resume:
            write_text(folder / MANIFEST, json.dumps(job, indent=1, ensure_ascii=False) + "\n")
        _draw_all(program, folder, job, workers, on_progress or (lambda done: None), ranks)
    (folder / _LOCK).unlink(missing_ok=True)
    return folder / MANIFEST


def _check_same(folder: Path, job: dict[str, Any]) -> None:
    try:
        before = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RunError(f"{folder} holds no {MANIFEST} of an interrupted job: leave out --resume to begin.") from None
    if not isinstance(before, dict) or before.get("complete") is not False:
        raise RunError(f"{folder} is finished already; there is nothing to resume.")
    if before.get("format_version") != FORMAT_VERSION:
        raise RunError(f"{folder} was begun by another version of the format: save to a new folder.")
    other = [key for key in _WHAT if before.get(key) != json.loads(json.dumps(job[key]))]
    if other:
        raise RunError(
            f"{folder} was begun with another {', '.join(other)}: give the same as before "
            f"({', '.join(f'{key}: {before.get(key)}' for key in other)}), or save to a new folder."
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"another process is saving to {folder}.  Wait for it or stop it first.") from None
        yield
    finally:
        os.close(handle)


def _draw_all(
    program: Program,
    folder: Path,
    job: dict[str, Any],
    workers: int,
    on_progress: Callable[[int], None],
    ranks: Ranks,
) -> None:
    layout = _layout(program, folder, job)
    layout.prepare()
    hashes = _read_progress(folder, layout.shards)
    done = sum(_size(job, shard) for shard in hashes)
    on_progress(done)
    with open(folder / _PROGRESS, "ab") as progress:
        # A line that was cut off when the last process died must not swallow the next one.
        progress.write(b"\n")
        left = [s for s in range(layout.shards) if s not in hashes]
        results = (
            _results(program, folder, job, workers, left) if ranks.alone else _shared(ranks, program, folder, job, left)
        )
        for shard, digest in results:
            hashes[shard] = digest
            progress.write(json.dumps({"shard": shard, "sha256": digest}).encode() + b"\n")
            progress.flush()
            done += _size(job, shard)
            on_progress(done)
    layout.finish()
    ordered = [hashes[shard] for shard in range(layout.shards)]
    job = {
        **job,
        "complete": True,
        "files": layout.files(),
        "sha256": hashlib.sha256("".join(ordered).encode()).hexdigest(),
        "shard_sha256": ordered,
    }
    write_text(folder / MANIFEST, json.dumps(job, indent=1, ensure_ascii=False) + "\n")
    (folder / _PROGRESS).unlink()


def _layout(program: Program, folder: Path, job: dict[str, Any]) -> Layout:
    shape = program.channels, program.resolution, program.resolution
    return LAYOUTS[job["format"]](folder, job["start"], job["count"], job["shard_size"], shape)


def _size(job: dict[str, Any], shard: int) -> int:
    return int(min(job["shard_size"], job["count"] - shard * job["shard_size"]))


def _read_progress(folder: Path, shards: int) -> dict[int, str]:
    path = folder / _PROGRESS
    hashes: dict[int, str] = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            if 0 <= entry["shard"] < shards:
                hashes[entry["shard"]] = entry["sha256"]
        except (ValueError, KeyError, TypeError):
            continue  # cut off; that shard is drawn again
    return hashes


def _results(
    program: Program, folder: Path, job: dict[str, Any], workers: int, shards: list[int]
) -> Iterator[tuple[int, str]]:
    """Write the shards, and yield each with the hash of its pixels as it gets done."""
    if workers == 1 or len(shards) < 2:
        for shard in shards:
            yield shard, _write_shard(program, folder, job, shard)
        return
    context = multiprocessing.get_context("spawn")  # forking a process that has threads can hang
    arguments = (program.config(), folder, job)
    with ProcessPoolExecutor(min(workers, len(shards)), context, _begin_worker, arguments) as pool:
        waiting: dict[Future[str], int] = {}
        left = iter(shards)
        try:
            while True:
                for shard in left:
                    waiting[pool.submit(_work, shard)] = shard
                    if len(waiting) >= 2 * workers:
                        break
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool:
            raise RunError(
                f"a process that was drawing for {folder} was killed (too little memory?).  What was finished is kept: "
                "continue with --resume, perhaps with fewer --workers or a smaller --shard-size."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_SHARDS = "shards"  # the command to the other processes


def _shared(
    ranks: Ranks, program: Program, folder: Path, job: dict[str, Any], shards: list[int]
) -> Iterator[tuple[int, str]]:
    """As :func:`_results`, by several processes: a shard each at a time."""
    for first in range(0, len(shards), ranks.count):
        now = shards[first : first + ranks.count]
        with ranks.lead(_SHARDS, program=program.config(), folder=folder.absolute(), job=job, shards=now):
            parts = _part(ranks, program, folder, job, now)
        yield from (part for part in parts or () if part is not None)


def _part(
    ranks: Ranks, program: Program, folder: Path, job: dict[str, Any], shards: list[int]
) -> list[tuple[int, str] | None] | None:
    """Write this process's one of `shards`; in the main process, each with the hash of its pixels."""

    def write() -> tuple[int, str] | None:
        if ranks.rank >= len(shards):
            return None
        if not (folder / MANIFEST).exists():
            raise RunError(f"{folder} is not the folder that the main process made: give one that all machines share.")
        shard = shards[ranks.rank]
        return shard, _write_shard(program, folder, job, shard)

    return ranks.gather_to_main(ranks.agree(write))


def follow_saving(ranks: Ranks) -> None:
    """In every process but the main one: share the saving that the main one leads, to its end.

    Raises:
        Dismissed: the main process failed, and said why.
        RankLost: a process is gone.
    """
    while (command := ranks.next_command()).name != END:
        about = command.values
        _part(ranks, make_program(**about["program"]), about["folder"], about["job"], about["shards"])


def _write_shard(program: Program, folder: Path, job: dict[str, Any], shard: int) -> str:
    start = job["start"] + shard * job["shard_size"]
    images = program.batch(range(start, start + _size(job, shard)))
    _layout(program, folder, job).write(shard, start, images)
    return hashlib.sha256(images.tobytes()).hexdigest()


_job: tuple[Program, Path, dict[str, Any]] | None = None  # of a worker process


def _begin_worker(config: dict[str, Any], folder: Path, job: dict[str, Any]) -> None:
    global _job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the job
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _job = make_program(**config), folder, job


def _end_with_parent() -> None:
    """Without this a worker would wait for work forever after the first process was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(shard: int) -> str:
    if _job is None:
        raise ConfigError("A worker was asked to draw before it was set up.")
    return _write_shard(*_job, shard)
