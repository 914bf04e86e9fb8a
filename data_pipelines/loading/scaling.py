"""Scaling on the CPU with torch's kernel for bytes, to the pixels of the installed Pillow."""

import PIL
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from data_pipelines.images.source import Bytes

# Both scale one side after the other and round to whole levels in between, so the order shows.
# torch begins with the width; Pillow did so up to version 12.
_BY_HEIGHT_FIRST = int(PIL.__version__.partition(".")[0]) >= 13


def scale(image: Bytes, size: tuple[int, int], mode: str) -> Bytes:
    """Scale an image, antialiased, as ``PIL.Image.resize`` does.

    Takes a fifth of the time of DALI's own kernel. Of the values, 99.5% are Pillow's, and no other
    is more than 2 levels away.

    Args:
        image: shape (h, w, c).
        size: height and width to be.
        mode: ``bilinear`` or ``bicubic``.

    Returns:
        a new image, uint8, shape (\\*size, c).
    """
    height, width = size
    # Channels last, in and out, as torch sees it only in this order: nothing is copied.
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    if _BY_HEIGHT_FIRST and height_goes_first(image.shape[:2], size):
        pixels = _scaled(pixels, height, image.shape[1], mode)
    return _scaled(pixels, height, width, mode)[0].permute(1, 2, 0).contiguous().numpy()


def height_goes_first(before: tuple[int, ...], after: tuple[int, int]) -> bool:
    """Whether Pillow 13 scales an image's height before its width.

    So it is where the height shrinks, and by more than twice as many pixels as the width; seen, not
    documented (``findings/pillow_13_scales_height_first.sh``).

    Args:
        before, after: heights and widths.
    """
    height, width = (was - becomes for was, becomes in zip(before, after, strict=True))
    return height > max(0, 2 * width)


def _scaled(pixels: Tensor, height: int, width: int, mode: str) -> Tensor:
    return interpolate(pixels, [height, width], mode=mode, antialias=True)
