"""Networks that were trained on programs alone, shared by the runs of an experiment.

They depend on public settings and public seeds only, so the cleaning network of seed 0 is the same in Cleaning and in
Both, at every ε and every τ of the other stage.  Training it once saves most of an experiment's public steps and
changes no run by a bit.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpsyngen.config import Config
from dpsyngen.diffusion.stages import StageMap
from dpsyngen.experiments.experiment import claimed
from dpsyngen.experiments.grid import digest
from dpsyngen.files import write_atomically, write_text
from dpsyngen.training.pipeline import Training
from dpsyngen.training.plan import Shape
from dpsyngen.training.run import JsonLines
from dpsyngen.training.steps import PRETRAIN
from dpsyngen.version import __version__


@dataclass(frozen=True)
class PublicNetwork:
    """A network that a run trains on programs.

    Attributes:
        phase: name of the phase.
        network: name of the network.
        key: digest of everything that decides its weights.
    """

    phase: str
    network: str
    key: str


def networks_of(config: Config, stages: StageMap, shape: Shape) -> tuple[PublicNetwork, ...]:
    """The public networks that a run needs, in the order of its phases; none where one network serves all stages."""
    found = [(PRETRAIN, PRETRAIN, -math.inf, math.inf)] if stages.pretrain else []
    found += [(s.name, s.network, s.low, s.high) for s in stages.public if s.network != stages.private.network]
    program = config.program.model_dump(mode="json", exclude={"prior_tier"})
    out = []
    for phase, network, low, high in found:
        facts = {
            "version": __version__,
            "phase": phase,
            "stage": [str(low), str(high)],
            "network": config.network.model_dump(mode="json"),
            "program": program,
            "public": config.public.model_dump(mode="json", exclude={"checkpoint_every"}),
            "shape": [shape.resolution, shape.channels, shape.num_classes if phase == PRETRAIN else 0],
        }
        out.append(PublicNetwork(phase, network, digest(facts)))
    return tuple(out)


@contextmanager
def shared(training: Training, folder: Path, waiting: Callable[[PublicNetwork], None]) -> Iterator[SharedNetworks]:
    """Give a run the public networks that are there, and hold the places of those that it has to train.

    A place is held until its network is there for the others, not until the run ends.

    Args:
        training: the run.
        folder: where the networks of the experiment are.
        waiting: called twice a second while another process trains a network that the run needs; may raise.
    """
    with ExitStack() as stack:
        wanted = networks_of(training.config, training.plan.stages, training.plan.shape)
        held: dict[str, ExitStack] = {}
        # In one order, so that two processes never wait for each other.
        for one in sorted(wanted, key=lambda n: n.key):
            place = folder / one.key
            while not (place / "about.json").exists():
                place.mkdir(mode=0o700, exist_ok=True)
                mine = stack.enter_context(ExitStack())
                if mine.enter_context(claimed(place / "lock")):
                    held[one.key] = mine
                    break
                waiting(one)
                time.sleep(0.5)
        yield SharedNetworks(training, folder, wanted, held)


class SharedNetworks:
    """The public networks of one run, between it and the experiment; see :func:`shared`."""

    def __init__(
        self, training: Training, folder: Path, wanted: tuple[PublicNetwork, ...], held: dict[str, ExitStack]
    ) -> None:
        self.training, self.folder, self.wanted, self._held = training, folder, wanted, held

    def take(self) -> float:
        """Copy what is there into the run; returns the seconds that it took to train."""
        seconds = 0.0
        run = self.training.run
        for one in self.wanted:
            place = self.folder / one.key
            if not (place / "about.json").exists():
                continue
            about: dict[str, Any] = json.loads((place / "about.json").read_text(encoding="utf-8"))
            seconds += float(about["seconds"])
            if run.weights(one.network).exists():
                continue
            log = JsonLines(run.release / "public_training.jsonl", 0o644)
            log.cut(one.phase, 0)
            for line in about["log"]:
                log.append(**line)
            data = (place / "weights.safetensors").read_bytes()
            write_atomically(run.weights(one.network), lambda p, data=data: p.write_bytes(data))  # type: ignore[misc]
        return seconds

    def give(self, seconds: dict[str, float]) -> None:
        """Keep what the run has trained, for the other runs; `seconds` by phase."""
        run = self.training.run
        for one in self.wanted:
            place = self.folder / one.key
            if (place / "about.json").exists() or not run.weights(one.network).exists():
                continue
            data = run.weights(one.network).read_bytes()
            write_atomically(place / "weights.safetensors", lambda p, data=data: p.write_bytes(data))  # type: ignore[misc]
            lines = JsonLines(run.release / "public_training.jsonl", 0o644).read()
            about = {
                "phase": one.phase,
                "seconds": seconds.get(one.phase, 0.0),
                "log": [line for line in lines if line["phase"] == one.phase],
            }
            write_text(place / "about.json", json.dumps(about) + "\n", 0o600)
            if one.key in self._held:
                self._held.pop(one.key).close()
