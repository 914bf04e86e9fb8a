"""Where commands print their tables, and what is kept out of there."""

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

_PADDING = re.compile(r"[ \t]+(?=\r?$)", re.MULTILINE)


class _WithoutPadding:
    """Standard output, without the blanks that tables are filled up with at the ends of lines."""

    def write(self, text: str) -> int:
        sys.stdout.write(_PADDING.sub("", text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)


def output_console(piped: int, **options: Any) -> Console:
    """A console on standard output.

    Args:
        piped: how many columns there are where it is no terminal: rich's guess, 80, would break the
            lines of wide tables. No blanks are written at the ends of lines there.
        options: of rich's Console.
    """
    if sys.stdout.isatty():
        return Console(**options)
    return Console(file=_WithoutPadding(), width=piped, **options)  # type: ignore[arg-type]


@contextmanager
def without_native_output() -> Iterator[None]:
    """Within it nothing reaches the file of standard output: what C code prints is left out.

    For libraries that print what they are asked to keep to themselves; of all threads.
    """
    sys.stdout.flush()
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        libc.fflush(None)  # or C would write what it still holds later
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
