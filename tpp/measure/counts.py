"""Parameters and multiply-accumulates of a network."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tpp.common.errors import UserError
from tpp.models.architecture import example_input_for, meta_copy

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

# What convolutions and linear layers come down to; attention's products are not among them.
_COUNTED_OPS = {"convolution", "_convolution", "mm", "addmm"}


@dataclass(frozen=True)
class LayerCount:
    """Size of one Conv2d or Linear layer.

    Attributes:
        name: the layer.
        inputs: input channels or features.
        outputs: filters or neurons.
        parameters: weights and biases.
        macs: multiply-accumulates for one image.
    """

    name: str
    inputs: int
    outputs: int
    parameters: int
    macs: int


@dataclass(frozen=True)
class Counts:
    """Size of a network.

    Attributes:
        parameters: all trainable values, those of BatchNorm included.
        macs: multiply-accumulates of convolutions and linear layers for one image.
        layers: the Conv2d and Linear layers that the forward pass calls, in that order.
        image: shape of the image, (channels, height, width).
    """

    parameters: int
    macs: int
    layers: list[LayerCount]
    image: tuple[int, ...]

    @property
    def of_image(self) -> str:
        """Of what the multiply-accumulates are, in words: ``a 3x224x224 image``."""
        return f"a {'x'.join(map(str, self.image))} image"


def count(model: nn.Module, *, example_input: Tensor | None = None) -> Counts:
    """Count parameters and multiply-accumulates of convolutions and linear layers.

    Nothing is computed: a copy without memory is run under PyTorch's flop counter, where a
    multiply-accumulate is two flops. BatchNorm, activations, pooling and additions are not
    counted, as in METHOD's "speedup".

    Args:
        model: any network, on any device; left alone.
        example_input: a batch (N, channels, height, width), of which one image is counted; by
            default see :func:`tpp.models.architecture.image_shape_for`.

    Raises:
        UserError: the model does not run on such an input.
    """
    from torch.utils.flop_counter import FlopCounterMode  # it imports Triton

    if example_input is None:
        example_input = example_input_for(model, "meta")
    # The counter wants to follow gradients of what modules are called with, and fails where that
    # is a view of a parameter, as in attention that pools.
    copy = meta_copy(model).eval().requires_grad_(False)
    dtype = next(copy.parameters()).dtype
    images = torch.empty_like(example_input[:1], device="meta", dtype=dtype)
    counter = FlopCounterMode(display=False)
    macs: dict[str, int] = {}
    for name, module in copy.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            _count_calls(name, module, counter, macs)
    try:
        with torch.no_grad(), counter:
            copy(images)
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        shape = "x".join(map(str, images.shape))
        raise UserError(
            f"{type(model).__name__} does not run on an input of {shape}: {error}"
        ) from None
    modules = dict(copy.named_modules())
    return Counts(
        parameters=sum(parameter.numel() for parameter in copy.parameters()),
        macs=_counted_macs(counter),
        layers=[_layer_count(name, modules[name], macs[name]) for name in macs],
        image=tuple(images.shape[1:]),
    )


def _count_calls(
    name: str, module: nn.Module, counter: "FlopCounterMode", macs: dict[str, int]
) -> None:
    """Add to ``macs[name]`` what the counter rises by while ``module`` runs."""
    before: list[int] = []

    def enter(*_: Any) -> None:
        before.append(_counted_macs(counter))

    def leave(*_: Any) -> None:
        macs[name] = macs.get(name, 0) + _counted_macs(counter) - before.pop()

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _counted_macs(counter: "FlopCounterMode") -> int:
    counts = counter.get_flop_counts().get("Global", {})
    return sum(flops for op, flops in counts.items() if _op_name(op) in _COUNTED_OPS) // 2


def _op_name(op: Any) -> str:
    return str(op).rpartition(".")[2]


def _layer_count(name: str, layer: nn.Module, macs: int) -> LayerCount:
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    if isinstance(layer, nn.Conv2d):
        return LayerCount(name, layer.in_channels, layer.out_channels, parameters, macs)
    assert isinstance(layer, nn.Linear)
    return LayerCount(name, layer.in_features, layer.out_features, parameters, macs)
