"""What generated images compete with: classifiers trained on the real images, freely or by DP-SGD at the same ε.

The second is what the images could be used for without a generator: a linear classifier on normalised scattering
features, a large batch and momentum (Tramèr & Boneh, arXiv 2011.11660), with the largest batch that can be computed,
few steps and an exponential moving average of the weights (De et al., arXiv 2204.13650).  No private image is held back
to choose anything: the last average is what is scored.

A scattering network is a convolutional network whose filters are fixed (Bruna & Mallat, arXiv 1203.1513): |x * ψ| and
||x * ψ| * ψ'| for oriented Morlet wavelets ψ, each averaged over a few pixels.  Nobody's data went into it, and a
linear classifier on it does better than a convolutional network trained by DP-SGD from end to end: far fewer numbers
share the noise (docs/cas.md).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from dpsyngen.data import ImageDataset
from dpsyngen.diffusion.denoiser import Ema
from dpsyngen.errors import ConfigError, require
from dpsyngen.evaluation.cas import ClassifierResult, classification_accuracy, require_same_size
from dpsyngen.privacy.accounting import Mechanism, calibrate_noise
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.noise import noisy_mean
from dpsyngen.privacy.per_example import PerExampleGradients
from dpsyngen.privacy.randomness import Randomness, poisson_sample

SCALES = 2
_LARGEST_BATCH = 4096
_MOMENTUM = 0.9
_AT_ONCE = 250
_LARGEST = 32
_ORIENTATIONS = 4
_STRIDE = 2**SCALES


def real_reference(
    train: ImageDataset, test: ImageDataset, on_progress: Callable[[str], None] | None = None, **options: Any
) -> dict[str, Any]:
    """Score classifiers trained on all real training images, by the protocol of generated ones; no privacy (ε = ∞).

    A tenth of the real training images, by class, chooses the epoch.  `options` are those of
    :func:`~dpsyngen.evaluation.cas.classification_accuracy`; returns :meth:`ClassifierResult.to_dict` of each.
    """
    train_labels, test_labels = _labels(train, test)
    tell = on_progress and (lambda line: on_progress(line.replace("generated images", "real images")))
    sets = (train.array(), train_labels, test.array(), test_labels)
    results = classification_accuracy(*sets, num_classes=train.num_classes, on_progress=tell, **options)
    return {name: result.to_dict() for name, result in results.items()}


def dp_classifier_reference(
    train: ImageDataset,
    test: ImageDataset,
    *,
    epsilon: float,
    delta: float,
    ledger: Path,
    records: int | None = None,
    group_size: int = 1,
    seed: int | None = None,
    device: str = "cpu",
    on_progress: Callable[[str], None] | None = None,
    **given: Any,
) -> dict[str, Any]:
    """Score a classifier trained on the real training images by DP-SGD at (ε, δ).

    Formal guarantee, with `seed` None: the classifier is (ε, δ)-differentially private in the training images, under
    adding or removing up to `group_size` of them; n is public.  It has nothing to do with the test images: a score is
    computed from them and is as private as they are.

    Args:
        epsilon, delta: ε > 0, finite, and δ in (0, 1).
        ledger: a file that does not exist yet, to keep the ledger in.
        records: the declared n; None: the number of training images.
        group_size: g >= 1; ε and δ are for up to g images of one person.
        seed: None: noise from the operating system's entropy.  A number: the same result each time, and NOT PRIVATE.
        given: ``steps``, ``batch``, ``learning_rate`` and ``clipping_norm`` where :func:`settings_by_rule` is not
            followed.

    Returns:
        JSON-able: ``cas``, with the score under "dp-cnn" (scattering is convolutional) as
        :meth:`ClassifierResult.to_dict` gives it, without held-out images; ``ledger_epsilon``, which the ledger comes
        to; ``private``, whether the noise was unpredictable; ``parameters``; all of :class:`DpSettings`.

    Raises:
        ConfigError: no classes, sets that do not fit together, or settings out of range.
        LedgerError: the ledger file exists.
    """
    train_labels, test_labels = _labels(train, test)
    n = len(train) if records is None else records
    require_same_size("test images", test.images, "the training images", train.images)
    if not (0 < epsilon < float("inf")) or not 0 < delta < 1:
        raise ConfigError(f"ε is {epsilon} and δ {delta}, but must be positive and finite, and in (0, 1).")
    chosen = settings_by_rule(n, epsilon) | {k: v for k, v in given.items() if v is not None}
    # Noise of 1 stands in while the rest is checked; what is needed depends on the checked rest.
    settings = DpSettings(records=n, noise_multiplier=1.0, **chosen)
    try:
        noise = calibrate_noise(
            epsilon, delta, sampling_rate=settings.sampling_rate, steps=settings.steps, group_size=group_size
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    settings = replace(settings, noise_multiplier=noise)
    randomness = Randomness.from_system() if seed is None else Randomness.from_insecure_seed(seed)
    promise: dict[str, Any] = {"target_epsilon": epsilon, "delta": delta, "records": n, "group_size": group_size}
    book = Ledger.create(ledger, **promise, run=randomness.tag("dp classifier")[:16], secure=randomness.secure)
    if on_progress:
        on_progress(f"training a classifier by DP-SGD on {len(train):,} real images")
    features = Scattering(train.images.shape[1:])
    classifier, inputs = linear_classifier(features, train.num_classes, device), features.of(train.array())
    train_dp_classifier(
        classifier, inputs, train_labels, settings, ledger=book, randomness=randomness, on_progress=on_progress
    )
    with torch.no_grad():
        parts = features.of(test.array()).split(_AT_ONCE)
        predicted = torch.cat([classifier(part.to(device).float()).argmax(1).cpu() for part in parts]).numpy()
    score = ClassifierResult.of(
        *(test_labels, predicted, train.num_classes),
        validation_accuracy=float("nan"),
        chosen="the last average of the weights",
        n_train=n,
        n_validation=0,
    )
    return {
        "cas": {"dp-cnn": score.to_dict() | {"validation_accuracy": None}},
        "ledger_epsilon": book.epsilon(),
        "private": randomness.secure,
        **asdict(settings),
        "network": "scattering",
        "parameters": sum(p.numel() for p in classifier.parameters()),
    }


def _labels(train: ImageDataset, test: ImageDataset) -> tuple[np.ndarray, np.ndarray]:
    if train.labels is None or test.labels is None:
        raise ConfigError("a classifier needs classes, but the training or the test images have none: give labels.")
    truth = test.with_classes(train.class_names, "test").labels
    assert truth is not None
    return train.labels, truth


@dataclass(frozen=True)
class DpSettings:
    """The constants of a training; all of them public.

    `records` is n, `batch` the expected batch (at most n), `clipping_norm` C, `noise_multiplier` z > 0, `ema` the decay
    of the average of the weights, `learning_rate` that of SGD with momentum 0.9.
    """

    records: int
    steps: int
    batch: int
    learning_rate: float
    clipping_norm: float
    noise_multiplier: float
    ema: float
    physical_batch: int = 256

    def __post_init__(self) -> None:
        require(1 <= self.batch <= self.records, "batch", self.batch, f"1 to {self.records}, the number of images")
        require(self.steps >= 1, "steps", self.steps, "at least 1")
        rate = self.learning_rate
        require(rate > 0 and math.isfinite(rate), "learning_rate", rate, "positive and finite")
        require(self.noise_multiplier > 0, "noise_multiplier", self.noise_multiplier, "positive: nothing is private")

    @property
    def sampling_rate(self) -> float:
        """q: expected batch over declared records."""
        return self.batch / self.records


def settings_by_rule(records: int, epsilon: float) -> dict[str, Any]:
    """steps, batch, learning_rate, clipping_norm and ema from what is public: n and ε.

    The noise of a mean falls with the batch at given ε and steps, so the batch is the largest that is cheap: all images
    up to 4,096.  Steps: 400 where ε·n reaches 50,000, in proportion fewer below but 50 at least: the noise of each
    grows with their number, and with less signal there is less to be learned from many.  The learning rate grows with
    √(ε·n) from there, up to fourfold.  These figures were chosen on a held-out sixth of Fashion-MNIST's training images
    (docs/cas.md); for any other data they are constants.
    """
    signal = epsilon * records / 50_000
    return {
        "steps": max(50, round(400 * min(1.0, signal))),
        "batch": min(records, _LARGEST_BATCH),
        "learning_rate": 8.0 * min(max(math.sqrt(signal), 1.0), 4.0),
        "clipping_norm": 0.1,
        "ema": 0.98,
    }


def linear_classifier(features: Scattering, classes: int, device: str = "cpu") -> nn.Module:
    """A linear classifier, all weights zero, from float32 scattering features [B, ...] to logits [B, classes]."""
    linear = nn.Linear(math.prod(features.features), classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.Flatten(), linear).to(device)


def train_dp_classifier(
    classifier: nn.Module,
    inputs: Tensor,
    labels: NDArray[np.int64],
    settings: DpSettings,
    *,
    ledger: Ledger,
    randomness: Randomness,
    on_progress: Callable[[str], None] | None = None,
) -> None:
    """DP-SGD from the classifier's initial weights; afterwards it has the average of the weights.

    Formal guarantee: the weights are a post-processing of ``settings.steps`` runs of the Poisson-subsampled Gaussian
    mechanism, all of which the ledger has before the first one looks at a record: it is charged with the whole training
    at once, so a training that is broken off cannot be resumed.  `on_progress` tells the number of the step and nothing
    of the data.

    `inputs` are the features [N, ...] of the private images, each from its own image and public constants, see
    :meth:`Scattering.of`; `randomness` are secret streams, whose step numbers from 0 are used up.

    Raises:
        BudgetExceeded: the training would exceed the ledger's target; nothing was trained.
    """
    s = settings
    engine = PerExampleGradients(classifier, s.clipping_norm)
    device = engine.parameters[0].device
    optimizer = torch.optim.SGD(engine.parameters, lr=s.learning_rate, momentum=_MOMENTUM)
    ema = Ema(classifier, s.ema)
    targets = torch.from_numpy(labels)
    # All steps are in the ledger before the first one looks at a record.
    ledger.charge(
        Mechanism(s.sampling_rate, s.noise_multiplier, s.steps),
        "DP-SGD steps that train a classifier on private images, as a reference",
        query="dp-sgd classifier",
        steps=s.steps,
        l2_sensitivity=s.clipping_norm,
        expected_batch=s.batch,
    )
    last = time.monotonic()
    for step in range(s.steps):
        chosen = torch.from_numpy(poisson_sample(randomness, step, len(inputs), s.sampling_rate))

        def loss(part: slice, chosen: Tensor = chosen) -> Tensor:
            rows = chosen[part]
            logits = classifier(inputs[rows].to(device).float())
            return F.cross_entropy(logits, targets[rows].to(device), reduction="none")

        # Each record's gradient is clipped to C before the sum, whose noise has deviation z·C; then the mean over the
        # *expected* batch: the size of the drawn one is private.
        clipped = engine.sum(loss, len(chosen), physical_batch=s.physical_batch)
        z, batch = s.noise_multiplier, s.batch
        noisy = noisy_mean(clipped, noise_multiplier=z, expected_examples=batch, randomness=randomness, step=step)
        for parameter, gradient in zip(engine.parameters, noisy, strict=True):
            parameter.grad = gradient
        optimizer.step()
        ema.update(classifier)
        if on_progress and time.monotonic() - last > 5:
            last = time.monotonic()
            on_progress(f"training a classifier by DP-SGD: step {step + 1:,} of {s.steps:,}")
    classifier.load_state_dict(ema.average)


class Scattering:
    """Two scales, orders 0 to 2, then each image's features normalised in groups of channels.

    Each image's features are a function of that image and of public constants alone.  The wavelets have 8 orientations
    for grey images, 4 for colour ones, whose features take three times the memory.  Images above 32 pixels are averaged
    down to 32 at most.

    Attributes:
        features: the shape [channels, h, w] of an image's: C (1 + 2·orientations + orientations²) channels, and a
            position for every 4×4 pixels.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        channels, height, width = shape
        angles = 8 if channels == 1 else 4
        self._shrink = -(-max(height, width) // _LARGEST)
        size = [-(-s // self._shrink) for s in (height, width)]
        whole = [-(-s // _STRIDE) * _STRIDE for s in size]
        self._pad = (_STRIDE, _STRIDE + whole[1] - size[1], _STRIDE, _STRIDE + whole[0] - size[0])
        padded = [s + 2 * _STRIDE for s in whole]
        half = [s // 2 for s in padded]
        turns = [math.pi * a / angles for a in range(angles)]
        slant = 4 / angles
        self._fine = [_wavelet(padded, 0.8, 0.75 * math.pi, t, slant) for t in turns]
        # The second scale: of the image itself, and of what the first has left, at half the resolution.
        self._coarse = [_wavelet(padded, 1.6, 0.375 * math.pi, t, slant) for t in turns]
        self._average = [_averaging(n, 1.6, _STRIDE) for n in padded]
        self._average_half = [_averaging(n, 0.8, _STRIDE // 2) for n in half]
        paths = channels * (1 + SCALES * angles + angles**2)
        self.features = paths, whole[0] // _STRIDE, whole[1] // _STRIDE

    def of(self, images: NDArray[np.uint8]) -> Tensor:
        """uint8 [N, C, H, W] -> fp16 [N, channels, h, w]."""
        out = torch.empty((len(images), *self.features), dtype=torch.float16)
        for start in range(0, len(images), _AT_ONCE):
            part = torch.from_numpy(images[start : start + _AT_ONCE].copy())
            out[start : start + len(part)] = self._normalised(part.float().div_(127.5).sub_(1))
        return out

    def _normalised(self, x: Tensor) -> Tensor:
        """Mean 0 and variance 1 over the positions of four neighbouring orientations at a time (and of order 0)."""
        if self._shrink > 1:
            x = F.avg_pool2d(x, self._shrink, ceil_mode=True)
        orders = self._scattered(F.pad(x, self._pad, mode="replicate"))
        zeroth, *rest = (o.flatten(1, 2) for o in orders)
        return torch.cat([F.group_norm(zeroth, 1), *(F.group_norm(o, o.shape[1] // _ORIENTATIONS) for o in rest)], 1)

    def _scattered(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, C, H, W] -> orders 0, 1 and 2, each [B, C, paths, h, w]."""
        spectrum = torch.fft.fft2(x)
        first, second = [], []
        for fine in self._fine:
            inner = torch.fft.ifft2(spectrum * fine).abs()
            first.append(_averaged(inner, self._average))
            inner_spectrum = torch.fft.fft2(inner)
            # |x * ψ| has little above half the frequencies, so half the resolution will do from here on.
            second += [_averaged(_coarser(inner_spectrum, coarse), self._average_half) for coarse in self._coarse]
        first += [_averaged(_coarser(spectrum, coarse), self._average_half) for coarse in self._coarse]
        return _averaged(x, self._average).unsqueeze(2), torch.stack(first, 2), torch.stack(second, 2)


def _coarser(spectrum: Tensor, wavelet: Tensor) -> Tensor:
    """The modulus of what a wavelet of the second scale leaves, at half the resolution."""
    return torch.fft.ifft2(_folded(spectrum * wavelet, 2)).abs()


def _averaged(x: Tensor, average: list[Tensor]) -> Tensor:
    return average[0] @ x @ average[1].T


def _averaging(size: int, sigma: float, stride: int) -> Tensor:
    """Matrix [positions, size] of a Gaussian average around every `stride`-th position, none of them padding."""
    distance = torch.arange(size, dtype=torch.float64) - torch.arange(0, size, stride, dtype=torch.float64)[:, None]
    distance = torch.minimum(distance.abs(), size - distance.abs())  # as the transform has it: the border wraps
    bump = torch.exp(-(distance**2) / (2 * sigma**2))
    return (bump / bump.sum(1, keepdim=True))[1:-1].float()


def _folded(spectrum: Tensor, stride: int) -> Tensor:
    """The spectrum of every `stride`-th position: the mean of its aliases."""
    *lead, height, width = spectrum.shape
    return spectrum.reshape(*lead, stride, height // stride, stride, width // stride).mean((-4, -2))


def _wavelet(size: list[int], sigma: float, frequency: float, turn: float, slant: float) -> Tensor:
    """Spectrum of a Morlet wavelet: a wave under a Gaussian, less the constant that makes its mean 0."""
    y, x = (torch.arange(s, dtype=torch.float64) - s // 2 for s in size)
    y, x = y[:, None], x[None, :]
    along, across = math.cos(turn) * x + math.sin(turn) * y, -math.sin(turn) * x + math.cos(turn) * y
    envelope = torch.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2))
    wave = torch.exp(1j * frequency * along)
    morlet = envelope * (wave - (envelope * wave).sum() / envelope.sum()) * slant / (2 * math.pi * sigma**2)
    # The wavelet is its own conjugate mirrored, so its spectrum is real.
    return torch.fft.fft2(torch.fft.ifftshift(morlet)).real.float()
