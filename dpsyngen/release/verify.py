"""Checking a bundle on a machine that has no private image: does everything in it fit together?

Each check is a row with a verdict in words.  What cannot be seen from a bundle is said, too: whether the training did
what the certificate says.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpsyngen.config import Config, validate
from dpsyngen.diffusion.stages import GAUSSIAN, Stage
from dpsyngen.errors import DpsyngenError, ReleaseError, printable
from dpsyngen.files import read_yaml
from dpsyngen.generator.generator import ReleasedGenerator
from dpsyngen.privacy.certificate import Certificate, number, plain_words, schema_text
from dpsyngen.release.bundle import (
    FORMAT,
    MANIFEST,
    SAMPLES,
    SCHEMA,
    SIGNATURE,
)
from dpsyngen.release.card import CARD, COMPANIONS, OPTIONAL, REQUIRED, WEIGHTS, code, digest_of, model_card
from dpsyngen.release.safe_zip import SafeZip, open_zip
from dpsyngen.release.signing import check_signature, fingerprint, read_public_key
from dpsyngen.training.plan import stages_of
from dpsyngen.version import __version__

_NAMES = frozenset({*REQUIRED, *OPTIONAL, *COMPANIONS, SCHEMA, MANIFEST, SIGNATURE})
_REDRAWN = 16
_MOST_STEPS = 1000
_LEAST_NOISE = 0.03  # an ε of thousands, which would take minutes to compute
_LONGEST = 2000
_SAME = 2.0  # grey levels, on average: machines differ in the last bits
_TOLERANCE = 1e-3  # relative, between versions of the accountant
# In lower case.  One embedded PNG in some two thousand has "/on…=" where its base64 ends, and always with these
# letters, which are the end of every PNG and of no event's name.
_ACTIVE = re.compile(r"<script|<iframe|<object|<embed|\bon(?!\w*(?:suvork5cyii|jru5erkjggg)=)\w+\s*=|javascript:")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        passed: True, False, or None where it could not be judged.
        text: what was found, in words.
    """

    name: str
    passed: bool | None
    text: str


@dataclass
class Verdict:
    """All that was found.

    Attributes:
        checks: in the order in which they were made.
        certificate: what the bundle claims, if that could be read.
    """

    checks: list[Check] = field(default_factory=list)
    certificate: Certificate | None = None

    @property
    def passed(self) -> bool:
        """Whether no check failed and the checks were made to the end."""
        return (
            bool(self.checks) and self.checks[-1].name == "images" and all(c.passed is not False for c in self.checks)
        )


def verify(path: Path, public_key: Path | None = None, all_samples: bool = False) -> Verdict:
    """Check a bundle.

    Args:
        path: the zip.
        public_key: PEM file of the key that must have signed it; None: a signature is checked against the key that
            it names, which shows that nothing changed since, but not who signed.
        all_samples: draw all generated images again and compare them, not only some.

    Returns:
        every check, up to the one after which no other makes sense.

    Raises:
        ConfigError: `public_key` is no key.
    """
    trusted = None if public_key is None else read_public_key(public_key)
    verdict = Verdict()
    with tempfile.TemporaryDirectory(prefix="dpsyngen-verify-") as scratch:
        steps = _Verification(path, Path(scratch), None if trusted is None else fingerprint(trusted), all_samples)
        try:
            for check in steps.checks():
                # What a stranger wrote may hold anything, and is on its way to a terminal.
                verdict.checks.append(replace(check, text=printable(check.text, _LONGEST)))
        except DpsyngenError as error:
            verdict.checks.append(Check(steps.current, False, printable(error, _LONGEST)))
        verdict.certificate = steps.certificate
    return verdict


