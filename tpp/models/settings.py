"""The settings of the network."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tpp.common.own_code import anchored, short_name
from tpp.common.settings import MAY_DIFFER, Section, UserPath
from tpp.common.yaml_files import Anchor, Place

# One network's arguments make no sense of another's.
MODEL_REPLACED = (("model", "args"),)
# What begins at the folder of the file that says it.
MODEL_ANCHORED: dict[Place, Anchor] = {("model", "name"): anchored}


class ModelSection(Section):
    """Which network, and where its weights come from (docs/checkpoints.md).

    Attributes:
        name: the network: one of this repository (``cifar_resnet56``), any name of torchvision
            (``resnet50``), ``timm:NAME``, or ``FILE.py:CLASS``, a class of your own in a file
            beside the configuration (docs/own_network.md).
        args: keyword arguments of the network's constructor, as torchvision and timm document them.
        num_classes: number of classes; null counts the class folders, and a number is checked
            against them. Null too for a network whose output is an image.
        checkpoint: weights to start from: a file of ours, somebody else's state_dict (.pth, .th,
            .safetensors), an https URL, public weights (``torchvision:IMAGENET1K_V1``,
            ``timm:resnet50.a1_in1k``, ``hf-hub:OWNER/REPO@REVISION``); null for random weights.
        sha256: SHA-256 of the checkpoint's file or URL, or its first digits (8 at least); null: it
            is not checked.
        head: ``keep`` takes the classifier of the checkpoint; ``new`` replaces it, whatever its
            classes, with one for the classes of the run.

    Example:
        {name: resnet50, args: {zero_init_residual: true}, num_classes: 10,
        checkpoint: weights/resnet50-0676ba61.pth, sha256: 0676ba61, head: new}
    """

    name: str
    args: dict[str, Any] = {}
    num_classes: Annotated[int, Field(ge=2)] | None = None
    checkpoint: UserPath | None = None
    sha256: Annotated[str | None, Field(pattern=r"^[0-9a-f]{8,64}$"), MAY_DIFFER] = None
    head: Literal["keep", "new"] = "keep"

    @property
    def network(self) -> str:
        """The network's name in files: of a class of your own without the folder."""
        return short_name(self.name)

    @model_validator(mode="after")
    def _is_of_a_checkpoint(self) -> "ModelSection":
        for key, given in (("head: new", self.head == "new"), ("sha256", self.sha256 is not None)):
            if given and self.checkpoint is None:
                cure = "; say keep" if key.startswith("head") else ""
                raise ValueError(f"{key} goes with a checkpoint{cure}")
        return self
