"""Pruning methods by name, one small file each (or one for two that differ in when they act).

A new method is a new file with a subclass of :class:`~tpp.methods.base.Method` and its name;
nothing else changes. It may lie anywhere, too, and be named as ``FILE.py:CLASS``.
"""

import functools

from tpp.common.errors import UserError
from tpp.common.own_code import is_own, load_own
from tpp.common.registry import classes_in, pick
from tpp.methods.base import Method

_BASE = f"{Method.__module__}.{Method.__name__}"


@functools.cache
def available_methods() -> dict[str, type[Method]]:
    """All methods by name."""
    return classes_in(__name__, __path__, Method, "name")


def method_class(name: str) -> type[Method]:
    """The method called ``name``, or the class that ``FILE.py:CLASS`` names: the file is run.

    Raises:
        UserError: there is none; names the nearest.
    """
    if is_own(name):
        return _own(name)
    return pick(available_methods(), name, "method.name: unknown method")


def _own(text: str) -> type[Method]:
    """A method of the user's own.

    Raises:
        UserError: there is no such class, or it is no method, or has no name of its own.
    """
    try:
        found, _ = load_own(text)
    except UserError as error:
        raise UserError(f"method.name: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(f"method.name: {text}: expected a class that derives from {_BASE}")
    name, title = getattr(found, "name", None), getattr(found, "title", None)
    if not (isinstance(name, str) and name and isinstance(title, str) and title):
        raise UserError(f"method.name: {text}: give the class a name and a title, both strings")
    if name in available_methods():
        raise UserError(f"method.name: {text}: there is a method {name!r} already; rename it")
    return found
