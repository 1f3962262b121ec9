"""The folder of an experiment.  All of it is private: its figures come from private images.

::

    experiment.json   format, what all runs cost together
    spec.yaml         the specification, defaults written out
    runs/JOB/         run directories; what is in their release/ may be published at the cost of that run
    work/JOB/         lock, state, time spent, generated images
    results/JOB.json  settings, time and figures of a finished job
    public/           networks trained on programs alone, shared by the runs that need the same
    real/             features of the real images, kept between jobs
    images.json       digests of the images that all figures are of
    results.csv, tables.md, plots/, report.html
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from dpsyngen.config import Config, load_config
from dpsyngen.data import ImageDataset
from dpsyngen.data.load import whole_source, with_whole_paths
from dpsyngen.diffusion.prior import SHIPPED
from dpsyngen.diffusion.stages import StageMap
from dpsyngen.errors import DataError, RunError, listed
from dpsyngen.experiments.spec import GridSpec, Job, Spec, digest, jobs_of, load_spec
from dpsyngen.files import file_sha256, require_absent_or_empty, write_bytes, write_json, write_text
from dpsyngen.training.log import JsonLines
from dpsyngen.training.pipeline import Training
from dpsyngen.training.plan import Shape
from dpsyngen.training.public import PRETRAIN, pretraining
from dpsyngen.training.run import Run
from dpsyngen.training.session import fixed_settings
from dpsyngen.version import __version__

FORMAT = 1
State = Literal["waiting", "running", "stopped", "failed", "done"]


@dataclass(frozen=True)
class Status:
    """How far a job is: what it is at, how much of that is done, and why it failed.

    "stopped" is begun, and nobody is at it.
    """

    state: State
    doing: str = ""
    done: int = 0
    total: int = 0
    error: str = ""


class Experiment:
    """One experiment, in an existing folder (see :meth:`open_or_create`).

    Raises:
        RunError: not the folder of an experiment, or of another format.
        ConfigError: its specification was damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.about = path, _read(path / "experiment.json")
        found = self.about.get("format")
        if found is None:
            raise RunError(f"{path} is not the folder of an experiment: give one that `dpsyngen compare --out` made.")
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
        spec = _whole(spec)
        jobs = jobs_of(spec)
        if (path / "work").exists():  # made after the other two files
            before = cls(path)
            changed = [job.name for job in jobs if before.begun_otherwise(job)]
            if changed:
                raise RunError(
                    f"{path} holds runs with other settings than the specification asks for now: {listed(changed, 3)}."
                    "  Undo the change, give the new settings a label (grid.cases), or choose another --out."
                )
        elif not (path / "experiment.json").exists():
            require_absent_or_empty(path, "--out")
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with contextlib.suppress(PermissionError):  # a mounted disk of somebody else's; all that is in it is closed
                os.chmod(path, 0o700)
            write_json(path / "experiment.json", {"format": FORMAT, "dpsyngen": __version__}, 0o600)
        write_text(path / "spec.yaml", spec.to_yaml(), 0o600)
        for name in ("runs", "results", "public", "real", "work"):
            (path / name).mkdir(mode=0o700, exist_ok=True)
        return cls(path)

    def note(self, **values: Any) -> None:
        """Keep facts about the experiment in ``experiment.json``."""
        self.about |= values
        write_json(self.path / "experiment.json", self.about, 0o600)

    def pin(self, spec: Spec, train: ImageDataset, test: ImageDataset | None) -> None:
        """Write down which images the figures are of, by what they are, or refuse to go on with others.

        Test images may be replaced by others that the specification names; jobs are measured again then.

        Raises:
            DataError: runs on different images would be pooled into one mean.
        """
        d, known = _whole(spec).data, _read(self.path / "images.json")
        if not any((self.work_path(job) / "job.json").exists() for job in self.jobs):
            known = {}
        own, found = train.fingerprint(), test and test.fingerprint()
        pinned = {"train": known.get("train", own), "tests": dict(known.get("tests", {}))}
        same = pinned["train"] == own
        if not same or (found and pinned["tests"].setdefault(d.test, found) != found):
            what = f"test images in {d.test}" if same else f"training images in {d.train}"
            raise DataError(
                f"the {what} are not those that {self.path} was begun with: figures of runs on different images "
                "must not be pooled.  Put the images back, or choose another --out."
            )
        if known != pinned:
            write_json(self.path / "images.json", pinned, 0o600)

    # ------------------------------------------------------------------------------------------- jobs

    def run_path(self, job: Job) -> Path:
        return self.path / "runs" / job.name

    def work_path(self, job: Job) -> Path:
        return self.path / "work" / job.name

    def result_path(self, job: Job) -> Path:
        return self.path / "results" / f"{job.name}.json"

    def begun_otherwise(self, job: Job) -> bool:
        """Whether the run of that name was begun with other settings than `job` has."""
        begun, path = _read(self.work_path(job) / "job.json"), self.run_path(job)
        if begun and begun.get("settings") != training_digest(job):
            return True
        if job.config is None or not (path / "run.json").exists():
            return False
        return Run(path).config.sampling != job.config.sampling  # changes no training, but a run draws as it was begun

    def result(self, job: Job) -> dict[str, Any] | None:
        """What a finished job found; None if it is not finished, or was measured in another way than is asked now."""
        found = _read(self.result_path(job))
        return found if found.get("measured") == self.measure_digest(job) else None

    def measure_digest(self, job: Job) -> str:
        """Of everything that decides the figures of a job, beyond the run itself."""
        spec = self.spec.model_dump(mode="json")
        # A user's own features are what is in their file, not what it is called.
        files = (Path(name.rpartition(":")[0]) for name in self.spec.evaluation.features)
        own = {str(f): file_sha256(f) for f in files if f.suffix == ".py" and f.is_file()}
        if own:
            spec["evaluation"]["own"] = own
        if job.kind == "run" and "programs" not in spec["references"]:
            spec["evaluation"]["ceiling"] = False
        # Images, too, are what they are and not where they lie.
        images = _read(self.path / "images.json")
        spec["data"] = [images.get("train"), images.get("tests", {}).get(self.spec.data.test)]
        parts = ["data", "evaluation", *(["sampling"] if job.kind == "run" else [])]
        if job.kind == "dp-classifier":
            parts.append("dp_classifier")
            promise = load_config(dict(self.spec.settings), preset=self.spec.preset).privacy
            spec["dp_classifier"] |= {"delta": promise.delta, "group_size": promise.group_size}
            spec["dp_classifier"]["records"] = self.spec.data.records
        return digest({"parts": {p: spec[p] for p in parts}, "settings": training_digest(job)})

    def status(self, job: Job) -> Status:
        """How far a job is, as its worker last said."""
        if self.result(job) is not None:
            return Status("done")
        failed = self.failure(job)
        if failed is not None:
            return Status("failed", error=failed)
        folder = self.work_path(job)
        if not folder.exists():
            return Status("waiting")
        said = _read(folder / "status.json")
        with claimed(folder / "lock") as free:
            return Status("stopped" if free else "running", **said)

    def failure(self, job: Job) -> str | None:
        """Why a job failed; None if it did not, or would be done in another way now."""
        failed = _read(self.work_path(job) / "failed.json")
        return str(failed.get("error")) if failed.get("measured") == self.measure_digest(job) else None

    def statuses(self) -> dict[str, Status]:
        return {job.name: self.status(job) for job in self.jobs}

    def seconds(self) -> float:
        """Computing time of all jobs so far."""
        return sum(float(_read(self.work_path(job) / "times.json").get("total", 0.0)) for job in self.jobs)


