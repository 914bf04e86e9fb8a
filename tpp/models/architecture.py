"""Networks by name; every one of them carries its :class:`Architecture` with it."""

import copy
import difflib
import functools
import itertools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from tpp.common.errors import Note, UserError, reason_of
from tpp.common.imports import quick_imports
from tpp.common.own_code import is_own
from tpp.models import edsr
from tpp.models.cifar import CifarResNet, CifarVGG
from tpp.models.meta_runs import ShapesOnly
from tpp.models.mlp import LinearMLP
from tpp.models.own import own_network, own_shape, said_shape, says_shape
from tpp.models.plain import PlainConvNet, PlainMLP

_OWN_MODELS: dict[str, Callable[..., nn.Module]] = {
    **{
        f"cifar_resnet{depth}": functools.partial(CifarResNet, depth)
        for depth in (8, 14, 20, 32, 44, 56, 110)
    },
    **{f"cifar_vgg{depth}_bn": functools.partial(CifarVGG, depth) for depth in (16, 19)},
    "mlp7_linear": LinearMLP,
    "plain_mlp": PlainMLP,
    "plain_convnet": PlainConvNet,
}
# Those for MNIST.
_GRAY = ("mlp7_linear", "plain_mlp")


@dataclass(frozen=True)
class _ImageModel:
    """A network whose output is an image; it takes images of any size.

    Attributes:
        build: the network; has no argument ``num_classes``.
        output_shape: of an image (channels, height, width), and the network's arguments.
        side: height and width of the image to try it with.
    """

    build: Callable[..., nn.Module]
    output_shape: Callable[..., tuple[int, ...]]
    side: int


def _swinir(**args: Any) -> nn.Module:
    from tpp.models.swinir import SwinIR  # with timm

    return SwinIR(**args)


_IMAGE_MODELS = {
    "edsr": _ImageModel(edsr.EDSR, edsr.output_shape, side=48),
    "swinir_light": _ImageModel(_swinir, edsr.output_shape, side=48),
}
# Their auxiliary heads exist for training from scratch only and are no use to a finetuned
# network; saying init_weights out loud keeps torchvision from warning about its default.
_TORCHVISION_ARGS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}
# What torchvision sets in a network that it gives its published weights to, and not otherwise.
_PUBLISHED_ARGS: dict[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True},
    "inception_v3": {"transform_input": True},
}
# Before the names of timm's networks.
TIMM = "timm:"
# With these a constructor fetches weights or opens a file.
_LOADING_ARGS = ("weights", "pretrained", "checkpoint_path", "cache_dir")
# Several times what any network has; building one with a depth of millions would never end.
_MOST_MODULES = 5_000
# What most of a module's attributes are: in these, and in empty ones of those, there is no tensor.
_BARE = {type(None), bool, int, float, str}
_CONTAINERS = {OrderedDict, dict, set}
# What a file may say of its architecture. A checkpoint of unknown origin is built from it, and
# what is built has to stay small until the file's tensors have turned out to fit.
_MOST_CLASSES = 2**24
_LARGEST_ARG = 2**16
LARGEST_IMAGE = 4096
_MOST_ARGS = 1000


