"""The privacy guarantee of a generator, as its certificate states it, for people who ask ``generator.privacy``."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from pathlib import Path

from dpsyngen.console import html_table
from dpsyngen.errors import ReleaseError, listed, printable
from dpsyngen.files import NotPlainError, open_plain
from dpsyngen.privacy.certificate import Assumptions, Certificate, MechanismPart, number, plain_words

_MAX_BYTES = 2**26


class Guarantee(Certificate):
    """What is claimed about a generator: (ε, δ)-differential privacy, for what unit, and what it rests on.

    It is the certificate (``privacy.json``) of the release, which was computed from the ledger of the training, and
    has all its fields.  A release from a stranger states whatever the stranger wrote: ``recompute()`` computes ε again
    from the mechanisms, and :func:`dpsyngen.verify` checks a whole bundle.

    Attributes:
        private (bool): whether there is a guarantee; ``not_private_because`` says why there is none.
        epsilon (float): ε, an upper bound; ``math.inf`` if private images were used without noise.
        epsilon_by_rdp (float): ε by Rényi DP, a looser upper bound, as a cross-check.
        delta (float): δ.
        unit (str): whose presence is hidden, such as "one image".
        group_size (int): images of one person that ε covers together.
        adjacency (str): which data sets are neighbours.
        mechanisms (list): every kind of access to the private images whose result is in the release.
        not_covered (list): what the guarantee does not say anything about.
        budget (BudgetPart | None): the budget that all runs on these images share, if there is one.
    """

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
        return cls.from_json(text, printable(path))

    @property
    def certificate(self) -> Certificate:
        """All of it."""
        return self

    @property
    def records(self) -> int:
        """Declared number of private images, which is treated as public."""
        return self.public_assumptions.records

    @property
    def assumptions(self) -> Assumptions:
        """What is treated as known to everybody: number of images, their size, names of the classes."""
        return self.public_assumptions

    def plain_words(self) -> str:
        """The certificate as Markdown, for people who know no differential privacy (``PRIVACY.md``)."""
        return plain_words(self)

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

    __str__ = __repr__

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
