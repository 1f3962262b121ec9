"""Labels as sources of image files give them, one by one, to numbers and names of classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dpsyngen.data.arrays import to_labels
from dpsyngen.data.labels import check_class_count, check_class_names
from dpsyngen.errors import DataError, listed


def index_of_labels(
    values: Sequence[int | str] | Sequence[int | str | None] | NDArray[np.int64] | None,
    class_names: Sequence[str] | None,
    where: str,
) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Class of each image, and the names of the classes.

    Args:
        values: whole numbers, or texts, none missing; None: there are no labels.
        class_names: names in the order of the numbers; None: the distinct values, sorted, are the classes.
        where: the source, for messages.

    Raises:
        DataError: numbers and texts are mixed, negative, beyond the names; or too many or impossible names.
    """
    if values is None:
        return None, ()
    if isinstance(values, np.ndarray):
        return to_labels(values, class_names, len(values), where)
    distinct = set(values)
    texts = [value for value in distinct if isinstance(value, str)]
    if not texts:
        return to_labels(np.asarray(values, dtype=np.int64), class_names, len(values), where)
    if len(texts) < len(distinct):
        raise DataError(f"{where}: some labels are numbers and some are texts. Use one of them for all images.")
    check_class_count(len(texts), where)
    names = tuple(sorted(texts)) if class_names is None else tuple(class_names)
    check_class_names(names, where)
    order: dict[object, int] = {name: i for i, name in enumerate(names)}
    unknown = sorted(text for text in texts if text not in order)
    if unknown:
        raise DataError(f"{where}: labels {listed(unknown)} are not among the class names {listed(names)}.")
    # One by one, as an array of texts takes for each of them what the longest takes.
    return np.fromiter((order[value] for value in values), dtype=np.int64, count=len(values)), names
