"""What image programs are made of: compiled loops, counter-based random numbers, portable functions, rasters.

Everything here gives the same bits on every machine; see `portable`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Word = np.uint64  # a seed, a stream, an index or random bits
Words = NDArray[np.uint64]
Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Ints = NDArray[np.int64]
Images = NDArray[np.uint8]  # levels 0 to 255; one image [C, H, W] or several [N, C, H, W]
Law = tuple[Any, ...]  # the parameters of a family as numbers, in the order in which its functions unpack them
Canvas = NDArray[np.int32]  # packed colours or numbers of leaves [S, S], negative where nothing is yet; or pixels
