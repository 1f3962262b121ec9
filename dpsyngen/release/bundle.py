"""The release bundle: one zip with the releasable half of a run, its checksums and, if wanted, a signature.

What goes in is decided by an allow-list of names; the private half is read only to check that the certificate follows
from the ledger and to search what was packed for secrets.

A bundle may come from a stranger.  Reading refuses everything that a bundle has no use for: paths that lead elsewhere,
links, folders, encryption, odd compression, two members of one name, members that are larger than they say, and bytes
that belong to no member (a zip can carry those before, between and after its members, in comments and extra fields).
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import re
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dpsyngen.errors import ConfigError, LedgerError, ReleaseError, printable, require
from dpsyngen.files import file_sha256, write_atomically, write_text
from dpsyngen.generator.generator import ReleasedGenerator
from dpsyngen.generator.guarantee import Guarantee
from dpsyngen.generator.samples import write_samples
from dpsyngen.privacy.certificate import Certificate, schema_text
from dpsyngen.privacy.ledger import Head, Ledger
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.release.card import copy_release
from dpsyngen.release.signing import fingerprint, read_private_key, sign
from dpsyngen.training.run import Run
from dpsyngen.training.session import pinned
from dpsyngen.version import __version__

FORMAT = 1
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
SCHEMA = "certificate.schema.json"
SAMPLES = "samples/"

MOST_MEMBERS = 2_000_000
MOST_BYTES = 64 * 2**30
LONGEST_NAME = 1024
SMALL = 64 * 2**20
"""Largest member that is read into memory."""
MOST_SAMPLES = 100_000
"""Images in a bundle: the manifest, of a line of at most 0.5 KiB for each, stays below SMALL."""

_CHUNK = 1 << 20
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DATE = (1980, 1, 1, 0, 0, 0)  # the first that a zip can state


@dataclass(frozen=True)
class Packed:
    """What was packed."""

    path: Path
    files: int  # number of files in it
    sha256: str  # digest of the whole bundle, to be published beside it
    signed_by: str | None  # fingerprint of the key
    left_out: tuple[str, ...]  # files of the folder that are no part of a release, or were changed and written anew
    certificate: Guarantee


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
    """Write the bundle of a finished run.  A report page is in it if the release folder has one.

    Args:
        out: a ``.zip`` that does not exist yet; it appears whole or not at all.
        samples: number of generated images to put in, which costs no privacy; at most :data:`MOST_SAMPLES`.
        seed: public seed of the images; None: a random one, written down.
        key: private key to sign with, see :mod:`dpsyngen.release.signing`.
        not_private: pack a run that carries no guarantee; its bundle says so and does not verify.

    Raises:
        ConfigError, RunError: before anything is written.
        LedgerError, ReleaseError: the certificate does not follow from the ledger, or the release holds a secret.
    """
    certificate, signer = require_ready(run, out, samples, key, not_private)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch)
        copy_release(run.release, certificate, folder)
        write_text(folder / SCHEMA, schema_text())
        if samples:
            generator = ReleasedGenerator(run.release)
            settings, labels = generator.settings(seed=seed), generator.labels(samples)
            about = {"dpsyngen": __version__, "private": certificate.private, "count": samples, **settings.model_dump()}
            batches = generator.stream(samples, settings, labels=labels)
            write_samples(folder / SAMPLES, batches, labels, generator.class_names, about, on_progress)
        files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        _search_for_secrets(run, files)
        members: list[tuple[str, Path | bytes]] = sorted(files.items())
        listed = {name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for name, p in sorted(files.items())}
        manifest = {"format": FORMAT, "dpsyngen": __version__, "files": listed}
        text = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
        members.append((MANIFEST, text))
        if signer is not None:
            members.append((SIGNATURE, sign(text, signer).encode()))
        write_atomically(out, lambda path: write_zip(path, members))
        # What was changed by hand does not follow from the certificate, and was written anew.
        there = {p.relative_to(run.release).as_posix(): p for p in sorted(run.release.rglob("*")) if p.is_file()}
        left_out = tuple(n for n, p in there.items() if n not in files or not filecmp.cmp(p, files[n], shallow=False))
    signed_by = None if signer is None else fingerprint(signer.public_key())
    return Packed(out, len(members), file_sha256(out), signed_by, left_out, certificate)


def require_ready(
    run: Run, out: Path, samples: int, key: Path | None, not_private: bool
) -> tuple[Guarantee, Ed25519PrivateKey | None]:
    """The certificate and the key of a bundle that :func:`pack` would write; raises what that does, writes nothing."""
    require(out.suffix.lower() == ".zip", "the name of the bundle", str(out), "one that ends in .zip")
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists already.  Choose another name or move it away.")
    if not out.parent.is_dir():
        raise ConfigError(f"{out.parent} is not a folder: a bundle is written into an existing one.")
    outside = not out.resolve().is_relative_to(run.release.resolve())
    require(outside, "the bundle", str(out), f"outside {run.release}, all of which is packed")
    allowed = f"0 or more, at most {MOST_SAMPLES:,}. Publish more beside the bundle, as files of `dpsyngen sample`"
    require(0 <= samples <= MOST_SAMPLES, "the number of samples", samples, allowed)
    signer = None if key is None else read_private_key(key)
    run.require_complete()
    certificate = check_against_ledger(run)
    require_private(certificate, not_private, "--not-private packs")
    return certificate, signer


def check_against_ledger(run: Run) -> Guarantee:
    """The certificate of a run; LedgerError unless it follows from the run's ledger as that is now."""
    certificate = Guarantee.read(run.release)
    ledger = Ledger(run.ledger_path)
    if not ledger.has_been(Head(certificate.ledger.lines, certificate.ledger.digest)):
        raise LedgerError(
            f"the ledger of {run.path} is not the one that its certificate was computed from: one of them was changed "
            "after training, so nothing can be stated."
        )
    spent = ledger.epsilon(certificate.delta, group_size=certificate.group_size)
    if spent > certificate.epsilon * (1 + 1e-6):
        raise LedgerError(
            f"the ledger of {run.path} comes to ε = {spent:.4f}, more than the ε = {certificate.epsilon:.4f} of its "
            "certificate: the private images were used again after the release was written."
        )
    return certificate


