"""The privacy certificate of a release: its fields, its JSON Schema, and the same in plain words.

``release/privacy.json`` is a :class:`Certificate`; ``release/PRIVACY.md`` is :func:`plain_words` of it, so the page
cannot say anything that the numbers do not.  The schema is ``docs/certificate.schema.json`` and in every bundle.  All
of it is public: it follows from settings and from the ledger, never from the private images.
"""

from __future__ import annotations

import json
import math
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Context, Decimal
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from dpsyngen.errors import ReleaseError, printable
from dpsyngen.files import strict
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


if TYPE_CHECKING:
    Bound = float
else:  # ∞, which JSON lacks, is "inf" in the file
    Bound = Annotated[float | Literal["inf"], AfterValidator(float), PlainSerializer(strict)]


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
    epsilon: Bound = Field(description="an upper bound on ε; accountant says how it was computed")
    epsilon_by_rdp: Bound = Field(description="ε by Rényi DP, a looser upper bound")
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
        if self.private and math.isinf(self.epsilon):
            raise ValueError("epsilon is infinite, so private cannot be true")
        if self.epsilon < 0:
            raise ValueError("epsilon is negative")
        return self

    def recompute(self, accountant: Accountant = "pld") -> float:
        """ε again by "pld" or "rdp", from the mechanisms alone, at the same δ and group size; takes about a second."""
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
    def from_json(cls, text: str | bytes, where: str) -> Self:
        """Read and check; ReleaseError, naming `where`, if it is not JSON or not of the schema."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            problems = "; ".join(
                f"{printable('.'.join(map(str, p['loc'])) or 'the whole', 100)}: {printable(p['msg'], 200)}"
                for p in error.errors()[:5]
            )
            raise ReleaseError(f"{where} is no privacy certificate of format {FORMAT}: {problems}.") from None


@cache
def schema_text() -> str:
    """The JSON Schema (draft 2020-12) of a certificate."""
    schema = Certificate.model_json_schema()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def protected(group_size: int, by_person: bool) -> tuple[str, str]:
    """Unit and adjacency, as certificates state them, of a guarantee for so many images, or for persons."""
    g = group_size
    unit, moved = ("one image", "one record") if g == 1 else (f"up to {g} images together", f"up to {g} records")
    if by_person:
        used = "at most 1 is" if g == 1 else f"at most {g} are"
        unit, moved = "one person, with all of their images", f"all images of a person, of which {used} used"
    return unit, (
        f"add or remove {moved}; sampling rate and normaliser are public constants fixed by the declared number of "
        "records (replacing an image by nothing, zero-out adjacency, costs the same)"
    )


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


def rounded_up(value: float, places: int) -> str:
    """A bound to so many decimals, for columns and shares of 100; never rounded down."""
    if math.isinf(value):
        return "∞"
    return str(Decimal(str(value)).quantize(Decimal(1).scaleb(-places), ROUND_CEILING, Context(prec=400)))


def posterior(epsilon_value: float, delta: float, prior: float) -> float:
    """How sure, on average, somebody may become that an image was used, who thought so with probability `prior`.

    What an (ε, δ)-DP release tells about one of two neighbouring data sets is no more than this tells: the truth with
    probability δ, else an answer that is e^ε times as likely to be right as wrong (Kairouz, Oh, Viswanath, ICML 2015).
    For a prior of ½ it is also the share of right guesses of the best test there can be.
    """
    odds = math.exp(min(epsilon_value, 700)) * prior
    return delta + (1 - delta) * odds / (1 - prior + odds)


def suspicion(
    epsilon_value: float, delta: float, group_size: int = 1, by_person: bool = False
) -> list[tuple[str, str]]:
    """How sure two attackers can become, each as a headline and a sentence: one who tosses a coin, one with a hunch."""
    what = "an image was used" if group_size == 1 else f"a person's images, {group_size} at most, were used"
    what = "images of a person were used" if by_person else what
    rows = []
    for prior, like in ((0.5, "as likely as a coin's head"), (0.01, "likely as one in a hundred")):
        after = 100 * posterior(epsilon_value, delta, prior)
        sure = "practically 100 %" if after > 99.9 else f"at most {rounded_up(after, 1)} %"
        text = f"How sure an attacker can become that {what}, who found it {like} before."
        rows.append((f"{100 * prior:g} % → {sure}", text))
    return rows


def strength(epsilon_value: float, delta: float, by_person: bool = False) -> str:
    """What ε means to somebody who guesses whether an image was used, or with `by_person` any image of a person."""
    whose, they = ("an image", "it was") if not by_person else ("all images of a person", "any of them were")
    percent = 100 * posterior(epsilon_value, delta, 0.5)
    often = f"at most {rounded_up(percent, 2 if percent > 99 else 1)} % of the time"
    if percent > 99.99:
        often = "practically every time, for all that this number says"
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
        f"Somebody who knows everything about {whose} and about all others, and who could otherwise only toss a coin "
        f"on whether {they} used, guesses right {often} (50 % is a coin).  {grade}"
    )


@cache
def template(file: Path) -> Template:
    """The template `file`; it may include those beside it and beside this module.

    Its filters are ``number``, ``bound`` (a number rounded up) and ``markdown`` (text without markup); a number may be
    ``infinite``.  In HTML what is filled in is escaped (class names come from the user's folders).  A template that
    names a value that is not given raises :class:`jinja2.UndefinedError`.
    """
    environment = Environment(
        loader=FileSystemLoader([file.parent, Path(__file__).parent]),
        autoescape=file.name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "bound": partial(number, up=True), "markdown": safe_markdown}
    environment.tests["infinite"] = math.isinf
    return environment.get_template(file.name)


def plain_words(certificate: Certificate) -> str:
    """The certificate as Markdown, for people who know no differential privacy, from ``certificate.md.j2``."""
    c, odds, why = certificate, math.inf, ""
    if math.isfinite(c.epsilon):
        odds, why = math.exp(min(c.epsilon, 700)), strength(c.epsilon, c.delta, c.by_person)
    page = template(Path(__file__).with_suffix(".md.j2"))
    return page.render(c=c, a=c.public_assumptions, odds=odds, strength=why) + "\n"


def safe_markdown(text: object) -> str:
    """Text of the user's for Markdown: no markup, no line breaks, at most 4,000 characters."""
    plain = "".join(c for c in " ".join(str(text).split()) if c.isprintable())
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|~" else c for c in plain[:4000])  # never half an escape
