"""Checking a bundle on a machine that has no private image: does everything in it fit together?

Each check is a row with a verdict in words.  What cannot be seen from a bundle is said, too: whether the training did
what the certificate says.
"""

from __future__ import annotations

import csv
import io
import math
import re
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from dpsyngen.config import validate
from dpsyngen.diffusion.prior import SHIPPED, digest, read_prior
from dpsyngen.diffusion.stages import GAUSSIAN
from dpsyngen.errors import ConfigError, DpsyngenError, ReleaseError, printable
from dpsyngen.files import file_sha256, read_yaml
from dpsyngen.generator.generator import ReleasedGenerator
from dpsyngen.generator.guarantee import Guarantee
from dpsyngen.privacy.certificate import Certificate, number, plain_words, protected, schema_text
from dpsyngen.release.bundle import MANIFEST, SAMPLES, SCHEMA, SIGNATURE, open_zip
from dpsyngen.release.card import CARD, COMPANIONS, OPTIONAL, REQUIRED, WEIGHTS, code, model_card
from dpsyngen.release.signing import check_signature, fingerprint, read_public_key
from dpsyngen.release.write import stage_parts
from dpsyngen.training.plan import stages_of
from dpsyngen.version import __version__

_NAMES = frozenset({*REQUIRED, *OPTIONAL, *COMPANIONS, SCHEMA, MANIFEST, SIGNATURE})
_OTHER_NAMES = re.compile(
    rf"{WEIGHTS}[a-z][a-z-]{{0,40}}\.safetensors|{SAMPLES}(.*\.png|metadata\.csv|about\.json)", re.DOTALL
)
_REDRAWN = 16
_MOST_STEPS = 1000
_LEAST_NOISE = 0.03  # an ε of thousands, which would take minutes to compute
_LONGEST = 2000
_SAME = 2.0  # grey levels, on average: machines differ in the last bits
_TOLERANCE = 1e-3  # relative, between versions of the accountant
# In lower case.  One embedded PNG in some two thousand has "/on…=" where its base64 ends, and always with these
# letters, which are the end of every PNG and of no event's name.
_ACTIVE = re.compile(r"<script|<iframe|<object|<embed|\bon(?!\w*(?:suvork5cyii|jru5erkjggg)=)\w+\s*=|javascript:")
_OUTSIDE = re.compile(r"(?:src|href|action|url)\s*[=(]\s*[\"']?\s*(?:https?:|//|file:)")

