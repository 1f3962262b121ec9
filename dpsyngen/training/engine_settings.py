"""What the engine found out about this machine, kept with the run so that a resumed run computes the same way."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpsyngen.config import Config
from dpsyngen.errors import ConfigError, RunError
from dpsyngen.files import write_text
from dpsyngen.hardware import Compute
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.training.run import Run


@dataclass
class EngineSettings:
    """Choices that change the speed and the rounding of a run, and nothing else.

    Attributes:
        path: where they are kept.
        physical_batch: images in memory at a time; 0 while not yet known.
        kernels: what each convolution uses.
        compute: how DP-SGD steps compute; None: as PyTorch is set.
    """

    path: Path
    physical_batch: int
    kernels: KernelChoices
    compute: Compute | None = None
    _saved: str = field(default="", repr=False)

    @classmethod
    def of(cls, run: Run, config: Config, compute: Compute | None = None) -> EngineSettings:
        """Those of an earlier session of the run, or new ones.

        With an insecure seed, for reproducible runs, kernels follow from the shapes instead of measurements.

        Args:
            run: the run directory.
            config: its configuration.
            compute: what was chosen for this session.  The kind of device, the precision and the memory format of
                DP-SGD steps are those of the run's first session.

        Raises:
            RunError: this session cannot compute as the first one did, or the file is damaged.
        """
        asked = config.private.physical_batch
        kernels: dict[str, str] = {}
        found = 0
        pins: dict[str, Any] | None = None
        if run.engine_path.exists():
            try:
                stored = json.loads(run.engine_path.read_text(encoding="utf-8"))
                kernels = {str(k): str(v) for k, v in stored["kernels"].items()}
                found = int(stored["physical_batch"])
                pins = stored.get("compute")  # earlier versions did not choose
                if pins is not None and not isinstance(pins, dict):
                    raise TypeError("compute is no mapping")
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise RunError(
                    f"{run.engine_path} cannot be read: {error}.  It holds how this machine computes: put it back from "
                    "a backup or, on the machine that the run was begun on, remove it to have that measured again."
                ) from None
        choices = KernelChoices(measure=config.privacy.insecure_seed is None, chosen=kernels)
        dp = None if compute is None else _as_begun(run, config, compute.for_dp_steps(), pins)
        return cls(run.engine_path, found if asked is None else asked, choices, dp)

    def save(self) -> None:
        """Write them down, if there is anything new."""
        text = json.dumps(
            {
                "physical_batch": self.physical_batch,
                "kernels": self.kernels.chosen,
                "milliseconds": self.kernels.milliseconds,
                **({} if self.compute is None else {"compute": self.compute.pins()}),
            },
            indent=1,
        )
        if text != self._saved:
            write_text(self.path, text + "\n", 0o600)
            self._saved = text


def computed_with(run: Run) -> dict[str, Any] | None:
    """Device, precision and memory format of a run's DP-SGD steps; None if that is not known (yet)."""
    try:
        pins = json.loads(run.engine_path.read_text(encoding="utf-8"))["compute"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return pins if isinstance(pins, dict) else None


def _as_begun(run: Run, config: Config, compute: Compute, pins: dict[str, Any] | None) -> Compute:
    if pins is None:
        return compute
    why = "Steps since the last checkpoint are taken again with the same noise, so their sums must round the same way"
    asked = config.compute.precision
    if asked not in ("auto", pins.get("precision")):
        raise RunError(
            f"compute.precision is {asked}, but {run.path} was begun in {pins.get('precision')}.  {why}.  Undo the "
            "change, or start a new run."
        )
    try:
        return compute.pinned(pins)
    except ConfigError as error:
        raise RunError(f"{run.path} cannot be continued like this: {error}.  {why}.") from None
