"""How the entries of a tensor are labelled, position by position."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Label of a position that no removal may touch: the image's channels, a constant, a padding.
FIXED = 0
Labels = np.ndarray  # (positions,), int64


@dataclass(frozen=True)
class Flow:
    """The labels of one tensor.

    Attributes:
        planes: labels of the tensor's positions, each of the tensor's shape and with stride 0
            along every dimension in which they are all alike. An activation has one plane, that
            varies along its channels; a weight has one for its rows and one for its columns.
        zero: whether a channel is zero here once its filters and norms' entries are.
        weight: whether this is a parameter, as it is or moved about.
    """

    planes: tuple[Tensor, ...] = ()
    zero: bool = True
    weight: bool = False


def plane_of(labels: Labels | None, dim: int, shape: Sequence[int]) -> Tensor:
    """Labels along one dimension, as a plane of ``shape``."""
    assert labels is not None
    view = [1] * len(shape)
    view[dim] = len(labels)
    return torch.from_numpy(labels).view(view).expand(tuple(shape))


def varying(plane: Tensor) -> tuple[int, ...]:
    """The dimensions along which a compact plane's labels differ."""
    return tuple(d for d in range(plane.dim()) if plane.shape[d] > 1 and plane.stride(d) != 0)


def compact_labels(plane: Tensor) -> Tensor:
    """The same plane with stride 0 along every dimension in which its labels are alike."""
    for dim in varying(plane):
        core = _core(plane)  # comparing all repeats of the labels would take most of the time
        if torch.equal(core.narrow(dim, 0, 1).expand_as(core), core):
            plane = plane.narrow(dim, 0, 1).expand(plane.shape)
    return plane


def _core(plane: Tensor) -> Tensor:
    """A compact plane without the dimensions in which it is alike."""
    dims = varying(plane)
    for dim in range(plane.dim()):
        if dim not in dims:
            plane = plane.narrow(dim, 0, 1)
    return plane


def values_of(plane: Tensor) -> Labels:
    """All labels of a compact plane, in order, without repeats along alike dimensions."""
    return _core(plane).flatten().numpy()


def distinct(plane: Tensor) -> int:
    """How many labels a compact plane holds, each counted once."""
    return len(_core(plane).unique())


def along(flow: Flow, dim: int) -> Labels | None:
    """The labels that vary along one dimension and no other."""
    for plane in flow.planes:
        if varying(plane) == (dim,):
            return values_of(plane)
    return None


def size_of(tensor: Tensor, dim: int, out: Tensor) -> int:
    """Size of an operand along a dimension of what it is broadcast to; 1 where one is repeated."""
    own = dim - (out.dim() - tensor.dim())
    return tensor.shape[own] if own >= 0 and tensor.stride(own) else 1
