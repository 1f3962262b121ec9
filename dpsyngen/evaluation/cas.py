"""Classification accuracy score: how well classifiers trained on generated images alone do on real ones.

The generated images are split 90/10; the epoch (or the regularisation) is chosen on the held-out *generated* part.
Real test images are looked at once, by the chosen candidate: choosing on them would overstate utility.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError, require

Classifier = Literal["logreg", "mlp", "cnn", "resnet", "wideresnet"]
NAMES: tuple[Classifier, ...] = get_args(Classifier)
DEFAULT: tuple[Classifier, ...] = ("logreg", "mlp", "cnn")
"""The classifiers of DPDM's evaluation, which published figures are of."""
HELD_OUT = 0.1
"""Share of the generated images that chooses and is not trained on (METHOD.md: 90/10)."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class ClassifierResult:
    """One classifier's score.

    `accuracy` is the share of the real test images classified rightly, `validation_accuracy` that of the held-out
    generated ones, which made the choice; `chosen` says in words of what, `chosen_epoch` (from 1) and `epochs` are None
    for logistic regression.  `per_class_accuracy` is NaN where a class has no test images.  `missing_classes` have no
    generated image and count as errors.  `confusion[true][predicted]` are numbers of test images.
    """

    accuracy: float
    validation_accuracy: float
    chosen: str
    per_class_accuracy: list[float]
    n_train: int
    n_validation: int
    n_test: int
    chosen_epoch: int | None = None
    epochs: int | None = None
    missing_classes: tuple[int, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(
        cls, truth: NDArray[np.int64], predicted: NDArray[np.int64], num_classes: int, **fields: Any
    ) -> ClassifierResult:
        """Score predicted classes of the test images [M] against true ones; `fields` are those of the training."""
        from sklearn.metrics import confusion_matrix

        confusion = confusion_matrix(truth, predicted, labels=range(num_classes)).tolist()
        return cls(
            accuracy=float((predicted == truth).mean()),
            per_class_accuracy=[row[c] / sum(row) if sum(row) else math.nan for c, row in enumerate(confusion)],
            n_test=len(truth),
            confusion=tuple(map(tuple, confusion)),
            **fields,
        )

    @property
    def balanced_accuracy(self) -> float:
        """Mean of `per_class_accuracy` over the classes that have test images; NaN without any."""
        known = [a for a in self.per_class_accuracy if not math.isnan(a)]
        return sum(known) / len(known) if known else math.nan

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """95 % confidence interval of `accuracy` over the draw of the test images, see :func:`clopper_pearson`.

        It knows nothing of how the score varies with the generator's or the classifier's training.
        """
        return clopper_pearson(round(self.accuracy * self.n_test), self.n_test)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: NaN, which JSON does not know, becomes None."""
        low, high = self.accuracy_interval
        return asdict(self) | {
            "accuracy_low": low,
            "accuracy_high": high,
            "balanced_accuracy": None if math.isnan(self.balanced_accuracy) else self.balanced_accuracy,
            "per_class_accuracy": [None if math.isnan(a) else a for a in self.per_class_accuracy],
        }


