"""Who may import whom: programs never see private data, the mechanism knows nothing of diffusion."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dpsyngen

ROOT = Path(dpsyngen.__file__).parent
# Files of their own that know nothing of images, privacy or diffusion: anybody may use them.
LEAVES = {
    *(
        "class_names",
        "distributed",
        "errors",
        "files",
        "full_precision",
        "plain_file",
        "plain_yaml",
        "shown",
        "strict_json",
    ),
    *("transfer", "version"),
}
ALLOWED = {
    "programs": {"programs"},
    "data": {"data"},
    "privacy": {"privacy", "workers"},
    "diffusion": {"diffusion"},
    "evaluation": {"evaluation", "data"},
    "training": {
        *("training", "data", "privacy", "diffusion", "programs", "certificate", "config", "export", "workers"),
        "hardware",
    },
    "hardware": {"hardware", "config"},
    "export": {"export", "certificate", "diffusion", "generator", "generator_file", "sampling_settings"},
}


def imported(path: Path, at_once: bool = False) -> set[str]:
    """What a file imports; `at_once`: as it is imported itself, not when one of its functions is called."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    out = set()
    for node in tree.body if at_once else ast.walk(tree):
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
        assert imported(path) <= ALLOWED[package] | LEAVES, path


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_leaves_know_nothing_but_each_other(leaf) -> None:
    assert imported(ROOT / f"{leaf}.py") <= LEAVES


def test_generator_needs_nothing_private() -> None:
    """What draws images, that is: `Generator.fit` trains, and asks the training for that when it is called."""
    drawing = {"chosen_classes", "diffusion", "generator_file", "generator_networks", "hardware", "sampling_settings"}
    shown = {"guarantee", "sampled_images", "saved_generator"}
    assert imported(ROOT / "generator.py", at_once=True) <= drawing | shown | LEAVES
    for name in ("chosen_classes", "generator_networks", "sampled_images", "saved_generator"):
        assert imported(ROOT / f"{name}.py", at_once=True) <= drawing | shown | LEAVES
    assert imported(ROOT / "sampling_settings.py") <= {"diffusion"} | LEAVES
    assert imported(ROOT / "generator_file.py") <= {"diffusion", "config"} | LEAVES
    assert imported(ROOT / "config.py") <= LEAVES


def test_only_the_comparison_knows_of_experiments() -> None:
    for path in ROOT.rglob("*.py"):
        if "experiments" in imported(path):
            place = path.relative_to(ROOT)
            assert place.parts[0] == "experiments" or place.name.startswith(("comparison", "cli_compare")), path


def test_certificate_follows_from_the_mechanism_alone() -> None:
    assert imported(ROOT / "certificate.py") <= {"privacy"} | LEAVES
