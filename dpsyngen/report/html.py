"""Writing the run report: everything comes from files of the run, and no private image is read here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dpsyngen.files import write_text
from dpsyngen.privacy.certificate import template
from dpsyngen.report.sections import private_values, release_values
from dpsyngen.training.run import Run
from dpsyngen.version import __version__


def render(name: str, values: dict[str, Any]) -> str:
    """The page that `name`, a file of ``dpsyngen/report/templates``, makes of `values`; see :func:`template`."""
    return template(Path(__file__).parent / "templates" / name).render(version=__version__, **values)


def write_report(run: Run | str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write the report of a finished run, twice: the full one into ``private/``, the publishable into ``release/``.

    The publishable copy is made from files of the release half alone, and is written before any other is opened.

    Returns:
        paths of the private and of the publishable report.

    Raises:
        RunError, LedgerError: the run is not finished, or a file of it is damaged.
    """
    run = run if isinstance(run, Run) else Run(Path(run))
    run.require_complete()
    with run.lock():
        run.finished_ledger()
        values = release_values(run.release)
        private_path, public_path = run.private / "report.html", run.release / "report.html"
        write_text(public_path, render("report.html.j2", values | {"private_half": None}))
        private_half = private_values(run, values["statement"]["public_assumptions"]["class_names"])
        write_text(private_path, render("report.html.j2", values | {"private_half": private_half}), 0o600)
    return private_path, public_path
