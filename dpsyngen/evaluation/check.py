"""Checks of a whole run for its owner's eyes: does the generator repeat training images?  All results are private."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpsyngen.config import Config
from dpsyngen.data import ImageDataset
from dpsyngen.data.load import Source, load_private
from dpsyngen.errors import ConfigError, DataError, RunError
from dpsyngen.files import write_atomically, write_text
from dpsyngen.hardware import check_device
from dpsyngen.training.run import Run

if TYPE_CHECKING:
    from collections.abc import Callable

    from dpsyngen.evaluation.memorisation import Memorisation


def check_memorisation(
    run: Run | str | os.PathLike[str],
    *,
    data: Source | None = None,
    held_out: Source | None = None,
    images: int = 1000,
    features: Sequence[str] = ("pixels",),
    sampling: dict[str, Any] | None = None,
    seed: int = 0,
    device: str = "cpu",
    on_progress: Callable[[str], None] | None = None,
) -> Memorisation:
    """Compare a run's generated images with its training images and with held-out ones.

    The figures go to ``private/memorisation.json``, a picture to ``private/memorisation.png``, and its images to
    ``private/memorisation_pairs.json``, for the report.  All are private; the release half is not touched.

    Args:
        run: a finished run.
        data: the training images; None: what the run was trained on.  Other images are refused.
        held_out: real images of the same source that were not trained on, the control; None: no conclusion.
        images: how many images to generate.
        features: "pixels" and names of feature extractors.
        sampling: settings of the sampler, as for :meth:`Generator.settings`.
        seed: of the generated images and of subsets.
        device: where to compute.
        on_progress: called with a line about what is being done.

    Raises:
        ConfigError, DataError, RunError: see their messages; nothing was looked at or written.
    """
    from dpsyngen.evaluation.memorisation import checked_names, memorisation_check
    from dpsyngen.evaluation.neighbour_picture import neighbour_picture
    from dpsyngen.evaluation.pairs import FILE, neighbour_pairs
    from dpsyngen.generator.generator import ReleasedGenerator
    from dpsyngen.privacy.ledger import Ledger

    run = run if isinstance(run, Run) else Run(Path(run))
    run.require_complete()
    check_device(device)
    checked_names(features)
    if images < 1:
        raise ConfigError(f"the number of images is {images}, but must be at least 1.")
    config = run.config
    source = config.data.source if data is None else data
    if isinstance(source, str) and not source:
        raise ConfigError("the run was trained on arrays in memory: give the images as data.")
    generator = ReleasedGenerator(run.release, device)
    private = load_private(source, _like(config, generator))
    _require_training_images(run, private)
    control = None if held_out is None else load_private(held_out, _like(config, generator))
    if control is not None and control.class_names != generator.class_names:
        raise DataError(
            f"the held-out images have the classes {', '.join(control.class_names) or '(none)'}, but the generator has "
            f"{', '.join(generator.class_names) or '(none)'}.  Give images with the same class folders."
        )
    tell = on_progress or (lambda line: None)
    with run.lock():
        tell(f"generating {images:,} images")
        samples = generator.sample(images, **{"seed": seed, **(sampling or {})})
        labels = None
        if samples.labels is not None and private.labels is not None and control is not None:
            assert control.labels is not None
            labels = (samples.labels, private.labels, control.labels)
        Ledger(run.ledger_path).note_private_access(
            "memorisation check: generated images against training images; the figures stay in the private half",
            features=list(features),
            generated_images=images,
            held_out_images=0 if control is None else len(control),
        )
        result = memorisation_check(
            samples.images,
            private.array(),
            None if control is None else control.array(),
            features=features,
            labels=labels,
            class_names=generator.class_names,
            seed=seed,
            device=device,
            on_progress=on_progress,
        )
        sets = (samples.images, private.array(), None if control is None else control.array())
        picture = neighbour_picture(result, *sets, seed=seed)
        write_atomically(run.private / "memorisation.png", lambda p: picture.save(p, format="PNG"), 0o600)
        pairs = neighbour_pairs(result, *sets, seed=seed)
        write_text(run.private / FILE, json.dumps(pairs, ensure_ascii=False) + "\n", 0o600)
        figures = {**result.to_dict(), "sampling": samples.settings}
        write_text(run.private / "memorisation.json", json.dumps(figures, indent=1, ensure_ascii=False) + "\n", 0o600)
    return result


def _like(config: Config, generator: Any) -> Config:
    """The run's configuration with the form of its generated images."""
    channels = "grey" if generator.channels == 1 else "rgb"
    asked = {"resolution": generator.resolution, "channels": channels, "labels": bool(generator.class_names)}
    return config.model_copy(update={"data": config.data.model_copy(update=asked)})


def _require_training_images(run: Run, dataset: ImageDataset) -> None:
    """Refuse images that the run was not trained on: to those nothing can have been memorised."""
    import hmac

    from dpsyngen.privacy.randomness import Randomness

    try:
        pinned = str(json.loads(run.data_path.read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(
            f"{run.data_path} cannot be read, so nobody can tell which images the run was trained on.  Put it back "
            "from a backup."
        ) from None
    found = Randomness.load(run.randomness_path).tag(dataset.fingerprint())
    if not hmac.compare_digest(pinned, found):
        raise DataError(
            f"the images are not those that {run.path} was trained on, so whether they were memorised says nothing.  "
            "Give the same --data as for training."
        )
