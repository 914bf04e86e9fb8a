"""Mixup and CutMix: every image of a batch mixed with another of it, and the labels with them."""

import math

import torch
from torch import Tensor

from data_pipelines.images.order import Float64s
from data_pipelines.settings import AugmentSection

# What each of a batch's random numbers decides.
_METHOD, _SHARE, _ROW, _COLUMN = 0, 1, 2, 3
MIXING_UNIFORMS = 4


def mix(
    images: Tensor, labels: Tensor, classes: int, augment: AugmentSection, draws: Float64s
) -> tuple[Tensor, Tensor]:
    """Mix each image of a batch with its partner: the first with the last, and so on.

    Args:
        images: of any floating-point type, memory format and device, shape (b, c, h, w). Left as
            they are: the result takes a second batch's memory, as it would in place.
        labels: int64, shape (b,), on the same device.
        classes: number of classes.
        augment: which methods, and how strong: its ``mixup`` and ``cutmix``.
        draws: the batch's random numbers in [0, 1), shape (MIXING_UNIFORMS,).

    Returns:
        mixed images, like ``images``; the share of each class in each image, float32, shape
        (b, classes), for ``F.cross_entropy``. Where ``augment`` has neither: ``images``
        themselves, and all of each image its own class's.
    """
    height, width = images.shape[2:]
    mixed, share = images, 1.0
    if augment.cutmix and not (augment.mixup and draws[_METHOD] < 0.5):
        top, left, bottom, right = _box(height, width, augment.cutmix, draws)
        share = 1 - (bottom - top) * (right - left) / (height * width)
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right].flip(0)
    elif augment.mixup:
        share = _share(augment.mixup, draws)
        mixed = _average(images, share)
    own = labels.new_zeros((len(labels), classes), dtype=torch.float32)
    own.scatter_(1, labels[:, None], 1.0)
    return mixed, _average(own, share)


def _share(alpha: float, draws: Float64s) -> float:
    """A draw from Beta(alpha, alpha), by the inverse of its distribution function."""
    from scipy.special import betaincinv

    return float(betaincinv(alpha, alpha, draws[_SHARE]))


def _box(height: int, width: int, alpha: float, draws: Float64s) -> tuple[int, int, int, int]:
    """Top, left, bottom, right of the part that comes from the partner.

    A box of the image's own shape with its middle anywhere in the image, cut off at the border: so
    its area is not always what was drawn.
    """
    side = math.sqrt(1 - _share(alpha, draws))
    box = []
    for length, draw in ((height, draws[_ROW]), (width, draws[_COLUMN])):
        extent, middle = int(length * side), int(length * draw)
        start = middle - extent // 2
        box.append((max(start, 0), min(start + extent, length)))
    (top, bottom), (left, right) = box
    return top, left, bottom, right


def _average(values: Tensor, share: float) -> Tensor:
    """Each row's ``share`` and the rest of its partner's, in the one copy that flipping makes."""
    return values.flip(0).lerp_(values, share)
