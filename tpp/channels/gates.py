"""Gates on a layer's channels: behind their BatchNorm, and before the activation.

A closed channel is then as good as removed, also behind the norm's bias. A gate is any module with
an attribute ``factor``, (n or 1, filters), which it has before its norm runs.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tpp.channels.channel_map import ChannelMap, LayerChannels, Norm
from tpp.common.errors import UserError
from tpp.plan import PruningPlan

# Of a norm's attribute.
_GATES = "gates_of_layers"


def gated_layers(model: nn.Module) -> dict[str, LayerChannels]:
    """The layers that can have gates, in network order.

    Those whose filters are tied to no other layer's and can go one by one without a trace, and that
    all pass a BatchNorm with weights.
    """
    channel_map, found = ChannelMap(model), {}
    for name in channel_map.layers:
        try:
            channels = channel_map.channels(name, {name})
        except UserError:
            continue
        norms = [model.get_submodule(norm.module) for norm in channels.norms]
        if (
            norms
            and all(isinstance(norm, _BatchNorm) and norm.affine for norm in norms)
            and channels.inexact is None
            and channels.groups == 1
            and not channels.tied
        ):
            found[name] = channels
    return found


def check_gates(method: str, model: nn.Module, plan: PruningPlan) -> None:
    """Check that the layers that are to lose filters can have gates.

    Raises:
        UserError: one cannot.
    """
    found = gated_layers(model)
    for layer in plan.active_layers:
        if layer not in found:
            raise no_gates(method, layer)


def no_gates(method: str, layer: str) -> UserError:
    """What a user is told of a layer that cannot have gates."""
    return UserError(
        f"method {method}: {layer} cannot have gates: its filters do not go alone through a "
        "BatchNorm with weights to where they are read; leave it out of pruning.ratios, or name it "
        "in pruning.skip"
    )


def hang_in(model: nn.Module, found: LayerChannels, gate: nn.Module) -> list[Any]:
    """Multiply a layer's channels by ``gate.factor`` from now on.

    Args:
        model: the network, on its device.
        found: the layer's channels.
        gate: a module of the network, so that a copy of the network has its own.

    Returns:
        handles of the hooks.
    """
    hooks = []
    for norm in found.norms:
        module = cast(Any, model.get_submodule(norm.module))
        if not hasattr(module, _GATES):
            setattr(module, _GATES, ())
            hooks.append(module.register_forward_hook(_multiply))
        place = None if _in_order(norm) else norm.positions.to(module.weight.device)
        # In a tuple, where it is no part of the norm's state but goes into its copies.
        setattr(module, _GATES, (*getattr(module, _GATES), (gate, place)))
    return hooks


def close(model: nn.Module, found: LayerChannels, stays: Tensor) -> None:
    """Close channels by their BatchNorm's entries for good, and forget the layer's gate.

    Args:
        model: the network.
        found: the layer's channels.
        stays: which of them stay open, bool, (filters,).
    """
    take_off(model, found)
    for norm in found.norms:
        module = cast(Any, model.get_submodule(norm.module))
        _zero(module, norm.positions.to(module.weight.device)[~stays])
    _zero(model.get_submodule(found.layer), ~stays)  # nothing comes of them, and pruning sees it


def take_off(model: nn.Module, found: LayerChannels, hooks: Iterable[Any] = ()) -> None:
    """Forget a layer's gate.

    Args:
        model: the network.
        found: the layer's channels.
        hooks: what :func:`hang_in` returned.
    """
    for hook in hooks:
        hook.remove()
    for norm in found.norms:
        model.get_submodule(norm.module).__dict__.pop(_GATES, None)


@torch.no_grad()
def _zero(module: Any, rows: Tensor) -> None:
    module.weight[rows] = 0
    if module.bias is not None:
        module.bias[rows] = 0


def _in_order(norm: Norm) -> bool:
    """Whether a norm's channels are the filters, one by one."""
    places = norm.positions.flatten()
    return torch.equal(places, torch.arange(norm.features))


def _multiply(norm: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    for gate, places in getattr(norm, _GATES):
        factor = gate.factor.to(output.dtype)
        if places is not None:
            all_channels = factor.new_ones(len(factor), output.shape[1])
            factor = all_channels.index_copy(
                1, places.flatten(), factor.repeat_interleave(places.shape[1], 1)
            )
        output = output * factor.view(*factor.shape, *[1] * (output.dim() - 2))
    return output
