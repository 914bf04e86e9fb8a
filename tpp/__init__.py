"""Trainability Preserving Pruning: selection, sharded regularisation, checkpoint-level removal.

Usable without the rest of this repository; see :class:`Regularizer` for the three lines that a
training loop needs.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpp.budget import Budget
    from tpp.channels import survey_channels
    from tpp.checkpoint import load_model, load_optimizer_state, save_model
    from tpp.errors import UserError
    from tpp.export import export_model
    from tpp.penalty import gram_penalty
    from tpp.plan import PruningPlan
    from tpp.prune import prune_checkpoint, prune_model
    from tpp.regularizer import Regularizer
    from tpp.schedule import GrowthSchedule
    from tpp.selection import Selection, select_filters
    from tpp.trainability import Trainability, jacobian_singular_values, measure_trainability

__all__ = [
    "Budget",
    "GrowthSchedule",
    "PruningPlan",
    "Regularizer",
    "Selection",
    "Trainability",
    "UserError",
    "export_model",
    "gram_penalty",
    "jacobian_singular_values",
    "load_model",
    "load_optimizer_state",
    "measure_trainability",
    "prune_checkpoint",
    "prune_model",
    "save_model",
    "select_filters",
    "survey_channels",
]

# Imported when first asked for: `python -m tpp.prune` must not find itself imported already, and
# a loader that wants nothing but UserError need not wait for torchvision.
_HOME = {
    "Budget": "tpp.budget",
    "GrowthSchedule": "tpp.schedule",
    "PruningPlan": "tpp.plan",
    "Regularizer": "tpp.regularizer",
    "Selection": "tpp.selection",
    "Trainability": "tpp.trainability",
    "UserError": "tpp.errors",
    "export_model": "tpp.export",
    "gram_penalty": "tpp.penalty",
    "jacobian_singular_values": "tpp.trainability",
    "load_model": "tpp.checkpoint",
    "load_optimizer_state": "tpp.checkpoint",
    "measure_trainability": "tpp.trainability",
    "prune_checkpoint": "tpp.prune",
    "prune_model": "tpp.prune",
    "save_model": "tpp.checkpoint",
    "select_filters": "tpp.selection",
    "survey_channels": "tpp.channels",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