@dataclass(frozen=True)
class Architecture:
    """What :func:`build_model` needs to build a network again.

    Attributes:
        name: see :func:`build_model`.
        num_classes: number of outputs; None where the output is an image.
        args: further arguments of the network's constructor; plain data, ready for JSON.
    """

    name: str
    num_classes: int | None
    args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def output(self) -> str:
        """What comes out, in words."""
        return "images out" if self.num_classes is None else f"{self.num_classes} classes"

    def output_shape(self, image: tuple[int, int, int]) -> tuple[int, ...]:
        """Shape of what the network makes of one image (channels, height, width)."""
        if self.num_classes is None:
            return _IMAGE_MODELS[self.name].output_shape(image, **self.args)
        return (self.num_classes,)

    def to_dict(self) -> dict[str, Any]:
        """The architecture as plain data, ready for JSON."""
        return {"name": self.name, "num_classes": self.num_classes, "args": dict(self.args)}

    @classmethod
    def from_dict(cls, data: Any, *, source: str = "architecture") -> "Architecture":
        """Read what :meth:`to_dict` wrote; ``source`` names the origin in error messages."""
        if (
            not isinstance(data, dict)
            or set(data) != {"name", "num_classes", "args"}
            or not isinstance(data["name"], str)
            or not isinstance(data["num_classes"], int | None)
            or not isinstance(data["args"], dict)
        ):
            raise UserError(f'{source}: expected {{"name": ..., "num_classes": N, "args": {{}}}}')
        name, num_classes, args = data["name"], data["num_classes"], data["args"]
        if num_classes is not None and (
            not 1 <= num_classes <= _MOST_CLASSES or isinstance(num_classes, bool)
        ):
            raise UserError(f"{source}: no network has {num_classes} classes")
        if not _are_plain(args):
            raise UserError(f"{source}: the arguments of {name!r} are none that a network takes")
        return cls(name, num_classes, args)


def _are_plain(args: Mapping[str, Any]) -> bool:
    """Whether arguments from a file are few, and numbers in them of a size that makes sense."""
    waiting: list[Any] = [args]
    for _ in range(_MOST_ARGS):
        if not waiting:
            return True
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, int | float) and not -_LARGEST_ARG <= value <= _LARGEST_ARG:
            return False  # nor NaN
    return not waiting


def model_names() -> list[str]:
    """Every name that :func:`build_model` knows, timm's excepted."""
    with quick_imports():
        from torchvision import models

    return [*_OWN_MODELS, *_IMAGE_MODELS, *models.list_models(module=models)]


def own_models() -> dict[str, Callable[..., nn.Module]]:
    """The constructors of the networks that are neither torchvision's nor timm's, by name."""
    return {**_OWN_MODELS, **{name: found.build for name, found in _IMAGE_MODELS.items()}}


def gives_images(name: str) -> bool:
    """Whether the output of the network of that name is an image, and it has no classes."""
    return name in _IMAGE_MODELS


def build_model(name: str, num_classes: int | None, **args: Any) -> nn.Module:
    """Build a network with random weights.

    Args:
        name: ``cifar_resnet{8,14,20,32,44,56,110}``, ``cifar_vgg{16,19}_bn``, ``mlp7_linear``,
            ``plain_mlp``, ``plain_convnet``, a classification network of torchvision by its plain
            name (``resnet50``), one of timm as ``timm:NAME``, ``edsr``, whose output is an
            image, or ``FILE.py:NAME``, a class that :func:`tpp.models.own.take_up` was told.
        num_classes: number of outputs; None where the output is an image.
        args: further arguments of the network's constructor.

    Returns:
        The network, in training mode; its attribute ``architecture`` is an
        :class:`Architecture`.

    Raises:
        UserError: the name is unknown, the network does not take these arguments, or it has
            classes and is not told how many, or has none and is.
    """
    architecture = Architecture(name, num_classes, args)
    try:
        return _build(architecture)
    except UserError:
        raise
    except Exception as error:  # whatever a constructor raises for an argument it cannot use
        raise UserError(f"model {name!r} cannot be built with {args}: {reason_of(error)}") from None


