"""Whole networks, as ``torch.save(model, PATH)`` pickles them: their tensors without their classes.

Such a file names the class of every module and says what is in it. Here each class that it names
is replaced by an empty one that keeps what it is told: nothing is imported, looked up or called
for it, so that it makes no difference whether its classes are here. A network's tensors are then
read off what every ``nn.Module`` keeps. A file that wants anything called is refused.
"""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpp.common.errors import UserError

_PARTS = ("_parameters", "_buffers", "_modules")
_UNSAVED = "_non_persistent_buffers_set"
# A network may hold a module in several places; a file that holds one in too many is a bomb.
_MOST_MODULES = 100_000
_DEEPEST = 50
# How pickles of protocol 2, which torch.save writes, spell empty bytes: called without anything.
_NO_BYTES = "builtins.bytes"


class WantsCallError(Exception):
    """A file wants something called.

    Attributes:
        called: its name.
    """

    def __init__(self, called: str) -> None:
        super().__init__(called)
        self.called = called


class _NotCalled(type):
    """The type of classes of which objects are made, as pickle does it, but not by calling them."""

    def __call__(cls, *_: Any) -> Any:
        raise WantsCallError(cls.stands_for)  # type: ignore[attr-defined]


class Remains(metaclass=_NotCalled):
    """Takes the place of an object of whatever class, and keeps its state.

    Attributes:
        stands_for: the name of the class whose place it takes.
        state: what the file says of it.
    """

    stands_for = ""
    state: Any = None

    def __new__(cls, *_: Any) -> "Remains":  # noqa: D102
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class WholeNetwork(OrderedDict[str, Tensor]):
    """A network's ``state_dict``, read off a pickled network.

    Attributes:
        of: the name of its class.
    """

    of = ""


def remains_of(path: Path) -> list[Any]:
    """A stand-in for each class that a file names, as torch.serialization.safe_globals takes them.

    Args:
        path: a file of torch.save in its zip format.
    """
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    kept = [(_NotCalled("Remains", (Remains,), {"stands_for": name}), name) for name in names]
    return [(_no_bytes, name) if name == _NO_BYTES else (stands, name) for stands, name in kept]


def _no_bytes(*given: Any) -> bytes:
    if given:
        raise WantsCallError(_NO_BYTES)
    return b""


def networks_in(data: Any, source: str) -> tuple[Any, int]:
    """What a file holds with a :class:`WholeNetwork` in the place of each network.

    Objects beside them that are no networks stay as they are, and are nothing to anybody.

    Args:
        data: what was read with :func:`remains_of`; it is changed.
        source: the file, for errors.

    Returns:
        The data, and how many networks are in it.

    Raises:
        UserError: a network holds modules in too many places, or something else as a module.
    """
    if _is_network(data):
        return _network(data, source), 1
    found, seen, waiting = 0, set(), [data]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            for key, inner in value.items():
                if _is_network(inner):
                    value[key] = _network(inner, source)
                    found += 1
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value
    return data, found


def _is_network(value: Any) -> bool:
    """Whether it is the remains of an ``nn.Module``, by what each of these keeps."""
    state = value.state if isinstance(value, Remains) else None
    return isinstance(state, dict) and all(isinstance(state.get(part), dict) for part in _PARTS)


def _network(remains: Remains, source: str) -> WholeNetwork:
    tensors = WholeNetwork(_tensors(remains, source))
    tensors.of = remains.stands_for
    return tensors


def _tensors(network: Remains, source: str) -> Iterator[tuple[str, Tensor]]:
    """A network's named tensors, in the order of its ``state_dict``."""
    waiting, modules = [("", network)], 0
    while waiting:
        prefix, module = waiting.pop()
        modules += 1
        if modules > _MOST_MODULES or prefix.count(".") > _DEEPEST:
            raise UserError(f"{source}: its network holds modules in too many places")
        unsaved = module.state.get(_UNSAVED)
        unsaved = unsaved if isinstance(unsaved, set) else set()
        own = {**module.state["_parameters"], **module.state["_buffers"]}
        for name, tensor in own.items():
            if isinstance(tensor, Tensor) and name not in unsaved:
                yield f"{prefix}{name}", tensor
        children = [(f"{prefix}{name}.", m) for name, m in module.state["_modules"].items() if m]
        if not all(_is_network(child) for _, child in children):
            raise UserError(f"{source}: {prefix or 'its network '}holds a module that is none")
        waiting += reversed(children)
