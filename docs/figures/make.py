"""Writes the figures of the documentation: ``make figures``, or ``python -m docs.figures.make`` in the repository."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from docs.figures import dp_sgd_step, epsilon, gap, halves, imports, stages

HERE = Path(__file__).parent
DRAWINGS: dict[str, Callable[[], str]] = {
    "dp-sgd-step.svg": dp_sgd_step.draw,
    "epsilon.svg": epsilon.draw,
    "gap.svg": gap.draw,
    "halves.svg": halves.draw,
    "imports.svg": imports.draw,
    "stages.svg": stages.draw,
}


def main() -> None:
    from docs.figures import pictures

    for name, draw in DRAWINGS.items():
        (HERE / name).write_text(draw(), encoding="utf-8")
    pictures.noise_levels().save(HERE / "noise-levels.png", optimize=True)
    pictures.class_means().save(HERE / "class-means.png", optimize=True)


if __name__ == "__main__":
    main()
