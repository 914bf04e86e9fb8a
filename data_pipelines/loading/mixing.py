"""Mixup and CutMix: every image of a batch mixed with another of it, and the labels with them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipelines.images.order import Float64s
from tpp.common.errors import UserError

# What each of a batch's random numbers decides.
_METHOD, _SHARE, _ROW, _COLUMN = 0, 1, 2, 3
MIXING_UNIFORMS = 4


@dataclass(frozen=True)
class Mixing:
    """How batches are mixed; with both, each batch takes one or the other, evenly drawn.

    Attributes:
        mixup: alpha of Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018: images
            are averaged, the shares drawn from Beta(alpha, alpha). 0: no mixup.
        cutmix: alpha of Yun et al., "CutMix", ICCV 2019: a box of one image is laid over the other,
            the box's area drawn from Beta(alpha, alpha). 0: no CutMix.

    Raises:
        UserError: a value lies outside its range.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be at least 0, not {getattr(self, name)}")


def mix(
    images: Tensor, labels: Tensor, classes: int, mixing: Mixing, draws: Float64s
) -> tuple[Tensor, Tensor]:
    """Mix each image of a batch with its partner: the first with the last, and so on.

    Args:
        images: of any floating-point type, memory format and device, shape (b, c, h, w). Left as
            they are: the result takes a second batch's memory, as it would in place.
        labels: int64, shape (b,), on the same device.
        classes: number of classes.
        mixing: which methods, and how strong.
        draws: the batch's random numbers in [0, 1), shape (MIXING_UNIFORMS,).

    Returns:
        mixed images, like ``images``; the share of each class in each image, float32, shape
        (b, classes), for ``F.cross_entropy``. Where ``mixing`` has neither method: ``images``
        themselves, and all of each image its own class's.
    """
    height, width = images.shape[2:]
    mixed, share = images, 1.0
    if mixing.cutmix and not (mixing.mixup and draws[_METHOD] < 0.5):
        top, left, bottom, right = _box(height, width, mixing.cutmix, draws)
        share = 1 - (bottom - top) * (right - left) / (height * width)
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right].flip(0)
    elif mixing.mixup:
        share = _share(mixing.mixup, draws)
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
