"""Writing a generator to a folder for diffusers."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dpsyngen.errors import ConfigError, ReleaseError
from dpsyngen.files import NotPlainError, open_plain, require_absent_or_empty, sync_folder, write_text
from dpsyngen.generator.files import MAX_JSON_BYTES
from dpsyngen.generator.generator import ReleasedGenerator
from dpsyngen.privacy.certificate import Certificate
from dpsyngen.release.card import companions, digest_of, release_files

FORMATS = ("diffusers",)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the folder.
        format: one of ``FORMATS``.
        files: names of the files in it.
        certificate: what the generator claims.
        certificate_sha256: digest of ``privacy.json``.
    """

    path: Path
    format: str
    files: tuple[str, ...]
    certificate: Certificate
    certificate_sha256: str


def check_export(format: str, out: Path) -> None:
    """Raise ConfigError or RunError if an export could not be written, before anything is computed."""
    if format not in FORMATS:
        raise ConfigError(f"the format is {format!r}, but must be {', '.join(FORMATS)}.")
    require_absent_or_empty(out, "--out")
    if not out.name:
        raise ConfigError(f"--out {out} has no name of its own, so it cannot appear whole.  Give a new folder in it.")


def export_release(release: Path, format: str, out: Path, *, not_private: bool = False) -> Exported:
    """Write the generator of a release to a folder, which appears whole or not at all.

    Args:
        release: the ``release`` folder of a run, or a copy of it.  It may come from a stranger: nothing in it is run.
        format: "diffusers": the release with the code that diffusers loads it with, also where `release` is of an
            earlier version and lacks that.
        out: must not exist (or be an empty folder).
        not_private: export a generator without a guarantee all the same, stamped as such.

    Raises:
        ConfigError, RunError: before anything is written.
        ReleaseError: no guarantee, or something is wrong with the release.
    """
    check_export(format, out)
    data = _certificate(release)
    certificate, digest = Certificate.from_json(data, str(release / "privacy.json")), digest_of(data)
    if not certificate.private and not not_private:
        raise ReleaseError(
            f"this generator is NOT PRIVATE: {'; '.join(certificate.not_private_because)}.  It must not be published "
            "if its images are private.  --not-private exports it all the same, stamped as such."
        )
    generator = ReleasedGenerator(release)
    if generator.private != certificate.private or list(generator.class_names) != (
        certificate.public_assumptions.class_names
    ):
        raise ReleaseError(f"generator.json and privacy.json of {release} are not of one release.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        partial = Path(scratch) / "export"
        partial.mkdir()
        _write_diffusers(release, certificate, digest, partial)
        files = tuple(sorted(p.relative_to(partial).as_posix() for p in partial.rglob("*") if p.is_file()))
        if out.is_dir():
            out.rmdir()  # empty, as checked
        partial.rename(out)
    sync_folder(out.parent)
    return Exported(out, format, files, certificate, digest)


def _certificate(release: Path) -> bytes:
    """The bytes of ``privacy.json``."""
    try:
        with open_plain(release / "privacy.json", MAX_JSON_BYTES) as file:
            return file.read()
    except (NotPlainError, OSError) as error:
        raise ReleaseError(f"{release} has no certificate to export with it (privacy.json: {error}).") from None


def _write_diffusers(release: Path, certificate: Certificate, digest: str, folder: Path) -> None:
    for name, file in release_files(release, certificate):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / name)
    for name, text in companions(certificate, digest).items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_text(folder / name, text)
