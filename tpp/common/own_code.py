"""Classes and functions in a Python file of the user's own, named as ``FILE.py:NAME``.

Naming one runs the file, so only the user's own words may: the command line, and the configuration
that it names. What a checkpoint, a plan or a run folder says is never handed to :func:`load_own`.
"""

import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from tpp.common.errors import UserError, reason_of
from tpp.common.paths import user_path

_FORM = re.compile(r"(?P<file>.+\.py):(?P<name>[^\W\d]\w*)")
_LOADED: dict[Path, ModuleType] = {}


def is_own(text: object) -> bool:
    """Whether this is meant to name something in a file of the user's own."""
    return isinstance(text, str) and (".py:" in text or text.endswith(".py"))


def anchored(text: Any, folder: Path) -> Any:
    """``FILE.py:NAME`` with the whole path, from a folder on; anything else as it is."""
    found = _FORM.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        return text
    path = folder.absolute() / user_path(found["file"])
    return f"{path.parent.resolve() / path.name}:{found['name']}"


def short_name(text: str) -> str:
    """``FILE.py:NAME`` without the folder, as files have it; anything else as it is."""
    found = _FORM.fullmatch(text)
    return f"{Path(found['file']).name}:{found['name']}" if found else text


def load_own(text: str) -> tuple[Any, Path]:
    """What ``FILE.py:NAME`` names, and the file; the file is run, once in a process.

    Its folder is put at the end of Python's path, so that it can import what lies beside it.

    Raises:
        UserError: it is of another form, there is no such file or no such name in it, or running
            it ends with an exception.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise UserError(f"{text}: expected FILE.py:NAME, a class or a function in that file")
    path = user_path(found["file"]).absolute()
    if not path.is_file():
        raise UserError(f"{found['name']}: there is no file {path}")
    module, name = _module(path.resolve()), found["name"]
    if not hasattr(module, name):
        there = [
            key
            for key, value in vars(module).items()
            if inspect.isclass(value) or inspect.isfunction(value)
            if value.__module__ == module.__name__ and not key.startswith("_")
        ]
        raise UserError(
            f"{path} has no {name}; it has {', '.join(there) or 'no class and no function'}"
        )
    return getattr(module, name), path


def _module(path: Path) -> ModuleType:
    if path in _LOADED:
        return _LOADED[path]
    # Never the name of a module that somebody imports, and the same in every process.
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"own_{path.stem}_{digest}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever is written there
        del sys.modules[spec.name]
        raise UserError(f"{path}{_line(error, path)}: cannot be imported: {_said(error)}") from None
    _LOADED[path] = module
    return module


def _said(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return str(error.msg)
    return f"{type(error).__name__}: {reason_of(error)}"


def _line(error: BaseException, path: Path) -> str:
    """Where in the file it was, as ``, line 7``."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    return f", line {lines[-1]}" if lines else ""
