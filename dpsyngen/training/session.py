"""What ties noise to one key, one ledger and one set of sums, so that it is never added to another.

A computation on private images keeps these files in a private folder, made in this order:

===================  =======================================================================================
randomness.json      the key: all noise follows from it
ledger.jsonl         what was charged, begun under a name that follows from the key
data.json            what the noise is for: the images, and all settings that decide what is summed
later files          what the computation itself writes (``engine.json`` of a run, the result of an estimate)
===================  =======================================================================================

A process that was killed goes on behind the last of these that is on the disk: with the same key, so that the noise it
adds is the noise it would have added, to the same sums, and nothing is charged twice.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpsyngen.config import Config, PrivacyConfig, with_batch
from dpsyngen.data import ImageDataset
from dpsyngen.data.load import with_whole_paths
from dpsyngen.errors import ConfigError, RunError
from dpsyngen.files import write_text
from dpsyngen.hardware import Compute
from dpsyngen.privacy.budget import Budget
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.training.networks import prior_of, with_prior
from dpsyngen.training.plan import Plan, make_plan, program_of, shape_of, with_all_settings


class Session:
    """Key (`randomness`), `ledger` and pinned facts of one computation on private images.

    Charge the ledger *before* a result is used.  `private` is its private folder, which the caller has locked;
    `privacy`, `delta` and `records`, the declared n, say what it may cost; `later` are files that are made after
    ``data.json``, and `again` is what to advise where nothing can be continued.
    RunError or LedgerError if the files do not fit together, or one is missing.
    """

    def __init__(
        self,
        private: Path,
        privacy: PrivacyConfig,
        delta: float,
        records: int,
        later: Sequence[Path] = (),
        again: str = "start a new run",
    ) -> None:
        self.key_path, self.ledger_path = private / "randomness.json", private / "ledger.jsonl"
        self.data_path, self.later, self.again = private / "data.json", tuple(later), again
        self.randomness = self._key(privacy.insecure_seed)
        self.ledger = self._ledger(privacy, delta, records)

    def _key(self, seed: int | None) -> Randomness:
        """The key; a new one only where nothing can have used the old one."""
        head = self.ledger_path.with_name(self.ledger_path.name + ".head")
        begun = any(p.exists() for p in (self.ledger_path, head, self.data_path, *self.later))
        if self.key_path.exists():
            try:
                return Randomness.load(self.key_path)
            except RunError:
                if begun:
                    raise
            self.key_path.unlink()
        elif begun:
            raise self._missing(self.key_path, "steps that are charged would get fresh noise")
        fresh = Randomness.from_system() if seed is None else Randomness.from_insecure_seed(seed)
        fresh.save(self.key_path)
        return fresh

    def _ledger(self, privacy: PrivacyConfig, delta: float, records: int) -> Ledger:
        name = self.randomness.tag("name of the run")[:32]
        if self.ledger_path.exists():
            ledger = Ledger(self.ledger_path)
            ledger.catch_up()
            if ledger.run != name:
                raise RunError(
                    f"{self.key_path} is not the random state with which {self.ledger_path} was begun: steps that are "
                    f"charged would get other noise.  Put back the files of this run, or {self.again}."
                )
            return ledger
        if any(p.exists() for p in (self.data_path, *self.later)):
            raise self._missing(self.ledger_path, "what was charged is no longer known")
        return Ledger.create(
            self.ledger_path,
            target_epsilon=privacy.epsilon,
            delta=delta,
            records=records,
            group_size=privacy.group_size,
            run=name,
            secure=self.randomness.secure,
        )

    def pin(self, fingerprint: str, settings: Mapping[str, Any], **about: Any) -> dict[str, Any]:
        """Write down what the noise is for, or refuse to go on with anything else (RunError).

        Of the images' `fingerprint` only a keyed tag is written; `settings` are what decides the sums, JSON-able; and
        `about` are more facts, such as ``noise_multiplier``, which another version of a library could calibrate
        otherwise: they come back as they were written down the first time.
        """
        tag, settings = self.randomness.tag(fingerprint), json.loads(json.dumps(settings))
        if not self.data_path.exists():
            if self.ledger.mechanisms or self.ledger.non_private:
                raise self._missing(self.data_path, "nothing says any more that the images are the same")
            facts = {"fingerprint": tag, **about, "settings": settings}
            write_text(self.data_path, json.dumps(facts, indent=1) + "\n", 0o600)
            return about
        known = pinned(self.data_path)
        if not hmac.compare_digest(known["fingerprint"], tag):
            raise RunError(
                f"the images are not those that {self.data_path.parent.parent} was started with.  Continuing would add "
                f"the same noise to different data, which can reveal both.  Give the same --data, or {self.again}."
            )
        before = known["settings"]
        changed = sorted(k for k in settings.keys() | before.keys() if settings.get(k) != before.get(k))
        if changed:
            raise RunError(
                f"{self.data_path.parent.parent}: a setting was changed since the run was started "
                f"({', '.join(changed[:5])}).  Continuing would add the same noise to different sums, which can reveal "
                f"both.  Undo the change, or {self.again}."
            )
        return {k: v for k, v in known.items() if k not in ("fingerprint", "settings")}

    def images(self, config: Config, dataset: ImageDataset) -> ImageDataset:
        """The :func:`chosen_images`.  How it is known how many images a person has is written down, which is public."""
        g = config.privacy.group_size
        if dataset.persons is not None and not any("people" in e.details for e in self.ledger.entries):
            most, were = ("at most 1 image", "was") if g == 1 else (f"at most {g} images", "were")
            what = f"declared: {most} a person, checked against"
            if config.privacy.most_per_person is not None:  # which is the group size then
                what = f"{most} of each person {were} used, chosen at random first of all, by"
            people = f"{what} the holder's table of whose image is whose"
            self.ledger.note_public_choice("how many images a person has at most", people=people)
        return chosen_images(config, dataset, self.randomness)

    def _missing(self, path: Path, so: str) -> RunError:
        return RunError(
            f"{path} is missing, though the run had begun: {so}.  Put it back from a backup, or {self.again}."
        )


def pinned(path: Path) -> dict[str, Any]:
    """What :meth:`Session.pin` wrote to `path`; RunError if it is missing or damaged."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        moments = about.get("moments")
        return about | {
            "fingerprint": str(about["fingerprint"]),
            "records": int(about["records"]),
            "noise_multiplier": float(about["noise_multiplier"]),
            "moments": None if moments is None else [None if z is None else float(z) for z in moments],
            "settings": dict(about["settings"]),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path}, which says what images the run is of, cannot be read: {error!r}.  Put it back from a backup, or "
            "start a new run."
        ) from None