class _Verification:
    """The checks in their order; one that raises ends them."""

    def __init__(self, path: Path, folder: Path, trusted: str | None, all_samples: bool) -> None:
        self.path, self.folder, self.trusted, self.all_samples = path, folder, trusted, all_samples
        self.current = "archive"
        self.certificate: Certificate | None = None

    def checks(self) -> Iterator[Check]:
        with open_zip(self.path) as bundle:
            yield self._archive(bundle)
            yield self._named("signature", lambda: self._signature(bundle))
            yield self._named("checksums", lambda: self._checksums(bundle))
        c = self.certificate = self._certificate()
        yield Check("certificate", True, "is of the published schema")
        yield self._named("guarantee", lambda: self._guarantee(c))
        yield self._named("privacy cost", lambda: self._cost(c))
        yield self._named("plain words", lambda: self._words(c))
        yield self._named("model card", lambda: self._card(c))
        yield self._named("code", lambda: self._code(c))
        config = self._config()
        yield self._named("settings", lambda: self._settings(c, config))
        yield self._named("report", self._report)
        self.current = "generator"
        generator = ReleasedGenerator(self.folder)
        yield self._named("generator", lambda: self._generator(c, generator))
        yield self._named("images", lambda: self._images(generator))

    def _named(self, name: str, check: Callable[[], tuple[bool | None, str]]) -> Check:
        self.current = name
        passed, text = check()
        return Check(name, passed, text)

    # ------------------------------------------------------------------------------------- the container

    def _archive(self, bundle: SafeZip) -> Check:
        def expected(name: str) -> bool:
            weights = re.fullmatch(WEIGHTS + r"[a-z][a-z-]{0,40}\.safetensors", name)
            in_samples = name.startswith(SAMPLES) and (
                name.endswith(".png") or name in (f"{SAMPLES}metadata.csv", f"{SAMPLES}about.json")
            )
            return name in _NAMES or bool(weights) or in_samples

        foreign = sorted(n for n in bundle.sizes if not expected(n))
        if foreign:
            raise ReleaseError(f"it holds files that no release has: {', '.join(map(ascii, foreign[:10]))}")
        missing = sorted({*REQUIRED, *COMPANIONS, SCHEMA, MANIFEST} - set(bundle.sizes))
        if missing:
            raise ReleaseError(f"it lacks {', '.join(missing)}")
        self.manifest = _json(bundle.read(MANIFEST), MANIFEST)
        files = self.manifest.get("files")
        if self.manifest.get("format") != FORMAT or not isinstance(files, dict):
            raise ReleaseError(
                f"its manifest is of format {self.manifest.get('format')!r}, but this version reads format {FORMAT}"
            )
        listed, there = set(files), set(bundle.sizes) - {MANIFEST, SIGNATURE}
        if listed != there:
            odd = sorted(map(ascii, listed ^ there))[:10]
            raise ReleaseError(f"its manifest and its files do not agree on {', '.join(odd)}")
        size = sum(bundle.sizes.values())
        return Check("archive", True, f"{len(bundle.sizes):,} files, {size / 1e6:,.1f} MB, and nothing else in it")

    def _signature(self, bundle: SafeZip) -> tuple[bool | None, str]:
        if SIGNATURE not in bundle.sizes:
            if self.trusted is not None:
                return False, "is missing, but a key to check it with was given"
            return None, "there is none: anybody could have made this bundle"
        key = fingerprint(check_signature(bundle.read(MANIFEST), bundle.read(SIGNATURE)))
        if self.trusted is None:
            return None, f"is whole, by the key {key}; compare that with what you know, or give --public-key"
        if key != self.trusted:
            return False, f"is by the key {key}, not by the one that was given ({self.trusted})"
        return True, f"is by the key that was given ({key})"

    def _checksums(self, bundle: SafeZip) -> tuple[bool, str]:
        for name, entry in self.manifest["files"].items():
            digest = hashlib.sha256()
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "xb") as f:
                for chunk in bundle.chunks(name):
                    digest.update(chunk)
                    f.write(chunk)
            if not isinstance(entry, dict) or entry != {"bytes": bundle.sizes[name], "sha256": digest.hexdigest()}:
                raise ReleaseError(f"{name!a} is not what the manifest says: it was changed or damaged")
        return True, f"all {len(self.manifest['files']):,} files are as they were packed (SHA-256)"

    # ----------------------------------------------------------------------------------------- the claim

    def _text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ReleaseError(f"{name} is not UTF-8 text") from None

    def _certificate(self) -> Certificate:
        self.current = "certificate"
        certificate = Certificate.from_json(self._text("privacy.json"), "privacy.json")
        if self._text(SCHEMA) != schema_text():
            raise ReleaseError(f"{SCHEMA} is not the schema of this version of dpsyngen")
        return certificate

    def _guarantee(self, c: Certificate) -> tuple[bool, str]:
        if not c.private:
            return False, f"NOT PRIVATE: {'; '.join(c.not_private_because)}"
        if c.delta >= 1 / c.public_assumptions.records:
            return False, f"δ = {c.delta} is not below 1/n = 1/{c.public_assumptions.records:,}"
        assert c.epsilon != "inf"
        return True, f"ε = {number(c.epsilon, up=True)}, δ = {number(c.delta, 3, up=True)}, for {c.unit}"

    def _cost(self, c: Certificate) -> tuple[bool, str]:
        least = min((m.noise_multiplier for m in c.mechanisms if m.noise_multiplier is not None), default=1.0)
        if least < _LEAST_NOISE:
            return False, f"a noise multiplier of {number(least)} is as good as none: ε is beyond all measure"
        try:
            by_pld, by_rdp = c.recompute("pld"), c.recompute("rdp")
        except (ValueError, ArithmeticError, MemoryError) as error:
            return False, f"ε cannot be computed from these mechanisms: {error}"
        text = f"computed again: ε ≤ {number(by_pld, up=True)} by PLD, ε ≤ {number(by_rdp, up=True)} by Rényi DP"
        if math.isinf(by_rdp):
            text = f"computed again: ε ≤ {number(by_pld, up=True)} by PLD" if math.isfinite(by_pld) else "no bound"
        stated = math.inf if c.epsilon == "inf" else c.epsilon
        if by_pld > stated * (1 + _TOLERANCE):
            return False, f"{text}, more than the ε = {number(stated)} that is stated"
        return True, text

    def _words(self, c: Certificate) -> tuple[bool, str]:
        if self._text("PRIVACY.md") != plain_words(c):
            return False, "PRIVACY.md does not say what privacy.json says"
        return True, "PRIVACY.md says what privacy.json says"

    def _card(self, c: Certificate) -> tuple[bool, str]:
        if self._text(CARD) != model_card(c, digest_of((self.folder / "privacy.json").read_bytes())):
            return False, f"{CARD} does not say what privacy.json says"
        return True, f"{CARD} says what privacy.json says"

    def _code(self, c: Certificate) -> tuple[bool, str]:
        other = [name for name, text in code().items() if self._text(name) != text]
        if other:
            return False, (
                f"{', '.join(other)}: not what dpsyngen {__version__} writes.  Diffusers would run it: do not.  "
                f"(The certificate names dpsyngen {c.dpsyngen}; another version writes other code.)"
            )
        return True, f"what diffusers would run is the code that dpsyngen {__version__} writes"

    # -------------------------------------------------------------------------------------- the settings

    def _config(self) -> Config:
        self.current = "settings"
        loaded = read_yaml(self._text("config.yaml"), "config.yaml")
        if not isinstance(loaded, dict):
            raise ReleaseError("config.yaml holds no settings")
        return validate(loaded)

    def _settings(self, c: Certificate, config: Config) -> tuple[bool, str]:
        """Whether the settings would have led to what the certificate states."""
        n = c.public_assumptions.records
        steps = [m for m in c.mechanisms if m.expected_batch is not None]
        taken = sum(m.count or 0 for m in steps)
        program = {k: v for k, v in c.programmatic_images.items() if k != "prior_tier_meaning"}
        named = {"name": config.program.name, "seed": config.program.seed, "prior_tier": config.program.prior_tier}
        size = {"resolution": c.public_assumptions.resolution, "channels": c.public_assumptions.channels}
        facts: list[tuple[str, Any, Any]] = [
            ("group size", config.privacy.group_size, c.group_size),
            ("variant", config.stages.variant, c.variant),
            ("preset", config.preset, c.preset),
            ("program", {**named, **size, **config.program.params}, program),
            ("data", "" if not config.data.source and config.data.cache == "auto" else "a path", ""),
            ("seed", config.privacy.insecure_seed is None or not c.private, True),
        ]
        if config.privacy.delta is not None:
            facts.append(("δ", config.privacy.delta, c.delta))
        if config.data.records is not None:
            facts.append(("number of images", config.data.records, n))
        stages = stages_of(config)
        facts.append(("stages", [_stage_of(s) for s in stages.stages], [s.model_dump() for s in c.stages]))
        if stages.moments:
            # Each is charged before it is taken, so a certificate without them states too small an ε.
            queries = 2 if len(c.public_assumptions.class_names) < 2 else 3
            facts.append(("DP moments", len(c.mechanisms) - len(steps) >= queries, True))
        if c.epsilon != "inf":
            facts += [
                ("number of steps", 0 if stages.gaussian else config.private.steps, taken),
                ("target", config.privacy.epsilon >= c.epsilon, True),
            ]
        for m in steps:
            facts.append(("batch", float(config.private.batch), m.expected_batch))
            facts.append(("clipping", config.private.clipping, m.clipping))
            if m.kind == "dp" and m.sampling_rate is not None:
                facts.append(("clipping norm", config.privacy.clipping_norm, m.l2_sensitivity))
                facts.append(("sampling rate", math.isclose(config.private.batch / n, m.sampling_rate), True))
        wrong = [name for name, a, b in facts if a != b]
        if wrong:
            return False, f"config.yaml contradicts the certificate in: {', '.join(dict.fromkeys(wrong))}"
        return True, "config.yaml agrees with the certificate, and names no path of the holder's"

    def _report(self) -> tuple[bool | None, str]:
        file = self.folder / "report.html"
        if not file.exists():
            return None, "there is none"
        text = self._text("report.html").lower()
        active = _ACTIVE.search(text)
        outside = re.search(r"(?:src|href|action|url)\s*[=(]\s*[\"']?\s*(?:https?:|//|file:)", text)
        if active or outside:
            return False, "report.html would run a script or fetch something: do not open it"
        return True, "report.html runs no script and fetches nothing (what it says was not checked)"

    # ------------------------------------------------------------------------------------- the generator

    def _generator(self, c: Certificate, generator: ReleasedGenerator) -> tuple[bool, str]:
        a = c.public_assumptions
        described = _json((self.folder / "generator.json").read_bytes(), "generator.json")
        facts = [
            ("size", (generator.resolution, generator.channels), (a.resolution, a.channels)),
            ("classes", list(generator.class_names), a.class_names),
            ("stages", described.get("stages"), [s.model_dump(mode="json") for s in c.stages]),
            ("private", generator.private, c.private),
        ]
        wrong = [name for name, x, y in facts if x != y]
        files = {s.network for s in c.stages} | ({"pretrain"} if c.pretrained_on_programmatic_images else set())
        if {p.stem for p in (self.folder / "weights").iterdir()} != files:
            wrong.append("networks")
        if wrong:
            return False, f"contradicts the certificate in: {', '.join(wrong)}"
        for file in sorted((self.folder / "weights").iterdir()):
            _check_weights(file)
        count = len(files - {GAUSSIAN})
        parts = [f"{count} network{'s' if count > 1 else ''}"] if count else []
        parts += ["DP moments"] if GAUSSIAN in files else []
        return True, f"its weights are whole; {' and '.join(parts)} as the certificate says"

    def _images(self, generator: ReleasedGenerator) -> tuple[bool | None, str]:
        if not (self.folder / SAMPLES).is_dir():
            drawn = generator.sample(min(4, max(1, len(generator.class_names) or 4)), steps=4).images
            return True, f"it draws images ({drawn.shape[1]} × {drawn.shape[2]} × {drawn.shape[3]}); no samples in it"
        about = _json((self.folder / SAMPLES / "about.json").read_bytes(), "samples/about.json")
        paths, labels = _table(self.folder / SAMPLES, generator)
        if about.get("count") != len(paths):
            return False, f"samples/about.json speaks of {about.get('count')!r} images, but there are {len(paths):,}"
        keys = ("seed", "sampler", "steps", "guidance")
        settings: dict[str, Any] = {k: about.get(k) for k in keys} | (
            {"churn": about["churn"]} if about.get("churn") else {}
        )
        known: dict[str, Any] = {
            "seed": int,
            "sampler": str,
            "steps": int,
            "guidance": (int, float),
            "churn": (int, float),
        }
        if any(
            isinstance(v, bool) or not isinstance(v, known[k]) or (k != "sampler" and not -(2**63) < v < 2**63)
            for k, v in settings.items()
        ):
            return False, "samples/about.json does not say how the images were drawn"
        if settings["steps"] > _MOST_STEPS:
            return (
                False,
                f"samples/about.json asks for {settings['steps']:,} sampler steps; at most {_MOST_STEPS:,} are taken",
            )
        count = len(paths) if self.all_samples else min(_REDRAWN, len(paths))
        drawn = generator.sample(count, labels=None if labels is None else labels[:count], **settings).images
        stored = np.stack([_picture(p, generator) for p in paths[:count]])
        for path in paths[count:]:
            _picture(path, generator)
        apart = np.abs(drawn.astype(int) - stored.astype(int)).mean((1, 2, 3))
        if (apart > _SAME).any():
            return False, f"{int((apart > _SAME).sum())} of {count} samples are not what the generator draws"
        rest = "" if count == len(paths) else f" of {len(paths):,} (--all-samples draws all)"
        return True, f"drew {count:,} samples again{rest}: they are the generator's"


