"""What generated images compete with: classifiers trained on the real images, freely or by DP-SGD at the same ε."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpsyngen.data import ImageDataset
from dpsyngen.errors import ConfigError, LedgerError
from dpsyngen.evaluation.cas import (
    DEFAULT,
    ClassifierResult,
    classification_accuracy,
    confusion_matrix,
    per_class_accuracy,
)
from dpsyngen.experiments.dp_classifier import DpClassifier, DpSettings, Network, settings_by_rule, train_dp_classifier
from dpsyngen.privacy.accounting import calibrate_noise
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.randomness import Randomness


def real_reference(
    train: ImageDataset,
    test: ImageDataset,
    *,
    classifiers: Sequence[str] = DEFAULT,
    images: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The score of classifiers trained on real training images, by the protocol of generated ones.

    A tenth of the real training images, by class, chooses the epoch.  There is no privacy in it: ε = ∞.

    Args:
        train: real training images with classes.
        test: real test images with classes.
        classifiers: names, see :func:`dpsyngen.evaluation.cas.classification_accuracy`.
        images: how many training images, drawn without replacement; as many as were generated makes the fairer
            comparison.  None: all.
        seed: of that draw, the split and the classifiers.
        device: where to compute.
        on_progress: called with a line for each classifier.

    Returns:
        for each classifier what :meth:`dpsyngen.evaluation.cas.ClassifierResult.to_dict` gives, JSON-able.

    Raises:
        ConfigError: no classes, sets that do not fit together, or a number of images that there is not.
    """
    train_labels, test_labels = _labels(train, test)
    rows = np.arange(len(train))
    if images is not None:
        if not 1 <= images <= len(train):
            raise ConfigError(f"images is {images}, but there are {len(train):,} real training images: give 1 to that.")
        rows = np.sort(np.random.default_rng(seed).choice(len(train), images, replace=False))

    def told(line: str) -> None:
        if on_progress:
            on_progress(line.replace("generated images", "real images"))

    results = classification_accuracy(
        train.array() if images is None else train.batch(rows),
        train_labels[rows],
        test.array(),
        test_labels,
        num_classes=train.num_classes,
        classifiers=classifiers,
        seed=seed,
        device=device,
        on_progress=told,
    )
    return {name: result.to_dict() for name, result in results.items()}