def training_digest(job: Job) -> str:
    """Of the settings that make a run what it is; where its images lie is not one of them."""
    return digest([job.kind, job.epsilon, job.seed] if job.config is None else fixed_settings(job.config))


def _whole(spec: Spec) -> Spec:
    """The specification with absolute paths, for calls from another working folder."""
    d, weights, budget = spec.data, spec.evaluation.inception_weights, spec.cost.budget_file
    where = {"train": whole_source(d.train), "test": d.test and whole_source(d.test)}
    # FILE.py:NAME is a user's own; package.module:NAME is no path.
    features = tuple(os.path.abspath(f) if ".py:" in f else f for f in spec.evaluation.features)
    measured = {"features": features, "inception_weights": weights and os.path.abspath(weights)}
    parts = {
        "data": with_whole_paths(d).model_copy(update=where),
        "evaluation": spec.evaluation.model_copy(update=measured),
        "cost": spec.cost.model_copy(update={"budget_file": budget and os.path.abspath(budget)}),
        "settings": _with_whole_priors(spec.settings),
        "grid": GridSpec.model_validate(_with_whole_priors(spec.grid.model_dump())),
    }
    return spec.model_copy(update=parts)


def _with_whole_priors(value: Any, name: str = "") -> Any:
    """Settings, by section or full name, one or several values of each, with absolute paths of priors."""
    if isinstance(value, dict):
        return {key: _with_whole_priors(v, f"{name}.{key}") for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_with_whole_priors(v, name) for v in value]
    path = isinstance(value, str) and value != SHIPPED and name.endswith(".network.prior")
    return os.path.abspath(value) if path else value


