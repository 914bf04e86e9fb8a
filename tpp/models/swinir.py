"""SwinIR for lightweight super-resolution (Liang et al. 2021, arXiv:2108.10257)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

_SCALES = (2, 3, 4)
# Of DIV2K's training images.
_MEAN = (0.4488, 0.4371, 0.4040)


class SwinGroup(nn.Module):
    """Swin Transformer layers, a 3x3 convolution, and a skip: the paper's RSTB (sec. 3.2).

    Every second layer's windows are shifted by half a window. Weights have the names of the
    authors' checkpoints.
    """

    def __init__(
        self, width: int, heads: int, window: int, mlp_ratio: float, drop_paths: list[float]
    ) -> None:
        from timm.models.swin_transformer import SwinTransformerBlock

        super().__init__()
        self.residual_group = _Layers(
            SwinTransformerBlock(
                width,
                input_resolution=window,
                num_heads=heads,
                window_size=window,
                shift_size=0 if number % 2 == 0 else window // 2,
                # Windows of one size, whatever the image's.
                always_partition=True,
                dynamic_mask=True,
                mlp_ratio=mlp_ratio,
                drop_path=drop_path,
            )
            for number, drop_path in enumerate(drop_paths)
        )
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, H, W, width) to the same shape; windows divide H and W."""
        y = self.residual_group(x)
        return x + self.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _Layers(nn.Module):
    """A group's layers, one after the other; where they are in the authors' module."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, H, W, width) to the same shape."""
        return self.blocks(x)


class _PixelNorm(nn.Module):
    """The norm before the first layer; where it is in the authors' module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, H, W, width) to the same shape."""
        return self.norm(x)


class SwinIR(nn.Module):
    """Attention within windows at the small image's resolution, one convolution, PixelShuffle.

    The defaults are the authors' lightweight network, with the names of its published weights. It
    has 910,152, 918,267 and 929,628 parameters for scales 2, 3 and 4; the paper's table says 878,
    886 and 897 thousand, fewer by what one of the 3x3 convolutions has. An image whose sides the
    window does not divide is mirrored at the bottom and on the right (its last row and column not
    repeated, as in BasicSR's evaluation), and what is over is cut off.

    Args:
        scale: how many times as wide and high the output is: 2, 3 or 4.
        width: channels of the residual stream; a multiple of ``heads``.
        depths: layers of each group.
        heads: of attention.
        window: its side, in pixels of the small image; even.
        mlp_ratio: hidden channels of each layer's MLP over ``width``.
        drop_path: share of a batch's images for which the last layer is skipped in training; the
            first layers' shares are smaller.
        channels: of the images.
    """

    def __init__(
        self,
        scale: int = 2,
        width: int = 60,
        depths: Sequence[int] = (6, 6, 6, 6),
        heads: int = 6,
        window: int = 8,
        mlp_ratio: float = 2.0,
        drop_path: float = 0.1,
        channels: int = 3,
    ) -> None:
        super().__init__()
        if scale not in _SCALES:
            raise ValueError(f"scale must be one of {', '.join(map(str, _SCALES))}, not {scale!r}")
        if width % heads:
            raise ValueError(f"width ({width}) must be a multiple of heads ({heads})")
        if window < 2 or window % 2:
            raise ValueError(f"window must be an even number, not {window!r}")
        self.window = window
        self.mean = _MEAN if channels == len(_MEAN) else (0.0,) * channels
        self.conv_first = nn.Conv2d(channels, width, 3, padding=1)
        self.patch_embed = _PixelNorm(width)
        last = max(sum(depths) - 1, 1)
        shares = iter(drop_path * number / last for number in range(sum(depths)))
        self.layers = nn.Sequential(
            *(
                SwinGroup(width, heads, window, mlp_ratio, [next(shares) for _ in range(depth)])
                for depth in depths
            )
        )
        self.norm = nn.LayerNorm(width)
        self.conv_after_body = nn.Conv2d(width, width, 3, padding=1)
        self.upsample = nn.Sequential(
            nn.Conv2d(width, scale * scale * channels, 3, padding=1), nn.PixelShuffle(scale)
        )
        self.scale = scale
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, channels, H, W) in 0..1 to (N, channels, scale * H, scale * W)."""
        height, width = x.shape[2:]
        mean = torch.tensor(self.mean, dtype=x.dtype, device=x.device).view(1, -1, 1, 1)
        x = self.conv_first(self._whole_windows(x) - mean)
        y = self.layers(self.patch_embed(x.permute(0, 2, 3, 1)))
        x = x + self.conv_after_body(self.norm(y).permute(0, 3, 1, 2))
        x = self.upsample(x) + mean
        return x[:, :, : self.scale * height, : self.scale * width]

    def _whole_windows(self, x: Tensor) -> Tensor:
        """Images of sides that the window divides, mirrored as often as it takes."""
        for axis in (2, 3):
            side = x.shape[axis]
            wanted = -(-side // self.window) * self.window
            if wanted != side:
                period = max(2 * (side - 1), 1)
                places = torch.arange(wanted, device=x.device) % period
                x = x.index_select(axis, torch.minimum(places, period - places))
        return x
