"""The library's front door: train, evaluate, report.  The command line is a thin layer over these."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpsyngen.config import ComputeConfig, Config, load_config
from dpsyngen.data import ImageDataset, MapStyle, load_images
from dpsyngen.distributed import ALONE, Ranks, device_of, joined
from dpsyngen.errors import ConfigError, DataError
from dpsyngen.files import write_text
from dpsyngen.hardware import kind_of
from dpsyngen.training.follower import follow, read_together
from dpsyngen.training.new_run import require_new
from dpsyngen.training.pipeline import Training
from dpsyngen.training.plan import shape_of
from dpsyngen.training.public import Progress
from dpsyngen.training.run import Run
from dpsyngen.training.start import require_unfinished, resume, start

if TYPE_CHECKING:
    from dpsyngen.console import Console
    from dpsyngen.generator.generator import Generator

PathLike = str | os.PathLike[str]
Source = PathLike | ImageDataset | MapStyle | tuple[np.ndarray, np.ndarray | None]


def load_private(source: Source, config: Config, on_progress: Callable[[int, int], None] | None = None) -> ImageDataset:
    """The private images as `config` asks for them: size, colour, with or without classes.

    Args:
        source: see :func:`dpsyngen.data.load_images`; an ImageDataset is taken as it is.
        config: its section ``data`` counts.
        on_progress: called as ``(done, total)`` while images are decoded, which can take long for large sets.
    """
    d = config.data
    if isinstance(source, ImageDataset):
        return source
    return load_images(
        source,
        resolution=d.resolution,
        channels=d.channels,
        labels=d.labels,
        skip_bad=d.skip_bad,
        cache=d.cache,
        workers=d.workers,
        on_progress=on_progress,
    )


def _named_or_given(
    data: Source | None, config: Config, on_reading: Callable[[int, int], None] | None = None
) -> ImageDataset:
    """The images that were given, or else those that the configuration names."""
    source = config.data.source if data is None else data
    if isinstance(source, str) and not source:
        raise ConfigError(
            "no images were given: use --data with a folder, a file or a named set.  A run that was started from "
            "arrays in memory needs the same images again as data."
        )
    return load_private(source, config, on_reading)


def prepare(
    config: Config,
    out: PathLike,
    data: Source | None = None,
    device: str = "cpu",
    ranks: Ranks = ALONE,
    on_reading: Callable[[int, int], None] | None = None,
) -> Training:
    """Read the images, check everything, and make the run directory; nothing is spent yet.

    Args:
        config: all settings.
        out: a folder that does not exist or is empty.  The training that is returned holds its lock.
        data: the private images; None: what ``config.data.source`` names.
        device: "cpu", "cuda", …
        ranks: the processes that share the work; this is the main one, the others are in :func:`follow_training`.
        on_reading: called as ``(done, total)`` while images are decoded.  How many there are is private where the
            configuration declares another number.

    Raises:
        ConfigError, DataError, RunError: see their messages.
    """
    require_new(Path(out))
    check_device(device, config.compute)
    dataset = read_together(ranks, config, lambda c: _named_or_given(data, c, on_reading))
    return start(config, dataset, Path(out), device, ranks)


def prepare_resume(
    out: PathLike,
    data: Source | None = None,
    device: str = "cpu",
    tensorboard: bool | None = None,
    ranks: Ranks = ALONE,
    on_reading: Callable[[int, int], None] | None = None,
) -> Training:
    """Go on with the interrupted run in `out`, by default with the images it was started with.

    Args:
        out: the run directory.
        data: the same images, if they have moved.
        device: where to compute.
        tensorboard: whether this session writes files for TensorBoard; None: what the run's settings say.
        ranks: as in :func:`prepare`; another number of processes than before will do.
        on_reading: as in :func:`prepare`.
    """
    check_device(device)
    run = Run(Path(out))
    require_unfinished(run)
    # Before the images are read, which can take long.
    run.open_for_writing()
    dataset = read_together(ranks, run.config, lambda c: _named_or_given(data, c, on_reading))
    return resume(run, dataset, device, tensorboard, ranks)


def follow_training(ranks: Ranks, data: Source | None = None, device: str = "cpu") -> None:
    """In every process but the main one: share the training that the main one leads, to its end.

    Args:
        ranks: the processes.
        data: as it is given to :func:`prepare` in the main process.
        device: where to compute.

    Raises:
        Dismissed: the main process failed, and said why.
        RankLost: a process is gone.
    """
    check_device(device)
    follow(ranks, lambda config: _named_or_given(data, config), device)


def train(
    data: Source,
    *,
    out: PathLike,
    epsilon: float,
    delta: float | None = None,
    preset: str | None = None,
    settings: Mapping[str, Any] | None = None,
    device: str = "auto",
    on_progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Train a generator on private images with (ε, δ)-differential privacy.

    :meth:`dpsyngen.Generator.fit` is the same with a generator as the result, and with more to see.  In a script that
    torchrun starts all processes call this alike and share the work (docs/distributed.md).

    Args:
        data: a folder, file or named set; an :class:`ImageDataset`; or (images, labels) arrays.
        out: the run directory to make.
        epsilon: ε > 0 for one image, add/remove adjacency; ``math.inf`` trains without privacy, for reference.
        delta: δ; None: the largest power of ten below the inverse of the number of images.
        preset: see :func:`dpsyngen.config.preset_names`.
        settings: nested overrides of the preset, such as ``{"private": {"steps": 500}}``.
        device: where to compute: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", ….
        on_progress: called after each step.

    Returns:
        the finished run; ``run.release`` is safe to publish.  ``run.private / "health.json"`` says what looks wrong.

    Raises:
        ConfigError, DataError, RunError: before anything is spent.
        KeyboardInterrupt: it was interrupted, with a checkpoint; :func:`prepare_resume` goes on.
    """
    from dpsyngen.fitting import with_options

    given = with_options(
        settings,
        privacy__epsilon=epsilon,
        privacy__delta=delta,
        data__source=os.fspath(data) if isinstance(data, str | os.PathLike) else None,
    )
    config, device = load_config(given, preset=preset), kind_of(device)
    return train_together(
        lambda own, ranks: prepare(config, out, data, own, ranks), out, data, device, on_progress=on_progress
    )


