"""Networks by name; every one of them carries its :class:`Architecture` with it."""

import copy
import difflib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from tpp.errors import UserError
from tpp.models.cifar import CifarResNet, CifarVGG19
from tpp.models.mlp import LinearMLP

_OWN_MODELS: dict[str, Callable[..., nn.Module]] = {
    **{
        f"cifar_resnet{depth}": functools.partial(CifarResNet, depth)
        for depth in (8, 14, 20, 32, 44, 56, 110)
    },
    "cifar_vgg19_bn": CifarVGG19,
    "mlp7_linear": LinearMLP,
}
# Their auxiliary heads exist for training from scratch only and are no use to a finetuned
# network; saying init_weights out loud keeps torchvision from warning about its default.
_TORCHVISION_ARGS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}
_TIMM = "timm:"
# What constructors raise for an argument that they do not know or cannot use.
_BUILD_ERRORS = (TypeError, ValueError, AssertionError, RuntimeError)


@dataclass(frozen=True)
class Architecture:
    """What :func:`build_model` needs to build a network again.

    Attributes:
        name: see :func:`build_model`.
        num_classes: number of outputs.
        args: further arguments of the network's constructor; plain data, ready for JSON.
    """

    name: str
    num_classes: int
    args: Mapping[str, Any] = field(default_factory=dict)

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
            or not isinstance(data["num_classes"], int)
            or not isinstance(data["args"], dict)
        ):
            raise UserError(f'{source}: expected {{"name": ..., "num_classes": N, "args": {{}}}}')
        return cls(data["name"], data["num_classes"], data["args"])


def model_names() -> list[str]:
    """Every name that :func:`build_model` knows, timm's excepted."""
    return [*_OWN_MODELS, *torchvision.models.list_models(module=torchvision.models)]


def build_model(name: str, num_classes: int, **args: Any) -> nn.Module:
    """Build a network with random weights.

    Args:
        name: ``cifar_resnet{8,14,20,32,44,56,110}``, ``cifar_vgg19_bn``, ``mlp7_linear``, a
            classification network of torchvision by its plain name (``resnet50``), or one of
            timm as ``timm:NAME``.
        num_classes: number of outputs.
        args: further arguments of the network's constructor.

    Returns:
        The network, in training mode; its attribute ``architecture`` is an
        :class:`Architecture`.

    Raises:
        UserError: the name is unknown, or the network does not take these arguments.
    """
    architecture = Architecture(name, num_classes, args)
    try:
        return _build(architecture)
    except _BUILD_ERRORS as error:
        raise UserError(f"model {name!r} cannot be built with {args}: {error}") from None


def build_on_meta(architecture: Architecture) -> nn.Module:
    """Build a network without memory for its weights and without initialising them."""
    try:
        with torch.device("meta"):
            return _build(architecture)
    except _BUILD_ERRORS:
        # Either a mistake, which the next line reports, or one of the few networks of timm that
        # look at the value of a tensor while they are being built.
        model = build_model(architecture.name, architecture.num_classes, **architecture.args)
        return model.to("meta")


def meta_copy(model: nn.Module) -> nn.Module:
    """Copy a network without its weights: same modules, every tensor on the meta device."""
    memo: dict[int, Tensor] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def set_architecture(model: nn.Module, architecture: Architecture | None) -> None:
    """Attach ``architecture`` to ``model``; it survives ``copy.deepcopy`` and is no parameter."""
    model.__dict__["architecture"] = architecture


def architecture_of(model: nn.Module) -> Architecture | None:
    """The architecture that :func:`build_model` attached to ``model``, if it did."""
    return getattr(model, "architecture", None)


def input_shape(name: str, **args: Any) -> tuple[int, int, int]:
    """Shape (channels, height, width) of the images that a network expects."""
    if name.startswith(_TIMM):
        _builder(name)
        import timm

        config = timm.get_pretrained_cfg(name.removeprefix(_TIMM))
        channels, height, width = config.input_size if config else (3, 224, 224)
        size = args.get("img_size", (height, width))
        height, width = (size, size) if isinstance(size, int) else size
        return args.get("in_chans", channels), height, width
    default = 28 if name == "mlp7_linear" else 32 if name in _OWN_MODELS else 224
    size = args.get("image_size", default)
    return 1 if name == "mlp7_linear" else 3, size, size


def example_input_for(model: nn.Module) -> Tensor:
    """One blank image for ``model``, (1, channels, height, width), float32 on the CPU.

    Its shape is what the model's architecture expects, 1x3x224x224 where that is not known.
    """
    architecture = architecture_of(model)
    if architecture is None:
        return torch.zeros(1, 3, 224, 224)
    return torch.zeros(1, *input_shape(architecture.name, **architecture.args))


def _build(architecture: Architecture) -> nn.Module:
    name, num_classes, args = architecture.name, architecture.num_classes, architecture.args
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise UserError(f"model {name!r}: num_classes must be a positive number, not {num_classes}")
    if not args.keys().isdisjoint({"weights", "pretrained"}):
        raise UserError(f"model {name!r}: weights are loaded from a file, not built with it")
    model = _builder(name)(num_classes=num_classes, **args)
    set_architecture(model, architecture)
    return model


def _builder(name: str) -> Callable[..., nn.Module]:
    if name.startswith(_TIMM):
        return _timm_builder(name.removeprefix(_TIMM))
    if name in _OWN_MODELS:
        return _OWN_MODELS[name]
    if name not in model_names():
        raise UserError(f"no model is called {name!r}; {_nearest(name, model_names())}")
    builder = torchvision.models.get_model_builder(name)
    return functools.partial(builder, weights=None, **_TORCHVISION_ARGS.get(name, {}))


def _timm_builder(name: str) -> Callable[..., nn.Module]:
    try:
        import timm
    except ImportError:
        raise UserError(f"model 'timm:{name}' needs timm: pip install timm") from None
    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}; {_nearest(name, timm.list_models())}")
    return functools.partial(timm.create_model, name, pretrained=False)


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else "see tpp.models.model_names()"
