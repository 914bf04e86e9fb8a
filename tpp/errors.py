"""The one exception that stands for a user's mistake."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in what the user handed in: a file, a configuration key, a layer name.

    The message is one line that names the thing and says what would be right (or several lines,
    one for each mistake). Command-line entry points turn each into ``error: ...`` and end with
    exit code 2; nobody sees a traceback for it.
    """


def run_command(main: Callable[[], None]) -> None:
    """Run a command-line entry point; end a user's mistake in one line and exit code 2.

    Ctrl-C ends it in one line too, with the shell's exit code for that, 130.
    """
    try:
        main()
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
