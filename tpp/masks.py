"""Which weights stay: masks, how they are chosen, and how training holds them.

A mask is to weights what a plan is to filters: shapes stay, and what is masked is zero. Checkpoints
have it as their companion ``mask``, by parameter, and the pruner cuts it along with the weights.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from torch import Tensor, nn

from tpp.common.errors import UserError
from tpp.common.settings import Ratio, Section
from tpp.measure.counts import Counts

COMPANION = "mask"
# By the name of the parameter, such as ``layer1.0.conv1.weight``: true where a weight stays.
Mask = dict[str, Tensor]

_PATTERN = re.compile(r"([1-9]\d*):([1-9]\d*)")


def _in_quotes(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError("must be in quotes, as '2:4': without, YAML reads N:M as one number")
    return value


def _n_of_m(text: str) -> str:
    found = _PATTERN.fullmatch(text)
    if found is None or not int(found[1]) < int(found[2]):
        raise ValueError("must be N:M with N < M, such as '2:4': N of M weights in a row stay")
    return text


# Of a setting.
Pattern = Annotated[str, BeforeValidator(_in_quotes), AfterValidator(_n_of_m)]


class SparsifySection(Section):
    """Which single weights a network keeps (docs/masks.md). Exactly one of the first three keys.

    Attributes:
        sparsity: share of the weights of all these layers together that are zero in the end, those
            masked before included.
        fraction: share of the weights not masked yet that go now; n times ``1 - (1 - s)^(1/n)``
            comes to s (Zimmer et al. 2023).
        pattern: ``N:M``, in quotes: of M weights in a row along the input channels N stay.
        scope: whether the smallest weights of all layers together go (``global``), or the same
            share of each layer (``layer``).
        layers: patterns of the Conv2d and Linear layers whose weights may go.
        skip: patterns of those among them that are left alone.

    Example:
        {sparsity: 0.9, scope: layer, layers: [layer*], skip: [layer1.0.conv1]}

        {fraction: 0.5}

        {pattern: "2:4"}
    """

    sparsity: Ratio | None = None
    fraction: Ratio | None = None
    pattern: Pattern | None = None
    scope: Literal["global", "layer"] = "global"
    layers: Annotated[list[str], Field(min_length=1)] = Field(default_factory=lambda: ["*"])
    skip: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _says_one_thing(self) -> "SparsifySection":
        said = [
            name for name in ("sparsity", "fraction", "pattern") if getattr(self, name) is not None
        ]
        if len(said) != 1:
            found = " and ".join(said) or "none"
            raise ValueError(f"exactly one of sparsity, fraction and pattern, and here is {found}")
        return self


def select_mask(
    tensors: Mapping[str, Tensor],
    layers: list[str],
    settings: SparsifySection,
    before: Mapping[str, Tensor] | None = None,
) -> Mask:
    """Choose the weights that stay, by magnitude.

    Of equal magnitudes that which comes first goes first: by layer, then by place in its tensor,
    so that all ranks choose alike. What was masked before stays masked.

    Args:
        tensors: a network's parameters by name.
        layers: its Conv2d and Linear layers, in network order.
        settings: how many, of which layers.
        before: the mask that the weights have already; none by default.

    Returns:
        for the weight of each chosen layer, and each that ``before`` has, what stays (bool).

    Raises:
        UserError: a pattern matches no layer, weights are not finite, or the mask that is there
            leaves fewer weights than are to stay.
    """
    names = chosen_layers(layers, settings)
    alive = {key: mask.bool() for key, mask in (before or {}).items()}
    weights: dict[str, Tensor] = {}
    for layer in names:
        key = f"{layer}.weight"
        weight = tensors[key]
        if not torch.isfinite(weight).all():
            raise UserError(f"{key}: holds weights that are not finite, which have no order")
        weights[key] = weight.detach().abs().float()
        alive.setdefault(key, torch.ones(weight.shape, dtype=torch.bool, device=weight.device))
    if settings.pattern is not None:
        for key in weights:
            alive[key] = alive[key] & n_of_each_m(weights[key], alive[key], settings.pattern)
        return alive
    parts = [[key] for key in weights] if settings.scope == "layer" else [[*weights]]
    for keys in parts:
        total = sum(weights[key].numel() for key in keys)
        left = sum(int(alive[key].sum()) for key in keys)
        if settings.fraction is not None:
            going = round(Fraction(settings.fraction) * left)
        else:
            assert settings.sparsity is not None
            going = how_many_go(settings.sparsity, total) - (total - left)
        if going < 0:
            where = keys[0] if settings.scope == "layer" else "these layers"
            raise UserError(
                f"sparsity {settings.sparsity:g}: {1 - left / total:.4f} of the weights of {where} "
                "are masked already"
            )
        _take_smallest(weights, alive, keys, going)
    return alive


def how_many_go(share: float, total: int) -> int:
    """How many weights a share of so many is."""
    return round(Fraction(share) * total)


def chosen_layers(layers: list[str], settings: SparsifySection) -> list[str]:
    """Those of a network's layers whose weights may go.

    Raises:
        UserError: a pattern matches none, or none is left.
    """
    for key in ("layers", "skip"):
        for pattern in getattr(settings, key):
            if not any(fnmatchcase(layer, pattern) for layer in layers):
                raise UserError(f"{key}: {pattern!r} matches no Conv2d or Linear layer")

    def matches(layer: str, patterns: list[str]) -> bool:
        return any(fnmatchcase(layer, pattern) for pattern in patterns)

    names = [n for n in layers if matches(n, settings.layers) and not matches(n, settings.skip)]
    if not names:
        raise UserError("skip: leaves no layer of those that layers names")
    return names


def _take_smallest(weights: Mapping[str, Tensor], alive: Mask, keys: list[str], going: int) -> None:
    """Mask the ``going`` smallest weights that are alive, in place."""
    candidates = [weights[key][alive[key]] for key in keys]
    gone = smallest(torch.cat(candidates), going).split([len(some) for some in candidates])
    for key, of_layer in zip(keys, gone, strict=True):
        alive[key] = alive[key].masked_scatter(alive[key], ~of_layer)


def smallest(magnitudes: Tensor, many: int) -> Tensor:
    """Which are the ``many`` smallest, bool, of their shape; of equals those that come first.

    Without waiting for the device.
    """
    if not many:
        return torch.zeros_like(magnitudes, dtype=torch.bool)
    flat = magnitudes.flatten()
    threshold = flat.kthvalue(many).values
    below, equal = flat < threshold, flat == threshold
    first = equal & (equal.cumsum(0, dtype=torch.int32) <= many - below.sum())
    return (below | first).view_as(magnitudes)


def n_of_each_m(magnitude: Tensor, alive: Tensor, pattern: str) -> Tensor:
    """What stays of each group of M along the input channels; all of it where they do not divide.

    As NVIDIA's sparse tensor cores and ASP have it: the groups of a convolution are of one
    position in the kernel.
    """
    stay, of = (int(number) for number in pattern.split(":"))
    if magnitude.shape[1] % of:
        return torch.ones_like(alive)
    # What is masked already comes last among equals, too.
    score = torch.where(alive, magnitude, -1.0).movedim(1, -1)
    groups = score.unflatten(-1, (-1, of))
    order = groups.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :stay]
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, of - 1 - order, True)
    return kept.flatten(-2).movedim(-1, 1)


def apply_mask(tensors: Mapping[str, Tensor], mask: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name with zeros where ``mask`` has none to stay; the others are themselves.

    Raises:
        UserError: the mask is of another network.
    """
    _check(tensors, mask)
    return {
        name: torch.where(mask[name].bool(), tensor, tensor.new_zeros(()))
        if name in mask
        else tensor
        for name, tensor in tensors.items()
    }


