"""How near an image comes to another: PSNR and SSIM, as papers on super-resolution give them."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", IEEE TIP
# 13(4), 2004: window, its deviation in pixels, and the constants of 8-bit levels.
_WINDOW, _DEVIATION = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def luma(levels: Tensor) -> Tensor:
    """Y of ITU-R BT.601 as MATLAB's ``rgb2ycbcr`` has it, not rounded.

    Args:
        levels: (n, 3, h, w), in 0..255; or (n, 1, h, w), grey, which is returned.

    Returns:
        (n, 1, h, w), of colours in 16..235.
    """
    if levels.shape[1] == 1:
        return levels
    red, green, blue = levels.split(1, dim=1)
    return 16 + (65.481 * red + 128.553 * green + 24.966 * blue) / 255


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of levels (n, c, h, w) in 0..255, in dB, (n,)."""
    # Of images alike to the last bit it would be infinite.
    return -10 * ((one - other) / 255).square().mean((1, 2, 3)).clamp(min=1e-10).log10()


def ssim(one: Tensor, other: Tensor) -> Tensor:
    """Structural similarity of levels (n, 1, h, w) in 0..255, (n,).

    A mean over all places in the image of a Gaussian window, 11x11; of an image that is smaller the
    window is the largest odd one that lies in it.
    """
    means = _blurred(torch.cat([one, other, one * one, other * other, one * other], dim=1))
    a, b, aa, bb, ab = means.split(1, dim=1)
    spread = aa - a * a + bb - b * b
    alike = (2 * a * b + _C1) * (2 * (ab - a * b) + _C2)
    return (alike / ((a * a + b * b + _C1) * (spread + _C2))).mean((1, 2, 3))


def _blurred(images: Tensor) -> Tensor:
    """Each channel by itself, without a border."""
    channels = images.shape[1]
    for axis in (2, 3):
        side = min(_WINDOW, (images.shape[axis] - 1) // 2 * 2 + 1)
        places = torch.arange(side, dtype=images.dtype, device=images.device) - side // 2
        weights = (-0.5 * (places / _DEVIATION).square()).exp()
        shape = (1, 1, side, 1) if axis == 2 else (1, 1, 1, side)
        kernel = (weights / weights.sum()).view(shape).expand(channels, *shape[1:])
        images = F.conv2d(images, kernel, groups=channels)
    return images
