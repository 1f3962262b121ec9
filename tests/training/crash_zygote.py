"""Lives of a training process that end at a chosen point.  Run as a program; reads one JSON request a line.

The process loads everything once and then forks a child for each life, so that a life takes about a second.  It has one
thread, so that forking is safe.  In a child every operation that changes a file of the run
directory is counted, the two halves of each write included, and the child kills itself with SIGKILL before operation
number ``kill_at``.

A request: ``out``; and if wanted, ``seed`` (else keys from the operating system), ``kill_at``, ``interrupt_at``
(KeyboardInterrupt, as by a second Ctrl-C), ``full_at`` (the disk is full from this operation on), ``kill_after``
(seconds until the parent kills the child), ``record`` (a file outside of the run that each life adds a line to for each
use of noise), ``points`` (a file that gets the names of all operations) and ``expected`` (an error is no surprise).
The answer: ``signal``, ``code``, ``error`` (type and text of the exception that ended the life).
"""

from __future__ import annotations

import builtins
import errno
import hashlib
import io
import json
import os
import select
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import dpsyngen.privacy.noise as noise_module
import dpsyngen.training.private as private_module
from dpsyngen import fit as api
from dpsyngen.config import load_config
from dpsyngen.errors import RunError
from tests.conftest import TINY_SETTINGS, tiny_arrays

SETTINGS: dict[str, Any] = {
    **TINY_SETTINGS,
    "public": {"steps": 3, "batch": 2, "copies": 1, "checkpoint_every": 2},
    "private": {"steps": 5, "batch": 12, "copies": 1, "physical_batch": 8, "checkpoint_every": 2},
    "stages": {"variant": "cleaning", "pretrain": True},
}


def life(out: Path, seed: int | None) -> None:
    """Start the run or go on with it, to its end."""
    if (out / "run.json").exists():
        try:
            training = api.prepare_resume(out, tiny_arrays())
        except RunError as error:
            if "finished already" not in str(error):
                raise
            return
    else:
        privacy = {"epsilon": 8} | ({} if seed is None else {"insecure_seed": seed})
        training = api.prepare(load_config({**SETTINGS, "privacy": privacy}), out, tiny_arrays())
    for _ in training.steps():
        pass


class Points:
    """Counts what changes files below the folder of a request, and makes happen at a number what it asks for."""

    _EVENTS = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link"})

    # What takes no room, so goes on when the disk is full.
    _FREE = frozenset({"os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "truncate", "written"})

    def __init__(self, request: dict[str, Any]) -> None:
        self.out = str(request["out"])
        self.kill_at, self.full_at = request.get("kill_at"), request.get("full_at")
        self.interrupt_at = request.get("interrupt_at")
        self.names: list[str] = []

    def tick(self, what: str, path: str) -> None:
        self.names.append(f"{what} .{path.removeprefix(self.out)}")
        if len(self.names) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if len(self.names) == self.interrupt_at:
            raise KeyboardInterrupt
        full = self.full_at is not None and len(self.names) >= self.full_at
        if full and what not in self._FREE and (what != "open" or not os.path.exists(path)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def concerns(self, path: object) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self.out)

    def install(self) -> None:
        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open":
                path, _, flags = arguments
                if self.concerns(path) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                    self.tick("open", os.fspath(path))
            elif event in self._EVENTS and self.concerns(arguments[0]):
                name = os.fspath(arguments[0])
                self.tick(event, f"{name} -> {Path(arguments[1]).name}" if event == "os.rename" else name)

        sys.addaudithook(audit)
        real_fsync, real_open = os.fsync, io.open

        def fsync(fd: int) -> None:
            path = os.readlink(f"/proc/self/fd/{fd}")
            if self.concerns(path):
                self.tick("fsync", path)
            real_fsync(fd)

        def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            stream = real_open(file, mode, *arguments, **options)
            path = os.readlink(f"/proc/self/fd/{stream.fileno()}")
            return _Torn(stream, path, self) if self.concerns(path) and set(mode) & set("wa+") else stream

        os.fsync, io.open, builtins.open = fsync, opened, opened  # type: ignore[assignment]


class _Torn:
    """A file each of whose writes is two, with a point before, between and after."""

    def __init__(self, stream: Any, path: str, points: Points) -> None:
        self._stream, self._path, self._points = stream, path, points

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Torn:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def write(self, data: Any) -> int:
        middle = len(data) // 2
        for name, part in (("write", data[:middle]), ("write, second half", data[middle:])):
            self._points.tick(name, self._path)
            self._stream.write(part)
            self._stream.flush()
        self._points.tick("written", self._path)
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        self._points.tick("truncate", self._path)
        return int(self._stream.truncate(size))


def record_mechanism(path: str) -> None:
    """Write (step, indices, sum, noise) of each use of noise to `path`, as digests, before anything comes of it."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    chosen: dict[int, str] = {}
    drawn: list[str] = []
    sample, mean, normal = private_module.poisson_sample, noise_module.noisy_mean, noise_module.standard_normal_parts

    def digest(*parts: Any) -> str:
        return hashlib.sha256(b"".join(p.tobytes() for p in parts)).hexdigest()[:24]

    def spy_sample(randomness: Any, step: int, *rest: Any) -> Any:
        indices = sample(randomness, step, *rest)
        chosen[step] = digest(indices)
        return indices

    def spy_normal(*arguments: Any, **options: Any) -> Any:
        noise = list(normal(*arguments, **options))
        drawn.append(digest(*noise))
        return iter(noise)

    def spy_mean(clipped: Any, **options: Any) -> Any:
        drawn.clear()
        result = mean(clipped, **options)
        step, total = options["step"], digest(*(s.numpy() for s in clipped.sums))
        os.write(fd, (json.dumps([step, chosen[step], total, *drawn]) + "\n").encode())
        return result

    private_module.poisson_sample, noise_module.noisy_mean = spy_sample, spy_mean
    noise_module.standard_normal_parts = spy_normal


def child(request: dict[str, Any]) -> None:
    out = Path(request["out"])
    if request.get("record"):
        record_mechanism(request["record"])
    points = Points(request)
    if any(request.get(k) for k in ("kill_at", "interrupt_at", "full_at", "points")):
        points.install()
    life(out, request.get("seed"))
    if request.get("points"):
        fd = os.open(request["points"], os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(fd, "\n".join(points.names).encode())


def main() -> None:
    torch.set_num_threads(1)
    # A first life, so that what is loaded or compiled on first use is there for all: a life then takes a second.
    with tempfile.TemporaryDirectory() as folder:
        life(Path(folder) / "run", 0)
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        sys.exit(f"{threads} threads are running, so forking is not safe")
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            code = 1
            try:
                child(request)
                code = 0
            except BaseException as error:
                os.write(writer, f"{type(error).__name__}: {error}".encode()[:2000])
                if not any(request.get(k) for k in ("full_at", "interrupt_at", "expected")):
                    traceback.print_exc()
            finally:
                os._exit(code)
        os.close(writer)
        if request.get("kill_after") is not None:
            # The pipe closes when the child ends.
            ended, _, _ = select.select([reader], [], [], request["kill_after"])
            if not ended:
                os.kill(pid, signal.SIGKILL)
        error = os.read(reader, 2000).decode()
        os.close(reader)
        _, status = os.waitpid(pid, 0)
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        answer = {"signal": killed, "code": code, "error": error}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
