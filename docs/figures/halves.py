"""The two halves of a run, and the one way from the images into the release."""

from __future__ import annotations

from docs.figures.canvas import GREY_SOFT, INK, PRIVATE, PRIVATE_SOFT, PUBLIC, PUBLIC_SOFT, SOFT, Canvas


def draw() -> str:
    """The SVG file."""
    c = Canvas(
        720,
        330,
        "The images and the private half of a run (key, ledger, checkpoints, losses, private figures) stay with the "
        "holder. The only way into the release half is the mechanism: clipped sums plus noise, charged to the ledger "
        "first. Programs and settings, which are public, reach the release freely.",
    )
    c.rect(8, 8, 236, 250, PRIVATE_SOFT, edge=PRIVATE, round=8)
    c.text(22, 32, "private: stays with you", PRIVATE, size=14, bold=True)
    box(c, 24, 46, 204, "your images", "one image = one record")
    box(c, 24, 118, 204, "RUN/private/  (0700)", "key, ledger, checkpoints, losses,", "private figures, full report")
    c.rect(476, 8, 236, 250, PUBLIC_SOFT, edge=PUBLIC, round=8)
    c.text(490, 32, "may be published", PUBLIC, size=14, bold=True)
    box(c, 492, 46, 204, "RUN/release/", "weights, settings, statement,", "public report")
    box(c, 492, 134, 204, "images drawn from it", "as many as you like")
    box(c, 492, 196, 204, "bundle.zip", "with certificate and checksums")
    c.arrow((594, 110), (594, 134), PUBLIC)
    c.rect(284, 46, 152, 92, "#ffffff", edge=INK, round=6)
    c.text(360, 68, "the mechanism", INK, at="middle", bold=True)
    for number, line in enumerate(("Poisson sample,", "clip, add up,", "+ Gaussian noise")):
        c.text(360, 87 + 17 * number, line, SOFT, size=12.5, at="middle")
    c.arrow((228, 70), (284, 70), PRIVATE, width=2.4)
    c.arrow((436, 78), (492, 78), PUBLIC, width=2.4)
    c.arrow((284, 122), (228, 146), SOFT)
    c.text(292, 166, "charged to the ledger", SOFT, size=12.5)
    c.text(292, 183, "before its result is used", SOFT, size=12.5)
    c.rect(284, 274, 152, 48, GREY_SOFT, round=6)
    c.text(360, 294, "programs, settings", INK, at="middle", bold=True)
    c.text(360, 312, "public, no privacy cost", SOFT, size=12.5, at="middle")
    c.line([(436, 298), (460, 298), (460, 98), (482, 98)], PUBLIC, width=1.8)
    c.arrow((476, 98), (492, 98), PUBLIC, width=1.8)
    c.text(22, 284, "nothing else crosses: a test trains on", SOFT, size=12.5)
    c.text(22, 301, "other images with equal noisy sums and", SOFT, size=12.5)
    c.text(22, 318, "wants the same release, byte for byte", SOFT, size=12.5)
    return c.svg()


def box(c: Canvas, x: float, y: float, width: float, title: str, *lines: str) -> None:
    """A white box with a title and lines below it."""
    c.rect(x, y, width, 30 + 17 * len(lines), "#ffffff", edge=SOFT, round=5)
    c.text(x + 10, y + 20, title, INK, bold=True)
    for number, line in enumerate(lines):
        c.text(x + 10, y + 38 + 17 * number, line, SOFT, size=11.5)
