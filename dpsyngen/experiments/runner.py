"""Doing one job of an experiment: train, draw, measure.  Each part is kept, so an interrupted job goes on."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpsyngen import fit
from dpsyngen.config import load_config, merge_settings
from dpsyngen.data import ImageDataset
from dpsyngen.data.load import load_private
from dpsyngen.errors import ConfigError, DataError
from dpsyngen.evaluation import FeatureSpec, evaluate_images
from dpsyngen.evaluation.cas import require_enough
from dpsyngen.evaluation.run import training_images
from dpsyngen.experiments.dp_classifier import dp_classifier_reference, real_reference
from dpsyngen.experiments.experiment import Clock, Experiment, SharedNetworks, training_digest
from dpsyngen.experiments.spec import Job, Spec, digest
from dpsyngen.files import write_bytes, write_json, write_text
from dpsyngen.full_precision import ordinary_modes
from dpsyngen.generator.generator import ReleasedGenerator
from dpsyngen.privacy.accounting import default_delta
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training.log import Event, Step
from dpsyngen.training.moments import charged_moments
from dpsyngen.training.pipeline import Training
from dpsyngen.training.plan import program_of, shape_of
from dpsyngen.training.private import charged_mechanisms, charged_steps
from dpsyngen.training.run import Run

Tell = Callable[[str, int, int], None]


_DP_FACTS = ("network", "steps", "batch", "records", "parameters", "noise_multiplier", "learning_rate", "clipping_norm")


class Stopped(Exception):
    """The worker was asked to stop; everything is kept."""


class Images:
    """The real images of an experiment, read once by each process: for training, and for scoring if there are some."""

    def __init__(self, spec: Spec) -> None:
        d = spec.data
        config = load_config(merge_settings(spec.settings, {"data": d.section}), preset=spec.preset)
        self.train: ImageDataset = load_private(d.train, config)
        classes = len(self.train.class_names)
        found = {"records": len(self.train), "resolution": self.train.resolution, "channels": self.train.channels}
        found["classes"] = classes
        wrong = [f"{name} {found[name]:,} instead of {said:,}" for name, said in d.facts or () if found[name] != said]
        if wrong:
            what = f"{d.train} is not what the specification says in data.facts: {', '.join(wrong)}"
            raise DataError(f"{what}.  Give the right data with --data, or correct data.facts.")
        self.test: ImageDataset | None = None
        self.shape = shape_of(self.train, config)
        if d.test is not None:
            # Read as the training images are: what comes out is their form.
            test = load_private(d.test, config)
            if test.channels != self.train.channels:
                raise DataError(f"{d.test} and {d.train} are not both grey, or both of colour: convert one of them.")
            if test.resolution != self.train.resolution:
                sides = f"{test.resolution} pixels a side, and those of {d.train} {self.train.resolution}"
                warnings.warn(f"the images of {d.test} have {sides}: they are resized.", stacklevel=2)
                fixed = config.data.model_copy(update={"resolution": self.train.resolution})
                test = load_private(d.test, config.model_copy(update={"data": fixed}))
            self.test = test.with_classes(self.train.class_names, "test")
        if spec.evaluation.classifiers and classes < 2:
            have = f"the images of {d.train} have {'one class' if classes else 'no classes'}"
            raise ConfigError(f"{have}: there is nothing to classify.  Give evaluation: {{classifiers: []}}.")
        if spec.evaluation.classifiers:
            require_enough(spec.sampling.images, classes)
        if spec.sampling.guidance not in (None, 1) and not classes:
            raise ConfigError(f"the images of {d.train} have no classes: leave sampling.guidance out.")
        self._spec = spec

    @cached_property
    def programs(self) -> np.ndarray | None:
        """Images of the program for the ceiling, as many as are generated.

        None where it is not asked for, or where the runs vary the program, so that there is not one to measure.
        """
        spec = self._spec
        named = [c.settings for c in spec.grid.cases] + list(spec.grid.variant_settings.values())
        varied = [*spec.grid.axes, *(name for settings in named for name in settings)]
        asked = "programs" in spec.references and spec.evaluation.features
        if not asked or any(name.startswith("program.") for name in varied):
            return None
        count = min(spec.evaluation.max_images, spec.sampling.images)
        return program_of(load_config(dict(spec.settings), preset=spec.preset), self.shape).batch(range(count))


class Worker:
    """Does jobs, one at a time; `tell` is called with what is being done, how much of it is done, and of how much.

    After :meth:`stop`, :meth:`do` raises :class:`Stopped` soon, with everything kept.
    """

    def __init__(self, experiment: Experiment, images: Images, device: str, tell: Tell) -> None:
        self.experiment, self.images, self.device, self._tell = experiment, images, device, tell
        self.stop_requested = False
        self._training: Training | None = None

    def stop(self) -> None:
        """Ask to stop, also in the middle of a query of DP moments, which can take long: the training looks itself."""
        self.stop_requested = True
        if self._training is not None:
            self._training.stop_requested = True

    @ordinary_modes()
    def do(self, job: Job) -> None:
        """Do a job, or what is left, and keep its result; Stopped if asked to.  The caller holds the job's lock."""
        folder = self.experiment.work_path(job)
        if not (folder / "job.json").exists():
            write_json(folder / "job.json", {"settings": training_digest(job)}, 0o600)
        clock = Clock(folder / "times.json", self.device)
        kinds = {"run": self._run, "real": self._real, "dp-classifier": self._dp}
        try:
            found = kinds[job.kind](job, clock)
        finally:
            clock.add("other", save=True)
        measured = self.experiment.measure_digest(job)
        result = {"job": job.name, "measured": measured, "delta": None, "private": False, **found}
        unit = "core-seconds" if self.device == "cpu" else "seconds"
        machine = {"threads": torch.get_num_threads(), "device": self.device, "seconds_unit": unit}
        result["facts"] = {**machine, "seconds_training": sum(clock.spent.values()), **found["facts"]}
        result["evaluation"]["class_names"] = list(self.images.train.class_names)
        path = self.experiment.result_path(job)
        if path.exists():
            # Measured in another way before: kept, as somebody may have quoted it.
            earlier = path.with_name("earlier")
            earlier.mkdir(mode=0o700, exist_ok=True)
            path.rename(earlier / f"{job.name}.{digest(path.read_text(encoding='utf-8'))}.json")
        write_text(path, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n", 0o600)

    def _say(self, doing: str, done: int = 0, total: int = 0) -> None:
        self._tell(doing, done, total)
        if self.stop_requested:
            raise Stopped

    def _line(self, clock: Clock, part: str) -> Callable[[str], None]:
        def tell(text: str) -> None:
            clock.add(part)
            self._say(text)

        return tell

    def _run(self, job: Job, clock: Clock) -> dict[str, Any]:
        run = self._trained(job, clock)
        images, labels, drawn = self._drawn(job, run, clock)
        evaluation = self._measured(images, labels, job, clock) | {"sampling": drawn}
        ledger, spent = run.finished_ledger(), clock.spent
        # What another run spent on a network that both use counts for both: on its own this one would have spent it.
        public = sum(_by_phase(clock).values()) + spent.get("shared public", 0.0)
        facts = _of_training(run, ledger, run.config.data.records or len(self.images.train))
        facts |= {f"seconds_{part}": spent.get(part, 0.0) for part in ("private", "sampling", "evaluation")}
        facts |= {"seconds_public": public, "seconds_training": public + facts["seconds_private"]}
        return {
            "delta": ledger.delta,
            "private": not ledger.non_private and ledger.secure,
            "epsilon_spent": None if ledger.non_private else ledger.epsilon(),
            "facts": facts,
            "evaluation": evaluation,
        }

    def _trained(self, job: Job, clock: Clock) -> Run:
        path = self.experiment.run_path(job)
        if (path / "release" / "generator.json").exists():
            if training_images(run := Run(path), self.images.train) is None:
                raise DataError(f"{path} was trained on other images.  Put them back, or choose another --out.")
            return run
        assert job.config is not None
        phase = ""

        def on_event(event: Event) -> None:
            nonlocal phase
            if not isinstance(event, Step):
                return
            clock.add("private" if event.private else f"public {event.phase}")
            if event.phase != phase:
                # The public networks before this phase are finished.
                phase = event.phase
                networks.give(_by_phase(clock))
            self._tell(f"training: {event.phase}", event.step, event.steps)
            training.stop_requested = self.stop_requested  # a checkpoint is written, and the steps end

        if (path / "run.json").exists():
            training = fit.prepare_resume(path, self.images.train, self.device, on_event=on_event)
        else:
            training = fit.prepare(job.config, path, self.images.train, self.device, on_event=on_event)
        self._training, training.stop_requested = training, self.stop_requested
        with training.run.lock():
            self._tell("getting ready", 0, 0)
            networks = SharedNetworks(training, self.experiment.path / "public")
            clock.spent.setdefault("shared public", networks.take())
            clock.add("other")
            finished = fit.carry_out(training)
            networks.give(_by_phase(clock))
        if not finished:
            raise Stopped
        return training.run

    def _drawn(self, job: Job, run: Run, clock: Clock) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]]:
        s = self.experiment.spec.sampling
        path = self.experiment.work_path(job) / "samples.npz"
        generator = ReleasedGenerator(run.release, self.device)
        wanted = s.model_dump(exclude={"images"}, exclude_none=True)
        settings = {"seed": job.seed, **wanted}
        drawn = {"images": s.images, **generator.settings(**settings).model_dump()}
        stamp = digest([drawn, (run.release / "generator.json").read_text(encoding="utf-8")])
        # A damaged file, of which np.load raises many kinds of errors, is drawn again.
        with suppress(Exception), np.load(path, allow_pickle=False) as file:
            if str(file["stamp"]) == stamp:
                return file["images"], file.get("labels"), drawn
        clock.add("other")

        def progress(done: int, total: int) -> None:
            clock.add("sampling")
            self._say("drawing images", done, total)

        samples = generator.sample(s.images, on_progress=progress, **settings)
        clock.add("sampling")
        arrays: dict[str, Any] = {"images": samples.images, "labels": samples.labels, "stamp": stamp}
        content = io.BytesIO()
        np.savez_compressed(content, **{k: v for k, v in arrays.items() if v is not None})
        write_bytes(path, content.getvalue(), 0o600)
        return samples.images, samples.labels, drawn

    def _measured(self, images: np.ndarray, labels: np.ndarray | None, job: Job, clock: Clock) -> dict[str, Any]:
        e = self.experiment.spec.evaluation
        weights = None if e.inception_weights is None else Path(e.inception_weights)
        clock.add("other")
        result = evaluate_images(
            images,
            labels,
            reference=self.images.train,
            test=self.images.test,
            programs=self.images.programs,
            features=[FeatureSpec(f, weights) if f == "inception" else f for f in e.features],
            **e.model_dump(exclude={"features", "inception_weights"}),
            seed=job.seed,
            device=self.device,
            cache=self.experiment.path / "real",
            on_progress=self._line(clock, "evaluation"),
        )
        clock.add("evaluation")
        return result

    def _real(self, job: Job, clock: Clock) -> dict[str, Any]:
        assert self.images.test is not None
        sets, names = (self.images.train, self.images.test), self.experiment.spec.evaluation.classifiers
        tell = self._line(clock, "evaluation")
        cas = real_reference(*sets, classifiers=names, seed=job.seed, device=self.device, on_progress=tell)
        clock.add("evaluation")
        return {"facts": {}, "evaluation": {"features": {}, "cas": cas}}

    def _dp(self, job: Job, clock: Clock) -> dict[str, Any]:
        assert self.images.test is not None
        spec = self.experiment.spec
        privacy, records = load_config(dict(spec.settings), preset=spec.preset).privacy, self.images.shape.records
        delta = default_delta(records) if privacy.delta is None else privacy.delta
        seed = int.from_bytes(bytes.fromhex(digest(job.name))[:7]) if spec.noise == "seeded" else None
        # Kept, as every access to private images is; an attempt that was killed has its own.
        folder = self.experiment.work_path(job)
        attempt = sum(1 for _ in folder.glob("ledger-*.jsonl"))
        found = dp_classifier_reference(
            self.images.train,
            self.images.test,
            epsilon=job.epsilon,
            delta=delta,
            records=records,
            group_size=privacy.group_size,
            seed=seed,
            device=self.device,
            ledger=folder / f"ledger-{attempt}.jsonl",
            on_progress=self._line(clock, "private"),
            **spec.dp_classifier.model_dump(exclude_none=True),
        )
        clock.add("private")
        facts = {k: found[k] for k in _DP_FACTS} | {"private_images_seen": found["steps"] * found["batch"]}
        evaluation = {"features": {}, "cas": found["cas"]}
        return {"delta": delta, "private": found["private"], "facts": facts, "evaluation": evaluation}


def _by_phase(clock: Clock) -> dict[str, float]:
    return {k.removeprefix("public "): v for k, v in clock.spent.items() if k.startswith("public ")}


def _of_training(run: Run, ledger: Ledger, records: int) -> dict[str, float]:
    """What DP-SGD and DP moments did; a run that had no DP-SGD has no steps and no private network."""
    private, steps, noise = run.config.private, charged_steps(ledger), charged_mechanisms(ledger)
    read = len(charged_moments(ledger)) * records  # each query reads all images
    facts: dict[str, float] = {"records": records, "private_images_seen": steps * private.batch + read}
    if steps:
        facts |= {"steps": steps, "batch": private.batch, "copies": private.copies}
        facts["noise_multiplier"] = noise[0].noise_multiplier if noise else 0.0
    generator = ReleasedGenerator(run.release)
    if not generator.stages.gaussian:
        network = generator.networks[generator.stages.private.network]
        facts["parameters"] = sum(p.numel() for p in network.parameters())
    return facts
