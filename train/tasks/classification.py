"""Telling images apart: cross entropy, top-1 and top-5."""

import copy
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.images.batch import Batch
from data_pipelines.settings import AugmentSection, DataSection
from tpp.common.class_names import Labels, match_classes
from tpp.common.errors import UserError
from tpp.common.images import CROP_MODES
from tpp.models.architecture import Architecture
from tpp.models.settings import ModelSection
from train.tasks.base import LOSS, Forward, Metric, Settings, Task

TOP1 = Metric("top1", "Top-1", "top-1", unit="%", factor=100, noun="accuracy")
TOP5 = Metric("top5", "Top-5", "top-5", unit="%", factor=100, noun="accuracy")


class Classification(Task):
    """One class of several for each image; the classes are the class folders."""

    kind = "classification"
    metrics = (TOP1, TOP5, LOSS)
    told = (TOP1, LOSS)
    has_classes = True
    settings_type: ClassVar[type[Settings]] = Settings
    _loss, _label_smoothing = "cross_entropy", 0.0
    _bce_threshold: float | None = None
    _classes_of: Callable[[int], list[int]] | None = None
    _classes: Tensor | None = None

    def with_loss(
        self, loss: str, *, label_smoothing: float = 0.0, bce_threshold: float | None = None
    ) -> Self:
        """This task with another loss in training; evaluation's stays cross entropy.

        Args:
            loss: ``cross_entropy`` or ``bce``, see :func:`binary_cross_entropy`.
            label_smoothing: share of each target that is spread over all classes (Szegedy et al.
                2016).
            bce_threshold: see there.
        """
        other = copy.copy(self)
        other._loss, other._label_smoothing = loss, label_smoothing
        other._bce_threshold = bce_threshold
        return other

    def in_episodes(self, classes_of: Callable[[int], list[int]]) -> Self:
        """Training's loss, and top-1, are of the step's classes; evaluation is of all."""
        other = copy.copy(self)
        other._classes_of = classes_of
        return other

    def before_step(self, step: int, device: torch.device) -> None:
        """Write down the step's classes."""
        if self._classes_of is None:
            return
        classes = torch.tensor(self._classes_of(step), device=device)
        if self._classes is None:
            self._classes = classes
        else:
            self._classes.copy_(classes)

    def check_data(self, data: DataSection, augment: AugmentSection, key: str) -> None:
        """Images of one size."""
        if data.crop_mode != CROP_MODES[0]:
            raise ValueError(f"data.crop_mode: {data.crop_mode} goes with super_resolution")

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
        return None if number is None else Architecture(model.network, number, model.args)

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
        """Of labels (n,), or of shares of the classes (n, classes) if mixed."""
        images, labels = batch
        logits, smoothing = forward(images), self._label_smoothing
        outputs, logits, labels = self._of_classes(logits, labels)
        if self._loss == "bce":
            return binary_cross_entropy(logits, labels, smoothing, self._bce_threshold), outputs
        return F.cross_entropy(logits, labels, label_smoothing=smoothing), outputs

    def _of_classes(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of episodes: all logits, the lowest number for other classes; the classes' own; labels.

        Labels then count the episode's classes.
        """
        if self._classes_of is None:
            return logits, logits, labels
        classes = self._classes
        assert classes is not None
        own = logits.index_select(1, classes)
        others = torch.full_like(logits, torch.finfo(logits.dtype).min)
        masked = others.index_copy(1, classes, own)
        if labels.dim() == 2:
            return masked, own, labels.index_select(1, classes)
        return masked, own, torch.searchsorted(classes, labels)

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


def binary_cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, threshold: float | None = None
) -> Tensor:
    r"""Each class by itself, there or not (Wightman et al., "ResNet strikes back", 2021).

    .. math:: mean_n mean_c -(t_{nc} \log \sigma(x_{nc}) + (1 - t_{nc}) \log(1 - \sigma(x_{nc})))

    A mean over the classes, as timm's recipes have it, and not their sum. t is 1 - s + s / C for an
    image's class and s / C for the C - 1 others; of mixed images the mean of theirs, as timm's
    mixup makes it. It is timm's BinaryCrossEntropy.

    Args:
        logits: x, (n, C), float32 or more.
        labels: classes (n,), or shares of them (n, C).
        smoothing: s.
        threshold: t above it becomes 1, and any other 0 (timm's ``bce_target_thresh``).
    """
    if labels.dim() == 2:  # timm smooths these where it mixes
        labels = labels.to(logits.dtype) * (1 - smoothing) + smoothing / logits.shape[1]
    loss: Tensor = _timm_bce(smoothing, threshold)(logits, labels)
    return loss


@functools.cache
def _timm_bce(smoothing: float, threshold: float | None) -> Any:
    from timm.loss import BinaryCrossEntropy  # two seconds

    return BinaryCrossEntropy(smoothing, target_threshold=threshold)
