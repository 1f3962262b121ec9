"""Checks of a whole run for its owner's eyes: the metrics, and memorisation.  All results are private."""

from __future__ import annotations

import contextlib
import hmac
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.config import Config
from dpsyngen.data import ImageDataset
from dpsyngen.data.load import Source, load_private, said_of_a_run
from dpsyngen.distributed import ALONE, Ranks
from dpsyngen.errors import ConfigError, DataError, listed, require
from dpsyngen.evaluation.cas import require_enough
from dpsyngen.evaluation.extractors import FeatureSpec, shared_features
from dpsyngen.evaluation.features import OwnFeatures
from dpsyngen.evaluation.memorisation import (
    PAIRS_FILE,
    PIXELS,
    Memorisation,
    checked_names,
    memorisation_check,
    neighbour_pairs,
)
from dpsyngen.evaluation.metrics import EvaluationSettings, evaluate_images
from dpsyngen.files import write_json
from dpsyngen.full_precision import ordinary_modes
from dpsyngen.generator import ranks as sampling_ranks
from dpsyngen.generator.generator import ReleasedGenerator
from dpsyngen.hardware import device_of, kind_of
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.training.plan import Shape, program_of
from dpsyngen.training.run import Run
from dpsyngen.training.session import chosen_images, pinned

PathLike = str | os.PathLike[str]