@contextmanager
def claimed(path: Path, patience: float = 0.0) -> Iterator[bool]:
    """Hold a lock file; False if another process has it for `patience` seconds.  The system frees it however we end."""
    lock = FileLock(path, timeout=patience, mode=0o600)
    with contextlib.suppress(Timeout):
        lock.acquire()
    try:
        yield lock.is_locked
    finally:
        lock.release()


class Clock:
    """Computing time of a job, by what it was spent on; it goes on where a killed process left it.

    On a CPU it counts core-seconds, which mean the same on a busy machine and on an idle one; elsewhere the time on the
    wall.  It is kept in a file, every few seconds.
    """

    every = 5.0

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.path = path
        self._now = time.process_time if device == "cpu" else time.monotonic
        self.spent: dict[str, float] = {k: float(v) for k, v in _read(path).items() if k != "total"}
        self._since = self._now()
        self._kept = time.monotonic()

    def add(self, what: str, save: bool = False) -> None:
        """Count the time since the last call for `what`."""
        now = self._now()
        self.spent[what] = self.spent.get(what, 0.0) + now - self._since
        self._since = now
        if save or time.monotonic() - self._kept > self.every:
            self._kept = time.monotonic()
            own = sum(v for k, v in self.spent.items() if not k.startswith("shared"))
            write_json(self.path, {**self.spent, "total": own}, 0o600)


def _read(path: Path) -> dict[str, Any]:
    """What a file holds; {} if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError):  # the last for a file of brackets alone
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
    return {}


# -------------------------------------------------------------------------------------- shared public networks
#
# Networks that were trained on programs alone depend on public settings and public seeds only, so the cleaning network
# of seed 0 is the same in Cleaning and in Both, at every ε and every τ of the other stage.  Training it once saves most
# of an experiment's public steps and changes no run by a bit.


@dataclass(frozen=True)
class PublicNetwork:
    """A network that a run trains on programs: its phase, its name, and a digest of all that decides its weights."""

    phase: str
    network: str
    key: str


def networks_of(config: Config, stages: StageMap, shape: Shape) -> tuple[PublicNetwork, ...]:
    """The public networks that a run needs, in the order of its phases; none where one network serves all stages."""
    found = [pretraining(stages)] if stages.pretrain else []
    found += [s for s in stages.public if s.network != stages.private.network]
    program = config.program.model_dump(mode="json", exclude={"prior_tier"})
    out = []
    for stage in found:
        phase = stage.name
        facts: dict[str, Any] = {"version": __version__, "phase": phase, "stage": [str(stage.low), str(stage.high)]}
        facts |= {"network": config.network.model_dump(mode="json"), "program": program}
        facts["public"] = config.public.model_dump(mode="json", exclude={"checkpoint_every"})
        facts["shape"] = [shape.resolution, shape.channels, shape.num_classes if phase == PRETRAIN else 0]
        out.append(PublicNetwork(phase, stage.network, digest(facts)))
    return tuple(out)


class SharedNetworks:
    """The public networks of one run, between it and the experiment.

    Nobody waits for a network that another process is training: training it, too, gives the same in the same time.
    """

    def __init__(self, training: Training, folder: Path) -> None:
        self.run, self.folder = training.run, folder
        self.wanted = networks_of(training.config, training.plan.stages, training.plan.shape)
        self._log = JsonLines(self.run.release / "public_training.jsonl", 0o644)

    def take(self) -> float:
        """Copy what is there into the run; returns the seconds that it took to train."""
        seconds = 0.0
        for one in self.wanted:
            about = _read(self.folder / one.key / "about.json")
            seconds += float(about.get("seconds", 0.0))
            if about and not self.run.weights(one.network).exists():
                self._log.cut(one.phase, 0)
                for line in about["log"]:
                    self._log.append(**line)
                weights = (self.folder / one.key / "weights.safetensors").read_bytes()
                write_bytes(self.run.weights(one.network), weights)
        return seconds

    def give(self, seconds: dict[str, float]) -> None:
        """Keep what the run has trained, for the other runs; `seconds` by phase."""
        for one in self.wanted:
            place, trained = self.folder / one.key, self.run.weights(one.network)
            if trained.exists() and not (place / "about.json").exists():
                place.mkdir(mode=0o700, exist_ok=True)
                write_bytes(place / "weights.safetensors", trained.read_bytes())
                log = [line for line in self._log.read() if line["phase"] == one.phase]
                about = {"phase": one.phase, "seconds": seconds.get(one.phase, 0.0), "log": log}
                write_json(place / "about.json", about, 0o600)
