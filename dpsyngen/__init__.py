"""Train an image generator on private images with a differential-privacy guarantee.

>>> import dpsyngen
>>> generator = dpsyngen.Generator.fit("photos/", epsilon=3)              # doctest: +SKIP
>>> generator.privacy                                                     # doctest: +SKIP
>>> generator.sample(100, labels="cat").save("cats/")                     # doctest: +SKIP
>>> generator.save("bundle.zip")                                          # doctest: +SKIP

The same in the parts that a script wants:

>>> run = dpsyngen.train("photos/", epsilon=3, out="runs/a")              # doctest: +SKIP
>>> dpsyngen.evaluate(run, data="photos/", test="photos-test/")           # doctest: +SKIP
>>> dpsyngen.write_report(run)                                            # doctest: +SKIP
>>> dpsyngen.pack(run, Path("bundle.zip"))                                # doctest: +SKIP
>>> dpsyngen.Generator.load("bundle.zip")                                 # doctest: +SKIP

Names are loaded when they are first used, so ``import dpsyngen`` is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dpsyngen.version import __version__

if TYPE_CHECKING:
    from dpsyngen.config import Config, load_config
    from dpsyngen.data import ImageDataset, load_images
    from dpsyngen.evaluation.doctor import diagnose
    from dpsyngen.evaluation.run import check_memorisation, evaluate
    from dpsyngen.fit import Generator, train
    from dpsyngen.generator.guarantee import Guarantee
    from dpsyngen.generator.samples import Samples, write_samples
    from dpsyngen.programs import make_program
    from dpsyngen.release.bundle import pack
    from dpsyngen.release.verify import verify
    from dpsyngen.report.html import write_report
    from dpsyngen.training.run import Run

__all__ = [
    "Config",
    "Generator",
    "Guarantee",
    "ImageDataset",
    "Run",
    "Samples",
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
    "Generator": "dpsyngen.fit",
    "Guarantee": "dpsyngen.generator.guarantee",
    "ImageDataset": "dpsyngen.data",
    "Run": "dpsyngen.training.run",
    "Samples": "dpsyngen.generator.samples",
    "check_memorisation": "dpsyngen.evaluation.run",
    "diagnose": "dpsyngen.evaluation.doctor",
    "evaluate": "dpsyngen.evaluation.run",
    "load_config": "dpsyngen.config",
    "load_images": "dpsyngen.data",
    "make_program": "dpsyngen.programs",
    "pack": "dpsyngen.release.bundle",
    "train": "dpsyngen.fit",
    "verify": "dpsyngen.release.verify",
    "write_report": "dpsyngen.report.html",
    "write_samples": "dpsyngen.generator.samples",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'dpsyngen' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What a notebook completes: the names above, loaded or not."""
    return sorted({*globals(), *__all__})
