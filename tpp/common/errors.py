"""The one exception that stands for a user's mistake, and the one warning."""

import gc
import os
import select
import sys
import warnings
from collections.abc import Callable
from typing import Any

# Of a message: as much as anybody reads.
_MOST_LINES = 30
_LONGEST_LINE = 1000


class UserError(Exception):
    """A mistake in what the user handed in: a file, a configuration key, a layer name.

    The message is one line that names the thing and says what would be right (or several lines,
    one for each mistake). Command-line entry points turn each into ``error: ...`` and end with
    exit code 2; nobody sees a traceback for it.

    Messages quote what is in files of unknown origin, so each line is made :func:`printable`
    here, and what is too long to be read is cut.
    """

    def __init__(self, message: str) -> None:
        lines = message.split("\n")
        if len(lines) > _MOST_LINES:
            lines[_MOST_LINES - 1 :] = [f"... and {len(lines) - _MOST_LINES + 1} more lines"]
        super().__init__("\n".join(printable(line, _LONGEST_LINE) for line in lines))


class Note(UserWarning):
    """Something about a result that its user should know, in one line.

    A library's warning, for Python's usual filters; commands print it without file and line.
    """


def printable(text: str, longest: int | None = None) -> str:
    r"""Text that is safe to show: one line, in which a terminal finds nothing to obey.

    Control characters, terminal escape codes and characters that reverse the reading order are
    spelled out (``\x1b``, ``\u202e``).

    Args:
        text: of any origin.
        longest: characters to show; of a longer text the middle is left out.
    """
    if longest is not None and len(text) > longest:
        text = f"{text[: longest * 2 // 3]} ... {text[5 - longest // 3 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def reason_of(error: BaseException) -> str:
    """What an exception says, in one line; its name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def run_command(main: Callable[[], None]) -> None:
    """Run a command-line entry point; end a user's mistake in one line and exit code 2.

    Ctrl-C ends it in one line too, with the shell's exit code for that, 130; a reader that has
    seen enough, as ``| head`` has, without a word, with 141. A :class:`Note` is one line.
    """
    usual = warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], *where: Any) -> str:
        if issubclass(category, Note):
            return f"note: {printable(str(message))}\n"
        return usual(message, category, *where)

    warnings.formatwarning = formatted  # type: ignore[assignment]
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        if not _has_no_reader(sys.stdout.fileno()):
            raise
        # What is still buffered has nowhere to go, and Python tries again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        # Or all that was imported would be searched for garbage, for half a second. Triton's
        # bindings (nanobind) count what is left behind, and complain.
        if "triton" not in sys.modules:
            gc.freeze()


def _has_no_reader(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))
