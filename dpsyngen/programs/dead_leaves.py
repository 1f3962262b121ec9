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
mixed              each leaf one of the six above, by `weights`
=================  ======================================================================================

``mode="exact"`` draws the model itself, by coupling from the past: leaves come from all around the canvas, each is
placed under the earlier ones, and the image is done when all is covered.  It is stationary: its statistics are the
same at the border as in the middle.  ``mode="reference"`` is what published code does; see `drawing.reference_leaves`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dpsyngen.errors import ConfigError
from dpsyngen.programs.base import (
    Program,
    as_choice,
    as_indices,
    as_integer,
    as_number,
    as_weights,
    colour_param,
    param,
)
from dpsyngen.programs.drawing import Canvas, Floats, Images, Ints, Word, Words
from dpsyngen.programs.drawing.colours import GREY, LAWS
from dpsyngen.programs.drawing.counter_rng import below, cumulative, words32
from dpsyngen.programs.drawing.exact_leaves import RECORDED, cover, draw_exact, unpack, workspace
from dpsyngen.programs.drawing.portable import compiled
from dpsyngen.programs.drawing.reference_leaves import draw_reference
from dpsyngen.programs.drawing.shapes import KINDS, LeafLaw
from dpsyngen.programs.registry import inner_program, register

SHAPES = (*KINDS, "mixed")
MODES = ("exact", "reference")
MAX_CANVAS = 4096
TEXTURES = 8  # to an image: enough that neighbours differ, and few enough to draw fast

_TEXTURES = np.uint64(0x74657874)  # "text"


def as_shape(name: str, value: Any) -> str:
    """Return a shape of leaves; "circle", the literature's name, is a disc."""
    return "disc" if value == "circle" else as_choice(name, value, SHAPES, "a shape")


