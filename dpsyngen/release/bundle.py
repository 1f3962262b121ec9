"""The release bundle: one zip with the releasable half of a run, its checksums and, if wanted, a signature.

What goes in is decided by an allow-list of names; the private half is read only to check that the certificate follows
from the ledger and to search what was packed for secrets.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dpsyngen.errors import ConfigError, LedgerError, ReleaseError, RunError
from dpsyngen.files import write_atomically
from dpsyngen.generator.generator import ReleasedGenerator
from dpsyngen.generator.samples import write_samples
from dpsyngen.privacy.certificate import Certificate, schema_text
from dpsyngen.privacy.chain import Head
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.release.card import companions, digest_of, release_files
from dpsyngen.release.safe_zip import write_zip
from dpsyngen.release.signing import fingerprint, read_private_key, sign
from dpsyngen.training.run import Run
from dpsyngen.version import __version__

FORMAT = 1
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
SCHEMA = "certificate.schema.json"
SAMPLES = "samples/"


@dataclass(frozen=True)
class Packed:
    """What was packed.

    Attributes:
        path: the bundle.
        files: number of files in it.
        sha256: digest of the whole bundle, to be published beside it.
        signed_by: fingerprint of the key, or None.
        left_out: files of the release folder that are not part of a release, or that were changed and written anew.
        certificate: what it claims.
    """

    path: Path
    files: int
    sha256: str
    signed_by: str | None
    left_out: tuple[str, ...]
    certificate: Certificate


def pack(
    run: Run,
    out: Path,
    *,
    samples: int = 0,
    seed: int | None = None,
    key: Path | None = None,
    not_private: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Packed:
    """Write the bundle of a finished run.

    Args:
        run: a finished run.
        out: a ``.zip`` that does not exist yet; it appears whole or not at all.
        samples: number of generated images to put in, which costs no privacy.
        seed: public seed of the images; None: a random one, written down.
        key: private key to sign with, see :mod:`dpsyngen.release.signing`.
        not_private: pack a run that carries no guarantee; its bundle says so and does not verify.
        on_progress: called with the number of images drawn.

    Raises:
        ConfigError, RunError: before anything is written.
        LedgerError, ReleaseError: the certificate does not follow from the ledger, or something private is in the
            release.
    """
    if out.suffix.lower() != ".zip":
        raise ConfigError(f"the bundle is {out}, but its name must end in .zip.")
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists already.  Choose another name or move it away.")
    if not out.parent.is_dir():
        raise ConfigError(f"{out.parent} is not a folder: a bundle is written into an existing one.")
    if samples < 0:
        raise ConfigError(f"the number of samples is {samples}, but must be 0 or more.")
    signer = None if key is None else read_private_key(key)
    run.require_complete()
    certificate = check_against_ledger(run)
    if not certificate.private and not not_private:
        raise ReleaseError(
            f"this run is NOT PRIVATE: {'; '.join(certificate.not_private_because)}.  It must not be published if its "
            "images are private.  --not-private packs it all the same, stamped as such (for tests and references)."
        )
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        content: dict[str, Path | bytes] = dict(release_files(run.release, certificate))
        content[SCHEMA] = schema_text().encode()
        # Written anew: what was changed by hand is no part of what the certificate says.
        follow = companions(certificate, digest_of((run.release / "privacy.json").read_bytes()))
        content |= {name: text.encode() for name, text in follow.items()}
        if samples:
            folder = Path(scratch) / "samples"
            _draw(run, folder, samples, seed, certificate, on_progress)
            for file in sorted(folder.rglob("*")):
                if file.is_file():
                    content[SAMPLES + file.relative_to(folder).as_posix()] = file
        _search_for_secrets(run, content)
        names = sorted(content)
        manifest = {
            "format": FORMAT,
            "dpsyngen": __version__,
            "files": {n: {"bytes": _size(content[n]), "sha256": _sha256(content[n])} for n in names},
        }
        text = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
        ends: list[tuple[str, Path | bytes]] = [(MANIFEST, text)]
        if signer is not None:
            ends.append((SIGNATURE, sign(text, signer).encode()))
        write_atomically(out, lambda p: write_zip(p, [*((n, content[n]) for n in names), *ends]))
    left_out = tuple(
        str(p.relative_to(run.release))
        for p in sorted(run.release.rglob("*"))
        if p.is_file() and not _is_packed(p, content.get(p.relative_to(run.release).as_posix()))
    )
    return Packed(
        out,
        len(names) + len(ends),
        _sha256(out),
        None if signer is None else fingerprint(signer.public_key()),
        left_out,
        certificate,
    )


def check_against_ledger(run: Run) -> Certificate:
    """The certificate of a run, if it follows from the run's ledger.

    Raises:
        LedgerError: the ledger was changed since the certificate was written, or has more than it states.
        ReleaseError: the certificate is damaged.
    """
    certificate = Certificate.read(run.release / "privacy.json")
    ledger = Ledger(run.ledger_path)
    if not ledger.has_been(Head(certificate.ledger.lines, certificate.ledger.digest)):
        raise LedgerError(
            f"the ledger of {run.path} is not the one that its certificate was computed from: one of them was changed "
            "after training, so nothing can be stated."
        )
    stated = math.inf if certificate.epsilon == "inf" else certificate.epsilon
    spent = ledger.epsilon(certificate.delta, group_size=certificate.group_size)
    if spent > stated * (1 + 1e-6):
        raise LedgerError(
            f"the ledger of {run.path} comes to ε = {spent:.4f}, more than the ε = {stated:.4f} of its certificate: "
            "the private images were used again after the release was written."
        )
    return certificate


def _draw(
    run: Run,
    folder: Path,
    count: int,
    seed: int | None,
    certificate: Certificate,
    on_progress: Callable[[int], None] | None,
) -> None:
    generator = ReleasedGenerator(run.release)
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    settings = generator.settings(seed=seed)
    labels = generator.labels(count)
    about = {"dpsyngen": __version__, "private": certificate.private, "count": count, **asdict(settings)}
    batches = generator.stream(count, settings, labels=labels)
    write_samples(folder, batches, labels, generator.class_names, about, on_progress)


def _is_packed(file: Path, content: Path | bytes | None) -> bool:
    return content is not None and (not isinstance(content, bytes) or file.read_bytes() == content)


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _sha256(content: Path | bytes) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with open(content, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _search_for_secrets(run: Run, content: dict[str, Path | bytes]) -> None:
    """Refuse if the run's key, or a path or digest from its private half, stands in a file that would be packed.

    The release is made from an allow-list, so this finds nothing unless something is broken or was put there by hand.
    """
    secrets = {"the run's secret key": list(Randomness.load(run.randomness_path).key_forms())}
    config = run.config
    for what, path in (
        ("the path of the images", config.data.source),
        ("the path of the decoded images", config.data.cache),
        ("the path of the budget", config.privacy.budget),
    ):
        # The name of a named set, or a single short word, may stand anywhere for other reasons.
        if path and "/" in path and len(path) >= 6:
            secrets[what] = [path.encode()]
    try:
        secrets["the digest of the images"] = [json.loads(run.data_path.read_text())["fingerprint"].encode()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{run.data_path} cannot be read: {error}.") from None
    longest = max(len(s) for found in secrets.values() for s in found)
    for name, file in content.items():
        for window in _windows(file, longest):
            for what, forms in secrets.items():
                if any(form in window for form in forms):
                    raise ReleaseError(
                        f"{what} stands in {name}, which would be published.  Nothing was written.  Remove it from the "
                        "release folder; if you did not put it there, please report this as a bug."
                    )


def _windows(content: Path | bytes, longest: int) -> Iterator[bytes]:
    """The content in overlapping pieces, so that nothing up to `longest` bytes is cut apart."""
    if isinstance(content, bytes):
        yield content
        return
    with open(content, "rb") as f:
        tail = b""
        while chunk := f.read(1 << 22):
            yield tail + chunk
            tail = chunk[-longest:]
