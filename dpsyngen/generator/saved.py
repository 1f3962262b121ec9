"""Where a generator is kept: a run directory, a release folder or a bundle; finding it, and saving it elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpsyngen.errors import ConfigError, ReleaseError, RunError, printable
from dpsyngen.files import NotPlainError, open_plain, write_atomically
from dpsyngen.generator.guarantee import Guarantee

PathLike = str | os.PathLike[str]

_WHOLE = "generator.json"  # its presence says that the release is whole
_MOST_BYTES = 2**40


@dataclass(frozen=True)
class Place:
    """Where a generator is.

    Attributes:
        path: what the user would give to load it again.
        release: the folder with its files.
        run: the run directory, if that is at hand.
        bundle: the bundle that it was unpacked from.
        scratch: keeps what was unpacked for as long as it lives.
    """

    path: Path
    release: Path
    run: Path | None = None
    bundle: Path | None = None
    scratch: tempfile.TemporaryDirectory[str] | None = None


def of_release(release: Path) -> Place:
    """The place of a release folder; with its run directory, if it is in one."""
    run = release.parent if release.name == "release" and (release.parent / "run.json").is_file() else None
    return Place(run or release, release, run)


def find(path: PathLike) -> Place:
    """Where the generator at `path` is: a run directory, a release folder or a copy of one, or a bundle (``.zip``).

    A bundle is unpacked into a temporary folder, and its files are compared with its manifest.

    Raises:
        RunError: there is none, or its training is not finished.
        ReleaseError: a bundle that is damaged or was changed.
    """
    from dpsyngen.training.run import Run

    given = Path(path).expanduser()
    if (given / _WHOLE).is_file():
        return of_release(given)
    if given.is_file():
        if given.suffix.lower() != ".zip":
            raise RunError(
                f"{printable(given)} is not a generator: give a run directory, its release folder or a .zip."
            )
        return _unpacked(given)
    if not given.exists():
        raise RunError(
            f"{printable(given)} does not exist.  Give a run directory, its release folder or a bundle (.zip)."
        )
    run = Run(given)
    run.require_complete()
    return Place(given, run.release, given)


def _unpacked(bundle: Path) -> Place:
    from dpsyngen.release.bundle import FORMAT, MANIFEST, SAMPLES, SIGNATURE
    from dpsyngen.release.safe_zip import open_zip

    scratch = tempfile.TemporaryDirectory(prefix="dpsyngen-bundle-")
    folder = Path(scratch.name)
    with open_zip(bundle) as archive:
        if MANIFEST not in archive.sizes:
            raise ReleaseError(f"{printable(bundle)} is not a bundle: it has no {MANIFEST}.")
        try:
            manifest: Any = json.loads(archive.read(MANIFEST))
            files, found = manifest["files"], manifest["format"]
            unlisted = set(archive.sizes) - set(files) - {MANIFEST, SIGNATURE}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ReleaseError(f"the {MANIFEST} of {printable(bundle)} is damaged.") from None
        if found != FORMAT or unlisted:
            raise ReleaseError(
                f"the {MANIFEST} of {printable(bundle)} is of another format, or does not list all files."
            )
        for name in archive.sizes:
            # Images are no part of the generator; `dpsyngen verify` looks at them.
            if name in (MANIFEST, SIGNATURE) or name.startswith(SAMPLES):
                continue
            entry = {"bytes": archive.sizes[name], "sha256": _sha256(archive.extract(name, folder))}
            if files[name] != entry:
                raise ReleaseError(f"{name!a} in {printable(bundle)} is not what its manifest says: it was changed.")
    return Place(bundle, folder, bundle=bundle, scratch=scratch)


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def save(place: Place, out: PathLike, not_private: bool = False) -> Path:
    """Copy the releasable files of a generator, and nothing else.

    Args:
        place: where it is.
        out: a ``.zip``: the release bundle, which is made from a run directory or copied from a bundle; anything else:
            a folder, which must not exist or be empty.  It appears whole or not at all.
        not_private: save a generator without a guarantee all the same.

    Raises:
        ConfigError, RunError: there is something at `out`, or a bundle cannot be made from what is at hand.
        ReleaseError: not private, or something is wrong with the release.
    """
    target = Path(out).expanduser()
    guarantee = Guarantee.read(place.release)
    if not guarantee.private and not not_private:
        raise ReleaseError(
            f"this generator is {guarantee.line}.  It must not be published if its images are private.  "
            "not_private=True saves it all the same, stamped as such."
        )
    if target.suffix.lower() == ".zip":
        _bundle(place, target, not_private)
    else:
        from dpsyngen.release.hub.folder import export_release

        export_release(place.release, "diffusers", target, not_private=not_private)
    return target


def _bundle(place: Place, target: Path, not_private: bool) -> None:
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists already.  Choose another name or move it away.")
    target.parent.mkdir(parents=True, exist_ok=True)
    if place.bundle is not None:
        source = place.bundle
        write_atomically(target, lambda temporary: _copy(source, temporary))
        return
    if place.run is None:
        raise ConfigError(
            f"a bundle is made from a run directory, as its certificate is checked against the ledger there, but this "
            f"generator comes from {printable(place.path)}.  Save it to a folder, or load it from its run directory."
        )
    from dpsyngen.release.bundle import pack
    from dpsyngen.report.html import write_reports
    from dpsyngen.training.run import Run

    run = Run(place.run)
    with run.lock():
        run.finished_ledger()
        if not (run.release / "report.html").exists():
            write_reports(run)
        pack(run, target, not_private=not_private)


def _copy(source: Path, target: Path) -> None:
    try:
        with open_plain(source, _MOST_BYTES) as read, open(target, "wb") as written:
            shutil.copyfileobj(read, written)
    except NotPlainError as error:
        raise ReleaseError(f"{printable(source)} {error}; a release holds plain files only.") from None
