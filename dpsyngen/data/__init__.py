"""Readers of the user's PRIVATE images.

Everything returned by this package is private: it goes to :mod:`dpsyngen.privacy` and nowhere else.  Four
facts about it are treated as **public** and printed freely: the number of images, their size, whether they are
grey or RGB, and the class names.  Users to whom one of these is a secret must fix it beforehand (name the
resolution and channels, make the class folders by a public list).  One image is taken to be one record of one
person.

>>> from dpsyngen.data import load_images
>>> digits = load_images("digits")
>>> len(digits), digits.images.shape[1:], digits.num_classes
(1437, (1, 8, 8), 10)
"""

from __future__ import annotations

from dpsyngen.data.arrays import save_images
from dpsyngen.data.dataset import ImageDataset
from dpsyngen.data.load import load_images
from dpsyngen.data.map_style import MapStyle
from dpsyngen.data.store import ImageStore

__all__ = ["ImageDataset", "ImageStore", "MapStyle", "load_images", "save_images"]
