"""Decoding in other processes; started by :class:`Processes`, not by a user.

Not ``multiprocessing``: that imports the user's main module again, which runs a script without an
``if __name__ == "__main__"`` a second time.  Jobs go down a pipe; pixels go straight into the file that is being made.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

from dpsyngen.data.source import Job
from dpsyngen.errors import DataError

Task = Callable[[Job], Any]
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from dpsyngen.data.decode_worker import main; main()"


class Processes:
    """Some processes that do one task for many jobs.

    Args:
        count: how many.
        task: picklable; called with a job.
        turns: lock file for large images, see :func:`dpsyngen.data.decode.share_budget`.
        keep: a descriptor that they keep open, so that a lock on it outlives a killed parent until they have ended.
    """

    def __init__(self, count: int, task: Task, turns: str, keep: int) -> None:
        command = [sys.executable, "-c", _START, json.dumps(sys.path)]
        self._all = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(keep,))
            for _ in range(count)
        ]
        self._first = (task, turns)

    def map(self, jobs: Sequence[tuple[int, Job]]) -> Iterator[tuple[int, Any]]:
        """(number, result) of each job as it is done, in any order.

        Raises:
            DataError: a job failed, or a process ended.
        """
        waiting = iter(jobs)
        lock, done = threading.Lock(), SimpleQueue[Any]()

        def feed(process: subprocess.Popen[bytes]) -> None:
            try:
                self._send(process, self._first)
                while True:
                    with lock:
                        number, job = next(waiting, (-1, None))
                    if job is None:
                        break
                    self._send(process, job)
                    failed, result = pickle.load(process.stdout)  # type: ignore[arg-type]
                    if failed:
                        raise DataError(result)
                    done.put((number, result))
                done.put(None)
            except (OSError, EOFError, pickle.UnpicklingError):
                done.put(_ended(process))
            except BaseException as error:
                done.put(error)

        for process in self._all:
            threading.Thread(target=feed, args=(process,), daemon=True, name="dpsyngen-decoding").start()
        running = len(self._all)
        while running:
            result = done.get()
            if result is None:
                running -= 1
            elif isinstance(result, BaseException):
                raise result
            else:
                yield result

    @staticmethod
    def _send(process: subprocess.Popen[bytes], what: Any) -> None:
        assert process.stdin is not None
        pickle.dump(what, process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
        process.stdin.flush()

    def close(self) -> None:
        """End the processes, at once."""
        for process in self._all:
            process.kill()
        for process in self._all:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]


def _ended(process: subprocess.Popen[bytes]) -> DataError:
    code = process.wait()
    how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
    return DataError(
        f"a process that decoded images ended {how}. Perhaps memory ran out (use fewer: --set data.workers=1), or "
        "a file is broken in a way that the image library does not survive (read it in parts to find which)."
    )


def main() -> None:
    """Do jobs from the standard input until it ends; results go to the standard output as it was."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    from PIL import Image

    from dpsyngen.data.decode import share_budget
    from dpsyngen.data.quiet import quiet_decoders

    Image.init()
    with contextlib.suppress(EOFError, BrokenPipeError), quiet_decoders():
        task, turns = pickle.load(sys.stdin.buffer)
        share_budget(turns)
        while True:
            job = pickle.load(sys.stdin.buffer)
            try:
                answer = (False, task(job))
            except Exception as error:
                answer = (True, str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}")
            pickle.dump(answer, answers)
            answers.flush()