def build_on_meta(architecture: Architecture) -> nn.Module:
    """Build a network without memory for its weights and without initialising them."""
    name, args = architecture.name, architecture.args
    try:
        with torch.device("meta"), ShapesOnly():
            return _build(architecture)
    except UserError:
        raise
    except Exception:
        # Either a mistake, which the next lines report, or one of the few networks of timm that
        # look at the value of a tensor while they are being built.
        try:
            with _parameters_on_meta():
                return _build(architecture).to("meta")
        except Exception as error:
            reason = reason_of(error)
            raise UserError(f"model {name!r} cannot be built with {args}: {reason}") from None


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Take a parameter's memory away when a module gets it.

    Buffers are small, and some constructors compute with tensors of their kind.
    """

    def emptied(_: nn.Module, name: str, parameter: nn.Parameter) -> Any:
        if parameter.is_meta:  # emptied before, and tied to another module
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(emptied)
    try:
        yield
    finally:
        handle.remove()


def meta_copy(model: nn.Module) -> nn.Module:
    """Copy a network without its weights, as :func:`plain_copy` does: every tensor is on meta."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = _emptied(parameter)
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    computed = _computed(model)
    for tensor in (*model.buffers(), *computed):
        memo[id(tensor)] = _emptied(tensor)
    return _plain_copy(model, memo, computed=bool(computed))


def _emptied(tensor: Tensor) -> Tensor:
    """A tensor like this one, without memory and without a history."""
    if is_lazy(tensor):
        raise UserError(
            "it has lazy layers (nn.Lazy...), whose widths nobody knows before it has seen images; "
            "say them"
        )
    # torch.empty_like is five times as slow where both are on meta.
    return tensor.detach().clone() if tensor.is_meta else tensor.detach().to("meta")


def plain_copy(model: nn.Module) -> nn.Module:
    """Copy a network as it was before Accelerate prepared it: without the autocast around it.

    Args:
        model: any network; left alone.

    Raises:
        UserError: it holds something that cannot be copied.
    """
    kept = {id(tensor): tensor.detach() for tensor in _computed(model)}
    return _plain_copy(model, kept, computed=bool(kept))


def _plain_copy(model: nn.Module, memo: dict[int, Any], *, computed: bool) -> nn.Module:
    """Copy a network with what stands in for its tensors, see ``copy.deepcopy``.

    Args:
        model: the network.
        memo: by a tensor's id what takes its place.
        computed: whether modules hold tensors that they compute.
    """
    # A module has a dozen dicts for hooks, empty nearly always, and slow to copy.
    for module in model.modules():
        for value in vars(module).values():
            if type(value) in _CONTAINERS and not value:
                memo[id(value)] = type(value)()
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:  # whatever objects of all kinds say that a network may hold
        raise UserError(
            f"{type(model).__name__} cannot be copied: {reason_of(error)}; take off it what is no "
            "part of it, such as what hooks have stored"
        ) from None
    if computed:
        _forget_computed(copied)
    for module in copied.modules():
        own = module.__dict__
        own.pop("_is_accelerate_prepared", None)
        forward = own.pop("_original_forward", None)
        if forward is None:
            continue
        own.pop("forward", None)
        if getattr(forward, "__func__", None) is not type(module).forward:
            own["forward"] = forward  # one that its user had put there
    return copied


