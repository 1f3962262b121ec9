"""What pins a run to its data, its key, its ledger and its settings, so that noise is never repeated on other sums."""

from __future__ import annotations

import hmac
import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

from dpsyngen.config import Config
from dpsyngen.data import ImageDataset
from dpsyngen.errors import RunError
from dpsyngen.files import write_text
from dpsyngen.privacy.budget import Budget
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.programs import TIERS, Program
from dpsyngen.training.plan import Plan
from dpsyngen.training.run import Run


def randomness_of(run: Run, config: Config) -> Randomness:
    """The key of the run; a new one only where nothing can have used the old one."""
    # All of these are made after the key.
    later = (run.ledger_path, run.ledger_path.with_name(run.ledger_path.name + ".head"), run.data_path)
    begun = any(p.exists() for p in (*later, run.engine_path))
    if run.randomness_path.exists():
        try:
            return Randomness.load(run.randomness_path)
        except RunError:
            if begun:
                raise
        run.randomness_path.unlink()
    elif begun:
        # Fresh noise for charged steps would be wrong.
        raise RunError(
            f"{run.randomness_path} is missing: without it the run cannot be continued privately.  Start a new run."
        )
    seed = config.privacy.insecure_seed
    fresh = Randomness.from_system() if seed is None else Randomness.from_insecure_seed(seed)
    fresh.save(run.randomness_path)
    return fresh


def ledger_of(run: Run, config: Config, plan: Plan, program: Program, randomness: Randomness) -> Ledger:
    name = randomness.tag("name of the run")[:32]
    if run.ledger_path.exists():
        ledger = Ledger(run.ledger_path)
        ledger.catch_up()
        if ledger.run != name:
            raise RunError(
                f"{run.randomness_path} is not the random state with which {run.ledger_path} was begun: steps that are "
                "charged would get other noise.  Put back the files of this run, or start a new one."
            )
    elif run.data_path.exists() or run.engine_path.exists():
        # Both are made after the ledger.
        raise RunError(
            f"{run.ledger_path} is missing, though the run had begun: what it charged is no longer known.  Put it back "
            "from a backup, or start a new run."
        )
    else:
        ledger = Ledger.create(
            run.ledger_path,
            target_epsilon=config.privacy.epsilon,
            delta=plan.delta,
            records=plan.shape.records,
            group_size=config.privacy.group_size,
            run=name,
            secure=randomness.secure,
        )
    used = plan.stages.public or plan.stages.pretrain
    if used and not ledger.entries:
        ledger.note_public_choice(
            "public images are drawn by this program; ε holds if it was chosen without looking at private images",
            program=program.config(),
            prior_tier=program.prior_tier,
            prior_tier_meaning=TIERS[program.prior_tier],
        )
    return ledger


def budget_of(config: Config) -> Budget | None:
    path = config.privacy.budget
    return None if path is None else Budget(Path(path))


def pin_data(
    run: Run, config: Config, dataset: ImageDataset, randomness: Randomness, ledger: Ledger, plan: Plan
) -> None:
    """Remember which images and settings the run is of; refuse to resume with others, which would repeat noise on new
    data.
    """
    fingerprint, settings = randomness.tag(dataset.fingerprint()), _fixed_settings(config)
    known = pinned(run)
    if known is not None:
        if not hmac.compare_digest(known["fingerprint"], fingerprint):
            raise RunError(
                f"the images are not those that {run.path} was started with.  Continuing would add the same noise to "
                "different data, which can reveal both.  Give the same --data, or start a new run."
            )
        before = known["settings"]
        changed = sorted(k for k in settings.keys() | before.keys() if settings.get(k) != before.get(k))
        if changed:
            raise RunError(
                f"{run.private / 'config.yaml'} was changed since the run was started ({', '.join(changed[:5])}).  "
                "Continuing would add the same noise to different sums, which can reveal both.  Undo the change, or "
                "start a new run."
            )
        return
    if ledger.mechanisms or ledger.non_private:
        raise RunError(
            f"{run.data_path} is missing, though private steps were charged: nothing says any more that the images are "
            "the same.  Put it back from a backup, or start a new run."
        )
    about: dict[str, Any] = {
        "fingerprint": fingerprint,
        "records": len(dataset),
        "source": dataset.source,
        "skipped": list(dataset.skipped),
        "noise_multiplier": plan.mechanism.noise_multiplier,
        "moments": None if plan.moments is None else list(astuple(plan.moments)),
        "settings": settings,
    }
    write_text(run.data_path, json.dumps(about, indent=1) + "\n", 0o600)


def pinned(run: Run) -> dict[str, Any] | None:
    """What :func:`pin_data` wrote; None if it did not come to that yet."""
    if not run.data_path.exists():
        return None
    try:
        about = json.loads(run.data_path.read_text(encoding="utf-8"))
        moments = about.get("moments")  # a run of an earlier version has none
        return {
            "fingerprint": str(about["fingerprint"]),
            "noise_multiplier": float(about["noise_multiplier"]),
            "moments": None if moments is None else [None if z is None else float(z) for z in moments],
            "settings": dict(about["settings"]),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{run.data_path}, which says what images the run is of, cannot be read: {error!r}.  Put it back from a "
            "backup, or start a new run."
        ) from None


# What may change between two sessions of a run: it decides neither what a step is nor what is made of the steps.
_FREE = {
    "data": {"source", "cache", "workers"},
    "privacy": {"budget"},
    "private": {"physical_batch", "checkpoint_every"},
    "public": {"checkpoint_every"},
    "compute": {"compile"},  # DP-SGD steps are never compiled
}


def _fixed_settings(config: Config) -> dict[str, Any]:
    """All settings that a resumed run must share with its beginning, by their full names, as JSON has them."""
    sections = config.model_dump(mode="json", exclude={"sampling", "logging"})
    out: dict[str, Any] = {}
    for section, values in sections.items():
        if not isinstance(values, dict):
            out[section] = values
            continue
        out |= {f"{section}.{k}": v for k, v in values.items() if k not in _FREE.get(section, ())}
    # What "auto" came to is pinned by EngineSettings, and runs of earlier versions knew nothing of it.
    out = {k: v for k, v in out.items() if not (k.startswith("compute.") and v == "auto")}
    return dict(json.loads(json.dumps(out)))
