"""What can go in a network, before anything is pruned: which layers, at what gain, and by what
patterns a configuration names them.
"""

import glob
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from tpp.channels.channel_map import LayerChannels
from tpp.channels.survey import survey
from tpp.channels.trials import Trials
from tpp.measure.counts import Counts, count
from tpp.selection.budget import Unit, WidthCost
from tpp.selection.selection import losses_of, tied_sets

# Numbers in a layer's name of which every choice becomes a pattern.
_MOST_NUMBERS = 6
# Layers that a pattern may match though they are to stay, each of which takes a line.
_MOST_SPARED = 2


@dataclass(frozen=True)
class Removable:
    """Filters that can go.

    Attributes:
        layers: those that lose the same filters, in network order; one that can lose them alone.
        filters: of each of them.
        groups: parts of the filters that must each lose as many; 1 where any can go.
        macs: multiply-accumulates for one image that all of them take part in.
        parameters: that belong to them: what would be gone without these layers' outputs.
        inexact: why removing them is not the same as zeroing them; None if it is.
    """

    layers: tuple[str, ...]
    filters: int
    groups: int
    macs: int
    parameters: int
    inexact: str | None


@dataclass(frozen=True)
class Patterns:
    """How ``pruning.ratios`` names layers.

    Attributes:
        chosen: patterns that match what is wanted.
        spared: names of layers that these match too and that get the ratio 0, after them.
    """

    chosen: tuple[str, ...]
    spared: tuple[str, ...] = ()

    def ratios(self, ratio: float) -> dict[str, float]:
        """The section of a configuration, with one ratio for all."""
        return {**dict.fromkeys(self.chosen, ratio), **dict.fromkeys(self.spared, 0.0)}


@dataclass(frozen=True)
class WhatCanGo:
    """What can go in a network.

    Attributes:
        counts: of the network.
        layers: all Conv2d and Linear layers with their filters, in network order.
        alone: layers that can lose filters with nothing else named.
        coupled: sets of layers that can do so together only.
        along: layers that lose what others do (depthwise convolutions, gates), and these.
        refused: per other layer the reason.
        patterns: name the layers that can go alone as zeroing them would.
        coupled_patterns: those and the coupled sets, with ``pruning.coupled``.
    """

    counts: Counts
    layers: Mapping[str, int]
    alone: Sequence[Removable]
    coupled: Sequence[Removable]
    along: Mapping[str, tuple[str, ...]]
    refused: Mapping[str, str]
    patterns: "Patterns"
    coupled_patterns: "Patterns"


def what_can_go(model: nn.Module) -> WhatCanGo:
    """Find out what can go in a network; its weights do not matter.

    Args:
        model: any classifier of images, on any device; left alone.

    Raises:
        UserError: it cannot be run, see :func:`tpp.channels.channel_map.find_channels`.
    """
    trials, counts = Trials(model), count(model)
    single, together = survey(trials, coupled=False), survey(trials, coupled=True)
    filters = {layer: _filters(model, layer) for layer in trials.channel_map.layers}
    sets = tied_sets(together.channels)
    alone = _removable(model, counts, single.channels, tied_sets(single.channels))
    ties = [layers for layers in sets if layers[0] not in single.channels]
    coupled = _removable(model, counts, together.channels, ties)
    named = {layer for layers in sets for layer in layers}
    along: dict[str, tuple[str, ...]] = {}
    for layer in filters:
        leaders = tuple(n for n in trials.channel_map.leaders(layer) if n in named)
        if layer not in named and leaders:
            along[layer] = leaders
    exact = [found.layers for found in alone if found.inexact is None]
    exact_sets = [*exact, *(found.layers for found in coupled if found.inexact is None)]
    return WhatCanGo(
        counts=counts,
        layers=filters,
        alone=alone,
        coupled=coupled,
        along=along,
        refused={n: why for n, why in together.refused.items() if n not in along},
        patterns=covering(exact, [*filters]),
        coupled_patterns=covering(exact_sets, [*filters]),
    )


def _filters(model: nn.Module, layer: str) -> int:
    return len(model.get_submodule(layer).weight)  # type: ignore[arg-type]


def _removable(
    model: nn.Module,
    counts: Counts,
    channels: Mapping[str, LayerChannels],
    sets: Sequence[tuple[str, ...]],
) -> list[Removable]:
    found = []
    for layers in sets:
        members = [channels[layer] for layer in layers]
        filters, groups = members[0].filters, math.lcm(*(member.groups for member in members))
        per_group = filters // groups
        unit = Unit(layers, filters, groups, 1, per_group, losses_of(members, groups))
        all_of_it = torch.tensor([per_group])
        macs, parameters = (
            cost.dense - cost.one(all_of_it)
            for cost in (
                WidthCost.of_macs(model, counts, [unit]),
                WidthCost.of_parameters(model, counts, [unit]),
            )
        )
        why = next((member.inexact for member in members if member.inexact), None)
        found.append(Removable(layers, filters, groups, macs, parameters, why))
    return found


def covering(wanted: Sequence[tuple[str, ...]], layers: Sequence[str]) -> Patterns:
    """Few patterns, as ``pruning.ratios`` takes them, that match of each set a layer.

    Greedy: the pattern that covers most of what is left for each line that it takes, then the one
    with fewest asterisks, then the one that says most.

    Args:
        wanted: sets of layers, in network order.
        layers: all layers; those of no set are matched by no pattern, or spared.
    """
    others = {*layers} - {layer for together in wanted for layer in together}
    covers: dict[str, set[int]] = {}
    spares: dict[str, set[str]] = {}
    for pattern in dict.fromkeys(
        pattern for together in wanted for layer in together for pattern in _patterns(layer)
    ):
        matched = {layer for layer in layers if fnmatchcase(layer, pattern)}
        if len(matched & others) <= _MOST_SPARED:
            covers[pattern] = {n for n, together in enumerate(wanted) if matched & {*together}}
            spares[pattern] = matched & others
    chosen: list[str] = []
    left, spared = {*range(len(wanted))}, set[str]()
    while left:
        best = max(
            covers,
            key=lambda pattern: (
                len(covers[pattern] & left) / (1 + len(spares[pattern] - spared)),
                -pattern.count("*"),
                len(pattern),
            ),
        )
        chosen.append(best)
        left, spared = left - covers[best], spared | spares[best]
    return Patterns(tuple(chosen), tuple(layer for layer in layers if layer in spared))


def _patterns(layer: str) -> Iterator[str]:
    """The layer's name, and what is left of it with asterisks for numbers or for its beginning."""
    parts = re.split(r"(\d+)", layer)
    places = range(1, len(parts), 2)
    chosen: Iterator[tuple[int, ...]] = iter([(), tuple(places)])
    if len(places) <= _MOST_NUMBERS:
        sizes = range(len(places) + 1)
        chosen = itertools.chain.from_iterable(itertools.combinations(places, n) for n in sizes)
    for starred in chosen:
        text = "".join(
            "*" if place in starred else glob.escape(part) for place, part in enumerate(parts)
        )
        yield re.sub(r"\*(\.\*)+", "*", text)
    names = layer.split(".")
    for length in range(1, len(names)):
        yield f"*.{glob.escape('.'.join(names[length:]))}"
    yield "*"