def _forget_computed(model: nn.Module) -> None:
    """Let modules drop what they have computed once for all evaluations (timm's LeViT does): by
    convention train() does that, as the weights are then about to change.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module, mode in modes:
        module.training = mode


def _computed(model: nn.Module) -> list[Tensor]:
    """Tensors with a history that modules hold: activations that hooks have stored, weights that
    are computed from others before every run. PyTorch does not copy these.
    """
    return [
        tensor
        for module in model.modules()
        for key, value in module.__dict__.items()
        if key not in ("_parameters", "_buffers", "_modules")
        if type(value) not in _BARE and not (type(value) in _CONTAINERS and not value)
        for tensor in tree_leaves(value)
        if isinstance(tensor, Tensor) and not tensor.is_leaf
    ]


def set_architecture(model: nn.Module, architecture: Architecture | None) -> None:
    """Attach ``architecture`` to ``model``; it survives ``copy.deepcopy`` and is no parameter."""
    model.__dict__["architecture"] = architecture


def as_published(architecture: Architecture) -> tuple[Architecture, list[str]]:
    """The architecture of weights from elsewhere, as torchvision builds it for its published ones.

    Arguments that are given stay as they are.

    Returns:
        The architecture, and a note for the user on each argument that was added.
    """
    added = {
        key: value
        for key, value in _PUBLISHED_ARGS.get(architecture.name, {}).items()
        if key not in architecture.args
    }
    if not added:
        return architecture, []
    args = {**architecture.args, **added}
    notes = [
        f"{key} is taken to be {value}, as with torchvision's published weights; a configuration "
        f"with model.args.{key} says otherwise"
        for key, value in added.items()
    ]
    return Architecture(architecture.name, architecture.num_classes, args), notes


def architecture_of(model: nn.Module) -> Architecture | None:
    """The architecture that :func:`build_model` attached to ``model``, if it did."""
    return getattr(model, "architecture", None)


def input_shape(name: str, **args: Any) -> tuple[int, int, int]:
    """Shape (channels, height, width) of the images that a network expects, or is tried with.

    Raises:
        UserError: the arguments make no sense of it.
    """
    return _checked_shape(_input_shape(name, args), name)


def _checked_shape(shape: tuple[Any, ...], name: str) -> tuple[int, int, int]:
    whole = all(isinstance(side, int) and not isinstance(side, bool) for side in shape)
    if len(shape) != 3 or not whole or not 1 <= min(shape) <= max(shape) <= LARGEST_IMAGE:
        raise UserError(f"model {name!r}: takes no images of {shape} (channels, height, width)")
    channels, height, width = shape
    return channels, height, width


def _input_shape(name: str, args: Mapping[str, Any]) -> tuple[Any, ...]:
    if name.startswith(TIMM):
        _builder(name)
        import timm

        config = timm.get_pretrained_cfg(name.removeprefix(TIMM))
        channels, height, width = config.input_size if config else (3, 224, 224)
        size = args.get("img_size", (height, width))
        sides = size if isinstance(size, list | tuple) else (size, size)
        return args.get("in_chans", channels), *sides
    if name in _IMAGE_MODELS:
        side = _IMAGE_MODELS[name].side
        return args.get("channels", 3), side, side
    if is_own(name):
        return own_shape(name, args)
    default = 28 if name in _GRAY else 32 if name in _OWN_MODELS else 224
    size = args.get("image_size", default)
    return args.get("channels", 1 if name in _GRAY else 3), size, size


def set_preprocessing(model: nn.Module, preprocessing: Mapping[str, Any] | None) -> None:
    """Attach how images are prepared for ``model``, see :mod:`tpp.models.preparation`."""
    model.__dict__["preprocessing"] = None if preprocessing is None else dict(preprocessing)


def image_shape_for(model: nn.Module) -> tuple[int, int, int]:
    """Shape (channels, height, width) of what a network is counted, timed and traced with.

    Its preprocessing says it, if there is any; else its architecture; else the network itself, as
    its attribute ``image_shape``; else 3x224x224. A network whose output is an image takes ones
    that become as large as the preprocessing says.

    Raises:
        UserError: there are no such images.

    Warns:
        Note: nothing says it of a class of one's own.
    """
    architecture = architecture_of(model)
    said = said_shape(model) if architecture is None or is_own(architecture.name) else None
    shape = (3, 224, 224)
    if said is not None:
        shape = _checked_shape(said, type(model).__name__)
    elif architecture is not None:
        shape = input_shape(architecture.name, **architecture.args)
    prepared = getattr(model, "preprocessing", None) or {}
    channels, side = (prepared.get(key) for key in ("channels", "image_size"))
    for key, value in (("channels", channels), ("image_size", side)):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (whole and 1 <= value <= LARGEST_IMAGE):
            raise UserError(f"preprocessing: {key} is {value!r}: there are no such images")
    if side is not None:
        if architecture is not None and architecture.num_classes is None:
            side = max(side // architecture.output_shape((shape[0], 1, 1))[1], 1)
        shape = (shape[0], side, side)
    elif said is None and architecture is not None and _is_silent(architecture):
        line = (
            f"{architecture.name} does not say what images it takes, as image_shape = "
            f"(CHANNELS, HEIGHT, WIDTH) of its class; {'x'.join(map(str, shape))} is assumed"
        )
        warnings.warn(line, Note, stacklevel=1)  # one place, and so once
    return (channels or shape[0], *shape[1:])


def _is_silent(architecture: Architecture) -> bool:
    """Whether it is a class of one's own that does not say what images it takes."""
    name = architecture.name
    return is_own(name) and not says_shape(name, architecture.args)


