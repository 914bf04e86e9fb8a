"""The page of all settings, made from the classes that validate them."""

import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tpp.common.errors import UserError
from tpp.common.settings import Names
from tpp.common.yaml_files import parse_yaml
from tpp.methods import available_methods
from tpp.models.architecture import own_models
from tpp.models.settings import ModelSection
from train.config.config import Config
from train.config.cycles import CYCLE, CycleSection
from train.config.sections import StageSection
from train.grid import Sweep
from train.reference.docstrings import Docstring, as_markdown, as_sentence, of_class, parse
from train.reference.wording import default_of, may_differ, section_in, value_in_yaml, words_of
from train.tasks import available_tasks

COMMAND = "python -m train.settings_page"
SAME_KEYS = "Its keys are those of"
_WIDTH = 105
# Defaults of keys that the classes take for required, as they are filled in before.
_ELSEWHERE: dict[tuple[type, str], str] = {(StageSection, "kind"): "the name of the stage"}
# Of a configuration; the names of its stages are the user's.
STAGE = "stages.NAME"

_RECONSTRUCTION = " A reconstruction ([docs/methods.md](methods.md))."

_HEAD = f"""# Settings

Every key of a run's configuration, and of a sweep's. Made by `{COMMAND}` from
the classes that check them: change their docstrings, not this page.

- A key is written here with dots, as overrides on the command line have it:
  `data.threads=8` is `data: {{threads: 8}}` in a file. `NAME` stands for the name of a stage.
- `null` is YAML's word for no value.
- A run that is started again goes on in its folder with the settings that it had. Those that decide
  no outcome **may change** then.
- Patterns of layers are shell-style globs of their names in PyTorch, in which `*` also matches
  dots: `layer*.conv1`.

In a terminal, `tpp settings data.crop_mode` shows one key, `data` in its
place all of a section, and `'*warmup*'` all that match. A small configuration, whole:
"""


@dataclass(frozen=True)
class Entry:
    """What the page says of one key.

    Attributes:
        key: with dots.
        of: the method or task that has it; None for all others.
        meaning: in Markdown.
        facts: its type, default and so on, by heading, in Markdown.
    """

    key: str
    of: str | None
    meaning: str
    facts: Mapping[str, str]


@dataclass
class Part:
    """A section of the page.

    Attributes:
        title: as the heading has it.
        level: of the heading.
        text: paragraphs in Markdown.
        entries: its keys.
    """

    title: str
    level: int
    text: list[str] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)


@dataclass(frozen=True)
class Documented:
    """A class of settings and where its keys stand.

    Attributes:
        settings: the class.
        prefix: before its keys, with the dot.
        title: of its section of the page.
        level: of that section's heading.
        of: the method or task that it belongs to.
    """

    settings: type[BaseModel]
    prefix: str
    title: str
    level: int
    of: str | None = None


def examples_of(settings: Any) -> list[dict[str, Any]]:
    """The examples in a class's docstring, as plain data."""
    return [parse_yaml(text, settings.__qualname__) for text in parse(settings.__doc__).examples]


def documented() -> Iterator[Documented]:
    """All classes of settings, in the order of the page."""
    seen: set[type] = set()

    def within(settings: type[BaseModel], prefix: str, level: int) -> Iterator[Documented]:
        for name, inner in _sections_in(settings):
            if inner not in seen:
                seen.add(inner)
                yield Documented(inner, f"{prefix}{name}.", f"In {prefix}{name}", level)
                yield from within(inner, f"{prefix}{name}.", level)

    yield Documented(Config, "", "Top level", 2)
    for name, info in Config.model_fields.items():
        inner = section_in(info.annotation)
        if name == "method":
            for method, settings in _by_settings(available_methods()):
                yield Documented(settings, "method.", f"method: {method}", 3, method)
        elif name == "task":
            for task, settings in _by_settings(available_tasks()):
                yield Documented(settings, "task.", f"task: {task}", 3, task)
        elif inner is StageSection:
            yield Documented(StageSection, f"{STAGE}.", STAGE, 2)
            yield Documented(CycleSection, f"{STAGE}.", f"{STAGE}: {CYCLE}", 3, CYCLE)
            seen.add(StageSection)
            yield from within(StageSection, f"{STAGE}.", 3)
        elif inner is not None:
            seen.add(inner)
            yield Documented(inner, f"{name}.", name, 2)
            yield from within(inner, f"{name}.", 3)
    yield Documented(Sweep, "sweep: ", "sweep", 2)
    yield from within(Sweep, "sweep: ", 3)


