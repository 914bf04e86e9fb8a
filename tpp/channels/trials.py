"""Trying what becomes of a network when filters go: without memory, beside the dense one."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor, nn

from tpp.channels.channel_map import ChannelMap, LayerChannels
from tpp.channels.cuts import Cut, cuts_of
from tpp.channels.numbers import NumberTrace, training_numbers
from tpp.channels.planes import FIXED
from tpp.channels.tracing import DoesNotRunError
from tpp.common.errors import UserError
from tpp.models.architecture import meta_copy
from tpp.models.fitting import fit_to_shapes
from tpp.plan import PruningPlan


@dataclass(frozen=True)
class Trial:
    """What becomes of a network when the filters of a plan go.

    Attributes:
        cuts: what its tensors lose.
        network: the narrower one, without its tensors' values.
        refused: why that cannot be, None if it can.
        changed: which number its code derives from widths, so that what is left is not the dense
            network with these filters at zero; None if there is none.
    """

    cuts: Mapping[str, list[Cut]]
    network: nn.Module
    refused: str | None = None
    changed: str | None = None

    @property
    def fault(self) -> str | None:
        """What is wrong, None if nothing is."""
        return self.refused or self.changed


class Trials:
    """Tries plans on one network.

    Args:
        model: the dense network, on any device; left alone.
        example_input: see :func:`tpp.channels.channel_map.find_channels`.
    """

    def __init__(self, model: nn.Module, *, example_input: Tensor | None = None) -> None:
        self._model = model
        self._example_input = example_input
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    @cached_property
    def channel_map(self) -> ChannelMap:
        """The network's channels; it is traced when they are first asked for.

        Raises:
            UserError: the model cannot be run on the input.
        """
        return ChannelMap(self._model, example_input=self._example_input)

    @cached_property
    def _training(self) -> NumberTrace | None:
        return training_numbers(self._model, self.channel_map.example_input)

    def run(
        self, plan: PruningPlan, channels: Mapping[str, LayerChannels], *, training: bool = True
    ) -> Trial:
        """Take the filters of a plan out, and hold what is left against the dense network.

        It is traced too, and what stands or falls together in it must be what does in the dense
        one, less what was removed. So a network whose code counts channels in its own way (a
        branch on a width, say) is found out, even if it runs. The numbers that it computes with
        must be the dense one's, in evaluation and in training mode.

        Args:
            plan: filters to remove.
            channels: of all layers that lose any.
            training: whether to look at training mode too.

        Raises:
            UserError: the plan does not fit the network.
        """
        cuts = cuts_of(plan, channels, self._shapes)
        shapes = {name: list(shape) for name, shape in self._shapes.items()}
        for name, own in cuts.items():
            for cut in own:
                shapes[name][cut.dim] = len(cut.kept) // cut.groups
        pruned = meta_copy(self._model)
        try:
            fit_to_shapes(pruned, {name: tuple(shape) for name, shape in shapes.items()})
        except UserError as error:
            return Trial(cuts, pruned, refused=f"the network cannot be so narrow: {error}")
        before = self.channel_map
        try:
            after = ChannelMap(pruned, example_input=before.example_input, dense=before)
        except DoesNotRunError as error:
            reason = f"its code does not allow these widths ({error.place}): {error.reason}"
            return Trial(cuts, pruned, refused=reason)
        kept = {(name, cut.dim): cut.kept for name, own in cuts.items() for cut in own}
        if _reach_elsewhere(before, after, kept):
            reason = "with these widths its channels reach other places than before"
            return Trial(cuts, pruned, refused=f"{reason}; the code counts them in its own way")
        changed = before.numbers.difference(after.numbers)
        if training and changed is None and self._training is not None:
            trained = training_numbers(pruned, before.example_input)
            if trained is None:
                return Trial(cuts, pruned, refused="its code does not train with these widths")
            changed = self._training.difference(trained)
            changed = changed and f"{changed}, in training mode"
        return Trial(cuts, pruned, changed=changed)

    def faults(
        self, plan: PruningPlan, channels: Mapping[str, LayerChannels]
    ) -> dict[tuple[str, ...], Trial]:
        """Which layers of a plan are to blame for what is wrong with it: none if nothing is.

        Halves are tried, and halves of them, until layers are alone, or only together at fault.

        Returns:
            Layers that are tied, or to blame together, with the trial in which they alone lost
            filters.
        """
        return self._among(plan, channels, _tied_sets(plan.active_layers, channels))

    def _among(
        self,
        plan: PruningPlan,
        channels: Mapping[str, LayerChannels],
        units: Sequence[tuple[str, ...]],
    ) -> dict[tuple[str, ...], Trial]:
        if not units:
            return {}
        layers = [layer for unit in units for layer in unit]
        trial = self.run(_only(plan, layers), channels)
        if trial.fault is None:
            return {}
        if len(units) == 1:
            return {units[0]: trial}
        half = len(units) // 2
        found = self._among(plan, channels, units[:half])
        found |= self._among(plan, channels, units[half:])
        return found or {tuple(layers): trial}


def _only(plan: PruningPlan, layers: Iterable[str]) -> PruningPlan:
    wanted = set(layers)
    return PruningPlan(
        {layer: count for layer, count in plan.filters.items() if layer in wanted},
        {layer: gone for layer, gone in plan.pruned.items() if layer in wanted},
    )


def _tied_sets(
    layers: Iterable[str], channels: Mapping[str, LayerChannels]
) -> list[tuple[str, ...]]:
    """Layers that lose the same filters, each set once, in order."""
    sets: list[tuple[str, ...]] = []
    for layer in layers:
        if not any(layer in known for known in sets):
            sets.append((layer, *(o for o in channels[layer].tied if o != layer)))
    return sets


def _reach_elsewhere(
    before: ChannelMap, after: ChannelMap, kept: Mapping[tuple[str, int], Tensor]
) -> bool:
    """Whether channels stand together in a pruned network that do not in the dense one, or apart.

    ``kept`` has per tensor and dimension that shrinks the positions that stay.
    """
    pairs = [np.zeros((2, 0), np.int64)]
    for key, (classes, _) in after.axes.items():
        stays = kept.get(key)
        dense = before.axes[key][0]
        pairs.append(np.stack([dense if stays is None else dense[stays.numpy()], classes]))
    # One filter alone has no label of its own, so what reads it is not seen to read one thing.
    lone = [np.zeros(0, np.int64)]
    for key, stays in kept.items():
        if len(stays) == 1:
            lone.append(before.axes[key][0][stays.numpy()])
    # A class of the one must be a class of the other. Pairs as single numbers are sorted faster.
    old, new = np.concatenate(pairs, axis=1)
    size = int(new.max(initial=0)) + 1
    both = np.stack(np.divmod(np.unique(old * size + new), size))
    both = both[:, (both[1] != FIXED) & ~np.isin(both[0], np.concatenate(lone))]
    return any(len(np.unique(row)) < len(row) for row in both)


def refusal(faults: Mapping[tuple[str, ...], Trial]) -> UserError | None:
    """What to say of layers whose filters cannot go, None if all can."""
    lines = [f"{', '.join(layers)}: {t.refused}" for layers, t in faults.items() if t.refused]
    return UserError("\n".join(lines)) if lines else None
