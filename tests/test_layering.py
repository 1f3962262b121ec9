"""The house: which room may import which, and that no two files import each other in a circle."""

from __future__ import annotations

import ast
import tomllib
from functools import cache
from pathlib import Path

import pytest

import dpsyngen

PACKAGE = Path(dpsyngen.__file__).parent

FOUNDATION = (
    *("config", "console", "distributed", "errors", "files", "full_precision", "hardware", "version", "workers"),
)
"""Modules of the root that know no room: anybody may use them."""

ROOMS = (
    *("programs", "data", "privacy", "diffusion", "training", "generator", "release", "fit", "evaluation"),
    *("thresholds", "audit", "experiments", "report", "studio", "cli"),
)
"""In the order in which data flows: a room imports only from rooms before it."""

KNOW_NOTHING = ("programs", "privacy", "diffusion")
"""Rooms that import no other room at all: programs and mechanism know no image, diffusion knows no privacy."""


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports() -> dict[str, set[str]]:
    """For each module of the package the modules of it that it imports, also inside functions and for types."""
    modules = {_name(path): path for path in PACKAGE.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        wanted: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                wanted |= {w if w in modules else str(node.module) for w in whole}
        found[name] = {w for w in wanted if w in modules and w != name}
    return found


def room(module: str) -> str:
    """The room or module of the root that a module belongs to; "" for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_every_module_has_its_place() -> None:
    here = {room(name) for name in imports()}
    assert here == {"", "__main__", *FOUNDATION, *ROOMS}


@pytest.mark.parametrize("name", ROOMS)
def test_room_imports_only_rooms_before_it(name: str) -> None:
    allowed = {"", name, *FOUNDATION}
    if name not in KNOW_NOTHING:
        allowed |= set(ROOMS[: ROOMS.index(name)])
    for module, wanted in imports().items():
        if room(module) == name:
            assert {w for w in wanted if room(w) not in allowed} == set(), module


@pytest.mark.parametrize("name", FOUNDATION)
def test_foundation_knows_no_room(name: str) -> None:
    for module, wanted in imports().items():
        if room(module) == name:
            assert {w for w in wanted if room(w) not in FOUNDATION} == set(), module


def circle() -> list[str]:
    """Modules that import each other in a circle, the package itself left aside; [] if there is none."""
    state: dict[str, int] = {}
    path: list[str] = []

    def visit(module: str) -> list[str]:
        state[module] = 1
        path.append(module)
        for wanted in sorted(imports()[module]):
            if state.get(wanted) == 1:
                return path[path.index(wanted) :]
            if wanted not in state and (found := visit(wanted)):
                return found
        path.pop()
        state[module] = 2
        return []

    for module in imports():
        if module != "dpsyngen" and module not in state and (found := visit(module)):
            return found
    return []


def test_no_circle_between_files() -> None:
    assert circle() == []


def test_root_has_at_most_a_dozen_modules() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 12


def test_a_wheel_holds_every_file_of_the_package() -> None:
    """An editable install would hide a file that pyproject.toml forgets."""
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["dpsyngen"]
    listed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    others = {
        path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".nbi", ".nbc")
    }
    assert others <= listed


def test_no_file_is_longer_than_450_lines() -> None:
    long = {
        str(path): n
        for path in PACKAGE.rglob("*.py")
        if (n := len(path.read_text(encoding="utf-8").splitlines())) > 450
    }
    assert long == {}
