"""Removing filters from a network in memory."""

from collections.abc import Mapping

from torch import Tensor, nn

from tpp.channels.channel_map import ChannelMap, LayerChannels, check_pruned
from tpp.channels.cuts import Cut, cut_tensors, cuts_of
from tpp.models.architecture import meta_copy
from tpp.models.fitting import assign_tensors, fill_buffers, fit_to_shapes
from tpp.models.layers import check_layers
from tpp.plan import PruningPlan


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
        flags and ``architecture``, narrower layers. Parameters have no gradients.

    Raises:
        UserError: the plan does not fit the model, a layer's filters cannot go alone, or the
            network's code does not allow for the smaller widths.
    """
    tensors = model.state_dict()
    cuts, pruned, _ = pruned_on_meta(model, plan, tensors, example_input)
    smaller = cut_tensors(tensors, cuts)
    assign_tensors(pruned, {name: tensor.clone() for name, tensor in smaller.items()})
    fill_buffers(pruned, model)
    return pruned


def pruned_on_meta(
    model: nn.Module,
    plan: PruningPlan,
    tensors: Mapping[str, Tensor],
    example_input: Tensor | None = None,
) -> tuple[dict[str, list[Cut]], nn.Module, dict[str, LayerChannels]]:
    """The cuts, and the narrower network without its tensors' values, checked against the dense."""
    pruned = meta_copy(model)
    if not plan.active_layers:
        return {}, pruned, {}
    check_layers(model, plan.active_layers)
    channel_map = ChannelMap(model, example_input=example_input)
    channels = channel_map.find(plan.active_layers)
    cuts = cuts_of(plan, channels, shapes_of(tensors))
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for name, own in cuts.items():
        for cut in own:
            shapes[name][cut.dim] = len(cut.kept) // cut.groups
    fit_to_shapes(pruned, {name: tuple(shape) for name, shape in shapes.items()})
    kept = {(name, cut.dim): cut.kept for name, own in cuts.items() for cut in own}
    check_pruned(channel_map, pruned, kept)
    return cuts, pruned, channels


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, as plain numbers."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
