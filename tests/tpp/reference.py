"""TPP written plainly from its equations: float64, autograd, full gram matrices, no cleverness.

What every implementation of the regularised stage is compared with. Nothing of tpp is used.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn


def dense_rows(module: nn.Conv2d | nn.Linear) -> Tensor:
    """The weight as n x d with d = c_in * k_h * k_w.

    A convolution in groups as the dense one that it is: zero outside its own group's inputs.
    """
    weight = module.weight
    if isinstance(module, nn.Linear) or module.groups == 1:
        return weight.reshape(weight.shape[0], -1)
    n, per_group = weight.shape[0], weight.shape[1]
    rows = []
    for i in range(n):
        before = i // (n // module.groups) * per_group
        after = module.in_channels - before - per_group
        rows.append(nn.functional.pad(weight[i], (0, 0, 0, 0, before, after)).reshape(-1))
    return torch.stack(rows)


def growth(step: int, delta: float, tau: float, interval: int) -> float:
    """Lambda: every K_u steps set to Delta * it / K_u, until tau."""
    strength = 0.0
    for it in range(step + 1):
        if it % interval == 0:
            strength = min(tau, delta * (it / interval))
    return strength


def growth_steps(delta: float, tau: float, interval: int) -> int:
    """The first step at lambda = tau."""
    return interval * math.ceil(round(tau / delta, 6))


def penalty(
    net: nn.Module,
    pruned: Mapping[str, Sequence[int]],
    norms: Mapping[str, Sequence[str]],
    strength: float,
    gram_weight: float,
) -> Tensor:
    """Gram penalty, and decays whose gradients are lambda * w, lambda * gamma, lambda * beta."""
    total = torch.zeros((), dtype=torch.float64)
    for layer, indices in pruned.items():
        module = net.get_submodule(layer)
        assert isinstance(module, nn.Conv2d | nn.Linear)
        W = dense_rows(module)
        n = len(W)
        gone = torch.zeros(n, dtype=torch.bool)
        gone[list(indices)] = True
        M = (gone[:, None] | gone[None, :]).to(W.dtype)
        total = total + gram_weight * strength / n**2 * (M * (W @ W.T) ** 2).sum()
        vectors = [module.weight] + ([module.bias] if module.bias is not None else [])
        for name in norms.get(layer, ()):
            vectors += list(net.get_submodule(name).parameters())
        for vector in vectors:
            total = total + strength / 2 * (vector[gone] ** 2).sum()
    return total


def zero_out(
    net: nn.Module,
    pruned: Mapping[str, Sequence[int]],
    norms: Mapping[str, Sequence[str]],
    steps_into_phase: int,
    interval: int,
) -> None:
    """Layer number q at zero from (q + 1) * interval steps into the stabilise phase."""
    layers = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for q, layer in enumerate(layers):
        if layer in pruned and steps_into_phase >= (q + 1) * interval:
            for module in (layer, *norms.get(layer, ())):
                for parameter in net.get_submodule(module).parameters():
                    parameter.data[list(pruned[layer])] = 0


def train(
    net: nn.Module,
    task_loss: Callable[[nn.Module, int], Tensor],
    pruned: Mapping[str, Sequence[int]],
    norms: Mapping[str, Sequence[str]],
    *,
    steps: int,
    schedule: tuple[float, float, int, int],
    gram_weight: float,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """SGD with momentum on task loss and penalty; ``schedule`` is Delta, tau, K_u, zero-out."""
    delta, tau, interval, zero_out_interval = schedule
    velocity = [torch.zeros_like(p) for p in net.parameters()]
    for step in range(steps):
        loss = task_loss(net, step)
        strength = growth(step, delta, tau, interval)
        loss = loss + penalty(net, pruned, norms, strength, gram_weight)
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for p, v, g in zip(net.parameters(), velocity, gradients, strict=True):
                v.mul_(momentum).add_(g + weight_decay * p)
                p.sub_(lr * v)
        zero_out(net, pruned, norms, step - growth_steps(delta, tau, interval), zero_out_interval)
