"""Measuring a run against real images."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpsyngen.config import Config
from dpsyngen.data.load import Source, load_private
from dpsyngen.distributed import ALONE, Ranks, device_of
from dpsyngen.errors import ConfigError, DataError
from dpsyngen.files import write_text
from dpsyngen.hardware import check_device, kind_of
from dpsyngen.training.run import Run

if TYPE_CHECKING:
    from dpsyngen.generator.generator import ReleasedGenerator

PathLike = str | os.PathLike[str]


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

    run = run if isinstance(run, Run) else Run(Path(run))
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


def _drawn_by_program(config: Config, generator: ReleasedGenerator, count: int) -> np.ndarray | None:
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
