"""``dpsyngen audit``: does a run do what it claims?"""

from __future__ import annotations

from typing import Annotated

import typer

from dpsyngen.cli.options import AsJson, Device, Quiet, RunArgument

CONTRADICTED = 4
"""Exit code where an audit contradicts the claim."""


def audit(
    run: RunArgument,
    quick: Annotated[bool, typer.Option("--quick", help="20 seconds instead of some two minutes")] = False,
    confidence: Annotated[
        float, typer.Option(help="with which a correct installation passes, and lower bounds on ε hold")
    ] = 0.999,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Attack the mechanism and check its invariants: lower bounds on ε beside the claim.

    No private image is read.  Exit code 4: an audit contradicts the claim.
    """
    from dpsyngen.console import Console

    console = Console(quiet, as_json)
    from dpsyngen.audit.report import write_audit_plot
    from dpsyngen.audit.run import FULL, QUICK, audit_run
    from dpsyngen.hardware import check_device
    from dpsyngen.training.run import Run

    check_device(device)
    opened, effort = Run(run), QUICK if quick else FULL
    folder = opened.private / "audit"
    opened.require_complete()
    with opened.lock():
        report = audit_run(opened, effort=effort, confidence=confidence, device=device, on_progress=console.note)
        if report.bounds():
            write_audit_plot(report, folder / "audit.svg")
    console.result(report.to_dict() | {"folder": folder}, [*report.lines(), f"PRIVATE: the details are in {folder}"])
    if not report.passed:
        raise typer.Exit(CONTRADICTED)
