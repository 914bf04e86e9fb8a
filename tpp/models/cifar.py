"""The networks of the CIFAR experiments: ResNet-6n+2 with option-A shortcuts, and VGG-19."""

import torch.nn.functional as F
from torch import Tensor, nn

# Widths of VGG-19's convolutions, one list per resolution; a 2x2 max-pool stands in between.
_VGG_STAGES = {
    16: ([64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3),
    19: ([64] * 2, [128] * 2, [256] * 4, [512] * 4, [512] * 4),
}


class CifarBlock(nn.Module):
    """Basic block: two 3x3 convolutions around an option-A shortcut (He et al. 2016, sec. 4.2).

    Where the block halves the resolution, the shortcut takes every other pixel and pads the new
    channels with zeros, half of them on either side; it has no parameters.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.padding = (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, channels, H/stride, W/stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.padding:
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet for 32x32 images with ``depth`` = 6n+2 layers, 16-32-64 channels wide.

    Parameter names are those of the widely used checkpoints of akamaster/pytorch_resnet_cifar10.
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, stride=1)
        self.layer2 = _stage(blocks, 16, 32, stride=2)
        self.layer3 = _stage(blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64, num_classes)
        _init_kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class CifarVGG(nn.Module):
    """VGG with BatchNorm for 32x32 images: 13 or 16 convolutions and one linear classifier.

    Args:
        depth: 16 or 19, the layers of the networks for ImageNet that they come from.
        num_classes: outputs.
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        in_channels = 3
        for stage, widths in enumerate(_VGG_STAGES[depth]):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for channels in widths:
                layers += [
                    nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(inplace=True),
                ]
                in_channels = channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(in_channels, num_classes)
        _init_kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, num_classes)."""
        return self.classifier(self.features(x).mean((2, 3)))


def _stage(blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
    first = CifarBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(CifarBlock(channels, channels, 1) for _ in range(blocks - 1)))


def _init_kaiming(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
