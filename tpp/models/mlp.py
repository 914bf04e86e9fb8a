"""The linear network on which the paper studies trainability (Wang & Fu 2023, sec. 4.1)."""

from torch import Tensor, nn

DEPTH = 7


class LinearMLP(nn.Module):
    """Seven fully connected layers ``fc1`` ... ``fc7`` with no activation in between.

    Hidden layers are ``width`` wide and have biases, as in the authors' code. There MNIST is
    padded to 32x32 (``image_size=32``); by default an image goes in as it is, 28x28.

    Args:
        num_classes: outputs.
        width (neurons): width of each hidden layer.
        image_size (pixels): side of the images.

    Example:
        {width: 50, image_size: 32}
    """

    def __init__(self, num_classes: int, width: int = 100, image_size: int = 28) -> None:
        super().__init__()
        widths = [image_size * image_size, *[width] * (DEPTH - 1), num_classes]
        for i in range(DEPTH):
            self.add_module(f"fc{i + 1}", nn.Linear(widths[i], widths[i + 1]))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 1, image_size, image_size) to logits (N, num_classes)."""
        x = x.flatten(1)
        for layer in self.children():
            x = layer(x)
        return x