def with_group_size(config: Config, dataset: ImageDataset) -> Config:
    """The configuration with the number of images of one person that ε is for, checked by whose images they are.

    What is found in the table is private, and where it decided about noise that is published, ε would not hold.  So it
    is checked only (else ConfigError): the number is declared, or made true by leaving images out.
    """
    p = config.privacy
    changed: dict[str, Any] = {}
    if p.groups is not None:
        changed["groups"] = str(Path(p.groups).expanduser().resolve())
    if dataset.persons is None:
        if p.most_per_person is not None or p.groups is not None:
            whose = "whose image each is: give --groups FILE, a table of file names and persons; for arrays groups=[…]"
            raise ConfigError(f"privacy.most_per_person and privacy.groups need to know {whose}.")
        return config
    if p.most_per_person is not None:
        changed["group_size"] = p.most_per_person
    config = config.model_copy(update={"privacy": p.model_copy(update=changed)})
    largest, _ = dataset.images_a_person(p.most_per_person)
    ways = (
        "How many images a person has at most is private, and published noise would tell it.  Declare a number that "
        "follows from how the images were taken, with --group-size N, which is checked; or use at most m images of "
        f"each person, at random, with --most-per-person m.  In this table it is {largest:,}, for your eyes only."
    )
    if "group_size" not in config.privacy.model_fields_set:
        raise ConfigError(f"how many images of one person ε is for was not said.  {ways}")
    if largest > config.privacy.group_size:
        raise ConfigError(f"somebody has more images than --group-size {config.privacy.group_size} says.  {ways}")
    return config


def chosen_images(config: Config, dataset: ImageDataset, randomness: Randomness) -> ImageDataset:
    """The images that a run uses: where ``privacy.most_per_person`` is m, m at random of each person who has more.

    A function of the run's key and the images, so that a run which is resumed has the same ones.
    """
    most = config.privacy.most_per_person
    if most is None:
        return dataset
    if dataset.persons is None:
        raise ConfigError("privacy.most_per_person needs to know whose image each is: give the table or array again.")
    return dataset.at_most(most, lambda content: randomness.tag(content))


# What may change between two sessions of a run: it decides neither what a step is nor what is made of the steps.
_FREE = {
    "data": {"source", "cache", "workers"},
    "privacy": {"budget", "groups"},
    "private": {"physical_batch", "checkpoint_every"},
    "public": {"checkpoint_every"},
    "compute": {"compile"},  # DP-SGD steps are never compiled
}


