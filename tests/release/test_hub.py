"""The code of a release needs nothing that is not there, and answers as ours; pixels: test_strangers.py."""

from __future__ import annotations

import ast
import sys

import pytest
import torch

from dpsyngen.diffusion import standalone
from dpsyngen.release.card import DENOISER, PIPELINE, code

MAY_IMPORT = {"diffusers", "numpy", "PIL", "safetensors", "torch"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", [DENOISER, PIPELINE])
def test_the_code_of_a_release_imports_no_dpsyngen(name) -> None:
    tree = ast.parse(code()[name])
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {i.split(".")[0] for i in imported} <= MAY_IMPORT
    assert not any(isinstance(n, ast.ImportFrom) and n.level for n in ast.walk(tree))


@pytest.mark.xdist_group("releases")
def test_the_owner_of_a_noise_level_is_ours(releases) -> None:
    """At thresholds, next to them, and in batches of mixed levels."""
    import dpsyngen

    rng = torch.Generator().manual_seed(0)
    for kind in ("both", "shared", "residual-prior", "instant", "gaussian-colour"):
        ours, theirs = dpsyngen.Generator(releases[kind]), standalone.ReleasedDenoiser(releases[kind])
        ends = [s.high for s in ours.stages.stages if s.high < 9]
        levels = torch.tensor([-6.0, 0.0, 4.0, *ends, *(e - 1e-6 for e in ends), *(e + 1e-6 for e in ends)]).double()
        x = torch.randn(len(levels), ours.channels, 8, 8, generator=rng)
        labels = torch.arange(len(levels)) % len(ours.class_names) if ours.class_names else None
        for guidance in (1.0, 2.5):
            with torch.no_grad():
                expected = ours.denoiser(guidance)(x, levels.exp(), labels)
            assert torch.equal(theirs(x, levels.exp(), labels, guidance), expected), kind


@pytest.mark.xdist_group("releases")
@pytest.mark.parametrize("kind", ["gaussian-colour", "instant"])
def test_guidance_without_a_network_that_knows_classes_is_refused(kind, releases) -> None:
    import dpsyngen

    theirs, own = standalone.ReleasedDenoiser(releases[kind]), dpsyngen.Generator(releases[kind]).defaults.guidance
    assert len(list(theirs.sample(1, torch.tensor([0]), guidance=own))) == 1
    with pytest.raises(ValueError, match=r"guidance is 3\.5, but must be 1"):
        next(iter(theirs.sample(1, torch.tensor([0]), guidance=3.5)))
