"""Bundles from strangers: a verdict, never an exception, and never a good one for what was changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import zipfile
from pathlib import Path
from random import Random

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dpsyngen.errors import ReleaseError
from dpsyngen.privacy.certificate import Certificate, plain_words
from dpsyngen.release.bundle import pack, write_zip
from dpsyngen.release.verify import Verdict, verify
from dpsyngen.training.run import Run
from tests.fuzz.mutations import spoil_bytes, spoil_png, spoil_safetensors, spoil_value
from tests.fuzz.properties import accepted, examples, is_printable, nothing_else_happens, tried, zip_of

pytestmark = pytest.mark.slow

numbers = st.integers(0, 2**64 - 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="module")
def bundle(finished: Run, folder: Path) -> Path:
    path = pack(finished, folder / "good.zip", samples=3, seed=1).path
    assert verify(path).passed  # what is imported late is imported now
    return path


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as z:
        return {n: z.read(n) for n in z.namelist()}


def judged(kind: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> Verdict:
    tried[kind] += 1
    monkeypatch.setattr(tempfile, "tempdir", str(path.parent))
    with nothing_else_happens(path.parent, scratch=True):
        verdict = verify(path)
    for check in verdict.checks:
        is_printable(check.text)
    assert verdict.passed or any(c.passed is False for c in verdict.checks)
    accepted[kind] += verdict.passed
    return verdict


def test_damaged_zips(bundle, folder, monkeypatch) -> None:
    """Any bytes changed: it passes only where all members are what they were (a date in a header, say)."""
    good, path = bundle.read_bytes(), folder / "damaged.zip"
    members = contents(bundle)
    other = zip_of([("../x", b"1"), ("privacy.json", b"{}")])

    @examples(250)
    @given(numbers)
    def check(number: int) -> None:
        path.write_bytes(spoil_bytes(good, other, Random(number)))
        if judged("zip", path, monkeypatch).passed:
            assert contents(path) == members

    check()


def test_changed_members_with_checksums_to_match(bundle, folder, monkeypatch) -> None:
    """What gets through states an ε that follows from its mechanisms, in words that follow from its numbers."""
    good, path = contents(bundle), folder / "changed.zip"

    @examples(250)
    @given(numbers)
    def check(number: int) -> None:
        random = Random(number)
        files = dict(good)
        name = random.choice(sorted(files))
        spoilt = _spoilt(name, files[name], random)
        if random.random() < 0.1:
            files[random.choice(["../x", "a/../../b", "x.txt", "samples/x.txt", "weights/x.safetensors"])] = spoilt
        else:
            files[name] = spoilt
        if name == "privacy.json" and random.random() < 0.7:
            with contextlib.suppress(ReleaseError):
                files["PRIVACY.md"] = plain_words(Certificate.from_json(spoilt, "x")).encode()
        if name != "manifest.json":
            listed = {
                n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()}
                for n, c in files.items()
                if n != "manifest.json"
            }
            files["manifest.json"] = json.dumps({"format": 1, "files": listed}).encode()
        write_zip(path, files.items())
        verdict = judged("bundle", path, monkeypatch)
        if verdict.passed:
            c = Certificate.from_json(contents(path)["privacy.json"], "x")
            assert isinstance(c.epsilon, float)
            assert c.recompute("pld") <= c.epsilon * 1.001
            assert contents(path)["PRIVACY.md"].decode() == plain_words(c)

    check()


def _spoilt(name: str, content: bytes, random: Random) -> bytes:
    if random.random() < 0.2:
        return spoil_bytes(content, content, random)
    if name.endswith(".json"):
        try:
            return json.dumps(spoil_value(json.loads(content), random)).encode()
        except ValueError:  # a number that Python does not write out
            return b"1" * 10_000
    if name.endswith(".yaml"):
        try:
            return yaml.safe_dump(spoil_value(yaml.safe_load(content), random)).encode()
        except ValueError:
            return b"a: " + b"1" * 10_000
    if name.endswith(".png"):
        return spoil_png(content, content, random)
    if name.endswith(".safetensors"):
        return spoil_safetensors(content, content, random)
    return spoil_bytes(content, content, random)
