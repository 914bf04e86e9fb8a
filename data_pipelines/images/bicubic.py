"""MATLAB's ``imresize(image, factor, 'bicubic')``, with which super-resolution's images are made.

Keys, "Cubic Convolution Interpolation for Digital Image Processing", IEEE TASSP 29(6), 1981, with
a = -1/2; the kernel is widened where an image shrinks, and borders are mirrored. Of the published
small images of Set5 every value comes out (``tests/data_pipelines/test_bicubic.py``). Pillow and
torch round otherwise, or not in between, and torch's borders are others.
"""

from typing import Any

import torch
from torch import Tensor


def shrink(images: Tensor, scale: int) -> Tensor:
    """Images ``scale`` times smaller.

    Args:
        images: (..., h, w), values in 0..1 that are 8-bit levels over 255, of any floating type.
        scale: a whole number.

    Returns:
        (..., ceil(h / scale), ceil(w / scale)), 8-bit levels over 255, float32.
    """
    height, width = (-(-side // scale) for side in images.shape[-2:])
    return _resized(images, height, width, 1 / scale)


def enlarge(images: Tensor, scale: int) -> Tensor:
    """Images ``scale`` times larger; as :func:`shrink` else."""
    height, width = (scale * side for side in images.shape[-2:])
    return _resized(images, height, width, float(scale))


def to_levels(images: Tensor) -> Tensor:
    """The 8-bit levels of images in 0..1, float64; values outside are clipped."""
    return _rounded(images.double() * 255)


def _resized(images: Tensor, height: int, width: int, factor: float) -> Tensor:
    levels = to_levels(images)
    # Along the height first, and whole levels in between, as MATLAB has it. In float64: a GPU would
    # take TF32 for float32, and of halves a last bit decides.
    levels = _rounded(_weights(levels, levels.shape[-2], height, factor) @ levels)
    levels = _rounded(levels @ _weights(levels, levels.shape[-1], width, factor).mT)
    return (levels / 255).float()


def _rounded(levels: Tensor) -> Tensor:
    """Whole levels; halves go up."""
    return (levels + 0.5).floor_().clamp_(0, 255)


def _weights(like: Tensor, before: int, after: int, factor: float) -> Tensor:
    """What each of ``before`` values in a row gives to each of ``after``, (after, before)."""
    options: Any = {"dtype": torch.float64, "device": like.device}
    squeezed = min(factor, 1.0)
    # Centre of each new value, counted in old ones.
    centres = (torch.arange(after, **options) + 0.5) / factor - 0.5
    places = torch.arange(before, **options)
    weights = torch.zeros(after, before, **options)
    # Mirrored with the border's own value, and as often as the kernel is wider than the image.
    for turn in range(-1 - int(4 / squeezed) // before, 2 + int(4 / squeezed) // before):
        for images_of in (places, -1 - places):
            distances = (images_of + 2 * before * turn) - centres[:, None]
            weights += _cubic(squeezed * distances)
    return weights / weights.sum(1, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    """Keys's kernel with a = -1/2."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x <= 1, near, torch.where(x <= 2, far, 0.0))
