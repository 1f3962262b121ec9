"""Which package imports which, read from the source: a matrix, below whose diagonal all marks lie."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import dpsyngen
from docs.figures.canvas import GREY_SOFT, INK, LINE, PUBLIC, SOFT, Canvas

PACKAGES = ("data", "programs", "privacy", "diffusion", "evaluation", "export", "training", "experiments", "report")
"""From those that need no other to those that need most."""


def edges() -> dict[tuple[str, str], int]:
    """How many files of the first package import the second one, of those that do."""
    root = Path(dpsyngen.__file__).parent
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            for other in imported(path) & set(PACKAGES) - {package}:
                counts[package, other] += 1
    return dict(counts)


def imported(path: Path) -> set[str]:
    """The packages below dpsyngen that a file imports, within functions, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found |= {n.split(".")[1] for n in names if n.startswith("dpsyngen.")}
    return found


def draw() -> str:
    """The SVG file."""
    found = edges()
    sentences = "; ".join(
        f"{a} imports {', '.join(b for b in PACKAGES if (a, b) in found) or 'no other package'}" for a in PACKAGES
    )
    size, left, top = 44, 130, 96
    c = Canvas(left + size * len(PACKAGES) + 30, top + size * len(PACKAGES) + 16, f"Imports: {sentences}.")
    c.text(12, 24, "row imports column", INK, bold=True)
    for i, row in enumerate(PACKAGES):
        y = top + size * i
        c.text(left - 12, y + size / 2 + 5, row, INK, at="end")
        c.text(left + size * (i + 0.5), top - 10 - 20 * (i % 2), row, INK, size=12, at="middle")
        for j, column in enumerate(PACKAGES):
            x = left + size * j
            c.rect(x, y, size, size, GREY_SOFT if i == j else "#ffffff", edge=LINE)
            if (row, column) in found:
                c.rect(x + 5, y + 5, size - 10, size - 10, "#d5efeb", edge=PUBLIC, round=4)
                c.text(x + size / 2, y + size / 2 + 5, "✓", PUBLIC, at="middle", bold=True)
            elif j > i:
                c.circle(x + size / 2, y + size / 2, 1.5, SOFT)
    return c.svg()
