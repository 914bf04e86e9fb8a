"""Classes that are found by being there: one file each in a package."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from typing import TypeVar

from tpp.common.errors import UserError

T = TypeVar("T")


def classes_in(
    package: str, path: Iterable[str], base: type[T], attribute: str
) -> dict[str, type[T]]:
    """The subclasses of ``base`` in a package's modules, by the name that each gives itself.

    Args:
        package: its dotted name.
        path: its ``__path__``.
        base: what they have in common.
        attribute: holds the name; a class without one of its own is what several have in common.
    """
    found = {}
    for module in pkgutil.iter_modules(path):
        for item in vars(importlib.import_module(f"{package}.{module.name}")).values():
            if isinstance(item, type) and issubclass(item, base) and attribute in vars(item):
                found[getattr(item, attribute)] = item
    return found


def pick(known: Mapping[str, T], name: str, what: str) -> T:
    """The one called ``name``.

    Raises:
        UserError: there is none; ``what`` says of what, and the nearest is named.
    """
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise UserError(
            f"{what} {name!r}; did you mean {near!r}? (there are: {', '.join(sorted(known))})"
        )
    return known[name]
