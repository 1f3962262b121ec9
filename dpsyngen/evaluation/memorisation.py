"""Does a generator repeat its training images?  Nearest private neighbours, with held-out ones as the control.

A distance to the training set means nothing by itself: a generator that draws plain, typical images is near to every
real image.  Held-out images of the same source are the control: what was not trained on cannot have been memorised, so
whatever makes generated images nearer to the training set than to them is memory, or a difference between the sets.

All images of both sets are compared, so that no copy of a training image can be missed; the share of generated images
that should be nearer to the training set follows from the sizes.  The same is asked of the few generated images nearest
to any real one, since a generator may repeat some images only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import DataError, require
from dpsyngen.evaluation.cas import CONFIDENCE, clopper_pearson, require_same_size
from dpsyngen.evaluation.extractors import NAMES, FeatureSpec
from dpsyngen.evaluation.neighbours import Neighbours, Share, digests, nearest, share
from dpsyngen.programs.grid import image_grid, png_url

PIXELS = "pixels"
PAIRS_FILE = "memorisation_pairs.json"
"""Of the private half: generated images beside their neighbours, for the report."""
LEVEL = 0.01
"""Chance of a false alarm, all tests of a check together, if the two real sets are exchangeable."""

FEW = 50
"""Real images below which the conclusion says so."""
_TAIL, _FEWEST = 0.05, 20  # generated images nearest to any real image that are judged on their own
_ASKING = 2_000  # real images that look for their neighbour, for the scale of real distances
_FEATURE_IMAGES = 5_000  # of a real set, where features have to be computed: a network takes minutes for more


@dataclass(frozen=True)
class Space:
    """The figures for one kind of features (what they are, and their unit); None where they need held-out images.

    `everything` compares both real sets whole, `nearest_few` the same for the generated images that are nearest to any
    real one.  The median distances and their `ratio` (below 1: nearer to the training set) are to sets of equal `size`,
    the larger one subsampled, since more images are nearer.  `threshold` is the 1st percentile of the distances of real
    images to their nearest training image: of held-out images or, without any, of training images to the others.
    `closer` is the share of generated images below it (of real ones: 1 %), with its Clopper-Pearson interval at 95 %;
    None where the threshold is 0, as real images are copies of training images: `copies` is the share of such.
    """

    features: dict[str, Any]
    median_private: float
    threshold: float
    closer: float | None
    closer_low: float | None
    closer_high: float | None
    copies: float
    size: int | None = None
    everything: Share | None = None
    nearest_few: Share | None = None
    median_held_out: float | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class Memorisation:
    """What was found, by name of the features.  **Private**, all of it.

    `duplicates` and `duplicates_held_out` are generated images that equal a real one in every pixel,
    `held_out_in_training` held-out images that equal a training image; as ties these count for neither side.
    `flagged`: whether signs of memorisation were found (None: it cannot be told).  `to_private` and `to_held_out` are
    each generated image's nearest real one in the first features, at `distances` in their unit.
    """

    spaces: dict[str, Space]
    duplicates: int
    duplicates_held_out: int | None
    held_out_in_training: int
    flagged: bool | None
    conclusion: str
    protocol: dict[str, Any]
    to_private: NDArray[np.int64] = field(repr=False)
    to_held_out: NDArray[np.int64] | None = field(repr=False)
    distances: tuple[NDArray[np.float64], NDArray[np.float64] | None] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; without what belongs to single images."""
        single = ("to_private", "to_held_out", "distances")
        said = "computed from private images without noise: publishing these figures costs privacy"
        return {"private": said, **{k: v for k, v in asdict(self).items() if k not in single}}

    def most_suspicious(self, count: int) -> NDArray[np.int64]:
        """Generated images that are nearest to the training set, relative to the held-out set if there is one."""
        private, held_out = self.distances
        key = private if held_out is None else (private + 1e-12) / (held_out + 1e-12)
        return np.argsort(key, kind="stable")[:count]


