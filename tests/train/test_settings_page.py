"""The reference of settings: whole, current, and found in a terminal."""

import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from pydantic import BaseModel, Field, ValidationError

import data_pipelines
import tpp
import train
from tpp.common.errors import UserError
from tpp.common.images import ImagesSection
from tpp.common.settings import PositiveInt, Ratio, Section, UserPath
from tpp.methods import base
from tpp.methods.tpp import GrowthSettings
from tpp.models.architecture import own_models
from tpp.selection.configured import Configured
from train import main
from train.reference.docstrings import as_markdown, parse
from train.reference.lookup import PAGE, show_settings
from train.reference.page import (
    COMMAND,
    Documented,
    documented,
    examples_of,
    make_page,
    mistakes_in,
)
from train.reference.wording import words_of
from train.tasks.base import Settings as TaskSettings

ROOT = Path(__file__).resolve().parents[2]
# Of no section of a file: what others have in common, and a part of `Config`.
_BASES = {Section, ImagesSection, Configured, base.Settings, GrowthSettings, TaskSettings}
HEADING = re.compile(r"^(#+) (.+)$", re.M)


def classes() -> list[Documented]:
    return [*documented()]


def named(one: Documented) -> str:
    return f"{one.settings.__module__}.{one.settings.__qualname__}"


def subclasses(of: type) -> Iterator[type]:
    for one in of.__subclasses__():
        yield one
        yield from subclasses(one)


def asked(capsys: pytest.CaptureFixture[str], key: str) -> list[str]:
    """The headings of what is shown."""
    show_settings(key)
    return [line for line in capsys.readouterr().out.splitlines() if line and line[0] != " "]


def test_the_page_is_what_the_classes_say() -> None:
    assert make_page() == PAGE.read_text(encoding="utf-8"), f"write it anew: {COMMAND}"


def test_every_class_of_settings_is_on_the_page() -> None:
    for package in (tpp, data_pipelines, train):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.startswith(("tpp.methods", "data_pipelines.settings", "train.tasks")):
                importlib.import_module(module.name)
    there = {one.settings for one in documented()}
    for known in (*subclasses(Section), *subclasses(base.Settings)):
        if known.__module__.startswith("train.graphs"):
            continue  # a command of its own, which docs/graphs.md has a table of
        if known.__module__.split(".")[0] in ("tpp", "data_pipelines", "train"):
            assert known in there | _BASES, known


@pytest.mark.parametrize("one", classes(), ids=named)
def test_examples_are_accepted(one: Documented) -> None:
    for example in examples_of(one.settings):
        one.settings.model_validate(example)


@pytest.mark.parametrize("name", ["edsr", "mlp7_linear", "plain_mlp", "plain_convnet"])
def test_networks_take_the_arguments_of_their_examples(name: str) -> None:
    build = own_models()[name]
    classes = {} if name == "edsr" else {"num_classes": 10}
    (example,) = examples_of(build)
    with torch.device("meta"):
        build(**classes, **example)
    assert f"`model.args.{min(example)}` ({name})" in PAGE.read_text(encoding="utf-8")


class Forgetful(Section):
    """Some settings.

    Attributes:
        said (pixels): what it means.
        gone: no such key any more.

    Example:
        {said: 1}
    """

    said: PositiveInt = 1
    unsaid: PositiveInt = 1
    inner: ImagesSection = ImagesSection()


def test_what_a_docstring_forgets_is_named() -> None:
    assert [line.partition(": ")[2] for line in mistakes_in(Forgetful)] == [
        "unsaid is missing in the docstring's Attributes:",
        "unsaid is missing in the docstring's Example:",
        "the docstring's Attributes: have gone, which is no key",
    ]


def test_an_example_that_is_none_is_found() -> None:
    class Wrong(Section):
        """Of one key.

        Example:
            {share: 2}
        """

        share: Ratio = 0.5

    with pytest.raises(ValidationError):
        test_examples_are_accepted(Documented(Wrong, "", "", 2))


def test_links_lead_somewhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for page in re.findall(r"\]\(([\w-]+\.md)\)", text):
        assert (PAGE.parent / page).is_file(), page
    anchors = [
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for _, heading in HEADING.findall(text)
    ]
    assert sorted(set(anchors)) == sorted(anchors)  # another of the same name would get a number
    assert {*re.findall(r"\]\(#([^)]+)\)", text)} <= {*anchors}


