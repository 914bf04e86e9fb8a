"""EDSR, a network for super-resolution (Lim et al. 2017, arXiv:1707.02921)."""

from typing import Any

from torch import Tensor, nn

# The factors of each PixelShuffle, per scale.
_STEPS = {2: (2,), 3: (3,), 4: (2, 2)}


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a ReLU in between, and no normalisation (sec. 3.1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, width, H, W) to the same shape."""
        return x + self.conv2(self.conv1(x).relu())


class EDSR(nn.Module):
    """Residual blocks at the small image's resolution, then convolutions and PixelShuffle.

    Args:
        scale: how many times as wide and high the output is: 2, 3 or 4; by default what
            ``task.scale`` says.
        blocks: number of residual blocks; 16 in the paper's baseline, 32 in its large network.
        width (channels): width of the residual stream; 64 in the baseline, 256 in the large one,
            which also scales its residuals by 0.1. That is not done here.
        channels: number of channels of the images; 3 for RGB, 1 for grey.

    Example:
        {scale: 4, blocks: 16, width: 64, channels: 1}
    """

    def __init__(self, scale: int = 2, blocks: int = 4, width: int = 32, channels: int = 3) -> None:
        super().__init__()
        if scale not in _STEPS:
            raise ValueError(f"scale must be one of {', '.join(map(str, _STEPS))}, not {scale!r}")
        self.head = nn.Conv2d(channels, width, 3, padding=1)
        self.body = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.body_end = nn.Conv2d(width, width, 3, padding=1)
        self.upsample = nn.Sequential()
        for step in _STEPS[scale]:
            self.upsample.append(nn.Conv2d(width, step * step * width, 3, padding=1))
            self.upsample.append(nn.PixelShuffle(step))
        self.tail = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, channels, H, W) to (N, channels, scale * H, scale * W)."""
        x = self.head(x)
        x = x + self.body_end(self.body(x))
        return self.tail(self.upsample(x))


def output_shape(
    image: tuple[int, int, int], *, scale: int = 2, channels: int = 3, **_: Any
) -> tuple[int, ...]:
    """Shape of what EDSR, or SwinIR, makes of an image (channels, height, width).

    Arguments are the network's.
    """
    height, width = image[1:]
    return channels, scale * height, scale * width
