"""The recipes: which part of an image becomes the square that the network sees.

Each one is an object that both loaders ask; what it answers is plain numbers, so an image gets the
same window and flip whichever of them reads it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipelines.images.order import Float64s, Int64s
from data_pipelines.loading.draws import (
    AREAS,
    FLIP,
    LEFT,
    RATIOS,
    TOP,
    TURN,
    between,
    first_fitting,
    log_between,
)

# The recipe of Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, as in torchvision's
# RandomResizedCrop.
_AREA = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)


class Cuts(NamedTuple):
    """What is done to n images, in this order; None: this is not done to any of them.

    Attributes:
        window: top, left, height, width of the part that is decoded, int64, shape (n, 4).
        size: height and width that it is scaled to, antialiased, int64, shape (n, 2).
        corner: top and left of the square that is cut from that; it may reach over the border into
            black; int64, shape (n, 2).
        mirrored: which squares are turned left to right in the end, bool, shape (n,).
    """

    window: Int64s | None
    size: Int64s | None
    corner: Int64s | None
    mirrored: NDArray[np.bool_]


class Recipe(ABC):
    """How images are cut.

    Attributes:
        random: whether training sees another part of an image each time; if not, it sees images as
            evaluation does, and nothing else may be changed about them.
        any_side: whether squares of every side show as much of an image, so that their side may
            grow in the course of training.
        turns: whether squares are turned by :func:`quarter_turns` in the end.
        inside: whether squares have to lie within the image.
        one_by_one: whether what comes out is of any size, so that no two make a batch.
    """

    random: bool
    any_side = turns = inside = one_by_one = False

    @abstractmethod
    def cuts(self, sizes: Int64s, uniforms: Float64s, side: int, resize: int | None) -> Cuts:
        """How some images are cut.

        Args:
            sizes: height and width of each image, shape (n, 2).
            uniforms: shape (n, UNIFORMS); not looked at unless the recipe is random.
            side: of the squares, in pixels.
            resize: length of the shorter side that evaluation scales images to; None: not scaled.
        """


class CutThenScale(Recipe):
    """RandomResizedCrop: a window of random area and shape is scaled to the square; and a flip."""

    random = True
    any_side = True

    def cuts(self, sizes: Int64s, uniforms: Float64s, side: int, resize: int | None) -> Cuts:
        """As in :class:`Recipe`."""
        windows = random_resized_windows(sizes, uniforms)
        return Cuts(windows, np.full_like(sizes, side), None, flips(uniforms))


@dataclass(frozen=True)
class ScaleThenCut(Recipe):
    """The whole image is scaled, if at all, and the square is cut from it.

    Attributes:
        random: the square is cut anywhere from the image and a black border of side // 8 pixels,
            and flipped; else from the middle.
        squash: both sides are scaled to the same length, whatever shape that gives the image.
    """

    random: bool
    squash: bool = False

    def cuts(self, sizes: Int64s, uniforms: Float64s, side: int, resize: int | None) -> Cuts:
        """As in :class:`Recipe`."""
        scaled = sizes
        if resize is not None:
            scaled = np.full_like(sizes, resize) if self.squash else _scaled_sizes(sizes, resize)
        corner = _centre_corners(scaled, side)
        mirrored = np.zeros(len(sizes), np.bool_)
        if self.random:
            border = side // 8
            slack = scaled + 2 * border - side
            drawn = np.floor(uniforms[:, [TOP, LEFT]] * (slack + 1)).astype(np.int64) - border
            corner, mirrored = np.where(slack >= 0, drawn, corner), flips(uniforms)
        return Cuts(None, None if resize is None else scaled, corner, mirrored)


class Patch(Recipe):
    """A square of the image as it is, cut from anywhere; flipped and turned."""

    random = turns = inside = True

    def cuts(self, sizes: Int64s, uniforms: Float64s, side: int, resize: int | None) -> Cuts:
        """As in :class:`Recipe`."""
        corner = np.floor(uniforms[:, [TOP, LEFT]] * (sizes - side + 1)).astype(np.int64)
        window = np.concatenate([corner, np.full_like(sizes, side)], axis=1)
        return Cuts(window, None, None, flips(uniforms))


class Whole(Recipe):
    """The image as it is."""

    random = False
    one_by_one = True

    def cuts(self, sizes: Int64s, uniforms: Float64s, side: int, resize: int | None) -> Cuts:
        """As in :class:`Recipe`."""
        return Cuts(None, None, None, np.zeros(len(sizes), np.bool_))


RECIPES: dict[str, Recipe] = {
    "imagenet": CutThenScale(),
    "cifar": ScaleThenCut(random=True),
    "patch": Patch(),
    "none": ScaleThenCut(random=False),
}
"""The recipes by what ``data.augmentation`` calls them."""

OF_EVALUATION: dict[str, Recipe] = {
    "center": RECIPES["none"],
    "squash": ScaleThenCut(random=False, squash=True),
    "whole": Whole(),
}
"""How images are cut where nothing is random, by the crop mode."""


def flips(uniforms: Float64s) -> NDArray[np.bool_]:
    """Which samples are mirrored left to right, shape (n,), from their uniforms (n, UNIFORMS)."""
    return uniforms[:, FLIP] < 0.5


def quarter_turns(uniforms: Float64s) -> Int64s:
    """By how many quarters each sample is turned to the left, 0 to 3, from its uniforms; (n,)."""
    return np.floor(4 * uniforms[:, TURN]).astype(np.int64)


def random_resized_windows(sizes: Int64s, uniforms: Float64s) -> Int64s:
    """Windows of the 'imagenet' recipe, as torchvision's RandomResizedCrop draws them.

    Ten tries at a window of random area and aspect ratio; the first that fits in the image is
    placed at random. If none fits: the largest central window of an allowed aspect ratio.

    Args:
        sizes: height and width of each image, shape (n, 2).
        uniforms: shape (n, UNIFORMS).

    Returns:
        top, left, height, width of each window, shape (n, 4).
    """
    limits = sizes.T.astype(np.float64)
    window, corner, found = first_fitting(
        limits,
        between(*_AREA, uniforms[:, AREAS]),
        log_between(*_RATIO, uniforms[:, RATIOS]),
        uniforms[:, [TOP, LEFT]].T,
    )
    fallback = _central_windows(limits)
    window = np.where(found, window, fallback)
    corner = np.where(found, corner, (limits - fallback) // 2)
    return np.concatenate([corner, window]).T.astype(np.int64, order="C")


def _central_windows(sizes: Float64s) -> Float64s:
    """Height and width, shape (2, n), of the largest windows of allowed aspect ratio."""
    height, width = sizes
    narrow, wide = _RATIO
    tall = width / height < narrow
    flat = width / height > wide
    return np.stack(
        [
            np.where(tall, np.rint(width / narrow), height),
            np.where(flat, np.rint(height * wide), width),
        ]
    )


def _scaled_sizes(sizes: Int64s, shorter: int) -> Int64s:
    """Sizes (n, 2) scaled to the given shorter side, the longer rounded down as in torchvision."""
    shortest = sizes.min(1, keepdims=True)
    longer = (shorter * sizes.max(1, keepdims=True) / shortest).astype(np.int64)
    return np.where(sizes > shortest, longer, shorter)


def _centre_corners(sizes: Int64s, side: int) -> Int64s:
    """Top and left (n, 2) of the central square, rounded as in torchvision's center_crop."""
    inside = np.rint((sizes - side) / 2).astype(np.int64)
    return np.where(sizes >= side, inside, -((side - sizes) // 2))
