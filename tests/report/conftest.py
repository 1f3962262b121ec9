"""Small finished runs, with real entropy, that the tests of bundles and of reports share."""

from __future__ import annotations

import pytest

import dpsyngen
from dpsyngen.training.run import Run
from tests.conftest import TINY_SETTINGS, tiny_arrays


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """With all that a report can show, and class names that are long and look like markup; do not change it."""
    from PIL import Image

    from dpsyngen.evaluation.run import check_memorisation

    root = tmp_path_factory.mktemp("reported")
    names = ["a", "b & <i>", "pneumoultramicroscopicsilicovolcanoconiosis" * 3]
    for part, seed in (("train", 0), ("test", 1)):
        for i, (pixels, label) in enumerate(zip(*tiny_arrays(seed), strict=True)):
            (root / part / names[label]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / part / names[label] / f"{i}.png")
    settings = TINY_SETTINGS | {"stages": {"variant": "both"}}
    run = dpsyngen.train(root / "train", epsilon=4.0, out=root / "run", settings=settings)
    dpsyngen.evaluate(run, test=root / "test", images=60, features=("pixels-pca",), classifiers=("logreg",))
    check_memorisation(run, held_out=root / "test", images=12)
    dpsyngen.write_report(run)
    return run
