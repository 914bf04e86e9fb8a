"""The augmentations on torch tensors, the same as dali_augment's, for where DALI is not installed.

The numbers of each sample are rows of what the functions of augment.py return.
"""

import math

import numpy as np
import torch
import torch.nn.functional as nn
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data_pipelines.images.order import Float64s, Int64s
from data_pipelines.loading.augment import AUGMENT_OPERATIONS, TRIVIAL_STRENGTHS
from data_pipelines.settings import RandAugment

# The colour space YIQ, in which saturation is a distance from the grey axis and hue an angle
# around it. Y is the luminance of ITU-R BT.601.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_RGB = np.linalg.inv(_YIQ)
# What contrast draws away from.
_GREY = 128
# What comes in behind moved images, as in dali_augment.
_FILL, _TRIVIAL_FILL = 128, 0

# RandAugment: each operation's mildest and strongest form, as in DALI's suite: shares of the side,
# slopes, degrees, changes of a factor, bits kept, the lowest level that is inverted.
_RANGES = {
    "translate_x": (0, 100 / 224),
    "translate_y": (0, 100 / 224),
    "shear_x": (0, 0.3),
    "shear_y": (0, 0.3),
    "rotate": (0, 30),
    "brightness": (0, 0.9),
    "contrast": (0, 0.9),
    "color": (0, 0.9),
    "sharpness": (0, 0.9),
    "posterize": (8, 4),
    "solarize": (256, 0),
}
# Which of an image's sides, (3, h, w), they are shares of.
_SIDES = {"translate_x": 2, "translate_y": 1}


def color_jitter(images: Tensor, factors: Float64s) -> Tensor:
    """Change brightness, contrast, saturation and hue by one linear map, as DALI's color_twist.

    Hue and saturation are turned and stretched in YIQ, contrast is about grey 128 (torchvision's
    own is about the image's mean, and its hue HSV's), brightness comes last; nothing is rounded or
    clipped in between. Within one level of 255 of DALI's.

    Args:
        images: uint8, shape (b, 3, h, w).
        factors: of :func:`data_pipelines.loading.augment.color_jitter_factors`, shape (b, 4).

    Returns:
        new images, uint8, shape (b, 3, h, w).
    """
    brightness, contrast, saturation, hue = np.asarray(factors, dtype=np.float64).T
    angle = 2 * math.pi * hue
    chroma = np.zeros((len(factors), 3, 3))
    chroma[:, 0, 0] = 1
    chroma[:, 1, 1] = chroma[:, 2, 2] = saturation * np.cos(angle)
    chroma[:, 1, 2] = saturation * np.sin(angle)
    chroma[:, 2, 1] = -chroma[:, 1, 2]
    matrices = (brightness * contrast)[:, None, None] * (_RGB @ chroma @ _YIQ)
    shifts = brightness * (1 - contrast) * _GREY
    return _levels(
        torch.baddbmm(
            torch.from_numpy(shifts).float()[:, None, None],
            torch.from_numpy(matrices).float(),
            images.flatten(2).float(),
        )
    ).view_as(images)


def rand_augment(images: Tensor, operations: Int64s, turned: Int64s, rand: RandAugment) -> Tensor:
    """Put each image through its operations, one after the other, as DALI's suite has them.

    Moved images are interpolated bilinearly, and grey 128 comes in from outside. On photos of 33 to
    224 pixels no value differs from DALI's by more than one level of 255, which is rounding: at
    most 3.5% of the values after a shear, 1% after brightness, sharpness, rotate or translate, and
    0.01% after color; the others are the same bit for bit.

    Args:
        images: uint8, shape (b, 3, h, w).
        operations, turned: of :func:`data_pipelines.loading.augment.rand_augment_choices`, shape
            (b, rand.operations).
        rand: how many operations, and how strong.

    Returns:
        new images, uint8, shape (b, 3, h, w).
    """
    changed = images.clone()
    for image, numbers, turns in zip(changed, operations.tolist(), turned.tolist(), strict=True):
        for number, turn in zip(numbers, turns, strict=True):
            name = AUGMENT_OPERATIONS[number]
            low, high = _RANGES.get(name, (0, 0))
            strength = float(np.linspace(low, high, rand.bins, dtype=np.float32)[rand.magnitude])
            if name in _SIDES:
                strength *= image.shape[_SIDES[name]]
            image.copy_(_operation(image, name, strength, bool(turn), _FILL))
    return changed


