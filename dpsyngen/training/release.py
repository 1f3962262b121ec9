"""What is published: weights, generator description, configuration without paths, privacy statement."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import yaml

from dpsyngen.config import Config
from dpsyngen.files import write_text
from dpsyngen.privacy.ledger import Ledger, LedgerEntry
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.programs import TIERS, Program
from dpsyngen.training.run import Run
from dpsyngen.version import FORMAT, __version__

if TYPE_CHECKING:
    from dpsyngen.training.pipeline import Plan


def privacy_statement(
    config: Config, plan: Plan, ledger: Ledger, randomness: Randomness, program: Program
) -> dict[str, Any]:
    """The claim and everything needed to check it, JSON-able.  ε is computed from the ledger, not from a setting."""
    epsilon = ledger.epsilon()
    reasons = []
    if math.isinf(epsilon):
        reasons.append("trained without privacy (ε = ∞), as a reference")
    if not randomness.secure:
        reasons.append("the noise came from a reproducible seed, so anyone who knows the seed can subtract it")
    return {
        "format": 1,
        "dpsyngen": __version__,
        "preset": config.preset,
        "variant": config.stages.variant,
        "private": not reasons,
        "not_private_because": reasons,
        "epsilon": "inf" if math.isinf(epsilon) else epsilon,
        "epsilon_by_rdp": "inf" if math.isinf(epsilon) else ledger.epsilon(accountant="rdp"),
        "delta": ledger.delta,
        "accountant": "privacy loss distribution (upper bound), dp-accounting",
        "unit": "one image",
        "adjacency": (
            "add or remove one record; sampling rate and normaliser are public constants fixed by the declared number "
            "of records (replacing an image by nothing, zero-out adjacency, costs the same)"
        ),
        "public_assumptions": {
            "records": plan.shape.records,
            "class_names": list(plan.shape.class_names),
            "resolution": plan.shape.resolution,
            "channels": plan.shape.channels,
        },
        "mechanisms": [
            {
                "mechanism": _mechanism_name(e),
                "reason": e.reason,
                "kind": e.kind,
                **(e.mechanism.to_dict() if e.mechanism else {}),
                **{
                    k: e.details[k] for k in ("l2_sensitivity", "clipping", "expected_batch", "steps") if k in e.details
                },
            }
            for e in _merged(ledger)
        ],
        "programmatic_images": {
            **program.config(),
            "prior_tier": program.prior_tier,
            "prior_tier_meaning": TIERS[program.prior_tier],
        },
        "stages": [
            {
                "name": s.name,
                "log_sigma_low": None if math.isinf(s.low) else s.low,
                "log_sigma_high": None if math.isinf(s.high) else s.high,
                "trained_by": s.trainer,
                "network": s.network,
            }
            for s in plan.stages.stages
        ],
        "pretrained_on_programmatic_images": plan.stages.pretrain,
        "programs_used": bool(plan.stages.public) or plan.stages.pretrain,
        "not_covered": [
            "several images of one person: the guarantee is for one image at a time",
            "settings that were tuned by looking at private metrics of earlier runs on the same images",
            "side channels such as the time that training took",
        ],
    }


_STATED = ("l2_sensitivity", "clipping", "expected_batch", "steps")


def _mechanism_name(entry: LedgerEntry) -> str:
    noise = "discrete Gaussian" if entry.details.get("noise") == "discrete" else "Gaussian"
    sampled = entry.mechanism is not None and entry.mechanism.sampling_rate < 1
    return f"Poisson-subsampled {noise}" if sampled else noise


def _merged(ledger: Ledger) -> list[Any]:
    """Entries whose results are released, with equal mechanisms counted together (blocks of DP-SGD steps)."""
    from dataclasses import replace

    from dpsyngen.privacy.accounting import Mechanism

    out: list[Any] = []
    for e in ledger.entries:
        if e.kind in ("private", "public"):
            continue
        last = out[-1] if out else None
        if last and last.mechanism and e.mechanism and last.reason == e.reason:
            a, b = last.mechanism, e.mechanism
            if (a.sampling_rate, a.noise_multiplier) == (b.sampling_rate, b.noise_multiplier):
                total = Mechanism(a.sampling_rate, a.noise_multiplier, a.count + b.count)
                out[-1] = replace(last, mechanism=total, details=last.details | {"steps": total.count})
                continue
        if last and e.kind == last.kind == "non-private" and last.reason == e.reason:
            steps = last.details.get("steps", 0) + e.details.get("steps", 0)
            out[-1] = replace(last, details=last.details | {"steps": steps})
            continue
        out.append(e)
    return out


def plain_words(statement: dict[str, Any]) -> str:
    """The statement as Markdown, for people who know no differential privacy."""
    n = statement["public_assumptions"]["records"]
    lines = ["# Privacy statement", ""]
    if not statement["private"]:
        lines += [f"**NOT PRIVATE**: {'; '.join(statement['not_private_because'])}.", ""]
    if statement["epsilon"] == "inf":
        lines += [
            "This generator carries no privacy guarantee.  Do not publish it if its images are private.",
            "",
        ]
    else:
        e, delta = statement["epsilon"], statement["delta"]
        factor = math.exp(min(e, 700))
        lines += [
            f"The files in this folder are the output of a mechanism that is **({e:.4g}, {delta:.3g})-differentially "
            f"private** for each one of the {n:,} images it was trained on.",
            "",
            "What this means: whatever someone learns from these files, they would have learned almost as well had "
            "any one image been left out.  The odds of any conclusion about that image change by a factor of at most "
            f"e^ε = {factor:.3g}, except with probability at most δ = {delta:.3g}.",
            "",
            "Anything made from these files (more images, a fine-tuned model, statistics) has the same guarantee.",
            "",
        ]
    lines += ["How the number comes about:", ""]
    for m in statement["mechanisms"]:
        if m["kind"] == "dp":
            lines.append(
                f"- {m['reason']}: {m['mechanism']} mechanism, {m['count']} times, sampling rate "
                f"{m['sampling_rate']:.5g}, noise multiplier {m['noise_multiplier']:.5g}, sensitivity "
                f"{m.get('l2_sensitivity', '?')}."
            )
        else:
            lines.append(f"- {m['reason']}: without noise.")
    if statement["epsilon"] != "inf":
        lines += [
            "",
            f"Total by {statement['accountant']}: ε = {statement['epsilon']:.4f}; cross-check by Rényi DP (looser): "
            f"ε = {statement['epsilon_by_rdp']:.4f}.",
        ]
    p = statement["programmatic_images"]
    lines += [
        "",
        f"Assumed public: that there are {n:,} images, the image size and the class names.  Images drawn by a program "
        f"({p['name']}, prior tier {p['prior_tier']}: {p['prior_tier_meaning']}) cost no privacy, provided that no "
        "private image was looked at to choose it.",
        "",
        f"Adjacency: {statement['adjacency']}.",
        "",
        "Not covered:",
        "",
        *(f"- {text}." for text in statement["not_covered"]),
        "",
    ]
    return "\n".join(lines)


def public_config(config: Config) -> dict[str, Any]:
    """The configuration without what is private about the holder: where the images lie."""
    values = config.model_dump(mode="json")
    values["data"].pop("source")
    return values


def write_release(
    run: Run, config: Config, plan: Plan, ledger: Ledger, randomness: Randomness, program: Program
) -> None:
    """Write the release half, ``generator.json`` last: with it the run is complete."""
    statement = privacy_statement(config, plan, ledger, randomness, program)
    write_text(run.release / "privacy.json", json.dumps(statement, indent=1, ensure_ascii=False) + "\n")
    write_text(run.release / "PRIVACY.md", plain_words(statement))
    write_text(
        run.release / "config.yaml",
        yaml.safe_dump(public_config(config), sort_keys=False, allow_unicode=True),
    )
    generator = {
        "format": FORMAT,
        "dpsyngen": __version__,
        "resolution": plan.shape.resolution,
        "channels": plan.shape.channels,
        "class_names": list(plan.shape.class_names),
        "stages": statement["stages"],
        "network": {"size": config.network.size, "sigma_data": config.network.sigma_data},
        "conditional": {n: n == plan.stages.private.network for n in plan.stages.networks},
        "sampling": config.sampling.model_dump(mode="json"),
        "private": statement["private"],
    }
    write_text(run.release / "generator.json", json.dumps(generator, indent=1, ensure_ascii=False) + "\n")
