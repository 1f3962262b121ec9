"""Bundles of generators that rest on DP moments: sound ones verify, one that hides what these cost does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dpsyngen
from dpsyngen.privacy.certificate import Certificate
from dpsyngen.release.bundle import pack
from dpsyngen.release.verify import verify
from tests.conftest import TINY_SETTINGS, tiny_arrays
from tests.release.test_verify import (
    contents,
    edit_certificate,
    edit_json,
    edit_text,
    failed,
    packed,
    with_manifest,
)

pytestmark = pytest.mark.slow


def bundled(folder: Path, variant: str) -> Path:
    """Of a run with real entropy; with samples."""
    settings = TINY_SETTINGS | {"stages": {"variant": variant, "tau_coarse": 1.0}}
    run = dpsyngen.train(tiny_arrays(), epsilon=4.0, out=folder / "r", settings=settings)
    dpsyngen.write_report(run)
    return pack(run, folder / "b.zip", samples=6, seed=5).path


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundled(tmp_path_factory.mktemp("residual"), "residual")


@pytest.fixture(scope="module")
def gaussian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundled(tmp_path_factory.mktemp("gaussian"), "gaussian")


def test_sound_bundles_pass_and_say_what_is_in_them(residual, gaussian) -> None:
    said = []
    for path in (residual, gaussian):
        verdict = verify(path, all_samples=True)
        assert verdict.passed, verdict.checks
        said += [c.text for c in verdict.checks if c.name == "generator"]
    assert said == [
        "its weights are whole; 1 network and DP moments as the certificate says",
        "its weights are whole; DP moments as the certificate says",
    ]


def test_the_certificate_states_each_query_in_plain_and_true_words(residual) -> None:
    files = contents(residual)
    certificate = Certificate.model_validate_json(files["privacy.json"])
    queries = [m for m in certificate.mechanisms if m.expected_batch is None]
    assert [m.mechanism for m in queries] == ["Gaussian"] * 3
    assert all(m.sampling_rate == 1 and m.count == 1 for m in queries)
    assert certificate.epsilon <= 4.0
    assert certificate.recompute("pld") == pytest.approx(certificate.epsilon)
    page = files["PRIVACY.md"].decode()
    rows = [line for line in page.split("\n") if line.startswith("- ") and " mechanism, " in line]
    assert len(rows) == 4
    for row in rows[:3]:
        assert "Gaussian mechanism, once, with every image in it." in row
        assert "by chance" not in row
        assert "Poisson" not in row
    assert "in or out by chance" in rows[3]
    assert "scatter matrix" in rows[1]
    # 64 pixels in [-1, 1], and a quarter of that norm for the number.
    assert f"limited to {64**0.5 * (1 + 0.25**2) ** 0.5:.4g}" in rows[0]


def less_noise(values: dict[str, Any]) -> None:
    values["mechanisms"][0]["noise_multiplier"] *= 0.5


def without_moments(values: dict[str, Any]) -> None:
    """As if the steps were all: ε is then that of the steps."""
    values["mechanisms"] = [m for m in values["mechanisms"] if "expected_batch" in m]
    values["epsilon"] = Certificate.model_validate(values).recompute("pld")
    values["epsilon_by_rdp"] = Certificate.model_validate(values).recompute("rdp")


def without_one(values: dict[str, Any]) -> None:
    del values["mechanisms"][1]
    values["epsilon"] = Certificate.model_validate(values).recompute("pld")
    values["epsilon_by_rdp"] = Certificate.model_validate(values).recompute("rdp")


def coarse_of_programs(values: dict[str, Any]) -> None:
    values["stages"][-1].update(trained_by="public")


@pytest.mark.parametrize(
    ("edit", "check"),
    [
        (edit_certificate(less_noise), "privacy cost"),
        (edit_certificate(without_moments), "settings"),
        (edit_certificate(without_one), "settings"),
        (edit_certificate(coarse_of_programs), "settings"),
        (edit_text("config.yaml", "variant: residual", "variant: coarse"), "settings"),
        (edit_text("config.yaml", "tau_coarse: 1.0", "tau_coarse: 2.0"), "settings"),
        (edit_json("generator.json", lambda v: v.pop("moments")), "generator"),
        (edit_json("generator.json", lambda v: v["moments"].update(rank=v["moments"]["rank"] + 1)), "generator"),
        (edit_json("generator.json", lambda v: v["stages"][-1].update(network="context")), "generator"),
        (lambda f: f.update({"weights/gaussian.safetensors": f["weights/context.safetensors"]}), "generator"),
        (lambda f: f.pop("weights/gaussian.safetensors"), "generator"),
    ],
)
def test_tampering_by_someone_who_mends_the_checksums(edit, check, residual, tmp_path) -> None:
    files = contents(residual)
    edit(files)
    assert failed(packed(with_manifest(files), tmp_path / "b.zip"))[0] == check


def test_other_moments_draw_other_samples(residual, tmp_path) -> None:
    from safetensors.torch import load, save

    files = contents(residual)
    tensors = load(files["weights/gaussian.safetensors"])
    files["weights/gaussian.safetensors"] = save({**tensors, "means": (tensors["means"] + 0.5).clamp(-1, 1)})
    assert failed(packed(with_manifest(files), tmp_path / "b.zip"))[0] == "images"
