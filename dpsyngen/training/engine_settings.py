"""What the engine found out about this machine, kept with the run so that a resumed run computes the same way."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from dpsyngen.config import Config
from dpsyngen.errors import RunError
from dpsyngen.files import write_text
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.training.run import Run


@dataclass
class EngineSettings:
    """Choices that change the speed and the rounding of a run, and nothing else.

    Attributes:
        path: where they are kept.
        physical_batch: images in memory at a time; 0 while not yet known.
        kernels: what each convolution uses.
    """

    path: Path
    physical_batch: int
    kernels: KernelChoices
    _saved: str = field(default="", repr=False)

    @classmethod
    def of(cls, run: Run, config: Config) -> EngineSettings:
        """Those of an earlier session of the run, or new ones.

        With an insecure seed, for reproducible runs, kernels follow from the shapes instead of measurements.
        """
        asked = config.private.physical_batch
        kernels: dict[str, str] = {}
        found = 0
        if run.engine_path.exists():
            try:
                stored = json.loads(run.engine_path.read_text(encoding="utf-8"))
                kernels = {str(k): str(v) for k, v in stored["kernels"].items()}
                found = int(stored["physical_batch"])
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise RunError(
                    f"{run.engine_path} cannot be read: {error}.  It only holds what was measured on this machine: "
                    "remove it to have that measured again."
                ) from None
        choices = KernelChoices(measure=config.privacy.insecure_seed is None, chosen=kernels)
        return cls(run.engine_path, found if asked is None else asked, choices)

    def save(self) -> None:
        """Write them down, if there is anything new."""
        text = json.dumps(
            {
                "physical_batch": self.physical_batch,
                "kernels": self.kernels.chosen,
                "milliseconds": self.kernels.milliseconds,
            },
            indent=1,
        )
        if text != self._saved:
            write_text(self.path, text + "\n", 0o600)
            self._saved = text
