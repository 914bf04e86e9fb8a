"""Scores of filters, one function for each criterion, and how many of a layer's go."""

import fnmatch
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from typing import Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tpp.channels.channel_map import LayerChannels
from tpp.common.errors import UserError
from tpp.models.fitting import few
from tpp.models.layers import prunable_layers

_Value = TypeVar("_Value")
Criterion = Literal[
    "l1", "l2", "bn_scale", "random", "largest", "fpgm", "group_norm", "taylor", "hessian"
]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
# Of which a filter's score is one of all layers that lose it together, and not a sum of theirs.
JOINT: tuple[Criterion, ...] = ("group_norm", "taylor", "hessian")
NEED_IMAGES: tuple[Criterion, ...] = ("taylor", "hessian")
# In units of the same loss in every layer, so that layers are compared as they are.
OF_THE_LOSS: tuple[Criterion, ...] = ("taylor", "hessian")
# Rows of distances that are held at a time.
_ROWS = 1024
# Of a batch's number and of tensors: a direction for each of these.
Along = Callable[[int, Sequence[Tensor]], Sequence[Tensor]]


class Gradients(Protocol):
    """Where a criterion gets gradients from: it knows neither images nor losses."""

    def __call__(
        self,
        model: nn.Module,
        parameters: Sequence[str],
        batches: int,
        along: Along | None = None,
    ) -> Iterator[Sequence[Tensor]]:
        """Gradients of the task's mean loss over each of some batches of training images.

        Of the network as it is evaluated: BatchNorm with its running statistics, no dropout.

        Args:
            model: the network; left alone.
            parameters: names of those that gradients are wanted of.
            batches: how many batches, at most.
            along: of the batch's number and the parameters, a direction for each of them. What is
                given then is the change of the gradients along these: Hessian times vector.

        Yields:
            for each batch one gradient for each name, of the parameter's shape, float32 or wider,
            the same on all ranks.
        """


def loss_gradients(
    loss: Tensor, tensors: Sequence[Tensor], directions: Sequence[Tensor] | None = None
) -> Sequence[Tensor]:
    """Gradients of a loss, 0 where it does not depend on a tensor; see :class:`Gradients`.

    Args:
        loss: of a forward pass under :func:`differentiable_twice`, where there are directions.
        tensors: what gradients are wanted of.
        directions: a vector for each of them, to multiply the Hessian by.
    """
    twice = directions is not None
    found = torch.autograd.grad(
        loss, tensors, create_graph=twice, allow_unused=True, materialize_grads=True
    )
    if directions is None:
        return found
    slope = torch.stack([(g * v).sum() for g, v in zip(found, directions, strict=True)]).sum()
    if not slope.requires_grad:
        return [torch.zeros_like(tensor) for tensor in tensors]
    return torch.autograd.grad(slope, tensors, allow_unused=True, materialize_grads=True)


def differentiable_twice(*, asked: bool) -> AbstractContextManager[None]:
    """Where a forward pass can be differentiated twice, if asked: fused attention cannot."""
    return sdpa_kernel(SDPBackend.MATH) if asked else nullcontext()


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


def fpgm_scores(weight: Tensor, groups: int = 1) -> Tensor:
    r"""Distance of every filter to all others: low near the geometric median (FPGM).

    .. math:: s_i = \sum_j ||w_i - w_j||_2

    The filter that minimises it stands for the layer's geometric median, and what is near it can
    be made up for by the others. He et al., "Filter Pruning via Geometric Median for Deep
    Convolutional Neural Networks Acceleration", CVPR 2019, sec. 3.3.

    Args:
        weight: (n, ...).
        groups: of the convolution, whose filters read other channels in every group: distances
            are those within a group.

    Returns:
        float64 (n,).
    """
    scores = []
    for part in weight.detach().double().flatten(1).chunk(groups):
        scores += [torch.cdist(rows, part).sum(1) for rows in part.split(_ROWS)]
    return torch.cat(scores)


