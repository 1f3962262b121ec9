"""The model card says what the certificate says, to people and to the Hub."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import dpsyngen
from dpsyngen.privacy.certificate import Certificate, number
from dpsyngen.release.card import model_card
from tests.conftest import TINY_SETTINGS, tiny_arrays

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("releases")]  # made once


def parts(text: str) -> tuple[dict[str, Any], str]:
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_the_card_of_a_release_states_the_numbers_of_its_certificate(releases) -> None:
    for kind, release in releases.items():
        header, body = parts((release / "README.md").read_text(encoding="utf-8"))
        data = (release / "privacy.json").read_bytes()
        c = Certificate.from_json(data, "privacy.json")
        assert header["privacy"]["private"] is True, kind
        assert header["privacy"]["epsilon"] == c.epsilon
        assert header["privacy"]["delta"] == c.delta
        assert header["privacy"]["group_size"] == c.group_size
        assert header["privacy"]["adjacency"] == c.adjacency
        assert header["privacy"]["certificate_sha256"] == hashlib.sha256(data).hexdigest()
        assert header["pipeline_tag"] == "unconditional-image-generation"
        assert header["library_name"] == "diffusers"
        assert {"differential-privacy", "diffusion"} <= set(header["tags"])
        assert "not-private" not in header["tags"]
        assert "license" not in header
        assert f"ε = {number(c.epsilon, up=True)}, δ = {number(c.delta, 3, up=True)}" in body
        assert f"{c.public_assumptions.records:,} private images" in body
        assert hashlib.sha256(data).hexdigest() in body
        assert c.utility in body
        for text in c.not_covered:
            assert text in body
        assert "NOT PRIVATE" not in body


def test_the_hub_reads_the_header(releases) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard((releases["both"] / "README.md").read_text(encoding="utf-8"))
    assert card.data.library_name == "diffusers"
    assert card.data.to_dict()["privacy"]["private"] is True
    assert hub.repocard.metadata_load(releases["both"] / "README.md")["privacy"]["group_size"] == 1


def test_each_file_that_the_card_names_is_there_and_each_that_is_there_is_named(releases) -> None:
    for release in releases.values():
        body = (release / "README.md").read_text(encoding="utf-8")
        rows = [line for line in body.splitlines() if line.startswith("| ") and "in a bundle" not in line][1:]
        named = {name.strip() for line in rows for name in line.split("|")[1].split(",")}
        there = {p.name + "/" * p.is_dir() for p in release.iterdir()}
        assert there <= named
        assert named - there <= {"report.html", "public_training.jsonl"}  # made later, or not at all


@pytest.mark.parametrize("how", ["inf", "seed"])
def test_runs_without_privacy_are_stamped_in_header_and_text(how, tmp_path) -> None:
    settings = {**TINY_SETTINGS, "stages": {"variant": "dpdm"}}
    if how == "seed":
        settings["privacy"] = {"insecure_seed": 1}
    epsilon = float("inf") if how == "inf" else 4.0
    release = dpsyngen.train(tiny_arrays(), epsilon=epsilon, out=tmp_path / "r", settings=settings).release
    data = (release / "privacy.json").read_bytes()
    c = Certificate.from_json(data, "privacy.json")
    header, body = parts((release / "README.md").read_text(encoding="utf-8"))
    assert header["privacy"]["private"] is False
    assert header["privacy"]["not_private_because"] == c.not_private_because
    assert header["privacy"]["epsilon"] == ("inf" if how == "inf" else c.epsilon)
    assert "not-private" in header["tags"]
    assert "**NOT PRIVATE" in body
    assert "without a privacy guarantee" in body
    assert "with differential privacy." not in body
    assert "guesses right at most" not in body


def test_names_of_classes_cannot_write_markdown_or_yaml(releases) -> None:
    data = (releases["both"] / "privacy.json").read_bytes()
    c = Certificate.from_json(data, "privacy.json")
    evil = ["---", "x\n---\nlicense: mit", "<script>", "[a](b)", "`|`"]
    changed = c.model_copy(update={"public_assumptions": c.public_assumptions.model_copy(update={"class_names": evil})})
    header, body = parts(model_card(changed, hashlib.sha256(data).hexdigest()))
    assert "license" not in header
    assert "<script>" not in body.replace("\\<script\\>", "")
    assert not re.search(r"^---", body, re.MULTILINE)
    assert "[a](b)" not in body


def test_the_card_follows_from_the_certificate_alone(releases) -> None:
    """So nothing of the private images gets into it, and `verify` can compare."""
    for release in releases.values():
        data = Path(release / "privacy.json").read_bytes()
        c = Certificate.from_json(data, "privacy.json")
        assert (release / "README.md").read_text(encoding="utf-8") == model_card(c, hashlib.sha256(data).hexdigest())
