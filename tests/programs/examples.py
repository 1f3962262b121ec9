"""One set of parameters for each family, small enough for plain Python."""

from __future__ import annotations

from typing import Any

# Every registered family must be here (test_families checks that), and every kind of it that has its own code.
EXAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "dead-leaves": ("dead-leaves", {}),
    "dead-leaves-reference": ("dead-leaves", {"mode": "reference", "r_min": 0.15}),
    "dead-leaves-smooth": ("dead-leaves", {"supersample": 2, "exponent": 2.5, "colour": "palette"}),
    "spectrum": ("spectrum", {}),
    "spectrum-grey": ("spectrum", {"colour": "grey", "turn": False}),
    "wavelet-marginal": ("wavelet-marginal", {}),
    "wavelet-marginal-light": ("wavelet-marginal", {"colour": "grey", "tails": [1.0, 3.0]}),
    "smooth-noise": ("smooth-noise", {"kind": "perlin"}),
    "smooth-noise-ridged": ("smooth-noise", {"kind": "ridged", "colour": "grey"}),
    "random-network": ("random-network", {"width": 4}),
    "random-network-random": ("random-network", {"width": 5, "kind": "random"}),
    "random-network-high-frequency": ("random-network", {"width": 4, "kind": "high-frequency"}),
    "random-network-sparse": ("random-network", {"width": 4, "kind": "sparse"}),
    "fractal": ("fractal", {"ground": "random"}),
    "strokes": ("strokes", {}),
    "contours": ("contours", {"shape": "mixed"}),
    "contours-harmonics": ("contours", {"shape": "harmonics", "gradient": 1.0, "outline": 0.0}),
    "family": ("family", {"number": 3}),
    "family-textured": ("family", {"number": 13}),
    "family-whole": ("family", {"number": 5}),
    "scene": ("scene", {"number": 7}),
    "scene-leaves": ("scene", {"number": 13}),
    "scene-before-leaves": ("scene", {"number": 6}),
    "mixture": ("mixture", {"programs": ["strokes", {"name": "contours", "shape": "polygon"}], "weights": [1, 3]}),
    "affine": ("affine", {"source": "contours"}),
    "blur": ("blur", {"source": "strokes"}),
    "invert": ("invert", {"source": "strokes", "probability": 0.5}),
}
