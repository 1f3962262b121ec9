"""Running the private gap query once: its key, its ledger, its budget, and what a crash leaves.

::

    private/      mode 0700: randomness.json (the key), ledger.jsonl, data.json (what was measured with what)
    private_gap.json   what the mechanism released

The order is: key; ledger; ``data.json``, which pins images, networks and constants; the reservation in the budget file;
the charge in the ledger; the computation; ``private_gap.json``.  A call that was killed goes on behind the last of
these that is on the disk, with the same key, so that the noise it adds is the noise it would have added, to the same
sum, and nothing is charged twice.  Other images, networks or constants are refused: they would get that noise, too.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpsyngen.config import Config
from dpsyngen.data import ImageDataset
from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.errors import ConfigError, RunError
from dpsyngen.files import write_text
from dpsyngen.privacy.accounting import calibrate_noise, default_delta
from dpsyngen.privacy.budget import Budget
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.thresholds.private_gap import GapQuery, PrivateCurve, PrivateGap
from dpsyngen.workers import Workers


@dataclass(frozen=True)
class PrivatePlan:
    """What is fixed before anything else is done.

    Attributes:
        dataset: the private images.
        epsilon, delta, group_size: what the estimate may cost.
        records: declared number of records.
        noise_multiplier: z.
        sampling_rate: q.
        budget: path of the budget file; None only with a reproducible seed, which is NOT PRIVATE.
        insecure_seed: see ``privacy.insecure_seed``.
        sigma_data: σ_d of the weight λ(σ).
    """

    dataset: ImageDataset
    epsilon: float
    delta: float
    group_size: int
    records: int
    noise_multiplier: float
    sampling_rate: float
    budget: Path | None
    insecure_seed: int | None
    sigma_data: float

    def query(self, clipping_norm: float) -> GapQuery:
        return GapQuery(self.records, self.noise_multiplier, clipping_norm, self.sampling_rate)


def plan_private(config: Config, dataset: ImageDataset, sampling_rate: float = 1.0) -> PrivatePlan:
    """Check everything and calibrate the noise; nothing is written or spent.

    Args:
        config: its sections ``privacy`` and ``data``.
        dataset: the private images.
        sampling_rate: q in (0, 1].

    Raises:
        ConfigError, BudgetExceeded, LedgerError: see their messages.
    """
    p = config.privacy
    if not p.epsilon < float("inf"):
        raise ConfigError(
            "--epsilon inf would publish figures of the private images without noise.  Give a finite ε; images that "
            "are public belong to --proxy."
        )
    if p.budget is None and p.insecure_seed is None:
        raise ConfigError(
            "--budget is missing: the thresholds would come from the private images, so a training that uses them has "
            "to count this estimate, and the budget file is where it does.  Make one with `dpsyngen budget new FILE "
            "--epsilon … --delta …` for this estimate and the trainings after it together."
        )
    if not 0 < sampling_rate <= 1:
        raise ConfigError(f"--sampling-rate is {sampling_rate}, but must be above 0 and at most 1.")
    records = config.data.records or len(dataset)
    delta = default_delta(records) if p.delta is None else p.delta
    if delta >= 1 / records:
        raise ConfigError(f"--delta is {delta:.3g}, but must be below 1/records = {1 / records:.3g}.")
    try:
        noise = calibrate_noise(
            p.epsilon, delta, sampling_rate=sampling_rate, steps=1, group_size=p.group_size, tolerance=1e-3
        )
    except ValueError as error:
        raise ConfigError(f"no noise gives ε = {p.epsilon} at δ = {delta:.3g} ({error})  Use a larger ε.") from None
    budget = None if p.budget is None else Path(p.budget).resolve()
    plan = PrivatePlan(
        dataset,
        p.epsilon,
        delta,
        p.group_size,
        records,
        noise,
        sampling_rate,
        budget,
        p.insecure_seed,
        config.network.sigma_data,
    )
    if budget is not None:
        opened = Budget(budget)
        opened.require_data(dataset.fingerprint())
    return plan


class PrivateEstimate:
    """The private half of a folder of ``dpsyngen stages``.

    Args:
        folder: the command's output folder; its lock is held.
        plan: see :func:`plan_private`.

    Raises:
        RunError, LedgerError: what is in the folder does not fit together.
    """

    def __init__(self, folder: Path, plan: PrivatePlan) -> None:
        self.plan, self.private, self.result_path = plan, folder / "private", folder / "private_gap.json"
        self._ledger_path = self.private / "ledger.jsonl"
        self._data_path, self._key_path = self.private / "data.json", self.private / "randomness.json"

    @property
    def begun(self) -> bool:
        """Whether the ledger is there, so that something may be charged."""
        return self._ledger_path.exists()

    @property
    def ledger(self) -> Ledger:
        return Ledger(self._ledger_path)

    @property
    def run(self) -> str | None:
        """The name under which the budget knows the estimate; None before it is begun."""
        return self.ledger.run if self.begun else None

    def require_affordable(self) -> None:
        """Raise BudgetExceeded unless the estimate fits into the budget beside what else is in it."""
        if self.plan.budget is not None:
            Budget(self.plan.budget).require((self.plan.query(1.0).mechanism(),), self.run)

    def curve(
        self,
        teacher: NetworkDenoiser,
        student: NetworkDenoiser,
        log_sigma: tuple[float, ...],
        clipping_norm: float,
        name: str,
        workers: Workers | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> PrivateCurve:
        """Charge and run the query, or read what it gave before.

        Args:
            teacher, student: networks that saw public images only.
            log_sigma: M levels.
            clipping_norm: C, chosen by public images.
            name: what the budget file calls this estimate.
            workers: threads that share the images.
            on_progress: called with the number of images that are done, and of all.
        """
        plan = self.plan
        randomness, ledger = self._open()
        query = self._pinned(randomness, ledger, teacher, student, log_sigma, plan.query(clipping_norm))
        if self.result_path.exists():
            return self._read()
        mechanism = query.mechanism()
        if plan.budget is not None:
            Budget(plan.budget).reserve(ledger.run, name, (mechanism,), plan.dataset.fingerprint())
        if not ledger.mechanisms:
            ledger.charge(
                mechanism,
                "gap of two public denoisers on the private images, by noise level (dpsyngen stages)",
                l2_sensitivity=query.clipping_norm,
                values=3 * len(log_sigma),
            )
        gap = PrivateGap(teacher, student, log_sigma, plan.sigma_data, randomness, workers)
        curve = gap.released(gap.summed(plan.dataset, query, on_progress), query)
        about = curve.to_dict() | self._statement(ledger, query)
        write_text(self.result_path, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
        return curve

    def statement(self) -> dict[str, Any]:
        """What was spent and how: the part of the result that is not the curve."""
        stored = json.loads(self.result_path.read_text(encoding="utf-8"))
        return {k: v for k, v in stored.items() if k not in ("log_sigma", "gap", "teacher_loss", "student_loss")}

    def _statement(self, ledger: Ledger, query: GapQuery) -> dict[str, Any]:
        return {
            "private": ledger.secure,
            "epsilon": ledger.epsilon(),
            "delta": ledger.delta,
            "group_size": ledger.group_size,
            "adjacency": "add or remove records; sampling rate and normaliser are public constants",
            "records": query.records,
            "sampling_rate": query.sampling_rate,
            "noise_multiplier": query.noise_multiplier,
            "l2_sensitivity": query.clipping_norm,
        }

    def _open(self) -> tuple[Randomness, Ledger]:
        plan = self.plan
        self.private.mkdir(mode=0o700, exist_ok=True)
        os.chmod(self.private, 0o700)
        if self._key_path.exists():
            randomness = Randomness.load(self._key_path)
        elif self.begun or self._data_path.exists() or self.result_path.exists():
            raise RunError(
                f"{self._key_path} is missing, though the estimate was begun: fresh noise for a charged query would be "
                "wrong.  Put it back from a backup, or start again in another folder, which charges again."
            )
        else:
            seed = plan.insecure_seed
            randomness = Randomness.from_system() if seed is None else Randomness.from_insecure_seed(seed)
            randomness.save(self._key_path)
        run = randomness.tag("name of the run")[:32]
        if self.begun:
            ledger = self.ledger
            ledger.catch_up()
            if ledger.run != run:
                raise RunError(f"{self._key_path} is not the key with which {self._ledger_path} was begun.")
            return randomness, ledger
        if self._data_path.exists() or self.result_path.exists():
            raise RunError(
                f"{self._ledger_path} is missing, though the estimate was begun.  Put it back from a backup, or start "
                "again in another folder, which charges again."
            )
        ledger = Ledger.create(
            self._ledger_path,
            target_epsilon=plan.epsilon,
            delta=plan.delta,
            records=plan.records,
            group_size=plan.group_size,
            run=run,
            secure=randomness.secure,
        )
        return randomness, ledger

    def _pinned(
        self,
        randomness: Randomness,
        ledger: Ledger,
        teacher: NetworkDenoiser,
        student: NetworkDenoiser,
        log_sigma: tuple[float, ...],
        query: GapQuery,
    ) -> GapQuery:
        """Pin what is measured with what; the query as it was pinned, if it was before."""
        fingerprint = randomness.tag(self.plan.dataset.fingerprint())
        fixed: dict[str, Any] = {
            "fingerprint": fingerprint,
            "networks": [_digest(teacher), _digest(student)],
            "log_sigma": list(log_sigma),
            "records": query.records,
            "sampling_rate": query.sampling_rate,
        }
        if not self._data_path.exists():
            if ledger.mechanisms:
                raise RunError(
                    f"{self._data_path} is missing, though the query was charged: nothing says any more that images "
                    "and networks are the same.  Start again in another folder, which charges again."
                )
            # Calibration and public clipping could differ in the last digits with another version of a library.
            values = {"noise_multiplier": query.noise_multiplier, "clipping_norm": query.clipping_norm}
            write_text(self._data_path, json.dumps(fixed | values) + "\n", 0o600)
            return query
        try:
            stored = json.loads(self._data_path.read_text(encoding="utf-8"))
            noise, norm = float(stored["noise_multiplier"]), float(stored["clipping_norm"])
            same = hmac.compare_digest(str(stored["fingerprint"]), fingerprint)
            same = same and all(stored[k] == v for k, v in fixed.items())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self._data_path} cannot be read: {error!r}.  Put it back from a backup.") from None
        if not same:
            raise RunError(
                f"the private images, the networks or the noise levels are not those with which {self.private} was "
                "begun: the same noise on another sum can reveal both.  Undo the change, or start again in another "
                "folder, which charges again."
            )
        return GapQuery(query.records, noise, norm, query.sampling_rate)

    def _read(self) -> PrivateCurve:
        try:
            return PrivateCurve.from_dict(json.loads(self.result_path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunError(
                f"{self.result_path} is damaged: {error!r}.  Remove it and start the same command again: it is "
                "computed again with the same noise, and nothing is charged."
            ) from None


def _digest(denoiser: NetworkDenoiser) -> str:
    h = hashlib.sha256()
    for name, value in sorted(denoiser.state_dict().items()):
        h.update(name.encode())
        h.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()
