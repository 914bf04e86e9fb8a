"""How every command reads its command line: one form of help, of mistakes and of old spellings."""

import argparse
import difflib
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from tpp.common.errors import UserError

# Old spellings of options work up to the versions before this one.
OLD_NAMES_END = "0.2"
_WIDEST = 100
_EXAMPLE = 76  # columns of an example's line, before what goes on in the next
_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
# A word of a shell's command line, its quotes included.
_WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|[^\s'"])+""")
_KINDS = {int: "a whole number", float: "a number"}


def nearest(word: str, known: Mapping[str, str] | Iterable[str]) -> str:
    """What ends a message about a word that is not known; empty if nothing is like it.

    Args:
        word: as it was written.
        known: what there is, or what to say for it; one that begins with the word comes before
            one that is like it.
    """
    said = known if isinstance(known, Mapping) else {name: name for name in known}
    names = {name.lstrip("-"): meant for name, meant in said.items()}
    plain = word.lstrip("-")
    longer = sorted((name for name in names if plain and name.startswith(plain)), key=len)
    near = longer[:1] or difflib.get_close_matches(plain, names, n=1, cutoff=0.5)
    return f"; did you mean {names[near[0]]}?" if near else ""


def at_least_one(text: str) -> int:
    """A whole number from 1 on, as a ``type=`` of argparse."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


class _Form(argparse.HelpFormatter):
    """Paragraphs are filled, indented lines stay as they are; at most 100 columns."""

    def __init__(self, prog: str) -> None:
        columns = min(shutil.get_terminal_size().columns, _WIDEST)
        super().__init__(prog, max_help_position=24, width=max(columns - 1, 40))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = [paragraph.strip("\n") for paragraph in text.split("\n\n")]
        return "\n\n".join(
            paragraph if paragraph.startswith(" ") else textwrap.fill(paragraph, width)
            for paragraph in paragraphs
            if paragraph.strip()
        )

    def _split_lines(self, text: str, width: int) -> list[str]:
        words = " ".join(text.split())
        return textwrap.wrap(words, width, break_on_hyphens=False, break_long_words=False)


class _WithTables(_Form):
    """A paragraph of lines such as ``name  what it is`` is filled line by line."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            _filled_table(paragraph, width) or _Form._fill_text(self, paragraph, width, indent)
            for paragraph in text.strip("\n").split("\n\n")
        )


def _filled_table(paragraph: str, width: int) -> str:
    """The rows of a table, each broken at the width; empty if the paragraph is none."""
    rows: list[str] = []
    for line in paragraph.strip("\n").splitlines():
        if line.startswith(" ") and rows:
            rows[-1] += f" {line.strip()}"
        else:
            rows.append(line)
    cells = [re.fullmatch(r"(\S+(?: \S+)*)  +(\S.*)", row) for row in rows]
    if not all(cells):
        return ""
    column = max(len(cell[1]) for cell in cells if cell) + 2
    return "\n".join(
        textwrap.fill(
            cell[2],
            width,
            initial_indent=cell[1].ljust(column),
            subsequent_indent=" " * column,
            break_on_hyphens=False,
        )
        for cell in cells
        if cell
    )


