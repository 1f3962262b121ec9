"""The folder of an experiment.  All of it is private: its figures come from private images.

::

    experiment.json   format, what all runs cost together
    spec.yaml         the specification, defaults written out
    runs/JOB/         run directories; what is in their release/ may be published at the cost of that run
    work/JOB/         lock, state, time spent, generated images
    results/JOB.json  settings, time and figures of a finished job
    public/           networks trained on programs alone, shared by the runs that need the same
    real/             features of the real images, kept between jobs
    results.csv, results.parquet, tables.md, report.html
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dpsyngen.config import Config
from dpsyngen.errors import RunError
from dpsyngen.evaluation.features import file_sha256
from dpsyngen.experiments.grid import Job, digest, jobs_of
from dpsyngen.experiments.spec import Spec, load_spec
from dpsyngen.files import require_absent_or_empty, write_text
from dpsyngen.version import __version__

FORMAT = 1
State = Literal["waiting", "running", "stopped", "failed", "done"]


@dataclass(frozen=True)
class Status:
    """How far a job is.

    Attributes:
        state: "stopped": begun, and nobody is at it.
        doing: what it is at, in words.
        done, total: of that.
        error: why it failed.
        seconds: computing time so far.
    """

    state: State
    doing: str = ""
    done: int = 0
    total: int = 0
    error: str = ""
    seconds: float = 0.0


class Experiment:
    """One experiment.

    Args:
        path: an existing folder (see :meth:`create`).

    Attributes:
        spec: what it is.
        jobs: what it consists of.

    Raises:
        RunError: not the folder of an experiment, or of another format.
        ConfigError: its specification was damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.about: dict[str, Any] = json.loads((path / "experiment.json").read_text(encoding="utf-8"))
            found = self.about["format"]
        except (OSError, ValueError, KeyError, TypeError):
            raise RunError(
                f"{path} is not the folder of an experiment (no readable experiment.json).  Give the folder that "
                "`dpsyngen compare SPEC --out` made."
            ) from None
        if found != FORMAT:
            raise RunError(f"{path} has experiment format {found}, but dpsyngen {__version__} reads format {FORMAT}.")
        self.spec = load_spec(path / "spec.yaml")
        self.jobs = jobs_of(self.spec)

    @classmethod
    def open_or_create(cls, path: Path, spec: Spec) -> Experiment:
        """The experiment at `path`, made if there is none; one that is there goes on with `spec`.

        A specification may grow (more seeds, variants, ε), and may change what is measured.  Runs that were begun keep
        their settings: a specification that would change them is refused.

        Raises:
            RunError: there is something else at `path`, or runs there have other settings.
        """
        jobs = jobs_of(spec)
        if (path / "experiment.json").exists():
            before = cls(path)
            changed = [job.name for job in jobs if before.begun_otherwise(job)]
            if changed:
                raise RunError(
                    f"{path} holds runs with other settings than the specification asks for now: "
                    f"{', '.join(changed[:3])}{', …' if len(changed) > 3 else ''}.  Undo the change, give the new "
                    "settings a label (grid.cases), or choose another --out."
                )
        else:
            require_absent_or_empty(path, "--out")
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.chmod(path, 0o700)
        for name in ("runs", "work", "results", "public", "real"):
            (path / name).mkdir(mode=0o700, exist_ok=True)
        write_text(path / "spec.yaml", spec.to_yaml(), 0o600)
        if not (path / "experiment.json").exists():
            write_text(path / "experiment.json", _json({"format": FORMAT, "dpsyngen": __version__}), 0o600)
        return cls(path)

    def note(self, **values: Any) -> None:
        """Keep facts about the experiment in ``experiment.json``."""
        self.about |= values
        write_text(self.path / "experiment.json", _json(self.about), 0o600)

    # ------------------------------------------------------------------------------------------- jobs

    def run_path(self, job: Job) -> Path:
        return self.path / "runs" / job.name

    def work_path(self, job: Job) -> Path:
        return self.path / "work" / job.name

    def result_path(self, job: Job) -> Path:
        return self.path / "results" / f"{job.name}.json"

    def begun_otherwise(self, job: Job) -> bool:
        """Whether the run of that name was begun with other settings than `job` has."""
        begun = _read(self.work_path(job) / "job.json")
        return begun is not None and begun.get("settings") != training_digest(job)

    def result(self, job: Job) -> dict[str, Any] | None:
        """What a finished job found; None if it is not finished, or was measured in another way than is asked now."""
        found = _read(self.result_path(job))
        return found if found is not None and found.get("measured") == self.measure_digest(job) else None

    def measure_digest(self, job: Job) -> str:
        """Of everything that decides the figures of a job, beyond the run itself."""
        spec = self.spec.model_dump(mode="json")
        # A user's own features are what is in their file, not what it is called.
        files = (Path(name.rpartition(":")[0]) for name in self.spec.evaluation.features)
        own = {str(f): file_sha256(f) for f in files if f.suffix == ".py" and f.is_file()}
        if own:
            spec["evaluation"]["own"] = own
        parts = ["data", "evaluation", *(["sampling"] if job.kind == "run" else [])]
        if job.kind == "dp-classifier":
            parts.append("dp_classifier")
        return digest({"parts": {p: spec[p] for p in parts}, "settings": training_digest(job)})

    def status(self, job: Job) -> Status:
        """How far a job is, as its worker last said."""
        seconds = float((_read(self.work_path(job) / "times.json") or {}).get("total", 0.0))
        if self.result(job) is not None:
            return Status("done", seconds=seconds)
        failed = self.failure(job)
        if failed is not None:
            return Status("failed", error=failed, seconds=seconds)
        folder = self.work_path(job)
        if not folder.exists():
            return Status("waiting")
        said = _read(folder / "status.json") or {}
        at = str(said.get("doing", "")), int(said.get("done", 0)), int(said.get("total", 0))
        with claimed(folder / "lock") as free:
            return Status("stopped" if free else "running", *at, seconds=seconds)

    def failure(self, job: Job) -> str | None:
        """Why a job failed; None if it did not, or would be done in another way now."""
        failed = _read(self.work_path(job) / "failed.json")
        return (
            None if failed is None or failed.get("measured") != self.measure_digest(job) else str(failed.get("error"))
        )

    def statuses(self) -> dict[str, Status]:
        """Of all jobs, by name."""
        return {job.name: self.status(job) for job in self.jobs}

    def seconds(self) -> float:
        """Computing time of all jobs so far."""
        times = (_read(self.work_path(job) / "times.json") or {} for job in self.jobs)
        return sum(float(t.get("total", 0.0)) for t in times)


