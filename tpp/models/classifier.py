"""Which of a network's tensors are its classifier's."""

from dataclasses import replace

from tpp.models.architecture import Architecture, build_on_meta


def classifier_tensors(architecture: Architecture) -> frozenset[str]:
    """The names of the parameters, and buffers, whose shape follows from the number of classes.

    That is the last layer, whatever it is called: it is found by building the network, without
    memory, for another number of classes. Empty where the output is an image.
    """
    classes = architecture.num_classes
    if classes is None:
        return frozenset()
    one, other = (
        {name: tensor.shape for name, tensor in build_on_meta(variant).state_dict().items()}
        for variant in (architecture, replace(architecture, num_classes=classes + 1))
    )
    return frozenset(name for name, shape in one.items() if other.get(name) != shape)
