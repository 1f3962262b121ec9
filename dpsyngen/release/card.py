"""The model card of a release: ``README.md`` with the header that the Hugging Face Hub reads.

It is a function of the certificate, like the page in plain words, so it cannot say anything that the numbers do not.
"""

from __future__ import annotations

import hashlib
from typing import Any

import yaml

from dpsyngen.privacy.certificate import Certificate, foundations, number, safe_markdown, strength

_FILES = (
    ("README.md", "this card"),
    ("PRIVACY.md", "the privacy certificate in plain words"),
    ("privacy.json", "the certificate in numbers"),
    ("generator.json, weights/", "the generator: what it is, and its numbers (safetensors)"),
    ("config.yaml", "all settings of the training"),
    ("model_index.json, pipeline.py, denoiser/", "what diffusers loads it with; the two files in Python are **code**"),
    ("report.html, public_training.jsonl", "the report, and the course of training on images drawn by programs"),
)
_IN_BUNDLES = (
    ("samples/", "if there: generated images with their labels"),
    ("certificate.schema.json", "the JSON Schema of privacy.json"),
    ("manifest.json, manifest.sig", "checksums of all files, and a signature if there is one"),
)


def digest_of(certificate: bytes) -> str:
    """SHA-256 of ``privacy.json``, in hexadecimal digits."""
    return hashlib.sha256(certificate).hexdigest()


def header(certificate: Certificate, digest: str) -> dict[str, Any]:
    """What the card's YAML header says.

    Args:
        certificate: of the release.
        digest: of ``privacy.json``, see :func:`digest_of`.
    """
    c = certificate
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
    """The card as Markdown with a YAML header.  Arguments as for :func:`header`."""
    c = certificate
    above = yaml.safe_dump(header(c, digest), sort_keys=False, allow_unicode=True, width=10**6)
    lines = ["---", "# No license is set here: add yours (`license: …`) before you publish.", above.rstrip(), "---", ""]
    lines += ["# A generator of synthetic images", ""]
    if not c.private:
        lines += [f"**NOT PRIVATE: {safe_markdown('; '.join(c.not_private_because))}.**", ""]
        lines += ["Do not publish this if its images are private.", ""]
    lines += [*what_it_is(c), "", "## Privacy", "", *privacy(c, digest), ""]
    lines += ["## Intended use", "", *_uses(c), "", "## Limits", "", *limits(c), ""]
    lines += ["## How to load it", "", *_loading(c), "", "## How to check it", "", *_checking(), ""]
    lines += ["## Files", "", "| file | what it is |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in _FILES]
    lines += [f"| {name} | in a bundle (`dpsyngen release`): {text} |" for name, text in _IN_BUNDLES]
    lines += ["", f"Made by dpsyngen {c.dpsyngen}.", ""]
    return "\n".join(lines)


def what_it_is(c: Certificate) -> list[str]:
    """A paragraph."""
    a = c.public_assumptions
    colour = "grey" if a.channels == 1 else "colour"
    classes = ""
    if a.class_names:
        more = ", …" if len(a.class_names) > 20 else ""
        names = safe_markdown(", ".join(a.class_names[:20]))
        classes = f" of {len(a.class_names)} class{'es' if len(a.class_names) > 1 else ''} ({names}{more})"
    kind = (
        "a model of DP moments alone"
        if c.variant == "gaussian"
        else f"a diffusion model, variant {safe_markdown(c.variant)}"
    )
    text = f"It draws {colour} images of {a.resolution} × {a.resolution} pixels{classes}.  It is {kind}, and learned "
    text += f"from {a.records:,} private images"
    text += " with differential privacy." if c.private else ", **without a privacy guarantee**."
    if c.programs_used:
        text += "  Where realism does not matter it learned from images that a program draws, which hold nobody's data."
    return [text]


def privacy(c: Certificate, digest: str) -> list[str]:
    """The claim, and what it rests on."""
    if c.epsilon == "inf":
        return [
            "There is no guarantee: ε is infinite.",
            "",
            f"- Certificate: `privacy.json`, SHA-256 `{digest}`.",
        ]
    claim = f"ε = {number(c.epsilon, up=True)}, δ = {number(c.delta, 3, up=True)}, for {c.unit}"
    lines = [f"**{claim}.**" if c.private else f"Were the noise secret, it would be: {claim}.", ""]
    lines += [
        f"- Neighbouring data sets: {c.adjacency}.",
        f"- Computed by: {c.accountant}.",
        f"- Certificate: `privacy.json`, SHA-256 `{digest}`; in plain words: `PRIVACY.md`.",
        "",
    ]
    if c.private:
        lines += [strength(c.epsilon, c.delta), ""]
    return [*lines, "What the guarantee rests on:", "", *foundations(c)]


def _uses(c: Certificate) -> list[str]:
    if not c.private:
        return ["Tests, and as a reference to compare private generators with; not in place of the private images."]
    return [
        "- To draw as many images as are wanted in place of the private ones: for teaching, for software tests, as a "
        "training set of other models.  That is post-processing: it costs no more privacy, however many are drawn.",
        "- Not as a source of facts on any one image or person, and not for decisions about people: what is drawn is "
        "not real.",
    ]


def limits(c: Certificate) -> list[str]:
    """What neither the guarantee nor the images give."""
    uncovered = [] if c.epsilon == "inf" else [f"- The guarantee does not cover {text}." for text in c.not_covered]
    return [
        f"- {c.utility}",
        *uncovered,
        "- What the private images have in common, their biases and gaps included, the generator has, too; what is "
        "rare among them is likely to be missing.",
    ]


def _loading(c: Certificate) -> list[str]:
    choice = ', class_labels=["…"]' if c.public_assumptions.class_names else ""
    return [
        "With dpsyngen, which reads numbers only and runs nothing of this folder:",
        "",
        "```",
        "dpsyngen sample FOLDER -n 10000 --out images",
        "```",
        "",
        "With diffusers, without dpsyngen.  **This runs code, `pipeline.py` and `denoiser/denoiser.py`.** "
        "Load it so only if you trust whoever gave it to you, or have checked it (below).",
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        "",
        'pipeline = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)',
        f"images = pipeline(batch_size=16{choice}, seed=1).images",
        "```",
        "",
        'From the Hub get the whole folder first: `FOLDER = huggingface_hub.snapshot_download("OWNER/NAME")`.',
    ]


def _checking() -> list[str]:
    return [
        "`dpsyngen verify BUNDLE.zip` needs no private image.  It computes ε again from the mechanisms that "
        "`privacy.json` states, compares this card, `PRIVACY.md` and the code with what follows from the certificate "
        "and from its own version, checks every file against its checksum, and draws images.  It cannot see whether "
        "the training did what is stated.",
    ]
