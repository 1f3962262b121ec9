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

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dpsyngen.version import __version__

if TYPE_CHECKING:
    from dpsyngen.config import Config as Config
    from dpsyngen.config import load_config as load_config
    from dpsyngen.data import ImageDataset as ImageDataset
    from dpsyngen.data import load_images as load_images
    from dpsyngen.evaluation.doctor import diagnose as diagnose
    from dpsyngen.evaluation.run import check_memorisation as check_memorisation
    from dpsyngen.evaluation.run import evaluate as evaluate
    from dpsyngen.fit import Generator as Generator
    from dpsyngen.fit import train as train
    from dpsyngen.generator.guarantee import Guarantee as Guarantee
    from dpsyngen.generator.samples import Samples as Samples
    from dpsyngen.generator.samples import write_samples as write_samples
    from dpsyngen.programs import make_program as make_program
    from dpsyngen.release.bundle import pack as pack
    from dpsyngen.release.verify import verify as verify
    from dpsyngen.report.html import write_report as write_report
    from dpsyngen.training.run import Run as Run

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
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'dpsyngen' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What a notebook completes: the names above, loaded or not."""
    return sorted({*globals(), *__all__})
