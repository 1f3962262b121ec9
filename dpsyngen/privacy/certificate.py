"""The privacy certificate of a release: its fields, its JSON Schema, and the same in plain words.

``release/privacy.json`` is a :class:`Certificate`; ``release/PRIVACY.md`` is :func:`plain_words` of it, so the page
cannot say anything that the numbers do not.  The schema is ``docs/certificate.schema.json`` and in every bundle.  All
of it is public: it follows from settings and from the ledger, never from the private images.
"""

from __future__ import annotations

import json
import math
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dpsyngen.errors import ReleaseError, printable
from dpsyngen.privacy.accounting import LARGEST_GROUP, Accountant, Mechanism, epsilon

FORMAT = 2
"""Of the certificate; the schema names it, too."""

MOST = 10**12
"""Largest number of anything: far beyond real ones, and far below what overflows."""

UTILITY = (
    "Utility was not checked by a private mechanism: nothing here says how good the images are.  Figures that compare "
    "with the private images would cost privacy themselves, so they stay with the holder of the images."
)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class MechanismPart(_Part):
    """One kind of access to the private images whose result is in the release."""

    mechanism: str = Field(max_length=200, description="name, such as 'Poisson-subsampled Gaussian'")
    reason: str = Field(max_length=2000, description="what for")
    kind: Literal["dp", "non-private"]
    sampling_rate: float | None = Field(None, gt=0, le=1, description="q: each record is in a step on its own with it")
    noise_multiplier: float | None = Field(
        None, gt=0, description="z: standard deviation of the noise over sensitivity"
    )
    count: int | None = Field(None, ge=1, le=MOST, description="how often it ran")
    l2_sensitivity: float | Literal["unbounded"] | None = Field(None, description="C: how far one record moves a sum")
    clipping: str | None = Field(None, max_length=50)
    expected_batch: float | None = Field(None, gt=0, le=MOST)
    steps: int | None = Field(None, ge=1, le=MOST)

    @model_validator(mode="after")
    def _whole(self) -> MechanismPart:
        if self.kind == "dp" and None in (self.sampling_rate, self.noise_multiplier, self.count):
            raise ValueError("a dp mechanism needs sampling_rate, noise_multiplier and count")
        return self


class Assumptions(_Part):
    """What is treated as known to everybody."""

    records: int = Field(ge=1, le=MOST, description="n, declared number of images")
    class_names: list[str] = Field(max_length=1_000_000)
    resolution: int = Field(ge=1, le=100_000)
    channels: Literal[1, 3]


class StagePart(_Part):
    """Who trained the generator at which noise levels."""

    name: str = Field(max_length=50)
    log_sigma_low: float | None
    log_sigma_high: float | None
    trained_by: Literal["public", "private", "moments", "prior"]
    network: str = Field(max_length=50)


class BudgetPart(_Part):
    """The budget that all runs on these images share."""

    epsilon: float = Field(gt=0, description="what all runs together may spend")
    delta: float = Field(gt=0, lt=1)
    group_size: int = Field(ge=1, le=LARGEST_GROUP)
    reserved_epsilon: float = Field(ge=0, description="ε of all runs together when this one was released")
    runs: int = Field(ge=1, le=MOST, description="number of runs until then")


class LedgerPart(_Part):
    """How the run's ledger ended at the release, so that a later change of it shows."""

    lines: int = Field(ge=1, le=MOST)
    digest: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of its last line")


