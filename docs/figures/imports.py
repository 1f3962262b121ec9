"""Which room imports which, read from the source: a matrix, below whose diagonal all marks lie."""

from __future__ import annotations

import ast
from pathlib import Path

import dpsyngen
from docs.figures.canvas import GREY_SOFT, INK, LINE, PUBLIC, SOFT, Canvas

ROOMS = (
    *("programs", "data", "privacy", "diffusion", "training", "generator", "release", "fit", "evaluation"),
    *("thresholds", "audit", "experiments", "report", "cli"),
)
"""In the order in which data flows: a room imports only rooms before it (tests/test_layering.py)."""


def edges() -> set[tuple[str, str]]:
    """Pairs of rooms of which the first imports the second."""
    root = Path(dpsyngen.__file__).parent
    found = set()
    for room in ROOMS:
        files = [root / f"{room}.py"] if (root / f"{room}.py").exists() else (root / room).rglob("*.py")
        found |= {(room, other) for path in files for other in imported(path) & set(ROOMS) - {room}}
    return found


def imported(path: Path) -> set[str]:
    """The rooms and modules of dpsyngen that a file imports, within functions, too."""
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
        f"{a} imports {', '.join(b for b in ROOMS if (a, b) in found) or 'no other room'}" for a in ROOMS
    )
    size, left, top = 38, 110, 84
    c = Canvas(left + size * len(ROOMS) + 30, top + size * len(ROOMS) + 16, f"Imports: {sentences}.")
    c.text(12, 24, "row imports column", INK, bold=True)
    for i, row in enumerate(ROOMS):
        y = top + size * i
        c.text(left - 12, y + size / 2 + 5, row, INK, at="end")
        c.text(left + size * (i + 0.5), top - 10 - 20 * (i % 2), row, INK, size=12, at="middle")
        for j, column in enumerate(ROOMS):
            x = left + size * j
            c.rect(x, y, size, size, GREY_SOFT if i == j else "#ffffff", edge=LINE)
            if (row, column) in found:
                c.rect(x + 4, y + 4, size - 8, size - 8, "#d5efeb", edge=PUBLIC, round=4)
                c.text(x + size / 2, y + size / 2 + 5, "✓", PUBLIC, at="middle", bold=True)
            elif j > i:
                c.circle(x + size / 2, y + size / 2, 1.5, SOFT)
    return c.svg()
