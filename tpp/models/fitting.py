"""Giving a network the widths that its tensors ask for."""

import sysconfig
import traceback
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tpp.common.errors import UserError, reason_of
from tpp.common.own_code import is_own
from tpp.models.architecture import (
    Architecture,
    architecture_of,
    build_on_meta,
    example_input_for,
    meta_copy,
    set_architecture,
    set_preprocessing,
)
from tpp.models.layers import layer_widths
from tpp.models.meta_runs import ShapesOnly

Shape = tuple[int, ...]
_OURS, _PYTHONS = Path(__file__).resolve().parents[1], Path(sysconfig.get_path("stdlib"))
# Tensors that have their layer's widths, and shrink or grow with them.
_KNOWN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def fit_to_shapes(model: nn.Module, shapes: Mapping[str, Shape]) -> None:
    """Resize the modules of ``model``, and parameters that stand alone, in place.

    Tensors that change shape lose their values, so this is meant for a model on the meta device,
    whose tensors are assigned afterwards. Whether the widths fit each other is for
    :func:`output_shape` to find out.

    Args:
        model: a dense network, see :func:`tpp.models.architecture.build_on_meta`.
        shapes: the wanted shape of every tensor in the model's ``state_dict``.

    Raises:
        UserError: a tensor is missing or not known, or no widths of the layers give its shape.
    """
    names = list(model.state_dict())
    missing = [name for name in names if name not in shapes]
    known = set(names)
    unknown = [name for name in shapes if name not in known]
    if missing or unknown:
        problem = f"lacks {few(missing)}" if missing else f"has unknown {few(unknown)}"
        raise UserError(f"does not fit {type(model).__name__}: {problem}")
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        _fit_module(module, {k: shapes[prefix + k] for k, _ in own if prefix + k in shapes})
    for name, tensor in model.state_dict().items():
        if tuple(tensor.shape) != tuple(shapes[name]):
            raise UserError(
                f"{name}: shape {by(shapes[name])} does not fit {type(model).__name__}, "
                f"which wants {by(tensor.shape)}"
            )


def output_shape(model: nn.Module, image: Tensor) -> tuple[int, ...]:
    """Run a network without memory on a batch; the shape of its output.

    Args:
        model: the network, on any device; left alone.
        image: (N, channels, height, width).

    Raises:
        UserError: its layers do not fit each other.
    """
    copy = meta_copy(model).eval()
    image = image.to("meta", float_type(copy))
    running = running_modules(copy)
    try:
        with torch.no_grad(), ShapesOnly():
            out = copy(image)
    except Exception as error:  # whatever a network's own code raises where widths do not fit
        where = f"{place_of(running)}{line_of(error)}: {reason_of(error)}"
        raise UserError(f"its layers do not fit each other {where}") from None
    return tuple(out.shape) if isinstance(out, Tensor) else ()


def check_logits(model: nn.Module, *, side: int | None = None) -> None:
    """Check that a network of one's own gives one row of logits for each image, in both modes.

    Args:
        model: it says its classes, and of which size its images are; left alone.
        side: of the images of training, in pixels, where that is another.

    Raises:
        UserError: it does not run, or gives something else.
    """
    architecture = architecture_of(model)
    assert architecture is not None
    name, classes = architecture.name, architecture.num_classes
    for mode, at in (("evaluation", None), ("training", side)):
        # A BatchNorm on one pixel does not train with one image.
        images = example_input_for(model, "meta", side=at).repeat(2, 1, 1, 1)
        copied = meta_copy(model).train(mode == "training")
        running = running_modules(copied)
        try:
            with torch.no_grad(), ShapesOnly():
                out = copied(images.to(float_type(copied)))
        except Exception as error:  # whatever its code raises
            raise UserError(
                f"{name} does not run on images of {by(images.shape[1:])} without memory, in "
                f"{mode} mode, {place_of(running)}{line_of(error)}: {reason_of(error)}"
            ) from None
        found = by(out.shape[1:]) if isinstance(out, Tensor) else None
        if found is None or out.dim() != 2 or out.shape[0] != 2:
            several = f" of {len(out)}" if isinstance(out, list | tuple | dict) else ""
            what = f"a {type(out).__name__}{several}" if found is None else f"{found} for an image"
            raise UserError(
                f"{name} gives {what} in {mode} mode, and classification takes one tensor, a row "
                f"of {classes} logits for each image"
            )
        if out.shape[1] != classes:
            raise UserError(
                f"{name} gives {found} logits for an image, and there are {classes} classes; let "
                "it take num_classes, or say with model.args how many"
            )


