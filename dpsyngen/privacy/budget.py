"""Several runs on the same images: one budget for all of them, and what their ledgers cost together.

A budget is a file that every run charges before it begins, and that refuses the rest.  It is a hash chain like a run's
ledger.  A run *reserves* the whole of what it plans before its first step, so that two runs cannot find out half-way
that both do not fit.  A run that was given up can be *settled*: then only the steps that its ledger has count, and it
can never be resumed.

The file belongs with the private images: it holds a keyed digest of them (and the key).
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from dpsyngen.config import MAX_EPSILON
from dpsyngen.errors import BudgetExceeded, ConfigError, LedgerError, require
from dpsyngen.privacy.accounting import (
    LEAST_NOISE,
    SMALLEST_EPSILON,
    Accountant,
    Bound,
    Mechanism,
    calibrate_noise,
    check_group_size,
    default_delta,
    epsilon,
    epsilon_bound,
    merge,
)
from dpsyngen.privacy.certificate import rounded_up
from dpsyngen.privacy.ledger import HashChain, Ledger, check_affordable, start_chain

FORMAT = 1


@dataclass(frozen=True)
class Charge:
    """What a run (:attr:`Ledger.run`, called `name`) takes: what it may do or, once settled, what it did."""

    run: str
    name: str
    mechanisms: tuple[Mechanism, ...]
    settled: bool
    by_person: bool  # whether it protects persons


class Budget(HashChain):
    """The budget of a data set; see :meth:`create`.  LedgerError if the file is missing or was edited or truncated.

    Attributes:
        epsilon_limit, delta: what all runs together may spend; ε finite.
        group_size: g; the limit is for up to g records together, or for each person where runs protect persons.
        growing: whether runs may be on changed images.
        charges: by run, in the order in which they began.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "budget file")
        header, *records = self.bodies
        if header.get("format") != FORMAT or header.get("kind") != "budget":
            raise LedgerError(f"{path} is not a budget file of format {FORMAT}.  Make one with `dpsyngen budget new`.")
        try:
            self.epsilon_limit, self.delta = float(header["epsilon"]), float(header["delta"])
            self.group_size, self.growing = header["group_size"], bool(header["growing"])
            check_group_size(self.group_size)
            self._salt = bytes.fromhex(header["salt"])
            self.charges: dict[str, Charge] = {}
            self._data: str | None = None
            for body in records:
                self._take(body)
        except (KeyError, TypeError, ValueError) as error:
            raise LedgerError(f"the budget file {path} is damaged: {error!r}.") from None

    @classmethod
    def create(
        cls, path: Path, *, epsilon_limit: float, delta: float, group_size: int = 1, growing: bool = False
    ) -> Budget:
        """Start a budget in a new file of an existing folder; the arguments are the attributes."""
        _require_epsilon("the budget ε", epsilon_limit)
        # Training refuses δ from 1/n on, and whether n images are too many for this δ is known only then.
        require(0 < delta <= 0.01, "delta", delta, "above 0 and at most 0.01; below 1/n for n images")
        require(path.parent.is_dir(), "the folder of the budget file", path.parent, "an existing one")
        check_group_size(group_size)
        if path.exists():
            raise ConfigError(
                f"{path} exists already; a budget file is never started twice.  Choose another name, or charge this "
                f"one: `dpsyngen budget show {path}` says what is left."
            )
        header = {"format": FORMAT, "kind": "budget", "epsilon": epsilon_limit, "delta": delta}
        header |= {"group_size": group_size, "growing": growing, "salt": os.urandom(32).hex()}
        with _locked(path):  # of two that start it at once, the second is refused
            start_chain(path, "budget file", header)
        return cls(path)

    # ------------------------------------------------------------------------------------------ reading

    @property
    def by_person(self) -> bool:
        """Whether the runs protect persons (``privacy.most_per_person``); all do, or none."""
        return any(charge.by_person for charge in self.charges.values())

    def mechanisms(self, without: str | None = None) -> tuple[Mechanism, ...]:
        """All that is reserved or spent, leaving out the run `without`."""
        return merge(m for c in self.charges.values() if c.run != without for m in c.mechanisms)

    def epsilon(self, accountant: Accountant = "pld") -> float:
        """ε of all runs together, reservations included."""
        return epsilon(self.mechanisms(), self.delta, accountant, self.group_size)

    def require(self, mechanisms: tuple[Mechanism, ...], run: str | None = None) -> None:
        """Raise :class:`BudgetExceeded` if `mechanisms` do not fit beside the other runs."""
        if any(m.noise_multiplier == 0 for m in mechanisms):
            raise BudgetExceeded(
                "refused: training without noise (ε = ∞) exceeds any budget.  Train without --budget; never release it."
            )
        others, whose = self.mechanisms(without=run), f"budget of {self.path},"
        try:
            check_affordable((*others, *mechanisms), self.epsilon_limit, self.delta, self.group_size, whose)
        except BudgetExceeded as refusal:
            raise BudgetExceeded(f"{refusal}  {self._advice(others, mechanisms)}") from None

    def _advice(self, others: tuple[Mechanism, ...], mechanisms: tuple[Mechanism, ...]) -> str:
        """What would fit, for a run of as many steps at the same sampling rate."""
        # The ε that is left is about the same whatever it is spent on; DP-SGD comes last.
        q, steps = mechanisms[-1].sampling_rate, mechanisms[-1].count
        try:
            whose: dict[str, Any] = {"spent": others, "group_size": self.group_size, "tolerance": 1e-2}
            noise = calibrate_noise(self.epsilon_limit, self.delta, sampling_rate=q, steps=steps, **whose)
        except ValueError:
            return "Nothing of it is left."
        alone = epsilon([Mechanism(q, noise, steps)], self.delta, group_size=self.group_size)
        unit = "" if self.group_size == 1 else f" for {self.group_size} images together"
        # Three digits of 0.995 times a number are never above it.
        fits = f"a run of ε = {0.995 * alone:.3g} at --delta {self.delta:g}{unit}"
        return f"With these steps and this batch {fits} on its own would fit."

    def require_data(self, fingerprint: str, most_per_person: int | None) -> None:
        """Raise ConfigError if the budget is of other images, or its runs and this one do not protect the same."""
        # Without one of a person's images another of theirs may be used in its place, so neither promise implies the
        # other, and no sum of the two would be a promise at all.
        if self.charges and self.by_person != (most_per_person is not None):
            theirs, its = ("persons", "images") if self.by_person else ("images", "persons")
            raise ConfigError(
                f"the runs of {self.path} protect {theirs} and this one would protect {its} (--most-per-person): they "
                "have no common ε.  Train as the others did, or make another budget."
            )
        if most_per_person is not None and most_per_person > self.group_size:
            raise ConfigError(
                f"{self.path} is a budget for {self.group_size} images together, and this run uses up to "
                f"{most_per_person} of each person: make a budget with --group-size {most_per_person}."
            )
        self._require_images(fingerprint)

    def _require_images(self, fingerprint: str) -> None:
        if self._data is not None and not self.growing and not hmac.compare_digest(self._data, self._tag(fingerprint)):
            raise ConfigError(
                f"{self.path} is the budget of other images: give the one of these, or make one with `dpsyngen budget "
                "new`, with --growing if images come and go between runs."
            )

    # ------------------------------------------------------------------------------------------ writing

    def reserve(
        self,
        run: str,
        name: str,
        mechanisms: tuple[Mechanism, ...],
        fingerprint: str,
        most_per_person: int | None = None,
    ) -> None:
        """Take what a run plans, before it begins; nothing happens if it was taken already.

        Raises:
            BudgetExceeded: it does not fit, or the run was settled; nothing was written.
            ConfigError: see :meth:`require_data`.
            LedgerError: the run reserved something else before.
        """
        with self._alone():
            known = self.charges.get(run)
            if known and known.settled:
                raise BudgetExceeded(
                    f"refused: this run was given up in {self.path}: what it left may be spent.  Start a new run."
                )
            if known:
                self._require_images(fingerprint)
                if merge(known.mechanisms) != merge(mechanisms):
                    raise LedgerError(
                        f"this run reserved other steps in {self.path}: its configuration was changed.  Undo that, or "
                        "start a new run."
                    )
                return
            self.require_data(fingerprint, most_per_person)
            self.require(mechanisms, run)
            charge = Charge(run, name, mechanisms, False, most_per_person is not None)
            self._append(charge, self._tag(fingerprint))

    def settle(self, run: str, spent: Iterable[Mechanism]) -> None:
        """Give a run up: from now on it counts with `spent`, what its ledger has, and it cannot go on.

        LedgerError if the budget knows no such run, or it was settled before.
        """
        Budget(self.path)._reserved(run)  # first without the lock, so that a refusal makes no file
        with self._alone():
            self._append(replace(self._reserved(run), mechanisms=merge(spent), settled=True), None)

    def _reserved(self, run: str) -> Charge:
        known = self.charges.get(run)
        if known is None or known.settled:
            why = "knows no such run" if known is None else "has this run settled already"
            raise LedgerError(f"{self.path} {why}; nothing was changed.")
        return known

    def _append(self, charge: Charge, data: str | None) -> None:
        body = asdict(charge) | {"data": data}
        self._write(body)
        self._take(body)

    def _take(self, body: dict[str, Any]) -> None:
        mechanisms = tuple(Mechanism(**m) for m in body["mechanisms"])
        settled, by_person = bool(body["settled"]), bool(body["by_person"])
        charge = Charge(str(body["run"]), str(body["name"]), mechanisms, settled, by_person)
        if (charge.run in self.charges) != charge.settled:
            raise ValueError(f"run {charge.run}")
        self.charges[charge.run] = charge
        self._data = self._data or body["data"]

    def _tag(self, fingerprint: str) -> str:
        return hashlib.blake2b(fingerprint.encode(), key=self._salt, digest_size=32).hexdigest()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the file (a killed process frees it), and know all that other processes wrote into it before."""
        if not self.path.exists():
            raise LedgerError(f"the budget file {self.path} is gone.")
        with _locked(self.path):
            self.__init__(self.path)  # type: ignore[misc]
            yield


def _locked(path: Path) -> FileLock:
    return FileLock(f"{path.resolve()}.lock", mode=0o600)


# -------------------------------------------------------------------------------------------- several ledgers


@dataclass(frozen=True)
class Composition:
    """The mechanisms of one or several runs, as one.

    Formal guarantee: releasing the results of all of them is (ε, δ)-differentially private for each image (or group of
    images) with ε = ``epsilon(delta)``, also where later runs were chosen by looking at the releases of earlier ones.
    Runs on different images only make the bound larger than it need be.

    Attributes:
        mechanisms: equal ones counted together.
        delta, group_size: the smallest δ and the largest g of the ledgers.
        non_private, secure: whether any run used images without noise, and whether all noise was unpredictable.
    """

    mechanisms: tuple[Mechanism, ...]
    delta: float
    group_size: int
    non_private: bool
    secure: bool

    @classmethod
    def of(cls, ledgers: Sequence[Ledger]) -> Composition:
        """All of what `ledgers`, one or more, have."""
        return cls(
            merge(m for ledger in ledgers for m in ledger.mechanisms),
            min(ledger.delta for ledger in ledgers),
            max(ledger.group_size for ledger in ledgers),
            any(ledger.non_private for ledger in ledgers),
            all(ledger.secure for ledger in ledgers),
        )

    def epsilon(
        self, delta: float | None = None, accountant: Accountant = "pld", group_size: int | None = None
    ) -> float:
        """Upper bound on ε at `delta` for `group_size` records together; None: those of the ledgers."""
        if self.non_private:
            return math.inf
        g = self.group_size if group_size is None else group_size
        return epsilon(self.mechanisms, self.delta if delta is None else delta, accountant, g)

    def bound(self, delta: float | None = None, group_size: int | None = None) -> Bound:
        """:meth:`epsilon` by "pld", with how it was computed."""
        if self.non_private:
            return Bound(math.inf, "images were used without noise")
        g = self.group_size if group_size is None else group_size
        return epsilon_bound(self.mechanisms, self.delta if delta is None else delta, g)

    def what_if(self, deltas: Iterable[float], groups: Iterable[int]) -> list[dict[str, Any]]:
        """ε by both accountants: first as it is, then at each other δ, then for groups of each other size."""
        d, g = self.delta, self.group_size
        cases = dict.fromkeys([(d, g), *((other, g) for other in deltas), *((d, other) for other in groups)])
        return [
            {
                "delta": delta,
                "group_size": group_size,
                "epsilon": (bound := self.bound(delta, group_size)).epsilon,
                "epsilon_by_rdp": self.epsilon(delta, "rdp", group_size),
                "accountant": bound.by,
            }
            for delta, group_size in cases
        ]


# --------------------------------------------------------------------------------- what a budget buys


@dataclass(frozen=True)
class PlanRow:
    """One plan and its cost: ε by both accountants, epochs (how often an image is used on average), and the standard
    deviation of the noise in a coordinate of the mean gradient, in units of C; `accountant`: how ε was computed.
    """

    steps: int
    batch: int
    sampling_rate: float
    epochs: float
    noise_multiplier: float
    epsilon: float
    epsilon_by_rdp: float
    noise_a_step: float
    asked: bool
    accountant: str


def neighbouring_plans(
    records: int,
    batch: int,
    steps: int,
    *,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    delta: float | None = None,
    group_size: int = 1,
) -> tuple[float, list[PlanRow]]:
    """What training costs, or what noise a budget needs, and how neighbouring plans compare.

    Args:
        records, batch, steps: number of private images n, expected batch (at most n), DP-SGD steps.
        epsilon, noise_multiplier: target ε, or z: exactly one of the two.
        delta, group_size: δ (None: :func:`default_delta`), and g: ε is for up to g records together.

    Returns:
        δ, and the plans, the one that was asked about first.
    """
    if (epsilon is None) == (noise_multiplier is None):
        raise ConfigError("give one of --epsilon (how much noise does it need?) and --noise (what does it cost?).")
    require(1 <= records <= 10**12, "records", records, "from 1 to a million million, as in training")
    require(1 <= steps <= 10**6, "steps", steps, "from 1 to a million, as in training")
    require(1 <= batch <= records, "the batch", batch, f"from 1 to the {records:,} records")
    delta = default_delta(records) if delta is None else delta
    require(0 < delta < 1 / records, "delta", delta, f"above 0 and below 1/records = {1 / records:.3g}")
    if epsilon is not None:
        _require_epsilon("epsilon", epsilon)
    ok = noise_multiplier is None or LEAST_NOISE <= noise_multiplier < math.inf
    require(ok, "the noise multiplier", noise_multiplier, f"a number from {LEAST_NOISE:g}; less protects nobody")
    check_group_size(group_size)

    plans = [(steps, batch)]
    plans += [(max(1, steps // 2), batch), (steps * 2, batch)]
    plans += [(steps, b) for b in (max(1, batch // 2), batch * 2) if b <= records]
    rows = []
    for number, (t, b) in enumerate(dict.fromkeys(plans)):
        q = b / records
        z = noise_multiplier or calibrate_noise(epsilon or 0.0, delta, sampling_rate=q, steps=t, group_size=group_size)
        m = (Mechanism(q, z, t),)
        cost = Composition(m, delta, group_size, False, True)
        bound, by_rdp = cost.bound(), cost.epsilon(accountant="rdp")
        rows.append(PlanRow(t, b, q, q * t, z, bound.epsilon, by_rdp, z / b, number == 0, bound.by))
    return delta, rows


def _require_epsilon(name: str, epsilon: float) -> None:
    ok = SMALLEST_EPSILON <= epsilon <= MAX_EPSILON
    require(ok, name, epsilon, f"from {SMALLEST_EPSILON} to {MAX_EPSILON:g}; more protects nobody")


def plan_lines(records: int, group_size: int, delta: float, rows: list[PlanRow]) -> Iterator[str]:
    """:func:`neighbouring_plans` as a table for people."""
    unit = "one image = one record" if group_size == 1 else f"up to {group_size} images of one person together"
    yield from (
        f"{records:,} records, {unit}, add/remove; δ = {delta:.3g}",
        "Poisson-subsampled Gaussian mechanism; ε PLD: how it was computed stands below; beside it by Rényi DP",
        "",
        f"{'steps':>8} {'batch':>8} {'rate':>9} {'epochs':>8} {'noise z':>9} {'ε PLD':>9} {'ε RDP':>9} "
        f"{'noise a step':>13}",
    )
    for r in rows:
        yield (
            f"{r.steps:>8,} {r.batch:>8,} {r.sampling_rate:>9.5f} {r.epochs:>8.1f} {r.noise_multiplier:>9.4f} "
            f"{rounded_up(r.epsilon, 4):>9} {rounded_up(r.epsilon_by_rdp, 4):>9} {r.noise_a_step:>11.6f} C"
            f"{'  <- asked' if r.asked else ''}"
        )
    yield ""
    for r in rows:
        if r.asked or r.accountant.partition(" (")[0] != rows[0].accountant.partition(" (")[0]:
            yield f"ε of {r.steps:,} steps of batch {r.batch:,}: by {r.accountant}"
    yield from (
        "epochs: how often an image is used on average.  noise a step: standard deviation of the noise in each",
        "coordinate of the mean gradient, in units of the clipping norm C; lower is better for the same steps.",
    )