class Certificate(_Part):
    """What is claimed about a release, and everything needed to compute it again."""

    format: Literal[2] = 2
    dpsyngen: str = Field(max_length=50, description="version that made the release")
    preset: str = Field(max_length=200)
    variant: str = Field(max_length=50)
    private: bool = Field(description="false: there is no guarantee, see not_private_because")
    not_private_because: list[str]
    epsilon: float | Literal["inf"] = Field(description="an upper bound on ε; accountant says how it was computed")
    epsilon_by_rdp: float | Literal["inf"] = Field(description="ε by Rényi DP, a looser upper bound")
    delta: float = Field(gt=0, lt=1)
    group_size: int = Field(1, ge=1, le=LARGEST_GROUP, description="g: the guarantee is for up to g images together")
    people: str | None = Field(
        None, max_length=500, description="how it is known that nobody has more than group_size of the images"
    )
    by_person: bool = Field(
        False, description="whether images were chosen by person, so that the guarantee is for persons, not for images"
    )
    accountant: str = Field(max_length=200)
    unit: str = Field(max_length=200)
    adjacency: str = Field(max_length=1000)
    randomness: str = Field(max_length=200, description="where the noise came from")
    public_assumptions: Assumptions
    mechanisms: list[MechanismPart] = Field(max_length=10_000)
    programmatic_images: dict[str, Any] = Field(description="the program, all its parameters, its prior tier")
    programs_used: bool
    pretrained_on_programmatic_images: bool
    prior: dict[str, Any] | None = Field(
        None, description="weights that programs alone trained, which a network started from: how, and their SHA-256"
    )
    stages: list[StagePart] = Field(min_length=1)
    budget: BudgetPart | None = None
    ledger: LedgerPart
    utility_checked: Literal[False] = False
    utility: str = Field(UTILITY, max_length=1000)
    not_covered: list[str]

    @model_validator(mode="after")
    def _agrees(self) -> Certificate:
        if self.private != (not self.not_private_because):
            raise ValueError("private and not_private_because contradict each other")
        if self.private and self.epsilon == "inf":
            raise ValueError("epsilon is infinite, so private cannot be true")
        if isinstance(self.epsilon, float) and self.epsilon < 0:
            raise ValueError("epsilon is negative")
        return self

    def recompute(self, accountant: Accountant) -> float:
        """ε from the mechanisms alone, at the certificate's δ and group size."""
        if any(m.kind != "dp" for m in self.mechanisms):
            return math.inf
        parts = [Mechanism(m.sampling_rate, m.noise_multiplier, m.count) for m in self.mechanisms]  # type: ignore[arg-type]
        return epsilon(parts, self.delta, accountant, self.group_size)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; what does not apply to a mechanism is left out of it."""
        values = self.model_dump(mode="json")
        values["mechanisms"] = [m.model_dump(mode="json", exclude_none=True) for m in self.mechanisms]
        return values

    def to_json(self) -> str:
        """As it stands in ``privacy.json``."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Certificate:
        """Read and check; ReleaseError, naming `where`, if it is not JSON or not of the schema."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            problems = "; ".join(
                f"{printable('.'.join(map(str, p['loc'])) or 'the whole', 100)}: {printable(p['msg'], 200)}"
                for p in error.errors()[:5]
            )
            raise ReleaseError(f"{where} is no privacy certificate of format {FORMAT}: {problems}.") from None

    @classmethod
    def read(cls, path: Path) -> Certificate:
        """Read ``privacy.json``.  Raises ReleaseError if it is missing, too, or is not of the schema."""
        try:
            return cls.from_json(path.read_bytes(), str(path))
        except OSError as error:
            raise ReleaseError(f"{path} cannot be read: {error.strerror}.") from None


def schema_text() -> str:
    """The JSON Schema (draft 2020-12) of a certificate."""
    schema = Certificate.model_json_schema()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


# ------------------------------------------------------------------------------------------ in plain words


def number(value: float, digits: int = 4, up: bool = False) -> str:
    """A number for people, to `digits` significant digits; with `up` never rounded down, as bounds must not be."""
    if value == 0 or math.isinf(value):
        return "0" if value == 0 else "∞"
    exact = Decimal(str(value))  # as it is printed: 0.01 is no more than 0.01
    step = Decimal(1).scaleb(exact.adjusted() - digits + 1)
    rounded = exact.quantize(step, ROUND_CEILING if up else ROUND_HALF_EVEN)
    mantissa, exponent = f"{rounded:.{digits - 1}e}".split("e")
    plain, power = (f"{rounded:,f}", "") if 1e-4 <= abs(value) < 1e7 else (mantissa, f"e{int(exponent)}")
    return (plain.rstrip("0").rstrip(".") if "." in plain else plain) + power


def posterior(epsilon_value: float, delta: float, prior: float) -> float:
    """How sure, on average, somebody may become that an image was used, who thought so with probability `prior`.

    What an (ε, δ)-DP release tells about one of two neighbouring data sets is no more than this tells: the truth with
    probability δ, else an answer that is e^ε times as likely to be right as wrong (Kairouz, Oh, Viswanath, ICML 2015).
    For a prior of ½ it is also the share of right guesses of the best test there can be.
    """
    odds = math.exp(min(epsilon_value, 700)) * prior
    return delta + (1 - delta) * odds / (1 - prior + odds)


def suspicion(epsilon_value: float, delta: float, group_size: int = 1) -> list[tuple[str, str]]:
    """How sure two attackers can become, each as a headline and a sentence: one who tosses a coin, one with a hunch."""
    what = "an image was used" if group_size == 1 else f"a person's images, {group_size} at most, were used"
    rows = []
    for prior, like in ((0.5, "as likely as a coin's head"), (0.01, "likely as one in a hundred")):
        after = 100 * posterior(epsilon_value, delta, prior)
        sure = "practically 100 %" if after > 99.949 else f"at most {after:.1f} %"
        text = f"How sure an attacker can become that {what}, who found it {like} before."
        rows.append((f"{100 * prior:g} % → {sure}", text))
    return rows


def strength(epsilon_value: float, delta: float) -> str:
    """What ε means to somebody who guesses whether a person's image was used."""
    percent = 100 * posterior(epsilon_value, delta, 0.5)
    figure = "practically 100 %" if percent >= 99.995 else f"{percent:.{2 if percent > 99 else 1}f} %"
    if epsilon_value <= 1:
        grade = "This is a strong guarantee by the standards of published machine-learning models."
    elif epsilon_value <= 3:
        grade = "This is a guarantee in the middle of what published machine-learning models have."
    elif epsilon_value <= 10:
        grade = (
            "This is a weak guarantee.  It excludes the worst, and known attacks get nowhere near the limit, but the "
            "number itself promises little."
        )
    else:
        grade = "This is hardly a guarantee: the number promises next to nothing, whatever known attacks can do."
    return (
        "Somebody who knows everything about an image and about all others, and who could otherwise only toss a coin "
        f"on whether it was used, guesses right at most {figure} of the time (50 % is a coin).  {grade}"
    )