def group_norm_scores(model: nn.Module, members: Sequence[LayerChannels]) -> Tensor:
    r"""L2 norm of all weights that go with a filter, in whichever layers they are.

    .. math:: s_i = \sqrt{\sum_{w \in g(i)} w^2}

    g(i) are the weights of the filter itself, of those tied to it, of depthwise convolutions and
    scales of normalisations that go along, and of all input channels that read it; biases are
    none. Each weight counts once. Fang et al., "DepGraph: Towards Any Structural Pruning",
    CVPR 2023, sec. 3.3 (there without the root, which changes no order within a layer; their
    Torch-Pruning counts a weight twice that both reads filter i and makes it).

    Args:
        model: the network.
        members: the layers that lose the same filters.

    Returns:
        float64 (filters,).
    """
    # Tied layers name what they have in common more than once.
    places: dict[str, dict[int, list[Tensor]]] = {}
    groups: dict[str, int] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for entry in (entry for found in members for entry in found.slices):
        if entry.tensor in parameters and entry.tensor.rpartition(".")[2] != "bias":
            places.setdefault(entry.tensor, {}).setdefault(entry.dim, []).append(entry.positions)
            groups[entry.tensor] = max(groups.get(entry.tensor, 1), entry.groups)
    device = next(iter(parameters.values())).device
    total = torch.zeros(members[0].filters, dtype=torch.float64, device=device)
    for tensor, dims in places.items():
        squares = at_least_float32(parameters[tensor]).square()
        squares = _of_all_channels(squares, groups[tensor])
        masks = {
            dim: _entries(torch.cat(found, 1), squares.shape[dim]).to(device)
            for dim, found in dims.items()
        }
        (dim, mask), *other = masks.items()
        if not other:
            total += mask @ _summed(squares, dim)
            continue
        ((second, crossing),) = other
        matrix = _summed(squares, dim, second)
        total += mask @ matrix.sum(1) + crossing @ matrix.sum(0)
        total -= ((mask @ matrix) * crossing).sum(1)
    return total.sqrt()