def training_digest(job: Job) -> str:
    """Of the settings that make a run what it is; where its images lie is not one of them."""
    if job.config is None:
        return digest([job.kind, job.epsilon, job.seed])
    return digest(_without_places(job.config))


def _without_places(config: Config) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    values["privacy"].pop("budget")
    for section in ("private", "public"):
        values[section].pop("checkpoint_every")
    values["private"].pop("physical_batch")
    values.pop("sampling")
    values.pop("logging", None)
    return values


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold a lock file; False if another process has it.  The system frees it however we end."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(handle)


class Clock:
    """Computing time of a job, by what it was spent on; it goes on where a killed process left it.

    On a CPU it counts core-seconds: they mean the same on a busy machine and on an idle one.

    Args:
        path: where it is kept, every few seconds.
        device: where the job computes; elsewhere than on a CPU the time on the wall is counted.
    """

    every = 5.0

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.path = path
        self._now = time.process_time if device == "cpu" else time.monotonic
        kept = _read(path) or {}
        self.spent: dict[str, float] = {k: float(v) for k, v in kept.items() if k != "total"}
        self._since = self._now()
        self._kept = time.monotonic()

    def add(self, what: str, save: bool = False) -> None:
        """Count the time since the last call for `what`."""
        now = self._now()
        self.spent[what] = self.spent.get(what, 0.0) + now - self._since
        self._since = now
        if save or time.monotonic() - self._kept > self.every:
            self._kept = time.monotonic()
            self.save()

    def credit(self, what: str, seconds: float) -> None:
        """Count time that another job spent for this one too."""
        self.spent[what] = self.spent.get(what, 0.0) + seconds

    def save(self) -> None:
        """Write it."""
        own = sum(v for k, v in self.spent.items() if not k.startswith("shared"))
        write_text(self.path, _json({**self.spent, "total": own}), 0o600)


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def _read(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
    return None
