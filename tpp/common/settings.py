"""The base of all settings, and what is said of a mistake in them."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
)
from pydantic.fields import FieldInfo

from tpp.common.errors import UserError, printable
from tpp.common.paths import user_path

Ratio = Annotated[float, Field(ge=0, lt=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(ge=1)]
# Beside the type of a key that may differ when a run goes on: it decides no outcome.
MAY_DIFFER = "may differ when a run goes on"
# Likewise, of a key that decides nothing where nothing has been trained.
OF_TRAINING = "of training"
NaturalNumber = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
# NaN and infinity are numbers to YAML and never what anybody wants in these settings.
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _expanded(text: str) -> str:
    if not text.startswith("~"):  # "" may stand for a default, and a URL is no path
        return text
    try:
        return str(user_path(text))
    except UserError as error:
        raise ValueError(str(error)) from None


# The text of a path; ``~`` is the home folder.
UserPath = Annotated[str, AfterValidator(_expanded)]


@dataclass(frozen=True)
class OneOf:
    """Beside ``str`` in an annotation: one of these names, as ``Literal`` has it for pydantic."""

    names: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return handler(Literal[self.names])


@dataclass(frozen=True)
class Names:
    """Beside ``str`` in an annotation: the names that its validator knows, for the reference."""

    names: tuple[str, ...]


def check_values(settings: Any) -> None:
    """Check a dataclass by its annotations: lower bounds, and names by :class:`OneOf`.

    Raises:
        UserError: a value is not allowed; says which, and what would be right.
    """
    for name, annotation in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        for rule in _rules_in(annotation):
            if isinstance(rule, OneOf) and value not in rule.names:
                raise UserError(f"{name} must be one of {', '.join(rule.names)}, not {value!r}")
            lowest = getattr(rule, "ge", None)
            if lowest is not None and value is not None and value < lowest:
                raise UserError(f"{name} must be {lowest} or more, not {value}")


def _rules_in(annotation: Any) -> Iterator[Any]:
    """What stands beside the types in an annotation, such as ``PositiveInt | None``."""
    for part in (annotation, *get_args(annotation)):
        for extra in getattr(part, "__metadata__", ()):
            yield from extra.metadata if isinstance(extra, FieldInfo) else (extra,)


class Section(BaseModel):
    """Base of all sections: unknown keys and wrong types are errors."""

    model_config = _STRICT


def mistakes(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """One line for each mistake: the key, what is wrong, and what would be right."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in (prefix, *problem["loc"]) if part not in ("", "[key]"))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            fields = _section_at(model, problem["loc"][:-1]).model_fields
            known = [field.alias or name for name, field in fields.items()]
            known += ["name"] if prefix else []  # a method's, beside its settings
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
            message = "unknown key" + (
                f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(known)}"
            )
        elif problem["type"] == "missing":
            message = "this key is missing"
        elif "[key]" in problem["loc"] and problem["type"] == "string_type":
            message = f"keys should be strings, not {problem['input']!r}"
        elif problem["type"] != "value_error":
            message = f"{message[0].lower()}{message[1:]}, not {problem['input']!r}"
        key = printable(key, 200)
        # What names a key inside of this one says where that is itself.
        lines += [
            f"{key}: {part}" if key and not part.startswith(f"{key}.") else part
            for part in message.splitlines()
        ]
    return lines


def _section_at(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The section class in which an unknown key was found."""
    for part in location:
        if str(part) in model.model_fields:
            candidates = [model.model_fields[str(part)].annotation]
            while candidates:
                candidate = candidates.pop()
                if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                    model = candidate
                    break
                candidates += list(get_args(candidate))
    return model
