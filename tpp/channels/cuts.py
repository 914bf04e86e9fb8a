"""What every tensor loses when the filters of a plan go."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpp.channels.channel_map import LayerChannels, check_plan
from tpp.common.errors import UserError
from tpp.plan import PruningPlan


@dataclass(frozen=True)
class Cut:
    """What one tensor loses along one dimension.

    Attributes:
        dim: the dimension.
        kept: int64, the positions that stay, in order.
        groups: see :class:`tpp.channels.channel_map.Slice`.
    """

    dim: int
    kept: Tensor
    groups: int = 1

    def apply(self, tensor: Tensor) -> Tensor:
        """The smaller tensor, a new one; (rows, inputs of one group, ...) if in groups."""
        kept = self.kept.to(tensor.device)
        if self.groups == 1:
            return tensor.index_select(self.dim, kept)
        # Of each group's rows another set of columns goes, as many of every group.
        columns = tensor.shape[1]
        blocks = tensor.view(self.groups, -1, *tensor.shape[1:])
        per_group = (kept % columns).view(self.groups, -1)
        return torch.cat([b.index_select(1, k) for b, k in zip(blocks, per_group, strict=True)])


def cuts_of(
    plan: PruningPlan,
    channels: Mapping[str, LayerChannels],
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, list[Cut]]:
    """What every tensor loses when the filters of a plan go.

    Args:
        plan: which filters go.
        channels: what goes with them, for every layer that loses any, see
            :func:`tpp.channels.channel_map.find_channels`.
        shapes: of the network's tensors.

    Returns:
        Per tensor that shrinks its cuts, in the order in which to make them.

    Raises:
        UserError: the plan does not fit the network, see also
            :func:`tpp.channels.channel_map.check_plan`.
    """
    gone: dict[tuple[str, int], list[Tensor]] = {}
    groups: dict[tuple[str, int], int] = {}
    for layer in plan.active_layers:
        if layer not in channels:
            raise UserError(f"plan: {layer}: nothing is known about this layer's channels")
        weight = shapes.get(channels[layer].weight)
        filters = "none" if weight is None else weight[0]
        if plan.filters[layer] != filters:
            raise UserError(
                f"plan: {layer}: is for {plan.filters[layer]} filters, the network has {filters}"
            )
        pruned = torch.tensor(plan.pruned[layer])
        for entry in channels[layer].slices:
            key = entry.tensor, entry.dim
            gone.setdefault(key, []).append(entry.positions[pruned].flatten())
            groups[key] = entry.groups
    check_plan(plan, channels)
    cuts: dict[str, list[Cut]] = {}
    for (name, dim), positions in gone.items():
        number = groups[name, dim]
        stays = torch.ones(shapes[name][dim] * number, dtype=torch.bool)
        stays[torch.cat(positions)] = False
        cuts.setdefault(name, []).append(Cut(dim, stays.nonzero().flatten(), number))
    # Columns of groups first: they need the groups' rows all there.
    return {name: sorted(own, key=lambda cut: -cut.groups) for name, own in cuts.items()}


def cut_tensors(tensors: Mapping[str, Tensor], cuts: Mapping[str, list[Cut]]) -> dict[str, Tensor]:
    """Make the cuts: new tensors where something is taken out, the given ones elsewhere."""
    result = dict(tensors)
    for name, own in cuts.items():
        for cut in own:
            result[name] = cut.apply(result[name])
    return result
