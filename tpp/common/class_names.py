"""Which output of a network is which class folder."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from tpp.common.errors import UserError, printable

ORDERS = ("names", "text", "numbers")
_SHOWN = 4


class Labels(NamedTuple):
    """Where each class folder's class is among a network's outputs.

    Attributes:
        outputs: of each folder, in the order of the folders.
        note: what a reader of the score should know; None where the names are the same.
    """

    outputs: list[int]
    note: str | None


def match_classes(
    folders: Sequence[str],
    outputs: int,
    names: Sequence[str] | None,
    order: str | None = None,
    *,
    file: str,
    place: str,
) -> Labels:
    """Find the output of each class folder by its name, or by its place where that is sure.

    Names are the same if they differ in case, spaces, hyphens and underscores only, or are the same
    numbers; folders may be some of the classes only. Where the folders are 0 to n-1 and the
    network's classes have other names, or none that are known, the numbers are the outputs' places.
    Folders with names of a network whose names are not known are in the order of their names, as
    torchvision's ImageFolder has it.

    Args:
        folders: names of the class folders, sorted as text.
        outputs: how many classes the network tells apart.
        names: of the outputs, in order; None where the file does not say.
        order: ``text`` or ``numbers``: the folders in this order are the outputs, whatever they
            are called; ``names`` or None: see above.
        file, place: of the network and of the folders, for messages.

    Raises:
        UserError: there are more folders than outputs, or no sure way to match them.
    """
    if order not in (None, *ORDERS):
        raise UserError(f"class order must be one of {', '.join(ORDERS)}, not {order!r}")
    numbers = _numbers(folders)
    if order in ("text", "numbers"):
        _as_many(folders, outputs, file, place)
        if order == "numbers" and numbers is None:
            raise UserError(f"{place}: not all class folders are numbers: {few(folders)}")
        return Labels(_ranks(numbers) if order == "numbers" else [*range(outputs)], None)
    if names is not None:
        return _by_name(folders, names, file, place)
    _as_many(folders, outputs, file, place)
    if numbers is None or _ranks(numbers) == [*range(outputs)]:
        what = f"class k is the k-th folder by name ({few(folders)})"
        return Labels([*range(outputs)], f"{file} does not name its classes: {what}")
    raise UserError(
        f"{file} does not name its classes, and the class folders of {place} are numbers: sorted "
        f"as text ({few(folders)}), as torchvision's ImageFolder has them in training, or as "
        f"numbers ({few(sorted(folders, key=int))}), as in ImageNetV2? say --class-order text or "
        "--class-order numbers"
    )


def _by_name(folders: Sequence[str], names: Sequence[str], file: str, place: str) -> Labels:
    where = {name: output for output, name in enumerate(names)}
    if len(where) == len(names) and all(folder in where for folder in folders):
        found = [where[folder] for folder in folders]
        return Labels(found, _subset(folders, names, place))
    for alike in (_plain, _number):
        keys, wanted = [*map(alike, names)], [*map(alike, folders)]
        if None in keys or None in wanted or len({*keys}) < len(keys):
            continue
        if len({*wanted}) == len(wanted) and {*wanted} <= {*keys}:
            found = [keys.index(key) for key in wanted]
            pair = next((f, names[o]) for f, o in zip(folders, found, strict=True) if f != names[o])
            said = f"class folder {printable(pair[0])} is taken for {printable(pair[1])}, and so on"
            also = _subset(folders, names, place)
            return Labels(found, f"{also}; {said}" if also else said)
    numbers = _numbers(folders)
    # Names that are numbers too would be one way to read the folders, and places another.
    if numbers is not None and sorted(numbers) == [*range(len(names))] and _numbers(names) is None:
        first = sorted(folders, key=int)[0]
        said = f"class folder {first} is {printable(names[0])}, and so on"
        return Labels(numbers, f"the class folders are taken for places among the classes: {said}")
    known = {*map(_plain, names)}
    unknown = [folder for folder in folders if _plain(folder) not in known]
    why = f"no class is called {printable(unknown[0])}" if unknown else "two have one name"
    raise UserError(
        f"the classes of {file} are {few(names)}, the class folders of {place} {few(folders)}: "
        f"{why}; rename the "
        f"folders, or, if there are as many in the same order, say --class-order text or numbers"
    )


def _as_many(folders: Sequence[str], outputs: int, file: str, place: str) -> None:
    if len(folders) != outputs:
        raise UserError(
            f"{file} tells {outputs} classes apart, {place} holds {len(folders)} class folders"
        )


def _subset(folders: Sequence[str], names: Sequence[str], place: str) -> str | None:
    if len(folders) == len(names):
        return None
    return f"{place} holds {len(folders)} of the {len(names)} classes, which is told from all"


def _numbers(names: Sequence[str]) -> list[int] | None:
    """The numbers that all names are, each another one; None where they are not."""
    found = [number for name in names if (number := _number(name)) is not None]
    return found if len({*found}) == len(names) else None


def _number(name: str) -> int | None:
    return int(name) if re.fullmatch(r"[0-9]{1,9}", name) else None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.strip()).casefold()


def _ranks(numbers: Sequence[int] | None) -> list[int]:
    """The place of each number among them."""
    assert numbers is not None
    place = {number: rank for rank, number in enumerate(sorted(numbers))}
    return [place[number] for number in numbers]


def note_on_order(names: Any, folders: Sequence[str], file: str) -> str | None:
    """What to know where as many outputs of a network have other names than the class folders.

    Args:
        names: what its file says; None or anything else where it does not.
        folders: names of the class folders, sorted as text.
        file: with the key that names it, for the note.
    """
    if not isinstance(names, list) or len(names) != len(folders) or names == folders:
        return None
    return (
        f"{file} is of the classes {few(names)}, the class folders are {few(folders)}: its outputs "
        "are taken for them in this order"
    )


def few(names: Sequence[str]) -> str:
    """The first of some names, and how many there are."""
    shown = ", ".join(printable(str(name)) for name in names[:_SHOWN])
    return f"{shown}, ... ({len(names)})" if len(names) > _SHOWN else shown