def require_private(certificate: Certificate, not_private: bool, way: str) -> None:
    """Raise ReleaseError unless there is a guarantee or the user wants none; `way`: such as "--not-private packs"."""
    if not certificate.private and not not_private:
        raise ReleaseError(
            f"this generator is NOT PRIVATE: {printable('; '.join(certificate.not_private_because))}.  It must not be "
            f"published if its images are private.  {way} it all the same, stamped as such (for tests and references)."
        )


def _search_for_secrets(run: Run, files: dict[str, Path]) -> None:
    """Refuse if the run's key, or a path or digest from its private half, stands in a file that would be packed.

    The release is made from an allow-list, so this finds nothing unless something is broken or was put there by hand.
    """
    secrets = {"the run's secret key": list(Randomness.load(run.randomness_path).key_forms())}
    config = run.config
    for what, path in (
        ("the path of the images", config.data.source),
        ("the path of the labels", config.data.labels),
        ("the path of the decoded images", config.data.cache),
        ("the path of the budget", config.privacy.budget),
        ("the path of the table of persons", config.privacy.groups),
    ):
        # The name of a named set, or a single short word, may stand anywhere for other reasons.
        if isinstance(path, str) and "/" in path and len(path) >= 6:
            secrets[what] = [path.encode()]
    secrets["the digest of the images"] = [pinned(run.data_path)["fingerprint"].encode()]
    for name, file in files.items():
        content = file.read_bytes()
        for what, forms in secrets.items():
            if any(form in content for form in forms):
                raise ReleaseError(
                    f"{what} stands in {name}, which would be published.  Nothing was written.  Remove it from the "
                    "release folder; if you did not put it there, please report this as a bug."
                )