@ordinary_modes()
def evaluate(
    run: Run | PathLike,
    *,
    data: Source | None = None,
    test: Source | None = None,
    images: int = 10_000,
    inception_weights: PathLike | None = None,
    cache: bool = True,
    sampling: dict[str, Any] | None = None,
    on_progress: Callable[[str], None] | None = None,
    ranks: Ranks = ALONE,
    **settings: Any,
) -> dict[str, Any]:
    """Measure a run against real images.  Every figure is private: it lands in ``private/metrics.json`` only.

    Args:
        run: a finished run.
        data: the real training images; None: those the run was trained on.
        test: real test images, with labels for the classification accuracy score; None: neither that nor a floor.
        images: how many images to generate.  As many are drawn by the run's program, for the ceiling.
        inception_weights: weights file for the feature extractor "inception", unless a spec names its own.
        cache: keep features of real images in the run's private half, so that the next evaluation is faster.
        sampling: settings of the sampler, as for :meth:`Generator.settings`.
        ranks: the processes that share the work; this is the main one, the others are in :func:`follow_evaluation`.
        settings: those of :class:`~dpsyngen.evaluation.metrics.EvaluationSettings`, with "auto" as the device; and
            ``labels`` and ``label_column`` of `data` and `test`, as for :func:`dpsyngen.load_images`.

    Returns:
        the figures and the protocol of each, as written to the file.

    Raises:
        ConfigError, DataError, RunError: see their messages; nothing was looked at or written.
    """
    run = run if isinstance(run, Run) else Run(Path(run))
    run.require_complete()
    device = kind_of(settings.pop("device", "auto"))
    labelled = {name: settings.pop(name) for name in ("labels", "label_column") if name in settings}
    s = EvaluationSettings.of({**settings, "device": device, "cache": run.features_path if cache else None})
    require(images >= 2, "the number of generated images", images, "at least 2")
    if data is None and test is None:
        for name, value in labelled.items():
            require(value is None, name, value, "left out without data or test, whose labels they are")
    if not s.specs and (test is None or not s.classifiers):
        raise ConfigError(
            "nothing would be measured: give --features and --metrics, or --classifiers and the real images of --test "
            "(from Python: features, metrics, classifiers, test)."
        )
    if inception_weights is not None:
        without, given = FeatureSpec("inception"), [FeatureSpec(f) if isinstance(f, str) else f for f in s.features]
        require(without in given, "inception_weights", inception_weights, "left out without the features inception")
        specs = tuple(FeatureSpec("inception", Path(inception_weights)) if f == without else f for f in given)
        s = s.model_copy(update={"features": specs})
    tell = on_progress or (lambda line: None)
    config = run.config
    generator = sampling_ranks.open_everywhere(ranks, run.release, device)
    generator.settings(**{"seed": s.seed, **(sampling or {})})  # what is wrong is said before images are read
    notes: list[str] = []
    own: ImageDataset | None
    if data is None:
        reference = own = _trained_on(run, None, generator)
    else:
        reference = _images(data, config, generator, "data", notes, **labelled)
        # Without persons, those that were chosen among a person's images cannot be told from the others.
        known = config.privacy.most_per_person is None or reference.persons is not None
        own = training_images(run, reference) if known else None
        reference = reference if own is None else own
    held_out = None if test is None else _images(test, config, generator, "test", notes, **labelled)
    if held_out is not None and held_out.labels is not None and s.classifiers:
        require_enough(images, len(generator.class_names))
    for spec in s.specs:
        # What is missing or wrong should show before images are generated and the ledger is written.
        extractor = spec.make(device_of(device, ranks))
        if isinstance(extractor, OwnFeatures):
            shape = (2, generator.channels, generator.resolution, generator.resolution)
            extractor(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    more = "" if held_out is not None else "; without real test images there are neither classifiers nor a floor"
    # All the while, so that it cannot be refused after an hour's work.
    with run.lock():
        ledger = run.finished_ledger()
        tell(f"generating {images:,} images{more}")
        samples = sampling_ranks.sample(ranks, generator, images, **{"seed": s.seed, **(sampling or {})})
        # The ledger knows before the first private image is looked at.
        ledger.note_private_access(
            "evaluation against real images; the figures stay in the private half",
            features=[spec.name for spec in s.specs],
            metrics=list(s.metrics),
            classifiers=list(s.classifiers) if held_out is not None else [],
        )
        result = evaluate_images(
            samples.images,
            samples.labels,
            reference=reference,
            test=held_out,
            programs=_drawn_by_program(config, generator, min(images, s.max_images)) if s.metrics else None,
            on_progress=tell,
            ranks=ranks,
            **dict(s),
        )
        result["sampling"] = samples.settings
        if own is None:
            notes.append("the real images are not those that the run was trained on")
        result["notes"] += notes
        write_json(run.private / "metrics.json", result, 0o600)
    return result


@ordinary_modes()
def follow_evaluation(ranks: Ranks) -> None:
    """In every process but the main one: share the evaluation that the main one leads, to its end."""
    made = cache(FeatureSpec.make)

    def features(spec: FeatureSpec, device: str, images: NDArray[np.uint8]) -> None:
        shared_features(ranks, lambda: made(spec, device_of(device, ranks)), images)

    sampling_ranks.follow(ranks, features=features)


@ordinary_modes()
def check_memorisation(
    run: Run | PathLike,
    *,
    data: Source | None = None,
    held_out: Source | None = None,
    images: int = 1000,
    features: Sequence[str] = ("pixels",),
    sampling: dict[str, Any] | None = None,
    seed: int = 0,
    device: str = "cpu",
    on_progress: Callable[[str], None] | None = None,
) -> Memorisation:
    """Compare a run's generated images with its training images and with held-out ones.

    The figures go to ``private/memorisation.json``, and images beside their neighbours to
    ``private/memorisation_pairs.json``, for the report.  All are private; the release half is not touched.

    Args:
        data: the training images; None: what the run was trained on.  Other images are refused.
        held_out: real images of the same source that were not trained on, the control; None: no conclusion.
        images: how many images to generate.
        features: "pixels" and names of feature extractors.
        sampling: settings of the sampler, as for :meth:`Generator.settings`.
        seed: of the generated images and of subsets.

    Raises:
        ConfigError, DataError, RunError: see their messages; nothing was looked at or written.
    """
    run = run if isinstance(run, Run) else Run(Path(run))
    run.require_complete()
    checked_names(features)
    require(images >= 1, "the number of generated images", images, "at least 1")
    require(0 <= seed < 2**63, "seed", seed, "from 0 to 2⁶³ − 1")
    generator = ReleasedGenerator(run.release, device)
    private = _trained_on(run, data, generator)
    control = None if held_out is None else _images(held_out, run.config, generator, "held-out")
    for feature in features:
        # What is missing or wrong should show before images are generated and the ledger is written.
        if feature != PIXELS:
            FeatureSpec(feature).make(device)
    tell = on_progress or (lambda line: None)
    with run.lock():
        tell(f"generating {images:,} images")
        samples = generator.sample(images, **{"seed": seed, **(sampling or {})})
        run.finished_ledger().note_private_access(
            "memorisation check: generated images against training images; the figures stay in the private half",
            features=list(features),
            generated_images=images,
            held_out_images=0 if control is None else len(control),
        )
        sets = (samples.images, private.array(), None if control is None else control.array())
        result = memorisation_check(
            *sets,
            features=features,
            seed=seed,
            device=device,
            on_progress=on_progress,
        )
        write_json(run.private / PAIRS_FILE, neighbour_pairs(result, *sets, seed=seed), 0o600)
        write_json(run.private / "memorisation.json", {**result.to_dict(), "sampling": samples.settings}, 0o600)
    return result


@ordinary_modes()
def generated_beside_real(
    run: Run, *, each: int = 8, classes: int = 10, seed: int = 0, device: str = "cpu"
) -> list[tuple[str, NDArray[np.uint8], NDArray[np.uint8]]]:
    """For the owner's eyes: of each of the first `classes` classes, generated images and training images.

    The training images are **private**, and so is which of them are shown.  The ledger notes that they were looked at.

    Args:
        each: how many of either kind, at most, in a row; four times as many without classes.
        seed: of the generated images, and of the choice of the real ones.

    Returns:
        name of the class ("" without classes), generated and real images, uint8 [n, C, H, W], of each row.
    """
    run.require_complete()
    generator = ReleasedGenerator(run.release, device)
    real = _trained_on(run, None, generator)
    names = generator.class_names[:classes] or ("",)
    count = each if generator.class_names else 4 * each
    with run.lock():
        ledger = run.finished_ledger()
        ledger.note_private_access("training images were looked at beside generated ones", images=count * len(names))
    order = np.random.default_rng(seed).permutation(len(real))
    rows = []
    for number, name in enumerate(names):
        chosen = order if real.labels is None else order[real.labels[order] == number]
        drawn = generator.sample(count, labels=number if generator.class_names else None, seed=seed)
        rows.append((name, drawn.images, real.batch(np.sort(chosen[:count]))))
    return rows


def _images(
    given: Source | None,
    config: Config,
    generator: ReleasedGenerator,
    what: str,
    notes: list[str] | None = None,
    *,
    labels: PathLike | None = None,
    label_column: str | None = None,
) -> ImageDataset:
    """Load real images in the form of the generated ones; None: those that the run was trained on, with its labels.

    Given images, `what` in messages, that by the run's own settings come out in another colour are refused; those of
    another size are resized, which goes to `notes`, or refused without.  They bring their labels, or `labels` is a
    table of them.
    """
    source = config.data.source if given is None else given
    if given is None and not source:
        raise ConfigError("the run was trained on arrays in memory: give the images as data.")
    own: bool | str = config.data.labels if given is None else True if labels is None else os.fspath(labels)
    asked: dict[str, Any] = {"labels": own if generator.class_names else False}
    if given is not None and label_column is not None:
        asked["label_column"] = label_column or None
    colours = {1: "grey", 3: "rgb"}
    form = {"resolution": generator.resolution, "channels": colours[generator.channels]}
    # Which of a person's images were trained on follows from all of them.
    trained_on = given is None or (what == "training" and isinstance(given, str | os.PathLike))
    groups = config.privacy.groups if trained_on else None

    def load(**more: Any) -> ImageDataset:
        wanted = config.model_copy(update={"data": config.data.model_copy(update=asked | more)})
        return load_private(source, wanted, groups=groups)

    with said_of_a_run(given):
        # Those that are given are read as the training read its own: what comes out is their form, and not the run's.
        dataset = load(**(form if trained_on else {}))
        if dataset.channels != generator.channels:
            raise DataError(
                f"the {what} images are {colours[dataset.channels]}, but those of the run {form['channels']}: figures "
                f"would compare colours.  Give {form['channels']} images, as they were trained on."
            )
        if dataset.resolution != generator.resolution:
            sides = f"{dataset.resolution} pixels a side, and those of the run {generator.resolution}"
            told = f"the {what} images have {sides}"
            if notes is None:
                raise DataError(f"{told}.  Give images of the same size, as they were trained on.")
            notes.append(f"{told}: they were resized")
            dataset = load(**form)
        dataset = dataset.with_classes(generator.class_names, what)
    if dataset.absent_classes and what in ("data", "training"):
        raise DataError(f"of the training images none is of {listed(dataset.absent_classes)}: give all of them.")
    return dataset


def _trained_on(run: Run, given: Source | None, generator: ReleasedGenerator) -> ImageDataset:
    """The images that the run was trained on, and DataError if these are others."""
    found = training_images(run, _images(given, run.config, generator, "training"))
    if found is None:
        what = f"the images of {run.config.data.source}" if given is None else "the images"
        raise DataError(
            f"{what} are not those that {run.path} was trained on, or come in another order, or were changed since.  "
            "Put them back, or say with --data (from Python: data) which images to use."
        )
    return found


def training_images(run: Run, dataset: ImageDataset) -> ImageDataset | None:
    """Those that the run was trained on, chosen as it chose them; None if what it pinned, by what they are, are others.

    ConfigError if the run chose among the images of each person, and nobody says whose these are.
    """
    known = pinned(run.data_path)
    randomness = Randomness.load(run.randomness_path)
    dataset = chosen_images(run.config, dataset, randomness)
    return dataset if hmac.compare_digest(known["fingerprint"], randomness.tag(dataset.fingerprint())) else None


def _drawn_by_program(config: Config, generator: ReleasedGenerator, count: int) -> np.ndarray | None:
    """The run's public images, from the first; None where the program is no longer known."""
    with contextlib.suppress(ConfigError):
        shape = Shape(generator.resolution, generator.channels, generator.class_names, count)
        return program_of(config, shape).batch(range(count))
    return None
