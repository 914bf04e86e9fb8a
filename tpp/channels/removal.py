"""Removing filters from a network in memory."""

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tpp.channels.channel_map import LayerChannels
from tpp.channels.cuts import Cut, cut_tensors, cuts_of
from tpp.channels.trials import Trials, refusal
from tpp.common.errors import Note, UserError
from tpp.models.architecture import meta_copy
from tpp.models.fitting import assign_tensors, fill_buffers
from tpp.models.layers import check_layers
from tpp.plan import PruningPlan

# Share of the norm of weights below which what goes is called zero: a penalty that has done its
# work leaves less.
_AT_ZERO = 0.01


def prune_tensors(
    tensors: Mapping[str, Tensor], plan: PruningPlan, channels: Mapping[str, LayerChannels]
) -> dict[str, Tensor]:
    """Take the pruned filters, and all that goes with them, out of a ``state_dict``.

    Args:
        tensors: the dense network's tensors, any dtype and device.
        plan: which filters go.
        channels: what goes with them, for every layer that loses any, see
            :func:`tpp.channels.channel_map.find_channels`.

    Returns:
        All tensors: new ones where something was taken out, the given ones elsewhere.

    Raises:
        UserError: the plan does not fit the tensors, see also
            :func:`tpp.channels.channel_map.check_plan`.
    """
    return cut_tensors(tensors, cuts_of(plan, channels, shapes_of(tensors)))


def prune_model(
    model: nn.Module, plan: PruningPlan, *, example_input: Tensor | None = None
) -> nn.Module:
    """Make the smaller network that is left when the filters of ``plan`` are removed.

    Args:
        model: the dense network, any dtype and device; left alone.
        plan: which filters go.
        example_input: a batch to trace with, see :func:`tpp.channels.channel_map.find_channels`.

    Returns:
        A new network that shares no memory with ``model``: same class, dtype, device, training
        flags and ``architecture``, narrower layers. Parameters have no gradients. The
        autocast that Accelerate puts around a network is not taken along.

    Warns:
        Note: filters that go are not at zero, or what is left is not the dense network with these
            filters at zero.

    Raises:
        UserError: the plan does not fit the model, a layer's filters cannot go alone, or the
            network's code does not allow for the smaller widths.
    """
    tensors = model.state_dict()
    cuts, pruned, inexact = pruned_on_meta(model, plan, tensors, example_input)
    for line in (not_at_zero(tensors, plan), inexact):
        if line:
            warnings.warn(line, Note, stacklevel=2)
    smaller = cut_tensors(tensors, cuts)
    assign_tensors(pruned, {name: tensor.clone() for name, tensor in smaller.items()})
    fill_buffers(pruned, model)
    return pruned


def pruned_on_meta(
    model: nn.Module,
    plan: PruningPlan,
    tensors: Mapping[str, Tensor],
    example_input: Tensor | None = None,
    *,
    trials: Trials | None = None,
) -> tuple[Mapping[str, list[Cut]], nn.Module, str | None]:
    """The narrower network without its tensors' values, checked against the dense one.

    Args:
        model, plan, example_input: see :func:`prune_model`.
        tensors: the model's ``state_dict``, with values.
        trials: of the model, where it may have been traced already.

    Returns:
        What ``tensors`` lose; the network; and, if it is not the dense one with these filters at
        zero, a line that says why.
    """
    if not plan.active_layers:
        return {}, meta_copy(model), None
    check_layers(model, plan.active_layers)
    trials = trials or Trials(model, example_input=example_input)
    channels = trials.channel_map.find(plan.active_layers)
    trial = trials.run(plan, channels)
    if trial.refused:
        raise refusal(trials.faults(plan, channels)) or UserError(trial.refused)
    return trial.cuts, trial.network, _inexact(channels, trial.changed)


def why_inexact(
    model: nn.Module, plan: PruningPlan, *, example_input: Tensor | None = None
) -> str | None:
    """Why removal is not the same as zeroing, in one line; None if it is.

    Raises:
        UserError: the plan does not fit the model, see :func:`prune_model`.
    """
    return pruned_on_meta(model, plan, model.state_dict(), example_input)[2]


def norm_share(tensors: Mapping[str, Tensor], plan: PruningPlan) -> float | None:
    """The share of the L2 norm of a plan's layers that is in the filters that go.

    None where nothing goes, or the tensors have no values.
    """
    gone = total = 0.0
    for layer in plan.active_layers:
        weight = tensors[f"{layer}.weight"]
        if weight.is_meta:
            return None
        wide = torch.promote_types(weight.dtype, torch.float32)
        squares = weight.detach().to(wide).flatten(1).square().sum(1)
        total += squares.sum().item()
        gone += squares[plan.pruned[layer]].sum().item()
    return math.sqrt(gone / total) if total else None


def not_at_zero(tensors: Mapping[str, Tensor], plan: PruningPlan) -> str | None:
    """A line on filters that go although they are not at zero; None if they are, or nearly."""
    share = norm_share(tensors, plan)
    if share is None or share < _AT_ZERO:
        return None
    return (
        f"the filters that go are not at zero: they hold {100 * share:.0f}% of the norm of their "
        "layers' weights; accuracy falls until the network is finetuned"
    )


def _inexact(channels: Mapping[str, LayerChannels], changed: str | None) -> str | None:
    because = []
    found = [channel for channel in channels.values() if channel.inexact]
    if found:
        also = f", and of {len(found) - 1} more layers" if len(found) > 1 else ""
        because.append(f"the filters of {found[0].layer}{also} {found[0].inexact}")
    if changed:
        because.append(f"the code derives a number from widths ({changed})")
    if not because:
        return None
    return (
        f"{'; '.join(because)}: what is left is not the dense network with these filters at zero; "
        "finetune it"
    )


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, as plain numbers."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
