"""YAML files as plain data, of a size and depth that settings can have, and how they are merged."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tpp.common.errors import UserError
from tpp.common.paths import user_path
from tpp.common.reading import DEEPEST, is_shallow, read_text

# Where a value stands: the keys that lead to it.
Place = tuple[str, ...]
# Whether what a new mapping says at a place replaces the old one as a whole.
Rule = Callable[[Place, Mapping[str, Any], Mapping[str, Any]], bool]
# What is made of a value and the folder of the file that says it.
Anchor = Callable[[Any, Path], Any]
# Bytes of a YAML file: PyYAML takes seconds for that many.
LARGEST_YAML = 2**20
# Of one file, with aliases written out; and files that extend each other.
_MOST_VALUES = 20_000
_LONGEST_CHAIN = 20


@dataclass(frozen=True)
class Merging:
    """Which mappings are replaced as a whole; all others are merged key by key.

    Attributes:
        whole: places whose mappings always are.
        rules: of other places; one that says so is enough.
        anchored: of places whose value goes by the folder of the file that says it (of an
            override: the one that the command runs in), what it is made of value and folder; a
            ``*`` in a place is any key.
    """

    whole: Collection[Place] = ()
    rules: Collection[Rule] = ()
    anchored: Mapping[Place, Anchor] = field(default_factory=dict)

    def replaces(self, where: Place, base: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
        """Whether ``new`` takes the place of ``base`` as a whole."""
        return where in self.whole or any(rule(where, base, new) for rule in self.rules)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, and refuses repeated keys and what grows too large.

    Aliases (``*a``) let a few lines stand for any number of values, and a list hold itself.
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _size(node, {}) > _MOST_VALUES:
            raise yaml.MarkedYAMLError(problem=f"more than {_MOST_VALUES:,} values, with aliases")
        return node

    def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:
        # The scanner's time grows with the square of this depth.
        if self.flow_level >= DEEPEST:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        value = super().construct_yaml_str(node)
        value.encode()  # ValueError for half a character, which could not be written anywhere
        return value

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if abs(value) >= 2**64:
            raise yaml.MarkedYAMLError(problem="a number of more than 64 bits")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # the base class says that such a key is not possible
            key = (key_node.tag, key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _refuse(_: _Loader, node: yaml.Node) -> None:
    raise yaml.MarkedYAMLError(problem=f"{node.tag} is no plain data", problem_mark=node.start_mark)


def _size(node: yaml.Node, known: dict[yaml.Node, float]) -> float:
    """How many values a node stands for, aliases written out; infinite if it holds itself."""
    if node not in known:
        known[node] = math.inf
        parts = []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        known[node] = 1 + sum(_size(part, known) for part in parts)
    return known[node]


class Dumper(yaml.SafeDumper):
    """SafeDumper that puts a string such as "1e-4" in quotes, for :class:`_Loader` to read it."""


# YAML's types that are no plain data: a date without quotes stays a string.
for _tag in ("timestamp", "binary", "set", "omap", "pairs"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _refuse)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_yaml_str)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


for _side in (_Loader, Dumper):  # YAML 1.1 wants 1.0e-4; nobody writes that
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def _advice(error: yaml.MarkedYAMLError) -> str:
    """What would be right, where a character means more to YAML than to who wrote it."""
    problem, context = str(error.problem), str(error.context)
    if r"\t" in problem:
        return "; indent with spaces, not with tabs"
    if problem.startswith("mapping values"):
        return "; a value with a colon and a space in it has to be in quotes"
    found = re.search(r"found character '(.)'", problem)
    begins = found[1] if found else None
    # An alias of something that was said before, its name, the type of what follows, long text.
    for word, character in (("alias", "*"), ("anchor", "&"), ("tag", "!"), ("block scalar", "|")):
        if word in problem or word in context:
            begins = character
    return f"; what begins with {begins} has to be in quotes" if begins else ""


def parse_yaml(text: str, source: str) -> Any:
    """What a YAML text holds: plain data, of a size and depth that a configuration can have.

    Raises:
        UserError: it is not valid YAML, or not of that kind; ``source`` says where it is from.
    """
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        where = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise UserError(
            f"{source}: not valid YAML: {error.problem}{where}{_advice(error)}"
        ) from None
    except RecursionError:
        raise UserError(f"{source}: not valid YAML: nested too deeply") from None
    except Exception as error:  # PyYAML lets through whatever a tag such as !!int stumbles over
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    if not is_shallow(data):
        raise UserError(f"{source}: not valid YAML: nested too deeply")
    return data


def read_yaml(
    path: Path, merging: Merging = Merging(), extended_by: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """A YAML file as plain data, with all that it extends merged in.

    Args:
        path: the file.
        merging: what a file replaces as a whole in the one that it extends.
        extended_by: the files that lead to it, the first one first.

    Raises:
        UserError: it cannot be read, is not YAML, or extends itself.
    """
    extended = f", which {extended_by[-1]} extends" if extended_by else ""
    text = read_text(path, f"the configuration{extended}", largest=LARGEST_YAML)
    resolved = path.resolve()
    if resolved in extended_by:
        raise UserError(f"{path}: extends itself by way of {extended_by[-1]}")
    if len(extended_by) > _LONGEST_CHAIN:
        raise UserError(f"{path}: too many files that extend each other")
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: a configuration is a mapping of keys to values")
    _anchor(data, path.parent, merging)
    base = data.pop("extends", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise UserError(f"{path}: extends: expected the path of a YAML file")
    extended_data = read_yaml(path.parent / user_path(base), merging, (*extended_by, resolved))
    return merge(extended_data, data, merging)


def _anchor(data: dict[str, Any], folder: Path, merging: Merging) -> None:
    for (*outer, last), of in merging.anchored.items():
        inside: list[Any] = [data]
        for key in outer:
            mappings = [one for one in inside if isinstance(one, dict)]
            inside = [value for one in mappings for k, value in one.items() if key in ("*", k)]
        for one in inside:
            if isinstance(one, dict) and last in one:
                one[last] = of(one[last], folder)


def merge(base: Any, new: Any, merging: Merging, where: Place = ()) -> Any:
    """What two files say together, ``new`` having the last word; neither is changed.

    Args:
        base, new: plain data; anything but two mappings is replaced.
        merging: which mappings are replaced too.
        where: the place at which both stand.
    """
    if not isinstance(base, dict) or not isinstance(new, dict):
        return new
    if merging.replaces(where, base, new):
        return new
    merged = dict(base)
    for key, value in new.items():
        merged[key] = merge(base[key], value, merging, (*where, key)) if key in base else value
    return merged


def parse_override(override: str, merging: Merging) -> dict[str, Any]:
    """What ``key.sub=value`` says, as nested mappings; the value is YAML.

    Raises:
        UserError: it is not of that form, not YAML, or names a part of what is always replaced as
            a whole.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"override {override!r}: expected key.sub=value")
    for place in merging.whole:
        if len(parts) > len(place) and tuple(parts[: len(place)]) == place:
            whole = ".".join(place)
            raise UserError(
                f"override {override!r}: {whole} is replaced as a whole: "
                f"{whole}='{{KEY: VALUE, ...}}'"
            )
    value = parse_yaml(text, f"override {override!r}")
    for part in reversed(parts):
        value = {part: value}
    said: dict[str, Any] = value
    _anchor(said, Path(), merging)
    return said