def dp_classifier_reference(
    train: ImageDataset,
    test: ImageDataset,
    *,
    epsilon: float,
    delta: float,
    steps: int | None = None,
    batch: int | None = None,
    learning_rate: float | None = None,
    clipping_norm: float | None = None,
    network: Network = "scattering",
    seed: int | None = None,
    device: str = "cpu",
    ledger: Path | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The score of a classifier trained on the real training images by DP-SGD at (ε, δ).

    Formal guarantee, with `seed` None: the classifier is (ε, δ)-differentially private in the training images, under
    adding or removing one of them; n is public.  It has nothing to do with the test images: a score is computed from
    them and is as private as they are.

    Args:
        train: private training images with classes.
        test: real test images with classes.
        epsilon: ε > 0, finite.
        delta: δ in (0, 1).
        steps, batch, learning_rate, clipping_norm: None: by :func:`settings_by_rule`, from n and ε.
        network: "scattering", a linear classifier on fixed convolutional features, or "cnn", trained from end to end.
        seed: None: noise from the operating system's entropy.  A number: the same result each time, and NOT PRIVATE.
        device: where to compute.
        ledger: a file that does not exist yet, to keep the ledger in.  None: a temporary one, so that whoever adds up
            what was spent on these images has to take it from the result.
        on_progress: called with a line now and then.

    Returns:
        JSON-able: ``cas``, with the score under "dp-cnn" (both networks are convolutional) as
        :meth:`ClassifierResult.to_dict` gives it, without held-out images; ``accuracy``, ``accuracy_low``,
        ``accuracy_high``, ``balanced_accuracy``, ``per_class_accuracy`` of it; ``epsilon`` and ``delta`` as asked;
        ``ledger_epsilon``, which the ledger comes to; ``private``, whether the noise was unpredictable;
        ``noise_multiplier``, ``sampling_rate``, ``steps``, ``batch``, ``learning_rate``, ``clipping_norm``, ``ema``,
        ``network``, ``records``, ``parameters``, ``seed`` and ``seconds``.

    Raises:
        ConfigError: no classes, sets that do not fit together, or settings out of range.
        LedgerError: the ledger file exists.
    """
    train_labels, test_labels = _labels(train, test)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ConfigError(f"training images are {train.images.shape[1:]}, but test images {test.images.shape[1:]}.")
    if not (0 < epsilon < float("inf")) or not 0 < delta < 1:
        raise ConfigError(f"ε is {epsilon} and δ {delta}, but must be positive and finite, and in (0, 1).")
    started = time.monotonic()
    given = {"steps": steps, "batch": batch, "learning_rate": learning_rate, "clipping_norm": clipping_norm}
    chosen = settings_by_rule(network, len(train), epsilon) | {k: v for k, v in given.items() if v is not None}
    # Noise of 1 stands in while the rest is checked; what is needed depends on the checked rest.
    unchecked = DpSettings(network=network, records=len(train), noise_multiplier=1.0, **chosen)
    try:
        noise = calibrate_noise(epsilon, delta, sampling_rate=unchecked.sampling_rate, steps=unchecked.steps)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    settings = DpSettings(network=network, records=len(train), noise_multiplier=noise, **chosen)
    randomness = Randomness.from_system() if seed is None else Randomness.from_insecure_seed(seed)
    classifier = DpClassifier(
        network, train.images.shape[1:], train.num_classes, seed=0 if seed is None else seed, device=device
    )
    with tempfile.TemporaryDirectory(prefix="dpsyngen-") as folder:
        path = Path(folder) / "ledger.jsonl" if ledger is None else ledger
        if path.exists():
            raise LedgerError(f"there is a ledger already: {path}.  A reference keeps its own; give another file.")
        book = Ledger.create(
            path,
            target_epsilon=epsilon,
            delta=delta,
            records=len(train),
            run=randomness.tag("dp classifier")[:16],
            secure=randomness.secure,
        )
        if on_progress:
            on_progress(f"training a classifier by DP-SGD on {len(train):,} real images")
        train_dp_classifier(
            classifier,
            classifier.prepared(train.array()),
            train_labels,
            settings,
            ledger=book,
            randomness=randomness,
            on_progress=on_progress,
        )
        spent = Ledger(path).epsilon()
    predicted = classifier.predict(classifier.prepared(test.array()))
    score = _score(predicted, test_labels, train.num_classes, len(train))
    kept = ("accuracy", "accuracy_low", "accuracy_high", "balanced_accuracy", "per_class_accuracy")
    return {
        "cas": {"dp-cnn": score},
        **{key: score[key] for key in kept},
        "epsilon": epsilon,
        "delta": delta,
        "ledger_epsilon": spent,
        "private": randomness.secure,
        "noise_multiplier": noise,
        "sampling_rate": settings.sampling_rate,
        **chosen,
        "network": network,
        "records": len(train),
        "parameters": classifier.parameters,
        "seed": seed,
        "seconds": time.monotonic() - started,
    }


def _labels(train: ImageDataset, test: ImageDataset) -> tuple[np.ndarray, np.ndarray]:
    if train.labels is None or test.labels is None:
        raise ConfigError("a classifier needs classes, but the training or the test images have none: give labels.")
    if train.class_names != test.class_names:
        raise ConfigError(
            f"the training images have the classes {', '.join(train.class_names)}, but the test images "
            f"{', '.join(test.class_names)}: give sets of the same classes."
        )
    return train.labels, test.labels


def _score(predicted: np.ndarray, truth: np.ndarray, num_classes: int, n_train: int) -> dict[str, Any]:
    confusion = confusion_matrix(truth, predicted, num_classes)
    result = ClassifierResult(
        float((predicted == truth).mean()),
        float("nan"),
        "the last average of the weights",
        per_class_accuracy(confusion),
        n_train,
        0,
        len(truth),
        confusion=confusion,
    )
    return result.to_dict() | {"validation_accuracy": None}