def _stage_of(stage: Stage) -> dict[str, Any]:
    """As a certificate has it."""
    low, high = (None if math.isinf(x) else x for x in (stage.low, stage.high))
    values = {"name": stage.name, "log_sigma_low": low, "log_sigma_high": high}
    return values | {"trained_by": stage.trainer, "network": stage.network}


def _json(data: bytes, name: str) -> dict[str, Any]:
    try:
        loaded = json.loads(data)
    except (ValueError, RecursionError):
        loaded = None
    if not isinstance(loaded, dict):
        raise ReleaseError(f"{name} is not a JSON object")
    return loaded


def _check_weights(file: Path) -> None:
    """Refuse weights with text beside the tensors, or that are not finite."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as f:
            if f.metadata():
                raise ReleaseError(f"{file.name} holds text beside its tensors")
            for key in f.keys():  # noqa: SIM118
                if not bool(torch.isfinite(f.get_tensor(key)).all()):
                    raise ReleaseError(f"{file.name} holds numbers that are not finite: the training had diverged")
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, ReleaseError):
            raise
        raise ReleaseError(f"{file.name} is damaged: {error}") from None


def _table(folder: Path, generator: ReleasedGenerator) -> tuple[list[Path], np.ndarray | None]:
    """Files and labels of samples, in the order in which they were drawn."""
    try:
        text = (folder / "metadata.csv").read_text(encoding="utf-8")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        files = [r["file_name"] for r in rows]
        labels = np.array([int(r["label"]) for r in rows], dtype=np.int64) if generator.class_names else None
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise ReleaseError(f"samples/metadata.csv is damaged ({error})") from None
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*.png")}
    if not files or set(files) != there or len(there) != len(files):
        raise ReleaseError("samples/metadata.csv and the pictures do not agree")
    if labels is not None and not ((labels >= 0) & (labels < len(generator.class_names))).all():
        raise ReleaseError("samples/metadata.csv has labels that the generator does not know")
    return [folder / f for f in files], labels


def _picture(path: Path, generator: ReleasedGenerator) -> np.ndarray:
    """uint8 [C, H, W] of a PNG that holds pixels and nothing else."""
    from PIL import Image

    _check_chunks(path, generator)
    try:
        with Image.open(path, formats=("PNG",)) as image:
            pixels = np.asarray(image, dtype=np.uint8)
    except Exception as error:  # Pillow raises nearly anything for broken files
        raise ReleaseError(f"{path.name} is broken: {error}") from None
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _check_chunks(path: Path, generator: ReleasedGenerator) -> None:
    """Refuse a PNG with anything but its header, its pixels and its end, or of another form than the generator's.

    Before Pillow sees it, which takes a large size in the header at its word.
    """
    data, at, kinds = path.read_bytes(), 8, []
    while at + 8 <= len(data):
        kinds.append(data[at + 4 : at + 8])
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    if at != len(data) or kinds[:1] != [b"IHDR"] or kinds[-1:] != [b"IEND"] or set(kinds[1:-1]) != {b"IDAT"}:
        raise ReleaseError(f"{path.name} holds more than pixels, or is broken")
    # Width, height, 8 bits, grey or RGB, and the only values of compression, filter and interlacing that we write.
    side = generator.resolution.to_bytes(4, "big")
    if data[16:29] != side + side + bytes((8, 0 if generator.channels == 1 else 2, 0, 0, 0)):
        raise ReleaseError(f"{path.name} is not an image of this generator")
