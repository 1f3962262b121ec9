"""What is published: weights, generator description, configuration without paths, certificate, model card, code."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

import yaml
from safetensors import safe_open

from dpsyngen.config import Config
from dpsyngen.diffusion.prior import SHIPPED
from dpsyngen.diffusion.stages import GAUSSIAN, StageMap
from dpsyngen.files import strict, write_json, write_text
from dpsyngen.privacy.budget import Budget, Composition
from dpsyngen.privacy.certificate import (
    Assumptions,
    BudgetPart,
    Certificate,
    LedgerPart,
    MechanismPart,
    StagePart,
    plain_words,
    protected,
)
from dpsyngen.privacy.ledger import Ledger, LedgerEntry
from dpsyngen.programs import TIERS
from dpsyngen.release.card import write_companions
from dpsyngen.version import FORMAT, __version__

if TYPE_CHECKING:
    from dpsyngen.training.pipeline import Training


def certify(t: Training) -> Certificate:
    """The claim and everything needed to check it.  ε is computed from the ledger, not from a setting."""
    config, plan, ledger = t.config, t.plan, t.ledger
    # Read again: other runs may have begun since this one did.
    budget = None if t.budget is None else Budget(t.budget.path)
    bound = Composition.of([ledger]).bound()
    reasons = []
    if math.isinf(bound.epsilon):
        reasons.append("trained without privacy (ε = ∞), as a reference")
    if not (t.randomness.secure and ledger.secure):
        reasons.append("the noise came from a reproducible seed, so anyone who knows the seed can subtract it")
    g = ledger.group_size
    people = next((e.details["people"] for e in ledger.entries if "people" in e.details), None)
    not_covered = [
        "people whose images the holder's table has under several names"
        if people is not None
        else "several images of one person: the guarantee is for one image at a time"
        if g == 1
        else f"people with more than {g} images",
        "settings that were tuned by looking at private metrics of earlier runs on the same images",
        "side channels such as the time that training took",
    ]
    by_person = config.privacy.most_per_person is not None
    unit, adjacency = protected(g, by_person)
    return Certificate(
        dpsyngen=__version__,
        preset=config.preset,
        variant=config.stages.variant,
        private=not reasons,
        not_private_because=reasons,
        epsilon=strict(bound.epsilon),
        epsilon_by_rdp=strict(ledger.epsilon(accountant="rdp")),
        delta=ledger.delta,
        group_size=g,
        people=people,
        by_person=by_person,
        accountant=bound.by,
        unit=unit,
        adjacency=adjacency,
        randomness=(
            "the operating system's entropy, through AES-256 under a key that is kept secret"
            if ledger.secure
            else "a reproducible seed, which is no secret"
        ),
        public_assumptions=Assumptions(
            records=plan.shape.records,
            class_names=list(plan.shape.class_names),
            resolution=plan.shape.resolution,
            channels=cast(Literal[1, 3], plan.shape.channels),
        ),
        mechanisms=[_mechanism(e) for e in _merged(ledger)],
        programmatic_images={
            **t.program.config(),
            "prior_tier": t.program.prior_tier,
            "prior_tier_meaning": TIERS[t.program.prior_tier],
        },
        stages=stage_parts(plan.stages),
        pretrained_on_programmatic_images=bool(plan.stages.pretrain),
        prior=next((e.details["prior"] for e in ledger.entries if "prior" in e.details), None),
        programs_used=bool(plan.stages.public or plan.stages.pretrain),
        budget=None
        if budget is None
        else BudgetPart(
            epsilon=budget.epsilon_limit,
            delta=budget.delta,
            group_size=budget.group_size,
            reserved_epsilon=budget.epsilon(),
            runs=len(budget.charges),
        ),
        ledger=LedgerPart(lines=ledger.head.lines, digest=ledger.head.digest),
        not_covered=not_covered,
    )


def stage_parts(stages: StageMap) -> list[StagePart]:
    """The stages as a certificate has them; None is ∓∞."""
    return [
        StagePart(
            name=s.name,
            log_sigma_low=None if math.isinf(s.low) else s.low,
            log_sigma_high=None if math.isinf(s.high) else s.high,
            trained_by=s.trainer,
            network=s.network,
        )
        for s in stages.stages
    ]


def _mechanism(entry: LedgerEntry) -> MechanismPart:
    m, d = entry.mechanism, entry.details
    noise = "discrete Gaussian" if d.get("noise") == "discrete" else "Gaussian"
    return MechanismPart(
        mechanism=f"Poisson-subsampled {noise}" if m is not None and m.sampling_rate < 1 else noise,
        reason=entry.reason,
        kind="dp" if m else "non-private",
        sampling_rate=None if m is None else m.sampling_rate,
        noise_multiplier=None if m is None else m.noise_multiplier,
        count=None if m is None else m.count,
        **{name: d.get(name) for name in ("l2_sensitivity", "clipping", "expected_batch", "steps")},
    )


def _merged(ledger: Ledger) -> list[LedgerEntry]:
    """Entries whose results are released, with equal mechanisms counted together (blocks of DP-SGD steps)."""
    out: list[LedgerEntry] = []
    for e in ledger.entries:
        if e.kind in ("private", "public"):
            continue
        last, m = out[-1] if out else None, e.mechanism
        if last is None or _accesses(last) != _accesses(e) or (m is None and e.kind != "non-private"):
            out.append(e)
            continue
        if m is not None and last.mechanism is not None:
            m = replace(m, count=last.mechanism.count + m.count)
        steps = m.count if m is not None else last.details.get("steps", 0) + e.details.get("steps", 0)
        out[-1] = replace(last, mechanism=m, details=last.details | {"steps": steps})
    return out


def _accesses(e: LedgerEntry) -> tuple[object, ...]:
    """Equal for entries that differ in nothing but how often they count."""
    return e.kind, e.reason, None if e.mechanism is None else (e.mechanism.sampling_rate, e.mechanism.noise_multiplier)


def public_config(config: Config) -> dict[str, Any]:
    """The configuration without where the images and the budget lie, and without logging, which releases nothing."""
    hidden: Any = {"logging": True, "data": {"source", "cache", "workers"}, "privacy": {"budget", "groups"}}
    values = config.model_dump(mode="json", exclude=hidden)
    values["data"]["labels"] = config.data.labels is not False  # a path is a table of the holder's
    if config.network.prior not in (None, SHIPPED):
        values["network"]["prior"] = "a file of the holder's"  # the certificate has its SHA-256
    return values


def write_release(t: Training) -> None:
    """Write the release half of a training at its end, ``generator.json`` last: with it the run is complete."""
    run, config, plan, certificate = t.run, t.config, t.plan, certify(t)
    write_text(run.release / "privacy.json", certificate.to_json())
    write_text(run.release / "PRIVACY.md", plain_words(certificate))
    write_companions(run.release, certificate)
    settings = yaml.safe_dump(public_config(config), sort_keys=False, allow_unicode=True)
    write_text(run.release / "config.yaml", settings)
    moments = {}
    if plan.stages.moments:
        with safe_open(run.weights(GAUSSIAN), "pt") as file:
            moments = {"moments": {"rank": int(file.get_slice("basis").get_shape()[1])}}
    generator = {
        "format": FORMAT,
        "dpsyngen": __version__,
        "resolution": plan.shape.resolution,
        "channels": plan.shape.channels,
        "class_names": list(plan.shape.class_names),
        "stages": [s.model_dump() for s in certificate.stages],
        "network": {"size": config.network.size, "sigma_data": config.network.sigma_data},
        "conditional": {n: n == plan.stages.private.network and not plan.stages.gaussian for n in plan.stages.networks},
        "label_dropout": config.network.label_dropout,
        **moments,
        "sampling": config.sampling.model_dump(mode="json"),
        "private": certificate.private,
    }
    write_json(run.release / "generator.json", generator)
