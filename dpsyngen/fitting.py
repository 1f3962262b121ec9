"""Training from Python and notebooks: what is given becomes settings and images, and the run is watched to its end.

What is printed here is public: a notebook keeps its output, and is shared.  Losses on private images, and findings
that rest on them, stay in the run's private half.
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpsyngen.config import Config, merge_settings
from dpsyngen.console import Console
from dpsyngen.data import ImageDataset
from dpsyngen.distributed import started_by_torchrun
from dpsyngen.errors import ConfigError, shown
from dpsyngen.training.pipeline import Training
from dpsyngen.training.public import Progress

if TYPE_CHECKING:
    from dpsyngen.console import Progress as Bar
    from dpsyngen.training.health import Finding

_TRAINERS = {"public": "images drawn by programs", "private": "private images, DP-SGD", "moments": "DP moments"}

_NO_SEED = (
    "has no seed: whoever knows the seed of the noise can subtract it.  Give seed to sample, which is free to repeat.  "
    "For tests only, settings={'privacy': {'insecure_seed': 0}} makes training repeatable and stamps it NOT PRIVATE"
)

ALIASES = {"random_state": "seed", "n": "count", "num_samples": "count", "n_samples": "count", "y": "labels"}


def refuse_unknown(
    method: str, given: Mapping[str, object], known: Sequence[str], *, in_settings: bool = False
) -> None:
    """Raise ConfigError if there is anything in `given`, with the nearest option there is.

    Args:
        method: for the message.
        given: keywords that the method has no parameter for.
        known: the parameters that it has.
        in_settings: whether it has ``settings``, where a name may belong.
    """
    if not given:
        return
    name = next(iter(given))
    if in_settings and name in ("seed", "random_state", "insecure_seed"):
        raise ConfigError(f"{method} {_NO_SEED}.")
    text = f"{method} has no option {shown(name)}"
    places = [s for s, field in Config.model_fields.items() if name in getattr(field.annotation, "model_fields", {})]
    if in_settings and places:
        ways = " or ".join(f"settings={{'{place}': {{'{name}': …}}}}" for place in places)
        raise ConfigError(f"{text}; give it as {ways}.")
    close = [ALIASES[name]] if ALIASES.get(name) in known else get_close_matches(name, known, 1)
    raise ConfigError(f"{text}{f'.  Did you mean {close[0]}?' if close else ''}  It has: {', '.join(known)}.")


def with_options(settings: Mapping[str, Any] | None, **options: Any) -> dict[str, Any]:
    """`settings` with the options in force that are not None; ``private__steps`` is the setting private.steps.

    >>> with_options({"private": {"steps": 5}}, private__copies=2, stages__variant=None)
    {'private': {'steps': 5, 'copies': 2}}
    """
    if settings is not None and not isinstance(settings, Mapping):
        raise ConfigError(
            f"settings is {shown(settings)}, but must be a mapping such as {{'private': {{'steps': 500}}}}."
        )
    chosen: dict[str, Any] = {}
    for key, value in options.items():
        if value is not None:
            section, name = key.split("__")
            chosen.setdefault(section, {})[name] = value
    return merge_settings(dict(settings or {}), chosen)


def as_source(images: Any, labels: Any, class_names: Sequence[str] | None, config: Config) -> Any:
    """What :func:`dpsyngen.fit.load_private` takes, from what a user holds.

    Args:
        images: arrays, PyTorch tensors, lists of Pillow images; or a folder, file, named set or data set.
        labels: for arrays: one a image, numbers or names; None: no classes.
        class_names: names for labels 0, 1, …; None: the labels themselves.
        config: says what size and colour are wanted.

    Raises:
        ConfigError: labels where the images bring their own.
        DataError: images and labels do not fit together.
    """
    if not (isinstance(images, list) or hasattr(images, "__array__")):
        if labels is not None or class_names is not None:
            raise ConfigError(
                "labels and class_names go with arrays of images only; a folder, file or data set has classes of its "
                "own (settings={'data': {'labels': False}} leaves them out)."
            )
        return images
    pixels, values = _as_array(images), None if labels is None else _as_array(labels)
    if class_names is None:
        return pixels, values
    if values is None:
        raise ConfigError("class_names are names for labels 0, 1, …, but there are no labels.")
    from dpsyngen.data.arrays import dataset_from_arrays

    d = config.data
    return dataset_from_arrays(
        pixels,
        values if d.labels else None,
        list(class_names) if d.labels else None,
        source=f"arrays of shape {list(pixels.shape)}",
        resolution=d.resolution,
        channels=d.channels,
        skip_bad=d.skip_bad,
    )


def _as_array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):  # a tensor, which may be on a GPU or need a gradient
        values = values.detach().cpu()
    return values if isinstance(values, np.ndarray) else np.asarray(values)


class Reading:
    """Tells how many images are read, where that takes more than some seconds; called as ``(done, total)``.

    Args:
        console: where to tell.
        config: where it declares the number of images, the number found is private, and nothing is told.
    """

    after = 3.0  # seconds

    def __init__(self, console: Console, config: Config) -> None:
        self._console, self._told = console, config.data.records is None
        self._begun = time.monotonic()
        self._bar: Bar | None = None

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` images are read."""
        if self._bar is None:
            if not self._told or done >= total or time.monotonic() - self._begun < self.after:
                return
            self._bar = self._console.progress("reading images", total, "images").__enter__()
        self._bar.update(done)
        if done >= total:
            self._bar.__exit__(None, None, None)
            self._told = False