def plain_words(certificate: Certificate) -> str:
    """The certificate as Markdown, for people who know no differential privacy."""
    c = certificate
    lines = ["# Privacy certificate", ""]
    if not c.private:
        lines += [f"**NOT PRIVATE: {'; '.join(c.not_private_because)}.**", ""]
    if c.epsilon == "inf":
        lines += ["This generator carries no privacy guarantee.  Do not publish it if its images are private.", ""]
    else:
        lines += _guarantee(c, c.epsilon)
    lines += ["## What it rests on", "", *foundations(c), ""]
    lines += ["## How the number comes about", "", *map(_mechanism, c.mechanisms), ""]
    if c.epsilon != "inf":
        by_rdp = "no bound" if c.epsilon_by_rdp == "inf" else f"ε ≤ {number(c.epsilon_by_rdp, up=True)}"
        lines += [
            f"Total by {c.accountant}: ε ≤ {number(c.epsilon, 6, up=True)}.  Cross-check by Rényi DP, a looser bound: "
            f"{by_rdp}.",
            "",
        ]
    lines += [
        f"Neighbouring data sets: {c.adjacency}.",
        "",
        "## How to check it",
        "",
        "`dpsyngen verify` on the bundle computes ε again from the numbers in `privacy.json`, checks every file "
        "against its checksum, and draws images.  It needs no private image.  What it cannot see is whether the "
        "training did what it says; `dpsyngen audit`, run by the holder of the images, attacks the training itself, "
        f"and the source code is open.  When this was written the run's ledger had {c.ledger.lines} lines and its last "
        f"line had the SHA-256 {c.ledger.digest[:16]}…; `dpsyngen ledger` compares.",
        "",
        f"Made by dpsyngen {c.dpsyngen}.",
        "",
    ]
    return "\n".join(lines)


