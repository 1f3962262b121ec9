"""What stands in a release folder: its files by name, the model card, and the code that diffusers loads it with.

The card (``README.md`` with the header that the Hugging Face Hub reads) is a function of the certificate, like the page
in plain words, so it cannot say anything that the numbers do not.  The code is the same in every release of a version.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dpsyngen.errors import ReleaseError, RunError
from dpsyngen.files import write_text
from dpsyngen.privacy.certificate import Certificate, foundations, number, safe_markdown, strength

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


def companions(certificate: Certificate, digest: str) -> dict[str, str]:
    """The text of each of ``COMPANIONS``; arguments as for :func:`model_card`."""
    return {CARD: model_card(certificate, digest), **code()}


@cache
def code() -> dict[str, str]:
    """What diffusers runs, or is led to run by: the files of ``hub/`` as they are, and the index that names them."""
    index = {
        "_class_name": ["pipeline", "DPSynGenPipeline"],
        "_diffusers_version": TESTED_DIFFUSERS,
        "denoiser": ["denoiser", "ReleasedDenoiser"],
    }
    hub = Path(__file__).parent / "hub"
    texts = {name: (hub / Path(name).name).read_text(encoding="utf-8") for name in (PIPELINE, DENOISER)}
    return {MODEL_INDEX: json.dumps(index, indent=1) + "\n", **texts}


def write_companions(folder: Path, certificate: Certificate) -> None:
    """Write ``COMPANIONS`` beside the ``privacy.json`` of a folder, in place of any that are there."""
    for name, text in companions(certificate, digest_of((folder / "privacy.json").read_bytes())).items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_text(folder / name, text)


def copy_release(release: Path, certificate: Certificate, folder: Path) -> None:
    """Copy what belongs to a release to `folder`, and write ``COMPANIONS`` anew; errors as in :func:`release_files`."""
    for name, file in release_files(release, certificate):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / name)
    write_companions(folder, certificate)


def digest_of(certificate: bytes) -> str:
    """SHA-256 of ``privacy.json``, in hexadecimal digits."""
    return hashlib.sha256(certificate).hexdigest()


def header(c: Certificate, digest: str) -> dict[str, Any]:
    """The YAML header of the card; arguments as for :func:`model_card`."""
    tags = ["dpsyngen", "differential-privacy", "diffusion", "image-generation", "synthetic-data"]
    return {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": tags if c.private else [*tags, "not-private"],
        "privacy": {
            "private": c.private,
            **({} if c.private else {"not_private_because": list(c.not_private_because)}),
            "epsilon": c.epsilon,
            "delta": c.delta,
            "unit": c.unit,
            "adjacency": c.adjacency,
            "group_size": c.group_size,
            "certificate": "privacy.json",
            "certificate_sha256": digest,
        },
    }


def model_card(certificate: Certificate, digest: str) -> str:
    """The model card as Markdown with a YAML header.

    Args:
        certificate: of the release.
        digest: of ``privacy.json``, see :func:`digest_of`.
    """
    c = certificate
    above = yaml.safe_dump(header(c, digest), sort_keys=False, allow_unicode=True, width=10**6)
    stamp = ""
    if not c.private:
        stamp = f"**NOT PRIVATE: {safe_markdown('; '.join(c.not_private_because))}.**\n\n"
        stamp += "Do not publish this if its images are private.\n\n"
    choice = ', class_labels=["…"]' if c.public_assumptions.class_names else ""
    return f"""---
# No license is set here: add yours (`license: …`) before you publish.
{above.rstrip()}
---

# A generator of synthetic images

{stamp}{_what_it_is(c)}

## Privacy

{_privacy(c, digest)}

## Intended use

{_uses(c)}

## Limits

{_limits(c)}

## How to load it

With dpsyngen, which reads numbers only and runs nothing of this folder:

```
dpsyngen sample FOLDER -n 10000 --out images
```

