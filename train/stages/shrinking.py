"""Removing filters in the middle of a stage: a smaller training state from a training state."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tpp.channels.cuts import Cut, cut_tensors
from tpp.channels.removal import pruned_on_meta
from tpp.checkpoints.training_state import TrainingState
from tpp.plan import PruningPlan
from train.distributed.collectives import EveryRankError
from train.run_folder.networks import Shapes


def shrunk(state: TrainingState, plan: PruningPlan, network: nn.Module) -> TrainingState:
    """The state of a stage without the filters of a plan; their momentum and averages go too.

    Args:
        state: all of a stage under way, the optimiser's part included.
        plan: filters to remove, of the network as it is now.
        network: what the stage trains, on any device; its values are not looked at.

    Raises:
        UserError: the plan does not fit the network.
    """
    cuts, _, _ = pruned_on_meta(network, plan, state.model)
    shapes = {name: tensor.shape for name, tensor in state.model.items()}
    names = [name for name, _ in network.named_parameters()]
    optimizer = {
        **state.optimizer,
        "state": {
            number: _cut_entries(entries, names[int(number)], cuts, shapes)
            for number, entries in state.optimizer["state"].items()
        },
    }
    return replace(
        state,
        model=cut_tensors(state.model, cuts),
        average=cut_tensors(state.average, cuts) if state.average else {},
        optimizer=optimizer,
    )


def shrunk_shapes(plan: PruningPlan, network: nn.Module) -> Shapes:
    """The shapes of an ordinary network's tensors without the filters of a plan."""
    _, pruned, _ = pruned_on_meta(network, plan, network.state_dict())
    return {name: tuple(tensor.shape) for name, tensor in pruned.state_dict().items()}


def _cut_entries(
    entries: Mapping[str, Any],
    name: str,
    cuts: Mapping[str, Sequence[Cut]],
    shapes: Mapping[str, torch.Size],
) -> dict[str, Any]:
    """What an optimiser keeps of a parameter; numbers, such as of steps, stay."""
    whole = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    odd = [key for key, value in whole.items() if value.dim() and value.shape != shapes[name]]
    if odd and name in cuts:
        raise EveryRankError(
            f"the optimiser keeps {odd[0]} of {name} in a form of its own, from which filters "
            "cannot be removed; use another optimiser with a method that removes filters while it "
            "trains"
        )
    shaped = {key: list(cuts[name]) for key, value in whole.items() if name in cuts and value.dim()}
    return {**entries, **cut_tensors(whole, shaped)}
