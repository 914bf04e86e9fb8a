"""Parameters and multiply-accumulates of a network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpp.common.errors import UserError, reason_of
from tpp.common.numbers import in_short
from tpp.models.architecture import example_input_for, meta_copy
from tpp.models.fitting import line_of, place_of, running_modules
from tpp.models.meta_runs import PlainMode, ShapesOnly

# What convolutions and linear layers come down to; attention's products are not among them.
_CONVOLUTIONS = {"convolution", "_convolution"}
_PRODUCTS = {"mm": 0, "addmm": 1}  # and the place of the first factor


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

    Nothing is computed: a copy is run without memory. The numbers are those of PyTorch's
    FlopCounterMode, where a multiply-accumulate is two flops; that one imports Triton and the
    compiler. BatchNorm, activations, pooling and additions are not counted, as in METHOD's
    "speedup".

    Args:
        model: any network, on any device; left alone.
        example_input: a batch (N, channels, height, width), of which one image is counted; by
            default see :func:`tpp.models.architecture.image_shape_for`.

    Raises:
        UserError: the model does not run on such an input.
    """
    if example_input is None:
        example_input = example_input_for(model, "meta")
    copy = meta_copy(model).eval()
    dtype = next(copy.parameters()).dtype
    images = torch.empty((1, *example_input.shape[1:]), device="meta", dtype=dtype)
    running = running_modules(copy)
    counter = _Counter(running)
    try:
        with torch.inference_mode(False), torch.no_grad(), ShapesOnly(), counter:
            copy(images)
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        shape = "x".join(map(str, images.shape))
        raise UserError(
            f"{type(model).__name__} does not run on an input of {shape} without values: "
            f"{reason_of(error)} ({place_of(running)}{line_of(error)})"
        ) from None
    layers = {name: m for name, m in copy.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return Counts(
        parameters=sum(parameter.numel() for parameter in copy.parameters()),
        macs=counter.total,
        layers=[
            _layer_count(name, layers[name], macs)
            for name, macs in counter.of.items()
            if name in layers
        ],
        image=tuple(images.shape[1:]),
    )


class _Counter(PlainMode):
    """Multiply-accumulates of a run, and those of each module with what is in it.

    Args:
        running: names of the modules that are running, innermost last, see
            :func:`tpp.models.fitting.running_modules`.
    """

    def __init__(self, running: Sequence[str]) -> None:
        super().__init__()
        self.total = 0
        self.of: dict[str, int] = {}
        self._running = running

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        macs = _macs(func.overloadpacket.__name__, args, out)
        self.total += macs
        for name in self._running:
            self.of[name] = self.of.get(name, 0) + macs
        return out


def _macs(operation: str, args: Sequence[Any], out: Any) -> int:
    if operation in _CONVOLUTIONS:
        images, weight, transposed = args[0], args[1], args[6]
        # A filter's weights at every place, of the input where it is transposed.
        pixels = (images if transposed else out).shape[2:].numel()
        return int(len(images) * pixels * weight.numel())
    if operation in _PRODUCTS:
        return int(out.numel() * args[_PRODUCTS[operation]].shape[1])
    return 0


def _layer_count(name: str, layer: nn.Module, macs: int) -> LayerCount:
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    if isinstance(layer, nn.Conv2d):
        return LayerCount(name, layer.in_channels, layer.out_channels, parameters, macs)
    assert isinstance(layer, nn.Linear)
    return LayerCount(name, layer.in_features, layer.out_features, parameters, macs)


def summary(dense: Counts, counts: Counts) -> str:
    """One line: parameters and multiply-accumulates before and after, and the speedup."""
    removed = 1 - counts.parameters / dense.parameters
    parameters = f"{in_short(dense.parameters)} -> {in_short(counts.parameters)}"
    return (
        f"parameters {parameters} (-{removed:.2%}), "
        f"MACs {in_short(dense.macs)} -> {in_short(counts.macs)} for {counts.of_image}, "
        f"speedup {dense.macs / counts.macs:.4f}x"
    )
