"""The library's front door: train, evaluate, report.  The command line is a thin layer over these."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never, Self

from dpsyngen.config import Config, load_config
from dpsyngen.data import ImageDataset
from dpsyngen.data.load import PathLike, Source, load_named_or_given
from dpsyngen.distributed import ALONE, Ranks, device_of, joined
from dpsyngen.errors import RunError
from dpsyngen.generator.generator import ReleasedGenerator
from dpsyngen.generator.saved import find, save
from dpsyngen.hardware import check_device, kind_of
from dpsyngen.training.follower import follow, read_together
from dpsyngen.training.new_run import require_new
from dpsyngen.training.pipeline import Training
from dpsyngen.training.public import Progress
from dpsyngen.training.run import Run
from dpsyngen.training.start import require_unfinished, resume, start

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from dpsyngen.console import Console


def prepare(
    config: Config,
    out: PathLike,
    data: Source | None = None,
    device: str = "cpu",
    ranks: Ranks = ALONE,
    on_reading: Callable[[int, int], None] | None = None,
) -> Training:
    """Read the images, check everything, and make the run directory; nothing is spent yet.

    Args:
        config: all settings.
        out: a folder that does not exist or is empty.  The training that is returned holds its lock.
        data: the private images; None: what ``config.data.source`` names.
        device: "cpu", "cuda", …
        ranks: the processes that share the work; this is the main one, the others are in :func:`follow_training`.
        on_reading: called as ``(done, total)`` while images are decoded.  How many there are is private where the
            configuration declares another number.

    Raises:
        ConfigError, DataError, RunError: see their messages.
    """
    require_new(Path(out))
    check_device(device, config.compute)
    dataset = read_together(ranks, config, lambda c: load_named_or_given(data, c, on_reading))
    return start(config, dataset, Path(out), device, ranks)


def prepare_resume(
    out: PathLike,
    data: Source | None = None,
    device: str = "cpu",
    tensorboard: bool | None = None,
    ranks: Ranks = ALONE,
    on_reading: Callable[[int, int], None] | None = None,
) -> Training:
    """Go on with the interrupted run in `out`, by default with the images it was started with.

    Args:
        out: the run directory.
        data: the same images, if they have moved.
        device: where to compute.
        tensorboard: whether this session writes files for TensorBoard; None: what the run's settings say.
        ranks: as in :func:`prepare`; another number of processes than before will do.
        on_reading: as in :func:`prepare`.
    """
    check_device(device)
    run = Run(Path(out))
    require_unfinished(run)
    # Before the images are read, which can take long.
    run.open_for_writing()
    dataset = read_together(ranks, run.config, lambda c: load_named_or_given(data, c, on_reading))
    return resume(run, dataset, device, tensorboard, ranks)


def follow_training(ranks: Ranks, data: Source | None = None, device: str = "cpu") -> None:
    """In every process but the main one: share the training that the main one leads, to its end.

    Args:
        ranks: the processes.
        data: as it is given to :func:`prepare` in the main process.
        device: where to compute.

    Raises:
        Dismissed: the main process failed, and said why.
        RankLost: a process is gone.
    """
    check_device(device)
    follow(ranks, lambda config: load_named_or_given(data, config), device)


def train(
    data: Source,
    *,
    out: PathLike,
    epsilon: float,
    delta: float | None = None,
    preset: str | None = None,
    settings: Mapping[str, Any] | None = None,
    device: str = "auto",
    on_progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Train a generator on private images with (ε, δ)-differential privacy.

    :meth:`dpsyngen.Generator.fit` is the same with a generator as the result, and with more to see.  In a script that
    torchrun starts all processes call this alike and share the work (docs/distributed.md).

    Args:
        data: a folder, file or named set; an :class:`ImageDataset`; or (images, labels) arrays.
        out: the run directory to make.
        epsilon: ε > 0 for one image, add/remove adjacency; ``math.inf`` trains without privacy, for reference.
        delta: δ; None: the largest power of ten below the inverse of the number of images.
        preset: see :func:`dpsyngen.config.preset_names`.
        settings: nested overrides of the preset, such as ``{"private": {"steps": 500}}``.
        device: where to compute: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", ….
        on_progress: called after each step.

    Returns:
        the finished run; ``run.release`` is safe to publish.  ``run.private / "health.json"`` says what looks wrong.

    Raises:
        ConfigError, DataError, RunError: before anything is spent.
        KeyboardInterrupt: it was interrupted, with a checkpoint; :func:`prepare_resume` goes on.
    """
    from dpsyngen.fitting import with_options

    given = with_options(
        settings,
        privacy__epsilon=epsilon,
        privacy__delta=delta,
        data__source=os.fspath(data) if isinstance(data, str | os.PathLike) else None,
    )
    config, device = load_config(given, preset=preset), kind_of(device)
    return train_together(
        lambda own, ranks: prepare(config, out, data, own, ranks), out, data, device, on_progress=on_progress
    )


