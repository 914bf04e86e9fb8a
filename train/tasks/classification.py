"""Telling images apart: cross entropy, top-1 and top-5."""

from typing import Any, ClassVar, Self

import torch.nn.functional as F
from torch import Tensor

from data_pipelines.images.batch import Batch
from tpp.common.errors import UserError
from tpp.models.architecture import Architecture
from tpp.models.settings import ModelSection
from train.tasks.base import LOSS, Forward, Metric, Settings, Task
from train.tasks.class_names import Labels, match_classes

TOP1 = Metric("top1", "Top-1", "top-1", unit="%", factor=100, noun="accuracy")
TOP5 = Metric("top5", "Top-5", "top-5", unit="%", factor=100, noun="accuracy")


class Classification(Task):
    """One class of several for each image; the classes are the class folders."""

    kind = "classification"
    metrics = (TOP1, TOP5, LOSS)
    told = (TOP1, LOSS)
    settings_type: ClassVar[type[Settings]] = Settings

    def __init__(self, settings: Settings, label_smoothing: float = 0.0) -> None:
        super().__init__(settings)
        self._label_smoothing = label_smoothing

    def with_label_smoothing(self, amount: float) -> Self:
        """This task with the labels of training smoothed (Szegedy et al. 2016)."""
        return type(self)(self.settings, amount)

    def architecture(
        self, model: ModelSection, classes: int | None = None, place: str = ""
    ) -> Architecture | None:
        """As many outputs as there are class folders, which the configuration may say too."""
        if None not in (model.num_classes, classes) and model.num_classes != classes:
            raise UserError(
                f"model.num_classes is {model.num_classes}, but {place} holds {classes} class "
                "folders"
            )
        number = model.num_classes or classes
        return None if number is None else Architecture(model.name, number, model.args)

    def file_extra(self, classes: list[str]) -> dict[str, Any]:
        """The classes' names, in the order of the outputs."""
        return {"classes": classes}

    def labels(
        self,
        classes: list[str],
        architecture: Architecture,
        names: list[str] | None,
        order: str | None,
        *,
        file: str,
        place: str,
    ) -> Labels | None:
        """By their names, where the file has them."""
        outputs = architecture.num_classes
        assert outputs is not None
        return match_classes(classes, outputs, names, order, file=file, place=place)

    def loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross entropy with labels (n,), or with shares of the classes (n, classes) if mixed."""
        images, labels = batch
        logits = forward(images)
        return F.cross_entropy(logits, labels, label_smoothing=self._label_smoothing), logits

    def training_sums(self, batch: Batch, outputs: Tensor) -> dict[Metric, Tensor]:
        """Top-1 of the images as augmented; of mixed ones, for the class of the larger share."""
        _, labels = batch
        classes = labels if labels.dim() == 1 else labels.argmax(1)
        return {TOP1: (outputs.argmax(1) == classes).sum()}

    def sums(self, forward: Forward, batch: Batch) -> dict[Metric, Tensor]:
        """Top-1, top-5 (of as many classes as there are) and cross entropy."""
        images, labels = batch
        logits = forward(images)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        return {
            TOP1: best[:, 0].sum(),
            TOP5: best.sum(),
            LOSS: F.cross_entropy(logits, labels, reduction="sum"),
        }
