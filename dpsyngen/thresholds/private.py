"""The gap of two public denoisers on *private* images, by one run of the Gaussian mechanism.

**The query.**  For each image x₀ and each of M noise levels three squares, means over the pixels: (D_a - D_b)²,
(D_a - x₀)² and (D_b - x₀)², where D_a and D_b saw public images only.  Multiplied by EDM's weight λ(σ) they are of the
order of 1 at every σ.  The vector of these 3M numbers is scaled down to L2 norm C if it is longer, summed over the
images, and Gaussian noise of standard deviation zC is added to each entry; the sum is divided by the declared number of
records (times the sampling rate).

**Sensitivity.**  Adding or removing one image adds or removes one vector of norm at most C and changes no other, so the
sum moves by at most C in L2: the noise that blurs x₀ follows from the run's key and the *content* of the image, not
from its place among the others.  C is chosen by public images.  (Two equal images have the same blur; the bound holds
all the same.)

Formal guarantee: the estimate is one run of the (Poisson-subsampled, with a sampling rate below 1) Gaussian mechanism
with noise multiplier z under adding or removing one image, with the declared number of records and the sampling rate
fixed as public constants.

**On the disk.**  ``private/`` (mode 0700) is a :class:`dpsyngen.training.session.Session`; after its files come the
reservation in the budget file, the charge in the ledger, the computation, and ``private_gap.json``, what the mechanism
released.  A call that was killed goes on behind the last of these, with the same noise for the same sum, and nothing is
charged twice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpsyngen.config import Config
from dpsyngen.data import ImageDataset
from dpsyngen.diffusion.denoiser import NetworkDenoiser, loss_weight
from dpsyngen.diffusion.samplers import to_float
from dpsyngen.errors import ConfigError, RunError, require
from dpsyngen.files import write_json
from dpsyngen.privacy.accounting import Mechanism, calibrate_noise, default_delta
from dpsyngen.privacy.budget import Budget
from dpsyngen.privacy.clipping import ClippedGradient, clip_and_sum
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.noise import noisy_mean
from dpsyngen.privacy.randomness import Randomness, poisson_sample
from dpsyngen.thresholds.gap import Answers, GapCurve, Pair, measure
from dpsyngen.training.session import Session, with_group_size
from dpsyngen.workers import Workers

_STORED = ("log_sigma", "gap", "teacher_loss", "student_loss", "noise")  # curves in private_gap.json
_CHUNK = 512  # images in memory at a time


@dataclass(frozen=True)
class GapQuery:
    """The constants of the mechanism."""

    records: int  # declared number of records n, public
    noise_multiplier: float  # z > 0
    clipping_norm: float  # C > 0
    sampling_rate: float = 1.0  # q in (0, 1]; 1 uses every image

    def mechanism(self) -> Mechanism:
        """The query as the accountant sees it."""
        return Mechanism(self.sampling_rate, self.noise_multiplier, 1)

    @property
    def noise(self) -> float:
        """Standard deviation of the noise in an entry of the released mean: zC/(qn)."""
        return self.noise_multiplier * self.clipping_norm / (self.sampling_rate * self.records)


class PrivateGap:
    """Computes what images contribute, and releases their noisy mean.

    `networks` are D_a, the teacher, and D_b, the student, by name, trained on public images only; `sigma_data` is σ_d
    of the weight λ(σ).  The key of `randomness` decides the blur of every image, the sampling and the noise.
    """

    def __init__(
        self,
        networks: Mapping[str, NetworkDenoiser],
        log_sigma: tuple[float, ...],
        sigma_data: float,
        randomness: Randomness,
        workers: Workers | None = None,
    ) -> None:
        self.networks, self.log_sigma, self.randomness, self.workers = networks, log_sigma, randomness, workers
        teacher, student = networks
        self.pair: Pair = (teacher, student)
        self.weights = gap_weights(log_sigma, sigma_data)
        self.device = next(networks[teacher].parameters()).device

    def contributions(self, images: NDArray[np.uint8]) -> Tensor:
        """The vector of each image, uint8 [n, C, H, W], before clipping: float64 [n, 3M], of image and key alone."""
        answers = measure(
            self.networks,
            to_float(torch.from_numpy(np.ascontiguousarray(images)).to(self.device)),
            self.log_sigma,
            [self.pair],
            lambda part: torch.stack([self._blur(image) for image in images[part]]),
            workers=self.workers,
        )
        return weighted_vectors(answers, self.pair, self.weights)

    def _blur(self, image: NDArray[np.uint8]) -> Tensor:
        # Keyed by the content: were it keyed by the place, removing one image would change the vectors of all others.
        content = hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=16).digest()
        seed = self.randomness.seed("augmentation", int.from_bytes(content, "little"))
        return torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))

    def summed(
        self, dataset: ImageDataset, query: GapQuery, on_progress: Callable[[int, int], None] | None = None
    ) -> ClippedGradient:
        """The clipped sum over the (sampled) images, with its sensitivity.  Private.

        `on_progress` is called with the number of images that are done, and of all.
        """
        chosen = poisson_sample(self.randomness, 0, len(dataset), query.sampling_rate)
        empty = [torch.zeros(3 * len(self.log_sigma), dtype=torch.float64)]
        total = ClippedGradient(empty, query.clipping_norm, 0, torch.zeros(0), 0)
        for start in range(0, len(chosen), _CHUNK):
            part = chosen[start : start + _CHUNK]
            total = total + clip_and_sum([self.contributions(dataset.batch(part))], query.clipping_norm)
            if on_progress is not None:
                on_progress(start + len(part), len(chosen))
        return total

    def released(self, total: ClippedGradient, query: GapQuery) -> GapCurve:
        """The mechanism: means over the images with noise; those whose vector was longer than C count with less than
        their share.  Its event has to be in the ledger before; from here on everything is post-processing.
        """
        (mean,) = noisy_mean(
            total,
            noise_multiplier=query.noise_multiplier,
            expected_examples=query.sampling_rate * query.records,
            randomness=self.randomness,
            step=0,
        )
        weights = self.weights.numpy()
        gap, teacher, student = mean.double().cpu().numpy().reshape(3, 1, 1, -1) / weights
        return GapCurve("private", *self.pair, gap, teacher, student, query.noise / weights)


def gap_weights(log_sigma: tuple[float, ...], sigma_data: float) -> Tensor:
    """EDM's λ(σ) at each level, float64 [M]."""
    return loss_weight(torch.tensor(log_sigma, dtype=torch.float64).exp(), sigma_data)