def running_modules(model: nn.Module) -> list[str]:
    """A list that holds, while ``model`` runs, the names of the modules that do, innermost last.

    Hooks stay on the model: meant for a copy.
    """
    running: list[str] = []

    def leave(*_: object) -> None:
        running.pop()

    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: running.append(name))
        module.register_forward_hook(leave)
    return running


def place_of(running: Sequence[str]) -> str:
    """Where a network is, for a message."""
    return f"at {running[-1]}" if running and running[-1] else "in forward()"


def line_of(error: BaseException) -> str:
    """The line of a network's own code that an error came from, as ``, net.py:12``.

    Nothing where it is PyTorch's, torchvision's or timm's.
    """
    found = ""
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        others = "site-packages" in path.parts or not {_OURS, _PYTHONS}.isdisjoint(path.parents)
        if path.is_file() and not others:
            found = f", {path.name}:{frame.lineno}"
    return found


def fitted(
    architecture: Architecture,
    shapes: Mapping[str, Shape],
    *,
    network: nn.Module | None = None,
    images: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The network of these tensors on the meta device.

    If its architecture has classes, there are as many as the network has outputs: the classifier
    may have been replaced since the network was built.

    Args:
        architecture: what it is called, and how it is built.
        shapes: of its tensors.
        network: the dense network, which is then copied and not built; left alone.
        images: how they are prepared, which says the size of those that a network of one's own
            is tried with.

    Raises:
        UserError: the tensors are not those of the architecture, or do not fit each other.
    """

    def dense() -> nn.Module:
        if network is None:
            return build_on_meta(architecture)
        copied = meta_copy(network)
        set_architecture(copied, architecture)
        return copied

    model = dense()
    fit_to_shapes(model, shapes)
    if is_own(architecture.name):
        set_preprocessing(model, images)
    image = example_input_for(model, "meta")
    try:
        found = output_shape(model, image)
    except UserError as error:
        if not is_own(architecture.name):
            raise
        raise UserError(
            f"{error}; it was tried with a {by(image.shape[1:])} image, and image_shape = "
            "(CHANNELS, HEIGHT, WIDTH) in its class says another one"
        ) from None
    if architecture.num_classes is None:
        channels, height, width = image.shape[1:]
        wanted = (len(image), *architecture.output_shape((channels, height, width)))
        if found != wanted:
            raise UserError(
                f"makes {by(found)} of images of {by(image.shape)}, and not {by(wanted)}"
            )
        return model
    if len(found) != 2:
        raise UserError("its output is not one row of logits for each image")
    classes = found[1]
    if classes != architecture.num_classes:
        architecture = Architecture(architecture.name, classes, architecture.args)
        model = dense()
        fit_to_shapes(model, shapes)
    if network is None and is_own(architecture.name):
        _check_not_wider(dense(), model, classes)
    return model


def _check_not_wider(dense: nn.Module, model: nn.Module, classes: int) -> None:
    """Refuse a network of one's own that was called with other arguments: nothing is ever added."""
    before, now = layer_widths(dense), layer_widths(model)
    for layer in now:
        made, held = before[layer][1], now[layer][1]
        if held > made and held != classes:
            raise UserError(
                f"{layer} has {held} filters and its class makes {made}: say what it is called "
                "with, as --model-arg width=24, or model.args in a configuration"
            )


def assign_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make ``tensors`` the parameters and buffers of ``model``, without a copy, ties kept.

    Floating-point buffers that are in no file get the type of the parameters, as
    ``model.to(dtype)`` gives it to them: half a network in half precision runs on no images.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    state = OrderedDict(tensors)
    # Versions of modules' formats, which tensors alone do not carry: these are of today.
    state._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(state, assign=True)
    for first, *others in names.values():
        for other in others:
            module, _, key = other.rpartition(".")
            setattr(model.get_submodule(module), key, model.get_parameter(first))
    kind = float_type(model)
    for name, buffer in list(model.named_buffers()):
        if name not in tensors and buffer.is_floating_point():
            module, _, key = name.rpartition(".")
            setattr(model.get_submodule(module), key, buffer.to(kind))


def fill_buffers(model: nn.Module, source: nn.Module) -> None:
    """Copy the buffers that are in no ``state_dict``, and so in no file, from another network.

    They keep the type that :func:`assign_tensors` gave them.
    """
    stored = model.state_dict()
    for name, buffer in list(model.named_buffers()):
        if name not in stored:
            module, _, key = name.rpartition(".")
            filled = source.get_buffer(name).to(buffer.dtype, copy=True)
            setattr(model.get_submodule(module), key, filled)


def float_type(model: nn.Module) -> torch.dtype:
    """The type that a network computes in: that of its first floating-point parameter."""
    kinds = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(kinds, torch.float32)


def few(names: Sequence[str], limit: int = 3) -> str:
    """The first few of many names, for an error message."""
    shown = ", ".join(names[:limit])
    return shown + (f", ... ({len(names)} in all)" if len(names) > limit else "")


def by(shape: Sequence[int]) -> str:
    """A shape as people write it: 64x3x7x7."""
    return "x".join(map(str, shape)) or "scalar"


def _fit_module(module: nn.Module, shapes: Mapping[str, Shape]) -> None:
    """Resize one module as its wanted tensors ask for; leave it where that makes no sense."""
    shape = shapes.get("weight", shapes.get("running_mean", ()))
    if any(0 in wanted for wanted in shapes.values()):
        return
    if isinstance(module, nn.Conv2d) and len(shape) == 4:
        _fit_convolution(module, shape)
    elif isinstance(module, nn.Linear) and len(shape) == 2:
        module.out_features, module.in_features = shape
        _resize(module, "weight", shape)
        _resize(module, "bias", shape[:1])
    elif isinstance(module, _BatchNorm | nn.GroupNorm) and len(shape) == 1:
        if isinstance(module, nn.GroupNorm):
            module.num_channels = shape[0]
        else:
            module.num_features = shape[0]
        for key in ("weight", "bias", "running_mean", "running_var"):
            _resize(module, key, shape)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(shape) == len(
        module.normalized_shape
    ):
        module.normalized_shape = shape
        for key in ("weight", "bias"):
            _resize(module, key, shape)
    # Other parameters (a scale per channel, a class token) only ever shrink.
    for key, wanted in shapes.items():
        old = getattr(module, key)
        known = isinstance(module, nn.Conv2d | nn.Linear | _BatchNorm) and key in _KNOWN
        if not known and len(wanted) == old.dim() and all(map(int.__le__, wanted, old.shape)):
            _resize(module, key, wanted)


def _fit_convolution(module: nn.Conv2d, shape: Shape) -> None:
    groups = module.groups
    depthwise = groups == module.in_channels == module.out_channels
    # With one filter left in each group a convolution in groups has become depthwise, and may
    # since have lost groups.
    if groups > 1 and shape[1] == 1 and (depthwise or shape[0] < groups):
        module.groups = module.in_channels = module.out_channels = shape[0]
    elif shape[0] % groups == 0:
        module.out_channels, module.in_channels = shape[0], shape[1] * groups
    inputs = module.in_channels // module.groups
    _resize(module, "weight", (module.out_channels, inputs, *module.kernel_size))
    _resize(module, "bias", (module.out_channels,))


def _resize(module: nn.Module, key: str, shape: Shape) -> None:
    old = getattr(module, key, None)
    if old is None or tuple(old.shape) == tuple(shape):
        return
    new = old.new_empty(shape)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(module, key, new)
