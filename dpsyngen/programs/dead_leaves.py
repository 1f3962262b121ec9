"""Dead leaves: random shapes that lie over each other until nothing of the ground shows.

Sources: the model is Matheron's (1968); the r⁻³ law, which makes images scale-invariant with a power spectrum ≈ 1/f²,
is in Lee, Mumford, Huang, "Occlusion models for natural images", IJCV 2001; the shapes are those of Baradad et al.,
"Learning to See by Looking at Noise", arXiv 2106.05963.

A leaf has a centre and a *circumradius* r: discs have radius r, and the corners of all other shapes lie on the circle
of radius r around the centre.

=================  ======================================================================================
disc               radius r
square             axis-aligned, side r√2
oriented-square    the same, turned by a uniform angle
rectangle          axis-aligned, half-sides r·|cos θ| and r·|sin θ| with θ uniform
triangle           corners at three independent uniform angles
quadrilateral      corners at four independent uniform angles, joined in order of angle
mixed              each leaf one of the six above, evenly
=================  ======================================================================================

``mode="exact"`` draws the model itself, by coupling from the past: leaves come from all around the canvas, each is
placed under the earlier ones, and the image is done when all is covered.  It is stationary: its statistics are the
same at the border as in the middle.  ``mode="reference"`` is what published code does; see `drawing.reference_leaves`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dpsyngen.errors import require
from dpsyngen.programs.base import Program, as_choice, as_integer, as_number, colour_param, param
from dpsyngen.programs.drawing import Images, Words
from dpsyngen.programs.drawing.colours import GREY, LAWS
from dpsyngen.programs.drawing.counter_rng import cumulative
from dpsyngen.programs.drawing.exact_leaves import draw_exact
from dpsyngen.programs.drawing.reference_leaves import draw_reference
from dpsyngen.programs.drawing.shapes import KINDS, LeafLaw
from dpsyngen.programs.registry import register

SHAPES = (*KINDS, "mixed")
MODES = ("exact", "reference")
MAX_CANVAS = 4096


def as_shape(name: str, value: Any) -> str:
    """Return a shape of leaves; "circle", the literature's name, is a disc."""
    return "disc" if value == "circle" else as_choice(name, value, SHAPES)


@register("dead-leaves")
@dataclass(frozen=True, kw_only=True)
class DeadLeaves(Program):
    """Dead leaves with radii of density ∝ r^−exponent on [r_min, r_max]; see the module for the model and its sources.

    Attributes:
        shape: "disc" (or "circle"), "square", "oriented-square", "rectangle", "triangle", "quadrilateral" or
            "mixed".
        colour: law of a leaf's colour.  "grey": one level uniform on 0…255; "black-white": 0 or 255, evenly;
            "rgb": three independent uniform levels, needs channels=3; "palette": one of 2 to 8 uniform colours, drawn
            for each image.  The first two repeat their level when channels=3.  None, the default, means "grey" for 1
            channel and "rgb" for 3.
        r_min, r_max: range of the circumradius as fractions of the resolution, 0 < r_min < r_max ≤ 1.
        exponent: of the radius law, 0 to 8; 3 makes images scale-invariant.
        mode: "exact", or "reference" for the published order of painting, whose density is ∝ r⁻³ − r_max⁻³.
        supersample: draw on a canvas this many times finer and average, 1 to 8; 1 leaves edges hard.
    """

    prior_tier: ClassVar[int] = 0

    shape: str = param("mixed", as_shape)
    colour: str = colour_param(LAWS, ("rgb",))
    r_min: float = param(0.03, as_number, 0.0, 1.0, above=True)
    r_max: float = param(1.0, as_number, 0.0, 1.0, above=True)
    exponent: float = param(3.0, as_number, 0.0, 8.0)
    mode: str = param("exact", as_choice, MODES)
    supersample: int = param(1, as_integer, 1, 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.r_min < self.r_max, "r_min", self.r_min, f"such that r_min < r_max={self.r_max}")
        canvas = self.resolution * self.supersample
        allowed = f"smaller at resolution {self.resolution}: the canvas would have {canvas} pixels, over {MAX_CANVAS}"
        require(canvas <= MAX_CANVAS, "supersample", self.supersample, allowed)
        allowed = "3 with mode='reference', the published law: leave out exponent, or use mode='exact'"
        require(self.mode == "exact" or self.exponent == 3.0, "exponent", self.exponent, allowed)

    def _law(self) -> LeafLaw:
        only = KINDS.index(self.shape) if self.shape != "mixed" else -1
        colour = LAWS.index(self.colour)
        grey = self.channels == 1 or colour == GREY
        return LeafLaw(cumulative([1.0] * len(KINDS)), only, colour, grey, self.exponent, self.r_min, self.r_max)

    def _draw(self, indices: Words, out: Images) -> None:
        draw = draw_exact if self.mode == "exact" else draw_reference
        draw(indices, np.uint64(self.seed), self._law(), self.supersample, out)
