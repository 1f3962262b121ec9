"""The command line: parses, calls the library, prints.  Nothing heavy is imported before it is needed."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dpsyngen.cli import options as cli_options
from dpsyngen.cli.checks import audit, doctor, evaluate, memorisation
from dpsyngen.cli.compare import compare
from dpsyngen.cli.options import AsJson, Quiet, RunArgument
from dpsyngen.cli.programs import app as programs_app
from dpsyngen.cli.release import budget_app, export, key, ledger, release, sample, verify
from dpsyngen.cli.stages import stages
from dpsyngen.cli.train import prior_app, train
from dpsyngen.console import Console, speak_any_language
from dpsyngen.errors import DpsyngenError, require, shown
from dpsyngen.files import expanded, require_possible
from dpsyngen.version import __version__

app = typer.Typer(
    name="dpsyngen",
    help="Train an image generator on private images with a differential-privacy guarantee.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(programs_app, name="programs")
app.add_typer(prior_app, name="prior")
app.add_typer(budget_app, name="budget")
for _command in (
    *(train, sample, stages, ledger, audit, release, verify),
    *(export, key, compare, evaluate, memorisation, doctor),
):
    app.command()(_command)


def _show_version(value: bool) -> None:
    if value:
        print(f"dpsyngen {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    cli_options.require_shared(context.invoked_subcommand or "")


# --------------------------------------------------------------------------------- report, plan, studio


@app.command()
def report(run: RunArgument, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Write the report: the full one into private/, the publishable one into release/."""
    from dpsyngen.report.html import write_report

    private, public = write_report(run)
    Console(quiet, as_json).result(
        {"private": private, "public": public},
        [f"full report, PRIVATE: {private}", f"publishable report:   {public}"],
    )


@app.command()
def plan(
    records: Annotated[int, typer.Option(help="number of private images")],
    epsilon: Annotated[float | None, typer.Option(help="ε to spend")] = None,
    noise: Annotated[float | None, typer.Option(help="noise multiplier, instead of --epsilon")] = None,
    batch: Annotated[int, typer.Option(help="expected batch")] = 512,
    steps: Annotated[int, typer.Option(help="DP-SGD steps")] = 300,
    delta: Annotated[float | None, typer.Option(help="δ; default: the largest power of ten below 1/records")] = None,
    group_size: Annotated[int, typer.Option(help="images of one person at most: ε is for all of them together")] = 1,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """What a budget buys, before spending it."""
    from dpsyngen.privacy.budget import neighbouring_plans, plan_lines

    options: dict[str, Any] = {"noise_multiplier": noise, "delta": delta, "group_size": group_size}
    delta, rows = neighbouring_plans(records, batch, steps, epsilon=epsilon, **options)
    Console(quiet, as_json).result(
        {"records": records, "group_size": group_size, "delta": delta, "plans": [asdict(r) for r in rows]},
        plan_lines(records, group_size, delta, rows),
    )


@app.command()
def studio(
    runs: Annotated[Path, typer.Option(help="folder of run directories")] = Path("runs"),
    folder: Annotated[
        list[Path] | None,
        typer.Option(help="folder in which images and other files may lie; again for more; default: this one"),
    ] = None,
    port: Annotated[int, typer.Option(help="0: one that is free")] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="open the link in the browser")] = True,
    host: Annotated[str, typer.Option(help="with --allow-remote: how browsers reach this machine")] = "127.0.0.1",
    allow_remote: Annotated[bool, typer.Option("--allow-remote", help="let other machines in, by TLS")] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="certificate (PEM), for --allow-remote")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="its private key (PEM)")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Open a page in the browser that leads from a folder of images to a signed bundle; see docs/studio.md."""
    for option, value in (("--tls-cert", tls_cert), ("--tls-key", tls_key)):
        require(allow_remote or value is None, option, value, "left out without --allow-remote")
    usable = expanded(runs).is_dir() or not expanded(runs).exists()
    require(usable, "--runs", runs, "a folder, or one that is to be made")
    require_possible(expanded(runs), "--runs")
    from dpsyngen.studio.serve import Address, serve

    address = Address(host, port, allow_remote, tls_cert, tls_key)
    serve(expanded(runs), [expanded(f) for f in folder or [Path()]], address, Console(quiet, as_json), browser)


# ------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Run the command line: errors that a user can mend are one message, without a traceback."""
    # With other work on the machine, threads that spin while they wait make each other many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    console = Console.asked_for(sys.argv[1:])
    speak_any_language(console.as_json or console.log_json)
    plainly = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        console.warn(str(message)) if category is UserWarning else plainly(message, category, *where, **more)

    warnings.showwarning = show
    try:
        sys.exit(_run(console))
    except DpsyngenError as error:
        cli_options.tell(console, error.kind, str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt as stop:
        cli_options.tell(console, "interrupted", str(stop) or "stopped")
        sys.exit(130)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f", at {error.filename}" if error.filename else ""
            told = "Nothing that was finished is lost: free some space, then continue (training: --resume)."
            cli_options.tell(console, "disk-full", f"the disk is full{where}.  {told}")
        elif error.errno == errno.EPIPE:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        else:
            cli_options.tell(console, "system", str(error))
        sys.exit(1)
    except Exception as error:
        if console.as_json:
            cli_options.tell(console, "internal", f"{type(error).__name__}: {error}")
        raise


def _run(console: Console) -> int:
    """Run the command; its exit code.  What typer says about wrong options is an error as all others."""
    cli_options.silence_followers()
    command = typer.main.get_command(app)
    try:
        with command.make_context("dpsyngen", sys.argv[1:]) as context:
            command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    except Exception as error:
        # Which class it is depends on the version of typer.
        if not hasattr(error, "format_message"):
            raise
        # What was given stands in the error that typer answered.
        problems: list[Any] = getattr(error.__cause__, "errors", list)()
        given = "".join(f"; given: {shown(p['input'])}" for p in problems)
        cli_options.tell(console, "usage", f"{error.format_message()}{given}")
        return int(getattr(error, "exit_code", 2))
    return 0