def write_zip(path: Path, members: Iterable[tuple[str, Path | bytes]]) -> None:
    """Write a zip whose bytes depend on names and contents only: no dates, owners or modes of files."""
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name, _DATE)
            info.external_attr, info.create_system = (stat.S_IFREG | 0o644) << 16, 3
            # Weights and pictures are dense already.
            dense = name.endswith((".safetensors", ".png"))
            info.compress_type = zipfile.ZIP_STORED if dense else zipfile.ZIP_DEFLATED
            archive.writestr(info, content if isinstance(content, bytes) else content.read_bytes())


def unpack(bundle: Path, folder: Path) -> None:
    """Extract the generator of a bundle, without its samples; ReleaseError if a file is not what the manifest says."""
    with open_zip(bundle) as archive:
        try:
            files = archive.manifest()["files"]
            for name in files:
                if not name.startswith(SAMPLES):
                    archive.extract(name, folder)
        except ReleaseError as error:
            raise ReleaseError(f"{printable(bundle)} cannot be used: {error}") from None


class SafeZip:
    """A zip that was found to be sound, see :func:`open_zip`; `sizes` are those that its members declare, in bytes."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._listed: dict[str, Any] | None = None
        self.sizes = {i.filename: i.file_size for i in archive.infolist()}

    def chunks(self, name: str) -> Iterator[bytes]:
        """The content of a member, checked against its declared size and its CRC; ReleaseError if it is damaged."""
        left = self.sizes[name]
        try:
            with self._archive.open(name) as member:
                while chunk := member.read(_CHUNK):
                    left -= len(chunk)
                    if left < 0:
                        break
                    yield chunk
        except Exception as error:  # decompressors raise nearly anything
            raise ReleaseError(f"{name!a} is damaged: {error}.") from None
        if left:
            raise ReleaseError(f"{name!a} is larger or smaller than it says.")

    def read(self, name: str) -> bytes:
        """The content of a small member.  Raises ReleaseError if it is damaged, or larger than SMALL."""
        if self.sizes[name] > SMALL:
            raise ReleaseError(f"{name!a} has {self.sizes[name]:,} bytes, but at most {SMALL:,} are read.")
        return b"".join(self.chunks(name))

    def manifest(self) -> dict[str, Any]:
        """What the bundle's manifest says; :meth:`extract` holds files to it from then on.

        Raises ReleaseError if it is missing, damaged, of another format, or does not list exactly the other files.
        """
        if MANIFEST not in self.sizes:
            raise ReleaseError(f"it has no {MANIFEST}.")
        try:
            manifest = json.loads(self.read(MANIFEST))
            found, files = manifest["format"], dict(manifest["files"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ReleaseError(f"its {MANIFEST} is damaged.") from None
        if found != FORMAT:
            raise ReleaseError(f"its {MANIFEST} is of format {printable(found)}, but this version reads {FORMAT}.")
        odd = sorted(map(ascii, set(files) ^ (set(self.sizes) - {MANIFEST, SIGNATURE})))
        if odd:
            raise ReleaseError(f"its {MANIFEST} and its files do not agree on {', '.join(odd[:10])}.")
        self._listed = files
        return {**manifest, "files": files}

    def extract(self, name: str, folder: Path) -> Path:
        """Write a member below `folder`; ReleaseError if it is damaged, or not what the manifest says."""
        target, digest = folder / name, hashlib.sha256()
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "xb") as f:
            for chunk in self.chunks(name):
                digest.update(chunk)
                f.write(chunk)
        found = {"bytes": self.sizes[name], "sha256": digest.hexdigest()}
        if self._listed is not None and self._listed.get(name) != found:
            raise ReleaseError(f"{name!a} is not what its manifest says: it was changed or damaged.")
        return target


@contextmanager
def open_zip(path: Path) -> Iterator[SafeZip]:
    """Open a zip from a stranger; ReleaseError lists up to ten things in it that a bundle has no use for."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise ReleaseError(f"{path} cannot be read: {error.strerror}.") from None
    with file:
        try:
            archive = zipfile.ZipFile(file)
            faults = list(_faults(archive, os.fstat(file.fileno()).st_size))
        except Exception as error:  # zipfile raises nearly anything for broken files
            raise ReleaseError(f"{path} is not a zip file, or is damaged ({error}).") from None
        if faults:
            more = f"; and {len(faults) - 10:,} more" if len(faults) > 10 else ""
            raise ReleaseError(f"{path} is not a bundle to be trusted: {'; '.join(faults[:10])}{more}.")
        with archive:
            yield SafeZip(archive)