def train_together(
    begin: Callable[[str, Ranks], Training],
    out: PathLike,
    data: Source | None,
    device: str,
    *,
    console: Console | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Train to the end, in this process or in all that torchrun started; all of them call this alike.

    Args:
        begin: what makes the training (:func:`prepare` or :func:`prepare_resume`), given the device of this process and
            the processes; called in the main one.
        out: the run directory.
        data: the private images; None: what the run's settings name.
        device: where to compute.
        console: where the main process tells what is going on; None: nowhere.
        on_progress: called in the main process after each step.

    Returns:
        the finished run.

    Raises:
        KeyboardInterrupt: it was interrupted; the message says how to go on.
    """
    from dpsyngen.fitting import carry_out

    with joined() as ranks:
        device = device_of(device, ranks)
        if not ranks.main:
            follow_training(ranks, data, device)
            return Run(Path(out))
        with ranks.leading():
            training = begin(device, ranks)
            carry_out(training, console, on_progress)
        return training.run


_FIT = (
    *("images", "labels", "class_names", "epsilon", "delta", "group_size", "budget", "preset", "variant", "steps"),
    *("resolution", "settings", "out", "device", "progress"),
)


class Generator(ReleasedGenerator):
    """Draws images.  :meth:`fit` trains one on private images, :meth:`load` takes one from the disk.

    >>> generator = Generator.fit(images, labels, epsilon=3)                  # doctest: +SKIP
    >>> generator.privacy.epsilon, generator.privacy.delta                    # doctest: +SKIP
    (2.9996, 1e-05)
    >>> generator.sample(4, labels=["shoe", "shoe", "bag", "coat"]).show()    # doctest: +SKIP
    >>> generator.save("shoes.zip")                                           # doctest: +SKIP
    PosixPath('shoes.zip')

    Args:
        release: the ``release`` folder of a run, or a copy of it.  It may come from a stranger: nothing in it is run,
            and it is checked before memory is taken for it (see :mod:`dpsyngen.generator.files`).
        device: where to compute: "cpu", "cuda", "cuda:1", …, or "auto".
        compute: precision, memory format, compiling; None: all automatic.  Other ways to compute give images that may
            differ in the last digits.

    Raises:
        RunError: not a finished release, or damaged.

    Attributes:
        class_names: () if unconditional.
        private: whether there is a privacy guarantee; :attr:`privacy` has all of it.
        place: where it is on the disk.
        stages: who answers at which noise level.
        networks: the denoiser of each network.
        gaussian: the denoiser of the DP moments; None if there are none.
    """

    @classmethod
    def fit(
        cls,
        images: ArrayLike | PathLike | ImageDataset | Any,
        labels: ArrayLike | None = None,
        *,
        epsilon: float,
        delta: float | None = None,
        class_names: Sequence[str] | None = None,
        group_size: int | None = None,
        budget: PathLike | None = None,
        preset: str | None = None,
        variant: str | None = None,
        steps: int | None = None,
        resolution: int | None = None,
        settings: Mapping[str, Any] | None = None,
        out: PathLike | None = None,
        device: str = "auto",
        progress: bool = True,
        **unknown: Never,
    ) -> Self:
        """Train a generator on private images with (ε, δ)-differential privacy.

        Everything is checked before anything is spent.  The training is a run like one of `dpsyngen train`: with a
        ledger, a certificate, checkpoints, and a private half that stays with you.

        There is no seed.  Whoever knows the seed of the noise can subtract it, so it comes from the operating system's
        entropy; two fits of one call differ.  ``settings={"privacy": {"insecure_seed": 0}}`` is for tests, and stamps
        the generator NOT PRIVATE.

        What is printed is public, so that a notebook can be shared with its output: no loss on private images is in it.
        (The arguments in the notebook, and the run directory's ``private/``, are another matter.)

        Args:
            images: arrays (or PyTorch tensors, or a list of Pillow images), uint8 or float in [0, 1], ``[N, H, W]``,
                ``[N, H, W, C]`` or ``[N, C, H, W]``; or a folder, a file, a named set or a data set, as for
                :func:`dpsyngen.load_images`.
            labels: for arrays: [N] whole numbers or texts; None: no classes.  Folders, files and data sets bring
                their own.
            epsilon: ε > 0, for one image added or removed; ``math.inf`` trains without privacy, for reference.
            delta: δ; None: the largest power of ten below 1/N.
            class_names: names for labels 0, 1, …, all of which are then public; None: the labels that occur are.
            group_size: images of one person at most; ε is then for all of them together.  None: 1.
            budget: file of the budget that all runs on these images share; see docs/privacy.md.
            preset: see :func:`dpsyngen.config.preset_names`; None: "gpu" where there is one, else "cpu-small".
            variant: who trains which noise levels; None: what the preset says.
            steps: of DP-SGD; None: what the preset says.
            resolution: pixels; None: what the images have.
            settings: nested overrides of the preset, such as ``{"private": {"copies": 8}}``, or what
                :meth:`get_params` of an earlier generator gave with ``deep=False``.  Options above go before them.
            out: the run directory to make; None: a new one, ``runs/fit-DATE-TIME``.
            device: where to compute: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", ….
            progress: tell what is going on: in a notebook below the cell, elsewhere on standard error.

        Raises:
            ConfigError, DataError, RunError: before anything is spent.
            KeyboardInterrupt: it was interrupted.  Nothing is lost: :meth:`resume` goes on.
        """
        from dpsyngen.fitting import Reading, as_source, new_folder, refuse_unknown, require_images, with_options
        from dpsyngen.notebook import console_for

        refuse_unknown("fit", unknown, _FIT, in_settings=True)
        require_images(images)
        given = with_options(
            settings,
            privacy__epsilon=epsilon,
            privacy__delta=delta,
            privacy__group_size=group_size,
            privacy__budget=None if budget is None else os.fspath(budget),
            stages__variant=variant,
            private__steps=steps,
            data__resolution=resolution,
            data__source=os.fspath(images) if isinstance(images, str | os.PathLike) else None,
        )
        config, device = load_config(given, preset=preset), kind_of(device)
        source = as_source(images, labels, class_names, config)
        folder = new_folder() if out is None else Path(out).expanduser()
        console = console_for(progress)
        reading = Reading(console, config)
        run = train_together(
            lambda own, ranks: prepare(config, folder, source, own, ranks, reading),
            folder,
            source,
            device,
            console=console,
        )
        return cls(run.release, device)

    @classmethod
    def resume(
        cls,
        out: PathLike,
        images: ArrayLike | PathLike | ImageDataset | Any = None,
        labels: ArrayLike | None = None,
        *,
        class_names: Sequence[str] | None = None,
        device: str = "auto",
        progress: bool = True,
    ) -> Self:
        """Go on with a :meth:`fit` (or a `dpsyngen train`) that was interrupted, as if it had not been.

        Args:
            out: its run directory.
            images, labels, class_names: the same as at the start.  Images that came from a folder or file may be left
                out; arrays must be given again, and others than those are refused.
            device, progress: as for :meth:`fit`.

        Raises:
            ConfigError, DataError, RunError: the images are missing or others, or there is nothing to resume.
            KeyboardInterrupt: it was interrupted again.
        """
        from dpsyngen.fitting import Reading, as_source
        from dpsyngen.notebook import console_for

        folder, device = Path(out).expanduser(), kind_of(device)
        run = Run(folder)
        if run.complete:
            raise RunError(
                f"{folder} is finished: there is nothing to resume.  Generator.load({str(folder)!r}) takes it."
            )
        source = None if images is None else as_source(images, labels, class_names, run.config)
        console = console_for(progress)
        reading = Reading(console, run.config)
        run = train_together(
            lambda own, ranks: prepare_resume(folder, source, own, ranks=ranks, on_reading=reading),
            folder,
            source,
            device,
            console=console,
        )
        return cls(run.release, device)

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
                run directory, whose ledger the certificate is compared with.  Anything else is a folder to make.
                Nothing is overwritten.
            not_private: save a generator that carries no guarantee all the same, stamped as such.

        Raises:
            ConfigError, RunError: there is something at `path`, or a bundle cannot be made from what is at hand.
            ReleaseError: there is no guarantee and `not_private` is false, or something is wrong with the release.
        """
        return save(self.place, path, not_private)