def taylor_scores(
    model: nn.Module,
    units: Sequence[Sequence[LayerChannels]],
    gradients: Gradients,
    batches: int,
) -> list[Tensor]:
    r"""How much the loss would change without a filter, to first order, squared (Taylor FO).

    .. math:: s_i = mean_b (\sum_{w \in S(i)} g_{bw} w)^2

    g is the gradient of the mean loss of batch b. S(i) are scale and shift of the BatchNorms that
    normalise the filter's output, in all layers that lose it; of a layer without one, its weights
    and bias. The sum is then the derivative of the loss by a gate that multiplies all these outputs
    (sign aside, the first-order change of the loss when it closes). Molchanov et al., "Importance
    Estimation for Neural Network Pruning", CVPR 2019, sec. 3.1 and 3.2: the joint contribution of
    a set of parameters, of gates behind a BatchNorm where there is one (Taylor-FO-BN).

    Args:
        model: the network.
        units: sets of layers that lose the same filters.
        gradients: of the loss.
        batches: over how many batches the squares are averaged, at most.

    Returns:
        float64 (filters,) for each unit.

    Raises:
        UserError: there are no images.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    terms = [[term for found in members for term in _gate(found, parameters)] for members in units]
    names = [*dict.fromkeys(name for of_unit in terms for name, _ in of_unit)]
    if not names:
        return []
    totals = [torch.zeros(members[0].filters, dtype=torch.float64) for members in units]
    seen = 0
    for found in gradients(model, names, batches):
        products = {
            name: gradient * parameters[name].detach().to(gradient.device)
            for name, gradient in zip(names, found, strict=True)
        }
        for total, of_unit in zip(totals, terms, strict=True):
            changes = [
                products[name].flatten(1).sum(1, dtype=torch.float64).cpu()
                if positions is None
                else products[name].double().cpu()[positions].sum(1)
                for name, positions in of_unit
            ]
            total += torch.stack(changes).sum(0).square()
        seen += 1
    if not seen:
        raise UserError("criterion taylor: there are no images to compute gradients of")
    return [total / seen for total in totals]


def hessian_scores(
    model: nn.Module,
    units: Sequence[Sequence[LayerChannels]],
    gradients: Gradients,
    batches: int,
    seed: int = 0,
) -> list[Tensor]:
    r"""How much the loss would change without a filter, to second order, by its mean curvature.

    .. math:: s_i = \frac{tr H_i}{2 p_i} ||w_i||^2

    w_i are the p_i weights of filter i in all layers that lose it, biases aside, and H_i is the
    Hessian of the loss by them. Its trace is estimated by Hutchinson's method, the mean of
    :math:`v^T H v` over vectors of signs drawn at random, one for each batch. Yu et al.,
    "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022, sec. 3: a filter is flat rather
    than small. Where the loss curves downwards, a score is negative.

    Args:
        model: the network.
        units: sets of layers that lose the same filters.
        gradients: of the loss.
        batches: over how many batches and vectors the trace is averaged, at most.
        seed: of the signs.

    Returns:
        float64 (filters,) for each unit.

    Raises:
        UserError: there are no images.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = [[*dict.fromkeys(found.weight for found in members)] for members in units]
    names = [*dict.fromkeys(name for of_unit in weights for name in of_unit)]
    if not names:
        return []

    def along(batch: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        # The CPU's generator looks at 32 bits of a seed.
        digest = hashlib.sha256(f"{seed}:{batch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4]))
        drawn = (torch.randint(2, tensor.shape, generator=generator) for tensor in tensors)
        return [(2 * ones - 1).to(tensor) for ones, tensor in zip(drawn, tensors, strict=True)]

    traces = {name: torch.zeros(len(parameters[name]), dtype=torch.float64) for name in names}
    seen = 0
    for batch, found in enumerate(gradients(model, names, batches, along)):
        for name, product, vector in zip(names, found, along(batch, found), strict=True):
            traces[name] += (product * vector).flatten(1).sum(1, dtype=torch.float64).cpu()
        seen += 1
    if not seen:
        raise UserError("criterion hessian: there are no images to compute a Hessian of")
    scores = []
    for of_unit in weights:
        trace = torch.stack([traces[name] / seen for name in of_unit]).sum(0)
        rows = [parameters[name].detach().cpu().double().flatten(1) for name in of_unit]
        squares = torch.stack([part.square().sum(1) for part in rows]).sum(0)
        scores.append(trace / (2 * sum(part.shape[1] for part in rows)) * squares)
    return scores


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


def _gate(
    found: LayerChannels, parameters: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor | None]]:
    """The parameters that a gate on a layer's filters stands for, with the entries of each filter.

    None: filter i is row i.
    """
    scaled = [norm for norm in found.norms if f"{norm.module}.weight" in parameters]
    for norm in scaled:
        yield f"{norm.module}.weight", norm.positions
        yield f"{norm.module}.bias", norm.positions
    if not scaled:
        yield found.weight, None
        if found.bias is not None:
            yield found.bias, torch.arange(found.filters)[:, None]


def _of_all_channels(weight: Tensor, groups: int) -> Tensor:
    """The weight (out, in / groups, ...) of a convolution in groups as one without, 0 between."""
    if groups == 1:
        return weight
    parts = weight.chunk(groups)
    whole = weight.new_zeros(weight.shape[0], groups * weight.shape[1], *weight.shape[2:])
    rows, columns = parts[0].shape[:2]
    for number, part in enumerate(parts):
        row, column = number * rows, number * columns
        whole[row : row + rows, column : column + columns] = part
    return whole


def _entries(positions: Tensor, size: int) -> Tensor:
    """Which entries belong to each filter: float64 (filters, size), 1 or 0."""
    mask = torch.zeros(len(positions), size, dtype=torch.float64)
    return mask.scatter_(1, positions, 1.0)


def _summed(values: Tensor, *kept: int) -> Tensor:
    """The sums over all dimensions but some, in their order, float64."""
    others = [dim for dim in range(values.dim()) if dim not in kept]
    total = values.sum(others, dtype=torch.float64) if others else values.double()
    return total if [*kept] == sorted(kept) else total.T


def _decimal(number: float) -> Fraction:
    """The decimal that a float was written as."""
    return Fraction(repr(float(number)))