def is_safe_name(name: str) -> bool:
    """Whether a member's name is a plain relative path: no "..", no empty part, no drive, no control character."""
    raw = name.encode("utf-8", "surrogateescape")
    parts = raw.split(b"/")
    printable_path = 0 < len(raw) <= LONGEST_NAME and name.isprintable() and not re.search(r"[\\:]", name)
    return printable_path and all(part not in (b"", b".", b"..") and len(part) <= 255 for part in parts)


def _faults(archive: zipfile.ZipFile, length: int) -> Iterator[str]:
    members = sorted(archive.infolist(), key=lambda m: m.header_offset)
    if len(members) > MOST_MEMBERS:
        yield f"it has {len(members):,} members, more than {MOST_MEMBERS:,}"
        return
    total = sum(i.file_size for i in members)
    if total > MOST_BYTES:
        yield f"it would unpack to {total:,} bytes, more than {MOST_BYTES:,}"
    if archive.comment:
        yield "it has a comment"
    seen: set[str] = set()
    end, directory = 0, 0
    for i in members:
        name, stored = ascii(i.filename[:200]), i.compress_type == zipfile.ZIP_STORED
        header, extra = _local_header(archive, i)
        for fault, text in (
            (not is_safe_name(i.filename) or i.orig_filename != i.filename, f"the name {name} is not allowed"),
            # Two names that differ in case only are one file on some systems.
            (i.filename.casefold() in seen, f"{name} is there twice"),
            (i.is_dir() or stat.S_IFMT(i.external_attr >> 16) not in (0, stat.S_IFREG), f"{name} is not a plain file"),
            (i.flag_bits & 0x1, f"{name} is encrypted"),
            (i.flag_bits & 0x8, f"{name} is written as a stream"),
            (i.compress_type not in _METHODS, f"{name} is compressed by method {i.compress_type}"),
            (not i.filename.isascii() and not i.flag_bits & 0x800, f"the name {name} is not in UTF-8"),
            (stored and i.compress_size != i.file_size, f"{name} has two sizes"),
            (i.comment, f"{name} has a comment"),
            (_foreign(i.extra) or _foreign(extra), f"{name} has extra fields"),
            # Members follow each other without a gap, so none overlaps another and nothing lies between them.
            (i.header_offset != end, f"there are bytes before {name} that belong to nothing"),
        ):
            if fault:
                yield text
        seen.add(i.filename.casefold())
        end = i.header_offset + header + i.compress_size
        directory += 46 + len(i.orig_filename.encode("utf-8", "surrogateescape")) + len(i.extra)
    if end != archive.start_dir:
        yield "there are bytes before the directory that belong to nothing"
    # The end record has 22 bytes; with ZIP64 56 and 20 more.
    if members and length - archive.start_dir - directory not in (22, 22 + 76):
        yield "there are bytes in or after the directory that belong to nothing"


def _local_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[int, bytes]:
    """Length of the header before a member, and its extra field, which may differ from that in the directory."""
    assert archive.fp is not None
    archive.fp.seek(info.header_offset)
    header = archive.fp.read(30)
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no header for {info.filename!r}")
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    archive.fp.seek(name, os.SEEK_CUR)
    return 30 + name + extra, archive.fp.read(extra)


def _foreign(extra: bytes) -> bool:
    """Whether an extra field holds anything but the sizes of a large file (ZIP64)."""
    kind, size = int.from_bytes(extra[:2], "little"), int.from_bytes(extra[2:4], "little")
    return bool(extra) and not (kind == 1 and size <= 28 and len(extra) == 4 + size)