With diffusers, without dpsyngen.  **This runs code, `pipeline.py` and `denoiser/denoiser.py`.** \
Load it so only if you trust whoever gave it to you, or have checked it (below).

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)
images = pipeline(batch_size=16{choice}, seed=1).images
```

From the Hub get the whole folder first: `FOLDER = huggingface_hub.snapshot_download("OWNER/NAME")`.

## How to check it

`dpsyngen verify BUNDLE.zip` needs no private image.  It computes ε again from the mechanisms that `privacy.json` \
states, compares this card, `PRIVACY.md` and the code with what follows from the certificate and from its own version, \
checks every file against its checksum, and draws images.  It cannot see whether the training did what is stated.

## Files

| file | what it is |
|---|---|
| README.md | this card |
| PRIVACY.md | the privacy certificate in plain words |
| privacy.json | the certificate in numbers |
| generator.json, weights/ | the generator: what it is, and its numbers (safetensors) |
| config.yaml | all settings of the training |
| model_index.json, pipeline.py, denoiser/ | what diffusers loads it with; the two files in Python are **code** |
| report.html, public_training.jsonl | the report, and the course of training on images drawn by programs |
| samples/ | in a bundle (`dpsyngen release`): if there: generated images with their labels |
| certificate.schema.json | in a bundle (`dpsyngen release`): the JSON Schema of privacy.json |
| manifest.json, manifest.sig | in a bundle (`dpsyngen release`): checksums of all files, and a signature if \
there is one |

Made by dpsyngen {c.dpsyngen}.
"""


def _what_it_is(c: Certificate) -> str:
    a = c.public_assumptions
    classes, gaussian = "", "a model of DP moments alone"
    if a.class_names:
        names = safe_markdown(", ".join(a.class_names[:20])) + (", …" if len(a.class_names) > 20 else "")
        classes = f" of {len(a.class_names)} class{'es' if len(a.class_names) > 1 else ''} ({names})"
    kind = gaussian if c.variant == "gaussian" else f"a diffusion model, variant {safe_markdown(c.variant)}"
    size = f"{'grey' if a.channels == 1 else 'colour'} images of {a.resolution} × {a.resolution} pixels"
    text = f"It draws {size}{classes}.  It is {kind}, and learned from {a.records:,} private images"
    text += " with differential privacy." if c.private else ", **without a privacy guarantee**."
    if c.programs_used:
        text += "  Where realism does not matter it learned from images that a program draws, which hold nobody's data."
    return text


def _privacy(c: Certificate, digest: str) -> str:
    if c.epsilon == "inf":
        return f"There is no guarantee: ε is infinite.\n\n- Certificate: `privacy.json`, SHA-256 `{digest}`."
    claim = f"ε = {number(c.epsilon, up=True)}, δ = {number(c.delta, 3, up=True)}, for {c.unit}"
    lines = [f"**{claim}.**" if c.private else f"Were the noise secret, it would be: {claim}.", ""]
    lines += [
        f"- Neighbouring data sets: {c.adjacency}.",
        f"- Computed by: {c.accountant}.",
        f"- Certificate: `privacy.json`, SHA-256 `{digest}`; in plain words: `PRIVACY.md`.",
        "",
    ]
    lines += [strength(c.epsilon, c.delta), ""] if c.private else []
    return "\n".join([*lines, "What the guarantee rests on:", "", *foundations(c)])


def _uses(c: Certificate) -> str:
    if not c.private:
        return "Tests, and as a reference to compare private generators with; not in place of the private images."
    return (
        "- To draw as many images as are wanted in place of the private ones: for teaching, for software tests, as a "
        "training set of other models.  That is post-processing: it costs no more privacy, however many are drawn.\n"
        "- Not as a source of facts on any one image or person, and not for decisions about people: what is drawn is "
        "not real."
    )


def _limits(c: Certificate) -> str:
    uncovered = [] if c.epsilon == "inf" else [f"- The guarantee does not cover {text}." for text in c.not_covered]
    common = (
        "- What the private images have in common, their biases and gaps included, the generator has, too; what is "
        "rare among them is likely to be missing."
    )
    return "\n".join([f"- {c.utility}", *uncovered, common])
