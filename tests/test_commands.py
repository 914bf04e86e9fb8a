"""One language for all commands: options, help, examples, mistakes, and spellings of before."""

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tpp
from tests.test_package import told
from tpp.__main__ import COMMANDS
from tpp.common.command_line import OLD_NAMES_END, Parser
from tpp.common.errors import UserError
from tpp.common.options import SHARED
from tpp.common.paths import user_path
from tpp.models.architecture import build_model

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = sorted(
    path.stem
    for path in (ROOT / "benchmarks").glob("*.py")
    if "run_command(main)" in path.read_text()
)
# Of the version before, so that none is forgotten.
BEFORE = {
    "tpp latency": {"--batch": "--batch-size", "--dtype": "--precision"},
    "tpp export": {"--batch": "--batch-size"},
    "tpp index": {"--out": "--output"},
    "tpp shards": {"--out": "--output"},
    **{
        f"tpp prepare {name}": {"--out": "--output"}
        for name in (
            *("imagenet", "imagenette", "cifar10", "cifar100", "mnist", "tiny-imagenet", "split"),
            *("photos", "div2k", "set5", "set14", "b100", "urban100"),
        )
    },
    "python -m benchmarks.checkpoint": {
        "--batch": "--batch-size",
        "--side": "--image-size",
        "--folder": "--work",
    },
    "python -m benchmarks.end_to_end": {
        "--batch": "--batch-size",
        "--side": "--image-size",
        "--folder": "--data",
        "--network": "--model",
    },
    "python -m benchmarks.evaluate": {
        "--batch": "--batch-size",
        "--folder": "--data",
        "--networks": "--models",
    },
    "python -m benchmarks.latency": {"--quick": "--tiny"},
    "python -m benchmarks.loader": {"--batch": "--batch-size", "--quick": "--tiny"},
    "python -m benchmarks.local_memory": {"--batch": "--batch-size"},
    "python -m benchmarks.scale": {
        "--loader": "--loader-speed",
        "--batch-per-gpu": "--batch-size",
        "--precision=mixed": "--precision=bf16",
    },
    "python -m benchmarks.stage": {"--batch": "--batch-size"},
    "python -m benchmarks.startup": {"--quick": "--tiny"},
    "python -m benchmarks.step": {"--batch": "--batch-size"},
}


class AskedError(Exception):
    """Carries the parser that a script was about to use."""


