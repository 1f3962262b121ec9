"""The commands `dpsyngen memorisation` and `dpsyngen doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dpsyngen.console import Console
    from dpsyngen.evaluation.memorisation import Memorisation
    from dpsyngen.training.health import Finding

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, made by `dpsyngen train --out`")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="only results and errors")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]

PROBLEMS = 5
"""Exit code of `dpsyngen doctor` if there is a problem of severity error."""


def memorisation(
    run: RunArgument,
    held_out: Annotated[
        str | None, typer.Option(help="real images that were not trained on: the control, such as digits:test")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="the training images, if they have moved; default: the run's")
    ] = None,
    count: Annotated[int, typer.Option("-n", "--count", help="number of generated images")] = 1000,
    features: Annotated[
        str, typer.Option(help="comma-separated: pixels, pixels-pca, efficientnet-lite0, inception")
    ] = "pixels",
    seed: Annotated[int, typer.Option(help="seed of the generated images and of subsets")] = 0,
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Look for training images among generated ones.  The figures and the picture are private: do not publish them."""
    from dpsyngen.checks import check_memorisation
    from dpsyngen.console import Console

    console = Console(quiet)
    result = check_memorisation(
        run,
        data=data,
        held_out=held_out,
        images=count,
        features=[name.strip() for name in features.split(",") if name.strip()],
        seed=seed,
        device=device,
        on_progress=console.note,
    )
    _say(console, result)
    private = run / "private"
    console.line(
        f"PRIVATE figures and pictures of private images, kept in {private / 'memorisation.json'} and "
        f"{private / 'memorisation.png'}: publishing them costs privacy"
    )


def _say(console: Console, result: Memorisation) -> None:
    from dpsyngen.report.tables import memorisation_rows

    for name, value, note in memorisation_rows(result.to_dict()):
        console.line(f"{name:<52} {value:>16}   {note}")
    console.line(result.conclusion)


def doctor(run: RunArgument, device: Device = "cpu", quiet: Quiet = False) -> None:
    """Say what is the matter with a run and what to change; exit code 5 if it is no use as it is."""
    from dpsyngen.console import Console
    from dpsyngen.doctor import diagnose
    from dpsyngen.training.run import Run

    console = Console(quiet)
    found = diagnose(Run(run), device)
    for what, how in found.state:
        console.line(f"{what + ':':<17} {how}")
    if not found.findings:
        console.line("nothing found")
    for finding in found.findings:
        _explain(console, finding)
    if any(f.basis == "private" for f in found.findings):
        console.line(
            "PRIVATE findings rest on figures of private images: do not publish them.  A setting that is changed "
            "because of them is tuned on private images, which no ε covers: try it on public images first."
        )
    if not found.ok:
        raise typer.Exit(PROBLEMS)


def _explain(console: Console, finding: Finding) -> None:
    console.line(f"{finding.severity.upper():<8} {finding.code}{' (PRIVATE)' if finding.basis == 'private' else ''}")
    for title, text in (("seen", finding.seen), ("why", finding.why), ("change", finding.change)):
        console.line(f"  {title + ':':<8} {text}.")


def health_lines(findings: list[Finding]) -> list[str]:
    """One line for each finding that is more than a note, for the end of `dpsyngen train`."""
    return [
        f"{f.severity.upper()}{' (PRIVATE)' if f.basis == 'private' else ''}: {f.code}: {f.seen}"
        for f in findings
        if f.severity != "note"
    ]
