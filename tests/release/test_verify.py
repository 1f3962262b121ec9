"""A bundle that was tampered with does not verify, and the check that catches it is the one that should."""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load, save

import dpsyngen
from dpsyngen.privacy.certificate import Certificate, plain_words, protected
from dpsyngen.release.bundle import pack, write_zip
from dpsyngen.release.card import model_card
from dpsyngen.release.signing import make_key
from dpsyngen.release.verify import verify
from tests.conftest import TINY_SETTINGS, tiny_arrays
from tests.training.short_runs import merged

Files = dict[str, bytes]


def contents(path: Path) -> Files:
    with zipfile.ZipFile(path) as z:
        return {n: z.read(n) for n in z.namelist()}


def packed(files: Files, path: Path) -> Path:
    write_zip(path, files.items())
    return path


def with_manifest(files: Files) -> Files:
    """As someone would who knows of the checksums."""
    out = {n: c for n, c in files.items() if n not in ("manifest.json", "manifest.sig")}
    listed = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in sorted(out.items())}
    old = json.loads(files["manifest.json"])
    return {**out, "manifest.json": json.dumps({**old, "files": listed}).encode()}


def failed(path: Path, **options) -> tuple[str, str]:
    """Name and text of the first check that failed."""
    verdict = verify(path, **options)
    assert not verdict.passed
    wrong = [c for c in verdict.checks if c.passed is False]
    assert wrong, verdict.checks
    return wrong[0].name, wrong[0].text


def test_sound_bundles_pass(bundle, signed, key) -> None:
    verdict = verify(bundle, all_samples=True)
    assert verdict.passed, verdict.checks
    assert [c.name for c in verdict.checks] == [
        "archive",
        "signature",
        "checksums",
        "certificate",
        "guarantee",
        "privacy cost",
        "plain words",
        "model card",
        "code",
        "settings",
        "report",
        "generator",
        "images",
    ]
    assert verdict.certificate is not None
    assert verdict.certificate.private
    assert verify(signed).passed
    with_key = verify(signed, key.with_name("k.pem.pub"))
    assert with_key.passed
    assert with_key.checks[1].passed is True


def test_every_byte_counts(bundle, tmp_path) -> None:
    """A changed byte in any member is seen, whichever it is."""
    files = contents(bundle)
    for name in files:
        if name == "manifest.json":
            continue
        changed = {**files, name: files[name][:-1] + bytes([files[name][-1] ^ 1])}
        check, text = failed(packed(changed, tmp_path / "b.zip"))
        assert (check, name in text or ascii(name) in text) == ("checksums", True)


def test_signature(bundle, signed, key, tmp_path) -> None:
    files = contents(signed)
    changed = with_manifest({**files, "README.md": b"Buy now"})
    resigned = packed({**changed, "manifest.sig": files["manifest.sig"]}, tmp_path / "a.zip")
    assert failed(resigned)[0] == "signature"
    make_key(tmp_path / "other")
    assert failed(signed, public_key=tmp_path / "other.pub")[0] == "signature"
    assert failed(bundle, public_key=key.with_name("k.pem.pub")) == (
        "signature",
        "is missing, but a key to check it with was given",
    )


def edit_json(name: str, change: Callable[[dict], None]) -> Callable[[Files], None]:
    def edit(files: Files) -> None:
        values = json.loads(files[name])
        change(values)
        files[name] = json.dumps(values).encode()

    return edit


def edit_certificate(change: Callable[[dict], None]) -> Callable[[Files], None]:
    """With the page of plain words and the model card to match."""

    def edit(files: Files) -> None:
        values = json.loads(files["privacy.json"])
        change(values)
        files["privacy.json"] = json.dumps(values).encode()
        certificate = Certificate.model_validate_json(files["privacy.json"])
        files["PRIVACY.md"] = plain_words(certificate).encode()
        files["README.md"] = model_card(certificate, hashlib.sha256(files["privacy.json"]).hexdigest()).encode()

    return edit