def memorisation_check(
    generated: NDArray[np.uint8],
    private: NDArray[np.uint8],
    held_out: NDArray[np.uint8] | None = None,
    *,
    features: Sequence[FeatureSpec | str] = (PIXELS,),
    seed: int = 0,
    device: str = "cpu",
    on_progress: Callable[[str], None] | None = None,
) -> Memorisation:
    """Compare generated images with those that were trained on and with those that were not.

    The result is computed from private images and is **not** differentially private: store it in the private half.

    Args:
        generated: uint8 [Q, C, H, W], not selected in any way.
        private: [N, C, H, W], the training images.
        held_out: [M, C, H, W], real images of the same source that were not trained on; None: no control, and then
            nothing can be concluded but from exact copies.
        features: "pixels" (root mean square difference of pixels in [0, 1]) or names of feature extractors.
        seed: of subsets and permutations.

    Raises:
        ConfigError: shapes that differ, too few images, unknown features.
        DataError: more than half of the held-out images are training images.
    """
    specs = [None if f == PIXELS else FeatureSpec(f) if isinstance(f, str) else f for f in checked_names(features)]
    for name, images in (("private", private), ("held-out", held_out)):
        if images is not None:
            require_same_size(f"{name} images", images, "generated ones", generated)
            require(len(images) >= 2, f"the number of {name} images", len(images), "at least 2")
    require(len(generated), "the number of generated images", 0, "at least 1")
    tell = on_progress or (lambda line: None)
    rng = np.random.default_rng(seed)
    repeated, duplicates, others = _copies(generated, private, held_out)
    control = np.arange(0 if held_out is None else len(held_out))
    spaces: dict[str, Space] = {}
    first: list[tuple[NDArray[np.int64], NDArray[np.float64]]] = []  # single images are told of in the first features
    for spec in specs:
        name = PIXELS if spec is None else spec.name
        tell(f"nearest neighbours by {name}")
        of_a, of_b = np.arange(len(private)), control
        sets: tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None] = generated, private, held_out
        about: dict[str, Any] = {"name": PIXELS, "unit": "root mean square difference of pixels in [0, 1]"}
        scale = 1 / (255 * math.sqrt(generated[0].size))
        if spec is not None:
            of_a, of_b = _subset(of_a, _FEATURE_IMAGES, rng), _subset(of_b, _FEATURE_IMAGES, rng)
            extractor, scale = spec.make(device), 1.0
            real = np.asarray(private[of_a])
            extractor.fit(real)
            x, a = (extractor(i, on_progress=on_progress) for i in (generated, real))
            b = None if held_out is None else extractor(np.asarray(held_out[of_b]), on_progress=on_progress)
            sets, about = (x, a, b), {**extractor.config(), "unit": "Euclidean distance"}
        about |= {"private_images": len(of_a), "held_out_images": len(of_b)}
        spaces[name], *found = _space(*sets, about, scale, rng)
        first = first or [(rows[n.index], n.distance * scale) for rows, n in zip((of_a, of_b), found, strict=True) if n]
    to_private, distance = first[0]
    to_held_out, distance_held_out = first[1] if len(first) > 1 else (None, None)
    flagged, conclusion = _verdict(spaces, duplicates, others, len(private), len(control))
    return Memorisation(
        spaces=spaces,
        duplicates=duplicates,
        duplicates_held_out=others,
        held_out_in_training=repeated,
        flagged=flagged,
        conclusion=conclusion,
        protocol={
            "generated_images": len(generated),
            "private_images": len(private),
            "held_out_images": len(control),
            "seed": seed,
            "confidence": CONFIDENCE,
            "false_alarms": LEVEL,
        },
        to_private=to_private,
        to_held_out=to_held_out,
        distances=(distance, distance_held_out),
    )


