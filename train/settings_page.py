"""Write docs/settings.md, the reference of all settings, or check that it is current.

It is made from the classes that validate the settings: types, defaults and bounds are theirs,
meanings and examples are those of their docstrings.
"""

from collections.abc import Sequence

from tpp.common.command_line import Parser
from tpp.common.errors import UserError, run_command
from tpp.common.files import write_whole
from tpp.common.imports import quick_imports
from train.reference.lookup import PAGE


def make_parser(prog: str = "python -m train.settings_page") -> Parser:
    """What the command takes."""
    parser = Parser(
        prog,
        "Write docs/settings.md, the reference of all settings, or check that it is current.",
        more="It is made from the classes that validate the settings and their docstrings.",
        examples=["--check"],
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; end with exit code 2 if the page is not current",
    )
    return parser


def main(words: Sequence[str] | None = None, prog: str = "python -m train.settings_page") -> None:
    """Write or check the page; ``prog`` is how it was called, for ``--help``."""
    arguments = make_parser(prog).parse_args(words)
    with quick_imports():
        from train.reference.page import COMMAND, make_page

    page = make_page()
    if not arguments.check:
        write_whole(PAGE, page)
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
        raise UserError(f"{PAGE}: not what the settings' classes say; write it anew: {COMMAND}")


if __name__ == "__main__":
    run_command(main)
