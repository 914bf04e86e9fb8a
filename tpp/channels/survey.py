"""What can go in a network, layer by layer."""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from tpp.channels.channel_map import LayerChannels
from tpp.channels.trials import Trials
from tpp.common.errors import UserError
from tpp.plan import PruningPlan


@dataclass(frozen=True)
class Survey:
    """What can go in a network.

    Attributes:
        channels: per layer whose filters can go what goes with them, in network order.
        refused: per other layer the reason, in network order.
    """

    channels: dict[str, LayerChannels]
    refused: dict[str, str]


def survey_channels(
    model: nn.Module, *, coupled: bool = False, example_input: Tensor | None = None
) -> Survey:
    """Find out of every Conv2d and Linear layer whether its filters can go, and what goes along.

    Half of the filters of all that can go are taken out for a try, without memory: layers whose
    module keeps their width as a number are refused, those from whose width a number is derived
    are inexact.

    Args:
        model: any classifier of images.
        coupled: whether layers that can only go together count; they name each other in ``tied``.
        example_input: see :func:`tpp.channels.channel_map.find_channels`.

    Raises:
        UserError: the model cannot be run on the input.
    """
    return survey(Trials(model, example_input=example_input), coupled=coupled)


def survey(trials: Trials, *, coupled: bool) -> Survey:
    """The same of a network that is at hand for trials."""
    channel_map = trials.channel_map
    channels: dict[str, LayerChannels] = {}
    refused: dict[str, str] = {}
    for layer in channel_map.layers:
        try:
            named = channel_map.with_partners([layer]) if coupled else [layer]
            channels[layer] = channel_map.channels(layer, set(named))
        except UserError as error:
            refused[layer] = str(error).removeprefix(f"{layer}: ")
    for layers, trial in trials.faults(_halves(channels), channels).items():
        for layer in layers:
            if trial.refused:
                refused[layer] = trial.refused
                channels.pop(layer, None)
            elif layer in channels:
                reason = f"change a number that the code derives from widths: {trial.changed}"
                channels[layer] = replace(
                    channels[layer], inexact=channels[layer].inexact or reason
                )
    return Survey(channels, {name: refused[name] for name in channel_map.layers if name in refused})


def _halves(channels: dict[str, LayerChannels]) -> PruningPlan:
    """A plan by which every layer loses half of its filters, or of those of each group."""
    filters, pruned = {}, {}
    for layer, found in channels.items():
        size = found.filters // found.groups
        filters[layer] = found.filters
        pruned[layer] = [i for i in range(found.filters) if i % size < size // 2]
    return PruningPlan(filters, pruned)
