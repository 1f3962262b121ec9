"""Beginning and ending small runs, for the tests of whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpsyngen import fit as api
from dpsyngen.config import Config, load_config
from dpsyngen.data import ImageDataset, load_images
from dpsyngen.training.log import OnEvent, ignore
from dpsyngen.training.pipeline import Training
from dpsyngen.training.run import Run


def merged(settings: dict, **sections: dict) -> dict:
    out = {k: dict(v) for k, v in settings.items()}
    for name, values in sections.items():
        out[name] = {**out.get(name, {}), **values}
    return out


def begin(settings: dict, data, out: Path, on_event: OnEvent = ignore, **sections: dict) -> Training:
    config = load_config(merged(settings, **{"privacy": {"epsilon": 8, "insecure_seed": 7}, **sections}))
    return start(config, load_images(data), out, on_event=on_event)


def start(config: Config, dataset: ImageDataset, out: Path, **options: Any) -> Training:
    return api.prepare(config, out, dataset, **options)


def resume(run: Run, dataset: ImageDataset) -> Training:
    return api.prepare_resume(run.path, dataset)


def finish(training: Training) -> Training:
    for _ in training.steps():
        pass
    return training


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