def _check(tensors: Mapping[str, Tensor], mask: Mapping[str, Tensor]) -> None:
    for name, stays in mask.items():
        if name not in tensors:
            raise UserError(f"mask: the network has no {name}")
        if tensors[name].shape != stays.shape:
            shapes = ("x".join(map(str, t.shape)) for t in (stays, tensors[name]))
            raise UserError("mask: {} is {}, and the network's is {}".format(name, *shapes))


@torch.no_grad()
def hold_mask(model: nn.Module, mask: Mapping[str, Tensor]) -> None:
    """Set masked weights to zero, and keep their gradients at zero from now on.

    An optimiser that begins with them then leaves them at zero: momentum, weight decay and Adam's
    averages of zeros are zeros. That holds of copies that it may keep of them (DeepSpeed's ZeRO)
    just as well, of the gradient's norm, and of moving averages. Nothing has to be done after a
    step.

    Args:
        model: on its device, before engine and optimiser are made.
        mask: by parameter.

    Raises:
        UserError: the mask is of another network.
    """
    parameters = dict(model.named_parameters())
    _check(parameters, mask)
    for name, stays in mask.items():
        parameter = parameters[name]
        stays = stays.to(parameter.device, torch.bool)
        if parameter.dim() == 4:  # laid out as the gradient is
            order = torch.channels_last
            if parameter.is_contiguous(memory_format=order) and not parameter.is_contiguous():
                stays = stays.contiguous(memory_format=order)
        parameter.masked_fill_(~stays, 0)
        if parameter.requires_grad:
            parameter.register_hook(_Hold(stays))


class _Hold:
    """Zero gradients where a weight is masked, also those that are not finite."""

    def __init__(self, stays: Tensor) -> None:
        self._gone = ~stays

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient.masked_fill(self._gone, 0)


def norm_of(values: Iterable[Tensor]) -> float:
    """L2 norm of all of several tensors together, added up in float64."""
    return math.sqrt(sum(value.detach().double().square().sum().item() for value in values))


@dataclass(frozen=True)
class Sparsity:
    """What a mask leaves of a network.

    Attributes:
        parameters: all of the network's that are not masked.
        macs: multiply-accumulates for one image with weights that are not masked.
        sparsity: share of the weights of masked layers that are masked.
    """

    parameters: int
    macs: int
    sparsity: float


def share_masked(mask: Mapping[str, Tensor]) -> float:
    """Of the weights of masked layers."""
    total = sum(stays.numel() for stays in mask.values())
    return sum(int((~stays.bool()).sum()) for stays in mask.values()) / max(total, 1)


def sparsity_of(counts: Counts, mask: Mapping[str, Tensor]) -> Sparsity:
    """Count what a mask leaves of a network of these counts.

    Each weight of a layer takes part in as many multiply-accumulates as any other one.
    """
    masked = {key: int((~stays.bool()).sum()) for key, stays in mask.items()}
    saved = 0
    for layer in counts.layers:
        key = f"{layer.name}.weight"
        if key in masked:
            saved += layer.macs * masked[key] // mask[key].numel()
    return Sparsity(
        parameters=counts.parameters - sum(masked.values()),
        macs=counts.macs - saved,
        sparsity=share_masked(mask),
    )
