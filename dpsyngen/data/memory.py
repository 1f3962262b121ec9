"""How much memory a source may ask for: a few bytes of a hostile file can declare terabytes."""

from __future__ import annotations

import os

from dpsyngen.errors import DataError, printable

FRACTION = 0.5  # the rest is for the network, the optimiser and the user's other programs


def available_bytes() -> int:
    """Memory that a new program could use without swapping (Linux), or the machine's memory elsewhere."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 8 * 2**30


def check_fits(num_bytes: int, *, what: str) -> None:
    """Raise DataError when ``what`` would take more than half of the memory; call it before loading."""
    limit = int(FRACTION * available_bytes())
    if num_bytes > limit:
        raise DataError(
            f"{printable(what)} would take {num_bytes / 2**30:,.1f} GiB of memory; at most "
            f"{limit / 2**30:,.1f} GiB (half of "
            "what is available) is allowed. If the file is sound, save its images as an uncompressed uint8 "
            ".npy or IDX "
            "file (read from disk as needed), or use a smaller resolution or a larger machine."
        )
