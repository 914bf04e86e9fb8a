"""A key of the page of settings, for a terminal: nothing of a run is imported for it."""

import difflib
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from tpp.common.errors import UserError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
OPTION = "--help-settings"
_WIDEST = 100
_HEADING = re.compile(r"(#{2,4}) (.+)")
_KEY = re.compile(r"`([^`]+)`(?: \((.+)\))?")
_SAME = re.compile(r"Its keys are those of \[`([^`]+)`\]")
_LINK = re.compile(r"\[([^\]]+)\]\([^)]+\)")


@dataclass
class _Block:
    """A heading of the page and what stands below it.

    Attributes:
        heading: as a terminal shows it.
        names: what it may be asked for by.
        is_key: whether it is of one key, and not of a section.
        text: paragraphs, in Markdown.
    """

    heading: str
    names: list[str]
    is_key: bool
    text: list[str] = field(default_factory=list)


def show_settings(asked: str, way: str = OPTION) -> None:
    """Print what the page says of a key, of a section or of what a pattern matches.

    Args:
        asked: a key with dots, its beginning, its end (``crop_mode``), or a shell-style glob;
            empty for all sections with the names of their keys.
        way: what the user wrote before that, which messages name.

    Raises:
        UserError: nothing has that name, with what is near; or there is no page.
    """
    blocks = _read(PAGE, way)
    width = min(_WIDEST, shutil.get_terminal_size().columns)
    lines = _in_full(_find(blocks, asked, way), width) if asked else _overview(blocks, width, way)
    print("\n".join(lines))


def _read(path: Path, way: str) -> list[_Block]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{way}: {path}: {error.strerror}") from None
    blocks: list[_Block] = []
    paragraph: list[str] = []
    for line in [*lines, ""]:
        heading = _HEADING.fullmatch(line)
        if not heading and line:
            paragraph.append(line)
            continue
        if paragraph and blocks:
            blocks[-1].text.append(" ".join(paragraph))
        paragraph = []
        if heading:
            blocks.append(_block(heading[2]))
    return blocks


def _block(heading: str) -> _Block:
    plain = heading.replace("`", "")
    if (match := _KEY.fullmatch(heading)) is None:
        whole, _, several = heading.removeprefix("In ").partition(": ")
        return _Block(plain, [f"{whole}.{one}" for one in _each(several)] or [whole], False)
    key = match[1].replace(": ", ".")
    first, _, last = key.rpartition(".")
    return _Block(plain, [key, *(f"{first}.{one}.{last}" for one in _each(match[2] or ""))], True)


def _each(names: str) -> list[str]:
    return [name for name in names.split(", ") if name]


def _find(blocks: list[_Block], asked: str, way: str) -> list[_Block]:
    wanted = re.sub(r"^stages\.[^.]+", "stages.NAME", asked.strip("."))
    for block in blocks:  # keys that two places have stand in one of them
        same = _SAME.search(" ".join(block.text))
        if same and wanted.startswith(f"{block.names[0]}."):
            wanted = same[1] + wanted.removeprefix(block.names[0])
    ways: tuple[Callable[[str], bool], ...] = (
        lambda name: name == wanted or name.startswith(f"{wanted}."),
        lambda name: name.endswith(f".{wanted}"),
        lambda name: f".{wanted}" in f".{name}",
    )
    if any(character in wanted for character in "*?["):
        ways = (lambda name: fnmatchcase(name, wanted),)
    for matches in ways:
        if found := {id(block) for block in blocks if any(map(matches, block.names))}:
            return [*_with_keys(blocks, found)]
    near = _near(wanted, sorted({name for block in blocks for name in block.names}))
    raise UserError(
        f"{way} {asked}: no such setting"
        + (f"; near it: {', '.join(near)}" if near else f"; {way} alone lists all")
    )


def _with_keys(blocks: list[_Block], found: set[int]) -> Iterator[_Block]:
    """The blocks that were found, and what belongs to the sections among them."""
    sections: tuple[str, ...] = ()
    for block in blocks:
        if id(block) in found and not block.is_key:
            sections += tuple(f"{name}." for name in block.names)
        if id(block) in found or any(name.startswith(sections) for name in block.names):
            yield block


def _near(wanted: str, known: list[str]) -> list[str]:
    """A few names that are like another, as a whole or in their last part."""
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.75)
    by_end: dict[str, list[str]] = {}
    for name in known:
        by_end.setdefault(name.rpartition(".")[2], []).append(name)
    ends = difflib.get_close_matches(wanted.rpartition(".")[2], by_end, n=3, cutoff=0.7)
    return list(dict.fromkeys([*near, *(name for end in ends for name in by_end[end])]))[:4]


def _overview(blocks: list[_Block], width: int, way: str) -> Iterator[str]:
    keys: dict[str, list[str]] = {}
    section = ""
    for block in blocks:
        if not block.is_key:
            section = block.heading.removeprefix("In ")
            keys[section] = []
        else:
            keys[section].append(block.names[0].rpartition(".")[2])
    for section, names in keys.items():
        yield _bold(section)
        yield from _wrapped(", ".join(names) or "no keys of its own", width)
    yield f"\n{way} KEY says what a key means: data.crop_mode, data, optimizer.lr, '*warmup*'"


def _in_full(blocks: list[_Block], width: int) -> Iterator[str]:
    for number, block in enumerate(blocks):
        if number:
            yield ""
        yield _bold(block.heading)
        for paragraph in block.text:
            # Facts have a line each.
            for line in re.split(r" · (?=\*\*)", _LINK.sub(r"\1", paragraph)):
                yield from _wrapped(line.replace("`", "").replace("**", ""), width)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent="  ",
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _bold(text: str) -> str:
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    return text if plain else f"\033[1m{text}\033[0m"
