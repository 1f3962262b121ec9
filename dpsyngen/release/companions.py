"""Files of a release that follow from its certificate and from this version of the package: card, pipeline, code."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from dpsyngen.privacy.certificate import Certificate
from dpsyngen.release.card import model_card
from dpsyngen.release.hub.assemble import assemble
from dpsyngen.version import __version__

CARD, MODEL_INDEX, PIPELINE, DENOISER = "README.md", "model_index.json", "pipeline.py", "denoiser/denoiser.py"
COMPANIONS = (CARD, MODEL_INDEX, PIPELINE, DENOISER)
CODE = (MODEL_INDEX, PIPELINE, DENOISER)
"""What diffusers runs, or is led to run by."""

TESTED_DIFFUSERS = "0.42.1"

_HEADING = f"""The denoiser of a release of dpsyngen {__version__}, with all that it needs: networks, moments, samplers.

Assembled from dpsyngen's own modules, word for word; each stands below a line with its name.
`dpsyngen verify` compares this file with what that version writes.

SPDX-License-Identifier: Apache-2.0
"""


def companions(certificate: Certificate, digest: str) -> dict[str, str]:
    """The text of each of ``COMPANIONS``.

    Args:
        certificate: of the release.
        digest: SHA-256 of its ``privacy.json``.
    """
    return {CARD: model_card(certificate, digest), **code()}


@cache
def code() -> dict[str, str]:
    """The text of each of ``CODE``: the same in every release of this version."""
    index = {
        "_class_name": ["pipeline", "DPSynGenPipeline"],
        "_diffusers_version": TESTED_DIFFUSERS,
        "denoiser": ["denoiser", "ReleasedDenoiser"],
    }
    return {
        MODEL_INDEX: json.dumps(index, indent=1) + "\n",
        PIPELINE: (Path(__file__).parent / "hub" / "pipeline.py").read_text(encoding="utf-8"),
        DENOISER: assemble("dpsyngen.release.hub.denoiser", _HEADING),
    }
