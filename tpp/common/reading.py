"""Small files of unknown origin: text and JSON, read within bounds."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tpp.common.errors import UserError, reason_of

# No plan, configuration or description of a run comes near it; Python's data is many times as
# large as the text that it is read from.
LARGEST = 16 * 2**20
# Levels of a document inside each other: far more than any of ours has, and few enough for
# functions that go through it by calling themselves.
DEEPEST = 50


def read_text(path: str | os.PathLike[str], what: str, *, largest: int = LARGEST) -> str:
    """The text of a small regular file.

    Args:
        path: the file; a pipe, a device or a folder is refused before anything waits for it.
        what: what is to be read, for error messages: ``the pruning plan``.
        largest: bytes that the file may have.

    Raises:
        UserError: there is no such file, it cannot be read, is too large, or is not UTF-8.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{path}: cannot read {what} (not a regular file)")
        size = path.stat().st_size
        if size > largest:
            raise UserError(f"{path}: {size:,} bytes, more than {what} can have ({largest:,})")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read {what} ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: cannot read {what} (not a text file)") from None
    except (ValueError, RuntimeError) as error:  # a NUL in the path, a loop of symlinks
        raise UserError(f"{path}: cannot read {what} ({reason_of(error)})") from None


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """What a small JSON file holds; see :func:`parse_json`.

    Raises:
        UserError: it cannot be read, or is not JSON of the kind that is read here.
    """
    return parse_json(read_text(path, what), str(path))


def parse_json(text: str, source: str) -> Any:
    """What a JSON text holds; NaN and infinities, which are in our logs, are let through.

    Args:
        text: the document.
        source: where it is from, for error messages.

    Raises:
        UserError: it is not JSON, is nested deeper than 50 levels, or has a key twice, of which
            one reader takes the first and another the last.
    """
    try:
        data = json.loads(text, object_pairs_hook=_unique)
        if r"\ud" in text.lower():  # half a character, which could not be written anywhere
            json.dumps(data, ensure_ascii=False).encode()
    except ValueError as error:
        raise UserError(f"{source}: not JSON ({reason_of(error)})") from None
    except RecursionError:
        raise UserError(f"{source}: not JSON that is read here (nested too deeply)") from None
    if not is_shallow(data):
        raise UserError(f"{source}: not JSON that is read here (nested too deeply)")
    return data


def check_names(names: Iterable[object], source: str) -> None:
    """Check that these can be names of tensors: text that a terminal and a log can show.

    Raises:
        UserError: one is not a string, or has control characters.
    """
    for name in names:
        if not isinstance(name, str) or not name.isprintable():
            raise UserError(f"{source}: {name!r} is no name of a tensor")


def is_shallow(data: Any, deepest: int = DEEPEST) -> bool:
    """Whether lists and dicts are nested no deeper than so many levels."""
    level = [data]
    for _ in range(deepest):
        level = [inner for value in level for inner in _inside(value)]
    return not level


def _inside(value: Any) -> Iterator[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return iter(inner)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:100]!r} is there twice")
            seen.add(key)
    return found
