"""Pruning methods by name, one small file each (or one for two that differ in when they act).

A new method is a new file with a subclass of :class:`~tpp.methods.base.Method` and its name;
nothing else changes.
"""

import difflib
import importlib
import pkgutil

from tpp.common.errors import UserError
from tpp.methods.base import Method

_METHODS: dict[str, type[Method]] = {}


def available_methods() -> dict[str, type[Method]]:
    """All methods by name."""
    if not _METHODS:
        for module in pkgutil.iter_modules(__path__):
            for item in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
                # A class without a name of its own is what several methods have in common.
                if isinstance(item, type) and issubclass(item, Method) and "name" in vars(item):
                    _METHODS[item.name] = item
    return _METHODS


def method_class(name: str) -> type[Method]:
    """The method called ``name``.

    Raises:
        UserError: there is none; names the nearest.
    """
    methods = available_methods()
    if name not in methods:
        near = difflib.get_close_matches(name, methods, n=1, cutoff=0.0)[0]
        raise UserError(
            f"method.name: unknown method {name!r}; did you mean {near!r}? "
            f"(there are: {', '.join(sorted(methods))})"
        )
    return methods[name]
