"""What the processes of tests/training/test_distributed.py do, in the folder that is given."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpsyngen.config import load_config
from dpsyngen.data import ImageDataset, load_images
from dpsyngen.distributed import Ranks, joined
from dpsyngen.release.write import write_release
from dpsyngen.training import private as private_module
from dpsyngen.training.follower import follow, read_together
from dpsyngen.training.pipeline import Hooks, Training
from dpsyngen.training.private import StepRecord
from tests.conftest import TINY_SETTINGS, tiny_arrays
from tests.training.short_runs import merged

RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "experts": {},
    "shared": {"stages": {"variant": "coarse", "networks": "shared"}},
    "residual": {"stages": {"variant": "residual", "tau_coarse": 0.0}, "network": {"prior": "shipped"}},
    "pretrained": {"stages": {"variant": "finetune"}, "public": {"distinct": 10}},
    # Whole numbers: sums do not depend on their order.
    "exact": {"stages": {"variant": "dpdm"}, "private": {"noise": "discrete"}},
    "moments": {"stages": {"variant": "gaussian"}},
    "without privacy": {"stages": {"variant": "dpdm"}, "privacy": {"epsilon": float("inf")}},
    # A third of the steps has no record at all, and where there is one, most processes have none.
    "sparse": {"stages": {"variant": "dpdm"}, "private": {"batch": 1, "steps": 12}},
}


def images() -> ImageDataset:
    return load_images(tiny_arrays())


def train(name: str, out: Path, ranks: Ranks) -> None:
    settings = merged(TINY_SETTINGS, privacy={"epsilon": 8, "insecure_seed": 7})
    config = load_config(merged(settings, **RUNS[name]))
    if not ranks.main:
        follow(ranks, lambda config: images(), "cpu")
        return
    with ranks.leading():
        dataset = read_together(ranks, config, lambda config: images())
        noise: list[np.ndarray] = []
        hooks = Hooks(finish=write_release, observer=lambda r, engine: noise.append(noise_of(r, config.private.batch)))
        training = Training.start(config, dataset, out / name, ranks=ranks, hooks=hooks)
        mechanism = training.plan.mechanism
        for _ in training.steps():
            pass
        std = mechanism.noise_multiplier * mechanism.clipping_norm
        np.savez(out / name / "noise.npz", noise=np.array(noise), std=std)


def noise_of(record: StepRecord, expected_batch: float) -> np.ndarray:
    """What was added to the sum of the clipped gradients."""
    pairs = zip(record.released, record.sums, strict=True)
    return torch.cat([(r.double() * expected_batch - c.double()).flatten() for r, c in pairs]).numpy()


def watched(seen: list[dict[str, Any]]) -> None:
    """Write down the records of each step, and those whose images this process reads."""
    draw, block = private_module.poisson_sample, private_module.PrivateStep._noisy

    def poisson_sample(randomness: Any, step: int, records: int, rate: float) -> np.ndarray:
        chosen = draw(randomness, step, records, rate)
        seen.append({"step": step, "chosen": chosen.tolist(), "mine": []})
        return chosen

    def noisy(self: Any, chosen: np.ndarray, part: slice, *rest: Any) -> Any:
        seen[-1]["mine"] += chosen[part].tolist()
        return block(self, chosen, part, *rest)

    private_module.poisson_sample = poisson_sample  # type: ignore[assignment]
    private_module.PrivateStep._noisy = noisy  # type: ignore[method-assign]


def main() -> None:
    out = Path(sys.argv[1])
    with joined() as ranks:
        steps: dict[str, list[dict[str, Any]]] = {}
        seen: list[dict[str, Any]] = []
        watched(seen)
        for name in RUNS:
            train(name, out, ranks)
            steps[name] = list(seen)
            seen.clear()
        (out / f"rank-{ranks.rank}.json").write_text(json.dumps(steps))


if __name__ == "__main__":
    main()