@register("dead-leaves")
@dataclass(frozen=True, kw_only=True)
class DeadLeaves(Program):
    """Dead leaves with radii of density ∝ r^−exponent on [r_min, r_max]; see the module for the model and its sources.

    `params` gives ``leaves``, how many were placed, and in exact mode their ``x``, ``y``, ``radius`` (pixels),
    ``shape`` and ``visible`` (pixels left to see), the topmost leaf first.

    Attributes:
        shape: "disc" (or "circle"), "square", "oriented-square", "rectangle", "triangle", "quadrilateral" or
            "mixed".
        weights: how often "mixed" takes each shape, as a mapping or as pairs; None: evenly.  Shapes left out
            never occur.
        colour: law of a leaf's colour.  "grey": one level uniform on 0…255; "black-white": 0 or 255, evenly;
            "rgb": three independent uniform levels, needs channels=3; "palette": one of 2 to 8 uniform colours, drawn
            for each image.  The first two repeat their level when channels=3.  None, the default, means "grey" for 1
            channel and "rgb" for 3.
        r_min, r_max: range of the circumradius as fractions of the resolution, 0 < r_min < r_max ≤ 1.
        exponent: of the radius law, 0 to 8; 3 makes images scale-invariant.
        mode: "exact", or "reference" for the published order of painting, whose density is ∝ r⁻³ − r_max⁻³.
        supersample: draw on a canvas this many times finer and average, 1 to 8; 1 leaves edges hard.
        texture: a program (its name, or a mapping with its name and parameters) whose images fill the leaves instead of
            a flat colour; exact mode only.  Each image uses `TEXTURES` of them, every leaf one of these at its own
            offset, mirrored at the edges of the texture.
    """

    shape: str = param("mixed", as_shape)
    colour: str = colour_param(LAWS, ("rgb",))
    r_min: float = param(0.03, as_number, 0.0, 1.0, above=True, hint="a fraction of the resolution")
    r_max: float = param(1.0, as_number, 0.0, 1.0, above=True, hint="a fraction of the resolution")
    exponent: float = param(3.0, as_number, 0.0, 8.0)
    mode: str = param("exact", as_choice, MODES, "a mode")
    weights: Any = None
    supersample: int = param(1, as_integer, 1, 8)
    texture: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        fix = object.__setattr__
        if self.weights is not None:
            if self.shape != "mixed":
                raise ConfigError(f"weights are for shape='mixed', and shape={self.shape!r} was given: leave out one.")
            fix(self, "weights", as_weights("weights", self.weights, KINDS))
        if not self.r_min < self.r_max:
            raise ConfigError(
                f"r_min={self.r_min} and r_max={self.r_max} leave no radius between them: "
                "give 0 < r_min < r_max ≤ 1 (fractions of the resolution; published: 0.03 and 1)."
            )
        if self.resolution * self.supersample > MAX_CANVAS:
            raise ConfigError(
                f"supersample={self.supersample} at resolution {self.resolution} needs a canvas of "
                f"{self.resolution * self.supersample} pixels: give a product of at most {MAX_CANVAS}."
            )
        if self.mode == "reference" and (self.exponent != 3.0 or self.texture is not None):
            raise ConfigError(
                "mode='reference' is the published law, with exponent 3 and flat leaves: "
                "leave out exponent and texture, or use mode='exact'."
            )
        if self.texture is not None:
            fix(self, "texture", inner_program(self, "texture", self.texture))

    @property
    def prior_tier(self) -> int:  # type: ignore[override]
        """The prior tier: 0, or that of the texture."""
        return 0 if self.texture is None else int(self.texture.prior_tier)

    def _law(self) -> LeafLaw:
        weights = [1.0] * len(KINDS) if self.weights is None else [dict(self.weights).get(kind, 0.0) for kind in KINDS]
        only = KINDS.index(self.shape) if self.shape != "mixed" else -1
        if np.count_nonzero(weights) == 1:  # the same images as with `shape`
            only = int(np.argmax(weights))
        colour = LAWS.index(self.colour)
        grey = self.channels == 1 or colour == GREY
        return LeafLaw(cumulative(weights), only, colour, grey, self.exponent, self.r_min, self.r_max)

    def _draw(self, indices: Words, out: Images) -> None:
        if self.texture is not None:
            self._draw_textured(indices, out)
        else:
            self._draw_flat(indices, out, np.empty(len(indices), dtype=np.int64))

    def _draw_flat(self, indices: Words, out: Images, leaves: Ints) -> None:
        draw = draw_exact if self.mode == "exact" else draw_reference
        draw(indices, np.uint64(self.seed), self._law(), self.supersample, out, leaves)

    def _cover(self, index: int, record: Floats) -> tuple[Canvas, int]:
        """Return the number of the leaf seen at each pixel of the canvas, and how many leaves were placed."""
        work = workspace(self.resolution * self.supersample)
        leaves = cover(np.uint64(self.seed), np.uint64(index), self._law(), True, work, record)
        return work[0], leaves

    def _draw_textured(self, indices: Words, out: Images) -> None:
        nothing = np.empty((0, RECORDED))
        for n, index in enumerate(indices):
            canvas, _ = self._cover(int(index), nothing)
            # 2⁶³ images are enough: the textures of image i are the inner program's images 8i … 8i + 7, wrapped.
            first = int(index) * TEXTURES % 2**63
            textures = self.texture.batch([(first + k) % 2**63 for k in range(TEXTURES)])
            fill_leaves(canvas, textures, np.uint64(self.seed), index, self.supersample, out[n])

    def _params(self, index: int) -> dict[str, Any]:
        if self.mode == "reference":
            return {"leaves": int(self.leaf_counts([index])[0])}
        leaves = self._cover(index, np.empty((0, RECORDED)))[1]
        record = np.empty((leaves, RECORDED))
        self._cover(index, record)
        x, y, radius, kind, visible = record.T / np.array([[self.supersample] * 3 + [1] * 2]).T
        return {
            "leaves": leaves,
            "x": x,
            "y": y,
            "radius": radius,
            "shape": [KINDS[int(k)] for k in kind],
            "visible": visible.astype(np.int64),
        }

    def leaf_counts(self, indices: ArrayLike) -> Ints:
        """Count the leaves that each image took until no ground showed, int64 [N]; to study law and cost."""
        chosen = as_indices(indices)
        out = np.empty((len(chosen), self.channels, self.resolution, self.resolution), dtype=np.uint8)
        leaves = np.empty(len(chosen), dtype=np.int64)
        self._draw_flat(chosen, out, leaves)
        return leaves


@compiled
def fill_leaves(canvas: Canvas, textures: Images, seed: Word, index: Word, factor: int, out: Images) -> None:
    """Replace the leaf numbers of `canvas` by pixels of the textures, uint8 [T, C, S, S], in `out`, [C, S, S]."""
    size = out.shape[1]
    fine = canvas.shape[0]
    packed = np.empty((fine, fine), dtype=np.int32)
    for i in range(fine):
        for j in range(fine):
            # The leaf's number is the block: all its pixels get one texture and one offset.
            a, b, c, _ = words32(seed, _TEXTURES, index, np.uint64(canvas[i, j]))
            texture = below(a, textures.shape[0])
            y = (i // factor + below(b, 2 * size)) % (2 * size)
            x = (j // factor + below(c, 2 * size)) % (2 * size)
            y = min(y, 2 * size - 1 - y)  # mirrored, so that the texture has no seam
            x = min(x, 2 * size - 1 - x)
            value = 0
            for k in range(out.shape[0]):
                value |= int(textures[texture, k, y, x]) << (8 * k)
            packed[i, j] = value
    unpack(packed, factor, out)
