"""The command line as data: for the reference page, and for the test of the commands that the pages show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from dpsyngen.cli.app import app

Words = tuple[str, ...]


def commands() -> dict[Words, Any]:
    """Each command by its words after ``dpsyngen``, in the order of the help; the groups themselves are left out."""
    return dict(_below(typer.main.get_command(app), ()))


def _below(command: Any, words: Words) -> Iterator[tuple[Words, Any]]:
    if not hasattr(command, "commands"):
        yield words, command
        return
    for name, one in command.commands.items():
        yield from _below(one, (*words, name))


def is_option(parameter: Any) -> bool:
    """Whether a parameter of a command is an option; otherwise it is an argument."""
    return parameter.param_type_name == "option"


def reference_page() -> str:
    """The page ``reference/cli.md``: usage, arguments and options of every command, as ``--help`` has them."""
    parts = [
        "# Command line",
        "Made from the program itself; `dpsyngen COMMAND --help` says the same. `--quiet` leaves results and errors, "
        "`--json` prints one JSON object ([logs and output](../logging.md)).",
        "Exit codes: 0 done; 2 refused, with one message that says what to do; 3 the budget or the ledger does not "
        "allow it; 4 an audit contradicts the claim, or jobs of `compare` could not be done; 5 `doctor` found an "
        "error; 6 a release or a bundle is not what it says; 1 the system failed, as with a full disk; 130 stopped.",
    ]
    for words, command in commands().items():
        parts.append(f"## {' '.join(words)}")
        parts.append(_text(command.help or ""))
        arguments = [p for p in command.params if not is_option(p)]
        usage = ["dpsyngen", *words, *(_metavar(p) for p in arguments), "[OPTIONS]"]
        parts.append(f"```\n{' '.join(usage)}\n```")
        rows = [(f"`{_metavar(p)}`", p) for p in arguments]
        rows += [(_names(p), p) for p in command.params if is_option(p) and "--help" not in p.opts]
        lines = ["| | | default |", "|---|---|---|"]
        lines += [f"| {name} | {_text(p.help or '')} | {_default(p)} |" for name, p in rows]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _names(option: Any) -> str:
    names = [*option.opts, *option.secondary_opts]
    return ", ".join(
        f"`{name}`" for name in sorted(names, key=lambda n: (not n.startswith("--"), n.startswith("--no")))
    )


def _default(parameter: Any) -> str:
    if parameter.required:
        return "**required**"
    value = parameter.default
    if value is None or value in ("", [], ()) or callable(value):
        return ""
    if isinstance(value, bool):
        return "yes" if value else ""
    return f"`{value}`"


def _text(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")
