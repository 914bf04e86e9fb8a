"""What replaces what where a configuration extends another, and what overrides do."""

from collections.abc import Mapping
from typing import Any

from tpp.common.own_code import anchored
from tpp.common.yaml_files import Merging, Place
from tpp.models.settings import MODEL_ANCHORED, MODEL_REPLACED
from tpp.selection.settings import PRUNING_REPLACED, another_budget
from train.distillation.settings import LOGITS


def _another_method(where: Place, base: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a method replaces the old one: another name does; so does a setting its old value."""
    if where[:1] == ("method",):
        inside = where[1:]
    elif where[:1] == ("stages",) and where[2:3] == ("method",):
        inside = where[3:]
    else:
        return False
    return bool(inside) or new.get("name", base.get("name")) != base.get("name")


def _another_task(where: Place, base: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a task replaces the old one: another kind does."""
    return where == ("task",) and new.get("kind", base.get("kind")) != base.get("kind")


def _another_distillation(where: Place, base: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a distillation replaces the old one: another kind does."""
    if where[:1] != ("stages",) or where[2:] != ("distill",):
        return False
    return new.get("kind", base.get("kind", LOGITS)) != base.get("kind", LOGITS)


def _pruning_of_a_stage(where: Place, base: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """It replaces the run's as a whole, and so its own of another file."""
    return where[:1] == ("stages",) and where[2:] == ("pruning",)


# Also in a cycle. A class of one's own lies beside the file that names it.
_METHOD_NAMES: tuple[Place, ...] = (
    ("method", "name"),
    ("stages", "*", "method", "name"),
    ("stages", "*", "stages", "*", "method", "name"),
)
MERGING = Merging(
    whole=(*MODEL_REPLACED, *PRUNING_REPLACED),
    rules=(
        another_budget,
        _another_method,
        _another_task,
        _another_distillation,
        _pruning_of_a_stage,
    ),
    anchored={**MODEL_ANCHORED, **dict.fromkeys(_METHOD_NAMES, anchored)},
)