def weighted_vectors(answers: Answers, pair: Pair, weights: Tensor) -> Tensor:
    """The vectors of the module's first paragraph, float64 [N, 3M]."""
    parts = [answers.gaps[pair], answers.losses[pair[0]], answers.losses[pair[1]]]
    return torch.cat([torch.from_numpy(p) * weights for p in parts], 1)


def public_clipping_norm(vectors: list[Tensor], share: float = 0.9) -> float:
    """C: the norm that `share` of *public* images' vectors do not exceed, to two digits."""
    norms = torch.cat([v.norm(dim=1) for v in vectors])
    return float(f"{float(torch.quantile(norms, share)):.2g}")


# ------------------------------------------------------------------------------------ charged once


class PrivateEstimate:
    """The private half of a folder of ``dpsyngen stages``.

    Making it calibrates the noise and checks everything (ConfigError, LedgerError), the budget too (BudgetExceeded);
    nothing is written or spent.  The clipping norm in its `query` is not yet the one that public images suggest;
    `budget` is None only with a reproducible seed.
    """

    def __init__(self, folder: Path, config: Config, dataset: ImageDataset, sampling_rate: float = 1.0) -> None:
        p = config.privacy
        why = "finite, or figures of private images would be published without noise; public ones belong to --proxy"
        require(p.epsilon < float("inf"), "--epsilon", p.epsilon, why)
        if p.budget is None and p.insecure_seed is None:
            raise ConfigError(
                "--budget is missing: a training with thresholds that come from the private images has to count this "
                "estimate.  Make a file for both by `dpsyngen budget new FILE --epsilon … --delta …`."
            )
        require(0 < sampling_rate <= 1, "--sampling-rate", sampling_rate, "above 0 and at most 1")
        config = with_group_size(config, dataset)
        p, self.config = config.privacy, config
        records = config.data.records or dataset.images_a_person(p.most_per_person)[1]
        delta = default_delta(records) if p.delta is None else p.delta
        require(delta < 1 / records, "--delta", delta, f"below 1/records = {1 / records:.3g}")
        try:
            noise = calibrate_noise(
                p.epsilon, delta, sampling_rate=sampling_rate, steps=1, group_size=p.group_size, tolerance=1e-3
            )
        except ValueError as error:
            raise ConfigError(f"no noise gives ε = {p.epsilon} at δ = {delta:.3g} ({error})  Use a larger ε.") from None
        self.private, self.result_path = folder / "private", folder / "private_gap.json"
        self.dataset, self.privacy, self.delta = dataset, p, delta
        self.query = GapQuery(records, noise, 1.0, sampling_rate)
        self.sigma_data = config.network.sigma_data
        self.budget = None if p.budget is None else Budget(Path(p.budget).resolve())
        if self.budget is not None:
            self.budget.require_data(dataset.fingerprint(), p.most_per_person)
            # Beside what else is in it; this estimate itself may be charged already.
            ledger = self.private / "ledger.jsonl"
            self.budget.require((self.query.mechanism(),), Ledger(ledger).run if ledger.exists() else None)

    def released(
        self,
        networks: Mapping[str, NetworkDenoiser],
        log_sigma: tuple[float, ...],
        clipping_norm: float,
        name: str,
        workers: Workers | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> tuple[GapCurve, dict[str, Any]]:
        """Charge and run the query, or read what it gave before; the caller has locked the folder.

        `clipping_norm` is C, chosen by public images, and `name` what the budget file calls this estimate.  Returns the
        curve, and what was spent and how; RunError or LedgerError if the files in the folder do not fit together.
        """
        p, q = self.privacy, self.query
        self.private.mkdir(mode=0o700, exist_ok=True)
        os.chmod(self.private, 0o700)
        again = "start again in another folder, which charges again"
        session = Session(self.private, p, self.delta, q.records, (self.result_path,), again)
        whole, dataset = self.dataset.fingerprint(), session.images(self.config, self.dataset)
        fixed = {"networks": [_digest(network) for network in networks.values()], "log_sigma": list(log_sigma)}
        fixed |= {"records": q.records, "sampling_rate": q.sampling_rate}
        # Calibration and public clipping could differ in the last digits with another version of a library.
        known = session.pin(
            dataset.fingerprint(),
            fixed,
            records=len(dataset),
            noise_multiplier=q.noise_multiplier,
            clipping_norm=clipping_norm,
        )
        q = replace(q, noise_multiplier=known["noise_multiplier"], clipping_norm=float(known["clipping_norm"]))
        if self.result_path.exists():
            return self._read(*networks)
        if self.budget is not None:
            self.budget.reserve(session.ledger.run, name, (q.mechanism(),), whole, p.most_per_person)
        ledger = session.ledger
        if not ledger.mechanisms:
            ledger.charge(
                q.mechanism(),
                "gap of two public denoisers on the private images, by noise level (dpsyngen stages)",
                l2_sensitivity=q.clipping_norm,
                values=3 * len(log_sigma),
            )
        gap = PrivateGap(networks, log_sigma, self.sigma_data, session.randomness, workers)
        curve = gap.released(gap.summed(dataset, q, on_progress), q)
        statement = {
            "private": ledger.secure,
            "epsilon": ledger.epsilon(),
            "delta": ledger.delta,
            "group_size": ledger.group_size,
            "adjacency": "add or remove records; sampling rate and normaliser are public constants",
            **asdict(q),
        }
        curves = (log_sigma, curve.gap, curve.teacher_loss, curve.student_loss, curve.noise)
        stated = {name: np.ravel(values).tolist() for name, values in zip(_STORED, curves, strict=True)} | statement
        write_json(self.result_path, stated)
        return self._read(*networks)

    def _read(self, teacher: str, student: str) -> tuple[GapCurve, dict[str, Any]]:
        try:
            stored = json.loads(self.result_path.read_text(encoding="utf-8"))
            # ValueError if they differ in length.
            arrays = np.array([[float(v) for v in stored.pop(name)] for name in _STORED])
            _, gap, teacher_loss, student_loss, noise = arrays[:, None, None]
            curve = GapCurve("private", teacher, student, gap, teacher_loss, student_loss, noise[0, 0])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RunError(
                f"{self.result_path} is damaged: {error!r}.  Remove it and start the same command again: the noise is "
                "the same, and nothing is charged."
            ) from None
        return curve, stored


def _digest(denoiser: NetworkDenoiser) -> str:
    h = hashlib.sha256()
    for name, value in sorted(denoiser.state_dict().items()):
        h.update(name.encode())
        h.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()
