"""Where a generator is kept (a run directory, a release folder or a bundle): finding it, and saving it elsewhere."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dpsyngen.data.load import PathLike
from dpsyngen.errors import ConfigError, ReleaseError, RunError, printable
from dpsyngen.files import expanded, file_sha256, new_folder, require_absent_or_empty, write_atomically
from dpsyngen.generator.files import Place
from dpsyngen.generator.generator import ReleasedGenerator
from dpsyngen.generator.guarantee import Guarantee
from dpsyngen.release.bundle import pack, require_private, unpack
from dpsyngen.release.card import copy_release
from dpsyngen.training.run import Run


def find(path: PathLike) -> Place:
    """Where the generator at `path` is: a run directory, a release folder or a copy of one, or a bundle (``.zip``).

    A bundle is unpacked into a temporary folder, and its files are compared with its manifest.

    Raises:
        RunError: there is none, or its training is not finished.
        ReleaseError: a bundle that is damaged or was changed.
    """
    given = expanded(path)
    if (given / "generator.json").is_file():  # written last, so the release is whole
        return Place.of_release(given)
    allowed = "a run directory, its release folder or a bundle (.zip)"
    if given.is_file():
        if given.suffix.lower() != ".zip":
            raise RunError(f"{printable(given)} is not a generator: give {allowed}.")
        scratch = tempfile.TemporaryDirectory(prefix="dpsyngen-bundle-")
        unpack(given, Path(scratch.name))
        return Place(given, Path(scratch.name), bundle=given, scratch=scratch)
    if not given.exists():
        raise RunError(f"{printable(given)} does not exist.  Give {allowed}.")
    run = Run(given)
    run.require_complete()
    return Place(given, run.release, given)


def save(place: Place, out: PathLike, not_private: bool = False) -> Path:
    """Copy the releasable files of a generator, and nothing else; returns where.

    `out` is a ``.zip``, the release bundle, made from a run directory or copied from a bundle; or else a folder, which
    must not exist or be empty.  It appears whole or not at all.

    Raises:
        ConfigError, RunError: there is something at `out`, or a bundle cannot be made from what is at hand.
        ReleaseError: not private, or something is wrong with the release.
    """
    target = expanded(out)
    require_private(Guarantee.read(place.release), not_private, "not_private=True saves")
    if target.suffix.lower() != ".zip":
        export_release(place.release, target, not_private=not_private)
        return target
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists already.  Choose another name or move it away.")
    if place.run is None and place.bundle is None:
        raise ConfigError(
            f"a bundle is made from a run directory, as its certificate is checked against the ledger there, but this "
            f"generator comes from {printable(place.path)}.  Save it to a folder, or load it from its run directory."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    if place.bundle is not None:
        bundle = place.bundle
        write_atomically(target, lambda path: shutil.copyfile(bundle, path))
    elif place.run is not None:
        run = Run(place.run)
        with run.lock():
            pack(run, target, not_private=not_private)
    return target


@dataclass(frozen=True)
class Exported:
    """A folder that was written: the names of its files, what its generator claims, the digest of ``privacy.json``."""

    path: Path
    files: tuple[str, ...]
    certificate: Guarantee
    certificate_sha256: str


def export_release(release: Path, out: Path, *, not_private: bool = False) -> Exported:
    """Write the generator of a release to a folder for diffusers, which appears whole or not at all.

    It holds the code that diffusers loads it with, also where `release` is of an earlier version and lacks that.

    `release` may come from a stranger: nothing in it is run.

    Raises:
        ConfigError, RunError: before anything is written.
        ReleaseError: no guarantee, or something is wrong with the release.
    """
    require_absent_or_empty(out, "--out")
    generator = ReleasedGenerator(release)
    certificate = generator.privacy
    require_private(certificate, not_private, "--not-private exports")
    if list(generator.class_names) != certificate.public_assumptions.class_names:
        raise ReleaseError(f"generator.json and privacy.json of {release} are not of one release.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(out) as folder:
        copy_release(release, certificate, folder)
        files = tuple(sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()))
        digest = file_sha256(folder / "privacy.json")
    return Exported(out, files, certificate, digest)
