"""Choosing which filters go, before any regularised step (METHOD: Wang & Fu 2023, sec. 3.2)."""

import fnmatch
import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor, nn

from tpp.errors import UserError
from tpp.plan import PruningPlan


def prunable_layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Every Conv2d and Linear of ``model`` by name, in the order in which they were defined."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


def layer_sizes(model: nn.Module, plan: PruningPlan) -> tuple[dict[str, int], dict[str, int]]:
    """Weights per filter, and groups of the convolution (1 if none), of every layer of a plan."""
    layers = prunable_layers(model)
    row_sizes = {layer: layers[layer].weight[0].numel() for layer in plan.filters}
    return row_sizes, {layer: getattr(layers[layer], "groups", 1) for layer in plan.filters}


def layer_ratios(model: nn.Module, ratios: Mapping[str, float]) -> dict[str, float]:
    """The pruning ratio of every layer that a pattern matches, in network order.

    Patterns are shell-style globs over layer names, where ``*`` also matches dots; the last
    pattern that matches a layer wins.

    Raises:
        UserError: a ratio lies outside [0, 1), or a pattern matches no Conv2d or Linear layer.
    """
    layers = list(prunable_layers(model))
    for pattern, ratio in ratios.items():
        if not 0 <= ratio < 1:
            raise UserError(f"pruning ratio of {pattern!r} must be in [0, 1), not {ratio}")
        if not fnmatch.filter(layers, pattern):
            raise UserError(
                f"pruning pattern {pattern!r} matches no Conv2d or Linear layer; "
                f"the model's layers are {_few(layers)}"
            )
    chosen = {}
    for layer in layers:
        for pattern, ratio in ratios.items():
            if fnmatch.fnmatchcase(layer, pattern):
                chosen[layer] = ratio
    return chosen


def pruned_count(ratio: float, filters: int) -> int:
    """Filters to remove from ``filters``: min(ceil(ratio * filters), filters - 1).

    The ratio is taken as the decimal it was written as, so that 0.7 of 10 is 7 and not, by a
    rounding error of binary floats, 8.
    """
    return min(math.ceil(Fraction(repr(float(ratio))) * filters), filters - 1)


def l1_scores(weight: Tensor) -> Tensor:
    """Mean absolute value of every filter of ``weight`` (n, ...); shape (n,), float32 at least."""
    rows = weight.detach().flatten(1)
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).abs().mean(1)


def select_filters(
    model: nn.Module,
    ratios: Mapping[str, float],
    *,
    example_input: Tensor | None = None,
    scores: Mapping[str, Tensor] | None = None,
) -> PruningPlan:
    """Choose the filters to remove: in every matched layer the lowest mean absolute weights.

    Layers whose filters are added to or multiplied with each other lose the same filters, those
    with the lowest sum of scores, and have to be matched together, by one ratio. A convolution in
    groups loses the lowest of every group, since the groups stay equal.

    Args:
        model: any network; only its Conv2d and Linear layers are looked at.
        ratios: layer-name pattern to pruning ratio in [0, 1), see :func:`layer_ratios`.
        example_input: a batch to trace the network with, (1, channels, height, width); by
            default what the architecture expects, 224x224 where it does not say.
        scores: per layer how much each filter is worth, (n,), instead of :func:`l1_scores`.

    Returns:
        A plan with the matched layers; ties are broken towards the lower index.

    Raises:
        UserError: see :func:`layer_ratios`; or a layer's filters cannot be removed, for they feed
            an addition with those of a layer that is not matched or by another ratio, or are the
            network's output.
    """
    # It needs Torch-Pruning, whose import takes seconds.
    from tpp.channels import find_channels

    layers = prunable_layers(model)
    chosen = layer_ratios(model, ratios)
    filters = {layer: layers[layer].weight.shape[0] for layer in chosen}
    active = [layer for layer, ratio in chosen.items() if pruned_count(ratio, filters[layer])]
    channels = find_channels(model, active, example_input=example_input)
    pruned: dict[str, list[int]] = {layer: [] for layer in chosen}
    for layer in active:
        found = channels[layer]
        for other in found.tied:
            if chosen[other] != chosen[layer]:
                raise UserError(
                    f"{layer} and {other} are tied (added to or multiplied with each other) and "
                    f"need the same ratio, not {chosen[layer]} and {chosen[other]}"
                )
        total = sum(
            l1_scores(layers[name].weight) if scores is None else scores[name]
            for name in sorted((layer, *found.tied))
        )
        assert isinstance(total, Tensor)
        pruned[layer] = _lowest(total, chosen[layer], found.groups)
    return PruningPlan(filters, pruned)


def _lowest(scores: Tensor, ratio: float, groups: int) -> list[int]:
    """The filters with the lowest scores, as many of every group; sorted indices."""
    per_group = len(scores) // groups
    count = pruned_count(ratio, per_group)
    order = torch.argsort(scores.view(groups, per_group), dim=1, stable=True)[:, :count].cpu()
    return sorted((order + per_group * torch.arange(groups)[:, None]).flatten().tolist())


def _few(names: list[str], limit: int = 6) -> str:
    shown = ", ".join(names[:limit])
    return shown + (f", ... ({len(names)} in all)" if len(names) > limit else "")
