"""Scores of filters, and how many of a layer's go."""

import fnmatch
import hashlib
import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from tpp.channels.channel_map import LayerChannels
from tpp.common.errors import UserError
from tpp.models.fitting import few
from tpp.models.layers import prunable_layers

_Value = TypeVar("_Value")
Criterion = Literal["l1", "l2", "bn_scale", "random", "largest"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)


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
    return last_match(layers, ratios, "pruning")


def pruned_count(ratio: float, filters: int) -> int:
    """Filters to remove from ``filters``: min(ceil(ratio * filters), filters - 1).

    The ratio is taken as the decimal it was written as, so that 0.7 of 10 is 7 and not, by a
    rounding error of binary floats, 8.
    """
    return min(math.ceil(_decimal(ratio) * filters), filters - 1)


def floor_count(floor: int | float, filters: int) -> int:
    """Filters that a floor keeps of ``filters``: a whole number itself, ceil of a share."""
    return min(floor if isinstance(floor, int) else math.ceil(_decimal(floor) * filters), filters)


def l1_scores(weight: Tensor) -> Tensor:
    """Mean absolute value of every filter of ``weight`` (n, ...); shape (n,), float32 at least."""
    return at_least_float32(weight).flatten(1).abs().mean(1)


def l2_scores(weight: Tensor) -> Tensor:
    """Root mean square of every filter of ``weight`` (n, ...); shape (n,), float32 at least."""
    return at_least_float32(weight).flatten(1).square().mean(1).sqrt()


def random_scores(layer: str, filters: int, seed: int) -> Tensor:
    """Uniform on [0, 1), (filters,), float32; the same for the same seed and layer name."""
    digest = hashlib.sha256(f"{seed}:{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    return torch.rand(filters, generator=generator)


def check_floor(floor: int | float, name: str) -> None:
    """Check that ``floor`` is a number of filters or a share of them.

    Raises:
        UserError: it is neither; ``name`` says where it stands.
    """
    if isinstance(floor, bool) or not isinstance(floor, int | float):
        raise UserError(f"{name} must be a number, not {floor!r}")
    if not (floor >= 1 if isinstance(floor, int) else 0 < floor <= 1):
        raise UserError(
            f"{name} must be a whole number of filters from 1 on or a share in (0, 1], not {floor}"
        )


def check_norms(model: nn.Module, channels: Iterable[LayerChannels]) -> None:
    """Raise UserError if one of the layers has no BatchNorm whose scale could be its score."""
    modules = dict(model.named_modules())
    for found in channels:
        if not found.norms or getattr(modules[found.norms[0].module], "weight", None) is None:
            raise UserError(
                f"criterion bn_scale: {found.layer} has no BatchNorm with a scale of its own; "
                "skip it or use another criterion"
            )


def given_scores(scores: Mapping[str, Tensor], found: LayerChannels) -> Tensor:
    """The caller's scores of a layer's filters, (filters,).

    Raises:
        UserError: there are none, or of another number.
    """
    given = scores.get(found.layer)
    if given is None or given.shape != (found.filters,):
        raise UserError(
            f"scores: {found.layer}: expected one number for each of {found.filters} filters"
        )
    return given


def last_match(layers: list[str], patterns: Mapping[str, _Value], kind: str) -> dict[str, _Value]:
    """The value of every layer that a pattern matches, in the order of ``layers``."""
    for pattern in patterns:
        if not fnmatch.filter(layers, pattern):
            raise UserError(
                f"{kind} pattern {pattern!r} matches no Conv2d or Linear layer; "
                f"the model's layers are {few(layers, 6)}"
            )
    chosen = {}
    for layer in layers:
        for pattern, value in patterns.items():
            if fnmatch.fnmatchcase(layer, pattern):
                chosen[layer] = value
    return chosen


def at_least_float32(tensor: Tensor) -> Tensor:
    """The values in float32, or wider where they are so already; no gradients."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _decimal(number: float) -> Fraction:
    """The decimal that a float was written as."""
    return Fraction(repr(float(number)))
