"""What all plots of a comparison share: colours, axes, legends, and an SVG that a page can hold beside others.

Colours stand out from white and from black by 3:1, differ for the colour-blind, and never stand alone: each variant
has a marker and a dash of its own.  Text takes the colour of the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

STYLES: dict[str, tuple[str, str, Any]] = {
    "dpdm": ("#7d838c", "o", "-"),
    "finetune": ("#b87400", "s", (0, (6, 2))),
    "cleaning": ("#009070", "^", (0, (2, 1.5))),
    "coarse": ("#2b7fc4", "D", (0, (7, 2, 1.5, 2))),
    "both": ("#c0519b", "v", (0, (4, 1, 1, 1, 1, 1))),
    "gaussian": ("#a1532f", "p", (0, (1, 1))),
    "residual": ("#2f8f57", "*", (0, (9, 1.5))),
    "residual-cleaning": ("#7d6bc9", "h", (0, (3, 1, 1, 1))),
}
"""Colour, marker and dashes of each variant."""
_OTHER = (("#8a6d3b", "P", "-"), ("#6f6fc4", "X", "--"))
INK = "#010203"  # replaced by the colour of the page's text


@dataclass(frozen=True)
class Plot:
    """One picture.

    Attributes:
        name: of its files.
        title: above it.
        alt: what it shows, in words and numbers.
        note: how to read it.
        svg: to put into a page; its text has the colour of the page's text.
        wide: it needs the width of the page.
    """

    name: str
    title: str
    alt: str
    note: str
    svg: str
    wide: bool = False


def style(variant: str, number: int) -> tuple[str, str, Any]:
    """Colour, marker and dashes of a variant; `number` chooses those of one that is not ours."""
    return STYLES.get(variant) or _OTHER[number % len(_OTHER)]


def new_axes(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color("#888")
    axes.tick_params(color="#888", labelcolor=INK, labelsize=8.5)
    return figure, axes


def label(setter: Any, text: str) -> None:
    """Name an axis: ``label(axes.set_xlabel, "step")``."""
    setter(text, fontsize=9, color=INK)


def legend(axes: Any, columns: int = 3) -> None:
    """What is what, above the axes, in so many columns or as many as fit."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    longest = max(map(len, labels))
    axes.legend(
        handles,
        labels,
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        ncols=min(columns, 3 if longest < 14 else 2 if longest < 36 else 1, len(labels)),
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        handlelength=3.4,
        columnspacing=1.2,
        borderaxespad=0.2,
    )


def finished(
    figure: Any, name: str, title: str, said: Sequence[str], note: str, wide: bool = False
) -> tuple[Plot, bytes]:
    """The plot as SVG for a page, and as PNG on white; the figure is closed.

    Args:
        figure: of matplotlib.
        name: of its files.
        title: above it.
        said: what it shows, in words.
        note: how to read it.
        wide: it needs the width of the page.
    """
    import matplotlib.pyplot as plt

    name = re.sub(r"[^A-Za-z0-9.=+-]", "_", name)
    text, picture = io.StringIO(), io.BytesIO()
    # No date and fixed names inside: the same results give the same file.
    with plt.rc_context({"svg.hashsalt": f"dpsyngen {name}"}):
        figure.savefig(text, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
        figure.savefig(
            picture, format="png", dpi=200, bbox_inches="tight", facecolor="white", metadata={"Software": None}
        )
    plt.close(figure)
    alt = f"{title}.  {'; '.join(said)}."
    return Plot(name, title, alt, note, _inline(text.getvalue(), name, alt, wide), wide), picture.getvalue()


def _inline(text: str, name: str, alt: str, wide: bool) -> str:
    """matplotlib's SVG made fit to stand in a page beside others."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    text = text[text.index(">", text.index("<svg")) + 1 :]
    used = set(re.findall(r"""(?:href="|url\()#([^")]+)""", text))
    # Names must be unique in the page, and most are not used at all.
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    text = text.replace(INK, "currentColor")
    words = escape(alt, quote=True)
    look = f"plot {'wide' if wide else ''}".strip()
    return f'<svg class="{look}" viewBox="{box[1]}" role="img" aria-label="{words}">{text.strip()}'
