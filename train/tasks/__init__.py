"""What a network is trained for, one file each.

A new task is a new file with a subclass of :class:`~train.tasks.base.Task` and its kind; nothing
else changes.
"""

import functools
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from tpp.common.errors import UserError
from tpp.common.registry import classes_in, pick
from tpp.common.settings import mistakes
from train.tasks.base import Task


@functools.cache
def available_tasks() -> dict[str, type[Task]]:
    """All tasks by their kind."""
    return classes_in(__name__, __path__, Task, "kind")


def task_class(kind: str) -> type[Task]:
    """The task of this kind.

    Raises:
        UserError: there is none; names the nearest.
    """
    return pick(available_tasks(), kind, "task.kind: unknown task")


def make_task(described: Mapping[str, Any]) -> Task:
    """A task from its ``kind`` and settings, as a configuration or a model file has them.

    Raises:
        UserError: a mistake in them, one line each; names the key.
    """
    settings = dict(described)
    kind = settings.pop("kind", None)
    if not isinstance(kind, str):
        raise UserError(f"task.kind: expected a task's name, not {kind!r}")
    task = task_class(kind)
    try:
        return task(task.settings_type(**settings))
    except ValidationError as error:
        raise UserError("\n".join(mistakes(error, task.settings_type, prefix="task"))) from None
