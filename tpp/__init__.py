"""Trainability Preserving Pruning: selection, sharded regularisation, checkpoint-level removal.

Usable without the rest of this repository; see :class:`Regularizer` for the three lines that a
training loop needs.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpp.channels.removal import prune_model
    from tpp.channels.survey import survey_channels
    from tpp.checkpoints.export_file import export_model
    from tpp.checkpoints.model_file import load_model, load_optimizer_state, save_model
    from tpp.checkpoints.prune_file import prune_checkpoint
    from tpp.common.errors import UserError
    from tpp.measure.trainability import (
        Trainability,
        jacobian_singular_values,
        measure_trainability,
    )
    from tpp.models.architecture import Architecture
    from tpp.plan import PruningPlan
    from tpp.regularization.gram import gram_penalty
    from tpp.regularization.regularizer import Regularizer
    from tpp.regularization.schedule import GrowthSchedule
    from tpp.selection.budget import Budget
    from tpp.selection.selection import Selection, select_filters

__version__ = "0.1.0"
__all__ = [
    "Architecture",
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
    "Architecture": "tpp.models.architecture",
    "Budget": "tpp.selection.budget",
    "GrowthSchedule": "tpp.regularization.schedule",
    "PruningPlan": "tpp.plan",
    "Regularizer": "tpp.regularization.regularizer",
    "Selection": "tpp.selection.selection",
    "Trainability": "tpp.measure.trainability",
    "UserError": "tpp.common.errors",
    "export_model": "tpp.checkpoints.export_file",
    "gram_penalty": "tpp.regularization.gram",
    "jacobian_singular_values": "tpp.measure.trainability",
    "load_model": "tpp.checkpoints.model_file",
    "load_optimizer_state": "tpp.checkpoints.model_file",
    "measure_trainability": "tpp.measure.trainability",
    "prune_checkpoint": "tpp.checkpoints.prune_file",
    "prune_model": "tpp.channels.removal",
    "save_model": "tpp.checkpoints.model_file",
    "select_filters": "tpp.selection.selection",
    "survey_channels": "tpp.channels.survey",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
