"""What happens to each image: where it is cut, how its colours change, which box is erased.

Plain data and arithmetic on numbers, for both loaders: an image gets the same window, flip, colours
and box whichever of them reads it. The random numbers are the sample's own (order.uniforms).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.images.order import Float64s, Int64s
from data_pipelines.settings import ColorJitter, ProgressiveResizing, RandAugment
from tpp.common.errors import UserError

AUGMENTATIONS = ("imagenet", "cifar", "none")

# The recipe of Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, as in torchvision's
# RandomResizedCrop.
_AREA = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)

# Zhong et al., "Random Erasing Data Augmentation", AAAI 2020. Width over height here; the paper's
# ratio, 0.3 to 3.3, is height over width.
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_RATIO = (1 / 3.3, 1 / 0.3)

RAND_AUGMENT_OPERATIONS = (
    *("translate_x", "translate_y", "shear_x", "shear_y", "rotate"),
    *("brightness", "contrast", "color", "sharpness", "posterize", "solarize"),
    *("equalize", "auto_contrast", "identity"),
)
"""RandAugment's operations by their numbers, with the names of DALI's suite."""

# What each of a sample's random numbers decides. A run that goes on with newer code must find its
# numbers where they were, so new ones are put at the end.
_FLIP, _TOP, _LEFT = 0, 1, 2
_AREAS = slice(3, 13)
_RATIOS = slice(13, 23)
_COLORS = slice(23, 27)
_OPERATIONS = slice(27, 31)
_SIGNS = slice(31, 35)
_ERASED, _ERASED_TOP, _ERASED_LEFT = 35, 36, 37
_ERASED_AREAS = slice(38, 48)
_ERASED_RATIOS = slice(48, 58)
UNIFORMS = 58


@dataclass(frozen=True)
class ImageTransform:
    """How a decoded image becomes the network's input.

    Attributes:
        image_size: side of the square fed to the network, in pixels.
        resize: length of the shorter side, in pixels, to which an image is scaled before the
            centre crop of evaluation ('cifar' and 'none': of training too); None: not scaled.
        augmentation: of training. 'imagenet': RandomResizedCrop (area 0.08 to 1, aspect ratio
            3/4 to 4/3, antialiased bilinear) and flip. 'cifar': black border of image_size // 8
            pixels, random crop and flip. 'none': as evaluation.
        mean, std: per channel, of values in 0..1.
        channels: 3 for RGB, 1 for grey.
        rand_augment, color_jitter: of training, in this order, on the cut and scaled image.
        random_erasing: of training, last of all: the probability with which a box of the image is
            filled with 0 after normalisation, which is the mean.

    Raises:
        UserError: a value lies outside its range; mean or std has another length than channels; a
            change of colours of grey images, or any of the last three without an augmentation.
    """

    image_size: int
    resize: int | None
    augmentation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int = 3
    color_jitter: ColorJitter | None = None
    rand_augment: RandAugment | None = None
    random_erasing: float = 0.0

    @classmethod
    def prepared(cls, preprocessing: Mapping[str, Any], *, augmentation: str) -> "ImageTransform":
        """The transform of a network whose images are prepared as its checkpoint says.

        Args:
            preprocessing: image_size, resize, mean, std and channels; plain data.
            augmentation: of training; a checkpoint says nothing of it.

        Raises:
            TypeError: a value is missing, or there is one more.
        """
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in preprocessing.items()
        }
        return cls(augmentation=augmentation, **values)

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UserError(f"image_size must be at least 1, not {self.image_size}")
        if self.resize is not None and self.resize < self.image_size:
            raise UserError(
                f"resize {self.resize} is smaller than image_size {self.image_size}: "
                "the centre crop would have black borders"
            )
        if self.augmentation not in AUGMENTATIONS:
            raise UserError(
                f"augmentation must be one of {', '.join(AUGMENTATIONS)}, not {self.augmentation!r}"
            )
        if self.channels not in (1, 3):
            raise UserError(f"channels must be 3 (RGB) or 1 (grey), not {self.channels}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise UserError(f"{name} must have {self.channels} values, not {len(values)}")
        if min(self.std) <= 0:
            raise UserError(f"std must be positive, not {min(self.std)}")
        if not 0 <= self.random_erasing <= 1:
            raise UserError(
                f"random_erasing must be a probability from 0 to 1, not {self.random_erasing}"
            )
        for name in ("color_jitter", "rand_augment", "random_erasing"):
            if self.augmentation == "none" and getattr(self, name):
                raise UserError(
                    f"{name} cannot go with augmentation 'none', which trains on images as they "
                    "are evaluated: choose 'imagenet' or 'cifar'"
                )
            if self.channels == 1 and name != "random_erasing" and getattr(self, name):
                raise UserError(f"{name} needs images of 3 channels (RGB), not 1 (grey)")

    def plain(self) -> "ImageTransform":
        """The transform of evaluation: as this one, with nothing random in it."""
        return replace(
            self, augmentation="none", color_jitter=None, rand_augment=None, random_erasing=0.0
        )


def flips(uniforms: Float64s) -> NDArray[np.bool_]:
    """Which samples are mirrored left to right, shape (n,), from their uniforms (n, UNIFORMS)."""
    return uniforms[:, _FLIP] < 0.5


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
    window, corner, found = _first_fitting(
        limits,
        _between(*_AREA, uniforms[:, _AREAS]),
        _log_between(*_RATIO, uniforms[:, _RATIOS]),
        uniforms[:, [_TOP, _LEFT]].T,
    )
    fallback = _central_windows(limits)
    window = np.where(found, window, fallback)
    corner = np.where(found, corner, (limits - fallback) // 2)
    return np.concatenate([corner, window]).T.astype(np.int64, order="C")


def _first_fitting(
    limits: Float64s, areas: Float64s, ratios: Float64s, places: Float64s
) -> tuple[Float64s, Float64s, NDArray[np.bool_]]:
    """Of several tries at a window in each image, the first that fits, placed evenly.

    Args:
        limits: height and width of each image, shape (2, n).
        areas: of the tries as shares of the image's area, shape (n, tries).
        ratios: widths of the tries over their heights, shape (n, tries).
        places: where the window goes, vertically and across, in [0, 1), shape (2, n).

    Returns:
        height and width, then top and left, shape (2, n); and whether any try fitted, shape (n,).
    """
    height, width = limits[:, :, None]
    area = height * width * areas
    tries = np.stack([np.rint(np.sqrt(area / ratios)), np.rint(np.sqrt(area * ratios))])
    fits = np.logical_and.reduce((tries > 0) & (tries <= limits[:, :, None]), axis=0)
    window = tries[:, np.arange(len(fits)), fits.argmax(1)]
    return window, np.floor(places * (limits - window + 1)), fits.any(axis=1)


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


def frames(sizes: Int64s, uniforms: Float64s, transform: ImageTransform) -> Int64s:
    """Scaled size and corner of the square cut of the recipes other than 'imagenet'.

    The whole image is scaled, then a square of ``transform.image_size`` is cut out, which may
    reach over the image's border into black.

    Args:
        sizes: height and width of each image, shape (n, 2).
        uniforms: shape (n, UNIFORMS); looked at by 'cifar' only.
        transform: the recipe.

    Returns:
        height and width after scaling, top and left of the square, shape (n, 4); top and left
        may be negative.
    """
    scaled = sizes if transform.resize is None else _scaled_sizes(sizes, transform.resize)
    corner = _centre_corners(scaled, transform.image_size)
    if transform.augmentation == "cifar":
        border = transform.image_size // 8
        slack = scaled + 2 * border - transform.image_size
        drawn = np.floor(uniforms[:, [_TOP, _LEFT]] * (slack + 1)).astype(np.int64) - border
        corner = np.where(slack >= 0, drawn, corner)
    return np.concatenate([scaled, corner], axis=1)


def _scaled_sizes(sizes: Int64s, shorter: int) -> Int64s:
    """Sizes (n, 2) scaled to the given shorter side, the longer rounded down as in torchvision."""
    shortest = sizes.min(1, keepdims=True)
    longer = (shorter * sizes.max(1, keepdims=True) / shortest).astype(np.int64)
    return np.where(sizes > shortest, longer, shorter)


def _centre_corners(sizes: Int64s, side: int) -> Int64s:
    """Top and left (n, 2) of the central square, rounded as in torchvision's center_crop."""
    inside = np.rint((sizes - side) / 2).astype(np.int64)
    return np.where(sizes >= side, inside, -((side - sizes) // 2))


def color_jitter_factors(uniforms: Float64s, jitter: ColorJitter) -> Float64s:
    """Factors of brightness, contrast and saturation, and the hue's turn, shape (n, 4).

    Args:
        uniforms: shape (n, UNIFORMS).
        jitter: the ranges.
    """
    strengths = np.array([jitter.brightness, jitter.contrast, jitter.saturation])
    low = np.append(np.maximum(1 - strengths, 0), -jitter.hue)
    high = np.append(1 + strengths, jitter.hue)
    return low + (high - low) * uniforms[:, _COLORS]


def rand_augment_choices(uniforms: Float64s, rand: RandAugment) -> tuple[Int64s, Int64s]:
    """Which operations each image goes through, and which of them the other way round.

    Args:
        uniforms: shape (n, UNIFORMS).
        rand: how many operations.

    Returns:
        numbers of operations (places in :data:`RAND_AUGMENT_OPERATIONS`) in the order of their
        application; and 1 where the operation's direction is turned (left for right, darker for
        brighter), else 0. Both of shape (n, rand.operations).
    """
    numbers = np.floor(uniforms[:, _OPERATIONS] * len(RAND_AUGMENT_OPERATIONS)).astype(np.int64)
    turned = (uniforms[:, _SIGNS] < 0.5).astype(np.int64)
    return numbers[:, : rand.operations], turned[:, : rand.operations]


def erasing_boxes(uniforms: Float64s, side: int, probability: float) -> Int64s:
    """Boxes to erase from square images: one of random area and aspect ratio, evenly placed.

    Ten tries at a box, as torchvision's RandomErasing makes them; if none fits in the image,
    nothing is erased.

    Args:
        uniforms: shape (n, UNIFORMS).
        side: of the images, in pixels.
        probability: with which an image gets a box.

    Returns:
        top, left, height, width of each box, shape (n, 4); zeros where there is none.
    """
    box, corner, found = _first_fitting(
        np.full((2, len(uniforms)), float(side)),
        _between(*_ERASED_AREA, uniforms[:, _ERASED_AREAS]),
        _log_between(*_ERASED_RATIO, uniforms[:, _ERASED_RATIOS]),
        uniforms[:, [_ERASED_TOP, _ERASED_LEFT]].T,
    )
    erased = found & (uniforms[:, _ERASED] < probability)
    return np.where(erased, np.concatenate([corner, box]), 0).T.astype(np.int64, order="C")


def training_size(epoch: float, image_size: int, progressive: ProgressiveResizing) -> int:
    """Side of the square fed to the network at a moment of training, in pixels.

    Args:
        epoch: epochs trained so far, a whole number or not.
        image_size: the side at the end.
        progressive: how it gets there.

    Raises:
        UserError: the side would shrink.
    """
    first, multiple = progressive.start_size, progressive.multiple
    if first > image_size:
        raise UserError(
            f"progressive resizing: start_size {first} is larger than image_size {image_size}"
        )
    length = progressive.end_epoch - progressive.start_epoch
    done = min(max((epoch - progressive.start_epoch) / length, 0.0), 1.0)
    if done in (0.0, 1.0):
        return image_size if done else first
    nearest = math.floor((first + done * (image_size - first)) / multiple + 0.5) * multiple
    return min(max(nearest, first), image_size)


def _between(low: float, high: float, uniforms: Float64s) -> Float64s:
    return low + (high - low) * uniforms


def _log_between(low: float, high: float, uniforms: Float64s) -> Float64s:
    return np.exp(_between(math.log(low), math.log(high), uniforms))
