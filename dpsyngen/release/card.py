"""What stands in a release folder: its files by name, the model card, and the code that diffusers loads it with.

The card (``README.md`` with the header that the Hugging Face Hub reads) is a function of the certificate, like the page
in plain words, so it cannot say anything that the numbers do not.  The code is the same in every release of a version.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dpsyngen.errors import ReleaseError, RunError
from dpsyngen.files import file_sha256, write_text
from dpsyngen.privacy.certificate import Certificate, strength, template

REQUIRED = ("PRIVACY.md", "privacy.json", "config.yaml", "generator.json")
OPTIONAL = ("public_training.jsonl", "report.html")
WEIGHTS = "weights/"

CARD, MODEL_INDEX, PIPELINE, DENOISER = "README.md", "model_index.json", "pipeline.py", "denoiser/denoiser.py"
COMPANIONS = (CARD, MODEL_INDEX, PIPELINE, DENOISER)
"""Files that follow from the certificate and this version alone; all but the card are what diffusers runs."""

TESTED_DIFFUSERS = "0.42.1"


def release_files(release: Path, certificate: Certificate) -> Iterator[tuple[str, Path]]:
    """The files of a release folder that belong to a release, by an allow-list of names; without ``COMPANIONS``.

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


@cache
def code() -> dict[str, str]:
    """What diffusers runs, or is led to run by: two files of ours as they are, and the index that names them."""
    index = {
        "_class_name": ["pipeline", "DPSynGenPipeline"],
        "_diffusers_version": TESTED_DIFFUSERS,
        "denoiser": ["denoiser", "ReleasedDenoiser"],
    }
    here = Path(__file__).parent
    files = {PIPELINE: here / "hub" / "pipeline.py", DENOISER: here.parent / "diffusion" / "standalone.py"}
    texts = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    return {MODEL_INDEX: json.dumps(index, indent=1) + "\n", **texts}


def write_companions(folder: Path, certificate: Certificate) -> None:
    """Write ``COMPANIONS`` beside the ``privacy.json`` of a folder, in place of any that are there."""
    card = model_card(certificate, file_sha256(folder / "privacy.json"))
    for name, text in {CARD: card, **code()}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_text(folder / name, text)


def copy_release(release: Path, certificate: Certificate, folder: Path) -> None:
    """Copy what belongs to a release to `folder`, and write ``COMPANIONS`` anew; errors as in :func:`release_files`."""
    for name, file in release_files(release, certificate):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / name)
    write_companions(folder, certificate)


def header(c: Certificate, digest: str) -> dict[str, Any]:
    """The YAML header of the card; arguments as for :func:`model_card`."""
    tags = ["dpsyngen", "differential-privacy", "diffusion", "image-generation", "synthetic-data"]
    why = () if c.private else ("not_private_because",)
    values, stated = c.to_dict(), ("private", *why, "epsilon", "delta", "unit", "adjacency", "group_size")
    return {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": tags if c.private else [*tags, "not-private"],
        "privacy": {name: values[name] for name in stated}
        | {"certificate": "privacy.json", "certificate_sha256": digest},
    }


def model_card(certificate: Certificate, digest: str) -> str:
    """The model card as Markdown with a YAML header, from ``card.md.j2``.

    Args:
        certificate: of the release; what a stranger wrote in it is text, never a template.
        digest: SHA-256 of ``privacy.json``, in hexadecimal digits.
    """
    c = certificate
    return (
        template(Path(__file__).with_suffix(".md.j2")).render(
            c=c,
            a=c.public_assumptions,
            header=yaml.safe_dump(header(c, digest), sort_keys=False, allow_unicode=True, width=10**6).rstrip(),
            digest=digest,
            strength=strength(c.epsilon, c.delta, c.by_person) if c.private else "",
        )
        + "\n"
    )
