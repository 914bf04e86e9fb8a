"""Networks of nothing but weight layers and activations, for methods that train layer by layer."""

from collections.abc import Sequence

from torch import Tensor, nn

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "identity": nn.Identity,
}


class _Plain(nn.Module):
    """Layers with an activation behind each but the last one, and no biases.

    Every ``skip`` layers the activation of ``skip`` layers before is added to what the activation
    is to get, where the shapes agree: layer l gets that of l - skip if l is a multiple of it. Never
    the last layer, which is ``linear``.

    Weights begin as N(0, 1 / fan-in), N(0, 2 / fan-in) before a ReLU.
    """

    def __init__(
        self, hidden: Sequence[nn.Module], linear: nn.Linear, activation: str, skip: int
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation: {activation!r} is none of {', '.join(_ACTIVATIONS)}")
        if isinstance(skip, bool) or not isinstance(skip, int) or skip < 0:
            raise ValueError(f"skip: a number of layers, 0 for no skip connections, not {skip!r}")
        self.layers = nn.ModuleList(hidden)
        self.activations = nn.ModuleList(_ACTIVATIONS[activation]() for _ in hidden)
        self.linear = linear
        self._skip = skip
        for layer in (*hidden, linear):
            before_relu = activation == "relu" and layer is not linear
            nn.init.kaiming_normal_(
                layer.weight,  # type: ignore[arg-type]
                nonlinearity="relu" if before_relu else "linear",
            )

    def _hidden(self, x: Tensor) -> Tensor:
        earlier = x
        for number, (layer, activation) in enumerate(
            zip(self.layers, self.activations, strict=True), 1
        ):
            x = layer(x)
            joins = self._skip > 0 and number % self._skip == 0
            if joins and earlier.shape == x.shape:
                x = x + earlier
            x = activation(x)
            if joins:
                earlier = x
        return x


class PlainMLP(_Plain):
    """``depth`` fully connected layers, the hidden ones ``width`` wide.

    Args:
        num_classes: outputs.
        depth: number of layers, the last one included; 2 or more.
        width (neurons): width of each hidden layer.
        activation: what follows each hidden layer: ``tanh``, ``relu`` or ``identity``.
        skip: number of layers that a skip connection goes past; 0 for none.
        channels: number of channels of the images; 3 for RGB, 1 for grey.
        image_size (pixels): side of the images.

    Example:
        {depth: 4, width: 256, activation: relu, skip: 2, channels: 3, image_size: 32}
    """

    def __init__(
        self,
        num_classes: int,
        depth: int = 6,
        width: int = 128,
        activation: str = "tanh",
        skip: int = 0,
        channels: int = 1,
        image_size: int = 28,
    ) -> None:
        if depth < 2:
            raise ValueError(f"depth: at least 2 layers, not {depth!r}")
        widths = [channels * image_size * image_size, *[width] * (depth - 1)]
        hidden = [nn.Linear(widths[i], widths[i + 1], bias=False) for i in range(depth - 1)]
        super().__init__(hidden, nn.Linear(width, num_classes, bias=False), activation, skip)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, channels, image_size, image_size) to logits (N, num_classes)."""
        return self.linear(self._hidden(x.flatten(1)))


class PlainConvNet(_Plain):
    """``depth`` = 4n+2 layers: 3x3 convolutions and a linear one behind the mean over all pixels.

    The convolutions are those of a ResNet for small images: one, then four times n that are
    ``width``, 2, 4 and 8 times as wide, each but the first n beginning with stride 2; no norms.

    Args:
        num_classes: outputs.
        depth: number of layers: 6, 10, 14, 18 and so on; 18 is the published networks' depth.
        width (channels): width of the first convolutions.
        activation: what follows each convolution: ``tanh``, ``relu`` or ``identity``.
        skip: number of layers that a skip connection goes past; 0 for none.
        channels: number of channels of the images; 3 for RGB, 1 for grey.

    Example:
        {depth: 10, width: 16, activation: tanh, skip: 2, channels: 1}
    """

    def __init__(
        self,
        num_classes: int,
        depth: int = 18,
        width: int = 64,
        activation: str = "relu",
        skip: int = 0,
        channels: int = 3,
    ) -> None:
        if depth < 6 or depth % 4 != 2:
            raise ValueError(f"depth: 6, 10, 14, 18, ..., not {depth!r}")
        convolutions, inputs = [nn.Conv2d(channels, width, 3, padding=1, bias=False)], width
        for stage in range(4):
            for number in range((depth - 2) // 4):
                outputs, stride = width * 2**stage, 2 if stage and not number else 1
                convolutions.append(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False))
                inputs = outputs
        super().__init__(convolutions, nn.Linear(inputs, num_classes, bias=False), activation, skip)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, channels, H, W) to logits (N, num_classes)."""
        return self.linear(self.pool(self._hidden(x)).flatten(1))
