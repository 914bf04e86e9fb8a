"""Types and values of settings in words, from the annotations that validate them."""

import math
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tpp.common.settings import MAY_DIFFER, Names, OneOf, UserPath
from tpp.common.yaml_files import Dumper

_PLAIN = {
    bool: ("`true` or `false`", "`true` or `false`"),
    int: ("whole number", "whole numbers"),
    float: ("number", "numbers"),
    str: ("string", "strings"),
    Any: ("any value", "values"),
}
_PATH = get_args(UserPath)[1]


def words_of(annotation: Any, extras: Iterable[Any] = (), *, many: bool = False) -> str:
    """A type with its bounds: ``whole number, 1 or more, or null``.

    Args:
        annotation: as pydantic has it of a field.
        extras: what stands beside it, a field's ``metadata``.
        many: in the plural.
    """
    extras = list(extras)
    while get_origin(annotation) is Annotated:
        annotation, *inner = get_args(annotation)
        extras += inner
    rules = [*_flat(extras)]
    names = next((rule.names for rule in rules if isinstance(rule, OneOf | Names)), None)
    if names is not None:
        return _one_of(names)
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        rest = [part for part in parts if part is not type(None)]
        if {int, float} <= {*rest}:
            rest.remove(int)  # to be written as it is: a number
        values = (True, False) if rest == [bool] else get_args(rest[0])
        if len(rest) == 1 and (rest == [bool] or get_origin(rest[0]) is Literal):
            return _one_of((*values, *([None] * (type(None) in parts))))
        said = " or ".join(words_of(part, extras, many=many) for part in rest)
        comma = "," if "," in said else ""
        return f"{said}{comma} or `null`" if type(None) in parts else said
    if origin is Literal:
        return _one_of(parts)
    if origin is list:
        length, least = _length(rules)
        return f"{least}list{'s' * many} of {length}{words_of(parts[0], many=True)}"
    if origin is dict:
        key, value = (words_of(part, many=True) for part in parts)
        return f"mapping{'s' * many}" + ("" if parts[1] is Any else f" of {key} to {value}")
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "sections" if many else "section"
    if _PATH in rules:
        return "paths" if many else "path"
    said = _PLAIN[annotation][many] if annotation in _PLAIN else annotation.__name__
    bounds = _bounds(rules)
    if many:  # a name's pattern says too much there
        return said if not bounds or annotation is str else f"{said} (each {bounds})"
    return f"{said}, {bounds}" if bounds else said


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The class of settings in an annotation, as in ``Section | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (section_in(part) for part in get_args(annotation))
    return next((one for one in found if one is not None), None)


def may_differ(field: FieldInfo) -> bool:
    """Whether a run that goes on may have another value."""
    return MAY_DIFFER in field.metadata


def default_of(field: FieldInfo) -> str | None:
    """A field's default as a configuration has it; None where it has to be given."""
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True)
    return "`{}`" if isinstance(value, BaseModel) else f"`{value_in_yaml(value)}`"


def value_in_yaml(value: Any) -> str:
    """A value in one line of YAML."""
    if isinstance(value, float) and math.isfinite(value):
        short = f"{value:.4g}"
        return short if "." in short or "e" in short else f"{value:.1f}"
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=1000, sort_keys=False)
    return text.removesuffix("...\n").strip()


def _one_of(names: Iterable[Any]) -> str:
    *most, last = (f"`{value_in_yaml(name)}`" for name in names)
    return f"{', '.join(most)} or {last}" if most else last


def _flat(extras: Iterable[Any]) -> Iterator[Any]:
    for extra in extras:
        yield from extra.metadata if isinstance(extra, FieldInfo) else (extra,)


def _bounds(rules: Iterable[Any]) -> str:
    low = high = pattern = None
    for rule in rules:
        if isinstance(rule, annotated_types.Gt):
            low = f"above {rule.gt}"
        elif isinstance(rule, annotated_types.Ge):
            low = f"{rule.ge} or more"
        elif isinstance(rule, annotated_types.Lt):
            high = f"below {_power(rule.lt)}"
        elif isinstance(rule, annotated_types.Le):
            high = f"at most {_power(rule.le)}"
        pattern = getattr(rule, "pattern", None) or pattern
    said = " and ".join(bound for bound in (low, high) if bound)
    if pattern:
        said = f"matching `{pattern}`"
    return said


def _power(value: Any) -> str:
    """A bound, of large ones the power of two."""
    exponent = math.log2(value) if value > 0 else 0.0
    return f"2^{exponent:.0f}" if exponent >= 16 and exponent.is_integer() else f"{value:g}"


def _length(rules: Iterable[Any]) -> tuple[str, str]:
    """How long a list is: of which lengths, or that it is not empty."""
    low = high = None
    for rule in rules:
        if isinstance(rule, annotated_types.MinLen):
            low = rule.min_length
        elif isinstance(rule, annotated_types.MaxLen):
            high = rule.max_length
    if high is not None:
        return f"{low or 0} to {high} ", ""
    return "", "non-empty " if low else ""
