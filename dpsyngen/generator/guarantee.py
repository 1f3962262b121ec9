"""The privacy guarantee of a generator, as its certificate states it, for people who ask ``generator.privacy``."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpsyngen.console import html_table
from dpsyngen.errors import ReleaseError, listed, printable
from dpsyngen.files import NotPlainError, open_plain
from dpsyngen.privacy.accounting import Accountant
from dpsyngen.privacy.certificate import Assumptions, BudgetPart, Certificate, MechanismPart, number, plain_words

_MAX_BYTES = 2**26


@dataclass(frozen=True, repr=False)
class Guarantee:
    """What is claimed about a generator: (ε, δ)-differential privacy, for what unit, and what it rests on.

    Every number is read from the certificate (``privacy.json``) in the release, which was computed from the ledger of
    the training.  A release from a stranger states whatever the stranger wrote: :meth:`recompute` computes ε again from
    the mechanisms, and :func:`dpsyngen.verify` checks a whole bundle.

    Attributes:
        certificate: all of it.
    """

    certificate: Certificate

    @classmethod
    def read(cls, release: Path) -> Guarantee:
        """The guarantee of a release folder; ReleaseError if its certificate is missing or damaged."""
        path = release / "privacy.json"
        try:
            with open_plain(path, _MAX_BYTES) as file:
                text = file.read(_MAX_BYTES + 1)
        except (NotPlainError, OSError) as error:
            raise ReleaseError(
                f"the certificate {printable(path)} is missing or damaged ({printable(error)}): no guarantee is known."
            ) from None
        return cls(Certificate.from_json(text, printable(path)))

    @property
    def private(self) -> bool:
        """Whether there is a guarantee."""
        return self.certificate.private

    @property
    def not_private_because(self) -> tuple[str, ...]:
        """Why there is none; () if there is."""
        return tuple(self.certificate.not_private_because)

    @property
    def epsilon(self) -> float:
        """ε, an upper bound by privacy loss distributions; ``math.inf`` if private images were used without noise."""
        return float(self.certificate.epsilon)

    @property
    def epsilon_by_rdp(self) -> float:
        """ε by Rényi DP, a looser upper bound, as a cross-check."""
        return float(self.certificate.epsilon_by_rdp)

    @property
    def delta(self) -> float:
        """δ."""
        return self.certificate.delta

    @property
    def unit(self) -> str:
        """Whose presence is hidden, such as "one image"."""
        return self.certificate.unit

    @property
    def group_size(self) -> int:
        """Images of one person that ε covers together."""
        return self.certificate.group_size

    @property
    def adjacency(self) -> str:
        """Which data sets are neighbours."""
        return self.certificate.adjacency

    @property
    def records(self) -> int:
        """Declared number of private images, which is treated as public."""
        return self.certificate.public_assumptions.records

    @property
    def assumptions(self) -> Assumptions:
        """What is treated as known to everybody: number of images, their size, names of the classes."""
        return self.certificate.public_assumptions

    @property
    def mechanisms(self) -> tuple[MechanismPart, ...]:
        """Every kind of access to the private images whose result is in the release."""
        return tuple(self.certificate.mechanisms)

    @property
    def not_covered(self) -> tuple[str, ...]:
        """What the guarantee does not say anything about."""
        return tuple(self.certificate.not_covered)

    @property
    def budget(self) -> BudgetPart | None:
        """The budget that all runs on these images share, if there is one."""
        return self.certificate.budget

    def recompute(self, accountant: Accountant = "pld") -> float:
        """ε again by "pld" or "rdp", from the mechanisms alone, at the same δ and group size; takes about a second."""
        return self.certificate.recompute(accountant)

    def plain_words(self) -> str:
        """The certificate as Markdown, for people who know no differential privacy (``PRIVACY.md``)."""
        return plain_words(self.certificate)

    def to_dict(self) -> dict[str, Any]:
        """The certificate as it stands in ``privacy.json``."""
        return self.certificate.to_dict()

    @property
    def line(self) -> str:
        """The claim in one line."""
        what = f"ε = {number(self.epsilon, up=True)}"
        if not math.isinf(self.epsilon):
            what += f", δ = {number(self.delta, 3, up=True)} for {printable(self.unit, 200)}, added or removed"
        if self.private:
            return what
        would = what if math.isinf(self.epsilon) else f"it would be {what}"
        return f"NOT PRIVATE: {printable('; '.join(self.not_private_because))} ({would})"

    def _rows(self) -> Iterator[tuple[str, str]]:
        a = self.assumptions
        if not self.private:
            yield "private", "NO: do not publish it if its images are private"
        size = f"{a.channels}x{a.resolution}x{a.resolution}"
        classes = f", classes {listed(a.class_names)}" if a.class_names else ""
        yield "public", f"{self.records:,} records, {size}{classes}"
        yield "neighbours", printable(self.adjacency, 1000)
        for m in self.mechanisms:
            yield "mechanism", _mechanism(m)
        if not math.isinf(self.epsilon_by_rdp):
            yield "cross-check", f"ε = {number(self.epsilon_by_rdp, up=True)} by Rényi DP, a looser bound"
        if self.budget is not None:
            b = self.budget
            yield (
                "budget",
                f"ε = {number(b.reserved_epsilon, up=True)} of {number(b.epsilon)} at δ = {number(b.delta, 3)} was "
                f"taken at the release, by {b.runs:,} run{'' if b.runs == 1 else 's'} on these images",
            )
        elif self.private:
            yield "assumed", "no other release was made from these images, or ε adds up"
        for text in self.not_covered:
            yield "not covered", printable(text, 200)

    def __repr__(self) -> str:
        width = max(len(name) for name, _ in self._rows())
        return "\n".join([self.line, *(f"  {name:<{width}}  {text}" for name, text in self._rows())])

    def _repr_html_(self) -> str:
        loud = "" if self.private else ' style="color: #b00020"'
        return f"<p{loud}><strong>{html.escape(self.line)}</strong></p>{html_table(self._rows())}"


def _mechanism(m: MechanismPart) -> str:
    reason = printable(m.reason, 200)
    if m.kind != "dp" or m.sampling_rate is None or m.noise_multiplier is None or m.count is None:
        return f"{reason}: without noise"
    times = "once" if m.count == 1 else f"{m.count:,} times"
    rate = f"sampling rate {number(m.sampling_rate)}, " if m.sampling_rate < 1 else ""
    return f"{reason}: {printable(m.mechanism, 200)}, {times}, {rate}noise multiplier {number(m.noise_multiplier)}"
