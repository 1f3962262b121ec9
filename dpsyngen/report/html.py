"""Writing the report: everything from files of the run, nothing computed from private images here."""

from __future__ import annotations

import os
from pathlib import Path

from dpsyngen.files import write_text
from dpsyngen.report.private_values import private_values
from dpsyngen.report.release_values import release_values
from dpsyngen.report.rendering import render
from dpsyngen.training.run import Run
from dpsyngen.version import __version__


def write_reports(run: Run) -> tuple[Path, Path]:
    """Write ``private/report.html`` and ``release/report.html`` of a finished run.

    The publishable copy is made from files of the release half alone, and is written before any other is opened.

    Returns:
        paths of the private and of the publishable report.

    Raises:
        RunError: a file of the run is damaged.
    """
    values = {"version": __version__, **release_values(run.release)}
    private_path, public_path = run.private / "report.html", run.release / "report.html"
    write_text(public_path, render("report.html.j2", values | {"private_half": None}))
    private_half = private_values(run, values["statement"]["public_assumptions"]["class_names"])
    write_text(private_path, render("report.html.j2", values | {"private_half": private_half}), 0o600)
    return private_path, public_path


def write_report(run: Run | str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write the report of a finished run, twice: the full one into ``private/``, the publishable into ``release/``.

    Returns:
        paths of the private and of the public report.
    """
    run = run if isinstance(run, Run) else Run(Path(run))
    run.require_complete()
    with run.lock():
        run.finished_ledger()
        return write_reports(run)