def edit_text(name: str, old: str, new: str) -> Callable[[Files], None]:
    def edit(files: Files) -> None:
        text = files[name].decode()
        assert re.search(old, text)
        files[name] = re.sub(old, new, text, count=1).encode()

    return edit


def stated(group_size: int, by_person: bool) -> dict[str, str]:
    return dict(zip(("unit", "adjacency"), protected(group_size, by_person), strict=True))


def three_images_of_a_person(files: Files) -> None:
    """At the price of one: settings in which the group size follows from nothing."""
    edit_certificate(lambda v: v.update(by_person=True, people="by hand", **stated(1, True)))(files)
    edit_text("config.yaml", "most_per_person: null", "most_per_person: 3")(files)
    edit_text("config.yaml", r"  group_size: 1\n", "")(files)


def first_picture(files: Files) -> str:
    return next(n for n in sorted(files) if n.endswith("0000000.png"))


def other_picture(files: Files) -> None:
    """A private image smuggled in among the samples."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(buffer, "PNG")
    files[first_picture(files)] = buffer.getvalue()


def picture_with_text(files: Files) -> None:
    name, buffer = first_picture(files), io.BytesIO()
    info = PngImagePlugin.PngInfo()
    info.add_text("patient", "secret")
    Image.open(io.BytesIO(files[name])).save(buffer, "PNG", pnginfo=info)
    files[name] = buffer.getvalue()


def picture_with_a_tail(files: Files) -> None:
    files[first_picture(files)] += b"secret"


def weights(change: Callable[[dict], dict], metadata: dict | None = None) -> Callable[[Files], None]:
    def edit(files: Files) -> None:
        name = "weights/context.safetensors"
        files[name] = save(change(load(files[name])), metadata)

    return edit


def scaled(tensors: dict) -> dict:
    return {k: v * 1.5 for k, v in tensors.items()}


def not_a_number(tensors: dict) -> dict:
    first = next(iter(tensors))
    return {**tensors, first: tensors[first] * float("nan")}


@pytest.mark.parametrize(
    ("edit", "check"),
    [
        (lambda f: f.update({"private.txt": b"x"}), "archive"),
        (lambda f: f.update({"weights/../x.safetensors": b"x"}), "archive"),
        (lambda f: f.update({"samples/notes.txt": b"x"}), "archive"),
        (lambda f: f.pop("privacy.json"), "archive"),
        (lambda f: f.pop("PRIVACY.md"), "archive"),
        (edit_json("privacy.json", lambda v: v.pop("delta")), "certificate"),
        (edit_json("privacy.json", lambda v: v.update(surprise=1)), "certificate"),
        (edit_json("privacy.json", lambda v: v.update(utility_checked=True)), "certificate"),
        (edit_json("privacy.json", lambda v: v.update(epsilon=-1.0)), "certificate"),
        (lambda f: f.update({"privacy.json": b"[]"}), "certificate"),
        (lambda f: f.update({"privacy.json": b"\xff"}), "certificate"),
        (lambda f: f.update({"certificate.schema.json": b"{}"}), "certificate"),
        (edit_certificate(lambda v: v.update(epsilon=0.5)), "privacy cost"),
        (edit_certificate(lambda v: v.update(delta=1e-9)), "privacy cost"),
        (edit_certificate(lambda v: v.update(group_size=3)), "guarantee"),
        (edit_certificate(lambda v: v.update(group_size=3, **stated(3, False))), "privacy cost"),
        (edit_certificate(lambda v: v.update(unit="each person")), "guarantee"),
        (edit_certificate(lambda v: v.update(by_person=True, people="by hand", **stated(1, True))), "settings"),
        (three_images_of_a_person, "settings"),
        (edit_certificate(lambda v: v.update(delta=0.1)), "guarantee"),
        (edit_certificate(lambda v: v["mechanisms"][0].update(count=1)), "settings"),
        (edit_certificate(lambda v: v["mechanisms"][0].update(l2_sensitivity=0.1)), "settings"),
        (edit_certificate(lambda v: v["mechanisms"][0].update(sampling_rate=0.01)), "settings"),
        (edit_certificate(lambda v: v["programmatic_images"].update(name="strokes")), "settings"),
        (edit_certificate(lambda v: v["programmatic_images"].update(prior_tier=2)), "settings"),
        (edit_text("PRIVACY.md", "ε = [0-9.]+", "ε = 0.1"), "plain words"),
        (edit_text("README.md", "epsilon: [0-9.]+", "epsilon: 0.1"), "model card"),
        (edit_text("README.md", "private: true", "private: true\nlicense: mit"), "model card"),
        (edit_text("README.md", "certificate_sha256: [0-9a-f]{64}", f"certificate_sha256: {'0' * 64}"), "model card"),
        (edit_json("privacy.json", lambda v: None), "model card"),  # the same certificate in other bytes
        (edit_text("pipeline.py", "import shutil", "import shutil, antigravity"), "code"),
        (edit_text("denoiser/denoiser.py", r"\Z", "import antigravity\n"), "code"),
        (edit_json("model_index.json", lambda v: v.update(denoiser=["pickle", "loads"])), "code"),
        (lambda f: f.update({"denoiser/other.py": b"x"}), "archive"),
        (lambda f: f.pop("pipeline.py"), "archive"),
        (edit_text("config.yaml", "records: null", "records: 600000"), "settings"),
        (edit_text("config.yaml", "skip_bad:", "source: /home/ward/patients\n  skip_bad:"), "settings"),
        (edit_text("config.yaml", "epsilon:.*", "epsilon: 0.1"), "settings"),
        (edit_text("config.yaml", "epsilon:", "epsilom:"), "settings"),
        (lambda f: f.update({"config.yaml": b"!!python/object/apply:os.system [id]"}), "settings"),
        (lambda f: f.update({"config.yaml": b"[" * 5000}), "settings"),
        (edit_text("report.html", "</body>", "<script>1</script></body>"), "report"),
        (edit_text("report.html", "</body>", "<img src='https://x.example/y'></body>"), "report"),
        (edit_text("report.html", "</body>", "<p onclick='x()'></p></body>"), "report"),
        (edit_json("generator.json", lambda v: v.update(class_names=["a", "b", "c"])), "generator"),
        (edit_json("generator.json", lambda v: v.update(private=False)), "generator"),
        (edit_json("generator.json", lambda v: v["stages"][0].update(network="../../x")), "generator"),
        (edit_json("generator.json", lambda v: v.update(resolution=10**9)), "generator"),
        (lambda f: f.pop("weights/context.safetensors"), "generator"),
        (weights(lambda t: t, {"note": "secret"}), "generator"),
        (weights(not_a_number), "generator"),
        (weights(lambda t: dict(list(t.items())[1:])), "generator"),
        (lambda f: f.update({"weights/context.safetensors": b"\xff" * 100}), "generator"),
        (weights(scaled), "images"),
        (other_picture, "images"),
        (picture_with_text, "images"),
        (picture_with_a_tail, "images"),
        (lambda f: f.update({first_picture(f): b"x"}), "images"),
        (edit_json("samples/about.json", lambda v: v.update(seed=6)), "images"),
        (edit_json("samples/about.json", lambda v: v.update(count=10)), "images"),
        (edit_json("samples/about.json", lambda v: v.update(seed="5")), "images"),
        (edit_json("samples/about.json", lambda v: v.update(steps=10**9)), "images"),
        (edit_text("samples/metadata.csv", ",0,0", ",9,0"), "images"),
        (lambda f: f.pop("samples/metadata.csv"), "images"),
        (lambda f: f.pop("samples/about.json"), "images"),
    ],
)
def test_tampering_by_someone_who_mends_the_checksums(edit, check, bundle, tmp_path) -> None:
    files = contents(bundle)
    edit(files)
    assert failed(packed(with_manifest(files), tmp_path / "b.zip"))[0] == check


def test_certificate_that_hides_an_insecure_seed(tmp_path) -> None:
    settings = {**TINY_SETTINGS, "privacy": {"insecure_seed": 3}}
    run = dpsyngen.train(tiny_arrays(), epsilon=4.0, out=tmp_path / "r", settings=settings)
    out = pack(run, tmp_path / "s.zip", not_private=True).path
    assert failed(out)[0] == "guarantee"
    files = contents(out)
    edit_certificate(lambda v: v.update(private=True, not_private_because=[]))(files)
    edit_json("generator.json", lambda v: v.update(private=True))(files)
    assert failed(packed(with_manifest(files), tmp_path / "b.zip"))[0] == "settings"


@pytest.mark.parametrize("change", [not_a_number, lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()}])
def test_weights_that_no_sampler_reads_are_looked_at_too(change, tmp_path) -> None:
    """What the private network started from is in the bundle for those who train on."""
    settings = merged(TINY_SETTINGS, stages={"variant": "finetune"})
    run = dpsyngen.train(tiny_arrays(), epsilon=4.0, out=tmp_path / "r", settings=settings)
    files = contents(pack(run, tmp_path / "s.zip").path)
    name = "weights/pretrain.safetensors"
    files[name] = save(change(load(files[name])))
    check, text = failed(packed(with_manifest(files), tmp_path / "b.zip"))
    assert (check, "pretrain.safetensors" in text) == ("generator", True)


@pytest.mark.parametrize("manifest", [b"", b"[]", b"{}", b'{"format": 99}', b'{"format": 1, "files": []}', b"[" * 9999])
def test_damaged_manifests(manifest, bundle, tmp_path) -> None:
    files = {**contents(bundle), "manifest.json": manifest}
    assert failed(packed(files, tmp_path / "b.zip"))[0] == "archive"


def test_no_zip_at_all(tmp_path) -> None:
    (tmp_path / "b.zip").write_bytes(b"hello")
    assert failed(tmp_path / "b.zip")[0] == "archive"
    assert failed(tmp_path / "none.zip")[0] == "archive"


def test_verifying_needs_nothing_but_the_bundle(bundle, tmp_path, monkeypatch) -> None:
    """It opens no file outside the bundle, its own scratch folder and the installed packages."""
    import sys
    import sysconfig
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    verify(bundle)  # everything is imported by now
    opened: list[str] = []
    active = [True]

    def hook(event: str, arguments: tuple) -> None:
        if active[0] and event == "open" and isinstance(arguments[0], str):
            opened.append(arguments[0])

    sys.addaudithook(hook)
    assert verify(bundle).passed
    active[0] = False
    allowed = (
        str(tmp_path),
        str(bundle),
        str(Path(dpsyngen.__file__).parent),
        sysconfig.get_paths()["purelib"],
        sysconfig.get_paths()["stdlib"],
        "/proc/",
        "/sys/",
        "/dev/",
    )
    assert opened
    # Clearing the scratch folder opens names relative to its folders.
    assert [p for p in opened if not p.startswith(allowed) and (Path(p).is_absolute() or Path(p).exists())] == []


def test_a_picture_in_the_report_is_no_script_whatever_its_bytes() -> None:
    """Base64 of a PNG can end in "/on…=", which looks like an event's attribute."""
    import base64

    from dpsyngen.release.verify import _ACTIVE

    end = b"\0\0\0\0IEND\xaeB`\x82"
    texts = [base64.b64encode(base64.b64decode("AA/onAAA") + bytes(shift) + end).decode().lower() for shift in range(3)]
    assert sum(bool(re.search(r"\bon\w+\s*=", text)) for text in texts) == 2  # the third has no "=" at its end
    for text in texts:
        assert not _ACTIVE.search(f'<img src="data:image/png;base64,{text}">')
    for page in ('<img onload="x">', "<a/onclick = x>", '<p on=""onfocus=x>', "<script>", '<a href="javascript:x">'):
        assert _ACTIVE.search(page.lower())
