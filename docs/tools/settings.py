"""All settings of a run as a page, from the model that checks them."""

from __future__ import annotations

import re
import types
from typing import Any, Literal, Union, get_args, get_origin

from dpsyngen.config import Config, preset_names


def settings_page() -> str:
    """The page ``reference/settings.md``: a table for each section of the configuration."""
    parts = [
        "# Settings",
        "Made from the model that checks them (`dpsyngen/config.py`). A configuration is YAML with these sections, for "
        "`--config FILE`; single settings are `--set section.name=value`, or from Python "
        "`settings={'section': {'name': value}}`. A preset comes first, the file over it, options last. Everything is "
        "checked before an image is read, and all mistakes are named at once.",
        f"Presets: {', '.join(f'`{name}`' for name in preset_names())} ([which](../how-to/choose-preset.md)). The "
        "defaults below are those of the model; every preset sets some of them.",
    ]
    for name, field in Config.model_fields.items():
        section: Any = field.annotation
        if not hasattr(section, "model_fields"):
            continue
        parts += [f"## {name}", _first_line(section)]
        rows = ["| setting | allowed | default | |", "|---|---|---|---|"]
        rows += [
            f"| `{name}.{key}` | {_allowed(one)} | {_value(one.default)} | {_plain(one.description or '')} |"
            for key, one in section.model_fields.items()
        ]
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _first_line(section: Any) -> str:
    return _plain((section.__doc__ or "").strip().splitlines()[0])


def _allowed(field: Any) -> str:
    """The type in words, with its bounds."""
    kinds = [k for k in _kinds(field.annotation) if k is not type(None)]
    words = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            words += [f"`{value}`" for value in get_args(kind)]
        elif kind is bool:
            words.append("true, false")
        else:
            names = {int: "whole number", float: "number", str: "text", dict: "mapping"}
            words.append(names.get(get_origin(kind) or kind, getattr(kind, "__name__", str(kind))))
    text = ", ".join(words)
    bounds = []
    for rule in field.metadata:
        for mark, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            if (bound := getattr(rule, mark, None)) is not None:
                bounds.append(f"{sign} {_number(bound)}")
    return text + (f", {', '.join(bounds)}" if bounds else "")


def _kinds(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    return [annotation]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) and abs(value) < 10**7 else f"{value:.4g}"


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return _number(value)
    return f"`{value}`" if isinstance(value, str) and value else ""


def _plain(text: str) -> str:
    """Markdown for a cell of a table, with pages of the documentation as links."""
    return re.sub(r"docs/([\w-]+)\.md", r"[\1](../\1.md)", text.replace("|", "\\|")).replace(":func:", "")
