"""Trainability Preserving Pruning: selection, sharded regularisation, checkpoint-level removal.

Usable without the rest of this repository; see :class:`Regularizer` for the three lines that a
training loop needs.
"""

from tpp.checkpoint import load_model
from tpp.errors import UserError
from tpp.penalty import gram_penalty
from tpp.plan import PruningPlan
from tpp.prune import prune_checkpoint, prune_model
from tpp.regularizer import Regularizer
from tpp.schedule import GrowthSchedule
from tpp.selection import select_filters

__all__ = [
    "GrowthSchedule",
    "PruningPlan",
    "Regularizer",
    "UserError",
    "gram_penalty",
    "load_model",
    "prune_checkpoint",
    "prune_model",
    "select_filters",
]
