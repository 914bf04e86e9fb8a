"""Building and running networks without memory, on the meta device, in milliseconds.

PyTorch works out the shapes of BatchNorm's outputs by running its formula operation by operation
in Python, nine tenths of such a run of a ResNet, and draws initial weights likewise. The first of
these operations imports the compiler, and the first convolution SymPy, which takes as long as
importing PyTorch itself.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
# Those whose shapes PyTorch works out in Python.
_ACTIVATIONS = (
    "relu",
    "silu",
    "gelu",
    "hardswish",
    "hardsigmoid",
    "hardtanh",
    "sigmoid",
    "mish",
    "elu",
)


class PlainMode(TorchDispatchMode):
    """A mode that is not kept from the compiler.

    PyTorch wraps ``__torch_dispatch__`` so that no compiler looks into it, and imports it for
    that. What runs under these modes is compiled by nobody.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class ShapesOnly(PlainMode):
    """Gives what networks mostly consist of the shapes of its outputs, and computes nothing.

    Operations that it does not know, that do not fit their tensors, or whose tensors have memory
    go the usual way, and fail as usual. BatchNorm's running statistics are left alone.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        rule = _RULES.get(func)
        if rule is not None and not kwargs and (rule is _joined or args[0].is_meta):
            found = rule(*args)
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))


def _norm_by_mode(
    images: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    *_: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    if not training:
        return _trained_norm(images, weight, bias, mean, variance)
    if images.dim() < 2 or images.numel() <= images.shape[1]:  # one value for each channel
        return None
    return _normalised(images, weight, bias, mean, variance)


def _trained_norm(
    images: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    *_: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    if mean is None or variance is None:
        return None
    return _normalised(images, weight, bias, mean, variance)


def _normalised(images: Tensor, *parameters: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """The outputs of BatchNorm, and the statistics that it hands to its backward pass."""
    if images.dim() < 2:
        return None
    for tensor in parameters:
        if tensor is not None and not (
            tensor.is_meta and tensor.dtype == images.dtype and tensor.shape == images.shape[1:2]
        ):
            return None
    channels = images.shape[1]
    # clone() is quicker than empty_like(), which is Python here.
    return images.clone(), images.new_empty(channels), images.new_empty(channels)


def _convolution(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    _: Sequence[int],
    groups: int,
) -> Tensor | None:
    sides = weight.dim() - 2
    filters, inputs = weight.shape[:2]
    if (
        transposed
        or not len(stride) == len(padding) == len(dilation) == sides == images.dim() - 2
        or images.shape[1] != inputs * groups
        or 0 in images.shape
        or 0 in weight.shape
        or filters % groups
        or not (weight.is_meta and weight.dtype == images.dtype)
        or not (bias is None or bias.shape == weight.shape[:1])
    ):
        return None
    shape = [len(images), filters, *_sides(images, weight.shape[2:], stride, padding, dilation)]
    return images.new_empty(shape) if min(shape) > 0 else None


def _mean(images: Tensor, dims: Sequence[int] | None, keep: bool = False) -> Tensor | None:
    if not images.is_floating_point() or not dims or 0 in images.shape:
        return None
    gone = {dim % images.dim() for dim in dims if -images.dim() <= dim < images.dim()}
    if len(gone) < len(dims):
        return None
    kept = [1 if dim in gone else size for dim, size in enumerate(images.shape)]
    return images.new_empty(kept if keep else [n for d, n in enumerate(kept) if d not in gone])


def _max_pool(
    images: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    rounded_up: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """The highest values, and where they are."""
    given = (kernel, stride, padding, dilation)
    usual = images.dim() == 4 and images.is_contiguous() and all(len(two) == 2 for two in given)
    if not usual or rounded_up or any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        return None
    shape = [*images.shape[:2], *_sides(images, kernel, stride, padding, dilation)]
    if min(shape) < 1:
        return None
    return images.new_empty(shape), images.new_empty(shape, dtype=torch.int64)


def _sides(
    images: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """How often a window fits into an image, see torch.nn.Conv2d for the formula."""
    return [
        (length + 2 * pad - wide * (window - 1) - 1) // step + 1
        for length, window, step, pad, wide in zip(
            images.shape[2:], kernel, stride, padding, dilation, strict=True
        )
    ]


def _product(bias: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
    """Of matrices, (n, k) and (k, m), with a row added."""
    fit = left.dim() == right.dim() == 2 and left.shape[1] == right.shape[0]
    same = left.dtype == right.dtype == bias.dtype and left.is_meta and right.is_meta
    if not fit or not same or bias.shape != right.shape[1:]:
        return None
    return left.new_empty(left.shape[0], right.shape[1])


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    """Of tensors that are alike but for their lengths along one dimension."""
    first = tensors[0]
    shape = list(first.shape)
    if not -len(shape) <= dim < len(shape) or not first.is_contiguous():
        return None
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors if tensor.dim() == len(shape))
    for tensor in tensors:
        rest = [*tensor.shape]
        if len(rest) != len(shape) or tensor.dtype != first.dtype or not tensor.is_contiguous():
            return None
        rest[dim] = shape[dim]
        if rest != shape:
            return None
    return first.new_empty(shape)


def _combined(one: Tensor, other: Tensor | float) -> Tensor | None:
    """Element by element, also with a number or where a length is one."""
    if not isinstance(other, Tensor):
        return _activated(one) if isinstance(other, int | float) else None
    same = one.dtype == other.dtype and one.is_floating_point() and other.is_meta
    if not same or one.dim() != other.dim() or not (one.is_contiguous() and other.is_contiguous()):
        return None
    pairs = list(zip(one.shape, other.shape, strict=True))
    if any(a != b and 1 not in (a, b) for a, b in pairs):
        return None
    return one.new_empty([b if a == 1 else a for a, b in pairs])


def _combined_in_place(one: Tensor, other: Tensor | float) -> Tensor | None:
    found = _combined(one, other)
    return None if found is None or found.shape != one.shape else one


def _activated(tensor: Tensor, *_: Any) -> Tensor | None:
    return tensor.clone() if tensor.is_floating_point() else None


def _in_place(tensor: Tensor, *_: Any) -> Tensor | None:
    return tensor if tensor.is_floating_point() else None


_RULES: dict[Any, Callable[..., Any]] = {
    _ATEN.native_batch_norm.default: _norm_by_mode,
    _ATEN._native_batch_norm_legit.default: _norm_by_mode,
    _ATEN._native_batch_norm_legit_no_training.default: _trained_norm,
    _ATEN.convolution.default: _convolution,
    _ATEN.max_pool2d_with_indices.default: _max_pool,
    _ATEN.mean.dim: _mean,
    _ATEN.addmm.default: _product,
    _ATEN.cat.default: _joined,
    **{getattr(_ATEN, name).Tensor: _combined for name in ("add", "mul", "sub")},
    **{getattr(_ATEN, name).Tensor: _combined_in_place for name in ("add_", "mul_", "sub_")},
    **{getattr(_ATEN, name).default: _activated for name in _ACTIVATIONS},
    **{
        getattr(_ATEN, f"{name}_").default: _in_place
        for name in (*_ACTIVATIONS, "normal", "uniform")
    },
}
