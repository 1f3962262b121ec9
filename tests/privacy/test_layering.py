"""Who may import whom: programs never see private data, the mechanism knows nothing of diffusion."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dpsyngen

ROOT = Path(dpsyngen.__file__).parent
ALLOWED = {
    "programs": {"programs", "errors", "files", "version"},
    "data": {"data", "errors"},
    "privacy": {"privacy", "errors", "workers"},
    "diffusion": {"diffusion", "errors"},
    "evaluation": {"evaluation", "data", "errors"},
    "training": {"training", "data", "privacy", "diffusion", "programs"}
    | {"config", "files", "errors", "version", "workers"},
}


def imported(path: Path) -> set[str]:
    out = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
        out |= {n.split(".")[1] for n in names if n.startswith("dpsyngen.")}
    return out


@pytest.mark.parametrize("package", ALLOWED)
def test_package_imports_only_what_it_may(package) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert imported(path) <= ALLOWED[package], path


def test_generator_needs_nothing_private() -> None:
    assert imported(ROOT / "generator.py") <= {"diffusion", "errors", "version"}
