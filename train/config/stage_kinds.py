"""What a stage of each kind is and does: code asks this table, and no kind by its name.

A new kind is a line here, and a file in ``train/stages/`` where it does something new.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class StageKind:
    """One kind of stage.

    Attributes:
        trains: whether it makes optimiser steps.
        makes_network: whether it writes a checkpoint, which other stages may start from.
        needs_plan: whether it has to do with filters that go, and which is to be known.
        needs_epochs: whether the configuration says how long it is; a stage that regularises is as
            long as its method says.
        needs_images: whether there have to be any.
        has_method: whether every method has a say in it. Dense training is what most start from:
            see :meth:`train.config.config.Config.has_method`.
        regularizes: whether it readies the network for the removal of filters.
        removes: whether it takes filters out.
        masks: whether it sets weights to zero for good.
        is_dense: whether its network is the run's dense one.
        is_final: whether its network is what published figures are of.
    """

    trains: bool = False
    makes_network: bool = True
    needs_plan: bool = False
    needs_epochs: bool = False
    needs_images: bool = True
    has_method: bool = True
    regularizes: bool = False
    removes: bool = False
    masks: bool = False
    is_dense: bool = False
    is_final: bool = False


KINDS = {
    "dense": StageKind(trains=True, needs_epochs=True, has_method=False, is_dense=True),
    "regularize": StageKind(trains=True, needs_plan=True, regularizes=True),
    "prune": StageKind(needs_plan=True, needs_images=False, removes=True),
    "sparsify": StageKind(needs_images=False, has_method=False, masks=True),
    "finetune": StageKind(trains=True, needs_epochs=True, is_final=True),
    "evaluate": StageKind(makes_network=False),
}
UNKNOWN = StageKind(has_method=False)


def stage_kind(name: str) -> StageKind:
    """The kind called ``name``; of one that nobody knows, in another's results, nothing is said."""
    return KINDS.get(name, UNKNOWN)
