"""Which class a label stands for, where labels are text that others wrote beside their images."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpp.common.errors import UserError, printable
from tpp.common.reading import parse_json, read_text

_WHOLE = re.compile(r"(-?[0-9]{1,18})(\.0+)?")
_SHOWN = 60


@dataclass(frozen=True)
class ClassNames:
    """The classes of a data set in their order, from a file.

    Attributes:
        file: where they are from.
        names: of the classes; a class's label in training is its place here.
        numbers: the place of the class that a number in the data stands for.
    """

    file: Path
    names: list[str]
    numbers: dict[int, int]


def read_class_names(path: Path) -> ClassNames:
    """Read class names: one in each line, or JSON.

    In lines and in a JSON list the first class has the number 0. A JSON object gives each class its
    number, in either direction: ``{"1": "cat", "2": "dog"}`` or ``{"cat": 1, "dog": 2}``; of
    ``{"0": ["n01440764", "tench"], ...}`` the first of each is the name.

    Raises:
        UserError: the file cannot be read, names a class twice, or is of another form.
    """
    text = read_text(path, "the class names").removeprefix("\ufeff")
    if text.lstrip()[:1] in ("[", "{"):
        pairs = _from_json(parse_json(text, str(path)), path)
    else:
        lines = [line.strip() for line in text.rstrip().split("\n")]
        pairs = list(enumerate(lines))
    names = [name for _, name in pairs]
    for place, name in enumerate(names):
        where = f"{path}, line {place + 1}" if text.lstrip()[:1] not in ("[", "{") else f"{path}"
        if not name.strip() or not name.isprintable():
            raise UserError(f"{where}: {name!r} is no name of a class; expected one name a line")
    if len({*names}) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise UserError(f"{path}: names class {twice!r} twice")
    return ClassNames(path, names, {number: place for place, (number, _) in enumerate(pairs)})


def _from_json(said: Any, path: Path) -> list[tuple[int, str]]:
    """Number and name of each class, by number."""
    pairs: list[tuple[Any, Any]] = list(enumerate(said)) if isinstance(said, list) else []
    if isinstance(said, dict):
        pairs = list(said.items())
        if all(isinstance(number, int) for number in said.values()):
            pairs = [(number, name) for name, number in pairs]
    found: list[tuple[int, str]] = []
    for number, name in pairs:
        name = name[0] if isinstance(name, list) and name else name
        whole = _WHOLE.fullmatch(str(number)) if not isinstance(number, bool) else None
        if whole is None or not isinstance(name, str):
            found = []
            break
        found.append((int(whole[1]), name.strip()))
    if not found or len({number for number, _ in found}) < len(found):
        raise UserError(
            f"{path}: expected class names: a line for each, a JSON list, or a JSON object such as "
            '{"0": "cat", "1": "dog"}'
        )
    return sorted(found)


def label_text(said: Any) -> str | None:
    """A label as text, whole numbers as such whatever they look like; None: it is no label."""
    if isinstance(said, bool) or not isinstance(said, str | int | float):
        return None
    text = str(said).strip()
    whole = _WHOLE.fullmatch(text)
    if whole is not None:
        return str(int(whole[1]))
    return text if text and text.isprintable() and not isinstance(said, float) else None


def in_order(labels: Iterable[str]) -> list[str]:
    """Different labels, all numbers by size, others by text."""
    found = sorted(labels)
    return sorted(found, key=int) if all(map(_WHOLE.fullmatch, found)) else found


def arrange(
    labels: Sequence[str], names: ClassNames | None, where: Callable[[str], str]
) -> tuple[list[str], list[int]]:
    """The classes of a set of images, and the place of each label among them.

    Without class names, labels that are numbers have to be 0 to n-1, and are the classes in this
    order; others are names, in the order of text.

    Args:
        labels: the different labels in the data, as :func:`label_text` has them.
        names: of the classes, if they are known.
        where: an image with a label, for messages.

    Raises:
        UserError: a label is no class.
    """
    numbers = [label for label in labels if _WHOLE.fullmatch(label)]
    others = [label for label in labels if not _WHOLE.fullmatch(label)]
    if names is None:
        if numbers and others:
            raise UserError(
                f"{where(others[0])}: its label is {_short(others[0])}, that of {where(numbers[0])}"
                f" {numbers[0]}: expected all numbers or all names"
            )
        classes = in_order(labels)
        if numbers:
            _check_complete([*map(int, classes)], where)
        places = {label: place for place, label in enumerate(classes)}
        return classes, [places[label] for label in labels]
    # Classes may be called by numbers, such as 1 to 10.
    by_name = bool(others) or all(_WHOLE.fullmatch(name) for name in names.names)
    by_label = _canonical(names) if by_name else {str(n): p for n, p in names.numbers.items()}
    found = []
    for label in labels:
        place = by_label.get(label)
        if place is None:
            raise UserError(
                f"{where(label)}: its label {_short(label)} is no class of {names.file}, "
                f"{_known(names, by_name=by_name)}"
            )
        found.append(place)
    return names.names, found


def _canonical(names: ClassNames) -> Mapping[str, int]:
    return {label_text(name) or name: place for place, name in enumerate(names.names)}


def _known(names: ClassNames, *, by_name: bool) -> str:
    if by_name:
        shown = ", ".join(map(_short, names.names[:3])) + ", ..." * (len(names.names) > 3)
        return f"which names {len(names.names):,} classes: {shown}"
    numbers = sorted(names.numbers)
    return f"whose {len(numbers):,} classes have the numbers {numbers[0]} to {numbers[-1]}"


def _check_complete(numbers: list[int], where: Callable[[str], str]) -> None:
    """Check that sorted numbers are those of classes that are counted from 0."""
    if numbers[0] < 0:
        raise UserError(f"{where(str(numbers[0]))}: its label {numbers[0]} is no class")
    missing = next((n for n, label in enumerate(numbers) if n != label), None)
    if missing is not None:
        raise UserError(
            f"{where(str(numbers[missing]))}: its label is {numbers[missing]}, and no image has "
            f"{missing}: classes are counted from 0, unless data.class_names gives a file that "
            "says what each number is"
        )


def _short(text: str) -> str:
    return printable(repr(text), _SHOWN)
