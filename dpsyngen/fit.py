"""The assembly: images → plan → training → release → Generator.

The one path to a trained generator, for the command line, :meth:`Generator.fit`, :func:`train`, experiments, torchrun.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, Self, TypedDict, Unpack

from numpy.typing import ArrayLike

from dpsyngen.config import Config, load_config, with_options
from dpsyngen.console import Console
from dpsyngen.data import ImageDataset
from dpsyngen.data.load import PathLike, Source, as_source, load_named_or_given, said_of_a_run, with_persons
from dpsyngen.distributed import ALONE, Ranks, joined
from dpsyngen.errors import ConfigError, DataError, RunError, require
from dpsyngen.files import expanded
from dpsyngen.full_precision import ordinary_modes
from dpsyngen.generator.generator import ReleasedGenerator
from dpsyngen.hardware import choose, device_of, kind_of
from dpsyngen.release.place import find, save
from dpsyngen.release.write import write_release
from dpsyngen.training.findings import Finding
from dpsyngen.training.follower import follow, read_together, stop_on_signals
from dpsyngen.training.health import assess, write_health
from dpsyngen.training.log import Display, Event, Note, OnEvent, Reading, Step, Warned, ignore
from dpsyngen.training.pipeline import Hooks, Training, require_unfinished, require_usable
from dpsyngen.training.plan import without_effect
from dpsyngen.training.run import Run, place_of, require_new

# ------------------------------------------------------------------------- images, plan, training, release


@ordinary_modes()
def prepare(
    config: Config,
    out: PathLike,
    data: Source | None = None,
    device: str = "cpu",
    ranks: Ranks = ALONE,
    on_event: OnEvent = ignore,
    given: Mapping[str, Any] | None = None,
) -> Training:
    """Read the images, check everything, and make the run directory; nothing is spent yet.

    `data` None: what ``config.data.source`` names.  The training that is returned holds the lock of `out`, and tells
    `on_event` what happens.  `given`: the settings that somebody chose, for a warning of those without effect.

    Raises ConfigError, DataError, LedgerError or RunError; what needs no image is refused before any is read.
    """
    out = expanded(out)
    require_new(out)
    require_usable(config)
    choose(device, config.compute)
    dataset = _read(config, data, ranks, on_event)
    training = Training.start(config, dataset, out, device, ranks, Hooks(on_event, write_release))
    if idle := without_effect(given or {}, config):
        on_event(Warned(idle))
    return training


@ordinary_modes()
def prepare_resume(
    out: PathLike,
    data: Source | None = None,
    device: str = "cpu",
    ranks: Ranks = ALONE,
    on_event: OnEvent = ignore,
    tensorboard: bool | None = None,
    groups: PathLike | None = None,
    labels: PathLike | None = None,
) -> Training:
    """Go on with the interrupted run in `out`, by default with the images it was started with.

    Arguments as of :func:`prepare`, perhaps another device; `tensorboard`, `groups` and `labels` replace settings.
    """
    choose(device)
    run = Run(expanded(out))
    require_unfinished(run)
    run.open_for_writing()  # before the images are read, which can take long
    p = {} if groups is None else {"groups": str(expanded(groups).absolute())}
    d = {} if labels is None else {"labels": str(expanded(labels).absolute())}
    c = run.config
    config = c.model_copy(update={"privacy": c.privacy.model_copy(update=p), "data": c.data.model_copy(update=d)})
    with said_of_a_run(data):
        dataset = _read(config, data, ranks, on_event)
    return Training.resume(run, dataset, device, ranks, Hooks(on_event, write_release), tensorboard)


def _read(config: Config, data: Source | None, ranks: Ranks, on_event: OnEvent) -> ImageDataset:
    # How many images are found is private where another number is declared, or where not all are used.
    private = config.data.records is not None or config.privacy.most_per_person is not None

    def load(c: Config) -> ImageDataset:
        return load_named_or_given(data, c, lambda done, total: on_event(Reading(done, total, private)))

    dataset = read_together(ranks, config, load)
    if not len(dataset):
        raise DataError("the data set has no images.")
    lines = [f"{len(dataset):,} images were found"] if private else []
    if dataset.file is not None:
        lines.append(f"  read from {dataset.file}, which holds them decoded and is PRIVATE")
    more = f"{len(dataset.skipped) - 20:,} more; private/data.json of the run has them all"
    told = dataset.skipped if len(dataset.skipped) <= 20 else (*dataset.skipped[:20], more)
    for line in [*lines, *(f"  left out: {which}" for which in told)]:
        on_event(Note(line, private=True))
    return dataset


@dataclass(frozen=True)
class Trained:
    """A finished training, and what looks wrong with it."""

    training: Training
    findings: list[Finding]


class Interrupted(KeyboardInterrupt):
    """The training was asked to stop, and did after a checkpoint; the message says how to go on."""

    def __init__(self, training: Training) -> None:
        super().__init__(f"training was interrupted; nothing is lost: {_advice(training)}")
        self.run = training.run


@ordinary_modes()
def train_together(begin: Callable[..., Training], data: Source | None, device: str) -> Trained | None:
    """Train to the end, in this process or in all that torchrun started; all of them call this alike.

    Ctrl-C (in a notebook: "interrupt") ends it after the current step with a checkpoint (Interrupted); a second one
    ends it at once, and the steps since the last checkpoint are taken again, with the same noise, when the run is
    resumed.  Dismissed, RankLost: the main process failed and said why, or a process is gone.

    `begin`, :func:`prepare` or :func:`prepare_resume` with its arguments but ``device`` and ``ranks``, is called in
    the main process, `data` is read in the others.  Returns what was trained; None but in the main process.
    """
    with joined() as ranks:
        device = device_of(device, ranks)
        if not ranks.main:
            follow(ranks, lambda config: load_named_or_given(data, config), device)
            return None
        with ranks.leading():
            training = begin(device=device, ranks=ranks)
            findings = _carry_out_and_assess(training)
    if findings is None:
        raise Interrupted(training)
    return Trained(training, findings)


@ordinary_modes()
def carry_out(training: Training) -> bool:
    """Say what is planned and take all steps that are left, the release included.

    Signals and advice are the caller's: :func:`train_together` adds them.  Returns whether it is finished; False if it
    was asked to stop (``training.stop_requested``), which it did after a checkpoint.
    """
    for line in training.describe():
        training.hooks.on_event(Note(line))
    for _ in training.steps():
        pass
    return training.run.complete


def _carry_out_and_assess(training: Training) -> list[Finding] | None:
    """Carry it out, and write down what looks wrong; None if it was interrupted."""
    run, tell = training.run, training.hooks.on_event
    try:
        with run.lock(), stop_on_signals(training, lambda text: tell(Note(text))):
            if not carry_out(training):
                return None
            findings = assess(run, lambda release: ReleasedGenerator(release, training.device))
            write_health(run, findings)
            return findings
    except KeyboardInterrupt:
        if run.complete:
            raise
        return None
    except Exception as error:
        if not run.complete:
            error.add_note(f"the run is in {run.path}; when that is mended, {_advice(training)}")
        raise


def _advice(training: Training) -> str:
    again = "" if training.config.data.source else ", images, labels"  # arrays are written down nowhere
    return f"go on with: Generator.resume({str(training.run.path)!r}{again})"


# ------------------------------------------------------------------------------------------ front doors


def train(
    data: Source,
    *,
    out: PathLike,
    epsilon: float,
    delta: float | None = None,
    preset: str | None = None,
    settings: Mapping[str, Any] | None = None,
    device: str = "auto",
    on_progress: Callable[[Step], None] | None = None,
) -> Run:
    """Train a generator on private images with (ε, δ)-differential privacy.

    :meth:`dpsyngen.Generator.fit` is the same with a generator as the result, and with more to see.  In a script that
    torchrun starts all processes call this alike and share the work (docs/distributed.md).

    Args:
        data: a folder, file or named set; an :class:`ImageDataset`; or (images, labels) arrays.
        out: the run directory to make.
        epsilon, delta, preset, settings, device: as for :meth:`Generator.fit`.
        on_progress: called after each step; figures of private phases are private.

    Returns:
        the finished run; ``run.release`` is safe to publish.  ``run.private / "health.json"`` says what looks wrong.

    Raises:
        ConfigError, DataError, RunError: before anything is spent.
        KeyboardInterrupt: it was interrupted, with a checkpoint; :meth:`Generator.resume` goes on.
    """

    def on_event(event: Event) -> None:
        if on_progress is not None and isinstance(event, Step):
            on_progress(event)

    given = with_options(settings, privacy__epsilon=epsilon, privacy__delta=delta, data__source=_named(data))
    config = load_config(given, preset=preset, device=device)
    train_together(partial(prepare, config, out, data, on_event=on_event), data, kind_of(device))
    return Run(expanded(out))


class FitOptions(TypedDict, total=False):
    """More options of :meth:`Generator.fit`; what they are is said there."""

    delta: float | None
    class_names: Sequence[str] | None
    group_size: int | None
    groups: ArrayLike | PathLike | None
    most_per_person: int | None
    budget: PathLike | None
    variant: str | None
    steps: int | None
    resolution: int | None


class Generator(ReleasedGenerator):
    """Draws images.  :meth:`fit` trains one on private images, :meth:`load` takes one from the disk.

    >>> generator = Generator.fit(images, labels, epsilon=3)                  # doctest: +SKIP
    >>> generator.privacy.epsilon, generator.privacy.delta                    # doctest: +SKIP
    (2.9996, 1e-05)
    >>> generator.sample(4, labels=["shoe", "shoe", "bag", "coat"]).show()    # doctest: +SKIP
    >>> generator.save("shoes.zip")                                           # doctest: +SKIP
    PosixPath('shoes.zip')

    Arguments and attributes are those of :class:`dpsyngen.generator.generator.ReleasedGenerator`; ``place`` is where
    it is on the disk.
    """

    @classmethod
    def fit(
        cls,
        images: ArrayLike | PathLike | ImageDataset | Any,
        labels: ArrayLike | None = None,
        *,
        epsilon: float,
        preset: str | None = None,
        settings: Mapping[str, Any] | None = None,
        out: PathLike | None = None,
        device: str = "auto",
        progress: bool = True,
        **options: Unpack[FitOptions],
    ) -> Self:
        """Train a generator on private images with (ε, δ)-differential privacy.

        Everything is checked before anything is spent.  The training is a run like one of `dpsyngen train`: with a
        ledger, a certificate, checkpoints, and a private half that stays with you.

        There is no seed: whoever knows it can subtract the noise, which comes from the operating system's entropy.
        ``settings={"privacy": {"insecure_seed": 0}}`` is for tests, and stamps the generator NOT PRIVATE.

        What is printed is public, so that a notebook can be shared with its output: no loss on private images is in it.
        Not so the warning that most images are nearly black or of one grey, the error of ``groups`` with too small a
        ``group_size``, the arguments in the notebook, and the run directory's ``private/``.

        Args:
            images: arrays (or PyTorch tensors), uint8 or float in [0, 1], ``[N, H, W]``, ``[N, H, W, C]`` or
                ``[N, C, H, W]``, or a list of images in any form; or a folder, a file, a named set or a data set, as
                for :func:`dpsyngen.load_images`.
            labels: for arrays: [N] whole numbers or texts; None: no classes.  Folders, files and data sets bring
                their own.
            epsilon: ε > 0, for one image added or removed; ``math.inf`` trains without privacy, for reference.
            preset: see :func:`dpsyngen.config.preset_names`; None: "gpu" where there is one, else "cpu-small".
            settings: nested overrides of the preset, such as ``{"private": {"copies": 8}}``, or what
                :meth:`get_params` of an earlier generator gave with ``deep=False``.  Options go before them.
            out: the run directory to make; None: a new one, ``runs/fit-DATE-TIME``.
            device: where to compute: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", ….
            progress: tell what is going on: below the cell of a notebook, elsewhere on standard error.
            options: ``delta`` (δ; default: the largest power of ten below 1/N), ``class_names`` (names for labels
                0, 1, …, all of which are then public; default: the labels that occur are), ``group_size`` (images of
                one person at most; ε is then for all of them together), ``groups`` (whose image each is, [N] numbers or
                texts; for files a table of file names and persons: it checks ``group_size``), ``most_per_person``
                (with it: so many images of each are used, at random), ``budget`` (file of the budget that all runs
                on these images share; see docs/privacy.md), ``variant`` (who trains which noise levels), ``steps``
                (of DP-SGD) and ``resolution`` (pixels; default: what the images have).

        Raises:
            TypeError: there is no such option.
            ConfigError, DataError, RunError: before anything is spent.
            KeyboardInterrupt: it was interrupted.  Nothing is lost: :meth:`resume` goes on.
        """
        unknown = sorted(options.keys() - FitOptions.__annotations__.keys())
        if unknown:
            known = ["epsilon", "preset", "settings", "out", "device", "progress", *FitOptions.__annotations__]
            near = "".join(f"  Did you mean {name}?" for name in get_close_matches(unknown[0], known, 1))
            raise TypeError(
                f"fit has no option {unknown[0]!r}.{near}  It has: {', '.join(known)}; every other setting goes into "
                "settings, and the noise has no seed."
            )
        if images is None or (isinstance(images, str) and not images.strip()):
            raise ConfigError("no images were given: arrays, a folder, a file, a named set or a data set.")
        require(epsilon is not None, "epsilon", epsilon, "a number above 0: how much the training may spend")
        given = with_options(
            settings,
            privacy__epsilon=epsilon,
            privacy__delta=options.get("delta"),
            privacy__group_size=options.get("group_size"),
            privacy__groups=_named(options.get("groups")),
            privacy__most_per_person=options.get("most_per_person"),
            privacy__budget=(budget := options.get("budget")) and os.fspath(budget),
            stages__variant=options.get("variant"),
            private__steps=options.get("steps"),
            data__resolution=options.get("resolution"),
            data__source=_named(images),
        )
        config, device = load_config(given, preset=preset, device=device), kind_of(device)
        source = with_persons(as_source(images, labels, options.get("class_names")), options.get("groups"), config)
        with place_of(out, time.strftime("fit-%Y%m%d-%H%M%S")) as folder:
            return cls._trained(partial(prepare, config, folder, source, given=given), folder, source, device, progress)

    @classmethod
    def resume(
        cls,
        out: PathLike,
        images: ArrayLike | PathLike | ImageDataset | Any = None,
        labels: ArrayLike | None = None,
        *,
        class_names: Sequence[str] | None = None,
        groups: ArrayLike | None = None,
        device: str = "auto",
        progress: bool = True,
    ) -> Self:
        """Go on with a :meth:`fit` (or a `dpsyngen train`) that was interrupted, as if it had not been.

        Args:
            out: its run directory.
            images, labels, class_names, groups: as at the start; needed for arrays only.  Other images are refused.
            device, progress: as for :meth:`fit`.

        Raises:
            ConfigError, DataError, RunError: the images are missing or others, or there is nothing to resume.
            KeyboardInterrupt: it was interrupted again.
        """
        folder, device = expanded(out), kind_of(device)
        if (run := Run(folder)).complete:
            raise RunError(
                f"{folder} is finished: there is nothing to resume.  Generator.load({str(folder)!r}) takes it."
            )
        source = None if images is None else with_persons(as_source(images, labels, class_names), groups, run.config)
        table = groups if isinstance(groups, str | os.PathLike) else None
        begin = partial(prepare_resume, folder, source, groups=table)
        return cls._trained(begin, folder, source, device, progress)

    @classmethod
    def _trained(
        cls, begin: Callable[..., Training], folder: Path, source: Source | None, device: str, progress: bool
    ) -> Self:
        console = Console(quiet=not progress)
        with Display(console) as on_event:
            trained = train_together(partial(begin, on_event=on_event), source, device)
        for f in () if trained is None else trained.findings:
            # What rests on private images is not shown: a notebook keeps its output, and is published.
            if f.basis == "released":
                console.note(f"{f.severity}: {f.seen}; {f.why}.  {f.change}.")
        console.note(f"done.  What the private images say about the training: dpsyngen doctor {quote(str(folder))}")
        return cls(Run(folder).release, device)

    @classmethod
    def load(cls, path: PathLike, device: str = "auto") -> Self:
        """A generator from the disk.

        Args:
            path: a run directory, its release folder or a copy of that, or a bundle (``.zip``), from anybody: nothing
                in it is run.  Whether its claim is true is another question, see :func:`dpsyngen.verify`.
            device: where to compute, as for :meth:`fit`.

        Raises:
            RunError: there is no generator, its training is not finished, or it is damaged.
            ReleaseError: a bundle that is damaged or was changed.
        """
        place = find(path)
        generator = cls(place.release, device)
        generator.place = place
        return generator

    def save(self, path: PathLike, *, not_private: bool = False) -> Path:
        """Save what may be published, and nothing else; returns where.

        Args:
            path: a ``.zip`` for a release bundle, which :func:`dpsyngen.verify` checks anywhere; it is made from the
                run directory, whose ledger the certificate is compared with, and has a report page if
                :func:`dpsyngen.write_report` wrote one.  Anything else is a folder to make.  Nothing is overwritten.
            not_private: save a generator that carries no guarantee all the same, stamped as such.

        Raises:
            ConfigError, RunError: there is something at `path`, or a bundle cannot be made from what is at hand.
            ReleaseError: there is no guarantee and `not_private` is false, or something is wrong with the release.
        """
        return save(self.place, path, not_private)


def _named(images: Any) -> str | None:
    """What the settings say that the images are; None for images in memory, which are written down nowhere."""
    return os.fspath(images) if isinstance(images, str | os.PathLike) else None
