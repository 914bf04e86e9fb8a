"""Pruning methods by name, one small file each (or one for two that differ in when they act).

A new method is a new file with a subclass of :class:`~tpp.methods.base.Method` and its name;
nothing else changes.
"""

import functools

from tpp.common.registry import classes_in, pick
from tpp.methods.base import Method


@functools.cache
def available_methods() -> dict[str, type[Method]]:
    """All methods by name."""
    return classes_in(__name__, __path__, Method, "name")


def method_class(name: str) -> type[Method]:
    """The method called ``name``.

    Raises:
        UserError: there is none; names the nearest.
    """
    return pick(available_methods(), name, "method.name: unknown method")