def train_together(
    begin: Callable[[str, Ranks], Training],
    out: PathLike,
    data: Source | None,
    device: str,
    *,
    console: Console | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Train to the end, in this process or in all that torchrun started; all of them call this alike.

    Args:
        begin: what makes the training (:func:`prepare` or :func:`prepare_resume`), given the device of this process and
            the processes; called in the main one.
        out: the run directory.
        data: the private images; None: what the run's settings name.
        device: where to compute.
        console: where the main process tells what is going on; None: nowhere.
        on_progress: called in the main process after each step.

    Returns:
        the finished run.

    Raises:
        KeyboardInterrupt: it was interrupted; the message says how to go on.
    """
    from dpsyngen.fitting import carry_out

    with joined() as ranks:
        device = device_of(device, ranks)
        if not ranks.main:
            follow_training(ranks, data, device)
            return Run(Path(out))
        with ranks.leading():
            training = begin(device, ranks)
            carry_out(training, console, on_progress)
        return training.run


def check_device(device: str, compute: ComputeConfig | None = None) -> None:
    """Raise ConfigError if this machine cannot compute on `device`, or not as `compute` asks; see
    :func:`dpsyngen.hardware.choose`.
    """
    from dpsyngen.hardware import choose

    choose(device, compute)


def _as_run(run: Run | PathLike) -> Run:
    return run if isinstance(run, Run) else Run(Path(run))


def evaluate(
    run: Run | PathLike,
    *,
    data: Source | None = None,
    test: Source | None = None,
    images: int = 10_000,
    features: Sequence[str] = ("pixels-pca",),
    metrics: Sequence[str] | None = None,
    classifiers: Sequence[str] = ("logreg", "mlp", "cnn"),
    bootstrap: int = 200,
    max_images: int = 10_000,
    inception_weights: PathLike | None = None,
    cache: bool = True,
    sampling: dict[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    on_progress: Callable[[str], None] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Measure a run against real images.  Every figure is private: it lands in ``private/metrics.json`` only.

    Args:
        run: a finished run.
        data: the real training images; None: those the run was trained on.
        test: real test images, with labels for the classification accuracy score, and for the floor of the other
            figures; None: neither.
        images: how many images to generate.  As many are drawn by the run's program, for the ceiling.
        features: names of feature extractors, or of a user's own (``path/to/module.py:name``), which are run.
        metrics: names of metrics, see docs/metrics.md; None: all.
        classifiers: names of classifiers for the classification accuracy score.
        bootstrap: replicates for the 95 % intervals; 0: none.
        max_images: of each set, for `metrics`; a random subset beyond that.
        inception_weights: weights file for the feature extractor "inception".
        cache: keep features of real images in the run's private half, so that the next evaluation is faster.
        sampling: settings of the sampler, as for :meth:`Generator.settings`.
        seed: seed of the generated images and of the classifiers.
        device: where to compute, as for :func:`train`.
        on_progress: called with a line about what is being done.
        ranks: the processes that share the work; this is the main one, the others are in :func:`follow_evaluation`.

    Returns:
        the figures and the protocol of each, as written to the file.
    """
    from dpsyngen.evaluation import FeatureSpec, evaluate_images
    from dpsyngen.evaluation.cas import NAMES
    from dpsyngen.evaluation.figures import NAMES as METRICS
    from dpsyngen.evaluation.figures import check_sizes, checked_metrics
    from dpsyngen.evaluation.own_features import OwnFeatures
    from dpsyngen.generator.ranks import open_everywhere, sample

    run = _as_run(run)
    run.require_complete()
    device = kind_of(device)
    own_device = device_of(device, ranks)
    check_device(own_device)
    weights = None if inception_weights is None else Path(inception_weights)
    specs = [FeatureSpec(name, weights if name == "inception" else None) for name in features]
    asked = checked_metrics(METRICS if metrics is None else metrics)
    check_sizes(bootstrap, max_images)
    unknown = [name for name in classifiers if name not in NAMES]
    if unknown:
        raise ConfigError(f"classifiers are {', '.join(map(repr, unknown))}, but must be among {', '.join(NAMES)}.")
    tell = on_progress or (lambda line: None)
    config = run.config
    source = config.data.source if data is None else data
    if isinstance(source, str) and not source:
        raise ConfigError("the run was trained on arrays in memory: give the images as data.")
    generator = open_everywhere(ranks, run.release, device)
    wanted = config.model_copy(
        update={
            "data": config.data.model_copy(
                update={
                    "resolution": generator.resolution,
                    "channels": "grey" if generator.channels == 1 else "rgb",
                    "labels": bool(generator.class_names),
                }
            )
        }
    )
    reference = load_private(source, wanted)
    held_out = None if test is None else load_private(test, wanted)
    for name, dataset in (("data", reference), ("test", held_out)):
        if dataset is not None and dataset.class_names != generator.class_names:
            raise DataError(
                f"the {name} images have the classes {', '.join(dataset.class_names) or '(none)'}, but the generator "
                f"has {', '.join(generator.class_names) or '(none)'}.  Give images with the same class folders."
            )
    for spec in specs if asked else []:
        # What is missing or wrong should show before images are generated and the ledger is written.
        extractor = spec.make(own_device)
        if isinstance(extractor, OwnFeatures):
            extractor.try_out(generator.channels, generator.resolution)
    # All the while, so that it cannot be refused after an hour's work.
    with run.lock():
        ledger = run.finished_ledger()
        tell(f"generating {images:,} images")
        chosen = {"seed": seed, **(sampling or {})}
        samples = sample(ranks, generator, images, **chosen)
        ledger.note_private_access(
            "evaluation against real images; the figures stay in the private half",
            features=list(features),
            metrics=list(asked),
            classifiers=list(classifiers) if held_out is not None else [],
        )
        result = evaluate_images(
            samples.images,
            samples.labels,
            reference=reference,
            test=held_out,
            programs=_drawn_by_program(config, generator, min(images, max_images)) if asked else None,
            features=specs,
            metrics=asked,
            classifiers=tuple(classifiers),
            seed=seed,
            device=device,
            max_images=max_images,
            bootstrap=bootstrap,
            cache=run.features_path if cache else None,
            on_progress=tell,
            ranks=ranks,
        )
        result["sampling"] = samples.settings
        write_text(run.private / "metrics.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n", 0o600)
    return result


def follow_evaluation(ranks: Ranks) -> None:
    """In every process but the main one: share the evaluation that the main one leads, to its end.

    Raises:
        Dismissed: the main process failed, and said why.
        RankLost: a process is gone.
    """
    from dpsyngen.evaluation import shared_out
    from dpsyngen.generator import ranks as sampling_ranks

    sampling_ranks.follow(ranks, {**sampling_ranks.handlers(ranks), **shared_out.handlers(ranks)})


def _drawn_by_program(config: Config, generator: Generator, count: int) -> np.ndarray | None:
    """The run's public images, from the first; None where they cannot be drawn, as for lack of a font."""
    from dpsyngen.programs import make_program

    p = config.program
    try:
        program = make_program(
            p.name, resolution=generator.resolution, channels=generator.channels, seed=p.seed, **p.params
        )
    except ConfigError:
        return None
    return program.batch(range(count))


def write_report(run: Run | PathLike) -> tuple[Path, Path]:
    """Write the report of a finished run, twice: the full one into ``private/``, the publishable into ``release/``.

    Returns:
        paths of the private and of the public report.
    """
    from dpsyngen.report.html import write_reports

    run = _as_run(run)
    run.require_complete()
    with run.lock():
        run.finished_ledger()
        return write_reports(run)


__all__ = ["evaluate", "prepare", "prepare_resume", "shape_of", "train", "write_report"]
