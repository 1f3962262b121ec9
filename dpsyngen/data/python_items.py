"""Items of datasets in Python: an image and a label, in any of the forms that :class:`MapStyle` allows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.data.arrays import arranged, converted
from dpsyngen.data.columns import IMAGE_NAMES, LABEL_NAMES
from dpsyngen.data.decode import MAX_PIXELS, BadImage, Colour, decode_image, is_grey
from dpsyngen.errors import DataError, listed, shown

Label = int | str | None


def is_pil(image: Any) -> bool:
    return hasattr(image, "getexif") and hasattr(image, "mode")


def _array(image: Any) -> NDArray[Any]:
    """An image that is an array or a tensor as ``[1, C, H, W]``."""
    if not isinstance(image, np.ndarray) and not hasattr(image, "__array__"):
        raise BadImage(f"the image is {shown(type(image).__name__)}: a PIL image, an array or a CPU tensor is read")
    array = np.asarray(image)
    if array.ndim not in (2, 3):
        raise BadImage(f"the image has shape {list(array.shape)}: [H, W], [H, W, C] or [C, H, W] is read")
    if 0 in array.shape:
        raise BadImage(f"the image has shape {list(array.shape)}, which is empty")
    try:
        whole: NDArray[Any] = arranged(array[None, None] if array.ndim == 2 else array[None], "the image")
    except DataError as error:
        raise BadImage(str(error).removeprefix("the image: ")) from None
    return whole


def form_of(image: Any) -> tuple[int, int, bool]:
    """(width, height, whether it is grey)."""
    if is_pil(image):
        return *image.size, is_grey(image)
    array = _array(image)
    return array.shape[3], array.shape[2], array.shape[1] == 1


def pixels_of(image: Any, resolution: int, colour: Colour) -> NDArray[np.uint8]:
    """uint8 ``[C, resolution, resolution]``."""
    if is_pil(image):
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(f"{image.width}×{image.height} pixels: over the limit of {MAX_PIXELS:,}")
        return decode_image(image, resolution=resolution, colour=colour)
    pixels, bad = converted(_array(image), resolution, colour)
    if bad:
        raise BadImage(f"{bad[0][1]}; [0, 1] or uint8 is read, for [-1, 1] give (x + 1) / 2")
    return pixels[0]


def same(a: Any, b: Any) -> bool:
    if is_pil(a) and is_pil(b):
        return bool(a.mode == b.mode and a.size == b.size and a.tobytes() == b.tobytes())
    return np.array_equal(np.asarray(a), np.asarray(b), equal_nan=np.asarray(a).dtype.kind == "f")


def label_of(value: Any) -> Label:
    if value is None or isinstance(value, str):
        return value
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "iu":
        raise BadImage(f"the label is {shown(value)}: a whole number or a text is read")
    return int(array.reshape(()))


def keys_of(source: Any, where: str) -> tuple[str, str]:
    """Names of the image and of the label in items that are mappings."""
    features: Any = getattr(source, "features", None)
    images, labels = list(IMAGE_NAMES), list(LABEL_NAMES)
    if hasattr(features, "items"):
        kinds = {name: type(feature).__name__ for name, feature in features.items()}
        for kind, names in (("Image", images), ("ClassLabel", labels)):
            typed = [name for name, of in kinds.items() if of == kind]
            if len(typed) == 1:
                names.insert(0, typed[0])
            elif len(typed) > 1 and not set(typed) & set(names):
                raise DataError(f"{where} has several columns of {kind}: {listed(typed)}. Rename one to {names[0]!r}.")
        images = [name for name in images if name in kinds] or images
        labels = [name for name in labels if name in kinds] or labels
        return images[0], labels[0]
    first = source[0]
    if not isinstance(first, dict):
        return images[0], labels[0]
    return next((n for n in images if n in first), images[0]), next((n for n in labels if n in first), labels[0])


def class_names_of(source: Any, label_key: str) -> tuple[str, ...] | None:
    features: Any = getattr(source, "features", None)
    if hasattr(features, "get"):
        names = getattr(features.get(label_key), "names", None)
        return None if names is None else tuple(names)
    for _ in range(8):  # through torch.utils.data.Subset and its like
        classes = getattr(source, "classes", None)
        if isinstance(classes, list | tuple) and classes:
            # torchvision's ImageNet has several words for a class.
            return tuple(", ".join(map(str, c)) if isinstance(c, list | tuple) else str(c) for c in classes)
        source = getattr(source, "dataset", None)
    return None