def example_input_for(model: nn.Module, device: str = "cpu", *, side: int | None = None) -> Tensor:
    """One blank image for ``model``, (1, channels, height, width), float32.

    Its shape is that of :func:`image_shape_for`.

    Args:
        model: the network.
        device: ``meta`` for one without memory.
        side: height and width instead, in pixels.
    """
    channels, height, width = image_shape_for(model)
    return torch.zeros(1, channels, side or height, side or width, device=device)


def _build(architecture: Architecture) -> nn.Module:
    name, num_classes, args = architecture.name, architecture.num_classes, architecture.args
    _check_classes(name, num_classes)
    if any(not isinstance(key, str) or key.startswith(_LOADING_ARGS) for key in args):
        raise UserError(f"model {name!r}: weights are loaded from a file, not built with it")
    builder = _builder(name)
    classes = {} if num_classes is None else {"num_classes": num_classes}
    with _bounded():
        model = builder(**classes, **args)
    set_architecture(model, architecture)
    return model


def _check_classes(name: str, num_classes: Any) -> None:
    if gives_images(name):
        if num_classes is not None:
            raise UserError(
                f"model {name!r}: its output is an image, so it takes no num_classes, "
                f"not {num_classes}"
            )
    elif num_classes is None and is_own(name):
        raise UserError(f"model {name!r}: a network of one's own is one for classes")
    elif isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise UserError(f"model {name!r}: num_classes must be a positive number, not {num_classes}")


@contextmanager
def _bounded() -> Iterator[None]:
    """End the building of a network that has too many modules."""
    numbers = itertools.count(1)

    def registered(*_: Any) -> None:
        if next(numbers) > _MOST_MODULES:
            raise UserError(f"a network of more than {_MOST_MODULES:,} modules is not built")

    handle = register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


def _builder(name: str) -> Callable[..., nn.Module]:
    if name.startswith(TIMM):
        return _timm_builder(name.removeprefix(TIMM))
    if is_own(name):
        return own_network(name)
    if name in _OWN_MODELS:
        return _OWN_MODELS[name]
    if name in _IMAGE_MODELS:
        return _IMAGE_MODELS[name].build
    if name not in model_names():
        raise UserError(f"no model is called {name!r}; {_suggestion(name)}")
    from torchvision.models import get_model_builder

    builder = get_model_builder(name)
    return functools.partial(builder, weights=None, **_TORCHVISION_ARGS.get(name, {}))


def _timm_builder(name: str) -> Callable[..., nn.Module]:
    try:
        import timm
    except ImportError:
        raise UserError(f"model 'timm:{name}' needs timm: pip install timm") from None
    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}; {_nearest(name, timm.list_models())}")
    return functools.partial(timm.create_model, name, pretrained=False)


def _suggestion(name: str) -> str:
    try:
        import timm

        # With the tag of its weights, as in resnet18.a1_in1k, or without.
        if timm.is_model(name) and timm.get_pretrained_cfg(name):
            return f"timm has it: {TIMM}{name}"
    except (ImportError, RuntimeError, ValueError):  # not there, or no such tag
        pass
    return _nearest(name, model_names())


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else "see tpp.models.model_names()"