Finding = tuple[bool | None, str]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and what was found, in words."""

    name: str
    passed: bool | None  # None: it could not be judged
    text: str


@dataclass
class Verdict:
    """All checks, in the order in which they were made, and what the bundle claims, if that could be read."""

    checks: list[Check] = field(default_factory=list)
    certificate: Certificate | None = None

    @property
    def passed(self) -> bool:
        """Whether the checks were made to the end and none failed."""
        last = self.checks[-1].name if self.checks else ""
        return last == "images" and all(c.passed is not False for c in self.checks)


def verify(path: Path, public_key: Path | None = None, all_samples: bool = False) -> Verdict:
    """Check a bundle.

    Args:
        path: the zip.
        public_key: PEM file of the key that must have signed it; None: a signature is checked against the key that
            it names, which shows that nothing changed since, but not who signed.  ConfigError if it is no key.
        all_samples: draw all generated images again and compare them, not only some.
    """
    trusted = None if public_key is None else fingerprint(read_public_key(public_key))
    verdict = Verdict()
    with tempfile.TemporaryDirectory(prefix="dpsyngen-verify-") as scratch, ExitStack() as stack:
        bundle = _Bundle(path, Path(scratch), stack, trusted, all_samples)
        for name, check in bundle.checks().items():
            try:
                passed, text = check()
            except DpsyngenError as error:
                # Later checks rest on this one.
                verdict.checks.append(Check(name, False, printable(error, _LONGEST)))
                break
            # What a stranger wrote may hold anything, and is on its way to a terminal.
            verdict.checks.append(Check(name, passed, printable(text, _LONGEST)))
        verdict.certificate = bundle.certificate
    return verdict


class _Bundle:
    """A bundle under examination.  A check gives (passed, text); one that raises DpsyngenError ends them."""

    certificate: Certificate | None = None

    def __init__(self, path: Path, folder: Path, stack: ExitStack, trusted: str | None, all_samples: bool) -> None:
        self.path, self.folder, self.stack = path, folder, stack
        self.trusted, self.all_samples = trusted, all_samples

    def checks(self) -> dict[str, Callable[[], Finding]]:
        return {
            "archive": self._archive,
            "signature": self._signature,
            "checksums": self._checksums,
            "certificate": self._certificate,
            "guarantee": self._guarantee,
            "privacy cost": self._cost,
            "plain words": lambda: self._says("PRIVACY.md", plain_words(self.c)),
            "model card": lambda: self._says(CARD, model_card(self.c, file_sha256(self.folder / "privacy.json"))),
            "code": self._code,
            "settings": self._settings,
            "report": self._report,
            "generator": self._generator,
            "images": self._images,
        }

    def _archive(self) -> Finding:
        self.zip = self.stack.enter_context(open_zip(self.path))
        sizes = self.zip.sizes
        foreign = sorted(n for n in sizes if n not in _NAMES and not _OTHER_NAMES.fullmatch(n))
        if foreign:
            raise ReleaseError(f"it holds files that no release has: {', '.join(map(ascii, foreign[:10]))}")
        missing = sorted({*REQUIRED, *COMPANIONS, SCHEMA, MANIFEST} - set(sizes))
        if missing:
            raise ReleaseError(f"it lacks {', '.join(missing)}")
        self.files = self.zip.manifest()["files"]
        return True, f"{len(sizes):,} files, {sum(sizes.values()) / 1e6:,.1f} MB, and nothing else in it"

    def _signature(self) -> Finding:
        if SIGNATURE not in self.zip.sizes:
            if self.trusted is not None:
                return False, "is missing, but a key to check it with was given"
            return None, "there is none: anybody could have made this bundle"
        key = fingerprint(check_signature(self.zip.read(MANIFEST), self.zip.read(SIGNATURE)))
        if self.trusted is None:
            return None, f"is whole, by the key {key}; compare that with what you know, or give --public-key"
        if key != self.trusted:
            return False, f"is by the key {key}, not by the one that was given ({self.trusted})"
        return True, f"is by the key that was given ({key})"

    def _checksums(self) -> Finding:
        for name in self.files:
            self.zip.extract(name, self.folder)
        return True, f"all {len(self.files):,} files are as they were packed (SHA-256)"

    def _text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise ReleaseError(f"{name} is missing, or not UTF-8 text") from None

    def _certificate(self) -> Finding:
        self.certificate = self.c = Guarantee.from_json(self._text("privacy.json"), "privacy.json")
        if self._text(SCHEMA) != schema_text():
            raise ReleaseError(f"{SCHEMA} is not the schema of this version of dpsyngen")
        return True, "is of the published schema"

    def _guarantee(self) -> Finding:
        c = self.c
        if not c.private:
            return False, f"NOT PRIVATE: {'; '.join(c.not_private_because)}"
        if (c.unit, c.adjacency) != (expected := protected(c.group_size, c.by_person)):
            return False, f"what it says that ε is for does not follow from its numbers, which make it {expected[0]}"
        if c.delta >= 1 / c.public_assumptions.records:
            return False, f"δ = {c.delta} is not below 1/n = 1/{c.public_assumptions.records:,}"
        return True, f"ε = {number(c.epsilon, up=True)}, δ = {number(c.delta, 3, up=True)}, for {c.unit}"

    def _cost(self) -> Finding:
        c = self.c
        least = min((m.noise_multiplier for m in c.mechanisms if m.noise_multiplier is not None), default=1.0)
        if least < _LEAST_NOISE:
            return False, f"a noise multiplier of {number(least)} is as good as none: ε is beyond all measure"
        try:
            by_pld, by_rdp = c.recompute("pld"), c.recompute("rdp")
        except (ValueError, ArithmeticError, MemoryError) as error:
            return False, f"ε cannot be computed from these mechanisms: {error}"
        bounds = [("PLD", by_pld), ("Rényi DP", by_rdp)]
        text = ", ".join(f"ε ≤ {number(x, up=True)} by {name}" for name, x in bounds if math.isfinite(x)) or "no bound"
        if by_pld > c.epsilon * (1 + _TOLERANCE):
            return False, f"computed again: {text}, more than the ε = {number(c.epsilon)} that is stated"
        return True, f"computed again: {text}"

    def _says(self, name: str, expected: str) -> Finding:
        same = self._text(name) == expected
        return same, f"{name} {'says' if same else 'does not say'} what privacy.json says"

    def _code(self) -> Finding:
        other = [name for name, text in code().items() if self._text(name) != text]
        if other:
            return False, (
                f"{', '.join(other)}: not what dpsyngen {__version__} writes.  Diffusers would run it: do not.  "
                f"(The certificate names dpsyngen {self.c.dpsyngen}; another version writes other code.)"
            )
        return True, f"what diffusers would run is the code that dpsyngen {__version__} writes"

    def _settings(self) -> Finding:
        """Whether the settings would have led to what the certificate states."""
        config, c = validate(read_yaml(self._text("config.yaml"), "config.yaml")), self.c
        stages, a = stages_of(config), c.public_assumptions
        n, finite = a.records, math.isfinite(c.epsilon)
        steps = [m for m in c.mechanisms if m.expected_batch is not None]
        noisy = [m for m in steps if m.kind == "dp" and m.sampling_rate is not None]
        taken, planned = sum(m.count or 0 for m in steps), 0 if stages.gaussian else config.private.steps
        program = {"name": config.program.name, "seed": config.program.seed, "prior_tier": config.program.prior_tier}
        program |= {"resolution": a.resolution, "channels": a.channels, **config.program.params}
        # Each query of DP moments is charged before it is made, so a certificate without them states too small an ε.
        queries = 0 if not stages.moments else 2 if len(a.class_names) < 2 else 3
        # What a prior of the holder's own was trained on, nothing shows; "shipped" can be looked up.
        prior = c.prior if config.network.prior else None
        if config.network.prior == SHIPPED and stages.moments and stages.networks:
            prior = read_prior(SHIPPED, a.channels).about
        agrees = {
            "group size": config.privacy.group_size == c.group_size,
            "images of a person": c.by_person == (config.privacy.most_per_person is not None)
            and config.privacy.most_per_person in (None, c.group_size)
            and (c.people is not None or not c.by_person),
            "variant": config.stages.variant == c.variant,
            "preset": config.preset == c.preset,
            "program": program == {k: v for k, v in c.programmatic_images.items() if k != "prior_tier_meaning"},
            "data": (config.data.source, config.data.cache) == ("", "auto")
            and config.data.labels in (True, False)
            and config.privacy.groups is None,
            "seed": config.privacy.insecure_seed is None or not c.private,
            "δ": config.privacy.delta in (None, c.delta),
            "number of images": config.data.records in (None, n),
            "stages": stage_parts(stages) == c.stages,
            "prior": c.prior == prior,
            "DP moments": len(c.mechanisms) - len(steps) >= queries,
            "number of steps": taken == planned or not finite,
            "target": not finite or config.privacy.epsilon >= c.epsilon,
            "batch": all(m.expected_batch == config.private.batch for m in steps),
            "clipping": all(m.clipping == config.private.clipping for m in steps),
            "clipping norm": all(m.l2_sensitivity == config.privacy.clipping_norm for m in noisy),
            "sampling rate": all(math.isclose(config.private.batch / n, m.sampling_rate or 0) for m in noisy),
        }
        wrong = [name for name, same in agrees.items() if not same]
        if wrong:
            return False, f"config.yaml contradicts the certificate in: {', '.join(wrong)}"
        return True, "config.yaml agrees with the certificate, and names no path of the holder's"

    def _report(self) -> Finding:
        if not (self.folder / "report.html").exists():
            return None, "there is none"
        text = self._text("report.html").lower()
        if _ACTIVE.search(text) or _OUTSIDE.search(text):
            return False, "report.html would run a script or fetch something: do not open it"
        return True, "report.html runs no script and fetches nothing (what it says was not checked)"

    def _generator(self) -> Finding:
        generator = self.generator = ReleasedGenerator(self.folder)
        c, a = self.c, self.c.public_assumptions
        files = {s.network for s in c.stages} | ({"pretrain"} if c.pretrained_on_programmatic_images else set())
        agrees = {
            "size": (generator.resolution, generator.channels) == (a.resolution, a.channels),
            "classes": list(generator.class_names) == a.class_names,
            "stages": stage_parts(generator.stages) == c.stages,
            "private": generator.private == c.private,
            # Weights that claim to be no private image's must be those that the certificate names.
            "prior": all(
                c.prior is not None
                and digest(generator.networks[s.network].network.state_dict()) == c.prior.get("sha256")
                for s in c.stages
                if s.trained_by == "prior"
            ),
            "networks": {p.stem for p in (self.folder / "weights").iterdir()} == files,
        }
        wrong = [name for name, same in agrees.items() if not same]
        if wrong:
            return False, f"contradicts the certificate in: {', '.join(wrong)}"
        for file in sorted((self.folder / "weights").iterdir()):
            try:
                with safe_open(file, framework="pt") as weights:
                    text = weights.metadata()
                    finite = all(bool(weights.get_tensor(k).isfinite().all()) for k in weights.keys())  # noqa: SIM118
            except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError) as error:
                raise ReleaseError(f"{file.name} is damaged: {error}") from None
            if text:
                raise ReleaseError(f"{file.name} holds text beside its tensors")
            if not finite:
                raise ReleaseError(f"{file.name} holds numbers that are not finite: the training had diverged")
        count = len(files - {GAUSSIAN})
        parts = [f"{count} network{'s' if count > 1 else ''}"] if count else []
        parts += ["DP moments"] if GAUSSIAN in files else []
        own = "; what the prior was trained on is the holder's word, unless it is the shipped one"
        return True, f"its weights are whole; {' and '.join(parts)} as the certificate says{own if c.prior else ''}"

    def _images(self) -> Finding:
        """Whether the generator draws, and the samples are what it draws."""
        generator, folder = self.generator, self.folder / SAMPLES
        if not folder.is_dir():
            drawn = generator.sample(min(4, max(1, len(generator.class_names) or 4)), steps=4).images
            return True, f"it draws images ({drawn.shape[1]} × {drawn.shape[2]} × {drawn.shape[3]}); no samples in it"
        paths, labels = _table(folder, self._text(f"{SAMPLES}metadata.csv"), generator)
        try:
            about = _Drawn.model_validate_json(self._text(f"{SAMPLES}about.json"))
            settings = generator.settings(**about.model_dump(exclude={"count"}))
        except (ValidationError, ConfigError):
            return False, "samples/about.json does not say how the images were drawn"
        if about.count != len(paths):
            return False, f"samples/about.json speaks of {about.count:,} images, but there are {len(paths):,}"
        if settings.steps > _MOST_STEPS:
            return False, f"samples/about.json asks for {settings.steps:,} sampler steps, more than {_MOST_STEPS:,}"
        count = len(paths) if self.all_samples else min(_REDRAWN, len(paths))
        some = None if labels is None else labels[:count]
        drawn = np.concatenate(list(generator.stream(count, settings, labels=some)))
        stored = np.stack([_picture(p, generator) for p in paths[:count]])
        for path in paths[count:]:
            _picture(path, generator)
        apart = np.abs(drawn.astype(int) - stored.astype(int)).mean((1, 2, 3))
        if (apart > _SAME).any():
            return False, f"{int((apart > _SAME).sum())} of {count} samples are not what the generator draws"
        rest = "" if count == len(paths) else f" of {len(paths):,} (--all-samples draws all)"
        return True, f"drew {count:,} samples again{rest}: they are the generator's"


class _Drawn(BaseModel):
    """How the samples were drawn, by their about.json."""

    model_config = ConfigDict(strict=True)

    count: int
    seed: int
    sampler: str
    steps: int
    guidance: float
    churn: float = 0.0


def _table(folder: Path, text: str, generator: ReleasedGenerator) -> tuple[list[Path], np.ndarray | None]:
    """Files and labels of samples, in the order in which they were drawn."""
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        files = [r["file_name"] for r in rows]
        labels = np.array([int(r["label"]) for r in rows], dtype=np.int64) if generator.class_names else None
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise ReleaseError(f"samples/metadata.csv is damaged ({error})") from None
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*.png")}
    if not files or set(files) != there or len(there) != len(files):
        raise ReleaseError("samples/metadata.csv and the pictures do not agree")
    if labels is not None and not ((labels >= 0) & (labels < len(generator.class_names))).all():
        raise ReleaseError("samples/metadata.csv has labels that the generator does not know")
    return [folder / f for f in files], labels


def _picture(path: Path, generator: ReleasedGenerator) -> np.ndarray:
    """uint8 [C, H, W] of a PNG that holds pixels and nothing else."""
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
