"""Where commands print their tables."""

import re
import sys
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
