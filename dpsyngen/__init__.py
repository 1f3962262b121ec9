"""Train an image generator on private images with a differential-privacy guarantee.

>>> import dpsyngen
>>> run = dpsyngen.train("photos/", epsilon=3, out="runs/a")              # doctest: +SKIP
>>> images = dpsyngen.Generator(run.release).sample(100).images           # doctest: +SKIP
>>> dpsyngen.evaluate(run, data="photos/", test="photos-test/")           # doctest: +SKIP
>>> dpsyngen.write_report(run)                                               # doctest: +SKIP
>>> dpsyngen.pack(run, Path("bundle.zip"))                                   # doctest: +SKIP

Names are loaded when they are first used, so ``import dpsyngen`` is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dpsyngen.version import __version__

if TYPE_CHECKING:
    from dpsyngen.api import evaluate, train, write_report
    from dpsyngen.checks import check_memorisation
    from dpsyngen.config import Config, load_config
    from dpsyngen.data import ImageDataset, load_images
    from dpsyngen.doctor import diagnose
    from dpsyngen.generator import Generator
    from dpsyngen.programs import make_program
    from dpsyngen.report.bundle import pack
    from dpsyngen.report.verify import verify
    from dpsyngen.samples import write_samples
    from dpsyngen.training.run import Run

__all__ = [
    "Config",
    "Generator",
    "ImageDataset",
    "Run",
    "__version__",
    "check_memorisation",
    "diagnose",
    "evaluate",
    "load_config",
    "load_images",
    "make_program",
    "pack",
    "train",
    "verify",
    "write_report",
    "write_samples",
]

_HOME = {
    "Config": "dpsyngen.config",
    "Generator": "dpsyngen.generator",
    "ImageDataset": "dpsyngen.data",
    "Run": "dpsyngen.training.run",
    "check_memorisation": "dpsyngen.checks",
    "diagnose": "dpsyngen.doctor",
    "evaluate": "dpsyngen.api",
    "load_config": "dpsyngen.config",
    "load_images": "dpsyngen.data",
    "make_program": "dpsyngen.programs",
    "pack": "dpsyngen.report.bundle",
    "train": "dpsyngen.api",
    "verify": "dpsyngen.report.verify",
    "write_report": "dpsyngen.api",
    "write_samples": "dpsyngen.samples",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'dpsyngen' has no attribute {name!r}")
