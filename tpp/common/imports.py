"""Imports in less time: PyTorch and what builds on it are seconds before a command can begin."""

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo.utils"


@contextmanager
def quick_imports() -> Iterator[None]:
    """Within it imports are not searched for garbage, and leave PyTorch's compiler out.

    What modules define stays, so looking for what is unused among it only takes time: a tenth of
    importing PyTorch. And torchvision 0.22 and later imports ``torch._dynamo``, which takes as
    long as PyTorch itself, for a function that its detection networks call: within here ``from
    torch._dynamo.utils import is_compile_supported`` gives one that imports it when it is called.
    Whatever else is asked of that module imports it at once.
    """
    collects = gc.isenabled()
    gc.disable()
    stand_in = None if _COMPILER in sys.modules else _StandIn(_COMPILER)
    if stand_in is not None:
        sys.modules[_COMPILER] = stand_in
    try:
        yield
    finally:
        if stand_in is not None and sys.modules.get(_COMPILER) is stand_in:
            del sys.modules[_COMPILER]
        if collects:
            gc.enable()


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system itself asks for
            raise AttributeError(name)
        if name == "is_compile_supported":
            return _is_compile_supported
        if sys.modules.get(_COMPILER) is self:
            del sys.modules[_COMPILER]
        return getattr(importlib.import_module(_COMPILER), name)


def _is_compile_supported(device: Any) -> Any:
    return importlib.import_module(_COMPILER).is_compile_supported(device)
