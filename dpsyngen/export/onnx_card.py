"""``README.md`` of a generator in ONNX."""

from __future__ import annotations

import yaml

from dpsyngen.certificate import Certificate, safe_markdown
from dpsyngen.export.card import header, limits, privacy, what_it_is

_INTERFACE = (
    ("x", "fp32 [batch, C, H, W]", "noisy images: clean ones lie in [-1, 1], plus noise of standard deviation σ"),
    ("sigma", "fp32 [batch]", "σ > 0"),
    ("labels", "int64 [batch]", "0 to K-1, or K for no class; only where denoiser.json says `labels: true`"),
    ("denoised", "fp32 [batch, C, H, W]", "the output: the clean images that are expected"),
)


def onnx_card(certificate: Certificate, digest: str, opset: int) -> str:
    """The card as Markdown with a YAML header.

    Args:
        certificate: of the release.
        digest: SHA-256 of its ``privacy.json``.
        opset: of the graphs.
    """
    c = certificate
    above = yaml.safe_dump(
        header(c, digest) | {"library_name": "onnx"}, sort_keys=False, allow_unicode=True, width=10**6
    )
    lines = ["---", "# No license is set here: add yours (`license: …`) before you publish.", above.rstrip(), "---", ""]
    lines += ["# A generator of synthetic images, in ONNX", ""]
    if not c.private:
        lines += [f"**NOT PRIVATE: {safe_markdown('; '.join(c.not_private_because))}.**", ""]
    lines += [*what_it_is(c), "", "## Privacy", "", *privacy(c, digest), "", "## Limits", "", *limits(c), ""]
    lines += [
        "## How to draw images",
        "",
        "`sample.py` needs NumPy and onnxruntime (and Pillow for PNGs).  **It is code**: read it before you run it.",
        "",
        "```",
        "python sample.py -n 16 --out images.npz",
        "```",
        "",
        f"## The graphs (opset {opset}, any batch size)",
        "",
        "`denoiser.json` says which of the `denoiser-….onnx` answers at which log σ; at a threshold itself it is the "
        "private stage's.  Stages trained on public images are asked without a class.  Where it names a `start`, "
        "sampling begins at that σ with what `start.onnx` makes of standard normal noise, else at σ_max with noise "
        "times σ_max.",
        "",
        "| name | type | what it is |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in _INTERFACE),
        "",
        f"Made by dpsyngen {c.dpsyngen}.",
        "",
    ]
    return "\n".join(lines)
