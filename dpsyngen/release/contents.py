"""Which files of a release folder are the release: an allow-list of names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dpsyngen.errors import ReleaseError, RunError
from dpsyngen.privacy.certificate import Certificate

REQUIRED = ("PRIVACY.md", "privacy.json", "config.yaml", "generator.json")
OPTIONAL = ("public_training.jsonl", "report.html")
WEIGHTS = "weights/"


def release_files(release: Path, certificate: Certificate) -> Iterator[tuple[str, Path]]:
    """The files that are kept in the folder, by their names; those that follow from the certificate are not among them.

    Raises:
        ReleaseError: one is a symbolic link.
        RunError: one is missing.
    """
    networks = {s.network for s in certificate.stages}
    if certificate.pretrained_on_programmatic_images:
        networks.add("pretrain")
    required = [*REQUIRED, *(f"{WEIGHTS}{n}.safetensors" for n in sorted(networks))]
    for name in (*required, *OPTIONAL):
        file = release / name
        if file.is_symlink():
            raise ReleaseError(f"{file} is a symbolic link; a release holds plain files only.")
        if file.is_file():
            yield name, file
        elif name in required:
            raise RunError(f"{file} is missing, so the release is not whole.")
