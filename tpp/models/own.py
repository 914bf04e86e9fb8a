"""Networks of a class of the user's own, named as ``FILE.py:NAME``.

Files only name them, and without the folder (``net.py:MyNet``). The class comes from the command
line or from the configuration that it names, see :func:`take_up`, or as a network in memory.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tpp.common.errors import UserError, reason_of
from tpp.common.own_code import load_own, short_name

IMAGE_SHAPE = "image_shape"
# Of classes that others publish: their name says more than that of the file that they are in.
_PUBLISHED = ("torch", "torchvision", "timm", "tpp")


@dataclass(frozen=True)
class OwnNetwork:
    """What builds networks of the user's own.

    Attributes:
        name: as files have it.
        place: the Python file.
        build: the class or function.
        images: see :func:`take_up`.
    """

    name: str
    place: Path
    build: Callable[..., nn.Module]
    images: tuple[int, int, int] | None = None

    @property
    def takes_classes(self) -> bool:
        """Whether it is told how many classes there are, as ``num_classes``."""
        parameters = inspect.signature(self.build).parameters
        return "num_classes" in parameters or any(
            parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
        )

    def __call__(self, num_classes: int | None = None, **args: Any) -> nn.Module:
        """A network with random weights.

        Args:
            num_classes: left out where it takes none.
            args: all others.

        Raises:
            UserError: it takes other arguments, or gives no network.
        """
        if self.takes_classes:
            args["num_classes"] = num_classes
        signature = inspect.signature(self.build)
        try:
            signature.bind(**args)
        except TypeError as error:
            given = ", ".join(signature.parameters) or "no arguments"
            raise UserError(
                f"model {self.name!r}: {reason_of(error)}; it takes {given}, and model.args says "
                "what they are"
            ) from None
        model = self.build(**args)
        if not isinstance(model, nn.Module):
            raise UserError(f"model {self.name!r}: gives {_article(model)}, not a torch.nn.Module")
        shape = getattr(self.build, IMAGE_SHAPE, None)
        if shape is not None and getattr(model, IMAGE_SHAPE, None) is None:
            model.__dict__[IMAGE_SHAPE] = shape  # said of a function
        return model


_NAMED: dict[str, OwnNetwork] = {}


def take_up(text: str, key: str, images: tuple[int, int, int] | None = None) -> str:
    """Make a network of the user's own known to this process, which runs its file.

    Args:
        text: ``FILE.py:NAME``, of the command line or of a configuration that it names.
        key: where it stands, for messages.
        images: shape (channels, height, width) of those that it is for, where it does not say
            that itself.

    Returns:
        Its name in files.

    Raises:
        UserError: there is no such file or class, or another one of the same name is known.
    """
    try:
        target, place = load_own(text)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    name = short_name(text)
    other_class = inspect.isclass(target) and not issubclass(target, nn.Module)
    if other_class or isinstance(target, nn.Module) or not callable(target):
        raise UserError(
            f"{key}: {text} is {'another class' if other_class else _article(target)}; name a "
            "class that derives from torch.nn.Module, or a function that returns such a network"
        )
    known = _NAMED.get(name)
    if known is not None and known.place.read_bytes() != place.read_bytes():
        raise UserError(
            f"{key}: {place} and {known.place} are not alike, and checkpoints call both {name}; "
            "rename one"
        )
    _NAMED[name] = OwnNetwork(name, place, target, images)
    return name


def stand_in(said: str, named: str) -> None:
    """Let a class that was taken up stand for what a file calls by another name."""
    _NAMED.setdefault(said, _NAMED[named])


def own_network(name: str) -> OwnNetwork:
    """What builds the networks of that name.

    Raises:
        UserError: nobody has named such a class here.
    """
    if name not in _NAMED:
        raise UserError(
            f"the network is {name}, a class of somebody's own, which no file brings along: name "
            "yours, with --model FILE.py:CLASS, or tpp.load_model(PATH, network=CLASS())"
        )
    return _NAMED[name]


def is_known(name: str) -> bool:
    """Whether a class of that name was taken up here."""
    return name in _NAMED


def own_name(network: nn.Module) -> str | None:
    """What files call a network in memory; None for a class that others publish."""
    kind = type(network)
    if kind.__module__.partition(".")[0] in _PUBLISHED:
        return None
    try:
        file = Path(inspect.getfile(kind)).name
    except (OSError, TypeError):  # typed in by hand
        file = ""
    return f"{file if file.endswith('.py') else 'notebook.py'}:{kind.__name__}"


def said_shape(subject: Any) -> tuple[Any, ...] | None:
    """Shape (channels, height, width) of the images that a class or network says it takes."""
    shape = getattr(subject, IMAGE_SHAPE, None)
    return tuple(shape) if isinstance(shape, list | tuple) else None


def says_shape(name: str, args: Mapping[str, Any]) -> bool:
    """Whether anybody says what :func:`own_shape` returns."""
    own = _NAMED.get(name)
    return "image_size" in args or bool(own and (said_shape(own.build) or own.images))


def own_shape(name: str, args: Mapping[str, Any]) -> tuple[Any, ...]:
    """The same by name; where nobody says it, of the arguments, or else 3x224x224."""
    own = _NAMED.get(name)
    shape = own and (said_shape(own.build) or own.images)
    size = args.get("image_size", 224)
    return shape or (args.get("channels", 3), size, size)


def _article(thing: object) -> str:
    kind = type(thing).__name__
    return f"an object of {kind}" if thing is not None else "nothing"