class Parser(argparse.ArgumentParser):
    """A command's options, read as all commands read theirs.

    Help begins with what the command does in a line and ends with examples. A mistake is a
    :class:`UserError` of one line, with what is like the unknown word. Options are written in
    full, and may stand before and behind what has no name.

    Args:
        prog: how the command was called.
        summary: what it does, in a line.
        more: paragraphs that say more, with an empty line between two.
        examples: what to write behind ``prog``, or whole command lines of other programs, which
            begin with ``$ ``.
        options: as :class:`argparse.ArgumentParser` takes them.
    """

    def __init__(
        self,
        prog: str,
        summary: str = "",
        *,
        more: str = "",
        examples: Sequence[str] = (),
        **options: Any,
    ) -> None:
        described = f"{summary}\n\n{textwrap.dedent(more)}"
        options = {"formatter_class": _Form, "allow_abbrev": False, **options}
        super().__init__(prog=prog, description=described, **options)
        self._examples = tuple(examples)
        self._renamed: dict[str, str] = {}
        self._renamed_words: dict[tuple[str, str], str] = {}
        self._positionals.title = "arguments"
        # What argparse need not find, as it may be given in another way.
        self.needed: list[argparse.Action] = []

    @classmethod
    def of_script(cls, prog: str, text: str, examples: Sequence[str]) -> "Parser":
        """A parser by a script's docstring: its first line, and paragraphs that say more."""
        summary, _, more = text.partition("\n\n")
        parser = cls(prog, " ".join(summary.split()), examples=examples)
        parser.formatter_class = _WithTables
        parser.description = f"{summary}\n\n{more}"
        return parser

    def renamed(self, old: str, new: str) -> None:
        """Take an option by the name that it had before, with a note."""
        assert new in self._option_string_actions, new
        self._renamed[old] = new

    def renamed_word(self, option: str, old: str, new: str) -> None:
        """Take an option's word as it was called before, with a note."""
        self._renamed_words[option, old] = new

    @property
    def old_names(self) -> dict[str, str]:
        """Earlier names of options, or an option and its earlier word, and those of now."""
        words = {f"{option}={old}": new for (option, old), new in self._renamed_words.items()}
        return self._renamed | {old: f"{old.split('=')[0]}={new}" for old, new in words.items()}

    @property
    def examples(self) -> list[str]:
        """Whole command lines."""
        return [
            line.removeprefix("$ ") if line.startswith("$ ") else f"{self.prog} {line}".rstrip()
            for line in self._examples
        ]

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # noqa: D102
        self.usage = self._short_usage()
        # argparse has no intermixed words where there are commands of a command.
        parse = self.parse_known_args if self._subparsers else self.parse_known_intermixed_args
        found, rest = parse(args, namespace)
        if rest:
            self.error(f"{rest[0]!r} is a word too many")
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # noqa: D102
        if self.usage is None:
            self.usage = self._short_usage()
        words = sys.argv[1:] if args is None else [os.fspath(word) for word in args]
        return super().parse_known_args(self._understood(words), namespace)

    def _understood(self, words: list[str]) -> list[str]:
        """The words with the names of now; an option that there is not ends it."""
        if self._subparsers is not None:
            return words
        understood: list[str] = []
        for place, word in enumerate(words):
            if word == "--":
                return [*understood, *words[place:]]
            name, equals, value = word.partition("=")
            if (new := self._renamed.get(name)) is not None:
                _say_renamed(name, new)
                word = f"{new}{equals}{value}"
            elif name not in self._option_string_actions and _is_option(word):
                self.error(f"there is no option {name}{self._meant(word)}")
            before = understood[-1] if understood else ""
            if equals:
                option, _, value = word.partition("=")
                if (option, value) in self._renamed_words:
                    word = f"{option}={self._word_of_now(option, value)}"
            elif (before, word) in self._renamed_words:
                word = self._word_of_now(before, word)
            understood.append(word)
        return understood

    def _word_of_now(self, option: str, old: str) -> str:
        new = self._renamed_words[option, old]
        _say_renamed(f"{option} {old}", f"{option} {new}")
        return new

    def _meant(self, word: str) -> str:
        name, equals, _ = word.partition("=")
        settings = any(action.metavar == OVERRIDE for action in self._get_positional_actions())
        if settings and equals and "." in name:
            return f"; a setting is written without dashes: {word.lstrip('-')}"
        names = {
            option: option
            for option, action in self._option_string_actions.items()
            if action.help != argparse.SUPPRESS
        }
        return nearest(name, names | self._renamed) or f"; {self.prog} --help lists all"

    def error(self, message: str) -> NoReturn:
        """End with a mistake.

        Raises:
            UserError: always.
        """
        message = message.removeprefix("argument ")
        message = message.replace("the following arguments are required:", "missing:")
        raise UserError(f"{self.prog}: {message}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            said = f"{value!r} is none of {', '.join(known)}{nearest(str(value), known)}"
            raise argparse.ArgumentError(action, said)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError:
            kind = _KINDS.get(action.type) if isinstance(action.type, type) else None
            if kind is None:
                raise
            raise argparse.ArgumentError(action, f"{arg_string!r} is not {kind}") from None

    def format_help(self) -> str:
        """Usage, what it does, options, examples."""
        if self.usage is None:
            self.usage = self._short_usage()
        lines = [_shell_lines(line) for line in self.examples]
        heading = f"example{'s' if len(lines) > 1 else ''}:"
        shown = "\n".join([heading, *lines]) + "\n" if lines else ""
        return f"{super().format_help()}\n{shown}".rstrip("\n") + "\n"

    def _short_usage(self) -> str:
        """What has to be given; of the options only that there are some."""
        formatter = self._get_formatter()
        given: list[str] = []
        last: list[str] = []
        for action in self._get_positional_actions():
            words = formatter._format_args(action, str(action.metavar or action.dest))
            if action in self.needed:
                several = f" [{action.metavar} ...]" if action.nargs == "*" else ""
                words = f"{action.metavar}{several}"
            (last if action.metavar == OVERRIDE else given).append(words)
        alone = [*self._get_optional_actions()]
        for group in self._mutually_exclusive_groups:
            if group.required:
                ways = [_with_value(action, formatter) for action in group._group_actions]
                given.append(f"({' | '.join(ways)})")
            alone = [action for action in alone if action not in group._group_actions]
        given += [_with_value(action, formatter) for action in alone if action.required]
        optional = any(action.dest != "help" for action in alone if not action.required)
        parts = [self.prog, *given, *(["[options]"] if optional else []), *last]
        lines = textwrap.wrap(
            " ".join(part.replace(" ", "\0") for part in parts),
            max(formatter._width - len("usage: "), 40),
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        return "\n       ".join(lines).replace("\0", " ").replace("%", "%%")


# What is written as key.sub=value; of all commands that take settings.
OVERRIDE = "key.sub=value"


def _with_value(action: argparse.Action, formatter: argparse.HelpFormatter) -> str:
    name = action.option_strings[-1]
    if action.nargs == 0:
        return name
    default = action.metavar or action.dest.upper()
    return f"{name} {formatter._format_args(action, str(default))}"


def _is_option(word: str) -> bool:
    """Whether argparse would take a word for an option."""
    return (
        word.startswith("-") and word != "-" and " " not in word and _NUMBER.fullmatch(word) is None
    )


def _say_renamed(old: str, new: str) -> None:
    # Of several ranks one says it.
    if os.environ.get("RANK", "0") == "0":
        said = f"note: {old} is now {new}; the old name goes with version {OLD_NAMES_END}"
        print(said, file=sys.stderr)


def _shell_lines(line: str) -> str:
    """A command line as it is shown, broken as a shell allows it."""
    together: list[str] = []  # an option and its value
    for word in _WORD.findall(line):
        alone = together and together[-1].startswith("--") and " " not in together[-1]
        if alone and not word.startswith("-"):
            together[-1] += f" {word}"
        else:
            together.append(word)
    rows = ["  "]
    for words in together:
        if len(rows[-1]) + len(words) > _EXAMPLE and rows[-1].strip():
            rows.append("      ")
        rows[-1] += f"{words} "
    return "\\\n".join(rows).rstrip()
