"""Which tensors lose what when a filter goes, worked out from the network's own operations."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tpp.channels.labels import LabelStore
from tpp.channels.planes import Labels
from tpp.channels.tracing import trace_channels
from tpp.common.errors import UserError
from tpp.models.architecture import example_input_for
from tpp.models.layers import check_layers, how_computed
from tpp.plan import PruningPlan


@dataclass(frozen=True)
class Slice:
    """What one tensor loses.

    Attributes:
        tensor: name in the model's ``state_dict``.
        dim: the dimension along which it shrinks.
        positions: int64, (filters, k): with filter i go the positions ``positions[i]``. k is 1
            except where channels are flattened into a Linear layer (H*W), or where a
            concatenation holds them more than once.
        groups: 1, or the number of groups of the convolution whose input channels these are.
            ``positions`` then count over all its input channels, of which the weight's dimension
            1 holds one group's: filters of group g lose those of group g.
    """

    tensor: str
    dim: int
    positions: Tensor
    groups: int = 1


@dataclass(frozen=True)
class Norm:
    """The entries of a normalisation layer that belong to the filters of a layer.

    Attributes:
        module: the layer's name.
        features: its number of channels; more than the filters behind a concatenation.
        positions: int64, (filters, k): the entries of filter i.
    """

    module: str
    features: int
    positions: Tensor


@dataclass(frozen=True)
class LayerChannels:
    """Everything that goes with the filters of one layer.

    Attributes:
        layer: the layer's name.
        filters: its number of filters (output channels or neurons).
        weight: ``state_dict`` name of its weight; filter i is row i.
        bias: ``state_dict`` name of its bias, None if it has none.
        norms: the BatchNorm modules that normalise these channels, in order. One that several
            layers feed, added up, is named with the first of them only.
        tied: the other layers that lose the same filters, because they are added to or multiplied
            with these (or are a depthwise convolution of them): those asked for, or, if asked for
            ``coupled``, all of which filters would not be zero otherwise.
        groups: parts of the filters, equal and in a row, that must each lose as many: the groups
            of a convolution in groups, this one or one that reads it; 1 where any filters can go.
        slices: all tensors that shrink: the layer's own, those of norms and depthwise
            convolutions on the way, and the consumers' input channels.
        inexact: why removing the filters is not the same as zeroing them (a LayerNorm takes its
            mean over them, say), None if it is.
    """

    layer: str
    filters: int
    weight: str
    bias: str | None
    norms: tuple[Norm, ...]
    tied: tuple[str, ...]
    groups: int
    slices: tuple[Slice, ...]
    inexact: str | None = None


def find_channels(
    model: nn.Module,
    layers: Iterable[str],
    *,
    coupled: bool = False,
    example_input: Tensor | None = None,
) -> dict[str, LayerChannels]:
    """Find what is removed together with the filters of ``layers``.

    The network is traced once, on a copy without memory, whatever device it is on; the model
    itself is left alone. See :mod:`tpp.channels.tracing` for how.

    Args:
        model: any classifier of images.
        layers: names of Conv2d or Linear layers. Layers that are tied by an addition are found
            together or not at all: name all of them, or ask for ``coupled``.
        coupled: add the layers that have to lose the same filters to those asked for.
        example_input: a batch to trace with, (1, channels, height, width); by default what the
            model's architecture expects, see :func:`tpp.models.architecture.example_input_for`.

    Returns:
        One entry per layer, in the order of ``layers``; with ``coupled`` in network order.

    Raises:
        UserError: the model cannot be run on the input; there is no such layer; or its filters
            cannot go, because they feed an addition together with those of a layer that is not
            named, are the network's output, or reach an operation that cannot be narrowed.
    """
    layers = list(layers)
    if not layers:
        return {}
    check_layers(model, layers)  # before the network is traced, which takes longer
    return ChannelMap(model, example_input=example_input).find(layers, coupled=coupled)


def check_plan(plan: PruningPlan, channels: Mapping[str, LayerChannels]) -> None:
    """Check that what a plan removes can be removed.

    Raises:
        UserError: tied layers lose different filters, or the groups of a convolution lose
            different numbers of filters.
    """
    for layer in plan.active_layers:
        found = channels[layer]
        for other in found.tied:
            if plan.pruned.get(other) != plan.pruned[layer]:
                raise UserError(
                    f"plan: {layer} and {other} are tied and must lose the same filters"
                )
        per_group = found.filters // found.groups
        lost = Counter(index // per_group for index in plan.pruned[layer])
        if len(set(lost.values())) > 1 or len(lost) < found.groups:
            raise UserError(
                f"plan: {layer}: each of its {found.groups} groups must lose as many filters"
            )


class ChannelMap:
    """One network's channels.

    Attributes:
        example_input: the batch that it was traced with.
        layers: its Conv2d and Linear layers, in network order.
        axes: per tensor and dimension the class of every position (all positions of a class go at
            once), and the number of groups if these are the inputs of a convolution in groups.
        numbers: what the network computes with, in evaluation mode.

    Args:
        model: any classifier of images, on any device; left alone.
        example_input: see :func:`find_channels`.
        dense: the network from which ``model`` was pruned, if it was.

    Raises:
        UserError: the model cannot be run on the input.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        example_input: Tensor | None = None,
        dense: "ChannelMap | None" = None,
    ) -> None:
        self.example_input = example_input_for(model) if example_input is None else example_input
        kinds = dense._trace.group_kinds if dense else None
        trace, self.numbers = trace_channels(model, self.example_input, kinds)
        self._trace: LabelStore = trace
        self._modules = dict(model.named_modules())
        self.layers = [
            name for name, m in self._modules.items() if isinstance(m, nn.Conv2d | nn.Linear)
        ]
        self._rows = {
            layer: rows
            for layer in self.layers
            if (rows := trace.rows(f"{layer}.weight")) is not None
        }
        self._classes = {layer: trace.classes(rows) for layer, rows in self._rows.items()}
        self._followers = {
            layer
            for layer, rows in self._rows.items()
            if set(trace.sources(rows).tolist()) <= trace.followers
        }
        self._partitions = [
            (trace.classes(part.labels).tolist(), part.groups, part.module)
            for part in trace.partitions
        ]
        self.axes = {
            (axis.tensor, axis.dim): (trace.classes(axis.labels), axis.groups)
            for axis in trace.axes
        }
        self._keys = list(self.axes)
        # All positions of all axes in one table, sorted by class: class, axis, position.
        self._table = _table(classes for classes, _ in self.axes.values())
        self._norm_table = _table(trace.norm_inputs.values())
        self._layers_of: dict[int, list[str]] = {}
        for layer, classes in self._classes.items():
            for number in set(classes.tolist()):
                self._layers_of.setdefault(number, []).append(layer)

    def find(self, layers: Iterable[str], *, coupled: bool = False) -> dict[str, LayerChannels]:
        """See :func:`find_channels`."""
        named = self.with_partners(layers) if coupled else list(layers)
        return {layer: self.channels(layer, set(named)) for layer in named}

    def with_partners(self, layers: Iterable[str]) -> list[str]:
        """These layers and all that have to lose the same filters, in network order."""
        wanted = set(layers)
        for layer in list(wanted):
            if layer in self._classes:
                wanted |= set(self._partners(layer)) - self._followers
        return [layer for layer in self.layers if layer in wanted]

    def leaders(self, layer: str) -> tuple[str, ...]:
        """The layers whose filters one only gates or filters one by one, and goes along with."""
        if layer not in self._followers:
            return ()
        return tuple(other for other in self._partners(layer) if other not in self._followers)

    def _partners(self, layer: str) -> list[str]:
        """The other layers any of whose filters go with those of ``layer``, in network order."""
        found = {o for number in self._classes[layer].tolist() for o in self._layers_of[number]}
        return [other for other in self.layers if other in found and other != layer]

    def channels(self, layer: str, named: set[str]) -> LayerChannels:
        """What goes with the filters of ``layer`` when all of ``named`` are to be pruned.

        Raises:
            UserError: its filters cannot go, see :func:`find_channels`.
        """
        module: Any = self._modules[layer]
        if how := how_computed(module):
            raise UserError(f"{layer}: its weight is computed by {how} first")
        if module.weight.shape[0] == 1:
            raise UserError(f"{layer}: its only filter must stay")
        if layer not in self._rows:
            raise UserError(f"{layer}: not used by the network's forward pass")
        partners = self._partners(layer)
        tied = self._check(layer, partners, named)
        return LayerChannels(
            layer=layer,
            filters=len(self._rows[layer]),
            weight=f"{layer}.weight",
            bias=f"{layer}.bias" if module.bias is not None else None,
            norms=self._norms(layer, [o for o in partners if o not in named], tied),
            tied=tied,
            groups=self._groups(layer),
            slices=self._slices(layer),
            inexact=self._trace.why_inexact(self._classes[layer].tolist()),
        )

    def _check(self, layer: str, partners: list[str], named: set[str]) -> tuple[str, ...]:
        """The layers that lose the same filters; refuses a layer whose filters cannot go."""
        classes = self._classes[layer]
        for number in classes.tolist():
            if reason := self._trace.why_frozen(number):
                raise UserError(f"{layer}: its filters {reason}")
        if len(set(classes.tolist())) < len(classes):
            raise UserError(f"{layer}: its filters are tied to each other")
        missing = [o for o in partners if o not in self._followers and o not in named]
        if missing and layer in self._followers:
            raise UserError(
                f"{layer}: its filters only gate or filter those of {', '.join(missing)} one by "
                f"one and go along with them: prune {'that' if len(missing) == 1 else 'those'}"
            )
        if missing:
            raise UserError(
                f"{layer}: its filters are added to or multiplied with those of "
                f"{', '.join(missing)} and cannot be removed alone: prune all of these layers, "
                "by the same ratio (coupled does it), or none"
            )
        tied = tuple(other for other in partners if other in named)
        for other in tied:
            if not np.array_equal(self._classes[other], classes):
                raise UserError(
                    f"{layer}: only some of its filters are tied to those of {other}, or in "
                    "another order"
                )
        return tied

    def _slices(self, layer: str) -> tuple[Slice, ...]:
        """What every tensor loses with the layer's filters."""
        classes = self._classes[layer]
        filter_of, owners, places = _rows(self._table, classes)
        slices = []
        for number in np.unique(owners):
            (tensor, dim), mine = self._keys[number], owners == number
            counts = np.bincount(filter_of[mine], minlength=len(classes))
            if len(set(counts.tolist())) > 1:
                raise UserError(f"{layer}: {tensor} holds some of its filters more often")
            positions = torch.from_numpy(places[mine].reshape(len(classes), -1))
            slices.append(Slice(tensor, dim, positions, self.axes[tensor, dim][1]))
        return tuple(slices)

    def _norms(self, layer: str, others: list[str], tied: tuple[str, ...]) -> tuple[Norm, ...]:
        """The norms that this layer feeds, or one that goes along with it and is not named."""
        fed = {label: number for number, label in enumerate(self._rows[layer].tolist())}
        leaders = [o for o in self.layers if o in (layer, *tied) and o not in self._followers]
        if leaders[:1] in ([layer], []):
            number_of = {c: number for number, c in enumerate(self._classes[layer].tolist())}
            for other in others:
                pairs = zip(self._rows[other].tolist(), self._classes[other].tolist(), strict=True)
                fed |= {label: number_of[c] for label, c in pairs if c in number_of}
        norms, names = [], list(self._trace.norm_inputs)
        number, owners, places = _rows(self._norm_table, np.fromiter(fed, np.int64, len(fed)))
        filters = np.fromiter(fed.values(), np.int64, len(fed))[number]
        for owner in np.unique(owners):
            mine = owners == owner
            ordered = np.lexsort((places[mine], filters[mine]))
            positions = torch.from_numpy(places[mine][ordered])
            features = len(self._trace.norm_inputs[names[owner]])
            norms.append(Norm(names[owner], features, positions.view(len(self._rows[layer]), -1)))
        return tuple(norms)

    def _groups(self, layer: str) -> int:
        """Equal parts of the filters that must lose as many each."""
        number_of = {c: number for number, c in enumerate(self._classes[layer].tolist())}
        filters, groups = len(number_of), 1
        for classes, parts, module in self._partitions:
            size = len(classes) // parts
            part_of = {
                number_of[c]: place // size for place, c in enumerate(classes) if c in number_of
            }
            if not part_of:
                continue
            if part_of != {number: number * parts // filters for number in range(filters)}:
                raise UserError(
                    f"{layer}: feeds {module}, a convolution in {parts} groups, together with "
                    "other channels"
                )
            groups = math.lcm(groups, parts)
        if filters % groups:
            raise UserError(f"{layer}: its filters cannot be shared out among {groups} groups")
        return groups


def _table(parts: Iterable[Labels]) -> tuple[Labels, Labels, Labels]:
    """All positions of some labelled axes, sorted by label: label, number of the axis, position."""
    parts = [np.zeros(0, np.int64), *parts]
    labels = np.concatenate(parts)
    owner = np.repeat(np.arange(len(parts)) - 1, [len(part) for part in parts])
    place = np.concatenate([np.arange(len(part)) for part in parts])
    order = np.argsort(labels, kind="stable")
    return labels[order], owner[order], place[order]


def _rows(table: tuple[Labels, Labels, Labels], wanted: Labels) -> tuple[Labels, Labels, Labels]:
    """Where labels are in a table: which of those that are wanted, axis, position."""
    labels, owner, place = table
    first, last = np.searchsorted(labels, wanted), np.searchsorted(labels, wanted, "right")
    count = last - first
    rows = np.repeat(first + count - np.cumsum(count), count) + np.arange(count.sum())
    return np.repeat(np.arange(len(wanted)), count), owner[rows], place[rows]
