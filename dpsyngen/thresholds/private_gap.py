"""The gap of two public denoisers on *private* images, by one run of the Gaussian mechanism.

**The query.**  For each image x₀ and each of M noise levels three squares, means over the pixels: (D_a - D_b)²,
(D_a - x₀)² and (D_b - x₀)², where D_a and D_b saw public images only.  Multiplied by EDM's weight λ(σ) they are of the
order of 1 at every σ.  The vector of these 3M numbers is scaled down to L2 norm C if it is longer, summed over the
images, and Gaussian noise of standard deviation zC is added to each entry; the sum is divided by the declared number of
records (times the sampling rate).

**Sensitivity.**  Adding or removing one image adds or removes one vector of norm at most C and changes no other, so the
sum moves by at most C in L2: the noise that blurs x₀ follows from the run's key and the *content* of the image, not
from its place among the others.  C is chosen by public images.  (An image that is there twice has twice the same blur;
that is no matter for the bound.)

Formal guarantee: the estimate is one run of the (Poisson-subsampled, with a sampling rate below 1) Gaussian mechanism
with noise multiplier z under adding or removing one image, with the declared number of records and the sampling rate
fixed as public constants.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpsyngen.data import ImageDataset
from dpsyngen.diffusion.denoiser import NetworkDenoiser, loss_weight
from dpsyngen.diffusion.samplers import to_float
from dpsyngen.privacy.accounting import Mechanism
from dpsyngen.privacy.clipping import ClippedGradient, clip_and_sum
from dpsyngen.privacy.noise import noisy_mean
from dpsyngen.privacy.randomness import Randomness, poisson_sample
from dpsyngen.thresholds.gap import Answers, Array, MeanCurve, Pair, measure
from dpsyngen.workers import Workers

_PAIR: Pair = ("teacher", "student")
_CHUNK = 512  # images in memory at a time
_FIELDS = ("gap", "teacher_loss", "student_loss")


@dataclass(frozen=True)
class GapQuery:
    """The constants of the mechanism.

    Attributes:
        records: declared number of records n, public.
        noise_multiplier: z > 0.
        clipping_norm: C > 0.
        sampling_rate: q in (0, 1]; 1 uses every image.
    """

    records: int
    noise_multiplier: float
    clipping_norm: float
    sampling_rate: float = 1.0

    def mechanism(self) -> Mechanism:
        """What it is to the accountant."""
        return Mechanism(self.sampling_rate, self.noise_multiplier, 1)

    @property
    def noise(self) -> float:
        """Standard deviation of the noise in an entry of the released mean: zC/(qn)."""
        return self.noise_multiplier * self.clipping_norm / (self.sampling_rate * self.records)


@dataclass(frozen=True)
class PrivateCurve:
    """What the mechanism released; from here on everything is post-processing.

    Attributes:
        log_sigma: [M].
        gap, teacher_loss, student_loss: means over the private images and their pixels, with noise, [M]; images whose
            vector was longer than C count with less than their share.
        noise: standard deviation of the noise in each of the three, [M].
    """

    log_sigma: Array
    gap: Array
    teacher_loss: Array
    student_loss: Array
    noise: Array

    def relative(self) -> Array:
        """The relative gap, [M], at least 0."""
        return _ratio(self.gap, self.teacher_loss, self.noise)

    def excess(self) -> Array:
        """The student's loss over the teacher's, less 1, [M]."""
        return np.asarray(_ratio(self.student_loss, self.teacher_loss, self.noise) - 1)

    def mean_curve(self, replicates: int, seed: int = 0) -> MeanCurve:
        """With the relative gap and the excess as they could have come out with other noise of the mechanism; the
        spread between images is not in it.
        """
        rng = np.random.default_rng(seed)
        shape = (replicates, len(self.log_sigma))
        gap, student, teacher = (
            v + self.noise * rng.standard_normal(shape) for v in (self.gap, self.student_loss, self.teacher_loss)
        )
        drawn = _ratio(gap, teacher, self.noise), _ratio(student, teacher, self.noise) - 1
        return MeanCurve(self.relative(), self.excess(), *drawn)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {name: getattr(self, name).tolist() for name in ("log_sigma", *_FIELDS, "noise")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PrivateCurve:
        """The inverse.  Raises KeyError, TypeError or ValueError if something does not fit."""
        names = ("log_sigma", *_FIELDS, "noise")
        arrays = [np.array([float(v) for v in values[name]], dtype=np.float64) for name in names]
        if len({len(a) for a in arrays}) != 1:
            raise ValueError("its curves differ in length")
        return cls(*arrays)


def _ratio(above: Array, below: Array, noise: Array) -> Array:
    """A ratio of noisy figures that are not negative; a denominator within its noise of 0 counts as that noise."""
    return np.asarray(np.maximum(above, 0) / np.maximum(below, np.maximum(noise, 1e-300)))


class PrivateGap:
    """Computes what images contribute, and releases their noisy mean.

    Args:
        teacher, student: D_a and D_b, trained on public images only.
        log_sigma: M levels.
        sigma_data: σ_d of the weight λ(σ).
        randomness: the secret streams; their key decides the blur of every image, the sampling and the noise.
        workers: threads that share the images.
    """

    def __init__(
        self,
        teacher: NetworkDenoiser,
        student: NetworkDenoiser,
        log_sigma: tuple[float, ...],
        sigma_data: float,
        randomness: Randomness,
        workers: Workers | None = None,
    ) -> None:
        self.denoisers = dict(zip(_PAIR, (teacher, student), strict=True))
        self.log_sigma, self.randomness, self.workers = log_sigma, randomness, workers or Workers(1)
        self.weights = loss_weight(torch.tensor(log_sigma, dtype=torch.float64).exp(), sigma_data)
        self.device = next(teacher.parameters()).device

    def contributions(self, images: NDArray[np.uint8]) -> Tensor:
        """The vector of each image before clipping, float64 [n, 3M]; a function of the image and the key alone.

        Args:
            images: uint8 [n, C, H, W].
        """
        answers = measure(
            self.denoisers,
            to_float(torch.from_numpy(np.ascontiguousarray(images)).to(self.device)),
            self.log_sigma,
            [_PAIR],
            lambda part: torch.stack([self._blur(image) for image in images[part]]),
            run=self.workers.map,
        )
        return weighted_vectors(answers, _PAIR, self.weights)

    def _blur(self, image: NDArray[np.uint8]) -> Tensor:
        content = hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=16).digest()
        seed = self.randomness.seed("augmentation", int.from_bytes(content, "little"))
        return torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))

    def summed(
        self, dataset: ImageDataset, query: GapQuery, on_progress: Callable[[int, int], None] | None = None
    ) -> ClippedGradient:
        """The clipped sum over the (sampled) images, with its sensitivity.  Private.

        Args:
            dataset: the private images.
            query: the constants.
            on_progress: called with the number of images that are done, and of all.
        """
        chosen = poisson_sample(self.randomness, 0, len(dataset), query.sampling_rate)
        empty = [torch.zeros(len(_FIELDS) * len(self.log_sigma), dtype=torch.float64)]
        total = ClippedGradient(empty, query.clipping_norm, 0, torch.zeros(0), 0)
        for start in range(0, len(chosen), _CHUNK):
            part = chosen[start : start + _CHUNK]
            total = total + clip_and_sum([self.contributions(dataset.batch(part))], query.clipping_norm)
            if on_progress is not None:
                on_progress(start + len(part), len(chosen))
        return total

    def released(self, total: ClippedGradient, query: GapQuery) -> PrivateCurve:
        """The mechanism.  Its event has to be in the ledger before."""
        (mean,) = noisy_mean(
            total,
            noise_multiplier=query.noise_multiplier,
            expected_examples=query.sampling_rate * query.records,
            randomness=self.randomness,
            step=0,
        )
        weights = self.weights.numpy()
        gap, teacher, student = mean.double().cpu().numpy().reshape(len(_FIELDS), -1) / weights
        return PrivateCurve(np.array(self.log_sigma), gap, teacher, student, query.noise / weights)


def weighted_vectors(answers: Answers, pair: Pair, weights: Tensor) -> Tensor:
    """The vectors of the module's first paragraph, float64 [N, 3M]."""
    parts = [answers.gaps[pair], answers.losses[pair[0]], answers.losses[pair[1]]]
    return torch.cat([torch.from_numpy(p) * weights for p in parts], 1)


def public_clipping_norm(vectors: list[Tensor], share: float = 0.9) -> float:
    """C: the norm that `share` of *public* images' vectors do not exceed, two digits of it, so that it is readable."""
    norms = torch.cat([v.norm(dim=1) for v in vectors])
    return float(f"{float(torch.quantile(norms, share)):.2g}")
