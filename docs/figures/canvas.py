"""A small SVG canvas for the figures of the documentation: white ground, system letters, a handful of shapes.

The site turns the figures dark by a filter (assets/site.css), so colours are chosen for white alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

INK, SOFT, LINE = "#1d2129", "#555d69", "#c9ced6"
PUBLIC, PRIVATE, MOMENTS = "#0f6b61", "#ab2a3f", "#6a4a9c"
PUBLIC_SOFT, PRIVATE_SOFT, MOMENTS_SOFT, GREY_SOFT = "#d5efeb", "#f9dfe3", "#e8e0f5", "#eef0f3"
_LETTERS = "system-ui, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"

Points = Sequence[tuple[float, float]]


class Canvas:
    """Shapes on a white ground, in pixels from the upper left corner.

    Args:
        width, height: of the figure.
        title: what it shows, for those who do not see it.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self._parts: list[str] = []

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str, *, edge: str = "none", round: float = 0
    ) -> None:
        place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{round:g}"'
        self._parts.append(f'<rect {place} fill="{fill}" stroke="{edge}"/>')

    def circle(self, x: float, y: float, radius: float, fill: str, *, edge: str = "none") -> None:
        self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{fill}" stroke="{edge}"/>')

    def line(self, points: Points, colour: str = SOFT, *, width: float = 1.5, dash: str = "") -> None:
        look = f'fill="none" stroke="{colour}" stroke-width="{width:g}" stroke-linejoin="round"'
        look += f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(f'<polyline points="{_text(points)}" {look}/>')

    def area(self, points: Points, fill: str, *, opacity: float = 1.0) -> None:
        self._parts.append(f'<polygon points="{_text(points)}" fill="{fill}" fill-opacity="{opacity:g}"/>')

    def arrow(
        self, start: tuple[float, float], end: tuple[float, float], colour: str = SOFT, *, width: float = 1.5
    ) -> None:
        """A line with a head at its end."""
        (x0, y0), (x1, y1) = start, end
        length = math.hypot(x1 - x0, y1 - y0) or 1.0
        ux, uy = (x1 - x0) / length, (y1 - y0) / length
        head = min(4 + 2 * width, 0.6 * length)
        bx, by = x1 - head * ux, y1 - head * uy
        self.line([start, (bx, by)], colour, width=width)
        side = 0.45 * head
        self.area([(x1, y1), (bx - side * uy, by + side * ux), (bx + side * uy, by - side * ux)], colour)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        colour: str = INK,
        *,
        size: float = 13,
        at: str = "start",
        bold: bool = False,
    ) -> None:
        """`at` is "start", "middle" or "end": where in the text x is; y is its base line."""
        weight = ' font-weight="600"' if bold else ""
        place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{at}"'
        self._parts.append(f'<text {place} fill="{colour}"{weight}>{escape(text)}</text>')

    def svg(self) -> str:
        """The figure as the text of an SVG file."""
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
        head += f'width="{self.width}" height="{self.height}" role="img" font-family="{escape(_LETTERS)}">'
        ground = f'<rect width="{self.width}" height="{self.height}" fill="#ffffff"/>'
        return "\n".join([head, f"<title>{escape(self.title)}</title>", ground, *self._parts, "</svg>"]) + "\n"


class Axes:
    """A plotting area with linear scales; give logarithms for logarithmic ones.

    Args:
        canvas: where it is drawn.
        box: left, top, right, bottom in pixels.
        x: ends of the horizontal scale.
        y: ends of the vertical scale.
    """

    def __init__(
        self, canvas: Canvas, box: tuple[float, float, float, float], x: tuple[float, float], y: tuple[float, float]
    ) -> None:
        self.canvas, self.box, self._x, self._y = canvas, box, x, y

    def across(self, x: float) -> float:
        left, _, right, _ = self.box
        return left + (right - left) * (x - self._x[0]) / (self._x[1] - self._x[0])

    def down(self, y: float) -> float:
        _, top, _, bottom = self.box
        return bottom - (bottom - top) * (y - self._y[0]) / (self._y[1] - self._y[0])

    def frame(
        self, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]], x_label: str, y_label: str
    ) -> None:
        """Grid, ticks and labels; the label of the y axis stands above it."""
        left, top, right, bottom = self.box
        c = self.canvas
        for value, text in y_ticks:
            c.line([(left, self.down(value)), (right, self.down(value))], LINE, width=1)
            c.text(left - 6, self.down(value) + 4, text, SOFT, size=12, at="end")
        for value, text in x_ticks:
            c.line([(self.across(value), bottom), (self.across(value), bottom + 4)], SOFT, width=1)
            c.text(self.across(value), bottom + 18, text, SOFT, size=12, at="middle")
        c.line([(left, bottom), (right, bottom)], SOFT, width=1)
        c.text((left + right) / 2, bottom + 36, x_label, INK, size=13, at="middle")
        c.text(left - 34, top - 12, y_label, INK, size=13)

    def curve(
        self,
        function: Callable[[float], float],
        at: Sequence[float],
        colour: str,
        *,
        width: float = 2.2,
        dash: str = "",
    ) -> None:
        """The part of a curve that lies in the area."""
        low, high = self._y
        shown = [(x, function(x)) for x in at]
        points = [(self.across(x), self.down(y)) for x, y in shown if low <= y <= high]
        self.canvas.line(points, colour, width=width, dash=dash)


def _text(points: Points) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
