"""What a network is trained for, one file each.

A new task is a new file with a subclass of :class:`~train.tasks.base.Task` and its kind; nothing
else changes.
"""

import functools

from tpp.common.registry import classes_in, pick
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