def test_no_line_begins_what_it_should_not() -> None:
    """A wrapped line that begins with a dash or a number and a dot would be a list to Markdown."""
    body = PAGE.read_text(encoding="utf-8").partition("\n## ")[2]
    for line in body.splitlines():
        assert not re.match(r"\s*([-+*>] |\d+[.)] |#{5,}|    )", line), line
        assert line.count("`") % 2 == 0 or "``" not in line, line


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (bool, "`true` or `false`"),
        (PositiveInt | None, "whole number, 1 or more, or `null`"),
        (Annotated[float, Field(gt=0, le=1)], "number, above 0 and at most 1"),
        (Annotated[int, Field(ge=0, lt=2**32)], "whole number, 0 or more and below 2^32"),
        (Literal["a", "b", "c"] | None, "`a`, `b`, `c` or `null`"),
        (Literal[2, 3], "`2` or `3`"),
        (UserPath | None, "path or `null`"),
        (Annotated[str, Field(pattern="^a$")], "string, matching `^a$`"),
        (Annotated[list[PositiveInt], Field(min_length=1)], "non-empty list of whole numbers "
         "(each 1 or more)"),
        (Annotated[list[float], Field(min_length=1, max_length=2)], "list of 1 to 2 numbers"),
        (dict[str, Ratio], "mapping of strings to numbers (each 0 or more and below 1)"),
        (dict[str, dict[str, Any]], "mapping of strings to mappings"),
        (int | float, "number"),
        (ImagesSection | None, "section or `null`"),
    ],
)  # fmt: skip
def test_types_in_words(annotation: Any, words: str) -> None:
    class Holder(BaseModel):
        field: annotation

    field = Holder.model_fields["field"]
    assert words_of(field.annotation, field.metadata) == words


def test_parts_of_a_docstring() -> None:
    found = parse(
        """What it is.

        More of it,
        in two lines.

        Attributes:
            a, b (pixels): of ``x: null``,
                and :func:`~some.where.else_`; None for none.
            c: see docs/data.md.

        Shorthands:
            d (path): a file.

        Example:
            {a: 1,
            b: 2}

            {c: 3}

        Raises:
            UserError: never.
        """
    )
    assert found.paragraphs == ["What it is.", "More of it, in two lines."]
    assert [(k, v.note) for k, v in found.attributes.items()] == [
        ("a", "pixels"),
        ("b", "pixels"),
        ("c", None),
    ]
    assert found.shorthands["d"].note == "path"
    assert found.examples == ["{a: 1,\nb: 2}", "{c: 3}"]
    assert as_markdown(found.attributes["b"].text) == "of `x: null`, and `else_`; `null` for none."
    assert as_markdown(found.attributes["c"].text) == "see [docs/data.md](data.md)."


@pytest.mark.parametrize(
    ("key", "headings"),
    [
        ("data.crop_mode", ["data.crop_mode"]),
        ("crop_mode", ["data.crop_mode"]),
        ("crop", ["data.crop_share", "data.crop_mode"]),
        ("data.crop*", ["data.crop_share", "data.crop_mode"]),
        ("stages.finetune.epochs", ["stages.NAME.epochs"]),
        ("stages.*.ema.warmup_*", ["stages.NAME.ema.warmup_gamma", "stages.NAME.ema.warmup_power"]),
        ("stages.finetune.augment.mixup", ["data.augment.mixup"]),
        ("stages.finetune.method.gain", ["method.gain (l1+orthp)"]),
        ("method.delta", [f"method.delta ({name})" for name in ("tpp", "greg1", "greg2")]),
        ("method.greg2.delta", ["method.delta (greg2)"]),
        ("sweep.seeds", ["sweep: seeds"]),
        ("profile", [*("profile", "profile.from", "profile.steps", "profile.stage")]),
    ],
)
def test_a_terminal_shows(
    key: str, headings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(capsys, key) == headings


def test_keys_are_found_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    keys = re.findall(r"^#### `([^`]+)`", PAGE.read_text(encoding="utf-8"), re.M)
    assert len(keys) > 200
    for key in keys[::7]:
        shown = asked(capsys, key.replace(": ", "."))
        assert key in [heading.partition(" (")[0] for heading in shown]


def test_all_that_is_known_of_a_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    show_settings("data.threads")
    assert capsys.readouterr().out.splitlines() == [
        "data.threads",
        "  Number of decoding threads (DALI) or worker processes (torchvision) of each rank.",
        "  Type: whole number, 1 or more and at most 256",
        "  Default: 4",
        "  Example: threads: 8",
        "  Resumed: may change",
    ]


def test_the_overview_names_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    shown = asked(capsys, "")
    assert {"Top level", "data", "data.demo", "method: tpp", "sweep: published"} <= {*shown}


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("data.crop_mood", "near it: data.crop_mode"),
        ("checkpoint.every", "near it: checkpoints.every, "),
        ("trainig.batch_sise", "near it: training.batch_size, "),
        ("xyz", "--help-settings alone lists all"),
        ("data.x*", "--help-settings alone lists all"),
    ],
)
def test_what_is_not_there_is_one_line(
    key: str, near: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train/main.py", "--help-settings", key])
    with pytest.raises(UserError) as caught:
        main.main()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"--help-settings {key}: no such setting; {near}")


def test_nothing_is_imported_for_it() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['train/main.py', '--help-settings', 'data.crop_mode']\n"
        "runpy.run_path('train/main.py', run_name='__main__')\n"
        "print(sorted({'torch', 'pydantic', 'numpy', 'yaml', 'rich'} & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.startswith("data.crop_mode\n")
    assert done.stdout.endswith("\n[]\n")
