"""What happens to each image: how it is cut, how its colours change, which box is erased.

Plain data and arithmetic on numbers, for both loaders: an image gets the same window, flip, colours
and box whichever of them reads it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.images.order import Float64s, Int64s
from data_pipelines.loading.draws import (
    COLORS,
    ERASED,
    ERASED_AREAS,
    ERASED_LEFT,
    ERASED_RATIOS,
    ERASED_TOP,
    OPERATIONS,
    SIGNS,
    STRENGTH,
    between,
    first_fitting,
    log_between,
)
from data_pipelines.loading.recipes import OF_EVALUATION, RECIPES, Recipe
from data_pipelines.settings import (
    AugmentSection,
    ColorJitter,
    DataSection,
    ProgressiveResizing,
    RandAugment,
)
from tpp.common.errors import UserError
from tpp.common.images import CROP_MODES, INTERPOLATIONS

# Zhong et al., "Random Erasing Data Augmentation", AAAI 2020. Width over height here; the paper's
# ratio, 0.3 to 3.3, is height over width.
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_RATIO = (1 / 3.3, 1 / 0.3)

# The sides that progressive resizing goes through are multiples of this, in pixels.
_SIDES = 32

AUGMENT_OPERATIONS = (
    *("translate_x", "translate_y", "shear_x", "shear_y", "rotate"),
    *("brightness", "contrast", "color", "sharpness", "posterize", "solarize"),
    *("equalize", "auto_contrast", "identity"),
)
"""RandAugment's and TrivialAugment's operations by their numbers, with DALI's names."""

