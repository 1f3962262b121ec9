"""Bad images: list them all in one error, or leave them out and keep the list."""

from __future__ import annotations

from collections.abc import Sequence

from dpsyngen.errors import DataError, printable

LISTED = 1000  # lines of a list: whoever mends the files needs all of them


def settle_bad(bad: Sequence[tuple[str, str]], *, where: str, skip_bad: bool) -> tuple[str, ...]:
    """Raise for bad images, or return them as the record of what was skipped.

    Args:
        bad: (which, why) of every bad file or array entry.
        where: the source that was asked for.
        skip_bad: leave them out instead of raising.

    Returns:
        ``"which: why"`` for each, when ``skip_bad``.

    Raises:
        DataError: there are bad images and ``skip_bad`` is False.  One error that lists them all (the first 1,000).
    """
    lines = tuple(f"{printable(which)}: {printable(why)}" for which, why in bad)
    if not lines or skip_bad:
        return lines
    shown = "".join(f"\n  {line}" for line in lines[:LISTED])
    more = f"\n  … and {len(lines) - LISTED:,} more" if len(lines) > LISTED else ""
    count = "1 item" if len(lines) == 1 else f"{len(lines)} items"
    raise DataError(
        f"{printable(where)}: {count} cannot be used:{shown}{more}\n"
        "Mend or remove them, or leave them out with --skip-bad (from Python: skip_bad=True)."
    )