def neighbour_pairs(
    result: Memorisation,
    generated: NDArray[np.uint8],
    private: NDArray[np.uint8],
    held_out: NDArray[np.uint8] | None,
    *,
    count: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """Put generated images, most suspicious ones and some at random, beside their nearest real ones.  **Private.**

    Returns:
        JSON-able: ``unit`` of the distances, and ``groups`` of ``title`` and ``pairs``; images are ``data:`` URLs.
    """
    count = min(count, len(result.to_private))
    to_private, to_held_out = result.distances
    against = "" if to_held_out is None else ", relative to the nearest held-out one"
    chosen = {
        f"Most suspicious: nearest to a training image{against}": result.most_suspicious(count),
        "At random": np.random.default_rng(seed).choice(len(result.to_private), count, replace=False),
    }

    def pair(i: int) -> dict[str, Any]:
        other = held_out is not None and result.to_held_out is not None and to_held_out is not None
        return {
            "number": i,
            "generated": image_data(generated[i]),
            "private": image_data(private[result.to_private[i]]),
            "to_private": float(to_private[i]),
            "held_out": image_data(held_out[result.to_held_out[i]]) if other else None,  # type: ignore[index]
            "to_held_out": float(to_held_out[i]) if other else None,  # type: ignore[index]
        }

    about = next(iter(result.spaces.values())).features
    groups = [{"title": title, "pairs": [pair(int(i)) for i in picks]} for title, picks in chosen.items()]
    return {"unit": f"{about['name']}: {about['unit']}", "groups": groups}


def image_data(pixels: NDArray[np.uint8]) -> str:
    """One image, uint8 [C, H, W], as a ``data:`` URL, a pixel of it a pixel of the PNG: the page enlarges it."""
    return png_url(image_grid(np.asarray(pixels)[None], 1, pad=0))


def checked_names(features: Sequence[FeatureSpec | str]) -> Sequence[FeatureSpec | str]:
    """Return the features as given; ConfigError unless there are some and all are known."""
    require(features, "features", features, (PIXELS, *NAMES))
    for name in features:
        require(isinstance(name, FeatureSpec) or name in (PIXELS, *NAMES), "features", name, (PIXELS, *NAMES))
    return features


def _copies(
    generated: NDArray[np.uint8], private: NDArray[np.uint8], held_out: NDArray[np.uint8] | None
) -> tuple[int, int, int | None]:
    """Held-out images that are training images, and generated images that are training or held-out images."""
    known, made = digests(private), digests(generated)
    duplicates = int(np.isin(made, known).sum())
    if held_out is None:
        return 0, duplicates, None
    others = digests(held_out)
    repeated = int(np.isin(others, known).sum())
    if 2 * repeated > len(others):
        said = f"{repeated:,} of the {len(others):,} held-out images are training images, so they are no control"
        raise DataError(f"{said}.  Give images that were not trained on.")
    return repeated, duplicates, int(np.isin(made, others).sum())


def _subset(rows: NDArray[np.int64], most: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return rows if len(rows) <= most else np.sort(rng.choice(rows, most, replace=False))


def _space(
    x: NDArray[Any],
    a: NDArray[Any],
    b: NDArray[Any] | None,
    about: dict[str, Any],
    unit: float,
    rng: np.random.Generator,
) -> tuple[Space, Neighbours, Neighbours | None]:
    """Figures of generated `x` against training `a` and held-out `b`, and the neighbours in the whole sets."""
    to_a, to_b = nearest(x, a), None if b is None else nearest(x, b)
    asking = _subset(np.arange(len(a if b is None else b)), _ASKING, rng)
    real = nearest(a[asking], a, skip=asking) if b is None else nearest(b[asking], a)
    threshold = float(np.quantile(real.distance, 0.01))
    closer = int((to_a.distance < threshold).sum())
    copies = float((real.squared == 0).mean())
    low, high = clopper_pearson(closer, len(x)) if threshold else (None, None)
    share_closer = closer / len(x) if threshold else None
    median = float(np.median(to_a.distance)) * unit
    compared: dict[str, Any] = {}
    if b is not None and to_b is not None:
        size = min(len(a), len(b))
        near_a, near_b = (
            whole if size == len(r) else nearest(x, r[_subset(np.arange(len(r)), size, rng)])
            for whole, r in ((to_a, a), (to_b, b))
        )
        median, median_b = (float(np.median(n.distance)) * unit for n in (near_a, near_b))
        few = np.argsort(np.minimum(to_a.squared, to_b.squared), kind="stable")
        few = few[: max(_FEWEST, math.ceil(_TAIL * len(x)))]
        compared = {
            "size": size,
            "everything": share(to_a, to_b, len(a), len(b), rng),
            "nearest_few": share(to_a.take(few), to_b.take(few), len(a), len(b), rng),
            "median_held_out": median_b,
            "ratio": median / median_b if median_b else None,
        }
    return Space(about, median, threshold * unit, share_closer, low, high, copies, **compared), to_a, to_b


def _verdict(
    spaces: dict[str, Space], duplicates: int, others: int | None, n_private: int, n_held_out: int
) -> tuple[bool | None, str]:
    found = []
    # Blank images and the like occur in both sets; then generated ones repeat held-out images as well.
    if duplicates and duplicates > 2 * (others or 0) * n_private / max(n_held_out, 1):
        found.append(f"{duplicates:,} generated images equal a training image in every pixel")
    level = LEVEL / (2 * len(spaces))  # Bonferroni: two tests in each space
    for name, space in spaces.items():
        for what, s in (("", space.everything), (" among those nearest to any real image", space.nearest_few)):
            if s is not None and s.p_permutation <= level:
                found.append(
                    f"by {name}, {100 * s.share:.1f} % of the generated images{what} are nearest to a training image, "
                    f"where {100 * s.expected:.1f} % were to be expected (p = {s.p_permutation:.2g})"
                )
    copies = [name for name, space in spaces.items() if 2 * space.copies > 1]
    if found:
        return True, "Signs of memorisation: " + "; ".join(found) + "."
    why = ""
    if copies:
        why = f"by {', '.join(copies)}, most real images are copies of training images, so whatever is generated is as "
        why += "near to those it was not trained on"
    elif others is None:
        why = "there are no held-out images to say whether these distances are small.  No generated image equals a "
        why += "training image in every pixel"
    elif math.comb(n_private + n_held_out, n_private) < 1 / level:  # an integer that no float may hold
        why = f"with {n_private} training and {n_held_out} held-out images no test could tell memory from chance"
    if why:
        return None, f"Nothing can be concluded: {why}."
    fewest = min(n_private, n_held_out)
    few = f"  There are only {fewest} images in the smaller set: a copy would show, and little else." * (fewest < FEW)
    return False, (
        "No sign of memorisation: generated images are no nearer to the training images than to images that were not "
        "trained on, as far as this many images can tell." + few
    )
