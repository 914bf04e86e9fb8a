"""Say what the keys of a configuration mean, as docs/settings.md does."""

from collections.abc import Sequence

from tpp.common.command_line import Parser
from tpp.common.errors import run_command
from train.reference.lookup import show_settings


def make_parser(prog: str = "python -m train.settings") -> Parser:
    """What the command takes."""
    parser = Parser(
        prog,
        "Say what the keys of a configuration mean.",
        more="The same is in docs/settings.md, and with --help-settings of tpp train.",
        examples=["data.crop_mode", "'*warmup*'"],
    )
    parser.add_argument(
        "key",
        nargs="?",
        default="",
        metavar="KEY",
        help="a key such as data.crop_mode, a section, its beginning, its end or a pattern with "
        "*; without one all keys are listed",
    )
    return parser


def main(words: Sequence[str] | None = None, prog: str = "python -m train.settings") -> None:
    """Show settings; ``prog`` is how it was called, for ``--help`` and what is said."""
    show_settings(make_parser(prog).parse_args(words).key, prog)


if __name__ == "__main__":
    run_command(main)