def trivial_augment(images: Tensor, choices: Int64s) -> Tensor:
    """Put each image through one operation, within the same bounds of DALI as :func:`rand_augment`.

    Black comes in from outside. torchvision's own has its ranges, but other formulas where
    :func:`rand_augment` has: equalising, sharpness at the border, rounding.

    Args:
        images: uint8, shape (b, 3, h, w).
        choices: of :func:`data_pipelines.loading.augment.trivial_augment_choices`, shape (b, 3).

    Returns:
        new images, uint8, shape (b, 3, h, w).
    """
    changed = torch.empty_like(images)
    for image, new, (number, turn, place) in zip(images, changed, choices.tolist(), strict=True):
        name = AUGMENT_OPERATIONS[number]
        strength = float(TRIVIAL_STRENGTHS[name][place]) if name in TRIVIAL_STRENGTHS else 0.0
        new.copy_(_operation(image, name, strength, bool(turn), _TRIVIAL_FILL))
    return changed


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Fill a box of each image with zeros, in place.

    Args:
        images: normalised, of any floating-point type and on any device, shape (b, c, h, w).
        boxes: of :func:`data_pipelines.loading.augment.erasing_boxes`, on the same device, shape
            (b, 4).

    Returns:
        ``images``.
    """
    top, left, height, width = boxes.T
    rows = _covered(images.shape[2], top, height)
    columns = _covered(images.shape[3], left, width)
    return images.masked_fill_(rows[:, None, :, None] & columns[:, None, None, :], 0)


def _covered(length: int, starts: Tensor, extents: Tensor) -> Tensor:
    """Which places of 0..length-1 lie in each stretch; bool, shape (b, length)."""
    places = torch.arange(length, device=starts.device)
    return (places >= starts[:, None]) & (places < (starts + extents)[:, None])


def _operation(image: Tensor, name: str, strength: float, turned: bool, fill: int) -> Tensor:
    """One operation on one image, uint8 (3, h, w); moves by so many pixels."""
    signed = -strength if turned else strength
    factor = 1 + signed
    match name:
        case "translate_x":
            return _moved(image, fill, translate=(signed, 0.0))
        case "translate_y":
            return _moved(image, fill, translate=(0.0, signed))
        case "shear_x":
            return _moved(image, fill, shear=(-math.degrees(math.atan(signed)), 0.0))
        case "shear_y":
            return _moved(image, fill, shear=(0.0, -math.degrees(math.atan(signed))))
        case "rotate":
            return _moved(image, fill, angle=-signed)
        case "brightness":
            return color_jitter(image[None], np.array([[factor, 1, 1, 0]]))[0]
        case "color":
            return color_jitter(image[None], np.array([[1, 1, factor, 0]]))[0]
        case "contrast":
            luminance = torch.from_numpy(_YIQ[0]).float()
            centre = luminance @ image.flatten(1).float().mean(1)
            return _levels(torch.lerp(centre, image.float(), factor))
        case "sharpness":
            return _levels(torch.lerp(_blurred(image), image.float(), factor))
        case "posterize":
            return F.posterize(image, round(strength))
        case "solarize":
            return torch.where(image >= strength, 255 - image, image)
        case "equalize":
            return torch.stack([_equalized(channel) for channel in image])
        case "auto_contrast":
            return torch.stack([_stretched(channel) for channel in image])
    return image


def _moved(
    image: Tensor,
    fill: int,
    angle: float = 0.0,
    translate: tuple[float, float] = (0.0, 0.0),
    shear: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """The image rotated about its middle, or else moved and sheared from its corner; degrees."""
    # torchvision's own fill weighs the border twice; zeros come in from outside as they should.
    moved = F.affine(
        image.float() - fill,
        angle=angle,
        translate=list(translate),
        scale=1.0,
        shear=list(shear),
        interpolation=InterpolationMode.BILINEAR,
        center=None if angle else [0.0, 0.0],
    )
    return _levels(moved + fill)


def _blurred(image: Tensor) -> Tensor:
    """A 3x3 mean in which the middle counts five times, mirrored at the border; float."""
    kernel = torch.ones(3, 1, 3, 3)
    kernel[:, :, 1, 1] = 5
    padded = nn.pad(image.float()[None], (1, 1, 1, 1), mode="reflect")
    return nn.conv2d(padded, kernel / 13, groups=3)[0]


def _equalized(channel: Tensor) -> Tensor:
    """The channel with as even a histogram as can be, by OpenCV's formula (PIL's is another)."""
    below = torch.bincount(channel.flatten(), minlength=256).cumsum(0)
    lowest = below[int(channel.min())]
    if lowest == channel.numel():
        return channel
    table = ((below - lowest) * 255 / (channel.numel() - lowest)).round().clamp(min=0)
    return table.to(torch.uint8)[channel.long()]


def _stretched(channel: Tensor) -> Tensor:
    """The channel with its darkest level at 0 and its brightest at 255."""
    low, high = int(channel.min()), int(channel.max())
    return channel if low == high else _levels((channel.float() - low) * (255 / (high - low)))


def _levels(values: Tensor) -> Tensor:
    """Whole levels of what has been computed, in its memory; halves go up, as in DALI."""
    return values.add_(0.5).floor_().clamp_(0, 255).to(torch.uint8)
