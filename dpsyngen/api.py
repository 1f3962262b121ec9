"""The library's front door: train, evaluate, report.  The command line is a thin layer over these."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpsyngen.config import Config, load_config
from dpsyngen.data import ImageDataset, load_images
from dpsyngen.errors import ConfigError, DataError
from dpsyngen.files import write_text
from dpsyngen.training.new_run import require_new
from dpsyngen.training.pipeline import Training
from dpsyngen.training.plan import shape_of
from dpsyngen.training.public import Progress
from dpsyngen.training.run import Run
from dpsyngen.training.start import require_unfinished, resume, start

if TYPE_CHECKING:
    from dpsyngen.generator import Generator

PathLike = str | os.PathLike[str]
Source = PathLike | ImageDataset | tuple[np.ndarray, np.ndarray | None]


def load_private(source: Source, config: Config) -> ImageDataset:
    """The private images as `config` asks for them: size, colour, with or without classes."""
    d = config.data
    if isinstance(source, ImageDataset):
        return source
    return load_images(source, resolution=d.resolution, channels=d.channels, labels=d.labels, skip_bad=d.skip_bad)


def prepare(config: Config, out: PathLike, data: Source | None = None, device: str = "cpu") -> Training:
    """Read the images, check everything, and make the run directory; nothing is spent yet.

    Args:
        config: all settings.
        out: a folder that does not exist or is empty.  The training that is returned holds its lock.
        data: the private images; None: what ``config.data.source`` names.
        device: "cpu", "cuda", …

    Raises:
        ConfigError, DataError, RunError: see their messages.
    """
    require_new(Path(out))
    check_device(device)
    source = config.data.source if data is None else data
    if isinstance(source, str) and not source:
        raise ConfigError("no images were given: use --data with a folder, a file or a named set.")
    return start(config, load_private(source, config), Path(out), device)


def prepare_resume(
    out: PathLike, data: Source | None = None, device: str = "cpu", tensorboard: bool | None = None
) -> Training:
    """Go on with the interrupted run in `out`, by default with the images it was started with.

    Args:
        out: the run directory.
        data: the same images, if they have moved.
        device: where to compute.
        tensorboard: whether this session writes files for TensorBoard; None: what the run's settings say.
    """
    check_device(device)
    run = Run(Path(out))
    require_unfinished(run)
    # Before the images are read, which can take long.
    run.open_for_writing()
    config = run.config
    source = data if data is not None else config.data.source
    if isinstance(source, str) and not source:
        raise ConfigError("the run was started from arrays in memory: give the same images again as data.")
    return resume(run, load_private(source, config), device, tensorboard)


def train(
    data: Source,
    *,
    out: PathLike,
    epsilon: float,
    preset: str | None = None,
    settings: dict[str, Any] | None = None,
    device: str = "cpu",
    on_progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Train a generator on private images with (ε, δ)-differential privacy.

    Args:
        data: a folder, file or named set; an :class:`ImageDataset`; or (images, labels) arrays.
        out: the run directory to make.
        epsilon: ε > 0 for one image, add/remove adjacency; ``math.inf`` trains without privacy, for reference.
        preset: see :func:`dpsyngen.config.preset_names`.
        settings: nested overrides of the preset, such as ``{"private": {"steps": 500}}``.
        device: where to compute.
        on_progress: called after each step.

    Returns:
        the finished run; ``run.release`` is safe to publish.  ``run.private / "health.json"`` says what looks wrong.

    Raises:
        ConfigError, DataError, RunError: before anything is spent.
    """
    settings = dict(settings or {})
    settings["privacy"] = {**settings.get("privacy", {}), "epsilon": epsilon}
    if isinstance(data, (str, os.PathLike)):
        settings["data"] = {**settings.get("data", {}), "source": os.fspath(data)}
    from dpsyngen.doctor import write_health

    config = load_config(settings, preset=preset)
    training = prepare(config, out, data, device)
    with training.run.lock():
        for progress in training.steps():
            if on_progress:
                on_progress(progress)
        write_health(training.run, device)
    return training.run


def check_device(device: str) -> None:
    """Raise ConfigError if PyTorch cannot compute on `device`."""
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device is {device!r}, which this machine cannot use ({str(error).splitlines()[0]}).  Choose cpu"
            f"{', cuda' if torch.cuda.is_available() else ''}."
        ) from None


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
    device: str = "cpu",
    on_progress: Callable[[str], None] | None = None,
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
        device: where to compute.
        on_progress: called with a line about what is being done.

    Returns:
        the figures and the protocol of each, as written to the file.
    """
    from dpsyngen.evaluation import FeatureSpec, evaluate_images
    from dpsyngen.evaluation.cas import NAMES
    from dpsyngen.evaluation.figures import NAMES as METRICS
    from dpsyngen.evaluation.figures import check_sizes, checked_metrics
    from dpsyngen.evaluation.own_features import OwnFeatures
    from dpsyngen.generator import Generator

    run = _as_run(run)
    run.require_complete()
    check_device(device)
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
    generator = Generator(run.release, device)
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
        extractor = spec.make(device)
        if isinstance(extractor, OwnFeatures):
            extractor.try_out(generator.channels, generator.resolution)
    # All the while, so that it cannot be refused after an hour's work.
    with run.lock():
        ledger = run.finished_ledger()
        tell(f"generating {images:,} images")
        chosen = {"seed": seed, **(sampling or {})}
        samples = generator.sample(images, **chosen)
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
        )
        result["sampling"] = samples.settings
        write_text(run.private / "metrics.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n", 0o600)
    return result


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
