"""The truth that pruning is held to: the dense network with the same filters zeroed.

What has to be zeroed beside the filters (the entries of the norms on their way) is found out by
sending NaN through the network, without any of the code under test.
"""

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tpp.models.architecture import build_model


def randomised(name, dtype=torch.float64, classes=10, **args):
    """A network in which all parameters do something, and no random masks are drawn."""
    torch.manual_seed(0)
    model = build_model(name, classes, **args).to(dtype)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        for parameter in module.parameters(recurse=False):
            if parameter.abs().max() < 1e-4:  # scales and tokens that begin as good as zero
                nn.init.normal_(parameter, std=0.3)
        for rate in ("p", "drop_rate", "drop_prob"):  # dropout and stochastic depth
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    return model


def _is_depthwise(module):
    return module.groups > 1 and module.groups == module.in_channels


def reached(model, pruned, example):
    """Run with NaN in some filters: which inputs of which layers and norms it reaches.

    Consumers see zeros instead, so that nothing behind them is reached; depthwise convolutions
    and norms pass NaN on.
    """
    model = copy.deepcopy(model).eval()
    found = {}

    def watch(name, module):
        def hook(_, args):
            x = args[0]
            channels = 1 if isinstance(module, nn.Conv2d | _BatchNorm) else x.dim() - 1
            others = [d for d in range(x.dim()) if d != channels]
            nan = x.isnan().amax(others) if others else x.isnan()
            if nan.any():
                found[name] = nan.nonzero().flatten().tolist()
            passes = isinstance(module, _BatchNorm) or (
                isinstance(module, nn.Conv2d) and _is_depthwise(module)
            )
            return None if passes else (x.nan_to_num(0.0),)

        module.register_forward_pre_hook(hook)

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | _BatchNorm):
            watch(name, module)
    with torch.no_grad():
        for layer, filters in pruned.items():
            model.get_submodule(layer).weight[filters] = float("nan")
        assert not model(example).isnan().any(), "filters reach the output on a way of their own"
    return found


@torch.no_grad()
def zeroed(model, pruned, example):
    """A copy with the filters of ``pruned``, their biases and their norms' entries at zero."""
    result = copy.deepcopy(model)
    for layer, filters in pruned.items():
        for parameter in result.get_submodule(layer).parameters():
            parameter[filters] = 0
    for name, channels in reached(model, pruned, example).items():
        module = result.get_submodule(name)
        if isinstance(module, _BatchNorm):
            module.weight[channels] = 0
            module.bias[channels] = 0
    return result


def relative_difference(actual, expected):
    """Largest difference over the largest value."""
    assert actual.shape == expected.shape and expected.abs().max() > 0
    return ((actual - expected).abs().max() / expected.abs().max()).item()