def make_page() -> str:
    """The whole page, in Markdown.

    Raises:
        UserError: a key without a meaning, a meaning without a key, or a key without an example,
            one line each.
    """
    if missing := [line for one in documented() for line in mistakes_in(one.settings)]:
        raise UserError("\n".join(missing))
    parts = [*_parts()]
    lines = [_HEAD, "```yaml", *parse(Config.__doc__).examples[0].splitlines(), "```", ""]
    for part in parts:
        name = part.title.removeprefix("In ")
        lines.append(f"{'  ' * (part.level - 2)}- [{name}](#{_anchor(part.title)})")
    for part in parts:
        lines += ["", f"{'#' * part.level} {part.title}"]
        for paragraph in part.text:
            lines += ["", _filled(paragraph)]
        for entry in part.entries:
            facts = " · ".join(f"**{name}:** {fact}" for name, fact in entry.facts.items())
            lines += ["", f"#### {_heading(entry)}", "", _filled(entry.meaning), "", facts]
    return "\n".join(lines) + "\n"


def mistakes_in(settings: type[BaseModel]) -> Iterator[str]:
    """A line for each key that a docstring forgets, and for each that is none.

    A section needs no entry where it stands, if its own class says what it is; and no example, as
    its keys have theirs.
    """
    fields, said = settings.model_fields, _of(settings)
    where = f"{settings.__module__}.{settings.__qualname__}"
    shown = {key for example in examples_of(settings) for key in example}
    for name, info in fields.items():
        key, inner = info.alias or name, section_in(info.annotation)
        if name not in said.attributes and not (inner and _of(inner).paragraphs):
            yield f"{where}: {key} is missing in the docstring's Attributes:"
        if key not in shown and inner is None:
            yield f"{where}: {key} is missing in the docstring's Example:"
    for name in said.attributes.keys() - fields.keys():
        yield f"{where}: the docstring's Attributes: have {name}, which is no key"


def _parts() -> Iterator[Part]:
    where = {one.settings: one for one in documented()}
    previous = None
    for one in documented():
        if one.of is not None and one.of != CYCLE and one.prefix != previous:
            yield _of_choice(one.prefix.rstrip("."))
        previous = one.prefix
        part = Part(one.title, one.level, [*_introduction(one)])
        said = _of(one.settings)
        examples = examples_of(one.settings)
        for name, shorthand in said.shorthands.items():
            meaning = _meaning(shorthand.text)
            part.entries.append(
                Entry(one.prefix + name, one.of, meaning, {"Type": shorthand.note or "string"})
            )
        for name, info in _in_order(one):
            inner = section_in(info.annotation)
            if one.settings is Config and (inner is not None or name in ("method", "task")):
                continue  # a section of the page each
            entry = _entry(one, name, info, examples)
            if inner is not None:
                link = _link(where[inner].prefix.rstrip(". "), where[inner].title)
                own = where[inner].prefix == f"{entry.key}."
                entry = _with(entry, f"Keys: {link}." if own else f"{SAME_KEYS} {link}.")
            elif one.settings is StageSection and name == "method":
                entry = _with(entry, f"{SAME_KEYS} {_link('method', 'method')}.")
            part.entries.append(entry)
        yield part
        if one.settings is ModelSection:
            yield from _of_networks()


def _of_networks() -> Iterator[Part]:
    """The arguments of the networks that nobody else documents."""
    for name, build in own_models().items():
        said, given = parse(build.__doc__), inspect.signature(build).parameters
        names = [name for name in given if name != "num_classes"]
        if isinstance(build, type) and names:
            summary = f"`{name}`: {as_markdown(said.paragraphs[0])}"
            part = Part(f"model.args: {name}", 3, [summary])
            types, example = (
                get_type_hints(vars(build)["__init__"]),
                parse_yaml(said.examples[0], name),
            )
            for key in names:
                explained = said.attributes[key]
                facts = {"Type": words_of(types[key])}
                facts["Default"] = f"`{value_in_yaml(given[key].default)}`"
                if explained.note:
                    facts["Unit"] = explained.note
                facts["Example"] = f"`{key}: {value_in_yaml(example[key])}`"
                part.entries.append(
                    Entry(f"model.args.{key}", name, _meaning(explained.text), facts)
                )
            yield part