def planned(config: Config, dataset: ImageDataset) -> tuple[Config, Plan]:
    """All that is checked and fixed before a run has a directory, and the configuration with what follows from it.

    Raises:
        ConfigError: the settings do not fit the images, each other, the prior or the program.
        BudgetExceeded: the run does not fit into its budget file, under whose lock training reserves it once more.
    """
    config = with_group_size(config, dataset)
    config = config.model_copy(update={"data": with_whole_paths(config.data)})
    shape = shape_of(dataset, config)
    config = with_prior(with_batch(config, shape.records))
    plan = make_plan(config, shape)
    prior_of(config, plan.stages, shape.channels)
    config = with_all_settings(config, program_of(config, shape))
    if config.privacy.budget is not None:
        path = Path(config.privacy.budget).resolve()
        budget = Budget(path)
        budget.require_data(dataset.fingerprint(), config.privacy.most_per_person)
        budget.require(plan.mechanisms)
        config = config.model_copy(update={"privacy": config.privacy.model_copy(update={"budget": str(path)})})
    return config, plan


def fixed_settings(config: Config) -> dict[str, Any]:
    """All settings that a resumed run must share with its beginning, by their full names, as JSON has them."""
    out: dict[str, Any] = {"preset": config.preset}
    for section, values in config.model_dump(mode="json", exclude={"preset", "sampling", "logging"}).items():
        out |= {f"{section}.{k}": v for k, v in values.items() if k not in _FREE.get(section, ())}
    # A table of labels is what is in it, which is pinned with the images, and not where it lies.
    out["data.labels"] = config.data.labels is not False
    # What "auto" came to is pinned by EngineSettings.
    return {k: v for k, v in out.items() if not (k.startswith("compute.") and v == "auto")}


@dataclass
class EngineSettings:
    """How this machine computes, kept so that steps that are taken again, with the same noise, round the same way."""

    path: Path  # where they are kept
    physical_batch: int  # images in memory at a time; 0 while not yet known
    kernels: KernelChoices  # what each convolution uses
    compute: Compute  # of DP-SGD steps
    _saved: str = field(default="", repr=False)

    @classmethod
    def of(cls, path: Path, config: Config, compute: Compute) -> EngineSettings:
        """Those of an earlier session of the run, from `path`, or new ones.

        With an insecure seed, for reproducible runs, kernels follow from the shapes instead of measurements.  Device,
        precision and memory format of DP-SGD steps are those of the run's first session, whatever `compute` says:
        RunError if this one cannot have them, or the file is damaged.
        """
        kernels: dict[str, str] = {}
        found, dp = 0, compute.for_dp_steps()
        if path.exists():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                kernels = {str(k): str(v) for k, v in stored["kernels"].items()}
                found, pins = int(stored["physical_batch"]), dict(stored["compute"])
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise RunError(
                    f"{path} cannot be read: {error}.  It holds how this machine computes: put it back from a backup "
                    "or, on the machine that the run was begun on, remove it to have that measured again."
                ) from None
            why = "Steps since the last checkpoint are taken again with the same noise, so their sums must round alike"
            asked, run = config.compute.precision, path.parent.parent
            if asked not in ("auto", pins.get("precision")):
                begun = pins.get("precision")
                raise RunError(f"compute.precision is {asked}, but {run} was begun in {begun}: undo that.  {why}.")
            try:
                dp = dp.pinned(pins)
            except ConfigError as error:
                raise RunError(f"{run} cannot be continued like this: {error}.  {why}.") from None
        choices = KernelChoices(measure=config.privacy.insecure_seed is None, chosen=kernels)
        return cls(path, config.private.physical_batch or found, choices, dp)

    def save(self) -> None:
        """Write them down, if there is anything new."""
        kernels = {"kernels": self.kernels.chosen, "milliseconds": self.kernels.milliseconds}
        facts = {"physical_batch": self.physical_batch, **kernels, "compute": self.compute.pins()}
        text = json.dumps(facts, indent=1)
        if text != self._saved:
            write_text(self.path, text + "\n", 0o600)
            self._saved = text


def computed_with(path: Path) -> dict[str, Any] | None:
    """Device, precision and memory format of a run's DP-SGD steps, from its ``engine.json``; None if not known yet."""
    try:
        pins = json.loads(path.read_text(encoding="utf-8"))["compute"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return pins if isinstance(pins, dict) else None
