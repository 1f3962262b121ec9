"""Beginning and ending small runs, for the tests of whole runs."""

from __future__ import annotations

from pathlib import Path

from dpsyngen.config import load_config
from dpsyngen.data import load_images
from dpsyngen.training.pipeline import Training
from dpsyngen.training.start import start


def merged(settings: dict, **sections: dict) -> dict:
    out = {k: dict(v) for k, v in settings.items()}
    for name, values in sections.items():
        out[name] = {**out.get(name, {}), **values}
    return out


def begin(settings: dict, data, out: Path, **sections: dict) -> Training:
    config = load_config(merged(settings, **{"privacy": {"epsilon": 8, "insecure_seed": 7}, **sections}))
    return start(config, load_images(data), out)


def finish(training: Training) -> Training:
    for _ in training.steps():
        pass
    return training


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
