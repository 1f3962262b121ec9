"""The command `dpsyngen evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpsyngen.cli.options import AsJson, Device, Quiet, RunArgument

_FEATURES = (
    "comma-separated: pixels-pca, efficientnet-lite0, inception, or your own, path/to/module.py:name or "
    "package.module:name, which is run and sees private images"
)
METRICS = ("frechet", "kid", "precision", "recall", "density", "coverage", "sliced-wasserstein")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def evaluate(
    run: RunArgument,
    data: Annotated[str | None, typer.Option(help="real training images; default: the run's")] = None,
    test: Annotated[str | None, typer.Option(help="real test images: for the accuracy score and the floors")] = None,
    labels: Annotated[str | None, typer.Option(metavar="FILE", help="table of the labels of --data or --test")] = None,
    label_column: Annotated[str | None, typer.Option(help="default: the run's; '' for a usual name")] = None,
    count: Annotated[int, typer.Option("-n", "--count", help="number of generated images")] = 10_000,
    features: Annotated[str, typer.Option(help=_FEATURES)] = "efficientnet-lite0,pixels-pca",
    metrics: Annotated[str, typer.Option(help="comma-separated, '' for none; see docs/metrics.md")] = ",".join(METRICS),
    classifiers: Annotated[str, typer.Option(help="among logreg, mlp, cnn, resnet; '' for none")] = "logreg,mlp,cnn",
    bootstrap: Annotated[int, typer.Option(help="replicates for the 95 % intervals; 0: no intervals")] = 200,
    max_images: Annotated[int, typer.Option(help="of each set, for the metrics; a random subset beyond that")] = 10_000,
    inception_weights: Annotated[Path | None, typer.Option(help="weights file for inception")] = None,
    cache: Annotated[bool, typer.Option(help="keep features of real images in the run's private half")] = True,
    sampler: Annotated[str | None, typer.Option(help="ddim, heun or dpmpp; default: the run's")] = None,
    steps: Annotated[int | None, typer.Option(help="sampler steps")] = None,
    guidance: Annotated[float | None, typer.Option(help="classifier-free guidance, 1 is none")] = None,
    seed: Annotated[int, typer.Option(help="seed of the images, the metrics and the classifiers")] = 0,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure a run against real images.  The figures are private: do not publish them."""
    from dpsyngen.console import Console
    from dpsyngen.distributed import joined
    from dpsyngen.evaluation import run as evaluation_run
    from dpsyngen.report.tables import metric_rows

    console = Console(quiet, as_json)
    sampling = {"sampler": sampler, "steps": steps, "guidance": guidance}
    with joined() as ranks:
        if not ranks.main:
            evaluation_run.follow_evaluation(ranks)
            return
        with ranks.leading():
            result = evaluation_run.evaluate(
                run,
                data=data,
                test=test,
                images=count,
                features=_names(features),
                metrics=_names(metrics),
                classifiers=_names(classifiers),
                bootstrap=bootstrap,
                max_images=max_images,
                inception_weights=inception_weights,
                cache=cache,
                sampling={k: v for k, v in sampling.items() if v is not None},
                **{k: v for k, v in (("labels", labels), ("label_column", label_column)) if v is not None},
                seed=seed,
                device=device,
                ranks=ranks,
                on_progress=console.note,
            )
    path, lines = run / "private" / "metrics.json", []
    for row in metric_rows(result):
        known = (("95 %", row.interval), ("floor", row.floor), ("ceiling", row.ceiling))
        bounds = [f"{what} {text}" for what, text in known if text]
        lines.append(f"{row.name:<48} {row.value:>10}   {'; '.join([*bounds, row.note])}")
    lines.append(f"PRIVATE figures, kept in {path}: publishing them costs privacy")
    console.result({"path": path, "result": result}, lines)