def _guarantee(c: Certificate, epsilon_value: float) -> list[str]:
    delta, n = number(c.delta, 3, up=True), f"{c.public_assumptions.records:,}"
    if c.by_person:
        # Without one of a person's images another of theirs may be taken in its place.
        whose, one, it = "each person, with all of their images", "all images of any one person", "that person"
    elif c.group_size == 1:
        whose, one, it = "each single image" + (" and its person" if c.people else ""), "any one image", "that image"
    else:
        whose = f"up to {c.group_size} images of one person together"
        one, it = f"any {c.group_size} images", "those images"
    would = "W" if c.private else "Were the noise secret, w"
    return [
        f"**ε = {number(epsilon_value, up=True)}, δ = {delta}, for {whose}.**",
        "",
        "## What this says",
        "",
        f"The files beside this page are a program that draws images.  It learned from {n} private images, with random "
        f"noise mixed in on purpose.  The noise hides what {one} had to do with it, and the two numbers say how well.",
        "",
        f"{would}hatever somebody finds out from these files, they would have found out almost as well had {one} never "
        f"been used.  “Almost” is what ε and δ measure: the odds of any conclusion about {it} change by a factor of at "
        f"most e^ε = {number(math.exp(min(epsilon_value, 700)), 3, up=True)}, except with a probability of at most "
        f"δ = {delta}.",
        "",
        strength(epsilon_value, c.delta),
        "",
        "This holds against any attack, also those that nobody has thought of yet, and it does not wear off: more "
        "images drawn, a model trained on them, statistics of them, all have the same guarantee.",
        "",
        "## What it does not say",
        "",
        "- It does not say that nothing can be learned about the images *in common*.  If they show that a disease "
        "looks a certain way, the generator shows it, too: that is what it is for.",
        f"- {c.utility}",
        *(f"- It does not cover {text}." for text in c.not_covered),
        "",
    ]


def foundations(c: Certificate) -> list[str]:
    """What has to be true for the guarantee to hold, as items of a Markdown list."""
    assumed, p = c.public_assumptions, c.programmatic_images
    classes = ""
    if assumed.class_names:
        more = ", …" if len(assumed.class_names) > 20 else ""
        classes = f", and the names of the classes ({safe_markdown(', '.join(assumed.class_names[:20]))}{more})"
    size = f"{assumed.resolution} × {assumed.resolution} pixels, {'grey' if assumed.channels == 1 else 'colour'}"
    lines = [
        f"- These facts were treated as known to everybody: that there are {assumed.records:,} images, their size "
        f"({size}){classes}.",
        "- Settings, thresholds and programs were chosen without looking at the private images.",
        f"- The noise cannot be known to anybody.  It came from: {c.randomness}.",
    ]
    if c.people is not None:
        lines.append(f"- Images of one person: {safe_markdown(c.people)}.")
    elif c.group_size > 1:
        lines.append(f"- Nobody has more than {c.group_size} of the images.")
    if c.programs_used:
        name, tier, meaning = (safe_markdown(str(p.get(k))) for k in ("name", "prior_tier", "prior_tier_meaning"))
        lines.append(
            f"- Part of the training used images that a program draws ({name}, prior tier {tier}: {meaning}).  They "
            "hold nobody's data and cost no privacy."
        )
    if c.prior is not None:
        lines.append(
            "- A network started from weights that images drawn by programs trained (the prior, SHA-256 "
            f"{safe_markdown(str(c.prior.get('sha256')))}).  No private image had touched them."
        )
    if c.budget is not None:
        b = c.budget
        lines.append(
            f"- All runs on these images share one budget: together they may not spend more than ε = "
            f"{number(b.epsilon)} at δ = {number(b.delta, 3)}"
            f"{f' for {b.group_size} images together' if b.group_size > 1 else ''}.  With this one, which was run "
            f"number {b.runs}, ε = {number(b.reserved_epsilon, up=True)} of it is taken."
        )
    else:
        lines.append(
            "- No other release was made from these images.  If there was one, the guarantees add up: ask whoever "
            "holds the images for the total of all of them."
        )
    return lines


def _mechanism(m: MechanismPart) -> str:
    if m.sampling_rate is None or m.noise_multiplier is None or m.count is None:
        return f"- {m.reason}: without noise."
    times = "once" if m.count == 1 else f"{m.count:,} times"
    images = "with every image in it"
    if m.sampling_rate < 1:
        images = f"each image in or out by chance every time (probability {number(m.sampling_rate)})"
    bound = f" to {number(m.l2_sensitivity)}" if isinstance(m.l2_sensitivity, float) else ""
    return (
        f"- {m.reason}: {m.mechanism} mechanism, {times}, {images}.  The influence of one image was limited{bound}, "
        f"and noise of {number(m.noise_multiplier)} times that limit was added."
    )


def safe_markdown(text: str) -> str:
    """Text of the user's for Markdown: no markup, no line breaks, at most 2,000 characters."""
    plain = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in plain if c.isprintable())[:2000]
