"""What docstrings say of settings: they are the only place where a key's meaning is written.

Beside Google's ``Attributes:`` section, in which a unit may stand behind a name,

    Attributes:
        image_size (pixels): side of the square that the network sees.

a class of settings may have two more: ``Shorthands:``, keys that are written out into others before
the class sees them, each with its type in the place of the unit, and ``Example:``, a mapping in
YAML that the class accepts, or several with empty lines between them.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_HEADING = re.compile(r"(Attributes|Shorthands|Example|Raises|Returns|Args)\b[^:]*:")
_NAMES = re.compile(r"([A-Za-z_]\w*(?:, [A-Za-z_]\w*)*)(?: \(([^()]+)\))?: *(.*)")
_ROLE = re.compile(r":\w+:`~?(?:[\w.]*\.)?([^`]+)`")
_MATH = re.compile(r":math:`([^`]+)`")
_PAGE = re.compile(r"`?\bdocs/([\w-]+\.md)\b`?")


@dataclass(frozen=True)
class Explained:
    """What is said of one key.

    Attributes:
        text: its meaning, as a docstring has it.
        note: what stands in brackets behind its name, the unit or the type.
    """

    text: str
    note: str | None = None


@dataclass
class Docstring:
    """The parts of a docstring of a class of settings.

    Attributes:
        paragraphs: before the first section.
        attributes, shorthands: by key; of what has no attributes, its arguments.
        examples: YAML, each a mapping.
    """

    paragraphs: list[str] = field(default_factory=list)
    attributes: dict[str, Explained] = field(default_factory=dict)
    shorthands: dict[str, Explained] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)


def parse(text: str | None) -> Docstring:
    """Take a docstring apart; what is in sections of other names is left out."""
    found, heading = Docstring(), ""
    blocks: dict[str, list[str]] = {"": []}
    for line in inspect.cleandoc(text or "").splitlines():
        if match := _HEADING.fullmatch(line):
            heading = match[1]
        blocks.setdefault(heading, [])
        if not match:
            blocks[heading].append(line)
    found.paragraphs = [" ".join(one.split()) for one in _paragraphs(blocks[""])]
    found.attributes = dict(_entries(blocks.get("Attributes", blocks.get("Args", []))))
    found.shorthands = dict(_entries(blocks.get("Shorthands", [])))
    found.examples = [*_paragraphs(blocks.get("Example", []))]
    return found


def of_class(settings: type) -> Docstring:
    """A class's docstring, with the attributes of those that it inherits from."""
    own = parse(settings.__doc__)
    for base in settings.__mro__[1:]:
        if base.__module__.split(".")[0] not in ("pydantic", "builtins"):
            inherited = parse(vars(base).get("__doc__"))
            own.attributes = {**inherited.attributes, **own.attributes}
            own.shorthands = {**inherited.shorthands, **own.shorthands}
    return own


def as_markdown(text: str) -> str:
    """A docstring's text as the page has it: plain code marks, links to pages, YAML's null."""
    text = _MATH.sub(r"`\1`", text)
    text = _ROLE.sub(r"`\1`", text).replace("``", "`")
    text = _PAGE.sub(r"[docs/\1](\1)", text)
    parts = text.split("`")  # every second one is code
    parts[::2] = [re.sub(r"\b(None|null)\b", "``null``", part) for part in parts[::2]]
    return "`".join(parts).replace("``", "`")


def as_sentence(text: str) -> str:
    """The same with a capital at its beginning, unless code stands there."""
    return text[:1].upper() + text[1:]


def _paragraphs(lines: list[str]) -> Iterator[str]:
    for part in re.split(r"\n\s*\n", inspect.cleandoc("\n" + "\n".join(lines))):
        if part.strip():
            yield part


def _entries(lines: list[str]) -> Iterator[tuple[str, Explained]]:
    for part in re.split(r"\n(?! )", inspect.cleandoc("\n" + "\n".join(lines))):
        match = _NAMES.fullmatch(" ".join(part.split()))
        if match is not None:
            for name in match[1].split(", "):
                yield name, Explained(match[3], match[2])
