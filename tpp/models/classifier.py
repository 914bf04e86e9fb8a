"""Which of a network's tensors are its classifier's."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from tpp.common.errors import UserError
from tpp.common.own_code import is_own
from tpp.models.architecture import Architecture, build_model, build_on_meta
from tpp.models.fitting import assign_tensors, fill_buffers, fitted
from tpp.models.own import own_network


def classifier_tensors(architecture: Architecture) -> frozenset[str]:
    """The names of the parameters, and buffers, whose shape follows from the number of classes.

    That is the last layer, whatever it is called: it is found by building the network, without
    memory, for another number of classes. Empty where the output is an image.

    Raises:
        UserError: it is a network of one's own that takes no number of classes.
    """
    classes = architecture.num_classes
    if classes is None:
        return frozenset()
    if is_own(architecture.name) and not own_network(architecture.name).takes_classes:
        raise UserError(
            f"model {architecture.name!r}: takes no num_classes, so there is no telling which of "
            "its layers is the classifier"
        )
    one, other = (
        {name: tensor.shape for name, tensor in build_on_meta(variant).state_dict().items()}
        for variant in (architecture, replace(architecture, num_classes=classes + 1))
    )
    return frozenset(name for name, shape in one.items() if other.get(name) != shape)


def with_new_classifier(
    tensors: Mapping[str, Tensor], architecture: Architecture, seed: int
) -> nn.Module:
    """A network of these tensors, but for a classifier of its own, on the CPU.

    Args:
        tensors: of the same network, dense or pruned, with whatever classes.
        architecture: the dense network, with the classes to be.
        seed: of the new classifier's numbers, which the network's own constructor draws.

    Raises:
        UserError: they do not fit each other.
    """
    torch.manual_seed(seed)
    fresh = build_model(architecture.name, architecture.num_classes, **architecture.args)
    new = fresh.state_dict()
    values = dict(tensors)
    for name in classifier_tensors(architecture):
        own = new[name]
        # Inputs that were pruned are gone from the file's classifier, and from the new one.
        inputs = tensors[name].shape[1:] if name in tensors else own.shape[1:]
        values[name] = own[tuple(slice(size) for size in (len(own), *inputs))].clone()
    network = fitted(architecture, {name: tuple(t.shape) for name, t in values.items()})
    assign_tensors(network, {name: tensor.clone() for name, tensor in values.items()})
    fill_buffers(network, fresh)
    return network
