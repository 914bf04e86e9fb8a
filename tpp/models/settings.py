"""The settings of the network."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tpp.common.settings import MAY_DIFFER, Section, UserPath

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
            .safetensors), an https URL, public weights (``torchvision:IMAGENET1K_V1``,
            ``timm:resnet50.a1_in1k``, ``hf-hub:OWNER/REPO@REVISION``), or null for a fresh
            initialisation.
        sha256: of the checkpoint's file or URL, or its first digits; null: not checked.
        head: ``new`` replaces the classifier of the checkpoint, whatever its classes, by one for
            the run's own.
    """

    name: str
    args: dict[str, Any] = {}
    num_classes: Annotated[int, Field(ge=2)] | None = None
    checkpoint: UserPath | None = None
    sha256: Annotated[str | None, Field(pattern=r"^[0-9a-f]{8,64}$"), MAY_DIFFER] = None
    head: Literal["keep", "new"] = "keep"

    @model_validator(mode="after")
    def _is_of_a_checkpoint(self) -> "ModelSection":
        for key, given in (("head: new", self.head == "new"), ("sha256", self.sha256 is not None)):
            if given and self.checkpoint is None:
                raise ValueError(f"{key} goes with a checkpoint")
        return self
