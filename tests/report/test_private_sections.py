"""What the report says of memorisation and health: all of it in the private copy, none of it in the public one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import dpsyngen
from dpsyngen import fit as api
from dpsyngen.errors import RunError
from dpsyngen.evaluation.run import check_memorisation
from dpsyngen.training.run import Run

SETTINGS = {
    "network": {"size": "nano"},
    "stages": {"variant": "dpdm"},
    "private": {"steps": 3, "batch": 12, "copies": 1, "physical_batch": 12},
    "sampling": {"steps": 2},
}
EVIL = "<script>alert('class')</script>"


def images_of(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (30, 8, 8), dtype=np.uint8), np.arange(30) % 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out: Path = tmp_path_factory.mktemp("report") / "run"
    return api.train(images_of(0), epsilon=float("inf"), out=out, settings=SETTINGS)


def test_the_private_copy_has_them_and_the_public_one_not(run) -> None:
    (run.private / "health.json").unlink()  # training wrote it
    private, public = dpsyngen.write_report(run)
    assert "Not checked yet" in private.read_text()
    assert "Not looked at yet" in private.read_text()
    before = public.read_bytes()
    check_memorisation(run, data=images_of(0), held_out=images_of(1), images=12)
    findings = [
        {"code": "diverged", "severity": "error", "seen": f"of class {EVIL}", "why": "w", "change": "c", "basis": "x"}
    ]
    (run.private / "health.json").write_text(json.dumps({"findings": findings}))
    private, public = dpsyngen.write_report(run)
    text = private.read_text()
    pairs = json.loads((run.private / "memorisation_pairs.json").read_text())
    for pair in (pair for group in pairs["groups"] for pair in group["pairs"]):
        assert all(f'src="{pair[name]}"' in text for name in ("generated", "private", "held_out"))
        assert f"<dd>{pair['to_private']:.3g}</dd>" in text
        assert f"<dd>{pair['to_held_out']:.3g}</dd>" in text
    assert "nearest to a training image, pixels" in text
    assert "No sign of memorisation" in text
    assert "<strong>ERROR</strong> diverged" in text
    assert EVIL not in text
    assert "of class &lt;script&gt;" in text
    assert public.read_bytes() == before
    assert "Utility was not checked" in public.read_text()
    assert "emorisation" not in public.read_text()
    assert private.stat().st_mode & 0o777 == 0o600
    # A check without held-out images and a run without findings are said as such.
    check_memorisation(run, data=images_of(0), images=12)
    (run.private / "health.json").write_text(json.dumps({"findings": []}))
    text = dpsyngen.write_report(run)[0].read_text()
    assert "No verdict" in text
    assert "Nothing found." in text


@pytest.mark.parametrize(
    ("name", "damaged", "said"),
    [
        ("privacy.json", lambda text: text.replace('"unit"', '"units"'), "unit: Field required"),
        ("privacy.json", lambda text: text.replace('"epsilon": "inf"', '"epsilon": "3"'), "epsilon"),
        ("privacy.json", lambda text: json.dumps({"ledger": json.loads(text)["ledger"]}), "Field required"),
        ("privacy.json", lambda text: text.replace('"not_private_because"', '"private": 1, "x"'), "private"),
        ("config.yaml", lambda text: "", "mapping of sections"),
        ("config.yaml", lambda text: "- private", "mapping of sections"),
        ("config.yaml", lambda text: text[: text.index("sampling:")], "it lacks .*sampling"),
        ("config.yaml", lambda text: text.replace("noise_mean: ", "noise_mean: x"), "network.noise_mean is 'x"),
        ("config.yaml", lambda text: text.replace("program:", "program: [", 1), "not valid YAML"),
        ("config.yaml", lambda text: "\xff", "mapping of sections"),
        ("config.yaml", None, "cannot be read"),
    ],
)
def test_a_damaged_public_half_is_said(run, name, damaged, said) -> None:
    path = run.release / name
    text = path.read_text()
    path.unlink() if damaged is None else path.write_text(damaged(text))
    with pytest.raises(RunError, match=rf"(?s){name} is missing or damaged: .*{said}.* Put it back from a backup"):
        dpsyngen.write_report(run)
    path.write_text(text)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
@pytest.mark.parametrize("name", ["health", "metrics", "memorisation"])
def test_damaged_figures_are_said(run, name, text) -> None:
    path = run.private / f"{name}.json"
    before = path.read_bytes() if path.exists() else None
    path.write_text(text)
    with pytest.raises(RunError, match=rf"{name}\.json is damaged"):
        dpsyngen.write_report(run)
    path.unlink() if before is None else path.write_bytes(before)


def test_figures_that_cannot_be_read_are_not_called_damaged(run) -> None:
    path = run.private / "health.json"
    before = path.read_bytes()
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        dpsyngen.write_report(run)
    path.rmdir()
    path.write_bytes(before)
