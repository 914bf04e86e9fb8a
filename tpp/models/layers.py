"""The layers of a network whose filters can go, and their sizes."""

import difflib
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from tpp.common.errors import UserError
from tpp.plan import PruningPlan


def check_layers(model: nn.Module, layers: Iterable[str]) -> None:
    """Raise UserError if one of ``layers`` is no Conv2d or Linear layer of the model."""
    prunable = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers:
        if layer not in prunable:
            near = difflib.get_close_matches(layer, prunable, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {len(prunable)}"
            raise UserError(f"no Conv2d or Linear layer is called {layer!r}; {hint}")


def how_computed(layer: Any) -> str | None:
    """By what the weight of a layer is computed from others, and the call that ends that; None if
    it is a parameter.
    """
    if "weight" in layer._parameters:
        return None
    if parametrize.is_parametrized(layer, "weight"):
        names = " and ".join(type(p).__name__.strip("_") for p in layer.parametrizations.weight)
        return f"{names}: call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            return "torch.nn.utils.prune: call torch.nn.utils.prune.remove(layer, 'weight')"
        if isinstance(hook, WeightNorm):
            return "weight_norm: call torch.nn.utils.remove_weight_norm(layer)"
        if isinstance(hook, SpectralNorm):
            return "spectral_norm: call torch.nn.utils.remove_spectral_norm(layer)"
    return "the network's code: make it a parameter"


@torch.no_grad()
def make_weights_plain(model: nn.Module, kind: type[nn.Module]) -> None:
    """Make every weight that is parametrised by a ``kind`` a parameter again, of the same value."""
    for layer in model.modules():
        if parametrize.is_parametrized(layer, "weight"):
            parametrizations: Any = layer.parametrizations
            if isinstance(parametrizations["weight"][0], kind):
                _make_weight_plain(layer)


def _make_weight_plain(layer: nn.Module) -> None:
    value: Tensor = cast(Any, layer).weight
    weight = nn.Parameter(value.clone())
    parametrize.remove_parametrizations(layer, "weight")
    layer.weight = weight
    # The weight comes first, as the layer's class has it.
    for key in [key for key in layer._parameters if key != "weight"]:
        layer._parameters[key] = layer._parameters.pop(key)


def layer_widths(model: nn.Module) -> dict[str, list[int]]:
    """[inputs, outputs] of every Conv2d and Linear layer, in network order."""
    widths = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            widths[name] = [module.in_channels, module.out_channels]
        elif isinstance(module, nn.Linear):
            widths[name] = [module.in_features, module.out_features]
    return widths


def prunable_layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Every Conv2d and Linear of ``model`` by name, in the order in which they were defined."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


def filters_removed(model: nn.Module, plan: PruningPlan) -> bool:
    """Whether a network has the widths that a plan leaves, rather than those that it begins with.

    False for a plan by which nothing goes.
    """
    layers = prunable_layers(model)
    return bool(plan.active_layers) and all(
        layer in layers
        and layers[layer].weight.shape[0] == plan.filters[layer] - len(plan.pruned[layer])
        for layer in plan.active_layers
    )


def layer_sizes(model: nn.Module, plan: PruningPlan) -> tuple[dict[str, int], dict[str, int]]:
    """Weights per filter, and groups of the convolution (1 if none), of every layer of a plan."""
    layers = prunable_layers(model)
    row_sizes = {layer: layers[layer].weight[0].numel() for layer in plan.filters}
    return row_sizes, {layer: getattr(layers[layer], "groups", 1) for layer in plan.filters}
