"""The commands that look at a finished run: `dpsyngen evaluate`, `memorisation`, `doctor` and `audit`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from dpsyngen.cli.options import AsJson, AskedDevice, Count, Device, Guidance, Quiet, RunArgument, Sampler, SamplerSteps
from dpsyngen.console import Console
from dpsyngen.distributed import joined

if TYPE_CHECKING:
    from dpsyngen.evaluation.doctor import Diagnosis
    from dpsyngen.hardware import Compute, Machine


_FEATURES = (
    "comma-separated: pixels-pca, efficientnet-lite0, inception, or your own, path/to/module.py:name or "
    "package.module:name, which is run and sees private images"
)
_METRICS = "frechet,kid,precision,recall,density,coverage,sliced-wasserstein"


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def evaluate(
    run: RunArgument,
    data: Annotated[str | None, typer.Option(help="real training images; default: the run's")] = None,
    test: Annotated[str | None, typer.Option(help="real test images: for the accuracy score and the floors")] = None,
    labels: Annotated[str | None, typer.Option(metavar="FILE", help="table of the labels of --data or --test")] = None,
    label_column: Annotated[str | None, typer.Option(help="default: the run's; '' for a usual name")] = None,
    count: Count = 10_000,
    features: Annotated[str, typer.Option(help=_FEATURES)] = "efficientnet-lite0,pixels-pca",
    metrics: Annotated[str, typer.Option(help="comma-separated, '' for none; see docs/metrics.md")] = _METRICS,
    classifiers: Annotated[
        str, typer.Option(help="among logreg, mlp, cnn, resnet, wideresnet; '' for none")
    ] = "logreg,mlp,cnn",
    bootstrap: Annotated[int, typer.Option(help="replicates for the 95 % intervals; 0: no intervals")] = 200,
    max_images: Annotated[int, typer.Option(help="of each set, for the metrics; a random subset beyond that")] = 10_000,
    inception_weights: Annotated[Path | None, typer.Option(help="weights file for inception")] = None,
    cache: Annotated[bool, typer.Option(help="keep features of real images in the run's private half")] = True,
    sampler: Sampler = None,
    steps: SamplerSteps = None,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(help="seed of the images, the metrics and the classifiers")] = 0,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure a run against real images.  The figures are private: do not publish them."""
    from dpsyngen.evaluation import run as evaluation_run
    from dpsyngen.report.html import metric_rows

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


def memorisation(
    run: RunArgument,
    held_out: Annotated[str | None, typer.Option(help="images not trained on: the control, as digits:test")] = None,
    data: Annotated[str | None, typer.Option(help="the training images, if they have moved")] = None,
    count: Count = 1000,
    features: Annotated[str, typer.Option(help="pixels, pixels-pca, efficientnet-lite0, inception")] = "pixels",
    seed: Annotated[int, typer.Option(help="seed of the generated images and of subsets")] = 0,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Look for training images among generated ones.  The figures and the pictures are private: do not publish them."""
    from dpsyngen.evaluation.run import check_memorisation
    from dpsyngen.report.html import memorisation_rows

    console = Console(quiet, as_json)
    result = check_memorisation(
        run,
        data=data,
        held_out=held_out,
        images=count,
        features=_names(features),
        seed=seed,
        device=device,
        on_progress=console.note,
    )
    figures, path = result.to_dict(), run / "private" / "memorisation.json"
    lines = [f"{row.name:<52} {row.value:>16}   {row.note}" for row in memorisation_rows(figures)]
    lines += [result.conclusion, f"`dpsyngen report {quote(str(run))}` shows the images beside their neighbours."]
    kept = f"PRIVATE figures and pictures of private images, kept in {path.parent}: publishing them costs privacy"
    console.result(figures | {"path": path}, [*lines, kept])


def doctor(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="a run; without one, the machine")] = None,
    machine: Annotated[bool, typer.Option("--machine", help="look at the machine, too")] = False,
    device: AskedDevice = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with a run and what to change (exit code 5 if it is of no use), or what this machine has."""
    from dpsyngen.evaluation.doctor import Diagnosis, diagnose
    from dpsyngen.hardware import advice, choose, look
    from dpsyngen.training.run import Run

    chosen, here = choose(device), look()
    found = Diagnosis([], []) if run is None else diagnose(Run(run), chosen.device)
    helps = list(advice(here))
    lines = [] if run is None else list(_diagnosis_lines(found))
    Console(quiet, as_json).result(
        {
            "ok": found.ok,
            "state": dict(found.state),
            "findings": [f.to_dict() for f in found.findings],
            "machine": asdict(here),
            "compute": chosen.to_dict(),
            "advice": helps,
        },
        [*lines, *(_machine_lines(here, chosen, helps) if machine or run is None else ())],
    )
    if not found.ok:
        raise typer.Exit(5)


def _machine_lines(machine: Machine, compute: Compute, helps: list[str]) -> Iterator[str]:
    for what, text in machine.rows():
        yield f"{what + ':':<17} {text}"
    yield "chosen here"
    words = {True: "yes", False: "no"}
    for name, row in compute.to_dict().items():
        yield f"  {name.replace('_', ' ') + ':':<31} {words.get(row['value'], row['value']):<7} {row['why']}"
    for line in helps:
        yield f"advice: {line}"


def _diagnosis_lines(found: Diagnosis) -> Iterator[str]:
    for what, how in found.state:
        yield f"{what + ':':<17} {how}"
    if not found.findings:
        yield "nothing found"
    for finding in found.findings:
        yield f"{finding.severity.upper():<8} {finding.code}{' (PRIVATE)' if finding.basis == 'private' else ''}"
        for title, text in (("seen", finding.seen), ("why", finding.why), ("change", finding.change)):
            yield f"  {title + ':':<8} {text}."
    if any(f.basis == "private" for f in found.findings):
        yield (
            "PRIVATE findings rest on figures of private images: do not publish them.  A setting that is changed "
            "because of them is tuned on private images, which no ε covers: try it on public images first."
        )


def audit(
    run: RunArgument,
    quick: Annotated[bool, typer.Option("--quick", help="20 seconds instead of some two minutes")] = False,
    confidence: Annotated[float, typer.Option(help="that sound code passes, and of lower bounds")] = 0.999,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Attack the mechanism and check its invariants: lower bounds on ε beside the claim.

    No private image is read.  Exit code 4: an audit contradicts the claim.
    """
    from dpsyngen.audit.run import FULL, QUICK, audit_run
    from dpsyngen.training.run import Run

    console = Console(quiet, as_json)
    opened, effort = Run(run), QUICK if quick else FULL
    folder = opened.private / "audit"
    opened.require_complete()
    with opened.lock():
        report = audit_run(opened, effort=effort, confidence=confidence, device=device, on_progress=console.note)
    console.result(report.to_dict() | {"folder": folder}, [*report.lines(), f"PRIVATE: the details are in {folder}"])
    if not report.passed:
        raise typer.Exit(4)
