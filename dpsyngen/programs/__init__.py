"""Images drawn by programs: random shapes that contain nobody's data, and so cost no privacy at all.

>>> from dpsyngen.programs import make_program
>>> leaves = make_program("dead-leaves", resolution=28, channels=1, seed=0)
>>> leaves.batch(range(64)).shape
(64, 1, 28, 28)

A family is a `Program` subclass decorated by ``@register("its-name")``, in a module that `registry` lists.
No code in this package reads private data, and its seeds are public (see `Program`).
Importing this package is cheap: the families, and numba, which compiles them, are imported on first use.
"""

from __future__ import annotations

from dpsyngen.programs.base import Program
from dpsyngen.programs.grid import image_grid, save_grid
from dpsyngen.programs.registry import TIERS, make_program, program_names, register

__all__ = ["TIERS", "Program", "image_grid", "make_program", "program_names", "register", "save_grid"]