def _entry(one: Documented, name: str, info: FieldInfo, examples: list[dict[str, Any]]) -> Entry:
    key, inner = info.alias or name, section_in(info.annotation)
    explained = _of(one.settings).attributes.get(name)
    text = explained.text if explained else _of(inner).paragraphs[0] if inner else ""
    facts = {"Type": words_of(info.annotation, info.metadata)}
    default = default_of(info)
    facts["Default"] = default or _ELSEWHERE.get((one.settings, name), "none, required")
    if explained and explained.note:
        facts["Unit"] = explained.note
    values = [f"`{key}: {value_in_yaml(one[key])}`" for one in examples if key in one]
    if values:  # the default is one that need not be written
        facts["Example"] = next(
            (v for v in values if default is None or v != f"`{key}: {default[1:]}"), values[0]
        )
    if may_differ(info):
        facts["Resumed"] = "may change"
    return Entry(one.prefix + key, one.of, _meaning(text), facts)


def _with(entry: Entry, sentence: str) -> Entry:
    return replace(entry, meaning=f"{entry.meaning} {sentence}")


def _link(key: str, title: str) -> str:
    return f"[`{key}`](#{_anchor(title)})"


def _of_choice(key: str) -> Part:
    """The section above those of all methods, or all tasks."""
    name = {"method": "name", "task": "kind"}[key]
    known = available_methods() if key == "method" else available_tasks()
    default = Config.model_fields[key].get_default()[name]
    other = next(one for one in sorted(known) if one != default)
    facts = {
        "Type": words_of(str, [Names(tuple(sorted(known)))]),
        "Default": f"`{default}`",
        "Example": f"`{name}: {other}`",
    }
    meaning = f"Which {key}. Each has settings of its own, which stand beside this key."
    explained = _of(Config).attributes[key]
    return Part(key, 2, [_meaning(explained.text)], [Entry(f"{key}.{name}", None, meaning, facts)])


def _introduction(one: Documented) -> Iterator[str]:
    text = _of(one.settings).paragraphs
    if one.prefix == "method.":
        for name in (one.of or "").split(", "):
            method = available_methods()[name]
            summary = _meaning(parse(method.__doc__).paragraphs[0])
            yield f"**{method.title}** (`name: {name}`): {summary}" + _RECONSTRUCTION * (
                not method.faithful
            )
        if not one.settings.model_fields:
            yield "No settings."
            return
    elif one.prefix == "task.":
        yield _meaning(parse(available_tasks()[one.of or ""].__doc__).paragraphs[0])
        if not one.settings.model_fields:
            yield "No settings."
            return
    yield from map(_meaning, text)


def _by_settings(
    known: Mapping[str, Any],
) -> Iterator[tuple[str, type[BaseModel]]]:
    """Names and the class of their settings, those of one class together, the default first."""
    groups: dict[type[BaseModel], list[str]] = {}
    for name in sorted(known):
        groups.setdefault(known[name].settings_type, []).append(name)
    for settings, names in sorted(
        groups.items(), key=lambda group: ("tpp" not in group[1], group[1])
    ):
        yield ", ".join(names), settings


def _in_order(one: Documented) -> list[tuple[str, FieldInfo]]:
    """The keys of a class; a section's own before those that it has in common with others."""
    own = vars(one.settings).get("__annotations__", {}) if one.of is None else {}
    return sorted(one.settings.model_fields.items(), key=lambda item: item[0] not in own)


def _sections_in(settings: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, info in settings.model_fields.items():
        inner = section_in(info.annotation)
        if inner is not None:
            yield info.alias or name, inner


@cache
def _of(settings: type) -> Docstring:
    return of_class(settings)


def _meaning(text: str) -> str:
    return as_sentence(as_markdown(text))


def _heading(entry: Entry) -> str:
    return f"`{entry.key}`" + (f" ({entry.of})" if entry.of else "")


def _anchor(title: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _filled(text: str) -> str:
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
