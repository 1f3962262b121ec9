"""Command lines in processes of their own that begin at once: forked from one that has loaded what they import.

They are real processes, to be killed and interrupted, and with :func:`ranks` those that torchrun would start.  Where a
start is what is tested (torchrun itself, the command that a user types) a test starts its processes anew.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
LOADED = "tests.loaded"


class Forked:
    """A process that runs a module with these arguments; what it says goes to files in `folder`."""

    def __init__(self, folder: Path, module: str, *arguments: object, **environment: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._said = folder / "said.out", folder / "said.err"
        variables = {k: str(v) for k, v in environment.items()}
        given = (module, [str(a) for a in arguments], variables, [str(p) for p in self._said])
        self.process = _server().Process(target=_run, args=given)
        self.process.start()

    @property
    def out(self) -> str:
        """What it wrote to standard output so far."""
        return self._said[0].read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        """What it wrote to standard error so far."""
        return self._said[1].read_text(encoding="utf-8")

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def code(self, seconds: float = 120.0) -> int:
        """Wait for its end: the exit code, or the negative number of the signal that ended it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"it goes on: {self.err[-3000:]}"
        return self.process.exitcode


@contextmanager
def ranks(count: int, folder: Path, module: str, *arguments: object) -> Iterator[list[Forked]]:
    """So many processes that find each other as those of ``torchrun --standalone`` do, or one without torchrun.

    ``{rank}`` in an argument is each one's own.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun keeps one, too
    agent: dict[str, object] = {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": True}
    agent |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    started = []
    for rank in range(count):
        words = (str(a).replace("{rank}", str(rank)) for a in arguments)
        own = {**agent, "RANK": rank, "LOCAL_RANK": rank} if count > 1 else {}
        started.append(Forked(folder / f"rank-{rank}", module, *words, **own))
    try:
        yield started
    finally:
        for each in started:
            each.process.kill()
            each.process.join()


def ended(started: Sequence[Forked], seconds: float = 240.0) -> list[int]:
    """Wait for all, and end the others once one fails, as torchrun does: the exit codes."""
    going = {each.process.sentinel: each for each in started}
    while going:
        now = connection.wait(list(going), seconds)
        assert now, [each.err[-3000:] for each in started]
        if any(going.pop(sentinel).code() for sentinel in now):  # type: ignore[call-overload]
            for each in going.values():
                each.process.terminate()
    return [each.code() for each in started]


@cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([LOADED])
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
            patch.setenv(f"{name}_NUM_THREADS", "1")
        patch.setenv("JE_ARROW_MALLOC_CONF", "background_thread:false")  # scikit-learn imports pandas, and that Arrow
        patch.setenv("PYTHONPATH", str(ROOT))
        forkserver.ensure_running()
    return context


def _run(module: str, arguments: list[str], environment: Mapping[str, str], said: list[str]) -> None:
    assert LOADED in sys.modules, f"the process that this was forked from could not import {LOADED}"
    os.environ.update(environment)
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
