"""Which column of a Hugging Face table has the images, which the labels, and what the classes are called.

The schema's metadata, where ``datasets`` writes its features, decides; without it, names of columns do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpsyngen.data.labels import check_class_names
from dpsyngen.errors import DataError, listed

IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels")
_MAX_METADATA_BYTES = 2**23


@dataclass(frozen=True)
class Columns:
    """The columns that are read.

    Attributes:
        image: name of the column of images.
        label: name of the column of labels, or None.
        class_names: what the numbers in it stand for; None if the table does not say.
    """

    image: str
    label: str | None
    class_names: tuple[str, ...] | None


def features_of(metadata: dict[bytes, bytes] | None, where: str) -> dict[str, Any]:
    """The features in a schema's metadata: by column, a mapping with ``_type``; ``{}`` where there are none.

    Raises:
        DataError: they are damaged.
    """
    text = (metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    try:
        if len(text) > _MAX_METADATA_BYTES:
            raise ValueError("too long")
        features = json.loads(text)["info"]["features"]
        if not isinstance(features, dict):
            raise TypeError("features are no mapping")
        return features
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{where}: the metadata that Hugging Face datasets wrote are damaged. Save it again."
        ) from error


def choose_columns(names: Sequence[str], features: dict[str, Any], where: str, *, labels: bool) -> Columns:
    """The columns of images and labels.

    Args:
        names: of all columns.
        features: see :func:`features_of`.
        where: the source, for messages.
        labels: whether labels are wanted.

    Raises:
        DataError: there is no column of images, or it is unclear which one is meant.
    """
    image = _one(names, _typed(features, "Image"), IMAGE_NAMES, "images", where)
    if image is None:
        raise DataError(
            f"{where} has no column of images: its columns are {listed(names)}. Name it 'image'; its values are the "
            "content of image files (struct of bytes and path, as Hugging Face datasets writes it, or binary)."
        )
    if not labels:
        return Columns(image, None, None)
    label = _one(names, _typed(features, "ClassLabel"), LABEL_NAMES, "labels", where)
    feature = features.get(label) if label is not None else None
    class_names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    if class_names is None:
        return Columns(image, label, None)
    if not isinstance(class_names, list):
        raise DataError(f"{where}: the class names in its metadata are damaged. Save it again.")
    check_class_names(class_names, where)
    return Columns(image, label, tuple(class_names))


def _typed(features: dict[str, Any], kind: str) -> list[str]:
    return [name for name, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == kind]


def _one(names: Sequence[str], typed: Sequence[str], usual: Sequence[str], what: str, where: str) -> str | None:
    candidates = [name for name in typed if name in names]
    if len(candidates) == 1:
        return candidates[0]
    known = next((name for name in usual if name in (candidates or names)), None)
    if known is None and candidates:
        raise DataError(
            f"{where} has several columns of {what}: {listed(candidates)}. Rename the one that is meant to {usual[0]!r}"
            + (", or ask for images without labels (labels=False)." if what == "labels" else ".")
        )
    return known
