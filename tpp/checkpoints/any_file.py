"""The network of a checkpoint of any kind, for whoever looks at it, times it or serves it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tpp.checkpoints.model_file import find_metadata, load_dense_buffers, load_model, network_of
from tpp.checkpoints.prune_file import read_dense
from tpp.checkpoints.safetensors_files import PathLike
from tpp.checkpoints.sources import agreed
from tpp.models.architecture import Architecture
from tpp.models.fitting import assign_tensors
from tpp.models.preparation import take_image_size


@dataclass(frozen=True)
class Opened:
    """What was found in a checkpoint.

    Attributes:
        model: with attributes ``architecture`` and ``preprocessing``.
        companions: names of what the file holds beside the network.
        extra: what the writer of one of our files added.
        notes: of a file of others, what a user should know, such as what was left out.
    """

    model: nn.Module
    companions: Sequence[str] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


def outline(
    path: PathLike, architecture: Architecture | None = None, *, image_size: int | None = None
) -> Opened:
    """The network of a checkpoint without its weights, on the meta device; see open_network."""
    info = find_metadata(path)
    if info is None:
        dense = read_dense(path, architecture, image_size=image_size)
        return Opened(dense.model, [*dense.companions], notes=dense.notes)
    agreed(path, info.architecture, architecture)
    model = network_of(info, source=str(path))
    take_image_size(model, image_size)
    return Opened(model, info.companions, info.extra)


def open_network(
    path: PathLike, architecture: Architecture | None = None, *, image_size: int | None = None
) -> Opened:
    """Read the network of a checkpoint.

    Args:
        path: one of our checkpoints, or, if ``architecture`` is given, anything else that
            :func:`tpp.checkpoints.sources.read_source` reads.
        architecture: the network, where the file does not say it.
        image_size: side of its images, in pixels, in place of what the file says, or else what
            public weights of that network want.

    Returns:
        The network on the CPU, in evaluation mode.

    Raises:
        UserError: the file cannot be read, nobody says which network it holds, or it is not that
            one.
    """
    info = find_metadata(path)
    if info is not None:
        agreed(path, info.architecture, architecture)
        model = load_model(path)
        take_image_size(model, image_size)
        return Opened(model, info.companions, info.extra)
    dense = read_dense(path, architecture, image_size=image_size)
    assign_tensors(dense.model, dense.tensors)
    load_dense_buffers(path, dense.model)
    return Opened(dense.model.eval(), [*dense.companions], notes=dense.notes)
