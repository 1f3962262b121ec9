"""Doing all jobs of an experiment: in this process, in several, or as one rank of torchrun.

Jobs are claimed by lock files in the experiment's folder, so processes may join, be killed and come back at any time.
``python -m dpsyngen.experiments.pool EXPERIMENT DEVICE [RETRY]`` is one such process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpsyngen.errors import DpsyngenError, RunError
from dpsyngen.experiments.experiment import Experiment, Status, claimed
from dpsyngen.experiments.runner import Images, Stopped, Worker
from dpsyngen.experiments.spec import Job
from dpsyngen.files import write_json, write_text
from dpsyngen.training.follower import handling

Watch = Callable[[dict[str, Status]], None]
Say = Callable[[Job, str, int, int], None]
STOPPED = 3
"""Exit status of a worker that stopped before all jobs were done."""


def work(experiment: Experiment, device: str = "cpu", *, retry: float = 0.0, tell: Say | None = None) -> bool:
    """Do jobs that nobody else does until none is left; False if it was asked to stop, or the time is used up.

    Several processes may work on one experiment.  `retry`: try jobs once more that failed before this
    time (as ``time.time()``); `tell` is called with what is being done.
    """
    images: Images | None = None
    for job in experiment.jobs:
        folder = experiment.work_path(job)
        if experiment.result(job) is not None:
            continue
        hours = experiment.spec.cost.hours
        if hours is not None and experiment.seconds() > 3600 * hours:
            return False
        if images is None:
            images = Images(experiment.spec)
            experiment.pin(experiment.spec, images.train, images.test)
        folder.mkdir(mode=0o700, exist_ok=True)
        # Whoever asks how far the job is holds the lock for a moment.
        with claimed(folder / "lock", patience=1.0) as mine:
            if not mine or experiment.result(job) is not None:
                continue
            failed = folder / "failed.json"
            if experiment.failure(job) is not None and failed.stat().st_mtime >= retry:
                continue
            failed.unlink(missing_ok=True)
            if not _one(experiment, images, job, device, tell):
                return False
    return True


def _one(experiment: Experiment, images: Images, job: Job, device: str, tell: Say | None) -> bool:
    """Do one job; False if it was asked to stop, then or before the job's end."""
    folder = experiment.work_path(job)
    told = 0.0

    def say(doing: str, done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told > 1 or done == total:
            told = now
            write_json(folder / "status.json", {"doing": doing, "done": done, "total": total}, 0o600)
        if tell:
            tell(job, doing, done, total)

    worker = Worker(experiment, images, device, say)

    def stop(number: int, frame: object) -> None:
        # Everything is kept; a second signal ends it at once.
        if worker.stop_requested:
            raise KeyboardInterrupt
        worker.stop()

    with handling(stop, signal.SIGINT, signal.SIGTERM):
        try:
            worker.do(job)
        except Stopped:
            return False
        except (DpsyngenError, ArithmeticError, RuntimeError, ValueError) as error:
            # One run that cannot be done must not cost the others.
            about = {"error": f"{error}" or type(error).__name__, "trace": traceback.format_exc()}
            about["measured"] = experiment.measure_digest(job)
            # With escapes: a message may name a file whose name is no UTF-8.
            write_text(folder / "failed.json", json.dumps(about, indent=1) + "\n", 0o600)
    return not worker.stop_requested  # it may have been asked after the last place where a job looks


def threads_of(count: int) -> int:
    """How many threads each of `count` processes has."""
    return max(1, len(os.sched_getaffinity(0)) // count)


def processes(
    experiment: Experiment, count: int, device: str, *, retry: float = 0.0, watch: Watch | None = None
) -> bool:
    """Do all jobs in `count` processes, each with its share of the cores; returns as :func:`work`."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads_of(count)), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "dpsyngen.experiments.pool", str(experiment.path), device, str(retry)]
    logs = experiment.path / "work"
    running: list[subprocess.Popen[bytes]] = []
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True
        for process in running:
            process.terminate()

    with handling(stop, signal.SIGINT, signal.SIGTERM):
        try:
            for number in range(count):
                log = os.open(logs / f"worker-{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
                # A session of its own: Ctrl-C on the terminal would otherwise reach it twice, and end it at once.
                running.append(subprocess.Popen(command, env=environment, start_new_session=True, **streams))
                os.close(log)
            while any(process.poll() is None for process in running):
                time.sleep(0.5)
                if watch:
                    watch(experiment.statuses())
        finally:
            for process in running:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
    failed = [i for i, process in enumerate(running) if process.returncode not in (0, STOPPED)]
    if failed and not stopped:
        path = logs / f"worker-{failed[0]}.log"
        tail = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise RunError(
            f"{len(failed)} of {count} worker processes ended with an error; what they had done is kept.  The log "
            f"{path} ends with: {' / '.join(tail)}"
        )
    return not stopped and all(process.returncode == 0 for process in running)


def main() -> None:
    """Work on an experiment as one of several processes."""
    path, device, *retry = sys.argv[1:]
    try:
        finished = work(Experiment(Path(path)), device, retry=float(*retry))
    except DpsyngenError as error:
        print(f"dpsyngen: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0 if finished else STOPPED)


if __name__ == "__main__":
    main()