# Müller & Hutter, "TrivialAugment", ICCV 2021, table 1 (wide), as torchvision's TrivialAugmentWide.
TRIVIAL_BINS = 31
_STEPS = np.arange(TRIVIAL_BINS)
_EVENLY = (_STEPS / (TRIVIAL_BINS - 1)).astype(np.float32)
TRIVIAL_STRENGTHS: dict[str, NDArray[np.float32]] = {
    **dict.fromkeys(
        ("translate_x", "translate_y"), (32 * _STEPS // (TRIVIAL_BINS - 1)).astype(np.float32)
    ),
    **dict.fromkeys(
        ("shear_x", "shear_y", "brightness", "contrast", "color", "sharpness"),
        np.float32(0.99) * _EVENLY,
    ),
    "rotate": 135 * _EVENLY,
    "posterize": np.rint(8 - 6 * _EVENLY),
    # The lowest whole level that is no lower than the threshold, which divides 255 evenly.
    "solarize": np.ceil(255 * (TRIVIAL_BINS - 1 - _STEPS) / (TRIVIAL_BINS - 1)).astype(np.float32),
}
"""TrivialAugment's operations that have a strength, each of shape (TRIVIAL_BINS,): whole pixels,
slopes and changes of a factor, degrees, bits kept, the lowest level that is inverted."""


@dataclass(frozen=True)
class ImageTransform:
    """How a decoded image becomes the network's input.

    Attributes:
        image_size: side of the square fed to the network, in pixels.
        resize: length of the shorter side, in pixels, to which an image is scaled before the
            centre crop of evaluation ('cifar' and 'none': of training too); None: not scaled.
        augmentation: of training. 'imagenet': RandomResizedCrop (area 0.08 to 1, aspect ratio
            3/4 to 4/3, antialiased bilinear) and flip. 'cifar': black border of image_size // 8
            pixels, random crop and flip. 'patch': random crop within the image, not scaled, flip
            and quarter turns. 'none': as evaluation.
        mean, std: per channel, of values in 0..1.
        channels: 3 for RGB, 1 for grey.
        augment: of training, beyond ``augmentation``.
        interpolation: of all scaling, ``bilinear`` or ``bicubic``, antialiased.
        crop_mode: of evaluation. ``squash``: both sides are scaled to ``resize``. ``whole``: images
            are as they are, of any size.

    Raises:
        UserError: a value lies outside its range; mean or std has another length than channels;
            ``augment`` does not go with the others.
    """

    image_size: int
    resize: int | None
    augmentation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int = 3
    augment: AugmentSection = field(default_factory=AugmentSection)
    interpolation: str = INTERPOLATIONS[0]
    crop_mode: str = CROP_MODES[0]

    @classmethod
    def prepared(cls, preprocessing: Mapping[str, Any], *, augmentation: str) -> "ImageTransform":
        """The transform of a network whose images are prepared as its checkpoint says.

        Args:
            preprocessing: see :mod:`tpp.models.preparation`; plain data.
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
        # Evaluation may be meant to see more than the image: timm's volo_d5_448 does.
        bordered = self.resize is not None and self.resize < self.image_size
        if bordered and self.augmentation != "none":
            raise UserError(
                f"resize {self.resize} is smaller than image_size {self.image_size}: "
                "the centre crop would have black borders"
            )
        if self.augmentation not in RECIPES:
            raise UserError(
                f"augmentation must be one of {', '.join(RECIPES)}, not {self.augmentation!r}"
            )
        for name, value, known in (
            ("interpolation", self.interpolation, INTERPOLATIONS),
            ("crop_mode", self.crop_mode, CROP_MODES),
        ):
            if value not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        if self.channels not in (1, 3):
            raise UserError(f"channels must be 3 (RGB) or 1 (grey), not {self.channels}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise UserError(f"{name} must have {self.channels} values, not {len(values)}")
        if min(self.std) <= 0:
            raise UserError(f"std must be positive, not {min(self.std)}")
        try:
            check_augment(self.augment, self, "augment")
        except ValueError as error:
            raise UserError(str(error)) from None

    @property
    def recipe(self) -> Recipe:
        """How images are cut in training."""
        recipe = RECIPES[self.augmentation]
        return recipe if recipe.random else OF_EVALUATION[self.crop_mode]

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError, with the reason, if an image of this size cannot be used."""
        if self.recipe.inside and min(height, width) < self.image_size:
            raise ValueError(
                f"{height}x{width} pixels, of which no patch of {self.image_size}x"
                f"{self.image_size} can be cut"
            )

    def plain(self) -> "ImageTransform":
        """The transform of evaluation: as this one, with nothing random in it."""
        return replace(self, augmentation="none", augment=AugmentSection())


def check_augment(augment: AugmentSection, images: DataSection | ImageTransform, key: str) -> None:
    """Check that augmentations go with the recipe and the images.

    Args:
        augment: the augmentations.
        images: the rest of the settings.
        key: of the augmentations, in a configuration.

    Raises:
        ValueError: names what does not go with it.
    """
    name, recipe = images.augmentation, RECIPES[images.augmentation]
    if not recipe.random and augment != AugmentSection(repeats=augment.repeats):
        raise ValueError(f"{key}: with augmentation: {name} there is no augmentation to add to")
    colors = augment.color_jitter or augment.rand_augment or augment.trivial_augment
    if images.channels == 1 and colors:
        raise ValueError(f"{key}: color_jitter, rand_augment, trivial_augment need 3 channels")
    side, side_key = images.image_size, "image_size"
    if isinstance(images, DataSection):
        side = images.training_side
        side_key = "train_size" if images.train_size is not None else side_key
        if images.train_size is not None and not recipe.any_side:
            raise ValueError(f"data.train_size: does not go with augmentation: {name}")
    if augment.progressive is None:
        return
    if not recipe.any_side:
        fitting = " or ".join(name for name, recipe in RECIPES.items() if recipe.any_side)
        raise ValueError(f"{key}.progressive: goes with augmentation: {fitting} only")
    if augment.progressive.start_size > side:
        raise ValueError(
            f"{key}.progressive.start_size ({augment.progressive.start_size}) must not be "
            f"larger than {side_key} ({side})"
        )


def color_jitter_factors(uniforms: Float64s, jitter: ColorJitter) -> Float64s:
    """Factors of brightness, contrast and saturation, and the hue's turn, shape (n, 4).

    Args:
        uniforms: shape (n, UNIFORMS).
        jitter: the ranges.
    """
    strengths = np.array([jitter.brightness, jitter.contrast, jitter.saturation])
    low = np.append(np.maximum(1 - strengths, 0), -jitter.hue)
    high = np.append(1 + strengths, jitter.hue)
    return low + (high - low) * uniforms[:, COLORS]


def rand_augment_choices(uniforms: Float64s, rand: RandAugment) -> tuple[Int64s, Int64s]:
    """Which operations each image goes through, and which of them the other way round.

    Args:
        uniforms: shape (n, UNIFORMS).
        rand: how many operations.

    Returns:
        numbers of operations (places in :data:`AUGMENT_OPERATIONS`) in the order of their
        application; and 1 where the operation's direction is turned (left for right, darker for
        brighter), else 0. Both of shape (n, rand.operations).
    """
    numbers = np.floor(uniforms[:, OPERATIONS] * len(AUGMENT_OPERATIONS)).astype(np.int64)
    turned = (uniforms[:, SIGNS] < 0.5).astype(np.int64)
    return numbers[:, : rand.operations], turned[:, : rand.operations]


def trivial_augment_choices(uniforms: Float64s) -> Int64s:
    """Which operation each image goes through, in which direction, and how strong it is.

    Args:
        uniforms: shape (n, UNIFORMS).

    Returns:
        for each image the operation (a place in :data:`AUGMENT_OPERATIONS`), 1 where its direction
        is turned and else 0, and the place of its strength in :data:`TRIVIAL_STRENGTHS`; shape
        (n, 3).
    """
    operations, turned = rand_augment_choices(uniforms, RandAugment(operations=1))
    places = np.floor(uniforms[:, [STRENGTH]] * TRIVIAL_BINS).astype(np.int64)
    return np.concatenate([operations, turned, places], axis=1)


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
    box, corner, found = first_fitting(
        np.full((2, len(uniforms)), float(side)),
        between(*_ERASED_AREA, uniforms[:, ERASED_AREAS]),
        log_between(*_ERASED_RATIO, uniforms[:, ERASED_RATIOS]),
        uniforms[:, [ERASED_TOP, ERASED_LEFT]].T,
    )
    erased = found & (uniforms[:, ERASED] < probability)
    return np.where(erased, np.concatenate([corner, box]), 0).T.astype(np.int64, order="C")


def training_size(epoch: float, image_size: int, progressive: ProgressiveResizing) -> int:
    """Side of the square fed to the network at a moment of training, in pixels.

    Args:
        epoch: epochs trained so far, a whole number or not.
        image_size: the side at the end, not below that at the start.
        progressive: how it gets there.
    """
    first = progressive.start_size
    length = progressive.end_epoch - progressive.start_epoch
    done = min(max((epoch - progressive.start_epoch) / length, 0.0), 1.0)
    if done in (0.0, 1.0):
        return image_size if done else first
    nearest = math.floor((first + done * (image_size - first)) / _SIDES + 0.5) * _SIDES
    return min(max(nearest, first), image_size)
