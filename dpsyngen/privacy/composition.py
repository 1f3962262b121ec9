"""What several ledgers of the same images cost together, and what the total would be at another δ or for a group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpsyngen.privacy.accounting import Accountant, Mechanism, epsilon, merge
from dpsyngen.privacy.ledger import Ledger


@dataclass(frozen=True)
class Composition:
    """The mechanisms of one or several runs, as one.

    Formal guarantee: releasing the results of all of them is (ε, δ)-differentially private for each image (or group of
    images) with ε = ``epsilon(delta)``, also where later runs were chosen by looking at the releases of earlier ones.
    Runs on different images only make the bound larger than it need be.

    Attributes:
        mechanisms: equal ones counted together.
        delta: the smallest δ of the ledgers.
        group_size: the largest g of the ledgers.
        non_private: whether any run used images without noise.
        secure: whether all noise was unpredictable.
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
        return epsilon(
            self.mechanisms,
            self.delta if delta is None else delta,
            accountant,
            self.group_size if group_size is None else group_size,
        )


def ledger_lines(ledger: Ledger) -> list[str]:
    """The entries of a ledger, a line each."""
    lines = []
    for number, e in enumerate(ledger.entries, 2):
        what = e.reason
        if e.mechanism is not None:
            m = e.mechanism
            what += f": {m.count:,} × Gaussian, noise {m.noise_multiplier:.5g}, sampling rate {m.sampling_rate:.5g}"
        lines.append(f"{number:>5}  {e.kind:<11}  {what}")
    return lines


def what_if_lines(composition: Composition, deltas: Sequence[float], groups: Sequence[int]) -> list[str]:
    """ε by both accountants at other δ and for other groups, as a table."""
    g, d = composition.group_size, composition.delta
    rows = [(d, g, "<- the run's"), *((x, g, "") for x in deltas if x != d), *((d, x, "") for x in groups if x != g)]
    lines = [f"{'δ':>10} {'images':>7} {'ε PLD':>10} {'ε RDP':>10}"]
    for delta, group, note in rows:
        by_pld, by_rdp = (_figure(composition.epsilon(delta, kind, group)) for kind in ("pld", "rdp"))
        lines.append(f"{delta:>10.3g} {group:>7} {by_pld:>10} {by_rdp:>10}  {note}".rstrip())
    return lines


def _figure(value: float) -> str:
    # Rounded up: it is a bound.
    return "∞" if math.isinf(value) else f"{math.ceil(value * 1e4) / 1e4:.4f}"
