"""Which tests do without a second process: `make check` runs those alone.

A test needs one where its own code, or a fixture or helper of it in tests/, names a module that
starts processes; or where it is marked ``processes``, as the code under test starts one. All others
are marked ``no_process``, and fail if they start one after all.
"""

import inspect
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

MARKERS = (
    "no_process: starts no process; set by itself",
    "processes: the code under test starts one",
)
TESTS = str(Path(__file__).parent)
STARTERS = (subprocess, subprocess.Popen, multiprocessing)
# Events of Python's; what multiprocessing starts, it does not tell.
EVENTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}
# Over before anything begins: runs ask git which commit they are of, and `import torch` asks where
# libdl is.
ASKED = {"git", "ldconfig"}


def needs_processes(item: pytest.Function) -> bool:
    """Whether a test starts processes by what it or its fixtures say."""
    fixtures = [one for same in item._fixtureinfo.name2fixturedefs.values() for one in same]
    functions = [item.function, *(fixture.func for fixture in fixtures)]
    return item.get_closest_marker("processes") is not None or any(map(_names_one, functions))


@cache
def _names_one(function: Any) -> bool:
    left, seen = [function], set()
    while left:
        found = _as_written(left.pop())
        if any(found is starter for starter in STARTERS):
            return True
        if id(found) not in seen:
            seen.add(id(found))
            left += _named_in(found)
    return False


def _as_written(found: Any) -> Any:
    """A function without the wrappers of decorators."""
    if hasattr(found, "hypothesis"):
        found = found.hypothesis.inner_test
    return inspect.unwrap(getattr(found, "__func__", found)) if callable(found) else found


def _named_in(found: Any) -> Iterator[Any]:
    """What a function or class of tests/ mentions."""
    if isinstance(found, type):
        module = sys.modules.get(found.__module__)
        if str(getattr(module, "__file__", "")).startswith(TESTS):
            yield from (*found.__bases__, *vars(found).values())
    elif isinstance(found, FunctionType) and found.__code__.co_filename.startswith(TESTS):
        names = set(_names(found.__code__))
        yield from (found.__globals__[name] for name in names & found.__globals__.keys())


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


_guarded = False


@contextmanager
def none_may_start(guarded: bool = True) -> Iterator[None]:
    """Whoever starts a process inside fails."""
    global _guarded
    before, _guarded = _guarded, guarded
    try:
        yield
    finally:
        _guarded = before


def _refuse(event: str, arguments: tuple[Any, ...] = ()) -> None:
    program = Path(str(arguments[0])).name if arguments else ""
    if _guarded and event in EVENTS and program not in ASKED:
        pytest.fail(f"{event}: starts a process: mark the test with pytest.mark.processes")


def install_guard() -> None:
    """Watch all ways to start a process; an audit hook stays to the end."""
    start = BaseProcess.start

    def guarded(process: BaseProcess) -> None:
        _refuse("os.fork")
        start(process)

    BaseProcess.start = guarded  # type: ignore[method-assign]
    sys.addaudithook(_refuse)