def new_folder() -> Path:
    """A run directory that does not exist yet: ``runs/fit-20260101-120000``.

    Raises:
        ConfigError: torchrun started this process, and each of its processes would choose another one.
    """
    if started_by_torchrun():
        raise ConfigError("out is missing: the processes of torchrun have to be given one run directory.")
    first = Path("runs") / f"fit-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = first, 1
    while path.exists():
        number += 1
        path = first.with_name(f"{first.name}-{number}")
    return path


def describe(training: Training) -> list[str]:
    """What is about to be done, in lines without anything private."""
    plan, config = training.plan, training.config
    shape, g = plan.shape, config.privacy.group_size
    classes = f"{shape.num_classes} classes" if shape.num_classes else "no classes"
    stages = ", ".join(f"{s.name} ({_TRAINERS[s.trainer]})" for s in reversed(plan.stages.stages))
    lines = [
        f"run directory: {training.run.path}",
        f"{shape.records:,} images {shape.channels}x{shape.resolution}x{shape.resolution}, {classes}; preset "
        f"{config.preset}, {training.parameters:,} parameters",
        f"stages, noisy to clean: {stages}",
    ]
    if math.isinf(config.privacy.epsilon):
        lines.append("NOT PRIVATE: ε = ∞, no clipping, no noise")
    else:
        unit = "one image" if g == 1 else f"up to {g} images together"
        lines.append(
            f"to be spent: ε = {config.privacy.epsilon:g} at δ = {plan.delta:.3g} for {unit}, added or removed"
        )
    if config.privacy.insecure_seed is not None:
        lines.append("NOT PRIVATE: the noise comes from a reproducible seed")
    return lines


def carry_out(
    training: Training, console: Console | None = None, on_progress: Callable[[Progress], None] | None = None
) -> None:
    """Train to the end, and say on the way how far it is.

    Ctrl-C (in a notebook: "interrupt") ends it after the current step with a checkpoint; a second one ends it at once,
    and what was done since the last checkpoint is done again, with the same noise, when the run is resumed.

    Args:
        training: new or resumed.
        console: where to tell; None: nowhere.
        on_progress: called after each step.

    Raises:
        KeyboardInterrupt: it was interrupted; the message says how to go on.
    """
    from dpsyngen.evaluation.doctor import write_health

    out = console or Console(quiet=True)
    if console is not None:
        training.warn, training.tell = console.warn, console.note
        for line in describe(training):
            console.note(line)
    again = "" if training.config.data.source else ", images, labels"  # arrays are written down nowhere
    advice = f"go on with: Generator.resume({str(training.run.path)!r}{again})"
    findings: list[Finding] = []
    try:
        with training.run.lock(), _stoppable(training, out.note):
            _watch(training, out, on_progress)
            if training.run.complete:
                findings = write_health(training.run, training.device)
    except KeyboardInterrupt:
        if training.run.complete:
            raise
    except Exception as error:
        if not training.run.complete:
            error.add_note(f"the run is in {training.run.path}; when that is mended, {advice}")
        raise
    if not training.run.complete:
        if console is not None:
            console.note(f"interrupted; {advice}")
        raise KeyboardInterrupt(f"training was interrupted; nothing is lost: {advice}") from None
    if console is not None:
        for f in findings:
            # The others rest on private images.
            if f.basis == "released" and f.severity != "note":
                console.note(f"{f.severity}: {f.seen}; {f.why}.  {f.change}.")
        console.note(f"done.  What the private images say about the training: dpsyngen doctor {training.run.path}")


def _watch(training: Training, console: Console, on_progress: Callable[[Progress], None] | None) -> None:
    """Iterate over the steps, with a bar for each phase."""
    private = training.plan.stages.private.name
    bar: Bar | None = None
    current = None
    with contextlib.closing(training.steps()) as steps:  # type: ignore[type-var]
        try:
            for p in steps:
                if p.phase != current:
                    if bar is not None:
                        bar.__exit__(None, None, None)
                    what = _TRAINERS["private" if p.phase == private else "public"]
                    if p.phase not in (private, *(s.name for s in training.plan.stages.public), "pretrain"):
                        bar, current = None, p.phase  # DP moments, which come all at once
                    else:
                        bar = console.progress(f"{p.phase}: {what}", p.steps, "steps", start=p.step - 1).__enter__()
                        current = p.phase
                if bar is not None:
                    loss = p.values.get("loss")
                    bar.update(p.step, f"loss {loss:.3f}" if loss is not None and p.phase != private else "")
                if on_progress is not None:
                    on_progress(p)
        finally:
            if bar is not None:
                bar.__exit__(*sys.exc_info())


def _stoppable(training: Training, tell: Callable[[str], None]) -> AbstractContextManager[None]:
    from dpsyngen.training.signals import stop_on_signals

    # Signals are the main thread's; in another one an interrupt cannot arrive.
    if threading.current_thread() is not threading.main_thread():
        return contextlib.nullcontext()
    return stop_on_signals(training, tell)


def require_images(images: Any) -> None:
    """Raise ConfigError if there are none, so that a preset's or a file's source is not used by mistake."""
    if images is None or (isinstance(images, str) and not images.strip()):
        raise ConfigError("no images were given: arrays, a folder, a file, a named set or a data set.")
    if isinstance(images, ImageDataset) and not len(images):
        raise ConfigError("the data set has no images.")
