"""How far layers are from orthogonal, as terms for a loss, and how to make them so at once.

Two measures, both zero where a layer preserves the norm of what passes through it:

- kernel orthogonality (Xie et al., "All You Need is Beyond a Good Init", CVPR 2017): of the weight
  as a matrix W with one row per filter, ``W W^T - I``;
- convolutional orthogonality (Wang et al., "Orthogonal Convolutional Neural Networks", CVPR 2020,
  eq. 8): of the linear map that the convolution is, ``Conv(K, K, padding=P, stride=S) - I_r0``.

A convolution in groups is as many convolutions side by side, and is measured group by group.
"""

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpp.models.layers import prunable_layers
from tpp.regularization.sharding import share_of

Form = Literal["kernel", "convolution"]
Pair = tuple[int, int]


def orthogonalize(weight: Tensor, *, gain: float = 1.0, groups: int = 1) -> Tensor:
    """The weight with orthonormal rows, or columns where there are more rows than columns.

    The rows of the (n, d) matrix are orthonormalised one after the other (a QR factorisation of
    its transpose, signs chosen so that every row keeps its direction where it can); where n > d
    it is the columns. Source: OrthP in Wang & Fu, ICLR 2023, after Wang et al., "Dynamical
    Isometry: The Missing Ingredient for Neural Network Pruning", 2021.

    Args:
        weight: (n, ...) filters of a Conv2d or neurons of a Linear layer.
        gain: what all singular values become.
        groups: of the convolution; each group's matrix is orthogonalised.

    Returns:
        A new tensor of the same shape and dtype.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    matrices = weight.detach().to(wide).reshape(groups, weight.shape[0] // groups, -1)
    rows, columns = matrices.shape[1:]
    tall = matrices if rows > columns else matrices.mT
    q, r = torch.linalg.qr(tall)
    # A zero on the diagonal (dependent filters) has no sign; the column of q is good as it is.
    q = q * torch.where(r.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0).unsqueeze(1)
    orthogonal = q if rows > columns else q.mT
    return (gain * orthogonal).reshape(weight.shape).to(weight.dtype)


def kernel_residual(weight: Tensor, *, groups: int = 1) -> Tensor:
    """``W W^T - I``, or ``W^T W - I`` where that is smaller; (groups, m, m).

    The squared norms of the two differ by the constant n - d, so they have the same gradient.

    Args:
        weight: (n, ...) filters, W as an (n / groups, d) matrix for each group.
        groups: of the convolution.

    Source: Xie et al., CVPR 2017.
    """
    W = weight.reshape(groups, weight.shape[0] // groups, -1)
    gram = W @ W.mT if W.shape[1] <= W.shape[2] else W.mT @ W
    return gram - torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)


def convolution_residual(
    weight: Tensor, *, stride: Pair = (1, 1), dilation: Pair = (1, 1), groups: int = 1
) -> Tensor:
    """``Conv(K, K, padding=P, stride=S) - I_r0``: filters against each other at all shifts.

    Entry (i, j, s, t) is the inner product of filter i with filter j shifted by as many strides;
    the identity belongs to the unshifted position in the middle. P = floor((k - 1) / S) * S holds
    all shifts at which two filters overlap. All entries are zero exactly if the rows of the
    convolution's doubly block-Toeplitz matrix are orthonormal.

    Args:
        weight: (n, c / groups, k_h, k_w).
        stride, dilation, groups: of the convolution.

    Returns:
        (n / groups, n, 2 P_h / S_h + 1, 2 P_w / S_w + 1); the second index runs over all groups,
        the first over the filters of the group that the second lies in.

    Source: Wang et al., CVPR 2020, eq. 8.
    """
    filters, channels = weight.shape[0] // groups, weight.shape[1]
    image = _spread(weight, dilation)
    sides = image.shape[2:]
    padding = [(side - 1) // step * step for side, step in zip(sides, stride, strict=True)]
    # The groups' filters lie behind one another as channels of the (few) images.
    image = image.reshape(groups, filters, channels, *sides).transpose(0, 1).flatten(1, 2)
    overlap = F.conv2d(
        image, weight, stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    target = torch.zeros_like(overlap)
    identity = torch.eye(filters, dtype=weight.dtype, device=weight.device)
    middle = [side // step for side, step in zip(padding, stride, strict=True)]
    target[:, :, middle[0], middle[1]] = identity.repeat(1, groups)
    return overlap - target


def _spread(weight: Tensor, dilation: Pair) -> Tensor:
    """The kernel with zeros in the gaps that dilation leaves."""
    if dilation == (1, 1):
        return weight
    sides = [step * (side - 1) + 1 for side, step in zip(weight.shape[2:], dilation, strict=True)]
    spread = weight.new_zeros(*weight.shape[:2], *sides)
    spread[:, :, :: dilation[0], :: dilation[1]] = weight
    return spread


class OrthogonalityPenalty:
    """Sum over layers of how far each is from orthogonal, shared out among ranks.

    Under data parallelism every rank computes whole layers, about equally much work, times
    ``world_size``; the averaging of gradients yields the exact sum.

    Args:
        model: the network, not wrapped.
        form: ``kernel`` for all Conv2d and Linear layers; ``convolution`` for all but the first
            (as in Wang et al. 2020), with the kernel form for Linear layers and for convolutions
            whose windows do not overlap, 1x1 ones above all.
        strength: weight of the sum.
        squared: sum the squared Frobenius norms, as the papers define them, or the norms, as the
            public code of both OrthConv and TPP does.
        rank: this process's rank.
        world_size: number of ranks over which gradients are averaged.
    """

    def __init__(
        self,
        model: nn.Module,
        form: Form,
        *,
        strength: float,
        squared: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        layers = prunable_layers(model)
        if form == "convolution":
            layers = dict(list(layers.items())[1:])
        self._convolutional = form == "convolution"
        self._squared = squared
        self._scale = strength * world_size
        self._device = next(model.parameters()).device
        costs = {name: self._cost(layer) for name, layer in layers.items()}
        self.layers = {name: layers[name] for name in share_of(costs, rank, world_size)}

    def __call__(self) -> Tensor:
        """This rank's share of the penalty times the number of ranks: a scalar for the loss.

        In float32 (or float64, if that is what the weights are) whatever the autocast.
        """
        total = torch.zeros((), device=self._device)
        with torch.autocast(self._device.type, enabled=False):
            for layer in self.layers.values():
                residual = self._residual(layer)
                if self._squared:
                    total = total + residual.square().sum()
                else:  # vector_norm's gradient, unlike a root's, is 0 where the residual is
                    total = total + torch.linalg.vector_norm(residual)
        return self._scale * total

    def _residual(self, layer: nn.Conv2d | nn.Linear) -> Tensor:
        weight = layer.weight
        if weight.dtype not in (torch.float32, torch.float64):
            weight = weight.float()
        if isinstance(layer, nn.Linear):
            return kernel_residual(weight)
        if not (self._convolutional and _overlaps(layer)):
            return kernel_residual(weight, groups=layer.groups)
        return convolution_residual(
            weight,
            stride=_pair(layer.stride),
            dilation=_pair(layer.dilation),
            groups=layer.groups,
        )

    def _cost(self, layer: nn.Conv2d | nn.Linear) -> int:
        """Multiply-adds of the residual; the backward pass costs in proportion."""
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        rows, columns = layer.weight.shape[0] // groups, layer.weight[0].numel()
        if self._convolutional and isinstance(layer, nn.Conv2d) and _overlaps(layer):
            shifts = 1
            for side, step in zip(_reach(layer), _pair(layer.stride), strict=True):
                shifts *= 2 * ((side - 1) // step) + 1
            return groups * rows * rows * columns * shifts
        return groups * rows * columns * min(rows, columns)


def _reach(layer: nn.Conv2d) -> list[int]:
    sides = zip(layer.kernel_size, _pair(layer.dilation), strict=True)
    return [step * (side - 1) + 1 for side, step in sides]


def _overlaps(layer: nn.Conv2d) -> bool:
    """Whether neighbouring windows of a convolution share inputs."""
    return any(side > step for side, step in zip(_reach(layer), _pair(layer.stride), strict=True))


def _pair(values: Iterable[int]) -> Pair:
    first, second = values
    return first, second