def _of_benchmark(name: str) -> Parser:
    def caught(parser: Parser, *_: Any) -> None:
        raise AskedError(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_args", caught)
        with pytest.raises(AskedError) as found:
            importlib.import_module(f"benchmarks.{name}").main()
    return found.value.args[0]


def _parsers() -> Iterator[Parser]:
    for name, command in COMMANDS.items():
        yield importlib.import_module(command.module).make_parser(f"tpp {name}")
    yield importlib.import_module("train.settings_page").make_parser()
    yield from map(_of_benchmark, BENCHMARKS)


def _with_parts(parser: Parser) -> Iterator[Parser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


PARSERS = {each.prog: each for parser in _parsers() for each in _with_parts(parser)}
with_every_parser = pytest.mark.parametrize("parser", PARSERS.values(), ids=PARSERS)


def options(parser: Parser) -> Iterator[tuple[str, argparse.Action]]:
    for action in parser._get_optional_actions():
        for name in action.option_strings:
            yield name, action


def told_examples(parser: Parser, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The words of each example, as they stand in the help of a terminal with 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    _, _, end = parser.format_help().partition("\nexample")
    lines = re.sub(r" \\\n +", " ", end).splitlines()[1:]
    assert lines, f"{parser.prog}: --help ends without an example"
    return [shlex.split(line) for line in lines]


def own_words(parser: Parser, words: list[str]) -> list[str]:
    """What stands behind the command's name in an example."""
    if words[0] in ("accelerate", "torchrun"):
        return words[words.index("train/main.py") + 1 :]
    name = parser.prog.split()
    assert words[: len(name)] == name
    found = words[len(name) :]
    # What stands behind -- is sbatch's, and is taken off before.
    return found[: found.index("--")] if "--" in found else found


@with_every_parser
def test_what_is_shared_is_the_same(parser: Parser) -> None:
    for name, action in options(parser):
        if name not in SHARED:
            continue
        shared = SHARED[name]
        assert action.help.startswith(shared.says.replace("%", "%%")), name
        if shared.choices is not None:
            assert set(action.choices) <= set(shared.choices), name
        elif shared.metavar is None:
            assert action.nargs == 0, name
        else:
            allowed = {shared.metavar, f"{shared.metavar}[,{shared.metavar}]"}
            allowed |= {"DIR", "FILE"} if shared.kind is user_path else set()
            assert action.metavar in allowed, name


@with_every_parser
def test_every_value_has_a_name_and_every_option_a_meaning(parser: Parser) -> None:
    for name, action in options(parser):
        if action.help != argparse.SUPPRESS:
            assert action.nargs == 0 or action.choices or action.metavar, name
            assert action.help or action.choices, name
        if action.metavar in ("FILE", "DIR", "RUN", "CHECKPOINT"):
            assert action.type is user_path, name


def test_a_checkpoint_is_named_in_two_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = [p for p in PARSERS.values() if "--checkpoint" in p._option_string_actions]
    wanted = {"prune", "sparsify", "describe", "survey", "latency", "export", "evaluate"}
    wanted |= {"python -m benchmarks.criteria", "python -m benchmarks.knapsack"}
    assert {parser.prog.removeprefix("tpp ") for parser in reading} == wanted


@with_every_parser
def test_help_fits_and_says_first_what_it_does(
    parser: Parser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = parser.format_help().splitlines()
    assert lines[0].startswith(f"usage: {parser.prog}")
    assert [line for line in lines if len(line) > 80] == []
    summary = lines[lines.index("") + 1 :]
    assert summary[0][0].isupper()
    assert " ".join(summary[: summary.index("")]).endswith(".")


@with_every_parser
def test_examples_are_taken(parser: Parser, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in told_examples(parser, monkeypatch):
        parser.parse_args(own_words(parser, words))


@with_every_parser
def test_a_mistake_is_one_line_with_what_is_near(parser: Parser) -> None:
    if parser._subparsers is not None:
        wrong = [["imagenett"]]
        said = "did you mean imagenette?"
    else:
        name = next(
            (n for n, a in options(parser) if a.dest != "help" and a.help != argparse.SUPPRESS),
            "--help",
        )
        wrong = [[f"{name}x"], [f"{name}x=1"]]
        said = f"there is no option {name}x; did you mean {name}?"
    for words in wrong:
        with pytest.raises(UserError) as error:
            parser.parse_args(words)
        assert str(error.value).startswith(f"{parser.prog}: ") and said in str(error.value)
        assert "\n" not in str(error.value)


@with_every_parser
def test_a_wrong_value_is_one_line(parser: Parser, monkeypatch: pytest.MonkeyPatch) -> None:
    if parser._subparsers is not None:
        return
    words = own_words(parser, told_examples(parser, monkeypatch)[0])
    for name, action in options(parser):
        if action.choices:
            value = "99" if action.type is int else "nonsense"
            said = f"'?{value}'? is none of "
        elif action.type is int or getattr(action.type, "__name__", "") == "at_least_one":
            value, said = "1.5", "'1.5' is not a whole number"
        elif action.type is float:
            value, said = "x", "'x' is not a number"
        else:
            continue
        with pytest.raises(UserError, match=f"{name}.*: {said}") as error:
            parser.parse_args([*words, name, value])
        assert "\n" not in str(error.value)


def test_no_spelling_of_before_is_forgotten() -> None:
    assert {name: p.old_names for name, p in PARSERS.items() if p.old_names} == BEFORE


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [(name, old, new) for name, names in BEFORE.items() for old, new in names.items()],
)
def test_a_spelling_of_before_goes_on_with_a_word(
    name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    parser = PARSERS[name]
    words = own_words(parser, told_examples(parser, monkeypatch)[0])
    action = parser._option_string_actions[new.split("=")[0]]
    value = str(action.choices[-1]) if action.choices else "2"
    whole = "=" in old or action.nargs == 0
    before, now = (old, new) if whole else (f"{old}={value}", f"{new}={value}")
    said, has_said = old.replace("=", " "), new.replace("=", " ")
    note = f"note: {said} is now {has_said}; the old name goes with version {OLD_NAMES_END}\n"
    expected = parser.parse_args([*words, now])
    assert capsys.readouterr().err == ""
    for spelled in ([before], before.split("=")):
        assert parser.parse_args([*words, *spelled]) == expected
        assert capsys.readouterr().err == note


def test_spellings_of_before_are_not_kept_for_ever() -> None:
    def numbers(version: str) -> list[int]:
        return [int(part) for part in version.split(".")]

    assert numbers(tpp.__version__) < numbers(OLD_NAMES_END), "take out renamed(...) of all parsers"


def test_of_several_ranks_one_says_it(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("RANK", "1")
    PARSERS["tpp latency"].parse_args(["x", "--batch", "2"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "tpp: there is no command trian; did you mean train?"),
        (["evalute", "x"], "tpp: there is no command evalute; did you mean evaluate?"),
        (["zzzzzz"], "tpp: there is no command zzzzzz; tpp --help lists all"),
        (["--verison"], "tpp: there is no option --verison; tpp --help lists all commands"),
        (
            ["describe"],
            "tpp describe: there is no CHECKPOINT; tpp describe --help says",
        ),
        (["describe", "a", "b"], "tpp describe: 'b' is a word too many"),
        (["describe", "a", "--checkpoint", "b"], "tpp describe: a and --checkpoint b: name one"),
        (["prune", "a"], "tpp prune: missing: --output"),
        (
            ["train", "--data.root=/x"],
            "tpp train: there is no option --data.root; a setting is",
        ),
        (
            ["latency", "a", "--batch-s=1"],
            "tpp latency: there is no option --batch-s; did",
        ),
        (
            ["settings", "data.croop_mode"],
            "tpp settings data.croop_mode: no such setting; near",
        ),
    ],
)
def test_the_command_says_what_is_wrong(monkeypatch, capsys, words, said) -> None:
    code, out, err = told(monkeypatch, capsys, "tpp", *words)
    assert (code, out) == (2, "") and err.startswith(f"error: {said}") and err.count("\n") == 1


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the checkpoints of the examples."""
    model = build_model("cifar_resnet8", 10)
    tpp.save_model(tmp_path / "dense.safetensors", model, preprocessing=None)
    plan = tpp.select_filters(model, {"layer*.conv1": 0.5})
    pruned = tpp.prune_model(model, plan)
    tpp.save_model(tmp_path / "half.safetensors", pruned, preprocessing=None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "number", "writes"),
    [
        ("describe", 0, []),
        ("survey", 1, ["survey.json"]),
        ("prune", 1, ["half.safetensors"]),
        ("sparsify", 0, ["masked.safetensors"]),
        ("export", 1, ["half.pt2"]),
        ("settings", 0, []),
        ("settings", 1, []),
        ("graphs", 0, []),
    ],
)
def test_examples_run(name, number, writes, networks, monkeypatch, capsys) -> None:
    (networks / "configs").symlink_to(ROOT / "configs")
    parser = PARSERS[f"tpp {name}"]
    words = told_examples(parser, monkeypatch)[number]
    before = {path: path.stat().st_mtime_ns for path in networks.iterdir()}
    assert told(monkeypatch, capsys, *words)[0] == 0
    changed = [p.name for p in networks.iterdir() if before.get(p) != p.stat().st_mtime_ns]
    assert sorted(changed) == writes


def test_the_package_alone_has_its_own_commands(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.modules["tpp.__main__"], "ROOT", tmp_path)
    code, out, _ = told(monkeypatch, capsys, "tpp")
    assert code == 0 and "  prune " in out and "  train " not in out and "In a clone" in out
    code, _, err = told(monkeypatch, capsys, "tpp", "train")
    assert code == 2 and err.startswith("error: tpp train: is not part of the package tpp alone")


def written_lines() -> Iterator[tuple[str, str]]:
    """Whole command lines of pages, and of the heads of configurations and scripts."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    heads = [*sorted((ROOT / "configs").rglob("*.yaml")), *sorted((ROOT / "slurm").glob("*.sh"))]
    for path in (*pages, *heads):
        text = path.read_text()
        if path in heads:
            text = "\n".join(re.findall(r"^# ?(.*)$", text, re.MULTILINE))
        text = re.sub(r" \\\n +", " ", text)
        # What begins a line, and what a page has between backquotes.
        found = re.findall(r"^ *((?:tpp|python -m benchmarks\.\w+) .*)$", text, re.MULTILINE)
        found += re.findall(r"`((?:tpp|python -m benchmarks\.\w+) [^`]*)`", text)
        for line in found:
            yield str(path.relative_to(ROOT)), " ".join(line.split())


def test_command_lines_of_pages_are_taken() -> None:
    read = 0
    for page, line in written_lines():
        # Whose places are left open, or which name a command and say no more.
        if re.search(r"\.\.\.|\[|\]|[<>|]", line) or len(line.split()) < 3 or "COMMAND" in line:
            continue
        words = shlex.split(line, comments=True)
        if words[1].startswith("--"):  # of the command itself
            continue
        name = next(
            (" ".join(words[:n]) for n in (3, 2) if " ".join(words[:n]) in PARSERS),
            None,
        )
        assert name is not None, f"{page}: {line}"
        try:
            PARSERS[name].parse_args(words[len(name.split()) :])
        except UserError as error:
            # Where only a part is meant, N stands for a number and other options are left out.
            part = re.search(r": missing: --|: there is no CHECKPOINT|'N' is not", str(error))
            assert part, f"{page}: {line}: {error}"
        read += 1
    assert read > 150


def test_no_page_starts_accelerate_in_a_way_that_warns() -> None:
    """Without a file of its own it says in six lines what it takes for granted."""
    files = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md")]
    files += [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "launch").rglob("*")]
    found = []
    for path in files:
        if path.is_file() and path.suffix != ".pyc":
            for line in re.findall(r"accelerate launch .*train/main\.py.*", path.read_text()):
                found.append(line)
                assert "--config_file launch/accelerate/" in line, f"{path}: {line}"
    assert len(found) > 8


COLOUR = re.compile(r"\x1b\[(?:[\d;]*;)?(?:3[0-7]|9[0-7]|38;[\d;]+)(?:;[\d;]*)?m")


@pytest.mark.parametrize("name", ["describe", "survey"])
@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, None),
        ({"FORCE_COLOR": "1"}, {"\x1b[36m"}),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, set()),
    ],
    ids=["no terminal", "a terminal", "NO_COLOR"],
)
def test_colours_mean_one_thing(name, variables, wanted, networks, monkeypatch, capsys) -> None:
    for variable in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    code, out, _ = told(monkeypatch, capsys, "tpp", name, "half.safetensors")
    assert code == 0
    if wanted is None:
        assert "\x1b" not in out
    else:
        assert set(COLOUR.findall(out)) == wanted
