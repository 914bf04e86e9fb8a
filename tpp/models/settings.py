"""The settings of the network."""

from typing import Annotated, Any

from pydantic import Field

from tpp.common.settings import Section, UserPath

# One network's arguments make no sense of another's.
MODEL_REPLACED = (("model", "args"),)


class ModelSection(Section):
    """Which network, and where its weights come from.

    Attributes:
        name: see ``tpp.models.architecture``: ``cifar_resnet56``, any torchvision name,
            ``timm:NAME``.
        args: keyword arguments of the network's constructor.
        num_classes: null counts the class folders; a number is checked against them. Null too for
            a network whose output is an image.
        checkpoint: weights to start from: a file of ours, a foreign state_dict (.pth, .th,
            .safetensors), an https URL, ``torchvision:WEIGHTS`` such as
            ``torchvision:IMAGENET1K_V1``, or null for a fresh initialisation.
    """

    name: str
    args: dict[str, Any] = {}
    num_classes: Annotated[int, Field(ge=2)] | None = None
    checkpoint: UserPath | None = None
