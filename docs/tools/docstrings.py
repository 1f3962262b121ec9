"""Docstrings as they are written here, turned into what mkdocstrings renders.  An extension of griffe.

Ours are: Sphinx roles (``:class:`Name```), doctests in running text, labels such as "Formal guarantee:", and one entry
for several parameters.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([\w.]+)`")
_PAGE = re.compile(r"(?<!`)docs/([\w-]+)\.md(?!`)")
_LABEL = re.compile(r"^(Formal guarantee|Guarantee|Example|Sources?):(?= )", re.MULTILINE)
_SEVERAL = re.compile(r"^(\s+)(\w+(?:, \w+)+)(: .*)$")


class OurDocstrings(griffe.Extension):
    """Rewrites every docstring of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        _rewrite_all(pkg)


def _rewrite_all(item: griffe.Object | griffe.Alias) -> None:
    if item.docstring is not None:
        item.docstring.value = rewrite(item.docstring.value, item)
    for member in item.members.values():
        if not member.is_alias:
            _rewrite_all(member)


def rewrite(text: str, item: griffe.Object | griffe.Alias) -> str:
    """One docstring as Markdown for griffe's Google style."""
    lines: list[str] = []
    later: list[str] = []  # entries that follow the one before, which may go on for more lines
    fenced, indent, section = False, 0, ""
    for line in text.splitlines():
        depth = len(line) - len(line.lstrip())
        if later and (not line.strip() or depth <= indent):
            lines += later
            later = []
        if line.lstrip().startswith(">>>") and not fenced:
            fenced, indent = True, depth
            lines.append("```pycon")
        elif fenced and not line.strip():
            fenced = False
            lines.append("```")
        if heading := re.match(r"^(\w[\w ]*):$", line):
            section = heading[1]
        if fenced:
            lines.append(line[indent:])
        elif section in ("Args", "Attributes") and (several := _SEVERAL.match(line)):
            space, names, rest = several.groups()
            first, *others = names.split(", ")
            lines.append(f"{space}{first}{rest}")
            later, indent = [f"{space}{name}: as ``{first}``." for name in others], depth
        else:
            lines.append(line)
    lines += later
    if fenced:
        lines.append("```")
    return _with_links(_LABEL.sub(r"**\1:**", "\n".join(lines)), item)


def _with_links(text: str, item: griffe.Object | griffe.Alias) -> str:
    def link(match: re.Match[str]) -> str:
        name = match[1]
        try:
            target = name if name.startswith("dpsyngen") else item.resolve(name)
        except griffe.NameResolutionError:
            return f"`{name}`"
        short = name if name.count(".") < 2 else name.rpartition(".")[2]
        return f'<autoref identifier="{target}" optional>`{short}`</autoref>'

    # All pages of the reference lie in one folder below the others.
    return _PAGE.sub(r"[docs/\1.md](../\1.md)", _ROLE.sub(link, text))
