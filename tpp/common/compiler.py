"""PyTorch's compiler, which takes as long to import as PyTorch itself, left out where it is not used.

torchvision 0.22 and later imports ``torch._dynamo`` for one function that its detection networks
call. The same is brought in by PyTorch when a TorchDispatchMode sees its first operation, see
:class:`tpp.models.meta_runs.PlainMode`.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_PART = "torch._dynamo.utils"


@contextmanager
def compiler_left_out() -> Iterator[None]:
    """Within it ``from torch._dynamo.utils import is_compile_supported`` imports nothing.

    The function imports the compiler when it is called. Whatever else is asked of that module
    imports it at once. Nothing happens where it is imported already.
    """
    if _PART in sys.modules:
        yield
        return
    stand_in = _StandIn(_PART)
    sys.modules[_PART] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(_PART) is stand_in:
            del sys.modules[_PART]


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system itself asks for
            raise AttributeError(name)
        if name == "is_compile_supported":
            return _is_compile_supported
        if sys.modules.get(_PART) is self:
            del sys.modules[_PART]
        return getattr(importlib.import_module(_PART), name)


def _is_compile_supported(device: Any) -> Any:
    return importlib.import_module(_PART).is_compile_supported(device)
