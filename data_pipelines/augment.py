"""Where each image is cut and how it is scaled: arithmetic on sizes, for both loaders.

Both loaders call the functions of this file, so an image gets the same window and the same flip
whichever of them reads it. The random numbers are the sample's own (order.uniforms).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.order import Float64s, Int64s
from tpp.errors import UserError

AUGMENTATIONS = ("imagenet", "cifar", "none")

# The recipe of Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, as in torchvision's
# RandomResizedCrop.
_AREA = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)
_TRIES = 10

# What each of a sample's random numbers decides.
_FLIP, _TOP, _LEFT = 0, 1, 2
_AREAS = slice(3, 3 + _TRIES)
_RATIOS = slice(3 + _TRIES, 3 + 2 * _TRIES)
UNIFORMS = 3 + 2 * _TRIES


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

    Raises:
        UserError: a value lies outside its range, or mean or std has another length than channels.
    """

    image_size: int
    resize: int | None
    augmentation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int = 3

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
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    area = height * width * _between(_AREA[0], _AREA[1], uniforms[:, _AREAS])
    ratio = np.exp(_between(math.log(_RATIO[0]), math.log(_RATIO[1]), uniforms[:, _RATIOS]))
    tries = np.stack([np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))])  # h, w
    limits = np.stack([height, width])
    fits = np.logical_and.reduce((tries > 0) & (tries <= limits), axis=0)
    first = fits.argmax(1)
    window = tries[:, np.arange(len(sizes)), first]

    slack = limits[:, :, 0] - window
    corner = np.floor(uniforms[:, [_TOP, _LEFT]].T * (slack + 1))

    found = fits.any(axis=1)
    fallback = _central_windows(limits[:, :, 0])
    window = np.where(found, window, fallback)
    corner = np.where(found, corner, (limits[:, :, 0] - fallback) // 2)
    return np.concatenate([corner, window]).T.astype(np.int64)


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


def _between(low: float, high: float, uniforms: Float64s) -> Float64s:
    return low + (high - low) * uniforms