def clopper_pearson(right: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Exact confidence interval of a proportion (Clopper & Pearson 1934), which covers at least as often as it says.

    `right` of `total` independent trials; without any, it is 0 to 1.
    """
    from scipy.stats import binomtest

    if not total:
        return 0.0, 1.0
    found = binomtest(right, total).proportion_ci(confidence, method="exact")
    return float(found.low), float(found.high)


def require_same_size(what: str, images: Any, whose: str, others: Any) -> None:
    """ConfigError unless images [N, C, H, W] have the channels, height and width of others."""
    if images.shape[1:] != others.shape[1:]:
        sizes = f"{what} are {images.shape[1:]}, but {whose} {others.shape[1:]}"
        raise ConfigError(f"{sizes}: give images of the same size and number of channels.")


def default_epochs(name: str, images: int) -> int:
    """Passes over `images` training images that make 200,000 presentations, 5 to 50 (DPDM makes 50 of 60,000).

    The ResNet, which is trained in one cycle, has half as many presentations, and 30 epochs at most.
    """
    presentations, most = (100_000, 30) if name == "resnet" else (200_000, 50)
    return int(np.clip(presentations // images, 5, most))


def require_enough(images: int, classes: int) -> None:
    """ConfigError unless so many generated images, of all classes in turn, can train a classifier and be held out."""
    if -(-images // classes) < 6:
        raise ConfigError(
            f"{images:,} generated images of {classes:,} classes are too few to train a classifier: a class needs 6, "
            f"of which one is held out.  Generate {6 * classes:,}, or ask for no classifiers."
        )


def split_generated(
    labels: NDArray[np.int64], fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the training and the held-out part, the latter with `fraction` of each class."""
    rng = np.random.default_rng(seed)
    held_out: list[NDArray[np.int64]] = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        held_out.append(rows[: round(fraction * len(rows))])
    validation = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def classification_accuracy(
    train_images: NDArray[np.uint8],
    train_labels: NDArray[np.int64],
    test_images: NDArray[np.uint8],
    test_labels: NDArray[np.int64],
    *,
    num_classes: int,
    classifiers: Sequence[str] = DEFAULT,
    seed: int = 0,
    epochs: int | None = None,
    device: str = "cpu",
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, ClassifierResult]:
    """Train each classifier on generated images and score it on real ones (Ravuri & Vinyals 2019, arXiv 1905.10887).

    Deterministic for a given seed on a CPU, whatever the global random state.  The result is private: it is computed
    from real test images.

    Args:
        train_images, train_labels: generated, uint8 [N, C, H, W], and their classes [N].
        test_images, test_labels: real, uint8 [M, C, H, W], and their classes [M].
        classifiers: names in ``NAMES``.
        seed: of the split, the initial weights and the order of images.
        epochs: passes over the training part for the networks; None: :func:`default_epochs`.

    Raises:
        ConfigError: unknown classifier, shapes that differ, labels out of range, or too few images or classes.

    Warns:
        UserWarning: a class has no generated image, so no classifier can know it.
    """
    import torch

    from dpsyngen.evaluation.classifiers import candidates

    require(classifiers, "classifiers", classifiers, NAMES)
    for name in classifiers:
        require(name in NAMES, "classifiers", name, NAMES)
    require(num_classes >= 2, "num_classes", num_classes, "at least 2")
    require(epochs is None or epochs >= 1, "epochs", epochs, "at least 1")
    _check(train_images, train_labels, test_images, test_labels, num_classes)
    train_labels, test_labels = train_labels.astype(np.int64), test_labels.astype(np.int64)
    # 1. Split the generated images 90/10, class by class.
    train, validation = split_generated(train_labels, HELD_OUT, seed)
    count, present = len(train_images), np.unique(train_labels)
    if len(validation) < 1:
        raise ConfigError(f"{count} generated images are too few to train a classifier: generate at least 6 a class.")
    if len(present) < 2:
        raise ConfigError(
            f"all {count} generated images are of class {present[0]}: generate images of the others, too."
        )
    missing = tuple(np.setdiff1d(np.arange(num_classes), present).tolist())
    if missing:
        warnings.warn(
            f"no image of class {', '.join(map(str, missing))} was generated: no classifier can know it, and its test "
            "images count as errors.",
            stacklevel=2,
        )
    out: dict[str, ClassifierResult] = {}
    x, y = train_images[train], train_labels[train]
    x_held_out, y_held_out = train_images[validation], train_labels[validation]
    for name in classifiers:
        passes = default_epochs(name, len(train)) if epochs is None else epochs
        if on_progress:
            on_progress(f"training the classifier {name} on {len(train):,} generated images")
        best, chosen = -1.0, None
        # Starts and dropout draw from PyTorch's global state: a copy of it, so that a score depends on the seed alone.
        with torch.random.fork_rng([] if device == "cpu" else [device]):
            torch.manual_seed(seed)
            # 2. The held-out generated images choose the candidate, the first of equals.
            for candidate in candidates(name, x, y, num_classes, seed, passes, device):
                score = float((candidate.predict(x_held_out) == y_held_out).mean())
                if score > best:
                    best, chosen = score, candidate.keep()
        assert chosen is not None
        # 3. Only then are the real test images looked at, once: choosing on them would overstate utility.
        out[name] = ClassifierResult.of(
            *(test_labels, chosen.predict(test_images), num_classes),
            validation_accuracy=best,
            chosen=chosen.label,
            n_train=len(train),
            n_validation=len(validation),
            chosen_epoch=chosen.epoch,
            epochs=None if chosen.epoch is None else passes,
            missing_classes=missing,
        )
    return out


def best_by_validation(results: dict[str, ClassifierResult]) -> str:
    """The classifier that does best on held-out *generated* images: the one to quote when one is asked for.

    The real test images have no say (METHOD.md, item 6).  Of equals, the first; ConfigError if there is none.
    """
    if not results:
        raise ConfigError("there is no classifier to choose from: classification_accuracy returned none.")
    return max(results, key=lambda name: results[name].validation_accuracy)


def _check(
    train_images: NDArray[np.uint8],
    train_labels: NDArray[np.int64],
    test_images: NDArray[np.uint8],
    test_labels: NDArray[np.int64],
    num_classes: int,
) -> None:
    for what, images, labels in (("generated", train_images, train_labels), ("test", test_images, test_labels)):
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ConfigError(f"{what} images are {images.dtype} {images.shape}, but must be uint8 [N, C, H, W].")
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise ConfigError(f"{what} labels are {labels.dtype} {labels.shape}, but must be integers [N].")
        if len(images) != len(labels) or not len(images):
            raise ConfigError(f"{len(images)} {what} images have {len(labels)} labels; there must be one for each.")
        if labels.min() < 0 or labels.max() >= num_classes:
            found = f"{labels.min()} to {labels.max()}"
            raise ConfigError(f"{what} labels run from {found}, but must be 0 to {num_classes - 1}.")
    require_same_size("generated images", train_images, "the test images", test_images)
