"""The settings of distillation."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tpp.common.settings import PositiveFloat, Section, UserPath

DENSE = "dense"
LOGITS: Literal["logits"] = "logits"
# Of Tian et al., "Contrastive Representation Distillation", ICLR 2020, whose loss is the same.
_WEIGHT, _TEMPERATURE = 0.9, 4.0
# The beta of Zagoruyko & Komodakis, ICLR 2017, for the mean over places that their code takes.
_ATTENTION_WEIGHT = 1000.0


class DistillSection(Section):
    """A teacher's part in the loss of a training stage (docs/recipe.md).

    Attributes:
        teacher: which network teaches: ``dense``, the dense network that the stage's network comes
            from; a file; or public weights as ``model.checkpoint`` names them, with the network's
            name: ``torchvision:NAME[.WEIGHTS]``, ``timm:NAME.TAG``, ``hf-hub:OWNER/REPO@REVISION``.
        kind: what is compared: ``logits``, the softened answers (Hinton et al. 2015); ``features``,
            where in the image the outputs of some layers are large, which is attention transfer
            (Zagoruyko & Komodakis, ICLR 2017).
        weight: for ``logits``, the teacher's share of the loss, at most 1, the rest being the
            task's (null: 0.9); for ``features``, the factor of what is added to the task's loss
            (null: 1000).
        temperature: what logits are divided by before the softmax, for ``kind: logits``; null for
            4.
        layers: names of the modules whose outputs are compared, for ``kind: features``; null for
            the last one at each resolution.

    Example:
        {teacher: "torchvision:resnet50", weight: 0.5, temperature: 2}

        {teacher: dense, kind: features, layers: [layer3, layer4]}
    """

    teacher: UserPath = DENSE
    kind: Literal["logits", "features"] = LOGITS
    weight: PositiveFloat | None = None
    temperature: PositiveFloat | None = None
    layers: Annotated[list[str], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "DistillSection":
        if not self.teacher:
            raise ValueError("teacher: which one? dense, a file, or torchvision:, timm:, hf-hub:")
        if self.kind == LOGITS:
            if self.layers is not None:
                raise ValueError("layers go with kind: features")
            if self.weight is not None and self.weight > 1:
                raise ValueError(
                    f"weight is the teacher's share of the loss, at most 1, not {self.weight}"
                )
        elif self.temperature is not None:
            raise ValueError("temperature goes with kind: logits")
        if self.layers is not None and len({*self.layers}) < len(self.layers):
            raise ValueError("layers: a name stands there twice")
        return self

    @property
    def factor(self) -> float:
        """What the teacher's term is multiplied with."""
        if self.weight is not None:
            return self.weight
        return _WEIGHT if self.kind == LOGITS else _ATTENTION_WEIGHT

    @property
    def task_share(self) -> float:
        """What the task's loss is multiplied with."""
        return 1 - self.factor if self.kind == LOGITS else 1.0

    @property
    def degree(self) -> float:
        """The temperature."""
        return _TEMPERATURE if self.temperature is None else self.temperature
