"""Paths as people write them: ``~`` is the home folder, on the command line and in files."""

import os
from pathlib import Path

from tpp.common.errors import UserError


def user_path(text: str | os.PathLike[str]) -> Path:
    """A path with ``~`` or ``~name`` at its start replaced by that home folder.

    A shell does so for a word of its own, but not inside of ``--output=~/runs`` or
    ``data.root=~/images``, and nobody does it for what a file says. Also a ``type=`` of argparse.

    Raises:
        UserError: nobody is called so here.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        name = os.fspath(text).partition("/")[0]
        raise UserError(
            f"{text}: there is no home folder {name} here; ./{text} is a file of that name"
        ) from None
